"""``saccade bench``: its exact results, what it refuses to time, its records and the tables made of them."""

import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import saccade
from benchmarks import (
    accuracy,
    accvlab_protocol,
    aggregation,
    aggregation_oracle,
    calls,
    clocks,
    demo,
    detr_loss,
    heatmap,
    heatmap_oracle,
    losses,
    losses_oracle,
    ragged,
    run,
    tables,
    workloads,
)
from benchmarks import records as records_of_runs
from cases.deformable_aggregation import make, oracle
from saccade import doctor
from saccade.cli import app
from saccade.deformable_aggregation.api import DEFORMABLE_AGGREGATION

ROOT = Path(__file__).parents[1]
BCE_US = 123.0

KEYS = {
    *("workload", "pass", "dtype", "clock", "saccade_us", "floor_us", "baselines", "recorded", "error"),
    *("backend", "gpu", "torch", "triton", "commit"),
}


def keys_of(record: dict) -> set[str]:
    """Keys of a record; a wall time comes with that of a step of binary cross entropy."""
    return KEYS | ({"bce_us"} if record["clock"] == "wall" else set())


PASSES = {
    *("forward", "backward", "backward-deterministic", "forward+backward"),
    *("redraw", "clear+draw", "redraw-concatenated", "clear+draw-concatenated", "ten-calls", "kernel", "training"),
}
OF_TRAINING = {"gpus", "cores", "batch", "views", "steps", "scenes_per_second"}
OF_WHAT_IS_LEARNT = {"seconds", "scenes", "recall_at_2m", "precision", "control_recall", "untrained_recall"}

runner = CliRunner()


# ---- the exact results


def exactly_representable():
    """Inputs whose pixel coordinates are exact in float32: there, float64 means the same."""
    features, shape, start, location, weights = make([[(8, 16), (4, 8)], [(8, 16), (4, 8)], [(2, 4), (1, 1)]])
    location = (location.detach() * 1024).round() / 1024
    leaves = [each.detach().double().requires_grad_() for each in (features, location, weights)]
    return leaves[0], shape, start, leaves[1], leaves[2]


def test_exact_result_and_gradients(device):
    inputs = exactly_representable()
    expected = oracle(*inputs)
    grad_output = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad(expected, (inputs[0], inputs[3], inputs[4]), grad_output)
    features, shape, start, location, weights, grad_output = (
        each.detach().to(device) for each in (*inputs, grad_output)
    )
    for b in range(features.shape[0]):
        results = aggregation_oracle.exact(features[b], shape, start, location[b], weights[b], grad_output[b])
        for result, right in zip(results, (expected[b], *(gradient[b] for gradient in gradients)), strict=True):
            assert result.dtype == torch.float64
            torch.testing.assert_close(result.cpu(), right)


def test_exact_result_by_hand(device):
    features = torch.tensor([[1.0], [2.0], [3.0], [4.0]], device=device)  # a 2 x 2 map
    results = aggregation_oracle.exact(
        features,
        torch.tensor([[[2, 2]]], device=device),
        torch.tensor([[0]], device=device),
        torch.tensor([0.1, 0.5], device=device).view(1, 1, 1, 2),
        torch.full((1, 1, 1, 1, 1), 3.0, device=device),
        torch.full((1, 1), 10.0, device=device),
    )
    # u = -0.3: 0.7 of the left column's mean of 2; the float32 nearest to 0.1 is off by 1.5e-9.
    expected = [[4.2], [0.35 * 30, 0, 0.35 * 30, 0], [4.0 * 30, 2.8 * 30], [14.0]]
    for result, right in zip(results, expected, strict=True):
        assert result.flatten().tolist() == pytest.approx(right, rel=1e-6)


def test_exact_result_takes_the_side_that_float32_rounds_to(device):
    width = 176
    x = (torch.arange(width - 1) + 0.5) / width  # at the pixels
    below = (x.double() * width - 0.5 < torch.arange(width - 1)) & (x * width - 0.5 == torch.arange(width - 1))
    pixel = int(below.nonzero()[0])  # in float64 the point lies to the left of it
    features = torch.randn(width, 1, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(1, 1, 1, 1, 1, device=device)
    location = torch.stack([x[pixel], torch.tensor(0.5)]).view(1, 1, 1, 2)
    shape, start = torch.tensor([[[1, width]]]), torch.tensor([[0]])
    inputs = (each.to(device) for each in (features, shape, start, location))
    result = aggregation_oracle.exact(*inputs, ones, ones.view(1, 1))
    assert result.grad_location[..., 0].item() == pytest.approx(
        width * (features[pixel + 1] - features[pixel]).item(), rel=1e-6
    )


def test_grid_sample_has_the_same_sums_away_from_the_border():
    features, shape, start, location, weights = make([[(8, 16), (4, 8)]] * 3)
    inputs = (features, shape, start, location.detach() * 0.7 + 0.15, weights)
    inputs = aggregation.AggregationInputs(*(each.detach() for each in inputs))
    inputs.sampling_location.clamp_(1e-3, 1 - 1e-3)
    maps = aggregation.channels_last(inputs)
    result = aggregation._grid_sample(inputs.sampling_location, inputs.weights, *maps)
    torch.testing.assert_close(result, saccade.deformable_aggregation(*inputs))
    assert torch.equal(aggregation.plain_rows(maps), inputs.feature_maps)


def exact_loss(element_losses, logits, target) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of all rows, and its gradient."""
    blocks = list(losses_oracle.exact(element_losses, logits, target))
    return sum(block.loss for block in blocks), torch.cat([block.grad_logits for block in blocks])


def test_exact_focal_losses_by_hand(device):
    logits = torch.tensor([[2.0, -1.0, 0.5], [-3.0, 0.0, 1.0], [0.25, -0.75, 4.0]], device=device)
    target = torch.tensor([0, 3, 2], device=device)  # the second row is background
    loss, grad = exact_loss(losses_oracle.sigmoid_focal, logits, target)
    gradients = [-0.00121774, 0.03943585, 0.39461387, 0.00023615, 0.22371510, 0.57617604]
    gradients += [0.30468256, 0.06533225, -0.00000434]
    assert loss.item() == pytest.approx(1.1825912104, abs=5e-11)  # half of the last digit
    assert grad.flatten().tolist() == pytest.approx(gradients, abs=5e-9)

    p = torch.tensor([0.9, 0.2, 0.7, 0.05, 0.5], dtype=torch.float64, device=device)
    target = torch.tensor([1, 1, 0.6, 0, 0.95], dtype=torch.float64, device=device)
    loss, grad = exact_loss(losses_oracle.gaussian_focal, p.logit(), target)
    of_p = torch.tensor([-0.0321832142, -5.7751006599, 0.0849637186, 0.0077609084, 0.0000074572], dtype=torch.float64)
    # The values on paper are those of log(p + 1e-12), which changes none of their digits.
    assert loss.item() == pytest.approx(1.0463258203, abs=5e-11)
    torch.testing.assert_close(grad.cpu(), of_p * (p * (1 - p)).cpu(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("loss", [losses.SIGMOID, losses.GAUSSIAN], ids=["sigmoid", "gaussian"])
def test_focal_losses_are_those_of_the_exact_ones_and_of_the_formulas(loss, device, monkeypatch):
    monkeypatch.setattr(losses_oracle, "BLOCK", 20)  # several blocks, the last of them not full
    if loss is losses.SIGMOID:
        logits, target = workloads.focal(50, 7, device=device)
    else:
        logits, target = workloads.gaussian_focal((5, 2, 6, 7), device=device)
    logits = logits.double()
    scale = 1 / logits.numel() if loss.is_mean else 1.0
    value, grad = (each * scale for each in exact_loss(loss.element_losses, logits, target))
    assert len(grad) == len(logits)
    torch.testing.assert_close(loss.call(logits, target), value)
    torch.testing.assert_close(loss.backward(torch.tensor(3.0, device=device).double(), logits, target), 3 * grad)
    leaf = logits.requires_grad_()
    by_formula = loss.formula(leaf, loss.formula_target(logits, target).double())
    by_formula.backward()
    torch.testing.assert_close(by_formula.detach(), value)
    torch.testing.assert_close(leaf.grad, grad)


@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [
        ("head", 0.1, 0.1),
        ("dense", 13, 27),
        ("dense-large", 73, 146),
        ("centerpoint", 1.2, 1.9),
        ("centernet", 80, 120),
    ],
)
def test_floors_of_the_focal_losses(name, forward, backward):
    """Those that the goals were set beside, in microseconds: they left out the labels, 2 / C of the logits."""
    labels_us = 0.0
    if name in losses.FOCAL:
        rows, classes = losses.FOCAL[name]
        logits, target = torch.empty(rows, classes, device="meta"), torch.empty(rows, dtype=torch.int64, device="meta")
        labels_us = rows * 8 / 4.2e6
    else:
        logits = target = torch.empty(losses.GAUSSIAN_FOCAL[name], device="meta")
    floors = losses.floors_us(logits, target)
    for kind, expected in (("forward", forward), ("backward", backward)):
        half_a_digit = 0.05 if expected < 10 else 0.5
        assert floors[kind] - labels_us == pytest.approx(expected, abs=half_a_digit)
    assert floors["forward+backward"] == floors["forward"] + floors["backward"]


def heatmap_inputs(*centers_and_radii, size=(20, 50), classes=None, labels=None, garbage=0):
    """One sample of these targets, with a slot of padding behind them."""
    centers = torch.tensor([[*(center for center, _ in centers_and_radii), (garbage, garbage)]], dtype=torch.int32)
    radii = torch.tensor([[*(radius for _, radius in centers_and_radii), 7]], dtype=torch.int32)
    sizes = torch.tensor([len(centers_and_radii)], dtype=torch.int32)
    labels = None if labels is None else torch.tensor([[*labels, garbage]], dtype=torch.int32)
    shape = (1, *size) if classes is None else (1, classes, *size)
    return workloads.HeatmapInputs(shape, centers, radii, sizes, labels)


def test_exact_heatmaps_by_hand():
    expected = heatmap_oracle.exact(heatmap_inputs(((10, 5), 1), ((49, 19), 3), ((-1, 13), 2), ((52, 5), 2)))[0]
    assert expected.dtype == torch.float64
    edge, corner = 0.13533528, 0.01831564
    window = torch.tensor([[corner, edge, corner], [edge, 1, edge], [corner, edge, corner]], dtype=torch.float64)
    torch.testing.assert_close(expected[4:7, 9:12], window, rtol=0, atol=5e-9)  # half of the last digit
    assert expected[19, 49] == 1
    assert expected[11:16, :2].max() == expected[13, 0] == pytest.approx(0.48675226, abs=5e-9)
    expected[4:7, 9:12] = 0
    cells = [(row, column) for row in range(16, 20) for column in range(46, 50)]
    cells += [(row, column) for row in range(11, 16) for column in range(2)]
    assert sorted(map(tuple, expected.nonzero().tolist())) == sorted(cells)  # nothing of the window off the map


def test_exact_heatmaps_keep_the_maximum_class_by_class():
    targets = ((3, 2), 1), ((4, 2), 1), ((4, 2), 0)
    expected = heatmap_oracle.exact(heatmap_inputs(*targets, size=(5, 8), classes=3, labels=[2, 2, 0], garbage=1))[0]
    assert expected[2, 2].tolist() == pytest.approx([0, 0, 0.13533528, 1, 1, 0.13533528, 0, 0], abs=5e-9)
    assert expected[0].nonzero().tolist() == [[2, 4]]
    assert not expected[1].any()


OFF_THE_MAP = heatmap_inputs(((-2, 3), 4), ((20, -1), 2), ((9, 11), 3), ((-9, 2), 4), ((30, 30), 1), size=(10, 12))
HEATMAP_INPUTS = {
    "one-map": lambda: workloads.heatmap(3, 6, 9, 11, 4, device="cpu"),
    "class-wise": lambda: workloads.heatmap(3, 6, 9, 11, 4, 5, device="cpu"),
    "off-the-map": lambda: OFF_THE_MAP,
    "no-targets": lambda: heatmap_inputs(),
}


@pytest.mark.parametrize("inputs", HEATMAP_INPUTS.values(), ids=HEATMAP_INPUTS)
def test_heatmaps_are_those_of_the_exact_ones_and_of_what_is_timed_beside_them(inputs, device):
    inputs = inputs()
    inputs = inputs._replace(
        **{name: each.to(device) for name, each in inputs._asdict().items() if isinstance(each, torch.Tensor)}
    )
    shape, centers, radii, counts, labels = inputs
    expected = heatmap_oracle.exact(inputs)
    drawings = {
        "batched": lambda into: saccade.draw_heatmap_batched(into, centers, radii, labels=labels, counts=counts),
        "concatenated": lambda into: saccade.draw_heatmap(into.view(-1, *shape[-2:]), *heatmap.concatenated(inputs)),
        "vectorized": lambda into: heatmap.draw_windows(into, inputs, 7),
        "box by box": lambda into: heatmap.draw_box_by_box(into, inputs),
    }
    for draw in drawings.values():
        result = torch.zeros(shape, device=device)
        draw(result)
        assert torch.equal(result > 0, expected > 0)
        # As for every result that is timed: roundings of the exponent, at most 9, to float32.
        torch.testing.assert_close(result.double(), expected, rtol=heatmap.CELL_TOLERANCE, atol=0)
        before = result.clone()
        draw(result)
        assert torch.equal(result, before)


@pytest.mark.parametrize("name", heatmap.HEATMAP)
def test_concatenated_targets_are_those_of_the_batch(name):
    inputs = workloads.heatmap(*heatmap.HEATMAP[name], device="cpu")
    targets = heatmap.concatenated(inputs)
    assert {each.dtype for each in targets} == {torch.int32}
    assert len(targets.radii) == inputs.sample_sizes.sum()
    first = int(inputs.sample_sizes[0])
    assert torch.equal(targets.centers[:first], inputs.centers[0, :first])
    assert torch.equal(targets.radii[first:][: int(inputs.sample_sizes[1])], inputs.radii[1, : inputs.sample_sizes[1]])
    classes = 1 if inputs.labels is None else inputs.shape[1]
    assert torch.equal(
        targets.heatmap_idxes // classes, torch.arange(inputs.shape[0]).repeat_interleave(inputs.sample_sizes)
    )
    if inputs.labels is not None:
        assert torch.equal(targets.heatmap_idxes[:first], inputs.labels[0, :first])


def test_floors_of_the_heatmaps():
    inputs = heatmap_inputs(((3, 2), 1), ((4, 2), 1), size=(5, 8), classes=3, labels=[2, 0], garbage=1)
    expected = heatmap_oracle.exact(inputs)
    floors = heatmap.floors_us(inputs, heatmap.concatenated(inputs), int((expected > 0).sum()))
    batch, maps, drawn = 2 * (8 + 4 + 4) + 4, 3 * 5 * 8 * 4, 18 * 4  # bytes
    moved = [batch + drawn, batch + maps, 2 * (8 + 4 + 4) + drawn, 2 * (8 + 4 + 4) + maps]
    assert list(floors.values()) == pytest.approx([size / 4.2e6 for size in moved])


def detr_by_hand() -> ragged.DetrInputs:
    """One layer, a sample with an object for its first query, and one without objects."""
    logits = torch.zeros(1, 2, 2, 2)
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.1, 0.1, 0.1, 0.1]]).expand(1, 2, 2, 4)
    objects = detr_loss.Objects(
        [torch.tensor([1]), torch.tensor([], dtype=torch.int64)],
        [torch.tensor([[0.6, 0.5, 0.2, 0.2]]), torch.zeros(0, 4)],
    )
    ragged_objects = detr_loss.RaggedObjects(*map(saccade.ragged.combine_data, objects))
    matched = detr_loss.match_each_sample(logits, boxes, objects)
    ragged_matched = saccade.ragged.combine_data(matched, flatten_batch_dims=False)
    return ragged.DetrInputs(logits, boxes, objects, matched, ragged_objects, ragged_matched)


@pytest.mark.parametrize("with_matching", [False, True])
@pytest.mark.parametrize("form", ["saccade", "loop over samples", "loop over layers"])
def test_the_detr_loss_by_hand(form, with_matching):
    inputs = detr_by_hand()
    assert [query.tolist() for query in inputs.matched[0]] == [[0], []]
    loss = ragged.detr_forms(inputs, with_matching)[form](inputs.logits, inputs.boxes)
    # The focal loss of a probability of 1/2 is log(2) / 4 times 0.25 for the one positive, 0.75 for 7 negatives. The
    # boxes are 0.1 apart and differ by 0.2 in height; they share 0.1 x 0.2, cover 0.1 and lie in 0.3 x 0.4.
    of_boxes = 5 * 0.3 + 2 * (1 - 0.02 / 0.1 + (0.12 - 0.1) / 0.12)
    assert loss.item() == pytest.approx(math.log(2) / 4 * (0.25 + 7 * 0.75) + of_boxes, rel=1e-6)


@pytest.mark.parametrize("most", [5, 0])
def test_all_forms_of_the_detr_loss_are_matched_alike_and_agree(most, device, monkeypatch):
    monkeypatch.setattr(ragged, "DEVICE", device)
    inputs = ragged.detr_inputs(layers=2, samples=3, queries=8, classes=4, most=most)
    at_once = detr_loss.match_at_once(inputs.logits, inputs.boxes, inputs.ragged_objects).split()
    of_layers = detr_loss.match_each_layer(inputs.logits, inputs.boxes, inputs.objects)
    for layer, sample in itertools.product(range(2), range(3)):
        query = inputs.matched[layer][sample]
        assert len(query.unique()) == len(query) == len(inputs.objects.labels[sample])
        assert torch.equal(of_layers[layer][sample], query)
        assert torch.equal(at_once[layer][sample], query)
    for with_matching in (False, True):
        forms = ragged.detr_forms(inputs, with_matching)
        values = {}
        for name, form in forms.items():
            leaves = [inputs.logits.double().requires_grad_(), inputs.boxes.double().requires_grad_()]
            loss = form(*leaves)
            values[name] = [loss, *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)]
        for name in forms:
            for value, right in zip(values[name], values["loop over samples"], strict=True):
                torch.testing.assert_close(value, right, rtol=1e-9, atol=1e-9)


def test_a_query_is_matched_with_the_object_that_it_is_cheapest_for():
    objects = detr_loss.Objects([torch.tensor([0, 0])], [torch.tensor([[0.2, 0.2, 0.1, 0.1], [0.8, 0.8, 0.1, 0.1]])])
    boxes = torch.tensor([[0.5, 0.5, 0.9, 0.9], [0.8, 0.8, 0.1, 0.1], [0.2, 0.2, 0.1, 0.1]]).view(1, 1, 3, 4)
    ((query,),) = detr_loss.match_each_sample(torch.zeros(1, 1, 3, 1), boxes, objects)
    assert query.tolist() == [2, 1]


# ---- what is timed, on small workloads of the CPU with clocks that only call


class Clock:
    """Stands in for the two clocks; knows whether it was used."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, call, **_: int) -> float:
        self.calls += 1
        call()
        return 200.0


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """The suites with tiny workloads, on a machine that claims to have an H200."""
    clock = Clock()
    tiny = {"batch": 2, "anchors": 20, "points": 2, "channels": 16, "groups": 2, "device": "cpu"}
    monkeypatch.setattr(aggregation, "AGGREGATION", {"tiny": tiny})
    monkeypatch.setattr(aggregation, "WORKLOADS", [("tiny", torch.float32), ("tiny", torch.bfloat16)])
    monkeypatch.setattr(aggregation, "MAPS_WORKLOAD", "tiny")
    monkeypatch.setattr(aggregation, "RECORDED_US", {"tiny": {"forward": 1000, "backward": 3000}})
    monkeypatch.setattr(losses, "FOCAL", {"head": (40, 5), "dense": (24, 8), "dense-large": (60, 8)})
    monkeypatch.setattr(losses, "PERMUTED_ROWS", (2, 3, 4))
    monkeypatch.setattr(losses, "GAUSSIAN_FOCAL", {"accvlab": (4, 8, 9), "centernet": (2, 3, 8, 8)})
    monkeypatch.setattr(losses, "focal", partial(workloads.focal, device="cpu"))
    monkeypatch.setattr(losses, "gaussian_focal_inputs", partial(workloads.gaussian_focal, device="cpu"))
    for suite in (aggregation, losses):
        monkeypatch.setattr(suite, "device_us", clock)
        monkeypatch.setattr(suite, "wall_us", clock)
        monkeypatch.setattr(suite, "memory_of", lambda *_: {"peak_mb": 110.0, "needed_mb": 100.0})
    tiny_heatmaps = {"accvlab": (3, 6, 7, 9, 3), "centernet": (2, 5, 12, 10, 4, 3)}
    monkeypatch.setattr(heatmap, "HEATMAP", tiny_heatmaps)
    monkeypatch.setattr(heatmap, "heatmap_inputs", partial(workloads.heatmap, device="cpu"))
    monkeypatch.setattr(heatmap, "wall_us", clock)
    monkeypatch.setattr(accvlab_protocol, "DEVICE", "cpu")
    for suite in (heatmap, accvlab_protocol):
        monkeypatch.setattr(suite, "device_us", clock)
        monkeypatch.setattr(suite, "unwarmed_us", clock)
    monkeypatch.setattr(ragged, "DEVICE", "cpu")
    monkeypatch.setattr(ragged, "ENTRIES", {"samples": 4, "most": 5, "rows": 12, "channels": 3})
    monkeypatch.setattr(ragged, "DETR", {"layers": 2, "samples": 3, "queries": 8, "classes": 4, "most": 5})
    monkeypatch.setattr(ragged, "device_us", clock)
    monkeypatch.setattr(ragged, "wall_us", clock)
    monkeypatch.setattr(calls, "AGGREGATION", {"det-b1": tiny})
    monkeypatch.setattr(calls, "GAUSSIAN_FOCAL", {"centerpoint": (2, 3, 8, 8)})
    monkeypatch.setattr(calls, "gaussian_focal", partial(workloads.gaussian_focal, device="cpu"))
    monkeypatch.setattr(calls, "ENTRIES", ragged.ENTRIES)
    monkeypatch.setattr(clocks, "wall_us", clock)
    monkeypatch.setattr(clocks, "_ROUNDS", 1)
    monkeypatch.setattr(clocks, "bce_us", lambda: BCE_US)
    monkeypatch.setattr(clocks, "bce_step", lambda: lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor, "check", lambda *_: None)
    machine = {"gpu": "NVIDIA H200", "torch": "2.11", "triton": "3.6", "commit": "0123456789abcdef"}
    monkeypatch.setattr(run, "_machine", lambda: machine)
    return clock


def test_wall_times_are_taken_in_turns(monkeypatch):
    times = {"saccade": iter([7.0, 5, 9, 8, 6, 6]), "other": iter([3.0, 9, 9, 9, 9, 2])}
    order = []
    monkeypatch.setattr(clocks, "wall_us", lambda call, repeats: next(times[call()]))
    calls = {name: partial(lambda name: (order.append(name), name)[1], name) for name in times}
    assert clocks.wall_us_in_turns(calls) == {"saccade": 5, "other": 2}
    assert order == ["saccade", "other"] * 6


def test_only_calls_that_are_named_run_without_gradients(monkeypatch):
    monkeypatch.setattr(clocks, "wall_us", lambda call, repeats: float(call()) + repeats)
    passes = dict.fromkeys(("forward", "forward+backward"), torch.is_grad_enabled)
    assert clocks.wall_us_in_turns(passes, without_grad=["forward"], repeats=3) == {"forward": 3, "forward+backward": 4}


def test_records_and_tables(clock, tmp_path):
    result = runner.invoke(app, ["bench", "--only", "aggregation", "--json", str(tmp_path / "results.json")])
    assert result.exit_code == 0, result.output
    records = json.loads((tmp_path / "results.json").read_text())
    found = {(record["workload"], record["pass"], record["dtype"], record["clock"]): record for record in records}
    clocks = {"forward": "device", "backward": "device", "backward-deterministic": "device", "forward+backward": "wall"}
    rows = [("aggregation/tiny", kind, dtype, clocks[kind]) for dtype in ("float32", "bfloat16") for kind in clocks]
    maps = [("aggregation-maps/tiny", kind, "float32", clocks[kind]) for kind in ("forward", "forward+backward")]
    assert list(found) == [*rows, *maps, ("feature_maps_format/tiny", "forward", "float32", "device")]
    for record in records:
        assert set(record) - {"peak_mb", "needed_mb"} == keys_of(record)
        assert ("peak_mb" in record) == (record["clock"] == "wall")
        assert record["saccade_us"] == 200
        assert record["floor_us"] > 0
        assert 0 <= record["error"] <= accuracy.TOLERANCES[record["dtype"]]
    assert found[rows[0]]["recorded"] == {"original CUDA kernel": 1000}
    assert found[rows[1]]["recorded"] == {"original CUDA kernel": 3000}
    assert found[rows[0]]["baselines"] == {"grid_sample": 200}
    assert found[rows[3]]["baselines"] == {"grid_sample": 200, "grid_sample compiled": 200}
    assert found[rows[3]]["floor_us"] == found[rows[0]]["floor_us"] + found[rows[1]]["floor_us"]
    assert all(found[row]["baselines"] == found[row]["recorded"] == {} for row in rows[4:])
    assert found["feature_maps_format/tiny", "forward", "float32", "device"]["error"] == 0  # a copy
    assert "Device time" in result.output
    assert "Wall time" in result.output
    assert "5.0x" in result.output  # 1000 recorded over 200
    assert {record["bce_us"] for record in records if record["clock"] == "wall"} == {BCE_US}
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_records_of_the_losses(clock, tmp_path):
    result = runner.invoke(app, ["bench", "--only", "losses", "--json", str(tmp_path / "results.json")])
    assert result.exit_code == 0, result.output
    records = json.loads((tmp_path / "results.json").read_text())
    found = {(record["workload"], record["dtype"], record["pass"], record["clock"]): record for record in records}
    assert len(found) == len(records)
    passes = [("forward", "device"), ("backward", "device"), ("forward+backward", "wall")]
    sigmoid = [(name, "float32") for name in ("head", "dense", "dense-large", "dense-permuted")]
    subjects = [(f"sigmoid_focal_loss/{name}", dtype) for name, dtype in (*sigmoid, ("dense-large", "bfloat16"))]
    subjects += [(f"gaussian_focal_loss/{name}", "float32") for name in ("accvlab", "centernet")]
    expected = {(*subject, *kind) for subject in subjects for kind in passes}
    head_on_the_wall = ("sigmoid_focal_loss/head", "float32", "forward", "wall")
    module = ("FocalLoss/head", "float32", "forward+backward", "wall")
    assert set(found) == expected | {head_on_the_wall, module}
    for (workload, dtype, kind, _), record in found.items():
        assert set(record) - {"peak_mb", "needed_mb"} == keys_of(record)
        assert ("peak_mb" in record) == (kind == "forward+backward")
        assert record["saccade_us"] == 200
        assert record["floor_us"] > 0
        assert 0 < record["error"] <= accuracy.TOLERANCES["float32" if kind == "forward" else dtype]
        compared = set(record["baselines"])
        if dtype == "bfloat16" or workload.endswith("permuted") or kind == "backward":
            assert not compared
        elif workload.startswith("FocalLoss"):
            assert compared == {"torch BCE with logits"}
        elif workload.startswith("sigmoid"):
            assert compared == {"torchvision", "torchvision compiled"}
        else:
            assert compared == {"textbook", "textbook compiled"}
    recorded = {key: record["recorded"] for key, record in found.items() if record["recorded"]}
    assert {key: times["original CUDA kernel"] for key, times in recorded.items()} == {
        ("sigmoid_focal_loss/head", "float32", "forward", "device"): 13.0,
        ("sigmoid_focal_loss/head", "float32", "backward", "device"): 6.9,
        ("sigmoid_focal_loss/dense", "float32", "forward", "device"): 189,
        ("sigmoid_focal_loss/dense", "float32", "backward", "device"): 233,
        ("sigmoid_focal_loss/dense-large", "float32", "forward", "device"): 985,
        ("sigmoid_focal_loss/dense-large", "float32", "backward", "device"): 1245,
        module: 214,
    }
    assert "Device time" in result.output
    assert "Wall time" in result.output


def test_records_of_the_heatmaps(clock, tmp_path):
    result = runner.invoke(app, ["bench", "--only", "heatmap", "--json", str(tmp_path / "results.json")])
    assert result.exit_code == 0, result.output
    records = json.loads((tmp_path / "results.json").read_text())
    found = {(record["workload"], record["pass"], record["clock"]): record for record in records}
    assert len(found) == len(records)
    of_device = ("redraw", "clear+draw", "redraw-concatenated", "clear+draw-concatenated")
    expected = {(f"heatmap/{name}", kind, "device") for name in ("accvlab", "centernet") for kind in of_device}
    expected |= {(f"heatmap/{name}", "clear+draw", "wall") for name in ("accvlab", "centernet")}
    assert set(found) == expected | {("heatmap/accvlab", "redraw", "wall")}
    compared = {
        ("redraw", "device"): {"PyTorch, vectorized"},
        ("clear+draw", "device"): {"PyTorch, vectorized", "clearing alone"},
        ("redraw", "wall"): {"PyTorch, vectorized", "PyTorch, box by box"},
        ("clear+draw", "wall"): {"PyTorch, vectorized", "PyTorch, box by box"},
    }
    for (_, kind, clock_of), record in found.items():
        assert set(record) == keys_of(record)
        assert record["saccade_us"] == 200
        assert record["floor_us"] > 0
        assert 0 < record["error"] <= accuracy.TOLERANCES["float32"]
        assert set(record["baselines"]) == compared.get((kind, clock_of), set())
    recorded = {key: record["recorded"]["ACCV-Lab package"] for key, record in found.items() if record["recorded"]}
    assert recorded == {
        ("heatmap/accvlab", "redraw", "device"): 28.8,
        ("heatmap/accvlab", "clear+draw", "device"): 90.8,
        ("heatmap/accvlab", "clear+draw-concatenated", "device"): 98.5,
        ("heatmap/accvlab", "redraw", "wall"): 29.7,
        ("heatmap/centernet", "redraw", "device"): 1364,
        ("heatmap/centernet", "clear+draw", "device"): 4552,
        ("heatmap/centernet", "clear+draw-concatenated", "device"): 4624,
    }


def test_calls_that_are_not_warmed_up_are_waited_for_once(monkeypatch):
    done, now = [], iter([1.0, 1.5])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("wait"))
    monkeypatch.setattr(heatmap.time, "perf_counter", lambda: done.append("clock") or next(now))
    assert heatmap.unwarmed_us(lambda: done.append("call"), calls=10) == pytest.approx(0.5e6 / 10)
    assert done == ["clock", *["call"] * 10, "wait", "clock"]


def test_every_heatmap_workload_has_a_recorded_time():
    assert list(heatmap.RECORDED_US) == list(workloads.HEATMAP)


def test_the_benchmark_programs_of_accvlab(clock, tmp_path):
    arguments = ["bench", "--only", "heatmap", "--protocol", "accvlab", "--json", str(tmp_path / "results.json")]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    records = json.loads((tmp_path / "results.json").read_text())
    found = {(record["workload"].removeprefix("accvlab-protocol/"), record["pass"]): record for record in records}
    forms = ("concatenated", "batched", "batched-classwise")
    assert list(found) == [(form, kind) for form in forms for kind in ("ten-calls", "kernel")]
    for (_, kind), record in found.items():
        assert set(record) == keys_of(record)
        assert record["clock"] == {"ten-calls": "wall", "kernel": "device"}[kind]
        assert 0 < record["error"] <= accuracy.TOLERANCES["float32"]
        assert record["baselines"] == ({"PyTorch, box by box": 200} if kind == "ten-calls" else {})
        assert len(record["recorded"]) == (4 if kind == "ten-calls" else 0)
    assert clock.calls == 2 + 3 * (
        accvlab_protocol.REPETITIONS + 1
    )  # a loop for each program; of each form ten calls, and the kernel
    assert tables.columns(records)[-2].cells == ["0.3x", "", "0.2x", "", "0.3x", ""]  # of the H200's: 54.0, 30.6, 57.2
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.output.splitlines() if "│" in line]
    assert lines == [
        ["PyTorch, box by box", "200", "", "90815", "201100"],
        ["concatenated", "200", "200", "54.0", "48.2"],
        ["batched", "200", "200", "30.6", "36.6"],
        ["PyTorch, box by box, class-wise", "200", "", "118282", "245100"],
        ["batched, class-wise", "200", "200", "57.2", "59.0"],
    ]
    quick = run.run("heatmap", Console(quiet=True), quick=True, protocol="accvlab")
    assert len(quick) == 6
    assert all(record["baselines"] == {} for record in quick)


def test_data_of_the_benchmark_programs_of_accvlab(monkeypatch):
    monkeypatch.setattr(accvlab_protocol, "DEVICE", "cpu")
    torch.manual_seed(accvlab_protocol.SEED)
    shape, centers, radii, counts, labels = accvlab_protocol.data(20)
    assert shape == (48, 20, 20, 50)
    assert counts.sum() == 1195  # what the original draws first
    assert (
        torch.get_rng_state().ne(torch.Generator().manual_seed(42).get_state()).any()
    )  # the next method has other data
    is_target = torch.arange(50) < counts[:, None]
    x, y = centers[is_target].unbind(-1)
    assert [x.min(), x.max(), y.min(), y.max()] == [0, 49, 0, 19]
    assert labels[is_target].unique().tolist() == list(range(20))
    shares = radii[is_target].bincount() / is_target.sum()
    assert shares.tolist() == pytest.approx([0, 0.4, 0.2, 0.2, 0.2], abs=0.05)  # of 1195 targets: 3.5 deviations
    assert all(each.dtype == torch.int32 for each in (centers, radii, counts, labels))
    assert accvlab_protocol.data(None).shape == (48, 20, 50)
    assert accvlab_protocol.data(None).labels is None


def test_records_of_ragged_batches(clock, tmp_path):
    result = runner.invoke(app, ["bench", "--only", "ragged", "--json", str(tmp_path / "results.json")])
    assert result.exit_code == 0, result.output
    records = json.loads((tmp_path / "results.json").read_text())
    found = {
        (record["workload"].removeprefix("ragged/"), record["pass"], record["clock"]): record for record in records
    }
    assert len(found) == len(records)
    loops = {"loop over samples", "loop over layers"}
    compared = {
        ("batched_indexing_access", "forward", "device"): {"indexing", "gather"},
        ("batched_indexing_access", "forward", "wall"): {"indexing", "gather"},
        ("batched_indexing_access", "forward+backward", "wall"): {"indexing", "gather", "torch BCE with logits"},
        ("combine_data", "forward", "wall"): {"pad_sequence"},
        ("detr_loss", "forward", "device"): loops,
        ("detr_loss", "forward+backward", "wall"): loops,
        ("detr_loss-and-matching", "forward+backward", "wall"): loops,
    }
    assert {key: set(record["baselines"]) for key, record in found.items()} == compared
    for (workload, _, clock_of), record in found.items():
        assert set(record) == keys_of(record)
        assert record["saccade_us"] == 200
        assert (record["floor_us"] is not None) == (clock_of == "device")
        assert record["floor_us"] is None or record["floor_us"] > 0
        assert 0 <= record["error"] <= accuracy.TOLERANCES["float32"]
        assert (record["error"] > 0) == workload.startswith("detr_loss")  # the others copy
    recorded = {key: record["recorded"]["ACCV-Lab package"] for key, record in found.items() if record["recorded"]}
    assert recorded == {
        ("batched_indexing_access", "forward", "device"): 3.6,
        ("batched_indexing_access", "forward", "wall"): 28,
        ("batched_indexing_access", "forward+backward", "wall"): 189,
        ("combine_data", "forward", "wall"): 583,
    }


def by_turns(monkeypatch, clock, of_bce: list[float]) -> None:
    """The next of some times for each turn of the unit; ``clock`` for all else."""

    def step() -> None:
        raise AssertionError("the clock knows it")

    times = iter(of_bce)
    monkeypatch.setattr(clocks, "bce_step", lambda: step)
    monkeypatch.setattr(clocks, "wall_us", lambda call, **_: next(times) if call is step else clock(call))


@pytest.mark.parametrize("options", [[], ["--quick"]])
def test_records_of_calls(options, clock, tmp_path, monkeypatch):
    by_turns(monkeypatch, clock, [100.0, 125, 160, 200, 250])
    monkeypatch.setattr(clocks, "bce_us", lambda: pytest.fail("not of these turns"))
    checked = []
    monkeypatch.setattr(doctor, "check", lambda operator, _: checked.append(operator))
    file = tmp_path / "results.json"
    result = runner.invoke(app, ["bench", "--only", "calls", *options, "--json", str(file)])
    assert result.exit_code == 0, result.output
    assert checked == ["focal_loss", "gaussian_focal_loss", "ragged", "deformable_aggregation"]
    names = ["FocalLoss", "gaussian-centerpoint", "ragged-indexing", "aggregation-det-b1", "aggregation-maps-det-b1"]
    records = json.loads(file.read_text())
    assert [(record["workload"], record["pass"], record["bce_us"]) for record in records] == [
        (f"calls/{name}", kind, bce_us)
        for name, bce_us in zip(names, [100, 125, 160, 200, 250], strict=True)
        for kind in ("forward", "forward+backward")
    ]
    for record in records:
        assert set(record) == keys_of(record)
        assert (record["dtype"], record["clock"], record["saccade_us"]) == ("float32", "wall", 200)
        assert record["floor_us"] is None
        assert record["baselines"] == record["recorded"] == {}
        assert 0 <= record["error"] <= accuracy.TOLERANCES["float32"]
        assert (record["error"] == 0) == (record["workload"] == "calls/ragged-indexing")  # a copy
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.output.splitlines() if "│" in line]
    assert [line[3:5] for line in lines] == [["200", h] for h in ("2.00", "1.60", "1.25", "1.00", "0.80") for _ in "12"]
    assert clock.calls == len(records)


def test_one_call_alone(clock, monkeypatch):
    checked = []
    monkeypatch.setattr(doctor, "check", lambda operator, _: checked.append(operator))
    records = run.run("calls/FocalLoss", Console(quiet=True))
    assert [record["workload"] for record in records] == ["calls/FocalLoss"] * 2
    assert checked == ["focal_loss"]
    assert clock.calls == 3  # both passes and the unit


def test_calls_are_timed_as_training_makes_them(clock, monkeypatch):
    """Forward without a graph, of leaves that want gradients; forward + backward into leaves that have none."""
    modes = []

    def wall_us(call, **_):
        modes.append(torch.is_grad_enabled())
        output = call()
        assert output is None or output.requires_grad == torch.is_grad_enabled()
        return 200.0

    monkeypatch.setattr(clocks, "wall_us", wall_us)
    run.run("calls", Console(quiet=True))
    assert modes == [False, True, True] * 5
    for of_operator in calls.CALLS.values():
        for workload, prepare in of_operator.items():
            assert all(leaf.is_leaf and leaf.requires_grad for leaf in prepare(workload).leaves)


def test_the_unit_is_a_step_of_training(monkeypatch):
    zeros, made = torch.zeros, []

    def on_the_cpu(*size, device, **options):
        made.append(zeros(*size, **options))
        return made[-1]

    monkeypatch.setattr(torch, "zeros", on_the_cpu)
    step = clocks.bce_step()
    (logits,) = made
    for _ in range(2):  # nothing is added to the gradient of the first
        step()
        torch.testing.assert_close(logits.grad, torch.full((7200, 10), 0.5 / 72000))


def test_the_loss_over_ragged_batches_alone(clock, tmp_path):
    file = tmp_path / "results.json"
    result = runner.invoke(app, ["bench", "--quick", "--only", "ragged/detr_loss", "--json", str(file)])
    assert result.exit_code == 0, result.output
    assert {record["workload"] for record in json.loads(file.read_text())} == {"ragged/detr_loss"}
    assert clock.calls == 2


def test_floors_of_ragged_batches(clock, monkeypatch):
    records = run.run("ragged", Console(quiet=True), quick=True)
    floors = {record["workload"]: record["floor_us"] for record in records if record["clock"] == "device"}
    _, indices, _ = ragged.indexing_inputs(**ragged.ENTRIES)
    count, width = int(indices.sample_sizes.sum()), indices.max_sample_size
    bytes_moved = count * (3 * 4 + 8) + 4 * 8 + 4 * width * 3 * 4
    assert floors["ragged/batched_indexing_access"] == pytest.approx(bytes_moved / 4.2e6)
    count = sum(map(len, ragged.detr_inputs(**ragged.DETR).objects.labels))
    bytes_moved = 2 * 3 * 8 * 4 * 4 + count * (4 * 4 + 8) + 3 * 8 + 2 * count * (4 * 4 + 8)
    assert floors["ragged/detr_loss"] == pytest.approx(bytes_moved / 4.2e6)


def test_permuted_logits_are_those_of_the_dense_head(monkeypatch):
    batch, height, width = losses.PERMUTED_ROWS
    assert batch * height * width == losses.FOCAL[losses.PERMUTED_WORKLOAD][0]
    monkeypatch.setattr(losses, "PERMUTED_ROWS", (2, 3, 4))
    monkeypatch.setattr(losses, "FOCAL", {"dense": (24, 8)})
    monkeypatch.setattr(losses, "focal", partial(workloads.focal, device="cpu"))
    logits, target = losses._permuted()
    rows, labels = workloads.focal(24, 8, device="cpu")
    assert torch.equal(logits.flatten(0, 2), rows)
    assert torch.equal(target.flatten(), labels)
    assert logits.stride() == (8 * 3 * 4, 4, 1, 3 * 4)  # of an image, its classes lie one behind the other


@pytest.mark.parametrize(("suite", "count"), [("aggregation", 11), ("losses", 23), ("heatmap", 11), ("ragged", 7)])
def test_quick_times_saccade_alone(clock, suite, count):
    records = run.run(suite, Console(quiet=True), quick=True)
    assert len(records) == clock.calls == count
    assert all(record["baselines"] == {} for record in records)


def test_one_workload_alone(clock):
    records = run.run("aggregation/tiny", Console(quiet=True), quick=True)
    assert {record["workload"] for record in records} == {"aggregation/tiny"}
    assert clock.calls == len(records)


def test_every_workload_has_a_name(clock):
    records = run.run(None, Console(quiet=True), quick=True)
    assert {record["workload"] for record in records} == {
        *(*aggregation.workloads(), *losses.workloads(), *heatmap.workloads(), *ragged.workloads()),
        *calls.workloads(),
    }


def test_new_records_take_the_place_of_those_of_the_same_workload(clock, tmp_path):
    file = tmp_path / "results.json"
    arguments = ["bench", "--quick", "--json", str(file), "--only"]
    assert runner.invoke(app, [*arguments, "losses"]).exit_code == 0
    of_losses = json.loads(file.read_text())
    file.write_text(json.dumps([record | {"saccade_us": 1} for record in of_losses]))
    assert runner.invoke(app, [*arguments, "FocalLoss/head"]).exit_code == 0
    assert [record["saccade_us"] for record in json.loads(file.read_text()) if "FocalLoss" in record["workload"]] == [
        200
    ]
    assert runner.invoke(app, [*arguments, "aggregation"]).exit_code == 0
    both = json.loads(file.read_text())
    assert len(both) == len(of_losses) + 11


@pytest.mark.parametrize("content", [b"not JSON", b"{}", b"[1]", b'[{"workload": "x"}]', b"\xff\xfe"])
def test_a_file_of_something_else_is_not_written_over(content, clock, tmp_path):
    file = tmp_path / "results.json"
    file.write_bytes(content)
    result = runner.invoke(app, ["bench", "--quick", "--json", str(file)])
    assert result.exit_code == 2
    assert "holds something else than records" in result.stderr
    assert file.read_bytes() == content
    assert clock.calls == 0  # told before time is spent


def test_where_the_benchmarks_are_found(tmp_path):
    """In the root of a checkout, installed or not; another project's are none."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").touch()
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    for folder, is_found in ((ROOT, True), (tmp_path, False)):
        command = [sys.executable, "-m", "saccade", "bench", "--only", "nonsense"]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        assert ("in the root of a checkout" not in done.stderr) == is_found


def refused(clock, tmp_path, *arguments: str) -> str:
    """The complaint of a run that must time nothing and write nothing."""
    result = runner.invoke(app, ["bench", "--quick", "--json", str(tmp_path / "results.json"), *arguments])
    assert result.exit_code == 1, result.output
    assert clock.calls == 0
    assert not (tmp_path / "results.json").exists()
    assert result.stderr.startswith("saccade bench: ")
    return result.stderr


def test_an_operator_that_differs_from_its_reference_is_not_timed(clock, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "check", lambda *_: "differs from the reference")
    assert "deformable_aggregation is not timed: it differs from the reference" in refused(clock, tmp_path)
    monkeypatch.setattr(doctor, "check", lambda name, _: "raises" if name == "gaussian_focal_loss" else None)
    assert "gaussian_focal_loss is not timed: it raises" in refused(clock, tmp_path, "--only", "losses")


def test_a_wrong_result_is_not_timed(clock, tmp_path, monkeypatch):
    right = saccade.deformable_aggregation
    monkeypatch.setattr(saccade, "deformable_aggregation", lambda *inputs: right(*inputs) * 1.00001)
    message = refused(clock, tmp_path)
    assert "aggregation/tiny (float32) is not timed: forward has a relative error of 1.0e-05, allowed 2e-06" in message


def test_a_wrong_gradient_is_not_timed(clock, tmp_path, monkeypatch):
    backward = DEFORMABLE_AGGREGATION.backward
    right = backward._reference

    def wrong_at_one_location(*inputs):
        location, weights, maps = right(*inputs)
        location.flatten()[location.abs().argmax()] *= -1
        return location, weights, maps

    monkeypatch.setattr(backward, "_reference", wrong_at_one_location)
    assert "is not timed: backward has a relative error of" in refused(clock, tmp_path)


def test_a_wrong_loss_is_not_timed(clock, tmp_path, monkeypatch):
    right = saccade.sigmoid_focal_loss
    monkeypatch.setattr(saccade, "sigmoid_focal_loss", lambda *inputs: right(*inputs) * 1.00001)
    message = refused(clock, tmp_path, "--only", "losses")
    assert "sigmoid_focal_loss/head (float32) is not timed: forward has a relative error of 1.0e-05" in message


def test_a_wrong_gradient_of_a_loss_is_not_timed(clock, tmp_path, monkeypatch):
    right = losses.SIGMOID.backward

    def without_the_last_row(grad_output, logits, target):
        grad = right(grad_output, logits, target)
        grad[-1] = 0
        return grad

    monkeypatch.setattr(losses, "SIGMOID", losses.SIGMOID._replace(backward=without_the_last_row))
    message = refused(clock, tmp_path, "--only", "losses")
    assert "sigmoid_focal_loss/head (float32) is not timed: backward has a relative error of" in message


CALL_MUTATIONS = {
    "calls/FocalLoss": (losses.FocalLoss, "forward", lambda loss: loss * 1.00001),
    "calls/gaussian-centerpoint": (saccade, "gaussian_focal_loss_with_logits", lambda loss: loss * 1.00001),
    "calls/ragged-indexing": (saccade.ragged, "batched_indexing_access", lambda b: b.apply(torch.neg)),
    "calls/aggregation-det-b1": (saccade, "deformable_aggregation", lambda output: output * 1.00001),
    "calls/aggregation-maps-det-b1": (saccade, "deformable_aggregation", lambda output: output * 1.00001),
}


def with_a_wrong_gradient(result):
    """The same value; of its gradient ten parts in a million too much."""
    if isinstance(result, saccade.RaggedBatch):
        return result.apply(with_a_wrong_gradient)
    return result.detach() + (result - result.detach()) * 1.00001


@pytest.mark.parametrize("workload", CALL_MUTATIONS)
def test_a_call_with_a_wrong_result_or_gradient_is_not_timed(workload, clock, monkeypatch):
    module, name, change = CALL_MUTATIONS[workload]
    for wrong, kind in ((change, "forward"), (with_a_wrong_gradient, r"forward\+backward")):
        with monkeypatch.context() as changed:
            mutated(changed, module, name, wrong)
            message = rf"^{workload} \(float32\) is not timed: {kind} has a relative error of"
            with pytest.raises(accuracy.WrongResultError, match=message):
                run.run(workload, Console(quiet=True))
    assert clock.calls == 0


@pytest.mark.parametrize("form", ["draw_heatmap_batched", "heatmap_targets", "draw_heatmap"])
def test_a_wrong_drawing_is_not_timed(form, clock, tmp_path, monkeypatch):
    right = getattr(saccade, form)
    monkeypatch.setattr(saccade, form, partial(right, diameter_to_sigma_factor=6.0001))
    message = refused(clock, tmp_path, "--only", "heatmap")
    passes = {"draw_heatmap_batched": "redraw", "heatmap_targets": "clear+draw", "draw_heatmap": "redraw-concatenated"}
    assert f"heatmap/accvlab (float32) is not timed: {passes[form]} has a relative error of" in message


@pytest.mark.parametrize("form", ["draw_heatmap_batched", "draw_heatmap"])
def test_a_wrong_drawing_is_not_timed_by_the_programs_of_accvlab(form, clock, monkeypatch):
    monkeypatch.setattr(saccade, form, partial(getattr(saccade, form), diameter_to_sigma_factor=6.0001))
    workload = "concatenated" if form == "draw_heatmap" else "batched"
    with pytest.raises(accuracy.WrongResultError, match=rf"^accvlab-protocol/{workload} .* ten-calls has a relative"):
        run.run("heatmap", Console(quiet=True), quick=True, protocol="accvlab")


def mutated(monkeypatch, module, name, change) -> None:
    """Replace a function by what ``change`` makes of its result."""
    right = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *inputs, **options: change(right(*inputs, **options)))


def without_the_last_slot(batch: saccade.RaggedBatch) -> saccade.RaggedBatch:
    return saccade.RaggedBatch(batch.tensor, sample_sizes=(batch.sample_sizes - 1).clamp(min=0))


RAGGED_MUTATIONS = {
    "an entry": (
        "ragged/batched_indexing_access",
        saccade.ragged,
        "batched_indexing_access",
        lambda b: b.apply(torch.neg),
    ),
    "sizes": ("ragged/combine_data", saccade.ragged, "combine_data", without_the_last_slot),
    "value": (
        "ragged/detr_loss",
        saccade,
        "sigmoid_focal_loss",
        lambda loss: loss * (1.00001 if loss.dtype == torch.float32 else 1),  # as a wrong kernel
    ),
    "gradient": (
        "ragged/detr_loss",
        detr_loss,
        "batched_indexing_access",
        lambda found: found.apply(lambda boxes: boxes.detach() + (boxes - boxes.detach()) * 1.00001),
    ),
    "labels": ("ragged/detr_loss", detr_loss, "batched_inverse_indexing_access", lambda target: target.roll(1, -1)),
    "padding": ("ragged/detr_loss", detr_loss, "sum_over_targets", lambda sums: sums + 1e-3),
    "pairs": ("ragged/detr_loss-and-matching", detr_loss, "match_at_once", without_the_last_slot),
    "the loop's pairs": (
        "ragged/detr_loss-and-matching",
        detr_loss,
        "match_each_sample",
        lambda matched: [[query.flip(0) for query in layer] for layer in matched],
    ),
}


@pytest.mark.parametrize("mutation", RAGGED_MUTATIONS)
def test_what_differs_from_the_loop_is_not_timed(mutation, clock, monkeypatch):
    workload, *change = RAGGED_MUTATIONS[mutation]
    mutated(monkeypatch, *change)
    message = rf"{workload} \(float32\) is not timed: .* has a relative error of"
    with pytest.raises(accuracy.WrongResultError, match=message):
        run.run(workload, Console(quiet=True))
    assert clock.calls == 0


def test_maps_that_are_not_cleared_are_not_timed(clock, tmp_path, monkeypatch):
    right = saccade.heatmap_targets
    monkeypatch.setattr(
        saccade, "heatmap_targets", lambda *inputs, **options: right(*inputs, **options).clamp(min=1e-9)
    )
    message = refused(clock, tmp_path, "--only", "heatmap")
    assert "clear+draw is wrong about which cells are drawn" in message


def test_what_is_wrong_about_a_heatmap():
    inputs = heatmap_inputs(((10, 8), 4), ((12, 9), 2), ((30, 10), 1))
    expected = heatmap_oracle.exact(inputs)
    right = expected.float()
    check = partial(heatmap.checked_errors, "a/b", expected)
    assert 0 < check({"redraw": right})["redraw"] < 1e-7

    def with_cell(row: int, column: int, value: float):
        wrong = right.clone()
        wrong[0, row, column] = value
        return wrong

    corner = right[0, 4, 6].item()
    for wrong, message in (
        (with_cell(4, 6, 0.0), "which cells are drawn: 1 of 1000"),
        (with_cell(0, 0, 1e-30), "which cells are drawn: 1 of 1000"),
        (with_cell(0, 0, -1.0), "which cells are drawn: 1 of 1000"),
        (with_cell(8, 10, 1 - 2**-24), "which cells are exactly 1: 1 of 1000"),
        (with_cell(8, 11, 1.0), "which cells are exactly 1: 1 of 1000"),
        (with_cell(4, 6, corner * 1.00001), r"a cell with a relative error of 1.0e-05, allowed 4e-06"),
        (with_cell(4, 6, float("nan")), "a relative error of nan"),
        (torch.where(right < 1, right * 1.00001, right), r"a relative error of .*e-06, allowed 2e-06"),
        (right[0], r"the shape \(20, 50\), expected \(1, 20, 50\)"),
    ):
        with pytest.raises(accuracy.WrongResultError, match=rf"^a/b \(float32\) is not timed: redraw .*{message}"):
            check({"redraw": wrong})


def test_a_loss_of_bfloat16_logits_is_as_accurate_as_any_and_its_gradient_is_rounded():
    logits, target = workloads.focal(40, 5, device="cpu", dtype=torch.bfloat16)
    check = partial(losses.checked_errors, "a/b", losses.SIGMOID.element_losses, 1 / 200, logits, target)
    value = losses.SIGMOID.call(logits, target)
    grad = losses.SIGMOID.backward(torch.tensor(1.0), logits, target)
    assert grad.dtype == torch.bfloat16
    errors = check({"both": losses.Result(value, grad)})
    assert 1e-4 < errors["both"] <= accuracy.TOLERANCES["bfloat16"]
    assert check({"loss": losses.Result(value, None)})["loss"] <= accuracy.TOLERANCES["float32"]
    for result, allowed in (
        (losses.Result(value.bfloat16(), grad), "2e-06"),
        (losses.Result(value, grad * 1.01), "4e-03"),
        (losses.Result(value * float("nan"), grad), "2e-06"),
        (losses.Result(value, grad * float("nan")), "4e-03"),
    ):
        with pytest.raises(accuracy.WrongResultError, match=rf"a/b \(bfloat16\) is not timed: .* allowed {allowed}"):
            check({"both": result})


def test_a_deterministic_gradient_that_changes_is_not_timed(clock, tmp_path, monkeypatch):
    backward = DEFORMABLE_AGGREGATION.backward
    right = backward._reference
    calls = []

    def another_rounding_every_time(*inputs):
        location, weights, (features,) = right(*inputs)
        calls.append(None)
        return location, weights, [features * (1 + len(calls) * 2**-23)]

    monkeypatch.setattr(backward, "_reference", another_rounding_every_time)
    assert "backward-deterministic differs from run to run" in refused(clock, tmp_path)


def test_an_error_that_is_no_number_is_refused():
    accuracy.require_accurate("aggregation/tiny", "float16", {"forward": 6e-4})
    for error in (6.1e-4, float("nan"), float("inf")):
        with pytest.raises(accuracy.WrongResultError, match="forward has a relative error"):
            accuracy.require_accurate("aggregation/tiny", "float16", {"forward": error})
    inputs = aggregation.AggregationInputs(*(each.detach() for each in make([[(8, 16), (4, 8)]])))
    output = saccade.deformable_aggregation(*inputs)
    results = {"forward": [output * float("nan"), None, None, None], "right": [output, None, None, None]}
    errors = aggregation.relative_errors(inputs, torch.ones_like(output), results)
    assert errors["right"] <= accuracy.TOLERANCES["float32"]
    assert not errors["forward"] <= 1


def test_an_unknown_suite_or_an_unwritable_file_is_one_line(clock, tmp_path):
    for arguments, message in (
        (
            ["--only", "nonsense"],
            f"--only: expected one of {', '.join(run.SUITES)}, demo, or one of their workloads, got 'nonsense'",
        ),
        (
            ["--only", "losses", "--protocol", "accvlab"],
            "--protocol: expected --only heatmap --protocol accvlab, got --only losses --protocol accvlab",
        ),
        (["--only", "heatmap/accvlab", "--protocol", "accvlab"], "got --only heatmap/accvlab --protocol accvlab"),
        (["--only", "heatmap", "--protocol", "mmdet"], "got --only heatmap --protocol mmdet"),
        (["--protocol", "accvlab"], "expected --only heatmap --protocol accvlab, got --protocol accvlab"),
        (["--protocol", "mmdet"], "expected --only heatmap --protocol accvlab, got --protocol mmdet"),
        (["--json", str(tmp_path / "nowhere" / "results.json")], "cannot write this file"),
    ):
        result = runner.invoke(app, ["bench", *arguments])
        assert result.exit_code == 2
        assert message in result.stderr
        assert len(result.stderr.splitlines()) == 1
    assert clock.calls == 0


def test_help_tells_every_option():
    text = re.sub(r"\x1b\[[0-9;]*m", "", runner.invoke(app, ["bench", "--help"], terminal_width=200).output)
    for option in ("--only", "--quick", "--protocol", "--json"):
        assert option in text


@pytest.mark.gpu_memory(40)
def test_a_quick_run_on_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(aggregation, "WORKLOADS", [("det-b1", torch.float32)])
    monkeypatch.setattr(aggregation, "MAPS_WORKLOAD", "det-b1")
    monkeypatch.setattr(losses, "SIGMOID_WORKLOADS", [("head", torch.float32)])
    monkeypatch.setattr(losses, "GAUSSIAN_FOCAL", {"accvlab": losses.GAUSSIAN_FOCAL["accvlab"]})
    monkeypatch.setattr(heatmap, "HEATMAP", {"accvlab": heatmap.HEATMAP["accvlab"]})
    result = runner.invoke(app, ["bench", "--quick", "--json", str(tmp_path / "results.json")])
    assert result.exit_code == 0, result.output
    records = json.loads((tmp_path / "results.json").read_text())
    assert {record["pass"] for record in records} == PASSES - {"ten-calls", "kernel", "training"}
    for record in records:
        assert record["saccade_us"] > 0
        assert record["gpu"] == torch.cuda.get_device_name()
        if "peak_mb" in record:  # inputs and results themselves are counted
            assert record["peak_mb"] > 0.99 * record["needed_mb"]


@pytest.mark.gpu_memory(40)
def test_the_benchmark_programs_of_accvlab_on_a_gpu():
    records = run.run("heatmap", Console(quiet=True), quick=True, protocol="accvlab")
    assert len(records) == 6
    for record in records:
        assert record["saccade_us"] > 0
        assert record["error"] <= accuracy.TOLERANCES["float32"]


# ---- training of the demo


@pytest.fixture
def several_gpus(clock, monkeypatch):
    """A machine with three GPUs, of which runs take one and two."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)


def a_report(gpus: int, training: demo.Training = demo.TRAININGS["training"]) -> dict:
    """What is read of the report that `saccade demo --json` writes."""
    report = {"scenes_per_second": 100.0 * gpus**0.5, "step_ms": 160.0 * gpus**0.5, "batch": 16 * gpus, "views": 4}
    report |= {"steps": training.steps or 300, "seconds": 118.4, "samples": {"trained_on": 6000}}
    report |= {"recall_at_2m": 0.9, "precision": 0.8, "control_recall": 0.01, "untrained_recall": 0.0}
    return report | {"losses": {"total": {"last": 3.5}}, "backends": {"focal_loss": "triton", "ragged": "triton"}}


@pytest.fixture
def reported(several_gpus, monkeypatch):
    """Runs of the demo that were reported, not made: their names, numbers of GPUs and what they train."""
    runs = []
    monkeypatch.setattr(demo, "_trained", lambda *run: runs.append(run) or a_report(*run[1:]))
    return runs


def test_how_the_demo_is_started(tmp_path):
    def options(steps: int, batch: int) -> list[str]:
        size = ["--steps", str(steps), "--batch", str(batch), "--curve-every", "0"]
        return ["-m", "saccade", "demo", "--device", "cuda", *size]

    files = ["--out", str(tmp_path), "--json", str(tmp_path / "report.json")]
    compiled = ["--amp", "bf16", "--compile", "--views", "8"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    for name, gpus, expected in (
        ("training", 1, [*options(300, 16), *files]),
        ("training-compiled", 4, [*torchrun, *options(300, 64), *compiled, *files]),
        ("two-minutes", 1, [*options(1900, 16), *files]),
        ("two-minutes-compiled", 1, [*options(2500, 16), *compiled, *files]),
    ):
        assert demo.command(gpus, demo.TRAININGS[name], tmp_path) == [sys.executable, *expected]


def test_the_environment_of_the_demo(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("NCCL_NVLS_ENABLE", raising=False)
    assert demo.environment() == {**os.environ, "OMP_NUM_THREADS": "1", "NCCL_NVLS_ENABLE": "0"}
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
    assert demo.environment()["NCCL_NVLS_ENABLE"] == "1"


def test_records_of_training(reported, tmp_path):
    result = runner.invoke(app, ["bench", "--only", "demo", "--json", str(tmp_path / "results.json")])
    assert result.exit_code == 0, result.output
    runs = [("training", 1), ("training", 2), ("training-compiled", 1), ("training-compiled", 2)]
    runs += [("two-minutes", 1), ("two-minutes-compiled", 1)]
    assert reported == [
        (f"demo/{name} on {gpus} GPU{'s' * (gpus > 1)}", gpus, demo.TRAININGS[name]) for name, gpus in runs
    ]
    records = json.loads((tmp_path / "results.json").read_text())
    subjects = [(record["workload"], record["dtype"], record["gpus"], record["batch"]) for record in records]
    assert subjects == [
        (f"demo/{name}", "bfloat16" if "compiled" in name else "float32", gpus, 16 * gpus) for name, gpus in runs
    ]
    for record in records:
        is_judged = "two-minutes" in record["workload"]
        assert set(record) == KEYS | OF_TRAINING | (OF_WHAT_IS_LEARNT if is_judged else set())
        assert (record["pass"], record["clock"], record["views"]) == ("training", "wall", 4)
        assert record["saccade_us"] == pytest.approx(160e3 * record["gpus"] ** 0.5)
        assert record["scenes_per_second"] == pytest.approx(100 * record["gpus"] ** 0.5)
        assert record["backend"] == "triton"
        assert record["cores"] >= 1
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.output.splitlines() if "│" in line]
    learnt = ["6000", "4", "0.900", "0.800", "0.010", "0.000"]
    assert lines == [
        ["demo/training", "float32", "100", "141", "1.41x"],
        ["demo/training-compiled", "bfloat16", "100", "141", "1.41x"],
        ["demo/two-minutes", "float32", "118", "1900", *learnt],
        ["demo/two-minutes-compiled", "bfloat16", "118", "2500", *learnt],
    ]


def test_one_training_alone(reported):
    records = run.run("demo/training-compiled", Console(quiet=True))
    assert [record["gpus"] for record in records] == [1, 2]
    assert {record["workload"] for record in records} == {"demo/training-compiled"}


def test_training_is_timed_only_if_it_is_named(reported):
    run.run(None, Console(quiet=True), quick=True)
    assert reported == []


def test_training_on_another_number_of_gpus_is_another_record():
    earlier = [a_record(workload="demo/training", gpus=gpus, saccade_us=1) for gpus in (1, 2, 4)]
    later = [a_record(workload="demo/training", gpus=gpus, saccade_us=2) for gpus in (1, 2)]
    found = {
        record["gpus"]: record["saccade_us"]
        for record in records_of_runs.merged([*earlier, a_record()], later)
        if "gpus" in record
    }
    assert found == {1: 2, 2: 2, 4: 1}
    assert len(records_of_runs.merged([*earlier, a_record()], later)) == 4


def test_training_whose_loss_is_no_number_is_not_recorded(several_gpus, tmp_path, monkeypatch, clock):
    monkeypatch.setattr(demo, "_trained", lambda *_: a_report(1) | {"losses": {"total": {"last": math.nan}}})
    message = refused(clock, tmp_path, "--only", "demo")
    assert "demo/training on 1 GPU is not timed: its loss became nan" in message


def test_training_is_not_timed_if_an_operator_fails(reported, clock, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "check", lambda name, _: "raises" if name == "ragged" else None)
    assert "ragged is not timed: it raises" in refused(clock, tmp_path, "--only", "demo/training")
    assert reported == []


def test_training_that_fails_is_told_with_its_last_lines(several_gpus, clock, tmp_path, monkeypatch):
    monkeypatch.setattr(
        demo, "PROGRAM", ["-c", "for line in range(300): print('line', line)\nraise SystemExit('fault')"]
    )
    first, *lines = refused(clock, tmp_path, "--only", "demo").splitlines()
    assert first == "saccade bench: demo/training on 1 GPU ended with status 1; its last lines:"
    # The order of the two streams in the file is the program's own affair.
    assert len(lines) == demo.TOLD_LINES
    assert "fault" in lines
    assert "line 299" in lines


def test_training_that_takes_too_long_is_ended_with_all_its_processes(several_gpus, clock, tmp_path, monkeypatch):
    script = tmp_path / "endless.py"
    script.write_text(
        "import os, pathlib, time\n"
        "pathlib.Path(__file__).with_suffix('.' + str(os.getpid())).touch()\n"
        "time.sleep(600)\n"
    )
    popen, limit = subprocess.Popen, demo.LIMIT_S

    def ranks() -> list[int]:
        return [int(path.suffix[1:]) for path in tmp_path.glob("endless.*") if path != script]

    class Hurried(popen):
        """Its time is up as soon as both ranks run."""

        def wait(self, timeout=None):
            if timeout != limit:
                return super().wait(timeout)
            while len(ranks()) < 2 and self.poll() is None:
                time.sleep(0.05)
            raise subprocess.TimeoutExpired(self.args, timeout)

    monkeypatch.setattr(demo, "PROGRAM", [str(script)])
    monkeypatch.setattr(demo, "GPUS", (2,))
    monkeypatch.setattr(demo.subprocess, "Popen", Hurried)
    message = refused(clock, tmp_path, "--only", "demo/training")
    assert "demo/training on 2 GPUs took longer than 300 s; its last lines:" in message
    assert len(ranks()) == 2
    for rank in ranks():
        with pytest.raises(ProcessLookupError):
            os.kill(rank, 0)


@pytest.mark.parametrize("gpus", [(1,), pytest.param((1, 2), marks=pytest.mark.slow)])
def test_training_in_two_processes_is_measured(monkeypatch, gpus):
    """The demo itself, made small, on the CPU; without the slow case in one process alone."""
    monkeypatch.setattr(demo, "GPUS", gpus)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"DEVICE": "cpu", "BATCH": 1, "STEPS": 4}.items():
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr(demo, "PROGRAM", [str(ROOT / "tests" / "small_demo.py")])
    found = {record["gpus"]: record for record in demo.records(lambda _: None, lambda name: name == "demo/training")}
    assert tuple(found) == gpus
    for count, record in found.items():
        assert (record["batch"], record["steps"], record["backend"]) == (count, 4, "pytorch")
        assert 0 < record["scenes_per_second"] < math.inf
        assert 0 < record["saccade_us"] < 60e6


# ---- records as tables


def a_record(**values) -> dict:
    record = {"workload": "aggregation/det-b8", "pass": "forward", "dtype": "float32", "clock": "device"}
    record |= {"saccade_us": 150.4, "floor_us": 75.2, "baselines": {}, "recorded": {}, "error": 1.2e-6}
    return record | {"gpu": "NVIDIA H200", "torch": "2.11.0", "triton": "3.6.0", "commit": "a" * 40} | values


def test_markdown_of_records():
    records = [
        a_record(baselines={"grid_sample": 6000}, recorded={"old": 4325}),
        a_record(**{"pass": "backward", "saccade_us": 9.87, "error": None}),
        a_record(
            clock="wall", bce_us=120.0, peak_mb=330.0, needed_mb=300.0, baselines={"compiled": 25611.4}, commit="b" * 40
        ),
    ]
    assert tables.markdown(records) == "\n".join(
        [
            f"**Device time, microseconds**, taken on NVIDIA H200, torch 2.11.0, Triton 3.6.0, commit `{'a' * 10}`.",
            "",
            "| workload | dtype | pass | saccade | floor | x floor | grid_sample | old (recorded) | speed-up | error |",
            "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
            "| aggregation/det-b8 | float32 | forward | 150 | 75.2 | 2.0 | 6000 | 4325 | 28.8x | 1.2e-06 |",
            "| aggregation/det-b8 | float32 | backward | 9.9 | 75.2 | 0.1 |  |  |  |  |",
            "",
            f"**Wall time, microseconds**, taken on NVIDIA H200, torch 2.11.0, Triton 3.6.0, commit `{'b' * 10}`.",
            "",
            "| workload | dtype | pass | saccade | H | compiled | error | peak MB | of needed |",
            "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
            "| aggregation/det-b8 | float32 | forward | 150 | 1.25 | 25611 | 1.2e-06 | 330 | 1.10x |",
        ]
    )


def a_training(gpus: int, scenes_per_second: float, **values) -> dict:
    values = {"workload": "demo/training", "pass": "training", "clock": "wall", "cores": 64} | values
    return a_record(gpus=gpus, scenes_per_second=scenes_per_second, **values)


def test_markdown_of_training():
    of_mode = {"workload": "demo/training-compiled", "dtype": "bfloat16"}
    records = [a_training(4, 369.9), a_training(1, 123.4), a_training(2, 210.0), a_training(4, 400.0, **of_mode)]
    page = tables.with_results("<!-- throughput: demo -->\n\n<!-- results: aggregation -->", [*records, a_record()])
    table, of_aggregation = page.split("\n\n**Device time")
    assert "demo" not in of_aggregation
    assert table == "\n".join(
        [
            "**Scenes a second**, taken on NVIDIA H200, 64 CPU cores, torch 2.11.0, Triton 3.6.0, "
            f"commit `{'a' * 10}`.",
            "",
            "| workload | dtype | 1 GPU | 2 GPUs | speed-up | 4 GPUs | speed-up |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
            "| demo/training | float32 | 123 | 210 | 1.70x | 370 | 3.00x |",
            "| demo/training-compiled | bfloat16 |  |  |  | 400 |  |",
        ]
    )


def test_markdown_of_what_is_learnt():
    learnt = {"steps": 1900, "seconds": 118.4, "scenes": 8608, "views": 4, "untrained_recall": 0.0}
    learnt |= {"recall_at_2m": 0.8941, "precision": 0.9059, "control_recall": 0.0194}
    records = [a_training(1, 123.4), a_training(1, 320.0, workload="demo/two-minutes", **learnt)]
    page = tables.with_results("<!-- throughput: demo -->\n\n\n<!-- learnt: demo -->", records)
    throughput, table = page.split("\n\n\n")
    assert "two-minutes" not in throughput
    assert table == "\n".join(
        [
            f"**What is learnt**, taken on NVIDIA H200, 64 CPU cores, torch 2.11.0, Triton 3.6.0, commit `{'a' * 10}`.",
            "",
            "| workload | dtype | seconds | steps | scenes | --views | recall at 2 m | precision "
            "| control recall | untrained recall |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
            "| demo/two-minutes | float32 | 118 | 1900 | 8608 | 4 | 0.894 | 0.906 | 0.019 | 0.000 |",
        ]
    )


@pytest.mark.parametrize("marker", ["results: calls", "throughput: demo", "learnt: demo"])
def test_what_was_not_measured_is_said_to_be_so(marker):
    page = tables.with_results(f"before <!-- {marker} --> after", [a_record()])
    assert page == "before Not measured yet: `h200.json` has no such records. after"


def test_another_gpu_is_not_set_against_recorded_times():
    record = a_record(recorded={"old": 4325}, gpu="NVIDIA L4")
    assert "speed-up" not in [column.title for column in tables.columns([record])]


def test_a_page_gets_the_records_that_it_names():
    records = [a_record(), a_record(workload="losses/head")]
    page = tables.with_results("before\n\n<!-- results: losses -->\n\nafter", records)
    assert page.startswith("before\n\n**Device time")
    assert page.endswith("|\n\nafter")
    assert "losses/head" in page
    assert "aggregation" not in page
    assert tables.on_page_markdown("no marker") == "no marker"


RESULTS = json.loads(tables.RESULTS.read_text())
TRAININGS = [record for record in RESULTS if record["pass"] == "training"]


def test_committed_results_are_records():
    keys = [
        (record["workload"], record["pass"], record["dtype"], record["clock"], record.get("gpus")) for record in RESULTS
    ]
    assert len(set(keys)) == len(keys) > 0
    for record in RESULTS:
        assert set(record) >= KEYS
        assert record["pass"] in PASSES
        assert record["clock"] in tables.CLOCKS
        assert "H200" in record["gpu"]
        assert re.fullmatch("[0-9a-f]{40}", record["commit"])
        assert record["saccade_us"] > 0
        assert all(us > 0 for us in (*record["baselines"].values(), *record["recorded"].values()))
        assert record["error"] is None or record["error"] <= accuracy.TOLERANCES[record["dtype"]]


def test_the_documentation_shows_every_committed_result():
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    rows = [line for line in tables.on_page_markdown(page).splitlines() if re.match(r"\| [\w-]+/", line)]
    assert len(rows) == len(RESULTS) - len(TRAININGS) + len({record["workload"] for record in TRAININGS})
    for record in RESULTS:
        start = f"| {record['workload']} | {record['dtype']} | "
        if record in TRAININGS:
            is_learnt = "recall_at_2m" in record
            figure = f"{record['recall_at_2m']:.3f}" if is_learnt else tables.time_text(record["scenes_per_second"])
            assert any(row.startswith(start) and f" | {figure} |" in row for row in rows)
        else:
            assert any(row.startswith(f"{start}{record['pass']} | ") for row in rows)
    assert "tables.py" in (ROOT / "mkdocs.yml").read_text()


def test_the_readme_says_what_was_measured():
    readme = " ".join((ROOT / "README.md").read_text().split())
    for operator, kernel, said in (
        ("aggregation", "original CUDA kernel", "**deformable aggregation** is {} to {} times ({}) as fast"),
        ("sigmoid_focal_loss", "original CUDA kernel", "the **sigmoid focal loss** {} to {} times ({})"),
        ("heatmap", "ACCV-Lab package", "**drawing heatmaps** {} to {} times ({})"),
    ):
        gains = [
            (
                record["recorded"][kernel] / record["saccade_us"],
                f"`{record['workload'].split('/')[1]}`, {record['pass']}",
            )
            for record in RESULTS
            if record["workload"].startswith(f"{operator}/") and record["recorded"] and record["clock"] == "device"
        ]
        (least, of_least), (most, of_most) = min(gains), max(gains)
        assert said.format(f"{int(least)} ({of_least})", int(most), of_most) in readme
    assert "by the wall clock, no workload takes longer than what is timed beside it, or was recorded" in readme
    for record in RESULTS:
        if record["clock"] == "wall":
            assert all(record["saccade_us"] < us for us in {**record["baselines"], **record["recorded"]}.values())
