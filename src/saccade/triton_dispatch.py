"""When a call is served by Triton kernels."""

import importlib.util
import os

from torch import Tensor

# Triton interprets kernels on the CPU if this was set when it was imported.
_INTERPRETING = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")

_INSTALLED = importlib.util.find_spec("triton") is not None


def triton_is_installed() -> bool:
    """Whether Triton can be imported: the GPU builds of torch bring it along, those for the CPU do not."""
    return _INSTALLED


def served_by_triton(tensor: Tensor) -> bool:
    """Whether kernels serve a call on this tensor: on a GPU, or on the CPU under Triton's interpreter."""
    return (tensor.is_cuda or _INTERPRETING) and _INSTALLED
