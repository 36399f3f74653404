"""Focal losses in plain PyTorch: the meaning of the operators, their CPU path and the oracle of their kernels.

Leading axes are flattened to N rows of C classes, and blocks of n rows are worked on one after another: a block needs a
handful of temporaries of its own size; without blocks there would be as many copies of all logits.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.losses.focal.options import SigmoidOptions
from saccade.losses.focal_term import focal_term, focal_term_slope, softplus
from saccade.losses.reduction import Reduction, gradient_of_blocks, laid_out_as, reduced_in_blocks, row_blocks
from saccade.operator.gradients import room_for_gradients
from saccade.precision import compute_dtype


def _is_inside(label: Tensor, classes: int) -> Tensor:
    return (label >= 0) & (label < classes)


def _class_factor(label: Tensor, class_weight: Tensor) -> Tensor:
    """Weight of each label; 1 for background, that is for every label outside [0, C)."""
    classes = class_weight.shape[0]
    weight_or_one = torch.cat([class_weight, class_weight.new_ones(1)])
    return weight_or_one[torch.where(_is_inside(label, classes), label, classes).long()]


def _balance(t: Tensor, alpha: float) -> Tensor | float:
    """``alpha`` for positives, ``1 - alpha`` for negatives, in between for soft targets; 1 if alpha is negative."""
    return 1.0 if alpha < 0 else (1 - alpha) + (2 * alpha - 1) * t


def _entropy(p: Tensor, t: Tensor) -> Tensor:
    """Binary cross entropy of probabilities, with logarithms clamped at -100 as torch does it."""
    return -(t * p.log().clamp(min=-100) + (1 - t) * torch.log1p(-p).clamp(min=-100))


def _element_loss(x: Tensor, target: Tensor, options: SigmoidOptions) -> Tensor:
    """(n, C) losses of logits, or of probabilities if ``activated``; only targets that are not bool may be soft."""
    (alpha, gamma, activated), t = options, target.to(x.dtype)
    if activated:
        error = t * (1 - x) + (1 - t) * x
        return _balance(t, alpha) * error**gamma * _entropy(x, t)
    if target.dtype == torch.bool:
        return _balance(t, alpha) * focal_term(torch.where(target, -x, x), gamma)
    error = t * torch.sigmoid(-x) + (1 - t) * torch.sigmoid(x)
    # A hard target takes nothing of the other side, be that infinite.
    entropy = torch.where(t == 0, 0, t * softplus(-x)) + torch.where(t == 1, 0, (1 - t) * softplus(x))
    return _balance(t, alpha) * error**gamma * entropy


def _element_slope(x: Tensor, target: Tensor, options: SigmoidOptions) -> Tensor:
    """The derivative of ``_element_loss`` in ``x``."""
    (alpha, gamma, activated), t = options, target.to(x.dtype)
    if activated:
        error = t * (1 - x) + (1 - t) * x
        # A power of 0 has no slope, though error ** -1 may be infinite.
        power_slope = gamma * torch.where(error > 0, error ** (gamma - 1), 0) * (1 - 2 * t) if gamma else 0
        entropy_slope = (x - t) / (x * (1 - x)).clamp(min=1e-12)
        return _balance(t, alpha) * (power_slope * _entropy(x, t) + error**gamma * entropy_slope)
    if target.dtype == torch.bool:
        slope = focal_term_slope(torch.where(target, -x, x), gamma)
        return _balance(t, alpha) * torch.where(target, -slope, slope)
    limits = torch.finfo(x.dtype)
    x = x.clamp(limits.min, limits.max)  # an infinite logit would be multiplied by a probability of 0
    p, not_p = torch.sigmoid(x), torch.sigmoid(-x)
    positive, negative = t * not_p, (1 - t) * p
    error = positive + negative
    entropy = t * softplus(-x) + (1 - t) * softplus(x)
    # error ** (gamma - 1) may be infinite where p * not_p is 0; their product is not: p * not_p <= error.
    ratio = torch.where(error > 0, p * not_p / error, 0)
    return _balance(t, alpha) * error**gamma * (gamma * (1 - 2 * t) * ratio * entropy + negative - positive)


class _Block(NamedTuple):
    """Some rows of the arguments, made ready to compute with."""

    rows: slice
    x: Tensor  # (n, C) in the compute dtype
    target: Tensor  # (n, C) bool or floating
    weight: Tensor | float  # (n, C) or (n, 1)
    class_factor: Tensor | float  # (n, 1)


def _as_rows(tensor: Tensor, axes: int | None = None) -> Tensor:
    """(..., C) as (N, C); of other ``axes``, (...) as (N, 1)."""
    shape = tensor.shape if axes in (None, tensor.ndim) else (*tensor.shape, 1)
    return tensor.reshape(math.prod(shape[:-1]), shape[-1])


def _blocks(logits: Tensor, target: Tensor, weight: Tensor | None, class_weight: Tensor | None) -> Iterator[_Block]:
    dtype = compute_dtype(logits)
    columns = torch.arange(logits.shape[-1], device=logits.device)
    has_labels = target.ndim < logits.ndim
    target = _as_rows(target, logits.ndim)
    weight = None if weight is None else _as_rows(weight, logits.ndim)
    logits = _as_rows(logits)
    for rows in row_blocks(logits):
        t = target[rows]
        yield _Block(
            rows,
            logits[rows].to(dtype),
            t == columns if has_labels else t,
            1.0 if weight is None else weight[rows].to(dtype),
            1.0 if class_weight is None else _class_factor(t, class_weight.to(dtype)),
        )


def sigmoid_focal_loss(
    logits: Tensor,  # (..., C)
    target: Tensor,  # (...) integer, or (..., C) bool or floating
    weight: Tensor | None,  # (...), (..., C) or (..., 1)
    class_weight: Tensor | None,  # (C,)
    options: SigmoidOptions,
    reduction: Reduction,
) -> Tensor:  # (..., C), or reduced
    """See ``saccade.sigmoid_focal_loss``."""
    losses = (
        _element_loss(block.x, block.target, options) * block.class_factor * block.weight
        for block in _blocks(logits, target, weight, class_weight)
    )
    return reduced_in_blocks(losses, logits, logits.shape, reduction)


def sigmoid_focal_loss_backward(
    grad_output: Tensor,  # (..., C), or reduced
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    class_weight: Tensor | None,
    options: SigmoidOptions,
    reduction: Reduction,
    needed: list[bool],  # logits, weight
) -> tuple[Tensor, Tensor]:
    """Gradients of logits and weight; an empty tensor for one that is not needed."""
    grad_logits, grad_weight = room_for_gradients((logits, weight), needed, torch.contiguous_format)
    grad_of = gradient_of_blocks(grad_output, logits, _as_rows(logits).shape, reduction)
    for block in _blocks(logits, target, weight, class_weight):
        grad = grad_of(block.rows) * block.class_factor
        if needed[0]:
            slope = _element_slope(block.x, block.target, options)
            _as_rows(grad_logits)[block.rows] = slope * (grad * block.weight)
        if needed[1]:
            rows = _as_rows(grad_weight, logits.ndim)[block.rows]
            rows.copy_((_element_loss(block.x, block.target, options) * grad).sum_to_size(rows.shape))
    return laid_out_as(logits, grad_logits), laid_out_as(weight, grad_weight)


class _LabelledBlock(NamedTuple):
    """Some rows of the arguments of softmax focal loss, made ready to compute with.

    To the label, all other classes are one: it is the negative of a sigmoid whose logit is how far these are ahead.
    """

    rows: slice
    inside: Tensor  # (n, 1) bool: the label is a class
    label: Tensor  # (n, 1) int64, 0 where it is not
    factor: Tensor | float  # (n, 1) alpha times the weight of the class
    ahead: Tensor  # (n, 1) logarithm of the odds against the label
    share: Tensor  # (n, C) of each class in what is against the label


def _labelled_blocks(
    logits: Tensor, target: Tensor, class_weight: Tensor | None, alpha: float
) -> Iterator[_LabelledBlock]:
    dtype = compute_dtype(logits)
    logits, target = _as_rows(logits), _as_rows(target[..., None])
    classes = logits.shape[1]
    for block in row_blocks(logits) if classes else ():
        t, x = target[block], logits[block].to(dtype)
        inside = _is_inside(t, classes)
        label = torch.where(inside, t, 0).long()
        factor = alpha if class_weight is None else alpha * _class_factor(t, class_weight.to(dtype))
        top = x.amax(-1, keepdim=True)
        x = torch.where(x == top, 0, x - top)  # infinite logits share the probability among them
        others = x.scatter(1, label, -math.inf)
        total = others.logsumexp(-1, keepdim=True)
        share = torch.where(total == -math.inf, 0, (others - total).exp())
        yield _LabelledBlock(block, inside, label, factor, total - x.gather(1, label), share)


def softmax_focal_loss(
    logits: Tensor,  # (..., C)
    target: Tensor,  # (...) integer
    class_weight: Tensor | None,  # (C,)
    alpha: float,
    gamma: float,
    reduction: Reduction,
) -> Tensor:  # (...), or reduced
    """See ``saccade.softmax_focal_loss``."""
    losses = (
        torch.where(block.inside, block.factor * focal_term(block.ahead, gamma), 0)
        for block in _labelled_blocks(logits, target, class_weight, alpha)
    )
    return reduced_in_blocks(losses, logits, target.shape, reduction)


def softmax_focal_loss_backward(
    grad_output: Tensor,  # (...), or reduced
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    alpha: float,
    gamma: float,
    reduction: Reduction,
    needed: list[bool],  # logits
) -> Tensor:  # (..., C)
    """Gradient of the logits."""
    grad_logits = logits.new_empty(logits.shape)
    grad_of = gradient_of_blocks(grad_output, logits, _as_rows(target[..., None]).shape, reduction)
    for block in _labelled_blocks(logits, target, class_weight, alpha):
        rate = grad_of(block.rows) * block.factor * focal_term_slope(block.ahead, gamma)
        slope = (rate * block.share).scatter(1, block.label, -rate)
        _as_rows(grad_logits)[block.rows] = torch.where(block.inside, slope, 0).to(logits.dtype)
    return laid_out_as(logits, grad_logits)
