"""The names of NVIDIA ACCV-Lab's ``accvlab.draw_heatmap`` and ``accvlab.batching_helpers``."""

from typing import Any

from torch import Tensor

from saccade import gaussian_heatmap
from saccade.ragged import RaggedBatch, combine_data

__all__ = ["RaggedBatch", "combine_data", "draw_heatmap", "draw_heatmap_batched"]


def draw_heatmap(
    heatmaps: Tensor,
    centers: Tensor,
    radii: Tensor,
    heatmap_idxes: Tensor,
    diameter_to_sigma_factor: float = 6.0,
    k_scale: float = 1.0,
) -> None:
    """``saccade.draw_heatmap``; also takes CPU tensors, float64 maps and int64 indices, which the original does not."""
    gaussian_heatmap.draw_heatmap(heatmaps, centers, radii, heatmap_idxes, diameter_to_sigma_factor, k_scale)


def draw_heatmap_batched(
    heatmap: Tensor,
    centers: Any,
    radii: Any,
    diameter_to_sigma_factor: float = 6.0,
    k_scale: float = 1.0,
    labels: Any = None,
) -> None:
    """``saccade.draw_heatmap_batched`` of ragged batches, ours or the original's."""
    gaussian_heatmap.draw_heatmap_batched(heatmap, centers, radii, diameter_to_sigma_factor, k_scale, labels)
