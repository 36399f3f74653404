"""The losses of the demo's detector: all decoder layers and all samples at once, as ragged batches."""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

import saccade
from saccade import RaggedBatch
from saccade.nn import FocalLoss
from saccade.ragged import batched_indexing_access, batched_inverse_indexing_access
from saccade_demo.data.ahead import OnItsWay
from saccade_demo.data.batch import Batch, Objects
from saccade_demo.model import Output

IGNORED_WITHIN = 2.0
"""Metres from an ignored box within which an anchor may call it what it likes."""


def heatmap_target(batch: Batch, shape: torch.Size) -> Tensor:
    """Class-wise Gaussians (B * N, classes, H, W) at the centres."""
    _, classes, height, width = shape
    return saccade.heatmap_targets(
        batch.centers, batch.radii, (height, width), labels=batch.center_labels, num_classes=classes
    )


class DetectionLoss(nn.Module):
    """Focal loss over Hungarian-matched anchors, L1 over the matched boxes, Gaussian focal loss over the heatmap.

    Letters: L decoder layers, B batch, A anchors, C classes, M boxes of a sample, K pairs of an anchor and a box,
    I ignored boxes, N cameras.
    """

    BOX_WEIGHTS = (0.4, 0.4, 0.4, 0.2, 0.2, 0.2, 0.2, 0.2, 0.0, 0.0, 0.0)
    """Of the eleven numbers of an anchor. One moment in time says nothing about velocity."""
    LIFT_WEIGHTS = (0.5, 0.5, 4.0)

    box_weights: Tensor
    lift_weights: Tensor
    around: Tensor

    def __init__(self, num_classes: int):
        super().__init__()
        self.num_classes = num_classes
        # A little more than the usual 0.25: at a score of 0.3, recall and precision are then about equal.
        self.classification = FocalLoss(use_sigmoid=True, gamma=2.0, alpha=0.3, loss_weight=2.0)
        self.register_buffer("box_weights", torch.tensor(self.BOX_WEIGHTS))
        self.register_buffer("lift_weights", torch.tensor(self.LIFT_WEIGHTS))
        self.register_buffer("around", torch.cartesian_prod(torch.arange(-1, 2), torch.arange(-1, 2)))  # (9, 2)

    def forward(self, output: Output, batch: Batch, objects: Objects) -> dict[str, Tensor]:
        """Losses by name, each summed over the decoder layers.

        Args:
            output: What the detector said about the batch.
            batch: The batch, on the same device.
            objects: Of all batches whose losses are added; with it alone, its own.
        """
        logits, anchors = torch.stack(output.logits), torch.stack(output.anchors)  # (L, B, A, C), (L, B, A, 11)
        cost = OnItsWay(matching_cost(logits.detach(), anchors.detach(), batch.boxes, batch.labels))
        # These do not need the assignment: the device is busy with them while the host makes it.
        target = heatmap_target(batch, output.heatmap.shape)
        heatmap = saccade.gaussian_focal_loss_with_logits(output.heatmap, target, avg_factor=max(objects.peaks, 1))
        lift = self._lift(output.lift, batch, objects)
        pairs = torch.from_numpy(assignment(cost.arrived().numpy(), batch.num_boxes))
        classes, boxes = self._matched(logits, anchors, pairs, batch, objects)
        return {"class": classes, "box": boxes, "heatmap": heatmap, "lift": lift}

    def _matched(
        self, logits: Tensor, anchors: Tensor, pairs: Tensor, batch: Batch, objects: Objects
    ) -> tuple[Tensor, Tensor]:
        """Losses of classes and boxes, of pairs (2, L, B, K) of an anchor and a box."""
        layers, _, count, _ = logits.shape
        sizes = batch.boxes.sample_sizes.clamp(max=count).expand(layers, -1)
        if logits.is_cuda:
            pairs = pairs.pin_memory().to(logits.device, non_blocking=True)
        of_anchors, of_boxes = (RaggedBatch(index, sample_sizes=sizes) for index in pairs.unbind())
        labels = batched_indexing_access(batch.labels.tensor.expand(layers, -1, -1), of_boxes)  # (L, B, K)
        truth = batched_indexing_access(batch.boxes.tensor.expand(layers, -1, -1, -1), of_boxes)  # (L, B, K, 11)
        found = batched_indexing_access(anchors, of_anchors)
        target = batched_inverse_indexing_access(labels, of_anchors, count, self.num_classes)  # (L, B, A)
        free = _beside(anchors.detach(), batch.ignored) & (target == self.num_classes)
        positives = max(objects.matched, 1)
        classes = self.classification(
            logits.flatten(0, 2), target.flatten(), weight=(~free).flatten(), avg_factor=positives
        )
        error = (found.tensor - truth.tensor).abs() * self.box_weights  # in the padding both are 0
        return classes, error.sum() / positives

    def _lift(self, lift: Tensor, batch: Batch, objects: Objects) -> Tensor:
        """Of `lift` (B * N, 3, H, W), in the cells of the centres and around them.

        Around them too, for the highest peak of a predicted heatmap may lie beside the centre.
        """
        height, width = lift.shape[-2:]
        column, row = (batch.centers.tensor[:, :, None] + self.around).unbind(-1)  # (B * N, M, 9)
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height) & batch.centers.mask[..., None]
        cell = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
        index = RaggedBatch(cell.flatten(1), sample_sizes=len(self.around) * batch.centers.sample_sizes)
        picked = batched_indexing_access(lift.flatten(2).mT, index).tensor.unflatten(1, (-1, len(self.around)))
        corner, away = batch.lifts.tensor[:, :, None].split([2, 1], -1)
        truth = torch.cat([corner - self.around, away.expand(-1, -1, len(self.around), -1)], -1)  # (B * N, M, 9, 3)
        error = (picked - truth).abs() * inside[..., None] * self.lift_weights
        return error.sum() / max(len(self.around) * objects.centers, 1)


def _beside(anchors: Tensor, ignored: RaggedBatch) -> Tensor:
    """(L, B, A) whether anchors (L, B, A, 11) stand where there is an ignored box."""
    distance = (anchors[..., None, :2] - ignored.tensor[:, None]).square().sum(-1)  # (L, B, A, I)
    return ((distance < IGNORED_WITHIN**2) & ignored.mask[:, None]).any(-1)


def matching_cost(logits: Tensor, anchors: Tensor, boxes: RaggedBatch, labels: RaggedBatch) -> Tensor:
    """What it costs to match an anchor with a box, (L, B, A, M); anything in the padding of the boxes.

    Args:
        logits: (L, B, A, C).
        anchors: (L, B, A, 11).
        boxes: (B, M, 11).
        labels: (B, M).
    """
    p = logits.sigmoid().clamp(1e-6, 1 - 1e-6)
    of_class = 0.25 * (1 - p) ** 2 * -p.log() - 0.75 * p**2 * -(1 - p).log()  # (L, B, A, C)
    label = labels.tensor[:, None].expand(*logits.shape[:-1], -1)  # (L, B, A, M)
    distance = (anchors[..., None, :2] - boxes.tensor[:, None, :, :2]).abs().sum(-1)
    return (2 * of_class.gather(-1, label) + 0.25 * distance).nan_to_num(1e4)


def assignment(cost: np.ndarray, num_boxes: Sequence[int]) -> np.ndarray:
    """The cheapest one-to-one assignments.

    Args:
        cost: (L, B, A, M).
        num_boxes: B numbers of boxes, at most M.

    Returns:
        (2, L, B, K) anchors and their boxes, K = min(A, M); of a sample with fewer pairs the rest is 0.
    """
    layers, _, anchors, width = cost.shape
    pairs = np.zeros((2, *cost.shape[:2], min(anchors, width)), dtype=np.int64)
    for layer, (sample, number) in itertools.product(range(layers), enumerate(num_boxes)):
        matched = linear_sum_assignment(cost[layer, sample, :, :number])
        pairs[:, layer, sample, : min(anchors, number)] = matched
    return pairs
