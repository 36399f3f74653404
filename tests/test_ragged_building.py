"""Building ragged batches: ``combine_data`` and the compact lists."""

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saccade.argument_checks import InvalidStateError
from saccade.ragged import RaggedBatch, combine_data, get_compact_from_named_tuple, get_compact_lists

EXAMPLE = RaggedBatch(torch.tensor([[5, 6, 0], [7, 8, 9]]), sample_sizes=torch.tensor([2, 3]))


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
        (EXAMPLE, "data_list: expected a sequence of tensors, got RaggedBatch"),
        (torch.zeros(2, 3).numpy(), "data_list: expected a sequence of tensors, got ndarray"),
        ("ab", "data_list: expected a sequence of tensors, got str"),
        ([], "data_list: expected a sequence of tensors, got an empty one"),
        ([1.0], r"data_list\[0\]: expected a torch.Tensor, got float"),
        ([torch.zeros(2), [torch.zeros(1), "ab"]], r"data_list\[1\]\[1\]: expected a torch.Tensor, got str"),
        ([torch.zeros(2), None], r"data_list\[1\]: expected a torch.Tensor, got NoneType"),
        ([EXAMPLE], r"data_list\[0\]: expected a torch.Tensor, got RaggedBatch"),
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
def test_data_dimensions_that_disagree(flatten, device):
    first = torch.zeros(2, 4, device=device)
    for odd in first[:1, :1], first[:1, :3], first[:, 0], first[:1, :, None]:
        with pytest.raises(
            InvalidStateError, match=r"data_list: expected tensors of shape \(n, 4\), got .* as number 1"
        ):
            combine_data([first, odd], flatten_batch_dims=flatten)
    with pytest.raises(IndexError, match=r"data_list\[1\]: expected a tensor with at least one dimension"):
        combine_data([torch.zeros(2), torch.tensor(1.0)], flatten_batch_dims=flatten)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tensors_on_the_cpu_are_combined_on_a_gpu():
    leaves = [torch.rand(size, 4) for size in (3, 0, 5)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch = combine_data(leaves, device="cuda")
        assert batch.mask.device.type == "cuda"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = combine_data(leaves)
    assert torch.equal(batch.tensor.cpu(), expected.tensor)
    assert batch.sample_sizes.tolist() == [3, 0, 5]
    leaf = torch.rand(2, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(combine_data([leaf, leaves[0]], device="cuda").tensor.sum(), leaf)
    assert gradient.tolist() == [[1] * 4] * 2
    mixed = combine_data([leaves[0].cuda(), leaves[2]], device="cpu")
    assert mixed.device.type == "cpu"
    assert torch.equal(mixed.tensor[1], leaves[2])


def test_gradcheck_of_combine_data():
    leaves = [torch.rand(size, 2, dtype=torch.float64, requires_grad=True) for size in (2, 3, 1)]
    assert torch.autograd.gradcheck(lambda *leaves: combine_data(leaves).tensor, leaves)


# ---- compact lists


def test_compact_lists(device):
    mask = torch.tensor([[0, 1, 1], [0, 0, 1]], device=device)
    data = torch.tensor([[0, 1, 2], [3, 4, 5]], device=device)
    boxes = torch.rand(2, 3, 4, device=device)
    for selecting in mask, mask.bool(), mask.float():
        numbers, text, compact_boxes, none, ragged = get_compact_lists(selecting, [data, "abc", boxes, None, EXAMPLE])
        assert numbers.tensor.tolist() == [[1, 2], [5, 0]]
        assert (numbers.sample_sizes.tolist(), numbers.sample_sizes.dtype) == ([2, 1], torch.int64)
        assert numbers.mask.tolist() == [[True, True], [True, False]]
        assert compact_boxes.tensor.tolist() == [boxes[0, 1:].tolist(), [boxes[1, 2].tolist(), [0] * 4]]
        assert compact_boxes.mask is numbers.mask
        assert compact_boxes.sample_sizes is numbers.sample_sizes
        assert (text, none, ragged) == ("abc", None, EXAMPLE)


def test_compact_lists_at_the_limits():
    mask = torch.tensor([[False, True], [False, False]])
    (batch,) = get_compact_lists(mask, [torch.tensor([[1, 2], [3, 4]])])
    assert (batch.tensor.tolist(), batch.sample_sizes.tolist()) == ([[2], [0]], [1, 0])
    (batch,) = get_compact_lists(torch.zeros(2, 2), [torch.ones(2, 2, 5)])
    assert batch.shape == (2, 0, 5)
    (batch,) = get_compact_lists(torch.zeros(0, 2), [torch.ones(0, 2, 5)])
    assert batch.shape == (0, 0, 5)
    assert get_compact_lists(mask, []) == []
    assert get_compact_lists(mask, ["a", 1]) == ["a", 1]


def test_gradients_of_compact_lists(device):
    data = torch.ones(2, 2, device=device, requires_grad=True)
    mask = torch.tensor([[False, True], [True, True]], device=device)
    (batch,) = get_compact_lists(mask, [data])
    incoming = torch.tensor([[2, float("nan")], [4, 5]], device=device)
    assert torch.autograd.grad(batch.tensor, data, incoming)[0].tolist() == [[0, 2], [4, 5]]


def test_compact_named_tuple():
    class Objects(NamedTuple):
        labels: Any
        source: str

    compact = get_compact_from_named_tuple(torch.tensor([[1, 0], [1, 1]]), Objects(torch.tensor([[1, 2], [3, 4]]), "a"))
    assert type(compact) is Objects
    assert (compact.labels.tensor.tolist(), compact.source) == ([[1, 0], [3, 4]], "a")


@given(
    batch=st.integers(0, 3),
    width=st.integers(0, 5),
    data_dims=st.lists(st.integers(0, 2), max_size=2),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.int32, torch.bool, torch.complex64, torch.uint16]),
    seed=st.integers(0, 1000),
)
def test_compact_lists_are_those_of_the_model(batch, width, data_dims, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, width, generator=generator) < 0.5
    data = torch.randint(0, 100, (batch, width, *data_dims), generator=generator).to(dtype)
    (compact,) = get_compact_lists(mask, (data,))
    rows = [[data[b, p] for p in range(width) if mask[b, p]] for b in range(batch)]
    assert compact.sample_sizes.tolist() == [len(row) for row in rows]
    assert compact.shape == (batch, max(map(len, rows), default=0), *data_dims)
    for row, entries in zip(rows, compact.tensor, strict=True):
        assert all(torch.equal(*pair) for pair in zip(row, entries, strict=False))
        assert not entries[len(row) :].any()


def test_compact_lists_of_other_shapes():
    mask = torch.ones(2, 3)
    for wrong in torch.zeros(2), torch.zeros(2, 2), torch.zeros(3, 2, 3):
        with pytest.raises(
            IndexError, match=r"data\[1\]: expected a shape that begins with that of mask, \(2, 3\), got"
        ):
            get_compact_lists(mask, [mask, wrong])
    with pytest.raises(IndexError, match=r"mask: expected 2 dimensions, got shape \(3,\)"):
        get_compact_lists(torch.ones(3), [mask])
    with pytest.raises(TypeError, match=r"mask: expected a torch.Tensor, got list"):
        get_compact_lists([[1]], [mask])  # pyright: ignore[reportArgumentType]
