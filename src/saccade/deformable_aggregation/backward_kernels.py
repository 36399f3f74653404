"""Triton kernels of the gradients of deformable aggregation.

The forward reads rows of features for each point. The backward turns this round: to each row of features come the
points that touch it. So every row is read once and its gradient written once, in the dtype that it has, without float
atomics, without a float32 copy, and with the same bits in every run. Two neighbouring rows are touched together: a
*record* is the upper or the lower two corners of a point on a level, filed under the first row of the two.

1. `count_kernel`, `scan_kernel`, `place_kernel`: file the records by row. Integer atomics deal out the places, so
   `order_and_split_kernel` then sorts those of each row by their number: a record's place is how many of its row come
   before it.
2. The same kernel cuts rows and records into windows of equal work, if need be within the records of a row.
3. `gather_kernel`, one warp to a window: for each record read the gradient of its anchor's output, add to the
   gradients of the two rows, and take the products with the two rows of features, group by group. Of these products it
   keeps per record what the location and the weights need.
4. `join_kernel` sums the few rows that several windows share; `combine_kernel` puts the two records of each point and
   level together to the gradients of locations and weights, zeros where nothing is visible.

Scratch memory is bounded by working on some samples of the batch at a time (``launch._samples_at_once``).

What bounds it (ncu, H200, 8 samples of 900 anchors x 13 points, 256 channels, float32: 578 us in two halves, floor
267 us): of each half 207 us are the gathering, in which the second-level cache is busy by 68 %, main memory by 55 % and
the instruction issue by 50 %; 260 instructions a record, a quarter of them for rows without records. 27 us are the
combining, bound by instructions; the launches besides these take 4 to 14 us each, most of it latency.

What else was tried on that workload, from the slowest to the fastest:
- Strips of 4 rows to a warp, 4 records at a time: 1284 us; 2 at a time: 1065 us. Hardly any row has more than one
  record on the finest level, some have hundreds on the coarsest: the last strips to finish are waited for.
- One record at a time, whole runs of 32 or 64 records of one row summed ahead by a kernel of their own: 921 us. Windows
  of equal work made of whole rows in place of strips, and the next record asked for before this one is worked on: 762.
- Windows claimed by the multiprocessor that they run on, so that neighbours share its cache: that answered 36 % instead
  of 24 % of the requests, but took 852 us where windows in their order took 744.
- Windows that cut through a row's records, so that no runs need be summed ahead, but fewer and larger than these: 687
  us. Small ones, so that those at work are neighbours in memory, which join every row that two share: 625 us; those
  here work the few records of the row before out again instead.
- Ordering and splitting in a launch each: 595 us, and 100 in place of 98 at batch 1.
"""

import triton
import triton.language as tl

from saccade.deformable_aggregation.kernels import is_visible, load_map, pixel_before, row_columns
from saccade.operator.launch import LaunchedKernel, wait_for_previous_kernel

# Rows with fewer records than this are never divided between windows, and a window that begins with the row after such
# a one works its records out again rather than wait for what the window before it has to say.
_FEW = tl.constexpr(8)


@triton.jit
def _row_of(level, sample, row, samples, map_rows):
    """Number of a map's row among those of all samples and maps, map by map, within a map sample by sample."""
    samples = tl.full([], samples, tl.int64)
    first = samples * map_rows[0]
    result = sample * map_rows[0] + row
    for later in tl.static_range(1, len(map_rows)):
        result = tl.where(level == later, first + sample * map_rows[later] + row, result)
        first += samples * map_rows[later]
    return result


@triton.jit
def _address_of(maps, row, samples, map_rows, C: tl.constexpr):
    """Where a row numbered by `_row_of` lies in memory, and the number after the last row of its map."""
    row, samples = row.to(tl.int64), tl.full([], samples, tl.int64)
    source = maps[0] + row * C
    stop = samples * map_rows[0]
    first = stop
    for later in tl.static_range(1, len(maps)):
        source = tl.where(row >= first, maps[later] + (row - first) * C, source)
        stop = tl.where(row >= first, first + samples * map_rows[later], stop)
        first += samples * map_rows[later]
    return source, stop


@triton.jit
def _touched_row(x, y, height, width, start, level, lower, map_rows, COMPUTE: tl.constexpr):
    """What the upper or lower two corners of points contribute to.

    Returns:
        row: of the first corner that exists.
        first, second: shares of this corner and the one after it in what both take. `second` is negative if the latter
            does not exist: -1 at the right border, -2 at the left one, where the first corner is the right one.
        share: what both take of the point.
        exists: whether one of the corners does.
    """
    rows = map_rows[0]
    for later in tl.static_range(1, len(map_rows)):
        rows = tl.where(level == later, map_rows[later], rows)
    j, du = pixel_before(x, width, COMPUTE)
    i, dv = pixel_before(y, height, COMPUTE)
    i += lower
    row = start + i.to(tl.int64) * width + j
    in_map = (i >= 0) & (i < height)
    left = in_map & (j >= 0) & (j < width) & (row >= 0) & (row < rows)
    right = in_map & (j + 1 >= 0) & (j + 1 < width) & (row + 1 >= 0) & (row + 1 < rows)
    first = tl.where(left, 1 - du, du)
    second = tl.where(left, tl.where(right, du, -1.0), -2.0)
    return tl.where(left, row, row + 1), first, second, tl.where(lower == 1, dv, 1 - dv), left | right


@triton.jit
def _block_of_points(
    location, points, N: tl.constexpr, L: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """A block of points in the camera of this program: (BLOCK, 1, 1); and their records' numbers: (BLOCK, L, 2)."""
    camera = tl.program_id(0) % N
    point = (tl.program_id(0) // N).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None, None]
    level = tl.arange(0, BLOCK_L)[None, :, None]
    pair = point * N + camera
    x = tl.load(location + pair * 2, mask=point < points, other=0).to(COMPUTE)
    y = tl.load(location + pair * 2 + 1, mask=point < points, other=0).to(COMPUTE)
    return point, camera, level, (pair * L + level) * 2 + tl.arange(0, 2)[None, None, :], x, y


@triton.jit
def _as_mask(flags):
    """What ``&`` or ``|`` makes of a block of bools and a single one, as a mask.

    Triton's interpreter makes integers of them, which it refuses as a mask from Triton 3.9 on. The compiler leaves the
    comparison out.
    """
    return flags != 0


@triton.jit
def _any(flags):
    return tl.max(tl.max(tl.max(flags.to(tl.int32), 2), 1), 0) > 0


@LaunchedKernel
@triton.jit
def clear_kernel(words, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Write zeros."""
    wait_for_previous_kernel(PDL)
    word = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(words + word, tl.zeros([BLOCK], tl.int32), mask=word < size)


@LaunchedKernel
@triton.jit
def count_kernel(
    spatial_shape, scale_start_index, location, counts, slots, points, points_of_sample, samples, map_rows,
    N: tl.constexpr, L: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Count the records of each row."""
    wait_for_previous_kernel(PDL)
    point, camera, level, record, x, y = _block_of_points(location, points, N, L, BLOCK_L, BLOCK, COMPUTE)
    visible = is_visible(x, y)
    if _any(visible):
        height, width, start = load_map(spatial_shape, scale_start_index, camera * L + level, level < L)
        lower = tl.arange(0, 2)[None, None, :]
        row, _, _, _, exists = _touched_row(x, y, height, width, start, level, lower, map_rows, COMPUTE)
        exists &= visible & (level < L)
        row = _row_of(level, point // points_of_sample, row, samples, map_rows)
        slot = tl.atomic_add(counts + 1 + row, 1, mask=exists, sem="relaxed")
        tl.store(slots + record, slot, mask=exists)


@LaunchedKernel
@triton.jit
def scan_kernel(counts, sums, size, BLOCK: tl.constexpr, BESIDE: tl.constexpr, PDL: tl.constexpr):
    """Sum up counts from the first to each, in place and in one launch: every program adds what those before it say.

    `sums`, all 0 before, gets the number of programs that have begun, and of each its own sum plus 1. A program takes
    its block by that number, not by its own: so those that it waits for have begun, and none waits for one that cannot
    begin before it ends. What programs look at grows with their square: give them many counts where there are many.
    """
    wait_for_previous_kernel(PDL)
    number = tl.atomic_add(sums, 1, sem="relaxed")
    position = number * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(counts + position, mask=position < size, other=0).to(tl.int64)
    tl.atomic_xchg(sums + 1 + number, tl.sum(count, 0) + 1, sem="relaxed")
    before = tl.zeros([], tl.int64)
    for first in range(0, number, BESIDE):
        other = first + tl.arange(0, BESIDE)
        said = tl.load(sums + 1 + other, mask=other < number, other=1, volatile=True)
        while tl.min(said, 0) == 0:
            said = tl.load(sums + 1 + other, mask=other < number, other=1, volatile=True)
        before += tl.sum(said, 0) - BESIDE
    total = before + tl.cumsum(count, 0)
    tl.store(counts + position, total.to(counts.dtype.element_ty), mask=position < size)


@LaunchedKernel
@triton.jit
def place_kernel(
    spatial_shape, scale_start_index, location, begins, slots, placed, points, points_of_sample, samples, map_rows,
    N: tl.constexpr, L: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Put the records of each row side by side, in no particular order."""
    wait_for_previous_kernel(PDL)
    point, camera, level, record, x, y = _block_of_points(location, points, N, L, BLOCK_L, BLOCK, COMPUTE)
    visible = is_visible(x, y)
    if _any(visible):
        height, width, start = load_map(spatial_shape, scale_start_index, camera * L + level, level < L)
        lower = tl.arange(0, 2)[None, None, :]
        row, _, _, _, exists = _touched_row(x, y, height, width, start, level, lower, map_rows, COMPUTE)
        exists &= visible & (level < L)
        row = _row_of(level, point // points_of_sample, row, samples, map_rows)
        position = tl.load(begins + row, mask=exists, other=0) + tl.load(slots + record, mask=exists, other=0)
        tl.store(placed + position, record.to(placed.dtype.element_ty), mask=exists)


@triton.jit
def _order(
    program, programs, spatial_shape, scale_start_index, location, begins, placed, ordered, shares, rows,
    pairs_of_sample, samples, map_rows, N: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Put the records of each row in the order of their numbers: so that sums over them are the same in every run.

    Every record looks at all of its row: the work is quadratic in the records of a row, nothing beside the rest where
    these are some hundreds, and felt where all points of a scene lie on one pixel.
    """
    total = tl.load(begins + rows)
    for block in range(program, tl.cdiv(total, BLOCK), programs):
        position = block * BLOCK + tl.arange(0, BLOCK)
        mask = position < total
        record = tl.load(placed + position, mask=mask, other=0)
        lower = (record % 2).to(tl.int32)
        level = (record // 2 % L).to(tl.int32)
        pair = (record // (2 * L)).to(tl.int64)
        x = tl.load(location + pair * 2, mask=mask, other=0.5).to(COMPUTE)
        y = tl.load(location + pair * 2 + 1, mask=mask, other=0.5).to(COMPUTE)
        index = (pair % N).to(tl.int32) * L + level
        height, width, start = load_map(spatial_shape, scale_start_index, index, mask)
        row, first, second, share, _ = _touched_row(x, y, height, width, start, level, lower, map_rows, COMPUTE)
        row = _row_of(level, pair // pairs_of_sample, row, samples, map_rows)
        begin = tl.load(begins + row, mask=mask, other=0)
        size = tl.load(begins + row + 1, mask=mask, other=0) - begin
        rank = begin
        for offset in range(0, tl.max(size), 4):  # four loads are under way at a time
            for step in tl.static_range(4):
                among = mask & (offset + step < size)
                neighbour = tl.load(placed + begin + offset + step, mask=among, other=0)
                rank += (among & (neighbour < record)).to(rank.dtype)
        tl.store(ordered + rank, record, mask=mask)
        entry = rank.to(tl.int64) * 3
        tl.store(shares + entry, first, mask=mask)
        tl.store(shares + entry + 1, second, mask=mask)
        tl.store(shares + entry + 2, share, mask=mask)


@triton.jit
def _split(program, begins, window_rows, window_positions, rows, windows, COST: tl.constexpr, WINDOWS: tl.constexpr):
    """Where windows of equal work begin: in which row, at which record. A row costs 1 to write, a record COST."""
    window = program * WINDOWS + tl.arange(0, WINDOWS)[:, None]  # (WINDOWS, 1)
    lane = tl.arange(0, 32)[None, :]
    work = rows + COST * tl.load(begins + rows).to(tl.int64)
    target = work * window // windows
    # The last row with at most `target` of work before it, by a search that divides by 32.
    low = (window * 0).to(tl.int64)
    high = low + rows
    while tl.max(high - low) > 0:
        step = (high - low + 31) // 32
        probe = tl.minimum(low + (lane + 1) * step, high)
        before = probe + COST * tl.load(begins + probe).to(tl.int64)
        reached = tl.sum((before <= target).to(tl.int32), 1, keep_dims=True)
        high = tl.where(reached < 32, tl.minimum(low + (reached + 1) * step, high) - 1, high)
        low = tl.minimum(low + reached * step, high)
    begin, end = tl.load(begins + low), tl.load(begins + tl.minimum(low + 1, rows))
    # A row with few records is not divided: the window begins with it.
    skipped = ((target - low - COST * begin.to(tl.int64)) // COST).to(begin.dtype)
    position = tl.where(end - begin < _FEW, begin, tl.minimum(begin + skipped, end))
    tl.store(window_rows + window, low, mask=window <= windows)
    tl.store(window_positions + window, position, mask=window <= windows)


@LaunchedKernel
@triton.jit
def order_and_split_kernel(
    spatial_shape, scale_start_index, location, begins, placed, ordered, shares, window_rows, window_positions, rows,
    windows, pairs_of_sample, samples, map_rows, N: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr,
    COST: tl.constexpr, WINDOWS: tl.constexpr, COMPUTE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Order the records of each row, and cut rows and records into windows: one launch for two things to do."""
    wait_for_previous_kernel(PDL)
    splitting = tl.cdiv(windows + 1, WINDOWS)
    if tl.program_id(0) < splitting:
        _split(tl.program_id(0), begins, window_rows, window_positions, rows, windows, COST, WINDOWS)
    else:
        _order(
            tl.program_id(0) - splitting, tl.num_programs(0) - splitting, spatial_shape, scale_start_index, location,
            begins, placed, ordered, shares, rows, pairs_of_sample, samples, map_rows, N, L, BLOCK, COMPUTE,
        )  # fmt: skip


@triton.jit
def _load_record(
    position, exists, grad_output, weights, ordered, shares, columns, in_row, group,
    PAIRS: tl.constexpr, L: tl.constexpr, G: tl.constexpr, C: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    record = tl.load(ordered + position, mask=exists, other=0)
    entry = position.to(tl.int64) * 3
    first = tl.load(shares + entry, mask=exists, other=0)
    second = tl.load(shares + entry + 1, mask=exists, other=0)
    share = tl.load(shares + entry + 2, mask=exists, other=0)
    anchor = (record // (2 * L * PAIRS)).to(tl.int64)
    incoming = tl.load(grad_output + anchor * C + columns, mask=_as_mask(in_row & exists), other=0)  # (H, G, C / G / H)
    in_group = _as_mask((group < G) & exists)
    weight = tl.load(weights + record.to(tl.int64) // 2 * G + group, mask=in_group, other=0).to(COMPUTE)
    return record, first, second, share, incoming, weight


@triton.jit
def _shared_rows(begins, first_row, position):
    """How many rows from its first one on a window shares with the windows beside it.

    If it begins within a row, this row, and the one after it, to which the row's second corners contribute. If it
    begins with a row, the row before contributes to that: its few records the window works out again, and shares
    nothing; many it does not.
    """
    begin = tl.load(begins + first_row)
    before = tl.load(begins + tl.maximum(first_row - 1, 0))
    return tl.where(position > begin, 2, tl.where(begin - before < _FEW, 0, 1))


@LaunchedKernel
@triton.jit
def gather_kernel(
    maps, grad_output, weights, begins, ordered, shares, window_rows, window_positions,
    grad_maps, partial, along, across, samples, map_rows,
    PAIRS: tl.constexpr, L: tl.constexpr, G: tl.constexpr, C: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
    NEED_FEATURES: tl.constexpr, NEED_REST: tl.constexpr, COMPUTE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Go through the rows and records of one window.

    Of each record, `along` gets the products with what its two rows have at the point's column, group by group, and
    `across` how the sum of these changes along the row.
    Gradients of rows that belong to this window alone go to `grad_maps`. Of shared rows, `partial` gets what this
    window says: in slots 0 and 1 of its first row and the one after it, in slots 2 and 3 of the row where the next
    window begins and the one after that, unless that is one of the first two. Only slots of shared rows are written
    and read.
    """
    wait_for_previous_kernel(PDL)
    window = tl.program_id(0)
    first_row, last_row = tl.load(window_rows + window), tl.load(window_rows + window + 1)
    position, last = tl.load(window_positions + window), tl.load(window_positions + window + 1)
    shared = _shared_rows(begins, first_row, position)
    columns, in_row = row_columns(G, C, BLOCK_H, BLOCK_G, BLOCK_C)
    group = tl.arange(0, BLOCK_G)
    partial += window.to(tl.int64) * (4 * C) + columns
    here = tl.zeros([BLOCK_H, BLOCK_G, BLOCK_C], COMPUTE)  # gradient of the row
    after = here  # what the row after it has got so far
    feature, following = here, here
    if NEED_FEATURES:
        if (shared == 0) & ((first_row < last_row) | (position < last)):
            earlier = tl.load(begins + tl.maximum(first_row - 1, 0))
            while earlier < position:
                _, _, second, share, incoming, weight = _load_record(
                    earlier, True, grad_output, weights, ordered, shares, columns, in_row, group,
                    PAIRS, L, G, C, COMPUTE,
                )  # fmt: skip
                if second >= 0:
                    here = tl.fma(incoming.to(COMPUTE) * (weight * share)[None, :, None], second, here)
                earlier += 1
    record, first, second, share, incoming, weight = _load_record(
        position, position < last, grad_output, weights, ordered, shares, columns, in_row, group,
        PAIRS, L, G, C, COMPUTE,
    )  # fmt: skip
    for step in range(last_row - first_row + 1):
        row = first_row + step
        end = tl.minimum(tl.load(begins + row + 1, mask=row < last_row, other=last), last)
        after = tl.zeros([BLOCK_H, BLOCK_G, BLOCK_C], COMPUTE)
        if position < end:
            if NEED_REST:
                source, stop = _address_of(maps, row, samples, map_rows, C)
                feature = tl.load(source + columns, mask=in_row, other=0).to(COMPUTE)
                following = tl.load(source + C + columns, mask=_as_mask(in_row & (row + 1 < stop)), other=0).to(COMPUTE)
            while position < end:
                position += 1  # the next record is asked for before this one is worked on
                next_record, next_first, next_second, next_share, next_incoming, next_weight = _load_record(
                    position, position < last, grad_output, weights, ordered, shares, columns, in_row, group,
                    PAIRS, L, G, C, COMPUTE,
                )  # fmt: skip
                grad = incoming.to(COMPUTE)
                if NEED_FEATURES:
                    scaled = grad * (weight * share)[None, :, None]
                    here = tl.fma(scaled, first, here)
                    if second >= 0:
                        after = tl.fma(scaled, second, after)
                if NEED_REST:
                    near = tl.sum(tl.sum(grad * feature, 0), 1)  # (G,)
                    far = tl.where(second >= 0, tl.sum(tl.sum(grad * following, 0), 1), 0)
                    between = first * near + tl.maximum(second, 0.0) * far
                    tl.store(along + record.to(tl.int64) * G + group, between, mask=group < G)
                    slope = tl.where(second == -2, near, far - near)
                    tl.store(across + record, tl.sum(weight * slope, 0))
                record, first, second, share = next_record, next_first, next_second, next_share
                incoming, weight = next_incoming, next_weight
        if NEED_FEATURES:
            if row < last_row:
                if step < shared:
                    tl.store(partial + step * C, here, mask=in_row)
                else:
                    target, _ = _address_of(grad_maps, row, samples, map_rows, C)
                    tl.store(target + columns, here.to(grad_maps[0].dtype.element_ty), mask=in_row)
                here = after
    if NEED_FEATURES:
        next_shared = _shared_rows(begins, last_row, last)
        # What the window says of the row where the next one begins and the row after that. If these are also among its
        # own first two, it says so there.
        if next_shared > 0:
            tl.store(partial + tl.where(last_row <= first_row + 1, last_row - first_row, 2) * C, here, mask=in_row)
        if next_shared > 1:
            tl.store(partial + tl.where(last_row == first_row, 1, 3) * C, after, mask=in_row)


@LaunchedKernel
@triton.jit
def join_kernel(
    begins, window_rows, window_positions, partial, grad_maps, rows, windows, samples, map_rows,
    C: tl.constexpr, BLOCK_C: tl.constexpr, AHEAD: tl.constexpr, COMPUTE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Sum what windows say of the rows that one shares with later ones, unless an earlier one shares them too."""
    wait_for_previous_kernel(PDL)
    window = tl.program_id(0)
    first = tl.load(window_rows + window)
    shared = _shared_rows(begins, first, tl.load(window_positions + window))
    if shared > 0:
        before = tl.maximum(window - 1, 0)
        first_before = tl.load(window_rows + before)
        shared_before = _shared_rows(begins, first_before, tl.load(window_positions + before))
        row = first + tl.arange(0, 2)[None, :, None]
        mine = (row < first + shared) & (row < rows) & _as_mask((window == 0) | (row >= first_before + shared_before))
        channel = tl.arange(0, BLOCK_C)[None, None, :]
        total = tl.zeros([1, 2, BLOCK_C], COMPUTE)
        begin = first_before
        while (before < windows) & (begin < first + shared):  # some windows at a time
            sharing = before + tl.arange(0, AHEAD)[:, None, None]
            start = tl.load(window_rows + sharing, mask=sharing < windows, other=rows)
            end = tl.load(window_rows + sharing + 1, mask=sharing < windows, other=rows)
            slot = tl.where(row <= start + 1, row - start, row - end + 2)  # (AHEAD, 2, 1)
            says = mine & (sharing < windows) & (row >= start) & (slot >= 0) & (slot < 4)
            source = partial + (sharing.to(tl.int64) * 4 + slot) * C + channel
            total += tl.sum(tl.load(source, mask=says & (channel < C), other=0), 0, keep_dims=True)
            before += AHEAD
            begin = tl.load(window_rows + tl.minimum(before, windows))
        target, _ = _address_of(grad_maps, row, samples, map_rows, C)
        tl.store(target + channel, total.to(grad_maps[0].dtype.element_ty), mask=mine & (channel < C))


@LaunchedKernel
@triton.jit
def combine_kernel(
    spatial_shape, scale_start_index, location, weights, along, across, grad_location, grad_weights, points, map_rows,
    N: tl.constexpr, L: tl.constexpr, G: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK: tl.constexpr, NEED_LOCATION: tl.constexpr, NEED_WEIGHTS: tl.constexpr, COMPUTE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Put together what the two records of a point on a level say of it."""
    wait_for_previous_kernel(PDL)
    camera = tl.program_id(0) % N
    point = (tl.program_id(0) // N).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None, None]  # (BLOCK, 1, 1)
    pair = point * N + camera
    level = tl.arange(0, BLOCK_L)[None, :, None]
    group = tl.arange(0, BLOCK_G)[None, None, :]
    mask = point < points
    x = tl.load(location + pair * 2, mask=mask, other=0).to(COMPUTE)
    y = tl.load(location + pair * 2 + 1, mask=mask, other=0).to(COMPUTE)
    visible = is_visible(x, y) & (level < L)  # (BLOCK, L, 1)
    entry = (pair * L + level) * G + group  # (BLOCK, L, G)
    in_entry = mask & (level < L) & (group < G)
    grad_weight = tl.zeros([BLOCK, BLOCK_L, BLOCK_G], COMPUTE)
    grad_x = tl.zeros([BLOCK, BLOCK_L, 1], COMPUTE)
    grad_y = tl.zeros([BLOCK, BLOCK_L, 1], COMPUTE)
    if _any(visible):
        height, width, start = load_map(spatial_shape, scale_start_index, camera * L + level, level < L)
        weight = tl.zeros([BLOCK, BLOCK_L, BLOCK_G], COMPUTE)
        if NEED_LOCATION:
            weight = tl.load(weights + entry, mask=in_entry & visible, other=0).to(COMPUTE)
        for lower in tl.static_range(2):
            _, _, _, share, exists = _touched_row(
                x, y, height, width, start, level, tl.full([BLOCK, BLOCK_L, 1], lower, tl.int32), map_rows, COMPUTE
            )
            exists &= visible
            record = (pair * L + level) * 2 + lower
            sample = tl.load(along + record * G + group, mask=in_entry & exists, other=0)
            grad_weight += tl.where(exists, share, 0) * sample
            if NEED_LOCATION:
                slope = tl.load(across + record, mask=exists, other=0)
                grad_x += tl.where(exists, width.to(COMPUTE) * share * slope, 0)
                value = tl.where(exists, tl.sum(weight * sample, 2, keep_dims=True) * height.to(COMPUTE), 0)
                grad_y += value if lower else -value
    if NEED_WEIGHTS:
        tl.store(grad_weights + entry, grad_weight.to(grad_weights.dtype.element_ty), mask=in_entry)
    if NEED_LOCATION:
        target = grad_location + pair * 2
        tl.store(target, tl.sum(grad_x, 1, keep_dims=True).to(grad_location.dtype.element_ty), mask=mask)
        tl.store(target + 1, tl.sum(grad_y, 1, keep_dims=True).to(grad_location.dtype.element_ty), mask=mask)
