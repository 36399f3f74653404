"""What reaches the driver: launches that are kept, and those of Triton itself. Run with the recording driver's folder.

Prints in JSON how many launches were compared, and those that differ. Needs no GPU: `libcuda.c` stands for one.
"""

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["TRITON_LIBCUDA_PATH"] = sys.argv[1]
driver = ctypes.CDLL(str(Path(sys.argv[1], "libcuda.so.1")), mode=ctypes.RTLD_GLOBAL)

import torch  # noqa: E402 - Triton loads the driver above
import triton  # noqa: E402 - after the driver
from triton.backends.compiler import GPUTarget  # noqa: E402 - after the driver
from triton.backends.nvidia.driver import CudaDriver  # noqa: E402 - after the driver
from triton.compiler import make_backend  # noqa: E402 - after the driver
from triton.runtime.jit import JITFunction, create_function_from_signature  # noqa: E402 - after the driver

from kernel_launches import Launch  # noqa: E402 - after the driver
from saccade.operator import torch_internals  # noqa: E402 - after the driver

STREAM = 0x5555
TARGET = GPUTarget("cuda", 90, 32)


class RecordingDriver(CudaDriver):
    """Triton's, on the one GPU there is."""

    def __init__(self):
        super().__init__()
        self.get_device_capability = lambda device=0: (TARGET.arch // 10, TARGET.arch % 10)
        self.get_current_stream = lambda device=0: STREAM
        self.get_current_device = lambda: 0
        self.set_current_device = lambda device: None

    def get_current_target(self):
        return TARGET


triton.runtime.driver.set_active(RecordingDriver())
torch_internals.current_stream = lambda device: STREAM

from test_kernels_compile import CASES, launches_of  # noqa: E402 - after the driver

from saccade.operator.launch import LaunchedKernel, LaunchSequence, Part  # noqa: E402 - after the driver

through_triton = 0
run_of_triton = JITFunction.run


def counted(*args: Any, **kwargs: Any) -> Any:
    global through_triton
    through_triton += 1
    return run_of_triton(*args, **kwargs)


JITFunction.run = counted
SIZES = {"i1": 1, "u1": 1, "i8": 1, "u8": 1, "i16": 2, "u16": 2, "fp16": 2, "bf16": 2}
SIZES |= {"i32": 4, "u32": 4, "fp32": 4, "f32": 4, "i64": 8, "u64": 8, "fp64": 8, "f64": 8}


def kinds(launch: Launch, arguments: tuple, options: dict[str, Any]) -> list[str]:
    """Types of the arguments that are not compiled in."""
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, make_backend(TARGET))
    found: list[str] = []

    def flatten(kind: Any) -> None:
        if isinstance(kind, (tuple, list)):
            for inner in kind:
                flatten(inner)
        elif kind != "constexpr":
            found.append(kind)

    flatten([specialization[0] for specialization in bind(*arguments, **options)[1]])
    return found


def reached(call: Any) -> bytes:
    """What the driver is given by a call that launches once."""
    before = driver.number_of_launches()
    call()
    assert driver.number_of_launches() == before + 1
    into = (ctypes.c_ubyte * (1 << 16))()
    return bytes(into[: driver.last_launch(into)])


def others_like(argument: Any) -> Any:
    """An argument of the same kind with another value."""
    if isinstance(argument, torch.Tensor) and argument.device.type == "cpu" and argument.numel() < 2**20:
        other = torch.empty_strided(argument.shape, argument.stride(), dtype=argument.dtype)
        return other if other.data_ptr() % 16 == argument.data_ptr() % 16 else argument
    if type(argument) is int and 1 < argument < 2**20:
        return argument + (32 if argument % 16 == 0 else 1 if argument % 16 < 15 else 2)
    if type(argument) is float:
        return argument * 1.25 + 0.5
    return tuple(map(others_like, argument)) if type(argument) is tuple else argument


def as_parts(argument: Any, tensors: list[torch.Tensor]) -> Any:
    """An argument as a sequence of launches takes it; its tensors are added to the others."""
    if type(argument) is tuple:
        return tuple(as_parts(each, tensors) for each in argument)
    if isinstance(argument, torch.Tensor):
        tensors.append(argument)
        return Part(len(tensors) - 1)
    return argument


def compare(launch: Launch) -> tuple[list[str], set[str]]:
    """In what launches differ from Triton's, and how they can be made: prepared, and in a sequence."""
    options = dict(launch.options)
    if "PDL" in options:
        options |= {"PDL": True, "launch_pdl": True}
    given, others = launch.arguments, tuple(map(others_like, launch.arguments))
    sizes = [8 if kind.startswith("*") else SIZES[kind] for kind in kinds(launch, given, options)] + [8, 8]  # scratch
    driver.set_sizes(len(sizes), (ctypes.c_int * len(sizes))(*sizes))
    differ, made = [], set()

    def same(what: str, call: Any, arguments: tuple) -> None:
        before = through_triton
        actual = reached(call)
        if through_triton != before:
            differ.append(f"{what}: went through Triton")
        if actual != reached(lambda: launch.kernel[launch.grid](*arguments, **options)):
            differ.append(f"{what}: something else reached the driver")
        made.add(what)

    kernel = LaunchedKernel(launch.kernel)
    tensors = 0
    while tensors < len(given) and (given[tensors] is None or isinstance(given[tensors], torch.Tensor)):
        tensors += 1
    numbers = tensors
    while numbers < len(given) and type(given[numbers]) is float:
        numbers += 1
    last, in_a_sequence, in_another = given[numbers:], [], []
    parts = [as_parts(argument, in_a_sequence) for argument in given]
    other_tensors = (*others[:numbers], *map(tensors_like, last))
    as_parts(other_tensors, in_another)
    if given[0] is not None and all(map(is_number, last)):
        prepared = kernel.prepare(launch.grid, *last, **options)
        reached(lambda: prepared(given[:tensors], *given[tensors:numbers]))
        arguments = (*others[:numbers], *last)
        same("prepared", lambda: prepared(others[:tensors], *others[tensors:numbers]), arguments)
    if tensors == numbers and None not in parts:
        sequence = LaunchSequence(len(in_a_sequence), [kernel.of_parts(launch.grid, *parts, **options)])
        if "prepared" not in made:
            reached(lambda: sequence(in_a_sequence))
        same("alone in a sequence", lambda: sequence(in_a_sequence), given)
        same("in a sequence", lambda: sequence(in_another), other_tensors)
    if not made:
        differ.append("neither prepared nor in a sequence")
    return differ, made


def is_number(argument: Any) -> bool:
    return all(map(is_number, argument)) if type(argument) is tuple else argument is None or type(argument) is int


def tensors_like(argument: Any) -> Any:
    """An argument with other tensors and the same numbers."""
    if type(argument) is tuple:
        return tuple(map(tensors_like, argument))
    return others_like(argument) if isinstance(argument, torch.Tensor) else argument


def main(every_case: bool) -> None:
    """Compare the launches of all cases, or one for each kernel."""
    seen, differ, compared, prepared, in_sequences = set(), [], 0, 0, 0
    for name, call in CASES:
        for launch in launches_of(call):
            key = launch.name
            if every_case:
                key = (key, str(kinds(launch, launch.arguments, launch.options)), str(sorted(launch.options.items())))
            if key in seen:
                continue
            seen.add(key)
            found, made = compare(launch)
            differ += [f"{name}, {launch.name}: {what}" for what in found]
            compared, prepared = compared + 1, prepared + ("prepared" in made)
            in_sequences += "in a sequence" in made
    print(json.dumps({"compared": compared, "prepared": prepared, "in_sequences": in_sequences, "differ": differ}))


if __name__ == "__main__":
    main("--all" in sys.argv[2:])
