"""Kernels of what all losses do with their elements: visit them where they lie, and sum them in a fixed order.

Each program of a loss's own kernel sums the elements of every n-th tile to one number. A kernel of one program then
adds these numbers up and divides; or the program that ends last does, where it takes longer to launch a kernel than to
run it. A counter tells which one that is. As clearing it would take a launch again, it is kept, and cleared by
that last program: one counter for each stream, whose launches follow each other. A CUDA graph clears a counter of its
own, as it may be replayed beside anything. The order of the sum is always the same.
"""

import triton
import triton.language as tl

from saccade.operator.launch import LaunchedKernel, wait_for_previous_kernel

# How many of the programs' sums are read at once.
_SUMS_AT_ONCE = tl.constexpr(1024)


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
def factor_of_gradients(grad_output, avg_factor, scale, eps, REDUCED: tl.constexpr, COMPUTE: tl.constexpr):
    """What the gradients of all losses are multiplied by; a missing `grad_output` is 1.

    Of losses that are not REDUCED to one, each is to be multiplied by its own gradient besides.
    """
    factor = tl.full([], scale, COMPUTE)
    if REDUCED and grad_output is not None:
        factor *= tl.load(grad_output).to(COMPUTE)
    if REDUCED and avg_factor is not None:
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
def finish_kernel(
    sums, counts, avg_factor, output, divisor, scale: tl.float64, eps: tl.float64, programs, PDL: tl.constexpr
):  # fmt: skip
    """`_finish`, in a launch of its own."""
    wait_for_previous_kernel(PDL)
    _finish(sums, counts, avg_factor, output, divisor, scale, eps, programs)


@triton.jit
def finish_if_last(sums, counter, avg_factor, output, scale, eps):
    """`_finish`, in the program that ends last: each calls this when its sum is stored."""
    programs = tl.num_programs(0)
    tl.debug_barrier()  # in case that another thread counts than has stored the sum
    if tl.atomic_add(counter, 1, sem="acq_rel") == programs - 1:
        tl.store(counter, 0)
        _finish(sums, None, avg_factor, output, None, scale, eps, programs)
