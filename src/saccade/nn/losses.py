"""Losses as modules, with the constructors and ``forward`` of mmdet and mmcv.

Reduced losses of half-precision predictions are float32, whereas the originals round them to half.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from saccade.argument_checks import require_floating, require_integer, require_number, require_shape, require_tensor
from saccade.losses.focal import softmax_focal_loss
from saccade.losses.focal.api import SIGMOID_FOCAL_LOSS
from saccade.losses.focal.options import SigmoidOptions
from saccade.losses.gaussian.api import COUNTED, GAUSSIAN_FOCAL_LOSS
from saccade.losses.gaussian.options import GaussianOptions
from saccade.losses.reduction import AVG_FACTOR_EPS, reduction_of

ReductionName = Literal["none", "mean", "sum"]


def _require_reduction(name: str, reduction: Any) -> None:
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{name}: expected 'none', 'mean' or 'sum', got {reduction!r}")


def _require_fraction(name: str, value: Any) -> float:
    value = require_number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number in [0, 1], got {value}")
    return value


class FocalLoss(nn.Module):
    """Sigmoid focal loss with mmdet's interface.

    Args:
        use_sigmoid: Must be True.
        gamma: Focal power, at least 0.
        alpha: Weight of positives, in [0, 1]; negatives have ``1 - alpha``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``. The mean is over all N * C elements.
        loss_weight: Factor of the result.
        activated: Predictions are probabilities.
        avg_factor_eps: Added to ``avg_factor`` before dividing by it. 0 divides by ``avg_factor`` as it is, like mmdet
            before 2.28 and SparseDrive.

    Raises:
        NotImplementedError: ``use_sigmoid`` is False.
        TypeError: A number is none.
        ValueError: A number is out of range, or ``reduction`` is unknown.

    Example:
        >>> import torch
        >>> from saccade.nn import FocalLoss
        >>> pred = torch.tensor([[2.0, -1.0, 0.5], [-3.0, 0.0, 1.0]])
        >>> FocalLoss(loss_weight=2.0)(pred, torch.tensor([0, 3]), avg_factor=1)
        tensor(1.9139)
    """

    def __init__(
        self,
        use_sigmoid: bool = True,
        gamma: float = 2.0,
        alpha: float = 0.25,
        reduction: ReductionName = "mean",
        loss_weight: float = 1.0,
        activated: bool = False,
        *,
        avg_factor_eps: float = AVG_FACTOR_EPS,
    ):
        super().__init__()
        if not use_sigmoid:
            raise NotImplementedError("use_sigmoid: expected True, got False; see SoftmaxFocalLoss")
        gamma = require_number("gamma", gamma, minimum=0)
        alpha = _require_fraction("alpha", alpha)
        _require_reduction("reduction", reduction)
        loss_weight = require_number("loss_weight", loss_weight)
        avg_factor_eps = require_number("avg_factor_eps", avg_factor_eps, minimum=0)
        self.use_sigmoid = use_sigmoid
        self.gamma = gamma
        self.alpha = alpha
        self.reduction: ReductionName = reduction
        self.loss_weight = loss_weight
        self.activated = activated
        self.avg_factor_eps = avg_factor_eps

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: ReductionName | None = None,
    ) -> Tensor:
        """Compute the loss.

        Args:
            pred: (N, C) floating point logits, or probabilities if ``activated``.
            target: (N,) int32 or int64 labels, background outside [0, C); or targets of the shape of ``pred``: floating
                point in [0, 1], or one-hot of bool or integer dtype.
            weight: (N,) or (N, 1) weight of each row; or N * C weights, in the shape of ``pred`` or flat. Of any real
                dtype.
            avg_factor: Number or tensor of one element that the sum is divided by, instead of the mean.
            reduction_override: Reduction for this call.

        Returns:
            The loss; (N, C) for ``"none"``, of the shape of ``avg_factor`` if that is a tensor, else ().

        Raises:
            TypeError: As ``saccade.sigmoid_focal_loss``.
            ValueError: As ``saccade.sigmoid_focal_loss``, or ``weight`` has none of the shapes above.
        """
        if reduction_override is not None:
            _require_reduction("reduction_override", reduction_override)
        require_floating("pred", pred)
        require_tensor("target", target)
        if target.ndim != pred.ndim:
            if pred.ndim != 2:
                require_shape("pred", pred, "N C")
        elif not target.is_floating_point():
            if pred.ndim < 2:
                raise ValueError(f"pred: expected shape (N, C) with integer targets, got {tuple(pred.shape)}")
            target = target != 0  # one-hot
        if weight is not None:
            weight = _row_or_element_weight(pred, weight)
        options = SigmoidOptions(self.alpha, self.gamma, self.activated)
        reduction = reduction_override or self.reduction
        reduced = reduction_of(reduction, avg_factor, pred, self.loss_weight, self.avg_factor_eps)
        return SIGMOID_FOCAL_LOSS(pred, target, weight, None, options, reduced)


def _row_or_element_weight(pred: Tensor, weight: Tensor) -> Tensor:
    """View a weight as mmdet does: of the shape of ``pred``, or (N, 1) if its first size is N, or else (N, C)."""
    require_tensor("weight", weight)
    if weight.shape == pred.shape:
        return weight
    if weight.ndim and weight.shape[0] == pred.shape[0]:
        if weight.numel() == pred.shape[0]:
            return weight.reshape(-1, 1)
    elif weight.ndim and weight.numel() == pred.numel():
        return weight.reshape(pred.shape)
    raise ValueError(
        f"weight: expected the shape of pred {tuple(pred.shape)}, one weight for each of its rows, or as many "
        f"elements, got {tuple(weight.shape)}"
    )


def _require_rows_and_labels(input: Tensor, target: Tensor) -> None:
    require_floating("input", input)
    require_integer("target", target)
    rows, _ = require_shape("input", input, "N C")
    if target.shape != (rows,):
        raise ValueError(
            f"target: expected one label for each row of input {tuple(input.shape)}, got {tuple(target.shape)}"
        )


class _ClassWeightedLoss(nn.Module):
    """What mmcv's two focal loss modules have in common."""

    weight: Tensor | None

    def __init__(self, gamma: float, alpha: float, weight: Tensor | None = None, reduction: ReductionName = "mean"):
        super().__init__()
        gamma = require_number("gamma", gamma, minimum=0)
        alpha = _require_fraction("alpha", alpha)
        _require_reduction("reduction", reduction)
        if weight is not None:
            require_tensor("weight", weight)
        self.gamma = gamma
        self.alpha = alpha
        self.register_buffer("weight", weight)
        self.reduction: ReductionName = reduction

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, alpha={self.alpha}, reduction={self.reduction}"


class SigmoidFocalLoss(_ClassWeightedLoss):
    """Sigmoid focal loss with mmcv's interface; its mean divides by the number of **rows**.

    Args:
        gamma: Focal power, at least 0.
        alpha: Weight of positives, in [0, 1]; negatives have ``1 - alpha``.
        weight: (C,) weight of each row, picked by its label; background rows have weight 1. A buffer.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    Raises:
        TypeError: A number is none, or ``weight`` no tensor.
        ValueError: A number is out of range, or ``reduction`` is unknown.

    Example:
        >>> import torch
        >>> from saccade.nn import SigmoidFocalLoss
        >>> SigmoidFocalLoss(2.0, 0.25)(torch.tensor([[2.0, -1.0, 0.5], [-3.0, 0.0, 1.0]]), torch.tensor([0, 3]))
        tensor(0.4785)
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Compute the loss of (N, C) logits and (N,) int32 or int64 labels, background outside [0, C)."""
        _require_rows_and_labels(input, target)
        rows = input.shape[0] if self.reduction == "mean" else None
        options = SigmoidOptions(self.alpha, self.gamma, activated=False)
        return SIGMOID_FOCAL_LOSS(
            input, target, None, self.weight, options, reduction_of(self.reduction, rows, input, eps=0.0)
        )


class SoftmaxFocalLoss(_ClassWeightedLoss):
    """Softmax focal loss with mmcv's interface: labels outside [0, C) have no loss, but count in the mean.

    Args:
        gamma: Focal power, at least 0.
        alpha: A plain factor, in [0, 1].
        weight: (C,) weight of each row, picked by its label. A buffer.
        reduction: ``"none"`` (shape (N,)), ``"mean"`` over rows, or ``"sum"``.

    Raises:
        TypeError: A number is none, or ``weight`` no tensor.
        ValueError: A number is out of range, or ``reduction`` is unknown.

    Example:
        >>> import torch
        >>> from saccade.nn import SoftmaxFocalLoss
        >>> SoftmaxFocalLoss(2.0, 0.25)(torch.tensor([[2.0, -1.0, 0.5], [-3.0, 0.0, 1.0]]), torch.tensor([0, 1]))
        tensor(0.0909)
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Compute the loss of (N, C) logits and (N,) int32 or int64 labels."""
        _require_rows_and_labels(input, target)
        return softmax_focal_loss(
            input,
            target,
            alpha=self.alpha,
            gamma=self.gamma,
            class_weight=self.weight,
            reduction=self.reduction,
        )


class GaussianFocalLoss(nn.Module):
    """Gaussian focal loss of heatmap probabilities with the interface of mmdet 3.x.

    mmdet 2.x has ``weight`` where 3.x has ``pos_inds``: pass it by name, and both versions' calls work.

    Args:
        alpha: Power on the prediction, at least 0.
        gamma: Power on ``1 - target``, at least 0.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        loss_weight: Factor of the result.
        pos_weight: Factor of positives.
        neg_weight: Factor of all others.
        avg_factor_eps: Added to ``avg_factor`` before dividing by it; 0 divides by ``avg_factor`` as it is.

    Raises:
        TypeError: A number is none.
        ValueError: A number is out of range, or ``reduction`` is unknown.

    Example:
        >>> import torch
        >>> from saccade.nn import GaussianFocalLoss
        >>> pred, target = torch.tensor([0.9, 0.2, 0.7, 0.05, 0.5]), torch.tensor([1, 1, 0.6, 0, 0.95])
        >>> GaussianFocalLoss()(pred, target, avg_factor=2)
        tensor(0.5232)
    """

    def __init__(
        self,
        alpha: float = 2.0,
        gamma: float = 4.0,
        reduction: ReductionName = "mean",
        loss_weight: float = 1.0,
        pos_weight: float = 1.0,
        neg_weight: float = 1.0,
        *,
        avg_factor_eps: float = AVG_FACTOR_EPS,
    ):
        super().__init__()
        alpha = require_number("alpha", alpha, minimum=0)
        gamma = require_number("gamma", gamma, minimum=0)
        _require_reduction("reduction", reduction)
        loss_weight = require_number("loss_weight", loss_weight)
        pos_weight = require_number("pos_weight", pos_weight)
        neg_weight = require_number("neg_weight", neg_weight)
        avg_factor_eps = require_number("avg_factor_eps", avg_factor_eps, minimum=0)
        self.alpha = alpha
        self.gamma = gamma
        self.reduction: ReductionName = reduction
        self.loss_weight = loss_weight
        self.pos_weight = pos_weight
        self.neg_weight = neg_weight
        self.avg_factor_eps = avg_factor_eps

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        pos_inds: Tensor | None = None,
        pos_labels: Tensor | None = None,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | Literal["num_pos"] | None = None,
        reduction_override: ReductionName | None = None,
    ) -> Tensor:
        """Compute the loss.

        Without ``pos_inds``, positives are the elements whose target is exactly 1. With it they are those listed, and
        every element counts as a negative besides (where its target is 1 that is nothing). Each of the two terms is
        reduced for itself then, over M or over N * C elements, and ``weight`` is ignored.

        Args:
            pred: Floating point probabilities of any shape; (N, C) with ``pos_inds``.
            target: Heatmap of the same shape, in [0, 1].
            pos_inds: (M,) int32 or int64 row of each positive, repeats counted; a negative one counts from the end.
                Rows and labels that do not exist are skipped.
            pos_labels: (M,) int32 or int64 class of each positive.
            weight: Weight of each element; broadcasts to the shape of ``pred``.
            avg_factor: What sums are divided by instead: a number, a tensor of one element, or ``"num_pos"``, though
                not that with ``pos_inds``.
            reduction_override: Reduction for this call.

        Returns:
            The loss; of the shape of ``pred`` for ``"none"``, of the shape of ``avg_factor`` if that is a tensor,
            else ().

        Raises:
            TypeError: As ``saccade.gaussian_focal_loss``.
            ValueError: As ``saccade.gaussian_focal_loss``; one of ``pos_inds`` and ``pos_labels`` without the other, or
                of another length; ``pos_inds`` with reduction ``"none"`` (its two terms differ in shape) or with
                ``"num_pos"``.
        """
        if reduction_override is not None:
            _require_reduction("reduction_override", reduction_override)
        reduction = reduction_override or self.reduction
        if pos_inds is None and pos_labels is None:
            return self._term(pred, target, weight, self.pos_weight, self.neg_weight, reduction, avg_factor)
        if pos_inds is None or pos_labels is None:
            missing = "pos_inds" if pos_inds is None else "pos_labels"
            raise ValueError(
                f"{missing}: expected a tensor, as pos_inds and pos_labels belong together, got None; "
                "a weight, third in mmdet 2.x, is passed by name"
            )
        require_integer("pos_inds", pos_inds)
        require_integer("pos_labels", pos_labels)
        (count,) = require_shape("pos_inds", pos_inds, "M")
        require_shape("pos_labels", pos_labels, "M", M=count)
        require_floating("pred", pred)
        require_shape("pred", pred, "N C")
        if reduction == "none":
            raise ValueError("reduction: expected 'mean' or 'sum' with pos_inds, got 'none'")
        if isinstance(avg_factor, str):
            raise ValueError(f"avg_factor: expected a number, a tensor or None with pos_inds, got {avg_factor!r}")
        negative = self._term(pred, target, None, 0.0, self.neg_weight, reduction, avg_factor)
        if count == 0 or pred.numel() == 0:
            return negative
        picked, exists = _pick(pred, pos_inds, pos_labels)
        ones = torch.ones_like(picked)
        return negative + self._term(picked, ones, exists, self.pos_weight, 0.0, reduction, avg_factor)

    def _term(
        self,
        pred: Tensor,
        target: Tensor,
        weight: Tensor | None,
        pos_weight: float,
        neg_weight: float,
        reduction: ReductionName,
        avg_factor: Any,
    ) -> Tensor:
        options = GaussianOptions(self.alpha, self.gamma, pos_weight, neg_weight, with_logits=False, clip=None)
        reduced = reduction_of(reduction, avg_factor, pred, self.loss_weight, self.avg_factor_eps, COUNTED)
        return GAUSSIAN_FOCAL_LOSS(pred, target, weight, options, reduced)[0]


def _pick(pred: Tensor, rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """``pred[rows, labels]`` and which of them exist, without waiting for the device to tell."""
    count, classes = pred.shape
    exists = (rows >= -count) & (rows < count) & (labels >= 0) & (labels < classes)
    index = torch.where(rows < 0, rows + count, rows).long() * classes + labels
    return pred.reshape(-1)[torch.where(exists, index, 0)], exists
