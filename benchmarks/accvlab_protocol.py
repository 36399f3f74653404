"""ACCV-Lab's own benchmark programs of its heatmaps, for its published table to be set beside times taken here.

Two programs of the original call its Python package: one a loop over boxes in PyTorch, then the concatenated and the
batched form, the other the loop and the class-wise form. Each is seeded once, and each method gets data of its own from
the continuing stream. A time is the mean of ten calls by the wall clock, the first one included, with one wait for the
GPU at the end; maps are never cleared, so that only the first call finds anything to write. The original does this
once; here it is done on twenty maps, and the median counts. Three more programs of the
original, in C++, launch the kernels alone ten times after one launch that does not count, on other random data; here
ten calls in a CUDA graph stand for that, on the data of the ten calls.

One thing differs: each form is checked before it is timed, on maps of its own, which is when its kernels are compiled
or loaded. Those of the original are compiled when it is installed.
"""

from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

import saccade
from benchmarks import heatmap_oracle
from benchmarks.clocks import device_us
from benchmarks.heatmap import checked_errors, concatenated, draw_box_by_box, unwarmed_us
from benchmarks.records import Say, new_record
from benchmarks.tables import RECORDED_ON, Column, time_text
from benchmarks.training_step import forget
from benchmarks.workloads import HeatmapInputs

BATCH, TARGETS, HEIGHT, WIDTH, CLASSES = 48, 50, 20, 50, 20
DEVICE = "cuda"
SEED = 42
CALLS, REPETITIONS = 10, 20

LOOP = "PyTorch, box by box"
PACKAGE = "ACCV-Lab package"
PUBLISHED = ", as published for an A100"

# Microseconds that the programs themselves printed on one NVIDIA H200 with torch 2.11 and CUDA 13.0, and those that the
# documentation of ACCV-Lab prints for an A100.
_LOOP_US = {LOOP: 90815.0, LOOP + PUBLISHED: 201100.0}
_CLASSWISE_LOOP_US = {LOOP: 118282.0, LOOP + PUBLISHED: 245100.0}
RECORDED_US: dict[str, dict[str, float]] = {
    "concatenated": {PACKAGE: 54.0, PACKAGE + PUBLISHED: 48.2} | _LOOP_US,
    "batched": {PACKAGE: 30.6, PACKAGE + PUBLISHED: 36.6} | _LOOP_US,
    "batched-classwise": {PACKAGE: 57.2, PACKAGE + PUBLISHED: 59.0} | _CLASSWISE_LOOP_US,
}


def records(quick: bool, say: Say) -> Iterator[dict[str, Any]]:
    """Two records for each form, ten calls and the kernel alone; ``quick`` leaves out the loops."""
    for forms in (("concatenated", "batched"), ("batched-classwise",)):  # of one program each
        torch.manual_seed(SEED)
        of_loop, *of_forms = [data(CLASSES if "batched-classwise" in forms else None) for _ in range(1 + len(forms))]
        baselines = {}
        if not quick:
            say(f"{LOOP}, beside {' and '.join(forms)}")
            heatmap = torch.zeros(of_loop.shape, device=DEVICE)
            baselines[LOOP] = unwarmed_us(lambda of=of_loop, into=heatmap: draw_box_by_box(into, of), calls=CALLS)
        for form, inputs in zip(forms, of_forms, strict=True):
            yield from _form(form, inputs, baselines, say)
    forget()


def _form(form: str, inputs: HeatmapInputs, baselines: dict[str, float], say: Say) -> Iterator[dict[str, Any]]:
    workload = f"accvlab-protocol/{form}"
    say(f"{workload}: checking")
    draw = _drawing(form, inputs)
    checked = torch.zeros(inputs.shape, device=DEVICE)
    draw(checked)
    expected = heatmap_oracle.exact(inputs)
    error = checked_errors(workload, expected, {"ten-calls": checked})["ten-calls"]
    torch.cuda.synchronize()
    say(f"{workload}: timing")
    common = {"floor_us": None, "error": error}
    maps = [torch.zeros(inputs.shape, device=DEVICE) for _ in range(REPETITIONS)]
    torch.cuda.synchronize()
    saccade_us = median(unwarmed_us(partial(draw, each), calls=CALLS) for each in maps)
    yield new_record(
        workload, "ten-calls", "wall", saccade_us, **common, baselines=baselines, recorded=RECORDED_US[form]
    )
    yield new_record(workload, "kernel", "device", device_us(partial(draw, maps[-1]), inner=CALLS), **common)


def data(classes: int | None) -> HeatmapInputs:
    """What one method draws: counts from the generator of the CPU, all else from that of the device."""
    counts = torch.randint(0, TARGETS + 1, (BATCH,)).int()
    centers = torch.zeros(BATCH, TARGETS, 2, dtype=torch.int32, device=DEVICE)
    radii, labels = torch.zeros(2, BATCH, TARGETS, dtype=torch.int32, device=DEVICE)
    largest = max(1, min(HEIGHT, WIDTH) / 2 / 2)
    for b, count in enumerate(counts.tolist()):
        centers[b, :count, 0] = (torch.rand(count, device=DEVICE) * WIDTH).int()
        centers[b, :count, 1] = (torch.rand(count, device=DEVICE) * HEIGHT).int()
        radii[b, :count] = (torch.rand(count, device=DEVICE) * largest).clamp(min=1).int()
        labels[b, :count] = torch.randint(0, classes or 1, (count,), dtype=torch.int32, device=DEVICE)
    shape = (BATCH, classes, HEIGHT, WIDTH) if classes else (BATCH, HEIGHT, WIDTH)
    return HeatmapInputs(shape, centers, radii, counts.to(DEVICE), labels if classes else None)


def _drawing(form: str, inputs: HeatmapInputs) -> Callable[[Tensor], None]:
    """The public call into a map of that shape, its arguments made beforehand."""
    if form == "concatenated":
        targets = concatenated(inputs)
        return lambda heatmap: saccade.draw_heatmap(heatmap, *targets)
    _, centers, radii, counts, labels = inputs

    def ragged(tensor: Tensor) -> saccade.RaggedBatch:
        return saccade.RaggedBatch(tensor, sample_sizes=counts)

    points, reach = ragged(centers), ragged(radii)
    classes = None if labels is None else ragged(labels)
    return lambda heatmap: saccade.draw_heatmap_batched(heatmap, points, reach, labels=classes)


# ---- the table


class _Line(NamedTuple):
    """A line of the published table."""

    title: str
    form: str  # of the program that it comes from
    is_loop: bool = False


_LINES = [
    _Line(LOOP, "concatenated", is_loop=True),
    _Line("concatenated", "concatenated"),
    _Line("batched", "batched"),
    _Line(f"{LOOP}, class-wise", "batched-classwise", is_loop=True),
    _Line("batched, class-wise", "batched-classwise"),
]


def programs() -> list[bool]:
    """Which of the two programs each line comes from: whether the class-wise one."""
    return [line.form == "batched-classwise" for line in _LINES]


def columns(records: list[dict[str, Any]]) -> list[Column]:
    """The published table, line by line, beside the times of these records."""
    found = {(record["workload"].split("/")[1], record["pass"]): record for record in records}

    def cells(time_of: Callable[[_Line], float | None]) -> list[str]:
        times = [time_of(line) for line in _LINES]
        return ["" if time is None else time_text(time) for time in times]

    def ten_calls(line: _Line) -> float | None:
        record = found[line.form, "ten-calls"]
        return record["baselines"].get(LOOP) if line.is_loop else record["saccade_us"]

    def kernel(line: _Line) -> float | None:
        return None if line.is_loop else found[line.form, "kernel"]["saccade_us"]

    def original(suffix: str) -> Callable[[_Line], float | None]:
        return lambda line: RECORDED_US[line.form][(LOOP if line.is_loop else PACKAGE) + suffix]

    return [
        Column("", [line.title for line in _LINES], is_text=True),
        Column("saccade or loop, here", cells(ten_calls)),
        Column("saccade, kernel alone", cells(kernel)),
        Column(f"ACCV-Lab, {RECORDED_ON} (recorded)", cells(original("")), is_recorded=True),
        Column("ACCV-Lab, A100 (published)", cells(original(PUBLISHED)), is_recorded=True),
    ]
