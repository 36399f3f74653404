"""``deformable_aggregation`` of a list of maps: equal to that of their rows, read in place where that can be."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import saccade
from cases.deformable_aggregation import make, oracle
from saccade.triton_dispatch import served_by_triton

# (height, width) of each level
PYRAMIDS = {
    "one-level": [(5, 7)],
    "pyramid": [(8, 12), (4, 6), (2, 3), (1, 2)],
    "five-levels": [(5, 7), (1, 1), (3, 9), (6, 1), (1, 4)],
    "level-without-pixels": [(5, 7), (0, 3), (2, 2)],
}
# Largest relative error: a few dozen roundings of float32, or half an ulp of the smaller dtypes. Both forms round once,
# but a sum of another order may round the other way: a whole ulp of those.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 1.2e-3, torch.bfloat16: 8e-3}


def channels_last(level: Tensor) -> Tensor:
    return level.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)


def is_channels_last(level: Tensor) -> bool:
    return level.permute(0, 1, 3, 4, 2).is_contiguous()


# How maps may lie in memory: of each the same values.
LAYOUTS = {
    "channels-last": channels_last,
    "contiguous": lambda level: level.contiguous(),
    "channels-last-of-a-larger-batch": lambda level: channels_last(torch.cat([level, level]))[level.shape[0] :],
    "some-channels-of-more": lambda level: channels_last(torch.cat([level, level], 2))[:, :, : level.shape[2]],
    "rows-with-gaps": lambda level: channels_last(torch.cat([level, level], 4))[..., : level.shape[4]],
    "widths-before-heights": lambda level: level.mT.contiguous().mT,
    "cameras-first": lambda level: level.transpose(0, 1).contiguous().transpose(0, 1),
}


def inputs_of(
    sizes: Sequence[tuple[int, int]], device: str, dtype: torch.dtype = torch.float32, cameras: int = 2, **more: Any
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Contiguous maps (B, N, C, H, W), locations and weights, those in float32."""
    few = {"batch": 2, "anchors": 2, "points": 2} | more  # the interpreter is slow
    rows, shape, start, location, weights = (value.detach() for value in make([sizes] * cameras, **few))
    (maps,) = saccade.feature_maps_format([rows.to(device, dtype), shape, start], inverse=True)
    return [level.contiguous() for level in maps], location.to(device), weights.to(device)


def step(maps: Sequence[Any], location: Tensor, weights: Tensor, formatted: bool = False) -> list[Tensor]:
    """Result and gradients of locations, weights and each map; of the list, or of the rows that are made of it."""
    nested = isinstance(maps[0], (list, tuple))
    groups = [[level.detach().requires_grad_() for level in group] for group in (maps if nested else [maps])]
    points = [value.detach().requires_grad_() for value in (location, weights)]
    given = groups if nested else groups[0]
    features = saccade.feature_maps_format(given) if formatted else [given, None, None]
    output = saccade.deformable_aggregation(*features, *points)
    seed = torch.randint(2, 7, output.shape, generator=torch.Generator().manual_seed(0)).to(output) / 4
    leaves = [*points, *(level for group in groups for level in group)]
    return [output.detach(), *torch.autograd.grad(output, leaves, seed)]


def assert_near(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for k, (left, right) in enumerate(zip(actual, expected, strict=True)):
        assert (left.dtype, left.device, left.shape) == (right.dtype, right.device, right.shape)
        difference, scale = (left.double() - right.double()).norm(), right.double().norm()
        assert difference <= TOLERANCES[left.dtype] * scale, f"result {k}: off by {difference:.2e} of {scale:.2e}"


class RecordedOperators(TorchDispatchMode):
    """Remembers the library's operators that are called."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "saccade":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))

    @property
    def formats(self) -> bool:
        """Whether rows were made of maps."""
        return torch.ops.saccade.feature_maps_format.default in [func for func, _ in self.calls]


# ---- values


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("pyramid", "layout"),
    [
        *((name, "channels-last") for name in PYRAMIDS),
        *(("pyramid", name) for name in LAYOUTS if name != "channels-last"),
    ],
)
def test_equal_to_the_rows_of_the_maps(pyramid, layout, device):
    maps, location, weights = inputs_of(PYRAMIDS[pyramid], device)
    expected = step(maps, location, weights, formatted=True)
    laid_out = [LAYOUTS[layout](level) for level in maps]
    assert all(map(torch.equal, laid_out, maps))
    assert_near(step(laid_out, location, weights), expected)


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_equal_to_the_definition(dtype, device):
    maps, location, weights = inputs_of(PYRAMIDS["pyramid"], device, dtype, batch=1)
    rows, *indices = saccade.feature_maps_format(maps)
    leaves = [value.double().cpu().requires_grad_() for value in (rows, location, weights)]
    exact = oracle(leaves[0], *(index.cpu() for index in indices), *leaves[1:])
    output, *gradients = step([channels_last(level) for level in maps], location, weights)
    seed = torch.randint(2, 7, output.shape, generator=torch.Generator().manual_seed(0)).double() / 4
    grad_rows, *grad_points = torch.autograd.grad(exact, leaves, seed)
    (grad_maps,) = saccade.feature_maps_format([grad_rows, *(index.cpu() for index in indices)], inverse=True)
    for left, right in zip([output, *gradients], [exact, *grad_points, *grad_maps], strict=True):
        difference = (left.double().cpu() - right).norm()
        # float64 maps with float32 weights: their gradients are rounded to float32
        assert difference <= TOLERANCES[left.dtype] * right.norm()


@pytest.mark.interpreted
def test_equal_bits_run_after_run(device):
    maps, location, weights = inputs_of(PYRAMIDS["pyramid"], device, anchors=6)
    maps = [channels_last(level) for level in maps]
    first, second = step(maps, location, weights), step(maps, location, weights)
    assert all(map(torch.equal, first, second))


@pytest.mark.interpreted
def test_layouts_and_dtypes_may_be_mixed(device):
    maps, location, weights = inputs_of(PYRAMIDS["pyramid"], device)
    mixed = [channels_last(maps[0]), maps[1], channels_last(maps[2]), maps[3]]
    assert_near(step(mixed, location, weights), step(maps, location, weights, formatted=True))
    mixed = [channels_last(maps[0]), channels_last(maps[1].half()), channels_last(maps[2].bfloat16()), maps[3]]
    results = step(mixed, location, weights)
    assert results[0].dtype == torch.float32  # what holds all of them, as in `feature_maps_format`
    assert_near(results, step(mixed, location, weights, formatted=True))


@pytest.mark.interpreted
def test_groups_of_cameras_of_different_sizes(device):
    maps, *_ = inputs_of([(8, 12), (4, 6)], device)
    others, *_ = inputs_of([(5, 7), (2, 3)], device, cameras=1)
    *_, location, weights = (value.detach().to(device) for value in make([[(8, 12), (4, 6)]] * 3, 2, 2, 2))
    groups = [[channels_last(level) for level in group] for group in (maps, others)]
    assert_near(step(groups, location, weights), step(groups, location, weights, formatted=True))
    one_group = [[channels_last(level) for level in maps]]
    points = location[:, :, :, :2], weights[:, :, :, :2]
    assert_near(step(one_group, *points), step(one_group[0], *points))


@pytest.mark.interpreted
def test_a_tuple_is_a_list(device):
    maps, location, weights = inputs_of([(5, 7), (2, 3)], device)
    expected = saccade.deformable_aggregation(maps, None, None, location, weights)
    assert torch.equal(saccade.deformable_aggregation(tuple(maps), None, None, location, weights), expected)
    named = saccade.deformable_aggregation(
        feature_maps=maps, spatial_shape=None, scale_start_index=None, sampling_location=location, weights=weights
    )
    assert torch.equal(named, expected)


@pytest.mark.interpreted
@pytest.mark.parametrize("layout", ["channels-last", "contiguous"])
def test_autocast_casts_the_maps_alone(layout, device):
    maps, location, weights = inputs_of([(5, 7), (2, 3)], device)
    maps = [LAYOUTS[layout](level) for level in maps]
    with torch.autocast(device, torch.bfloat16):
        results = step(maps, location, weights)
    assert results[0].dtype == torch.bfloat16
    assert {gradient.dtype for gradient in results[1:]} == {torch.float32}
    halves = step([level.bfloat16() for level in maps], location, weights)
    for left, right in zip(results, halves, strict=True):
        assert torch.equal(left, right.to(left.dtype))


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("sizes", "more"),
    [
        ([(5, 7)], {"batch": 0}),
        ([(5, 7)], {"anchors": 0}),
        ([(5, 7)], {"points": 0}),
        ([(5, 7)], {"channels": 0, "groups": 1}),
        ([(0, 7), (3, 0)], {}),
        ([(5, 7)], {"cameras": 0}),
    ],
    ids=["batch-0", "no-anchors", "no-points", "no-channels", "no-pixels", "no-cameras"],
)
def test_nothing_to_sum(sizes, more, device):
    shapes = {"batch": 2, "anchors": 4, "points": 3, "channels": 4, "groups": 2, "cameras": 2} | more
    batch, anchors, points, channels, groups, cameras = shapes.values()
    maps = [channels_last(torch.rand(batch, cameras, channels, *size, device=device)) for size in sizes]
    location = torch.rand(batch, anchors, points, cameras, 2, device=device)
    weights = torch.rand(batch, anchors, points, cameras, len(sizes), groups, device=device)
    output, *gradients = step(maps, location, weights)
    assert output.shape == (batch, anchors, channels)
    assert not output.any()
    for gradient, value in zip(gradients, (location, weights, *maps), strict=True):
        assert gradient.shape == value.shape
        assert not gradient.any()


@pytest.mark.interpreted
def test_not_a_number_outside_the_sampled_pixels_does_not_spread(device):
    """Levels lie apart in memory: beyond the border of one are other pixels than in rows, or none at all."""
    maps, location, weights = inputs_of(PYRAMIDS["pyramid"], device, anchors=4)
    location[:, ::2, ..., 0] = location[:, ::2, ..., 0] * 0.1 + 0.9  # many at and beyond the right border
    maps = [channels_last(level) for level in maps]
    expected = step(maps, location, weights)
    touched = step(maps, location, torch.ones_like(weights))[3:]
    for level, gradient in zip(maps, touched, strict=True):
        level[gradient == 0] = float("nan")
    assert any(level.isnan().any() for level in maps)
    assert all(map(torch.equal, step(maps, location, weights), expected))


# ---- in place


@pytest.mark.interpreted
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_made_only_of_maps_that_cannot_be_read_in_place(layout, device):
    maps, location, weights = inputs_of([(5, 7), (2, 3)], device)
    maps = [LAYOUTS[layout](level) for level in maps]
    in_place = served_by_triton(maps[0]) and all(map(is_channels_last, maps))
    with RecordedOperators() as recorded:
        _, _, _, *gradients = step(maps, location, weights)
    assert recorded.calls
    assert recorded.formats == (not in_place)
    if in_place:
        assert all(map(is_channels_last, gradients))


@pytest.mark.interpreted
@pytest.mark.parametrize("layout", ["channels-last", "contiguous"])
def test_gradients_go_to_those_that_require_them(layout, device):
    maps, location, weights = inputs_of([(5, 7), (2, 3), (1, 1)], device)
    maps = [LAYOUTS[layout](level) for level in maps]
    _, *expected = step(maps, location, weights)
    values = [location, weights, *maps]
    for needed in ([1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 1, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 1], [0] * 5):
        leaves = [value.detach().requires_grad_(bool(need)) for value, need in zip(values, needed, strict=True)]
        output = saccade.deformable_aggregation(leaves[2:], None, None, *leaves[:2])
        assert output.requires_grad == any(needed)
        if not any(needed):
            continue
        seed = torch.randint(2, 7, output.shape, generator=torch.Generator().manual_seed(0)).to(output) / 4
        output.backward(seed)
        for leaf, need, gradient in zip(leaves, needed, expected, strict=True):
            assert (leaf.grad is not None) == bool(need)
            if leaf.grad is not None:
                assert_near([leaf.grad], [gradient])


@pytest.mark.interpreted
def test_inputs_are_left_alone(device):
    maps, location, weights = inputs_of([(5, 7), (2, 3)], device)
    maps = [channels_last(level) for level in maps]
    before = [(value.clone(), value._version) for value in (*maps, location, weights)]
    step(maps, location, weights)
    for value, (copy, version) in zip((*maps, location, weights), before, strict=True):
        assert value._version == version
        assert torch.equal(value, copy)


# ---- PyTorch around it


@pytest.mark.parametrize("layout", ["channels-last", "contiguous"])
def test_opcheck(layout, device):
    maps, location, weights = inputs_of([(5, 7), (2, 3)], device)
    leaves = [LAYOUTS[layout](level).requires_grad_() for level in maps]
    with RecordedOperators() as recorded:
        saccade.deformable_aggregation(leaves, None, None, location.requires_grad_(), weights.requires_grad_())
    assert recorded.calls
    for func, args in recorded.calls:
        torch.library.opcheck(func, args)


@pytest.mark.parametrize("layout", ["channels-last", "contiguous"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(layout, dynamic, device):
    torch._dynamo.reset()
    maps, location, weights = inputs_of([(5, 7), (2, 3)], device)
    maps = [LAYOUTS[layout](level) for level in maps]

    def aggregate(fine: Tensor, coarse: Tensor, location: Tensor, weights: Tensor) -> Tensor:
        return saccade.deformable_aggregation([fine, coarse], None, None, location, weights)

    compiled = torch.compile(aggregate, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    output, *expected = step(maps, location, weights)
    leaves = [value.detach().requires_grad_() for value in (*maps, location, weights)]
    result = compiled(*leaves)
    seed = torch.randint(2, 7, output.shape, generator=torch.Generator().manual_seed(0)).to(output) / 4
    gradients = torch.autograd.grad(result, [*leaves[-2:], *leaves[:-2]], seed)
    assert_near([result.detach(), *gradients], [output, *expected])


@pytest.mark.parametrize("layout", ["channels-last", "contiguous"])
def test_export(layout, device):
    class Head(torch.nn.Module):
        def forward(self, fine, coarse, location, weights):
            return saccade.deformable_aggregation([fine, coarse], None, None, location, weights)

    maps, location, weights = inputs_of([(5, 7), (2, 3)], device)
    inputs = (*(LAYOUTS[layout](level) for level in maps), location, weights)
    exported = torch.export.export(Head(), inputs)
    assert_near([exported.module()(*inputs)], [Head()(*inputs)])


@pytest.mark.interpreted
@pytest.mark.parametrize("layout", ["channels-last", "contiguous"])
def test_second_derivative_raises(layout, device):
    maps, location, weights = inputs_of([(5, 7), (2, 3)], device)
    leaves = [value.detach().requires_grad_() for value in (*(LAYOUTS[layout](m) for m in maps), location, weights)]
    output = saccade.deformable_aggregation(leaves[:2], None, None, *leaves[2:])
    gradients = torch.autograd.grad(output.sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        sum(gradient.sum() for gradient in gradients).backward()


def test_gradcheck(device):
    maps, location, weights = inputs_of([(5, 7), (2, 2)], device, torch.float64, batch=1, anchors=3, points=2)
    leaves = [channels_last(level).requires_grad_() for level in maps]
    leaves += [value.double().requires_grad_() for value in (location, weights)]

    def aggregate(*leaves: Tensor) -> Tensor:
        return saccade.deformable_aggregation(leaves[:2], None, None, *leaves[2:])

    assert torch.autograd.gradcheck(aggregate, leaves)


def test_inference_mode_and_meta_tensors(device):
    maps, location, weights = inputs_of([(5, 7), (2, 3)], device)
    maps = [channels_last(level) for level in maps]
    expected = saccade.deformable_aggregation(maps, None, None, location, weights)
    with torch.inference_mode():
        assert torch.equal(saccade.deformable_aggregation(maps, None, None, location, weights), expected)
    on_meta = [level.to("meta") for level in maps]
    result = saccade.deformable_aggregation(on_meta, None, None, location.to("meta"), weights.to("meta"))
    assert (result.shape, result.device.type) == (expected.shape, "meta")


# ---- errors

MAPS, LOCATION, WEIGHTS = inputs_of([(5, 7), (2, 3)], "cpu")  # B=2, N=2, C=4, A=2, K=2, L=2, G=2
ROWS, SHAPE, START = saccade.feature_maps_format(MAPS)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ((MAPS, SHAPE, None, LOCATION, WEIGHTS), ValueError, "spatial_shape: expected None with a list of maps"),
        ((MAPS, None, START, LOCATION, WEIGHTS), ValueError, "scale_start_index: expected None with a list of maps"),
        ((MAPS, SHAPE, START, LOCATION, WEIGHTS), ValueError, "spatial_shape: expected None with a list of maps"),
        (([MAPS], SHAPE, START, LOCATION, WEIGHTS), ValueError, "spatial_shape: expected None with a list of maps"),
        ((ROWS, None, START, LOCATION, WEIGHTS), TypeError, "spatial_shape: expected a torch.Tensor, got NoneType"),
        ((ROWS, SHAPE, None, LOCATION, WEIGHTS), TypeError, "scale_start_index: expected a torch.Tensor, got NoneType"),
        ((ROWS, None, None, LOCATION, WEIGHTS), TypeError, "spatial_shape: expected a torch.Tensor, got NoneType"),
        ((None, None, None, LOCATION, WEIGHTS), TypeError, "feature_maps"),
        (([], None, None, LOCATION, WEIGHTS), ValueError, "feature_maps: .*empty list"),
        (([[]], None, None, LOCATION, WEIGHTS), ValueError, "feature_maps: .*empty list"),
        (([MAPS[0], MAPS[1][:1]], None, None, LOCATION, WEIGHTS), ValueError, r"feature_maps\[1\]: .*B=2.*got \(1, 2"),
        (
            ([MAPS[0], MAPS[1][:, :1]], None, None, LOCATION, WEIGHTS),
            ValueError,
            r"feature_maps\[1\]: .*N=2.*got \(2, 1",
        ),
        (
            ([MAPS[0], MAPS[1][:, :, :2]], None, None, LOCATION, WEIGHTS),
            ValueError,
            r"feature_maps\[1\]: .*C=4.*got \(2, 2, 2",
        ),
        (([MAPS[0][0], MAPS[1]], None, None, LOCATION, WEIGHTS), ValueError, r"feature_maps\[0\]: .*\(B, N, C, H, W\)"),
        (([MAPS[0], MAPS[1].int()], None, None, LOCATION, WEIGHTS), TypeError, r"feature_maps\[1\]: .*torch.int32"),
        (([MAPS[0], 1.0], None, None, LOCATION, WEIGHTS), TypeError, r"feature_maps\[1\]: .*float"),
        (([MAPS[0], MAPS[1].to("meta")], None, None, LOCATION, WEIGHTS), ValueError, r"feature_maps\[1\]: .*meta"),
        ((MAPS, None, None, LOCATION.to("meta"), WEIGHTS), ValueError, "sampling_location: .*meta"),
        ((MAPS, None, None, LOCATION, WEIGHTS.to("meta")), ValueError, "weights: .*meta"),
        ((MAPS, None, None, LOCATION[:1], WEIGHTS), ValueError, "sampling_location: .*B=2.*got \\(1, 2"),
        ((MAPS, None, None, LOCATION[:, :, :, :1], WEIGHTS), ValueError, "sampling_location: .*N=2"),
        ((MAPS, None, None, LOCATION, WEIGHTS[:, :1]), ValueError, "weights: .*A=2"),
        ((MAPS, None, None, LOCATION, WEIGHTS[..., :1, :]), ValueError, "weights: .*L=2"),
        ((MAPS, None, None, LOCATION, WEIGHTS[..., :0]), ValueError, "weights: expected groups .*got 0"),
        (
            (MAPS, None, None, LOCATION, WEIGHTS.repeat(1, 1, 1, 1, 1, 2)[..., :3]),
            ValueError,
            "weights: .*divide C=4.*3",
        ),
        (([MAPS, MAPS[:1]], None, None, LOCATION, WEIGHTS), ValueError, r"feature_maps\[1\]: expected 2 levels"),
        (([MAPS, MAPS], None, None, LOCATION, WEIGHTS), ValueError, "sampling_location: .*N=4"),
    ],
)
@pytest.mark.parametrize("layout", ["channels-last", "contiguous"])
def test_errors(inputs, error, message, layout):
    features, *rest = inputs
    if isinstance(features, list):
        features = [LAYOUTS[layout](v) if isinstance(v, Tensor) and v.dim() == 5 else v for v in features]
    with pytest.raises(error, match=message):
        saccade.deformable_aggregation(features, *rest)
