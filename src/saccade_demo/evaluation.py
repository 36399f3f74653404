"""How well boxes were found, by the centre distance in the ground plane as nuScenes measures it."""

from dataclasses import dataclass

import numpy as np

MATCH_DISTANCE = 2.0
"""Metres between the centres of a prediction and of the true box that it finds."""
MIN_SCORE = 0.3
MAX_RANGE = 55.0
"""Metres from the vehicle beyond which boxes are ignored."""


@dataclass(frozen=True)
class Detections:
    """Boxes found in one sample."""

    boxes: np.ndarray  # (D, 7), see `Sample`
    scores: np.ndarray  # (D,) in [0, 1]
    labels: np.ndarray  # (D,)

    def chosen(self, which: np.ndarray | list[int]) -> "Detections":
        """Some of them, by index or mask."""
        return Detections(self.boxes[which], self.scores[which], self.labels[which])


@dataclass(frozen=True)
class Counts:
    """Tally of matches; add those of several samples."""

    true_positives: int = 0
    false_positives: int = 0
    boxes: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.true_positives + other.true_positives,
            self.false_positives + other.false_positives,
            self.boxes + other.boxes,
        )

    @property
    def recall(self) -> float:
        """Share of the true boxes that were found; 0 when there is none."""
        return self.true_positives / max(self.boxes, 1)

    @property
    def precision(self) -> float:
        """Share of the predictions that found a true box; 0 when there is none."""
        return self.true_positives / max(self.true_positives + self.false_positives, 1)


def to_be_found(boxes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(M,) which of the true boxes count: those of a class, and within `MAX_RANGE`."""
    return (labels >= 0) & (np.hypot(boxes[:, 0], boxes[:, 1]) <= MAX_RANGE)


def match(detections: Detections, boxes: np.ndarray, labels: np.ndarray) -> Counts:
    """Compare the detections of one sample with its true boxes.

    Predictions with a score of at least `MIN_SCORE`, in falling order of it, each take the nearest true box of their
    class that is still free and at most `MATCH_DISTANCE` away. A box with a negative label (of no class, so any class
    may take it, and as often as wanted) or beyond `MAX_RANGE` is ignored: it is not counted when missed, and a
    prediction that finds no counted box but lies on an ignored one counts neither as right nor as wrong. So does a
    prediction that is itself beyond `MAX_RANGE`.

    Args:
        detections: What was found.
        boxes: (M, 7) true boxes.
        labels: (M,) their classes.
    """
    free = to_be_found(boxes, labels)
    ignored = ~free
    right = wrong = 0
    for i in np.argsort(-detections.scores, kind="stable"):
        if detections.scores[i] < MIN_SCORE:
            break
        distance = np.hypot(*(boxes[:, :2] - detections.boxes[i, :2]).T)
        near = distance <= MATCH_DISTANCE
        found = np.flatnonzero(near & free & (labels == detections.labels[i]))
        if len(found):
            free[found[distance[found].argmin()]] = False
            right += 1
        elif not (near & ignored & ((labels < 0) | (labels == detections.labels[i]))).any():
            wrong += np.hypot(*detections.boxes[i, :2]) <= MAX_RANGE
    return Counts(right, int(wrong), int((~ignored).sum()))
