"""How operators meet PyTorch and Triton."""
