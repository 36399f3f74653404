"""Triton kernels of softmax focal loss, forward and backward: some rows to a program, their classes block by block."""

import triton
import triton.language as tl

from saccade.losses.focal_term_kernels import log1p, power_of
from saccade.losses.reduction_kernels import factor_of_gradients, offset_along_axes
from saccade.operator.launch import LaunchedKernel, wait_for_previous_kernel


@triton.jit
def _shifted(x, top):
    """``x - top``; 0 where they are equal, be they infinite: so the probability is shared among infinite logits."""
    return tl.where(x == top, 0.0, x - top)


@triton.jit
def _rows_of_tile(
    logits, target, class_weight, number, rows, sizes, logits_steps, target_steps, class_step, alpha,
    C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """What the losses of some rows and their gradients are made of.

    Returns:
        first, row: the rows, counted from the first.
        source: where their logits begin.
        label: of each; is_class: whether there is such a class.
        factor: alpha times the weight of the class.
        top: the largest logit; total: the sum of ``exp(logit - top)``; others: that without the label's.
        log_pt: logarithm of the label's probability.
    """
    first = tl.full([], number, tl.int64) * BLOCK_R
    row = tl.arange(0, BLOCK_R)[:, None]
    exists = row < rows - first
    source = logits + offset_along_axes(first, row, sizes, logits_steps)
    label = tl.load(target + offset_along_axes(first, row, sizes, target_steps), mask=exists, other=-1).to(tl.int64)
    is_class = (label >= 0) & (label < C)
    factor = tl.full([BLOCK_R, 1], alpha, COMPUTE)
    if class_weight is not None:
        factor *= tl.load(class_weight + label, mask=is_class, other=1.0).to(COMPUTE)
    column = tl.arange(0, BLOCK_C)[None, :]
    top = tl.full([BLOCK_R, 1], float("-inf"), COMPUTE)
    for start in range(0, C, BLOCK_C):
        at = source + (start + column).to(tl.int64) * class_step
        x = tl.load(at, mask=exists & (start + column < C), other=float("-inf")).to(COMPUTE)
        top = tl.maximum(top, tl.max(x, 1, keep_dims=True), propagate_nan=tl.PropagateNan.ALL)
    others = tl.zeros([BLOCK_R, 1], COMPUTE)
    for start in range(0, C, BLOCK_C):
        mask = exists & (start + column < C)
        x = tl.load(source + (start + column).to(tl.int64) * class_step, mask=mask, other=0).to(COMPUTE)
        term = tl.exp(_shifted(x, top))
        others += tl.sum(tl.where(mask & (start + column != label), term, 0.0), 1, keep_dims=True)
    of_label = tl.load(source + label * class_step, mask=is_class, other=0).to(COMPUTE)
    of_label = _shifted(of_label, top)
    total = others + tl.exp(of_label)
    # Near probability 1 the logarithm of the sum would lose what the other classes add to it.
    log_pt = tl.where(of_label == 0, -log1p(others), of_label - tl.log(total))
    return first, row, exists, source, label, is_class, factor, top, total, others, log_pt


@LaunchedKernel
@triton.jit(do_not_specialize=["rows", "tiles"])
def softmax_loss_kernel(
    logits, target, class_weight, output, alpha: tl.float64, gamma: tl.float64, scale: tl.float64,
    rows, tiles, sizes, logits_steps, target_steps, output_steps, class_step,
    C: tl.constexpr, GAMMA: tl.constexpr, REDUCED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    COMPUTE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Losses of all rows; if REDUCED, a sum for each program."""
    wait_for_previous_kernel(PDL)
    gamma = tl.full([], gamma, COMPUTE)
    sums = tl.zeros([BLOCK_R, 1], COMPUTE)
    for number in range(tl.program_id(0), tiles, tl.num_programs(0)):
        first, row, exists, _, _, is_class, factor, _, whole, others, log_pt = _rows_of_tile(
            logits, target, class_weight, number, rows, sizes, logits_steps, target_steps, class_step, alpha,
            C, BLOCK_R, BLOCK_C, COMPUTE,
        )  # fmt: skip
        loss = tl.where(is_class, factor * -log_pt * power_of(others / whole, gamma, GAMMA), 0.0)
        if REDUCED:
            sums += loss
        else:
            target_of_loss = output + offset_along_axes(first, row, sizes, output_steps)
            loss *= tl.full([], scale, COMPUTE)
            tl.store(target_of_loss, loss.to(output.dtype.element_ty), mask=exists)
    if REDUCED:
        tl.store(output + tl.program_id(0), tl.sum(tl.sum(sums, 1), 0))


@LaunchedKernel
@triton.jit(do_not_specialize=["rows", "tiles"])
def softmax_gradient_kernel(
    grad_output, logits, target, class_weight, avg_factor, grad_logits,
    alpha: tl.float64, gamma: tl.float64, scale: tl.float64, eps: tl.float64, lowest: tl.float64,
    rows, tiles, sizes, logits_steps, target_steps, output_steps, grad_steps, class_step, output_class_step,
    C: tl.constexpr, GAMMA: tl.constexpr, REDUCED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    COMPUTE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Gradients of all logits."""
    wait_for_previous_kernel(PDL)
    gamma = tl.full([], gamma, COMPUTE)
    column = tl.arange(0, BLOCK_C)[None, :]
    for number in range(tl.program_id(0), tiles, tl.num_programs(0)):
        first, row, exists, source, label, is_class, factor, top, total, others, log_pt = _rows_of_tile(
            logits, target, class_weight, number, rows, sizes, logits_steps, target_steps, class_step, alpha,
            C, BLOCK_R, BLOCK_C, COMPUTE,
        )  # fmt: skip
        grad = factor_of_gradients(grad_output, avg_factor, scale, eps, REDUCED, COMPUTE)
        if not REDUCED:
            of_row = tl.load(grad_output + offset_along_axes(first, row, sizes, grad_steps), mask=exists, other=0)
            grad = of_row.to(COMPUTE) * grad
        # Minus infinity would be multiplied by a probability of 0.
        log_pt = tl.maximum(log_pt, tl.full([], lowest, COMPUTE), propagate_nan=tl.PropagateNan.ALL)
        rest = others / total
        ratio = tl.where(rest > 0, tl.exp(log_pt) * log_pt / rest, -1.0)  # its limit at probability 1 is -1
        # The loss falls with the label's logit at this rate times 1 - p, and rises with any other at this rate times p.
        rate = grad * factor * power_of(rest, gamma, GAMMA) * (1 - gamma * ratio)
        target_of_row = grad_logits + offset_along_axes(first, row, sizes, output_steps)
        for start in range(0, C, BLOCK_C):
            mask = exists & (start + column < C)
            x = tl.load(source + (start + column).to(tl.int64) * class_step, mask=mask, other=0).to(COMPUTE)
            p = tl.exp(_shifted(x, top)) / total
            slope = tl.where(is_class, rate * tl.where(start + column == label, -rest, p), 0.0)
            at = target_of_row + (start + column).to(tl.int64) * output_class_step
            tl.store(at, slope.to(grad_logits.dtype.element_ty), mask=mask)
