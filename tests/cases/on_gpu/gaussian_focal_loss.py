"""The Gaussian focal losses on a GPU. Sizes are those of the logits, (B, C, H, W)."""

from functools import partial

import torch
from torch import Tensor

from benchmarks import workloads
from cases.gaussian_focal_loss import EPS, exact
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
from saccade import gaussian_focal_loss, gaussian_focal_loss_with_logits


def made(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """An input by its name, for logits of a shape (B, C, H, W); those that may have a gradient require one."""
    rng = torch.Generator().manual_seed(seed)
    batch, channels, height, width = shape
    random = partial(torch.rand, generator=rng)

    def heatmap(*shape: int) -> Tensor:
        heights = random(shape) ** 4 * 0.99
        return torch.where(random(shape) > 0.999, 1, heights)

    value = {
        "logits": lambda: torch.randn(shape, generator=rng) * 3,
        "channels_last": lambda: torch.randn(batch, height, width, channels, generator=rng) * 3,
        "probabilities": lambda: random(shape) * 0.98 + 0.01,
        "target": lambda: heatmap(*shape),
        "weight": lambda: random(shape),
        "map_weight": lambda: random(batch, 1, height, width),
        "mask": lambda: random(height, width) > 0.3,
        "avg_factor": lambda: random(()) * 100 + 1,
        "int_avg_factor": lambda: torch.randint(1, 100, (1,), generator=rng),
    }[name]()
    value = value.to(DEVICE, dtype if name in ("logits", "channels_last", "probabilities") else None)
    return value.requires_grad_(name in ("logits", "channels_last", "probabilities", "weight", "map_weight"))


USUAL = (3, 5, 67, 71)
SIZES = Sizes(
    usual=USUAL,
    # Gradients of broadcast weights are sums over channels, near each other or far apart.
    compared=((2, 10, 128, 128), (1, 3001, 3, 3), (40_003, 1, 1, 7)),
    repeated=((4, 10, 128, 128),),
    overlapping=((4, 10, 67, 71),),
    chained=USUAL,
    chained_in_a_graph=USUAL,
    told_apart=((1, 2, 16, 32), (1, 1, 1, 1024), (1, 1, 1024, 1), (1, 1, 1, 1)),
    numbered=lambda number: (1, 2, 19 + number, 37),
    unseen=lambda number: ((2, 3, 41, 43 + number), (1, 80, 16, 16 + 16 * number)),
)


def _many_positives(values: list[Tensor]) -> None:
    values[1][:, :, 5] = 1


def _case(name: str, call: Call, names: str, **how) -> OnGpu:
    def make(size: tuple[int, ...], dtype: torch.dtype, seed: int) -> list[Tensor]:
        return [made(each, size, dtype, seed + k) for k, each in enumerate(names.split())]

    # Steps are so small that probabilities stay within (0, 1).
    return OnGpu(name, call, make, SIZES, step_size=0.01, unlike=_many_positives, **how)


CASES = [
    _case(
        "positives", partial(gaussian_focal_loss_with_logits, avg_factor="num_pos"), "logits target", told_apart=True
    ),
    _case("sum", partial(gaussian_focal_loss_with_logits, reduction="sum", clip=1e-4), "logits target"),
    _case(
        "each",
        partial(gaussian_focal_loss_with_logits, reduction="none", alpha=1.7, gamma=2.3),
        "logits target",
        elementwise=True,
    ),
    _case("number", partial(gaussian_focal_loss_with_logits, avg_factor=7.3, pos_weight=0.3), "logits target"),
    _case(
        "avg-factor",
        lambda x, t, n: gaussian_focal_loss_with_logits(x, t, avg_factor=n),
        "logits target avg_factor",
    ),
    _case(
        "weight",
        lambda x, t, w: gaussian_focal_loss_with_logits(x, t, weight=w, avg_factor="num_pos"),
        "logits target weight",
        told_apart=True,
    ),
    _case(
        "map-weight",
        lambda x, t, w, n: gaussian_focal_loss_with_logits(x, t, weight=w, avg_factor=n),
        "logits target map_weight int_avg_factor",
    ),
    _case("mask", lambda x, t, w: gaussian_focal_loss_with_logits(x, t, weight=w), "logits target mask"),
    _case(
        "channels-last",
        lambda x, t: gaussian_focal_loss_with_logits(x.permute(0, 3, 1, 2), t, avg_factor="num_pos"),
        "channels_last target",
    ),
    _case("probabilities", partial(gaussian_focal_loss, avg_factor="num_pos"), "probabilities target"),
    _case(
        "probabilities-each",
        partial(gaussian_focal_loss, reduction="none"),
        "probabilities target",
        elementwise=True,
    ),
]
TOGETHER = (["positives", "map-weight", "probabilities"], (4, 10, 67, 71))


def another(number: int) -> tuple[Call, list[Tensor]]:
    """Another size and other powers for each number."""
    call = partial(gaussian_focal_loss_with_logits, alpha=0.1 + 0.17 * number, gamma=0.3 + 0.1 * number)
    return call, [made(name, USUAL)[..., : 70 - number].detach() for name in ("logits", "target")]


# ---- memory: above logits, targets, the gradient and what is returned not 1% of the logits


def _memory(form: str) -> tuple[Call, list[Tensor]]:
    shape = workloads.GAUSSIAN_FOCAL["centernet"]
    logits, target = workloads.gaussian_focal(shape, device=DEVICE)
    call: Call = partial(gaussian_focal_loss_with_logits, avg_factor="num_pos")
    if form == "weight":
        call = partial(call, weight=torch.rand(shape[0], 1, *shape[2:], device=DEVICE))
    elif form == "each":
        call = partial(gaussian_focal_loss_with_logits, reduction="none")
    elif form == "channels-last":
        logits = logits.view(shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2)
    elif form == "probabilities":
        logits.sigmoid_()
        call = partial(gaussian_focal_loss, avg_factor="num_pos")
    return call, [logits.requires_grad_(), target]


MEMORY = [
    Memory(form, partial(_memory, form), lambda values, results: 0.01 * bytes_of(values[0]), gigabytes=3)
    for form in ("positives", "weight", "each", "channels-last", "probabilities")
]


# ---- more than 32 bits count: what lies between is right beyond doubt, so that nothing comes of it

EDGE = 64
ROUNDING = 2**-25  # of gradients in float16 that are divided by the positives: to multiples of 2**-24


def _more_rows(with_logits: bool, layout: str, reduction: str) -> Few:
    width = 96
    rows = BEYOND_32_BITS // width + 1000
    call: Call = gaussian_focal_loss_with_logits if with_logits else gaussian_focal_loss
    few = made("logits" if with_logits else "probabilities", (1, 1, 2 * EDGE, width), torch.float16).detach()[0, 0]
    target = made("target", (1, 1, 2 * EDGE, width))[0, 0].half()
    target[:, 7] = 1
    losses, slopes = exact(few, target, with_logits=with_logits)
    if layout == "broadcast-weight":
        weight = torch.rand(width, device=DEVICE)
        losses, slopes = losses * weight, slopes * weight
        call = partial(call, weight=weight)

    def among_many(values: Tensor, fill: float) -> Tensor:
        if layout == "transposed":
            return with_many_between(values.mT, rows, fill, dim=1).mT
        return with_many_between(values, rows, fill)

    values = [among_many(few, -6e4 if with_logits else 0.0), among_many(target, 0.0)]
    if reduction == "none":
        call = partial(call, reduction="none")
        return Few(call, values, [losses], lambda results: [without_those_between(results[0], EDGE)])
    values[0].requires_grad_()
    positives = (target == 1).sum().item() + EPS
    return Few(
        partial(call, avg_factor="num_pos"),
        values,
        [losses.sum() / positives, slopes / positives],
        lambda results: [results[0], without_those_between(results[1], EDGE)],
        absolute=ROUNDING,
    )


def _far_strides(how: str) -> Few:
    """A few rows, further apart than 32 bits count, in tensors that are NaN elsewhere, or full of positives."""
    rows, width, apart = 4, 9, 2**30
    logits = made("logits", (1, 1, rows, width), torch.float16).detach()[0, 0]
    target = made("target", (1, 1, rows, width))[0, 0].half()
    weight = made("mask", (1, 1, rows, width))
    target[2, 3] = 1
    losses, slopes = (value * weight for value in exact(logits, target, with_logits=True))
    values = [far_apart(logits, apart, NAN), far_apart(target, apart, 1)]
    far_weight = far_apart(weight, apart, 1)
    assert far_weight.stride(0) == apart
    call = partial(gaussian_focal_loss_with_logits, weight=far_weight)
    if how == "none":
        return Few(partial(call, reduction="none"), values, [losses])
    values[0].requires_grad_()
    if how == "num_pos":
        count = (target == 1).sum().item() + EPS
        return Few(
            partial(call, avg_factor="num_pos"), values, [losses.sum() / count, slopes / count], absolute=ROUNDING
        )
    return Few(partial(call, reduction="sum"), values, [losses.sum(), slopes])


BEYOND = [
    *(
        Beyond(f"rows-{name}-{layout}-{reduction}", 40, partial(_more_rows, with_logits, layout, reduction))
        for name, with_logits in (("probabilities", False), ("logits", True))
        for layout in ("contiguous", "transposed", "broadcast-weight")
        for reduction in ("none", "num_pos")
    ),
    *(Beyond(f"strides-{how}", 35, partial(_far_strides, how)) for how in ("none", "num_pos", "sum")),
]


# ---- torch.compile


def _head(form: str, features: Tensor, projection: Tensor, target: Tensor) -> Tensor:
    logits = (features @ projection).permute(0, 3, 1, 2)  # (B, C, H, W), bfloat16 under autocast
    logits = logits * 1.5 if form == "channels-last" else logits.contiguous() * 1.5
    if form == "each":
        return 2 * gaussian_focal_loss_with_logits(logits, target, reduction="none").sum(1).square().mean()
    return 2 * gaussian_focal_loss_with_logits(logits, target, avg_factor="num_pos")


def _inputs_of_head(batch: int) -> list[Tensor]:
    rng = torch.Generator().manual_seed(batch)
    features = torch.randn(batch, 17, 19, 24, generator=rng).to(DEVICE).requires_grad_()
    projection = (torch.randn(24, 5, generator=rng) / 4).to(DEVICE).requires_grad_()
    return [features, projection, made("target", (batch, 5, 17, 19))]


COMPILED = [
    Compiled(form, lambda form=form: partial(_head, form), _inputs_of_head, (9, 10, 14), autocast)
    for form, autocast in (("positives", None), ("channels-last", "inside"), ("each", None))
]
