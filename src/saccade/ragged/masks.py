"""Reading and writing the entries that a mask selects in each sample.

How many entries the largest selection has is part of a result's shape: ``batched_bool_indexing`` and
``get_indices_from_mask`` wait for the device once to read it. ``batched_bool_indexing_write`` never waits.
"""

import torch
from torch import Tensor

from saccade.argument_checks import InvalidArgumentError, InvalidStateError
from saccade.ragged.batch import RaggedBatch, like_given, require_data, require_data_dims_of, require_dtype_of
from saccade.ragged.faults import first_of
from saccade.ragged.rows import (
    as_samples,
    beside_entries,
    filled,
    flatten_samples,
    from_samples,
    gather_distinct_entries,
    pick,
)


def batched_bool_indexing(input_data: Tensor | RaggedBatch, input_mask: Tensor | RaggedBatch) -> RaggedBatch:
    """The entries of each sample that a mask selects, in their order, padded with 0.

    Padding is never selected: neither that of a ragged mask nor, with a tensor as mask, that of ragged data.

    Args:
        input_data: (*B, N, *D) of any dtype. A tensor has one batch dimension; a ragged batch has its own, and N where
            it is there.
        input_mask: (*B, N) bool, as a tensor only with one batch dimension. Other dtypes are converted.

    Returns:
        A batch over (*B, K, *D) with K, the largest number of selected entries, where N was. Gradients flow to
        ``input_data``.

    Raises:
        TypeError: An argument is neither a tensor nor a ragged batch.
        InvalidArgumentError: (an ``AssertionError`` and ``ValueError``) shapes, batch dimensions or devices disagree,
            or the mask has data dimensions.

    The function of ``accvlab.batching_helpers``.

    Example:
        >>> import torch
        >>> from saccade.ragged import RaggedBatch, batched_bool_indexing
        >>> data = RaggedBatch(torch.tensor([[1, 2, 3], [4, 5, 6]]), sample_sizes=torch.tensor([2, 3]))
        >>> selected = batched_bool_indexing(data, torch.tensor([[True, False, True], [False, True, True]]))
        >>> selected.tensor, selected.sample_sizes
        (tensor([[1, 0],
                [5, 6]]), tensor([1, 2]))
    """
    data, selected = _data_and_selection("input_data", input_data, "input_mask", input_mask)
    index, sizes, kept = first_selected(selected)
    batch_shape, dim = data.batch_shape, data.non_uniform_dim
    entries = kept_entries(as_samples(data.tensor, len(batch_shape), dim), index, kept)
    kept = kept.view(*batch_shape, kept.shape[1])
    return type(data)(from_samples(entries, batch_shape, dim), kept, sizes.view(batch_shape), dim)


def batched_bool_indexing_write(
    to_write: RaggedBatch, output_mask: Tensor | RaggedBatch, to_write_into: Tensor | RaggedBatch
) -> Tensor | RaggedBatch:
    """Write to a copy, in their order, the entries of each sample to the places that a mask selects.

    All else stays as it is, padding included.

    Args:
        to_write: (*B, K, *D) with as many entries in each sample as are selected there.
        output_mask: (*B, N) bool, as a tensor only with one batch dimension. Other dtypes are converted. What is
            padding, of a ragged mask or else of ragged data, is never selected.
        to_write_into: (*B, N, *D) in the dtype of ``to_write``. A tensor has one batch dimension; a ragged batch has
            its own, and N where it is there. It is not changed.

    Returns:
        Like ``to_write_into``: a tensor, or a batch with its mask, sizes and non-uniform dimension. Gradients flow to
        ``to_write``, and to ``to_write_into`` where it was not written to.

    Raises:
        TypeError: ``output_mask`` or ``to_write_into`` is neither a tensor nor a ragged batch.
        InvalidArgumentError: (an ``AssertionError`` and ``ValueError``) as in ``batched_bool_indexing``;
            ``to_write`` is no ragged batch, or has another number of dimensions than ``to_write_into``.
        InvalidStateError: (a ``RuntimeError`` and ``ValueError``) dtypes, batch or data dimensions of the data
            disagree. On the CPU also another number of entries than are selected; on a GPU surplus ones of either are
            skipped, unless ``saccade.debug_checks`` is on.

    The function of ``accvlab.batching_helpers``.

    Example:
        >>> import torch
        >>> from saccade.ragged import RaggedBatch, batched_bool_indexing_write
        >>> data = RaggedBatch(torch.tensor([[1, 2, 3], [4, 5, 6]]), sample_sizes=torch.tensor([2, 3]))
        >>> mask = torch.tensor([[True, False, True], [False, True, True]])
        >>> to_write = RaggedBatch(torch.tensor([[8, 0], [9, 10]]), sample_sizes=torch.tensor([1, 2]))
        >>> batched_bool_indexing_write(to_write, mask, data).tensor
        tensor([[ 8,  2,  3],
                [ 4,  9, 10]])
    """
    if not isinstance(to_write, RaggedBatch):
        raise InvalidArgumentError(f"to_write: expected a RaggedBatch, got {type(to_write).__name__}")
    data, selected = _data_and_selection("to_write_into", to_write_into, "output_mask", output_mask)
    batch_dims = data.num_batch_dims
    if to_write.dim() != data.dim():
        raise InvalidArgumentError(
            f"to_write: expected as many dimensions as to_write_into has, {data.dim()}, got shape "
            f"{tuple(to_write.shape)}"
        )
    require_dtype_of("to_write_into", data, "to_write", to_write)
    if to_write.batch_shape != data.batch_shape or to_write.device != data.device:
        raise InvalidStateError(
            f"to_write: expected batch dimensions {tuple(data.batch_shape)} on {data.device}, those of to_write_into, "
            f"got {tuple(to_write.batch_shape)} on {to_write.device}"
        )
    entries = as_samples(to_write.tensor, batch_dims, to_write.non_uniform_dim)
    padded = as_samples(data.tensor, batch_dims, data.non_uniform_dim)
    require_data_dims_of("to_write_into", padded, "to_write", entries)
    sizes = to_write.sample_sizes.long().flatten().clamp(0, entries.shape[1])
    _require_counts(sizes, selected.sum(-1))
    rank = selected.cumsum(-1) - 1  # which of the selected entries each is
    written = selected & (rank < sizes[:, None])
    values = gather_distinct_entries(entries, rank.where(written, 0))
    result = pick(beside_entries(written, 1, values.dim()), values, padded)
    return like_given(to_write_into, from_samples(result, data.batch_shape, data.non_uniform_dim))


def get_indices_from_mask(mask: Tensor | RaggedBatch) -> RaggedBatch:
    """The positions of the true entries of a mask in each sample, ascending, padded with 0.

    Args:
        mask: (B, N) bool; other dtypes are converted. The padding of a ragged batch is never selected.

    Returns:
        A batch over (B, K) int64, K being the largest number of true entries.

    Raises:
        TypeError: ``mask`` is neither a tensor nor a ragged batch.
        InvalidArgumentError: (an ``AssertionError`` and ``ValueError``) it has not two dimensions.

    The function of ``accvlab.batching_helpers``.

    Example:
        >>> import torch
        >>> from saccade.ragged import get_indices_from_mask
        >>> indices = get_indices_from_mask(torch.tensor([[True, False, True], [False, False, True]]))
        >>> indices.tensor, indices.sample_sizes
        (tensor([[0, 2],
                [2, 0]]), tensor([2, 1]))
    """
    require_data("mask", mask)
    if mask.dim() != 2:
        raise InvalidArgumentError(f"mask: expected 2 dimensions, got shape {tuple(mask.shape)}")
    index, sizes, kept = first_selected(_ragged_selection(mask) if isinstance(mask, RaggedBatch) else mask.bool())
    return RaggedBatch(index.where(kept, 0), kept, sizes)


def first_selected(
    selected: Tensor,  # (S, N) bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Where the selected entries of each sample are; waits for the device once.

    Returns:
        (S, K) int64 positions, of the selected ones first and in their order, K being the largest number of them in a
        sample; (S,) int64 numbers of them; (S, K) bool, which of the positions are those of selected ones.
    """
    sizes = selected.sum(-1)
    width = int(sizes.max()) if sizes.numel() else 0
    place = torch.arange(width, device=sizes.device)
    order = selected.byte().argsort(dim=1, descending=True, stable=True)
    # Not order[:, :width]: torch.compile in PyTorch 2.9 cannot cut to a width that it does not know.
    return order.index_select(1, place), sizes, place < sizes[:, None]


def kept_entries(
    data: Tensor,  # (S, N, *D)
    index: Tensor,  # (S, K)
    kept: Tensor,  # (S, K) bool
) -> Tensor:  # (S, K, *D)
    """Entries of each sample by different indices, 0 where they are not to be kept."""
    return filled(gather_distinct_entries(data, index), kept, 0)


def _data_and_selection(
    name: str, data: Tensor | RaggedBatch, mask_name: str, mask: Tensor | RaggedBatch
) -> tuple[RaggedBatch, Tensor]:
    """The data as a ragged batch, and which of its entries are selected, (S, N)."""
    require_data(name, data)
    require_data(mask_name, mask)
    batch_dims = data.num_batch_dims if isinstance(data, RaggedBatch) else 1
    if batch_dims != 1 and not isinstance(mask, RaggedBatch):
        raise InvalidArgumentError(
            f"{mask_name}: expected a RaggedBatch with data of {batch_dims} batch dimensions, got a tensor"
        )
    if data.dim() < 2:
        raise InvalidArgumentError(f"{name}: expected at least 2 dimensions, got shape {tuple(data.shape)}")
    expected = (*data.shape[:batch_dims], data.shape[data.non_uniform_dim if isinstance(data, RaggedBatch) else 1])
    if mask.shape != expected or mask.device != data.device:
        raise InvalidArgumentError(
            f"{mask_name}: expected shape {expected} on {data.device}, the batch dimensions and width of {name}, got "
            f"{tuple(mask.shape)} on {mask.device}"
        )
    if isinstance(mask, RaggedBatch):
        if mask.num_batch_dims != batch_dims:
            raise InvalidArgumentError(
                f"{mask_name}: expected {batch_dims} batch dimensions as {name} has, got {mask.num_batch_dims}"
            )
        selected = _ragged_selection(mask)
        ragged = data if isinstance(data, RaggedBatch) else RaggedBatch(data, mask.mask, mask.sample_sizes)
    elif isinstance(data, RaggedBatch):
        selected, ragged = mask.bool() & data.mask.bool(), data
    else:
        selected, ragged = mask.bool(), RaggedBatch(data, mask=mask)
    return ragged, flatten_samples(selected, batch_dims)


def _ragged_selection(mask: RaggedBatch) -> Tensor:
    return mask.tensor.bool() & mask.mask.bool()


def _require_counts(
    sizes: Tensor,  # (S,)
    counts: Tensor,  # (S,)
) -> None:
    """Raise unless there are as many entries as are selected in each sample, where values may be read."""
    if (first := first_of(sizes != counts)) is not None:
        raise InvalidStateError(
            f"to_write: expected {int(counts[first])} entries in sample {first[0]}, as many as output_mask selects, "
            f"got {int(sizes[first])}"
        )
