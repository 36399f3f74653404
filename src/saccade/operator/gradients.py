"""How an operator is differentiated: what its declaration says of that, and what autograd does with it."""

import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from saccade.operator.schema import Args, Leaves, Schema, pick
from saccade.operator.torch_internals import unchecked_apply
from saccade.triton_dispatch import served_by_triton

Call = Callable[..., Any]


@dataclass(frozen=True)
class Backward:
    """A gradient that is an operator of its own: ``<name>_backward(grad_output, <arguments>, bool[n] needed)``.

    It gives a gradient for each argument in ``of``, an empty tensor for one that is not needed, and cannot be
    differentiated. ``grad_output`` is the gradient of the first result; results after it are constants.
    """

    of: tuple[str, ...]
    reference: Call
    kernels: str | None = None
    fake: Call | None = None  # by default of ``room_for_gradients``
    arguments: Call | None = None
    """Given the arguments of a call and its result, the arguments that backward gets; by default those of the call."""
    with_result: str | None = None
    """Prepares the kernels that compute a result of one element together with the gradient of the first argument in
    ``of``, or gives ``None`` where that does not pay. Backward only multiplies then."""


@dataclass(frozen=True)
class Gradient:
    """A gradient that is made of operators that can be differentiated themselves."""

    of: tuple[str, ...]
    save: Call
    """Given those arguments of a call that it names, and ``result`` if it does: what backward needs, by name."""
    backward: Call
    """Given those names in ``of`` that are needed, the gradients of the results, and what was saved by name: a
    gradient for each name."""


def room_for_gradients(
    tensors: Sequence[Tensor | None],
    needed: Sequence[bool],
    memory_format: torch.memory_format = torch.preserve_format,
) -> tuple[Tensor, ...]:
    """Tensors to write gradients to, laid out as what they are the gradients of; empty where none is needed."""
    first = tensors[0]
    assert first is not None
    return tuple(
        torch.empty_like(tensor, memory_format=memory_format) if need and tensor is not None else first.new_empty(0)
        for tensor, need in zip(tensors, needed, strict=True)
    )


def cannot_be_differentiated(name: str) -> Gradient:
    """For a backward operator: differentiated itself, it raises.

    ``once_differentiable`` does not notice a second derivative of a scalar loss, whose incoming gradient is a constant;
    the saved inputs of a backward operator do require grad then, so a node of its own raises.
    """

    def backward(*_: Any, **__: Any) -> dict[str, Tensor]:
        raise RuntimeError(f"saccade::{name} cannot be differentiated twice")

    return Gradient((), lambda: {}, backward)


class Differentiation:
    """What autograd does for an operator: keeps something of a call, and makes gradients of it.

    Autograd does not look into lists of tensors: these are taken apart, as arguments and as results.
    """

    def __init__(self, schema: Schema, gradient: Backward | Gradient, backward_operator: Call | None):
        """The operator is that of a ``Backward``."""
        self.schema, self.gradient, self.backward_operator = schema, gradient, backward_operator
        self._of_at = [schema.names.index(name) for name in gradient.of]
        self._of_leaves = schema.of_leaves(len(schema.flat_names)) if schema.list_at is None else None
        if isinstance(gradient, Gradient):
            named = [*schema.names, "result"]
            self._what_to_save = pick([named.index(name) for name in signature(gradient.save).parameters])
            self._by_name: Leaves | None = None  # from the first call on
        self._gives_list = schema.results[-1:] == ["Tensor[]"]
        self._apply = _recorded_as(schema.name, self._forward, self._backward)
        self._apply_with_gradient = _recorded_as(schema.name, self._forward_with_gradient, self._backward_with_gradient)

    # ---- a call is recorded

    def recorded(self, call: Call) -> Call:
        """The call, as autograd records it."""
        schema, apply = self.schema, self._apply
        if schema.list_at is None and not self._gives_list:
            return lambda *args: apply(*args, call)
        before_list = len(schema.results) - 1

        def with_lists(*args: Any) -> Any:
            result = apply(*schema.with_list_apart(args), call)
            return (*result[:before_list], [*result[before_list:]]) if self._gives_list else result

        return with_lists

    def recorded_with_gradient(self, args: Args) -> Call | None:
        """A call that computes a gradient together with the result, recorded, where that pays."""
        prepare = self.gradient.with_result if isinstance(self.gradient, Backward) else None
        first, *rest = [args[at] for at in self._of_at] or [None]
        if prepare is None or first is None or not served_by_triton(first) or not first.requires_grad:
            return None
        if any(tensor is not None and tensor.requires_grad for tensor in rest):
            return None
        call, at, apply = pkgutil.resolve_name(prepare)(*args), self._of_at[0], self._apply_with_gradient
        return None if call is None else lambda *args: apply(args[at], call, args)

    def _forward(self, ctx: Any, *values_and_call: Any) -> Any:
        args, call = values_and_call[:-1], values_and_call[-1]
        if self.schema.list_at is not None:
            args = self.schema.with_list(args)
        result = call(*args)
        self._save(ctx, args, result)
        return (*result[:-1], *result[-1]) if self._gives_list else result

    # A step on little data takes as long as the host takes, and longest where autograd's own thread runs Python.
    def _forward_with_gradient(self, ctx: Any, _: Tensor, call: Call, args: Args) -> Tensor:
        result, ctx.gradient = call(*args)
        # Not the gradient: what is saved must not depend on how a call is made. Checkpointing may make it otherwise
        # when it makes the saved tensors again, and tells them apart by their position.
        self._save(ctx, args, result)
        return result

    def _save(self, ctx: Any, args: Args, result: Any) -> None:
        if isinstance(self.gradient, Backward):
            if isinstance(result, tuple):
                ctx.mark_non_differentiable(*result[1:])
            if self.gradient.arguments is not None:
                args = self.gradient.arguments(*args, result)
            leaves = self.schema.leaves(args)
            of_leaves = self._of_leaves or self.schema.of_leaves(len(leaves))
            ctx.save_for_backward(*of_leaves.tensors(leaves))
            ctx.rest = of_leaves.rest(leaves)
        else:
            saved = self.gradient.save(*self._what_to_save((*args, result)))
            if self._by_name is None:
                self._by_name = _in_the_order_of(self.gradient.backward, [*saved], self.schema.tensors)
            values = [*saved.values()]
            ctx.save_for_backward(*self._by_name.tensors(values))
            ctx.rest = self._by_name.rest(values)

    # ---- and differentiated

    def _backward(self, ctx: Any, *grads: Any) -> Args:
        list_at, names = self.schema.list_at, self.schema.names
        if list_at is None:
            return *map(self._gradients(ctx, ctx.needs_input_grad, grads).get, names), None
        needs = self.schema.with_list(ctx.needs_input_grad[:-1])
        gradients = [*map(self._gradients(ctx, needs, grads).get, names)]
        gradients[list_at] = gradients[list_at] or [None] * len(needs[list_at])
        return *self.schema.with_list_apart(tuple(gradients)), None

    def _backward_with_gradient(self, ctx: Any, grad_output: Tensor) -> Args:
        if torch.is_grad_enabled():  # for a second derivative, where the operator raises
            needs = tuple(at == self._of_at[0] for at in range(len(self.schema.names)))
            return self._gradients(ctx, needs, (grad_output,))[self.gradient.of[0]], None, None
        _ = ctx.saved_tensors  # raises if they are freed, or were written to
        return ctx.gradient * (grad_output.reshape(()) if grad_output.ndim else grad_output), None, None

    def _gradients(self, ctx: Any, needs: Args, grads: Args) -> dict[str, Any]:
        """A gradient for each argument that needs one, by its name; a list needs one if a tensor in it does."""
        of, saved = self.gradient.of, (*ctx.saved_tensors, *ctx.rest)
        if isinstance(self.gradient, Gradient):
            assert self._by_name is not None
            names = of if len(of) == 1 else [name for name, at in zip(of, self._of_at, strict=True) if needs[at]]
            return self.gradient.backward(names, *grads, *self._by_name.together(saved))
        needed = [needs[at] for at in self._of_at]
        if self.schema.list_at is not None:
            needed = [any(need) if isinstance(need, (list, tuple)) else need for need in needed]
        of_leaves = self._of_leaves or self.schema.of_leaves(len(saved))
        assert self.backward_operator is not None
        gradients = self.backward_operator(grads[0], *self.schema.of_call(of_leaves.together(saved)), needed)
        each = zip(of, needed, (gradients,) if len(of) == 1 else gradients, strict=True)
        return {name: gradient for name, need, gradient in each if need}

    def register_with_library(self, library: torch.library.Library) -> None:
        """Register the gradient by public means, where calls take longer."""
        schema = self.schema

        def save(ctx: Any, inputs: Args, output: Any) -> None:
            self._save(ctx, schema.grouped(inputs), output)

        def backward(ctx: Any, *grads: Any) -> Any:
            grads = (*grads[:-1], *grads[-1]) if self._gives_list else grads
            gradients = self._gradients(ctx, schema.grouped(tuple(ctx.needs_input_grad)), grads)
            return tuple(map(gradients.get, schema.flat_names))

        torch.library.register_autograd(f"saccade::{schema.name}", backward, setup_context=save, lib=library)


def _in_the_order_of(backward: Call, saved: list[str], tensors: set[str]) -> Leaves:
    """How what was saved by name is given to a function that asks for it by name."""
    parameters = [*signature(backward).parameters]
    asked = parameters[len(parameters) - len(saved) :]
    tensors_at = [position for position, name in enumerate(saved) if name in tensors]
    rest_at = [position for position, name in enumerate(saved) if name not in tensors]
    kept = [saved[position] for position in (*tensors_at, *rest_at)]
    together = pick([kept.index(name) for name in asked])
    return Leaves(saved, tensors_at, rest_at, pick(tensors_at), pick(rest_at), together)


def _recorded_as(name: str, forward: Call, backward: Call) -> Call:
    """A function that autograd records under this name."""
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return unchecked_apply(type(name, (Function,), methods))
