"""Calls past the dispatcher: taken for ordinary GPU tensors, and for nothing else.

The decision looks at the keys of tensors. With those of a CPU in place of a GPU's, all of it is tested on any machine.
"""

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from saccade import registration
from saccade.focal_loss import api, sigmoid_focal_loss
from saccade.gaussian_heatmap import draw_heatmap

OF_CPU_TENSORS = registration._keys("CPU", "ADInplaceOrView", "AutogradCPU", "AutocastCPU")


@pytest.fixture
def dispatched(monkeypatch) -> list[str]:
    """Names of the operators that the dispatcher was asked for, on a machine whose CPU counts as a GPU."""
    monkeypatch.setattr(registration, "_OF_GPU_TENSORS", OF_CPU_TENSORS)
    asked: list[str] = []
    call_operator = torch._ops.OpOverload.__call__

    def record(operator, *args, **kwargs):
        if operator.namespace == "saccade":
            asked.append(operator._schema.name.split("::")[1])
        return call_operator(operator, *args, **kwargs)

    monkeypatch.setattr(torch._ops.OpOverload, "__call__", record)
    return asked


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3])


def expected_step() -> tuple[Tensor, Tensor]:
    """Loss and gradient through the dispatcher."""
    logits, labels = inputs()
    logits.requires_grad_()
    how = ("mean", None, 1.0, 0.0)
    loss = torch.ops.saccade.sigmoid_focal_loss(logits, labels, None, None, 0.25, 2.0, False, *how)
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def step(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.detach().requires_grad_()
    loss = sigmoid_focal_loss(logits, labels)
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def assert_right(actual: tuple[Tensor, Tensor]) -> None:
    for left, right in zip(actual, expected_step(), strict=True):
        assert torch.equal(left, right)


def test_ordinary_tensors_go_past_the_dispatcher(dispatched):
    result = step(*inputs())
    assert dispatched == []
    assert_right(result)


def test_a_parameter_is_ordinary(dispatched):
    logits, labels = inputs()
    sigmoid_focal_loss(torch.nn.Parameter(logits), labels).backward()
    assert dispatched == []


def test_autocast_changes_nothing(dispatched):
    with torch.autocast("cpu", torch.bfloat16):
        result = step(*inputs())
    assert dispatched == []
    assert_right(result)


def test_without_gradients(dispatched):
    logits, labels = inputs()
    with torch.no_grad():
        loss = sigmoid_focal_loss(logits.requires_grad_(), labels)
    assert not loss.requires_grad
    assert dispatched == []


def test_differentiating_twice_raises(dispatched):
    logits, labels = inputs()
    loss = sigmoid_focal_loss(logits.requires_grad_(), labels)
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        gradient.sum().backward()


def test_python_integers_are_numbers(dispatched):
    logits, labels = inputs()
    actual = sigmoid_focal_loss(logits, labels, alpha=0, gamma=2, avg_factor=3)
    expected = sigmoid_focal_loss(logits, labels, alpha=0.0, gamma=2.0, avg_factor=3.0)
    assert torch.equal(actual, expected)


def test_what_is_written_in_place_has_a_new_version(dispatched):
    heatmap = torch.zeros(1, 2, 3)
    scale = torch.ones((), requires_grad=True)
    product = (heatmap * scale).sum()  # saves the heatmap
    zero = torch.tensor([0])
    draw_heatmap(heatmap, torch.tensor([[1, 1]]), zero, zero)
    assert dispatched == []
    assert heatmap.sum() == 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_tangents_are_not_lost(dispatched):
    logits, labels = inputs()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(logits, torch.ones_like(logits))
        with pytest.raises(NotImplementedError, match="jvp"):
            sigmoid_focal_loss(dual, labels)


@pytest.mark.interpreted
@pytest.mark.parametrize("watched", ["forward", "backward"])
def test_checkpoints_are_recomputed_past_the_dispatcher_or_not(watched, dispatched):
    """What is saved is told apart by its position, and must be the same either way."""
    _, labels = inputs()
    logits = [inputs()[0].requires_grad_() for _ in range(2)]

    def region(x: Tensor) -> Tensor:
        return sigmoid_focal_loss(x, labels) + x.sin().sum()

    def profiled(is_watched: bool) -> AbstractContextManager:
        activities = [torch.profiler.ProfilerActivity.CPU]
        return torch.profiler.profile(activities=activities) if is_watched else nullcontext()

    region(logits[0]).backward()
    with profiled(watched == "forward"):
        loss = checkpoint(region, logits[1], use_reentrant=False)
    with profiled(watched == "backward"):
        loss.backward()
    assert torch.equal(logits[0].grad, logits[1].grad)


def test_dispatch_modes_see_the_operator(dispatched):
    seen: list[str] = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Mode():
        sigmoid_focal_loss(*inputs())
    assert "saccade.sigmoid_focal_loss.default" in seen


def test_function_modes_see_the_operator(dispatched):
    seen: list[str] = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Mode():
        sigmoid_focal_loss(*inputs())
    assert "saccade.sigmoid_focal_loss.default" in seen


@pytest.mark.parametrize("position", [0, 1])
def test_subclasses_are_asked(position, dispatched):
    seen: list[str] = []

    class Sub(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return super().__torch_function__(func, types, args, kwargs or {})

    values = list(inputs())
    values[position] = values[position].as_subclass(Sub)
    assert isinstance(sigmoid_focal_loss(*values), Sub)
    assert "saccade.sigmoid_focal_loss.default" in seen


def test_below_autograd_nothing_is_recorded(dispatched):
    logits, labels = inputs()
    with registration.below_autograd():
        assert not sigmoid_focal_loss(logits.requires_grad_(), labels).requires_grad
    assert dispatched


def test_profilers_see_the_operator(dispatched):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        sigmoid_focal_loss(*inputs())
    assert "saccade::sigmoid_focal_loss" in {event.key for event in profiled.key_averages()}


def test_lazily_negated_and_inference_tensors_are_not_ordinary(dispatched):
    logits, labels = inputs()
    expected, _ = expected_step()
    negated = torch.complex(torch.zeros_like(logits), -logits).conj().imag
    assert negated.is_neg()
    torch.testing.assert_close(sigmoid_focal_loss(negated, labels), expected)
    assert dispatched
    dispatched.clear()
    with torch.inference_mode():
        torch.testing.assert_close(sigmoid_focal_loss(*inputs()), expected)
    assert dispatched


def test_compiled_and_faked(dispatched):
    compiled = torch.compile(step, backend="aot_eager", fullgraph=False)
    for left, right in zip(compiled(*inputs()), expected_step(), strict=True):
        torch.testing.assert_close(left, right)
    with torch._subclasses.FakeTensorMode() as mode:
        faked = [mode.from_tensor(value) for value in inputs()]
        assert sigmoid_focal_loss(*faked).shape == ()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_ordinary_tensors_of_a_gpu_are_known():
    """Or the shorter way is not taken, and nothing but the time tells."""
    call = api._call_softmax  # takes logits, labels, maybe class weights
    numbers = (0.25, 2.0, "mean", None, 1.0, 0.0)
    logits, labels = (value.cuda() for value in inputs())
    assert call._can_be_direct((logits, labels, None, *numbers))
    assert not call._can_be_direct((logits, labels.cpu(), None, *numbers))
