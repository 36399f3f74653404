"""What the tests of both losses on a GPU share: limits, sizes, and states that they are run in."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

NAN = float("nan")
BEYOND_32_BITS = 2**31

# Largest relative error (norm of the difference over norm of the exact result): a few roundings of float32 in each
# element, and half an ulp of the smaller dtypes. Reduced losses are float32 whatever the dtype.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}


def bytes_of(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@contextmanager
def synchronizing_raises() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def deterministic_algorithms(on: bool) -> Iterator[None]:
    torch.use_deterministic_algorithms(on)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
