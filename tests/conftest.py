"""Fixtures that all tests share."""

import signal

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
