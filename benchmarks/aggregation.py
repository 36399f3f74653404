"""``deformable_aggregation`` on the workloads of ``workloads.py``."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from workloads import AGGREGATION, AggregationInputs, aggregation, aggregation_floor_bytes, device_us

import saccade

OPERATOR = "deformable_aggregation"

# Microseconds of the original CUDA kernel, forward and backward, on one NVIDIA H200 with torch 2.11 and CUDA 13.0,
# taken with the same inputs and the same clock.
RECORDED_US = {
    "det-b1": (559, 1704),
    "det-b8": (4325, 13301),
    "map-b8": (11065, 32153),
    "all-visible-b8": (6860, 163966),
    "points39-b8": (12881, 38859),
    "cameras12-b8": (8603, 27077),
}
COPY_BYTES_PER_US = 4.2e6  # what a large copy moves on an H200, bytes read and written


def _grid_sample(maps: list[Tensor], inputs: AggregationInputs) -> Tensor:
    """The same sums by ``grid_sample``, as detectors do without the operator."""
    grid = (2 * inputs.sampling_location - 1).permute(0, 3, 1, 2, 4).flatten(0, 1)  # (B * N, A, K, 2)
    batch, anchors, points, cameras, _, groups = inputs.weights.shape
    total = 0
    for level, feature in enumerate(maps):
        sampled = F.grid_sample(feature.flatten(0, 1), grid, align_corners=False)  # (B * N, C, A, K)
        sampled = sampled.view(batch, cameras, groups, -1, anchors, points)
        total = total + torch.einsum("bngcak,baknlg->bagc", sampled, inputs.weights[:, :, :, :, level : level + 1])
    return total.flatten(2)


def _error(inputs: AggregationInputs) -> float:
    """Relative error of the result for the first sample against the same operator in float64."""
    features, shape, start, location, weights = inputs
    first = (features[:1], shape, start, location[:1], weights[:1])
    exact = saccade.deformable_aggregation(*(t.double() if t.is_floating_point() else t for t in first))
    return ((saccade.deformable_aggregation(*first).double() - exact).norm() / exact.norm()).item()


def records() -> Iterator[dict]:
    """One record for each workload and pass, times in microseconds of device time."""
    workloads = [(name, torch.float32) for name in AGGREGATION] + [("det-b8", torch.bfloat16)]
    for name, dtype in workloads:
        inputs = aggregation(**AGGREGATION[name], dtype=dtype)
        floors = [bytes_moved / COPY_BYTES_PER_US for bytes_moved in aggregation_floor_bytes(inputs)]
        recorded = RECORDED_US[name] if dtype == torch.float32 else (None, None)
        grad_output = torch.randn_like(saccade.deformable_aggregation(*inputs))
        error = _error(inputs)
        baseline = {}
        if dtype == torch.float32:
            (maps,) = saccade.feature_maps_format(list(inputs[:3]), inverse=True)
            by_grid_sample = device_us(lambda m=maps, i=inputs: _grid_sample(m, i), inner=2, repeats=5)
            baseline = {"grid_sample": by_grid_sample}
        calls = (
            lambda i=inputs: saccade.deformable_aggregation(*i),
            lambda i=inputs, g=grad_output: torch.ops.saccade.deformable_aggregation_backward(g, *i, [True] * 3),
        )
        for kind, call, floor, original in zip(("forward", "backward"), calls, floors, recorded, strict=True):
            yield {
                "workload": f"aggregation/{name}",
                "pass": kind,
                "dtype": str(dtype).removeprefix("torch."),
                "clock": "device",
                "saccade_us": device_us(call, inner=2, repeats=5),
                "floor_us": floor,
                "baselines": baseline if kind == "forward" else {},
                "recorded": {} if original is None else {"original CUDA kernel": original},
                "error": error if kind == "forward" else None,
            }
        del inputs, grad_output, calls
        torch.cuda.empty_cache()
