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


def cannot_be_differentiated(name: str, schema: Schema) -> Gradient:
    """For the backward operator of an operator, which has this schema: differentiated itself, it raises.

    ``once_differentiable`` does not notice a second derivative of a scalar loss, whose incoming gradient is a constant;
    the saved inputs of a backward operator do require grad then, so a node of its own raises.
    """

    def backward(*_: Any, **__: Any) -> dict[str, Tensor]:
        raise RuntimeError(f"saccade::{name} cannot be differentiated twice")

    listed = {schema.names[schema.list_at]} if schema.list_at is not None else set()
    of = (*(name for name in schema.names if name in schema.tensors - listed), *listed)
    return Gradient(of, lambda: {}, backward)


class Differentiation:
    """What autograd does for an operator: keeps something of a call, and makes gradients of it.

    Autograd is given the tensors that have gradients, and with them the arguments as one value that it does not look
    into. Nor does it look into lists of tensors: these are taken apart, as arguments and as results.
    """

    def __init__(self, schema: Schema, gradient: Backward | Gradient, backward_operator: Call | None):
        """The operator is that of a ``Backward``."""
        self.schema, self.gradient, self.backward_operator = schema, gradient, backward_operator
        of_at = [schema.names.index(name) for name in gradient.of]
        self._of, self._has_list = pick(of_at), schema.list_at is not None and schema.list_at in of_at
        assert not self._has_list or of_at[-1] == schema.list_at, f"{schema.name}: a list is the last to have gradients"
        self._of_leaves = schema.of_leaves(len(schema.flat_names)) if schema.list_at is None else None
        if isinstance(gradient, Gradient):
            named = [*schema.names, "result"]
            self._what_to_save = pick([named.index(name) for name in signature(gradient.save).parameters])
            self._by_name: Leaves | None = None  # from the first call on
        self._gives_list = schema.results[-1:] == ["Tensor[]"]
        self._apply = _recorded_as(schema.name, self._forward, self._backward)
        self._apply_with_gradient = _recorded_as(schema.name, self._forward_with_gradient, self._backward_with_gradient)

    # ---- a call is recorded. A step on little data takes as long as the host takes, and longest where autograd's own
    # thread runs Python.

    def recorded(self, call: Call) -> Call:
        """The call, as autograd records it."""
        apply, of, before_list = self._apply, self._of, len(self.schema.results) - 1
        if self._gives_list:

            def with_list(*args: Any) -> Any:
                result = apply(*self._with_list_apart(of(args)), call, args)
                return *result[:before_list], [*result[before_list:]]

            return with_list
        if self._has_list:
            return lambda *args: apply(*self._with_list_apart(of(args)), call, args)
        return lambda *args: apply(*of(args), call, args)

    def prepare_with_gradient(self, args: Args) -> Call | None:
        """What prepares the gradient together with the result, if it may serve such a call."""
        prepare = self.gradient.with_result if isinstance(self.gradient, Backward) else None
        if prepare is None:
            return None
        first, *rest = self._of(args)
        if not served_by_triton(first) or not first.requires_grad:
            return None
        if any(tensor is not None and tensor.requires_grad for tensor in rest):
            return None
        return pkgutil.resolve_name(prepare)

    def recorded_with_gradient(self, call: Call) -> Call:
        """A call that computes a gradient together with the result, recorded."""
        apply, of = self._apply_with_gradient, self._of
        return lambda *args: apply(*of(args), call, args)

    def _with_list_apart(self, of: Args) -> Args:
        return *of[:-1], *of[-1]

    def _forward(self, ctx: Any, *values: Any) -> Any:
        call, args = values[-2:]
        result = call(*args)
        self._save(ctx, args, result)
        return (*result[:-1], *result[-1]) if self._gives_list else result

    def _forward_with_gradient(self, ctx: Any, *values: Any) -> Any:
        call, args = values[-2:]
        result, ctx.gradient = call(*args)
        # Not the gradient, which stays as long as the result has its history: what is saved must not depend on how a
        # call is made. Checkpointing may make it otherwise when it makes the saved tensors again, and tells them apart
        # by their position.
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
        needs = ctx.needs_input_grad[:-2]
        gradients = self._gradients(ctx, needs, grads)
        if self._has_list:
            *before, listed = gradients
            gradients = *before, *(listed or [None] * (len(needs) - len(before)))
        return *gradients, None, None

    def _backward_with_gradient(self, ctx: Any, *grads: Any) -> Args:
        rest = (None,) * (len(self.gradient.of) + 1)
        if torch.is_grad_enabled():  # for a second derivative, where the operator raises
            return self._gradients(ctx, ctx.needs_input_grad[:-2], grads)[0], *rest
        _ = ctx.saved_tensors  # raises if they are freed, or were written to
        grad_output = grads[0]
        return ctx.gradient * (grad_output.reshape(()) if grad_output.ndim else grad_output), *rest

    def _gradients(self, ctx: Any, needs: Sequence[bool], grads: Args) -> Args:
        """A gradient for each name in ``of`` that needs one, else ``None``; a list needs one if a tensor in it does."""
        of, saved = self.gradient.of, (*ctx.saved_tensors, *ctx.rest)
        needed = [*needs[: len(of) - 1], any(needs[len(of) - 1 :])] if self._has_list else [*needs]
        if isinstance(self.gradient, Gradient):
            assert self._by_name is not None
            names = of if len(of) == 1 else [name for name, need in zip(of, needed, strict=True) if need]
            gradients = self.gradient.backward(names, *grads, *self._by_name.together(saved))
            return tuple(map(gradients.get, of))
        of_leaves = self._of_leaves or self.schema.of_leaves(len(saved))
        assert self.backward_operator is not None
        gradients = self.backward_operator(grads[0], *self.schema.of_call(of_leaves.together(saved)), needed)
        if len(of) == 1:
            return (gradients,)
        return tuple(gradient if need else None for gradient, need in zip(gradients, needed, strict=True))

    def register_with_library(self, library: torch.library.Library) -> None:
        """Register the gradient by public means, where calls take longer."""
        schema = self.schema

        def save(ctx: Any, inputs: Args, output: Any) -> None:
            self._save(ctx, schema.grouped(inputs), output)

        def backward(ctx: Any, *grads: Any) -> Any:
            grads = (*grads[:-1], *grads[-1]) if self._gives_list else grads
            needs = self._of(schema.grouped(tuple(ctx.needs_input_grad)))
            needs = self._with_list_apart(needs) if self._has_list else needs
            gradients = dict(zip(self.gradient.of, self._gradients(ctx, needs, grads), strict=True))
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
