"""Neurons that every row of a stack of weights has for itself: each expert's own hidden neurons.

A parameter [experts, hidden, in] has one axis of hidden neurons for all experts, and labels say what may be done to
those of all experts alike. Where nothing but stacks holds these neurons, every expert's may be free by themselves; not
where experts are summed up before the next layer. That is asked of the network: with parameters drawn around its own,
neurons move in every row otherwise, and the output must not.

    hidden  4 neurons, of 8 experts alike   ->   experts  8 free blocks of 4
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxmerge.ir import AxisClass, AxisClasses, Site
from fxmerge.running import full_state
from fxmerge.stored import Made, read_when_asked
from fxmerge.symmetry import apply, doubled, random_element, relative_error

_TOLERANCE = 1e-9
_NOISE = 0.1  # relative to the spread of a parameter


@dataclass(frozen=True)
class _Stack:
    """What a class may be split along: the rows of another class, or rows that stay in place.

    Attributes:
        rows: index of their class; -1 for rows that stay.
        count: how many.
        along: per site of the class, in order, the axis of the same tensor that they are on.
    """

    rows: int
    count: int
    along: tuple[int, ...]


Touched = Mapping[str, Sequence[tuple[Site, int, Tensor]]]


def split_stacks(classes: AxisClasses) -> AxisClasses:
    """The classes, with those taken apart whose neurons may move in every row of their stacks by themselves."""
    touched = classes.by_tensor()
    deep = {name for name, entries in touched.items() if len({s.axis for s, _, _ in entries}) > 2}
    left = {
        k: found
        for k, c in enumerate(classes)
        if any(site.parameter in deep for site in c.sites) and (found := _stacks(classes, touched, k))
    }
    chosen: dict[int, _Stack] = {}
    while left:  # what is not free along its first rows may be along the next ones
        options = sorted(((k, found.pop(0)) for k, found in left.items()), key=lambda o: (o[1].rows < 0, o[1].along))
        for k, stack in options:
            if stack.rows not in chosen and all(s.rows != k for s in chosen.values()):  # rows are not split themselves
                chosen[k] = stack
        chosen = _largest(classes, touched, chosen)
        left = {k: found for k, found in left.items() if found and k not in chosen}
    return _split(classes, touched, chosen)[0] if chosen else classes


def _largest(classes: AxisClasses, touched: Touched, chosen: Mapping[int, _Stack]) -> dict[int, _Stack]:
    """Those that are free together, as many as trying in halves finds."""
    chosen = _whole(classes, touched, chosen)
    if not chosen or _free(classes, touched, chosen):
        return chosen
    if len(chosen) == 1:
        return {}
    halves = list(chosen.items())[: len(chosen) // 2], list(chosen.items())[len(chosen) // 2 :]
    one, other = (_largest(classes, touched, dict(half)) for half in halves)
    both = one | other
    return both if not one or not other or _free(classes, touched, both) else one


def _stacks(classes: AxisClasses, touched: Touched, k: int) -> list[_Stack]:
    """Along what a class may be split, for all that its sites say."""
    c = classes[k]
    if not c.free or c.size < 2 or c.parents or classes.children(k) or any(s.groups > 1 for s in c.sites):
        return []
    per_site = []
    for site in c.sites:
        found: dict[tuple[int, int], int] = {}
        others = [e for e in touched[site.parameter] if e[0].axis != site.axis]
        for axis in sorted({s.axis for s, _, _ in others}):
            there = [(other, index) for s, other, index in others if s.axis == axis and s.groups == 1]
            count = sum(index.numel() for _, index in there)
            if len(there) == 1 and classes[there[0][0]].free:
                other, index = there[0]
                if other != k and torch.equal(index, torch.arange(count)[:, None]):
                    found.setdefault((other, count), axis)
            elif there and not any(classes[other].free for other, _ in there):
                found.setdefault((-1, count), axis)
        per_site.append(found)
    common = [key for key in per_site[0] if all(key in found for found in per_site)]
    return [_Stack(*key, tuple(found[key] for found in per_site)) for key in common]


def _whole(classes: AxisClasses, touched: Touched, chosen: Mapping[int, _Stack]) -> dict[int, _Stack]:
    """Those of which all that shares an axis with them is split along the same rows."""
    chosen = dict(chosen)
    while True:
        along = {(k, s): a for k, stack in chosen.items() for s, a in zip(classes[k].sites, stack.along, strict=True)}
        odd = {
            k
            for k, site in along
            if any(along.get((other, s)) != along[k, site] for s, other, _ in touched[site.parameter] if s == site)
        }
        if not odd:
            return chosen
        chosen = {k: stack for k, stack in chosen.items() if k not in odd}


def _free(classes: AxisClasses, touched: Touched, chosen: Mapping[int, _Stack]) -> bool:
    """Whether these neurons may move in every row otherwise; rows that stay must all be in use to say so."""
    split, new = _split(classes, touched, chosen)
    moves = random_element(split, 0, only=new)
    own = read_when_asked(full_state(classes.traced.source) | full_state(classes.traced.graph_module))
    for state in (_drawn(classes, own), own):  # where drawn values decide otherwise, the graph may not run
        try:
            before, after = (doubled(classes.traced, s) for s in (state, apply(split, moves, state)))
            told = any(isinstance(t, Tensor) and t.is_floating_point() for t in pytree.tree_leaves(before))
            same = told and relative_error(before, after) <= _TOLERANCE
            return same and _in_use(classes, chosen, state)
        except Exception:
            continue
    return False


def _drawn(classes: AxisClasses, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Parameters near those of the network, none of them zero or equal by chance; the same whenever asked for."""
    canonical = {alias: name for name, aliases in classes.aliases.items() for alias in aliases}
    trained = {n for n, _ in classes.traced.source.named_parameters(remove_duplicate=False)}

    def draw(name: str) -> Tensor:
        value = state[name]
        if name not in trained or not value.is_floating_point():
            return value
        seed = zlib.crc32(canonical.get(name, name).encode())
        noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed))
        spread = float(value.double().std()) if value.numel() > 1 else 0.0
        return value.double() + noise.to(value.device) * _NOISE * (spread or _NOISE)

    return Made(state, draw)


def _in_use(classes: AxisClasses, chosen: Mapping[int, _Stack], state: Mapping[str, Tensor]) -> bool:
    """Whether the output depends on every row that stays; of rows that may be exchanged, one says what holds of all."""
    axes = {
        site.parameter: axis
        for k, stack in chosen.items()
        for site, axis in zip(classes[k].sites, stack.along, strict=True)
        if stack.rows < 0
    }
    if not axes:
        return True
    held = {name: state[name].double().requires_grad_() for name in axes}
    outputs = doubled(classes.traced, Made(state, lambda name: held.get(name, state[name])), grad=True)
    found = [t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor) and t.requires_grad]
    draw = torch.Generator().manual_seed(0)
    weights = [torch.randn(t.shape, generator=draw, dtype=t.dtype).to(t.device) for t in found]
    slopes = torch.autograd.grad(found, list(held.values()), weights, allow_unused=True)
    return all(
        slope is not None and bool((slope.movedim(axis, 0).flatten(1) != 0).any(1).all())
        for slope, axis in zip(slopes, axes.values(), strict=True)
    )


def _split(classes: AxisClasses, touched: Touched, chosen: Mapping[int, _Stack]) -> tuple[AxisClasses, list[int]]:
    """The classes with the chosen ones in rows, parents first, and the numbers of these."""
    parts: list[tuple[int, int, AxisClass]] = []  # sorted by what they follow
    renamed: dict[Site, Site] = {}
    for k, c in enumerate(classes):
        if k not in chosen:
            parts.append((k, -1, c))
            continue
        stack = chosen[k]
        sites: dict[Site, Tensor] = {}
        for site, along in zip(c.sites, stack.along, strict=True):
            renamed[site] = replace(site, groups=stack.count, along=along)
            inside = sum(index.numel() for s, _, index in touched[site.parameter] if s == site)
            sites[renamed[site]] = torch.arange(stack.count)[:, None, None] * inside + c.sites[site]
        turned = {renamed[s]: columns for s, columns in c.turned.items()}
        made = replace(c, sites=sites, turned=turned, taps=())
        if stack.rows >= 0:
            rows = torch.arange(stack.count).repeat_interleave(c.size)[:, None]
            flat = {s: index.flatten(0, 1) for s, index in sites.items()}
            whole = replace(made, size=stack.count * c.size, sites=flat, parents=(stack.rows,), blocks=rows)
            parts.append((max(k, stack.rows), k, whole))
            continue
        for row in range(stack.count):
            own = {s: index[row] for s, index in sites.items()}
            parts.append((k, row, replace(made, name=f"{c.name}[{row}]", sites=own)))
    parts.sort(key=lambda part: part[:2])
    number = {at: new for new, (at, order, _) in enumerate(parts) if order < 0}
    found = [replace(c, parents=tuple(number[p] for p in c.parents)) for _, _, c in parts]
    reads = frozenset(renamed.get(s, s) for s in classes.reads)
    return replace(classes, classes=tuple(found), reads=reads), [
        new for new, (_, order, _) in enumerate(parts) if order >= 0
    ]
