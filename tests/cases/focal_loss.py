"""Cases of the focal losses; the oracles are the textbook formulas, with one-hot targets and autograd."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from cases import Case
from saccade.focal_loss import sigmoid_focal_loss, softmax_focal_loss

EPS = 1.1920929e-07  # what mmdet adds to an avg_factor


def reduced(loss: Tensor, reduction: str, avg_factor: Tensor | float | None) -> Tensor:
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.mean() if avg_factor is None else loss.sum() / (avg_factor + EPS)


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


def sigmoid_call(logits, target, weight=None, class_weight=None, avg_factor=None, **options) -> Tensor:
    return sigmoid_focal_loss(
        logits, target, weight=weight, class_weight=class_weight, avg_factor=avg_factor, **options
    )


def softmax_call(logits, target, class_weight=None, avg_factor=None, **options) -> Tensor:
    return softmax_focal_loss(logits, target, class_weight=class_weight, avg_factor=avg_factor, **options)


def make(
    *shape: int,
    target: str = "labels",  # labels, int32, background, bool, soft, hard (0 and 1 as floating point)
    weight: tuple[int, ...] | None = None,
    class_weight: bool = False,
    avg_factor: Tensor | float | None = None,
    activated: bool = False,
    extreme: bool = False,
    bool_weight: bool = False,
) -> tuple:
    """(logits, target, weight, class_weight, avg_factor); labels lie on both sides of [0, C)."""
    rng = torch.Generator().manual_seed(sum(shape))
    logits = torch.randn(*shape, generator=rng) * 3
    if extreme:
        logits.view(-1)[:4] = torch.tensor([100.0, -100.0, 40.0, -40.0])
    if activated:
        logits = logits.sigmoid() * 0.98 + 0.01
    classes, rows = shape[-1], shape[:-1]
    if target in ("labels", "int32", "background"):
        targets = torch.randint(0, classes + 1, rows, generator=rng)
        if target == "background":
            targets = torch.full(rows, classes)
        else:
            targets.view(-1)[1:4] = torch.tensor([-1, -3, classes + 4])[: max(0, targets.numel() - 1)]
        targets = targets.int() if target == "int32" else targets
    else:
        targets = torch.rand(*shape, generator=rng)
        if target != "soft":
            targets = (targets > 0.6) if target == "bool" else (targets > 0.6).float()
    weights = None
    if weight is not None:
        weights = torch.rand(weight, generator=rng)
        weights = weights > 0.3 if bool_weight else weights.requires_grad_()
    return (
        logits.requires_grad_(),
        targets,
        weights,
        torch.rand(classes, generator=rng) + 0.5 if class_weight else None,
        avg_factor,
    )


def _sigmoid(name: str, *shape: int, alpha=0.25, gamma=2.0, reduction="mean", activated=False, **inputs) -> Case:
    options = {"alpha": alpha, "gamma": gamma, "reduction": reduction, "activated": activated}
    return Case(
        f"sigmoid_focal_loss/{name}",
        partial(sigmoid_call, **options),
        partial(make, *shape, activated=activated, **inputs),
        partial(sigmoid_oracle, **options),
    )


def _softmax_inputs(*shape: int, **inputs) -> tuple:
    logits, target, _, class_weight, avg_factor = make(*shape, **inputs)
    return logits, target, class_weight, avg_factor


def _softmax(name: str, *shape: int, alpha=0.25, gamma=2.0, reduction="mean", **inputs) -> Case:
    options = {"alpha": alpha, "gamma": gamma, "reduction": reduction}
    return Case(
        f"softmax_focal_loss/{name}",
        partial(softmax_call, **options),
        partial(_softmax_inputs, *shape, **inputs),
        partial(softmax_oracle, **options),
    )


CASES = [
    _sigmoid("labels", 9, 5),
    _sigmoid("int32-labels-of-a-batch", 2, 3, 4, target="int32", reduction="none"),
    _sigmoid("one-row", 6, reduction="sum"),
    _sigmoid("background", 4, 3, target="background"),
    _sigmoid("class-weight", 9, 5, class_weight=True, avg_factor=2.5),
    _sigmoid("row-weight", 9, 5, weight=(9,), avg_factor=torch.tensor(4.0)),
    _sigmoid("bool-row-weight", 9, 5, weight=(9,), bool_weight=True, avg_factor=torch.tensor([4.0])),
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
    _softmax("labels", 9, 5),
    _softmax("int32-labels-of-a-batch", 2, 3, 4, target="int32", class_weight=True, reduction="none"),
    _softmax("one-row", 6, reduction="sum"),
    _softmax("background", 4, 3, target="background"),
    _softmax("half-power", 9, 5, gamma=0.5, alpha=1.0, avg_factor=torch.tensor([3.0])),
    _softmax("no-power", 9, 5, gamma=0.0, avg_factor=3),
    _softmax("extreme", 8, 5, extreme=True, reduction="none"),
    _softmax("no-rows", 0, 4, avg_factor=torch.tensor([2.0])),
    _softmax("no-classes", 3, 0, class_weight=True, reduction="none"),
]
