"""Deformable aggregation in plain PyTorch: the meaning of the operator, its CPU path and the oracle of its kernels.

Every visible point touches four pixels on each level. So the whole operator is one weighted sum of feature rows, and
its gradients are that sum turned around: ``_Samples`` says which rows with which coefficients, the rest adds them up.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.deformable_aggregation.formatting import (
    FEATURE_MAPS_FORMAT,
    as_maps,
    as_rows,
    cameras_of,
    index_tensors,
    maps_of,
)
from saccade.precision import compute_dtype


class _Samples(NamedTuple):
    """The corners that the M considered points of one sample touch, row by row from the top left."""

    anchor: Tensor  # (M,) int64
    point: tuple[Tensor, ...]  # index of the M points into (A, K, N)
    size: Tensor  # (M, L, 2) map height and width
    row: Tensor  # (M, L, 4) int64 feature row of each corner; S where `inside` is False
    inside: Tensor  # (M, L, 4) bool: the point is visible and the corner lies in its map and in the features
    share: Tensor  # (M, L, 2) how far the point lies beyond the top left corner, (x, y) in [0, 1)
    bilinear: Tensor  # (M, L, 4)


def _every_index(tensor: Tensor) -> tuple[Tensor, ...]:
    """The index of every element, as ``tensor.nonzero(as_tuple=True)`` gives it for the nonzero ones."""
    axes = [torch.arange(size, device=tensor.device) for size in tensor.shape]
    return tuple(index.flatten() for index in torch.meshgrid(*axes, indexing="ij"))


def _samples(pixels: int, spatial_shape: Tensor, scale_start_index: Tensor, location: Tensor) -> _Samples:
    """Samples of one batch element.

    Args:
        pixels: Number of feature rows, S.
        spatial_shape: (N, L, 2) int64.
        scale_start_index: (N, L) int64.
        location: (A, K, N, 2) in the compute dtype.
    """
    visible = ((location > 0) & (location < 1)).all(-1)  # false for NaN
    # On a GPU the host does not know how many points are visible: consider all, invisible ones with no corner inside.
    point = _every_index(visible) if location.is_cuda else visible.nonzero(as_tuple=True)
    anchor, _, camera = point
    size = spatial_shape[camera]  # (M, L, 2)
    height, width = size.unbind(-1)
    xy = torch.where(visible[point][:, None], location[point], 0.5)  # (M, 2)
    position = xy[:, None] * size.flip(-1) - 0.5  # (M, L, 2) u, v
    floor = position.floor()
    share = position - floor
    column, row = floor.long().unbind(-1)
    columns = torch.stack([column, column + 1, column, column + 1], -1)  # (M, L, 4)
    rows = torch.stack([row, row, row + 1, row + 1], -1)
    flat = scale_start_index[camera][..., None] + rows * width[..., None] + columns
    inside = (columns >= 0) & (columns < width[..., None]) & (rows >= 0) & (rows < height[..., None])
    inside &= (flat >= 0) & (flat < pixels) & visible[point][:, None, None]
    du, dv = share.unbind(-1)
    bilinear = torch.stack([(1 - dv) * (1 - du), (1 - dv) * du, dv * (1 - du), dv * du], -1)
    return _Samples(anchor, point, size, torch.where(inside, flat, pixels), inside, share, bilinear)


def _touched(samples: _Samples, features: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Features (S or S + 1, C), and the index into (M, L, 4) of the corners to read in rising order of anchors."""
    if features.is_cuda:  # as many corners as there may be; those that are not inside read a row of zeros
        return F.pad(features, (0, 0, 0, 1)), _every_index(samples.inside)
    return features, samples.inside.nonzero(as_tuple=True)


def _coefficients(samples: _Samples, weights: Tensor, corner: tuple[Tensor, ...]) -> Tensor:
    """(E, G) factor of each corner's row: bilinear coefficient times weight. ``weights`` is (A, K, N, L, G)."""
    entry = (*(index[corner[0]] for index in samples.point), corner[1])
    product = samples.bilinear[corner][:, None] * weights[entry].to(samples.bilinear.dtype)
    return torch.where(samples.inside[corner][:, None], product, 0)


def _as_rows(
    feature_maps: Sequence[Tensor], spatial_shape: Tensor | None, scale_start_index: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, S, C) rows, and where each map lies in them, (N, L, 2) and (N, L) int64."""
    if spatial_shape is None or scale_start_index is None:
        rows = FEATURE_MAPS_FORMAT(len(feature_maps), feature_maps)
        return rows, *index_tensors(cameras_of(len(feature_maps), feature_maps), rows)
    return feature_maps[0], spatial_shape.long(), scale_start_index.long()


def deformable_aggregation(
    feature_maps: Sequence[Tensor],  # one (B, S, C), or L of (B, N, C, H, W)
    spatial_shape: Tensor | None,  # (N, L, 2) with one
    scale_start_index: Tensor | None,  # (N, L) with one
    sampling_location: Tensor,  # (B, A, K, N, 2)
    weights: Tensor,  # (B, A, K, N, L, G)
) -> Tensor:  # (B, A, C)
    """See ``saccade.deformable_aggregation``."""
    rows, spatial_shape, scale_start_index = _as_rows(feature_maps, spatial_shape, scale_start_index)
    batch, pixels, channels = rows.shape
    anchors, groups = weights.shape[1], weights.shape[-1]
    dtype = compute_dtype(rows, sampling_location, weights)
    output = rows.new_zeros(batch, anchors, channels)
    if rows.numel() == 0 or weights.numel() == 0:
        return output
    for b in range(batch):
        samples = _samples(pixels, spatial_shape, scale_start_index, sampling_location[b].to(dtype))
        features, corner = _touched(samples, rows[b].to(dtype))
        coefficient = _coefficients(samples, weights[b], corner)
        # Corners come in rising order of anchors: each anchor is one bag of rows.
        first = torch.searchsorted(samples.anchor[corner[0]], torch.arange(anchors, device=weights.device))
        for g, block in enumerate(features.split(channels // groups, -1)):
            output[b, :, g * block.shape[1] : (g + 1) * block.shape[1]] = F.embedding_bag(
                samples.row[corner],
                block.contiguous(),
                first,
                mode="sum",
                per_sample_weights=coefficient[:, g].contiguous(),
            )
    return output


def deformable_aggregation_backward(
    grad_output: Tensor,  # (B, A, C)
    feature_maps: Sequence[Tensor],
    spatial_shape: Tensor | None,
    scale_start_index: Tensor | None,
    sampling_location: Tensor,
    weights: Tensor,
    needed: list[bool],  # locations, weights, features
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Gradients of locations, weights and each of the maps; an empty tensor for one that is not needed."""
    is_list = spatial_shape is None
    rows, spatial_shape, scale_start_index = _as_rows(feature_maps, spatial_shape, scale_start_index)
    _, pixels, channels = rows.shape
    groups = weights.shape[-1]
    dtype = compute_dtype(rows, sampling_location, weights)
    need_location, need_weights, need_features = needed
    grad_location, grad_weights, grad_rows = (
        tensor.new_zeros(tensor.shape if need else 0)
        for tensor, need in zip((sampling_location, weights, rows), needed, strict=True)
    )
    # Few enough rows at a time that they stay in a CPU's cache, or fill a GPU.
    chunk = max(1, (1 << 26 if rows.is_cuda else 1 << 21) // max(1, channels))
    for b in range(rows.shape[0] if rows.numel() and weights.numel() else 0):
        samples = _samples(pixels, spatial_shape, scale_start_index, sampling_location[b].to(dtype))
        features, corners = _touched(samples, rows[b].to(dtype))
        grad_sum = torch.zeros_like(features) if need_features else None
        product = features.new_zeros(*samples.inside.shape, groups)  # (M, L, 4, G) grad_output times corner, by group
        for corner in zip(*(index.split(chunk) for index in corners), strict=True):
            incoming = grad_output[b, samples.anchor[corner[0]]].to(dtype).unflatten(-1, (groups, -1))  # (E, G, C / G)
            row = samples.row[corner]
            if grad_sum is not None:
                coefficient = _coefficients(samples, weights[b], corner)
                grad_sum.index_add_(0, row, (incoming * coefficient[..., None]).flatten(1))
            if need_location or need_weights:
                dot = (incoming * features[row].unflatten(-1, (groups, -1))).sum(-1)
                product[corner] = torch.where(samples.inside[corner][:, None], dot, 0)
        if grad_sum is not None:
            grad_rows[b] = grad_sum[:pixels]
        if need_weights:
            grad_weights[b][samples.point] = (samples.bilinear[..., None] * product).sum(2).to(weights.dtype)
        if need_location:
            weight = torch.where(samples.inside.any(-1)[..., None], weights[b][samples.point].to(dtype), 0)  # (M, L, G)
            top_left, top_right, bottom_left, bottom_right = (product * weight[:, :, None]).sum(-1).unbind(-1)  # (M, L)
            du, dv = samples.share.unbind(-1)
            along_x = (1 - dv) * (top_right - top_left) + dv * (bottom_right - bottom_left)
            along_y = (1 - du) * (bottom_left - top_left) + du * (bottom_right - top_right)
            slope = (torch.stack([along_x, along_y], -1) * samples.size.flip(-1)).sum(1)  # (M, 2)
            grad_location[b][samples.point] = slope.to(sampling_location.dtype)
    if not (is_list and need_features):
        return grad_location, grad_weights, [grad_rows for _ in feature_maps]
    (views,) = maps_of(grad_rows, cameras_of(len(feature_maps), feature_maps))
    grad_maps = [view.contiguous() for view in as_rows(views)]
    return grad_location, grad_weights, as_maps(grad_maps, feature_maps)
