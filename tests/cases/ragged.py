"""Cases of all that moves entries of ragged batches; the oracle moves one entry at a time."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cases import TOLERANCES, Case
from saccade.ragged import (
    RaggedBatch,
    batched_index_mapping,
    batched_indexing_access,
    batched_indexing_write,
    batched_inverse_indexing_access,
    combine_data,
    from_values,
    get_mask_from_indices,
)

# Entries are copied. Only gradients are sums, of few multiples of a quarter, which every dtype holds.
EXACT = dict.fromkeys(TOLERANCES, 0.0) | {torch.int64: 0.0, torch.bool: 0.0}


# ---- oracles


def used(index: Tensor, sizes: Tensor, width: int) -> Iterator[tuple[int, int, int]]:
    """Sample, slot and place of every index that counts."""
    for sample, (places, size) in enumerate(zip(index.flatten(0, -2).tolist(), sizes.flatten().tolist(), strict=True)):
        for slot, place in enumerate(places[: max(size, 0)]):
            assert -width <= place < width, "an index out of range"
            yield sample, slot, place % width


def as_samples(data: Tensor, sizes: Tensor, dim: int | None) -> Tensor:
    """(S, W, *D) with W from ``dim``."""
    batch_dims = sizes.dim()
    return data.transpose(batch_dims, batch_dims if dim is None else dim).flatten(0, batch_dims - 1)


def as_given(samples: Tensor, sizes: Tensor, dim: int | None) -> Tensor:
    """The reverse."""
    batch_dims = sizes.dim()
    batch = samples.reshape(*sizes.shape, *samples.shape[1:])
    return batch.transpose(batch_dims, batch_dims if dim is None else dim)


def access_oracle(data: Tensor, index: Tensor, sizes: Tensor, filler: float = 0.0, dim: int | None = None) -> Tensor:
    samples = as_samples(data, sizes, dim)
    result = torch.full((len(samples), index.shape[-1], *samples.shape[2:]), filler).to(data.dtype)
    for sample, slot, place in used(index, sizes, samples.shape[1]):
        result[sample, slot] = samples[sample, place]
    return as_given(result, sizes, dim)


def write_oracle(entries: Tensor, into: Tensor, index: Tensor, sizes: Tensor, dim: int | None = None) -> Tensor:
    samples, result = as_samples(entries, sizes, dim), as_samples(into, sizes, dim).clone()
    for sample, slot, place in used(index, sizes, result.shape[1]):  # the last one to a place stays
        result[sample, place] = samples[sample, slot]
    return as_given(result, sizes, dim)


def inverse_oracle(
    entries: Tensor, index: Tensor, sizes: Tensor, width: int, filler: float = 0.0, dim: int | None = None
) -> Tensor:
    shape = [*entries.shape]
    shape[sizes.dim() if dim is None else dim] = width
    return write_oracle(entries, torch.full(shape, filler).to(entries.dtype), index, sizes, dim)


def mapping_oracle(
    source: Tensor, target: Tensor, source_index: Tensor, index: Tensor, sizes: Tensor, dim: int | None = None
) -> Tensor:
    entries = access_oracle(source, source_index, sizes, dim=dim)
    return write_oracle(entries, target, index, sizes, dim)


def mask_oracle(index: Tensor, sizes: Tensor, width: int) -> Tensor:
    return inverse_oracle(torch.ones_like(index, dtype=torch.bool), index, sizes, width)


def padded_oracle(values: Tensor, begins: Tensor, lengths: Tensor, width: int) -> Tensor:
    """Samples of the values, each from where it begins on."""
    result = torch.zeros(*lengths.shape, width, *values.shape[1:], dtype=values.dtype)
    samples = result.view(-1, width, *values.shape[1:])
    for sample, (begin, length) in enumerate(zip(begins.tolist(), lengths.flatten().tolist(), strict=True)):
        for slot in range(min(length, width)):
            samples[sample, slot] = values[begin + slot]
    return result


def lengths_oracle(values: Tensor, lengths: Tensor, width: int) -> Tensor:
    return padded_oracle(values, lengths.flatten().cumsum(0) - lengths.flatten(), lengths, width)


def offsets_oracle(values: Tensor, offsets: Tensor, width: int) -> Tensor:
    return padded_oracle(values, offsets[:-1], offsets.diff(), width)


def list_oracle(*tensors: Tensor) -> Tensor:
    lengths = torch.tensor([len(tensor) for tensor in tensors])
    return lengths_oracle(torch.cat(tensors), lengths, int(lengths.max()))


# ---- inputs


def make_index(
    batch: tuple[int, ...], slots: int, width: int, rng: torch.Generator, dtype: torch.dtype = torch.int64
) -> tuple[Tensor, Tensor]:
    """Indices that repeat, from either end, and sizes below 0 and beyond the slots; garbage behind the sizes."""
    index = torch.randint(-width, width, (*batch, slots), generator=rng) if width else torch.zeros(*batch, slots).long()
    sizes = torch.randint(-1, slots + 2, batch, generator=rng) if width else torch.zeros(batch).long()
    sizes.view(-1)[:1] = slots if width else 0
    if slots > 2 and index.numel():
        index.view(-1, slots)[0, :3] = torch.tensor([1, -1, 1 - width])  # the first one and the last are one place
    garbage = torch.full_like(index, torch.iinfo(dtype).max)
    return index.where(torch.arange(slots) < sizes[..., None], garbage).to(dtype), sizes


def make_data(shape: tuple[int, ...], dtype: torch.dtype, rng: torch.Generator) -> Tensor:
    data = torch.randint(-8, 9, shape, generator=rng) / 4
    return data.requires_grad_() if dtype.is_floating_point else data.to(dtype)


def make(
    sizes_along: tuple[int, ...],
    *,
    batch: tuple[int, ...] = (3,),
    data_dims: tuple[int, ...] = (2,),
    slots: int = 5,
    widths: tuple[int, ...] = (4,),
    dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    index_dtype: torch.dtype = torch.int64,
) -> tuple[Any, ...]:
    """Data of each of these sizes along the indexed dimension, indices into each of these widths, and sizes."""
    rng = torch.Generator().manual_seed(0)
    dim = len(batch) if dim is None else dim
    data = []
    for size in sizes_along:
        shape = [*batch, size, *data_dims]
        shape[len(batch)], shape[dim] = shape[dim], shape[len(batch)]
        data.append(make_data(tuple(shape), dtype, rng))
    indices = [make_index(batch, slots, width, rng, index_dtype) for width in widths]
    sizes = indices[0][1]
    used_slots = torch.arange(slots) < sizes[..., None]
    # Of all indices so many are used as of the first.
    return (*data, *(index.where(used_slots & (index < 99), 0) for index, _ in indices[1:]), indices[0][0], sizes)


# ---- calls


def ragged(index: Tensor, sizes: Tensor) -> RaggedBatch:
    return RaggedBatch(index, sample_sizes=sizes)


def padded(data: Tensor, sizes: Tensor, dim: int | None = None) -> RaggedBatch:
    """The data as a batch of which nothing but the padded tensor counts."""
    return RaggedBatch(data, sample_sizes=torch.zeros_like(sizes), non_uniform_dim=dim)


def call_access(data: Tensor, index: Tensor, sizes: Tensor, *options: Any) -> Tensor:
    return batched_indexing_access(data, ragged(index, sizes), *options).tensor


def call_access_of_batch(data: Tensor, index: Tensor, sizes: Tensor, *options: Any) -> Tensor:
    return batched_indexing_access(padded(data, sizes), ragged(index, sizes), *options).tensor


def call_inverse(entries: Tensor, index: Tensor, sizes: Tensor, *options: Any) -> Tensor:
    return batched_inverse_indexing_access(entries, ragged(index, sizes), *options)


def call_write(entries: Tensor, into: Tensor, index: Tensor, sizes: Tensor, *options: Any) -> Any:
    return batched_indexing_write(entries, ragged(index, sizes), into, *options)


def call_write_of_batches(entries: Tensor, into: Tensor, index: Tensor, sizes: Tensor, *options: Any) -> Tensor:
    result: Any = batched_indexing_write(padded(entries, sizes), ragged(index, sizes), padded(into, sizes), *options)
    return result.tensor


def call_mapping(source: Tensor, target: Tensor, source_index: Tensor, index: Tensor, sizes: Tensor) -> Any:
    return batched_index_mapping(source, ragged(source_index, sizes), ragged(index, sizes), target)


def call_mapping_of_batches(
    source: Tensor, target: Tensor, source_index: Tensor, index: Tensor, sizes: Tensor, dim: int
) -> Tensor:
    batches = padded(source, sizes, dim), padded(target, sizes, dim)
    result: Any = batched_index_mapping(batches[0], ragged(source_index, sizes), ragged(index, sizes), batches[1])
    return result.tensor


def call_mask(index: Tensor, sizes: Tensor, width: int) -> Tensor:
    return get_mask_from_indices(width, ragged(index, sizes))


def call_lengths(values: Tensor, lengths: Tensor, width: int) -> Tensor:
    return from_values(values, lengths=lengths, max_sample_size=width).tensor


def call_offsets(values: Tensor, offsets: Tensor, width: int) -> Tensor:
    return from_values(values, offsets=offsets, max_sample_size=width).tensor


def call_list(*tensors: Tensor) -> Tensor:
    return combine_data(tensors).tensor


# ---- cases


def _case(
    name: str,
    call: Callable,
    oracle: Callable,
    inputs: Callable[[], tuple[Any, ...]],
    *options: Any,
    operator_on: tuple[str, ...] = ("cuda",),
) -> Case:
    return Case(
        name,
        lambda *tensors: call(*tensors, *options),
        inputs,
        lambda *tensors: oracle(*tensors, *options),
        tolerances=EXACT,
        twice_differentiable=True,
        operator_on=operator_on,
    )


def _access(name: str, *options: Any, call: Callable = call_access, width: int = 4, **made: Any) -> Case:
    inputs = partial(make, (width,), widths=(width,), **made)
    return _case(f"batched_indexing_access/{name}", call, access_oracle, inputs, *options)


def _inverse(name: str, *options: Any, width: int = 4, **made: Any) -> Case:
    inputs = partial(make, (made.get("slots", 5) + 1,), widths=(width,), **made)
    return _case(f"batched_inverse_indexing_access/{name}", call_inverse, inverse_oracle, inputs, width, *options)


def _write(name: str, *options: Any, call: Callable = call_write, width: int = 4, **made: Any) -> Case:
    inputs = partial(make, (made.get("slots", 5), width), widths=(width,), **made)
    return _case(f"batched_indexing_write/{name}", call, write_oracle, inputs, *options)


def _mapping(name: str, *options: Any, call: Callable = call_mapping, width: int = 4, **made: Any) -> Case:
    inputs = partial(make, (3, width), widths=(width, 3), **made)
    return _case(f"batched_index_mapping/{name}", call, mapping_oracle, inputs, *options)


def _mask(name: str, width: int = 4, **made: Any) -> Case:
    inputs = partial(make, (), widths=(width,), **made)
    return _case(f"get_mask_from_indices/{name}", call_mask, mask_oracle, inputs, width)


def _values(*data_dims: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return make_data((9, *data_dims), dtype, torch.Generator().manual_seed(0))


def _tensors() -> tuple[Tensor, ...]:
    return tuple(tensor.detach().requires_grad_() for tensor in _values(2).split([3, 0, 5, 1]))


CASES = [
    _access("usual"),
    _access("filler", -1.5),
    _access("several-dims", 2.0, batch=(2, 3), data_dims=(2, 3)),
    _access("no-data-dims-int32", 0.5, data_dims=(), index_dtype=torch.int32),
    _access("dim-to-index-in", 1.0, 3, data_dims=(2, 3), dim=3),
    _access("ragged-data", 1.0, call=call_access_of_batch, batch=(2, 2)),
    _access("integers", 2.5, dtype=torch.int64),
    _access("bools", True, dtype=torch.bool),
    _access("no-slots", slots=0),
    _access("no-entries", 3.0, width=0),
    _access("batch-0", batch=(0,)),
    _inverse("usual"),
    _inverse("filler-several-dims", -1.5, batch=(2, 3), data_dims=(2, 3)),
    _inverse("dim-to-index-in", 1.0, 2, data_dims=(2,), dim=2),
    _inverse("integers", 2.5, dtype=torch.int64, index_dtype=torch.int32),
    _inverse("no-slots", 1.0, slots=0),
    _inverse("no-width", width=0),
    _write("usual"),
    _write("several-dims", batch=(2, 3), data_dims=(2, 3)),
    _write("dim-to-index-in", 3, data_dims=(2, 3), dim=3, index_dtype=torch.int32),
    _write("ragged-data", call=call_write_of_batches),
    _write("bools", dtype=torch.bool),
    _mapping("usual"),
    _mapping("several-dims-int32", batch=(2, 3), data_dims=(2, 3), index_dtype=torch.int32),
    _mapping("ragged-data", 3, call=call_mapping_of_batches, data_dims=(2, 3), dim=3),
    _mapping("integers", data_dims=(), dtype=torch.int64),
    _mapping("batch-0", batch=(0,)),
    _mask("usual"),
    _mask("several-batch-dims-int32", batch=(2, 3), index_dtype=torch.int32),
    _mask("no-width", width=0),
    _case(
        "from_values/lengths",
        call_lengths,
        lengths_oracle,
        lambda: (_values(2, 3), torch.tensor([[3, 0], [5, 1]])),
        4,
        operator_on=(),
    ),
    _case(
        "from_values/offsets",
        call_offsets,
        offsets_oracle,
        lambda: (_values(dtype=torch.int64), torch.tensor([0, 3, 3, 8])),
        6,
        operator_on=(),
    ),
    _case("combine_data/tensors", call_list, list_oracle, _tensors),
]
