"""SparseDrive's own usage, with nothing but the import lines changed."""

import pytest
import torch

import saccade
from saccade.compat.sparsedrive import (
    CUDA_EXT_AVAILABLE,
    DAF_AVAILABLE,
    FOCAL_LOSS_AVAILABLE,
    DeformableAggregationFunction,
    DeformableFeatureAggregation,
    FocalLoss,
    deformable_aggregation_function,
    feature_maps_format,
    sigmoid_focal_loss,
)

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [-3.0, 0.0, 1.0], [0.25, -0.75, 4.0]])


def test_everything_is_available():
    assert DAF_AVAILABLE is True
    assert FOCAL_LOSS_AVAILABLE is True
    assert CUDA_EXT_AVAILABLE is True


def test_format_and_aggregate(device):
    maps = [torch.rand(2, 6, 16, 8 // s, 12 // s, device=device) for s in (1, 2, 4)]
    feature_maps, spatial_shape, scale_start_index = feature_maps_format(maps)
    location = torch.rand(2, 10, 5, 6, 2, device=device)
    weights = torch.rand(2, 10, 5, 6, 3, 4, device=device)
    result = deformable_aggregation_function(
        feature_maps=feature_maps,
        spatial_shape=spatial_shape,
        scale_start_index=scale_start_index,
        sampling_location=location,
        weights=weights,
    )
    assert result.shape == (2, 10, 16)
    positional = (feature_maps, spatial_shape, scale_start_index, location, weights)
    assert torch.equal(result, saccade.deformable_aggregation(*positional))
    assert torch.equal(result, DeformableAggregationFunction.apply(*positional))
    (again,) = feature_maps_format([feature_maps, spatial_shape, scale_start_index], inverse=True)
    assert all(torch.equal(left, right) for left, right in zip(again, maps, strict=True))


def test_aggregation_of_any_dtype_gives_float32(device):
    maps = [torch.rand(1, 2, 4, 8, 8, device=device, dtype=torch.float16, requires_grad=True)]
    feature_maps, *index = feature_maps_format(maps)
    location = torch.rand(1, 3, 2, 2, 2, device=device, dtype=torch.float64)
    weights = torch.rand(1, 3, 2, 2, 1, 2, device=device, dtype=torch.bfloat16)
    with torch.autocast(device, torch.bfloat16):
        result = deformable_aggregation_function(feature_maps, *index, location, weights)
    assert result.dtype == torch.float32
    result.sum().backward()
    assert maps[0].grad is not None
    assert maps[0].grad.dtype == torch.float16


def test_module(device):
    module = DeformableFeatureAggregation(
        embed_dims=32,
        num_groups=4,
        num_levels=2,
        num_cams=2,
        use_deformable_func=True,
        kps_generator=dict(type="SparseBox3DKeyPointsGenerator", num_learnable_pts=2),
    ).to(device)
    maps = feature_maps_format([torch.rand(1, 2, 32, 8 // s, 8 // s, device=device) for s in (1, 2)])
    feature, anchor = torch.rand(2, 1, 7, 32, device=device), torch.rand(1, 7, 11, device=device)
    metas = {"projection_mat": torch.eye(4, device=device).expand(1, 2, 4, 4), "img_metas": "ignored"}
    assert module(feature[0], anchor, feature[1], maps, metas, verbose=True).shape == (1, 7, 32)


def test_focal_loss(device):
    criterion = FocalLoss(use_sigmoid=True, gamma=2.0, alpha=0.25, reduction="mean", loss_weight=1.0)
    pred, target = LOGITS.to(device), torch.tensor([0, 3, 2], device=device)
    assert criterion(pred, target).item() == pytest.approx(0.1313990234)  # the mean over all elements
    assert criterion(pred, target, avg_factor=0.5).item() == pytest.approx(1.1825912104 / 0.5)
    # Plain division: adding an epsilon, as later mmdet does, would show at a factor this small.
    assert criterion(pred, target, avg_factor=1e-6).item() == pytest.approx(1.1825912104e6, rel=1e-6)
    assert criterion(pred.half(), target).dtype == torch.float16


def test_focal_loss_as_the_heads_call_it(device):
    criterion = FocalLoss(loss_weight=2.0)
    pred = LOGITS.to(device).requires_grad_()
    with_negatives = criterion(
        pred, torch.tensor([0, -3, 2], device=device), avg_factor=torch.tensor([2.0], device=device)
    )
    assert with_negatives.shape == (1,)
    assert with_negatives.item() == pytest.approx(1.1825912104)
    masked = criterion(pred, torch.tensor([0, 3, 2], device=device), torch.tensor([True, False, True], device=device))
    rows_0_and_2 = 0.00045089 + 0.01699354 + 0.28305870 + 0.19577392 + 0.02986440 + 0.00000147
    assert masked.item() == pytest.approx(2 * rows_0_and_2 / 9, rel=1e-5)  # rows of weight zero count in the mean


def test_mmcv_function(device):
    pred, target = LOGITS.to(device), torch.tensor([0, 3, 2], device=device)
    assert sigmoid_focal_loss(pred, target).item() == pytest.approx(0.3941970701)  # the mean over rows
    assert sigmoid_focal_loss(pred, target, 2.0, 0.25, None, "none").shape == (3, 3)
    class_weight = torch.tensor([0.5, 2, 1.5], device=device)
    total = sigmoid_focal_loss(pred, torch.tensor([0, 1, 2], device=device), 2.0, 0.25, class_weight, "sum")
    assert total.item() == pytest.approx(1.6283210292)
    assert sigmoid_focal_loss(pred.half(), target).dtype == torch.float16
    torch._dynamo.reset()
    compiled = torch.compile(sigmoid_focal_loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(pred, target), sigmoid_focal_loss(pred, target))
    with pytest.raises(TypeError):
        sigmoid_focal_loss(pred, target, gamma=2.0)  # positional only, as the original
