"""Cases of ``draw_heatmap`` and ``draw_heatmap_batched``; the oracle draws one cell at a time, from the definition."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import saccade
from cases import Case
from saccade.ragged import RaggedBatch


def draw_one(cells: Tensor, x: int, y: int, radius: int, factor: float = 6.0, k_scale: float = 1.0) -> None:
    """One Gaussian into a map (H, W)."""
    height, width = cells.shape
    sigma = (2 * radius + 1) / factor
    for row in range(max(0, y - radius), min(height, y + radius + 1)):
        for column in range(max(0, x - radius), min(width, x + radius + 1)):
            value = k_scale * math.exp(-((row - y) ** 2 + (column - x) ** 2) / (2 * sigma**2))
            cells[row, column] = max(cells[row, column].item(), value)


def flat_oracle(heatmaps: Tensor, centers: Tensor, radii: Tensor, heatmap_idxes: Tensor, *numbers: float) -> None:
    for (x, y), radius, index in zip(centers.tolist(), radii.tolist(), heatmap_idxes.tolist(), strict=True):
        if radius >= 0:
            draw_one(heatmaps[index], x, y, radius, *numbers)


def batched_oracle(
    heatmap: Tensor, centers: Tensor, radii: Tensor, counts: Tensor, labels: Tensor | None, *numbers: float
):
    for b, count in enumerate(counts.tolist()):
        for slot in range(min(max(count, 0), radii.shape[1])):
            cells = heatmap[b] if labels is None else heatmap[b, labels[b, slot]]
            (x, y), radius = centers[b, slot].tolist(), int(radii[b, slot])
            if radius >= 0:
                draw_one(cells, x, y, radius, *numbers)


def random_targets(
    shape: tuple[int, ...],  # of the targets
    size: tuple[int, int],  # of the map
    rng: torch.Generator,
    dtype: torch.dtype = torch.int64,
) -> tuple[Tensor, Tensor]:
    """Centres on and around the map and radii from -1 up, so that windows hang over every edge."""
    height, width = size
    x = torch.randint(-4, width + 4, shape, generator=rng)
    y = torch.randint(-4, height + 4, shape, generator=rng)
    return torch.stack([x, y], -1).to(dtype), torch.randint(-1, 6, shape, generator=rng).to(dtype)


def make_flat(maps: int = 3, height: int = 7, width: int = 9, targets: int = 12, dtype: torch.dtype = torch.int64):
    rng = torch.Generator().manual_seed(maps + 10 * targets)
    centers, radii = random_targets((targets,), (height, width), rng, dtype)
    heatmaps = torch.rand(maps, height, width, generator=rng) * 0.4  # what is in the map takes part in the maximum
    return heatmaps, centers, radii, torch.randint(max(maps, 1), (targets,), generator=rng).to(dtype)


def make_batched(
    batch: int = 4,
    classes: int | None = None,
    slots: int = 5,
    height: int = 7,
    width: int = 9,
    dtype: torch.dtype = torch.int64,
):
    """Counts from below 0 to beyond the slots, and padding that would show or crash if it were looked at."""
    rng = torch.Generator().manual_seed(batch + 10 * slots)
    centers, radii = random_targets((batch, slots), (height, width), rng, dtype)
    heatmap = torch.rand(batch, *([] if classes is None else [classes]), height, width, generator=rng) * 0.4
    counts = torch.arange(-1, batch - 1) * 2
    counts[-1:] = slots + 3
    labels = None if classes is None else torch.randint(classes, (batch, slots), generator=rng).to(dtype)
    if labels is not None:
        labels[torch.arange(slots) >= counts[:, None]] = torch.iinfo(dtype).min
    return heatmap, centers, radii, counts.to(dtype), labels


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


CASES = [
    _case("flat", saccade.draw_heatmap, flat_oracle, make_flat),
    _case("flat-int32", saccade.draw_heatmap, flat_oracle, partial(make_flat, dtype=torch.int32)),
    _case("flat-factor-and-scale", saccade.draw_heatmap, flat_oracle, make_flat, 2.5, 0.8),
    _case("flat-one-row", saccade.draw_heatmap, flat_oracle, partial(make_flat, height=1)),
    _case("no-targets", saccade.draw_heatmap, flat_oracle, partial(make_flat, targets=0)),
    _case("no-rows", saccade.draw_heatmap, flat_oracle, partial(make_flat, height=0)),
    _case("no-columns", saccade.draw_heatmap, flat_oracle, partial(make_flat, width=0)),
    _case("no-maps", saccade.draw_heatmap, flat_oracle, partial(make_flat, maps=0, targets=0)),
    _case("batched", _draw_batched, batched_oracle, make_batched),
    _case("classes", _draw_batched, batched_oracle, partial(make_batched, classes=4)),
    _case("classes-int32", _draw_batched, batched_oracle, partial(make_batched, classes=4, dtype=torch.int32)),
    _case("classes-factor-and-scale", _draw_batched, batched_oracle, partial(make_batched, classes=2), 3.0, 1.5),
    _case("ragged", _draw_ragged, batched_oracle, make_batched),
    _case("ragged-classes", _draw_ragged, batched_oracle, partial(make_batched, classes=4)),
    _case("no-slots", _draw_batched, batched_oracle, partial(make_batched, slots=0)),
    _case("batch-0", _draw_batched, batched_oracle, partial(make_batched, batch=0, classes=4)),
]
