"""``saccade bench``: times of the operators on this machine's GPU, beside what they replace.

A suite is a module with ``OPERATOR``, the operator that ``saccade.doctor`` checks before anything is timed, and
``records(quick, say)``. This yields a record for each workload and pass: ``workload``, ``pass``, ``dtype``, ``clock``,
``saccade_us``, ``floor_us``, ``baselines``, ``recorded`` and ``error``, and more if there is more to tell. What is
under way it tells ``say``. What is true of the whole run is added here.
"""

import importlib
import os
import subprocess
from pathlib import Path
from typing import Any

import aggregation
import tables
import torch
from accuracy import WrongResultError
from rich.console import Console
from rich.table import Table

from saccade import doctor

SUITES = {"aggregation": aggregation}


def _commit() -> str:
    """What is being timed: GIT_COMMIT, for a copy that has no history of its own, or the checkout's commit."""
    if "GIT_COMMIT" in os.environ:
        return os.environ["GIT_COMMIT"]
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--verify", "--quiet", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:  # there is no git
        commit = ""
    return commit or "unknown"


def _machine() -> dict[str, str]:
    try:  # by import: its distribution has other names beside other builds of torch
        triton = importlib.import_module("triton").__version__
    except ImportError:
        triton = "none"
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton,
        "commit": _commit(),
    }


def run(only: str | None, console: Console, quick: bool = False) -> list[dict[str, Any]]:
    """Time the suites, or ``only`` one, and print their tables; ``quick`` leaves out what Saccade is compared with.

    Raises:
        WrongResultError: An operator differs from its reference, or on a workload from the exact result.
    """
    machine = _machine()
    records: list[dict[str, Any]] = []
    for name, suite in SUITES.items():
        if only not in (None, name):
            continue
        with console.status(f"{name}: checking") as status:
            fault = doctor.check(suite.OPERATOR, "cuda")
            if fault is not None:
                raise WrongResultError(f"{suite.OPERATOR} is not timed: it {fault}")
            common = {"backend": doctor.backend(suite.OPERATOR, "cuda")} | machine
            of_suite = [record | common for record in suite.records(quick, status.update)]
        for clock, title in tables.CLOCKS.items():
            of_clock = [record for record in of_suite if record["clock"] == clock]
            if of_clock:
                heading = f"{title}: {name} ({common['backend']}) on {machine['gpu']}"
                console.print(_table(heading, of_clock))
        records += of_suite
    return records


def _table(title: str, records: list[dict[str, Any]]) -> Table:
    """The records on the terminal, a line between workloads."""
    columns = tables.columns(records)
    if any(column.is_recorded for column in columns):
        title += f"; (recorded): recorded earlier, on an {tables.RECORDED_ON}"
    table = Table(title=title, title_justify="left")
    for column in columns:
        justify = "left" if column.is_text else "right"
        style = "dim" if column.is_recorded else None
        table.add_column(column.title, justify=justify, style=style, overflow="fold")
    subjects = [(record["workload"], record["dtype"]) for record in records]
    for k, row in enumerate(zip(*(column.cells for column in columns), strict=True)):
        table.add_row(*row, end_section=subjects[k : k + 1] != subjects[k + 1 : k + 2])
    return table
