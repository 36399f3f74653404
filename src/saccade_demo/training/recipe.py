"""How to train the demo's detector."""

from dataclasses import dataclass

LEARNING_RATE = 2e-3


@dataclass(frozen=True)
class Recipe:
    """How to train. The same recipe, source and model give the same losses."""

    steps: int
    seed: int = 0
    batch: int = 1
    """Samples of a step, in all processes together."""
    micro_batch: int = 1
    """Samples of a forward pass, over which batch normalization takes its statistics."""
    views: int = 1
    """How often a sample is learnt from at most, each time turned otherwise, and every second time in a mirror."""
    amp: str = "off"
    compiled: bool = False
    learning_rate: float = LEARNING_RATE
