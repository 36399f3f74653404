"""What training leaves to look at: boxes, heatmaps, sampled points, curves and an animation."""
