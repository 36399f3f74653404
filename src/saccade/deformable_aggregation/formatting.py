"""``feature_maps_format``: between a backbone's list of maps and the rows that ``deformable_aggregation`` reads."""

from collections.abc import Sequence
from functools import reduce
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from saccade.argument_checks import require_floating, require_integer, require_shape
from saccade.operator.declaration import Operator
from saccade.operator.gradients import Gradient
from saccade.operator.torch_internals import current_stream, may_have_been_written_to, weak_tensor_keys
from saccade.ordinary_tensors import may_be_kept

_Sizes = tuple[tuple[int, int], ...]  # (height, width) of each of the L maps of a camera

_Cameras = tuple[tuple[int, _Sizes], ...]  # groups of cameras of equal sizes: how many, and their sizes

# Index tensors by sizes, device and stream. A training run has few sizes, one with many need not keep them all.
_kept: dict[Any, tuple[Tensor, Tensor]] = {}
_MOST_KEPT = 256

# Sizes of the spatial_shape tensors that were kept: formatting back need not ask the device for them.
_host_sizes = weak_tensor_keys()


def feature_maps_format(feature_maps: Any, inverse: bool = False) -> Any:
    """Turn a list of feature maps into the three tensors that ``deformable_aggregation`` takes, or back.

    Letters: B batch, N cameras, L levels, C channels, S pixels of all cameras and levels.

    Args:
        feature_maps: A list of L maps (B, N, C, H_l, W_l), in any order. Or a list of such lists, one for each group of
            cameras with equal image sizes; all groups must agree in B, C and L. Dtypes may differ, as a pyramid's do
            under autocast: the rows have the one that they promote to. With ``inverse``: the three tensors.
        inverse: Turn rows back into maps.

    Returns:
        ``[rows, spatial_shape, scale_start_index]``: (B, S, C) with the pixels camera by camera, within a camera level
        by level, within a level row by row; (N, L, 2) int64 (height, width); (N, L) int64 first row of each map. The
        two index tensors are kept and shared between calls: do not write to them. Differentiable in the maps.

        With ``inverse``: a list with one list of L maps for each run of consecutive cameras of equal sizes, so that
        the inverse of a format of ``maps`` is ``[maps]``. The maps are views of the rows.

    Raises:
        TypeError: Something in the list is no floating point tensor.
        ValueError: Empty list, maps or groups that disagree, or with ``inverse`` sizes that do not add up to S.

    Formatting back needs the sizes on the host: from a GPU's ``spatial_shape`` that this function did not make, or made
    in inference mode, it waits for the device once, and ``torch.compile`` cannot trace it. Otherwise nothing waits.

    Example:
        >>> import torch, saccade
        >>> maps = [torch.rand(1, 2, 8, 4, 6), torch.rand(1, 2, 8, 2, 3)]
        >>> rows, spatial_shape, scale_start_index = saccade.feature_maps_format(maps)
        >>> rows.shape, scale_start_index.tolist()
        (torch.Size([1, 60, 8]), [[0, 24], [30, 54]])
        >>> (group,) = saccade.feature_maps_format([rows, spatial_shape, scale_start_index], inverse=True)
        >>> torch.equal(group[0], maps[0])
        True
    """
    if inverse:
        return _to_maps(feature_maps)
    if not isinstance(feature_maps, Sequence) or len(feature_maps) == 0:
        raise ValueError(f"feature_maps: expected a list of maps (B, N, C, H, W), got {_describe(feature_maps)}")
    groups = feature_maps if isinstance(feature_maps[0], (list, tuple)) else [feature_maps]
    check_groups(groups)
    levels, flat = len(groups[0]), [feature for maps in groups for feature in maps]
    rows = FEATURE_MAPS_FORMAT(levels, flat)
    return [rows, *index_tensors(cameras_of(levels, flat), rows)]


def _describe(value: Any) -> str:
    return "an empty list" if isinstance(value, Sequence) and not len(value) else type(value).__name__


def check_groups(groups: Sequence[Any]) -> None:
    """Raise unless these are lists of as many maps each, with the same B, C and device."""
    first: Tensor | None = None
    for k, maps in enumerate(groups):
        name = f"feature_maps[{k}]" if len(groups) > 1 else "feature_maps"
        if not isinstance(maps, Sequence) or len(maps) == 0:
            raise ValueError(f"{name}: expected a list of maps (B, N, C, H, W), got {_describe(maps)}")
        if len(maps) != len(groups[0]):
            raise ValueError(f"{name}: expected {len(groups[0])} levels, as many as the first group, got {len(maps)}")
        for level, feature in enumerate(maps):
            require_floating(f"{name}[{level}]", feature)
            first = feature if first is None else first
            if feature.device != first.device:
                raise ValueError(
                    f"{name}[{level}]: expected device {first.device}, that of the first map, got {feature.device}"
                )
            if level == 0:
                require_shape(f"{name}[0]", feature, "B N C H W")
            cameras = maps[0].shape[1]
            require_shape(f"{name}[{level}]", feature, "B N C H W", B=first.shape[0], N=cameras, C=first.shape[2])


def cameras_of(levels: int, feature_maps: Sequence[Tensor]) -> _Cameras:
    """Sizes of maps (B, N, C, H_l, W_l), ``levels`` of them for each group of cameras."""
    groups = [feature_maps[first : first + levels] for first in range(0, len(feature_maps), levels)]
    return tuple((maps[0].shape[1], tuple((feature.shape[3], feature.shape[4]) for feature in maps)) for maps in groups)


def index_tensors(cameras: _Cameras, rows: Tensor, by_level: bool = False) -> tuple[Tensor, Tensor]:
    """``spatial_shape`` and ``scale_start_index`` for feature rows, kept from an earlier call where that can be.

    ``by_level``: of levels that each lie in memory of their own, ``scale_start_index`` says where in it.
    """
    if not may_be_kept(rows):
        return _make_index_tensors(cameras, rows.device, by_level)
    # Kept apart for each stream: what one stream has yet to fill, another must not read.
    stream = current_stream(rows.get_device()) if rows.is_cuda else None
    key = (cameras, by_level, rows.device, stream)
    tensors = _kept.pop(key, None)
    if tensors is None or any(map(may_have_been_written_to, tensors)):  # none yet, or somebody wrote to them
        tensors = _make_index_tensors(cameras, rows.device, by_level)
        if _host_sizes is not None:
            _host_sizes[tensors[0]] = cameras
        if len(_kept) == _MOST_KEPT:
            del _kept[next(iter(_kept))]
    _kept[key] = tensors  # last in line to be dropped
    return tensors


def _make_index_tensors(cameras: _Cameras, device: torch.device, by_level: bool) -> tuple[Tensor, Tensor]:
    shapes, starts, base = [], [], 0
    for number, sizes in cameras:
        pixels = sum(height * width for height, width in sizes)
        # Filled on the device: copying a list of numbers from the host would wait for the device.
        shape = torch.stack([torch.full((), side, device=device) for size in sizes for side in size])
        shapes.append(shape.view(1, len(sizes), 2).expand(number, -1, -1))
        areas = shapes[-1][:1].prod(-1)
        camera = torch.arange(number, device=device)[:, None]
        starts.append(camera * areas if by_level else base + camera * pixels + areas.cumsum(1) - areas)
        base += number * pixels
    return torch.cat(shapes), torch.cat(starts)


def _to_maps(triple: Any) -> list[list[Tensor]]:
    if not isinstance(triple, Sequence) or len(triple) != 3:
        raise ValueError("feature_maps: expected [rows, spatial_shape, scale_start_index] with inverse=True")
    rows, spatial_shape, _ = triple
    require_floating("feature_maps[0]", rows)
    require_integer("feature_maps[1]", spatial_shape)
    _, pixels, _ = require_shape("feature_maps[0]", rows, "B S C")
    require_shape("feature_maps[1]", spatial_shape, "N L 2")
    known = None
    if _host_sizes is not None and not torch.compiler.is_compiling() and not may_have_been_written_to(spatial_shape):
        known = _host_sizes.get(spatial_shape)
    if known is not None:
        cameras = [sizes for number, sizes in known for _ in range(number)]
    else:
        cameras = [tuple((height, width) for height, width in sizes) for sizes in spatial_shape.tolist()]
    total = sum(height * width for sizes in cameras for height, width in sizes)
    if total != pixels or any(side < 0 for sizes in cameras for size in sizes for side in size):
        raise ValueError(f"feature_maps[1]: expected sizes that add up to the {pixels} rows, got {total} pixels")
    return maps_of(rows, [(len(list(run)), sizes) for sizes, run in groupby(cameras)])


def blocks_of(rows: Tensor, cameras: Sequence[tuple[int, _Sizes]]) -> list[Tensor]:
    """Views (B, N, pixels of a camera, C) of rows (B, S, C), one for each group of cameras."""
    blocks, base = [], 0
    for number, sizes in cameras:
        pixels = sum(height * width for height, width in sizes)
        blocks.append(rows.narrow(1, base, number * pixels).unflatten(1, (number, pixels)))
        base += number * pixels
    return blocks


def maps_of(rows: Tensor, cameras: Sequence[tuple[int, _Sizes]]) -> list[list[Tensor]]:
    """Views (B, N, C, H_l, W_l) of rows (B, S, C), a list for each group of cameras."""
    groups = []
    for block, (_, sizes) in zip(blocks_of(rows, cameras), cameras, strict=True):
        parts = block.split([height * width for height, width in sizes], 2)
        groups.append([p.unflatten(2, size).permute(0, 1, 4, 2, 3) for p, size in zip(parts, sizes, strict=True)])
    return groups


def as_rows(feature_maps: Sequence[Tensor]) -> list[Tensor]:
    """Of each map (B, N, C, H, W) its pixels as rows (B, N * H * W, C), a view if it is channels-last."""
    return [feature.permute(0, 1, 3, 4, 2).flatten(1, 3) for feature in feature_maps]


def as_maps(rows: Sequence[Tensor], feature_maps: Sequence[Tensor]) -> list[Tensor]:
    """Views (B, N, C, H, W), channels-last in memory, of (B, N * H * W, C)."""
    return [
        r.unflatten(1, (feature.shape[1], *feature.shape[3:])).permute(0, 1, 4, 2, 3)
        for r, feature in zip(rows, feature_maps, strict=True)
    ]


def _reference(levels: int, feature_maps: Sequence[Tensor]) -> Tensor:
    """Maps that are channels-last in memory are rows already: of these, this is a copy."""
    rows = new_rows(levels, feature_maps)
    for number, block in enumerate(blocks_of(rows, cameras_of(levels, feature_maps))):
        maps = feature_maps[number * levels : (number + 1) * levels]
        torch.cat([feature.permute(0, 1, 3, 4, 2).flatten(2, 3) for feature in maps], 2, out=block)
    return rows


def new_rows(levels: int, feature_maps: Sequence[Tensor]) -> Tensor:
    """Room for rows of maps, in the dtype that these promote to."""
    batch, _, channels, _, _ = feature_maps[0].shape
    pixels = sum(
        number * height * width for number, sizes in cameras_of(levels, feature_maps) for height, width in sizes
    )
    dtype = reduce(torch.promote_types, [feature.dtype for feature in feature_maps])
    return feature_maps[0].new_empty(batch, pixels, channels, dtype=dtype)


def _save(levels: int, feature_maps: Sequence[Tensor]) -> dict[str, Any]:
    return {"cameras": cameras_of(levels, feature_maps), "dtypes": [feature.dtype for feature in feature_maps]}


def _backward(
    needed: Sequence[str], grad_rows: Tensor, cameras: _Cameras, dtypes: Sequence[torch.dtype]
) -> dict[str, list[Tensor]]:
    """Views of the incoming gradient: the format is linear, and can be differentiated again."""
    gradients = [gradient for group in maps_of(grad_rows, cameras) for gradient in group]
    return {"feature_maps": [gradient.to(dtype) for gradient, dtype in zip(gradients, dtypes, strict=True)]}


FEATURE_MAPS_FORMAT = Operator(
    "feature_maps_format(int levels, Tensor[] feature_maps) -> Tensor",
    fake=new_rows,
    reference=_reference,
    kernels="saccade.deformable_aggregation.launch:prepare_format",
    nonempty=("feature_maps",),
    gradient=Gradient(of=("feature_maps",), save=_save, backward=_backward),
)
