"""A network in the graph of a deeper one: it keeps its function, and what it lacks becomes the identity.

    template   stem -> unit 1 -> unit 2 -> unit 3 -> head        (names, kernel sizes, norms)
    parent     stem -> unit a ----------> unit b -> head         a -> 1, b -> 3
    grown      stem -> unit 1 = a -> unit 2 = identity -> unit 3 = b -> head

What the template's unit makes is read with weight zero where units are concatenated, and is what it reads otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from fxmerge.alike import counterparts, tensors
from fxmerge.classes import infer_classes
from fxmerge.depth.identity import make_identity, undone
from fxmerge.depth.tensors import parameters_of, run_shapes
from fxmerge.errors import StructureError
from fxmerge.interfaces import Sample
from fxmerge.ir import AxisClasses, Site, Traced
from fxmerge.layout import resized
from fxmerge.rewrite import rewrite
from fxmerge.running import call, evaluating, fresh, to_device
from fxmerge.symmetry import full_state, relative_error
from fxmerge.units import Unit
from fxmerge.widths import shapes


@dataclass(frozen=True, eq=False)
class Grown:
    """A parent in the template's graph.

    Attributes:
        classes: of the parent under the template's names.
        inserted: units that are identities in it.
        idle: tensors of these that have no influence on its function.
        absent: classes all of whose neurons are idle.
        passing: classes whose neurons only pass on what they read -> whether the template's layer there looks at more
            than one position (a kernel).
        error: largest change of the output in float64, relative to the largest output.
    """

    classes: AxisClasses
    inserted: tuple[Unit, ...]
    idle: frozenset[str]
    absent: frozenset[int]
    passing: Mapping[int, bool]
    error: float


def grow(template: AxisClasses, parent: AxisClasses, missing: Sequence[Unit], nth: str, sample: Sample | None) -> Grown:
    """The parent in the template's graph.

    Args:
        template: the deeper network.
        parent: the network to be grown.
        missing: the template's units that the parent lacks.
        nth: what the parent is called in an error.
        sample: data for BatchNorms on a chain, which must leave as they are the values they meet.

    Raises:
        StructureError: apart from these units the networks differ, or one of them cannot be an identity.
    """
    traced = template.traced
    pairs = counterparts(traced, parent.traced, nth, True, _without(traced.graph_module.graph, missing))
    names = tensors(pairs, traced, parent.traced)
    sizes, origins, absent, passing = _widths(template, parent, missing, names, nth)
    for k, size in sizes.items():
        if size != template[k].size and (template[k].parents or template.children(k)):
            raise StructureError(
                f"the parents differ in width at '{template[k].name}': {template[k].size} against {size} neurons. "
                "Classes in blocks (heads, groups) need equal widths"
            )
    lifted = resized(template, sizes)
    state = _state(template, lifted, parent, names, origins)
    module = rewrite(template, state, lifted)
    grown = replace(traced, graph_module=module, source=module, shapes=run_shapes(module, traced), notes=())
    idle: set[str] = set()
    for unit in missing:
        idle |= make_identity(grown, unit, sample)
    error = _change(parent.traced, module)
    exact = not any(u.kind == "plain" and undone(module, u) for u in missing)
    if not error <= (1e-9 if exact else 1e-5):
        raise StructureError(
            f"the {nth} network cannot be grown to the depth of the deepest: with {_listed(missing)} as identities its "
            f"output changes by {error:.1e}. Use depth='shrink'"
        )
    return Grown(infer_classes(grown), tuple(missing), frozenset(idle), absent, passing, error)


def _listed(units: Sequence[Unit]) -> str:
    return ", ".join(f"'{u.name}'" for u in units[:4]) + (f" and {len(units) - 4} more" if len(units) > 4 else "")


def _without(graph: fx.Graph, units: Sequence[Unit]) -> fx.Graph:
    """The graph without some units: their readers read what they read."""
    copied = fx.Graph()
    known: dict[fx.Node, fx.Node] = {}
    copied.output(copied.graph_copy(graph, known))
    at = {n.name: known[n] for n in graph.nodes if n in known}
    for unit in reversed(units):  # what one reads may be another's output
        end = at[unit.output]
        if unit.source:
            end.replace_all_uses_with(at[unit.source])
        else:
            for user in list(end.users):
                user.args = _dropped(user.args, end)
    used = {known[n] for n in known if n.users}
    for n in reversed(copied.nodes):
        if n in used and not n.users:
            copied.erase_node(n)
    return copied


def _dropped(args: Any, gone: fx.Node) -> Any:
    if isinstance(args, (list, tuple)):
        return type(args)(_dropped(a, gone) for a in args if a is not gone)
    return args


def _widths(
    template: AxisClasses, parent: AxisClasses, missing: Sequence[Unit], names: Mapping[str, str], nth: str
) -> tuple[dict[int, int], dict[tuple[int, Site], Tensor], frozenset[int], dict[int, bool]]:
    """Of the template's classes: sizes in the parent; places in its tensors; which it has not; which copy others."""
    inside = {n for u in missing for n in u.nodes}
    dense = {n for u in missing if not u.source for n in u.nodes}
    made = [{t.node for t in c.taps if t.kind == "made"} for c in template]
    new = {k for k, c in enumerate(template) if c.free and made[k] and made[k] <= inside}
    apart = {k for k in new if made[k] & dense}
    mine, theirs = template.by_tensor(), parent.by_tensor()
    sizes: dict[int, int] = {}
    origins: dict[tuple[int, Site], Tensor] = {}
    for name, other in names.items():
        for site in dict.fromkeys(s for s, _, _ in mine.get(name, ())):
            ours = sorted((int(i.min()), k) for s, k, i in mine[name] if s == site and k not in apart)
            found = [
                (s, k, i) for s, k, i in theirs.get(other, ()) if (s.axis, s.groups > 1) == (site.axis, site.groups > 1)
            ]
            found.sort(key=lambda e: int(e[2].min()))
            if len(ours) != len(found):
                raise StructureError(
                    f"the parents differ in structure: axis {site.axis} of '{name}' has {len(ours)} classes of neurons "
                    f"in the deepest network and {len(found)} in the {nth}. Check that both are of the same family"
                )
            for (_, k), (_, own, index) in zip(ours, found, strict=True):
                if sizes.setdefault(k, parent[own].size) != parent[own].size:
                    raise StructureError(
                        f"'{template[k].name}' would have both {sizes[k]} and {parent[own].size} neurons in the {nth} "
                        "network; use depth='shrink'"
                    )
                origins[k, site] = index
    shown: dict[tuple[str, int], list[tuple[int, int]]] = {}  # (node, axis) -> classes, and how often each neuron shows
    for k, c in enumerate(template):
        for t in c.taps:
            shown.setdefault((t.node, t.axis), []).append((k, t.index.shape[1]))
    for unit in (u for u in missing if u.kind == "plain"):  # as wide as what it passes on
        for axis in range(len(template.traced.shapes[unit.output])):
            mine_here, read = (shown.get((n, axis), []) for n in (unit.output, unit.source))
            if len(mine_here) == 1 and read:
                sizes.setdefault(mine_here[0][0], sum(sizes.get(k, template[k].size) * m for k, m in read))
    passed = {u.output: _looks_around(template.traced, u) for u in missing if u.kind == "plain"}
    passing = {k: passed[t.node] for k in new for t in template[k].taps if t.node in passed}
    return sizes, origins, frozenset(k for k in new if k not in sizes), passing


def _looks_around(traced: Traced, unit: Unit) -> bool:
    state = full_state(traced.graph_module)
    return any(state[n].dim() > 2 and state[n][0, 0].numel() > 1 for n in parameters_of(traced, unit))


def _state(
    template: AxisClasses,
    lifted: AxisClasses,
    parent: AxisClasses,
    names: Mapping[str, str],
    origins: Mapping[tuple[int, Site], Tensor],
) -> dict[str, Tensor]:
    """The parent's values under the template's names and, where it has none, the template's."""
    held, own = full_state(template.traced.graph_module), full_state(parent.traced.graph_module)
    held = {**full_state(template.traced.source), **held}
    wanted = shapes(lifted, held)
    before, after = template.by_tensor(), lifted.by_tensor()
    out: dict[str, Tensor] = {}
    for name, value in held.items():
        value = value.detach()
        if name not in names:
            out[name] = _fitted(value, wanted[name])
            continue
        given = own[names[name]].detach()
        if tuple(given.shape) == wanted[name]:
            out[name] = given.clone()
            continue
        # neurons that the parent does not have lie between its own: read with weight zero
        new = _fitted(value, wanted[name]) if len(wanted[name]) < 2 else given.new_zeros(wanted[name])
        target: list[Tensor] = [torch.arange(n) for n in new.shape]
        source: list[Tensor] = [torch.arange(n) for n in given.shape]
        for axis in range(new.dim()):
            places = [
                (goal[2], origins[k, site])
                for (site, k, _), goal in zip(before.get(name, ()), after.get(name, ()), strict=True)
                if site.axis == axis and (k, site) in origins
            ]
            if places:
                target[axis] = torch.cat([g.reshape(-1) for g, _ in places])
                source[axis] = torch.cat([o.reshape(-1) for _, o in places])
        new[torch.meshgrid(*target, indexing="ij")] = given[torch.meshgrid(*source, indexing="ij")].to(new)
        out[name] = new
    return out


def fitted(value: Tensor, axis: int, n: int) -> Tensor:
    """The tensor with an axis of another length, its entries repeated or left out."""
    if value.shape[axis] == n:
        return value
    return value.index_select(axis, torch.arange(n, device=value.device) % value.shape[axis])


def _fitted(value: Tensor, shape: Sequence[int]) -> Tensor:
    for axis, n in enumerate(shape):
        value = fitted(value, axis, n)
    return value.clone()


def _change(parent: Traced, module: fx.GraphModule) -> float:
    """How far the grown network's output is from the parent's, both in float64."""
    args, kwargs = to_device((parent.args, dict(parent.kwargs)), None, torch.float64)
    outputs = []
    for graph in (parent.graph_module, module):
        with evaluating(graph):
            state = to_device({k: v.detach() for k, v in full_state(graph).items()}, None, torch.float64)
            outputs.append(call(graph, fresh(args), fresh(kwargs), state=state))
    return relative_error(*outputs)
