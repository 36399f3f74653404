"""Moving whole entries of any dtype: what the operators on ragged batches are made of.

Nothing here looks at a value or waits for a device. PyTorch has no indexing or filling for a few dtypes (unsigned
integers of more than 8 bits, 8-bit floats): those are moved as integers of the same width.
"""

import torch
from torch import Tensor

_MOVED_AS = {
    torch.uint16: torch.int16,
    torch.uint32: torch.int32,
    torch.uint64: torch.int64,
    torch.float8_e4m3fn: torch.uint8,
    torch.float8_e4m3fnuz: torch.uint8,
    torch.float8_e5m2: torch.uint8,
    torch.float8_e5m2fnuz: torch.uint8,
}


def movable(tensor: Tensor) -> Tensor:
    """The tensor, or a view of it as integers where its dtype lacks operators."""
    return tensor.view(_MOVED_AS[tensor.dtype]) if tensor.dtype in _MOVED_AS else tensor


def moved(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """What ``movable`` made, in its dtype again; such a view has no gradient, not even to the same dtype."""
    return tensor.view(dtype) if dtype in _MOVED_AS else tensor


def fill(
    tensor: Tensor,  # (..., *D)
    chosen: Tensor,  # bool, broadcast to tensor
    value: float,
) -> Tensor:
    """A copy with ``value``, converted as PyTorch converts a scalar, wherever ``chosen``; no gradient from there."""
    if tensor.dtype not in _MOVED_AS:
        return tensor.masked_fill(chosen, value)
    # torch.where would promote a Python number.
    return pick(chosen, torch.full((), value, dtype=tensor.dtype, device=tensor.device), tensor)


def pick(
    chosen: Tensor,  # bool
    first: Tensor,
    second: Tensor,  # of the same dtype
) -> Tensor:
    """``first`` where chosen and ``second`` elsewhere, broadcast to each other."""
    if first.is_floating_point():  # torch.where takes 8-bit floats, and as such they keep their gradients
        return torch.where(chosen, first, second)
    return moved(torch.where(chosen, movable(first), movable(second)), first.dtype)


def fill_in_place(tensor: Tensor, chosen: Tensor, value: float) -> None:
    """``fill`` into the tensor itself."""
    if tensor.dtype not in _MOVED_AS:
        tensor.masked_fill_(chosen, value)
    else:
        tensor.copy_(fill(tensor, chosen, value))


def beside_entries(
    mask: Tensor,  # (*B, N)
    dim: int,
    data_dims: int,
) -> Tensor:
    """The mask as a view that broadcasts with data of ``data_dims`` dimensions whose N lies at ``dim``."""
    batch_dims = mask.dim() - 1
    ones = [1] * (dim - batch_dims)
    return mask.reshape(*mask.shape[:-1], *ones, mask.shape[-1], *[1] * (data_dims - dim - 1))


def filled(
    entries: Tensor,  # (S, M, *D)
    used: Tensor,  # (S, M) bool
    filler: float,
) -> Tensor:  # (S, M, *D)
    """The entries of slots that are used, the filler in all others."""
    return fill(entries, ~beside_entries(used, 1, entries.dim()), filler)


def gather_entries(
    data: Tensor,  # (S, W, *D)
    index: Tensor,  # (S, K) int64, in [0, W) or, with W = 0, of value 0
) -> Tensor:  # (S, K, *D)
    """Entries of each sample by index, which may repeat.

    The gradient is that of PyTorch's advanced indexing: on the CPU, contributions to one entry are added in the order
    of k, each sum rounded to the dtype.
    """
    sample = torch.arange(index.shape[0], device=index.device)[:, None]
    data = _never_empty(data)
    # As 8-bit floats they keep their gradients, and on the CPU PyTorch indexes them from 2.10 on.
    if data.is_floating_point() and (data.requires_grad or data.dtype not in _MOVED_AS):
        return data[sample, index]
    return moved(movable(data)[sample, index], data.dtype)


def gather_distinct_entries(
    data: Tensor,  # (S, W, *D)
    index: Tensor,  # (S, K) int64, in [0, W) or, with W = 0, of value 0
) -> Tensor:  # (S, K, *D)
    """``gather_entries`` where at most one of the indices to an entry gets a gradient other than zero.

    Then the order of additions does not matter, and the gradient need not sort the indices.
    """
    data = _never_empty(data)
    samples, width = data.shape[:2]
    rows = index + torch.arange(samples, device=index.device)[:, None] * width
    flat = movable(data).reshape(samples * width, *data.shape[2:])
    return moved(flat.index_select(0, rows.flatten()), data.dtype).view(*index.shape, *data.shape[2:])


def flatten_samples(tensor: Tensor, batch_dims: int) -> Tensor:
    """(*B, ...) as (S, ...)."""
    return tensor if batch_dims == 1 else tensor.flatten(0, batch_dims - 1)


def as_samples(tensor: Tensor, batch_dims: int, dim: int) -> Tensor:
    """(*B, ..., N, ...) with N at ``dim`` as (S, N, *D)."""
    return flatten_samples(tensor if dim == batch_dims else tensor.transpose(batch_dims, dim), batch_dims)


def from_samples(tensor: Tensor, batch_shape: torch.Size, dim: int) -> Tensor:
    """The reverse of ``as_samples``."""
    batch_dims = len(batch_shape)
    if batch_dims > 1:
        tensor = tensor.reshape(*batch_shape, *tensor.shape[1:])
    return tensor if dim == batch_dims else tensor.transpose(batch_dims, dim)


def _never_empty(data: Tensor) -> Tensor:
    """(S, W, *D) with W at least 1, so that an index for which there is no entry has something to point to."""
    if data.shape[1]:
        return data
    return torch.cat([data, data.new_zeros(data.shape[0], 1, *data.shape[2:])], 1)
