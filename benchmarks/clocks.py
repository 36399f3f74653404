"""The clocks of ``workloads.py``, undisturbed by a GPU that has idled and by a host that does other work."""

import math
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext

import torch
import torch.nn.functional as F

from benchmarks import workloads
from benchmarks.workloads import wall_us

_SECONDS = 0.1
_ROUNDS = 6


def device_us(call: Callable[[], object], inner: int = 20, repeats: int = 10) -> float:
    """Median device time of one call, microseconds, after the GPU has been kept busy for a while."""
    _keep_busy()
    return workloads.device_us(call, inner, repeats)


def wall_us_in_turns(
    calls: Mapping[str, Callable[[], object]], without_grad: Collection[str] = (), repeats: int = 5
) -> dict[str, float]:
    """Best wall time of each call, microseconds, for calls that the host takes longer for than the GPU.

    A host takes up to twice as long for a while, now and then: they take turns, so that no call alone meets with that.

    Args:
        calls: By name.
        without_grad: Names of those that run under ``torch.no_grad()``, which is entered before the clock starts.
        repeats: How often each is timed in a turn.
    """
    best = dict.fromkeys(calls, math.inf)
    for _ in range(_ROUNDS):
        for name, call in calls.items():
            with torch.no_grad() if name in without_grad else nullcontext():
                best[name] = min(best[name], wall_us(call, repeats=repeats))
    return best


def bce_us() -> float:
    """Wall time of ``bce_step``, microseconds."""
    return wall_us(bce_step())


def bce_step() -> Callable[[], None]:
    """A step of torch's binary cross entropy on 7200 x 10 logits.

    Its wall time is the unit that wall times are compared in, H in tables: hosts differ by half.
    """
    logits = torch.zeros(7200, 10, device="cuda", requires_grad=True)
    target = torch.zeros_like(logits, requires_grad=False)

    def step() -> None:
        logits.grad = None
        F.binary_cross_entropy_with_logits(logits, target).backward()

    return step


def _keep_busy() -> None:
    """A GPU that idled, while the host compiled or checked something, has lowered its clocks and raises them slowly."""
    data = torch.zeros(1 << 26, device="cuda")
    end = time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        for _ in range(20):
            data.add_(1)
        torch.cuda.synchronize()
