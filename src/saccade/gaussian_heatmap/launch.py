"""How the kernels that draw heatmaps are launched."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from saccade.gaussian_heatmap.kernels import clear_kernel, draw_boxes_kernel, draw_kernel
from saccade.gaussian_heatmap.options import BoxOptions, new_maps
from saccade.operator.launch import TRITON_DTYPE, LaunchedKernel, PreparedLaunch, cdiv, dependent_launch


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

# Of a grid along its first axis, and along the two others, which hold the samples.
_MOST_PROGRAMS, _MOST_PROGRAMS_OF_LATER_AXES = 2**31 - 1, 2**15

_FALLOFF_OF_FACTOR_1 = -0.5 / math.log(2)
_LOWEST = {dtype: torch.finfo(dtype).min for dtype in TRITON_DTYPE}


def _launches(
    kernel: LaunchedKernel,
    heatmap: Tensor,  # (B, C, H, W)
    slots: int,
    strides: Sequence[Sequence[int]],  # of tensors that say something of each target, along samples and slots first
    last_arguments: Sequence[int],
    reads: bool,
    k_scale: float,
    **constants: bool,
) -> list[PreparedLaunch]:
    """Launches for so many targets of each sample; several where there are more than a grid has programs."""
    samples, maps, height, width = heatmap.shape
    targets = slots * samples
    if height * width <= _FEW_CELLS:
        tiling = _OF_SMALL_MAPS
    elif samples * maps * height * width < _CELLS_OF_SMALL_TARGETS * targets:
        tiling = _OF_MANY_TARGETS
    else:
        tiling = _OF_FEW_TARGETS
    parts = min(tiling.programs // targets, cdiv(height, tiling.height))
    log2_parts = max(1, parts).bit_length() - 1
    # 32 bits are enough if all offsets fit, of tiles that reach beyond the last map too, and one launch is all.
    cells = (samples * maps * height + (tiling.height << log2_parts)) * width + tiling.width
    sizes = samples, slots, 4  # coordinates
    extent = max(sum(size * step for size, step in zip(sizes, of_tensor, strict=False)) for of_tensor in strides)
    is_small = max(cells, extent, slots << log2_parts) < 2**31 and samples <= _MOST_PROGRAMS_OF_LATER_AXES
    samples_at_once = min(samples, _MOST_PROGRAMS_OF_LATER_AXES)
    at_once = _MOST_PROGRAMS >> log2_parts  # slots
    return [
        kernel.prepare(
            (min(at_once, slots - first_slot) << log2_parts, samples_at_once, cdiv(samples, samples_at_once)),
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
            POSITIVE=k_scale > 0,
            INDEX=tl.int32 if is_small else tl.int64,
            COMPUTE=TRITON_DTYPE[heatmap.dtype],
            num_warps=tiling.warps,
            enable_fp_fusion=False,  # equal bits, whichever kernel and tiling draw a cell; radii as the CPU has them
            **dependent_launch(heatmap.device),
        )
        for first_slot in range(0, slots, at_once)
    ]


def _prepare_drawing(
    kernel: LaunchedKernel,
    heatmap: Tensor,  # (B, C, H, W)
    slots: int,
    strides: Sequence[Sequence[int]],
    last_arguments: Sequence[int],
    clear: bool,
    count: int,
    numbers: tuple[float, ...],  # diameter_to_sigma_factor, k_scale, and what the kernel takes behind them
    **constants: bool,
) -> Callable[..., None]:
    """Make what draws, given the maps, the ``count`` tensors that the kernel takes behind them, and more."""
    factor, k_scale, *more = numbers
    # The exponent of 2 at distance 1, times the square of the diameter; finite in the dtype of the maps.
    falloff = max(_FALLOFF_OF_FACTOR_1 * factor * factor, _LOWEST[heatmap.dtype])
    launches = _launches(kernel, heatmap, slots, strides, last_arguments, not clear, k_scale, **constants)
    cells, options = heatmap.numel(), dependent_launch(heatmap.device)
    clearing = clear_kernel.prepare(
        (cdiv(cells, _CLEARED),), cells, BLOCK=_CLEARED, num_warps=_WARPS_TO_CLEAR, **options
    )

    of_kernel = falloff, k_scale, *more

    def draw(*args: Any) -> None:
        tensors = args[: count + 1]
        if clear:
            clearing(tensors[:1])
        for launch in launches:
            launch(tensors, *of_kernel)

    return draw


def _prepare_targets(
    heatmap: Tensor,  # (B, C, H, W)
    centers: Tensor,  # (B, M, 2)
    radii: Tensor,  # (B, M) or (B, M, 2)
    counts: Tensor | None,  # (B,)
    index: Tensor | None,  # (B, M), the map of each target
    diameter_to_sigma_factor: float,
    k_scale: float,
    clear: bool,
) -> Callable[..., None]:
    """Make what draws targets, given these five tensors with or without their first axis."""
    is_ellipse = radii.ndim == 3
    of_index, of_count = (0, 0) if index is None else index.stride(), 0 if counts is None else counts.stride(0)
    steps = *centers.stride(), *radii.stride(), *(() if is_ellipse else (0,)), *of_index, of_count
    strides = centers.stride(), radii.stride(), of_index, (of_count,)
    numbers = diameter_to_sigma_factor, k_scale
    return _prepare_drawing(
        draw_kernel, heatmap, radii.shape[1], strides, steps, clear, 4, numbers, ELLIPSES=is_ellipse
    )


def _into_new_maps(maps: Callable[[], Tensor], draw: Callable[..., None]) -> Callable[..., Tensor]:
    """What draws into maps of its own."""

    def targets(*args: Any) -> Tensor:
        heatmap = maps()
        draw(heatmap, *args)
        return heatmap

    return targets


def prepare_heatmap(
    heatmaps: Tensor,  # (maps, H, W), contiguous
    centers: Tensor,  # (M, 2)
    radii: Tensor,  # (M,) or (M, 2)
    heatmap_idxes: Tensor,  # (M,), targets whose index is no map are skipped
    *options: Any,
) -> Callable[..., None]:
    """Make ``saccade.draw_heatmap``: one sample, all of whose targets are drawn."""
    draw = _prepare_targets(heatmaps[None], centers[None], radii[None], None, heatmap_idxes[None], *options)

    def draw_sample(heatmaps: Tensor, centers: Tensor, radii: Tensor, heatmap_idxes: Tensor, *_: Any) -> None:
        draw(heatmaps, centers, radii, None, heatmap_idxes)

    return draw_sample


def prepare_heatmap_batched(
    heatmap: Tensor,  # (B, H, W), or (B, C, H, W) with labels; contiguous
    centers: Tensor,  # (B, M, 2)
    radii: Tensor,  # (B, M) or (B, M, 2)
    counts: Tensor,  # (B,)
    labels: Tensor | None,  # (B, M), targets whose label is no class are skipped
    *options: Any,
) -> Callable[..., None]:
    """Make ``saccade.draw_heatmap_batched``."""
    by_class = heatmap[:, None] if labels is None else heatmap
    return _prepare_targets(by_class, centers, radii, counts, labels, *options)


def prepare_heatmap_targets(
    centers: Tensor,
    radii: Tensor,
    counts: Tensor,
    labels: Tensor | None,
    size: Sequence[int],
    num_classes: int | None,
    diameter_to_sigma_factor: float,
    k_scale: float,
) -> Callable[..., Tensor] | None:
    """Make ``saccade.heatmap_targets``."""
    maps = partial(new_maps, centers.shape[0], size, num_classes, centers.device)
    if not maps().numel():
        return None
    draw = prepare_heatmap_batched(maps(), centers, radii, counts, labels, diameter_to_sigma_factor, k_scale, True)
    return _into_new_maps(maps, draw)


def prepare_boxes_to_heatmap(
    boxes: Tensor,  # (B, M, 4)
    counts: Tensor,  # (B,)
    labels: Tensor | None,  # (B, M), boxes whose label is no class are skipped
    size: Sequence[int],
    num_classes: int | None,
    diameter_to_sigma_factor: float,
    k_scale: float,
    options: BoxOptions,
) -> Callable[..., Tensor] | None:
    """Make ``saccade.boxes_to_heatmap``."""
    maps = partial(new_maps, boxes.shape[0], size, num_classes, boxes.device)
    heatmap = maps() if num_classes is not None else maps()[:, None]
    if not heatmap.numel():
        return None
    of_labels = (0, 0) if labels is None else labels.stride()
    last = options.min_radius, *boxes.stride(), *of_labels, counts.stride(0)
    strides = boxes.stride(), of_labels, counts.stride()
    numbers = diameter_to_sigma_factor, k_scale, *options.origin, *options.stride, options.min_overlap
    constants = {"CORNERS": options.box_format == "xyxy", "MMDET": options.radius == "mmdet"}
    draw = _prepare_drawing(draw_boxes_kernel, heatmap, boxes.shape[1], strides, last, True, 3, numbers, **constants)
    return _into_new_maps(maps, draw)
