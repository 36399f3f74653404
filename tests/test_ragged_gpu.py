"""Ragged batches on a GPU: what waits and what does not, values at real sizes, repeated indices, compilers.

What index operations have in common with other operators is in ``test_gpu_contract.py``.
"""

import warnings

import pytest
import torch
from torch import Tensor

from cases.on_gpu import deterministic_algorithms
from saccade import debug_checks, ragged
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
        RaggedBatch(data * 2, sample_sizes=(mask.tensor & mask.mask).sum(-1)), mask, data
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
    # Not the warning, once in a process, that this mode is a prototype.
    return sum("called a synchronizing" in str(warning.message) for warning in caught), result, gradient


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
    with deterministic_algorithms(True):
        _, again, gradient_again = count_waits(function)
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
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([900, 37, 0, 500]).cuda()
    index = torch.randint(0, 20, (4, 900), generator=generator).cuda()
    used = torch.arange(900).cuda() < sizes[:, None]
    for data_dims in (), (1,), (11,), (32,), (33,), (256,):
        data = torch.rand(4, 900, *data_dims, generator=generator).to(dtype).cuda().requires_grad_()
        result = ragged.batched_indexing_access(data, RaggedBatch(index, sample_sizes=sizes)).tensor
        incoming = torch.randn(result.shape, generator=generator).to(dtype).cuda()
        sample = torch.arange(4).cuda()[:, None].expand_as(index)
        (expected,) = torch.autograd.grad(data[sample[used], index[used]], data, incoming[used])
        assert torch.equal(torch.autograd.grad(result, data, incoming)[0], expected)


# ---- real sizes


def problem(samples: int, slots: int, width: int, inner: int) -> tuple[Tensor, RaggedBatch, Tensor]:
    """Data, indices that repeat, and an incoming gradient; the float32 sums of the latter are exact in any order."""
    generator = torch.Generator("cuda").manual_seed(0)
    data = torch.randn(samples, width, inner, device="cuda", generator=generator).requires_grad_()
    index = torch.randint(-width, width, (samples, slots), device="cuda", generator=generator)
    sizes = torch.randint(0, slots + 1, (samples,), device="cuda", generator=generator)
    incoming = torch.randint(-9, 10, (samples, slots, inner), device="cuda", generator=generator).float()
    return data, RaggedBatch(index, sample_sizes=sizes), incoming


SIZES = [(48, 50, 900, 11), (48, 900, 900, 4), (2, 3000, 100, 256), (1, 100_000, 1000, 4), (1, 100_000, 100_000, 1)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_real_sizes(sizes):
    """Those for the kernels and those for PyTorch's operators, against plain indexing."""
    data, index, incoming = problem(*sizes)
    samples, _, width, _ = sizes
    used = index.mask
    sample = torch.arange(samples, device="cuda")[:, None].expand_as(used)[used]
    places, slots = index.tensor[used] % width, used.nonzero()[:, 1]

    result = ragged.batched_indexing_access(data, index, 3).tensor
    expected = torch.full_like(result, 3)
    expected[used] = data[sample, places]
    assert torch.equal(result, expected)
    (gradient,) = torch.autograd.grad(result, data, incoming)
    expected = torch.zeros_like(data).index_put_((sample, places), incoming[used], accumulate=True)
    assert torch.equal(gradient, expected)

    last = torch.full((samples, width), -1, device="cuda")
    last = last.view(-1).scatter_reduce(0, sample * width + places, slots, "amax").view(samples, width)
    assert torch.equal(ragged.get_mask_from_indices(width, index), last >= 0)
    entries = incoming.clone().requires_grad_()
    written = ragged.batched_indexing_write(entries, index, data)
    expected = incoming.gather(1, last.clamp(min=0)[..., None].expand_as(data))
    assert torch.equal(written, torch.where((last >= 0)[..., None], expected, data))
    seed = torch.randn_like(data)
    of_entries, of_data = torch.autograd.grad(written, (entries, data), seed)
    assert torch.equal(of_data, seed.masked_fill((last >= 0)[..., None], 0))
    expected = torch.zeros_like(incoming)
    is_last = last[sample, places] == slots
    expected[sample[is_last], slots[is_last]] = seed[sample[is_last], places[is_last]]
    assert torch.equal(of_entries, expected)


def test_many_tensors_become_one_batch():
    leaves = [torch.randn(size, 11, device="cuda", requires_grad=True) for size in range(48)]
    batch = ragged.combine_data(leaves)
    assert batch.sample_sizes.tolist() == list(range(48))
    for row, leaf in zip(batch.tensor, leaves, strict=True):
        assert torch.equal(row[: len(leaf)], leaf)
        assert not row[len(leaf) :].any()
    seed = torch.randn_like(batch.tensor)
    gradients = torch.autograd.grad(batch.tensor, leaves, seed)
    assert all(torch.equal(gradient, of_row[: len(gradient)]) for gradient, of_row in zip(gradients, seed, strict=True))


# ---- compilers


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_with_inductor(dynamic):
    torch._dynamo.reset()
    data, index, incoming = problem(4, 20, 30, 3)

    def loss(data: Tensor, index: RaggedBatch) -> Tensor:
        read = ragged.batched_indexing_access(data * 2, index, 2).tensor
        mapped = ragged.batched_index_mapping(data, index, index, data * 2)
        mask = ragged.get_mask_from_indices(data.shape[1], index)
        return (read * incoming).sum() + (mapped * mask[..., None]).square().sum()

    (expected,) = torch.autograd.grad(loss(data, index), data)
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic)
    (gradient,) = torch.autograd.grad(compiled(data, index), data)
    torch.testing.assert_close(gradient, expected)


def test_vmap_goes_past_the_kernels():
    data, index, _ = problem(4, 20, 30, 3)
    stacked = torch.stack([data.detach(), data.detach() * 2])
    result = torch.vmap(lambda each: ragged.batched_indexing_access(each, index).tensor)(stacked)
    assert torch.equal(result[1], ragged.batched_indexing_access(stacked[1], index).tensor)
    entries = torch.randn(2, 4, 20, 3, device="cuda")
    result = torch.vmap(lambda each: ragged.batched_inverse_indexing_access(each, index, 30))(entries)
    assert torch.equal(result[1], ragged.batched_inverse_indexing_access(entries[1], index, 30))


def test_debug_checks_name_the_index():
    index = RaggedBatch(torch.tensor([[1, 3]]).cuda(), sample_sizes=torch.tensor([2]).cuda())
    data = torch.zeros(1, 3).cuda()
    assert ragged.batched_indexing_access(data, index, 7).tensor.tolist() == [[0, 7]]
    with debug_checks(True), pytest.raises(IndexError, match="got 3 in slot 1 of sample 0"):
        ragged.batched_indexing_access(data, index)
