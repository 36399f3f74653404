"""Kernels of what all losses do with their elements: visit them where they lie, and sum them in a fixed order.

Each program of a loss's own kernel sums the elements of every n-th tile to one number. A kernel of one program then
adds these numbers up and divides; or the program that ends last does, where it takes longer to launch a kernel than to
run it. A counter tells which one that is. As clearing it would take a launch again, it is kept, and cleared by
that last program: one counter for each stream, whose launches follow each other. A CUDA graph clears a counter of its
own, as it may be replayed beside anything. The order of the sum is always the same.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernel_launch import LaunchedKernel, PreparedLaunch, overlapping, wait_for_kernel_before
from saccade.operator.torch_internals import current_gpu, current_stream, is_capturing

# So many programs keep a GPU busy, and leave few sums to add up.
_ENOUGH_PROGRAMS = 4096

# About so many losses at most are added up one after the other in the precision they are computed in: thousands would
# drift. The programs' sums are added up in float64.
_IN_A_ROW = 32

# How many of the programs' sums are read at once.
_SUMS_AT_ONCE = tl.constexpr(1024)

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


@triton.jit
def _finish(sums, counts, avg_factor, output, divisor, scale, eps, programs):
    """Add up the programs' sums, scale, and divide by `avg_factor`; or, if there are `counts`, by their sum."""
    program = tl.arange(0, _SUMS_AT_ONCE)
    total = tl.zeros([_SUMS_AT_ONCE], tl.float64)
    count = tl.zeros([_SUMS_AT_ONCE], tl.int64)
    for first in range(0, programs, _SUMS_AT_ONCE):
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


@LaunchedKernel
@triton.jit(do_not_specialize=["programs"])
def _finish_kernel(
    sums, counts, avg_factor, output, divisor, scale: tl.float64, eps: tl.float64, programs, OVERLAP: tl.constexpr
):  # fmt: skip
    """`_finish`, in a launch of its own."""
    wait_for_kernel_before(OVERLAP)
    _finish(sums, counts, avg_factor, output, divisor, scale, eps, programs)


@triton.jit
def finish_if_last(sums, counter, avg_factor, output, scale, eps):
    """`_finish`, in the program that ends last: each calls this when its sum is stored."""
    programs = tl.num_programs(0)
    tl.debug_barrier()  # in case that another thread counts than has stored the sum
    if tl.atomic_add(counter, 1, sem="acq_rel") == programs - 1:
        tl.store(counter, 0)
        _finish(sums, None, avg_factor, output, None, scale, eps, programs)


class Workspace(NamedTuple):
    """Memory of a launch whose last program finishes the sum."""

    sums: Tensor  # (programs or more,)
    counter: Tensor  # (1,) int32: how many programs have ended; 0 before the launch and after it


_MOST_SUMS_KEPT = 1024
_STREAM_OF_EACH_THREAD = 2
"""``cudaStreamPerThread``: one number for many streams."""
_workspaces: dict[tuple[int, int, torch.dtype], Workspace] = {}


def workspace(programs: int, predictions: Tensor, dtype: torch.dtype) -> Workspace:
    """Memory for a launch of so many programs on the current stream of the predictions' device.

    What is kept for a stream and dtype, less than 10 kB, is never given back, not even if the stream is destroyed: CUDA
    keeps what belongs to a stream until its work has ended, so no other one has its number before. It comes from the
    memory pool in use at the first call on the stream, and must not be unmapped with that.
    """
    device = predictions.get_device()
    if programs > _MOST_SUMS_KEPT or device < 0 or device != current_gpu() or is_capturing():
        return _new_workspace(programs, predictions, dtype)
    stream = current_stream(device)
    kept = _workspaces.get((device, stream, dtype))
    if kept is None:
        kept = _new_workspace(_MOST_SUMS_KEPT, predictions, dtype)
        if stream != _STREAM_OF_EACH_THREAD:
            _workspaces[device, stream, dtype] = kept
    return kept


def _new_workspace(programs: int, predictions: Tensor, dtype: torch.dtype) -> Workspace:
    sums = predictions.new_empty(programs, dtype=dtype)
    return Workspace(sums, predictions.new_zeros(1, dtype=torch.int32))


def summing_programs(tiles: int, in_a_row: int = 1) -> int:
    """How many programs sum up tiles, in each of which so many losses are added up one after the other."""
    return min(tiles, max(_ENOUGH_PROGRAMS, triton.cdiv(tiles * in_a_row, _IN_A_ROW)))


@lru_cache(KEPT_LAUNCHES)
def prepared_finish(programs: int, device: torch.device) -> PreparedLaunch:
    """The launch of ``finish`` for so many programs."""
    return _finish_kernel.prepare((1,), programs, num_warps=4, **overlapping(device))


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
