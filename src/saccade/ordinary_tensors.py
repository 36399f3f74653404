"""Is this an ordinary tensor, with memory of its own and values in it?"""

import torch
from torch import Tensor

from saccade.operator.torch_internals import is_functional


def is_ordinary(tensor: Tensor) -> bool:
    """Whether a tensor is just that, and does not stand for something in a trace or transform."""
    return type(tensor) is Tensor and not is_wrapped(tensor) and not is_functional(tensor)


def is_wrapped(tensor: Tensor) -> bool:
    """Whether a tensor has no address, as those that ``torch.func`` wraps, and sparse ones. Subclasses are not asked.

    PyTorch has a name for this state, too, but a private one.
    """
    if type(tensor) is not Tensor:
        return False
    try:
        tensor.data_ptr()
    except RuntimeError:
        return True
    return False


def may_be_kept(tensor: Tensor) -> bool:
    """Whether later calls can use a tensor made now, or beside this one.

    Not one that belongs to a trace or a transform (it poisons the next call), to inference mode (autograd refuses it
    later), or to the memory pool of a CUDA graph.
    """
    return (
        not torch.compiler.is_compiling()
        and is_ordinary(tensor)
        and not (tensor.is_inference() or torch.is_inference_mode_enabled())
        and not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
    )
