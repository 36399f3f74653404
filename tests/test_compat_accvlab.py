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
    assert parameters(accvlab.combine_data) == [
        ("data_list", nothing),
        ("other_with_same_sample_sizes", None),
        ("device", None),
        ("flatten_batch_dims", True),
    ]


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
