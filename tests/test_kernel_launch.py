"""The launch cache tells apart whatever Triton specializes on; everything else about it shows on a GPU."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

triton = pytest.importorskip("triton", reason="Triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402 - needs Triton
from triton.compiler import make_backend  # noqa: E402 - needs Triton
from triton.runtime.jit import JITFunction, create_function_from_signature  # noqa: E402 - needs Triton

from kernel_launches import recorded_launches  # noqa: E402 - needs Triton
from saccade.losses.focal import sigmoid_focal_loss, softmax_focal_loss  # noqa: E402 - needs Triton
from saccade.operator import torch_internals  # noqa: E402 - needs Triton
from saccade.operator.launch import (  # noqa: E402 - needs Triton
    LaunchedKernel,
    LaunchSequence,
    Part,
    Scratch,
    _specialize,
    dependent_launch,
)
from saccade.triton_dispatch import served_by_triton  # noqa: E402 - needs Triton

MEMORY = torch.zeros(64)
INTEGERS = [0, 1, 2, 15, 16, 17, -1, -16, 2**31 - 1, 2**31, 2**31 + 16, 2**40, -(2**31), -(2**31) - 1, -(2**40)]
TENSORS = [
    MEMORY,
    MEMORY[1:],  # not at a multiple of 16 bytes
    MEMORY[4:],
    *(
        torch.zeros(8, dtype=dtype)
        for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.uint8)
    ),
    torch.zeros(0),
]
single = st.sampled_from([*INTEGERS, *TENSORS, 0.5, 1.0, None])
arguments = st.one_of(single, st.lists(single, min_size=1, max_size=3).map(tuple))


@triton.jit
def _of_one_argument(argument):
    pass


@triton.jit
def _of_any_number(tensor, number, size, CONSTANT: triton.language.constexpr):
    pass


@pytest.fixture(scope="module")
def specialization():
    """What Triton compiles for, given an argument."""
    if served_by_triton(MEMORY):
        pytest.skip("under TRITON_INTERPRET nothing is compiled")
    function = _of_one_argument
    bind = create_function_from_signature(function.signature, function.params, make_backend(GPUTarget("cuda", 90, 32)))
    return lambda argument: bind(argument)[1]


def specialization_here(*given: Any) -> list:
    specialization: list = []
    _specialize(given, [], specialization)
    return specialization


@settings(max_examples=1000)
@given(arguments, arguments)
def test_what_triton_specializes_on_is_told_apart(specialization, first, second):
    if specialization(first) != specialization(second):
        assert specialization_here(first) != specialization_here(second)


def test_values_and_specialization():
    values: list = []
    found: list = []
    _specialize((MEMORY, None, (MEMORY[1:], 16), 0.5, 7), values, found)
    assert values == [MEMORY.data_ptr(), None, (MEMORY.data_ptr() + 4, 16), 0.5, 7]
    assert found[:3] == [torch.float32, None, ((torch.float32, "not aligned"), specialization_here(32)[0])]
    assert len({*map(str, found)}) == 5


def test_a_prepared_launch_is_that_of_the_kernel():
    if served_by_triton(MEMORY):
        pytest.skip("under TRITON_INTERPRET nothing is recorded")
    kernel = LaunchedKernel(_of_any_number)
    with recorded_launches() as launches:
        kernel.prepare((3,), 7, CONSTANT=2)([MEMORY], 0.5)
        kernel.prepare((3,), 7, CONSTANT=2)([MEMORY], 1)  # an int where the kernel takes a float
    for launch in launches:
        assert launch.grid == (3,)
        assert launch.options == {"CONSTANT": 2, "enable_fp_fusion": True}
        assert launch.arguments[0] is MEMORY
        assert launch.arguments[2] == 7
    assert [launch.arguments[1] for launch in launches] == [0.5, 1.0]
    assert isinstance(launches[1].arguments[1], float)


def test_a_sequence_gives_each_launch_its_parts():
    if served_by_triton(MEMORY):
        pytest.skip("under TRITON_INTERPRET nothing is recorded")
    kernel, scratch = LaunchedKernel(_of_any_number), Scratch(1)
    first, second = scratch.part(3, torch.int64), scratch.part(0, torch.float32)
    assert (first, second, scratch.bytes) == ((1, 0, torch.int64), (1, 128, torch.float32), 256)
    arguments = [(Part(0, 8), 0, 16), (first, 7, 16), (second, (Part(0), 7, second), 1)]
    launches = [kernel.of_parts((n + 1,), *each, CONSTANT=n) for n, each in enumerate(arguments)]
    memory = torch.zeros(scratch.bytes, dtype=torch.uint8)
    with recorded_launches() as recorded:
        LaunchSequence(2, launches)([MEMORY[2:], memory])
    assert [launch.grid for launch in recorded] == [(1,), (2,), (3,)]
    assert [launch.options["CONSTANT"] for launch in recorded] == [0, 1, 2]
    (within, *_), (of_first, *_), (of_second, inner, _) = (launch.arguments for launch in recorded)
    for tensor, address, dtype in (
        (within, MEMORY.data_ptr() + 16, torch.float32),
        (of_first, memory.data_ptr(), torch.int64),
        (of_second, memory.data_ptr() + 128, torch.float32),
        (inner[0], MEMORY.data_ptr() + 8, torch.float32),
        (inner[2], memory.data_ptr() + 128, torch.float32),
    ):
        assert (tensor.data_ptr(), tensor.dtype) == (address, dtype)
    assert [launch.arguments[1:] for launch in recorded[:2]] == [(0, 16), (7, 16)]


@pytest.mark.parametrize("launcher", [0, 1])
def test_a_sequence_is_not_launched_with_memory_that_is_aligned_otherwise(launcher, monkeypatch):
    """12 bytes behind an address that is no multiple of 16 may be one, and may not."""
    if served_by_triton(MEMORY):
        pytest.skip("under TRITON_INTERPRET nothing is compiled")
    launched: list[tuple] = []
    compiled: list[int] = []

    def compile_and_launch(kernel: JITFunction, tensor: torch.Tensor, *_: Any, **options: Any) -> SimpleNamespace:
        compiled.append(tensor.data_ptr() % 16)
        return compiled_kernel((LauncherOfTriton36, LauncherOfTriton37)[launcher](launched))

    monkeypatch.setattr(JITFunction, "run", compile_and_launch)
    monkeypatch.setattr("saccade.operator.launch.current_stream", lambda device: 0)
    kernel = LaunchedKernel(_of_any_number)
    sequence = LaunchSequence(1, [kernel.of_parts((1,), Part(0, 12), 5, 7, CONSTANT=2)])
    starts = [1, 5, 2, 1, 0, 1, 2, 6]
    for start in starts:
        sequence([MEMORY[start:]])
    assert compiled == [0, 4], "once aligned, once not"
    addresses = [value for parts in launched for part in parts for value in (part if type(part) is tuple else [part])]
    for start in (5, 1, 0, 6):
        assert MEMORY.data_ptr() + 4 * start + 12 in addresses


class LauncherOfTriton36:
    """Records launches in place of the function in C, which takes all arguments one by one."""

    global_scratch_size = profile_scratch_size = 0
    launch_cooperative_grid, launch_pdl = False, True

    def __init__(self, launched: list[tuple]):
        self.launch = lambda *parts: launched.append(parts)

    def __call__(self, x, y, z, stream, function, *args):
        self.launch(x, y, z, stream, function, self.launch_cooperative_grid, self.launch_pdl, None, None, *args)


class LauncherOfTriton37(LauncherOfTriton36):
    """The same, in which they are a tuple, and nobody counts them from Triton 3.8 on."""

    arg_annotations, kernel_signature = "annotations", b"signature"

    def __call__(self, x, y, z, stream, function, metadata, of_launch, enter, leave, *args):
        before = function, self.launch_cooperative_grid, self.launch_pdl, metadata, of_launch, enter, leave, None, None
        self.launch(x, y, z, stream, *before, self.arg_annotations, self.kernel_signature, args)


class LauncherToCome(LauncherOfTriton37):
    def __call__(self, *args):
        self.launch(*args, "more")


class LauncherThatFails(LauncherOfTriton37):
    def __call__(self, *args):
        raise RuntimeError("another form")


class LauncherWithRoom(LauncherOfTriton37):
    global_scratch_size = 8


each_form = pytest.mark.parametrize("launcher", [LauncherOfTriton36, LauncherOfTriton37])


def compiled_kernel(launcher: Any) -> SimpleNamespace:
    return SimpleNamespace(run=launcher, function="function", packed_metadata="metadata")


def direct_launch(launcher: Any) -> Any:
    if served_by_triton(MEMORY):
        pytest.skip("under TRITON_INTERPRET nothing is compiled")
    return torch_internals.direct_launch(compiled_kernel(launcher), _of_any_number, [7, 0.5, 3], 3, {"CONSTANT": 2})


@each_form
def test_a_direct_launch_gives_the_function_in_c_what_the_launcher_does(launcher):
    launched: list[tuple] = []
    of_triton = launcher(launched)
    launch = direct_launch(of_triton)
    assert launched == [], "nothing is launched where it is only asked"
    launch((4, 5, 6), 101, [8, 1.5, 3])
    of_triton(4, 5, 6, 101, "function", "metadata", None, None, None, 8, 1.5, 3, 2)
    assert launched[0] == launched[1]


@pytest.mark.parametrize("launcher", [LauncherToCome, LauncherThatFails, LauncherWithRoom, None])
def test_other_launchers_are_left_to_triton(launcher, monkeypatch):
    monkeypatch.setattr(torch_internals, "unknown_launchers", set())
    launched: list[tuple] = []
    for _ in range(2):
        assert direct_launch(launcher and launcher(launched)) is None
    assert launched == []
    name = type(None).__name__ if launcher is None else launcher.__name__
    assert torch_internals.unknown_launchers == (set() if launcher is LauncherWithRoom else {name})


@each_form
def test_a_kernel_compiled_for_aligned_memory_is_not_launched_with_other_memory(launcher, monkeypatch):
    """It reads 16 bytes at a time, which a GPU refuses to do at any other address, or does at the wrong one."""
    if served_by_triton(MEMORY):
        pytest.skip("under TRITON_INTERPRET nothing is compiled")
    compiled: list[int] = []
    launched: list[tuple] = []

    def compile_and_launch(kernel: JITFunction, tensor: torch.Tensor, *_: Any, **options: Any) -> SimpleNamespace:
        compiled.append(tensor.data_ptr())
        return compiled_kernel(launcher(launched))

    monkeypatch.setattr(JITFunction, "run", compile_and_launch)
    monkeypatch.setattr("saccade.operator.launch.current_stream", lambda device: 0)
    launch = LaunchedKernel(_of_any_number).prepare((3,), 7, CONSTANT=2)
    aligned, also_aligned, not_aligned, neither = MEMORY, MEMORY[4:], MEMORY[1:], MEMORY[6:]
    for tensor in (aligned, also_aligned, not_aligned, aligned, neither):
        launch([tensor], 0.5)
    assert compiled == [aligned.data_ptr(), not_aligned.data_ptr()]
    assert len(launched) == 3
    for parts, tensor in zip(launched, (also_aligned, aligned, neither), strict=True):
        assert tensor.data_ptr() in {value for part in parts for value in (part if isinstance(part, tuple) else [part])}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("function", [sigmoid_focal_loss, softmax_focal_loss])
def test_memory_that_is_not_aligned_after_memory_that_is(function):
    labels = torch.arange(64, device="cuda") % 16
    numbers = torch.randn(64 * 16 + 4, device="cuda")
    for offset in (0, 4, 1, 0, 2, 3, 1):
        logits = numbers[offset : offset + 64 * 16].view(64, 16).requires_grad_()
        in_float64 = logits.detach().double().requires_grad_()
        (loss, gradient), (expected, expected_gradient) = (
            (loss.detach().double(), torch.autograd.grad(loss, leaf)[0].double())
            for leaf in (logits, in_float64)
            for loss in [function(leaf, labels)]
        )
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-9)


def test_no_dependent_launch_where_gpus_have_none():
    assert dependent_launch(torch.device("cpu")) == {"PDL": False}


def what_reaches_the_driver(tmp_path: Path, *options: str) -> dict[str, Any]:
    """Cached launches, compared with Triton's own where they reach the driver: one that takes note of them."""
    if torch.cuda.is_available() or served_by_triton(MEMORY):
        pytest.skip("a GPU, or Triton's interpreter, has a driver of its own")
    folder = Path(__file__).parent / "driver"
    includes = Path(triton.__file__).parent / "backends/nvidia/include"
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler, "needs a C compiler, as Triton itself does"
    library = tmp_path / "libcuda.so.1"
    command = [compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-I", includes, folder / "libcuda.c"]
    subprocess.run([*command, "-o", library], check=True)
    library.with_name("libcuda.so").symlink_to(library)
    script = [sys.executable, folder / "launches.py", tmp_path, *options]
    done = subprocess.run(script, capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_cached_launches_give_the_driver_what_triton_does(tmp_path):
    found = what_reaches_the_driver(tmp_path)
    assert found["differ"] == []
    assert found["compared"] >= 25, "every kernel"
    assert found["prepared"] >= 16
    assert found["in_sequences"] >= 11


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_cached_launches_give_the_driver_what_triton_does(tmp_path):
    found = what_reaches_the_driver(tmp_path, "--all")
    assert found["differ"] == []
    assert found["compared"] > 200
