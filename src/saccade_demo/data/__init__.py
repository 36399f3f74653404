"""Samples and where they come from: rendered, a frame in a directory, or nuScenes; and batches made of them."""
