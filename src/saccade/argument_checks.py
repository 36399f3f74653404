"""Checks that every public function makes of its arguments before it dispatches.

They look at types, dtypes, devices and shapes, which the host knows. They never look at the values of a tensor: reading
one would wait for the GPU.
"""

import math
import numbers
import sys
from typing import Any

import torch
from torch import Tensor

_LARGEST = sys.float_info.max


class InvalidStateError(RuntimeError, ValueError):
    """A ``ValueError`` where the original packages raise ``RuntimeError``: code that catches either keeps working."""


class InvalidArgumentError(AssertionError, ValueError):
    """A ``ValueError`` where the original packages raise ``AssertionError``: code that catches either keeps working."""


def require_tensor(name: str, value: Any) -> None:
    """Raise ``TypeError`` unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


def require_floating(name: str, value: Any) -> None:
    """Raise ``TypeError`` unless ``value`` is a float16, bfloat16, float32 or float64 tensor."""
    require_tensor(name, value)
    if value.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {value.dtype}")


def require_integer(name: str, value: Any) -> None:
    """Raise ``TypeError`` unless ``value`` is an int32 or int64 tensor."""
    require_tensor(name, value)
    if value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: expected int32 or int64, got {value.dtype}")


def require_shape(name: str, tensor: Tensor, axes: str, **sizes: int) -> torch.Size:
    """Check a tensor's shape against letters and return it.

    Args:
        name: Argument name, for the message.
        tensor: The tensor.
        axes: One word for each axis: a letter, or a number that the axis must have, such as ``"B A K N 2"``.
        **sizes: Size that a letter must have; letters not named here may have any size.

    Raises:
        ValueError: Wrong number of axes, or an axis of the wrong size.
    """
    letters = axes.split()
    shape = tensor.shape
    if len(shape) == len(letters):
        for letter, size in zip(letters, shape, strict=True):
            expected = int(letter) if letter.isdigit() else sizes.get(letter, size)
            if size != expected:
                break
        else:
            return shape
    known = ", ".join(f"{letter}={sizes[letter]}" for letter in letters if letter in sizes)
    expectation = f"({', '.join(letters)})" + (f" with {known}" if known else "")
    raise ValueError(f"{name}: expected shape {expectation}, got {tuple(shape)}")


def require_same_device(**tensors: Tensor | None) -> None:
    """Raise ``ValueError`` unless all tensors (``None`` apart) lie on the device of the first."""
    first_name, first = next(iter(tensors.items()))
    assert first is not None
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != first.device:
            raise ValueError(f"{name}: expected device {first.device}, that of {first_name}, got {tensor.device}")


def require_number(name: str, value: Any, *, minimum: float = -math.inf, above: float = -math.inf) -> float:
    """Raise unless ``value`` is a finite number >= ``minimum`` and > ``above``; return it as a number of Python's."""
    if isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got bool")
    if not isinstance(value, (int, float)):
        if not isinstance(value, numbers.Real):  # which NumPy's scalars are, but tensors are not
            raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
        value = float(value)
    # Not math.isfinite: torch.compile may hand over a symbolic number. An integer may be larger than any float.
    if not (-_LARGEST <= value <= _LARGEST and value >= minimum and value > above):
        bound = f" > {above:g}" if above > -math.inf else f" >= {minimum:g}" if minimum > -math.inf else ""
        raise ValueError(f"{name}: expected a finite number{bound}, got {value}")
    return value


def require_whole(name: str, value: Any) -> None:
    """Raise unless ``value`` is an ``int`` >= 0 of 64 bits."""
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected int, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{name}: expected an int >= 0, got {value}")
    if value >= 2**63:
        raise ValueError(f"{name}: expected an int of 64 bits, got {value}")


def require_bool(name: str, value: Any) -> None:
    """Raise ``TypeError`` unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")


def require_real(name: str, value: Any) -> None:
    """Raise ``TypeError`` unless ``value`` is a tensor of bool, integer or floating dtype."""
    require_tensor(name, value)
    if value.is_complex():
        raise TypeError(f"{name}: expected bool, integer or floating dtype, got {value.dtype}")


def require_constant(name: str, value: Tensor) -> None:
    """Raise ``ValueError`` if a gradient is asked for where there is none: it would be missing without a word."""
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: expected a tensor that does not require grad (detach it), got one that does")
