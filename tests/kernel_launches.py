"""Launches of Triton kernels, recorded instead of run.

A machine without a GPU cannot run a kernel, but it can compile it for every GPU. What has to be compiled, the dtypes of
pointers, the constants, which sizes are divisible by 16, the number of warps, is what the launcher says::

    with recorded_launches() as launches:
        format_rows(maps, rows)  # on CPU tensors; no kernel runs
    for launch in launches:
        launch.compile(GPUTarget("cuda", 90, 32))

Launchers must not depend on what a kernel would have written: it stays unwritten.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, with the arguments that the launcher gave."""

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]  # arguments by name, num_warps and the like among them

    @property
    def name(self) -> str:
        return f"{self.kernel.__module__}.{self.kernel.__name__}"

    def compile(self, target: GPUTarget) -> CompiledKernel:
        """The kernel as Triton would compile it for these arguments at the first launch on ``target``."""
        backend = make_backend(target)
        given = dict(self.options)
        if target.backend == "hip":
            given.pop("maxnreg", None)  # launchers leave it out where torch is built for AMD's GPUs
        if "PDL" in given and target.backend == "cuda" and target.arch >= 90:
            given |= {"PDL": True, "launch_pdl": True}  # as launchers say where the GPU can
        bind = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        bound, specialization, options = bind(*self.arguments, **given)
        # As JITFunction.run does.
        options, signature, constants, attributes = self.kernel._pack_args(
            backend, given, bound, specialization, options
        )
        source = ASTSource(self.kernel, signature, constants, attributes)
        return triton.compile(source, target=target, options=options.__dict__)


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Record the launches of every ``triton.jit`` kernel inside the block; no kernel runs."""
    launches: list[Launch] = []

    def record(kernel: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        assert all(0 < size < 2**31 for size in grid), f"{kernel.__name__}: a grid that no GPU takes, {grid}"
        launches.append(Launch(kernel, tuple(grid), arguments, options))

    with patch.object(JITFunction, "run", record):
        yield launches
