"""What every operator promises, on every case: the same tests for all of them."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cases import Case
from cases.deformable_aggregation import CASES as DEFORMABLE_AGGREGATION
from cases.focal_loss import CASES as FOCAL_LOSS
from cases.gaussian_focal_loss import CASES as GAUSSIAN_FOCAL_LOSS
from cases.gaussian_heatmap import CASES as GAUSSIAN_HEATMAP
from cases.ragged import CASES as RAGGED
from saccade import doctor
from saccade.triton_dispatch import served_by_triton

OPERATORS = {
    "deformable_aggregation": DEFORMABLE_AGGREGATION,
    "focal_loss": FOCAL_LOSS,
    "gaussian_focal_loss": GAUSSIAN_FOCAL_LOSS,
    "gaussian_heatmap": GAUSSIAN_HEATMAP,
    "ragged": RAGGED,
}
INTERPRETED = served_by_triton(torch.empty(0))  # by Triton: then only operators that have kernels are of interest
CASES = [
    case
    for operator, cases in OPERATORS.items()
    if not INTERPRETED or doctor.backend(operator, "cuda") == "triton"
    for case in cases
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def prepared(case: Case, device: str, dtype: torch.dtype) -> tuple:
    """The case's inputs as leaves on a device, the floating point ones in a dtype, requiring grad as the case's do."""

    def move(value):
        if not isinstance(value, Tensor):
            return value
        moved = value.detach().to(device, dtype if value.is_floating_point() else None)
        return moved.clone().requires_grad_(value.requires_grad)

    return tuple(move(value) for value in case.inputs())


def differentiable(inputs: tuple) -> list[Tensor]:
    return [value for value in inputs if isinstance(value, Tensor) and value.requires_grad]


def run(case: Case, call, inputs: tuple) -> tuple[Tensor, list[Tensor]]:
    """Result of a call and the gradients of a fixed weighted sum of it."""
    result = call(*inputs)
    if case.in_place:
        result = inputs[0]
    leaves = differentiable(inputs)
    if not result.requires_grad:  # nothing requires grad, or an oracle found nothing to sum
        return result, [torch.zeros_like(leaf) for leaf in leaves]
    rng = torch.Generator().manual_seed(0)
    seed = torch.randint(2, 7, result.shape, generator=rng).to(result) / 4  # exact in every dtype
    gradients = torch.autograd.grad(result, leaves, seed, allow_unused=True, materialize_grads=True)
    return result.detach(), list(gradients)


made: dict[tuple[int, str], tuple[Tensor, list[Tensor]]] = {}


def usual(case: Case, device: str) -> tuple[Tensor, list[Tensor]]:
    """What several tests compare with, in float32; made once in a process, for interpreted kernels take their time."""
    key = id(case), device
    if key not in made:
        made[key] = run(case, case.call, prepared(case, device, torch.float32))
    return made[key]


def assert_close(what: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    actual, expected = actual.double().cpu(), expected.double().cpu()
    assert torch.equal(actual.isnan(), expected.isnan()), f"{what}: NaN in other places"
    infinite = expected.isinf()
    assert torch.equal(actual[infinite], expected[infinite]), f"{what}: infinity in other places"
    usual = ~(infinite | expected.isnan())
    difference, scale = (actual - expected)[usual].norm(), expected[usual].norm()
    assert difference <= tolerance * scale, f"{what}: relative error {difference / scale:.2e} > {tolerance:.0e}"


def assert_same(what: str, actual: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]]) -> None:
    """Bitwise, but for the order of sums: a strided or compiled call may sum in another one."""
    for left, right in zip([actual[0], *actual[1]], [expected[0], *expected[1]], strict=True):
        assert left.dtype == right.dtype, what
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6, equal_nan=True, msg=lambda m: f"{what}: {m}")


@pytest.mark.interpreted
@each_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_values_and_gradients(case: Case, device: str, dtype: torch.dtype):
    if dtype not in case.dtypes:
        inputs = prepared(case, device, dtype)
        with pytest.raises(TypeError):
            case.call(*inputs)
        return
    inputs = prepared(case, device, dtype)
    in_float64 = tuple(
        value.detach().to("cpu", torch.float64).requires_grad_(value.requires_grad)
        if isinstance(value, Tensor) and value.is_floating_point()
        else (value.cpu() if isinstance(value, Tensor) else value)
        for value in inputs
    )
    requires_grad = []

    def call(*inputs):
        result = case.call(*inputs)
        requires_grad.append(case.in_place or result.requires_grad)
        return result

    result, gradients = run(case, call, inputs)
    assert requires_grad == [case.in_place or bool(differentiable(inputs))]
    expected, expected_gradients = run(case, case.oracle, in_float64)

    def tolerance(rounded_to: torch.dtype) -> float:
        # The interpreter cuts float32 off where a GPU rounds to nearest: a whole ulp of bfloat16, not half of one.
        return case.tolerances[rounded_to] * (2 if INTERPRETED and rounded_to == torch.bfloat16 else 1)

    # A reduced loss of halves is float32, and as near to the oracle of the same halves as any.
    assert_close("result", result, expected, tolerance(result.dtype))
    for leaf, actual, wanted in zip(differentiable(inputs), gradients, expected_gradients, strict=True):
        assert actual.dtype == leaf.dtype
        assert_close(f"gradient of the input of shape {tuple(leaf.shape)}", actual, wanted, tolerance(leaf.dtype))


@pytest.mark.interpreted
@each_case
def test_inputs_are_left_alone(case: Case, device: str):
    inputs = prepared(case, device, torch.float32)
    before = [(value.clone(), value._version) if isinstance(value, Tensor) else (value, 0) for value in inputs]
    run(case, case.call, inputs)
    for position, (value, (copy, version)) in enumerate(zip(inputs, before, strict=True)):
        if not isinstance(value, Tensor):
            continue
        if case.in_place and position == 0:
            assert value._version > version, "a write in place that autograd does not see"
        else:
            assert value._version == version
            assert torch.equal(value.nan_to_num(), copy.nan_to_num())


@pytest.mark.interpreted
@each_case
def test_strides(case: Case, device: str):
    """Inputs whose last two axes lie in memory the other way round; vectors with gaps."""

    def strided(value):
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        spread = torch.stack([value.detach(), torch.full_like(value.detach(), 1)], -1)[..., 0]
        if value.dim() > 1:
            spread = spread.mT.clone(memory_format=torch.contiguous_format).mT
        return spread.requires_grad_(value.requires_grad)

    inputs = prepared(case, device, torch.float32)
    expected = usual(case, device)
    rest = tuple(strided(value) for value in inputs[1:])
    first = inputs[0] if case.in_place else strided(inputs[0])
    assert_same("strided", run(case, case.call, (first, *rest)), expected)


@pytest.mark.interpreted
@each_case
def test_outputs_are_written_whole(case: Case, device: str):
    """Fresh memory is filled with NaN, so that an element left unwritten shows; and equal bits run after run."""
    expected = usual(case, device)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        first = run(case, case.call, prepared(case, device, torch.float32))
        second = run(case, case.call, prepared(case, device, torch.float32))
    finally:
        torch.use_deterministic_algorithms(before)
    assert_same("poisoned", first, expected)
    for left, right in zip([first[0], *first[1]], [second[0], *second[1]], strict=True):
        assert torch.equal(left.nan_to_num(), right.nan_to_num())


class _RecordedOperators(TorchDispatchMode):
    """Remembers every call of an operator of the library."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "saccade":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@each_case
def test_opcheck(case: Case, device: str):
    inputs = prepared(case, device, torch.float32)
    with _RecordedOperators() as recorded:
        case.call(*inputs)
    assert bool(recorded.calls) == (device in case.operator_on), "operators of the library were called, or none was"
    for operator, args, kwargs in recorded.calls:
        if differentiable(inputs):
            assert any(isinstance(value, Tensor) and value.requires_grad for value in args), (
                "opcheck would pass vacuously"
            )
        torch.library.opcheck(operator, args, kwargs)


def compiled_cases() -> list:
    """Every case with sizes that are compiled in, and with sizes that vary.

    The latter take most of the time. Cases whose inputs are of the same kinds trace nearly the same program, so of
    these one is compiled so and the others are slow.
    """
    compiled, seen = [pytest.param(case, False, id=f"static-{case.name}") for case in CASES], set()
    for case in CASES:
        kinds = [(v.dtype, v.dim(), v.requires_grad) if isinstance(v, Tensor) else type(v) for v in case.inputs()]
        key = (case.name.split("/")[0], *kinds)
        marks = [pytest.mark.slow] if key in seen else []
        compiled.append(pytest.param(case, True, id=f"dynamic-{case.name}", marks=marks))
        seen.add(key)
    return compiled


@pytest.mark.parametrize(("case", "dynamic"), compiled_cases())
def test_compile(case: Case, dynamic: bool, device: str):
    torch._dynamo.reset()
    expected = usual(case, device)
    compiled = torch.compile(case.call, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    assert_same("compiled", run(case, compiled, prepared(case, device, torch.float32)), expected)


@each_case
def test_export(case: Case, device: str):
    class Module(torch.nn.Module):
        def forward(self, *inputs):
            result = case.call(*inputs)
            return inputs[0].clone() if case.in_place else result

    inputs = tuple(v.detach() if isinstance(v, Tensor) else v for v in prepared(case, device, torch.float32))
    expected = Module()(*(value.clone() if isinstance(value, Tensor) else value for value in inputs))
    exported = torch.export.export(Module(), inputs)
    torch.testing.assert_close(exported.module()(*inputs), expected, rtol=1e-5, atol=1e-6, equal_nan=True)


def second_derivatives(call, inputs: tuple) -> list[Tensor]:
    """Of squares of the result and, lest there is nothing to differentiate, of the inputs."""
    leaves = differentiable(inputs)
    squares = sum(value.square().sum() for value in (call(*inputs), *leaves))
    gradients = torch.autograd.grad(squares, leaves, create_graph=True)
    return [*torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), leaves)]


@pytest.mark.interpreted
@each_case
def test_second_derivatives(case: Case, device: str):
    inputs = prepared(case, device, torch.float64)
    if not case.twice_differentiable or not differentiable(inputs):
        return
    expected = second_derivatives(case.oracle, prepared(case, "cpu", torch.float64))
    for actual, wanted in zip(second_derivatives(case.call, inputs), expected, strict=True):
        assert_close("second derivative", actual, wanted, case.tolerances[torch.float64])


@each_case
def test_second_derivative_raises(case: Case, device: str):
    if case.twice_differentiable:
        return
    inputs = prepared(case, device, torch.float32)
    leaves = differentiable(inputs)
    if not leaves or case.call(*inputs).numel() == 0:
        return  # nothing to differentiate
    gradients = torch.autograd.grad(case.call(*inputs).sum(), leaves, create_graph=True, materialize_grads=True)
    with pytest.raises(RuntimeError, match="twice"):
        sum(gradient.sum() for gradient in gradients).backward()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU has nothing to wait for")
@each_case
def test_no_synchronize(case: Case):
    inputs = prepared(case, "cuda", torch.float32)
    run(case, case.call, inputs)  # the first call may make what later calls keep
    inputs = prepared(case, "cuda", torch.float32)
    seed_shape = (inputs[0] if case.in_place else case.call(*inputs)).shape
    seed = torch.ones(seed_shape, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = case.call(*inputs)
        leaves = differentiable(inputs)
        if leaves:
            torch.autograd.grad(result, leaves, seed.to(result.dtype), allow_unused=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
