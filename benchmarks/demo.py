"""Training of the demo on one GPU and on several: scenes a second, each run in processes of its own.

Not an operator beside what it replaces but all of them at work, with the rendering of the scenes on the host. It takes
minutes and is therefore run by its name alone.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accuracy import WrongResultError
from records import IsWanted, Say, new_record

DEVICE = "cuda"
PROGRAM = ["-m", "saccade"]
GPUS = (1, 2, 4)
BATCH = 16  # scenes to a step, for each GPU
STEPS = 100  # the demo leaves the first ten out of its throughput, in which it compiles and fills buffers
LIMIT_S = 180
END_S = 45  # torchrun gives its processes 30 s to end
TOLD_LINES = 100  # of which torchrun's own account of a failure, behind the cause, takes forty
TRAININGS = {
    "training": ("float32", []),
    "training-compiled": ("bfloat16", ["--amp", "bf16", "--compile"]),
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
    for name, (dtype, options) in TRAININGS.items():
        workload = f"demo/{name}"
        for gpus in GPUS:
            if is_wanted(workload) and gpus <= torch.cuda.device_count():
                what = f"{workload} on {gpus} GPU{'s' * (gpus > 1)}"
                say(what)
                report = _trained(what, gpus, options)
                yield _record(what, workload, dtype, gpus, report)


def _record(what: str, workload: str, dtype: str, gpus: int, report: dict[str, Any]) -> dict[str, Any]:
    loss = report["losses"]["total"]["last"]
    if not math.isfinite(loss):
        raise WrongResultError(f"{what} is not timed: its loss became {loss}")
    return new_record(
        workload,
        "training",
        "wall",
        1e3 * report["step_ms"],
        dtype=dtype,
        floor_us=None,
        error=None,
        gpus=gpus,
        cores=_cores(),
        batch=report["batch"],
        steps=report["steps"],
        scenes_per_second=report["scenes_per_second"],
        backend=", ".join(dict.fromkeys(report["backends"].values())),
    )


def _cores() -> int | None:
    """The scenes are rendered on them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def command(gpus: int, options: list[str], directory: Path) -> list[str]:
    """What is timed; it writes into the directory."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)] if gpus > 1 else []
    demo = ["demo", "--device", DEVICE, "--steps", str(STEPS), "--batch", str(BATCH * gpus), "--curve-every", "0"]
    files = ["--out", str(directory), "--json", str(directory / "report.json")]
    return [sys.executable, *torchrun, *PROGRAM, *demo, *options, *files]


def environment() -> dict[str, str]:
    """Of the processes.

    One thread each, as torchrun has it: their loaders share the cores. And without NVLink's multicast, which NCCL takes
    where GPUs have it, but which not every container may use.
    """
    return {"NCCL_NVLS_ENABLE": "0", **os.environ, "OMP_NUM_THREADS": "1"}


def _trained(what: str, gpus: int, options: list[str]) -> dict[str, Any]:
    """The report of one run of the demo."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        log = directory / "log.txt"  # no pipe: what outlives a process that is killed would keep it open
        with log.open("wb") as output:
            process = subprocess.Popen(
                command(gpus, options, directory), env=environment(), stdout=output, stderr=subprocess.STDOUT
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
