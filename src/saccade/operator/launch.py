"""How kernels are launched: cheaply, on the right device, and with programmatic dependent launch where GPUs have it.

Triton compiles a kernel once for each *specialization*: dtypes of tensors and whether their addresses are multiples of
16, types of numbers, integers that are 1 or multiples of 16, constants. At every launch it works the specialization out
in Python, and asks the driver about every pointer. The *launch cache* here holds the compiled kernel of each
specialization after its first launch; later ones give the driver plain numbers. A *prepared launch* has the
specialization of all but its tensors worked out ahead, a *launch sequence* that of several launches of one call.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import JITFunction

from saccade.operator.schema import Pick, pick
from saccade.operator.torch_internals import (
    Launch,
    current_gpu,
    current_stream,
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
    """A ``triton.jit`` function whose launches are cheap.

    Constants are given by name. Before them come, by position, tensors, numbers, and tuples of these. Caches one
    compiled kernel for each specialization and device, as Triton does, and no tensor.
    """

    def __init__(self, function: JITFunction):
        self.function = function
        self._kept: dict[tuple, Launch] = {}

    def prepare(self, grid: tuple[int, ...], *last_arguments: Any, **constants: Any) -> "PreparedLaunch":
        """A launch that is complete but for its first arguments: for launchers that are called again and again.

        Args:
            grid: Number of programs along each axis.
            *last_arguments: Integers and tuples of them. Before these, the kernel takes tensors and then floats, which
                are given at each launch.
            **constants: As when launching.
        """
        return PreparedLaunch(self, grid, last_arguments, constants)

    def of_parts(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> "LaunchOfParts":
        """A launch of a ``LaunchSequence``, with a ``Part`` for each tensor."""
        return LaunchOfParts(self, grid, arguments, constants)

    def launch(
        self,
        device: int,
        specialization: tuple,
        grid: tuple[int, ...],
        arguments: tuple,
        values: Sequence[Any],
        constants: dict[str, Any],
    ) -> Launch | None:
        """Launch; returns what launches such arguments from now on, if anything.

        Through Triton where none like them was launched before, and where launches are watched.
        """
        launch = self._kept.get((device, specialization))
        if launch is not None and not _is_watched():
            launch(_of_three_axes(grid), current_stream(device), values)
            return launch
        kernel: Any = self.function[grid](*arguments, **_DEFAULTS | constants)
        # Not cached: what is interpreted rather than compiled; and on AMD's GPUs, for which Triton specializes on more.
        if not hasattr(kernel, "packed_metadata") or torch.version.hip:
            return None
        launch = direct_launch(kernel, self.function, values, len(arguments), constants)
        if launch is not None:
            self._kept[device, specialization] = launch
        return launch


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
            specialization = (*key[2:], *[float] * len(numbers), *self._last_specialization)
            launch = self._kernel.launch(device, specialization, self._grid, arguments, values, self._constants)
            if launch is not None:
                self._kept[key] = launch
        else:
            launch(self._grid_of_three, current_stream(device), values)


class Part(NamedTuple):
    """Memory that a kernel of a sequence is given."""

    tensor: int
    """Position of the tensor that it belongs to, among those that the sequence is called with."""
    begin: int = 0
    """Bytes from where the tensor begins."""
    dtype: torch.dtype | None = None
    """What lies there; by default what the tensor is of."""


class LaunchOfParts(NamedTuple):
    """A launch of a sequence."""

    kernel: LaunchedKernel
    grid: tuple[int, ...]
    arguments: tuple
    """Parts, integers, and tuples of these."""
    constants: dict[str, Any]


class Scratch:
    """Memory that is needed while a sequence runs: one tensor of bytes, cut into parts."""

    def __init__(self, tensor: int):
        """``tensor`` is its position among those that the sequence is called with."""
        self.tensor, self.bytes = tensor, 0

    def part(self, elements: int, dtype: torch.dtype) -> Part:
        """The next part, behind the one before."""
        begin = self.bytes
        self.bytes += cdiv(max(elements, 1) * dtype.itemsize, 128) * 128
        return Part(self.tensor, begin, dtype)


class LaunchSequence:
    """Launches one after the other that are complete but for the tensors: what they share is done once for all."""

    def __init__(self, tensors: int, launches: Sequence[LaunchOfParts]):
        """A sequence for so many tensors; it is called with tensors of the same dtypes always.

        All that kernels are given stands in one list, from which each launch picks its own: addresses of the tensors,
        addresses within them, numbers, and tuples of these, in this order.
        """
        arguments = [argument for launch in launches for argument in launch.arguments]
        apart = [each for argument in arguments for each in (argument if type(argument) is tuple else (argument,))]
        assert all(isinstance(each, Part) or type(each) is int for each in apart), "parts and integers"
        parts = [each for each in apart if isinstance(each, Part)]
        self._launches, self._kept = launches, {}
        self._within = [*dict.fromkeys((part.tensor, part.begin) for part in parts if part.begin)]
        self._numbers = [*dict.fromkeys(each for each in apart if type(each) is int)]
        tuples = [*dict.fromkeys(argument for argument in arguments if type(argument) is tuple)]
        behind = [*(Part(*within) for within in self._within), *self._numbers, *tuples]
        slots = {each: tensors + position for position, each in enumerate(behind)}

        def slot_of(each: Any) -> int:
            if not isinstance(each, Part):
                return slots[each]
            return slots[Part(each.tensor, each.begin)] if each.begin else each.tensor

        self._tuples = [pick([*map(slot_of, each)]) for each in tuples]
        self._picks = [pick([*map(slot_of, launch.arguments)]) for launch in launches]

    def __call__(self, tensors: Sequence[Tensor]) -> None:
        """Launch with these tensors, on the device of the first."""
        device = tensors[0].get_device()
        if device >= 0 and device != current_gpu():
            with torch.cuda.device(device):
                return self(tensors)
        values: list[Any] = [tensor.data_ptr() for tensor in tensors]
        key = (device, *[address % 16 for address in values])
        launches = self._kept.get(key)
        if launches is None or _is_watched():
            return self._launch_one_by_one(tensors, device, key)
        stream = current_stream(device)
        values += [values[tensor] + begin for tensor, begin in self._within]
        values += self._numbers
        values += [take(values) for take in self._tuples]
        for launch, grid, take in launches:
            launch(grid, stream, take(values))

    def _launch_one_by_one(self, tensors: Sequence[Tensor], device: int, key: tuple) -> None:
        launches: list[tuple[Launch, tuple[int, int, int], Pick]] = []
        for (kernel, grid, parts, constants), take in zip(self._launches, self._picks, strict=True):
            arguments = tuple(_of_tensors(argument, tensors) for argument in parts)
            values, specialization = [], []
            _specialize(arguments, values, specialization)
            of_all = (*specialization, *constants.items())
            launch = kernel.launch(device, of_all, grid, arguments, values, constants)
            if launch is not None:
                launches.append((launch, _of_three_axes(grid), take))
        if len(launches) == len(self._launches):
            self._kept[key] = launches


def _of_tensors(argument: Any, tensors: Sequence[Tensor]) -> Any:
    """An argument of a launch of a sequence, with a tensor for each part."""
    if type(argument) is tuple:
        return tuple(_of_tensors(part, tensors) for part in argument)
    if not isinstance(argument, Part):
        return argument
    tensor, begin, dtype = tensors[argument.tensor], argument.begin, argument.dtype or tensors[argument.tensor].dtype
    if begin == 0 and dtype == tensor.dtype:
        return tensor
    first = (tensor.storage_offset() * tensor.element_size() + begin) // dtype.itemsize
    return torch.empty(0, dtype=dtype, device=tensor.device).set_(tensor.untyped_storage(), first, (1,), (1,))


def _of_three_axes(grid: tuple[int, ...]) -> tuple[int, int, int]:
    x, y, z = (*grid, 1, 1)[:3]
    return x, y, z


def _specialize(arguments: tuple, values: list[Any], specialization: list[Any]) -> None:
    """Append what a compiled kernel is given for the arguments, and what it is compiled for.

    Two arguments for which Triton compiles differently have different entries in ``specialization``.
    """
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
            _specialize(argument, inner_values, inner)
            specialization.append(tuple(inner))
            values.append(tuple(inner_values))
        elif isinstance(argument, Tensor):
            address = argument.data_ptr()
            specialization.append(argument.dtype if address % 16 == 0 else (argument.dtype, "not aligned"))
            values.append(address)
        else:
            specialization.append(None if argument is None else of_type)
            values.append(argument)


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
