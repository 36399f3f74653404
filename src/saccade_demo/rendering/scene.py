"""Rendered scenes: a six-camera rig on a street among cars, trucks, people and barriers, ray-cast in closed form.

Everything about a scene is random and drawn from a seed: places, headings, sizes, paint, light, ground, houses, trees,
what else stands about, how the cameras are mounted, and which way the axes of the coordinates point. So nothing about
it can be known but through its images. Training and held-out scenes come from disjoint streams of seeds.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from saccade_demo.geometry import NEAR, Sample, box_corners, turned, yaw_rotation
from saccade_demo.rendering.paint import Painted, random_paint
from saccade_demo.rendering.solids import (
    BARRIER,
    BUSH,
    CAR,
    CLASS_NAMES,
    LAMP,
    SIGN,
    SIZES,
    TREE,
    TRUCK,
    Solid,
    in_shade,
    meet,
    random_parts,
)
from saccade_demo.rendering.surroundings import (
    Light,
    Street,
    lining_depth,
    random_light,
    random_street,
    shade_ground,
    shade_lining,
    shade_sky,
)

FREQUENCIES = (0.35, 0.18, 0.27, 0.2)
OBJECTS = (12, 24)
"""Least and greatest number of boxes in a scene."""
RANGE = (4.5, 28.0)
"""Metres in the ground plane within which box centres lie."""
ON_STREET = (
    (1, 0.05), (1, 0.02), (0.4, 1), (0.8, 0.4), (0, 1), (0, 1), (0, 1), (0, 1), (0.02, 1), (1, 0.2), (0.02, 1),
)  # fmt: skip
"""Of each kind, how likely a place on the carriageway is taken, and one beside it."""
CLUTTER = (3, 9)
"""Least and greatest number of things of no class."""
CLUTTER_RANGE = (4.5, 45.0)
GROUND_Z = -1.84

IMAGE_WH = (352, 128)
CAMERA_NAMES = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_FRONT_LEFT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_BACK_RIGHT")
# yaw in degrees (0 forward, positive to the left), position x, y, z in metres, focal length as a fraction of the
# image width
RIG = (
    (0, (0.0, 0.45, -0.33), 0.79),
    (-55, (0.5, 0.3, -0.34), 0.79),
    (55, (-0.5, 0.3, -0.34), 0.79),
    (180, (0.0, -0.95, -0.30), 0.505),
    (110, (-0.5, -0.1, -0.32), 0.79),
    (-110, (0.5, -0.1, -0.32), 0.79),
)
HORIZON = 0.3
"""Image row of the horizon as a fraction of the height; what lies above is mostly sky and cut away."""
JITTER = {"angles": (2.0, 0.3, 0.3), "position": 0.05, "focal": 0.02}
"""Greatest deviations of a camera: yaw, pitch, roll in degrees; metres along each axis; share of the focal length."""

VISIBLE_PIXELS = 15
VISIBLE_SHARE = 0.25
"""A box counts if one camera shows this many pixels and this share of its outline; else it is ignored."""


@dataclass(frozen=True)
class Camera:
    """How one camera is mounted, and what it makes of light."""

    angles: np.ndarray  # (3,) radians: yaw to the left, pitch up, roll
    position: np.ndarray  # (3,)
    focal: float  # as a fraction of the image width
    gain: np.ndarray  # (3,) exposure and white balance


@dataclass(frozen=True)
class World:
    """What is in a scene, and the cameras that see it, in the frame of the vehicle: x to its right, y ahead."""

    solids: tuple[Solid, ...]  # those with a class first: the boxes
    light: Light
    street: Street
    rig: tuple[Camera, ...]
    noise: float
    noise_seed: int
    turn: float  # radians by which the coordinates of the sample are turned

    @property
    def boxes(self) -> np.ndarray:
        """(M, 7) of those with a class, see `Sample`."""
        return np.array([s.box for s in self.solids if s.kind < len(CLASS_NAMES)], np.float32).reshape(-1, 7)

    @property
    def labels(self) -> np.ndarray:
        """(M,) their classes."""
        return np.array([s.kind for s in self.solids if s.kind < len(CLASS_NAMES)], dtype=np.int64)


def random_world(rng: np.random.Generator) -> World:
    """A street with solids that do not overlap, standing on the ground."""
    street = random_street(rng)
    solids: list[Solid] = []
    kinds = rng.choice(len(CLASS_NAMES), size=rng.integers(OBJECTS[0], OBJECTS[1] + 1), p=FREQUENCIES)
    others = rng.choice(np.arange(len(CLASS_NAMES), len(SIZES)), size=rng.integers(CLUTTER[0], CLUTTER[1] + 1))
    for kind in (*kinds.tolist(), *others.tolist()):
        _place(rng, kind, street, solids)
    return World(
        solids=tuple(solids),
        light=random_light(rng),
        street=street,
        rig=random_rig(rng),
        noise=rng.uniform(0.008, 0.022),
        noise_seed=int(rng.integers(2**31)),
        turn=rng.uniform(-np.pi, np.pi),
    )


def _place(rng: np.random.Generator, kind: int, street: Street, solids: list[Solid]) -> None:
    """Put one more solid where it may stand, if a place is found."""
    size = SIZES[kind, :, 0] + SIZES[kind, :, 1] * rng.uniform(-1, 1, 3)
    reach = np.hypot(size[0], size[1]) / 2
    taken = np.array([[*s.box[:2], np.hypot(s.box[3], s.box[4]) / 2] for s in solids]).reshape(-1, 3)
    distance = rng.uniform(*(RANGE if kind < len(CLASS_NAMES) else CLUTTER_RANGE), 60)
    azimuth = rng.uniform(-np.pi, np.pi, 60)
    x, y = distance * np.cos(azimuth), distance * np.sin(azimuth)
    across = np.abs(street.coordinates(x, y)[1])
    beyond = across - street.half_width
    fits = (across < street.reach - 0.5 - reach) & (distance - reach > 1.5)
    fits &= (np.hypot(taken[:, :1] - x, taken[:, 1:2] - y) > taken[:, 2:] + reach).all(0)
    on, off = ON_STREET[kind]
    fits &= rng.uniform(0, 1, 60) < np.where(beyond < -0.4 * reach, on, off)
    if kind in (TREE, BUSH, LAMP, SIGN):
        fits &= beyond > (0.3 if kind in (LAMP, SIGN) else reach)
    if fits.any():
        first = fits.argmax()
        box = np.array([x[first], y[first], GROUND_Z + size[2] / 2, *size, _yaw(rng, kind, street)])
        solids.append(random_solid(rng, kind, box))


def _yaw(rng: np.random.Generator, kind: int, street: Street) -> float:
    """Most vehicles and barriers go with the street."""
    if kind in (CAR, TRUCK, BARRIER) and rng.random() < 0.7:
        quarter = rng.integers(4) if kind == BARRIER else 2 * rng.integers(2)
        return street.heading + quarter * np.pi / 2 + rng.normal(0, 0.08)
    return rng.uniform(-np.pi, np.pi)


def random_solid(rng: np.random.Generator, kind: int, box: np.ndarray) -> Solid:
    """A thing of a kind that fills a box."""
    box = box.astype(np.float32)
    return Solid(kind, box, random_parts(rng, kind, box[3:6]), random_paint(rng, kind), rng.random())


def random_rig(rng: np.random.Generator) -> tuple[Camera, ...]:
    """The cameras of `RIG`, each mounted a little differently."""
    cameras = []
    for yaw, position, focal in RIG:
        angles = np.radians((yaw, 0, 0)) + np.radians(JITTER["angles"]) * rng.uniform(-1, 1, 3)
        gain = rng.uniform(0.88, 1.12) * (1 + rng.uniform(-0.03, 0.03, 3))
        place = np.array(position) + JITTER["position"] * rng.uniform(-1, 1, 3)
        cameras.append(Camera(angles, place, focal * (1 + JITTER["focal"] * rng.uniform(-1, 1)), gain))
    return tuple(cameras)


def calibration(rig: tuple[Camera, ...], image_wh: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Intrinsics (N, 3, 3) in pixels and transforms (N, 4, 4) from the vehicle's frame to the cameras'."""
    width, height = image_wh
    intrinsics, extrinsics = [], []
    for camera in rig:
        yaw, pitch, roll = camera.angles.tolist()
        intrinsics.append(
            [[camera.focal * width, 0, width / 2], [0, camera.focal * width, HORIZON * height], [0, 0, 1]]
        )
        # Rows: the camera's axes (right, down, forward) in the vehicle's frame.
        axes = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]]) @ yaw_rotation(yaw).T
        axes = yaw_rotation(roll) @ yaw_rotation(pitch)[[2, 0, 1]][:, [2, 0, 1]] @ axes
        extrinsics.append(np.block([[axes, -axes @ camera.position[:, None]], [np.zeros((1, 3)), np.ones((1, 1))]]))
    return np.array(intrinsics, dtype=np.float64), np.array(extrinsics)


@dataclass(frozen=True)
class View:
    """What one camera sees."""

    image: np.ndarray  # (3, H, W) uint8
    solid: np.ndarray  # (H, W) index of the solid at each pixel, -1 for none
    depth: np.ndarray  # (H, W) metres along the optical axis, infinite for the sky
    pixels: np.ndarray  # (S,) pixels in which each solid is seen
    outline: np.ndarray  # (S,) pixels in which it would be seen if nothing else stood before it
    sunny: np.ndarray  # (H, W) share of the sun that falls on the ground there, were the ground to be seen


def render_view(
    world: World, painted: Painted, camera: Camera, intrinsics: np.ndarray, extrinsics: np.ndarray,
    image_wh: tuple[int, int], noise: list[np.ndarray],
) -> View:  # fmt: skip
    """Cast one ray through the centre of every pixel and shade what it meets first."""
    width, height = image_wh
    axes, origin = extrinsics[:3, :3], -extrinsics[:3, :3].T @ extrinsics[:3, 3]
    u, v = np.arange(width, dtype=np.float32) + 0.5, np.arange(height, dtype=np.float32)[:, None] + 0.5
    # (3, H, W), of depth 1 along the optical axis
    across, down, ahead = (axes.T @ np.linalg.inv(intrinsics)).astype(np.float32).T[..., None, None]
    rays = across * u + (down * v + ahead)
    with np.errstate(divide="ignore"):
        ground = np.where(rays[2] < 0, np.float32(GROUND_Z - origin[2]) / rays[2], np.float32(np.inf))
    depth = ground.copy()
    solid, part = np.full((height, width), -1, dtype=np.int16), np.full((height, width), -1, dtype=np.int16)
    outline = np.zeros(len(world.solids), dtype=np.int64)
    to_pixels = intrinsics @ extrinsics[:3]
    corners = box_corners(np.array([s.box for s in world.solids]))
    for index, window in _windows(corners, to_pixels, image_wh):
        thing = world.solids[index]
        along = _in_frame(thing, rays[(slice(None), *window)])
        start = _in_frame(thing, (origin - (*thing.box[:2], GROUND_Z)).astype(np.float32))
        far, which = meet(start, along, thing.parts)
        outline[index] = np.isfinite(far).sum()
        nearer = far < depth[window]
        solid[window][nearer] = index
        part[window][nearer] = which[nearer] + painted.first[index]
        depth[window][nearer] = far[nearer]
    seen = np.bincount(solid[solid >= 0], minlength=len(world.solids))

    points = origin[:2].astype(np.float32)[:, None, None] + np.minimum(ground, 1e4) * rays[:2]
    sunny, open_ = _shadows(world, corners, points, to_pixels, image_wh)

    pixel = 1 / float(intrinsics[0, 0])
    image = np.empty((3, height * width), dtype=np.float32)
    flat_rays, flat_depth, flat_part = rays.reshape(3, -1), depth.ravel(), part.ravel()
    # No ray is more than 45 degrees off the optical axis.
    free = np.flatnonzero((flat_part < 0) & (flat_depth > 0.7 * (world.street.reach - world.street.half_width)))
    lined, side, s, z = lining_depth(world.street, origin, flat_rays[:, free], GROUND_Z)
    met = lined < flat_depth[free]
    wall = free[met]
    flat_depth[wall] = lined[met]
    image[:, wall] = shade_lining(world.street, world.light, side[met], s[met], z[met], lined[met], pixel)
    flat_part[wall] = -2
    up = np.flatnonzero(np.isinf(flat_depth))
    image[:, up] = shade_sky(world.street, world.light, flat_rays[:, up], pixel)
    low = np.flatnonzero((flat_part == -1) & np.isfinite(flat_depth))
    x, y = points.reshape(2, -1)[:, low]
    image[:, low] = shade_ground(
        world.street, world.light, x, y, flat_depth[low], pixel, sunny.ravel()[low], open_.ravel()[low]
    )
    hit = np.flatnonzero(flat_part >= 0)
    where = origin.astype(np.float32)[:, None] + flat_rays[:, hit] * flat_depth[hit]
    image[:, hit] = painted.shade(flat_part[hit], where, world.light)

    air = 1 - np.exp(np.minimum(flat_depth, 2000) * np.float32(-world.light.haze))
    air[up] = 0
    radius = np.square((u - width / 2) / width) + np.square((v - height / 2) / width)
    vignette = 255 * np.sqrt(1 - 0.9 * radius).ravel()
    root_gain = np.sqrt(camera.gain).astype(np.float32)
    for c in range(3):
        plane = image[c]
        plane += air * (world.light.sky[0, c] - plane)
        # After a square root, which is nearly how displays show it, the noise of light is the same everywhere.
        np.sqrt(plane, out=plane)
        plane *= vignette * root_gain[c]
        plane += noise[c]
    image = np.clip(image, 0, 255, out=image).astype(np.uint8).reshape(3, height, width)
    return View(image, solid, depth, seen, outline, sunny)


def _in_frame(solid: Solid, vectors: Any) -> tuple[Any, Any, Any]:
    """Vectors (3, ...) in the frame of a solid."""
    cos, sin = np.float32(np.cos(solid.box[6])), np.float32(np.sin(solid.box[6]))
    return cos * vectors[0] + sin * vectors[1], cos * vectors[1] - sin * vectors[0], vectors[2]


def _windows(
    points: np.ndarray, to_pixels: np.ndarray, image_wh: tuple[int, int]
) -> Iterator[tuple[int, tuple[slice, slice]]]:
    """The pixels within which the hulls of points (S, P, 3) must appear: index and slices of rows and columns."""
    width, height = image_wh
    places = points @ to_pixels[:, :3].T + to_pixels[:, 3]  # (S, P, 3): u * depth, v * depth, depth
    u, v, depth = np.moveaxis(places, -1, 0)
    # All on the far side of one face of the pyramid that the camera sees, also if some are behind it.
    outside = (
        (depth < NEAR).all(1)
        | (u < 0).all(1) | (u > width * depth).all(1)
        | (v < 0).all(1) | (v > height * depth).all(1)
    )  # fmt: skip
    pixels = places[..., :2] / np.maximum(depth, NEAR)[..., None]
    before = (depth >= NEAR).all(1)[:, None]
    low = np.where(before, np.floor(pixels.min(1)).clip(0, image_wh), 0).astype(int)
    high = np.where(before, np.ceil(pixels.max(1)).clip(0, image_wh), image_wh).astype(int)
    for index in np.flatnonzero(~outside & (low < high).all(1)).tolist():
        (left, top), (right, bottom) = low[index].tolist(), high[index].tolist()
        yield index, (slice(top, bottom), slice(left, right))


def _shadows(
    world: World, corners: np.ndarray, points: np.ndarray, to_pixels: np.ndarray, image_wh: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Shares of the sun and of the sky that ground points (2, H, W) see past the solids with corners (S, 8, 3)."""
    sunny, open_ = (np.ones(points.shape[1:], dtype=np.float32) for _ in range(2))
    toward = world.light.sun_direction
    feet = corners[:, :4].copy()
    feet[..., 2] = GROUND_Z
    if world.light.sun.max() > 0.03:
        # Where the sun's rays through the upper corners meet the ground.
        cast = corners[:, 4:] + (GROUND_Z - corners[:, 4:, 2:]) / toward[2] * toward
        for index, window in _windows(np.concatenate([feet, cast], 1), to_pixels, image_wh):
            thing = world.solids[index]
            x, y = (p[window] - place for p, place in zip(points, thing.box[:2], strict=True))
            start = _in_frame(thing, (x, y, np.float32(0)))
            sunny[window][in_shade(start, _in_frame(thing, toward), thing.parts)] = 0
    around = feet.copy()
    middle = around.mean(1, keepdims=True)
    around += 1.0 * (around - middle) / np.linalg.norm(around - middle, axis=2, keepdims=True)
    for index, window in _windows(around, to_pixels, image_wh):
        thing = world.solids[index]
        if thing.kind in (TREE, LAMP, SIGN):
            continue
        x, y = (p[window] - place for p, place in zip(points, thing.box[:2], strict=True))
        along, across, _ = _in_frame(thing, (x, y, np.float32(0)))
        out_x, out_y = np.maximum(np.abs(along) - thing.box[3] / 2, 0), np.maximum(np.abs(across) - thing.box[4] / 2, 0)
        open_[window] *= 1 - np.float32(0.7) / (1 + 12 * (out_x * out_x + out_y * out_y))
    return sunny, open_


def render(world: World, image_wh: tuple[int, int] = IMAGE_WH) -> tuple[Sample, list[View]]:
    """The six images of a scene, with its boxes labelled; boxes that nobody can see have label -1."""
    intrinsics, extrinsics = calibration(world.rig, image_wh)
    painted = Painted(list(world.solids), GROUND_Z)
    width, height = image_wh
    rng = np.random.default_rng(world.noise_seed)
    grains = np.float32(255 * world.noise) * rng.standard_normal(2 * height * width, dtype=np.float32)
    noise = [
        [grains[i : i + height * width] for i in row] for row in rng.integers(0, height * width, (len(world.rig), 3))
    ]
    views = [
        render_view(world, painted, camera, k, m, image_wh, n)
        for camera, k, m, n in zip(world.rig, intrinsics, extrinsics, noise, strict=True)
    ]
    projection = np.tile(np.eye(4, dtype=np.float32), (len(views), 1, 1))
    projection[:, :3] = intrinsics @ extrinsics[:, :3]
    boxes = len(world.labels)
    # Pixels are counted as if the image had the usual size, so that a larger picture has the same labels, or nearly so.
    scale = IMAGE_WH[0] * IMAGE_WH[1] / (image_wh[0] * image_wh[1])
    seen = [
        (v.pixels[:boxes] * scale >= VISIBLE_PIXELS) & (v.pixels[:boxes] >= VISIBLE_SHARE * v.outline[:boxes])
        for v in views
    ]
    labels = np.where(np.any(seen, axis=0), world.labels, -1)
    images = np.stack([v.image for v in views])
    sample = Sample(images, projection, world.boxes, labels, CLASS_NAMES, CAMERA_NAMES)
    return turned(sample, world.turn), views


def scene(seed: int, split: str, index: int, image_wh: tuple[int, int] = IMAGE_WH) -> Sample:
    """Scene number `index` of the "train" or "held-out" split; the same arguments give the same scene."""
    stream = ("train", "held-out").index(split)
    return render(random_world(np.random.default_rng([seed, stream, index])), image_wh)[0]
