"""Training and evaluation of the demo's detector."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from saccade_demo import DemoError, SampleError
from saccade_demo.data.ahead import OnItsWay, made_ahead
from saccade_demo.data.batch import Batch, Objects, decode_boxes, make_batch
from saccade_demo.data.source import Source
from saccade_demo.evaluation import Counts, Detections, match
from saccade_demo.geometry import Sample
from saccade_demo.model import Detector, Output
from saccade_demo.training.distribution import ALONE, Ranks
from saccade_demo.training.loss import DetectionLoss
from saccade_demo.training.recipe import Recipe
from saccade_demo.training.stream import batches_of_steps

EVALUATED_AT_ONCE = {"cpu": 1, "cuda": 8}
"""Samples of a forward pass where nothing is learnt, by device."""
READ_AHEAD = 8
"""Held-out samples."""


def decode(output: Output) -> list[Detections]:
    """The boxes of the last layer; those that stand within a better one of their class are left out."""
    found = []
    for logits, anchors in zip(output.logits[-1].sigmoid().cpu(), output.anchors[-1].cpu(), strict=True):
        scores, labels = logits.max(-1)
        order = scores.argsort(descending=True, stable=True)
        detections = Detections(decode_boxes(anchors[order].numpy()), scores[order].numpy(), labels[order].numpy())
        found.append(detections.chosen(_apart(detections)))
    return found


def _apart(detections: Detections) -> np.ndarray:
    """A mask of the boxes, by falling score, that are no second answer for an object.

    A second answer is a box of the same class whose centre is within 0.4 of the better one's longer side, or 0.75 m.
    """
    boxes, labels = detections.boxes, detections.labels
    distance = np.hypot(*(boxes[:, None, :2] - boxes[None, :, :2]).transpose(2, 0, 1))
    reach = np.maximum(0.4 * boxes[:, 3:5].max(-1), 0.75)
    near = (distance < reach[:, None]) & (labels[:, None] == labels)
    keep = np.ones(len(boxes), dtype=bool)
    for i, beside in enumerate(near):
        if keep[i]:
            keep[i + 1 :] &= ~beside[i + 1 :]
    return keep


class Told:
    """What is told of a step; its losses may still be on their way from the device."""

    def __init__(self, step: int, amp: str, learning_rate: float, waited: float, names: Sequence[str], values: Tensor):
        self.step = step
        self.learning_rate = learning_rate
        self.waited = waited
        """Seconds until the samples were there."""
        self._amp = amp
        self._names = names
        self._values = OnItsWay(values)

    def losses(self) -> dict[str, float]:
        """By name, `total` among them. Waits for the step to be done, but for nothing that comes after it.

        Raises:
            DemoError: They are not finite.
        """
        losses = dict(zip(self._names, self._values.arrived().tolist(), strict=True))
        if not math.isfinite(losses["total"]):
            raise DemoError(f"the loss is {losses['total']} at step {self.step} (with --amp {self._amp})")
        return losses


class Trainer:
    """A detector, and what is needed to train and evaluate it on one device, beside others if there are more ranks."""

    def __init__(self, source: Source, model: Detector, device: torch.device, recipe: Recipe, ranks: Ranks = ALONE):
        self.source = source
        self.device = device
        self.recipe = recipe
        self.ranks = ranks
        self.step = 0
        """Steps made so far."""
        self.model = model.to(device)
        self.loss = DetectionLoss(len(source.class_names)).to(device)
        self._trained: Any = self._compiled() if recipe.compiled else self.model
        if ranks.count > 1:
            # Not with gradients as views of buckets: how these are aligned could change the order in which the norm is
            # summed by which gradients are clipped, and with it the last bits.
            self._trained = DistributedDataParallel(self._trained)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=recipe.learning_rate, weight_decay=1e-2, fused=True
        )
        warm_up = max(1, recipe.steps // 15)
        decay = max(1, recipe.steps - warm_up)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda i: min((i + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * min(1, max(0, i - warm_up) / decay))),
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.amp == "fp16")

    def _compiled(self) -> Any:
        """The model for training alone: few evaluations are not worth another compilation."""
        # On a GPU the host is what takes longest: a recorded graph is begun as one. But neither DistributedDataParallel
        # nor gradients that are added up get along with gradients that lie where the next pass writes its own.
        is_one_pass = self.ranks.count == 1 and self.recipe.micro_batch == self.recipe.batch
        graphs = self.device.type == "cuda" and is_one_pass
        return torch.compile(self.model, mode="reduce-overhead" if graphs else None)

    def state_dict(self) -> dict[str, Any]:
        """All that training goes on from."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]

    def _autocast(self) -> AbstractContextManager:
        dtype = torch.float16 if self.recipe.amp == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.recipe.amp != "off")

    def train(self, stopped: Callable[[], bool] = lambda: False) -> Iterator[Told]:
        """Train what is left of the steps, telling of each as soon as the device knows what to do.

        Args:
            stopped: Asked after every step whether to make it the last. One rank that says so stops all.
        """
        if self.step == self.recipe.steps:
            return
        steps = batches_of_steps(self.source, self.recipe, self.ranks, self.model.STRIDE, self.device, self.step)
        while True:
            before = time.perf_counter()
            batches = next(steps, None)
            waited = time.perf_counter() - before
            if batches is None:
                return
            self.model.train()
            self.optimizer.zero_grad(set_to_none=True)
            losses = self._backward(batches)
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), 10.0)
            learning_rate = self.optimizer.param_groups[0]["lr"]
            scale = self.scaler.get_scale()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.scaler.get_scale() >= scale:  # else the step was skipped, for float16 overflowed
                self.schedule.step()
            self.step += 1
            stop = self.ranks.sum(torch.tensor(float(stopped())))
            values = self.ranks.sum(torch.stack(list(losses.values())))
            yield Told(self.step, self.recipe.amp, learning_rate, waited, list(losses), values)
            if stop:
                return

    def _backward(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Gradients of a step, from the batches of this rank and, by DistributedDataParallel, the others'.

        Returns:
            This rank's share of the losses.
        """
        counts = torch.tensor([batch.objects(self.model.config.num_anchors) for batch in batches]).sum(0)
        objects = Objects(*self.ranks.sum(counts).tolist())
        told: dict[str, Tensor] = {}
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            with nullcontext() if last or self.ranks.count == 1 else self._trained.no_sync():
                with self._autocast():
                    output = self._trained(batch.images, batch.projection)
                losses = self.loss(output, batch, objects)
                losses["total"] = torch.stack(list(losses.values())).sum()
                # Objects are counted over all ranks, so the losses are to be added: of the ranks' gradients
                # DistributedDataParallel takes the mean.
                self.scaler.scale(losses["total"] * self.ranks.count).backward()
            for name, loss in losses.items():
                told[name] = told[name] + loss.detach() if name in told else loss.detach()
        return told

    def output(self, batch: Batch) -> Output:
        """What the detector says about a batch, which is on its device; nothing is learnt."""
        self.model.eval()
        with torch.no_grad(), self._autocast():
            return self.model(batch.images, batch.projection)

    def detect(self, sample: Sample) -> tuple[Detections, Batch, Output]:
        """What the detector finds in a sample, with the batch made of it and the raw output."""
        batch = make_batch([sample], self.model.STRIDE).to(self.device)
        output = self.output(batch)
        return decode(output)[0], batch, output

    def detections(self, samples: Iterable[Sample]) -> Iterator[tuple[Sample, Detections]]:
        """What the detector finds in samples, some of which it looks at together."""
        remaining = iter(samples)
        while together := list(islice(remaining, EVALUATED_AT_ONCE[self.device.type])):
            output = self.output(make_batch(together, self.model.STRIDE).to(self.device))
            yield from zip(together, decode(output), strict=True)

    def evaluate(
        self,
        *,
        exchange_images: bool = False,
        first: int | None = None,
        done: Callable[[Sample], None] = lambda sample: None,
    ) -> Counts:
        """Counts over all held-out samples, of which every rank looks at its share.

        Args:
            exchange_images: Give every camera the image of its neighbour, but not its projection matrix.
            first: Look at no more than so many samples.
            done: Called after each sample.

        Raises:
            SampleError: A sample of this rank's share cannot be made.
        """
        self.ranks.copy_of_first(self.model.buffers())  # statistics of batch normalization differ a little
        counts = Counts()
        held_out = self.source.held_out
        end = len(held_out) if first is None else min(first, len(held_out))
        mine = range(self.ranks.index, end, self.ranks.count)
        samples = made_ahead(held_out.__getitem__, mine, READ_AHEAD)
        if exchange_images:
            samples = (replace(sample, images=np.roll(sample.images, 1, axis=0)) for sample in samples)
        try:
            for sample, found in self.detections(samples):
                counts += match(found, sample.boxes, sample.labels)
                done(sample)
        except DemoError as error:
            raise SampleError(str(error)) from error
        return Counts(*self.ranks.sum(torch.tensor(astuple(counts))).tolist())

    def counted(self, detections: Detections, sample: Sample) -> Counts:
        """How detections compare with the truth of a sample."""
        return match(detections, sample.boxes, sample.labels)
