"""From a data set to a module: ragged batches in ``torch.utils.data``, and as inputs of wrapped modules."""

from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate
from torch.utils.hooks import RemovableHandle

from saccade.argument_checks import InvalidArgumentError
from saccade.operator.torch_internals import map_of_arguments, register_collation
from saccade.ragged.batch import RaggedBatch
from saccade.ragged.building import combine_data


def collate(samples: Sequence[Any], ragged: Collection[str | int] = ()) -> Any:
    """Put samples of a data set together, for ``torch.utils.data.DataLoader(..., collate_fn=...)``.

    As PyTorch's ``default_collate``, which gives each tensor a new first dimension; so it does with ragged batches,
    which may differ in width (``default_collate`` itself does the same with them as soon as Saccade is imported). And
    fields of the samples that are tensors of different lengths become ragged batches.

    Args:
        samples: Samples of equal structure.
        ragged: The fields, keys of mappings or names or positions in tuples, in which each sample has a tensor
            (n, *D), or what ``torch.as_tensor`` makes one of. They become batches over (len(samples), N, *D), as
            ``combine_data`` makes them.

    Raises:
        InvalidArgumentError: (an ``AssertionError`` and ``ValueError``) a field is not there, or ragged batches
            disagree in batch or data dimensions, in dtype or device.

    Example:
        >>> import functools, torch
        >>> from saccade.ragged import collate
        >>> data_set = [
        ...     {"image": torch.zeros(3, 4, 4), "labels": torch.tensor([7])},
        ...     {"image": torch.ones(3, 4, 4), "labels": torch.tensor([8, 9])},
        ... ]
        >>> put_together = functools.partial(collate, ragged=["labels"])
        >>> (batch,) = torch.utils.data.DataLoader(data_set, batch_size=2, collate_fn=put_together)
        >>> batch["image"].shape, batch["labels"].tensor
        (torch.Size([2, 3, 4, 4]), tensor([[7, 0],
                [8, 9]]))
    """
    if not ragged:
        return default_collate(list(samples))
    first = samples[0]
    if isinstance(first, Mapping):
        names = list(first)
    elif isinstance(first, tuple):
        names = list(getattr(first, "_fields", range(len(first))))
    else:
        raise InvalidArgumentError(f"ragged: expected none with samples of type {type(first).__name__}, got {ragged}")
    if unknown := [name for name in ragged if name not in names]:
        raise InvalidArgumentError(f"ragged: expected fields of the samples, which are {names}, got {unknown}")

    def together(name: Any, values: list[Any]) -> Any:
        if name in ragged:
            return combine_data([torch.as_tensor(value) for value in values])
        return default_collate(values)

    if isinstance(first, Mapping):
        return {name: together(name, [sample[name] for sample in samples]) for name in names}
    fields = [together(name, list(values)) for name, values in zip(names, zip(*samples, strict=True), strict=True)]
    return type(first)(*fields) if hasattr(first, "_fields") else fields


def move_ragged_inputs(module: nn.Module) -> RemovableHandle:
    """Let a module move the ragged batches among its inputs to its device before each call.

    ``DistributedDataParallel`` does so with tensors, in tuples, lists and dictionaries too, but passes everything else
    on as it is. Batches in pinned memory are moved without waiting.

    Args:
        module: Wrapped or not; its device is that of its first parameter or buffer.

    Returns:
        What undoes it, by ``remove()``.

    Example:
        >>> import torch
        >>> from saccade.ragged import RaggedBatch, move_ragged_inputs
        >>> class Boxes(torch.nn.Linear):
        ...     def forward(self, boxes):
        ...         return boxes.apply(super().forward)
        >>> module = Boxes(4, 2, device="meta")
        >>> handle = move_ragged_inputs(module)
        >>> module(RaggedBatch(torch.zeros(2, 3, 4), sample_sizes=torch.tensor([1, 3]))).device
        device(type='meta')
    """

    def move(module: nn.Module, args: Any, kwargs: Any) -> Any:
        first = next(chain(module.parameters(), module.buffers()), None)
        if first is None:
            return None
        device = first.device

        def moved(value: Any) -> Any:
            # A copy to the CPU that nobody waits for would be read too early.
            return value.to(device, non_blocking=device.type != "cpu") if _is_batch(value) else value

        return map_of_arguments(moved, args, kwargs, _is_batch)

    return module.register_forward_pre_hook(move, with_kwargs=True)


def _is_batch(value: Any) -> bool:
    return isinstance(value, RaggedBatch)


def _stack(samples: Sequence[RaggedBatch], *, collate_fn_map: Any = None) -> RaggedBatch:
    """One batch with a new first batch dimension, padded with 0 to the largest width."""
    first = samples[0]

    def alike(batch: RaggedBatch) -> tuple[Any, ...]:
        data_dims = batch.get_non_uniform_dimension_transposed_to(batch.num_batch_dims).shape[
            batch.num_batch_dims + 1 :
        ]
        return tuple(batch.batch_shape), batch.non_uniform_dim, tuple(data_dims), batch.dtype, batch.device

    for number, batch in enumerate(samples):
        if not _is_batch(batch) or alike(batch) != alike(first):
            got = alike(batch) if _is_batch(batch) else type(batch).__name__
            raise InvalidArgumentError(
                f"samples: expected ragged batches of equal batch shape, non-uniform dimension, data dimensions, dtype "
                f"and device, {alike(first)}, got {got} as number {number}"
            )
    dim = first.non_uniform_dim
    width = max(batch.max_sample_size for batch in samples)

    def padded(tensor: Tensor) -> Tensor:
        missing = list(tensor.shape)
        missing[dim] = width - tensor.shape[dim]
        return torch.cat([tensor, tensor.new_zeros(missing)], dim)

    sizes = [batch.sample_sizes.long().clamp(max=batch.max_sample_size) for batch in samples]
    return type(first)(
        torch.stack([padded(batch.tensor) for batch in samples]),
        sample_sizes=torch.stack(sizes),
        non_uniform_dim=dim + 1,
    )


register_collation(RaggedBatch, _stack)
