"""Which tensors may be kept from one call to the next."""

import torch
from torch import Tensor


def may_be_kept(tensor: Tensor) -> bool:
    """Whether later calls can use a tensor made now, or beside this one.

    Not one that belongs to a trace or a transform (a fake, functional or wrapped tensor poisons the next call), to
    inference mode (autograd refuses it later), or to the memory pool of a CUDA graph.
    """
    return not (
        torch.compiler.is_compiling()
        or type(tensor) is not Tensor
        or tensor.is_inference()
        or torch._is_functional_tensor(tensor)  # pyright: ignore[reportPrivateImportUsage]
        or torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # pyright: ignore[reportAttributeAccessIssue]
        or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
    )
