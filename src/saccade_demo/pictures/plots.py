"""The pictures of one sample: boxes in six cameras and from above, and heatmaps.

Boxes have the colour of their class. True boxes are white and wide, or filled, and predicted ones are not: so they can
be told apart without colour.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, Patch, Polygon
from PIL import Image

from saccade_demo.evaluation import MAX_RANGE, MIN_SCORE, Counts, Detections
from saccade_demo.geometry import Sample, box_corners, turned, turned_boxes, wire_segments, yaw_rotation

DARK, INK, FAINT = "#15181c", "#eceff3", "#8b939c"
TRUE, IGNORED = "#ffffff", "#b9b9b9"
# After Okabe and Ito, lighter for the dark ground. As any kind of dichromat sees them (simulated after Machado et al.,
# 2009), the first seven and white are at least 10 apart in CIE 1976 L*a*b*. Ten cannot be: labels name the class, too.
CLASS_COLORS = (
    *("#ff9f1c", "#56b4e9", "#f0e442", "#e58fc4", "#22c08f", "#ff6b4a", "#8c9eff"),
    *("#c9b18b", "#b5e36b", "#b784e0"),
)
# Left to right as one looks ahead, then as one looks back; other rigs are shown in their own order.
PLACES = ("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT")
DPI = 100
GAP = 8
"""Pixels between panels and around them."""
LEGEND_ROW = 28
"""Pixels from one row of a legend to the next."""


def class_color(label: int) -> str:
    """Of a class, or of an ignored box."""
    return IGNORED if label < 0 else CLASS_COLORS[label % len(CLASS_COLORS)]


class Canvas:
    """A figure laid out in pixels from its upper left corner."""

    def __init__(self, width: float, height: float, ground: str = DARK):
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor=ground)

    def panel(self, left: float, top: float, width: float, height: float) -> Axes:
        """Empty axes."""
        bottom = self.height - top - height
        return self.figure.add_axes(
            (left / self.width, bottom / self.height, width / self.width, height / self.height),
            xticks=[], yticks=[], facecolor=self.figure.get_facecolor(),
        )  # fmt: skip

    def write(self, left: float, top: float, text: str, size: float = 12, color: str = INK, **how) -> None:
        """Text whose upper left corner is there."""
        how = {"ha": "left", "va": "top", **how}
        self.figure.text(left / self.width, 1 - top / self.height, text, fontsize=size, color=color, **how)

    def legend(self, left: float, top: float, rows: list[list], size: float = 11) -> None:
        """Legend whose upper left corner is there, of rows as `legend_rows` makes them."""
        for row, handles in enumerate(rows):
            self.figure.legend(
                handles=handles, loc="upper left", ncols=len(handles), fontsize=size, frameon=False, labelcolor=INK,
                bbox_to_anchor=(left / self.width, 1 - (top + row * LEGEND_ROW) / self.height), borderaxespad=0,
                borderpad=0, columnspacing=1.4, handletextpad=0.6,
            )  # fmt: skip

    def save(self, path: Path) -> None:
        """As PNG."""
        self.figure.savefig(path, dpi=DPI, facecolor=self.figure.get_facecolor())

    def image(self) -> Image.Image:
        """As RGB."""
        canvas = FigureCanvasAgg(self.figure)
        canvas.draw()
        return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def grid(sample: Sample) -> tuple[int, int]:
    """In how many rows and columns the cameras are shown."""
    columns = min(3, len(sample.images))
    return -(-len(sample.images) // columns), columns


def panel_height(sample: Sample, width: float) -> float:
    """Of all cameras together, in pixels, with a gap below each row."""
    rows, columns = grid(sample)
    return rows * ((width - (columns - 1) * GAP) / columns * sample.image_wh[1] / sample.image_wh[0] + GAP)


def camera_panels(
    canvas: Canvas, sample: Sample, left: float, top: float, width: float, brightness: np.ndarray | None = None
) -> dict[int, Axes]:
    """Panels with the images of all cameras, arranged as on the vehicle, by camera."""
    names = list(sample.camera_names)
    order = [names.index(name) for name in PLACES] if sorted(names) == sorted(PLACES) else range(len(names))
    rows, columns = grid(sample)
    across, down = (width + GAP) / columns, panel_height(sample, width) / rows
    panels = {}
    for place, camera in enumerate(order):
        row, column = divmod(place, columns)
        axes = canvas.panel(left + column * across, top + row * down, across - GAP, down - GAP)
        show_image(axes, sample, camera, 0.85 if brightness is None else float(brightness[camera]))
        panels[camera] = axes
    return panels


def show_image(axes: Axes, sample: Sample, camera: int, brightness: float = 0.85, named: bool = True) -> None:
    """The image of a camera, in pixels of that image, and its name."""
    width, height = sample.image_wh
    picture = (brightness / 255 * sample.images[camera]).transpose(1, 2, 0)
    axes.imshow(picture, extent=(0, width, height, 0), interpolation="lanczos", aspect="auto")
    axes.set(xlim=(0, width), ylim=(height, 0))
    if named:
        write_in_corner(axes, camera_title(sample, camera), left=True)


def write_in_corner(axes: Axes, text: str, *, left: bool, color: str = INK) -> None:
    """Text in an upper corner of an image."""
    axes.text(
        0.008 if left else 0.992, 0.972, text, transform=axes.transAxes, color=color, fontsize=9, va="top",
        ha="left" if left else "right", zorder=9, bbox={"facecolor": DARK, "alpha": 0.65, "pad": 2, "linewidth": 0},
    )  # fmt: skip


def camera_title(sample: Sample, camera: int) -> str:
    """Its name as one would say it."""
    return sample.camera_names[camera].removeprefix("CAM_").replace("_", " ").lower()


def draw_wires(
    axes: Axes, boxes: np.ndarray, colors: str | np.ndarray, projection: np.ndarray, sample: Sample, width: float,
    style: str | tuple = "-", alpha: float = 1.0,
) -> None:  # fmt: skip
    """Boxes (M, 7) as wires in an image, with a dark seam so that they show on any ground."""
    segments = wire_segments(boxes, projection, sample.image_wh)  # (M, 12, 2, 2)
    visible = ~np.isnan(segments).any((2, 3))
    colors = np.broadcast_to(np.array(colors), len(boxes))[np.nonzero(visible)[0]]
    lines = LineCollection(
        list(segments[visible]), colors=list(colors), linewidths=width, linestyles=style,
        alpha=alpha, capstyle="round",
    )  # fmt: skip
    if style == "-":
        lines.set_path_effects([patheffects.withStroke(linewidth=width + 1.6, foreground=(0, 0, 0, 0.55 * alpha))])
    axes.add_collection(lines)


def legend_handles(sample: Sample, labels: Iterable[int], *, filled: bool) -> list:
    """What lines mean, and the classes that are there.

    Args:
        sample: Names the classes.
        labels: The classes that are shown; negative ones are left out.
        filled: Whether true boxes are, with the colour of their class.
    """
    kinds = {int(k): sample.class_names[k].replace("_", " ") for k in sorted(set(labels)) if k >= 0}
    if filled:
        white = [
            Patch(facecolor=(*to_rgb(class_color(k)), 0.4), edgecolor=TRUE, label=f"true {kinds[k]}") for k in kinds
        ]
    else:
        white = [Line2D([], [], color=TRUE, lw=3, label="true box")]
    predicted = [Line2D([], [], color=class_color(k), lw=2, label=f"predicted {kinds[k]}") for k in kinds]
    return [*white, *predicted, Line2D([], [], color=IGNORED, lw=1.2, ls=":", label="ignored box")]


def legend_rows(handles: Iterable[Any], width: float, size: float = 11) -> list[list]:
    """Handles of a legend in rows of at most this width in pixels, apart from what is wider by itself."""
    rows: list[list] = []
    used = 0.0
    for handle in handles:
        needed = (5 + 0.62 * len(handle.get_label())) * size * DPI / 72
        if not rows or used + needed > width:
            rows.append([])
            used = 0
        rows[-1].append(handle)
        used += needed
    return rows


def score_line(counts: Counts) -> str:
    """What was found, in words."""
    false = f"{counts.false_positives} false detection" + "s" * (counts.false_positives != 1)
    return f"{counts.true_positives} of {counts.boxes} true boxes found, {false}"


def draw_cameras(path: Path, sample: Sample, detections: Detections, counts: Counts, name: str) -> None:
    """All camera images with true and predicted boxes as wires, class and score beside them.

    Args:
        path: PNG file to write.
        sample: Images of any size, with matching projection matrices.
        detections: What was found, already cut at the score that counts.
        counts: How it compares.
        name: What the sample is, for the title.
    """
    bottom = 52 + panel_height(sample, 1500 - 2 * GAP)
    legend = legend_rows(legend_handles(sample, [*sample.labels, *detections.labels], filled=False), 1500 - 2 * GAP)
    canvas = Canvas(1500, bottom + 6 + len(legend) * LEGEND_ROW)
    canvas.write(GAP, 12, f"What the detector finds ({name}): {score_line(counts)}", 15)
    for camera, axes in camera_panels(canvas, sample, GAP, 52, 1500 - 2 * GAP).items():
        draw_boxes(axes, sample, detections, sample.projection[camera], 2.4, 1.4)
        _write_names(axes, sample, detections, sample.projection[camera])
    canvas.legend(GAP, bottom + 6, legend)
    canvas.save(path)


def draw_boxes(
    axes: Axes, sample: Sample, detections: Detections, projection: np.ndarray, true: float, found: float
) -> None:
    """True and predicted boxes in an image, with lines of these widths; those of low scores are faint."""
    known, sure = sample.labels >= 0, detections.scores >= MIN_SCORE
    colors = np.array([class_color(int(k)) for k in detections.labels], dtype=str)
    draw_wires(axes, sample.boxes[~known], IGNORED, projection, sample, 0.8, ":")
    draw_wires(axes, sample.boxes[known], TRUE, projection, sample, true, alpha=0.9)
    draw_wires(axes, detections.boxes[~sure], colors[~sure], projection, sample, 0.5 * found, alpha=0.5)
    draw_wires(axes, detections.boxes[sure], colors[sure], projection, sample, found)


def _write_names(axes: Axes, sample: Sample, detections: Detections, projection: np.ndarray, size: float = 9) -> None:
    """Class and score above each predicted box, or below it, where there is room; the best come first."""
    width, height = sample.image_wh
    pixel = width / axes.bbox.width  # of the picture, in those of the image
    line = 1.75 * size * DPI / 72 * pixel
    taken = [(0.0, 0.0, 110 * pixel, line)]  # the camera's name
    segments = wire_segments(detections.boxes, projection, sample.image_wh)
    for i in np.argsort(-detections.scores, kind="stable"):
        ends = segments[i][~np.isnan(segments[i]).any((1, 2))].reshape(-1, 2).clip(0, (width, height))
        if not len(ends) or (np.ptp(ends, axis=0) < 5 * pixel).any():
            continue  # but a sliver of it is in the image
        label = int(detections.labels[i])
        text = f"{sample.class_names[label].replace('_', ' ')} {detections.scores[i]:.2f}"
        half = (0.31 * len(text) * size * DPI / 72 + 3) * pixel
        x = float(np.clip(ends[:, 0].mean(), half, width - half))
        for top in (ends[:, 1].min() - line, ends[:, 1].max()):
            place = (x - half, top, x + half, top + line)
            if 0 <= top <= height - line and not any(_overlap(place, other) for other in taken):
                taken.append(place)
                axes.text(
                    x, top + line / 2, text, color=class_color(label), fontsize=size, ha="center",
                    va="center", zorder=8, bbox={"facecolor": "black", "alpha": 0.6, "pad": 1.2, "linewidth": 0},
                )  # fmt: skip
                break


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def draw_birds_eye(path: Path, sample: Sample, detections: Detections, counts: Counts, name: str) -> None:
    """The ground plane from above, the vehicle in the middle looking up. Arguments as in `draw_cameras`."""
    legend = legend_rows(legend_handles(sample, [*sample.labels, *detections.labels], filled=True), 984)
    canvas = Canvas(1000, 1046 + len(legend) * LEGEND_ROW)
    canvas.write(GAP, 12, f"From above ({name}): {score_line(counts)}", 13.5)
    show_from_above(canvas.panel(GAP, 48, 984, 984), sample, detections)
    canvas.legend(GAP, 1046, legend)
    canvas.save(path)


def show_from_above(axes: Axes, sample: Sample, detections: Detections, size: float = 10, named: bool = True) -> None:
    """Boxes around the vehicle, its front camera looking up; rings of equal range, what each camera sees, its name."""
    if "CAM_FRONT" in sample.camera_names:
        ahead = sample.projection[sample.camera_names.index("CAM_FRONT"), 2, :2]
        angle = np.pi / 2 - float(np.arctan2(ahead[1], ahead[0]))
        sample, detections = turned(sample, angle), replace(detections, boxes=turned_boxes(detections.boxes, angle))
    far = np.hypot(sample.boxes[:, 0], sample.boxes[:, 1])
    counted = far <= MAX_RANGE
    reach = 4 + max([*far[counted], 16.0])
    _show_fields_of_view(axes, sample, reach, size if named else 0)
    angle = _free_angle(sample.boxes[counted], reach)
    for radius in range(10, int(reach) + 1, 10):
        axes.add_patch(Circle((0, 0), radius, fill=False, color="#4a525b", lw=0.9, zorder=1))
        axes.text(
            radius * np.cos(angle), radius * np.sin(angle), f"{radius} m", color=FAINT, fontsize=size, ha="center",
            va="center", zorder=1, bbox={"facecolor": DARK, "pad": 1, "linewidth": 0},
        )  # fmt: skip
    ego = np.array([(-0.95, -2.2), (-0.95, 1.5), (0, 2.7), (0.95, 1.5), (0.95, -2.2)])
    axes.add_patch(Polygon(ego, facecolor=INK, zorder=3))
    known, sure = (sample.labels >= 0) & counted, detections.scores >= MIN_SCORE
    line = size * min(1, 34 / reach)  # seen from farther away, boxes are smaller
    _footprints(axes, sample.boxes[~known], [IGNORED] * len(known), 0.8, ":")
    for box, label in zip(sample.boxes[known], sample.labels[known], strict=True):
        corners = box_corners(box[None])[0, :4, :2]
        axes.add_patch(Polygon(corners, facecolor=class_color(int(label)), alpha=0.4, lw=0, zorder=2))
    _footprints(axes, sample.boxes[known], [TRUE] * len(known), 0.26 * line)
    colors = np.array([class_color(int(k)) for k in detections.labels], dtype=str)
    _footprints(axes, detections.boxes[~sure], colors[~sure], 0.06 * line, alpha=0.6)
    _footprints(axes, detections.boxes[sure], colors[sure], 0.15 * line)
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    for spine in axes.spines.values():
        spine.set_visible(False)


def _show_fields_of_view(axes: Axes, sample: Sample, reach: float, size: float) -> None:
    """With names of this size, if it is not 0."""
    width, height = sample.image_wh
    for camera, projection in enumerate(sample.projection):
        inverse = np.linalg.inv(projection.astype(np.float64))
        rays = (inverse[:3, :3] @ np.array([(0, width), (height / 2, height / 2), (1, 1)]))[:2].T
        start, rays = inverse[:2, 3], rays / np.linalg.norm(rays, axis=1, keepdims=True)
        fan = start + 2 * reach * np.array([rays[0], rays.sum(0) / np.linalg.norm(rays.sum(0)), rays[1]])
        axes.add_patch(Polygon([start, *fan], facecolor="#9fb6cc", alpha=0.07, lw=0, zorder=0))
        for ray in rays:
            axes.plot(*zip(start, start + 2 * reach * ray, strict=True), color="#9fb6cc", alpha=0.25, lw=0.7, zorder=0)
        if not size:
            continue
        middle = rays.sum(0) / np.abs(rays.sum(0)).max() * 0.97 * reach
        where = "right" if middle[0] > 0.5 * reach else "left" if middle[0] < -0.5 * reach else "center"
        axes.text(
            middle[0], middle[1], camera_title(sample, camera), color=FAINT, fontsize=size, ha=where,
            va="top" if middle[1] > 0.9 * reach else "bottom" if middle[1] < -0.9 * reach else "center", zorder=1,
        )  # fmt: skip


def _free_angle(boxes: np.ndarray, reach: float) -> float:
    """In radians, the direction in which no box lies near the labels of the rings."""
    angles = np.radians(np.arange(0, 360, 6) + 3)
    labels = np.arange(10, int(reach) + 1, 10)
    places = (
        np.stack([np.cos(angles), np.sin(angles)], -1)[:, None, None] * labels[:, None, None]
    )  # (angles, rings, 1, 2)
    if not len(boxes) or not len(labels):
        return float(angles[0])
    gaps = np.linalg.norm(places - boxes[:, :2], axis=-1) - boxes[:, 3:5].max(1) / 2
    return float(angles[gaps.min((1, 2)).argmax()])


def _footprints(
    axes: Axes, boxes: np.ndarray, colors: Sequence[str] | np.ndarray, width: float, style: str = "-", alpha: float = 1
) -> None:
    """Outlines of boxes, each with a line from its centre over its front, which way it heads."""
    for box, color in zip(boxes, colors, strict=False):
        corners = box_corners(box[None])[0, :4, :2]
        ahead = box[:2] + yaw_rotation(box[6])[:2, 0] * (box[3] / 2 + 0.8)
        for line in ([*corners, corners[0]], [box[:2], ahead]):
            axes.plot(*zip(*line, strict=True), color=color, lw=width, ls=style, alpha=alpha, zorder=4)


def draw_heatmaps(path: Path, sample: Sample, target: np.ndarray, predicted: np.ndarray, name: str) -> None:
    """Target and predicted centre heatmaps over the images with the most boxes.

    Args:
        path: PNG file to write.
        sample: The images.
        target: (N, classes, h, w) in [0, 1].
        predicted: The same, probabilities.
        name: What the sample is, for the title.
    """
    cameras = np.sort(np.argsort(-(target == 1).sum((1, 2, 3)), kind="stable")[:3])
    width, height = sample.image_wh
    panel_width = (1500 - 3 * GAP) / 2
    panel = panel_width * height / width + GAP
    there = np.flatnonzero((target == 1).any((0, 2, 3)) | (predicted > MIN_SCORE).any((0, 2, 3)))
    handles = [Patch(color=class_color(int(k)), label=sample.class_names[k].replace("_", " ")) for k in there]
    legend = legend_rows(handles, 1500 - 2 * GAP)
    below = 86 + len(cameras) * panel + 6
    canvas = Canvas(1500, below + len(legend) * LEGEND_ROW)
    canvas.write(GAP, 12, f"Where the centres of boxes are in the images ({name})", 15)
    targets = "target: in the colour of the class, the more opaque the higher"
    predictions = "predicted probability, with the true centres as crosses"
    for column, (maps, kind) in enumerate(((target, targets), (predicted, predictions))):
        left = GAP + column * (panel_width + GAP)
        canvas.write(left, 54, kind, 12)
        for row, camera in enumerate(cameras):
            axes = canvas.panel(left, 86 + row * panel, panel_width, panel - GAP)
            show_image(axes, sample, camera)
            grey = sample.images[camera].mean(0)
            axes.imshow(grey, cmap="gray", vmin=-50, vmax=400, extent=(0, width, height, 0), aspect="auto")
            axes.imshow(
                _class_glow(maps[camera]), extent=(0, width, height, 0), interpolation="bilinear", aspect="auto"
            )
            if column:
                _, rows, columns = np.nonzero(target[camera] == 1)
                cell = width / target.shape[-1]
                axes.plot((columns + 0.5) * cell, (rows + 0.5) * cell, "+", color="white", ms=9, mew=1.2)
    canvas.legend(GAP, below, legend)
    canvas.save(path)


def _class_glow(maps: np.ndarray) -> np.ndarray:
    """Heatmaps (classes, h, w) as one RGBA image: hue by the highest class, opacity by its value."""
    colors = np.array([to_rgb(class_color(k)) for k in range(len(maps))])
    opacity = ((maps.max(0) - 0.05) / 0.95).clip(0, 0.95) ** 0.7  # below 0.05 there is but a haze
    return np.concatenate([colors[maps.argmax(0)], opacity[..., None]], -1)
