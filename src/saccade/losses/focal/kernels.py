"""Triton kernels of sigmoid focal loss, forward and backward.

A tile is a run of elements in the order in which the logits lie in memory: of whole rows beside each other, or, where
the classes are further apart than the rows (as in the permuted output of a convolution), of rows of one class after the
other, so that each row's label is read once.

What bounds it (H200, 960000 rows of 80 classes, gamma 2, float32: 90 us forward, 149 us backward, floors 75 and 148):
the backward is at what memory can deliver. The forward is bound by its instructions, some 27 an element: with bfloat16
logits, 83 us, ncu sees them issued in 85 % of the cycles and main memory busy by 41 %.

What else was tried on that workload, forward / backward, float32:
- Each element's row by a division and its label by a load of its own, some 64 instructions: 182 / 197 us. Elements of a
  row that share both, as many as a power of 2 divides the classes by, but positions counted with 64 bits, and the class
  compared with what changes from tile to tile: 100 / 148.
- Tiles asked for ahead, by ``num_stages=2`` of the loop: 107 / 161. Sums cut into runs by a loop within the loop,
  rather than by more programs: 100.
- With bfloat16 logits, a shorter polynomial for the logarithm, good to 8e-6: 78 us in place of 82, and not exact.
"""

import triton
import triton.language as tl

from saccade.losses.focal_term_kernels import (
    focal_term,
    focal_term_slope,
    log1p,
    power_of,
    sigmoid_and_softplus,
    softplus_to_multiply,
)
from saccade.losses.reduction_kernels import factor_of_gradients, finish_if_last, offset_along_axes
from saccade.operator.launch import LaunchedKernel, wait_for_previous_kernel


@triton.jit
def _entropy(x, t):
    """Binary cross entropy of probabilities, with logarithms clamped at -100 as torch does it."""
    of_positive = tl.maximum(tl.log(x), -100.0, propagate_nan=tl.PropagateNan.ALL)
    of_negative = tl.maximum(log1p(-x), -100.0, propagate_nan=tl.PropagateNan.ALL)
    return -(t * of_positive + (1 - t) * of_negative)


@triton.jit
def _balance(target, alpha, HARD: tl.constexpr, BALANCED: tl.constexpr):
    if not BALANCED:
        return 1.0
    elif HARD:
        return tl.where(target, alpha, 1 - alpha)
    else:
        return (1 - alpha) + (2 * alpha - 1) * target


@triton.jit
def _element_loss(x, target, gamma, GAMMA: tl.constexpr, HARD: tl.constexpr, ACTIVATED: tl.constexpr):
    """Losses of logits, or of probabilities if ACTIVATED; `target` is bool if HARD."""
    if ACTIVATED:
        t = target.to(x.dtype)
        return power_of(t * (1 - x) + (1 - t) * x, gamma, GAMMA) * _entropy(x, t)
    elif HARD:
        return focal_term(tl.where(target, -x, x), gamma, GAMMA)
    else:
        p, not_p, log_term = sigmoid_and_softplus(x)
        error = target * not_p + (1 - target) * p
        # A hard target takes nothing of the other side, be that infinite.
        of_positive = tl.where(target == 0, 0.0, target * (tl.maximum(-x, 0.0) + log_term))
        of_negative = tl.where(target == 1, 0.0, (1 - target) * (tl.maximum(x, 0.0) + log_term))
        return power_of(error, gamma, GAMMA) * (of_positive + of_negative)


@triton.jit
def _element_slope(x, target, gamma, GAMMA: tl.constexpr, HARD: tl.constexpr, ACTIVATED: tl.constexpr):
    """The derivative of `_element_loss` in `x`."""
    if ACTIVATED:
        t = target.to(x.dtype)
        error = t * (1 - x) + (1 - t) * x
        if GAMMA == 0:
            power_slope = tl.zeros_like(error)
        else:
            power_slope = gamma * tl.where(error > 0, power_of(error, gamma - 1, GAMMA - 1 if GAMMA > 0 else -1), 0.0)
        least = tl.full([], 1e-12, x.dtype)  # a bare number would be float32, in tl.maximum
        entropy_slope = (x - t) / tl.maximum(x * (1 - x), least)
        return power_slope * (1 - 2 * t) * _entropy(x, t) + power_of(error, gamma, GAMMA) * entropy_slope
    elif HARD:
        slope = focal_term_slope(tl.where(target, -x, x), gamma, GAMMA)
        return tl.where(target, -slope, slope)
    else:
        p, not_p, log_term = sigmoid_and_softplus(x)
        positive, negative = target * not_p, (1 - target) * p
        error = positive + negative
        entropy = target * softplus_to_multiply(-x, log_term) + (1 - target) * softplus_to_multiply(x, log_term)
        # error ** (gamma - 1) may be infinite where p * not_p is 0; their product is not: p * not_p <= error.
        ratio = tl.where(error > 0, p * not_p / error, 0.0)
        return power_of(error, gamma, GAMMA) * (gamma * (1 - 2 * target) * ratio * entropy + negative - positive)


@triton.jit
def _address(tensor, place, sizes, steps, OF_ROWS: tl.constexpr):
    """Where the elements at a place are; `steps` are of the axis of classes, unless OF_ROWS, and of the axes of rows.

    Without steps, elements lie in memory in the order of their numbers.
    """
    first_row, row, column, beside, first, within = place
    if steps is None:
        return tensor + first + within
    else:
        class_step, row_steps = steps
        source = tensor + offset_along_axes(first_row, row, sizes, row_steps)
        return source if OF_ROWS else source + (column + beside).to(tl.int64) * class_step


@triton.jit
def _tile(
    number, rows, C: tl.constexpr, VECTOR: tl.constexpr, BY_CLASS: tl.constexpr, AT_ONCE: tl.constexpr,
    BLOCK: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """The elements of a tile: (BLOCK / VECTOR, VECTOR), VECTOR of a row beside each other; (1, BLOCK) if BY_CLASS.

    Returns:
        place: the row is `first_row + row`, the class is `column + beside`, the number is `first + within`. BY_CLASS,
            `column` is the first class to go through, and there are no numbers.
        rows_exist, exists: which of the elements there are.
        rounds: how many classes there are to go through one after the other; 1 if not BY_CLASS.
    """
    number = tl.full([], number, INDEX)
    COLUMN: tl.constexpr = tl.int32 if C < 2**30 else tl.int64
    if BY_CLASS:
        CHUNKS: tl.constexpr = (C + AT_ONCE - 1) // AT_ONCE
        first_row = number // CHUNKS * BLOCK
        row = tl.arange(0, BLOCK)[None, :]
        column = (number % CHUNKS * AT_ONCE).to(COLUMN)
        exists = row < tl.minimum(rows - first_row, BLOCK).to(tl.int32)
        return (first_row, row, column, 0, 0, 0), exists, exists, tl.minimum(C - column, AT_ONCE)
    else:
        VECTORS: tl.constexpr = C // VECTOR  # of a row
        first = number * (BLOCK // VECTOR)
        vector, beside = tl.arange(0, BLOCK // VECTOR)[:, None], tl.arange(0, VECTOR)[None, :]
        left = tl.minimum(tl.full([], rows, INDEX) * VECTORS - first, BLOCK).to(tl.int32)
        from_row = (first % VECTORS).to(COLUMN) + vector
        within = vector * VECTOR + beside
        column = from_row % VECTORS * VECTOR
        place = first // VECTORS, from_row // VECTORS, column, beside, first.to(tl.int64) * VECTOR, within
        return place, vector < left, within < left * VECTOR, 1


@triton.jit
def _of_round(place, number, BY_CLASS: tl.constexpr):
    """The place in a round: one class after the other, if BY_CLASS."""
    first_row, row, column, beside, first, within = place
    if BY_CLASS:
        return first_row, row, tl.zeros([1, 1], tl.int32) + column + number, beside, first, within
    else:
        return place


@triton.jit
def _target_and_factor(
    target, weight, class_weight, place, rows_exist, exists, sizes, target_steps, weight_steps, alpha,
    C: tl.constexpr, HAS_LABELS: tl.constexpr, WEIGHS_ROWS: tl.constexpr, HARD: tl.constexpr,
    BALANCED: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Targets of elements, bool if HARD, and what their losses are multiplied by."""
    at = _address(target, place, sizes, target_steps, HAS_LABELS)
    if HAS_LABELS:
        label = tl.load(at, mask=rows_exist, other=-1)
        is_class = (label >= 0) & (label < C)
        column = tl.where(is_class, label - place[2], -1)  # counted from that of the place
        answer = (column.to(tl.int32) if C < 2**30 else column) == place[3]
    elif HARD:
        answer = tl.load(at, mask=exists, other=0) != 0
    else:
        answer = tl.load(at, mask=exists, other=0).to(COMPUTE)
    factor = _balance(answer, alpha, HARD, BALANCED)
    if class_weight is not None:
        factor *= tl.load(class_weight + label, mask=is_class, other=1.0).to(COMPUTE)
    if weight is not None:
        at = _address(weight, place, sizes, weight_steps, WEIGHS_ROWS)
        factor *= tl.load(at, mask=rows_exist if WEIGHS_ROWS else exists, other=0).to(COMPUTE)
    return answer, factor


@LaunchedKernel
@triton.jit(do_not_specialize=["tiles"])
def loss_kernel(
    logits, target, weight, class_weight, output, grad_logits, avg_factor, counter, total,
    alpha: tl.float64, gamma: tl.float64, scale: tl.float64, eps: tl.float64,
    rows, tiles, sizes, logits_steps, target_steps, weight_steps, output_steps,
    C: tl.constexpr, GAMMA: tl.constexpr, HAS_LABELS: tl.constexpr, WEIGHS_ROWS: tl.constexpr, HARD: tl.constexpr,
    BALANCED: tl.constexpr, ACTIVATED: tl.constexpr, REDUCED: tl.constexpr, VECTOR: tl.constexpr,
    BY_CLASS: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr, COMPUTE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Losses of all elements; if REDUCED, a sum for each program, and where they have a place, gradients and total."""
    wait_for_previous_kernel(PDL)
    alpha, gamma = tl.full([], alpha, COMPUTE), tl.full([], gamma, COMPUTE)
    if grad_logits is not None:
        common = factor_of_gradients(None, avg_factor, scale, eps, REDUCED, COMPUTE)
    absent = 0.0 if ACTIVATED else float("-inf")  # where there is no element, a negative whose loss is exactly 0
    sums = tl.zeros([1, BLOCK] if BY_CLASS else [BLOCK // VECTOR, VECTOR], COMPUTE)
    for number in range(tl.program_id(0), tiles, tl.num_programs(0)):
        place_of_tile, rows_exist, exists, rounds = _tile(number, rows, C, VECTOR, BY_CLASS, AT_ONCE, BLOCK, INDEX)
        for of_round in range(rounds):
            place = _of_round(place_of_tile, of_round, BY_CLASS)
            at = _address(logits, place, sizes, logits_steps, False)
            x = tl.load(at, mask=exists, other=absent).to(COMPUTE)
            answer, factor = _target_and_factor(
                target, weight, class_weight, place, rows_exist, exists, sizes, target_steps, weight_steps, alpha,
                C, HAS_LABELS, WEIGHS_ROWS, HARD, BALANCED, COMPUTE,
            )  # fmt: skip
            loss = _element_loss(x, answer, gamma, GAMMA, HARD, ACTIVATED) * factor
            if REDUCED:
                sums += loss
                if grad_logits is not None:
                    slope = _element_slope(x, answer, gamma, GAMMA, HARD, ACTIVATED) * factor * common
                    at = _address(grad_logits, place, sizes, output_steps, False)
                    tl.store(at, slope.to(grad_logits.dtype.element_ty), mask=exists)
            else:
                at = _address(output, place, sizes, output_steps, False)
                loss *= tl.full([], scale, COMPUTE)
                tl.store(at, loss.to(output.dtype.element_ty), mask=exists)
    if REDUCED:
        tl.store(output + tl.program_id(0), tl.sum(tl.sum(sums, 1), 0))
        if total is not None:
            finish_if_last(output, counter, avg_factor, total, scale, eps)


@LaunchedKernel
@triton.jit(do_not_specialize=["tiles"])
def gradient_kernel(
    grad_output, logits, target, weight, class_weight, avg_factor, grad_logits, alpha: tl.float64, gamma: tl.float64,
    scale: tl.float64, eps: tl.float64,
    rows, tiles, sizes, logits_steps, target_steps, weight_steps, output_steps, grad_steps,
    C: tl.constexpr, GAMMA: tl.constexpr, HAS_LABELS: tl.constexpr, WEIGHS_ROWS: tl.constexpr, HARD: tl.constexpr,
    BALANCED: tl.constexpr, ACTIVATED: tl.constexpr, REDUCED: tl.constexpr, VECTOR: tl.constexpr,
    BY_CLASS: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr, COMPUTE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Gradients of all logits."""
    wait_for_previous_kernel(PDL)
    alpha, gamma = tl.full([], alpha, COMPUTE), tl.full([], gamma, COMPUTE)
    common = factor_of_gradients(grad_output, avg_factor, scale, eps, REDUCED, COMPUTE)
    for number in range(tl.program_id(0), tiles, tl.num_programs(0)):
        place_of_tile, rows_exist, exists, rounds = _tile(number, rows, C, VECTOR, BY_CLASS, AT_ONCE, BLOCK, INDEX)
        for of_round in range(rounds):
            place = _of_round(place_of_tile, of_round, BY_CLASS)
            x = tl.load(_address(logits, place, sizes, logits_steps, False), mask=exists, other=0).to(COMPUTE)
            answer, factor = _target_and_factor(
                target, weight, class_weight, place, rows_exist, exists, sizes, target_steps, weight_steps, alpha,
                C, HAS_LABELS, WEIGHS_ROWS, HARD, BALANCED, COMPUTE,
            )  # fmt: skip
            slope = _element_slope(x, answer, gamma, GAMMA, HARD, ACTIVATED) * factor * common
            if not REDUCED:
                at = _address(grad_output, place, sizes, grad_steps, False)
                slope *= tl.load(at, mask=exists, other=0).to(COMPUTE)
            at = _address(grad_logits, place, sizes, output_steps, False)
            tl.store(at, slope.to(grad_logits.dtype.element_ty), mask=exists)
