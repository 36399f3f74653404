"""``deformable_aggregation`` on a GPU, of rows and of lists of maps, and ``feature_maps_format`` before it."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import saccade
from benchmarks.aggregation_oracle import exact
from benchmarks.workloads import aggregation
from cases.deformable_aggregation import make
from cases.on_gpu import (
    DEVICE,
    NAN,
    Beyond,
    Call,
    Compiled,
    Few,
    Memory,
    OnGpu,
    Sizes,
    bytes_of,
    with_many_between,
    without_those_between,
)

FORMS = ["rows", "maps"]  # of the features: what `feature_maps_format` makes, or a list of channels-last maps
CONFIGS = {"det": (900, 13), "map": (100, 300)}  # anchors, key points: SparseDrive's detector and its map

# Largest relative error (norm of the difference over norm of the exact result). Sums are taken in float32 and rounded
# once to the dtype of the result: a few dozen roundings of float32, or half an ulp of the smaller dtypes.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}


# ---- forms of the features


def channels_last(level: Tensor) -> Tensor:
    """A map (B, N, C, H, W) whose channels lie side by side."""
    return level.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)


def on_maps(*values: Tensor) -> Tensor:
    *maps, location, weights = values
    return saccade.deformable_aggregation(maps, None, None, location, weights)


def on_two_groups(*values: Tensor) -> Tensor:
    *maps, location, weights = values
    half = len(maps) // 2
    return saccade.deformable_aggregation([maps[:half], maps[half:]], None, None, location, weights)


def formatted(*values: Tensor) -> Tensor:
    *maps, location, weights = values
    return saccade.deformable_aggregation(*saccade.feature_maps_format(maps), location, weights)


def in_form(form: str, inputs: Sequence[Tensor]) -> tuple[Call, list[Tensor]]:
    """The operator as a function of tensors, and those, of which features, locations and weights require gradients."""
    features, shape, start, location, weights = inputs
    leaves = [features.detach(), location.detach(), weights.detach()]
    if form == "rows":
        features, location, weights = (leaf.requires_grad_() for leaf in leaves)
        return saccade.deformable_aggregation, [features, shape, start, location, weights]
    (maps,) = saccade.feature_maps_format([leaves[0], shape, start], inverse=True)
    return on_maps, [leaf.requires_grad_() for leaf in (*map(channels_last, maps), *leaves[1:])]


def rows_of(maps: Sequence[Tensor]) -> Tensor:
    """(B, S, C) of maps (B, N, C, H_l, W_l), or of rows, which they are already."""
    if maps[0].dim() == 3:
        return maps[0]
    return torch.cat([level.permute(0, 1, 3, 4, 2).flatten(2, 3) for level in maps], 2).flatten(1, 2)


# ---- cases


class Scene(NamedTuple):
    """Inputs of the size of a workload; or with the length of a side, of small maps of that height."""

    batch: int
    anchors: int
    points: int = 13
    side: int | None = None
    where: str = "rig"  # key points of a workload: rig, all, or one-pixel, at one and the same place of every camera

    def __str__(self) -> str:
        return f"{self.batch}x{self.anchors}x{self.points}-{self.where if self.side is None else self.side}"


def exact_in_float32(location: Tensor) -> Tensor:
    """Near by, and odd multiples of 2**-13: pixel coordinates are then the same in float32 and in float64.

    None is a whole number, where the derivative is another one on either side.
    """
    return ((location * 2**12).floor() + 0.5) / 2**12


def _maps(scene: Scene, seed: int) -> list[Tensor]:
    """Maps (B, N, C, H_l, W_l), locations and weights."""
    batch, anchors, points, side, where = scene
    if side is None:
        visible = "rig" if where == "one-pixel" else where
        inputs = aggregation(batch, anchors, points, device=DEVICE, seed=seed, visible=visible)
        if where == "one-pixel":
            inputs.sampling_location.fill_(0.37)
        (maps,) = saccade.feature_maps_format(list(inputs[:3]), inverse=True)
        return [*maps, exact_in_float32(inputs.sampling_location), inputs.weights]
    rng = torch.Generator().manual_seed(seed)
    cameras, channels, groups = 3, 16, 4
    sizes = [(side, 2 * side + 3), (side // 2, side)]
    maps = [torch.randn(batch, cameras, channels, *size, generator=rng) for size in sizes]
    location = exact_in_float32(torch.rand(batch, anchors, points, cameras, 2, generator=rng) * 1.4 - 0.2)
    weights = torch.randn(batch, anchors, points, cameras, len(sizes), groups, generator=rng)
    return [value.to(DEVICE) for value in (*maps, location, weights)]


def _inputs(form: str, scene: Scene, dtype: torch.dtype, seed: int) -> list[Tensor]:
    *maps, location, weights = _maps(scene, seed)
    maps = [level.to(dtype) for level in maps]
    indices = []
    if form == "rows":
        rows, *indices = saccade.feature_maps_format(maps)
        maps, indices = [rows], [index.clone() for index in indices]  # kept ones are not to be written to
    elif form == "maps":
        maps = [channels_last(level) for level in maps]
    elif form == "groups":  # the last two cameras have images of another shape
        maps = [level[:, :-2].contiguous() for level in maps] + [level[:, -2:].mT.contiguous() for level in maps]
    else:
        maps = [level.contiguous() for level in maps]
    features = [feature.requires_grad_() for feature in maps]
    return [*features, *indices, location.requires_grad_(), weights.requires_grad_()]


def _all_visible(values: list[Tensor]) -> None:
    """Many more points than of a rig."""
    location = values[-2]
    rng = torch.Generator().manual_seed(0)
    location.copy_(exact_in_float32(torch.rand(location.shape, generator=rng)))


SMALL = Scene(2, 10, 3, 9)
SIZES = Sizes(
    usual=Scene(1, 100),
    compared=(SMALL, Scene(1, 40, 5, 16)),
    repeated=(Scene(2, 900), Scene(2, 900, where="one-pixel")),
    overlapping=(Scene(1, 100),),
    chained=Scene(1, 100),
    chained_in_a_graph=SMALL,
    told_apart=(Scene(1, 16, 4, 16), Scene(1, 1, 1, 2), Scene(2, 5, 1, 5)),
    numbered=lambda number: Scene(1, 5 + number, 3, 8),
    unseen=lambda number: (Scene(2, 10, 3, 9 + 2 * number),),
    outlasting=10,
)
ONLY_SMALL = replace(SIZES, usual=SMALL, repeated=(SMALL,), overlapping=(SMALL,), chained=SMALL)
AT_REAL_SIZE_TOO = replace(SIZES, unseen=lambda number: (Scene(2, 10, 3, 9 + 2 * number), Scene(8, *CONFIGS["det"])))


def _case(form: str, call: Call, sizes: Sizes = SIZES, told_apart: bool = False) -> OnGpu:
    return OnGpu(
        form,
        call,
        partial(_inputs, form),
        sizes,
        TOLERANCES,
        elementwise=True,
        told_apart=told_apart,
        cast_by_autocast=True,
        step_size=0.01,  # of locations, too, which stay in the images
        unlike=_all_visible,
    )


CASES = [
    _case("rows", saccade.deformable_aggregation, AT_REAL_SIZE_TOO, told_apart=True),
    _case("maps", on_maps, told_apart=True),
    _case("format", formatted),
    _case("contiguous-maps", on_maps, ONLY_SMALL),
    _case("groups", on_two_groups, ONLY_SMALL),
]
TOGETHER = (["rows", "maps", "format"], Scene(1, 100))


def another(number: int) -> tuple[Call, list[Tensor]]:
    """Another size for each number, of maps too."""
    return on_maps, _inputs("maps", Scene(1, 7, 2, 20 + number), torch.float32, 0)


# ---- memory: inputs, output and gradients, and at most 15% more


def _all_that_is_needed(values: list[Tensor], results: list[Tensor]) -> int:
    return bytes_of(*values, results[0], *results)  # the gradient of the output is as large as the output


MEMORY = [
    Memory(
        form,
        lambda form=form: in_form(form, aggregation(8, *CONFIGS["det"], device=DEVICE)),
        lambda values, results: 0.15 * _all_that_is_needed(values, results),
    )
    for form in FORMS
]


# ---- more than 32 bits count


def _exact_of_one_sample(inputs: Sequence[Tensor], grad_output: Tensor) -> list[Tensor]:
    features, shape, start, location, weights = (value.detach() for value in inputs)
    results = exact(features[0], shape, start, location[0], weights[0], grad_output[0].to(features.dtype))
    return [result[None] for result in results]


def _many_features(form: str) -> Few:
    """Points in the first and in the last rows of one tall map, of which all other rows are NaN."""
    height, width, channels, edge = 2**20, 33, 64, 4
    few = torch.randn(1, 2 * edge * width, channels, device=DEVICE, dtype=torch.float16)
    features = with_many_between(few, height * width, NAN, dim=1)
    # Eighths of a pixel from the upper or lower border: exact in float32 however tall the map, as its height and that
    # of the small one, which has the first and the last rows alone, are powers of two.
    anchors, points = 64, 4
    rng = torch.Generator().manual_seed(0)
    away = torch.randint(1, 8 * edge - 4, (1, anchors, points, 1), generator=rng) / 8
    lower = torch.arange(anchors).view(1, -1, 1, 1) % 2 == 1
    x = torch.rand(1, anchors, points, 1, generator=rng)
    location, small = (
        torch.stack([x, torch.where(lower, rows - away, away) / rows], -1).to(DEVICE) for rows in (height, 2 * edge)
    )
    weights = torch.randn(1, anchors, points, 1, 1, 8, generator=rng).to(DEVICE)
    grad_output = torch.randn(1, anchors, channels, device=DEVICE)
    start = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
    if form == "rows":
        shape = torch.tensor([[[height, width]]], device=DEVICE)
        call, values = in_form("rows", (features, shape, start, location, weights))
    else:  # the same memory as a map
        level = features.view(1, 1, height, width, channels).permute(0, 1, 4, 2, 3)
        call, values = on_maps, [value.requires_grad_() for value in (level, location, weights)]

    def of_few(results: list[Tensor]) -> list[Tensor]:
        output, grad_features, grad_location, grad_weights = results
        grad_features = without_those_between(rows_of([grad_features]), edge * width, dim=1)
        return [
            output,
            grad_features,
            grad_location / torch.tensor([1, height // (2 * edge)], device=DEVICE),
            grad_weights,
        ]

    of_small = few, torch.tensor([[[2 * edge, width]]], device=DEVICE), start, small, weights
    return Few(call, values, _exact_of_one_sample(of_small, grad_output), of_few, grad_output, TOLERANCES)


def _many_weights() -> Few:
    """The first and the last anchors are seen; nothing may come of the others, whose weights are NaN."""
    anchors, points, groups = 2**21 + 64, 16, 64
    few = make([[(5, 7)]], batch=1, anchors=4, points=points, groups=groups, channels=groups)
    features, shape, start, location, weights = (value.detach().to(DEVICE) for value in few)
    weights = weights.half()
    grad_output = torch.randn(1, 4, groups, device=DEVICE)
    many = (
        features,
        shape,
        start,
        with_many_between(location, anchors, -1, 1),
        with_many_between(weights, anchors, NAN, 1),
    )
    call, values = in_form("rows", many)

    def of_few(results: list[Tensor]) -> list[Tensor]:
        output, grad_features, *others = results
        output, *others = (without_those_between(result, 2, dim=1) for result in (output, *others))
        return [output, grad_features, *others]

    expected = _exact_of_one_sample((features, shape, start, location, weights), grad_output)
    return Few(call, values, expected, of_few, with_many_between(grad_output, anchors, NAN, 1), TOLERANCES)


BEYOND = [
    *(Beyond(f"features-{form}", 30, partial(_many_features, form)) for form in FORMS),
    Beyond("weights", 80, _many_weights),
]


# ---- torch.compile

_SHAPES = [[(8, 12), (4, 6)]] * 3


def _head(form: str) -> Call:
    shape = torch.tensor(_SHAPES, device=DEVICE)
    start = torch.tensor([[120 * n, 120 * n + 96] for n in range(3)], device=DEVICE)

    def head(*leaves: Tensor) -> Tensor:
        *features, location, weights = leaves
        features, weights = [feature * 1.5 for feature in features], weights.softmax(1)
        if form == "maps":
            return 2 * saccade.deformable_aggregation(features, None, None, location, weights)
        return 2 * saccade.deformable_aggregation(features[0], shape, start, location, weights)

    return head


def _inputs_of_head(form: str, batch: int) -> list[Tensor]:
    inputs = [value.detach().to(DEVICE) for value in make(_SHAPES, batch, 7, 5, groups=4, channels=16)]
    return [value for value in in_form(form, inputs)[1] if value.requires_grad]


COMPILED = [
    Compiled(form, partial(_head, form), partial(_inputs_of_head, form), (9, 10, 14), autocast)
    for form in FORMS
    for autocast in (None, "around")
]
