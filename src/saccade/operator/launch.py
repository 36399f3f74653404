"""How kernels are launched: cheaply, on the right device, and with programmatic dependent launch where GPUs have it.

Triton compiles a kernel once for each *specialization*: dtypes of tensors and whether their addresses are multiples of
16, types of numbers, integers that are 1 or multiples of 16, constants. At every launch it works the specialization out
in Python, and asks the driver about every pointer. The *launch cache* here holds the compiled kernel of each
specialization after its first launch; later ones give the driver plain numbers. A *prepared launch* has the
specialization of all but its tensors worked out ahead.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import JITFunction

from saccade.operator.torch_internals import (
    Launch,
    current_gpu,
    dependent_launch_wait,
    direct_launch,
    fusion_by_default,
    launch_watch,
)

_gdc_wait = dependent_launch_wait()
_is_watched = launch_watch()

TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}
"""What kernels compute in, as a constant of theirs."""


def cdiv(number: int, divisor: int) -> int:
    """The quotient, rounded up."""
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    """The least power of 2 that is not less than a positive number."""
    return 1 << (number - 1).bit_length()


_DEFAULTS = {"enable_fp_fusion": fusion_by_default()}
"""Triton 3.9 warns where a launch leaves this open, since its default will change."""


class LaunchedKernel:
    """A ``triton.jit`` function whose launches are cheap; used as one: ``kernel[grid](*arguments, NAME=constant)``.

    Constants are given by name. Before them come, by position, tensors, numbers, and tuples of these. Caches one
    compiled kernel for each specialization and device, as Triton does, and no tensor.
    """

    def __init__(self, function: JITFunction):
        self.function = function
        self._kept: dict[tuple, Launch] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        values, specialization = [], []
        device = _specialize(arguments, values, specialization)
        launch = self.cached((device, *specialization, *constants.items()), grid, arguments, values, constants)
        if launch is not None:
            launch(_of_three_axes(grid), device, values)

    def prepare(self, grid: tuple[int, ...], *last_arguments: Any, **constants: Any) -> "PreparedLaunch":
        """A launch that is complete but for its first arguments: for launchers that are called again and again.

        Args:
            grid: Number of programs along each axis.
            *last_arguments: Integers and tuples of them. Before these, the kernel takes tensors and then floats, which
                are given at each launch.
            **constants: As when launching.
        """
        return PreparedLaunch(self, grid, last_arguments, constants)

    def cached(
        self,
        specialization: tuple,
        grid: tuple[int, ...],
        arguments: tuple,
        values: Sequence[Any],
        constants: dict[str, Any],
    ) -> Launch | None:
        """The cached launch of a specialization; without one, launch these arguments through Triton and cache it."""
        launch = self._kept.get(specialization)
        if launch is not None and not _is_watched():
            return launch
        kernel: Any = self.function[grid](*arguments, **_DEFAULTS | constants)
        # Not cached: what is interpreted rather than compiled; and on AMD's GPUs, for which Triton specializes on more.
        if hasattr(kernel, "packed_metadata") and not torch.version.hip:
            launch = direct_launch(kernel, self.function, values, len(arguments), constants)
            if launch is not None:
                self._kept[specialization] = launch
        return None


class PreparedLaunch:
    """A launch of a kernel whose first arguments are still open."""

    def __init__(self, kernel: LaunchedKernel, grid: tuple[int, ...], last_arguments: tuple, constants: dict[str, Any]):
        self._kernel, self._grid, self._last_arguments, self._constants = kernel, grid, last_arguments, constants
        self._grid_of_three = _of_three_axes(grid)
        self._last_values, of_last = [], []
        _specialize(last_arguments, self._last_values, of_last)
        self._last_specialization = (*of_last, *constants.items())
        self._kept: dict[tuple, Launch] = {}

    def __call__(self, tensors: Sequence[Any], *numbers: float) -> None:
        """Launch with these tensors, on their device, and numbers; all tensors but the first may be ``None``."""
        device = tensors[0].get_device()
        if device >= 0 and device != current_gpu():
            with torch.cuda.device(device):
                return self(tensors, *numbers)
        key, values = [device, len(numbers)], []
        for tensor in tensors:
            if tensor is None:
                key.append(None)
                values.append(None)
            else:
                address = tensor.data_ptr()
                key.append(tensor.dtype if address % 16 == 0 else (tensor.dtype, "not aligned"))
                values.append(address)
        key = tuple(key)
        values += numbers
        values += self._last_values
        launch = self._kept.get(key)
        if launch is None or _is_watched():
            numbers = tuple(map(float, numbers))
            arguments = (*tensors, *numbers, *self._last_arguments)
            specialization = (device, *key[2:], *[float] * len(numbers), *self._last_specialization)
            launch = self._kernel.cached(specialization, self._grid, arguments, values, self._constants)
            if launch is None:
                return
            self._kept[key] = launch
        launch(self._grid_of_three, device, values)


def _of_three_axes(grid: tuple[int, ...]) -> tuple[int, int, int]:
    x, y, z = (*grid, 1, 1)[:3]
    return x, y, z


def _specialize(arguments: tuple, values: list[Any], specialization: list[Any]) -> int:
    """Append what a compiled kernel is given for the arguments, and what it is compiled for; returns the GPU or -1.

    Two arguments for which Triton compiles differently have different entries in ``specialization``.
    """
    device = -1
    for argument in arguments:
        of_type = type(argument)
        if of_type is int:
            # 1 is compiled in, multiples of 16 are taken advantage of, and what 32 bits do not hold is of another type.
            is_multiple, is_short = argument % 16 == 0, -(2**31) <= argument < 2**31
            specialization.append(1 if argument == 1 else 2 + 2 * is_multiple + is_short)
            values.append(argument)
        elif of_type is tuple:
            inner_values: list[Any] = []
            inner: list[Any] = []
            device = max(device, _specialize(argument, inner_values, inner))
            specialization.append(tuple(inner))
            values.append(tuple(inner_values))
        elif isinstance(argument, Tensor):
            address = argument.data_ptr()
            specialization.append(argument.dtype if address % 16 == 0 else (argument.dtype, "not aligned"))
            values.append(address)
            device = argument.get_device()
        else:
            specialization.append(None if argument is None else of_type)
            values.append(argument)
    return device


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Kernels are launched on the current device: make it the tensor's."""
    if not tensor.is_cuda or tensor.get_device() == current_gpu():
        return nullcontext()
    return torch.cuda.device(tensor.device)


@cache
def dependent_launch(device: torch.device) -> dict[str, bool]:
    """Options of programmatic dependent launch, where GPUs have it (from Hopper on).

    The kernel is made ready while the one before it ends. It must call ``wait_for_previous_kernel`` before it reads or
    writes memory.
    """
    if (
        device.type != "cuda"
        or torch.version.hip
        or torch.cuda.get_device_capability(device) < (9, 0)
        or _gdc_wait is None
    ):
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}


@triton.jit
def wait_for_previous_kernel(PDL: tl.constexpr):
    """Wait until all that was launched before has ended and can be read: the device's half of a dependent launch.

    No kernel lets the next one begin before its own last blocks end (``gdc_launch_dependents``): blocks that only wait
    take the place of blocks that work (backward of deformable aggregation, batch 8: 638 us instead of 590 us).
    """
    if PDL:
        _gdc_wait()
