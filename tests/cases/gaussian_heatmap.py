"""Cases of all that draws heatmaps; the oracle draws one cell at a time, from the definition."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

import saccade
from cases import TOLERANCES, Case
from saccade.ragged import RaggedBatch

Radius = int | list[int]  # or one along x and one along y


def draw_one(cells: Tensor, x: int, y: int, radius: Radius, factor: float = 6.0, k_scale: float = 1.0) -> None:
    """One Gaussian into a map (H, W)."""
    height, width = cells.shape
    radius_x, radius_y = radius if isinstance(radius, list) else (radius, radius)
    if radius_x < 0 or radius_y < 0:
        return
    sigma_x, sigma_y = (2 * radius_x + 1) / factor, (2 * radius_y + 1) / factor
    for row in range(max(0, y - radius_y), min(height, y + radius_y + 1)):
        for column in range(max(0, x - radius_x), min(width, x + radius_x + 1)):
            exponent = (row - y) ** 2 / (2 * sigma_y**2) + (column - x) ** 2 / (2 * sigma_x**2)
            cells[row, column] = max(cells[row, column].item(), k_scale * math.exp(-exponent))


def flat_oracle(heatmaps: Tensor, centers: Tensor, radii: Tensor, heatmap_idxes: Tensor, *numbers: float) -> None:
    for (x, y), radius, index in zip(centers.tolist(), radii.tolist(), heatmap_idxes.tolist(), strict=True):
        draw_one(heatmaps[index], x, y, radius, *numbers)


def batched_oracle(
    heatmap: Tensor, centers: Tensor, radii: Tensor, counts: Tensor, labels: Tensor | None, *numbers: float
):
    for b, count in enumerate(counts.tolist()):
        for slot in range(min(max(count, 0), radii.shape[1])):
            cells = heatmap[b] if labels is None else heatmap[b, labels[b, slot]]
            draw_one(cells, *centers[b, slot].tolist(), radii[b, slot].tolist(), *numbers)


def targets_oracle(
    centers: Tensor,
    radii: Tensor,
    counts: Tensor,
    labels: Tensor | None,
    size: tuple[int, int],
    classes: int | None,
    *numbers: float,
) -> Tensor:
    shape = [len(centers), *size] if classes is None else [len(centers), classes, *size]
    heatmap = torch.zeros(shape, dtype=torch.float64)
    batched_oracle(heatmap, centers, radii, counts, labels, *numbers)
    return heatmap


def mmdet_radius(height: float, width: float, overlap: float) -> float:
    """``gaussian_radius`` as mmdet has it: the smallest of three roots."""
    total, area = height + width, height * width
    shifted = (total - math.sqrt(total**2 - 4 * area * (1 - overlap) / (1 + overlap))) / 2
    inside = (2 * total - math.sqrt(4 * total**2 - 16 * (1 - overlap) * area)) / 8
    outside = (-2 * overlap * total + math.sqrt((2 * overlap * total) ** 2 + 16 * overlap * (1 - overlap) * area)) / (
        8 * overlap
    )
    return min(shifted, inside, outside)


def mmdet3d_radius(height: float, width: float, overlap: float) -> float:
    """``gaussian_radius`` as mmdet3d has it: the smallest of three other roots."""
    total, area = height + width, height * width
    shifted = (total + math.sqrt(total**2 - 4 * area * (1 - overlap) / (1 + overlap))) / 2
    inside = (2 * total + math.sqrt(4 * total**2 - 16 * (1 - overlap) * area)) / 2
    outside = (-2 * overlap * total + math.sqrt((2 * overlap * total) ** 2 + 16 * overlap * (1 - overlap) * area)) / 2
    return min(shifted, inside, outside)


def boxes_oracle(
    boxes: Tensor,
    labels: Tensor | None,
    counts: Tensor,
    size: tuple[int, int],
    classes: int | None,
    stride: float | tuple[float, float],
    overlap: float,
    convention: str,
    min_radius: int = 0,
    box_format: str = "xyxy",
    origin: tuple[float, float] = (0.0, 0.0),
) -> Tensor:
    """One box at a time in Python's numbers, as the heads of mmdet and mmdet3d make their targets."""
    height, width = size
    stride_x, stride_y = stride if isinstance(stride, tuple) else (stride, stride)
    shape = [len(boxes), *size] if classes is None else [len(boxes), classes, *size]
    heatmap = torch.zeros(shape, dtype=torch.float64)
    for b, count in enumerate(counts.tolist()):
        for slot in range(min(max(count, 0), boxes.shape[1])):
            x, y, w, h = boxes[b, slot].tolist()
            if box_format == "xyxy":
                x, y, w, h = (x + w) / 2, (y + h) / 2, w - x, h - y
            w, h = w / stride_x, h / stride_y
            if w <= 0 or h <= 0:
                continue
            column, row = int((x - origin[0]) / stride_x), int((y - origin[1]) / stride_y)
            if not (0 <= column < width and 0 <= row < height):
                continue
            radius = max(min_radius, int((mmdet_radius if convention == "mmdet" else mmdet3d_radius)(h, w, overlap)))
            draw_one(heatmap[b] if labels is None else heatmap[b, labels[b, slot]], column, row, radius)
    return heatmap


def random_targets(
    shape: tuple[int, ...],  # of the targets
    size: tuple[int, int],  # of the map
    rng: torch.Generator,
    dtype: torch.dtype = torch.int64,
    ellipses: bool = False,
) -> tuple[Tensor, Tensor]:
    """Centres on and around the map and radii from -1 up, so that windows hang over every edge."""
    height, width = size
    radii_shape = (*shape, 2) if ellipses else shape
    x = torch.randint(-4, width + 4, shape, generator=rng)
    y = torch.randint(-4, height + 4, shape, generator=rng)
    return torch.stack([x, y], -1).to(dtype), torch.randint(-1, 6, radii_shape, generator=rng).to(dtype)


def make_flat(
    maps: int = 3,
    height: int = 7,
    width: int = 9,
    targets: int = 12,
    dtype: torch.dtype = torch.int64,
    ellipses: bool = False,
):
    rng = torch.Generator().manual_seed(maps + 10 * targets)
    centers, radii = random_targets((targets,), (height, width), rng, dtype, ellipses)
    heatmaps = torch.rand(maps, height, width, generator=rng) * 0.4  # what is in the map takes part in the maximum
    return heatmaps, centers, radii, torch.randint(max(maps, 1), (targets,), generator=rng).to(dtype)


def make_batched(
    batch: int = 4,
    classes: int | None = None,
    slots: int = 5,
    height: int = 7,
    width: int = 9,
    dtype: torch.dtype = torch.int64,
    ellipses: bool = False,
):
    """Counts from below 0 to beyond the slots, and padding that would show or crash if it were looked at."""
    rng = torch.Generator().manual_seed(batch + 10 * slots)
    centers, radii = random_targets((batch, slots), (height, width), rng, dtype, ellipses)
    heatmap = torch.rand(batch, *([] if classes is None else [classes]), height, width, generator=rng) * 0.4
    counts = torch.arange(-1, batch - 1) * 2
    counts[-1:] = slots + 3
    labels = None if classes is None else torch.randint(classes, (batch, slots), generator=rng).to(dtype)
    if labels is not None:
        labels[torch.arange(slots) >= counts[:, None]] = torch.iinfo(dtype).min
    return heatmap, centers, radii, counts.to(dtype), labels


def make_targets(*args: Any, **kwargs: Any):
    """The same for fresh maps."""
    return make_batched(*args, **kwargs)[1:]


def make_boxes(
    batch: int = 4,
    classes: int | None = None,
    slots: int = 5,
    dtype: torch.dtype = torch.float32,
    box_format: str = "xyxy",
):
    """Boxes about a map of 7 x 9 cells of 4 x 4 pixels, some without area, some too far out; sizes up to 60 pixels."""
    rng = torch.Generator().manual_seed(batch + 10 * slots)
    # Quarters are exact in every dtype, so that all of them mean the same cells.
    center = torch.randint(-8, 160, (batch, slots, 2), generator=rng) / 4
    size = torch.randint(-8, 240, (batch, slots, 2), generator=rng) / 4
    boxes = torch.cat([center, size] if box_format == "cxcywh" else [center - size / 2, center + size / 2], -1)
    *_, counts, labels = make_batched(batch, classes, slots)
    return boxes.to(dtype), labels, counts


def _draw_batched(
    heatmap: Tensor, centers: Tensor, radii: Tensor, counts: Tensor, labels: Tensor | None, *numbers: float
):
    return saccade.draw_heatmap_batched(heatmap, centers, radii, *numbers, labels=labels, counts=counts)


def _draw_ragged(
    heatmap: Tensor, centers: Tensor, radii: Tensor, counts: Tensor, labels: Tensor | None, *numbers: float
):
    ragged = RaggedBatch(centers, sample_sizes=counts)
    like_centers = ragged.create_with_sample_sizes_like_self
    ragged_labels = None if labels is None else like_centers(labels)
    return saccade.draw_heatmap_batched(heatmap, ragged, like_centers(radii), *numbers, labels=ragged_labels)


def _with(function: Callable, numbers: tuple[float, ...]) -> Callable:
    return lambda *inputs: function(*inputs, *numbers)


def _case(name: str, call: Callable, oracle: Callable, make: Callable, *numbers: float) -> Case:
    # Half precision is refused: there the neighbours of a peak would round to 1.
    return Case(
        f"draw_heatmap/{name}",
        _with(call, numbers),
        make,
        _with(oracle, numbers),
        in_place=True,
        dtypes=(torch.float64, torch.float32),
    )


def _case_of_targets(name: str, classes: int | None = None, *numbers: float, **made: Any) -> Case:
    size = made.get("height", 7), made.get("width", 9)
    options = dict(zip(("diameter_to_sigma_factor", "k_scale"), numbers, strict=False))

    def call(centers: Tensor, radii: Tensor, counts: Tensor, labels: Tensor | None) -> Tensor:
        return saccade.heatmap_targets(
            centers, radii, size, labels=labels, num_classes=classes, counts=counts, **options
        )

    def oracle(*inputs: Any) -> Tensor:
        return targets_oracle(*inputs, size, classes, *numbers)

    make = partial(make_targets, classes=classes, **made)
    return Case(f"heatmap_targets/{name}", call, make, oracle, tolerances=OF_FLOAT32)


def _case_of_boxes(
    name: str,
    classes: int | None = None,
    *,
    stride: float | tuple[float, float] = 4,
    overlap: float = 0.3,
    convention: Literal["mmdet", "mmdet3d"] = "mmdet",
    box_format: Literal["xyxy", "cxcywh"] = "xyxy",
    made: dict[str, Any] | None = None,
    **options: Any,
) -> Case:
    size, of_boxes = (7, 9), (stride, overlap, convention)

    def call(boxes: Tensor, labels: Tensor | None, counts: Tensor) -> Tensor:
        return saccade.boxes_to_heatmap(
            boxes, labels, size, *of_boxes, num_classes=classes, counts=counts, box_format=box_format, **options
        )

    def oracle(boxes: Tensor, labels: Tensor | None, counts: Tensor) -> Tensor:
        return boxes_oracle(boxes, labels, counts, size, classes, *of_boxes, box_format=box_format, **options)

    make = partial(make_boxes, classes=classes, box_format=box_format, **(made or {}))
    return Case(f"boxes_to_heatmap/{name}", call, make, oracle, tolerances=OF_FLOAT32)


# Fresh maps are float32, whatever dtype boxes have.
OF_FLOAT32 = dict.fromkeys(TOLERANCES, TOLERANCES[torch.float32])

CASES = [
    _case("flat", saccade.draw_heatmap, flat_oracle, make_flat),
    _case("flat-int32", saccade.draw_heatmap, flat_oracle, partial(make_flat, dtype=torch.int32)),
    _case("flat-factor-and-scale", saccade.draw_heatmap, flat_oracle, make_flat, 2.5, 0.8),
    _case("flat-one-row", saccade.draw_heatmap, flat_oracle, partial(make_flat, height=1)),
    _case("flat-ellipses", saccade.draw_heatmap, flat_oracle, partial(make_flat, ellipses=True)),
    _case("no-targets", saccade.draw_heatmap, flat_oracle, partial(make_flat, targets=0)),
    _case("no-rows", saccade.draw_heatmap, flat_oracle, partial(make_flat, height=0)),
    _case("no-columns", saccade.draw_heatmap, flat_oracle, partial(make_flat, width=0)),
    _case("no-maps", saccade.draw_heatmap, flat_oracle, partial(make_flat, maps=0, targets=0)),
    _case("batched", _draw_batched, batched_oracle, make_batched),
    _case("classes", _draw_batched, batched_oracle, partial(make_batched, classes=4)),
    _case("classes-int32", _draw_batched, batched_oracle, partial(make_batched, classes=4, dtype=torch.int32)),
    _case("classes-factor-and-scale", _draw_batched, batched_oracle, partial(make_batched, classes=2), 3.0, 1.5),
    _case("ellipses", _draw_batched, batched_oracle, partial(make_batched, ellipses=True)),
    _case("ragged", _draw_ragged, batched_oracle, make_batched),
    _case("ragged-classes", _draw_ragged, batched_oracle, partial(make_batched, classes=4)),
    _case("no-slots", _draw_batched, batched_oracle, partial(make_batched, slots=0)),
    _case("batch-0", _draw_batched, batched_oracle, partial(make_batched, batch=0, classes=4)),
    _case_of_targets("one-class"),
    _case_of_targets("classes", 4),
    _case_of_targets("ellipses-int32", 2, 3.0, 1.5, dtype=torch.int32, ellipses=True),
    _case_of_targets("negative-scale", None, 6.0, -1.0),
    _case_of_targets("no-slots", 4, slots=0),
    _case_of_targets("no-rows", height=0),
    _case_of_targets("batch-0", batch=0),
    _case_of_boxes("one-class"),
    _case_of_boxes("classes", 4),
    _case_of_boxes("mmdet3d", 2, convention="mmdet3d", overlap=0.1, min_radius=2),
    _case_of_boxes("centres", box_format="cxcywh", stride=(4.0, 3.2), origin=(-2.5, 1.0)),
    _case_of_boxes("no-slots", 4, made={"slots": 0}),
    _case_of_boxes("batch-0", made={"batch": 0}),
]
