"""Sums and means over the valid entries of each sample, and small changes of shape and content."""

import torch
from torch import Tensor

from saccade.argument_checks import InvalidStateError, require_tensor
from saccade.ragged.batch import RaggedBatch, require_ragged
from saccade.ragged.rows import fill


def average_over_targets(data: RaggedBatch, nans_to_zero: bool = True) -> Tensor:
    """Mean over the valid entries of each sample.

    Padding counts for nothing, whatever it holds. Sums of dtypes below float32 are taken in float32.

    Args:
        data: (*B, N, *D) of any dtype, N anywhere behind the batch dimensions.
        nans_to_zero: Make 0 of every mean that is not finite: of samples without entries, and of all others that come
            out as NaN or infinity.

    Returns:
        (*B, *D) in the dtype of ``data``, float32 for integers and bool. Gradients flow to valid entries.

    The function of ``accvlab.batching_helpers``.

    Example:
        >>> import torch
        >>> from saccade.ragged import RaggedBatch, average_over_targets
        >>> data = RaggedBatch(torch.tensor([[2.0, 4.0, 99.0], [1.0, 2.0, 6.0]]), sample_sizes=torch.tensor([2, 0]))
        >>> average_over_targets(data)
        tensor([3., 0.])
        >>> average_over_targets(data, nans_to_zero=False)
        tensor([3., nan])
    """
    total = _total(data)
    sizes = data.sample_sizes.long().clamp(0, data.max_sample_size)
    sizes = sizes.view(*sizes.shape, *[1] * (total.dim() - sizes.dim()))
    is_float = data.dtype.is_floating_point or data.dtype.is_complex
    mean = (total / sizes).to(data.dtype if is_float else torch.float32)
    return torch.where(mean.isfinite(), mean, 0) if nans_to_zero else mean


def sum_over_targets(data: RaggedBatch) -> Tensor:
    """Sum over the valid entries of each sample.

    Padding counts for nothing, whatever it holds. Sums of dtypes below float32 are taken in float32.

    Args:
        data: (*B, N, *D) of any dtype, N anywhere behind the batch dimensions.

    Returns:
        (*B, *D) in the dtype of ``data``: of bool, whether any entry is true. Gradients flow to valid entries.

    The function of ``accvlab.batching_helpers``.

    Example:
        >>> import torch
        >>> from saccade.ragged import RaggedBatch, sum_over_targets
        >>> sum_over_targets(RaggedBatch(torch.tensor([[2, 4, 99], [1, 2, 6]]), sample_sizes=torch.tensor([2, 3])))
        tensor([6, 9])
    """
    return _total(data).to(data.dtype)


def apply_mask_to_tensor(data: Tensor, mask: Tensor, value_to_set: float = 0.0) -> Tensor:
    """A copy with a value wherever a mask is false; no gradient from there.

    Args:
        data: (*M, ...) of any dtype.
        mask: (*M) bool, or any dtype of which 0 is false: the leading dimensions of ``data``, or sizes of 1.
        value_to_set: int, float or bool, converted as PyTorch converts a scalar.

    Raises:
        InvalidStateError: (a ``RuntimeError`` and ``ValueError``) the mask has more dimensions than the data, or other
            sizes.

    The function of ``accvlab.batching_helpers``.

    Example:
        >>> import torch
        >>> from saccade.ragged import apply_mask_to_tensor
        >>> apply_mask_to_tensor(torch.tensor([[0, 1, 2], [3, 4, 5]]), torch.tensor([True, False]))
        tensor([[0, 1, 2],
                [0, 0, 0]])
    """
    require_tensor("data", data)
    require_tensor("mask", mask)
    if mask.numel() == 0:
        return data.clone()
    leading = data.shape[: mask.dim()]
    # A list, since torch.compile in PyTorch 2.9 does not look into any(...).
    if len(leading) < mask.dim() or [m for m, d in zip(mask.shape, leading, strict=True) if m not in (1, d)]:
        raise InvalidStateError(
            f"mask: expected the leading dimensions of data, of shape {tuple(data.shape)}, got {tuple(mask.shape)}"
        )
    return fill(data, ~mask.bool().view(*mask.shape, *[1] * (data.dim() - mask.dim())), value_to_set)


def squeeze_except_batch_and_sample(data: Tensor | RaggedBatch) -> Tensor | RaggedBatch:
    """A view without the data dimensions of size 1.

    Args:
        data: A tensor, of which the first two dimensions stay, or a ragged batch, of which the batch dimensions and the
            non-uniform one stay.

    Returns:
        A tensor or a ragged batch, as ``data`` is; the latter shares its mask and sizes.

    The function of ``accvlab.batching_helpers``.

    Example:
        >>> import torch
        >>> from saccade.ragged import squeeze_except_batch_and_sample
        >>> squeeze_except_batch_and_sample(torch.zeros(1, 1, 1, 3, 1)).shape
        torch.Size([1, 1, 3])
    """
    if not isinstance(data, RaggedBatch):
        require_tensor("data", data)
        return data.squeeze(tuple(range(2, data.dim()))) if data.dim() > 2 else data.view(data.shape)
    dim = data.non_uniform_dim
    ones = [d for d in range(data.num_batch_dims, data.dim()) if d != dim and data.shape[d] == 1]
    return data.create_with_sample_sizes_like_self(data.tensor.squeeze(ones), dim - sum(d < dim for d in ones))


def _total(data: RaggedBatch) -> Tensor:
    """Sum over valid entries, in the dtype in which sums are taken."""
    require_ragged("data", data)
    return data.with_padded_set_to(0).tensor.sum(data.non_uniform_dim, dtype=_dtype_of_sums(data.dtype))


def _dtype_of_sums(dtype: torch.dtype) -> torch.dtype:
    if dtype.is_complex:
        return dtype if dtype.itemsize > 4 else torch.complex64
    if dtype.is_floating_point:
        return dtype if dtype.itemsize >= 4 else torch.float32
    return torch.int64
