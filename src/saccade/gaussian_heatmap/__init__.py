"""Gaussian heatmaps of object centres."""

from saccade.gaussian_heatmap.api import boxes_to_heatmap, draw_heatmap, draw_heatmap_batched, heatmap_targets
from saccade.gaussian_heatmap.radius import gaussian_radius

__all__ = ["boxes_to_heatmap", "draw_heatmap", "draw_heatmap_batched", "gaussian_radius", "heatmap_targets"]
