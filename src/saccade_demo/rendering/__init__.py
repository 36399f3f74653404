"""Rendered scenes: what stands in a street, what it looks like, and the rays that see it. Needs NumPy alone."""
