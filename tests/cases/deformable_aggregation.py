"""Cases of ``deformable_aggregation``; the oracle is a plain loop over points, written from the definition."""

import math
from functools import partial

import torch
from torch import Tensor

import saccade
from cases import Case


def oracle(feature_maps: Tensor, spatial_shape: Tensor, scale_start_index: Tensor, location: Tensor, weights: Tensor):
    """One visible point, level and corner at a time; autograd of it gives the gradients."""
    batch, pixels, channels = feature_maps.shape
    _, anchors, points, cameras, levels, groups = weights.shape
    block = channels // groups if groups else 0
    rows = []
    for b, a in [(b, a) for b in range(batch) for a in range(anchors)]:
        total = feature_maps.new_zeros(channels)
        for p, n in [(p, n) for p in range(points) for n in range(cameras)]:
            x, y = location[b, a, p, n]
            if not (0 < x < 1 and 0 < y < 1):
                continue
            for level in range(levels):
                height, width = spatial_shape[n, level].tolist()
                u, v = x * width - 0.5, y * height - 0.5
                j0, i0 = math.floor(u.detach()), math.floor(v.detach())
                for i, share_y in ((i0, 1 - (v - i0)), (i0 + 1, v - i0)):
                    for j, share_x in ((j0, 1 - (u - j0)), (j0 + 1, u - j0)):
                        row = int(scale_start_index[n, level]) + i * width + j
                        if 0 <= i < height and 0 <= j < width and 0 <= row < pixels:
                            weight = weights[b, a, p, n, level].repeat_interleave(block)
                            total = total + share_x * share_y * weight * feature_maps[b, row]
        rows.append(total)
    return (
        torch.stack(rows).view(batch, anchors, channels) if rows else feature_maps.new_zeros(batch, anchors, channels)
    )


def make(
    shapes: list[list[tuple[int, int]]],  # (height, width) per camera and level
    batch: int = 2,
    anchors: int = 4,
    points: int = 3,
    groups: int = 2,
    channels: int = 4,
    index_dtype: torch.dtype = torch.int64,
    spread: float = 1.4,  # locations cover this much of the image's width, the middle of it
) -> tuple[Tensor, ...]:
    """Random inputs whose points lie partly outside the images."""
    rng = torch.Generator().manual_seed(batch + 10 * anchors + 100 * points)
    cameras = len(shapes)
    spatial_shape = torch.tensor(shapes, dtype=index_dtype).reshape(cameras, -1, 2)
    areas = spatial_shape.prod(-1).flatten()
    start = (areas.cumsum(0) - areas).view(spatial_shape.shape[:2]).to(index_dtype)
    random = partial(torch.randn, generator=rng)
    location = (torch.rand(batch, anchors, points, cameras, 2, generator=rng) - 0.5) * spread + 0.5
    return (
        random(batch, int(areas.sum()), channels).requires_grad_(),
        spatial_shape,
        start,
        location.requires_grad_(),
        random(batch, anchors, points, cameras, spatial_shape.shape[1], groups).requires_grad_(),
    )


RIG = [[(6, 8), (3, 4)], [(6, 8), (3, 4)]]


def _unusual_locations() -> tuple[Tensor, ...]:
    """Points on the border, far away, NaN and infinite, beside ordinary ones."""
    inputs = make(RIG, batch=1, anchors=2, points=4)
    with torch.no_grad():
        inputs[3][0, 0, 0] = torch.tensor([0.0, 0.5])
        inputs[3][0, 0, 1] = torch.tensor([1.0, 0.5])
        inputs[3][0, 0, 2] = torch.tensor([float("nan"), 0.5])
        inputs[3][0, 1, 0] = torch.tensor([0.5, float("inf")])
        inputs[3][0, 1, 1] = torch.tensor([1e30, -1e30])
        inputs[3][0, 1, 2] = torch.tensor([1e-6, 1 - 1e-6])
    return inputs


def _case(name: str, *args, anchors: int = 3, **kwargs) -> Case:
    inputs = partial(make, *args, anchors=anchors, **kwargs)
    return Case(f"deformable_aggregation/{name}", saccade.deformable_aggregation, inputs, oracle)


CASES = [
    _case("rig", RIG),
    _case("cameras-of-different-sizes", [[(5, 7), (2, 2)], [(3, 9), (1, 4)], [(1, 1), (6, 1)]], groups=1, channels=3),
    _case("one-channel-per-group", RIG, groups=6, channels=6, batch=1),
    _case("int32-indices", RIG, index_dtype=torch.int32, batch=1),
    _case("map-without-pixels", [[(6, 8), (0, 4)], [(6, 8), (3, 0)]], batch=1),
    _case("all-invisible", RIG, spread=-50, batch=1, anchors=1),
    Case("deformable_aggregation/unusual-locations", saccade.deformable_aggregation, _unusual_locations, oracle),
    _case("batch-0", RIG, batch=0),
    _case("no-anchors", RIG, anchors=0),
    _case("no-points", RIG, points=0),
    _case("no-channels", RIG, channels=0, groups=1),
    _case("no-pixels", [[(0, 0)]], groups=1),
    _case("no-levels", [[], []], groups=1),
]
