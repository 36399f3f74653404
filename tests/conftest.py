"""Fixtures that all tests share."""

import signal
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from saccade.triton_dispatch import served_by_triton

# A slow or busy machine must not fail a property; the same examples on every run keep a failure repeatable.
settings.register_profile("saccade", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("saccade")

# A job in the background is started with Ctrl-C ignored, and hands that on to what it starts: some tests send it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

INTERPRETED = served_by_triton(torch.empty(0))  # kernels serve CPU tensors: nothing is left for a GPU to show
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() and not INTERPRETED else [])


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Each test that takes this runs on the CPU and, where there is one, on the GPU."""
    return request.param


collect_ignore = ["driver"]  # a program, which is run by a test


@pytest.fixture(autouse=True)
def room_on_the_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """The memory that a test's mark says it needs; what tests leave in the allocator's cache is given back."""
    mark = request.node.get_closest_marker("gpu_memory")
    if mark is not None:
        (gigabytes,) = mark.args
        if not torch.cuda.is_available():
            pytest.skip(f"needs a GPU with {gigabytes} GB of free memory")
        free, _ = torch.cuda.mem_get_info()
        if free < gigabytes * 1e9:
            pytest.skip(f"needs {gigabytes} GB of free GPU memory, there are {free / 1e9:.0f}")
    yield
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
