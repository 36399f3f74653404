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


_SUBJECT = ("workload", "pass", "dtype", "clock", "gpu")


def are_records(value: Any) -> bool:
    """Whether this is what was written by an earlier run."""
    return isinstance(value, list) and all(isinstance(each, dict) and each.keys() >= {*_SUBJECT} for each in value)


def merged(earlier: list[dict[str, Any]], later: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All records, later ones in place of earlier ones of the same workload, pass, dtype, clock and GPU or GPUs."""
    found = {(*(record[key] for key in _SUBJECT), record.get("gpus")): record for record in [*earlier, *later]}
    return list(found.values())
