"""Drawing Gaussian heatmaps on the workloads of ``workloads.py``."""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import saccade
from benchmarks import heatmap_oracle
from benchmarks.accuracy import WrongResultError, require_accurate
from benchmarks.clocks import device_us
from benchmarks.records import COPY_BYTES_PER_US, IsWanted, Say, new_record
from benchmarks.training_step import forget, size_of
from benchmarks.workloads import HEATMAP, HeatmapInputs, wall_us
from benchmarks.workloads import heatmap as heatmap_inputs

ALSO_REDRAWN_ON_THE_WALL = "accvlab"  # so small that the call costs more than the drawing

# A cell's own relative error: its exponent, at most 9, has some six roundings of float32 to 6e-8 each, and the power of
# two that is made of it is good to 2e-7.
CELL_TOLERANCE = 4e-6

# Microseconds of ACCV-Lab's CUDA kernels on one NVIDIA H200 with torch 2.11 and CUDA 13.0, taken with the same inputs
# and the same clocks, by pass; clear+draw is clearing and then drawing. On the wall: a call of the package.
RECORDED_US: dict[str, dict[str, float]] = {
    "accvlab": {"redraw": 28.8, "clear+draw": 90.8, "clear+draw-concatenated": 98.5},
    "accvlab-classwise": {"redraw": 34.8, "clear+draw": 88.9, "clear+draw-concatenated": 96.3},
    "centerpoint": {"redraw": 104.8, "clear+draw": 292, "clear+draw-concatenated": 325},
    "centernet": {"redraw": 1364, "clear+draw": 4552, "clear+draw-concatenated": 4624},
    "hires": {"redraw": 7270, "clear+draw": 21884, "clear+draw-concatenated": 21130},
}
RECORDED_WALL_US: dict[str, dict[str, float]] = {"accvlab": {"redraw": 29.7}}


def workloads() -> list[str]:
    """Names of all workloads."""
    return [f"heatmap/{name}" for name in HEATMAP]


def records(quick: bool, say: Say, is_wanted: IsWanted) -> Iterator[dict[str, Any]]:
    """One record for each workload that is wanted and pass; ``quick`` leaves out the baselines."""
    for name in HEATMAP:
        if is_wanted(f"heatmap/{name}"):
            yield from _passes(name, not quick, say)
            forget()


def _passes(name: str, compare: bool, say: Say) -> Iterator[dict[str, Any]]:
    """Every pass on one workload."""
    workload = f"heatmap/{name}"
    say(f"{workload}: checking")
    _, _, _, _, max_radius, *_ = HEATMAP[name]
    inputs = heatmap_inputs(*HEATMAP[name])
    shape, centers, radii, counts, labels = inputs
    targets = concatenated(inputs)
    heatmap = torch.zeros(shape, device=centers.device)
    maps = torch.zeros_like(heatmap).view(-1, *shape[-2:])
    classes = None if labels is None else shape[1]

    def redraw() -> Tensor:
        saccade.draw_heatmap_batched(heatmap, centers, radii, labels=labels, counts=counts)
        return heatmap

    def clear_and_draw() -> Tensor:
        return saccade.heatmap_targets(centers, radii, shape[-2:], labels=labels, num_classes=classes, counts=counts)

    def redraw_concatenated(clear: bool = False) -> Tensor:
        saccade.draw_heatmap(maps, *targets, clear=clear)
        return maps.view(shape)

    def clear_and_draw_concatenated() -> Tensor:
        return redraw_concatenated(clear=True)

    passes = {
        "redraw": redraw,
        "clear+draw": clear_and_draw,
        "redraw-concatenated": redraw_concatenated,
        "clear+draw-concatenated": clear_and_draw_concatenated,
    }
    for call in passes.values():
        call()  # so that what is checked has been drawn into drawn maps, and cleared after that
    expected = heatmap_oracle.exact(inputs)
    errors = checked_errors(workload, expected, {kind: call().clone() for kind, call in passes.items()})
    floors = floors_us(inputs, targets, int((expected > 0).sum()))
    del expected

    def record(kind: str, clock: str, saccade_us: float, recorded: Mapping[str, Mapping[str, float]], **more: Any):
        times = recorded.get(name, {})
        package = {"ACCV-Lab package": times[kind]} if kind in times else {}
        common = {"floor_us": floors[kind], "error": errors[kind], "recorded": package}
        return new_record(workload, kind, clock, saccade_us, **common, **more)

    windows = {
        "redraw": lambda: draw_windows(heatmap, inputs, max_radius),
        "clear+draw": lambda: draw_windows(torch.zeros_like(heatmap), inputs, max_radius),
    }
    for kind, call in passes.items():
        say(f"{workload}: timing {kind}")
        saccade_us, baselines = device_us(call), {}
        if compare and kind in windows:
            say(f"{workload}: timing {kind} in PyTorch")
            baselines["PyTorch, vectorized"] = device_us(windows[kind], inner=4, repeats=5)
        if compare and kind == "clear+draw":
            baselines["clearing alone"] = device_us(torch.zeros_like(heatmap).zero_)
        yield record(kind, "device", saccade_us, RECORDED_US, baselines=baselines)

    for kind in ("redraw", "clear+draw"):
        if kind == "redraw" and name != ALSO_REDRAWN_ON_THE_WALL:
            continue
        say(f"{workload}: timing {kind} on the wall")
        saccade_us, baselines = wall_us(passes[kind]), {}
        if compare:
            say(f"{workload}: timing {kind} on the wall in PyTorch")
            drawn = heatmap if kind == "redraw" else torch.empty_like(heatmap)

            def box_by_box(drawn: Tensor = drawn, kind: str = kind) -> None:
                draw_box_by_box(drawn if kind == "redraw" else drawn.zero_(), inputs)

            baselines["PyTorch, vectorized"] = wall_us(windows[kind], calls=20, repeats=3)
            box_by_box()
            baselines["PyTorch, box by box"] = unwarmed_us(box_by_box, calls=2)
        yield record(kind, "wall", saccade_us, RECORDED_WALL_US, baselines=baselines)


class Concatenated(NamedTuple):
    """The targets of all samples one behind the other, as ``draw_heatmap`` takes them."""

    centers: Tensor  # (M, 2) int32
    radii: Tensor  # (M,) int32
    heatmap_idxes: Tensor  # (M,) int32


def concatenated(inputs: HeatmapInputs) -> Concatenated:
    shape, centers, radii, counts, labels = inputs
    is_target = torch.arange(radii.shape[1], device=radii.device) < counts[:, None]
    return Concatenated(centers[is_target], radii[is_target], _heatmap_idxes(shape, labels, radii)[is_target].int())


def _heatmap_idxes(shape: tuple[int, ...], labels: Tensor | None, radii: Tensor) -> Tensor:  # (B, M)
    """In which of all maps of the batch each target is to be drawn."""
    sample = torch.arange(shape[0], device=radii.device)[:, None].expand_as(radii)
    return sample if labels is None else sample * shape[1] + labels


# ---- what is timed beside the operator


def draw_windows(heatmap: Tensor, inputs: HeatmapInputs, max_radius: int) -> None:
    """In plain PyTorch, all targets at once, in place; nothing waits for the GPU.

    Each target is a window of ``2 * max_radius + 1`` cells a side. Its Gaussian is the product of one along x and one
    along y, both 0 outside the target's own window and the map: what a cell costs beside the scatter is a product for
    its value and a sum for its place. Such a 0 goes to the nearest cell of the map, where it changes nothing.
    """
    shape, centers, radii, counts, labels = inputs
    height, width = shape[-2:]
    slots = torch.arange(radii.shape[1], device=radii.device)
    radii = torch.where(slots < counts[:, None], radii, -1)[..., None]  # (B, M, 1)
    offset = torch.arange(-max_radius, max_radius + 1, device=radii.device)  # (D,)
    decay = torch.exp(-0.5 * (offset * 6 / (2 * radii + 1)).square())  # (B, M, D)
    places, values = [], []
    for center, size in zip(centers.unbind(-1), (width, height), strict=True):
        place = center[..., None] + offset
        is_drawn = (offset.abs() <= radii) & (place >= 0) & (place < size)
        values.append(torch.where(is_drawn, decay, 0.0))
        places.append(place.clamp(0, size - 1))
    row = (_heatmap_idxes(shape, labels, radii[..., 0])[..., None] * height + places[1]) * width
    cell = row[..., :, None] + places[0][..., None, :]  # (B, M, D, D)
    value = values[1][..., :, None] * values[0][..., None, :]
    heatmap.view(-1).scatter_reduce_(0, cell.flatten(), value.flatten(), "amax")


def draw_box_by_box(heatmap: Tensor, inputs: HeatmapInputs) -> None:
    """As detection codebases draw their targets: a loop over samples and boxes, in place.

    For every box its numbers come to the host, which is a wait for the GPU; NumPy computes the window, float64 and
    without values below its resolution; what lies on the map goes to the GPU, and the maximum is taken there.
    """
    shape, centers, radii, counts, labels = inputs
    height, width = shape[-2:]
    columns = [centers, radii[..., None]] if labels is None else [centers, radii[..., None], labels[..., None]]
    targets = torch.cat(columns, -1)
    for b, count in enumerate(counts.tolist()):
        for m in range(count):
            x, y, radius, *label = targets[b, m].tolist()
            left, right = min(x, radius), min(width - x, radius + 1)
            top, bottom = min(y, radius), min(height - y, radius + 1)
            if left + right <= 0 or top + bottom <= 0:
                continue
            offset = np.arange(-radius, radius + 1)
            sigma = (2 * radius + 1) / 6
            window = np.exp(-(offset[:, None] ** 2 + offset**2) / (2 * sigma**2))
            window[window < np.finfo(window.dtype).eps * window.max()] = 0
            window = window[radius - top : radius + bottom, radius - left : radius + right]
            drawn = heatmap[(b, *label)][y - top : y + bottom, x - left : x + right]
            torch.maximum(drawn, torch.from_numpy(window).to(drawn.device, torch.float32), out=drawn)


def unwarmed_us(call: Callable[[], object], calls: int) -> float:
    """Mean wall time of some calls, microseconds: from the very first one on, and one wait for the GPU at the end."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls * 1e6


# ---- what is known of a workload


def checked_errors(workload: str, expected: Tensor, results: Mapping[str, Tensor]) -> dict[str, float]:
    """The relative error of each result (norm).

    Raises:
        WrongResultError: It is too large, or a single cell's is; or other cells are drawn, or are peaks of exactly 1,
            than should be.
    """
    is_drawn, is_peak = expected > 0, expected == 1
    norm = expected.norm()
    errors = {}
    for kind, result in results.items():
        refusal = f"{workload} (float32) is not timed: {kind}"
        if result.shape != expected.shape:
            raise WrongResultError(f"{refusal} has the shape {tuple(result.shape)}, expected {tuple(expected.shape)}")
        for what, found, right in (("drawn", result != 0, is_drawn), ("exactly 1", result == 1, is_peak)):
            if wrong := int((found != right).sum()):
                raise WrongResultError(f"{refusal} is wrong about which cells are {what}: {wrong} of {found.numel()}")
        difference = result.double() - expected
        errors[kind] = (difference.norm() / norm).item()
        require_accurate(workload, "float32", {kind: errors[kind]})
        worst = (difference[is_drawn].abs() / expected[is_drawn]).max().item()
        if not worst <= CELL_TOLERANCE:
            raise WrongResultError(
                f"{refusal} has a cell with a relative error of {worst:.1e}, allowed {CELL_TOLERANCE:.0e}"
            )
    return errors


def floors_us(inputs: HeatmapInputs, targets: Concatenated, drawn_cells: int) -> dict[str, float]:
    """Microseconds by pass that moving the fewest bytes takes.

    Drawing again what the map holds reads each drawn cell; a new map is written as a whole. Of the slots for targets
    only those are read that hold one.
    """
    of_a_batch = size_of(targets.centers, targets.radii, inputs.sample_sizes)
    if inputs.labels is not None:
        of_a_batch += size_of(targets.radii)  # as many labels
    float32 = 4
    maps = torch.Size(inputs.shape).numel() * float32
    moved = {
        "redraw": of_a_batch + drawn_cells * float32,
        "clear+draw": of_a_batch + maps,
        "redraw-concatenated": size_of(*targets) + drawn_cells * float32,
        "clear+draw-concatenated": size_of(*targets) + maps,
    }
    return {kind: size / COPY_BYTES_PER_US for kind, size in moved.items()}
