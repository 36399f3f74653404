"""Fixtures that all tests share."""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))  # `cases` is a package of the tests, not of the library

# A slow or busy machine must not fail a property; the same examples on every run keep a failure repeatable.
settings.register_profile("saccade", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("saccade")

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Each test that takes this runs on the CPU and, where there is one, on the GPU."""
    return request.param
