"""All that draws heatmaps, and ``gaussian_radius``: values to check on paper, borders, errors."""

import math
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import saccade
from cases.gaussian_heatmap import batched_oracle, draw_one, flat_oracle, make_batched, make_flat
from saccade.argument_checks import InvalidStateError
from saccade.gaussian_heatmap import reference
from saccade.ragged import RaggedBatch
from saccade.triton_dispatch import triton_is_installed

GIANT = 2**63 - 1
ROUNDING = 2e-7  # of numbers up to 1 in float32: two ulps, as a GPU's power of 2 is wrong by more than one
CONVENTIONS: list[Literal["mmdet", "mmdet3d"]] = ["mmdet", "mmdet3d"]


def drawn(targets: list[tuple[int, int, int]], size=(20, 50), device="cpu", dtype=torch.float32, **options) -> Tensor:
    """A cleared map (H, W) with the targets (x, y, radius) drawn into it."""
    heatmaps = torch.zeros(1, *size, device=device, dtype=dtype)
    table = torch.tensor(targets, device=device).reshape(-1, 3)
    saccade.draw_heatmap(heatmaps, table[:, :2], table[:, 2], torch.zeros_like(table[:, 2]), **options)
    return heatmaps[0]


@pytest.mark.interpreted
def test_a_map_to_check_on_paper(device):
    edge, corner = math.exp(-2), math.exp(-4)  # sigma = 3 / 6: exp(-1 / (2 * 0.25)) beside the centre
    expected = torch.tensor([[corner, edge, corner], [edge, 1, edge], [corner, edge, corner]], device=device)
    torch.testing.assert_close(drawn([(1, 1, 1)], (3, 3), device), expected)
    assert edge == pytest.approx(0.13533528, rel=1e-6)
    assert corner == pytest.approx(0.01831564, rel=1e-6)


@pytest.mark.interpreted
def test_values_of_radius_2(device):
    cells = drawn([(4, 4, 2)], (9, 9), device)
    for (i, j), value in {
        (0, 0): 1.0,
        (0, 1): 0.48675226,
        (0, 2): 0.05613476,
        (1, 1): 0.23692776,
        (1, 2): 0.02732372,
        (2, 2): 0.00315111,
    }.items():
        for down, right in ((i, j), (j, i), (-i, j), (-j, -i)):
            assert cells[4 + down, 4 + right].item() == pytest.approx(value, abs=ROUNDING)
    assert (cells > 0).sum() == 25


@pytest.mark.interpreted
def test_radius_0_is_the_centre_alone(device):
    cells = drawn([(3, 2, 0)], (5, 6), device)
    assert cells.nonzero().tolist() == [[2, 3]]
    assert cells[2, 3] == 1


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("x", "y", "radius", "count", "rows", "columns", "peak"),
    [
        (49, 19, 3, 16, (16, 19), (46, 49), 1.0),
        (-1, 3, 2, 10, (1, 5), (0, 1), 0.48675226),
        (51, 5, 2, 5, (3, 7), (49, 49), 0.0561348),
        (25, 22, 3, 7, (19, 19), (22, 28), 0.0366580),  # exp(-3**2 / (2 * (7 / 6)**2))
    ],
)
def test_windows_over_the_edges(x, y, radius, count, rows, columns, peak, device):
    cells = drawn([(x, y, radius)], device=device)
    touched = cells.nonzero()
    assert len(touched) == count
    assert (touched[:, 0].min(), touched[:, 0].max()) == rows
    assert (touched[:, 1].min(), touched[:, 1].max()) == columns
    assert cells.max().item() == pytest.approx(peak, abs=ROUNDING)


@pytest.mark.interpreted
@pytest.mark.parametrize(
    "center", [(52, 5), (-5, 3), (-3, 3), (5, 22), (5, -3), (GIANT, 0), (0, -GIANT), (-GIANT - 1, 0)]
)
def test_windows_off_the_map_draw_nothing(center, device):
    assert not drawn([(*center, 2)], device=device).any()


@pytest.mark.interpreted
@pytest.mark.parametrize("radius", [-1, -7, -GIANT - 1])
def test_a_negative_radius_draws_nothing(radius, device):
    assert not drawn([(3, 3, radius), (-3, 3, radius), (GIANT, -GIANT - 1, radius)], device=device).any()


@pytest.mark.interpreted
def test_overlapping_targets_keep_the_larger_value(device):
    edge, corner = math.exp(-2), math.exp(-4)
    expected = torch.tensor(
        [[corner, edge, edge, corner], [edge, 1, 1, edge], [corner, edge, edge, corner]], device=device
    )
    torch.testing.assert_close(drawn([(1, 1, 1), (2, 1, 1)], (3, 4), device), expected)


@pytest.mark.interpreted
def test_what_is_in_the_map_takes_part(device):
    heatmaps = torch.full((1, 1, 3), 0.5, device=device)
    heatmaps[0, 0, 2] = -1
    index = torch.zeros(1, dtype=torch.int64, device=device)
    saccade.draw_heatmap(heatmaps, torch.tensor([[1, 0]], device=device), index + 1, index)
    torch.testing.assert_close(heatmaps, torch.tensor([[[0.5, 1.0, math.exp(-2)]]], device=device))


@pytest.mark.interpreted
@pytest.mark.parametrize("k_scale", [0.8, 0.3, 2.0, 1e-20])
def test_the_peak_is_exactly_the_scale(k_scale, device):
    for radius in (0, 1, 5, 100):
        cells = drawn([(3, 2, radius)], (5, 6), device, k_scale=k_scale)
        assert cells[2, 3] == torch.tensor(k_scale, dtype=cells.dtype)
        assert (cells == cells[2, 3]).sum() == 1


@pytest.mark.interpreted
def test_a_scale_that_is_not_positive_raises_no_cell(device):
    assert not drawn([(3, 2, 2)], (5, 6), device, k_scale=0).any()
    assert not drawn([(3, 2, 2)], (5, 6), device, k_scale=-1.0).any()
    low = torch.full((1, 1, 1), -3.0, device=device)
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    saccade.draw_heatmap(low, torch.zeros(1, 2, dtype=torch.int64, device=device), zero, zero, k_scale=-2.0)
    assert low.item() == -2


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_factors(dtype, device):
    for factor in (1e10, 1e30, 1e300):  # sigma too small to matter, or to be a number: the peaks alone
        cells = drawn([(3, 2, 2), (0, 0, 0)], (5, 6), device, dtype, diameter_to_sigma_factor=factor)
        assert cells.nonzero().tolist() == [[0, 0], [2, 3]]
        assert cells.max() == 1
    for factor in (1e-10, 1e-300):  # sigma too large to matter: a square of ones
        cells = drawn([(3, 2, 1)], (5, 6), device, dtype, diameter_to_sigma_factor=factor)
        assert cells.sum() == 9


@pytest.mark.interpreted
def test_giant_coordinates_do_not_overflow(device):
    # The map lies at the middle of the window, or next to its edge, as seen from sigma = (2r + 1) / 6.
    flat = drawn([(0, 0, GIANT)], (3, 4), device)
    assert torch.equal(flat, torch.ones_like(flat))
    edge = drawn([(2**62 - 1, 0, 2**62 - 1)], (3, 4), device)
    torch.testing.assert_close(edge, torch.full_like(edge, math.exp(-4.5)))
    for dtype in (torch.int32, torch.int64):
        heatmaps = torch.zeros(1, 3, 4, device=device)
        limit = torch.iinfo(dtype).max
        center = torch.tensor([[limit - 5, -5]], dtype=dtype, device=device)
        zero = torch.zeros(1, dtype=dtype, device=device)
        saccade.draw_heatmap(heatmaps, center, zero + limit - 1, zero)
        assert (heatmaps > 0.01).all()
        torch.testing.assert_close(heatmaps, torch.full_like(heatmaps, math.exp(-4.5)), rtol=1e-6, atol=1e-6)


def test_a_large_gaussian_among_small_ones(device):
    targets = [(i % 90, i % 70, i % 3) for i in range(400)]
    targets.insert(200, (45, 35, 60))
    expected = torch.zeros(70, 90, dtype=torch.float64)
    for target in targets:
        draw_one(expected, *target)
    cells = drawn(targets, (70, 90), device)
    torch.testing.assert_close(cells.cpu().double(), expected, rtol=3e-6, atol=1e-9)


def test_more_cells_than_one_block(device):
    """Several hundred thousand cells, so that windows are cut by the blocks in which they are drawn."""
    heatmaps = torch.zeros(2, 150, 200, device=device)
    centers = torch.tensor([[100, 75]] * 20, device=device) + torch.arange(20, device=device)[:, None]
    indices = torch.arange(20, device=device) % 2
    saccade.draw_heatmap(heatmaps, centers, torch.full_like(indices, 130), indices, 2.0)
    y, x = torch.meshgrid(torch.arange(150.0), torch.arange(200.0), indexing="ij")
    for m in range(2):
        squared = [(x - 100 - i) ** 2 + (y - 75 - i) ** 2 for i in range(m, 20, 2)]
        expected = torch.exp(-torch.stack(squared).amin(0) / (2 * (261 / 2) ** 2))
        torch.testing.assert_close(heatmaps[m].cpu(), expected, rtol=2e-6, atol=1e-7)


@pytest.mark.interpreted
def test_order_and_repetition_do_not_matter(device):
    heatmaps, centers, radii, indices = (value.to(device) for value in make_flat(targets=40))
    first, second = heatmaps.clone(), heatmaps.clone()
    saccade.draw_heatmap(first, centers, radii, indices)
    saccade.draw_heatmap(second, centers.flip(0), radii.flip(0), indices.flip(0))
    saccade.draw_heatmap(second, centers, radii, indices)
    assert torch.equal(first, second)


sizes = st.tuples(st.integers(1, 9), st.integers(1, 9))


@given(
    targets=st.lists(
        st.tuples(st.integers(-8, 16), st.integers(-8, 16), st.integers(-2, 9), st.integers(0, 2)), max_size=8
    ),
    size=sizes,
    factor=st.floats(0.5, 20),
    k_scale=st.floats(0.1, 3),
    double=st.booleans(),
)
def test_equals_the_definition(targets, size, factor, k_scale, double):
    heatmaps = torch.zeros(3, *size, dtype=torch.float64 if double else torch.float32)
    table = torch.tensor(targets, dtype=torch.int64).reshape(-1, 4)
    expected = heatmaps.double()
    flat_oracle(expected, table[:, :2], table[:, 2], table[:, 3], factor, k_scale)
    saccade.draw_heatmap(heatmaps, table[:, :2], table[:, 2], table[:, 3], factor, k_scale)
    tolerance = 1e-12 if double else 1e-5  # float32 rounds an exponent of up to 100 to 1e-5
    torch.testing.assert_close(heatmaps.double(), expected, rtol=tolerance, atol=1e-12 if double else 1e-7)
    assert torch.equal(heatmaps > 1e-30, expected > 1e-30)


@given(
    batch=st.integers(0, 3),
    classes=st.one_of(st.none(), st.integers(1, 3)),
    slots=st.integers(0, 6),
    size=sizes,
    counts=st.lists(st.integers(-3, 9), min_size=3, max_size=3),
    sizes_dtype=st.sampled_from([torch.int64, torch.int32, torch.int16]),
)
def test_batched_equals_the_definition(batch, classes, slots, size, counts, sizes_dtype):
    heatmap, centers, radii, _, labels = make_batched(batch, classes, slots, *size)
    valid = torch.arange(slots) < torch.tensor(counts[:batch]).reshape(batch, 1)
    if labels is not None:
        labels = torch.where(valid, labels.clamp(min=0), -GIANT)
    expected = heatmap.clone()
    batched_oracle(expected, centers, radii, torch.tensor(counts[:batch]), labels)
    sample_sizes = torch.tensor(counts[:batch], dtype=sizes_dtype)
    saccade.draw_heatmap_batched(heatmap, RaggedBatch(centers, sample_sizes=sample_sizes), radii, labels=labels)
    torch.testing.assert_close(heatmap, expected, rtol=2e-6, atol=1e-9)


@pytest.mark.interpreted
def test_padding_is_never_looked_at(device):
    heatmap, centers, radii, counts, labels = (
        value.to(device) for value in make_batched(classes=4) if value is not None
    )
    expected = heatmap.clone()
    saccade.draw_heatmap_batched(expected, centers, radii, labels=labels, counts=counts)
    padding = torch.arange(5, device=device) >= counts[:, None]
    for garbage in (0, 3, GIANT, -GIANT - 1):
        again = heatmap.clone()
        radii, labels = radii.masked_fill(padding, abs(garbage) % 2**63), labels.masked_fill(padding, garbage)
        centers = centers.masked_fill(padding[..., None], garbage)
        saccade.draw_heatmap_batched(again, centers, radii, labels=labels, counts=counts)
        assert torch.equal(again, expected)


def test_only_the_sizes_of_the_centers_count(device):
    heatmap = torch.zeros(2, 1, 4, device=device)
    ones = torch.ones(2, dtype=torch.int64, device=device)
    centers = RaggedBatch(torch.tensor([[[0, 0], [3, 0]]] * 2, device=device), sample_sizes=ones)
    radii = RaggedBatch(torch.zeros(2, 2, dtype=torch.int64, device=device), sample_sizes=2 * ones)
    saccade.draw_heatmap_batched(heatmap, centers, radii)
    assert heatmap.flatten().tolist() == [1, 0, 0, 0] * 2


def test_any_object_with_tensor_and_sample_sizes_will_do(device):
    heatmap = torch.zeros(1, 1, 4, device=device)
    sizes = torch.tensor([1], device=device)
    centers = SimpleNamespace(tensor=torch.tensor([[[2, 0], [3, 0]]], device=device), sample_sizes=sizes)
    radii = SimpleNamespace(tensor=torch.zeros(1, 2, dtype=torch.int32, device=device), sample_sizes=None)
    saccade.draw_heatmap_batched(heatmap, centers, radii)
    assert heatmap.flatten().tolist() == [0, 0, 1, 0]


def test_a_mask_serves_as_well_as_sizes(device):
    heatmap = torch.zeros(1, 1, 4, device=device)
    mask = torch.tensor([[True, True, False]], device=device)
    centers = RaggedBatch(torch.tensor([[[2, 0], [0, 0], [3, 0]]], device=device), mask)
    saccade.draw_heatmap_batched(heatmap, centers, torch.zeros(1, 3, dtype=torch.int64, device=device))
    assert heatmap.flatten().tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize("shape", [(2, 0, 5), (2, 5, 0), (0, 4, 5), (2, 3, 0, 5), (2, 0, 4, 5), (0, 3, 4, 5)])
def test_nothing_to_draw_on(shape, device):
    zeros = torch.zeros(shape[0], 3, dtype=torch.int64, device=device)
    centers = RaggedBatch(torch.zeros(shape[0], 3, 2, dtype=torch.int64, device=device), sample_sizes=zeros[:, 0] + 3)
    heatmap = torch.empty(shape, device=device)
    saccade.draw_heatmap_batched(heatmap, centers, zeros, labels=zeros if len(shape) == 4 else None)
    if len(shape) == 3:
        saccade.draw_heatmap(heatmap, centers[:, 0], zeros[:, 0], zeros[:, 0] + 7)


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k_scale", [0.7, 0.0, -0.7])
def test_maps_and_scales_of_both_signs(k_scale, dtype, device):
    """Kernels compare the bits of numbers, whose order is another one below 0."""
    heatmaps, centers, radii, indices = make_flat(targets=20)
    heatmaps = (torch.randn(heatmaps.shape, generator=torch.Generator().manual_seed(0)) - k_scale).to(dtype)
    expected = heatmaps.double().clone()
    flat_oracle(expected, centers, radii, indices, 6.0, k_scale)
    assert (expected > heatmaps).sum() > 20
    drawn_on = heatmaps.to(device)
    saccade.draw_heatmap(drawn_on, *(value.to(device) for value in (centers, radii, indices)), k_scale=k_scale)
    torch.testing.assert_close(drawn_on.cpu().double(), expected, rtol=2e-6, atol=1e-7)


@pytest.mark.interpreted
def test_a_drop_of_minus_nothing_fills_a_deep_map(device):
    """Far from the peak of a negative scale there is minus 0, which is above all that is negative."""
    deep = torch.full((1, 1, 9), -3.0, device=device)
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    center = torch.zeros(1, 2, dtype=torch.int64, device=device)
    saccade.draw_heatmap(deep, center, zero + 8, zero, 1000.0, -2.0)
    assert deep.flatten().tolist() == [-2] + [0] * 8


# ---- ellipses


@pytest.mark.interpreted
def test_an_ellipse_to_check_on_paper(device):
    """radii (x, y) = (2, 1): sigma 5 / 6 along x and 3 / 6 along y, in a rectangle of 5 x 3."""
    heatmaps = torch.zeros(1, 5, 7, device=device)
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    radii, center = torch.tensor([[2, 1]], device=device), torch.tensor([[3, 2]], device=device)
    saccade.draw_heatmap(heatmaps, center, radii, zero)
    along = torch.tensor([math.exp(-(j**2) / (2 * (5 / 6) ** 2)) for j in (-2, -1, 0, 1, 2)], device=device)
    down = torch.tensor([math.exp(-2), 1, math.exp(-2)], device=device)
    expected = torch.zeros(5, 7, device=device)
    expected[1:4, 1:6] = down[:, None] * along
    torch.testing.assert_close(heatmaps[0], expected)


@pytest.mark.interpreted
def test_an_ellipse_of_equal_radii_is_a_circle(device):
    heatmap, centers, radii, counts, labels = (
        value.to(device) for value in make_batched(classes=3) if value is not None
    )
    circles, ellipses = heatmap.clone(), heatmap.clone()
    saccade.draw_heatmap_batched(circles, centers, radii, labels=labels, counts=counts)
    both = radii[..., None].expand(-1, -1, 2)
    saccade.draw_heatmap_batched(ellipses, centers, both, labels=labels, counts=counts)
    assert torch.equal(circles, ellipses)


@pytest.mark.interpreted
@pytest.mark.parametrize("radii", [(0, 0), (0, 5), (5, 0), (2, 2), (3, 0)])
def test_small_radii_of_ellipses_make_no_nan(radii, device):
    """mmdet3d's sigma is 0 there."""
    heatmaps = torch.zeros(1, 15, 15, device=device)
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    saccade.draw_heatmap(heatmaps, torch.tensor([[7, 7]], device=device), torch.tensor([radii], device=device), zero)
    assert heatmaps[0, 7, 7] == 1
    assert (heatmaps > 0).sum() == (2 * radii[0] + 1) * (2 * radii[1] + 1)


@pytest.mark.interpreted
def test_an_ellipse_with_one_negative_radius_draws_nothing(device):
    heatmaps = torch.zeros(1, 5, 5, device=device)
    radii = torch.tensor([[2, -1], [-1, 2], [-GIANT, GIANT]], device=device)
    zero = torch.zeros(3, dtype=torch.int64, device=device)
    saccade.draw_heatmap(heatmaps, torch.full_like(radii, 2), radii, zero)
    assert not heatmaps.any()


# ---- fresh maps


@pytest.mark.parametrize("classes", [None, 3])
def test_fresh_maps_are_those_of_drawing_into_zeros(classes, device):
    _, centers, radii, counts, labels = (
        value if value is None else value.to(device) for value in make_batched(classes=classes)
    )
    expected = torch.zeros(*((4,) if classes is None else (4, classes)), 7, 9, device=device)
    saccade.draw_heatmap_batched(expected, centers, radii, 5.0, 0.5, labels, counts=counts)
    options = {"num_classes": classes, "diameter_to_sigma_factor": 5.0, "k_scale": 0.5}
    fresh = saccade.heatmap_targets(centers, radii, (7, 9), labels=labels, counts=counts, **options)
    assert fresh.dtype == torch.float32
    assert torch.equal(fresh, expected)
    ragged = RaggedBatch(centers, sample_sizes=counts)
    like_centers = ragged.create_with_sample_sizes_like_self
    fresh = saccade.heatmap_targets(
        ragged, like_centers(radii), [7, 9], labels=None if labels is None else like_centers(labels), **options
    )
    assert torch.equal(fresh, expected)


def test_fresh_maps_are_float32_whatever_the_default(device):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        targets = (
            torch.zeros(1, 1, 2, dtype=torch.int64, device=device),
            torch.zeros(1, 1, dtype=torch.int64, device=device),
        )
        fresh = saccade.heatmap_targets(*targets, (2, 3), counts=torch.ones(1, dtype=torch.int64, device=device))
    finally:
        torch.set_default_dtype(before)
    assert fresh.dtype == torch.float32
    assert fresh.nonzero().tolist() == [[0, 0, 0]]


# ---- boxes


def of_boxes(
    table: list[list[float]],
    size=(20, 20),
    stride: float | tuple[float, float] = 1,
    overlap=0.7,
    radius="mmdet",
    **options,
):
    """The map (H, W) of one sample of boxes without labels."""
    device = options.pop("device", "cpu")
    boxes = torch.tensor([table], dtype=torch.float64, device=device).reshape(1, -1, 4)
    counts = torch.tensor([len(table)], device=device)
    return saccade.boxes_to_heatmap(boxes, None, size, stride, overlap, radius, counts=counts, **options)[0]


def radius_around_the_middle(cells: Tensor) -> int:
    """Of the one square window that was drawn."""
    side = math.isqrt(int((cells > 0).sum()))
    assert side**2 == (cells > 0).sum()
    return side // 2


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("size", "overlap", "mmdet", "mmdet3d"),
    [
        ((10, 20), 0.7, 1, 3),
        ((10, 20), 0.3, 2, 6),
        ((10, 20), 0.1, 4, 6),
        ((4, 4), 0.5, 0, 1),
        ((100, 100), 0.7, 8, 27),
    ],
)
def test_boxes_have_the_radii_of_the_libraries(size, overlap, mmdet, mmdet3d, device):
    height, width = size
    box = [30.5 - width / 2, 31.5 - height / 2, 30.5 + width / 2, 31.5 + height / 2]
    for convention, expected in zip(CONVENTIONS, (mmdet, mmdet3d), strict=True):
        cells = of_boxes([box], (61, 61), 1, overlap, convention, device=device)
        assert cells[31, 30] == 1
        assert radius_around_the_middle(cells) == expected
        cells = of_boxes([box], (61, 61), 1, overlap, convention, min_radius=5, device=device)
        assert radius_around_the_middle(cells) == max(5, expected)


@given(
    width=st.floats(0.5, 160),
    height=st.floats(0.5, 160),
    overlap=st.floats(0.05, 0.95),
    stride=st.sampled_from([1, 4, 3.2]),
)
def test_radii_of_boxes_are_those_of_gaussian_radius(width, height, overlap, stride):
    for convention in CONVENTIONS:
        sizes = height / stride, width / stride
        expected = saccade.gaussian_radius(sizes, overlap, convention=convention)
        cells = of_boxes(
            [[82 * stride, 82 * stride, width, height]], (165, 165), stride, overlap, convention, box_format="cxcywh"
        )
        assert radius_around_the_middle(cells) == int(expected)


@pytest.mark.interpreted
def test_radii_that_are_whole_numbers(device):
    """At overlap 0.25 the radius of a square is a quarter of its side: nothing may round it down."""
    for side in (4, 8, 20, 40):
        cells = of_boxes([[30, 30, side, side]], (61, 61), 1, 0.25, box_format="cxcywh", device=device)
        assert radius_around_the_middle(cells) == side // 4


@pytest.mark.interpreted
def test_centres_of_boxes_are_cut_off_towards_zero(device):
    def cell(x: float, y: float) -> list[list[int]]:
        return of_boxes([[x, y, 1, 1]], (4, 5), (2.0, 1.0), box_format="cxcywh", device=device).nonzero().tolist()

    assert cell(3.9, 1.9) == [[1, 1]]
    assert cell(-1.9, -0.9) == [[0, 0]]  # half a cell before the map is still its first
    assert cell(9.99, 3.99) == [[3, 4]]
    for outside in ((-2.0, 1), (1, -1.0), (10, 1), (1, 4), (1e300, 1), (1, -1e300), (math.inf, 1), (math.nan, 1)):
        assert cell(*outside) == []


@pytest.mark.interpreted
def test_boxes_without_area_are_skipped(device):
    sizes = [(0, 3), (3, 0), (-3, 3), (3, -3), (math.nan, 3), (3, math.nan)]
    assert not of_boxes([[5, 5, *size] for size in sizes], box_format="cxcywh", device=device).any()
    assert not of_boxes([[7, 5, 5, 7], [5, 7, 7, 5], [5, 5, 5, 5]], device=device).any()


@pytest.mark.interpreted
def test_boxes_of_any_size(device):
    flat = of_boxes([[2, 2, 1e200, 1e200]], (4, 5), box_format="cxcywh", device=device)
    assert torch.equal(flat, torch.ones_like(flat))
    point = of_boxes([[2, 2, 1e-300, 1e-300]], (4, 5), box_format="cxcywh", device=device)
    assert point.nonzero().tolist() == [[2, 2]]


def test_a_view_from_above_as_a_centre_head_sees_it(device):
    """Metres, with an origin below 0 and cells of 0.8 m: point clouds of +-51.2 m, voxels of 0.2 m, stride 4."""
    boxes = torch.tensor([[[-51.2, -51.0, 4.0, 2.0], [0.0, 10.0, 12.0, 3.0], [51.3, 0.0, 4.0, 2.0]]], device=device)
    counts, labels = torch.tensor([3], device=device), torch.tensor([[0, 1, 1]], device=device)
    heatmap = saccade.boxes_to_heatmap(
        boxes, labels, (128, 128), 0.8, 0.1, "mmdet3d", num_classes=2, counts=counts, min_radius=2,
        box_format="cxcywh", origin=(-51.2, -51.2),
    )  # fmt: skip
    assert (heatmap == 1).nonzero().tolist() == [[0, 0, 0, 0], [0, 1, 76, 64]]
    assert (heatmap[0, 0] > 0).sum() == 9  # radius 2, a quarter of it on the map
    long_one = int(saccade.gaussian_radius((3 / 0.8, 12 / 0.8), 0.1, convention="mmdet3d"))
    assert (heatmap[0, 1] > 0).sum() == (2 * long_one + 1) ** 2


@pytest.mark.interpreted
def test_padding_of_boxes_is_never_looked_at(device):
    boxes = torch.full((2, 3, 4), math.nan, device=device)
    boxes[0, 0], boxes[0, 1] = torch.tensor([1.0, 1, 2, 2]), torch.tensor([3.0, 3, 4, 4])
    boxes[1, 1] = boxes[0, 0]  # padding that would show
    labels = torch.full((2, 3), GIANT, device=device)
    labels[0, :2] = torch.tensor([0, 1])
    heatmap = saccade.boxes_to_heatmap(
        boxes, labels, (5, 5), 1, 0.7, "mmdet", num_classes=2, counts=torch.tensor([2, 0], device=device)
    )
    assert heatmap.nonzero().tolist() == [[0, 0, 1, 1], [0, 1, 3, 3]]


def test_labels_of_boxes(device):
    boxes = torch.tensor([[[1.0, 1, 2, 2], [3, 3, 4, 4], [9, 9, 10, 10]]], device=device)
    labels, counts = torch.tensor([[1, 2, 7]], device=device), torch.tensor([3], device=device)

    def draw(labels: Tensor) -> list[list[int]]:
        of_classes = {"num_classes": 3, "counts": counts}
        return saccade.boxes_to_heatmap(boxes, labels, (5, 5), 1, 0.7, "mmdet", **of_classes).nonzero().tolist()

    assert draw(labels) == [[0, 1, 1, 1], [0, 2, 3, 3]]  # of a box off the map any label will do
    for bad in (-1, 3, 2**40, -GIANT - 1):
        labels[0, 1] = bad
        if device == "cuda":
            assert draw(labels) == [[0, 1, 1, 1]]
        with (
            saccade.debug_checks(True),
            pytest.raises(ValueError, match=r"labels: expected values in \[0, 3\), got .* at \[0, 1\]"),
        ):
            draw(labels)


# ---- clearing


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("slots", [0, 3])
def test_clearing_is_drawing_into_zeros(slots, dtype, device):
    generator = torch.Generator().manual_seed(1)
    centers = torch.randint(0, 9, (2, slots, 2), generator=generator).to(device)
    radii = torch.randint(0, 5, (2, slots), generator=generator).to(device)
    labels = torch.randint(0, 4, (2, slots), generator=generator).to(device)
    counts = torch.tensor([slots, slots // 2], device=device)
    old = torch.full((2, 4, 9, 8), torch.nan, dtype=dtype, device=device)
    cleared = torch.zeros_like(old)
    for heatmap, clear in (old, True), (cleared, False):
        saccade.draw_heatmap_batched(heatmap, centers, radii, labels=labels, counts=counts, clear=clear)
    assert torch.equal(old, cleared)
    assert (old == 1).any() == (slots > 0)

    old.fill_(torch.inf)
    cleared.zero_()
    for heatmap, clear in (old, True), (cleared, False):
        maps = heatmap.view(8, 9, 8)
        saccade.draw_heatmap(maps, centers.flatten(0, 1), radii.flatten(), labels.flatten() + 4, clear=clear)
    assert torch.equal(old, cleared)
    assert (old[1] == 1).any() == (slots > 0)
    assert not old[0].any()


@pytest.mark.interpreted
def test_clearing_a_large_map_leaves_what_lies_behind_it(device):
    memory = torch.ones(20_001, device=device)
    index = torch.zeros(1, dtype=torch.int64, device=device)
    saccade.draw_heatmap(memory[:20_000].view(1, 100, 200), torch.stack([index, index], 1), index, index, clear=True)
    assert memory[[0, -1]].tolist() == [1, 1]
    assert not memory[1:-1].any()


def test_clear_is_true_or_false(device):
    heatmap, centers, radii, counts = simple_targets(device)
    with pytest.raises(TypeError, match="clear: expected True or False, got 1"):
        saccade.draw_heatmap_batched(heatmap, centers, radii, counts=counts, clear=1)
    with pytest.raises(TypeError, match="clear: expected True or False, got None"):
        saccade.draw_heatmap(heatmap, centers[0], radii[0], radii[0] - 1, clear=None)


# ---- what autograd and torch.compile see


def _draw_flat(heatmap: Tensor, centers: Tensor, radii: Tensor, counts: Tensor) -> None:
    saccade.draw_heatmap(heatmap, centers[:, 0], radii[:, 0], torch.zeros_like(counts))


def _draw_batched(heatmap: Tensor, centers: Tensor, radii: Tensor, counts: Tensor) -> None:
    saccade.draw_heatmap_batched(heatmap, centers, radii, counts=counts)


def _clear_and_draw(heatmap: Tensor, centers: Tensor, radii: Tensor, counts: Tensor) -> None:
    saccade.draw_heatmap_batched(heatmap, centers, radii, counts=counts, clear=True)


all_forms = pytest.mark.parametrize("draw", [_draw_flat, _draw_batched, _clear_and_draw])


def simple_targets(device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    centers = torch.tensor([[[1, 0]]], device=device)
    ones = torch.ones(1, 1, dtype=torch.int64, device=device)
    return torch.zeros(1, 2, 3, device=device), centers, ones, ones[0]


@all_forms
def test_a_tensor_saved_before_the_drawing_is_not_used_in_its_changed_form(draw, device):
    heatmap, *targets = simple_targets(device)
    leaf = torch.ones(1, 2, 3, device=device, requires_grad=True)
    product = (leaf * heatmap).sum()
    version = heatmap._version
    draw(heatmap, *targets)
    assert heatmap._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@all_forms
def test_the_version_counts_even_if_a_kernel_writes_past_torch(draw, monkeypatch):
    monkeypatch.setattr(reference, "draw_heatmap", lambda heatmaps, *_: heatmaps.numpy().fill(1))
    heatmap, *targets = simple_targets("cpu")
    version = heatmap._version
    draw(heatmap, *targets)
    assert heatmap.all()
    assert heatmap._version == version + 1


@all_forms
def test_compiled_drawing_changes_the_callers_map(draw, device):
    heatmap, *targets = simple_targets(device)
    expected = heatmap.clone()
    draw(expected, *targets)

    def step(heatmap, *targets):
        before = heatmap.sum()  # must be read before the drawing, and the rest after it
        draw(heatmap.view_as(heatmap), *targets)
        return before, heatmap.sum()

    version = heatmap._version
    torch._dynamo.reset()
    before, after = torch.compile(step, backend="aot_eager", fullgraph=True)(heatmap, *targets)
    assert torch.equal(heatmap, expected)
    assert heatmap._version > version
    assert (before, after) == (0, expected.sum())


@all_forms
def test_a_version_counts_in_compiled_code_too(draw, device):
    heatmap, *targets = simple_targets(device)
    leaf = torch.ones(1, 2, 3, device=device, requires_grad=True)
    product = (leaf * heatmap).sum()
    torch._dynamo.reset()
    torch.compile(draw, backend="aot_eager", fullgraph=True)(heatmap, *targets)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@all_forms
def test_drawing_in_inference_mode(draw, device):
    heatmap, *targets = simple_targets(device)
    expected = heatmap.clone()
    draw(expected, *targets)
    version = heatmap._version
    with torch.inference_mode():
        draw(heatmap, *targets)  # a map of normal mode
        made_here = torch.zeros(1, 2, 3, device=device)
        draw(made_here, *targets)
    assert heatmap._version > version
    assert torch.equal(heatmap, expected)
    assert torch.equal(made_here, expected)


def test_a_compiled_function_takes_ragged_batches(device):
    heatmap, centers, radii, counts = simple_targets(device)
    expected = heatmap.clone()
    _draw_batched(expected, centers, radii, counts)

    def draw(heatmap, centers, radii):
        saccade.draw_heatmap_batched(heatmap, centers, radii)

    torch._dynamo.reset()
    ragged = RaggedBatch(centers, sample_sizes=counts), RaggedBatch(radii, sample_sizes=counts)
    torch.compile(draw, backend="aot_eager", fullgraph=True)(heatmap, *ragged)
    assert torch.equal(heatmap, expected)


# ---- faults


@pytest.mark.parametrize("bad", [-1, 3, 2**40, -(2**40)])
def test_a_map_that_does_not_exist(bad):
    heatmaps, centers, radii, indices = make_flat(maps=3, targets=4)
    radii[:] = torch.tensor([1, -1, 1, 1])
    indices[1] = 77  # of a target that draws nothing
    saccade.draw_heatmap(heatmaps, centers, radii, indices)
    indices[2:] = bad
    with pytest.raises(ValueError, match=rf"heatmap_idxes: expected values in \[0, 3\), got {bad} at \[2\]"):
        saccade.draw_heatmap(heatmaps, centers, radii, indices)


@pytest.mark.parametrize("bad", [-1, 3, 2**40, -(2**40)])
def test_a_label_that_does_not_exist(bad):
    heatmap = torch.zeros(2, 3, 4, 5)
    centers, radii = torch.zeros(2, 3, 2, dtype=torch.int64), torch.tensor([[1, 1, 1], [-1, 1, 1]])
    labels = torch.tensor([[0, 1, bad], [bad, 2, bad]])
    saccade.draw_heatmap_batched(heatmap, centers, radii, labels=labels, counts=torch.tensor([2, 2]))
    with pytest.raises(ValueError, match=rf"labels: expected values in \[0, 3\), got {bad} at \[1, 2\]"):
        saccade.draw_heatmap_batched(heatmap, centers, radii, labels=labels, counts=torch.tensor([2, 3]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the CPU raises instead")
@pytest.mark.parametrize("bad", [-1, 3, 2**40, -(2**40), GIANT, -GIANT - 1])
def test_maps_that_do_not_exist_are_skipped_on_a_gpu(bad):
    heatmap = torch.zeros(2, 3, 4, 5, device="cuda")
    centers = torch.zeros(2, 2, 2, dtype=torch.int64, device="cuda")
    radii = torch.zeros(2, 2, dtype=torch.int64, device="cuda")
    labels = torch.tensor([[0, bad], [bad, 2]], device="cuda")
    counts = torch.tensor([2, 2], device="cuda")
    saccade.draw_heatmap_batched(heatmap, centers, radii, labels=labels, counts=counts)
    assert heatmap.nonzero().tolist() == [[0, 0, 0, 0], [1, 2, 0, 0]]
    flat = torch.zeros(3, 4, 5, device="cuda")
    saccade.draw_heatmap(flat, centers[0], radii[0], labels[0])
    assert flat.nonzero().tolist() == [[0, 0, 0]]
    with saccade.debug_checks(True):
        with pytest.raises(ValueError, match=r"labels: .* at \[0, 1\]"):
            saccade.draw_heatmap_batched(heatmap, centers, radii, labels=labels, counts=counts)
        with pytest.raises(ValueError, match=r"heatmap_idxes: .* at \[1\]"):
            saccade.draw_heatmap(flat, centers[0], radii[0], labels[0])


FLAT = {
    "heatmaps": torch.zeros(2, 4, 5),
    "centers": torch.zeros(3, 2, dtype=torch.int64),
    "radii": torch.zeros(3, dtype=torch.int64),
    "heatmap_idxes": torch.zeros(3, dtype=torch.int64),
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"heatmaps": [[0.0]]}, TypeError, "heatmaps: expected a torch.Tensor, got list"),
        (
            {"heatmaps": torch.zeros(2, 4, 5).half()},
            TypeError,
            "heatmaps: expected float32 or float64 .draw in float32",
        ),
        ({"heatmaps": torch.zeros(2, 4, 5).bfloat16()}, TypeError, "got torch.bfloat16"),
        ({"heatmaps": torch.zeros(2, 4, 5).int()}, TypeError, "got torch.int32"),
        ({"heatmaps": torch.zeros(4, 5)}, ValueError, r"heatmaps: expected shape \(maps, H, W\), got \(4, 5\)"),
        ({"heatmaps": torch.zeros(2, 5, 4).mT}, ValueError, "heatmaps: expected a contiguous tensor"),
        ({"heatmaps": torch.zeros(1, 4, 5).expand(2, -1, -1)}, ValueError, "heatmaps: expected a contiguous tensor"),
        (
            {"heatmaps": torch.zeros(2, 4, 5).requires_grad_()},
            RuntimeError,
            "heatmaps: expected a tensor that does not",
        ),
        ({"heatmaps": torch.zeros(2, 4, 5).requires_grad_()}, InvalidStateError, "require grad"),
        ({"heatmaps": torch.zeros(2, 4, 5, device="meta")}, ValueError, "centers: expected device meta"),
        ({"centers": [[0, 0]]}, TypeError, "centers: expected a torch.Tensor, got list"),
        ({"centers": torch.zeros(3, 2)}, TypeError, "centers: expected int32 or int64, got torch.float32"),
        ({"centers": torch.zeros(3, 3).long()}, ValueError, r"centers: expected shape \(M, 2\), got \(3, 3\)"),
        ({"centers": torch.zeros(3, 1, 2).long()}, ValueError, r"centers: expected shape \(M, 2\)"),
        ({"radii": torch.zeros(3)}, TypeError, "radii: expected int32 or int64"),
        ({"radii": torch.zeros(2).long()}, ValueError, r"radii: expected shape \(M\) with M=3, got \(2,\)"),
        ({"radii": torch.zeros(3, 3).long()}, ValueError, r"radii: expected shape \(M, 2\) with M=3, got \(3, 3\)"),
        ({"heatmap_idxes": torch.zeros(3, dtype=torch.int16)}, TypeError, "heatmap_idxes: expected int32 or int64"),
        ({"heatmap_idxes": torch.zeros(4).long()}, ValueError, r"heatmap_idxes: expected shape \(M\) with M=3"),
        ({"diameter_to_sigma_factor": 0}, ValueError, "diameter_to_sigma_factor: expected a finite number > 0, got 0"),
        ({"diameter_to_sigma_factor": -6.0}, ValueError, "diameter_to_sigma_factor"),
        ({"diameter_to_sigma_factor": math.nan}, ValueError, "diameter_to_sigma_factor"),
        ({"diameter_to_sigma_factor": math.inf}, ValueError, "diameter_to_sigma_factor"),
        ({"diameter_to_sigma_factor": "6"}, TypeError, "diameter_to_sigma_factor: expected a number, got str"),
        ({"k_scale": math.nan}, ValueError, "k_scale: expected a finite number, got nan"),
        ({"k_scale": -math.inf}, ValueError, "k_scale"),
    ],
)
def test_wrong_arguments(change, error, message):
    with pytest.raises(error, match=message):
        saccade.draw_heatmap(**(FLAT | change))


BATCHED = {
    "heatmap": torch.zeros(2, 4, 5),
    "centers": torch.zeros(2, 3, 2, dtype=torch.int64),
    "radii": torch.zeros(2, 3, dtype=torch.int64),
    "counts": torch.tensor([3, 1]),
}
ZEROS = torch.zeros(2, 3, dtype=torch.int64)
RAGGED = RaggedBatch(BATCHED["centers"], sample_sizes=BATCHED["counts"])
TRANSPOSED = RaggedBatch(torch.zeros(2, 2, 3, dtype=torch.int64), sample_sizes=BATCHED["counts"], non_uniform_dim=2)
TWO_BATCH_DIMS = RaggedBatch(torch.zeros(2, 3, 2, dtype=torch.int64), sample_sizes=ZEROS, non_uniform_dim=2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"heatmap": None}, TypeError, "heatmap: expected a torch.Tensor, got NoneType"),
        ({"heatmap": torch.zeros(2, 4, 5).half()}, TypeError, "heatmap: expected float32 or float64"),
        ({"heatmap": torch.zeros(4, 5)}, ValueError, r"heatmap: expected shape \(B, H, W\), got \(4, 5\)"),
        ({"heatmap": torch.zeros(4, 5), "labels": ZEROS}, ValueError, r"heatmap: expected shape \(B, C, H, W\)"),
        ({"heatmap": torch.zeros(2, 3, 4, 5)}, ValueError, "pass labels"),
        ({"labels": ZEROS}, ValueError, "omit labels"),
        ({"heatmap": torch.zeros(2, 5, 4).mT}, ValueError, "heatmap: expected a contiguous tensor"),
        ({"heatmap": torch.zeros(2, 4, 5).requires_grad_()}, InvalidStateError, "require grad"),
        (
            {"heatmap": torch.zeros(3, 4, 5)},
            ValueError,
            r"centers: expected shape \(B, M, 2\) with B=3, got \(2, 3, 2\)",
        ),
        ({"centers": [1, 2]}, TypeError, "centers: expected a torch.Tensor, or an object with tensor and sample_sizes"),
        ({"centers": SimpleNamespace(tensor=ZEROS)}, TypeError, "centers: expected a torch.Tensor, or an object"),
        ({"centers": torch.zeros(2, 3, 2)}, TypeError, "centers: expected int32 or int64"),
        ({"centers": torch.zeros(2, 3, 3).long()}, ValueError, r"centers: expected shape \(B, M, 2\)"),
        ({"centers": RAGGED}, ValueError, "counts: expected None with ragged centers"),
        (
            {"centers": TRANSPOSED, "counts": None},
            ValueError,
            "centers: expected num_batch_dims 1 and non_uniform_dim 1, got 1 and 2",
        ),
        ({"centers": TWO_BATCH_DIMS, "counts": None}, ValueError, "centers: expected num_batch_dims 1 .* got 2 and 2"),
        (
            {"radii": torch.zeros(2, 4).long()},
            ValueError,
            r"radii: expected shape \(B, M\) with B=2, M=3, got \(2, 4\)",
        ),
        ({"radii": torch.zeros(2, 3, 3).long()}, ValueError, r"radii: expected shape \(B, M, 2\) with B=2, M=3"),
        ({"radii": torch.zeros(2, 3)}, TypeError, "radii: expected int32 or int64"),
        ({"radii": 3}, TypeError, "radii: expected a torch.Tensor, or an object"),
        ({"heatmap": torch.zeros(2, 3, 4, 5), "labels": ZEROS.float()}, TypeError, "labels: expected int32 or int64"),
        ({"heatmap": torch.zeros(2, 3, 4, 5), "labels": ZEROS[:, 1:]}, ValueError, r"labels: expected shape \(B, M\)"),
        ({"counts": None}, ValueError, "counts: expected the number of targets of each sample"),
        ({"counts": [3, 1]}, TypeError, "counts: expected a torch.Tensor, got list"),
        (
            {"centers": SimpleNamespace(tensor=3, sample_sizes=ZEROS[:, 0])},
            TypeError,
            "centers.tensor: expected a torch.T",
        ),
        ({"counts": torch.tensor([3.0, 1.0])}, TypeError, "counts: expected an integer dtype, got torch.float32"),
        ({"counts": torch.tensor([True, False])}, TypeError, "counts: expected an integer dtype, got torch.bool"),
        ({"counts": torch.tensor([3])}, ValueError, r"counts: expected shape \(B\) with B=2, got \(1,\)"),
        ({"counts": torch.zeros(2, device="meta").long()}, ValueError, "counts: expected device cpu"),
        ({"diameter_to_sigma_factor": 0.0}, ValueError, "diameter_to_sigma_factor"),
        ({"k_scale": math.inf}, ValueError, "k_scale"),
    ],
)
def test_wrong_arguments_batched(change, error, message):
    with pytest.raises(error, match=message):
        saccade.draw_heatmap_batched(**(BATCHED | change))


TARGETS = {
    "centers": BATCHED["centers"],
    "radii": BATCHED["radii"],
    "size": (4, 5),
    "counts": BATCHED["counts"],
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"centers": [1, 2]}, TypeError, "centers: expected a torch.Tensor, or an object with tensor and sample_sizes"),
        ({"centers": torch.zeros(2, 3).long()}, ValueError, r"centers: expected shape \(B, M, 2\), got \(2, 3\)"),
        ({"radii": torch.zeros(2, 4).long()}, ValueError, r"radii: expected shape \(B, M\) with B=2, M=3"),
        ({"radii": torch.zeros(2, 3)}, TypeError, "radii: expected int32 or int64"),
        ({"radii": torch.zeros(2, 3, device="meta").long()}, ValueError, "radii: expected device cpu"),
        ({"counts": None}, ValueError, "counts: expected the number of targets of each sample"),
        ({"size": 4}, TypeError, r"size: expected a pair \(height, width\), got 4"),
        ({"size": (4, 5, 6)}, TypeError, "size: expected a pair"),
        ({"size": (4, 5.0)}, TypeError, "size: expected int, got float"),
        ({"size": (4, True)}, TypeError, "size: expected int, got bool"),
        ({"size": (-4, 5)}, ValueError, "size: expected an int >= 0, got -4"),
        ({"num_classes": 3}, ValueError, "num_classes: expected None without labels, got 3"),
        ({"labels": ZEROS}, ValueError, "num_classes: expected the number of classes with labels, got None"),
        ({"labels": ZEROS, "num_classes": 2.0}, TypeError, "num_classes: expected int, got float"),
        ({"labels": ZEROS, "num_classes": -1}, ValueError, "num_classes: expected an int >= 0, got -1"),
        ({"labels": ZEROS.float(), "num_classes": 2}, TypeError, "labels: expected int32 or int64"),
        ({"labels": ZEROS[:, 1:], "num_classes": 2}, ValueError, r"labels: expected shape \(B, M\)"),
        (
            {"labels": ZEROS + 2, "num_classes": 2},
            ValueError,
            r"labels: expected values in \[0, 2\), got 2 at \[0, 0\]",
        ),
        ({"diameter_to_sigma_factor": 0.0}, ValueError, "diameter_to_sigma_factor"),
        ({"k_scale": 1e39}, ValueError, "k_scale: expected a finite number in torch.float32, got 1e"),
    ],
)
def test_wrong_arguments_of_fresh_maps(change, error, message):
    with pytest.raises(error, match=message):
        saccade.heatmap_targets(**(TARGETS | change))


BOXES = {
    "boxes": torch.zeros(2, 3, 4),
    "labels": ZEROS,
    "size": (4, 5),
    "stride": 4,
    "min_overlap": 0.3,
    "radius": "mmdet",
    "num_classes": 2,
    "counts": BATCHED["counts"],
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"boxes": [1, 2]}, TypeError, "boxes: expected a torch.Tensor, or an object with tensor and sample_sizes"),
        ({"boxes": torch.zeros(2, 3, 4).long()}, TypeError, "boxes: expected float16, bfloat16, float32 or float64"),
        ({"boxes": torch.zeros(2, 3, 5)}, ValueError, r"boxes: expected shape \(B, M, 4\), got \(2, 3, 5\)"),
        (
            {"boxes": torch.zeros(2, 3, 4, requires_grad=True)},
            ValueError,
            "boxes: expected a tensor that does not require grad",
        ),
        ({"labels": ZEROS[:, 1:]}, ValueError, r"labels: expected shape \(B, M\) with B=2, M=3"),
        ({"labels": ZEROS.float()}, TypeError, "labels: expected int32 or int64"),
        ({"labels": None}, ValueError, "num_classes: expected None without labels, got 2"),
        ({"num_classes": None}, ValueError, "num_classes: expected the number of classes with labels"),
        ({"counts": None}, ValueError, "counts: expected the number of targets of each sample with a tensor of boxes"),
        ({"counts": torch.zeros(3).long()}, ValueError, r"counts: expected shape \(B\) with B=2"),
        ({"counts": torch.zeros(2)}, TypeError, "counts: expected an integer dtype"),
        ({"counts": torch.zeros(2, device="meta").long()}, ValueError, "counts: expected device cpu"),
        ({"size": (4, -5)}, ValueError, "size: expected an int >= 0, got -5"),
        ({"stride": 0}, ValueError, r"stride\[0\]: expected a finite number > 0, got 0"),
        ({"stride": (4, -1.0)}, ValueError, r"stride\[1\]: expected a finite number > 0, got -1"),
        ({"stride": (4, 4, 4)}, TypeError, r"stride: expected a pair \(x, y\)"),
        ({"stride": "4"}, TypeError, r"stride\[0\]: expected a number, got str"),
        ({"min_overlap": 0}, ValueError, "min_overlap: expected a finite number > 0"),
        ({"min_overlap": 1.1}, ValueError, r"min_overlap: expected a number in \(0, 1\]"),
        ({"radius": "detectron"}, ValueError, "radius: expected 'mmdet' or 'mmdet3d', got 'detectron'"),
        ({"min_radius": -1}, ValueError, "min_radius: expected an int >= 0, got -1"),
        ({"min_radius": 2.0}, TypeError, "min_radius: expected int, got float"),
        ({"box_format": "xywh"}, ValueError, "box_format: expected 'xyxy' or 'cxcywh', got 'xywh'"),
        ({"origin": 0.0}, TypeError, r"origin: expected a pair \(x, y\), got 0.0"),
        ({"origin": (0.0, math.nan)}, ValueError, r"origin\[1\]: expected a finite number, got nan"),
        ({"diameter_to_sigma_factor": 0.0}, ValueError, "diameter_to_sigma_factor"),
        ({"k_scale": math.inf}, ValueError, "k_scale"),
    ],
)
def test_wrong_arguments_of_boxes(change, error, message):
    with pytest.raises(error, match=message):
        saccade.boxes_to_heatmap(**(BOXES | change))


# ---- gaussian_radius


@pytest.mark.parametrize(
    ("size", "overlap", "mmdet", "mmdet3d"),
    [
        ((10, 20), 0.7, 1.0774, 3.6779),
        ((10, 20), 0.3, 2.8902, 6.7797),
        ((10, 20), 0.1, 4.1459, 6.0000),
        ((4, 4), 0.5, 0.5858, 1.6569),
        ((4, 4), 0.1, 1.3675, 1.7298),
        ((100, 100), 0.7, 8.1670, 27.3320),
        ((0, 0), 0.7, 0.0, 0.0),
        ((0, 5), 0.7, 0.0, 0.0),
        ((3, 7), 1, 0.0, 0.0),
    ],
)
def test_radius(size, overlap, mmdet, mmdet3d, device):
    for convention, expected in zip(CONVENTIONS, (mmdet, mmdet3d), strict=True):
        number = saccade.gaussian_radius(size, overlap, convention=convention)
        assert isinstance(number, float)
        assert number == pytest.approx(expected, abs=5e-5)
        for height, width in (size, reversed(size)):
            tensor = saccade.gaussian_radius(
                (torch.tensor([height, height], device=device), torch.tensor([[width], [1]], device=device)),
                overlap,
                convention=convention,
            )
            assert tensor.shape == (2, 2)
            assert tensor.dtype == torch.float32
            torch.testing.assert_close(tensor[0].cpu(), torch.full((2,), expected), atol=1e-4, rtol=1e-5)


@given(height=st.floats(0.1, 1000), width=st.floats(0.1, 1000), overlap=st.floats(0.01, 1))
def test_a_box_moved_by_the_radius_keeps_the_overlap(height, width, overlap):
    radius = saccade.gaussian_radius((height, width), overlap, convention="mmdet")
    area = height * width
    shared = (height - radius) * (width - radius)
    shifted = shared / (2 * area - shared)
    inside = (height - 2 * radius) * (width - 2 * radius) / area
    outside = area / ((height + 2 * radius) * (width + 2 * radius))
    assert min(shifted, inside, outside) == pytest.approx(overlap, rel=1e-6)


@given(height=st.floats(0, 1000), width=st.floats(0, 1000), overlap=st.floats(0.01, 1))
def test_the_smallest_root_that_mmdet_takes(height, width, overlap):
    total, area = height + width, height * width
    ratio = (1 - overlap) / (1 + overlap)
    shifted = (total - math.sqrt(max(0, total**2 - 4 * area * ratio))) / 2
    inside = (total - math.sqrt(max(0, total**2 - 4 * area * (1 - overlap)))) / 4
    both = math.sqrt((overlap * total) ** 2 + 4 * overlap * (1 - overlap) * area)
    outside = (both - overlap * total) / (4 * overlap)
    radius = saccade.gaussian_radius((height, width), overlap, convention="mmdet")
    assert radius == pytest.approx(min(shifted, inside, outside), abs=1e-7 * (1 + total))


@given(height=st.floats(0, 1000), width=st.floats(0, 1000), overlap=st.floats(0.01, 1))
def test_the_roots_that_mmdet3d_takes(height, width, overlap):
    total, area = height + width, height * width
    ratio = (1 - overlap) / (1 + overlap)
    shifted = (total + math.sqrt(max(0, total**2 - 4 * area * ratio))) / 2
    inside = total + math.sqrt(max(0, total**2 - 4 * area * (1 - overlap)))
    outside = -overlap * total + math.sqrt((overlap * total) ** 2 + 4 * overlap * (1 - overlap) * area)
    radius = saccade.gaussian_radius((height, width), overlap, convention="mmdet3d")
    assert radius == pytest.approx(min(shifted, inside, outside), abs=1e-9 * (1 + total))


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_radius_of_unusual_tensors(convention, device):
    sizes = torch.tensor([-3.0, 0.0, 10.0], device=device)
    radii = saccade.gaussian_radius((sizes, 20), 0.7, convention=convention)
    expected = saccade.gaussian_radius((10, 20), 0.7, convention=convention)
    torch.testing.assert_close(radii.cpu(), torch.tensor([0, 0, expected]))
    half = torch.tensor([600.0], device=device, dtype=torch.float16)  # whose square float16 cannot hold
    radius = saccade.gaussian_radius((half, half), 0.7, convention=convention)
    assert radius.dtype == torch.float32
    assert radius.item() == pytest.approx(6 * saccade.gaussian_radius((100, 100), 0.7, convention=convention), rel=1e-3)
    double = torch.tensor(10.0, device=device, dtype=torch.float64)
    assert saccade.gaussian_radius((double, 20), 0.7, convention=convention).item() == pytest.approx(
        expected, rel=1e-12
    )


def test_radius_in_compiled_code(device):
    torch._dynamo.reset()

    def radius(height, width):
        return saccade.gaussian_radius((height, width), 0.7, convention="mmdet")

    sizes = torch.tensor([10.0, 4.0], device=device), torch.tensor([20.0, 4.0], device=device)
    compiled = torch.compile(radius, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*sizes), radius(*sizes))


@pytest.mark.parametrize(
    ("size", "overlap", "convention", "error", "message"),
    [
        ((1, 2), 0.5, "detectron", ValueError, "convention: expected 'mmdet' or 'mmdet3d', got 'detectron'"),
        ((1, 2), 0, "mmdet", ValueError, "min_overlap: expected a finite number > 0"),
        ((1, 2), 1.5, "mmdet", ValueError, r"min_overlap: expected a number in \(0, 1\], got 1.5"),
        ((1, 2), math.nan, "mmdet", ValueError, "min_overlap"),
        ((1, 2), None, "mmdet", TypeError, "min_overlap: expected a number, got NoneType"),
        ((-1, 2), 0.5, "mmdet", ValueError, r"det_size\[0\]: expected a finite number >= 0, got -1"),
        ((1, -2), 0.5, "mmdet3d", ValueError, r"det_size\[1\]"),
        ((torch.ones(2), -2), 0.5, "mmdet3d", ValueError, r"det_size\[1\]"),
        ((1, "2"), 0.5, "mmdet", TypeError, r"det_size\[1\]: expected a number, got str"),
        ((1, torch.ones(2, dtype=torch.complex64)), 0.5, "mmdet", TypeError, r"det_size\[1\]"),
        ((1, 2, 3), 0.5, "mmdet", TypeError, "det_size: expected a pair"),
        (torch.ones(2), 0.5, "mmdet", TypeError, "det_size: expected a pair .height, width., got Tensor"),
    ],
)
def test_radius_of_wrong_arguments(size, overlap, convention, error, message):
    with pytest.raises(error, match=message):
        saccade.gaussian_radius(size, overlap, convention=convention)


@pytest.mark.skipif(not triton_is_installed(), reason="needs Triton")
@pytest.mark.parametrize(("rows", "bits"), [(1000, 32), (2**31 - 100, 64), (2**31 + 64, 64)])
def test_offsets_of_all_parts_of_a_window_fit(rows, bits):
    """Of parts beyond the last row, too, at which a program stops."""
    from saccade.gaussian_heatmap import launch
    from saccade.gaussian_heatmap.kernels import draw_kernel

    heatmap = torch.empty(1, 1, rows, 1, device="meta")
    strides = (2, 2, 1), (1, 1), (1, 1), (1,)
    (prepared,) = launch._launches(draw_kernel, heatmap, 1, strides, range(9), True, 1.0, ELLIPSES=False)
    assert prepared._constants["INDEX"].primitive_bitwidth == bits
