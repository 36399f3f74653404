"""Triton kernel of ``feature_maps_format``: maps with pixels innermost become rows of channels.

A tiled transpose. In memory a map of one camera is a matrix of C channels x H * W pixels, its rows of the result one of
pixels x channels. Each program reads one tile of such a matrix along the pixels and writes it along the channels, both
16 bytes per thread where sizes allow; between the two the tile changes hands through shared memory. Everything is read
once and written once, nothing else is touched, and one launch covers all images and levels of a group of cameras: the
program number says image, level and tile. The channel tiles of the same pixels come one after the other, so that whole
rows are written at about the same time.
"""

import triton
import triton.language as tl

from saccade.operator.launch import LaunchedKernel


@LaunchedKernel
@triton.jit(do_not_specialize=["batch_rows"])
def format_kernel(
    maps,  # L of (B, N, C, area of the level)
    areas,  # L pixel counts
    rows,  # (B, N, pixels of a camera, C)
    batch_rows,  # from one batch element to the next
    CAMERAS: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILE_PIXELS: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
):
    """Write the rows of one group of cameras."""
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
