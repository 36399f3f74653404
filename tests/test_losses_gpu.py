"""The losses on a GPU: accuracy at real sizes and of long sums, options and dtypes in turn, and their modules.

What they have in common with other operators is in ``test_gpu_contract.py``.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import saccade
from benchmarks import workloads
from cases import focal_loss as oracles
from cases import gaussian_focal_loss as gaussian_oracles
from cases.comparison import assert_near, assert_same_bits
from cases.on_gpu import (
    BEYOND_32_BITS,
    DEVICE,
    TOLERANCES,
    Call,
    focal_loss,
    gaussian_focal_loss,
    keep_busy,
    step,
    synchronizing_raises,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

EPS = oracles.EPS


def labels(*shape: int) -> Tensor:
    """On both sides of [0, C), for logits of a shape."""
    *rows, classes = shape
    return torch.randint(-1, classes + 2, rows, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1))


def soft(*shape: int) -> Tensor:
    return torch.rand(shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1))


def heights(*shape: int) -> Tensor:
    """Of a heatmap with a peak every now and then."""
    target = soft(*shape) ** 4
    target.view(-1)[::1000] = 1
    return target


@dataclass(frozen=True)
class Loss:
    """A loss of logits, every element and slope of it in float64, and targets for logits of a shape."""

    call: Call
    exact: Callable[..., tuple[Tensor, Tensor]]
    target: Callable[..., Tensor]


LOSSES = {
    "labels": Loss(saccade.sigmoid_focal_loss, oracles.sigmoid_exact, labels),
    "soft": Loss(saccade.sigmoid_focal_loss, oracles.sigmoid_exact, soft),
    "softmax": Loss(saccade.softmax_focal_loss, oracles.softmax_exact, labels),
    "gaussian": Loss(
        saccade.gaussian_focal_loss_with_logits, partial(gaussian_oracles.exact, with_logits=True), heights
    ),
}


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))


def some_rows_at_a_time(loss: Loss, logits: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    rows = max(1, 2**24 // logits[0].numel())
    for block, of_block in zip(logits.split(rows), target.split(rows), strict=True):
        yield loss.exact(block, of_block)


# ---- accuracy

SHAPES = {
    "head": (7200, 10),
    "dense": (176_000, 80),
    "one-class": (5_000_003, 1),
    "three-classes": (3_000_001, 3),
    "many-classes": (7, 200_003),
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
AT_REAL_SIZE = [
    *(
        pytest.param(form, shape, scale, torch.float32, id=f"{form}-{name}-{scale}-float32")
        for form in ("labels", "soft", "softmax")
        for name, shape in SHAPES.items()
        for scale in (1, 20)
    ),
    *(
        pytest.param(form, SHAPES["dense"], 1, dtype, id=f"{form}-dense-1-{dtype}".replace("torch.", ""))
        for form in ("labels", "soft", "softmax")
        for dtype in DTYPES[1:]
    ),
    *(
        pytest.param(
            "gaussian",
            shape,
            scale,
            dtype,
            id=f"gaussian-{name}-{scale}-{dtype}".replace("torch.", ""),
            marks=pytest.mark.gpu_memory(12),
        )
        for name, shape in workloads.GAUSSIAN_FOCAL.items()
        for scale in (1, 20)
        for dtype in DTYPES
    ),
]


@pytest.mark.parametrize(("form", "shape", "scale", "dtype"), AT_REAL_SIZE)
def test_accuracy_at_real_size(form, shape, scale, dtype):
    """Of the logits as they are: a float32 sum of halves too, and a gradient that is rounded once."""
    loss = LOSSES[form]
    logits, target = (normal(*shape) * scale).to(dtype), loss.target(*shape)
    losses, slopes = (torch.cat(parts) for parts in zip(*some_rows_at_a_time(loss, logits, target), strict=True))
    values = [logits.requires_grad_(), target]
    total, gradient = step(partial(loss.call, reduction="sum"), values)
    assert total.dtype == torch.float32
    assert gradient.dtype == dtype
    assert_near("sum", total, losses.sum(), 2e-6)
    assert_near("gradient", gradient, slopes, TOLERANCES[dtype])
    if form == "gaussian":
        mean = loss.call(logits, target, avg_factor="num_pos")
        assert_near("mean over positives", mean, losses.sum() / ((target == 1).sum() + EPS), 2e-6)
    mean, gradient = step(loss.call, values)
    assert_near("mean", mean, losses.mean(), 2e-6)
    if dtype == torch.float32:  # halves of a mean's gradient are numbers that are not normal
        assert_near("gradient of the mean", gradient, slopes / losses.numel(), 2e-6)
        assert_near("each", loss.call(logits.detach(), target, reduction="none"), losses, 2e-6)


PATTERNS = ["random", "constant", "offset", "two-scales"]
LONG_SUMS = [
    *(
        pytest.param(form, classes, pattern, marks=pytest.mark.gpu_memory(14))
        for form, classes in (("labels", 80), ("soft", 80), ("labels", 1), ("softmax", 2))
        for pattern in PATTERNS
    ),
    *(
        pytest.param("gaussian", 250_000, pattern, marks=pytest.mark.gpu_memory(10))
        for pattern in [*PATTERNS, "positives"]
    ),
]


@pytest.mark.parametrize(("form", "classes", "pattern"), LONG_SUMS)
def test_the_mean_of_300_million_elements(form, classes, pattern):
    """Summed, or counted, one by one in float32 they would come to 2^24 at most, far below any tolerance."""
    loss, rows = LOSSES[form], 300_000_000 // classes
    logits, target = normal(rows, classes), loss.target(rows, classes)
    if pattern == "constant":  # all are rounded the same way, in elements and in partial sums
        logits.fill_(0.37)
        if form == "gaussian":
            target.fill_(0.25)
    elif pattern == "offset":
        logits.mul_(0.01).add_(30)
    elif pattern == "two-scales":
        logits[: rows // 2] = 1e4
    elif pattern == "positives":
        target[50:] = 1
    count = rows if form == "softmax" else rows * classes
    total = sum(losses.sum() for losses, _ in some_rows_at_a_time(loss, logits, target)).item()
    assert loss.call(logits, target).item() == pytest.approx(total / count, rel=1e-6)
    assert loss.call(logits, target, avg_factor=1000.0).item() == pytest.approx(total / (1000 + EPS), rel=1e-6)
    if form == "gaussian":
        positives = max(1, (target == 1).sum().item())
        mean = loss.call(logits, target, avg_factor="num_pos")
        assert mean.item() == pytest.approx(total / (positives + EPS), rel=1e-6)


@pytest.mark.parametrize(
    ("form", "classes"),  # of which rows are taken apart by a power of 2, and by nothing
    [("labels", 80), ("labels", 9), ("softmax", 80), ("softmax", 9), ("gaussian", 32)],
)
def test_more_elements_than_32_bits_count_in_no_memory(form, classes):
    """One row, seen as if there were many; the positives among them are more than 32 bits count, too."""
    loss, logits = LOSSES[form], normal(1, classes)
    rows = BEYOND_32_BITS // classes * 2
    if form == "gaussian":
        target = torch.ones(1, classes, device=DEVICE)
        target[0, 0] = 0.5
        how: dict[str, Any] = {"avg_factor": "num_pos"}
    else:
        target, how = torch.tensor([3], device=DEVICE), {}
    losses, _ = loss.exact(logits, target)
    expected = losses.sum() / (classes - 1) if form == "gaussian" else losses.mean()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    mean = loss.call(logits.expand(rows, classes), target.expand(rows, *target.shape[1:]), **how)
    assert_near("mean", mean, expected, 1e-6)
    # Of positives a sum and a count, 12 bytes, for each 2**15 of the 2**32 elements.
    assert torch.cuda.max_memory_allocated() - before < (2**21 if form == "gaussian" else 2**20)


# ---- streams


def test_few_logits_on_all_streams_and_in_graphs_at_once():
    """Their sum is finished by the program that ends last: launches that overlap must not count together."""
    from saccade.losses import reduction_launch  # which imports Triton

    (case,) = (case for case in focal_loss.CASES if case.name == "labels-number")
    calls = [case.inputs((7200, 10), seed=10 * k) for k in range(6)]
    expected = [case.step(values) for values in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    graphs, captured = [torch.cuda.CUDAGraph() for _ in range(3)], []
    torch.cuda.synchronize()
    for graph, values in zip(graphs, calls, strict=False):
        with torch.cuda.stream(streams[-1]):
            case.step(values)
        with torch.cuda.graph(graph, stream=streams[-1]):  # all on one stream, which also has a counter kept
            captured.append([case.step(values) for _ in range(20)])
    torch.cuda.synchronize()
    gate = torch.cuda.Event()
    keep_busy()  # all streams wait until much is queued in each
    gate.record()
    for stream in streams:
        stream.wait_event(gate)
    runs = []
    for _ in range(10):
        for graph, stream in zip(graphs, streams, strict=False):
            with torch.cuda.stream(stream):
                graph.replay()
        for number in range(len(graphs), len(calls)):
            with torch.cuda.stream(streams[number]):
                runs.append((number, case.step(calls[number])))
    torch.cuda.synchronize()
    runs += [(number, results) for number, of_graph in enumerate(captured) for results in of_graph]
    for number, results in runs:
        assert_same_bits(f"stream {number}", results, expected[number])
    kept = [reduction_launch._workspaces[0, stream.cuda_stream, torch.float32] for stream in streams[3:]]
    assert all(workspace.counter.item() == 0 for workspace in kept)


# ---- kernels that are kept for later calls

POWERS: dict[str, list[dict[str, float]]] = {
    "labels": [
        {},
        {"gamma": 0.0},
        {"gamma": 1.0},
        {"gamma": 1.7},
        {"gamma": 2.0, "alpha": 0.0},
        {"alpha": 1.0},
        {"alpha": -1.0},
    ],
    "softmax": [{}, {"gamma": 0.0}, {"gamma": 1.0}, {"gamma": 1.7}, {"gamma": 2.0, "alpha": 0.0}, {"alpha": 1.0}],
    "gaussian": [
        {},
        {"alpha": 0.0},
        {"alpha": 1.7},
        {"gamma": 0.0},
        {"gamma": 2.3},
        {"alpha": 3.0, "gamma": 3.0},
        {"clip": 1e-4},
        {"clip": 0.1},
    ],
}


def reductions(form: str) -> list[dict[str, Any]]:
    factors = [
        3.0,
        torch.tensor(3.0, device=DEVICE),
        torch.tensor([3], device=DEVICE),
        torch.tensor([3], device=DEVICE, dtype=torch.float16),
    ]
    of_both = [{}, {"reduction": "sum"}, {"reduction": "none"}, *({"avg_factor": factor} for factor in factors)]
    return [*of_both, {"avg_factor": "num_pos"}] if form == "gaussian" else of_both


@pytest.mark.parametrize("form", POWERS)
def test_dtypes_and_options_in_turn(form):
    """All of one shape: what changes from call to call is the dtype of an input, a power, an option."""
    loss = LOSSES[form]
    base = (normal(96, 16) * 3).half()
    target = loss.target(96, 16)
    if form == "gaussian":
        target[:, 5] = 1
        target = target.half()
    targets = [target, target.float() if form == "gaussian" else target.int()]
    dtypes, hows = [torch.float32, torch.float16], reductions(form)
    options = [*((powers, {}) for powers in POWERS[form]), *(({}, how) for how in hows)]
    turns = [(dtype, targets[k % 2], *option) for k, (dtype, option) in enumerate(itertools.product(dtypes, options))]
    for k, (dtype, given, powers) in enumerate(itertools.product(dtypes, targets, POWERS[form])):
        turns.append((dtype, given, powers, hows[k % len(hows)]))
    for dtype, given, powers, how in [*turns, *reversed(turns)]:
        result, gradient = step(partial(loss.call, **powers, **how), [base.to(dtype).requires_grad_(), given])
        losses, slopes = loss.exact(base, target, **powers)
        what = f"{dtype}, {given.dtype}, {powers}, {how}"
        if how.get("reduction") == "none":
            assert_near(what, result, losses, TOLERANCES[dtype])
            continue
        count: float = losses.numel()
        if "reduction" in how:
            count = 1
        elif "avg_factor" in how:
            count = EPS + ((target == 1).sum().item() if how["avg_factor"] == "num_pos" else 3)
        assert result.dtype == torch.float32
        assert_near(what, result.flatten()[0], losses.sum() / count, 2e-6)
        # The gradient of a mean of halves is rounded to numbers that are not normal: to multiples of 2**-24.
        if dtype != torch.float16 or count < losses.numel():
            assert_near(f"gradient, {what}", gradient, slopes / count, TOLERANCES[dtype])


def test_a_new_power_each_call():
    kept = [("labels", focal_loss, (301, 80)), ("softmax", focal_loss, (301, 80))]
    kept.append(("positives", gaussian_focal_loss, gaussian_focal_loss.USUAL))
    for gamma in torch.rand(20, generator=torch.Generator().manual_seed(0)).mul(6).tolist():
        for name, tables, size in kept:
            (usual,) = (case for case in tables.CASES if case.name == name)
            loss = saccade.softmax_focal_loss if name == "softmax" else usual.call
            case = replace(usual, call=partial(loss, gamma=gamma))
            values = usual.inputs(size)[:2]
            case.assert_right(f"gamma {gamma}", case.step(values), case.expected(values))


# ---- modules


def test_the_focal_module_waits_for_nothing():
    logits, target = workloads.focal(*workloads.FOCAL["head"], device=DEVICE)
    module = saccade.nn.FocalLoss(loss_weight=2.0)
    weight = torch.rand(len(logits), device=DEVICE) > 0.5
    with synchronizing_raises():
        avg_factor = (target < 10).sum().clamp(min=1)
        for factor in (avg_factor, avg_factor.view(1).float(), 3.0, None):
            leaf = logits.detach().requires_grad_()
            module(leaf, target, weight, avg_factor=factor).sum().backward()
    assert leaf.grad is not None


def test_the_gaussian_module_waits_for_nothing():
    pred, target = soft(2, 3, 45, 47) * 0.98 + 0.01, heights(2, 3, 45, 47)
    module = saccade.nn.GaussianFocalLoss(loss_weight=2.0)
    with synchronizing_raises():
        for factor in ("num_pos", target.eq(1).sum().clamp(min=1), 3.0, None):
            leaf = pred.detach().requires_grad_()
            module(leaf, target, avg_factor=factor).backward()
    assert leaf.grad is not None
