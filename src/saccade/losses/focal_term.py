"""The focal term that all sigmoid focal losses are made of.

A positive and a negative are mirror images under ``x -> -x``. So one function of a logit ``z`` that should be very
negative serves both: ``z = x`` for a negative, ``z = -x`` for a positive.
"""

import torch
from torch import Tensor


def softplus(z: Tensor) -> Tensor:
    """``log(1 + exp(z))`` without overflow, accurate in both tails (torch's own drops the one above 20)."""
    return z.clamp(min=0) + torch.log1p(torch.exp(-z.abs()))


def focal_term(z: Tensor, power: float) -> Tensor:
    """``-log(1 - p) * p ** power`` with ``p = sigmoid(z)``: 0 at minus infinity, infinite at infinity."""
    return softplus(z) * torch.sigmoid(z) ** power


def focal_term_slope(z: Tensor, power: float) -> Tensor:
    """The derivative of ``focal_term``: 0 at minus infinity, 1 at infinity."""
    limits = torch.finfo(z.dtype)
    z = z.clamp(limits.min, limits.max)  # an infinite z would be multiplied by a probability of 0
    p = torch.sigmoid(z)
    return p**power * (p + power * torch.sigmoid(-z) * softplus(z))
