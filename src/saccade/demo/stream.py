"""What the detector learns from at each step: made ahead by other processes, and seen again in later steps.

To render a scene takes a core longer than a whole step takes a GPU. With V views of each sample, a forward pass of M
samples therefore has M / V new ones; the others are those of `VIEWS_APART` steps ago, in a mirror. Their images have
remained on the device. What else is to be known about them has remained in the process that made them: of W processes,
each makes every W-th step, and W divides `VIEWS_APART`.
"""

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

from saccade.demo import DemoError, SampleError
from saccade.demo.batch import Batch, make_batch
from saccade.demo.distribution import Ranks
from saccade.demo.geometry import Sample, mirrored, turned
from saccade.demo.recipe import Recipe
from saccade.demo.source import Source

VIEWS_APART = 84
"""Steps from one view of a sample to the next."""


def num_samples(recipe: Recipe, steps: int) -> int:
    """How many different ones the first steps learn from, where there is no end of them."""
    return recipe.batch // recipe.views * (steps + (recipe.views - 1) * min(steps, VIEWS_APART))


class Stream(Dataset[list[Batch] | DemoError]):
    """The samples of each step that fall to one process, as the batches of its forward passes.

    A batch has the images of all its samples, or of the new ones alone, which are the first. `Views` adds the others.
    """

    def __init__(self, source: Source, recipe: Recipe, ranks: Ranks, stride: int):
        self.source = source
        self.views = recipe.views
        self.apart = VIEWS_APART
        self.stride = stride
        self.new = recipe.micro_batch // recipe.views
        """Samples of a pass that are seen for the first time."""
        passes = recipe.batch // recipe.micro_batch
        self.mine = np.split(np.arange(passes), ranks.count)[ranks.index]
        shape = recipe.steps, passes, recipe.views, self.new
        self.angles = np.random.default_rng([recipe.seed, 2]).uniform(-math.pi, math.pi, shape)
        self.seen: dict[int, Sample] = {}
        """Without images."""

    def __getitem__(self, step: int) -> list[Batch] | DemoError:
        try:
            return [make_batch(self._samples(step, number), self.stride) for number in self.mine.tolist()]
        except DemoError as error:
            return error  # raised here, it would reach the user wrapped in this process's traceback

    def _samples(self, step: int, number: int) -> list[Sample]:
        """The samples of one of a step's passes, first those that are new, then those seen once before, and so on."""
        samples = []
        for view, index in np.ndindex(self.views, self.new):
            # Those that begin with a later view are counted as if they had been seen before the first step.
            begun = step + (self.views - 1 - view) * self.apart
            sample = self._sample((begun * self.angles.shape[1] + number) * self.new + index, view)
            # Which way the vehicle points must not matter: turn the coordinates under what the cameras see.
            samples.append(turned(mirrored(sample) if view % 2 else sample, self.angles[step, number, view, index]))
        return samples

    def _sample(self, number: int, view: int) -> Sample:
        """One that this process has seen already comes without images."""
        sample = self.seen.pop(number, None) or self.source.training(number)
        if view < self.views - 1:
            self.seen[number] = replace(sample, images=sample.images[:0].copy())
        return sample


class Views:
    """The images of the last steps, on the device."""

    def __init__(self):
        self.steps: deque[list[Tensor]] = deque(maxlen=VIEWS_APART)

    def completed(self, batches: list[Batch]) -> list[Batch]:
        """The batches of the next step's passes, with the images of all their samples."""
        for number, batch in enumerate(batches):
            missing = len(batch.projection) - len(batch.images)
            if missing:
                seen = self.steps[0][number][:missing].flip(-1)
                batches[number] = replace(batch, images=torch.cat([batch.images, seen]))
        self.steps.append([batch.images for batch in batches])
        return batches


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
    views = Views() if recipe.views > 1 else None
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
        yield batches if views is None else views.completed(batches)


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
