"""The pictures of the demo: what they show is where it should be, and making them changes nothing."""

import importlib.util
import json
import math
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.collections import PathCollection
from PIL import Image
from typer.testing import CliRunner

import saccade
from saccade.cli import app
from saccade_demo import run
from saccade_demo.evaluation import Counts, Detections
from saccade_demo.geometry import Sample, project, turned_boxes, yaw_rotation
from saccade_demo.model import KEY_POINTS, Detector
from saccade_demo.pictures import plots
from saccade_demo.pictures.plots import Canvas, draw_birds_eye, draw_cameras, draw_heatmaps
from saccade_demo.pictures.progress import draw_curves, draw_progress
from saccade_demo.pictures.sampling import draw_sampling, recorded, telling_query
from saccade_demo.rendering.scene import GROUND_Z, scene
from saccade_demo.run import snapshot_steps
from saccade_demo.training.recipe import Recipe
from saccade_demo.training.trainer import Trainer
from small_demo import SmallScenes, after_step, make_small, small_config

DOCS = Path(__file__).parents[1] / "docs"
NAMES = ["cameras.png", "birds_eye.png", "sampling.png", "heatmaps.png", "curves.png", "progress.gif"]
draw = run._draw


@pytest.fixture
def small(monkeypatch):
    make_small(monkeypatch.setattr)
    return monkeypatch


@pytest.fixture
def canvases(monkeypatch) -> list[Canvas]:
    """Those that were saved."""
    saved: list[Canvas] = []
    save = Canvas.save

    def save_and_keep(self: Canvas, path: Path) -> None:
        saved.append(self)
        save(self, path)

    monkeypatch.setattr(plots.Canvas, "save", save_and_keep)
    return saved


def demo(tmp_path: Path, *options: Any) -> dict[str, Any]:
    report = tmp_path / "r.json"
    arguments = ["demo", "--device", "cpu", "--out", tmp_path, "--json", report, *options]
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code in (0, 130), result.output
    return json.loads(report.read_text())


def a_trainer(num_groups: int = 2) -> Trainer:
    """Not trained, but with attention that differs from point to point."""
    torch.manual_seed(0)
    model = Detector(replace(small_config(num_classes=4), num_groups=num_groups))
    for layer in model.layers:
        torch.nn.init.normal_(layer.aggregation.weights_fc.weight, std=0.5)
    return Trainer(SmallScenes(0, 0), model, torch.device("cpu"), Recipe(1))


def found_in(sample: Sample, score: float = 0.9) -> Detections:
    """What a perfect detector finds."""
    known = sample.labels >= 0
    return Detections(sample.boxes[known], np.full(known.sum(), score), sample.labels[known])


# ---- files


def test_a_run_draws_all_pictures(tmp_path, small):
    small.setattr(run, "_draw", draw)
    report = demo(tmp_path, "--steps", 3)
    assert report["pictures"] == [str(tmp_path / name) for name in NAMES]
    widths = []
    for name in NAMES:
        with Image.open(tmp_path / name) as picture:
            assert picture.format == name[-3:].upper()
            widths.append(picture.width)
    assert widths == [1500, 1000, 1500, 1500, 1400, 960]
    assert (tmp_path / "progress.gif").stat().st_size < 1_500_000
    with Image.open(tmp_path / "progress.gif") as animation:
        assert animation.n_frames == len(snapshot_steps(3)) == 4


def test_snapshots_are_farther_apart_the_later():
    for steps in (1, 2, 3, 10, 400, 20_000):
        at = sorted(snapshot_steps(steps))
        assert at[0] == 0
        assert at[-1] == steps
        assert len(at) <= 13
    gaps = np.diff(sorted(snapshot_steps(4000))[1:])
    assert (np.diff(gaps) >= 0).all()
    assert gaps[-1] > 5 * gaps[0]


# ---- what making them leaves alone


def test_snapshots_and_curves_do_not_change_training(tmp_path, small):
    """Losses, weights and running statistics have the same bits with and without looking at every step."""
    states = []
    for every, steps_kept in ((1, set(range(6))), (0, set())):
        small.setattr(run, "snapshot_steps", lambda _, kept=steps_kept: kept)
        file = tmp_path / f"{every}.pt"
        report = demo(tmp_path, "--steps", 5, "--checkpoint", file, "--curve-every", every)
        states.append(torch.load(file, weights_only=True)["state"])
        assert list(report["curve"]) == [str(step) for step in range(6) if every]
        assert list(states[-1]["history"]["snapshots"]) == sorted(steps_kept)
    looked, blind = states
    assert looked["history"]["losses"] == blind["history"]["losses"]
    for name, tensor in blind["trainer"]["model"].items():
        assert torch.equal(tensor, looked["trainer"]["model"][name]), name


def test_an_interrupted_and_resumed_run_has_the_whole_curve(tmp_path, small):
    options = ["--steps", 5, "--curve-every", 2]
    undisturbed = demo(tmp_path, *options)["curve"]
    assert list(undisturbed) == ["0", "2", "4"]
    small.setattr(run, "_draw", draw)
    options += ["--checkpoint", tmp_path / "c.pt"]
    with small.context() as patch:
        after_step(2, lambda: signal.raise_signal(signal.SIGINT), patch.setattr)
        assert list(demo(tmp_path, *options)["curve"]) == ["0", "2"]
    assert all((tmp_path / name).exists() for name in NAMES)
    for name in ("draw_cameras", "draw_birds_eye", "draw_sampling", "draw_heatmaps"):
        small.setattr(run, name, lambda *_: None)  # which show nothing of what was saved
    assert demo(tmp_path, *options)["curve"] == undisturbed


def test_by_default_the_curve_has_ten_parts(tmp_path, small):
    assert list(demo(tmp_path, "--steps", 20)["curve"]) == [str(step) for step in range(0, 21, 2)]


def test_recording_leaves_no_hooks_and_changes_nothing():
    trainer = a_trainer()
    sample = trainer.source.held_out[0]
    before = trainer.detect(sample)[2]
    with recorded(trainer.model):
        during = trainer.detect(sample)[2]
    assert torch.equal(before.anchors[-1], during.anchors[-1])
    assert torch.equal(before.logits[-1], during.logits[-1])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in trainer.model.modules())


# ---- where a query looks


def test_recorded_points_and_weights_are_those_of_the_module():
    """The operator, given what was recorded, gathers what the module gathered. With one group, a share is a weight."""
    trainer = a_trainer(num_groups=1)
    module = trainer.model.layers[-1].aggregation
    gathered = []
    hook = module.output_proj.register_forward_pre_hook(lambda _, args: gathered.append(args[0]))
    with recorded(trainer.model) as recorder:
        trainer.detect(trainer.source.held_out[0])
    hook.remove()
    sampling = recorder.sampling()
    np.testing.assert_allclose(sampling.share.sum((1, 2, 3)), 1, rtol=1e-5)
    assert sampling.share.max() > 3 * sampling.share.mean()  # else uniform weights in any order would do
    expected = saccade.deformable_aggregation(
        *recorder.heard["arguments"][3],
        torch.from_numpy(sampling.location)[None],
        torch.from_numpy(sampling.share)[None, ..., None],
    )
    # Float32, with the same numbers in another memory layout.
    torch.testing.assert_close(gathered[0], expected, rtol=1e-4, atol=1e-5)
    # What lands in no image adds nothing.
    lands = torch.from_numpy(sampling.lands)[None, ..., None, None]
    without = saccade.deformable_aggregation(
        *recorder.heard["arguments"][3],
        torch.from_numpy(sampling.location)[None],
        torch.from_numpy(sampling.share)[None, ..., None] * lands,
    )
    assert torch.equal(without, expected)
    assert 0 < sampling.lands.mean() < 1


def test_the_picture_shows_points_where_an_independent_projection_puts_them(tmp_path, canvases):
    trainer = a_trainer()
    sample = trainer.source.held_out[0]
    with recorded(trainer.model) as recorder:
        _, _, output = trainer.detect(sample)
    sampling = recorder.sampling()
    query = telling_query(output, sampling, np.zeros((0, 7)))
    large = scene(0, "held-out", 0, (384, 128))  # of four times the size that the detector sees
    draw_sampling(tmp_path / "s.png", large, output, sampling, query, "scene")
    box = sampling.anchors[query]
    points = box[:3] + (np.array(KEY_POINTS) * box[3:6]) @ yaw_rotation(box[6]).T
    (canvas,) = canvases
    panels = {axes.texts[0].get_text(): axes for axes in canvas.figure.axes if axes.texts}
    assert len(panels) == 6
    total = 0
    for camera, projection in enumerate(large.projection):
        pixel, depth = project(points, projection)
        inside = (depth > 0) & (pixel > 0).all(1) & (pixel < large.image_wh).all(1)
        axes = panels[plots.camera_title(large, camera)]
        fixed = next(c for c in axes.collections if isinstance(c, PathCollection))
        drawn = np.asarray(fixed.get_offsets())
        assert len(drawn) == inside.sum()
        for place in pixel[inside]:
            assert np.abs(drawn - place).max(1).min() < 0.02  # pixels; the module computes in float32
        total += inside.sum()
    assert total >= 7


def test_of_the_detections_one_in_two_cameras_is_shown():
    trainer = a_trainer()
    with recorded(trainer.model) as recorder:
        found, _, output = trainer.detect(trainer.source.held_out[0])
    sampling = recorder.sampling()
    shared = (sampling.lands.sum(1) >= 2).sum(1) >= 2
    assert 0 < shared.sum() < len(shared)
    assert shared[telling_query(output, sampling, found.boxes)]


# ---- boxes


def test_names_do_not_overlap(tmp_path, canvases):
    sample = scene(3, "held-out", 0)  # a crowded one
    found = found_in(sample)
    found = replace(found, boxes=np.concatenate([found.boxes, found.boxes + 0.3]), scores=np.tile(found.scores, 2))
    found = replace(found, labels=np.tile(found.labels, 2))
    draw_cameras(tmp_path / "c.png", sample, found, Counts(1, 1, 2), "scene")
    names = 0
    for axes in canvases[0].figure.axes:
        extents = [text.get_window_extent() for text in axes.texts]
        for index, one in enumerate(extents):
            assert axes.bbox.x0 <= one.x0 + 1
            assert one.x1 <= axes.bbox.x1 + 1
            assert not any(one.overlaps(other) for other in extents[:index])
        names += len(extents) - 1
    assert names >= 15


def test_seen_from_above_a_box_heads_where_it_should(tmp_path, canvases):
    sample = scene(0, "held-out", 0)
    box = np.array([[3.0, 12.0, GROUND_Z, 4, 2, 1.5, math.radians(90)]], dtype=np.float32)
    # Up is where the front camera looks, whichever way the axes of the sample point.
    ahead = np.arctan2(sample.projection[0, 2, 1], sample.projection[0, 2, 0])
    sample = replace(sample, boxes=turned_boxes(box, ahead - math.pi / 2), labels=np.array([0]))
    nothing = Detections(np.zeros((0, 7)), np.zeros(0), np.zeros(0, dtype=int))
    draw_birds_eye(tmp_path / "b.png", sample, nothing, Counts(0, 0, 1), "scene")
    white = [line for line in canvases[0].figure.axes[0].lines if line.get_color() == plots.TRUE]
    outline, heading = (np.asarray(line.get_xydata()) for line in white)
    np.testing.assert_allclose([outline.min(0), outline.max(0)], [[2, 10], [4, 14]], atol=1e-4)
    np.testing.assert_allclose(heading, [[3, 12], [3, 14.8]], atol=1e-4)  # ahead is up


@pytest.mark.parametrize("cameras", [1, 2, 4, 7])
def test_rigs_of_any_size_and_samples_without_boxes_are_drawn(tmp_path, cameras):
    sample = scene(0, "held-out", 0, (96, 32))
    which = np.arange(cameras) % 6
    sample = replace(
        sample,
        images=sample.images[which],
        projection=sample.projection[which],
        camera_names=tuple(f"c{i}" for i in range(cameras)),
        boxes=np.zeros((0, 7), dtype=np.float32),
        labels=np.zeros(0, dtype=np.int64),
    )
    nothing = found_in(sample)
    maps = np.zeros((cameras, 4, 8, 24), dtype=np.float32)
    draw_cameras(tmp_path / "c.png", sample, nothing, Counts(), "scene")
    draw_birds_eye(tmp_path / "b.png", sample, nothing, Counts(), "scene")
    draw_heatmaps(tmp_path / "h.png", sample, maps, maps, "scene")
    draw_progress(tmp_path / "p.gif", sample, {0: nothing}, "scene")
    assert {path.name for path in tmp_path.iterdir()} == {"c.png", "b.png", "h.png", "p.gif"}


def test_the_animation_counts_what_is_found_so_far(tmp_path):
    sample = scene(0, "held-out", 0, (96, 32))
    nothing = found_in(sample).chosen([])
    draw_progress(tmp_path / "p.gif", sample, {0: nothing, 9: found_in(sample)}, "scene")
    with Image.open(tmp_path / "p.gif") as animation:
        assert animation.n_frames == 2
        animation.seek(1)
        assert animation.info["duration"] == 3500


def test_curves_of_a_single_step_are_drawn(tmp_path):
    final = {"untrained": Counts(), "trained": Counts(1, 1, 2), "control": Counts(0, 0, 2)}
    draw_curves(tmp_path / "c.png", {"class": [1.0], "total": [1.0]}, {}, "none", final)
    assert (tmp_path / "c.png").stat().st_size > 0


# ---- the page


def test_the_pictures_of_the_page(tmp_path):
    page = (DOCS / "demo.md").read_text()
    for name, most in (("demo_cameras.png", 250_000), ("demo_sampling.png", 350_000), ("demo_progress.gif", 900_000)):
        assert f"](pictures/{name})" in page
        assert 10_000 < (DOCS / "pictures" / name).stat().st_size < most
    specification = importlib.util.spec_from_file_location("demo_pictures", DOCS / "pictures" / "demo.py")
    assert specification is not None
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    for name in ("cameras.png", "sampling.png", "progress.gif"):
        Image.new("RGB", (1500, 300), "#ff9f1c").save(tmp_path / name)
    script.take(tmp_path, tmp_path)
    with Image.open(tmp_path / "demo_cameras.png") as picture:
        assert picture.size == (1200, 240)
        # The palette is that of eight levels or so of each colour.
        np.testing.assert_allclose(picture.convert("RGB").getpixel((600, 100)), (255, 159, 28), atol=16)
