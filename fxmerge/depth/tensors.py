"""The nodes and the tensors of a unit, and the shapes of a graph that was changed."""

from __future__ import annotations

from torch import fx

from fxmerge.ir import Traced
from fxmerge.running import bind, evaluating, fresh
from fxmerge.trace import ShapeInterpreter
from fxmerge.units import Unit


def body(graph: fx.Graph, unit: Unit) -> list[fx.Node]:
    """The unit's nodes, in order, with the constants, parameters and sizes that it alone reads."""
    found = {n for n in graph.nodes if n.name in unit.nodes}
    for n in reversed(graph.nodes):
        outside = n in found or n.op in ("placeholder", "output") or n.name == unit.source
        if not outside and n.users and all(u in found for u in n.users):
            found.add(n)
    return [n for n in graph.nodes if n in found]


def parameters_of(traced: Traced, unit: Unit) -> list[str]:
    """Names of the parameters of a unit's layers, in the order of use."""
    return [n for n in tensors_of(traced, unit) if n in dict(traced.graph_module.named_parameters())]


def tensors_of(traced: Traced, unit: Unit) -> list[str]:
    """Names of the parameters and buffers of a unit's layers, in the order of use; none that is read elsewhere too."""
    module = traced.graph_module
    inside = body(module.graph, unit)
    found: dict[str, None] = {}
    for n in inside:
        if n.op == "get_attr":
            found[str(n.target)] = None
        elif n.op == "call_module":
            layer = module.get_submodule(str(n.target))
            found |= {f"{n.target}.{k}": None for k, _ in (*layer.named_parameters(), *layer.named_buffers())}
    elsewhere = {str(n.target) for n in module.graph.nodes if n not in inside and n.op in ("get_attr", "call_module")}
    return [k for k in found if not any(k == e or k.startswith(f"{e}.") for e in elsewhere)]


def run_shapes(module: fx.GraphModule, traced: Traced) -> dict[str, tuple[int, ...]]:
    """Node name -> shape of its output, for nodes that give one tensor."""
    interpreter = ShapeInterpreter(module)
    with evaluating(module):
        interpreter.run(*bind(module.graph, fresh(traced.args), fresh(dict(traced.kwargs))))
    return interpreter.shapes
