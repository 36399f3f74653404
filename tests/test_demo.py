"""The demo: its renderer, its geometry, how it judges itself, and the command."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from saccade.cli import app
from saccade.demo import DemoError
from saccade.demo.evaluation import Counts, Detections, match
from saccade.demo.frame import load_frame
from saccade.demo.geometry import Sample, box_corners, project, turned, wire_segments
from saccade.demo.run import DemoOptions, run_demo
from saccade.demo.scene import CAMERA_NAMES, GROUND_Z, IMAGE_WH, World, random_world, render, scene
from saccade.demo.train import decode_boxes, encode_boxes

REAL_FRAME = Path(__file__).resolve().parents[2] / "shared" / "nuscenes_frame"


# ---- evaluation


def a_box(x: float, y: float) -> list[float]:
    return [x, y, -1, 4, 2, 1.5, 0]


def counts(found: list[tuple[float, float, float, int]], truth: list[tuple[float, float, int]]) -> Counts:
    """`found`: x, y, score, label; `truth`: x, y, label."""
    detections = Detections(
        np.array([a_box(x, y) for x, y, _, _ in found]).reshape(-1, 7),
        np.array([score for *_, score, _ in found]),
        np.array([label for *_, label in found], dtype=int),
    )
    boxes = np.array([a_box(x, y) for x, y, _ in truth]).reshape(-1, 7)
    return match(detections, boxes, np.array([label for *_, label in truth], dtype=int))


@pytest.mark.parametrize(
    ("found", "truth", "expected"),
    [
        pytest.param([(10, 0, 0.9, 0), (0, 10, 0.8, 1)], [(0, 10, 1), (10, 0, 0)], (2, 0, 2), id="perfect"),
        pytest.param([(10, 0, 0.9, 1)], [(10, 0, 0)], (0, 1, 1), id="wrong class"),
        pytest.param([(11.9, 0, 0.9, 0)], [(10, 0, 0)], (1, 0, 1), id="within two metres"),
        pytest.param([(12.1, 0, 0.9, 0)], [(10, 0, 0)], (0, 1, 1), id="beyond two metres"),
        pytest.param([(10, 0, 0.29, 0)], [(10, 0, 0)], (0, 0, 1), id="score too low"),
        pytest.param([(10, 0, 0.3, 0)], [(10, 0, 0)], (1, 0, 1), id="score just enough"),
        pytest.param([(10, 0, 0.9, 0), (10, 0, 0.8, 0)], [(10, 0, 0)], (1, 1, 1), id="two predictions for one box"),
        pytest.param([(10, 0, 0.9, 0), (11, 0, 0.8, 0)], [(11, 0, 0), (9, 0, 0)], (2, 0, 2), id="one to one"),
        pytest.param([(10, 0, 0.9, 0)], [(10, 0, -1)], (0, 0, 0), id="ignored box found"),
        pytest.param([], [(10, 0, -1), (20, 0, 0)], (0, 0, 1), id="ignored box missed"),
        pytest.param(
            [(10, 0, 0.9, 0)], [(10, 0, -1), (11, 0, 0)], (1, 0, 1), id="a counted box goes before an ignored one"
        ),
        pytest.param([(56, 0, 0.9, 0)], [(56, 0, 0)], (0, 0, 0), id="beyond 55 m"),
        pytest.param([(54.5, 0, 0.9, 0)], [(55.5, 0, 0)], (0, 0, 0), id="prediction within 55 m of a box beyond"),
        pytest.param([(54.5, 0, 0.9, 1)], [(55.5, 0, 0)], (0, 1, 0), id="the same of another class"),
        pytest.param([(70, 0, 0.9, 0)], [(10, 0, 0)], (0, 0, 1), id="prediction beyond 55 m of nothing"),
        pytest.param([], [], (0, 0, 0), id="nothing"),
    ],
)
def test_matching(found, truth, expected):
    result = counts(found, truth)
    assert (result.true_positives, result.false_positives, result.boxes) == expected


def test_recall_and_precision_are_over_all_samples():
    both = counts([(10, 0, 0.9, 0)], [(10, 0, 0)]) + counts([(30, 0, 0.9, 0), (0, 9, 0.9, 0)], [(10, 0, 0), (0, 20, 0)])
    assert both.recall == pytest.approx(1 / 3)
    assert both.precision == pytest.approx(1 / 3)
    assert Counts().recall == Counts().precision == 0


def test_boxes_survive_the_anchor_layout():
    boxes = np.array([[1, 2, 3, 4, 2, 1.5, 0.3], [-5, 6, -1, 0.7, 0.6, 1.8, -3.1]], dtype=np.float32)
    encoded = encode_boxes(boxes)
    assert encoded.shape == (2, 11)
    np.testing.assert_allclose(
        encoded[0, 3:8], [math.log(4), math.log(2), math.log(1.5), math.sin(0.3), math.cos(0.3)], rtol=1e-6
    )
    np.testing.assert_allclose(decode_boxes(encoded), boxes, rtol=1e-5)


# ---- geometry


def forward_camera(width: int = 100, height: int = 50, focal: float = 50) -> np.ndarray:
    """A camera at the origin looking along y."""
    intrinsics = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
    projection = np.eye(4)
    projection[:3, :3] = intrinsics @ np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]])
    return projection


def test_projection_by_hand():
    pixel, depth = project(np.array([[2.0, 10.0, -1.0]]), forward_camera())
    np.testing.assert_allclose(depth, [10])
    np.testing.assert_allclose(pixel, [[60, 30]])  # 50 + 50 * 2 / 10 to the right, 25 + 50 * 1 / 10 down


def test_box_corners_by_hand():
    corners = box_corners(np.array([[10.0, 0, 0, 4, 2, 1, math.pi / 2]]))[0]
    np.testing.assert_allclose(corners[:2].mean(0), [10, 2, -0.5], atol=1e-6)  # the front, turned to the left
    np.testing.assert_allclose(corners.min(0), [9, -2, -0.5], atol=1e-6)
    np.testing.assert_allclose(corners.max(0), [11, 2, 0.5], atol=1e-6)


def test_wire_box_in_view_is_complete():
    segments = wire_segments(np.array([[0.0, 10, 0, 2, 2, 2, 0.4]]), forward_camera(), (100, 50))
    assert segments.shape == (1, 12, 2, 2)
    assert np.isfinite(segments).all()


def test_wire_box_behind_the_camera_is_not_drawn():
    assert np.isnan(wire_segments(np.array([[0.0, -10, 0, 2, 2, 2, 0]]), forward_camera(), (100, 50))).all()


def test_wire_box_through_the_near_plane_is_cut_not_mirrored():
    # From 5 m behind the camera to 15 m before it, 1 to 3 m to its right: the cut edges run off to the right.
    segments = wire_segments(np.array([[2.0, 5, 0, 2, 20, 1, 0]]), forward_camera(), (100, 50))
    drawn = segments[np.isfinite(segments).all((2, 3))]
    assert (
        len(drawn) == 8
    )  # the four edges at the far end, and the four along the box; those around the near end are behind
    assert (drawn[..., 0] > 50).all()


def test_turning_the_coordinates_leaves_pixels_where_they_are():
    before = scene(3, "train", 0)
    after = turned(before, 1.1)
    for a, b in zip(before.projection, after.projection, strict=True):
        (first, depth), (second, _) = project(before.boxes[:, :3], a), project(after.boxes[:, :3], b)
        np.testing.assert_allclose(first[depth > 1], second[depth > 1], atol=1e-2)
    np.testing.assert_allclose(box_corners(after.boxes)[:, 0, 2], box_corners(before.boxes)[:, 0, 2])


# ---- renderer


def a_world(boxes: list[list[float]], labels: list[int]) -> World:
    return replace(
        random_world(np.random.default_rng(0)),
        boxes=np.array(boxes, dtype=np.float32),
        labels=np.array(labels),
        paint=np.full((len(boxes), 2, 3), 0.5, dtype=np.float32),
    )


def on_ground(x: float, y: float, length: float, width: float, height: float, yaw: float = 0.0) -> list[float]:
    return [x, y, GROUND_Z + height / 2, length, width, height, yaw]


def test_a_box_is_seen_where_it_projects_to_and_in_the_right_camera():
    sample, views = render(a_world([on_ground(1, 15, 4, 2, 1.6, 0.5)], [0]))
    pixel, depth = project(sample.boxes[:, :3], sample.projection[0])
    column, row = pixel[0].astype(int)
    assert views[0].box[row, column] == 0
    assert (
        abs(views[0].depth[row, column] - depth[0]) < 2.3
    )  # the near side lies before the centre, by less than the half diagonal
    corners, _ = project(box_corners(sample.boxes), sample.projection[0])
    rows, columns = np.nonzero(views[0].box == 0)
    assert columns.min() + 0.5 >= corners[0, :, 0].min() >= columns.min() - 1.5
    assert rows.max() + 0.5 <= corners[0, :, 1].max() <= rows.max() + 1.5
    assert [int(view.pixels[0] > 0) for view in views] == [1, 0, 0, 0, 0, 0]
    assert sample.labels.tolist() == [0]


@pytest.mark.parametrize(("azimuth", "camera"), [(90, 0), (35, 1), (145, 2), (-90, 3), (200, 4), (-20, 5)])
def test_every_camera_looks_its_own_way(azimuth, camera):
    x, y = 12 * math.cos(math.radians(azimuth)), 12 * math.sin(math.radians(azimuth))
    _, views = render(a_world([on_ground(x, y, 0.7, 0.7, 1.8)], [2]))
    assert int(np.argmax([view.pixels[0] for view in views])) == camera


def test_an_occluder_hides_what_is_behind_it():
    wall, person = on_ground(0, 8, 8, 1, 3.2), on_ground(0, 14, 0.7, 0.7, 1.75)
    sample, views = render(a_world([wall, person], [1, 2]))
    assert sample.labels.tolist() == [1, -1]
    assert views[0].pixels[1] == 0
    assert views[0].outline[1] > 50
    alone, _ = render(a_world([person], [2]))
    assert alone.labels.tolist() == [2]
    assert not np.array_equal(alone.images[0], sample.images[0])


def test_a_larger_picture_of_a_scene_has_the_same_boxes_and_labels():
    small, large = scene(0, "held-out", 0), scene(0, "held-out", 0, (2 * IMAGE_WH[0], 2 * IMAGE_WH[1]))
    assert large.images.shape == (6, 3, 2 * IMAGE_WH[1], 2 * IMAGE_WH[0])
    np.testing.assert_array_equal(small.boxes, large.boxes)
    assert (small.labels == large.labels).mean() > 0.9  # a box at the limit may fall on the other side
    shrunk = large.images.reshape(6, 3, IMAGE_WH[1], 2, IMAGE_WH[0], 2).mean((3, 5))
    assert np.abs(shrunk - small.images).mean() < 0.02


def test_scenes_are_repeatable_and_splits_differ():
    one, again, other = scene(1, "train", 4), scene(1, "train", 4), scene(1, "held-out", 4)
    np.testing.assert_array_equal(one.images, again.images)
    assert one.boxes.shape != other.boxes.shape or not np.allclose(one.boxes, other.boxes)
    assert one.images.dtype == np.float32
    assert one.images.min() >= 0
    assert one.images.max() <= 1
    assert np.hypot(one.boxes[:, 0], one.boxes[:, 1]).max() < 36


# ---- frames


def write_frame(directory: Path, **changes) -> Path:
    """A miniature frame in the layout of `load_frame`: six cameras of 160x90 and two boxes, from a rendered scene."""
    directory.mkdir(exist_ok=True)
    sample, _ = render(a_world([on_ground(1, 12, 4.5, 1.9, 1.6), on_ground(0, -9, 0.7, 0.7, 1.75)], [0, 2]), (160, 90))
    cameras = []
    for name, pixels, projection in zip(CAMERA_NAMES, sample.images, sample.projection, strict=True):
        Image.fromarray((pixels.transpose(1, 2, 0) * 255).astype(np.uint8)).save(directory / f"{name}.jpg")
        # Intrinsics in the projection, so that the extrinsics may be anything: only the product counts.
        cameras.append(
            {"name": name, "image": f"{name}.jpg", "cam2img": np.eye(3).tolist(), "lidar2cam": projection.tolist()}
        )
    boxes = [
        {"xyzlwhyaw": box.tolist(), "label": label}
        for box, label in zip(sample.boxes, sample.labels.tolist(), strict=True)
    ]
    frame = {"class_names": list(sample.class_names), "cameras": cameras, "boxes_3d": boxes, **changes}
    (directory / "frame.json").write_text(json.dumps(frame))
    return directory


def test_a_frame_is_scaled_with_its_matrices(tmp_path):
    sample = load_frame(write_frame(tmp_path / "frame"))
    assert sample.images.shape == (6, 3, IMAGE_WH[1], IMAGE_WH[0])
    assert sample.class_names[0] == "car"
    # Of 160x90 pixels scaled by 2.2, the upper 70 rows are cut off.
    original = json.loads((tmp_path / "frame" / "frame.json").read_text())
    point = sample.boxes[:1, :3]
    before, _ = project(point, np.array(original["cameras"][0]["lidar2cam"]))
    after, _ = project(point, sample.projection[0])
    np.testing.assert_allclose(after, before * 2.2 - [0, 70], atol=0.05)
    # The picture went the same way: where the box now projects to, it differs from one without the box.
    empty, _ = render(a_world([on_ground(1, -30, 4.5, 1.9, 1.6)], [0]))
    column, row = after[0].astype(int)
    assert np.abs(sample.images[0, :, row, column] - empty.images[0, :, row, column]).max() > 0.05


@pytest.mark.skipif(not REAL_FRAME.is_dir(), reason="the nuScenes frame does not lie beside the repository")
def test_the_real_frame_projects_into_its_2d_boxes():
    sample = load_frame(REAL_FRAME)
    assert sample.boxes.shape == (69, 7)
    scale, cut = IMAGE_WH[0] / 1600, round(900 * IMAGE_WH[0] / 1600) - IMAGE_WH[1]
    found = total = 0
    for camera, projection in zip(
        json.loads((REAL_FRAME / "frame.json").read_text())["cameras"], sample.projection, strict=True
    ):
        pixel, depth = project(sample.boxes[:, :3], projection)
        for box in camera["boxes_2d"]:
            (left, top, right, bottom), (u, v) = box["xyxy"], box["center_2d"]
            if not (left < u < right and top < v < bottom):
                continue  # cut by the border of the image
            x1, y1, x2, y2 = np.array(box["xyxy"]) * scale - [0, cut, 0, cut]
            inside = (depth > 0) & (pixel >= [x1 - 0.5, y1 - 0.5]).all(1) & (pixel <= [x2 + 0.5, y2 + 0.5]).all(1)
            found += bool((inside & (np.abs(depth - box["depth"]) < 0.5)).any())
            total += 1
    assert total > 75
    assert found == total


# ---- the command


runner = CliRunner()


@pytest.mark.parametrize(
    ("arguments", "amp", "steps"),
    [
        ([], "off", 400),
        (["--amp"], "bf16", 400),
        (["--amp", "--steps", "3"], "bf16", 3),
        (["--amp", "fp16"], "fp16", 400),
    ],
)
def test_options_reach_the_run(monkeypatch, tmp_path, arguments, amp, steps):
    """Also none at all, which is what `make demo` runs."""
    asked = []

    def run(options):
        asked.append(options)
        return {"interrupted": False}

    monkeypatch.setattr("saccade.demo.run.run_demo", run)
    monkeypatch.chdir(tmp_path)
    result = runner.invoke(app, ["demo", *arguments])
    assert result.exit_code == 0, result.output
    (options,) = asked
    assert (options.amp, options.steps, options.seed, options.frame) == (amp, steps, 0, None)
    assert options.device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert options.out == Path("demo-output")


def test_two_steps_write_pictures_and_json(tmp_path):
    out, file = tmp_path / "pictures", tmp_path / "report.json"
    result = runner.invoke(
        app,
        ["demo", "--steps", "2", "--frame", str(write_frame(tmp_path / "f")), "--out", str(out), "--json", str(file)],
    )
    assert result.exit_code == 0, result.output
    report = json.loads(file.read_text())
    for key in ("recall_at_2m", "precision", "untrained_recall", "control_recall"):
        assert 0 <= report[key] <= 1
    assert report["steps"] == 2
    assert report["device"].startswith("cuda" if torch.cuda.is_available() else "cpu")
    assert report["amp"] == "off"
    assert report["backends"]["deformable_aggregation"] in ("pytorch", "triton")
    for loss in report["losses"].values():
        assert len(loss["curve"]) == 2
        assert math.isfinite(loss["last"])
    names = ("cameras.png", "birds_eye.png", "sampling.png", "heatmaps.png", "curves.png", "progress.gif")
    assert report["pictures"] == [str(out / name) for name in names]
    for name in names:
        with Image.open(out / name) as picture:
            assert picture.format == name[-3:].upper()
            assert min(picture.size) > 300
    for shown in ("recall at 2 m", "untrained recall", "control recall", "total loss", "deformable_aggregation"):
        assert shown in result.output


def options(tmp_path: Path, **changes) -> DemoOptions:
    return replace(
        DemoOptions(steps=2, seed=0, frame=None, device="cpu", amp="off", out=tmp_path, held_out=1), **changes
    )


def test_the_same_seed_gives_the_same_losses(tmp_path):
    first, again = run_demo(options(tmp_path)), run_demo(options(tmp_path))
    other = run_demo(options(tmp_path, seed=1))
    assert first["losses"] == again["losses"]
    assert first["losses"] != other["losses"]


def test_a_frame_without_boxes_trains(tmp_path):
    report = run_demo(options(tmp_path, frame=write_frame(tmp_path / "f", boxes_3d=[])))
    assert report["boxes"] == 0
    assert all(math.isfinite(loss["last"]) for loss in report["losses"].values())
    assert report["losses"]["box"]["last"] == 0


def test_bfloat16_trains(tmp_path):
    report = run_demo(options(tmp_path, amp="bf16"))
    assert all(math.isfinite(loss["last"]) for loss in report["losses"].values())


def broken_frame(directory: Path, fault: str) -> Path:
    write_frame(directory)
    frame = json.loads((directory / "frame.json").read_text())
    if fault == "no such directory":
        return directory / "nowhere"
    if fault == "no such image":
        (directory / "CAM_BACK.jpg").unlink()
    elif fault == "not a readable image":
        jpeg = (directory / "CAM_BACK.jpg").read_bytes()
        (directory / "CAM_BACK.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    elif fault == "No such file":
        (directory / "frame.json").unlink()
    elif fault == "not valid JSON":
        (directory / "frame.json").write_text("")
    elif fault == "frame has no 'class_names'":
        (directory / "frame.json").write_text("[]")
    else:
        if fault == "cameras[2] has no 'lidar2cam'":
            del frame["cameras"][2]["lidar2cam"]
        elif fault == "'cam2img': expected finite numbers of shape (3, 3), got shape (3, 4)":
            frame["cameras"][0]["cam2img"] = np.eye(4)[:3].tolist()
        elif fault == "'lidar2cam': expected numbers of shape (4, 4)":
            frame["cameras"][0]["lidar2cam"] = [[1, 0], [0]]
        elif fault == "label 17 is not among the 4 classes":
            frame["boxes_3d"][0]["label"] = 17
        (directory / "frame.json").write_text(json.dumps(frame))
    return directory


def fails_with_one_line(arguments: list[str], message: str) -> None:
    result = runner.invoke(app, ["demo", *arguments])
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert message in lines[0]


@pytest.mark.parametrize(
    "fault",
    [
        "no such directory",
        "no such image",
        "not a readable image",
        "No such file",
        "not valid JSON",
        "frame has no 'class_names'",
        "cameras[2] has no 'lidar2cam'",
        "'cam2img': expected finite numbers of shape (3, 3), got shape (3, 4)",
        "'lidar2cam': expected numbers of shape (4, 4)",
        "label 17 is not among the 4 classes",
    ],
)
def test_a_broken_frame_is_one_line_and_exit_code_2(tmp_path, fault):
    fails_with_one_line(["--frame", str(broken_frame(tmp_path / "f", fault)), "--out", str(tmp_path / "o")], fault)


def test_bad_options_are_one_line_and_exit_code_2(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    out = ["--out", str(tmp_path / "o")]
    fails_with_one_line([*out, "--steps", "0"], "--steps")
    fails_with_one_line(["--out", str(file / "below")], "--out")
    fails_with_one_line(["--out", str(file)], "--out")
    fails_with_one_line([*out, "--json", str(file / "r.json")], "--json")
    fails_with_one_line([*out, "--json", str(tmp_path)], "--json")
    fails_with_one_line([*out, "--amp", "int8"], "--amp")
    fails_with_one_line([*out, "--device", "cpu", "--amp", "fp16"], "--amp")
    fails_with_one_line([*out, "--device", "abacus"], "--device")
    fails_with_one_line([*out, "--device", "meta"], "--device")
    fails_with_one_line([*out, "--device", f"cuda:{torch.cuda.device_count()}"], "--device")


def test_amp_alone_means_bfloat16(tmp_path):
    fails_with_one_line(["--amp", "--steps", "0", "--out", str(tmp_path)], "--steps")  # it did not swallow "--steps"
    fails_with_one_line(["--steps", "0", "--out", str(tmp_path), "--amp"], "--steps")


def test_help_tells_every_option():
    text = re.sub(r"\x1b\[[0-9;]*m", "", runner.invoke(app, ["demo", "--help"], terminal_width=200).output)
    training = ("--batch", "--micro-batch", "--compile", "--deterministic", "--checkpoint-every", "--tensorboard")
    for option in ("--steps", "--seed", "--frame", "--device", "--amp", "--out", "--json", "--checkpoint", *training):
        assert f" {option} " in text


def test_errors_of_the_library_are_demo_errors(tmp_path):
    with pytest.raises(DemoError, match="no such directory"):
        load_frame(tmp_path / "nowhere")


def test_sample_knows_its_size():
    sample = scene(0, "train", 0)
    assert isinstance(sample, Sample)
    assert sample.image_wh == IMAGE_WH


# ---- the benchmark


def test_bench_without_a_gpu_or_with_an_unknown_suite_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = runner.invoke(app, ["bench"])
    assert result.exit_code == 2
    assert result.stderr.startswith("saccade bench: torch")
    assert len(result.stderr.splitlines()) == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    result = runner.invoke(app, ["bench", "--only", "everything"])
    assert result.exit_code == 2
    suites = "aggregation, losses, heatmap, ragged"
    expected = f"--only: expected one of {suites}, or one of their workloads, got 'everything'"
    assert result.stderr == f"saccade bench: {expected}\n"
