"""SparseDrive's and Sparse4D's names on Saccade: change the import line and nothing else.

Functions and modules have the signatures, the output dtypes and the averaging of the originals; see
``docs/migrating.md`` for what behaves better.

Example:
    >>> import torch
    >>> from saccade.compat.sparsedrive import FocalLoss
    >>> criterion = FocalLoss(use_sigmoid=True, gamma=2.0, alpha=0.25, reduction="mean", loss_weight=1.0)
    >>> criterion(torch.zeros(4, 10), torch.tensor([3, 10, -1, 9]), avg_factor=2.0)
    tensor(2.5127)
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

import saccade
from saccade.deformable_aggregation import feature_maps_format
from saccade.nn import DeformableFeatureAggregation

__all__ = [
    "CUDA_EXT_AVAILABLE",
    "DAF_AVAILABLE",
    "FOCAL_LOSS_AVAILABLE",
    "DeformableAggregationFunction",
    "DeformableFeatureAggregation",
    "FocalLoss",
    "deformable_aggregation_function",
    "feature_maps_format",
    "sigmoid_focal_loss",
]

DAF_AVAILABLE = True
"""The aggregation works, on the CPU too; ``saccade doctor`` says on which backend."""
FOCAL_LOSS_AVAILABLE = True
"""The focal loss works, on the CPU too."""
CUDA_EXT_AVAILABLE = True
"""What the originals' extension does is there; nothing is ever compiled."""


def deformable_aggregation_function(
    feature_maps: Tensor,
    spatial_shape: Tensor,
    scale_start_index: Tensor,
    sampling_location: Tensor,
    weights: Tensor,
) -> Tensor:
    """``saccade.deformable_aggregation`` with the originals' dtypes: everything in float32, under autocast too."""
    kind = feature_maps.device.type
    with torch.autocast(kind, enabled=False) if kind in ("cpu", "cuda") else nullcontext():
        return saccade.deformable_aggregation(
            feature_maps.float(), spatial_shape, scale_start_index, sampling_location.float(), weights.float()
        )


class DeformableAggregationFunction:
    """The originals' autograd function, of which only ``apply`` is called."""

    @staticmethod
    def apply(
        mc_ms_feat: Tensor,
        spatial_shape: Tensor,
        scale_start_index: Tensor,
        sampling_location: Tensor,
        weights: Tensor,
        /,
    ) -> Tensor:
        """``deformable_aggregation_function``, positional only."""
        return deformable_aggregation_function(mc_ms_feat, spatial_shape, scale_start_index, sampling_location, weights)


def sigmoid_focal_loss(
    input: Tensor,
    target: Tensor,
    gamma: float = 2.0,
    alpha: float = 0.25,
    weight: Tensor | None = None,
    reduction: Any = "mean",
    /,
) -> Tensor:
    """mmcv's function: positional only, gamma before alpha, ``weight`` for each class, the mean over rows.

    Args:
        input: (N, C) logits.
        target: (N,) int32 or int64 labels; those outside [0, C) are background.
        gamma: Focal power.
        alpha: Weight of positives, in [0, 1].
        weight: (C,) weight of a row, picked by its label.
        reduction: ``"none"``, ``"sum"``, or ``"mean"``, which divides by N.

    Returns:
        (N, C), or a scalar; in the dtype of ``input``.
    """
    return saccade.nn.SigmoidFocalLoss(gamma, alpha, weight, reduction)(input, target).to(input.dtype)


class FocalLoss(saccade.nn.FocalLoss):
    """``saccade.nn.FocalLoss`` that divides by ``avg_factor`` as it is and returns the dtype of the predictions."""

    def __init__(
        self,
        use_sigmoid: bool = True,
        gamma: float = 2.0,
        alpha: float = 0.25,
        reduction: Any = "mean",
        loss_weight: float = 1.0,
        activated: bool = False,
    ) -> None:
        super().__init__(use_sigmoid, gamma, alpha, reduction, loss_weight, activated, avg_factor_eps=0.0)

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: Any = None,
    ) -> Tensor:
        """See ``saccade.nn.FocalLoss``."""
        return super().forward(pred, target, weight, avg_factor, reduction_override).to(pred.dtype)
