"""`saccade demo`, made small: tiny images, a tiny detector, no pictures. Run as a script, it takes the same options.

Through the environment the script is told what is to go wrong: KILLED_AFTER a number of steps, as if the machine had
lost its power, or FAILING_RANK of several.
"""

import os
import signal
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

from saccade.cli import app
from saccade_demo import run
from saccade_demo.data.source import RenderedScenes
from saccade_demo.geometry import Sample
from saccade_demo.model import DetectorConfig
from saccade_demo.rendering.scene import scene
from saccade_demo.training.trainer import Trainer

IMAGE_WH = (96, 32)


@cache
def small_scene(seed: int, split: str, index: int) -> Sample:
    """Rendered once in a process: that takes as long as a step."""
    return scene(seed, split, index, IMAGE_WH)


class SmallScenes(RenderedScenes):
    """Rendered scenes of few pixels."""

    def __init__(self, seed: int, held_out: int):
        super().__init__(seed, 0)
        self.held_out = [small_scene(seed, "held-out", index) for index in range(3)]

    def training(self, number: int) -> Sample:
        return small_scene(self.seed, "train", number)


small_config = partial(DetectorConfig, widths=(8, 16, 16), embed_dims=16, num_groups=2, num_anchors=16)


def make_small(replace: Callable[[Any, str, Any], None] = setattr) -> None:
    """Replace what is large: with `setattr`, or a monkeypatch's."""
    replace(run, "RenderedScenes", SmallScenes)
    replace(run, "DetectorConfig", small_config)
    replace(run, "_draw", lambda *_: [])


def after_step(wanted: int, do: Callable[[], None], replace: Callable[[Any, str, Any], None] = setattr) -> None:
    """Do something once a step has been made, before it is told."""
    train = Trainer.train

    def train_and_do(self: Trainer, *args: Any) -> Iterator[dict[str, float]]:
        for losses in train(self, *args):
            if self.step == wanted:
                do()
            yield losses

    replace(Trainer, "train", train_and_do)


def fail() -> None:
    raise RuntimeError("this rank was told to fail")


if __name__ == "__main__":
    make_small()
    if "KILLED_AFTER" in os.environ:
        after_step(int(os.environ["KILLED_AFTER"]), lambda: os.kill(os.getpid(), signal.SIGKILL))
    if "FAILING_RANK" in os.environ and os.environ["FAILING_RANK"] == os.environ["RANK"]:
        after_step(2, fail)
    app(prog_name="saccade")
