"""``DeformableFeatureAggregation`` and the key-point generators: checkpoint layout, values by hand, errors."""

import math

import pytest
import torch

import saccade
from saccade.nn import DeformableFeatureAggregation, SparseBox3DKeyPointsGenerator, SparsePoint3DKeyPointsGenerator

FIXED = [[0, 0, 0], [0.45, 0, 0], [-0.45, 0, 0], [0, 0.45, 0], [0, -0.45, 0], [0, 0, 0.45], [0, 0, -0.45]]
DETECTION = dict(
    num_groups=8,
    attn_drop=0.15,
    use_camera_embed=True,
    use_deformable_func=True,
    residual_mode="cat",
    kps_generator=dict(type="SparseBox3DKeyPointsGenerator", num_learnable_pts=6, fix_scale=FIXED),
)
MAP = dict(
    DETECTION,
    kps_generator=dict(
        type="SparsePoint3DKeyPointsGenerator",
        num_sample=20,
        num_learnable_pts=3,
        fix_height=(0, 0.5, -0.5, 1, -1),
        ground_height=-1.84023,
    ),
)
CAMERA_ENCODER = {f"camera_encoder.{i}.{kind}" for i in (0, 2, 3, 5) for kind in ("weight", "bias")}
SHARED_KEYS = CAMERA_ENCODER | {
    f"{part}.{kind}"
    for part in ("output_proj", "weights_fc", "kps_generator.learnable_fc")
    for kind in ("weight", "bias")
}


def test_checkpoint_of_the_detection_head():
    module = DeformableFeatureAggregation(**DETECTION)
    state = module.state_dict()
    assert set(state) == SHARED_KEYS | {"kps_generator.fix_scale"}
    assert sum(value.numel() for value in state.values()) == 247_495
    assert state["weights_fc.weight"].shape == (416, 256)
    assert state["kps_generator.learnable_fc.weight"].shape == (18, 256)
    assert state["kps_generator.fix_scale"].dtype == torch.float32
    assert not module.kps_generator.fix_scale.requires_grad
    torch.testing.assert_close(state["kps_generator.fix_scale"], torch.tensor(FIXED))


def test_checkpoint_of_the_map_head():
    state = DeformableFeatureAggregation(**MAP).state_dict()
    assert set(state) == SHARED_KEYS
    assert sum(value.numel() for value in state.values()) == 2_757_336
    assert state["weights_fc.weight"].shape == (9600, 256)


def test_checkpoint_without_camera_embedding():
    module = DeformableFeatureAggregation(**dict(DETECTION, use_camera_embed=False))
    assert module.camera_encoder is None
    assert module.weights_fc.weight.shape == (2496, 256)
    assert set(module.state_dict()) == SHARED_KEYS - CAMERA_ENCODER | {"kps_generator.fix_scale"}


def test_a_checkpoint_wins_over_the_configured_fixed_points():
    module = DeformableFeatureAggregation(**DETECTION)
    state = module.state_dict()
    state["kps_generator.fix_scale"] = torch.rand(7, 3)
    module.load_state_dict(state)
    torch.testing.assert_close(module.kps_generator.fix_scale.data, state["kps_generator.fix_scale"])


def test_the_config_dict_is_left_alone():
    config = dict(type="SparseBox3DKeyPointsGenerator", num_learnable_pts=1)
    DeformableFeatureAggregation(embed_dims=32, kps_generator=config)
    assert config == dict(type="SparseBox3DKeyPointsGenerator", num_learnable_pts=1)


def camera_metas(batch: int, device: str) -> dict[str, torch.Tensor]:
    """Two cameras of 100 x 50 pixels with focal length 50, looking along +x and -x from the origin; z is up."""
    intrinsics = torch.tensor([[50.0, 0, 50], [0, 50, 25], [0, 0, 1]])
    forward = torch.tensor([[0.0, -1, 0], [0, 0, -1], [1, 0, 0]])
    backward = torch.tensor([[0.0, 1, 0], [0, 0, -1], [-1, 0, 0]])
    matrices = torch.eye(4).repeat(2, 1, 1)
    matrices[0, :3, :3], matrices[1, :3, :3] = intrinsics @ forward, intrinsics @ backward
    return {
        "projection_mat": matrices.expand(batch, -1, -1, -1).contiguous().to(device),
        "image_wh": torch.tensor([100.0, 50.0]).expand(batch, 2, 2).to(device),
    }


def test_projection_by_hand(device):
    points = torch.tensor([[10.0, 2.0, -1.0], [-10.0, 0.0, 0.0]], device=device).reshape(1, 1, 2, 3)
    metas = camera_metas(1, device)
    pixels = DeformableFeatureAggregation.project_points(points, metas["projection_mat"])
    assert pixels.shape == (1, 2, 1, 2, 2)
    # 10 m ahead and 2 m to the left: 2 / 10 * 50 pixels left of the middle, and 1 / 10 * 50 below it.
    torch.testing.assert_close(pixels[0, 0, 0, 0].cpu(), torch.tensor([40.0, 30.0]))
    torch.testing.assert_close(pixels[0, 1, 0, 1].cpu(), torch.tensor([50.0, 25.0]))
    fractions = DeformableFeatureAggregation.project_points(points, **metas)
    torch.testing.assert_close(fractions[0, 0, 0, 0].cpu(), torch.tensor([0.4, 0.6]))
    assert not ((fractions[0, 1, 0, 0] > 0) & (fractions[0, 1, 0, 0] < 1)).all(), "a point behind the camera is seen"


def test_geometry_stays_in_float32_under_autocast(device):
    """Half precision would move anchors by decimetres, without a trace in the dtype."""
    rng = torch.Generator().manual_seed(0)
    anchor = (torch.randn(2, 5, 11, generator=rng) * 30).to(device)
    anchor[..., 3:6] = 0
    points = torch.randn(2, 5, 8, generator=rng).to(device) * 30
    matrix = torch.randn(2, 4, 4, generator=rng).to(device)
    now, before = torch.ones(2, device=device), torch.zeros(2, device=device)
    box = SparseBox3DKeyPointsGenerator(fix_scale=FIXED).to(device)
    polyline = SparsePoint3DKeyPointsGenerator(num_sample=4, num_learnable_pts=1).to(device)

    def moved():
        return [
            box(anchor, None, [matrix], now, [before])[1][0],
            *box.anchor_projection(anchor, [matrix], now, [before]),
            *polyline.anchor_projection(points, [matrix]),
        ]

    expected = moved()
    with torch.autocast(device, torch.bfloat16):
        actual = moved()
    assert all(torch.equal(left, right) for left, right in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_grid_sample_path_samples_half_precision_maps_where_it_should(device, dtype):
    feature_map = torch.rand(1, 2, 4, 64, 176, device=device).to(dtype)
    points = torch.tensor([12.0, 0, 0], device=device) + torch.rand(1, 50, 3, 3, device=device)
    metas = camera_metas(1, device)
    sampled = DeformableFeatureAggregation.feature_sampling([feature_map], points, **metas)
    exact = DeformableFeatureAggregation.feature_sampling([feature_map.double()], points.double(), **metas)
    assert sampled.dtype == dtype
    assert (sampled.double() - exact).abs().max() < 0.01


def test_heights_can_be_filled_after_creation_on_the_meta_device():
    with torch.device("meta"):
        generator = SparsePoint3DKeyPointsGenerator(
            4, num_sample=2, num_learnable_pts=1, fix_height=(0, 1), ground_height=-2
        )
    generator.to_empty(device="cpu").init_weight()
    assert generator.heights.tolist() == [-2, -1]


def test_projection_stays_in_float32_under_autocast(device):
    points, metas = torch.rand(1, 3, 2, 3, device=device) + 5, camera_metas(1, device)
    expected = DeformableFeatureAggregation.project_points(points, **metas)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(DeformableFeatureAggregation.project_points(points, **metas), expected)


def small_module(**changes) -> DeformableFeatureAggregation:
    arguments = dict(
        embed_dims=16,
        num_groups=4,
        num_levels=2,
        num_cams=2,
        use_camera_embed=True,
        kps_generator=dict(type="SparseBox3DKeyPointsGenerator", num_learnable_pts=2, fix_scale=[[0, 0, 0]]),
    )
    torch.manual_seed(0)
    module = DeformableFeatureAggregation(**(arguments | changes))
    torch.nn.init.normal_(module.weights_fc.weight)  # attention weights that differ
    return module


def small_inputs(device: str, batch: int = 2, anchors: int = 5):
    rng = torch.Generator().manual_seed(1)
    anchor = torch.zeros(batch, anchors, 11)
    anchor[..., 0] = 12  # well inside the first camera's image, far from its border
    anchor[..., 1:3] = torch.rand(batch, anchors, 2, generator=rng)
    anchor[..., 7] = 1
    feature, embed = torch.randn(2, batch, anchors, 16, generator=rng)
    maps = [torch.randn(batch, 2, 16, *size, generator=rng).to(device) for size in ((10, 20), (5, 10))]
    return feature.to(device), anchor.to(device), embed.to(device), maps


@pytest.mark.parametrize("camera_embed", [True, False])
def test_operator_and_grid_sample_agree_inside_the_images(device, camera_embed):
    feature, anchor, embed, maps = small_inputs(device)
    module = small_module(use_camera_embed=camera_embed).to(device)
    expected = module(feature, anchor, embed, maps, camera_metas(2, device))
    module.use_deformable_func = True
    actual = module(feature, anchor, embed, saccade.feature_maps_format(maps), camera_metas(2, device))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert (actual - feature).abs().max() > 0.01, "nothing was sampled"


def test_attention_weights_sum_to_one_in_each_group(device):
    feature, _, embed, _ = small_inputs(device)
    weights = small_module().to(device)._get_weights(feature, embed, camera_metas(2, device))
    assert weights.shape == (2, 5, 2, 2, 3, 4)
    torch.testing.assert_close(weights.sum((2, 3, 4)), torch.ones(2, 5, 4, device=device))


def test_attention_dropout_is_shared_by_levels_and_groups(device):
    feature, _, embed, _ = small_inputs(device)
    module = small_module(attn_drop=0.5).to(device)
    kept = module.eval()._get_weights(feature, embed, camera_metas(2, device))
    dropped = module.train()._get_weights(feature, embed, camera_metas(2, device))
    ratio = (dropped / kept).detach()
    assert set(ratio.round().unique().tolist()) == {0.0, 2.0}
    torch.testing.assert_close(ratio, ratio[:, :, :, :1, :, :1].expand_as(ratio))


def test_residual_modes(device):
    feature, anchor, embed, maps = small_inputs(device)
    metas = camera_metas(2, device)
    plain = small_module(residual_mode=None).to(device)(feature, anchor, embed, maps, metas)
    torch.testing.assert_close(small_module().to(device)(feature, anchor, embed, maps, metas), plain + feature)
    cat = small_module(residual_mode="cat").to(device)(feature, anchor, embed, maps, metas)
    torch.testing.assert_close(cat, torch.cat([plain, feature], -1))


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_trains_under_autocast(device, amp):
    feature, anchor, embed, maps = small_inputs(device)
    module = small_module(use_deformable_func=True, attn_drop=0.1).to(device)
    maps = [feature_map.requires_grad_() for feature_map in maps]
    with torch.autocast(device, amp):
        output = module(feature, anchor, embed, saccade.feature_maps_format(maps), camera_metas(2, device))
    output.float().square().mean().backward()
    assert all(feature_map.grad.isfinite().all() and feature_map.grad.any() for feature_map in maps)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters() if p.requires_grad)


def test_compiles_without_a_graph_break(device):
    feature, anchor, embed, maps = small_inputs(device)
    module = small_module(use_deformable_func=True).to(device)

    def step(*maps):
        return module(feature, anchor, embed, saccade.feature_maps_format(maps), camera_metas(2, device))

    torch._dynamo.reset()
    metas = camera_metas(2, device)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(feature, anchor, embed, saccade.feature_maps_format(maps), metas), step(*maps))


def test_box_key_points_by_hand(device):
    generator = SparseBox3DKeyPointsGenerator(fix_scale=[[0.45, 0, 0], [0, 0.5, 0.5]]).to(device)
    # w = 2, l = 4, h = 6, yaw 90 degrees: x turns into y, y into -x.
    anchor = torch.tensor([1.0, 2, 3, math.log(2), math.log(4), math.log(6), 1, 0, 0, 0, 0], device=device)
    expected = torch.tensor([[1.0, 2.9, 3.0], [-1.0, 2.0, 6.0]])
    torch.testing.assert_close(generator(anchor.view(1, 1, 11))[0, 0].cpu(), expected)


def test_box_key_points_golden():
    generator = SparseBox3DKeyPointsGenerator(fix_scale=[[0.45, 0, 0]])
    anchor = torch.tensor([[[1.0, 2, 3, 0, 0, 0, 1, 0, 0, 0, 0]]])
    torch.testing.assert_close(generator(anchor), torch.tensor([[[[1.0, 2.45, 3.0]]]]))


def test_learnt_points_come_after_the_fixed_ones_and_only_with_features():
    generator = SparseBox3DKeyPointsGenerator(embed_dims=4, num_learnable_pts=2)
    torch.nn.init.constant_(generator.learnable_fc.bias, 100.0)  # sigmoid 1: half a size along each axis
    torch.nn.init.zeros_(generator.learnable_fc.weight)
    anchor = torch.tensor([[[0.0, 0, 0, math.log(2), math.log(4), math.log(6), 0, 1, 0, 0, 0]]])
    points = generator(anchor, torch.rand(1, 1, 4))
    torch.testing.assert_close(points[0, 0], torch.tensor([[0.0, 0, 0], [1, 2, 3], [1, 2, 3]]))
    assert generator(anchor).shape == (1, 1, 1, 3)


def test_box_key_points_in_another_frame(device):
    generator = SparseBox3DKeyPointsGenerator().to(device)
    anchor = torch.tensor([[[1.0, 0, 0, 0, 0, 0, 0, 1, 2, 0, 0]]], device=device)
    quarter_turn = torch.tensor([[0.0, -1, 0, 10], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], device=device)[None]
    now, before = torch.tensor([1.0], device=device), torch.tensor([0.5], device=device)
    points, (moved,) = generator(anchor, None, [quarter_turn], now, [before])
    # Half a second ago the box was at x = 1 - 2 * 0.5 = 0, which the transform takes to (10, 0, 0).
    torch.testing.assert_close(moved.cpu(), torch.tensor([[[[10.0, 0, 0]]]]))
    torch.testing.assert_close(points.cpu(), torch.tensor([[[[1.0, 0, 0]]]]))


def test_box_anchor_projection_golden():
    anchor = torch.tensor([[[1.0, 0, 0, 0, 0, 0, 0, 1, 2, 0, 0]]])
    matrix = torch.tensor([[0.0, -1, 0, 10], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])[None]
    project = SparseBox3DKeyPointsGenerator.anchor_projection
    (moved,) = project(anchor, [matrix], time_intervals=[torch.tensor([-0.5])])
    expected = torch.tensor([[[10.0, 2, 0, 0, 0, 0, 1, 0, 0, 2, 0]]])
    torch.testing.assert_close(moved, expected)
    (by_times,) = project(anchor, [matrix], torch.tensor([1.0]), [torch.tensor([1.5])])
    torch.testing.assert_close(by_times, expected)
    (standing,) = project(anchor[..., :8], [matrix])
    torch.testing.assert_close(standing, torch.tensor([[[10.0, 1, 0, 0, 0, 0, 1, 0]]]))
    with pytest.raises(ValueError, match="3 velocity components"):
        project(anchor[..., :10], [matrix], time_intervals=[torch.tensor([-0.5])])


def test_distance():
    anchor = torch.tensor([[[3.0, 4, 9, 0, 0, 0, 0, 1, 2, 0, 0]]])
    assert SparseBox3DKeyPointsGenerator.distance(anchor).item() == 5


def test_point_key_points_by_hand():
    generator = SparsePoint3DKeyPointsGenerator(
        4, num_sample=2, num_learnable_pts=1, fix_height=(0, 1), ground_height=-2
    )
    assert "heights" not in generator.state_dict()
    torch.nn.init.zeros_(generator.learnable_fc.weight)
    with torch.no_grad():
        generator.learnable_fc.bias.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]))
    anchor = torch.tensor([[[1.0, 10, 2, 20]]])
    expected = torch.tensor([[1.1, 10.2, -2], [1.3, 10.4, -1], [2.5, 20.6, -2], [2.7, 20.8, -1]])
    strided = anchor.mT.contiguous().mT
    torch.testing.assert_close(generator(strided, torch.rand(1, 1, 4))[0, 0], expected)
    matrix = torch.tensor([[0.0, -1, 0, 10], [1, 0, 0, 0], [0, 0, 1, 5], [0, 0, 0, 1]])[None]
    (moved,) = generator.anchor_projection(anchor, [matrix])
    torch.testing.assert_close(moved, torch.tensor([[[0.0, 1, -10, 2]]]))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(embed_dims=30), ValueError, "embed_dims: expected a multiple of num_groups=8, got 30"),
        (dict(attn_drop=1.0), ValueError, "attn_drop"),
        (dict(residual_mode="sum"), ValueError, "residual_mode"),
        (dict(num_groups=0), ValueError, "num_groups: expected at least 1, got 0"),
        (dict(kps_generator=torch.nn.Identity()), TypeError, "kps_generator: expected a dict .* got Identity"),
        (dict(kps_generator=dict(num_learnable_pts=-1)), ValueError, "num_learnable_pts: expected at least 0, got -1"),
        (dict(kps_generator=None), ValueError, "kps_generator"),
        (dict(kps_generator=dict(type="Ring")), ValueError, "kps_generator.*'Ring'"),
        (dict(temporal_fusion_module=dict(type="X")), NotImplementedError, "temporal_fusion_module"),
    ],
)
def test_constructor_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        DeformableFeatureAggregation(**({"kps_generator": dict(num_learnable_pts=1)} | arguments))


def test_forward_errors():
    feature, anchor, embed, maps = small_inputs("cpu")
    module, metas = small_module(), camera_metas(2, "cpu")
    with pytest.raises(KeyError, match="projection_mat"):
        module(feature, anchor, embed, maps, {})
    with pytest.raises(ValueError, match=r"projection_mat.*\(B, N, 4, 4\).*\(2, 2, 3, 4\)"):
        module(feature, anchor, embed, maps, metas | {"projection_mat": metas["projection_mat"][:, :, :3]})
    with pytest.raises(ValueError, match="image_wh"):
        module(feature, anchor, embed, maps, metas | {"image_wh": metas["image_wh"][:1]})
    with pytest.raises(ValueError, match="anchor_embed"):
        module(feature, anchor, embed[:, :3], maps, metas)
    with pytest.raises(TypeError, match=r"projection_mat.*got list"):
        module(feature, anchor, embed, maps, {"projection_mat": [[1.0]]})
    with pytest.raises(TypeError, match=r"anchor: expected a torch\.Tensor"):
        module(feature, anchor.tolist(), embed, maps, metas)
    with pytest.raises(ValueError, match=r"anchor: expected at least 8 numbers for a box, got 7"):
        module(feature, anchor[..., :7], embed, maps, metas)
    with pytest.raises(ValueError, match=r"expected 2 maps .*use_deformable_func=False"):
        module(feature, anchor, embed, maps[:1], metas)
    with pytest.raises(ValueError, match=r"expected 2 maps .*use_deformable_func=False"):
        module(feature, anchor, embed, saccade.feature_maps_format(maps), metas)
    with pytest.raises(ValueError, match=r"feature_maps\[1\]: .*N=2"):
        module(feature, anchor, embed, [maps[0], maps[1][:, :1]], metas)
    module.use_deformable_func = True
    with pytest.raises(ValueError, match="feature_maps_format"):
        module(feature, anchor, embed, maps, metas)
    with pytest.raises(ValueError, match="num_learnable_pts"):
        SparsePoint3DKeyPointsGenerator(4, num_sample=2)(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4))
