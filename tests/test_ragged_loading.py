"""Ragged batches in data loaders and in wrapped modules."""

import functools
import json
import os
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.utils import _cast_forward_inputs
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, default_collate
from torch.utils.data._utils.pin_memory import pin_memory

from saccade.ragged import RaggedBatch, collate, combine_data, move_ragged_inputs, sum_over_targets

# ---- data loaders


def sample(*sizes: int) -> dict[str, Any]:
    """A sample of several cameras, with as many boxes in each."""
    boxes = combine_data([torch.full((size, 4), float(size)) for size in sizes])
    return {"image": torch.zeros(len(sizes), 3, 2, 2), "boxes": boxes, "name": str(sizes)}


@pytest.mark.parametrize("put_together", [default_collate, collate])
def test_batches_are_stacked_as_tensors_are(put_together):
    samples = [sample(1, 2), sample(0, 0), sample(5, 1)]
    batch = put_together(samples)
    assert batch["image"].shape == (3, 2, 3, 2, 2)
    assert batch["name"] == ["(1, 2)", "(0, 0)", "(5, 1)"]
    boxes = batch["boxes"]
    assert (boxes.shape, boxes.num_batch_dims, boxes.non_uniform_dim) == ((3, 2, 5, 4), 2, 2)
    assert boxes.sample_sizes.tolist() == [[1, 2], [0, 0], [5, 1]]
    for part, whole in zip(boxes.split(), samples, strict=True):
        assert all(torch.equal(*pair) for pair in zip(part, whole["boxes"].split(), strict=True))
    assert not boxes.tensor[~boxes.mask].any()


def test_what_counts_as_all_entries_does_so_in_a_wider_batch():
    first = RaggedBatch(torch.ones(1, 4, 2), sample_sizes=torch.tensor([9]), non_uniform_dim=2)
    second = RaggedBatch(torch.ones(1, 4, 3), torch.tensor([[True, False, False]]), non_uniform_dim=2)
    stacked = default_collate([first, second])
    assert (stacked.shape, stacked.non_uniform_dim) == ((2, 1, 4, 3), 3)
    assert stacked.sample_sizes.tolist() == [[2], [1]]
    assert stacked.tensor[0, 0, 0].tolist() == [1, 1, 0]


def test_gradients_of_stacked_batches():
    leaves = [torch.ones(1, width, requires_grad=True) for width in (1, 3)]
    stacked = default_collate([RaggedBatch(leaf, sample_sizes=torch.tensor([1])) for leaf in leaves])
    gradients = torch.autograd.grad((stacked.tensor * torch.tensor([[[1, 2, 3]], [[4, 5, 6]]])).sum(), leaves)
    assert [g.tolist() for g in gradients] == [[[1]], [[4, 5, 6]]]


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(1, 2, 3),
        RaggedBatch(torch.zeros(2, 2, 3), sample_sizes=torch.zeros(2)),
        RaggedBatch(torch.zeros(1, 2, 4), sample_sizes=torch.zeros(1)),
        RaggedBatch(torch.zeros(1, 2, 3, 1), sample_sizes=torch.zeros(1)),
        RaggedBatch(torch.zeros(1, 3, 2), sample_sizes=torch.zeros(1), non_uniform_dim=2),
        RaggedBatch(torch.zeros(1, 2, 3).half(), sample_sizes=torch.zeros(1)),
        RaggedBatch(torch.zeros(1, 2, 3, device="meta"), sample_sizes=torch.zeros(1, device="meta")),
    ],
)
def test_batches_that_cannot_be_stacked(other):
    with pytest.raises(ValueError, match=r"samples: expected ragged batches of equal batch shape, .* as number 1"):
        default_collate([RaggedBatch(torch.zeros(1, 2, 3), sample_sizes=torch.zeros(1)), other])


Pair = namedtuple("Pair", ["image", "labels"])


def test_fields_of_different_lengths():
    images, labels = torch.arange(2), [torch.tensor([7]), torch.tensor([8, 9])]
    for samples, name in (
        ([{"image": image, "labels": label} for image, label in zip(images, labels, strict=True)], "labels"),
        ([Pair(image, label) for image, label in zip(images, labels, strict=True)], "labels"),
        ([(image, label.numpy()) for image, label in zip(images, labels, strict=True)], 1),
    ):
        batch = collate(samples, ragged=[name])
        image, label = batch.values() if isinstance(batch, dict) else batch
        assert type(batch) is {dict: dict, Pair: Pair, tuple: list}[type(samples[0])]
        assert image.tolist() == [0, 1]
        assert label.tensor.tolist() == [[7, 0], [8, 9]]
        assert label.sample_sizes.tolist() == [1, 2]
        with pytest.raises(ValueError, match=r"ragged: expected fields of the samples, which are .*, got \['boxes'\]"):
            collate(samples, ragged=[name, "boxes"])
    with pytest.raises(ValueError, match="ragged: expected none with samples of type Tensor"):
        collate(labels, ragged=[0])


def test_data_loader_with_workers():
    samples = [sample(1, 2), sample(3, 0), sample(0, 1), sample(1, 1)]
    batches = list(DataLoader(samples, batch_size=2, num_workers=1))  # pyright: ignore[reportArgumentType]
    assert [batch["boxes"].sample_sizes.tolist() for batch in batches] == [[[1, 2], [3, 0]], [[0, 1], [1, 1]]]
    assert batches[0]["boxes"].tensor[1, 0].tolist() == [[3] * 4] * 3
    put_together = functools.partial(collate, ragged=["labels"])
    labels = [{"labels": torch.arange(size)} for size in (1, 3)]
    (batch,) = DataLoader(labels, batch_size=2, num_workers=1, collate_fn=put_together)  # pyright: ignore[reportArgumentType]
    assert batch["labels"].tensor.tolist() == [[0, 0, 0], [0, 1, 2]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_data_loader_that_pins_memory():
    (batch,) = DataLoader([sample(1, 2), sample(3, 0)], batch_size=2, pin_memory=True)  # pyright: ignore[reportArgumentType]
    assert batch["boxes"].tensor.is_pinned()
    assert batch["boxes"].sample_sizes.is_pinned()


def test_pinning_is_that_of_the_tensors(monkeypatch):
    """What a data loader calls, with copies in the place of pinned memory, which needs a GPU."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: tensor + 100)
    boxes = RaggedBatch(torch.tensor([[1, 2]]), sample_sizes=torch.tensor([1]), non_uniform_dim=1)
    (pinned,) = pin_memory([boxes])
    assert type(pinned) is RaggedBatch
    assert (pinned.tensor.tolist(), pinned.sample_sizes.tolist(), pinned._extent.mask) == ([[101, 102]], [101], None)


# ---- wrapped modules


class Scale(nn.Module):
    """Boxes times a weight, as a ragged batch within other containers; one of two parameters is not used."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.unused = nn.Parameter(torch.ones(1))

    def forward(self, inputs: dict[str, RaggedBatch], *, offset: RaggedBatch) -> RaggedBatch:
        self.input_devices = inputs["boxes"].device, offset.device
        return inputs["boxes"].apply(lambda tensor: tensor * self.weight + offset.tensor)


def test_inputs_are_moved():
    module = Scale().to("meta")
    handle = move_ragged_inputs(module)
    boxes = RaggedBatch(torch.ones(2, 3, 4), sample_sizes=torch.tensor([1, 3]))
    output = module({"boxes": boxes}, offset=boxes)
    assert {device.type for device in module.input_devices} == {"meta"}
    assert output.device.type == output.sample_sizes.device.type == "meta"
    assert boxes.device.type == "cpu"
    handle.remove()
    with pytest.raises(RuntimeError):
        module({"boxes": boxes}, offset=boxes)
    identity = nn.Identity()  # without a parameter there is no device to move to
    move_ragged_inputs(identity)
    assert identity(boxes) is boxes


def test_mixed_precision_of_wrapped_modules():
    """The function with which DistributedDataParallel and FullyShardedDataParallel cast inputs."""
    boxes = RaggedBatch(torch.ones(2, 4, 3), sample_sizes=torch.tensor([1, 3]), non_uniform_dim=2)
    (inputs,), options = _cast_forward_inputs(torch.float16, [boxes], boxes=boxes)
    for cast in inputs[0], options["boxes"]:
        assert type(cast) is RaggedBatch
        assert (cast.dtype, cast.non_uniform_dim, cast.sample_sizes.tolist()) == (torch.float16, 2, [1, 3])


def train_one_step(rank: int, directory: str) -> None:
    """Write the gradients of one of two processes, with inputs and outputs handled in different modes of training."""
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    gradients: list[list[float]] = []
    for options in (
        {"find_unused_parameters": True},
        {"static_graph": True},
        {"find_unused_parameters": True, "hook": True},
    ):
        options = dict(options)
        hook = options.pop("hook", False)
        module = Scale()
        wrapped = DistributedDataParallel(module, **options)
        if hook:
            move_ragged_inputs(wrapped)
        # As the batches of the two processes differ in width and sizes, only the reduction can make them agree.
        boxes = combine_data([torch.full((size, 4), float(size)) for size in ((1, 2), (3, 1, 2))[rank]])
        for _ in range(2):
            module.zero_grad()
            output = wrapped({"boxes": boxes}, offset=boxes)
            assert isinstance(output, RaggedBatch)
            sum_over_targets(output).sum().backward()
        assert module.weight.grad is not None
        gradients.append(module.weight.grad.tolist())
    dist.barrier()
    Path(directory, f"{rank}.json").write_text(json.dumps(gradients))
    while not Path(directory, f"{1 - rank}.json").exists():  # the other process may still be talking to this one
        time.sleep(0.01)
    # Not through destructors: that of Gloo's process group waits for its threads with Python's lock, which these may
    # want. Now and then that is for ever.
    os._exit(0)


def test_distributed_data_parallel(tmp_path):
    """Parameters are found to be used through an output that is a ragged batch, and gradients are averaged."""
    torch.multiprocessing.spawn(train_one_step, (str(tmp_path),), nprocs=2)
    mean = ((1 + 2 * 2) + (3 * 3 + 1 + 2 * 2)) / 2
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [[mean] * 4] * 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_distributed_data_parallel_moves_to_its_gpu(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(Scale().cuda(), device_ids=[0], find_unused_parameters=True)
        move_ragged_inputs(wrapped)
        boxes = RaggedBatch(torch.ones(2, 3, 4), sample_sizes=torch.tensor([1, 3]))
        sum_over_targets(wrapped({"boxes": boxes}, offset=boxes)).sum().backward()
        assert wrapped.module.weight.grad.tolist() == [4] * 4
    finally:
        dist.destroy_process_group()
