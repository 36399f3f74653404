"""One synchronised set of camera images, and the projective geometry around it.

Coordinates are those of the nuScenes lidar frame: metres, x to the right, y forward, z up, the origin on the roof. A
camera's z axis looks forward, so the third row of a projection matrix gives the depth. Pixel (0, 0) is the upper left
*corner* of the image: pixel centres lie at half-integers, as `saccade.deformable_aggregation` has it.
"""

from dataclasses import dataclass, replace

import numpy as np

NEAR = 0.1
"""Metres in front of a camera at which boxes and edges are cut off."""

# Corner i of a box has the signs BOX_SIGNS[i] along its length, width and height; corners 0-3 are the bottom, 0 and 1
# the front.
BOX_SIGNS = np.array(
    [(1, 1, -1), (1, -1, -1), (-1, -1, -1), (-1, 1, -1), (1, 1, 1), (1, -1, 1), (-1, -1, 1), (-1, 1, 1)],
    dtype=np.float32,
)
BOX_EDGES = np.array(
    [(0, 1), (1, 2), (2, 3), (3, 0), (4, 5), (5, 6), (6, 7), (7, 4), (0, 4), (1, 5), (2, 6), (3, 7)], dtype=np.int64
)


@dataclass(frozen=True)
class Sample:
    """The images of all cameras at one moment, with the boxes around the vehicle."""

    images: np.ndarray  # (N, 3, H, W) uint8, RGB
    projection: np.ndarray  # (N, 4, 4) float32: point -> (u * depth, v * depth, depth, 1), u and v in pixels
    boxes: np.ndarray  # (M, 7) float32: centre x, y, z, length, width, height, yaw (0: the length lies along x)
    labels: np.ndarray  # (M,) int64; negative: ignored, neither to be found nor wrong to be found
    class_names: tuple[str, ...]
    camera_names: tuple[str, ...]

    @property
    def image_wh(self) -> tuple[int, int]:
        """Width and height of the images in pixels."""
        return self.images.shape[3], self.images.shape[2]


def box_corners(boxes: np.ndarray) -> np.ndarray:
    """The eight corners (M, 8, 3) of boxes (M, 7), in the order of `BOX_SIGNS`."""
    local = BOX_SIGNS * boxes[:, None, 3:6] / 2
    return local @ yaw_rotation(boxes[:, 6]).swapaxes(-1, -2) + boxes[:, None, :3]


def yaw_rotation(yaw: np.ndarray | float) -> np.ndarray:
    """Rotation about z, (..., 3, 3), for angles (...) in radians."""
    cos, sin = np.cos(yaw), np.sin(yaw)
    zero, one = np.zeros_like(cos), np.ones_like(cos)
    return np.stack([cos, -sin, zero, sin, cos, zero, zero, zero, one], -1).reshape(*np.shape(yaw), 3, 3)


def project(points: np.ndarray, projection: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (..., 2) and depths (...) in metres of points (..., 3) under one matrix (4, 4).

    Pixels of points with a depth below `NEAR` mean nothing.
    """
    homogeneous = points @ projection[:3, :3].T + projection[:3, 3]
    depth = homogeneous[..., 2]
    return homogeneous[..., :2] / np.maximum(depth, NEAR)[..., None], depth


def wire_segments(boxes: np.ndarray, projection: np.ndarray, image_wh: tuple[int, int]) -> np.ndarray:
    """The visible edges of boxes as line segments (M, 12, 2, 2) in pixels; NaN where nothing of an edge is visible.

    Edges are cut at the near plane *before* the division by depth (a corner behind the camera would otherwise appear
    mirrored on the other side of the image), then those wholly outside the image are dropped.
    """
    ends = box_corners(boxes)[:, BOX_EDGES] @ projection[:3, :3].T + projection[:3, 3]  # (M, 12, 2, 3)
    depth = ends[..., 2]
    behind = depth < NEAR
    span = depth[..., 1] - depth[..., 0]
    cut = (NEAR - depth[..., 0]) / np.where(span == 0, 1, span)
    on_plane = ends[..., 0, :] + cut[..., None] * (ends[..., 1, :] - ends[..., 0, :])
    crosses = behind.any(-1) & ~behind.all(-1)
    ends = np.where((behind & crosses[..., None])[..., None], on_plane[..., None, :], ends)
    pixels = ends[..., :2] / np.maximum(ends[..., 2:], NEAR)
    size = np.asarray(image_wh)
    outside = ((pixels < 0).all(-2) | (pixels > size).all(-2)).any(-1)
    return np.where((behind.all(-1) | outside)[..., None, None], np.nan, pixels)


def turned(sample: Sample, angle: float) -> Sample:
    """The same sample in a coordinate frame turned about z by `angle` radians: what the cameras saw stays as it is."""
    turn = np.eye(4, dtype=np.float32)
    turn[:3, :3] = yaw_rotation(angle)
    return replace(sample, boxes=turned_boxes(sample.boxes, angle), projection=sample.projection @ turn.T)


def mirrored(sample: Sample) -> Sample:
    """The same sample in a mirror: what was on the right is on the left, in the images and around the vehicle."""
    sides = np.diag(np.array([-1, 1, 1, 1], dtype=np.float32))
    columns = sides.copy()
    columns[0, 2] = sample.image_wh[0]
    boxes = sample.boxes.copy()
    boxes[:, 0] *= -1
    boxes[:, 6] = np.pi - boxes[:, 6]
    images = np.ascontiguousarray(sample.images[..., ::-1])
    return replace(sample, images=images, boxes=boxes, projection=columns @ sample.projection @ sides)


def turned_boxes(boxes: np.ndarray, angle: float) -> np.ndarray:
    """Boxes (M, 7) in a coordinate frame turned about z by `angle` radians."""
    boxes = boxes.copy()
    boxes[:, :3] = boxes[:, :3] @ yaw_rotation(angle).T.astype(boxes.dtype)
    boxes[:, 6] += angle
    return boxes
