"""Ragged batches: two of the helpers, and the whole loss of ``detr_loss.py``."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks import detr_loss
from benchmarks.accuracy import require_accurate
from benchmarks.clocks import device_us, wall_us_in_turns
from benchmarks.detr_loss import Matched, Objects, RaggedObjects
from benchmarks.records import COPY_BYTES_PER_US, IsWanted, Say, new_record
from benchmarks.training_step import as_leaves, forget, forward_backward, size_of
from benchmarks.workloads import wall_us
from saccade import RaggedBatch, ragged

DEVICE = "cuda"
ENTRIES = {"samples": 48, "most": 50, "rows": 900, "channels": 11}
DETR = {"layers": 6, "samples": 8, "queries": 900, "classes": 10, "most": 50}

# Microseconds of NVIDIA's ACCV-Lab package on one NVIDIA H200 with torch 2.11 and CUDA 13.0, by pass and clock: of
# inputs of these sizes, not of the very numbers drawn here.
RECORDED_US: dict[str, dict[tuple[str, str], float]] = {
    "ragged/batched_indexing_access": {
        ("forward", "device"): 3.6,
        ("forward", "wall"): 28,
        ("forward+backward", "wall"): 189,
    },
    "ragged/combine_data": {("forward", "wall"): 583},
}


def workloads() -> list[str]:
    """Names of all workloads."""
    return [*RECORDED_US, "ragged/detr_loss", "ragged/detr_loss-and-matching"]


def records(quick: bool, say: Say, is_wanted: IsWanted) -> Iterator[dict[str, Any]]:
    """One record for each workload that is wanted, pass and clock; ``quick`` leaves out the baselines."""
    suite = (_indexing, _combining, _detr, partial(_detr, with_matching=True))
    for workload, records_of in zip(workloads(), suite, strict=True):
        if is_wanted(workload):
            yield from records_of(workload, quick, say)
            forget()


def _record(
    workload: str,
    kind: str,
    clock: str,
    times: dict[str, float],  # of saccade and of what it is set beside
    error: float,
    floor_us: float | None = None,
) -> dict[str, Any]:
    """A record. A floor goes with device times alone: to move so few bytes takes less time than a single call."""
    baselines = dict(times)
    saccade_us = baselines.pop("saccade")
    recorded = RECORDED_US.get(workload, {}).get((kind, clock))
    package = {} if recorded is None else {"ACCV-Lab package": recorded}
    about = {"floor_us": floor_us, "baselines": baselines, "recorded": package, "error": error}
    return new_record(workload, kind, clock, saccade_us, **about)


# ---- entries by their indices


def _indexing(workload: str, quick: bool, say: Say) -> Iterator[dict[str, Any]]:
    say(f"{workload}: checking")
    data, indices, grad_output = indexing_inputs(**ENTRIES)
    leaves = as_leaves(data)
    # What these take besides the data is made beforehand. The padding of the indices is 0.
    forms: dict[str, Callable[[Tensor], Tensor]] = {
        "saccade": lambda data: ragged.batched_indexing_access(data, indices).tensor
    }
    if not quick:
        sample = torch.arange(len(data), device=data.device)[:, None]
        columns = indices.tensor[..., None].expand_as(grad_output)
        padding = ~indices.mask[..., None]
        forms["indexing"] = lambda data: data[sample, indices.tensor].masked_fill(padding, 0)
        forms["gather"] = lambda data: data.gather(1, columns).masked_fill(padding, 0)

    right = indexed(data, indices, grad_output)
    errors = {}
    for name, form in forms.items():
        output = forward_backward(form, leaves, grad_output).detach()
        errors[name] = relative_error([output, leaves[0].grad], right)
    require_accurate(workload, "float32", errors)
    error = errors["saccade"]

    entries = int(indices.sample_sizes.sum())
    index_bytes = entries * indices.tensor.element_size() + size_of(indices.sample_sizes)
    floor_us = (entries * size_of(data[0, 0]) + index_bytes + size_of(grad_output)) / COPY_BYTES_PER_US
    say(f"{workload}: timing forward")
    with torch.no_grad():
        of_device = {name: device_us(partial(form, data)) for name, form in forms.items()}
        of_wall = wall_us_in_turns({name: partial(form, data) for name, form in forms.items()})
    yield _record(workload, "forward", "device", of_device, error, floor_us)
    yield _record(workload, "forward", "wall", of_wall, error)
    say(f"{workload}: timing forward + backward")
    steps = {name: partial(forward_backward, form, leaves, grad_output) for name, form in forms.items()}
    if not quick:
        # Something else: what a step with one loss of these data costs in torch itself.
        cross_entropy = partial(F.binary_cross_entropy_with_logits, target=torch.zeros_like(data))
        steps["torch BCE with logits"] = partial(forward_backward, cross_entropy, leaves)
    yield _record(workload, "forward+backward", "wall", wall_us_in_turns(steps), error)


def indexing_inputs(samples: int, most: int, rows: int, channels: int) -> tuple[Tensor, RaggedBatch, Tensor]:
    """Data (B, rows, C), distinct indices (B, M) of up to ``most`` rows, and a gradient of the result (B, M, C)."""
    rng = torch.Generator().manual_seed(0)
    sizes = torch.randint(most + 1, (samples,), generator=rng).tolist()
    indices = ragged.combine_data([torch.randperm(rows, generator=rng)[:size] for size in sizes], device=DEVICE)
    data = torch.randn(samples, rows, channels, generator=rng)
    grad_output = torch.randn(samples, indices.max_sample_size, channels, generator=rng)
    return data.to(DEVICE), indices, grad_output.to(DEVICE)


def indexed(data: Tensor, indices: RaggedBatch, grad_output: Tensor) -> tuple[Tensor, Tensor]:
    """What the indexing gives, and the gradient of the data, float64."""
    right, right_grad = (torch.zeros_like(each, dtype=torch.float64) for each in (grad_output, data))
    for b, index in enumerate(indices.split()):
        right[b, : len(index)] = data[b, index].double()
        right_grad[b, index] = grad_output[b, : len(index)].double()
    return right, right_grad


# ---- tensors of different lengths to one batch


def _combining(workload: str, quick: bool, say: Say) -> Iterator[dict[str, Any]]:
    say(f"{workload}: checking")
    _, indices, values = indexing_inputs(**ENTRIES)
    pieces = [values[b, : len(index)].clone() for b, index in enumerate(indices.split())]

    def combined() -> tuple[Tensor, Tensor]:
        batch = ragged.combine_data(pieces)
        return batch.tensor, batch.sample_sizes

    def padded() -> tuple[Tensor, Tensor]:
        sizes = torch.tensor([len(piece) for piece in pieces], device=DEVICE)
        return pad_sequence(pieces, batch_first=True), sizes

    forms: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {"saccade": combined}
    if not quick:
        forms["pad_sequence"] = padded
    right = values.double().masked_fill(~indices.mask[..., None], 0), indices.sample_sizes.double()
    errors = {name: relative_error(form(), right) for name, form in forms.items()}
    require_accurate(workload, "float32", errors)
    say(f"{workload}: timing forward")
    yield _record(workload, "forward", "wall", wall_us_in_turns(forms), errors["saccade"])


# ---- a whole loss


class DetrInputs(NamedTuple):
    """What the loss takes, for the loops and as ragged batches."""

    logits: Tensor  # (L, B, Q, C)
    boxes: Tensor  # (L, B, Q, 4)
    objects: Objects
    matched: Matched
    ragged_objects: RaggedObjects
    ragged_matched: RaggedBatch  # (L, B, M)


def detr_inputs(layers: int, samples: int, queries: int, classes: int, most: int) -> DetrInputs:
    """Random predictions, up to ``most`` random objects in a sample, and the matching of these."""
    rng = torch.Generator().manual_seed(0)

    def random_boxes(*shape: int) -> Tensor:
        centers, sizes = torch.rand(2, *shape, 2, generator=rng)
        return torch.cat([centers, 0.02 + 0.3 * sizes], -1).to(DEVICE)

    logits = torch.randn(layers, samples, queries, classes, generator=rng).to(DEVICE)
    boxes = random_boxes(layers, samples, queries)
    counts = torch.randint(most + 1, (samples,), generator=rng).tolist()
    labels = [torch.randint(classes, (count,), generator=rng).to(DEVICE) for count in counts]
    objects = Objects(labels, [random_boxes(count) for count in counts])
    ragged_boxes = ragged.combine_data(objects.boxes)
    ragged_objects = RaggedObjects(ragged.combine_data(labels, ragged_boxes), ragged_boxes)
    matched = detr_loss.match_each_sample(logits, boxes, objects)
    ragged_matched = ragged.combine_data(matched, flatten_batch_dims=False)
    return DetrInputs(logits, boxes, objects, matched, ragged_objects, ragged_matched)


Form = Callable[[Tensor, Tensor], Tensor]  # of logits and boxes


def detr_forms(inputs: DetrInputs, with_matching: bool) -> dict[str, Form]:
    """The loss in each form: of the matching that is given, or after one of its own."""

    def given(*_: Any) -> Matched:
        return inputs.matched

    def ragged_given(*_: Any) -> RaggedBatch:
        matched = inputs.ragged_matched  # a new batch for each step, as in training, so that it has no mask yet
        return RaggedBatch(matched.tensor, sample_sizes=matched.sample_sizes)

    def form(loss: Callable[..., Tensor], match: Callable[..., Any], objects: Objects | RaggedObjects) -> Form:
        return lambda logits, boxes: loss(logits, boxes, objects, match(logits, boxes, objects))

    at_once, by_sample, by_layer = ragged_given, given, given
    if with_matching:
        at_once, by_sample, by_layer = detr_loss.match_at_once, detr_loss.match_each_sample, detr_loss.match_each_layer
    return {
        "saccade": form(detr_loss.at_once, at_once, inputs.ragged_objects),
        "loop over samples": form(detr_loss.loop_over_samples, by_sample, inputs.objects),
        "loop over layers": form(detr_loss.loop_over_layers, by_layer, inputs.objects),
    }


def detr_errors(inputs: DetrInputs, forms: Mapping[str, Form]) -> dict[str, float]:
    """The largest relative error of each form's loss and gradients; right are those of the loop in float64, on the CPU.

    There the focal loss is plain PyTorch, too.
    """
    matched = [[query.cpu() for query in layer] for layer in inputs.matched]
    labels = [each.cpu() for each in inputs.objects.labels]
    objects = Objects(labels, [boxes.cpu().double() for boxes in inputs.objects.boxes])

    def exact(logits: Tensor, boxes: Tensor) -> Tensor:
        return detr_loss.loop_over_samples(logits, boxes, objects, matched)

    def results(form: Form, *predictions: Tensor) -> list[Tensor]:
        leaves = as_leaves(*predictions)
        return [forward_backward(form, leaves).detach().cpu(), *(leaf.grad.cpu() for leaf in leaves)]

    right = results(exact, inputs.logits.cpu().double(), inputs.boxes.cpu().double())
    return {name: relative_error(results(form, inputs.logits, inputs.boxes), right) for name, form in forms.items()}


def _detr(workload: str, quick: bool, say: Say, with_matching: bool = False) -> Iterator[dict[str, Any]]:
    """Of a matching that is given, which is what the device does; or with the matching, most of which the host does."""
    say(f"{workload}: checking")
    inputs = detr_inputs(**DETR)
    forms = detr_forms(inputs, with_matching)
    if quick:
        forms = {"saccade": forms["saccade"]}
    errors = detr_errors(inputs, forms)
    require_accurate(workload, "float32", errors)
    error = errors["saccade"]
    if not with_matching:  # that waits for the device, which no CUDA graph can
        say(f"{workload}: timing forward")
        with torch.no_grad():
            times = {name: device_us(partial(form, *inputs[:2]), inner=2) for name, form in forms.items()}
        yield _record(workload, "forward", "device", times, error, _detr_floor_us(inputs))
    times, leaves = {}, as_leaves(inputs.logits, inputs.boxes)
    for name, form in forms.items():
        say(f"{workload}: timing forward + backward, {name}")
        times[name] = wall_us(partial(forward_backward, form, leaves), calls=20)  # the loops are many calls each
    yield _record(workload, "forward+backward", "wall", times, error)


def _detr_floor_us(inputs: DetrInputs) -> float:
    """Microseconds that moving the fewest bytes takes: the loss reads everything, but of the boxes those matched."""
    sizes = inputs.ragged_objects.boxes.sample_sizes
    pairs = len(inputs.logits) * int(sizes.sum())
    pair_bytes = size_of(inputs.boxes[0, 0, 0]) + inputs.ragged_matched.tensor.element_size()
    object_bytes = size_of(*inputs.objects.labels, *inputs.objects.boxes, sizes)
    return (size_of(inputs.logits) + object_bytes + pairs * pair_bytes) / COPY_BYTES_PER_US


def relative_error(results: Sequence[Tensor], rights: Sequence[Tensor]) -> float:
    """The largest relative error of some tensors; one of another shape has an infinite one."""

    def error(result: Tensor, right: Tensor) -> float:
        return ((result.double() - right).norm() / right.norm()).item() if result.shape == right.shape else math.inf

    return max(map(error, results, rights))
