"""How a loss is reduced: said by the public functions, applied inside the operators, forward and backward."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.argument_checks import require_constant, require_number, require_real, require_same_device
from saccade.precision import compute_dtype

AVG_FACTOR_EPS = 1.1920929e-07
"""What is added to an ``avg_factor`` before dividing by it, as mmdet does: a factor of 0 does not make the loss NaN."""


class Reduction(NamedTuple):
    """How an operator reduces its loss."""

    mode: str
    """``"none"``, ``"mean"``, ``"sum"``, or ``"num_pos"``: a mean over positives, which the operator counts."""
    avg_factor: Tensor | None = None
    """What a mean divides by, if not by the number of losses."""
    scale: float = 1.0
    """Factor of the result. Varies from call to call with an ``avg_factor`` that is a number."""
    eps: float = AVG_FACTOR_EPS
    """Added to what a mean divides by."""

    @property
    def is_none(self) -> bool:
        """Whether losses stay as they are."""
        return self.mode == "none"

    def factor(self, count: int) -> float:
        """What the sum of ``count`` losses is multiplied by, besides division by ``avg_factor``."""
        return self.scale / count if self.mode == "mean" and self.avg_factor is None else self.scale


UNREDUCED = Reduction("none")


def reduction_of(
    reduction: Any,
    avg_factor: Any,
    predictions: Tensor,
    scale: float = 1.0,
    eps: float = AVG_FACTOR_EPS,
    counted: tuple[str, ...] = (),
) -> Reduction:
    """What a public function is told of the reduction; of a known call, numbers alone are checked.

    Args:
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        avg_factor: ``None``, a number, a tensor of one element on the device of the loss, or one of ``counted``;
            ``"none"`` ignores it.
        predictions: Their device is that of the loss.
        scale: Factor of the result.
        eps: Added to ``avg_factor``.
        counted: Modes of the operator's own, which count what the mean divides by.

    Raises:
        TypeError: ``avg_factor`` is neither a number nor a tensor.
        ValueError: Unknown ``reduction``, ``avg_factor`` with ``"sum"``, or a number that is not finite.
    """
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction: expected 'none', 'mean' or 'sum', got {reduction!r}")
    if avg_factor is None or reduction == "none":
        return Reduction(reduction, None, scale, eps)
    if reduction == "sum":
        raise ValueError("avg_factor: expected None with reduction 'sum', got one")
    if isinstance(avg_factor, Tensor):
        return Reduction("mean", avg_factor, scale, eps)  # which is checked if the call is not known
    if isinstance(avg_factor, str) and avg_factor in counted:
        return Reduction(avg_factor, None, scale, eps)
    avg_factor = require_number("avg_factor", avg_factor)
    if torch.compiler.is_compiling():
        # The compiler would bake a number into its graph, and compile anew for the next one. Of all that makes a tensor
        # of it, a product is what keeps it variable.
        one = torch.ones((), dtype=torch.float64, device=getattr(predictions, "device", None))
        return Reduction("mean", one * avg_factor, scale, eps)
    divisor = avg_factor + eps
    return Reduction("sum", None, scale / divisor if divisor else scale * math.inf, eps)


def require_avg_factor(reduction: Reduction, name: str, predictions: Tensor) -> None:
    """Check the tensor that a mean divides by, if it is one; messages call the predictions by ``name``.

    Raises:
        TypeError: It is not of real numbers.
        ValueError: It has not one element, lies on another device, or requires grad.
    """
    avg_factor = reduction.avg_factor
    if avg_factor is not None:
        require_real("avg_factor", avg_factor)
        require_constant("avg_factor", avg_factor)
        if avg_factor.numel() != 1:
            raise ValueError(f"avg_factor: expected one element, got shape {tuple(avg_factor.shape)}")
        require_same_device(**{name: predictions}, avg_factor=avg_factor)


def normalized(value: Tensor, count: int, reduction: Reduction) -> Tensor:
    """A sum of ``count`` losses turned into the result; or, as that is linear, a gradient turned back."""
    if reduction.avg_factor is not None:
        return value * reduction.scale / (reduction.avg_factor.to(value.dtype) + reduction.eps)
    return value * reduction.scale / count if reduction.mode == "mean" else value * reduction.scale


def new_loss(predictions: Tensor, shape: torch.Size, reduction: Reduction) -> Tensor:
    """An empty result: of ``shape`` and dtype of the predictions if unreduced, else of the shape of ``avg_factor``.

    One of the predictions' own shape lies in memory as they do.
    """
    if reduction.is_none:
        return torch.empty_like(predictions) if shape == predictions.shape else predictions.new_empty(shape)
    reduced = () if reduction.avg_factor is None else reduction.avg_factor.shape
    return predictions.new_empty(reduced, dtype=compute_dtype(predictions))


def reduced_in_blocks(losses: Iterable[Tensor], predictions: Tensor, shape: torch.Size, reduction: Reduction) -> Tensor:
    """Losses of ``shape``, given block by block in the order of their numbers, reduced or one beside the other.

    Those of the predictions' own shape lie in memory as they do. Losses that are in no block are 0.
    """
    written = predictions.new_zeros(shape.numel() if reduction.is_none else 0)
    total = predictions.new_zeros((), dtype=compute_dtype(predictions))
    first = 0
    for loss in losses:
        if reduction.is_none:
            written[first : first + loss.numel()] = loss.flatten() * reduction.scale
            first += loss.numel()
        else:
            total += loss.sum()
    if reduction.is_none:
        return laid_out_as(predictions, written.view(shape))
    return new_loss(predictions, shape, reduction).copy_(normalized(total, shape.numel(), reduction))


def gradient_of_blocks(
    grad_output: Tensor, predictions: Tensor, shape: torch.Size, reduction: Reduction
) -> Callable[[slice], Tensor]:
    """What gives the gradients of the losses in a block of rows: (n, C), or of reduced ones the one of all.

    ``shape`` (N, C) or (N,) is that of the losses as rows.
    """
    grad_loss = normalized(grad_output.to(compute_dtype(predictions)), shape.numel(), reduction)
    return grad_loss.reshape(shape).__getitem__ if reduction.is_none else lambda _: grad_loss


def laid_out_as(tensor: Tensor | None, result: Tensor) -> Tensor:
    """A contiguous result of the shape of the tensor, laid out in memory as that is; another result as it is."""
    if tensor is None or tensor.shape != result.shape or tensor.is_contiguous():
        return result
    return torch.empty_like(tensor, dtype=result.dtype).copy_(result)


def row_blocks(tensor: Tensor) -> Iterator[slice]:
    """Cut the rows of a tensor into blocks whose temporaries stay in a CPU's cache, or fill a GPU."""
    rows = tensor.shape[0]
    width = max(1, tensor.numel() // max(1, rows))
    block = max(1, (1 << 24 if tensor.is_cuda else 1 << 16) // width)
    for start in range(0, rows, block):
        yield slice(start, start + block)
