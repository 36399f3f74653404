"""Triton kernels of deformable aggregation, forward. The backward ones are in ``backward_kernels.py``.

Most points are seen by one camera in six. So a first kernel lists the samples that there are: of every anchor, camera
by camera and level by level, the rows and the shares of the four corners. The second has a block of warps for each
anchor: every warp takes some of the listed samples, reads their four rows as they lie in memory and adds them to sums
in registers, which are added up at the end in an order that does not change. With few anchors and many points the list
is cut into parts, whose sums a third kernel adds up.

What bounds it (ncu, H200, 8 samples of 900 anchors x 13 points, 256 channels, float32: 12 us + 148 us, floor 74 us):
the corners are 1.5 GB of rows, of which the first-level cache answers 37 %. The rest takes 77 % of what the
second-level cache can deliver; main memory is busy by 48 %, the instruction issue by 44 %.

At batch 1, with 27.2 to 28.9 us, listing and launching weigh more: so a segment's cameras are asked at once which of
them see it, and every launch is a dependent one (``operator.launch.dependent_launch``).

What else was tried on that workload, all kernels together:
- One warp for an anchor or a part of it that looks for its visible points itself: 176 us. The list halves the
  instructions; asking for the next listed sample before waiting for this one's features hides the latency of the list.
- A block of warps that lists its visible points in registers: 170 us, but far slower with many points (660 us against
  362 us on 100 anchors x 300 points), as all warps wait for each other at every step.
- Anchors in the order of the camera and the column that they look at, one to a warp: the first-level cache answers
  53 %, and yet 244 us: a sample waits for the slowest of its rows, and neighbouring warps for the longest list.
- Two samples of a warp at a time: 258 us. Registers in flight are what a multiprocessor runs out of.
- A program for each camera of a segment, in place of a loop over cameras: 173 us, at batch 1 28.1 in place of 27.6.
- Numbers of listed samples read in pairs, 64 bits at a time: 157 us, at batch 1 28.2 in place of 27.7.
- A segment's cameras asked one by one: at batch 1 29.3 us in place of 27.7 to 28.4, both without dependent launches.
"""

import triton
import triton.language as tl

from saccade.operator.launch import LaunchedKernel, wait_for_previous_kernel


@triton.jit
def is_visible(x, y):
    """Whether a point lies inside an image; false for NaN."""
    return (x > 0) & (x < 1) & (y > 0) & (y < 1)


@triton.jit
def pixel_before(fraction, size, COMPUTE: tl.constexpr):
    """Integer position left of (above) a point, and how far beyond it the point lies.

    Kernels that use it are compiled without fusing multiplication and subtraction: all must find the same pixel, which
    is that of the reference.
    """
    position = fraction * size.to(COMPUTE) - 0.5
    floor = tl.floor(position)
    return floor.to(tl.int32), position - floor


@triton.jit
def load_map(spatial_shape, scale_start_index, index, mask):
    """Height, width and first row of maps. A side that 32 bits cannot tell is cut: no features have so many rows."""
    height = tl.load(spatial_shape + index * 2, mask=mask, other=0)
    width = tl.load(spatial_shape + index * 2 + 1, mask=mask, other=0)
    height = tl.minimum(tl.maximum(height, 0), 2147483647).to(tl.int32)
    width = tl.minimum(tl.maximum(width, 0), 2147483647).to(tl.int32)
    return height, width, tl.load(scale_start_index + index, mask=mask, other=0).to(tl.int64)


@triton.jit
def row_columns(G: tl.constexpr, C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr):
    """Which channels of a row each element of a (BLOCK_H, BLOCK_G, BLOCK_C) tile is, and which of them exist.

    A group's channels lie along the first and the last axis, for the second axis in turned order: so a warp that reads
    the tile one step of the first axis at a time finds all memory banks, and each of its threads has one group only.
    """
    group = tl.arange(0, BLOCK_G)[None, :, None]
    channel = (tl.arange(0, BLOCK_H)[:, None, None] + group) % BLOCK_H * BLOCK_C + tl.arange(0, BLOCK_C)[None, None, :]
    return group * (C // G) + channel, (group < G) & (channel < C // G)


@triton.jit
def _seeing_cameras(location, point, K: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr, COMPUTE: tl.constexpr):
    """One bit for each camera: whether it sees one of the points, found at once rather than camera by camera.

    BLOCK_N is 64 at most. Cameras that share a bit, as they are more, all have it if one of them sees a point.
    """
    bit = tl.arange(0, BLOCK_N)[None, :]
    seen = tl.zeros([1, BLOCK_N], tl.int32)
    for first in tl.static_range(0, N, BLOCK_N):
        camera = first + bit
        pair = point * N + camera
        exists = (point < K) & (camera < N)
        x = tl.load(location + pair * 2, mask=exists, other=0).to(COMPUTE)
        y = tl.load(location + pair * 2 + 1, mask=exists, other=0).to(COMPUTE)
        seen |= tl.max(is_visible(x, y).to(tl.int32), 0, keep_dims=True)
    return tl.sum(tl.sum(seen.to(tl.int64) << bit.to(tl.int64), 1), 0)


@LaunchedKernel
@triton.jit
def plan_kernel(
    spatial_shape, scale_start_index, location, counts, corner_rows, shares, map_rows,
    K: tl.constexpr, N: tl.constexpr, L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr,
    SEGMENT: tl.constexpr, COMPUTE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """List the samples of one segment of an anchor's key points: of the cameras that see it, on every level.

    Of each sample, in `corner_rows`: row of its upper left corner; rows from there to the corner below; and the number
    of its weight within the anchor, times two, plus the rows to the corner beside, 0 or 1 (or -1 if it has no corner).
    The fourth column is left, so that entries are 16 bytes. In `shares`: those of the four corners, -1 for one that
    does not exist.
    """
    wait_for_previous_kernel(PDL)
    segment = tl.program_id(0).to(tl.int64)
    SEGMENTS: tl.constexpr = (K + SEGMENT - 1) // SEGMENT
    point = (segment % SEGMENTS).to(tl.int32) * SEGMENT + tl.arange(0, SEGMENT)[:, None]  # (SEGMENT, 1)
    level = tl.arange(0, BLOCK_L)[None, :]
    location += segment // SEGMENTS * (K * N * 2)
    seeing = _seeing_cameras(location, point, K, N, BLOCK_N, COMPUTE)
    total = 0
    for camera in range(N):
        if (seeing >> (camera % BLOCK_N)) & 1 != 0:
            pair = point * N + camera
            x = tl.load(location + pair * 2, mask=point < K, other=0).to(COMPUTE)
            y = tl.load(location + pair * 2 + 1, mask=point < K, other=0).to(COMPUTE)
            visible = is_visible(x, y)
            flag = visible.to(tl.int32)
            seen = tl.sum(tl.sum(flag, 1), 0)
            rank = tl.cumsum(flag, 0) - flag
            height, width, start = load_map(spatial_shape, scale_start_index, camera * L + level, level < L)
            rows = map_rows[0]
            for later in tl.static_range(1, len(map_rows)):
                rows = tl.where(level == later, map_rows[later], rows)
            j, du = pixel_before(x, width, COMPUTE)  # (SEGMENT, L)
            i, dv = pixel_before(y, height, COMPUTE)
            left, right = (j >= 0) & (j < width), (j + 1 >= 0) & (j + 1 < width)
            upper, lower = (i >= 0) & (i < height), (i + 1 >= 0) & (i + 1 < height)
            # Where only one of two columns (rows) of corners exists, it is taken twice with half of its share: so the
            # main kernel reads four corners always, and an infinite feature still comes out as infinite.
            beside, half_x = left & right, tl.where(left, 1 - du, du) / 2
            share_left, share_right = tl.where(beside, 1 - du, half_x), tl.where(beside, du, half_x)
            below, half_y = upper & lower, tl.where(upper, 1 - dv, dv) / 2
            share_upper, share_lower = tl.where(below, 1 - dv, half_y), tl.where(below, dv, half_y)
            across, down = beside.to(tl.int32), below.to(tl.int32) * width
            row = start + (i + tl.where(upper, 0, 1)).to(tl.int64) * width + j + tl.where(left, 0, 1)
            # A row that the features do not have counts as a corner that does not exist: with wrong starts or sizes.
            in_map = visible & (left | right) & (upper | lower)
            corners = 0
            entry = (segment * (SEGMENT * N * L) + total + level * seen + rank) * 4
            mask = visible & (level < L)
            for corner in tl.static_range(4):
                at = row + (across if corner % 2 else 0) + (down if corner // 2 else 0)
                exists = in_map & (at >= 0) & (at < rows)
                share = (share_lower if corner // 2 else share_upper) * (share_right if corner % 2 else share_left)
                tl.store(shares + entry + corner, tl.where(exists, share, -1), mask=mask)
                corners += exists.to(tl.int32)
            which = tl.where(
                corners > 0, ((pair.to(tl.int64) * L + level) * 2 + across).to(corner_rows.dtype.element_ty), -1
            )
            tl.store(corner_rows + entry, tl.where(corners > 0, row, 0).to(corner_rows.dtype.element_ty), mask=mask)
            tl.store(
                corner_rows + entry + 1, tl.where(corners > 0, down, 0).to(corner_rows.dtype.element_ty), mask=mask
            )
            tl.store(corner_rows + entry + 2, which, mask=mask)
            total += seen * L
    tl.store(counts + segment, total)


@triton.jit
def _load_sample(corner_rows, shares, entry, exists):
    row = tl.load(corner_rows + entry * 4, mask=exists, other=0).to(tl.int64)
    down = tl.load(corner_rows + entry * 4 + 1, mask=exists, other=0)
    which = tl.load(corner_rows + entry * 4 + 2, mask=exists, other=-1)
    s00, s01 = (
        tl.load(shares + entry * 4, mask=exists, other=-1),
        tl.load(shares + entry * 4 + 1, mask=exists, other=-1),
    )
    s10 = tl.load(shares + entry * 4 + 2, mask=exists, other=-1)
    s11 = tl.load(shares + entry * 4 + 3, mask=exists, other=-1)
    return row, down, which, s00, s01, s10, s11


@LaunchedKernel
@triton.jit
def aggregate_kernel(
    maps, weights, counts, corner_rows, shares, output, anchors, parts, map_rows,
    K: tl.constexpr, N: tl.constexpr, L: tl.constexpr, G: tl.constexpr, C: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
    SEGMENT: tl.constexpr, WARPS: tl.constexpr, COMPUTE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Sum the listed samples of an anchor, or of one of `parts` parts of its segments; each warp takes some."""
    wait_for_previous_kernel(PDL)
    SEGMENTS: tl.constexpr = (K + SEGMENT - 1) // SEGMENT
    part = tl.program_id(0) % parts
    anchor = (tl.program_id(0) // parts).to(tl.int64)
    sample = anchor // anchors
    columns, in_row = row_columns(G, C, BLOCK_H, BLOCK_G, BLOCK_C)
    columns, in_row = columns[:, None], in_row[:, None]  # (H, 1, G, C / G / H)
    group = tl.arange(0, BLOCK_G)[None, None, :, None]
    warp = tl.arange(0, WARPS)[None, :, None, None]
    from_weights = weights + anchor * (K * N * L * G) + group
    total = tl.zeros([BLOCK_H, WARPS, BLOCK_G, BLOCK_C], COMPUTE)
    for segment in range(part * SEGMENTS // parts, (part + 1) * SEGMENTS // parts):
        count = tl.load(counts + anchor * SEGMENTS + segment)
        begin = (anchor * SEGMENTS + segment) * (SEGMENT * N * L)
        row, down, which, s00, s01, s10, s11 = _load_sample(corner_rows, shares, begin + warp, warp < count)
        for first in range(0, count, WARPS):
            weight = tl.load(from_weights + (which // 2).to(tl.int64) * G, mask=(group < G) & (which >= 0), other=0).to(
                COMPUTE
            )  # (1, WARPS, G, 1)
            # The columns are added before the level is chosen: from Triton 3.8 on a choice between pointers to the
            # beginnings of rows is not known to be one between multiples of 16 bytes, and loads would be narrow.
            source = maps[0] + (sample * map_rows[0] + row) * C + columns
            for level in tl.static_range(1, len(maps)):
                here = maps[level] + (sample * map_rows[level] + row) * C + columns
                source = tl.where(which // 2 % L == level, here, source)
            across = which % 2 * C
            f00 = tl.load(source, mask=in_row & (s00 >= 0), other=0).to(COMPUTE)
            f01 = tl.load(source + across, mask=in_row & (s01 >= 0), other=0).to(COMPUTE)
            source += down.to(tl.int64) * C
            f10 = tl.load(source, mask=in_row & (s10 >= 0), other=0).to(COMPUTE)
            f11 = tl.load(source + across, mask=in_row & (s11 >= 0), other=0).to(COMPUTE)
            w00, w01, w10, w11 = weight * s00, weight * s01, weight * s10, weight * s11
            after = first + WARPS + warp  # asked for before these features are waited for
            row, down, which, s00, s01, s10, s11 = _load_sample(corner_rows, shares, begin + after, after < count)
            total = tl.fma(f00, w00, total)
            total = tl.fma(f01, w01, total)
            total = tl.fma(f10, w10, total)
            total = tl.fma(f11, w11, total)
    target = output + (part.to(tl.int64) * (tl.num_programs(0) // parts) + anchor) * C + columns
    tl.store(target, tl.sum(total, 1, keep_dims=True).to(output.dtype.element_ty), mask=in_row)


@LaunchedKernel
@triton.jit
def sum_parts_kernel(sums, output, size, parts, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Add up the sums of the parts of each anchor, in their order."""
    wait_for_previous_kernel(PDL)
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(sums + element, mask=element < size, other=0)
    for part in range(1, parts):
        total += tl.load(sums + part * size + element, mask=element < size, other=0)
    tl.store(output + element, total.to(output.dtype.element_ty), mask=element < size)
