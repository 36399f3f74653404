"""How the kernels of deformable aggregation, and of the format of its rows, are launched."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from saccade.deformable_aggregation.backward_kernels import (
    combine_kernel,
    count_kernel,
    gather_kernel,
    join_kernel,
    order_and_split_kernel,
    place_kernel,
)
from saccade.deformable_aggregation.formatting import as_maps, as_rows, blocks_of, cameras_of, index_tensors, new_rows
from saccade.deformable_aggregation.formatting_kernels import format_kernel
from saccade.deformable_aggregation.kernels import aggregate_kernel, plan_kernel, sum_parts_kernel
from saccade.operator.launch import TRITON_DTYPE, cdiv, dependent_launch, next_power_of_2, on_device_of
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


def aggregate(
    maps: Sequence[Tensor],  # one (B, S, C), or for each level (B, rows of the level, C)
    spatial_shape: Tensor,  # (N, L, 2)
    scale_start_index: Tensor,  # (N, L), rows within the map that holds the level
    sampling_location: Tensor,  # (B, A, K, N, 2)
    weights: Tensor,  # (B, A, K, N, L, G)
) -> Tensor:  # (B, A, C)
    """See ``saccade.deformable_aggregation``."""
    batch, anchors, points, cameras, levels, groups = weights.shape
    channels, itemsize = maps[0].shape[2], maps[0].element_size()
    dtype = compute_dtype(maps[0], sampling_location, weights)
    output = maps[0].new_empty(batch, anchors, channels)
    maps, of_maps = [m.contiguous() for m in maps], (spatial_shape.contiguous(), scale_start_index.contiguous())
    sampling_location, weights = sampling_location.contiguous(), weights.contiguous()
    map_rows = tuple(m.shape[1] for m in maps)
    few = max(*map_rows, points * cameras * levels) < 2**30  # few enough that 32 bits count them
    row_dtype = torch.int32 if few else torch.int64

    segment, warps = min(_SEGMENT[itemsize], next_power_of_2(points)), _WARPS[itemsize]
    segments = cdiv(points, segment)
    listed = anchors * segments * segment * cameras * levels  # of a sample of the batch, at most
    at_once = _samples_at_once(maps, weights, listed * 4 * (row_dtype.itemsize + dtype.itemsize))
    parts = max(1, min(segments, _ENOUGH_PROGRAMS[itemsize] // (at_once * anchors)))
    new_empty = maps[0].new_empty
    counts = new_empty(at_once * anchors * segments, dtype=torch.int32)
    corner_rows, shares = (new_empty(at_once * listed, 4, dtype=of_each) for of_each in (row_dtype, dtype))
    sums = new_empty(parts if parts > 1 else 0, at_once, anchors, channels, dtype=dtype)

    tile = _row_tile(channels, groups, itemsize)
    limits_registers = (
        dtype == torch.float32 and itemsize == 4 and tile["BLOCK_H"] * tile["BLOCK_G"] * tile["BLOCK_C"] <= 256
    )
    limits_registers &= groups <= 128  # the addresses of so many weights take registers, too
    dependent = dependent_launch(output.device)
    of_points = dict(K=points, N=cameras, L=levels, SEGMENT=segment, COMPUTE=TRITON_DTYPE[dtype], **dependent)
    for b in range(0, batch, at_once):
        of_chunk = min(at_once, batch - b) * anchors
        target = output[b : b + at_once]
        with on_device_of(output):
            plan_kernel[(of_chunk * segments,)](
                *of_maps, sampling_location[b:], counts, corner_rows, shares, map_rows,
                BLOCK_N=min(64, next_power_of_2(cameras)), BLOCK_L=next_power_of_2(levels), **of_points,
                num_warps=1, enable_fp_fusion=False,
            )  # fmt: skip
            aggregate_kernel[(of_chunk * parts,)](
                tuple(m[b:] for m in maps), weights[b:], counts, corner_rows, shares, sums if parts > 1 else target,
                anchors, parts, map_rows, G=groups, C=channels, **tile, WARPS=warps, **of_points,
                num_warps=warps, **(_REGISTERS if limits_registers else {}),
            )  # fmt: skip
            if parts > 1:
                grid = (cdiv(target.numel(), 1024),)
                sum_parts_kernel[grid](sums, target, target.numel(), parts, BLOCK=1024, **dependent)
    return output


def aggregate_backward(
    grad_output: Tensor,  # (B, A, C)
    maps: Sequence[Tensor],  # one (B, S, C), or for each level (B, rows of the level, C)
    spatial_shape: Tensor,  # (N, L, 2)
    scale_start_index: Tensor,  # (N, L), rows within the map that holds the level
    sampling_location: Tensor,  # (B, A, K, N, 2)
    weights: Tensor,  # (B, A, K, N, L, G)
    needed: Sequence[bool],  # features, locations, weights
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Gradients of maps, locations and weights; an empty tensor for one that is not needed."""
    batch, anchors, points, cameras, levels, groups = weights.shape
    channels = maps[0].shape[2]
    need_features, need_location, need_weights = needed
    need_rest = need_location or need_weights
    dtype = compute_dtype(maps[0], sampling_location, weights)
    grad_maps = [m.new_empty(m.shape if need_features else 0) for m in maps]
    grad_location = sampling_location.new_empty(sampling_location.shape if need_location else 0)
    grad_weights = weights.new_empty(weights.shape if need_weights else 0)

    maps, grad_output = [m.contiguous() for m in maps], grad_output.contiguous()
    sampling_location, weights = sampling_location.contiguous(), weights.contiguous()
    of_maps = (spatial_shape.contiguous(), scale_start_index.contiguous())
    map_rows = tuple(m.shape[1] for m in maps)
    of_sample = anchors * points * cameras * levels * 2  # records
    windows_of_sample = cdiv(sum(map_rows), _ROWS_OF_WINDOW)
    bytes_of_record = 2 * 4 + dtype.itemsize * (3 + (groups + 1 if need_rest else 0))
    bytes_of_rows = sum(map_rows) * 2 * 4 + (windows_of_sample * 4 * channels * dtype.itemsize if need_features else 0)
    at_once = _samples_at_once(maps, weights, of_sample * bytes_of_record + bytes_of_rows)
    most_records, most_rows = at_once * of_sample, at_once * sum(map_rows)
    index = torch.int32 if max(most_records, most_rows) < _MOST_FOR_32_BITS else torch.int64
    windows = at_once * windows_of_sample

    new_empty = maps[0].new_empty
    counts = new_empty(most_rows + 1, dtype=torch.int32)
    placed, ordered = new_empty(most_records, dtype=index), new_empty(most_records, dtype=index)
    shares = new_empty(most_records, 3, dtype=dtype)
    along = new_empty(most_records if need_rest else 0, groups, dtype=dtype)
    across = new_empty(most_records if need_rest else 0, dtype=dtype)
    window_rows, window_positions = new_empty(windows + 1, dtype=index), new_empty(windows + 1, dtype=index)
    partial = new_empty(windows if need_features else 0, 4, channels, dtype=dtype)

    block_l, block_g = next_power_of_2(levels), next_power_of_2(groups)
    few_points = max(1, min(8, 512 // (block_l * block_g)))  # as many as registers hold
    dependent = dependent_launch(grad_output.device)
    of_points = dict(N=cameras, L=levels, COMPUTE=TRITON_DTYPE[dtype], enable_fp_fusion=False, **dependent)
    for b in range(0, batch, at_once):
        samples = min(at_once, batch - b)
        rows, of_batch = samples * sum(map_rows), samples * anchors * points
        location, weight = sampling_location[b:], weights[b:]
        maps_here = tuple(m[b:] for m in maps)
        grads_here = tuple(grad[b:] for grad in grad_maps) if need_features else maps_here  # which are not written
        blocks = (cdiv(of_batch, 32) * cameras,)
        sizes = (of_batch, anchors * points, samples, map_rows)
        with on_device_of(grad_output):
            counts.zero_()
            slots = ordered  # which is not in use yet
            count_kernel[blocks](
                *of_maps, location, counts, slots, *sizes, BLOCK_L=block_l, BLOCK=32, **of_points, num_warps=2
            )
            begins = torch.cumsum(counts[: rows + 1], 0, dtype=index)
            place_kernel[blocks](
                *of_maps, location, begins, slots, placed, *sizes, BLOCK_L=block_l, BLOCK=32, **of_points, num_warps=4
            )
            ordering = min(cdiv(samples * of_sample, 128), 2048)
            order_and_split_kernel[(cdiv(windows + 1, 4) + ordering,)](
                *of_maps, location, begins, placed, ordered, shares, window_rows, window_positions, rows, windows,
                anchors * points * cameras, samples, map_rows, BLOCK=128, COST=3, WINDOWS=4, **of_points,
            )  # fmt: skip
            gather_kernel[(windows,)](
                maps_here, grad_output[b:], weight, begins, ordered, shares, window_rows, window_positions,
                grads_here, partial, along, across, samples, map_rows,
                PAIRS=points * cameras, L=levels, G=groups, C=channels,
                **_row_tile(channels, groups, maps[0].element_size()),
                NEED_FEATURES=need_features, NEED_REST=need_rest, COMPUTE=TRITON_DTYPE[dtype], num_warps=1,
                **dependent,
            )  # fmt: skip
            if need_features:
                join_kernel[(windows,)](
                    begins, window_rows, window_positions, partial, grads_here, rows, windows, samples, map_rows,
                    C=channels, BLOCK_C=next_power_of_2(channels), AHEAD=2, COMPUTE=TRITON_DTYPE[dtype],
                    num_warps=1, **dependent,
                )  # fmt: skip
            if need_rest:
                combine_kernel[(cdiv(of_batch, few_points) * cameras,)](
                    *of_maps, location, weight, along, across, grad_location[b:], grad_weights[b:], of_batch, map_rows,
                    G=groups, BLOCK_L=block_l, BLOCK_G=block_g, BLOCK=few_points,
                    NEED_LOCATION=need_location, NEED_WEIGHTS=need_weights, **of_points, num_warps=2,
                )  # fmt: skip
    return grad_maps, grad_location, grad_weights


def _levels(
    feature_maps: Sequence[Tensor], spatial_shape: Tensor | None, scale_start_index: Tensor | None
) -> tuple[Sequence[Tensor], Tensor, Tensor]:
    """The pixels of all maps as rows, or of each level, with their sizes and where in it they begin."""
    if spatial_shape is None or scale_start_index is None:
        cameras = cameras_of(len(feature_maps), feature_maps)
        return as_rows(feature_maps), *index_tensors(cameras, feature_maps[0], by_level=True)
    return feature_maps, spatial_shape, scale_start_index


def prepare_aggregation(*_: Any) -> Callable[..., Tensor]:
    """Make ``saccade.deformable_aggregation``: sizes of its launches are worked out at each call."""
    return lambda maps, shape, start, location, weights: aggregate(*_levels(maps, shape, start), location, weights)


def prepare_aggregation_backward(*_: Any) -> Callable[..., tuple[Tensor, Tensor, Sequence[Tensor]]]:
    """Make its gradients, likewise."""

    def backward(
        grad_output: Tensor,
        feature_maps: Sequence[Tensor],
        spatial_shape: Tensor | None,
        scale_start_index: Tensor | None,
        sampling_location: Tensor,
        weights: Tensor,
        needed: list[bool],
    ) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        *of_points, of_features = needed
        inputs = *_levels(feature_maps, spatial_shape, scale_start_index), sampling_location, weights
        grad_maps, grad_location, grad_weights = aggregate_backward(grad_output, *inputs, [of_features, *of_points])
        if spatial_shape is None and of_features:
            grad_maps = as_maps(grad_maps, feature_maps)
        return grad_location, grad_weights, grad_maps

    return backward


def prepare_format(levels: int, feature_maps: Sequence[Tensor]) -> Callable[..., Tensor] | None:
    """Make ``saccade.feature_maps_format`` of maps whose pixels are innermost in memory."""
    if not all(feature.is_contiguous() for feature in feature_maps):
        return None

    def format_maps(levels: int, feature_maps: Sequence[Tensor]) -> Tensor:
        rows = new_rows(levels, feature_maps)
        for number, block in enumerate(blocks_of(rows, cameras_of(levels, feature_maps))):
            _format_rows(feature_maps[number * levels : (number + 1) * levels], block)
        return rows

    return format_maps


def _format_rows(maps: Sequence[Tensor], rows: Tensor) -> None:
    """Write the rows of one group of cameras.

    Args:
        maps: L contiguous maps (B, N, C, H_l, W_l).
        rows: (B, N, sum of H_l * W_l, C) to write to; each batch element contiguous.
    """
    if rows.numel() == 0:
        return
    batch, cameras, _, channels = rows.shape
    tile_channels = min(next_power_of_2(channels), _MOST_TILE_CHANNELS)
    tile_pixels = _TILE_BYTES // rows.element_size() // tile_channels
    areas = tuple(feature.shape[3] * feature.shape[4] for feature in maps)
    tiles = sum(cdiv(area, tile_pixels) for area in areas) * cdiv(channels, tile_channels)
    with on_device_of(rows):
        format_kernel[(batch * cameras * tiles,)](
            tuple(maps),
            areas,
            rows,
            rows.stride(0) // channels,
            CAMERAS=cameras,
            CHANNELS=channels,
            TILE_PIXELS=tile_pixels,
            TILE_CHANNELS=tile_channels,
            # For each level of another dtype there is code with registers of its own.
            num_warps=4 if len({feature.dtype for feature in maps}) == 1 else 8,
        )
