"""What every suite yields: records of what was timed."""

from collections.abc import Callable
from typing import Any

COPY_BYTES_PER_US = 4.2e6  # what a large copy moves on an H200, bytes read and written

Say = Callable[[str], None]  # is told what is under way
IsWanted = Callable[[str], bool]  # is asked whether to time a workload


def new_record(workload: str, kind: str, clock: str, saccade_us: float, **more: Any) -> dict[str, Any]:
    """A record; ``run.py`` says what is in one."""
    defaults = {"dtype": "float32", "baselines": {}, "recorded": {}}
    return {"workload": workload, "pass": kind, "clock": clock, "saccade_us": saccade_us} | defaults | more


def merged(earlier: list[dict[str, Any]], later: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All records, later ones in place of earlier ones of the same workload, pass, dtype, clock and GPU."""

    def subject(record: dict[str, Any]) -> tuple[str, ...]:
        return tuple(record[key] for key in ("workload", "pass", "dtype", "clock", "gpu"))

    found = {subject(record): record for record in earlier}
    found.update((subject(record), record) for record in later)
    return list(found.values())
