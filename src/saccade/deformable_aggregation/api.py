"""The public function ``deformable_aggregation``."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from saccade.argument_checks import require_floating, require_integer, require_same_device, require_shape
from saccade.debug import debug_checks_enabled
from saccade.deformable_aggregation import reference
from saccade.deformable_aggregation.formatting import (
    cameras_of,
    check_groups,
    feature_maps_format,
    index_tensors,
    maps_of,
)
from saccade.registration import Gradient, register, register_autograd, register_backward
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
    if isinstance(feature_maps, (list, tuple)):
        return _aggregate_list(feature_maps, spatial_shape, scale_start_index, sampling_location, weights)
    return _aggregate_rows(feature_maps, spatial_shape, scale_start_index, sampling_location, weights)


def _aggregate_rows(
    feature_maps: Any, spatial_shape: Any, scale_start_index: Any, sampling_location: Tensor, weights: Tensor
) -> Tensor:
    require_floating("feature_maps", feature_maps)
    require_integer("spatial_shape", spatial_shape)
    require_integer("scale_start_index", scale_start_index)
    batch, _, channels = require_shape("feature_maps", feature_maps, "B S C")
    cameras, levels, _ = require_shape("spatial_shape", spatial_shape, "N L 2")
    require_shape("scale_start_index", scale_start_index, "N L", N=cameras, L=levels)
    _check_points(sampling_location, weights, batch, cameras, levels, channels)
    require_same_device(
        feature_maps=feature_maps,
        spatial_shape=spatial_shape,
        scale_start_index=scale_start_index,
        sampling_location=sampling_location,
        weights=weights,
    )
    return torch.ops.saccade.deformable_aggregation(
        _in_autocast_dtype(feature_maps), spatial_shape, scale_start_index, sampling_location, weights
    )


def _aggregate_list(
    feature_maps: Sequence[Any], spatial_shape: Any, scale_start_index: Any, sampling_location: Tensor, weights: Tensor
) -> Tensor:
    for name, index in (("spatial_shape", spatial_shape), ("scale_start_index", scale_start_index)):
        if index is not None:
            raise ValueError(f"{name}: expected None with a list of maps, got {type(index).__name__}")
    if not feature_maps or isinstance(feature_maps[0], (list, tuple)):
        rows, spatial_shape, scale_start_index = feature_maps_format(feature_maps)
        return _aggregate_rows(rows, spatial_shape, scale_start_index, sampling_location, weights)
    check_groups([feature_maps])
    batch, cameras, channels, _, _ = feature_maps[0].shape
    _check_points(sampling_location, weights, batch, cameras, len(feature_maps), channels)
    require_same_device(feature_maps=feature_maps[0], sampling_location=sampling_location, weights=weights)
    in_place = served_by_triton(feature_maps[0]) and all(
        feature.dtype == feature_maps[0].dtype and feature.permute(0, 1, 3, 4, 2).is_contiguous()
        for feature in feature_maps
    )
    if not in_place:
        rows, spatial_shape, scale_start_index = feature_maps_format(feature_maps)
        return _aggregate_rows(rows, spatial_shape, scale_start_index, sampling_location, weights)
    return torch.ops.saccade.deformable_aggregation_maps(
        sampling_location, weights, [_in_autocast_dtype(feature) for feature in feature_maps]
    )


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


def _in_autocast_dtype(features: Tensor) -> Tensor:
    kind = features.device.type
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind) and features.dtype != torch.float64:
        return features.to(torch.get_autocast_dtype(kind))
    return features


def _check_maps(feature_maps: Tensor, spatial_shape: Tensor, scale_start_index: Tensor) -> None:
    """Raise ``ValueError`` naming the first map that reaches outside the rows of ``feature_maps``."""
    height, width = spatial_shape.long().unbind(-1)
    start = scale_start_index.long()
    pixels = feature_maps.shape[1]
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


def _gradients(
    inputs: tuple[Tensor, Tensor, Tensor], needed: list[bool], make: Callable[[Tensor, Any], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the gradients of features, locations and weights; an empty tensor for one that is not needed."""
    features, location, weights = (
        make(tensor, tensor.shape if need else 0) for tensor, need in zip(inputs, needed, strict=True)
    )
    return features, location, weights


def _is_empty(feature_maps: Tensor, weights: Tensor) -> bool:
    return feature_maps.numel() == 0 or weights.numel() == 0


def _forward(
    feature_maps: Tensor, spatial_shape: Tensor, scale_start_index: Tensor, sampling_location: Tensor, weights: Tensor
) -> Tensor:
    if _is_empty(feature_maps, weights):
        return feature_maps.new_zeros(feature_maps.shape[0], weights.shape[1], feature_maps.shape[2])
    if feature_maps.device.type == "cpu" or debug_checks_enabled():
        _check_maps(feature_maps, spatial_shape, scale_start_index)
    if served_by_triton(feature_maps):
        from saccade.deformable_aggregation import kernels

        return kernels.deformable_aggregation(
            [feature_maps], spatial_shape, scale_start_index, sampling_location, weights
        )
    return reference.deformable_aggregation(feature_maps, spatial_shape, scale_start_index, sampling_location, weights)


def _forward_fake(
    feature_maps: Tensor, spatial_shape: Tensor, scale_start_index: Tensor, sampling_location: Tensor, weights: Tensor
) -> Tensor:
    return feature_maps.new_empty(feature_maps.shape[0], weights.shape[1], feature_maps.shape[2])


def _backward(
    grad_output: Tensor,
    feature_maps: Tensor,
    spatial_shape: Tensor,
    scale_start_index: Tensor,
    sampling_location: Tensor,
    weights: Tensor,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    if _is_empty(feature_maps, weights):
        inputs = (feature_maps, sampling_location, weights)
        return _gradients(inputs, needed, Tensor.new_zeros)
    if served_by_triton(feature_maps):
        from saccade.deformable_aggregation import backward_kernels

        (grad_features,), grad_location, grad_weights = backward_kernels.deformable_aggregation_backward(
            grad_output, [feature_maps], spatial_shape, scale_start_index, sampling_location, weights, needed
        )
        return grad_features, grad_location, grad_weights
    return reference.deformable_aggregation_backward(
        grad_output, feature_maps, spatial_shape, scale_start_index, sampling_location, weights, needed
    )


def _backward_fake(
    grad_output: Tensor,
    feature_maps: Tensor,
    spatial_shape: Tensor,
    scale_start_index: Tensor,
    sampling_location: Tensor,
    weights: Tensor,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients((feature_maps, sampling_location, weights), needed, Tensor.new_empty)


class _DeformableAggregation(Gradient):
    @staticmethod
    def save(ctx: Any, args: tuple[Tensor, ...], result: Tensor) -> None:
        ctx.save_for_backward(*args)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        features, _, _, location, weights = needed = ctx.needs_input_grad
        gradients = torch.ops.saccade.deformable_aggregation_backward(
            grad_output, *ctx.saved_tensors, [features, location, weights]
        )
        features, location, weights = gradients
        gradients = (features, None, None, location, weights)
        return tuple(gradient if need else None for gradient, need in zip(gradients, needed, strict=True))


def _levels_as_rows(feature_maps: Sequence[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
    """Of each map (B, N, C, H, W) its pixels as rows (B, N * H * W, C), a view if it is channels-last; and indices."""
    rows = [feature.permute(0, 1, 3, 4, 2).flatten(1, 3) for feature in feature_maps]
    cameras = cameras_of(len(feature_maps), feature_maps)
    return rows, *index_tensors(cameras, feature_maps[0], by_level=True)


def _as_maps(rows: Sequence[Tensor], feature_maps: Sequence[Tensor]) -> list[Tensor]:
    """Views (B, N, C, H, W), channels-last in memory, of (B, N * H * W, C)."""
    return [
        r.unflatten(1, (feature.shape[1], *feature.shape[3:])).permute(0, 1, 4, 2, 3)
        for r, feature in zip(rows, feature_maps, strict=True)
    ]


def _forward_maps(sampling_location: Tensor, weights: Tensor, feature_maps: Sequence[Tensor]) -> Tensor:
    output = _forward_maps_fake(sampling_location, weights, feature_maps)
    if output.numel() == 0 or weights.numel() == 0 or all(feature.numel() == 0 for feature in feature_maps):
        return output.zero_()
    if not served_by_triton(output):
        levels = len(feature_maps)
        rows = torch.ops.saccade.feature_maps_format(levels, feature_maps)
        indices = index_tensors(cameras_of(levels, feature_maps), rows)
        return reference.deformable_aggregation(rows, *indices, sampling_location, weights)
    from saccade.deformable_aggregation import kernels

    return kernels.deformable_aggregation(*_levels_as_rows(feature_maps), sampling_location, weights)


def _forward_maps_fake(sampling_location: Tensor, weights: Tensor, feature_maps: Sequence[Tensor]) -> Tensor:
    return feature_maps[0].new_empty(feature_maps[0].shape[0], weights.shape[1], feature_maps[0].shape[2])


def _backward_maps(
    grad_output: Tensor, sampling_location: Tensor, weights: Tensor, needed: list[bool], feature_maps: Sequence[Tensor]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    if grad_output.numel() == 0 or weights.numel() == 0 or all(feature.numel() == 0 for feature in feature_maps):
        gradients = _backward_maps_fake(grad_output, sampling_location, weights, needed, feature_maps)
        for gradient in (gradients[0], gradients[1], *gradients[2]):
            gradient.zero_()
        return gradients
    if not served_by_triton(grad_output):
        levels = len(feature_maps)
        cameras = cameras_of(levels, feature_maps)
        rows = torch.ops.saccade.feature_maps_format(levels, feature_maps)
        grad_rows, grad_location, grad_weights = reference.deformable_aggregation_backward(
            grad_output, rows, *index_tensors(cameras, rows), sampling_location, weights, needed
        )
        grad_maps = [grad_rows.new_empty(0) for _ in feature_maps]
        if needed[0]:
            (views,) = maps_of(grad_rows, cameras)
            grad_maps = [view.clone(memory_format=torch.preserve_format) for view in views]
        return grad_location, grad_weights, grad_maps
    from saccade.deformable_aggregation import backward_kernels

    grad_maps, grad_location, grad_weights = backward_kernels.deformable_aggregation_backward(
        grad_output, *_levels_as_rows(feature_maps), sampling_location, weights, needed
    )
    return grad_location, grad_weights, _as_maps(grad_maps, feature_maps) if needed[0] else grad_maps


def _backward_maps_fake(
    grad_output: Tensor, sampling_location: Tensor, weights: Tensor, needed: list[bool], feature_maps: Sequence[Tensor]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    grad_maps = [feature.new_empty(0) for feature in feature_maps]
    if needed[0]:
        batch, cameras, channels = feature_maps[0].shape[:3]
        sizes = [feature.shape[3:] for feature in feature_maps]
        rows = [feature_maps[0].new_empty(batch, cameras * h * w, channels) for h, w in sizes]
        grad_maps = _as_maps(rows, feature_maps)
    grad_location, grad_weights = (
        tensor.new_empty(tensor.shape if need else 0)
        for tensor, need in zip((sampling_location, weights), needed[1:], strict=True)
    )
    return grad_location, grad_weights, grad_maps


class _DeformableAggregationMaps(Gradient):
    @staticmethod
    def save(ctx: Any, args: tuple[Tensor, ...], result: Tensor) -> None:
        ctx.save_for_backward(*args)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        sampling_location, weights, *feature_maps = ctx.saved_tensors
        location_needed, weights_needed, *maps_needed = ctx.needs_input_grad
        grad_location, grad_weights, grad_maps = torch.ops.saccade.deformable_aggregation_maps_backward(
            grad_output,
            sampling_location,
            weights,
            [any(maps_needed), location_needed, weights_needed],
            feature_maps,
        )
        gradients = (grad_location, grad_weights, *grad_maps)
        return tuple(gradient if need else None for gradient, need in zip(gradients, ctx.needs_input_grad, strict=True))


register(
    "deformable_aggregation(Tensor feature_maps, Tensor spatial_shape, Tensor scale_start_index, "
    "Tensor sampling_location, Tensor weights) -> Tensor",
    _forward,
    _forward_fake,
)
register(
    "deformable_aggregation_backward(Tensor grad_output, Tensor feature_maps, Tensor spatial_shape, "
    "Tensor scale_start_index, Tensor sampling_location, Tensor weights, bool[3] needed) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
register_autograd("deformable_aggregation", _DeformableAggregation)
register_backward("deformable_aggregation_backward")
register(
    "deformable_aggregation_maps(Tensor sampling_location, Tensor weights, Tensor[] feature_maps) -> Tensor",
    _forward_maps,
    _forward_maps_fake,
)
register(
    "deformable_aggregation_maps_backward(Tensor grad_output, Tensor sampling_location, Tensor weights, "
    "bool[3] needed, Tensor[] feature_maps) -> (Tensor, Tensor, Tensor[])",
    _backward_maps,
    _backward_maps_fake,
)
register_autograd("deformable_aggregation_maps", _DeformableAggregationMaps)
register_backward("deformable_aggregation_maps_backward")
