"""The nuScenes data set, read through nuscenes-devkit: its key frames, and its own way of judging a detector.

Boxes and projection matrices are in the frame of the lidar at the moment of its sweep, as everywhere in the demo. The
cameras expose a few milliseconds earlier or later; their matrices have the vehicle's motion in between in them.
"""

import copy
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
from scipy.spatial.transform import Rotation

from saccade_demo import DemoError
from saccade_demo.data.ahead import made_ahead
from saccade_demo.data.frame import read_image
from saccade_demo.evaluation import MAX_RANGE, Detections
from saccade_demo.geometry import Sample, yaw_rotation
from saccade_demo.rendering.scene import CAMERA_NAMES, IMAGE_WH

SPLITS = {"v1.0-mini": ("mini_train", "mini_val"), "v1.0-trainval": ("train", "val")}
"""Versions of the data set with annotations, and their official splits: to learn from, to be judged on."""
DEFAULT_VERSION = "v1.0-mini"
LIDAR = "LIDAR_TOP"
RACK = "static_object.bicycle_rack"
MAX_BOXES = 500
"""Boxes in a sample that the benchmark accepts."""
LOADERS = 4
"""Processes that read samples to learn from, and threads that read those to be judged on, all ahead of their use."""


class Tables(Protocol):
    """What is used of `nuscenes.NuScenes`."""

    def get(self, table_name: str, token: str) -> dict[str, Any]:
        """A record of a table."""
        ...


@dataclass(frozen=True)
class KeyFrame:
    """One annotated moment, its images not read yet."""

    token: str
    files: tuple[str, ...]  # of the cameras in the order of `CAMERA_NAMES`, below the root of the data set
    projection: np.ndarray  # (N, 4, 4) float64, from the lidar frame to pixels of the files, see `Sample`
    lidar2global: np.ndarray  # (4, 4) float64
    boxes: np.ndarray  # (M, 7) float64 in the lidar frame, see `Sample`
    labels: np.ndarray  # (M,) int64; negative: ignored


def read_key_frame(tables: Tables, token: str, label_of: Callable[[str], int]) -> KeyFrame:
    """What the tables say about a sample.

    Ignored are boxes of no class, boxes without a lidar or radar point in them, and bicycles and motorcycles in a
    bicycle rack, as in the benchmark; and those beyond `MAX_RANGE`, as everywhere in the demo. How much of a box the
    cameras see (`visibility_token`) is not looked at; it is not in the benchmark either.

    Args:
        tables: Of the data set.
        token: Of the sample.
        label_of: Class index of a category by its name; negative for none.
    """
    sample = tables.get("sample", token)
    for channel in (LIDAR, *CAMERA_NAMES):
        if channel not in sample["data"]:
            raise DemoError(f"--nuscenes: sample {token} has no key frame of {channel}")
    lidar2global = _sensor2global(tables, sample["data"][LIDAR])[0]
    files, projections = [], []
    for channel in CAMERA_NAMES:
        camera2global, data, calibration = _sensor2global(tables, sample["data"][channel])
        projection = np.eye(4)
        projection[:3] = np.array(calibration["camera_intrinsic"]) @ (np.linalg.inv(camera2global) @ lidar2global)[:3]
        projections.append(projection)
        files.append(data["filename"])
    boxes, labels = _boxes([tables.get("sample_annotation", a) for a in sample["anns"]], lidar2global, label_of)
    return KeyFrame(token, tuple(files), np.stack(projections), lidar2global, boxes, labels)


def _sensor2global(tables: Tables, token: str) -> tuple[np.ndarray, dict[str, Any], dict[str, Any]]:
    """Where a sensor was when it took a `sample_data`, (4, 4); that record; and the sensor's calibration."""
    data = tables.get("sample_data", token)
    calibration = tables.get("calibrated_sensor", data["calibrated_sensor_token"])
    return _transform(tables.get("ego_pose", data["ego_pose_token"])) @ _transform(calibration), data, calibration


def _transform(record: dict[str, Any]) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3] = _rotation([record["rotation"]]).as_matrix()[0]
    matrix[:3, 3] = record["translation"]
    return matrix


def _rotation(quaternions: Sequence[Sequence[float]]) -> Rotation:
    """From quaternions (M, 4) with the real part first, as nuScenes has them."""
    return Rotation.from_quat(np.roll(quaternions, -1, axis=-1))


def _boxes(
    annotations: Sequence[dict[str, Any]], lidar2global: np.ndarray, label_of: Callable[[str], int]
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (M, 7) in the lidar frame and labels (M,) of annotations."""
    if not annotations:
        return np.zeros((0, 7)), np.zeros(0, dtype=np.int64)
    center = np.array([a["translation"] for a in annotations], dtype=np.float64)
    size = np.array([a["size"] for a in annotations], dtype=np.float64)[:, [1, 0, 2]]  # from width, length, height
    rotation = _rotation([a["rotation"] for a in annotations])
    to_lidar = np.linalg.inv(lidar2global)
    ahead = (to_lidar[:3, :3] @ rotation.as_matrix())[..., 0]  # (M, 3) the way the length points
    place = center @ to_lidar[:3, :3].T + to_lidar[:3, 3]
    boxes = np.concatenate([place, size, np.arctan2(ahead[:, 1], ahead[:, 0])[:, None]], 1)

    labels = np.array([label_of(a["category_name"]) for a in annotations], dtype=np.int64)
    for rack in [i for i, a in enumerate(annotations) if a["category_name"] == RACK]:
        inside = (np.abs(rotation[rack].inv().apply(center - center[rack])) <= size[rack] / 2).all(1)
        cycle = [a["category_name"] in ("vehicle.bicycle", "vehicle.motorcycle") for a in annotations]
        labels[inside & cycle] = -1
    labels[[a["num_lidar_pts"] + a["num_radar_pts"] == 0 for a in annotations]] = -1
    labels[np.hypot(boxes[:, 0], boxes[:, 1]) > MAX_RANGE] = -1
    return boxes, labels


def result_boxes(frame: KeyFrame, detections: Detections, names: Sequence[str], attributes: Sequence[str]) -> list:
    """Detections in a key frame as the benchmark wants them: in the global frame, sizes as width, length, height.

    One moment says nothing about velocities and little about what an object is up to: velocities are 0, and attributes
    those that are given for the class.

    Args:
        frame: Where they were detected.
        detections: In the lidar frame; the best `MAX_BOXES` are taken.
        names: Of the classes.
        attributes: Name of an attribute for each class, empty for none.
    """
    detections = detections.chosen(np.argsort(-detections.scores, kind="stable")[:MAX_BOXES])
    turn = frame.lidar2global[:3, :3]
    boxes = detections.boxes.astype(np.float64)
    center = boxes[:, :3] @ turn.T + frame.lidar2global[:3, 3]
    rotation = turn @ yaw_rotation(boxes[:, 6])
    quaternion = np.roll(Rotation.from_matrix(rotation).as_quat(), 1, axis=-1) if len(boxes) else np.zeros((0, 4))
    return [
        {
            "sample_token": frame.token,
            "translation": center[i].tolist(),
            "size": boxes[i, [4, 3, 5]].tolist(),
            "rotation": quaternion[i].tolist(),
            "velocity": [0.0, 0.0],
            "detection_name": names[label],
            "detection_score": float(detections.scores[i]),
            "attribute_name": attributes[label],
        }
        for i, label in enumerate(detections.labels)
    ]


class LoadedFrames(Sequence[Sample]):
    """Samples that are read when they are wanted, ahead of whoever goes through all of them."""

    def __init__(self, load: Callable[[int], Sample], length: int):
        self.load = load
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.load(i) for i in range(self.length)[index]]
        return self.load(range(self.length)[index])

    def __iter__(self) -> Iterator[Sample]:
        return made_ahead(self.load, range(self.length), LOADERS)


class NuScenesScenes:
    """Key frames of nuScenes: those of the official training scenes to learn from, the validation scenes held out.

    Args:
        root: Where the data set lies: the folder with `samples`, `maps` and the folder of tables.
        version: Name of the folder of tables, one of `SPLITS`.
        scenes: Names of the scenes to take; by default all there are.
        seed: Of the order in which key frames are learnt from.

    Raises:
        DemoError: nuscenes-devkit is not installed, or something asked for is not there.
    """

    loaders = LOADERS
    num_cams = len(CAMERA_NAMES)

    def __init__(self, root: Path, version: str = DEFAULT_VERSION, scenes: Iterable[str] | None = None, seed: int = 0):
        self.root = root
        self.seed = seed
        self.tables = _tables(root, version)
        from nuscenes.eval.detection.constants import DETECTION_NAMES  # pyright: ignore[reportMissingImports]
        from nuscenes.utils.splits import create_splits_scenes  # pyright: ignore[reportMissingImports]

        self.class_names: tuple[str, ...] = tuple(DETECTION_NAMES)
        self.splits = SPLITS[version]
        official = create_splits_scenes()
        there = {scene["name"]: scene["token"] for scene in self.tables.scene}
        chosen = set(there if scenes is None else scenes)
        if chosen - set(there):
            raise DemoError(f"--scenes: {version} has no {', '.join(sorted(chosen - set(there)))}")
        self.held_out_scenes = sorted(chosen.intersection(official[self.splits[1]]))
        self.all_held_out = self.held_out_scenes == sorted(set(there).intersection(official[self.splits[1]]))
        self.train_tokens, self.held_out_tokens = (
            self._tokens({there[name] for name in chosen.intersection(official[split])}) for split in self.splits
        )
        for split, tokens, purpose in zip(
            self.splits, (self.train_tokens, self.held_out_tokens), ("learn from", "be judged on"), strict=True
        ):
            if not tokens:
                raise DemoError(f"--scenes: expected at least one scene of {split} to {purpose}, got none")
        self._require_images()
        self.held_out = LoadedFrames(self._held_out_sample, len(self.held_out_tokens))
        first = self.tables.get("sample", self.held_out_tokens[0])
        self.name = f"nuScenes {self.tables.get('scene', first['scene_token'])['name']}"
        self.training_samples: int | None = len(self.train_tokens)
        self.trained_on = f"{len(self.train_tokens)} key frames of {self.splits[0]}"
        self.evaluated_on = f"{len(self.held_out_tokens)} key frames of {self.splits[1]}"

    def _label_of(self, category: str) -> int:
        from nuscenes.eval.detection.utils import category_to_detection_name  # pyright: ignore[reportMissingImports]

        name = category_to_detection_name(category)
        return -1 if name is None else self.class_names.index(name)

    def _tokens(self, scenes: set[str]) -> list[str]:
        return [sample["token"] for sample in self.tables.sample if sample["scene_token"] in scenes]

    def _require_images(self) -> None:
        """Not all who have the tables have all the images: better said now than in the middle of training."""
        for token in self.train_tokens + self.held_out_tokens:
            data = self.tables.get("sample", token)["data"]
            for channel in CAMERA_NAMES:
                if channel in data and not (path := self.root / self._file(data[channel])).is_file():
                    raise DemoError(
                        f"{path}: no such image; if some scenes are not there, name the others with --scenes"
                    )

    def _file(self, sample_data: str) -> str:
        return self.tables.get("sample_data", sample_data)["filename"]

    def key_frame(self, token: str) -> KeyFrame:
        """What the tables say about a sample."""
        return read_key_frame(self.tables, token, self._label_of)

    def sample(self, token: str, image_wh: tuple[int, int] = IMAGE_WH) -> Sample:
        """A sample with its images, scaled and cut as those of `load_frame`."""
        frame = self.key_frame(token)
        images, projections = [], []
        for file, projection in zip(frame.files, frame.projection, strict=True):
            image, to_pixels = read_image(self.root / file, image_wh)
            images.append(image)
            projections.append(projection.copy())
            projections[-1][:3] = to_pixels @ projection[:3]
        return Sample(
            images=np.stack(images),
            projection=np.stack(projections).astype(np.float32),
            boxes=frame.boxes.astype(np.float32),
            labels=frame.labels,
            class_names=self.class_names,
            camera_names=CAMERA_NAMES,
        )

    def _held_out_sample(self, index: int) -> Sample:
        return self.sample(self.held_out_tokens[index])

    def training(self, number: int) -> Sample:
        """A key frame: all come in random order, then all in another one, and so on."""
        epoch, position = divmod(number, len(self.train_tokens))
        order = np.random.default_rng([self.seed, 3, epoch]).permutation(len(self.train_tokens))
        return self.sample(self.train_tokens[order[position]])

    def shown(self, image_wh: tuple[int, int]) -> tuple[Sample, Sample]:
        """The first held-out key frame."""
        token = self.held_out_tokens[0]
        return self.sample(token), self.sample(token, image_wh)

    def write_results(self, path: Path, detections: Iterable[Detections]) -> None:
        """Write what was detected in the held-out key frames, in their order, as the benchmark's JSON."""
        attributes = self._usual_attributes()
        results = {
            token: result_boxes(self.key_frame(token), found, self.class_names, attributes)
            for token, found in zip(self.held_out_tokens, detections, strict=True)
        }
        used = {"use_camera": True, "use_lidar": False, "use_radar": False, "use_map": False, "use_external": False}
        path.write_text(json.dumps({"meta": used, "results": results}) + "\n", encoding="utf-8")

    def _usual_attributes(self) -> list[str]:
        """The attribute that each class has most often in the scenes to learn from."""
        names = {attribute["token"]: attribute["name"] for attribute in self.tables.attribute}
        seen = [Counter() for _ in self.class_names]
        for token in self.train_tokens:
            for annotation in self.tables.get("sample", token)["anns"]:
                record = self.tables.get("sample_annotation", annotation)
                label = self._label_of(record["category_name"])
                if label >= 0:
                    seen[label].update(names[attribute] for attribute in record["attribute_tokens"])
        return [count.most_common(1)[0][0] if count else "" for count in seen]

    def official_metrics(self, path: Path) -> dict[str, Any] | None:
        """What the devkit's own evaluation says about written results; None if the held-out scenes have no boxes.

        A class of which these scenes have no box counts with an average precision of 0, as the devkit has it.

        Returns:
            `mAP`, `NDS`, the mean errors of true positives by name, and `AP` by class.
        """
        from nuscenes.eval.common.config import config_factory  # pyright: ignore[reportMissingImports]
        from nuscenes.eval.detection.evaluate import DetectionEval  # pyright: ignore[reportMissingImports]

        if not any((self.key_frame(token).labels >= 0).any() for token in self.held_out_tokens):
            return None
        tables, split = self.tables, self.splits[1]
        with TemporaryDirectory() as directory, redirect_stderr(StringIO()):  # there it draws progress bars
            if not self.all_held_out:
                # Some of the scenes only: a split of its own, which the devkit looks up in a file beside the tables.
                split = "held_out"
                tables = copy.copy(self.tables)
                tables.dataroot = directory
                (Path(directory) / tables.version).mkdir()
                splits = Path(directory) / tables.version / "splits.json"
                splits.write_text(json.dumps({split: self.held_out_scenes}), encoding="utf-8")
            config: Any = config_factory("detection_cvpr_2019")
            evaluation = DetectionEval(tables, config, str(path), split, directory, verbose=False)
            metrics = evaluation.evaluate()[0].serialize()
        return {
            "mAP": float(metrics["mean_ap"]),
            "NDS": float(metrics["nd_score"]),
            **{name: float(error) for name, error in metrics["tp_errors"].items()},
            "AP": {name: float(value) for name, value in metrics["mean_dist_aps"].items()},
        }


def _tables(root: Path, version: str) -> Any:
    """The data set's tables, as `nuscenes.NuScenes`."""
    if not root.is_dir():
        raise DemoError(f"--nuscenes {root}: no such directory")
    if version not in SPLITS:
        raise DemoError(f"--version: expected {' or '.join(SPLITS)}, got {version!r}")
    if not (root / version).is_dir():
        raise DemoError(f"--version: {root} has no {version}, {_versions_there(root)}")
    try:
        from nuscenes.nuscenes import NuScenes  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise DemoError(
            "--nuscenes needs nuscenes-devkit: pip install '.[nuscenes]', or with NumPy 2 or Python 3.13 as "
            f"docs/demo.md says ({error})"
        ) from error
    try:
        return NuScenes(version, str(root), verbose=False)
    except (AssertionError, AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        fault = " ".join(str(error).split()) or type(error).__name__
        raise DemoError(f"--nuscenes {root}: nuscenes-devkit cannot read {version} ({fault})") from error


def _versions_there(root: Path) -> str:
    there = [version for version in SPLITS if (root / version).is_dir()]
    return f"but {' and '.join(there)}" if there else "nor another version with annotations"
