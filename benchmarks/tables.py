"""Tables of benchmark records: columns of text, and as a hook of mkdocs the tables of the documentation.

``mkdocs.yml`` names this file. Where a page says ``<!-- results: aggregation feature_maps_format -->``, the records of
``results/h200.json`` whose workloads begin with these names appear, so that no figure in the documentation is typed.
``<!-- throughput: demo -->`` is the same for the training on several GPUs, and ``<!-- learnt: demo -->`` for what is
learnt in some time. What is not measured yet is said to be so.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Record = dict[str, Any]

RESULTS = Path(__file__).parent / "results" / "h200.json"
RECORDED_ON = "H200"  # where the times that are recorded, not measured, were taken
CLOCKS = {"device": "Device time, microseconds", "wall": "Wall time, microseconds"}
THROUGHPUT = "Scenes a second"
LEARNT = "What is learnt"
NOT_MEASURED = f"Not measured yet: `{RESULTS.name}` has no such records."

_MARKER = re.compile(r"<!-- (results|throughput|learnt): (.*?) -->")


class Column(NamedTuple):
    """A column of a table."""

    title: str
    cells: list[str]
    is_recorded: bool = False
    is_text: bool = False


def time_text(microseconds: float) -> str:
    digits = 0 if microseconds >= 100 else 1 if microseconds >= 1 else 2
    return f"{microseconds:.{digits}f}"


def _names(records: Sequence[Record], key: str) -> list[str]:
    """Every name under which a record has something there, in order of appearance."""
    return list(dict.fromkeys(name for record in records for name in record[key]))


def _speed_up(record: Record) -> float | None:
    """How many times faster than the first recorded time; to compare, the GPU must be the same."""
    if not record["recorded"] or RECORDED_ON not in record["gpu"]:
        return None
    return next(iter(record["recorded"].values())) / record["saccade_us"]


def columns(records: Sequence[Record]) -> list[Column]:
    """A table of records, a row each. A column that would be empty is left out."""

    def column(title: str, value: Callable[[Record], Any], text: Callable[[Any], str], **kind: bool) -> list[Column]:
        values = [value(record) for record in records]
        cells = ["" if value is None else text(value) for value in values]
        return [] if all(value is None for value in values) else [Column(title, cells, **kind)]

    table = []
    for title in ("workload", "dtype", "pass"):
        table += column(title, lambda r, t=title: r[t], str, is_text=True)
    table += column("saccade", lambda r: r["saccade_us"], time_text)
    table += column("H", lambda r: r["saccade_us"] / r["bce_us"] if "bce_us" in r else None, "{:.2f}".format)
    # Beside wall times it would say nothing: calls alone take longer.
    table += column("floor", lambda r: r["floor_us"] if r["clock"] == "device" else None, time_text)
    table += column(
        "x floor",
        lambda r: r["saccade_us"] / r["floor_us"] if r["floor_us"] and r["clock"] == "device" else None,
        "{:.1f}".format,
    )
    for name in _names(records, "baselines"):
        table += column(name, lambda r, n=name: r["baselines"].get(n), time_text)
    for name in _names(records, "recorded"):
        table += column(f"{name} (recorded)", lambda r, n=name: r["recorded"].get(n), time_text, is_recorded=True)
    table += column("speed-up", _speed_up, "{:.1f}x".format)
    table += column("error", lambda r: r["error"], "{:.1e}".format)
    table += column("peak MB", lambda r: r.get("peak_mb"), "{:.0f}".format)
    table += column(
        "of needed", lambda r: r["peak_mb"] / r["needed_mb"] if r.get("needed_mb") else None, "{:.2f}x".format
    )
    return table


def throughput_columns(records: Sequence[Record]) -> list[Column]:
    """Scenes a second of the demo's training: a row for each workload, and for each number of GPUs a column.

    Behind it, but for the first, is how many times as much that is as on one GPU.
    """
    found = {(r["workload"], r["dtype"], r["gpu"], r["gpus"]): r["scenes_per_second"] for r in records}
    rows = list(dict.fromkeys(subject[:3] for subject in found))
    table = [Column(title, [row[k] for row in rows], is_text=True) for k, title in enumerate(("workload", "dtype"))]
    for gpus in sorted({subject[3] for subject in found}):
        scenes = [found.get((*row, gpus)) for row in rows]
        title = "1 GPU" if gpus == 1 else f"{gpus} GPUs"
        table.append(Column(title, ["" if each is None else time_text(each) for each in scenes]))
        if gpus > 1:
            ones = [found.get((*row, 1)) for row in rows]
            gains = [f"{n / one:.2f}x" if n and one else "" for n, one in zip(scenes, ones, strict=True)]
            table.append(Column("speed-up", gains))
    return table


def learnt_columns(records: Sequence[Record]) -> list[Column]:
    """What the demo's detector learns: a row for each workload."""
    table = [Column(title, [record[title] for record in records], is_text=True) for title in ("workload", "dtype")]
    for title, key, form in (
        ("seconds", "seconds", "{:.0f}"),
        ("steps", "steps", "{}"),
        ("scenes", "scenes", "{}"),
        ("--views", "views", "{}"),
        ("recall at 2 m", "recall_at_2m", "{:.3f}"),
        ("precision", "precision", "{:.3f}"),
        ("control recall", "control_recall", "{:.3f}"),
        ("untrained recall", "untrained_recall", "{:.3f}"),
    ):
        table.append(Column(title, [form.format(record[key]) for record in records]))
    return table


def of_training(records: Sequence[Record]) -> dict[str, tuple[list[Record], list[Column]]]:
    """The tables of the demo's training by title, with their records; without those that nothing is in."""
    learnt = [record for record in records if "recall_at_2m" in record]
    timed = [record for record in records if "recall_at_2m" not in record]
    tables = {THROUGHPUT: (timed, throughput_columns(timed)), LEARNT: (learnt, learnt_columns(learnt))}
    return {title: table for title, table in tables.items() if table[0]}


def _markdown_table(table: Sequence[Column]) -> str:
    rows = zip(*(column.cells for column in table), strict=True)
    lines = [[column.title for column in table], ["---" if column.is_text else "---:" for column in table], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _machine_text(record: Record) -> str:
    gpu = record["gpu"] + (f", {record['cores']} CPU cores" if "cores" in record else "")
    return f"{gpu}, torch {record['torch']}, Triton {record['triton']}, commit `{record['commit'][:10]}`"


def _taken_on(records: Sequence[Record]) -> str:
    machines: Iterable[str] = dict.fromkeys(map(_machine_text, records))
    return f"taken on {'; '.join(machines)}"


def markdown(records: Sequence[Record]) -> str:
    """The tables of some records, one for each clock, and what they were taken on."""
    if not records:
        return NOT_MEASURED
    parts = []
    for clock, title in CLOCKS.items():
        of_clock = [record for record in records if record["clock"] == clock]
        if of_clock:
            parts.append(f"**{title}**, {_taken_on(of_clock)}.\n\n{_markdown_table(columns(of_clock))}")
    return "\n\n".join(parts)


def training_markdown(records: Sequence[Record], title: str) -> str:
    """One of the tables of the demo's training, and what it was taken on."""
    found = of_training(records)
    if title not in found:
        return NOT_MEASURED
    taken, table = found[title]
    return f"**{title}**, {_taken_on(taken)}.\n\n{_markdown_table(table)}"


def with_results(text: str, records: Sequence[Record]) -> str:
    """A page with the tables in place of its markers."""

    def tables(marker: re.Match[str]) -> str:
        named = [record for record in records if record["workload"].split("/")[0] in marker[2].split()]
        if marker[1] != "results":
            return training_markdown(named, THROUGHPUT if marker[1] == "throughput" else LEARNT)
        return markdown(named)

    return _MARKER.sub(tables, text)


def on_page_markdown(text: str, **_: Any) -> str:
    """Called by mkdocs with every page."""
    if not _MARKER.search(text):
        return text
    return with_results(text, json.loads(RESULTS.read_text(encoding="utf-8")))
