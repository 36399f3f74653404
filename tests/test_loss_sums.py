"""Sums of losses over many tiles of one program, as large inputs have them."""

import pytest
import torch

from cases.comparison import assert_near
from saccade.losses.focal import sigmoid_focal_loss, softmax_focal_loss
from saccade.losses.focal.options import SigmoidOptions
from saccade.losses.gaussian import gaussian_focal_loss_with_logits
from saccade.losses.reduction import Reduction
from saccade.operator.declaration import OPERATORS
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


def forget_all_calls() -> None:
    for operator in OPERATORS.values():
        operator.forget()


@pytest.mark.parametrize("form", SUMS)
@pytest.mark.parametrize(("programs", "in_a_row"), [(1, 32), (3, 32), (1, 2)])
def test_few_programs_sum_many_tiles(form, programs, in_a_row, device, monkeypatch):
    if not served_by_triton(torch.empty(0, device=device)):
        pytest.skip("has no kernel there")
    from saccade.losses import reduction_launch

    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(2600, 7, generator=rng)
    labels = torch.randint(0, 8, (2600,), generator=rng)
    soft = torch.randint(0, 5, (2600, 7), generator=rng) / 4
    expected = SUMS[form](logits.double(), labels, soft.double())
    monkeypatch.setattr(reduction_launch, "_ENOUGH_PROGRAMS", programs)
    monkeypatch.setattr(reduction_launch, "_IN_A_ROW", in_a_row)
    forget_all_calls()
    try:
        total = SUMS[form](logits.to(device), labels.to(device), soft.to(device))
    finally:  # launches prepared for so few programs must not be kept
        forget_all_calls()
    # Each element's rounding, some of float32's, and of the sums of a few tiles.
    assert_near("sum", total.cpu(), expected, 1e-6)


class OnGpu:
    """Predictions that are said to be on a GPU."""

    def __init__(self, device: int = 0):
        self.get_device = lambda: device
        self.new_empty, self.new_zeros = torch.empty(0).new_empty, torch.empty(0).new_zeros


def test_a_counter_is_as_it_was_after_each_launch(device, monkeypatch):
    """Or the next launch that it is kept for finds no program to be the last one, and writes no loss."""
    if not served_by_triton(torch.empty(0, device=device)):
        pytest.skip("has no kernel there")
    from saccade.losses import reduction_launch
    from saccade.losses.focal import launch

    if device == "cpu":  # interpreted: that memory is kept at all takes a GPU and its stream
        workspace = reduction_launch.workspace
        monkeypatch.setattr(launch, "workspace", lambda programs, _, dtype: workspace(programs, OnGpu(), dtype))
        monkeypatch.setattr(reduction_launch, "current_gpu", lambda: 0)
        monkeypatch.setattr(reduction_launch, "current_stream", lambda device: 7)
        monkeypatch.setattr(reduction_launch, "is_capturing", lambda: False)
    monkeypatch.setattr(reduction_launch, "_workspaces", {})
    labels = torch.zeros(400, dtype=torch.int64, device=device)
    rest = None, None, SigmoidOptions(0.25, 2.0, False), Reduction("sum")
    losses, expected = [], []
    for number in range(4):
        logits = torch.full((400, 7), number / 4, device=device)
        call = launch.prepare_sigmoid_focal_loss_with_gradient(logits, labels, *rest)
        losses.append(call(logits, labels, *rest)[0])
        expected.append(sigmoid_focal_loss(logits.double(), labels, reduction="sum"))
        ((_, counter),) = reduction_launch._workspaces.values()
        assert counter.tolist() == [0]
    assert_near("sums", torch.stack(losses), torch.stack(expected), 1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_steps_one_after_the_other():
    """All on one stream, of other shapes in between: each loss is that of its own logits."""
    losses, expected = [], []
    for number in range(12):
        logits = torch.full((400 + 300 * (number % 3), 7), number / 4, device="cuda", requires_grad=True)
        labels = torch.zeros(len(logits), dtype=torch.int64, device="cuda")
        loss = sigmoid_focal_loss(logits, labels, reduction="sum")
        loss.backward()
        losses.append(loss.detach())
        expected.append(sigmoid_focal_loss(logits.detach().double(), labels, reduction="sum"))
    assert_near("sums", torch.stack(losses), torch.stack(expected), 1e-6)


def test_who_shares_a_counter(monkeypatch):
    """Launches on one stream of the current GPU, and no others: of a graph, or on each thread's own stream."""
    pytest.importorskip("triton")
    from saccade.losses import reduction_launch

    stream, capturing = 7, False
    monkeypatch.setattr(reduction_launch, "_workspaces", {})
    monkeypatch.setattr(reduction_launch, "current_gpu", lambda: 0)
    monkeypatch.setattr(reduction_launch, "current_stream", lambda device: stream)
    monkeypatch.setattr(reduction_launch, "is_capturing", lambda: capturing)

    def counter(programs: int = 3, device: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        workspace = reduction_launch.workspace(programs, OnGpu(device), dtype)
        assert len(workspace.sums) >= programs
        assert workspace.sums.dtype == dtype
        assert workspace.counter.tolist() == [0]
        return workspace.counter

    kept = counter()
    assert counter(programs=1000) is kept
    alone = [counter(programs=5000), counter(device=1), counter(device=-1), counter(dtype=torch.float64)]
    capturing = True
    alone += [counter(), counter()]
    capturing, stream = False, 8
    alone += [counter()]
    stream = 2
    alone += [counter(), counter()]
    stream = 7
    assert counter() is kept
    assert len({id(each) for each in [kept, *alone]}) == 1 + len(alone)
