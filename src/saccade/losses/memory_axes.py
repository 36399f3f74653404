"""How kernels walk through tensors of one shape that lie in memory in their own ways."""

from collections.abc import Sequence
from typing import Any

Strides = Sequence[int]


def memory_axes(shape: Sequence[int], *strides: Strides | None) -> tuple[tuple[int, ...], list[Any]]:
    """Axes to visit all elements by, in the order in which they lie in the first tensor's memory.

    Args:
        shape: Common to all tensors; expanded ones have a stride of 0.
        *strides: Of each tensor, one for each axis; ``None`` for one that is missing, which the first is not.

    Returns:
        Sizes of the axes, innermost first; and the strides of each tensor along them, ``None`` for a missing one. Axes
        that all tensors step through as through a single one are one; there is at least one.

    Example:
        >>> memory_axes((2, 3, 4), (12, 4, 1), (0, 4, 1))
        ((12, 2), [(1, 12), (1, 0)])
    """
    given = [of_tensor for of_tensor in strides if of_tensor is not None]
    order = sorted((axis for axis, size in enumerate(shape) if size != 1), key=lambda axis: (given[0][axis], -axis))
    sizes: list[int] = []
    steps: list[list[int]] = [[] for _ in given]
    for axis in order:
        if sizes and all(step[-1] * sizes[-1] == of_tensor[axis] for step, of_tensor in zip(steps, given, strict=True)):
            sizes[-1] *= shape[axis]
        else:
            sizes.append(shape[axis])
            for step, of_tensor in zip(steps, given, strict=True):
                step.append(of_tensor[axis])
    along = iter(steps)
    return tuple(sizes or [1]), [None if of_tensor is None else tuple(next(along) or [0]) for of_tensor in strides]
