"""Every private name of PyTorch and Triton that Saccade leans on, and what happens without it.

The next release may drop any of them. So they are looked up here, and nowhere else (`tests/test_layout.py`): what a
group of names makes fast, or possible, is a `FastPath`. Where one of its names is missing, the path is off,
`saccade doctor` says which and why, and every operator computes the same as before, by public means.
"""

import copy
import pkgutil
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad, profiler

from saccade.triton_dispatch import triton_is_installed

_MISSING = object()


@dataclass(frozen=True)
class FastPath:
    """Something that private names make fast."""

    name: str
    needs: tuple[str, ...]
    """The private names, as `pkgutil.resolve_name` takes them: module, colon, attribute."""
    without: str
    """What happens if one of them is missing."""

    def is_on(self) -> bool:
        """Whether all names are there."""
        return not self.missing()

    def missing(self) -> list[str]:
        """Those of the names that are not there, dotted."""
        return [name.replace(":", ".") for name in self.needs if _found(name, _MISSING) is _MISSING]


def _found(name: str, otherwise: Any = None) -> Any:
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return otherwise


GRADIENT_KEY = FastPath(
    "gradients registered at the Autograd key",
    ("torch._C:_AutoDispatchBelowAutograd",),
    "they are registered with torch.library.register_autograd, whose calls take longer",
)
VERSION_KEY = FastPath(
    "versions counted at the ADInplaceOrView key",
    (
        "torch._C:_AutoDispatchBelowADInplaceOrView",
        "torch._C:_after_ADInplaceOrView_keyset",
        "torch._ops:OpOverload.redispatch",
    ),
    "what an operator writes in place has its version counted where it is written, which a trace does not see",
)
DISPATCH_BYPASS = FastPath(
    "dispatch bypass",
    (
        "torch._C:DispatchKey.CUDA",
        "torch._C:DispatchKey.ADInplaceOrView",
        "torch._C:DispatchKey.AutogradCUDA",
        "torch._C:DispatchKey.AutocastCUDA",
        "torch._C:DispatchKey.BackendSelect",
        "torch._C:DispatchKey.AutogradFunctionality",
        "torch._C:DispatchKeySet.raw_repr",
        "torch._C:_dispatch_keys",
        "torch._C:_dispatch_tls_local_include_set",
        "torch._C:_dispatch_tls_is_dispatch_key_excluded",
        "torch._C:_is_torch_function_mode_enabled",
        "torch.autograd.forward_ad:_current_level",
        "torch.autograd.profiler:_is_profiler_enabled",
        "torch.overrides:has_torch_function_unary",
    ),
    "every call goes through PyTorch's dispatcher, and is checked and prepared anew",
)
KNOWN_CALLS = FastPath(
    "known calls",
    ("torch._C:_dynamo.guards.TensorGuards",),
    "calls like an earlier one are checked and prepared anew",
)
RAGGED_KERNELS = FastPath(
    "kernels of ragged batches",
    ("torch.autograd.forward_ad:_current_level",),
    "ragged batches are indexed by PyTorch's operators, as tangents of forward-mode differentiation might go with them",
)
KEPT_SIZES = FastPath(
    "kept sizes of feature maps",
    ("torch:Tensor._version", "torch.utils.weak:WeakTensorKeyDictionary"),
    "index tensors of feature maps are made in each call, and formatting back reads sizes from the device",
)
PROMISES = FastPath(
    "promises to torch.compile",
    ("torch:_check",),
    "PyTorch 2.9 does not compile in one graph what cuts ragged batches to a width that the data decide on",
)
TREE_NODES = FastPath(
    "ragged batches in PyTorch's trees",
    (
        "torch.utils._pytree:register_pytree_node",
        "torch.utils._pytree:GetAttrKey",
        "torch.utils._pytree:tree_map",
    ),
    "torch.compile, torch.export and torch.func do not see into ragged batches that a function takes or gives, and "
    "move_ragged_inputs moves those alone that are arguments themselves",
)
FUNCTIONAL_TENSORS = FastPath(
    "recognition of functional tensors",
    ("torch:_is_functional_tensor",),
    "they are known by their address, which is 0, but for empty ones",
)
GPU_QUERIES = FastPath(
    "queries of the current GPU and stream",
    ("torch._C:_cuda_getDevice", "torch._C:_cuda_isCurrentStreamCapturing", "torch._C:_cuda_getCurrentRawStream"),
    "torch.cuda is asked, which takes longer",
)
COLLATING = FastPath(
    "ragged batches in default_collate",
    ("torch.utils.data._utils.collate:default_collate_fn_map",),
    "samples that hold ragged batches need a collate_fn of your own",
)
LAUNCH_CACHE = FastPath(
    "launch cache",
    ("triton:knobs.runtime.launch_enter_hook", "triton:knobs.runtime.launch_exit_hook"),
    "kernels are launched as Triton launches them, which takes the host longer",
)
DEPENDENT_LAUNCH = FastPath(
    "programmatic dependent launch",
    ("triton.language.extra.cuda:gdc_wait",),
    "a kernel is not made ready while the one before it ends",
)

FAST_PATHS = (
    GRADIENT_KEY,
    VERSION_KEY,
    DISPATCH_BYPASS,
    KNOWN_CALLS,
    RAGGED_KERNELS,
    KEPT_SIZES,
    PROMISES,
    TREE_NODES,
    COLLATING,
    FUNCTIONAL_TENSORS,
    GPU_QUERIES,
    LAUNCH_CACHE,
    DEPENDENT_LAUNCH,
)


def fast_paths_off() -> Iterator[tuple[FastPath, str]]:
    """Fast paths that cannot be taken here, and why; of those that need Triton or a GPU only where there is one."""
    has_gpu = torch.cuda.is_available()
    for path in FAST_PATHS:
        package = path.needs[0].partition(":")[0].partition(".")[0]
        if (package == "triton" and not triton_is_installed()) or (path is GPU_QUERIES and not has_gpu):
            continue
        missing = path.missing()
        why = f"{package} has no {' and no '.join(missing)}" if missing else None
        if path is DISPATCH_BYPASS and not missing:
            if not nothing_watches():
                why = (
                    "something traces, transforms, profiles or overrides calls, or keys of threads have other meanings"
                )
            elif has_gpu and not are_ordinary_on_gpu([torch.empty(1, device="cuda")]):
                why = "an ordinary tensor on a GPU has other dispatch keys than those known here"
        elif path is KNOWN_CALLS and not missing and tensor_guards() is None:
            why = f"{path.needs[0].replace(':', '.')} has another form than the one known here"
        elif path is LAUNCH_CACHE and torch.version.hip and has_gpu:
            why = "Triton specializes on more for AMD's GPUs than is known here"
        elif path is LAUNCH_CACHE and not missing and unknown_launchers:
            why = f"{' and '.join(sorted(unknown_launchers))} of triton has another form than those known here"
        if why is not None:
            yield path, why


# ---- registration

below_autograd: Any = _found(*GRADIENT_KEY.needs)
"""Context manager for an autograd implementation: calls inside reach the device implementation. May be ``None``."""


def counting_versions(operator: Any, count: Callable[..., None]) -> Callable[..., None] | None:
    """An implementation of an operator for the ADInplaceOrView key, with its keyset: counts, and goes on.

    ``None`` where that key cannot be implemented.
    """
    if not VERSION_KEY.is_on():
        return None
    below, after = torch._C._AutoDispatchBelowADInplaceOrView, torch._C._after_ADInplaceOrView_keyset

    def implementation(keyset: Any, *args: Any) -> None:
        count(*args)
        with below():
            operator.redispatch(keyset & after, *args)

    return implementation


# ---- calls past the dispatcher


def _raw_keys(*names: str) -> int:
    """The bits of a set of dispatch keys."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, names[0]))
    for name in names[1:]:
        keys = keys | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name))
    return keys.raw_repr()


def _nothing_watches() -> bool:
    return not (
        torch.compiler.is_compiling()
        or profiler._is_profiler_enabled
        or forward_ad._current_level >= 0
        or torch._C._is_torch_function_mode_enabled()
        or _included_keys().raw_repr() != _NO_MODE
        or _is_excluded(_RECORDING)
    )


def _are_ordinary_on_gpu(tensors: Iterable[Tensor | None]) -> bool:
    for tensor in tensors:
        # A subclass that overrides calls has a key for it, or a __torch_function__ of its own.
        if tensor is not None and (_keys_of(tensor).raw_repr() != ORDINARY_GPU_KEYS or _overrides_calls(tensor)):
            return False
    return True


def _unknown(*_: Any) -> bool:
    return False


if DISPATCH_BYPASS.is_on():
    ORDINARY_GPU_KEYS = _raw_keys("CUDA", "ADInplaceOrView", "AutogradCUDA", "AutocastCUDA")
    _NO_MODE = _raw_keys("BackendSelect", "ADInplaceOrView")
    _RECORDING = torch._C.DispatchKey.AutogradFunctionality
    _keys_of = torch._C._dispatch_keys
    _overrides_calls = torch.overrides.has_torch_function_unary
    _included_keys = torch._C._dispatch_tls_local_include_set
    _is_excluded = torch._C._dispatch_tls_is_dispatch_key_excluded

nothing_watches: Callable[[], bool] = _nothing_watches if DISPATCH_BYPASS.is_on() else _unknown
"""Whether nothing traces, transforms, profiles or overrides calls, and no tangents go with tensors.

``False`` where that cannot be known.
"""

are_ordinary_on_gpu: Callable[[Iterable[Tensor | None]], bool] = (
    _are_ordinary_on_gpu if DISPATCH_BYPASS.is_on() else _unknown
)
"""Whether the dispatcher has nothing to do for tensors but to find the implementation for GPUs.

``False`` where that cannot be known.
"""


def unchecked_apply(function: type[Function]) -> Callable[..., Any]:
    """``function.apply`` without its look for transforms of ``torch.func``, for after ``nothing_watches``."""
    above: Any = super(Function, function)
    return getattr(above, "apply", function.apply)


@cache
def tensor_guards() -> Any:
    """What torch.compile asks of the inputs of a graph, or ``None`` if this PyTorch has it in another form.

    That is their types, dispatch keys, dtypes, devices, sizes, strides, and whether they require grad: one call for all
    tensors, which takes 0.3 us for four. Asking them one by one takes several. Of dispatch modes it sees some, not all.
    """
    guards = _found(*KNOWN_CALLS.needs)
    try:
        of_two = guards(torch.empty(2, device="cpu"), dynamic_dims_sizes=[[2]], dynamic_dims_strides=[[1]])
        tells_apart = of_two.check(torch.ones(2, device="cpu")) and not of_two.check(torch.ones(3, device="cpu"))
    except Exception:  # whatever another form may raise
        return None
    return guards if tells_apart else None


def tangents_may_go_along() -> bool:
    """Whether forward-mode differentiation is under way, or that cannot be known."""
    return getattr(forward_ad, "_current_level", 0) >= 0


def may_have_been_written_to(tensor: Tensor) -> bool:
    """Whether a tensor was written to since it was made, or that cannot be known."""
    return getattr(tensor, "_version", 1) != 0


def weak_tensor_keys() -> Any:
    """A dictionary with tensors for keys, which it does not keep alive; ``None`` if PyTorch has none."""
    make = _found(KEPT_SIZES.needs[1])
    return None if make is None else make()


def _has_no_address(tensor: Tensor) -> bool:
    return tensor.data_ptr() == 0 and tensor.numel() != 0 and tensor.device.type != "meta"


is_functional: Callable[[Tensor], bool] = _found(*FUNCTIONAL_TENSORS.needs) or _has_no_address
"""Whether a tensor stands for another one while compilers replace in-place operators by ones that write nothing."""


def _no_promise(condition: Any) -> None:
    """What is promised is true, too, if nobody hears of it."""


promise: Callable[[Any], None] = _found(*PROMISES.needs) or _no_promise
"""Tells a compiler what is true of sizes that the data decide on: PyTorch 2.9 asks for it before it cuts to one."""


# ---- trees and samples


def register_tree_node(
    cls: type,
    leaves: Callable[[Any], dict[str, Any]],
    rest: Callable[[Any], tuple[int, ...]],
    put_together: Callable[[Any, tuple[int, ...]], Any],
) -> None:
    """Register a class with PyTorch's trees, so that they look into it; where they can be extended.

    Args:
        cls: The class.
        leaves: Gives what an object holds by name, trees themselves.
        rest: Gives what else it is made of.
        put_together: Makes an object of the values of leaves, and of the rest.
    """
    if not TREE_NODES.is_on():
        return
    from torch.utils import _pytree

    def flatten_with_keys(value: Any) -> tuple[list[Any], tuple[int, ...]]:
        return [(_pytree.GetAttrKey(name), leaf) for name, leaf in leaves(value).items()], rest(value)

    with suppress(TypeError):  # of options that have gone
        _pytree.register_pytree_node(
            cls,
            lambda value: ([*leaves(value).values()], rest(value)),
            put_together,
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
            flatten_with_keys_fn=flatten_with_keys,
            to_dumpable_context=list,
            from_dumpable_context=tuple,
        )


def map_of_arguments(function: Callable[[Any], Any], args: Any, kwargs: Any, is_leaf: Callable[[Any], bool]) -> Any:
    """The arguments of a call with a function applied to each leaf of them; to each argument, if trees are unknown."""
    tree_map = _found("torch.utils._pytree:tree_map")
    if tree_map is not None:
        return tree_map(function, (args, kwargs), is_leaf=is_leaf)
    return tuple(map(function, args)), {name: function(value) for name, value in kwargs.items()}


def register_collation(cls: type, put_together: Callable[..., Any]) -> None:
    """Have ``default_collate`` put samples of a class together, where it can be extended."""
    functions = _found(*COLLATING.needs)
    if isinstance(functions, MutableMapping):
        functions[cls] = put_together


# ---- the current GPU and its stream: public functions ask the same, and whether CUDA is initialized, in Python

current_gpu: Callable[[], int] = _found(GPU_QUERIES.needs[0]) or torch.cuda.current_device
is_capturing: Callable[[], bool] = _found(GPU_QUERIES.needs[1]) or torch.cuda.is_current_stream_capturing


def _current_stream(device: int) -> int:
    return torch.cuda.current_stream(device).cuda_stream


current_stream: Callable[[int], int] = _found(GPU_QUERIES.needs[2]) or _current_stream
"""The current stream of a GPU, as a number."""


# ---- launches of Triton

Launch = Callable[[tuple[int, int, int], int, Sequence[Any]], None]
"""Launches a compiled kernel: number of programs, stream, and values of the arguments that are not compiled in."""

unknown_launchers: set[str] = set()
"""Where kernels could not be launched past Triton's Python: its launchers have another form than those known here."""


def launch_watch() -> Callable[[], bool]:
    """What tells whether a profiler wants to hear of launches of Triton. Always, if that cannot be known."""
    if not LAUNCH_CACHE.is_on():
        return lambda: True
    runtime = _found("triton:knobs.runtime")

    def launches_are_watched() -> bool:
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        return bool(
            (enter is not None and getattr(enter, "calls", True))
            or (leave is not None and getattr(leave, "calls", True))
        )

    return launches_are_watched


def direct_launch(kernel: Any, function: Any, values: Sequence[Any], given: int, constants: dict) -> Launch | None:
    """A launch of a compiled kernel past what Triton does in Python.

    Triton's launchers are functions in C that take what Python gives them, some without counting it. So theirs is asked
    what it would give for a launch of no programs, and nothing but one of the two forms that are known here is ever
    given instead.

    Args:
        kernel: As Triton's launch returns it.
        function: Decorated with ``triton.jit``.
        values: Of the arguments that are not compiled in, for one launch.
        given: The number of these.
        constants: Arguments by name.

    Returns:
        The launch, or ``None`` for a kernel of another form, and for one that Triton has to make room for.
    """
    if type(getattr(kernel, "run", None)).__qualname__ in unknown_launchers:
        return None
    try:
        run = kernel.run
        if run.global_scratch_size or run.profile_scratch_size:
            return None
        arguments = [*values]
        for parameter in function.params[given:]:
            arguments.append(constants.get(parameter.name, parameter.default))
        compiled_in = tuple(arguments[len(values) :])
        common = kernel.function, run.launch_cooperative_grid, run.launch_pdl
        metadata = kernel.packed_metadata, None, None, None  # neither launch metadata nor hooks
        asked = copy.copy(run)  # the launcher itself may be launching in another thread
        seen: list[tuple[Any, ...]] = []
        asked.launch = lambda *parts: seen.append(parts)
        grid_and_stream = 0, 1, 1, 0
        asked(*grid_and_stream, kernel.function, *metadata, *arguments)
        apart = *common, None, None, *metadata  # of Triton 3.5 and 3.6
        together = *common, *metadata, None, None, *_annotations(run)  # of Triton 3.7 to 3.9
        is_apart = seen == [(*grid_and_stream, *apart, *arguments)]
        if not is_apart and seen != [(*grid_and_stream, *together, tuple(arguments))]:
            unknown_launchers.add(type(run).__qualname__)
            return None
    except Exception:  # whatever another form may raise
        unknown_launchers.add(type(getattr(kernel, "run", None)).__qualname__)
        return None
    launch, before = run.launch, apart if is_apart else together

    def with_arguments_apart(grid: tuple[int, int, int], stream: int, values: Sequence[Any]) -> None:
        launch(*grid, stream, *before, *values, *compiled_in)

    def with_arguments_together(grid: tuple[int, int, int], stream: int, values: Sequence[Any]) -> None:
        launch(*grid, stream, *before, (*values, *compiled_in))

    return with_arguments_apart if is_apart else with_arguments_together


def _annotations(run: Any) -> tuple[Any, ...]:
    return getattr(run, "arg_annotations", None), getattr(run, "kernel_signature", None)


def fusion_by_default() -> bool:
    """Whether a product and a sum may be one instruction where a launch leaves it open, as the environment says."""
    return bool(_found("triton:knobs.language.default_fp_fusion", True))


def dependent_launch_wait() -> Any:
    """The device function that waits for the kernel before it, or ``None``."""
    return _found(*DEPENDENT_LAUNCH.needs)
