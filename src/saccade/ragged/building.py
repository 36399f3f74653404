"""Building ragged batches from what a data loader delivers."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor

from saccade.argument_checks import InvalidArgumentError, InvalidStateError, require_tensor
from saccade.ragged.api import PAD
from saccade.ragged.batch import RaggedBatch
from saccade.ragged.masks import first_selected, kept_entries
from saccade.triton_dispatch import served_by_triton

NamedTuple = TypeVar("NamedTuple", bound=tuple[Any, ...])


def combine_data(
    data_list: Sequence[Any],
    other_with_same_sample_sizes: RaggedBatch | None = None,
    device: torch.device | str | int | None = None,
    flatten_batch_dims: bool = True,
) -> RaggedBatch:
    """Pad tensors of different lengths with zeros to one batch.

    The first tensor with elements decides on dtype, data dimensions and device; the others are converted to its dtype.
    Tensors without elements are samples without entries, and may have any number of dimensions. ``split`` of the result
    gives them back.

    Tensors on the CPU for a batch on a GPU are put together in page-locked memory and copied at once, without waiting
    for the copy; only tensors that require grad are not.

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
    sizes = [leaf.shape[0] for leaf in leaves]
    reference = next((leaf for leaf in leaves if leaf.numel()), leaves[0] if leaves else torch.empty(0))
    width = max(sizes) if sizes else 0  # torch.compile does not trace max(..., default=0)
    if other_with_same_sample_sizes is not None and not flatten_batch_dims:
        if width > other_with_same_sample_sizes.max_sample_size:
            raise InvalidStateError(
                f"data_list: expected tensors of at most {other_with_same_sample_sizes.max_sample_size} entries, the "
                f"width of other_with_same_sample_sizes, got one of {width}"
            )
        width = other_with_same_sample_sizes.max_sample_size

    target = reference.device if device is None else torch.empty(0, device=device).device  # "cuda" with its number
    by_operator = len(leaves) > 0 and reference.device == target and served_by_triton(reference)
    values = _joined_as_they_are(leaves, reference) if by_operator else None
    pieces = leaves
    if values is None:
        pieces = _made_alike(leaves, reference, target)
        sizes = [piece.shape[0] for piece in pieces]
        values = torch.cat(pieces) if by_operator else None
    # One copy of everything, and one to the device, rather than one for each tensor.
    page_locked = target.type == "cuda" and not torch.compiler.is_compiling()
    if values is not None:
        numbers = torch.tensor([sizes, [0, *accumulate(sizes[:-1])]], dtype=torch.int64, pin_memory=page_locked)
        sample_sizes, begins = numbers.to(target, non_blocking=True).unbind()
        tensor = PAD(values, begins, sample_sizes, width)
    else:
        sample_sizes = torch.tensor(sizes, dtype=torch.int64, pin_memory=page_locked)
        tensor = _end_to_end(pieces, sizes, width, reference, page_locked)
        tensor = tensor.to(target, non_blocking=tensor.device.type == "cpu")
        tensor = tensor.view(len(pieces), width, *reference.shape[1:])
        sample_sizes = sample_sizes.to(target, non_blocking=True)
    if not flatten_batch_dims:
        tensor, sample_sizes = tensor.view(*batch_shape, *tensor.shape[1:]), sample_sizes.view(batch_shape)
    if other_with_same_sample_sizes is not None:
        other_shape = (*other_with_same_sample_sizes.batch_shape, other_with_same_sample_sizes.max_sample_size)
        if (*batch_shape, width) != other_shape:
            raise InvalidArgumentError(
                f"other_with_same_sample_sizes: expected the samples and width of data_list, {(*batch_shape, width)}, "
                f"got {other_shape}"
            )
        return other_with_same_sample_sizes.create_with_sample_sizes_like_self(tensor, len(batch_shape))
    return RaggedBatch(tensor, sample_sizes=sample_sizes)


def _joined_as_they_are(leaves: list[Tensor], reference: Tensor) -> Tensor | None:
    """(T, *D) all entries, or None if the tensors must be made alike first.

    That PyTorch joins them costs less to find out than by looking at each of many tensors for what it would refuse.
    """
    if torch.compiler.is_compiling() or reference.numel() == 0:
        return None
    try:
        values = torch.cat(leaves)
    except RuntimeError:  # data dimensions or devices
        return None
    return values if values.dtype == reference.dtype else None


def _made_alike(leaves: list[Tensor], reference: Tensor, target: torch.device) -> list[Tensor]:
    """The tensors in one dtype and on one device; those without elements without entries."""
    trailing = reference.shape[1:]
    pieces = []
    for number, leaf in enumerate(leaves):
        if leaf.numel() == 0:
            leaf = leaf.reshape(0, *trailing)
        elif leaf.shape[1:] != trailing:
            raise InvalidStateError(
                f"data_list: expected tensors of shape (n, {', '.join(map(str, trailing))}), got {tuple(leaf.shape)} "
                f"as number {number}"
            )
        pieces.append(leaf if leaf.dtype == reference.dtype else leaf.to(reference.dtype))
    if len({leaf.device for leaf in leaves}) > 1:
        pieces = [piece.to(target) for piece in pieces]
    return pieces


def _end_to_end(
    pieces: list[Tensor],  # (n, *D) each
    sizes: list[int],
    width: int,
    reference: Tensor,  # (n, *D)
    page_locked: bool,
) -> Tensor:
    """(S * N, *D) all samples, each padded with 0; autograd has no page-locked concatenation."""
    trailing = reference.shape[1:]
    like = pieces[0] if pieces else reference
    padding = torch.zeros((width, *trailing), dtype=like.dtype, device=like.device)
    padded = [part for piece, size in zip(pieces, sizes, strict=True) for part in (piece, padding[size:])]
    padded = padded or [padding[:0]]
    needs_grad = torch.is_grad_enabled() and any(piece.requires_grad for piece in pieces)
    if not page_locked or like.device.type != "cpu" or needs_grad:
        return torch.cat(padded)
    shape = (len(pieces) * width, *trailing)
    return torch.cat(padded, out=torch.empty(shape, dtype=like.dtype, pin_memory=True))


def get_compact_lists(mask: Tensor, data: Sequence[Any]) -> list[Any]:
    """The entries that one mask selects, of several tensors alike, in their order and padded with 0.

    Waits for the device once, to read how many entries the largest selection has.

    Args:
        mask: (B, N) bool; other dtypes are converted.
        data: Tensors (B, N, *D), each of its own dtype and data dimensions. What is no tensor is passed through.

    Returns:
        For each of ``data`` a batch over (B, K, *D), K being the largest number of selected entries; all share one mask
        and sizes. Gradients flow to the tensors.

    Raises:
        TypeError: ``mask`` is no tensor.
        IndexError: The mask has not two dimensions, or a tensor does not begin with those.

    The function of ``accvlab.batching_helpers``.

    Example:
        >>> import torch
        >>> from saccade.ragged import get_compact_lists
        >>> mask = torch.tensor([[False, True, True], [False, False, True]])
        >>> (numbers,) = get_compact_lists(mask, [torch.tensor([[0, 1, 2], [3, 4, 5]])])
        >>> numbers.tensor, numbers.sample_sizes
        (tensor([[1, 2],
                [5, 0]]), tensor([2, 1]))
    """
    require_tensor("mask", mask)
    if mask.dim() != 2:
        raise IndexError(f"mask: expected 2 dimensions, got shape {tuple(mask.shape)}")
    for number, element in enumerate(data):
        if isinstance(element, Tensor) and element.shape[:2] != mask.shape:
            raise IndexError(
                f"data[{number}]: expected a shape that begins with that of mask, {tuple(mask.shape)}, got "
                f"{tuple(element.shape)}"
            )
    if not any(isinstance(element, Tensor) for element in data):
        return list(data)
    index, sizes, kept = first_selected(mask.bool())
    return [
        RaggedBatch(kept_entries(element, index, kept), kept, sizes) if isinstance(element, Tensor) else element
        for element in data
    ]


def get_compact_from_named_tuple(mask: Tensor, data: NamedTuple) -> NamedTuple:
    """``get_compact_lists`` of the fields of a named tuple, as such a tuple.

    The function of ``accvlab.batching_helpers``.

    Example:
        >>> from typing import Any, NamedTuple
        >>> import torch
        >>> from saccade.ragged import get_compact_from_named_tuple
        >>> class Objects(NamedTuple):
        ...     labels: Any
        ...     source: str
        >>> objects = Objects(torch.tensor([[7, 8], [9, 6]]), "camera")
        >>> compact = get_compact_from_named_tuple(torch.tensor([[False, True], [False, False]]), objects)
        >>> compact.labels.tensor, compact.source
        (tensor([[8],
                [0]]), 'camera')
    """
    return type(data)(*get_compact_lists(mask, data))


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _leaves(data: Sequence[Any], name: str) -> list[Tensor]:
    """The tensors of nested sequences, depth first."""
    leaves: list[Tensor] = []
    for position, element in enumerate(data):
        if isinstance(element, Tensor):
            if element.dim() == 0:
                raise IndexError(f"{name}[{position}]: expected a tensor with at least one dimension, got one without")
            leaves.append(element)
        elif _is_sequence(element):
            leaves += _leaves(element, f"{name}[{position}]")
        else:
            raise InvalidArgumentError(f"{name}[{position}]: expected a torch.Tensor, got {type(element).__name__}")
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
