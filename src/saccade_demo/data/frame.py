"""A real frame from a directory: `frame.json` with calibration and boxes, and the camera images that it names.

`frame.json` holds `class_names`; `cameras`, each with `name`, `image` (a file beside it), `cam2img` (3x3, pixels) and
`lidar2cam` (4x4, metres); and `boxes_3d`, each with `xyzlwhyaw` in the lidar frame and `label`, an index into the
class names or negative for a box to be ignored.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from saccade_demo import DemoError
from saccade_demo.geometry import Sample
from saccade_demo.rendering.scene import IMAGE_WH


def load_frame(directory: Path, image_wh: tuple[int, int] = IMAGE_WH) -> Sample:
    """Read a frame, its images brought to one size.

    Images are scaled to the width asked for and cut at the top, where the sky is, to the height; the projection
    matrices follow.

    Args:
        directory: Where `frame.json` and the images lie.
        image_wh: Width and height in pixels of the images returned.

    Raises:
        DemoError: Something is missing or malformed; the message names the file and what is wrong with it.
    """
    if not directory.is_dir():
        raise DemoError(f"{directory}: no such directory")
    path = directory / "frame.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DemoError(f"{path}: {error.strerror}") from error
    except ValueError as error:  # neither JSON nor text
        raise DemoError(f"{path}: not valid JSON ({error})") from error
    class_names = _member(path, content, "frame", "class_names", list)
    cameras = _member(path, content, "frame", "cameras", list)
    if not cameras or not class_names:
        raise DemoError(
            f"{path}: expected at least one camera and one class, got {len(cameras)} and {len(class_names)}"
        )
    boxes, labels = _boxes(path, content, len(class_names))
    images, projections, names = [], [], []
    for index, camera in enumerate(cameras):
        where = f"cameras[{index}]"
        names.append(_member(path, camera, where, "name", str))
        cam2img = _numbers(path, camera, where, "cam2img", (3, 3))
        lidar2cam = _numbers(path, camera, where, "lidar2cam", (4, 4))
        image, to_pixels = read_image(directory / _member(path, camera, where, "image", str), image_wh)
        projection = np.eye(4)
        projection[:3] = to_pixels @ cam2img @ lidar2cam[:3]
        if abs(np.linalg.det(projection[:3, :3])) < 1e-9:
            raise DemoError(f"{path}: {where}: cam2img @ lidar2cam is not invertible")
        images.append(image)
        projections.append(projection)
    return Sample(
        images=np.stack(images),
        projection=np.stack(projections).astype(np.float32),
        boxes=boxes,
        labels=labels,
        class_names=tuple(str(name) for name in class_names),
        camera_names=tuple(names),
    )


def _member(path: Path, holder: Any, where: str, key: str, kind: type) -> Any:
    if not isinstance(holder, dict) or key not in holder:
        raise DemoError(f"{path}: {where} has no {key!r}")
    if not isinstance(holder[key], kind):
        raise DemoError(f"{path}: {where}: {key!r}: expected {kind.__name__}, got {type(holder[key]).__name__}")
    return holder[key]


def _numbers(path: Path, holder: Any, where: str, key: str, shape: tuple[int, ...]) -> np.ndarray:
    """A list of finite numbers (shape) as float64."""
    try:
        array = np.array(_member(path, holder, where, key, list), dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DemoError(f"{path}: {where}: {key!r}: expected numbers of shape {shape}") from error
    if array.shape != shape or not np.isfinite(array).all():
        raise DemoError(f"{path}: {where}: {key!r}: expected finite numbers of shape {shape}, got shape {array.shape}")
    return array


def _boxes(path: Path, content: Any, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    boxes, labels = [], []
    for index, entry in enumerate(_member(path, content, "frame", "boxes_3d", list)):
        where = f"boxes_3d[{index}]"
        box = _numbers(path, entry, where, "xyzlwhyaw", (7,))
        label = _member(path, entry, where, "label", int)
        if (box[3:6] <= 0).any():
            raise DemoError(f"{path}: {where}: expected a positive length, width and height, got {box[3:6].tolist()}")
        if label >= num_classes:
            raise DemoError(f"{path}: {where}: label {label} is not among the {num_classes} classes")
        boxes.append(box)
        labels.append(label)
    return np.array(boxes, dtype=np.float32).reshape(-1, 7), np.array(labels, dtype=np.int64)


def read_image(path: Path, image_wh: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """An image scaled to a width and cut at the top to a height.

    Returns:
        The image (3, H, W) uint8, and the matrix (3, 3) that takes pixels of the file to pixels of the image.
    """
    width, height = image_wh
    try:
        with Image.open(path) as file:
            original = file.size
            rows = round(original[1] * width / original[0])
            # A JPEG is decoded at half its size, or less, where that is still twice what is wanted: it saves much time.
            file.draft("RGB", (2 * width, 2 * rows))
            scaled = file.convert("RGB").resize((width, rows), Image.Resampling.BILINEAR)
    except FileNotFoundError as error:
        raise DemoError(f"{path}: no such image") from error
    except (OSError, SyntaxError) as error:  # what Pillow raises for damaged files
        raise DemoError(f"{path}: not a readable image ({error})") from error
    top = rows - height
    pixels = np.asarray(scaled.crop((0, top, width, rows)))
    scale_x, scale_y = width / original[0], rows / original[1]
    return pixels.transpose(2, 0, 1), np.array([[scale_x, 0, 0], [0, scale_y, -top], [0, 0, 1]])
