"""Whether parents can be merged neuron by neuron, said clearly where they cannot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fxmerge.alike import counterparts
from fxmerge.errors import StructureError, nth
from fxmerge.ir import OUTPUT, AxisClass, AxisClasses, Traced
from fxmerge.running import full_state


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
            where = "first" if odd in ours else f"{nth(number)}"
            raise StructureError(
                f"the parents differ in structure: '{odd}' is only in the {where} network. Check that both are "
                "of the same architecture; fxmerge.merge takes networks of different depth"
            )
        by_name = {c.name: c for c in other}
        wider = False
        for k, c in enumerate(first):
            same = by_name.get(c.name)
            if same is None or _axes(same) != _axes(c) or same.size == c.size:
                continue
            wider = True
            inside = first.children(k)
            blocks = bool(c.parents or inside)
            if k in apart or (any_width and c.free and same.free and not blocks):
                continue
            if c.pinned == OUTPUT:
                way = "Networks with different heads cannot be averaged: use heads='separate' or heads='concat'"
            elif not c.free:
                way = "What the inputs fix must be alike"
            elif blocks:
                way = (
                    "Attention heads and groups stand for each other as wholes, one for one, with every matcher: all "
                    "parents need the same number of them, of the same size. fxmerge.Ensemble takes any networks"
                )
            else:
                way = "Permutations need equal widths: use matcher=OTFusion()"
            name = f"'{c.name}'" if c.sites or not inside else f"the blocks of '{first[inside[0]].name}'"
            raise StructureError(
                f"the parents differ in {'width' if c.free else 'the number of outputs or inputs'} at {name}: "
                f"{c.size} against {same.size} neurons. {way}"
            )
        counterparts(first.traced, other.traced, nth(number), wider)
        if len(first) != len(other) or any(_axes(a) != _axes(b) for a, b in zip(first, other, strict=True)):
            raise StructureError(
                f"the parents differ in structure: {len(first)} classes of neurons in the first network, {len(other)} "
                f"in the {nth(number)}, or at other places. Check that both are of the same architecture"
            )


def uneven(classes: Sequence[AxisClasses]) -> bool:
    """Whether neurons that every row of a stack has for itself are not as many in all parents."""
    sizes: dict[str, set[int]] = {}
    for parent in classes:
        for c in parent:
            if any(site.groups > 1 for site in c.sites):
                sizes.setdefault(c.name, set()).add(c.size)
    return any(len(found) > 1 for found in sizes.values())


def carried(classes: AxisClasses, traced: Traced) -> AxisClasses | None:
    """The classes of another network of the same graph, which are those of the first; None where it is to be asked.

    Parameters may have any values. Constants must be equal: where entries of them are, neurons may be exchanged.
    """
    try:
        pairs = counterparts(classes.traced, traced, nth(2), False)
    except StructureError:
        return None
    if any((a.name, a.target) != (b.name, b.target) for a, b in pairs.items()):
        return None
    ours, theirs = (full_state(t.graph_module) | full_state(t.source) for t in (classes.traced, traced))
    if _layout(ours) != _layout(theirs):
        return None
    known = classes.by_tensor()
    read = {str(a.target) for a in pairs if a.op == "get_attr"} - known.keys()
    constants = [n for n in read if n in ours and not isinstance(ours[n], nn.Parameter)]
    return replace(classes, traced=traced) if all(torch.equal(ours[n], theirs[n]) for n in constants) else None


def _layout(state: Mapping[str, Tensor]) -> list[tuple[str, tuple[int, ...], str]]:
    """Names and shapes, and under which name a shared tensor came first."""
    names: dict[int, str] = {}
    return sorted((n, tuple(t.shape), names.setdefault(id(t), n)) for n, t in state.items())


def alike_in_names(classes: Sequence[AxisClasses]) -> bool:
    """Whether all parents have neurons in tensors of the same names."""
    names = [set(c.by_tensor()) for c in classes]
    return all(n == names[0] for n in names)


def _axes(c: AxisClass) -> list[tuple[str, int]]:
    return sorted((s.parameter, s.axis) for s in c.sites)
