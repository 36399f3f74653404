"""Batches whose samples have different numbers of entries."""

from saccade.ragged.batch import RaggedBatch
from saccade.ragged.building import combine_data

__all__ = ["RaggedBatch", "combine_data"]
