"""Gaussian focal loss in plain PyTorch: the meaning of the operator, its CPU path and the oracle of its kernels.

Positives and negatives are mirror images under ``p -> 1 - p``, which is ``x -> -x`` for logits, so that both go through
one formula. Elements are worked on in blocks, for a block needs a handful of temporaries of its own size.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.losses.focal_term import focal_term, focal_term_slope
from saccade.losses.gaussian.options import GaussianOptions
from saccade.losses.reduction import Reduction, gradient_of_blocks, laid_out_as, reduced_in_blocks, row_blocks
from saccade.operator.gradients import room_for_gradients
from saccade.precision import compute_dtype

# Added to probabilities before taking logarithms, as in the loss's original form. Logits need no such thing.
LOG_EPS = 1e-12


def _factor(target: Tensor, positive: Tensor, options: GaussianOptions) -> Tensor:
    """Weight of each element: less the closer a negative is to a positive."""
    of_negative = options.neg_weight * (1 - target).clamp(0, 1) ** options.gamma
    return torch.where(positive, options.pos_weight, of_negative)


def _element_loss(pred: Tensor, positive: Tensor, options: GaussianOptions) -> Tensor:
    """Losses before weighting."""
    if options.with_logits:
        z, bound = torch.where(positive, -pred, pred), options.bound
        return focal_term(z if bound is None else z.clamp(-bound, bound), options.alpha)
    error, _, log_rest = _error_and_rest(pred, positive)
    return -log_rest * error**options.alpha


def _error_and_rest(pred: Tensor, positive: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How wrong probabilities are; the probability of the right answer plus ``LOG_EPS``; its logarithm.

    Each from ``pred`` itself: ``1 - (1 - pred)`` would cancel, as would ``log(1 - pred)`` of a small one.
    """
    opposite = 1 - pred
    error, rest = torch.where(positive, opposite, pred), torch.where(positive, pred, opposite) + LOG_EPS
    return error, rest, torch.where(positive | (pred > 0.5), rest.log(), torch.log1p(LOG_EPS - pred))


def _element_slope(pred: Tensor, positive: Tensor, options: GaussianOptions) -> Tensor:
    """The derivative of ``_element_loss`` in ``pred``."""
    alpha, bound = options.alpha, options.bound
    if options.with_logits:
        slope = focal_term_slope(torch.where(positive, -pred, pred), alpha)
        slope = slope if bound is None else torch.where(pred.abs() > bound, 0, slope)
    else:
        error, rest, log_rest = _error_and_rest(pred, positive)
        # Where nothing is wrong the loss is flat; the power alone is infinite there if alpha < 1.
        power_slope = alpha * torch.where(error == 0, 0, error ** (alpha - 1)) if alpha else 0
        slope = error**alpha / rest - power_slope * log_rest
    return torch.where(positive, -slope, slope)


class _Block(NamedTuple):
    """Some of the elements, made ready to compute with."""

    elements: slice
    x: Tensor  # (n,) in the compute dtype, as all that is not bool
    positive: Tensor  # (n,) bool
    factor: Tensor  # (n,)
    weight: Tensor | None  # (n,)

    def weighted(self, values: Tensor) -> Tensor:
        return values if self.weight is None else values * self.weight


def _blocks(pred: Tensor, target: Tensor, weight: Tensor | None, options: GaussianOptions) -> Iterator[_Block]:
    dtype, flat_target = compute_dtype(pred), target.reshape(-1)
    flat_weight = None if weight is None else weight.expand(pred.shape).reshape(-1)
    flat_pred = pred.reshape(-1)
    for elements in row_blocks(flat_pred):
        t = flat_target[elements]
        positive = t == 1  # in the target's own dtype
        yield _Block(
            elements,
            flat_pred[elements].to(dtype),
            positive,
            _factor(t.to(dtype), positive, options),
            None if flat_weight is None else flat_weight[elements].to(dtype),
        )


def new_count(pred: Tensor, reduction: Reduction) -> Tensor:
    """Room for the number of positives; none if that is not asked for."""
    return pred.new_empty(() if reduction.mode == "num_pos" else 0, dtype=compute_dtype(pred))


def with_positives_counted(reduction: Reduction, count: Tensor) -> Reduction:
    """The reduction with the number of positives to divide by, if that is what the mean is over."""
    return reduction._replace(mode="mean", avg_factor=count) if reduction.mode == "num_pos" else reduction


def gaussian_focal_loss(
    pred: Tensor,
    target: Tensor,  # of the shape of pred
    weight: Tensor | None,  # broadcasts to the shape of pred
    options: GaussianOptions,
    reduction: Reduction,
) -> tuple[Tensor, Tensor]:
    """See ``saccade.gaussian_focal_loss`` and its form ``with_logits``.

    Returns:
        Losses of the shape of ``pred``, or the reduced loss; and the number of positives, at least 1, if the mean is to
        divide by that, or an empty tensor.
    """
    count = new_count(pred, reduction)

    def losses() -> Iterator[Tensor]:
        positives = pred.new_zeros((), dtype=torch.int64)
        for block in _blocks(pred, target, weight, options):
            if count.ndim == 0:
                positives += block.positive.sum()
            yield block.weighted(_element_loss(block.x, block.positive, options) * block.factor)
        if count.ndim == 0:
            count.copy_(positives.clamp(min=1))

    return reduced_in_blocks(losses(), pred, pred.shape, with_positives_counted(reduction, count)), count


def gaussian_focal_loss_backward(
    grad_output: Tensor,
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: GaussianOptions,
    reduction: Reduction,
    needed: list[bool],  # pred, weight
) -> tuple[Tensor, Tensor]:
    """Gradients of pred and weight; an empty tensor for one that is not needed."""
    grad_pred, grad_weight = room_for_gradients((pred, weight), needed, torch.contiguous_format)
    grad_elements = pred.new_empty(pred.shape if needed[1] else 0, dtype=compute_dtype(pred))
    grad_of = gradient_of_blocks(grad_output, pred, torch.Size([pred.numel()]), reduction)
    for block in _blocks(pred, target, weight, options):
        grad = grad_of(block.elements) * block.factor
        if needed[1]:
            grad_elements.view(-1)[block.elements] = grad * _element_loss(block.x, block.positive, options)
        if needed[0]:
            slope = _element_slope(block.x, block.positive, options) * grad
            grad_pred.view(-1)[block.elements] = block.weighted(slope)
    if needed[1]:
        grad_weight.copy_(grad_elements.sum_to_size(grad_weight.shape))
    return laid_out_as(pred, grad_pred), laid_out_as(weight, grad_weight)
