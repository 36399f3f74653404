"""``deformable_aggregation`` on a GPU: real sizes, equal bits, more than 2^31 elements, memory, streams and graphs."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import saccade
from benchmarks.aggregation_oracle import exact
from benchmarks.workloads import aggregation
from cases.deformable_aggregation import make, oracle

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DEVICE = "cuda"
FORMS = ["rows", "maps"]  # of the features: what `feature_maps_format` makes, or a list of channels-last maps
CONFIGS = {"det": (900, 13), "map": (100, 300)}  # anchors, key points: SparseDrive's detector and its map
NAN = float("nan")

# Largest relative error (norm of the difference over norm of the exact result). Sums are taken in float32 and rounded
# once to the dtype of the result: a few dozen roundings of float32, or half an ulp of the smaller dtypes.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}

Call = Callable[..., Tensor]


def bytes_of(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def channels_last(level: Tensor) -> Tensor:
    """A map (B, N, C, H, W) whose channels lie side by side."""
    return level.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)


def on_rows(shape: Tensor, start: Tensor, *leaves: Tensor) -> Tensor:
    rows, location, weights = leaves
    return saccade.deformable_aggregation(rows, shape, start, location, weights)


def on_maps(*leaves: Tensor) -> Tensor:
    *maps, location, weights = leaves
    return saccade.deformable_aggregation(maps, None, None, location, weights)


def on_two_groups(*leaves: Tensor) -> Tensor:
    *maps, location, weights = leaves
    return saccade.deformable_aggregation([maps[:2], maps[2:]], None, None, location, weights)


def formatted(*leaves: Tensor) -> Tensor:
    *maps, location, weights = leaves
    return saccade.deformable_aggregation(*saccade.feature_maps_format(maps), location, weights)


def in_form(form: str, inputs: Sequence[Tensor]) -> tuple[Call, list[Tensor]]:
    """The operator as a function of features, locations and weights, and those: the features are one tensor or L."""
    features, shape, start, location, weights = inputs
    if form == "rows":
        return partial(on_rows, shape, start), [features, location, weights]
    (maps,) = saccade.feature_maps_format([features, shape, start], inverse=True)
    return on_maps, [*map(channels_last, maps), location, weights]


def rows_of(maps: Sequence[Tensor]) -> Tensor:
    """(B, S, C) of maps (B, N, C, H_l, W_l), or of rows, which they are already."""
    if maps[0].dim() == 3:
        return maps[0]
    return torch.cat([level.permute(0, 1, 3, 4, 2).flatten(2, 3) for level in maps], 2).flatten(1, 2)


def step(call: Call, values: Sequence[Tensor], grad_output: Tensor) -> list[Tensor]:
    """The result and the gradient of each of the values."""
    leaves = [value.detach().requires_grad_() for value in values]
    output = call(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad_output.to(output.dtype))]


def assert_near(what: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    actual, expected = actual.double().to(expected.device), expected.double()
    difference, scale = (actual - expected).norm().item(), expected.norm().item()
    assert difference <= tolerance * scale, f"{what}: off by {difference:.2e} of {scale:.2e}, allowed {tolerance:.0e}"


def assert_near_exact(inputs: Sequence[Tensor], grad_output: Tensor, results: Sequence[Tensor], **loose: float) -> None:
    """Every sample of a step's results against the exact ones; ``loose`` has a tolerance other than the usual."""
    features, shape, start, location, weights = inputs
    output, *grad_features, grad_location, grad_weights = results
    actual = (output, rows_of(grad_features), grad_location, grad_weights)
    for b in range(features.shape[0]):
        expected = exact(features[b], shape, start, location[b], weights[b], grad_output[b].to(features.dtype))
        for name, left, right in zip(expected._fields, actual, expected, strict=True):
            assert_near(f"{name} of sample {b}", left[b], right, loose.get(name, TOLERANCES[left.dtype]))


def assert_same_bits(what: str, actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for k, (left, right) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(left, right), f"{what}: result {k} has other bits"


@contextmanager
def deterministic_algorithms(on: bool) -> Iterator[None]:
    torch.use_deterministic_algorithms(on)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


# ---- accuracy


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_accuracy_at_real_size(form, config, dtype):
    inputs = aggregation(2, *CONFIGS[config], device=DEVICE, dtype=dtype)
    call, values = in_form(form, inputs)
    grad_output = torch.randn(2, CONFIGS[config][0], 256, device=DEVICE)
    assert_near_exact(inputs, grad_output, step(call, values, grad_output))


def on_one_pixel(batch: int) -> Sequence[Tensor]:
    """The detector's inputs, every point of which lies at one and the same place of every camera."""
    inputs = aggregation(batch, *CONFIGS["det"], device=DEVICE)
    inputs.sampling_location.fill_(0.37)
    return inputs


@pytest.mark.parametrize("form", FORMS)
def test_accuracy_with_thousands_of_points_on_one_pixel(form):
    inputs = on_one_pixel(1)
    call, values = in_form(form, inputs)
    grad_output = torch.randn(1, 900, 256, device=DEVICE)
    # The gradient of a pixel is a sum of 11700 terms of either sign, one after another: the rounding errors of the
    # partial sums add up to about 6e-8 * 0.3 * sqrt(11700 / 2) of it, 1.4e-6, and more if they are not random.
    assert_near_exact(inputs, grad_output, step(call, values, grad_output), grad_features=1e-5)


# ---- equal bits


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("where", ["rig", "one-pixel"])
@pytest.mark.parametrize("strict", [False, True], ids=["default", "deterministic-algorithms"])
def test_equal_bits_run_after_run(form, where, strict):
    """While another stream keeps the GPU busy, and on another stream than the current one."""
    inputs = on_one_pixel(2) if where == "one-pixel" else aggregation(2, *CONFIGS["det"], device=DEVICE)
    call, values = in_form(form, inputs)
    grad_output = torch.randn(2, 900, 256, device=DEVICE)
    matrix = torch.randn(8192, 8192, device=DEVICE)
    product = torch.empty_like(matrix)
    busy, side = torch.cuda.Stream(), torch.cuda.Stream()
    expected = step(call, values, grad_output)
    torch.cuda.synchronize()
    with torch.cuda.stream(busy):
        for _ in range(10):  # about 20 ms each
            torch.mm(matrix, matrix, out=product)
    with deterministic_algorithms(strict):
        runs = [step(call, values, grad_output) for _ in range(4)]
        with torch.cuda.stream(side):
            runs += [step(call, values, grad_output) for _ in range(2)]
    torch.cuda.synchronize()
    for number, results in enumerate(runs):
        assert_same_bits(f"run {number}", results, expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("config", "batch", "dtype"),
    [
        pytest.param("det", 128, torch.bfloat16, id="det-b128", marks=pytest.mark.gpu_memory(60)),
        pytest.param("map", 16, torch.float32, id="map-b16", marks=pytest.mark.gpu_memory(20)),
    ],
)
def test_the_last_sample_of_a_large_batch_is_as_it_is_alone(form, config, batch, dtype):
    features, shape, start, location, weights = aggregation(batch, *CONFIGS[config], device=DEVICE, dtype=dtype)
    grad_output = torch.randn(batch, CONFIGS[config][0], 256, device=DEVICE)
    call, values = in_form(form, (features[-1:], shape, start, location[-1:], weights[-1:]))
    alone = step(call, values, grad_output[-1:])
    del call, values
    call, values = in_form(form, (features, shape, start, location, weights))
    del features  # in the form of maps there are two of them
    results = [result[-1:].clone() for result in step(call, values, grad_output)]
    # A larger batch may share out the work, and with it the order of sums, in another way.
    for k, (left, right) in enumerate(zip(results, alone, strict=True)):
        assert_near(f"result {k}", left, right, TOLERANCES[left.dtype])


# ---- more elements than 32 bits count


@pytest.mark.gpu_memory(30)
@pytest.mark.parametrize("form", FORMS)
def test_more_features_than_32_bits_count(form):
    """Points in the first and in the last rows of one tall map, of which all other rows are NaN."""
    height, width, channels, edge = 2**20, 33, 64, 4
    top, bottom = slice(edge * width), slice(-edge * width, None)
    few = torch.randn(1, 2 * edge * width, channels, device=DEVICE, dtype=torch.float16)
    features = torch.full((1, height * width, channels), NAN, device=DEVICE, dtype=torch.float16)
    assert features.numel() > 2**31
    features[:, top], features[:, bottom] = few[:, top], few[:, bottom]
    # Eighths of a pixel from the upper or lower border: exact in float32 however tall the map, as its height and that
    # of the small one, which has the first and the last rows alone, are powers of two.
    anchors, points = 64, 4
    rng = torch.Generator().manual_seed(0)
    away = torch.randint(1, 8 * edge - 4, (1, anchors, points, 1), generator=rng) / 8
    lower = torch.arange(anchors).view(1, -1, 1, 1) % 2 == 1
    x = torch.rand(1, anchors, points, 1, generator=rng)
    location, small = (
        torch.stack([x, torch.where(lower, rows - away, away) / rows], -1).to(DEVICE) for rows in (height, 2 * edge)
    )
    weights = torch.randn(1, anchors, points, 1, 1, 8, generator=rng).to(DEVICE)
    grad_output = torch.randn(1, anchors, channels, device=DEVICE)
    start = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
    if form == "rows":
        shape = torch.tensor([[[height, width]]], device=DEVICE)
        call, values = in_form("rows", (features, shape, start, location, weights))
    else:  # the same memory as a map
        call, values = on_maps, [features.view(1, 1, height, width, channels).permute(0, 1, 4, 2, 3), location, weights]
    output, grad_features, grad_location, grad_weights = step(call, values, grad_output)
    grad_features = rows_of([grad_features])
    assert not grad_features[:, top.stop : bottom.start].any()
    results = (
        output,
        torch.cat([grad_features[:, top], grad_features[:, bottom]], 1),
        grad_location / torch.tensor([1, height // (2 * edge)], device=DEVICE),
        grad_weights,
    )
    shape = torch.tensor([[[2 * edge, width]]], device=DEVICE)
    assert_near_exact((few, shape, start, small, weights), grad_output, results)


@pytest.mark.gpu_memory(80)
def test_more_weights_than_32_bits_count():
    """The first and the last anchors are seen; nothing may come of the others, whose weights are NaN."""
    anchors, points, groups = 2**21 + 64, 16, 64
    few = make([[(5, 7)]], batch=1, anchors=4, points=points, groups=groups, channels=groups)
    features, shape, start, few_location, few_weights = (value.detach().to(DEVICE) for value in few)
    few_weights = few_weights.half()
    few_grad_output = torch.randn(1, 4, groups, device=DEVICE)

    def among_many(values: Tensor, fill: float) -> Tensor:
        many = values.new_full((1, anchors, *values.shape[2:]), fill)
        many[:, :2], many[:, -2:] = values[:, :2], values[:, 2:]
        return many

    def the_few(values: Tensor) -> Tensor:
        assert not values[:, 2:-2].any()
        return torch.cat([values[:, :2], values[:, -2:]], 1)

    location, weights = among_many(few_location, -1), among_many(few_weights, NAN)
    assert weights.numel() > 2**31
    call, values = in_form("rows", (features, shape, start, location, weights))
    output, grad_features, grad_location, grad_weights = step(call, values, among_many(few_grad_output, NAN))
    results = (the_few(output), grad_features, the_few(grad_location), the_few(grad_weights))
    assert_near_exact((features, shape, start, few_location, few_weights), few_grad_output, results)


# ---- maps that are not where they should be

RIG = [[(6, 8), (3, 4)], [(6, 8), (3, 4)]]  # 120 rows, of which the last map takes 108 to 119

# First row, height and width of the last map instead.
BAD_MAPS = {
    "begins-one-row-early": (-1, 3, 4),
    "begins-before-all-rows": (-12, 3, 4),
    "ends-one-row-late": (109, 3, 4),
    "begins-in-the-last-row": (119, 3, 4),
    "begins-after-all-rows": (120, 3, 4),
    "taller-than-all-rows": (0, 31, 4),
    "wider-than-all-rows": (0, 3, 100),
    "begins-at-the-last-of-32-bits": (2**31 - 1, 3, 4),
    "begins-at-the-first-of-32-bits": (-(2**31), 3, 4),
    "begins-beyond-32-bits": (2**40, 3, 4),
    "begins-far-before-32-bits": (-(2**40), 3, 4),
    "begins-where-32-bits-wrap": (2**32 + 108, 3, 4),
    "begins-at-the-last-of-64-bits": (2**63 - 1, 3, 4),
    "begins-at-the-first-of-64-bits": (-(2**63), 3, 4),
    "height-of-32-bits": (108, 2**31 - 1, 4),
    "width-of-32-bits": (108, 3, 2**31 - 1),
    "height-beyond-32-bits": (108, 2**40, 4),
    "width-beyond-32-bits": (108, 3, 2**40),
    "size-where-32-bits-wrap": (108, 2**32 + 3, 2**32 + 4),
    "area-beyond-64-bits": (108, 2**62, 2**62),
}
EMPTY_MAPS = {  # which is no fault
    "no-height": (108, 0, 4),
    "no-width": (108, 3, 0),
    "negative-height": (108, -3, 4),
    "negative-width": (108, 3, -4),
    "negative-sides": (108, -3, -4),
    "no-height-far-away": (2**40, 0, 2**40),
}


@pytest.mark.parametrize("name", [*BAD_MAPS, *EMPTY_MAPS])
def test_maps_that_reach_outside_the_features(name):
    """Rows that do not exist count as zero, corner by corner, and nothing is written for them."""
    begin, height, width = (BAD_MAPS | EMPTY_MAPS)[name]
    features, shape, start, location, weights = make(RIG, batch=1, anchors=6)
    shape[1, 1], start[1, 1] = torch.tensor([height, width]), begin
    leaves = [value.detach().double().requires_grad_() for value in (features, location, weights)]
    grad_output = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
    output = oracle(leaves[0], shape, start, *leaves[1:])
    expected = [output, *torch.autograd.grad(output, leaves, grad_output.double())]
    fits = torch.iinfo(torch.int32)
    for index in (torch.int64, torch.int32):
        if index == torch.int32 and not all(fits.min <= value <= fits.max for value in (begin, height, width)):
            continue
        for dtype in (torch.float32, torch.float64):
            values = [leaf.detach().to(DEVICE, dtype) for leaf in leaves]
            indices = shape.to(DEVICE, index), start.to(DEVICE, index)
            call, values = in_form("rows", (values[0], *indices, *values[1:]))
            with saccade.debug_checks(False):
                results = step(call, values, grad_output.to(DEVICE))
            for k, (left, right) in enumerate(zip(results, expected, strict=True)):
                assert_near(f"result {k}, {dtype}, {index}", left, right, TOLERANCES[dtype])
            with saccade.debug_checks(True):
                if name in BAD_MAPS:
                    with pytest.raises(ValueError, match=r"camera 1, level 1"):
                        call(*values)
                else:
                    assert torch.equal(call(*values), results[0])


# ---- memory


@pytest.mark.parametrize("needed", [n for n in itertools.product([False, True], repeat=3) if any(n)], ids=str)
def test_only_the_gradients_that_are_needed(needed):
    inputs = aggregation(8, *CONFIGS["det"], device=DEVICE)
    grad_output = torch.randn(8, 900, 256, device=DEVICE)
    call, values = in_form("rows", inputs)
    _, *expected = step(call, values, grad_output)
    leaves = [value.detach().requires_grad_(need) for value, need in zip(values, needed, strict=True)]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = call(*leaves)
    gradients = torch.autograd.grad(output, wanted, grad_output)
    beside = torch.cuda.max_memory_allocated() - before - bytes_of(output, *gradients)
    assert beside < bytes_of(values[0]) / 2  # neither a copy of the features nor a gradient of them
    asked = [gradient for gradient, need in zip(expected, needed, strict=True) if need]
    for k, (left, right) in enumerate(zip(gradients, asked, strict=True)):
        # A kernel that computes less is another kernel: the compiler may fuse other products and sums.
        assert_near(f"gradient {k}", left, right, TOLERANCES[torch.float32])


@pytest.mark.parametrize("form", FORMS)
def test_peak_memory(form):
    """Inputs, output and gradients, and at most 15% more."""
    inputs = aggregation(8, *CONFIGS["det"], device=DEVICE)
    call, values = in_form(form, inputs)
    grad_output = torch.randn(8, 900, 256, device=DEVICE)
    step(call, values, grad_output)  # the first call may make what later calls keep
    given = bytes_of(*values, grad_output)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = step(call, values, grad_output)
    peak = torch.cuda.max_memory_allocated() - before + given
    needed = given + bytes_of(*results)
    assert peak <= 1.15 * needed, f"{peak / 1e6:.0f} MB at the peak, of which {needed / 1e6:.0f} MB are needed"


# ---- streams, graphs, devices


@pytest.mark.parametrize("form", FORMS)
def test_captured_in_a_cuda_graph(form):
    call, static = in_form(form, aggregation(1, 100, device=DEVICE))
    grad_output = torch.randn(1, 100, 256, device=DEVICE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(call, static, grad_output)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(call, static, grad_output)
    for seed, visible in ((1, "rig"), (2, "all"), (3, "rig")):  # many more visible points than at capture, and back
        _, changed = in_form(form, aggregation(1, 100, device=DEVICE, seed=seed, visible=visible))
        for value, new in zip(static, changed, strict=True):
            value.copy_(new)
        graph.replay()
        assert_same_bits(f"seed {seed}", results, step(call, changed, grad_output))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("form", FORMS)
def test_on_another_gpu_than_the_current_one(form):
    inputs = aggregation(1, 100, device="cuda:0")
    grad_output = torch.randn(1, 100, 256, device="cuda:0")
    expected = step(*in_form(form, inputs), grad_output)
    results = step(*in_form(form, [value.to("cuda:1") for value in inputs]), grad_output.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    for k, (left, right) in enumerate(zip(results, expected, strict=True)):
        assert left.device == torch.device("cuda:1")
        # The number of processors, which shares out the work, may be another one.
        assert_near(f"result {k}", left, right, TOLERANCES[torch.float32])


@pytest.mark.parametrize(
    ("form", "side"), [("rows", 9), ("format", 11), ("maps", 13), ("contiguous-maps", 15), ("groups", 17)]
)
def test_nothing_waits_for_the_gpu(form, side):
    """Not even the first call with new sizes, which no other test has."""
    sizes = [(side, side + 5), (side // 2, side // 2 + 3)]
    maps = [torch.randn(2, 3, 16, *size, device=DEVICE) for size in sizes]
    call, cameras = on_maps, 3
    if form == "rows":
        rows, *indices = saccade.feature_maps_format(maps)
        call, maps = partial(on_rows, *indices), [rows]
    elif form == "format":
        call = formatted
    elif form == "maps":
        maps = [channels_last(level) for level in maps]
    elif form == "groups":
        call, cameras = on_two_groups, 5
        maps += [torch.randn(2, 2, 16, *size[::-1], device=DEVICE) for size in sizes]
    location = torch.rand(2, 10, 3, cameras, 2, device=DEVICE)
    weights = torch.randn(2, 10, 3, cameras, 2, 4, device=DEVICE)
    grad_output = torch.randn(2, 10, 16, device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(call, [*maps, location, weights], grad_output)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_nothing_waits_for_the_gpu_at_real_size():
    inputs = aggregation(8, *CONFIGS["det"], device=DEVICE)
    call, values = in_form("rows", inputs)
    grad_output = torch.randn(8, 900, 256, device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(call, values, grad_output)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- torch.compile


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_compiled_for_every_batch_size(form, autocast):
    """By the default backend, which generates code around the operator; once more is allowed, once a size is not."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    shape = torch.tensor([[(8, 12), (4, 6)]] * 3, device=DEVICE)
    start = torch.tensor([[120 * n, 120 * n + 96] for n in range(3)], device=DEVICE)

    def head(*leaves: Tensor) -> Tensor:
        *features, location, weights = leaves
        features, weights = [feature * 1.5 for feature in features], weights.softmax(1)
        if form == "maps":
            return 2 * saccade.deformable_aggregation(features, None, None, location, weights)
        return 2 * saccade.deformable_aggregation(features[0], shape, start, location, weights)

    compiled = torch.compile(head, backend=counter, fullgraph=True, dynamic=True)

    def under_autocast(call: Call) -> Call:
        def inner(*leaves: Tensor) -> Tensor:
            with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
                return call(*leaves)

        return inner

    for batch in (9, 10, 14):  # no other axis is as long: a first trace takes axes of one length for the same
        inputs = [value.detach().to(DEVICE) for value in make(shape.tolist(), batch, 7, 5, groups=4, channels=16)]
        _, values = in_form(form, inputs)
        grad_output = torch.randn(batch, 7, 16, device=DEVICE)
        results = step(under_autocast(compiled), values, grad_output)
        for k, (left, right) in enumerate(zip(results, step(under_autocast(head), values, grad_output), strict=True)):
            assert left.dtype == right.dtype
            # The compiled code may round features and weights around the operator in another way.
            assert_near(f"result {k}, batch {batch}", left, right, 1e-2 if autocast else 1e-5)
    assert counter.frame_count <= 2
