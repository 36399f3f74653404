"""All that draws heatmaps, on a GPU. Sizes are (samples, slots for targets of a sample)."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

import saccade
from cases.on_gpu import (
    BEYOND_32_BITS,
    DEVICE,
    Beyond,
    Call,
    Compiled,
    Few,
    Memory,
    OnGpu,
    Sizes,
    as_given,
    copied_as_it_lies,
)

# Of a cell, relative to itself: the exponent, of up to 13, is rounded a few times, and a GPU's power of 2 is wrong by
# two ulps.
TOLERANCES = {torch.float32: 4e-6, torch.float64: 1e-12}


def targets(samples: int, slots: int, seed: int = 0) -> list[Tensor]:
    """Centres, radii and labels of every kind for five maps of (37, 53), out of range ones too, and counts."""
    rng = torch.Generator().manual_seed(seed)

    def whole(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=rng)

    x, y = whole(-9, 53 + 9, samples, slots), whole(-9, 37 + 9, samples, slots)
    radii, labels = whole(-1, 12, samples, slots), whole(-1, 5 + 1, samples, slots)
    counts = whole(-1, slots + 2, samples)
    return [value.to(DEVICE) for value in (torch.stack([x, y], -1), radii, labels, counts)]


# ---- ways to draw into maps, and into fresh ones; each returns them


def flat(maps: Tensor, centers: Tensor, radii: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    saccade.draw_heatmap(maps, centers.flatten(0, 1), radii.flatten(), labels.flatten())
    return maps


def batched(maps: Tensor, centers: Tensor, radii: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    saccade.draw_heatmap_batched(maps, centers, radii, counts=counts)
    return maps


def classes(maps: Tensor, centers: Tensor, radii: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    saccade.draw_heatmap_batched(maps, centers, radii, 5.0, 0.7, labels, counts=counts)
    return maps


def ellipses(maps: Tensor, centers: Tensor, radii: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    both = torch.stack([radii, radii.flip(1)], -1)
    saccade.draw_heatmap_batched(maps, centers, both, labels=labels, counts=counts)
    return maps


def negative(maps: Tensor, centers: Tensor, radii: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    saccade.draw_heatmap_batched(maps, centers, radii, k_scale=-0.5, counts=counts)
    return maps


def fresh(centers: Tensor, radii: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    return saccade.heatmap_targets(centers, radii, (137, 153), labels=labels, num_classes=5, counts=counts)


def boxes(centers: Tensor, radii: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    corners = torch.cat([centers, radii[..., None] * 7, radii.flip(1)[..., None] * 5], -1).float() * 1.7
    return saccade.boxes_to_heatmap(
        corners, labels, (37, 53), 1.7, 0.3, "mmdet", num_classes=5, counts=counts, box_format="cxcywh"
    )


SIZES = Sizes(
    usual=(6, 40),
    compared=((6, 40), (2, 300)),
    repeated=((40, 90),),
    overlapping=((6, 40),),
    chained=(6, 40),
    chained_in_a_graph=(6, 40),
    told_apart=((6, 40), (1, 16), (16, 1), (1, 1)),
    numbered=lambda number: (6, 50 + number),
    unseen=lambda number: ((7, 23 + number),),
)


def _advance(values: list[Tensor], results: list[Tensor]) -> None:
    """Radii that are made from the maps drawn before; and into these is drawn, if maps are an input."""
    *maps, _, radii, _, _ = values
    radii.add_((results[0].sum() * 1000).long()).remainder_(13)
    for into in maps:
        into.copy_(results[0] * 0.9)


def _large(values: list[Tensor]) -> None:
    """All slots are targets, and large."""
    *_, radii, _, counts = values
    radii.add_(12)
    counts.fill_(radii.shape[1])


def _without_wrong_labels(values: list[Tensor]) -> list[Tensor]:
    """Targets of maps that do not exist lie where nothing is drawn."""
    *maps, centers, radii, labels, counts = values
    wrong = (labels < 0) | (labels > 4)
    return [*maps, centers.masked_fill(wrong[..., None], -(10**6)), radii, labels.clamp(0, 4), counts]


_case = partial(
    OnGpu,
    sizes=SIZES,
    tolerances=TOLERANCES,
    dtypes=(torch.float32,),
    same_on_every_gpu=True,
    advance=_advance,
    unlike=_large,
    on_cpu=_without_wrong_labels,
)


def _into_maps(draw: Call, *shape: int, by_sample: bool = True, background: float | None = None, **how) -> OnGpu:
    """Drawing into maps of a shape, for each sample or for all together, that hold something already."""

    def make(size: tuple[int, int], dtype: torch.dtype, seed: int) -> list[Tensor]:
        of_all = (size[0], *shape) if by_sample else shape
        heights = torch.rand(of_all, generator=torch.Generator().manual_seed(seed)) * 0.2
        if background is not None:
            heights.fill_(background)
        return [heights.to(DEVICE, dtype), *targets(*size, seed)]

    def call(maps: Tensor, *others: Tensor) -> Tensor:
        return draw(copied_as_it_lies(maps), *others)

    dtypes = torch.float32, torch.float64
    return replace(_case(draw.__name__, call, make), contiguous=True, dtypes=dtypes, **how)


def _into_fresh_maps(draw: Call, **how) -> OnGpu:
    return _case(draw.__name__, draw, lambda size, dtype, seed: targets(*size, seed), **how)


IN_PLACE = [
    _into_maps(flat, 5, 37, 53, by_sample=False, told_apart=True),
    _into_maps(batched, 37, 53, on_cpu=as_given),
    _into_maps(classes, 5, 37, 53, told_apart=True),
    _into_maps(ellipses, 5, 137, 153),
    _into_maps(negative, 37, 53, background=-1.0, on_cpu=as_given),
]
CASES = [*IN_PLACE, _into_fresh_maps(fresh), _into_fresh_maps(boxes, told_apart=True)]
TOGETHER = (["classes", "ellipses", "fresh"], (6, 40))


def another(number: int) -> tuple[Call, list[Tensor]]:
    """Another size for each number."""
    return fresh, targets(6, 1 + number)


# ---- memory: drawing allocates nothing, and what makes fresh maps these alone; the allocator rounds up


def _drawn_into(maps: Tensor, centers: Tensor, radii: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    saccade.draw_heatmap_batched(maps, centers, radii, labels=labels, counts=counts)
    return maps


MEMORY = [
    Memory(
        "in-place",
        lambda: (_drawn_into, [torch.zeros(6, 5, 137, 153, device=DEVICE), *targets(6, 40)]),
        lambda values, results: 512,
    ),
    Memory("fresh", lambda: (fresh, targets(6, 40)), lambda values, results: 512),
]


# ---- more than 32 bits count


def _whole(values: list) -> Tensor:
    return torch.tensor(values, device=DEVICE)


EQUAL = dict.fromkeys(TOLERANCES, 0.0)  # the same cells of the same targets


def _in_corners(shape: tuple[int, int, int], begin: list[int], end: list[int], radii: list[int]) -> Few:
    """A target near the beginning of the first map and one near the end of the last, of many cells and of few."""
    count, height, width = shape

    def draw(maps: Tensor) -> Tensor:
        centers = _whole([[maps.shape[2] - end[0], maps.shape[1] - end[1]], begin])
        saccade.draw_heatmap(maps, centers, _whole(radii), _whole([len(maps) - 1, 0]))
        return maps

    def corners(maps: Tensor) -> list[Tensor]:
        side = 20 if len(maps) > 1 else 10
        return [maps[0, :side, :side].clone(), maps[-1, -side:, -side:].clone()]

    few = draw(torch.zeros(min(count, 2), min(height, 20), min(width, 20), device=DEVICE))

    def of_few(results: list[Tensor]) -> list[Tensor]:
        assert sum(part.count_nonzero() for part in results[0].flatten().split(2**28)) == few.count_nonzero()
        return corners(results[0])

    return Few(draw, [torch.zeros(shape, device=DEVICE)], corners(few), of_few, tolerances=EQUAL)


def _many_maps() -> Few:
    """The last map begins beyond 2^31 cells."""
    side = 8192
    return _in_corners((BEYOND_32_BITS // side**2 + 2, side, side), begin=[3, 4], end=[2, 1], radii=[3, 2])


def _one_map(height: int, width: int) -> Few:
    return _in_corners((1, height, width), begin=[0, 0], end=[1, 1], radii=[2, 2])


def _far_strides() -> Few:
    apart = 2**30 + 3
    memory = torch.full((3 * apart + 64,), -7, dtype=torch.int32, device=DEVICE)
    centers = memory.as_strided((1, 4, 2), (5, apart, 1))
    radii, labels = memory.as_strided((1, 4), (5, apart), 2), memory.as_strided((1, 4), (5, apart), 3)
    centers.copy_(torch.arange(8).view(1, 4, 2) * 2)
    radii.copy_(torch.tensor([[0, 1, 2, 3]]))
    labels.copy_(torch.tensor([[0, 1, 2, 1]]))

    def call(centers: Tensor, radii: Tensor, labels: Tensor) -> Tensor:
        return saccade.heatmap_targets(centers, radii, (20, 20), labels=labels, num_classes=3, counts=_whole([4]))

    expected = call(*(value.contiguous() for value in (centers, radii, labels)))
    assert expected.count_nonzero() > 50
    return Few(call, [centers, radii, labels], [expected], tolerances=EQUAL)


_ONE_MAP: dict[str, tuple[int, int]] = {
    "square": (50_000, 50_000),
    "column": (2**31 + 64, 1),
    "row": (1, 2**31 + 64),
}
BEYOND = [
    Beyond("maps", 12, _many_maps),
    *(Beyond(f"one-map-{name}", 14, partial(_one_map, *shape)) for name, shape in _ONE_MAP.items()),
    Beyond("strides", 30, _far_strides),
]


# ---- torch.compile


def _head(centers: Tensor, radii: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    maps = torch.zeros(len(counts), 5, 37, 53, device=centers.device)
    saccade.draw_heatmap_batched(maps, centers, radii, labels=labels, counts=counts)
    others = saccade.heatmap_targets(centers, radii, (37, 53), labels=labels, num_classes=5, counts=counts)
    return 2 * maps + others


COMPILED = [Compiled("classes", lambda: _head, lambda batch: targets(batch, 40), (9, 10, 14))]
