"""The demo: its renderer, its geometry, how it judges itself, and the command."""

import hashlib
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial import ConvexHull
from typer.testing import CliRunner

from saccade.cli import app
from saccade_demo import DemoError
from saccade_demo.data.batch import decode_boxes, encode_boxes
from saccade_demo.data.frame import load_frame
from saccade_demo.evaluation import Counts, Detections, match
from saccade_demo.geometry import Sample, box_corners, mirrored, project, turned, wire_segments
from saccade_demo.rendering.scene import (
    CAMERA_NAMES,
    GROUND_Z,
    IMAGE_WH,
    JITTER,
    OBJECTS,
    RANGE,
    RIG,
    VISIBLE_PIXELS,
    VISIBLE_SHARE,
    Camera,
    View,
    World,
    calibration,
    random_solid,
    random_world,
    render,
    scene,
)
from saccade_demo.rendering.solids import CLASS_NAMES, SIZES, random_parts
from saccade_demo.rendering.surroundings import random_light
from saccade_demo.run import DemoOptions, run_demo
from small_demo import make_small

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


def test_a_mirror_exchanges_left_and_right():
    before = scene(3, "train", 0)
    after = mirrored(before)
    width, _ = before.image_wh
    sides = (1, 0, 3, 2, 5, 4, 7, 6)  # corners, with those on the other side of the box in their place
    for a, b in zip(before.projection, after.projection, strict=True):
        (first, depth), (second, same) = (
            project(box_corners(sample.boxes), matrix) for sample, matrix in ((before, a), (after, b))
        )
        np.testing.assert_allclose(same[:, sides], depth, atol=1e-4)
        seen = depth > 1
        np.testing.assert_allclose(second[:, sides][seen][:, 0], width - first[seen][:, 0], atol=1e-2)
        np.testing.assert_allclose(second[:, sides][seen][:, 1], first[seen][:, 1], atol=1e-2)
    np.testing.assert_array_equal(after.images[:, :, :, 0], before.images[:, :, :, -1])
    again = mirrored(after)
    np.testing.assert_array_equal(again.images, before.images)
    np.testing.assert_allclose(again.projection, before.projection, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(again.boxes, before.boxes, atol=1e-5)


# ---- renderer


def a_world(boxes: list[list[float]], kinds: list[int], **changes) -> World:
    """A scene with nothing but these; the vehicle's coordinates are not turned."""
    rng = np.random.default_rng(1)
    solids = tuple(random_solid(rng, kind, np.array(box)) for kind, box in zip(kinds, boxes, strict=True))
    return replace(random_world(np.random.default_rng(0)), solids=solids, turn=0.0, **changes)


def on_ground(x: float, y: float, length: float, width: float, height: float, yaw: float = 0.0) -> list[float]:
    return [x, y, GROUND_Z + height / 2, length, width, height, yaw]


KINDS = range(len(SIZES))
USUAL_RIG = tuple(Camera(np.radians([yaw, 0, 0]), np.array(place), focal, np.ones(3)) for yaw, place, focal in RIG)


def of_usual_size(kind: int, x: float, y: float, yaw: float = 0.5) -> list[float]:
    length, width, height = SIZES[kind, :, 0].tolist()
    return on_ground(x, y, length, width, height, yaw)


def test_a_box_is_seen_where_it_projects_to_and_in_the_right_camera():
    sample, views = render(a_world([on_ground(1, 15, 4, 2, 1.6, 0.5)], [0]))
    pixel, depth = project(sample.boxes[:, :3], sample.projection[0])
    column, row = pixel[0].astype(int)
    assert views[0].solid[row, column] == 0
    # The near side lies before the centre, by less than the half diagonal.
    assert abs(views[0].depth[row, column] - depth[0]) < 2.3
    assert [int(view.pixels[0] > 0) for view in views] == [1, 0, 0, 0, 0, 0]
    assert sample.labels.tolist() == [0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("azimuth", "camera"), [(90, 0), (35, 1), (145, 2), (-90, 3), (200, 4), (-20, 5)])
def test_a_solid_fills_the_outline_of_its_projected_box_and_never_leaves_it(kind, azimuth, camera):
    """The calibration is that of the jittered camera: half a degree off, pixels would leave the outline."""
    x, y = 12 * math.cos(math.radians(azimuth)), 12 * math.sin(math.radians(azimuth))
    world = a_world([of_usual_size(kind, x, y)], [kind])
    sample, views = render(world, (2 * IMAGE_WH[0], 2 * IMAGE_WH[1]))
    assert int(np.argmax([view.pixels[0] for view in views])) == camera
    boxes = np.array([solid.box for solid in world.solids])
    corners, _ = project(box_corners(boxes), sample.projection[camera])
    rows, columns = np.nonzero(views[camera].solid == 0)
    # Signed distances in pixels of the pixels' centres from the sides of the convex hull, negative within it.
    sides = ConvexHull(corners[0]).equations
    distance = sides[:, :2] @ np.stack([columns, rows]) + sides[:, :2].sum(1, keepdims=True) / 2 + sides[:, 2:]
    assert distance.max() < 0.1  # rays are of float32
    if kind in (0, 1, 3):
        # The lower edges go all the way to the corners; a metre is 30 pixels wide or more. Roll tilts them a little.
        assert columns.min() < max(corners[0, :, 0].min(), 0) + 4
        assert columns.max() > min(corners[0, :, 0].max(), 2 * IMAGE_WH[0]) - 5
        assert rows.max() > corners[0, :, 1].max() - 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(5))
def test_parts_reach_the_faces_of_their_box_and_not_beyond(kind, seed):
    size = np.array(SIZES[kind, :, 0])
    parts = random_parts(np.random.default_rng(seed), kind, size).astype(float)
    middle, half, lean = parts[:, :3], parts[:, 3:6], parts[:, 6:8]
    half[:, :2] += np.abs(lean) * half[:, 2:]
    low, high = (middle - half).min(0), (middle + half).max(0)
    assert (low >= [-size[0] / 2 - 1e-6, -size[1] / 2 - 1e-6, -1e-6]).all()
    assert (high <= size * [0.5, 0.5, 1] + 1e-6).all()
    if kind < len(CLASS_NAMES):
        assert low[2] == pytest.approx(0, abs=1e-6)
        assert high[2] == pytest.approx(size[2], rel=1e-5)
        assert high[1] == pytest.approx(size[1] / 2, rel=1e-5)
        if kind != 2:  # people do not always take long steps
            assert (low[0], high[0]) == pytest.approx((-size[0] / 2, size[0] / 2), rel=1e-5)


def test_an_occluder_hides_what_is_behind_it():
    wall, person = on_ground(0, 8, 8, 1, 3.2), on_ground(0, 14, 0.7, 0.7, 1.75)
    sample, views = render(a_world([wall, person], [1, 2]))
    assert sample.labels.tolist() == [1, -1]
    assert views[0].pixels[1] == 0
    assert views[0].outline[1] > 50
    alone, _ = render(a_world([person], [2]))
    assert alone.labels.tolist() == [2]
    assert not np.array_equal(alone.images[0], sample.images[0])


def test_what_is_hardly_seen_is_ignored():
    """By the pixels in which one camera sees it, and their share of those in which it would be seen by itself."""
    far_off = [on_ground(0, distance, 0.5, 0.5, 0.9) for distance in range(20, 130, 10)]
    counted = {True: [], False: []}
    for box in far_off:
        sample, views = render(a_world([box], [3]))
        counted[bool(sample.labels[0] >= 0)].append(views[0].pixels[0])
    assert counted[False]
    assert max(counted[False]) < VISIBLE_PIXELS <= min(counted[True])
    shares = {True: [], False: []}
    for x in np.linspace(0, 2.2, 12):  # of a wall before it
        sample, views = render(a_world([on_ground(x, 8, 2.4, 0.3, 3), on_ground(0, 14, 4, 1.8, 1.6)], [3, 0]))
        shares[bool(sample.labels[1] >= 0)].append(views[0].pixels[1] / views[0].outline[1])
    assert shares[False]
    assert max(shares[False]) < VISIBLE_SHARE <= min(shares[True])


def test_in_a_larger_picture_more_pixels_are_needed():
    world = a_world([on_ground(0, 26, 0.3, 0.3, 0.5)], [3])
    small, _ = render(world)
    large, views = render(world, (3 * IMAGE_WH[0], 3 * IMAGE_WH[1]))
    assert views[0].pixels[0] > VISIBLE_PIXELS
    assert small.labels.tolist() == large.labels.tolist() == [-1]


def test_of_several_solids_the_nearest_is_seen():
    """In every pixel that one which is nearest there when each is rendered by itself."""
    world = random_world(np.random.default_rng(7))
    _, views = render(world)
    alone = [render(replace(world, solids=(solid,)))[1] for solid in world.solids]
    shared = 0
    for camera, view in enumerate(views):
        depth = np.stack([np.where(one[camera].solid == 0, one[camera].depth, np.inf) for one in alone])
        nearest = np.where(np.isfinite(depth).any(0), depth.argmin(0), -1)
        np.testing.assert_array_equal(view.solid, nearest)
        np.testing.assert_array_equal(view.outline, [one[camera].pixels[0] for one in alone])
        shared += (np.isfinite(depth).sum(0) > 1).sum()
    assert shared > 1000


def ground_points(view: View, projection: np.ndarray) -> np.ndarray:
    """Where each pixel that shows the ground lies, (H, W, 3); not a number elsewhere."""
    height, width = view.depth.shape
    v, u = np.mgrid[:height, :width] + 0.5
    depth = np.where(view.solid < 0, view.depth, np.nan)
    with np.errstate(invalid="ignore"):
        places = (
            np.stack([u * depth, v * depth, depth, np.ones_like(u)], -1) @ np.linalg.inv(projection.astype(float)).T
        )
    return np.where(np.abs(places[..., 2:3] - GROUND_Z) < 0.02, places[..., :3], np.nan)


@pytest.mark.parametrize("azimuth", [20, 110, 200, 290])
def test_shadows_fall_away_from_the_sun_as_far_as_it_stands_low(azimuth):
    direction = np.array([math.cos(math.radians(azimuth)), math.sin(math.radians(azimuth))])
    sun = np.array([*(direction * math.cos(math.radians(40))), math.sin(math.radians(40))], dtype=np.float32)
    light = random_light(np.random.default_rng(0))
    light = replace(light, sun_direction=sun, sun=np.ones(3, dtype=np.float32), ambient=np.full(3, 0.3, np.float32))
    world = a_world([on_ground(0, 12, 2.2, 2.2, 3.2)], [1], light=light)
    sample, views = render(world)
    points = ground_points(views[0], sample.projection[0])
    shaded = (views[0].sunny == 0) & np.isfinite(points[..., 0])
    away = -(points[..., :2] - [0, 12]) @ direction
    reach = 3.2 / math.tan(math.radians(40))
    # From the nearer of the footprint's edges to the tip of the shadow of the farthest upper corner; the grid of
    # pixels is coarser than 0.5 m there along the line of sight.
    assert shaded.sum() > 100
    assert away[shaded].min() > -1.1 * math.sqrt(2) - 0.05
    assert reach - 0.6 < away[shaded].max() < reach + 1.1 * math.sqrt(2) + 0.05
    without, _ = render(
        replace(world, solids=(random_solid(np.random.default_rng(0), 9, np.array(of_usual_size(9, 0, -20))),))
    )
    assert sample.images[0][:, shaded].mean() < 0.75 * without.images[0][:, shaded].mean()
    clouded = replace(light, sun=np.zeros(3, dtype=np.float32))
    assert render(replace(world, light=clouded))[1][0].sunny.min() == 1


def test_clutter_is_seen_and_hides_but_is_never_labelled():
    person, tree = of_usual_size(2, 0, 14), on_ground(0, 7, 4, 4, 6)
    sample, views = render(a_world([person, tree], [2, 4]))
    assert sample.boxes.shape == (1, 7)
    assert views[0].pixels[1] > 500
    nothing, views = render(a_world([tree], [4]))
    assert nothing.boxes.shape == (0, 7)
    assert nothing.labels.shape == (0,)
    for seed in range(10):
        world = random_world(np.random.default_rng(seed))
        kinds = [solid.kind for solid in world.solids]
        assert sum(kind >= len(CLASS_NAMES) for kind in kinds) > 0
        assert world.labels.tolist() == [kind for kind in kinds if kind < len(CLASS_NAMES)]
        assert len(world.boxes) == len(world.labels)


def test_solids_stand_apart_within_range():
    for seed in range(20):
        world = random_world(np.random.default_rng(seed))
        assert 8 <= len(world.labels) <= OBJECTS[1]  # on a crowded street some find no place
        distance = np.hypot(*world.boxes[:, :2].T)
        assert RANGE[0] <= distance.min() <= distance.max() <= RANGE[1]
        feet = box_corners(np.array([solid.box for solid in world.solids]))[:, :4, :2]
        middle = feet.mean(1)
        reach = np.linalg.norm(feet - middle[:, None], axis=-1).max(1)
        apart = np.linalg.norm(middle[:, None] - middle, axis=-1) - reach[:, None] - reach
        assert apart[~np.eye(len(middle), dtype=bool)].min() > -1e-5


def test_every_rig_is_mounted_a_little_differently():
    projections = np.stack([calibration(random_world(np.random.default_rng(s)).rig, IMAGE_WH)[1] for s in range(20)])
    rotation, usual = projections[:, :, :3, :3], calibration(USUAL_RIG, IMAGE_WH)[1][:, :3, :3]
    angle = np.degrees(np.arccos(((rotation * usual).sum((-1, -2)) / 2 - 0.5).clip(-1, 1)))
    assert (angle.mean(0) > 0.5).all()
    assert angle.max() < np.linalg.norm(JITTER["angles"])
    position = -np.einsum("snij,sni->snj", rotation, projections[:, :, :3, 3])
    moved = np.abs(position - np.array([camera.position for camera in USUAL_RIG]))
    assert moved.max() <= JITTER["position"] + 1e-9
    assert (moved.mean((0, 1)) > 0.3 * JITTER["position"]).all()


@pytest.mark.parametrize("split", ["train", "held-out"])
def test_which_way_the_axes_point_is_random(split):
    """Of the coordinates of a sample, the front camera looks all ways; what it sees stays."""
    ahead = np.array([scene(0, split, index, (48, 16)).projection[0, 2, :2] for index in range(16)])
    quadrants = {(x > 0, y > 0) for x, y in ahead.tolist()}
    assert len(quadrants) == 4
    world = random_world(np.random.default_rng(3))
    (one, _), (other, _) = render(world), render(replace(world, turn=world.turn + 2))
    np.testing.assert_array_equal(one.images, other.images)
    assert np.abs(one.boxes[:, :2] - other.boxes[:, :2]).max() > 1


def test_a_larger_picture_of_a_scene_has_the_same_boxes_and_labels():
    small, large = scene(0, "held-out", 0), scene(0, "held-out", 0, (2 * IMAGE_WH[0], 2 * IMAGE_WH[1]))
    assert large.images.shape == (6, 3, 2 * IMAGE_WH[1], 2 * IMAGE_WH[0])
    np.testing.assert_array_equal(small.boxes, large.boxes)
    assert (small.labels == large.labels).mean() > 0.9  # a box at the limit may fall on the other side
    shrunk = large.images.reshape(6, 3, IMAGE_WH[1], 2, IMAGE_WH[0], 2).mean((3, 5))
    # Noise, edges and grain differ; another scene is more than 30 away.
    assert np.abs(shrunk - small.images).mean() < 8


def test_scenes_are_repeatable_and_splits_differ():
    one, again, other = scene(1, "train", 4), scene(1, "train", 4), scene(1, "held-out", 4)
    np.testing.assert_array_equal(one.images, again.images)
    np.testing.assert_array_equal(one.boxes, again.boxes)
    assert one.boxes.shape != other.boxes.shape or not np.allclose(one.boxes, other.boxes)
    seeds = {
        random_world(np.random.default_rng([1, stream, index])).noise_seed for stream in range(2) for index in range(30)
    }
    assert len(seeds) == 60


def test_another_process_renders_the_same_bits():
    code = "import hashlib; from saccade_demo.rendering.scene import scene; s = scene(2, 'train', 5); "
    code += "print(hashlib.sha256(s.images.tobytes() + s.boxes.tobytes() + s.projection.tobytes()).hexdigest())"
    environment = {**os.environ, "OMP_NUM_THREADS": "3"}
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    sample = scene(2, "train", 5)
    bits = sample.images.tobytes() + sample.boxes.tobytes() + sample.projection.tobytes()
    assert told.stdout.strip() == hashlib.sha256(bits).hexdigest()


def test_images_are_bytes_neither_black_nor_blown_out():
    images = np.stack([scene(4, "train", index).images for index in range(12)])
    assert images.dtype == np.uint8
    means = images.mean((1, 2, 3, 4))
    assert means.min() > 30
    assert means.max() < 210
    assert np.ptp(means) > 20  # light differs
    assert (images == 255).mean() < 0.03
    assert (images == 0).mean() < 0.03


# ---- frames


def write_frame(directory: Path, **changes) -> Path:
    """A miniature frame in the layout of `load_frame`: six cameras of 160x90 and two boxes, from a rendered scene."""
    directory.mkdir(exist_ok=True)
    sample, _ = render(a_world([on_ground(1, 12, 4.5, 1.9, 1.6), on_ground(0, -9, 0.7, 0.7, 1.75)], [0, 2]), (160, 90))
    cameras = []
    for name, pixels, projection in zip(CAMERA_NAMES, sample.images, sample.projection, strict=True):
        Image.fromarray(pixels.transpose(1, 2, 0)).save(directory / f"{name}.jpg")
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
    difference = sample.images[0, :, row, column].astype(int) - empty.images[0, :, row, column]
    assert np.abs(difference).max() > 12  # its door is no longer the ground's colour


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
        ([], "off", 1000),
        (["--amp"], "bf16", 1000),
        (["--amp", "--steps", "3"], "bf16", 3),
        (["--amp", "fp16"], "fp16", 1000),
    ],
)
def test_options_reach_the_run(monkeypatch, tmp_path, arguments, amp, steps):
    """Also none at all, which is what `make demo` runs."""
    asked = []

    def run(options):
        asked.append(options)
        return {"interrupted": False}

    monkeypatch.setattr("saccade_demo.run.run_demo", run)
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


def test_the_same_seed_gives_the_same_losses(tmp_path, monkeypatch):
    make_small(monkeypatch.setattr)
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
    training = (
        "--batch",
        "--micro-batch",
        "--learning-rate",
        "--compile",
        "--deterministic",
        "--checkpoint-every",
        "--tensorboard",
    )
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
    suites = "aggregation, losses, heatmap, ragged, calls, demo"
    expected = f"--only: expected one of {suites}, or one of their workloads, got 'everything'"
    assert result.stderr == f"saccade bench: {expected}\n"
