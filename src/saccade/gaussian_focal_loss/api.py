"""The public functions: ``gaussian_focal_loss`` and ``gaussian_focal_loss_with_logits``."""

from typing import Any, Literal

import torch
from torch import Tensor

from saccade.argument_checks import (
    require_constant,
    require_floating,
    require_number,
    require_real,
    require_same_device,
)
from saccade.gaussian_focal_loss import reference
from saccade.loss_reduction import AVG_FACTOR_EPS, checked_reduction, new_loss
from saccade.precision import compute_dtype
from saccade.registration import DirectCall, Gradient, register, register_autograd, register_backward
from saccade.triton_dispatch import served_by_triton


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
    return scaled_gaussian_focal_loss(
        "pred",
        pred,
        target,
        alpha=alpha,
        gamma=gamma,
        weight=weight,
        pos_weight=pos_weight,
        neg_weight=neg_weight,
        reduction=reduction,
        avg_factor=avg_factor,
    )


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
    return scaled_gaussian_focal_loss(
        "logits",
        logits,
        target,
        alpha=alpha,
        gamma=gamma,
        weight=weight,
        pos_weight=pos_weight,
        neg_weight=neg_weight,
        clip=clip,
        reduction=reduction,
        avg_factor=avg_factor,
    )


def scaled_gaussian_focal_loss(
    name: Literal["pred", "logits"],
    pred: Tensor,
    target: Tensor,
    *,
    alpha: float,
    gamma: float,
    weight: Tensor | None = None,
    pos_weight: float = 1.0,
    neg_weight: float = 1.0,
    clip: float | None = None,
    reduction: Any = "mean",
    avg_factor: float | Tensor | Literal["num_pos"] | None = None,
    scale: float = 1.0,
    avg_factor_eps: float = AVG_FACTOR_EPS,
) -> Tensor:
    """Either form, by ``name``, times ``scale`` and with another number added to ``avg_factor``: for modules, too."""
    with_tensor = isinstance(avg_factor, Tensor)
    given = pred, target, weight, avg_factor if with_tensor else None
    tensors = tuple(tensor for tensor in given if tensor is not None)
    counts_positives = isinstance(avg_factor, str) and avg_factor == "num_pos"
    numbers = alpha, gamma, pos_weight, neg_weight, clip
    others = name, *numbers, reduction, weight is None, with_tensor, counts_positives, avg_factor is None
    way = _call.known(tensors, others)
    if way is None:
        require_floating(name, pred)
        require_floating("target", target)
        if target.shape != pred.shape:
            raise ValueError(f"target: expected the shape of {name}, {tuple(pred.shape)}, got {tuple(target.shape)}")
        require_constant("target", target)
        if weight is not None:
            require_real("weight", weight)
            _require_broadcast(name, pred, weight)
        alpha = require_number("alpha", alpha, minimum=0)
        gamma = require_number("gamma", gamma, minimum=0)
        pos_weight = require_number("pos_weight", pos_weight)
        neg_weight = require_number("neg_weight", neg_weight)
        if clip is not None:
            clip = require_number("clip", clip, above=0)
            if clip >= 0.5:
                raise ValueError(f"clip: expected a number between 0 and 0.5, got {clip}")
        require_same_device(**{name: pred}, target=target, weight=weight)
        numbers = alpha, gamma, pos_weight, neg_weight, clip
    number = 1.0 if counts_positives else avg_factor
    how = checked_reduction(reduction, number, name, pred, scale, avg_factor_eps)
    if counts_positives and reduction != "none":
        how = "num_pos", None, scale, avg_factor_eps
    args = pred, target, weight, *numbers[:4], name == "logits", numbers[4], *how
    if way is None:
        way = _call.learn(tensors, others, args)
    loss, _ = way(*args)
    return loss


def _require_broadcast(name: str, pred: Tensor, weight: Tensor) -> None:
    trailing = pred.shape[pred.ndim - weight.ndim :] if weight.ndim <= pred.ndim else ()
    pairs = zip(weight.shape, trailing, strict=True) if len(trailing) == weight.ndim else [(0, 1)]
    if any(size not in (1, expected) for size, expected in pairs):
        raise ValueError(
            f"weight: expected a shape that broadcasts to that of {name}, {tuple(pred.shape)}, "
            f"got {tuple(weight.shape)}"
        )


def _loss(pred: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    if served_by_triton(pred) and pred.numel():
        from saccade.gaussian_focal_loss import kernels

        return kernels.gaussian_focal_loss(pred, *args)
    return reference.gaussian_focal_loss(pred, *args)


def _loss_backward(grad_output: Tensor, pred: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    if served_by_triton(pred) and pred.numel():
        from saccade.gaussian_focal_loss import kernels

        return kernels.gaussian_focal_loss_backward(grad_output, pred, *args)
    return reference.gaussian_focal_loss_backward(grad_output, pred, *args)


def _fake(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None,
    alpha: float,
    gamma: float,
    pos_weight: float,
    neg_weight: float,
    with_logits: bool,
    clip: float | None,
    kind: str,
    avg_factor: Tensor | None,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    divisor = pred.new_empty(() if kind == "num_pos" else 0, dtype=compute_dtype(pred))
    return new_loss(pred, pred.shape, kind, avg_factor), divisor


def _backward_fake(
    grad_output: Tensor, pred: Tensor, target: Tensor, weight: Tensor | None, *numbers: Any
) -> tuple[Tensor, Tensor]:
    needed = numbers[-1]
    grad_pred = torch.empty_like(pred) if needed[0] else pred.new_empty(0)
    grad_weight = pred.new_empty(0) if weight is None else weight.new_empty(weight.shape if needed[1] else 0)
    return grad_pred, grad_weight


class _GaussianFocalLoss(Gradient):
    @staticmethod
    def save(ctx: Any, args: tuple[Any, ...], result: tuple[Tensor, Tensor]) -> None:
        _, num_pos = result
        pred, target, weight, *numbers, kind, avg_factor, scale, eps = args
        if kind == "num_pos":
            kind, avg_factor = "mean", num_pos
        ctx.save_for_backward(pred, target, weight, avg_factor)
        ctx.numbers = numbers, kind, scale, eps
        ctx.mark_non_differentiable(num_pos)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        pred, target, weight, avg_factor = ctx.saved_tensors
        numbers, kind, scale, eps = ctx.numbers
        needed = [ctx.needs_input_grad[0], ctx.needs_input_grad[2]]
        grad_pred, grad_weight = _call_backward(
            grad_output, pred, target, weight, *numbers, kind, avg_factor, scale, eps, needed
        )
        return grad_pred if needed[0] else None, None, grad_weight if needed[1] else None, *[None] * 10


register(
    "gaussian_focal_loss(Tensor pred, Tensor target, Tensor? weight, float alpha, float gamma, float pos_weight, "
    "float neg_weight, bool with_logits, float? clip, str kind, Tensor? avg_factor, float scale, float eps) "
    "-> (Tensor, Tensor)",
    _loss,
    _fake,
)
register(
    "gaussian_focal_loss_backward(Tensor grad_output, Tensor pred, Tensor target, Tensor? weight, float alpha, "
    "float gamma, float pos_weight, float neg_weight, bool with_logits, float? clip, str kind, Tensor? avg_factor, "
    "float scale, float eps, bool[2] needed) -> (Tensor, Tensor)",
    _loss_backward,
    _backward_fake,
)
register_autograd("gaussian_focal_loss", _GaussianFocalLoss)
register_backward("gaussian_focal_loss_backward")

_call = DirectCall("gaussian_focal_loss")
_call_backward = DirectCall("gaussian_focal_loss_backward")
