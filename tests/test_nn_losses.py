"""Loss modules: the contracts of mmdet and mmcv, with the numbers of the spec."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from saccade.losses.focal import sigmoid_focal_loss
from saccade.losses.gaussian import gaussian_focal_loss
from saccade.nn.losses import FocalLoss, GaussianFocalLoss, SigmoidFocalLoss, SoftmaxFocalLoss

EPS = 1.1920929e-07
X = [[2.0, -1.0, 0.5], [-3.0, 0.0, 1.0], [0.25, -0.75, 4.0]]


@pytest.fixture
def x(device):
    return torch.tensor(X, device=device, dtype=torch.float64)


@pytest.fixture
def labels(device):
    return torch.tensor([0, 3, 2], device=device)


def close(actual, expected, rtol=1e-12):
    expected = torch.as_tensor(expected, dtype=actual.dtype, device=actual.device)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=1e-12)


# ---- FocalLoss


def test_focal_loss_means_over_elements(x, labels):
    loss = FocalLoss(use_sigmoid=True, gamma=2.0, alpha=0.25, reduction="mean", loss_weight=1.0)
    assert loss(x, labels).item() == pytest.approx(0.1313990234, abs=5e-11)
    assert FocalLoss(loss_weight=2.0)(x, labels).item() == pytest.approx(2 * 0.1313990234, abs=1e-10)
    assert FocalLoss(reduction="sum")(x, labels).item() == pytest.approx(1.1825912104, abs=5e-11)
    assert loss(x, labels, reduction_override="sum").item() == pytest.approx(1.1825912104, abs=5e-11)
    assert loss(x, labels, None, None, "none").shape == (3, 3)
    close(FocalLoss(reduction="none", loss_weight=3.0)(x, labels), 3 * loss(x, labels, reduction_override="none"))


def test_focal_loss_divides_by_avg_factor(x, labels, device):
    total = FocalLoss(reduction="sum")(x, labels)
    for loss, eps in [(FocalLoss(loss_weight=2.0), EPS), (FocalLoss(loss_weight=2.0, avg_factor_eps=0.0), 0)]:
        for factor, shape in [
            (4.0, ()),
            (torch.tensor(4, device=device), ()),
            (torch.tensor([4.0], device=device), (1,)),
        ]:
            result = loss(x, labels, avg_factor=factor)
            assert result.shape == shape
            close(result.reshape(()), 2 * total / (4 + eps))
    close(FocalLoss()(x, labels, avg_factor=0), total / EPS)
    plain = FocalLoss(avg_factor_eps=0.0)
    for zero in (0, 0.0, torch.tensor(0.0, device=device)):
        assert plain(x, labels, avg_factor=zero) == math.inf
        assert plain(x[:0], labels[:0], avg_factor=zero).isnan()
    close(FocalLoss(reduction="none")(x, labels, avg_factor=7), FocalLoss(reduction="none")(x, labels))


def test_focal_loss_takes_negatives_of_denoising(x, device):
    background = FocalLoss(reduction="none")(x, torch.tensor([0, 3, 3], device=device))
    for labels in ([0, -3, -1], [0, 4, 1000]):
        close(FocalLoss(reduction="none")(x, torch.tensor(labels, device=device)), background)


def test_focal_loss_weights(x, labels, device):
    elements = FocalLoss(reduction="none")(x, labels)
    row = torch.tensor([1.0, 0.0, 2.0], device=device)
    by_element = torch.arange(9.0, device=device)
    loss = FocalLoss(reduction="none")
    for weight, factor in [
        (row, row[:, None]),
        (row[:, None], row[:, None]),
        (row.bool(), row.bool()[:, None]),
        (by_element.view(3, 3), by_element.view(3, 3)),
        (by_element, by_element.view(3, 3)),
    ]:
        close(loss(x, labels, weight), elements * factor)
    close(FocalLoss()(x, labels, row.bool()), (elements[0].sum() + elements[2].sum()) / 9)  # rows of weight 0 count
    for shape in [(), (2,), (3, 2), (1, 2), (3, 1, 3)]:
        with pytest.raises(ValueError, match="weight: expected the shape of pred"):
            loss(x, labels, torch.ones(shape, device=device))
    with pytest.raises(TypeError, match="weight: expected"):
        loss(x, labels, 2.0)


def test_focal_loss_takes_dense_targets(x, labels, device):
    by_labels = FocalLoss(reduction="none")(x, labels)
    one_hot = torch.nn.functional.one_hot(labels, 4)[:, :3]
    for target in (one_hot, one_hot.bool(), one_hot.float(), one_hot.int()):
        close(FocalLoss(reduction="none")(x, target), by_labels)
    soft = torch.full((2, 3, 4), 0.3, device=device)
    assert FocalLoss()(torch.zeros(2, 3, 4, device=device), soft).shape == ()


def test_focal_loss_of_probabilities(x, labels):
    activated = FocalLoss(activated=True, reduction="none")
    close(activated(x.sigmoid(), labels), FocalLoss(reduction="none")(x, labels), rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_focal_loss_of_half_is_float32(dtype, x, labels, device):
    x = x.to(dtype).requires_grad_()
    loss = FocalLoss()(x, labels, avg_factor=torch.tensor(1.0, device=device))
    assert loss.dtype == torch.float32
    loss.backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (NotImplementedError, "use_sigmoid", {"use_sigmoid": False}),
        (ValueError, "alpha: expected a number in", {"alpha": -1}),
        (ValueError, "alpha: expected a number in", {"alpha": 1.5}),
        (ValueError, "gamma: expected a finite number >= 0", {"gamma": -0.5}),
        (ValueError, "reduction: expected 'none'", {"reduction": "average"}),
        (TypeError, "loss_weight: expected a number", {"loss_weight": None}),
        (ValueError, "avg_factor_eps: expected a finite number >= 0", {"avg_factor_eps": -1.0}),
    ],
)
def test_focal_loss_constructor_errors(error, message, options):
    with pytest.raises(error, match=message):
        FocalLoss(**options)


def test_focal_loss_call_errors():
    pred, labels = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
    loss = FocalLoss()
    with pytest.raises(ValueError, match="reduction_override: expected 'none', 'mean' or 'sum', got 'average'"):
        loss(pred, labels, reduction_override="average")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="avg_factor: expected None with reduction 'sum'"):
        loss(pred, labels, avg_factor=2, reduction_override="sum")
    with pytest.raises(ValueError, match=r"pred: expected shape \(N, C\), got \(2, 4, 3\)"):
        loss(pred.expand(2, 4, 3), labels.expand(2, 4))
    with pytest.raises(ValueError, match=r"target: .*\(4, 3\).*got \(5,\)"):
        loss(pred, labels.new_zeros(5))
    with pytest.raises(TypeError, match=r"target: expected int32 or int64.*got torch\.float32"):
        loss(pred, labels.float())
    with pytest.raises(TypeError, match=r"pred: expected a torch\.Tensor, got list"):
        loss([[0.0]], labels)
    with pytest.raises(TypeError, match=r"target: expected a torch\.Tensor, got list"):
        loss(pred, [0, 1, 2, 0])


# ---- mmcv's modules


def test_sigmoid_focal_loss_means_over_rows(x, labels, device):
    assert SigmoidFocalLoss(2.0, 0.25)(x, labels).item() == pytest.approx(0.3941970701, abs=5e-11)
    weight = torch.tensor([0.5, 2.0, 1.5], device=device)
    for loss, expected in [
        (SigmoidFocalLoss(2.0, 0.25, weight, "sum"), 1.6283210292),
        (SigmoidFocalLoss(2.0, 0.25, weight), 1.6283210292 / 3),
    ]:
        assert loss(x, torch.tensor([0, 1, 2], device=device)).item() == pytest.approx(expected, abs=5e-11)
    assert SigmoidFocalLoss(2.0, 0.25, reduction="none")(x, labels).shape == (3, 3)
    assert SigmoidFocalLoss(2.0, 0.25)(x[:0], labels[:0]).isnan()


def test_softmax_focal_loss_means_over_rows(x, device):
    labels = torch.tensor([0, 1, 2], device=device)
    assert SoftmaxFocalLoss(2.0, 0.25)(x, labels).item() == pytest.approx(0.0605841275, abs=5e-11)
    assert SoftmaxFocalLoss(2.0, 0.25, reduction="none")(x, labels).shape == (3,)
    weight = torch.tensor([1.0, 0.0, 0.0], device=device)
    loss = SoftmaxFocalLoss(2.0, 0.25, weight, "sum")(x, labels)
    assert loss.item() == pytest.approx(0.0027731875, abs=5e-11)


@pytest.mark.parametrize("module", [SigmoidFocalLoss, SoftmaxFocalLoss])
def test_class_weight_is_a_buffer(module):
    assert not module(2.0, 0.25).state_dict()
    loss = module(2.0, 0.25, torch.ones(3))
    assert list(loss.state_dict()) == ["weight"]
    assert not list(loss.parameters())


@pytest.mark.parametrize("module", [SigmoidFocalLoss, SoftmaxFocalLoss])
def test_mmcv_module_errors(module):
    with pytest.raises(TypeError, match="gamma"):
        module()  # gamma and alpha are required
    for options, message in [
        ({"gamma": -1, "alpha": 0.25}, "gamma: expected a finite number >= 0"),
        ({"gamma": 2.0, "alpha": -1}, "alpha: expected a number in"),
        ({"gamma": 2.0, "alpha": 0.25, "reduction": "average"}, "reduction: expected 'none'"),
    ]:
        with pytest.raises(ValueError, match=message):
            module(**options)
    pred, labels = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
    loss = module(2.0, 0.25)
    with pytest.raises(ValueError, match=r"input: expected shape \(N, C\), got \(2, 4, 3\)"):
        loss(pred.expand(2, 4, 3), labels.expand(2, 4))
    with pytest.raises(ValueError, match=r"target: expected one label .*\(4, 3\), got \(4, 3\)"):
        loss(pred, labels[:, None].expand(4, 3))
    with pytest.raises(TypeError, match=r"target: expected int32 or int64, got torch\.float32"):
        loss(pred, labels.float())
    with pytest.raises(ValueError, match=r"class_weight: expected shape \(C\) with C=3, got \(2,\)"):
        module(2.0, 0.25, torch.ones(2))(pred, labels)


# ---- GaussianFocalLoss

PRED, TARGET = [[0.9, 0.2], [0.3, 0.6], [0.1, 0.05]], [[1.0, 0.0], [0.5, 0.9], [0.0, 0.0]]


@pytest.fixture
def maps(device):
    return torch.tensor(PRED, device=device, dtype=torch.float64), torch.tensor(
        TARGET, device=device, dtype=torch.float64
    )


def index(*values, device):
    return torch.tensor(values, device=device, dtype=torch.int64)


def test_gaussian_focal_loss(maps, device):
    pred, target = maps
    module = GaussianFocalLoss(alpha=2.0, gamma=4.0, reduction="mean", loss_weight=2.0)
    close(module(pred, target), 2 * gaussian_focal_loss(pred, target))
    close(module(pred, target, reduction_override="sum"), 2 * gaussian_focal_loss(pred, target, reduction="sum"))
    close(module(pred, target, avg_factor="num_pos"), 2 * gaussian_focal_loss(pred, target, avg_factor=1))
    weight = torch.tensor([[1.0], [0.0], [2.0]], device=device)
    close(module(pred, target, weight=weight), 2 * gaussian_focal_loss(pred, target, weight=weight))
    expected = 2 * gaussian_focal_loss(pred, target, weight=weight, avg_factor=2)
    close(module(pred, target, None, None, weight, 2), expected)
    plain = GaussianFocalLoss(avg_factor_eps=0.0)
    close(plain(pred, target, avg_factor=2), gaussian_focal_loss(pred, target, reduction="sum") / 2)
    sides = GaussianFocalLoss(pos_weight=0.25, neg_weight=0.75)
    close(sides(pred, target), gaussian_focal_loss(pred, target, pos_weight=0.25, neg_weight=0.75))


def test_gaussian_focal_loss_with_listed_positives(maps, device):
    pred, target = maps
    inds, labels = index(0, 1, device=device), index(0, 1, device=device)
    module = GaussianFocalLoss(pos_weight=0.25, neg_weight=0.75)
    assert module(pred, target, inds, labels).item() == pytest.approx(0.0118665711, abs=5e-11)
    plain = GaussianFocalLoss(pos_weight=0.25, neg_weight=0.75, avg_factor_eps=0.0)
    for factor in (2, torch.tensor([2.0], device=device)):
        assert plain(pred, target, inds, labels, avg_factor=factor).item() == pytest.approx(0.0149032869, abs=5e-11)
    ignored = torch.zeros(3, 2, device=device)
    assert module(pred, target, inds, labels, ignored).item() == pytest.approx(0.0118665711, abs=5e-11)


def test_listed_positives_by_hand(maps, device):
    """Repeats count twice, rows from the end count, and what does not exist is skipped but counts in the mean."""
    pred, target = maps
    pred.requires_grad_()
    module = GaussianFocalLoss(neg_weight=0.0, reduction="sum")

    def term(p):
        return -math.log(p + 1e-12) * (1 - p) ** 2

    def slope(p):
        return -((1 - p) ** 2) / p + 2 * (1 - p) * math.log(p)

    inds = index(0, 0, -1, 3, -4, 0, 0, device=device)
    labels = index(1, 1, 0, 0, 0, 2, -1, device=device)
    loss = module(pred, target, inds, labels)
    close(loss, 2 * term(0.2) + term(0.1))
    close(module(pred, target, inds, labels, reduction_override="mean"), loss.item() / 7)
    close(torch.autograd.grad(loss, pred)[0], [[0, 2 * slope(0.2)], [0, 0], [slope(0.1), 0]], rtol=1e-9)


def test_no_listed_positives(maps, device):
    pred, target = maps
    none = index(device=device)
    module = GaussianFocalLoss(pos_weight=5.0)
    close(module(pred, target, none, none), gaussian_focal_loss(pred, target, pos_weight=0.0))
    assert module(pred[:0], target[:0], none, none, reduction_override="sum") == 0
    zero = index(0, device=device)
    assert module(pred[:0], target[:0], zero, zero, reduction_override="sum") == 0


def test_gaussian_focal_loss_errors():
    pred, target, inds = torch.full((3, 2), 0.5), torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64)
    module = GaussianFocalLoss()
    listed: dict[str, Any] = {"pos_inds": inds, "pos_labels": inds}
    for error, message, arguments in [
        (ValueError, "pos_labels: expected a tensor.*got None", {"pos_inds": inds}),
        (ValueError, "pos_inds: expected a tensor.*got None", {"pos_labels": inds}),
        (ValueError, r"pos_labels: expected .* M=2, got \(1,\)", {"pos_inds": inds, "pos_labels": inds[:1]}),
        (TypeError, "pos_inds: expected int32 or int64", {"pos_inds": inds.float(), "pos_labels": inds}),
        (ValueError, "'mean' or 'sum' with pos_inds", {**listed, "reduction_override": "none"}),
        (ValueError, "avg_factor: .*got 'num_pos'", {**listed, "avg_factor": "num_pos"}),
        (ValueError, "reduction_override: expected", {"reduction_override": "average"}),
        (ValueError, "avg_factor: expected None", {"reduction_override": "sum", "avg_factor": 1}),
    ]:
        with pytest.raises(error, match=message):
            module(pred, target, **arguments)
    bad: list[dict[str, Any]] = [{"alpha": -1}, {"gamma": -1}, {"reduction": "average"}, {"pos_weight": math.nan}]
    for options in bad:
        with pytest.raises(ValueError, match="expected"):
            GaussianFocalLoss(**options)


# ---- compiled


def test_modules_compile_without_a_graph_break(device):
    pred = torch.rand(6, 3, device=device, requires_grad=True)
    labels, inds = torch.tensor([0, 1, 2, 3, -1, 9], device=device), torch.tensor([0, 5], device=device)
    target = torch.rand(6, 3, device=device)
    factor = torch.tensor([2.0], device=device)
    calls = [
        lambda: FocalLoss(loss_weight=2.0)(pred, labels, labels > 0, factor),
        lambda: FocalLoss()(pred, labels, avg_factor=max(1, pred.shape[0])),
        lambda: SigmoidFocalLoss(2.0, 0.25)(pred, labels),
        lambda: SoftmaxFocalLoss(2.0, 0.25)(pred, labels),
        lambda: GaussianFocalLoss()(pred, target, inds, inds, avg_factor=factor),
        lambda: sigmoid_focal_loss(pred, labels, avg_factor=float(pred.shape[1])),
    ]
    for call in calls:
        expected = call()
        slopes = torch.autograd.grad(expected.sum(), pred)[0]
        torch._dynamo.reset()
        loss = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss.sum(), pred)[0], slopes)


def test_integer_targets_of_the_shape_of_the_predictions_are_one_hot():
    pred = torch.randn(4, 3)
    labels = torch.tensor([0, 2, 1, 1])
    one_hot = torch.nn.functional.one_hot(labels, 3)
    torch.testing.assert_close(FocalLoss()(pred, one_hot), FocalLoss()(pred, labels))
    torch.testing.assert_close(FocalLoss()(pred, one_hot * 255), FocalLoss()(pred, labels))
    with pytest.raises(ValueError, match=r"pred: expected shape \(N, C\)"):
        FocalLoss()(pred[:, 0], labels)


def test_numbers_of_numpy_are_numbers():
    pred, labels = torch.randn(4, 3), torch.tensor([0, 2, 1, 3])
    expected = FocalLoss(alpha=0.25, loss_weight=2.0)(pred, labels, avg_factor=3.0)
    for kind in (np.float32, np.float64):
        loss = FocalLoss(alpha=kind(0.25), loss_weight=kind(2))(pred, labels, avg_factor=kind(3))
        torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(FocalLoss(loss_weight=2.0)(pred, labels, avg_factor=np.int64(3)), expected)
