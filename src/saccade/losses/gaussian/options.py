"""The numbers that Gaussian focal loss is called with."""

import math
from typing import NamedTuple

from saccade.argument_checks import require_number


class GaussianOptions(NamedTuple):
    """See ``saccade.gaussian_focal_loss`` and its form ``with_logits``."""

    alpha: float
    gamma: float
    pos_weight: float
    neg_weight: float
    with_logits: bool
    clip: float | None

    @property
    def name(self) -> str:
        """What the predictions are called."""
        return "logits" if self.with_logits else "pred"

    @property
    def bound(self) -> float | None:
        """The logit from which on a probability is clipped, positive or negative."""
        return None if self.clip is None else math.log((1 - self.clip) / self.clip)

    def checked(self) -> "GaussianOptions":
        """The same as numbers of Python's; raises where one is out of range."""
        clip = None if self.clip is None else require_number("clip", self.clip, above=0)
        if clip is not None and clip >= 0.5:
            raise ValueError(f"clip: expected a number between 0 and 0.5, got {clip}")
        return GaussianOptions(
            require_number("alpha", self.alpha, minimum=0),
            require_number("gamma", self.gamma, minimum=0),
            require_number("pos_weight", self.pos_weight),
            require_number("neg_weight", self.neg_weight),
            self.with_logits,
            clip,
        )
