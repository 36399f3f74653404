"""How the detector is trained: its losses, the stream of batches, one process or several, checkpoints and logs."""
