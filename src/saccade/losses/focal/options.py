"""The numbers that sigmoid focal loss is called with."""

from typing import NamedTuple

from saccade.argument_checks import require_bool, require_number


class SigmoidOptions(NamedTuple):
    """See ``saccade.sigmoid_focal_loss``."""

    alpha: float
    gamma: float
    activated: bool

    def checked(self) -> "SigmoidOptions":
        """The same as numbers of Python's; raises where one is out of range."""
        alpha, gamma = require_number("alpha", self.alpha), require_number("gamma", self.gamma, minimum=0)
        if alpha > 1:
            raise ValueError(f"alpha: expected a number in [0, 1], or a negative one for no balancing, got {alpha}")
        require_bool("activated", self.activated)
        return SigmoidOptions(alpha, gamma, self.activated)
