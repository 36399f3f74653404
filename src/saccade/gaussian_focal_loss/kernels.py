"""Triton kernels of Gaussian focal loss, forward and backward: one pass over predictions and target, which also counts
the positives if they are what the sum is divided by.

Both passes are at what memory can deliver (H200, 32 x 80 x 128 x 128 float32 logits: 80 us forward, 118 us backward,
floors 80 and 120). Counting the positives costs 9 us more. Tiles of 512 to 2048 elements and 4 or 8 warps differ by
less than a tenth.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.focal_term_kernels import constant_power, focal_term, focal_term_slope, log1p, power_of
from saccade.kernel_launch import (
    TRITON_DTYPE,
    LaunchedKernel,
    PreparedLaunch,
    overlapping,
    wait_for_kernel_before,
)
from saccade.loss_reduction import new_loss, normalized
from saccade.loss_reduction_kernels import (
    KEPT_LAUNCHES,
    MOST_BLOCKS,
    as_numbers,
    factor_of_gradients,
    finish,
    offset_along_axes,
    scale_of,
    summing_programs,
)
from saccade.memory_axes import memory_axes
from saccade.precision import compute_dtype

# Elements of a tile and warps that work on it: few where there are few, so that all multiprocessors have some.
_TILE, _WARPS, _SMALL_TILE, _FEW = 1024, 4, 512, 1 << 19

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
def _positive_and_factor(
    target, weight, first, within, exists, sizes, target_steps, weight_steps, gamma, pos_weight, neg_weight,
    GAMMA: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Which elements are positives, and what their losses are multiplied by: less the closer a negative is to one."""
    value = tl.load(_address(target, first, within, sizes, target_steps), mask=exists, other=0)
    positive = value == 1
    distance = tl.clamp(1 - value.to(COMPUTE), 0.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
    factor = tl.where(positive, pos_weight, neg_weight * power_of(distance, gamma, GAMMA))
    if weight is not None:
        at = _address(weight, first, within, sizes, weight_steps)
        factor *= tl.load(at, mask=exists, other=0).to(COMPUTE)
    return positive, factor


@LaunchedKernel
@triton.jit(do_not_specialize=["tiles"])
def _loss_kernel(
    pred, target, weight, output, counts,
    alpha: tl.float64, gamma: tl.float64, pos_weight: tl.float64, neg_weight: tl.float64, bound: tl.float64,
    scale: tl.float64,
    elements, tiles, sizes, pred_steps, target_steps, weight_steps, output_steps,
    ALPHA: tl.constexpr, GAMMA: tl.constexpr, WITH_LOGITS: tl.constexpr, CLIPPED: tl.constexpr, REDUCED: tl.constexpr,
    BLOCK: tl.constexpr, COMPUTE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Losses of all elements; if REDUCED, a sum for each program, and a count of positives if there are `counts`."""
    wait_for_kernel_before(OVERLAP)
    alpha, gamma = tl.full([], alpha, COMPUTE), tl.full([], gamma, COMPUTE)
    pos_weight, neg_weight = tl.full([], pos_weight, COMPUTE), tl.full([], neg_weight, COMPUTE)
    bound = tl.full([], bound, COMPUTE)
    within = tl.arange(0, BLOCK)
    # Where there is no element, a negative whose loss is exactly 0: if it is not clipped.
    absent = float("-inf") if WITH_LOGITS else 0.0
    sums = tl.zeros([BLOCK], COMPUTE)
    count = tl.zeros([BLOCK], tl.int32)
    for number in range(tl.program_id(0), tiles, tl.num_programs(0)):
        first = tl.full([], number, tl.int64) * BLOCK
        exists = within < tl.minimum(elements - first, BLOCK).to(tl.int32)
        x = tl.load(_address(pred, first, within, sizes, pred_steps), mask=exists, other=absent).to(COMPUTE)
        positive, factor = _positive_and_factor(
            target, weight, first, within, exists, sizes, target_steps, weight_steps, gamma, pos_weight,
            neg_weight, GAMMA, COMPUTE,
        )  # fmt: skip
        loss = _element_loss(x, positive, bound, alpha, ALPHA, WITH_LOGITS, CLIPPED) * factor
        if REDUCED:
            sums += loss if WITH_LOGITS and not CLIPPED else tl.where(exists, loss, 0.0)
            count += positive.to(tl.int32)
        else:
            loss *= tl.full([], scale, COMPUTE)
            at = _address(output, first, within, sizes, output_steps)
            tl.store(at, loss.to(output.dtype.element_ty), mask=exists)
    if REDUCED:
        tl.store(output + tl.program_id(0), tl.sum(sums, 0))
        if counts is not None:
            tl.store(counts + tl.program_id(0), tl.sum(count.to(tl.int64), 0))


@LaunchedKernel
@triton.jit(do_not_specialize=["tiles"])
def _gradient_kernel(
    grad_output, pred, target, weight, avg_factor, grad_pred,
    alpha: tl.float64, gamma: tl.float64, pos_weight: tl.float64, neg_weight: tl.float64, bound: tl.float64,
    scale: tl.float64, eps: tl.float64,
    elements, tiles, sizes, pred_steps, target_steps, weight_steps, output_steps, grad_steps,
    ALPHA: tl.constexpr, GAMMA: tl.constexpr, WITH_LOGITS: tl.constexpr, CLIPPED: tl.constexpr, REDUCED: tl.constexpr,
    BLOCK: tl.constexpr, COMPUTE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Gradients of all predictions."""
    wait_for_kernel_before(OVERLAP)
    alpha, gamma = tl.full([], alpha, COMPUTE), tl.full([], gamma, COMPUTE)
    pos_weight, neg_weight = tl.full([], pos_weight, COMPUTE), tl.full([], neg_weight, COMPUTE)
    bound = tl.full([], bound, COMPUTE)
    if REDUCED:
        common = factor_of_gradients(grad_output, avg_factor, scale, eps, COMPUTE)
    else:
        common = tl.full([], scale, COMPUTE)
    within = tl.arange(0, BLOCK)
    for number in range(tl.program_id(0), tiles, tl.num_programs(0)):
        first = tl.full([], number, tl.int64) * BLOCK
        exists = within < tl.minimum(elements - first, BLOCK).to(tl.int32)
        x = tl.load(_address(pred, first, within, sizes, pred_steps), mask=exists, other=0).to(COMPUTE)
        positive, factor = _positive_and_factor(
            target, weight, first, within, exists, sizes, target_steps, weight_steps, gamma, pos_weight, neg_weight,
            GAMMA, COMPUTE,
        )  # fmt: skip
        factor *= common
        if not REDUCED:
            at = _address(grad_output, first, within, sizes, grad_steps)
            factor *= tl.load(at, mask=exists, other=0).to(COMPUTE)
        slope = _element_slope(x, positive, bound, alpha, ALPHA, WITH_LOGITS, CLIPPED) * factor
        at = _address(grad_pred, first, within, sizes, output_steps)
        tl.store(at, slope.to(grad_pred.dtype.element_ty), mask=exists)


@lru_cache(KEPT_LAUNCHES)
def _prepare(
    kernel: LaunchedKernel,
    shape: torch.Size,
    strides: tuple[tuple[int, ...] | None, ...],
    device: torch.device,
    compute: torch.dtype,
    **constants: Any,
) -> tuple[PreparedLaunch, int]:
    """A launch for predictions of a shape, and its number of programs.

    ``strides`` are of the tensors whose elements are visited together, the predictions' first, in the order of the
    kernel's steps.
    """
    elements = shape.numel()
    sizes, along_axes = memory_axes(shape, *(of_tensor for of_tensor in strides if of_tensor is not None))
    axes = iter(along_axes)
    in_order = tuple(math.prod(sizes[:axis]) for axis in range(len(sizes)))
    steps = [None if of_tensor is None else next(axes) for of_tensor in strides]
    block = _SMALL_TILE if elements < _FEW else _TILE
    tiles = triton.cdiv(elements, block)
    reduced = constants["REDUCED"] and kernel is _loss_kernel
    programs = summing_programs(tiles) if reduced else min(tiles, MOST_BLOCKS)
    launch = kernel.prepare(
        (programs,),
        elements,
        tiles,
        sizes,
        *(None if of_tensor == in_order else of_tensor for of_tensor in steps),
        BLOCK=block,
        COMPUTE=TRITON_DTYPE[compute],
        num_warps=_WARPS,
        **constants,
        **overlapping(device),
    )
    return launch, programs


def _launch_for(
    kernel: LaunchedKernel,
    pred: Tensor,
    others: Sequence[Tensor | None],
    alpha: float,
    gamma: float,
    with_logits: bool,
    clip: float | None,
    kind: str,
) -> tuple[PreparedLaunch, int]:
    """The launch for these tensors; ``others`` broadcast to the shape of the predictions."""
    return _prepare(
        kernel,
        pred.shape,
        (pred.stride(), *(None if other is None else other.expand(pred.shape).stride() for other in others)),
        pred.device,
        compute_dtype(pred),
        ALPHA=constant_power(alpha),
        GAMMA=constant_power(gamma),
        WITH_LOGITS=with_logits,
        CLIPPED=clip is not None,
        REDUCED=kind != "none",
    )


def _bound(clip: float | None) -> float:
    """The logit at which a probability is clipped to ``clip`` or ``1 - clip``."""
    return 0.0 if clip is None else math.log((1 - clip) / clip)


def _write_losses(
    output: Tensor,
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None,
    alpha: float,
    gamma: float,
    pos_weight: float,
    neg_weight: float,
    with_logits: bool,
    clip: float | None,
    scale: float,
) -> None:
    """Write unreduced losses, in the dtype of ``output``."""
    launch, _ = _launch_for(_loss_kernel, pred, [target, weight, output], alpha, gamma, with_logits, clip, "none")
    tensors = pred, target, as_numbers(weight), output, None
    launch(tensors, alpha, gamma, pos_weight, neg_weight, _bound(clip), scale)


def gaussian_focal_loss(
    pred: Tensor,  # not empty
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
    """As ``gaussian_focal_loss`` of the reference."""
    output = new_loss(pred, pred.shape, kind, avg_factor)
    divisor = pred.new_empty(() if kind == "num_pos" else 0, dtype=compute_dtype(pred))
    if kind == "none":
        _write_losses(output, pred, target, weight, alpha, gamma, pos_weight, neg_weight, with_logits, clip, scale)
        return output, divisor
    launch, programs = _launch_for(_loss_kernel, pred, [target, weight, None], alpha, gamma, with_logits, clip, kind)
    sums = pred.new_empty(programs, dtype=divisor.dtype)
    counts = pred.new_empty(programs, dtype=torch.int64) if kind == "num_pos" else None
    tensors = pred, target, as_numbers(weight), sums, counts
    launch(tensors, alpha, gamma, pos_weight, neg_weight, _bound(clip), scale)
    finish(sums, counts, output, divisor, avg_factor, scale_of(kind, avg_factor, scale, pred.numel()), eps)
    return output, divisor


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
    grad_pred = torch.empty_like(pred) if needed[0] else pred.new_empty(0)
    grad_weight = pred.new_empty(0) if weight is None else weight.new_empty(weight.shape if needed[1] else 0)
    if needed[0]:
        others = [target, weight, grad_pred, grad_output if kind == "none" else None]
        launch, _ = _launch_for(_gradient_kernel, pred, others, alpha, gamma, with_logits, clip, kind)
        tensors = grad_output, pred, target, as_numbers(weight), avg_factor, grad_pred
        of_all = scale_of(kind, avg_factor, scale, pred.numel())
        launch(tensors, alpha, gamma, pos_weight, neg_weight, _bound(clip), of_all, eps)
    if needed[1]:
        losses = torch.empty_like(pred, dtype=compute_dtype(pred))
        _write_losses(losses, pred, target, None, alpha, gamma, pos_weight, neg_weight, with_logits, clip, 1.0)
        grad = normalized(grad_output.to(losses.dtype), pred.numel(), kind, avg_factor, scale, eps)
        grad_weight.copy_(losses.mul_(grad).sum_to_size(grad_weight.shape))
    return grad_pred, grad_weight
