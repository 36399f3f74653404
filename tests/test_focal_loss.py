"""``sigmoid_focal_loss`` and ``softmax_focal_loss``: the spec's numbers, limits, backgrounds, errors."""

import math

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cases.focal_loss import EPS, sigmoid_oracle, softmax_oracle
from saccade.losses.focal import sigmoid_focal_loss, softmax_focal_loss

X = [[2.0, -1.0, 0.5], [-3.0, 0.0, 1.0], [0.25, -0.75, 4.0]]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def logits_(values, device, dtype=torch.float64) -> Tensor:
    return torch.tensor(values, device=device, dtype=dtype).requires_grad_()


def gradient(loss: Tensor, *inputs: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), inputs)[0]


def close(actual: Tensor, expected, atol=1e-8, rtol=1e-6) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype, device=actual.device)
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)


# ---- values


def test_one_logit_by_hand(device):
    """At x = 0: p = 1/2, loss = alpha / 4 * log 2, slope = -alpha / 4 * (1/2 + log 2) for a positive."""
    x = logits_([[0.0, 0.0]], device)
    loss = sigmoid_focal_loss(x, torch.tensor([0], device=device), reduction="none")
    close(loss, [[0.25 / 4 * math.log(2), 0.75 / 4 * math.log(2)]], atol=0, rtol=1e-14)
    slope = 0.25 * (0.5 + math.log(2))
    close(gradient(loss, x), [[-0.25 * slope, 0.75 * slope]], atol=0, rtol=1e-14)


def test_one_row_of_softmax_by_hand(device):
    """Two equal logits: p = 1/2, loss = alpha / 4 * log 2, and the slope is shared out as +-alpha / 4 (1/2 + log 2)."""
    x = logits_([[7.0, 7.0]], device)
    loss = softmax_focal_loss(x, torch.tensor([1], device=device), reduction="none")
    close(loss, [0.25 / 4 * math.log(2)], atol=0, rtol=1e-14)
    slope = 0.25 / 4 * (0.5 + math.log(2))
    close(gradient(loss, x), [[slope, -slope]], atol=0, rtol=1e-14)


def test_known_values_of_sigmoid(device):
    x, labels = logits_(X, device), torch.tensor([0, 3, 2], device=device)
    elements = [
        [0.00045089, 0.01699354, 0.28305870],
        [0.00008196, 0.12996510, 0.52640123],
        [0.19577392, 0.02986440, 0.00000147],
    ]
    slopes = [
        [-0.00121774, 0.03943585, 0.39461387],
        [0.00023615, 0.22371510, 0.57617604],
        [0.30468256, 0.06533225, -0.00000434],
    ]
    close(sigmoid_focal_loss(x, labels, reduction="none"), elements, atol=5e-9)
    close(sigmoid_focal_loss(x, labels, reduction="sum"), 1.1825912104, atol=5e-11, rtol=0)
    close(sigmoid_focal_loss(x, labels), 0.1313990234, atol=5e-11, rtol=0)
    close(gradient(sigmoid_focal_loss(x, labels, reduction="sum"), x), slopes, atol=5e-9)
    weighted = sigmoid_focal_loss(
        x,
        torch.tensor([0, 1, 2], device=device),
        class_weight=torch.tensor([0.5, 2, 1.5], device=device),
        reduction="sum",
    )
    close(weighted, 1.6283210292, atol=5e-11, rtol=0)


def test_known_values_of_softmax(device):
    x, labels = logits_(X, device), torch.tensor([0, 1, 2], device=device)
    close(softmax_focal_loss(x, labels, reduction="none"), [0.0027731875, 0.1789715058, 0.0000076891], atol=5e-11)
    close(softmax_focal_loss(x, labels), 0.0605841275, atol=5e-11, rtol=0)
    slopes = gradient(softmax_focal_loss(x, labels, reduction="sum"), x)
    close(slopes[1], [0.00349118, -0.19410300, 0.19061183], atol=5e-9)


def test_background_is_every_label_that_is_no_class(device):
    x = logits_(X, device)
    background = sigmoid_focal_loss(x, torch.zeros(3, 3, device=device), reduction="none")
    for label in (3, 4, 1000, -1, -3, 2**40, -(2**40)):
        labels = torch.full((3,), label, device=device)
        loss = sigmoid_focal_loss(x, labels, reduction="none", class_weight=torch.full((3,), 9.0, device=device))
        close(loss, background, rtol=1e-12)
        loss = softmax_focal_loss(x, labels, reduction="none")
        assert (loss == 0).all()
        assert (gradient(loss, x) == 0).all()
    loss = softmax_focal_loss(logits_([[math.nan, math.inf], [0.0, 1.0]], device), torch.tensor([2, -1], device=device))
    assert loss == 0


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.5, 2.0, 5.0])
@pytest.mark.parametrize("dtype", FLOATS)
def test_extreme_logits_have_finite_gradients(dtype, gamma, device):
    largest = 6e4 if dtype == torch.float16 else 1e4
    x = [[value, -value] for value in (largest, 1e3, 100.0, 88.8, 17.0, 0.0)]
    x = logits_(x, device, dtype)
    labels = torch.zeros(6, dtype=torch.int64, device=device)
    one_hot = torch.tensor([[1.0, 0.0]], device=device).expand(6, 2)
    for loss, alpha in [
        (sigmoid_focal_loss(x, labels, gamma=gamma, reduction="none"), 0.25),
        (sigmoid_focal_loss(x, labels + 1, gamma=gamma, reduction="none"), 0.25),
        (sigmoid_focal_loss(x, one_hot, gamma=gamma, reduction="none"), 0.25),
        (sigmoid_focal_loss(x, 1 - one_hot, gamma=gamma, reduction="none"), 0.25),
        (sigmoid_focal_loss(x, one_hot * 0.5 + 0.25, gamma=gamma, reduction="none"), 0.25),
        (softmax_focal_loss(x, labels, gamma=gamma, reduction="none"), 0.25),
        (softmax_focal_loss(x, labels + 1, gamma=gamma, alpha=0.125, reduction="none"), 0.125),
    ]:
        assert loss.dtype == dtype
        assert loss.isfinite().all()
        slopes = gradient(loss, x)
        assert slopes.isfinite().all()
        assert slopes.abs().max() <= (gamma + 1) * max(alpha, 1 - alpha)


def test_confidently_wrong_grows_linearly(device):
    """Where a kernel on probabilities saturates: the loss at x is alpha * |x|, and the slope is alpha."""
    for dtype in (torch.float32, torch.float64):
        x = logits_([[-100.0, 100.0], [-1e4, 1e4]], device, dtype)
        loss = sigmoid_focal_loss(x, torch.tensor([0, 0], device=device), reduction="none")
        close(loss, [[25.0, 75.0], [2500.0, 7500.0]])
        close(gradient(loss, x), [[-0.25, 0.75], [-0.25, 0.75]])
        loss = softmax_focal_loss(x, torch.tensor([0, 0], device=device), reduction="none")
        close(loss, [50.0, 5000.0])
        close(gradient(loss, x), [[-0.25, 0.25], [-0.25, 0.25]])


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_infinite_logits_have_their_limits(gamma, device):
    x = logits_([[math.inf, -math.inf], [-math.inf, math.inf], [math.nan, 0.0]], device, torch.float32)
    labels = torch.tensor([0, 0, 0], device=device)
    for target in (labels, torch.tensor([[1.0, 0.0]], device=device).expand(3, 2)):
        loss = sigmoid_focal_loss(x, target, gamma=gamma, reduction="none")
        assert loss[:2].tolist() == [[0, 0], [math.inf, math.inf]]
        assert loss[2].isnan().tolist() == [True, False]
        slopes = gradient(loss, x)
        assert slopes[:2].tolist() == [[0, 0], [-0.25, 0.75]]
        assert slopes[2].isnan().tolist() == [True, False]
    loss = softmax_focal_loss(x, labels, gamma=gamma, reduction="none")
    assert loss[:2].tolist() == [0, math.inf]
    assert loss[2].isnan()
    slopes = gradient(loss, x)
    assert slopes[:2].tolist() == [[0, 0], [-0.25, 0.25]]
    assert slopes[2].isnan().all()


def test_probabilities_of_zero_and_one(device):
    """Logarithms are clamped at -100, and x * (1 - x) in the slope at 1e-12."""
    p = logits_([[0.0, 1.0], [1.0, 0.0]], device, torch.float32)
    loss = sigmoid_focal_loss(p, torch.tensor([0, 0], device=device), activated=True, reduction="none")
    close(loss, [[25.0, 75.0], [0.0, 0.0]])
    for gamma in (0.5, 1.0, 2.0):
        loss = sigmoid_focal_loss(p, torch.tensor([0, 0], device=device), gamma=gamma, activated=True)
        assert gradient(loss, p).isfinite().all()


# ---- dtypes, shapes, reductions


@pytest.mark.parametrize("dtype", FLOATS)
def test_result_dtypes(dtype, device):
    x, labels = logits_(X, device, dtype), torch.tensor([0, 3, 2], device=device)
    for function in (sigmoid_focal_loss, softmax_focal_loss):
        assert function(x, labels, reduction="none").dtype == dtype
        for loss in (
            function(x, labels),
            function(x, labels, reduction="sum"),
            function(x, labels, avg_factor=torch.tensor(2, device=device)),
        ):
            assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert gradient(loss, x).dtype == dtype


def test_a_sum_that_overflows_half(device):
    x = torch.full((70_000, 1), 4.0, device=device, dtype=torch.float16)
    loss = sigmoid_focal_loss(x, torch.ones(70_000, dtype=torch.int32, device=device), reduction="sum", alpha=-1)
    p = 1 / (1 + math.exp(-4))
    close(loss, 70_000 * p**2 * -math.log(1 - p), rtol=1e-5)  # 271 thousand


def test_avg_factor(device):
    x, labels = logits_(X, device), torch.tensor([0, 1, 2], device=device)
    for function in (sigmoid_focal_loss, softmax_focal_loss):
        total = function(x, labels, reduction="sum")
        slopes = gradient(total, x)
        for factor, shape in [
            (4, ()),
            (4.0, ()),
            (torch.tensor(4, device=device), ()),
            (torch.tensor([4.0], device=device), (1,)),
            (torch.tensor([[4.0]], device=device, dtype=torch.float16), (1, 1)),
        ]:
            loss = function(x, labels, avg_factor=factor)
            assert loss.shape == shape
            close(loss.reshape(()), total / (4 + EPS), atol=0, rtol=1e-12)
            close(gradient(loss, x), slopes / (4 + EPS), atol=0, rtol=1e-12)
        for zero in (0, 0.0, torch.tensor(0, device=device)):
            close(function(x, labels, avg_factor=zero), total / EPS, atol=0, rtol=1e-12)
        unreduced = function(x, labels, reduction="none")
        assert torch.equal(function(x, labels, reduction="none", avg_factor=4), unreduced)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4)])
def test_no_rows(shape, device):
    x = torch.zeros(shape, device=device, requires_grad=True)
    labels = torch.zeros(shape[:-1], dtype=torch.int64, device=device)
    for function in (sigmoid_focal_loss, softmax_focal_loss):
        assert function(x, labels).isnan()
        assert function(x, labels, reduction="sum") == 0
        assert function(x, labels, avg_factor=3) == 0
        assert function(x, labels, avg_factor=torch.zeros(1, device=device)) == 0
        for reduction in ("none", "mean", "sum"):
            loss = function(x, labels, reduction=reduction)
            assert gradient(loss, x).shape == shape


def test_no_classes(device):
    x, labels = torch.zeros(3, 0, device=device), torch.zeros(3, dtype=torch.int64, device=device)
    assert sigmoid_focal_loss(x, labels).isnan()
    assert sigmoid_focal_loss(x, labels, reduction="none").shape == (3, 0)
    assert softmax_focal_loss(x, labels, reduction="none").tolist() == [0, 0, 0]
    assert softmax_focal_loss(x, labels) == 0  # a mean over three rows without a class


def test_weights_are_told_apart_by_their_axes(device):
    """With as many rows as classes a vector is still a weight per row."""
    x, labels = logits_(X, device), torch.tensor([0, 3, 2], device=device)
    elements = sigmoid_focal_loss(x, labels, reduction="none")
    weight = torch.tensor([1.0, 0.0, 3.0], device=device)
    for per_row in (weight, weight[:, None], weight.int(), weight[:, None].expand(3, 3)):
        loss = sigmoid_focal_loss(x, labels, weight=per_row, reduction="none")
        close(loss, elements * weight[:, None])
    loss = sigmoid_focal_loss(x, labels, weight=weight.bool(), reduction="sum")
    close(loss, elements[0].sum() + elements[2].sum())
    per_element = torch.arange(9.0, device=device).view(3, 3)
    close(sigmoid_focal_loss(x, labels, weight=per_element, reduction="none"), elements * per_element)


def test_weight_gradient_is_the_unweighted_loss(device):
    x, labels = logits_(X, device), torch.tensor([0, 3, 2], device=device)
    elements = sigmoid_focal_loss(x, labels, reduction="none").detach()
    for shape, expected in [((3,), elements.sum(1)), ((3, 1), elements.sum(1, keepdim=True)), ((3, 3), elements)]:
        weight = torch.zeros(shape, device=device, requires_grad=True)
        loss = sigmoid_focal_loss(x.detach(), labels, weight=weight, reduction="sum")
        close(gradient(loss, weight), expected.float())


def test_many_blocks_of_rows(device):
    """More elements than one block holds, with a ragged last one."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(3001, 80, generator=rng).to(device).requires_grad_()
    labels = torch.randint(-1, 82, (3001,), generator=rng).to(device)
    weight = torch.rand(3001, generator=rng).to(device).requires_grad_()
    loss = sigmoid_focal_loss(x, labels, weight=weight, reduction="sum")
    x64, weight64 = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected = sigmoid_oracle(x64, labels, weight64, reduction="sum")
    close(loss.double(), expected, rtol=1e-6)
    for actual, wanted in zip(
        torch.autograd.grad(loss, (x, weight)), torch.autograd.grad(expected, (x64, weight64)), strict=True
    ):
        close(actual, wanted, atol=1e-6, rtol=1e-5)
    soft = softmax_focal_loss(x, labels, reduction="none")
    inside = ((labels >= 0) & (labels < 80)).cpu()
    log_p = torch.log_softmax(x.detach().double(), -1).gather(1, labels.clamp(0, 79)[:, None])[:, 0]
    close(soft.cpu(), torch.where(inside, (-0.25 * (1 - log_p.exp()) ** 2 * log_p).cpu(), 0), atol=1e-6, rtol=1e-5)


# ---- against autograd of the textbook formulas


@given(data=st.data())
def test_sigmoid_against_autograd(data):
    draw = data.draw
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    x = torch.randn(shape, generator=rng, dtype=torch.float64) * draw(st.sampled_from([0.1, 3.0, 12.0]))
    kind = draw(st.sampled_from(["labels", "bool", "soft", "hard"]))
    if kind == "labels":
        target = torch.randint(-2, shape[-1] + 2, shape[:-1], generator=rng)
    else:
        target = torch.rand(shape, generator=rng, dtype=torch.float64)
        target = target if kind == "soft" else target > 0.5 if kind == "bool" else (target > 0.5).double()
    weight = draw(st.sampled_from([None, shape[:-1], (*shape[:-1], 1), shape]))
    weight = None if weight is None else torch.rand(weight, generator=rng, dtype=torch.float64).requires_grad_()
    options = {
        "alpha": draw(st.sampled_from([-1.0, 0.0, 0.25, 1.0])),
        "gamma": draw(st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 5.0])),
        "reduction": draw(st.sampled_from(["none", "mean", "sum"])),
        "activated": draw(st.booleans()),
    }
    if options["activated"]:
        x = x.sigmoid().clamp(1e-4, 1 - 1e-4)
    if draw(st.booleans()):
        x = x.mT.contiguous().mT if x.dim() > 1 else torch.stack([x, x], -1)[:, 0]
    x.requires_grad_()
    inputs = (x,) if weight is None else (x, weight)
    loss = sigmoid_focal_loss(x, target, weight=weight, **options)
    expected = sigmoid_oracle(x, target, weight, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    for actual, wanted in zip(
        torch.autograd.grad(loss.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-12)


@given(data=st.data())
def test_softmax_against_autograd(data):
    draw = data.draw
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    x = torch.randn(shape, generator=rng, dtype=torch.float64) * draw(st.sampled_from([0.1, 3.0]))
    x = x.mT.contiguous().mT if x.dim() > 1 and draw(st.booleans()) else x
    x.requires_grad_()
    target = torch.randint(-2, shape[-1] + 2, shape[:-1], generator=rng)
    class_weight = torch.rand(shape[-1], generator=rng, dtype=torch.float64) if draw(st.booleans()) else None
    options = {
        "alpha": draw(st.sampled_from([0.0, 0.25, 1.0])),
        "gamma": draw(st.sampled_from([0.0, 1.0, 1.5, 2.0, 5.0])),
        "reduction": draw(st.sampled_from(["none", "mean", "sum"])),
    }
    loss = softmax_focal_loss(x, target, class_weight=class_weight, **options)
    expected = softmax_oracle(x, target, class_weight, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    if expected.requires_grad:
        torch.testing.assert_close(gradient(loss, x), torch.nan_to_num(gradient(expected, x)), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_gradcheck(gamma, device):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, generator=rng, dtype=torch.float64).to(device).requires_grad_()
    weight = torch.rand(4, generator=rng, dtype=torch.float64).to(device).requires_grad_()
    soft = torch.rand(4, 3, generator=rng, dtype=torch.float64).to(device)
    labels = torch.tensor([0, 2, 3, -1], device=device)
    for target in (labels, soft, soft > 0.5):
        for activated in (False, True):
            assert torch.autograd.gradcheck(
                lambda x, weight, target=target, activated=activated: sigmoid_focal_loss(
                    x.sigmoid() if activated else x, target, weight=weight, gamma=gamma, activated=activated
                ),
                (x, weight),
            )
    assert torch.autograd.gradcheck(lambda x: softmax_focal_loss(x, labels, gamma=gamma, reduction="none"), (x,))


def test_a_new_avg_factor_is_not_compiled_anew(device):
    torch._dynamo.reset()
    backend = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    x, labels = logits_(X, device, torch.float32), torch.tensor([0, 3, 2], device=device)

    def loss(factor):
        return sigmoid_focal_loss(x, labels, avg_factor=factor)

    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    for factor in (1.5, 2.5, 3.5, 4.5):
        close(compiled(factor), loss(factor))
    assert backend.frame_count <= 2  # once for the first number, once for any number


def test_autocast_leaves_logits_alone(device):
    x, labels = logits_(X, device, torch.float32), torch.tensor([0, 1, 2], device=device)
    for function in (sigmoid_focal_loss, softmax_focal_loss):
        expected = function(x, labels, reduction="none")
        with torch.autocast(device, dtype=torch.bfloat16):
            assert torch.equal(function(x, labels, reduction="none"), expected)


# ---- errors

ROW = torch.zeros(4, 3)
LABELS = torch.zeros(4, dtype=torch.int64)
ASKS_FOR_GRADIENT = "expected a tensor that does not require grad"


@pytest.mark.parametrize("function", [sigmoid_focal_loss, softmax_focal_loss])
@pytest.mark.parametrize(
    ("error", "message", "logits", "target", "options"),
    [
        (TypeError, "logits: expected a torch.Tensor, got list", [[0.0]], LABELS, {}),
        (TypeError, "logits: expected float16.*got torch.int64", ROW.long(), LABELS, {}),
        (TypeError, "target: expected a torch.Tensor, got list", ROW, [0, 1, 2, 3], {}),
        (TypeError, "target: expected int32 or int64.*got torch.float32", ROW, LABELS.float(), {}),
        (TypeError, "target: expected int32 or int64.*got torch.bool", ROW, LABELS.bool(), {}),
        (TypeError, "target: expected int32 or int64.*got torch.uint8", ROW, LABELS.byte(), {}),
        (ValueError, r"logits: expected shape \(\.\.\., C\), got \(\)", torch.zeros(()), LABELS, {}),
        (ValueError, r"target: expected one label .*\(4, 3\).*\(4,\), got \(5,\)", ROW, LABELS.new_zeros(5), {}),
        (ValueError, r"target: .*\(2, 4, 3\).*got \(4,\)", ROW.expand(2, 4, 3), LABELS, {}),
        (ValueError, "reduction: expected 'none', 'mean' or 'sum', got 'avg'", ROW, LABELS, {"reduction": "avg"}),
        (ValueError, "avg_factor: expected None with", ROW, LABELS, {"reduction": "sum", "avg_factor": 1}),
        (ValueError, r"avg_factor: expected one element, got shape \(2,\)", ROW, LABELS, {"avg_factor": torch.ones(2)}),
        (TypeError, "avg_factor: expected a number, got str", ROW, LABELS, {"avg_factor": "num_pos"}),
        (ValueError, "avg_factor: expected a finite number, got nan", ROW, LABELS, {"avg_factor": math.nan}),
        (ValueError, ASKS_FOR_GRADIENT, ROW, LABELS, {"avg_factor": torch.ones((), requires_grad=True)}),
        (ValueError, "avg_factor: .* device cpu.*got meta", ROW, LABELS, {"avg_factor": torch.ones(1, device="meta")}),
        (ValueError, "target: expected device cpu.*got meta", ROW, LABELS.to("meta"), {}),
        (ValueError, "class_weight: .* device cpu.*got meta", ROW, LABELS, {"class_weight": torch.ones(3).to("meta")}),
        (ValueError, r"class_weight: .*\(C\) with C=3, got \(4,\)", ROW, LABELS, {"class_weight": torch.ones(4)}),
        (ValueError, r"class_weight: expected shape.*got \(1, 3\)", ROW, LABELS, {"class_weight": torch.ones(1, 3)}),
        (TypeError, "class_weight: expected a torch.Tensor, got list", ROW, LABELS, {"class_weight": [1.0, 1.0, 1.0]}),
        (ValueError, ASKS_FOR_GRADIENT, ROW, LABELS, {"class_weight": torch.ones(3, requires_grad=True)}),
        (ValueError, "gamma: expected a finite number >= 0, got -1", ROW, LABELS, {"gamma": -1}),
        (TypeError, "gamma: expected a number, got str", ROW, LABELS, {"gamma": "2"}),
        (ValueError, "alpha: .*got 1.5", ROW, LABELS, {"alpha": 1.5}),
        (ValueError, "alpha: .*got nan", ROW, LABELS, {"alpha": math.nan}),
    ],
)
def test_errors(function, error, message, logits, target, options):
    with pytest.raises(error, match=message):
        function(logits, target, **options)


@pytest.mark.parametrize(
    ("error", "message", "target", "options"),
    [
        (TypeError, r"target: .*got torch.int64 of shape \(4, 3\)", torch.zeros(4, 3, dtype=torch.int64), {}),
        (ValueError, r"target: expected the shape of logits, \(4, 3\), got \(4, 1\)", torch.zeros(4, 1), {}),
        (ValueError, r"target: expected the shape of logits, \(4, 3\), got \(3, 4\)", torch.zeros(3, 4).bool(), {}),
        (ValueError, ASKS_FOR_GRADIENT, torch.zeros(4, 3, requires_grad=True), {}),
        (ValueError, "class_weight: expected None with a dense", torch.zeros(4, 3), {"class_weight": torch.ones(3)}),
        (ValueError, "weight: expected device cpu.*got meta", LABELS, {"weight": torch.ones(4, device="meta")}),
        (ValueError, "target: expected device cpu.*got meta", torch.zeros(4, 3, device="meta"), {}),
        (TypeError, "weight: expected a torch.Tensor, got float", LABELS, {"weight": 1.0}),
        (TypeError, "weight: .*got torch.complex64", LABELS, {"weight": torch.ones(4) * 1j}),
        (ValueError, r"weight: .*\(4,\), \(4, 1\) or \(4, 3\).*got \(3,\)", LABELS, {"weight": torch.ones(3)}),
        (ValueError, r"weight: .*got \(1, 3\)", LABELS, {"weight": torch.ones(1, 3)}),
        (ValueError, r"weight: .*got \(\)", LABELS, {"weight": torch.ones(())}),
    ],
)
def test_errors_of_sigmoid(error, message, target, options):
    with pytest.raises(error, match=message):
        sigmoid_focal_loss(ROW, target, **options)


def test_softmax_takes_no_negative_alpha():
    with pytest.raises(ValueError, match=r"alpha: .*got -1"):
        softmax_focal_loss(ROW, LABELS, alpha=-1)


def test_constants_may_require_grad_where_nobody_asks_for_it():
    soft = torch.zeros(4, 3, requires_grad=True)
    with torch.no_grad():
        assert sigmoid_focal_loss(ROW, soft).isfinite()


@pytest.mark.interpreted
def test_gradient_of_a_probability_that_is_almost_certain_in_float64(device):
    """Where torch clamps ``p * (1 - p)`` at 1e-12, which is another number in float32."""
    p = 1e-14
    probabilities = torch.tensor([[p]], dtype=torch.float64, device=device, requires_grad=True)
    labels = torch.zeros(1, dtype=torch.int64, device=device)
    sigmoid_focal_loss(probabilities, labels, activated=True, reduction="sum").backward()
    expected = 0.25 * (-2 * (1 - p) * -math.log(p) + (1 - p) ** 2 * (p - 1) / 1e-12)
    assert probabilities.grad.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.interpreted
def test_no_power_has_no_slope(device):
    """Also where the error is so small that its inverse is infinite."""
    probabilities = torch.tensor([[1e-40]], device=device, requires_grad=True)
    labels = torch.ones(1, dtype=torch.int64, device=device)  # background
    sigmoid_focal_loss(probabilities, labels, activated=True, gamma=0.0, reduction="sum").backward()
    assert math.isfinite(probabilities.grad.item())


@pytest.mark.parametrize("activated", [1, "yes", None])
def test_activated_is_true_or_false(activated):
    with pytest.raises(TypeError, match="activated: expected True or False, got"):
        sigmoid_focal_loss(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), activated=activated)
