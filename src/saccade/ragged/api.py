"""Reading and writing entries of each sample by their indices.

On a GPU nothing here waits for the device, so an index out of range is skipped there, unless ``saccade.debug_checks``
asks to wait and raise. Compiled code skips it on every device. No memory is touched through such an index.

Each of these functions calls one operator. Every operator is linear in its data, and so is its gradient: it can be
differentiated any number of times.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from saccade.argument_checks import InvalidArgumentError, InvalidStateError, require_integer, require_tensor
from saccade.operator.declaration import Operator
from saccade.operator.gradients import Gradient
from saccade.ragged import reference
from saccade.ragged.batch import (
    RaggedBatch,
    like_given,
    require_data,
    require_data_dims_of,
    require_dtype_of,
    require_ragged,
)
from saccade.ragged.faults import IndexOutOfRangeError, first_of, values_may_be_read
from saccade.ragged.rows import as_samples, flatten_samples, from_samples


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
    if dim_to_index_in is None and type(input_indices) is RaggedBatch and input_indices.num_batch_dims == 1:
        data = input_data.tensor if type(input_data) is RaggedBatch else input_data
        args = data, input_indices.tensor, input_indices.sample_sizes, filler_value
        call = GATHER.known_calls.find(args)
        if call is not None:
            return input_indices.create_with_sample_sizes_like_self(call(*args))
    _require_indices("input_indices", input_indices)
    dim = _dim_to_index_in(dim_to_index_in, input_indices)
    data = _padded("input_data", input_data, input_indices, dim)
    entries = GATHER(data, *_index_and_sizes("input_indices", input_indices, data.shape[1]), filler_value)
    return input_indices.create_with_sample_sizes_like_self(from_samples(entries, input_indices.batch_shape, dim), dim)


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
    index, sizes = _index_and_sizes("output_indices", output_indices, output_num_targets)
    spread = SPREAD(data, index, sizes, None, 0, output_num_targets, filler_value)
    return from_samples(spread, output_indices.batch_shape, dim)


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
    dim = _dim_to_index_in(dim_to_index_in, output_indices)
    entries, data = _padded_alike(output_indices, ("to_write", to_write, dim), ("to_write_into", to_write_into, dim))
    entries = _first_entries("to_write", entries, output_indices)
    written = PUT(data, entries, *_index_and_sizes("output_indices", output_indices, data.shape[1]), None, 0)
    return like_given(to_write_into, from_samples(written, output_indices.batch_shape, dim))


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
        require_ragged(name, indices)
        _require_no_data_dims(name, indices, InvalidArgumentError)
    if source_indices.shape != target_indices.shape:
        raise InvalidArgumentError(
            f"target_indices: expected shape {tuple(source_indices.shape)}, that of source_indices, got "
            f"{tuple(target_indices.shape)}"
        )
    require_dtype_of("source_indices", source_indices, "target_indices", target_indices)
    require_integer("source_indices", source_indices.tensor)
    _require_device("target_indices", target_indices, "source_indices", source_indices)
    source_dim, target_dim = (
        data.non_uniform_dim if isinstance(data, RaggedBatch) else target_indices.num_batch_dims
        for data in (source_data, target_data)
    )
    source, target = _padded_alike(
        source_indices, ("source_data", source_data, source_dim), ("target_data", target_data, target_dim)
    )
    source_index, sizes = _index_and_sizes("source_indices", source_indices, source.shape[1])
    target_index, sizes = _index_and_sizes("target_indices", target_indices, target.shape[1], sizes)
    written = TRANSFER(target, source, target_index, sizes, source_index)
    return like_given(target_data, from_samples(written, source_indices.batch_shape, target_dim))


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
    marks = MARK(*_index_and_sizes("indices", indices, mask_num_targets), mask_num_targets)
    return from_samples(marks, indices.batch_shape, indices.num_batch_dims)


def _index_and_sizes(
    name: str,
    indices: RaggedBatch,  # (*B, M)
    width: int,
    sizes: Tensor | None = None,  # (S,), by default those of the indices
) -> tuple[Tensor, Tensor]:
    """The indices (S, M) and sizes (S,) as operators take them; raises for an index out of range where it may look."""
    batch_dims = indices.num_batch_dims
    index = flatten_samples(indices.tensor, batch_dims)
    if sizes is None:
        sizes = flatten_samples(indices.sample_sizes, batch_dims)
    if values_may_be_read(index):
        within, in_range, _ = reference.resolved(index, sizes, width)
        if (wrong := first_of(within & ~in_range)) is not None:
            raise IndexOutOfRangeError(
                f"{name}: expected indices in [{-width}, {width}), got {int(index[wrong])} in slot {wrong[1]} of "
                f"sample {wrong[0]}"
            )
    return index, sizes


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
    return as_samples(tensor, batch_dims, dim)


def _padded_alike(
    indices: RaggedBatch,
    of_entries: tuple[str, Tensor | RaggedBatch, int],  # name, data and where the entries lie
    of_data: tuple[str, Tensor | RaggedBatch, int],
) -> tuple[Tensor, Tensor]:
    """``_padded`` entries and the data that they are written to; raises unless they agree in all but the width."""
    (name, entries, _), (data_name, data, _) = of_entries, of_data
    require_data(name, entries)
    require_data(data_name, data)
    if entries.dim() != data.dim():
        raise InvalidStateError(
            f"{name} and {data_name} must have the same number of dimensions, got shapes {tuple(entries.shape)} and "
            f"{tuple(data.shape)}"
        )
    require_dtype_of(data_name, data, name, entries)
    padded, padded_data = (_padded(name, data, indices, dim) for name, data, dim in (of_entries, of_data))
    require_data_dims_of(data_name, padded_data, name, padded)
    return padded, padded_data


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


def _require_indices(name: str, indices: RaggedBatch) -> None:
    require_ragged(name, indices)
    require_integer(name, indices.tensor)
    _require_no_data_dims(name, indices, InvalidStateError)


def _require_no_data_dims(name: str, indices: RaggedBatch, error: type[Exception]) -> None:
    expected, shape = indices.num_batch_dims + 1, tuple(indices.shape)
    if len(shape) != expected:
        raise error(f"{name}: expected {expected} dimensions, one behind the batch dimensions, got shape {shape}")


def _require_device(name: str, value: Tensor | RaggedBatch, like_name: str, like: Tensor | RaggedBatch) -> None:
    if value.device != like.device:
        raise InvalidStateError(f"{name}: expected device {like.device}, that of {like_name}, got {value.device}")


def _require_count(name: str, value: int) -> None:
    if value < 0:
        raise ValueError(f"{name}: expected at least 0, got {value}")


def _fake_slots(*, data: Tensor, index: Tensor, **_: Any) -> Tensor:
    return data.new_empty((*index.shape, *data.shape[2:]))


def _fake_places(*, entries: Tensor, width: int, **_: Any) -> Tensor:
    return entries.new_empty((entries.shape[0], width, *entries.shape[2:]))


def _fake_copy(*, data: Tensor, **_: Any) -> Tensor:
    return data.new_empty(data.shape)


def _save_slots(index: Tensor, sizes: Tensor, paired_index: Tensor | None, paired_width: int) -> dict[str, Any]:
    return {"index": index, "sizes": sizes, "paired_index": paired_index, "paired_width": paired_width}


def _put_backward(
    needed: Sequence[str],
    grad_output: Tensor,
    index: Tensor,
    sizes: Tensor,
    paired_index: Tensor | None,
    paired_width: int,
) -> dict[str, Tensor]:
    gradients, slots = {}, (index, sizes, paired_index, paired_width)
    if "data" in needed:
        nothing = grad_output.new_zeros(()).expand(*index.shape, *grad_output.shape[2:])
        gradients["data"] = PUT(grad_output, nothing, *slots)
    if "entries" in needed:
        gradients["entries"] = TAKE(grad_output, *slots)
    return gradients


def _transfer_backward(
    needed: Sequence[str], grad_output: Tensor, index: Tensor, sizes: Tensor, source_index: Tensor, width: int
) -> dict[str, Tensor]:
    of_put = [{"source": "entries"}.get(name, name) for name in needed]
    gradients = _put_backward(of_put, grad_output, index, sizes, source_index, width)
    if "source" in needed:
        gradients["source"] = SUM(gradients["entries"], source_index, sizes, width)
    return gradients


_LAUNCH = "saccade.ragged.launch:prepare"

GATHER = Operator(
    "ragged_gather(Tensor data, Tensor index, Tensor sizes, Scalar filler) -> Tensor",
    fake=_fake_slots,
    reference=reference.gather,
    kernels=f"{_LAUNCH}_gather",
    nonempty=("data", "index"),
    gradient=Gradient(
        of=("data",),
        save=lambda data, index, sizes: {"index": index, "sizes": sizes, "width": data.shape[1]},
        backward=lambda _, grad_output, index, sizes, width: {"data": SUM(grad_output, index, sizes, width)},
    ),
    is_composite=True,
)
SUM = Operator(
    "ragged_sum(Tensor entries, Tensor index, Tensor sizes, int width) -> Tensor",
    fake=_fake_places,
    reference=reference.sum_up,
    kernels=f"{_LAUNCH}_sum",
    nonempty=("entries",),
    gradient=Gradient(
        of=("entries",),
        save=lambda index, sizes: {"index": index, "sizes": sizes},
        backward=lambda _, grad_output, index, sizes: {"entries": GATHER(grad_output, index, sizes, 0)},
    ),
    is_composite=True,
)
PUT = Operator(
    "ragged_put(Tensor data, Tensor entries, Tensor index, Tensor sizes, Tensor? paired_index, int paired_width) "
    "-> Tensor",
    fake=_fake_copy,
    reference=reference.put,
    kernels=f"{_LAUNCH}_put",
    nonempty=("data",),
    gradient=Gradient(of=("data", "entries"), save=_save_slots, backward=_put_backward),
    is_composite=True,
)
TRANSFER = Operator(
    "ragged_transfer(Tensor data, Tensor source, Tensor index, Tensor sizes, Tensor source_index) -> Tensor",
    fake=_fake_copy,
    reference=reference.transfer,
    kernels=f"{_LAUNCH}_transfer",
    nonempty=("data", "source"),
    gradient=Gradient(
        of=("data", "source"),
        save=lambda source, index, sizes, source_index: {
            "index": index,
            "sizes": sizes,
            "source_index": source_index,
            "width": source.shape[1],
        },
        backward=_transfer_backward,
    ),
    is_composite=True,
)
TAKE = Operator(
    "ragged_take(Tensor data, Tensor index, Tensor sizes, Tensor? paired_index, int paired_width) -> Tensor",
    fake=_fake_slots,
    reference=reference.take,
    kernels=f"{_LAUNCH}_take",
    nonempty=("data", "index"),
    gradient=Gradient(
        of=("data",),
        save=lambda data, index, sizes, paired_index, paired_width: {
            "width": data.shape[1],
            **_save_slots(index, sizes, paired_index, paired_width),
        },
        backward=lambda _, grad_output, index, sizes, paired_index, paired_width, width: {
            "data": SPREAD(grad_output, index, sizes, paired_index, paired_width, width, 0)
        },
    ),
    is_composite=True,
)
SPREAD = Operator(
    "ragged_spread(Tensor entries, Tensor index, Tensor sizes, Tensor? paired_index, int paired_width, int width, "
    "Scalar filler) -> Tensor",
    fake=_fake_places,
    reference=reference.spread,
    kernels=f"{_LAUNCH}_spread",
    nonempty=("entries",),
    gradient=Gradient(
        of=("entries",),
        save=_save_slots,
        backward=lambda _, grad_output, index, sizes, paired_index, paired_width: {
            "entries": TAKE(grad_output, index, sizes, paired_index, paired_width)
        },
    ),
    is_composite=True,
)
MARK = Operator(
    "ragged_mark(Tensor index, Tensor sizes, int width) -> Tensor",
    fake=lambda *, index, sizes, width: index.new_empty((index.shape[0], width), dtype=torch.bool),
    reference=reference.mark,
    kernels=f"{_LAUNCH}_mark",
    nonempty=("index",),
    is_composite=True,
)
PAD = Operator(
    "ragged_pad(Tensor values, Tensor begins, Tensor sizes, int slots) -> Tensor",
    fake=lambda *, values, begins, sizes, slots: values.new_empty((sizes.shape[0], slots, *values.shape[1:])),
    reference=reference.pad,
    kernels=f"{_LAUNCH}_pad",
    nonempty=("values", "sizes"),
    gradient=Gradient(
        of=("values",),
        save=lambda values, begins, sizes: {"begins": begins, "sizes": sizes, "length": values.shape[0]},
        backward=lambda _, grad_output, begins, sizes, length: {
            "values": reference.unpad(grad_output, begins, sizes, length)
        },
    ),
    is_composite=True,
)
