"""Cases of the Gaussian focal losses; the oracle is the textbook formula with autograd."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cases import Case
from saccade.gaussian_focal_loss import gaussian_focal_loss, gaussian_focal_loss_with_logits

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
    return loss.mean() if avg_factor is None else loss.sum() / (avg_factor + EPS)


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
    weight: tuple[int, ...] | None = None,
    avg_factor: Any = None,
    extreme: bool = False,
) -> tuple:
    """(pred, target, weight, avg_factor)."""
    rng = torch.Generator().manual_seed(sum(shape))
    pred = torch.randn(shape, generator=rng) * 3
    if extreme:
        pred.view(-1)[:6] = torch.tensor([100.0, -100.0, 40.0, -40.0, 9.5, -9.0])
    if not with_logits:
        pred = pred.sigmoid() * 0.98 + 0.01
    target = torch.rand(shape, generator=rng) * 0.9
    target.view(-1)[:positives] = 1
    weights = None if weight is None else torch.rand(weight, generator=rng).requires_grad_()
    return pred.requires_grad_(), target, weights, avg_factor


def _cases(
    name: str, *shape: int, alpha=2.0, gamma=4.0, pos_weight=1.0, neg_weight=1.0, clip=None, reduction="mean", **inputs
) -> list[Case]:
    options = {"alpha": alpha, "gamma": gamma, "pos_weight": pos_weight, "neg_weight": neg_weight}
    options |= {"reduction": reduction, "clip": clip}
    return [
        Case(
            f"gaussian_focal_loss{'_with_logits' if with_logits else ''}/{name}",
            partial(call, with_logits=with_logits, **options),
            partial(make, *shape, with_logits=with_logits, **inputs),
            partial(oracle, with_logits=with_logits, **options),
        )
        for with_logits in ([True] if clip or inputs.get("extreme") else [False, True])
    ]


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
]
