"""What happens to an index that points nowhere."""

import torch
from torch import Tensor

from saccade.debug import debug_checks_enabled
from saccade.ordinary_tensors import is_ordinary


class IndexOutOfRangeError(IndexError, ValueError):
    """An index outside its dimension: an ``IndexError``, and a ``ValueError`` as all faults that checks find."""


def values_may_be_read(tensor: Tensor) -> bool:
    """Whether a check may look at values now: on the CPU, or on a GPU where the user asked for it.

    Never where there are none to look at: within a trace, a transform or the recording of a CUDA graph.
    """
    if torch.compiler.is_compiling() or (tensor.is_cuda and not debug_checks_enabled()) or not is_ordinary(tensor):
        return False
    if tensor.is_cuda:
        return not torch.cuda.is_current_stream_capturing()
    return tensor.device.type == "cpu"


def require_in_range(
    name: str,
    index: Tensor,  # (S, M)
    wrong: Tensor,  # (S, M) bool
    width: int,
) -> None:
    """Raise for the first of the wrong indices, where values may be read."""
    if not values_may_be_read(wrong) or not wrong.any():
        return
    sample, slot = wrong.nonzero()[0].tolist()
    raise IndexOutOfRangeError(
        f"{name}: expected indices in [{-width}, {width}), got {int(index[sample, slot])} in slot {slot} "
        f"of sample {sample}"
    )
