"""Ragged batches from and to the other forms in which samples of different sizes come.

For lists of tensors there are ``combine_data`` and ``RaggedBatch.split``.
"""

import torch
from torch import Tensor

from saccade.argument_checks import InvalidArgumentError, require_tensor
from saccade.ragged.batch import RaggedBatch, require_ragged
from saccade.ragged.faults import first_of
from saccade.ragged.masks import kept_entries
from saccade.ragged.rows import as_samples, movable, moved


def to_values(batch: RaggedBatch) -> tuple[Tensor, Tensor]:
    """The valid entries of all samples end to end, and where each sample begins.

    Waits for the device once, since the number of entries is part of the shape.

    Args:
        batch: (*B, N, *D) of any dtype, N anywhere behind the batch dimensions.

    Returns:
        (T, *D) values of the T entries, and (S + 1,) int64 offsets of the S samples: sample ``s`` is
        ``values[offsets[s]:offsets[s + 1]]``. Gradients flow to ``batch``.

    Example:
        >>> import torch
        >>> from saccade.ragged import RaggedBatch, to_values
        >>> to_values(RaggedBatch(torch.tensor([[5, 6, 0], [7, 8, 9]]), sample_sizes=torch.tensor([2, 3])))
        (tensor([5, 6, 7, 8, 9]), tensor([0, 2, 5]))
    """
    require_ragged("batch", batch)
    data = as_samples(batch.tensor, batch.num_batch_dims, batch.non_uniform_dim)
    sizes = batch.sample_sizes.long().clamp(0, batch.max_sample_size).flatten()
    valid = torch.arange(batch.max_sample_size, device=batch.device) < sizes[:, None]
    rows = valid.flatten().nonzero().squeeze(1)
    values = moved(movable(data).flatten(0, 1).index_select(0, rows), data.dtype)
    return values, torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])


def from_values(
    values: Tensor,
    *,
    offsets: Tensor | None = None,
    lengths: Tensor | None = None,
    max_sample_size: int | None = None,
) -> RaggedBatch:
    """A batch of samples that lie end to end, padded with 0.

    Waits for the device once, to read the largest length, unless ``max_sample_size`` says it.

    Args:
        values: (T, *D) of any dtype.
        offsets: (S + 1,) integer: sample ``s`` is ``values[offsets[s]:offsets[s + 1]]``.
        lengths: (S,) integer number of entries of each sample. Without ``offsets`` the samples follow each other, and
            the shape may also be that of several batch dimensions. With both, sample ``s`` begins at ``offsets[s]``
            (S or S + 1 of them), and what lies behind it is left out.
        max_sample_size: N; entries of a sample behind so many are left out. By default the largest length.

    Returns:
        A batch over (*B, N, *D) with int64 sizes. Gradients flow to ``values``.

    Raises:
        TypeError: An argument is no tensor.
        InvalidArgumentError: (an ``AssertionError`` and ``ValueError``) neither offsets nor lengths, or shapes that
            disagree; on the CPU also a sample that does not lie in ``values``. On a GPU the batch then holds any
            entries, unless ``saccade.debug_checks`` is on.

    Example:
        >>> import torch
        >>> from saccade.ragged import from_values
        >>> from_values(torch.tensor([5, 6, 7, 8, 9]), lengths=torch.tensor([2, 3])).tensor
        tensor([[5, 6, 0],
                [7, 8, 9]])
    """
    require_tensor("values", values)
    if values.dim() == 0:
        raise InvalidArgumentError("values: expected at least 1 dimension, got none")
    begins, sizes = _begins_and_sizes(offsets, lengths)
    batch_shape, sizes = sizes.shape, sizes.flatten()
    _require_inside(begins, sizes, values.shape[0])
    if max_sample_size is None:
        max_sample_size = int(sizes.max()) if sizes.numel() else 0
    sizes = sizes.clamp(0, max_sample_size)
    position = torch.arange(max_sample_size, device=values.device)
    kept = position < sizes[:, None]
    index = (begins[:, None] + position).clamp(0, max(values.shape[0] - 1, 0)).where(kept, 0)
    entries = kept_entries(values[None], index.view(1, -1), kept.view(1, -1))
    entries = entries.view(*batch_shape, max_sample_size, *values.shape[1:])
    return RaggedBatch(entries, kept.view(*batch_shape, max_sample_size), sizes.view(batch_shape))


def to_nested(batch: RaggedBatch) -> Tensor:
    """The valid entries as a nested tensor of jagged layout; waits for the device once.

    Args:
        batch: (B, N, *D) of any dtype, with one batch dimension.

    Returns:
        Nested tensor (B, j, *D) with j where N was. Gradients flow to ``batch``.

    Raises:
        InvalidArgumentError: (an ``AssertionError`` and ``ValueError``) several batch dimensions, which nested tensors
            do not have: use ``flatten_batch_dims`` first.

    Example:
        >>> import torch
        >>> from saccade.ragged import RaggedBatch, to_nested
        >>> nested = to_nested(RaggedBatch(torch.tensor([[5, 6, 0], [7, 8, 9]]), sample_sizes=torch.tensor([2, 3])))
        >>> [sample.tolist() for sample in nested.unbind()]
        [[5, 6], [7, 8, 9]]
    """
    require_ragged("batch", batch)
    if batch.num_batch_dims != 1:
        raise InvalidArgumentError(f"batch: expected one batch dimension, got shape {tuple(batch.batch_shape)}")
    values, offsets = to_values(batch)
    nested = torch.nested.nested_tensor_from_jagged(values, offsets)
    return nested if batch.non_uniform_dim == 1 else nested.transpose(1, batch.non_uniform_dim)


def from_nested(nested: Tensor, max_sample_size: int | None = None) -> RaggedBatch:
    """A batch of the samples of a nested tensor of jagged layout, padded with 0.

    Waits for the device once, to read the largest size, unless ``max_sample_size`` says it.

    Args:
        nested: (B, j, *D), j anywhere behind the batch dimension; also with holes between the samples.
        max_sample_size: N; entries of a sample behind so many are left out. By default the largest size.

    Returns:
        A batch over (B, N, *D) with N where j was. Gradients flow to ``nested``.

    Raises:
        TypeError: ``nested`` is no nested tensor of jagged layout.

    Example:
        >>> import torch
        >>> from saccade.ragged import from_nested
        >>> nested = torch.nested.nested_tensor([torch.tensor([1, 2]), torch.tensor([3])], layout=torch.jagged)
        >>> from_nested(nested).tensor
        tensor([[1, 2],
                [3, 0]])
    """
    require_tensor("nested", nested)
    if not nested.is_nested or nested.layout != torch.jagged:
        raise TypeError(f"nested: expected a nested tensor of layout torch.jagged, got one of {nested.layout}")
    dim = nested._ragged_idx  # pyright: ignore[reportAttributeAccessIssue]
    batch = from_values(
        nested.values().transpose(0, dim - 1),
        offsets=nested.offsets(),  # pyright: ignore[reportAttributeAccessIssue]
        lengths=nested.lengths(),  # pyright: ignore[reportAttributeAccessIssue]
        max_sample_size=max_sample_size,
    )
    return batch.get_non_uniform_dimension_transposed_to(dim)


def _begins_and_sizes(offsets: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """(S,) where the samples begin, and (*B) how many entries they have."""
    for name, value in ("offsets", offsets), ("lengths", lengths):
        if value is not None:
            require_tensor(name, value)
    if offsets is None:
        if lengths is None:
            raise InvalidArgumentError("offsets: expected offsets or lengths, got neither")
        if lengths.dim() == 0:
            raise InvalidArgumentError("lengths: expected at least one dimension, got none")
        sizes = lengths.long()
        return sizes.flatten().cumsum(0) - sizes.flatten(), sizes
    if offsets.dim() != 1:
        raise InvalidArgumentError(f"offsets: expected 1 dimension, got shape {tuple(offsets.shape)}")
    begins = offsets.long()
    if lengths is None:
        if begins.shape[0] == 0:
            raise InvalidArgumentError("offsets: expected one more than there are samples, got none")
        return begins[:-1], begins.diff()
    if lengths.dim() != 1 or begins.shape[0] - lengths.shape[0] not in (0, 1):
        raise InvalidArgumentError(
            f"lengths: expected one for each sample that begins in offsets of shape {tuple(offsets.shape)}, got shape "
            f"{tuple(lengths.shape)}"
        )
    return begins[: lengths.shape[0]], lengths.long()


def _require_inside(begins: Tensor, sizes: Tensor, count: int) -> None:
    """Raise for the first sample that does not lie within the values, where values may be read."""
    wrong = (sizes < 0) | (begins < 0) | (begins + sizes > count)
    if (first := first_of(wrong)) is not None:
        raise InvalidArgumentError(
            f"values: expected all samples to lie within the {count} entries, got {int(sizes[first])} from "
            f"{int(begins[first])} on as sample {first[0]}"
        )
