"""What the solids of a rendered scene look like: paint, windows, wheels and lamps by place on them, and shading."""

from dataclasses import dataclass

import numpy as np

from saccade_demo.rendering.solids import (
    BARRIER,
    BIN,
    BOLLARD,
    BUSH,
    CAR,
    CONE,
    LAMP,
    SIGN,
    TREE,
    TRUCK,
    Solid,
)
from saccade_demo.rendering.surroundings import Light
from saccade_demo.rendering.texture import cloud_tile

CAR_PAINT = np.array(
    [
        (0.78, 0.78, 0.77), (0.6, 0.62, 0.63), (0.4, 0.42, 0.44), (0.03, 0.03, 0.035), (0.55, 0.03, 0.025),
        (0.6, 0.08, 0.02), (0.03, 0.1, 0.45), (0.08, 0.28, 0.55), (0.02, 0.2, 0.12), (0.5, 0.4, 0.24),
        (0.7, 0.46, 0.04), (0.25, 0.4, 0.04),
    ]
)  # fmt: skip
"""Linear red, green and blue."""
GLASS = (0.012, 0.017, 0.022)
DARK = (0.02, 0.02, 0.022)


def random_paint(rng: np.random.Generator, kind: int) -> np.ndarray:
    """Main and second colour, (2, 3), linear."""
    grey = rng.uniform(0.05, 0.6, (2, 1))
    paint = grey + rng.uniform(0.3, 0.9, (2, 1)) * (rng.uniform(0.05, 0.95, (2, 3)) ** 2 - grey)  # clothes
    if kind == CAR:
        paint[0] = CAR_PAINT[rng.integers(len(CAR_PAINT))] * rng.uniform(0.85, 1.15) * (1 + rng.uniform(-0.1, 0.1, 3))
    elif kind == TRUCK and rng.random() < 0.85:
        paint[0] = rng.uniform(0.45, 0.8) * (1 + rng.uniform(-0.1, 0.1, 3))
    elif kind == BARRIER:
        paint[0] = np.array([0.6, 0.07, 0.02]) * rng.uniform(0.7, 1.2, 3)
        paint[1] = rng.uniform(0.6, 0.8)
    elif kind in (TREE, BUSH):
        paint[:] = rng.uniform(0.5, 1.3) * np.array([rng.uniform(0.04, 0.12), 0.1, 0.03])
    elif kind in (LAMP, BOLLARD):
        paint[0] = rng.uniform(0.05, 0.25)
    elif kind == SIGN:
        paint[0] = 0.25
        paint[1] = [(0.01, 0.08, 0.4), (0.5, 0.02, 0.02), (0.6, 0.4, 0.02)][rng.integers(3)]
    elif kind == BIN:
        paint[0] = [(0.02, 0.08, 0.03), (0.06, 0.06, 0.065), (0.1, 0.05, 0.02), (0.02, 0.04, 0.12)][rng.integers(4)]
    elif kind == CONE:
        paint[0] = (0.75, 0.13, 0.02)
    return paint.clip(0, 0.85).astype(np.float32)


class Painted:
    """The solids of a scene, to be shaded pixel by pixel."""

    def __init__(self, solids: list[Solid], ground: float):
        self.ground = ground
        self.first = np.cumsum([0, *(len(s.parts) for s in solids)])[:-1]
        """Index among all parts of the first one of each solid."""
        self.owner = np.repeat(np.arange(len(solids)), [len(s.parts) for s in solids])
        self.parts = np.concatenate([s.parts for s in solids]).T.copy()
        self.number = np.arange(len(self.owner)) - self.first[self.owner]
        self.kind = np.array([s.kind for s in solids])
        self.style = np.array([s.style for s in solids], dtype=np.float32)
        self.half = np.array([s.box[3:6] / 2 for s in solids], dtype=np.float32).T.copy()
        self.paint = np.array([s.paint for s in solids], dtype=np.float32).transpose(1, 2, 0).copy()
        pose = [(*s.box[:2], np.cos(s.box[6]), np.sin(s.box[6])) for s in solids]
        self.pose = np.array(pose, dtype=np.float32).T.copy()

    def shade(self, part: np.ndarray, points: np.ndarray, light: Light) -> np.ndarray:
        """Colours (3, K) of points (3, K) on parts (K,), by their index among all."""
        owner = self.owner[part]
        x0, y0, cos, sin = self.pose.take(owner, axis=1)
        dx, dy = points[0] - x0, points[1] - y0
        place = (cos * dx + sin * dy, cos * dy - sin * dx, points[2] - np.float32(self.ground))
        shape = self.parts.take(part, axis=1)
        offset = [p - middle for p, middle in zip(place, shape[:3], strict=True)]
        ball = shape[8] > 0
        across = [o / half for o, half in zip(offset, shape[3:6], strict=True)]
        gaps = [
            shape[3] - shape[6] * offset[2] - np.abs(offset[0]),
            shape[4] - shape[7] * offset[2] - np.abs(offset[1]),
            shape[5] - np.abs(offset[2]),
        ]
        end = (gaps[0] < gaps[1]) & (gaps[0] < gaps[2])
        side = ~end & (gaps[1] < gaps[2])
        kind = self.kind[owner]
        # Faces are shaded as if they were a little round: light runs over them as over real sheet metal.
        round_ = np.where(kind == CAR, np.float32(0.3), np.float32(0.1))
        normal = [
            np.where(ball, across[0] / shape[3], end * np.sign(offset[0]) + round_ * across[0]),
            np.where(ball, across[1] / shape[4], side * np.sign(offset[1]) + round_ * across[1]),
            np.where(
                ball, across[2] / shape[5],
                ~(end | side) * np.sign(offset[2]) + end * shape[6] + side * shape[7] + round_ * across[2],
            ),
        ]  # fmt: skip
        scale = 1 / np.sqrt(normal[0] ** 2 + normal[1] ** 2 + normal[2] ** 2)
        up = normal[2] * scale
        facing = (normal[0] * cos - normal[1] * sin) * scale, (normal[0] * sin + normal[1] * cos) * scale, up

        color, glow, gloss = self._paint(owner, kind, self.number[part], place, end, side & ~ball)
        sun = light.sun_direction
        lambert = np.maximum(facing[0] * sun[0] + facing[1] * sun[1] + up * sun[2], 0)
        # From below comes what the ground throws back. What is low sees less of the sky.
        open_ = (0.62 + 0.38 * up) * np.minimum(0.6 + 0.5 * place[2], 1)
        shaded = np.empty_like(points)
        for c in range(3):
            shaded[c] = color[c] * (light.sun[c] * lambert + light.ambient[c] * open_)
            shaded[c] += gloss * light.sky[0, c] * (0.35 + np.maximum(up, 0)) + glow * light.lamps * color[c]
        return shaded

    def _paint(
        self, owner: np.ndarray, kind: np.ndarray, number: np.ndarray, place: tuple, end: np.ndarray, side: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Colours (3, K), how much they shine by themselves (K,) and how much of the sky they mirror (K,)."""
        color = self.paint[0].take(owner, axis=1)
        glow, gloss = np.zeros(len(owner), dtype=np.float32), np.zeros(len(owner), dtype=np.float32)
        for one in np.flatnonzero(np.bincount(kind)):
            index = np.flatnonzero(kind == one)
            who = owner[index]
            x, y, z = (p[index] for p in place)
            half = self.half.take(who, axis=1)
            spot = Spot(
                x, y, z, half[0], x / half[0], y / half[1], z / (2 * half[2]), end[index], side[index], number[index],
                self.style[who], self.paint[1].take(who, axis=1), color[:, index], glow[index], gloss[index],
            )  # fmt: skip
            PAINTERS[one](spot)
            color[:, index], glow[index], gloss[index] = spot.color, spot.glow, spot.gloss
        return color, glow, gloss


@dataclass
class Spot:
    """Points on solids of one kind, and what they look like so far."""

    x: np.ndarray  # (K,) metres ahead of the middle, to its left, above the ground
    y: np.ndarray
    z: np.ndarray
    half_length: np.ndarray  # (K,)
    u: np.ndarray  # (K,) the same from -1 to 1, of the height from 0 to 1
    v: np.ndarray
    w: np.ndarray
    end: np.ndarray  # (K,) on the front or the back
    side: np.ndarray  # (K,) on the left or the right
    part: np.ndarray  # (K,) of the solid
    style: np.ndarray  # (K,)
    second: np.ndarray  # (3, K) second colour
    color: np.ndarray  # (3, K)
    glow: np.ndarray  # (K,)
    gloss: np.ndarray  # (K,)

    def cover(self, where: np.ndarray, color: tuple[float, float, float] | np.ndarray, glow=0.0, gloss=0.0) -> None:
        """Paint some of them."""
        if isinstance(color, np.ndarray):
            np.copyto(self.color, color, where=where)
        else:
            np.copyto(self.color, np.array(color, dtype=np.float32)[:, None], where=where)
        np.copyto(self.glow, np.float32(glow), where=where)
        np.copyto(self.gloss, np.float32(gloss), where=where)

    def wheels(self, where: np.ndarray, at: tuple[float, ...], radius: float) -> None:
        """Wheels there along the length, from -1 to 1, with the dark of their arches around them."""
        for x in at:
            away = np.square((self.u - x) * self.half_length) + np.square(self.z - radius)
            self.cover(where & (away < (1.18 * radius) ** 2), (0.012, 0.012, 0.013))
            self.cover(where & (away < radius**2), (0.025, 0.025, 0.027))
            self.cover(where & (away < (0.6 * radius) ** 2), (0.28, 0.29, 0.3), gloss=0.1)


def _car(s: Spot) -> None:
    body, cabin = s.part == 0, s.part == 1
    s.gloss[:] = 0.07
    wall = s.end | s.side
    s.color *= 0.8 + 0.35 * s.w
    s.cover(body & s.side & (np.abs(s.u + 0.04) < 0.006), DARK)  # the gap between the doors
    s.cover(body & s.side & (np.abs(s.w - 0.44) < 0.012) & (np.abs(s.u + 0.3) < 0.05), DARK)  # a handle
    s.cover(body & wall & (s.z < 0.24), DARK)
    s.wheels(body & s.side, (-0.6, 0.62), 0.33)
    level = (s.w > 0.33) & (s.w < 0.45)
    lamp = body & level & (np.abs(s.v) > 0.6) & (s.end | (np.abs(s.u) > 0.94))
    s.cover(body & s.end & (s.u > 0) & level & (np.abs(s.v) < 0.45), DARK)
    s.cover(lamp & (s.u > 0), (0.85, 0.83, 0.75), 1.0, 0.2)
    s.cover(lamp & (s.u < 0), (0.5, 0.015, 0.012), 0.7, 0.05)
    s.cover(body & s.end & (np.abs(s.y) < 0.26) & (s.w > 0.2) & (s.w < 0.27), (0.7, 0.7, 0.66))
    pillar = s.side & ((np.abs(s.u + 0.12) < 0.025) | (s.w > 0.94))
    s.cover(cabin & wall & ~pillar & (s.w > 0.56) & ((np.abs(s.v) < 0.78) | s.side), GLASS, 0, 0.24)


def _truck(s: Spot) -> None:
    cargo, frame, cab = s.part == 0, s.part == 1, s.part == 2
    wall = s.end | s.side
    s.color *= 0.85 + 0.2 * s.w
    s.cover(cargo & s.side & (s.x % 0.9 < 0.05), 0.7 * s.color)
    band = cargo & s.side & (s.style > 0.4) & (np.abs(s.w - 0.66) < 0.13) & (s.u < 0.45)
    s.cover(band, s.second)
    s.cover(cargo & s.end & (s.u < 0) & ((np.abs(s.v) < 0.02) | (np.abs(s.v) > 0.94) | (s.w > 0.96)), (0.2, 0.2, 0.2))
    s.cover(frame, DARK)
    s.cover(cab, s.second, 0, 0.06)
    s.cover(cab & s.end & (s.u > 0) & (s.z > 1.5) & (s.z < 2.35) & (np.abs(s.v) < 0.85), GLASS, 0, 0.24)
    s.cover(cab & s.side & (s.z > 1.5) & (s.z < 2.25) & (s.u > 0.66) & (s.u < 0.94), GLASS, 0, 0.22)
    s.cover(cab & s.end & (s.z > 0.9) & (s.z < 1.3) & (np.abs(s.v) < 0.6), DARK)
    s.cover((cab | frame) & wall & (s.z < 0.45), DARK)
    lamp = wall & (s.z > 0.55) & (s.z < 0.8) & (np.abs(s.v) > 0.66) & s.end
    s.cover(lamp & cab & (s.u > 0), (0.85, 0.83, 0.75), 1.0, 0.2)
    s.cover(lamp & frame & (s.u < 0), (0.5, 0.015, 0.012), 0.7)
    s.wheels((cab | frame) & s.side, (-0.8, -0.55, 0.78), 0.46)


def _pedestrian(s: Spot) -> None:
    legs, torso, arms, head = s.part < 2, s.part == 2, (s.part == 3) | (s.part == 4), s.part == 6
    s.cover(legs, s.second)
    s.cover(legs & (s.z < 0.09), DARK)
    skin = 0.12 + 0.4 * s.style
    s.cover(head, np.stack([skin, 0.72 * skin, 0.58 * skin]))
    s.cover(head & ((s.w > 0.955) | (s.x < 0.0)), (0.035, 0.022, 0.015))
    s.cover(arms, 0.8 * s.color)
    s.cover(arms & (s.w < 0.5), np.stack([skin, 0.72 * skin, 0.58 * skin]))
    s.cover(torso & (s.style > 0.6) & (s.x < -0.1) & (np.abs(s.v) < 0.6), 0.5 * s.second)  # a rucksack


def _barrier(s: Spot) -> None:
    concrete = s.style < 0.2
    blocks = np.floor(2.45 * s.v + 0.5) % 2 == 0
    s.cover(concrete, np.broadcast_to(np.array([[0.42], [0.4], [0.37]], np.float32), s.color.shape) * (0.7 + 0.3 * s.w))
    s.cover(~concrete & blocks, s.second)
    s.cover((s.w < 0.06) | (concrete & (np.abs(np.abs(s.v) - 0.5) < 0.03)), 0.4 * s.color)


def _tree(s: Spot) -> None:
    s.cover(s.part == 0, (0.07, 0.05, 0.035))
    s.color *= np.where(s.part == 0, 1, _leaves(s))


def _bush(s: Spot) -> None:
    s.color *= _leaves(s)


def _leaves(s: Spot) -> np.ndarray:
    row, column = ((40 * (s.x + 0.6 * s.y)).astype(int) & 511), ((40 * (s.z + 0.4 * s.y)).astype(int) & 511)
    return np.clip(0.9 + 0.45 * cloud_tile()[row, column], 0.25, 1.8) * (0.6 + 0.5 * s.w)


def _lamp(s: Spot) -> None:
    s.cover((s.part == 1) & (s.u > 0.5), (0.8, 0.75, 0.6), 1.0)


def _sign(s: Spot) -> None:
    plate = s.part == 1
    s.cover(plate, s.second)
    s.cover(plate & (s.x < 0.06), (0.25, 0.25, 0.26))
    s.cover(plate & (s.x > 0.06) & (np.abs(s.v) < 0.7) & (s.w > 1 - 0.26 * s.style) & (s.w < 0.97), (0.75, 0.75, 0.74))


def _bin(s: Spot) -> None:
    s.cover(s.part == 1, 0.6 * s.color)
    s.cover((s.part == 0) & s.end & (np.abs(s.v) < 0.5) & (np.abs(s.w - 0.5) < 0.12), s.second)


def _cone(s: Spot) -> None:
    s.cover(((s.w > 0.38) & (s.w < 0.55)) | ((s.w > 0.68) & (s.w < 0.82)), (0.75, 0.75, 0.75))
    s.cover(s.part == 0, DARK)


def _bollard(s: Spot) -> None:
    s.cover((s.w > 0.75) & (s.w < 0.85), (0.75, 0.75, 0.75))


PAINTERS = (_car, _truck, _pedestrian, _barrier, _tree, _bush, _lamp, _sign, _bin, _cone, _bollard)
