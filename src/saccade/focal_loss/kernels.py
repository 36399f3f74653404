"""Triton kernels of sigmoid focal loss, forward and backward.

A tile is a run of elements in the order in which the logits lie in memory: of whole rows beside each other, or, where
the classes are further apart than the rows (as in the permuted output of a convolution), of rows of one class after the
other, so that each row's label is read once.

What bounds it (H200, 960000 rows of 80 classes, gamma 2, float32: 90 us forward, 149 us backward, floors 75 and 148):
the backward is at what memory can deliver. The forward is bound by its instructions, some 27 an element: with bfloat16
logits, 83 us, ncu sees them issued in 85 % of the cycles and main memory busy by 41 %.

What else was tried on that workload, forward / backward, float32:
- Each element's row by a division and its label by a load of its own, some 64 instructions: 182 / 197 us. That elements
  of a row share both, as many as a power of 2 divides the classes by, and a reciprocal square root in place of the
  division: 100 / 148. Positions counted with 32 bits, the class compared with what does not change from tile to tile:
  90 / 148.
- Tiles asked for ahead, by ``num_stages=2`` of the loop: 107 / 161. Sums cut into runs by a loop within the loop,
  rather than by more programs: 100.
- With bfloat16 logits, a shorter polynomial for the logarithm, good to 8e-6: 78 us in place of 82, and not exact.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.focal_term_kernels import (
    constant_power,
    focal_term,
    focal_term_slope,
    log1p,
    power_of,
    sigmoid_and_softplus,
    softplus_to_multiply,
)
from saccade.kernel_launch import (
    TRITON_DTYPE,
    LaunchedKernel,
    PreparedLaunch,
    overlapping,
    wait_for_kernel_before,
)
from saccade.loss_reduction import normalized
from saccade.loss_reduction_kernels import (
    KEPT_LAUNCHES,
    MOST_BLOCKS,
    as_numbers,
    factor_of_gradients,
    finish_if_last,
    offset_along_axes,
    prepared_finish,
    scale_of,
    summing_programs,
    workspace,
)
from saccade.memory_axes import memory_axes
from saccade.precision import compute_dtype

# Elements of a tile and warps that work on it, by whether losses are summed and bytes of a logit. Fastest on an H200.
_TILES = {
    (True, 2): (2048, 4),
    (True, 4): (1024, 4),
    (True, 8): (1024, 4),
    (False, 2): (2048, 2),
    (False, 4): (1024, 4),
    (False, 8): (1024, 4),
}

# Where there are few elements: so few to a tile that all multiprocessors have some.
_FEW, _SMALL_TILE, _WARPS = 1 << 19, 512, 4

# Classes that a program reads one after the other, where each is a tile; and from how many rows on it is one.
_CLASSES_AT_ONCE, _ROWS_BY_CLASS = 16, 128

# Elements of a row that share the search for their row and its label, at most.
_VECTOR = 16


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
def _loss_kernel(
    logits, target, weight, class_weight, output, grad_logits, avg_factor, counter, total,
    alpha: tl.float64, gamma: tl.float64, scale: tl.float64, eps: tl.float64,
    rows, tiles, sizes, logits_steps, target_steps, weight_steps, output_steps,
    C: tl.constexpr, GAMMA: tl.constexpr, HAS_LABELS: tl.constexpr, WEIGHS_ROWS: tl.constexpr, HARD: tl.constexpr,
    BALANCED: tl.constexpr, ACTIVATED: tl.constexpr, REDUCED: tl.constexpr, VECTOR: tl.constexpr,
    BY_CLASS: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr, COMPUTE: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Losses of all elements; if REDUCED, a sum for each program, and where they have a place, gradients and total."""
    wait_for_kernel_before(OVERLAP)
    alpha, gamma = tl.full([], alpha, COMPUTE), tl.full([], gamma, COMPUTE)
    if grad_logits is not None:
        common = factor_of_gradients(None, avg_factor, scale, eps, COMPUTE)
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
def _gradient_kernel(
    grad_output, logits, target, weight, class_weight, avg_factor, grad_logits, alpha: tl.float64, gamma: tl.float64,
    scale: tl.float64, eps: tl.float64,
    rows, tiles, sizes, logits_steps, target_steps, weight_steps, output_steps, grad_steps,
    C: tl.constexpr, GAMMA: tl.constexpr, HAS_LABELS: tl.constexpr, WEIGHS_ROWS: tl.constexpr, HARD: tl.constexpr,
    BALANCED: tl.constexpr, ACTIVATED: tl.constexpr, REDUCED: tl.constexpr, VECTOR: tl.constexpr,
    BY_CLASS: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr, COMPUTE: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Gradients of all logits."""
    wait_for_kernel_before(OVERLAP)
    alpha, gamma = tl.full([], alpha, COMPUTE), tl.full([], gamma, COMPUTE)
    if REDUCED:
        common = factor_of_gradients(grad_output, avg_factor, scale, eps, COMPUTE)
    else:
        common = tl.full([], scale, COMPUTE)
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


@lru_cache(KEPT_LAUNCHES)
def _prepare(
    kernel: LaunchedKernel,
    shape: torch.Size,
    strides: tuple[tuple[int, ...] | None, ...],
    device: torch.device,
    itemsize: int,
    compute: torch.dtype,
    **constants: Any,
) -> tuple[PreparedLaunch, int]:
    """A launch for logits of a shape, and its number of programs.

    ``strides`` are of the tensors whose elements are visited together, the logits' first: one for each axis, or for
    each but the last if there is one element to a row; in the order of the kernel's steps.
    """
    classes = shape[-1]
    elements = shape.numel()
    rows = elements // classes
    given = [of_tensor for of_tensor in strides if of_tensor is not None]
    sizes, row_steps = memory_axes(shape[:-1], *(of_tensor[: len(shape) - 1] for of_tensor in given))
    by_class = classes > 1 and 0 < row_steps[0][0] < given[0][-1] and rows >= _ROWS_BY_CLASS
    in_order = (1, tuple(classes * prod(sizes[:axis]) for axis in range(len(sizes))))
    steps = []
    along_rows = iter(row_steps)
    for of_tensor in strides:
        if of_tensor is None:
            steps.append(None)
        else:
            class_step = of_tensor[-1] if len(of_tensor) == len(shape) else 0
            of_rows = next(along_rows)
            steps.append(None if not by_class and (class_step, of_rows) == in_order else (class_step, of_rows))
    reduced = constants["REDUCED"] and kernel is _loss_kernel
    block, warps = (_SMALL_TILE, _WARPS) if elements < _FEW else _TILES[kernel is _loss_kernel, itemsize]
    at_once = min(classes, _CLASSES_AT_ONCE)
    tiles = triton.cdiv(rows, block) * triton.cdiv(classes, at_once) if by_class else triton.cdiv(elements, block)
    programs = summing_programs(tiles, at_once if by_class else 1) if reduced else min(tiles, MOST_BLOCKS)
    launch = kernel.prepare(
        (programs,),
        rows,
        tiles,
        sizes,
        *steps,
        C=classes,
        VECTOR=1 if by_class else min(classes & -classes, _VECTOR),  # the power of 2 that divides the classes
        BY_CLASS=by_class,
        AT_ONCE=at_once,
        BLOCK=block,
        INDEX=tl.int32 if elements < 2**31 - block * at_once else tl.int64,  # counts to the end of the last tile
        COMPUTE=TRITON_DTYPE[compute],
        num_warps=warps,
        **constants,
        **overlapping(device),
    )
    return launch, programs


def _launch_for(
    kernel: LaunchedKernel,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    others: Sequence[Tensor | None],
    alpha: float,
    gamma: float,
    activated: bool,
    kind: str,
) -> tuple[PreparedLaunch, int]:
    """The launch for these tensors; ``others`` have the shape of the logits."""
    has_labels = target.ndim < logits.ndim
    weighs_rows = weight is not None and weight.shape[-1] == 1
    of_weight = None if weight is None else weight.stride()[:-1] if weighs_rows else weight.stride()
    of_others = (None if other is None else other.stride() for other in others)
    return _prepare(
        kernel,
        logits.shape,
        (logits.stride(), target.stride(), of_weight, *of_others),
        logits.device,
        logits.element_size(),
        compute_dtype(logits),
        GAMMA=constant_power(gamma),
        HAS_LABELS=has_labels,
        WEIGHS_ROWS=weighs_rows,
        HARD=has_labels or target.dtype == torch.bool,
        BALANCED=alpha >= 0,
        ACTIVATED=activated,
        REDUCED=kind != "none",
    )


def prepare_sigmoid_focal_loss(
    logits: Tensor,  # (..., C), not empty
    target: Tensor,  # (...) integer, or (..., C) bool or floating
    weight: Tensor | None,  # (..., C) or (..., 1)
    class_weight: Tensor | None,  # (C,)
    alpha: float,
    gamma: float,
    activated: bool,
    kind: str,
    avg_factor: Tensor | None,
    scale: float,
    eps: float,
    with_gradient: bool = False,
) -> Callable[..., Any]:
    """Make ``saccade.sigmoid_focal_loss`` for calls with these arguments, but for the values of tensors and the scale.

    ``kind`` to ``eps`` are those of ``saccade.loss_reduction.Reduction``. With the gradient, which a reduced loss may
    come with, the call returns it beside the loss.
    """
    how = alpha, gamma, activated, kind
    if kind == "none":

        def losses(logits: Tensor, target: Tensor, weight: Tensor | None, class_weight: Tensor | None, *numbers: Any):
            *_, scale, _ = numbers
            output = torch.empty_like(logits)
            _write_losses(output, logits, target, weight, class_weight, alpha, gamma, activated, scale)
            return output

        return losses
    dtype = compute_dtype(logits)
    count = logits.numel() if kind == "mean" and avg_factor is None else 1
    as_given = target.dtype != torch.bool and weight is None and class_weight is None
    # A gradient has strides of its own, which are not always the logits'.
    others = [torch.empty_like(logits) if with_gradient else None]
    launch, programs = _launch_for(_loss_kernel, logits, target, weight, others, *how)
    finish = prepared_finish(programs, logits.device)

    def loss(
        logits: Tensor, target: Tensor, weight: Tensor | None, class_weight: Tensor | None, *numbers: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        *_, avg_factor, scale, eps = numbers
        output = logits.new_empty(() if avg_factor is None else avg_factor.shape, dtype=dtype)
        if not as_given:
            target, weight, class_weight = as_numbers(target), as_numbers(weight), _packed(class_weight)
        if with_gradient:
            gradient = torch.empty_like(logits)
            sums, counter = workspace(programs, logits, dtype)
            tensors = logits, target, weight, class_weight, sums, gradient, avg_factor, counter, output
            launch(tensors, alpha, gamma, scale / count, eps)
            return output, gradient
        sums = logits.new_empty(programs, dtype=dtype)
        launch((logits, target, weight, class_weight, sums, None, None, None, None), alpha, gamma, scale / count, eps)
        finish((sums, None, avg_factor, output, None), scale / count, eps)
        return output

    return loss


def _packed(class_weight: Tensor | None) -> Tensor | None:
    return None if class_weight is None else as_numbers(class_weight.contiguous())


def _write_losses(
    output: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    class_weight: Tensor | None,
    alpha: float,
    gamma: float,
    activated: bool,
    scale: float,
) -> None:
    """Write unreduced losses, in the dtype of ``output``."""
    launch, _ = _launch_for(_loss_kernel, logits, target, weight, [output], alpha, gamma, activated, "none")
    tensors = logits, as_numbers(target), as_numbers(weight), _packed(class_weight), output, None, None, None, None
    launch(tensors, alpha, gamma, scale, 0.0)


def sigmoid_focal_loss_backward(
    grad_output: Tensor,  # (..., C), or reduced
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
    needed: list[bool],  # logits, weight
) -> tuple[Tensor, Tensor]:
    """Gradients of logits and weight; an empty tensor for one that is not needed."""
    grad_logits = torch.empty_like(logits) if needed[0] else logits.new_empty(0)
    grad_weight = logits.new_empty(0) if weight is None else weight.new_empty(weight.shape if needed[1] else 0)
    if needed[0]:
        others = [grad_logits, grad_output if kind == "none" else None]
        launch, _ = _launch_for(_gradient_kernel, logits, target, weight, others, alpha, gamma, activated, kind)
        tensors = as_numbers(target), as_numbers(weight), _packed(class_weight), avg_factor, grad_logits
        of_all = scale_of(kind, avg_factor, scale, logits.numel())
        launch((grad_output, logits, *tensors), alpha, gamma, of_all, eps)
    if needed[1]:
        losses = torch.empty_like(logits, dtype=compute_dtype(logits))
        _write_losses(losses, logits, target, None, class_weight, alpha, gamma, activated, 1.0)
        grad = normalized(grad_output.to(losses.dtype), logits.numel(), kind, avg_factor, scale, eps)
        grad_weight.copy_(losses.mul_(grad).sum_to_size(grad_weight.shape))
    return grad_logits, grad_weight
