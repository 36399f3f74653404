"""Where the demo's samples come from: rendered scenes, or a frame in a directory."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from saccade_demo.data.frame import load_frame
from saccade_demo.evaluation import MAX_RANGE
from saccade_demo.geometry import Sample
from saccade_demo.rendering.scene import CAMERA_NAMES, CLASS_NAMES, scene


class Source(Protocol):
    """Where samples come from."""

    name: str
    class_names: tuple[str, ...]
    num_cams: int
    loaders: int
    """How many processes may make samples to learn from, where there are as many cores."""
    training_samples: int | None
    """Different samples to learn from; None: without end."""
    trained_on: str
    evaluated_on: str

    @property
    def held_out(self) -> Sequence[Sample]:
        """The samples for evaluation."""
        ...

    def training(self, number: int) -> Sample:
        """One of the samples to learn from, which are counted in their order; the same whenever it is asked for."""
        ...

    def shown(self, image_wh: tuple[int, int]) -> tuple[Sample, Sample]:
        """One of the evaluated samples, and the same with images of another size for the pictures."""
        ...


class RenderedScenes:
    """Rendered scenes without end, others held out for evaluation."""

    class_names: tuple[str, ...] = CLASS_NAMES
    num_cams = len(CAMERA_NAMES)
    loaders = 32
    training_samples: int | None = None
    trained_on = "rendered scenes"

    def __init__(self, seed: int, held_out: int):
        self.seed = seed
        self.name = "held-out scene"
        self.evaluated_on = f"{held_out} held-out scenes"
        self.held_out = [scene(seed, "held-out", index) for index in range(held_out)]

    def training(self, number: int) -> Sample:
        """The scene of that number."""
        return scene(self.seed, "train", number)

    def shown(self, image_wh: tuple[int, int]) -> tuple[Sample, Sample]:
        """The first held-out scene."""
        sample = self.held_out[0]
        # With more pixels, one more of the boxes that are hardly seen might count.
        return sample, replace(scene(self.seed, "held-out", 0, image_wh), labels=sample.labels)

    def __getstate__(self) -> dict[str, Any]:
        """For the processes that make scenes to learn from; those held out are large."""
        return {**vars(self), "held_out": []}


class RealFrame:
    """One frame from a directory, learnt by heart: it is what the detector is evaluated on, too."""

    loaders = 4
    training_samples: int | None = 1
    evaluated_on = "one frame, which it was trained on"

    def __init__(self, directory: Path):
        self.directory = directory
        self.name = self.trained_on = f"frame {directory.resolve().name}"
        sample = load_frame(directory)
        # Boxes that are not counted are not to be learnt either.
        far = np.hypot(sample.boxes[:, 0], sample.boxes[:, 1]) > MAX_RANGE
        self.held_out = [replace(sample, labels=np.where(far, -1, sample.labels))]
        self.class_names = sample.class_names
        self.num_cams = len(sample.camera_names)

    def training(self, number: int) -> Sample:
        """The frame."""
        return self.held_out[0]

    def shown(self, image_wh: tuple[int, int]) -> tuple[Sample, Sample]:
        """The frame."""
        return self.held_out[0], replace(load_frame(self.directory, image_wh), labels=self.held_out[0].labels)
