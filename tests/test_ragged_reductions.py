"""Sums, means and the small functions: worked values, a plain Python model, gradients, errors."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saccade.ragged import (
    RaggedBatch,
    apply_mask_to_tensor,
    average_over_targets,
    squeeze_except_batch_and_sample,
    sum_over_targets,
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.uint8, torch.bool]
DTYPES += [torch.complex64, torch.uint16]


def ragged(values, sizes, device="cpu", **kwargs) -> RaggedBatch:
    return RaggedBatch(torch.tensor(values, device=device, **kwargs), sample_sizes=torch.tensor(sizes, device=device))


def test_average(device):
    data = [[2.0, 4, 99], [1, 2, 6]]
    assert average_over_targets(ragged(data, [2, 3], device)).tolist() == [3, 3]
    assert average_over_targets(ragged(data, [0, 3], device)).tolist() == [0, 3]
    first, second = average_over_targets(ragged(data, [0, 3], device), False).tolist()
    assert math.isnan(first)
    assert second == 3
    assert average_over_targets(ragged(data, [-1, 7], device)).tolist() == [0, 3]


def test_sum(device):
    data = [[2, 4, 99], [1, 2, 6]]
    result = sum_over_targets(ragged(data, [2, 0], device, dtype=torch.int32))
    assert (result.tolist(), result.dtype) == ([6, 0], torch.int32)
    assert sum_over_targets(ragged([[False, True], [True, True]], [1, 2], device)).tolist() == [False, True]
    assert sum_over_targets(ragged([[200, 100]], [2], dtype=torch.uint8)).tolist() == [44]


def test_nan_in_padding_counts_for_nothing(device):
    data = ragged([[1.0, math.nan, math.inf], [math.nan, 1, 2]], [1, 0], device)
    assert sum_over_targets(data).tolist() == [1, 0]
    assert average_over_targets(data).tolist() == [1, 0]


def test_averages_that_are_not_finite(device):
    data = ragged([[1.0, math.inf], [math.nan, 1], [2, 4]], [2, 2, 2], device)
    assert average_over_targets(data).tolist() == [0, 0, 3]
    infinite, nan, three = average_over_targets(data, nans_to_zero=False).tolist()
    assert (infinite, three) == (math.inf, 3)
    assert math.isnan(nan)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(device, dtype):
    """40000 * 4 overflows float16; and 4096 ones after 1 would be lost one by one in bfloat16."""
    data = ragged([[40000.0] * 4], [4], device, dtype=dtype)
    assert average_over_targets(data).item() == torch.tensor(40000.0).to(dtype).item()
    ones = RaggedBatch(
        torch.ones(1, 4096, device=device, dtype=dtype), sample_sizes=torch.tensor([4096], device=device)
    )
    assert sum_over_targets(ones).item() == 4096


@given(
    batch_shape=st.lists(st.integers(0, 3), min_size=1, max_size=2),
    width=st.integers(0, 4),
    data_dims=st.lists(st.integers(0, 3), max_size=3),
    place=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_sums_and_averages_are_those_of_the_model(batch_shape, width, data_dims, place, dtype, seed):
    dim = len(batch_shape) + min(place, len(data_dims))
    generator = torch.Generator().manual_seed(seed)
    shape = [*batch_shape, *data_dims]
    shape.insert(dim, width)
    values = torch.randint(0, 100, shape, generator=generator).to(dtype)
    sizes = torch.randint(0, width + 1, tuple(batch_shape), generator=generator)
    data = RaggedBatch(values, sample_sizes=sizes, non_uniform_dim=dim)
    exact = torch.complex128 if dtype.is_complex else torch.float64
    total = torch.zeros(*batch_shape, *data_dims, dtype=exact).flatten(0, len(batch_shape) - 1)
    for sample, size in enumerate(sizes.flatten().tolist()):
        for entry in values.to(exact).flatten(0, len(batch_shape) - 1)[sample].unbind(dim - len(batch_shape))[:size]:
            total[sample] += entry
    total = total.view(*batch_shape, *data_dims)
    result = sum_over_targets(data)
    assert result.dtype == dtype
    assert torch.equal(result.to(exact), total.to(dtype).to(exact))  # of whole numbers, which are rounded once
    average = average_over_targets(data)
    is_float = dtype.is_floating_point or dtype.is_complex
    assert average.dtype == (dtype if is_float else torch.float32)
    mean = torch.where(sizes.view(*batch_shape, *[1] * len(data_dims)) > 0, total, 0)
    mean = mean / sizes.clamp(min=1).view(*batch_shape, *[1] * len(data_dims))
    # Two roundings of a mean below 100.
    tolerance = {torch.float16: 0.07, torch.bfloat16: 0.6, torch.float64: 1e-13}.get(dtype, 2e-5)
    assert torch.allclose(average.to(exact), mean, rtol=0, atol=tolerance)


def test_gradients(device):
    tensor = torch.tensor([[1.0, 2, math.nan], [math.nan] * 3], device=device, requires_grad=True)
    data = RaggedBatch(tensor, sample_sizes=torch.tensor([2, 0], device=device))
    incoming = torch.tensor([4.0, 8.0], device=device)
    for result, expected in (
        (sum_over_targets(data), [4, 4, 0]),
        (average_over_targets(data), [2, 2, 0]),
        (average_over_targets(data, nans_to_zero=False), [2, 2, 0]),
    ):
        assert torch.autograd.grad(result, tensor, incoming)[0].tolist() == [expected, [0, 0, 0]]


def test_gradcheck():
    tensor = torch.randn(2, 3, 4, 2, dtype=torch.float64, requires_grad=True)
    sizes = torch.tensor([3, 1])
    mask = torch.tensor([True, False])
    for function in (
        lambda t: sum_over_targets(RaggedBatch(t, sample_sizes=sizes, non_uniform_dim=3)),
        lambda t: average_over_targets(RaggedBatch(t, sample_sizes=sizes, non_uniform_dim=2)),
        lambda t: apply_mask_to_tensor(t, mask, 3),
    ):
        assert torch.autograd.gradcheck(function, (tensor,))
        assert torch.autograd.gradgradcheck(function, (tensor,))


def test_apply_mask(device):
    data = torch.tensor([[0.0, math.nan, 2], [3, math.nan, 5]], device=device, requires_grad=True)
    mask = torch.tensor([True, False], device=device)
    for value in mask, mask.int() * 2, mask.float():
        result = apply_mask_to_tensor(data, value, -1.5)
        assert result.nan_to_num(9).tolist() == [[0, 9, 2], [-1.5] * 3]
    assert torch.autograd.grad(result.sum(), data)[0].tolist() == [[1] * 3, [0] * 3]
    assert apply_mask_to_tensor(torch.tensor([[0, 1], [2, 3]]), torch.tensor([[True, False]])).tolist() == [
        [0, 0],
        [2, 0],
    ]
    assert apply_mask_to_tensor(torch.tensor([7, 8]), torch.tensor([False, True]), 2.9).tolist() == [2, 8]
    assert apply_mask_to_tensor(data, torch.tensor(False, device=device)).tolist() == [[0] * 3] * 2


def test_apply_an_empty_mask():
    data = torch.ones(2, 3)
    result = apply_mask_to_tensor(data, torch.ones(0))
    assert torch.equal(result, data)
    assert result.data_ptr() != data.data_ptr()


def test_masks_that_do_not_fit():
    for shape in (3,), (2, 3, 1), (1, 2):
        with pytest.raises(
            RuntimeError, match=r"mask: expected the leading dimensions of data, of shape \(2, 3\), got"
        ):
            apply_mask_to_tensor(torch.zeros(2, 3), torch.ones(shape))
    with pytest.raises(TypeError, match=r"mask: expected a torch.Tensor, got list"):
        apply_mask_to_tensor(torch.zeros(2, 3), [True])  # pyright: ignore[reportArgumentType]


def test_squeeze():
    for shape, expected in (
        ((1, 1, 1, 3, 1), (1, 1, 3)),
        ((4, 2, 3), (4, 2, 3)),
        ((1, 1), (1, 1)),
        ((1,), (1,)),
        ((), ()),
    ):
        tensor = torch.zeros(shape)
        squeezed = squeeze_except_batch_and_sample(tensor)
        assert squeezed.shape == expected
        assert squeezed[...].data_ptr() == tensor.data_ptr()
    batch = RaggedBatch(torch.zeros(4, 1, 1, 3, 1, 2), sample_sizes=torch.ones(4, 1), non_uniform_dim=3)
    squeezed = squeeze_except_batch_and_sample(batch)
    assert isinstance(squeezed, RaggedBatch)
    assert (squeezed.shape, squeezed.non_uniform_dim) == ((4, 1, 3, 2), 2)
    assert squeezed.sample_sizes is batch.sample_sizes
    assert squeezed.mask is batch.mask
    assert squeezed.tensor.data_ptr() == batch.tensor.data_ptr()
    batch = RaggedBatch(torch.zeros(1, 1, 1, 5, 1), sample_sizes=torch.ones(1, 1), non_uniform_dim=2)
    squeezed = squeeze_except_batch_and_sample(batch)
    assert isinstance(squeezed, RaggedBatch)
    assert (squeezed.shape, squeezed.non_uniform_dim) == ((1, 1, 1, 5), 2)


def test_tensors_in_the_place_of_ragged_batches():
    for function in sum_over_targets, average_over_targets:
        with pytest.raises(TypeError, match="data: expected a RaggedBatch, got Tensor"):
            function(torch.zeros(2, 3))  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"data: expected a torch.Tensor, got list"):
        squeeze_except_batch_and_sample([1])  # pyright: ignore[reportArgumentType]
