"""The public functions: ``draw_heatmap``, ``draw_heatmap_batched``, ``heatmap_targets`` and ``boxes_to_heatmap``."""

import math
from collections.abc import Callable
from typing import Any, Literal

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
)
from saccade.debug import debug_checks_enabled
from saccade.gaussian_heatmap import reference
from saccade.gaussian_heatmap.radius import require_overlap
from saccade.registration import DirectCall, register
from saccade.triton_dispatch import served_by_triton

_LARGEST = {dtype: torch.finfo(dtype).max for dtype in (torch.float32, torch.float64)}


def draw_heatmap(
    heatmaps: Tensor,
    centers: Tensor,
    radii: Tensor,
    heatmap_idxes: Tensor,
    diameter_to_sigma_factor: float = 6.0,
    k_scale: float = 1.0,
    *,
    clear: bool = False,
) -> None:
    """Draw Gaussians into maps, in place: each cell keeps the maximum of what it held and all that is drawn there.

    A target of radius r is a square window of 2r + 1 cells around its centre, cut to the map; the cell at offset
    (i, j) gets ``k_scale * exp(-(i**2 + j**2) / (2 * sigma**2))`` with ``sigma = (2r + 1) / diameter_to_sigma_factor``.
    The centre is exactly ``k_scale``. Maps are not cleared first, and neither the order of the targets nor that of two
    calls matters: results are equal bit for bit. With two radii a target is an ellipse in a rectangle: each axis has a
    sigma of its own, and the cell gets ``k_scale * exp(-(i / sigma_y)**2 / 2 - (j / sigma_x)**2 / 2)``.

    Letters: M targets, H map height, W map width.

    Args:
        heatmaps: (maps, H, W) float32 or float64, contiguous; written to. (Half precision would round neighbours of a
            peak to 1, which losses take for further peaks.)
        centers: (M, 2) int32 or int64, (x, y) = (column, row). May lie off the map: what reaches into it is drawn.
        radii: (M,) int32 or int64, or (M, 2) with one along x and one along y. 0 draws the centre alone, a negative
            radius nothing.
        heatmap_idxes: (M,) int32 or int64, the map of each target.
        diameter_to_sigma_factor: Greater than 0.
        k_scale: Height of the peaks.
        clear: Set all cells to 0 before drawing.

    Raises:
        TypeError: An argument is no tensor, or not of a dtype or type as said above.
        ValueError: Shapes or devices disagree, maps are not contiguous, or a number is out of range. On the CPU also a
            map that does not exist; on a GPU such a target is skipped, unless ``saccade.debug_checks`` is on.
        InvalidStateError: (a ``RuntimeError`` and ``ValueError``) the maps require grad.

    The targets of CornerNet (Law and Deng, 2018, https://arxiv.org/abs/1808.01244) and CenterNet (Zhou et al., 2019,
    https://arxiv.org/abs/1904.07850). Ellipses differ from those of mmdet3d, whose sigma is the integer
    ``(2r + 1) // 6``: 0 for a radius of up to 2, which puts NaN into the map.

    Example:
        >>> import torch, saccade
        >>> heatmaps = torch.zeros(1, 3, 4)
        >>> saccade.draw_heatmap(heatmaps, torch.tensor([[0, 1]]), torch.tensor([1]), torch.tensor([0]))
        >>> heatmaps
        tensor([[[0.1353, 0.0183, 0.0000, 0.0000],
                 [1.0000, 0.1353, 0.0000, 0.0000],
                 [0.1353, 0.0183, 0.0000, 0.0000]]])
    """
    tensors = heatmaps, centers, radii, heatmap_idxes
    others = diameter_to_sigma_factor, k_scale, clear, getattr(heatmaps, "requires_grad", False)
    draw = _call_draw.known(tensors, others)
    if draw is None:
        _require_concatenated(*tensors)
        diameter_to_sigma_factor = require_number("diameter_to_sigma_factor", diameter_to_sigma_factor, above=0)
        k_scale = _require_k_scale(k_scale, heatmaps.dtype)
        require_bool("clear", clear)
        draw = _call_draw.learn(tensors, others, (*tensors, diameter_to_sigma_factor, k_scale, clear))
    draw(*tensors, diameter_to_sigma_factor, k_scale, clear)


def draw_heatmap_batched(
    heatmap: Tensor,
    centers: Any,
    radii: Any,
    diameter_to_sigma_factor: float = 6.0,
    k_scale: float = 1.0,
    labels: Any = None,
    *,
    counts: Tensor | None = None,
    clear: bool = False,
) -> None:
    """Draw the targets of each sample of a batch into its map, or with labels into the map of their class, in place.

    What is drawn is said at ``draw_heatmap``. Padding is never looked at, whatever it holds.

    Letters: B batch, M slots for targets of a sample, C classes, H map height, W map width.

    Args:
        heatmap: (B, H, W), or (B, C, H, W) with ``labels``; float32 or float64, contiguous; written to.
        centers: (B, M, 2) int32 or int64, (x, y) = (column, row). A ``RaggedBatch``, or any object with ``tensor`` and
            ``sample_sizes``, whose sizes say how many of the M slots hold a target; or that tensor, with ``counts``.
        radii: (B, M) int32 or int64, or (B, M, 2) with one along x and one along y, likewise. Sizes of its own are
            ignored.
        diameter_to_sigma_factor: Greater than 0.
        k_scale: Height of the peaks.
        labels: (B, M) int32 or int64 class of each target, likewise. Sizes of its own are ignored.
        counts: (B,) number of targets of each sample, of an integer dtype, where ``centers`` is a tensor. Counts
            outside [0, M] are taken for the nearer of the two.
        clear: Set all cells to 0 before drawing.

    Raises:
        TypeError: An argument is neither a tensor nor a ragged batch, or not of a dtype or type as said above.
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
    centers, sizes = _with_sizes("centers", centers, counts)
    radii = _padded("radii", radii)
    if labels is None:
        tensors = heatmap, centers, radii, sizes
    else:
        labels = _padded("labels", labels)
        tensors = heatmap, centers, radii, sizes, labels
    others = labels is None, diameter_to_sigma_factor, k_scale, clear, getattr(heatmap, "requires_grad", False)
    draw = _call_draw_batched.known(tensors, others)
    if draw is None:
        _require_heatmap("heatmap", heatmap)
        if heatmap.ndim != (3 if labels is None else 4):
            _raise_for_axes(heatmap, labels)
        _require_targets(centers, radii, sizes, labels, heatmap.shape[0])
        require_same_device(heatmap=heatmap, centers=centers)
        diameter_to_sigma_factor = require_number("diameter_to_sigma_factor", diameter_to_sigma_factor, above=0)
        k_scale = _require_k_scale(k_scale, heatmap.dtype)
        require_bool("clear", clear)
        args = heatmap, centers, radii, sizes, labels, diameter_to_sigma_factor, k_scale, clear
        draw = _call_draw_batched.learn(tensors, others, args)
    draw(heatmap, centers, radii, sizes, labels, diameter_to_sigma_factor, k_scale, clear)


def heatmap_targets(
    centers: Any,
    radii: Any,
    size: tuple[int, int],
    *,
    labels: Any = None,
    num_classes: int | None = None,
    counts: Tensor | None = None,
    diameter_to_sigma_factor: float = 6.0,
    k_scale: float = 1.0,
) -> Tensor:
    """Maps of a batch of targets: ``draw_heatmap_batched`` into fresh ones that are 0 elsewhere.

    Letters: B batch, M slots for targets of a sample, C classes, H map height, W map width.

    Args:
        centers: (B, M, 2) int32 or int64, (x, y) = (column, row). A ``RaggedBatch``, or any object with ``tensor`` and
            ``sample_sizes``, whose sizes say how many of the M slots hold a target; or that tensor, with ``counts``.
        radii: (B, M) int32 or int64, or (B, M, 2) with one along x and one along y, likewise. Sizes of its own are
            ignored.
        size: (H, W) of the maps.
        labels: (B, M) int32 or int64 class of each target, likewise, with ``num_classes``. Sizes of its own are
            ignored.
        num_classes: C, with ``labels``.
        counts: (B,) number of targets of each sample, of an integer dtype, where ``centers`` is a tensor. Counts
            outside [0, M] are taken for the nearer of the two.
        diameter_to_sigma_factor: Greater than 0.
        k_scale: Height of the peaks.

    Returns:
        (B, H, W), or (B, C, H, W) with ``labels``; float32.

    Raises:
        TypeError: As ``draw_heatmap_batched``; or ``size`` or ``num_classes`` is not made of integers.
        ValueError: As ``draw_heatmap_batched``; or a negative size, or ``num_classes`` is missing or superfluous.

    Example:
        >>> import torch, saccade
        >>> centers = saccade.ragged.combine_data([torch.tensor([[1, 0], [3, 0]]), torch.tensor([[0, 0]])])
        >>> radii = saccade.ragged.combine_data([torch.tensor([0, 1]), torch.tensor([1])], centers)
        >>> saccade.heatmap_targets(centers, radii, (1, 5))
        tensor([[[0.0000, 1.0000, 0.1353, 1.0000, 0.1353]],
                [[1.0000, 0.1353, 0.0000, 0.0000, 0.0000]]])
    """
    centers, sizes = _with_sizes("centers", centers, counts)
    radii = _padded("radii", radii)
    if labels is not None:
        labels = _padded("labels", labels)
    tensors = (centers, radii, sizes) if labels is None else (centers, radii, sizes, labels)
    others = (*size, num_classes, diameter_to_sigma_factor, k_scale) if isinstance(size, (tuple, list)) else ()
    draw = _call_targets.known(tensors, others)
    if draw is None:
        _require_targets(centers, radii, sizes, labels, None)
        shape = _map_shape(centers.shape[0], size, labels, num_classes)
        diameter_to_sigma_factor = require_number("diameter_to_sigma_factor", diameter_to_sigma_factor, above=0)
        k_scale = _require_k_scale(k_scale, torch.float32)
        args = centers, radii, sizes, labels, shape, diameter_to_sigma_factor, k_scale
        draw = _call_targets.learn(tensors, others, args)
    else:
        shape = []  # it is known, too
    return draw(centers, radii, sizes, labels, shape, diameter_to_sigma_factor, k_scale)


def boxes_to_heatmap(
    boxes: Any,
    labels: Any,
    size: tuple[int, int],
    stride: float | tuple[float, float],
    min_overlap: float,
    radius: Literal["mmdet", "mmdet3d"],
    *,
    num_classes: int | None = None,
    counts: Tensor | None = None,
    min_radius: int = 0,
    box_format: Literal["xyxy", "cxcywh"] = "xyxy",
    origin: tuple[float, float] = (0.0, 0.0),
    diameter_to_sigma_factor: float = 6.0,
    k_scale: float = 1.0,
) -> Tensor:
    """Maps of the boxes of a batch: at the centre of each a Gaussian whose radius comes from the size of the box.

    A box is drawn as ``heatmap_targets`` draws a target with these numbers, computed in float64 on the device of the
    boxes, without waiting for it::

        center = int((box_center - origin) / stride)  # cut off towards zero
        radius = max(min_radius, int(gaussian_radius(box_size / stride, min_overlap, convention=radius)))

    Skipped are boxes whose width or height is not positive, and those whose center, so cut off, is not on the map.

    Letters: B batch, M slots for boxes of a sample, C classes, H map height, W map width.

    Args:
        boxes: (B, M, 4) floating point, in pixels or metres. A ``RaggedBatch``, or any object with ``tensor`` and
            ``sample_sizes``, whose sizes say how many of the M slots hold a box; or that tensor, with ``counts``.
        labels: (B, M) int32 or int64 class of each box, likewise, with ``num_classes``; or ``None`` for one map for
            all. Sizes of its own are ignored.
        size: (H, W) of the maps.
        stride: Size of a cell, in the unit of the boxes; a pair if it is another along x than along y, in this order.
        min_overlap: As in ``gaussian_radius``, in (0, 1].
        radius: Convention of ``gaussian_radius``.
        num_classes: C, with ``labels``.
        counts: (B,) number of boxes of each sample, of an integer dtype, where ``boxes`` is a tensor. Counts outside
            [0, M] are taken for the nearer of the two.
        min_radius: Smallest radius, in cells.
        box_format: ``"xyxy"``: two corners, the one with the smaller coordinates first; ``"cxcywh"``: centre, width
            (along x) and height (along y).
        origin: (x, y) of the corner of the map at cell 0, in the unit of the boxes.
        diameter_to_sigma_factor: Greater than 0.
        k_scale: Height of the peaks.

    Returns:
        (B, H, W), or (B, C, H, W) with ``labels``; float32.

    Raises:
        TypeError: An argument is neither a tensor nor a ragged batch, or not of a dtype or type as said above.
        ValueError: Shapes or devices disagree, a number is out of range, ``counts`` or ``num_classes`` is missing or
            superfluous, a ragged batch has several batch dimensions or another non-uniform dimension than 1, or
            ``boxes`` require grad. On the CPU also a label outside [0, C) of a box that is not skipped; on a GPU such
            a box is skipped, unless ``saccade.debug_checks`` is on.

    As mmdet's ``CenterNetHead`` draws its targets (``radius="mmdet"``, ``min_overlap=0.3``), and mmdet3d's
    ``CenterHead`` in bird's-eye view: there ``radius="mmdet3d"``, ``min_overlap=0.1``, ``min_radius=2``,
    ``box_format="cxcywh"`` with ``boxes[..., [0, 1, 3, 4]]``, ``origin`` the start of the point cloud's range and
    ``stride`` the size of a voxel times ``out_size_factor``. Both round to float32 in between, so that where a quotient
    is next to a whole number they may come to the cell beside, or to a radius less or more by one.

    Example:
        >>> import torch, saccade
        >>> boxes = torch.tensor([[[-8.0, -12.0, 24.0, 20.0], [12.0, 4.0, 20.0, 12.0]]])
        >>> saccade.boxes_to_heatmap(boxes, None, (3, 5), 4, 0.3, "mmdet", counts=torch.tensor([2]))
        tensor([[[0.0000, 0.0183, 0.1353, 0.0183, 0.0000],
                 [0.0000, 0.1353, 1.0000, 0.1353, 0.0000],
                 [0.0000, 0.0183, 0.1353, 0.0183, 1.0000]]])
    """
    boxes, sizes = _with_sizes("boxes", boxes, counts)
    require_floating("boxes", boxes)
    require_constant("boxes", boxes)
    batch, slots, _ = require_shape("boxes", boxes, "B M 4")
    if labels is not None:
        labels = _padded("labels", labels)
        require_integer("labels", labels)
        require_shape("labels", labels, "B M", B=batch, M=slots)
    require_shape("counts", sizes, "B", B=batch)
    require_same_device(boxes=boxes, labels=labels, counts=sizes)
    shape = _map_shape(batch, size, labels, num_classes)
    strides = _pair("stride", stride if isinstance(stride, (tuple, list)) else (stride, stride), above=0)
    min_overlap = require_overlap("radius", radius, min_overlap)
    _require_whole("min_radius", min_radius)
    if box_format not in ("xyxy", "cxcywh"):
        raise ValueError(f"box_format: expected 'xyxy' or 'cxcywh', got {box_format!r}")
    origin = _pair("origin", origin)
    diameter_to_sigma_factor = require_number("diameter_to_sigma_factor", diameter_to_sigma_factor, above=0)
    k_scale = _require_k_scale(k_scale, torch.float32)
    numbers = min_overlap, radius, min_radius, diameter_to_sigma_factor, k_scale
    return _call_boxes(boxes, sizes, labels, shape, box_format == "xyxy", origin, strides, *numbers)


def _require_heatmap(name: str, heatmap: Any) -> None:
    require_tensor(name, heatmap)
    if heatmap.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: expected float32 or float64 (draw in float32 and convert), got {heatmap.dtype}")
    if heatmap.requires_grad:
        raise InvalidStateError(f"{name}: expected a tensor that does not require grad, as it is written in place")
    if not heatmap.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {heatmap.stride()}")


def _require_concatenated(heatmaps: Tensor, centers: Tensor, radii: Tensor, heatmap_idxes: Tensor) -> None:
    _require_heatmap("heatmaps", heatmaps)
    require_integer("centers", centers)
    require_integer("radii", radii)
    require_integer("heatmap_idxes", heatmap_idxes)
    require_shape("heatmaps", heatmaps, "maps H W")
    targets, _ = require_shape("centers", centers, "M 2")
    require_shape("radii", radii, "M" if radii.ndim < 2 else "M 2", M=targets)
    require_shape("heatmap_idxes", heatmap_idxes, "M", M=targets)
    require_same_device(heatmaps=heatmaps, centers=centers, radii=radii, heatmap_idxes=heatmap_idxes)


def _require_k_scale(k_scale: Any, dtype: torch.dtype) -> float:
    """Check the height of peaks: finite, also in the dtype of the map."""
    k_scale = require_number("k_scale", k_scale)
    if abs(k_scale) > _LARGEST[dtype]:
        raise ValueError(f"k_scale: expected a finite number in {dtype}, got {k_scale}")
    return k_scale


def _raise_for_axes(heatmap: Tensor, labels: Tensor | None) -> None:
    axes = "B H W" if labels is None else "B C H W"
    if heatmap.ndim in (3, 4):
        expected = f"({axes.replace(' ', ', ')}) {'without' if labels is None else 'with'} labels"
        cure = "pass labels" if labels is None else "omit labels"
        raise ValueError(f"heatmap: expected shape {expected}, got {tuple(heatmap.shape)}; {cure}")
    require_shape("heatmap", heatmap, axes)


def _require_targets(
    centers: Tensor,
    radii: Tensor,
    sizes: Tensor,
    labels: Tensor | None,
    batch: int | None,  # that of the map, if there is one
) -> None:
    """Check dtypes, shapes and devices: each in the cheapest way, and once more for the message if it is wrong."""
    require_integer("centers", centers)
    require_integer("radii", radii)
    if labels is not None:
        require_integer("labels", labels)
    of_centers = centers.shape
    if len(of_centers) != 3 or of_centers[2] != 2 or (batch is not None and of_centers[0] != batch):
        require_shape("centers", centers, "B M 2", **({} if batch is None else {"B": batch}))
    slots, gpu = of_centers[:2], centers.get_device()
    letters = {"B": slots[0], "M": slots[1]}
    if radii.shape != slots and radii.shape != of_centers:
        require_shape("radii", radii, "B M" if radii.ndim < 3 else "B M 2", **letters)
    if labels is not None and labels.shape != slots:
        require_shape("labels", labels, "B M", **letters)
    if sizes.shape != slots[:1]:
        require_shape("counts", sizes, "B", B=slots[0])
    is_elsewhere = radii.get_device() != gpu or sizes.get_device() != gpu
    if gpu < 0 or is_elsewhere or (labels is not None and labels.get_device() != gpu):
        require_same_device(centers=centers, radii=radii, counts=sizes, labels=labels)


def _map_shape(batch: int, size: Any, labels: Tensor | None, num_classes: Any) -> list[int]:
    """Shape of fresh maps."""
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise TypeError(f"size: expected a pair (height, width), got {size!r}")
    if (num_classes is None) != (labels is None):
        expected = "None without labels" if labels is None else "the number of classes with labels"
        raise ValueError(f"num_classes: expected {expected}, got {num_classes}")
    for number in size:
        _require_whole("size", number)
    if num_classes is None:
        return [batch, *size]
    _require_whole("num_classes", num_classes)
    return [batch, num_classes, *size]


def _require_whole(name: str, value: Any) -> None:
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected int, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{name}: expected an int >= 0, got {value}")
    if value >= 2**63:
        raise ValueError(f"{name}: expected an int of 64 bits, got {value}")


def _pair(name: str, values: Any, above: float = -math.inf) -> tuple[float, float]:
    """Check two finite numbers, for x and y."""
    if not isinstance(values, (tuple, list)) or len(values) != 2:
        raise TypeError(f"{name}: expected a pair (x, y), got {values!r}")
    x, y = (float(require_number(f"{name}[{axis}]", value, above=above)) for axis, value in enumerate(values))
    return x, y


def _with_sizes(name: str, value: Any, counts: Any) -> tuple[Tensor, Tensor]:
    """The padded tensor, and how many of the slots of each sample are used: of a ragged batch, or as ``counts`` say."""
    padded = _padded(name, value)
    if padded is not value:
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
    return padded, counts


def _padded(name: str, value: Any) -> Tensor:
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


def _check_maps(name: str, index: Tensor, drawn: Tensor, maps: int) -> None:
    """Raise ``ValueError`` naming the first target that is drawn into a map that does not exist."""
    outside = drawn & ((index < 0) | (index >= maps))
    if outside.any():
        first = tuple(outside.nonzero()[0].tolist())
        raise ValueError(f"{name}: expected values in [0, {maps}), got {index[first]} at {list(first)}")


def _faults_raise(tensor: Tensor) -> bool:
    return not tensor.is_cuda or debug_checks_enabled()


def _drawn(radii: Tensor, axes: int) -> Tensor:
    """Which targets have no negative radius; ``axes`` is the number of axes of targets."""
    return radii >= 0 if radii.dim() == axes else (radii >= 0).all(-1)


def _check_labels(labels: Tensor, counts: Tensor, radii: Tensor, classes: int) -> None:
    _check_maps("labels", labels, reference.valid_slots(counts, radii.shape[1]) & _drawn(radii, 2), classes)


def _draw(
    heatmaps: Tensor,
    centers: Tensor,
    radii: Tensor,
    heatmap_idxes: Tensor,
    diameter_to_sigma_factor: float,
    k_scale: float,
    clear: bool,
) -> None:
    if heatmaps.numel() and _faults_raise(heatmaps):
        _check_maps("heatmap_idxes", heatmap_idxes, _drawn(radii, 1), heatmaps.shape[0])
    args = heatmaps, centers, radii, heatmap_idxes, diameter_to_sigma_factor, k_scale, clear
    _prepare_draw(*args)(*args)


def _prepare_draw(heatmaps: Tensor, centers: Tensor, radii: Tensor, *others: Any) -> Callable[..., None]:
    if heatmaps.numel() == 0 or radii.numel() == 0:
        return _draw_nothing
    if not served_by_triton(heatmaps):
        return reference.draw_heatmap
    from saccade.gaussian_heatmap import kernels

    return kernels.prepare_heatmap(heatmaps, centers, radii, *others)


def _draw_batched(
    heatmap: Tensor,
    centers: Tensor,
    radii: Tensor,
    counts: Tensor,
    labels: Tensor | None,
    diameter_to_sigma_factor: float,
    k_scale: float,
    clear: bool,
) -> None:
    if labels is not None and heatmap.numel() and _faults_raise(heatmap):
        _check_labels(labels, counts, radii, heatmap.shape[1])
    args = heatmap, centers, radii, counts, labels, diameter_to_sigma_factor, k_scale, clear
    _prepare_draw_batched(*args)(*args)


def _prepare_draw_batched(heatmap: Tensor, centers: Tensor, radii: Tensor, *others: Any) -> Callable[..., None]:
    if heatmap.numel() == 0 or radii.numel() == 0:
        return _draw_nothing
    if not served_by_triton(heatmap):
        return reference.draw_heatmap_batched
    from saccade.gaussian_heatmap import kernels

    return kernels.prepare_heatmap_batched(heatmap, centers, radii, *others)


def _draw_nothing(heatmap: Tensor, *others: Any) -> None:
    clear = others[-1]
    if clear:
        heatmap.zero_()


def _draw_fake(heatmaps: Tensor, *_: Any) -> None:
    return None


def _targets(
    centers: Tensor,
    radii: Tensor,
    counts: Tensor,
    labels: Tensor | None,
    shape: list[int],
    diameter_to_sigma_factor: float,
    k_scale: float,
) -> Tensor:
    heatmap = torch.empty(shape, dtype=torch.float32, device=centers.device)
    _draw_batched(heatmap, centers, radii, counts, labels, diameter_to_sigma_factor, k_scale, True)
    return heatmap


def _prepare_targets(
    centers: Tensor,
    radii: Tensor,
    counts: Tensor,
    labels: Tensor | None,
    shape: list[int],
    *numbers: float,
) -> Callable[..., Tensor]:
    of_maps = {"size": tuple(shape), "dtype": torch.float32, "device": centers.device}
    draw = _prepare_draw_batched(torch.empty(**of_maps), centers, radii, counts, labels, *numbers, True)

    def targets(centers: Tensor, radii: Tensor, counts: Tensor, labels: Tensor | None, *_: Any) -> Tensor:
        heatmap = torch.empty(**of_maps)
        draw(heatmap, centers, radii, counts, labels, *numbers, True)
        return heatmap

    return targets


def _targets_fake(
    centers: Tensor, radii: Tensor, counts: Tensor, labels: Tensor | None, shape: list[int], *_: Any
) -> Tensor:
    return centers.new_empty(shape, dtype=torch.float32)


def _boxes(
    boxes: Tensor,
    counts: Tensor,
    labels: Tensor | None,
    shape: list[int],
    corners: bool,
    origin: tuple[float, float],
    stride: tuple[float, float],
    min_overlap: float,
    convention: str,
    min_radius: int,
    diameter_to_sigma_factor: float,
    k_scale: float,
) -> Tensor:
    heatmap = torch.empty(shape, dtype=torch.float32, device=boxes.device)
    if heatmap.numel() == 0 or boxes.numel() == 0:
        return heatmap.zero_()
    of_boxes = corners, origin, stride, min_overlap, convention, min_radius
    numbers = diameter_to_sigma_factor, k_scale
    if not served_by_triton(boxes) or _faults_raise(boxes):
        centers, radii = reference.targets_of_boxes(boxes, (shape[-2], shape[-1]), *of_boxes)
        if labels is not None and _faults_raise(boxes):
            _check_labels(labels, counts, radii, shape[1])
        if not served_by_triton(boxes):
            reference.draw_heatmap_batched(heatmap, centers, radii, counts, labels, *numbers, True)
            return heatmap
    from saccade.gaussian_heatmap import kernels

    kernels.clear(heatmap)
    kernels.draw_boxes(heatmap, boxes, counts, labels, *of_boxes, *numbers)
    return heatmap


def _boxes_fake(boxes: Tensor, counts: Tensor, labels: Tensor | None, shape: list[int], *_: Any) -> Tensor:
    return boxes.new_empty(shape, dtype=torch.float32)


register(
    "draw_heatmap(Tensor(a!) heatmaps, Tensor centers, Tensor radii, Tensor heatmap_idxes, "
    "float diameter_to_sigma_factor, float k_scale, bool clear) -> ()",
    _draw,
    _draw_fake,
)
register(
    "draw_heatmap_batched(Tensor(a!) heatmap, Tensor centers, Tensor radii, Tensor counts, Tensor? labels, "
    "float diameter_to_sigma_factor, float k_scale, bool clear) -> ()",
    _draw_batched,
    _draw_fake,
)
register(
    "heatmap_targets(Tensor centers, Tensor radii, Tensor counts, Tensor? labels, SymInt[] shape, "
    "float diameter_to_sigma_factor, float k_scale) -> Tensor",
    _targets,
    _targets_fake,
)
register(
    "boxes_to_heatmap(Tensor boxes, Tensor counts, Tensor? labels, SymInt[] shape, bool corners, float[] origin, "
    "float[] stride, float min_overlap, str convention, int min_radius, float diameter_to_sigma_factor, "
    "float k_scale) -> Tensor",
    _boxes,
    _boxes_fake,
)
_call_draw = DirectCall("draw_heatmap", _prepare_draw)
_call_draw_batched = DirectCall("draw_heatmap_batched", _prepare_draw_batched)
_call_targets = DirectCall("heatmap_targets", _prepare_targets)
_call_boxes = DirectCall("boxes_to_heatmap")
