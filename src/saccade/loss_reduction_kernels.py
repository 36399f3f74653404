"""Kernels of what all losses do with their elements: visit them where they lie, and sum them in a fixed order.

Each program of a loss's own kernel sums the elements of every n-th tile to one number. A kernel of one program then
adds these numbers up and divides. A counter that tells the last program that it is the last would save that launch, but
has to be cleared by one, or be kept from call to call, where graphs that run side by side would share it.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernel_launch import LaunchedKernel, PreparedLaunch, overlapping, wait_for_kernel_before

# So many programs keep a GPU busy, and leave few sums to add up.
_ENOUGH_PROGRAMS = 4096

# About so many losses at most are added up one after the other in the precision they are computed in: thousands would
# drift. The programs' sums are added up in float64.
_IN_A_ROW = 32

# Programs of a launch that sums nothing, at most.
MOST_BLOCKS = 2**31 - 1

# Launches for so many shapes and kinds of arguments are kept.
KEPT_LAUNCHES = 512


@triton.jit
def offset_along_axes(first, within, sizes, strides):
    """Offsets of the elements numbered ``first + within`` along axes, innermost first, of these sizes and strides."""
    if len(strides) == 1:
        return first.to(tl.int64) * strides[0] + within.to(tl.int64) * strides[0]
    else:
        rest = first + within
        offset = tl.zeros_like(rest).to(tl.int64)
        for axis in tl.static_range(len(strides) - 1):
            offset += (rest % sizes[axis]).to(tl.int64) * strides[axis]
            rest = rest // sizes[axis]
        return offset + rest.to(tl.int64) * strides[len(strides) - 1]


@triton.jit
def factor_of_gradients(grad_output, avg_factor, scale, eps, COMPUTE: tl.constexpr):
    """What the gradients of all losses are multiplied by, if they are reduced to one; a missing `grad_output` is 1."""
    factor = tl.full([], scale, COMPUTE)
    if grad_output is not None:
        factor *= tl.load(grad_output).to(COMPUTE)
    if avg_factor is not None:
        factor /= tl.load(avg_factor).to(COMPUTE) + tl.full([], eps, COMPUTE)
    return factor


@LaunchedKernel
@triton.jit(do_not_specialize=["programs"])
def _finish_kernel(
    sums, counts, avg_factor, output, divisor, scale: tl.float64, eps: tl.float64, programs,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Add up the programs' sums, scale, and divide by `avg_factor`; or, if there are `counts`, by their sum."""
    wait_for_kernel_before(OVERLAP)
    program = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    count = tl.zeros([BLOCK], tl.int64)
    for first in range(0, programs, BLOCK):
        exists = first + program < programs
        total += tl.load(sums + first + program, mask=exists, other=0).to(tl.float64)
        if counts is not None:
            count += tl.load(counts + first + program, mask=exists, other=0)
    result = tl.sum(total, 0) * scale
    if counts is not None:
        positives = tl.maximum(tl.sum(count, 0), 1).to(tl.float64)
        tl.store(divisor, positives.to(divisor.dtype.element_ty))
        result /= positives + eps
    elif avg_factor is not None:
        result /= tl.load(avg_factor).to(tl.float64) + eps
    tl.store(output, result.to(output.dtype.element_ty))


def summing_programs(tiles: int, in_a_row: int = 1) -> int:
    """How many programs sum up tiles, in each of which so many losses are added up one after the other."""
    return min(tiles, max(_ENOUGH_PROGRAMS, triton.cdiv(tiles * in_a_row, _IN_A_ROW)))


@lru_cache(KEPT_LAUNCHES)
def prepared_finish(programs: int, device: torch.device) -> PreparedLaunch:
    """The launch of ``finish`` for so many programs."""
    block = 256 if programs <= 256 else 1024  # two, so that few kernels are compiled where sizes vary
    return _finish_kernel.prepare((1,), programs, BLOCK=block, num_warps=4, **overlapping(device))


def finish(
    sums: Tensor,  # (programs,)
    counts: Tensor | None,  # (programs,) int64
    output: Tensor,  # one element
    divisor: Tensor | None,  # one element, if there are counts: their sum, at least 1
    avg_factor: Tensor | None,
    scale: float,
    eps: float,
) -> None:
    """Reduce what the programs of a loss's kernel have summed."""
    prepared_finish(sums.shape[0], sums.device)((sums, counts, avg_factor, output, divisor), scale, eps)


def scale_of(kind: str, avg_factor: Tensor | None, scale: float, count: int) -> float:
    """Factor of the sum of ``count`` losses, besides division by ``avg_factor``."""
    return scale / count if kind == "mean" and avg_factor is None else scale


def as_numbers(tensor: Tensor | None) -> Tensor | None:
    """The same memory; bool as bytes of 0 and 1."""
    return tensor.view(torch.uint8) if tensor is not None and tensor.dtype == torch.bool else tensor
