"""Two graphs side by side: whether they compute the same, and which tensor of one stands where which of the other."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import fx
from torch.nn.modules.dropout import _DropoutNd

from fxmerge.errors import StructureError
from fxmerge.ir import Traced
from fxmerge.rules import MOVEMENT


def described(traced: Traced, node: fx.Node, number: Mapping[fx.Node, str], wider: bool) -> str:
    """The operation of a node, without what only training reads and, where widths may differ, those.

    ``number`` names the nodes that it reads; any other is "_".
    """

    def named(a: Any) -> Any:
        return fx.map_arg(a, lambda n: _Name(number.get(n, "_")))

    if node.op == "call_module":
        layer = traced.graph_module.get_submodule(str(node.target))
        settings = (
            ""
            if isinstance(layer, _DropoutNd)
            else re.sub(r"momentum=[^,]*, |,? ?inplace(=\w+)?", "", layer.extra_repr())
        )
        if wider:
            settings = re.sub(r"^[\d(), ]+|(features|groups|parameters)=\d+", "", settings)
        return f"{type(layer).__name__}({settings}) of {named(node.args)}"
    if node.op in ("placeholder", "get_attr"):
        return node.op
    name = getattr(node.target, "__name__", str(node.target))
    if re.search("dropout|drop_path|stochastic_depth", name):  # in training only
        return f"{name} of {named(node.args[:1])}"
    options = {k: v for k, v in node.kwargs.items() if k != "inplace"}
    said = f"{node.op} {name} of {named(node.args)} {named(options)}"
    return re.sub(r"\b\d+\b", "_", said) if wider and name in MOVEMENT else said


class _Name(str):
    """A node's stand-in, printed bare and kept apart from numbers."""

    def __repr__(self) -> str:
        return f"%{self}"


def counterparts(
    first: Traced, other: Traced, nth: str, wider: bool, graph: fx.Graph | None = None
) -> dict[fx.Node, fx.Node]:
    """Node of the first network -> node of the other, the same operations with the same settings in the same order.

    Args:
        first, other: the networks.
        nth: what the other one is called in an error.
        wider: whether widths may differ.
        graph: to be walked in place of the first network's own.

    Raises:
        StructureError: naming the first pair of nodes that differ.
    """
    a_nodes, b_nodes = _walk(graph or first.graph_module.graph), _walk(other.graph_module.graph)
    number: tuple[dict[fx.Node, str], dict[fx.Node, str]] = ({}, {})
    for i in range(max(len(a_nodes), len(b_nodes))):
        pair = [nodes[i] if i < len(nodes) else None for nodes in (a_nodes, b_nodes)]
        said = [
            "nothing" if n is None else described(t, n, names, wider)
            for t, n, names in zip((first, other), pair, number, strict=True)
        ]
        if said[0] != said[1] or pair[0] is None or pair[1] is None:
            where = next(n for n in pair if n is not None).name
            raise StructureError(
                f"the parents differ in structure at node '{where}': {said[0]} in the first network, {said[1]} in the "
                f"{nth}. Check that both are of the same architecture"
            )
        for n, names in zip(pair, number, strict=True):
            assert n is not None
            names[n] = str(i)
    return dict(zip(a_nodes, b_nodes, strict=True))


def _walk(graph: fx.Graph) -> list[fx.Node]:
    """What the output is made of, in an order that does not depend on where constants and parameters are fetched."""
    nodes: list[fx.Node] = []
    seen: set[fx.Node] = set()
    relevant = contributing(graph)
    for n in graph.nodes:
        if n.op == "get_attr" or n not in relevant:
            continue
        for m in n.all_input_nodes:
            if m.op == "get_attr" and m not in seen:
                seen.add(m)
                nodes.append(m)
        nodes.append(n)
    return nodes


def contributing(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that the output depends on, writes in place included; not assertions, nor what nobody reads."""
    found: set[fx.Node] = set()
    for n in reversed(graph.nodes):
        name = getattr(n.target, "__name__", str(n.target))
        writes = name == "setitem" or (name.endswith("_") and not name.startswith("_"))
        if n in found or n.op in ("output", "placeholder") or (writes and n.op != "get_attr"):
            found |= {n, *n.all_input_nodes}
    return found


def tensors(pairs: Mapping[fx.Node, fx.Node], first: Traced, other: Traced) -> dict[str, str]:
    """Parameter or buffer of the first network -> its counterpart's name."""
    found: dict[str, str] = {}
    for a, b in pairs.items():
        if a.op == "get_attr":
            found[str(a.target)] = str(b.target)
        elif a.op == "call_module":
            layer = first.graph_module.get_submodule(str(a.target))
            twin = other.graph_module.get_submodule(str(b.target))
            if layer.state_dict().keys() != twin.state_dict().keys():
                raise StructureError(
                    f"the parents differ in what '{a.target}' holds ({type(layer).__name__}): layers inside a module "
                    "that is taken whole cannot be counted. Write it with layers of torch.nn one after the other"
                )
            for reader in (layer.named_parameters, layer.named_buffers):
                keys: Callable[..., Any] = reader
                for key, _ in keys(remove_duplicate=False):
                    found[f"{a.target}.{key}"] = f"{b.target}.{key}"
    return found
