"""``saccade.compat.accvlab``: the original's signatures."""

import inspect

import pytest
import torch

import saccade
from cases.gaussian_heatmap import make_batched, make_flat
from saccade.compat import accvlab


def parameters(function) -> list[tuple[str, object]]:
    return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]


def test_signatures():
    nothing = inspect.Parameter.empty
    numbers = [("diameter_to_sigma_factor", 6.0), ("k_scale", 1.0)]
    tensors = [(name, nothing) for name in ("heatmaps", "centers", "radii", "heatmap_idxes")]
    assert parameters(accvlab.draw_heatmap) == tensors + numbers
    tensors = [(name, nothing) for name in ("heatmap", "centers", "radii")]
    assert parameters(accvlab.draw_heatmap_batched) == [*tensors, *numbers, ("labels", None)]
    assert parameters(accvlab.RaggedBatch) == [
        ("tensor", nothing),
        ("mask", None),
        ("sample_sizes", None),
        ("non_uniform_dim", None),
    ]


HELPERS = {
    "apply_mask_to_tensor": ["data", "mask", "value_to_set"],
    "average_over_targets": ["data", "nans_to_zero"],
    "batched_bool_indexing": ["input_data", "input_mask"],
    "batched_bool_indexing_write": ["to_write", "output_mask", "to_write_into"],
    "batched_index_mapping": ["source_data", "source_indices", "target_indices", "target_data"],
    "batched_indexing_access": ["input_data", "input_indices", "filler_value", "dim_to_index_in"],
    "batched_indexing_write": ["to_write", "output_indices", "to_write_into", "dim_to_index_in"],
    "batched_inverse_indexing_access": [
        "input_data",
        "output_indices",
        "output_num_targets",
        "filler_value",
        "dim_to_index_in",
    ],
    "combine_data": ["data_list", "other_with_same_sample_sizes", "device", "flatten_batch_dims"],
    "get_compact_from_named_tuple": ["mask", "data"],
    "get_compact_lists": ["mask", "data"],
    "get_indices_from_mask": ["mask"],
    "get_mask_from_indices": ["mask_num_targets", "indices"],
    "squeeze_except_batch_and_sample": ["data"],
    "sum_over_targets": ["data"],
}
DEFAULTS = {
    "value_to_set": 0.0,
    "nans_to_zero": True,
    "filler_value": 0.0,
    "dim_to_index_in": None,
    "other_with_same_sample_sizes": None,
    "device": None,
    "flatten_batch_dims": True,
}


def test_batching_helpers():
    assert set(accvlab.__all__) == {*HELPERS, "RaggedBatch", "draw_heatmap", "draw_heatmap_batched"}
    assert len(HELPERS) == 15
    for name, names in HELPERS.items():
        function = getattr(accvlab, name)
        assert function is getattr(saccade.ragged, name)
        assert parameters(function) == [(p, DEFAULTS.get(p, inspect.Parameter.empty)) for p in names]


def test_methods_of_ragged_batches():
    for name, names in {
        "FromOversizeTensor": ["tensor", "mask", "sample_sizes", "non_uniform_dim"],
        "FromFullTensor": ["full_tensor", "non_uniform_dim", "num_batch_dims"],
        "Empty": ["num_dims", "non_uniform_dim", "device", "num_batch_dims", "batch_shape"],
        "create_with_sample_sizes_like_self": ["self", "tensor", "non_uniform_dim", "device"],
        "get_non_uniform_dimension_transposed_to": ["self", "dim"],
        "unsqueeze_data_dim": ["self", "dim"],
        "apply": ["self", "proc_step"],
        "set_tensor": ["self", "tensor"],
        "get_existence_weights": ["self", "dtype"],
        "with_padded_set_to": ["self", "value_to_set"],
        "set_padded_to": ["self", "value_to_set"],
        "repeat_samples": ["self", "num_repeats", "batch_dim"],
        "unsqueeze_batch_dim": ["self", "dim"],
        "squeeze_batch_dim": ["self", "batch_dim"],
        "reshape_batch_dims": ["self", "new_batch_shape"],
        "broadcast_batch_dims_to_shape": ["self", "new_batch_shape"],
        "broadcast_batch_dims": ["data"],
        "to_device": ["self", "device"],
        "to_dtype": ["self", "dtype"],
    }.items():
        assert [parameter for parameter, _ in parameters(getattr(accvlab.RaggedBatch, name))] == names


def test_draw_heatmap(device):
    heatmaps, centers, radii, indices = (value.to(device) for value in make_flat(dtype=torch.int32))
    expected = heatmaps.clone()
    saccade.draw_heatmap(expected, centers, radii, indices, 4.0, 0.5)
    assert accvlab.draw_heatmap(heatmaps, centers, radii, indices, 4.0, 0.5) is None
    assert torch.equal(heatmaps, expected)


def test_draw_heatmap_batched_with_labels_in_sixth_place(device):
    inputs = make_batched(classes=4, dtype=torch.int32)
    heatmap, centers, radii, sizes, labels = (value.to(device) for value in inputs if value is not None)
    expected = heatmap.clone()
    saccade.draw_heatmap_batched(expected, centers, radii, 6.0, 0.8, labels, counts=sizes)
    centers, radii, labels = (accvlab.RaggedBatch(value, sample_sizes=sizes) for value in (centers, radii, labels))
    assert accvlab.draw_heatmap_batched(heatmap, centers, radii, 6.0, 0.8, labels) is None
    assert torch.equal(heatmap, expected)


def test_draw_heatmap_batched_without_labels(device):
    heatmap = torch.zeros(2, 3, 3, device=device)
    centers = accvlab.combine_data([torch.tensor([[1, 1]]), torch.zeros(0, 2, dtype=torch.int64)], device=device)
    radii = accvlab.combine_data([torch.tensor([0]), torch.zeros(0, dtype=torch.int64)], centers, device)
    accvlab.draw_heatmap_batched(heatmap, centers, radii)
    assert heatmap.nonzero().tolist() == [[0, 1, 1]]


def test_tensors_in_the_place_of_ragged_batches():
    zeros = torch.zeros(1, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="counts: expected"):
        accvlab.draw_heatmap_batched(torch.zeros(1, 3, 3), torch.zeros(1, 2, 2, dtype=torch.int32), zeros)
