"""What calling costs the host: wall times of public calls on small inputs, in training.

Hosts differ, so what counts is how many times as long as a step of torch's binary cross entropy a call takes. That step
is timed in the very turns in which both passes of the call are.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import saccade
from benchmarks import clocks
from benchmarks.accuracy import require_accurate
from benchmarks.aggregation import channels_last, plain_rows, relative_errors
from benchmarks.losses import GAUSSIAN, SIGMOID, Loss, LossCall, Result, checked_errors, module_call
from benchmarks.ragged import ENTRIES, indexed, indexing_inputs, relative_error
from benchmarks.records import IsWanted, Say, new_record
from benchmarks.training_step import as_leaves, forget, forward_backward
from benchmarks.workloads import AGGREGATION, GAUSSIAN_FOCAL, aggregation, gaussian_focal
from saccade import ragged

GAUSSIAN_WORKLOAD = "centerpoint"
AGGREGATION_WORKLOAD = "det-b1"
_REPEATS = 3  # of six turns each: the suite takes seconds
_BCE = "torch BCE with logits"

Results = Mapping[str, Sequence[Tensor | None]]  # by pass: the output, and the gradient of each leaf if there is one


class Call(NamedTuple):
    """A public call as training makes it."""

    call: Callable[..., Tensor]  # of the leaves
    leaves: list[Tensor]
    errors: Callable[[Results], dict[str, float]]  # relative ones, by pass
    grad_output: Tensor | None = None  # a scalar needs none


def workloads() -> list[str]:
    """Names of all workloads."""
    return [workload for of_operator in CALLS.values() for workload in of_operator]


def records(operator: str, quick: bool, say: Say, is_wanted: IsWanted) -> Iterator[dict[str, Any]]:
    """One record for each workload of an operator that is wanted, and pass. There are no baselines to leave out."""
    for workload, prepare in CALLS[operator].items():
        if is_wanted(workload):
            yield from _passes(workload, prepare, say)
            forget()


def _passes(workload: str, prepare: Callable[[str], Call], say: Say) -> Iterator[dict[str, Any]]:
    """Both passes of a call, in turns with each other and with the unit."""
    say(f"{workload}: checking")
    call, leaves, errors_of, grad_output = prepare(workload)
    forward = partial(call, *leaves)
    both = partial(forward_backward, call, leaves, grad_output)
    with torch.no_grad():
        output = forward()
    trained = both().detach()
    results = {
        "forward": [output, *(None for _ in leaves)],
        "forward+backward": [trained, *(leaf.grad for leaf in leaves)],
    }
    errors = errors_of(results)
    require_accurate(workload, "float32", errors)
    say(f"{workload}: timing forward, and forward + backward")
    steps = {"forward": forward, "forward+backward": both, _BCE: clocks.bce_step()}
    times = clocks.wall_us_in_turns(steps, without_grad=["forward"], repeats=_REPEATS)
    bce_us = times.pop(_BCE)
    for kind, saccade_us in times.items():
        yield new_record(workload, kind, "wall", saccade_us, floor_us=None, error=errors[kind], bce_us=bce_us)


# ---- the calls


def _focal_loss(workload: str) -> Call:
    return _of_loss(workload, SIGMOID, module_call())


def _gaussian_focal_loss(workload: str) -> Call:
    logits, target = gaussian_focal(GAUSSIAN_FOCAL[GAUSSIAN_WORKLOAD])
    return _of_loss(workload, GAUSSIAN, LossCall(partial(GAUSSIAN.call, target=target), logits, target, scale=1.0))


def _of_loss(workload: str, loss: Loss, call: LossCall) -> Call:
    def errors(results: Results) -> dict[str, float]:
        of_passes = {kind: Result(*result) for kind, result in results.items()}
        return checked_errors(workload, loss.element_losses, call.scale, call.logits, call.target, of_passes)

    return Call(call.call, as_leaves(call.logits), errors)


def _indexing(_: str) -> Call:
    data, indices, grad_output = indexing_inputs(**ENTRIES)
    right = indexed(data, indices, grad_output)

    def call(data: Tensor) -> Tensor:
        return ragged.batched_indexing_access(data, indices).tensor

    def errors(results: Results) -> dict[str, float]:
        return {
            kind: relative_error([each for each in result if each is not None], right)
            for kind, result in results.items()
        }

    return Call(call, as_leaves(data), errors, grad_output)


def _on_rows(_: str) -> Call:
    features, shape, start, location, weights = inputs = aggregation(**AGGREGATION[AGGREGATION_WORKLOAD])
    grad_output = _grad_output(location, features)

    def call(features: Tensor, location: Tensor, weights: Tensor) -> Tensor:
        return saccade.deformable_aggregation(features, shape, start, location, weights)

    errors = partial(relative_errors, inputs, grad_output)
    return Call(call, as_leaves(features, location, weights), errors, grad_output)


def _on_maps(_: str) -> Call:
    inputs = aggregation(**AGGREGATION[AGGREGATION_WORKLOAD])
    location, weights, maps = inputs.sampling_location, inputs.weights, channels_last(inputs)
    grad_output = _grad_output(location, inputs.feature_maps)

    def call(location: Tensor, weights: Tensor, *maps: Tensor) -> Tensor:
        return saccade.deformable_aggregation(list(maps), None, None, location, weights)

    def errors(results: Results) -> dict[str, float]:
        on_rows = {}
        for kind, (output, grad_location, grad_weights, *grad_maps) in results.items():
            of_maps = [each for each in grad_maps if each is not None]
            on_rows[kind] = [output, plain_rows(of_maps) if of_maps else None, grad_location, grad_weights]
        return relative_errors(inputs, grad_output, on_rows)

    return Call(call, as_leaves(location, weights, *maps), errors, grad_output)


def _grad_output(location: Tensor, features: Tensor) -> Tensor:
    """A random gradient of the aggregation's output (B, A, C)."""
    return torch.randn(*location.shape[:2], features.shape[-1], device=features.device)


CALLS: dict[str, dict[str, Callable[[str], Call]]] = {  # by operator
    "focal_loss": {"calls/FocalLoss": _focal_loss},
    "gaussian_focal_loss": {f"calls/gaussian-{GAUSSIAN_WORKLOAD}": _gaussian_focal_loss},
    "ragged": {"calls/ragged-indexing": _indexing},
    "deformable_aggregation": {
        f"calls/aggregation-{AGGREGATION_WORKLOAD}": _on_rows,
        f"calls/aggregation-maps-{AGGREGATION_WORKLOAD}": _on_maps,
    },
}
