"""Calls past the dispatcher: taken for ordinary GPU tensors, and for nothing else.

The decision looks at the keys of tensors. With those of a CPU in place of a GPU's, all of it is tested on any machine.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from saccade import debug_checks, deformable_aggregation, feature_maps_format
from saccade.gaussian_heatmap import draw_heatmap, draw_heatmap_batched, heatmap_targets
from saccade.gaussian_heatmap.api import DRAW_HEATMAP
from saccade.losses.focal import api, sigmoid_focal_loss
from saccade.losses.focal.api import SIGMOID_FOCAL_LOSS, SOFTMAX_FOCAL_LOSS
from saccade.losses.gaussian import gaussian_focal_loss_with_logits
from saccade.losses.gaussian.api import GAUSSIAN_FOCAL_LOSS
from saccade.losses.reduction import Reduction
from saccade.operator import known_calls, torch_internals
from saccade.operator.declaration import OPERATORS, Operator
from saccade.operator.schema import Schema
from saccade.ragged import RaggedBatch, batched_indexing_access

pytestmark = pytest.mark.interpreted  # where kernels are launched, few logits take a way of their own

OF_CPU_TENSORS = torch_internals._raw_keys("CPU", "ADInplaceOrView", "AutogradCPU", "AutocastCPU")


@pytest.fixture
def as_gpu(monkeypatch) -> Iterator[None]:
    """A machine whose CPU counts as a GPU, on which no call was made."""
    monkeypatch.setattr(torch_internals, "ORDINARY_GPU_KEYS", OF_CPU_TENSORS)
    for operator in OPERATORS.values():
        operator.forget()
    yield
    for operator in OPERATORS.values():  # which would be called with tensors of a CPU that is none of a GPU's
        operator.forget()


@pytest.fixture(params=["new", "known"])
def dispatched(request, as_gpu, monkeypatch) -> list[str]:
    """Names of the operators that the dispatcher was asked for; calls were made, and are known, or are new."""
    if request.param == "known":
        step(*inputs())
        sigmoid_focal_loss(*inputs())
        draw(torch.zeros(1, 2, 3))
        assert len(SIGMOID_FOCAL_LOSS.known_calls.known) == 2
        assert len(DRAW_HEATMAP.known_calls.known) == 1
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


def draw(heatmap: Tensor, **options) -> None:
    draw_heatmap(heatmap, torch.tensor([[1, 1]]), torch.tensor([0]), torch.tensor([0]), **options)


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
    with pytest.raises(RuntimeError, match=r"^saccade::sigmoid_focal_loss cannot be differentiated twice"):
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
    draw(heatmap)
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


def test_selective_checkpoints_see_the_operator(dispatched):
    """Their modes are of PyTorch's own, which what compares tensors overlooks."""
    _, labels = inputs()
    seen = []

    def policy(context, operator, *args, **kwargs):
        seen.append(str(operator))
        return CheckpointPolicy.PREFER_RECOMPUTE

    def region(x: Tensor) -> Tensor:
        return sigmoid_focal_loss(2 * x, labels)

    logits = [inputs()[0].requires_grad_() for _ in range(2)]
    region(logits[0]).backward()
    contexts = partial(create_selective_checkpoint_contexts, policy)
    loss = checkpoint(region, logits[1], use_reentrant=False, context_fn=contexts)
    region(logits[0].detach().requires_grad_()).backward()
    loss.backward()
    assert "saccade.sigmoid_focal_loss.default" in seen
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
    with torch_internals.below_autograd():
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


def test_calls_can_be_told_apart():
    """Or none is ever known, and nothing but the time tells."""
    assert torch_internals.tensor_guards() is not None


def test_nothing_is_known_if_calls_cannot_be_told_apart(as_gpu, monkeypatch):
    monkeypatch.setattr(known_calls, "tensor_guards", lambda: None)
    assert_right(step(*inputs()))
    assert SIGMOID_FOCAL_LOSS.known_calls.known == []


def test_what_is_known_is_not_checked_again(as_gpu, monkeypatch):
    assert_right(step(*inputs()))
    monkeypatch.setattr(api, "_require_logits", None)
    assert_right(step(*inputs()))


LOGITS, LABELS = inputs()
OTHERS = {
    "shape": ((LOGITS[:2], LABELS[:2]), {}),
    "strides": ((LOGITS.t().contiguous().t(), LABELS), {}),
    "dtype of logits": ((LOGITS.double(), LABELS), {}),
    "dtype of labels": ((LOGITS, LABELS.int()), {}),
    "dense target": ((LOGITS, LOGITS.sigmoid()), {}),
    "a number": ((LOGITS, LABELS), {"alpha": 0.75}),
    "reduction": ((LOGITS, LABELS), {"reduction": "none"}),
    "divisor": ((LOGITS, LABELS), {"avg_factor": 7, "gamma": 1.5}),
    "divisor as a tensor": ((LOGITS, LABELS), {"avg_factor": torch.tensor(7.0)}),
    "weight of elements": ((LOGITS, LABELS), {"weight": torch.rand(4, 3)}),
    "class weight": ((LOGITS, LABELS), {"class_weight": torch.tensor([1.0, 2, 3])}),
    "weight of another number": ((LOGITS, LABELS), {"weight": torch.ones(5)}),
    "weight that is no tensor": ((LOGITS, LABELS), {"weight": [1.0, 2, 3, 4]}),
    "logits that are no tensor": (([[1.0]], LABELS), {}),
    "labels that are none": ((LOGITS, None), {}),
    "bool in place of a number": ((LOGITS, LABELS), {"gamma": True}),
    "divisor that is not finite": ((LOGITS, LABELS), {"avg_factor": float("nan")}),
    "weight that needs a gradient": ((LOGITS, LABELS), {"weight": torch.ones(4, requires_grad=True)}),
    "constant that needs one": ((LOGITS, LABELS), {"class_weight": torch.ones(3, requires_grad=True)}),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_calls_are_told_apart_from_known_ones(other, as_gpu):
    args, options = OTHERS[other]

    def outcome() -> Tensor | str:
        try:
            return sigmoid_focal_loss(*args, **options)
        except (TypeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"

    expected = outcome()
    SIGMOID_FOCAL_LOSS.known_calls.known = []
    for more in {}, {"avg_factor": 3.0}, {"weight": torch.ones(4)}, {"gamma": 1.0}:
        sigmoid_focal_loss(LOGITS, LABELS, **more)
    kept = [replace(known, call=wrong_call) for known in SIGMOID_FOCAL_LOSS.known_calls.known]
    assert len(kept) == 4
    SIGMOID_FOCAL_LOSS.known_calls.known = kept
    for _ in range(2):
        actual = outcome()
        assert actual == expected if isinstance(expected, str) else torch.equal(actual, expected)


def wrong_call(*_) -> None:
    raise AssertionError("taken for a known call")


def test_other_values_are_no_other_call(as_gpu):
    sigmoid_focal_loss(LOGITS, LABELS, avg_factor=3.0)
    (known,) = SIGMOID_FOCAL_LOSS.known_calls.known
    SIGMOID_FOCAL_LOSS.known_calls.known = [replace(known, call=wrong_call)]
    with pytest.raises(AssertionError, match="known call"):
        sigmoid_focal_loss(LOGITS - 1, LABELS - 1, avg_factor=8.5)


OTHERS_ON_MAPS = {
    "no weight": {},
    "weight": {"weight": torch.rand(4, 3)},
    "divisor": {"avg_factor": 3.0},
    "divisor as a tensor": {"avg_factor": torch.tensor(3.0)},
    "positives": {"avg_factor": "num_pos"},
    "bounds": {"clip": 0.4},
    "power": {"gamma": 2.0},
    "weight of positives": {"pos_weight": 2.0},
    "sum": {"reduction": "sum"},
    "weight of another shape": {"weight": torch.ones(4, 2)},
    "bounds that are none": {"clip": 0.5},
    "divisor that is none": {"avg_factor": "positives"},
}


@pytest.mark.parametrize("other", OTHERS_ON_MAPS)
def test_other_gaussian_losses_are_told_apart_from_known_ones(other, as_gpu):
    target = torch.tensor([1.0, 0.5, 0.0]).expand(4, 3)

    def outcome(options) -> list[Tensor] | str:
        leaf = LOGITS.clone().requires_grad_()
        try:
            loss = gaussian_focal_loss_with_logits(leaf, target, **options)
        except (TypeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        return [loss.detach(), *torch.autograd.grad(loss.sum(), leaf)]

    calls = GAUSSIAN_FOCAL_LOSS.known_calls
    calls.forget()
    expected = outcome(OTHERS_ON_MAPS[other])
    calls.forget()
    others = [options for name, options in OTHERS_ON_MAPS.items() if name != other]
    for _ in range(2):
        for options in others[:6]:
            outcome(options)
    assert len(calls.known) == 6
    for _ in range(2):
        actual = outcome(OTHERS_ON_MAPS[other])
        assert actual == expected if isinstance(expected, str) else all(map(torch.equal, actual, expected))


def test_maps_are_told_apart_from_known_ones(as_gpu):
    for maps in (torch.zeros(1, 2, 3), torch.ones(1, 2, 3)):
        draw(maps)
        draw(maps, clear=True)
    assert maps.sum() == 1
    with pytest.raises(ValueError, match="require grad"), torch.no_grad():
        draw(torch.zeros(1, 2, 3, requires_grad=True))
    with pytest.raises(TypeError, match="k_scale: expected a number, got bool"):
        draw(maps, k_scale=True)
    draw(maps, k_scale=np.float32(0.5))  # converted, so nothing is kept that computes with it
    assert all(type(number) in (float, bool) for known in DRAW_HEATMAP.known_calls.known for number in known.values)


def test_maps_with_and_without_labels_are_told_apart(as_gpu):
    args = torch.tensor([[[1, 1]]]), torch.tensor([[0]])
    for _ in range(2):
        one, of_classes = torch.zeros(1, 2, 3), torch.zeros(1, 2, 2, 3)
        draw_heatmap_batched(one, *args, counts=torch.tensor([1]))
        draw_heatmap_batched(of_classes, *args, labels=torch.tensor([[1]]), counts=torch.tensor([1]))
        assert one.sum() == of_classes[0, 1].sum() == 1
        for labels, classes in (None, None), (torch.tensor([[1]]), 2):
            assert heatmap_targets(*args, (2, 3), labels=labels, num_classes=classes, counts=args[1][0] + 1).sum() == 1


def test_targets_of_other_sizes_are_told_apart(as_gpu):
    centers, radii = torch.tensor([[[1, 1]]]), torch.tensor([[0]])
    for size in ((2, 3), (3, 2), (2, 3)):
        assert heatmap_targets(centers, radii, size, counts=torch.tensor([1])).shape == (1, *size)
    with pytest.raises(TypeError, match="size"):
        heatmap_targets(centers, radii, (2, 3.0), counts=torch.tensor([1]))


def test_fillers_are_told_apart(as_gpu, monkeypatch):
    data = torch.zeros(1, 2)
    indices = RaggedBatch(torch.tensor([[1, 0]]), sample_sizes=torch.tensor([1]))
    for filler in (0.0, -0.0, 0, 1, 1.0, True, 1.00001, torch.tensor(1.00001), torch.tensor(1.00002)):
        for _ in range(2):
            result = batched_indexing_access(data, indices, filler).tensor
            assert torch.equal(result[0, 1], torch.as_tensor(filler, dtype=torch.float32))
            assert torch.signbit(result[0, 1]) == torch.signbit(torch.as_tensor(filler, dtype=torch.float32))


def test_debug_checks_look_at_values_of_known_calls(as_gpu, monkeypatch):
    maps = torch.zeros(1, 2, 3)
    far = torch.tensor([5])
    draw(maps)
    draw_heatmap(maps, torch.tensor([[1, 1]]), far - 5, far)  # known, and nothing is drawn
    with debug_checks(True), pytest.raises(ValueError, match="heatmap_idxes"):
        draw_heatmap(maps, torch.tensor([[1, 1]]), far - 5, far)


def test_few_of_many_different_calls_are_kept(as_gpu):
    def loss(rows: int) -> Tensor:
        return sigmoid_focal_loss(torch.full((rows, 3), 0.5), torch.zeros(rows, dtype=torch.int64), reduction="sum")

    of_a_row = loss(1)
    loss(1)
    calls = SIGMOID_FOCAL_LOSS.known_calls
    for rows in range(2, 300):
        torch.testing.assert_close(loss(rows), rows * of_a_row)
        assert len(calls.known) <= known_calls._MOST_KNOWN
        if rows % 3 == 0:
            loss(1)  # comes again and again
    learnt = calls.known
    loss(300)
    assert calls.known is learnt  # too many that did not come again
    assert sum(known.is_used for known in learnt) == 1
    assert_right(step(*inputs()))


def test_a_list_is_not_taken_for_the_tensor_in_it(as_gpu):
    """Nor rows for the list of them: what is wrong raises, whatever was called before."""
    maps = torch.rand(1, 1, 2, 3, 3).permute(0, 1, 4, 2, 3)
    rows, shape, start = feature_maps_format([maps])
    points = torch.rand(1, 2, 1, 1, 2), torch.rand(1, 2, 1, 1, 1, 1)
    for _ in range(2):
        of_list = deformable_aggregation([maps], None, None, *points)
        assert torch.allclose(of_list, deformable_aggregation(rows, shape, start, *points))
    with pytest.raises(TypeError, match="spatial_shape"):
        deformable_aggregation(maps, None, None, *points)
    with pytest.raises(ValueError, match="spatial_shape: expected None with a list of maps"):
        deformable_aggregation([rows], shape, start, *points)


def test_a_tensor_that_is_two_arguments_takes_no_place(as_gpu):
    maps, zero = torch.zeros(1, 2, 3), torch.tensor([0])
    draw(maps)
    kept = DRAW_HEATMAP.known_calls.known
    draw_heatmap(maps, torch.tensor([[1, 1]]), zero, zero)
    draw_heatmap(maps, torch.tensor([[1, 1]]), zero, zero)
    assert DRAW_HEATMAP.known_calls.known is kept
    assert maps.sum() == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": np.array([0.25, 0.5])}, "alpha: expected a number, got ndarray"),
        ({"gamma": torch.ones(2)}, "gamma: expected a number, got Tensor"),
    ],
)
def test_a_wrong_argument_is_named_as_before(options, message, as_gpu):
    sigmoid_focal_loss(LOGITS, LABELS)
    with pytest.raises((TypeError, ValueError), match=message):
        sigmoid_focal_loss(LOGITS, LABELS, **options)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_ordinary_tensors_of_a_gpu_are_known():
    """Or the shorter way is not taken, and nothing but the time tells."""
    rest = None, 0.25, 2.0, Reduction("mean")
    logits, labels = (value.cuda() for value in inputs())
    assert SOFTMAX_FOCAL_LOSS._direct((logits, labels, *rest)) is not None
    assert SOFTMAX_FOCAL_LOSS._direct((logits, labels.cpu(), *rest)) is None


class ToyOptions(NamedTuple):
    factor: float
    name: str
    flag: bool
    bound: float | None
    pair: tuple[float, float]


@cache
def toy() -> Operator:
    """An operator with an argument of every type, declared as those of the library are."""
    operator = Operator(
        "toy(Tensor data, Tensor? weight, Tensor[] maps, int number, Scalar filler, int[] sizes, float varied) "
        "-> Tensor",
        varying=("varied",),
        reference=lambda data, *_: data.clone(),
        fake=lambda data, **_: torch.empty_like(data),
    )
    return OPERATORS.pop(operator.name)


@cache
def toy_with_options() -> Operator:
    operator = Operator(
        "toy_with_options(Tensor data, ToyOptions options) -> Tensor",
        groups=(ToyOptions,),
        reference=lambda data, options: data * options.factor,
        fake=lambda data, **_: torch.empty_like(data),
    )
    return OPERATORS.pop(operator.name)


def test_every_argument_of_a_schema_is_part_of_the_key(as_gpu):
    """But for those that are declared to vary: an option that is added to a schema cannot be left out."""
    one, more = torch.zeros(2), torch.zeros(2, 2)
    usual = {"data": one, "weight": None, "maps": [one + 1, one + 2], "number": 1, "filler": 0.0, "sizes": [1, 2]}
    changed = {
        "data": [more, one.double(), one.clone().requires_grad_(), torch.nn.Parameter(one)],
        "weight": [one + 3],
        "maps": [[one + 1], [one + 1, more], [one + 1, one + 2, one + 3]],
        "number": [2, True],
        "filler": [-0.0, 0, False, 1.0],
        "sizes": [[2, 1], [1], [1, 2.0], (1, 2)],
    }
    operator = toy()
    operator.forget()
    assert {*changed, "varied"} == {*operator.schema.flat_names}
    operator(*usual.values(), 0.5)
    assert operator.known_calls.find((*usual.values(), 0.75)) is not None
    for name, values in changed.items():
        for value in values:
            assert operator.known_calls.find((*(usual | {name: value}).values(), 0.5)) is None, (name, value)
    with torch.no_grad():
        assert operator.known_calls.find((*usual.values(), 0.5)) is None


def test_every_field_of_a_group_is_part_of_the_key(as_gpu):
    data, usual = torch.ones(2), ToyOptions(2.0, "a", False, None, (1.0, 0.0))
    changed = {
        "factor": [3.0, 2],
        "name": ["b"],
        "flag": [True, 0],
        "bound": [0.5],
        "pair": [(1.0, -0.0), (1, 0.0), (0.0, 1.0)],
    }
    operator = toy_with_options()
    operator.forget()
    assert {"data", *changed} == {*operator.schema.flat_names}
    assert torch.equal(operator(data, usual), data * 2)
    assert operator.known_calls.find((data, usual)) is not None
    for name, values in changed.items():
        for value in values:
            assert operator.known_calls.find((data, usual._replace(**{name: value}))) is None, (name, value)


def test_groups_and_lists_are_put_together_again():
    schema = toy_with_options().schema
    args = torch.ones(2), ToyOptions(2.0, "a", False, None, (1.0, 0.0))
    assert schema.definition == (
        "toy_with_options(Tensor data, float factor, str name, bool flag, float? bound, float[] pair) -> Tensor"
    )
    assert schema.flat(args) == (args[0], 2.0, "a", False, None, (1.0, 0.0))
    assert schema.grouped(schema.flat(args)) == args
    schema = toy().schema
    args = args[0], None, [args[0], args[0]], 1, 0.0, [1, 2], 0.5
    leaves = schema.leaves(args)
    assert len(leaves) == 8
    of_leaves = schema.of_leaves(8)
    assert of_leaves.names == ["data", "weight", "maps", "maps", "number", "filler", "sizes", "varied"]
    assert of_leaves.tensors_at == [0, 1, 2, 3]
    assert of_leaves.together((*of_leaves.tensors(leaves), *of_leaves.rest(leaves))) == leaves
    assert schema.of_call(leaves) == args


def test_a_list_of_tensors_and_a_group_in_one_schema_are_refused():
    """Wherever the list stands: what is taken apart could not be put together again."""
    for text in (
        "toy(Tensor[] maps, ToyOptions options) -> Tensor",
        "toy(ToyOptions options, Tensor[] maps) -> Tensor",
    ):
        with pytest.raises(AssertionError, match="a list of tensors and groups"):
            Schema(text, (ToyOptions,))
