"""One run of the demo: checks, training under a progress bar, evaluation, pictures, and the closing table."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import saccade
from saccade.doctor import backend
from saccade_demo import DemoError
from saccade_demo.data.nuscenes import DEFAULT_VERSION, NuScenesScenes
from saccade_demo.data.source import RealFrame, RenderedScenes, Source
from saccade_demo.evaluation import MIN_SCORE, Counts, Detections, to_be_found
from saccade_demo.geometry import Sample
from saccade_demo.model import Detector, DetectorConfig
from saccade_demo.pictures.plots import draw_birds_eye, draw_cameras, draw_heatmaps
from saccade_demo.pictures.progress import draw_curves, draw_progress
from saccade_demo.pictures.sampling import draw_sampling, recorded, telling_query
from saccade_demo.rendering.scene import IMAGE_WH
from saccade_demo.training.checkpoint import Checkpoint, interrupt_noted
from saccade_demo.training.distribution import Ranks, chosen_algorithms
from saccade_demo.training.journal import Journal, require_tensorboard
from saccade_demo.training.loss import heatmap_target
from saccade_demo.training.recipe import LEARNING_RATE, Recipe
from saccade_demo.training.stream import VIEWS_APART, num_samples
from saccade_demo.training.trainer import Told, Trainer

OPERATORS = ("deformable_aggregation", "focal_loss", "gaussian_focal_loss", "gaussian_heatmap")
HELD_OUT = 32
LAST = 10
"""The last value of a loss is its mean over so many steps: a single one depends on its scene."""
PICTURE_SCALE = 3
CURVE_SAMPLES = 8
"""Held-out samples that are evaluated while training, for the recall curve."""
SNAPSHOTS = 12
"""Moments of the training at which detections in the pictured sample are kept for the animation."""
SNAPSHOT_SCORE = 0.25
"""Detections of lower scores are not shown there."""
WARM_UP = 10
"""Steps that the throughput leaves out, if there are twice as many: the first ones compile and fill buffers.

With several views it leaves out those in which all scenes are new, likewise.
"""
GPU_BATCH = 16
"""Scenes of a step for each GPU, where nothing else is wanted: one alone leaves it idle most of the time."""
GPU_VIEWS = 4
"""How often a rendered scene is learnt from there, likewise: a GPU learns faster than its host renders."""


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
    nuscenes: Path | None = None
    version: str | None = None
    scenes: tuple[str, ...] | None = None
    evaluate: Path | None = None
    batch: int | None = None
    micro_batch: int | None = None
    learning_rate: float = LEARNING_RATE
    views: int | None = None
    compiled: bool = False
    deterministic: bool = False
    checkpoint: Path | None = None
    checkpoint_every: int = 50
    curve_every: int | None = None
    tensorboard: Path | None = None


@dataclass
class History:
    """What a run, resumed or not, has seen so far."""

    untrained: Counts
    losses: dict[str, list[float]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    """Of each step."""
    waiting: list[float] = field(default_factory=list)
    """Seconds of each step in which there were no samples to learn from."""
    judged: dict[int, Counts] = field(default_factory=dict)
    """On a few held-out samples, by the number of steps made."""
    snapshots: dict[int, list[list[float]]] = field(default_factory=dict)
    """What is found in the pictured sample, by the number of steps made: rows of a box, its score and its class."""


def run_demo(options: DemoOptions, console: Console | None = None) -> dict[str, Any]:
    """Train, evaluate, draw, and print the closing table.

    Under torchrun, all its processes train together; the first one saves, draws and prints.

    Returns:
        The closing table as JSON-ready values, loss curves included.

    Raises:
        DemoError: An option cannot be fulfilled.
    """
    ranks = Ranks.from_environment()
    console = console or Console(quiet=ranks.index > 0)
    device = _checked_device(options.device, options.amp, ranks)
    recipe = _checked_recipe(options, device, ranks)
    with chosen_algorithms(options.deterministic), ranks.joined(device):
        return _run(options, recipe, device, ranks, console)


def _run(options: DemoOptions, recipe: Recipe, device: torch.device, ranks: Ranks, console: Console) -> dict[str, Any]:
    steps = recipe.steps
    checkpoint = saved = None
    if options.checkpoint is not None:
        checkpoint = Checkpoint(options.checkpoint, _what_it_is(options, recipe))
        saved = ranks.from_first(checkpoint.load)
    torch.manual_seed(options.seed)
    source = _source(options, console)
    model = Detector(DetectorConfig(num_classes=len(source.class_names), num_cams=source.num_cams))
    trainer = Trainer(source, model, device, recipe, ranks)
    console.print(
        f"Training a detector of {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters from scratch "
        f"on {source.trained_on}, on {options.device}" + (f" in {ranks.count} processes." if ranks.count > 1 else ".")
    )

    def evaluated(
        what: str, exchange_images: bool = False, look: Callable[[Sample], None] = lambda sample: None
    ) -> Counts:
        with _progress(console, what, len(range(ranks.index, len(source.held_out), ranks.count))) as (progress, task):

            def done(sample: Sample) -> None:
                progress.advance(task)
                look(sample)

            return trainer.evaluate(exchange_images=exchange_images, done=done)

    history = None
    if saved is not None:
        history = _resumed(saved, trainer, checkpoint)
        console.print(f"Resumed after {trainer.step} of {steps} steps.")
    resumed_at = trainer.step
    journal = Journal(options.tensorboard if ranks.index == 0 else None, resumed_at)
    if history is None:
        history = History(evaluated("Evaluating, untrained"))
        journal.evaluation(0, "untrained", history.untrained)
    _train(trainer, history, checkpoint, journal, options, console)
    distances: list[np.ndarray] = []
    trained = evaluated("Evaluating, trained", look=lambda sample: distances.append(distances_to_find(sample)))
    control = evaluated("Evaluating, images exchanged", exchange_images=True)
    journal.evaluation(trainer.step, "trained", trained)
    journal.evaluation(trainer.step, "control", control)
    journal.close()
    pictures: list[Path] = []
    benchmark = {}
    if ranks.index == 0:
        with console.status("Drawing pictures"):
            pictures = _draw(trainer, options, history, trained, control)
        if options.evaluate is not None and isinstance(source, NuScenesScenes):
            benchmark = {"nuscenes": _benchmark(trainer, source, options.evaluate, console)}

    samples = num_samples(recipe, trainer.step)
    seconds, waiting = (
        _steady(of_steps[resumed_at:] or of_steps, recipe) for of_steps in (history.seconds, history.waiting)
    )
    report = {
        "recall_at_2m": trained.recall,
        "precision": trained.precision,
        "untrained_recall": history.untrained.recall,
        "control_recall": control.recall,
        "boxes": trained.boxes,
        **density_and_range(ranks.from_all(distances)),
        "samples": {
            "trained_on": min(samples, source.training_samples or math.inf),
            "evaluated_on": len(source.held_out),
        },
        "source": str(options.nuscenes or options.frame or "rendered scenes"),
        "trained_on": source.trained_on if source.training_samples else f"{samples} {source.trained_on}",
        "evaluated_on": source.evaluated_on,
        **benchmark,
        "steps": trainer.step,
        "interrupted": trainer.step < steps,
        "resumed_at": resumed_at,
        "seconds": sum(history.seconds),
        "step_ms": 1e3 * median(seconds),
        "scenes_per_second": recipe.batch * len(seconds) / sum(seconds),
        "waiting_share": sum(waiting) / sum(seconds),
        "batch": recipe.batch,
        "micro_batch": recipe.micro_batch,
        "learning_rate": recipe.learning_rate,
        "views": recipe.views,
        "ranks": ranks.count,
        "losses": {
            name: {"first": values[0], "last": mean(values[-LAST:]), "curve": [round(value, 5) for value in values]}
            for name, values in history.losses.items()
        },
        "curve": {
            step: {"recall_at_2m": counts.recall, "precision": counts.precision, "boxes": counts.boxes}
            for step, counts in history.judged.items()
        },
        "device": str(device) if device.type == "cpu" else f"{device} ({torch.cuda.get_device_name(device)})",
        "amp": options.amp,
        "compiled": options.compiled,
        "deterministic": options.deterministic,
        "seed": options.seed,
        "backends": {name: backend(name, device.type) for name in OPERATORS},
        "pictures": [str(picture) for picture in pictures],
        "versions": {"saccade": saccade.__version__, "torch": torch.__version__},
    }
    _print_table(console, report)
    return report


def _train(
    trainer: Trainer,
    history: History,
    checkpoint: Checkpoint | None,
    journal: Journal,
    options: DemoOptions,
    console: Console,
) -> None:
    """Make the steps that are left, or those until Ctrl-C."""
    saved_at = trainer.step
    steps = trainer.recipe.steps
    judged_every = max(1, steps // 10) if options.curve_every is None else options.curve_every
    shown = trainer.source.held_out[0]
    kept = snapshot_steps(steps) if trainer.ranks.index == 0 else set()

    def is_judged(step: int) -> bool:
        return judged_every > 0 and step % judged_every == 0

    def is_looked_at(step: int) -> bool:
        return step in kept or is_judged(step)

    def is_saved(step: int) -> bool:
        return checkpoint is not None and step % options.checkpoint_every == 0

    def look(step: int) -> None:
        """See how far training has come. Nothing of it is changed by that."""
        if step in kept:
            history.snapshots[step] = _snapshot(trainer.detect(shown)[0])
        if is_judged(step):
            history.judged[step] = trainer.evaluate(first=CURVE_SAMPLES)
            journal.evaluation(step, "curve", history.judged[step])

    def save() -> None:
        nonlocal saved_at
        if checkpoint is not None and trainer.ranks.index == 0 and saved_at < trainer.step:
            checkpoint.save({"trainer": trainer.state_dict(), "history": asdict(history)})
            saved_at = trainer.step
            journal.flush()

    def say() -> None:
        console.print("Interrupted: this step is the last one. Ctrl-C again ends at once.")

    with (
        _progress(console, "Training", steps, trainer.step) as (progress, task),
        interrupt_noted(say) as interrupted,
    ):
        if trainer.step == 0:
            look(0)

        def note(told: Told) -> None:
            losses = told.losses()
            for name, value in losses.items():
                history.losses.setdefault(name, []).append(value)
            journal.step(told.step, losses, told.learning_rate, history.seconds[told.step - 1])
            latest = "  ".join(f"{name} {mean(values[-LAST:]):.2f}" for name, values in history.losses.items())
            progress.update(task, advance=1, note=latest)

        unread: deque[Told] = deque()
        before = time.perf_counter()
        for told in trainer.train(interrupted):
            pauses = is_looked_at(told.step) or is_saved(told.step)
            if pauses:
                for one in (*unread, told):
                    one.losses()  # the device, too, is then done with the step
            now = time.perf_counter()
            history.seconds.append(now - before)
            history.waiting.append(told.waited)
            unread.append(told)
            # Those of the step that was last begun are left for later: the device need not be done with it.
            while len(unread) > (0 if pauses else 1):
                note(unread.popleft())
            look(told.step)
            if is_saved(told.step):
                save()
            before = time.perf_counter()
        for told in unread:
            note(told)
        save()


def snapshot_steps(steps: int) -> set[int]:
    """Before training, after the last step, and in between the farther apart the later, when less changes."""
    return {0, *np.geomspace(max(1, steps / 10), steps, SNAPSHOTS).round().astype(int).tolist()}


def _snapshot(detections: Detections) -> list[list[float]]:
    """As numbers that a checkpoint may hold."""
    kept = detections.chosen(detections.scores >= SNAPSHOT_SCORE)
    return np.column_stack([kept.boxes, kept.scores, kept.labels]).tolist()


def _from_snapshot(rows: list[list[float]]) -> Detections:
    numbers = np.array(rows).reshape(-1, 9)
    return Detections(numbers[:, :7], numbers[:, 7], numbers[:, 8].astype(int))


def _resumed(saved: dict[str, Any], trainer: Trainer, checkpoint: Checkpoint | None) -> History:
    """Put the trainer where it was when it was saved."""
    try:
        trainer.load_state_dict(saved["trainer"])
        history = dict(saved["history"])
        judged = {step: Counts(**counts) for step, counts in history.pop("judged", {}).items()}
        return History(Counts(**history.pop("untrained")), judged=judged, **history)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise DemoError(f"--checkpoint {checkpoint and checkpoint.file}: is of another detector") from error


def _what_it_is(options: DemoOptions, recipe: Recipe) -> dict[str, Any]:
    """What the losses of a run depend on, by option."""
    return {
        "--steps": recipe.steps,
        "--seed": recipe.seed,
        "--batch": recipe.batch,
        "--micro-batch": recipe.micro_batch,
        "--learning-rate": recipe.learning_rate,
        "--views": recipe.views,
        "--amp": recipe.amp,
        "--frame": options.frame and str(options.frame.resolve()),
        "--nuscenes": options.nuscenes and str(options.nuscenes.resolve()),
        "--version": options.version or (options.nuscenes and DEFAULT_VERSION),
        "--scenes": options.scenes and ",".join(sorted(set(options.scenes))),
    }


def _steady(of_steps: list[float], recipe: Recipe) -> list[float]:
    all_new = VIEWS_APART if recipe.views > 1 else 0
    return of_steps[max(steps for steps in (0, WARM_UP, all_new) if len(of_steps) >= 2 * steps) :]


def distances_to_find(sample: Sample) -> np.ndarray:
    """How far away those boxes of a sample are that are to be found, in metres in the ground plane."""
    x, y = sample.boxes[to_be_found(sample.boxes, sample.labels), :2].T
    return np.hypot(x, y)


def density_and_range(distances: list[list[np.ndarray]]) -> dict[str, Any]:
    """Of the boxes to be found: how many there are in a scene, and how far away they are.

    Args:
        distances: What each process has seen: of each of its scenes the distances of its boxes.
    """
    scenes = [scene for seen in distances for scene in seen]
    number, meters = [len(scene) for scene in scenes], np.concatenate(scenes)
    return {
        "objects_per_scene": {"min": min(number), "mean": mean(number), "max": max(number)},
        "range_m": {"min": float(meters.min()), "max": float(meters.max())} if len(meters) else None,
    }


def _source(options: DemoOptions, console: Console) -> Source:
    if options.nuscenes is None:
        for option in ("version", "scenes", "evaluate"):
            if getattr(options, option) is not None:
                raise DemoError(f"--{option} needs --nuscenes")
        if options.frame is None:
            with console.status("Rendering the held-out scenes"):
                return RenderedScenes(options.seed, options.held_out)
        with console.status("Reading the frame"):
            return RealFrame(options.frame)
    if options.frame is not None:
        raise DemoError("--frame and --nuscenes: expected one of them, got both")
    with console.status("Reading the tables of nuScenes"):
        return NuScenesScenes(options.nuscenes, options.version or DEFAULT_VERSION, options.scenes, options.seed)


def _benchmark(trainer: Trainer, source: NuScenesScenes, path: Path, console: Console) -> dict[str, Any]:
    """Write what is detected in the held-out key frames to a file, and judge it as nuScenes does."""

    def detections() -> Iterator[Detections]:
        with _progress(console, "Writing the results", len(source.held_out)) as (progress, task):
            for _, found in trainer.detections(source.held_out):
                yield found
                progress.advance(task)

    source.write_results(path, detections())
    with console.status("Evaluating as nuScenes does"):
        metrics = source.official_metrics(path)
    return {"results": str(path), "metrics": metrics}


def _checked_recipe(options: DemoOptions, device: torch.device, ranks: Ranks) -> Recipe:
    batch = options.batch
    if batch is None:
        batch = ranks.count * (GPU_BATCH if device.type == "cuda" else 1)
    if options.steps < 1:
        raise DemoError(f"--steps: expected at least 1, got {options.steps}")
    if batch < 1 or batch % ranks.count:
        expected = "at least 1" if ranks.count == 1 else f"a multiple of {ranks.count}, the number of processes"
        raise DemoError(f"--batch: expected {expected}, got {batch}")
    share = batch // ranks.count
    micro_batch = share if options.micro_batch is None else options.micro_batch
    if micro_batch < 1 or share % micro_batch:
        raise DemoError(f"--micro-batch: expected a divisor of {share}, the scenes of a process, got {micro_batch}")
    views = options.views
    if views is None:
        is_rendered = options.frame is None and options.nuscenes is None
        views = math.gcd(micro_batch, GPU_VIEWS) if device.type == "cuda" and is_rendered else 1
    if views < 1 or micro_batch % views:
        raise DemoError(f"--views: expected a divisor of {micro_batch}, the scenes of a forward pass, got {views}")
    if not 0 < options.learning_rate < math.inf:
        raise DemoError(f"--learning-rate: expected a positive number, got {options.learning_rate}")
    if options.tensorboard is not None:
        require_tensorboard()
    return Recipe(
        options.steps,
        options.seed,
        batch=batch,
        micro_batch=micro_batch,
        views=views,
        amp=options.amp,
        compiled=options.compiled,
        learning_rate=options.learning_rate,
    )


def _checked_device(name: str, amp: str, ranks: Ranks) -> torch.device:
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
        if ranks.count > 1:
            if device.index is not None:
                raise DemoError(f"--device {name}: expected cpu or cuda, for every process takes a GPU of its own")
            if ranks.local_count > torch.cuda.device_count():
                raise DemoError(
                    f"--device {name}: {ranks.local_count} processes want a GPU each, there are "
                    f"{torch.cuda.device_count()}"
                )
            device = torch.device("cuda", ranks.local_index)
        elif device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        torch.cuda.set_device(device)  # page-locked memory is that of the current one
    elif amp == "fp16":
        raise DemoError("--amp fp16 needs a GPU; on the CPU use bf16")
    return device


@contextmanager
def _progress(console: Console, what: str, total: int, completed: int = 0) -> Iterator[tuple[Progress, Any]]:
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
        yield progress, progress.add_task(what, total=total, completed=completed, note="")


def _draw(trainer: Trainer, options: DemoOptions, history: History, trained: Counts, control: Counts) -> list[Path]:
    """The pictures, of one of the evaluated samples."""
    source = trainer.source
    sample, large = source.shown((PICTURE_SCALE * IMAGE_WH[0], PICTURE_SCALE * IMAGE_WH[1]))
    with recorded(trainer.model) as recorder:
        found, batch, output = trainer.detect(sample)
    sampling = recorder.sampling()
    snapshots = {step: _from_snapshot(rows) for step, rows in history.snapshots.items()}
    snapshots[trainer.step] = _from_snapshot(_snapshot(found))  # interrupted, it is at none of the steps foreseen
    found = found.chosen(found.scores >= MIN_SCORE)
    counts = trainer.counted(found, sample)
    cameras = len(sample.camera_names)
    target = heatmap_target(batch, output.heatmap.shape)[:cameras].cpu().numpy()
    predicted = output.heatmap[:cameras].float().sigmoid().cpu().numpy()
    names = ("cameras.png", "birds_eye.png", "sampling.png", "heatmaps.png", "curves.png", "progress.gif")
    pictures = [options.out / name for name in names]
    draw_cameras(pictures[0], large, found, counts, source.name)
    draw_birds_eye(pictures[1], sample, found, counts, source.name)
    draw_sampling(pictures[2], large, output, sampling, telling_query(output, sampling, found.boxes), source.name)
    draw_heatmaps(pictures[3], large, target, predicted, source.name)
    few = source.evaluated_on if len(source.held_out) <= CURVE_SAMPLES else f"{CURVE_SAMPLES} of {source.evaluated_on}"
    final = {"untrained": history.untrained, "trained": trained, "control": control}
    draw_curves(pictures[4], history.losses, history.judged, few, final)
    draw_progress(pictures[5], sample, snapshots, source.name)
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
    where = f"{report['boxes']} boxes in {report['evaluated_on']}"
    if report["boxes"]:
        table.add_row("recall at 2 m", f"[green]{report['recall_at_2m']:.3f}[/]  of {where}")
        table.add_row("precision", f"[green]{report['precision']:.3f}[/]  at scores from {MIN_SCORE}")
        table.add_row("untrained recall", f"{report['untrained_recall']:.3f}  before the first step")
        table.add_row("control recall", f"{report['control_recall']:.3f}  with the cameras' images exchanged")
    else:
        table.add_row("recall at 2 m", "there are no boxes to be found")
    number, meters = report["objects_per_scene"], report["range_m"]
    if meters is not None:
        density = f"{number['min']} to {number['max']}, {number['mean']:.1f} on average"
        table.add_row("boxes in a scene", f"{density}; {meters['min']:.1f} to {meters['max']:.1f} m away")
    if "nuscenes" in report:
        metrics = report["nuscenes"]["metrics"]
        scores = "there are no boxes to be found"
        if metrics is not None:
            scores = f"mAP [green]{metrics['mAP']:.4f}[/]  NDS [green]{metrics['NDS']:.4f}[/]"
        table.add_row("nuScenes", f"{scores}\nresults in {report['nuscenes']['results']}")
    table.add_section()
    for name, loss in report["losses"].items():
        style = "bold" if name == "total" else ""
        change = loss["last"] / loss["first"] - 1 if loss["first"] else math.nan
        table.add_row(
            f"{name} loss", f"[{style or 'none'}]{loss['first']:.3f} → {loss['last']:.3f}[/]  ({change:+.0%})"
        )
    table.add_section()
    interrupted = ", interrupted" if report["interrupted"] else ""
    table.add_row("steps", f"{report['steps']} in {report['seconds']:.1f} s, on {report['trained_on']}{interrupted}")
    waiting = f"{report['waiting_share']:.0%} of the time spent waiting for scenes"
    speed = f"{report['step_ms']:.1f} ms (median), {report['scenes_per_second']:.1f} scenes/s"
    table.add_row("step time", f"{speed}, {waiting}")
    how = [
        f"batch {report['batch']}",
        f"views {report['views']}",
        f"mixed precision {report['amp']}",
        f"seed {report['seed']}",
    ]
    how += [name for name in ("compiled", "deterministic") if report[name]]
    table.add_row("training", ", ".join(how))
    processes = f", one of {report['ranks']} processes" if report["ranks"] > 1 else ""
    table.add_row("device", report["device"] + processes)
    table.add_row("operators", "\n".join(f"{name}: {by}" for name, by in report["backends"].items()))
    table.add_section()
    table.add_row("pictures", "\n".join(report["pictures"]))
    console.print(table)
