"""The public function ``deformable_aggregation``."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from saccade.argument_checks import require_floating, require_integer, require_same_device, require_shape
from saccade.debug import debug_checks_enabled
from saccade.deformable_aggregation import reference
from saccade.registration import below_autograd, register, register_autograd, register_backward


def deformable_aggregation(
    feature_maps: Tensor,
    spatial_shape: Tensor,
    scale_start_index: Tensor,
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
        feature_maps: (B, S, C) floating point, the pixels of all maps as rows; ``feature_maps_format`` makes it.
        spatial_shape: (N, L, 2) int32 or int64, (height, width) of each map.
        scale_start_index: (N, L) int32 or int64, row along S at which each map begins; its pixels follow row by row.
        sampling_location: (B, A, K, N, 2) floating point, (x, y) in fractions of the image: 0 is the left or top edge,
            1 the right or bottom edge. One location serves all levels of a camera.
        weights: (B, A, K, N, L, G) floating point, used as they are (no softmax).

    Returns:
        (B, A, C) in the dtype of ``feature_maps``. Sums are taken in float32, or in float64 if an input is float64.
        Gradients flow to ``feature_maps``, ``sampling_location`` and ``weights``, each in its own dtype, and only those
        that are needed are computed; differentiating twice raises. Under autocast ``feature_maps`` is cast to the
        autocast dtype, locations and weights are left as they are.

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
    require_floating("feature_maps", feature_maps)
    require_integer("spatial_shape", spatial_shape)
    require_integer("scale_start_index", scale_start_index)
    require_floating("sampling_location", sampling_location)
    require_floating("weights", weights)
    batch, _, channels = require_shape("feature_maps", feature_maps, "B S C")
    cameras, levels, _ = require_shape("spatial_shape", spatial_shape, "N L 2")
    require_shape("scale_start_index", scale_start_index, "N L", N=cameras, L=levels)
    _, anchors, points, _, _ = require_shape("sampling_location", sampling_location, "B A K N 2", B=batch, N=cameras)
    known = {"B": batch, "A": anchors, "K": points, "N": cameras, "L": levels}
    *_, groups = require_shape("weights", weights, "B A K N L G", **known)
    if groups == 0 or channels % groups:
        raise ValueError(f"weights: expected groups (last axis) that divide C={channels} of feature_maps, got {groups}")
    require_same_device(
        feature_maps=feature_maps,
        spatial_shape=spatial_shape,
        scale_start_index=scale_start_index,
        sampling_location=sampling_location,
        weights=weights,
    )
    kind = feature_maps.device.type
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind) and feature_maps.dtype != torch.float64:
        feature_maps = feature_maps.to(torch.get_autocast_dtype(kind))
    return torch.ops.saccade.deformable_aggregation(
        feature_maps, spatial_shape, scale_start_index, sampling_location, weights
    )


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


class _DeformableAggregation(Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        with below_autograd():
            return torch.ops.saccade.deformable_aggregation(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        features, _, _, location, weights = needed = ctx.needs_input_grad
        gradients = torch.ops.saccade.deformable_aggregation_backward(
            grad_output, *ctx.saved_tensors, [features, location, weights]
        )
        features, location, weights = gradients
        gradients = (features, None, None, location, weights)
        return tuple(gradient if need else None for gradient, need in zip(gradients, needed, strict=True))


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
