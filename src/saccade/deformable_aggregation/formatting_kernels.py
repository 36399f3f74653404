"""Triton kernel of ``feature_maps_format`` and its launcher: maps with pixels innermost become rows of channels.

A tiled transpose. In memory a map of one camera is a matrix of C channels x H * W pixels, its rows of the result one of
pixels x channels. Each program reads one tile of such a matrix along the pixels and writes it along the channels, both
16 bytes per thread where sizes allow; between the two the tile changes hands through shared memory. Everything is read
once and written once, nothing else is touched, and one launch covers all images and levels of a group of cameras: the
program number says image, level and tile. The channel tiles of the same pixels come one after the other, so that whole
rows are written at about the same time.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from saccade.kernel_launch import LaunchedKernel, on_device_of

# Enough in flight to keep the memory busy, with room for several programs on a multiprocessor.
_TILE_BYTES = 16384
_MOST_TILE_CHANNELS = 64


@LaunchedKernel
@triton.jit(do_not_specialize=["batch_rows"])
def _format_kernel(
    maps,  # L of (B, N, C, area of the level)
    areas,  # L pixel counts
    rows,  # (B, N, pixels of a camera, C)
    batch_rows,  # from one batch element to the next
    CAMERAS: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILE_PIXELS: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
):
    camera_tiles = 0  # of one camera, over all levels; as if it had a single tile of channels
    camera_rows = tl.full((), 0, tl.int64)
    for level in tl.static_range(len(areas)):
        camera_tiles += tl.cdiv(areas[level], TILE_PIXELS)
        camera_rows += areas[level]
    CHANNEL_TILES: tl.constexpr = (CHANNELS + TILE_CHANNELS - 1) // TILE_CHANNELS
    program = tl.program_id(0)
    first_channel = program % CHANNEL_TILES * TILE_CHANNELS
    tile = program // CHANNEL_TILES
    image = (tile // camera_tiles).to(tl.int64)  # batch element, then camera
    tile = tile % camera_tiles
    level_row = image // CAMERAS * batch_rows + image % CAMERAS * camera_rows
    pixel = tl.arange(0, TILE_PIXELS)[:, None]
    channel = tl.arange(0, TILE_CHANNELS)[None, :]
    for level in tl.static_range(len(areas)):
        area = areas[level]
        level_tiles = tl.cdiv(area, TILE_PIXELS)
        if (tile >= 0) & (tile < level_tiles):
            first_pixel = tile.to(tl.int64) * TILE_PIXELS
            mask = pixel < area - first_pixel
            if CHANNELS % TILE_CHANNELS != 0:
                mask = mask & (channel < CHANNELS - first_channel)
            source = maps[level] + (image * CHANNELS + first_channel) * area + first_pixel
            values = tl.load(source + channel.to(tl.int64) * area + pixel, mask)
            target = rows + (level_row + first_pixel) * CHANNELS + first_channel
            tl.store(target + pixel.to(tl.int64) * CHANNELS + channel, values.to(rows.dtype.element_ty), mask)
        tile -= level_tiles
        level_row += area


def format_rows(maps: Sequence[Tensor], rows: Tensor) -> None:
    """Write the rows of one group of cameras.

    Args:
        maps: L contiguous maps (B, N, C, H_l, W_l).
        rows: (B, N, sum of H_l * W_l, C) to write to; each batch element contiguous.
    """
    if rows.numel() == 0:
        return
    batch, cameras, _, channels = rows.shape
    tile_channels = min(triton.next_power_of_2(channels), _MOST_TILE_CHANNELS)
    tile_pixels = _TILE_BYTES // rows.element_size() // tile_channels
    areas = tuple(feature.shape[3] * feature.shape[4] for feature in maps)
    tiles = sum(triton.cdiv(area, tile_pixels) for area in areas) * triton.cdiv(channels, tile_channels)
    with on_device_of(rows):
        _format_kernel[(batch * cameras * tiles,)](
            tuple(maps),
            areas,
            rows,
            rows.stride(0) // channels,
            CAMERAS=cameras,
            CHANNELS=channels,
            TILE_PIXELS=tile_pixels,
            TILE_CHANNELS=tile_channels,
            # For each level of another dtype there is code with registers of its own.
            num_warps=4 if len({feature.dtype for feature in maps}) == 1 else 8,
        )
