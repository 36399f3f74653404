"""Drawing heatmaps on a GPU: real sizes, equal bits, more than 2^31 cells, memory, streams, graphs, compiled code."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import saccade
from benchmarks import workloads
from cases.gaussian_heatmap import mmdet3d_radius, mmdet_radius
from cases.losses_on_gpu import BEYOND_32_BITS, synchronizing_raises
from saccade.gaussian_heatmap import reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DEVICE = "cuda"
GIANT = 2**63 - 1

# Of a cell, relative to itself: the exponent, of up to 13, is rounded a few times, and a GPU's power of 2 is wrong by
# two ulps.
TOLERANCE = {torch.float32: 4e-6, torch.float64: 1e-12}


# ---- ways to draw, each as a function of tensors alone that returns maps


def targets(samples: int, slots: int, size: tuple[int, int], classes: int, seed: int, reach: int = 12) -> list[Tensor]:
    """Centres, radii and labels of every kind, out of range ones too, and counts."""
    rng = torch.Generator().manual_seed(seed)
    height, width = size

    def whole(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=rng)

    x, y = whole(-9, width + 9, samples, slots), whole(-9, height + 9, samples, slots)
    radii, labels = whole(-1, reach, samples, slots), whole(-1, classes + 1, samples, slots)
    counts = whole(-1, slots + 2, samples)
    return [value.to(DEVICE) for value in (torch.stack([x, y], -1), radii, labels, counts)]


def draw_flat(centers: Tensor, radii: Tensor, labels: Tensor, counts: Tensor, dtype=torch.float32) -> Tensor:
    heatmaps = torch.zeros(5, 37, 53, dtype=dtype, device=DEVICE)
    saccade.draw_heatmap(heatmaps, centers.flatten(0, 1), radii.flatten(), labels.flatten())
    return heatmaps


def draw_batched(centers: Tensor, radii: Tensor, labels: Tensor, counts: Tensor, dtype=torch.float32) -> Tensor:
    heatmap = torch.zeros(len(counts), 37, 53, dtype=dtype, device=DEVICE)
    saccade.draw_heatmap_batched(heatmap, centers, radii, counts=counts)
    return heatmap


def draw_classes(centers: Tensor, radii: Tensor, labels: Tensor, counts: Tensor, dtype=torch.float32) -> Tensor:
    heatmap = torch.zeros(len(counts), 5, 37, 53, dtype=dtype, device=DEVICE)
    saccade.draw_heatmap_batched(heatmap, centers, radii, 5.0, 0.7, labels, counts=counts)
    return heatmap


def draw_ellipses(centers: Tensor, radii: Tensor, labels: Tensor, counts: Tensor, dtype=torch.float32) -> Tensor:
    heatmap = torch.zeros(len(counts), 5, 137, 153, dtype=dtype, device=DEVICE)
    both = torch.stack([radii, radii.flip(1)], -1)
    saccade.draw_heatmap_batched(heatmap, centers, both, labels=labels, counts=counts)
    return heatmap


def draw_negative(centers: Tensor, radii: Tensor, labels: Tensor, counts: Tensor, dtype=torch.float32) -> Tensor:
    heatmap = torch.full((len(counts), 37, 53), -1.0, dtype=dtype, device=DEVICE)
    saccade.draw_heatmap_batched(heatmap, centers, radii, k_scale=-0.5, counts=counts)
    return heatmap


def draw_fresh(centers: Tensor, radii: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    return saccade.heatmap_targets(centers, radii, (137, 153), labels=labels, num_classes=5, counts=counts)


def draw_boxes(centers: Tensor, radii: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    boxes = torch.cat([centers, radii[..., None] * 7, radii.flip(1)[..., None] * 5], -1).float() * 1.7
    return saccade.boxes_to_heatmap(
        boxes, labels, (37, 53), 1.7, 0.3, "mmdet", num_classes=5, counts=counts, box_format="cxcywh"
    )


IN_PLACE: list[Callable[..., Tensor]] = [draw_flat, draw_batched, draw_classes, draw_ellipses, draw_negative]
EACH = [*IN_PLACE, draw_fresh, draw_boxes]
each_way = pytest.mark.parametrize("draw", EACH, ids=lambda draw: draw.__name__)


def some_targets(seed: int = 0, samples: int = 6, slots: int = 40) -> list[Tensor]:
    return targets(samples, slots, (37, 53), 5, seed)


def expected(draw: Callable[..., Tensor], values: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The same without kernels, on the GPU as well, where wrong labels are skipped."""
    with monkeypatch.context() as patch:
        patch.setattr("saccade.gaussian_heatmap.api.served_by_triton", lambda tensor: False)
        return draw(*values)


# ---- values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("draw", IN_PLACE, ids=lambda draw: draw.__name__)
def test_values(draw, dtype, monkeypatch):
    values = some_targets()
    want = expected(lambda *args: draw(*args, dtype=torch.float64), values, monkeypatch)
    torch.testing.assert_close(draw(*values, dtype=dtype).double(), want, rtol=TOLERANCE[dtype], atol=1e-9)


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
    torch.testing.assert_close(heatmap.cpu().double(), want, rtol=TOLERANCE[torch.float32], atol=1e-9)
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
        torch.testing.assert_close(maps.cpu(), want, rtol=TOLERANCE[torch.float32], atol=1e-9)


# ---- equal bits


@each_way
def test_equal_bits_run_after_run(draw):
    """While another stream keeps the GPU busy, and on another stream than the current one."""
    values = some_targets(samples=40, slots=90)
    matrix = torch.randn(8192, 8192, device=DEVICE)
    product = torch.empty_like(matrix)
    busy, side = torch.cuda.Stream(), torch.cuda.Stream()
    want = draw(*values)
    torch.cuda.synchronize()
    with torch.cuda.stream(busy):
        for _ in range(5):  # about 20 ms each
            torch.mm(matrix, matrix, out=product)
    runs = [draw(*values) for _ in range(10)]
    with torch.cuda.stream(side):
        runs += [draw(*values) for _ in range(5)]
    torch.cuda.synchronize()
    for maps in runs:
        assert torch.equal(maps, want)


def test_the_order_of_targets_does_not_matter():
    values = some_targets(samples=40, slots=90)
    values[3].fill_(90)
    order = torch.randperm(90, device=DEVICE)
    for draw in (draw_flat, draw_classes, draw_fresh, draw_negative):
        want = draw(*values)
        assert torch.equal(draw(*(value[:, order] for value in values[:3]), values[3]), want)


@each_way
def test_several_streams_at_once(draw):
    calls = [some_targets(seed=10 * seed) for seed in range(4)]
    want = [draw(*values) for values in calls]
    matrix = torch.randn(8192, 8192, device=DEVICE)
    gate, streams = torch.cuda.Event(), [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    for _ in range(5):  # all streams wait until much is queued in each
        torch.mm(matrix, matrix)
    gate.record()
    for stream in streams:
        stream.wait_event(gate)
    runs = []
    for _ in range(10):
        for number, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                runs.append((number, draw(*calls[number])))
    torch.cuda.synchronize()
    for number, maps in runs:
        assert torch.equal(maps, want[number])


def test_each_call_sees_what_was_written_before_it():
    """Radii that are made from the maps drawn before, queued back to back while the GPU is busy."""
    centers, radii, labels, counts = some_targets()

    def chain() -> Tensor:
        heatmap, changing = torch.zeros(6, 5, 37, 53, device=DEVICE), radii
        for _ in range(20):
            saccade.draw_heatmap_batched(heatmap, centers, changing, labels=labels, counts=counts)
            changing = (changing + (heatmap.sum((1, 2, 3)) * 1000).long()[:, None]) % 13
            heatmap = heatmap * 0.9
        return heatmap

    side = torch.cuda.Stream()
    want = chain()
    torch.cuda.synchronize()
    matrix = torch.randn(8192, 8192, device=DEVICE)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.mm(matrix, matrix)
        maps = chain()
    torch.cuda.synchronize()
    torch.testing.assert_close(maps, want, rtol=0, atol=0)


# ---- limits


@pytest.mark.gpu_memory(12)
def test_more_cells_than_32_bits_count():
    """The last map begins beyond 2^31 cells."""
    side = 8192
    maps = BEYOND_32_BITS // side**2 + 2
    heatmaps = torch.zeros(maps, side, side, device=DEVICE)
    centers = torch.tensor([[side - 2, side - 1], [3, 4]], device=DEVICE)
    indices = torch.tensor([maps - 1, 0], device=DEVICE)
    saccade.draw_heatmap(heatmaps, centers, torch.tensor([3, 2], device=DEVICE), indices)
    few = torch.zeros(2, 20, 20, device=DEVICE)
    near = torch.tensor([[18, 19], [3, 4]], device=DEVICE)
    saccade.draw_heatmap(few, near, torch.tensor([3, 2], device=DEVICE), indices.clamp(max=1))
    assert torch.equal(heatmaps[-1, -20:, -20:], few[1])
    assert torch.equal(heatmaps[0, :20, :20], few[0])
    assert sum(part.count_nonzero() for part in heatmaps.flatten().split(2**28)) == few.count_nonzero()


@pytest.mark.gpu_memory(14)
@pytest.mark.parametrize("shape", [(1, 50_000, 50_000), (1, 2**31 + 64, 1), (1, 1, 2**31 + 64)], ids=str)
def test_a_map_of_more_cells_than_32_bits_count(shape):
    heatmaps = torch.zeros(shape, device=DEVICE)
    _, height, width = shape
    centers = torch.tensor([[width - 1, height - 1], [0, 0]], device=DEVICE)
    zero = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    saccade.draw_heatmap(heatmaps, centers, zero + 2, zero)
    few = torch.zeros(1, min(height, 20), min(width, 20), device=DEVICE)
    near = torch.tensor([[few.shape[2] - 1, few.shape[1] - 1], [0, 0]], device=DEVICE)
    saccade.draw_heatmap(few, near, zero + 2, zero)
    assert torch.equal(heatmaps[0, -10:, -10:], few[0, -10:, -10:])
    assert torch.equal(heatmaps[0, :10, :10], few[0, :10, :10])
    assert sum(part.count_nonzero() for part in heatmaps.flatten().split(2**28)) == few.count_nonzero()


@pytest.mark.gpu_memory(30)
def test_strides_that_32_bits_do_not_hold():
    apart = 2**30 + 3
    memory = torch.full((3 * apart + 64,), -7, dtype=torch.int32, device=DEVICE)
    centers = memory.as_strided((1, 4, 2), (5, apart, 1))
    radii, labels = memory.as_strided((1, 4), (5, apart), 2), memory.as_strided((1, 4), (5, apart), 3)
    centers.copy_(torch.arange(8).view(1, 4, 2) * 2)
    radii.copy_(torch.tensor([[0, 1, 2, 3]]))
    labels.copy_(torch.tensor([[0, 1, 2, 1]]))
    counts = torch.tensor([4], device=DEVICE)
    values = [value.contiguous() for value in (centers, radii, labels)]
    maps = saccade.heatmap_targets(centers, radii, (20, 20), labels=labels, num_classes=3, counts=counts)
    want = saccade.heatmap_targets(*values[:2], (20, 20), labels=values[2], num_classes=3, counts=counts)
    assert want.count_nonzero() > 50
    assert torch.equal(maps, want)


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
    centers, radii, labels, counts = some_targets()
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


# ---- memory, graphs, devices, threads, compiled code


def test_memory():
    """Drawing allocates nothing, and what makes fresh maps allocates these alone."""
    centers, radii, labels, counts = some_targets()
    heatmap = torch.zeros(6, 5, 137, 153, device=DEVICE)
    options = {"labels": labels, "counts": counts}
    for call, allocated in (
        (lambda: saccade.draw_heatmap_batched(heatmap, centers, radii, **options), 0),
        (lambda: saccade.heatmap_targets(centers, radii, (137, 153), num_classes=5, **options), heatmap.nbytes),
    ):
        call()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        assert torch.cuda.max_memory_allocated() - before <= allocated + 512  # the allocator rounds up


def test_nothing_piles_up():
    """Not from call to call, nor from size to size, for each of which a launch may be kept."""
    values = [some_targets(slots=slots) for slots in range(1, 30)]
    for draw in EACH:
        for inputs in values:
            draw(*inputs)
    before = torch.cuda.memory_allocated()
    for draw in EACH:
        for inputs in values:
            draw(*inputs)
    assert torch.cuda.memory_allocated() == before


@each_way
def test_captured_in_a_cuda_graph(draw):
    static = some_targets()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        draw(*static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        maps = draw(*static)
    for seed in (100, 200, 300):
        changed = some_targets(seed=seed)
        for value, new in zip(static, changed, strict=True):
            value.copy_(new)
        graph.replay()
        assert torch.equal(maps, draw(*changed))


@each_way
def test_nothing_waits_for_the_gpu(draw):
    """Not even the first call with new sizes, which no other test has."""
    values = some_targets(samples=7, slots=23 + EACH.index(draw))
    with synchronizing_raises():
        draw(*values)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@each_way
def test_in_compiled_code(draw, backend):
    values = some_targets()
    want = draw(*values)
    torch._dynamo.reset()

    def step(heatmap: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        before = heatmap.sum()  # must be read before the drawing
        saccade.draw_heatmap_batched(heatmap, values[0], values[1], counts=values[3])
        return before, draw(*values)

    heatmap = torch.zeros(6, 37, 53, device=DEVICE)
    before, maps = torch.compile(step, backend=backend, fullgraph=True)(heatmap, *values)
    assert before == 0
    assert torch.equal(maps, want)
    assert torch.equal(heatmap, draw_batched(*values))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_another_gpu_than_the_current_one_and_back():
    centers, radii, labels, counts = some_targets()
    want = None
    for device in ("cuda:1", "cuda:0", "cuda:1"):
        moved = [value.to(device) for value in (centers, radii, labels, counts)]
        maps = saccade.heatmap_targets(*moved[:2], (37, 53), labels=moved[2], num_classes=5, counts=moved[3])
        assert maps.device == torch.device(device)
        assert torch.cuda.current_device() == 0
        want = maps.cpu() if want is None else want
        assert torch.equal(maps.cpu(), want)
    with pytest.raises(ValueError, match="counts: expected device cuda:0"):
        saccade.heatmap_targets(centers, radii, (37, 53), counts=counts.to("cuda:1"))


@each_way
def test_threads(draw):
    """Each with inputs of its own size, for which there was no call before."""
    calls = [some_targets(slots=50 + 7 * k + EACH.index(draw), seed=k) for k in range(8)]
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda values: [draw(*values) for _ in range(10)], calls))
    for values, results in zip(calls, runs, strict=True):
        want = draw(*values)
        assert all(torch.equal(maps, want) for maps in results)
