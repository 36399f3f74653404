"""The operators of the library that serve index operations on ragged batches on a GPU.

What is an operator here has a Triton kernel: reading and writing entries by indices, marking them, and padding samples
that lie end to end. All else on ragged batches, and all on the CPU, is made of PyTorch's operators, which autograd,
``torch.func`` and compilers see into. So are sizes that are too large for kernels that look at every pair of index and
entry, and the sums of half precision, in which PyTorch says what is rounded when.

Every operator is linear in its data, and its gradient is another one of them: they can be differentiated any number of
times.
"""

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from saccade.operator.torch_internals import tangents_may_go_along
from saccade.ordinary_tensors import is_wrapped
from saccade.ragged.rows import (
    beside_entries,
    fill,
    gather_entries,
    last_slots,
    place_of,
    put_entries,
    resolved,
    sum_of_entries,
)
from saccade.registration import DirectCall, Gradient, register, register_autograd
from saccade.triton_dispatch import served_by_triton


def serve(*tensors: Tensor) -> bool:
    """Whether calls on these tensors go through the operators.

    Not where ``torch.func`` transforms one of them, or tangents of forward-mode differentiation go with them.
    """
    if not served_by_triton(tensors[0]):
        return False
    if torch.compiler.is_compiling():
        return True
    if tangents_may_go_along():
        return False
    for tensor in tensors:  # noqa: SIM110 - any(...) takes twice as long
        if is_wrapped(tensor):
            return False
    return True


@cache
def _kernels() -> ModuleType:
    """The kernels, imported when first used: importing this module does not import Triton."""
    from saccade.ragged import kernels

    return kernels


def _used(index: Tensor, sizes: Tensor, width: int, other: Tensor | None, other_width: int) -> tuple[Tensor, Tensor]:
    """Which slots are used, (S, M), and their indices from the front, 0 in the others."""
    within, in_range, index = resolved(index, sizes, width)
    used = within & in_range
    if other is not None:
        used &= resolved(other, sizes, other_width)[1]
    return used, index.where(used, 0)


def _gather(data: Tensor, index: Tensor, sizes: Tensor, filler: Any) -> Tensor:
    return _prepare_gather(data, index, sizes, filler)(data, index, sizes, filler)


def _prepare_gather(data: Tensor, index: Tensor, sizes: Tensor, filler: Any) -> Callable[..., Tensor]:
    if served_by_triton(data) and index.numel() and data.numel():
        return _kernels().prepare_gather(data, index, sizes, filler)
    return _gather_in_torch


def _gather_in_torch(data: Tensor, index: Tensor, sizes: Tensor, filler: Any) -> Tensor:
    used, index = _used(index, sizes, data.shape[1], None, 0)
    entries = gather_entries(data, index)
    return fill(entries, ~beside_entries(used, 1, entries.dim()), filler).contiguous()


def _gather_fake(data: Tensor, index: Tensor, sizes: Tensor, filler: Any) -> Tensor:
    return data.new_empty((*index.shape, *data.shape[2:]))


class _GatherGradient(Gradient):
    @staticmethod
    def save(ctx: Any, args: tuple[Any, ...], result: Tensor) -> None:
        data, index, sizes, _ = args
        ctx.save_for_backward(index, sizes)
        ctx.width = data.shape[1]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        index, sizes = ctx.saved_tensors
        args = grad_output, index, sizes, ctx.width
        sum_up = add_up.known(args[:3], args[3:]) or add_up.learn(args[:3], args[3:], args)
        return sum_up(*args), None, None, None


def _add_up(entries: Tensor, index: Tensor, sizes: Tensor, width: int) -> Tensor:
    return _prepare_add_up(entries, index, sizes, width)(entries, index, sizes, width)


def _prepare_add_up(entries: Tensor, index: Tensor, sizes: Tensor, width: int) -> Callable[..., Tensor]:
    if served_by_triton(entries) and entries.numel() and width:
        kernels = _kernels()
        if kernels.sums_fast(entries, width):
            return kernels.prepare_sum(entries, index, sizes, width)
    return _add_up_in_torch


def _add_up_in_torch(entries: Tensor, index: Tensor, sizes: Tensor, width: int) -> Tensor:
    return sum_of_entries(entries, *_used(index, sizes, width, None, 0), width)


def _add_up_fake(entries: Tensor, index: Tensor, sizes: Tensor, width: int) -> Tensor:
    return entries.new_empty((index.shape[0], width, *entries.shape[2:]))


class _AddUpGradient(Gradient):
    @staticmethod
    def save(ctx: Any, args: tuple[Any, ...], result: Tensor) -> None:
        _, index, sizes, _ = args
        ctx.save_for_backward(index, sizes)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return gather(grad_output, *ctx.saved_tensors, 0), None, None, None


def _put(data: Tensor, entries: Tensor, index: Tensor, sizes: Tensor, other: Tensor | None, other_width: int) -> Tensor:
    if served_by_triton(data) and data.numel():
        kernels = _kernels()
        if kernels.puts_fast(index, data.shape[1]):
            return kernels.put(data, entries, index, sizes, other, other_width)
    return put_entries(data, *_used(index, sizes, data.shape[1], other, other_width), entries)


def _put_fake(
    data: Tensor, entries: Tensor, index: Tensor, sizes: Tensor, other: Tensor | None, other_width: int
) -> Tensor:
    return data.new_empty(data.shape)


class _PutGradient(Gradient):
    @staticmethod
    def save(ctx: Any, args: tuple[Any, ...], result: Tensor) -> None:
        _, _, index, sizes, other, other_width = args
        ctx.save_for_backward(index, sizes, other)
        ctx.other_width = other_width

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        index, sizes, other = ctx.saved_tensors
        of_data = of_entries = None
        if ctx.needs_input_grad[0]:
            nothing = grad_output.new_zeros(()).expand(*index.shape, *grad_output.shape[2:])
            of_data = put(grad_output, nothing, index, sizes, other, ctx.other_width)
        if ctx.needs_input_grad[1]:
            of_entries = take(grad_output, index, sizes, other, ctx.other_width)
        return of_data, of_entries, None, None, None, None


def _transfer(data: Tensor, source: Tensor, index: Tensor, sizes: Tensor, source_index: Tensor) -> Tensor:
    if served_by_triton(data) and data.numel() and source.numel():
        kernels = _kernels()
        if kernels.puts_fast(index, data.shape[1]):
            return kernels.transfer(data, source, index, sizes, source_index)
    return _put(data, _gather(source, source_index, sizes, 0), index, sizes, source_index, source.shape[1])


def _transfer_fake(data: Tensor, source: Tensor, index: Tensor, sizes: Tensor, source_index: Tensor) -> Tensor:
    return data.new_empty(data.shape)


class _TransferGradient(Gradient):
    @staticmethod
    def save(ctx: Any, args: tuple[Any, ...], result: Tensor) -> None:
        _, source, index, sizes, source_index = args
        ctx.save_for_backward(index, sizes, source_index)
        ctx.width = source.shape[1]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        index, sizes, source_index = ctx.saved_tensors
        of_data = of_source = None
        if ctx.needs_input_grad[0]:
            nothing = grad_output.new_zeros(()).expand(*index.shape, *grad_output.shape[2:])
            of_data = put(grad_output, nothing, index, sizes, source_index, ctx.width)
        if ctx.needs_input_grad[1]:
            of_slots = take(grad_output, index, sizes, source_index, ctx.width)
            of_source = add_up(of_slots, source_index, sizes, ctx.width)
        return of_data, of_source, None, None, None


def _take(data: Tensor, index: Tensor, sizes: Tensor, other: Tensor | None, other_width: int) -> Tensor:
    if served_by_triton(data) and index.numel() and data.numel():
        kernels = _kernels()
        if kernels.takes_fast(index):
            return kernels.gather(data, index, sizes, 0, other, other_width, last=True)
    used, index = _used(index, sizes, data.shape[1], other, other_width)
    used &= last_slots(used, index, data.shape[1])
    entries = gather_entries(data, index.where(used, 0))
    return fill(entries, ~beside_entries(used, 1, entries.dim()), 0).contiguous()


def _take_fake(data: Tensor, index: Tensor, sizes: Tensor, other: Tensor | None, other_width: int) -> Tensor:
    return data.new_empty((*index.shape, *data.shape[2:]))


class _TakeGradient(Gradient):
    @staticmethod
    def save(ctx: Any, args: tuple[Any, ...], result: Tensor) -> None:
        data, index, sizes, other, other_width = args
        ctx.save_for_backward(index, sizes, other)
        ctx.widths = other_width, data.shape[1]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return spread(grad_output, *ctx.saved_tensors, *ctx.widths, 0), None, None, None, None


def _spread(
    entries: Tensor, index: Tensor, sizes: Tensor, other: Tensor | None, other_width: int, width: int, filler: Any
) -> Tensor:
    if served_by_triton(entries) and entries.numel() and width:
        kernels = _kernels()
        if kernels.puts_fast(index, width):
            return kernels.spread(entries, index, sizes, other, other_width, width, filler)
    data = filled_with(filler, entries, width)
    return put_entries(data, *_used(index, sizes, width, other, other_width), entries)


def filled_with(
    filler: Any,
    entries: Tensor,  # (S, M, *D)
    width: int,
) -> Tensor:  # (S, W, *D)
    """Data like the entries, one number everywhere in memory too."""
    filler = torch.full((), filler, dtype=entries.dtype, device=entries.device)
    return filler.expand(entries.shape[0], width, *entries.shape[2:])


def _spread_fake(
    entries: Tensor, index: Tensor, sizes: Tensor, other: Tensor | None, other_width: int, width: int, filler: Any
) -> Tensor:
    return entries.new_empty((entries.shape[0], width, *entries.shape[2:]))


class _SpreadGradient(Gradient):
    @staticmethod
    def save(ctx: Any, args: tuple[Any, ...], result: Tensor) -> None:
        _, index, sizes, other, other_width, _, _ = args
        ctx.save_for_backward(index, sizes, other)
        ctx.other_width = other_width

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return take(grad_output, *ctx.saved_tensors, ctx.other_width), *[None] * 6


def _mark(index: Tensor, sizes: Tensor, width: int) -> Tensor:
    if served_by_triton(index) and index.shape[0] and width:
        kernels = _kernels()
        if kernels.puts_fast(index, width):
            return kernels.mark(index, sizes, width)
    used, index = _used(index, sizes, width, None, 0)
    count = index.shape[0] * width
    marks = torch.zeros(count + 1, dtype=torch.bool, device=index.device)
    return marks.scatter(0, place_of(used, index, width).flatten(), True)[:count].view(index.shape[0], width)


def _mark_fake(index: Tensor, sizes: Tensor, width: int) -> Tensor:
    return index.new_empty((index.shape[0], width), dtype=torch.bool)


def _pad(values: Tensor, begins: Tensor, sizes: Tensor, slots: int) -> Tensor:
    if served_by_triton(values) and sizes.numel() and slots and values.numel():
        return _kernels().pad(values, begins, sizes, slots)
    filled, rows = _rows_of(begins, sizes, slots, values.shape[0])
    entries = gather_entries(values[None], rows.where(filled, 0).view(1, -1)).view(*rows.shape, *values.shape[1:])
    return fill(entries, ~beside_entries(filled, 1, entries.dim()), 0).contiguous()


def _rows_of(begins: Tensor, sizes: Tensor, slots: int, length: int) -> tuple[Tensor, Tensor]:
    """(S, N) which slots are filled, and from which rows."""
    slot = torch.arange(slots, device=sizes.device)
    rows = begins[:, None] + slot
    return (slot < sizes[:, None]) & (rows >= 0) & (rows < length), rows


def _pad_fake(values: Tensor, begins: Tensor, sizes: Tensor, slots: int) -> Tensor:
    return values.new_empty((sizes.shape[0], slots, *values.shape[1:]))


class _PadGradient(Gradient):
    @staticmethod
    def save(ctx: Any, args: tuple[Any, ...], result: Tensor) -> None:
        values, begins, sizes, _ = args
        ctx.save_for_backward(begins, sizes)
        ctx.length = values.shape[0]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        begins, sizes = ctx.saved_tensors
        filled, rows = _rows_of(begins, sizes, grad_output.shape[1], ctx.length)
        summed = sum_of_entries(grad_output.flatten(0, 1)[None], filled.view(1, -1), rows.view(1, -1), ctx.length)
        return summed[0], None, None, None


_WITH_GRADIENTS: list[tuple[str, Callable[..., Tensor], Callable[..., Tensor], type[Gradient]]] = [
    ("ragged_gather(Tensor data, Tensor index, Tensor sizes, Scalar filler)", _gather, _gather_fake, _GatherGradient),
    ("ragged_sum(Tensor entries, Tensor index, Tensor sizes, int width)", _add_up, _add_up_fake, _AddUpGradient),
    (
        "ragged_put(Tensor data, Tensor entries, Tensor index, Tensor sizes, Tensor? other, int other_width)",
        _put,
        _put_fake,
        _PutGradient,
    ),
    (
        "ragged_transfer(Tensor data, Tensor source, Tensor index, Tensor sizes, Tensor source_index)",
        _transfer,
        _transfer_fake,
        _TransferGradient,
    ),
    (
        "ragged_take(Tensor data, Tensor index, Tensor sizes, Tensor? other, int other_width)",
        _take,
        _take_fake,
        _TakeGradient,
    ),
    (
        "ragged_spread(Tensor entries, Tensor index, Tensor sizes, Tensor? other, int other_width, int width, "
        "Scalar filler)",
        _spread,
        _spread_fake,
        _SpreadGradient,
    ),
    ("ragged_pad(Tensor values, Tensor begins, Tensor sizes, int slots)", _pad, _pad_fake, _PadGradient),
]
for _schema, _implementation, _fake, _gradient in _WITH_GRADIENTS:
    register_autograd(register(f"{_schema} -> Tensor", _implementation, _fake), _gradient)
register("ragged_mark(Tensor index, Tensor sizes, int width) -> Tensor", _mark, _mark_fake)

gather = DirectCall("ragged_gather", _prepare_gather)
"""Entries (S, M, *D) of (S, W, *D) data by (S, M) indices, with a number in slots without one."""
add_up = DirectCall("ragged_sum", _prepare_add_up)
"""The gradient of ``gather``: for each of the W entries the sum of all (S, M, *D) with its index."""
put = DirectCall("ragged_put")
"""A copy of (S, W, *D) data with (S, M, *D) entries at their indices, where a second index is in range, too."""
transfer = DirectCall("ragged_transfer")
"""``put`` of the entries of (S, V, *D) data that a second index points to."""
take = DirectCall("ragged_take")
"""The gradient of ``put``: for each of the M slots what lies at its index, 0 for what another slot overwrote."""
spread = DirectCall("ragged_spread")
"""``put`` into data that are one number everywhere; with 0, the gradient of ``take``."""
mark = DirectCall("ragged_mark")
"""(S, W) bool, true where an index points to."""
pad = DirectCall("ragged_pad")
"""(S, N, *D) samples of the (T, *D) values, each from where it begins on, padded with 0."""
