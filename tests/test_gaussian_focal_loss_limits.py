"""Gaussian focal losses where a kernel may fail and one that is right on random predictions would not show it.

Every element for itself against closed forms in float64, from certain to hopeless; the largest and infinite logits;
NaN, which stays where it is; targets that are none; what lies in memory around the inputs, and in which order the
results do; sizes about those of blocks; nothing at all.
"""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from cases.comparison import assert_each_near, assert_near
from cases.focal_loss import channels_to_the_end
from cases.gaussian_focal_loss import EPS, exact
from saccade.losses.gaussian import gaussian_focal_loss, gaussian_focal_loss_with_logits
from saccade.triton_dispatch import served_by_triton

pytestmark = pytest.mark.interpreted

INTERPRETED = served_by_triton(torch.empty(0))
ALPHAS = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0]
# Every power in one dtype, some in the others: a GPU has a kernel to compile for each.
POWERS = [pytest.param(alpha, torch.float32, id=f"{alpha}-float32") for alpha in ALPHAS]
POWERS += [
    pytest.param(alpha, dtype, id=f"{alpha}-{str(dtype).removeprefix('torch.')}")
    for alpha in (0.0, 0.5, 2.0, 5.0)
    for dtype in (torch.float16, torch.bfloat16, torch.float64)
]
INF, NAN = math.inf, math.nan
SATURATED = [5.0, 8.0, 9.0, 12.0, 16.0, 16.625, 16.75, 18.0, 20.0, 30.0, 50.0, 80.0]
SATURATED += [87.0, 87.5, 88.5, 89.0, 95.0, 100.0, 103.0, 104.0, 110.0, 200.0, 1e3, 1e4, 3e4]

# Of one element. In float32 a logit of 100, as a power of 2, is off by up to 4e-6 and its exponential by that part of
# itself; halves are computed so and rounded once. The interpreter cuts float32 off where a GPU rounds to bfloat16.
EACH = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2**-11 + 1e-5}
EACH[torch.bfloat16] = (2**-7 if INTERPRETED else 2**-8) + 1e-5


def differentiated(call: Callable[..., Tensor], pred: Tensor, target: Tensor, **options) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient of its sum."""
    leaf = pred.detach().requires_grad_()
    loss = call(leaf, target, **options)
    (gradient,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss))
    return loss.detach(), gradient


CALLS = {False: gaussian_focal_loss, True: gaussian_focal_loss_with_logits}
each_of_logits = partial(differentiated, gaussian_focal_loss_with_logits, reduction="none")
exact_of_logits = partial(exact, with_logits=True)


def assert_each_rounded(what: str, actual: Tensor, expected: Tensor) -> None:
    """Every element is as near as its dtype lets it be. Hardware may take numbers that are not normal for 0."""
    dtype = actual.dtype
    is_half = dtype == torch.float16  # computed in float32, whose normal numbers go further down than those of half
    lost_below = torch.finfo(torch.float32 if is_half else dtype).tiny
    assert_each_near(what, actual, expected, EACH[dtype], lost_below, absolute=2**-25 if is_half else 0.0)


# ---- every element


@pytest.mark.parametrize(("alpha", "target_dtype"), POWERS)
def test_each_element_of_logits(alpha, target_dtype, device):
    small = torch.tensor([1e-1, 1e-2, 1e-3, 1e-5, 1e-7, 1e-20, 0.0])
    x = torch.cat([torch.linspace(-80, 80, 321), small, -small]).to(device)
    heights = torch.tensor([0.0, 0.25, 0.5, 0.984375, 1.0], dtype=target_dtype, device=device)
    logits, target = x[:, None].expand(-1, 5), heights.expand(len(x), 5)
    for gamma in (0.0, 0.5, 2.3, 4.0) if alpha == 2 else (4.0,):
        results = each_of_logits(logits, target, alpha=alpha, gamma=gamma)
        expected = exact_of_logits(logits, target, alpha=alpha, gamma=gamma)
        for what, actual, wanted in zip(("loss", "slope"), results, expected, strict=True):
            assert_each_near(f"{what}, gamma {gamma}", actual, wanted, 1e-5, lost_below=1e-30)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_each_element_of_probabilities(alpha, device):
    """Down to 1e-37, up to a hair below 1, and 0 and 1 themselves."""
    small = 10 ** torch.linspace(-37, -1, 73, dtype=torch.float64)
    p = torch.cat([small, torch.linspace(0, 1, 101), 1 - small[45:], torch.tensor([1 - 2**-24])]).float().to(device)
    pred, target = p[:, None].expand(-1, 3), torch.tensor([0.0, 0.5, 1.0], device=device).expand(len(p), 3)
    results = differentiated(gaussian_focal_loss, pred, target, alpha=alpha, reduction="none")
    expected = exact(pred, target, with_logits=False, alpha=alpha)
    # 1e-12 is added to a probability, and lost beside one of 1: so much of a logarithm, or of a slope, is not there.
    for what, actual, wanted in zip(("loss", "slope"), results, expected, strict=True):
        assert_each_near(what, actual, wanted, 1e-5, lost_below=1e-30, absolute=1.1e-12 * (1 + alpha))


@pytest.mark.parametrize(("alpha", "dtype"), POWERS)
def test_a_saturated_right_answer(alpha, dtype, device):
    """Its loss and slope are 0 or what they are rounded to: nothing of ``1 - p`` is left that is noise."""
    x = torch.tensor(SATURATED, device=device, dtype=dtype)
    logits, target = torch.stack([x, -x, -x], -1), torch.tensor([1.0, 0.0, 0.5], device=device).expand(len(x), 3)
    loss, slope = each_of_logits(logits, target, alpha=alpha)
    exact_loss, exact_slope = exact_of_logits(logits, target, alpha=alpha)
    assert_each_rounded("loss", loss, exact_loss)
    assert_each_rounded("slope", slope, exact_slope)
    assert (slope[:, 0] <= 0).all()
    assert (slope[:, 1:] >= 0).all()


@pytest.mark.parametrize("scale", [1, 20])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum", "num_pos"])
@pytest.mark.parametrize("with_logits", [False, True])
def test_accuracy_on_random_predictions(with_logits, reduction, scale, device):
    """2e-6: a few roundings of float32 in each element, none of a running sum."""
    rng = torch.Generator().manual_seed(0)
    pred = (torch.randn(4, 3, 50, 40, generator=rng) * scale).to(device)
    pred = pred if with_logits else pred.sigmoid().clamp(1e-4, 1 - 1e-4)
    target = torch.rand(4, 3, 50, 40, generator=rng) ** 4
    target[..., 5, 5] = 1
    target = target.to(device)
    how = {"avg_factor": "num_pos"} if reduction == "num_pos" else {"reduction": reduction}
    for options in ({}, {"alpha": 1.5, "gamma": 2.3}):
        loss, gradient = differentiated(CALLS[with_logits], pred, target, **options, **how)
        exact_loss, exact_gradient = exact(pred, target, with_logits=with_logits, **options)
        if reduction != "none":
            count = {"mean": pred.numel(), "sum": 1, "num_pos": 12 + EPS}[reduction]
            exact_loss, exact_gradient = exact_loss.sum() / count, exact_gradient / count
        assert_near("loss", loss, exact_loss, 2e-6)
        assert_near("gradient", gradient, exact_gradient, 2e-6)


def test_any_power(device):
    rng = torch.Generator().manual_seed(0)
    logits = (torch.randn(40, 7, generator=rng) * 3).to(device)
    target = torch.rand(40, 7, generator=rng)
    target[target > 0.9] = 1
    target = target.to(device)
    for alpha, gamma in torch.rand(20, 2, generator=rng).mul(6).tolist():
        for clip in (None, 0.003):
            options = {"alpha": alpha, "gamma": gamma, "clip": clip}
            results, expected = each_of_logits(logits, target, **options), exact_of_logits(logits, target, **options)
            for what, actual, wanted in zip(("loss", "slope"), results, expected, strict=True):
                assert_near(f"{what}, {options}", actual, wanted, 2e-6)


# ---- the largest logits, infinite ones, NaN, targets that are none


@pytest.mark.parametrize(("alpha", "dtype"), POWERS)
def test_the_largest_logits(alpha, dtype, device):
    """Linear on the wrong side, nothing on the right one."""
    largest = {torch.float16: 6e4, torch.float64: 1e308}.get(dtype, 3e38)
    x = torch.tensor([largest, largest / 3, 1e4, 1e3], device=device, dtype=dtype)
    heights = torch.tensor([0.0, 0.5, 1.0], device=device)
    logits, target = torch.cat([x, -x])[:, None].expand(-1, 3), heights.expand(8, 3)
    for clip in (None, 1e-4):
        loss, slope = each_of_logits(logits, target, alpha=alpha, clip=clip)
        exact_loss, exact_slope = exact_of_logits(logits, target, alpha=alpha, clip=clip)
        assert_each_rounded("loss", loss, exact_loss)
        assert_each_rounded("slope", slope, exact_slope)
        assert (loss[exact_loss == 0] == 0).all()
        assert (slope[exact_slope == 0] == 0).all()


@pytest.mark.parametrize(("alpha", "dtype"), POWERS)
def test_infinite_logits(alpha, dtype, device):
    heights = torch.tensor([0.0, 0.5, 1.0], device=device)
    logits = torch.tensor([[INF], [-INF]], device=device, dtype=dtype).expand(2, 3)
    loss, slope = each_of_logits(logits, heights.expand(2, 3), alpha=alpha)
    assert loss.tolist() == [[INF, INF, 0], [0, 0, INF]]
    assert slope.tolist() == [[1, 0.0625, 0], [0, 0, -1]]
    loss, slope = each_of_logits(logits, heights.expand(2, 3), alpha=alpha, clip=1e-4)
    far = torch.tensor([[1e4], [-1e4]], device=device, dtype=dtype).expand(2, 3)
    assert torch.equal(loss, each_of_logits(far, heights.expand(2, 3), alpha=alpha, clip=1e-4)[0])
    assert (slope == 0).all()


@pytest.mark.parametrize("with_logits", [False, True])
def test_nan_stays_in_its_element(with_logits, device):
    rng = torch.Generator().manual_seed(0)
    clean, target = torch.rand(301, 7, generator=rng).to(device), torch.rand(301, 7, generator=rng)
    target[target > 0.8] = 1
    target = target.to(device)
    nan = torch.zeros(2107, dtype=torch.bool, device=device)
    nan[[0, 700, 1023, 1024, 2106]] = True
    nan = nan.view(301, 7)
    for alpha in ALPHAS:
        how = {"alpha": alpha, "gamma": alpha}
        each = partial(differentiated, CALLS[with_logits], reduction="none", **how)
        wanted = each(clean, target)
        for pred, heights in ((clean.masked_fill(nan, NAN), target), (clean, target.masked_fill(nan, NAN))):
            if alpha == 0 and pred is clean:
                continue  # NaN ** 0 is 1: the height of no target is asked for
            for actual, right in zip(each(pred, heights), wanted, strict=True):
                assert torch.equal(actual.isnan(), nan)
                assert torch.equal(actual[~nan], right[~nan])
            total, slope = differentiated(CALLS[with_logits], pred, heights, avg_factor="num_pos", **how)
            assert total.isnan()
            assert torch.equal(slope.isnan(), nan)


def test_nan_is_not_clipped(device):
    """In a clamped logit it would be lost."""
    logits = torch.tensor([NAN, 1.0, 50.0], device=device)
    for height in (0.0, 1.0):
        loss, slope = each_of_logits(logits, torch.full((3,), height, device=device), clip=1e-4)
        assert loss.isnan().tolist() == [True, False, False]
        assert slope.isnan().tolist() == [True, False, False]


@pytest.mark.parametrize("gamma", [0.0, 0.5, 3.5, 4.0])
@pytest.mark.parametrize("with_logits", [False, True])
def test_targets_outside_the_unit_interval(gamma, with_logits, device):
    """``1 - t`` is clamped to [0, 1]: above a peak is as good as a hair below it; and ``0 ** 0`` is 1."""
    pred = torch.full((6,), 0.5, device=device)
    target = torch.tensor([80.0, 1.5, INF, -3.0, -INF, 0.0], device=device)
    loss, slope = differentiated(CALLS[with_logits], pred, target, gamma=gamma, reduction="none")
    for actual in (loss, slope):
        assert (actual[3:5] == actual[5]).all()
        assert (actual[:3] == (actual[5] if gamma == 0 else 0)).all()
        assert actual[5] > 0


def test_a_float64_target_a_hair_below_a_peak_is_none(device):
    """Also where positives are counted: compared in its own dtype, in which it is not 1."""
    target = torch.full((2000,), 1 - 1e-12, dtype=torch.float64)
    target[::500] = 1
    pred, target = torch.zeros(2000, device=device), target.to(device)
    loss, slope = differentiated(gaussian_focal_loss_with_logits, pred, target, avg_factor="num_pos", gamma=0.0)
    # All have the loss of a logit of 0, and are divided by the four peaks among them.
    assert loss.item() == pytest.approx(2000 * math.log(2) / 4 / 4, rel=1e-6)
    assert (slope < 0).sum() == 4


# ---- memory


def test_what_lies_around_the_inputs_is_not_used(device):
    """Every input is cut out of a larger tensor that is NaN elsewhere, or full of positives."""
    rng = torch.Generator().manual_seed(0)
    logits, target = torch.randn(61, 19, generator=rng).to(device), torch.rand(61, 19, generator=rng)
    target[target > 0.9] = 1
    target = target.to(device)
    weight, row_weight = torch.rand(61, 19, generator=rng).to(device), torch.rand(19, generator=rng).to(device)
    seed = torch.rand(61, 19, generator=rng).to(device)

    def cut(values: Tensor, fill: float = NAN) -> Tensor:
        around = values.new_full([size + 5 for size in values.shape], fill)
        inside = around[(slice(2, -3),) * values.dim()]
        return inside.copy_(values)

    def run(cut: Callable[..., Tensor], weight: Tensor, reduction: str) -> list[Tensor]:
        x, w = cut(logits).requires_grad_(), cut(weight).requires_grad_()
        how = {"reduction": "none"} if reduction == "none" else {"avg_factor": "num_pos"}
        loss = gaussian_focal_loss_with_logits(x, cut(target, 1), weight=w, **how)
        grad_output = cut(seed) if reduction == "none" else torch.ones_like(loss)
        return [loss.detach(), *torch.autograd.grad(loss, (x, w), grad_output)]

    for reduction in ("none", "num_pos"):
        for values in (weight, row_weight):
            expected = run(lambda values, *_: values.clone(), values, reduction)
            for k, (actual, wanted) in enumerate(zip(run(cut, values, reduction), expected, strict=True)):
                assert_near(f"result {k}", actual, wanted, 1e-6)  # other strides may be another order of sums


LAYOUTS = {  # what is in memory, and how it is seen
    "contiguous": ((2, 3, 4, 5), lambda x: x),
    "channels-last": ((2, 4, 5, 3), lambda x: x.permute(0, 3, 1, 2)),
    "channels-to-the-end": ((2, 3, 4, 5), channels_to_the_end),
    "transposed": ((5, 6), lambda x: x.mT),
    "columns": ((6, 9), lambda x: x[:, 2:7]),
    "every-other": ((6, 10), lambda x: x[:, ::2]),
    "expanded": ((1, 5), lambda x: x.expand(6, 5)),
    "vector": ((5,), lambda x: x),
    "scalar": ((), lambda x: x),
}


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("with_logits", [False, True])
def test_the_order_in_memory_is_that_of_the_predictions(with_logits, layout, reduction, device):
    """Whatever that of the targets: the gradient need not be copied on its way back."""
    shape, view = LAYOUTS[layout]
    rng = torch.Generator().manual_seed(0)
    leaf = torch.rand(shape, generator=rng).to(device).requires_grad_()
    pred = view(leaf)
    target = torch.rand(pred.shape, generator=rng).round(decimals=1).to(device)
    loss = CALLS[with_logits](pred, target, reduction=reduction)
    if reduction == "none":
        assert loss.stride() == torch.empty_like(pred).stride()
    (gradient,) = torch.autograd.grad(loss.sum(), pred)
    assert gradient.stride() == torch.empty_like(pred).stride()
    losses, slopes = exact(pred.detach(), target, with_logits=with_logits)
    count = losses.numel() if reduction == "mean" else 1
    assert_near("loss", loss, losses if reduction == "none" else losses.mean(), 2e-6)
    assert_near("gradient", gradient, slopes / count, 2e-6)


@pytest.mark.parametrize("reduction", ["none", "num_pos"])
def test_the_gradient_of_a_head_is_contiguous(reduction, device):
    rng = torch.Generator().manual_seed(0)
    head = torch.randn(2, 6, 4, 5, generator=rng).to(device).requires_grad_()
    target = torch.rand(2, 4, 5, 6, generator=rng).to(device)
    how = {"reduction": "none"} if reduction == "none" else {"avg_factor": "num_pos"}
    loss = gaussian_focal_loss_with_logits(channels_to_the_end(head), target, **how)
    # As a loss that is weighted afterwards has it: contiguous, whatever the order of the result.
    seed = torch.rand(loss.shape, generator=rng).to(device)
    (gradient,) = torch.autograd.grad(loss, head, seed)
    assert gradient.stride() == head.stride()


# ---- sizes


SIZES = [1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 257, 511, 513, 1023, 1024, 1025, 2047, 2049]


@pytest.mark.parametrize("size", SIZES)
def test_sizes_about_those_of_blocks(size, device):
    """Contiguous, and in rows whose strides differ from those of the target; the last element is a positive."""
    rng = torch.Generator().manual_seed(0)
    for shape in ((size,), (3, size), (size, 3)):
        logits = torch.randn(shape, generator=rng).to(device)
        target = torch.rand(shape, generator=rng)
        target.view(-1)[-1] = 1
        target = target.to(device)
        for values in (logits, logits.mT.contiguous().mT if logits.dim() > 1 else logits):
            loss, gradient = differentiated(gaussian_focal_loss_with_logits, values, target, avg_factor="num_pos")
            losses, slopes = exact_of_logits(logits, target)
            assert_near(f"loss of {shape}", loss, losses.sum() / (1 + EPS), 2e-6)
            assert_near(f"gradient of {shape}", gradient, slopes / (1 + EPS), 2e-6)


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0), (2, 0, 4, 4)], ids=str)
@pytest.mark.parametrize("with_logits", [False, True])
def test_nothing_at_all(with_logits, shape, device):
    """Every reduction, forward and backward; of a mean over nothing NaN comes, and no gradient."""
    target = torch.zeros(shape, device=device)
    for reduction, avg_factor in (
        ("none", None),
        ("sum", None),
        ("mean", None),
        ("mean", 3),
        ("mean", torch.ones(1, device=device)),
        ("mean", "num_pos"),
    ):
        for weight_shape in (None, (), shape[-1:], shape):
            leaves = [torch.zeros(shape, device=device, requires_grad=True)]
            if weight_shape is not None:
                leaves.append(torch.ones(weight_shape, device=device, requires_grad=True))
            weight = leaves[1] if len(leaves) > 1 else None
            loss = CALLS[with_logits](leaves[0], target, weight=weight, reduction=reduction, avg_factor=avg_factor)
            gradients = torch.autograd.grad(loss, leaves, torch.ones_like(loss))
            assert [gradient.shape for gradient in gradients] == [leaf.shape for leaf in leaves]
            if reduction == "none":
                assert loss.shape == shape
            elif avg_factor is None and reduction == "mean":
                assert loss.isnan()
            else:
                assert loss == 0
                assert all((gradient == 0).all() for gradient in gradients)  # of weights that are broadcast, too
