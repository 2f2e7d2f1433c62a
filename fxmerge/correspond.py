"""Whether parents can be merged neuron by neuron, said clearly where they cannot."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import fx
from torch.nn.modules.dropout import _DropoutNd

from fxmerge.errors import StructureError
from fxmerge.ir import OUTPUT, AxisClass, AxisClasses, Traced
from fxmerge.rules import MOVEMENT


def require_same_structure(
    classes: Sequence[AxisClasses], apart: frozenset[int] = frozenset(), any_width: bool = False
) -> None:
    """The parents must have the same classes at the same sites.

    Args:
        classes: of each parent.
        apart: classes of the first parent that may differ in size, since each parent keeps its own.
        any_width: whether free classes may differ in size.
    """
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
        by_name = {c.name: c for c in other}
        wider = False
        for k, c in enumerate(first):
            same = by_name.get(c.name)
            if same is None or _axes(same) != _axes(c) or same.size == c.size:
                continue
            wider = True
            if k in apart or (any_width and c.free and same.free and not c.parents and not first.children(k)):
                continue
            if c.pinned == OUTPUT:
                way = "Networks with different heads cannot be averaged: use heads='separate' or heads='concat'"
            elif not c.free:
                way = "What the inputs fix must be alike"
            elif any_width:
                way = "Classes in blocks (heads, groups) need equal widths"
            else:
                way = "Permutations need equal widths: use matcher=OTFusion()"
            raise StructureError(
                f"the parents differ in {'width' if c.free else 'the number of outputs or inputs'} at '{c.name}': "
                f"{c.size} against {same.size} neurons. {way}"
            )
        _same_computation(first.traced, other.traced, _nth(number), wider)
        if len(first) != len(other) or any(_axes(a) != _axes(b) for a, b in zip(first, other, strict=True)):
            raise StructureError(
                f"the parents differ in structure: {len(first)} classes of neurons in the first network, {len(other)} "
                f"in the {_nth(number)}, or at other places. Check that both are of the same architecture"
            )


def _axes(c: AxisClass) -> list[tuple[str, int]]:
    return sorted((s.parameter, s.axis) for s in c.sites)


def _same_computation(first: Traced, other: Traced, nth: str, wider: bool) -> None:
    """Node by node the same operations with the same settings, but for widths where these may differ."""
    for a, b in zip(first.graph_module.graph.nodes, other.graph_module.graph.nodes, strict=False):
        x, y = _described(first, a, wider), _described(other, b, wider)
        if x != y:
            raise StructureError(
                f"the parents differ in structure at node '{a.name}': {x} in the first network, {y} in the {nth}. "
                "Check that both are of the same architecture"
            )


def _described(traced: Traced, node: fx.Node, wider: bool) -> str:
    """The operation of a node, without what only training reads and, where widths differ, those."""
    if node.op == "call_module":
        layer = traced.graph_module.get_submodule(str(node.target))
        settings = (
            ""
            if isinstance(layer, _DropoutNd)
            else re.sub(r"momentum=[^,]*, |,? ?inplace(=\w+)?", "", layer.extra_repr())
        )
        if wider:
            settings = re.sub(r"^[\d(), ]+|(features|groups|parameters)=\d+", "", settings)
        return f"{type(layer).__name__}({settings}) of {[str(a) for a in node.args]}"
    name = getattr(node.target, "__name__", str(node.target))
    if "dropout" in name:
        return f"{name} of {node.args[:1]}"
    options = {k: v for k, v in node.kwargs.items() if k != "inplace"}
    said = f"{node.op} {node.target} of {node.args} {options}"
    return re.sub(r"\b\d+\b", "_", said) if wider and name in MOVEMENT else said


def _nth(k: int) -> str:
    return {2: "second", 3: "third"}.get(k, f"{k}th")
