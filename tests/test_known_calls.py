"""A known call is never taken for another one: every option of every public function, changed and changed back.

The key of a known call is every argument of the operator's schema, but for numbers that are declared to vary. One that
is declared so and is baked into a launch gives the result of another call, without a word. Here the options come from
the signatures: a new one fails until it has a changed value in ``FUNCTIONS``. Where there is no GPU, the CPU counts as
one, as in ``test_operator.py``. What is baked into a launch shows where there are kernels: on a GPU, and under Triton's
interpreter.
"""

import inspect
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import saccade
from saccade import RaggedBatch, nn, ragged
from saccade.deformable_aggregation import formatting
from saccade.operator import torch_internals
from saccade.operator.declaration import OPERATORS
from saccade.triton_dispatch import served_by_triton

pytestmark = pytest.mark.interpreted

OF_CPU_TENSORS = torch_internals._raw_keys("CPU", "ADInplaceOrView", "AutogradCPU", "AutocastCPU")


@dataclass(frozen=True)
class Other:
    """A call that is not the usual one."""

    options: dict[str, Any]
    against: dict[str, Any] = field(default_factory=dict)
    """Options of the call that it is compared with, where these are not the usual ones."""
    alike: str = ""
    """Why it may give the same as that one."""
    recorded: bool = True
    """Whether gradients are asked for."""


@dataclass(frozen=True)
class Function:
    usual: dict[str, Any]
    changed: dict[str, Any]
    """For each option another value, an ``Other`` where there is more to say, or a list of these.

    A number that is out of range is a changed value, too: checks are what a known call skips.
    """
    call: Callable[..., Any] | None = None
    """By default the public function of this name."""
    signatures: tuple[Callable[..., Any], ...] = ()
    """What has the options, by default ``call``."""
    in_place: bool = False
    """Whether the first option is written to, and is the result."""


def leaf(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float32).clone().requires_grad_()


def other_way_round(tensor: Tensor) -> Tensor:
    """The same numbers, whose last two axes lie in memory the other way round."""
    return tensor.detach().mT.contiguous().mT.requires_grad_(tensor.requires_grad)


def batch(tensor: Tensor, *sizes: int) -> RaggedBatch:
    return RaggedBatch(tensor, sample_sizes=torch.tensor(sizes))


ELSEWHERE = "the same numbers, elsewhere in memory"
WIDTH = "the same numbers, of another integer dtype"

LOGITS = leaf([[0.5, -1.0, 2.0], [0.0, 1.5, -2.5], [-0.5, 0.25, 3.0], [1.0, -3.0, 0.75]])
PROBABILITIES = leaf(LOGITS.detach().sigmoid())
LABELS = torch.tensor([0, 1, 2, 3])
OF_ROWS = torch.tensor([1.0, 2, 3, 4])
OF_CLASSES = torch.tensor([1.0, 3, 2])
ONE = torch.tensor([3.0])
HEATMAP = torch.tensor([[1.0, 0.5, 0.0], [0.25, 1.0, 0.75], [0.0, 0.5, 0.9], [0.1, 0.2, 0.3]])


def one_for_another(option: str, other: str, tensor: Tensor, instead: Any = None, **usual: Any) -> Other:
    """A tensor for one option in place of the same tensor for another option, which is ``instead`` then."""
    return Other({option: tensor, other: instead}, usual | {other: tensor})


OF_REDUCTION = {
    "reduction": ["none", "sum"],
    "avg_factor": [
        3.0,
        torch.tensor(3.0),
        Other({"avg_factor": 7}, {"avg_factor": 3}),
        Other({"avg_factor": torch.tensor([3.0])}, {"avg_factor": torch.tensor(3.0)}),
        Other({"avg_factor": 3.0}, {"reduction": "none"}, alike="each loss for itself has no divisor"),
    ],
}
OF_LABELS = {
    "target": [LABELS.flip(0), Other({"target": LABELS.int()}, alike=WIDTH)],
    "alpha": [0.75, 1, 1.5],
    "gamma": [1.0, -1.0, Other({"gamma": 0}, {"gamma": 1.5})],
    "class_weight": OF_CLASSES,
}
OF_LOGITS = [
    LOGITS.detach() + 1,
    LOGITS.detach().double().requires_grad_(),
    LOGITS.detach().half().requires_grad_(),
    LOGITS.detach(),
    Other({"logits": other_way_round(LOGITS)}, alike=ELSEWHERE),
    Other({"logits": leaf(LOGITS.detach()[:2]), "target": LABELS[:2]}),
]


OF_PROBABILITIES = {
    "pred": PROBABILITIES.detach() / 2,
    "target": 1 - HEATMAP,
    "alpha": 1.0,
    "gamma": 1.0,
    "weight": HEATMAP,
    "pos_weight": 2.0,
    "neg_weight": 2.0,
    "reduction": ["none", "sum"],
    "avg_factor": [3.0, ONE, "num_pos"],
}


def module(kind: type[torch.nn.Module]) -> dict[str, Any]:
    """How a module is called, with the options of its constructor and of ``forward``."""

    def call(**options: Any) -> Any:
        of_module = {name: options.pop(name) for name in inspect.signature(kind).parameters if name in options}
        return kind(**of_module)(**options)

    return {"call": call, "signatures": (kind, kind.forward)}


OF_MODULE = {
    "reduction": "none",
    "avg_factor": 3.0,
    "loss_weight": 3.0,
    "avg_factor_eps": [
        Other({"avg_factor_eps": 0.5}, {"avg_factor": 3.0}),
        Other({"avg_factor_eps": 0.5}, {"avg_factor": torch.tensor(3.0)}),
        Other({"avg_factor_eps": 0.5}, alike="nothing is added where there is no divisor"),
    ],
    "reduction_override": ["none", "sum"],
}

CENTER, RADIUS, FIRST = torch.tensor([[1, 1]]), torch.tensor([1]), torch.tensor([0])
MAP = torch.full((2, 3, 4), 0.01)
CENTERS, RADII = torch.tensor([[[1, 1], [2, 0]], [[3, 2], [0, 0]]]), torch.tensor([[1, 0], [1, 0]])
COUNTS, CLASSES = torch.tensor([2, 1]), torch.tensor([[1, 0], [0, 1]])
BY_CLASS = {"labels": CLASSES, "num_classes": 2}
OF_TARGETS = {
    "centers": [
        CENTERS.flip(0),
        Other({"centers": CENTERS.int()}, alike=WIDTH),
        Other({"centers": batch(CENTERS, 1, 1), "counts": None}),
    ],
    "radii": [RADII.flip(1), CENTERS, Other({"radii": RADII.int()}, alike=WIDTH)],
    "counts": [COUNTS.flip(0), Other({"counts": COUNTS.int()}, alike=WIDTH)],
    "diameter_to_sigma_factor": [3.0, 0.0],
    "k_scale": [0.5, True, math.inf, Other({"k_scale": 1}, alike="the same number")],
}
BOXES = torch.tensor([[[-8.0, -12.0, 24.0, 20.0], [12.0, 4.0, 20.0, 12.0]]])

ROWS = leaf([[[1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [4.0, 40.0]]])
IMAGES = [leaf([[[[[1.0, 2.0], [3.0, 4.0]], [[10.0, 20.0], [30.0, 40.0]]]]])]
LIST_OF_MAPS = {"feature_maps": IMAGES, "spatial_shape": None, "scale_start_index": None}
OF_ONE = torch.tensor([[0]])  # (N, L)
LOCATION = torch.tensor([[[[[0.25, 0.75]]]]])  # (B, A, K, N, 2)
WEIGHTS = torch.tensor([[[[[[2.0]]]]]])  # (B, A, K, N, L, G)

DATA = leaf([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
WIDER = leaf([[1.0, 2.0, 3.0, 7.0], [4.0, 5.0, 6.0, 8.0]])
INDICES, FEWER, TURNED = (
    batch(torch.tensor(indices), *sizes)
    for indices, sizes in (([[2, 0], [1, 0]], (2, 1)), ([[2, 0], [1, 0]], (1, 1)), ([[0, 2], [-3, 0]], (2, 1)))
)
ENTRIES = leaf([[7.0, 8.0], [9.0, 11.0]])
MASK = torch.tensor([[True, False, True], [False, True, False]])
DEEP = leaf(torch.arange(12.0).reshape(2, 3, 2) + 1)  # (B, D, M), or (B, M, D)
AS_DEEP = {"dim_to_index_in": Other({"dim_to_index_in": 2}, {"input_data": leaf(torch.arange(18.0).view(2, 3, 3))})}
OF_FILLER = [
    5.0,
    Other({"filler_value": 1}, {"filler_value": 2}),
    Other({"filler_value": -0.0}, {"filler_value": 0.0}),
    Other({"filler_value": True}, {"filler_value": 1.0}, alike="the same number"),
]
OF_INDICES = [
    TURNED,
    FEWER,
    Other({"output_indices": batch(INDICES.tensor.int(), 2, 1)}, alike=WIDTH),
]


class Fields(NamedTuple):
    labels: Any
    source: str


FUNCTIONS = {
    "sigmoid_focal_loss": Function(
        {"logits": LOGITS, "target": LABELS},
        {
            "logits": OF_LOGITS,
            **OF_LABELS,
            "target": [*OF_LABELS["target"], HEATMAP, HEATMAP == 1],
            "alpha": [*OF_LABELS["alpha"], -1.0],
            "weight": [
                OF_ROWS,
                leaf(OF_ROWS),
                leaf(HEATMAP),
                Other({"weight": leaf(HEATMAP)}, {"weight": HEATMAP}),
                one_for_another(
                    "weight", "class_weight", OF_CLASSES, logits=leaf(LOGITS.detach()[:3]), target=LABELS[1:]
                ),
                one_for_another("weight", "avg_factor", ONE, logits=leaf(LOGITS.detach()[:1]), target=LABELS[:1]),
                one_for_another("weight", "avg_factor", ONE, 5.0, logits=leaf(LOGITS.detach()[:1]), target=LABELS[:1]),
            ],
            "class_weight": [
                OF_CLASSES,
                one_for_another("class_weight", "avg_factor", ONE, logits=leaf(LOGITS.detach()[:, :1])),
                one_for_another("class_weight", "avg_factor", ONE, 5.0, logits=leaf(LOGITS.detach()[:, :1])),
            ],
            "activated": Other({"activated": True}, {"logits": PROBABILITIES}),
            **OF_REDUCTION,
        },
    ),
    "softmax_focal_loss": Function(
        {"logits": LOGITS, "target": LABELS},
        {**OF_LABELS, "logits": LOGITS.detach() + 1, "reduction": ["none", "sum"], "avg_factor": [3.0, ONE]},
    ),
    "gaussian_focal_loss": Function({"pred": PROBABILITIES, "target": HEATMAP}, OF_PROBABILITIES),
    "gaussian_focal_loss_with_logits": Function(
        {"logits": LOGITS, "target": HEATMAP},
        {
            "logits": [
                *OF_LOGITS[:-1],
                Other({"logits": leaf(LOGITS.detach()[:2]), "target": HEATMAP[:2]}),
            ],
            "target": [1 - HEATMAP, HEATMAP.half(), Other({"target": other_way_round(HEATMAP)}, alike=ELSEWHERE)],
            "alpha": [1.0, -1.0, Other({"alpha": 0}, {"alpha": 1.5})],
            "gamma": [1.0, -1.0, Other({"gamma": 0}, {"gamma": 1.5})],
            "weight": [
                HEATMAP,
                leaf(HEATMAP),
                Other({"weight": OF_CLASSES}, {"weight": OF_ROWS[:, None]}),
                one_for_another("weight", "avg_factor", ONE, 5.0),
            ],
            "pos_weight": [2.0, math.inf],
            "neg_weight": [2.0, math.inf],
            **OF_REDUCTION,
            "avg_factor": [
                *OF_REDUCTION["avg_factor"],
                "num_pos",
                Other({"avg_factor": "num_pos"}, {"avg_factor": 3.0}),
            ],
            "clip": [0.4, Other({"clip": 0.6}, {"clip": 0.3})],
        },
    ),
    "nn.FocalLoss": Function(
        {"pred": LOGITS, "target": LABELS},
        {
            "pred": LOGITS.detach() + 1,
            "target": [LABELS.flip(0), HEATMAP, Other({"target": (HEATMAP == 1).long()}, {"target": HEATMAP})],
            "weight": [OF_ROWS, leaf(HEATMAP)],
            "use_sigmoid": False,
            "gamma": 1.0,
            "alpha": 0.75,
            "activated": Other({"activated": True}, {"pred": PROBABILITIES}),
            **OF_MODULE,
        },
        **module(nn.FocalLoss),
    ),
    "nn.SigmoidFocalLoss": Function(
        {"input": LOGITS, "target": LABELS, "gamma": 2.0, "alpha": 0.25},
        {
            "input": LOGITS.detach() + 1,
            "target": LABELS.flip(0),
            "gamma": 1.0,
            "alpha": 0.75,
            "weight": OF_CLASSES,
            "reduction": ["none", "sum"],
        },
        **module(nn.SigmoidFocalLoss),
    ),
    "nn.SoftmaxFocalLoss": Function(
        {"input": LOGITS, "target": LABELS, "gamma": 2.0, "alpha": 0.25},
        {
            "input": LOGITS.detach() + 1,
            "target": LABELS.flip(0),
            "gamma": 1.0,
            "alpha": 0.75,
            "weight": OF_CLASSES,
            "reduction": ["none", "sum"],
        },
        **module(nn.SoftmaxFocalLoss),
    ),
    "nn.GaussianFocalLoss": Function(
        {"pred": PROBABILITIES, "target": HEATMAP},
        {
            **OF_PROBABILITIES,
            "pos_inds": Other({"pos_inds": torch.tensor([1, 2]), "pos_labels": torch.tensor([0, 2])}),
            "pos_labels": Other(
                {"pos_labels": torch.tensor([0, 1])},
                {"pos_inds": torch.tensor([1, 2]), "pos_labels": torch.tensor([0, 2])},
            ),
            **OF_MODULE,
        },
        **module(nn.GaussianFocalLoss),
    ),
    "draw_heatmap": Function(
        {"heatmaps": MAP, "centers": CENTER, "radii": RADIUS, "heatmap_idxes": FIRST},
        {
            "heatmaps": [
                MAP.double(),
                MAP.mT.contiguous(),
                Other({"heatmaps": leaf(MAP)}, recorded=False),
            ],
            "centers": [CENTER + 1, Other({"centers": CENTER.int()}, alike=WIDTH)],
            "radii": [RADIUS - 1, torch.tensor([[1, 0]])],
            "heatmap_idxes": FIRST + 1,
            "diameter_to_sigma_factor": [3.0, 0.0],
            "k_scale": [0.5, True, math.inf],
            "clear": [True, 0],
        },
        in_place=True,
    ),
    "draw_heatmap_batched": Function(
        {"heatmap": MAP, "centers": CENTERS, "radii": RADII, "counts": COUNTS},
        {
            **OF_TARGETS,
            "heatmap": [
                MAP.double(),
                MAP.mT.contiguous(),
                Other({"heatmap": leaf(MAP)}, recorded=False),
            ],
            "labels": [
                Other({"labels": CLASSES, "heatmap": MAP[:, None].repeat(1, 2, 1, 1)}),
                Other({"labels": 1 - CLASSES}, {"labels": CLASSES, "heatmap": MAP[:, None].repeat(1, 2, 1, 1)}),
            ],
            "clear": [True, 0],
        },
        in_place=True,
    ),
    "heatmap_targets": Function(
        {"centers": CENTERS, "radii": RADII, "size": (3, 4), "counts": COUNTS},
        {
            **OF_TARGETS,
            "size": [(4, 3), (3, 5), (5, 4), Other({"size": [3, 4]}, alike="a list for a tuple"), (3.0, 4)],
            "labels": [Other(BY_CLASS), Other({"labels": 1 - CLASSES}, BY_CLASS)],
            "num_classes": [Other({"num_classes": number}, BY_CLASS) for number in (3, 2.0)],
        },
    ),
    "boxes_to_heatmap": Function(
        {"boxes": BOXES, "labels": None, "size": (3, 5), "stride": 4, "min_overlap": 0.3, "radius": "mmdet"}
        | {"counts": torch.tensor([2])},
        {
            "boxes": [BOXES + 4, BOXES[:, :1]],
            "labels": Other({"labels": torch.tensor([[1, 0]]), "num_classes": 2}),
            "size": [(5, 3), (4, 5)],
            "stride": [8, (4, 8)],
            "min_overlap": 0.7,
            "radius": "mmdet3d",
            "num_classes": Other({"num_classes": 3}, {"labels": torch.tensor([[1, 0]]), "num_classes": 2}),
            "counts": torch.tensor([1]),
            "min_radius": 2,
            "box_format": "cxcywh",
            "origin": (4.0, 0.0),
            "diameter_to_sigma_factor": 3.0,
            "k_scale": 0.5,
        },
    ),
    "gaussian_radius": Function(
        {"det_size": (8, 12), "min_overlap": 0.3, "convention": "mmdet"},
        {"det_size": (9, 12), "min_overlap": 0.7, "convention": "mmdet3d"},
    ),
    "deformable_aggregation": Function(
        {
            "feature_maps": ROWS.detach(),
            "spatial_shape": torch.tensor([[[2, 2]]]),
            "scale_start_index": OF_ONE,
            "sampling_location": LOCATION,
            "weights": WEIGHTS,
        },
        {
            "feature_maps": ROWS,
            "spatial_shape": Other(LIST_OF_MAPS, alike="the same maps as a list"),
            "scale_start_index": Other({"scale_start_index": OF_ONE + 1}, {"spatial_shape": torch.tensor([[[1, 2]]])}),
            "sampling_location": LOCATION / 2,
            "weights": leaf(WEIGHTS.expand(-1, -1, -1, -1, -1, 2)),
        },
    ),
    "feature_maps_format": Function(
        {"feature_maps": IMAGES},
        {
            "feature_maps": [[IMAGES[0].detach()], [leaf(IMAGES[0].detach()[..., :1])]],
            "inverse": Other({"inverse": True, "feature_maps": [ROWS, torch.tensor([[[2, 2]]]), OF_ONE]}),
        },
    ),
    "ragged.apply_mask_to_tensor": Function(
        {"data": DATA, "mask": MASK}, {"data": DATA.detach(), "mask": ~MASK, "value_to_set": [5.0, -0.0]}
    ),
    "ragged.average_over_targets": Function(
        {"data": batch(DATA, 2, 0)}, {"data": batch(DATA, 3, 1), "nans_to_zero": False}
    ),
    "ragged.batched_bool_indexing": Function(
        {"input_data": DATA, "input_mask": MASK}, {"input_data": DATA.detach(), "input_mask": ~MASK}
    ),
    "ragged.batched_bool_indexing_write": Function(
        {"to_write": batch(ENTRIES, 2, 1), "output_mask": MASK, "to_write_into": DATA},
        {
            "to_write": batch(ENTRIES.detach(), 2, 1),
            "output_mask": torch.tensor([[False, True, True], [True, False, False]]),
            "to_write_into": [DATA.detach(), batch(DATA, 3, 3)],
        },
    ),
    "ragged.batched_index_mapping": Function(
        {"source_data": DATA, "source_indices": INDICES, "target_indices": TURNED, "target_data": WIDER},
        {
            "source_data": [DATA.detach(), WIDER],
            "source_indices": FEWER,
            "target_indices": FEWER,
            "target_data": [WIDER.detach(), DATA],
        },
    ),
    "ragged.batched_indexing_access": Function(
        {"input_data": DATA, "input_indices": INDICES},
        {
            "input_data": [
                DATA.detach(),
                WIDER,
                DEEP,
                DATA.detach().double().requires_grad_(),
                Other({"input_data": other_way_round(DATA)}, alike=ELSEWHERE),
            ],
            "input_indices": [TURNED, FEWER, Other({"input_indices": batch(INDICES.tensor.int(), 2, 1)}, alike=WIDTH)],
            "filler_value": OF_FILLER,
            **AS_DEEP,
        },
    ),
    "ragged.batched_indexing_write": Function(
        {"to_write": ENTRIES, "output_indices": INDICES, "to_write_into": DATA},
        {
            "to_write": [ENTRIES.detach(), leaf(DATA.detach() + 1)],
            "output_indices": OF_INDICES,
            "to_write_into": [DATA.detach(), WIDER],
            "dim_to_index_in": Other(
                {"dim_to_index_in": 2},
                {"to_write": DEEP, "to_write_into": leaf(torch.arange(18.0).view(2, 3, 3)[..., :3])},
            ),
        },
    ),
    "ragged.batched_inverse_indexing_access": Function(
        {"input_data": ENTRIES, "output_indices": INDICES, "output_num_targets": 3},
        {
            "input_data": [ENTRIES.detach(), DEEP],
            "output_indices": OF_INDICES,
            "output_num_targets": 5,
            "filler_value": OF_FILLER,
            "dim_to_index_in": Other({"dim_to_index_in": 2}, {"input_data": DEEP}),
        },
    ),
    "ragged.collate": Function(
        {"samples": [{"labels": torch.tensor([7])}, {"labels": torch.tensor([8])}]},
        {
            "samples": [{"labels": torch.tensor([7])}, {"labels": torch.tensor([9])}],
            "ragged": Other({"ragged": ["labels"]}),
        },
    ),
    "ragged.combine_data": Function(
        {"data_list": [[DATA[0].detach()], [DATA[1, :2].detach()]]},
        {
            "data_list": [[[DATA[0].detach()], [DATA[1, :1].detach()]]],
            "other_with_same_sample_sizes": batch(DATA, 2, 1),
            "device": Other({"device": "cpu"}, alike="the same numbers on another device"),
            "flatten_batch_dims": False,
        },
    ),
    "ragged.from_nested": Function(
        {"nested": torch.nested.nested_tensor_from_jagged(torch.arange(5.0), torch.tensor([0, 2, 5]))},
        {
            "nested": torch.nested.nested_tensor_from_jagged(torch.arange(5.0), torch.tensor([0, 3, 5])),
            "max_sample_size": 2,
        },
    ),
    "ragged.from_values": Function(
        {"values": leaf(torch.arange(5.0)), "lengths": torch.tensor([2, 3])},
        {
            "values": torch.arange(5.0),
            "offsets": torch.tensor([1, 2]),
            "lengths": torch.tensor([3, 2]),
            "max_sample_size": 2,
        },
    ),
    "ragged.get_compact_from_named_tuple": Function(
        {"mask": MASK, "data": Fields(DATA, "camera")}, {"mask": ~MASK, "data": Fields(DATA, "radar")}
    ),
    "ragged.get_compact_lists": Function(
        {"mask": MASK, "data": [DATA]}, {"mask": ~MASK, "data": [[DATA, DATA.detach()]]}
    ),
    "ragged.get_indices_from_mask": Function({"mask": MASK}, {"mask": ~MASK}),
    "ragged.get_mask_from_indices": Function(
        {"mask_num_targets": 3, "indices": INDICES}, {"mask_num_targets": 4, "indices": FEWER}
    ),
    "ragged.squeeze_except_batch_and_sample": Function({"data": DEEP[..., :1].detach()}, {"data": DEEP.detach()}),
    "ragged.sum_over_targets": Function({"data": batch(DATA, 2, 0)}, {"data": batch(DATA, 3, 1)}),
    "ragged.to_nested": Function({"batch": batch(DATA, 2, 0)}, {"batch": batch(DATA, 3, 1)}),
    "ragged.to_values": Function({"batch": batch(DATA, 2, 0)}, {"batch": batch(DATA, 3, 1)}),
}

NO_CALLS = {"debug_checks": "a context manager", "ragged.move_ragged_inputs": "registers a hook"}


def public_functions() -> set[str]:
    """Names of all public functions, and of the losses that are modules."""
    names = {name for name in saccade.__all__ if inspect.isfunction(getattr(saccade, name))}
    names |= {f"ragged.{name}" for name in ragged.__all__ if inspect.isfunction(getattr(ragged, name))}
    return names | {f"nn.{name}" for name in nn.__all__ if name.endswith("Loss")}


def call_of(name: str) -> Callable[..., Any]:
    if name in FUNCTIONS and FUNCTIONS[name].call:
        return FUNCTIONS[name].call
    module, _, function = name.rpartition(".")
    return getattr(getattr(saccade, module) if module else saccade, function)


def options_of(name: str) -> list[str]:
    signatures = FUNCTIONS[name].signatures or (call_of(name),)
    names = [option for function in signatures for option in inspect.signature(function).parameters]
    return [option for option in dict.fromkeys(names) if option != "self"]


EVERY_OPTION = [(name, option) for name in sorted(FUNCTIONS) for option in options_of(name)]


def placed(value: Any, device: str, leaves: list[Tensor]) -> Any:
    """The same on the device, of fresh memory; tensors that require grad are leaves."""
    if isinstance(value, RaggedBatch):
        parts = placed(value.tensor, device, leaves), None, placed(value.sample_sizes, device, leaves)
        return RaggedBatch(*parts, value.non_uniform_dim)
    if isinstance(value, Tensor):
        if value.is_nested:
            return value.to(device)
        copy = value.detach().to(device).clone().requires_grad_(value.requires_grad)
        leaves += [copy] if copy.requires_grad else []
        return copy
    if isinstance(value, dict):
        return {name: placed(part, device, leaves) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        parts = [placed(part, device, leaves) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def parts_of(result: Any) -> list[Any]:
    """All tensors of a result, and what else there is."""
    if isinstance(result, RaggedBatch):
        return [result.tensor, result.mask, result.sample_sizes]
    if isinstance(result, Tensor):
        return [result.values(), result.offsets()] if result.is_nested else [result]
    if isinstance(result, dict):
        result = [*result.values()]
    if isinstance(result, (list, tuple)):
        return [part for one in result for part in parts_of(one)]
    return [result]


def bits(value: Any) -> tuple:
    if not isinstance(value, Tensor):
        return (repr(value),)
    numbers = value.detach().cpu()
    if numbers.is_floating_point():
        numbers = numbers.masked_fill(numbers.isnan(), torch.nan)  # of the many patterns of bits that are NaN, one
    in_memory = numbers.contiguous().flatten().view(torch.uint8)
    return str(value.dtype), str(numbers.tolist()), in_memory.tolist()


def outcome(name: str, options: dict[str, Any], device: str, recorded: bool = True) -> list[tuple] | str:
    """Results and gradients of a call, to the bit, or what it raises."""
    leaves: list[Tensor] = []
    given = placed(options, device, leaves)
    with torch.set_grad_enabled(recorded):
        try:
            result = call_of(name)(**given)
        except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
    parts = parts_of(next(iter(given.values())) if FUNCTIONS[name].in_place else result)
    differentiable = [part for part in parts if isinstance(part, Tensor) and part.requires_grad]
    gradients = []
    if differentiable:
        # Whole numbers: no order of sums changes them.
        seeds = [
            (torch.arange(part.numel(), device=device) % 3 + 1).view(part.shape).to(part) for part in differentiable
        ]
        gradients = torch.autograd.grad(differentiable, leaves, seeds, allow_unused=True, materialize_grads=True)
    return [bits(part) for part in (*parts, *gradients)]


def forget() -> None:
    """A state in which no call was made: none is known, no launch is prepared, nothing is kept."""
    for operator in OPERATORS.values():
        operator.forget()
    for name, module in [*sys.modules.items()]:
        if name.startswith("saccade.") and name.endswith(("kernels", "launch")):
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()
                elif type(value).__name__ == "LaunchedKernel":  # which is imported where Triton is
                    value._kept.clear()
    formatting._kept.clear()


@pytest.fixture
def fast(device, monkeypatch) -> Iterator[str]:
    """A device whose tensors' calls go past the dispatcher and are known: a GPU, or the CPU taken for one."""
    if device == "cpu":
        monkeypatch.setattr(torch_internals, "ORDINARY_GPU_KEYS", OF_CPU_TENSORS)
    forget()
    yield device
    forget()


def assert_told_apart(usual: Callable[[], Any], changed: Callable[[], Any], may_be_alike: bool, what: str) -> None:
    """Each gives the same whether or not it was called before, and whether or not the other one was.

    Of two calls that are taken for one another, the one that comes first is right.
    """
    forget()
    of_changed = changed()
    of_usual_after_it = usual()
    forget()
    of_usual = usual()
    assert may_be_alike or of_changed != of_usual, f"{what}: the changed call gives the same as the usual one"
    assert of_usual_after_it == of_usual, f"{what}: after the changed call, the usual one gives something else"
    if any(operator.known_calls.known for operator in OPERATORS.values()):
        assert changed() == of_changed, f"{what}: after the usual call, the changed one gives something else"
        assert usual() == of_usual, f"{what}: the usual call, made before, gives something else than then"
        assert changed() == of_changed, f"{what}: the changed call, made before, gives something else than then"


def test_every_public_function_is_here():
    missing = public_functions() - FUNCTIONS.keys() - NO_CALLS.keys()
    assert not missing, f"add to FUNCTIONS of {__file__}: {sorted(missing)}"


def test_no_changed_value_is_left_over():
    for name, function in FUNCTIONS.items():
        assert set(function.changed) <= set(options_of(name)), name


@pytest.mark.parametrize(("name", "option"), EVERY_OPTION)
def test_an_option_changed_and_changed_back(name, option, fast):
    function = FUNCTIONS[name]
    assert option in function.changed, f"add a changed value of {option!r} to FUNCTIONS[{name!r}] of {__file__}"
    changed = function.changed[option]
    for number, other in enumerate(changed if isinstance(changed, list) else [changed]):
        if not isinstance(other, Other):
            other = Other({option: other})
        assert option in other.options
        against = function.usual | other.against
        one, another = (
            partial(outcome, name, options, fast, other.recorded) for options in (against, against | other.options)
        )
        assert_told_apart(one, another, bool(other.alike), f"{name}, {option}, change {number}")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_calls_without_gradients_and_calls_with_them(name, fast):
    """The same options: whether a gradient is recorded is the state of the thread."""
    with_them, without = (partial(outcome, name, FUNCTIONS[name].usual, fast, recorded) for recorded in (True, False))
    assert_told_apart(with_them, without, may_be_alike=True, what=f"{name}, changed to no gradients")


@pytest.mark.parametrize("recorded", [True, False])
def test_both_forms_of_the_gaussian_loss_in_turn(recorded, fast):
    """They share their known calls."""
    predictions = PROBABILITIES.detach().requires_grad_(recorded)
    one, another = (
        partial(outcome, name, {argument: predictions, "target": HEATMAP}, fast)
        for name, argument in (("gaussian_focal_loss", "pred"), ("gaussian_focal_loss_with_logits", "logits"))
    )
    assert_told_apart(one, another, may_be_alike=False, what="forms")


@pytest.mark.parametrize(
    "name",
    [
        *("sigmoid_focal_loss", "gaussian_focal_loss", "gaussian_focal_loss_with_logits"),
        *("draw_heatmap", "draw_heatmap_batched", "heatmap_targets", "ragged.batched_indexing_access"),
    ],
)
def test_calls_are_known_here(name, fast):
    """Or nothing above would show anything."""
    if name.startswith("ragged") and not served_by_triton(torch.empty(0, device=fast)):
        pytest.skip("has no kernel there")
    for _ in range(2):
        outcome(name, FUNCTIONS[name].usual, fast)
    assert any(known.is_used for operator in OPERATORS.values() for known in operator.known_calls.known)
