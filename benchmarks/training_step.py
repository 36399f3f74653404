"""A step of training: leaves without gradients, a call, its backward, and the memory that takes."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def as_leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().requires_grad_() for tensor in tensors]


def forward_backward(
    call: Callable[..., Tensor], leaves: Sequence[Tensor], grad_output: Tensor | None = None
) -> Tensor:
    """A step of training: the gradients are new ones. A scalar output needs no ``grad_output``."""
    for leaf in leaves:
        leaf.grad = None
    output = call(*leaves)
    output.backward(grad_output)
    return output


def size_of(*tensors: Tensor) -> int:
    """Bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def memory_of(step: Callable[[], Tensor], given: Sequence[Tensor]) -> dict[str, float]:
    """Megabytes at the peak of a step of training, and of what it is given and gives: inputs, output, gradients."""
    for tensor in given:
        tensor.grad = None
    held = size_of(*given)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = step()
    peak = torch.cuda.max_memory_allocated() - before + held
    needed = held + size_of(output, *(tensor for tensor in given if tensor.requires_grad))
    return {"peak_mb": peak / 1e6, "needed_mb": needed / 1e6}


def forget() -> None:
    """Give back the memory of a workload, and what was compiled for it."""
    torch.compiler.reset()
    torch.cuda.empty_cache()
