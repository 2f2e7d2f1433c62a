"""The fused graph as data for the picture: nodes in the order in which they run, in groups that follow the modules.

layer1.0.conv1, layer1.0.bn1, .., add, layer1.0.relu, layer1.1.conv1, ..
    -->  layer1 ( layer1.0 ( conv1 bn1 .. add relu )  layer1.1 ( conv1 .. ) )
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from fxmerge.facts import Facts
from fxmerge.ir import AxisClasses, Traced
from fxmerge.page.layers import side_by_side
from fxmerge.page.words import numbers

_LONGEST = 240  # characters of an operation in full


def picture(facts: Facts) -> dict[str, Any]:
    """Everything that the script draws, as JSON can hold it.

    Keys: "networks" (names), "classes" (in the order of the facts, see ``_class``), "nodes" (see ``_node``) and "tree":
    indices of nodes, and groups {"path", "items", "parameters", "units"}.
    """
    traced = facts.classes.traced
    nodes = [n for n in traced.graph_module.graph.nodes if _shown(n, traced)]
    tag = numbers(facts)
    place = {n: i for i, n in enumerate(nodes)}
    held = _held(facts.classes)
    shows: dict[str, list[tuple[int, int, str]]] = {}
    for k, c in enumerate(facts.classes):
        for t in c.taps:
            shows.setdefault(t.node, []).append((k, t.axis, t.kind))
    units = {row.unit: [str(p) if p else None for p in row.parents] for rows in side_by_side(facts) for row in rows}
    return {
        "networks": list(facts.parents),
        "classes": [_class(facts, k, tag.get(k)) for k in range(len(facts.classes))],
        "nodes": [_node(facts, n, place, held, shows.get(n.name, ()), units) for n in nodes],
        "tree": _tree(list(zip(range(len(nodes)), _scopes(nodes), strict=True)), (), nodes, traced, units),
    }


def _shown(n: fx.Node, traced: Traced) -> bool:
    """Whether it gives a tensor, or several: sizes and what is computed with them are left out."""
    if n.op in ("placeholder", "output", "call_module") or n.name in traced.shapes:
        return True
    return any(u.target is operator.getitem and u.args[0] is n and _shown(u, traced) for u in n.users)


def _class(facts: Facts, k: int, number: int | None) -> dict[str, Any]:
    c = facts.classes[k]
    shared = facts.shared[k] if c.free else {}
    return {
        "name": c.name,
        "number": number,
        "size": facts.alignment.couplings[k].size,
        "widths": facts.widths(k),
        "shared": [[list(who), n] for who, n in shared.items()],
        "quality": _number(facts.alignment.quality.get(k)),
        "pinned": c.pinned,
        "within": list(c.parents),
        "sites": [[str(site), site in facts.classes.reads] for site in c.sites],
    }


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def _held(classes: AxisClasses) -> dict[str, list[tuple[str, int, bool]]]:
    """Tensor by each of its names -> (axis as text, class, whether it is read there)."""
    found: dict[str, list[tuple[str, int, bool]]] = {}
    for name, entries in classes.by_tensor().items():
        rows = [(str(site).removeprefix(site.parameter), k, site in classes.reads) for site, k, _ in entries]
        for known in (name, *classes.aliases.get(name, ())):
            found[known] = rows
    return found


def _node(
    facts: Facts,
    n: fx.Node,
    place: Mapping[fx.Node, int],
    held: Mapping[str, list[tuple[str, int, bool]]],
    shows: Sequence[tuple[int, int, str]],
    units: Mapping[str, list[str | None]],
) -> dict[str, Any]:
    """One operation: what it is, where its values come from, and which neurons its output and its tensors carry."""
    target = n.target if isinstance(n.target, str) else getattr(n.target, "__name__", str(n.target))
    label, op = target.rpartition(".")[2], {"placeholder": "input", "get_attr": "tensor"}.get(n.op, "")
    source = ""
    if n.op == "call_module":
        layer = facts.classes.traced.graph_module.get_submodule(target)
        op, source = type(layer).__name__, str(layer)
    elif n.op in ("call_function", "call_method"):
        given = [*map(str, n.args), *(f"{key}={value}" for key, value in n.kwargs.items())]
        label, source = target, f"{target}({', '.join(given)})"
    own = {"call_module": f"{target}.", "get_attr": target}.get(n.op)
    sites = [
        [f"{name}{axis}", k, reads]
        for name, rows in held.items()
        if own and (name == own or (own.endswith(".") and name.startswith(own)))
        for axis, k, reads in rows
    ]
    order = {"made": 0, "read": 1}
    mine = sorted(shows, key=lambda s: (not facts.classes[s[0]].free, order.get(s[2], 2), s[0]))
    variance = facts.variance.get(n.name)
    return {
        "name": n.name,
        "label": label,
        "op": op,
        "target": target if n.op in ("call_module", "get_attr") else None,
        "source": source if len(source) <= _LONGEST else source[: _LONGEST - 2] + " ..",
        "shape": facts.classes.traced.shapes.get(n.name),
        "inputs": [place[m] for m in n.all_input_nodes if m in place],
        "classes": [[k, axis] for k, axis, _ in mine],
        "sites": sites,
        "variance": [_number(v) for v in variance] if variance else None,
        "inserted": [p for p, names in enumerate(facts.inserted) if n.name in names],
        "units": units.get(target),
    }


Path = tuple[str, ...]


def _scopes(nodes: Sequence[fx.Node]) -> list[Path]:
    """The module that each node stands in, as the way to it."""
    known: list[Path | None] = [_own(n) for n in nodes]
    after: list[Path] = [()] * len(nodes)
    coming: Path = ()
    for i in range(len(nodes) - 1, -1, -1):
        after[i], coming = coming, known[i] if known[i] is not None else coming  # type: ignore[assignment]
    place = {n: i for i, n in enumerate(nodes)}
    found: list[Path] = []
    before: Path = ()
    for i, n in enumerate(nodes):
        scope = known[i]
        if scope is None:
            said = _said(n)
            around = _common([before, after[i]])
            inputs = _common([found[place[m]] for m in n.all_input_nodes if m in place and m.op != "get_attr"])
            fits = said is not None and said in (before[: len(said)], after[i][: len(said)])
            scope = said if said is not None and fits else max(around, inputs, key=len)
        found.append(scope)
        before = scope
    return found


def _own(n: fx.Node) -> Path | None:
    if n.op in ("call_module", "get_attr"):
        return tuple(str(n.target).split(".")[:-1])
    return () if n.op in ("placeholder", "output") else None


def _said(n: fx.Node) -> Path | None:
    """Where the tracer was when it met the node, if it said so; a unit that was copied says where the first one is."""
    stack = list(n.meta.get("nn_module_stack", {}))
    return tuple(p for p in stack[-1].split("@")[0].split(".") if p) if stack else None


def _common(paths: Sequence[Path]) -> Path:
    if not paths:
        return ()
    length = next((i for i, parts in enumerate(zip(*paths, strict=False)) if len(set(parts)) > 1), None)
    return min(paths, key=len) if length is None else paths[0][:length]


def _tree(
    items: Sequence[tuple[int, Path]],
    path: Path,
    nodes: Sequence[fx.Node],
    traced: Traced,
    units: Mapping[str, list[str | None]],
) -> list[Any]:
    """Neighbours in the same module as one group; a group of one thing is that thing."""
    found: list[Any] = []
    start = 0
    while start < len(items):
        index, scope = items[start]
        end = start + 1
        if len(scope) > len(path):
            inside = scope[: len(path) + 1]
            while end < len(items) and items[end][1][: len(inside)] == inside:
                end += 1
            members = _tree(items[start:end], inside, nodes, traced, units)
            if len(members) == 1:
                found += members
            else:
                name = ".".join(inside)
                count = _parameters([nodes[i] for i, _ in items[start:end]], traced)
                found.append({"path": name, "items": members, "parameters": count, "units": units.get(name)})
        else:
            found.append(index)
        start = end
    return found


def _parameters(nodes: Sequence[fx.Node], traced: Traced) -> int:
    """How many numbers these nodes can learn, those shared among them once."""
    module = traced.graph_module
    tensors: dict[int, Tensor] = {}
    for n in nodes:
        if n.op == "call_module":
            tensors |= {id(p): p for p in module.get_submodule(str(n.target)).parameters()}
        elif n.op == "get_attr" and str(n.target) in dict(module.named_parameters(remove_duplicate=False)):
            parameter = module.get_parameter(str(n.target))
            tensors[id(parameter)] = parameter
    return sum(p.numel() for p in tensors.values())
