"""The public functions: ``draw_heatmap`` and ``draw_heatmap_batched``."""

from typing import Any

import torch
from torch import Tensor

from saccade.argument_checks import (
    InvalidStateError,
    require_integer,
    require_number,
    require_same_device,
    require_shape,
    require_tensor,
)
from saccade.debug import debug_checks_enabled
from saccade.gaussian_heatmap import reference
from saccade.registration import register, register_in_place


def draw_heatmap(
    heatmaps: Tensor,
    centers: Tensor,
    radii: Tensor,
    heatmap_idxes: Tensor,
    diameter_to_sigma_factor: float = 6.0,
    k_scale: float = 1.0,
) -> None:
    """Draw Gaussians into maps, in place: each cell keeps the maximum of what it held and all that is drawn there.

    A target of radius r is a square window of 2r + 1 cells around its centre, cut to the map; the cell at offset
    (i, j) gets ``k_scale * exp(-(i**2 + j**2) / (2 * sigma**2))`` with ``sigma = (2r + 1) / diameter_to_sigma_factor``.
    The centre is exactly ``k_scale``. Maps are not cleared first, and neither the order of the targets nor that of two
    calls matters: results are equal bit for bit.

    Letters: M targets, H map height, W map width.

    Args:
        heatmaps: (maps, H, W) float32 or float64, contiguous; written to. (Half precision would round neighbours of a
            peak to 1, which losses take for further peaks.)
        centers: (M, 2) int32 or int64, (x, y) = (column, row). May lie off the map: what reaches into it is drawn.
        radii: (M,) int32 or int64. 0 draws the centre alone, a negative radius nothing.
        heatmap_idxes: (M,) int32 or int64, the map of each target.
        diameter_to_sigma_factor: Greater than 0.
        k_scale: Height of the peaks.

    Raises:
        TypeError: An argument is no tensor, or not of a dtype as said above.
        ValueError: Shapes or devices disagree, maps are not contiguous, or a number is out of range. On the CPU also a
            map that does not exist; on a GPU such a target is skipped, unless ``saccade.debug_checks`` is on.
        InvalidStateError: (a ``RuntimeError`` and ``ValueError``) the maps require grad.

    The targets of CornerNet (Law and Deng, 2018, https://arxiv.org/abs/1808.01244) and CenterNet (Zhou et al., 2019,
    https://arxiv.org/abs/1904.07850).

    Example:
        >>> import torch, saccade
        >>> heatmaps = torch.zeros(1, 3, 4)
        >>> saccade.draw_heatmap(heatmaps, torch.tensor([[0, 1]]), torch.tensor([1]), torch.tensor([0]))
        >>> heatmaps
        tensor([[[0.1353, 0.0183, 0.0000, 0.0000],
                 [1.0000, 0.1353, 0.0000, 0.0000],
                 [0.1353, 0.0183, 0.0000, 0.0000]]])
    """
    _require_heatmap("heatmaps", heatmaps)
    require_integer("centers", centers)
    require_integer("radii", radii)
    require_integer("heatmap_idxes", heatmap_idxes)
    require_shape("heatmaps", heatmaps, "maps H W")
    targets, _ = require_shape("centers", centers, "M 2")
    require_shape("radii", radii, "M", M=targets)
    require_shape("heatmap_idxes", heatmap_idxes, "M", M=targets)
    require_same_device(heatmaps=heatmaps, centers=centers, radii=radii, heatmap_idxes=heatmap_idxes)
    diameter_to_sigma_factor = require_number("diameter_to_sigma_factor", diameter_to_sigma_factor, above=0)
    k_scale = _require_k_scale(k_scale, heatmaps)
    torch.ops.saccade.draw_heatmap(heatmaps, centers, radii, heatmap_idxes, diameter_to_sigma_factor, k_scale)


def draw_heatmap_batched(
    heatmap: Tensor,
    centers: Any,
    radii: Any,
    diameter_to_sigma_factor: float = 6.0,
    k_scale: float = 1.0,
    labels: Any = None,
    *,
    counts: Tensor | None = None,
) -> None:
    """Draw the targets of each sample of a batch into its map, or with labels into the map of their class, in place.

    What is drawn is said at ``draw_heatmap``. Padding is never looked at, whatever it holds.

    Letters: B batch, M slots for targets of a sample, C classes, H map height, W map width.

    Args:
        heatmap: (B, H, W), or (B, C, H, W) with ``labels``; float32 or float64, contiguous; written to.
        centers: (B, M, 2) int32 or int64, (x, y) = (column, row). A ``RaggedBatch``, or any object with ``tensor`` and
            ``sample_sizes``, whose sizes say how many of the M slots hold a target; or that tensor, with ``counts``.
        radii: (B, M) int32 or int64, likewise. Sizes of its own are ignored.
        diameter_to_sigma_factor: Greater than 0.
        k_scale: Height of the peaks.
        labels: (B, M) int32 or int64 class of each target, likewise. Sizes of its own are ignored.
        counts: (B,) number of targets of each sample, of an integer dtype, where ``centers`` is a tensor. Counts
            outside [0, M] are taken for the nearer of the two.

    Raises:
        TypeError: An argument is neither a tensor nor a ragged batch, or not of a dtype as said above.
        ValueError: Shapes or devices disagree, the map is not contiguous, a number is out of range, ``counts`` is
            missing or superfluous, or a ragged batch has several batch dimensions or another non-uniform dimension
            than 1. On the CPU also a label outside [0, C); on a GPU such a target is skipped, unless
            ``saccade.debug_checks`` is on.
        InvalidStateError: (a ``RuntimeError`` and ``ValueError``) the map requires grad.

    Example:
        >>> import torch, saccade
        >>> centers = saccade.ragged.combine_data([torch.tensor([[1, 0], [3, 0]]), torch.tensor([[0, 0]])])
        >>> radii = saccade.ragged.combine_data([torch.tensor([0, 1]), torch.tensor([1])], centers)
        >>> heatmap = torch.zeros(2, 1, 5)
        >>> saccade.draw_heatmap_batched(heatmap, centers, radii)
        >>> heatmap
        tensor([[[0.0000, 1.0000, 0.1353, 1.0000, 0.1353]],
                [[1.0000, 0.1353, 0.0000, 0.0000, 0.0000]]])
    """
    _require_heatmap("heatmap", heatmap)
    sizes = _sample_sizes(centers, counts)
    centers, radii = _padded("centers", centers), _padded("radii", radii)
    if labels is not None:
        labels = _padded("labels", labels)
    if heatmap.dim() == 3 and labels is not None:
        raise ValueError(f"heatmap: expected shape (B, C, H, W) with labels, got {tuple(heatmap.shape)}; omit labels")
    if heatmap.dim() == 4 and labels is None:
        raise ValueError(f"heatmap: expected shape (B, H, W) without labels, got {tuple(heatmap.shape)}; pass labels")
    batch, *_ = require_shape("heatmap", heatmap, "B H W" if labels is None else "B C H W")
    _, slots, _ = require_shape("centers", centers, "B M 2", B=batch)
    require_shape("radii", radii, "B M", B=batch, M=slots)
    require_shape("counts", sizes, "B", B=batch)
    if labels is not None:
        require_shape("labels", labels, "B M", B=batch, M=slots)
    require_same_device(heatmap=heatmap, centers=centers, radii=radii, counts=sizes, labels=labels)
    diameter_to_sigma_factor = require_number("diameter_to_sigma_factor", diameter_to_sigma_factor, above=0)
    k_scale = _require_k_scale(k_scale, heatmap)
    torch.ops.saccade.draw_heatmap_batched(heatmap, centers, radii, sizes, labels, diameter_to_sigma_factor, k_scale)


def _require_heatmap(name: str, heatmap: Any) -> None:
    require_tensor(name, heatmap)
    if heatmap.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: expected float32 or float64 (draw in float32 and convert), got {heatmap.dtype}")
    if heatmap.requires_grad:
        raise InvalidStateError(f"{name}: expected a tensor that does not require grad, as it is written in place")
    if not heatmap.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {heatmap.stride()}")


def _require_k_scale(k_scale: Any, heatmap: Tensor) -> float:
    """Check the height of peaks: finite, also in the dtype of the map."""
    k_scale = require_number("k_scale", k_scale)
    if abs(k_scale) > torch.finfo(heatmap.dtype).max:
        raise ValueError(f"k_scale: expected a finite number in {heatmap.dtype}, got {k_scale}")
    return k_scale


def _is_ragged(value: Any) -> bool:
    return hasattr(value, "tensor") and hasattr(value, "sample_sizes")


def _sample_sizes(centers: Any, counts: Any) -> Tensor:
    """How many targets each sample has, from a ragged batch of centers or from ``counts``."""
    if _is_ragged(centers):
        if counts is not None:
            raise ValueError("counts: expected None with ragged centers, which have sample_sizes, got some")
        name, counts = "centers.sample_sizes", centers.sample_sizes
    elif counts is None:
        raise ValueError("counts: expected the number of targets of each sample with a tensor of centers, got None")
    else:
        name = "counts"
    require_tensor(name, counts)
    if counts.dtype == torch.bool or counts.is_floating_point() or counts.is_complex():
        raise TypeError(f"{name}: expected an integer dtype, got {counts.dtype}")
    return counts


def _padded(name: str, value: Any) -> Tensor:
    """The integer tensor of a ragged batch, or the integer tensor itself."""
    if _is_ragged(value):
        dims = getattr(value, "num_batch_dims", 1), getattr(value, "non_uniform_dim", 1)
        if dims != (1, 1):
            raise ValueError(f"{name}: expected num_batch_dims 1 and non_uniform_dim 1, got {dims[0]} and {dims[1]}")
        value = value.tensor
    elif not isinstance(value, Tensor):
        raise TypeError(
            f"{name}: expected a torch.Tensor, or an object with tensor and sample_sizes, got {type(value).__name__}"
        )
    require_integer(name, value)
    return value


def _check_maps(name: str, index: Tensor, drawn: Tensor, maps: int) -> None:
    """Raise ``ValueError`` naming the first target that is drawn into a map that does not exist."""
    outside = drawn & ((index < 0) | (index >= maps))
    if outside.any():
        first = tuple(outside.nonzero()[0].tolist())
        raise ValueError(f"{name}: expected values in [0, {maps}), got {index[first]} at {list(first)}")


def _draw(
    heatmaps: Tensor,
    centers: Tensor,
    radii: Tensor,
    heatmap_idxes: Tensor,
    diameter_to_sigma_factor: float,
    k_scale: float,
) -> None:
    if heatmaps.numel() == 0 or radii.numel() == 0:
        return
    if heatmaps.device.type == "cpu" or debug_checks_enabled():
        _check_maps("heatmap_idxes", heatmap_idxes, radii >= 0, heatmaps.shape[0])
    reference.draw_heatmap(heatmaps, centers, radii, heatmap_idxes, diameter_to_sigma_factor, k_scale)


def _draw_fake(
    heatmaps: Tensor,
    centers: Tensor,
    radii: Tensor,
    heatmap_idxes: Tensor,
    diameter_to_sigma_factor: float,
    k_scale: float,
) -> None:
    return None


def _draw_batched(
    heatmap: Tensor,
    centers: Tensor,
    radii: Tensor,
    counts: Tensor,
    labels: Tensor | None,
    diameter_to_sigma_factor: float,
    k_scale: float,
) -> None:
    if heatmap.numel() == 0 or radii.numel() == 0:
        return
    if labels is not None and (heatmap.device.type == "cpu" or debug_checks_enabled()):
        drawn = reference.valid_slots(counts, radii.shape[1]) & (radii >= 0)
        _check_maps("labels", labels, drawn, heatmap.shape[1])
    reference.draw_heatmap_batched(heatmap, centers, radii, counts, labels, diameter_to_sigma_factor, k_scale)


def _draw_batched_fake(
    heatmap: Tensor,
    centers: Tensor,
    radii: Tensor,
    counts: Tensor,
    labels: Tensor | None,
    diameter_to_sigma_factor: float,
    k_scale: float,
) -> None:
    return None


register(
    "draw_heatmap(Tensor(a!) heatmaps, Tensor centers, Tensor radii, Tensor heatmap_idxes, "
    "float diameter_to_sigma_factor, float k_scale) -> ()",
    _draw,
    _draw_fake,
)
register(
    "draw_heatmap_batched(Tensor(a!) heatmap, Tensor centers, Tensor radii, Tensor counts, Tensor? labels, "
    "float diameter_to_sigma_factor, float k_scale) -> ()",
    _draw_batched,
    _draw_batched_fake,
)
register_in_place("draw_heatmap", 0)
register_in_place("draw_heatmap_batched", 0)
