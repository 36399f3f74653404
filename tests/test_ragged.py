"""``RaggedBatch``: the values of the definition, layouts, sharing, errors."""

import copy
import functools

import pytest
import torch
import torch.utils._pytree
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import saccade
from saccade.argument_checks import InvalidArgumentError
from saccade.ragged import RaggedBatch, combine_data


def example(device="cpu") -> RaggedBatch:
    return RaggedBatch(
        torch.tensor([[5, 6, 0], [7, 8, 9]], device=device), sample_sizes=torch.tensor([2, 3], device=device)
    )


# ---- RaggedBatch


def test_it_is_public():
    assert saccade.RaggedBatch is RaggedBatch
    assert saccade.ragged.combine_data is combine_data


def test_properties(device):
    batch = example(device)
    assert batch.mask.tolist() == [[True, True, False], [True, True, True]]
    assert batch.mask.dtype == torch.bool
    assert batch.mask.device == batch.sample_sizes.device == batch.device == batch.tensor.device
    assert (batch.max_sample_size, batch.total_num_entries, batch.total_num_samples_in_batch) == (3, 5, 2)
    assert (batch.non_uniform_dim, batch._non_uniform_dim, batch.num_batch_dims) == (1, 1, 1)
    assert batch.batch_shape == (2,)
    assert isinstance(batch.batch_shape, torch.Size)
    assert (batch.shape, batch.dtype, batch.dim()) == ((2, 3), torch.int64, 2)
    assert (batch.size(), batch.size(1), batch.size(dim=0)) == ((2, 3), 3, 2)
    assert batch[1].tolist() == [7, 8, 9]
    assert batch[0, 1] == 6
    assert [row.tolist() for row in batch] == [[5, 6, 0], [7, 8, 9]]


def test_tensors_are_kept_as_they_are():
    tensor, mask, sizes = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), torch.tensor([3, 3], dtype=torch.int16)
    batch = RaggedBatch(tensor, mask, sizes)
    assert batch.tensor is tensor
    assert batch.mask is mask
    assert batch.sample_sizes is sizes


def test_what_is_not_given_is_computed_once(device):
    batch = example(device)
    assert batch.mask is batch.mask
    mask = torch.tensor([[True, False], [True, True], [False, False]], device=device)
    batch = RaggedBatch(torch.zeros(3, 2, 4, device=device), mask)
    assert batch.sample_sizes.tolist() == [1, 2, 0]
    assert batch.sample_sizes.dtype == torch.int64
    assert batch.sample_sizes is batch.sample_sizes


def test_a_mask_first_asked_for_in_inference_mode_does_not_spoil_training(device):
    batch, from_mask = example(device), RaggedBatch(example(device).tensor, example(device).mask)
    with torch.inference_mode():
        assert batch.mask.sum() == from_mask.sample_sizes.sum() == 5
    leaf = torch.ones(2, 3, device=device, requires_grad=True)
    (leaf * batch.mask).sum().backward()
    assert not from_mask.sample_sizes.is_inference()


def test_non_uniform_dim_behind_data_dimensions(device):
    """(B0, B1, D, N): masks and sizes are shaped as if N followed the batch dimensions."""
    sizes = torch.tensor([[1, 0, 3], [2, 3, 3]], device=device)
    batch = RaggedBatch(torch.zeros(2, 3, 4, 3, device=device), sample_sizes=sizes, non_uniform_dim=3)
    assert batch.mask.shape == (2, 3, 3)
    assert batch.mask.sum(-1).tolist() == sizes.tolist()
    assert (batch.num_batch_dims, batch.batch_shape, batch.total_num_samples_in_batch) == (2, (2, 3), 6)
    again = RaggedBatch(batch.tensor, batch.mask, non_uniform_dim=3)
    assert again.sample_sizes.tolist() == sizes.tolist()


def test_a_size_beyond_the_width_counts_as_all():
    batch = RaggedBatch(torch.arange(6).view(2, 3), sample_sizes=torch.tensor([7, -1]))
    assert batch.mask.tolist() == [[True] * 3, [False] * 3]
    assert [part.tolist() for part in batch.split()] == [[0, 1, 2], []]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "mask: expected a mask or sample_sizes, got neither"),
        ({"sample_sizes": torch.tensor(2)}, "at least one batch dimension"),
        ({"mask": torch.ones(3)}, "at least one batch dimension"),
        ({"sample_sizes": torch.ones(2, 3, 4)}, "non_uniform_dim: expected one of the dimensions"),
        ({"sample_sizes": torch.ones(2), "non_uniform_dim": 0}, "non_uniform_dim: .* got 0 for shape"),
        ({"sample_sizes": torch.ones(2), "non_uniform_dim": 3}, "non_uniform_dim: .* got 3 for shape"),
        ({"sample_sizes": torch.ones(2), "non_uniform_dim": -1}, "non_uniform_dim: .* got -1 for shape"),
        ({"sample_sizes": torch.ones(3)}, r"sample_sizes: expected shape \(2,\) .* got \(3,\)"),
        ({"mask": torch.ones(2, 4)}, r"mask: expected shape \(2, 3\) for a tensor of shape \(2, 3, 4\), got \(2, 4\)"),
        ({"mask": torch.ones(2, 3), "non_uniform_dim": 2}, r"mask: expected shape \(2, 4\)"),
        ({"mask": torch.ones(2, 3, 1), "sample_sizes": torch.ones(2)}, r"mask: expected shape \(2, 3\)"),
        ({"sample_sizes": torch.ones(2, device="meta")}, "sample_sizes: expected device cpu, that of tensor, got meta"),
    ],
)
def test_wrong_arguments(arguments, message):
    for error in (AssertionError, ValueError, InvalidArgumentError):
        with pytest.raises(error, match=message):
            RaggedBatch(torch.zeros(2, 3, 4), **arguments)


def test_arguments_that_are_no_tensors():
    tensor, wrong = torch.zeros(1, 2), [[True]]
    for name, arguments in (
        ("tensor", (wrong, tensor)),
        ("mask", (tensor, wrong)),
        ("sample_sizes", (tensor, None, [1])),
    ):
        with pytest.raises(TypeError, match=f"{name}: expected a torch.Tensor, got list"):
            RaggedBatch(*arguments)  # pyright: ignore[reportArgumentType]


def test_repr_computes_nothing():
    batch = example()
    text = repr(batch)
    for part in ("RaggedBatch(", "tensor=tensor(", "sample_sizes=tensor(", "non_uniform_dim=1", "batch_shape=(2,)"):
        assert part in text
    assert "mask=<uninitialized>" in text
    assert batch._extent.mask is None
    assert "sample_sizes=<uninitialized>" in repr(RaggedBatch(torch.zeros(1, 2), torch.ones(1, 2).bool()))
    assert "mask=tensor(" in repr(RaggedBatch(torch.zeros(1, 2), torch.ones(1, 2).bool()))


def test_from_oversize_tensor(device):
    tensor = torch.rand(2, 10, 4, device=device)
    sizes = torch.tensor([1, 2], device=device)
    mask = torch.arange(10, device=device) < sizes[:, None]
    batches = [RaggedBatch.FromOversizeTensor(tensor, sample_sizes=sizes), RaggedBatch.FromOversizeTensor(tensor, mask)]
    batches.append(RaggedBatch.FromOversizeTensor(tensor, mask, sizes))
    for batch in batches:
        assert batch.shape == (2, 2, 4)
        assert batch.tensor.data_ptr() == tensor.data_ptr()
        assert batch.mask.tolist() == [[True, False], [True, True]]
        assert (batch.sample_sizes.tolist(), batch.sample_sizes.dtype) == ([1, 2], torch.int64)
    batch = RaggedBatch.FromOversizeTensor(tensor.mT, mask, non_uniform_dim=2)
    assert torch.equal(batch.tensor, tensor.mT[..., :2])
    assert batch.mask.shape == (2, 2)


def test_from_oversize_tensor_at_the_limits():
    for sizes, width in ([0, 0], 0), ([-3, -1], 0), ([9, 1], 3), ([], 0):
        batch = RaggedBatch.FromOversizeTensor(torch.zeros(len(sizes), 3, 2), sample_sizes=torch.tensor(sizes).long())
        assert batch.shape == (len(sizes), width, 2)
    with pytest.raises(ValueError, match="mask: expected a mask or sample_sizes"):
        RaggedBatch.FromOversizeTensor(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="mask: expected a mask or sample_sizes"):
        RaggedBatch.FromOversizeTensor(torch.zeros(2, 3), non_uniform_dim=1)


def test_from_full_tensor(device):
    tensor = torch.rand(2, 3, 4, device=device)
    batch = RaggedBatch.FromFullTensor(tensor)
    assert batch.tensor is tensor
    assert batch.mask.shape == (2, 3)
    assert batch.mask.all()
    assert (batch.sample_sizes.tolist(), batch.sample_sizes.dtype) == ([3, 3], torch.int64)
    assert batch.sample_sizes.device == batch.mask.device == tensor.device
    batch = RaggedBatch.FromFullTensor(tensor, 2, 2)
    assert batch.sample_sizes.tolist() == [[4] * 3] * 2
    assert batch.mask.shape == (2, 3, 4)
    assert RaggedBatch.FromFullTensor(tensor, non_uniform_dim=2).sample_sizes.tolist() == [4, 4]
    for non_uniform_dim, num_batch_dims in ((1, 0), (1, -1), (0, 1), (3, 1), (-1, 1), (1, 2)):
        with pytest.raises(AssertionError, match="_dim"):
            RaggedBatch.FromFullTensor(tensor, non_uniform_dim, num_batch_dims)


def test_create_with_sample_sizes_like_self(device):
    batch = example(device)
    assert batch.total_num_entries == 5
    created = batch.create_with_sample_sizes_like_self(torch.rand(2, 4, 3, device=device), -1)
    assert created.non_uniform_dim == 2
    assert created.mask is batch.mask
    assert created.sample_sizes is batch.sample_sizes
    assert created._extent.total_num_entries == 5
    assert batch.create_with_sample_sizes_like_self(torch.rand(2, 3, 1, device=device)).non_uniform_dim == 1
    moved = batch.create_with_sample_sizes_like_self(batch.tensor, device="meta")
    assert {moved.tensor.device.type, moved.mask.device.type, moved.sample_sizes.device.type} == {"meta"}
    assert batch.device.type == device


def test_what_is_not_computed_yet_is_shared_too(device):
    batch = example(device)
    created = batch.create_with_sample_sizes_like_self(torch.rand(2, 3, device=device))
    applied = created.apply(lambda tensor: tensor + 1)
    assert batch._extent.mask is None
    assert applied.mask is created.mask is batch.mask
    batch = RaggedBatch(batch.tensor, batch.mask)
    assert batch.detach().sample_sizes is batch.sample_sizes


@pytest.mark.parametrize(
    ("shape", "non_uniform_dim"),
    [((2, 4), None), ((3, 3), None), ((2,), None), ((2, 3), 0), ((2, 3), 2), ((2, 3, 4), -3)],
)
def test_create_with_sample_sizes_like_self_of_another_shape(shape, non_uniform_dim):
    with pytest.raises(AssertionError, match=r"mask|sample_sizes|non_uniform_dim"):
        example().create_with_sample_sizes_like_self(torch.zeros(shape), non_uniform_dim)


def test_to(device):
    batch = example()
    moved = batch.to(device, torch.float32)
    assert (moved.dtype, moved.mask.dtype, moved.sample_sizes.dtype) == (torch.float32, torch.bool, torch.int64)
    assert moved.device.type == moved.mask.device.type == moved.sample_sizes.device.type == device
    cast = batch.to(torch.float16)
    assert cast.mask is batch.mask
    assert cast.sample_sizes is batch.sample_sizes
    assert batch.to(torch.int64).tensor is batch.tensor
    subclass = type("Boxes", (RaggedBatch,), {})
    assert type(subclass(batch.tensor, sample_sizes=batch.sample_sizes).to(torch.float32)) is subclass


def test_split(device):
    tensor = torch.rand(2, 4, 3, device=device, requires_grad=True)
    sizes = torch.tensor([2, 3], device=device)
    first, second = RaggedBatch(tensor, sample_sizes=sizes, non_uniform_dim=2).split()
    assert torch.equal(first, tensor[0, :, :2])
    assert torch.equal(second, tensor[1])
    assert first.data_ptr() == tensor.data_ptr()
    (first.sum() + 2 * second.sum()).backward()
    assert tensor.grad is not None
    assert tensor.grad[:, 0].tolist() == [[1, 1, 0], [2, 2, 2]]


def test_split_mirrors_the_batch_dimensions(device):
    sizes = torch.tensor([[1, 0, 3], [2, 3, 3]], device=device)
    tensor = torch.rand(2, 3, 4, 3, device=device)
    parts = RaggedBatch(tensor, sample_sizes=sizes, non_uniform_dim=3).split()
    assert [[part.shape for part in row] for row in parts] == [[(4, 1), (4, 0), (4, 3)], [(4, 2), (4, 3), (4, 3)]]
    assert torch.equal(parts[1][0], tensor[1, 0, :, :2])
    assert RaggedBatch(torch.zeros(0, 5), sample_sizes=torch.zeros(0).long()).split() == []
    assert RaggedBatch(torch.zeros(2, 0, 5), sample_sizes=torch.zeros(2, 0).long()).split() == [[], []]


# ---- constructors and properties


def test_empty(device):
    batch = RaggedBatch.Empty(2, 1, device)
    assert (batch.shape, batch.mask.shape, batch.sample_sizes.shape) == ((0, 0), (0, 0), (0,))
    assert (batch.dtype, batch.mask.dtype, batch.sample_sizes.dtype) == (torch.float32, torch.bool, torch.int64)
    assert batch.device.type == batch.mask.device.type == batch.sample_sizes.device.type == device
    batch = RaggedBatch.Empty(5, 3, device, num_batch_dims=2)
    assert (batch.shape, batch.mask.shape, batch.non_uniform_dim) == ((0, 0, 0, 0, 0), (0, 0, 0), 3)
    for shape in ((2, 3), torch.Size([2, 3]), [2, 3]):
        batch = RaggedBatch.Empty(4, 2, device, batch_shape=shape)
        assert (batch.shape, batch.mask.shape) == ((2, 3, 0, 0), (2, 3, 0))
        assert batch.sample_sizes.tolist() == [[0] * 3] * 2
    assert RaggedBatch.Empty(2, 1, device, batch_shape=4).shape == (4, 0)
    for arguments in (
        (1, 1, device),
        (2, 0, device),
        (2, 2, device),
        (2, -1, device),
        (2, 2, device, 2),
        (2, 0, device, 0),
        (3, 1, device, 1, (2,)),
        (2, 1, device, None, ()),
    ):
        with pytest.raises(AssertionError, match=r"num_dims|non_uniform_dim|num_batch_dims"):
            RaggedBatch.Empty(*arguments)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.uint16, torch.uint64])
def test_sizes_of_any_integer_dtype(device, dtype):
    batch = RaggedBatch(example(device).tensor, sample_sizes=torch.tensor([2, 3], dtype=dtype, device=device))
    assert batch.mask.tolist() == example().mask.tolist()
    assert batch.total_num_entries == 5
    assert [len(part) for part in batch.split()] == [2, 3]
    assert RaggedBatch.FromOversizeTensor(batch.tensor, sample_sizes=batch.sample_sizes).sample_sizes.dtype == dtype


def test_gradients_of_the_tensor():
    batch = example().double()
    assert not batch.requires_grad
    batch.requires_grad = True
    assert batch.tensor.requires_grad
    product = batch.apply(lambda tensor: tensor * 2)
    assert not product.retains_grad
    assert product.retain_grad() is None
    assert product.retains_grad
    with pytest.raises(RuntimeError, match="leaf"):
        product.requires_grad = False
    product.tensor.sum().backward()
    assert product.tensor.grad is not None
    batch[0, 0].backward()
    assert batch.tensor.grad is not None
    assert batch.tensor.grad.tolist() == [[3, 2, 2], [2, 2, 2]]


def test_items_are_written_in_place(device):
    batch = example(device)
    alias = batch.tensor
    batch[0, 1] = 60
    batch[1] = 1
    assert alias.tolist() == [[5, 60, 0], [1, 1, 1]]


def test_repr_is_readable():
    batch = RaggedBatch(example().tensor, sample_sizes=example().sample_sizes.int())
    assert (
        repr(batch)
        == """RaggedBatch(
  tensor=tensor([[5, 6, 0],
                 [7, 8, 9]]),
  mask=<uninitialized>,
  sample_sizes=tensor([2, 3], dtype=torch.int32),
  non_uniform_dim=1,
  batch_shape=(2,),
)"""
    )


# ---- other data, the same sizes


def test_clone():
    batch = example().double()
    batch.requires_grad = True
    clone = batch.as_self_with_cloned_data()
    assert torch.equal(clone.tensor, batch.tensor)
    assert clone.tensor.data_ptr() != batch.tensor.data_ptr()
    assert clone.mask is batch.mask
    assert clone.sample_sizes is batch.sample_sizes
    assert torch.autograd.grad(clone.tensor.sum(), batch.tensor)[0].tolist() == [[1] * 3] * 2


def test_transposed():
    tensor = torch.rand(2, 3, 4, 5)
    batch = RaggedBatch(tensor, sample_sizes=torch.tensor([1, 3]))
    assert batch.get_non_uniform_dimension_transposed_to(1) is batch
    transposed = batch.get_non_uniform_dimension_transposed_to(3)
    assert torch.equal(transposed.tensor, tensor.transpose(1, 3))
    assert transposed.tensor.data_ptr() == tensor.data_ptr()
    assert (transposed.non_uniform_dim, transposed.mask is batch.mask) == (3, True)
    assert torch.equal(transposed.get_non_uniform_dimension_transposed_to(1).tensor, tensor)
    for dim in (0, -1, 4):
        with pytest.raises(AssertionError, match=f"dim: expected one of the dimensions .*, got {dim}"):
            batch.get_non_uniform_dimension_transposed_to(dim)


def test_unsqueeze_data_dim():
    batch = RaggedBatch(torch.rand(2, 4, 3), sample_sizes=torch.tensor([1, 3]), non_uniform_dim=2)
    for dim, shape, non_uniform_dim in (
        (1, (2, 1, 4, 3), 3),
        (2, (2, 4, 1, 3), 3),
        (3, (2, 4, 3, 1), 2),
        (-1, (2, 4, 3, 1), 2),
        (-3, (2, 1, 4, 3), 3),
    ):
        result = batch.unsqueeze_data_dim(dim)
        assert (result.shape, result.non_uniform_dim) == (shape, non_uniform_dim)
        assert result.sample_sizes is batch.sample_sizes
        assert result.tensor.data_ptr() == batch.tensor.data_ptr()
    for dim in (0, -4):
        with pytest.raises(AssertionError, match=f"dim: expected one behind the 1 batch dimensions, got {dim}"):
            batch.unsqueeze_data_dim(dim)
    with pytest.raises(IndexError):
        batch.unsqueeze_data_dim(4)


class Steps(torch.nn.Module):
    def forward(self, tensor, mask):
        return tensor * mask

    def method(self, tensor, mask, sizes, *, unused=None):
        return tensor * mask + sizes[:, None]


class Add:
    def __call__(self, tensor, mask=None):
        assert mask is None  # a parameter with a default counts in plain functions alone
        return tensor + 1


def test_apply():
    batch = RaggedBatch(torch.tensor([[5, 6, 4], [7, 8, 9]]), sample_sizes=torch.tensor([2, 3]))
    masked, plus_sizes = [[5, 6, 0], [7, 8, 9]], [[7, 8, 2], [10, 11, 12]]

    def with_default(tensor, mask=None):
        return tensor * mask

    for step, expected in (
        (lambda tensor: tensor + 1, [[6, 7, 5], [8, 9, 10]]),
        (lambda tensor, mask: tensor * mask, masked),
        (lambda tensor, mask, sizes: tensor * mask + sizes[:, None], plus_sizes),
        (with_default, masked),
        (torch.neg, [[-5, -6, -4], [-7, -8, -9]]),
        (abs, batch.tensor.tolist()),
        (functools.partial(torch.mul, other=2), [[10, 12, 8], [14, 16, 18]]),
        (functools.partial(lambda factor, tensor, mask: factor * tensor * mask, 1), masked),
        (Steps(), masked),
        (Steps().method, plus_sizes),
        (Add(), [[6, 7, 5], [8, 9, 10]]),
    ):
        result = batch.apply(step)
        assert result.tensor.tolist() == expected
        assert result.mask is batch.mask
        assert result.sample_sizes is batch.sample_sizes
    results = batch.apply(lambda tensor: (tensor, tensor[..., None]))
    assert isinstance(results, tuple)
    assert [result.shape for result in results] == [(2, 3), (2, 3, 1)]
    assert batch.apply(lambda tensor: tensor.zero_()).tensor is batch.tensor
    assert not batch.tensor.any()


def test_steps_that_cannot_be_applied():
    batch = example()
    for step, count in (
        (lambda: 0, 0),
        (lambda *args: 0, 0),
        (lambda a, b, c, d: 0, 4),
        (functools.partial(lambda *args: 0), 0),
    ):
        with pytest.raises(
            ValueError, match=f"proc_step: expected a function of 1 to 3 positional .*, got one of {count}"
        ):
            batch.apply(step)
    with pytest.raises(AssertionError, match="mask: expected shape"):
        batch.apply(lambda tensor: tensor[:, :2])
    with pytest.raises(TypeError, match=r"tensor: expected a torch.Tensor, got list"):
        batch.apply(lambda tensor: tensor.tolist())


def test_set_tensor():
    batch = RaggedBatch(torch.zeros(2, 4, 3), sample_sizes=torch.tensor([2, 3]), non_uniform_dim=2)
    mask, tensor = batch.mask, torch.zeros(2, 1, 3, 7, dtype=torch.int8)
    batch.set_tensor(tensor)
    assert batch.tensor is tensor
    assert batch.mask is mask
    for wrong in torch.zeros(3, 4, 3), torch.zeros(2, 3, 4), torch.zeros(2, 3), torch.zeros(2, 4, 3, device="meta"):
        with pytest.raises(AssertionError, match=r"tensor: expected|non_uniform_dim"):
            batch.set_tensor(wrong)


# ---- padding


def test_existence_weights(device):
    batch = RaggedBatch(
        torch.zeros(2, 2, 3, device=device), sample_sizes=torch.tensor([1, 3], device=device), non_uniform_dim=2
    )
    for dtype in torch.float32, torch.float16, torch.int64, torch.bool:
        weights = batch.get_existence_weights(dtype)
        assert weights.tolist() == [[[1, 0, 0]] * 2, [[1, 1, 1]] * 2]
        assert weights.dtype == dtype
        assert weights.is_contiguous()
    assert batch.get_existence_weights().dtype == torch.float32
    flat = example(device)
    flat.get_existence_weights(torch.bool).zero_()
    assert flat.mask.sum() == 5


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.bool]
DTYPES += [torch.int8, torch.uint8, torch.int32, torch.int64, torch.uint16, torch.uint64]


@given(
    batch_shape=st.lists(st.integers(0, 3), min_size=1, max_size=3),
    width=st.integers(0, 4),
    data_dims=st.lists(st.integers(0, 2), max_size=2),
    place=st.integers(0, 2),
    dtype=st.sampled_from(DTYPES),
    value=st.sampled_from([0, 1, 2.75, True, 3.14159]),
    seed=st.integers(0, 1000),
)
def test_padding_is_set(batch_shape, width, data_dims, place, dtype, value, seed):
    generator = torch.Generator().manual_seed(seed)
    batch_dims = len(batch_shape)
    dim = batch_dims + min(place, len(data_dims))
    values = torch.randint(0, 100, (*batch_shape, width, *data_dims), generator=generator).to(dtype)
    sizes = torch.randint(-1, width + 2, tuple(batch_shape), generator=generator)
    expected = values.clone()
    for sample, size in zip(expected.flatten(0, batch_dims - 1), sizes.flatten().tolist(), strict=True):
        sample[max(size, 0) :] = torch.tensor(value).to(dtype)
    expected = expected.transpose(batch_dims, dim)
    batch = RaggedBatch(values.transpose(batch_dims, dim), sample_sizes=sizes, non_uniform_dim=dim)
    before = batch.tensor.clone()
    filled = batch.with_padded_set_to(value)
    assert torch.equal(filled.tensor, expected)
    assert torch.equal(batch.tensor, before)
    assert filled.mask is batch.mask
    assert filled.non_uniform_dim == dim
    assert batch.set_padded_to(value) is None
    assert torch.equal(batch.tensor, expected)
    assert torch.equal(values.transpose(batch_dims, dim), expected)  # in place, whatever the strides


def test_large_integers_keep_their_digits():
    for dtype, value in (torch.int64, 2**62 + 1), (torch.uint64, 2**63 + 1):
        batch = RaggedBatch(torch.zeros(1, 2, dtype=dtype), sample_sizes=torch.tensor([1]))
        assert batch.with_padded_set_to(value).tensor.tolist() == [[0, value]]


def test_nan_in_padding_is_overwritten(device):
    batch = RaggedBatch(torch.full((1, 2), float("nan"), device=device), sample_sizes=torch.tensor([0], device=device))
    assert batch.with_padded_set_to(0).tensor.tolist() == [[0, 0]]
    assert batch.with_padded_set_to(float("inf")).tensor.tolist() == [[float("inf")] * 2]


def test_the_fill_is_seen_by_autograd(device):
    sizes = torch.tensor([1, 3], device=device)
    for dim in 1, 2:
        leaf = torch.tensor([[1.0, 2, 3], [4, 5, 6]], device=device)[:, :, None].transpose(1, dim).requires_grad_()
        batch = RaggedBatch(leaf, sample_sizes=sizes, non_uniform_dim=dim)
        batch.set_padded_to(-7)
        assert batch.tensor.flatten(1).tolist() == [[1, -7, -7], [4, 5, 6]]
        assert leaf.flatten(1).tolist() == [[1, 2, 3], [4, 5, 6]]
        weight = torch.rand_like(leaf) + 1
        (gradient,) = torch.autograd.grad((batch.tensor * weight).sum(), leaf)
        assert torch.equal(gradient, weight * batch.get_existence_weights())
        with torch.no_grad():
            batch = RaggedBatch(leaf, sample_sizes=sizes, non_uniform_dim=dim)
            batch.set_padded_to(0)
            assert batch.tensor is leaf
            assert leaf.flatten(1).tolist() == [[1, 0, 0], [4, 5, 6]]


def test_a_tensor_saved_for_backward_is_not_changed_silently():
    tensor, factor = torch.ones(1, 2), torch.ones(1, 2, requires_grad=True)
    product = tensor * factor
    RaggedBatch(tensor, sample_sizes=torch.tensor([1])).set_padded_to(5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_entries_that_share_memory_are_not_filled_in_place():
    tensor = torch.tensor([[1, 2, 3]]).expand(2, 3)
    batch = RaggedBatch(tensor, sample_sizes=torch.tensor([1, 3]))
    batch.set_padded_to(0)
    assert batch.tensor.tolist() == [[1, 0, 0], [1, 2, 3]]
    assert tensor.tolist() == [[1, 2, 3]] * 2
    windows = torch.arange(4).unfold(0, 3, 1)
    batch = RaggedBatch(windows, sample_sizes=torch.tensor([1, 3]))
    batch.set_padded_to(9)
    assert batch.tensor.tolist() == [[0, 9, 9], [1, 2, 3]]


def test_gradcheck_of_the_fill():
    tensor = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    sizes = torch.tensor([1, 3])

    def fill(tensor: Tensor) -> Tensor:
        return RaggedBatch(tensor, sample_sizes=sizes, non_uniform_dim=2).with_padded_set_to(1.5).tensor

    assert torch.autograd.gradcheck(fill, tensor)
    assert torch.autograd.gradgradcheck(fill, tensor)


# ---- batch dimensions


def nested(device="cpu", **given) -> RaggedBatch:
    """Batch dimensions (2, 3), data dimension 2 before N = 4."""
    sizes = torch.tensor([[1, 0, 4], [2, 3, 4]], device=device)
    tensor = torch.arange(48.0, device=device).view(2, 3, 2, 4)
    if given.get("mask"):
        return RaggedBatch(tensor, torch.arange(4, device=device) < sizes[..., None], non_uniform_dim=3)
    return RaggedBatch(tensor, sample_sizes=sizes, non_uniform_dim=3)


@pytest.mark.parametrize("mask", [True, False])
def test_what_is_not_computed_stays_so_and_nothing_is_changed(mask):
    for change, shape, dim in (
        (lambda batch: batch.repeat_samples([2, 1]), (4, 3, 2, 4), 3),
        (lambda batch: batch.unsqueeze_batch_dim(1), (2, 1, 3, 2, 4), 4),
        (lambda batch: batch.reshape_batch_dims((3, -1)), (3, 2, 2, 4), 3),
        (lambda batch: batch.reshape_batch_dims(6), (6, 2, 4), 2),
        (lambda batch: batch.reshape_batch_dims([1, 2, 3]), (1, 2, 3, 2, 4), 4),
        (lambda batch: batch.flatten_batch_dims(), (6, 2, 4), 2),
        (lambda batch: batch.broadcast_batch_dims_to_shape((2, 6)), (2, 6, 2, 4), 3),
        (lambda batch: batch.unsqueeze_batch_dim(2).squeeze_batch_dim(2), (2, 3, 2, 4), 3),
        (lambda batch: batch.to_device("cpu"), (2, 3, 2, 4), 3),
        (lambda batch: batch.to_device("meta"), (2, 3, 2, 4), 3),
    ):
        batch = nested(mask=mask)
        total = batch.total_num_entries if not mask else None
        changed = change(batch)
        assert (changed.shape, changed.non_uniform_dim) == (shape, dim)
        assert ((changed._extent.mask is None), (changed._extent.sample_sizes is None)) == (not mask, mask)
        assert batch.shape == (2, 3, 2, 4)
        assert total in (None, 14)


def test_repeat_samples(device):
    batch = nested(device)
    result = batch.repeat_samples(2, 1)
    assert torch.equal(result.tensor, torch.cat([batch.tensor] * 2, 1))
    assert torch.equal(result.sample_sizes, torch.cat([batch.sample_sizes] * 2, 1))
    assert batch.repeat_samples(2).sample_sizes.tolist() == batch.sample_sizes.tolist() * 2
    assert batch.repeat_samples(torch.tensor(2)).batch_shape == (4, 3)
    assert batch.repeat_samples([torch.tensor(1), 3]).batch_shape == (2, 9)
    assert batch.repeat_samples(0).batch_shape == (0, 3)
    assert batch.repeat_samples((1, 1)).tensor.data_ptr() != batch.tensor.data_ptr()
    for arguments in (([2],), ([2, 2, 2],), ([2, 2], 0), (2, 2), (2, -1)):
        with pytest.raises(AssertionError, match=r"num_repeats|batch_dim"):
            batch.repeat_samples(*arguments)


def test_unsqueeze_and_squeeze_batch_dims():
    batch = nested()
    for dim in range(3):
        result = batch.unsqueeze_batch_dim(dim)
        assert torch.equal(result.tensor, batch.tensor.unsqueeze(dim))
        assert torch.equal(result.mask, batch.mask.unsqueeze(dim))
        assert result.tensor.data_ptr() == batch.tensor.data_ptr()
        assert result.num_batch_dims == 3
        assert torch.equal(result.squeeze_batch_dim(dim).sample_sizes, batch.sample_sizes)
    for dim in (-1, 3):
        with pytest.raises(AssertionError, match=f"dim: expected one of 0 to 2, got {dim}"):
            batch.unsqueeze_batch_dim(dim)
    for dim in (-1, 2):
        with pytest.raises(AssertionError, match=f"batch_dim: expected one of 0 to 1, got {dim}"):
            batch.squeeze_batch_dim(dim)
    with pytest.raises(ValueError, match="batch_dim: expected a dimension of size 1, got 1"):
        batch.squeeze_batch_dim(1)
    with pytest.raises(ValueError, match="batch_dim: expected a dimension of size 1, got 0"):
        RaggedBatch.Empty(3, 2, "cpu", 2).squeeze_batch_dim(0)
    with pytest.raises(AssertionError, match="batch_dim: expected another batch dimension to remain"):
        RaggedBatch.Empty(2, 1, "cpu", batch_shape=1).squeeze_batch_dim(0)


def test_reshape_batch_dims():
    batch = nested()
    result = batch.reshape_batch_dims((3, 2))
    assert result.sample_sizes.tolist() == [[1, 0], [4, 2], [3, 4]]
    assert torch.equal(result.tensor, batch.tensor.view(3, 2, 2, 4))
    empty = RaggedBatch(torch.zeros(2, 3, 0, 4), sample_sizes=torch.zeros(2, 3).long())
    assert empty.flatten_batch_dims().shape == (6, 0, 4)
    assert RaggedBatch.Empty(3, 2, "cpu", batch_shape=(0, 3)).flatten_batch_dims().shape == (0, 0)
    for shape in (4, (2, 2), (-1, 4), (-1, -1), (0, -1), ()):
        for values in batch, empty:
            with pytest.raises((RuntimeError, AssertionError), match="new_batch_shape: expected a shape of 6 samples"):
                values.reshape_batch_dims(shape)
    single = RaggedBatch(torch.zeros(1, 2), sample_sizes=torch.tensor([1]))
    with pytest.raises(AssertionError, match="at least one batch dimension"):
        single.reshape_batch_dims(())


def test_broadcast_batch_dims():
    batch = RaggedBatch(torch.tensor([[1, 2, 3], [4, 5, 6]]), sample_sizes=torch.tensor([2, 3]))
    result = batch.broadcast_batch_dims_to_shape((4,))
    assert result.sample_sizes.tolist() == [2, 3, 2, 3]
    assert torch.equal(result.tensor, batch.tensor.repeat(2, 1))
    assert batch.broadcast_batch_dims_to_shape([2]).tensor.data_ptr() != batch.tensor.data_ptr()
    empty = RaggedBatch.Empty(3, 2, "cpu", batch_shape=(0, 2))
    assert empty.broadcast_batch_dims_to_shape((0, 4)).shape == (0, 4, 0)
    for values, shape in ((batch, (3,)), (batch, (1,)), (batch, (0,)), (batch, (2, 2)), (empty, (2, 2)), (batch, ())):
        with pytest.raises(AssertionError, match="new_batch_shape: expected multiples of the sizes"):
            values.broadcast_batch_dims_to_shape(shape)
    # Sizes far beyond what float32 tells apart.
    with pytest.raises(AssertionError, match="multiples"):
        RaggedBatch(torch.zeros(3, 0), sample_sizes=torch.zeros(3)).broadcast_batch_dims_to_shape((3 * 2**24 + 1,))


def test_broadcast_batch_dims_of_several():
    row = RaggedBatch(torch.rand(1, 4, 2), sample_sizes=torch.tensor([[1, 2, 0, 2]]))
    column = RaggedBatch(torch.rand(3, 2, 7, 5), sample_sizes=torch.tensor([[1, 5]] * 3), non_uniform_dim=3)
    first, second = RaggedBatch.broadcast_batch_dims([row, column])
    assert (first.shape, second.shape) == ((3, 4, 2), (3, 4, 7, 5))
    assert first.sample_sizes.tolist() == [[1, 2, 0, 2]] * 3
    assert second.sample_sizes.tolist() == [[1, 5, 1, 5]] * 3
    assert second.non_uniform_dim == 3
    flat = row.flatten_batch_dims()
    three = RaggedBatch(torch.zeros(3, 1), sample_sizes=torch.ones(3))
    for data in [row, flat], [flat, three], []:
        with pytest.raises(AssertionError, match=r"new_batch_shape|data: expected"):
            RaggedBatch.broadcast_batch_dims(data)


# ---- device and dtype


def test_casts():
    batch = example()
    for name, dtype in (
        ("int", torch.int32),
        ("long", torch.int64),
        ("bool", torch.bool),
        ("half", torch.float16),
        ("bfloat16", torch.bfloat16),
        ("float", torch.float32),
        ("double", torch.float64),
        ("cfloat", torch.complex64),
        ("cdouble", torch.complex128),
    ):
        cast = getattr(batch, name)()
        assert cast.dtype == dtype
        assert torch.equal(cast.tensor, batch.tensor.to(dtype))
        assert cast.mask is batch.mask
        assert cast.sample_sizes is batch.sample_sizes
        assert batch.to_dtype(dtype).dtype == dtype
    leaf = torch.ones(2, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(RaggedBatch(leaf, batch.mask).double().tensor.sum(), leaf)
    assert gradient.tolist() == [[1] * 3] * 2


def test_detach():
    batch = RaggedBatch(torch.ones(2, 3, requires_grad=True), example().mask)
    detached = batch.detach()
    assert not detached.requires_grad
    assert detached.tensor.data_ptr() == batch.tensor.data_ptr()
    assert detached.mask is batch.mask


def test_devices(device):
    batch = example()
    moved = batch.to_device(device)
    assert (moved.device.type, moved._extent.mask) == (device, None)
    assert moved.mask.tolist() == batch.mask.tolist()
    assert moved.cpu().device.type == "cpu"
    assert batch.cpu().tensor is batch.tensor
    assert moved.to("meta").mask.device.type == "meta"
    assert not hasattr(batch, "cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pinned_memory():
    pinned = example().pin_memory()
    assert pinned.tensor.is_pinned()
    assert pinned.sample_sizes.is_pinned()
    assert pinned._extent.mask is None
    moved = pinned.to("cuda", non_blocking=True)
    assert moved.split()[0].tolist() == [5, 6]


def test_subclasses_stay_themselves():
    class Boxes(RaggedBatch):
        pass

    boxes = Boxes(torch.zeros(2, 3, 4), sample_sizes=torch.tensor([1, 3]))
    for result in (
        boxes.float(),
        boxes.detach(),
        boxes.to_device("meta"),
        boxes.with_padded_set_to(1),
        boxes.unsqueeze_batch_dim(0),
        boxes.repeat_samples(2),
        boxes.unsqueeze_data_dim(-1),
        boxes.apply(lambda tensor: tensor + 1),
        Boxes.Empty(2, 1, "cpu"),
        Boxes.FromFullTensor(boxes.tensor),
        torch.utils._pytree.tree_map(lambda leaf: leaf, boxes),
    ):
        assert type(result) is Boxes


def test_a_class_may_be_defined_again():
    """As in a notebook."""
    for _ in range(2):
        boxes = type("Boxes", (RaggedBatch,), {})(torch.zeros(1, 2), sample_sizes=torch.tensor([1]))
        assert type(torch.utils._pytree.tree_map(lambda leaf: leaf, boxes)) is type(boxes)


def test_copies_and_files(tmp_path):
    batch = example()
    torch.save(batch, tmp_path / "batch.pt")
    for again in copy.deepcopy(batch), torch.load(tmp_path / "batch.pt", weights_only=True):
        assert type(again) is RaggedBatch
        assert torch.equal(again.tensor, batch.tensor)
        assert torch.equal(again.sample_sizes, batch.sample_sizes)
        assert again.tensor is not batch.tensor
