"""What the focal losses and their gradients are, in float64, some rows at a time.

Written from the definitions and independent of the library: the gradients are those of autograd. The numbers are the
defaults of the operators.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 1 << 24  # elements: their float64 temporaries take a gigabyte or two


class Exact(NamedTuple):
    """The loss of some rows, summed, and its gradient, float64."""

    rows: slice  # of the first axis
    loss: Tensor  # ()
    grad_logits: Tensor  # of the shape of these rows


def exact(
    element_losses: Callable[[Tensor, Tensor], Tensor],
    logits: Tensor,  # (R, ...)
    target: Tensor,  # (R, ...)
) -> Iterator[Exact]:
    """Every row once, in blocks."""
    rows_per_block = max(1, BLOCK * logits.shape[0] // logits.numel())
    for start in range(0, logits.shape[0], rows_per_block):
        rows = slice(start, start + rows_per_block)
        x = logits[rows].detach().double().requires_grad_()
        loss = element_losses(x, target[rows]).sum()
        (grad_logits,) = torch.autograd.grad(loss, x)
        yield Exact(rows, loss.detach(), grad_logits)


def sigmoid_focal(
    logits: Tensor,  # (..., C) float64
    target: Tensor,  # (...) integer, C is background
) -> Tensor:
    positive = target[..., None] == torch.arange(logits.shape[-1], device=logits.device)
    return torch.where(positive, 0.25, 0.75) * _focal(torch.where(positive, logits, -logits))


def gaussian_focal(
    logits: Tensor,  # (...) float64
    target: Tensor,  # (...) floating point
) -> Tensor:
    positive = target == 1
    share = torch.where(positive, 1, (1 - target.double()) ** 4)
    return share * _focal(torch.where(positive, logits, -logits))


def _focal(logit: Tensor) -> Tensor:
    """``-log(p) * (1 - p) ** 2`` where ``p``, the probability of the right answer, is the sigmoid of ``logit``."""
    return -F.logsigmoid(logit) * torch.exp(2 * F.logsigmoid(-logit))
