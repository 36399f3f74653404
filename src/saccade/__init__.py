"""Fused PyTorch operators for training camera perception models."""

from saccade import nn, ragged
from saccade.debug import debug_checks
from saccade.deformable_aggregation import deformable_aggregation, feature_maps_format
from saccade.gaussian_heatmap import (
    boxes_to_heatmap,
    draw_heatmap,
    draw_heatmap_batched,
    gaussian_radius,
    heatmap_targets,
)
from saccade.losses.focal import sigmoid_focal_loss, softmax_focal_loss
from saccade.losses.gaussian import gaussian_focal_loss, gaussian_focal_loss_with_logits
from saccade.ragged import RaggedBatch

__version__ = "0.1.0"

__all__ = [
    "RaggedBatch",
    "__version__",
    "boxes_to_heatmap",
    "debug_checks",
    "deformable_aggregation",
    "draw_heatmap",
    "draw_heatmap_batched",
    "feature_maps_format",
    "gaussian_focal_loss",
    "gaussian_focal_loss_with_logits",
    "gaussian_radius",
    "heatmap_targets",
    "nn",
    "ragged",
    "sigmoid_focal_loss",
    "softmax_focal_loss",
]
