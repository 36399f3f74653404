"""The names of NVIDIA ACCV-Lab's ``accvlab.draw_heatmap`` and ``accvlab.batching_helpers``."""

from typing import Any

from torch import Tensor

from saccade import gaussian_heatmap
from saccade.ragged import (
    RaggedBatch,
    apply_mask_to_tensor,
    average_over_targets,
    batched_bool_indexing,
    batched_bool_indexing_write,
    batched_index_mapping,
    batched_indexing_access,
    batched_indexing_write,
    batched_inverse_indexing_access,
    combine_data,
    get_compact_from_named_tuple,
    get_compact_lists,
    get_indices_from_mask,
    get_mask_from_indices,
    squeeze_except_batch_and_sample,
    sum_over_targets,
)

__all__ = [
    "RaggedBatch",
    "apply_mask_to_tensor",
    "average_over_targets",
    "batched_bool_indexing",
    "batched_bool_indexing_write",
    "batched_index_mapping",
    "batched_indexing_access",
    "batched_indexing_write",
    "batched_inverse_indexing_access",
    "combine_data",
    "draw_heatmap",
    "draw_heatmap_batched",
    "get_compact_from_named_tuple",
    "get_compact_lists",
    "get_indices_from_mask",
    "get_mask_from_indices",
    "squeeze_except_batch_and_sample",
    "sum_over_targets",
]


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
