"""Gaussian focal losses on a GPU: real sizes, equal bits, more than 2^31 elements, memory, streams, graphs."""

import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from benchmarks import workloads
from cases.comparison import assert_near, assert_same_bits
from cases.gaussian_focal_loss import EPS, exact
from cases.losses_on_gpu import (
    BEYOND_32_BITS,
    NAN,
    TOLERANCES,
    bytes_of,
    deterministic_algorithms,
    synchronizing_raises,
)
from saccade.gaussian_focal_loss import gaussian_focal_loss, gaussian_focal_loss_with_logits
from saccade.nn import GaussianFocalLoss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DEVICE = "cuda"

Call = Callable[..., Tensor]


# ---- ways to call the losses, as functions of tensors alone


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


KINDS: dict[str, tuple[Call, str]] = {
    "positives": (partial(gaussian_focal_loss_with_logits, avg_factor="num_pos"), "logits target"),
    "sum": (partial(gaussian_focal_loss_with_logits, reduction="sum", clip=1e-4), "logits target"),
    "each": (partial(gaussian_focal_loss_with_logits, reduction="none", alpha=1.7, gamma=2.3), "logits target"),
    "number": (partial(gaussian_focal_loss_with_logits, avg_factor=7.3, pos_weight=0.3), "logits target"),
    "avg-factor": (lambda x, t, n: gaussian_focal_loss_with_logits(x, t, avg_factor=n), "logits target avg_factor"),
    "weight": (
        lambda x, t, w: gaussian_focal_loss_with_logits(x, t, weight=w, avg_factor="num_pos"),
        "logits target weight",
    ),
    "map-weight": (
        lambda x, t, w, n: gaussian_focal_loss_with_logits(x, t, weight=w, avg_factor=n),
        "logits target map_weight int_avg_factor",
    ),
    "mask": (lambda x, t, w: gaussian_focal_loss_with_logits(x, t, weight=w), "logits target mask"),
    "channels-last": (
        lambda x, t: gaussian_focal_loss_with_logits(x.permute(0, 3, 1, 2), t, avg_factor="num_pos"),
        "channels_last target",
    ),
    "probabilities": (partial(gaussian_focal_loss, avg_factor="num_pos"), "probabilities target"),
    "probabilities-each": (partial(gaussian_focal_loss, reduction="none"), "probabilities target"),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def of_kind(
    kind: str, shape: tuple[int, ...] = (3, 5, 67, 71), dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Call, list[Tensor]]:
    """A loss as a function of tensors, and those."""
    call, names = KINDS[kind]
    return call, [made(name, shape, dtype, seed + k) for k, name in enumerate(names.split())]


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


@pytest.mark.gpu_memory(12)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1, 20])
@pytest.mark.parametrize("name", workloads.GAUSSIAN_FOCAL)
def test_accuracy_at_real_size(name, scale, dtype):
    logits, target = workloads.gaussian_focal(workloads.GAUSSIAN_FOCAL[name], dtype=dtype)
    logits *= scale
    blocks = [exact(x, t, with_logits=True) for x, t in zip(logits, target, strict=True)]
    total = sum(losses.sum() for losses, _ in blocks)
    slopes = torch.stack([slopes.float() for _, slopes in blocks])
    loss, gradient = step(partial(gaussian_focal_loss_with_logits, reduction="sum"), [logits.requires_grad_(), target])
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    assert_near("sum", loss, total, 2e-6)
    assert_near("gradient", gradient, slopes, TOLERANCES[dtype])
    loss = gaussian_focal_loss_with_logits(logits, target, avg_factor="num_pos")
    assert_near("mean over positives", loss, total / ((target == 1).sum() + EPS), 2e-6)


@each_kind
def test_weights_and_numbers_of_all_kinds(kind):
    """Gradients of broadcast weights are sums over channels, near each other or far apart."""
    for shape in ((2, 10, 128, 128), (1, 3001, 3, 3), (40_003, 1, 1, 7)):
        call, values = of_kind(kind, shape)
        assert_right(f"{shape}", step(call, values), expected_step(call, values))


@pytest.mark.gpu_memory(10)
@pytest.mark.parametrize("pattern", ["random", "constant", "offset", "two-scales", "positives"])
def test_the_mean_of_300_million_elements(pattern):
    """Summed, or counted, one by one in float32 they would come to 2^24 at most."""
    rows, width = 1200, 250_000
    rng = torch.Generator(DEVICE).manual_seed(0)
    logits = torch.randn(rows, width, device=DEVICE, generator=rng)
    target = torch.rand(rows, width, device=DEVICE, generator=rng) ** 4
    target[:, ::1000] = 1
    if pattern == "constant":  # all are rounded the same way, in elements and in partial sums
        logits.fill_(0.37)
        target.fill_(0.25)
    elif pattern == "offset":
        logits.mul_(0.01).add_(30)
    elif pattern == "two-scales":
        logits[: rows // 2] = 1e4
    elif pattern == "positives":
        target[50:] = 1
    blocks = zip(logits.split(50), target.split(50), strict=True)
    total = sum(exact(x, t, with_logits=True)[0].sum() for x, t in blocks).item()
    positives = max(1, (target == 1).sum().item())
    loss = gaussian_focal_loss_with_logits(logits, target)
    assert loss.item() == pytest.approx(total / logits.numel(), rel=1e-6)
    loss = gaussian_focal_loss_with_logits(logits, target, avg_factor="num_pos")
    assert loss.item() == pytest.approx(total / (positives + EPS), rel=1e-6)


# ---- equal bits


@pytest.mark.parametrize("strict", [False, True], ids=["default", "deterministic-algorithms"])
@each_kind
def test_equal_bits_run_after_run(kind, strict):
    """While another stream keeps the GPU busy, and on another stream than the current one."""
    call, values = of_kind(kind, (4, 10, 128, 128))
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


@each_kind
def test_several_streams_at_once(kind):
    """Nothing that calls may share, such as memory for partial sums, is shared by calls that overlap."""
    seeds = range(4)
    calls = [of_kind(kind, (4, 10, 67, 71), seed=10 * seed) for seed in seeds]
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
    call, values = of_kind(kind)

    def chain(synchronize: bool) -> list[Tensor]:
        leaves = [value.detach().clone().requires_grad_(value.requires_grad) for value in values]
        for _ in range(20):
            _, *gradients = step(call, leaves)
            variable = [leaf for leaf in leaves if leaf.requires_grad]
            with torch.no_grad():
                for leaf, gradient in zip(variable, gradients, strict=True):
                    leaf.sub_(gradient / (gradient.norm() + 1) * 0.01)
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
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "broadcast-weight"])
@pytest.mark.parametrize("with_logits", [False, True])
def test_more_elements_than_32_bits_count(with_logits, layout):
    """The first and the last rows are random; all others are right beyond doubt, so that nothing comes of them."""
    width, edge = 96, 64
    rows = BEYOND_32_BITS // width + 1000
    call = gaussian_focal_loss_with_logits if with_logits else gaussian_focal_loss
    few = made("logits" if with_logits else "probabilities", (1, 1, 2 * edge, width), torch.float16).detach()[0, 0]
    few_target = made("target", (1, 1, 2 * edge, width))[0, 0].half()
    few_target[:, 7] = 1
    weight = None
    if layout == "broadcast-weight":
        weight = torch.rand(width, device=DEVICE)

    def among_many(values: Tensor, fill: float) -> Tensor:
        many = values.new_full((width, rows) if layout == "transposed" else (rows, width), fill)
        many = many.mT if layout == "transposed" else many
        many[:edge], many[-edge:] = values[:edge], values[-edge:]
        return many

    losses, slopes = exact(few, few_target, with_logits=with_logits)
    if weight is not None:
        losses, slopes = losses * weight, slopes * weight
    pred, target = among_many(few, -6e4 if with_logits else 0.0), among_many(few_target, 0.0)
    assert pred.numel() > BEYOND_32_BITS
    each = call(pred, target, weight=weight, reduction="none")
    assert is_zero(each[edge:-edge])
    assert_near("each", ends(each, edge), losses, TOLERANCES[torch.float16])
    del each
    counted = partial(call, weight=weight, avg_factor="num_pos")
    loss, gradient = step(counted, [pred.requires_grad_(), target])
    positives = (few_target == 1).sum().item() + EPS
    assert_near("mean over positives", loss, losses.sum() / positives, 2e-6)
    assert is_zero(gradient[edge:-edge])
    # Divided by the positives, gradients in float16 are rounded to multiples of 2**-24.
    scale = slopes.norm().item() / positives
    assert (ends(gradient, edge) - slopes / positives).norm().item() <= 6e-4 * scale + 2**-25 * slopes.numel() ** 0.5


@pytest.mark.gpu_memory(35)
def test_strides_that_32_bits_do_not_hold():
    """A few rows, further apart than 32 bits count, in tensors that are NaN elsewhere, or full of positives."""
    rows, width, apart = 4, 9, 2**30

    def spread(values: Tensor, fill: float) -> Tensor:
        return values.new_full((rows, apart), fill)[:, 5 : 5 + width].copy_(values)

    logits = made("logits", (1, 1, rows, width), torch.float16).detach()[0, 0]
    target = made("target", (1, 1, rows, width))[0, 0].half()
    weight = made("mask", (1, 1, rows, width))
    target[2, 3] = 1
    losses, slopes = (value * weight for value in exact(logits, target, with_logits=True))
    values = [spread(logits, NAN).requires_grad_(), spread(target, 1)]
    far_weight = spread(weight, 1)
    assert far_weight.stride(0) == apart
    call = partial(gaussian_focal_loss_with_logits, weight=far_weight)
    loss, gradient = step(partial(call, reduction="sum"), values)
    assert_near("sum", loss, losses.sum(), 2e-6)
    assert_near("gradient", gradient, slopes, TOLERANCES[torch.float16])
    loss, _ = step(partial(call, avg_factor="num_pos"), values)
    assert_near("mean over positives", loss, losses.sum() / ((target == 1).sum() + EPS), 2e-6)
    assert_near("each", call(*values, reduction="none"), losses, TOLERANCES[torch.float16])


def test_more_positives_than_32_bits_count_in_no_memory():
    """One row, seen as if there were many."""
    rows = 2**27
    logits, target = torch.randn(1, 32, device=DEVICE), torch.ones(1, 32, device=DEVICE)
    target[0, 0] = 0.5
    losses, _ = exact(logits, target, with_logits=True)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = gaussian_focal_loss_with_logits(logits.expand(rows, 32), target.expand(rows, 32), avg_factor="num_pos")
    assert_near("mean over positives", loss, losses.sum() / 31, 1e-6)
    # A sum and a count, 12 bytes, for each 2**15 of the 2**32 elements.
    assert torch.cuda.max_memory_allocated() - before < 2**21


# ---- memory


@pytest.mark.gpu_memory(3)
@pytest.mark.parametrize("form", ["positives", "weight", "each", "channels-last", "probabilities"])
def test_peak_memory(form):
    """Logits, targets, the gradient and what is returned; above these not 1% of the logits."""
    shape = workloads.GAUSSIAN_FOCAL["centernet"]
    logits, target = workloads.gaussian_focal(shape)
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
    calls = [of_kind(kind, shape) for kind in KINDS for shape in ((1, 2, 5, 7), (3, 5, 67, 71))]
    for call, values in calls:
        step(call, values)
    logits, target = made("logits", (3, 5, 67, 71)), made("target", (3, 5, 67, 71))
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        for call, values in calls:
            step(call, values)
    end = time.monotonic() + 2  # autograd's thread may let go of its last node after the step has returned
    while torch.cuda.memory_allocated() != before and time.monotonic() < end:
        time.sleep(0.01)
    assert torch.cuda.memory_allocated() == before
    for k in range(20):
        call = partial(gaussian_focal_loss_with_logits, alpha=0.1 + 0.17 * k, gamma=0.3 + 0.1 * k)
        step(call, [logits[..., : 70 - k], target[..., : 70 - k]])
    assert torch.cuda.memory_allocated() - before <= 2**20


# ---- streams, graphs, devices


@each_kind
def test_captured_in_a_cuda_graph(kind):
    """With another number of positives at each replay."""
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
        if seed == 200:
            changed[1][:, :, 5] = 1
        with torch.no_grad():
            for value, new in zip(static, changed, strict=True):
                value.copy_(new)
        graph.replay()
        assert_same_bits(f"seed {seed}", results, step(call, changed))
    assert_right("replayed", results, expected_step(call, static))


def test_a_graph_is_replayed_while_others_call():
    """Two graphs and ordinary calls on three streams, all at once."""
    kinds = ["positives", "map-weight", "probabilities"]
    calls = [of_kind(kind, (4, 10, 67, 71), seed=10 * k) for k, kind in enumerate(kinds)]
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


@pytest.mark.parametrize("shape", [(2, 3, 41, 43), (1, 80, 16, 16)], ids=str)
@each_kind
def test_nothing_waits_for_the_gpu(kind, shape):
    """Not even the first call with new sizes, which no other test has; the positives are counted on the device."""
    call, values = of_kind(kind, shape)
    with synchronizing_raises():
        step(call, values)


def test_the_module_waits_for_nothing():
    pred, target = made("probabilities", (2, 3, 45, 47)), made("target", (2, 3, 45, 47))
    module = GaussianFocalLoss(loss_weight=2.0)
    with synchronizing_raises():
        for factor in ("num_pos", target.eq(1).sum().clamp(min=1), 3.0, None):
            leaf = pred.detach().requires_grad_()
            module(leaf, target, avg_factor=factor).backward()
    assert leaf.grad is not None


# ---- kernels that are kept for later calls


def plain(values: Tensor) -> Tensor:
    return values.clone(memory_format=torch.contiguous_format)


def unaligned(values: Tensor) -> Tensor:
    """At an address that is no multiple of 16 bytes, with the strides of a contiguous tensor."""
    buffer = values.new_empty(values.numel() + 1)
    return buffer[1:].view(values.shape).copy_(values)


def with_gaps(values: Tensor) -> Tensor:
    return values.new_empty(*values.shape[:-1], values.shape[-1] + 1)[..., :-1].copy_(values)


def transposed(values: Tensor) -> Tensor:
    return plain(values.mT).mT


PLACES: list[Callable[[Tensor], Tensor]] = [plain, unaligned, with_gaps, transposed]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["positives", "weight"])
def test_kept_kernels_are_told_apart(kind, dtype):
    """The same call with inputs in other places and of other sizes, twice through.

    A kernel that was compiled for addresses divisible by 16, for a size of 1 or for a stride of 1 may not serve others.
    Which one is compiled first matters: float16, which has kernels of its own, goes the other way.
    """
    shapes = [(1, 2, 16, 32), (1, 1, 1, 1024), (1, 1, 1024, 1), (1, 1, 1, 1)]
    turns = list(itertools.product(shapes, range(len(PLACES))))
    if dtype == torch.float16:
        turns.reverse()
    for shape, first in turns * 2:
        call, values = of_kind(kind, shape, dtype)
        placed = [
            PLACES[(first + k) % len(PLACES)](value.detach()).requires_grad_(value.requires_grad)
            for k, value in enumerate(values)
        ]
        what, expected = f"{shape}, place {first}", expected_step(call, values)
        assert_right(what, step(call, placed), expected)
        assert_right(f"{what}, again", step(call, placed), expected)


def test_gradients_of_the_result_from_other_places():
    logits, target = made("logits", (1, 2, 16, 32)), made("target", (1, 2, 16, 32))
    each = gaussian_focal_loss_with_logits(logits, target, reduction="none")
    seed = torch.rand(each.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    (expected,) = torch.autograd.grad(each, logits, seed, retain_graph=True)
    for place in [*PLACES, *reversed(PLACES)]:
        (gradient,) = torch.autograd.grad(each, logits, place(seed), retain_graph=True)
        assert_near(f"{place}", gradient, expected, TOLERANCES[torch.float32])


def test_dtypes_and_options_in_turn():
    """All of one shape: what changes from call to call is the dtype of an input, a power, an option."""
    shape = (1, 1, 48, 32)
    base, heights = made("logits", shape, torch.float16).detach(), made("target", shape).half()
    heights[..., 5] = 1
    options = [
        {},
        {"alpha": 0.0},
        {"alpha": 1.7},
        {"gamma": 0.0},
        {"gamma": 2.3},
        {"alpha": 3.0, "gamma": 3.0},
        {"clip": 1e-4},
        {"clip": 0.1},
    ]
    reductions = ["sum", "none", "num_pos", 3.0, torch.tensor([3], device=DEVICE)]
    turns = list(itertools.product([torch.float32, torch.float16], [torch.float32, torch.float16], options))
    for turn, (dtype, target_dtype, given) in enumerate([*turns, *reversed(turns)]):
        reduction = reductions[turn % len(reductions)]
        how = {"reduction": reduction} if reduction in ("sum", "none") else {"avg_factor": reduction}
        call = partial(gaussian_focal_loss_with_logits, **given, **how)
        loss, gradient = step(call, [base.to(dtype).requires_grad_(), heights.to(target_dtype)])
        losses, slopes = exact(base, heights, with_logits=True, **given)
        what = f"{dtype}, {target_dtype}, {given}, {reduction}"
        if reduction == "none":
            assert_near(what, loss, losses, TOLERANCES[dtype])
            continue
        count = 1 if reduction == "sum" else EPS + (heights.eq(1).sum().item() if reduction == "num_pos" else 3)
        assert_near(what, loss.flatten()[0], losses.sum() / count, 2e-6)
        assert_near(f"gradient, {what}", gradient, slopes / count, TOLERANCES[dtype])


# ---- torch.compile


@pytest.mark.parametrize(("form", "autocast"), [("positives", False), ("channels-last", True), ("each", False)])
def test_compiled_for_every_batch_size(form, autocast):
    """By the default backend, which generates code around the operator; once more is allowed, once a size is not."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")

    def head(features: Tensor, projection: Tensor, target: Tensor) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            logits = features @ projection  # (B, H, W, C), bfloat16 under autocast
            if form == "channels-last":
                logits = logits.permute(0, 3, 1, 2) * 1.5
            else:
                logits = logits.permute(0, 3, 1, 2).contiguous() * 1.5
            if form == "each":
                return 2 * gaussian_focal_loss_with_logits(logits, target, reduction="none").sum(1).square().mean()
            return 2 * gaussian_focal_loss_with_logits(logits, target, avg_factor="num_pos")

    compiled = torch.compile(head, backend=counter, fullgraph=True, dynamic=True)
    for batch in (9, 10, 14):  # no other axis is as long: a first trace takes axes of one length for the same
        rng = torch.Generator().manual_seed(batch)
        features = torch.randn(batch, 17, 19, 24, generator=rng).to(DEVICE).requires_grad_()
        projection = (torch.randn(24, 5, generator=rng) / 4).to(DEVICE).requires_grad_()
        values = [features, projection, made("target", (batch, 5, 17, 19))]
        for k, (left, right) in enumerate(zip(step(compiled, values), step(head, values), strict=True)):
            assert left.dtype == right.dtype
            # The compiled code may round logits and their gradients around the operator in another way.
            assert_near(f"result {k}, batch {batch}", left, right, 1e-2 if autocast else 1e-5)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", ["probabilities", "logits"])
def test_autocast_leaves_predictions_alone(name):
    call = gaussian_focal_loss if name == "probabilities" else gaussian_focal_loss_with_logits
    call = partial(call, avg_factor="num_pos")
    pred, target = made(name, (3, 5, 67, 71)), made("target", (3, 5, 67, 71))
    expected = step(call, [pred, target])
    with torch.autocast(DEVICE, dtype=torch.float16):
        assert_same_bits("float32", step(call, [pred, target]), expected)
        half = pred.detach().half().requires_grad_()
        loss, gradient = step(call, [half, target])
    assert loss.dtype == torch.float32
    assert gradient.dtype == torch.float16
    assert_right("float16", [loss], expected_step(call, [half, target])[:1])
