"""Gaussian heatmaps in plain PyTorch: the meaning of the operators, their CPU path and the oracle of their kernels.

The windows of all targets, cut to the map, are laid out one behind the other as one list of cells. Each entry of the
list finds its target by a binary search in the running sum of window sizes, so that no target costs more than its own
window.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from saccade.gaussian_heatmap.options import BoxOptions, new_maps
from saccade.gaussian_heatmap.radius import radius_of


def draw_heatmap(
    heatmaps: Tensor,  # (maps, H, W), contiguous
    centers: Tensor,  # (M, 2)
    radii: Tensor,  # (M,) or (M, 2)
    heatmap_idxes: Tensor,  # (M,), targets whose index is no map are skipped
    diameter_to_sigma_factor: float,
    k_scale: float,
    clear: bool,
) -> None:
    """See ``saccade.draw_heatmap``."""
    if clear:
        heatmaps.zero_()
    if heatmaps.numel() == 0 or radii.numel() == 0:
        return
    maps, height, width = heatmaps.shape
    dtype = heatmaps.dtype
    heatmap_idxes = heatmap_idxes.long()
    x, y = centers.long().unbind(-1)
    radii = radii.long()
    across, down = radii.unbind(-1) if radii.dim() == 2 else (radii, radii)
    (top, rows), (left, columns) = _span(y, down, height), _span(x, across, width)
    area = torch.where((heatmap_idxes >= 0) & (heatmap_idxes < maps), rows * columns, 0)
    end = area.cumsum(0)  # of each target's window in the list of cells
    start = end - area
    # 1 / sigma, kept finite so that the product with the centre's offset of 0 is 0.
    sharp_down, sharp_across = (
        (diameter_to_sigma_factor / (2 * radius.to(dtype) + 1)).clamp(max=torch.finfo(dtype).max)
        for radius in (down, across)
    )

    if heatmaps.is_cuda:  # the number of cells is not known on the host: as many as there may be
        cells, block = len(radii) * height * width, 1 << 22
    else:
        cells, block = int(end[-1]), 1 << 16  # temporaries of a block stay in the cache
    for first in range(0, cells, block):
        cell = torch.arange(first, min(first + block, cells), device=heatmaps.device)
        target = torch.searchsorted(end, cell, right=True).clamp(max=len(radii) - 1)
        exists = cell < end[-1]
        offset = cell - start[target]
        in_a_row = columns[target].clamp(min=1)
        row, column = top[target] + offset // in_a_row, left[target] + offset % in_a_row
        position = (heatmap_idxes[target] * height + row) * width + column
        by_rows = (row - y[target]).to(dtype) * sharp_down[target]
        by_columns = (column - x[target]).to(dtype) * sharp_across[target]
        value = k_scale * torch.exp(-0.5 * (by_rows.square() + by_columns.square()))
        heatmaps.view(-1).scatter_reduce_(
            0,
            torch.where(exists, position, cell % heatmaps.numel()),
            torch.where(exists, value, -torch.inf),
            "amax",
        )


def _span(center: Tensor, radius: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """First cell of a window along one axis, cut to the map, and how many cells there are; whatever the numbers are."""
    first = torch.where(radius >= center, 0, center - radius)
    after = torch.where(center >= size - 1 - radius.clamp(min=0), size, center + radius + 1)
    return first, torch.where(radius >= 0, after - first, 0).clamp(min=0)


def draw_heatmap_batched(
    heatmap: Tensor,  # (B, H, W), or (B, C, H, W) with labels; contiguous
    centers: Tensor,  # (B, M, 2)
    radii: Tensor,  # (B, M) or (B, M, 2)
    counts: Tensor,  # (B,)
    labels: Tensor | None,  # (B, M), targets whose label is no class are skipped
    diameter_to_sigma_factor: float,
    k_scale: float,
    clear: bool,
) -> None:
    """See ``saccade.draw_heatmap_batched``."""
    batch, slots = radii.shape[:2]
    drawn = valid_slots(counts, slots)
    heatmap_idxes = torch.arange(batch, device=heatmap.device)[:, None]
    if labels is not None:
        classes = heatmap.shape[1]
        drawn = drawn & (labels >= 0) & (labels < classes)
        heatmap_idxes = heatmap_idxes * classes + labels
    draw_heatmap(
        heatmap.flatten(0, heatmap.ndim - 3),
        centers.flatten(0, 1),
        radii.flatten(0, 1),
        torch.where(drawn, heatmap_idxes, -1).flatten(),
        diameter_to_sigma_factor,
        k_scale,
        clear,
    )


def heatmap_targets(
    centers: Tensor,  # (B, M, 2)
    radii: Tensor,  # (B, M) or (B, M, 2)
    counts: Tensor,  # (B,)
    labels: Tensor | None,  # (B, M)
    size: Sequence[int],  # (height, width)
    num_classes: int | None,
    diameter_to_sigma_factor: float,
    k_scale: float,
) -> Tensor:
    """See ``saccade.heatmap_targets``."""
    heatmap = new_maps(centers.shape[0], size, num_classes, centers.device)
    draw_heatmap_batched(heatmap, centers, radii, counts, labels, diameter_to_sigma_factor, k_scale, clear=True)
    return heatmap


def boxes_to_heatmap(
    boxes: Tensor,  # (B, M, 4)
    counts: Tensor,  # (B,)
    labels: Tensor | None,  # (B, M)
    size: Sequence[int],  # (height, width)
    num_classes: int | None,
    diameter_to_sigma_factor: float,
    k_scale: float,
    options: BoxOptions,
) -> Tensor:
    """See ``saccade.boxes_to_heatmap``."""
    centers, radii = targets_of_boxes(boxes, size, options)
    return heatmap_targets(centers, radii, counts, labels, size, num_classes, diameter_to_sigma_factor, k_scale)


def targets_of_boxes(
    boxes: Tensor,  # (..., 4)
    size: Sequence[int],  # (height, width) of the map
    options: BoxOptions,
) -> tuple[Tensor, Tensor]:
    """Centres (..., 2) and radii (...) of boxes, int64; the radius is -1 where nothing is to be drawn."""
    origin, stride = options.origin, options.stride
    first_x, first_y, second_x, second_y = boxes.double().unbind(-1)
    if options.box_format == "xyxy":
        center_x, center_y = (first_x + second_x) / 2, (first_y + second_y) / 2
        width, height = second_x - first_x, second_y - first_y
    else:
        center_x, center_y, width, height = first_x, first_y, second_x, second_y
    center_x, center_y = (center_x - origin[0]) / stride[0], (center_y - origin[1]) / stride[1]
    width, height = width / stride[0], height / stride[1]
    # Coordinates are cut off towards zero: what is a little outside on the left is in the first column.
    drawn = (center_x > -1) & (center_x < size[1]) & (center_y > -1) & (center_y < size[0])
    drawn = drawn & (width > 0) & (height > 0)
    centers = torch.where(drawn[..., None], torch.stack([center_x, center_y], -1), 0.0).long()
    # So that products of sizes are finite; no map is that large.
    width, height = width.clamp(max=2.0**52), height.clamp(max=2.0**52)
    radii = radius_of(height, width, options.min_overlap, options.radius, torch.sqrt).long()
    return centers, torch.where(drawn, radii.clamp(min=options.min_radius), -1)


def valid_slots(counts: Tensor, slots: int) -> Tensor:
    """(B, M) bool: which slots hold a target, the first ``counts`` (B,) of each sample; the rest is padding."""
    return torch.arange(slots, device=counts.device) < counts[:, None].long()  # unsigned dtypes too
