"""Modules on Saccade's operators, with the names, arguments and checkpoint keys of the projects they come from."""

from saccade.nn.deformable_feature_aggregation import DeformableFeatureAggregation
from saccade.nn.key_points import SparseBox3DKeyPointsGenerator, SparsePoint3DKeyPointsGenerator

__all__ = [
    "DeformableFeatureAggregation",
    "SparseBox3DKeyPointsGenerator",
    "SparsePoint3DKeyPointsGenerator",
]
