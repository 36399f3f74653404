"""Focal losses where a kernel may fail and one that is right on random logits would not show it.

Every element for itself against closed forms in float64, from certain to hopeless; the largest and infinite logits;
NaN, which stays where it is; what lies in memory around the inputs, and in which order the results do; sizes about
those of blocks; nothing at all.
"""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from cases.comparison import assert_each_near, assert_near
from cases.focal_loss import anchors_of, channels_to_the_end, sigmoid_exact, softmax_exact
from saccade.losses.focal import sigmoid_focal_loss, softmax_focal_loss
from saccade.triton_dispatch import served_by_triton

pytestmark = pytest.mark.interpreted

INTERPRETED = served_by_triton(torch.empty(0))
GAMMAS = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0]
# Every power in one dtype, some in the others: a GPU has a kernel to compile for each, and for each number of classes,
# which are therefore few.
POWERS = [pytest.param(gamma, torch.float32, id=f"{gamma}-float32") for gamma in GAMMAS]
POWERS += [
    pytest.param(gamma, dtype, id=f"{gamma}-{str(dtype).removeprefix('torch.')}")
    for gamma in (0.0, 0.5, 2.0, 5.0)
    for dtype in (torch.float16, torch.bfloat16, torch.float64)
]
HARD_TARGETS = ["labels", "int32", "bool", "float32", "float16"]
INF, NAN = math.inf, math.nan

# Of one element. In float32 a logit of 100, as a power of 2, is off by up to 4e-6 and its exponential by that part of
# itself; halves are computed so and rounded once. The interpreter cuts float32 off where a GPU rounds to bfloat16.
EACH = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2**-11 + 1e-5}
EACH[torch.bfloat16] = (2**-7 if INTERPRETED else 2**-8) + 1e-5


def differentiated(call: Callable[..., Tensor], logits: Tensor, *rest: Tensor, **options) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient of its sum."""
    leaf = logits.detach().requires_grad_()
    loss = call(leaf, *rest, **options)
    (gradient,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss))
    return loss.detach(), gradient


each_of_sigmoid = partial(differentiated, sigmoid_focal_loss, reduction="none")
each_of_softmax = partial(differentiated, softmax_focal_loss, reduction="none")


def assert_each_rounded(what: str, actual: Tensor, expected: Tensor) -> None:
    """Every element is as near as its dtype lets it be. Hardware may take numbers that are not normal for 0."""
    dtype = actual.dtype
    is_half = dtype == torch.float16  # computed in float32, whose normal numbers go further down than those of half
    lost_below = torch.finfo(torch.float32 if is_half else dtype).tiny
    assert_each_near(what, actual, expected, EACH[dtype], lost_below, absolute=2**-25 if is_half else 0.0)


def on_both_sides(x: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """(n, 2) logits that are each a positive and a negative, and their targets of 0 and 1."""
    logits = torch.stack([x, x], -1)
    labels = torch.arange(len(x), device=x.device) % 2
    if form in ("labels", "int32"):
        return logits, labels if form == "labels" else labels.int()
    target = labels[:, None] == torch.arange(2, device=x.device)
    return logits, target if form == "bool" else target.to(getattr(torch, form))


# ---- every element


def grid(device: str) -> Tensor:
    small = torch.tensor([1e-1, 1e-2, 1e-3, 1e-5, 1e-7, 1e-20, 0.0])
    return torch.cat([torch.linspace(-80, 80, 641), small, -small]).to(device)


@pytest.mark.parametrize("form", HARD_TARGETS)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_each_element_of_sigmoid(gamma, form, device):
    logits, target = on_both_sides(grid(device), form)
    for alpha in (0.25, -1.0):
        results = each_of_sigmoid(logits, target, alpha=alpha, gamma=gamma)
        expected = sigmoid_exact(logits, target, alpha=alpha, gamma=gamma)
        for what, actual, wanted in zip(("loss", "slope"), results, expected, strict=True):
            assert_each_near(what, actual, wanted, 1e-5, lost_below=1e-30)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_each_element_of_soft_targets(gamma, device):
    """The slope crosses 0: it is measured by the terms that are summed there."""
    softness = torch.tensor([1e-7, 1e-3, 0.3, 0.5, 0.7, 0.8, 0.999, 1 - 2**-24], device=device)
    logits = grid(device)[::4, None].expand(-1, 8).reshape(-1, 2)
    target = softness.expand(len(logits) // 4, 8).reshape(-1, 2)
    loss, slope = each_of_sigmoid(logits, target, gamma=gamma)
    exact_loss, exact_slope = sigmoid_exact(logits, target, gamma=gamma)
    assert_each_near("loss", loss, exact_loss, 1e-5, lost_below=1e-30)
    x, t = logits.double(), target.double()
    p, not_p = x.sigmoid(), (-x).sigmoid()
    error = t * not_p + (1 - t) * p
    terms = (
        t * not_p
        + (1 - t) * p
        + gamma * (1 - 2 * t).abs() * p * not_p * exact_loss / ((0.75 - 0.5 * t) * error ** (gamma + 1))
    )
    size = (0.75 - 0.5 * t) * error**gamma * terms
    assert_each_near("slope", slope, exact_slope, 0, lost_below=1e-30, absolute=1e-5 * size)


@pytest.mark.parametrize("form", ["labels", "bool", "float32"])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_each_element_of_probabilities(gamma, form, device):
    """Down to 1e-37, up to a hair below 1, and 0 and 1 themselves."""
    small = 10 ** torch.linspace(-37, -1, 73, dtype=torch.float64)
    p = torch.cat([small, torch.linspace(0, 1, 101), 1 - small[45:], torch.tensor([1 - 2**-24])]).float().to(device)
    logits, target = on_both_sides(p, form)
    results = each_of_sigmoid(logits, target, gamma=gamma, activated=True)
    expected = sigmoid_exact(logits, target, gamma=gamma, activated=True)
    for what, actual, wanted in zip(("loss", "slope"), results, expected, strict=True):
        assert_each_near(what, actual, wanted, 1e-5, lost_below=1e-30)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_each_element_of_softmax(gamma, device):
    """The first logit leads by up to 80, or lies as far behind: where it leads, ``1 - p`` is what the others have."""
    x = grid(device)[::4]
    logits = torch.stack([x, torch.zeros_like(x), torch.full_like(x, -1)], -1)
    for label in (0, 1):
        labels = torch.full((len(x),), label, device=device)
        results = each_of_softmax(logits, labels, gamma=gamma)
        expected = softmax_exact(logits, labels, gamma=gamma)
        for what, actual, wanted in zip(("loss", "gradient"), results, expected, strict=True):
            assert_each_near(f"{what}, label {label}", actual, wanted, 1e-5, lost_below=1e-30)


SATURATED = [5.0, 8.0, 9.0, 12.0, 16.0, 16.625, 16.75, 18.0, 20.0, 30.0, 50.0, 80.0]
SATURATED += [87.0, 87.5, 88.5, 89.0, 95.0, 100.0, 103.0, 104.0, 110.0, 200.0, 1e3, 1e4, 3e4]


@pytest.mark.parametrize(("gamma", "dtype"), POWERS)
def test_a_saturated_right_answer(gamma, dtype, device):
    """Its loss and slope are 0 or what they are rounded to: nothing of ``1 - p`` is left that is noise."""
    x = torch.tensor(SATURATED, device=device, dtype=dtype)
    logits = torch.stack([x, -x], -1)
    labels = torch.zeros(len(x), dtype=torch.int64, device=device)
    for target in (labels, labels[:, None] == torch.arange(2, device=device)):
        loss, slope = each_of_sigmoid(logits, target, gamma=gamma)
        exact_loss, exact_slope = sigmoid_exact(logits, labels, gamma=gamma)
        assert_each_rounded("loss", loss, exact_loss)
        assert_each_rounded("slope", slope, exact_slope)
        assert (slope[:, 0] <= 0).all()
        assert (slope[:, 1] >= 0).all()


@pytest.mark.parametrize(("gamma", "dtype"), POWERS)
def test_a_saturated_right_answer_of_softmax(gamma, dtype, device):
    lead = torch.tensor(SATURATED, device=device, dtype=dtype)
    logits = torch.stack([lead / 2, -lead / 2, -lead], -1)
    labels = torch.zeros(len(lead), dtype=torch.int64, device=device)
    loss, gradient = each_of_softmax(logits, labels, gamma=gamma)
    exact_loss, exact_gradient = softmax_exact(logits, labels, gamma=gamma)
    assert_each_rounded("loss", loss, exact_loss)
    assert_each_rounded("gradient", gradient, exact_gradient)


@pytest.mark.parametrize("scale", [1, 20])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("target", ["labels", "soft", "bool", "probabilities", "softmax"])
def test_accuracy_on_random_logits(target, reduction, scale, device):
    """2e-6: a few roundings of float32 in each element, none of a running sum."""
    rng = torch.Generator().manual_seed(0)
    rows = 61 if INTERPRETED else 301  # of 80 elements: tiles enough, and the last one not full
    logits = (torch.randn(rows, 80, generator=rng) * scale).to(device)
    labels = torch.randint(-1, 82, (rows,), generator=rng).to(device)
    dense = torch.rand(rows, 80, generator=rng).to(device)
    options = {"gamma": 1.5, "alpha": 0.3}
    if target == "softmax":
        call, arguments, exact = softmax_focal_loss, (logits, labels), softmax_exact
    else:
        call, exact = sigmoid_focal_loss, sigmoid_exact
        arguments = (logits, {"soft": dense, "bool": dense > 0.9}.get(target, labels))
        if target == "probabilities":
            options["activated"], arguments = True, (logits.sigmoid(), labels)
    loss, gradient = differentiated(call, *arguments, **options, reduction=reduction)
    exact_loss, exact_gradient = exact(*arguments, **options)
    if reduction != "none":
        count = exact_loss.numel() if reduction == "mean" else 1
        exact_loss, exact_gradient = exact_loss.sum() / count, exact_gradient / count
    assert_near("loss", loss, exact_loss, 2e-6)
    assert_near("gradient", gradient, exact_gradient, 2e-6)


def test_any_power(device):
    rng = torch.Generator().manual_seed(0)
    logits = (torch.randn(40, 7, generator=rng) * 3).to(device)
    labels = torch.randint(-1, 9, (40,), generator=rng).to(device)
    for gamma in torch.rand(20, generator=rng).mul(6).tolist():
        for each, exact in ((each_of_sigmoid, sigmoid_exact), (each_of_softmax, softmax_exact)):
            results, expected = each(logits, labels, gamma=gamma), exact(logits, labels, gamma=gamma)
            for what, actual, wanted in zip(("loss", "gradient"), results, expected, strict=True):
                assert_near(f"{what}, gamma {gamma}", actual, wanted, 2e-6)


# ---- the largest logits, infinite ones, NaN


@pytest.mark.parametrize(("gamma", "dtype"), POWERS)
def test_the_largest_logits(gamma, dtype, device):
    """Linear on the wrong side, nothing on the right one, and in between for soft targets."""
    largest = {torch.float16: 6e4, torch.float64: 1e308}.get(dtype, 3e38)
    x = torch.tensor([largest, largest / 3, 1e4, 1e3], device=device, dtype=dtype)
    softness = torch.tensor([0.0, 1.0, 0.25, 0.5, 0.125, 0.875], device=device, dtype=dtype)
    logits = torch.cat([x, -x])[:, None].expand(8, 6).reshape(24, 2)
    soft = softness.expand(8, 6).reshape(24, 2)
    for target in (soft, soft > 0.9, torch.arange(24, device=device) % 4):
        for alpha in (0.25, 1.0, -1.0) if dtype == torch.float32 else (0.25, 1.0):
            loss, slope = each_of_sigmoid(logits, target, alpha=alpha, gamma=gamma)
            exact_loss, exact_slope = sigmoid_exact(logits, target, alpha=alpha, gamma=gamma)
            assert_each_rounded("loss", loss, exact_loss)
            assert_each_rounded("slope", slope, exact_slope)
            assert (loss[exact_loss == 0] == 0).all()
            assert (slope[exact_slope == 0] == 0).all()


@pytest.mark.parametrize(("gamma", "dtype"), POWERS)
def test_the_largest_logits_of_softmax(gamma, dtype, device):
    """The difference of two logits may be beyond float32 where each is not; halves of the largest are not."""
    half = {torch.float16: 3e4, torch.float64: 5e307}.get(dtype, 1.5e38)
    rows = [[half, -half, 0.0], [-half, half, 0.0], [half, half, -half], [0.0, 0.0, half], [1e3, -1e3, 999.0]]
    logits = torch.tensor(rows, device=device, dtype=dtype)
    for label in (0, 1, 2):
        labels = torch.full((5,), label, device=device)
        results = each_of_softmax(logits, labels, gamma=gamma)
        for what, actual, wanted in zip(
            ("loss", "gradient"), results, softmax_exact(logits, labels, gamma=gamma), strict=True
        ):
            assert_each_rounded(f"{what}, label {label}", actual, wanted)


@pytest.mark.parametrize(("gamma", "dtype"), POWERS)
def test_infinite_logits(gamma, dtype, device):
    softness = torch.tensor([[0.0, 1.0], [0.25, 0.5]] * 2, device=device, dtype=dtype)
    logits = torch.tensor([INF, INF, -INF, -INF], device=device, dtype=dtype)[:, None].expand(4, 2)
    far = logits.double().clamp(-1e300, 1e300)
    for target in (softness, softness > 0.9, torch.tensor([1, -1, 1, -1], device=device)):
        loss, slope = each_of_sigmoid(logits, target, gamma=gamma)
        large, limit = sigmoid_exact(far, target, gamma=gamma)
        assert loss.tolist() == torch.where(large > 1, INF, 0.0).tolist()
        assert_each_rounded("slope", slope, limit)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_infinite_logits_of_softmax(gamma, device):
    rows = [[INF, 0.0, -1.0], [-INF, 0.0, 0.0], [0.0, INF, -INF], [INF, -INF, 3.0]]
    logits = torch.tensor(rows, device=device)
    loss, gradient = each_of_softmax(logits, torch.zeros(4, dtype=torch.int64, device=device), gamma=gamma)
    assert loss.tolist() == [0, INF, INF, 0]
    expected = [[0, 0, 0], [-0.25, 0.125, 0.125], [-0.25, 0.25, 0], [0, 0, 0]]
    torch.testing.assert_close(gradient, torch.tensor(expected, device=device), rtol=1e-6, atol=0)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_a_class_that_is_masked_out_is_as_if_it_were_not_there(gamma, device):
    """Minus infinity in some columns of every row, the first and the last among them."""
    rng = torch.Generator().manual_seed(0)
    few = (torch.randn(20, 4, generator=rng) * 3).to(device)
    labels = torch.randint(0, 4, (20,), generator=rng).to(device)
    columns = torch.tensor([1, 2, 5, 6], device=device)
    logits = torch.full((20, 8), -INF, device=device)
    logits[:, columns] = few
    loss, gradient = each_of_softmax(logits, columns[labels], gamma=gamma)
    expected, expected_gradient = each_of_softmax(few, labels, gamma=gamma)
    assert_near("loss", loss, expected, 2e-6)
    assert_near("gradient", gradient[:, columns], expected_gradient, 2e-6)
    assert gradient[:, [0, 3, 4, 7]].eq(0).all()


def sprinkled(values: Tensor, *indices: int) -> Tensor:
    """A copy with NaN at some of its elements, counted in its flat form."""
    values = values.clone()
    values.view(-1)[list(indices)] = NAN
    return values


@pytest.mark.parametrize("gamma", GAMMAS)
def test_nan_stays_in_its_element(gamma, device):
    rng = torch.Generator().manual_seed(0)
    clean = torch.randn(1054, 2, generator=rng).to(device)
    labels = torch.randint(-1, 4, (1054,), generator=rng).to(device)
    dense = torch.rand(1054, 2, generator=rng).to(device)
    logits = sprinkled(clean, 0, 700, 1023, 1024, 2107)
    nan = logits.isnan()
    for target in (labels, dense, dense > 0.5):
        results = each_of_sigmoid(logits, target, gamma=gamma)
        for actual, wanted in zip(results, each_of_sigmoid(clean, target, gamma=gamma), strict=True):
            assert torch.equal(actual.isnan(), nan)
            assert torch.equal(actual[~nan], wanted[~nan])
        total, slope = differentiated(sigmoid_focal_loss, logits, target, gamma=gamma, reduction="sum")
        assert total.isnan()
        assert torch.equal(slope.isnan(), nan)
    for actual in each_of_sigmoid(clean, sprinkled(dense, 0, 700, 1023, 1024, 2107), gamma=gamma):
        assert torch.equal(actual.isnan(), nan)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_nan_stays_in_its_row_of_softmax(gamma, device):
    rng = torch.Generator().manual_seed(0)
    clean = torch.randn(703, 3, generator=rng).to(device)
    labels = torch.randint(0, 3, (703,), generator=rng).to(device)
    labels[[100, 702]] = torch.tensor([-1, 3], device=device)  # of no class: nothing comes of their NaN
    logits = sprinkled(clean, 0, 301, 1023, 1024, 2108)
    nan = logits.isnan().any(1)
    nan[[100, 702]] = False
    results = each_of_softmax(logits, labels, gamma=gamma)
    for actual, wanted in zip(results, each_of_softmax(clean, labels, gamma=gamma), strict=True):
        assert torch.equal(actual.isnan(), (nan if actual.dim() == 1 else nan[:, None]).expand(actual.shape))
        assert torch.equal(actual[~nan], wanted[~nan])
    assert softmax_focal_loss(logits, labels, gamma=gamma).isnan()


def test_nan_stays_in_its_row_of_a_weights_gradient(device):
    rng = torch.Generator().manual_seed(0)
    logits = sprinkled(torch.randn(301, 7, generator=rng).to(device), 3, 2106)
    labels = torch.randint(-1, 9, (301,), generator=rng).to(device)
    for shape in ((301,), (301, 1), (301, 7)):
        weight = torch.rand(shape, generator=rng).to(device).requires_grad_()
        (gradient,) = torch.autograd.grad(sigmoid_focal_loss(logits, labels, weight=weight), weight)
        nan = logits.isnan()
        assert torch.equal(gradient.isnan(), nan if shape == (301, 7) else nan.any(1).view(shape))


# ---- memory


@pytest.mark.parametrize("loss", ["labels", "dense", "softmax"])
def test_what_lies_around_the_inputs_is_not_used(loss, device):
    """Every input is cut out of a larger tensor that is NaN elsewhere, or a class where it is of labels."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(61, 19, generator=rng).to(device)
    labels = torch.randint(-1, 21, (61,), generator=rng).to(device)
    dense = torch.rand(61, 19, generator=rng).to(device)
    weight, class_weight = torch.rand(61, generator=rng).to(device), torch.rand(19, generator=rng).to(device)
    seed = torch.rand(61, 19, generator=rng).to(device)

    def cut(values: Tensor, fill: float = NAN) -> Tensor:
        around = values.new_full([size + 5 for size in values.shape], fill)
        inside = around[(slice(2, -3),) * values.dim()]
        return inside.copy_(values)

    def run(cut: Callable[..., Tensor]) -> list[Tensor]:
        x = cut(logits).requires_grad_()
        w = cut(weight).requires_grad_()
        if loss == "softmax":
            w = x  # there is no other leaf
            each = softmax_focal_loss(x, cut(labels, 0), class_weight=cut(class_weight), reduction="none")
        elif loss == "labels":
            each = sigmoid_focal_loss(x, cut(labels, 0), weight=w, class_weight=cut(class_weight), reduction="none")
        else:
            each = sigmoid_focal_loss(x, cut(dense), weight=w, reduction="none")
        grad_output = cut(seed)[:, 0] if loss == "softmax" else cut(seed)
        return [each.detach(), *torch.autograd.grad(each, (x, w), grad_output)]

    for k, (actual, wanted) in enumerate(zip(run(cut), run(lambda values, *_: values.clone()), strict=True)):
        assert_near(f"result {k}", actual, wanted, 1e-6)  # other strides may be another order of sums


LAYOUTS = {  # what is in memory, and how it is seen
    "contiguous": ((6, 5), lambda x: x),
    "transposed": ((5, 6), lambda x: x.mT),
    "head": ((2, 3, 4, 5), channels_to_the_end),
    "channels-last-head": ((2, 4, 5, 3), lambda x: channels_to_the_end(x.permute(0, 3, 1, 2))),
    "anchors": ((2, 6, 4, 5), partial(anchors_of, anchors=3)),
    "columns": ((6, 9), lambda x: x[:, 2:7]),
    "columns-of-a-transposed": ((9, 6), lambda x: x.mT[:, 2:7]),
    "every-other": ((6, 10), lambda x: x[:, ::2]),
    "expanded": ((1, 5), lambda x: x.expand(6, 5)),
    "expanded-inside": ((2, 1, 5), lambda x: x.expand(2, 3, 5)),
    "one-row": ((5,), lambda x: x),
}


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loss", ["labels", "dense", "softmax"])
def test_the_order_in_memory_is_that_of_the_logits(loss, layout, reduction, device):
    """So that the gradient of a head's permuted output need not be copied on its way back."""
    shape, view = LAYOUTS[layout]
    rng = torch.Generator().manual_seed(0)
    leaf = torch.randn(shape, generator=rng).to(device).requires_grad_()
    logits = view(leaf)
    target = torch.rand(logits.shape, generator=rng).to(device)
    if loss != "dense":
        target = (target[..., 0] * (logits.shape[-1] + 2)).long() - 1
    call = softmax_focal_loss if loss == "softmax" else sigmoid_focal_loss
    result = call(logits, target, reduction=reduction)
    if reduction == "none" and loss != "softmax":
        assert result.stride() == torch.empty_like(logits).stride()
    (gradient,) = torch.autograd.grad(result.sum(), logits)
    assert gradient.stride() == torch.empty_like(logits).stride()
    exact = softmax_exact if loss == "softmax" else sigmoid_exact
    losses, slopes = exact(logits.detach(), target)
    count = losses.numel() if reduction == "mean" else 1
    assert_near("loss", result, losses if reduction == "none" else losses.mean(), 2e-6)
    assert_near("gradient", gradient, slopes / count, 2e-6)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("loss", ["labels", "dense", "softmax"])
@pytest.mark.parametrize("view", [channels_to_the_end, partial(anchors_of, anchors=3)], ids=["head", "anchors"])
def test_the_gradient_of_a_head_is_contiguous(view, loss, reduction, device):
    rng = torch.Generator().manual_seed(0)
    head = torch.randn(2, 6, 4, 5, generator=rng).to(device).requires_grad_()
    logits = view(head)
    target = torch.rand(logits.shape, generator=rng).to(device)
    if loss != "dense":
        target = (target[..., 0] * (logits.shape[-1] + 2)).long() - 1
    call = softmax_focal_loss if loss == "softmax" else sigmoid_focal_loss
    # As a loss that is weighted afterwards has it: contiguous, whatever the order of the result.
    seed = torch.rand(call(logits, target, reduction=reduction).shape, generator=rng).to(device)
    (gradient,) = torch.autograd.grad(call(logits, target, reduction=reduction), head, seed)
    assert gradient.stride() == head.stride()


# ---- sizes


SIZES = [1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 257, 511, 513, 1023, 1024, 1025, 2047, 2049]


@pytest.mark.parametrize("size", SIZES)
def test_sizes_about_those_of_blocks(size, device):
    """As many rows, and as many classes."""
    rng = torch.Generator().manual_seed(0)
    for shape in ((size, 1), (size, 3), (3, size), (1, size)):
        logits = torch.randn(shape, generator=rng).to(device)
        labels = torch.randint(-1, shape[1] + 1, shape[:1], generator=rng).to(device)
        dense = torch.rand(shape, generator=rng).to(device)
        for call, target, exact in (
            (sigmoid_focal_loss, labels, sigmoid_exact),
            (sigmoid_focal_loss, dense, sigmoid_exact),
            (softmax_focal_loss, labels, softmax_exact),
        ):
            if call is softmax_focal_loss and INTERPRETED and shape[0] > 129:
                continue  # up to a program for each row
            loss, gradient = differentiated(call, logits, target, reduction="sum")
            losses, slopes = exact(logits, target)
            assert_near(f"loss of {shape}", loss, losses.sum(), 2e-6)
            assert_near(f"gradient of {shape}", gradient, slopes, 2e-6)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0), (2, 0, 4), (2, 3, 0), (0,)], ids=str)
def test_nothing_at_all(shape, device):
    """Every reduction, forward and backward; of a mean over nothing NaN comes, and no gradient."""
    head = torch.zeros(shape, device=device)
    labels = torch.zeros(shape[:-1], dtype=torch.int64, device=device)
    rows = torch.zeros(shape[:-1], device=device)
    class_weight = torch.ones(shape[-1], device=device)
    for logits in (
        head,
        head.permute(*range(head.dim() - 1, -1, -1)).contiguous().permute(*range(head.dim() - 1, -1, -1)),
    ):
        leaf = logits.detach().requires_grad_()
        for reduction, avg_factor in (
            ("none", None),
            ("sum", None),
            ("mean", None),
            ("mean", 3),
            ("mean", torch.ones(1, device=device)),
        ):
            how = {"reduction": reduction, "avg_factor": avg_factor}
            for weight in (None, rows.clone().requires_grad_(), torch.zeros(shape, device=device, requires_grad=True)):
                calls = [
                    sigmoid_focal_loss(leaf, labels, weight=weight, class_weight=class_weight, **how),
                    sigmoid_focal_loss(leaf, torch.zeros(shape, device=device), weight=weight, **how),
                    sigmoid_focal_loss(leaf, torch.zeros(shape, device=device) > 0, weight=weight, **how),
                ]
                leaves = [leaf] if weight is None else [leaf, weight]
                for loss in calls:
                    gradients = torch.autograd.grad(loss, leaves, torch.ones_like(loss))
                    assert [gradient.shape for gradient in gradients] == [value.shape for value in leaves]
                    assert all((gradient == 0).all() for gradient in gradients)  # weights of rows without a class
                    if reduction == "none":
                        assert loss.shape == shape
                    else:
                        assert loss.isnan() if (reduction, avg_factor) == ("mean", None) else loss == 0
            loss = softmax_focal_loss(leaf, labels, class_weight=class_weight, **how)
            assert torch.autograd.grad(loss, leaf, torch.ones_like(loss))[0].shape == shape
            if reduction == "none":
                assert loss.shape == labels.shape
                assert (loss == 0).all()
            else:
                is_nan = (reduction, avg_factor) == ("mean", None) and labels.numel() == 0
                assert loss.isnan() if is_nan else loss == 0
