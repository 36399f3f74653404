"""How a loss is reduced: checked by the public functions, applied inside the operators, forward and backward."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from saccade.argument_checks import require_constant, require_number, require_real, require_same_device
from saccade.precision import compute_dtype

AVG_FACTOR_EPS = 1.1920929e-07
"""What is added to an ``avg_factor`` before dividing by it, as mmdet does: a factor of 0 does not make the loss NaN."""


Reduction = tuple[str, Tensor | None, float, float]
"""How an operator reduces its loss, its last four arguments: ``kind``, ``avg_factor``, ``scale`` and ``eps``.

``kind`` is none, mean or sum, or an operator's own; ``avg_factor`` is what a mean divides by if not by the number of
losses, ``eps`` what is added to it, and ``scale`` a factor of the result.
"""


def checked_reduction(
    reduction: Any, avg_factor: Any, name: str, predictions: Tensor, scale: float = 1.0, eps: float = AVG_FACTOR_EPS
) -> Reduction:
    """Check ``reduction`` and ``avg_factor`` of a public function without looking at the value of a tensor.

    Args:
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        avg_factor: ``None``, a number, or a tensor of one element on the device of the loss; ``"none"`` ignores it.
        name: How messages should call the predictions.
        predictions: Their device is that of the loss.
        scale: Factor of the result.
        eps: Added to ``avg_factor``.

    Raises:
        TypeError: ``avg_factor`` is neither a number nor a tensor of real numbers.
        ValueError: Unknown ``reduction``, ``avg_factor`` with ``"sum"``, or an ``avg_factor`` that has not one element,
            lies on another device, or requires grad.
    """
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction: expected 'none', 'mean' or 'sum', got {reduction!r}")
    if avg_factor is None or reduction == "none":
        return reduction, None, scale, eps
    if reduction == "sum":
        raise ValueError("avg_factor: expected None with reduction 'sum', got one")
    if isinstance(avg_factor, Tensor):
        require_real("avg_factor", avg_factor)
        require_constant("avg_factor", avg_factor)
        if avg_factor.numel() != 1:
            raise ValueError(f"avg_factor: expected one element, got shape {tuple(avg_factor.shape)}")
        require_same_device(**{name: predictions}, avg_factor=avg_factor)
        return "mean", avg_factor, scale, eps
    avg_factor = require_number("avg_factor", avg_factor)
    if torch.compiler.is_compiling():
        # The compiler would bake a number into its graph, and compile anew for the next one. Of all that makes a tensor
        # of it, a product is what keeps it variable.
        one = torch.ones((), dtype=torch.float64, device=predictions.device)
        return "mean", one * avg_factor, scale, eps
    divisor = avg_factor + eps
    return "sum", None, scale / divisor if divisor else scale * math.inf, eps


def normalized(value: Tensor, count: int, kind: str, avg_factor: Tensor | None, scale: float, eps: float) -> Tensor:
    """A sum of ``count`` losses turned into the result; or, as that is linear, a gradient turned back."""
    if avg_factor is not None:
        return value * scale / (avg_factor.to(value.dtype) + eps)
    return value * scale / count if kind == "mean" else value * scale


def new_loss(predictions: Tensor, shape: torch.Size, kind: str, avg_factor: Tensor | None) -> Tensor:
    """An empty result: of ``shape`` and dtype of the predictions if unreduced, else of the shape of ``avg_factor``.

    One of the predictions' own shape lies in memory as they do.
    """
    if kind == "none":
        return torch.empty_like(predictions) if shape == predictions.shape else predictions.new_empty(shape)
    return predictions.new_empty(() if avg_factor is None else avg_factor.shape, dtype=compute_dtype(predictions))


def laid_out_as(predictions: Tensor, result: Tensor) -> Tensor:
    """A contiguous result of the shape of the predictions, laid out in memory as they are."""
    return result if predictions.is_contiguous() else torch.empty_like(predictions).copy_(result)


def row_blocks(tensor: Tensor) -> Iterator[slice]:
    """Cut the rows of a tensor into blocks whose temporaries stay in a CPU's cache, or fill a GPU."""
    rows = tensor.shape[0]
    width = max(1, tensor.numel() // max(1, rows))
    block = max(1, (1 << 24 if tensor.is_cuda else 1 << 16) // width)
    for start in range(0, rows, block):
        yield slice(start, start + block)
