"""Ragged batches from and to values with offsets, and nested tensors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saccade.ragged import RaggedBatch, combine_data, from_nested, from_values, to_nested, to_values


def example(device="cpu") -> RaggedBatch:
    return RaggedBatch(
        torch.tensor([[5, 6, 77], [7, 8, 9]], device=device), sample_sizes=torch.tensor([2, 3], device=device)
    )


def test_values_and_offsets(device):
    values, offsets = to_values(example(device))
    assert values.tolist() == [5, 6, 7, 8, 9]
    assert (offsets.tolist(), offsets.dtype) == ([0, 2, 5], torch.int64)
    for batch in from_values(values, offsets=offsets), from_values(values, lengths=offsets.diff().int()):
        assert batch.tensor.tolist() == [[5, 6, 0], [7, 8, 9]]
        assert batch.sample_sizes.tolist() == [2, 3]
        assert batch.mask.tolist() == [[True, True, False], [True] * 3]
        assert batch.device.type == device


def test_offsets_with_lengths():
    values = torch.arange(6)
    for offsets in [0, 3], [0, 3, 6]:
        batch = from_values(values, offsets=torch.tensor(offsets), lengths=torch.tensor([1, 2]))
        assert [part.tolist() for part in batch.split()] == [[0], [3, 4]]


def test_another_width():
    values, lengths = torch.arange(5), torch.tensor([1, 4])
    assert from_values(values, lengths=lengths, max_sample_size=5).tensor.tolist() == [[0] * 5, [1, 2, 3, 4, 0]]
    batch = from_values(values, lengths=lengths, max_sample_size=2)
    assert (batch.tensor.tolist(), batch.sample_sizes.tolist()) == ([[0, 0], [1, 2]], [1, 2])


@given(
    batch_shape=st.lists(st.integers(0, 3), min_size=1, max_size=2),
    width=st.integers(0, 4),
    data_dims=st.lists(st.integers(1, 2), max_size=2),
    place=st.integers(0, 2),
    dtype=st.sampled_from([torch.float32, torch.int64, torch.bool, torch.uint16, torch.complex64]),
    seed=st.integers(0, 1000),
)
def test_there_and_back(batch_shape, width, data_dims, place, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    dim = len(batch_shape) + min(place, len(data_dims))
    tensor = torch.randint(0, 100, (*batch_shape, width, *data_dims), generator=generator).to(dtype)
    sizes = torch.randint(0, width + 1, tuple(batch_shape), generator=generator)
    batch = RaggedBatch(tensor.transpose(len(batch_shape), dim), sample_sizes=sizes, non_uniform_dim=dim)
    values, offsets = to_values(batch)
    flat = batch.get_non_uniform_dimension_transposed_to(len(batch_shape)).flatten_batch_dims()
    parts = flat.split()
    assert torch.equal(values, torch.cat([tensor.new_zeros(0, *data_dims), *parts]))
    assert offsets.tolist() == [sum(len(part) for part in parts[:n]) for n in range(len(parts) + 1)]
    again = from_values(values, lengths=sizes, max_sample_size=width)
    expected = batch.get_non_uniform_dimension_transposed_to(len(batch_shape))
    assert torch.equal(again.tensor, expected.with_padded_set_to(0).tensor)
    assert torch.equal(again.sample_sizes, sizes)
    if len(batch_shape) == 1 and len(parts):
        nested = to_nested(batch)
        assert all(torch.equal(*pair) for pair in zip(nested.unbind(), batch.split(), strict=True))
        again = from_nested(nested)
        assert again.non_uniform_dim == dim
        assert all(torch.equal(*pair) for pair in zip(again.split(), batch.split(), strict=True))


def test_nested_tensors_with_holes():
    values, begins, lengths = torch.arange(6), torch.tensor([0, 3, 6]), torch.tensor([1, 2])
    nested = torch.nested.nested_tensor_from_jagged(values, begins, lengths)
    assert [part.tolist() for part in from_nested(nested).split()] == [[0], [3, 4]]


def test_lists():
    parts = [torch.rand(3, 2), torch.rand(0, 2), torch.rand(1, 2)]
    batch = combine_data(parts)
    assert torch.equal(batch.tensor, torch.nn.utils.rnn.pad_sequence(parts, batch_first=True))
    assert all(torch.equal(*pair) for pair in zip(batch.split(), parts, strict=True))


def test_gradients():
    tensor = torch.rand(2, 3, 2, dtype=torch.float64, requires_grad=True)
    values = torch.rand(4, 2, dtype=torch.float64, requires_grad=True)
    sizes = torch.tensor([1, 3])
    assert torch.autograd.gradcheck(lambda t: to_values(RaggedBatch(t, sample_sizes=sizes))[0], tensor)
    assert torch.autograd.gradcheck(lambda v: from_values(v, lengths=sizes).tensor, values)
    there_and_back = from_nested(to_nested(RaggedBatch(tensor, sample_sizes=sizes)))
    (gradient,) = torch.autograd.grad(there_and_back.tensor.sum(), tensor)
    assert gradient[..., 0].tolist() == [[1, 0, 0], [1, 1, 1]]


def test_errors():
    values = torch.zeros(3)
    for arguments, message in (
        ({}, "offsets: expected offsets or lengths, got neither"),
        ({"lengths": torch.tensor(3)}, "lengths: expected at least one dimension, got none"),
        ({"offsets": torch.tensor([[0, 3]])}, r"offsets: expected 1 dimension, got shape \(1, 2\)"),
        ({"offsets": torch.tensor([]).long()}, "offsets: expected one more than there are samples, got none"),
        (
            {"offsets": torch.tensor([0, 3]), "lengths": torch.tensor([1, 1, 1])},
            "lengths: expected one for each sample",
        ),
        ({"lengths": torch.tensor([1, 3])}, "lie within the 3 entries, got 3 from 1 on as sample 1"),
        ({"lengths": torch.tensor([4, -1])}, "got 4 from 0 on as sample 0"),
        ({"offsets": torch.tensor([2, 1])}, "got -1 from 2 on as sample 0"),
    ):
        for error in (AssertionError, ValueError):
            with pytest.raises(error, match=message):
                from_values(values, **arguments)
    with pytest.raises(ValueError, match="values: expected at least 1 dimension, got none"):
        from_values(torch.tensor(1), lengths=torch.tensor([1]))
    for arguments in ([[1]],), (torch.zeros(1, 2),):
        with pytest.raises(TypeError, match="expected a RaggedBatch, got"):
            to_values(*arguments)  # pyright: ignore[reportArgumentType]
        with pytest.raises(TypeError, match="expected a RaggedBatch, got"):
            to_nested(*arguments)  # pyright: ignore[reportArgumentType]
    with pytest.raises(
        TypeError, match=r"nested: expected a nested tensor of layout torch.jagged, got one of torch.str"
    ):
        from_nested(values)
    with pytest.raises(ValueError, match=r"batch: expected one batch dimension, got shape \(1, 2\)"):
        to_nested(RaggedBatch(torch.zeros(1, 2, 3), sample_sizes=torch.ones(1, 2)))
