"""Reading and writing entries of each sample by their indices.

On a GPU nothing here waits for the device, so an index out of range is skipped there, unless ``saccade.debug_checks``
asks to wait and raise. Compiled code skips it on every device. No memory is touched through such an index.

On a GPU each of these functions calls one operator with a Triton kernel; on the CPU they are made of PyTorch's
operators.
"""

import torch
from torch import Tensor

from saccade.argument_checks import InvalidArgumentError, InvalidStateError, require_integer, require_tensor
from saccade.ragged import operators
from saccade.ragged.batch import RaggedBatch
from saccade.ragged.faults import require_in_range, values_may_be_read
from saccade.ragged.rows import fill, flatten_samples, gather_entries, place_of, put_entries, resolved


def batched_indexing_access(
    input_data: Tensor | RaggedBatch,
    input_indices: RaggedBatch,
    filler_value: float = 0.0,
    dim_to_index_in: int | None = None,
) -> RaggedBatch:
    """Gather the entries of each sample that its indices point to: ``result[b, j] = input_data[b, indices[b, j]]``.

    Slots behind a sample's number of indices hold ``filler_value``, whatever the indices there are. Repeated indices
    are fine: their gradients are added, on a GPU in an order that does not change from run to run. In half precision
    the sums are those that PyTorch's advanced indexing has on the same device: on the CPU they are rounded to the dtype
    after each addition, in the order of the slots. A ragged batch as data is taken for its padded tensor.

    Args:
        input_data: (*B, W, *D) of any dtype.
        input_indices: (*B, M) int32 or int64, in [-W, W); negative ones count from the end.
        filler_value: What the unused slots hold, converted to the dtype of ``input_data``.
        dim_to_index_in: Where W lies among the dimensions of ``input_data``; by default behind the batch dimensions.

    Returns:
        A batch over (*B, M, *D) in the dtype of ``input_data``, with M where W was, and the mask and sizes of the
        indices. Gradients flow to ``input_data``.

    Raises:
        TypeError: An argument is of another type or dtype.
        InvalidArgumentError: (an ``AssertionError`` and ``ValueError``) ``dim_to_index_in`` is a batch dimension or
            negative.
        InvalidStateError: (a ``RuntimeError`` and ``ValueError``) devices or batch dimensions disagree, or the indices
            have data dimensions.
        IndexError: ``dim_to_index_in`` is too large; on the CPU also an index out of range. On a GPU the slot of such
            an index holds ``filler_value``, unless ``saccade.debug_checks`` is on.

    The function of ``accvlab.batching_helpers``.

    Example:
        >>> import torch
        >>> from saccade.ragged import RaggedBatch, batched_indexing_access
        >>> data = torch.tensor([[10, 11, 12], [20, 21, 22]])
        >>> indices = RaggedBatch(torch.tensor([[2, -1, 2], [0, 9, 9]]), sample_sizes=torch.tensor([3, 1]))
        >>> batched_indexing_access(data, indices, -5).tensor
        tensor([[12, 12, 12],
                [20, -5, -5]])
    """
    is_plain = not torch.compiler.is_compiling() and type(filler_value) in (bool, int, float)
    of_filler = (repr(filler_value) if is_plain else filler_value,)  # 0.0 and -0.0 are equal
    if dim_to_index_in is None and type(input_indices) is RaggedBatch and input_indices.num_batch_dims == 1:
        data = input_data.tensor if type(input_data) is RaggedBatch else input_data
        tensors = data, input_indices.tensor, input_indices.sample_sizes
        gather = operators.gather.known(tensors, of_filler)
        if gather is not None:
            return input_indices.create_with_sample_sizes_like_self(gather(*tensors, filler_value))
    _require_indices("input_indices", input_indices)
    dim = _dim_to_index_in(dim_to_index_in, input_indices)
    data = _padded("input_data", input_data, input_indices, dim)
    if operators.serve(data, input_indices.tensor):
        index, sizes = _for_operator("input_indices", input_indices, data.shape[1])
        tensors = data, index, sizes
        args = *tensors, filler_value
        entries = operators.gather.learn(tensors, of_filler, args)(*args)
    else:
        used, index = _used("input_indices", input_indices, data.shape[1])
        entries = gather_entries(data, index)
        entries = fill(entries, ~used.view(*used.shape, *[1] * (entries.dim() - 2)), filler_value)
    return input_indices.create_with_sample_sizes_like_self(_unpadded(entries, input_indices, dim), dim)


def batched_inverse_indexing_access(
    input_data: Tensor | RaggedBatch,
    output_indices: RaggedBatch,
    output_num_targets: int,
    filler_value: float = 0.0,
    dim_to_index_in: int | None = None,
) -> Tensor:
    """Put the entries of each sample where its indices point to: ``result[b, indices[b, j]] = input_data[b, j]``.

    Where no index points to, the result holds ``filler_value``. Of several entries with the same index one is written,
    and it alone gets a gradient; which one is unspecified (at present the last).

    Args:
        input_data: (*B, M, *D) of any dtype. M may be larger than that of the indices, the rest is ignored.
        output_indices: (*B, M) int32 or int64, in [-W, W); negative ones count from the end. Those behind a sample's
            number of indices may be anything.
        output_num_targets: W, at least 0.
        filler_value: What the rest holds, converted to the dtype of ``input_data``.
        dim_to_index_in: Where M lies among the dimensions of ``input_data``; by default behind the batch dimensions.

    Returns:
        (*B, W, *D) tensor in the dtype of ``input_data``, with W where M was. Gradients flow to ``input_data``.

    Raises:
        TypeError, InvalidArgumentError, InvalidStateError, IndexError: As in ``batched_indexing_access``, and
            ``InvalidStateError`` if ``input_data`` has fewer entries than there are indices. On a GPU an index out of
            range is skipped, unless ``saccade.debug_checks`` is on.
        ValueError: ``output_num_targets`` is negative.

    The function of ``accvlab.batching_helpers``.

    Example:
        >>> import torch
        >>> from saccade.ragged import RaggedBatch, batched_inverse_indexing_access
        >>> indices = RaggedBatch(torch.tensor([[2, -4], [0, 9]]), sample_sizes=torch.tensor([2, 1]))
        >>> batched_inverse_indexing_access(torch.tensor([[1, 2], [3, 4]]), indices, 4, 9)
        tensor([[2, 9, 1, 9],
                [3, 9, 9, 9]])
    """
    _require_indices("output_indices", output_indices)
    dim = _dim_to_index_in(dim_to_index_in, output_indices)
    _require_count("output_num_targets", output_num_targets)
    data = _padded("input_data", input_data, output_indices, dim)
    data = _first_entries("input_data", data, output_indices)
    if operators.serve(data, output_indices.tensor):
        index, sizes = _for_operator("output_indices", output_indices, output_num_targets)
        spread = operators.spread(data, index, sizes, None, 0, output_num_targets, filler_value)
    else:
        background = operators.filled_with(filler_value, data, output_num_targets)
        spread = put_entries(background, *_used("output_indices", output_indices, output_num_targets), data)
    return _unpadded(spread, output_indices, dim)


def batched_indexing_write(
    to_write: Tensor | RaggedBatch,
    output_indices: RaggedBatch,
    to_write_into: Tensor | RaggedBatch,
    dim_to_index_in: int | None = None,
) -> Tensor | RaggedBatch:
    """Write entries of each sample to a copy, where its indices point to: ``copy[b, indices[b, j]] = to_write[b, j]``.

    Of several entries with the same index one is written, and it alone gets a gradient; which one is unspecified (at
    present the last). Ragged batches as data are taken for their padded tensors.

    Args:
        to_write: (*B, M, *D) of any dtype. M may be larger than that of the indices, the rest is ignored.
        output_indices: (*B, M) int32 or int64, in [-W, W); negative ones count from the end. Those behind a sample's
            number of indices may be anything.
        to_write_into: (*B, W, *D) in the dtype of ``to_write``; it is not changed.
        dim_to_index_in: Where M and W lie among the dimensions of the data; by default behind the batch dimensions.

    Returns:
        Like ``to_write_into``: a tensor, or a batch with its mask and sizes. Gradients flow to ``to_write``, and to
        ``to_write_into`` where it was not written to.

    Raises:
        TypeError, InvalidArgumentError, InvalidStateError, IndexError: As in ``batched_inverse_indexing_access``, and
            ``InvalidStateError`` if the data disagree in dtype, number of dimensions or shape.

    The function of ``accvlab.batching_helpers``.

    Example:
        >>> import torch
        >>> from saccade.ragged import RaggedBatch, batched_indexing_write
        >>> indices = RaggedBatch(torch.tensor([[2, -4], [0, 9]]), sample_sizes=torch.tensor([2, 1]))
        >>> batched_indexing_write(torch.tensor([[1, 2], [3, 4]]), indices, torch.full((2, 4), 9))
        tensor([[2, 9, 1, 9],
                [3, 9, 9, 9]])
    """
    _require_indices("output_indices", output_indices)
    _require_data("to_write", to_write)
    _require_data("to_write_into", to_write_into)
    dim = _dim_to_index_in(dim_to_index_in, output_indices)
    _require_alike("to_write", to_write, "to_write_into", to_write_into)
    entries = _padded("to_write", to_write, output_indices, dim)
    data = _padded("to_write_into", to_write_into, output_indices, dim)
    _require_same_data_dims("to_write", entries, "to_write_into", data)
    entries = _first_entries("to_write", entries, output_indices)
    if operators.serve(entries, data, output_indices.tensor):
        index, sizes = _for_operator("output_indices", output_indices, data.shape[1])
        written = operators.put(data, entries, index, sizes, None, 0)
    else:
        written = put_entries(data, *_used("output_indices", output_indices, data.shape[1]), entries)
    written = _unpadded(written, output_indices, dim)
    if isinstance(to_write_into, RaggedBatch):
        return to_write_into.create_with_sample_sizes_like_self(written)
    return written


def batched_index_mapping(
    source_data: Tensor | RaggedBatch,
    source_indices: RaggedBatch,
    target_indices: RaggedBatch,
    target_data: Tensor | RaggedBatch,
) -> Tensor | RaggedBatch:
    """Copy entries to other places of another batch: ``copy[b, target[b, j]] = source_data[b, source[b, j]]``.

    How many pairs of indices a sample has is read from ``source_indices``. Repeated source indices are fine, and their
    gradients are added as those of ``batched_indexing_access``. Of several pairs with the same target one is written,
    and it alone gives a gradient; which one is unspecified (at present the last).

    Args:
        source_data: (*B, V, *D) of any dtype; a ragged batch is indexed along its non-uniform dimension.
        source_indices: (*B, M) int32 or int64, in [-V, V); negative ones count from the end. Those behind a sample's
            number of indices may be anything.
        target_indices: (*B, M) of the same dtype, in [-W, W), likewise.
        target_data: (*B, W, *D) in the dtype of ``source_data``, likewise; it is not changed.

    Returns:
        Like ``target_data``: a tensor, or a batch with its mask, sizes and non-uniform dimension. Gradients flow to
        ``source_data``, and to ``target_data`` where it was not written to.

    Raises:
        TypeError: An argument is of another type or dtype.
        InvalidArgumentError: (an ``AssertionError`` and ``ValueError``) the shapes of the indices disagree, or they
            have data dimensions.
        InvalidStateError: (a ``RuntimeError`` and ``ValueError``) dtypes of indices or data, devices, or shapes of data
            disagree.
        IndexError: On the CPU, an index out of range. On a GPU such a pair is skipped, unless ``saccade.debug_checks``
            is on.

    The function of ``accvlab.batching_helpers``.

    Example:
        >>> import torch
        >>> from saccade.ragged import RaggedBatch, batched_index_mapping
        >>> sizes = torch.tensor([2, 1])
        >>> source = RaggedBatch(torch.tensor([[0, 0], [2, 7]]), sample_sizes=sizes)
        >>> target = RaggedBatch(torch.tensor([[3, -3], [0, 7]]), sample_sizes=sizes)
        >>> data = torch.tensor([[1, 2, 3], [4, 5, 6]])
        >>> batched_index_mapping(data, source, target, torch.zeros(2, 4, dtype=torch.int64))
        tensor([[0, 1, 0, 1],
                [6, 0, 0, 0]])
    """
    for name, indices in ("source_indices", source_indices), ("target_indices", target_indices):
        _require_ragged(name, indices)
        if indices.dim() != indices.num_batch_dims + 1:
            raise InvalidArgumentError(_expected_no_data_dims(name, indices))
    if source_indices.shape != target_indices.shape:
        raise InvalidArgumentError(
            f"target_indices: expected shape {tuple(source_indices.shape)}, that of source_indices, got "
            f"{tuple(target_indices.shape)}"
        )
    if source_indices.dtype != target_indices.dtype:
        raise InvalidStateError(
            f"target_indices: expected {source_indices.dtype}, the dtype of source_indices, got {target_indices.dtype}"
        )
    _require_indices("source_indices", source_indices)
    _require_indices("target_indices", target_indices)
    _require_device("target_indices", target_indices, "source_indices", source_indices)
    _require_data("source_data", source_data)
    _require_data("target_data", target_data)
    _require_alike("source_data", source_data, "target_data", target_data)
    batch_dims = target_indices.num_batch_dims
    target_dim = target_data.non_uniform_dim if isinstance(target_data, RaggedBatch) else batch_dims
    source_dim = source_data.non_uniform_dim if isinstance(source_data, RaggedBatch) else batch_dims
    source = _padded("source_data", source_data, source_indices, source_dim)
    target = _padded("target_data", target_data, source_indices, target_dim)
    _require_same_data_dims("source_data", source, "target_data", target)
    if operators.serve(source, target, source_indices.tensor, target_indices.tensor):
        source_index, sizes = _for_operator("source_indices", source_indices, source.shape[1])
        target_index, sizes = _for_operator("target_indices", target_indices, target.shape[1], sizes)
        written = operators.transfer(target, source, target_index, sizes, source_index)
    else:
        used, source_index = _used("source_indices", source_indices, source.shape[1])
        used, target_index = _used("target_indices", target_indices, target.shape[1], used)
        written = put_entries(target, used, target_index, gather_entries(source, source_index))
    written = _unpadded(written, source_indices, target_dim)
    if isinstance(target_data, RaggedBatch):
        return target_data.create_with_sample_sizes_like_self(written)
    return written


def get_mask_from_indices(mask_num_targets: int, indices: RaggedBatch) -> Tensor:
    """A mask that is true where the indices of each sample point to.

    Args:
        mask_num_targets: W, at least 0.
        indices: (*B, M) int32 or int64, in [-W, W); negative ones count from the end, and they may repeat. Those behind
            a sample's number of indices may be anything.

    Returns:
        (*B, W) bool tensor.

    Raises:
        TypeError: An argument is of another type or dtype.
        ValueError: ``mask_num_targets`` is negative.
        InvalidStateError: (a ``RuntimeError`` and ``ValueError``) the indices have data dimensions.
        IndexError: On the CPU, an index out of range. On a GPU it is skipped, unless ``saccade.debug_checks`` is on.

    The function of ``accvlab.batching_helpers``.

    Example:
        >>> import torch
        >>> from saccade.ragged import RaggedBatch, get_mask_from_indices
        >>> indices = RaggedBatch(torch.tensor([[3, -3], [0, 7]]), sample_sizes=torch.tensor([2, 1]))
        >>> get_mask_from_indices(4, indices)
        tensor([[False,  True, False,  True],
                [ True, False, False, False]])
    """
    _require_indices("indices", indices)
    _require_count("mask_num_targets", mask_num_targets)
    if operators.serve(indices.tensor):
        index, sizes = _for_operator("indices", indices, mask_num_targets)
        return _unpadded(operators.mark(index, sizes, mask_num_targets), indices, indices.num_batch_dims)
    used, index = _used("indices", indices, mask_num_targets)
    count = used.shape[0] * mask_num_targets
    mask = torch.zeros(count + 1, dtype=torch.bool, device=indices.device)
    mask = mask.scatter(0, place_of(used, index, mask_num_targets).flatten(), True)
    return mask[:count].view(*indices.batch_shape, mask_num_targets)


def _for_operator(
    name: str,
    indices: RaggedBatch,  # (*B, M)
    width: int,
    sizes: Tensor | None = None,  # (S,), by default those of the indices
) -> tuple[Tensor, Tensor]:
    """The indices (S, M) and sizes (S,) as the operators take them."""
    batch_dims = indices.num_batch_dims
    index = flatten_samples(indices.tensor, batch_dims)
    if sizes is None:
        sizes = flatten_samples(indices.sample_sizes, batch_dims)
    if values_may_be_read(index):
        within, in_range, _ = resolved(index, sizes, width)
        require_in_range(name, index, within & ~in_range, width)
    return index, sizes


def _used(
    name: str,
    indices: RaggedBatch,  # (*B, M)
    width: int,
    used: Tensor | None = None,  # (S, M), by default those within the sizes
) -> tuple[Tensor, Tensor]:
    """Which slots are used, (S, M), and the indices counted from the front; 0 in slots that are not used."""
    index = flatten_samples(indices.tensor, indices.num_batch_dims)
    within, in_range, from_front = resolved(index, indices.sample_sizes.flatten(), width)
    used = within if used is None else used
    require_in_range(name, index, used & ~in_range, width)
    used = used & in_range
    return used, from_front.where(used, 0)


def _padded(name: str, data: Tensor | RaggedBatch, indices: RaggedBatch, dim: int) -> Tensor:
    """Data of the same batch dimensions as the indices, as (S, W, *D) with W from ``dim``."""
    tensor = data.tensor if isinstance(data, RaggedBatch) else data
    require_tensor(name, tensor)
    _require_device(name, tensor, "the indices", indices)
    batch_dims, shape = indices.num_batch_dims, tensor.shape
    if len(shape) <= batch_dims or shape[:batch_dims] != indices.batch_shape:
        raise InvalidStateError(
            f"{name}: expected the batch dimensions of the indices, {tuple(indices.batch_shape)}, and at least one "
            f"more, got shape {tuple(shape)}"
        )
    if dim >= len(shape):
        raise IndexError(f"dim_to_index_in: expected a dimension of {name}, which has {len(shape)}, got {dim}")
    return flatten_samples(tensor if dim == batch_dims else tensor.transpose(batch_dims, dim), batch_dims)


def _unpadded(tensor: Tensor, indices: RaggedBatch, dim: int) -> Tensor:
    """(S, W, *D) as (*B, ..., W, ...) with W at ``dim``."""
    batch_dims = indices.num_batch_dims
    if batch_dims > 1:
        tensor = tensor.reshape(*indices.batch_shape, *tensor.shape[1:])
    return tensor if dim == batch_dims else tensor.transpose(batch_dims, dim)


def _first_entries(name: str, entries: Tensor, indices: RaggedBatch) -> Tensor:
    """As many entries of (S, M, *D) as there are slots for indices."""
    slots, got = indices.max_sample_size, entries.shape[1]
    if got < slots:
        raise InvalidStateError(
            f"{name}: expected at least as many entries as there are slots for indices, {slots}, got {got}"
        )
    return entries if got == slots else entries[:, :slots]


def _dim_to_index_in(dim: int | None, indices: RaggedBatch) -> int:
    if dim is None:
        return indices.non_uniform_dim
    if dim < indices.num_batch_dims:
        raise InvalidArgumentError(
            f"dim_to_index_in: expected a dimension behind the {indices.num_batch_dims} batch dimensions, got {dim}"
        )
    return dim


def _require_ragged(name: str, value: RaggedBatch) -> None:
    if not isinstance(value, RaggedBatch):
        raise TypeError(f"{name}: expected a RaggedBatch, got {type(value).__name__}")


def _require_indices(name: str, indices: RaggedBatch) -> None:
    _require_ragged(name, indices)
    tensor = indices.tensor
    require_integer(name, tensor)
    if tensor.dim() != indices.num_batch_dims + 1:
        raise InvalidStateError(_expected_no_data_dims(name, indices))


def _expected_no_data_dims(name: str, indices: RaggedBatch) -> str:
    expected = indices.num_batch_dims + 1
    return f"{name}: expected {expected} dimensions, one behind the batch dimensions, got shape {tuple(indices.shape)}"


def _require_data(name: str, data: Tensor | RaggedBatch) -> None:
    if not isinstance(data, RaggedBatch):
        require_tensor(name, data)


def _require_device(name: str, value: Tensor | RaggedBatch, other_name: str, other: Tensor | RaggedBatch) -> None:
    if value.device != other.device:
        raise InvalidStateError(f"{name}: expected device {other.device}, that of {other_name}, got {value.device}")


def _require_alike(name: str, data: Tensor | RaggedBatch, other_name: str, other: Tensor | RaggedBatch) -> None:
    if data.dim() != other.dim():
        raise InvalidStateError(
            f"{name} and {other_name} must have the same number of dimensions, got shapes {tuple(data.shape)} and "
            f"{tuple(other.shape)}"
        )
    if data.dtype != other.dtype:
        raise InvalidStateError(f"{name}: expected {other.dtype}, the dtype of {other_name}, got {data.dtype}")


def _require_same_data_dims(name: str, data: Tensor, other_name: str, other: Tensor) -> None:
    if data.shape[2:] != other.shape[2:]:
        raise InvalidStateError(
            f"{name}: expected the data dimensions of {other_name}, {tuple(other.shape[2:])}, got "
            f"{tuple(data.shape[2:])}"
        )


def _require_count(name: str, value: int) -> None:
    if value < 0:
        raise ValueError(f"{name}: expected at least 0, got {value}")
