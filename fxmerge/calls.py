"""One call of an operator, as rules see it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor

from fxmerge.label import Label


@dataclass(frozen=True, eq=False)
class Call:
    """One operator call on labels.

    Attributes:
        name: the operation, e.g. "add" or "torchvision::nms".
        function: the operator itself; running it on label tensors is how movement rules work.
        arguments: schema name -> value, defaults included; a Label for every tensor that carries neurons or data.
        shapes: the shapes of the tensors it returned.
        strides: of the first tensor given, where it is the first of its storage.
    """

    name: str
    function: Any
    arguments: Mapping[str, Any]
    shapes: tuple[tuple[int, ...], ...]
    strides: tuple[int, ...] | None = None

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.arguments.get(name, default)

    def labels(self) -> list[Label]:
        """All argument labels, in order."""
        return [x for x in leaves(self.arguments.values()) if isinstance(x, Label)]

    def tensors(self) -> list[Any]:
        """All arguments that are labels or constant tensors, in order."""
        return [x for x in leaves(self.arguments.values()) if isinstance(x, (Label, Tensor))]

    def run(self, replaced: Mapping[str, Any]) -> Any:
        """The operation itself, with some arguments replaced (by label tensors)."""
        values = {**self.arguments, **replaced}
        schema = self.function._schema.arguments
        args = [values[a.name] for a in schema if not a.kwarg_only]
        kwargs = {a.name: values[a.name] for a in schema if a.kwarg_only}
        return self.function(*args, **kwargs)


def leaves(values: Iterable[Any]) -> Iterator[Any]:
    """What operators are given and give: values, and lists of them."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from leaves(value)
        else:
            yield value


@cache
def defaults(function: Any) -> dict[str, Any]:
    """The arguments of an operator, in order -> what they are where they are not given."""
    return {a.name: a.default_value if a.has_default_value() else None for a in function._schema.arguments}


@cache
def operation_name(function: Any) -> str:
    """ "add" for aten::add_.Tensor, "torchvision::roi_align" for operators of other namespaces."""
    namespace, name = function._schema.name.split("::")
    if function._schema.is_mutable and name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    return name if namespace == "aten" else f"{namespace}::{name}"
