"""Triton kernels that move entries of ragged batches by their indices.

Entries are moved as integers of the size of their elements, so that one kernel serves all dtypes; the sum of entries
alone looks at numbers. Each result is written whole by the one launch that makes it, by programs that own what they
write: a program of ``_sum_kernel`` or ``_put_kernel`` has some of a sample's entries, and looks through the sample's
indices for those that point to them. So nothing is cleared beforehand, nothing is sorted, there are no atomics, and
results do not change from run to run. That looks at each index once for every few entries; callers ask with
``sums_fast`` and the like whether it pays.

Traffic, for S samples of M indices into W entries: the entries that are pointed to, once; the result, once; the
indices, which stay in the cache, once for each tile.
"""

from collections.abc import Callable
from functools import lru_cache
from math import inf, prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernel_launch import (
    TRITON_DTYPE,
    LaunchedKernel,
    PreparedLaunch,
    overlapping,
    wait_for_kernel_before,
)

_KEPT_LAUNCHES = 256  # prepared: as many shapes as a training run with batches of changing widths may mix
_WORD = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_TRITON_WORD = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64, 16: tl.int64}
# Triton has pointers to these; the kernels themselves make of them pointers to words, without the cost of a view.
_HAVE_POINTERS = frozenset(
    (
        *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
    )
)
_MOST_COMPARISONS = 2**30  # of an index with an entry or another index: some 100 us
_MOST_SLOTS_SUMMED = 2**13  # one program adds up all of them if they point to one entry


@triton.jit
def _to_words(pointer, WORD: tl.constexpr):
    return pointer.to(tl.pointer_type(WORD), bitcast=True)


@triton.jit
def _fillers(filler, d, WORD: tl.constexpr):
    return tl.where(d % 2 == 0, filler[0], filler[1]).to(WORD)


@triton.jit
def _place(at, chosen, width):
    """Indices loaded from ``at``, counted from the front, and which of the chosen ones are in range."""
    index = tl.load(at, mask=chosen, other=0).to(tl.int64)
    place = tl.where(index < 0, index + width, index)
    return place, chosen & (place >= 0) & (place < width)


@triton.jit
def _last_slots(
    index, other, size, index_step, other_step, width, other_width, first, BLOCK_W: tl.constexpr, BLOCK_M: tl.constexpr
):
    """(BLOCK_W,) of the entries from ``first`` on, the last slot that points to each; -1 if none does."""
    entry = tl.arange(0, BLOCK_W)
    last = tl.full([BLOCK_W], -1, tl.int32)
    for start in range(0, size, BLOCK_M):
        slot = start + tl.arange(0, BLOCK_M)
        place, chosen = _place(index + slot.to(tl.int64) * index_step, slot < size, width)
        if other is not None:
            chosen = _place(other + slot.to(tl.int64) * other_step, chosen, other_width)[1]
        place -= first
        place = tl.where(chosen & (place >= 0) & (place < BLOCK_W), place, -1).to(tl.int32)
        hits = place[None, :] == entry[:, None]
        last = tl.maximum(last, tl.max(tl.where(hits, slot[None, :], -1), 1))
    return last


@LaunchedKernel
@triton.jit
def _gather_kernel(
    data,  # (S, W, D)
    index,  # (S, M)
    sizes,  # (S,)
    other,  # (S, M) or None: a slot is used only if this index is in range, too
    output,  # (S, M, D) contiguous
    total,  # S * M
    slots,
    width,
    other_width,
    inner,
    inner_tiles,
    data_steps,
    index_steps,
    other_steps,
    sizes_step,
    filler,  # the even and the odd words of what unused slots hold
    WORD: tl.constexpr,
    LAST: tl.constexpr,  # of the slots that point to one entry, only the last is used
    POSITION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_LATER: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait_for_kernel_before(OVERLAP)
    data, output = _to_words(data, WORD), _to_words(output, WORD)
    program = tl.program_id(0)
    position = (program // inner_tiles).to(POSITION) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = position < total
    sample, slot = (position // slots).to(tl.int64), position % slots
    size = tl.load(sizes + sample * sizes_step, mask=exists, other=0).to(tl.int64)
    place, used = _place(index + sample * index_steps[0] + slot * index_steps[1], exists & (slot < size), width)
    if other is not None:
        used = _place(other + sample * other_steps[0] + slot * other_steps[1], used, other_width)[1]
    if LAST:
        is_repeated = tl.zeros([BLOCK_M], tl.int32)
        for start in range(0, slots, BLOCK_LATER):
            later = start + tl.arange(0, BLOCK_LATER).to(tl.int64)[None, :]
            asked = used[:, None] & (later > slot[:, None]) & (later < size[:, None]) & (later < slots)
            row = index + sample[:, None] * index_steps[0]
            later_place, found = _place(row + later * index_steps[1], asked, width)
            found &= later_place == place[:, None]
            if other is not None:
                row = other + sample[:, None] * other_steps[0]
                found = _place(row + later * other_steps[1], found, other_width)[1]
            is_repeated |= tl.max(found.to(tl.int32), 1)
        used &= is_repeated == 0
    d = (program % inner_tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = data + sample * data_steps[0] + tl.where(used, place, 0) * data_steps[1]
    at = row[:, None] + d[None, :].to(tl.int64) * data_steps[2]
    words = tl.load(at, mask=used[:, None] & (d < inner)[None, :])
    words = tl.where(used[:, None], words, _fillers(filler, d, WORD)[None, :])
    at = output + position.to(tl.int64)[:, None] * inner + d[None, :]
    tl.store(at, words, mask=exists[:, None] & (d < inner)[None, :])


@LaunchedKernel
@triton.jit
def _sum_kernel(
    entries,  # (S, M, D) numbers
    index,  # (S, M)
    sizes,  # (S,)
    output,  # (S, W, D) contiguous
    slots,
    width,
    width_tiles,
    inner,
    inner_tiles,
    entry_steps,
    index_steps,
    sizes_step,
    COMPUTE: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait_for_kernel_before(OVERLAP)
    program = tl.program_id(0)
    tile = program // inner_tiles
    sample = (tile // width_tiles).to(tl.int64)
    first = (tile % width_tiles) * BLOCK_W
    entry = tl.arange(0, BLOCK_W)
    d = (program % inner_tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    size = tl.minimum(tl.load(sizes + sample * sizes_step).to(tl.int64), slots).to(tl.int32)
    row = entries + sample * entry_steps[0] + d.to(tl.int64) * entry_steps[2]
    sums = tl.zeros([BLOCK_W, BLOCK_D], COMPUTE)
    lane = tl.arange(0, BLOCK_M)
    none = BLOCK_M * BLOCK_W
    for start in range(0, size, BLOCK_M):
        slot = start + lane
        at = index + sample * index_steps[0] + slot.to(tl.int64) * index_steps[1]
        place, chosen = _place(at, slot < size, width)
        place -= first
        chosen &= (place >= 0) & (place < BLOCK_W)
        # In the order of the slots: the least of these numbers says slot and entry.
        waiting = tl.where(chosen, lane * BLOCK_W + place.to(tl.int32), none)
        for _ in range(0, tl.sum(chosen.to(tl.int32), 0)):
            now = tl.min(waiting, 0)
            waiting = tl.where(waiting == now, none, waiting)
            addend = row + (start + now // BLOCK_W).to(tl.int64) * entry_steps[1]
            added = tl.load(addend, mask=d < inner, other=0).to(COMPUTE)
            sums += tl.where((entry == now % BLOCK_W)[:, None], added[None, :], 0)
    position = first.to(tl.int64) + entry
    at = output + (sample * width + position)[:, None] * inner + d[None, :]
    tl.store(at, sums.to(output.dtype.element_ty), mask=(position < width)[:, None] & (d < inner)[None, :])


@LaunchedKernel
@triton.jit
def _put_kernel(
    entries,  # (S, M, D), or (S, other_width, D) with FROM_OTHER
    data,  # (S, W, D) or None: then what lies around the entries is the filler
    index,  # (S, M)
    sizes,  # (S,)
    other,  # (S, M) or None: a slot is used only if this index is in range, too
    output,  # (S, W, D) contiguous
    slots,
    width,
    width_tiles,
    other_width,
    inner,
    entry_steps,
    data_steps,
    index_steps,
    other_steps,
    sizes_step,
    filler,  # its even and its odd words
    FROM_OTHER: tl.constexpr,  # the other index says which entry to write, rather than the slot
    WORD: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait_for_kernel_before(OVERLAP)
    entries, output = _to_words(entries, WORD), _to_words(output, WORD)
    program = tl.program_id(0)
    sample = (program // width_tiles).to(tl.int64)
    first = (program % width_tiles) * BLOCK_W
    size = tl.minimum(tl.load(sizes + sample * sizes_step).to(tl.int64), slots).to(tl.int32)
    of_sample = index + sample * index_steps[0]
    of_other = other
    if other is not None:
        of_other = other + sample * other_steps[0]
    last = _last_slots(
        of_sample, of_other, size, index_steps[1], other_steps[1], width, other_width, first, BLOCK_W, BLOCK_M
    )
    position = first.to(tl.int64) + tl.arange(0, BLOCK_W)
    written = (last >= 0) & (position < width)
    kept = (last < 0) & (position < width)
    if data is not None:
        old = _to_words(data, WORD) + sample * data_steps[0] + position * data_steps[1]
    which = tl.where(written, last, 0).to(tl.int64)
    if FROM_OTHER:
        which = _place(of_other + which * other_steps[1], written, other_width)[0]
    new = entries + sample * entry_steps[0] + which * entry_steps[1]
    to = output + (sample * width + position) * inner
    for start in range(0, inner, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D).to(tl.int64)
        exists = (d < inner)[None, :]
        if data is None:
            of_data = _fillers(filler, d, WORD)[None, :]
        else:
            of_data = tl.load(old[:, None] + d[None, :] * data_steps[2], mask=kept[:, None] & exists)
        of_entries = tl.load(new[:, None] + d[None, :] * entry_steps[2], mask=written[:, None] & exists)
        words = tl.where(written[:, None], of_entries, of_data)
        tl.store(to[:, None] + d[None, :], words, mask=(position < width)[:, None] & exists)


@LaunchedKernel
@triton.jit
def _mark_kernel(
    index,  # (S, M)
    sizes,  # (S,)
    output,  # (S, W) bool
    slots,
    width,
    width_tiles,
    index_steps,
    sizes_step,
    BLOCK_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait_for_kernel_before(OVERLAP)
    program = tl.program_id(0)
    sample = (program // width_tiles).to(tl.int64)
    first = (program % width_tiles) * BLOCK_W
    size = tl.minimum(tl.load(sizes + sample * sizes_step).to(tl.int64), slots).to(tl.int32)
    of_sample = index + sample * index_steps[0]
    last = _last_slots(of_sample, None, size, index_steps[1], 0, width, 0, first, BLOCK_W, BLOCK_M)
    position = first.to(tl.int64) + tl.arange(0, BLOCK_W)
    tl.store(output + sample * width + position, last >= 0, mask=position < width)


@LaunchedKernel
@triton.jit
def _pad_kernel(
    values,  # (T, D)
    begins,  # (S,) int64
    sizes,  # (S,) int64
    output,  # (S, N, D) contiguous
    total,  # S * N
    slots,  # N
    length,  # T
    inner,
    inner_tiles,
    value_steps,
    begins_step,
    sizes_step,
    WORD: tl.constexpr,
    POSITION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait_for_kernel_before(OVERLAP)
    values, output = _to_words(values, WORD), _to_words(output, WORD)
    program = tl.program_id(0)
    position = (program // inner_tiles).to(POSITION) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = position < total
    sample, slot = (position // slots).to(tl.int64), position % slots
    size = tl.load(sizes + sample * sizes_step, mask=exists, other=0)
    row = tl.load(begins + sample * begins_step, mask=exists, other=0) + slot
    filled = exists & (slot < size) & (row >= 0) & (row < length)
    d = (program % inner_tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    at = values + row[:, None] * value_steps[0] + d[None, :].to(tl.int64) * value_steps[1]
    words = tl.load(at, mask=filled[:, None] & (d < inner)[None, :], other=0)
    at = output + position.to(tl.int64)[:, None] * inner + d[None, :]
    tl.store(at, words, mask=exists[:, None] & (d < inner)[None, :])


def _tile(rows: int, inner: int) -> tuple[int, int]:
    """How many entries and elements of each a program moves: few where there are few, so that all of a GPU works."""
    block_d = min(triton.next_power_of_2(inner), 256)
    return max((512 if rows * inner < 2**20 else 2048) // block_d, 1), block_d


def _position_dtype(total: int, block: int) -> tl.dtype:
    return tl.int32 if total < 2**31 - block else tl.int64  # positions run to the end of the last tile


@lru_cache(_KEPT_LAUNCHES)
def _prepare_gather(
    shape: tuple[int, ...],  # S, W, *D
    data_steps: tuple[int, ...],
    index_shape: tuple[int, int],
    index_steps: tuple[int, int],
    other_steps: tuple[int, int],
    other_width: int,
    sizes_steps: tuple[int],
    filler: tuple[int, int],
    last: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[PreparedLaunch, tuple[int, ...]]:
    """The launch, and the shape of its result."""
    _, width, *trailing = shape
    samples, slots = index_shape
    inner = _words(trailing, dtype)
    block_m, block_d = _tile(samples * slots, inner)
    if last:
        block_m = min(block_m, 64)
    inner_tiles = triton.cdiv(inner, block_d)
    launch = _gather_kernel.prepare(
        (triton.cdiv(samples * slots, block_m) * inner_tiles,),
        samples * slots,
        slots,
        width,
        other_width,
        inner,
        inner_tiles,
        _of_three_axes(data_steps),
        index_steps,
        other_steps,
        *sizes_steps,
        filler,
        WORD=_TRITON_WORD[dtype.itemsize],
        LAST=last,
        POSITION=_position_dtype(samples * slots, block_m),
        BLOCK_M=block_m,
        BLOCK_D=block_d,
        BLOCK_LATER=max(64 // block_m, 16),
        num_warps=4,
        **overlapping(device),
    )
    return launch, (samples, slots, *trailing)


def gather(
    data: Tensor,  # (S, W, *D)
    index: Tensor,  # (S, M) int32 or int64
    sizes: Tensor,  # (S,) integer
    filler: Any,
    other: Tensor | None = None,  # (S, M) in the dtype of index
    other_width: int = 0,
    last: bool = False,
) -> Tensor:  # (S, M, *D), not empty
    """Entries by index, a number where there is none.

    With ``other``, a slot is used only if that index is in range, too. With ``last``, of the slots that point to one
    entry only the last is used.
    """
    return prepare_gather(data, index, sizes, filler, other, other_width, last)(data, index, sizes, filler, other)


def prepare_gather(
    data: Tensor,
    index: Tensor,
    sizes: Tensor,
    filler: Any,
    other: Tensor | None = None,
    other_width: int = 0,
    last: bool = False,
) -> Callable[..., Tensor]:
    """Make ``gather`` for calls with these arguments, but for the values of the tensors."""
    launch, shape = _prepare_gather(
        data.shape,
        _as_words(data).stride(),
        index.shape,
        index.stride(),
        (0, 0) if other is None else other.stride(),
        other_width,
        _as_signed(sizes).stride(),
        _words_of(filler, str(filler), data.dtype),
        last,
        data.dtype,
        data.device,
    )

    def prepared(data: Tensor, index: Tensor, sizes: Tensor, _: Any, other: Tensor | None = None) -> Tensor:
        output = data.new_empty(shape)
        launch((_as_words(data), index, _as_signed(sizes), other, _as_words(output)))
        return output

    return prepared


def takes_fast(index: Tensor) -> bool:
    """Whether ``gather`` with ``last`` is faster than sorting."""
    return index.numel() * index.shape[1] <= _MOST_COMPARISONS


@lru_cache(_KEPT_LAUNCHES)
def _prepare_sum(
    shape: tuple[int, ...],  # S, M, *D
    entry_steps: tuple[int, ...],
    index_steps: tuple[int, int],
    sizes_steps: tuple[int],
    width: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[PreparedLaunch, tuple[int, ...]]:
    """The launch, and the shape of its result."""
    samples, slots, *trailing = shape
    inner = _numbers(trailing, dtype)
    block_w, block_d = _sum_tile(inner)
    width_tiles, inner_tiles = triton.cdiv(width, block_w), triton.cdiv(inner, block_d)
    launch = _sum_kernel.prepare(
        (samples * width_tiles * inner_tiles,),
        slots,
        width,
        width_tiles,
        inner,
        inner_tiles,
        _of_three_axes(entry_steps),
        index_steps,
        *sizes_steps,
        COMPUTE=TRITON_DTYPE[dtype.to_real()],
        BLOCK_W=block_w,
        BLOCK_D=block_d,
        BLOCK_M=min(max(triton.next_power_of_2(slots), 16), 128),
        num_warps=1,
        **overlapping(device),
    )
    return launch, (samples, width, *trailing)


def _sum_tile(inner: int) -> tuple[int, int]:
    block_d = min(triton.next_power_of_2(inner), 128)
    return 512 // block_d, block_d


def prepare_sum(
    entries: Tensor,  # (S, M, *D) float32, float64, complex64 or complex128
    index: Tensor,  # (S, M) int32 or int64
    sizes: Tensor,  # (S,) integer
    width: int,
) -> Callable[..., Tensor]:  # (S, W, *D), not empty
    """Make a sum for calls with these arguments, but for the values of the tensors.

    Of each entry the sum of all that is meant for it, in the order of the slots.
    """
    launch, shape = _prepare_sum(
        entries.shape,
        _as_numbers(entries).stride(),
        index.stride(),
        _as_signed(sizes).stride(),
        width,
        entries.dtype,
        entries.device,
    )

    def prepared(entries: Tensor, index: Tensor, sizes: Tensor, _: int) -> Tensor:
        output = entries.new_empty(shape)
        launch((_as_numbers(entries), index, _as_signed(sizes), _as_numbers(output)))
        return output

    return prepared


def sums_fast(entries: Tensor, width: int) -> bool:
    """Whether there is a sum in this dtype, and it is faster than sorting.

    Half precision has none: what PyTorch rounds when, and that the sum must be the same, is left to PyTorch.
    """
    return _comparisons_of_sum(entries.shape, entries.dtype, width) <= _MOST_COMPARISONS


@lru_cache(_KEPT_LAUNCHES)
def _comparisons_of_sum(shape: tuple[int, ...], dtype: torch.dtype, width: int) -> float:
    samples, slots, *trailing = shape
    has_sum = dtype in (torch.float32, torch.float64, torch.complex64, torch.complex128)
    if not has_sum or not 0 < slots <= _MOST_SLOTS_SUMMED:
        return inf
    inner = _numbers(trailing, dtype)
    block_w, block_d = _sum_tile(inner)
    return samples * triton.cdiv(width, block_w) * triton.cdiv(inner, block_d) * slots


@lru_cache(_KEPT_LAUNCHES)
def _prepare_put(
    shape: tuple[int, ...],  # S, anything, *D
    entry_steps: tuple[int, ...],
    data_steps: tuple[int, ...],
    slots: int,
    index_steps: tuple[int, int],
    other_steps: tuple[int, int],
    other_width: int,
    sizes_steps: tuple[int],
    width: int,
    filler: tuple[int, int],
    from_other: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[PreparedLaunch, tuple[int, ...]]:
    """The launch, and the shape of its result."""
    samples, _, *trailing = shape
    inner = _words(trailing, dtype)
    block_d = min(triton.next_power_of_2(inner), 64)
    block_w = min(512 // block_d, 128)
    width_tiles = triton.cdiv(width, block_w)
    launch = _put_kernel.prepare(
        (samples * width_tiles,),
        slots,
        width,
        width_tiles,
        other_width,
        inner,
        _of_three_axes(entry_steps),
        _of_three_axes(data_steps),
        index_steps,
        other_steps,
        *sizes_steps,
        filler,
        FROM_OTHER=from_other,
        WORD=_TRITON_WORD[dtype.itemsize],
        BLOCK_W=block_w,
        BLOCK_D=block_d,
        BLOCK_M=32,
        num_warps=4,
        **overlapping(device),
    )
    return launch, (samples, width, *trailing)


def put(
    data: Tensor,  # (S, W, *D)
    entries: Tensor,  # (S, M, *D) in the dtype of data
    index: Tensor,  # (S, M) int32 or int64
    sizes: Tensor,  # (S,) integer
    other: Tensor | None,  # (S, M) in the dtype of index
    other_width: int,
) -> Tensor:  # (S, W, *D), not empty
    """A copy of ``data`` with entries written to it, of several to one place the last.

    With ``other``, a slot is used only if that index is in range, too.
    """
    return _put(entries, _as_words(data), index, sizes, other, other_width, data.shape[1])


def transfer(
    data: Tensor,  # (S, W, *D)
    source: Tensor,  # (S, V, *D) in the dtype of data
    index: Tensor,  # (S, M) int32 or int64
    sizes: Tensor,  # (S,) integer
    source_index: Tensor,  # (S, M) in the dtype of index
) -> Tensor:  # (S, W, *D), not empty
    """``put`` of those entries of ``source`` that the other index points to."""
    data = _as_words(data)
    return _put(source, data, index, sizes, source_index, source.shape[1], data.shape[1], from_other=True)


def spread(
    entries: Tensor,  # (S, M, *D), not empty
    index: Tensor,  # (S, M) int32 or int64
    sizes: Tensor,  # (S,) integer
    other: Tensor | None,  # (S, M) in the dtype of index
    other_width: int,
    width: int,
    filler: Any,
) -> Tensor:  # (S, W, *D), not empty
    """``put`` into data that are one number everywhere."""
    words = _words_of(filler, str(filler), entries.dtype)
    return _put(entries, None, index, sizes, other, other_width, width, words)


def _put(
    entries: Tensor,
    data: Tensor | None,
    index: Tensor,
    sizes: Tensor,
    other: Tensor | None,
    other_width: int,
    width: int,
    filler: tuple[int, int] = (0, 0),
    from_other: bool = False,
) -> Tensor:
    words, sizes = _as_words(entries), _as_signed(sizes)
    launch, shape = _prepare_put(
        entries.shape,
        words.stride(),
        (0, 0, 0) if data is None else data.stride(),
        index.shape[1],
        index.stride(),
        (0, 0) if other is None else other.stride(),
        other_width,
        sizes.stride(),
        width,
        filler,
        from_other,
        entries.dtype,
        entries.device,
    )
    output = entries.new_empty(shape)
    launch((words, data, index, sizes, other, _as_words(output)))
    return output


def puts_fast(index: Tensor, width: int) -> bool:
    """Whether ``put`` and ``mark`` are faster than PyTorch's operators."""
    return index.numel() * width <= _MOST_COMPARISONS


@lru_cache(_KEPT_LAUNCHES)
def _prepare_mark(
    index_shape: tuple[int, int],
    index_steps: tuple[int, int],
    sizes_steps: tuple[int],
    width: int,
    device: torch.device,
) -> PreparedLaunch:
    samples, slots = index_shape
    width_tiles = triton.cdiv(width, 128)
    return _mark_kernel.prepare(
        (samples * width_tiles,),
        slots,
        width,
        width_tiles,
        index_steps,
        *sizes_steps,
        BLOCK_W=128,
        BLOCK_M=32,
        num_warps=4,
        **overlapping(device),
    )


def mark(
    index: Tensor,  # (S, M) int32 or int64
    sizes: Tensor,  # (S,) integer
    width: int,
) -> Tensor:  # (S, W) bool, not empty
    """True where an index points to."""
    sizes, shape = _as_signed(sizes), index.shape
    launch = _prepare_mark(shape, index.stride(), sizes.stride(), width, index.device)
    output = index.new_empty((shape[0], width), dtype=torch.bool)
    launch((index, sizes, output))
    return output


@lru_cache(_KEPT_LAUNCHES)
def _prepare_pad(
    shape: tuple[int, ...],  # T, *D
    value_steps: tuple[int, ...],
    begins_steps: tuple[int],
    samples: int,
    sizes_steps: tuple[int],
    slots: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[PreparedLaunch, tuple[int, ...]]:
    """The launch, and the shape of its result."""
    length, *trailing = shape
    inner = _words(trailing, dtype)
    block_n, block_d = _tile(samples * slots, inner)
    inner_tiles = triton.cdiv(inner, block_d)
    launch = _pad_kernel.prepare(
        (triton.cdiv(samples * slots, block_n) * inner_tiles,),
        samples * slots,
        slots,
        length,
        inner,
        inner_tiles,
        _of_three_axes((0, *value_steps))[1:],
        *begins_steps,
        *sizes_steps,
        WORD=_TRITON_WORD[dtype.itemsize],
        POSITION=_position_dtype(samples * slots, block_n),
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        num_warps=4,
        **overlapping(device),
    )
    return launch, (samples, slots, *trailing)


def pad(
    values: Tensor,  # (T, *D)
    begins: Tensor,  # (S,) int64
    sizes: Tensor,  # (S,) int64
    slots: int,
) -> Tensor:  # (S, N, *D), not empty
    """Samples that lie end to end, each from where it begins on, padded with 0."""
    words = _as_words(values, 1)
    launch, shape = _prepare_pad(
        values.shape,
        words.stride(),
        begins.stride(),
        sizes.shape[0],
        sizes.stride(),
        slots,
        values.dtype,
        values.device,
    )
    output = values.new_empty(shape)
    launch((words, begins, sizes, _as_words(output)))
    return output


def _as_words(
    tensor: Tensor,  # (S, W, *D)
    before: int = 2,  # how many axes lie before *D
) -> Tensor:
    """The tensor, a view of it, or a copy if need be, in a dtype that kernels take, with *D as one axis in memory."""
    if tensor.dtype not in _HAVE_POINTERS:
        if tensor.dtype.itemsize == 16:
            tensor = torch.view_as_real(tensor)
        tensor = tensor.view(_WORD[tensor.dtype.itemsize])
    return _with_one_axis(tensor, before)


def _as_numbers(
    tensor: Tensor,  # (S, W, *D)
) -> Tensor:
    return _with_one_axis(torch.view_as_real(tensor) if tensor.is_complex() else tensor, 2)


def _with_one_axis(tensor: Tensor, before: int) -> Tensor:
    return tensor if tensor.dim() <= before + 1 or tensor.is_contiguous() else tensor.flatten(before)


def _of_three_axes(steps: tuple[int, ...]) -> tuple[int, ...]:
    """Of (S, W, *D), which is contiguous if *D has several axes, as (S, W, D)."""
    return steps if len(steps) == 3 else (*steps[:2], 1)


def _words(trailing: list[int], dtype: torch.dtype) -> int:
    """How many words an entry has."""
    return prod(trailing) * (2 if dtype.itemsize == 16 else 1)


def _numbers(trailing: list[int], dtype: torch.dtype) -> int:
    """How many real numbers an entry has."""
    return prod(trailing) * (2 if dtype.is_complex else 1)


def _as_signed(sizes: Tensor) -> Tensor:
    """Sizes in a dtype that the kernels load."""
    return sizes if sizes.dtype in (torch.int64, torch.int32) else sizes.long()


@lru_cache(_KEPT_LAUNCHES)
def _words_of(value: Any, text: str, dtype: torch.dtype) -> tuple[int, int]:
    """A number as an element, in two words or the same one twice; ``text`` tells 0.0 from -0.0."""
    element = torch.full((1, 1), value, dtype=dtype, device="cpu")
    if dtype.itemsize == 16:
        element = torch.view_as_real(element)
    words = element.view(_WORD[element.dtype.itemsize]).flatten().tolist()
    return words[0], words[-1]
