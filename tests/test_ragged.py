"""``RaggedBatch`` and ``combine_data``: the values of the definition, layouts, sharing, errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import saccade
from saccade.argument_checks import InvalidArgumentError, InvalidStateError
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
    assert batch._mask is None
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
    assert created._total_num_entries == 5
    assert batch.create_with_sample_sizes_like_self(torch.rand(2, 3, 1, device=device)).non_uniform_dim == 1
    moved = batch.create_with_sample_sizes_like_self(batch.tensor, device="meta")
    assert {moved.tensor.device.type, moved.mask.device.type, moved.sample_sizes.device.type} == {"meta"}
    assert batch.device.type == device


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


def test_compiled_code_takes_and_makes_batches(device):
    def step(batch: RaggedBatch, tensor: Tensor):
        total = torch.where(batch.mask, batch.tensor, 0).sum()
        made = RaggedBatch(tensor, mask=batch.mask)
        return (
            total + made.max_sample_size,
            made.sample_sizes,
            batch.to(torch.float32),
            combine_data([tensor, tensor[:1]]),
        )

    torch._dynamo.reset()
    total, sizes, floats, combined = torch.compile(step, backend="aot_eager", fullgraph=True)(
        example(device), torch.rand(2, 3, device=device)
    )
    assert (total, sizes.tolist()) == (38, [2, 3])
    assert floats.dtype == torch.float32
    assert floats.mask.tolist() == example().mask.tolist()
    assert combined.sample_sizes.tolist() == [2, 1]


# ---- combine_data


def test_combine(device):
    first, second = torch.tensor([1.0, 2.0], device=device), torch.tensor([3.0], device=device)
    batch = combine_data([first, second])
    assert batch.tensor.tolist() == [[1, 2], [3, 0]]
    assert (batch.sample_sizes.tolist(), batch.sample_sizes.dtype) == ([2, 1], torch.int64)
    assert batch.device == batch.sample_sizes.device == first.device
    assert batch.non_uniform_dim == 1
    assert combine_data((first, [second, [first]])).sample_sizes.tolist() == [2, 1, 2]


def test_combine_nested(device):
    a, b, c, d = (torch.rand(size, 3, device=device) for size in (1, 3, 0, 2))
    batch = combine_data([[a, b], [c, d]], flatten_batch_dims=False)
    assert batch.shape == (2, 2, 3, 3)
    assert batch.sample_sizes.tolist() == [[1, 3], [0, 2]]
    assert (batch.non_uniform_dim, batch.num_batch_dims) == (2, 2)
    for part, leaf in zip([part for row in batch.split() for part in row], (a, b, c, d), strict=True):
        assert torch.equal(part, leaf)
    assert not batch.tensor[~batch.mask].any()
    flat = combine_data([[a, b], [c, d]])
    assert torch.equal(flat.tensor, batch.tensor.flatten(0, 1))


@given(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    trailing=st.lists(st.integers(1, 3), max_size=2),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.int32, torch.bool, torch.complex64]),
)
def test_split_undoes_combine(sizes, trailing, dtype):
    leaves = [torch.randint(0, 2, (size, *trailing)).to(dtype) for size in sizes]
    for batch in combine_data(leaves), combine_data(leaves, flatten_batch_dims=False):
        assert batch.shape == (len(sizes), max(sizes), *trailing)
        assert batch.dtype == dtype
        for part, leaf in zip(batch.split(), leaves, strict=True):
            assert torch.equal(part, leaf)
        assert torch.equal(batch.mask.sum(-1), torch.tensor(sizes))
        assert not batch.tensor[~batch.mask].any()


def test_gradients_flow_to_every_leaf(device):
    leaves = [torch.rand(size, 2, device=device, dtype=torch.float64, requires_grad=True) for size in (2, 0, 3)]
    leaves.append(torch.rand(1, 2, device=device, dtype=torch.float32, requires_grad=True))
    weight = torch.rand(4, 3, 2, device=device, dtype=torch.float64)
    gradients = torch.autograd.grad((combine_data(leaves).tensor * weight).sum(), leaves)
    for gradient, leaf, expected in zip(gradients, leaves, weight, strict=True):
        assert gradient.dtype == leaf.dtype
        assert torch.equal(gradient, expected[: len(leaf)].to(leaf.dtype))


def test_the_first_leaf_with_elements_decides(device):
    leaves = [torch.zeros(0), torch.zeros(1, 0), torch.ones(2, 4, dtype=torch.int32), torch.full((1, 4), 2.7)]
    for flatten in (True, False):
        batch = combine_data(leaves, device=device, flatten_batch_dims=flatten)
        assert (batch.shape, batch.dtype, batch.device.type) == ((4, 2, 4), torch.int32, device)
        assert batch.sample_sizes.tolist() == [0, 0, 2, 1]
        assert batch.tensor[3].tolist() == [[2] * 4, [0] * 4]
        assert batch.sample_sizes.device == batch.mask.device == batch.device


def test_leaves_without_elements():
    for flatten in (True, False):
        batch = combine_data([torch.zeros(0, 4, dtype=torch.float64)] * 3, flatten_batch_dims=flatten)
        assert (batch.shape, batch.dtype, batch.sample_sizes.tolist()) == ((3, 0, 4), torch.float64, [0, 0, 0])
        assert combine_data([torch.zeros(1, 0), torch.zeros(0)], flatten_batch_dims=flatten).shape == (2, 1, 0)
    batch = combine_data([[], []], device="cpu")
    assert (batch.shape, batch.dtype, batch.sample_sizes.shape, batch.mask.shape) == (
        (0, 0),
        torch.float32,
        (0,),
        (0, 0),
    )


def test_the_result_is_new_memory():
    leaf = torch.ones(2, 3)
    batch = combine_data([leaf])
    batch.tensor.zero_()
    assert leaf.all()


def test_other_with_same_sample_sizes(device):
    boxes = combine_data([torch.rand(2, 4, device=device), torch.rand(1, 4, device=device)])
    labels = combine_data([torch.tensor([1, 2]), torch.tensor([3])], boxes, device)
    assert labels.mask is boxes.mask
    assert labels.sample_sizes is boxes.sample_sizes
    assert labels.tensor.tolist() == [[1, 2], [3, 0]]
    nested = combine_data([[torch.zeros(3)], [torch.zeros(1)]], flatten_batch_dims=False)
    scores = combine_data([[torch.ones(2)], [torch.ones(1)]], nested, flatten_batch_dims=False)
    assert scores.mask is nested.mask
    assert scores.tensor.tolist() == [[[1, 1, 0]], [[1, 0, 0]]]


def test_other_with_same_sample_sizes_of_another_shape():
    flat = combine_data([torch.zeros(2), torch.zeros(1)])
    nested = combine_data([[torch.zeros(2), torch.zeros(1)]], flatten_batch_dims=False)
    for leaves, other in ([2], flat), ([2, 1, 1], flat), ([3, 1], flat), ([1, 1], flat), ([2, 1], nested):
        with pytest.raises(AssertionError, match="expected"):
            combine_data([torch.zeros(n) for n in leaves], other)
    for leaves, other in ([[2], [1]], nested), ([[2, 1]], flat):
        with pytest.raises(AssertionError, match="expected"):
            combine_data([[torch.zeros(n) for n in row] for row in leaves], other, flatten_batch_dims=False)
    with pytest.raises(RuntimeError, match=r"at most 2 entries, .* got one of 3"):
        combine_data([[torch.zeros(3), torch.zeros(1)]], nested, flatten_batch_dims=False)
    with pytest.raises(TypeError, match="other_with_same_sample_sizes: expected a RaggedBatch or None, got Tensor"):
        combine_data([torch.zeros(3)], torch.zeros(1))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.zeros(2, 3), "data_list: expected a sequence of tensors, got Tensor"),
        ((torch.zeros(n) for n in (1, 2)), "data_list: expected a sequence of tensors, got generator"),
        (example(), "data_list: expected a sequence of tensors, got RaggedBatch"),
        (torch.zeros(2, 3).numpy(), "data_list: expected a sequence of tensors, got ndarray"),
        ("ab", "data_list: expected a sequence of tensors, got str"),
        ([], "data_list: expected a sequence of tensors, got an empty one"),
        ([1.0], r"data_list\[0\]: expected a torch.Tensor, got float"),
        ([torch.zeros(2), [torch.zeros(1), "ab"]], r"data_list\[1\]\[1\]: expected a torch.Tensor, got str"),
        ([torch.zeros(2), None], r"data_list\[1\]: expected a torch.Tensor, got NoneType"),
        ([example()], r"data_list\[0\]: expected a torch.Tensor, got RaggedBatch"),
    ],
)
@pytest.mark.parametrize("flatten", [True, False])
def test_data_that_cannot_be_combined(data, message, flatten):
    with pytest.raises(AssertionError, match=message):
        combine_data(data, flatten_batch_dims=flatten)


@pytest.mark.parametrize(
    "data",
    [
        [[torch.zeros(1)], [torch.zeros(1), torch.zeros(2)]],
        [torch.zeros(1), [torch.zeros(1)]],
        [[torch.zeros(1)], torch.zeros(1)],
        [[[torch.zeros(1)]], [[torch.zeros(1)], [torch.zeros(1)]]],
        [[], []],
        [[torch.zeros(1)], []],
    ],
)
def test_uneven_nesting(data):
    with pytest.raises(AssertionError, match=r"nested alike|empty list"):
        combine_data(data, flatten_batch_dims=False)


@pytest.mark.parametrize("flatten", [True, False])
def test_data_dimensions_that_disagree(flatten):
    for odd in torch.zeros(1, 1), torch.zeros(1, 3), torch.zeros(2), torch.zeros(1, 4, 1):
        with pytest.raises(
            InvalidStateError, match=r"data_list: expected tensors of shape \(n, 4\), got .* as number 1"
        ):
            combine_data([torch.zeros(2, 4), odd], flatten_batch_dims=flatten)
    with pytest.raises(IndexError, match=r"data_list\[1\]: expected a tensor with at least one dimension"):
        combine_data([torch.zeros(2), torch.tensor(1.0)], flatten_batch_dims=flatten)
