"""The pictures of the demo, as PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, Polygon

from saccade.demo.evaluation import MAX_RANGE, Counts, Detections
from saccade.demo.geometry import Sample, box_corners, wire_segments

TRUE, FOUND, IGNORED = "#2ee66b", "#ff9d1e", "#b9b9b9"
# Left to right as one looks ahead, then as one looks back; other rigs are shown in their own order.
PLACES = ("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT")


def _camera_order(sample: Sample) -> list[int]:
    names = list(sample.camera_names)
    return [names.index(name) for name in PLACES] if sorted(names) == sorted(PLACES) else list(range(len(names)))


def _title(name: str) -> str:
    return name.removeprefix("CAM_").replace("_", " ").lower()


def _legend(dark: bool) -> list[Line2D]:
    true = TRUE if dark else "#12a245"
    return [
        Line2D([], [], color=true, lw=2, label="true box"),
        Line2D([], [], color=FOUND, lw=2, label="predicted box"),
        Line2D([], [], color=IGNORED, lw=2, ls=":", label="ignored box"),
    ]


def _score_line(counts: Counts) -> str:
    return f"{counts.true_positives} of {counts.boxes} boxes found, {counts.false_positives} false"


def draw_cameras(path: Path, sample: Sample, detections: Detections, counts: Counts, name: str) -> None:
    """All camera images with true and predicted boxes as wire frames.

    Args:
        path: PNG file to write.
        sample: Images of any size, with matching projection matrices.
        detections: What was found, already cut at the score that counts.
        counts: How it compares.
        name: What the sample is, for the title.
    """
    order = _camera_order(sample)
    columns = min(3, len(order))
    rows = -(-len(order) // columns)
    width, height = sample.image_wh
    figure = Figure(
        figsize=(18, 18 / columns * height / width * rows + 0.3 * rows + 0.75),
        facecolor="#15181c",
        layout="constrained",
    )
    panels = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
    for axes in panels[len(order) :]:
        axes.set_axis_off()
    for axes, camera in zip(panels, order, strict=False):
        axes.imshow(sample.images[camera].transpose(1, 2, 0), extent=(0, width, height, 0), interpolation="lanczos")
        axes.set_title(_title(sample.camera_names[camera]), color="white", fontsize=13, pad=4)
        axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
        known = sample.labels >= 0
        projection = sample.projection[camera]
        for boxes, color, style, line in (
            (sample.boxes[~known], IGNORED, ":", 1.0),
            (sample.boxes[known], TRUE, "-", 2.6),  # so thick that it shows beneath a perfect prediction
            (detections.boxes, FOUND, "-", 1.3),
        ):
            segments = wire_segments(boxes, projection, (width, height)).reshape(-1, 2, 2)
            segments = segments[~np.isnan(segments).any((1, 2))]
            axes.add_collection(LineCollection(list(segments), colors=color, linewidths=line, linestyles=style))
        _write_names(axes, sample, detections, projection)
    figure.suptitle(f"{name}: {_score_line(counts)}", color="white", fontsize=16)
    figure.legend(
        handles=_legend(True), loc="outside lower center", ncols=3, fontsize=13, frameon=False, labelcolor="white"
    )
    figure.savefig(path, dpi=100, facecolor=figure.get_facecolor())


def _write_names(axes: Axes, sample: Sample, detections: Detections, projection: np.ndarray) -> None:
    """Class and score above each predicted box, where there is room; the best come first."""
    width, height = sample.image_wh
    segments = wire_segments(detections.boxes, projection, sample.image_wh)
    taken: list[tuple[float, float]] = []
    for i in np.argsort(-detections.scores):
        ends = segments[i][~np.isnan(segments[i]).any((1, 2))].reshape(-1, 2)
        if not len(ends):
            continue
        x = float(np.clip((ends[:, 0].min() + ends[:, 0].max()) / 2, 0.09 * width, 0.91 * width))
        y = float(np.clip(ends[:, 1].min() - 0.015 * height, 0.07 * height, 0.98 * height))
        if any(abs(x - a) < 0.15 * width and abs(y - b) < 0.065 * height for a, b in taken):
            continue
        taken.append((x, y))
        text = f"{sample.class_names[detections.labels[i]].replace('_', ' ')} {detections.scores[i]:.2f}"
        axes.text(
            x, y, text, color="white", fontsize=8, ha="center", va="bottom",
            bbox={"facecolor": "black", "alpha": 0.45, "pad": 1.2, "linewidth": 0},
        )  # fmt: skip


def draw_birds_eye(path: Path, sample: Sample, detections: Detections, counts: Counts, name: str) -> None:
    """The ground plane from above, the vehicle in the middle looking up. Arguments as in `draw_cameras`."""
    counted = np.hypot(sample.boxes[:, 0], sample.boxes[:, 1]) <= MAX_RANGE
    reach = 6 + max([*np.hypot(sample.boxes[counted, 0], sample.boxes[counted, 1]), 20.0])
    figure = Figure(figsize=(10, 10.6), layout="constrained")
    axes = figure.subplots()
    for radius in range(10, int(reach * 1.5), 10):
        axes.add_patch(Circle((0, 0), radius, fill=False, color="#d0d4d8", lw=0.8, zorder=0))
        if radius < 0.96 * reach:  # else the label would touch the frame
            axes.text(0.7, radius + 0.3, f"{radius} m", color="#8a9097", fontsize=9, zorder=0)
    ego = np.array([(-0.9, -2), (-0.9, 1.6), (0, 2.6), (0.9, 1.6), (0.9, -2)])
    axes.add_patch(Polygon(ego, facecolor="#30363c", zorder=3))
    known = (sample.labels >= 0) & counted
    for boxes, color, style, fill, line in (
        (sample.boxes[~known], "#8a9097", ":", 0.0, 1.2),
        (sample.boxes[known], "#12a245", "-", 0.25, 3.0),
        (detections.boxes, "#e07b00", "-", 0.0, 1.4),
    ):
        for corners, box in zip(box_corners(boxes)[:, :4, :2], boxes, strict=True):
            axes.add_patch(Polygon(corners, fill=False, edgecolor=color, lw=line, ls=style, zorder=2))
            if fill:
                axes.add_patch(Polygon(corners, facecolor=color, alpha=fill, lw=0, zorder=1))
            front = corners[:2].mean(0)
            ahead = front + 0.8 * np.array([np.cos(box[6]), np.sin(box[6])])
            axes.plot(*zip(front, ahead, strict=True), color=color, lw=line, zorder=2)
    axes.set(
        xlim=(-reach, reach),
        ylim=(-reach, reach),
        aspect="equal",
        xlabel="x, to the right (m)",
        ylabel="y, forward (m)",
    )
    axes.set_title(f"{name}, from above: {_score_line(counts)}", fontsize=13)
    figure.legend(handles=_legend(False), loc="outside lower center", ncols=3, frameon=False, fontsize=11)
    figure.savefig(path, dpi=100)


def draw_heatmaps(path: Path, sample: Sample, target: np.ndarray, predicted: np.ndarray, name: str) -> None:
    """Target and predicted centre heatmaps over the two images with the most boxes.

    Args:
        path: PNG file to write.
        sample: The images.
        target: (N, classes, h, w) in [0, 1].
        predicted: The same, probabilities.
        name: What the sample is, for the title.
    """
    peaks = (target == 1).sum((1, 2, 3))
    cameras = np.argsort(-peaks, kind="stable")[:2]
    width, height = sample.image_wh
    figure = Figure(figsize=(17, 17 / 2 * height / width * len(cameras) + 1.5), layout="constrained")
    panels = figure.subplots(len(cameras), 2, squeeze=False)
    picture = None
    for row, camera in zip(panels, cameras, strict=True):
        for axes, maps, kind in zip(row, (target, predicted), ("target", "predicted"), strict=True):
            axes.imshow(sample.images[camera].mean(0), cmap="gray", vmin=-0.3, vmax=1.3, extent=(0, width, height, 0))
            strength = maps[camera].max(0)
            picture = axes.imshow(
                strength, cmap="inferno", vmin=0, vmax=1, extent=(0, width, height, 0), interpolation="bilinear",
                alpha=np.clip(0.15 + 1.3 * strength, 0, 0.9),
            )  # fmt: skip
            axes.set_title(f"{_title(sample.camera_names[camera])}: {kind}", fontsize=12)
            axes.set(xticks=[], yticks=[])
    if picture is not None:
        figure.colorbar(picture, ax=panels, shrink=0.8, label="highest of the classes", pad=0.01)
    figure.suptitle(f"Box centres in the images, {name}", fontsize=14)
    figure.savefig(path, dpi=100)


def draw_losses(path: Path, losses: Mapping[str, Sequence[float]]) -> None:
    """Loss curves by name, `total` among them: every step faint, a running mean in full."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots()
    for index, (name, values) in enumerate(losses.items()):
        steps = np.arange(1, len(values) + 1)
        color = "black" if name == "total" else f"C{index}"
        window = max(1, min(25, len(values) // 8))
        smooth = np.convolve(values, np.ones(window) / window, mode="valid")
        axes.plot(steps, values, color=color, alpha=0.2, lw=0.8)
        axes.plot(steps[window - 1 :], smooth, color=color, lw=2, label=name)
    axes.set(yscale="log", xlabel="step", ylabel="loss", title="Training losses")
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
