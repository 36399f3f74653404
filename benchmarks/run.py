"""``saccade bench``: times of the operators on this machine's GPU, beside what they replace.

A suite has one or more operators, which ``saccade.doctor`` checks before anything is timed. For each there is a
function of ``quick``, ``say`` and ``is_wanted`` that yields a record for each workload and pass: ``workload``,
``pass``, ``dtype``, ``clock``, ``saccade_us``, ``floor_us``, ``baselines``, ``recorded`` and ``error``, and more if
there is more to tell. What is under way it tells ``say``; workloads that are not wanted it leaves out. What is true of
the whole run is added here, and to each wall time ``bce_us``, measured right after it unless the record has one of its
own. The training of the demo takes minutes and is run by its name alone.
"""

import importlib
import os
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import accvlab_protocol, aggregation, calls, clocks, demo, heatmap, losses, ragged, tables
from benchmarks.accuracy import WrongResultError
from benchmarks.demo import FailedTrainingError as FailedTrainingError
from saccade import doctor

SUITES = {
    "aggregation": {"deformable_aggregation": aggregation.records},
    "losses": {"focal_loss": losses.sigmoid_records, "gaussian_focal_loss": losses.gaussian_records},
    "heatmap": {"gaussian_heatmap": heatmap.records},
    "ragged": {"ragged": ragged.records},
    "calls": {operator: partial(calls.records, operator) for operator in calls.CALLS},
}
PROTOCOLS = {"accvlab": "heatmap"}  # the suite of each


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


class UnknownWorkloadError(Exception):
    """There is no such suite, workload or protocol."""


def run(only: str | None, console: Console, quick: bool = False, protocol: str | None = None) -> list[dict[str, Any]]:
    """Time the suites and print their tables.

    Args:
        only: One suite, or one workload such as ``aggregation/det-b1``; all of them but the demo if ``None``.
        console: Where the tables go.
        quick: Leave out what Saccade is compared with.
        protocol: In place of a suite's workloads, run the benchmark programs of the project that it replaces.

    Raises:
        UnknownWorkloadError: There is no such suite and no such workload, or no such protocol of that suite.
        WrongResultError: An operator differs from its reference, or on a workload from the exact result.
        FailedTrainingError: A run of the demo failed, or took too long.
    """
    of_demo = {"demo", *demo.workloads()}
    of_suites = {name for suite in (aggregation, losses, heatmap, ragged, calls) for name in suite.workloads()}
    if only is not None and only not in {*SUITES, *of_suites, *of_demo}:
        suites = ", ".join([*SUITES, "demo"])
        raise UnknownWorkloadError(f"--only: expected one of {suites}, or one of their workloads, got {only!r}")
    if protocol is not None and (only is None or PROTOCOLS.get(protocol) != only):
        forms = " or ".join(f"--only {suite} --protocol {name}" for name, suite in PROTOCOLS.items())
        given = f"--protocol {protocol}" if only is None else f"--only {only} --protocol {protocol}"
        raise UnknownWorkloadError(f"--protocol: expected {forms}, got {given}")
    machine = _machine()
    if protocol is not None:
        return _run_protocol(console, quick, machine)
    if only in of_demo:
        return _run_demo(only, console, machine)
    records: list[dict[str, Any]] = []
    for name, suite in SUITES.items():
        if only in (None, name):
            for operator in suite:
                _check(operator)
        for operator, records_of in suite.items():
            with console.status(operator) as status:
                wanted = partial(_is_wanted, only, name, operator)
                of_operator = list(_with_unit(records_of(quick, status.update, wanted)))
            backend = doctor.backend(operator, "cuda")
            of_operator = [record | {"backend": backend} | machine for record in of_operator]
            for clock, title in tables.CLOCKS.items():
                of_clock = [record for record in of_operator if record["clock"] == clock]
                if of_clock:
                    heading = f"{title}: {operator} ({backend}) on {machine['gpu']}"
                    subjects = [(record["workload"], record["dtype"]) for record in of_clock]
                    console.print(_table(heading, tables.columns(of_clock), subjects, is_wide=console.width >= 180))
            records += of_operator
    return records


def _run_protocol(console: Console, quick: bool, machine: dict[str, str]) -> list[dict[str, Any]]:
    """Time the drawing of heatmaps as ACCV-Lab's own benchmark programs do, and print that project's table."""
    operator = "gaussian_heatmap"
    _check(operator)
    backend = doctor.backend(operator, "cuda")
    with console.status(operator) as status:
        of_protocol = list(_with_unit(accvlab_protocol.records(quick, status.update)))
    columns = accvlab_protocol.columns(of_protocol)
    title = f"ACCV-Lab's benchmark programs, microseconds: {operator} ({backend}) on {machine['gpu']}"
    console.print(_table(title, columns, accvlab_protocol.programs(), is_wide=True))
    return [record | {"backend": backend} | machine for record in of_protocol]


def _run_demo(only: str, console: Console, machine: dict[str, str]) -> list[dict[str, Any]]:
    """Train the demo's detector, with every operator at work."""
    for suite in SUITES.values():
        for operator in suite:
            _check(operator)
    with console.status("demo") as status:
        of_demo = list(demo.records(status.update, lambda workload: only in ("demo", workload)))
    of_demo = [record | machine for record in of_demo]
    for title, (_, columns) in tables.of_training(of_demo).items():
        console.print(_table(f"{title}: demo on {machine['gpu']}", columns, [], is_wide=True))
    return of_demo


def _with_unit(records: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for record in records:
        has_none = record["clock"] == "wall" and "bce_us" not in record
        yield record | ({"bce_us": clocks.bce_us()} if has_none else {})


def _is_wanted(only: str | None, suite: str, operator: str, workload: str) -> bool:
    """Whether a workload is to be timed; if it is the only one, its operator has not been checked yet."""
    if only == workload:
        _check(operator)
    return only in (None, suite, workload)


def _check(operator: str) -> None:
    fault = doctor.check(operator, "cuda")
    if fault is not None:
        raise WrongResultError(f"{operator} is not timed: it {fault}")


def _table(title: str, columns: Sequence[tables.Column], subjects: Sequence[Any], is_wide: bool) -> Table:
    """A table on the terminal, a line between subjects; where there is room for it, only headings are broken."""
    if any(column.is_recorded for column in columns):
        title += f"; (recorded): recorded earlier, on an {tables.RECORDED_ON}"
    table = Table(title=title, title_justify="left")
    for column in columns:
        justify = "left" if column.is_text else "right"
        style = "dim" if column.is_recorded else None
        unbroken = is_wide and column.is_text
        table.add_column(column.title, justify=justify, style=style, no_wrap=unbroken, overflow="fold")
    for k, row in enumerate(zip(*(column.cells for column in columns), strict=True)):
        table.add_row(*row, end_section=subjects[k : k + 1] != subjects[k + 1 : k + 2])
    return table
