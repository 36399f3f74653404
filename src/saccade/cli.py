"""The command line, for those who installed the `demo` extra: `saccade demo`.

`saccade doctor` works with torch alone installed and is therefore dispatched in `saccade.__main__`; it is named here
for the help page.
"""

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from saccade_demo import DemoError, SampleError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Fused PyTorch operators for training camera perception models."
)


class _BareAmp(TyperCommand):
    """Lets `--amp` stand alone for `--amp bf16`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Complete a bare `--amp`."""
        complete = []
        for position, arg in enumerate(args, start=1):
            alone = arg == "--amp" and (position == len(args) or args[position].startswith("-"))
            complete += [arg, "bf16"] if alone else [arg]
        return super().parse_args(ctx, complete)


@app.command(cls=_BareAmp)
def demo(
    steps: Annotated[int, typer.Option(help="Training steps.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of scenes and weights.", min=0)] = 0,
    frame: Annotated[
        Path | None,
        typer.Option(help="Train on a real frame: a directory with frame.json and the camera images.", metavar="DIR"),
    ] = None,
    nuscenes: Annotated[
        Path | None,
        typer.Option(
            help="Train on nuScenes: the folder with samples, maps and the tables; needs nuscenes-devkit.",
            metavar="ROOT",
        ),
    ] = None,
    version: Annotated[
        str | None,
        typer.Option(help="Of nuScenes: v1.0-mini, which is the default, or v1.0-trainval.", show_default=False),
    ] = None,
    scenes: Annotated[
        str | None,
        typer.Option(
            help="Of nuScenes, to take no others; each remains in its official split.",
            metavar="NAME,NAME...",
            show_default=False,
        ),
    ] = None,
    evaluate: Annotated[
        Path | None,
        typer.Option(
            help="Write what is found in the validation scenes there, as nuScenes' benchmark wants it; tell mAP, NDS.",
            metavar="FILE",
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:1; by default the GPU if there is one.", show_default=False)
    ] = None,
    amp: Annotated[str, typer.Option(help="Mixed precision: off, bf16 or fp16; --amp alone means bf16.")] = "off",
    batch: Annotated[
        int | None,
        typer.Option(
            help="Scenes to a step, over all processes that torchrun starts; by default one each, on GPUs 16 each.",
            show_default=False,
        ),
    ] = None,
    micro_batch: Annotated[
        int | None,
        typer.Option(
            help="Of these, scenes to one forward pass; by default all that a process has.", show_default=False
        ),
    ] = None,
    learning_rate: Annotated[float, typer.Option(help="The highest, after warming up.")] = 2e-3,
    views: Annotated[
        int | None,
        typer.Option(
            help="Learn from each scene up to so many times, 84 steps apart, every second time in a mirror. Must "
            "divide the scenes to a forward pass. By default 4 for rendered scenes on GPUs, if it does, otherwise 1.",
            show_default=False,
        ),
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Train the model compiled by torch.compile.")] = False,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Use PyTorch's deterministic algorithms: equal bits in every run.")
    ] = False,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Save training there, and go on from there if the file exists.", metavar="FILE"),
    ] = None,
    checkpoint_every: Annotated[int, typer.Option(help="Steps from one saving to the next.", min=1)] = 50,
    curve_every: Annotated[
        int | None,
        typer.Option(
            help="Steps from one evaluation of a few held-out scenes to the next, for the recall curve; 0: none. "
            "By default a tenth of the steps.",
            min=0,
            show_default=False,
        ),
    ] = None,
    tensorboard: Annotated[
        Path | None, typer.Option(help="Log losses, speed and recall there for TensorBoard.", metavar="DIR")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the pictures go.", metavar="DIR")] = Path("demo-output"),
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the closing table there, too.", metavar="FILE")
    ] = None,
) -> None:
    """Train a small sparse multi-camera detector from scratch, and show what it learnt.

    Without --frame and --nuscenes it learns from rendered scenes, and is evaluated on others. torchrun --nproc-per-node
    N -m saccade demo trains in N processes. Ctrl-C ends training early: what there is then is saved, evaluated and
    drawn, and the status is 130; a second one ends at once. Under torchrun the status is 1, and what is not done after
    30 s is killed; the checkpoint is written first.
    """
    import torch

    from saccade_demo.run import DemoOptions, run_demo
    from saccade_demo.training.distribution import Ranks

    ranks = Ranks()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        ranks = Ranks.from_environment()
        if ranks.index > 0:  # the first one writes
            json_file = evaluate = None
        require_writable(out, json_file)
        require_writable_file(evaluate, "--evaluate")
        names = None if scenes is None else tuple(name.strip() for name in scenes.split(",") if name.strip())
        report = run_demo(
            DemoOptions(
                steps=steps,
                seed=seed,
                frame=frame,
                device=device,
                amp=amp,
                out=out,
                nuscenes=nuscenes,
                version=version,
                scenes=names,
                evaluate=evaluate,
                batch=batch,
                micro_batch=micro_batch,
                learning_rate=learning_rate,
                views=views,
                compiled=compiled,
                deterministic=deterministic,
                checkpoint=checkpoint,
                checkpoint_every=checkpoint_every,
                curve_every=curve_every,
                tensorboard=tensorboard,
            )
        )
    except DemoError as error:
        if ranks.local_index == 0 or isinstance(error, SampleError):
            print(f"saccade demo: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    # Another rank is done earlier: if it failed, torchrun would end the first one, which still draws and writes.
    if report["interrupted"] and ranks.index == 0:
        raise typer.Exit(130)


@app.command()
def bench(
    only: Annotated[
        str | None,
        typer.Option(
            help="One suite, aggregation, losses, heatmap, ragged, calls or demo, or one workload, such as "
            "aggregation/det-b1. demo trains on 1, 2 and 4 GPUs, and for two minutes on one; it is run only if named.",
            show_default=False,
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Time Saccade alone, not what it is compared with; for development.")
    ] = False,
    protocol: Annotated[
        str | None,
        typer.Option(
            help="With --only heatmap: accvlab runs the benchmark programs of ACCV-Lab in place of the workloads.",
            show_default=False,
        ),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", help="Write the records there, in place of those of the same workloads.", metavar="FILE"
        ),
    ] = None,
) -> None:
    """Time the operators on this machine's GPU, beside what they replace. Runs from a checkout of the repository.

    An operator that does not compute what it should is not timed; the command then ends with status 1.
    """
    import torch
    from rich.console import Console

    fault = None
    if not benchmarks_are_found():
        fault = "runs in the root of a checkout of the repository, where the benchmarks are"
    elif not torch.cuda.is_available():
        fault = f"torch {torch.__version__} finds no GPU to time; `saccade doctor` tells more"
    if fault is not None:
        print(f"saccade bench: {fault}", file=sys.stderr)
        raise typer.Exit(2)
    from benchmarks.records import are_records, merged
    from benchmarks.run import FailedTrainingError, UnknownWorkloadError, WrongResultError, run

    earlier: Any = []
    try:
        require_writable_file(json_file)
        if json_file is not None and json_file.exists():
            try:
                earlier = json.loads(json_file.read_text(encoding="utf-8") or "[]")
            except ValueError:  # no JSON, or no text
                earlier = None
            if not are_records(earlier):
                raise DemoError(f"--json {json_file}: holds something else than records of an earlier run")
        # A file or a pipe is wide enough for the tables.
        console = Console(width=None if sys.stdout.isatty() else 180)
        records = merged(earlier, run(only, console, quick, protocol))
    except (DemoError, UnknownWorkloadError) as error:
        print(f"saccade bench: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    except (WrongResultError, FailedTrainingError) as error:
        print(f"saccade bench: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    if json_file is not None:
        json_file.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


@app.command()
def doctor() -> None:
    """Check the installation: versions, devices, and every operator against its reference."""
    from saccade.doctor import main

    raise typer.Exit(main([]))


def benchmarks_are_found() -> bool:
    """Whether `benchmarks` is the package beside this checkout's `src`, and not another project's."""
    found = find_spec("benchmarks")
    beside = Path(__file__).parents[2] / "benchmarks" / "__init__.py"
    return found is not None and found.origin is not None and Path(found.origin).resolve() == beside.resolve()


def require_writable(out: Path, json_file: Path | None) -> None:
    """Make the directory of the pictures and see that both can be written, before any time is spent on training.

    Raises:
        DemoError: One cannot.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"--out {out}: cannot make this directory ({error.strerror})") from error
    if not os.access(out, os.W_OK | os.X_OK):
        raise DemoError(f"--out {out}: cannot write into this directory")
    require_writable_file(json_file)


def require_writable_file(file: Path | None, option: str = "--json") -> None:
    """See that what an option names can be written.

    Raises:
        DemoError: It cannot.
    """
    if file is not None:
        is_new = not file.exists()
        try:
            file.open("a").close()
            if is_new:
                file.unlink()
        except OSError as error:
            raise DemoError(f"{option} {file}: cannot write this file ({error.strerror})") from error
