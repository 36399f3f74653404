"""The schema of an operator, read once: what its arguments are called, of what type they are, and which are tensors."""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from operator import itemgetter
from typing import Any, NamedTuple, get_type_hints

from torch import Tensor

Args = tuple[Any, ...]

_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    int: "int",
    float: "float",
    float | None: "float?",
    str: "str",
    tuple[float, float]: "float[]",
}


Pick = Callable[[Sequence[Any]], Args]


class Leaves(NamedTuple):
    """What the leaves of a call are."""

    names: list[str]
    tensors_at: list[int]  # positions of tensors, and of what may be one
    rest_at: list[int]
    tensors: Pick
    rest: Pick
    together: Pick  # of tensors and the rest behind them, the leaves


def pick(positions: Sequence[int]) -> Pick:
    """What picks the values at these positions."""
    if not positions:
        return lambda values: ()
    if len(positions) == 1:
        position = positions[0]
        return lambda values: (values[position],)
    return itemgetter(*positions)


class Schema:
    """What an operator takes and gives.

    Arguments that belong together are one value in Python, of a `NamedTuple` class: a *group*, whose type in the schema
    is the name of the class. PyTorch's dispatcher knows no such types and is given each field. So the values of a call
    have three forms:

    - `args`: as functions of the library take them, a group or a list of tensors being one value;
    - flat: as the dispatcher takes them, groups taken apart;
    - leaves: lists of tensors taken apart, too.
    """

    def __init__(self, text: str, groups: Sequence[Any] = ()):
        """Read a schema such as `"scaled(Tensor data, Tensor? weight, Reduction reduction) -> Tensor"`."""
        self.name, rest = text.split("(", 1)
        self.arguments, results = rest.rsplit(") -> ", 1)
        self.results = [result for result in results.strip("()").split(", ") if result]
        self.groups = groups
        of_name = {group.__name__: group for group in groups}
        declared = [argument.split() for argument in self.arguments.split(", ")]
        self.names = [name for _, name in declared]
        self.tensors = {name for of_type, name in declared if of_type.startswith("Tensor")}
        self.written = [position for position, (of_type, _) in enumerate(declared) if "!" in of_type]
        self.list_at = next((position for position, (of_type, _) in enumerate(declared) if of_type == "Tensor[]"), None)
        self._groups_at = {p: of_name[of_type] for p, (of_type, _) in enumerate(declared) if of_type in of_name}
        self._nested_at = [p for p in range(len(declared)) if p in self._groups_at or p == self.list_at]
        self._ends_nested = self._nested_at == [*range(len(declared))][-len(self._nested_at) :]
        self._flat: list[tuple[str, str]] = []
        self._spans: list[tuple[int, int, Any]] = []  # of groups in the flat form
        for position, (of_type, name) in enumerate(declared):
            group = self._groups_at.get(position)
            if group:
                self._spans.append((len(self._flat), len(self._flat) + len(group._fields), group))
            self._flat += [(_TYPES[t], n) for n, t in get_type_hints(group).items()] if group else [(of_type, name)]
        self.flat_names = [name for _, name in self._flat]
        self.first_tensor_at = next(p for p, (of_type, _) in enumerate(declared) if of_type.startswith("Tensor"))
        assert not (self._groups_at and self.list_at is not None), f"{self.name}: a list of tensors and groups"
        assert len({*self.flat_names}) == len(self._flat), f"{self.name}: two arguments of one name"
        self.definition = f"{self.name}({', '.join(map(' '.join, self._flat))}) -> {results}"
        self._leaves: dict[int, Leaves] = {}

    def of_backward(self, of: Sequence[str]) -> "Schema":
        """The schema of the operator that gives a gradient for each of these arguments, where it is needed."""
        types = {name: of_type.rstrip("?") for of_type, name in map(str.split, self.arguments.split(", "))}
        results = ", ".join(types[name] for name in of)
        arguments = f"Tensor grad_output, {self.arguments}, bool[{len(of)}] needed"
        return Schema(
            f"{self.name}_backward({arguments}) -> {results if len(of) == 1 else f'({results})'}", self.groups
        )

    def flat(self, args: Args) -> Args:
        """As the dispatcher takes them."""
        return _taken_apart(args, self._groups_at) if self._groups_at else args

    def grouped(self, flat: Args) -> Args:
        """The reverse of `flat`."""
        args, begin = [], 0
        for start, end, group in self._spans:
            args += flat[begin:start]
            args.append(group._make(flat[start:end]))
            begin = end
        return (*args, *flat[begin:])

    def leaves(self, args: Args) -> Args:
        """Every value for itself."""
        if not self._nested_at:
            return args
        if self._ends_nested:  # as groups do: what _taken_apart does, without its loop
            begin = self._nested_at[0]
            return (*args[:begin], *chain.from_iterable(args[begin:]))
        return _taken_apart(args, self._nested_at)

    def of_call(self, leaves: Args) -> Args:
        """The reverse of `leaves`."""
        if self.list_at is None:
            return self.grouped(leaves)
        after = len(leaves) - (len(self.names) - 1 - self.list_at)
        return (*leaves[: self.list_at], [*leaves[self.list_at : after]], *leaves[after:])

    def named(self, args: Args) -> dict[str, Any]:
        """The arguments by name."""
        return dict(zip(self.names, args, strict=True))

    def of_leaves(self, count: int) -> Leaves:
        """What so many leaves are: there may be any number of tensors in a list."""
        if count not in self._leaves:
            listed = count - len(self._flat) + 1
            each = [leaf for leaf in self._flat for _ in range(listed if leaf[0] == "Tensor[]" else 1)]
            at = [position for position, (of_type, _) in enumerate(each) if of_type.startswith("Tensor")]
            rest = [position for position in range(count) if position not in at]
            order = sorted(range(count), key=(at + rest).__getitem__)
            self._leaves[count] = Leaves([n for _, n in each], at, rest, pick(at), pick(rest), pick(order))
        return self._leaves[count]


def _taken_apart(args: Args, positions: Iterable[int]) -> Args:
    values, begin = (), 0
    for position in positions:
        values = (*values, *args[begin:position], *args[position])
        begin = position + 1
    return (*values, *args[begin:])
