"""What every operator is tested on: one list of cases per operator, all of them run through ``test_contract.py``."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

# Largest allowed relative error (norm of the difference over norm of the oracle's result) by dtype of the input. The
# operators sum in float32 and round once to the output's dtype: half an ulp of that dtype, or a few hundred roundings
# of float32.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}


@dataclass(frozen=True)
class Case:
    """One call of one public function.

    ``inputs()`` makes the tensors afresh, on the CPU; ``call`` takes them in that order, with every option bound, and
    returns a tensor, or writes into the first input. Inputs that may have gradients require grad. ``oracle`` takes the
    same tensors in float64 and says the result independently of the library; autograd through it gives the gradients.
    """

    name: str
    call: Callable[..., Any]
    inputs: Callable[[], tuple[Any, ...]]
    oracle: Callable[..., Any]
    in_place: bool = False  # the first input is written to, and is the result
    twice_differentiable: bool = False  # or a second derivative raises
    operator_on: tuple[str, ...] = ("cpu", "cuda")  # where an operator is called, rather than PyTorch's own
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    tolerances: dict[torch.dtype, float] = field(default_factory=lambda: TOLERANCES)
