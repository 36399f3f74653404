"""How training went: curves of losses and recall, and an animation of what was found in one sample."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from PIL import Image

from saccade_demo.evaluation import MIN_SCORE, Counts, Detections, match
from saccade_demo.geometry import Sample
from saccade_demo.pictures.plots import (
    FAINT,
    GAP,
    Canvas,
    camera_panels,
    class_color,
    draw_boxes,
    legend_rows,
    panel_height,
    score_line,
    show_from_above,
)

LINES = ("#d55e00", "#0072b2", "#009e73", "#cc79a7")
"""Curves on white, of the palette of Okabe and Ito."""
COLORS = 192
"""Of the animation."""


def draw_curves(
    path: Path,
    losses: Mapping[str, Sequence[float]],
    judged: Mapping[int, Counts],
    few: str,
    final: Mapping[str, Counts],
) -> None:
    """Losses, every step faint and a running mean in full; beside them recall and precision.

    Args:
        path: PNG file to write.
        losses: By name, `total` among them.
        judged: Counts on a few held-out samples by step, as far as they were evaluated while training.
        few: What these samples are.
        final: Counts on all held-out samples: "untrained", "trained" and "control".
    """
    canvas = Canvas(1400, 560, "white")
    steps = len(losses["total"])
    window = max(1, min(25, steps // 8))
    axes = _chart(canvas, 70, steps, f"Training losses: faint each step, in full the mean of {window}")
    axes.set(yscale="log")
    ends = []
    for index, (name, values) in enumerate(losses.items()):
        color = "#111111" if name == "total" else LINES[index % len(LINES)]
        smooth = np.convolve(values, np.ones(window) / window, mode="valid")
        axes.plot(np.arange(1, steps + 1), values, color=color, alpha=0.18, lw=0.8)
        axes.plot(np.arange(window, steps + 1), smooth, color=color, lw=2.4 if name == "total" else 1.6)
        ends.append((float(smooth[-1]), f"{name} {smooth[-1]:.2f}", color))
    low, high = (np.log10(limit) for limit in axes.get_ylim())
    _label_ends(axes, [((np.log10(max(v, 1e-9)) - low) / (high - low), text, color) for v, text, color in ends])

    axes = _chart(canvas, 790, steps, f"What is found: recall and precision at 2 m, scores from {MIN_SCORE}")
    axes.set(ylim=(-0.03, 1.03), yticks=np.linspace(0, 1, 6))
    ends = []
    for kind, color, style, marker in (("recall", LINES[1], "-", "o"), ("precision", LINES[0], "--", "s")):
        at = sorted(judged)
        axes.plot(
            at, [getattr(judged[step], kind) for step in at], color=color, ls=style, marker=marker, ms=4, lw=1.6,
            clip_on=False, label=f"{kind}, {few}",
        )  # fmt: skip
        trained = getattr(final["trained"], kind)
        axes.plot([steps], [trained], color=color, marker=marker, ms=10, ls="", clip_on=False, zorder=5)
        ends.append((trained, f"{kind} {trained:.2f}", color))
    axes.plot([0], [final["untrained"].recall], color=LINES[1], marker="o", ms=10, mfc="white", clip_on=False, zorder=5)
    control = final["control"].recall
    axes.plot([steps], [control], color=LINES[2], marker="D", ms=9, ls="", clip_on=False, zorder=5)
    ends.append((control, f"control {control:.2f}", LINES[2]))
    _label_ends(axes, [((value + 0.03) / 1.06, text, color) for value, text, color in ends])
    large = f"large marks: all held-out samples ({final['trained'].boxes} boxes); control: recall, images exchanged"
    canvas.write(790, 520, large, 9.5, "#444b52")
    if judged:
        axes.legend(frameon=False, loc="upper left", fontsize=10)
    canvas.save(path)


def _chart(canvas: Canvas, left: float, steps: int, title: str) -> Axes:
    axes = canvas.panel(left, 46, 480, 414)
    axes.set_title(title, fontsize=11.5, loc="left", pad=8)
    axes.set(xlim=(0, steps), xlabel="step")
    axes.tick_params(labelsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.grid(True, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _label_ends(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Names of curves at the right of a chart: at which share of its height, what, and colour; moved up if too near."""
    last = -1.0
    for height, text, color in sorted(ends):
        last = max(height, last + 22 / axes.bbox.height)
        axes.text(1.025, last, text, transform=axes.transAxes, color=color, fontsize=11, va="center")


def draw_progress(path: Path, sample: Sample, snapshots: Mapping[int, Detections], name: str) -> None:
    """An animated GIF of what was found in one sample as training went on.

    Args:
        path: GIF file to write.
        sample: Images of any size, with matching projection matrices.
        snapshots: What was found, by the number of steps made; what scores low is drawn faint.
        name: What the sample is, for the title.
    """
    counts = {step: match(found, sample.boxes, sample.labels) for step, found in snapshots.items()}
    frames = [_frame(sample, snapshots, counts, step, name) for step in sorted(snapshots)]
    # One palette for all and no dithering: what does not change from frame to frame then costs nothing.
    width, height = frames[0].size
    montage = Image.new("RGB", (width, 2 * height))
    montage.paste(frames[0], (0, 0))
    montage.paste(frames[-1], (0, height))
    palette = montage.quantize(COLORS, method=Image.Quantize.FASTOCTREE)  # keeps colours that are rare, of thin lines
    first, *others = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames)
    durations = [700] * len(others) + [3500]
    first.save(path, save_all=True, append_images=others, duration=durations, loop=0, optimize=True)


def _frame(
    sample: Sample, snapshots: Mapping[int, Detections], counts: Mapping[int, Counts], step: int, name: str
) -> Image.Image:
    width, plan = 960, 372
    bottom = GAP + panel_height(sample, width - 2 * GAP)
    canvas = Canvas(width, bottom + plan + 2 * GAP)
    panels = camera_panels(canvas, sample, GAP, GAP, width - 2 * GAP)
    found = snapshots[step]
    for camera, axes in panels.items():
        draw_boxes(axes, sample, found, sample.projection[camera], 1.9, 1.1)
    show_from_above(canvas.panel(GAP, bottom + GAP, plan, plan), sample, found, 6, named=False)

    left = plan + 6 * GAP
    canvas.write(left, bottom + 24, f"after {step} steps", 24)
    now = counts[step]
    canvas.write(left, bottom + 70, score_line(now).replace(", ", "\n"), 14, linespacing=1.4)
    axes = canvas.panel(left + 34, bottom + 136, width - left - 34 - 110, 104)
    shown = sorted(s for s in counts if s <= step)
    ends = []
    for kind, color, style in (("recall", "#56b4e9", "-"), ("precision", "#ff9f1c", "--")):
        values = [getattr(counts[s], kind) for s in shown]
        ends.append(((values[-1] + 0.03) / 1.06, kind, color))
        axes.plot(shown, values, color=color, ls=style, lw=2)
        axes.plot(shown[-1:], values[-1:], color=color, marker="o", ms=6, clip_on=False)
    _label_ends(axes, ends)
    axes.set(xlim=(0, max(1, *counts)), ylim=(-0.03, 1.03), xlabel="step", yticks=[0, 0.5, 1])
    axes.xaxis.label.set_color(FAINT)
    axes.tick_params(colors=FAINT, labelsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(FAINT)
    told = (
        f"White: true boxes ({name}). Coloured: predictions,\nthin where the score is below {MIN_SCORE}: not counted."
    )
    canvas.write(left, bottom + plan - 80, told, 10, FAINT, linespacing=1.4)
    labels = {int(k) for known in (sample, *snapshots.values()) for k in known.labels if k >= 0}
    kinds = [Patch(color=class_color(k), label=sample.class_names[k].replace("_", " ")) for k in sorted(labels)]
    canvas.legend(left, bottom + plan - 34, legend_rows(kinds, width - left, 10), 10)
    return canvas.image()
