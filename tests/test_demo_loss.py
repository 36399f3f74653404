"""The demo's losses, of all layers and samples at once: beside plain loops, and beside numbers worked out by hand."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from saccade_demo.data.batch import Batch, encode_boxes, make_batch
from saccade_demo.geometry import Sample, turned
from saccade_demo.model import Detector, Output, Rays
from saccade_demo.rendering.scene import scene
from saccade_demo.training.loss import DetectionLoss, assignment, heatmap_target
from small_demo import IMAGE_WH, small_config

CLASSES = 4


def with_boxes(number: int, ignored: int, index: int = 0) -> Sample:
    """A scene in which so many boxes are to be found, and so many ignored, of which some are at the same places."""
    sample = scene(0, "train", index, IMAGE_WH)
    rng = np.random.default_rng(index)
    low, high = [-20, -20, -1, 1, 1, 1, -3], [20, 20, 0, 4, 4, 4, 3]
    boxes = rng.uniform(low, high, (number + ignored, 7)).astype(np.float32)
    labels = rng.permutation([*rng.integers(0, CLASSES, number), *[-1] * ignored])
    return replace(sample, boxes=boxes, labels=labels.astype(np.int64))


def an_output(samples: list[Sample], layers: int, anchors: int) -> Output:
    """Anchors around the boxes, ignored ones among them, so that some are matched and some beside ignored boxes."""
    generator = torch.Generator().manual_seed(0)
    places = torch.zeros(len(samples), anchors, 11)
    for place, sample in zip(places, samples, strict=True):
        if len(sample.boxes):
            place[:] = torch.from_numpy(encode_boxes(np.resize(sample.boxes, (anchors, 7))))

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    height, width = IMAGE_WH[1] // 4, IMAGE_WH[0] // 4
    return Output(
        [random(len(samples), anchors, CLASSES) for _ in range(layers)],
        [(places + torch.randn(places.shape, generator=generator)).requires_grad_() for _ in range(layers)],
        random(6 * len(samples), CLASSES, height, width),
        random(6 * len(samples), 3, height, width),
    )


def looped(output: Output, samples: list[Sample], positives: int) -> tuple[Tensor, Tensor]:
    """The losses of classes and boxes, layer by layer and sample by sample, in PyTorch's functions."""
    weights = torch.tensor(DetectionLoss.BOX_WEIGHTS)
    of_classes = of_boxes = torch.zeros(())
    for logits, anchors in zip(output.logits, output.anchors, strict=True):
        for b, sample in enumerate(samples):
            wanted = sample.labels >= 0
            labels = torch.from_numpy(sample.labels[wanted])
            boxes = torch.from_numpy(encode_boxes(sample.boxes[wanted]))
            ignored = torch.from_numpy(sample.boxes[~wanted])
            p = logits[b].detach().sigmoid()[:, labels]
            cost = 2 * (0.25 * (1 - p) ** 2 * -p.log() - 0.75 * p**2 * -(1 - p).log())
            cost = cost + 0.25 * torch.cdist(anchors[b].detach()[:, :2], boxes[:, :2], p=1)
            rows, columns = map(torch.from_numpy, linear_sum_assignment(cost.numpy()))
            target = torch.zeros(logits.shape[1:])
            target[rows, labels[columns]] = 1
            weight = torch.ones(len(target))
            for anchor, place in enumerate(anchors[b].detach()):
                near = any(float(torch.dist(place[:2], centre[:2])) < 2 for centre in ignored)
                weight[anchor] = 0 if near and anchor not in rows.tolist() else 1
            p = logits[b].sigmoid()
            focal = torch.where(target == 1, 0.3 * (1 - p) ** 2, 0.7 * p**2)
            entropy = F.binary_cross_entropy_with_logits(logits[b], target, reduction="none")
            of_classes = of_classes + 2 * (weight[:, None] * focal * entropy).sum() / positives
            of_boxes = of_boxes + ((anchors[b, rows] - boxes[columns]).abs() * weights).sum() / positives
    return of_classes, of_boxes


@pytest.mark.parametrize(
    ("numbers", "anchors", "matched"),
    [
        pytest.param([(5, 3), (0, 4), (7, 0)], 20, 12, id="ignored boxes"),
        pytest.param([(6, 2)], 20, 6, id="one sample"),
        pytest.param([(0, 0), (0, 0)], 20, 0, id="no boxes"),
        pytest.param([(0, 3), (0, 1)], 20, 0, id="ignored boxes alone"),
        pytest.param([(9, 2), (3, 0)], 5, 8, id="more boxes than anchors"),
    ],
)
def test_losses_are_those_of_loops_over_layers_and_samples(numbers, anchors, matched):
    samples = [with_boxes(*number, index) for index, number in enumerate(numbers)]
    batch = make_batch(samples, 4)
    objects = batch.objects(anchors)
    assert objects.matched == matched
    output = an_output(samples, 3, anchors)
    told = DetectionLoss(CLASSES)(output, batch, objects)
    expected = looped(output, samples, max(matched, 1))
    inputs = [*output.logits, *output.anchors]
    gradients = [
        torch.autograd.grad(classes + boxes, inputs, allow_unused=True, materialize_grads=True)
        for classes, boxes in [(told["class"], told["box"]), expected]
    ]
    # Sums of float32 in another order.
    torch.testing.assert_close((told["class"], told["box"]), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_ignored_boxes_make_a_difference():
    """Else the test above would not see that they are looked at."""
    sample = with_boxes(5, 3)
    output = an_output([sample], 1, 20)
    without = replace(sample, boxes=sample.boxes[sample.labels >= 0], labels=sample.labels[sample.labels >= 0])
    losses = []
    for which in (sample, without):
        batch = make_batch([which], 4)
        losses.append(DetectionLoss(CLASSES)(output, batch, batch.objects(20)))
    assert losses[0]["class"] < losses[1]["class"]
    assert losses[0]["box"] == losses[1]["box"]


def test_assignment_by_hand():
    """Two layers of two samples; what stands in the padding, NaN, is not looked at."""
    costs = np.array([[[1, 2], [0, 4], [9, 9]], [[5, np.nan], [3, np.nan], [4, np.nan]]])  # (B, A, M)
    anchors, boxes = assignment(np.stack([costs, -costs]), [2, 1])
    # 2 + 0 is less than 1 + 4; of the negated costs, -9 - 4 is the least that two different anchors come to.
    assert sorted(zip(anchors[0, 0], boxes[0, 0], strict=True)) == [(0, 1), (1, 0)]
    assert sorted(zip(anchors[1, 0], boxes[1, 0], strict=True)) == [(1, 1), (2, 0)]
    assert (anchors[:, 1, 0].tolist(), boxes[:, 1, 0].tolist()) == ([1, 0], [0, 0])


@pytest.mark.parametrize("numbers", [[(5, 3), (0, 1), (7, 0)], [(0, 0)]])
def test_the_lift_is_learnt_in_the_cells_around_each_centre(numbers):
    samples = [with_boxes(*number, index) for index, number in enumerate(numbers)]
    batch = make_batch(samples, 4)
    output = an_output(samples, 1, 20)
    expected = torch.zeros(())
    for image, lift in enumerate(output.lift):
        number = int(batch.centers.sample_sizes[image])
        for cell, (x, y, away) in zip(
            batch.centers.tensor[image, :number].tolist(), batch.lifts.tensor[image, :number].tolist(), strict=True
        ):
            for i in (-1, 0, 1):
                for j in (-1, 0, 1):
                    column, row = cell[0] + i, cell[1] + j
                    if 0 <= column < lift.shape[2] and 0 <= row < lift.shape[1]:
                        error = (lift[:, row, column] - torch.tensor([x - i, y - j, away])).abs()
                        expected = expected + (error * torch.tensor([0.5, 0.5, 4])).sum() / 9 / batch.num_centers
    told = DetectionLoss(CLASSES)(output, batch, batch.objects(20))["lift"]
    if batch.num_centers == 0:
        assert told == 0
        return
    torch.testing.assert_close(told, expected, rtol=1e-5, atol=0)  # sums of float32 in another order
    gradients = [torch.autograd.grad(loss, output.lift)[0] for loss in (told, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def parts(batch: Batch) -> list[Tensor]:
    ragged = (batch.boxes, batch.labels, batch.ignored, batch.centers, batch.radii, batch.center_labels, batch.lifts)
    return [batch.images, batch.projection, *(t for part in ragged for t in (part.tensor, part.sample_sizes))]


def test_a_batch_goes_through_a_pipe_as_arrays():
    batch = make_batch([with_boxes(5, 3), with_boxes(0, 0, 1)], 4)
    sent = pickle.dumps(batch)
    assert b"_rebuild_tensor" not in sent
    received = pickle.loads(sent)
    for before, after in zip(parts(batch), parts(received), strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert received.num_boxes == batch.num_boxes == (5, 0)
    assert (received.num_centers, received.num_peaks) == (batch.num_centers, batch.num_peaks)
    # The images are most of it, at a byte for each value.
    assert len(sent) < batch.images.numel() + 10_000


def test_lines_of_sight_are_the_inverse_of_the_projection():
    projection = turned(scene(0, "train", 0, IMAGE_WH), 0.7).projection
    rays = Rays.of(torch.from_numpy(projection)[None])
    inverse = np.linalg.inv(projection.astype(np.float64))
    # Float32 of numbers up to the focal length, some 300; the origin lies within two metres.
    np.testing.assert_allclose(rays.origin[0], inverse[:, :3, 3], atol=1e-5)
    np.testing.assert_allclose(rays.basis[0], inverse[:, :3, :3], atol=1e-5)
    u, v, away = 40.0, 20.0, 7.0
    for camera in range(len(projection)):
        direction = rays.direction(torch.tensor(u), torch.tensor(v))[0, camera]
        point = rays.origin[0, camera] + away * direction
        x, y, depth, _ = projection[camera] @ [*point.tolist(), 1]
        assert (x / depth, y / depth) == pytest.approx((u, v), abs=1e-3)


def test_the_detector_takes_bytes():
    torch.manual_seed(0)
    detector = Detector(small_config(num_classes=CLASSES)).eval()
    batch = make_batch([scene(0, "train", 0, IMAGE_WH)], 4)
    assert batch.images.dtype == torch.uint8
    seen = []
    detector.backbone.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        detector(batch.images, batch.projection)
    expected = (batch.images[0].double() / 255 - 0.45) / 0.25
    torch.testing.assert_close(seen[0][:, :3].double(), expected, rtol=0, atol=1e-6)


def test_centres_of_a_class_in_one_cell_are_one_peak():
    sample = scene(0, "train", 0, IMAGE_WH)
    found = np.flatnonzero(sample.labels >= 0)
    alone = make_batch([sample], 4)
    twice = replace(
        sample,
        boxes=np.concatenate([sample.boxes, sample.boxes[found]]),
        labels=np.concatenate([sample.labels, sample.labels[found]]),
    )
    other = replace(twice, labels=np.concatenate([sample.labels, (sample.labels[found] + 1) % CLASSES]))
    assert alone.num_peaks > 0
    batches = {name: make_batch([each], 4) for name, each in (("twice", twice), ("other", other))}
    assert [batch.num_centers for batch in batches.values()] == [2 * alone.num_centers] * 2
    assert batches["twice"].num_peaks == alone.num_peaks
    for batch in (alone, *batches.values()):
        target = heatmap_target(batch, torch.Size((6, CLASSES, IMAGE_WH[1] // 4, IMAGE_WH[0] // 4)))
        assert batch.num_peaks == (target == 1).sum()
    assert batches["other"].num_peaks > alone.num_peaks
