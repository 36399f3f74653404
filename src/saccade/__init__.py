"""Fused PyTorch operators for training camera perception models."""

from saccade import nn
from saccade.debug import debug_checks
from saccade.deformable_aggregation import deformable_aggregation, feature_maps_format

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "debug_checks",
    "deformable_aggregation",
    "feature_maps_format",
    "nn",
]
