"""Batches whose samples have different numbers of entries."""

from saccade.ragged.api import (
    batched_index_mapping,
    batched_indexing_access,
    batched_indexing_write,
    batched_inverse_indexing_access,
    get_mask_from_indices,
)
from saccade.ragged.batch import RaggedBatch
from saccade.ragged.building import combine_data, get_compact_from_named_tuple, get_compact_lists
from saccade.ragged.conversion import from_nested, from_values, to_nested, to_values
from saccade.ragged.loading import collate, move_ragged_inputs
from saccade.ragged.masks import batched_bool_indexing, batched_bool_indexing_write, get_indices_from_mask
from saccade.ragged.reductions import (
    apply_mask_to_tensor,
    average_over_targets,
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
    "collate",
    "combine_data",
    "from_nested",
    "from_values",
    "get_compact_from_named_tuple",
    "get_compact_lists",
    "get_indices_from_mask",
    "get_mask_from_indices",
    "move_ragged_inputs",
    "squeeze_except_batch_and_sample",
    "sum_over_targets",
    "to_nested",
    "to_values",
]
