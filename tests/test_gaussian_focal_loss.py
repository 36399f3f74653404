"""``gaussian_focal_loss`` and ``gaussian_focal_loss_with_logits``: the spec's numbers, limits, clipping, errors."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cases.gaussian_focal_loss import EPS, oracle
from saccade.losses.gaussian import gaussian_focal_loss, gaussian_focal_loss_with_logits

BOTH = [gaussian_focal_loss, gaussian_focal_loss_with_logits]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
P, T = [0.9, 0.2, 0.7, 0.05, 0.5], [1.0, 1.0, 0.6, 0.0, 0.95]


def tensor(values, device, dtype=torch.float64) -> Tensor:
    return torch.tensor(values, device=device, dtype=dtype)


def gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), leaf)[0]


def close(actual: Tensor, expected, atol=1e-8, rtol=1e-6) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype, device=actual.device)
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)


# ---- values


def test_two_elements_by_hand(device):
    """At p = 1/2: a peak costs log 2 / 4, a cell half way up its slope (1/2)**4 of that."""
    target = tensor([1.0, 0.5], device)
    for loss in (
        gaussian_focal_loss(tensor([0.5, 0.5], device), target, reduction="none"),
        gaussian_focal_loss_with_logits(tensor([0.0, 0.0], device), target, reduction="none"),
    ):
        close(loss, [math.log(2) / 4, math.log(2) / 64], atol=0, rtol=1e-11)


def test_known_values(device):
    p, t = tensor(P, device).requires_grad_(), tensor(T, device)
    elements = [0.0010536052, 1.0300402640, 0.0151026349, 0.0001282332, 0.0000010830]
    slopes = [-0.0321832142, -5.7751006599, 0.0849637186, 0.0077609084, 0.0000074572]
    close(gaussian_focal_loss(p, t, reduction="none"), elements, atol=5e-11, rtol=0)
    loss = gaussian_focal_loss(p, t, reduction="sum")
    close(loss, 1.0463258203, atol=1e-10, rtol=0)
    close(gradient(loss, p), slopes, atol=5e-11, rtol=0)
    x = p.detach().logit().requires_grad_()
    loss = gaussian_focal_loss_with_logits(x, t, reduction="sum")
    close(loss, 1.0463258203, atol=1e-10, rtol=0)
    close(gradient(loss, x), tensor(slopes, device) * (p * (1 - p)).detach(), atol=1e-10, rtol=0)


def test_positives_are_told_in_the_dtype_of_the_target(device):
    """A float64 target a hair below 1 is no positive, though it is 1 as float32."""
    hair = tensor([1 - 1e-12], device)
    x = torch.zeros(1, device=device)
    assert gaussian_focal_loss_with_logits(x, hair, reduction="sum") == 0
    close(gaussian_focal_loss_with_logits(x, hair.float(), reduction="sum"), math.log(2) / 4)


def test_targets_outside_the_unit_interval_are_clamped(device):
    target = tensor([80.0, -3.0, 1.5], device)
    for function in BOTH:
        pred = tensor([0.5, 0.5, 0.5], device)
        inside = function(pred, tensor([0.999999999, 0.0, 0.999999999], device), gamma=3.5, reduction="none")
        close(function(pred, target, gamma=3.5, reduction="none"), inside)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.5, 2.0, 5.0])
@pytest.mark.parametrize("dtype", FLOATS)
def test_extreme_logits_have_finite_gradients(dtype, alpha, device):
    largest = 6e4 if dtype == torch.float16 else 1e4
    values = [largest, 1e3, 100.0, 88.8, 17.0, 0.0, -17.0, -88.8, -100.0, -1e3, -largest]
    x = tensor(values, device, dtype).requires_grad_()
    for target in (torch.ones(11, device=device), torch.zeros(11, device=device)):
        loss = gaussian_focal_loss_with_logits(x, target, alpha=alpha, reduction="none")
        assert loss.dtype == dtype
        assert loss.isfinite().all()
        slopes = gradient(loss, x)
        assert slopes.isfinite().all()
        assert slopes.abs().max() <= alpha + 1


def test_confidently_wrong_keeps_its_slope(device):
    x = tensor([-100.0, 100.0, -1e4, 1e4], device, torch.float32).requires_grad_()
    loss = gaussian_focal_loss_with_logits(x, tensor([1.0, 0.0, 1.0, 0.0], device), reduction="none")
    close(loss, [100.0, 100.0, 1e4, 1e4])
    close(gradient(loss, x), [-1.0, 1.0, -1.0, 1.0])


@pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0])
def test_infinite_logits_have_their_limits(alpha, device):
    x = tensor([math.inf, -math.inf, math.inf, -math.inf, math.nan], device, torch.float32).requires_grad_()
    target = tensor([1.0, 0.0, 0.0, 1.0, 0.0], device, torch.float32)
    loss = gaussian_focal_loss_with_logits(x, target, alpha=alpha, reduction="none")
    assert loss[:4].tolist() == [0, 0, math.inf, math.inf]
    slopes = gradient(loss, x)
    assert slopes[:4].tolist() == [0, 0, 1, -1]
    assert loss[4].isnan()
    assert slopes[4].isnan()


@pytest.mark.parametrize("dtype", FLOATS)
def test_probabilities_of_zero_and_one(dtype, device):
    """-log(1e-12) = 27.63 on the wrong side, also in half precision, which has no 1e-12."""
    p = tensor([0.0, 1.0, 0.0, 1.0], device, dtype).requires_grad_()
    target = tensor([1.0, 0.0, 0.0, 1.0], device)
    for alpha in (0.5, 1.0, 2.0):
        loss = gaussian_focal_loss(p, target, alpha=alpha, reduction="none")
        close(loss.double(), [27.63, 27.63, 0.0, 0.0], atol=0.02)
        assert not gradient(loss, p).isnan().any()


def test_clip_is_that_of_centerpoint(device):
    """Values of the clamped probability; no gradient beyond, with the bound itself inside."""
    bound = math.log((1 - 1e-4) / 1e-4)
    assert bound == pytest.approx(9.2102, abs=1e-4)
    values = [bound - 1e-6, bound, bound + 1e-6, 50.0, math.inf]
    x = tensor([*values, *(-value for value in values), math.nan], device).requires_grad_()
    for positive in (True, False):
        target = torch.full((11,), float(positive), device=device, dtype=torch.float64)
        loss = gaussian_focal_loss_with_logits(x, target, clip=1e-4, reduction="none")
        p = x.detach().sigmoid().clamp(1e-4, 1 - 1e-4)
        close(loss[:10], gaussian_focal_loss(p, target, reduction="none")[:10], atol=1e-11)
        slopes = gradient(loss, x)
        inside = x.abs() <= bound
        expected = gradient(gaussian_focal_loss_with_logits(x, target, reduction="none"), x)
        close(slopes[inside], expected[inside], atol=0)
        assert (slopes[:10][~inside[:10]] == 0).all()
        assert (slopes[inside] != 0).all()
        assert inside.sum() == 4
        assert loss[10].isnan()
        assert slopes[10].isnan()


# ---- dtypes, shapes, reductions


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("function", BOTH)
def test_result_dtypes(function, dtype, device):
    p, t = tensor(P, device, dtype).requires_grad_(), tensor(T, device, torch.float32)
    assert function(p, t, reduction="none").dtype == dtype
    factors = [None, 3, "num_pos", torch.tensor(2, device=device)]
    for options in [{"reduction": "sum"}, *({"avg_factor": factor} for factor in factors)]:
        loss = function(p, t, **options)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert gradient(loss, p).dtype == dtype


@pytest.mark.parametrize("function", BOTH)
def test_avg_factor(function, device):
    p, t = tensor(P, device).requires_grad_(), tensor(T, device)
    total = function(p, t, reduction="sum")
    slopes = gradient(total, p)
    for factor, divisor, shape in [
        (3, 3, ()),
        (torch.tensor(3, device=device), 3, ()),
        (torch.tensor([3.0], device=device), 3, (1,)),
        ("num_pos", 2, ()),
        (0, 0, ()),
    ]:
        loss = function(p, t, avg_factor=factor)
        assert loss.shape == shape
        close(loss.reshape(()), total / (divisor + EPS), atol=0, rtol=1e-12)
        close(gradient(loss, p), slopes / (divisor + EPS), atol=0, rtol=1e-12)
    no_peak = torch.zeros(5, device=device)
    close(function(p, no_peak, avg_factor="num_pos"), function(p, no_peak, reduction="sum") / (1 + EPS), rtol=1e-12)
    unreduced = function(p, t, reduction="none")
    for factor in (3, "num_pos"):
        assert torch.equal(function(p, t, reduction="none", avg_factor=factor), unreduced)


@pytest.mark.parametrize("function", BOTH)
def test_empty(function, device):
    p = torch.zeros(0, 3, device=device, requires_grad=True)
    target = torch.zeros(0, 3, device=device)
    assert function(p, target).isnan()
    for options in ({"reduction": "sum"}, {"avg_factor": 2}, {"avg_factor": "num_pos"}):
        assert function(p, target, **options) == 0
    for reduction in ("none", "mean", "sum"):
        assert gradient(function(p, target, reduction=reduction), p).shape == (0, 3)


@pytest.mark.parametrize("function", BOTH)
def test_weight_broadcasts_and_has_a_gradient(function, device):
    p, t = tensor([P, P[::-1]], device), tensor([T, T], device)
    elements = function(p, t, reduction="none")
    for shape in [(), (1,), (5,), (2, 1), (1, 5), (2, 5)]:
        weight = torch.rand(shape, device=device, dtype=torch.float64, requires_grad=True)
        loss = function(p, t, weight=weight, reduction="none")
        close(loss, elements * weight)
        close(gradient(loss, weight), elements.sum_to_size(shape))
        close(function(p, t, weight=weight), loss.mean())
    mask = t > 0.9
    close(function(p, t, weight=mask, reduction="sum"), elements[mask].sum())


def test_many_blocks(device):
    """More elements than one block holds, with a ragged last one."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(3, 70_001, generator=rng).to(device).requires_grad_()
    target = torch.rand(3, 70_001, generator=rng)
    target[target > 0.99] = 1
    target = target.to(device)
    loss = gaussian_focal_loss_with_logits(x, target, avg_factor="num_pos")
    x64 = x.detach().double().requires_grad_()
    expected = oracle(x64, target.double(), avg_factor="num_pos", with_logits=True)
    close(loss.double(), expected)
    close(gradient(loss, x).double(), gradient(expected, x64), atol=1e-9)


@given(data=st.data())
def test_against_autograd(data):
    draw = data.draw
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    x = torch.randn(shape, generator=rng, dtype=torch.float64) * draw(st.sampled_from([0.1, 3.0, 8.0]))
    target = torch.rand(shape, generator=rng, dtype=torch.float64)
    target = torch.where(target > 0.7, 1.0, target)
    with_logits = draw(st.booleans())
    options = {
        "alpha": draw(st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.5])),
        "gamma": draw(st.sampled_from([0.0, 0.5, 1.0, 4.0])),
        "pos_weight": draw(st.sampled_from([0.0, 1.0, 2.5])),
        "neg_weight": draw(st.sampled_from([0.5, 1.0])),
        "reduction": draw(st.sampled_from(["none", "sum"])),
    }
    weight = None
    if draw(st.booleans()):
        axes = draw(st.integers(0, len(shape)))
        sizes = [draw(st.sampled_from([1, size])) for size in shape[len(shape) - axes :]]
        weight = torch.rand(sizes, generator=rng, dtype=torch.float64).requires_grad_()
    x = x if with_logits else x.sigmoid().clamp(1e-4, 1 - 1e-4)
    x = x.mT.contiguous().mT if x.dim() > 1 and draw(st.booleans()) else x
    x.requires_grad_()
    function = gaussian_focal_loss_with_logits if with_logits else gaussian_focal_loss
    if with_logits and draw(st.booleans()):
        options["clip"] = 0.01
    inputs = (x,) if weight is None else (x, weight)
    loss = function(x, target, weight=weight, **options)
    expected = oracle(x, target, weight, with_logits=with_logits, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    for actual, wanted in zip(
        torch.autograd.grad(loss.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("function", BOTH)
def test_gradcheck(function, device):
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(4, 3, generator=rng, dtype=torch.float64).mul(0.8).add(0.1).to(device).requires_grad_()
    weight = torch.rand(3, generator=rng, dtype=torch.float64).to(device).requires_grad_()
    target = torch.rand(4, 3, generator=rng, dtype=torch.float64)
    target[1, 1] = 1
    target = target.to(device)
    for options in ({"reduction": "none"}, {}, {"avg_factor": "num_pos"}, {"alpha": 0.5, "reduction": "sum"}):
        assert torch.autograd.gradcheck(
            lambda x, weight, options=options: function(x, target, weight=weight, **options), (x, weight)
        )


@pytest.mark.parametrize("function", BOTH)
def test_autocast_leaves_predictions_alone(function, device):
    p, t = tensor(P, device, torch.float32), tensor(T, device, torch.float32)
    expected = function(p, t, reduction="none")
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(function(p, t, reduction="none"), expected)


# ---- errors

MAP = torch.full((4, 3), 0.5)
ASKS_FOR_GRADIENT = "expected a tensor that does not require grad"


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize(
    ("error", "message", "pred", "target", "options"),
    [
        (TypeError, "(pred|logits): expected a torch.Tensor, got list", [0.5], MAP, {}),
        (TypeError, "(pred|logits): expected float16.*got torch.int64", MAP.long(), MAP, {}),
        (TypeError, "target: expected a torch.Tensor, got list", MAP, [0.5], {}),
        (TypeError, "target: expected float16.*got torch.int64", MAP, MAP.long(), {}),
        (ValueError, r"target: expected the shape of .*\(4, 3\), got \(4, 1\)", MAP, MAP[:, :1], {}),
        (ValueError, r"target: expected the shape of .*\(4, 3\), got \(3,\)", MAP, MAP[0], {}),
        (ValueError, ASKS_FOR_GRADIENT, MAP, MAP.clone().requires_grad_(), {}),
        (ValueError, ASKS_FOR_GRADIENT, MAP, MAP, {"avg_factor": torch.ones((), requires_grad=True)}),
        (ValueError, "target: expected device cpu.*got meta", MAP, MAP.to("meta"), {}),
        (ValueError, "weight: expected device cpu.*got meta", MAP, MAP, {"weight": torch.ones(3, device="meta")}),
        (ValueError, "avg_factor: .* device cpu.*got meta", MAP, MAP, {"avg_factor": torch.ones(1, device="meta")}),
        (TypeError, "weight: expected a torch.Tensor, got float", MAP, MAP, {"weight": 1.0}),
        (ValueError, r"weight: .*broadcasts.*\(4, 3\), got \(4,\)", MAP, MAP, {"weight": torch.ones(4)}),
        (ValueError, r"weight: .*broadcasts.*got \(1, 4, 3\)", MAP, MAP, {"weight": torch.ones(1, 4, 3)}),
        (ValueError, "reduction: expected 'none', 'mean' or 'sum', got 'avg'", MAP, MAP, {"reduction": "avg"}),
        (ValueError, "reduction: .* got 'num_pos'", MAP, MAP, {"reduction": "num_pos"}),
        (ValueError, "avg_factor: expected None", MAP, MAP, {"reduction": "sum", "avg_factor": "num_pos"}),
        (ValueError, "avg_factor: expected None", MAP, MAP, {"reduction": "sum", "avg_factor": 2}),
        (ValueError, r"avg_factor: expected one element, got shape \(2,\)", MAP, MAP, {"avg_factor": torch.ones(2)}),
        (TypeError, "avg_factor: expected a number, got str", MAP, MAP, {"avg_factor": "positives"}),
        (ValueError, "alpha: expected a finite number >= 0, got -1", MAP, MAP, {"alpha": -1}),
        (ValueError, "gamma: expected a finite number >= 0, got -1", MAP, MAP, {"gamma": -1}),
        (ValueError, "pos_weight: expected a finite number, got inf", MAP, MAP, {"pos_weight": math.inf}),
        (TypeError, "neg_weight: expected a number, got str", MAP, MAP, {"neg_weight": "1"}),
    ],
)
def test_errors(function, error, message, pred, target, options):
    with pytest.raises(error, match=message):
        function(pred, target, **options)


@pytest.mark.parametrize("clip", [0, -0.1, 0.5, 1, math.nan])
def test_clip_must_lie_between_zero_and_a_half(clip):
    with pytest.raises(ValueError, match="clip: expected"):
        gaussian_focal_loss_with_logits(MAP, MAP, clip=clip)


def test_predictions_outside_the_unit_interval_are_no_error():
    assert gaussian_focal_loss(torch.tensor([1.5]), torch.tensor([0.0])).isnan()


@pytest.mark.parametrize("p", [1e-4, 1e-6, 1e-7, 1e-8, 1e-10])
@pytest.mark.parametrize("positive", [True, False])
def test_small_probabilities_do_not_cancel_in_float32(device, p, positive):
    """``1 - (1 - p)`` would be off by percents at 1e-6 and by half at 1e-8."""
    target = torch.tensor([1.0 if positive else 0.0], device=device)
    results = []
    for dtype in (torch.float32, torch.float64):
        pred = torch.tensor([torch.tensor(p).item()], dtype=dtype, device=device, requires_grad=True)
        loss = gaussian_focal_loss(pred, target.to(dtype), reduction="sum")
        results.append((loss.item(), *torch.autograd.grad(loss, pred)[0].tolist()))
    assert results[0] == pytest.approx(results[1], rel=1e-5)


@pytest.mark.interpreted
def test_no_power_has_no_slope(device):
    """Also where the error is so small that its inverse is infinite."""
    pred = torch.tensor([1e-40], device=device, requires_grad=True)
    gaussian_focal_loss(pred, torch.zeros(1, device=device), alpha=0.0, reduction="sum").backward()
    assert pred.grad.item() == pytest.approx(1.0)
