"""The index operations on ragged batches, on a GPU. Sizes are (samples, slots, entries, numbers in each)."""

from functools import partial

import torch
from torch import Tensor

from cases.on_gpu import DEVICE, TOLERANCES, Beyond, Call, Compiled, Few, Memory, OnGpu, Sizes
from saccade import ragged
from saccade.ragged import RaggedBatch
from saccade.ragged.api import SUM

# PyTorch's sums of half precision, which these are, round each time they add.
OF_SUMS = {**TOLERANCES, torch.float16: 2e-3}


# ---- index operations; what they return is weighted, so that gradients are sums whose order shows


def read(data: Tensor, index: Tensor, sizes: Tensor, weight: Tensor) -> Tensor:
    return ragged.batched_indexing_access(data, RaggedBatch(index, sample_sizes=sizes), 2).tensor * weight


def spread(entries: Tensor, index: Tensor, sizes: Tensor, weight: Tensor) -> Tensor:
    batch = RaggedBatch(index, sample_sizes=sizes)
    return ragged.batched_inverse_indexing_access(entries, batch, weight.shape[1], 3) * weight


def written(entries: Tensor, index: Tensor, sizes: Tensor, data: Tensor, weight: Tensor) -> Tensor:
    return ragged.batched_indexing_write(entries, RaggedBatch(index, sample_sizes=sizes), data) * weight


def mapped(
    source: Tensor, source_index: Tensor, sizes: Tensor, data: Tensor, weight: Tensor, target_index: Tensor
) -> Tensor:
    source_batch = RaggedBatch(source_index, sample_sizes=sizes)
    target_batch = RaggedBatch(target_index, sample_sizes=sizes)
    return ragged.batched_index_mapping(source, source_batch, target_batch, data) * weight


def marked(index: Tensor, sizes: Tensor, weight: Tensor) -> Tensor:
    mask = ragged.get_mask_from_indices(weight.shape[1], RaggedBatch(index, sample_sizes=sizes))
    return mask[..., None] * weight


def made(name: str, size: tuple[int, int, int, int], dtype: torch.dtype, seed: int) -> Tensor:
    """An input by its name; those that may have a gradient require one. Indices repeat."""
    samples, slots, width, inner = size
    rng = torch.Generator().manual_seed(seed)
    random, whole = partial(torch.randn, generator=rng), partial(torch.randint, generator=rng)
    value = {
        "data": lambda: random(samples, width, inner),
        "entries": lambda: random(samples, slots, inner),
        "index": lambda: whole(-width, width, (samples, slots)),
        "sizes": lambda: whole(0, slots + 1, (samples,)),
        "data_weight": lambda: random(samples, width, inner),
        "slot_weight": lambda: random(samples, slots, inner),
    }[name]()
    value = value.to(DEVICE, dtype if name in ("data", "entries") else None)
    return value.requires_grad_(name in ("data", "entries"))


SIZES = Sizes(
    usual=(4, 20, 30, 3),
    compared=((4, 20, 30, 3), (48, 50, 900, 11), (2, 3000, 100, 16)),
    repeated=((48, 900, 300, 11),),
    overlapping=((48, 50, 900, 11),),
    chained=(48, 50, 900, 11),
    chained_in_a_graph=(4, 20, 30, 3),
    told_apart=((2, 16, 32, 16), (1, 1, 16, 16), (16, 16, 1, 1), (1, 16, 16, 1)),
    numbered=lambda number: (3, 11 + number, 17, 2),
    unseen=lambda number: ((5, 13 + number, 23, 3), (5, 16, 32 + 16 * number, 16)),
)


def _advance_indices(values: list[Tensor], results: list[Tensor]) -> None:
    index, width = values[0], values[-1].shape[1]
    index.add_((results[0].sum() * 1000).long()).remainder_(width)


def _full(names: str, values: list[Tensor]) -> None:
    """All slots of all samples are used, more than there are, and have one and the same index."""
    for name, value in zip(names.split(), values, strict=True):
        if name == "index":
            value.fill_(-1)
        elif name == "sizes":
            value.fill_(values[names.split().index("index")].shape[1] + 30)


def _case(call: Call, names: str, **how) -> OnGpu:
    def make(size: tuple[int, int, int, int], dtype: torch.dtype, seed: int) -> list[Tensor]:
        return [made(each, size, dtype, seed + k) for k, each in enumerate(names.split())]

    unlike = partial(_full, names)
    return OnGpu(call.__name__, call, make, SIZES, OF_SUMS, unlike=unlike, same_on_every_gpu=True, **how)


CASES = [
    _case(read, "data index sizes slot_weight", elementwise=True, told_apart=True),
    _case(spread, "entries index sizes data_weight", elementwise=True),
    _case(written, "entries index sizes data data_weight", elementwise=True, told_apart=True),
    _case(mapped, "data index sizes data data_weight index", elementwise=True, told_apart=True),
    _case(marked, "index sizes data_weight", dtypes=(torch.float32,), told_apart=True, advance=_advance_indices),
]
TOGETHER = (["read", "written", "mapped"], (48, 50, 900, 11))


def another(number: int) -> tuple[Call, list[Tensor]]:
    """Another size for each number."""
    size = 4, 21 + number, 31 + 2 * number, 3
    return read, [made(name, size, torch.float32, 0) for name in ("data", "index", "sizes", "slot_weight")]


# ---- memory: results and gradients alone, each rounded up to 512 bytes, as those below 1 MB are by the allocator


def _reading(data: Tensor, index: Tensor, sizes: Tensor) -> Tensor:
    return ragged.batched_indexing_access(data, RaggedBatch(index, sample_sizes=sizes), 2).tensor


def _writing(entries: Tensor, index: Tensor, sizes: Tensor, data: Tensor) -> Tensor:
    return ragged.batched_indexing_write(entries, RaggedBatch(index, sample_sizes=sizes), data)


def _memory(call: Call, names: str) -> tuple[Call, list[Tensor]]:
    return call, [made(name, (16, 50, 400, 11), torch.float32, k) for k, name in enumerate(names.split())]


MEMORY = [
    Memory(name, partial(_memory, call, names), lambda values, results: 512 * (len(results) + 1))
    for name, call, names in (("read", _reading, "data index sizes"), ("written", _writing, "entries index sizes data"))
]


# ---- more than 32 bits count

_SAMPLES, _WIDTH, _INNER = 3, 2**20, 700
EQUAL = dict.fromkeys(TOLERANCES, 0.0)  # entries are moved, and sums are of small whole numbers


def _many(name: str) -> Few:
    """Data of zeros but for the last entry; a few indices and slots, or as many slots as there are entries."""
    entry = torch.arange(_INNER, device=DEVICE).half()
    index = torch.tensor([[0, 1], [0, 1], [-1, 5]], device=DEVICE)
    sizes = torch.full((_SAMPLES,), 2, device=DEVICE)
    ones = torch.ones(_SAMPLES, 2, _INNER, dtype=torch.float16, device=DEVICE)
    total = torch.tensor(float(ones.numel()), dtype=torch.float64)

    def at_the_end(results: list[Tensor]) -> list[Tensor]:
        return [results[0][2, -1], results[0].sum(dtype=torch.float64)]

    if name == "summed":  # through the operator: a gradient in float32 needs data in float32

        def sums(entries: Tensor, index: Tensor, sizes: Tensor) -> Tensor:
            return SUM(entries, index, sizes, _WIDTH)

        return Few(sums, [ones.float(), index, sizes], [ones[2, 0].float(), total], at_the_end, tolerances=EQUAL)
    data = torch.zeros(_SAMPLES, _WIDTH, _INNER, dtype=torch.float16, device=DEVICE)
    data[2, -1] = entry
    if name == "written":
        return Few(_writing, [ones, index, sizes, data], [ones[2, 0], total], at_the_end, tolerances=EQUAL)
    if name == "read":
        few = torch.zeros(_SAMPLES, 2, _INNER, dtype=torch.float16)
        few[2, 0] = entry.cpu()
        return Few(_reading, [data, index, sizes], [few], tolerances=EQUAL)
    turned = torch.arange(_WIDTH - 1, -1, -1, device=DEVICE).expand(_SAMPLES, _WIDTH)
    expected = [entry, entry.sum(dtype=torch.float64)]
    return Few(
        _reading,
        [data, turned, torch.full((_SAMPLES,), _WIDTH, device=DEVICE)],
        expected,
        lambda results: [results[0][2, 0], results[0].sum(dtype=torch.float64)],
        tolerances=EQUAL,
    )


BEYOND = [Beyond(name, 25, partial(_many, name)) for name in ("read", "read-everywhere", "written", "summed")]


# ---- torch.compile


def _head(data: Tensor, index: Tensor, sizes: Tensor, weight: Tensor) -> Tensor:
    batch = RaggedBatch(index, sample_sizes=sizes)
    read = ragged.batched_indexing_access(data * 2, batch, 2).tensor
    mapped = ragged.batched_index_mapping(data, batch, batch, data * 2)
    mask = ragged.get_mask_from_indices(data.shape[1], batch)
    return (read * weight).sum() + (mapped * mask[..., None]).square().sum()


COMPILED = [
    Compiled(
        "read-and-mapped",
        lambda: _head,
        lambda batch: [
            made(name, (batch, 20, 30, 3), torch.float32, k)
            for k, name in enumerate(("data", "index", "sizes", "slot_weight"))
        ],
        (9, 10, 14),
    )
]
