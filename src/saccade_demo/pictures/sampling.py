"""Where the queries of a decoder layer look in the images, and with what weights: recorded, and drawn for one query."""

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from saccade.nn import DeformableFeatureAggregation
from saccade_demo.data.batch import decode_boxes
from saccade_demo.geometry import Sample, wire_segments
from saccade_demo.model import DecoderLayer, Detector, Output
from saccade_demo.pictures.plots import (
    FAINT,
    GAP,
    INK,
    TRUE,
    Canvas,
    camera_panels,
    camera_title,
    class_color,
    draw_wires,
    panel_height,
    show_image,
    write_in_corner,
)

SHADES = mpl.colormaps["plasma"]


@dataclass(frozen=True)
class Sampling:
    """Where queries look. Letters: A queries, K key points, N cameras, L levels."""

    location: np.ndarray  # (A, K, N, 2) fractions of the image; anything outside (0, 1) lies in no image
    share: np.ndarray  # (A, K, N, L) of the attention, mean over the groups; those of a query add up to 1
    anchors: np.ndarray  # (A, 7) boxes that the key points belong to
    learnt: np.ndarray  # (K,) whether the network places a key point, which else has a fixed place in the box
    cells: tuple[tuple[int, int], ...]  # columns and rows of the feature map of each level

    @property
    def lands(self) -> np.ndarray:
        """(A, K, N) whether a key point lies in an image; elsewhere there is nothing to read, whatever its weight."""
        return np.all((self.location > 0) & (self.location < 1), axis=-1)


class Recorder:
    """Hears what passes through an aggregation module."""

    def __init__(self, module: DeformableFeatureAggregation):
        self.module = module
        self.heard: dict[str, Any] = {}

    def sampling(self) -> Sampling:
        """Of the first sample of the last batch."""
        module, heard = self.module, self.heard
        _, anchor, _, (_, shapes, _), metas = heard["arguments"]
        size = metas["image_wh"]
        location = module.project_points(heard["points"], metas["projection_mat"], size)[0]  # (N, A, K, 2)
        groups = module.num_groups
        # As the module has it: of a group, all cameras, levels and points share one softmax.
        logits = heard["logits"].float().reshape(*anchor.shape[:2], -1, groups)[0]
        share = logits.softmax(1).mean(-1).unflatten(1, (module.num_cams, module.num_levels, module.num_pts))
        return Sampling(
            location.permute(1, 2, 0, 3).cpu().numpy(),
            share.permute(0, 3, 1, 2).cpu().numpy(),
            decode_boxes(anchor[0].float().cpu().numpy()),
            np.arange(module.num_pts) >= module.num_pts - module.kps_generator.num_learnable_pts,
            tuple((columns, rows) for rows, columns in shapes[0].tolist()),
        )


@contextmanager
def recorded(model: Detector) -> Iterator[Recorder]:
    """Records what passes through the aggregation of the last decoder layer, by hooks on it and on its parts."""
    layer = model.layers[-1]
    assert isinstance(layer, DecoderLayer)
    module = layer.aggregation
    recorder = Recorder(module)

    def hear(name: str) -> Any:
        return lambda *call: recorder.heard.update({name: call[-1]})  # arguments before the call, the result after it

    hooks = [
        module.register_forward_pre_hook(hear("arguments")),
        module.kps_generator.register_forward_hook(hear("points")),
        module.weights_fc.register_forward_hook(hear("logits")),
    ]
    try:
        yield recorder
    finally:
        for hook in hooks:
            hook.remove()


def telling_query(output: Output, sampling: Sampling, found: np.ndarray) -> int:
    """The query that shows best how sampling works: of a detection, seen by two cameras if there is one, and large.

    Args:
        output: What the detector says about a sample.
        sampling: Where its queries look.
        found: (D, 7) boxes of the detections. Without any, the query of the highest score is taken.
    """
    scores = output.logits[-1][0].float().sigmoid().amax(-1).cpu().numpy()
    boxes = decode_boxes(output.anchors[-1][0].float().cpu().numpy())
    queries = [int(np.abs(boxes - box).sum(1).argmin()) for box in found] or [int(scores.argmax())]
    cameras = (sampling.lands.sum(1) >= 2).sum(1)  # (A,)
    spread = np.where(sampling.lands[..., None], sampling.location, np.nan)  # (A, K, N, 2)
    area = (np.nanmax(spread, 1, initial=0) - np.nanmin(spread, 1, initial=1)).clip(0).prod(-1).max(-1)  # (A,)
    return max(queries, key=lambda q: (min(cameras[q], 2), area[q] * scores[q]))


def draw_sampling(path: Path, sample: Sample, output: Output, sampling: Sampling, query: int, name: str) -> None:
    """Where the key points of one query land in all cameras, and how much of its attention is on each.

    Args:
        path: PNG file to write.
        sample: Images of any size, with matching projection matrices.
        output: What the detector says about it.
        sampling: Where the queries of the last decoder layer look.
        query: Which of them is shown.
        name: What the sample is, for the title.
    """
    shown = _Query(sample, output, sampling, query)
    lands, read = sampling.lands[query], shown.read.sum((0, 2))
    closest = [int(camera) for camera in np.argsort(-read, kind="stable")[:2] if lands[:, camera].any()]
    width, close, line, levels = 1500, 270, 24, len(sampling.cells)
    enlarged = 46 + panel_height(sample, width - 2 * GAP)
    below = enlarged + len(closest) * (line + close + GAP) + 10
    canvas = Canvas(width, below + 5 * line)
    canvas.write(GAP, 12, f"Where one query of the last decoder layer looks ({name}): {shown.what}", 15)
    brightness = np.where(lands.any(0), 0.8, 0.35)
    for camera, axes in camera_panels(canvas, sample, GAP, 46, width - 2 * GAP, brightness).items():
        shown.draw(axes, camera, shown.read[:, camera].sum(-1), 70)
        if lands[:, camera].any():
            told = f"{lands[:, camera].sum()} of {len(lands)} points land here: {read[camera]:.0%}"
            write_in_corner(axes, told, left=False)
        else:
            write_in_corner(axes, "no point lands here", left=False, color=FAINT)
    close_width = (width - (levels + 1) * GAP) / levels
    for row, camera in enumerate(closest):
        window = shown.window(camera, close_width / close)
        for level, cells in enumerate(sampling.cells):
            left, top = GAP + level * (close_width + GAP), enlarged + row * (line + close + GAP)
            told = f"{camera_title(sample, camera)}, level {level + 1} of the features ({cells[0]} x {cells[1]} cells)"
            canvas.write(left, top + 2, f"{told}: {shown.read[:, camera, level].sum():.0%}", 11)
            axes = canvas.panel(left, top + line, close_width, close)
            show_image(axes, sample, camera, 0.7, named=False)
            _draw_cells(axes, sample, cells)
            shown.draw(axes, camera, shown.read[:, camera, level], 420)
            axes.set(xlim=window[0], ylim=window[1])
    _explain(canvas, shown, below, line)
    canvas.save(path)


class _Query:
    """One query, and how it is drawn into a camera's image."""

    def __init__(self, sample: Sample, output: Output, sampling: Sampling, query: int):
        self.sample = sample
        self.lands = sampling.lands[query]  # (K, N)
        read = sampling.share[query] * self.lands[..., None]
        self.effective = float(read.sum())
        """Share of the attention that is on points which land in an image."""
        self.read = read / max(self.effective, 1e-9)  # (K, N, L)
        self.greatest = max(float(self.read.sum(-1).max()), 1e-9)
        self.places = sampling.location[query] * sample.image_wh  # (K, N, 2)
        self.learnt = sampling.learnt
        self.before = sampling.anchors[query : query + 1]
        self.after = decode_boxes(output.anchors[-1][0, query : query + 1].float().cpu().numpy())
        scores = output.logits[-1][0, query].float().sigmoid().cpu().numpy()
        self.color = class_color(int(scores.argmax()))
        kind = sample.class_names[scores.argmax()].replace("_", " ")
        self.what = f"a {kind} {np.hypot(*self.after[0, :2]):.0f} m away, found with a score of {scores.max():.2f}"

    def draw(self, axes: Axes, camera: int, shares: np.ndarray, size: float) -> None:
        """Its boxes, and its key points in an image: the larger and lighter, the more attention is on them."""
        projection = self.sample.projection[camera]
        draw_wires(axes, self.before, TRUE, projection, self.sample, 0.9, (0, (4, 3)))
        draw_wires(axes, self.after, self.color, projection, self.sample, 1.4)
        for learnt, marker in ((False, "o"), (True, "D")):
            which = np.flatnonzero(self.lands[:, camera] & (self.learnt == learnt))
            which = which[np.argsort(-shares[which])]  # the small ones lie on top
            value = shares[which] / self.greatest
            axes.scatter(
                *self.places[which, camera].T, s=size * value.clip(0.03), c=value, cmap=SHADES, vmin=0, vmax=1,
                marker=marker, edgecolors="black", linewidths=0.8, zorder=6,
            )  # fmt: skip

    def window(self, camera: int, aspect: float) -> tuple[tuple[float, float], tuple[float, float]]:
        """Limits in x and y around what of it is in an image."""
        size = np.array(self.sample.image_wh)
        wires = wire_segments(
            np.concatenate([self.before, self.after]), self.sample.projection[camera], self.sample.image_wh
        )
        ends = wires[~np.isnan(wires).any((2, 3))].reshape(-1, 2).clip(0, size)
        ends = np.concatenate([ends, self.places[self.lands[:, camera], camera]])
        middle, half = (ends.max(0) + ends.min(0)) / 2, np.ptp(ends, axis=0) / 2 * 1.25 + 0.01 * size[0]
        half = np.array([max(half[0], half[1] * aspect), max(half[1], half[0] / aspect)])
        half *= min(1, *(size / 2 / half))  # no farther than the image goes
        middle = middle.clip(half, size - half)
        (left, top), (right, bottom) = middle - half, middle + half
        return (left, right), (bottom, top)


def _draw_cells(axes: Axes, sample: Sample, cells: tuple[int, int]) -> None:
    """The borders of a feature map's cells."""
    width, height = sample.image_wh
    axes.vlines(np.linspace(0, width, cells[0] + 1), 0, height, colors="white", lw=0.6, alpha=0.22)
    axes.hlines(np.linspace(0, height, cells[1] + 1), 0, width, colors="white", lw=0.6, alpha=0.22)


def _explain(canvas: Canvas, shown: _Query, top: float, line: float) -> None:
    """What is to be seen."""
    shares = [share for share in (0.01, 0.05, 0.1, 0.2, 0.4, 0.8) if share <= 1.2 * shown.greatest]
    handles: list[Any] = [
        Line2D([], [], color=shown.color, lw=1.6, label="box after this decoder layer"),
        Line2D([], [], color=TRUE, lw=1.1, ls=(0, (4, 3)), label="box before it, on which the points lie"),
        Line2D([], [], ls="", marker="o", mfc="none", mec=INK, ms=8, label="fixed point"),
        Line2D([], [], ls="", marker="D", mfc="none", mec=INK, ms=7, label="point that the network places"),
        *(
            Line2D(
                [], [], ls="", marker="o", ms=(420 * share / shown.greatest) ** 0.5, mec="black", label=f"{share:.0%}",
                mfc=SHADES(share / shown.greatest),
            )
            for share in shares
        ),
    ]  # fmt: skip
    canvas.legend(GAP, top, [handles])
    points, cameras, levels = shown.read.shape
    text = (
        f"A query stands for one box. It projects {points} key points of that box into all {cameras} cameras, reads "
        f"the feature maps there, at {levels} levels, between the centres of their cells (white grid), and adds up "
        "what it reads by weights that it computes itself. Percentages, and the sizes and colours of the dots, are "
        "shares of what it reads: in the upper images of all levels together, below of each level. "
        f"Of its weights {shown.effective:.0%} are on points that land in an image; the others count for nothing."
    )
    canvas.write(GAP, top + 1.5 * line, textwrap.fill(text, 200), 11, "#c5ccd4", linespacing=1.5)
