"""The demo on nuScenes: a miniature data set in the devkit's table format, read, learnt from, and judged."""

import importlib.util
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation
from typer.testing import CliRunner

from saccade.cli import app
from saccade_demo import DemoError
from saccade_demo.data.ahead import made_ahead
from saccade_demo.data.nuscenes import KeyFrame, LoadedFrames, NuScenesScenes, read_key_frame, result_boxes
from saccade_demo.evaluation import Counts, Detections, match
from saccade_demo.geometry import BOX_SIGNS, Sample, box_corners, project, yaw_rotation
from saccade_demo.rendering.scene import CAMERA_NAMES, IMAGE_WH, calibration, random_world, render
from saccade_demo.rendering.solids import CLASS_NAMES

REAL_FRAME = Path(__file__).resolve().parents[2] / "shared" / "nuscenes_frame"

needs_devkit = pytest.mark.skipif(
    importlib.util.find_spec("nuscenes") is None, reason="nuscenes-devkit is not installed"
)

NAMES = (
    "car",
    "truck",
    "bus",
    "trailer",
    "construction_vehicle",
    "pedestrian",
    "motorcycle",
    "bicycle",
    "traffic_cone",
    "barrier",
)
CATEGORIES = {  # of each class one of its categories, and what the devkit's ten classes leave out
    "car": "vehicle.car",
    "truck": "vehicle.truck",
    "bus": "vehicle.bus.rigid",
    "trailer": "vehicle.trailer",
    "construction_vehicle": "vehicle.construction",
    "pedestrian": "human.pedestrian.adult",
    "motorcycle": "vehicle.motorcycle",
    "bicycle": "vehicle.bicycle",
    "traffic_cone": "movable_object.trafficcone",
    "barrier": "movable_object.barrier",
    "debris": "movable_object.debris",
    "wheelchair": "human.pedestrian.wheelchair",
    "rack": "static_object.bicycle_rack",
}
ATTRIBUTES = {"car": "vehicle.parked", "pedestrian": "pedestrian.standing"}
SCENES = ("scene-0061", "scene-0103", "scene-0916")  # the first is in mini_train, the others are all of mini_val
SAMPLES = 2
"""Key frames of each scene."""
IGNORED = (
    ("wheelchair", (6, 14, -1, 1, 0.7, 1.4, 0.3), 9),
    ("rack", (-7, 6, -1, 4, 3, 2, 0.5), 20),
    ("bicycle", (-7.5, 6.5, -1, 1.7, 0.6, 1.2, 1.2), 8),
    ("car", (30, 60, -1, 4.6, 1.9, 1.6, 2.0), 5),
    ("pedestrian", (3, 20, -1, 0.7, 0.7, 1.7, 0.0), 0),
)
"""Not one of the ten classes (two), in a rack, too far away, without a point in it: category, box in the lidar frame,
lidar points."""
BESIDE_THE_RACK = ("bicycle", (-3, 6, -1, 1.7, 0.6, 1.2, -0.4), 0)
"""Seen by no lidar but by a radar."""

# Rotations of the lidar against the vehicle, and of the vehicle against the world, real part first.
LIDAR2EGO = ((0.943, 0.0, 1.84), (0.7077955, -0.0064926, 0.0106460, -0.7063082))
EGO2GLOBAL_ROTATION = (0.9393727, 0.0087266, -0.0034907, -0.3427843)


def unit(quaternion: tuple[float, ...]) -> list[float]:
    return (np.array(quaternion) / np.linalg.norm(quaternion)).tolist()


def matrix(translation: Any, rotation: Any) -> np.ndarray:
    result = np.eye(4)
    result[:3, :3] = Rotation.from_quat(np.roll(rotation, -1)).as_matrix()
    result[:3, 3] = translation
    return result


def quaternion(rotation: np.ndarray) -> list[float]:
    return np.roll(Rotation.from_matrix(rotation).as_quat(), 1).tolist()


@dataclass(frozen=True)
class Pictures:
    """What a key frame of the data set is made of."""

    files: list[Path]
    image_wh: tuple[int, int]
    intrinsics: np.ndarray  # (N, 3, 3)
    lidar2cam: np.ndarray  # (N, 4, 4)
    boxes: list[tuple[str, Any, int]]  # class, box (7) in the lidar frame, lidar points


def real_pictures() -> Pictures:
    frame = json.loads((REAL_FRAME / "frame.json").read_text())
    cameras = {camera["name"]: camera for camera in frame["cameras"]}
    boxes = []
    for box in frame["boxes_3d"]:
        name = frame["class_names"][box["label"]] if box["label"] >= 0 else "debris"
        boxes.append((name, box["xyzlwhyaw"], box["num_lidar_pts"]))
    return Pictures(
        [REAL_FRAME / cameras[name]["image"] for name in CAMERA_NAMES],
        (1600, 900),
        np.array([cameras[name]["cam2img"] for name in CAMERA_NAMES]),
        np.array([cameras[name]["lidar2cam"] for name in CAMERA_NAMES]),
        boxes,
    )


def rendered_pictures(folder: Path) -> Pictures:
    folder.mkdir()
    image_wh = (2 * IMAGE_WH[0], 2 * IMAGE_WH[1])
    world = replace(random_world(np.random.default_rng(5)), turn=0.0)
    sample, _ = render(world, image_wh)
    for name, image in zip(CAMERA_NAMES, sample.images, strict=True):
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{name}.jpg", quality=90)
    boxes = [(CLASS_NAMES[label], box, 7) for box, label in zip(sample.boxes, sample.labels, strict=True) if label >= 0]
    return Pictures(
        [folder / f"{name}.jpg" for name in CAMERA_NAMES], image_wh, *calibration(world.rig, image_wh), boxes
    )


def write_data_set(root: Path, pictures: Pictures) -> Path:
    """All tables of nuScenes, with `SAMPLES` key frames of the same pictures in each of `SCENES`."""
    tables: dict[str, list[dict[str, Any]]] = {
        name: []
        for name in (
            *("category", "attribute", "visibility", "instance", "sensor", "calibrated_sensor", "ego_pose"),
            *("log", "scene", "sample", "sample_data", "sample_annotation", "map"),
        )
    }

    def add(table: str, token: str, **record: Any) -> str:
        tables[table].append({"token": token, **record})
        return token

    for name in CATEGORIES.values():
        add("category", f"category {name}", name=name, description="")
    for name in ("vehicle.moving", "vehicle.parked", "pedestrian.standing"):
        add("attribute", f"attribute {name}", name=name, description="")
    for level in "1234":
        add("visibility", level, level=level, description="")
    add("log", "log", logfile="", vehicle="", date_captured="", location="")
    add("map", "map", log_tokens=["log"], category="semantic_prior", filename="maps/map.png")
    (root / "maps").mkdir(parents=True)
    Image.new("L", (8, 8)).save(root / "maps" / "map.png")

    lidar2ego = matrix(LIDAR2EGO[0], unit(LIDAR2EGO[1]))
    # While a camera waits for its turn the vehicle goes on by 0.4 m and turns a little.
    onward = matrix((0.4, 0.01, 0.0), unit((1.0, 0.0, 0.0, 0.004)))
    calibrations = {"LIDAR_TOP": (LIDAR2EGO[0], unit(LIDAR2EGO[1]), [])}
    for name, intrinsics, lidar2cam in zip(CAMERA_NAMES, pictures.intrinsics, pictures.lidar2cam, strict=True):
        cam2ego = np.linalg.inv(onward) @ lidar2ego @ np.linalg.inv(lidar2cam)
        calibrations[name] = (cam2ego[:3, 3].tolist(), quaternion(cam2ego[:3, :3]), intrinsics.tolist())
    for channel, (translation, rotation, intrinsics) in calibrations.items():
        modality = "lidar" if channel == "LIDAR_TOP" else "camera"
        add("sensor", f"sensor {channel}", channel=channel, modality=modality)
        add(
            "calibrated_sensor",
            f"calibrated {channel}",
            sensor_token=f"sensor {channel}",
            translation=translation,
            rotation=rotation,
            camera_intrinsic=intrinsics,
        )

    for number, scene in enumerate(SCENES):
        tokens = [f"sample {scene} {index}" for index in range(SAMPLES)]
        add(
            *("scene", f"token of {scene}"),
            **{"name": scene, "description": "", "log_token": "log", "nbr_samples": SAMPLES},
            **{"first_sample_token": tokens[0], "last_sample_token": tokens[-1]},
        )
        for index, token in enumerate(tokens):
            timestamp = 1_532_402_927_000_000 + 500_000 * index
            around = {"prev": tokens[index - 1] if index else "", "next": (*tokens, "")[index + 1]}
            add("sample", token, timestamp=timestamp, scene_token=f"token of {scene}", **around)
            ego2global = matrix((600.0 + 100 * number + 3 * index, 1640.0 - index, 0.5), unit(EGO2GLOBAL_ROTATION))
            for channel in calibrations:
                pose = ego2global if channel == "LIDAR_TOP" else ego2global @ onward
                pose_token = add(
                    "ego_pose",
                    f"pose {token} {channel}",
                    timestamp=timestamp,
                    translation=pose[:3, 3].tolist(),
                    rotation=quaternion(pose[:3, :3]),
                )
                file = f"samples/{channel}/{scene}-{index}.{'bin' if channel == 'LIDAR_TOP' else 'jpg'}"
                record = {
                    **{"sample_token": token, "ego_pose_token": pose_token, "timestamp": timestamp},
                    **{"calibrated_sensor_token": f"calibrated {channel}", "fileformat": file[-3:], "filename": file},
                    **{"width": pictures.image_wh[0], "height": pictures.image_wh[1], "prev": "", "next": ""},
                }
                add("sample_data", f"data {token} {channel}", is_key_frame=True, **record)
                sweep = {"is_key_frame": False, "filename": file.replace("samples", "sweeps")}
                add("sample_data", f"sweep {token} {channel}", **record | sweep)  # whose file is not there
                if channel != "LIDAR_TOP":
                    (root / file).parent.mkdir(parents=True, exist_ok=True)
                    (root / file).symlink_to(pictures.files[CAMERA_NAMES.index(channel)])
            lidar2global = ego2global @ lidar2ego
            for i, (name, box, points) in enumerate([*pictures.boxes, *IGNORED, BESIDE_THE_RACK]):
                instance = f"instance {scene} {i}"
                around = {"prev": "", "next": ""}
                if index > 0:
                    around["prev"] = f"box {i} {tokens[index - 1]}"
                if index < SAMPLES - 1:
                    around["next"] = f"box {i} {tokens[index + 1]}"
                if index == 0:
                    ends = {"first_annotation_token": f"box {i} {tokens[0]}"}
                    ends["last_annotation_token"] = f"box {i} {tokens[-1]}"
                    category = f"category {CATEGORIES[name]}"
                    add("instance", instance, category_token=category, nbr_annotations=SAMPLES, **ends)
                length, width, height = (float(size) for size in box[3:6])
                add(
                    "sample_annotation",
                    f"box {i} {token}",
                    **{"sample_token": token, "instance_token": instance, "visibility_token": "1", **around},
                    attribute_tokens=[f"attribute {ATTRIBUTES[name]}"] if name in ATTRIBUTES else [],
                    translation=(lidar2global @ [*box[:3], 1])[:3].tolist(),
                    size=[width, length, height],
                    rotation=quaternion(lidar2global[:3, :3] @ yaw_rotation(float(box[6]))),
                    num_lidar_pts=points,
                    num_radar_pts=1 if i == len(pictures.boxes) + len(IGNORED) else 0,
                )
    (root / "v1.0-mini").mkdir()
    for name, records in tables.items():
        (root / "v1.0-mini" / f"{name}.json").write_text(json.dumps(records))
    return root


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Pictures:
    if REAL_FRAME.is_dir():
        return real_pictures()
    return rendered_pictures(tmp_path_factory.mktemp("pictures") / "rendered")


@pytest.fixture(scope="module")
def root(pictures, tmp_path_factory) -> Path:
    return write_data_set(tmp_path_factory.mktemp("nuscenes") / "root", pictures)


@pytest.fixture(scope="module")
def source(root) -> NuScenesScenes:
    return NuScenesScenes(root)


class PlainTables:
    """The tables as the devkit would show them, for tests that need none."""

    def __init__(self, root: Path):
        self.records = {
            path.stem: {record["token"]: record for record in json.loads(path.read_text())}
            for path in (root / "v1.0-mini").glob("*.json")
        }
        for sample in self.records["sample"].values():
            sample["data"], sample["anns"] = {}, []
        for data in self.records["sample_data"].values():
            if data["is_key_frame"]:
                sensor = self.get(
                    "sensor", self.get("calibrated_sensor", data["calibrated_sensor_token"])["sensor_token"]
                )
                self.get("sample", data["sample_token"])["data"][sensor["channel"]] = data["token"]
        for annotation in self.records["sample_annotation"].values():
            instance = self.get("instance", annotation["instance_token"])
            annotation["category_name"] = self.get("category", instance["category_token"])["name"]
            self.get("sample", annotation["sample_token"])["anns"].append(annotation["token"])

    def get(self, table: str, token: str) -> dict[str, Any]:
        return self.records[table][token]


def label_of(category: str) -> int:
    classes = {CATEGORIES[name]: label for label, name in enumerate(NAMES)}
    return classes.get(category, -1)


def first_frame(root: Path) -> tuple[PlainTables, KeyFrame]:
    tables = PlainTables(root)
    return tables, read_key_frame(tables, f"sample {SCENES[0]} 0", label_of)


def expected_labels(pictures: Pictures) -> list[int]:
    near = [points > 0 and np.hypot(*box[:2]) < 55 for _, box, points in pictures.boxes]
    labels = [NAMES.index(name) if name in NAMES else -1 for name, _, _ in pictures.boxes]
    return [label if n else -1 for label, n in zip(labels, near, strict=True)] + [-1] * 5 + [NAMES.index("bicycle")]


# ---- without the devkit


def rotated(quaternion: list[float], vectors: np.ndarray, back: bool = False) -> np.ndarray:
    """Vectors (..., 3) turned by a quaternion, straight from its definition; `back` by its inverse."""
    w, axis = quaternion[0], np.array(quaternion[1:]) * (-1 if back else 1)
    across = 2 * np.cross(axis, vectors)
    return vectors + w * across + np.cross(axis, across)


def pixels_step_by_step(tables: PlainTables, sample_data: str, points: np.ndarray) -> np.ndarray:
    """Where points (..., 3) of the world are in a camera's picture, by the data set's description, (u, v, depth)."""
    data = tables.get("sample_data", sample_data)
    calibration = tables.get("calibrated_sensor", data["calibrated_sensor_token"])
    for record in (tables.get("ego_pose", data["ego_pose_token"]), calibration):
        points = rotated(record["rotation"], points - record["translation"], back=True)
    u, v, depth = np.moveaxis(points @ np.array(calibration["camera_intrinsic"]).T, -1, 0)
    return np.stack([u / depth, v / depth, depth], -1)


def test_corners_land_where_a_projection_step_by_step_puts_them(root):
    tables, frame = first_frame(root)
    annotations = [tables.get("sample_annotation", a) for a in tables.get("sample", frame.token)["anns"]]
    assert len(frame.boxes) == len(annotations) > 15
    seen = 0
    for channel, file, projection in zip(CAMERA_NAMES, frame.files, frame.projection, strict=True):
        assert file == f"samples/{channel}/{SCENES[0]}-0.jpg"
        pixel, depth = project(box_corners(frame.boxes), projection)
        for annotation, corners, depths in zip(annotations, pixel, depth, strict=True):
            width, length, height = annotation["size"]
            world = rotated(annotation["rotation"], BOX_SIGNS * [length / 2, width / 2, height / 2])
            expected = pixels_step_by_step(tables, f"data {frame.token} {channel}", world + annotation["translation"])
            np.testing.assert_allclose(depths, expected[:, 2], atol=1e-4)  # BOX_SIGNS are float32
            if (depths > 1).all():
                np.testing.assert_allclose(corners, expected[:, :2], rtol=1e-4, atol=0.05)
                seen += 1
    assert seen > 15


def test_what_the_benchmark_leaves_out_is_ignored(root, pictures):
    _, frame = first_frame(root)
    assert frame.labels.tolist() == expected_labels(pictures)
    given = np.array([box for _, box, _ in [*pictures.boxes, *IGNORED, BESIDE_THE_RACK]], dtype=np.float64)
    # Quaternions made of float32 matrices turn a box by up to 1e-6, which 60 m away makes less than 1e-4 m.
    np.testing.assert_allclose(frame.boxes[:, :6], given[:, :6], atol=1e-4)
    np.testing.assert_allclose(np.cos(frame.boxes[:, 6] - given[:, 6]), 1, atol=1e-6)


def test_a_sample_without_boxes(root):
    tables, frame = first_frame(root)
    tables.get("sample", frame.token)["anns"] = []
    empty = read_key_frame(tables, frame.token, label_of)
    assert empty.boxes.shape == (0, 7)
    assert empty.labels.shape == (0,)
    assert empty.labels.dtype == np.int64


def test_a_sample_without_a_camera_is_named(root):
    tables, frame = first_frame(root)
    del tables.get("sample", frame.token)["data"]["CAM_BACK"]
    with pytest.raises(DemoError, match=f"sample {frame.token} has no key frame of CAM_BACK"):
        read_key_frame(tables, frame.token, label_of)


def as_detections(boxes: np.ndarray, labels: np.ndarray) -> Detections:
    """Boxes as if they had been found, those of classes; each one a little less certain than the one before."""
    found = labels >= 0
    return Detections(boxes[found], np.linspace(0.9, 0.5, found.sum(), dtype=np.float32), labels[found])


def test_results_are_the_annotations_again(root):
    tables, frame = first_frame(root)
    attributes = [f"of {name}" for name in NAMES]
    results = result_boxes(frame, as_detections(frame.boxes, frame.labels), NAMES, attributes)
    annotations = [tables.get("sample_annotation", a) for a in tables.get("sample", frame.token)["anns"]]
    counted = [a for a, label in zip(annotations, frame.labels, strict=True) if label >= 0]
    assert len(results) == len(counted) > 10
    for result, annotation in zip(results, counted, strict=True):
        assert result["sample_token"] == frame.token
        np.testing.assert_allclose(result["translation"], annotation["translation"], atol=1e-6)
        np.testing.assert_allclose(result["size"], annotation["size"], atol=1e-9)
        # A quaternion and its negative are one rotation.
        assert abs(np.dot(result["rotation"], annotation["rotation"])) == pytest.approx(1, abs=1e-9)
        assert CATEGORIES[result["detection_name"]] == annotation["category_name"]
        assert result["attribute_name"] == f"of {result['detection_name']}"
        assert result["velocity"] == [0, 0]
    scores = [result["detection_score"] for result in results]
    assert scores == sorted(scores, reverse=True)
    json.dumps(results)  # nothing of NumPy is left


def test_results_are_the_best_that_the_benchmark_accepts(root):
    _, frame = first_frame(root)
    boxes = np.tile(np.array([5, 5, 0, 4, 2, 1.5, 0.0]), (600, 1))
    scores = np.random.default_rng(0).permutation(600) / 600
    kept = result_boxes(frame, Detections(boxes, scores, np.zeros(600, int)), NAMES, [""] * 10)
    assert [result["detection_score"] for result in kept] == sorted(scores, reverse=True)[:500]
    assert result_boxes(frame, Detections(boxes[:0], scores[:0], np.zeros(0, int)), NAMES, [""] * 10) == []


def test_made_ahead_keeps_the_order_and_looks_no_further_than_asked():
    begun = []

    def make(index: int) -> int:
        begun.append(index)
        time.sleep(0.02 if index % 3 == 0 else 0)
        return index

    made = made_ahead(make, iter(range(20)), workers=3)
    assert next(made) == 0
    assert max(begun) <= 3
    assert list(made) == list(range(1, 20))
    assert list(made_ahead(make, [], workers=3)) == []


def test_a_fault_in_a_thread_is_raised_where_the_sample_is_wanted():
    def make(index: int) -> int:
        if index == 2:
            raise DemoError("no such image")
        return index

    made = made_ahead(make, range(100), workers=4)
    assert [next(made), next(made)] == [0, 1]
    with pytest.raises(DemoError, match="no such image"):
        next(made)


def test_loaded_frames_are_a_sequence():
    loaded: Any = LoadedFrames(lambda index: index, 5)
    assert len(loaded) == 5
    assert list(loaded) == [0, 1, 2, 3, 4]
    assert (loaded[1], loaded[-1], loaded[1:3]) == (1, 4, [1, 2])
    with pytest.raises(IndexError):
        loaded[5]


# ---- with it


@needs_devkit
def test_official_splits_and_classes(source):
    assert source.class_names == NAMES
    assert source.splits == ("mini_train", "mini_val")
    assert source.train_tokens == [f"sample {SCENES[0]} {i}" for i in range(SAMPLES)]
    assert source.held_out_tokens == [f"sample {scene} {i}" for scene in SCENES[1:] for i in range(SAMPLES)]
    assert len(source.held_out) == 2 * SAMPLES
    assert (source.trained_on, source.evaluated_on) == ("2 key frames of mini_train", "4 key frames of mini_val")


@needs_devkit
def test_samples_agree_with_the_devkits_own_projection(source, pictures):
    """And with their images, which are scaled to the demo's width and cut at the top."""
    from nuscenes.utils.geometry_utils import BoxVisibility, view_points

    token = source.train_tokens[1]
    sample = source.sample(token)
    assert isinstance(sample, Sample)
    assert sample.images.shape == (6, 3, IMAGE_WH[1], IMAGE_WH[0])
    assert sample.images.dtype == np.uint8
    assert sample.projection.dtype == sample.boxes.dtype == np.float32
    assert sample.labels.tolist() == expected_labels(pictures)
    width, height = pictures.image_wh
    scale, cut = IMAGE_WH[0] / width, round(height * IMAGE_WH[0] / width) - IMAGE_WH[1]
    landed = 0
    for camera, (channel, projection) in enumerate(zip(CAMERA_NAMES, sample.projection, strict=True)):
        file, boxes, intrinsics = source.tables.get_sample_data(f"data {token} {channel}", BoxVisibility.NONE)
        pixel, depth = project(box_corners(sample.boxes), projection)
        for box, corners, depths in zip(boxes, pixel, depth, strict=True):
            np.testing.assert_allclose(depths.mean(), box.center[2], atol=1e-3)
            if (depths > 1).all():
                expected = view_points(box.corners(), intrinsics, normalize=True)[:2].T * scale - [0, cut]
                # Corners are in another order. Float32 tells places 60 m away to 4e-6 m; what is beside a camera may
                # be far outside its image.
                np.testing.assert_allclose(corners.min(0), expected.min(0), rtol=1e-4, atol=0.02)
                np.testing.assert_allclose(corners.max(0), expected.max(0), rtol=1e-4, atol=0.02)
                landed += bool((corners.mean(0) > 0).all() and (corners.mean(0) < IMAGE_WH).all())
        with Image.open(file) as picture:
            small = picture.convert("RGB").resize((IMAGE_WH[0], cut + IMAGE_WH[1]), Image.Resampling.BOX)
        difference = np.abs(sample.images[camera].transpose(1, 2, 0) - np.asarray(small)[cut:].astype(float))
        assert difference.mean() < 5  # another way of scaling; neighbouring cameras differ by more than 25
    assert landed > 10


@needs_devkit
def test_training_goes_through_all_key_frames_in_an_order_of_the_seed(root):
    first, again, other = (NuScenesScenes(root, seed=seed) for seed in (3, 3, 4))
    for source in (first, again, other):
        source.train_tokens = [str(i) for i in range(50)]
        source.sample = lambda token: token

    def order(source: NuScenesScenes, steps: range) -> list[Any]:
        return [source.training(step) for step in steps]

    once, twice = order(first, range(50)), order(first, range(50, 100))
    assert sorted(once) == sorted(twice) == sorted(first.train_tokens)
    assert once != twice
    assert order(again, range(100)) == once + twice
    assert order(first, range(70, 80)) == twice[20:30]
    assert order(other, range(50)) != once


@needs_devkit
def test_shown_is_a_held_out_sample_in_two_sizes(source):
    sample, large = source.shown((2 * IMAGE_WH[0], 2 * IMAGE_WH[1]))
    assert large.image_wh == (2 * IMAGE_WH[0], 2 * IMAGE_WH[1])
    np.testing.assert_array_equal(sample.boxes, large.boxes)
    np.testing.assert_array_equal(sample.images, source.held_out[0].images)
    assert source.name == f"nuScenes {SCENES[1]}"


def truth(source: NuScenesScenes) -> Iterator[Detections]:
    for token in source.held_out_tokens:
        frame = source.key_frame(token)
        yield as_detections(frame.boxes.astype(np.float32), frame.labels)


@needs_devkit
@pytest.mark.parametrize("scenes", [None, SCENES[:2]], ids=["all", "a part of mini_val"])
def test_true_boxes_get_full_marks_from_the_devkit(root, tmp_path, scenes):
    from nuscenes.eval.common.loaders import load_prediction
    from nuscenes.eval.detection.data_classes import DetectionBox

    source = NuScenesScenes(root, scenes=scenes)
    file = tmp_path / "results.json"
    source.write_results(file, truth(source))
    read, meta = load_prediction(str(file), 500, DetectionBox)
    assert meta["use_camera"]
    assert not meta["use_lidar"]
    assert read.sample_tokens == source.held_out_tokens
    attributes = {box.detection_name: box.attribute_name for box in read.all}
    assert attributes["car"] == "vehicle.parked"
    assert attributes["bicycle"] == ""

    metrics = source.official_metrics(file)
    present = {box.detection_name for box in read.all}
    # The devkit looks less far than 55 m, so a class may have all of its boxes beyond its range.
    assert {name for name, ap in metrics["AP"].items() if ap > 0} <= present
    for name in ("car", "pedestrian", "bicycle"):
        assert metrics["AP"][name] == pytest.approx(1)
    counts = sum(
        (
            match(found, sample.boxes, sample.labels)
            for found, sample in zip(truth(source), source.held_out, strict=True)
        ),
        start=Counts(),
    )
    assert counts.recall == counts.precision == 1
    assert counts.boxes == len(read.all)

    # 0.7 m away is near enough for three of its four distances: 0.5, 1, 2 and 4 m.
    content = json.loads(file.read_text())
    for boxes in content["results"].values():
        for box in boxes:
            box["translation"][0] += 0.7
    file.write_text(json.dumps(content))
    moved = source.official_metrics(file)
    assert moved["AP"]["bicycle"] == pytest.approx(0.75)


@needs_devkit
def test_errors_of_true_boxes_are_none(source, tmp_path):
    """Classes without a box count with an error of 1, so look at one that has some."""
    from nuscenes.eval.common.config import config_factory
    from nuscenes.eval.detection.evaluate import DetectionEval

    file = tmp_path / "results.json"
    source.write_results(file, truth(source))
    config = config_factory("detection_cvpr_2019")
    evaluation = DetectionEval(source.tables, config, str(file), "mini_val", str(tmp_path), verbose=False)
    metrics = evaluation.evaluate()[0]
    for error in ("trans_err", "scale_err", "orient_err", "attr_err"):
        assert metrics.get_label_tp("car", error) < 1e-3
    # As fast as the vehicle, with which the boxes go, and taken to stand still.
    assert metrics.get_label_tp("car", "vel_err") == pytest.approx(math.hypot(3, 1) / 0.5, rel=1e-3)


@needs_devkit
def test_scenes_without_boxes_have_no_metrics(root, tmp_path):
    empty = tmp_path / "root"
    (empty / "v1.0-mini").mkdir(parents=True)
    for path in root.iterdir():
        if path.name != "v1.0-mini":
            (empty / path.name).symlink_to(path)
    for path in (root / "v1.0-mini").iterdir():
        kept = [record for record in json.loads(path.read_text()) if path.stem != "sample_annotation"]
        (empty / "v1.0-mini" / path.name).write_text(json.dumps(kept))
    source = NuScenesScenes(empty)
    nothing = Detections(np.zeros((0, 7)), np.zeros(0), np.zeros(0, int))
    source.write_results(tmp_path / "results.json", [nothing] * len(source.held_out_tokens))
    assert source.official_metrics(tmp_path / "results.json") is None


# ---- the command

runner = CliRunner()


@needs_devkit
def test_two_steps_write_results_that_the_devkit_reads(root, tmp_path):
    file, report_file = tmp_path / "results.json", tmp_path / "report.json"
    arguments = ["--nuscenes", str(root), "--scenes", ",".join(SCENES[:2]), "--steps", "2", "--device", "cpu"]
    arguments += ["--evaluate", str(file), "--out", str(tmp_path / "o"), "--json", str(report_file)]
    result = runner.invoke(app, ["demo", *arguments])
    assert result.exit_code == 0, result.output
    report = json.loads(report_file.read_text())
    assert report["samples"] == {"trained_on": 2, "evaluated_on": 2}
    assert report["boxes"] > 20
    assert math.isfinite(report["losses"]["total"]["last"])
    assert report["nuscenes"]["results"] == str(file)
    assert 0 <= report["nuscenes"]["metrics"]["mAP"] <= 1
    assert 0 <= report["nuscenes"]["metrics"]["NDS"] <= 1
    assert set(report["nuscenes"]["metrics"]["AP"]) == set(NAMES)
    assert set(json.loads(file.read_text())["results"]) == {f"sample {SCENES[1]} {i}" for i in range(SAMPLES)}
    assert "key frames of mini_val" in result.output
    assert "NDS" in result.output


def fails_with_one_line(arguments: list[str], message: str) -> None:
    result = runner.invoke(app, ["demo", *arguments])
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("saccade demo: ")
    assert message in lines[0]


def test_what_cannot_be_asked_is_one_line_and_exit_code_2(root, tmp_path):
    out = ["--out", str(tmp_path / "o")]
    there = [*out, "--nuscenes", str(root)]
    fails_with_one_line([*out, "--nuscenes", str(tmp_path / "nowhere")], "nowhere: no such directory")
    fails_with_one_line([*there, "--version", "v1.0-test"], "--version: expected v1.0-mini or v1.0-trainval")
    fails_with_one_line([*there, "--version", "v1.0-trainval"], "has no v1.0-trainval, but v1.0-mini")
    fails_with_one_line([*out, "--nuscenes", str(tmp_path)], "has no v1.0-mini, nor another version with annotations")
    fails_with_one_line([*there, "--frame", str(tmp_path)], "--frame and --nuscenes")
    fails_with_one_line([*out, "--scenes", "scene-0061"], "--scenes needs --nuscenes")
    fails_with_one_line([*out, "--evaluate", str(tmp_path / "f")], "--evaluate needs --nuscenes")
    fails_with_one_line([*there, "--evaluate", str(tmp_path)], f"--evaluate {tmp_path}: cannot write this file")


def test_without_the_devkit_one_line_says_what_to_install(root, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nuscenes.nuscenes", None)
    fails_with_one_line(["--nuscenes", str(root), "--out", str(tmp_path)], "pip install '.[nuscenes]'")


@needs_devkit
def test_what_is_not_there_is_one_line_and_exit_code_2(root, pictures, tmp_path):
    out = ["--out", str(tmp_path / "o")]
    there = [*out, "--nuscenes", str(root)]
    fails_with_one_line([*there, "--scenes", "scene-0061,scene-9999"], "--scenes: v1.0-mini has no scene-9999")
    fails_with_one_line([*there, "--scenes", SCENES[0]], "expected at least one scene of mini_val to be judged on")
    fails_with_one_line([*there, "--scenes", SCENES[1]], "expected at least one scene of mini_train to learn from")

    broken = write_data_set(tmp_path / "broken", replace(pictures, boxes=pictures.boxes[:3]))
    there = [*out, "--nuscenes", str(broken)]
    image = broken / "samples" / "CAM_BACK" / f"{SCENES[0]}-1.jpg"
    image.unlink()
    fails_with_one_line(there, f"{image}: no such image")
    image.write_bytes(b"no picture")
    fails_with_one_line([*there, "--steps", "2"], f"{image}: not a readable image")
    (broken / "maps" / "map.png").unlink()
    fails_with_one_line(there, "nuscenes-devkit cannot read v1.0-mini (map mask")
    (broken / "v1.0-mini" / "sample.json").write_text("[")
    fails_with_one_line(there, "nuscenes-devkit cannot read v1.0-mini")
