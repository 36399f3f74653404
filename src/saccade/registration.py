"""How operators are registered with PyTorch's dispatcher.

Every operator is one ``define`` and one ``impl`` per device, with a fake for tracing. Gradients come from an
``autograd.Function`` registered at the operator's own ``Autograd`` key rather than wrapped around the operator: so the
operator stays one node for ``torch.compile`` and ``torch.export``, ``opcheck`` can test it with inputs that require
grad, and a call costs less than through ``torch.library.custom_op``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.autograd import Function

from saccade.debug import debug_checks_enabled
from saccade.operator.torch_internals import (
    are_ordinary_on_gpu,
    below_autograd,
    counting_versions,
    nothing_watches,
    tensor_guards,
    unchecked_apply,
)

library = torch.library.Library("saccade", "FRAGMENT")


class Gradient(Function):
    """How an operator is differentiated: ``backward``, and what it needs of the arguments and the result."""

    prepare: Any = None
    """Given the arguments of a call, makes the whole of it, recording included; or ``None``: the usual is recorded."""

    @staticmethod
    def save(ctx: Any, args: tuple[Any, ...], result: Any) -> None:
        """Keep what ``backward`` needs. Tensors of lists are arguments, and results, of their own."""


class _Signature(NamedTuple):
    """Types of a schema's arguments and results."""

    arguments: list[str]
    results: list[str]

    @property
    def written(self) -> list[int]:
        """Positions of the tensors that are written in place."""
        return [position for position, kind in enumerate(self.arguments) if "!" in kind]


def _signature(schema: str) -> _Signature:
    arguments, results = schema.split("(", 1)[1].rsplit(") -> ", 1)
    listed = [kind for kind in results.strip("()").split(", ") if kind]
    return _Signature([argument.split()[0] for argument in arguments.split(", ")], listed)


_implementations: dict[str, Callable[..., Any]] = {}
_signatures: dict[str, _Signature] = {}
_gradients: dict[str, type[Gradient]] = {}


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> str:
    """Define ``saccade::<schema>`` with one implementation for CPU and CUDA tensors; returns the operator's name.

    What an operator writes in place, ``Tensor(a!)``, has a new version counted. Without this, a tensor that autograd
    saved before the write would be used in its changed form, silently.
    """
    name = library.define(schema)
    signature = _signature(schema)
    on_devices = implementation
    if signature.written:
        operator = getattr(torch.ops.saccade, name).default
        counting = counting_versions(operator, lambda *args: _count_versions(args, signature.written))
        if counting is not None:
            library.impl(name, counting, "ADInplaceOrView", with_keyset=True)
        else:
            on_devices = _with_versions_counted(implementation, signature.written)
    for device in ("CPU", "CUDA"):
        library.impl(name, on_devices, device)
    _implementations[name], _signatures[name] = implementation, signature
    torch.library.register_fake(f"saccade::{name}", fake, lib=library)
    return name


def _count_versions(args: tuple[Any, ...], written: list[int]) -> None:
    for position in written:
        torch.autograd.graph.increment_version(args[position])


def _with_versions_counted(call: Callable[..., Any], written: list[int]) -> Callable[..., Any]:
    def counting(*args: Any) -> Any:
        _count_versions(args, written)
        return call(*args)

    return counting


def _recorded(gradient: type[Gradient], call: Callable[..., Any]) -> type[Function]:
    """A function that autograd records: ``call``, differentiated as ``gradient`` says."""

    def forward(ctx: Any, *args: Any) -> Any:
        result = call(*args)
        gradient.save(ctx, args, result)
        return result

    return type(gradient.__name__, (gradient,), {"forward": staticmethod(forward)})


def _recorded_with_call(gradient: type[Gradient]) -> type[Function]:
    """The same, whose last argument is what to call."""

    def forward(ctx: Any, *args_and_call: Any) -> Any:
        args, call = args_and_call[:-1], args_and_call[-1]
        result = call(*args)
        gradient.save(ctx, args, result)
        return result

    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return *gradient.backward(ctx, *grads), None

    return type(gradient.__name__, (gradient,), {"forward": staticmethod(forward), "backward": staticmethod(backward)})


def register_autograd(name: str, gradient: type[Gradient]) -> None:
    """Give an operator its gradient. A list of tensors must be the last argument or the last of several results."""
    _gradients[name] = gradient
    arguments, results = _signatures[name]
    takes_list, gives_list = arguments[-1] == "Tensor[]", results[-1] == "Tensor[]"

    # Autograd would lose the gradients of tensors in a list without a word: they are arguments and results themselves.
    def flat(values: Any) -> tuple[Any, ...]:
        return *values[:-1], *values[-1]

    if below_autograd is None:
        _register_autograd_with_library(name, gradient, len(arguments), takes_list, gives_list, flat)
        return
    operator = getattr(torch.ops.saccade, name).default
    before_list, before_list_of_results = len(arguments) - 1, len(results) - 1

    def call(*args: Any) -> Any:
        if takes_list:
            args = (*args[:before_list], args[before_list:])
        with below_autograd():
            result = operator(*args)
        return flat(result) if gives_list else result

    function = _recorded(gradient, call)

    def autograd(*args: Any) -> Any:
        if torch.is_grad_enabled():
            result = function.apply(*(flat(args) if takes_list else args))
            if not gives_list:
                return result
            return (*result[:before_list_of_results], list(result[before_list_of_results:]))
        with below_autograd():
            return operator(*args)

    library.impl(name, autograd, "Autograd")


def _register_autograd_with_library(
    name: str,
    gradient: type[Gradient],
    arguments: int,
    takes_list: bool,
    gives_list: bool,
    flat: Callable[[Any], tuple[Any, ...]],
) -> None:
    """The same by public means, where calls take longer."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        gradient.save(ctx, flat(inputs) if takes_list else inputs, flat(output) if gives_list else output)

    def backward(ctx: Any, *grads: Any) -> Any:
        if takes_list:
            ctx.needs_input_grad = flat(ctx.needs_input_grad)
        gradients = gradient.backward(ctx, *(flat(grads) if gives_list else grads))
        return (*gradients[: arguments - 1], list(gradients[arguments - 1 :])) if takes_list else gradients

    torch.library.register_autograd(f"saccade::{name}", backward, setup_context=save, lib=library)


def register_backward(name: str) -> None:
    """Make a backward operator raise when it is differentiated itself.

    ``once_differentiable`` does not notice a second derivative of a scalar loss, whose incoming gradient is a constant;
    the saved inputs of a backward operator do require grad then, so a node of its own raises.
    """

    class DifferentiatedTwice(Gradient):
        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            raise RuntimeError(f"saccade::{name.removesuffix('_backward')} cannot be differentiated twice")

    register_autograd(name, DifferentiatedTwice)


@dataclass
class _Known:
    """Arguments that a call was made with, and where it went."""

    count: int  # of tensors
    kinds: list[type]
    others: tuple[Any, ...]
    fits: Callable[..., bool]  # tensors that differ in their values at most
    way: Callable[..., Any]
    is_used: bool = False
    """Whether the call has come again."""


_PLAIN = frozenset((bool, float, int, str, type(None)))
_MOST_KNOWN = 8
_MUCH_WASTE = 64


class DirectCall:
    """An operator, called past the dispatcher where that would only find what is known here.

    That is where all tensors are ordinary ones of a GPU, and nothing watches calls. The dispatcher makes every argument
    a value of its own and back, twice where a gradient is recorded. A step of ``FocalLoss`` on 7200 x 10 logits took
    1.7 to 2.1 times a step of torch's binary cross entropy through it, 1.3 to 1.5 times past it, 1.0 to 1.1 times since
    its gradient comes with the loss and its calls are known, and 0.83 to 0.96 times since that is a single launch (wall
    time beside an H200).

    What checks of arguments come to, where a call goes and how its kernels are launched depends on all of the arguments
    but the values of tensors. Training makes the same calls again and again, so a public function may ask whether a
    call is known, and then skip the checks::

        way = call.known(tensors, others)
        if way is None:
            ...  # checks
            way = call.learn(tensors, others, args)
        return way(*args)
    """

    def __init__(self, name: str, prepare: Callable[..., Callable[..., Any]] | None = None):
        """Find the operator.

        Args:
            name: The operator's.
            prepare: Given the arguments of a call on a GPU, makes what does the same as the operator for all calls
                whose arguments differ in the values of tensors alone, and in numbers that are not among the ``others``.
        """
        self.operator = getattr(torch.ops.saccade, name).default
        kinds = _signatures[name].arguments
        assert "Tensor[]" not in kinds, f"saccade::{name}: a list of tensors would not be looked into"
        self._tensors = [position for position, kind in enumerate(kinds) if kind.startswith("Tensor")]
        self._written = _signatures[name].written
        self._implementation, self._prepare = _implementations[name], prepare
        self._gradient = _gradients.get(name)
        if self._gradient is not None:
            self._record = unchecked_apply(_recorded_with_call(self._gradient))
        self._known: list[_Known] = []
        self._wasted = 0
        """Calls learnt that did not come again, since one did."""

    def __call__(self, *args: Any) -> Any:
        """Call the operator."""
        return self._way(args)(*args)

    def known(self, tensors: tuple[Any, ...], others: tuple[Any, ...] = ()) -> Callable[..., Any] | None:
        """What to call with such arguments, if a call like that was learnt.

        Args:
            tensors: Those of the caller's arguments that are not ``None``. What is no tensor is not known.
            others: All else that checks depend on: numbers, names, and which tensors are ``None``.
        """
        if not nothing_watches() or debug_checks_enabled():
            return None
        count, kinds = len(tensors), [*map(type, others)]
        for known in self._known:
            if known.count == count and known.kinds == kinds and known.others == others and known.fits(*tensors):
                if not known.is_used:
                    known.is_used, self._wasted = True, 0
                return known.way
        return None

    def learn(self, tensors: tuple[Any, ...], others: tuple[Any, ...], args: tuple[Any, ...]) -> Callable[..., Any]:
        """What to call with arguments that have been checked: the next call like it is known.

        Args:
            tensors: As they were asked for.
            others: As they were asked for.
            args: Arguments of the operator.
        """
        way = self._way(args)
        kinds = [*map(type, others)]
        # Checks convert what is not plain.
        if way is self.operator or tensor_guards() is None or not _PLAIN.issuperset(kinds):
            return way
        if self._wasted >= _MUCH_WASTE:
            # Where no two calls are alike, nearly none is learnt: that would take longer than the checks.
            self._wasted += 1
            if self._wasted % _MUCH_WASTE:
                return way
        sizes, strides = [list(tensor.shape) for tensor in tensors], [list(tensor.stride()) for tensor in tensors]
        fits = tensor_guards()(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
        if fits(*tensors):  # it does not if one tensor is two arguments
            self._keep(_Known(len(tensors), kinds, others, fits, way))
        return way

    def _keep(self, new: _Known) -> None:
        kept = self._known
        if len(kept) == _MOST_KNOWN:
            unused = [known for known in kept if not known.is_used]
            dropped = (unused or kept)[-1]
            self._wasted += not dropped.is_used
            kept = [known for known in kept if known is not dropped]
        self._known = [new, *kept]  # not changed in place: another thread may be looking

    def _way(self, args: tuple[Any, ...]) -> Callable[..., Any]:
        if debug_checks_enabled() or not self._can_be_direct(args):
            return self.operator
        gradient = self._gradient if torch.is_grad_enabled() and self._wants_gradient(args) else None
        if gradient is not None and gradient.prepare is not None:
            way = gradient.prepare(*args)
            if way is not None:
                return way
        call = self._implementation if self._prepare is None else self._prepare(*args)
        if gradient is not None:
            return lambda *args: self._record(*args, call)
        return _with_versions_counted(call, self._written) if self._written else call

    def _can_be_direct(self, args: tuple[Any, ...]) -> bool:
        return nothing_watches() and are_ordinary_on_gpu([args[position] for position in self._tensors])

    def _wants_gradient(self, args: tuple[Any, ...]) -> bool:
        for position in self._tensors:  # any(...) takes twice as long
            tensor = args[position]
            if tensor is not None and tensor.requires_grad:
                return True
        return False
