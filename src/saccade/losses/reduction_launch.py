"""How the launches of losses share the sum of what their programs have summed."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.losses.reduction_kernels import finish_kernel
from saccade.operator.launch import PreparedLaunch, cdiv, dependent_launch
from saccade.operator.torch_internals import current_gpu, current_stream, is_capturing

# So many programs keep a GPU busy, and leave few sums to add up.
_ENOUGH_PROGRAMS = 4096

# About so many losses at most are added up one after the other in the precision they are computed in: thousands would
# drift. The programs' sums are added up in float64.
_IN_A_ROW = 32

# Programs of a launch that sums nothing, at most.
_MOST_PROGRAMS = 2**31 - 1


class Workspace(NamedTuple):
    """Memory of a launch whose last program finishes the sum."""

    sums: Tensor  # (programs or more,)
    counter: Tensor  # (1,) int32: how many programs have ended; 0 before the launch and after it


_MOST_SUMS_KEPT = 1024
_STREAM_OF_EACH_THREAD = 2
"""``cudaStreamPerThread``: one number for many streams."""
_workspaces: dict[tuple[int, int, torch.dtype], Workspace] = {}


def workspace(programs: int, predictions: Tensor, dtype: torch.dtype) -> Workspace:
    """Memory for a launch of so many programs on the current stream of the predictions' device.

    What is kept for a stream and dtype, less than 10 kB, is never given back, not even if the stream is destroyed: CUDA
    keeps what belongs to a stream until its work has ended, so no other one has its number before. It comes from the
    memory pool in use at the first call on the stream, and must not be unmapped with that.
    """
    device = predictions.get_device()
    if programs > _MOST_SUMS_KEPT or device < 0 or device != current_gpu() or is_capturing():
        return _new_workspace(programs, predictions, dtype)
    stream = current_stream(device)
    kept = _workspaces.get((device, stream, dtype))
    if kept is None:
        kept = _new_workspace(_MOST_SUMS_KEPT, predictions, dtype)
        if stream != _STREAM_OF_EACH_THREAD:
            _workspaces[device, stream, dtype] = kept
    return kept


def _new_workspace(programs: int, predictions: Tensor, dtype: torch.dtype) -> Workspace:
    sums = predictions.new_empty(programs, dtype=dtype)
    return Workspace(sums, predictions.new_zeros(1, dtype=torch.int32))


def programs_of(tiles: int, is_summed: bool, in_a_row: int = 1) -> int:
    """How many programs work on tiles; if they sum up losses, so many of each tile are added one after the other."""
    return min(tiles, max(_ENOUGH_PROGRAMS, cdiv(tiles * in_a_row, _IN_A_ROW)) if is_summed else _MOST_PROGRAMS)


@lru_cache(512)
def prepared_finish(programs: int, device: torch.device) -> PreparedLaunch:
    """The launch of ``finish_kernel`` for the sums of so many programs."""
    return finish_kernel.prepare((1,), programs, num_warps=4, **dependent_launch(device))


def as_numbers(tensor: Tensor | None) -> Tensor | None:
    """The same memory; bool as bytes of 0 and 1."""
    return tensor.view(torch.uint8) if tensor is not None and tensor.dtype == torch.bool else tensor
