"""The operators behind index operations on ragged batches: a plain Python model of them, gradients, layouts, dtypes."""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from saccade.operator.declaration import Operator
from saccade.ragged.api import GATHER, MARK, PAD, PUT, SPREAD, SUM, TAKE, TRANSFER
from saccade.triton_dispatch import served_by_triton

# float64 for values of 8 bytes, complex128 for two words of them, bool for bytes
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool, torch.uint16, torch.int64]
DTYPES += [torch.complex32, torch.complex64, torch.complex128, torch.float8_e4m3fn]
SUMMED = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128]
S, M, W, N = 3, 5, 40, 4  # samples, slots, entries, width of padded samples

INTERPRETED = served_by_triton(torch.empty(0))


def inputs(
    device: str, dtype: torch.dtype, *data_dims: int, index_dtype: torch.dtype = torch.int64
) -> dict[str, Tensor]:
    """Of whole numbers, which every dtype holds and sums exactly; indices repeat, some out of range where unused."""
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(-W, W, (S, M), generator=generator)
    index[:, 3] = index[:, 0] % W  # negative or not, the same entry
    index[0, 4] = W  # skipped
    index[1, 1] = 2**31 - 1
    paired = torch.tensor([[0, 0, -3, 2, 1], [5, 0, 0, 0, 1], [0, -4, 2, 1, 0]])  # of width 3, two out of range
    values = {
        "data": torch.randint(0, 9, (S, W, *data_dims), generator=generator).to(dtype),
        "entries": torch.randint(0, 9, (S, M, *data_dims), generator=generator).to(dtype),
        "source": torch.randint(0, 9, (S, 3, *data_dims), generator=generator).to(dtype),
        "values": torch.randint(0, 9, (7, *data_dims), generator=generator).to(dtype),
        "index": index.to(index_dtype),
        "paired": paired.to(index_dtype),
        "sizes": torch.tensor([9, 1, 4]),
        "begins": torch.tensor([0, 6, -1]),
        "lengths": torch.tensor([3, 2, 9]),
    }
    return {name: value.to(device) for name, value in values.items()}


def used_slots(index: Tensor, sizes: Tensor, width: int, paired: Tensor | None = None, paired_width: int = 0):
    """(sample, slot, entry) of every slot that is used."""
    for s, j in itertools.product(range(index.shape[0]), range(index.shape[1])):
        place = int(index[s, j])
        in_range = -width <= place < width and (paired is None or -paired_width <= int(paired[s, j]) < paired_width)
        if j < int(sizes[s]) and in_range:
            yield s, j, place % width


def model_of_gather(data: Tensor, index: Tensor, sizes: Tensor, filler: float) -> Tensor:
    result = torch.full((*index.shape, *data.shape[2:]), filler).to(data.dtype)
    for s, j, place in used_slots(index, sizes, data.shape[1]):
        result[s, j] = data[s, place]
    return result


def model_of_sum(entries: Tensor, index: Tensor, sizes: Tensor, width: int) -> Tensor:
    result = torch.zeros(index.shape[0], width, *entries.shape[2:], dtype=entries.dtype)
    for s, j, place in used_slots(index, sizes, width):
        result[s, place] += entries[s, j]
    return result


def model_of_put(data: Tensor, entries: Tensor, index: Tensor, sizes: Tensor, *paired: Any) -> Tensor:
    result = data.clone()
    for s, j, place in used_slots(index, sizes, data.shape[1], *paired):
        result[s, place] = entries[s, j]
    return result


def model_of_take(data: Tensor, index: Tensor, sizes: Tensor, *paired: Any) -> Tensor:
    result = torch.zeros(*index.shape, *data.shape[2:]).to(data.dtype)
    last = {(s, place): j for s, j, place in used_slots(index, sizes, data.shape[1], *paired)}
    for (s, place), j in last.items():
        result[s, j] = data[s, place]
    return result


def model_of_transfer(data: Tensor, source: Tensor, index: Tensor, sizes: Tensor, source_index: Tensor) -> Tensor:
    result, width = data.clone(), source.shape[1]
    for s, j, place in used_slots(index, sizes, data.shape[1], source_index, width):
        result[s, place] = source[s, int(source_index[s, j]) % width]
    return result


def model_of_spread(
    entries: Tensor, index: Tensor, sizes: Tensor, paired: Tensor | None, paired_width: int, width: int, filler: float
) -> Tensor:
    data = torch.full((entries.shape[0], width, *entries.shape[2:]), filler).to(entries.dtype)
    return model_of_put(data, entries, index, sizes, paired, paired_width)


def model_of_mark(index: Tensor, sizes: Tensor, width: int) -> Tensor:
    result = torch.zeros(index.shape[0], width, dtype=torch.bool)
    for s, _, place in used_slots(index, sizes, width):
        result[s, place] = True
    return result


def model_of_pad(values: Tensor, begins: Tensor, sizes: Tensor, slots: int) -> Tensor:
    result = torch.zeros(sizes.shape[0], slots, *values.shape[1:]).to(values.dtype)
    for s, j in itertools.product(range(sizes.shape[0]), range(slots)):
        row = int(begins[s]) + j
        if j < int(sizes[s]) and 0 <= row < values.shape[0]:
            result[s, j] = values[row]
    return result


# Of each operator: its model, and calls of either as functions of the inputs by name.
CALLS: dict[str, tuple[Operator, Callable[..., Tensor], tuple]] = {
    "gather": (GATHER, model_of_gather, ("data", "index", "sizes", 0)),
    "gather-filler": (GATHER, model_of_gather, ("data", "index", "sizes", 1)),
    "sum": (SUM, model_of_sum, ("entries", "index", "sizes", W)),
    "put": (PUT, model_of_put, ("data", "entries", "index", "sizes", None, 0)),
    "put-pairs": (PUT, model_of_put, ("data", "entries", "index", "sizes", "paired", 3)),
    "take": (TAKE, model_of_take, ("data", "index", "sizes", None, 0)),
    "take-pairs": (TAKE, model_of_take, ("data", "index", "sizes", "paired", 3)),
    "transfer": (TRANSFER, model_of_transfer, ("data", "source", "index", "sizes", "paired")),
    "spread": (SPREAD, model_of_spread, ("entries", "index", "sizes", None, 0, W, 0)),
    "spread-filler": (SPREAD, model_of_spread, ("entries", "index", "sizes", None, 0, W, 1)),
    "spread-pairs": (SPREAD, model_of_spread, ("entries", "index", "sizes", "paired", 3, W, 1)),
    "mark": (MARK, model_of_mark, ("index", "sizes", W)),
    "pad": (PAD, model_of_pad, ("values", "begins", "lengths", N)),
}
each_call = pytest.mark.parametrize("name", CALLS)


def arguments(name: str, values: dict[str, Tensor]) -> list:
    return [values[argument] if isinstance(argument, str) else argument for argument in CALLS[name][2]]


def on_cpu(args: list) -> list:
    return [argument.cpu() if isinstance(argument, Tensor) else argument for argument in args]


def same(first: Tensor, second: Tensor) -> bool:
    """Equal in dtype, shape and every bit, of dtypes too that PyTorch does not compare."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    first, second = (torch.view_as_real(t) if t.is_complex() else t for t in (first.cpu(), second.cpu()))
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))


def assert_is_that_of_the_model(name: str, values: dict[str, Tensor]) -> None:
    operator, model, _ = CALLS[name]
    args = arguments(name, values)
    result = operator(*args)
    assert result.is_contiguous()
    assert same(result, model(*on_cpu(args)))


@pytest.mark.interpreted
@each_call
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(device: str, name: str, dtype: torch.dtype):
    if name == "sum" and dtype not in SUMMED:
        pytest.skip("has no gradients")
    assert_is_that_of_the_model(name, inputs(device, dtype, 3))


@pytest.mark.interpreted
@each_call
@pytest.mark.parametrize("data_dims", [(), (1,), (11,), (2, 3), (300,), (0,)], ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_data_dimensions(device: str, name: str, data_dims: tuple[int, ...], index_dtype: torch.dtype):
    assert_is_that_of_the_model(name, inputs(device, torch.float32, *data_dims, index_dtype=index_dtype))


@pytest.mark.interpreted
@each_call
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128], ids=str)
def test_layouts(device: str, name: str, dtype: torch.dtype):
    """Axes in memory the other way round, gaps between elements, expanded data, sizes of another dtype."""

    def spread(tensor: Tensor) -> Tensor:
        order = tuple(reversed(range(tensor.dim())))
        return torch.stack([tensor.permute(order)] * 2, -1)[..., 0].permute(order)

    values = {key: spread(value) for key, value in inputs(device, dtype, 2, 3).items()}
    assert_is_that_of_the_model(name, values)
    if name != "pad":
        values["sizes"] = values["sizes"].to(torch.uint8)
    one = torch.ones((), dtype=dtype, device=device)
    for key in "data", "entries", "values":
        values[key] = one.expand(values[key].shape)
    assert_is_that_of_the_model(name, values)


@pytest.mark.interpreted
@each_call
def test_without_samples_slots_or_entries(device: str, name: str):
    whole = inputs(device, torch.float32, 2)
    nothing = dict(whole)
    for key in "data", "entries", "source", "index", "paired", "sizes", "begins", "lengths":
        nothing[key] = whole[key][:0]
    assert_is_that_of_the_model(name, nothing)
    no_slots = dict(whole)
    for key in "entries", "index", "paired":
        no_slots[key] = whole[key][:, :0]
    assert_is_that_of_the_model(name, no_slots)
    no_source = whole | {"source": whole["source"][:, :0]}
    assert_is_that_of_the_model(name, no_source)
    no_entries = whole | {"data": whole["data"][:, :0], "values": whole["values"][:0]}
    if name != "mark" and name != "sum":
        assert_is_that_of_the_model(name, no_entries)


@pytest.mark.interpreted
@pytest.mark.parametrize("filler", [-0.0, 0.1, math.inf, math.nan, 3, True, -1], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.complex128], ids=str)
def test_fillers(device: str, filler: float, dtype: torch.dtype):
    if not dtype.is_floating_point and not dtype.is_complex and not math.isfinite(filler):
        return  # no integer
    values = inputs(device, dtype, 3)
    index, sizes = values["index"], torch.zeros_like(values["sizes"])
    assert same(GATHER(values["data"], index, sizes, filler), torch.full((S, M, 3), filler, dtype=dtype))
    spread = SPREAD(values["entries"], index, sizes, None, 0, W, filler)
    assert same(spread, torch.full((S, W, 3), filler, dtype=dtype))


@pytest.mark.interpreted
@each_call
def test_sizes_that_do_not_pay(device: str, name: str):
    """For them kernels give way to PyTorch's operators."""
    if not served_by_triton(torch.empty(0, device=device)):
        pytest.skip("nothing is served by kernels")
    from saccade.ragged import launch

    known = CALLS[name][0].known_calls
    known.forget()
    with patch.object(launch, "_MOST_COMPARISONS", -1):
        assert_is_that_of_the_model(name, inputs(device, torch.float32, 3))
    known.forget()


@pytest.mark.interpreted
def test_one_entry_may_be_pointed_to_by_all_slots(device: str):
    index = torch.full((1, 200), -1, device=device)
    entries = torch.arange(600, device=device).view(1, 200, 3).double()
    result = SUM(entries, index, torch.tensor([150], device=device), 2)
    assert result.tolist() == [[[0] * 3, entries[0, :150].sum(0).tolist()]]


# ---- gradients, tracing


def differentiable(name: str, device: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The operator as a function of what has gradients, in float64."""
    args = arguments(name, inputs(device, torch.float64, 2))
    places = [p for p, value in enumerate(args) if isinstance(value, Tensor) and value.is_floating_point()]

    def call(*leaves: Tensor) -> Tensor:
        given = list(args)
        for place, leaf in zip(places, leaves, strict=True):
            given[place] = leaf
        return CALLS[name][0](*given)

    return call, [args[place].requires_grad_() for place in places]


@pytest.mark.interpreted
@each_call
def test_gradcheck(device: str, name: str):
    call, leaves = differentiable(name, device)
    if not leaves:
        assert not call().requires_grad
        return
    # Interpreted kernels take their time: as many differences as there are elements are too many.
    fast = partial(torch.autograd.gradcheck, fast_mode=True)
    assert fast(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@each_call
def test_opcheck(device: str, name: str):
    args = arguments(name, inputs(device, torch.float32, 2))
    for value in args:
        if isinstance(value, Tensor) and value.is_floating_point():
            value.requires_grad_()
    torch.library.opcheck(CALLS[name][0].dispatched, tuple(args))


@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter is not traced")
@each_call
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(device: str, name: str, dynamic: bool):
    torch._dynamo.reset()
    call, leaves = differentiable(name, device)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    expected, result = call(*leaves), compiled(*leaves)
    assert torch.equal(result, expected)
    if leaves:
        seeds = torch.ones_like(expected)
        gradients = torch.autograd.grad(result, leaves, seeds)
        for gradient, wanted in zip(gradients, torch.autograd.grad(expected, leaves, seeds), strict=True):
            assert torch.allclose(gradient, wanted)
