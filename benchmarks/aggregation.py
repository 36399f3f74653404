"""``deformable_aggregation`` and ``feature_maps_format`` on the workloads of ``workloads.py``."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import saccade
from benchmarks.accuracy import WrongResultError, require_accurate
from benchmarks.aggregation_oracle import exact
from benchmarks.clocks import device_us
from benchmarks.records import COPY_BYTES_PER_US, IsWanted, Say, new_record
from benchmarks.training_step import as_leaves, forget, forward_backward, memory_of, size_of
from benchmarks.workloads import AGGREGATION, AggregationInputs, aggregation, aggregation_floor_bytes, wall_us

WORKLOADS = [*((name, torch.float32) for name in AGGREGATION), ("det-b8", torch.bfloat16), ("det-b8", torch.float16)]
MAPS_WORKLOAD = "det-b8"  # what is also timed as a list of maps, and from there to rows

# Microseconds of the original CUDA kernel, forward and backward, on one NVIDIA H200 with torch 2.11 and CUDA 13.0,
# taken with the same inputs and the same clock.
RECORDED_US = {
    "det-b1": {"forward": 559, "backward": 1704},
    "det-b8": {"forward": 4325, "backward": 13301},
    "map-b8": {"forward": 11065, "backward": 32153},
    "all-visible-b8": {"forward": 6860, "backward": 163966},
    "points39-b8": {"forward": 12881, "backward": 38859},
    "cameras12-b8": {"forward": 8603, "backward": 27077},
}


def workloads() -> list[str]:
    """Names of all workloads."""
    others = [f"aggregation-maps/{MAPS_WORKLOAD}", f"feature_maps_format/{MAPS_WORKLOAD}"]
    return [*(f"aggregation/{name}" for name, _ in WORKLOADS), *others]


def records(quick: bool, say: Say, is_wanted: IsWanted) -> Iterator[dict[str, Any]]:
    """One record for each workload that is wanted and pass; ``quick`` leaves out the baselines."""
    for name, dtype in WORKLOADS:
        if is_wanted(f"aggregation/{name}"):
            yield from _on_rows(name, dtype, quick, say)
            forget()
    if is_wanted(f"aggregation-maps/{MAPS_WORKLOAD}"):
        yield from _on_maps(MAPS_WORKLOAD, say)
        forget()
    if is_wanted(f"feature_maps_format/{MAPS_WORKLOAD}"):
        yield from _formatting(MAPS_WORKLOAD, quick, say)
        forget()


def _on_rows(name: str, dtype: torch.dtype, quick: bool, say: Say) -> Iterator[dict[str, Any]]:
    """The operator on rows of features, as ``feature_maps_format`` makes them: every pass."""
    workload, short = f"aggregation/{name}", str(dtype).removeprefix("torch.")
    say(f"{workload} {short}: checking")
    inputs = aggregation(**AGGREGATION[name], dtype=dtype)
    features, shape, start, location, weights = inputs
    leaves = as_leaves(features, location, weights)

    def call(features: Tensor, location: Tensor, weights: Tensor) -> Tensor:
        return saccade.deformable_aggregation(features, shape, start, location, weights)

    def forward() -> Tensor:
        with torch.no_grad():
            return call(features, location, weights)

    def backward() -> tuple[Tensor, Tensor, Tensor]:
        grads = torch.ops.saccade.deformable_aggregation_backward(grad_output, [features], *inputs[1:], [True] * 3)
        grad_location, grad_weights, (grad_features,) = grads
        return grad_features, grad_location, grad_weights

    def both() -> Tensor:
        return forward_backward(call, leaves, grad_output)

    output = forward()
    grad_output = torch.randn_like(output)
    results = {
        "forward": [output, None, None, None],
        "backward": [None, *backward()],
        "backward-deterministic": [None, *_same_every_time(workload, short, backward)],
        "forward+backward": [both(), *(leaf.grad for leaf in leaves)],
    }
    errors = relative_errors(inputs, grad_output, results)
    del output, results
    require_accurate(workload, short, errors)
    floors = _floors(inputs)

    def record(kind: str, clock: str, saccade_us: float, **more: Any) -> dict[str, Any]:
        common = {"dtype": short, "floor_us": floors[kind], "error": errors[kind]}
        return new_record(workload, kind, clock, saccade_us, **common, **more)

    compare = dtype == torch.float32 and not quick  # grid_sample wants features of the dtype of the locations
    maps = channels_last(inputs) if compare else []
    recorded: Mapping[str, float] = RECORDED_US.get(name, {}) if dtype == torch.float32 else {}

    def original(kind: str) -> dict[str, float]:
        return {"original CUDA kernel": recorded[kind]} if kind in recorded else {}

    say(f"{workload} {short}: timing forward")
    baselines = {}
    if compare:
        with torch.no_grad():
            baselines["grid_sample"] = device_us(lambda: _grid_sample(location, weights, *maps), inner=2, repeats=5)
    yield record("forward", "device", device_us(forward), baselines=baselines, recorded=original("forward"))
    say(f"{workload} {short}: timing backward")
    yield record("backward", "device", device_us(backward), recorded=original("backward"))
    with _deterministic():
        saccade_us = device_us(backward)
    yield record("backward-deterministic", "device", saccade_us)

    say(f"{workload} {short}: timing forward + backward")
    memory = memory_of(both, [*leaves, shape, start, grad_output])
    saccade_us = wall_us(both, calls=50)
    baselines = {}
    if compare:
        maps_leaves = as_leaves(location, weights, *maps)
        forms = {"grid_sample": _grid_sample, "grid_sample compiled": torch.compile(_grid_sample, dynamic=False)}
        for form, by_grid_sample in forms.items():
            say(f"{workload} {short}: timing forward + backward of {form}")
            baselines[form] = wall_us(
                lambda sampled=by_grid_sample: forward_backward(sampled, maps_leaves, grad_output), calls=5, repeats=3
            )
    yield record("forward+backward", "wall", saccade_us, baselines=baselines, **memory)


def _on_maps(name: str, say: Say) -> Iterator[dict[str, Any]]:
    """The operator on a list of channels-last maps, of which it makes no rows."""
    workload = f"aggregation-maps/{name}"
    say(f"{workload}: checking")
    inputs = aggregation(**AGGREGATION[name])
    leaves = as_leaves(inputs.sampling_location, inputs.weights, *channels_last(inputs))

    def call(location: Tensor, weights: Tensor, *maps: Tensor) -> Tensor:
        return saccade.deformable_aggregation(list(maps), None, None, location, weights)

    def forward() -> Tensor:
        with torch.no_grad():
            return call(*leaves)

    def both() -> Tensor:
        return forward_backward(call, leaves, grad_output)

    output = forward()
    grad_output = torch.randn_like(output)
    trained = both()
    grad_location, grad_weights, *grad_maps = (leaf.grad for leaf in leaves)
    results = {
        "forward": [output, None, None, None],
        "forward+backward": [trained, plain_rows(grad_maps), grad_location, grad_weights],
    }
    errors = relative_errors(inputs, grad_output, results)
    del output, trained, results, grad_maps
    require_accurate(workload, "float32", errors)
    floors = _floors(inputs)
    del inputs
    for kind, clock, measure in (
        ("forward", "device", lambda: (device_us(forward), {})),
        ("forward+backward", "wall", lambda: (wall_us(both, calls=50), memory_of(both, [*leaves, grad_output]))),
    ):
        say(f"{workload}: timing {kind}")
        saccade_us, memory = measure()
        yield new_record(workload, kind, clock, saccade_us, floor_us=floors[kind], error=errors[kind], **memory)


def _formatting(name: str, quick: bool, say: Say) -> Iterator[dict[str, Any]]:
    """From a list of maps in the order of PyTorch to rows."""
    workload = f"feature_maps_format/{name}"
    say(f"{workload}: checking")
    features, shape, start, *_ = inputs = aggregation(**AGGREGATION[name])
    maps = [level.contiguous() for level in channels_last(inputs)]
    rows, *indices = saccade.feature_maps_format(maps)
    error = ((rows.double() - features).norm() / features.double().norm()).item()
    require_accurate(workload, "float32", {"forward": error})
    if not all(map(torch.equal, indices, (shape, start))):
        raise WrongResultError(f"{workload} is not timed: spatial_shape or scale_start_index is wrong")
    say(f"{workload}: timing forward")
    floor_us = 2 * size_of(features) / COPY_BYTES_PER_US
    baselines = {} if quick else {"cat of permuted maps": device_us(lambda: plain_rows(maps))}
    saccade_us = device_us(lambda: saccade.feature_maps_format(maps))
    yield new_record(workload, "forward", "device", saccade_us, floor_us=floor_us, error=error, baselines=baselines)


# ---- what is timed beside the operator


def channels_last(inputs: AggregationInputs) -> list[Tensor]:
    """L maps (B, N, C, H, W), the channels of a pixel side by side: the pixels of the rows, as they lie there."""
    cameras = inputs.spatial_shape.shape[0]
    sizes = inputs.spatial_shape[0].tolist()
    pixels = inputs.feature_maps.unflatten(1, (cameras, -1))
    levels = zip(sizes, pixels.split([height * width for height, width in sizes], 2), strict=True)
    return [level.unflatten(2, size).contiguous().permute(0, 1, 4, 2, 3) for size, level in levels]


def plain_rows(maps: Sequence[Tensor]) -> Tensor:
    """What ``feature_maps_format`` does, in PyTorch."""
    return torch.cat([level.permute(0, 1, 3, 4, 2).flatten(2, 3) for level in maps], 2).flatten(1, 2)


def _grid_sample(location: Tensor, weights: Tensor, *maps: Tensor) -> Tensor:
    """The same sums by ``grid_sample``, as detectors do without the operator."""
    grid = (2 * location - 1).permute(0, 3, 1, 2, 4).flatten(0, 1)  # (B * N, A, K, 2)
    cameras, groups = weights.shape[3], weights.shape[5]
    total = 0
    for level, feature in enumerate(maps):
        sampled = F.grid_sample(feature.flatten(0, 1), grid, align_corners=False)  # (B * N, C, A, K)
        sampled = sampled.unflatten(0, (-1, cameras)).unflatten(2, (groups, -1))
        total = total + torch.einsum("bngcak,bakng->bagc", sampled, weights[:, :, :, :, level])
    return total.flatten(2)


# ---- what is known of a workload


def relative_errors(
    inputs: AggregationInputs,
    grad_output: Tensor,
    results: Mapping[str, Sequence[Tensor | None]],  # output and gradients of features, locations, weights; or None
) -> dict[str, float]:
    """The largest relative error among the tensors of each result, over the whole batch."""
    features, shape, start, location, weights = inputs
    norms = features.new_zeros(4, dtype=torch.float64)  # squared, as are the differences
    differences = {name: torch.zeros_like(norms) for name in results}
    for b in range(features.shape[0]):
        expected = exact(features[b], shape, start, location[b], weights[b], grad_output[b])
        for k, right in enumerate(expected):
            norms[k] += right.square().sum()
            for name, result in results.items():
                if (tensor := result[k]) is not None:
                    differences[name][k] += (tensor[b].double() - right).square().sum()
    return {name: (squares / norms).max().sqrt().item() for name, squares in differences.items()}


def _same_every_time(workload: str, dtype: str, backward: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    with _deterministic():
        first, second = backward(), backward()
    if not all(map(torch.equal, first, second)):
        raise WrongResultError(f"{workload} ({dtype}) is not timed: backward-deterministic differs from run to run")
    return first


@contextmanager
def _deterministic() -> Iterator[None]:
    """As training with deterministic algorithms, but without its filling of every new tensor."""
    before = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warns)
        torch.utils.deterministic.fill_uninitialized_memory = fills


def _floors(inputs: AggregationInputs) -> dict[str, float]:
    """Microseconds by pass that moving the fewest bytes takes."""
    forward, backward = (moved / COPY_BYTES_PER_US for moved in aggregation_floor_bytes(inputs))
    return {
        "forward": forward,
        "backward": backward,
        "backward-deterministic": backward,
        "forward+backward": forward + backward,
    }
