"""Gaussian focal loss in plain PyTorch: the meaning of the operator, its CPU path and the oracle of its kernels.

Positives and negatives are mirror images under ``p -> 1 - p``, which is ``x -> -x`` for logits, so that both go through
one formula. Elements are worked on in blocks, for a block needs a handful of temporaries of its own size.
"""

import math

import torch
from torch import Tensor

from saccade.focal_term import focal_term, focal_term_slope
from saccade.loss_reduction import laid_out_as, new_loss, normalized, row_blocks
from saccade.precision import compute_dtype

# Added to probabilities before taking logarithms, as in the loss's original form. Logits need no such thing.
LOG_EPS = 1e-12


def _factor(target: Tensor, positive: Tensor, gamma: float, pos_weight: float, neg_weight: float) -> Tensor:
    """Weight of each element: less the closer a negative is to a positive."""
    return torch.where(positive, pos_weight, neg_weight * (1 - target).clamp(0, 1) ** gamma)


def _element_loss(pred: Tensor, positive: Tensor, alpha: float, bound: float | None, with_logits: bool) -> Tensor:
    """Losses before weighting; ``bound`` is the largest absolute logit that is not clipped."""
    if with_logits:
        z = torch.where(positive, -pred, pred)
        return focal_term(z if bound is None else z.clamp(-bound, bound), alpha)
    error, _, log_rest = _error_and_rest(pred, positive)
    return -log_rest * error**alpha


def _error_and_rest(pred: Tensor, positive: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How wrong probabilities are; the probability of the right answer plus ``LOG_EPS``; its logarithm.

    Each from ``pred`` itself: ``1 - (1 - pred)`` would cancel, as would ``log(1 - pred)`` of a small one.
    """
    opposite = 1 - pred
    error, rest = torch.where(positive, opposite, pred), torch.where(positive, pred, opposite) + LOG_EPS
    return error, rest, torch.where(positive | (pred > 0.5), rest.log(), torch.log1p(LOG_EPS - pred))


def _element_slope(pred: Tensor, positive: Tensor, alpha: float, bound: float | None, with_logits: bool) -> Tensor:
    """The derivative of ``_element_loss`` in ``pred``."""
    if with_logits:
        slope = focal_term_slope(torch.where(positive, -pred, pred), alpha)
        slope = slope if bound is None else torch.where(pred.abs() > bound, 0, slope)
    else:
        error, rest, log_rest = _error_and_rest(pred, positive)
        # Where nothing is wrong the loss is flat; the power alone is infinite there if alpha < 1.
        power_slope = alpha * torch.where(error == 0, 0, error ** (alpha - 1)) if alpha else 0
        slope = error**alpha / rest - power_slope * log_rest
    return torch.where(positive, -slope, slope)


def _bound(clip: float | None) -> float | None:
    """The logit at which a probability is clipped to ``clip`` or ``1 - clip``."""
    return None if clip is None else math.log((1 - clip) / clip)


def _flat_weight(weight: Tensor | None, pred: Tensor) -> Tensor | None:
    return None if weight is None else weight.expand(pred.shape).reshape(-1)


def gaussian_focal_loss(
    pred: Tensor,
    target: Tensor,  # of the shape of pred
    weight: Tensor | None,  # broadcasts to the shape of pred
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
) -> tuple[Tensor, Tensor]:  # of the shape of pred, or reduced; the number of positives if kind is num_pos, else empty
    """See ``saccade.gaussian_focal_loss`` and its form ``with_logits``.

    The last four arguments are those of ``saccade.loss_reduction.Reduction``. Beyond its kinds there is ``num_pos``:
    divide by the number of positives, at least 1. The backward pass is given that number as ``avg_factor``.
    """
    dtype = compute_dtype(pred)
    losses = pred.new_empty(pred.numel() if kind == "none" else 0)
    flat_pred, flat_target, flat_weight = pred.reshape(-1), target.reshape(-1), _flat_weight(weight, pred)
    total = pred.new_zeros((), dtype=dtype)
    positives = pred.new_zeros((), dtype=torch.int64)
    for block in row_blocks(flat_pred):
        x, t = flat_pred[block].to(dtype), flat_target[block]
        positive = t == 1  # in the target's own dtype
        loss = _element_loss(x, positive, alpha, _bound(clip), with_logits)
        loss = loss * _factor(t.to(dtype), positive, gamma, pos_weight, neg_weight)
        if flat_weight is not None:
            loss = loss * flat_weight[block].to(dtype)
        if kind == "none":
            losses[block] = loss * scale
        else:
            total += loss.sum()
        if kind == "num_pos":
            positives += positive.sum()
    if kind == "none":
        return laid_out_as(pred, losses.view(pred.shape)), pred.new_empty(0, dtype=dtype)
    output = new_loss(pred, pred.shape, kind, avg_factor)
    if kind != "num_pos":
        output.copy_(normalized(total, pred.numel(), kind, avg_factor, scale, eps))
        return output, pred.new_empty(0, dtype=dtype)
    divisor = positives.clamp(min=1).to(dtype)
    return output.copy_(normalized(total, pred.numel(), "mean", divisor, scale, eps)), divisor


def gaussian_focal_loss_backward(
    grad_output: Tensor,
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
    needed: list[bool],  # pred, weight
) -> tuple[Tensor, Tensor]:
    """Gradients of pred and weight; an empty tensor for one that is not needed."""
    dtype = compute_dtype(pred)
    grad_pred = pred.new_empty(pred.shape if needed[0] else 0)
    grad_weight = pred.new_empty(0) if weight is None else weight.new_empty(weight.shape if needed[1] else 0)
    grad_elements = pred.new_empty(pred.shape if needed[1] else 0, dtype=dtype)
    grad_loss = normalized(grad_output.to(dtype), pred.numel(), kind, avg_factor, scale, eps).reshape(-1)
    flat_pred, flat_target, flat_weight = pred.reshape(-1), target.reshape(-1), _flat_weight(weight, pred)
    for block in row_blocks(flat_pred):
        x, t = flat_pred[block].to(dtype), flat_target[block]
        positive = t == 1
        grad = grad_loss[block] if kind == "none" else grad_loss
        grad = grad * _factor(t.to(dtype), positive, gamma, pos_weight, neg_weight)
        if needed[1]:
            grad_elements.view(-1)[block] = grad * _element_loss(x, positive, alpha, _bound(clip), with_logits)
        if needed[0]:
            slope = _element_slope(x, positive, alpha, _bound(clip), with_logits) * grad
            grad_pred.view(-1)[block] = slope if flat_weight is None else slope * flat_weight[block].to(dtype)
    if needed[1]:
        grad_weight.copy_(grad_elements.sum_to_size(grad_weight.shape))
    return laid_out_as(pred, grad_pred) if needed[0] else grad_pred, grad_weight
