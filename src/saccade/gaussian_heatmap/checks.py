"""Checks of the arguments of functions that draw heatmaps, and of the values of tensors where these may be read."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from saccade.argument_checks import (
    InvalidStateError,
    require_bool,
    require_constant,
    require_floating,
    require_integer,
    require_number,
    require_same_device,
    require_shape,
    require_tensor,
    require_whole,
)
from saccade.gaussian_heatmap import reference
from saccade.gaussian_heatmap.options import BoxOptions

_LARGEST = {dtype: torch.finfo(dtype).max for dtype in (torch.float32, torch.float64)}


def concatenated(
    heatmaps: Tensor,
    centers: Tensor,
    radii: Tensor,
    heatmap_idxes: Tensor,
    diameter_to_sigma_factor: float,
    k_scale: float,
    clear: bool,
) -> tuple[Any, ...]:
    """Check the arguments of ``draw_heatmap``."""
    _require_heatmap("heatmaps", heatmaps)
    require_integer("centers", centers)
    require_integer("radii", radii)
    require_integer("heatmap_idxes", heatmap_idxes)
    require_shape("heatmaps", heatmaps, "maps H W")
    targets, _ = require_shape("centers", centers, "M 2")
    require_shape("radii", radii, "M" if radii.ndim < 2 else "M 2", M=targets)
    require_shape("heatmap_idxes", heatmap_idxes, "M", M=targets)
    require_same_device(heatmaps=heatmaps, centers=centers, radii=radii, heatmap_idxes=heatmap_idxes)
    numbers = _peaks(diameter_to_sigma_factor, k_scale, heatmaps.dtype)
    require_bool("clear", clear)
    return heatmaps, centers, radii, heatmap_idxes, *numbers, clear


def batched(
    heatmap: Tensor,
    centers: Tensor,
    radii: Tensor,
    counts: Tensor,
    labels: Tensor | None,
    diameter_to_sigma_factor: float,
    k_scale: float,
    clear: bool,
) -> tuple[Any, ...]:
    """Check the arguments of ``draw_heatmap_batched``."""
    _require_heatmap("heatmap", heatmap)
    _require_axes(heatmap, labels)
    _require_targets(centers, radii, counts, labels, B=heatmap.shape[0])
    require_same_device(heatmap=heatmap, centers=centers)
    numbers = _peaks(diameter_to_sigma_factor, k_scale, heatmap.dtype)
    require_bool("clear", clear)
    return heatmap, centers, radii, counts, labels, *numbers, clear


def targets(
    centers: Tensor,
    radii: Tensor,
    counts: Tensor,
    labels: Tensor | None,
    size: Any,
    num_classes: int | None,
    diameter_to_sigma_factor: float,
    k_scale: float,
) -> tuple[Any, ...]:
    """Check the arguments of ``heatmap_targets``."""
    _require_targets(centers, radii, counts, labels)
    _require_size(size, labels, num_classes)
    numbers = _peaks(diameter_to_sigma_factor, k_scale, torch.float32)
    return centers, radii, counts, labels, size, num_classes, *numbers


def of_boxes(
    boxes: Tensor,
    counts: Tensor,
    labels: Tensor | None,
    size: Any,
    num_classes: int | None,
    diameter_to_sigma_factor: float,
    k_scale: float,
    options: BoxOptions,
) -> tuple[Any, ...]:
    """Check the arguments of ``boxes_to_heatmap``."""
    require_floating("boxes", boxes)
    require_constant("boxes", boxes)
    batch, slots, _ = require_shape("boxes", boxes, "B M 4")
    _require_labels_and_counts(labels, counts, batch, slots)
    require_same_device(boxes=boxes, labels=labels, counts=counts)
    _require_size(size, labels, num_classes)
    numbers = _peaks(diameter_to_sigma_factor, k_scale, torch.float32)
    return boxes, counts, labels, size, num_classes, *numbers, options.checked()


def _require_heatmap(name: str, heatmap: Any) -> None:
    require_tensor(name, heatmap)
    if heatmap.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: expected float32 or float64 (draw in float32 and convert), got {heatmap.dtype}")
    if heatmap.requires_grad:
        raise InvalidStateError(f"{name}: expected a tensor that does not require grad, as it is written in place")
    if not heatmap.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {heatmap.stride()}")


def _peaks(diameter_to_sigma_factor: Any, k_scale: Any, dtype: torch.dtype) -> tuple[float, float]:
    """Check the numbers that peaks are drawn with: the height is finite, also in the dtype of the map."""
    diameter_to_sigma_factor = require_number("diameter_to_sigma_factor", diameter_to_sigma_factor, above=0)
    k_scale = require_number("k_scale", k_scale)
    if abs(k_scale) > _LARGEST[dtype]:
        raise ValueError(f"k_scale: expected a finite number in {dtype}, got {k_scale}")
    return diameter_to_sigma_factor, k_scale


def _require_axes(heatmap: Tensor, labels: Tensor | None) -> None:
    axes = "B H W" if labels is None else "B C H W"
    if heatmap.ndim == (4 if labels is None else 3):
        expected = f"({axes.replace(' ', ', ')}) {'without' if labels is None else 'with'} labels"
        cure = "pass labels" if labels is None else "omit labels"
        raise ValueError(f"heatmap: expected shape {expected}, got {tuple(heatmap.shape)}; {cure}")
    require_shape("heatmap", heatmap, axes)


def _require_targets(
    centers: Tensor,
    radii: Tensor,
    counts: Tensor,
    labels: Tensor | None,
    **of_map: int,  # B, if there is a map
) -> None:
    """Check dtypes, shapes and devices."""
    require_integer("centers", centers)
    require_integer("radii", radii)
    batch, slots, _ = require_shape("centers", centers, "B M 2", **of_map)
    require_shape("radii", radii, "B M" if radii.ndim < 3 else "B M 2", B=batch, M=slots)
    _require_labels_and_counts(labels, counts, batch, slots)
    require_same_device(centers=centers, radii=radii, counts=counts, labels=labels)


def _require_labels_and_counts(labels: Tensor | None, counts: Tensor, batch: int, slots: int) -> None:
    if labels is not None:
        require_integer("labels", labels)
        require_shape("labels", labels, "B M", B=batch, M=slots)
    require_shape("counts", counts, "B", B=batch)


def _require_size(size: Any, labels: Tensor | None, num_classes: Any) -> None:
    """Check the size of fresh maps, and the number of classes."""
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise TypeError(f"size: expected a pair (height, width), got {size!r}")
    if (num_classes is None) != (labels is None):
        expected = "None without labels" if labels is None else "the number of classes with labels"
        raise ValueError(f"num_classes: expected {expected}, got {num_classes}")
    for number in size:
        require_whole("size", number)
    if num_classes is not None:
        require_whole("num_classes", num_classes)


def with_sizes(name: str, value: Any, counts: Any) -> tuple[Tensor, Tensor]:
    """The padded tensor, and how many of the slots of each sample are used: of a ragged batch, or as ``counts`` say."""
    tensor = padded(name, value)
    if tensor is not value:
        if not hasattr(value, "sample_sizes"):
            raise _not_ragged(name, value)
        if counts is not None:
            raise ValueError(f"counts: expected None with ragged {name}, which have sample_sizes, got some")
        name, counts = f"{name}.sample_sizes", value.sample_sizes
    elif counts is None:
        raise ValueError(f"counts: expected the number of targets of each sample with a tensor of {name}, got None")
    else:
        name = "counts"
    require_tensor(name, counts)
    dtype = counts.dtype
    if dtype != torch.int32 and (dtype == torch.bool or dtype.is_floating_point or dtype.is_complex):
        raise TypeError(f"{name}: expected an integer dtype, got {dtype}")
    return tensor, counts


def padded(name: str, value: Any) -> Tensor:
    """The tensor of a ragged batch, whose sizes are not looked at, or the tensor itself."""
    if isinstance(value, Tensor):
        return value
    if not hasattr(value, "tensor"):
        raise _not_ragged(name, value)
    dims = getattr(value, "num_batch_dims", 1), getattr(value, "non_uniform_dim", 1)
    if dims != (1, 1):
        raise ValueError(f"{name}: expected num_batch_dims 1 and non_uniform_dim 1, got {dims[0]} and {dims[1]}")
    require_tensor(f"{name}.tensor", value.tensor)
    return value.tensor


def _not_ragged(name: str, value: Any) -> TypeError:
    return TypeError(
        f"{name}: expected a torch.Tensor, or an object with tensor and sample_sizes, got {type(value).__name__}"
    )


def values_of_concatenated(*, heatmaps: Tensor, radii: Tensor, heatmap_idxes: Tensor, **_: Any) -> None:
    """Raise for a target whose map does not exist."""
    if heatmaps.numel():
        _require_maps("heatmap_idxes", heatmap_idxes, _has_radius(radii, 1), heatmaps.shape[0])


def values_of_batched(*, heatmap: Tensor, radii: Tensor, counts: Tensor, labels: Tensor | None, **_: Any) -> None:
    """Raise for a target whose class does not exist."""
    _require_labels(heatmap.shape[1:], radii, counts, labels)


def values_of_targets(
    *, radii: Tensor, counts: Tensor, labels: Tensor | None, size: Any, num_classes: int | None, **_: Any
) -> None:
    """Raise for a target whose class does not exist."""
    _require_labels((num_classes, *size), radii, counts, labels)


def values_of_boxes(
    *,
    boxes: Tensor,
    counts: Tensor,
    labels: Tensor | None,
    size: Any,
    num_classes: int | None,
    options: BoxOptions,
    **_: Any,
) -> None:
    """Raise for a box that is drawn and whose class does not exist."""
    if labels is not None:
        radii = reference.targets_of_boxes(boxes, size, options)[1]
        _require_labels((num_classes, *size), radii, counts, labels)


def _require_labels(shape: Sequence[Any], radii: Tensor, counts: Tensor, labels: Tensor | None) -> None:
    """Raise for a target that is drawn and whose class does not exist; ``shape`` of the maps of a sample: (C, H, W)."""
    if labels is not None and 0 not in shape:
        drawn = reference.valid_slots(counts, radii.shape[1]) & _has_radius(radii, 2)
        _require_maps("labels", labels, drawn, shape[0])


def _has_radius(radii: Tensor, axes: int) -> Tensor:
    """Which targets have no negative radius; ``axes`` is the number of axes of targets."""
    return radii >= 0 if radii.dim() == axes else (radii >= 0).all(-1)


def _require_maps(name: str, index: Tensor, drawn: Tensor, maps: int) -> None:
    """Raise ``ValueError`` naming the first target that is drawn into a map that does not exist."""
    outside = drawn & ((index < 0) | (index >= maps))
    if outside.any():
        first = tuple(outside.nonzero()[0].tolist())
        raise ValueError(f"{name}: expected values in [0, {maps}), got {index[first]} at {list(first)}")
