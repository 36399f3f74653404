"""Rendered scenes: a six-camera rig on a road among solid boxes, ray-cast in closed form.

Everything about a scene is random and drawn from a seed: places, headings, sizes, paint, light, ground, sky. So
nothing about it can be known but through its images. Training and held-out scenes come from disjoint streams of seeds.
"""

from dataclasses import dataclass

import numpy as np

from saccade.demo.geometry import NEAR, Sample, box_corners, project, yaw_rotation

CLASS_NAMES = ("car", "truck", "pedestrian", "barrier")
# length, width, height in metres: mean and half-range of a uniform distribution
SIZES = np.array(
    [
        [(4.5, 0.5), (1.9, 0.15), (1.6, 0.15)],
        [(8.0, 1.5), (2.6, 0.25), (3.2, 0.4)],
        [(0.7, 0.15), (0.7, 0.15), (1.75, 0.15)],
        [(0.6, 0.1), (2.2, 0.3), (1.0, 0.1)],
    ]
)
FREQUENCIES = (0.4, 0.15, 0.25, 0.2)
OBJECTS = (12, 24)
"""Least and greatest number of boxes in a scene."""
RANGE = (4.5, 28.0)
"""Metres in the ground plane within which box centres lie."""
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

VISIBLE_PIXELS = 15
VISIBLE_SHARE = 0.25
"""A box counts if one camera shows this many pixels and this share of its outline; else it is ignored."""


@dataclass(frozen=True)
class World:
    """What is in a scene, without cameras."""

    boxes: np.ndarray  # (M, 7), see `Sample`
    labels: np.ndarray  # (M,)
    paint: np.ndarray  # (M, 2, 3) main and second colour
    sun: np.ndarray  # (3,) unit vector towards the light
    light: np.ndarray  # (3,) its colour
    ambient: float
    sky: np.ndarray  # (2, 3) at the horizon, overhead
    ground: np.ndarray  # (3,)
    waves: np.ndarray  # (3, 4) of the ground's texture: wave vector x, y, phase, amplitude
    lane: np.ndarray  # (4,) cosine and sine of their heading, offset and spacing of the lane markings
    noise_seed: int


def random_world(rng: np.random.Generator) -> World:
    """A scene of boxes that do not overlap, standing on the ground."""
    boxes, labels = [], []
    for label in rng.choice(len(CLASS_NAMES), size=rng.integers(OBJECTS[0], OBJECTS[1] + 1), p=FREQUENCIES):
        size = SIZES[label, :, 0] + SIZES[label, :, 1] * rng.uniform(-1, 1, 3)
        for _ in range(20):
            distance, azimuth = rng.uniform(*RANGE), rng.uniform(-np.pi, np.pi)
            x, y = distance * np.cos(azimuth), distance * np.sin(azimuth)
            reach = np.hypot(size[0], size[1]) / 2
            free = all(np.hypot(x - b[0], y - b[1]) > reach + np.hypot(b[3], b[4]) / 2 for b in boxes)
            if free and distance - reach > 1.5:
                boxes.append([x, y, GROUND_Z + size[2] / 2, *size, rng.uniform(-np.pi, np.pi)])
                labels.append(label)
                break
    labels = np.array(labels, dtype=np.int64)
    elevation, azimuth = rng.uniform(0.4, 1.3), rng.uniform(-np.pi, np.pi)
    sun = np.array([np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)])
    waves = np.stack([rng.normal(0, 1.2, 3), rng.normal(0, 1.2, 3), rng.uniform(0, 6.3, 3), rng.uniform(0, 0.05, 3)], 1)
    heading = rng.uniform(0, np.pi)
    grey = rng.uniform(0.55, 0.85)
    return World(
        boxes=np.array(boxes, dtype=np.float32).reshape(-1, 7),
        labels=labels,
        paint=_random_paint(rng, labels),
        sun=sun.astype(np.float32),
        light=(rng.uniform(0.5, 0.8) * np.array([1.0, rng.uniform(0.9, 1.0), rng.uniform(0.8, 1.0)])).astype(
            np.float32
        ),
        ambient=rng.uniform(0.35, 0.6),
        sky=np.array([[grey + 0.05, grey + 0.06, grey + 0.08], [grey - 0.3, grey - 0.15, grey + 0.1]], np.float32),
        ground=(rng.uniform(0.28, 0.5) + rng.uniform(-0.03, 0.03, 3)).astype(np.float32),
        waves=waves.astype(np.float32),
        lane=np.array([np.cos(heading), np.sin(heading), rng.uniform(0, 4), rng.uniform(3.2, 4.5)], np.float32),
        noise_seed=int(rng.integers(2**31)),
    )


def _random_paint(rng: np.random.Generator, labels: np.ndarray) -> np.ndarray:
    """Main and second colour of each box, (M, 2, 3)."""
    paint = rng.uniform(0.08, 0.95, (len(labels), 2, 3))  # cars and clothes may have any colour
    truck, barrier = labels == 1, labels == 3
    paint[truck, 0] = rng.uniform(0.55, 0.95, (truck.sum(), 1)) + rng.uniform(-0.08, 0.08, (truck.sum(), 3))
    paint[barrier, 0] = np.array([0.85, 0.3, 0.12]) + rng.uniform(-0.1, 0.1, (barrier.sum(), 3))
    paint[barrier, 1] = rng.uniform(0.8, 0.95, (barrier.sum(), 1))
    return paint.clip(0, 1).astype(np.float32)


def rig_cameras(image_wh: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Intrinsics (N, 3, 3) in pixels and lidar-to-camera transforms (N, 4, 4) of the rig."""
    width, height = image_wh
    intrinsics, extrinsics = [], []
    for yaw, position, focal in RIG:
        intrinsics.append([[focal * width, 0, width / 2], [0, focal * width, HORIZON * height], [0, 0, 1]])
        # Rows: the camera's axes (right, down, forward) in the lidar frame.
        axes = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]]) @ yaw_rotation(np.radians(yaw)).T
        extrinsics.append(np.block([[axes, -axes @ np.array(position)[:, None]], [np.zeros((1, 3)), np.ones((1, 1))]]))
    return np.array(intrinsics, dtype=np.float64), np.array(extrinsics)


@dataclass(frozen=True)
class View:
    """What one camera sees."""

    image: np.ndarray  # (H, W, 3) in [0, 1]
    box: np.ndarray  # (H, W) index of the box at each pixel, -1 for none
    depth: np.ndarray  # (H, W) metres along the optical axis, infinite for the sky
    pixels: np.ndarray  # (M,) pixels in which each box is seen
    outline: np.ndarray  # (M,) pixels in which it would be seen if no other box stood before it


def render_view(world: World, intrinsics: np.ndarray, lidar2cam: np.ndarray, image_wh: tuple[int, int]) -> View:
    """Cast one ray through the centre of every pixel and shade what it meets first."""
    width, height = image_wh
    axes, origin = lidar2cam[:3, :3], -lidar2cam[:3, :3].T @ lidar2cam[:3, 3]
    u, v = np.arange(width, dtype=np.float32) + 0.5, np.arange(height, dtype=np.float32)[:, None] + 0.5
    # (3, H, W), of depth 1 along the optical axis
    rays = np.stack([a * u + b * v + c for a, b, c in (axes.T @ np.linalg.inv(intrinsics)).astype(np.float32)])
    with np.errstate(divide="ignore"):
        depth = np.where(rays[2] < 0, np.float32(GROUND_Z - origin[2]) / rays[2], np.float32(np.inf))
    hit = np.full((height, width), -1, dtype=np.int32)

    projection = np.eye(4)
    projection[:3] = intrinsics @ lidar2cam[:3]
    corners, corner_depth = project(box_corners(world.boxes), projection)  # (M, 8, 2), (M, 8)
    outline = np.zeros(len(world.boxes), dtype=np.int64)
    for index, box in enumerate(world.boxes):
        if (corner_depth[index] < NEAR).all():
            continue
        # Only the rays within the rectangle around the corners can meet the box, unless a corner is behind the camera.
        low, high = np.zeros(2, dtype=int), np.array([width, height])
        if (corner_depth[index] >= NEAR).all():
            low = np.clip(np.floor(corners[index].min(0)).astype(int), 0, high)
            high = np.clip(np.ceil(corners[index].max(0)).astype(int), 0, high)
        if (low >= high).any():
            continue
        window = slice(low[1], high[1]), slice(low[0], high[0])
        enter, leave = _through_box(origin, rays[(slice(None), *window)], box)
        met = (enter < leave) & (enter > NEAR)
        outline[index] = met.sum()
        nearer = met & (enter < depth[window])
        hit[window][nearer] = index
        depth[window][nearer] = enter[nearer]

    seen = np.bincount(hit[hit >= 0], minlength=len(world.boxes))
    image = np.random.default_rng(world.noise_seed).standard_normal((height * width, 3), dtype=np.float32)
    image *= 0.012  # the sensor's noise, on which the picture is laid
    flat_rays, flat_hit, flat_depth = rays.reshape(3, -1), hit.ravel(), depth.ravel()
    sky = np.isinf(flat_depth)
    up = np.flatnonzero(sky)
    image[up] += _shade_sky(world, flat_rays[:, up].T)
    for solid, shade in ((flat_hit >= 0, _shade_boxes), ((flat_hit < 0) & ~sky, _shade_ground)):
        pixel = np.flatnonzero(solid)
        far = flat_depth[pixel]
        color = shade(world, origin.astype(np.float32) + (flat_rays[:, pixel] * far).T, flat_hit[pixel])
        haze = 1 - np.exp(-np.minimum(far, 200) / 110)[:, None]
        image[pixel] += color + haze * (world.sky[0] - color)
    return View(image.clip(0, 1).reshape(height, width, 3), hit, depth, seen, outline)


def _through_box(origin: np.ndarray, rays: np.ndarray, box: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where rays (3, ...) enter and leave a box (7,), in units of the ray; one that misses leaves before it enters."""
    turn = yaw_rotation(box[6])
    start = (origin - box[:3]) @ turn
    local = (turn[0, 0] * rays[0] + turn[1, 0] * rays[1], turn[0, 1] * rays[0] + turn[1, 1] * rays[1], rays[2])
    enter, leave = np.float32(-np.inf), np.float32(np.inf)
    for begin, along, half in zip(start.astype(np.float32), local, box[3:6] / 2, strict=True):
        with np.errstate(divide="ignore", invalid="ignore"):
            one, other = (-half - begin) / along, (half - begin) / along
        enter = np.maximum(enter, np.minimum(one, other))
        leave = np.minimum(leave, np.maximum(one, other))
    return np.asarray(enter), np.asarray(leave)


def _shade_sky(world: World, rays: np.ndarray) -> np.ndarray:
    """Colours (K, 3) of the sky in directions (K, 3)."""
    rise = np.clip(3 * rays[:, 2] / np.sqrt(rays[:, 0] ** 2 + rays[:, 1] ** 2 + rays[:, 2] ** 2), 0, 1)[:, None]
    return world.sky[0] + rise * (world.sky[1] - world.sky[0])


def _shade_ground(world: World, points: np.ndarray, _: np.ndarray) -> np.ndarray:
    """Colours (K, 3) of points (K, 3) on the ground: texture, lane markings, little light right beside the boxes."""
    x, y = points[:, 0], points[:, 1]
    distance = np.hypot(x, y)
    texture = sum(a * np.sin(kx * x + ky * y + phase) for kx, ky, phase, a in world.waves)
    light = 1 + texture / (1 + distance / 15)
    for box in world.boxes:
        near = np.flatnonzero(np.abs(x - box[0]) + np.abs(y - box[1]) < box[3] + box[4] + 1)
        local = np.abs((points[near, :2] - box[:2]) @ yaw_rotation(box[6])[:2, :2])
        gap = np.hypot(*np.maximum(local - box[3:5] / 2, 0).T)
        light[near] *= 1 - 0.55 * np.exp(-gap / 0.25)
    ground = world.ground * (world.light * world.sun[2] + world.ambient) * light[:, None]
    cos, sin, offset, spacing = world.lane
    line = ((x * sin - y * cos + offset) % spacing < 0.15) & ((x * cos + y * sin) % 6 < 3.5)
    ground[line] = 0.5 * ground[line] + 0.4
    return ground


def _shade_boxes(world: World, points: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Colours (K, 3) of points (K, 3) on boxes `index` (K,): paint by class and place on the box, Lambert by face."""
    boxes, kind = world.boxes[index], world.labels[index]
    turn = yaw_rotation(boxes[:, 6])
    local = np.einsum("kij,ki->kj", turn, points - boxes[:, :3]) / (
        boxes[:, 3:6] / 2
    )  # -1 to 1 on each axis of the box
    x, y, z = local.T
    axis = np.abs(local).argmax(-1)
    side, end = axis == 1, axis == 0
    color, second = world.paint[index, 0].copy(), world.paint[index, 1]

    def cover(where: np.ndarray, with_color: np.ndarray | tuple[float, float, float]) -> None:
        color[where] = np.broadcast_to(with_color, color.shape)[where]

    car, truck, pedestrian, barrier = (kind == k for k in range(4))
    cover(car & (side | end) & (z > 0.2) & (z < 0.85) & ((np.abs(x) < 0.75) | end), (0.1, 0.13, 0.17))
    cover(truck & (x > 0.55), second)
    cover(truck & (x > 0.55) & (side | end) & (z > 0.0) & (z < 0.6) & ((x < 0.9) | end), (0.1, 0.13, 0.17))
    cover((car | truck) & side & (z < -0.5) & (np.abs(np.abs(x) - 0.62) < np.where(car, 0.15, 0.1)), (0.04, 0.04, 0.04))
    lamps = (car | truck) & end & (np.abs(y) > 0.55) & (z > -0.45) & (z < -0.1)
    cover(lamps & (x > 0), (1.0, 0.97, 0.8))
    cover(lamps & (x < 0), (0.8, 0.05, 0.05))
    cover(pedestrian & (z < 0.0), second)
    cover(pedestrian & (z > 0.72), (0.8, 0.6, 0.48))
    cover(barrier & (np.floor(y * 2.5) % 2 == 0), second)

    normal = np.take_along_axis(turn, axis[:, None, None], 2)[..., 0] * np.sign(
        np.take_along_axis(local, axis[:, None], 1)
    )
    lambert = np.maximum(normal @ world.sun, 0)[:, None]
    return color * (world.ambient + world.light * lambert)


def render(world: World, image_wh: tuple[int, int] = IMAGE_WH) -> tuple[Sample, list[View]]:
    """The six images of a scene, with its boxes labelled; boxes that nobody can see have label -1."""
    intrinsics, lidar2cam = rig_cameras(image_wh)
    views = [render_view(world, k, m, image_wh) for k, m in zip(intrinsics, lidar2cam, strict=True)]
    projection = np.tile(np.eye(4, dtype=np.float32), (len(views), 1, 1))
    projection[:, :3] = intrinsics @ lidar2cam[:, :3]
    # Pixels are counted as if the image had the usual size, so that a larger picture of a scene has the same labels.
    scale = IMAGE_WH[0] * IMAGE_WH[1] / (image_wh[0] * image_wh[1])
    seen = [(v.pixels * scale >= VISIBLE_PIXELS) & (v.pixels >= VISIBLE_SHARE * v.outline) for v in views]
    labels = np.where(np.any(seen, axis=0), world.labels, -1)
    images = np.stack([v.image for v in views]).transpose(0, 3, 1, 2)
    return Sample(images, projection, world.boxes, labels, CLASS_NAMES, CAMERA_NAMES), views


def scene(seed: int, split: str, index: int, image_wh: tuple[int, int] = IMAGE_WH) -> Sample:
    """Scene number `index` of the "train" or "held-out" split; the same arguments give the same scene."""
    stream = ("train", "held-out").index(split)
    return render(random_world(np.random.default_rng([seed, stream, index])), image_wh)[0]
