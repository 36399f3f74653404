"""What every operator is tested with on a GPU: tables for each operator, all of them run by ``test_gpu_contract.py``.

A file of this package has the tables of one operator: ``CASES``, ``TOGETHER``, ``MEMORY``, ``BEYOND`` and ``COMPILED``.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from cases.comparison import assert_near

DEVICE = "cuda"
NAN = float("nan")
BEYOND_32_BITS = 2**31

# Largest relative error (norm of the difference over norm of the exact result): a few roundings of float32 in each
# element, and half an ulp of the smaller dtypes. Reduced losses are float32 whatever the dtype.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}

Call = Callable[..., Tensor]


def as_given(values: list[Tensor]) -> list[Tensor]:
    return values


@dataclass(frozen=True)
class Sizes:
    """Sizes of an operator's inputs, each whatever its cases make inputs of: a tuple of numbers."""

    usual: Any
    compared: tuple[Any, ...]  # with results of the CPU
    repeated: tuple[Any, ...]  # of calls whose bits must be equal run after run
    overlapping: tuple[Any, ...]  # of calls on several streams at once
    chained: Any  # of calls that read what the one before made
    chained_in_a_graph: Any
    told_apart: tuple[Any, ...]  # small, and with axes of length 1 where there may be some
    numbered: Callable[[int], Any]  # another size for each number, and small
    unseen: Callable[[int], tuple[Any, ...]]  # for each number sizes that no other test has
    outlasting: int = 5  # how many products of 20 ms outlast 15 runs of the repeated sizes


@dataclass(frozen=True)
class OnGpu:
    """One way to call one operator, as a function of tensors alone that returns a tensor.

    ``make(size, dtype, seed)`` makes its inputs, on the GPU; those that have gradients require one. An operator that
    writes in place is called on a copy of its first input, so that calls can be repeated.
    """

    name: str
    call: Call
    make: Callable[[Any, torch.dtype, int], list[Tensor]]
    sizes: Sizes
    tolerances: dict[torch.dtype, float] = field(default_factory=lambda: TOLERANCES)
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16)
    elementwise: bool = False  # the result is no scalar, and has gradients
    told_apart: bool = False  # one of those whose kept kernels are put to the test
    contiguous: bool = False  # the first input must be
    cast_by_autocast: bool = False
    same_on_every_gpu: bool = False  # bit for bit: no sum is shared out among as many processors as there are
    step_size: float = 0.1  # of the element with the largest gradient, in a descent
    advance: Callable[[list[Tensor], list[Tensor]], None] | None = None  # inputs from results, where not by gradients
    unlike: Callable[[list[Tensor]], None] | None = None  # makes inputs into ones that take another amount of work
    on_cpu: Callable[[list[Tensor]], list[Tensor]] = as_given  # what the CPU raises for, a GPU skips

    def inputs(self, size: Any = None, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
        return self.make(self.sizes.usual if size is None else size, dtype, seed)

    def step(self, values: Sequence[Tensor]) -> list[Tensor]:
        return step(self.call, values)

    def expected(self, values: Sequence[Tensor]) -> list[Tensor]:
        """What ``step`` returns, on the CPU, without kernels, in float64."""
        copies = [value.detach().cpu() for value in values]
        copies = [copy.double() if copy.is_floating_point() else copy for copy in copies]
        copies = self.on_cpu(copies)
        return self.step([copy.requires_grad_(value.requires_grad) for copy, value in zip(copies, values, strict=True)])

    def assert_right(self, what: str, results: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
        for k, (left, right) in enumerate(zip(results, expected, strict=True)):
            assert_near(f"{what}: result {k}", left, right, self.tolerances[left.dtype])


@dataclass(frozen=True)
class Memory:
    """A step at a size at which memory matters, and the bytes that it may take beside its inputs and results."""

    name: str
    make: Callable[[], tuple[Call, list[Tensor]]]
    allowed: Callable[[list[Tensor], list[Tensor]], float]  # of inputs and results
    gigabytes: int | None = None


@dataclass(frozen=True)
class Few:
    """Few numbers that matter among more, or further apart, than 32 bits count; nothing may come of the others."""

    call: Call
    values: list[Tensor]
    expected: Sequence[Tensor]  # results for the few
    of_few: Callable[[list[Tensor]], Sequence[Tensor]] = as_given  # these among all results; the others must be zero
    seed: Tensor | None = None  # the gradient of the result, by default that of ``step``
    tolerances: dict[torch.dtype, float] = field(default_factory=lambda: TOLERANCES)
    absolute: float = 0.0  # error allowed to each element of a gradient, beside a relative one


@dataclass(frozen=True)
class Beyond:
    name: str
    gigabytes: int
    make: Callable[[], Few]


@dataclass(frozen=True)
class Compiled:
    """A model's head around an operator, and its inputs for a batch size, of which no other axis has the length.

    The first trace takes axes of one length for the same.
    """

    name: str
    head: Callable[[], Call]  # made when a test runs: it may keep tensors
    make: Callable[[int], list[Tensor]]
    sizes: tuple[int, int, int]
    autocast: Literal["inside", "around"] | None = None  # what is compiled

    @property
    def tolerance(self) -> float:
        """Compiled code may round inputs and gradients around the operator in another way, to bfloat16 in autocast."""
        return 1e-2 if self.autocast else 1e-5


def step(call: Call, values: Sequence[Tensor], seed: Tensor | None = None) -> list[Tensor]:
    """The result, and the gradient of a fixed weighted sum of it for each value that requires one."""
    inputs = [value.detach().requires_grad_(value.requires_grad) for value in values]
    result = call(*inputs)
    leaves = [leaf for leaf in inputs if leaf.requires_grad]
    if not leaves:
        return [result]
    if seed is None:
        seed = torch.arange(result.numel(), device=result.device).remainder(5).add(1).view(result.shape)
    return [result.detach(), *torch.autograd.grad(result, leaves, seed.to(result.dtype))]


def bytes_of(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@contextmanager
def synchronizing_raises() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def deterministic_algorithms(on: bool) -> Iterator[None]:
    torch.use_deterministic_algorithms(on)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def keep_busy(products: int = 5) -> None:
    """Queue work of about 20 ms each on the current stream."""
    matrix = torch.randn(8192, 8192, device=DEVICE)
    product = torch.empty_like(matrix)
    for _ in range(products):
        torch.mm(matrix, matrix, out=product)


# ---- few among many


def ends(values: Tensor, edge: int, dim: int = 0) -> Tensor:
    return torch.cat([values.narrow(dim, 0, edge), values.narrow(dim, values.shape[dim] - edge, edge)], dim)


def is_zero(values: Tensor) -> bool:
    """In parts: a reduction of more than 2^31 elements may be slow or unsupported itself."""
    return not any(part.any() for part in values.flatten().split(2**29))


def with_many_between(values: Tensor, count: int, fill: float, dim: int = 0) -> Tensor:
    """As long as ``count`` along an axis: both halves of the values at its ends, and one number between them."""
    edge, shape = values.shape[dim] // 2, list(values.shape)
    shape[dim] = count
    many = values.new_full(shape, fill)
    many.narrow(dim, 0, edge).copy_(values.detach().narrow(dim, 0, edge))
    many.narrow(dim, count - edge, edge).copy_(values.detach().narrow(dim, values.shape[dim] - edge, edge))
    return many


def without_those_between(values: Tensor, edge: int, dim: int = 0) -> Tensor:
    assert is_zero(values.narrow(dim, edge, values.shape[dim] - 2 * edge)), "something came of what does not count"
    return ends(values, edge, dim)


def far_apart(values: Tensor, apart: int, fill: float) -> Tensor:
    """Rows of values that lie further apart than they are long, and one number between them."""
    around = values.new_full((len(values), apart), fill)
    return around[:, 5 : 5 + values[0].numel()].view(values.shape).copy_(values)


# ---- places in memory


def plain(values: Tensor) -> Tensor:
    return values.clone(memory_format=torch.contiguous_format)


def unaligned(values: Tensor) -> Tensor:
    """At an address that is no multiple of 16 bytes, with the strides of a contiguous tensor."""
    buffer = values.new_empty(values.numel() + 1)
    return buffer[1:].view(values.shape).copy_(values)


def with_gaps(values: Tensor) -> Tensor:
    return values.new_empty(*values.shape[:-1], values.shape[-1] + 1)[..., :-1].copy_(values)


def transposed(values: Tensor) -> Tensor:
    """With the last two axes in another order; a vector with gaps."""
    return plain(values.mT).mT if values.dim() > 1 else with_gaps(values[:, None])[:, 0]


PLACES: list[Callable[[Tensor], Tensor]] = [plain, unaligned, with_gaps, transposed]


def copied_as_it_lies(values: Tensor) -> Tensor:
    """A copy with the same strides, and as well aligned, of which compiled code knows nothing."""
    if torch.compiler.is_compiling():
        return values.clone()
    reach = 1 + sum((length - 1) * stride for length, stride in zip(values.shape, values.stride(), strict=True))
    offset = values.storage_offset() % 16
    memory = values.new_empty(offset + reach)
    return memory.as_strided(values.shape, values.stride(), offset).copy_(values)


def placed(values: Sequence[Tensor], first: int, contiguous: bool = False) -> list[Tensor]:
    """Each value in another of the places, beginning with one of them; the first one if need be in contiguous ones."""
    moved = []
    for k, value in enumerate(values):
        place = PLACES[(first + k) % (2 if contiguous and k == 0 else len(PLACES))]
        moved.append(place(value.detach()).requires_grad_(value.requires_grad) if value.dim() else value)
    return moved
