"""Gaussian heatmaps of object centres."""

from saccade.gaussian_heatmap.api import draw_heatmap, draw_heatmap_batched
from saccade.gaussian_heatmap.radius import gaussian_radius

__all__ = ["draw_heatmap", "draw_heatmap_batched", "gaussian_radius"]
