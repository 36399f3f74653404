"""What every operator promises on a GPU, once for all operators: streams, graphs, threads, sizes, memory, equal bits.

The cases are those of ``cases/on_gpu``, a file of tables for each operator.
"""

import gc
import itertools
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from cases.comparison import assert_near, assert_same_bits
from cases.on_gpu import (
    BEYOND_32_BITS,
    DEVICE,
    PLACES,
    Beyond,
    Compiled,
    Memory,
    OnGpu,
    bytes_of,
    deformable_aggregation,
    deterministic_algorithms,
    focal_loss,
    gaussian_focal_loss,
    gaussian_heatmap,
    keep_busy,
    placed,
    ragged,
    step,
    synchronizing_raises,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

OPERATORS: dict[str, ModuleType] = {
    "focal_loss": focal_loss,
    "gaussian_focal_loss": gaussian_focal_loss,
    "gaussian_heatmap": gaussian_heatmap,
    "deformable_aggregation": deformable_aggregation,
    "ragged": ragged,
}
CASES = [(f"{operator}-{case.name}", case) for operator, tables in OPERATORS.items() for case in tables.CASES]


def with_each(*parts: Callable[[OnGpu], Any], of: Callable[[OnGpu], bool] = lambda case: True) -> pytest.MarkDecorator:
    """Run a test with the cases, those that ``of`` takes, and with each of what the parts give for them."""
    params = []
    for name, case in CASES:
        for values in itertools.product(*(part(case) for part in parts)) if of(case) else ():
            params.append(pytest.param(case, *values, id="-".join([name, *map(written, values)])))
    return pytest.mark.parametrize(("case", *(part.__name__ for part in parts)), params)


def written(value: Any) -> str:
    return "x".join(map(str, value)) if type(value) is tuple else str(value)


def number_of(case: OnGpu) -> int:
    """The place of a case among those of its operator: calls of these may share what is kept for a size."""
    return next(k for tables in OPERATORS.values() for k, each in enumerate(tables.CASES) if each is case)


def from_tables(table: str) -> pytest.MarkDecorator:
    """Run a test with each entry of a table, in the memory that it says it needs."""
    params = []
    for operator, tables in OPERATORS.items():
        for case in getattr(tables, table):
            gigabytes = getattr(case, "gigabytes", None)
            marks = () if gigabytes is None else pytest.mark.gpu_memory(gigabytes)
            autocast = "-autocast" if getattr(case, "autocast", None) else ""
            params.append(pytest.param(case, id=f"{operator}-{case.name}{autocast}", marks=marks))
    return pytest.mark.parametrize("case", params)


def repeated(case: OnGpu) -> tuple[Any, ...]:
    return case.sizes.repeated


def overlapping(case: OnGpu) -> tuple[Any, ...]:
    return case.sizes.overlapping


def compared(case: OnGpu) -> tuple[Any, ...]:
    return case.sizes.compared


def unseen(case: OnGpu) -> tuple[Any, ...]:
    return case.sizes.unseen(number_of(case))


def dtype(case: OnGpu) -> tuple[torch.dtype, ...]:
    return case.dtypes


# ---- values


@with_each(compared)
def test_values_and_gradients(case, compared):
    values = case.inputs(compared)
    case.assert_right("step", case.step(values), case.expected(values))


# ---- equal bits


@pytest.mark.parametrize("strict", [False, True], ids=["default", "deterministic-algorithms"])
@with_each(repeated)
def test_equal_bits_run_after_run(case, repeated, strict):
    """While another stream keeps the GPU busy, and on another stream than the current one."""
    values = case.inputs(repeated)
    busy, side = torch.cuda.Stream(), torch.cuda.Stream()
    expected = case.step(values)
    torch.cuda.synchronize()
    with torch.cuda.stream(busy):
        keep_busy(case.sizes.outlasting)
    with deterministic_algorithms(strict):
        runs = [case.step(values) for _ in range(10)]
        with torch.cuda.stream(side):
            runs += [case.step(values) for _ in range(5)]
    torch.cuda.synchronize()
    for number, results in enumerate(runs):
        assert_same_bits(f"run {number}", results, expected)


@with_each(overlapping)
def test_several_streams_at_once(case, overlapping):
    """Nothing that calls may share, such as memory for partial sums, is shared by calls that overlap."""
    calls = [case.inputs(overlapping, seed=10 * k) for k in range(4)]
    expected = [case.step(values) for values in calls]
    gate, streams = torch.cuda.Event(), [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    keep_busy()  # all streams wait until much is queued in each
    gate.record()
    runs = []
    for stream in streams:
        stream.wait_event(gate)
    for _ in range(10):
        for number, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                runs.append((number, case.step(calls[number])))
    torch.cuda.synchronize()
    for number, results in runs:
        assert_same_bits(f"stream {number}", results, expected[number])


def chain(case: OnGpu, given: list[Tensor], links: int, after_each: Callable[[], None] = lambda: None) -> list[Tensor]:
    """Calls each of which reads what was made of the results of the one before."""
    values = [value.detach().clone().requires_grad_(value.requires_grad) for value in given]
    for _ in range(links):
        result, *gradients = case.step(values)
        with torch.no_grad():
            if case.advance:
                case.advance(values, [result])
            leaves = [value for value in values if value.requires_grad]
            for leaf, gradient in zip(leaves, gradients, strict=True):
                leaf.sub_(gradient / gradient.abs().max().clamp(min=1e-30) * case.step_size)
        del result, gradients
        after_each()
    return case.step(values)


@with_each()
def test_each_call_sees_what_was_written_before_it(case):
    """Queued back to back on a side stream, each made of the results of the one before, in memory just given back."""
    values = case.inputs(case.sizes.chained)
    expected = chain(case, values, 20, after_each=torch.cuda.synchronize)
    assert not torch.equal(expected[0], case.step(values)[0]), "nothing came of the links"
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        keep_busy(1)  # while it runs, all of the chain is queued
        results = chain(case, values, 20)
    torch.cuda.synchronize()
    assert_same_bits("queued", results, expected)


# ---- graphs


def warm_up(call: Callable[[], object]) -> None:
    """Before a capture: on a side stream, as PyTorch wants it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)


@with_each()
def test_captured_in_a_cuda_graph(case):
    """And replayed with other inputs, among them such as take another amount of work."""
    static = case.inputs()
    warm_up(lambda: case.step(static))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = case.step(static)
    for seed in (100, 200, 300):
        changed = case.inputs(seed=seed)
        with torch.no_grad():
            if seed == 200 and case.unlike:
                case.unlike(changed)
            for value, new in zip(static, changed, strict=True):
                value.copy_(new)
        graph.replay()
        assert_same_bits(f"seed {seed}", results, case.step(changed))
    case.assert_right("replayed", results, case.expected(static))


@with_each()
def test_calls_that_follow_each_other_in_one_graph(case):
    """As the steps of a training loop: what a call reads is written by the step before it."""
    values = case.inputs(case.sizes.chained_in_a_graph)
    expected = chain(case, values, 10)
    warm_up(lambda: chain(case, values, 10))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = chain(case, values, 10)
    for _ in range(3):
        graph.replay()
        assert_same_bits("replayed", results, expected)


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_graph_is_replayed_while_others_call(operator):
    """Two graphs and ordinary calls on three streams, all at once."""
    names, size = OPERATORS[operator].TOGETHER
    by_name = {case.name: case for case in OPERATORS[operator].CASES}
    calls = [(by_name[name], by_name[name].inputs(size, seed=10 * k)) for k, name in enumerate(names)]
    expected = [case.step(values) for case, values in calls]
    graphs, captured = [torch.cuda.CUDAGraph() for _ in range(2)], []
    for graph, (case, values) in zip(graphs, calls, strict=False):
        with torch.cuda.graph(graph):
            captured.append(case.step(values))
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in names]
    runs = []
    case, values = calls[-1]
    for _ in range(50):
        for graph, stream in zip(graphs, streams, strict=False):
            with torch.cuda.stream(stream):
                graph.replay()
        with torch.cuda.stream(streams[-1]):
            runs.append(case.step(values))
    torch.cuda.synchronize()
    for k, results in enumerate(captured):
        assert_same_bits(f"graph {k}", results, expected[k])
    for number, results in enumerate(runs):
        assert_same_bits(f"run {number}", results, expected[-1])


# ---- devices, threads, processes


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@with_each()
def test_on_another_gpu_than_the_current_one_and_back(case):
    values = case.inputs()
    expected, before = case.expected(values), {}
    for device in ("cuda:1", "cuda:0", "cuda:1"):
        moved = [value.detach().to(device).requires_grad_(value.requires_grad) for value in values]
        results = case.step(moved)
        assert torch.cuda.current_device() == 0
        assert {result.device for result in results} == {torch.device(device)}
        case.assert_right(device, results, expected)
        bits = before.setdefault("" if case.same_on_every_gpu else device, [result.cpu() for result in results])
        assert_same_bits(device, [result.cpu() for result in results], bits)


@with_each(unseen)
def test_nothing_waits_for_the_gpu(case, unseen):
    """Not even the first call with new sizes, which no other test has."""
    values = case.inputs(unseen)
    with synchronizing_raises():
        case.step(values)


@with_each()
def test_threads(case):
    """Each with inputs of its own size, for which there was no call before."""
    calls = [case.inputs(case.sizes.numbered(8 * number_of(case) + k), seed=k) for k in range(8)]
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda values: [case.step(values) for _ in range(10)], calls))
    for values, results in zip(calls, runs, strict=True):
        alone = case.step(values)
        case.assert_right("alone", alone, case.expected(values))
        for number, result in enumerate(results):
            assert_same_bits(f"run {number} of a thread", result, alone)


def first_call(operator: str, first: str) -> None:
    """A first call in some way, for each case; then another one as it comes, of the same inputs."""
    cases = OPERATORS[operator].CASES
    for case in cases:
        values = case.inputs(case.sizes.numbered(0))
        if first == "inference-mode":
            with torch.inference_mode():
                case.call(*values)
        elif first == "compiled":
            torch._dynamo.reset()
            step(torch.compile(case.call, backend="aot_eager"), values)
        elif first == "off-the-main-stream":
            with torch.cuda.stream(torch.cuda.Stream()):
                case.step(values)
        elif first == "unaligned":
            case.step([PLACES[1](value.detach()).requires_grad_(value.requires_grad) for value in values])
    for case in cases:
        values = case.inputs(case.sizes.numbered(0))
        results = case.step(values)
        torch.cuda.synchronize()
        case.assert_right(case.name, results, case.expected(values))


@pytest.mark.parametrize("first", ["inference-mode", "compiled", "off-the-main-stream", "unaligned"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_whatever_the_first_call_of_a_process_was(operator, first):
    """What it leaves behind, kept kernels or memory, serves the calls after it."""
    here = Path(__file__).parent
    program = f"""
import sys
sys.path[:0] = {[str(here), str(here.parent)]}
import test_gpu_contract
test_gpu_contract.first_call({operator!r}, {first!r})
"""
    subprocess.run([sys.executable, "-c", program], check=True)


# ---- kernels that are kept for later calls


@with_each(dtype, of=lambda case: case.told_apart)
def test_kept_kernels_are_told_apart(case, dtype):
    """The same call with inputs in other places and of other sizes, twice through.

    A kernel that was compiled for addresses divisible by 16, for a size of 1 or for a stride of 1 may not serve others.
    Which one is compiled first matters: the second dtype, which has kernels of its own, goes the other way.
    """
    turns = list(itertools.product(case.sizes.told_apart, range(len(PLACES))))
    if dtype != case.dtypes[0]:
        turns.reverse()
    for size, first in turns * 2:
        values = case.inputs(size, dtype)
        moved = placed(values, first, case.contiguous)
        what, expected = f"{size}, place {first}", case.expected(values)
        case.assert_right(what, case.step(moved), expected)
        case.assert_right(f"{what}, again", case.step(moved), expected)


@with_each(of=lambda case: case.elementwise)
def test_gradients_of_the_result_from_other_places(case):
    values = case.inputs(case.sizes.told_apart[0])
    leaves, result = [value for value in values if value.requires_grad], case.call(*values)
    seed = torch.rand(result.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    expected = torch.autograd.grad(result, leaves, seed, retain_graph=True)
    for place in [*PLACES, *reversed(PLACES)]:
        gradients = torch.autograd.grad(result, leaves, place(seed), retain_graph=True)
        case.assert_right(place.__name__, gradients, expected)


# ---- torch.compile, autocast


@from_tables("COMPILED")
def test_compiled_for_every_batch_size(case: Compiled):
    """By the default backend, which generates code around the operator; once more is allowed, once a size is not."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    of_tensors, inside, around = case.head(), case.autocast == "inside", case.autocast == "around"

    def head(*values: Tensor) -> Tensor:
        if not inside:
            return of_tensors(*values)
        with torch.autocast(DEVICE, torch.bfloat16):
            return of_tensors(*values)

    compiled = torch.compile(head, backend=counter, fullgraph=True, dynamic=True)

    def results_of(call: Callable[..., Tensor], values: list[Tensor]) -> list[Tensor]:
        def under_autocast(*values: Tensor) -> Tensor:
            with torch.autocast(DEVICE, torch.bfloat16, enabled=around):
                return call(*values)

        return step(under_autocast, values)

    for size in case.sizes:
        values = case.make(size)
        for k, (left, right) in enumerate(zip(results_of(compiled, values), results_of(head, values), strict=True)):
            assert left.dtype == right.dtype
            assert_near(f"result {k}, size {size}", left, right, case.tolerance)
    assert counter.frame_count <= 2


@with_each(dtype, of=lambda case: not case.cast_by_autocast)
def test_autocast_leaves_inputs_alone(case, dtype):
    values = case.inputs(dtype=dtype)
    expected = case.step(values)
    with torch.autocast(DEVICE, dtype=torch.float16):
        results = case.step(values)
    assert [result.dtype for result in results] == [result.dtype for result in expected]
    assert_same_bits("under autocast", results, expected)
    case.assert_right("under autocast", results[:1], case.expected(values)[:1])


# ---- memory


@from_tables("MEMORY")
def test_peak_memory(case: Memory):
    call, values = case.make()
    leaves = [value for value in values if value.requires_grad]
    seed = torch.ones_like(call(*values))

    def train() -> tuple[int, list[Tensor]]:
        """Bytes at the peak, above those of the inputs, and the results."""
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call(*values)
        gradients = torch.autograd.grad(result, leaves, seed) if leaves else ()
        return torch.cuda.max_memory_allocated() - before, [result.detach(), *gradients]

    train()  # the first call may make what later calls keep
    peak, results = train()
    fresh = [result for result in results if all(result.data_ptr() != value.data_ptr() for value in values)]
    beside, allowed = peak - bytes_of(*fresh), case.allowed(values, results)
    assert beside <= allowed, f"{beside:,} bytes beside the results' {bytes_of(*fresh):,}, allowed {allowed:,.0f}"


def settled(is_expected: Callable[[int], bool]) -> int:
    """Memory in use; autograd's thread may let go of its last node after a step has returned."""
    end = time.monotonic() + 2
    while not is_expected(torch.cuda.memory_allocated()) and time.monotonic() < end:
        time.sleep(0.01)
    return torch.cuda.memory_allocated()


@pytest.mark.parametrize("operator", OPERATORS)
def test_nothing_piles_up(operator):
    """Not from call to call, nor from size to size or power to power, for each of which a kernel may be kept."""
    tables = OPERATORS[operator]
    calls = [
        (case, case.inputs(size))
        for case in tables.CASES
        for size in (case.sizes.usual, *(case.sizes.numbered(k) for k in range(0, 16, 5)))
    ]
    others = [tables.another(k) for k in range(20)]
    for case, values in calls:
        case.step(values)
    gc.collect()  # what other tests left in cycles
    time.sleep(0.1)  # for autograd's thread
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        for case, values in calls:
            case.step(values)
    assert settled(lambda in_use: in_use == before) == before
    for call, values in others:
        step(call, values)
    with_others = settled(lambda in_use: in_use <= before + 2**20)
    assert with_others <= before + 2**20
    for call, values in others:
        step(call, values)
    assert settled(lambda in_use: in_use <= with_others) <= with_others


# ---- more than 32 bits count


def reach(values: Tensor) -> int:
    """How far the last element lies from the first."""
    return sum((length - 1) * stride for length, stride in zip(values.shape, values.stride(), strict=True))


@from_tables("BEYOND")
def test_more_than_32_bits_count(case: Beyond):
    """Few numbers matter, among more or further apart than that; nothing may come of the others."""
    few = case.make()
    results = step(few.call, few.values, few.seed)
    assert max(reach(value) for value in (*few.values, *results)) >= BEYOND_32_BITS
    with_gradients = len(results) > 1
    results = few.of_few(results)
    for k, (left, right) in enumerate(zip(results, few.expected, strict=True)):
        if with_gradients and k > 0 and few.absolute:
            assert left.shape == right.shape
            difference, scale = (left.double() - right.double()).norm().item(), right.double().norm().item()
            assert difference <= few.tolerances[left.dtype] * scale + few.absolute * left.numel() ** 0.5
        else:
            assert_near(f"result {k}", left, right, few.tolerances[left.dtype])
