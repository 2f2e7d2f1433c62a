"""Whether parents can be merged neuron by neuron, said clearly where they cannot."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import fx
from torch.nn.modules.dropout import _DropoutNd

from fxmerge.errors import StructureError
from fxmerge.ir import AxisClasses, Traced


def require_same_structure(classes: Sequence[AxisClasses]) -> None:
    """The parents must have the same classes at the same sites with the same widths."""
    first = classes[0]
    for number, other in enumerate(classes[1:], 2):
        ours, theirs = set(first.by_tensor()), set(other.by_tensor())
        if ours != theirs:
            odd = sorted(ours ^ theirs)[0]
            where = "first" if odd in ours else f"{_nth(number)}"
            raise StructureError(
                f"the parents differ in structure: '{odd}' is only in the {where} network. Networks of different depth "
                "or layers cannot be merged; check that both are of the same architecture"
            )
        for c in first:
            same = next((d for d in other if d.name == c.name and d.sites.keys() == c.sites.keys()), None)
            if same is not None and same.size != c.size:
                head = c.pinned is not None
                raise StructureError(
                    f"the parents differ in {'the number of outputs or inputs' if head else 'width'} at '{c.name}': "
                    f"{c.size} against {same.size} neurons. "
                    + ("Networks with different heads cannot be averaged" if head else "Permutations need equal widths")
                )
        _same_computation(first.traced, other.traced, _nth(number))
        if len(first) != len(other) or any(a.sites.keys() != b.sites.keys() for a, b in zip(first, other, strict=True)):
            raise StructureError(
                f"the parents differ in structure: {len(first)} classes of neurons in the first network, {len(other)} "
                f"in the {_nth(number)}, or at other places. Check that both are of the same architecture"
            )


def _same_computation(first: Traced, other: Traced, nth: str) -> None:
    """Node by node the same operations with the same settings, but for those that only training reads."""
    for a, b in zip(first.graph_module.graph.nodes, other.graph_module.graph.nodes, strict=False):
        x, y = _described(first, a), _described(other, b)
        if x != y:
            raise StructureError(
                f"the parents differ in structure at node '{a.name}': {x} in the first network, {y} in the {nth}. "
                "Check that both are of the same architecture"
            )


def _described(traced: Traced, node: fx.Node) -> str:
    if node.op == "call_module":
        layer = traced.graph_module.get_submodule(str(node.target))
        settings = (
            ""
            if isinstance(layer, _DropoutNd)
            else re.sub(r"momentum=[^,]*, |,? ?inplace(=\w+)?", "", layer.extra_repr())
        )
        return f"{type(layer).__name__}({settings}) of {[str(a) for a in node.args]}"
    name = getattr(node.target, "__name__", str(node.target))
    if "dropout" in name:
        return f"{name} of {node.args[:1]}"
    options = {k: v for k, v in node.kwargs.items() if k != "inplace"}
    return f"{node.op} {node.target} of {node.args} {options}"


def _nth(k: int) -> str:
    return {2: "second", 3: "third"}.get(k, f"{k}th")
