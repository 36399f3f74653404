"""Modules on Saccade's operators, with the names, arguments and checkpoint keys of the projects they come from."""

from saccade.nn.deformable_feature_aggregation import DeformableFeatureAggregation
from saccade.nn.key_points import SparseBox3DKeyPointsGenerator, SparsePoint3DKeyPointsGenerator
from saccade.nn.losses import FocalLoss, GaussianFocalLoss, SigmoidFocalLoss, SoftmaxFocalLoss

__all__ = [
    "DeformableFeatureAggregation",
    "FocalLoss",
    "GaussianFocalLoss",
    "SigmoidFocalLoss",
    "SoftmaxFocalLoss",
    "SparseBox3DKeyPointsGenerator",
    "SparsePoint3DKeyPointsGenerator",
]
