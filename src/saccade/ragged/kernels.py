"""Triton kernels that move entries of ragged batches by their indices.

Entries are moved as integers of the size of their elements, so that one kernel serves all dtypes; the sum of entries
alone looks at numbers. Each result is written whole by the one launch that makes it, by programs that own what they
write: a program of ``sum_kernel`` or ``put_kernel`` has some of a sample's entries, and looks through the sample's
indices for those that point to them. So nothing is cleared beforehand, nothing is sorted, there are no atomics, and
results do not change from run to run. That looks at each index once for every few entries, which pays up to a size.

Of a pair of indices, (S, M) ``index`` and (S, M) ``paired``, a slot is used only if both are in range. Steps are from
one element of a tensor to the next along each axis.

Traffic, for S samples of M indices into W entries: the entries that are pointed to, once; the result, once; the
indices, which stay in the cache, once for each tile.
"""

import triton
import triton.language as tl

from saccade.operator.launch import LaunchedKernel, wait_for_previous_kernel


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
    index,  # (S, M)
    paired,  # (S, M) or None
    sizes,  # (S,)
    slots,
    width,
    width_tiles,
    paired_width,
    index_steps,
    paired_steps,
    sizes_steps,
    BLOCK_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The sample of this program, its (BLOCK_W,) entries, and the last slot that points to each; -1 if none does."""
    program = tl.program_id(0)
    sample = (program // width_tiles).to(tl.int64)
    first = (program % width_tiles) * BLOCK_W
    size = tl.minimum(tl.load(sizes + sample * sizes_steps[0]).to(tl.int64), slots).to(tl.int32)
    entry = tl.arange(0, BLOCK_W)
    last = tl.full([BLOCK_W], -1, tl.int32)
    for start in range(0, size, BLOCK_M):
        slot = start + tl.arange(0, BLOCK_M)
        at = index + sample * index_steps[0] + slot.to(tl.int64) * index_steps[1]
        place, chosen = _place(at, slot < size, width)
        if paired is not None:
            at = paired + sample * paired_steps[0] + slot.to(tl.int64) * paired_steps[1]
            chosen = _place(at, chosen, paired_width)[1]
        place -= first
        place = tl.where(chosen & (place >= 0) & (place < BLOCK_W), place, -1).to(tl.int32)
        hits = place[None, :] == entry[:, None]
        last = tl.maximum(last, tl.max(tl.where(hits, slot[None, :], -1), 1))
    return sample, first.to(tl.int64) + entry, last


@triton.jit
def _slots_of_program(
    total, slots, inner_tiles, POSITION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """(BLOCK_M,) positions among all slots, which exist, their samples, slots; and the (BLOCK_D,) words of each."""
    program = tl.program_id(0)
    position = (program // inner_tiles).to(POSITION) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = (program % inner_tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    return position, position < total, (position // slots).to(tl.int64), position % slots, d


@LaunchedKernel
@triton.jit
def gather_kernel(
    data,  # (S, W, D)
    index,  # (S, M)
    sizes,  # (S,)
    paired,  # (S, M) or None
    output,  # (S, M, D) contiguous
    total,  # S * M
    slots,
    width,
    paired_width,
    inner,
    inner_tiles,
    data_steps,
    index_steps,
    paired_steps,
    sizes_steps,
    filler,  # the even and the odd words of what unused slots hold
    WORD: tl.constexpr,
    LAST: tl.constexpr,  # of the slots that point to one entry, only the last is used
    POSITION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_LATER: tl.constexpr,
    PDL: tl.constexpr,
):
    """Entries by index, the filler in slots that are not used."""
    wait_for_previous_kernel(PDL)
    data, output = _to_words(data, WORD), _to_words(output, WORD)
    position, exists, sample, slot, d = _slots_of_program(total, slots, inner_tiles, POSITION, BLOCK_M, BLOCK_D)
    size = tl.load(sizes + sample * sizes_steps[0], mask=exists, other=0).to(tl.int64)
    place, used = _place(index + sample * index_steps[0] + slot * index_steps[1], exists & (slot < size), width)
    if paired is not None:
        used = _place(paired + sample * paired_steps[0] + slot * paired_steps[1], used, paired_width)[1]
    if LAST:
        is_repeated = tl.zeros([BLOCK_M], tl.int32)
        for start in range(0, slots, BLOCK_LATER):
            later = start + tl.arange(0, BLOCK_LATER).to(tl.int64)[None, :]
            asked = used[:, None] & (later > slot[:, None]) & (later < size[:, None]) & (later < slots)
            row = index + sample[:, None] * index_steps[0]
            later_place, found = _place(row + later * index_steps[1], asked, width)
            found &= later_place == place[:, None]
            if paired is not None:
                row = paired + sample[:, None] * paired_steps[0]
                found = _place(row + later * paired_steps[1], found, paired_width)[1]
            is_repeated |= tl.max(found.to(tl.int32), 1)
        used &= is_repeated == 0
    row = data + sample * data_steps[0] + tl.where(used, place, 0) * data_steps[1]
    at = row[:, None] + d[None, :].to(tl.int64) * data_steps[2]
    words = tl.load(at, mask=used[:, None] & (d < inner)[None, :])
    words = tl.where(used[:, None], words, _fillers(filler, d, WORD)[None, :])
    at = output + position.to(tl.int64)[:, None] * inner + d[None, :]
    tl.store(at, words, mask=exists[:, None] & (d < inner)[None, :])


@LaunchedKernel
@triton.jit
def sum_kernel(
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
    sizes_steps,
    COMPUTE: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PDL: tl.constexpr,
):
    """Of each place the sum of the entries that are meant for it, in the order of the slots."""
    wait_for_previous_kernel(PDL)
    program = tl.program_id(0)
    tile = program // inner_tiles
    sample = (tile // width_tiles).to(tl.int64)
    first = (tile % width_tiles) * BLOCK_W
    entry = tl.arange(0, BLOCK_W)
    d = (program % inner_tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    size = tl.minimum(tl.load(sizes + sample * sizes_steps[0]).to(tl.int64), slots).to(tl.int32)
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
def put_kernel(
    entries,  # (S, M, D), or (S, paired_width, D) with BY_PAIR
    data,  # (S, W, D) or None: then what lies around the entries is the filler
    index,  # (S, M)
    sizes,  # (S,)
    paired,  # (S, M) or None
    output,  # (S, W, D) contiguous
    slots,
    width,
    width_tiles,
    paired_width,
    inner,
    entry_steps,
    data_steps,
    index_steps,
    paired_steps,
    sizes_steps,
    filler,  # its even and its odd words
    BY_PAIR: tl.constexpr,  # the paired index says which entry to write, rather than the slot
    WORD: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PDL: tl.constexpr,
):
    """A copy of data, or of one number everywhere, with entries written to it; of several to one place the last."""
    wait_for_previous_kernel(PDL)
    entries, output = _to_words(entries, WORD), _to_words(output, WORD)
    sample, position, last = _last_slots(
        index, paired, sizes, slots, width, width_tiles, paired_width, index_steps, paired_steps, sizes_steps,
        BLOCK_W, BLOCK_M,
    )  # fmt: skip
    written = (last >= 0) & (position < width)
    kept = (last < 0) & (position < width)
    if data is not None:
        old = _to_words(data, WORD) + sample * data_steps[0] + position * data_steps[1]
    which = tl.where(written, last, 0).to(tl.int64)
    if BY_PAIR:
        which = _place(paired + sample * paired_steps[0] + which * paired_steps[1], written, paired_width)[0]
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
def mark_kernel(
    index,  # (S, M)
    sizes,  # (S,)
    output,  # (S, W) bool
    slots,
    width,
    width_tiles,
    index_steps,
    sizes_steps,
    BLOCK_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PDL: tl.constexpr,
):
    """True where an index points to."""
    wait_for_previous_kernel(PDL)
    sample, position, last = _last_slots(
        index, None, sizes, slots, width, width_tiles, 0, index_steps, None, sizes_steps, BLOCK_W, BLOCK_M
    )
    tl.store(output + sample * width + position, last >= 0, mask=position < width)


@LaunchedKernel
@triton.jit
def pad_kernel(
    values,  # (T, D)
    begins,  # (S,) int64
    sizes,  # (S,) int64
    output,  # (S, N, D) contiguous
    total,  # S * N
    slots,  # N
    length,  # T
    inner,
    inner_tiles,
    value_steps,  # of (1, T, D)
    begins_steps,
    sizes_steps,
    WORD: tl.constexpr,
    POSITION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """Samples that lie end to end, each from where it begins on, padded with 0."""
    wait_for_previous_kernel(PDL)
    values, output = _to_words(values, WORD), _to_words(output, WORD)
    position, exists, sample, slot, d = _slots_of_program(total, slots, inner_tiles, POSITION, BLOCK_N, BLOCK_D)
    size = tl.load(sizes + sample * sizes_steps[0], mask=exists, other=0)
    row = tl.load(begins + sample * begins_steps[0], mask=exists, other=0) + slot
    filled = exists & (slot < size) & (row >= 0) & (row < length)
    at = values + row[:, None] * value_steps[1] + d[None, :].to(tl.int64) * value_steps[2]
    words = tl.load(at, mask=filled[:, None] & (d < inner)[None, :], other=0)
    at = output + position.to(tl.int64)[:, None] * inner + d[None, :]
    tl.store(at, words, mask=exists[:, None] & (d < inner)[None, :])
