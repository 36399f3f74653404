"""Gaussian heatmaps in plain PyTorch: the meaning of the operators, their CPU path and the oracle of their kernels.

The windows of all targets, cut to the map, are laid out one behind the other as one list of cells. Each entry of the
list finds its target by a binary search in the running sum of window sizes, so that no target costs more than its own
window.
"""

import torch
from torch import Tensor

# Coordinates and radii beyond this count as this, so that no sum or difference of two overflows int64.
_LIMIT = 2**62 - 1


def draw_heatmap(
    heatmaps: Tensor,  # (maps, H, W), contiguous
    centers: Tensor,  # (M, 2)
    radii: Tensor,  # (M,)
    heatmap_idxes: Tensor,  # (M,), targets whose index is no map are skipped
    diameter_to_sigma_factor: float,
    k_scale: float,
) -> None:
    """See ``saccade.draw_heatmap``."""
    maps, height, width = heatmaps.shape
    dtype = heatmaps.dtype
    heatmap_idxes = heatmap_idxes.long()
    x, y = centers.long().clamp(-_LIMIT, _LIMIT).unbind(-1)
    radius = radii.long().clamp(-_LIMIT, _LIMIT)
    top, left = (y - radius).clamp(min=0), (x - radius).clamp(min=0)
    rows = ((y + radius).clamp(max=height - 1) - top + 1).clamp(min=0)
    columns = ((x + radius).clamp(max=width - 1) - left + 1).clamp(min=0)
    area = torch.where((heatmap_idxes >= 0) & (heatmap_idxes < maps), rows * columns, 0)
    end = area.cumsum(0)  # of each target's window in the list of cells
    start = end - area
    # 1 / sigma, kept finite so that the product with the centre's offset of 0 is 0.
    sharpness = (diameter_to_sigma_factor / (2 * radius.to(dtype) + 1)).clamp(max=torch.finfo(dtype).max)

    if heatmaps.is_cuda:  # the number of cells is not known on the host: as many as there may be
        cells, block = len(radii) * height * width, 1 << 22
    else:
        cells, block = int(end[-1]), 1 << 16  # temporaries of a block stay in the cache
    for first in range(0, cells, block):
        cell = torch.arange(first, min(first + block, cells), device=heatmaps.device)
        target = torch.searchsorted(end, cell, right=True).clamp(max=len(radii) - 1)
        exists = cell < end[-1]
        offset = cell - start[target]
        across = columns[target].clamp(min=1)
        row, column = top[target] + offset // across, left[target] + offset % across
        position = (heatmap_idxes[target] * height + row) * width + column
        down, right = (row - y[target]).to(dtype), (column - x[target]).to(dtype)
        squared = (down * sharpness[target]).square() + (right * sharpness[target]).square()
        value = k_scale * torch.exp(-0.5 * squared)
        heatmaps.view(-1).scatter_reduce_(
            0,
            torch.where(exists, position, cell % heatmaps.numel()),
            torch.where(exists, value, -torch.inf),
            "amax",
        )


def draw_heatmap_batched(
    heatmap: Tensor,  # (B, H, W), or (B, C, H, W) with labels; contiguous
    centers: Tensor,  # (B, M, 2)
    radii: Tensor,  # (B, M)
    counts: Tensor,  # (B,)
    labels: Tensor | None,  # (B, M), targets whose label is no class are skipped
    diameter_to_sigma_factor: float,
    k_scale: float,
) -> None:
    """See ``saccade.draw_heatmap_batched``."""
    batch, slots = radii.shape
    drawn = valid_slots(counts, slots)
    heatmap_idxes = torch.arange(batch, device=heatmap.device)[:, None]
    if labels is not None:
        classes = heatmap.shape[1]
        drawn = drawn & (labels >= 0) & (labels < classes)
        heatmap_idxes = heatmap_idxes * classes + labels
    draw_heatmap(
        heatmap.view(-1, *heatmap.shape[-2:]),
        centers.flatten(0, 1),
        radii.flatten(),
        torch.where(drawn, heatmap_idxes, -1).flatten(),
        diameter_to_sigma_factor,
        k_scale,
    )


def valid_slots(counts: Tensor, slots: int) -> Tensor:
    """(B, M) bool: which slots hold a target, the first ``counts`` (B,) of each sample; the rest is padding."""
    return torch.arange(slots, device=counts.device) < counts[:, None].long()  # unsigned dtypes too
