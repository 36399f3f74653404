"""A loss in the manner of DETR, of all layers of a decoder, in three forms: what ``ragged.py`` sets beside one another.

Each layer names a class and a box for each query. Each object is matched with one query; all others are background. The
loss is the focal loss of all queries and the L1 and generalized IoU losses of the matched pairs, summed over layers and
divided by the number of objects. All forms have the same matching and the same losses; they differ in what they loop
over.

Letters: L layers, B samples, Q queries, C classes, M the largest number of objects of a sample, at most Q.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import saccade
from saccade import RaggedBatch
from saccade.ragged import batched_indexing_access, batched_inverse_indexing_access, sum_over_targets


class Objects(NamedTuple):
    """What is to be found in each sample; centres and sizes of boxes are in fractions of the image."""

    labels: list[Tensor]  # B of (n,) int64
    boxes: list[Tensor]  # B of (n, 4), centre and size


class RaggedObjects(NamedTuple):
    """The same as ragged batches."""

    labels: RaggedBatch  # (B, M)
    boxes: RaggedBatch  # (B, M, 4)


Matched = Sequence[Sequence[Tensor]]  # L of B of (n,) int64: the query of each object


def box_loss(
    boxes: Tensor,  # (..., 4)
    true_boxes: Tensor,  # (..., 4), broadcast with boxes
) -> Tensor:  # (...)
    """5 times the L1 distance and 2 times 1 - GIoU, DETR's weights."""
    difference = (boxes - true_boxes).abs()
    of_centers, of_sizes = difference.split(2, -1)
    sizes, true_sizes = boxes[..., 2:], true_boxes[..., 2:]
    both_sizes = sizes + true_sizes
    overlap = (both_sizes - torch.maximum(2 * of_centers, of_sizes)) / 2  # along x and y; negative if they are apart
    intersection = _area(overlap.clamp(min=0))
    union = _area(sizes) + _area(true_sizes) - intersection
    hull = _area(both_sizes - overlap)
    return 5 * difference.sum(-1) + 2 * (2 - intersection / union - union / hull)


def _area(sizes: Tensor) -> Tensor:
    width, height = sizes.unbind(-1)
    return width * height


# ---- the loss of a given matching


def loop_over_samples(logits: Tensor, boxes: Tensor, objects: Objects, matched: Matched) -> Tensor:
    """Of logits (L, B, Q, C) and boxes (L, B, Q, 4): each sample of each layer by itself."""
    queries, classes = logits.shape[-2:]
    of_classes = of_boxes = 0.0
    for layer in zip(logits, boxes, matched, strict=True):
        for one_logits, one_boxes, query, labels, true_boxes in zip(*layer, *objects, strict=True):
            target = labels.new_full((queries,), classes)  # background
            target[query] = labels
            of_classes = of_classes + saccade.sigmoid_focal_loss(one_logits, target, reduction="sum")
            of_boxes = of_boxes + box_loss(one_boxes[query], true_boxes).sum()
    return (of_classes + of_boxes) / _count(objects)


def loop_over_layers(logits: Tensor, boxes: Tensor, objects: Objects, matched: Matched) -> Tensor:
    """As DETR has it: the objects of all samples end to end, with an index of the sample beside that of the query."""
    samples, queries, classes = logits.shape[1:]
    labels, true_boxes = torch.cat(objects.labels), torch.cat(objects.boxes)
    sample = torch.cat([torch.full_like(each, number) for number, each in enumerate(objects.labels)])
    of_classes = of_boxes = 0.0
    for layer_logits, layer_boxes, layer_matched in zip(logits, boxes, matched, strict=True):
        query = torch.cat(list(layer_matched))
        target = labels.new_full((samples, queries), classes)
        target[sample, query] = labels
        of_classes = of_classes + saccade.sigmoid_focal_loss(layer_logits, target, reduction="sum")
        of_boxes = of_boxes + box_loss(layer_boxes[sample, query], true_boxes).sum()
    return (of_classes + of_boxes) / _count(objects)


def _count(objects: Objects) -> int:
    return max(sum(map(len, objects.labels)), 1)


def at_once(
    logits: Tensor,
    boxes: Tensor,
    objects: RaggedObjects,
    matched: RaggedBatch,  # (L, B, M)
) -> Tensor:
    """All layers and samples at once, as in ``docs/ragged.md``."""
    layers, _, queries, classes = logits.shape
    labels = objects.labels.tensor.expand(layers, -1, -1)
    target = batched_inverse_indexing_access(labels, matched, queries, filler_value=classes)
    of_classes = saccade.sigmoid_focal_loss(logits, target, reduction="sum")
    found = batched_indexing_access(boxes, matched, filler_value=1)  # no box of size 0 in the padding, to divide by
    of_boxes = sum_over_targets(found.apply(lambda found: box_loss(found, objects.boxes.tensor))).sum()
    return (of_classes + of_boxes) / objects.boxes.sample_sizes.sum().clamp(min=1)


# ---- the matching, on the host


def matching_cost(
    logits: Tensor,  # (*B, Q, C)
    boxes: Tensor,  # (*B, Q, 4)
    labels: Tensor,  # (*B, M), or what broadcasts to that
    true_boxes: Tensor,  # (*B, M, 4), likewise
) -> Tensor:  # (*B, Q, M)
    """What it costs to match a query with an object."""
    p = logits.sigmoid()
    p_of_label = p.gather(-1, labels[..., None, :].expand(*p.shape[:-1], -1))
    return box_loss(boxes[..., :, None, :], true_boxes[..., None, :, :]) - p_of_label


def _queries(cost: np.ndarray) -> np.ndarray:
    """Of a cost (Q, n), the query (n,) of each object in the cheapest assignment."""
    return linear_sum_assignment(cost.T)[1]


@torch.no_grad()
def match_each_sample(logits: Tensor, boxes: Tensor, objects: Objects) -> Matched:
    """Cost and assignment for each sample of each layer by itself."""
    return [
        [
            torch.from_numpy(_queries(matching_cost(*sample).cpu().numpy())).to(logits.device)
            for sample in zip(*layer, *objects, strict=True)
        ]
        for layer in zip(logits, boxes, strict=True)
    ]


@torch.no_grad()
def match_each_layer(logits: Tensor, boxes: Tensor, objects: Objects) -> Matched:
    """As DETR has it: the cost of all queries of a layer with all objects of the batch; each sample takes its part."""
    sizes = [len(labels) for labels in objects.labels]
    labels, true_boxes = torch.cat(objects.labels), torch.cat(objects.boxes)
    matched = []
    for layer in zip(logits, boxes, strict=True):
        costs = matching_cost(*layer, labels, true_boxes).cpu().split(sizes, -1)
        queries = np.concatenate([_queries(cost[number].numpy()) for number, cost in enumerate(costs)])
        matched.append(torch.from_numpy(queries).to(logits.device).split(sizes))
    return matched


@torch.no_grad()
def match_at_once(logits: Tensor, boxes: Tensor, objects: RaggedObjects) -> RaggedBatch:
    """The cost of all layers and samples at once; the assignment knows no batches and remains a loop."""
    costs = matching_cost(logits, boxes, objects.labels.tensor, objects.boxes.tensor).cpu().numpy()
    layers, samples, _, width = costs.shape
    sizes = objects.boxes.sample_sizes.tolist()
    queries = np.zeros((layers, samples, width), np.int64)
    for layer, (sample, size) in itertools.product(range(layers), enumerate(sizes)):
        queries[layer, sample, :size] = _queries(costs[layer, sample, :, :size])
    sample_sizes = objects.boxes.sample_sizes.expand(layers, -1)
    return RaggedBatch(torch.from_numpy(queries).to(logits.device), sample_sizes=sample_sizes)
