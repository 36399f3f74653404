"""How the kernels of Gaussian focal loss are launched."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from saccade.losses.focal_term_kernels import constant_power
from saccade.losses.gaussian.kernels import gradient_kernel, loss_kernel
from saccade.losses.gaussian.options import GaussianOptions
from saccade.losses.memory_axes import memory_axes
from saccade.losses.reduction import UNREDUCED, Reduction, normalized
from saccade.losses.reduction_launch import as_numbers, prepared_finish, programs_of, workspace
from saccade.operator.gradients import room_for_gradients
from saccade.operator.launch import TRITON_DTYPE, LaunchedKernel, PreparedLaunch, cdiv, dependent_launch
from saccade.precision import compute_dtype

# Elements of a tile and warps that work on it: few where there are few, so that all multiprocessors have some.
_TILE, _WARPS, _SMALL_TILE, _FEW = 1024, 4, 512, 1 << 19

# Of so few predictions the gradient is computed with the loss.
_FEW_TOGETHER = 1 << 20


def _launch_for(
    kernel: LaunchedKernel, pred: Tensor, others: Sequence[Tensor | None], options: GaussianOptions, is_reduced: bool
) -> tuple[PreparedLaunch, int]:
    """The launch for these tensors, and its number of programs.

    ``others`` broadcast to the shape of the predictions, in the order of the kernel's steps.
    """
    elements = pred.numel()
    visited = [None if tensor is None else tensor.expand(pred.shape).stride() for tensor in (pred, *others)]
    sizes, steps = memory_axes(pred.shape, *visited)
    in_order = tuple(math.prod(sizes[:axis]) for axis in range(len(sizes)))
    block = _SMALL_TILE if elements < _FEW else _TILE
    tiles = cdiv(elements, block)
    programs = programs_of(tiles, is_reduced and kernel is loss_kernel)
    launch = kernel.prepare(
        (programs,),
        elements,
        tiles,
        sizes,
        *(None if of_tensor == in_order else of_tensor for of_tensor in steps),
        ALPHA=constant_power(options.alpha),
        GAMMA=constant_power(options.gamma),
        WITH_LOGITS=options.with_logits,
        CLIPPED=options.clip is not None,
        REDUCED=is_reduced,
        BLOCK=block,
        COMPUTE=TRITON_DTYPE[compute_dtype(pred)],
        num_warps=_WARPS,
        **dependent_launch(pred.device),
    )
    return launch, programs


def _written(pred: Tensor) -> Tensor:
    """As what is written for each prediction: laid out in its own way, but in no memory."""
    return torch.empty_like(pred, device="meta")


def _numbers(options: GaussianOptions) -> tuple[float, ...]:
    return options.alpha, options.gamma, options.pos_weight, options.neg_weight, options.bound or 0.0


def _prepare_losses(
    pred: Tensor, target: Tensor, weight: Tensor | None, options: GaussianOptions, dtype: torch.dtype
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Make the unreduced losses, in a dtype, and no count, for calls with these arguments."""
    launch, _ = _launch_for(loss_kernel, pred, [target, weight, _written(pred)], options, is_reduced=False)
    numbers, compute = _numbers(options), compute_dtype(pred)

    def losses(
        pred: Tensor, target: Tensor, weight: Tensor | None, options: GaussianOptions, reduction: Reduction
    ) -> tuple[Tensor, Tensor]:
        output = torch.empty_like(pred, dtype=dtype)
        tensors = pred, target, as_numbers(weight), output, None, None, None, None, None
        launch(tensors, *numbers, reduction.scale, 0.0)
        return output, pred.new_empty(0, dtype=compute)

    return losses


def _prepare_reduced(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: GaussianOptions,
    reduction: Reduction,
    with_gradient: bool,
) -> Callable[..., Any]:
    """Make the reduced loss and the count, or a pair of these and the gradient, for calls with these arguments."""
    dtype, elements, counts_positives = compute_dtype(pred), pred.numel(), reduction.mode == "num_pos"
    others = [target, weight, _written(pred) if with_gradient else None]
    launch, programs = _launch_for(loss_kernel, pred, others, options, is_reduced=True)
    finish, numbers = prepared_finish(programs, pred.device), _numbers(options)

    def loss(
        pred: Tensor, target: Tensor, weight: Tensor | None, options: GaussianOptions, reduction: Reduction
    ) -> tuple[Any, Tensor]:
        avg_factor, scale, eps = reduction.avg_factor, reduction.factor(elements), reduction.eps
        output = pred.new_empty(() if avg_factor is None else avg_factor.shape, dtype=dtype)
        count = pred.new_empty(() if counts_positives else 0, dtype=dtype)
        inputs = pred, target, as_numbers(weight)
        if with_gradient:
            gradient = torch.empty_like(pred)
            sums, counter = workspace(programs, pred, dtype)
            launch((*inputs, sums, None, gradient, avg_factor, counter, output), *numbers, scale, eps)
            return (output, count), gradient
        sums = pred.new_empty(programs, dtype=dtype)
        counts = pred.new_empty(programs, dtype=torch.int64) if counts_positives else None
        launch((*inputs, sums, counts, None, None, None, None), *numbers, scale, eps)
        finish((sums, counts, avg_factor, output, count), scale, eps)
        return output, count

    return loss


def prepare_gaussian_focal_loss(
    pred: Tensor,  # not empty
    target: Tensor,  # of the shape of pred
    weight: Tensor | None,  # broadcasts to the shape of pred
    options: GaussianOptions,
    reduction: Reduction,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Make what the reference computes."""
    if reduction.is_none:
        return _prepare_losses(pred, target, weight, options, pred.dtype)
    return _prepare_reduced(pred, target, weight, options, reduction, with_gradient=False)


def prepare_gaussian_focal_loss_with_gradient(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: GaussianOptions,
    reduction: Reduction,
) -> Callable[..., tuple[tuple[Tensor, Tensor], Tensor]] | None:
    """Make the loss of few predictions and the gradient of these, in one launch; not where positives are counted."""
    is_half = pred.dtype.itemsize < 4  # of which the gradient would underflow, before what comes in multiplies it
    if reduction.mode in ("none", "num_pos") or is_half or not 0 < pred.numel() <= _FEW_TOGETHER:
        return None
    return _prepare_reduced(pred, target, weight, options, reduction, with_gradient=True)


def prepare_gaussian_focal_loss_backward(
    grad_output: Tensor,
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: GaussianOptions,
    reduction: Reduction,
    needed: list[bool],  # pred, weight
) -> Callable[..., tuple[Tensor, ...]]:
    """Make the gradients of pred and weight; an empty tensor for one that is not needed."""
    others = [target, weight, _written(pred), grad_output if reduction.is_none else None]
    launch, _ = _launch_for(gradient_kernel, pred, others, options, not reduction.is_none)
    losses = _prepare_losses(pred, target, None, options, compute_dtype(pred)) if needed[1] else None
    numbers = _numbers(options)

    def backward(
        grad_output: Tensor,
        pred: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: GaussianOptions,
        reduction: Reduction,
        needed: list[bool],
    ) -> tuple[Tensor, ...]:
        grad_pred, grad_weight = gradients = room_for_gradients((pred, weight), needed)
        if needed[0]:
            tensors = grad_output, pred, target, as_numbers(weight), reduction.avg_factor, grad_pred
            launch(tensors, *numbers, reduction.factor(pred.numel()), reduction.eps)
        if losses is not None:
            each, _ = losses(pred, target, None, options, UNREDUCED)
            each.mul_(normalized(grad_output.to(each.dtype), pred.numel(), reduction))
            grad_weight.copy_(each.sum_to_size(grad_weight.shape))
        return gradients

    return backward
