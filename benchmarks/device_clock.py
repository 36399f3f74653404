"""The device clock of ``workloads.py``, on a GPU that runs at its working frequency."""

import time
from collections.abc import Callable

import torch
import workloads

_SECONDS = 0.1


def device_us(call: Callable[[], object], inner: int = 20, repeats: int = 10) -> float:
    """Median device time of one call, microseconds, after the GPU has been kept busy for a while."""
    _keep_busy()
    return workloads.device_us(call, inner, repeats)


def _keep_busy() -> None:
    """A GPU that idled, while the host compiled or checked something, has lowered its clocks and raises them slowly."""
    data = torch.zeros(1 << 26, device="cuda")
    end = time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        for _ in range(20):
            data.add_(1)
        torch.cuda.synchronize()
