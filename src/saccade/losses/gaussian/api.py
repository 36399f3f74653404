"""The public functions: ``gaussian_focal_loss`` and ``gaussian_focal_loss_with_logits``."""

from typing import Any, Literal

from torch import Tensor

from saccade.argument_checks import require_constant, require_floating, require_real, require_same_device
from saccade.losses.gaussian import reference
from saccade.losses.gaussian.options import GaussianOptions
from saccade.losses.reduction import Reduction, new_loss, reduction_of, require_avg_factor
from saccade.operator.declaration import Operator
from saccade.operator.gradients import Backward

COUNTED = ("num_pos",)
"""What a mean may divide by that the operator counts."""


def gaussian_focal_loss(
    pred: Tensor,
    target: Tensor,
    *,
    alpha: float = 2.0,
    gamma: float = 4.0,
    weight: Tensor | None = None,
    pos_weight: float = 1.0,
    neg_weight: float = 1.0,
    reduction: Literal["none", "mean", "sum"] = "mean",
    avg_factor: float | Tensor | Literal["num_pos"] | None = None,
) -> Tensor:
    """Focal loss of a heatmap whose positives are peaks of 1 with Gaussian slopes around them, from probabilities.

    With ``e = 1e-12``, an element's loss is ``-log(p + e) * (1 - p)**alpha`` where the target ``t`` is exactly 1, and
    ``-log(1 - p + e) * p**alpha * (1 - t)**gamma`` elsewhere. ``gaussian_focal_loss_with_logits`` takes logits and
    needs no ``e``: prefer it, for after a sigmoid the gradient of a confidently wrong positive fades here.

    Args:
        pred: Floating point probabilities of any shape. Outside [0, 1] the loss may be NaN.
        target: Floating point heatmap of the same shape, in [0, 1]; ``1 - t`` is clamped to that range. Positives are
            told by ``t == 1`` in its own dtype. A constant: it has no gradient.
        alpha: Power on the prediction, at least 0 (elsewhere often called gamma).
        gamma: Power on ``1 - target``, at least 0.
        weight: Weight of each element, of any real dtype and any shape that broadcasts to that of ``pred``.
        pos_weight: Factor of positives.
        neg_weight: Factor of all others.
        reduction: ``"none"``, ``"sum"``, or ``"mean"``, which divides by the number of elements.
        avg_factor: With ``"mean"``, divide the sum by ``avg_factor + 1.1920929e-07`` instead. A number, a tensor of one
            element that is read on its device, or ``"num_pos"``: the number of positives, at least 1, counted on the
            device. ``"none"`` ignores it.

    Returns:
        ``"none"``: the shape and dtype of ``pred``. Otherwise the reduced loss, float32 (float64 for float64 ``pred``)
        and summed so, of the shape of ``avg_factor`` if that is a tensor, else (). Of no elements, ``"mean"`` is NaN
        and everything else 0. Gradients flow to ``pred`` and ``weight``; differentiating twice raises. Autocast changes
        nothing.

    Raises:
        TypeError: An argument is no tensor or not of a dtype as said above.
        ValueError: Shapes or devices disagree, a number is out of range, an unknown ``reduction``, ``avg_factor`` with
            ``"sum"``, or an argument requires grad that gets none.

    The loss of CornerNet (Law and Deng, 2018, https://arxiv.org/abs/1808.01244) and CenterNet.

    Example:
        >>> import torch, saccade
        >>> pred, target = torch.tensor([0.9, 0.2, 0.7, 0.05, 0.5]), torch.tensor([1, 1, 0.6, 0, 0.95])
        >>> saccade.gaussian_focal_loss(pred, target, reduction="sum")
        tensor(1.0463)
    """
    options = GaussianOptions(alpha, gamma, pos_weight, neg_weight, with_logits=False, clip=None)
    reduced = reduction_of(reduction, avg_factor, pred, counted=COUNTED)
    return GAUSSIAN_FOCAL_LOSS(pred, target, weight, options, reduced)[0]


def gaussian_focal_loss_with_logits(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 2.0,
    gamma: float = 4.0,
    weight: Tensor | None = None,
    pos_weight: float = 1.0,
    neg_weight: float = 1.0,
    clip: float | None = None,
    reduction: Literal["none", "mean", "sum"] = "mean",
    avg_factor: float | Tensor | Literal["num_pos"] | None = None,
) -> Tensor:
    """``gaussian_focal_loss`` of ``sigmoid(logits)``, stable and without its ``1e-12``.

    Values and gradients of all finite logits are finite, and a confidently wrong positive keeps a slope of about -1; an
    infinite logit has the limit.

    Args:
        logits: Floating point logits of any shape.
        target: As in ``gaussian_focal_loss``.
        alpha: As in ``gaussian_focal_loss``.
        gamma: As in ``gaussian_focal_loss``.
        weight: As in ``gaussian_focal_loss``.
        pos_weight: As in ``gaussian_focal_loss``.
        neg_weight: As in ``gaussian_focal_loss``.
        clip: Clamp probabilities to [clip, 1 - clip], as CenterPoint does with 1e-4. The gradient is 0 beyond.
            Between 0 and 0.5, both excluded, or ``None``.
        reduction: As in ``gaussian_focal_loss``.
        avg_factor: As in ``gaussian_focal_loss``.

    Returns:
        As ``gaussian_focal_loss``.

    Raises:
        TypeError: As ``gaussian_focal_loss``.
        ValueError: As ``gaussian_focal_loss``.

    Example:
        >>> import torch, saccade
        >>> logits, target = torch.tensor([2.0, -1.0, 1.0, -3.0]), torch.tensor([1.0, 1.0, 0.6, 0.0])
        >>> saccade.gaussian_focal_loss_with_logits(logits, target, avg_factor="num_pos")
        tensor(0.3609)
    """
    options = GaussianOptions(alpha, gamma, pos_weight, neg_weight, with_logits=True, clip=clip)
    reduced = reduction_of(reduction, avg_factor, logits, counted=COUNTED)
    return GAUSSIAN_FOCAL_LOSS(logits, target, weight, options, reduced)[0]


def _check(
    pred: Tensor, target: Tensor, weight: Tensor | None, options: GaussianOptions, reduction: Reduction
) -> tuple[Any, ...]:
    name = options.name
    require_floating(name, pred)
    require_floating("target", target)
    if target.shape != pred.shape:
        raise ValueError(f"target: expected the shape of {name}, {tuple(pred.shape)}, got {tuple(target.shape)}")
    require_constant("target", target)
    if weight is not None:
        require_real("weight", weight)
        _require_broadcast(name, pred, weight)
    options = options.checked()
    require_same_device(**{name: pred}, target=target, weight=weight)
    require_avg_factor(reduction, name, pred)
    return pred, target, weight, options, reduction


def _require_broadcast(name: str, pred: Tensor, weight: Tensor) -> None:
    trailing = pred.shape[pred.ndim - weight.ndim :] if weight.ndim <= pred.ndim else ()
    if len(trailing) < weight.ndim or any(size not in (1, n) for size, n in zip(weight.shape, trailing, strict=True)):
        raise ValueError(
            f"weight: expected a shape that broadcasts to that of {name}, {tuple(pred.shape)}, "
            f"got {tuple(weight.shape)}"
        )


def _fake(*, pred: Tensor, reduction: Reduction, **_: Any) -> tuple[Tensor, Tensor]:
    return new_loss(pred, pred.shape, reduction), reference.new_count(pred, reduction)


def _with_positives_counted(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: GaussianOptions,
    reduction: Reduction,
    result: tuple[Tensor, Tensor],
) -> tuple[Any, ...]:
    """The arguments for backward, which divides by the number of positives that forward has counted."""
    return pred, target, weight, options, reference.with_positives_counted(reduction, result[1])


_LAUNCH = "saccade.losses.gaussian.launch:prepare_gaussian_focal_loss"

GAUSSIAN_FOCAL_LOSS = Operator(
    "gaussian_focal_loss(Tensor pred, Tensor target, Tensor? weight, GaussianOptions options, Reduction reduction) "
    "-> (Tensor, Tensor)",
    groups=(GaussianOptions, Reduction),
    check=_check,
    fake=_fake,
    reference=reference.gaussian_focal_loss,
    kernels=_LAUNCH,
    nonempty=("pred",),
    varying=("scale",),
    gradient=Backward(
        of=("pred", "weight"),
        reference=reference.gaussian_focal_loss_backward,
        kernels=f"{_LAUNCH}_backward",
        with_result=f"{_LAUNCH}_with_gradient",
        arguments=_with_positives_counted,
    ),
)
