"""The focal losses on the workloads of ``workloads.py``."""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import saccade
from benchmarks.accuracy import require_accurate
from benchmarks.clocks import device_us, wall_us_in_turns
from benchmarks.losses_oracle import exact, gaussian_focal, sigmoid_focal
from benchmarks.records import COPY_BYTES_PER_US, IsWanted, Say, new_record
from benchmarks.training_step import as_leaves, forget, forward_backward, memory_of, size_of
from benchmarks.workloads import FOCAL, GAUSSIAN_FOCAL, focal, wall_us
from benchmarks.workloads import gaussian_focal as gaussian_focal_inputs
from saccade.losses.reduction import AVG_FACTOR_EPS
from saccade.nn import FocalLoss

SIGMOID_WORKLOADS = [*((name, torch.float32) for name in FOCAL), ("dense-large", torch.bfloat16)]
PERMUTED_WORKLOAD = "dense"  # what is also timed as a head over images leaves it
PERMUTED_ROWS = (11, 125, 128)  # (B, H, W): as many rows
ALSO_ON_THE_WALL = "sigmoid_focal_loss/head"  # so small that calling the forward may cost more than computing it
MODULE_WORKLOAD = "head"
_LONG = 1 << 22  # logits from which on a step of plain PyTorch takes so long that fewer are timed

# Microseconds of the original CUDA kernel, mmcv's, on one NVIDIA H200 with torch 2.11 and CUDA 13.0, taken with the
# same inputs and the same clocks: device time of forward and backward, wall time of the module's step of training.
RECORDED_US: dict[str, dict[str, float]] = {
    "sigmoid_focal_loss/head": {"forward": 13.0, "backward": 6.9},
    "sigmoid_focal_loss/dense": {"forward": 189, "backward": 233},
    "sigmoid_focal_loss/dense-large": {"forward": 985, "backward": 1245},
    "FocalLoss/head": {"forward+backward": 214},
}


class Loss(NamedTuple):
    """A loss as it is timed and checked here, and what it is timed beside."""

    call: Callable[[Tensor, Tensor], Tensor]  # the public function, of logits and target
    backward: Callable[[Tensor, Tensor, Tensor], Tensor]  # the operator, of the loss's gradient, logits and target
    is_mean: bool  # else a sum
    element_losses: Callable[[Tensor, Tensor], Tensor]  # exact ones
    formula: Callable[[Tensor, Tensor], Tensor]  # the same in plain PyTorch
    formula_name: str
    formula_target: Callable[[Tensor, Tensor], Tensor]  # what the formula takes, made of logits and target beforehand


def workloads() -> list[str]:
    """Names of all workloads."""
    of_sigmoid = [f"sigmoid_focal_loss/{name}" for name in (*FOCAL, f"{PERMUTED_WORKLOAD}-permuted")]
    return [*of_sigmoid, f"FocalLoss/{MODULE_WORKLOAD}", *(f"gaussian_focal_loss/{name}" for name in GAUSSIAN_FOCAL)]


def sigmoid_records(quick: bool, say: Say, is_wanted: IsWanted) -> Iterator[dict[str, Any]]:
    """One record for each workload that is wanted and pass; ``quick`` leaves out the baselines."""
    for name, dtype in SIGMOID_WORKLOADS:
        if is_wanted(f"sigmoid_focal_loss/{name}"):
            inputs = partial(focal, *FOCAL[name], dtype=dtype)
            compare = dtype == torch.float32 and not quick
            yield from _passes(f"sigmoid_focal_loss/{name}", SIGMOID, inputs, compare, say)
            forget()
    if is_wanted(f"sigmoid_focal_loss/{PERMUTED_WORKLOAD}-permuted"):
        yield from _passes(f"sigmoid_focal_loss/{PERMUTED_WORKLOAD}-permuted", SIGMOID, _permuted, False, say)
        forget()
    if is_wanted(f"FocalLoss/{MODULE_WORKLOAD}"):
        yield from _module(f"FocalLoss/{MODULE_WORKLOAD}", quick, say)
        forget()


def gaussian_records(quick: bool, say: Say, is_wanted: IsWanted) -> Iterator[dict[str, Any]]:
    """As ``sigmoid_records``."""
    for name, shape in GAUSSIAN_FOCAL.items():
        if is_wanted(f"gaussian_focal_loss/{name}"):
            inputs = partial(gaussian_focal_inputs, shape)
            yield from _passes(f"gaussian_focal_loss/{name}", GAUSSIAN, inputs, not quick, say)
            forget()


def _passes(
    workload: str, loss: Loss, inputs: Callable[[], tuple[Tensor, Tensor]], compare: bool, say: Say
) -> Iterator[dict[str, Any]]:
    """Every pass of a loss on one workload."""
    logits, target = inputs()
    short = str(logits.dtype).removeprefix("torch.")
    say(f"{workload} {short}: checking")
    (leaf,) = as_leaves(logits)

    def forward() -> Tensor:
        with torch.no_grad():
            return loss.call(logits, target)

    def backward() -> Tensor:
        return loss.backward(grad_output, logits, target)

    def both() -> Tensor:
        return forward_backward(lambda logits: loss.call(logits, target), [leaf])

    value = forward()
    grad_output = torch.randn_like(value)
    results = {
        "forward": Result(value, None),
        "backward": Result(None, backward(), grad_output.item()),
        "forward+backward": Result(both(), leaf.grad),
    }
    scale = 1 / logits.numel() if loss.is_mean else 1.0
    errors = checked_errors(workload, loss.element_losses, scale, logits, target, results)
    del results
    floors = floors_us(logits, target)
    recorded = RECORDED_US.get(workload, {}) if logits.dtype == torch.float32 else {}
    formulas: dict[str, Callable[[Tensor], Tensor]] = {}  # of the logits
    if compare:
        dense = loss.formula_target(logits, target)
        formulas[loss.formula_name] = partial(loss.formula, target=dense)
        formulas[f"{loss.formula_name} compiled"] = partial(torch.compile(loss.formula, dynamic=False), target=dense)

    def record(kind: str, clock: str, saccade_us: float, **more: Any) -> dict[str, Any]:
        common = {"dtype": short, "floor_us": floors[kind], "error": errors[kind]}
        return new_record(workload, kind, clock, saccade_us, **common, **more)

    def original(kind: str) -> dict[str, float]:
        return {"original CUDA kernel": recorded[kind]} if kind in recorded else {}

    say(f"{workload} {short}: timing forward")
    saccade_us, baselines = device_us(forward), {}
    for form, formula in formulas.items():
        say(f"{workload} {short}: timing forward of {form}")
        with torch.no_grad():
            baselines[form] = device_us(partial(formula, logits), inner=10, repeats=5)
    yield record("forward", "device", saccade_us, baselines=baselines, recorded=original("forward"))
    if workload == ALSO_ON_THE_WALL:
        with torch.no_grad():
            calls = {"saccade": partial(loss.call, target=target), **formulas}
            times = wall_us_in_turns({form: partial(call, logits) for form, call in calls.items()})
        yield record("forward", "wall", times.pop("saccade"), baselines=times)
    say(f"{workload} {short}: timing backward")
    yield record("backward", "device", device_us(backward), recorded=original("backward"))

    say(f"{workload} {short}: timing forward + backward")
    memory = memory_of(both, [leaf, target])
    saccade_us, baselines = wall_us(both), {}
    for form, formula in formulas.items():
        say(f"{workload} {short}: timing forward + backward of {form}")
        few = {"calls": 20, "repeats": 3} if logits.numel() > _LONG else {}
        baselines[form] = wall_us(partial(forward_backward, formula, [leaf]), **few)
    yield record("forward+backward", "wall", saccade_us, baselines=baselines, **memory)


def _module(workload: str, quick: bool, say: Say) -> Iterator[dict[str, Any]]:
    """A step of training of the module: what calling the loss costs in all."""
    say(f"{workload}: checking")
    call, logits, target, scale = module_call()
    (leaf,) = as_leaves(logits)

    def both() -> Tensor:
        return forward_backward(call, [leaf])

    results = {"forward+backward": Result(both(), leaf.grad)}
    errors = checked_errors(workload, sigmoid_focal, scale, logits, target, results)
    say(f"{workload}: timing forward + backward")
    memory = memory_of(both, [leaf, target])
    steps = {"saccade": both}
    if not quick:
        # Not a focal loss: what a step with one loss of these logits costs in torch itself.
        cross_entropy = partial(F.binary_cross_entropy_with_logits, target=_one_hot(logits, target))
        steps["torch BCE with logits"] = partial(forward_backward, cross_entropy, [leaf])
    times = wall_us_in_turns(steps)
    yield new_record(
        workload,
        "forward+backward",
        "wall",
        times.pop("saccade"),
        floor_us=floors_us(logits, target)["forward+backward"],
        error=errors["forward+backward"],
        baselines=times,
        recorded={"original CUDA kernel": RECORDED_US[workload]["forward+backward"]},
        **memory,
    )


class LossCall(NamedTuple):
    """A loss of one target, and what it is called with."""

    call: Callable[[Tensor], Tensor]  # of the logits
    logits: Tensor
    target: Tensor
    scale: float  # of the sum of the losses of all elements


def module_call() -> LossCall:
    """The module as heads call it: with the number of positives, which is a number of Python."""
    logits, target = focal(*FOCAL[MODULE_WORKLOAD])
    avg_factor = float((target < logits.shape[1]).sum())
    module = FocalLoss()

    def call(logits: Tensor) -> Tensor:
        return module(logits, target, avg_factor=avg_factor)

    return LossCall(call, logits, target, 1 / (avg_factor + AVG_FACTOR_EPS))


def _permuted() -> tuple[Tensor, Tensor]:
    """The rows of a workload as a head over images leaves them: (B, H, W, C), made of (B, C, H, W) by permuting."""
    logits, target = focal(*FOCAL[PERMUTED_WORKLOAD])
    maps = logits.unflatten(0, PERMUTED_ROWS).permute(0, 3, 1, 2).contiguous()
    return maps.permute(0, 2, 3, 1), target.unflatten(0, PERMUTED_ROWS)


# ---- the operators


def _sigmoid_focal_loss(logits: Tensor, target: Tensor) -> Tensor:
    return saccade.sigmoid_focal_loss(logits, target)


def _sigmoid_focal_loss_backward(grad_output: Tensor, logits: Tensor, target: Tensor) -> Tensor:
    how = ("mean", None, 1.0, AVG_FACTOR_EPS)
    grad_logits, _ = torch.ops.saccade.sigmoid_focal_loss_backward(
        grad_output, logits, target, None, None, 0.25, 2.0, False, *how, [True, False]
    )
    return grad_logits


def _gaussian_focal_loss(logits: Tensor, target: Tensor) -> Tensor:
    return saccade.gaussian_focal_loss_with_logits(logits, target, reduction="sum")


def _gaussian_focal_loss_backward(grad_output: Tensor, logits: Tensor, target: Tensor) -> Tensor:
    how = ("sum", None, 1.0, AVG_FACTOR_EPS)
    grad_logits, _ = torch.ops.saccade.gaussian_focal_loss_backward(
        grad_output, logits, target, None, 2.0, 4.0, 1.0, 1.0, True, None, *how, [True, False]
    )
    return grad_logits


# ---- what is timed beside them


def _torchvision(logits: Tensor, target: Tensor, alpha: float = 0.25, gamma: float = 2) -> Tensor:
    """The formula of ``torchvision.ops.sigmoid_focal_loss``, operation by operation, so that it need not be installed.

    It is plain PyTorch there, too, and takes a float target for each element.
    """
    p = torch.sigmoid(logits)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    p_right = p * target + (1 - p) * (1 - target)
    loss = cross_entropy * ((1 - p_right) ** gamma)
    balance = alpha * target + (1 - alpha) * (1 - target)
    return (balance * loss).mean()


def _textbook_gaussian(logits: Tensor, target: Tensor, alpha: float = 2.0, gamma: float = 4.0) -> Tensor:
    """The formula as detectors write it, of probabilities."""
    p, eps = logits.sigmoid(), 1e-12
    positive = -(p + eps).log() * (1 - p).pow(alpha) * target.eq(1)
    negative = -(1 - p + eps).log() * p.pow(alpha) * (1 - target).pow(gamma)
    return (positive + negative).sum()


def _one_hot(logits: Tensor, target: Tensor) -> Tensor:
    """Float targets in the dtype of the logits; background rows are 0."""
    return (target[..., None] == torch.arange(logits.shape[-1], device=logits.device)).to(logits.dtype)


SIGMOID = Loss(
    call=_sigmoid_focal_loss,
    backward=_sigmoid_focal_loss_backward,
    is_mean=True,
    element_losses=sigmoid_focal,
    formula=_torchvision,
    formula_name="torchvision",
    formula_target=_one_hot,
)
GAUSSIAN = Loss(
    call=_gaussian_focal_loss,
    backward=_gaussian_focal_loss_backward,
    is_mean=False,
    element_losses=gaussian_focal,
    formula=_textbook_gaussian,
    formula_name="textbook",
    formula_target=lambda _, target: target,
)


# ---- what is known of a workload


class Result(NamedTuple):
    """What a pass computed; ``None`` where it does not compute that."""

    loss: Tensor | None  # ()
    grad_logits: Tensor | None
    grad_output: float = 1.0  # what the gradient was asked for


def checked_errors(
    workload: str,
    element_losses: Callable[[Tensor, Tensor], Tensor],
    scale: float,  # of their sum
    logits: Tensor,
    target: Tensor,
    results: Mapping[str, Result],
) -> dict[str, float]:
    """The larger relative error of each result's loss and gradient, over all rows.

    Raises:
        WrongResultError: One is too large. The loss is float32 even of smaller logits and bound by that dtype; their
            gradient is rounded to their dtype, and that is most of its error.
    """
    total = norm = 0.0
    differences = dict.fromkeys(results, 0.0)  # squared, as is the norm
    for rows, loss, grad_logits in exact(element_losses, logits, target):
        total += loss * scale
        right = grad_logits * scale
        norm += right.square().sum()
        for name, result in results.items():
            if result.grad_logits is not None:
                wrong = result.grad_logits[rows].double() / result.grad_output - right
                differences[name] += wrong.square().sum()
    of_losses = {
        name: float((result.loss.detach().double() - total).abs() / abs(total))
        for name, result in results.items()
        if result.loss is not None
    }
    of_gradients = {
        name: math.sqrt(differences[name] / norm) for name, result in results.items() if result.grad_logits is not None
    }
    dtype = str(logits.dtype).removeprefix("torch.")
    require_accurate(workload, dtype, of_losses, result_dtype="float32")
    require_accurate(workload, dtype, of_gradients)
    return {name: max(of_losses.get(name, 0.0), of_gradients.get(name, 0.0)) for name in results}


def floors_us(logits: Tensor, target: Tensor) -> dict[str, float]:
    """Microseconds by pass that moving the fewest bytes takes: both inputs are read, the gradient is written."""
    forward = size_of(logits, target) / COPY_BYTES_PER_US
    backward = size_of(logits, target, logits) / COPY_BYTES_PER_US
    return {"forward": forward, "backward": backward, "forward+backward": forward + backward}
