"""How operators are registered with PyTorch's dispatcher.

Every operator is one ``define`` and one ``impl`` per device, with a fake for tracing. Gradients come from an
``autograd.Function`` registered at the operator's own ``Autograd`` key rather than wrapped around the operator: so the
operator stays one node for ``torch.compile`` and ``torch.export``, ``opcheck`` can test it with inputs that require
grad, and a call costs less than through ``torch.library.custom_op``.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch._C import DispatchKey, DispatchKeySet
from torch.autograd import Function, forward_ad, profiler
from torch.overrides import has_torch_function_unary

library = torch.library.Library("saccade", "FRAGMENT")

below_autograd = torch._C._AutoDispatchBelowAutograd
"""Context manager for an autograd implementation: calls inside reach the device implementation."""


class Gradient(Function):
    """How an operator is differentiated: ``backward``, and what it needs of the arguments and the result."""

    @staticmethod
    def compute(ctx: Any, call: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """The operator's result; ``call`` is its implementation, or goes through the dispatcher."""
        return call(*args)

    @staticmethod
    def save(ctx: Any, args: tuple[Any, ...], result: Any) -> None:
        """Keep what ``backward`` needs. Tensors of lists are arguments, and results, of their own."""


_implementations: dict[str, Callable[..., Any]] = {}
_gradients: dict[str, type[Gradient]] = {}
_written: dict[str, tuple[int, ...]] = {}


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> str:
    """Define ``saccade::<schema>`` with one implementation for CPU and CUDA tensors; returns the operator's name."""
    name = library.define(schema)
    for device in ("CPU", "CUDA"):
        library.impl(name, implementation, device)
    _implementations[name] = implementation
    torch.library.register_fake(f"saccade::{name}", fake, lib=library)
    return name


def _ends_in_list(values: Any) -> bool:
    return str(values[-1].type) == "List[Tensor]"


def _recorded(gradient: type[Gradient], call: Callable[..., Any]) -> type[Function]:
    """A function that autograd records: ``call``, differentiated as ``gradient`` says."""

    def forward(ctx: Any, *args: Any) -> Any:
        result = gradient.compute(ctx, call, args)
        gradient.save(ctx, args, result)
        return result

    return type(gradient.__name__, (gradient,), {"forward": staticmethod(forward)})


def register_autograd(name: str, gradient: type[Gradient]) -> None:
    """Give an operator its gradient. A list of tensors must be the last argument or the last of several results."""
    operator = getattr(torch.ops.saccade, name).default
    arguments, results = operator._schema.arguments, operator._schema.returns
    takes_list, gives_list = _ends_in_list(arguments), _ends_in_list(results)
    before_list, before_list_of_results = len(arguments) - 1, len(results) - 1

    # Autograd would lose the gradients of tensors in a list without a word.
    def call(*args: Any) -> Any:
        if takes_list:
            args = (*args[:before_list], args[before_list:])
        with below_autograd():
            result = operator(*args)
        return (*result[:before_list_of_results], *result[before_list_of_results]) if gives_list else result

    function = _recorded(gradient, call)

    def autograd(*args: Any) -> Any:
        if torch.is_grad_enabled():
            if takes_list:
                args = (*args[:before_list], *args[before_list])
            result = function.apply(*args)
            if not gives_list:
                return result
            return (*result[:before_list_of_results], list(result[before_list_of_results:]))
        with below_autograd():
            return operator(*args)

    library.impl(name, autograd, "Autograd")
    _gradients[name] = gradient


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


def register_in_place(name: str, *written: int) -> None:
    """Make an operator that writes its arguments at positions ``written`` count a new version of each.

    Without this, a tensor that autograd saved before the write would be used in its changed form, silently.
    """
    operator = getattr(torch.ops.saccade, name).default

    def count_version(keyset: torch._C.DispatchKeySet, *args: Any) -> None:
        for position in written:
            torch.autograd.graph.increment_version(args[position])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            operator.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    library.impl(name, count_version, "ADInplaceOrView", with_keyset=True)
    _written[name] = written


def _keys(*names: str) -> int:
    keys = DispatchKeySet(getattr(DispatchKey, names[0]))
    for name in names[1:]:
        keys = keys | DispatchKeySet(getattr(DispatchKey, name))
    return keys.raw_repr()


_keys_of = torch._C._dispatch_keys
_modes_under_way = torch._C._dispatch_tls_local_include_set
_is_excluded = torch._C._dispatch_tls_is_dispatch_key_excluded
_OF_GPU_TENSORS = _keys("CUDA", "ADInplaceOrView", "AutogradCUDA", "AutocastCUDA")
_OF_NO_MODE = _keys("BackendSelect", "ADInplaceOrView")


def _nothing_watches() -> bool:
    """Whether nothing traces, transforms, profiles or overrides calls, and no tangents go with tensors."""
    return not (
        torch.compiler.is_compiling()
        or profiler._is_profiler_enabled
        or forward_ad._current_level >= 0
        or torch._C._is_torch_function_mode_enabled()
        or _modes_under_way().raw_repr() != _OF_NO_MODE
        or _is_excluded(DispatchKey.AutogradFunctionality)
    )


class DirectCall:
    """An operator, called past the dispatcher where that would only find what is known here.

    That is where all tensors are ordinary ones of a GPU, and nothing watches calls. The dispatcher makes every argument
    a value of its own and back, twice where a gradient is recorded. A step of ``FocalLoss`` on 7200 x 10 logits took
    1.7 to 2.1 times a step of torch's binary cross entropy through it, and 1.3 to 1.5 times past it (wall time beside
    an H200, before the gradient came with the loss).
    """

    def __init__(self, name: str):
        self.operator = getattr(torch.ops.saccade, name).default
        self.implementation = _implementations[name]
        kinds = [str(argument.type) for argument in self.operator._schema.arguments]
        assert "List[Tensor]" not in kinds, f"saccade::{name}: a list of tensors would not be looked into"
        self.tensors = [position for position, kind in enumerate(kinds) if "Tensor" in kind]
        self.written = _written.get(name, ())
        # Past Function.apply, too, which looks for transforms of torch.func: they count among what watches calls.
        gradient = _gradients.get(name)
        self.record = None
        if gradient is not None:
            above: Any = super(Function, _recorded(gradient, self.implementation))
            self.record = above.apply

    def __call__(self, *args: Any) -> Any:
        """Call the operator."""
        if not self._can_be_direct(args):
            return self.operator(*args)
        if self.record is not None and torch.is_grad_enabled() and self._wants_gradient(args):
            return self.record(*args)
        for position in self.written:
            torch.autograd.graph.increment_version(args[position])
        return self.implementation(*args)

    def _can_be_direct(self, args: tuple[Any, ...]) -> bool:
        if not _nothing_watches():
            return False
        for position in self.tensors:
            tensor = args[position]
            # A subclass that overrides calls has a key for it, or a __torch_function__ of its own.
            if tensor is not None and (
                _keys_of(tensor).raw_repr() != _OF_GPU_TENSORS or has_torch_function_unary(tensor)
            ):
                return False
        return True

    def _wants_gradient(self, args: tuple[Any, ...]) -> bool:
        for position in self.tensors:  # any(...) takes twice as long
            tensor = args[position]
            if tensor is not None and tensor.requires_grad:
                return True
        return False
