"""Triton kernels of Gaussian focal loss, forward and backward: one pass over predictions and target, which also counts
the positives if they are what the sum is divided by.

Both passes are at what memory can deliver (H200, 32 x 80 x 128 x 128 float32 logits: 80 us forward, 118 us backward,
floors 80 and 120). Counting the positives costs 9 us more. Tiles of 512 to 2048 elements and 4 or 8 warps differ by
less than a tenth.
"""

import triton
import triton.language as tl

from saccade.losses.focal_term_kernels import focal_term, focal_term_slope, log1p, power_of
from saccade.losses.reduction_kernels import factor_of_gradients, finish_if_last, offset_along_axes
from saccade.operator.launch import LaunchedKernel, wait_for_previous_kernel

# Added to probabilities before taking logarithms, as in the loss's original form. Logits need no such thing.
_LOG_EPS = tl.constexpr(1e-12)


@triton.jit
def _error_and_rest(pred, positive):
    """How wrong probabilities are; the probability of the right answer plus _LOG_EPS; its logarithm.

    Each from `pred` itself: ``1 - (1 - pred)`` would cancel, as would ``log(1 - pred)`` of a small one.
    """
    opposite = 1 - pred
    rest = tl.where(positive, pred, opposite) + _LOG_EPS
    log_rest = tl.where(positive | (pred > 0.5), tl.log(rest), log1p(_LOG_EPS - pred))
    return tl.where(positive, opposite, pred), rest, log_rest


@triton.jit
def _element_loss(pred, positive, bound, alpha, ALPHA: tl.constexpr, WITH_LOGITS: tl.constexpr, CLIPPED: tl.constexpr):
    """Losses before weighting; `bound` is the largest absolute logit that is not clipped."""
    if WITH_LOGITS:
        z = tl.where(positive, -pred, pred)
        if CLIPPED:
            z = tl.clamp(z, -bound, bound, propagate_nan=tl.PropagateNan.ALL)
        return focal_term(z, alpha, ALPHA)
    else:
        error, _, log_rest = _error_and_rest(pred, positive)
        return -log_rest * power_of(error, alpha, ALPHA)


@triton.jit
def _element_slope(pred, positive, bound, alpha, ALPHA: tl.constexpr, WITH_LOGITS: tl.constexpr, CLIPPED: tl.constexpr):
    """The derivative of `_element_loss` in `pred`."""
    if WITH_LOGITS:
        slope = focal_term_slope(tl.where(positive, -pred, pred), alpha, ALPHA)
        if CLIPPED:
            slope = tl.where(tl.abs(pred) > bound, 0.0, slope)
    else:
        error, rest, log_rest = _error_and_rest(pred, positive)
        slope = power_of(error, alpha, ALPHA) / rest
        if ALPHA != 0:
            # Where nothing is wrong the loss is flat; the power alone is infinite there if alpha < 1.
            power_slope = power_of(error, alpha - 1, ALPHA - 1 if ALPHA > 0 else -1)
            slope -= alpha * tl.where(error == 0, 0.0, power_slope) * log_rest
    return tl.where(positive, -slope, slope)


@triton.jit
def _address(tensor, first, within, sizes, steps):
    """Where elements are, counted from `first`; without steps, they lie in memory in the order of their numbers."""
    if steps is None:
        return tensor + first + within
    else:
        return tensor + offset_along_axes(first, within, sizes, steps)


@triton.jit
def _elements_of_tile(
    number, pred, target, weight, elements, sizes, pred_steps, target_steps, weight_steps, absent, gamma, pos_weight,
    neg_weight, GAMMA: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The elements of a tile.

    Returns:
        first, within: their numbers are `first + within`; exists: which there are.
        x: predictions, `absent` where there is none.
        positive: which are positives.
        factor: what their losses are multiplied by, less the closer a negative is to a positive.
    """
    gamma = tl.full([], gamma, COMPUTE)
    pos_weight, neg_weight = tl.full([], pos_weight, COMPUTE), tl.full([], neg_weight, COMPUTE)
    first, within = tl.full([], number, tl.int64) * BLOCK, tl.arange(0, BLOCK)
    exists = within < tl.minimum(elements - first, BLOCK).to(tl.int32)
    x = tl.load(_address(pred, first, within, sizes, pred_steps), mask=exists, other=absent).to(COMPUTE)
    value = tl.load(_address(target, first, within, sizes, target_steps), mask=exists, other=0)
    positive = value == 1
    distance = tl.clamp(1 - value.to(COMPUTE), 0.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
    factor = tl.where(positive, pos_weight, neg_weight * power_of(distance, gamma, GAMMA))
    if weight is not None:
        at = _address(weight, first, within, sizes, weight_steps)
        factor *= tl.load(at, mask=exists, other=0).to(COMPUTE)
    return first, within, exists, x, positive, factor


@LaunchedKernel
@triton.jit(do_not_specialize=["tiles"])
def loss_kernel(
    pred, target, weight, output, counts, grad_pred, avg_factor, counter, total,
    alpha: tl.float64, gamma: tl.float64, pos_weight: tl.float64, neg_weight: tl.float64, bound: tl.float64,
    scale: tl.float64, eps: tl.float64,
    elements, tiles, sizes, pred_steps, target_steps, weight_steps, output_steps,
    ALPHA: tl.constexpr, GAMMA: tl.constexpr, WITH_LOGITS: tl.constexpr, CLIPPED: tl.constexpr, REDUCED: tl.constexpr,
    BLOCK: tl.constexpr, COMPUTE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Losses of all elements; if REDUCED, a sum for each program, and a count of positives if there are `counts`.

    Where they have a place, gradients and total, too.
    """
    wait_for_previous_kernel(PDL)
    alpha, bound = tl.full([], alpha, COMPUTE), tl.full([], bound, COMPUTE)
    if grad_pred is not None:
        common = factor_of_gradients(None, avg_factor, scale, eps, REDUCED, COMPUTE)
    # Where there is no element, a negative whose loss is exactly 0: if it is not clipped.
    absent = float("-inf") if WITH_LOGITS else 0.0
    sums = tl.zeros([BLOCK], COMPUTE)
    count = tl.zeros([BLOCK], tl.int32)
    for number in range(tl.program_id(0), tiles, tl.num_programs(0)):
        first, within, exists, x, positive, factor = _elements_of_tile(
            number, pred, target, weight, elements, sizes, pred_steps, target_steps, weight_steps, absent, gamma,
            pos_weight, neg_weight, GAMMA, BLOCK, COMPUTE,
        )  # fmt: skip
        loss = _element_loss(x, positive, bound, alpha, ALPHA, WITH_LOGITS, CLIPPED) * factor
        if REDUCED:
            sums += loss if WITH_LOGITS and not CLIPPED else tl.where(exists, loss, 0.0)
            count += positive.to(tl.int32)
            if grad_pred is not None:
                slope = _element_slope(x, positive, bound, alpha, ALPHA, WITH_LOGITS, CLIPPED) * (factor * common)
                at = _address(grad_pred, first, within, sizes, output_steps)
                tl.store(at, slope.to(grad_pred.dtype.element_ty), mask=exists)
        else:
            loss *= tl.full([], scale, COMPUTE)
            at = _address(output, first, within, sizes, output_steps)
            tl.store(at, loss.to(output.dtype.element_ty), mask=exists)
    if REDUCED:
        tl.store(output + tl.program_id(0), tl.sum(sums, 0))
        if counts is not None:
            tl.store(counts + tl.program_id(0), tl.sum(count.to(tl.int64), 0))
        if total is not None:
            finish_if_last(output, counter, avg_factor, total, scale, eps)


@LaunchedKernel
@triton.jit(do_not_specialize=["tiles"])
def gradient_kernel(
    grad_output, pred, target, weight, avg_factor, grad_pred,
    alpha: tl.float64, gamma: tl.float64, pos_weight: tl.float64, neg_weight: tl.float64, bound: tl.float64,
    scale: tl.float64, eps: tl.float64,
    elements, tiles, sizes, pred_steps, target_steps, weight_steps, output_steps, grad_steps,
    ALPHA: tl.constexpr, GAMMA: tl.constexpr, WITH_LOGITS: tl.constexpr, CLIPPED: tl.constexpr, REDUCED: tl.constexpr,
    BLOCK: tl.constexpr, COMPUTE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Gradients of all predictions."""
    wait_for_previous_kernel(PDL)
    alpha, bound = tl.full([], alpha, COMPUTE), tl.full([], bound, COMPUTE)
    common = factor_of_gradients(grad_output, avg_factor, scale, eps, REDUCED, COMPUTE)
    for number in range(tl.program_id(0), tiles, tl.num_programs(0)):
        first, within, exists, x, positive, factor = _elements_of_tile(
            number, pred, target, weight, elements, sizes, pred_steps, target_steps, weight_steps, 0, gamma,
            pos_weight, neg_weight, GAMMA, BLOCK, COMPUTE,
        )  # fmt: skip
        factor *= common
        if not REDUCED:
            at = _address(grad_output, first, within, sizes, grad_steps)
            factor *= tl.load(at, mask=exists, other=0).to(COMPUTE)
        slope = _element_slope(x, positive, bound, alpha, ALPHA, WITH_LOGITS, CLIPPED) * factor
        at = _address(grad_pred, first, within, sizes, output_steps)
        tl.store(at, slope.to(grad_pred.dtype.element_ty), mask=exists)
