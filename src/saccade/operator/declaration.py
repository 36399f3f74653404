"""An operator is one declared object: what it takes, what computes it where, and how it is differentiated.

A public function checks nothing that the declaration can check, and ends in ``return OPERATOR(...)``. Where all tensors
are ordinary ones of a GPU and no mode, transform or profiler is on, that call goes past PyTorch's dispatcher (the
*dispatch bypass*): a *known call*, one like an earlier one, goes straight to what that one came to; a new one is
checked and prepared. Everywhere else (on the CPU, under ``torch.compile``, modes, transforms and profilers) it is one
node of the dispatcher, whose implementation makes the same choice between kernels and reference.

Gradients come from an ``autograd.Function`` registered at the operator's own ``Autograd`` key rather than wrapped
around the operator: so the operator stays one node for ``torch.compile`` and ``torch.export``, ``opcheck`` can test it
with inputs that require grad, and a call costs less than through ``torch.library.custom_op``.
"""

import pkgutil
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from saccade.debug import debug_checks_enabled
from saccade.operator.gradients import (
    Backward,
    Differentiation,
    Gradient,
    cannot_be_differentiated,
    room_for_gradients,
)
from saccade.operator.known_calls import KnownCalls
from saccade.operator.schema import Args, Schema
from saccade.operator.torch_internals import (
    are_ordinary_on_gpu,
    below_autograd,
    counting_versions,
    nothing_watches,
    tangents_may_go_along,
)
from saccade.ordinary_tensors import is_wrapped
from saccade.triton_dispatch import served_by_triton

OPERATORS: "dict[str, Operator]" = {}
"""Every operator of the library by its name."""

_library = torch.library.Library("saccade", "FRAGMENT")

Call = Callable[..., Any]

_MOST_PREPARED = 512
"""Computations of one operator that are kept: as many as a training run with batches of changing widths may mix."""


class Operator:
    """One operator of the library, ``torch.ops.saccade.<name>``; called with its arguments by position."""

    def __init__(
        self,
        schema: str | Schema,
        *,
        reference: Call,
        fake: Call,
        kernels: str | None = None,
        groups: Sequence[Any] = (),
        nonempty: Sequence[str] = (),
        check: Call | None = None,
        faults: Call | None = None,
        varying: Sequence[str] = (),
        gradient: Backward | Gradient | None = None,
        is_composite: bool = False,
    ):
        """Define the operator and register it.

        Args:
            schema: As PyTorch's, with ``groups`` for types of arguments, too.
            reference: Plain PyTorch, on every device, of no elements as well.
            fake: Given the arguments by name, makes empty results of the right shape, dtype and layout.
            kernels: ``"module:function"``, imported when first used. Given the arguments of a call on a GPU, the
                function *prepares*: it makes what computes the operator for all calls whose arguments differ in the
                values of tensors alone and in ``varying`` numbers, or gives ``None`` where the reference is better.
            groups: ``NamedTuple`` classes, see ``Schema``.
            nonempty: Tensors without whose elements there is nothing for kernels to do.
            check: Given the arguments, raises if one is wrong and returns them, numbers converted. Known calls are not
                checked.
            faults: Given the arguments by name, raises if values of tensors are wrong: on the CPU, and on a GPU where
                ``saccade.debug_checks`` asks for it.
            varying: Numbers that are baked into nothing.
            gradient: How it is differentiated.
            is_composite: Where no kernel can serve a call it is made of PyTorch's operators, which autograd,
                ``torch.func`` and compilers see into, and is no operator at all.
        """
        self.schema = schema if isinstance(schema, Schema) else Schema(schema, groups)
        self.name = self.schema.name
        self.known_calls = KnownCalls(self.schema, varying)
        self._reference, self._kernels, self._check, self._faults = reference, kernels, check, faults
        self._nonempty = [self.schema.names.index(name) for name in nonempty]
        self._is_composite = is_composite
        self._prepared: dict[tuple[Call, Args], Call | None] = {}
        self._register(fake)
        self.backward: Operator | None = None
        if isinstance(gradient, Backward):
            of_backward = self.schema.of_backward(gradient.of)
            self.backward = Operator(
                of_backward,
                reference=gradient.reference,
                fake=gradient.fake or partial(_fake_gradients, gradient.of),
                kernels=gradient.kernels,
                nonempty=nonempty,
                varying=varying,
                gradient=cannot_be_differentiated(self.name, of_backward),
            )
        self._differentiation = None if gradient is None else Differentiation(self.schema, gradient, self.backward)
        if self._differentiation is not None:
            self._register_autograd(self._differentiation)
        OPERATORS[self.name] = self

    # ---- calls

    def __call__(self, *args: Any) -> Any:
        """Call the operator; arguments need not have been checked."""
        call = self.known_calls.find(args)
        if call is not None:
            return call(*args)
        given = args
        if self._check is not None:
            args = self._check(*args)
        call = self._direct(args)
        if call is not None:
            self.known_calls.learn(given, call)
            return call(*args)
        if self._is_composite and not self._may_be_served(args):
            return self._reference(*args)
        return self.dispatched(*self.schema.flat(args))

    def forget(self) -> None:
        """As if no call had been made."""
        self.known_calls.forget()
        self._prepared.clear()

    def _direct(self, args: Args) -> Call | None:
        """What computes all calls like this one past the dispatcher; ``None`` if this one has to go through it."""
        if debug_checks_enabled() or not nothing_watches():
            return None
        leaves = self.schema.leaves(args)
        tensors = self.schema.of_leaves(len(leaves)).tensors(leaves)
        if not are_ordinary_on_gpu(tensors):
            return None
        how = self._differentiation
        if how is not None and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
            together = how.prepare_with_gradient(args)
            with_gradient = together and self._prepared_by(together, args)
            return how.recorded_with_gradient(with_gradient) if with_gradient else how.recorded(self._computation(args))
        call = self._computation(args)
        return self._with_versions_counted(call) if self.schema.written else call

    def _computation(self, args: Args) -> Call:
        """Kernels or the reference, for all calls like this one."""
        is_empty = not all(_has_elements(args[position]) for position in self._nonempty)
        if self._kernels is None or is_empty or not served_by_triton(self._first_tensor(args)):
            return self._reference
        return self._prepared_by(self._prepare, args) or self._reference

    def _prepared_by(self, prepare: Call, args: Args) -> Call | None:
        """What a function prepares for all calls like this one, now or at an earlier one."""
        key = self.known_calls.key(args)
        if key is None:
            return prepare(*args)
        if (prepare, key) not in self._prepared:
            if len(self._prepared) == _MOST_PREPARED:
                self._prepared.clear()
            self._prepared[prepare, key] = prepare(*args)
        return self._prepared[prepare, key]

    @cached_property
    def _prepare(self) -> Call:
        """Found at the first call: importing the library does not import Triton."""
        assert self._kernels is not None
        return pkgutil.resolve_name(self._kernels)

    def _first_tensor(self, args: Args) -> Tensor:
        value = args[self.schema.first_tensor_at]
        return value if isinstance(value, Tensor) else value[0]

    def _may_be_served(self, args: Args) -> bool:
        """Whether kernels may serve a call: neither ``torch.func`` nor forward-mode differentiation is under way."""
        if not served_by_triton(self._first_tensor(args)) or torch.compiler.is_compiling():
            return served_by_triton(self._first_tensor(args))
        tensors = [value for value in self.schema.leaves(args) if isinstance(value, Tensor)]
        return not tangents_may_go_along() and not any(map(is_wrapped, tensors))

    # ---- the dispatcher

    def _register(self, fake: Call) -> None:
        """Define ``saccade::<name>`` with one implementation for CPU and CUDA tensors.

        What it writes in place, ``Tensor(a!)``, has a new version counted. Without this, a tensor that autograd saved
        before the write would be used in its changed form, silently.
        """
        _library.define(self.schema.definition)
        self.dispatched = getattr(torch.ops.saccade, self.name).default
        on_devices = self._on_device
        if self.schema.written:
            counting = counting_versions(self.dispatched, self._count_versions)
            if counting is not None:
                _library.impl(self.name, counting, "ADInplaceOrView", with_keyset=True)
            else:
                on_devices = self._with_versions_counted(on_devices)
        for device in ("CPU", "CUDA"):
            _library.impl(self.name, on_devices, device)

        def fake_of_flat(*flat: Any) -> Any:
            return fake(**self.schema.named(self.schema.grouped(flat)))

        torch.library.register_fake(f"saccade::{self.name}", fake_of_flat, lib=_library)

    def _on_device(self, *flat: Any) -> Any:
        args = self.schema.grouped(flat)
        if self._faults is not None and (debug_checks_enabled() or not self._first_tensor(args).is_cuda):
            self._faults(**self.schema.named(args))
        return self._computation(args)(*args)

    def _count_versions(self, *args: Any) -> None:
        for position in self.schema.written:
            torch.autograd.graph.increment_version(args[position])

    def _with_versions_counted(self, call: Call) -> Call:
        def counting(*args: Any) -> Any:
            self._count_versions(*args)
            return call(*args)

        return counting

    def _register_autograd(self, how: Differentiation) -> None:
        schema, below = self.schema, below_autograd
        if below is None:
            how.register_with_library(_library)
            return

        def call(*args: Any) -> Any:
            with below():
                return self.dispatched(*schema.flat(args))

        recorded = how.recorded(call)

        def autograd(*flat: Any) -> Any:
            if torch.is_grad_enabled():
                return recorded(*schema.grouped(flat))
            with below():
                return self.dispatched(*flat)

        _library.impl(self.name, autograd, "Autograd")


def _has_elements(value: Tensor | Sequence[Tensor]) -> bool:
    return value.numel() > 0 if isinstance(value, Tensor) else any(map(_has_elements, value))


def _fake_gradients(of: Sequence[str], *, needed: Sequence[bool], **arguments: Any) -> Any:
    gradients = room_for_gradients([arguments[name] for name in of], needed)
    return gradients[0] if len(of) == 1 else gradients
