"""What is done in the background: samples made while others are worked on, tensors copied while the device works on."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def made_ahead(make: Callable[[int], T], indices: Iterable[int], workers: int = 1) -> Iterator[T]:
    """What `make` gives for each index, in their order, up to `workers` of them being made ahead in threads."""
    pending: deque[Future[T]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for index in indices:
            pending.append(pool.submit(make, index))
            if len(pending) > workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


class OnItsWay:
    """A tensor on its way to the host; what the device is told to do after it does not delay it."""

    def __init__(self, tensor: Tensor):
        self.copy = tensor.to("cpu", non_blocking=True)  # into page-locked memory
        self.arrival = None
        if tensor.is_cuda:
            self.arrival = torch.cuda.Event()
            self.arrival.record(torch.cuda.current_stream(tensor.device))

    def arrived(self) -> Tensor:
        """The tensor on the host, once it is there."""
        if self.arrival is not None:
            self.arrival.synchronize()
        return self.copy
