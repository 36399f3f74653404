"""How near results must be, said in three ways."""

from collections.abc import Sequence

import torch
from torch import Tensor


def assert_near(what: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """The norm of the difference, relative to the norm of what is expected."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    actual, expected = actual.detach().double().to(expected.device), expected.detach().double()
    difference, scale = (actual - expected).norm().item(), expected.norm().item()
    assert difference <= tolerance * scale, f"{what}: off by {difference:.2e} of {scale:.2e}, allowed {tolerance:.0e}"


def assert_each_near(
    what: str, actual: Tensor, expected: Tensor, tolerance: float, lost_below: float, absolute: Tensor | float = 0.0
) -> None:
    """Every element, relative to itself; of one below ``lost_below`` nothing is asked but to stay there."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    actual, expected = actual.detach().double().to(expected.device), expected.detach().double()
    size = expected.abs()
    allowed = torch.where(size > lost_below, tolerance * size, 2 * lost_below) + absolute
    wrong = ~((actual - expected).abs() <= allowed)  # which NaN is
    first = [f"{left:.9g} for {right:.9g}" for left, right in zip(actual[wrong], expected[wrong], strict=True)][:5]
    assert not first, f"{what}: {int(wrong.sum())} of {wrong.numel()} elements are off, the first: {', '.join(first)}"


def assert_same_bits(what: str, actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for k, (left, right) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(left, right), f"{what}: result {k} has other bits"
