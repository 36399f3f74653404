"""Samples put together for the detector and its losses, and boxes in the numbers that the detector has them in."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import saccade
from saccade import RaggedBatch
from saccade_demo.geometry import Sample, box_corners, project


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
    """Samples as tensors. Letters: B batch, N cameras, M boxes of a sample or image, I ignored boxes of a sample.

    It goes through the pipes between processes as arrays: tensors would need room in shared memory.
    """

    images: Tensor  # (B, N, 3, H, W) uint8; fewer than B while the device already has those of the last samples
    projection: Tensor  # (B, N, 4, 4)
    boxes: RaggedBatch  # (B, M, 11), those to be found
    labels: RaggedBatch  # (B, M)
    ignored: RaggedBatch  # (B, I, 2) centres in the ground plane of boxes that are neither to be found nor wrong
    centers: RaggedBatch  # (B * N, M, 2) int32, cells of the heatmap
    radii: RaggedBatch  # (B * N, M) int32
    center_labels: RaggedBatch  # (B * N, M) int32
    lifts: RaggedBatch  # (B * N, M, 3)
    num_boxes: tuple[int, ...]  # of each sample: on the host, nobody has to wait for the device to know
    num_centers: int
    num_peaks: int

    def objects(self, num_anchors: int) -> Objects:
        """How many there are."""
        return Objects(sum(min(number, num_anchors) for number in self.num_boxes), self.num_centers, self.num_peaks)

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device; from page-locked memory it gets there while the host goes on."""
        return self._changed(lambda part: part.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory, as `DataLoader` asks for it."""
        return self._changed(lambda part: part.pin_memory())

    def _changed(self, change: Callable[[Any], Any]) -> "Batch":
        parts = {name: part for name, part in vars(self).items() if isinstance(part, (Tensor, RaggedBatch))}
        return replace(self, **{name: change(part) for name, part in parts.items()})

    def __getstate__(self) -> dict[str, Any]:
        state = dict(vars(self))
        for name, part in state.items():
            if isinstance(part, RaggedBatch):
                state[name] = part.tensor.numpy(), part.sample_sizes.numpy()
            elif isinstance(part, Tensor):
                state[name] = part.numpy()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, part in state.items():
            if isinstance(part, np.ndarray):
                part = torch.from_numpy(part)
            elif isinstance(part, tuple) and isinstance(part[0], np.ndarray):
                tensor, sizes = map(torch.from_numpy, part)
                part = RaggedBatch(tensor, sample_sizes=sizes)
            object.__setattr__(self, name, part)


def make_batch(samples: Sequence[Sample], stride: int) -> Batch:
    """Put samples of equal image size together, on the host.

    Args:
        samples: At least one; those that come without images (0, 3, H, W) are the last.
        stride: Image pixels to a cell of the heatmap.
    """
    wanted = [sample.labels >= 0 for sample in samples]
    boxes = _ragged([encode_boxes(s.boxes[which]) for s, which in zip(samples, wanted, strict=True)])
    centers, radii, labels, lifts = zip(*(t for s in samples for t in heatmap_objects(s, stride)), strict=True)
    cells = _ragged(centers)
    return Batch(
        images=torch.from_numpy(np.stack([s.images for s in samples if len(s.images)])),
        projection=torch.from_numpy(np.stack([s.projection for s in samples])),
        boxes=boxes,
        labels=_ragged([s.labels[which] for s, which in zip(samples, wanted, strict=True)], boxes),
        ignored=_ragged([s.boxes[~which, :2] for s, which in zip(samples, wanted, strict=True)]),
        centers=cells,
        radii=_ragged(radii, cells),
        center_labels=_ragged(labels, cells),
        lifts=_ragged(lifts, cells),
        num_boxes=tuple(int(which.sum()) for which in wanted),
        num_centers=sum(map(len, centers)),
        num_peaks=sum(len(np.unique(np.column_stack(c), axis=0)) for c in zip(centers, labels, strict=True)),
    )


def _ragged(arrays: Sequence[np.ndarray], like: RaggedBatch | None = None) -> RaggedBatch:
    return saccade.ragged.combine_data([torch.from_numpy(array) for array in arrays], like)


def heatmap_objects(sample: Sample, stride: int) -> list[tuple[np.ndarray, ...]]:
    """What the heatmap of each camera shows.

    Returns:
        For each camera, of the M boxes whose centres it sees: heatmap cells (M, 2), radii (M,) and classes (M,), all
        int32, and the lift (M, 3) float32 as `Output` has it.
    """
    objects = []
    size = np.array(sample.image_wh, dtype=np.float32)
    all_corners = box_corners(sample.boxes)
    for projection in sample.projection:
        pixel, depth = project(sample.boxes[:, :3], projection)
        corners, corner_depth = project(all_corners, projection)
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
