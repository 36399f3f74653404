"""Ragged batches as nodes of PyTorch's trees, in compiled and in exported programs."""

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.utils import _pytree as pytree

from saccade import ragged
from saccade.ragged import RaggedBatch, combine_data


def example(device="cpu", dtype=torch.int64) -> RaggedBatch:
    return RaggedBatch(
        torch.tensor([[5, 6, 0], [7, 8, 9]], device=device, dtype=dtype),
        sample_sizes=torch.tensor([2, 3], device=device),
    )


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True)


# ---- trees


def test_leaves():
    batch = example()
    leaves, structure = pytree.tree_flatten({"batch": batch})
    assert leaves[0] is batch.tensor
    assert leaves[1] is batch.mask
    assert leaves[2] is batch.sample_sizes
    assert len(leaves) == 3
    from_mask = RaggedBatch(batch.tensor, batch.mask)
    assert pytree.tree_structure({"batch": from_mask}) == structure  # whatever was given
    again = pytree.tree_unflatten(leaves, structure)["batch"]
    assert again.tensor is batch.tensor
    assert again.sample_sizes is batch.sample_sizes
    assert (again.num_batch_dims, again.non_uniform_dim, again.total_num_entries) == (1, 1, 5)
    paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(batch)[0]]
    assert paths == [".tensor", ".mask", ".sample_sizes"]
    assert pytree.treespec_loads(pytree.treespec_dumps(structure)) == structure


def test_leaves_may_be_anything():
    batch = RaggedBatch(torch.zeros(2, 4, 3), sample_sizes=torch.tensor([1, 3]), non_uniform_dim=2)
    shapes = pytree.tree_map(lambda leaf: leaf.shape, batch)
    assert pytree.tree_leaves(shapes, is_leaf=lambda leaf: type(leaf) is torch.Size) == [(2, 4, 3), (2, 3), (2,)]
    moved = pytree.tree_map(lambda leaf: leaf.to("meta"), batch)
    assert moved.device.type == moved.mask.device.type == moved.sample_sizes.device.type == "meta"
    assert moved.non_uniform_dim == 2


def test_function_transforms():
    batch = example(dtype=torch.float64)
    gradient = torch.func.grad(
        lambda tensor: (batch.create_with_sample_sizes_like_self(tensor).with_padded_set_to(0).tensor ** 2).sum()
    )
    assert gradient(batch.tensor).tolist() == [[10, 12, 0], [14, 16, 18]]


# ---- compiled programs


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

    total, sizes, floats, combined = compiled(step)(example(device), torch.rand(2, 3, device=device))
    assert (total, sizes.tolist()) == (38, [2, 3])
    assert floats.dtype == torch.float32
    assert floats.mask.tolist() == example().mask.tolist()
    assert combined.sample_sizes.tolist() == [2, 1]


def indices(values: Tensor) -> RaggedBatch:
    return RaggedBatch(values, sample_sizes=torch.tensor([2, 1], device=values.device))


FUNCTIONS = {
    "batched_indexing_access": lambda data, index: ragged.batched_indexing_access(data, index, 3).tensor,
    "batched_inverse_indexing_access": lambda data, index: ragged.batched_inverse_indexing_access(data, index, 4, 3),
    "batched_indexing_write": lambda data, index: ragged.batched_indexing_write(data[:, :2] * 2, index, data),
    "batched_index_mapping": lambda data, index: ragged.batched_index_mapping(data * 2, index, index, data),
    "get_mask_from_indices": lambda data, index: ragged.get_mask_from_indices(3, index) * data[..., 0],
    "batched_bool_indexing_write": lambda data, index: ragged.batched_bool_indexing_write(
        index.create_with_sample_sizes_like_self(data[:, :2] * 2),
        torch.arange(3, device=data.device) < index.sample_sizes[:, None],
        data,
    ),
    "sum_over_targets": lambda data, index: ragged.sum_over_targets(RaggedBatch(data[:, :2], index.mask)),
    "average_over_targets": lambda data, index: ragged.average_over_targets(RaggedBatch(data[:, :2], index.mask)),
    "apply_mask_to_tensor": lambda data, index: ragged.apply_mask_to_tensor(data[:, :2], index.mask, 3),
    "squeeze_except_batch_and_sample": lambda data, index: ragged.squeeze_except_batch_and_sample(data[..., None]),
    "combine_data": lambda data, index: combine_data([data[0], data[1, :1]]).tensor,
    "apply": lambda data, index: RaggedBatch(data[:, :2], index.mask).apply(times_mask).tensor,
    "apply-nested": lambda data, index: (
        RaggedBatch(data[:, :2], index.mask).apply(lambda t, m: times_mask(t, m)).tensor
    ),
    "set_padded_to": lambda data, index: fill(RaggedBatch(data[:, :2] * 2, index.mask)),
    "batch_dims": lambda data, index: batch_dims(RaggedBatch(data[:, :2], index.mask)),
}


def times_mask(tensor: Tensor, mask: Tensor) -> Tensor:
    return tensor * mask[..., None]


def fill(batch: RaggedBatch) -> Tensor:
    batch.set_padded_to(3)
    return batch.tensor


def batch_dims(batch: RaggedBatch) -> Tensor:
    nested = batch.repeat_samples(3).reshape_batch_dims((3, -1)).unsqueeze_batch_dim(1).squeeze_batch_dim(1)
    transposed = nested.flatten_batch_dims().get_non_uniform_dimension_transposed_to(2).unsqueeze_data_dim(1)
    return transposed.tensor * transposed.get_existence_weights() + transposed.sample_sizes.sum()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_functions(device, name):
    """With their gradients, and for other sizes without being compiled for each."""
    if name == "apply-nested" and torch.__version__.startswith("2.9."):
        pytest.skip("torch.compile in PyTorch 2.9 does not tell the parameters of a function that it makes")
    function = FUNCTIONS[name]
    run = compiled(function)
    for batch_of_rows in 2, 3, 4:
        data = torch.randn(2, 3, batch_of_rows, device=device, requires_grad=True)
        index = indices(torch.tensor([[1, -1], [0, 0]], device=device))
        expected, result = function(data, index), run(data, index)
        assert torch.equal(result, expected)
        gradients = [torch.autograd.grad(value.float().square().sum(), data)[0] for value in (expected, result)]
        assert torch.equal(*gradients)


def test_compiled_code_is_not_made_again_for_each_number_of_entries():
    batches = [RaggedBatch(torch.rand(2, 4), sample_sizes=torch.tensor(sizes)) for sizes in ([1, 2], [3, 4], [0, 1])]
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    run = torch.compile(lambda batch: batch.to(torch.float64), backend=counter, fullgraph=True)
    for batch in batches:
        assert batch.total_num_entries == batch.sample_sizes.sum()  # which is kept in the batch
        assert run(batch).dtype == torch.float64
    assert counter.frame_count == 1


def test_an_index_out_of_range_is_skipped_in_compiled_code(device):
    """Where nothing can raise; and it touches no memory of other samples."""
    index = indices(torch.tensor([[1, 3], [-4, 0]], device=device))
    data = torch.tensor([[1.0, 2, 3], [4, 5, 6]], device=device)
    for function, expected in (
        (lambda: ragged.batched_indexing_access(data, index, 7).tensor, [[2, 7], [7, 7]]),
        (lambda: ragged.batched_inverse_indexing_access(data, index, 3, 7), [[7, 1, 7], [7, 7, 7]]),
        (lambda: ragged.batched_indexing_write(data * 10, index, data), [[1, 10, 3], [4, 5, 6]]),
        (lambda: ragged.batched_index_mapping(data * 10, index, index, data), [[1, 20, 3], [4, 5, 6]]),
        (lambda: ragged.get_mask_from_indices(3, index), [[False, True, False], [False] * 3]),
    ):
        assert compiled(function)().tolist() == expected
        if device == "cpu":
            with pytest.raises(IndexError, match="expected indices in"):
                function()


@pytest.mark.parametrize("sizes", [[2, 0], [0, 1], [2, 2]])
def test_entries_for_which_there_is_no_place_are_skipped_in_compiled_code(device, sizes):
    """And places for which there is no entry stay as they are; nothing crosses from one sample to another."""
    data = torch.tensor([[1, 2, 3], [4, 5, 6]], device=device)
    mask = torch.tensor([[True, False, False], [True, False, True]], device=device)
    entries = RaggedBatch(data[:, :2] * 10, sample_sizes=torch.tensor(sizes, device=device))
    result = compiled(ragged.batched_bool_indexing_write)(entries, mask, data)
    expected = [[10 if sizes[0] else 1, 2, 3], [40 if sizes[1] else 4, 5, 50 if sizes[1] == 2 else 6]]
    assert result.tolist() == expected  # pyright: ignore[reportAttributeAccessIssue]


def test_samples_that_do_not_lie_in_the_values_touch_no_other_memory_in_compiled_code(device):
    values = torch.tensor([1, 2, 3], device=device)
    for lengths in [2, 5], [2, 2**40]:
        sizes = torch.tensor(lengths, device=device)
        batch = compiled(lambda sizes: ragged.from_values(values, lengths=sizes, max_sample_size=4))(sizes)
        assert batch.tensor[0].tolist() == [1, 2, 0, 0]
        assert set(batch.tensor[1].tolist()) <= {1, 2, 3}
        assert batch.sample_sizes.tolist() == [2, 4]


DATA_DEPENDENT = {
    "batched_bool_indexing": lambda data, mask: ragged.batched_bool_indexing(data, mask).tensor,
    "get_indices_from_mask": lambda data, mask: ragged.get_indices_from_mask(mask).tensor,
    "get_compact_lists": lambda data, mask: ragged.get_compact_lists(mask, [data])[0].tensor,
    "from_values": lambda data, mask: ragged.from_values(data.flatten(), lengths=mask.sum(-1)).tensor,
}


@pytest.mark.parametrize("name", DATA_DEPENDENT)
def test_compiled_functions_whose_shape_depends_on_the_data(device, name):
    function = DATA_DEPENDENT[name]
    data, mask = torch.rand(3, 4, device=device), torch.rand(3, 4, device=device) < 0.5
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        result = compiled(function)(data, mask)
    assert torch.equal(result, function(data, mask))


# ---- exported programs


class Selection(torch.nn.Module):
    def forward(self, batch: RaggedBatch, index: RaggedBatch) -> dict[str, RaggedBatch]:
        return {"selected": ragged.batched_indexing_access(batch.with_padded_set_to(0), index, -1)}


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict):
    torch._dynamo.reset()
    batch, index = example(), RaggedBatch(torch.tensor([[2, 9], [-1, 0]]), sample_sizes=torch.tensor([1, 2]))
    program = torch.export.export(Selection(), (batch, index), strict=strict)
    batch.mask  # computed by now or not, it is the same program  # noqa: B018
    result = program.module()(batch, index)["selected"]
    assert isinstance(result, RaggedBatch)
    assert result.tensor.tolist() == [[0, -1], [9, 7]]
    assert result.sample_sizes.tolist() == [1, 2]


def test_export_for_any_width(tmp_path):
    width = torch.export.Dim("width", min=2, max=100)
    batch = RaggedBatch(torch.rand(2, 3, 4), sample_sizes=torch.tensor([1, 3]))

    class Mean(torch.nn.Module):
        def forward(self, batch: RaggedBatch) -> Tensor:
            return ragged.average_over_targets(batch)

    program = torch.export.export(Mean(), (batch,), dynamic_shapes=([{1: width}, {1: width}, None],))
    wider = RaggedBatch(torch.rand(2, 7, 4), sample_sizes=torch.tensor([6, 0]))
    assert torch.allclose(program.module()(wider), ragged.average_over_targets(wider))
    path = tmp_path / "mean.pt2"
    torch.export.save(program, path)
    assert torch.allclose(torch.export.load(path).module()(wider), ragged.average_over_targets(wider))


@pytest.mark.parametrize("fillers", [(0.5, 1.5, 2.5), (1, 2, 3)])
def test_fillers_may_vary_in_compiled_code(fillers, device):
    data = torch.arange(6, dtype=torch.float32, device=device).view(1, 6)
    indices = RaggedBatch(torch.tensor([[4, 9]], device=device), sample_sizes=torch.tensor([1], device=device))
    access = compiled(lambda data, indices, filler: ragged.batched_indexing_access(data, indices, filler).tensor)
    for filler in fillers:
        assert access(data, indices, filler).tolist() == [[4, filler]]
