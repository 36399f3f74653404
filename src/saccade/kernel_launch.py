"""How kernels are launched: cheaply, on the right device, and one while the one before it ends.

Triton looks a launch's compiled kernel up by everything that the kernel may have been compiled for, and asks the driver
about every pointer. Here is kept what the first launch of a kind came to, by as much as Triton tells kinds apart by;
and the driver is given plain numbers.
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


_DEFAULTS = {"enable_fp_fusion": fusion_by_default()}
"""Triton 3.9 warns where a launch leaves this open, since its default will change."""


class LaunchedKernel:
    """A ``triton.jit`` function whose launches are cheap; used as one: ``kernel[grid](*arguments, NAME=constant)``.

    Arguments that are compiled for are given by name, all others by position and before them: tensors, numbers, and
    tuples of these. Keeps one compiled kernel for each kind of arguments and device, as Triton does, and no tensor.
    """

    def __init__(self, function: JITFunction):
        self.function = function
        self._kept: dict[tuple, Launch] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        values, kinds = [], []
        device = _take_apart(arguments, values, kinds)
        launch = self.kept((device, *kinds, *constants.items()), grid, arguments, values, constants)
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

    def kept(
        self, kind: tuple, grid: tuple[int, ...], arguments: tuple, values: Sequence[Any], constants: dict[str, Any]
    ) -> Launch | None:
        """What launches a kind of calls; if it is not kept, launch these arguments as Triton does, and keep it."""
        launch = self._kept.get(kind)
        if launch is not None and not _is_watched():
            return launch
        kernel: Any = self.function[grid](*arguments, **_DEFAULTS | constants)
        # Not kept: what was not compiled, as it is interpreted; and on AMD's GPUs, where Triton tells more kinds apart.
        if hasattr(kernel, "packed_metadata") and not torch.version.hip:
            launch = direct_launch(kernel, self.function, values, len(arguments), constants)
            if launch is not None:
                self._kept[kind] = launch
        return None


class PreparedLaunch:
    """A launch of a kernel whose first arguments are still open."""

    def __init__(self, kernel: LaunchedKernel, grid: tuple[int, ...], last_arguments: tuple, constants: dict[str, Any]):
        self._kernel, self._grid, self._last_arguments, self._constants = kernel, grid, last_arguments, constants
        self._grid_of_three = _of_three_axes(grid)
        self._last_values, last_kinds = [], []
        _take_apart(last_arguments, self._last_values, last_kinds)
        self._last_kinds = (*last_kinds, *constants.items())
        self._kept: dict[tuple, Launch] = {}

    def __call__(self, tensors: Sequence[Any], *numbers: float) -> None:
        """Launch with these tensors, on their device, and numbers; all tensors but the first may be ``None``."""
        device = tensors[0].get_device()
        if device >= 0 and device != current_gpu():
            with torch.cuda.device(device):
                return self(tensors, *numbers)
        kind, values = [device, len(numbers)], []
        for tensor in tensors:
            if tensor is None:
                kind.append(None)
                values.append(None)
            else:
                address = tensor.data_ptr()
                kind.append(tensor.dtype if address % 16 == 0 else (tensor.dtype, "not aligned"))
                values.append(address)
        kind = tuple(kind)
        values += numbers
        values += self._last_values
        launch = self._kept.get(kind)
        if launch is None or _is_watched():
            numbers = tuple(map(float, numbers))
            arguments = (*tensors, *numbers, *self._last_arguments)
            kind_of_all = (device, *kind[2:], *[float] * len(numbers), *self._last_kinds)
            launch = self._kernel.kept(kind_of_all, self._grid, arguments, values, self._constants)
            if launch is None:
                return
            self._kept[kind] = launch
        launch(self._grid_of_three, device, values)


def _of_three_axes(grid: tuple[int, ...]) -> tuple[int, int, int]:
    x, y, z = (*grid, 1, 1)[:3]
    return x, y, z


def _take_apart(arguments: tuple, values: list[Any], kinds: list[Any]) -> int:
    """Append what a compiled kernel is given for the arguments, and what it is compiled for; returns the GPU or -1."""
    device = -1
    for argument in arguments:
        kind = type(argument)
        if kind is int:
            # 1 is compiled in, multiples of 16 are taken advantage of, and what 32 bits do not hold is of another type.
            kinds.append(1 if argument == 1 else 2 + 2 * (argument % 16 == 0) + (-(2**31) <= argument < 2**31))
            values.append(argument)
        elif kind is tuple:
            inner_values: list[Any] = []
            inner_kinds: list[Any] = []
            device = max(device, _take_apart(argument, inner_values, inner_kinds))
            kinds.append(tuple(inner_kinds))
            values.append(tuple(inner_values))
        elif isinstance(argument, Tensor):
            address = argument.data_ptr()
            kinds.append(argument.dtype if address % 16 == 0 else (argument.dtype, "not aligned"))
            values.append(address)
            device = argument.get_device()
        else:
            kinds.append(None if argument is None else kind)
            values.append(argument)
    return device


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Kernels are launched on the current device: make it the tensor's."""
    if not tensor.is_cuda or tensor.get_device() == current_gpu():
        return nullcontext()
    return torch.cuda.device(tensor.device)


@cache
def overlapping(device: torch.device) -> dict[str, bool]:
    """Options of a launch that is made ready while the kernel before it ends, where GPUs can (from Hopper on).

    The kernel must call ``wait_for_kernel_before`` before it reads or writes memory.
    """
    if (
        device.type != "cuda"
        or torch.version.hip
        or torch.cuda.get_device_capability(device) < (9, 0)
        or _gdc_wait is None
    ):
        return {"OVERLAP": False}
    return {"OVERLAP": True, "launch_pdl": True}


@triton.jit
def wait_for_kernel_before(OVERLAP: tl.constexpr):
    """Wait until all that was launched before has ended and can be read.

    A kernel never asks for the next one to begin before its own last blocks end: blocks that only wait take the place
    of blocks that work (backward of deformable aggregation, batch 8: 638 us instead of 590 us).
    """
    if OVERLAP:
        _gdc_wait()
