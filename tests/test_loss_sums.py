"""Sums of losses over many tiles of one program, as large inputs have them."""

import pytest
import torch

from cases.comparison import assert_near
from saccade.focal_loss import sigmoid_focal_loss, softmax_focal_loss
from saccade.gaussian_focal_loss import gaussian_focal_loss_with_logits
from saccade.triton_dispatch import served_by_triton

pytestmark = pytest.mark.interpreted

SUMS = {
    "labels": lambda logits, labels, _: sigmoid_focal_loss(logits, labels, reduction="sum"),
    "labels-by-class": lambda logits, labels, _: sigmoid_focal_loss(logits.T.contiguous().T, labels, reduction="sum"),
    "soft": lambda logits, _, soft: sigmoid_focal_loss(logits, soft, reduction="sum"),
    "softmax": lambda logits, labels, _: softmax_focal_loss(logits, labels, reduction="sum"),
    "gaussian": lambda logits, _, soft: gaussian_focal_loss_with_logits(logits, soft, reduction="sum"),
    "gaussian-clipped": lambda logits, _, soft: gaussian_focal_loss_with_logits(
        logits, soft, clip=0.01, reduction="sum"
    ),
    "gaussian-positives": lambda logits, _, soft: gaussian_focal_loss_with_logits(logits, soft, avg_factor="num_pos"),
}


@pytest.mark.parametrize("form", SUMS)
@pytest.mark.parametrize(("programs", "in_a_row"), [(1, 32), (3, 32), (1, 2)])
def test_few_programs_sum_many_tiles(form, programs, in_a_row, device, monkeypatch):
    if not served_by_triton(torch.empty(0, device=device)):
        pytest.skip("has no kernel there")
    from saccade import loss_reduction_kernels
    from saccade.focal_loss import kernels
    from saccade.gaussian_focal_loss import kernels as gaussian_kernels

    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(2600, 7, generator=rng)
    labels = torch.randint(0, 8, (2600,), generator=rng)
    soft = torch.randint(0, 5, (2600, 7), generator=rng) / 4
    expected = SUMS[form](logits.double(), labels, soft.double())
    monkeypatch.setattr(loss_reduction_kernels, "_ENOUGH_PROGRAMS", programs)
    monkeypatch.setattr(loss_reduction_kernels, "_IN_A_ROW", in_a_row)
    kernels._prepare.cache_clear()
    gaussian_kernels._prepare.cache_clear()
    try:
        total = SUMS[form](logits.to(device), labels.to(device), soft.to(device))
    finally:  # launches prepared for so few programs must not be kept
        kernels._prepare.cache_clear()
        gaussian_kernels._prepare.cache_clear()
    # Each element's rounding, some of float32's, and of the sums of a few tiles.
    assert_near("sum", total.cpu(), expected, 1e-6)
