"""How the kernels of focal losses are launched."""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.losses.focal.kernels import gradient_kernel, loss_kernel
from saccade.losses.focal.options import SigmoidOptions
from saccade.losses.focal.softmax_kernels import softmax_gradient_kernel, softmax_loss_kernel
from saccade.losses.focal_term_kernels import constant_power
from saccade.losses.memory_axes import memory_axes
from saccade.losses.reduction import UNREDUCED, Reduction, new_loss, normalized
from saccade.losses.reduction_launch import as_numbers, prepared_finish, programs_of, workspace
from saccade.operator.gradients import room_for_gradients
from saccade.operator.launch import (
    TRITON_DTYPE,
    LaunchedKernel,
    PreparedLaunch,
    cdiv,
    dependent_launch,
    next_power_of_2,
)
from saccade.precision import compute_dtype

# Elements of a tile and warps that work on it, by bytes of a logit: of summed losses, and of what is written out.
# Fastest on an H200.
_TILES_SUMMED = {2: (2048, 4), 4: (1024, 4), 8: (1024, 4)}
_TILES_WRITTEN = {2: (2048, 2), 4: (1024, 4), 8: (1024, 4)}

# Where there are few elements: so few to a tile that all multiprocessors have some.
_FEW, _SMALL_TILE, _WARPS = 1 << 19, 512, 4

# Of so few logits the gradient is computed with the loss.
_FEW_TOGETHER = 1 << 19

# Classes that a program reads one after the other, where each is a tile; and from how many rows on it is one.
_CLASSES_AT_ONCE, _ROWS_BY_CLASS = 16, 128

# Elements of a row that share the search for their row and its label, at most.
_VECTOR = 16

# Of softmax: classes of a row, and elements of all rows, that a program works on at a time.
_MOST_CLASSES, _ELEMENTS = 1024, 1024

# Of softmax's gradient of more classes. Triton 3.5 left alone uses 40 and spills 8 bytes; later ones need no limit.
_REGISTERS = {"maxnreg": 48} if triton.__version__.startswith("3.5.") and not torch.version.hip else {}

Strides = tuple[int, ...]


def _launch_for(
    kernel: LaunchedKernel,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    others: tuple[Strides | None, ...],
    options: SigmoidOptions,
    is_reduced: bool,
) -> tuple[PreparedLaunch, int]:
    """The launch for these tensors, and its number of programs.

    ``others`` are strides of tensors of the shape of the logits, in the order of the kernel's steps.
    """
    has_labels = target.ndim < logits.ndim
    weighs_rows = weight is not None and (weight.ndim < logits.ndim or weight.shape[-1] == 1)
    of_rows = logits.shape[:-1]
    classes, elements, rows = logits.shape[-1], logits.numel(), prod(of_rows)
    of_weight = None if weight is None else weight.stride()[: len(of_rows)] if weighs_rows else weight.stride()
    strides = logits.stride(), target.stride(), of_weight, *others
    sizes, row_steps = memory_axes(of_rows, *(of_tensor and of_tensor[: len(of_rows)] for of_tensor in strides))
    by_class = classes > 1 and 0 < row_steps[0][0] < logits.stride(-1) and rows >= _ROWS_BY_CLASS
    in_order = (1, tuple(classes * prod(sizes[:axis]) for axis in range(len(sizes))))
    steps = [
        None if of_tensor is None else (of_tensor[-1] if len(of_tensor) > len(of_rows) else 0, along_rows)
        for of_tensor, along_rows in zip(strides, row_steps, strict=True)
    ]
    tiles_of = _TILES_SUMMED if kernel is loss_kernel else _TILES_WRITTEN
    block, warps = (_SMALL_TILE, _WARPS) if elements < _FEW else tiles_of[logits.element_size()]
    at_once = min(classes, _CLASSES_AT_ONCE)
    tiles = cdiv(rows, block) * cdiv(classes, at_once) if by_class else cdiv(elements, block)
    programs = programs_of(tiles, is_reduced and kernel is loss_kernel, at_once if by_class else 1)
    launch = kernel.prepare(
        (programs,),
        rows,
        tiles,
        sizes,
        *(None if not by_class and of_tensor == in_order else of_tensor for of_tensor in steps),
        C=classes,
        GAMMA=constant_power(options.gamma),
        HAS_LABELS=has_labels,
        WEIGHS_ROWS=weighs_rows,
        HARD=has_labels or target.dtype == torch.bool,
        BALANCED=options.alpha >= 0,
        ACTIVATED=options.activated,
        REDUCED=is_reduced,
        VECTOR=1 if by_class else min(classes & -classes, _VECTOR),  # the power of 2 that divides the classes
        BY_CLASS=by_class,
        AT_ONCE=at_once,
        BLOCK=block,
        INDEX=tl.int32 if elements < 2**31 - block * at_once else tl.int64,  # counts to the end of the last tile
        COMPUTE=TRITON_DTYPE[compute_dtype(logits)],
        num_warps=warps,
        **dependent_launch(logits.device),
    )
    return launch, programs


def _layout_of(logits: Tensor) -> Strides:
    """Strides of what is written for each logit: its own are not always the logits'."""
    return torch.empty_like(logits, device="meta").stride()


def _with_numbers(
    target: Tensor, weight: Tensor | None, class_weight: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    packed = None if class_weight is None else class_weight.contiguous()
    return as_numbers(target), as_numbers(weight), as_numbers(packed)


def _prepare_losses(
    logits: Tensor, target: Tensor, weight: Tensor | None, options: SigmoidOptions, dtype: torch.dtype
) -> Callable[..., Tensor]:
    """Make the unreduced losses, in a dtype, for calls with these arguments."""
    launch, _ = _launch_for(loss_kernel, logits, target, weight, (_layout_of(logits),), options, is_reduced=False)

    def losses(
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        class_weight: Tensor | None,
        options: SigmoidOptions,
        reduction: Reduction,
    ) -> Tensor:
        output = torch.empty_like(logits, dtype=dtype)
        tensors = logits, *_with_numbers(target, weight, class_weight), output, None, None, None, None
        launch(tensors, options.alpha, options.gamma, reduction.scale, 0.0)
        return output

    return losses


def _prepare_reduced(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    class_weight: Tensor | None,
    options: SigmoidOptions,
    with_gradient: bool,
) -> Callable[..., Any]:
    """Make the reduced loss, or a pair of that and the gradient of the logits, for calls with these arguments."""
    dtype, count = compute_dtype(logits), logits.numel()
    others = (_layout_of(logits) if with_gradient else None,)
    launch, programs = _launch_for(loss_kernel, logits, target, weight, others, options, is_reduced=True)
    finish = prepared_finish(programs, logits.device)
    as_given = target.dtype != torch.bool and weight is None and class_weight is None

    def loss(
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        class_weight: Tensor | None,
        options: SigmoidOptions,
        reduction: Reduction,
    ) -> Tensor | tuple[Tensor, Tensor]:
        avg_factor, scale, eps = reduction.avg_factor, reduction.factor(count), reduction.eps
        output = logits.new_empty(() if avg_factor is None else avg_factor.shape, dtype=dtype)
        inputs = (target, weight, class_weight) if as_given else _with_numbers(target, weight, class_weight)
        if with_gradient:
            gradient = torch.empty_like(logits)
            sums, counter = workspace(programs, logits, dtype)
            tensors = logits, *inputs, sums, gradient, avg_factor, counter, output
            launch(tensors, options.alpha, options.gamma, scale, eps)
            return output, gradient
        sums = logits.new_empty(programs, dtype=dtype)
        launch((logits, *inputs, sums, None, None, None, None), options.alpha, options.gamma, scale, eps)
        finish((sums, None, avg_factor, output, None), scale, eps)
        return output

    return loss


def prepare_sigmoid_focal_loss(
    logits: Tensor,  # (..., C), not empty
    target: Tensor,  # (...) integer, or (..., C) bool or floating
    weight: Tensor | None,  # (...), (..., C) or (..., 1)
    class_weight: Tensor | None,  # (C,)
    options: SigmoidOptions,
    reduction: Reduction,
) -> Callable[..., Tensor]:  # (..., C), or reduced
    """Make ``saccade.sigmoid_focal_loss``."""
    if not reduction.is_none:
        return _prepare_reduced(logits, target, weight, class_weight, options, with_gradient=False)
    return _prepare_losses(logits, target, weight, options, logits.dtype)


def prepare_sigmoid_focal_loss_with_gradient(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    class_weight: Tensor | None,
    options: SigmoidOptions,
    reduction: Reduction,
) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """Make the loss of few logits and the gradient of these, in one launch."""
    is_half = logits.dtype.itemsize < 4  # of which the gradient would underflow, before what comes in multiplies it
    if reduction.is_none or is_half or not 0 < logits.numel() < _FEW_TOGETHER:
        return None
    return _prepare_reduced(logits, target, weight, class_weight, options, with_gradient=True)


def prepare_sigmoid_focal_loss_backward(
    grad_output: Tensor,  # (..., C), or reduced
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    class_weight: Tensor | None,
    options: SigmoidOptions,
    reduction: Reduction,
    needed: list[bool],  # logits, weight
) -> Callable[..., tuple[Tensor, ...]]:
    """Make the gradients of logits and weight; an empty tensor for one that is not needed."""
    others = _layout_of(logits), grad_output.stride() if reduction.is_none else None
    launch, _ = _launch_for(gradient_kernel, logits, target, weight, others, options, not reduction.is_none)
    losses = _prepare_losses(logits, target, None, options, compute_dtype(logits)) if needed[1] else None

    def backward(
        grad_output: Tensor,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        class_weight: Tensor | None,
        options: SigmoidOptions,
        reduction: Reduction,
        needed: list[bool],
    ) -> tuple[Tensor, ...]:
        grad_logits, grad_weight = gradients = room_for_gradients((logits, weight), needed)
        if needed[0]:
            inputs = _with_numbers(target, weight, class_weight)
            tensors = grad_output, logits, *inputs, reduction.avg_factor, grad_logits
            launch(tensors, options.alpha, options.gamma, reduction.factor(logits.numel()), reduction.eps)
        if losses is not None:
            each = losses(logits, target, None, class_weight, options, UNREDUCED)
            each.mul_(normalized(grad_output.to(each.dtype), logits.numel(), reduction))
            of_rows = (*grad_weight.shape, 1)[: logits.ndim]
            grad_weight.copy_(each.sum_to_size(of_rows).view(grad_weight.shape))
        return gradients

    return backward


def _softmax_launch_for(
    kernel: LaunchedKernel,
    logits: Tensor,
    others: tuple[Strides, ...],
    class_steps: tuple[int, ...],
    gamma: float,
    is_reduced: bool,
) -> tuple[PreparedLaunch, int]:
    """The launch, and its number of programs; ``others`` are strides along the axes of rows."""
    *of_rows, classes = logits.shape
    block_c = min(_MOST_CLASSES, next_power_of_2(classes))
    rows = prod(of_rows)
    tiles = cdiv(rows, _ELEMENTS // block_c)
    programs = programs_of(tiles, kernel is softmax_loss_kernel)
    sizes, steps = memory_axes(of_rows, logits.stride()[:-1], *others)
    launch = kernel.prepare(
        (programs,),
        rows,
        tiles,
        sizes,
        *steps,
        *class_steps,
        C=classes,
        GAMMA=constant_power(gamma),
        REDUCED=is_reduced,
        BLOCK_R=_ELEMENTS // block_c,
        BLOCK_C=block_c,
        COMPUTE=TRITON_DTYPE[compute_dtype(logits)],
        num_warps=4,
        **dependent_launch(logits.device),
        **(_REGISTERS if kernel is softmax_gradient_kernel and classes > _MOST_CLASSES else {}),
    )
    return launch, programs


def prepare_softmax_focal_loss(
    logits: Tensor,  # (..., C), not empty
    target: Tensor,  # (...) integer
    class_weight: Tensor | None,  # (C,)
    alpha: float,
    gamma: float,
    reduction: Reduction,
) -> Callable[..., Tensor]:  # (...), or reduced
    """Make ``saccade.softmax_focal_loss``."""
    is_reduced, dtype, rows = not reduction.is_none, compute_dtype(logits), target.numel()
    written = target if is_reduced else new_loss(logits, target.shape, reduction)
    strides, class_steps = (target.stride(), written.stride()), logits.stride()[-1:]
    launch, programs = _softmax_launch_for(softmax_loss_kernel, logits, strides, class_steps, gamma, is_reduced)
    finish = prepared_finish(programs, logits.device)

    def loss(
        logits: Tensor, target: Tensor, class_weight: Tensor | None, alpha: float, gamma: float, reduction: Reduction
    ) -> Tensor:
        output = new_loss(logits, target.shape, reduction)
        losses = logits.new_empty(programs, dtype=dtype) if is_reduced else output
        _, _, class_weight = _with_numbers(target, None, class_weight)
        launch((logits, target, class_weight, losses), alpha, gamma, reduction.scale)
        if is_reduced:
            finish((losses, None, reduction.avg_factor, output, None), reduction.factor(rows), reduction.eps)
        return output

    return loss


def prepare_softmax_focal_loss_backward(
    grad_output: Tensor,  # (...), or reduced
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    alpha: float,
    gamma: float,
    reduction: Reduction,
    needed: list[bool],  # logits
) -> Callable[..., Tensor]:  # (..., C)
    """Make the gradient of the logits."""
    layout, rows = _layout_of(logits), target.numel()
    of_grad = grad_output.stride() if reduction.is_none else target.stride()
    strides, class_steps = (target.stride(), layout[:-1], of_grad), (logits.stride(-1), layout[-1])
    launch, _ = _softmax_launch_for(softmax_gradient_kernel, logits, strides, class_steps, gamma, not reduction.is_none)
    lowest = torch.finfo(compute_dtype(logits)).min

    def backward(
        grad_output: Tensor,
        logits: Tensor,
        target: Tensor,
        class_weight: Tensor | None,
        alpha: float,
        gamma: float,
        reduction: Reduction,
        needed: list[bool],
    ) -> Tensor:
        grad_logits = torch.empty_like(logits)
        _, _, class_weight = _with_numbers(target, None, class_weight)
        tensors = grad_output, logits, target, class_weight, reduction.avg_factor, grad_logits
        launch(tensors, alpha, gamma, reduction.factor(rows), reduction.eps, lowest)
        return grad_logits

    return backward
