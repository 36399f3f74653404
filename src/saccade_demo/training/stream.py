"""What the detector learns from at each step: made ahead by other processes, and seen again in later steps.

To render a scene takes a core longer than a whole step takes a GPU. With V views of each sample, a forward pass of M
samples therefore has M / V new ones; the others are those of `VIEWS_APART` steps ago, in a mirror. Their images have
remained on the device. What else is to be known about them has remained in the process that made them: of W processes,
each makes every W-th step, and W divides `VIEWS_APART`.
"""

import itertools
import math
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from saccade_demo import DemoError, SampleError
from saccade_demo.data.batch import Batch, make_batch
from saccade_demo.data.source import Source
from saccade_demo.geometry import Sample, mirrored, turned
from saccade_demo.training.distribution import Ranks
from saccade_demo.training.recipe import Recipe

VIEWS_APART = 84
"""Steps from one view of a sample to the next."""


def num_samples(recipe: Recipe, steps: int) -> int:
    """How many different ones the first steps learn from, where there is no end of them."""
    return recipe.batch // recipe.views * (steps + (recipe.views - 1) * min(steps, VIEWS_APART))


class Stream(Dataset[list[Batch] | DemoError]):
    """The samples of each step that fall to one process, as the batches of its forward passes.

    A batch has the images of all its samples, or of the new ones alone, which are the first. `SeenImages` adds the
    others.
    """

    def __init__(self, source: Source, recipe: Recipe, ranks: Ranks, stride: int):
        self.source = source
        self.stride = stride
        self.views = recipe.views
        self.apart = VIEWS_APART
        self.new_of_step = recipe.batch // recipe.views
        of_passes = np.arange(self.new_of_step).reshape(-1, recipe.micro_batch // recipe.views)
        self.new = np.split(of_passes, ranks.count)[ranks.index]
        """Which of a step's new samples each of this process's passes has."""
        shape = recipe.steps, recipe.views, self.new_of_step
        self.angles = np.random.default_rng([recipe.seed, 2]).uniform(-math.pi, math.pi, shape)
        self.seen: dict[int, Sample] = {}
        """Samples that come again, by number, without their images."""

    def __getitem__(self, step: int) -> list[Batch] | DemoError:
        try:
            return [make_batch(self._samples(step, new), self.stride) for new in self.new.tolist()]
        except DemoError as error:
            return error  # raised here, it would reach the user wrapped in this process's traceback

    def _samples(self, step: int, new: list[int]) -> list[Sample]:
        """The samples of one of a step's passes: first those that are new, then those seen once before, and so on."""
        samples = []
        for view, place in itertools.product(range(self.views), new):
            # Numbers begin with those that would have been seen before the first step, had there been any.
            first_seen = step - view * self.apart + (self.views - 1) * self.apart
            sample = self._sample(first_seen * self.new_of_step + place, is_last=view == self.views - 1)
            # Which way the vehicle points must not matter: turn the coordinates under what the cameras see.
            samples.append(turned(mirrored(sample) if view % 2 else sample, self.angles[step, view, place]))
        return samples

    def _sample(self, number: int, is_last: bool) -> Sample:
        """A sample, for the last time or not; one that this process has made before comes without images."""
        sample = self.seen.pop(number, None)
        if sample is None:
            sample = self.source.training(number)
        if not is_last:
            self.seen[number] = replace(sample, images=sample.images[:0].copy())
        return sample


class SeenImages:
    """The images of the last steps, on the device."""

    def __init__(self):
        self.of_steps: deque[list[Tensor]] = deque(maxlen=VIEWS_APART)

    def completed(self, batches: list[Batch]) -> list[Batch]:
        """The batches of the next step's passes, with the images of all their samples."""
        before = self.of_steps[0] if len(self.of_steps) == self.of_steps.maxlen else [None] * len(batches)
        batches = [_with_seen(batch, seen) for batch, seen in zip(batches, before, strict=True)]
        self.of_steps.append([batch.images for batch in batches])
        return batches


def _with_seen(batch: Batch, seen: Tensor | None) -> Batch:
    """A batch whose missing images are those seen in an earlier pass, mirrored, all but that pass's oldest."""
    missing = len(batch.projection) - len(batch.images)
    if seen is None or not missing:
        return batch
    return replace(batch, images=torch.cat([batch.images, seen[:missing].flip(-1)]))


def batches_of_steps(
    source: Source, recipe: Recipe, ranks: Ranks, stride: int, device: torch.device, done: int
) -> Iterator[list[Batch]]:
    """The batches of the steps to come, on the device, made by other processes.

    Args:
        source: Where samples come from.
        recipe: How to train.
        ranks: Which of its samples are for this process.
        stride: Image pixels to a cell of the heatmap.
        device: Where the batches go.
        done: Steps that need not be made.

    Raises:
        SampleError: A sample cannot be made.
    """
    loader = DataLoader(
        Stream(source, recipe, ranks, stride),
        batch_size=None,
        sampler=range(done, recipe.steps),
        num_workers=_num_loaders(source, recipe, ranks),
        collate_fn=_as_it_is,
        pin_memory=device.type == "cuda",
        worker_init_fn=_end_with_the_trainer,
        generator=torch.Generator(),  # so that nothing is drawn from the generator of all
    )
    seen = SeenImages() if recipe.views > 1 else None
    loaded = iter(loader)
    while True:
        try:
            batches = next(loaded, None)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise SampleError(f"a process that makes samples was ended: {error}") from error
        if batches is None:
            return
        if isinstance(batches, DemoError):
            raise SampleError(str(batches)) from batches
        batches = [batch.to(device) for batch in batches]
        yield batches if seen is None else seen.completed(batches)


def _num_loaders(source: Source, recipe: Recipe, ranks: Ranks) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # The trainer needs a core for itself, and on a GPU one for the gradients.
    most = max(1, min(source.loaders, cores // ranks.local_count - 2))
    return most if recipe.views == 1 else max(number for number in range(1, most + 1) if VIEWS_APART % number == 0)


def _as_it_is(batches: Any) -> Any:
    return batches


def _end_with_the_trainer(_: int) -> None:
    """Leaves Ctrl-C to the trainer's process, and ends this one with it, however that one ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    trainer: Any = multiprocessing.parent_process()

    def end() -> None:
        trainer.join()
        os._exit(1)  # an orderly exit waits until samples are taken out of a pipe that nobody reads any more

    threading.Thread(target=end, daemon=True).start()
