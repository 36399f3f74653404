"""Drawing heatmaps on a GPU: values at real sizes, many targets, what is not to be drawn, compiled code.

What it has in common with other operators is in ``test_gpu_contract.py``.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import saccade
from benchmarks import workloads
from cases.gaussian_heatmap import mmdet3d_radius, mmdet_radius
from cases.on_gpu import DEVICE
from cases.on_gpu.gaussian_heatmap import CASES, IN_PLACE, TOLERANCES, targets
from saccade.gaussian_heatmap import reference
from saccade.operator.declaration import OPERATORS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GIANT = 2**63 - 1

BY_NAME = {case.name: case for case in CASES}


def expected(draw: Callable[..., Tensor], values: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """What is drawn without kernels, on the GPU as well, where wrong labels are skipped."""

    def forget() -> None:
        for operator in OPERATORS.values():
            operator.forget()

    with monkeypatch.context() as patch:
        patch.setattr("saccade.operator.declaration.served_by_triton", lambda tensor: False)
        forget()
        try:
            return draw(*values)
        finally:
            forget()


# ---- values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", IN_PLACE, ids=lambda case: case.name)
def test_values(case, dtype, monkeypatch):
    """Of each cell, relative to itself."""
    want = expected(case.call, case.inputs(dtype=torch.float64), monkeypatch)
    maps = case.call(*case.inputs(dtype=dtype))
    # What the maps held before is rounded to float32 once.
    torch.testing.assert_close(maps.double(), want, rtol=TOLERANCES[dtype], atol=1e-9)


@pytest.mark.parametrize("workload", workloads.HEATMAP)
def test_values_at_real_size(workload):
    """And the same bits whether targets are concatenated or by sample, drawn again, or drawn into fresh maps."""
    inputs = workloads.heatmap(*workloads.HEATMAP[workload])
    heatmap = torch.zeros(inputs.shape, device=DEVICE)
    options = {"labels": inputs.labels, "counts": inputs.sample_sizes}
    saccade.draw_heatmap_batched(heatmap, inputs.centers, inputs.radii, **options)
    want = torch.zeros(inputs.shape, dtype=torch.float64)
    on_cpu = [
        None if v is None else v.cpu() for v in (inputs.centers, inputs.radii, inputs.sample_sizes, inputs.labels)
    ]
    reference.draw_heatmap_batched(want, *on_cpu, 6.0, 1.0, False)
    torch.testing.assert_close(heatmap.cpu().double(), want, rtol=TOLERANCES[torch.float32], atol=1e-9)
    first = heatmap.clone()
    saccade.draw_heatmap_batched(heatmap, inputs.centers, inputs.radii, **options)
    assert torch.equal(heatmap, first)
    slots = inputs.radii.shape[1]
    drawn = torch.arange(slots, device=DEVICE) < inputs.sample_sizes[:, None]
    indices = torch.arange(len(inputs.radii), device=DEVICE, dtype=torch.int32)[:, None].expand_as(inputs.radii)
    if inputs.labels is not None:
        indices = indices * inputs.shape[1] + inputs.labels
    flat = torch.zeros(math.prod(inputs.shape[:-2]), *inputs.shape[-2:], device=DEVICE)
    saccade.draw_heatmap(flat, *(value[drawn] for value in (inputs.centers, inputs.radii, indices)))
    assert torch.equal(flat.view(inputs.shape), first)
    classes = None if inputs.labels is None else inputs.shape[1]
    size = inputs.shape[-2:]
    assert torch.equal(
        saccade.heatmap_targets(inputs.centers, inputs.radii, size, num_classes=classes, **options), first
    )


@pytest.mark.parametrize(("convention", "radius_of"), [("mmdet", mmdet_radius), ("mmdet3d", mmdet3d_radius)])
def test_radii_of_boxes(convention, radius_of):
    """Of all whole sizes up to 90: as Python's numbers have them, but where the radius is a whole number itself."""
    sides = [(float(height), float(width)) for height in range(1, 91) for width in range(1, 91)]
    boxes = torch.tensor([[[25, 26, width, height]] for height, width in sides], device=DEVICE)
    one = torch.ones(len(boxes), dtype=torch.int32, device=DEVICE)
    for overlap in (0.1, 0.3, 0.5, 0.7):
        maps = saccade.boxes_to_heatmap(boxes, None, (51, 51), 1, overlap, convention, counts=one, box_format="cxcywh")
        for (height, width), cells in zip(sides, (maps > 0).sum((1, 2)).tolist(), strict=True):
            radius = radius_of(height, width, overlap)
            if abs(radius - round(radius)) > 1e-9:
                rows = min(50, 26 + int(radius)) - max(0, 26 - int(radius)) + 1
                columns = min(50, 25 + int(radius)) - max(0, 25 - int(radius)) + 1
                assert cells == rows * columns, (height, width, overlap, radius)


def test_boxes_are_drawn_as_on_the_cpu():
    rng = torch.Generator().manual_seed(0)
    boxes = torch.rand(16, 200, 2, generator=rng) * 600 - 40
    boxes = torch.cat([boxes, boxes + torch.rand(16, 200, 2, generator=rng) * 300 - 10], -1)
    labels = torch.randint(0, 7, (16, 200), generator=rng)
    counts = torch.randint(0, 201, (16,), generator=rng)
    for convention in ("mmdet", "mmdet3d"):
        arguments = (128, 128), (4.0, 3.7), 0.3, convention
        want = saccade.boxes_to_heatmap(boxes, labels, *arguments, num_classes=7, counts=counts)
        moved = [value.to(DEVICE) for value in (boxes, labels, counts)]
        maps = saccade.boxes_to_heatmap(*moved[:2], *arguments, num_classes=7, counts=moved[2])
        assert torch.equal(maps.cpu() == 1, want == 1)
        torch.testing.assert_close(maps.cpu(), want, rtol=TOLERANCES[torch.float32], atol=1e-9)


@pytest.mark.parametrize("name", ["flat", "classes", "fresh", "negative"])
def test_the_order_of_targets_does_not_matter(name):
    case = BY_NAME[name]
    *maps, centers, radii, labels, counts = case.inputs((40, 90))
    counts.fill_(90)
    order = torch.randperm(90, device=DEVICE)
    want = case.call(*maps, centers, radii, labels, counts)
    assert torch.equal(case.call(*maps, *(value[:, order] for value in (centers, radii, labels)), counts), want)


# ---- limits


def test_more_samples_than_a_grid_has_along_one_axis():
    samples = 2**17 + 5
    centers = torch.arange(samples, device=DEVICE)[:, None, None].expand(-1, 1, 2) % 4
    zero = torch.zeros(samples, 1, dtype=torch.int64, device=DEVICE)
    counts = torch.ones(samples, dtype=torch.int64, device=DEVICE)
    maps = saccade.heatmap_targets(centers, zero, (4, 4), counts=counts)
    assert torch.equal(maps.flatten(1).argmax(1), torch.arange(samples, device=DEVICE) % 4 * 5)
    assert maps.sum() == samples


def test_many_targets():
    """More than any head has; and more than 32 bits count, which are one and the same in memory."""
    count = 3_000_000
    rng = torch.Generator(DEVICE).manual_seed(0)
    centers = torch.randint(0, 1000, (count, 2), device=DEVICE, generator=rng)
    zero = torch.zeros(count, dtype=torch.int64, device=DEVICE)
    heatmaps = torch.zeros(1, 1000, 1000, device=DEVICE)
    saccade.draw_heatmap(heatmaps, centers, zero, zero)
    want = torch.zeros(1000, 1000, device=DEVICE)
    want[centers[:, 1], centers[:, 0]] = 1
    assert torch.equal(heatmaps[0], want)
    slots = 2**31 + 5
    center = torch.full((1, 1, 2), 3, device=DEVICE).expand(1, slots, 2)
    radius = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE).expand(1, slots)
    maps = saccade.heatmap_targets(center, radius, (5, 5), counts=torch.tensor([slots], device=DEVICE))
    assert maps.nonzero().tolist() == [[0, 3, 3]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_nothing_is_written_outside(dtype):
    """Maps in the middle of memory that holds a mark, targets of the wildest numbers."""
    limits = torch.iinfo(dtype)
    wild = torch.tensor([limits.min, limits.min + 1, -70_000, -1, 0, 1, 4, 9, 70_000, limits.max - 1, limits.max])
    x, y, radius, label = (value.flatten() for value in torch.meshgrid(wild, wild, wild, wild, indexing="ij"))
    values = [value.to(DEVICE, dtype) for value in (torch.stack([x, y], -1), radius, label)]
    for size in ((6, 7), (70, 80)):
        cells = 5 * size[0] * size[1]
        memory = torch.full((3 * cells,), -5.0, device=DEVICE)
        heatmaps = memory[cells : 2 * cells].view(5, *size).zero_()
        saccade.draw_heatmap(heatmaps, *values)
        assert (memory[:cells] == -5).all()
        assert (memory[2 * cells :] == -5).all()
        assert heatmaps[[0, 1, 4]].amax((1, 2)).tolist() == [1, 1, 1]
        assert not heatmaps[2:4].any()
        assert ((heatmaps >= 0) & (heatmaps <= 1)).all()


@pytest.mark.parametrize("bad", [-1, 5, 2**40, GIANT, -GIANT - 1])
def test_debug_checks_name_wrong_labels(bad):
    centers, radii, labels, counts = targets(6, 40)
    labels.clamp_(0, 4)
    radii.clamp_(min=0)
    counts.fill_(40)
    labels[3, 7] = bad
    maps = torch.zeros(6, 5, 37, 53, device=DEVICE)
    boxes = torch.ones(6, 40, 4, device=DEVICE) * torch.tensor([5, 5, 9, 9], device=DEVICE)
    calls = [
        lambda: saccade.draw_heatmap_batched(maps, centers, radii, labels=labels, counts=counts),
        lambda: saccade.heatmap_targets(centers, radii, (9, 9), labels=labels, num_classes=5, counts=counts),
        lambda: saccade.boxes_to_heatmap(boxes, labels, (9, 9), 1, 0.3, "mmdet", num_classes=5, counts=counts),
    ]
    for call in calls:
        call()
        with saccade.debug_checks(True), pytest.raises(ValueError, match=rf"labels: .* got {bad} at \[3, 7\]"):
            call()


# ---- compiled code, devices


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_in_compiled_code(case, backend):
    values = case.inputs()
    _, radii, _, counts = values[-4:]
    want = case.call(*values)
    torch._dynamo.reset()

    def step(heatmap: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        before = heatmap.sum()  # must be read before the drawing
        saccade.draw_heatmap_batched(heatmap, values[-4], values[-3], counts=values[-1])
        return before, case.call(*values)

    heatmap = torch.zeros(6, 37, 53, device=DEVICE)
    before, maps = torch.compile(step, backend=backend, fullgraph=True)(heatmap, *values)
    assert before == 0
    assert torch.equal(maps, want)
    alone = torch.zeros(6, 37, 53, device=DEVICE)
    saccade.draw_heatmap_batched(alone, values[-4], radii, counts=counts)
    assert torch.equal(heatmap, alone)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_all_targets_must_be_on_one_gpu():
    centers, radii, _, counts = targets(6, 40)
    with pytest.raises(ValueError, match="counts: expected device cuda:0"):
        saccade.heatmap_targets(centers, radii, (37, 53), counts=counts.to("cuda:1"))
