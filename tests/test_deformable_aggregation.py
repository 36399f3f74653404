"""``deformable_aggregation`` and ``feature_maps_format``: values one can check on paper, borders, limits, errors."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import saccade
from cases import TOLERANCES
from cases.comparison import assert_near
from cases.deformable_aggregation import make, oracle
from saccade.deformable_aggregation.formatting import FEATURE_MAPS_FORMAT
from saccade.triton_dispatch import served_by_triton


def sample(image: list[list[float]], x: float, y: float, device: str = "cpu", weight: float = 1.0):
    """One point in one map of one channel: value, d/dx, d/dy, d/dweight."""
    rows = torch.tensor(image, device=device)
    height, width = rows.shape
    location = torch.tensor([x, y], device=device).view(1, 1, 1, 1, 2).requires_grad_()
    weights = torch.full((1, 1, 1, 1, 1, 1), weight, device=device, requires_grad=True)
    value = saccade.deformable_aggregation(
        rows.view(1, -1, 1),
        torch.tensor([[[height, width]]], device=device),
        torch.tensor([[0]], device=device),
        location,
        weights,
    )
    value.sum().backward()
    assert location.grad is not None
    assert weights.grad is not None
    return value.item(), *location.grad.flatten().tolist(), weights.grad.item()


SQUARE = [[1.0, 2.0], [3.0, 4.0]]
NINE = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]]


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("image", "x", "y", "expected"),
    [
        (SQUARE, 0.5, 0.5, 2.5),  # the mean of all four
        (SQUARE, 0.25, 0.25, 1.0),  # the centre of the first pixel
        (SQUARE, 0.1, 0.5, 1.4),  # u = -0.3: 0.7 of the left column's mean of 2
        (NINE, 0.5, 0.5, 5.0),  # the centre of the middle pixel
        (NINE, 0.5, 1 / 6, 2.0),  # the centre of the upper middle pixel
        (NINE, 2 / 3, 0.5, 5.5),  # halfway between the middle and the right pixel
        (NINE, 1 / 3, 1 / 3, 3.0),  # where the upper left four meet: (1 + 2 + 4 + 5) / 4
        (NINE, 1e-7, 0.5, 2.0),  # just inside the left border: half of the edge value 4
        (NINE, 1e-7, 1e-7, 0.25),  # just inside the corner: a quarter of it
        (NINE, 1 - 1e-7, 0.5, 3.0),
        (NINE, 0.0, 0.5, 0.0),  # on the border: not visible
        (NINE, 1.0, 0.5, 0.0),
        (NINE, 0.5, 0.0, 0.0),
        (NINE, 0.5, 1.0, 0.0),
        (NINE, -0.01, 0.5, 0.0),  # where grid_sample would still mix in the edge
        (NINE, 0.5, 1.01, 0.0),
        (NINE, float("nan"), 0.5, 0.0),
        (NINE, 0.5, float("inf"), 0.0),
        (NINE, -float("inf"), float("nan"), 0.0),
    ],
)
def test_values_by_hand(image, x, y, expected, device):
    value, slope_x, slope_y, slope_weight = sample(image, x, y, device)
    assert value == pytest.approx(expected, abs=1e-5)
    assert slope_weight == pytest.approx(expected, abs=1e-5)
    if not (0 < x < 1 and 0 < y < 1):
        assert (slope_x, slope_y) == (0, 0)


@pytest.mark.interpreted
def test_gradients_by_hand(device):
    value, slope_x, slope_y, slope_weight = sample(SQUARE, 0.1, 0.5, device)
    assert (value, slope_weight) == (pytest.approx(1.4), pytest.approx(1.4))
    assert slope_x == pytest.approx(4.0)  # 2 pixels x (2 - 0), left column's mean against the zeros outside
    assert slope_y == pytest.approx(2.8)  # 2 pixels x 0.7 x (3 - 1)


@pytest.mark.interpreted
def test_gradient_at_an_integer_pixel_is_that_of_the_right_side(device):
    # The centre of the middle pixel: to the right the value rises by 1 per pixel, as it does to the left of it.
    hill = [[0.0, 0.0, 0.0], [0.0, 5.0, 1.0], [0.0, 0.0, 0.0]]
    _, slope_x, slope_y, _ = sample(hill, 0.5, 0.5, device)
    assert slope_x == pytest.approx(3 * (1 - 5), abs=1e-4)
    assert slope_y == pytest.approx(3 * (0 - 5), abs=1e-4)


@pytest.mark.interpreted
def test_groups_are_blocks_of_channels_and_levels_add_up(device):
    maps = [torch.full((1, 1, 4, 2, 2), 1.0, device=device), torch.full((1, 1, 4, 1, 1), 10.0, device=device)]
    weights = torch.tensor([[1.0, 2.0], [0.5, 0.25]], device=device).view(1, 1, 1, 1, 2, 2)  # level, group
    location = torch.full((1, 1, 1, 1, 2), 0.5, device=device)
    output = saccade.deformable_aggregation(*saccade.feature_maps_format(maps), location, weights)
    assert output.flatten().tolist() == [6.0, 6.0, 4.5, 4.5]


@pytest.mark.interpreted
def test_not_a_number_outside_the_sampled_pixels_does_not_spread(device):
    inputs = [value.detach().to(device) for value in make([[(6, 8)]], batch=1, spread=0.2)]
    features, *_, weights = inputs
    expected = saccade.deformable_aggregation(*inputs)
    features[:, :8] = float("nan")  # the first row of the map, which no point in its middle touches
    assert torch.equal(saccade.deformable_aggregation(*inputs), expected)
    inputs[3][:, 0, 0] = -1
    weights[:, 0, 0] = float("nan")  # the weight of a point that is not visible
    assert saccade.deformable_aggregation(*inputs).isfinite().all()


def with_gradients(inputs, call=saccade.deformable_aggregation, seed=None) -> list[torch.Tensor]:
    """The result and the gradients of features, locations and weights; ``seed`` is the gradient of the result."""
    features, shape, start, location, weights = inputs
    leaves = [value.detach().requires_grad_() for value in (features, location, weights)]
    output = call(leaves[0], shape, start, *leaves[1:])
    if seed is None:
        seed = torch.randint(2, 7, output.shape, generator=torch.Generator().manual_seed(0)).to(output) / 4
    return [output.detach(), *torch.autograd.grad(output, leaves, seed)]


def assert_as_defined(inputs, device: str) -> None:
    expected = with_gradients([value.double() if value.is_floating_point() else value for value in inputs], oracle)
    # Relative errors: a few dozen roundings of the dtype of the sums.
    for dtype, tolerance in ((torch.float32, 3e-6), (torch.float64, 1e-12)):
        moved = [value.to(device, dtype) if value.is_floating_point() else value.to(device) for value in inputs]
        for k, (left, right) in enumerate(zip(with_gradients(moved), expected, strict=True)):
            assert (left.double().cpu() - right).norm() <= tolerance * right.norm(), f"result {k} in {dtype}"


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("channels", "groups"), [(96, 8), (60, 5), (8, 8), (1, 1), (7, 7), (512, 8), (320, 10)], ids=str
)
def test_channels_and_groups(channels, groups, device):
    assert_as_defined(make([[(6, 8), (3, 4)]], 1, 2, 2, groups, channels), device)


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("cameras", "levels", "points"),
    [(1, 1, 1), (1, 1, 17), (2, 1, 33), (1, 5, 3), (7, 2, 2), (3, 3, 1), (1, 1, 300)],
    ids=str,
)
def test_cameras_levels_and_points(cameras, levels, points, device):
    sizes = [(8, 12), (5, 7), (3, 9), (1, 4), (1, 1)]
    shapes = [[sizes[(camera + level) % 5] for level in range(levels)] for camera in range(cameras)]
    assert_as_defined(make(shapes, 1, 2, points), device)


@pytest.mark.interpreted
def test_maps_may_overlap(device):
    """Two levels, or cameras, on the same rows: the gradients of a row add up."""
    inputs = list(make([[(6, 8), (3, 4)], [(6, 8), (3, 4)]], batch=1))
    inputs[2] = torch.tensor([[0, 7], [5, 0]])
    assert_as_defined(inputs, device)


def near_the_right_border(device: str) -> list[torch.Tensor]:
    """Half of the points at the right border of the maps, and none in their lower half, but for one in the corner."""
    features, shape, start, location, weights = (value.detach() for value in make([[(6, 8), (5, 3)]] * 2, 2, 4, 3))
    location[..., 1] *= 0.4
    location[:, ::2, ..., 0] = 1 - location[:, ::2, ..., 0].abs() / 20
    location[0, 0, 0] = 0.999
    return [value.to(device) for value in (features, shape, start, location, weights)]


@pytest.mark.interpreted
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_no_point_touches_are_not_read(value, device):
    """Such as the one after a pixel at the right border: the first pixel of the next row of the image."""
    inputs = near_the_right_border(device)
    expected = with_gradients(inputs)
    _, touched, *_ = with_gradients([*inputs[:4], torch.ones_like(inputs[4])])
    untouched = touched == 0
    assert untouched[:, 8].all()  # the first pixel of the second row of the first map, after touched ones:
    assert not untouched[0, 7].any()
    inputs[0][untouched] = value
    assert all(map(torch.equal, with_gradients(inputs), expected))


@pytest.mark.interpreted
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_infinite_gradient_reaches_the_pixels_of_its_own_anchor_alone(value, device):
    inputs = near_the_right_border(device)
    seed = torch.ones(2, 4, 4, device=device)
    expected = with_gradients(inputs, seed=seed)[1:]
    only = torch.zeros_like(seed)
    only[0, 1] = 1
    _, touched, *_ = with_gradients([*inputs[:4], torch.ones_like(inputs[4])], seed=only)
    seed[0, 1] = value
    _, *gradients = with_gradients(inputs, seed=seed)
    others = torch.ones(2, 4, dtype=torch.bool, device=device)
    others[0, 1] = False
    for gradient, usual, spared in zip(gradients, expected, (touched == 0, others, others), strict=True):
        assert not gradient[~spared].isfinite().all()
        assert torch.equal(gradient[spared], usual[spared])


@pytest.mark.interpreted
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38], ids=str)
def test_points_that_are_nowhere_are_not_visible(value, device):
    inputs = [tensor.detach().to(device) for tensor in make([[(6, 8), (3, 4)]] * 2)]
    location, weights = inputs[3], inputs[4]
    nowhere = torch.zeros(location.shape[:-1], dtype=torch.bool, device=device)
    nowhere[:, ::2, 1], nowhere[:, :, 2, 0], nowhere[:, 3] = True, True, True
    weights[nowhere] = float("nan")  # not read either
    location[nowhere] = -1
    expected = with_gradients(inputs)
    for axis in (0, 1):
        location[nowhere] = 0.5
        location[..., axis][nowhere] = value
        results = with_gradients(inputs)
        assert all(map(torch.equal, results, expected))
        assert not any(gradient[nowhere].any() for gradient in results[2:])


@given(
    batch=st.integers(1, 2),
    anchors=st.integers(1, 6),
    points=st.integers(1, 4),
    sizes=st.lists(
        st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=2, max_size=2), min_size=1, max_size=3
    ),
    groups=st.integers(1, 3),
    block=st.integers(1, 4),
)
def test_equals_grid_sample_away_from_the_border(batch, anchors, points, sizes, groups, block):
    inputs = [
        value.detach().double() if value.is_floating_point() else value
        for value in make(sizes, batch, anchors, points, groups, groups * block)
    ]
    features, _, start, location, weights = inputs
    location.mul_(0.7).add_(0.15)  # into the open unit square
    location.clamp_(1e-3, 1 - 1e-3)
    expected = torch.zeros(batch, anchors, groups * block, dtype=torch.float64)
    for n, level in itertools.product(range(len(sizes)), range(2)):
        height, width = sizes[n][level]
        first = int(start[n, level])
        feature_map = features[:, first : first + height * width].mT.unflatten(-1, (height, width))
        sampled = F.grid_sample(feature_map, 2 * location[:, :, :, n] - 1, align_corners=False)  # (B, C, A, K)
        expected += torch.einsum("bcak,bakc->bac", sampled, weights[:, :, :, n, level].repeat_interleave(block, -1))
    torch.testing.assert_close(saccade.deformable_aggregation(*inputs), expected)


def test_gradcheck(device):
    inputs = make([[(5, 7), (2, 2)], [(3, 9), (1, 4)]], anchors=3, points=2)
    inputs = [
        value.detach().to(device, torch.float64).requires_grad_() if value.is_floating_point() else value.to(device)
        for value in inputs
    ]
    assert torch.autograd.gradcheck(saccade.deformable_aggregation, inputs, nondet_tol=1e-12)


@pytest.mark.interpreted
def test_only_the_gradients_that_are_needed(device):
    for needed in itertools.product([False, True], repeat=3):
        inputs = [value.detach().to(device) for value in make([[(4, 4)]], batch=1)]
        leaves = [inputs[0], inputs[3], inputs[4]]
        for leaf, need in zip(leaves, needed, strict=True):
            leaf.requires_grad_(need)
        output = saccade.deformable_aggregation(*inputs)
        assert output.requires_grad == any(needed)
        if any(needed):
            output.sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == list(needed)


@pytest.mark.interpreted
def test_mixed_dtypes(device):
    inputs = [value.detach().to(device) for value in make([[(6, 8), (3, 4)]], batch=1)]
    features, shape, start, location, weights = inputs
    leaves = [features.bfloat16().requires_grad_(), location.requires_grad_(), weights.half().requires_grad_()]
    output = saccade.deformable_aggregation(leaves[0], shape, start, leaves[1], leaves[2])
    assert output.dtype == torch.bfloat16
    exact = oracle(
        *(
            leaf.double().cpu() if leaf.is_floating_point() else leaf.cpu()
            for leaf in (leaves[0], shape, start, leaves[1], leaves[2])
        )
    )
    assert (output.double().cpu() - exact).norm() < 4e-3 * exact.norm()
    output.sum().backward()
    assert [leaf.grad is not None and leaf.grad.dtype == leaf.dtype for leaf in leaves] == [True] * 3


@pytest.mark.interpreted
def test_autocast_casts_the_features_alone(device):
    inputs = [value.detach().to(device) for value in make([[(6, 8)]], batch=1, groups=1)]
    with torch.autocast(device, torch.bfloat16):
        output = saccade.deformable_aggregation(*inputs)
    inputs[0] = inputs[0].bfloat16()
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, saccade.deformable_aggregation(*inputs))


@pytest.mark.interpreted
def test_rows_that_do_not_exist():
    """On the CPU an error that names the map."""
    features, shape, start, location, weights = make([[(4, 4), (2, 2)], [(4, 4), (2, 2)]])
    for bad in (-1, 38):
        start = start.clone()
        start[1, 1] = bad
        with pytest.raises(ValueError, match=rf"2 x 2 pixels at row {bad} \(camera 1, level 1\)"):
            saccade.deformable_aggregation(features, shape, start, location, weights)


@pytest.mark.interpreted
@pytest.mark.parametrize(("begin", "height"), [(-1, 3), (-5, 3), (13, 3), (19, 3), (24, 3), (0, 9)])
def test_kernels_touch_no_rows_that_do_not_exist(begin, height, device):
    """What lies before and behind the features is NaN; between two samples each has the rows of the other."""
    if not served_by_triton(torch.empty(0, device=device)):
        pytest.skip("has no kernel there")
    from saccade.deformable_aggregation import launch

    rows, channels = 24, 4  # of two cameras' maps of 3 x 4 pixels
    features, shape, start, location, weights = make([[(3, 4)], [(3, 4)]], anchors=2, points=4, channels=channels)
    shape[1, 0, 0], start[1, 0] = height, begin
    with torch.no_grad():  # about the corners of the map and in its middle, and between pixels
        location[:, 0] = torch.tensor([[0.12, 0.12], [0.88, 0.12], [0.12, 0.88], [0.88, 0.88]])[:, None]
        location[:, 1] = torch.tensor([[0.4, 0.2], [0.6, 0.4], [0.3, 0.6], [0.7, 0.72]])[:, None]
    leaves = [features, location, weights]
    expected = oracle(features.double(), shape, start, location.double(), weights.double())
    grad_output = torch.ones_like(expected)
    expected = [expected, *torch.autograd.grad(expected, leaves, grad_output)]

    memory = torch.full((3 * 2 * rows, channels), float("nan"), device=device)
    between = memory[2 * rows : 4 * rows].view(2, rows, channels).copy_(features.detach())
    assert between.is_contiguous()  # or kernels get a copy
    inputs = [between], *(value.detach().to(device) for value in (shape, start, location, weights))
    output = launch.prepare_aggregation(*inputs)(*inputs)
    args = grad_output.to(output), *inputs, [True] * 3
    *gradients, (grad_features,) = launch.prepare_aggregation_backward(*args)(*args)
    for number, (actual, wanted) in enumerate(zip([output, grad_features, *gradients], expected, strict=True)):
        assert_near(f"result {number}", actual, wanted, TOLERANCES[torch.float32])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the CPU raises instead")
def test_rows_that_do_not_exist_count_as_zero_on_a_gpu():
    inputs = make([[(4, 4), (2, 2)], [(4, 4), (2, 2)]])
    for bad in (-1, 38, -(2**40), 2**40):
        features, shape, start, location, weights = (value.detach().clone() for value in inputs)
        start[1, 1] = bad
        on_gpu = [value.cuda() for value in (features, shape, start, location, weights)]
        result = saccade.deformable_aggregation(*on_gpu)
        torch.testing.assert_close(result.cpu(), oracle(features, shape, start, location, weights))
        with saccade.debug_checks(True), pytest.raises(ValueError, match="camera 1, level 1"):
            saccade.deformable_aggregation(*on_gpu)


def test_memory_at_the_size_of_a_real_detector():
    """900 anchors x 13 points x 6 cameras x 4 levels x 256 channels: at most 1.5 GB beyond inputs and gradients."""
    script = r"""
import re, torch, saccade
from pathlib import Path
def peak():  # of this process alone: what getrusage says includes the peak of the process that started it
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
shape = torch.tensor([[(256 // s, 704 // s) for s in (4, 8, 16, 32)]] * 6)
area = shape.prod(-1).flatten()
start = (area.cumsum(0) - area).view(6, 4)
rows = torch.rand(1, int(area.sum()), 256, requires_grad=True)
location = torch.rand(1, 900, 13, 6, 2, requires_grad=True)  # every point in every camera: six times what a rig sees
weights = torch.rand(1, 900, 13, 6, 4, 8, requires_grad=True)
gradients = sum(t.numel() * 4 for t in (rows, location, weights))
before = peak()
saccade.deformable_aggregation(rows, shape, start, location, weights).sum().backward()
print((peak() - before - gradients) / 1e9)
"""
    done = subprocess.run([sys.executable, "-c", script], env=os.environ, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.5


def bad(position: int, value) -> list:
    inputs = list(make([[(4, 4), (2, 2)]]))
    inputs[position] = value(inputs[position]) if callable(value) else value
    return inputs


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (bad(0, 1.0), TypeError, "feature_maps: expected a torch.Tensor, got float"),
        (bad(0, lambda t: t.int()), TypeError, "feature_maps: expected float.*got torch.int32"),
        (bad(0, lambda t: t[0]), ValueError, r"feature_maps: expected shape \(B, S, C\), got \(20, 4\)"),
        (bad(1, lambda t: t.float()), TypeError, "spatial_shape: expected int32 or int64, got torch.float32"),
        (bad(1, lambda t: t[..., :1]), ValueError, r"spatial_shape: expected shape \(N, L, 2\), got \(1, 2, 1\)"),
        (bad(2, lambda t: t.short()), TypeError, "scale_start_index: expected int32 or int64, got torch.int16"),
        (bad(2, lambda t: t[:, :1]), ValueError, r"scale_start_index: .*N=1, L=2, got \(1, 1\)"),
        (bad(3, lambda t: t.long()), TypeError, "sampling_location"),
        (bad(3, lambda t: t[:1]), ValueError, r"sampling_location: .*B=2, N=1, got \(1, 4, 3, 1, 2\)"),
        (bad(3, lambda t: t[..., :1]), ValueError, r"sampling_location: expected shape \(B, A, K, N, 2\)"),
        (bad(4, lambda t: t[:, :3]), ValueError, r"weights: .*A=4.*got \(2, 3, 3, 1, 2, 2\)"),
        (bad(4, lambda t: t[..., :1, :]), ValueError, "weights: .*L=2"),
        (
            bad(4, lambda t: t.repeat(1, 1, 1, 1, 1, 2)[..., :3]),
            ValueError,
            "weights: expected groups .*divide C=4.*got 3",
        ),
        (bad(4, lambda t: t[..., :0]), ValueError, "weights: expected groups .*got 0"),
        (
            bad(4, lambda t: t.detach().to("meta")),
            ValueError,
            "weights: expected device cpu, that of feature_maps, got meta",
        ),
    ],
)
def test_errors(inputs, error, message):
    with pytest.raises(error, match=message):
        saccade.deformable_aggregation(*inputs)


# ---- feature_maps_format


@pytest.mark.interpreted
def test_format_of_the_example(device):
    maps = [torch.rand(3, 2, 5, 4, 6, device=device), torch.rand(3, 2, 5, 2, 3, device=device)]
    rows, spatial_shape, start = saccade.feature_maps_format(maps)
    assert spatial_shape.tolist() == [[[4, 6], [2, 3]]] * 2
    assert start.tolist() == [[0, 24], [30, 54]]
    assert (rows.shape, spatial_shape.dtype, start.dtype) == ((3, 60, 5), torch.int64, torch.int64)
    for n, level in itertools.product(range(2), range(2)):
        height, width = spatial_shape[n, level].tolist()
        for i, j in itertools.product(range(height), range(width)):
            assert torch.equal(rows[:, int(start[n, level]) + i * width + j], maps[level][:, n, :, i, j])


def test_format_of_groups_adds_the_pixels_of_earlier_groups():
    groups = [
        [torch.rand(1, 2, 8, 4, 6), torch.rand(1, 2, 8, 2, 3)],
        [torch.rand(1, 1, 8, 5, 3), torch.rand(1, 1, 8, 1, 3)],
    ]
    triple = saccade.feature_maps_format(groups)
    assert triple[2].tolist() == [[0, 24], [30, 54], [60, 75]]
    back = saccade.feature_maps_format(triple, inverse=True)
    assert all(
        torch.equal(a, b) for left, right in zip(back, groups, strict=True) for a, b in zip(left, right, strict=True)
    )


@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=3),
    st.booleans(),
)
def test_format_round_trip(groups, channels_last):
    maps = [[torch.rand(2, n, 3, height, width), torch.rand(2, n, 3, 1, width)] for n, height, width in groups]
    if channels_last:
        maps = [[m.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3) for m in group] for group in maps]
    triple = saccade.feature_maps_format(maps)
    again = saccade.feature_maps_format(saccade.feature_maps_format(triple, inverse=True))
    assert all(torch.equal(left, right) for left, right in zip(triple, again, strict=True))
    foreign = [triple[0], triple[1].clone(), triple[2]]  # sizes that have to be read from the tensor
    for left, right in zip(
        saccade.feature_maps_format(foreign, inverse=True),
        saccade.feature_maps_format(triple, inverse=True),
        strict=True,
    ):
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_format_of_one_list_comes_back_as_a_list_of_one():
    maps = [torch.rand(1, 2, 3, 4, 5)]
    (group,) = saccade.feature_maps_format(saccade.feature_maps_format(maps), inverse=True)
    assert torch.equal(group[0], maps[0])


@pytest.mark.interpreted
def test_format_promotes_dtypes(device):
    """A feature pyramid under autocast mixes float32, which interpolation gives, with half precision."""
    maps = [torch.rand(1, 1, 2, 3, 3, device=device, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
    rows, _, _ = saccade.feature_maps_format(maps)
    assert rows.dtype == torch.float32
    assert torch.equal(rows[0, 0], maps[0][0, 0, :, 0, 0].float())


@pytest.mark.interpreted
def test_format_passes_gradients(device):
    maps = [torch.rand(1, 2, 3, 4, 5, device=device, requires_grad=True) for _ in range(2)]
    rows, _, _ = saccade.feature_maps_format(maps)
    rows[:, 7].sum().backward()
    assert maps[0].grad is not None
    assert maps[0].grad[0, 0, :, 1, 2].tolist() == [1, 1, 1]
    assert maps[0].grad.sum() == 3


FORMATS = {
    "one-map": [[(2, 3, 70, 9, 11)]],
    "one-channel": [[(1, 2, 1, 9, 11), (1, 2, 1, 1, 1)]],
    "tiles-of-channels-and-pixels": [[(1, 2, 130, 9, 11), (1, 2, 130, 4, 6), (1, 2, 130, 1, 1)]],
    "sizes-divisible-by-16": [[(2, 2, 64, 8, 16), (2, 2, 64, 4, 8)]],
    "groups": [
        [(2, 2, 6, 5, 7), (2, 2, 6, 2, 3)],
        [(2, 1, 6, 3, 3), (2, 1, 6, 8, 1)],
        [(2, 3, 6, 1, 2), (2, 3, 6, 1, 1)],
    ],
    "map-without-pixels": [[(2, 2, 5, 0, 7), (2, 2, 5, 2, 3)]],
    "batch-0": [[(0, 2, 5, 4, 7), (0, 2, 5, 2, 3)]],
    "no-cameras": [[(2, 0, 5, 4, 7)], [(2, 1, 5, 2, 3)]],
    "no-channels": [[(2, 2, 0, 4, 7)]],
}


def maps_of(shapes, device: str, *dtypes: torch.dtype) -> list[list[torch.Tensor]]:
    """Contiguous maps of the given shapes, the levels in the dtypes in turn."""
    rng = torch.Generator().manual_seed(0)
    return [
        [torch.randn(s, generator=rng).to(device, d).requires_grad_() for s, d in zip(sizes, itertools.cycle(dtypes))]
        for sizes in shapes
    ]


def row_by_row(groups: list[list[torch.Tensor]]) -> torch.Tensor:
    """The rows of a format, camera by camera and level by level."""
    return torch.cat([m[:, n].flatten(2).mT for maps in groups for n in range(maps[0].shape[1]) for m in maps], 1)


@pytest.mark.interpreted
@pytest.mark.parametrize("shapes", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32,),
        (torch.float16,),
        (torch.bfloat16,),
        (torch.float64,),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float16),
        (torch.float16, torch.bfloat16),
    ],
    ids=str,
)
def test_format_moves_every_element(shapes, dtypes, device):
    groups = maps_of(shapes, device, *dtypes)
    rows, _, _ = saccade.feature_maps_format(groups)
    expected = row_by_row(groups)
    assert rows.dtype == expected.dtype
    assert torch.equal(rows, expected)
    leaves = [feature for maps in groups for feature in maps]
    seed = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1)).to(rows)
    gradients, expected_gradients = (
        torch.autograd.grad(result, leaves, seed, allow_unused=True, materialize_grads=True)
        for result in (rows, expected)
    )
    for leaf, left, right in zip(leaves, gradients, expected_gradients, strict=True):
        assert left.dtype == leaf.dtype
        assert torch.equal(left, right)


@pytest.mark.interpreted
@pytest.mark.parametrize("order", [(0, 1, 3, 4, 2), (0, 1, 2, 4, 3), (1, 0, 2, 3, 4)], ids=str)
def test_format_of_maps_in_other_memory_orders(order, device):
    (maps,) = maps_of([[(2, 3, 6, 5, 7), (2, 3, 6, 2, 3)]], device, torch.float32)
    back = [order.index(axis) for axis in range(5)]
    strided = [maps[0].permute(order).contiguous().permute(back), maps[1]]
    assert torch.equal(saccade.feature_maps_format(strided)[0], row_by_row([maps]))


@pytest.mark.interpreted
def test_contiguous_maps_are_served_by_the_kernel(device, monkeypatch):
    """On a GPU and under the interpreter; channels-last ones are copied as they are."""
    if not served_by_triton(torch.empty(0, device=device)):
        pytest.skip("no kernel serves the CPU")
    from saccade.deformable_aggregation import launch

    calls = []
    of_launch = launch._format_rows
    monkeypatch.setattr(launch, "_format_rows", lambda *args: (calls.append(args[-1].shape), of_launch(*args))[1])
    FEATURE_MAPS_FORMAT.forget()
    groups = maps_of(FORMATS["groups"], device, torch.float32)
    saccade.feature_maps_format(groups)
    assert calls == [(2, 2, 41, 6), (2, 1, 17, 6), (2, 3, 3, 6)]
    saccade.feature_maps_format([groups[0][0].permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)])
    assert len(calls) == 3


def test_format_gives_gradients_to_the_maps_that_require_them(device):
    (maps,) = maps_of([[(1, 2, 3, 4, 5)] * 3], device, torch.float32)
    maps[1].requires_grad_(False)
    saccade.feature_maps_format(maps)[0].sum().backward()
    assert [feature.grad is not None for feature in maps] == [True, False, True]
    with torch.no_grad():
        assert not saccade.feature_maps_format(maps)[0].requires_grad


def test_format_can_be_differentiated_twice_and_written_to(device):
    groups = maps_of(FORMATS["groups"], device, torch.float64)
    leaves = [feature for maps in groups for feature in maps]

    def cubed(*leaves):
        rows, _, _ = saccade.feature_maps_format([leaves[:2], leaves[2:4], leaves[4:]])
        return rows.mul_(1.5) ** 3

    assert torch.autograd.gradcheck(cubed, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(cubed, leaves, fast_mode=True)


def test_gradients_of_the_format_are_views(device):
    maps, rows_gradients, gradients = maps_of([[(2, 2, 3, 4, 5)] * 2], device, torch.float32)[0], [], []
    rows, _, _ = saccade.feature_maps_format(maps)
    rows.register_hook(rows_gradients.append)
    maps[1].register_hook(gradients.append)
    rows.backward(torch.ones_like(rows))
    assert gradients[0].untyped_storage().data_ptr() == rows_gradients[0].untyped_storage().data_ptr()


@pytest.mark.parametrize("shapes", FORMATS.values(), ids=FORMATS)
def test_format_as_an_operator(shapes, device):
    groups = maps_of(shapes, device, torch.float32, torch.bfloat16)
    flat = [feature for maps in groups for feature in maps]
    torch.library.opcheck(torch.ops.saccade.feature_maps_format, (len(groups[0]), flat))


def test_format_in_inference_mode(device):
    with torch.inference_mode():
        maps = [torch.rand(1, 2, 3, 4, 5, device=device)]
        assert torch.equal(saccade.feature_maps_format(maps)[0], row_by_row([maps]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU has nothing to wait for")
def test_format_waits_for_nothing():
    """Not even at the first call with new sizes."""
    saccade.feature_maps_format([torch.rand(1, 2, 16, 4, 4, device="cuda")])  # compiles
    maps = [torch.rand(1, 2, 16, 12, 4, device="cuda", requires_grad=True)]
    seed = torch.rand(1, 96, 16, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(saccade.feature_maps_format(maps)[0], maps, seed)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_format_on_another_gpu_than_the_current_one():
    groups = maps_of(FORMATS["groups"], "cuda:1", torch.float32)
    assert torch.equal(saccade.feature_maps_format(groups)[0], row_by_row(groups))


@pytest.mark.gpu_memory(12)
def test_format_of_more_elements_than_32_bits_count():
    values = torch.arange(2**15 + 1, dtype=torch.float16, device="cuda").expand(2**15, -1)
    maps = [torch.stack([values, -values]).view(1, 1, 2, 2**15, 2**15 + 1)]
    rows, _, _ = saccade.feature_maps_format(maps)
    assert torch.equal(rows.view(2**15, 2**15 + 1, 2).select(2, 1), -values)


def test_index_tensors_are_kept_and_survive_bad_neighbours(device):
    maps = [torch.rand(1, 2, 3, 4, 5, device=device)]
    _, shape, start = saccade.feature_maps_format(maps)
    assert saccade.feature_maps_format(maps)[1] is shape
    with torch.inference_mode():
        _, inner, _ = saccade.feature_maps_format([torch.rand(1, 3, 3, 4, 6, device=device)])
        assert inner.is_inference()
    assert not saccade.feature_maps_format([torch.rand(1, 3, 3, 4, 6, device=device)])[1].is_inference()
    start += 1  # a caller who writes to them must not spoil the next call
    assert saccade.feature_maps_format(maps)[2].tolist() == [[0], [20]]


def test_kept_tensors_do_not_come_from_a_trace(device):
    """What a fake, functional or captured call made must not be handed to the next one."""
    from torch._subclasses import FakeTensorMode

    def index_tensors():
        return saccade.feature_maps_format([torch.rand(1, 2, 3, 7, 11, device=device)])[1:]

    with FakeTensorMode():
        index_tensors()
    torch.func.functionalize(index_tensors)()
    torch.fx.experimental.proxy_tensor.make_fx(index_tensors, tracing_mode="fake")()
    for tensor in index_tensors():
        assert type(tensor) is torch.Tensor
        assert not torch._is_functional_tensor(tensor)
    assert index_tensors()[1].tolist() == [[0], [77]]


@pytest.mark.parametrize("dynamic", [False, True])
def test_format_compiles(device, dynamic):
    torch._dynamo.reset()
    maps = [torch.rand(1, 2, 3, 4, 5, device=device), torch.rand(1, 2, 3, 2, 2, device=device)]
    compiled = torch.compile(saccade.feature_maps_format, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for left, right in zip(compiled(maps), saccade.feature_maps_format(maps), strict=True):
        assert torch.equal(left, right)
    maps[1].requires_grad_()
    compiled(maps)[0].sum().backward()
    assert maps[1].grad is not None
    assert torch.equal(maps[1].grad, torch.ones_like(maps[1]))


def test_format_exports():
    class Head(torch.nn.Module):
        def forward(self, fine, coarse, location, weights):
            return saccade.deformable_aggregation(*saccade.feature_maps_format([fine, coarse]), location, weights)

    inputs = (
        torch.rand(1, 2, 4, 6, 8),
        torch.rand(1, 2, 4, 3, 4),
        torch.rand(1, 5, 3, 2, 2),
        torch.rand(1, 5, 3, 2, 2, 2),
    )
    exported = torch.export.export(Head(), inputs)
    torch.testing.assert_close(exported.module()(*inputs), Head()(*inputs))


def test_format_exports_with_sizes_that_vary():
    class Format(torch.nn.Module):
        def forward(self, fine, coarse):
            return saccade.feature_maps_format([fine, coarse])

    def maps(batch: int, height: int, width: int) -> tuple[torch.Tensor, ...]:
        return torch.rand(batch, 2, 4, 2 * height, width), torch.rand(batch, 2, 4, height, width)

    vary = {0: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO, 4: torch.export.Dim.AUTO}
    exported = torch.export.export(Format(), maps(2, 3, 5), dynamic_shapes=(vary, vary))
    for left, right in zip(exported.module()(*maps(3, 7, 4)), Format()(*maps(3, 7, 4)), strict=True):
        assert left.shape == right.shape


@pytest.mark.parametrize(
    ("maps", "error", "message"),
    [
        ([], ValueError, "feature_maps: expected a list of maps .* got an empty list"),
        (torch.rand(1, 1, 2, 3, 3), ValueError, "feature_maps: expected a list of maps .* got Tensor"),
        ([torch.rand(2, 3, 3)], ValueError, r"feature_maps\[0\]: expected shape \(B, N, C, H, W\)"),
        ([torch.ones(1, 1, 2, 3, 3, dtype=torch.int64)], TypeError, r"feature_maps\[0\]: expected float"),
        (
            [torch.rand(1, 1, 2, 3, 3), torch.rand(1, 1, 4, 3, 3)],
            ValueError,
            r"feature_maps\[1\]: .*C=2, got \(1, 1, 4",
        ),
        (
            [torch.rand(1, 1, 2, 3, 3), torch.rand(1, 1, 2, 3, 3, device="meta")],
            ValueError,
            "expected device cpu, that of the first map, got meta",
        ),
        (
            [[torch.rand(1, 1, 2, 3, 3)], [torch.rand(1, 1, 2, 3, 3)] * 2],
            ValueError,
            r"feature_maps\[1\]: expected 1 levels",
        ),
        ([[torch.rand(1, 1, 2, 3, 3)], [torch.rand(1, 1, 4, 3, 3)]], ValueError, r"feature_maps\[1\]\[0\]: .*C=2"),
        ([[torch.rand(1, 1, 2, 3, 3)], []], ValueError, r"feature_maps\[1\]: .*empty list"),
    ],
)
def test_format_errors(maps, error, message):
    with pytest.raises(error, match=message):
        saccade.feature_maps_format(maps)


def test_meta_tensors_give_shapes():
    inputs = [value.detach().to("meta") for value in make([[(6, 8)]], batch=2, anchors=5, channels=4)]
    assert saccade.deformable_aggregation(*inputs).shape == (2, 5, 4)


def test_absurd_sizes_raise_on_the_cpu():
    features, shape, start, location, weights = make([[(4, 4)]])
    for side in (2**32, 2**62):
        shape = torch.full_like(shape, side)
        with pytest.raises(ValueError, match=rf"{side} x {side} pixels"):
            saccade.deformable_aggregation(features, shape, start, location, weights)


def test_inverse_errors():
    rows, shape, start = saccade.feature_maps_format([torch.rand(1, 1, 2, 3, 3)])
    with pytest.raises(ValueError, match="inverse=True"):
        saccade.feature_maps_format([rows, shape], inverse=True)
    with pytest.raises(ValueError, match="add up to the 8 rows, got 9 pixels"):
        saccade.feature_maps_format([rows[:, 1:], shape, start], inverse=True)
    with pytest.raises(ValueError, match="add up"):
        saccade.feature_maps_format([rows, -shape, start], inverse=True)


@pytest.mark.interpreted
@pytest.mark.parametrize("rows_of_window", [1, 2, 5])
@pytest.mark.parametrize("spread", [1.2, 0.02], ids=["everywhere", "on-few-pixels"])
def test_every_row_gets_its_gradient_however_the_work_is_shared_out(device, monkeypatch, rows_of_window, spread):
    """Windows that hold less than a row, one row, or some; the batch in one part and sample by sample."""
    if not served_by_triton(torch.empty(0, device=device)):
        pytest.skip("no kernel serves the CPU")
    from saccade.deformable_aggregation import launch, reference

    monkeypatch.setattr(launch, "_ROWS_OF_WINDOW", rows_of_window)
    monkeypatch.setattr(launch, "_SCANNED", 16)
    monkeypatch.setattr(launch, "_CLEARED", 16)
    features, shape, start, location, weights = (
        each.detach().to(device, torch.float64 if each.is_floating_point() else None)
        for each in make([[(3, 4), (1, 2)], [(2, 5), (1, 1)]], batch=2, anchors=8, points=4, spread=spread)
    )
    grad_output = torch.randn(2, 8, 4, dtype=torch.float64).to(device)
    inputs = (shape, start, location, weights, [True] * 3)
    *expected, (of_features,) = reference.deformable_aggregation_backward(grad_output, [features], *inputs)
    expected = [of_features, *expected]
    for scratch, most_for_32_bits in ((1, 1 << 20), (1 << 20, 0)):
        monkeypatch.setattr(launch, "_SCRATCH_BYTES", scratch)
        monkeypatch.setattr(launch, "_SCRATCH_SHARE", 0)
        monkeypatch.setattr(launch, "_MOST_FOR_32_BITS", most_for_32_bits)
        args = grad_output, [features], *inputs
        *rest, (grad_features,) = launch.prepare_aggregation_backward(*args)(*args)
        for actual, wanted in zip((grad_features, *rest), expected, strict=True):
            assert (actual - wanted).norm() <= 1e-12 * wanted.norm()
        args = [features], *inputs[:-1]
        output = launch.prepare_aggregation(*args)(*args)
        wanted = reference.deformable_aggregation([features], *inputs[:-1])
        assert (output - wanted).norm() <= 1e-12 * wanted.norm()


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_every_count_is_summed_up_whichever_program_begins_first(device, dtype):
    """On a GPU more programs than run at a time, each of which waits for all before it."""
    if not served_by_triton(torch.empty(0, device=device)):
        pytest.skip("no kernel serves the CPU")
    from saccade.deformable_aggregation.backward_kernels import scan_kernel
    from saccade.operator.launch import LaunchSequence, Part, cdiv, dependent_launch

    sizes, block, beside = ((3_000_001, 1, 1023), 512, 256) if device == "cuda" else ((1, 16, 100), 16, 4)
    for size in sizes:
        counts = torch.randint(0, 700, (size,), dtype=dtype).to(device)
        programs = cdiv(size, block)
        said = torch.zeros(1 + programs, dtype=torch.int64, device=device)
        scan = scan_kernel.of_parts(
            (programs,), Part(0), Part(1), size, BLOCK=block, BESIDE=beside, **dependent_launch(counts.device)
        )
        expected = counts.cumsum(0, dtype=dtype)
        for _ in range(20 if device == "cuda" else 1):
            result = counts.clone()
            LaunchSequence(2, [scan])([result, said.zero_()])
            assert torch.equal(result, expected)
