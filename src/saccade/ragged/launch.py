"""How the kernels of ragged batches are launched, and for which sizes and dtypes."""

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from saccade.operator.launch import TRITON_DTYPE, cdiv, dependent_launch, next_power_of_2
from saccade.ragged.kernels import gather_kernel, mark_kernel, pad_kernel, put_kernel, sum_kernel

_WORD = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_TRITON_WORD = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64, 16: tl.int64}
# Triton has pointers to these; the kernels themselves make of them pointers to words, without the cost of a view.
_HAVE_POINTERS = frozenset(
    (
        *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
    )
)
# Half precision is not summed: what PyTorch rounds when, and that the sum must be the same, is left to PyTorch.
_SUMMED = (torch.float32, torch.float64, torch.complex64, torch.complex128)
_MOST_COMPARISONS = 2**30  # of an index with an entry or another index: some 100 us
_MOST_SLOTS_SUMMED = 2**13  # one program adds up all of them if they point to one entry


def _as_words(
    tensor: Tensor,  # (S, W, *D)
    before: int = 2,  # how many axes lie before *D
) -> Tensor:
    """The tensor, a view of it, or a copy if need be, in a dtype that kernels take, with *D as one axis in memory."""
    if tensor.dtype not in _HAVE_POINTERS:
        if tensor.dtype.itemsize == 16:
            tensor = torch.view_as_real(tensor)
        tensor = tensor.view(_WORD[tensor.dtype.itemsize])
    return _with_one_axis(tensor, before)


def _as_numbers(
    tensor: Tensor,  # (S, W, *D)
) -> Tensor:
    return _with_one_axis(torch.view_as_real(tensor) if tensor.is_complex() else tensor, 2)


def _with_one_axis(tensor: Tensor, before: int) -> Tensor:
    return tensor if tensor.dim() <= before + 1 or tensor.is_contiguous() else tensor.flatten(before)


def _as_signed(sizes: Tensor) -> Tensor:
    """Sizes in a dtype that the kernels load."""
    return sizes if sizes.dtype in (torch.int64, torch.int32) else sizes.long()


def _steps(*tensors: Tensor | None) -> tuple[tuple[int, ...], ...]:
    """Of (S, W, *D), which is contiguous if *D has several axes, as of (S, W, D)."""
    given = [() if tensor is None else tensor.stride() for tensor in tensors]
    return tuple(steps if len(steps) == 3 else (*steps[:2], 1) if steps else (0, 0) for steps in given)


def _words_of(value: Any, dtype: torch.dtype) -> tuple[int, int]:
    """A number as an element, in two words or the same one twice."""
    element = torch.full((1, 1), value, dtype=dtype, device="cpu")
    if dtype.itemsize == 16:
        element = torch.view_as_real(element)
    words = element.view(_WORD[element.dtype.itemsize]).flatten().tolist()
    return words[0], words[-1]


def _words_in(data_dims: Sequence[int], dtype: torch.dtype) -> int:
    """How many words an entry has."""
    return prod(data_dims) * (2 if dtype.itemsize == 16 else 1)


def _tile(rows: int, inner: int) -> tuple[int, int]:
    """How many entries and elements of each a program moves: few where there are few, so that all of a GPU works."""
    block_d = min(next_power_of_2(inner), 256)
    return max((512 if rows * inner < 2**20 else 2048) // block_d, 1), block_d


def _position_dtype(total: int, block: int) -> tl.dtype:
    return tl.int32 if total < 2**31 - block else tl.int64  # positions run to the end of the last tile


def _prepare_reading(
    data: Tensor, index: Tensor, sizes: Tensor, paired_index: Tensor | None, paired_width: int, filler: Any, last: bool
) -> Callable[..., Tensor]:
    """Make what reads entries; with ``last``, of the slots that point to one entry only the last does."""
    total, words, dtype = index.numel(), _words_in(data.shape[2:], data.dtype), data.dtype
    block_m, block_d = _tile(total, words)
    block_m = min(block_m, 64) if last else block_m
    inner_tiles = cdiv(words, block_d)
    steps = _steps(_as_words(data), index, paired_index, _as_signed(sizes))
    launch = gather_kernel.prepare(
        (cdiv(total, block_m) * inner_tiles,),
        *(total, index.shape[1], data.shape[1], paired_width, words, inner_tiles, *steps, _words_of(filler, dtype)),
        WORD=_TRITON_WORD[dtype.itemsize],
        LAST=last,
        POSITION=_position_dtype(total, block_m),
        BLOCK_M=block_m,
        BLOCK_D=block_d,
        BLOCK_LATER=max(64 // block_m, 16),
        num_warps=4,
        **dependent_launch(data.device),
    )
    shape = (*index.shape, *data.shape[2:])

    def read(data: Tensor, index: Tensor, sizes: Tensor, paired_index: Tensor | None, *_: Any) -> Tensor:
        output = data.new_empty(shape)
        launch((_as_words(data), index, _as_signed(sizes), paired_index, _as_words(output)))
        return output

    return read


def prepare_gather(
    data: Tensor,  # (S, W, *D), not empty
    index: Tensor,  # (S, M) int32 or int64, not empty
    sizes: Tensor,  # (S,) integer
    filler: Any,
) -> Callable[..., Tensor]:  # (S, M, *D)
    """Make ``GATHER``."""
    read = _prepare_reading(data, index, sizes, None, 0, filler, last=False)
    return lambda data, index, sizes, _: read(data, index, sizes, None)


def prepare_take(
    data: Tensor,  # (S, W, *D), not empty
    index: Tensor,  # (S, M) int32 or int64, not empty
    sizes: Tensor,  # (S,) integer
    paired_index: Tensor | None,  # (S, M) in the dtype of index
    paired_width: int,
) -> Callable[..., Tensor] | None:  # (S, M, *D)
    """Make ``TAKE``, up to ``_MOST_COMPARISONS``."""
    if index.numel() * index.shape[1] > _MOST_COMPARISONS:
        return None
    return _prepare_reading(data, index, sizes, paired_index, paired_width, 0, last=True)


def prepare_sum(
    entries: Tensor,  # (S, M, *D), not empty
    index: Tensor,  # (S, M) int32 or int64
    sizes: Tensor,  # (S,) integer
    width: int,
) -> Callable[..., Tensor] | None:  # (S, W, *D)
    """Make ``SUM``, in the order of the slots, up to ``_MOST_COMPARISONS`` and in the dtypes that are summed."""
    (samples, slots, *trailing), dtype = entries.shape, entries.dtype
    inner = prod(trailing) * (2 if dtype.is_complex else 1)
    block_d = min(next_power_of_2(inner), 128)
    block_w = 512 // block_d
    width_tiles, inner_tiles = cdiv(width, block_w), cdiv(inner, block_d)
    programs = samples * width_tiles * inner_tiles
    if dtype not in _SUMMED or not width or slots > _MOST_SLOTS_SUMMED or programs * slots > _MOST_COMPARISONS:
        return None
    launch = sum_kernel.prepare(
        (programs,),
        *(slots, width, width_tiles, inner, inner_tiles),
        *_steps(_as_numbers(entries), index, _as_signed(sizes)),
        COMPUTE=TRITON_DTYPE[dtype.to_real()],
        BLOCK_W=block_w,
        BLOCK_D=block_d,
        BLOCK_M=min(max(next_power_of_2(slots), 16), 128),
        num_warps=1,
        **dependent_launch(entries.device),
    )

    def add_up(entries: Tensor, index: Tensor, sizes: Tensor, width: int) -> Tensor:
        output = entries.new_empty((samples, width, *trailing))
        launch((_as_numbers(entries), index, _as_signed(sizes), _as_numbers(output)))
        return output

    return add_up


def _prepare_writing(
    data: Tensor | None,
    entries: Tensor,
    index: Tensor,
    sizes: Tensor,
    paired_index: Tensor | None,
    paired_width: int,
    width: int,
    filler: Any = 0,
    by_pair: bool = False,
) -> Callable[..., Tensor] | None:
    """Make what writes entries to a copy of data, or to data that are one number; up to ``_MOST_COMPARISONS``."""
    if not width or index.numel() * width > _MOST_COMPARISONS:
        return None
    (samples, _, *trailing), dtype, slots = entries.shape, entries.dtype, index.shape[1]
    words = _words_in(trailing, dtype)
    block_d = min(next_power_of_2(words), 64)
    block_w = min(512 // block_d, 128)
    width_tiles = cdiv(width, block_w)
    old = None if data is None else _as_words(data)
    steps = _steps(_as_words(entries), old, index, paired_index, _as_signed(sizes))
    launch = put_kernel.prepare(
        (samples * width_tiles,),
        *(slots, width, width_tiles, paired_width, words, *steps, _words_of(filler, dtype)),
        BY_PAIR=by_pair,
        WORD=_TRITON_WORD[dtype.itemsize],
        BLOCK_W=block_w,
        BLOCK_D=block_d,
        BLOCK_M=32,
        num_warps=4,
        **dependent_launch(entries.device),
    )

    def write(
        data: Tensor | None, entries: Tensor, index: Tensor, sizes: Tensor, paired_index: Tensor | None, *_: Any
    ) -> Tensor:
        output = entries.new_empty((samples, width, *trailing))
        old = None if data is None else _as_words(data)
        launch((_as_words(entries), old, index, _as_signed(sizes), paired_index, _as_words(output)))
        return output

    return write


def prepare_put(
    data: Tensor,  # (S, W, *D), not empty
    entries: Tensor,  # (S, M, *D) in the dtype of data
    index: Tensor,  # (S, M) int32 or int64
    sizes: Tensor,  # (S,) integer
    paired_index: Tensor | None,  # (S, M) in the dtype of index
    paired_width: int,
) -> Callable[..., Tensor] | None:  # (S, W, *D)
    """Make ``PUT``."""
    return _prepare_writing(data, entries, index, sizes, paired_index, paired_width, data.shape[1])


def prepare_transfer(
    data: Tensor,  # (S, W, *D), not empty
    source: Tensor,  # (S, V, *D) in the dtype of data, not empty
    index: Tensor,  # (S, M) int32 or int64
    sizes: Tensor,  # (S,) integer
    source_index: Tensor,  # (S, M) in the dtype of index
) -> Callable[..., Tensor] | None:  # (S, W, *D)
    """Make ``TRANSFER``."""
    widths = source.shape[1], data.shape[1]
    return _prepare_writing(data, source, index, sizes, source_index, *widths, by_pair=True)


def prepare_spread(
    entries: Tensor,  # (S, M, *D), not empty
    index: Tensor,  # (S, M) int32 or int64
    sizes: Tensor,  # (S,) integer
    paired_index: Tensor | None,  # (S, M) in the dtype of index
    paired_width: int,
    width: int,
    filler: Any,
) -> Callable[..., Tensor] | None:  # (S, W, *D)
    """Make ``SPREAD``."""
    write = _prepare_writing(None, entries, index, sizes, paired_index, paired_width, width, filler)
    return write and partial(write, None)


def prepare_mark(
    index: Tensor,  # (S, M) int32 or int64, not empty
    sizes: Tensor,  # (S,) integer
    width: int,
) -> Callable[..., Tensor] | None:  # (S, W) bool
    """Make ``MARK``."""
    if not width or index.numel() * width > _MOST_COMPARISONS:
        return None
    (samples, slots), width_tiles = index.shape, cdiv(width, 128)
    launch = mark_kernel.prepare(
        (samples * width_tiles,),
        *(slots, width, width_tiles, *_steps(index, _as_signed(sizes))),
        BLOCK_W=128,
        BLOCK_M=32,
        num_warps=4,
        **dependent_launch(index.device),
    )

    def mark(index: Tensor, sizes: Tensor, width: int) -> Tensor:
        output = index.new_empty((samples, width), dtype=torch.bool)
        launch((index, _as_signed(sizes), output))
        return output

    return mark


def prepare_pad(
    values: Tensor,  # (T, *D), not empty
    begins: Tensor,  # (S,) int64
    sizes: Tensor,  # (S,) int64, not empty
    slots: int,
) -> Callable[..., Tensor] | None:  # (S, N, *D)
    """Make ``PAD``."""
    if not slots:
        return None
    (length, *trailing), total, dtype = values.shape, len(sizes) * slots, values.dtype
    words = _words_in(trailing, dtype)
    block_n, block_d = _tile(total, words)
    inner_tiles = cdiv(words, block_d)
    launch = pad_kernel.prepare(
        (cdiv(total, block_n) * inner_tiles,),
        *(total, slots, length, words, inner_tiles, *_steps(_as_words(values[None]), begins, sizes)),
        WORD=_TRITON_WORD[dtype.itemsize],
        POSITION=_position_dtype(total, block_n),
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        num_warps=4,
        **dependent_launch(values.device),
    )
    shape = (len(sizes), slots, *trailing)

    def pad(values: Tensor, begins: Tensor, sizes: Tensor, slots: int) -> Tensor:
        output = values.new_empty(shape)
        launch((_as_words(values, 1), begins, sizes, _as_words(output)))
        return output

    return pad
