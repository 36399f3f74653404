"""One run of the demo: checks, training under a progress bar, evaluation, pictures, and the closing table."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import saccade
from saccade.demo import DemoError
from saccade.demo.evaluation import MIN_SCORE, Counts
from saccade.demo.model import Detector, DetectorConfig
from saccade.demo.plots import draw_birds_eye, draw_cameras, draw_heatmaps, draw_losses
from saccade.demo.scene import IMAGE_WH
from saccade.demo.train import RealFrame, RenderedScenes, Trainer, heatmap_target
from saccade.doctor import backend

OPERATORS = ("deformable_aggregation", "focal_loss", "gaussian_focal_loss", "gaussian_heatmap")
HELD_OUT = 32
LAST = 10
"""The last value of a loss is its mean over so many steps: a single one depends on its scene."""
PICTURE_SCALE = 3


@dataclass(frozen=True)
class DemoOptions:
    """What the user asked for; the fields are the options of `saccade demo`."""

    steps: int
    seed: int
    frame: Path | None
    device: str
    amp: str
    out: Path
    held_out: int = HELD_OUT


def run_demo(options: DemoOptions, console: Console | None = None) -> dict[str, Any]:
    """Train, evaluate, draw, and print the closing table.

    Returns:
        The closing table as JSON-ready values, loss curves included.

    Raises:
        DemoError: An option cannot be fulfilled.
    """
    console = console or Console()
    steps = options.steps
    if steps < 1:
        raise DemoError(f"--steps: expected at least 1, got {steps}")
    device = _checked_device(options.device, options.amp)
    torch.manual_seed(options.seed)
    with console.status("Rendering the held-out scenes" if options.frame is None else "Reading the frame"):
        source = RenderedScenes(options.seed, options.held_out) if options.frame is None else RealFrame(options.frame)
    model = Detector(DetectorConfig(num_classes=len(source.class_names), num_cams=source.num_cams))
    trainer = Trainer(source, model, device, options.amp)
    trained_on = "rendered scenes" if options.frame is None else source.name
    console.print(
        f"Training a detector of {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters from scratch "
        f"on {trained_on}, on {options.device}."
    )

    def evaluated(what: str, exchange_images: bool = False) -> Counts:
        with _progress(console, what, len(source.held_out)) as (progress, task):
            return trainer.evaluate(exchange_images=exchange_images, done=lambda: progress.advance(task))

    untrained = evaluated("Evaluating, untrained")
    started = time.perf_counter()
    losses: dict[str, list[float]] = {}
    ends = [started]
    with _progress(console, "Training", steps) as (progress, task):
        for step in trainer.train(steps, options.seed):
            ends.append(time.perf_counter())
            for name, value in step.items():
                losses.setdefault(name, []).append(value)
            shown = "  ".join(f"{name} {mean(values[-LAST:]):.2f}" for name, values in losses.items())
            progress.update(task, advance=1, note=shown)
    seconds = ends[-1] - started
    trained = evaluated("Evaluating, trained")
    control = evaluated("Evaluating, images exchanged", exchange_images=True)
    with console.status("Drawing pictures"):
        pictures = _draw(trainer, options, losses)

    report = {
        "recall_at_2m": trained.recall,
        "precision": trained.precision,
        "untrained_recall": untrained.recall,
        "control_recall": control.recall,
        "boxes": trained.boxes,
        "samples": {"trained_on": steps if options.frame is None else 1, "evaluated_on": len(source.held_out)},
        "source": "rendered scenes" if options.frame is None else str(options.frame),
        "steps": steps,
        "seconds": seconds,
        "step_ms": 1e3 * median(end - begin for begin, end in pairwise(ends)),
        "losses": {
            name: {"first": values[0], "last": mean(values[-LAST:]), "curve": [round(value, 5) for value in values]}
            for name, values in losses.items()
        },
        "device": str(device) if device.type == "cpu" else f"{device} ({torch.cuda.get_device_name(device)})",
        "amp": options.amp,
        "seed": options.seed,
        "backends": {name: backend(name, device.type) for name in OPERATORS},
        "pictures": [str(picture) for picture in pictures],
        "versions": {"saccade": saccade.__version__, "torch": torch.__version__},
    }
    _print_table(console, report)
    return report


def _checked_device(name: str, amp: str) -> torch.device:
    if amp not in ("off", "bf16", "fp16"):
        raise DemoError(f"--amp: expected off, bf16 or fp16, got {amp!r}")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DemoError(f"--device: expected cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise DemoError(f"--device: expected cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise DemoError(f"--device {name}: torch {torch.__version__} finds no GPU; `saccade doctor` tells more")
        if (device.index or 0) >= torch.cuda.device_count():
            raise DemoError(f"--device {name}: there are {torch.cuda.device_count()} GPUs, counted from 0")
    elif amp == "fp16":
        raise DemoError("--amp fp16 needs a GPU; on the CPU use bf16")
    return device


@contextmanager
def _progress(console: Console, what: str, total: int) -> Iterator[tuple[Progress, Any]]:
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
        console=console,
    )
    with progress:
        yield progress, progress.add_task(what, total=total, note="")


def _draw(trainer: Trainer, options: DemoOptions, losses: dict[str, list[float]]) -> list[Path]:
    """The pictures, of one of the evaluated samples."""
    source = trainer.source
    sample, large = source.shown((PICTURE_SCALE * IMAGE_WH[0], PICTURE_SCALE * IMAGE_WH[1]))
    detections, batch, output = trainer.detect(sample)
    detections = detections.chosen(detections.scores >= MIN_SCORE)
    counts = trainer.counted(detections, sample)
    cameras = len(sample.camera_names)
    target = heatmap_target(batch, output.heatmap.shape)[:cameras].cpu().numpy()
    predicted = output.heatmap[:cameras].float().sigmoid().cpu().numpy()
    pictures = [options.out / name for name in ("cameras.png", "birds_eye.png", "heatmaps.png", "losses.png")]
    draw_cameras(pictures[0], large, detections, counts, source.name)
    draw_birds_eye(pictures[1], sample, detections, counts, source.name)
    draw_heatmaps(pictures[2], large, target, predicted, source.name)
    draw_losses(pictures[3], losses)
    return pictures


def _print_table(console: Console, report: dict[str, Any]) -> None:
    table = Table(
        title="What the detector learnt",
        title_justify="left",
        caption=f"Losses: of the first step → mean of the last {min(LAST, report['steps'])}.",
        caption_justify="left",
        show_header=False,
    )
    table.add_column(style="bold")
    table.add_column()
    scenes = report["samples"]
    where = f"{report['boxes']} boxes in {scenes['evaluated_on']} " + (
        "held-out scenes" if report["source"] == "rendered scenes" else "frame, the one it was trained on"
    )
    if report["boxes"]:
        table.add_row("recall at 2 m", f"[green]{report['recall_at_2m']:.3f}[/]  of {where}")
        table.add_row("precision", f"[green]{report['precision']:.3f}[/]  at scores from {MIN_SCORE}")
        table.add_row("untrained recall", f"{report['untrained_recall']:.3f}  before the first step")
        table.add_row("control recall", f"{report['control_recall']:.3f}  with the cameras' images exchanged")
    else:
        table.add_row("recall at 2 m", "there are no boxes to be found")
    table.add_section()
    for name, loss in report["losses"].items():
        style = "bold" if name == "total" else ""
        change = loss["last"] / loss["first"] - 1 if loss["first"] else math.nan
        table.add_row(
            f"{name} loss", f"[{style or 'none'}]{loss['first']:.3f} → {loss['last']:.3f}[/]  ({change:+.0%})"
        )
    table.add_section()
    count = f"{scenes['trained_on']} scenes, each seen once" if report["source"] == "rendered scenes" else "one frame"
    table.add_row("steps", f"{report['steps']} in {report['seconds']:.1f} s, on {count}")
    table.add_row("step time", f"{report['step_ms']:.1f} ms (median)")
    table.add_row("device", f"{report['device']}, mixed precision {report['amp']}, seed {report['seed']}")
    table.add_row("operators", "\n".join(f"{name}: {by}" for name, by in report["backends"].items()))
    table.add_section()
    table.add_row("pictures", "\n".join(report["pictures"]))
    console.print(table)
