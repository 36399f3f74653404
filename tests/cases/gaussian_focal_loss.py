"""Cases of the Gaussian focal losses; the oracle is the textbook formula with autograd."""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cases import Case
from cases.focal_loss import View, channels_to_the_end, on_views, softplus
from saccade.losses.gaussian import gaussian_focal_loss, gaussian_focal_loss_with_logits

EPS = 1.1920929e-07


def oracle(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    avg_factor: Any = None,
    *,
    with_logits: bool = False,
    clip: Any = None,
    alpha: float = 2.0,
    gamma: float = 4.0,
    pos_weight: float = 1.0,
    neg_weight: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    if with_logits and clip is None:
        p, not_p, log_p, log_not_p = pred.sigmoid(), (-pred).sigmoid(), F.logsigmoid(pred), F.logsigmoid(-pred)
    elif with_logits:
        p = pred.sigmoid().clamp(clip, 1 - clip)
        not_p, log_p, log_not_p = 1 - p, p.log(), (1 - p).log()
    else:
        p, not_p, log_p, log_not_p = pred, 1 - pred, (pred + 1e-12).log(), (1 - pred + 1e-12).log()
    target = target.to(pred.dtype)  # which is no narrower: what is 1 was 1
    positive = -log_p * not_p**alpha * (target == 1)
    negative = -log_not_p * p**alpha * (1 - target) ** gamma * (target != 1)
    loss = pos_weight * positive + neg_weight * negative
    if weight is not None:
        loss = loss * weight
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if isinstance(avg_factor, str):
        avg_factor = max(1, (target == 1).sum().item())
    if isinstance(avg_factor, Tensor):
        avg_factor = avg_factor.to(loss.dtype)  # a small number beside an integer tensor would be lost in float32
    return loss.mean() if avg_factor is None else loss.sum() / (avg_factor + EPS)


def exact(
    pred: Tensor,
    target: Tensor,
    *,
    with_logits: bool,
    alpha: float = 2.0,
    gamma: float = 4.0,
    clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Every element's loss and slope in float64, from closed forms: small ones are as accurate as large ones.

    Autograd of the formula above is not: it takes ``1 - p`` of a ``p`` that is rounded to 1. Logits are finite.
    """
    positive = target == 1
    share = torch.where(positive, 1, (1 - target.double()).clamp(0, 1) ** gamma)
    x = pred.double()
    if with_logits:
        z = torch.where(positive, -x, x)
        bound = math.inf if clip is None else math.log((1 - clip) / clip)
        cost, error = softplus(z.clamp(-bound, bound)), z.clamp(-bound, bound).sigmoid()
        slope = error**alpha * (error + alpha * (-z).sigmoid() * cost)
        slope = torch.where(x.abs() > bound, 0, slope)
    else:
        error, rest = torch.where(positive, 1 - x, x), torch.where(positive, x, 1 - x) + 1e-12
        cost = -torch.where(positive, rest.log(), torch.log1p(1e-12 - x))
        slope = error**alpha / rest + torch.where(error > 0, alpha * error ** (alpha - 1), 0) * cost
    return share * error**alpha * cost, share * torch.where(positive, -slope, slope)


def call(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    avg_factor: Any = None,
    *,
    with_logits: bool = False,
    **options,
) -> Tensor:
    if with_logits:
        return gaussian_focal_loss_with_logits(pred, target, weight=weight, avg_factor=avg_factor, **options)
    options.pop("clip")
    return gaussian_focal_loss(pred, target, weight=weight, avg_factor=avg_factor, **options)


def make(
    *shape: int,
    with_logits: bool,
    positives: int = 3,
    target_shape: tuple[int, ...] | None = None,
    weight: tuple[int, ...] | None = None,
    weight_kind: str = "variable",  # variable, constant, bool
    avg_factor: Any = None,
    extreme: bool = False,
    certain: bool = False,
    constant_pred: bool = False,
) -> tuple:
    """(pred, target, weight, avg_factor); shapes are those in memory, of which the operator may see a view."""
    rng = torch.Generator().manual_seed(sum(shape))
    pred = torch.randn(shape, generator=rng) * 3
    if extreme:
        pred.view(-1)[:6] = torch.tensor([100.0, -100.0, 40.0, -40.0, 9.5, -9.0])
    if not with_logits:
        pred = pred.sigmoid() * 0.98 + 0.01
    target = torch.rand(target_shape or shape, generator=rng) * 0.9
    target.view(-1)[:positives] = 1
    target.view(-1)[target.numel() - positives // 2 :] = 1
    if certain:  # right and wrong, of the positives and of the others
        pred.view(-1)[1:5] = torch.tensor([0.0, 1.0, 0.0, 1.0])
    weights = None
    if weight is not None:
        weights = torch.rand(weight, generator=rng)
        weights = weights > 0.3 if weight_kind == "bool" else weights
        weights.requires_grad_(weight_kind == "variable")
    return pred.requires_grad_(not constant_pred), target, weights, avg_factor


def _cases(
    name: str,
    *shape: int,
    forms: tuple[bool, ...] = (False, True),
    alpha=2.0,
    gamma=4.0,
    pos_weight=1.0,
    neg_weight=1.0,
    clip=None,
    reduction="mean",
    pred_as: View | None = None,
    target_as: View | None = None,
    weight_as: View | None = None,
    result_as: View | None = None,
    **inputs,
) -> list[Case]:
    """The form with probabilities and that with logits, unless ``forms`` says else."""
    options = {"alpha": alpha, "gamma": gamma, "pos_weight": pos_weight, "neg_weight": neg_weight}
    options |= {"reduction": reduction, "clip": clip}

    def case(with_logits: bool) -> Case:
        functions = [partial(function, with_logits=with_logits, **options) for function in (call, oracle)]
        views = (pred_as, target_as, weight_as)
        if any(views) or result_as:
            functions = [partial(on_views, function, views, result_as) for function in functions]
        return Case(
            f"gaussian_focal_loss{'_with_logits' if with_logits else ''}/{name}",
            functions[0],
            partial(make, *shape, with_logits=with_logits, **inputs),
            functions[1],
        )

    return [case(with_logits) for with_logits in ((True,) if clip or inputs.get("extreme") else forms)]


CASES = [
    *_cases("mean", 2, 3, 4, 5),
    *_cases("each", 4, 5, reduction="none", pos_weight=0.25, neg_weight=0.75),
    *_cases("number-of-positives", 3, 4, 5, avg_factor="num_pos"),
    *_cases("no-positives", 3, 4, positives=0, avg_factor="num_pos"),
    *_cases("avg-factor", 3, 4, avg_factor=torch.tensor([2.5])),
    *_cases("avg-factor-number", 3, 4, avg_factor=2),
    *_cases("element-weight", 3, 4, weight=(3, 4), reduction="none"),
    *_cases("broadcast-weight", 2, 3, 4, weight=(3, 1), avg_factor="num_pos"),
    *_cases("single-weight", 3, 4, weight=(), reduction="sum"),
    *_cases("half-power", 3, 4, alpha=0.5, gamma=1.5, reduction="sum"),
    *_cases("no-power", 3, 4, alpha=0.0, gamma=0.0),
    *_cases("extreme", 4, 5, extreme=True, reduction="none"),
    *_cases("extreme-clipped", 4, 5, extreme=True, clip=1e-4, weight=(5,), reduction="none"),
    *_cases("scalar", reduction="sum", positives=0),
    *_cases("empty", 0, 4, weight=(4,), avg_factor=2),
    *_cases("empty-positives", 2, 0, positives=0, avg_factor="num_pos"),
    *_cases(
        "many-blocks",
        *(3, 700),
        # No numbers of float32: in float64 all their digits must arrive.
        alpha=1.7,
        gamma=2.3,
        pos_weight=0.3,
        neg_weight=0.7,
        positives=30,
        weight=(3, 1),
        avg_factor="num_pos",
    ),
    *_cases(
        "strides-that-differ",
        *(2, 3, 4, 5),
        target_shape=(2, 5, 3, 4),
        target_as=channels_to_the_end,
        weight=(5, 4),
        weight_as=lambda weight: weight.mT,
        reduction="none",
        result_as=lambda loss: loss.permute(0, 3, 1, 2),
        forms=(True,),
    ),
    *_cases(
        "channels-last",
        *(2, 3, 4, 5),
        pred_as=channels_to_the_end,
        target_shape=(2, 4, 5, 3),
        weight=(2, 4, 1, 3),
        avg_factor="num_pos",
        forms=(True,),
    ),
    *_cases(
        "gaps",
        *(4, 13),
        pred_as=lambda pred: pred[:, 3:8],
        target_shape=(4, 1, 10),
        target_as=lambda target: target[:, 0, ::2],
        weight=(12, 1),
        weight_as=lambda weight: weight[1::3],
        avg_factor=torch.tensor(7),
    ),
    *_cases(
        "expanded",
        *(1, 5),
        pred_as=lambda pred: pred.expand(7, 5),
        target_shape=(7, 1),
        target_as=lambda target: target.expand(7, 5),
        weight=(),
        weight_as=lambda weight: weight.expand(7, 1),
        reduction="none",
        result_as=torch.Tensor.sum,  # a gradient of strides 0
        forms=(True,),
    ),
    *_cases("half-targets", 3, 4, target_as=torch.Tensor.half, weight=(3, 4), weight_kind="bool", avg_factor=3.3),
    *_cases(
        "half-weight", 3, 4, weight=(4,), weight_kind="constant", weight_as=torch.Tensor.half, gamma=3.0, alpha=1.0
    ),
    *_cases("double-weight", 2, 3, 4, weight=(2, 1, 4), weight_as=torch.Tensor.double, reduction="sum", forms=(True,)),
    *_cases("weight-alone-has-a-gradient", 3, 4, weight=(3, 1), constant_pred=True, avg_factor=2.5, forms=(False,)),
    *_cases("many-clipped", 3, 700, extreme=True, clip=0.003, positives=9, weight=(700,), avg_factor="num_pos"),
    *_cases("extreme-no-power", 4, 5, extreme=True, alpha=0.0, gamma=0.0, reduction="sum"),
    # Wrong ones have a slope of 1e12, which float16 holds only so.
    *_cases("zero-and-one", 3, 4, certain=True, pos_weight=1e-9, neg_weight=1e-9, reduction="sum", forms=(False,)),
]
