"""Training of the demo: scenes a second on one GPU and on several, and what it learns on one in two minutes.

Not an operator beside what it replaces but all of them at work, with the rendering of the scenes on the host. Each run
has processes of its own. They take minutes and are therefore run by name alone.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.accuracy import WrongResultError
from benchmarks.records import IsWanted, Say, new_record

DEVICE = "cuda"
PROGRAM = ["-m", "saccade"]
GPUS = (1, 2, 4)
BATCH = 16  # scenes to a step, for each GPU
STEPS = 300  # the demo leaves the first 84 out of its throughput, in which it compiles and renders every scene
LIMIT_S = 300
END_S = 45  # torchrun gives its processes 30 s to end
TOLD_LINES = 100  # of which torchrun's own account of a failure, behind the cause, takes forty
COMPILED = ["--amp", "bf16", "--compile", "--views", "8"]  # so fast that with fewer views it would wait for scenes
JUDGED = ("recall_at_2m", "precision", "control_recall", "untrained_recall")


class Training(NamedTuple):
    """A workload."""

    dtype: str
    options: list[str]
    steps: int | None = None  # if it is made to learn something: as many as an H200 makes in two minutes

    @property
    def gpus(self) -> tuple[int, ...]:
        return GPUS if self.steps is None else (1,)


TRAININGS = {
    "training": Training("float32", []),
    "training-compiled": Training("bfloat16", COMPILED),
    "two-minutes": Training("float32", [], 1900),
    "two-minutes-compiled": Training("bfloat16", COMPILED, 2500),
}


class FailedTrainingError(Exception):
    """A run of the demo failed, or took too long."""


def workloads() -> list[str]:
    return [f"demo/{name}" for name in TRAININGS]


def records(say: Say, is_wanted: IsWanted) -> Iterator[dict[str, Any]]:
    """A record for each workload and each number of GPUs, as many as this machine has.

    Raises:
        FailedTrainingError: A run failed, or took longer than ``LIMIT_S``.
        WrongResultError: The loss of a run became infinite or no number.
    """
    for name, training in TRAININGS.items():
        workload = f"demo/{name}"
        for gpus in training.gpus:
            if is_wanted(workload) and gpus <= torch.cuda.device_count():
                what = f"{workload} on {gpus} GPU{'s' * (gpus > 1)}"
                say(what)
                report = _trained(what, gpus, training)
                yield _record(what, workload, training, gpus, report)


def _record(what: str, workload: str, training: Training, gpus: int, report: dict[str, Any]) -> dict[str, Any]:
    loss = report["losses"]["total"]["last"]
    if not math.isfinite(loss):
        raise WrongResultError(f"{what} is not timed: its loss became {loss}")
    learnt = {}
    if training.steps is not None:
        learnt = {key: report[key] for key in (*JUDGED, "seconds")} | {"scenes": report["samples"]["trained_on"]}
    return new_record(
        workload,
        "training",
        "wall",
        1e3 * report["step_ms"],
        dtype=training.dtype,
        floor_us=None,
        error=None,
        gpus=gpus,
        cores=_cores(),
        batch=report["batch"],
        views=report["views"],
        steps=report["steps"],
        scenes_per_second=report["scenes_per_second"],
        **learnt,
        backend=", ".join(dict.fromkeys(report["backends"].values())),
    )


def _cores() -> int | None:
    """The scenes are rendered on them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def command(gpus: int, training: Training, directory: Path) -> list[str]:
    """What is timed; it writes into the directory."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)] if gpus > 1 else []
    size = ["--steps", str(training.steps or STEPS), "--batch", str(BATCH * gpus), "--curve-every", "0"]
    files = ["--out", str(directory), "--json", str(directory / "report.json")]
    return [sys.executable, *torchrun, *PROGRAM, "demo", "--device", DEVICE, *size, *training.options, *files]


def environment() -> dict[str, str]:
    """Of the processes.

    One thread each, as torchrun has it: their loaders share the cores. And without NVLink's multicast, which NCCL takes
    where GPUs have it, but which not every container may use.
    """
    return {"NCCL_NVLS_ENABLE": "0", **os.environ, "OMP_NUM_THREADS": "1"}


def _trained(what: str, gpus: int, training: Training) -> dict[str, Any]:
    """The report of one run of the demo."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        log = directory / "log.txt"  # no pipe: what outlives a process that is killed would keep it open
        with log.open("wb") as output:
            process = subprocess.Popen(
                command(gpus, training, directory), env=environment(), stdout=output, stderr=subprocess.STDOUT
            )
            try:
                status = process.wait(LIMIT_S)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                _end(process)
        if status != 0:
            fault = f"took longer than {LIMIT_S} s" if status is None else f"ended with status {status}"
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TOLD_LINES:]
            raise FailedTrainingError("\n".join([f"{what} {fault}; its last lines:", *lines]))
        return json.loads((directory / "report.json").read_text(encoding="utf-8"))


def _end(process: subprocess.Popen) -> None:
    """End a run that is not done, torchrun by a signal that lets it end its processes."""
    process.terminate()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
