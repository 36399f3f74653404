"""What stands on the ground of a rendered scene: solids made of a few parts each, met by rays in closed form.

A part is a box whose sides may lean inwards, or an ellipsoid. Its place is given in the frame of its solid: x ahead,
y to the left, z up, from the middle of the solid's footprint. A pixel's ray is cast against the parts to see what
stands there; a ray from the ground to the sun is cast against the same parts to see what lies in the shade.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from saccade_demo.geometry import NEAR

CLASS_NAMES = ("car", "truck", "pedestrian", "barrier")
CAR, TRUCK, PEDESTRIAN, BARRIER = range(4)
CLUTTER = ("tree", "bush", "lamp", "sign", "bin", "cone", "bollard")
"""What stands about and is of no class."""
TREE, BUSH, LAMP, SIGN, BIN, CONE, BOLLARD = range(4, 11)
# Of each kind length, width, height in metres: mean and half-range of a uniform distribution.
SIZES = np.array(
    [
        [(4.5, 0.5), (1.9, 0.15), (1.6, 0.15)],
        [(8.0, 1.5), (2.6, 0.25), (3.2, 0.4)],
        [(0.7, 0.15), (0.7, 0.15), (1.75, 0.15)],
        [(0.6, 0.1), (2.2, 0.3), (1.0, 0.1)],
        [(3.4, 1.2), (3.4, 1.2), (6.0, 2.0)],
        [(1.6, 0.6), (1.2, 0.4), (1.0, 0.4)],
        [(1.6, 0.4), (0.2, 0.0), (6.5, 1.5)],
        [(0.16, 0.0), (0.7, 0.1), (2.5, 0.3)],
        [(0.6, 0.1), (0.6, 0.1), (1.05, 0.15)],
        [(0.4, 0.05), (0.4, 0.05), (0.65, 0.15)],
        [(0.2, 0.05), (0.2, 0.05), (0.9, 0.15)],
    ]
)


@dataclass(frozen=True)
class Solid:
    """One thing that stands on the ground."""

    kind: int
    box: np.ndarray  # (7,) that encloses it, see `Sample`
    parts: np.ndarray  # (P, 9): middle x, y, z; half size along x, y, z; lean of sides x, y; 1 for an ellipsoid
    paint: np.ndarray  # (2, 3) main and second colour, linear
    style: float = 0.0
    """From 0 to 1: which of several looks of its kind."""


def random_parts(rng: np.random.Generator, kind: int, size: np.ndarray) -> np.ndarray:
    """Parts that fill a box of a size (length, width, height)."""
    length, width, height = size.tolist()
    a, b = length / 2, width / 2

    def block(
        x: tuple[float, float], half_y: float, z: tuple[float, float], lean_x: float = 0, lean_y: float = 0, y=0.0
    ):
        """From and to along x and z, half width, at the lower end, from which the sides lean inwards."""
        rise = (z[1] - z[0]) / 2
        half_x = (x[1] - x[0]) / 2
        return (
            (x[0] + x[1]) / 2,
            y,
            z[0] + rise,
            half_x - lean_x * rise,
            half_y - lean_y * rise,
            rise,
            lean_x,
            lean_y,
            0,
        )

    def ball(x: float, y: float, z: float, half_x: float, half_y: float, half_z: float):
        return x, y, z, half_x, half_y, half_z, 0, 0, 1

    parts: list[tuple[float, ...]]
    if kind == CAR:
        waist = height * rng.uniform(0.53, 0.6)
        rear = rng.uniform(-0.98, -0.72)  # from an estate car to a saloon
        cabin = block((rear * a, rng.uniform(0.3, 0.5) * a), 0.94 * b, (waist, height), rng.uniform(0.35, 0.7), 0.22)
        parts = [block((-a, a), b, (0, waist), 0.06, 0.03), cabin]
    elif kind == TRUCK:
        cab = length * rng.uniform(0.2, 0.28)
        roof = height * rng.uniform(0.78, 0.95)
        parts = [
            block((-a, a - cab - 0.25), b, (0.95, height)),
            block((-a, a - cab), 0.96 * b, (0, 0.95)),
            block((a - cab, a), 0.97 * b, (0, roof), 0.05, 0.02),
        ]
    elif kind == PEDESTRIAN:
        swing = rng.uniform(-0.4, 0.4) * a
        stride, hip, shoulder = rng.uniform(0.1, 0.65) * a, 0.48 * height, 0.83 * height
        parts = [
            block((stride - 0.3 * a, stride + 0.3 * a), 0.24 * b, (0, hip), y=0.26 * b),
            block((-stride - 0.3 * a, -stride + 0.3 * a), 0.24 * b, (0, hip), y=-0.26 * b),
            block((-0.38 * a, 0.38 * a), 0.55 * b, (hip, shoulder), -0.08, -0.15),
            block((swing - 0.22 * a, swing + 0.22 * a), 0.17 * b, (0.93 * hip, 0.98 * shoulder), y=0.83 * b),
            block((-swing - 0.22 * a, -swing + 0.22 * a), 0.17 * b, (0.93 * hip, 0.98 * shoulder), y=-0.83 * b),
            ball(0, 0, shoulder - 0.02, 0.4 * a, b, 0.05 * height),
            ball(0.05, 0, 0.925 * height, 0.12, 0.105, 0.075 * height),
        ]
    elif kind == BARRIER:
        parts = [
            block((-a, a), b, (0, 0.3 * height), 0.25),
            block((-0.62 * a, 0.62 * a), b, (0.3 * height, height), 0.12),
        ]
    elif kind == TREE:
        trunk = rng.uniform(0.3, 0.45) * height
        parts = [block((-0.16, 0.16), 0.16, (0, 1.2 * trunk), 0.02, 0.02)]
        for _ in range(3):
            x, y = rng.uniform(-0.35, 0.35, 2) * (a, b)
            low = trunk * rng.uniform(0.8, 1.1)
            parts.append(ball(x, y, (low + height) / 2, 0.65 * a, 0.65 * b, (height - low) / 2))
    elif kind == BUSH:
        low = rng.uniform(0.6, 0.9) * height
        parts = [
            ball(-0.3 * a, 0, height / 2, 0.7 * a, b, height / 2),
            ball(0.3 * a, 0, low / 2, 0.7 * a, b, low / 2),
        ]
    elif kind == LAMP:
        parts = [block((-0.07, 0.07), 0.07, (0, height), 0.005, 0.005), block((0, a), 0.1, (height - 0.12, height))]
    elif kind == SIGN:
        parts = [block((-0.04, 0.04), 0.04, (0, height)), block((0.04, 0.08), b, (height - 2 * b, height))]
    elif kind == BIN:
        lid = 0.88 * height
        parts = [
            block((-0.85 * a, 0.85 * a), 0.85 * b, (0, lid), -0.12 * a / lid, -0.12 * b / lid),
            block((-a, a), b, (lid, height)),
        ]
    elif kind == CONE:
        parts = [
            block((-a, a), b, (0, 0.05)),
            block((-0.75 * a, 0.75 * a), 0.75 * b, (0.05, height), 0.6 * a / height, 0.6 * a / height),
        ]
    else:
        parts = [block((-a, a), b, (0, 0.9 * height)), ball(0, 0, 0.9 * height, a, b, 0.1 * height)]
    return np.array(parts, dtype=np.float32)


def meet(start: tuple, along: tuple, parts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where rays first meet parts (P, 9), and which of them.

    Args:
        start: x, y and z of the rays' origins in the frame of the solid; arrays or numbers.
        along: x, y and z of the rays' directions; arrays or numbers.
        parts: Of one solid.

    Returns:
        Distance in units of the direction, infinite if nothing is met ahead; index of the part.
    """
    nearest: Any = np.float32(np.inf)
    which: Any = np.int16(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = tuple(1 / step for step in along)
        for index, part in enumerate(parts.tolist()):
            enter, leave = _through_ball(start, along, part) if part[8] else _through_block(start, along, inverse, part)
            enter = np.where((enter < leave) & (enter > NEAR), enter, np.float32(np.inf))
            which = np.where(enter < nearest, np.int16(index), which)
            nearest = np.minimum(enter, nearest)
    return nearest, which


def _through_block(start: tuple, along: tuple, inverse: tuple, part: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Where rays enter and leave a box with leaning sides; one that misses leaves before it enters."""
    x, y, z = (s - middle for s, middle in zip(start, part, strict=False))
    one, other = (-part[5] - z) * inverse[2], (part[5] - z) * inverse[2]
    enter, leave = np.minimum(one, other), np.maximum(one, other)
    for axis, begin in enumerate((x, y)):
        half, lean = part[3 + axis], part[6 + axis]
        if lean == 0:
            one, other = (-half - begin) * inverse[axis], (half - begin) * inverse[axis]
            enter = np.maximum(enter, np.minimum(one, other))
            leave = np.minimum(leave, np.maximum(one, other))
            continue
        for sign in (1, -1):
            outwards = sign * along[axis] + lean * along[2]
            one = (half - sign * begin - lean * z) / outwards
            inwards = outwards < 0
            enter = np.maximum(enter, np.where(inwards, one, np.float32(-np.inf)))
            leave = np.minimum(leave, np.where(inwards, np.float32(np.inf), one))
    return enter, leave


def _through_ball(start: tuple, along: tuple, part: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Where rays enter and leave an ellipsoid; for one that misses they are not numbers."""
    begin = [(s - middle) / half for s, middle, half in zip(start, part[:3], part[3:6], strict=True)]
    step = [s / half for s, half in zip(along, part[3:6], strict=True)]
    square = step[0] * step[0] + step[1] * step[1] + step[2] * step[2]
    across = (begin[0] * step[0] + begin[1] * step[1] + begin[2] * step[2]) / square
    apart = (begin[0] * begin[0] + begin[1] * begin[1] + begin[2] * begin[2] - 1) / square
    half = np.sqrt(across * across - apart)
    return -across - half, half - across


def in_shade(start: tuple, along: tuple, parts: np.ndarray) -> np.ndarray:
    """Whether rays meet anything of a solid, or begin in it. Arguments as in `meet`."""
    shade: Any = False
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = tuple(1 / step for step in along)
        for part in parts.tolist():
            enter, leave = _through_ball(start, along, part) if part[8] else _through_block(start, along, inverse, part)
            shade = shade | (leave > np.maximum(enter, 0))
    return shade
