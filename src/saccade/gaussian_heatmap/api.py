"""The public functions: ``draw_heatmap``, ``draw_heatmap_batched``, ``heatmap_targets`` and ``boxes_to_heatmap``."""

from typing import Any, Literal

from torch import Tensor

from saccade.gaussian_heatmap import checks, reference
from saccade.gaussian_heatmap.options import BoxOptions, new_maps
from saccade.operator.declaration import Operator


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
    DRAW_HEATMAP(heatmaps, centers, radii, heatmap_idxes, diameter_to_sigma_factor, k_scale, clear)


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
    centers, sizes = checks.with_sizes("centers", centers, counts)
    radii, labels = checks.padded("radii", radii), None if labels is None else checks.padded("labels", labels)
    DRAW_HEATMAP_BATCHED(heatmap, centers, radii, sizes, labels, diameter_to_sigma_factor, k_scale, clear)


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
    centers, sizes = checks.with_sizes("centers", centers, counts)
    radii, labels = checks.padded("radii", radii), None if labels is None else checks.padded("labels", labels)
    return HEATMAP_TARGETS(centers, radii, sizes, labels, size, num_classes, diameter_to_sigma_factor, k_scale)


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
    boxes, sizes = checks.with_sizes("boxes", boxes, counts)
    labels = None if labels is None else checks.padded("labels", labels)
    strides = stride if isinstance(stride, (tuple, list)) else (stride, stride)
    options = BoxOptions(strides, min_overlap, radius, min_radius, box_format, origin)
    return BOXES_TO_HEATMAP(boxes, sizes, labels, size, num_classes, diameter_to_sigma_factor, k_scale, options)


def _fake_targets(*, counts: Tensor, size: Any, num_classes: int | None, **_: Any) -> Tensor:
    return new_maps(counts.shape[0], size, num_classes, counts.device)


_LAUNCH = "saccade.gaussian_heatmap.launch:prepare"

DRAW_HEATMAP = Operator(
    "draw_heatmap(Tensor(a!) heatmaps, Tensor centers, Tensor radii, Tensor heatmap_idxes, "
    "float diameter_to_sigma_factor, float k_scale, bool clear) -> ()",
    check=checks.concatenated,
    faults=checks.values_of_concatenated,
    fake=lambda **_: None,
    reference=reference.draw_heatmap,
    kernels=f"{_LAUNCH}_heatmap",
    nonempty=("heatmaps", "radii"),
)
DRAW_HEATMAP_BATCHED = Operator(
    "draw_heatmap_batched(Tensor(a!) heatmap, Tensor centers, Tensor radii, Tensor counts, Tensor? labels, "
    "float diameter_to_sigma_factor, float k_scale, bool clear) -> ()",
    check=checks.batched,
    faults=checks.values_of_batched,
    fake=lambda **_: None,
    reference=reference.draw_heatmap_batched,
    kernels=f"{_LAUNCH}_heatmap_batched",
    nonempty=("heatmap", "radii"),
)
HEATMAP_TARGETS = Operator(
    "heatmap_targets(Tensor centers, Tensor radii, Tensor counts, Tensor? labels, SymInt[] size, SymInt? num_classes, "
    "float diameter_to_sigma_factor, float k_scale) -> Tensor",
    check=checks.targets,
    faults=checks.values_of_targets,
    fake=_fake_targets,
    reference=reference.heatmap_targets,
    kernels=f"{_LAUNCH}_heatmap_targets",
    nonempty=("radii",),
)
BOXES_TO_HEATMAP = Operator(
    "boxes_to_heatmap(Tensor boxes, Tensor counts, Tensor? labels, SymInt[] size, SymInt? num_classes, "
    "float diameter_to_sigma_factor, float k_scale, BoxOptions options) -> Tensor",
    groups=(BoxOptions,),
    check=checks.of_boxes,
    faults=checks.values_of_boxes,
    fake=_fake_targets,
    reference=reference.boxes_to_heatmap,
    kernels=f"{_LAUNCH}_boxes_to_heatmap",
    nonempty=("boxes",),
)
