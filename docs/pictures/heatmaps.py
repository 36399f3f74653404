"""Draws heatmaps.png, the picture of the page on heatmaps: ``python docs/pictures/heatmaps.py`` in a checkout."""

import argparse
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Polygon, Rectangle
from torch import Tensor

import saccade

CLASSES = ("car", "truck", "pedestrian")
COLORS = ("#2f81f7", "#e07b00", "#2ee66b")
CELL = 0.4  # metres
SIZE = (70, 100)  # (H, W) cells
MIN_RADIUS = 2  # cells

# A crossing from above: x and y of the centre, length and width in metres, heading in degrees, class.
BOXES = torch.tensor(
    [
        (22.1, 7.5, 4.5, 1.9, 90, 0),
        (22.1, 1.7, 4.4, 1.9, 90, 0),
        (22.3, 24.5, 4.7, 2.0, 90, 0),
        (17.7, 5.5, 4.5, 1.9, 90, 0),
        (17.9, 15.7, 4.5, 1.9, 60, 0),
        (28.6, 16.1, 4.6, 1.9, 0, 0),
        (35.0, 16.2, 4.3, 1.8, 0, 0),
        (7.4, 11.8, 11.0, 2.8, 0, 1),
        (17.8, 24.2, 7.5, 2.6, 90, 1),
        (34.9, 11.9, 7.6, 2.5, 0, 1),
        (13.7, 7.9, 0.8, 0.8, 0, 2),
        (12.5, 6.6, 0.8, 0.8, 0, 2),
        (26.5, 20.2, 0.8, 0.8, 0, 2),
        (28.1, 20.9, 0.8, 0.8, 0, 2),
        (27.4, 19.3, 0.8, 0.8, 0, 2),
        (27.9, 6.5, 0.8, 0.8, 0, 2),
    ]
)


def footprints(boxes: Tensor) -> Tensor:
    """(M, 4, 2) corners of the boxes, in cells."""
    signs = torch.tensor([(1, 1), (1, -1), (-1, -1), (-1, 1)])
    along, aside = (signs * boxes[:, None, 2:4] / 2).unbind(-1)
    cos, sin = boxes[:, None, 4].deg2rad().cos(), boxes[:, None, 4].deg2rad().sin()
    return (boxes[:, None, :2] + torch.stack([along * cos - aside * sin, along * sin + aside * cos], -1)) / CELL


def show(axes: Axes, corners: Tensor, heatmap: Tensor | None, title: str, only: int | None = None) -> None:
    """One panel: a heatmap, or else the road, and outlines of the boxes, of other classes than ``only`` in grey."""
    height, width = SIZE
    if heatmap is None:
        axes.set_facecolor("#dfe5dc")
        axes.add_patch(Rectangle((0, 10 / CELL), width, 8 / CELL, color="#c3c6ca"))
        axes.add_patch(Rectangle((16 / CELL, 0), 8 / CELL, height, color="#c3c6ca"))
    else:
        axes.imshow(heatmap.numpy(), cmap="magma", vmin=0, vmax=1, origin="lower", extent=(0, width, 0, height))
    for outline, label in zip(corners, BOXES[:, 5].int().tolist(), strict=True):
        if heatmap is None:
            axes.add_patch(Polygon(outline.numpy(), facecolor=COLORS[label], edgecolor="white", lw=0.8))
        else:
            color = COLORS[label] if only in (None, label) else "#4d4d4d"
            axes.add_patch(Polygon(outline.numpy(), fill=False, edgecolor=color, lw=0.7))
    axes.set(xlim=(0, width), ylim=(0, height), xticks=[], yticks=[], aspect="equal")
    axes.set_title(title, fontsize=11)


def draw(path: Path) -> None:
    """Draw the picture."""
    corners = footprints(BOXES)
    counts = torch.tensor([len(BOXES)])
    from_boxes = {"counts": counts, "box_format": "cxcywh", "min_radius": MIN_RADIUS}
    boxes, labels = BOXES[None, :, :4], BOXES[None, :, 5].int()
    circles = saccade.boxes_to_heatmap(boxes, None, SIZE, CELL, 0.1, "mmdet3d", **from_boxes)[0]
    by_class = saccade.boxes_to_heatmap(
        boxes, labels, SIZE, CELL, 0.1, "mmdet3d", num_classes=len(CLASSES), **from_boxes
    )[0]
    centers = (boxes[..., :2] / CELL).int()
    halves = ((corners.amax(1) - corners.amin(1)) / 2).int().clamp(min=MIN_RADIUS)[None]  # (1, M, 2), along x and y
    ellipses = saccade.heatmap_targets(centers, halves, SIZE, counts=counts)[0]

    figure = Figure(figsize=(11, 5.4), layout="constrained")
    panels = figure.subplots(2, 3)
    show(panels[0, 0], corners, None, "boxes from above")
    show(panels[0, 1], corners, circles, "circles, one map for all classes")
    show(panels[0, 2], corners, ellipses, "ellipses, one map for all classes")
    for label, (axes, heatmap) in enumerate(zip(panels[1], by_class, strict=True)):
        show(axes, corners, heatmap, f"circles, class-wise: {CLASSES[label]}", only=label)
    keys = [Line2D([], [], color=color, lw=4, label=name) for name, color in zip(CLASSES, COLORS, strict=True)]
    panels[0, 0].legend(handles=keys, loc="upper left", fontsize=8, framealpha=0.9)
    figure.colorbar(panels[0, 1].images[0], ax=panels, shrink=0.7, pad=0.01, label="target value")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", nargs="?", type=Path, default=Path(__file__).with_suffix(".png"))
    draw(parser.parse_args().path)
