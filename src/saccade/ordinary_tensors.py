"""Is this an ordinary tensor, with memory of its own and values in it?"""

import torch
from torch import Tensor


def is_ordinary(tensor: Tensor) -> bool:
    """Whether a tensor is just that, and does not stand for something in a trace or transform.

    What does has no memory: a fake tensor is of another type, one that ``torch.func`` wraps has no address, and that of
    a functional tensor is 0. PyTorch has names for these states, but they are private.
    """
    if type(tensor) is not Tensor or is_wrapped(tensor):
        return False
    return tensor.data_ptr() != 0 or tensor.numel() == 0 or tensor.device.type == "meta"


def is_wrapped(tensor: Tensor) -> bool:
    """Whether a transform of ``torch.func`` wraps a tensor; of subclasses this is not asked."""
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
        and not tensor.is_inference()
        and not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
    )
