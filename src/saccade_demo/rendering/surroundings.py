"""What is around the solids of a rendered scene: light, a street with its verges, what lines it, and the sky.

A street has coordinates of its own: s along it, t across it to the left, both in metres. Colours are linear: twice the
light is twice the number.
"""

from dataclasses import dataclass

import numpy as np

from saccade_demo.rendering.texture import LEVELS, TEXEL, TILE, cloud_tile, ground_tile

ACROSS = 2048
"""Entries, each a `TEXEL` wide, of the table of what lies across a street."""
ALONG = 1024
"""Entries, each 0.25 m wide, of the tables of what lines a street."""
OFFSETS = np.cumsum([0, *((TILE >> level) ** 2 for level in range(LEVELS - 1))]).astype(np.int32)


@dataclass(frozen=True)
class Light:
    """Of sun, sky and air."""

    sun_direction: np.ndarray  # (3,) unit vector towards it
    sun: np.ndarray  # (3,) colour, 0 behind clouds
    ambient: np.ndarray  # (3,) colour of what comes from the sky
    sky: np.ndarray  # (2, 3) at the horizon, overhead
    clouds: float  # how many
    haze: float  # share that a metre of air adds
    lamps: float  # how bright lamps are


def random_light(rng: np.random.Generator) -> Light:
    """A day with sun, one without, or dusk."""
    weather = rng.choice(3, p=(0.55, 0.33, 0.12))
    elevation, azimuth = np.radians(rng.uniform(18, 70)), rng.uniform(-np.pi, np.pi)
    if weather == 2:
        elevation *= 0.45
    warm = 0.5 * np.exp(-4 * elevation)
    sun = np.array([1.0, 0.95 - 0.5 * warm, 0.86 - 1.1 * warm])
    blue = rng.uniform(0.0, 0.3)
    ambient = np.array([1 - blue, 1 - 0.35 * blue, 1.0])
    if weather == 0:
        sun *= rng.uniform(0.8, 1.3)
        ambient *= rng.uniform(0.3, 0.5)
        horizon, zenith = np.array([0.72, 0.8, 0.9]), np.array([0.16, 0.32, 0.66])
    elif weather == 1:
        sun *= rng.uniform(0.0, 0.15)
        ambient = rng.uniform(0.7, 1.0) * (0.25 * ambient + 0.75)
        grey = rng.uniform(0.6, 0.85)
        horizon, zenith = np.array([grey, grey, 1.03 * grey]), 0.75 * np.array([grey, 1.02 * grey, 1.07 * grey])
    else:
        sun *= rng.uniform(0.15, 0.5)
        ambient = rng.uniform(0.2, 0.35) * np.array([0.85, 0.9, 1.15])
        horizon, zenith = np.array([0.75, 0.5, 0.36]) * rng.uniform(0.5, 1), np.array([0.12, 0.17, 0.34])
    # A camera's exposure makes up for most of it.
    exposure = (0.55 / (ambient.mean() + sun.mean() * np.sin(elevation))) ** 0.85 * rng.uniform(1.8, 2.4)
    sky = np.stack([horizon, zenith]) * rng.uniform(0.85, 1.1)
    if weather == 2:
        sky = sky * exposure**0.5
    return Light(
        sun_direction=np.array(
            [np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)], np.float32
        ),
        sun=(sun * exposure).astype(np.float32),
        ambient=(ambient * exposure).astype(np.float32),
        sky=sky.astype(np.float32),
        clouds=float(rng.uniform(-1.2, 1.2)),
        haze=float(np.exp(rng.uniform(np.log(1 / 800), np.log(1 / 150)))),
        lamps=(0.05, 0.3, 1.6)[weather],
    )


@dataclass(frozen=True)
class Street:
    """A street, seen from wherever the vehicle stands on it."""

    heading: float
    shift: float  # t of the vehicle, whose s is 0
    half_width: float  # of the carriageway
    reach: float  # from the middle to what lines it
    across: np.ndarray  # (LEVELS * ACROSS, 8) uint8: shares of asphalt, paving, grass; kerb; lines, dashes, zebra, bays
    bay: float  # length of a parking bay
    zebra: np.ndarray  # (2,) where along the street people cross, from and to
    palette: np.ndarray  # (3, 3) asphalt, paving, grass
    strength: np.ndarray  # (3,) of grain, wear, coarse texture
    texture: np.ndarray  # (2,) texels by which textures are moved
    lining: np.ndarray  # (6, 2 * ALONG) what lines it on the right, then on the left: height, 0 for a gap; red, green
    # and blue; width of a window with its wall, height of a storey, 0 for trees
    skyline: np.ndarray  # (1024,) rise of what is far away, by azimuth

    def coordinates(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """s and t of places on the ground."""
        cos, sin = np.float32(np.cos(self.heading)), np.float32(np.sin(self.heading))
        return cos * x + sin * y, cos * y - sin * x + np.float32(self.shift)


def random_street(rng: np.random.Generator) -> Street:
    """With two to six lanes, and what goes with them."""
    lanes, lane = rng.choice([2, 3, 4, 6], p=(0.3, 0.25, 0.3, 0.15)), rng.uniform(3.1, 3.8)
    parking = rng.choice([0.0, 2.3, 4.8], p=(0.35, 0.4, 0.25))
    half_width = lanes * lane / 2 + parking
    walk = rng.uniform(2, 6)
    verge = rng.choice([0.0, rng.uniform(1, 12)])
    reach = max(half_width + walk + verge, 15.0)
    asphalt = rng.uniform(0.09, 0.2) * (1 + rng.uniform(-0.06, 0.06, 3))
    paving = rng.uniform(0.2, 0.42) * (1 + rng.uniform(-0.12, 0.12) * np.array([1, 0.1, -1]))
    grass = rng.uniform(0.5, 1.1) * np.array([rng.uniform(0.09, 0.2), 0.17, 0.05])
    zebra = rng.uniform(-25, 25)
    skyline = np.abs(cloud_tile()[rng.integers(512)]).repeat(2)
    towers = np.repeat(rng.uniform(0, 0.09, 128), 8) * (rng.uniform(0, 1, 128) < 0.5).repeat(8)
    return Street(
        heading=rng.uniform(-np.pi, np.pi),
        shift=rng.uniform(-1, 1) * (half_width - 1.5),
        half_width=half_width,
        reach=reach,
        across=_across(rng, lanes, lane, parking, walk),
        bay=2.6 if parking > 4 else 5.5,
        zebra=np.array([zebra, zebra + rng.choice([0.0, 4.0])]),
        palette=np.stack([asphalt, paving, grass]).astype(np.float32),
        strength=rng.uniform((0.3, 0.2, 0.3), (0.8, 0.9, 0.8)).astype(np.float32),
        texture=rng.integers(0, TILE, 2),
        lining=np.concatenate([_lining(rng), _lining(rng)], 1),
        skyline=(0.012 * skyline + rng.uniform(0, 1) * np.roll(towers, rng.integers(1024))).astype(np.float32),
    )


def _across(rng: np.random.Generator, lanes: int, lane: float, parking: float, walk: float) -> np.ndarray:
    """The table `Street.across`, in levels of falling sharpness, one after the other."""
    t = (np.arange(ACROSS) + 0.5 - ACROSS / 2) * TEXEL
    side = np.abs(t)
    edge, half_width = lanes * lane / 2, lanes * lane / 2 + parking
    asphalt, grass = side < half_width, side > half_width + walk
    dashes, lines = np.zeros(ACROSS, dtype=bool), np.zeros(ACROSS, dtype=bool)
    for k in range(1, lanes):
        near = np.abs(t + edge - k * lane) < 0.075
        middle = lanes % 2 == 0 and k == lanes // 2 and rng.random() < 0.5
        lines |= near & middle
        dashes |= near & (not middle)
    if rng.random() < 0.6:
        lines |= np.abs(side - edge + 0.1) < 0.07
    kerb = (side > half_width) & (side < half_width + 0.18)
    zebra = asphalt & (t % 1.0 < 0.5)
    bays = (side > edge) & (side < half_width)
    rows = np.stack([asphalt, ~(asphalt | grass), grass, kerb, lines, dashes, zebra, bays], 1)
    reach = 1 << (LEVELS - 2)
    total = np.cumsum(np.pad(rows, ((reach + 1, reach), (0, 0)), mode="edge"), 0, dtype=np.int32)
    levels = [rows * 255]
    for level in range(1, LEVELS):
        half = 1 << (level - 1)
        level_sum = total[reach + half : reach + half + ACROSS] - total[reach - half : reach - half + ACROSS]
        levels.append((255 * level_sum) >> level)
    return np.concatenate(levels).astype(np.uint8)


def _lining(rng: np.random.Generator) -> np.ndarray:
    """Houses, trees and gaps along one side, (6, ALONG), see `Street.lining`."""
    lining = np.zeros((6, ALONG), dtype=np.float32)
    built = rng.uniform(0, 1)
    begin = 0
    while begin < ALONG:
        end = begin + int(rng.integers(32, 110))
        what = rng.uniform()
        if what < built:
            wall = rng.uniform(0.12, 0.5) * (1 + rng.uniform(0, 0.35) * np.array([1, 0.2, -0.8]))
            house = rng.uniform(4, 18), *wall, rng.uniform(1.6, 3.6), rng.uniform(2.7, 3.6)
            lining[:, begin:end] = np.array(house)[:, None]
        elif what < 0.85:
            rough = cloud_tile()[rng.integers(512)].repeat(2)[begin:end]
            lining[0, begin:end] = rng.uniform(2.0, 8) * (1 + 0.3 * rough.clip(-2, 2))
            lining[1:4, begin:end] = rng.uniform(0.6, 1.4) * np.array([[rng.uniform(0.05, 0.13)], [0.11], [0.035]])
        begin = end
    return lining


def shade_ground(
    street: Street, light: Light, x: np.ndarray, y: np.ndarray, depth: np.ndarray, pixel: float, sunny: np.ndarray,
    open_: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """Colours (3, K) of the ground.

    Args:
        street: What it looks like.
        light: What falls on it.
        x: (K,) where.
        y: (K,) where.
        depth: (K,) metres from the camera.
        pixel: What a pixel spans, in metres, a metre away.
        sunny: (K,) share of the sun that is to be seen from there.
        open_: (K,) share of the sky.
    """
    s, t = street.coordinates(x, y)
    # A pixel spans `pixel * depth` metres across the line of sight, and more along it, as the ground lies aslant.
    level = np.log2(depth) * np.float32(1.4) + np.float32(np.log2(pixel / TEXEL))
    level = level.clip(0, LEVELS - 1).astype(np.int32)
    column = (t * np.float32(1 / TEXEL) + np.float32(ACROSS / 2)).clip(0, ACROSS - 1).astype(np.int32)
    across = street.across.view(np.uint64).ravel()[level * ACROSS + column].view(np.uint8).reshape(-1, 8)
    column = (t * np.float32(1 / TEXEL)).astype(np.int32) + np.int32(street.texture[0] + (1 << 20)) & (TILE - 1)
    row = (s * np.float32(1 / TEXEL)).astype(np.int32) + np.int32(street.texture[1] + (1 << 20)) & (TILE - 1)
    index = OFFSETS[level] + ((row >> level) << (10 - level)) + (column >> level)
    texture = ground_tile()[index].view(np.uint8).reshape(-1, 4)

    def signed(channel: int) -> np.ndarray:
        return (texture[:, channel].astype(np.float32) - np.float32(128)) * np.float32(1 / 128)

    def share(channel: int) -> np.ndarray:
        return across[:, channel].astype(np.float32) * np.float32(1 / 255)

    wear = signed(1) * street.strength[1]
    materials = (
        share(0) * (1 + street.strength[0] * signed(0) + wear).clip(0.3, 2),
        share(1) * (1 + 0.5 * signed(3) + 0.2 * signed(0)),
        share(2) * (1 + 0.9 * street.strength[2] * signed(2)).clip(0.2, 3),
    )
    kerb = share(3)
    lines = share(4)
    for channel, period, length in ((5, 9.0, 3.5), (7, street.bay, 0.12)):
        there = np.flatnonzero(across[:, channel])
        lines[there] += share(channel)[there] * _stripe(s[there], period, length, level[there])
    if street.zebra[1] > street.zebra[0]:
        lines += share(6) * ((s > street.zebra[0]) & (s < street.zebra[1]))
    lines = np.minimum(lines, 1) * (0.8 + 0.8 * wear).clip(0.25, 0.95)
    kerb_lines = 0.35 * kerb
    sun_light = sunny * light.sun_direction[2]
    color = np.empty((3, len(x)), dtype=np.float32)
    for c in range(3):
        asphalt, paving, grass = street.palette[:, c]
        ground = asphalt * materials[0] + paving * materials[1] + grass * materials[2] + kerb_lines * (0.5 - paving)
        ground += lines * (0.62 - ground)
        color[c] = ground * (light.sun[c] * sun_light + light.ambient[c] * open_)
    return color


def _stripe(s: np.ndarray, period: float, length: float, level: np.ndarray) -> np.ndarray:
    """Share of a pixel that lies in stripes across the street."""
    soft = TEXEL * np.exp2(level).astype(np.float32)
    away = np.abs(s - period * np.floor(s / period) - period / 2)
    sharp = ((length / 2 - away) / soft + 0.5).clip(0, 1)
    return np.where(soft > period / 2, np.float32(length / period), sharp)


def shade_sky(street: Street, light: Light, rays: np.ndarray, pixel: float) -> np.ndarray:
    """Colours (3, K) of the sky in directions (3, K), with clouds, the sun's glow and what is far away before it."""
    flat = np.sqrt(rays[0] ** 2 + rays[1] ** 2)
    rise = rays[2] / flat
    turn = np.arctan2(rays[1], rays[0]) * np.float32(1 / (2 * np.pi)) + np.float32(0.5)
    toward = rays[0] * light.sun_direction[0] + rays[1] * light.sun_direction[1] + rays[2] * light.sun_direction[2]
    toward = (toward / (flat * np.sqrt(1 + rise**2))).clip(0, 1) ** 8
    up = (2.2 * rise).clip(0, 1)
    row, column = (rise * 900).astype(np.int32) + 4096, (turn * 2048).astype(np.int32) + int(street.texture[0])
    tile = cloud_tile()
    clouds = (0.45 * (tile[row & 511, column & 511] + light.clouds + 2.0 * up)).clip(0, 1) * (4 * rise).clip(0, 0.8)
    skyline = street.skyline[((turn * 1024).astype(np.int32) + int(street.texture[1])) & 1023]
    far = ((skyline - rise) * np.float32(1 / pixel) + np.float32(0.5)).clip(0, 1) * np.float32(
        min(0.75, 0.004 / light.haze)
    )
    color = np.empty_like(rays)
    for c in range(3):
        low, high = light.sky[:, c]
        color[c] = low + up * (high - low) + light.sun[c] * 0.35 * toward
        color[c] += clouds * (low * 1.05 - color[c])
        color[c] += far * (0.3 * low - color[c])
    return color


def lining_depth(
    street: Street, origin: np.ndarray, rays: np.ndarray, ground: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Where rays (3, K) from a point (3,) meet what lines the street.

    Returns:
        Depths (K,), infinite where nothing is met; side (K,), 0 or 1; s (K,); and height above the ground (K,).
    """
    cos, sin = np.float32(np.cos(street.heading)), np.float32(np.sin(street.heading))
    along, across = cos * rays[0] + sin * rays[1], cos * rays[1] - sin * rays[0]
    s0, t0 = (float(value) for value in street.coordinates(origin[0], origin[1]))
    side = (across > 0).astype(np.int32)
    with np.errstate(divide="ignore", invalid="ignore"):
        depth = (np.where(across > 0, np.float32(street.reach), np.float32(-street.reach)) - np.float32(t0)) / across
        s = np.float32(s0) + depth * along
        z = np.float32(origin[2] - ground) + depth * rays[2]
        place = 4 * s + ALONG / 2
        inside = (place >= 0) & (place < ALONG - 1) & (z > 0)
        place = np.where(inside, place, 0)
    before = place.astype(np.int32)
    height, after = street.lining[0, side * ALONG + before], street.lining[0, side * ALONG + before + 1]
    inside &= z < height + (place - before) * (after - height)
    return np.where(inside, depth, np.float32(np.inf)), side, s, z


def shade_lining(
    street: Street, light: Light, side: np.ndarray, s: np.ndarray, z: np.ndarray, depth: np.ndarray, pixel: float
) -> np.ndarray:
    """Colours (3, K) of what lines the street."""
    place = (4 * s + ALONG / 2).astype(np.int32)
    height, *wall, width, storey = street.lining.take(side * ALONG + place, axis=1)
    height = np.maximum(height, 1)  # of the gap that a slope reaches into
    house = width > 0
    width, storey = np.where(house, width, 1), np.where(house, storey, 1)
    # Windows fade into the wall where a pixel is as large as they are.
    sharp = (1.3 - pixel * depth * 2 / width).clip(0, 1)
    column, row = s / width, z / storey
    u, v = column - np.floor(column), row - np.floor(row)
    floor = z > storey
    window = house & (np.abs(u - 0.5) < np.where(floor, 0.24, 0.42)) & (np.abs(v - 0.55) < 0.26)
    window &= z < height - 0.2 * storey
    lit = (7 * column.astype(np.int32) + 5 * row.astype(np.int32)) & 7 < 2
    glass = np.float32(0.6) * window * sharp
    leaves = cloud_tile()[(z * 24).astype(np.int32) & 511, (s * 24).astype(np.int32) & 511]
    rough = np.where(house, 1 + 0.05 * leaves - 0.12 * (v < 0.06), (0.85 + 0.4 * leaves) * (0.5 + 0.5 * z / height))
    rough = rough.clip(0.2, 1.8)
    facing = np.array([np.sin(street.heading), -np.cos(street.heading)])  # the way the left side looks
    lambert = np.maximum(np.where(side == 1, 1, -1) * np.float32(facing @ light.sun_direction[:2]), 0).astype(
        np.float32
    )
    color = np.empty((3, len(s)), dtype=np.float32)
    for c in range(3):
        shine = (0.06 + 0.2 * v) * light.sky[0, c] + lit * np.float32(light.lamps * (0.45, 0.33, 0.18)[c])
        color[c] = wall[c] * rough * (light.sun[c] * lambert + np.float32(0.75) * light.ambient[c])
        color[c] += glass * (shine - color[c])
    return color
