"""Targets, losses, training and evaluation of the demo's detector."""

import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

import saccade
from saccade.demo import DemoError, SampleError
from saccade.demo.ahead import made_ahead
from saccade.demo.distribution import ALONE, Ranks
from saccade.demo.evaluation import MAX_RANGE, Counts, Detections, match
from saccade.demo.frame import load_frame
from saccade.demo.geometry import Sample, box_corners, project, turned
from saccade.demo.model import Detector, Output
from saccade.demo.scene import CAMERA_NAMES, CLASS_NAMES, scene
from saccade.nn import FocalLoss


def encode_boxes(boxes: np.ndarray) -> np.ndarray:
    """Boxes (M, 7) in the anchor layout (M, 11); nothing is known about velocities, they stay 0."""
    encoded = np.zeros((len(boxes), 11), dtype=np.float32)
    encoded[:, :3] = boxes[:, :3]
    encoded[:, 3:6] = np.log(boxes[:, 3:6])
    encoded[:, 6], encoded[:, 7] = np.sin(boxes[:, 6]), np.cos(boxes[:, 6])
    return encoded


def decode_boxes(anchors: np.ndarray) -> np.ndarray:
    """Anchors (M, 11) as boxes (M, 7)."""
    return np.concatenate(
        [anchors[:, :3], np.exp(anchors[:, 3:6].clip(-5, 5)), np.arctan2(anchors[:, 6:7], anchors[:, 7:8])], 1
    )


class Objects(NamedTuple):
    """How many objects there are to learn from; losses are divided by these numbers."""

    matched: int
    """Boxes that get an anchor, with a given number of anchors."""
    centers: int
    """Centres of boxes in images."""
    peaks: int
    """Cells of heatmaps with a centre in them."""


@dataclass(frozen=True)
class Batch:
    """Samples as tensors. Letters: B batch, N cameras, M boxes of a sample or image."""

    images: Tensor  # (B, N, 3, H, W)
    projection: Tensor  # (B, N, 4, 4)
    boxes: saccade.RaggedBatch  # (B, M, 11)
    labels: saccade.RaggedBatch  # (B, M); negative: ignored
    centers: saccade.RaggedBatch  # (B * N, M, 2) int32, cells of the heatmap
    radii: saccade.RaggedBatch  # (B * N, M) int32
    center_labels: saccade.RaggedBatch  # (B * N, M) int32
    lifts: saccade.RaggedBatch  # (B * N, M, 3)
    num_centers: int
    num_peaks: int

    def objects(self, num_anchors: int) -> Objects:
        """How many there are, counted without waiting for the device."""
        boxes = (self.labels.tensor >= 0) & self.labels.mask
        return Objects(int(boxes.sum(1).clamp(max=num_anchors).sum()), self.num_centers, self.num_peaks)


def make_batch(samples: Sequence[Sample], device: torch.device, stride: int) -> Batch:
    """Put samples of equal image size together, on a device."""
    centers, radii, labels, lifts = zip(*(t for s in samples for t in heatmap_objects(s, stride)), strict=True)

    def on_device(tensor: Tensor) -> Tensor:
        if device.type == "cuda":
            return tensor.pin_memory().to(device, non_blocking=True)
        return tensor

    def ragged(tensors: Sequence[np.ndarray], like: saccade.RaggedBatch | None = None) -> saccade.RaggedBatch:
        return saccade.ragged.combine_data([torch.from_numpy(t) for t in tensors], like)

    boxes = ragged([encode_boxes(s.boxes) for s in samples])
    cells = ragged(centers)
    return Batch(
        images=on_device(torch.from_numpy(np.stack([s.images for s in samples]))),
        projection=on_device(torch.from_numpy(np.stack([s.projection for s in samples]))),
        boxes=boxes,
        labels=ragged([s.labels for s in samples], boxes),
        centers=cells.to(device),
        radii=ragged(radii, cells).to(device),
        center_labels=ragged(labels, cells).to(device),
        lifts=ragged(lifts, cells).to(device),
        num_centers=sum(map(len, centers)),
        num_peaks=sum(len(np.unique(np.column_stack(c), axis=0)) for c in zip(centers, labels, strict=True)),
    )


def heatmap_objects(sample: Sample, stride: int) -> list[tuple[np.ndarray, ...]]:
    """What the heatmap of each camera shows.

    Returns:
        For each camera, of the M boxes whose centres it sees: heatmap cells (M, 2), radii (M,) and classes (M,), all
        int32, and the lift (M, 3) float32 as `Output` has it.
    """
    objects = []
    size = np.array(sample.image_wh, dtype=np.float32)
    for projection in sample.projection:
        pixel, depth = project(sample.boxes[:, :3], projection)
        corners, corner_depth = project(box_corners(sample.boxes), projection)
        seen = (
            (sample.labels >= 0) & (depth > 0.5) & (corner_depth > 0.5).all(1) & ((pixel >= 0) & (pixel < size)).all(1)
        )
        extent = np.minimum(corners.max(1), size) - np.maximum(corners.min(1), 0)
        width, height = torch.from_numpy(extent[seen].astype(np.float32) / stride).unbind(1)
        radius = saccade.gaussian_radius((height, width), 0.3, convention="mmdet").clamp(1, 8)
        origin = np.linalg.inv(projection)[:3, 3]
        away = np.linalg.norm(sample.boxes[seen, :2] - origin[:2], axis=1)
        objects.append(
            (
                (pixel[seen] / stride).astype(np.int32),
                radius.numpy().astype(np.int32),
                sample.labels[seen].astype(np.int32),
                np.concatenate([pixel[seen] / stride % 1, np.log(away / 10)[:, None]], 1).astype(np.float32),
            )
        )
    return objects


def heatmap_target(batch: Batch, shape: torch.Size) -> Tensor:
    """Class-wise Gaussians (B * N, classes, H, W) at the centres."""
    target = torch.zeros(shape, device=batch.images.device)
    saccade.draw_heatmap_batched(target, batch.centers, batch.radii, labels=batch.center_labels)
    return target


class DetectionLoss(nn.Module):
    """Focal loss over Hungarian-matched anchors, L1 over the matched boxes, Gaussian focal loss over the heatmap."""

    BOX_WEIGHTS = (0.4, 0.4, 0.4, 0.2, 0.2, 0.2, 0.2, 0.2, 0.0, 0.0, 0.0)
    """Of the eleven numbers of an anchor. One moment in time says nothing about velocity."""

    box_weights: Tensor

    def __init__(self, num_classes: int):
        super().__init__()
        self.num_classes = num_classes
        self.classification = FocalLoss(use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=2.0)
        self.register_buffer("box_weights", torch.tensor(self.BOX_WEIGHTS))

    def forward(self, output: Output, batch: Batch, objects: Objects) -> dict[str, Tensor]:
        """Losses by name, each summed over the decoder layers.

        Args:
            output: What the detector said about the batch.
            batch: The batch.
            objects: Of all batches whose losses are added; with it alone, its own.
        """
        target = heatmap_target(batch, output.heatmap.shape)
        layers = [self._layer(*layer, batch, objects) for layer in zip(output.logits, output.anchors, strict=True)]
        classes, boxes = torch.stack([torch.stack(layer) for layer in layers]).sum(0)
        peaks = target.new_full((), max(objects.peaks, 1))
        heatmap = saccade.gaussian_focal_loss_with_logits(output.heatmap, target, avg_factor=peaks)
        return {"class": classes, "box": boxes, "heatmap": heatmap, "lift": self._lift(output.lift, batch, objects)}

    def _lift(self, lift: Tensor, batch: Batch, objects: Objects) -> Tensor:
        mask = batch.centers.mask
        image = torch.arange(len(mask), device=mask.device)[:, None].expand_as(mask)[mask]
        cell, truth = batch.centers.tensor[mask].long(), batch.lifts.tensor[mask]
        # Around the centre too: the highest peak of a predicted heatmap may lie beside it.
        shift = torch.cartesian_prod(*[torch.arange(-1, 2, device=mask.device)] * 2)  # (9, 2)
        column, row = (cell[:, None] + shift).unbind(-1)
        height, width = lift.shape[-2:]
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        picked = lift[image[:, None], :, row.clamp(0, height - 1), column.clamp(0, width - 1)]  # (objects, 9, 3)
        truth = torch.cat([truth[:, None, :2] - shift, truth[:, None, 2:].expand(-1, 9, 1)], -1)
        error = (picked - truth).abs() * inside[..., None]
        return (error * error.new_tensor([0.5, 0.5, 4.0])).sum() / max(9 * objects.centers, 1)

    def _layer(self, logits: Tensor, anchors: Tensor, batch: Batch, objects: Objects) -> tuple[Tensor, Tensor]:
        batch_size, count = logits.shape[:2]
        # The assignment is made on the host: one copy of the predictions per layer.
        host_logits, host_anchors = logits.detach().cpu(), anchors.detach().cpu()
        target = torch.full((batch_size, count), self.num_classes)
        row_weight = torch.ones(batch_size, count)
        anchor_index, true_boxes = [], []
        for b, (boxes, labels) in enumerate(zip(batch.boxes.split(), batch.labels.split(), strict=True)):
            rows, columns = match_anchors(host_logits[b], host_anchors[b], boxes[labels >= 0], labels[labels >= 0])
            target[b, rows] = labels[labels >= 0][columns]
            # An anchor that sits on an ignored box may call it what it likes.
            on_ignored = (torch.cdist(host_anchors[b, :, :2], boxes[labels < 0][:, :2]) < 2).any(1)
            on_ignored[rows] = False
            row_weight[b, on_ignored] = 0
            anchor_index.append(rows + b * count)
            true_boxes.append(boxes[labels >= 0][columns])
        device = logits.device
        index, truth = torch.cat(anchor_index).to(device), torch.cat(true_boxes).to(device)
        positives = max(objects.matched, 1)
        classes = self.classification(
            logits.flatten(0, 1),
            target.flatten().to(device),
            weight=row_weight.flatten().to(device),
            avg_factor=positives,
        )
        error = (anchors.flatten(0, 1)[index] - truth).abs() * self.box_weights
        return classes, error.sum() / positives


def match_anchors(logits: Tensor, anchors: Tensor, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The cheapest one-to-one assignment of anchors (A, 11) to boxes (M, 11): indices of anchors and of their boxes."""
    p = logits.sigmoid()[:, labels].clamp(1e-6, 1 - 1e-6)  # (A, M)
    class_cost = 0.25 * (1 - p) ** 2 * -p.log() - 0.75 * p**2 * -(1 - p).log()
    cost = 2 * class_cost + 0.25 * torch.cdist(anchors[:, :2], boxes[:, :2], p=1)
    rows, columns = linear_sum_assignment(cost.nan_to_num(1e4).numpy())
    return torch.from_numpy(rows), torch.from_numpy(columns)


def decode(output: Output) -> list[Detections]:
    """The boxes of the last layer; those that stand within a better one of their class are left out."""
    found = []
    for logits, anchors in zip(output.logits[-1].sigmoid().cpu(), output.anchors[-1].cpu(), strict=True):
        scores, labels = logits.max(-1)
        order = scores.argsort(descending=True, stable=True)
        detections = Detections(decode_boxes(anchors[order].numpy()), scores[order].numpy(), labels[order].numpy())
        found.append(detections.chosen(_apart(detections)))
    return found


def _apart(detections: Detections) -> list[int]:
    """Indices of the boxes that are no second answer for an object.

    A second answer is a box of the same class whose centre is within 0.4 of the better one's longer side, or 0.75 m.
    """
    keep: list[int] = []
    for i, box in enumerate(detections.boxes):
        better = [k for k in keep if detections.labels[k] == detections.labels[i]]
        reach = np.maximum(0.4 * detections.boxes[better, 3:5].max(-1), 0.75)
        if (np.hypot(*(detections.boxes[better, :2] - box[:2]).T) >= reach).all():
            keep.append(i)
    return keep


class Source(Protocol):
    """Where samples come from."""

    name: str
    class_names: tuple[str, ...]
    num_cams: int
    loaders: int
    """How many processes may make samples to learn from, where there are as many cores."""
    training_samples: int | None
    """Different samples to learn from; None: without end."""
    trained_on: str
    evaluated_on: str

    @property
    def held_out(self) -> Sequence[Sample]:
        """The samples for evaluation."""
        ...

    def training(self, step: int) -> Sample:
        """The sample to learn from at a step; the same whenever it is asked for. A step of B samples counts as B."""
        ...

    def shown(self, image_wh: tuple[int, int]) -> tuple[Sample, Sample]:
        """One of the evaluated samples, and the same with images of another size for the pictures."""
        ...


class RenderedScenes:
    """Rendered scenes: a new one at every step, others held out for evaluation."""

    class_names: tuple[str, ...] = CLASS_NAMES
    num_cams = len(CAMERA_NAMES)
    loaders = 8
    training_samples: int | None = None
    trained_on = "rendered scenes, each seen once"

    def __init__(self, seed: int, held_out: int):
        self.seed = seed
        self.name = "held-out scene"
        self.evaluated_on = f"{held_out} held-out scenes"
        self.held_out = [scene(seed, "held-out", index) for index in range(held_out)]

    def training(self, step: int) -> Sample:
        """A scene that was never seen before."""
        return scene(self.seed, "train", step)

    def shown(self, image_wh: tuple[int, int]) -> tuple[Sample, Sample]:
        """The first held-out scene."""
        return self.held_out[0], scene(self.seed, "held-out", 0, image_wh)


class RealFrame:
    """One frame from a directory, learnt by heart: it is what the detector is evaluated on, too."""

    loaders = 1
    training_samples: int | None = 1
    evaluated_on = "one frame, which it was trained on"

    def __init__(self, directory: Path):
        self.directory = directory
        self.name = self.trained_on = f"frame {directory.resolve().name}"
        sample = load_frame(directory)
        # Boxes that are not counted are not to be learnt either.
        far = np.hypot(sample.boxes[:, 0], sample.boxes[:, 1]) > MAX_RANGE
        self.held_out = [replace(sample, labels=np.where(far, -1, sample.labels))]
        self.class_names = sample.class_names
        self.num_cams = len(sample.camera_names)

    def training(self, step: int) -> Sample:
        """The frame."""
        return self.held_out[0]

    def shown(self, image_wh: tuple[int, int]) -> tuple[Sample, Sample]:
        """The frame."""
        return self.held_out[0], replace(load_frame(self.directory, image_wh), labels=self.held_out[0].labels)


@dataclass(frozen=True)
class Recipe:
    """How to train. The same recipe, source and model give the same losses."""

    steps: int
    seed: int = 0
    batch: int = 1
    """Samples of a step, in all processes together."""
    micro_batch: int = 1
    """Samples of a forward pass, over which batch normalization takes its statistics."""
    amp: str = "off"
    compiled: bool = False
    learning_rate: float = 2e-3


class _Stream(Dataset[list[Sample] | DemoError]):
    """The samples of each step that fall to one process, turned."""

    def __init__(self, source: Source, recipe: Recipe, ranks: Ranks):
        self.source = source
        self.batch = recipe.batch
        self.share = recipe.batch // ranks.count
        self.before = ranks.index * self.share
        self.angles = np.random.default_rng([recipe.seed, 2]).uniform(-math.pi, math.pi, recipe.steps * recipe.batch)

    def __getitem__(self, step: int) -> list[Sample] | DemoError:
        first = step * self.batch + self.before
        try:
            # Which way the vehicle points must not matter: turn the coordinates under what the cameras see.
            return [turned(self.source.training(i), self.angles[i]) for i in range(first, first + self.share)]
        except DemoError as error:
            return error  # raised here, it would reach the user wrapped in this process's traceback


def _as_it_is(samples: Any) -> Any:
    return samples


def _end_with_the_trainer(_: int) -> None:
    """Leaves Ctrl-C to the trainer's process, and ends this one with it, however that one ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    trainer: Any = multiprocessing.parent_process()

    def end() -> None:
        trainer.join()
        os._exit(1)  # an orderly exit waits until samples are taken out of a pipe that nobody reads any more

    threading.Thread(target=end, daemon=True).start()


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
        # For training alone: few evaluations are not worth another compilation.
        self._trained: Any = torch.compile(self.model) if recipe.compiled else self.model
        if ranks.count > 1:
            self._trained = DistributedDataParallel(self._trained, gradient_as_bucket_view=True)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=recipe.learning_rate, weight_decay=1e-2)
        warm_up = max(1, recipe.steps // 15)
        decay = max(1, recipe.steps - warm_up)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda i: min((i + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * min(1, max(0, i - warm_up) / decay))),
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.amp == "fp16")
        self.last_learning_rate = 0.0
        """That of the last step."""

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

    def _made_ahead(self) -> Iterator[list[Sample] | DemoError]:
        """The samples of the steps to come, made by other processes."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        loader = DataLoader(
            _Stream(self.source, self.recipe, self.ranks),
            batch_size=None,
            sampler=range(self.step, self.recipe.steps),
            num_workers=max(1, min(self.source.loaders, cores // self.ranks.local_count - 1)),
            collate_fn=_as_it_is,  # arrays go through pipes; tensors would need room in shared memory
            worker_init_fn=_end_with_the_trainer,
            generator=torch.Generator(),  # so that nothing is drawn from the generator of all
        )
        return iter(loader)

    def train(self, stopped: Callable[[], bool] = lambda: False) -> Iterator[dict[str, float]]:
        """Train what is left of the steps, telling the losses of each by name, `total` among them.

        Args:
            stopped: Asked after every step whether to make it the last. One rank that says so stops all.
        """
        if self.step == self.recipe.steps:
            return
        for samples in self._made_ahead():
            if isinstance(samples, DemoError):
                raise SampleError(str(samples)) from samples
            self.model.train()
            self.optimizer.zero_grad(set_to_none=True)
            losses = self._backward(samples)
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), 10.0)
            scale = self.scaler.get_scale()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.last_learning_rate = self.optimizer.param_groups[0]["lr"]
            if self.scaler.get_scale() >= scale:  # else the step was skipped, for float16 overflowed
                self.schedule.step()
            self.step += 1
            stop = torch.full((1,), float(stopped()), device=self.device)
            *values, stop = self.ranks.sum(torch.cat([torch.stack(list(losses.values())), stop])).tolist()
            if not math.isfinite(values[-1]):
                raise DemoError(f"the loss is {values[-1]} at step {self.step} (with --amp {self.recipe.amp})")
            yield dict(zip(losses, values, strict=True))
            if stop:
                return

    def _backward(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Gradients of a step, from the samples of this rank and, by DistributedDataParallel, the others'.

        Returns:
            This rank's share of the losses.
        """
        size = self.recipe.micro_batch
        batches = [
            make_batch(samples[first : first + size], self.device, self.model.STRIDE)
            for first in range(0, len(samples), size)
        ]
        counts = [batch.objects(self.model.config.num_anchors) for batch in batches]
        objects = Objects(*self.ranks.sum(torch.tensor(counts).sum(0)).tolist())
        told: dict[str, Tensor] = {}
        for index, batch in enumerate(batches):
            # Whatever the model draws depends on the samples alone: it is the same after resuming and with other ranks.
            seed = [self.recipe.seed, 4, self.step, self.ranks.index * len(batches) + index]
            torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
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

    def detect(self, sample: Sample) -> tuple[Detections, Batch, Output]:
        """What the detector finds in a sample, with the batch made of it and the raw output."""
        self.model.eval()
        batch = make_batch([sample], self.device, self.model.STRIDE)
        with torch.no_grad(), self._autocast():
            output = self.model(batch.images, batch.projection)
        return decode(output)[0], batch, output

    def evaluate(
        self, *, exchange_images: bool = False, first: int | None = None, done: Callable[[], None] = lambda: None
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
        try:
            for sample in made_ahead(held_out.__getitem__, mine, self.source.loaders):
                seen = replace(sample, images=np.roll(sample.images, 1, axis=0)) if exchange_images else sample
                counts += match(self.detect(seen)[0], sample.boxes, sample.labels)
                done()
        except DemoError as error:
            raise SampleError(str(error)) from error
        return Counts(*self.ranks.sum(torch.tensor(astuple(counts))).tolist())

    def counted(self, detections: Detections, sample: Sample) -> Counts:
        """How detections compare with the truth of a sample."""
        return match(detections, sample.boxes, sample.labels)
