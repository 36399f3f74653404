"""Training in several processes, started by torchrun: who does what, and what they tell each other."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from saccade_demo import DemoError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes that train one detector together, and which of them this one is. By default it trains alone."""

    index: int = 0
    count: int = 1
    local_index: int = 0
    """Among those on this machine."""
    local_count: int = 1

    @classmethod
    def from_environment(cls) -> "Ranks":
        """As torchrun tells in the environment.

        Raises:
            DemoError: What is told there is no number.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        told = [(name, os.environ[name]) for name in names if name in os.environ]
        if len(told) < len(names):
            return cls()
        for name, value in told:
            if not value.isdecimal():
                raise DemoError(f"{name} in the environment: expected a number, as torchrun sets it, got {value!r}")
        return cls(*(int(value) for _, value in told))

    @contextmanager
    def joined(self, device: torch.device) -> Iterator[None]:
        """Connects the processes: gloo for what lies on the CPU, NCCL for what lies on GPUs.

        After an error nothing is taken down in order, which would wait for the other processes: this one must end, so
        that torchrun ends the others.
        """
        if self.count > 1:
            dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl")
        yield
        if self.count > 1:
            dist.destroy_process_group()

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum of a tensor over all processes; in place."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def from_all(self, told: T) -> list[T]:
        """What every process has to tell, in their order."""
        if self.count == 1:
            return [told]
        gathered: list[Any] = [None] * self.count
        dist.all_gather_object(gathered, told)
        return gathered

    def copy_of_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors with those of the first process."""
        if self.count > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns in the first process, where alone it is called, for all; or the DemoError it raises."""
        made: list[Any] = [None]
        if self.index == 0:
            try:
                made = [make()]
            except DemoError as error:
                made = [error]
        if self.count > 1:
            dist.broadcast_object_list(made)
        if isinstance(made[0], DemoError):
            raise made[0]
        return made[0]


ALONE = Ranks()


@contextmanager
def chosen_algorithms(deterministic: bool) -> Iterator[None]:
    """How PyTorch chooses among algorithms: the fastest convolutions, or what has the same bits in every run.

    Must be entered before cuBLAS is first used, which reads its setting then.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not deterministic
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
