"""Multi-camera, multi-level bilinear sampling with attention weights."""

from saccade.deformable_aggregation.api import deformable_aggregation
from saccade.deformable_aggregation.formatting import feature_maps_format

__all__ = ["deformable_aggregation", "feature_maps_format"]
