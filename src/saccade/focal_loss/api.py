"""The public functions: ``sigmoid_focal_loss`` and ``softmax_focal_loss``."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function

from saccade.argument_checks import (
    require_bool,
    require_constant,
    require_floating,
    require_integer,
    require_number,
    require_real,
    require_same_device,
    require_shape,
    require_tensor,
)
from saccade.focal_loss import reference
from saccade.loss_reduction import AVG_FACTOR_EPS, checked_reduction, new_loss
from saccade.registration import (
    DirectCall,
    Gradient,
    register,
    register_autograd,
    register_backward,
    unchecked_apply,
)
from saccade.triton_dispatch import served_by_triton


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
    return scaled_sigmoid_focal_loss(
        logits,
        target,
        alpha=alpha,
        gamma=gamma,
        weight=weight,
        class_weight=class_weight,
        activated=activated,
        reduction=reduction,
        avg_factor=avg_factor,
    )


def scaled_sigmoid_focal_loss(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float,
    gamma: float,
    weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    activated: bool = False,
    reduction: Any = "mean",
    avg_factor: float | Tensor | None = None,
    scale: float = 1.0,
    avg_factor_eps: float = AVG_FACTOR_EPS,
) -> Tensor:
    """``sigmoid_focal_loss`` times ``scale``, with another number added to ``avg_factor``: for modules, in one call."""
    with_tensor = isinstance(avg_factor, Tensor)
    tensors = logits, target
    if weight is not None or class_weight is not None or with_tensor:
        others_of_these = weight, class_weight, avg_factor if with_tensor else None
        tensors = *tensors, *(tensor for tensor in others_of_these if tensor is not None)
    others = alpha, gamma, activated, reduction, weight is None, class_weight is None, with_tensor, avg_factor is None
    way = _call_sigmoid.known(tensors, others)
    if way is None:
        classes = _require_logits(logits)
        require_tensor("target", target)
        if target.ndim != logits.ndim and target.dtype in (torch.int32, torch.int64):
            _require_labels(logits, target)
            _require_class_weight(class_weight, classes)
        else:
            _require_dense(logits, target)
            if class_weight is not None:
                raise ValueError("class_weight: expected None with a dense target, got one")
        if weight is not None:
            require_real("weight", weight)
        require_bool("activated", activated)
        alpha = require_number("alpha", alpha)
        if alpha > 1:
            raise ValueError(f"alpha: expected a number in [0, 1], or a negative one for no balancing, got {alpha}")
        gamma = require_number("gamma", gamma, minimum=0)
        require_same_device(logits=logits, target=target, weight=weight, class_weight=class_weight)
    if weight is not None:
        weight = _element_weight(logits, weight)
    how = checked_reduction(reduction, avg_factor, "logits", logits, scale, avg_factor_eps)
    args = logits, target, weight, class_weight, alpha, gamma, activated, *how
    if way is None:
        way = _call_sigmoid.learn(tensors, others, args)
    return way(*args)


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
    classes = _require_logits(logits)
    _require_labels(logits, target)
    _require_class_weight(class_weight, classes)
    alpha = require_number("alpha", alpha, minimum=0)
    if alpha > 1:
        raise ValueError(f"alpha: expected a number in [0, 1], got {alpha}")
    gamma = require_number("gamma", gamma, minimum=0)
    require_same_device(logits=logits, target=target, class_weight=class_weight)
    how = checked_reduction(reduction, avg_factor, "logits", logits)
    return _call_softmax(logits, target, class_weight, alpha, gamma, *how)


def _require_logits(logits: Tensor) -> int:
    """Check ``logits`` and return the number of classes."""
    require_floating("logits", logits)
    if logits.ndim == 0:
        raise ValueError("logits: expected shape (..., C), got ()")
    return logits.shape[-1]


def _require_labels(logits: Tensor, target: Tensor) -> None:
    require_integer("target", target)
    if target.shape != logits.shape[:-1]:
        raise ValueError(
            f"target: expected one label for each row of logits {tuple(logits.shape)}, "
            f"shape {tuple(logits.shape[:-1])}, got {tuple(target.shape)}"
        )


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


def _require_class_weight(class_weight: Tensor | None, classes: int) -> None:
    if class_weight is not None:
        require_real("class_weight", class_weight)
        require_shape("class_weight", class_weight, "C", C=classes)
        require_constant("class_weight", class_weight)


def _element_weight(logits: Tensor, weight: Tensor) -> Tensor:
    """Check a weight and bring it into shape (..., C) or (..., 1)."""
    rows, classes = logits.shape[:-1], logits.shape[-1]
    if weight.shape == rows:
        return weight[..., None]
    # Not `not in (1, classes)`: torch.compile is wrong about a number of classes that varies.
    size = weight.shape[-1] if weight.ndim == logits.ndim else -1
    if weight.shape[:-1] != rows or (size != 1 and size != classes):
        raise ValueError(
            f"weight: expected shape {tuple(rows)}, {(*rows, 1)} or {(*rows, classes)} with logits of shape "
            f"{tuple(logits.shape)}, got {tuple(weight.shape)}"
        )
    return weight


def _sigmoid(logits: Tensor, *args: Any) -> Tensor:
    return _prepare_sigmoid(logits, *args)(logits, *args)


def _prepare_sigmoid(logits: Tensor, *args: Any) -> Callable[..., Any]:
    if served_by_triton(logits) and logits.numel():
        from saccade.focal_loss import kernels

        return kernels.prepare_sigmoid_focal_loss(logits, *args)
    return reference.sigmoid_focal_loss


def _sigmoid_backward(grad_output: Tensor, logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    if served_by_triton(logits) and logits.numel():
        from saccade.focal_loss import kernels

        return kernels.sigmoid_focal_loss_backward(grad_output, logits, *args)
    return reference.sigmoid_focal_loss_backward(grad_output, logits, *args)


def _sigmoid_fake(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    class_weight: Tensor | None,
    alpha: float,
    gamma: float,
    activated: bool,
    kind: str,
    avg_factor: Tensor | None,
    scale: float,
    eps: float,
) -> Tensor:
    return new_loss(logits, logits.shape, kind, avg_factor)


def _sigmoid_backward_fake(
    grad_output: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, *numbers: Any
) -> tuple[Tensor, Tensor]:
    needed = numbers[-1]
    grad_logits = torch.empty_like(logits) if needed[0] else logits.new_empty(0)
    grad_weight = logits.new_empty(0) if weight is None else weight.new_empty(weight.shape if needed[1] else 0)
    return grad_logits, grad_weight


# Of so few logits the gradient is computed with the loss.
_FEW_LOGITS = 1 << 19


class _SigmoidFocalLoss(Gradient):
    @staticmethod
    def prepare(*args: Any) -> Callable[..., Any] | None:
        """Few logits have their gradient computed with the loss, where ``backward`` needs that of the logits alone."""
        logits, weight, kind = args[0], args[2], args[7]
        if (
            kind == "none"
            or not served_by_triton(logits)
            or logits.dtype.itemsize < 4  # a half would underflow, before the scale of the loss multiplies it
            or not logits.requires_grad
            or (weight is not None and weight.requires_grad)
            or not 0 < logits.numel() < _FEW_LOGITS
        ):
            return None
        from saccade.focal_loss import kernels

        call = kernels.prepare_sigmoid_focal_loss(*args, with_gradient=True)
        return lambda *args: _record_with_gradient(args[0], call, args)

    @staticmethod
    def save(ctx: Any, args: tuple[Any, ...], result: Tensor) -> None:
        logits, target, weight, class_weight, *numbers, avg_factor, scale, eps = args
        ctx.save_for_backward(logits, target, weight, class_weight, avg_factor)
        ctx.numbers = numbers, scale, eps

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, avg_factor = ctx.saved_tensors
        numbers, scale, eps = ctx.numbers
        needed = [ctx.needs_input_grad[0], ctx.needs_input_grad[2]]
        grad_logits, grad_weight = _call_sigmoid_backward(
            grad_output, *tensors, *numbers, avg_factor, scale, eps, needed
        )
        return grad_logits if needed[0] else None, None, grad_weight if needed[1] else None, *[None] * 8


class _SigmoidFocalLossWithGradient(Function):
    """The loss whose gradient comes with it: ``backward`` only multiplies that.

    A step on few logits takes as long as the host takes, and longest where autograd's own thread runs Python.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, call: Callable[..., Any], args: tuple[Any, ...]) -> Tensor:
        loss, ctx.gradient = call(*args)
        # Not the gradient: what is saved must not depend on the way a call takes. Checkpointing may take either of them
        # when it makes the saved tensors again, and tells them apart by their position.
        _SigmoidFocalLoss.save(ctx, args, loss)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # for a second derivative, where the operator raises
            return _SigmoidFocalLoss.backward(ctx, grad_output)[0], None, None
        _ = ctx.saved_tensors  # raises if they are freed, or were written to
        return ctx.gradient * (grad_output.reshape(()) if grad_output.ndim else grad_output), None, None


_record_with_gradient = unchecked_apply(_SigmoidFocalLossWithGradient)


def _softmax(logits: Tensor, *args: Any) -> Tensor:
    if served_by_triton(logits) and logits.numel():
        from saccade.focal_loss import softmax_kernels

        return softmax_kernels.softmax_focal_loss(logits, *args)
    return reference.softmax_focal_loss(logits, *args)


def _softmax_backward(grad_output: Tensor, logits: Tensor, *args: Any) -> Tensor:
    if served_by_triton(logits) and logits.numel():
        from saccade.focal_loss import softmax_kernels

        return softmax_kernels.softmax_focal_loss_backward(grad_output, logits, *args)
    return reference.softmax_focal_loss_backward(grad_output, logits, *args)


def _softmax_fake(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    alpha: float,
    gamma: float,
    kind: str,
    avg_factor: Tensor | None,
    scale: float,
    eps: float,
) -> Tensor:
    return new_loss(logits, target.shape, kind, avg_factor)


def _softmax_backward_fake(grad_output: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits)


class _SoftmaxFocalLoss(Gradient):
    @staticmethod
    def save(ctx: Any, args: tuple[Any, ...], result: Tensor) -> None:
        logits, target, class_weight, *numbers, avg_factor, scale, eps = args
        ctx.save_for_backward(logits, target, class_weight, avg_factor)
        ctx.numbers = numbers, scale, eps

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, avg_factor = ctx.saved_tensors
        numbers, scale, eps = ctx.numbers
        grad_logits = _call_softmax_backward(grad_output, *tensors, *numbers, avg_factor, scale, eps)
        return grad_logits, *[None] * 8


register(
    "sigmoid_focal_loss(Tensor logits, Tensor target, Tensor? weight, Tensor? class_weight, float alpha, float gamma, "
    "bool activated, str kind, Tensor? avg_factor, float scale, float eps) -> Tensor",
    _sigmoid,
    _sigmoid_fake,
)
register(
    "sigmoid_focal_loss_backward(Tensor grad_output, Tensor logits, Tensor target, Tensor? weight, "
    "Tensor? class_weight, float alpha, float gamma, bool activated, str kind, Tensor? avg_factor, float scale, "
    "float eps, bool[2] needed) -> (Tensor, Tensor)",
    _sigmoid_backward,
    _sigmoid_backward_fake,
)
register_autograd("sigmoid_focal_loss", _SigmoidFocalLoss)
register_backward("sigmoid_focal_loss_backward")
register(
    "softmax_focal_loss(Tensor logits, Tensor target, Tensor? class_weight, float alpha, float gamma, str kind, "
    "Tensor? avg_factor, float scale, float eps) -> Tensor",
    _softmax,
    _softmax_fake,
)
register(
    "softmax_focal_loss_backward(Tensor grad_output, Tensor logits, Tensor target, Tensor? class_weight, float alpha, "
    "float gamma, str kind, Tensor? avg_factor, float scale, float eps) -> Tensor",
    _softmax_backward,
    _softmax_backward_fake,
)
register_autograd("softmax_focal_loss", _SoftmaxFocalLoss)
register_backward("softmax_focal_loss_backward")

_call_sigmoid = DirectCall("sigmoid_focal_loss", _prepare_sigmoid)
_call_sigmoid_backward = DirectCall("sigmoid_focal_loss_backward")
_call_softmax = DirectCall("softmax_focal_loss")
_call_softmax_backward = DirectCall("softmax_focal_loss_backward")
