"""Building ragged batches from what a data loader delivers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from saccade.argument_checks import InvalidArgumentError, InvalidStateError
from saccade.ragged.batch import RaggedBatch


def combine_data(
    data_list: Sequence[Any],
    other_with_same_sample_sizes: RaggedBatch | None = None,
    device: torch.device | str | int | None = None,
    flatten_batch_dims: bool = True,
) -> RaggedBatch:
    """Pad tensors of different lengths with zeros to one batch.

    The first tensor with elements decides on dtype, data dimensions and device; the others are converted to its dtype.
    Tensors without elements are samples without entries, and may have any number of dimensions.

    Args:
        data_list: A sequence of tensors (n_b, *D), or nested sequences of them.
        other_with_same_sample_sizes: A batch whose mask and sizes to share instead of making new ones. That the
            tensors have these lengths is not checked.
        device: Where the batch lies; by default where the first tensor with elements does.
        flatten_batch_dims: Make all tensors samples of one batch dimension, in the order in which they are nested.
            Otherwise each level of nesting becomes a batch dimension, and lists of one level must be of equal length.

    Returns:
        A batch over (*B, N, *D), N being the length of the longest tensor, with int64 sizes. Gradients flow to the
        tensors.

    Raises:
        InvalidArgumentError: (an ``AssertionError`` and ``ValueError``) no sequence, an empty one, something in it that
            is no tensor, uneven nesting without ``flatten_batch_dims``, or ``other_with_same_sample_sizes`` has another
            shape.
        InvalidStateError: (a ``RuntimeError`` and ``ValueError``) data dimensions disagree, or a tensor is longer than
            ``other_with_same_sample_sizes`` is wide.
        IndexError: A tensor has no dimensions.

    The function of ``accvlab.batching_helpers``.

    Example:
        >>> import torch
        >>> from saccade.ragged import combine_data
        >>> batch = combine_data([torch.tensor([1.0, 2.0]), torch.tensor([3.0])])
        >>> batch.tensor, batch.sample_sizes
        (tensor([[1., 2.],
                [3., 0.]]), tensor([2, 1]))
    """
    if not _is_sequence(data_list) or len(data_list) == 0:
        got = "an empty one" if _is_sequence(data_list) else type(data_list).__name__
        raise InvalidArgumentError(f"data_list: expected a sequence of tensors, got {got}")
    if not isinstance(other_with_same_sample_sizes, (RaggedBatch, type(None))):
        got = type(other_with_same_sample_sizes).__name__
        raise TypeError(f"other_with_same_sample_sizes: expected a RaggedBatch or None, got {got}")
    leaves = _leaves(data_list, "data_list")
    batch_shape = [len(leaves)] if flatten_batch_dims else _nesting_shape(data_list, "data_list")
    reference = next((leaf for leaf in leaves if leaf.numel()), leaves[0] if leaves else torch.empty(0))
    width = max([0, *(leaf.shape[0] for leaf in leaves)])
    if other_with_same_sample_sizes is not None and not flatten_batch_dims:
        if width > other_with_same_sample_sizes.max_sample_size:
            raise InvalidStateError(
                f"data_list: expected tensors of at most {other_with_same_sample_sizes.max_sample_size} entries, the "
                f"width of other_with_same_sample_sizes, got one of {width}"
            )
        width = other_with_same_sample_sizes.max_sample_size

    # One copy of everything, and one to the device, rather than one for each tensor.
    padding = reference.new_zeros(width, *reference.shape[1:])
    sizes, pieces = [], [padding[:0]]
    for number, leaf in enumerate(leaves):
        if leaf.numel() == 0:
            leaf = leaf.reshape(0, *reference.shape[1:])
        elif leaf.shape[1:] != reference.shape[1:]:
            raise InvalidStateError(
                f"data_list: expected tensors of shape (n, {', '.join(map(str, reference.shape[1:]))}), got "
                f"{tuple(leaf.shape)} as number {number}"
            )
        sizes.append(leaf.shape[0])
        pieces += [leaf.to(padding), padding[leaf.shape[0] :]]
    tensor = torch.cat(pieces).view(*batch_shape, *padding.shape)
    if device is not None:
        tensor = tensor.to(device)
    if other_with_same_sample_sizes is not None:
        other_shape = (*other_with_same_sample_sizes.batch_shape, other_with_same_sample_sizes.max_sample_size)
        if (*batch_shape, width) != other_shape:
            raise InvalidArgumentError(
                f"other_with_same_sample_sizes: expected the samples and width of data_list, {(*batch_shape, width)}, "
                f"got {other_shape}"
            )
        return other_with_same_sample_sizes.create_with_sample_sizes_like_self(tensor, len(batch_shape))
    sample_sizes = torch.tensor(sizes, dtype=torch.int64).view(batch_shape).to(tensor.device, non_blocking=True)
    return RaggedBatch(tensor, sample_sizes=sample_sizes)


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _leaves(data: Sequence[Any], name: str) -> list[Tensor]:
    """The tensors of nested sequences, depth first."""
    leaves: list[Tensor] = []
    for position, element in enumerate(data):
        element_name = f"{name}[{position}]"
        if _is_sequence(element):
            leaves += _leaves(element, element_name)
        elif not isinstance(element, Tensor):
            raise InvalidArgumentError(f"{element_name}: expected a torch.Tensor, got {type(element).__name__}")
        elif element.dim() == 0:
            raise IndexError(f"{element_name}: expected a tensor with at least one dimension, got one without")
        else:
            leaves.append(element)
    return leaves


def _nesting_shape(data: Any, name: str) -> list[int]:
    """Lengths of the levels of nested sequences of tensors, which must be even."""
    if isinstance(data, Tensor):
        return []
    if len(data) == 0:
        raise InvalidArgumentError(f"{name}: expected tensors, got an empty list")
    shapes = [_nesting_shape(element, f"{name}[{position}]") for position, element in enumerate(data)]
    if any(shape != shapes[0] for shape in shapes):
        raise InvalidArgumentError(f"{name}: expected elements nested alike, got lengths {shapes}")
    return [len(data), *shapes[0]]
