"""The clocks of ``workloads.py``, undisturbed by a GPU that has idled and by a host that does other work."""

import math
import time
from collections.abc import Callable, Mapping

import torch

from benchmarks import workloads
from benchmarks.workloads import wall_us

_SECONDS = 0.1
_ROUNDS = 6


def device_us(call: Callable[[], object], inner: int = 20, repeats: int = 10) -> float:
    """Median device time of one call, microseconds, after the GPU has been kept busy for a while."""
    _keep_busy()
    return workloads.device_us(call, inner, repeats)


def wall_us_in_turns(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Best wall time of each call, microseconds, for calls that the host takes longer for than the GPU.

    A host takes up to twice as long for a while, now and then: they take turns, so that no call alone meets with that.
    """
    best = dict.fromkeys(calls, math.inf)
    for _ in range(_ROUNDS):
        for name, call in calls.items():
            best[name] = min(best[name], wall_us(call))
    return best


def _keep_busy() -> None:
    """A GPU that idled, while the host compiled or checked something, has lowered its clocks and raises them slowly."""
    data = torch.zeros(1 << 26, device="cuda")
    end = time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        for _ in range(20):
            data.add_(1)
        torch.cuda.synchronize()
