"""``RaggedBatch``: a padded tensor with the number of valid entries of each sample."""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from saccade.argument_checks import InvalidArgumentError, InvalidStateError, require_tensor
from saccade.operator.torch_internals import register_tree_node
from saccade.ordinary_tensors import may_be_kept
from saccade.ragged.rows import beside_entries, fill, fill_in_place


@dataclass(init=False, repr=False, eq=False)
class _Parts:
    """What a batch is made of, by which those parts of PyTorch that know data classes find its tensors.

    DistributedDataParallel looks for unused parameters through them, and the mixed precision of it and of FSDP casts
    them.
    """

    tensor: Tensor
    mask: Tensor | None
    sample_sizes: Tensor | None
    non_uniform_dim: int


class _Extent:
    """Which entries are valid, in one object for all batches where these are the same.

    What is not known yet is computed when first asked for, by any of them and for all.
    """

    def __init__(self, mask: Tensor | None, sample_sizes: Tensor | None):
        self.mask = mask
        self.sample_sizes = sample_sizes
        self.total_num_entries: int | None = None


class RaggedBatch(_Parts):
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

    ``torch.compile`` and ``torch.export`` take batches as inputs and outputs: they are nodes of PyTorch's trees, with
    the leaves ``tensor``, ``mask`` and ``sample_sizes``.

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
            num_batch_dims = sample_sizes.dim()
        elif mask is not None:
            num_batch_dims = mask.dim() - 1
        else:
            raise InvalidArgumentError("mask: expected a mask or sample_sizes, got neither")
        if num_batch_dims < 1:
            raise InvalidArgumentError("sample_sizes: expected at least one batch dimension, got none")
        if non_uniform_dim is None:
            non_uniform_dim = num_batch_dims
        _require_non_uniform_dim(non_uniform_dim, num_batch_dims, tensor)
        self._tensor = tensor
        self._num_batch_dims = num_batch_dims
        self._non_uniform_dim = non_uniform_dim
        self._extent = _Extent(mask, sample_sizes)
        shape = tensor.shape
        batch_shape = shape[:num_batch_dims]
        if mask is not None:
            self._require_part("mask", mask, (*batch_shape, shape[non_uniform_dim]))
        if sample_sizes is not None:
            self._require_part("sample_sizes", sample_sizes, batch_shape)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _register_as_tree_node(cls)

    def _require_part(self, name: str, part: Tensor, shape: tuple[int, ...]) -> None:
        if part.shape != shape:
            raise InvalidArgumentError(
                f"{name}: expected shape {tuple(shape)} for a tensor of shape {tuple(self.shape)}, "
                f"got {tuple(part.shape)}"
            )
        if part.device != self._tensor.device:
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
        sizes_to_read = sizes.long()  # PyTorch has no maximum of unsigned integers
        width = min(max(int(sizes_to_read.max()), 0), whole.max_sample_size) if sizes.numel() else 0
        return cls(
            tensor.narrow(whole.non_uniform_dim, 0, width),
            None if mask is None else mask[..., :width],
            sizes,
            whole.non_uniform_dim,
        )

    @classmethod
    def FromFullTensor(cls, full_tensor: Tensor, non_uniform_dim: int = 1, num_batch_dims: int = 1) -> "RaggedBatch":
        """A batch on a tensor without padding: all samples have all entries.

        Example:
            >>> import torch
            >>> from saccade.ragged import RaggedBatch
            >>> RaggedBatch.FromFullTensor(torch.zeros(2, 3, 4)).sample_sizes
            tensor([3, 3])
        """
        require_tensor("full_tensor", full_tensor)
        if num_batch_dims < 1:
            raise InvalidArgumentError(f"num_batch_dims: expected at least 1, got {num_batch_dims}")
        _require_non_uniform_dim(non_uniform_dim, num_batch_dims, full_tensor)
        batch_shape, size = full_tensor.shape[:num_batch_dims], full_tensor.shape[non_uniform_dim]
        mask = torch.ones(*batch_shape, size, dtype=torch.bool, device=full_tensor.device)
        sample_sizes = torch.full(batch_shape, size, dtype=torch.int64, device=full_tensor.device)
        return cls(full_tensor, mask, sample_sizes, non_uniform_dim)

    @classmethod
    def Empty(
        cls,
        num_dims: int,
        non_uniform_dim: int,
        device: torch.device | str | int | None,
        num_batch_dims: int | None = None,
        batch_shape: int | Sequence[int] | None = None,
    ) -> "RaggedBatch":
        """A float32 batch without entries, in which all dimensions behind the batch dimensions have size 0.

        Args:
            num_dims: The number of dimensions of the tensor.
            non_uniform_dim: Where N lies among them.
            device: Where the batch lies.
            num_batch_dims: The number of batch dimensions, of size 0; by default one.
            batch_shape: The sizes of the batch dimensions instead.

        Example:
            >>> from saccade.ragged import RaggedBatch
            >>> batch = RaggedBatch.Empty(3, 1, "cpu", batch_shape=2)
            >>> batch.shape, batch.sample_sizes
            (torch.Size([2, 0, 0]), tensor([0, 0]))
        """
        if num_batch_dims is not None and batch_shape is not None:
            raise InvalidArgumentError("num_batch_dims: expected None with batch_shape, which says it, got both")
        if batch_shape is None:
            batch_shape = (0,) * (1 if num_batch_dims is None else num_batch_dims)
        shape = _as_shape(batch_shape)
        if not 1 <= len(shape) < num_dims:
            raise InvalidArgumentError(
                f"num_dims: expected more than the {len(shape)} batch dimensions, of which there must be one, "
                f"got {num_dims}"
            )
        tensor = torch.zeros(*shape, *[0] * (num_dims - len(shape)), dtype=torch.float32, device=device)
        return cls.FromFullTensor(tensor, non_uniform_dim, len(shape))

    @property
    def tensor(self) -> Tensor:
        """The padded data."""
        return self._tensor

    @property
    def mask(self) -> Tensor:
        """(*B, N) bool, true for valid entries."""
        mask = self._extent.mask
        if mask is None:
            position = torch.arange(self.max_sample_size, device=self.device)
            mask = position < self.sample_sizes.long()[..., None]
            if may_be_kept(mask):
                self._extent.mask = mask
        return mask

    @property
    def sample_sizes(self) -> Tensor:
        """(*B) number of valid entries of each sample."""
        sample_sizes = self._extent.sample_sizes
        if sample_sizes is None:
            sample_sizes = self.mask.count_nonzero(-1)
            if may_be_kept(sample_sizes):
                self._extent.sample_sizes = sample_sizes
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
        if self._extent.total_num_entries is None:
            self._extent.total_num_entries = int(self.sample_sizes.long().sum())
        return self._extent.total_num_entries

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

    @property
    def requires_grad(self) -> bool:
        """That of ``tensor``; can be set."""
        return self._tensor.requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self._tensor.requires_grad = value

    @property
    def retains_grad(self) -> bool:
        """That of ``tensor``."""
        return self._tensor.retains_grad

    def retain_grad(self) -> None:
        """``tensor.retain_grad()``."""
        self._tensor.retain_grad()

    def dim(self) -> int:
        """``tensor.dim()``."""
        return self._tensor.dim()

    def size(self, *args: Any, **kwargs: Any) -> Any:
        """``tensor.size(...)``."""
        return self._tensor.size(*args, **kwargs)

    def __getitem__(self, item: Any) -> Tensor:
        return self._tensor[item]

    def __setitem__(self, item: Any, value: Any) -> None:
        self._tensor[item] = value

    def __repr__(self) -> str:
        def shown(name: str, value: Any) -> str:
            text = "<uninitialized>" if value is None else repr(value)
            return f"  {name}={text}".replace("\n", "\n" + " " * (len(name) + 3))

        parts = {
            "tensor": self._tensor,
            "mask": self._extent.mask,
            "sample_sizes": self._extent.sample_sizes,
            "non_uniform_dim": self._non_uniform_dim,
            "batch_shape": tuple(self.batch_shape),
        }
        return "\n".join([f"{type(self).__name__}(", *(shown(*part) + "," for part in parts.items()), ")"])

    def create_with_sample_sizes_like_self(
        self, tensor: Tensor, non_uniform_dim: int | None = None, device: torch.device | str | int | None = None
    ) -> "RaggedBatch":
        """A batch of other data with the same sample sizes; mask and sizes are shared where they need not move.

        Args:
            tensor: The data, of equal batch shape and width; dtype and data dimensions are free.
            non_uniform_dim: That of ``tensor``, negative from the end; by default that of this batch.
            device: Where the new batch lies; by default where ``tensor`` does.

        Example:
            >>> import torch
            >>> from saccade.ragged import RaggedBatch
            >>> batch = RaggedBatch(torch.tensor([[5, 6, 0], [7, 8, 9]]), sample_sizes=torch.tensor([2, 3]))
            >>> scores = batch.create_with_sample_sizes_like_self(torch.rand(2, 3, 1))
            >>> scores.mask is batch.mask
            True
        """
        require_tensor("tensor", tensor)
        if non_uniform_dim is None:
            non_uniform_dim = self._non_uniform_dim
        elif non_uniform_dim < 0:
            non_uniform_dim += tensor.dim()
        if device is not None:
            tensor = tensor.to(device)
        if tensor.device == self._tensor.device:
            return self._with_tensor(tensor, non_uniform_dim)
        created = type(self)(tensor, self.mask.to(tensor.device), self.sample_sizes.to(tensor.device), non_uniform_dim)
        self._hand_total_to(created)
        return created

    def _with_tensor(self, tensor: Tensor, non_uniform_dim: int) -> "RaggedBatch":
        """A batch of other data on the same device, whose mask and sizes are these, computed or not."""
        if type(self) is not RaggedBatch or not self._fits(tensor, non_uniform_dim):
            return type(self)(tensor, self.mask, self.sample_sizes, non_uniform_dim)  # which says what does not fit
        created = object.__new__(RaggedBatch)
        created._tensor, created._non_uniform_dim = tensor, non_uniform_dim
        created._num_batch_dims, created._extent = self._num_batch_dims, self._extent
        return created

    def _fits(self, tensor: Tensor, non_uniform_dim: int) -> bool:
        batch_dims, own, shape = self._num_batch_dims, self._tensor.shape, tensor.shape
        return (
            batch_dims <= non_uniform_dim < len(shape)
            and shape[non_uniform_dim] == own[self._non_uniform_dim]
            and shape[:batch_dims] == own[:batch_dims]
            and tensor.device == self._tensor.device
        )

    def _hand_total_to(self, moved: "RaggedBatch") -> None:
        if not torch.compiler.is_compiling():  # else the number becomes a constant of the compiled code
            moved._extent.total_num_entries = self._extent.total_num_entries

    def as_self_with_cloned_data(self) -> "RaggedBatch":
        """A batch on a copy of ``tensor``, through which gradients flow; mask and sizes are shared.

        Example:
            >>> import torch
            >>> from saccade.ragged import RaggedBatch
            >>> batch = RaggedBatch(torch.tensor([[5, 6, 0], [7, 8, 9]]), sample_sizes=torch.tensor([2, 3]))
            >>> batch.as_self_with_cloned_data().tensor is batch.tensor
            False
        """
        return self.create_with_sample_sizes_like_self(self._tensor.clone())

    def get_non_uniform_dimension_transposed_to(self, dim: int) -> "RaggedBatch":
        """The batch itself if its non-uniform dimension is ``dim``, else one on a view with those two exchanged.

        Args:
            dim: One of the dimensions behind the batch dimensions, counted from the front.

        Raises:
            InvalidArgumentError: (an ``AssertionError`` and ``ValueError``) any other dimension.

        Example:
            >>> import torch
            >>> from saccade.ragged import RaggedBatch
            >>> batch = RaggedBatch(torch.zeros(2, 3, 4), sample_sizes=torch.tensor([1, 3]))
            >>> transposed = batch.get_non_uniform_dimension_transposed_to(2)
            >>> transposed.shape, transposed.non_uniform_dim
            (torch.Size([2, 4, 3]), 2)
        """
        _require_non_uniform_dim(dim, self._num_batch_dims, self._tensor, "dim")
        if dim == self._non_uniform_dim:
            return self
        return self.create_with_sample_sizes_like_self(self._tensor.transpose(self._non_uniform_dim, dim), dim)

    def unsqueeze_data_dim(self, dim: int) -> "RaggedBatch":
        """A batch on a view with another dimension of size 1.

        Args:
            dim: Where it lies in the result, behind the batch dimensions; negative from the end, -1 being the last.

        Raises:
            InvalidArgumentError: (an ``AssertionError`` and ``ValueError``) it would lie among the batch dimensions.
            IndexError: It would lie behind all dimensions.

        Example:
            >>> import torch
            >>> from saccade.ragged import RaggedBatch
            >>> batch = RaggedBatch(torch.zeros(2, 3), sample_sizes=torch.tensor([1, 3]))
            >>> batch.unsqueeze_data_dim(-1).shape, batch.unsqueeze_data_dim(1).non_uniform_dim
            (torch.Size([2, 3, 1]), 2)
        """
        place = dim + self.dim() + 1 if dim < 0 else dim
        if place < self._num_batch_dims:
            raise InvalidArgumentError(
                f"dim: expected one behind the {self._num_batch_dims} batch dimensions, got {dim} for shape "
                f"{tuple(self.shape)}"
            )
        non_uniform_dim = self._non_uniform_dim + (place <= self._non_uniform_dim)
        return self.create_with_sample_sizes_like_self(self._tensor.unsqueeze(place), non_uniform_dim)

    def apply(self, proc_step: Callable[..., Any]) -> Any:
        """What a function makes of the data, with the mask and sizes of this batch.

        Args:
            proc_step: Called with ``tensor``, ``tensor, mask`` or ``tensor, mask, sample_sizes``, as many as it has
                positional parameters. Those of a plain function count even if they have a default; those of methods,
                modules and other callable objects count if they have none. What has no signature, as many functions of
                PyTorch, gets the tensor. It returns a tensor or a tuple of tensors, each with the batch dimensions and
                the width of this batch. For ``torch.compile`` of PyTorch 2.9 it must be made outside of what is
                compiled; later versions also take one that is made there.

        Returns:
            A batch, or a tuple of batches.

        Raises:
            ValueError: ``proc_step`` takes no parameters, or more than three.
            InvalidArgumentError: (an ``AssertionError`` and ``ValueError``) a result has another shape.

        Example:
            >>> import torch
            >>> from saccade.ragged import RaggedBatch
            >>> batch = RaggedBatch(torch.tensor([[1, 2], [3, 4]]), sample_sizes=torch.tensor([1, 2]))
            >>> batch.apply(lambda tensor, mask: torch.where(mask, tensor * 10, 0)).tensor
            tensor([[10,  0],
                    [30, 40]])
        """
        count = _num_parameters(proc_step)
        if not 1 <= count <= 3:
            raise ValueError(f"proc_step: expected a function of 1 to 3 positional parameters, got one of {count}")
        result = proc_step(*[getattr(self, name) for name in ("tensor", "mask", "sample_sizes")[:count]])
        if isinstance(result, tuple):
            return tuple(self._with_result(tensor) for tensor in result)
        return self._with_result(result)

    def _with_result(self, tensor: Tensor) -> "RaggedBatch":
        require_tensor("tensor", tensor)
        return self._with_tensor(tensor, self._non_uniform_dim)

    def set_tensor(self, tensor: Tensor) -> None:
        """Replace the data of this batch by others of the same batch dimensions, width and device.

        Raises:
            InvalidArgumentError: (an ``AssertionError`` and ``ValueError``) any of these differs.

        Example:
            >>> import torch
            >>> from saccade.ragged import RaggedBatch
            >>> batch = RaggedBatch(torch.tensor([[5, 6, 0], [7, 8, 9]]), sample_sizes=torch.tensor([2, 3]))
            >>> batch.set_tensor(torch.zeros(2, 3, 7))
            >>> batch.shape
            torch.Size([2, 3, 7])
        """
        require_tensor("tensor", tensor)
        _require_non_uniform_dim(self._non_uniform_dim, self._num_batch_dims, tensor)
        shape = (*tensor.shape[: self._num_batch_dims], tensor.shape[self._non_uniform_dim])
        expected = (*self.batch_shape, self.max_sample_size)
        if shape != expected or tensor.device != self.device:
            raise InvalidArgumentError(
                f"tensor: expected batch dimensions and width {expected} on {self.device}, got {shape} on "
                f"{tensor.device}"
            )
        self._tensor = tensor

    def get_existence_weights(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """A new tensor of the shape of ``tensor``, 1 for valid entries and 0 for padding.

        Example:
            >>> import torch
            >>> from saccade.ragged import RaggedBatch
            >>> batch = RaggedBatch(torch.zeros(2, 2, 1), sample_sizes=torch.tensor([1, 2]))
            >>> batch.get_existence_weights().squeeze(2)
            tensor([[1., 0.],
                    [1., 1.]])
        """
        mask = beside_entries(self.mask.bool(), self._non_uniform_dim, self.dim()).expand(self.shape)
        return mask.to(dtype, copy=True, memory_format=torch.contiguous_format)

    def with_padded_set_to(self, value_to_set: float) -> "RaggedBatch":
        """A batch on a copy of the data whose padding is set to a value; mask and sizes are shared.

        Args:
            value_to_set: int, float or bool, converted as PyTorch converts a scalar: towards zero for integers.

        Example:
            >>> import torch
            >>> from saccade.ragged import RaggedBatch
            >>> batch = RaggedBatch(torch.tensor([[1, 2, 3], [4, 5, 6]]), sample_sizes=torch.tensor([1, 3]))
            >>> batch.with_padded_set_to(-7).tensor
            tensor([[ 1, -7, -7],
                    [ 4,  5,  6]])
        """
        return self.create_with_sample_sizes_like_self(fill(self._tensor, self._padding(), value_to_set))

    def set_padded_to(self, value_to_set: float) -> None:
        """Set the padding of this batch to a value; nothing of the padding gets a gradient from then on.

        The tensor is written to, and whatever shares its memory sees it. Where autograd records what happens to the
        tensor, or entries of it share memory, ``tensor`` becomes another one instead.

        Args:
            value_to_set: As in ``with_padded_set_to``.

        Example:
            >>> import torch
            >>> from saccade.ragged import RaggedBatch
            >>> batch = RaggedBatch(torch.tensor([[1, 2, 3], [4, 5, 6]]), sample_sizes=torch.tensor([1, 3]))
            >>> batch.set_padded_to(-7)
            >>> batch.tensor
            tensor([[ 1, -7, -7],
                    [ 4,  5,  6]])
        """
        tensor = self._tensor
        if (tensor.requires_grad and torch.is_grad_enabled()) or _overlaps_itself(tensor):
            self._tensor = fill(tensor, self._padding(), value_to_set)
        else:
            fill_in_place(tensor, self._padding(), value_to_set)

    def _padding(self) -> Tensor:
        """True for padding, as a view that broadcasts with ``tensor``."""
        return beside_entries(~self.mask.bool(), self._non_uniform_dim, self.dim())

    def split(self) -> list[Any]:
        """The valid part of each sample, as a view: a list, or with several batch dimensions nested lists.

        Reads the sizes, and so waits for the device once.

        Example:
            >>> import torch
            >>> from saccade.ragged import RaggedBatch
            >>> batch = RaggedBatch(torch.tensor([[5, 6, 0], [7, 8, 9]]), sample_sizes=torch.tensor([2, 3]))
            >>> batch.split()
            [tensor([5, 6]), tensor([7, 8, 9])]
        """

        def parts(tensor: Tensor, sizes: Any) -> Any:
            if isinstance(sizes, list):
                return [parts(*sample) for sample in zip(tensor.unbind(), sizes, strict=True)]
            size = min(max(sizes, 0), self.max_sample_size)
            return tensor.narrow(self._non_uniform_dim - self._num_batch_dims, 0, size)

        return parts(self._tensor, self.sample_sizes.tolist())

    def _with_batch_dims(self, num_batch_dims: int, change: Callable[[Tensor], Tensor]) -> "RaggedBatch":
        """A batch with tensor, mask and sizes changed alike in their batch dimensions; what is not there stays so."""
        mask, sample_sizes = self._extent.mask, self._extent.sample_sizes
        return type(self)(
            change(self._tensor),
            None if mask is None else change(mask),
            None if sample_sizes is None else change(sample_sizes),
            self._non_uniform_dim - self._num_batch_dims + num_batch_dims,
        )

    def repeat_samples(self, num_repeats: int | Tensor | Sequence[int], batch_dim: int | None = None) -> "RaggedBatch":
        """A batch of copies of all samples, one batch behind the other as in ``Tensor.repeat``.

        Args:
            num_repeats: How often, along one batch dimension, or a sequence with a number for each of them.
            batch_dim: The batch dimension, with one number; by default 0.

        Raises:
            InvalidArgumentError: (an ``AssertionError`` and ``ValueError``) a sequence of another length or beside
                ``batch_dim``, or no batch dimension.

        Example:
            >>> import torch
            >>> from saccade.ragged import RaggedBatch
            >>> batch = RaggedBatch(torch.tensor([[1, 2], [3, 4]]), sample_sizes=torch.tensor([1, 2]))
            >>> batch.repeat_samples(2).sample_sizes
            tensor([1, 2, 1, 2])
        """
        if isinstance(num_repeats, Sequence):
            if batch_dim is not None:
                raise InvalidArgumentError("batch_dim: expected None with a sequence of num_repeats, got both")
            if len(num_repeats) != self._num_batch_dims:
                raise InvalidArgumentError(
                    f"num_repeats: expected a number for each of the {self._num_batch_dims} batch dimensions, got "
                    f"{len(num_repeats)}"
                )
            factors = [int(number) for number in num_repeats]
        else:
            batch_dim = 0 if batch_dim is None else batch_dim
            self._require_batch_dim("batch_dim", batch_dim, self._num_batch_dims)
            factors = [1] * self._num_batch_dims
            factors[batch_dim] = int(num_repeats)
        return self._tiled(factors)

    def _tiled(self, factors: list[int]) -> "RaggedBatch":
        return self._with_batch_dims(
            self._num_batch_dims, lambda part: part.repeat(*factors, *[1] * (part.dim() - len(factors)))
        )

    def unsqueeze_batch_dim(self, dim: int) -> "RaggedBatch":
        """A batch on views with another batch dimension of size 1 at ``dim``, from 0 to the number of them.

        Raises:
            InvalidArgumentError: (an ``AssertionError`` and ``ValueError``) ``dim`` is none of these.

        Example:
            >>> import torch
            >>> from saccade.ragged import RaggedBatch
            >>> batch = RaggedBatch(torch.tensor([[5, 6, 0], [7, 8, 9]]), sample_sizes=torch.tensor([2, 3]))
            >>> batch.unsqueeze_batch_dim(0).sample_sizes
            tensor([[2, 3]])
        """
        self._require_batch_dim("dim", dim, self._num_batch_dims + 1)
        return self._with_batch_dims(self._num_batch_dims + 1, lambda part: part.unsqueeze(dim))

    def squeeze_batch_dim(self, batch_dim: int) -> "RaggedBatch":
        """A batch on views without a batch dimension of size 1; another must remain.

        Raises:
            InvalidArgumentError: (an ``AssertionError`` and ``ValueError``) no batch dimension, or the only one.
            ValueError: Its size is not 1.

        Example:
            >>> import torch
            >>> from saccade.ragged import RaggedBatch
            >>> batch = RaggedBatch(torch.zeros(2, 1, 3), sample_sizes=torch.tensor([[2], [3]]))
            >>> batch.squeeze_batch_dim(1).sample_sizes
            tensor([2, 3])
        """
        self._require_batch_dim("batch_dim", batch_dim, self._num_batch_dims)
        if self._num_batch_dims == 1:
            raise InvalidArgumentError("batch_dim: expected another batch dimension to remain, got the only one")
        if self.shape[batch_dim] != 1:
            raise ValueError(f"batch_dim: expected a dimension of size 1, got {batch_dim} for {tuple(self.shape)}")
        return self._with_batch_dims(self._num_batch_dims - 1, lambda part: part.squeeze(batch_dim))

    def reshape_batch_dims(self, new_batch_shape: int | Sequence[int]) -> "RaggedBatch":
        """A batch with the same samples in batch dimensions of other sizes; on views where that is possible.

        Args:
            new_batch_shape: The sizes, one of which may be -1.

        Raises:
            InvalidStateError: (a ``RuntimeError`` and ``ValueError``) the number of samples would change.

        Example:
            >>> import torch
            >>> from saccade.ragged import RaggedBatch
            >>> batch = RaggedBatch(torch.zeros(6, 3), sample_sizes=torch.tensor([1, 2, 3, 3, 2, 1]))
            >>> batch.reshape_batch_dims((2, -1)).sample_sizes
            tensor([[1, 2, 3],
                    [3, 2, 1]])
        """
        shape = list(_as_shape(new_batch_shape))
        count = self.total_num_samples_in_batch
        if shape.count(-1) == 1:
            known = math.prod([size for size in shape if size != -1])
            if known > 0:
                shape[shape.index(-1)] = count // known
        if math.prod(shape) != count or any(size < 0 for size in shape):
            raise InvalidStateError(
                f"new_batch_shape: expected a shape of {count} samples, those of {tuple(self.batch_shape)}, got "
                f"{new_batch_shape}"
            )
        old = self._num_batch_dims
        return self._with_batch_dims(len(shape), lambda part: part.reshape((*shape, *part.shape[old:])))

    def flatten_batch_dims(self) -> "RaggedBatch":
        """A batch of the same samples in one batch dimension; on views where that is possible.

        Example:
            >>> import torch
            >>> from saccade.ragged import RaggedBatch
            >>> batch = RaggedBatch(torch.zeros(2, 1, 3), sample_sizes=torch.tensor([[2], [3]]))
            >>> batch.flatten_batch_dims().sample_sizes
            tensor([2, 3])
        """
        return self.reshape_batch_dims(self.total_num_samples_in_batch)

    def broadcast_batch_dims_to_shape(self, new_batch_shape: Sequence[int]) -> "RaggedBatch":
        """A batch of copies, repeated until the batch dimensions have other sizes.

        Args:
            new_batch_shape: Sizes that are multiples of the present ones, which need not be 1.

        Raises:
            InvalidArgumentError: (an ``AssertionError`` and ``ValueError``) another number of sizes, or no multiples.

        Example:
            >>> import torch
            >>> from saccade.ragged import RaggedBatch
            >>> batch = RaggedBatch(torch.zeros(2, 3), sample_sizes=torch.tensor([2, 3]))
            >>> batch.broadcast_batch_dims_to_shape((4,)).sample_sizes
            tensor([2, 3, 2, 3])
        """
        shape = _as_shape(new_batch_shape)
        pairs = list(zip(self.batch_shape, shape, strict=False))
        # Python's own remainder fails for 0, of which only 0 is a multiple here; and no size can become 0.
        if len(shape) != self._num_batch_dims or not all(
            new == old or (old and new >= old and new % old == 0) for old, new in pairs
        ):
            raise InvalidArgumentError(
                f"new_batch_shape: expected multiples of the sizes {tuple(self.batch_shape)}, got {shape}"
            )
        return self._tiled([new // old if old else 1 for old, new in pairs])

    @staticmethod
    def broadcast_batch_dims(data: "Sequence[RaggedBatch]") -> "list[RaggedBatch]":
        """Batches repeated until the batch dimensions of all have the size of the largest.

        Raises:
            InvalidArgumentError: (an ``AssertionError`` and ``ValueError``) no batch at all, different numbers of batch
                dimensions, or a size that does not divide the largest.

        Example:
            >>> import torch
            >>> from saccade.ragged import RaggedBatch
            >>> row, column = RaggedBatch.FromFullTensor(torch.zeros(1, 4, 2), 2, 2), RaggedBatch.FromFullTensor(
            ...     torch.zeros(3, 2, 5), 2, 2
            ... )
            >>> [batch.shape for batch in RaggedBatch.broadcast_batch_dims([row, column])]
            [torch.Size([3, 4, 2]), torch.Size([3, 4, 5])]
        """
        counts = sorted({batch.num_batch_dims for batch in data})
        if len(counts) != 1:
            raise InvalidArgumentError(f"data: expected batches of equal numbers of batch dimensions, got {counts}")
        shape = [max(sizes) for sizes in zip(*(batch.batch_shape for batch in data), strict=True)]
        return [batch.broadcast_batch_dims_to_shape(shape) for batch in data]

    def _require_batch_dim(self, name: str, dim: int, count: int) -> None:
        if not 0 <= dim < count:
            raise InvalidArgumentError(f"{name}: expected one of 0 to {count - 1}, got {dim} for {tuple(self.shape)}")

    def to(self, *args: Any, **kwargs: Any) -> "RaggedBatch":
        """``tensor.to(...)`` with the same sample sizes; mask and sizes follow to a device and keep their dtype.

        Example:
            >>> import torch
            >>> from saccade.ragged import RaggedBatch
            >>> batch = RaggedBatch(torch.tensor([[1, 2]]), sample_sizes=torch.tensor([1]))
            >>> batch.to(torch.float16).dtype
            torch.float16
        """
        tensor = self._tensor.to(*args, **kwargs)
        if tensor.device == self.device:
            return self.create_with_sample_sizes_like_self(tensor)
        return self._moved(tensor, lambda part: part.to(tensor.device, non_blocking=kwargs.get("non_blocking", False)))

    def to_device(self, device: torch.device | str | int) -> "RaggedBatch":
        """A batch on a device; what lies there is shared, and what is not computed yet will be computed there.

        Example:
            >>> import torch
            >>> from saccade.ragged import RaggedBatch
            >>> batch = RaggedBatch(torch.tensor([[5, 6, 0], [7, 8, 9]]), sample_sizes=torch.tensor([2, 3]))
            >>> batch.to_device("cpu").tensor is batch.tensor
            True
        """
        return self._moved(self._tensor.to(device), lambda part: part.to(device))

    def cpu(self) -> "RaggedBatch":
        """``to_device("cpu")``."""
        return self.to_device("cpu")

    def pin_memory(self) -> "RaggedBatch":
        """A batch in page-locked memory, from which ``to(device, non_blocking=True)`` need not wait; needs a GPU.

        ``torch.utils.data.DataLoader`` calls it where it is asked to pin memory.
        """
        return self._moved(self._tensor.pin_memory(), lambda part: part.pin_memory())

    def _moved(self, tensor: Tensor, move: Callable[[Tensor], Tensor]) -> "RaggedBatch":
        mask, sample_sizes = self._extent.mask, self._extent.sample_sizes
        moved = type(self)(
            tensor,
            None if mask is None else move(mask),
            None if sample_sizes is None else move(sample_sizes),
            self._non_uniform_dim,
        )
        self._hand_total_to(moved)
        return moved

    def detach(self) -> "RaggedBatch":
        """A batch on the detached tensor, which shares its memory.

        Example:
            >>> import torch
            >>> from saccade.ragged import RaggedBatch
            >>> batch = RaggedBatch(torch.zeros(2, 3, requires_grad=True), sample_sizes=torch.tensor([2, 3]))
            >>> batch.detach().requires_grad
            False
        """
        return self.create_with_sample_sizes_like_self(self._tensor.detach())

    def to_dtype(self, dtype: torch.dtype) -> "RaggedBatch":
        """A batch of the data in another dtype; mask and sizes are shared.

        Example:
            >>> import torch
            >>> from saccade.ragged import RaggedBatch
            >>> batch = RaggedBatch(torch.tensor([[5, 6, 0], [7, 8, 9]]), sample_sizes=torch.tensor([2, 3]))
            >>> batch.to_dtype(torch.float16).dtype
            torch.float16
        """
        return self.create_with_sample_sizes_like_self(self._tensor.to(dtype))

    # The last methods of the class: from here on, these names are no longer Python's own in it.

    def int(self) -> "RaggedBatch":
        """``to_dtype(torch.int32)``."""
        return self.to_dtype(torch.int32)

    def long(self) -> "RaggedBatch":
        """``to_dtype(torch.int64)``."""
        return self.to_dtype(torch.int64)

    def bool(self) -> "RaggedBatch":
        """``to_dtype(torch.bool)``."""
        return self.to_dtype(torch.bool)

    def half(self) -> "RaggedBatch":
        """``to_dtype(torch.float16)``."""
        return self.to_dtype(torch.float16)

    def bfloat16(self) -> "RaggedBatch":
        """``to_dtype(torch.bfloat16)``."""
        return self.to_dtype(torch.bfloat16)

    def float(self) -> "RaggedBatch":
        """``to_dtype(torch.float32)``."""
        return self.to_dtype(torch.float32)

    def double(self) -> "RaggedBatch":
        """``to_dtype(torch.float64)``."""
        return self.to_dtype(torch.float64)

    def cfloat(self) -> "RaggedBatch":
        """``to_dtype(torch.complex64)``."""
        return self.to_dtype(torch.complex64)

    def cdouble(self) -> "RaggedBatch":
        """``to_dtype(torch.complex128)``."""
        return self.to_dtype(torch.complex128)


def _num_parameters(function: Callable[..., Any]) -> int:
    """With how many positional arguments ``RaggedBatch.apply`` calls a function."""
    if isinstance(function, FunctionType):
        return function.__code__.co_argcount
    if isinstance(function, torch.nn.Module):
        function = function.forward
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of many functions that are not written in Python nothing is known
        return 1
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is inspect.Parameter.empty for p in parameters)


def _as_shape(shape: int | Sequence[int]) -> tuple[int, ...]:
    return (shape,) if isinstance(shape, int) else tuple(shape)


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether several entries may lie at one address, as after ``expand``."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False


def _register_as_tree_node(cls: type[RaggedBatch]) -> None:
    """Let PyTorch's trees look into batches.

    All batches have the same three leaves, whether or not a mask was asked for yet: what a compiled or exported program
    takes does not depend on it. A batch put together from leaves is not checked, since these may be anything.
    """

    def leaves(batch: RaggedBatch) -> dict[str, Any]:
        return {"tensor": batch._tensor, "mask": batch.mask, "sample_sizes": batch.sample_sizes}

    def rest(batch: RaggedBatch) -> tuple[int, int]:
        return batch._num_batch_dims, batch._non_uniform_dim

    def put_together(values: Any, dims: tuple[int, ...]) -> RaggedBatch:
        batch = object.__new__(cls)
        batch._tensor, mask, sample_sizes = values
        batch._num_batch_dims, batch._non_uniform_dim = dims
        batch._extent = _Extent(mask, sample_sizes)
        return batch

    register_tree_node(cls, leaves, rest, put_together)


_register_as_tree_node(RaggedBatch)
# So that torch.load, and with it torch.export.load, takes batches out of files without trusting these.
torch.serialization.add_safe_globals([RaggedBatch, _Extent])


def require_ragged(name: str, value: Any) -> None:
    """Raise ``TypeError`` unless ``value`` is a ragged batch."""
    if not isinstance(value, RaggedBatch):
        raise TypeError(f"{name}: expected a RaggedBatch, got {type(value).__name__}")


def require_data(name: str, value: Any) -> None:
    """Raise ``TypeError`` unless ``value`` is a tensor or a ragged batch."""
    if not isinstance(value, RaggedBatch):
        require_tensor(name, value)


def require_dtype_of(like_name: str, like: Tensor | RaggedBatch, name: str, value: Tensor | RaggedBatch) -> None:
    """Raise ``InvalidStateError`` unless a value has the dtype of another one."""
    if value.dtype != like.dtype:
        raise InvalidStateError(f"{name}: expected {like.dtype}, the dtype of {like_name}, got {value.dtype}")


def require_data_dims_of(like_name: str, like: Tensor, name: str, value: Tensor) -> None:
    """Raise ``InvalidStateError`` unless (S, M, *D) has the data dimensions of (S, W, *D)."""
    if value.shape[2:] != like.shape[2:]:
        raise InvalidStateError(
            f"{name}: expected the data dimensions of {like_name}, {tuple(like.shape[2:])}, got "
            f"{tuple(value.shape[2:])}"
        )


def like_given(given: Tensor | RaggedBatch, tensor: Tensor) -> Tensor | RaggedBatch:
    """Other data of the same form: a tensor, or a batch with the mask and sizes of the given one."""
    return given.create_with_sample_sizes_like_self(tensor) if isinstance(given, RaggedBatch) else tensor


def _require_non_uniform_dim(
    non_uniform_dim: int, num_batch_dims: int, tensor: Tensor, name: str = "non_uniform_dim"
) -> None:
    if not num_batch_dims <= non_uniform_dim < tensor.dim():
        raise InvalidArgumentError(
            f"{name}: expected one of the dimensions of tensor behind its {num_batch_dims} batch dimensions, "
            f"got {non_uniform_dim} for shape {tuple(tensor.shape)}"
        )
