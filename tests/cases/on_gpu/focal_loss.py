"""The focal losses on a GPU. Sizes are (rows, classes) of the logits."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks import workloads
from cases.focal_loss import channels_to_the_end, sigmoid_exact, softmax_exact
from cases.on_gpu import (
    BEYOND_32_BITS,
    DEVICE,
    NAN,
    Beyond,
    Call,
    Compiled,
    Few,
    Memory,
    OnGpu,
    Sizes,
    bytes_of,
    far_apart,
    with_many_between,
    without_those_between,
)
from saccade import sigmoid_focal_loss, softmax_focal_loss


def made(name: str, rows: int, classes: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """An input by its name; those that may have a gradient require one."""
    rng = torch.Generator().manual_seed(seed)
    random, whole = partial(torch.rand, generator=rng), partial(torch.randint, generator=rng)
    value = {
        "logits": lambda: torch.randn(rows, classes, generator=rng) * 3,
        "head": lambda: torch.randn(classes, rows, generator=rng) * 3,  # seen as (rows, classes)
        "probabilities": lambda: random(rows, classes) * 0.98 + 0.01,
        "labels": lambda: whole(-1, classes + 2, (rows,)),
        "int32_labels": lambda: whole(-1, classes + 2, (rows,)).int(),
        "soft": lambda: random(rows, classes),
        "bool": lambda: random(rows, classes) > 0.9,
        "row_weight": lambda: random(rows),
        "bool_weight": lambda: random(rows) > 0.3,
        "element_weight": lambda: random(rows, classes),
        "class_weight": lambda: random(classes) + 0.5,
        "avg_factor": lambda: random(()) * 100 + 1,
        "int_avg_factor": lambda: whole(1, 100, (1,)),
    }[name]()
    is_halved = name in ("logits", "head", "probabilities", "soft", "element_weight")
    value = value.to(DEVICE, dtype if is_halved else None)
    return value.requires_grad_(name in ("logits", "head", "probabilities", "row_weight", "element_weight"))


def losses_of(form: str) -> tuple[Call, Callable[..., tuple[Tensor, Tensor]]]:
    """The loss with a form of targets (labels, soft, bool or softmax), and all its elements and slopes in float64."""
    return (softmax_focal_loss, softmax_exact) if form == "softmax" else (sigmoid_focal_loss, sigmoid_exact)


SIZES = Sizes(
    usual=(3001, 80),
    # Gradients of weights are sums over rows of many classes, or of millions of elements.
    compared=((20_011, 80), (3, 50_021), (100_003, 1)),
    repeated=((2003, 80), (50_021, 80)),
    overlapping=((2003, 80), (20_011, 80)),
    chained=(4099, 80),
    chained_in_a_graph=(7200, 10),
    told_apart=((64, 80), (1, 80), (80, 1)),
    numbered=lambda number: (500 + 7 * number, 11),
    unseen=lambda number: ((1009 + number, 13), (1009 + number, 80)),
)


def _case(name: str, call: Call, names: str, **how) -> OnGpu:
    def make(size: tuple[int, int], dtype: torch.dtype, seed: int) -> list[Tensor]:
        return [made(each, *size, dtype, seed + k) for k, each in enumerate(names.split())]

    return OnGpu(name, call, make, SIZES, **how)


CASES = [
    _case("labels", sigmoid_focal_loss, "logits labels"),
    _case("labels-each", partial(sigmoid_focal_loss, reduction="none"), "logits int32_labels", elementwise=True),
    _case("labels-number", partial(sigmoid_focal_loss, avg_factor=7.3, gamma=1.7, alpha=0.3), "logits labels"),
    _case(
        "labels-row-weight",
        lambda x, t, w, n: sigmoid_focal_loss(x, t, weight=w, avg_factor=n),
        "logits labels row_weight avg_factor",
        told_apart=True,
    ),
    _case(
        "labels-bool-weight",
        lambda x, t, w, c, n: sigmoid_focal_loss(x, t, weight=w, class_weight=c, avg_factor=n),
        "logits labels bool_weight class_weight int_avg_factor",
    ),
    _case("head", lambda x, t, w: sigmoid_focal_loss(x.mT, t, weight=w, reduction="sum"), "head labels element_weight"),
    _case("head-each", lambda x, t: sigmoid_focal_loss(x.mT, t, reduction="none"), "head labels", elementwise=True),
    _case(
        "soft",
        lambda x, t, w: sigmoid_focal_loss(x, t, weight=w, gamma=1.5, reduction="sum"),
        "logits soft element_weight",
        told_apart=True,
    ),
    _case("bool", partial(sigmoid_focal_loss, alpha=-1.0, gamma=0.5), "logits bool"),
    # Steps are so small that probabilities stay within (0, 1).
    _case("probabilities", partial(sigmoid_focal_loss, activated=True), "probabilities labels", step_size=0.01),
    _case(
        "softmax",
        lambda x, t, c, n: softmax_focal_loss(x, t, class_weight=c, avg_factor=n),
        "logits labels class_weight avg_factor",
        told_apart=True,
    ),
    _case(
        "softmax-each",
        partial(softmax_focal_loss, reduction="none", gamma=1.7, alpha=0.3),
        "logits int32_labels",
        elementwise=True,
    ),
    _case("softmax-head", lambda x, t: softmax_focal_loss(x.mT, t, reduction="sum"), "head labels"),
]
TOGETHER = (["labels-row-weight", "softmax", "labels"], (20_011, 80))


def another(number: int) -> tuple[Call, list[Tensor]]:
    """Another size and another power for each number."""
    rows = 3000 - 100 * number
    return partial(sigmoid_focal_loss, gamma=0.1 + 0.17 * number), [made("logits", rows, 80), made("labels", rows, 80)]


# ---- memory: above logits, targets, the gradient and what is returned not 1% of the logits


def _memory(form: str) -> tuple[Call, list[Tensor]]:
    rows, classes = workloads.FOCAL["dense-large"]
    logits, target = workloads.focal(rows, classes, device=DEVICE)
    call: Call = sigmoid_focal_loss
    if form == "soft":
        target = torch.rand(rows, classes, device=DEVICE)
    elif form == "row-weight":
        weight, avg_factor = torch.rand(rows, device=DEVICE), torch.tensor(7, device=DEVICE)
        call = partial(sigmoid_focal_loss, weight=weight, avg_factor=avg_factor)
    elif form == "softmax":
        call = softmax_focal_loss
    elif form == "each":
        call = partial(sigmoid_focal_loss, reduction="none")
    elif form == "head":
        logits = logits.view(classes, rows).mT  # its gradient has the same strides
    return call, [logits.requires_grad_(), target]


MEMORY = [
    Memory(form, partial(_memory, form), lambda values, results: 0.01 * bytes_of(values[0]), gigabytes=4)
    for form in ("labels", "soft", "row-weight", "softmax", "each", "head")
]


# ---- more than 32 bits count: what lies between is right beyond doubt, so that nothing comes of it

EDGE, SURE = 64, -6e4  # how many rows at either end matter; logits of the others


def few_targets(form: str, rows: int, classes: int, labels: str = "labels") -> Tensor:
    return made(form, rows, classes, torch.float16) if form in ("soft", "bool") else made(labels, rows, classes)


def _more_rows(form: str, classes: int, reduction: str) -> Few:
    rows, (call, exact) = BEYOND_32_BITS // classes + 1000, losses_of(form)
    few = made("logits", 2 * EDGE, classes, torch.float16).detach()
    # Labels of one class are as many as logits.
    targets = few_targets(form, 2 * EDGE, classes, "int32_labels" if classes == 1 else "labels")
    losses, slopes = exact(few, targets)
    values = [with_many_between(few, rows, SURE), with_many_between(targets, rows, 0 if form == "soft" else -1)]
    call = partial(call, reduction=reduction)
    if reduction == "none":
        return Few(call, values, [losses], lambda results: [without_those_between(results[0], EDGE)])
    values[0].requires_grad_()
    return Few(call, values, [losses.sum(), slopes], lambda r: [r[0], without_those_between(r[1], EDGE)])


def _more_of_a_head(form: str, reduction: str) -> Few:
    """(B, C, H, W) seen as (B, H, W, C): the classes of a pixel lie far apart."""
    classes, height, width = 80, 8192, BEYOND_32_BITS // (80 * 8192) + 1
    loss, exact = losses_of(form)
    few = made("head", 2 * EDGE, classes, torch.float16).detach()  # (C, pixels)
    targets = few_targets(form, 2 * EDGE, classes)
    losses, slopes = exact(few.mT, targets)
    if form == "soft":
        target = with_many_between(targets.mT, height * width, 0, dim=1)
        target = channels_to_the_end(target.view(1, classes, height, width))
    else:
        target = with_many_between(targets, height * width, -1).view(1, height, width)

    def call(head: Tensor, target: Tensor) -> Tensor:
        return loss(channels_to_the_end(head.view(1, classes, height, width)), target, reduction=reduction)

    values = [with_many_between(few, height * width, SURE, dim=1), target]
    if reduction == "none":
        return Few(call, values, [losses], lambda r: [without_those_between(r[0].flatten(0, 2), EDGE)])
    values[0].requires_grad_()
    return Few(call, values, [losses.sum(), slopes.mT], lambda r: [r[0], without_those_between(r[1], EDGE, dim=1)])


def _as_many_classes_as_no_one_has(form: str, rows: int, classes: int) -> Few:
    """Nothing comes of the classes between the first and the last, or of a label among them."""
    edge, (call, exact) = 40, losses_of(form)
    few = made("logits", rows, 2 * edge, torch.float16).detach()
    labels = torch.tensor([2 * edge - 1, 3, edge, -1, 2 * edge], device=DEVICE)[:rows]
    losses, slopes = exact(few, labels)
    values = [
        with_many_between(few, classes, SURE, dim=1).requires_grad_(),
        torch.where(labels >= edge, labels + (classes - 2 * edge), labels),
    ]
    return Few(
        partial(call, reduction="sum"),
        values,
        [losses.sum(), slopes],
        lambda r: [r[0], without_those_between(r[1], edge, dim=1)],
    )


def _far_strides(form: str, reduction: str) -> Few:
    """A few rows, further apart than 32 bits count, in a tensor that is NaN elsewhere."""
    rows, classes, apart = 4, 9, 2**30
    call, exact = losses_of(form)
    logits = made("logits", rows, classes, torch.float16).detach()
    target = made("bool" if form == "bool" else "int32_labels", rows, classes)
    losses, slopes = exact(logits, target)
    if form != "softmax":
        weight = made("bool_weight", rows, classes)
        losses, slopes = losses * weight[:, None], slopes * weight[:, None]
        call = partial(call, weight=far_apart(weight[:, None], apart, 1)[:, 0])
    far_target = far_apart(target, apart, 1) if form == "bool" else far_apart(target[:, None], apart, 0)[:, 0]
    assert far_target.stride(0) == apart
    values = [far_apart(logits, apart, NAN), far_target]
    call = partial(call, reduction=reduction)
    if reduction == "none":
        return Few(call, values, [losses])
    values[0].requires_grad_()
    return Few(call, values, [losses.sum(), slopes])


BEYOND = [
    *(
        Beyond(f"rows-{form}-{classes}-{reduction}", 40, partial(_more_rows, form, classes, reduction))
        for form in ("labels", "soft", "softmax")
        for classes in (80, 1)
        for reduction in ("none", "sum")
    ),
    *(
        Beyond(f"head-{form}-{reduction}", 30, partial(_more_of_a_head, form, reduction))
        for form in ("labels", "soft", "softmax")
        for reduction in ("none", "sum")
    ),
    Beyond("classes-sigmoid", 20, partial(_as_many_classes_as_no_one_has, "labels", 5, 2**29)),
    Beyond("classes-softmax", 20, partial(_as_many_classes_as_no_one_has, "softmax", 5, 2**29)),
    Beyond("classes-sigmoid-one-row", 20, partial(_as_many_classes_as_no_one_has, "labels", 1, 2**31 + 64)),
    *(
        Beyond(f"strides-{form}-{reduction}", 45, partial(_far_strides, form, reduction))
        for form in ("labels", "bool", "softmax")
        for reduction in ("none", "sum")
    ),
]


# ---- torch.compile


def _head(form: str, features: Tensor, projection: Tensor, target: Tensor) -> Tensor:
    logits = features @ projection  # (rows, classes), bfloat16 under autocast
    if form == "softmax":
        return 2 * softmax_focal_loss(logits, target, avg_factor=(target >= 0).sum())
    if form == "head":
        logits = logits.mT.contiguous().mT * 1.5
        return 2 * sigmoid_focal_loss(logits, target, reduction="none").mT.sum(0).mean()
    if form == "soft":
        return sigmoid_focal_loss(logits, target, gamma=1.5, reduction="none").float().square().sum()
    if form == "weighted":
        weight = features.detach().abs().sum(1)
        return 2 * sigmoid_focal_loss(logits, target, weight=weight, avg_factor=weight.sum().view(1)).sum()
    return 2 * sigmoid_focal_loss(logits, target)


def _inputs_of_head(form: str, rows: int) -> list[Tensor]:
    rng = torch.Generator().manual_seed(rows)
    features = torch.randn(rows, 24, generator=rng).to(DEVICE).requires_grad_()
    projection = (torch.randn(24, 10, generator=rng) / 4).to(DEVICE).requires_grad_()
    soft = form == "soft"
    target = torch.rand(rows, 10, generator=rng) if soft else torch.randint(-1, 12, (rows,), generator=rng)
    return [features, projection, target.to(DEVICE)]


COMPILED = [
    Compiled(form, lambda form=form: partial(_head, form), partial(_inputs_of_head, form), (900, 901, 2048), autocast)
    for form, autocast in (
        ("labels", None),
        ("labels", "inside"),
        ("softmax", "inside"),
        ("weighted", None),
        ("head", None),
        ("soft", "inside"),
    )
]
