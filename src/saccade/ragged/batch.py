"""``RaggedBatch``: a padded tensor with the number of valid entries of each sample."""

import math
from typing import Any

import torch
from torch import Tensor

from saccade.argument_checks import InvalidArgumentError, require_tensor
from saccade.caching import may_be_kept


class RaggedBatch:
    """A batch whose samples have different numbers of entries, stored as one padded tensor.

    Along one dimension, the non-uniform one, sample ``b`` has ``sample_sizes[b]`` valid entries at the front; behind
    them lies padding, which may hold any value. The other dimensions are batch dimensions, which come first, and data
    dimensions. ``mask`` says the same as ``sample_sizes``; whichever is not given is computed when first asked for.

    Tensors are kept as they are, and masks and sizes are shared between instances: do not write to them. That sizes
    lie in the tensor and agree with a mask is not checked, which would wait for the device; a size that is too large
    counts as all entries.

    Letters: *B batch dimensions, N largest sample, *D data dimensions.

    Args:
        tensor: (*B, N, *D) any dtype; or with ``non_uniform_dim``, N behind some of the data dimensions.
        mask: (*B, N) bool, true for valid entries, which must come first.
        sample_sizes: (*B) integer number of valid entries of each sample. A mask or sizes, or both, must be given.
        non_uniform_dim: Where N lies among the dimensions of ``tensor``; by default behind the batch dimensions.

    Raises:
        TypeError: An argument is no tensor.
        InvalidArgumentError: (an ``AssertionError`` and ``ValueError``) neither mask nor sizes, or shapes or devices
            that disagree.

    The container of ``accvlab.batching_helpers``.

    Example:
        >>> import torch
        >>> from saccade.ragged import RaggedBatch
        >>> batch = RaggedBatch(torch.tensor([[5, 6, 0], [7, 8, 9]]), sample_sizes=torch.tensor([2, 3]))
        >>> batch.mask
        tensor([[ True,  True, False],
                [ True,  True,  True]])
        >>> batch.split()
        [tensor([5, 6]), tensor([7, 8, 9])]
    """

    def __init__(
        self,
        tensor: Tensor,  # (*B, N, *D)
        mask: Tensor | None = None,  # (*B, N)
        sample_sizes: Tensor | None = None,  # (*B)
        non_uniform_dim: int | None = None,
    ):
        require_tensor("tensor", tensor)
        if mask is not None:
            require_tensor("mask", mask)
        if sample_sizes is not None:
            require_tensor("sample_sizes", sample_sizes)
            self._num_batch_dims = sample_sizes.dim()
        elif mask is not None:
            self._num_batch_dims = mask.dim() - 1
        else:
            raise InvalidArgumentError("mask: expected a mask or sample_sizes, got neither")
        if self._num_batch_dims < 1:
            raise InvalidArgumentError("sample_sizes: expected at least one batch dimension, got none")
        if non_uniform_dim is None:
            non_uniform_dim = self._num_batch_dims
        _require_non_uniform_dim(non_uniform_dim, self._num_batch_dims, tensor)
        self._tensor = tensor
        self._mask = mask
        self._sample_sizes = sample_sizes
        self._non_uniform_dim = non_uniform_dim
        self._total_num_entries: int | None = None
        self._require_part("mask", mask, (*self.batch_shape, self.max_sample_size))
        self._require_part("sample_sizes", sample_sizes, self.batch_shape)

    def _require_part(self, name: str, part: Tensor | None, shape: tuple[int, ...]) -> None:
        if part is None:
            return
        if part.shape != shape:
            raise InvalidArgumentError(
                f"{name}: expected shape {tuple(shape)} for a tensor of shape {tuple(self.shape)}, "
                f"got {tuple(part.shape)}"
            )
        if part.device != self.device:
            raise InvalidArgumentError(f"{name}: expected device {self.device}, that of tensor, got {part.device}")

    @classmethod
    def FromOversizeTensor(
        cls,
        tensor: Tensor,
        mask: Tensor | None = None,
        sample_sizes: Tensor | None = None,
        non_uniform_dim: int | None = None,
    ) -> "RaggedBatch":
        """A batch on a view of a tensor that is wider than its largest sample, cut to that; arguments as in the class.

        Reads the largest size, and so waits for the device once.

        Example:
            >>> import torch
            >>> from saccade.ragged import RaggedBatch
            >>> RaggedBatch.FromOversizeTensor(torch.zeros(2, 10, 4), sample_sizes=torch.tensor([1, 2])).shape
            torch.Size([2, 2, 4])
        """
        whole = cls(tensor, mask, sample_sizes, non_uniform_dim)
        sizes = whole.sample_sizes
        width = min(max(int(sizes.max()), 0), whole.max_sample_size) if sizes.numel() else 0
        return cls(
            tensor.narrow(whole.non_uniform_dim, 0, width),
            None if mask is None else mask[..., :width],
            sizes,
            whole.non_uniform_dim,
        )

    @classmethod
    def FromFullTensor(cls, full_tensor: Tensor, non_uniform_dim: int = 1, num_batch_dims: int = 1) -> "RaggedBatch":
        """A batch on a tensor without padding: all samples have all entries."""
        require_tensor("full_tensor", full_tensor)
        if num_batch_dims < 1:
            raise InvalidArgumentError(f"num_batch_dims: expected at least 1, got {num_batch_dims}")
        _require_non_uniform_dim(non_uniform_dim, num_batch_dims, full_tensor)
        batch_shape, size = full_tensor.shape[:num_batch_dims], full_tensor.shape[non_uniform_dim]
        mask = torch.ones(*batch_shape, size, dtype=torch.bool, device=full_tensor.device)
        sample_sizes = torch.full(batch_shape, size, dtype=torch.int64, device=full_tensor.device)
        return cls(full_tensor, mask, sample_sizes, non_uniform_dim)

    @property
    def tensor(self) -> Tensor:
        """The padded data."""
        return self._tensor

    @property
    def mask(self) -> Tensor:
        """(*B, N) bool, true for valid entries."""
        if self._mask is not None:
            return self._mask
        position = torch.arange(self.max_sample_size, device=self.device)
        mask = position < self.sample_sizes[..., None]
        if may_be_kept(mask):
            self._mask = mask
        return mask

    @property
    def sample_sizes(self) -> Tensor:
        """(*B) number of valid entries of each sample."""
        if self._sample_sizes is not None:
            return self._sample_sizes
        sample_sizes = self.mask.count_nonzero(-1)
        if may_be_kept(sample_sizes):
            self._sample_sizes = sample_sizes
        return sample_sizes

    @property
    def non_uniform_dim(self) -> int:
        """The dimension of ``tensor`` along which samples differ in size."""
        return self._non_uniform_dim

    @property
    def num_batch_dims(self) -> int:
        """How many of the first dimensions of ``tensor`` are batch dimensions."""
        return self._num_batch_dims

    @property
    def batch_shape(self) -> torch.Size:
        """Sizes of the batch dimensions."""
        return self._tensor.shape[: self._num_batch_dims]

    @property
    def max_sample_size(self) -> int:
        """N, the width of ``tensor`` along the non-uniform dimension."""
        return self._tensor.shape[self._non_uniform_dim]

    @property
    def total_num_samples_in_batch(self) -> int:
        """The number of samples."""
        return math.prod(self.batch_shape)

    @property
    def total_num_entries(self) -> int:
        """Sum of all sample sizes; the first call waits for the device."""
        if self._total_num_entries is None:
            self._total_num_entries = int(self.sample_sizes.sum())
        return self._total_num_entries

    @property
    def device(self) -> torch.device:
        """That of ``tensor``."""
        return self._tensor.device

    @property
    def shape(self) -> torch.Size:
        """That of ``tensor``."""
        return self._tensor.shape

    @property
    def dtype(self) -> torch.dtype:
        """That of ``tensor``."""
        return self._tensor.dtype

    def dim(self) -> int:
        """``tensor.dim()``."""
        return self._tensor.dim()

    def size(self, *args: Any, **kwargs: Any) -> Any:
        """``tensor.size(...)``."""
        return self._tensor.size(*args, **kwargs)

    def __getitem__(self, item: Any) -> Tensor:
        return self._tensor[item]

    def __repr__(self) -> str:
        def shown(part: Tensor | None) -> str:
            return "<uninitialized>" if part is None else repr(part)

        return (
            f"{type(self).__name__}(tensor={self._tensor!r}, mask={shown(self._mask)}, "
            f"sample_sizes={shown(self._sample_sizes)}, non_uniform_dim={self._non_uniform_dim}, "
            f"batch_shape={tuple(self.batch_shape)})"
        )

    def create_with_sample_sizes_like_self(
        self, tensor: Tensor, non_uniform_dim: int | None = None, device: torch.device | str | int | None = None
    ) -> "RaggedBatch":
        """A batch of other data with the same sample sizes; mask and sizes are shared where they need not move.

        Args:
            tensor: The data, of equal batch shape and width; dtype and data dimensions are free.
            non_uniform_dim: That of ``tensor``, negative from the end; by default that of this batch.
            device: Where the new batch lies; by default where ``tensor`` does.
        """
        require_tensor("tensor", tensor)
        if non_uniform_dim is None:
            non_uniform_dim = self._non_uniform_dim
        elif non_uniform_dim < 0:
            non_uniform_dim += tensor.dim()
        if device is not None:
            tensor = tensor.to(device)
        created = type(self)(tensor, self.mask.to(tensor.device), self.sample_sizes.to(tensor.device), non_uniform_dim)
        created._total_num_entries = self._total_num_entries
        return created

    def to(self, *args: Any, **kwargs: Any) -> "RaggedBatch":
        """``tensor.to(...)`` with the same sample sizes; mask and sizes follow to a device and keep their dtype."""
        return self.create_with_sample_sizes_like_self(self._tensor.to(*args, **kwargs))

    def split(self) -> list[Any]:
        """The valid part of each sample, as a view: a list, or with several batch dimensions nested lists.

        Reads the sizes, and so waits for the device once.
        """

        def parts(tensor: Tensor, sizes: Any) -> Any:
            if isinstance(sizes, list):
                return [parts(*sample) for sample in zip(tensor.unbind(), sizes, strict=True)]
            size = min(max(sizes, 0), self.max_sample_size)
            return tensor.narrow(self._non_uniform_dim - self._num_batch_dims, 0, size)

        return parts(self._tensor, self.sample_sizes.tolist())


def _require_non_uniform_dim(non_uniform_dim: int, num_batch_dims: int, tensor: Tensor) -> None:
    if not num_batch_dims <= non_uniform_dim < tensor.dim():
        raise InvalidArgumentError(
            f"non_uniform_dim: expected one of the dimensions of tensor behind its {num_batch_dims} batch dimensions, "
            f"got {non_uniform_dim} for shape {tuple(tensor.shape)}"
        )
