"""The index operators on ragged batches: worked values, a plain Python model of them, gradients, errors."""

import itertools
import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from saccade import debug_checks
from saccade.argument_checks import InvalidArgumentError, InvalidStateError
from saccade.ragged import (
    RaggedBatch,
    batched_index_mapping,
    batched_indexing_access,
    batched_indexing_write,
    batched_inverse_indexing_access,
    get_mask_from_indices,
)

NAMES = ["bool", "float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2"]
NAMES += [sign + f"int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
NAMES += [f"complex{bits}" for bits in (32, 64, 128)]
DTYPES = [getattr(torch, name) for name in NAMES]


def indices(values, sizes, device="cpu", dtype=torch.int64) -> RaggedBatch:
    return RaggedBatch(
        torch.tensor(values, dtype=dtype, device=device), sample_sizes=torch.tensor(sizes, device=device)
    )


def source_and_target(device="cpu", dtype=torch.int64) -> tuple[RaggedBatch, RaggedBatch]:
    source = indices([[0, 0], [2, 7]], [2, 1], device, dtype)
    return source, indices([[3, -3], [0, 7]], [2, 1], device, dtype)


def same(first: Tensor, second: Tensor) -> bool:
    """Equal in shape, dtype and every bit, also where PyTorch cannot compare a dtype."""

    def as_bytes(tensor: Tensor) -> Tensor:
        return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).contiguous().view(torch.uint8)

    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return first.numel() == 0 or torch.equal(as_bytes(first), as_bytes(second))


def gradients_for(result: Tensor, incoming: list, *inputs: Tensor) -> list[list]:
    return [
        g.tolist() for g in torch.autograd.grad(result, inputs, torch.tensor(incoming, device=result.device).float())
    ]


# ---- worked values


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_access(device, dtype):
    data = torch.tensor([[10.0, 11, 12], [20, 21, 22]], device=device, requires_grad=True)
    index = indices([[2, -1, 2], [0, 9, 9]], [3, 1], device, dtype)
    result = batched_indexing_access(data, index, -5.5)
    assert result.tensor.tolist() == [[12, 12, 12], [20, -5.5, -5.5]]
    assert result.mask is index.mask
    assert result.sample_sizes is index.sample_sizes
    assert gradients_for(result.tensor, [[1] * 3] * 2, data) == [[[0, 0, 3], [1, 0, 0]]]
    assert batched_indexing_access(data.detach().int(), index, -5.5).tensor.tolist() == [[12] * 3, [20, -5, -5]]
    assert batched_indexing_access(data.detach().bool(), index, 0.5).tensor.all()


def test_inverse_access(device):
    data = torch.tensor([[1.0, 2], [3, 4]], device=device, requires_grad=True)
    result = batched_inverse_indexing_access(data, indices([[2, -4], [0, 9]], [2, 1], device), 4, 9)
    assert result.tolist() == [[2, 9, 1, 9], [3, 9, 9, 9]]
    assert result.is_contiguous()
    assert gradients_for(result, [[0, 1, 2, 3], [4, 5, 6, 7]], data) == [[[2, 0], [4, 0]]]


def test_write(device):
    data = torch.tensor([[1.0, 2], [3, 4]], device=device, requires_grad=True)
    nines = torch.full((2, 4), 9.0, device=device, requires_grad=True)
    result = batched_indexing_write(data, indices([[2, -4], [0, 9]], [2, 1], device), nines)
    assert isinstance(result, Tensor)
    assert result.tolist() == [[2, 9, 1, 9], [3, 9, 9, 9]]
    assert nines.tolist() == [[9] * 4] * 2
    expected = [[[2, 0], [4, 0]], [[0, 1, 0, 3], [0, 5, 6, 7]]]
    assert gradients_for(result, [[0, 1, 2, 3], [4, 5, 6, 7]], data, nines) == expected


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_mapping(device, dtype):
    source = torch.tensor([[1.0, 2, 3], [4, 5, 6]], device=device, requires_grad=True)
    target = torch.zeros(2, 4, device=device, requires_grad=True)
    result = batched_index_mapping(source, *source_and_target(device, dtype), target)
    assert isinstance(result, Tensor)
    assert result.tolist() == [[0, 1, 0, 1], [6, 0, 0, 0]]
    expected = [[[6, 0, 0], [0, 0, 5]], [[1, 0, 3, 0], [0, 6, 7, 8]]]
    assert gradients_for(result, [[1, 2, 3, 4], [5, 6, 7, 8]], source, target) == expected


def test_the_sizes_of_the_source_decide():
    source, target = source_and_target()
    target = RaggedBatch(target.tensor, sample_sizes=torch.tensor([0, 2]))
    data = torch.tensor([[1, 2, 3], [4, 5, 6]])
    zeros = torch.zeros(2, 4, dtype=torch.int64)
    result = batched_index_mapping(data, source, target, zeros)
    assert result[:].tolist() == [[0, 1, 0, 1], [6, 0, 0, 0]]


def test_mask_from_indices(device):
    mask = get_mask_from_indices(4, source_and_target(device)[1])
    assert mask.tolist() == [[False, True, False, True], [True, False, False, False]]
    assert (mask.dtype, mask.device.type) == (torch.bool, device)
    assert get_mask_from_indices(2, indices([[1, -1], [5, 5]], [2, 0], device)).tolist() == [[False, True], [False] * 2]
    assert get_mask_from_indices(3, RaggedBatch.Empty(2, 1, device, batch_shape=2).long()).tolist() == [[False] * 3] * 2


# ---- the model


def used(index: RaggedBatch):
    """(sample, slot, index) of every used slot."""
    flat = index.tensor.flatten(0, -2).tolist()
    for sample, size in enumerate(index.sample_sizes.flatten().tolist()):
        for slot in range(min(size, index.max_sample_size)):
            yield sample, slot, flat[sample][slot]


def model_access(data: Tensor, index: RaggedBatch, filler: float) -> Tensor:
    samples = math.prod(index.batch_shape)
    shape = (samples, index.max_sample_size, *data.shape[index.num_batch_dims + 1 :])
    result = torch.full(shape, filler).to(data.dtype)
    data = data.reshape(samples, *data.shape[index.num_batch_dims :])
    for sample, slot, place in used(index):
        result[sample, slot] = data[sample, place]
    return result.view(*index.batch_shape, *result.shape[1:])


def model_write(entries: Tensor, index: RaggedBatch, data: Tensor) -> Tensor:
    samples = math.prod(index.batch_shape)
    result = data.clone().reshape(samples, *data.shape[index.num_batch_dims :])
    entries = entries.reshape(samples, *entries.shape[index.num_batch_dims :])
    for sample, slot, place in used(index):  # the last one to a place stays
        result[sample, place] = entries[sample, slot]
    return result.view(data.shape)


@st.composite
def problems(draw):
    """Batch shape, indices of ``slots`` slots into ``width`` entries, data dimensions, where N lies, dtype, seed."""
    batch_shape = draw(st.lists(st.integers(0, 3), min_size=1, max_size=3))
    width, slots = draw(st.integers(1, 5)), draw(st.integers(0, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    tensor = torch.randint(-width, width, (*batch_shape, slots), generator=generator)
    sizes = torch.randint(-1, slots + 2, tuple(batch_shape), generator=generator)
    index_dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    garbage = torch.iinfo(index_dtype).max - torch.randint(0, 2, tensor.shape, generator=generator)
    tensor = tensor.where(torch.arange(slots) < sizes[..., None], garbage).to(index_dtype)
    index = RaggedBatch(tensor, sample_sizes=sizes.to(draw(st.sampled_from([torch.int64, torch.int32, torch.int8]))))
    data_dims = draw(st.lists(st.integers(0, 3), max_size=2))
    dim = len(batch_shape) + draw(st.integers(0, len(data_dims)))
    return index, width, data_dims, dim, draw(st.sampled_from(DTYPES)), generator


def draw_data(index: RaggedBatch, width: int, data_dims: list[int], dtype, generator) -> Tensor:
    shape = (*index.batch_shape, width, *data_dims)
    return torch.randint(0, 100, shape, generator=generator).to(dtype)


@given(problem=problems(), filler=st.sampled_from([0, 1, 3.5, True]))
def test_access_is_that_of_the_model(problem, filler):
    index, width, data_dims, dim, dtype, generator = problem
    data, batch_dims = draw_data(index, width, data_dims, dtype, generator), index.num_batch_dims
    expected = model_access(data, index, filler)
    result = batched_indexing_access(data.transpose(batch_dims, dim), index, filler, dim)
    assert same(result.tensor, expected.transpose(batch_dims, dim))
    assert result.non_uniform_dim == dim
    ragged = RaggedBatch(data.transpose(batch_dims, dim), sample_sizes=torch.zeros(index.batch_shape).long())
    assert same(batched_indexing_access(ragged, index, filler, dim).tensor, result.tensor)


@given(problem=problems(), filler=st.sampled_from([0, 1, 3.5, True]), surplus=st.integers(0, 2))
def test_inverse_access_is_that_of_the_model(problem, filler, surplus):
    index, width, data_dims, dim, dtype, generator = problem
    entries, batch_dims = (
        draw_data(index, index.max_sample_size + surplus, data_dims, dtype, generator),
        index.num_batch_dims,
    )
    background = torch.full((*index.batch_shape, width, *data_dims), filler).to(dtype)
    result = batched_inverse_indexing_access(entries.transpose(batch_dims, dim), index, width, filler, dim)
    assert same(result, model_write(entries, index, background).transpose(batch_dims, dim))


@given(problem=problems(), surplus=st.integers(0, 2))
def test_write_is_that_of_the_model(problem, surplus):
    index, width, data_dims, dim, dtype, generator = problem
    entries, batch_dims = (
        draw_data(index, index.max_sample_size + surplus, data_dims, dtype, generator),
        index.num_batch_dims,
    )
    data = draw_data(index, width, data_dims, dtype, generator)
    expected = model_write(entries, index, data).transpose(batch_dims, dim)
    before = data.clone()
    result = batched_indexing_write(entries.transpose(batch_dims, dim), index, data.transpose(batch_dims, dim), dim)
    assert isinstance(result, Tensor)
    assert same(result, expected)
    assert same(data, before)
    sizes = torch.zeros(index.batch_shape).long()
    ragged = RaggedBatch(data.transpose(batch_dims, dim), sample_sizes=sizes, non_uniform_dim=dim)
    entries_as_batch = RaggedBatch(entries.transpose(batch_dims, dim), sample_sizes=sizes)
    result = batched_indexing_write(entries_as_batch, index, ragged, dim)
    assert isinstance(result, RaggedBatch)
    assert same(result.tensor, expected)
    assert result.sample_sizes is sizes
    assert result.mask is ragged.mask
    assert result.non_uniform_dim == dim


@given(problem=problems(), source_width=st.integers(1, 4), plain=st.booleans())
def test_mapping_is_that_of_the_model(problem, source_width, plain):
    target_index, width, data_dims, dim, dtype, generator = problem
    batch_dims = target_index.num_batch_dims
    places = torch.randint(-source_width, source_width, target_index.shape, generator=generator)
    source_index = RaggedBatch(places.to(target_index.dtype), sample_sizes=target_index.sample_sizes)
    source = draw_data(target_index, source_width, data_dims, dtype, generator)
    target = draw_data(target_index, width, data_dims, dtype, generator)
    expected = model_write(model_access(source, source_index, 0), target_index, target)
    sizes = torch.zeros(target_index.batch_shape).long()
    if plain:
        result = batched_index_mapping(source, source_index, target_index, target)
        assert isinstance(result, Tensor)
        assert same(result, expected)
        return
    ragged = RaggedBatch(target.transpose(batch_dims, dim), sample_sizes=sizes, non_uniform_dim=dim)
    for data in source, RaggedBatch(source.transpose(batch_dims, dim), sample_sizes=sizes, non_uniform_dim=dim):
        result = batched_index_mapping(data, source_index, target_index, ragged)
        assert isinstance(result, RaggedBatch)
        assert same(result.tensor, expected.transpose(batch_dims, dim))
        assert result.non_uniform_dim == dim
        assert result.mask is ragged.mask
        assert result.sample_sizes is sizes


@given(problem=problems())
def test_the_mask_is_that_of_the_model(problem):
    index, width, *_ = problem
    ones = torch.ones(index.shape, dtype=torch.bool)
    expected = model_write(ones, index, torch.zeros(*index.batch_shape, width, dtype=torch.bool))
    assert torch.equal(get_mask_from_indices(width, index), expected)


# ---- gradients


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_gradients_of_repeated_indices_are_added_as_pytorch_adds_them(device, dtype):
    """On the CPU that is in the order of the slots, every sum rounded to the dtype: in half precision it can be told.

    PyTorch's own kernels for GPUs round half precision once or after each addition, as entries are narrow or wide.
    Float32 and float64 may be added in any order.
    """
    generator = torch.Generator().manual_seed(0)
    orders_differ = False
    for _ in range(20):
        index = torch.randint(-3, 3, (2, 12), generator=generator).to(device)
        sizes = torch.randint(6, 13, (2,), generator=generator).to(device)
        incoming = torch.randn(2, 12, 4, generator=generator, dtype=torch.float64).to(device, dtype)
        data = torch.zeros(2, 3, 4, device=device, dtype=dtype, requires_grad=True)
        used_slots = torch.arange(12, device=device) < sizes[:, None]
        garbage = index.where(used_slots, 10**6)
        result = batched_indexing_access(data, RaggedBatch(garbage, sample_sizes=sizes))
        (gradient,) = torch.autograd.grad(result.tensor, data, incoming)
        sample = torch.arange(2, device=device)[:, None].expand_as(index)
        (expected,) = torch.autograd.grad(data[sample[used_slots], index[used_slots]], data, incoming[used_slots])
        tolerance = 0 if dtype.itemsize == 2 or device == "cpu" else 1e-6
        assert torch.allclose(gradient, expected, rtol=0, atol=tolerance)
        mapped = batched_index_mapping(
            data,
            RaggedBatch(garbage, sample_sizes=sizes),
            RaggedBatch(torch.arange(12, device=device).expand(2, 12), sample_sizes=sizes),
            torch.zeros(2, 12, 4, device=device, dtype=dtype),
        )
        (gradient,) = torch.autograd.grad(mapped, data, incoming)
        assert torch.allclose(gradient, expected, rtol=0, atol=tolerance)
        if device != "cpu":
            continue
        in_order, reverse = torch.zeros_like(data), torch.zeros_like(data)
        for b, j in itertools.product(range(2), range(12)):
            for sums, slot in (in_order, j), (reverse, 11 - j):
                if used_slots[b, slot]:
                    sums.data[b, index[b, slot]] += incoming[b, slot]
        assert torch.equal(gradient, in_order)
        orders_differ |= not torch.equal(in_order, reverse)
    assert orders_differ or device != "cpu"


def test_of_repeated_targets_the_last_is_written_and_alone_gets_a_gradient(device):
    index = indices([[1, 0, -1, 1], [0, 0, 0, 1]], [3, 2], device)  # of width 2: -1 is 1
    data = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]], device=device, requires_grad=True)
    zeros = torch.zeros(2, 2, device=device, requires_grad=True)
    expected = [[0, 10, 20, 0], [0, 30, 0, 0]]
    for result in batched_inverse_indexing_access(data, index, 2), batched_indexing_write(data, index, zeros):
        assert result[:].tolist() == [[2, 3], [6, 0]]
        assert gradients_for(result[:], [[10, 20], [30, 40]], data) == [expected]
    places = indices([[0, 1, 2, 3], [0, 1, 2, 3]], [3, 2], device)
    result = batched_index_mapping(data, places, index, zeros)
    assert result[:].tolist() == [[2, 3], [6, 0]]
    assert gradients_for(result[:], [[10, 20], [30, 40]], data, zeros) == [expected, [[0, 0], [0, 40]]]


def test_entries_beyond_the_slots_get_no_gradient(device):
    data = torch.ones(1, 3, device=device, requires_grad=True)
    index = indices([[1, 0]], [2], device)
    for result in (
        batched_inverse_indexing_access(data, index, 2),
        batched_indexing_write(data, index, torch.zeros(1, 2, device=device)),
    ):
        assert gradients_for(result[:], [[5, 7]], data) == [[[7, 5, 0]]]


def test_nan_and_infinity_in_unused_slots_reach_nothing(device):
    data = torch.ones(1, 2, device=device, requires_grad=True)
    index = indices([[1, 0]], [1], device)
    result = batched_indexing_access(data, index).tensor
    assert gradients_for(result, [[3, math.nan]], data) == [[[0, 3]]]
    entries = torch.tensor([[1, math.nan]], device=device, requires_grad=True)
    written = batched_inverse_indexing_access(entries, index, 2)
    assert written.tolist() == [[0, 1]]
    assert gradients_for(written, [[math.inf, 2]], entries) == [[[2, 0]]]


@pytest.mark.parametrize("dim", [2, 3])
def test_gradcheck(dim):
    index = RaggedBatch(torch.tensor([[[0, 2, 0], [-1, 9, 9]]]), sample_sizes=torch.tensor([[3, 1]]))
    target = RaggedBatch(torch.tensor([[[3, 0, 1], [2, 9, 9]]]), sample_sizes=torch.tensor([[3, 1]]))
    entries, source, into = (
        torch.randn(1, 2, n, 2, dtype=torch.float64).transpose(2, dim).requires_grad_() for n in (3, 3, 4)
    )

    def mapping(source: Tensor, into: Tensor) -> Tensor:
        batches = (RaggedBatch(t, sample_sizes=torch.tensor([[1, 1]]), non_uniform_dim=dim) for t in (source, into))
        result = batched_index_mapping(next(batches), index, target, next(batches))
        return result.tensor  # pyright: ignore[reportAttributeAccessIssue]

    for function, inputs in (
        (lambda data: batched_indexing_access(data, index, 0.5, dim).tensor, (source,)),
        (lambda data: batched_inverse_indexing_access(data, target, 4, 0.5, dim), (entries,)),
        (lambda data, into: batched_indexing_write(data, target, into, dim), (entries, into)),
        (mapping, (source, into)),
    ):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


# ---- limits


def test_without_entries(device):
    for batch, slots, width, inner in itertools.product((0, 2), (0, 3), (0, 4), (0, 2)):
        index = RaggedBatch(
            torch.full((batch, slots), 99, device=device), sample_sizes=torch.zeros(batch, device=device).long()
        )
        data = torch.rand(batch, width, inner, device=device, requires_grad=True)
        result = batched_indexing_access(data, index, 2).tensor
        assert result.shape == (batch, slots, inner)
        assert (result == 2).all()
        assert not torch.autograd.grad(result.sum(), data)[0].any()
        entries = torch.rand(batch, slots, inner, device=device)
        result = batched_inverse_indexing_access(entries, index, width, 2)
        assert result.shape == (batch, width, inner)
        assert (result == 2).all()
        assert torch.equal(batched_indexing_write(entries, index, data)[:], data)
        assert torch.equal(batched_index_mapping(entries, index, index, data)[:], data)
        assert not get_mask_from_indices(width, index).any()


def test_results_share_no_memory_with_the_inputs():
    index = indices([[0, 1]], [2])
    data, into = torch.ones(1, 2), torch.ones(1, 2)
    for result in (
        batched_indexing_access(data, index).tensor,
        batched_inverse_indexing_access(data, index, 2),
        batched_indexing_write(data, index, into),
        batched_index_mapping(data, index, index, into),
    ):
        result[:].zero_()
        assert data.all()
        assert into.all()


# ---- errors


def calls(index: RaggedBatch):
    """Every function with these indices into a width of 3, the argument named in its errors first."""
    data, into = torch.zeros(1, 2, device=index.device), torch.zeros(1, 3, device=index.device)
    fine = indices([[0, 1]], [2], index.device, index.dtype)
    return [
        ("input_indices", lambda: batched_indexing_access(into, index, 7).tensor),
        ("output_indices", lambda: batched_inverse_indexing_access(data + 1, index, 3, 7)),
        ("output_indices", lambda: batched_indexing_write(data + 1, index, into + 7)),
        ("source_indices", lambda: batched_index_mapping(into + 1, index, fine, into + 7)),
        ("target_indices", lambda: batched_index_mapping(data + 1, fine, index, into + 7)),
        ("indices", lambda: get_mask_from_indices(3, index)),
    ]


@pytest.mark.parametrize("wrong", [3, -4, 2**40, -(2**62)])
def test_an_index_out_of_range_on_the_cpu(wrong):
    for name, call in calls(indices([[1, wrong]], [2])):
        for error in (IndexError, ValueError):
            with pytest.raises(
                error, match=rf"{name}: expected indices in \[-3, 3\), got {wrong} in slot 1 of sample 0"
            ):
                call()
    for name, call in calls(indices([[1, wrong]], [1])):
        if name != "target_indices":  # how many of those are used, the sizes of the source say
            call()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("wrong", [3, -4, 2**40, -(2**62)])
def test_an_index_out_of_range_on_a_gpu_is_skipped(wrong):
    index = indices([[1, wrong]], [2], "cuda")
    expected = [[[0, 7]], [[7, 1, 7]], [[7, 1, 7]], [[1, 7, 7]], [[7, 1, 7]], [[False, True, False]]]
    for (_, call), values in zip(calls(index), expected, strict=True):
        assert call()[:].tolist() == values
    for name, call in calls(index):
        with debug_checks(True), pytest.raises(ValueError, match=rf"{name}: expected indices in \[-3, 3\)"):
            call()


def test_indices_that_are_none():
    wrong = [
        (torch.zeros(1, 2).long(), TypeError, "expected a RaggedBatch, got Tensor"),
        (
            RaggedBatch(torch.zeros(1, 2), sample_sizes=torch.ones(1)),
            TypeError,
            "expected int32 or int64, got torch.float32",
        ),
    ]
    for index, error, message in wrong:
        for name, call in calls(index):
            if name not in ("source_indices", "target_indices") or not isinstance(index, RaggedBatch):
                with pytest.raises(error, match=f"{name}: {message}"):
                    call()
    floats = wrong[1][0]
    with pytest.raises(TypeError, match=r"source_indices: expected int32 or int64, got torch.float32"):
        batched_index_mapping(torch.zeros(1, 2), floats, floats, torch.zeros(1, 2))
    for shape, dim in ((1, 2, 1), 1), ((1, 1, 2), 2):
        surplus = RaggedBatch(torch.zeros(shape).long(), sample_sizes=torch.ones(1), non_uniform_dim=dim)
        for name, call in calls(surplus):
            error = InvalidArgumentError if name in ("source_indices", "target_indices") else InvalidStateError
            with pytest.raises(error, match=rf"{name}: expected 2 dimensions.* got shape {re.escape(str(shape))}"):
                call()


def test_dim_to_index_in():
    index = indices([[0, 1]], [2])
    data = torch.zeros(1, 2, 2)
    for call in (
        lambda dim: batched_indexing_access(data, index, dim_to_index_in=dim),
        lambda dim: batched_inverse_indexing_access(data, index, 2, dim_to_index_in=dim),
        lambda dim: batched_indexing_write(data, index, data, dim),
    ):
        for dim in (0, -1):
            with pytest.raises(AssertionError, match=f"dim_to_index_in: expected a dimension behind .*, got {dim}"):
                call(dim)
        with pytest.raises(IndexError, match=r"dim_to_index_in: expected a dimension of .*, which has 3, got 3"):
            call(3)


@pytest.mark.parametrize("shape", [(2,), (1, 2), (3, 2), (3, 2, 2)])
def test_batch_dimensions_that_disagree(shape):
    index = indices([[0, 1], [0, 1]], [2, 2])
    fine, wrong = torch.zeros(2, 2, *shape[2:]), torch.zeros(shape)
    for name, call in (
        ("input_data", lambda: batched_indexing_access(wrong, index)),
        ("input_data", lambda: batched_inverse_indexing_access(wrong, index, 2)),
    ):
        with pytest.raises(RuntimeError, match=f"{name}: expected the batch dimensions of the indices"):
            call()
    if len(shape) > 1:
        for call in (
            lambda: batched_indexing_write(wrong, index, fine),
            lambda: batched_indexing_write(fine, index, wrong),
            lambda: batched_index_mapping(wrong, index, index, fine),
            lambda: batched_index_mapping(fine, index, index, wrong),
        ):
            with pytest.raises(RuntimeError, match=r"\w+: expected the batch dimensions of the indices, \(2,\)"):
                call()


def test_fewer_entries_than_slots():
    index = indices([[0, 1]], [1])
    for call in (
        lambda: batched_inverse_indexing_access(torch.zeros(1, 1), index, 2),
        lambda: batched_indexing_write(torch.zeros(1, 1), index, torch.zeros(1, 2)),
    ):
        with pytest.raises(
            RuntimeError, match="expected at least as many entries as there are slots for indices, 2, got 1"
        ):
            call()


def test_data_that_disagree():
    index = indices([[0, 99]], [2])  # what is wrong with the data wins over what is wrong with the indices
    data = torch.zeros(1, 2, 3)
    for wrong, message in (
        (torch.zeros(1, 2), "must have the same number of dimensions"),
        (torch.zeros(1, 2, 3, 1), "must have the same number of dimensions"),
        (torch.zeros(1, 2, 3).half(), "expected torch.float32, the dtype of .*, got torch.float16"),
        (torch.zeros(1, 2, 4), r"expected the data dimensions of .*, \(3,\), got \(4,\)"),
    ):
        with pytest.raises(RuntimeError, match=f"to_write.*{message}"):
            batched_indexing_write(wrong, index, data)
        with pytest.raises(RuntimeError, match=f"source_data.*{message}"):
            batched_index_mapping(wrong, index, index, data)
    for call in (
        lambda: batched_indexing_access([1], index),  # pyright: ignore[reportArgumentType]
        lambda: batched_indexing_write(data, index, [1]),  # pyright: ignore[reportArgumentType]
    ):
        with pytest.raises(TypeError, match=r"expected a torch.Tensor, got list"):
            call()


def test_indices_of_a_mapping_that_disagree():
    data, wrong_data = torch.zeros(1, 3), torch.zeros(2, 3).half()
    index = indices([[0, 1]], [2])
    for wrong in indices([[0, 1, 2]], [2]), indices([[0, 1], [0, 1]], [2, 2]):
        for pair in (index, wrong), (wrong, index):
            with pytest.raises(AssertionError, match="target_indices: expected shape"):
                batched_index_mapping(data, *pair, wrong_data)
    with pytest.raises(RuntimeError, match=r"target_indices: expected torch.int64, the dtype of .*, got torch.int32"):
        batched_index_mapping(data, index, index.int(), data)


def test_devices_that_disagree():
    index, data = indices([[0, 1]], [2]), torch.zeros(1, 3, device="meta")
    for call in (
        lambda: batched_indexing_access(data, index),
        lambda: batched_inverse_indexing_access(data, index, 3),
        lambda: batched_indexing_write(data, index, data),
        lambda: batched_index_mapping(data, index, index, data),
        lambda: batched_index_mapping(data, index, index.to_device("meta"), data),
    ):
        with pytest.raises(RuntimeError, match=r"expected device \w+, that of .*, got \w+"):
            call()


def test_negative_widths():
    index = indices([[0, 1]], [0])
    with pytest.raises(ValueError, match="output_num_targets: expected at least 0, got -1"):
        batched_inverse_indexing_access(torch.zeros(1, 2), index, -1)
    with pytest.raises(ValueError, match="mask_num_targets: expected at least 0, got -1"):
        get_mask_from_indices(-1, index)
