"""The public functions: ``sigmoid_focal_loss`` and ``softmax_focal_loss``."""

from typing import Any, Literal

import torch
from torch import Tensor

from saccade.argument_checks import (
    require_constant,
    require_floating,
    require_integer,
    require_number,
    require_real,
    require_same_device,
    require_shape,
    require_tensor,
)
from saccade.losses.focal import reference
from saccade.losses.focal.options import SigmoidOptions
from saccade.losses.reduction import Reduction, new_loss, reduction_of, require_avg_factor
from saccade.operator.declaration import Operator
from saccade.operator.gradients import Backward


def sigmoid_focal_loss(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
    weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    activated: bool = False,
    reduction: Literal["none", "mean", "sum"] = "mean",
    avg_factor: float | Tensor | None = None,
) -> Tensor:
    """Binary focal loss of every class: cross entropy that easy examples add little to.

    With ``p = sigmoid(logits)`` and a target ``t`` of 0 or 1, an element's loss is
    ``alpha * (1 - p)**gamma * -log(p)`` for ``t = 1`` and ``(1 - alpha) * p**gamma * -log(1 - p)`` for ``t = 0``; for
    ``t`` in between it is ``(alpha * t + (1 - alpha) * (1 - t)) * (t * (1 - p) + (1 - t) * p)**gamma`` times the cross
    entropy. Values and gradients of all finite logits are finite; an infinite logit has the limit.

    Letters: ... any leading axes (rows), C classes.

    Args:
        logits: (..., C) floating point, any strides.
        target: (...) int32 or int64 class of each row, where every number outside [0, C) is background (all of the
            row's elements are negatives); or (..., C) bool or floating point, each element's target in [0, 1].
        alpha: Weight of positives in [0, 1], that of negatives being ``1 - alpha``. Negative: no balancing, both 1.
        gamma: Focal power, at least 0.
        weight: (...) weight of each row, or (..., C) or (..., 1) weight of each element, of any real dtype. The number
            of axes tells them apart.
        class_weight: (C,) weight of each row, picked by its label; background rows have weight 1. Integer targets only.
        activated: ``logits`` are probabilities in [0, 1]. Logarithms are clamped at -100 then.
        reduction: ``"none"``, ``"sum"``, or ``"mean"``, which divides by the number of elements.
        avg_factor: With ``"mean"``, divide the sum by ``avg_factor + 1.1920929e-07`` instead. A number, or a tensor of
            one element that is read on its device. ``"none"`` ignores it.

    Returns:
        ``"none"``: (..., C) in the dtype of ``logits``. Otherwise the reduced loss, float32 (float64 for float64
        logits) and summed so, of the shape of ``avg_factor`` if that is a tensor, else (). Of no elements, ``"mean"``
        is NaN and everything else 0. Gradients flow to ``logits`` and ``weight``; differentiating twice raises.
        Autocast changes nothing.

    Raises:
        TypeError: An argument is no tensor or not of a dtype as said above.
        ValueError: Shapes or devices disagree, a number is out of range, an unknown ``reduction``, ``avg_factor`` with
            ``"sum"``, ``class_weight`` with a dense target, or an argument requires grad that gets none.

    The loss of RetinaNet (Lin et al., "Focal Loss for Dense Object Detection", 2017, https://arxiv.org/abs/1708.02002).

    Example:
        >>> import torch, saccade
        >>> logits = torch.tensor([[2.0, -1.0, 0.5], [-3.0, 0.0, 1.0], [0.25, -0.75, 4.0]])
        >>> saccade.sigmoid_focal_loss(logits, torch.tensor([0, 3, 2]))  # 3 is background
        tensor(0.1314)
    """
    options = SigmoidOptions(alpha, gamma, activated)
    return SIGMOID_FOCAL_LOSS(
        logits, target, weight, class_weight, options, reduction_of(reduction, avg_factor, logits)
    )


def softmax_focal_loss(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
    class_weight: Tensor | None = None,
    reduction: Literal["none", "mean", "sum"] = "mean",
    avg_factor: float | Tensor | None = None,
) -> Tensor:
    """Focal loss of exclusive classes: of each row, ``-alpha * (1 - p)**gamma * log(p)`` at its label's probability.

    ``p`` is the softmax over the last axis. Rows whose label is outside [0, C) have loss and gradient 0.

    Letters: ... any leading axes (rows), C classes.

    Args:
        logits: (..., C) floating point, any strides.
        target: (...) int32 or int64 class of each row.
        alpha: A plain factor in [0, 1].
        gamma: Focal power, at least 0.
        class_weight: (C,) weight of each row, picked by its label.
        reduction: ``"none"``, ``"sum"``, or ``"mean"``, which divides by the number of rows, those of loss 0 included.
        avg_factor: With ``"mean"``, divide the sum by ``avg_factor + 1.1920929e-07`` instead. A number, or a tensor of
            one element that is read on its device. ``"none"`` ignores it.

    Returns:
        ``"none"``: (...) in the dtype of ``logits``. Otherwise the reduced loss, float32 (float64 for float64 logits)
        and summed so, of the shape of ``avg_factor`` if that is a tensor, else (). Of no rows, ``"mean"`` is NaN and
        everything else 0. The gradient flows to ``logits`` alone; differentiating twice raises. Autocast changes
        nothing.

    Raises:
        TypeError: An argument is no tensor or not of a dtype as said above.
        ValueError: Shapes or devices disagree, a number is out of range, an unknown ``reduction``, ``avg_factor`` with
            ``"sum"``, or an argument requires grad that gets none.

    The softmax form of the loss of RetinaNet (Lin et al., 2017, https://arxiv.org/abs/1708.02002), as in mmcv.

    Example:
        >>> import torch, saccade
        >>> logits = torch.tensor([[2.0, -1.0, 0.5], [-3.0, 0.0, 1.0], [0.25, -0.75, 4.0]])
        >>> saccade.softmax_focal_loss(logits, torch.tensor([0, 1, 2]), reduction="none")
        tensor([2.7732e-03, 1.7897e-01, 7.6891e-06])
    """
    reduced = reduction_of(reduction, avg_factor, logits)
    return SOFTMAX_FOCAL_LOSS(logits, target, class_weight, alpha, gamma, reduced)


def _check_sigmoid(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    class_weight: Tensor | None,
    options: SigmoidOptions,
    reduction: Reduction,
) -> tuple[Any, ...]:
    _require_logits(logits)
    require_tensor("target", target)
    if target.ndim != logits.ndim and target.dtype in (torch.int32, torch.int64):
        _require_labels(logits, target, class_weight)
    else:
        _require_dense(logits, target)
        if class_weight is not None:
            raise ValueError("class_weight: expected None with a dense target, got one")
    if weight is not None:
        require_real("weight", weight)
        _require_weight_shape(logits, weight)
    options = options.checked()
    require_same_device(logits=logits, target=target, weight=weight, class_weight=class_weight)
    require_avg_factor(reduction, "logits", logits)
    return logits, target, weight, class_weight, options, reduction


def _check_softmax(
    logits: Tensor, target: Tensor, class_weight: Tensor | None, alpha: float, gamma: float, reduction: Reduction
) -> tuple[Any, ...]:
    _require_logits(logits)
    _require_labels(logits, target, class_weight)
    alpha, gamma = require_number("alpha", alpha, minimum=0), require_number("gamma", gamma, minimum=0)
    if alpha > 1:
        raise ValueError(f"alpha: expected a number in [0, 1], got {alpha}")
    require_same_device(logits=logits, target=target, class_weight=class_weight)
    require_avg_factor(reduction, "logits", logits)
    return logits, target, class_weight, alpha, gamma, reduction


def _require_logits(logits: Tensor) -> None:
    require_floating("logits", logits)
    if logits.ndim == 0:
        raise ValueError("logits: expected shape (..., C), got ()")


def _require_labels(logits: Tensor, target: Tensor, class_weight: Tensor | None) -> None:
    """Check labels, and the weights that they pick."""
    require_integer("target", target)
    if target.shape != logits.shape[:-1]:
        raise ValueError(
            f"target: expected one label for each row of logits {tuple(logits.shape)}, "
            f"shape {tuple(logits.shape[:-1])}, got {tuple(target.shape)}"
        )
    if class_weight is not None:
        require_real("class_weight", class_weight)
        require_shape("class_weight", class_weight, "C", C=logits.shape[-1])
        require_constant("class_weight", class_weight)


def _require_dense(logits: Tensor, target: Tensor) -> None:
    is_dense = target.dtype == torch.bool or target.is_floating_point()
    if not is_dense or target.ndim == logits.ndim - 1:
        raise TypeError(
            f"target: expected int32 or int64 labels of shape {tuple(logits.shape[:-1])}, or bool or floating targets "
            f"of shape {tuple(logits.shape)}, got {target.dtype} of shape {tuple(target.shape)}"
        )
    if target.shape != logits.shape:
        raise ValueError(f"target: expected the shape of logits, {tuple(logits.shape)}, got {tuple(target.shape)}")
    require_constant("target", target)


def _require_weight_shape(logits: Tensor, weight: Tensor) -> None:
    """Raise unless there is a weight for each row, (...) or (..., 1), or for each element."""
    rows, classes = logits.shape[:-1], logits.shape[-1]
    if weight.shape == rows:
        return
    # Not `not in (1, classes)`: torch.compile is wrong about a number of classes that varies.
    size = weight.shape[-1] if weight.ndim == logits.ndim else -1
    if weight.shape[:-1] != rows or (size != 1 and size != classes):
        raise ValueError(
            f"weight: expected shape {tuple(rows)}, {(*rows, 1)} or {(*rows, classes)} with logits of shape "
            f"{tuple(logits.shape)}, got {tuple(weight.shape)}"
        )


def _fake_loss(*, logits: Tensor, reduction: Reduction, **_: Any) -> Tensor:
    return new_loss(logits, logits.shape, reduction)


def _fake_softmax(*, logits: Tensor, target: Tensor, reduction: Reduction, **_: Any) -> Tensor:
    return new_loss(logits, target.shape, reduction)


_LAUNCH = "saccade.losses.focal.launch:prepare"

SIGMOID_FOCAL_LOSS = Operator(
    "sigmoid_focal_loss(Tensor logits, Tensor target, Tensor? weight, Tensor? class_weight, SigmoidOptions options, "
    "Reduction reduction) -> Tensor",
    groups=(SigmoidOptions, Reduction),
    check=_check_sigmoid,
    fake=_fake_loss,
    reference=reference.sigmoid_focal_loss,
    kernels=f"{_LAUNCH}_sigmoid_focal_loss",
    nonempty=("logits",),
    varying=("scale",),
    gradient=Backward(
        of=("logits", "weight"),
        reference=reference.sigmoid_focal_loss_backward,
        kernels=f"{_LAUNCH}_sigmoid_focal_loss_backward",
        with_result=f"{_LAUNCH}_sigmoid_focal_loss_with_gradient",
    ),
)
SOFTMAX_FOCAL_LOSS = Operator(
    "softmax_focal_loss(Tensor logits, Tensor target, Tensor? class_weight, float alpha, float gamma, "
    "Reduction reduction) -> Tensor",
    groups=(Reduction,),
    check=_check_softmax,
    fake=_fake_softmax,
    reference=reference.softmax_focal_loss,
    kernels=f"{_LAUNCH}_softmax_focal_loss",
    nonempty=("logits",),
    varying=("scale",),
    gradient=Backward(
        of=("logits",),
        reference=reference.softmax_focal_loss_backward,
        kernels=f"{_LAUNCH}_softmax_focal_loss_backward",
    ),
)
