"""What the heatmaps of a workload are, in float64, one target at a time.

Written from the definition and independent of the library: every cell of a map is looked at for every target.
"""

import torch
from torch import Tensor

from benchmarks.workloads import HeatmapInputs


def exact(inputs: HeatmapInputs) -> Tensor:  # (B, H, W) or (B, C, H, W) float64
    shape, centers, radii, sizes, labels = inputs
    expected = torch.zeros(shape, dtype=torch.float64, device=centers.device)
    rows, columns = (torch.arange(size, dtype=torch.float64, device=centers.device) for size in shape[-2:])
    for b, count in enumerate(sizes.tolist()):
        classes = [()] * count if labels is None else labels[b, :count, None].tolist()
        targets = zip(centers[b, :count].tolist(), radii[b, :count].tolist(), classes, strict=True)
        for (x, y), radius, label in targets:
            down, right = (rows - y)[:, None], columns - x
            in_window = (down.abs() <= radius) & (right.abs() <= radius)
            sigma = (2 * radius + 1) / 6
            gaussian = torch.exp(-(down**2 + right**2) / (2 * sigma**2))
            drawn = expected[(b, *label)]
            drawn.copy_(torch.where(in_window, gaussian, 0).maximum(drawn))
    return expected
