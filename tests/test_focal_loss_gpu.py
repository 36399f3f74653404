"""Focal losses on a GPU: real sizes, equal bits, more than 2^31 elements, memory, streams, graphs, kept kernels."""

import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from benchmarks import workloads
from cases.comparison import assert_near, assert_same_bits
from cases.focal_loss import EPS, channels_to_the_end, sigmoid_exact, softmax_exact
from cases.losses_on_gpu import (
    BEYOND_32_BITS,
    NAN,
    TOLERANCES,
    bytes_of,
    deterministic_algorithms,
    synchronizing_raises,
)
from saccade.focal_loss import sigmoid_focal_loss, softmax_focal_loss
from saccade.nn import FocalLoss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DEVICE = "cuda"

Call = Callable[..., Tensor]


# ---- ways to call the losses, as functions of tensors alone


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


KINDS: dict[str, tuple[Call, str]] = {
    "labels": (sigmoid_focal_loss, "logits labels"),
    "labels-each": (partial(sigmoid_focal_loss, reduction="none"), "logits int32_labels"),
    "labels-number": (partial(sigmoid_focal_loss, avg_factor=7.3, gamma=1.7, alpha=0.3), "logits labels"),
    "labels-row-weight": (
        lambda x, t, w, n: sigmoid_focal_loss(x, t, weight=w, avg_factor=n),
        "logits labels row_weight avg_factor",
    ),
    "labels-bool-weight": (
        lambda x, t, w, c, n: sigmoid_focal_loss(x, t, weight=w, class_weight=c, avg_factor=n),
        "logits labels bool_weight class_weight int_avg_factor",
    ),
    "head": (lambda x, t, w: sigmoid_focal_loss(x.mT, t, weight=w, reduction="sum"), "head labels element_weight"),
    "head-each": (lambda x, t: sigmoid_focal_loss(x.mT, t, reduction="none"), "head labels"),
    "soft": (
        lambda x, t, w: sigmoid_focal_loss(x, t, weight=w, gamma=1.5, reduction="sum"),
        "logits soft element_weight",
    ),
    "bool": (partial(sigmoid_focal_loss, alpha=-1.0, gamma=0.5), "logits bool"),
    "probabilities": (partial(sigmoid_focal_loss, activated=True), "probabilities labels"),
    "softmax": (
        lambda x, t, c, n: softmax_focal_loss(x, t, class_weight=c, avg_factor=n),
        "logits labels class_weight avg_factor",
    ),
    "softmax-each": (partial(softmax_focal_loss, reduction="none", gamma=1.7, alpha=0.3), "logits int32_labels"),
    "softmax-head": (lambda x, t: softmax_focal_loss(x.mT, t, reduction="sum"), "head labels"),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def of_kind(
    kind: str, rows: int = 3001, classes: int = 80, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Call, list[Tensor]]:
    """A loss as a function of tensors, and those."""
    call, names = KINDS[kind]
    return call, [made(name, rows, classes, dtype, seed + k) for k, name in enumerate(names.split())]


def step(call: Call, values: Sequence[Tensor]) -> list[Tensor]:
    """The loss and the gradient of a fixed weighted sum of it."""
    inputs = [value.detach().requires_grad_(value.requires_grad) for value in values]
    loss = call(*inputs)
    seed = torch.arange(loss.numel(), device=loss.device).remainder(5).add(1).to(loss.dtype).view(loss.shape)
    return [loss.detach(), *torch.autograd.grad(loss, [leaf for leaf in inputs if leaf.requires_grad], seed)]


def expected_step(call: Call, values: Sequence[Tensor]) -> list[Tensor]:
    """The same on the CPU, without kernels, in float64."""
    copies = [value.detach().cpu() for value in values]
    copies = [copy.double() if copy.is_floating_point() else copy for copy in copies]
    return step(call, [copy.requires_grad_(value.requires_grad) for copy, value in zip(copies, values, strict=True)])


def assert_right(what: str, results: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for k, (left, right) in enumerate(zip(results, expected, strict=True)):
        assert_near(f"{what}: result {k}", left, right, TOLERANCES[left.dtype])


# ---- accuracy


SHAPES = {  # logits
    "head": (7200, 10),
    "dense": (176_000, 80),
    "one-class": (5_000_003, 1),
    "three-classes": (3_000_001, 3),
    "many-classes": (7, 200_003),
}


def targets_of(form: str, rows: int, classes: int) -> Tensor:
    rng = torch.Generator(DEVICE).manual_seed(1)
    if form == "soft":
        return torch.rand(rows, classes, device=DEVICE, generator=rng)
    return torch.randint(-1, classes + 2, (rows,), device=DEVICE, generator=rng)


@pytest.mark.parametrize("form", ["labels", "soft", "softmax"])
@pytest.mark.parametrize("scale", [1, 20])
@pytest.mark.parametrize("shape", SHAPES)
def test_accuracy_at_real_size(shape, scale, form):
    rng = torch.Generator(DEVICE).manual_seed(0)
    logits = torch.randn(SHAPES[shape], device=DEVICE, generator=rng) * scale
    target = targets_of(form, *SHAPES[shape])
    call, exact = (softmax_focal_loss, softmax_exact) if form == "softmax" else (sigmoid_focal_loss, sigmoid_exact)
    losses, slopes = exact(logits, target)
    count = losses.numel()
    loss, gradient = step(call, [logits.requires_grad_(), target])
    assert_near("mean", loss, losses.mean(), 2e-6)
    assert_near("gradient", gradient, slopes / count, 2e-6)
    assert_near("each", call(logits.detach(), target, reduction="none"), losses, 2e-6)


@pytest.mark.parametrize("form", ["labels", "soft", "softmax"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_accuracy_of_halves_at_real_size(dtype, form):
    """A float32 mean of the half logits as they are, and a gradient that is rounded once."""
    logits, _ = workloads.focal(*SHAPES["dense"], dtype=dtype)
    target = targets_of(form, *SHAPES["dense"])
    call, exact = (softmax_focal_loss, softmax_exact) if form == "softmax" else (sigmoid_focal_loss, sigmoid_exact)
    losses, slopes = exact(logits, target)
    loss, gradient = step(partial(call, reduction="sum"), [logits.requires_grad_(), target])
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    assert_near("sum", loss, losses.sum(), 2e-6)
    assert_near("gradient", gradient, slopes, TOLERANCES[dtype])


@each_kind
def test_weights_and_numbers_of_all_kinds(kind):
    """Gradients of weights are sums over rows of many classes, or of millions of elements."""
    for rows, classes in ((20_011, 80), (3, 50_021), (100_003, 1)):
        call, values = of_kind(kind, rows, classes)
        assert_right(f"{rows} x {classes}", step(call, values), expected_step(call, values))


def exact_total(exact: Callable[..., tuple[Tensor, Tensor]], logits: Tensor, target: Tensor) -> float:
    """The sum of all losses in float64, some rows at a time."""
    rows = max(1, 2**24 // logits.shape[1])
    blocks = zip(logits.split(rows), target.split(rows), strict=True)
    return sum(exact(x, t)[0].sum() for x, t in blocks).item()


@pytest.mark.gpu_memory(14)
@pytest.mark.parametrize("pattern", ["random", "constant", "offset", "two-scales"])
@pytest.mark.parametrize(("form", "classes"), [("labels", 80), ("soft", 80), ("labels", 1), ("softmax", 2)])
def test_the_mean_of_300_million_elements(form, classes, pattern):
    """Summed one by one in float32 the sum would stand still at 2^24 of its terms, far below any tolerance."""
    rows = 300_000_000 // classes
    rng = torch.Generator(DEVICE).manual_seed(0)
    logits = torch.randn(rows, classes, device=DEVICE, generator=rng)
    if pattern == "constant":  # all are rounded the same way, in elements and in partial sums
        logits.fill_(0.37)
    elif pattern == "offset":
        logits.mul_(0.01).add_(30)
    elif pattern == "two-scales":
        logits[: rows // 2] = 1e4
    target = targets_of(form, rows, classes)
    call, exact = (softmax_focal_loss, softmax_exact) if form == "softmax" else (sigmoid_focal_loss, sigmoid_exact)
    count = rows if form == "softmax" else rows * classes
    mean = exact_total(exact, logits, target) / count
    assert call(logits, target).item() == pytest.approx(mean, rel=1e-6)
    assert call(logits, target, avg_factor=1000.0).item() == pytest.approx(mean * count / (1000 + EPS), rel=1e-6)


# ---- equal bits


@pytest.mark.parametrize("strict", [False, True], ids=["default", "deterministic-algorithms"])
@pytest.mark.parametrize("rows", [2003, 50_021])
@each_kind
def test_equal_bits_run_after_run(kind, rows, strict):
    """While another stream keeps the GPU busy, and on another stream than the current one."""
    call, values = of_kind(kind, rows)
    matrix = torch.randn(8192, 8192, device=DEVICE)
    product = torch.empty_like(matrix)
    busy, side = torch.cuda.Stream(), torch.cuda.Stream()
    expected = step(call, values)
    torch.cuda.synchronize()
    with torch.cuda.stream(busy):
        for _ in range(5):  # about 20 ms each
            torch.mm(matrix, matrix, out=product)
    with deterministic_algorithms(strict):
        runs = [step(call, values) for _ in range(4)]
        with torch.cuda.stream(side):
            runs += [step(call, values) for _ in range(2)]
    torch.cuda.synchronize()
    for number, results in enumerate(runs):
        assert_same_bits(f"run {number}", results, expected)


@pytest.mark.parametrize("rows", [2003, 20_011])
@each_kind
def test_several_streams_at_once(kind, rows):
    """Nothing that calls may share, such as memory for partial sums, is shared by calls that overlap."""
    seeds = range(4)
    calls = [of_kind(kind, rows, seed=10 * seed) for seed in seeds]
    expected = [step(*call) for call in calls]
    matrix = torch.randn(8192, 8192, device=DEVICE)
    gate, streams = torch.cuda.Event(), [torch.cuda.Stream() for _ in seeds]
    torch.cuda.synchronize()
    for _ in range(5):  # all streams wait until much is queued in each
        torch.mm(matrix, matrix)
    gate.record()
    runs = []
    for stream in streams:
        stream.wait_event(gate)
    for _ in range(10):
        for seed, stream in zip(seeds, streams, strict=True):
            with torch.cuda.stream(stream):
                runs.append((seed, step(*calls[seed])))
    torch.cuda.synchronize()
    for seed, results in runs:
        assert_same_bits(f"stream {seed}", results, expected[seed])


@each_kind
def test_each_call_sees_what_was_written_before_it(kind):
    """Queued back to back on a side stream, each made of the results of the one before, in memory just given back."""
    call, values = of_kind(kind, rows=4099)

    def chain(synchronize: bool) -> list[Tensor]:
        leaves = [value.detach().clone().requires_grad_(value.requires_grad) for value in values]
        for _ in range(20):
            _, *gradients = step(call, leaves)
            variable = [leaf for leaf in leaves if leaf.requires_grad]
            with torch.no_grad():
                for leaf, gradient in zip(variable, gradients, strict=True):
                    leaf.sub_(gradient / (gradient.norm() + 1) * 0.1)
            if synchronize:
                torch.cuda.synchronize()
        return step(call, leaves)

    expected = chain(synchronize=True)
    matrix, side = torch.randn(8192, 8192, device=DEVICE), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.mm(matrix, matrix)  # while it runs, all of the chain is queued
        results = chain(synchronize=False)
    torch.cuda.synchronize()
    assert_same_bits("queued", results, expected)


# ---- more elements than 32 bits count


def ends(values: Tensor, count: int) -> Tensor:
    return torch.cat([values[:count], values[-count:]])


def is_zero(values: Tensor) -> bool:
    """In parts: a reduction of more than 2^31 elements may be slow or unsupported itself."""
    return not any(part.any() for part in values.flatten().split(2**29))


@pytest.mark.gpu_memory(40)
@pytest.mark.parametrize("form", ["labels", "soft", "softmax"])
@pytest.mark.parametrize("classes", [80, 1])
def test_more_rows_than_32_bits_count(classes, form):
    """The first and the last rows are random; all others are right beyond doubt, so that nothing comes of them."""
    rows, edge = BEYOND_32_BITS // classes + 1000, 64
    few = made("logits", 2 * edge, classes, torch.float16).detach()
    call, exact, fill = sigmoid_focal_loss, sigmoid_exact, -6e4
    if form == "soft":
        few_targets = made("soft", 2 * edge, classes, torch.float16)
        target = torch.zeros(rows, classes, dtype=torch.float16, device=DEVICE)
    else:  # labels of one class are as many as logits
        few_targets = made("int32_labels" if classes == 1 else "labels", 2 * edge, classes)
        target = torch.full((rows,), -1, dtype=few_targets.dtype, device=DEVICE)
    if form == "softmax":
        call, exact = softmax_focal_loss, softmax_exact
    target[:edge], target[-edge:] = few_targets[:edge], few_targets[-edge:]
    logits = torch.full((rows, classes), fill, dtype=torch.float16, device=DEVICE)
    logits[:edge], logits[-edge:] = few[:edge], few[-edge:]
    losses, slopes = exact(few, few_targets)
    each = call(logits, target, reduction="none")
    assert is_zero(each[edge:-edge])
    assert_near("each", ends(each, edge), losses, TOLERANCES[torch.float16])
    del each
    total, gradient = step(partial(call, reduction="sum"), [logits.requires_grad_(), target])
    assert_near("sum", total, losses.sum(), 2e-6)
    assert is_zero(gradient[edge:-edge])
    assert_near("gradient", ends(gradient, edge), slopes, TOLERANCES[torch.float16])


@pytest.mark.gpu_memory(30)
@pytest.mark.parametrize("form", ["labels", "soft", "softmax"])
def test_more_elements_of_a_head_than_32_bits_count(form):
    """(B, C, H, W) seen as (B, H, W, C): the classes of a pixel lie far apart."""
    classes, height, width, edge = 80, 8192, BEYOND_32_BITS // (80 * 8192) + 1, 64
    few = made("head", 2 * edge, classes, torch.float16).detach()  # (classes, pixels)
    head = torch.full((1, classes, height * width), -6e4, dtype=torch.float16, device=DEVICE)
    assert head.numel() > BEYOND_32_BITS
    head[0, :, :edge], head[0, :, -edge:] = few[:, :edge], few[:, -edge:]
    head = head.view(1, classes, height, width)
    if form == "soft":
        few_targets = made("soft", 2 * edge, classes, torch.float16)
        target = torch.zeros(1, classes, height * width, dtype=torch.float16, device=DEVICE)
        target[0, :, :edge], target[0, :, -edge:] = few_targets.mT[:, :edge], few_targets.mT[:, -edge:]
        target = channels_to_the_end(target.view_as(head))
    else:
        few_targets = made("labels", 2 * edge, classes)
        target = torch.full((height * width,), -1, device=DEVICE)
        target[:edge], target[-edge:] = few_targets[:edge], few_targets[-edge:]
        target = target.view(1, height, width)
    call, exact = (softmax_focal_loss, softmax_exact) if form == "softmax" else (sigmoid_focal_loss, sigmoid_exact)
    losses, slopes = exact(few.mT, few_targets)

    def reduced(leaf: Tensor, target: Tensor) -> Tensor:
        return call(channels_to_the_end(leaf), target, reduction="sum")

    total, gradient = step(reduced, [head.requires_grad_(), target])
    assert_near("sum", total, losses.sum(), 2e-6)
    gradient = gradient.reshape(classes, height * width)
    assert is_zero(gradient[:, edge:-edge].contiguous())
    assert_near("gradient", ends(gradient.mT, edge), slopes, TOLERANCES[torch.float16])
    del gradient
    each = call(channels_to_the_end(head.detach()), target, reduction="none").flatten(1, 2)[0]
    assert_near("each", ends(each, edge), losses, TOLERANCES[torch.float16])


@pytest.mark.gpu_memory(20)
@pytest.mark.parametrize(
    ("form", "shape"),
    [("sigmoid", (5, 2**29)), ("softmax", (5, 2**29)), ("sigmoid", (1, 2**31 + 64))],
    ids=["sigmoid", "softmax", "sigmoid-one-row"],
)
def test_as_many_classes_as_no_one_has(form, shape):
    """The first and the last classes are random; nothing comes of the others, or of a label among them."""
    edge, (rows, classes) = 40, shape
    few = made("logits", rows, 2 * edge, torch.float16).detach()
    few_labels = torch.tensor([2 * edge - 1, 3, edge, -1, 2 * edge], device=DEVICE)[:rows]
    labels = torch.where(few_labels >= edge, few_labels + (classes - 2 * edge), few_labels)
    logits = torch.full(shape, -6e4, dtype=torch.float16, device=DEVICE)
    logits[:, :edge], logits[:, -edge:] = few[:, :edge], few[:, -edge:]
    call, exact = (softmax_focal_loss, softmax_exact) if form == "softmax" else (sigmoid_focal_loss, sigmoid_exact)
    losses, slopes = exact(few, few_labels)
    total, gradient = step(partial(call, reduction="sum"), [logits.requires_grad_(), labels])
    assert_near("sum", total, losses.sum(), 2e-6)
    assert is_zero(gradient[:, edge:-edge].contiguous())
    actual = torch.cat([gradient[:, :edge], gradient[:, -edge:]], 1)
    assert_near("gradient", actual, slopes, TOLERANCES[torch.float16])


@pytest.mark.gpu_memory(45)
@pytest.mark.parametrize("form", ["labels", "bool", "softmax"])
def test_strides_that_32_bits_do_not_hold(form):
    """A few rows, further apart than 32 bits count, in a tensor that is NaN elsewhere."""
    rows, classes, apart = 4, 9, 2**30

    def spread(values: Tensor, fill: float) -> Tensor:
        around = values.new_full((rows, apart), fill)
        inside = around[:, 5 : 5 + values[0].numel()].view(values.shape)
        return inside.copy_(values)

    logits = made("logits", rows, classes, torch.float16).detach()
    weight = made("bool_weight", rows, classes)
    call = (
        softmax_focal_loss
        if form == "softmax"
        else partial(sigmoid_focal_loss, weight=spread(weight[:, None], 1)[:, 0])
    )
    exact = softmax_exact if form == "softmax" else sigmoid_exact
    target = made("bool" if form == "bool" else "int32_labels", rows, classes)
    losses, slopes = exact(logits, target)
    if form != "softmax":
        losses, slopes = losses * weight[:, None], slopes * weight[:, None]
    far_target = spread(target[:, None], 0)[:, 0] if target.dim() == 1 else spread(target, 1)
    assert far_target.stride(0) == apart
    values = [spread(logits, NAN).requires_grad_(), far_target]
    total, gradient = step(partial(call, reduction="sum"), values)
    assert_near("sum", total, losses.sum(), 2e-6)
    assert_near("gradient", gradient, slopes, TOLERANCES[torch.float16])
    each = call(*values, reduction="none")
    assert_near("each", each, losses, TOLERANCES[torch.float16])


@pytest.mark.parametrize("classes", [80, 9])  # of which rows are taken apart by a power of 2, and by nothing
@pytest.mark.parametrize("form", ["labels", "softmax"])
def test_more_elements_than_32_bits_count_in_no_memory(form, classes):
    """One row, seen as if there were many."""
    call, exact = (softmax_focal_loss, softmax_exact) if form == "softmax" else (sigmoid_focal_loss, sigmoid_exact)
    logits, labels = made("logits", 1, classes).detach(), torch.tensor([3], device=DEVICE)
    rows = BEYOND_32_BITS // classes * 2
    losses, _ = exact(logits, labels)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    mean = call(logits.expand(rows, classes), labels.expand(rows))
    assert_near("mean", mean, losses.mean(), 1e-6)
    assert torch.cuda.max_memory_allocated() - before < 2**20


# ---- memory


@pytest.mark.gpu_memory(4)
@pytest.mark.parametrize("form", ["labels", "soft", "row-weight", "softmax", "each", "head"])
def test_peak_memory(form):
    """Logits, targets, the gradient and what is returned; above these not 1% of the logits."""
    rows, classes = workloads.FOCAL["dense-large"]
    logits, target = workloads.focal(rows, classes)
    call: Call = sigmoid_focal_loss
    if form == "soft":
        target = targets_of("soft", rows, classes)
    elif form == "row-weight":
        weight, avg_factor = torch.rand(rows, device=DEVICE), torch.tensor(7, device=DEVICE)
        call = partial(sigmoid_focal_loss, weight=weight, avg_factor=avg_factor)
    elif form == "softmax":
        call = softmax_focal_loss
    elif form == "each":
        call = partial(sigmoid_focal_loss, reduction="none")
    elif form == "head":
        logits = logits.view(classes, rows).mT  # its gradient has the same strides
    seed = torch.ones(logits.shape if form == "each" else (), device=DEVICE)

    def train() -> tuple[int, int]:
        """Bytes at the peak, and of the results."""
        leaf = logits.detach().requires_grad_()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = call(leaf, target)
        (gradient,) = torch.autograd.grad(loss, leaf, seed)
        return torch.cuda.max_memory_allocated() - before, bytes_of(loss, gradient)

    train()  # the first call may make what later calls keep
    peak, needed = train()
    beside = peak - needed
    assert beside <= 0.01 * bytes_of(logits), f"{beside / 1e6:.1f} MB beside the results' {needed / 1e6:.0f} MB"


def test_nothing_piles_up():
    """Not from call to call, nor from size to size or power to power, for each of which a kernel may be kept."""
    calls = [of_kind(kind, rows) for kind in KINDS for rows in (100, 3001)]
    for call, values in calls:
        step(call, values)
    logits, labels = made("logits", 3001, 80), made("labels", 3001, 80)
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        for call, values in calls:
            step(call, values)
    end = time.monotonic() + 2  # autograd's thread may let go of its last node after the step has returned
    while torch.cuda.memory_allocated() != before and time.monotonic() < end:
        time.sleep(0.01)
    assert torch.cuda.memory_allocated() == before
    for k in range(20):
        step(partial(sigmoid_focal_loss, gamma=0.1 + 0.17 * k), [logits[: 3000 - 100 * k], labels[: 3000 - 100 * k]])
    assert torch.cuda.memory_allocated() - before <= 2**20


# ---- streams, graphs, devices, threads


@each_kind
def test_captured_in_a_cuda_graph(kind):
    call, static = of_kind(kind)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(call, static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(call, static)
    for seed in (100, 200, 300):
        _, changed = of_kind(kind, seed=seed)
        with torch.no_grad():
            for value, new in zip(static, changed, strict=True):
                value.copy_(new)
        graph.replay()
        assert_same_bits(f"seed {seed}", results, step(call, changed))
    assert_right("replayed", results, expected_step(call, static))


def test_a_graph_is_replayed_while_others_call():
    """Two graphs and ordinary calls on three streams, all at once."""
    kinds = ["labels-row-weight", "softmax", "labels"]
    calls = [of_kind(kind, rows=20_011, seed=10 * k) for k, kind in enumerate(kinds)]
    expected = [step(*call) for call in calls]
    graphs, captured = [torch.cuda.CUDAGraph() for _ in range(2)], []
    for graph, call in zip(graphs, calls, strict=False):
        with torch.cuda.graph(graph):
            captured.append(step(*call))
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in kinds]
    runs = []
    for _ in range(50):
        for graph, stream in zip(graphs, streams, strict=False):
            with torch.cuda.stream(stream):
                graph.replay()
        with torch.cuda.stream(streams[-1]):
            runs.append(step(*calls[-1]))
    torch.cuda.synchronize()
    for k, results in enumerate(captured):
        assert_same_bits(f"graph {k}", results, expected[k])
    for number, results in enumerate(runs):
        assert_same_bits(f"run {number}", results, expected[-1])


def test_few_logits_on_all_streams_and_in_graphs_at_once():
    """Their sum is finished by the program that ends last: launches that overlap must not count together."""
    from saccade import loss_reduction_kernels

    calls = [of_kind("labels-number", rows=7200, classes=10, seed=10 * k) for k in range(6)]
    expected = [step(*call) for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    graphs, captured = [torch.cuda.CUDAGraph() for _ in range(3)], []
    torch.cuda.synchronize()
    for graph, call in zip(graphs, calls, strict=False):
        with torch.cuda.stream(streams[-1]):
            step(*call)
        with torch.cuda.graph(graph, stream=streams[-1]):  # all on one stream, which also has a counter kept
            captured.append([step(*call) for _ in range(20)])
    torch.cuda.synchronize()
    matrix, gate = torch.randn(8192, 8192, device=DEVICE), torch.cuda.Event()
    for _ in range(5):  # all streams wait until much is queued in each
        torch.mm(matrix, matrix)
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
                runs.append((number, step(*calls[number])))
    torch.cuda.synchronize()
    runs += [(number, results) for number, of_graph in enumerate(captured) for results in of_graph]
    for number, results in runs:
        assert_same_bits(f"stream {number}", results, expected[number])
    kept = [loss_reduction_kernels._workspaces[0, stream.cuda_stream, torch.float32] for stream in streams[3:]]
    assert all(workspace.counter.item() == 0 for workspace in kept)


def test_steps_captured_in_one_graph():
    """A training loop: the logits that a call reads are written by the step before it."""
    logits, labels = made("logits", 7200, 10), made("labels", 7200, 10)

    def loop(leaf: Tensor) -> Tensor:
        for _ in range(10):
            _, gradient = step(partial(sigmoid_focal_loss, avg_factor=10.0), [leaf, labels])
            leaf = (leaf.detach() - gradient).requires_grad_()
        return leaf.detach()

    expected = loop(logits)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        loop(logits)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = loop(logits)
    for _ in range(3):
        graph.replay()
        assert_same_bits("replayed", [result], [expected])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@each_kind
def test_on_another_gpu_than_the_current_one_and_back(kind):
    call, values = of_kind(kind)
    expected = expected_step(call, values)
    for device in ("cuda:1", "cuda:0", "cuda:1"):
        moved = [value.detach().to(device).requires_grad_(value.requires_grad) for value in values]
        results = step(call, moved)
        assert torch.cuda.current_device() == 0
        assert {result.device for result in results} == {torch.device(device)}
        assert_right(device, results, expected)


@pytest.mark.parametrize("classes", [13, 80])
@each_kind
def test_nothing_waits_for_the_gpu(kind, classes):
    """Not even the first call with new sizes, which no other test has."""
    call, values = of_kind(kind, rows=1009, classes=classes)
    with synchronizing_raises():
        step(call, values)


def test_the_module_waits_for_nothing():
    logits, labels = workloads.focal(*workloads.FOCAL["head"])
    module = FocalLoss(loss_weight=2.0)
    weight = torch.rand(len(logits), device=DEVICE) > 0.5
    with synchronizing_raises():
        avg_factor = (labels < 10).sum().clamp(min=1)
        for factor in (avg_factor, avg_factor.view(1).float(), 3.0, None):
            leaf = logits.detach().requires_grad_()
            loss = module(leaf, labels, weight, avg_factor=factor)
            loss.sum().backward()
    assert leaf.grad is not None


@each_kind
def test_threads(kind):
    """Each with inputs of its own size, for which there was no call before."""
    rows = [500 + 7 * k for k in range(8)]
    calls = [of_kind(kind, rows=count, classes=11, seed=count) for count in rows]
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda call: [step(*call) for _ in range(10)], calls))
    for call, results in zip(calls, runs, strict=True):
        expected = expected_step(*call)
        for result in results:
            assert_right("thread", result, expected)


FIRST_CALL = """
import torch
from saccade.focal_loss import sigmoid_focal_loss, softmax_focal_loss

rng = torch.Generator().manual_seed(0)
logits, labels = torch.randn(501, 7, generator=rng), torch.randint(-1, 9, (501,), generator=rng)

def train(logits, labels):
    leaf = logits.detach().requires_grad_()
    loss = sigmoid_focal_loss(leaf, labels, avg_factor=7.0) + softmax_focal_loss(leaf, labels)
    return [loss.detach(), *torch.autograd.grad(loss, leaf)]

expected = train(logits.double(), labels)
logits, labels = logits.cuda(), labels.cuda()
if {first!r} == "inference-mode":
    with torch.inference_mode():
        sigmoid_focal_loss(logits, labels), softmax_focal_loss(logits, labels)
elif {first!r} == "compiled":
    torch.compile(train, backend="aot_eager")(logits, labels)
elif {first!r} == "off-the-main-stream":
    with torch.cuda.stream(torch.cuda.Stream()):
        train(logits, labels)
elif {first!r} == "unaligned":
    train(torch.cat([logits.flatten()[:1], logits.flatten()])[1:].view(501, 7), labels)
results = train(logits, labels)
torch.cuda.synchronize()
for left, right in zip(results, expected):
    torch.testing.assert_close(left.cpu().double(), right, rtol=1e-5, atol=1e-8)
"""


@pytest.mark.parametrize("first", ["inference-mode", "compiled", "off-the-main-stream", "unaligned"])
def test_whatever_the_first_call_of_a_process_was(first):
    """What it leaves behind, kept kernels or memory, serves the calls after it."""
    subprocess.run([sys.executable, "-c", FIRST_CALL.format(first=first)], check=True)


# ---- kernels that are kept for later calls


def plain(values: Tensor) -> Tensor:
    return values.clone(memory_format=torch.contiguous_format)


def unaligned(values: Tensor) -> Tensor:
    """At an address that is no multiple of 16 bytes, with the strides of a contiguous tensor."""
    buffer = values.new_empty(values.numel() + 1)
    return buffer[1:].view(values.shape).copy_(values)


def with_gaps(values: Tensor, gap: int) -> Tensor:
    return values.new_empty(*values.shape[:-1], values.shape[-1] + gap)[..., : values.shape[-1]].copy_(values)


def transposed(values: Tensor) -> Tensor:
    """With the axes in another order; a vector with gaps."""
    return plain(values.mT).mT if values.dim() > 1 else with_gaps(values[:, None], gap=1)[:, 0]


PLACES: list[Callable[[Tensor], Tensor]] = [plain, unaligned, partial(with_gaps, gap=1), transposed]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["labels-row-weight", "soft", "softmax"])
def test_kept_kernels_are_told_apart(kind, dtype):
    """The same call with inputs in other places and of other sizes, twice through.

    A kernel that was compiled for addresses divisible by 16, for a size of 1 or for a stride of 1 may not serve others.
    Which one is compiled first matters: float16, which has kernels of its own, goes the other way.
    """
    turns = list(itertools.product([(64, 80), (1, 80), (80, 1)], range(len(PLACES))))
    if dtype == torch.float16:
        turns.reverse()
    for (rows, classes), first in turns * 2:
        call, values = of_kind(kind, rows, classes, dtype)
        placed = [
            PLACES[(first + k) % len(PLACES)](value.detach()).requires_grad_(value.requires_grad)
            if value.dim()
            else value
            for k, value in enumerate(values)
        ]
        what, expected = f"{rows} x {classes}, place {first}", expected_step(call, values)
        assert_right(what, step(call, placed), expected)
        assert_right(f"{what}, again", step(call, placed), expected)


@pytest.mark.parametrize("call", [sigmoid_focal_loss, softmax_focal_loss])
def test_gradients_of_the_result_from_other_places(call):
    logits, labels = made("logits", 64, 80), made("labels", 64, 80)
    each = call(logits, labels, reduction="none")
    seed = torch.rand(each.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    (expected,) = torch.autograd.grad(each, logits, seed, retain_graph=True)
    for place in [*PLACES, *reversed(PLACES)]:
        (gradient,) = torch.autograd.grad(each, logits, place(seed), retain_graph=True)
        assert_near(f"{place}", gradient, expected, TOLERANCES[torch.float32])


@pytest.mark.parametrize("call", [sigmoid_focal_loss, softmax_focal_loss])
def test_dtypes_and_options_in_turn(call):
    """All of one shape: what changes from call to call is the dtype of an input, a power, an option."""
    dtypes = [torch.float32, torch.float16]
    options = [
        {},
        {"gamma": 0.0},
        {"gamma": 1.0},
        {"gamma": 1.7},
        {"gamma": 2.0, "alpha": 0.0},
        {"alpha": 1.0},
        {"reduction": "sum"},
        {"reduction": "none"},
        {"avg_factor": 3.0},
        {"avg_factor": torch.tensor(3.0, device=DEVICE)},
        {"avg_factor": torch.tensor([3], device=DEVICE)},
        {"avg_factor": torch.tensor([3], device=DEVICE, dtype=torch.float16)},
    ]
    if call is sigmoid_focal_loss:
        options.append({"alpha": -1.0})
    exact = softmax_exact if call is softmax_focal_loss else sigmoid_exact
    base, labels = made("logits", 96, 16, torch.float16).detach(), made("labels", 96, 16)
    logits = {dtype: base.to(dtype).requires_grad_() for dtype in dtypes}
    turns = list(itertools.product(dtypes, options))
    for turn, (dtype, given) in enumerate([*turns, *reversed(turns)]):
        target = labels if turn % 2 else labels.int()
        powers = {key: value for key, value in given.items() if key in ("alpha", "gamma")}
        loss, gradient = step(partial(call, **given), [logits[dtype], target])
        losses, slopes = exact(base, labels, **powers)
        if given.get("reduction") == "none":
            assert_near(f"{dtype}, {target.dtype}, {given}", loss, losses, TOLERANCES[dtype])
            continue
        count = 1 if "reduction" in given else 3 + EPS if "avg_factor" in given else losses.numel()
        assert loss.dtype == torch.float32
        assert_near(f"{dtype}, {target.dtype}, {given}", loss.flatten()[0], losses.sum() / count, 2e-6)
        # The gradient of a mean of halves is rounded to numbers that are not normal: to multiples of 2**-24.
        if dtype != torch.float16 or count == 1:
            assert_near(f"gradient, {dtype}, {target.dtype}, {given}", gradient, slopes / count, TOLERANCES[dtype])


def test_a_new_power_each_call():
    logits, labels = made("logits", 301, 80), made("labels", 301, 80)
    for gamma in torch.rand(20, generator=torch.Generator().manual_seed(0)).mul(6).tolist():
        for call in (sigmoid_focal_loss, softmax_focal_loss):
            given = partial(call, gamma=gamma)
            assert_right(f"gamma {gamma}", step(given, [logits, labels]), expected_step(given, [logits, labels]))


# ---- torch.compile


@pytest.mark.parametrize(
    ("form", "autocast"),
    [("labels", False), ("labels", True), ("softmax", True), ("weighted", False), ("head", False), ("soft", True)],
)
def test_compiled_for_every_batch_size(form, autocast):
    """By the default backend, which generates code around the operator; once more is allowed, once a size is not."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")

    def head(features: Tensor, projection: Tensor, target: Tensor) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
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

    compiled = torch.compile(head, backend=counter, fullgraph=True, dynamic=True)
    for rows in (900, 901, 2048):
        rng = torch.Generator().manual_seed(rows)
        features = torch.randn(rows, 24, generator=rng).to(DEVICE).requires_grad_()
        projection = (torch.randn(24, 10, generator=rng) / 4).to(DEVICE).requires_grad_()
        target = (
            torch.rand(rows, 10, generator=rng) if form == "soft" else torch.randint(-1, 12, (rows,), generator=rng)
        )
        values = [features, projection, target.to(DEVICE)]
        for k, (left, right) in enumerate(zip(step(compiled, values), step(head, values), strict=True)):
            assert left.dtype == right.dtype
            # The compiled code may round logits and their gradients around the operator in another way.
            assert_near(f"result {k}, {rows} rows", left, right, 1e-2 if autocast else 1e-5)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("call", [sigmoid_focal_loss, softmax_focal_loss])
def test_autocast_leaves_logits_alone(call):
    logits, labels = made("logits", 301, 80), made("labels", 301, 80)
    expected = step(call, [logits, labels])
    with torch.autocast(DEVICE, dtype=torch.float16):
        assert_same_bits("float32", step(call, [logits, labels]), expected)
        half = logits.detach().half().requires_grad_()
        loss, gradient = step(call, [half, labels])
    assert loss.dtype == torch.float32
    assert gradient.dtype == torch.float16
    assert_right("float16", [loss], expected_step(call, [half, labels])[:1])
