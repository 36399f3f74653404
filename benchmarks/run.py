"""``saccade bench``: times of the operators on this machine's GPU, beside what they replace."""

import os
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aggregation
import torch
from rich.console import Console
from rich.table import Table

from saccade import doctor

SUITES = {"aggregation": aggregation}


def _commit() -> str:
    """What is being timed: the checkout's commit, or on a machine without its history the variable GIT_COMMIT."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--verify", "--quiet", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or os.environ.get("GIT_COMMIT", "unknown")


def run(only: str | None, console: Console) -> list[dict[str, Any]]:
    """Time the suites, or ``only`` one, and print a table of each; an operator whose check fails is not timed.

    Raises:
        ValueError: An operator differs from its reference.
    """
    machine = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "commit": _commit(),
    }
    records: list[dict[str, Any]] = []
    for name, suite in SUITES.items():
        if only not in (None, name):
            continue
        fault = doctor.check(suite.OPERATOR, "cuda")
        if fault is not None:
            raise ValueError(f"{suite.OPERATOR} is not timed: it {fault}")
        backend = doctor.backend(suite.OPERATOR, "cuda")
        table = Table(title=f"{suite.OPERATOR} ({backend}) on {machine['gpu']}, microseconds", title_justify="left")
        for column in ("workload", "dtype", "pass"):
            table.add_column(column)
        for column in ("saccade", "floor", "grid_sample", "original CUDA kernel (recorded)", "error"):
            table.add_column(column, justify="right")
        with console.status(f"Timing {name}"):
            for record in suite.records():
                records.append(record | {"backend": backend} | machine)
                others = [record["baselines"].get("grid_sample"), record["recorded"].get("original CUDA kernel")]
                error = record["error"]
                table.add_row(
                    *(record["workload"], record["dtype"], record["pass"]),
                    *(f"{record['saccade_us']:.0f}", f"{record['floor_us']:.0f}"),
                    *("" if other is None else f"{other:.0f}" for other in others),
                    "" if error is None else f"{error:.1e}",
                )
        console.print(table)
    return records
