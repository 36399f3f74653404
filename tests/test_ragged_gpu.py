"""Ragged batches on a GPU: nothing waits for the device but what must, and that once; determinism."""

import warnings

import pytest
import torch
from torch import Tensor

from saccade import ragged
from saccade.ragged import RaggedBatch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def inputs() -> tuple[Tensor, RaggedBatch, RaggedBatch]:
    """Data (3, 5, 2), indices with repetitions into 5 entries and a mask, all with the same sizes."""
    generator = torch.Generator().manual_seed(0)
    data = torch.rand(3, 5, 2, generator=generator).cuda().requires_grad_()
    sizes = torch.tensor([5, 0, 3]).cuda()
    index = RaggedBatch(torch.randint(-5, 5, (3, 5), generator=generator).cuda(), sample_sizes=sizes)
    return data, index, index.create_with_sample_sizes_like_self((torch.rand(3, 5, generator=generator) < 0.5).cuda())


WITHOUT_WAITING = {
    "batched_indexing_access": lambda data, index, mask: ragged.batched_indexing_access(data, index, 2),
    "batched_inverse_indexing_access": lambda data, index, mask: ragged.batched_inverse_indexing_access(data, index, 7),
    "batched_indexing_write": lambda data, index, mask: ragged.batched_indexing_write(data * 2, index, data),
    "batched_index_mapping": lambda data, index, mask: ragged.batched_index_mapping(data * 2, index, index, data),
    "get_mask_from_indices": lambda data, index, mask: ragged.get_mask_from_indices(5, index)[..., None] * data,
    "batched_bool_indexing_write": lambda data, index, mask: ragged.batched_bool_indexing_write(
        RaggedBatch(data * 2, sample_sizes=mask.tensor.sum(-1)), mask, data
    ),
    "average_over_targets": lambda data, index, mask: ragged.average_over_targets(RaggedBatch(data, index.mask)),
    "sum_over_targets": lambda data, index, mask: ragged.sum_over_targets(RaggedBatch(data, index.mask)),
    "apply_mask_to_tensor": lambda data, index, mask: ragged.apply_mask_to_tensor(data, mask.tensor),
    "with_padded_set_to": lambda data, index, mask: RaggedBatch(data, index.mask).with_padded_set_to(1),
    "combine_data": lambda data, index, mask: ragged.combine_data([data[0], data[1, :2]]),
    "from_values": lambda data, index, mask: ragged.from_values(
        data.flatten(0, 1), lengths=index.sample_sizes, max_sample_size=5
    ),
}
WITH_WAITING_ONCE = {
    "batched_bool_indexing": lambda data, index, mask: ragged.batched_bool_indexing(data, mask),
    "get_indices_from_mask": lambda data, index, mask: ragged.get_indices_from_mask(mask),
    "get_compact_lists": lambda data, index, mask: ragged.get_compact_lists(mask.tensor, [data, data * 2])[1],
    "to_values": lambda data, index, mask: ragged.to_values(RaggedBatch(data, index.mask))[0],
    "from_values": lambda data, index, mask: ragged.from_values(data.flatten(0, 1), lengths=index.sample_sizes),
    "split": lambda data, index, mask: torch.cat(RaggedBatch(data, index.mask).split()),
}


def count_waits(function) -> tuple[int, Tensor, Tensor | None]:
    """How often a function and its gradient wait for the device, and what comes out."""
    data, index, mask = inputs()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            result = function(data, index, mask)
            result = result.tensor if isinstance(result, RaggedBatch) else result
            gradient = torch.autograd.grad(result, data, torch.ones_like(result))[0] if result.requires_grad else None
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught), result, gradient


@pytest.mark.parametrize("name", WITHOUT_WAITING)
def test_nothing_waits_for_the_device(name):
    assert count_waits(WITHOUT_WAITING[name])[0] == 0


@pytest.mark.parametrize("name", WITH_WAITING_ONCE)
def test_what_must_wait_does_so_once(name):
    assert count_waits(WITH_WAITING_ONCE[name])[0] == 1


@pytest.mark.parametrize("name", WITHOUT_WAITING | WITH_WAITING_ONCE)
def test_values_and_gradients_are_those_of_the_cpu_and_of_deterministic_algorithms(name):
    function = (WITHOUT_WAITING | WITH_WAITING_ONCE)[name]
    _, result, gradient = count_waits(function)
    data, index, mask = inputs()
    on_cpu = data.detach().cpu().requires_grad_()
    expected = function(on_cpu, index.cpu(), mask.cpu())
    expected = expected.tensor if isinstance(expected, RaggedBatch) else expected
    assert torch.allclose(result.cpu(), expected)
    torch.use_deterministic_algorithms(True)
    try:
        _, again, gradient_again = count_waits(function)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(again, result)
    if gradient is not None:
        (expected,) = torch.autograd.grad(expected, on_cpu, torch.ones_like(expected))
        assert torch.allclose(gradient.cpu(), expected)
        assert torch.allclose(gradient_again, gradient)


def test_the_order_of_many_entries_is_kept():
    mask = torch.rand(4, 5000) < 0.5
    indices = ragged.get_indices_from_mask(mask.cuda())
    for row, expected in zip(indices.split(), mask, strict=True):
        assert torch.equal(row.cpu(), expected.nonzero().squeeze(1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_many_repeated_indices_are_those_of_advanced_indexing(dtype):
    """Of the used slots alone: that there are unused ones changes no sum."""
    sizes = torch.tensor([900, 37, 0, 500]).cuda()
    index = torch.randint(0, 20, (4, 900)).cuda()
    used = torch.arange(900).cuda() < sizes[:, None]
    for data_dims in (), (1,), (11,), (256,):
        data = torch.rand(4, 900, *data_dims, dtype=dtype).cuda().requires_grad_()
        result = ragged.batched_indexing_access(data, RaggedBatch(index, sample_sizes=sizes)).tensor
        incoming = torch.randn(result.shape).cuda().to(dtype)
        sample = torch.arange(4).cuda()[:, None].expand_as(index)
        (expected,) = torch.autograd.grad(data[sample[used], index[used]], data, incoming[used])
        assert torch.equal(torch.autograd.grad(result, data, incoming)[0], expected)
