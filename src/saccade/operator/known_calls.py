"""Calls that were made before: they are neither checked nor prepared again.

What checks come to, where a call goes and how its kernels are launched depends on all of its arguments but the values
of tensors. Training makes the same calls again and again. So a call is remembered by a key: **every** argument of the
operator's schema, tensors by what PyTorch's guards look at (type, dispatch keys, dtype, device, sizes, strides, whether
they require grad), all else by type and value, and whether gradients are recorded. Left out are only numbers that the
operator declares to vary, which kernels are given at each launch.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.debug import debug_checks_enabled
from saccade.operator.schema import Args, Pick, Schema, pick
from saccade.operator.torch_internals import nothing_watches, tensor_guards

_PLAIN = frozenset((bool, float, int, str, type(None)))
_MOST_KNOWN = 8
_MUCH_WASTE = 64


@dataclass(slots=True)
class KnownCall:
    """The key of a call, and what to call."""

    recording: bool
    count: int  # of leaves
    rest_of: Pick  # all that are no tensors, which the guards look at
    types: list[type]
    values_of: Pick  # all of these that do not vary
    values: Args
    written_of: Pick
    written: list[str] | None  # as text, those values that equal ones that are not the same: 0.0 and -0.0
    tensors_of: Pick
    guards: Callable[..., bool]
    call: Callable[..., Any]
    is_used: bool = False  # whether the call has come again


class KnownCalls:
    """The calls of one operator that are remembered."""

    def __init__(self, schema: Schema, varying: Collection[str] = ()):
        """None yet.

        Args:
            schema: Of the operator.
            varying: Names of numbers that are no part of the key.
        """
        self.schema, self.varying = schema, frozenset(varying)
        self.known: list[KnownCall] = []
        self.wasted = 0
        """Calls learnt that did not come again, since one did."""

    def find(self, args: Args) -> Callable[..., Any] | None:
        """What to call with such arguments, if a call like that was learnt; they need not have been checked."""
        if not nothing_watches() or debug_checks_enabled():
            return None
        leaves = self.schema.leaves(args)
        recording, count = torch.is_grad_enabled(), len(leaves)
        for known in self.known:
            if (
                known.count == count
                and known.recording == recording
                and known.types == [*map(type, rest := known.rest_of(leaves))]
                and known.values == known.values_of(rest)
                and known.guards(*known.tensors_of(leaves))
                and (known.written is None or known.written == [*map(repr, known.written_of(leaves))])
            ):
                if not known.is_used:
                    known.is_used, self.wasted = True, 0
                return known.call
        return None

    def learn(self, args: Args, call: Callable[..., Any]) -> None:
        """Remember what to call with arguments such as these: as they were asked for, and have been checked now."""
        leaves, guards = self.schema.leaves(args), tensor_guards()
        of_leaves = self.schema.of_leaves(len(leaves))
        # Checks convert what is not plain.
        if guards is None or not all(map(_is_plain, of_leaves.rest(leaves))):
            return
        if self.wasted >= _MUCH_WASTE:
            # Where no two calls are alike, nearly none is learnt: that would take longer than the checks.
            self.wasted += 1
            if self.wasted % _MUCH_WASTE:
                return
        rest_at = [position for position, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)]
        varies = [of_leaves.names[position] in self.varying for position in rest_at]
        tensors_of = pick([position for position, leaf in enumerate(leaves) if isinstance(leaf, Tensor)])
        rest_of = pick(rest_at)
        rest = rest_of(leaves)
        values_of = pick([number for number, each in enumerate(varies) if not each]) if any(varies) else tuple
        written_of = pick(
            [at for at, each in zip(rest_at, varies, strict=True) if not each and _may_equal_another(leaves[at])]
        )
        tensors = tensors_of(leaves)
        sizes, strides = [list(tensor.shape) for tensor in tensors], [list(tensor.stride()) for tensor in tensors]
        check = guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
        if check(*tensors):  # it does not if one tensor is two arguments
            self._keep(
                KnownCall(
                    torch.is_grad_enabled(),
                    len(leaves),
                    rest_of,
                    [*map(type, rest)],
                    values_of,
                    values_of(rest),
                    written_of,
                    [*map(repr, written_of(leaves))] or None,
                    tensors_of,
                    check,
                    call,
                )
            )

    def key(self, args: Args) -> Args | None:
        """The key of a prepared call: what decides how it is computed, which is all but what autograd alone looks at.

        ``None`` for a call with a value that is neither a plain number nor text.
        """
        leaves = self.schema.leaves(args)
        of_leaves = self.schema.of_leaves(len(leaves))
        layouts = [None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in of_leaves.tensors(leaves)]
        values = [leaves[position] for position in of_leaves.rest_at if of_leaves.names[position] not in self.varying]
        return (repr(values), *layouts) if all(map(_is_plain, values)) else None

    def _keep(self, new: KnownCall) -> None:
        kept = self.known
        if len(kept) == _MOST_KNOWN:
            unused = [known for known in kept if not known.is_used]
            dropped = (unused or kept)[-1]
            self.wasted += not dropped.is_used
            kept = [known for known in kept if known is not dropped]
        self.known = [new, *kept]  # not changed in place: another thread may be looking

    def forget(self) -> None:
        """As if no call had been made."""
        self.known, self.wasted = [], 0


def _is_plain(value: Any) -> bool:
    return all(map(_is_plain, value)) if type(value) in (list, tuple) else type(value) in _PLAIN


def _may_equal_another(value: Any) -> bool:
    """Whether a value of the same type can be equal and not the same: 0.0 and -0.0, or (1,) and (1.0,)."""
    if type(value) in (list, tuple):
        return not all(type(each) is bool for each in value)  # of numbers where truth is asked for, it is all the same
    return type(value) is float and value == 0
