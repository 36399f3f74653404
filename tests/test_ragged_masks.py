"""Selecting entries by masks: worked values, a plain Python model, gradients, limits, errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from saccade import debug_checks
from saccade.argument_checks import InvalidArgumentError, InvalidStateError
from saccade.ragged import (
    RaggedBatch,
    batched_bool_indexing,
    batched_bool_indexing_write,
    get_indices_from_mask,
)

T, F = True, False
DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64, torch.uint16]


def example(device="cpu", **kwargs) -> tuple[RaggedBatch, Tensor]:
    data = torch.tensor([[1, 2, 3], [4, 5, 6]], device=device, **kwargs)
    mask = torch.tensor([[T, F, T], [F, T, T]], device=device)
    return RaggedBatch(data, sample_sizes=torch.tensor([2, 3], device=device)), mask


def test_indexing(device):
    data, mask = example(device)
    result = batched_bool_indexing(data, mask)
    assert result.tensor.tolist() == [[1, 0], [5, 6]]
    assert (result.sample_sizes.tolist(), result.sample_sizes.dtype) == ([1, 2], torch.int64)
    assert result.mask.tolist() == [[T, F], [T, T]]
    assert result.device.type == result.mask.device.type == device


def test_what_is_padding_of_data_and_mask(device):
    data, mask = example(device)
    ragged_mask = RaggedBatch(mask, sample_sizes=torch.tensor([3, 2], device=device))
    # By a ragged mask its own padding, not that of the data, is left out; with plain tensors there is none.
    for values in data, data.tensor:
        assert batched_bool_indexing(values, ragged_mask).tensor.tolist() == [[1, 3], [5, 0]]
    assert batched_bool_indexing(data.tensor, mask).tensor.tolist() == [[1, 3], [5, 6]]


def test_write(device):
    data, mask = example(device)
    to_write = RaggedBatch(
        torch.tensor([[8, 77], [9, 10]], device=device), sample_sizes=torch.tensor([1, 2], device=device)
    )
    result = batched_bool_indexing_write(to_write, mask, data)
    assert isinstance(result, RaggedBatch)
    assert result.tensor.tolist() == [[8, 2, 3], [4, 9, 10]]
    assert data.tensor.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert result.mask is data.mask
    assert result.sample_sizes is data.sample_sizes
    result = batched_bool_indexing_write(to_write, RaggedBatch(mask, data.mask), data.tensor)
    assert isinstance(result, Tensor)
    assert result.tolist() == [[8, 2, 3], [4, 9, 10]]


def test_indices_from_mask(device):
    mask = torch.tensor([[T, F, T], [F, F, T]], device=device)
    for value in mask, mask.int(), mask.float():
        result = get_indices_from_mask(value)
        assert result.tensor.tolist() == [[0, 2], [2, 0]]
        assert result.sample_sizes.tolist() == [2, 1]
        assert (result.dtype, result.sample_sizes.dtype) == (torch.int64, torch.int64)
    ragged = RaggedBatch(mask, sample_sizes=torch.tensor([2, 3], device=device))
    assert get_indices_from_mask(ragged).tensor.tolist() == [[0], [2]]


# ---- the model


@st.composite
def problems(draw):
    """Ragged data with N anywhere, a mask of it, and a seed."""
    batch_shape = draw(st.lists(st.integers(0, 3), min_size=1, max_size=2))
    width, data_dims = draw(st.integers(0, 6)), draw(st.lists(st.integers(0, 2), max_size=2))
    dim = len(batch_shape) + draw(st.integers(0, len(data_dims)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    values = torch.randint(0, 100, (*batch_shape, width, *data_dims), generator=generator)
    values = values.to(draw(st.sampled_from(DTYPES))).transpose(len(batch_shape), dim)
    sizes = torch.randint(0, width + 1, tuple(batch_shape), generator=generator)
    mask = torch.rand(*batch_shape, width, generator=generator) < draw(st.sampled_from([0, 0.5, 1]))
    return RaggedBatch(values, sample_sizes=sizes, non_uniform_dim=dim), mask


def places(data: RaggedBatch, mask: Tensor) -> list[list[int]]:
    """For each sample where its selected entries are."""
    rows = zip(mask.flatten(0, -2).tolist(), data.sample_sizes.flatten().tolist(), strict=True)
    return [[place for place in range(size) if row[place]] for row, size in rows]


@given(problem=problems())
def test_indexing_is_that_of_the_model(problem):
    data, mask = problem
    batch_dims, dim = data.num_batch_dims, data.non_uniform_dim
    samples = data.tensor.transpose(batch_dims, dim).flatten(0, batch_dims - 1)
    selected = places(data, mask)
    width = max(map(len, selected), default=0)
    expected = torch.zeros(len(selected), width, *samples.shape[2:], dtype=data.dtype)
    for sample, row in enumerate(selected):
        for position, place in enumerate(row):
            expected[sample, position] = samples[sample, place]
    expected = expected.view(*data.batch_shape, *expected.shape[1:]).transpose(batch_dims, dim)
    result = batched_bool_indexing(data, data.create_with_sample_sizes_like_self(mask, batch_dims))
    assert torch.equal(result.tensor, expected)
    assert (result.dtype, result.non_uniform_dim, result.num_batch_dims) == (data.dtype, dim, batch_dims)
    assert result.sample_sizes.flatten().tolist() == [len(row) for row in selected]
    assert torch.equal(result.mask.sum(-1), result.sample_sizes)
    if batch_dims == 1:
        assert torch.equal(batched_bool_indexing(data, mask).tensor, expected)
        indices = get_indices_from_mask(data.create_with_sample_sizes_like_self(mask, 1))
        assert [part.tolist() for part in indices.split()] == selected
        assert not indices.tensor[~indices.mask].any()


@given(problem=problems(), surplus=st.integers(0, 2))
def test_write_is_that_of_the_model(problem, surplus):
    data, mask = problem
    batch_dims, dim = data.num_batch_dims, data.non_uniform_dim
    ragged_mask = data.create_with_sample_sizes_like_self(mask, batch_dims)
    selected = places(data, mask)
    sizes = torch.tensor([len(row) for row in selected]).long().view(data.batch_shape)
    width = max(map(len, selected), default=0) + surplus
    canonical = data.tensor.transpose(batch_dims, dim)
    entries = torch.randint(0, 100, (*data.batch_shape, width, *canonical.shape[batch_dims + 1 :])).to(data.dtype)
    expected = canonical.clone().flatten(0, batch_dims - 1)
    for sample, row in enumerate(selected):
        for position, place in enumerate(row):
            expected[sample, place] = entries.flatten(0, batch_dims - 1)[sample, position]
    expected = expected.view(canonical.shape).transpose(batch_dims, dim)
    for entries_dim in range(batch_dims, data.dim()):  # where N of to_write lies is a matter of its own
        to_write = RaggedBatch(
            entries.transpose(batch_dims, entries_dim), sample_sizes=sizes, non_uniform_dim=entries_dim
        )
        result = batched_bool_indexing_write(to_write, ragged_mask, data)
        assert isinstance(result, RaggedBatch)
        assert torch.equal(result.tensor, expected)
        assert result.non_uniform_dim == dim
        assert result.sample_sizes is data.sample_sizes


# ---- gradients


def test_gradients(device):
    data, mask = example(device, dtype=torch.float64)
    data.requires_grad = True
    incoming = torch.tensor([[10, float("nan")], [30, 40]], device=device, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(batched_bool_indexing(data, mask).tensor, data.tensor, incoming)
    assert gradient.tolist() == [[10, 0, 0], [0, 30, 40]]
    entries = torch.tensor([[8, float("nan")], [9, 10]], device=device, dtype=torch.float64, requires_grad=True)
    to_write = RaggedBatch(entries, sample_sizes=torch.tensor([1, 2], device=device))
    result = batched_bool_indexing_write(to_write, mask, data)
    incoming = torch.tensor([[1, 2, 3], [4, 5, 6]], device=device, dtype=torch.float64)
    gradients = torch.autograd.grad(result[:], (entries, data.tensor), incoming)
    assert [g.tolist() for g in gradients] == [[[1, 0], [5, 6]], [[0, 2, 3], [4, 0, 0]]]


@pytest.mark.parametrize("dim", [2, 3])
def test_gradcheck(dim):
    mask = RaggedBatch(torch.tensor([[[T, F, T], [F, F, T]]]), sample_sizes=torch.tensor([[3, 2]]))
    sizes = torch.tensor([[2, 0]])
    data, entries = (torch.randn(1, 2, n, 2, dtype=torch.float64).transpose(2, dim).requires_grad_() for n in (3, 2))

    def write(entries: Tensor, data: Tensor) -> Tensor:
        to_write = RaggedBatch(entries, sample_sizes=sizes, non_uniform_dim=dim)
        into = RaggedBatch(data, mask.mask, non_uniform_dim=dim)
        return batched_bool_indexing_write(to_write, mask, into).tensor  # pyright: ignore[reportAttributeAccessIssue]

    def access(data: Tensor) -> Tensor:
        return batched_bool_indexing(RaggedBatch(data, mask.mask, non_uniform_dim=dim), mask).tensor

    assert torch.autograd.gradcheck(access, (data,))
    assert torch.autograd.gradcheck(write, (entries, data))
    assert torch.autograd.gradgradcheck(write, (entries, data))


# ---- limits


def test_nothing_selected(device):
    data, mask = example(device)
    mask = torch.zeros_like(mask)
    result = batched_bool_indexing(data, mask)
    assert (result.shape, result.sample_sizes.tolist()) == ((2, 0), [0, 0])
    written = batched_bool_indexing_write(result, mask, data)
    assert torch.equal(written[:], data.tensor)
    assert written.tensor is not data.tensor  # pyright: ignore[reportAttributeAccessIssue]
    assert get_indices_from_mask(mask).shape == (2, 0)


def test_empty_batches(device):
    data = RaggedBatch(torch.zeros(0, 3, 2, device=device), sample_sizes=torch.zeros(0, device=device).long())
    mask = torch.zeros(0, 3, dtype=torch.bool, device=device)
    result = batched_bool_indexing(data, mask)
    assert result.shape == (0, 0, 2)
    assert batched_bool_indexing_write(result, mask, data).shape == (0, 3, 2)
    assert get_indices_from_mask(mask).shape == (0, 0)
    nested = RaggedBatch.Empty(4, 2, device, batch_shape=(2, 3))
    selected = batched_bool_indexing(nested, nested.create_with_sample_sizes_like_self(nested.mask))
    assert selected.shape == (2, 3, 0, 0)


def test_sizes_beyond_the_width_count_as_all_and_negative_ones_as_none(device):
    data = torch.tensor([[1, 2, 3], [4, 5, 6]], device=device)
    mask = torch.tensor([[T, F, T], [F, F, F]], device=device)
    to_write = RaggedBatch(data[:, :2] * 10, sample_sizes=torch.tensor([9, -1], device=device))
    assert batched_bool_indexing_write(to_write, mask, data)[:].tolist() == [[10, 2, 20], [4, 5, 6]]


# ---- errors


def test_shapes_that_disagree():
    data, mask = example()
    nested = RaggedBatch(torch.zeros(2, 3, 4), sample_sizes=torch.zeros(2, 3).long())
    for values, wrong, message in (
        (data, mask[:, :2], r"input_mask: expected shape \(2, 3\) on cpu, .* got \(2, 2\) on cpu"),
        (data, mask[:1], r"input_mask: expected shape \(2, 3\)"),
        (data.tensor, mask[..., None], r"got \(2, 3, 1\)"),
        (data.tensor, mask.to("meta"), "got .* on meta"),
        (data, RaggedBatch(mask[..., None], sample_sizes=torch.tensor([1, 1])), r"got \(2, 3, 1\)"),
        (nested, torch.ones(2, 3, 4).bool(), "expected a RaggedBatch with data of 2 batch dimensions, got a tensor"),
        (nested, RaggedBatch(torch.ones(2, 3, 4).bool(), sample_sizes=torch.ones(2)), "expected 2 batch dimensions"),
        (torch.zeros(3), mask, r"input_data: expected at least 2 dimensions, got shape \(3,\)"),
    ):
        for error in (AssertionError, ValueError):
            with pytest.raises(error, match=message):
                batched_bool_indexing(values, wrong)
    for wrong in torch.ones(3).bool(), torch.ones(2, 3, 1).bool(), nested:
        with pytest.raises(AssertionError, match="mask: expected 2 dimensions, got shape"):
            get_indices_from_mask(wrong)
    for call in (
        lambda: batched_bool_indexing([1], mask),  # pyright: ignore[reportArgumentType]
        lambda: batched_bool_indexing(data, [1]),  # pyright: ignore[reportArgumentType]
        lambda: get_indices_from_mask([1]),  # pyright: ignore[reportArgumentType]
    ):
        with pytest.raises(TypeError, match=r"expected a torch.Tensor, got list"):
            call()


def test_what_cannot_be_written():
    data, mask = example()
    sizes = torch.tensor([1, 2])
    fine = torch.zeros(2, 2).long()
    for to_write, error, message in (
        (fine, InvalidArgumentError, "to_write: expected a RaggedBatch, got Tensor"),
        (RaggedBatch(fine[..., None], sample_sizes=sizes), InvalidArgumentError, "as many dimensions as to_write_into"),
        (RaggedBatch(fine.int(), sample_sizes=sizes), InvalidStateError, r"expected torch.int64, .* got torch.int32"),
        (RaggedBatch(fine[:1], sample_sizes=sizes[:1]), InvalidStateError, r"dimensions \(2,\) on cpu.* got \(1,\)"),
    ):
        with pytest.raises(error, match=message):
            batched_bool_indexing_write(to_write, mask, data)
    boxes, wrong_boxes = torch.zeros(2, 3, 4), RaggedBatch(torch.zeros(2, 2, 1), sample_sizes=sizes)
    with pytest.raises(InvalidStateError, match=r"the data dimensions of to_write_into, \(4,\), got \(1,\)"):
        batched_bool_indexing_write(wrong_boxes, mask, boxes)


@pytest.mark.parametrize("sizes", [[2, 1], [1, 1], [0, 2], [2, 2]])
def test_other_numbers_of_entries_than_are_selected(device, sizes):
    """Also if the totals agree: nothing crosses from one sample to another."""
    data, mask = example(device)
    entries = torch.tensor([[7, 8], [9, 10]], device=device)
    to_write = RaggedBatch(entries, sample_sizes=torch.tensor(sizes, device=device))
    with (
        debug_checks(device == "cuda"),
        pytest.raises(RuntimeError, match=r"to_write: expected \d entries in sample \d"),
    ):
        batched_bool_indexing_write(to_write, mask, data)
    if device == "cuda":
        expected = [[7 if sizes[0] else 1, 2, 3], [4, 9, 10 if sizes[1] == 2 else 6]]
        assert batched_bool_indexing_write(to_write, mask, data)[:].tolist() == expected
