"""How the kernels of deformable aggregation, and of the format of its rows, are launched."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.deformable_aggregation.backward_kernels import (
    clear_kernel,
    combine_kernel,
    count_kernel,
    gather_kernel,
    join_kernel,
    order_and_split_kernel,
    place_kernel,
    scan_kernel,
)
from saccade.deformable_aggregation.formatting import as_maps, as_rows, blocks_of, cameras_of, index_tensors, new_rows
from saccade.deformable_aggregation.formatting_kernels import format_kernel
from saccade.deformable_aggregation.kernels import aggregate_kernel, plan_kernel, sum_parts_kernel
from saccade.operator.launch import (
    TRITON_DTYPE,
    LaunchOfParts,
    LaunchSequence,
    Part,
    Scratch,
    cdiv,
    dependent_launch,
    next_power_of_2,
)
from saccade.precision import compute_dtype

# By bytes of a feature: key points whose samples are listed together; warps that share an anchor's samples; and how
# many programs are enough, so that one sums all of an anchor's segments. What was fastest on an H200.
_SEGMENT = {2: 8, 4: 32, 8: 32}
_WARPS = {2: 2, 4: 8, 8: 8}
_ENOUGH_PROGRAMS = {2: 16384, 4: 8192, 8: 8192}

# Scratch memory, forward and backward: an eighth of what features and weights and their gradients take, or this much;
# and where one sample of the batch needs more, as much as that.
_SCRATCH_SHARE, _SCRATCH_BYTES = 0.125, 200 << 20

# So that four blocks of eight warps fit on a multiprocessor; AMD's compiler has no such option.
_REGISTERS = {} if torch.version.hip else {"maxnreg": 56}

# Rows of features that a window has on average: enough windows that the last ones to finish leave no GPU idle.
_ROWS_OF_WINDOW = 22

# Of memory that is cleared, and of rows whose counts are summed up: how many a program takes; more where there are many
# rows, as each program looks at what all before it have said.
_CLEARED = 4096
_SCANNED, _MOST_SCANNED = 1024, 8192

# From this many rows or records on, they are counted with 64 bits. Blocks of them may reach beyond the last one.
_MOST_FOR_32_BITS = 2**31 - 2**10

# Of the format: enough in flight to keep the memory busy, with room for several programs on a multiprocessor.
_TILE_BYTES = 16384
_MOST_TILE_CHANNELS = 64


def _row_tile(channels: int, groups: int, itemsize: int) -> dict[str, int]:
    """How one warp reads a row of features: each thread 16 bytes at a time of the channels of one group."""
    block_g, block_c = next_power_of_2(groups), next_power_of_2(channels // groups)
    at_once = min(block_c, 16 // itemsize * max(1, 32 // block_g))
    return dict(BLOCK_H=block_c // at_once, BLOCK_G=block_g, BLOCK_C=at_once)


def _samples_at_once(maps: Sequence[Tensor], weights: Tensor, bytes_of_sample: int) -> int:
    """How many samples of the batch are worked on at a time, so that scratch memory stays within bounds."""
    batch = weights.shape[0]
    budget = max(_SCRATCH_BYTES, int(_SCRATCH_SHARE * 2 * (sum(m.nbytes for m in maps) + weights.nbytes)))
    at_most = max(1, min(batch, budget // bytes_of_sample))
    return cdiv(batch, cdiv(batch, at_most))  # in equal parts


def _inputs_of(
    feature_maps: Sequence[Tensor],
    spatial_shape: Tensor | None,
    scale_start_index: Tensor | None,
    *points: Tensor,  # sampling_location, weights
) -> Callable[..., list[Tensor]]:
    """Make what gives, for the arguments of calls like this one, the contiguous tensors that kernels read.

    These are spatial_shape (N, L, 2), scale_start_index (N, L), sampling_location (B, A, K, N, 2) and
    weights (B, A, K, N, L, G); behind them the maps: one (B, S, C), or for each level (B, rows of the level, C).
    """
    if spatial_shape is None or scale_start_index is None:
        cameras = cameras_of(len(feature_maps), feature_maps)
        are_rows = all(feature.permute(0, 1, 3, 4, 2).is_contiguous() for feature in feature_maps)
        are_contiguous = all(tensor.is_contiguous() for tensor in points)

        def of_maps(maps: Sequence[Tensor], _: None, __: None, *points: Tensor) -> list[Tensor]:
            if not are_contiguous:
                points = tuple(tensor.contiguous() for tensor in points)
            rows = maps if are_rows else [of_map.contiguous() for of_map in as_rows(maps)]
            return [*index_tensors(cameras, maps[0], by_level=True), *points, *rows]

        return of_maps
    are_contiguous = all(t.is_contiguous() for t in (*feature_maps, spatial_shape, scale_start_index, *points))

    def of_rows(maps: Sequence[Tensor], *rest: Tensor) -> list[Tensor]:
        return [*rest, *maps] if are_contiguous else [tensor.contiguous() for tensor in (*rest, *maps)]

    return of_rows


class _Sizes(NamedTuple):
    """What kernels are told of a call's locations, weights and maps."""

    channels: int
    map_rows: tuple[int, ...]  # of each map, of one sample
    bytes_of: list[int]  # of locations, weights and each map, of one sample
    dtype: torch.dtype  # to compute in


def _sizes_of(maps: Sequence[Tensor], location: Tensor, weights: Tensor) -> _Sizes:
    batch, channels = weights.shape[0], maps[0].shape[2]  # of (B, S, C) and of (B, N, C, H, W)
    map_rows = tuple(each.numel() // (batch * channels) for each in maps)
    bytes_of = [tensor.nbytes // batch for tensor in (location, weights, *maps)]
    return _Sizes(channels, map_rows, bytes_of, compute_dtype(maps[0], location, weights))


def prepare_aggregation(*args: Any) -> Callable[..., Tensor]:
    """Make ``saccade.deformable_aggregation``."""
    maps, _, _, location, weights = args
    inputs_of = _inputs_of(*args)
    batch, anchors, points, cameras, levels, groups = weights.shape
    channels, map_rows, bytes_of, dtype = _sizes_of(maps, location, weights)
    itemsize = maps[0].element_size()
    few = max(*map_rows, points * cameras * levels) < 2**30  # few enough that 32 bits count them
    row_dtype = torch.int32 if few else torch.int64

    segment, warps = min(_SEGMENT[itemsize], next_power_of_2(points)), _WARPS[itemsize]
    segments = cdiv(points, segment)
    listed = anchors * segments * segment * cameras * levels  # of a sample of the batch, at most
    at_once = _samples_at_once(maps, weights, listed * 4 * (row_dtype.itemsize + dtype.itemsize))
    parts = max(1, min(segments, _ENOUGH_PROGRAMS[itemsize] // (at_once * anchors)))

    # The tensors of the launches: output, scratch memory, and the inputs.
    scratch = Scratch(1)
    counts = scratch.part(at_once * anchors * segments, torch.int32)
    corner_rows, shares = (scratch.part(at_once * listed * 4, of_each) for of_each in (row_dtype, dtype))
    sums = scratch.part(at_once * anchors * channels * parts if parts > 1 else 0, dtype)
    of_maps = Part(2), Part(3)

    tile = _row_tile(channels, groups, itemsize)
    limits_registers = (
        dtype == torch.float32 and itemsize == 4 and tile["BLOCK_H"] * tile["BLOCK_G"] * tile["BLOCK_C"] <= 256
    )
    limits_registers &= groups <= 128  # the addresses of so many weights take registers, too
    dependent = dependent_launch(weights.device)
    of_points = dict(K=points, N=cameras, L=levels, SEGMENT=segment, COMPUTE=TRITON_DTYPE[dtype], **dependent)
    launches = []
    for first in range(0, batch, at_once):
        location_here, weight, *maps_here = (Part(4 + n, first * size) for n, size in enumerate(bytes_of))
        of_chunk = min(at_once, batch - first) * anchors
        target, elements = Part(0, first * anchors * channels * itemsize), of_chunk * channels
        launches += [
            plan_kernel.of_parts(
                (of_chunk * segments,), *of_maps, location_here, counts, corner_rows, shares, map_rows,
                BLOCK_N=min(64, next_power_of_2(cameras)), BLOCK_L=next_power_of_2(levels), **of_points,
                num_warps=1, enable_fp_fusion=False,
            ),
            aggregate_kernel.of_parts(
                (of_chunk * parts,), tuple(maps_here), weight, counts, corner_rows, shares,
                sums if parts > 1 else target, anchors, parts, map_rows,
                G=groups, C=channels, **tile, WARPS=warps, **of_points,
                num_warps=warps, **(_REGISTERS if limits_registers else {}),
            ),
        ]  # fmt: skip
        if parts > 1:
            grid = (cdiv(elements, 1024),)
            launches.append(sum_parts_kernel.of_parts(grid, sums, target, elements, parts, BLOCK=1024, **dependent))
    launch = LaunchSequence(4 + len(bytes_of), launches)

    def aggregate(feature_maps: Sequence[Tensor], *rest: Tensor | None) -> Tensor:
        output = feature_maps[0].new_empty(batch, anchors, channels)
        launch([output, output.new_empty(scratch.bytes, dtype=torch.uint8), *inputs_of(feature_maps, *rest)])
        return output

    return aggregate


def _layouts_of_gradients(
    needs: Sequence[bool],
    maps: Sequence[Tensor],
    spatial_shape: Tensor | None,
    scale_start_index: Tensor | None,
    *points: Tensor,  # sampling_location, weights
) -> list[tuple[torch.Size, tuple[int, ...]]]:
    """Sizes and strides of the gradients of locations, weights and maps; of empty tensors where none is needed."""
    location, weights, *maps = (tensor.to("meta") for tensor in (*points, *maps))
    rows = as_rows(maps) if spatial_shape is None else maps
    gradients = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (location, weights, *rows)]
    if spatial_shape is None:
        gradients[2:] = as_maps(gradients[2:], maps)
    layouts = [each if need else each.new_empty(0) for each, need in zip(gradients, needs, strict=True)]
    return [(each.shape, each.stride()) for each in layouts]


def prepare_aggregation_backward(
    grad_output: Tensor,  # (B, A, C)
    *args_and_needed: Any,
) -> Callable[..., tuple[Tensor, Tensor, Sequence[Tensor]]]:
    """Make the gradients of locations, weights and maps; an empty tensor for one that is not needed."""
    *args, (need_location, need_weights, need_features) = args_and_needed
    maps, _, _, location, weights = args
    inputs_of = _inputs_of(*args)
    batch, anchors, points, cameras, levels, groups = weights.shape
    channels, map_rows, bytes_of, dtype = _sizes_of(maps, location, weights)
    need_rest = need_location or need_weights

    of_sample = anchors * points * cameras * levels * 2  # records
    windows_of_sample = cdiv(sum(map_rows), _ROWS_OF_WINDOW)
    bytes_of_record = 2 * 4 + dtype.itemsize * (3 + (groups + 1 if need_rest else 0))
    bytes_of_rows = sum(map_rows) * 4 + (windows_of_sample * 4 * channels * dtype.itemsize if need_features else 0)
    at_once = _samples_at_once(maps, weights, of_sample * bytes_of_record + bytes_of_rows)
    most_records, most_rows = at_once * of_sample, at_once * sum(map_rows)
    index = torch.int32 if max(most_records, most_rows) < _MOST_FOR_32_BITS else torch.int64
    most_windows = at_once * windows_of_sample
    scanned = min(max(_SCANNED, next_power_of_2(most_rows // 1024 + 1)), _MOST_SCANNED)  # rows of a program

    # The tensors of the launches: grad_output, scratch memory, the inputs, and what is written.
    scratch = Scratch(1)
    sums, begins = scratch.part(2 + cdiv(most_rows, scanned), torch.int64), scratch.part(most_rows + 1, index)
    placed, ordered = scratch.part(most_records, index), scratch.part(most_records, index)
    shares = scratch.part(most_records * 3, dtype)
    along = scratch.part(most_records * groups if need_rest else 0, dtype)
    across = scratch.part(most_records if need_rest else 0, dtype)
    window_rows, window_positions = scratch.part(most_windows + 1, index), scratch.part(most_windows + 1, index)
    partial = scratch.part(most_windows * 4 * channels if need_features else 0, dtype)
    slots = ordered  # which is not in use while places are dealt out
    of_maps = Part(2), Part(3)

    block_l, block_g = next_power_of_2(levels), next_power_of_2(groups)
    few_points = max(1, min(8, 512 // (block_l * block_g)))  # as many as registers hold
    tile = _row_tile(channels, groups, maps[0].element_size())
    dependent = dependent_launch(weights.device)
    of_points = dict(N=cameras, L=levels, COMPUTE=TRITON_DTYPE[dtype], enable_fp_fusion=False, **dependent)
    launches = []
    for first in range(0, batch, at_once):
        location_here, weight, *maps_here = (Part(4 + n, first * size) for n, size in enumerate(bytes_of))
        incoming = Part(0, first * anchors * channels * grad_output.element_size())
        written = [Part(4 + len(bytes_of) + n, first * size) for n, size in enumerate(bytes_of)]
        maps_here = tuple(maps_here)
        grad_maps = tuple(written[2:]) if need_features else maps_here  # which are not written
        samples = min(at_once, batch - first)
        rows, of_batch = samples * sum(map_rows), samples * anchors * points
        windows = samples * windows_of_sample
        blocks = (cdiv(of_batch, 32) * cameras,)
        sizes = (of_batch, anchors * points, samples, map_rows)
        # The sums and the counts, which lie one behind the other.
        cleared = (begins.begin - sums.begin + (rows + 1) * index.itemsize) // 4
        ordering = min(cdiv(samples * of_sample, 128), 2048)
        launches += [
            clear_kernel.of_parts(
                (cdiv(cleared, _CLEARED),), sums._replace(dtype=torch.int32), cleared, BLOCK=_CLEARED, **dependent
            ),
            count_kernel.of_parts(
                blocks, *of_maps, location_here, begins, slots, *sizes,
                BLOCK_L=block_l, BLOCK=32, **of_points,
                num_warps=2 if index == torch.int32 else 4,  # with 64 bits in 2 warps, Triton 3.9 spills
            ),
            scan_kernel.of_parts(
                (cdiv(rows + 1, scanned),), begins, sums, rows + 1, BLOCK=scanned, BESIDE=256,
                num_warps=max(4, scanned // 512), **dependent
            ),
            place_kernel.of_parts(
                blocks, *of_maps, location_here, begins, slots, placed, *sizes,
                BLOCK_L=block_l, BLOCK=32, **of_points, num_warps=4,
            ),
            order_and_split_kernel.of_parts(
                (cdiv(windows + 1, 4) + ordering,), *of_maps, location_here, begins, placed, ordered, shares,
                window_rows, window_positions, rows, windows, anchors * points * cameras, samples, map_rows,
                BLOCK=128, COST=3, WINDOWS=4, **of_points,
            ),
            gather_kernel.of_parts(
                (windows,), maps_here, incoming, weight, begins, ordered, shares, window_rows, window_positions,
                grad_maps, partial, along, across, samples, map_rows,
                PAIRS=points * cameras, L=levels, G=groups, C=channels, **tile,
                NEED_FEATURES=need_features, NEED_REST=need_rest, COMPUTE=TRITON_DTYPE[dtype], num_warps=1,
                **dependent,
            ),
        ]  # fmt: skip
        if need_features:
            launches.append(join_kernel.of_parts(
                (windows,), begins, window_rows, window_positions, partial, grad_maps, rows, windows, samples, map_rows,
                C=channels, BLOCK_C=next_power_of_2(channels), AHEAD=2, COMPUTE=TRITON_DTYPE[dtype],
                num_warps=1, **dependent,
            ))  # fmt: skip
        if need_rest:
            launches.append(combine_kernel.of_parts(
                (cdiv(of_batch, few_points) * cameras,), *of_maps, location_here, weight, along, across,
                written[0] if need_location else location_here, written[1] if need_weights else weight,
                of_batch, map_rows, G=groups, BLOCK_L=block_l, BLOCK_G=block_g, BLOCK=few_points,
                NEED_LOCATION=need_location, NEED_WEIGHTS=need_weights, **of_points, num_warps=2,
            ))  # fmt: skip
    launch = LaunchSequence(4 + 2 * len(bytes_of), launches)
    is_contiguous = grad_output.is_contiguous()
    written_to = _layouts_of_gradients((need_location, need_weights, *[need_features] * len(maps)), *args)

    def backward(grad_output: Tensor, *args: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
        feature_maps, _, _, *points, _ = args
        of = zip((*points, *feature_maps), written_to, strict=True)
        written = [tensor.new_empty_strided(*layout) for tensor, layout in of]
        memory = grad_output.new_empty(scratch.bytes, dtype=torch.uint8)
        incoming = grad_output if is_contiguous else grad_output.contiguous()
        launch([incoming, memory, *inputs_of(*args[:-1]), *written])
        return written[0], written[1], written[2:]

    return backward


def prepare_format(levels: int, feature_maps: Sequence[Tensor]) -> Callable[..., Tensor] | None:
    """Make ``saccade.feature_maps_format`` of maps whose pixels are innermost in memory."""
    if not all(feature.is_contiguous() for feature in feature_maps):
        return None
    rows = new_rows(levels, [feature.to("meta") for feature in feature_maps])
    shape, dtype = rows.shape, rows.dtype
    launches = []
    for number, block in enumerate(blocks_of(rows, cameras_of(levels, feature_maps))):
        if block.numel():
            first = number * levels
            launches.append(_format_rows(first + 1, feature_maps[first : first + levels], block))
    launch = LaunchSequence(1 + len(feature_maps), launches)

    def format_maps(levels: int, feature_maps: Sequence[Tensor]) -> Tensor:
        rows = feature_maps[0].new_empty(shape, dtype=dtype)
        launch([rows, *feature_maps])
        return rows

    return format_maps


def _format_rows(first: int, maps: Sequence[Tensor], rows: Tensor) -> LaunchOfParts:
    """Make what writes the rows of one group of cameras.

    Args:
        first: Position of the first map among the tensors of the launch, behind all rows.
        maps: L contiguous maps (B, N, C, H_l, W_l).
        rows: (B, N, sum of H_l * W_l, C) to write to; each batch element contiguous.
    """
    batch, cameras, _, channels = rows.shape
    tile_channels = min(next_power_of_2(channels), _MOST_TILE_CHANNELS)
    tile_pixels = _TILE_BYTES // rows.element_size() // tile_channels
    areas = tuple(feature.shape[3] * feature.shape[4] for feature in maps)
    tiles = sum(cdiv(area, tile_pixels) for area in areas) * cdiv(channels, tile_channels)
    return format_kernel.of_parts(
        (batch * cameras * tiles,),
        tuple(Part(first + level) for level in range(len(maps))),
        areas,
        Part(0, int(rows.storage_offset()) * rows.element_size()),
        rows.stride(0) // channels,
        CAMERAS=cameras,
        CHANNELS=channels,
        TILE_PIXELS=tile_pixels,
        TILE_CHANNELS=tile_channels,
        # For each level of another dtype there is code with registers of its own.
        num_warps=4 if len({feature.dtype for feature in maps}) == 1 else 8,
    )
