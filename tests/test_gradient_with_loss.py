"""Of few elements the gradient comes with the loss, from one launch: it is that of the backward operator."""

import pytest
import torch
from torch import Tensor

from saccade.losses.focal import sigmoid_focal_loss
from saccade.losses.focal.api import SIGMOID_FOCAL_LOSS
from saccade.losses.gaussian import gaussian_focal_loss, gaussian_focal_loss_with_logits
from saccade.losses.gaussian.api import GAUSSIAN_FOCAL_LOSS
from saccade.operator import torch_internals
from saccade.triton_dispatch import served_by_triton

pytestmark = pytest.mark.interpreted
OPERATORS = {"sigmoid": SIGMOID_FOCAL_LOSS, "gaussian": GAUSSIAN_FOCAL_LOSS}


@pytest.fixture(autouse=True)
def past_the_dispatcher(device, monkeypatch) -> None:
    """Calls take the way of ordinary GPU tensors, on the CPU under Triton's interpreter too."""
    if not served_by_triton(torch.empty(0, device=device)):
        pytest.skip("has no kernel there")
    if device == "cpu":
        keys = torch_internals._raw_keys("CPU", "ADInplaceOrView", "AutogradCPU", "AutocastCPU")
        monkeypatch.setattr(torch_internals, "ORDINARY_GPU_KEYS", keys)


FORMS = {
    "sigmoid-labels": lambda x, labels, soft: sigmoid_focal_loss(x, labels),
    "sigmoid-number": lambda x, labels, soft: sigmoid_focal_loss(x, labels, avg_factor=3, alpha=-1),
    "sigmoid-tensor": lambda x, labels, soft: sigmoid_focal_loss(x, labels, avg_factor=x.new_tensor([3.5]), gamma=1.5),
    "sigmoid-soft": lambda x, labels, soft: sigmoid_focal_loss(x, soft, reduction="sum"),
    "sigmoid-bool": lambda x, labels, soft: sigmoid_focal_loss(x, soft > 0.5, weight=soft),
    "sigmoid-class-weight": lambda x, labels, soft: sigmoid_focal_loss(
        x, labels, class_weight=soft[0], weight=soft[:, 0]
    ),
    "sigmoid-activated": lambda x, labels, soft: sigmoid_focal_loss(x.sigmoid(), labels, activated=True),
    "sigmoid-permuted": lambda x, labels, soft: sigmoid_focal_loss(x.T.contiguous().T, labels),
    "gaussian-mean": lambda x, labels, soft: gaussian_focal_loss_with_logits(x, soft),
    "gaussian-number": lambda x, labels, soft: gaussian_focal_loss_with_logits(x, soft, avg_factor=3, alpha=1.5),
    "gaussian-tensor": lambda x, labels, soft: gaussian_focal_loss_with_logits(
        x, soft, avg_factor=x.new_tensor([3.5]), gamma=3
    ),
    "gaussian-clipped": lambda x, labels, soft: gaussian_focal_loss_with_logits(x, soft, clip=0.05, reduction="sum"),
    "gaussian-weight": lambda x, labels, soft: gaussian_focal_loss_with_logits(
        x, soft, weight=soft[0] > 0.3, reduction="sum", pos_weight=2, neg_weight=0.5
    ),
    "gaussian-probabilities": lambda x, labels, soft: gaussian_focal_loss(x.sigmoid(), soft, reduction="sum"),
    "gaussian-permuted": lambda x, labels, soft: gaussian_focal_loss_with_logits(x.T.contiguous().T, soft),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_a_gradient_that_comes_with_the_loss_is_that_of_the_operator(form, dtype, device, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(300, 5, generator=generator, dtype=dtype)).to(device)
    labels = torch.randint(6, (300,), generator=generator).to(device)
    soft = (torch.randint(5, (300, 5), generator=generator) / 4).to(device)
    loss, operator = form.split("-")[0], OPERATORS[form.split("-")[0]]
    launch = pytest.importorskip(f"saccade.losses.{loss.replace('sigmoid', 'focal')}.launch")  # where there is Triton
    asked = []
    how, backward = operator._differentiation, operator.backward
    monkeypatch.setattr(how, "backward_operator", lambda *args: (asked.append(args), backward(*args))[1])

    def step(most: int) -> tuple[Tensor, Tensor, Tensor]:
        monkeypatch.setattr(launch, "_FEW_TOGETHER", most)
        operator.forget()
        leaf = logits.clone().requires_grad_()
        loss = FORMS[form](leaf, labels, soft)
        (gradient,) = torch.autograd.grad(-1.75 * loss.sum(), leaf, retain_graph=True)
        (again,) = torch.autograd.grad(3 * loss.sum(), leaf)
        return loss.detach(), gradient, again

    expected = step(0)
    assert len(asked) == 2
    actual = step(1 << 19)
    assert len(asked) == 2  # the operator was not needed again
    assert torch.equal(actual[0], expected[0])
    for left, right in zip(actual[1:], expected[1:], strict=True):
        assert left.stride() == right.stride()
        # The incoming gradient is multiplied with later: two roundings more.
        assert torch.allclose(left, right, rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("loss", OPERATORS)
def test_it_cannot_be_differentiated(loss, device):
    logits = torch.randn(4, 3, device=device, requires_grad=True)
    value = FORMS[f"{loss}-mean" if loss == "gaussian" else f"{loss}-labels"](
        logits, torch.tensor([0, 1, 2, 3], device=device), torch.ones(4, 3, device=device)
    )
    (gradient,) = torch.autograd.grad(value, logits, create_graph=True)
    with pytest.raises(RuntimeError, match=f"saccade::{loss}_focal_loss cannot be differentiated twice"):
        gradient.sum().backward()


@pytest.mark.parametrize("loss", OPERATORS)
def test_it_is_prepared_once_for_each_shape(loss, device, monkeypatch):
    """Of more shapes than there are known calls, as batches of changing widths have."""
    operator = OPERATORS[loss]
    operator.forget()
    prepared = []
    launch = pytest.importorskip(f"saccade.losses.{loss.replace('sigmoid', 'focal')}.launch")
    prepare = f"prepare_{loss}_focal_loss_with_gradient"
    of_launch = getattr(launch, prepare)
    monkeypatch.setattr(launch, prepare, counted := lambda *args: (prepared.append(args), of_launch(*args))[1])
    assert getattr(launch, prepare) is counted
    for _ in range(3):
        for rows in range(1, 13):
            logits = torch.zeros(rows, 2, device=device, requires_grad=True)
            labels = torch.zeros(rows, dtype=torch.int64, device=device)
            FORMS[f"{loss}-mean" if loss == "gaussian" else f"{loss}-labels"](logits, labels, torch.ones_like(logits))
    assert len(prepared) == 12
    operator.forget()
