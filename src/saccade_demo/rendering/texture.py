"""Tiles of noise and of ground, made once and looked up by index; every scene begins at another place of them."""

from functools import cache

import numpy as np

TILE = 1024
"""Texels along each side of the finest level of `ground_tile`."""
TEXEL = 0.04
"""Metres of a texel."""
LEVELS = 9


@cache
def ground_tile() -> np.ndarray:
    """Grain, wear, grass and paving side by side in the bytes of uint32, in levels of falling resolution.

    Level l has (TILE >> l) ** 2 texels, each the mean of four of the level before; they follow one another in one
    flat array. What is far is looked up in a coarse level, else it would flicker from pixel to pixel.
    """
    rng = np.random.default_rng(20)
    grain = 0.65 * noise(rng, TILE, 0.25) + 0.35 * noise(rng, TILE, 1.2)
    level = np.stack([grain, _wear(rng), 0.6 * noise(rng, TILE, 0.5) + 0.5 * noise(rng, TILE, 1.4), _paving(rng)], -1)
    level = (128 + 45 * level).clip(0, 255)
    levels = []
    for _ in range(LEVELS):
        levels.append(np.ascontiguousarray(level.round().astype(np.uint8)).view(np.uint32).ravel())
        level = (level[::2, ::2] + level[1::2, ::2] + level[::2, 1::2] + level[1::2, 1::2]) / 4
    return np.concatenate(levels)


@cache
def cloud_tile() -> np.ndarray:
    """Smooth noise (512, 512) in float32, of mean 0 and deviation 1, for clouds and leaves."""
    return noise(np.random.default_rng(21), 512, 1.6).astype(np.float32)


def noise(rng: np.random.Generator, size: int, slope: float) -> np.ndarray:
    """Noise (size, size) that repeats without a seam, of mean 0 and deviation 1; the steeper the slope the smoother."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size))
    frequency[0, 0] = 1
    spectrum = np.fft.rfft2(rng.standard_normal((size, size))) / frequency**slope
    spectrum[0, 0] = 0
    tile = np.fft.irfft2(spectrum, (size, size))
    return tile / tile.std()


def _wear(rng: np.random.Generator) -> np.ndarray:
    """What time does to asphalt: repaired patches, stains, cracks; 0 where there is nothing, negative where darker."""
    wear = -1.2 * (noise(rng, TILE, 1.7) > 1.6) + 0.6 * (noise(rng, TILE, 1.5) > 1.9)
    wear -= 1.6 * np.exp(-((noise(rng, TILE, 1.3) / 0.012) ** 2)) * (noise(rng, TILE, 1.5) > 0.5)
    for _ in range(14):
        height, width = rng.integers(20, 130, 2)
        patch = np.roll(wear, tuple(rng.integers(0, TILE, 2)), (0, 1))[:height, :width]
        wear[:height, :width] = patch + rng.choice([-0.9, -0.5, 0.5])
        wear[[0, height], :width] = wear[:height, [0, width]] = -1.3
        wear = np.roll(wear, tuple(rng.integers(0, TILE, 2)), (0, 1))
    return wear


def _paving(rng: np.random.Generator) -> np.ndarray:
    """Slabs of 0.64 m with joints between them, each a little different."""
    slabs = np.kron(rng.normal(0, 0.5, (TILE // 16, TILE // 16)), np.ones((16, 16)))
    row, column = np.ogrid[:TILE, :TILE]
    joint = (row % 16 == 0) | ((column + 8 * (row // 16 % 2)) % 16 == 0)
    return np.where(joint, -1.8, slabs + 0.3 * noise(rng, TILE, 0.5))
