"""Entries by their indices in plain PyTorch: what the operators mean, their CPU path and the oracle of their kernels.

Letters: S samples, M slots for indices, W entries of a sample, V entries of a source, *D data dimensions. A slot is
used if it is within the size of its sample and its index is in range; of a pair of indices, if both are.
"""

from typing import Any

import torch
from torch import Tensor

from saccade.ragged.rows import filled, gather_entries, movable, moved


def gather(
    data: Tensor,  # (S, W, *D)
    index: Tensor,  # (S, M) int32 or int64
    sizes: Tensor,  # (S,) integer
    filler: Any,
) -> Tensor:  # (S, M, *D)
    """The entries that indices point to, the filler in slots that are not used."""
    used, index = _used(index, sizes, data.shape[1])
    return filled(gather_entries(data, index), used, filler).contiguous()


def sum_up(
    entries: Tensor,  # (S, M, *D)
    index: Tensor,  # (S, M) int32 or int64
    sizes: Tensor,  # (S,) integer
    width: int,
) -> Tensor:  # (S, W, *D)
    """The gradient of ``gather``: of each place the sum of all entries whose index points to it."""
    return _summed(entries, *_used(index, sizes, width), width)


def put(
    data: Tensor,  # (S, W, *D)
    entries: Tensor,  # (S, M, *D) in the dtype of data
    index: Tensor,  # (S, M) int32 or int64
    sizes: Tensor,  # (S,) integer
    paired_index: Tensor | None,  # (S, M) in the dtype of index
    paired_width: int,
) -> Tensor:  # (S, W, *D)
    """A copy of the data with entries written to it. Of several to one place the last is, and alone gets a gradient."""
    used, index = _used(index, sizes, data.shape[1], paired_index, paired_width)
    samples, width = data.shape[:2]
    rows = _place(used & _is_last(used, index, width), index, width)
    # The row at the end takes what is not to be written, so that all is one copy. It is cut off again.
    flat = movable(data).reshape(samples * width, *data.shape[2:])
    flat = torch.cat([flat, flat.new_zeros(1, *data.shape[2:])])
    # Not in place, for torch.func.vmap over entries alone.
    flat = flat.index_put((rows.flatten(),), movable(entries).reshape(rows.numel(), *data.shape[2:]))
    return moved(flat[: samples * width], data.dtype).view(data.shape)


def transfer(
    data: Tensor,  # (S, W, *D)
    source: Tensor,  # (S, V, *D) in the dtype of data
    index: Tensor,  # (S, M) int32 or int64
    sizes: Tensor,  # (S,) integer
    source_index: Tensor,  # (S, M) in the dtype of index
) -> Tensor:  # (S, W, *D)
    """``put`` of the entries of a source that the second of each pair of indices points to."""
    entries = gather_entries(source, _used(source_index, sizes, source.shape[1])[1])
    return put(data, entries, index, sizes, source_index, source.shape[1])


def take(
    data: Tensor,  # (S, W, *D)
    index: Tensor,  # (S, M) int32 or int64
    sizes: Tensor,  # (S,) integer
    paired_index: Tensor | None,  # (S, M) in the dtype of index
    paired_width: int,
) -> Tensor:  # (S, M, *D)
    """The gradient of ``put``: for each slot what lies at its index, 0 for what another slot overwrote."""
    used, index = _used(index, sizes, data.shape[1], paired_index, paired_width)
    used = used & _is_last(used, index, data.shape[1])
    return filled(gather_entries(data, index.where(used, 0)), used, 0).contiguous()


def spread(
    entries: Tensor,  # (S, M, *D)
    index: Tensor,  # (S, M) int32 or int64
    sizes: Tensor,  # (S,) integer
    paired_index: Tensor | None,  # (S, M) in the dtype of index
    paired_width: int,
    width: int,
    filler: Any,
) -> Tensor:  # (S, W, *D)
    """``put`` into data that are one number everywhere; with 0, the gradient of ``take``."""
    filler = torch.full((), filler, dtype=entries.dtype, device=entries.device)
    data = filler.expand(entries.shape[0], width, *entries.shape[2:])
    return put(data, entries, index, sizes, paired_index, paired_width)


def mark(
    index: Tensor,  # (S, M) int32 or int64
    sizes: Tensor,  # (S,) integer
    width: int,
) -> Tensor:  # (S, W) bool
    """True where an index points to."""
    used, index = _used(index, sizes, width)
    count = index.shape[0] * width
    marks = torch.zeros(count + 1, dtype=torch.bool, device=index.device)
    return marks.scatter(0, _place(used, index, width).flatten(), True)[:count].view(index.shape[0], width)


def pad(
    values: Tensor,  # (T, *D)
    begins: Tensor,  # (S,) int64
    sizes: Tensor,  # (S,) int64
    slots: int,
) -> Tensor:  # (S, N, *D)
    """Samples that lie end to end, each from where it begins on, padded with 0."""
    used, rows = _rows(begins, sizes, slots, values.shape[0])
    entries = gather_entries(values[None], rows.where(used, 0).view(1, -1)).view(*rows.shape, *values.shape[1:])
    return filled(entries, used, 0).contiguous()


def unpad(
    padded: Tensor,  # (S, N, *D)
    begins: Tensor,  # (S,) int64
    sizes: Tensor,  # (S,) int64
    length: int,
) -> Tensor:  # (T, *D)
    """The gradient of ``pad``."""
    used, rows = _rows(begins, sizes, padded.shape[1], length)
    return _summed(padded.flatten(0, 1)[None], used.view(1, -1), rows.view(1, -1), length)[0]


def resolved(
    index: Tensor,  # (S, M) integer
    sizes: Tensor,  # (S,) integer
    width: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(S, M): which slots are within the sizes; which indices are in range; those counted from the front, int64."""
    index = index.long()
    within = torch.arange(index.shape[1], device=index.device) < sizes.long()[:, None]
    from_front = index.where(index >= 0, index + width)
    return within, (from_front >= 0) & (from_front < width), from_front


def _used(
    index: Tensor, sizes: Tensor, width: int, paired_index: Tensor | None = None, paired_width: int = 0
) -> tuple[Tensor, Tensor]:
    """(S, M): which slots are used, and their indices counted from the front, int64, 0 in all others."""
    within, in_range, from_front = resolved(index, sizes, width)
    used = within & in_range
    if paired_index is not None:
        used = used & resolved(paired_index, sizes, paired_width)[1]
    return used, from_front.where(used, 0)


def _place(used: Tensor, index: Tensor, width: int) -> Tensor:
    """(S, M) rows of the S samples' entries laid end to end; the row behind them for slots that are not used."""
    rows = index + torch.arange(index.shape[0], device=index.device)[:, None] * width
    return rows.where(used, index.shape[0] * width)


def _is_last(used: Tensor, index: Tensor, width: int) -> Tensor:
    """(S, M) which of the slots that are used are the last ones with their index; anything for the others."""
    rows = _place(used, index, width)
    slot = torch.arange(index.shape[1], device=index.device).expand_as(rows)
    last = torch.full((index.shape[0] * width + 1,), -1, device=rows.device)
    last = last.scatter_reduce(0, rows.flatten(), slot.flatten(), "amax")
    return last[rows] == slot


def _summed(entries: Tensor, used: Tensor, index: Tensor, width: int) -> Tensor:
    samples = index.shape[0]
    total = entries.new_zeros(samples * width + 1, *entries.shape[2:])
    rows = _place(used, index, width).flatten()
    total.index_put_((rows,), entries.reshape(rows.numel(), *entries.shape[2:]), accumulate=True)
    return total[: samples * width].view(samples, width, *entries.shape[2:])


def _rows(begins: Tensor, sizes: Tensor, slots: int, length: int) -> tuple[Tensor, Tensor]:
    """(S, N) which slots are filled, and from which rows."""
    slot = torch.arange(slots, device=sizes.device)
    rows = begins[:, None] + slot
    return (slot < sizes[:, None]) & (rows >= 0) & (rows < length), rows
