"""``gaussian_radius``: how large a Gaussian to draw for a box."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from saccade.argument_checks import require_number, require_real
from saccade.precision import compute_dtype


def gaussian_radius(det_size: Any, min_overlap: float, *, convention: Literal["mmdet", "mmdet3d"]) -> Any:
    """Radius by which the corners of a box may move so that it still overlaps the true one.

    Args:
        det_size: (height, width), each a number or a tensor of any shape; the two broadcast. In any unit, which is that
            of the result. A tensor is never read on the host.
        min_overlap: Intersection over union that the moved box must keep, in (0, 1].
        convention: ``"mmdet"`` takes the smallest radius of three ways of moving (one corner in and one out, both in,
            both out), which is always the second. ``"mmdet3d"`` takes other roots of the same three equations, the
            smallest of which is always ``4 * min_overlap`` times the radius of the third; models of the CenterPoint
            family are trained so.

    Returns:
        A float if both sizes are numbers; else a tensor, float64 if a size is float64 and float32 otherwise. 0 for a
        box without area; tensors may also have negative sizes, which count as 0.

    Raises:
        TypeError: ``det_size`` is no pair of numbers or real tensors, or ``min_overlap`` no number.
        ValueError: A number out of range, or an unknown ``convention``.

    From CornerNet (Law and Deng, 2018, https://arxiv.org/abs/1808.01244), as in mmdet and mmdet3d.

    Example:
        >>> import saccade
        >>> round(saccade.gaussian_radius((10, 20), 0.7, convention="mmdet"), 4)
        1.0774
    """
    min_overlap = require_overlap("convention", convention, min_overlap)
    if not isinstance(det_size, (tuple, list)) or len(det_size) != 2:
        raise TypeError(f"det_size: expected a pair (height, width), got {type(det_size).__name__}")
    for axis, size in enumerate(det_size):
        if isinstance(size, Tensor):
            require_real(f"det_size[{axis}]", size)
        else:
            require_number(f"det_size[{axis}]", size, minimum=0)
    height, width = det_size
    tensors = [size for size in det_size if isinstance(size, Tensor)]
    if not tensors:
        return max(0.0, radius_of(float(height), float(width), min_overlap, convention, math.sqrt))
    dtype = compute_dtype(*tensors)
    height, width = (size.to(dtype).clamp(min=0) if isinstance(size, Tensor) else size for size in det_size)
    return radius_of(height, width, min_overlap, convention, torch.sqrt).clamp(min=0)


def require_overlap(name: str, convention: Any, min_overlap: Any) -> float:
    """Check a convention, which is the argument ``name``, and the overlap; return the latter."""
    if convention not in ("mmdet", "mmdet3d"):
        raise ValueError(f"{name}: expected 'mmdet' or 'mmdet3d', got {convention!r}")
    min_overlap = require_number("min_overlap", min_overlap, above=0)
    if min_overlap > 1:
        raise ValueError(f"min_overlap: expected a number in (0, 1], got {min_overlap}")
    return min_overlap


def radius_of(height: Any, width: Any, overlap: float, convention: str, sqrt: Callable[[Any], Any]) -> Any:
    """The formula, for numbers or tensors; rounding may make a radius of 0 negative."""
    total, area = height + width, height * width
    if convention == "mmdet3d":
        return sqrt((overlap * total) ** 2 + 4 * overlap * (1 - overlap) * area) - overlap * total
    # (height - 2r) * (width - 2r) = overlap * area, the discriminant as a sum that rounding cannot make negative.
    return (total - sqrt((height - width) ** 2 + 4 * overlap * area)) / 4
