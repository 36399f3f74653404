"""Triton kernels that draw Gaussian heatmaps.

A program has a target, or some of the tiles of its window. Cells are raised by atomic maxima, which give the same bits
in whatever order they come; a cell that is not exceeded is read, and not written. Fresh maps are cleared by a kernel of
this file and then drawn on without reading.

What bounds it (H200, redrawing and drawing fresh maps): on small maps, the launch and the way from numbers of targets
to their cells, two trips to memory: 48 x 20 x 50 cells with up to 50 targets each, 2.5 to 2.8 and 3.3 to 3.8 us, where
clearing alone takes 1.3; tiles of 8 x 8 to 16 x 16 cells and 1 or 2 warps make no difference there. On large maps the
clearing: 32 x 80 x 128 x 128 cells with up to 128 targets each, 10.6 and 53.7 us, where clearing alone takes 37.4.

What else was tried there:
- A warp for each of four targets of a program, offsets with 64 bits, divisions in float64: 4.6 and 6.0 us on the small
  maps, 22 and 58 us on the large ones. Without the divisions, and one target to a program: 2.6 and 4.2 us, 12 and 59 us
  with the driver's memset for clearing, which no launch overlaps. Offsets with 32 bits: what there is now.
- Asking for the next tile's cells before this one is drawn: as fast on small maps, 12.0 us in place of 10.4 on large
  ones.
- Letting the next kernel begin at once, so that its blocks wait beside those at work: 3.5 us in place of 2.6 on the
  small maps, 10.8 in place of 7.7 where Gaussians are large.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

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


class Tiling(NamedTuple):
    """How windows are cut."""

    height: int  # of a tile
    width: int
    warps: int
    programs: int  # to share large windows among, as far as there are tiles


# Fastest on an H200: for maps of few cells, for many targets, which cannot be large, and for others.
_FEW_CELLS, _OF_SMALL_MAPS = 4096, Tiling(height=16, width=16, warps=1, programs=1)
_CELLS_OF_SMALL_TARGETS, _OF_MANY_TARGETS = 1024, Tiling(height=8, width=32, warps=2, programs=1)
_OF_FEW_TARGETS = Tiling(height=16, width=32, warps=4, programs=8192)

# Cells that a program clears, and its warps.
_CLEARED, _WARPS_TO_CLEAR = 8192, 8

# Nothing is compiled anew for other numbers of these. (It would be for strides in a tuple.)
_SIZES = ["samples", "first_slot", "log2_parts", "maps", "height", "width"]
_STRIDES_OF_TARGETS = ["center_sample", "center_slot", "center_axis", "radius_sample", "radius_slot", "radius_axis"]
_STRIDES_OF_BOXES = ["box_sample", "box_slot", "box_axis"]
_OTHER_STRIDES = ["index_sample", "index_slot", "count_sample"]

# Of a grid along its first axis, and along the two others, which hold the samples.
_MOST_PROGRAMS, _MOST_PROGRAMS_OF_OTHER_AXES = 2**31 - 1, 2**15

_KEPT_LAUNCHES = 512

_FALLOFF_OF_FACTOR_1 = -0.5 / math.log(2)
_LOWEST = {dtype: torch.finfo(dtype).min for dtype in TRITON_DTYPE}


@LaunchedKernel
@triton.jit
def _clear_kernel(heatmap, cells, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """Write zeros: as fast as the driver does, and the kernel that draws is made ready meanwhile."""
    wait_for_kernel_before(OVERLAP)
    cell = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(heatmap + cell, tl.zeros([BLOCK], heatmap.dtype.element_ty), mask=cell < cells)


@triton.jit
def _target_of_program(samples, first_slot, log2_parts, INDEX: tl.constexpr):
    """Sample and slot of the target of this program, whether there is one, and which part of its tiles it has."""
    target = tl.program_id(0) >> log2_parts
    part = tl.program_id(0) - (target << log2_parts)
    sample, slot = tl.program_id(1), target
    if INDEX.primitive_bitwidth == 64:
        sample += tl.program_id(2).to(tl.int64) * tl.num_programs(1)
        slot = first_slot + target.to(tl.int64)
    return sample, slot, sample < samples, part


@triton.jit
def _span(center, radius, size, INDEX: tl.constexpr):
    """First cell of a window along one axis, cut to the map, and the one after its last; whatever the numbers are."""
    first = tl.where(radius >= center, 0, tl.minimum(center - radius, size))
    after = tl.where(center >= size - 1 - radius, size, tl.maximum(center + radius + 1, 0))
    return first.to(INDEX), after.to(INDEX)


@triton.jit
def _falloff(radius, falloff, COMPUTE: tl.constexpr):
    """The exponent of 2 at distance 1; finite, so that its product with a distance of 0 is 0."""
    diameter = 2 * radius.to(COMPUTE) + 1
    steepest = tl.full([], falloff, COMPUTE)
    if COMPUTE.primitive_bitwidth == 64:
        return steepest / (diameter * diameter)
    else:  # a division is off by two roundings: what is missing is put right
        inverse = 1 / diameter
        rest = tl.fma(-diameter, inverse, 1.0)
        result = steepest * (inverse * inverse)
        return tl.fma(2 * rest, result, result)


@triton.jit
def _draw(
    target_map, x, y, radius_x, radius_y, falloff, k_scale, part, log2_parts, height, width,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, READS: tl.constexpr, POSITIVE: tl.constexpr, INDEX: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """Draw a part of the window of a target."""
    left, right = _span(x, radius_x, width, INDEX)
    top, bottom = _span(y, radius_y, height, INDEX)
    falloff_x = _falloff(radius_x, falloff, COMPUTE)
    falloff_y = _falloff(radius_y, falloff, COMPUTE)
    # How far the first cell of the window is from the centre. Exactly 0 at the centre, however far out that is.
    first_x, first_y = (left - x).to(COMPUTE), (top - y).to(COMPUTE)
    peak = tl.full([], k_scale, COMPUTE)
    down, along = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_W)[None, :]
    for row in range(part * BLOCK_H, bottom - top, BLOCK_H << log2_parts):
        off_y = first_y + (row + down).to(COMPUTE)
        of_rows = peak * tl.exp2(off_y * off_y * falloff_y)
        for column in range(0, right - left, BLOCK_W):
            off_x = first_x + (column + along).to(COMPUTE)
            value = of_rows * tl.exp2(off_x * off_x * falloff_x)
            inside = (row + down < bottom - top) & (column + along < right - left)
            cell = target_map + ((top + row + down) * width + (left + column + along))
            if READS:
                inside &= value > tl.load(cell, mask=inside)
            if POSITIVE:  # the bits of such numbers, as integers, are in their order, and above those of negative ones
                BITS: tl.constexpr = tl.int64 if value.dtype == tl.float64 else tl.int32
                bits = value.to(BITS, bitcast=True)
                tl.atomic_max(cell.to(tl.pointer_type(BITS), bitcast=True), bits, mask=inside, sem="relaxed")
            else:
                tl.atomic_max(cell, value, mask=inside, sem="relaxed")


@LaunchedKernel
@triton.jit(do_not_specialize=_SIZES + _STRIDES_OF_TARGETS + _OTHER_STRIDES)
def _draw_kernel(
    heatmap, centers, radii, indices, counts, falloff: tl.float64, k_scale: tl.float64,
    samples, first_slot, log2_parts, maps, height, width, center_sample, center_slot, center_axis, radius_sample,
    radius_slot, radius_axis, index_sample, index_slot, count_sample,
    ELLIPSES: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, READS: tl.constexpr, POSITIVE: tl.constexpr,
    INDEX: tl.constexpr, COMPUTE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Draw targets with given centres and radii.

    Of the slots of a sample the first `counts` hold a target, or all if there are none; of its `maps`, `indices` say
    the target's, or there is one.
    """
    wait_for_kernel_before(OVERLAP)
    sample, slot, exists, part = _target_of_program(samples, first_slot, log2_parts, INDEX)
    # All that a target needs is asked for at once, whether it exists or not.
    at = centers + (sample * center_sample + slot * center_slot)
    x, y = tl.load(at, mask=exists, other=0), tl.load(at + center_axis, mask=exists, other=0)
    at = radii + (sample * radius_sample + slot * radius_slot)
    radius_x = tl.load(at, mask=exists, other=-1)
    radius_y = tl.load(at + radius_axis, mask=exists, other=-1) if ELLIPSES else radius_x
    index = tl.full([], 0, INDEX)
    if indices is not None:
        at = indices + (sample * index_sample + slot * index_slot)
        index = tl.load(at, mask=exists, other=-1)
    if counts is not None:
        exists &= slot < tl.load(counts + sample * count_sample, mask=exists, other=0).to(tl.int64)
    if exists & (index >= 0) & (index < maps) & (radius_x >= 0) & (radius_y >= 0):
        _draw(
            heatmap + (sample * maps + index.to(INDEX)) * height * width, x, y, radius_x, radius_y, falloff, k_scale,
            part, log2_parts, height, width, BLOCK_H, BLOCK_W, READS, POSITIVE, INDEX, COMPUTE,
        )  # fmt: skip


@triton.jit
def _in_float64(value):
    return value.to(tl.float32).to(tl.float64) if value.dtype != tl.float64 else value


@triton.jit
def _position(coordinate, origin, stride, size):
    """Where a coordinate lies on the map, cut off towards zero, and whether that is on the map."""
    position = (coordinate - origin) / stride
    inside = (position > -1) & (position < size)
    return tl.where(inside, position, 0).to(tl.int64), inside


@triton.jit
def _radius(height, width, overlap, MMDET: tl.constexpr):
    """Of a box, in float64, with the roundings of `radius_of`."""
    total, area = height + width, height * width
    if MMDET:
        difference = height - width
        return (total - tl.sqrt(difference * difference + 4 * overlap * area)) / 4
    else:
        shrunk = overlap * total
        return tl.sqrt(shrunk * shrunk + 4 * overlap * (1 - overlap) * area) - shrunk


@LaunchedKernel
@triton.jit(do_not_specialize=[*_SIZES, "min_radius", *_STRIDES_OF_BOXES, *_OTHER_STRIDES])
def _draw_boxes_kernel(
    heatmap, boxes, labels, counts, falloff: tl.float64, k_scale: tl.float64, origin_x: tl.float64,
    origin_y: tl.float64, stride_x: tl.float64, stride_y: tl.float64, overlap: tl.float64,
    samples, first_slot, log2_parts, maps, height, width, min_radius, box_sample, box_slot, box_axis, index_sample,
    index_slot, count_sample,
    CORNERS: tl.constexpr, MMDET: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, READS: tl.constexpr,
    POSITIVE: tl.constexpr, INDEX: tl.constexpr, COMPUTE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Draw targets whose centres and radii are those of boxes; each program that shares a target works them out."""
    wait_for_kernel_before(OVERLAP)
    sample, slot, exists, part = _target_of_program(samples, first_slot, log2_parts, INDEX)
    at = boxes + (sample * box_sample + slot * box_slot)
    step = box_axis.to(tl.int64)
    first_x = _in_float64(tl.load(at, mask=exists, other=0))
    first_y = _in_float64(tl.load(at + step, mask=exists, other=0))
    second_x = _in_float64(tl.load(at + 2 * step, mask=exists, other=0))
    second_y = _in_float64(tl.load(at + 3 * step, mask=exists, other=0))
    index = tl.full([], 0, INDEX)
    if labels is not None:
        at = labels + (sample * index_sample + slot * index_slot)
        index = tl.load(at, mask=exists, other=-1)
    exists &= slot < tl.load(counts + sample * count_sample, mask=exists, other=0).to(tl.int64)
    if CORNERS:
        x, in_width = _position((first_x + second_x) / 2, origin_x, stride_x, width)
        y, in_height = _position((first_y + second_y) / 2, origin_y, stride_y, height)
        box_width, box_height = (second_x - first_x) / stride_x, (second_y - first_y) / stride_y
    else:
        x, in_width = _position(first_x, origin_x, stride_x, width)
        y, in_height = _position(first_y, origin_y, stride_y, height)
        box_width, box_height = second_x / stride_x, second_y / stride_y
    exists &= (index >= 0) & (index < maps) & in_width & in_height
    if exists & (box_width > 0) & (box_height > 0):
        # Cut so that products of sizes are finite; no map is that large.
        radius = _radius(tl.minimum(box_height, 2.0**52), tl.minimum(box_width, 2.0**52), overlap, MMDET).to(tl.int64)
        radius = tl.maximum(radius, min_radius)
        _draw(
            heatmap + (sample * maps + index.to(INDEX)) * height * width, x, y, radius, radius, falloff, k_scale, part,
            log2_parts, height, width, BLOCK_H, BLOCK_W, READS, POSITIVE, INDEX, COMPUTE,
        )  # fmt: skip


def _prepare(
    kernel: LaunchedKernel, samples: int, slots: int, maps: int, size: Sequence[int], extent: int,
    last_arguments: Sequence[int], dtype: torch.dtype, device: torch.device, reads: bool, positive: bool,
    **constants: bool,
) -> list[PreparedLaunch]:  # fmt: skip
    height, width = size
    targets = slots * samples
    if height * width <= _FEW_CELLS:
        tiling = _OF_SMALL_MAPS
    elif samples * maps * height * width < _CELLS_OF_SMALL_TARGETS * targets:
        tiling = _OF_MANY_TARGETS
    else:
        tiling = _OF_FEW_TARGETS
    parts = min(tiling.programs // targets, triton.cdiv(height, tiling.height))
    log2_parts = max(1, parts).bit_length() - 1
    # 32 bits are enough if all offsets fit, of tiles that reach beyond the last map too, and one launch is all.
    cells = (samples * maps * height + (tiling.height << log2_parts)) * width + tiling.width
    is_small = max(cells, extent, slots << log2_parts) < 2**31 and samples <= _MOST_PROGRAMS_OF_OTHER_AXES
    samples_at_once = min(samples, _MOST_PROGRAMS_OF_OTHER_AXES)
    at_once = _MOST_PROGRAMS >> log2_parts  # slots
    return [
        kernel.prepare(
            (min(at_once, slots - first_slot) << log2_parts, samples_at_once, triton.cdiv(samples, samples_at_once)),
            samples,
            first_slot,
            log2_parts,
            maps,
            height,
            width,
            *last_arguments,
            **constants,
            BLOCK_H=tiling.height,
            BLOCK_W=tiling.width,
            READS=reads,
            POSITIVE=positive,
            INDEX=tl.int32 if is_small else tl.int64,
            COMPUTE=TRITON_DTYPE[dtype],
            num_warps=tiling.warps,
            enable_fp_fusion=False,  # equal bits, whichever kernel and tiling draw a cell; radii as the CPU has them
            **overlapping(device),
        )
        for first_slot in range(0, slots, at_once)
    ]


# What prepares a launch takes sizes and strides as tensors say them: to look it up must not take longer than to launch.


@lru_cache(_KEPT_LAUNCHES)
def _prepare_concatenated(
    maps: torch.Size, radii: torch.Size, strides: tuple[tuple[int, ...], ...], *others: Any
) -> list[PreparedLaunch]:
    centers, of_radii, (indices,) = strides
    steps = 0, *centers, 0, *_with_axis(of_radii, 2), 0, indices, 0
    extent = _extent(radii[:1], centers, of_radii, (indices,))
    return _prepare(_draw_kernel, 1, radii[0], maps[0], maps[1:], extent, steps, *others, ELLIPSES=len(radii) == 2)


@lru_cache(_KEPT_LAUNCHES)
def _prepare_batched(
    maps: torch.Size, radii: torch.Size, strides: tuple[tuple[int, ...], ...], *others: Any
) -> list[PreparedLaunch]:
    centers, of_radii, (counts,), *labels = strides
    steps = *centers, *_with_axis(of_radii, 3), *(labels[0] if labels else (0, 0)), counts
    classes = maps[1] if labels else 1
    extent = _extent(radii[:2], centers, of_radii, (counts,), *labels)
    return _prepare(_draw_kernel, *radii[:2], classes, maps[-2:], extent, steps, *others, ELLIPSES=len(radii) == 3)


@lru_cache(_KEPT_LAUNCHES)
def _prepare_boxes(
    maps: torch.Size,
    boxes: torch.Size,
    strides: tuple[tuple[int, ...], ...],
    corners: bool,
    mmdet: bool,
    min_radius: int,
    *others: Any,
) -> list[PreparedLaunch]:
    of_boxes, (counts,), *labels = strides
    last = min_radius, *of_boxes, *(labels[0] if labels else (0, 0)), counts
    classes = maps[1] if labels else 1
    constants = {"CORNERS": corners, "MMDET": mmdet}
    extent = _extent(boxes[:2], of_boxes, (counts,), *labels)
    return _prepare(_draw_boxes_kernel, *boxes[:2], classes, maps[-2:], extent, last, *others, **constants)


def _extent(targets: Sequence[int], *strides: Sequence[int]) -> int:
    """A bound of the offsets into tensors of these strides, whose first axes are those of the targets."""
    sizes = *targets, 4  # coordinates
    return max(sum(size * stride for size, stride in zip(sizes, of_tensor, strict=False)) for of_tensor in strides)


def _with_axis(strides: tuple[int, ...], axes: int) -> tuple[int, ...]:
    """Strides of radii, with one for x and y even if the radius is the same along both."""
    return strides if len(strides) == axes else (*strides, 0)


def prepare_heatmap(
    heatmaps: Tensor,  # (maps, H, W), contiguous
    centers: Tensor,  # (M, 2)
    radii: Tensor,  # (M,) or (M, 2)
    heatmap_idxes: Tensor,  # (M,), targets whose index is no map are skipped
    diameter_to_sigma_factor: float,
    k_scale: float,
    clear: bool,
) -> Callable[..., None]:
    """Make ``saccade.draw_heatmap`` for calls with these arguments, but for the values of the tensors."""
    strides = centers.stride(), radii.stride(), heatmap_idxes.stride()
    launches = _prepare_concatenated(
        heatmaps.shape, radii.shape, strides, heatmaps.dtype, heatmaps.device, not clear, k_scale > 0
    )
    falloff = _falloff_of(diameter_to_sigma_factor, heatmaps.dtype)
    clearing = _prepare_clearing(heatmaps.numel(), heatmaps.device) if clear else None

    def draw(heatmaps: Tensor, centers: Tensor, radii: Tensor, heatmap_idxes: Tensor, *_: Any) -> None:
        if clearing is not None:
            clearing((heatmaps,))
        for launch in launches:
            launch((heatmaps, centers, radii, heatmap_idxes, None), falloff, k_scale)

    return draw


def prepare_heatmap_batched(
    heatmap: Tensor,  # (B, H, W), or (B, C, H, W) with labels; contiguous
    centers: Tensor,  # (B, M, 2)
    radii: Tensor,  # (B, M) or (B, M, 2)
    counts: Tensor,  # (B,)
    labels: Tensor | None,  # (B, M), targets whose label is no class are skipped
    diameter_to_sigma_factor: float,
    k_scale: float,
    clear: bool,
) -> Callable[..., None]:
    """Make ``saccade.draw_heatmap_batched`` for calls with these arguments, but for the values of the tensors."""
    strides = centers.stride(), radii.stride(), counts.stride()
    if labels is not None:
        strides = *strides, labels.stride()
    launches = _prepare_batched(
        heatmap.shape, radii.shape, strides, heatmap.dtype, heatmap.device, not clear, k_scale > 0
    )
    falloff = _falloff_of(diameter_to_sigma_factor, heatmap.dtype)
    clearing = _prepare_clearing(heatmap.numel(), heatmap.device) if clear else None

    def draw(heatmap: Tensor, centers: Tensor, radii: Tensor, counts: Tensor, labels: Tensor | None, *_: Any) -> None:
        if clearing is not None:
            clearing((heatmap,))
        for launch in launches:
            launch((heatmap, centers, radii, labels, counts), falloff, k_scale)

    return draw


def draw_boxes(
    heatmap: Tensor,  # (B, H, W), or (B, C, H, W) with labels; contiguous, all zero
    boxes: Tensor,  # (B, M, 4)
    counts: Tensor,  # (B,)
    labels: Tensor | None,  # (B, M), boxes whose label is no class are skipped
    corners: bool,
    origin: Sequence[float],  # (x, y)
    stride: Sequence[float],  # (x, y)
    min_overlap: float,
    convention: str,
    min_radius: int,
    diameter_to_sigma_factor: float,
    k_scale: float,
) -> None:
    """See ``saccade.boxes_to_heatmap``."""
    strides = boxes.stride(), counts.stride()
    if labels is not None:
        strides = *strides, labels.stride()
    launches = _prepare_boxes(
        heatmap.shape, boxes.shape, strides, corners, convention == "mmdet", min_radius, heatmap.dtype, heatmap.device,
        False, k_scale > 0,
    )  # fmt: skip
    numbers = _falloff_of(diameter_to_sigma_factor, heatmap.dtype), k_scale, *origin, *stride, min_overlap
    for launch in launches:
        launch((heatmap, boxes, labels, counts), *numbers)


@lru_cache(_KEPT_LAUNCHES)
def _prepare_clearing(cells: int, device: torch.device) -> PreparedLaunch:
    grid = (triton.cdiv(cells, _CLEARED),)
    return _clear_kernel.prepare(grid, cells, BLOCK=_CLEARED, num_warps=_WARPS_TO_CLEAR, **overlapping(device))


def clear(heatmap: Tensor) -> None:
    """Write zeros to maps, contiguous and not empty."""
    _prepare_clearing(heatmap.numel(), heatmap.device)((heatmap,))


def _falloff_of(diameter_to_sigma_factor: float, dtype: torch.dtype) -> float:
    """What the exponent of 2 is at distance 1, times the square of the diameter; finite in ``dtype``."""
    return max(_FALLOFF_OF_FACTOR_1 * diameter_to_sigma_factor * diameter_to_sigma_factor, _LOWEST[dtype])
