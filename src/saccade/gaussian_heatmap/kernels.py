"""Triton kernels that draw Gaussian heatmaps.

A program has a target, or some of the tiles of its window. Cells are raised by atomic maxima, which give the same bits
in whatever order they come; a cell that is not exceeded is read, and not written. Fresh maps are cleared by a kernel of
this file and then drawn on without reading.

What bounds it (H200, redrawing and drawing fresh maps): on small maps, the launch and the path from numbers of targets
to their cells, two trips to memory: 48 x 20 x 50 cells with up to 50 targets each, 2.5 to 2.8 and 3.3 to 3.8 us, where
clearing alone takes 1.3; tiles of 8 x 8 to 16 x 16 cells and 1 or 2 warps make no difference there. On large maps the
clearing: 32 x 80 x 128 x 128 cells with up to 128 targets each, 10.6 and 53.7 us, where clearing alone takes 37.4.

What else was tried there:
- A warp for each of four targets of a program, offsets with 64 bits, divisions in float64: 4.6 and 6.0 us on the small
  maps, 22 and 58 us on the large ones. One target to a program and no divisions, but still offsets with 64 bits, and
  the driver's memset for clearing, which no dependent launch follows: 2.6 and 4.2 us, 12 and 59 us.
- Asking for the next tile's cells before this one is drawn: as fast on small maps, 12.0 us in place of 10.4 on large
  ones.
- Letting the next kernel begin at once, so that its blocks wait beside those at work: 3.5 us in place of 2.6 on the
  small maps, 10.8 in place of 7.7 where Gaussians are large.
"""

import triton
import triton.language as tl

from saccade.operator.launch import LaunchedKernel, wait_for_previous_kernel

# Nothing is compiled anew for other numbers of these. (It would be for strides in a tuple.)
_SIZES = ["samples", "first_slot", "log2_parts", "maps", "height", "width"]
_STRIDES_OF_TARGETS = ["center_sample", "center_slot", "center_axis", "radius_sample", "radius_slot", "radius_axis"]
_STRIDES_OF_BOXES = ["box_sample", "box_slot", "box_axis"]
_OTHER_STRIDES = ["index_sample", "index_slot", "count_sample"]


@LaunchedKernel
@triton.jit
def clear_kernel(heatmap, cells, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Write zeros: as fast as the driver does, and the kernel that draws is made ready meanwhile."""
    wait_for_previous_kernel(PDL)
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
def draw_kernel(
    heatmap, centers, radii, counts, indices, falloff: tl.float64, k_scale: tl.float64,
    samples, first_slot, log2_parts, maps, height, width, center_sample, center_slot, center_axis, radius_sample,
    radius_slot, radius_axis, index_sample, index_slot, count_sample,
    ELLIPSES: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, READS: tl.constexpr, POSITIVE: tl.constexpr,
    INDEX: tl.constexpr, COMPUTE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Draw targets with given centres and radii.

    Of the slots of a sample the first `counts` hold a target, or all if there are none; of its `maps`, `indices` say
    the target's, or there is one.
    """
    wait_for_previous_kernel(PDL)
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
def draw_boxes_kernel(
    heatmap, boxes, counts, labels, falloff: tl.float64, k_scale: tl.float64, origin_x: tl.float64,
    origin_y: tl.float64, stride_x: tl.float64, stride_y: tl.float64, overlap: tl.float64,
    samples, first_slot, log2_parts, maps, height, width, min_radius, box_sample, box_slot, box_axis, index_sample,
    index_slot, count_sample,
    CORNERS: tl.constexpr, MMDET: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, READS: tl.constexpr,
    POSITIVE: tl.constexpr, INDEX: tl.constexpr, COMPUTE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Draw targets whose centres and radii are those of boxes; each program that shares a target works them out."""
    wait_for_previous_kernel(PDL)
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
