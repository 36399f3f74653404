"""Cases of the focal losses; the oracles are the textbook formulas, with one-hot targets and autograd."""

from collections.abc import Callable
from functools import partial
from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor

from cases import Case
from saccade.losses.focal import sigmoid_focal_loss, softmax_focal_loss

EPS = 1.1920929e-07  # what mmdet adds to an avg_factor

View = Callable[[Tensor], Tensor]


def on_views(
    call: Callable[..., Tensor], views: tuple[View | None, ...], view_of_result: View | None, *inputs: Tensor
) -> Tensor:
    """``call`` with views of the inputs, by position, and a view of its result.

    The inputs of a case are copied before each use, and a copy has no strides of 0 and no gaps.
    """
    result = call(*(value if view is None else view(value) for value, view in zip_longest(inputs, views)))
    return result if view_of_result is None else view_of_result(result)


def reduced(loss: Tensor, reduction: str, avg_factor: Tensor | float | None) -> Tensor:
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if avg_factor is None:
        return loss.mean()
    if isinstance(avg_factor, Tensor):
        avg_factor = avg_factor.to(loss.dtype)  # a small number beside an integer tensor would be lost in float32
    return loss.sum() / (avg_factor + EPS)


def row_factor(target: Tensor, class_weight: Tensor) -> Tensor:
    """The class weight of each label, 1 for background."""
    classes = len(class_weight)
    factors = [class_weight[label] if 0 <= label < classes else class_weight.new_ones(()) for label in target.flatten()]
    return torch.stack(factors).view(target.shape)


def sigmoid_oracle(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    avg_factor: Tensor | float | None = None,
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
    activated: bool = False,
    reduction: str = "mean",
) -> Tensor:
    t = target.to(logits.dtype)
    if target.dim() < logits.dim():
        t = torch.stack([(target == c).to(logits.dtype) for c in range(logits.shape[-1])] or [logits[..., 0:0]], -1)
        t = t.view(logits.shape)
    if activated:
        p, not_p, log_p, log_not_p = logits, 1 - logits, logits.log(), (1 - logits).log()
    else:
        p, not_p, log_p, log_not_p = logits.sigmoid(), (-logits).sigmoid(), F.logsigmoid(logits), F.logsigmoid(-logits)
    balance = 1 if alpha < 0 else alpha * t + (1 - alpha) * (1 - t)
    loss = -balance * (t * not_p + (1 - t) * p) ** gamma * (t * log_p + (1 - t) * log_not_p)
    if class_weight is not None:
        loss = loss * row_factor(target, class_weight)[..., None]
    if weight is not None:
        loss = loss * (weight[..., None] if weight.dim() < logits.dim() else weight)
    return reduced(loss, reduction, avg_factor)


def softmax_oracle(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None = None,
    avg_factor: Tensor | float | None = None,
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
    reduction: str = "mean",
) -> Tensor:
    losses = []
    for row, label in zip(logits.reshape(target.numel(), -1) if logits.numel() else [], target.flatten(), strict=False):
        if 0 <= label < len(row):
            log_p = row[label] - row.logsumexp(0)
            factor = alpha if class_weight is None else alpha * class_weight[label]
            losses.append(-factor * (1 - log_p.exp()) ** gamma * log_p)
        else:
            losses.append(row.new_zeros(()))
    loss = torch.stack(losses) if losses else logits.new_zeros(target.shape)
    return reduced(loss.view(target.shape), reduction, avg_factor)


def softplus(x: Tensor) -> Tensor:
    """``log(1 + exp(x))``; torch's own drops what is small beside x."""
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))


def sigmoid_exact(
    logits: Tensor, target: Tensor, *, alpha: float = 0.25, gamma: float = 2.0, activated: bool = False
) -> tuple[Tensor, Tensor]:
    """Every element's loss and slope in float64, from closed forms: small ones are as accurate as large ones.

    Autograd of the formulas above is not: it takes ``1 - p`` of a ``p`` that is rounded to 1. Logits are finite.
    """
    x = logits.double()
    t = target.double()
    if target.dim() < logits.dim():
        t = (target[..., None] == torch.arange(logits.shape[-1], device=logits.device)).double()
    if activated:
        p, not_p, log_p, log_not_p = x, 1 - x, x.log().clamp(min=-100), torch.log1p(-x).clamp(min=-100)
    else:
        p, not_p, log_p, log_not_p = x.sigmoid(), (-x).sigmoid(), -softplus(-x), -softplus(x)
    balance = 1 if alpha < 0 else alpha * t + (1 - alpha) * (1 - t)
    error = t * not_p + (1 - t) * p
    entropy = -(t * log_p + (1 - t) * log_not_p)
    power_slope = torch.where(error > 0, gamma * error ** (gamma - 1), 0) * (1 - 2 * t)
    if activated:
        slope = power_slope * entropy + error**gamma * (p - t) / (p * not_p).clamp(min=1e-12)
    else:
        slope = power_slope * p * not_p * entropy + error**gamma * ((1 - t) * p - t * not_p)
    return balance * error**gamma * entropy, balance * slope


def softmax_exact(logits: Tensor, target: Tensor, *, alpha: float = 0.25, gamma: float = 2.0) -> tuple[Tensor, Tensor]:
    """Every row's loss and its gradient in float64, as accurate where small: of how far the label's logit lies behind.

    With ``z`` that distance from the log-sum-exp of the row's other logits, the label's ``1 - p`` is ``sigmoid(z)``.
    """
    x = logits.double()
    classes = torch.arange(logits.shape[-1], device=logits.device)
    at_label = target[..., None] == classes
    others = x.masked_fill(at_label, -torch.inf)
    z = others.logsumexp(-1, keepdim=True) - x.masked_fill(~at_label, -torch.inf).amax(-1, keepdim=True)
    error, cost = z.sigmoid(), softplus(z)
    rate = alpha * error**gamma * (error + gamma * (-z).sigmoid() * cost)
    share = torch.where(at_label, -1, others.softmax(-1))
    inside = at_label.any(-1)
    return torch.where(inside, (alpha * error**gamma * cost)[..., 0], 0), torch.where(
        inside[..., None], rate * share, 0
    )


def sigmoid_call(logits, target, weight=None, class_weight=None, avg_factor=None, **options) -> Tensor:
    return sigmoid_focal_loss(
        logits, target, weight=weight, class_weight=class_weight, avg_factor=avg_factor, **options
    )


def softmax_call(logits, target, class_weight=None, avg_factor=None, **options) -> Tensor:
    return softmax_focal_loss(logits, target, class_weight=class_weight, avg_factor=avg_factor, **options)


def make(
    *shape: int,
    logits_as: View | None = None,
    target: str = "labels",  # labels, int32, wide, background, bool, soft, hard (0 and 1 as floating point)
    target_shape: tuple[int, ...] | None = None,
    weight: tuple[int, ...] | None = None,
    weight_kind: str = "variable",  # variable, constant, bool, int
    class_weight: bool = False,
    avg_factor: Tensor | float | None = None,
    activated: bool = False,
    extreme: bool = False,
    constant_logits: bool = False,
) -> tuple:
    """(logits, target, weight, class_weight, avg_factor); labels lie on both sides of [0, C).

    Shapes are those in memory. ``logits_as`` says how the operator will see the logits; it sees the target as
    ``target_shape`` or through a view of that, and so the weight.
    """
    rng = torch.Generator().manual_seed(sum(shape))
    logits = torch.randn(*shape, generator=rng) * 3
    if extreme:
        logits.view(-1)[:4] = torch.tensor([100.0, -100.0, 40.0, -40.0])
    if activated:
        logits = logits.sigmoid() * 0.98 + 0.01
    *rows, classes = shape if logits_as is None else logits_as(logits).shape
    if target in ("labels", "int32", "wide", "background"):
        targets = torch.randint(0, classes + 1, target_shape or rows, generator=rng)
        if target == "background":
            targets.fill_(classes)
        else:
            targets.view(-1)[1:4] = torch.tensor([-1, -3, classes + 4])[: max(0, targets.numel() - 1)]
        if target == "wide":  # classes, if one looks at the lower 32 bits alone
            targets.view(-1)[4:8] = torch.tensor([2**32, -(2**32) + 1, 2**40 + 2, -(2**63)])
        targets = targets.int() if target == "int32" else targets
    else:
        targets = torch.rand(target_shape or (*rows, classes), generator=rng)
        if target != "soft":
            targets = (targets > 0.6) if target == "bool" else (targets > 0.6).float()
    weights = None
    if weight is not None:
        weights = torch.rand(weight, generator=rng)
        if weight_kind in ("bool", "int"):
            weights = weights > 0.3 if weight_kind == "bool" else (weights * 4).int()
        weights.requires_grad_(weight_kind == "variable")
    return (
        logits.requires_grad_(not constant_logits),
        targets,
        weights,
        torch.rand(classes, generator=rng) + 0.5 if class_weight else None,
        avg_factor,
    )


def _case(
    name: str,
    call: Callable[..., Tensor],
    oracle: Callable[..., Tensor],
    inputs: Callable[[], tuple],
    views: tuple[View | None, ...],
    view_of_result: View | None,
) -> Case:
    if any(views) or view_of_result:
        call, oracle = (partial(on_views, function, views, view_of_result) for function in (call, oracle))
    return Case(name, call, inputs, oracle)


def _sigmoid(
    name: str,
    *shape: int,
    alpha=0.25,
    gamma=2.0,
    reduction="mean",
    activated=False,
    logits_as: View | None = None,
    target_as: View | None = None,
    weight_as: View | None = None,
    result_as: View | None = None,
    **inputs,
) -> Case:
    options = {"alpha": alpha, "gamma": gamma, "reduction": reduction, "activated": activated}
    return _case(
        f"sigmoid_focal_loss/{name}",
        partial(sigmoid_call, **options),
        partial(sigmoid_oracle, **options),
        partial(make, *shape, logits_as=logits_as, activated=activated, **inputs),
        (logits_as, target_as, weight_as),
        result_as,
    )


def _softmax_inputs(*shape: int, **inputs) -> tuple:
    logits, target, _, class_weight, avg_factor = make(*shape, **inputs)
    return logits, target, class_weight, avg_factor


def _softmax(
    name: str,
    *shape: int,
    alpha=0.25,
    gamma=2.0,
    reduction="mean",
    logits_as: View | None = None,
    target_as: View | None = None,
    result_as: View | None = None,
    **inputs,
) -> Case:
    options = {"alpha": alpha, "gamma": gamma, "reduction": reduction}
    return _case(
        f"softmax_focal_loss/{name}",
        partial(softmax_call, **options),
        partial(softmax_oracle, **options),
        partial(_softmax_inputs, *shape, logits_as=logits_as, **inputs),
        (logits_as, target_as),
        result_as,
    )


def channels_to_the_end(head: Tensor) -> Tensor:
    """(B, C, H, W) seen as (B, H, W, C)."""
    return head.permute(0, 2, 3, 1)


def anchors_of(head: Tensor, anchors: int) -> Tensor:
    """(B, A * C, H, W) seen as (B, H, W, A, C), as RetinaNet has it."""
    return head.unflatten(1, (anchors, -1)).permute(0, 3, 4, 1, 2)


CASES = [
    _sigmoid("labels", 9, 5),
    _sigmoid("int32-labels-of-a-batch", 2, 3, 4, target="int32", reduction="none"),
    _sigmoid("one-row", 6, reduction="sum"),
    _sigmoid("background", 4, 3, target="background"),
    _sigmoid("class-weight", 9, 5, class_weight=True, avg_factor=2.5),
    _sigmoid("row-weight", 9, 5, weight=(9,), avg_factor=torch.tensor(4.0)),
    _sigmoid("bool-row-weight", 9, 5, weight=(9,), weight_kind="bool", avg_factor=torch.tensor([4.0])),
    _sigmoid("column-weight", 2, 5, 3, weight=(2, 5, 1), class_weight=True, reduction="none"),
    _sigmoid("element-weight", 9, 5, weight=(9, 5), reduction="none"),
    _sigmoid("soft", 5, 4, target="soft", weight=(5, 4), reduction="sum"),
    _sigmoid("soft-half-power", 5, 4, target="soft", gamma=0.5, alpha=-1.0),
    _sigmoid("hard", 5, 4, target="hard", gamma=1.5, reduction="none"),
    _sigmoid("bool", 5, 4, target="bool", gamma=5.0),
    _sigmoid("no-power", 9, 5, gamma=0.0, alpha=-1.0, reduction="none"),
    _sigmoid("extreme", 6, 5, extreme=True, target="bool", reduction="none"),
    _sigmoid("extreme-soft", 6, 5, extreme=True, target="soft", reduction="sum"),
    _sigmoid("probabilities", 9, 5, activated=True, class_weight=True, gamma=1.5),
    _sigmoid("probabilities-soft", 5, 4, activated=True, target="soft", weight=(5,), reduction="none"),
    _sigmoid("no-rows", 0, 4, weight=(0,), avg_factor=2),
    _sigmoid("no-rows-sum", 0, 4, target="soft", reduction="sum"),
    _sigmoid("no-classes", 3, 0, weight=(3,), class_weight=True, avg_factor=torch.tensor(2.0)),
    _sigmoid("no-classes-each", 3, 0, weight=(3, 1), target="soft", reduction="none"),
    # alpha = 0.3, gamma = 1.7 and the like are no numbers of float32: in float64 all their digits must arrive.
    _sigmoid("head", 2, 7, 11, 13, logits_as=channels_to_the_end, alpha=0.3, gamma=1.7, avg_factor=3.3),
    _sigmoid(
        "anchors-of-a-head",
        *(2, 12, 3, 5),
        logits_as=partial(anchors_of, anchors=3),
        reduction="none",
        result_as=lambda loss: loss.permute(0, 3, 4, 1, 2),
    ),
    _sigmoid(
        "head-and-contiguous-targets",
        *(2, 6, 5, 4),
        logits_as=channels_to_the_end,
        target="soft",
        weight=(2, 6, 5, 4),
        weight_as=channels_to_the_end,
        reduction="sum",
    ),
    _sigmoid(
        "contiguous-logits-and-targets-of-a-head",
        *(2, 5, 4, 6),
        target="bool",
        target_shape=(2, 6, 5, 4),
        target_as=channels_to_the_end,
        weight=(2, 5, 4, 1),
        weight_as=lambda weight: weight.expand(2, 5, 4, 6),
        alpha=0.0,
        reduction="none",
        result_as=torch.Tensor.sum,  # a gradient of strides 0
    ),
    _sigmoid(
        "columns-of-a-wider-head",
        *(9, 12),
        logits_as=lambda head: head[:, 3:8],
        class_weight=True,
        weight=(9,),
        weight_kind="int",
        avg_factor=torch.tensor(7),
    ),
    _sigmoid(
        "every-other-column",
        *(4, 3, 14),
        logits_as=lambda logits: logits[:, :1, 1::2],
        activated=True,
        target="hard",
        weight=(4, 1, 7),
        weight_kind="constant",
        weight_as=torch.Tensor.half,
        reduction="none",
    ),
    _sigmoid(
        "expanded-logits",
        *(1, 5),
        logits_as=lambda logits: logits.expand(30, 5),
        target_shape=(60,),
        target_as=lambda labels: labels[::2],
        weight=(),
        weight_as=lambda weight: weight.expand(30),
    ),
    _sigmoid(
        "transposed-logits",
        *(7, 43),
        logits_as=lambda logits: logits.mT,
        target="int32",
        weight=(86,),
        weight_as=lambda weight: weight[1::2],
        reduction="none",
        result_as=lambda loss: loss.mT,
    ),
    _sigmoid("many-rows", 700, 10, weight=(700,), weight_as=torch.Tensor.double, alpha=0.3, gamma=1.7, reduction="sum"),
    _sigmoid(
        "eighty-classes",
        *(29, 80),
        target="int32",
        weight=(80, 29),
        weight_as=lambda weight: weight.mT,
        reduction="none",
    ),
    _sigmoid("one-class", 1100, 1, weight=(1100, 1), avg_factor=torch.tensor([[3.0]])),
    _sigmoid("three-hundred-classes", 7, 300, class_weight=True, weight=(7,), alpha=1.0, gamma=3.0, avg_factor=1.7),
    _sigmoid("more-classes-than-a-block", 2, 1100, target="soft", target_as=torch.Tensor.half, weight=(2,), gamma=1.0),
    _sigmoid("labels-beyond-32-bits", 9, 5, target="wide", class_weight=True, reduction="none"),
    _sigmoid("weight-alone-has-a-gradient", 9, 5, weight=(9,), constant_logits=True, avg_factor=2.5),
    _sigmoid("extreme-no-power", 6, 5, extreme=True, gamma=0.0),
    _sigmoid("extreme-half-power", 6, 5, extreme=True, target="hard", gamma=0.5, alpha=-1.0, reduction="none"),
    _softmax("labels", 9, 5),
    _softmax("int32-labels-of-a-batch", 2, 3, 4, target="int32", class_weight=True, reduction="none"),
    _softmax("one-row", 6, reduction="sum"),
    _softmax("background", 4, 3, target="background"),
    _softmax("half-power", 9, 5, gamma=0.5, alpha=1.0, avg_factor=torch.tensor([3.0])),
    _softmax("no-power", 9, 5, gamma=0.0, avg_factor=3),
    _softmax("extreme", 8, 5, extreme=True, reduction="none"),
    _softmax("no-rows", 0, 4, avg_factor=torch.tensor([2.0])),
    _softmax("no-classes", 3, 0, class_weight=True, reduction="none"),
    _softmax("head", *(2, 7, 3, 4), logits_as=channels_to_the_end, alpha=0.3, gamma=1.7, avg_factor=torch.tensor(7)),
    _softmax(
        "anchors-of-a-head",
        *(1, 10, 3, 2),
        logits_as=partial(anchors_of, anchors=2),
        reduction="none",
        result_as=torch.Tensor.sum,  # a gradient of strides 0
    ),
    _softmax(
        "columns-of-a-wider-head",
        *(9, 12),
        logits_as=lambda head: head[:, 3:8],
        target_shape=(18,),
        target_as=lambda labels: labels[::2],
        class_weight=True,
        avg_factor=3.3,
    ),
    _softmax("expanded-logits", 1, 5, logits_as=lambda logits: logits.expand(9, 5), target_shape=(9,), gamma=3.0),
    _softmax("many-rows", 150, 7, reduction="sum"),
    _softmax("one-class", 6, 1, reduction="none"),
    _softmax("three-hundred-classes", 5, 300, target="int32", class_weight=True, gamma=5.0),
    _softmax("more-classes-than-a-block", 3, 1100, reduction="none", gamma=1.0),
    _softmax("labels-beyond-32-bits", 9, 5, target="wide", class_weight=True, reduction="none"),
]
