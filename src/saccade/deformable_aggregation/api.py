"""The public function ``deformable_aggregation``."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from saccade.argument_checks import require_floating, require_integer, require_same_device, require_shape
from saccade.deformable_aggregation import reference
from saccade.deformable_aggregation.formatting import as_maps, as_rows, check_groups, feature_maps_format
from saccade.operator.declaration import Operator
from saccade.operator.gradients import Backward, room_for_gradients
from saccade.triton_dispatch import served_by_triton


def deformable_aggregation(
    feature_maps: Tensor | Sequence[Tensor],
    spatial_shape: Tensor | None,
    scale_start_index: Tensor | None,
    sampling_location: Tensor,
    weights: Tensor,
) -> Tensor:
    """Sample multi-camera, multi-level feature maps at key points and sum the samples with attention weights.

    For every anchor, each of its K key points is looked up bilinearly in each of L maps of each of N cameras that see
    it, and the samples are summed with one weight per group of channels. Pixel centres lie at integers after
    ``u = x * width - 0.5`` (``align_corners=False`` of ``grid_sample``), corners outside a map count as zero. A point
    is visible in a camera if and only if ``0 < x < 1`` and ``0 < y < 1``; one that is not (NaN and infinity included)
    adds nothing and has zero gradient.

    Letters: B batch, S pixels of all cameras and levels, C channels, N cameras, L levels, A anchors, K key points of an
    anchor, G groups of C / G consecutive channels.

    Args:
        feature_maps: (B, S, C) floating point, the pixels of all maps as rows; ``feature_maps_format`` makes it. Or the
            list of L maps (B, N, C, H_l, W_l) itself: on a GPU, maps that are channels-last in memory are read in
            place, and so are their gradients written; others are formatted first.
        spatial_shape: (N, L, 2) int32 or int64, (height, width) of each map; None with a list.
        scale_start_index: (N, L) int32 or int64, row along S at which each map begins; its pixels follow row by row.
            None with a list.
        sampling_location: (B, A, K, N, 2) floating point, (x, y) in fractions of the image: 0 is the left or top edge,
            1 the right or bottom edge. One location serves all levels of a camera.
        weights: (B, A, K, N, L, G) floating point, used as they are (no softmax).

    Returns:
        (B, A, C) in the dtype of ``feature_maps``. Sums are taken in float32, or in float64 if an input is float64.
        Gradients flow to ``feature_maps``, ``sampling_location`` and ``weights``, each in its own dtype, and only those
        that are needed are computed; differentiating twice raises. Under autocast ``feature_maps`` is cast to the
        autocast dtype, locations and weights are left as they are. Results and gradients have the same bits in every
        run on the same device, also on a GPU.

    Raises:
        TypeError: An argument is no tensor, or not of a floating or integer dtype as said above.
        ValueError: Shapes or devices disagree, or G does not divide C. On the CPU also a map that reaches beyond the
            rows of ``feature_maps``; on a GPU the rows that do not exist count as zero, unless ``saccade.debug_checks``
            is on.

    The operator of Sparse4D (Lin et al., "Sparse4D v2", 2023, https://arxiv.org/abs/2305.14018) and SparseDrive.

    Example:
        >>> import torch, saccade
        >>> image = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).reshape(1, 1, 1, 2, 2)  # (B, N, C, H, W)
        >>> maps, shape, start = saccade.feature_maps_format([image])
        >>> location = torch.tensor([0.5, 0.5]).reshape(1, 1, 1, 1, 2)
        >>> saccade.deformable_aggregation(maps, shape, start, location, torch.ones(1, 1, 1, 1, 1, 1))
        tensor([[[2.5000]]])
    """
    is_list = isinstance(feature_maps, (list, tuple))
    maps: Sequence[Any] = feature_maps if is_list else [feature_maps]
    if torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"):
        maps = [*map(_in_autocast_dtype, maps)]
    args = maps, spatial_shape, scale_start_index, sampling_location, weights
    if is_list == (spatial_shape is None and scale_start_index is None):
        call = DEFORMABLE_AGGREGATION.known_calls.find(args)
        if call is not None:
            return call(*args)
    if not is_list:
        require_floating("feature_maps", feature_maps)
    for name, index in (("spatial_shape", spatial_shape), ("scale_start_index", scale_start_index)):
        if not is_list:
            require_integer(name, index)
        elif index is not None:
            raise ValueError(f"{name}: expected None with a list of maps, got {type(index).__name__}")
    if is_list and not _are_read_in_place(*args):
        rows, spatial_shape, scale_start_index = feature_maps_format(feature_maps)
        return deformable_aggregation(rows, spatial_shape, scale_start_index, sampling_location, weights)
    return DEFORMABLE_AGGREGATION(*args)


def _in_autocast_dtype(features: Any) -> Any:
    if isinstance(features, Tensor) and features.is_floating_point() and features.dtype != torch.float64:
        on = features.device.type
        if on in ("cpu", "cuda") and torch.is_autocast_enabled(on):
            return features.to(torch.get_autocast_dtype(on))
    return features


def _are_read_in_place(maps: Sequence[Any], *rest: Any) -> bool:
    """Whether kernels take this list as it is: maps of one dtype that are channels-last in memory."""
    if not maps or isinstance(maps[0], (list, tuple)):
        return False
    _check(maps, *rest)
    return served_by_triton(maps[0]) and all(
        feature.dtype == maps[0].dtype and feature.permute(0, 1, 3, 4, 2).is_contiguous() for feature in maps
    )


def _check(
    feature_maps: Sequence[Tensor],
    spatial_shape: Tensor | None,
    scale_start_index: Tensor | None,
    sampling_location: Tensor,
    weights: Tensor,
) -> tuple[Any, ...]:
    if spatial_shape is None or scale_start_index is None:
        check_groups([feature_maps])
        batch, cameras, channels = feature_maps[0].shape[:3]
        levels = len(feature_maps)
    else:
        batch, _, channels = require_shape("feature_maps", feature_maps[0], "B S C")
        cameras, levels, _ = require_shape("spatial_shape", spatial_shape, "N L 2")
        require_shape("scale_start_index", scale_start_index, "N L", N=cameras, L=levels)
    _check_points(sampling_location, weights, batch, cameras, levels, channels)
    require_same_device(
        feature_maps=feature_maps[0],
        spatial_shape=spatial_shape,
        scale_start_index=scale_start_index,
        sampling_location=sampling_location,
        weights=weights,
    )
    return feature_maps, spatial_shape, scale_start_index, sampling_location, weights


def _check_points(
    sampling_location: Tensor, weights: Tensor, batch: int, cameras: int, levels: int, channels: int
) -> None:
    require_floating("sampling_location", sampling_location)
    require_floating("weights", weights)
    _, anchors, points, _, _ = require_shape("sampling_location", sampling_location, "B A K N 2", B=batch, N=cameras)
    known = {"B": batch, "A": anchors, "K": points, "N": cameras, "L": levels}
    *_, groups = require_shape("weights", weights, "B A K N L G", **known)
    if groups == 0 or channels % groups:
        raise ValueError(f"weights: expected groups (last axis) that divide C={channels} of feature_maps, got {groups}")


def _check_maps(
    *,
    feature_maps: Sequence[Tensor],
    spatial_shape: Tensor | None,
    scale_start_index: Tensor | None,
    weights: Tensor,
    **_: Any,
) -> None:
    """Raise ``ValueError`` naming the first map that reaches outside the rows of ``feature_maps``."""
    if spatial_shape is None or scale_start_index is None or not (feature_maps[0].numel() and weights.numel()):
        return
    height, width = spatial_shape.long().unbind(-1)
    start = scale_start_index.long()
    pixels = feature_maps[0].shape[1]
    # Sides first: the area of a map with absurd ones overflows.
    outside = (start < 0) | (start > pixels) | (height > pixels) | (width > pixels) | (start + height * width > pixels)
    outside &= (height > 0) & (width > 0)
    if outside.any():
        camera, level = outside.nonzero()[0].tolist()
        raise ValueError(
            f"scale_start_index: expected maps within the {pixels} rows of feature_maps, got a map of "
            f"{height[camera, level]} x {width[camera, level]} pixels at row {start[camera, level]} "
            f"(camera {camera}, level {level})"
        )


def _fake(*, feature_maps: Sequence[Tensor], weights: Tensor, **_: Any) -> Tensor:
    first = feature_maps[0]  # (B, S, C) or (B, N, C, H, W)
    return first.new_empty(first.shape[0], weights.shape[1], first.shape[2])


def _fake_gradients(
    *,
    feature_maps: Sequence[Tensor],
    spatial_shape: Tensor | None,
    sampling_location: Tensor,
    weights: Tensor,
    needed: list[bool],
    **_: Any,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    *of_points, of_features = needed
    of_location, of_weights = room_for_gradients((sampling_location, weights), of_points, torch.contiguous_format)
    rows = as_rows(feature_maps) if spatial_shape is None else feature_maps
    grad_rows = room_for_gradients(rows, [of_features] * len(rows), torch.contiguous_format)
    is_list = spatial_shape is None and of_features
    return of_location, of_weights, as_maps(grad_rows, feature_maps) if is_list else [*grad_rows]


_LAUNCH = "saccade.deformable_aggregation.launch:prepare_aggregation"

DEFORMABLE_AGGREGATION = Operator(
    "deformable_aggregation(Tensor[] feature_maps, Tensor? spatial_shape, Tensor? scale_start_index, "
    "Tensor sampling_location, Tensor weights) -> Tensor",
    check=_check,
    faults=_check_maps,
    fake=_fake,
    reference=reference.deformable_aggregation,
    kernels=_LAUNCH,
    nonempty=("feature_maps", "weights"),
    gradient=Backward(
        of=("sampling_location", "weights", "feature_maps"),
        fake=_fake_gradients,
        reference=reference.deformable_aggregation_backward,
        kernels=f"{_LAUNCH}_backward",
    ),
)
