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


def first_of(wrong: Tensor) -> tuple[int, ...] | None:
    """The position of the first value that is wrong, if one is and values may be read."""
    return tuple(wrong.nonzero()[0].tolist()) if values_may_be_read(wrong) and wrong.any() else None
