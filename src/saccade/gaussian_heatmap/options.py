"""How boxes become targets, and of what shape maps are."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.argument_checks import require_number, require_whole
from saccade.gaussian_heatmap.radius import require_overlap


class BoxOptions(NamedTuple):
    """See ``saccade.boxes_to_heatmap``."""

    stride: tuple[float, float]  # (x, y)
    min_overlap: float
    radius: str
    min_radius: int
    box_format: str
    origin: tuple[float, float]  # (x, y)

    def checked(self) -> "BoxOptions":
        """The same as numbers of Python's; raises where one is out of range."""
        min_overlap = require_overlap("radius", self.radius, self.min_overlap)
        require_whole("min_radius", self.min_radius)
        if self.box_format not in ("xyxy", "cxcywh"):
            raise ValueError(f"box_format: expected 'xyxy' or 'cxcywh', got {self.box_format!r}")
        stride, origin = _pair("stride", self.stride, above=0), _pair("origin", self.origin)
        return BoxOptions(stride, min_overlap, self.radius, self.min_radius, self.box_format, origin)


def _pair(name: str, values: Any, **limit: float) -> tuple[float, float]:
    if not isinstance(values, (tuple, list)) or len(values) != 2:
        raise TypeError(f"{name}: expected a pair (x, y), got {values!r}")
    x, y = (float(require_number(f"{name}[{axis}]", value, **limit)) for axis, value in enumerate(values))
    return x, y


def new_maps(batch: int, size: Sequence[int], num_classes: int | None, device: torch.device) -> Tensor:
    """Room for maps: (B, H, W), or (B, C, H, W) with classes."""
    shape = (batch, *size) if num_classes is None else (batch, num_classes, *size)
    return torch.empty(shape, dtype=torch.float32, device=device)
