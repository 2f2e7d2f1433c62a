"""Units written once more into a network's graph: the same layers, under names of their own."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Set
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxmerge.classes import infer_classes
from fxmerge.depth.grow import fitted, grow
from fxmerge.depth.tensors import body, run_shapes, tensors_of
from fxmerge.errors import InputError
from fxmerge.ir import AxisClasses, Site
from fxmerge.layout import resized
from fxmerge.rewrite import resize, rewrite
from fxmerge.symmetry import full_state, load_state
from fxmerge.trace import trace
from fxmerge.units import Unit, find_stages, segmented


def deepen(module: nn.Module, units: Mapping[str, int], example_inputs: Any = None) -> fx.GraphModule:
    """A deeper network that computes the same: behind the named units, new ones like them that pass on what they read.

    Args:
        module: the network; left as it is.
        units: name of a unit, as ``fxmerge.find_stages`` lists them -> how many to insert behind it.
        example_inputs: see ``fxmerge.merge``.

    Raises:
        InputError: no unit has that name.
        StructureError: such a unit cannot be an identity.
    """
    classes = infer_classes(trace(module, example_inputs))
    known = {u.name for s in find_stages(classes) for u in s.units}
    if wrong := [n for n in units if n not in known]:
        raise InputError(f"no unit is called '{wrong[0]}'; there are {', '.join(sorted(known))}")
    if odd := [n for n in units.values() if not isinstance(n, int) or n < 0]:
        raise InputError(f"units={dict(units)}: {odd[0]!r} is no number of units to insert")
    deeper = classes
    for name, times in units.items():
        for _ in range(times):
            unit = next(u for s in find_stages(deeper) for u in s.units if u.name == name)
            deeper = repeated(deeper, unit)
    before = {n.name for n in classes.traced.graph_module.graph.nodes}
    module_grown = grow(deeper, classes, inserted(deeper, before), "given", None).classes.traced.graph_module
    modes = {n: m.training for n, m in module.named_modules()}
    for name, m in module_grown.named_modules():
        m.training = modes.get(name, module.training)
    return module_grown


def inserted(classes: AxisClasses, before: Set[str]) -> list[Unit]:
    """The units none of whose nodes were there before."""
    return [u for s in segmented(classes) for u in s.units if not before & set(u.nodes)]


def repeated(classes: AxisClasses, unit: Unit) -> AxisClasses:
    """The network with a copy of the unit right behind it."""
    traced = classes.traced
    module = rewrite(classes, full_state(traced.graph_module), classes)
    graph = module.graph
    nodes = {n.name: n for n in graph.nodes}
    end = nodes[unit.output]
    inside = body(graph, unit)
    own = tensors_of(traced, unit)
    holders = {n: f"{n.target}." if n.op == "call_module" else str(n.target) for n in inside}
    targets = {str(n.target) for n, start in holders.items() if any(k.startswith(start) for k in own)}
    name = _fresh(module, unit.name)
    renamed: dict[str, str] = {}
    new: dict[fx.Node, fx.Node] = {}
    readers = list(end.users)
    with graph.inserting_after(end):
        at = end
        for n in inside:
            with graph.inserting_after(at):
                at = graph.node_copy(n, lambda m: new.get(m, end if m.name == unit.source else m))
            new[n] = at
            if n.op in ("call_module", "get_attr") and str(n.target) in targets:
                moved = _moved(str(n.target), unit.name, name, len(targets) == 1)
                at.target = renamed.setdefault(str(n.target), moved)
    for old, target in renamed.items():
        _copy(module, old, target)
    if unit.source:
        for reader in readers:
            reader.replace_input_with(end, new[end])
        _square(module, classes, unit, renamed)
    else:
        first = new[inside[0]]
        first.args = (_joined(first.args[0], _last(first.args[0]), end), *first.args[1:])
        for reader in readers:
            reader.args = (_joined(reader.args[0], end, new[end]), *reader.args[1:])
        _widen(module, classes, unit, renamed)
    graph.lint()
    module.recompile()
    deeper = replace(traced, graph_module=module, source=module, notes=())
    return infer_classes(replace(deeper, shapes=run_shapes(module, deeper)))


def _last(parts: Any) -> fx.Node:
    return parts[-1]  # type: ignore[no-any-return]


def _joined(parts: Any, old: fx.Node, new: fx.Node) -> list[Any]:
    """The operands with ``new`` behind ``old``."""
    return [x for p in parts for x in ((p, new) if p is old else (p,))]


def _fresh(module: nn.Module, name: str) -> str:
    known = dict(module.named_modules())
    return next(n for k in range(1, len(known) + 2) if (n := f"{name}_inserted{k}") not in known)


def _moved(target: str, old: str, new: str, alone: bool) -> str:
    if target.startswith(f"{old}.") or (target == old and alone):
        return new + target[len(old) :]
    return f"{new}.{target.replace('.', '_')}"


def _copy(module: nn.Module, old: str, new: str) -> None:
    """The layer or parameter of one name under another as well, with values of its own."""
    *path, leaf = new.split(".")
    holder, source = module, module
    for part in path:
        if part not in holder._modules:
            holder.add_module(part, nn.Module())
        holder = holder._modules[part]  # type: ignore[assignment]
    *path, name = old.split(".")
    for part in path:
        source = source._modules[part]  # type: ignore[assignment]
    for kind in ("_modules", "_parameters", "_buffers"):
        if name in getattr(source, kind):
            getattr(holder, kind)[leaf] = copy.deepcopy(getattr(source, kind)[name])


def _square(module: fx.GraphModule, classes: AxisClasses, unit: Unit, renamed: Mapping[str, str]) -> None:
    """Gives a unit that changes the width a copy that does not: it reads as many neurons as it writes."""
    state, wider = full_state(module), dict[str, Tensor]()
    ends = [{k for k, c in enumerate(classes) if any(t.node == n for t in c.taps)} for n in (unit.source, unit.output)]
    made = sum(classes[k].size for k in ends[1])
    for name, entries in classes.by_tensor().items():
        key = _renamed(name, renamed)
        for site in {s for s, k, _ in entries if key in state and k in ends[0] - ends[1]}:
            wider[str(key)] = fitted(state[name].detach(), site.axis, made // site.groups)
    resize(module, wider, set())
    load_state(module, wider)


def _renamed(name: str, renamed: Mapping[str, str]) -> str | None:
    found = (new + name[len(old) :] for old, new in renamed.items() if name == old or name.startswith(f"{old}."))
    return next(found, None)


def _widen(module: fx.GraphModule, classes: AxisClasses, unit: Unit, renamed: Mapping[str, str]) -> None:
    """Room for the new unit's outputs wherever the old one's are read, and for the old one's in the new unit."""
    inside = {k for k, c in enumerate(classes) if {t.node for t in c.taps if t.kind == "made"} <= set(unit.nodes)}
    made = next(k for k in inside if any(t.node == unit.output for t in classes[k].taps))
    size = classes[made].size
    doubled = resized(classes, {made: 2 * size}).by_tensor()
    state = full_state(module)
    own = set(tensors_of(classes.traced, unit))
    wider: dict[str, Tensor] = {}
    for name, entries in classes.by_tensor().items():
        value = state[name].detach()
        if name in own:
            key = _renamed(name, renamed)
            axes = {s.axis for s, k, _ in entries if k not in inside}
            if key is not None and len(axes) == 1:
                axis = axes.pop()
                wider[key] = torch.cat([value, value.narrow(axis, value.shape[axis] - size, size)], axis)
        elif any(k == made for _, k, _ in entries):
            for site in {s for s, k, _ in entries if k == made}:
                value = _spread(
                    value,
                    site,
                    [(i, g) for (s, _, i), (_, _, g) in zip(entries, doubled[name], strict=True) if s == site],
                )
            wider[name] = value
    resize(module, wider, set())
    load_state(module, wider)


def _spread(value: Tensor, site: Site, places: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Values where their neurons went; new neurons get those of the last."""
    total = sum(g.numel() for _, g in places)
    source = torch.zeros(total, dtype=torch.int64)
    for index, goal in places:
        source[goal] = index[torch.arange(len(goal)) % len(index)]
    return value.index_select(site.axis, source.to(value.device))
