"""From ties to classes: which neurons may stand in for each other, and in which blocks.

The interpretation leaves a set of atoms with three kinds of facts (see ``atoms``). Two atoms may be exchanged where
nothing tells them apart: same sites, same marks, and blocks and members that are alike in turn. That is colour
refinement, and on trees (heads, groups) and products (a scale shared by all heads) it finds the whole symmetry.

    atoms  --colours-->  kinds  --a block with one member of a kind is that member-->  classes, parents first
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from fxmerge.atoms import Ints, connected, distinct, entangled, independent, mix, pair_ranks, unique, unique_pairs
from fxmerge.colours import Facts
from fxmerge.errors import UnknownOpError
from fxmerge.interpret import Interpretation, interpret
from fxmerge.ir import AxisClass, AxisClasses, Traced
from fxmerge.places import find_sites, find_taps
from fxmerge.sides import facing, sides
from fxmerge.stacks import split_stacks
from fxmerge.trace import trace


def infer_classes(
    module: nn.Module | Traced, example_inputs: Any = None, *, strict: bool = False, stacks: bool = True
) -> AxisClasses:
    """Finds which neurons of a network may be permuted together without changing its function.

    Args:
        module: the network, or what ``trace`` made of it.
        example_inputs: a tensor, tuple or dict to run it on; taken from the first layers where these leave no doubt.
        strict: raise where an operation has no rule, instead of pinning what it touches.
        stacks: whether each row of a stack of weights (each expert) has neurons of its own; else those of all rows move
            alike, and may have other widths.

    Raises:
        TraceError: the module cannot be traced.
        UnknownOpError: under ``strict``, naming node and operation.
    """
    traced = module if isinstance(module, Traced) else trace(module, example_inputs)
    interpretation = interpret(traced)
    if strict and interpretation.unknown_ops:
        node, op = interpretation.unknown_ops[0]
        raise UnknownOpError(
            f"no rule for operation '{op}' at node '{node}'. Register one with @fxmerge.rule('{op}'), "
            "or leave out strict=True to pin what it touches."
        )
    classes = _close(interpretation)
    return split_stacks(classes) if stacks else classes


_DEEPEST = 4  # how often blocks of different natures may ask for new ones
_CHOICES = 16  # how often one of several blocks around the same neurons may be chosen
_PRODUCTS = "products of neurons with each other"


def _close(found: Interpretation) -> AxisClasses:
    atoms = found.atoms
    reasons: dict[int, str] = {}
    enlarged = chosen = 0
    facts = Facts(atoms, found.slots)
    while True:
        size = atoms.size  # relations may call for new ones
        root, colour, child, block = facts.colours()
        child, block = unique_pairs(child, block)
        if not _absorb(atoms, colour, child, block, root) and (
            enlarged > _DEEPEST or not _nest(found, colour, child, block)
        ):
            shared, first = _shared(colour, child, block)
            if not shared.size:
                break
            if first.size > 1 and chosen < _CHOICES:
                chosen += 1
                atoms.tag(first, np.full(len(first), atoms.mark()), _PRODUCTS)
            else:
                atoms.pin(shared, _PRODUCTS)
        facts.unite(root, colour)
        enlarged += atoms.size > size
        if atoms.size > size and enlarged > _DEEPEST:
            atoms.pin(np.concatenate([child, block]), "blocks in blocks without an end")
    for who, _, reason in atoms.tags:
        if reason is not None:
            for k in root[who].tolist():
                reasons.setdefault(k, reason)
    return _build(found, root, colour, child, block, reasons, facts.slots)


def _absorb(atoms: Any, colour: Ints, child: Ints, block: Ints, root: Ints) -> bool:
    """What can only move together is one neuron: blocks with the same members, a block and its one member of a kind."""
    if not child.size:
        return False
    counts = dict(zip(*np.unique(colour[unique(root)], return_counts=True), strict=True))
    moving = np.array([counts[c] > 1 for c in colour[block]])  # what is alone in its kind stays anyway
    child, block = child[moving], block[moving]
    if not child.size:
        return False
    above: dict[int, list[int]] = {}
    for c, b in zip(child.tolist(), block.tolist(), strict=True):
        above.setdefault(c, []).append(b)
    shade, held, where = pair_ranks(colour[child], block)
    members = np.zeros(len(held), np.int64)
    np.add.at(members, where, mix(child))
    _, first, again = np.unique(members, return_index=True, return_inverse=True)
    if _unite(atoms, colour, held, held[first[again]], shade):
        return True
    inner, outer, where = pair_ranks(colour[child], colour[block])
    same: list[Ints] = []

    def implied(c: int, b: int) -> bool:
        """Whether whatever else c lies in is where b lies, and b lies in no other of that kind."""
        around = above.get(b, [])
        shades = [colour[q] for q in around]
        return all(q in around and shades.count(colour[q]) == 1 for q in above[c] if q != b)

    for k, (c, b) in enumerate(zip(inner, outer, strict=True)):
        if counts[c] != counts[b] or c == b:
            continue
        at = where == k
        one_each = at.sum() == counts[c] == len(unique(child[at])) == len(unique(block[at]))
        if one_each and all(implied(x, y) for x, y in zip(child[at].tolist(), block[at].tolist(), strict=True)):
            same.append(np.flatnonzero(at))
    at = np.concatenate(same) if same else where[:0]
    return _unite(atoms, colour, child[at], block[at], where[at])


def _unite(atoms: Any, colour: Ints, x: Ints, y: Ints, reason: Ints) -> bool:
    """x[i] and y[i] are one neuron, for reasons that hold of all neurons of a kind alike; whether any were united.

    But not two of one kind: these may change places, and one neuron that is both could no longer say so. Where reasons
    do that together, only the first holds for now, and what the others say is left to be seen on what it united.
    """
    apart = x != y
    x, y, reason = x[apart], y[apart], reason[apart]
    whole = np.flatnonzero(_parts(colour, x, y, reason)[1])
    part, sound = _parts(colour, x[whole], y[whole], np.zeros_like(whole))
    first = np.full(part.max(initial=0) + 1, np.iinfo(np.int64).max)
    np.minimum.at(first, part, reason[whole])
    whole = whole[sound | (reason[whole] == first[part])]
    atoms.union(x[whole], y[whole])
    return bool(whole.size)


def _parts(colour: Ints, x: Ints, y: Ints, reason: Ints) -> tuple[Ints, np.ndarray]:
    """The connected part that every pair is in, by each reason alone, and whether all in it are of different kinds."""
    _, end, where = pair_ranks(np.r_[reason, reason], np.r_[x, y])
    one, other = np.split(where, 2)
    _, part = connected(one, other)
    _, _, like = pair_ranks(part, colour[end])
    torn = part[np.bincount(like)[like] > 1]
    return part[one], ~np.isin(part[one], torn)


def _shared(colour: Ints, child: Ints, block: Ints) -> tuple[Ints, Ints]:
    """Blocks of one kind of which some neuron is in several: a tree of classes cannot say how these move.

    And of those that are so connected one each: where it is told from the others, a tree may be able to.
    """
    kinds, where = np.unique(np.stack([child, colour[block]], 1), axis=0, return_inverse=True)
    several = np.bincount(where.ravel(), minlength=len(kinds))[where.ravel()] > 1
    shared = unique(block[several])
    if not shared.size:
        return shared, shared
    like = several & (colour[block] == colour[shared[0]])
    ids, part = connected(child[like], block[like])
    own = np.isin(ids, block[like])
    return shared, ids[own][np.unique(part[own], return_index=True)[1]]


def _nest(found: Interpretation, colour: Ints, child: Ints, block: Ints) -> bool:
    """Blocks of two natures around the same neurons are related in turn: groups in groups, products in groups."""
    if not child.size:
        return False
    atoms = found.atoms
    before = {(int(c), int(b)) for c, b in zip(child, block, strict=True)}
    changed = False
    inner, _, where = pair_ranks(colour[child], colour[block])
    above: dict[int, list[int]] = {}
    for k, c in enumerate(inner.tolist()):
        above.setdefault(c, []).append(k)
    for ks in above.values():
        columns = [block[where == k] for k in ks if distinct(child[where == k])]
        for length in {len(c) for c in columns}:
            like = [c for c in columns if len(c) == length and (c != c[0]).any()]
            for three in entangled(like):
                atoms.pin(np.concatenate([like[k] for k in three]), "entangled with others")
                changed = True
        for n, k in enumerate(ks):
            for other in ks[:n]:
                at, to = where == k, where == other
                if not (np.array_equal(child[at], child[to]) and distinct(child[at])):
                    continue  # not one block of each nature around every neuron
                if len(unique(block[at])) == 1 or len(unique(block[to])) == 1:
                    continue
                if _parted(child, block, block[at], block[to]):
                    continue
                seen, marked = len(atoms.edges), len(atoms.tags)
                if found.relate(block[at], block[to]) == "same":
                    return True
                for c, b in atoms.edges[seen:]:
                    new = set(zip(atoms.find(c).tolist(), atoms.find(b).tolist(), strict=True)) - before
                    changed |= bool(new)
                changed |= len(atoms.tags) > marked  # entangled, and pinned for it
    return changed


def _parted(child: Ints, block: Ints, x: Ints, y: Ints) -> bool:
    """Whether neurons that meet all with all, in parts, are in one block for every part already."""
    one, other = unique_pairs(x, y)
    if distinct(one) or distinct(other) or not independent(x, y):
        return False
    ids, part = connected(one, other)
    at = np.isin(child, ids)
    members = part[np.searchsorted(ids, child[at])]
    held, inside, where = pair_ranks(block[at], members)
    whole = np.bincount(where) == np.bincount(part)[inside]
    _, blocks, parts = np.unique(held, return_inverse=True, return_counts=True)
    return len(unique(inside[whole & (parts[blocks] == 1)])) == part.max() + 1


def _build(
    found: Interpretation,
    root: Ints,
    colour: Ints,
    child: Ints,
    block: Ints,
    reasons: dict[int, str],
    slots: Ints,
) -> AxisClasses:
    roots = unique(root)
    shades, kind, counts = np.unique(colour[roots], return_inverse=True, return_counts=True)
    kind_of = np.full(len(root), -1)
    kind_of[roots] = kind
    members = np.split(roots[np.argsort(kind, kind="stable")], np.cumsum(counts)[:-1])
    parents = _parents(members, kind_of, counts, child, block)
    pinned = _pinned(members, kind_of, counts, child, block, reasons, found)

    # Kinds of one pinned neuron each, with the same sites and the same reason, read better as one pinned class.
    groups: list[tuple[list[int], str | None]] = []
    together: dict[Any, list[int]] = {}
    signature = np.zeros(len(root), np.int64)
    origin = found.atoms.origin(np.arange(len(root)))
    np.add.at(signature, root, mix(origin + 1))
    placed = np.zeros(len(root), bool)  # the others are rows of a sorted batch
    placed[root[origin >= 0]] = placed[child] = placed[block] = True
    for k in range(len(shades)):
        if not placed[members[k]].any():
            continue
        reason = pinned.get(k)
        if reason is None:
            groups.append(([k], None))
            continue
        key = (reason, int(signature[members[k][0]]))
        if key in together:
            together[key].append(k)
        else:
            together[key] = [k]
            groups.append((together[key], reason))
    order = _parents_first(groups, members, parents)

    number = np.full(len(root), -1)  # root -> class
    place = np.full(len(root), -1)  # root -> its index in the class
    merged: list[Ints] = []
    for new, g in enumerate(order):
        who = np.sort(np.concatenate([members[k] for k in groups[g][0]]))
        number[who], place[who] = new, np.arange(len(who))
        merged.append(who)
    sites = find_sites(found, root, number, place, slots, len(order))
    side = sides(found.met, root)
    starts = dict(zip(found.sites, found.starts, strict=True))
    faces = [facing(s, starts, found.reads, side) for s in sites]
    taps = find_taps(found, root, number, place, [len(m) for m in merged], side)
    classes: list[AxisClass] = []
    names: dict[str, int] = {}
    for new, g in enumerate(order):
        kinds, reason = groups[g]
        who = merged[new]
        above, blocks = [], []
        if reason is None:
            for b in parents[kinds[0]]:
                above.append(int(number[members[b][0]]))
                lookup: Any = parents[kinds[0]][b]
                blocks.append(place[lookup[who]])
        first = next(iter(sites[new]), None)  # in order of appearance
        name = str(first) if first is not None else "blocks"
        if name in names:
            name += f"[{int(sites[new][first].min())}]" if first is not None else f" {new}"
        while name in names:
            name += "'"
        names[name] = new
        classes.append(
            AxisClass(
                name=name,
                size=len(who),
                sites=sites[new],
                parents=tuple(above),
                blocks=torch.from_numpy(np.stack(blocks, 1)) if blocks else torch.zeros(len(who), 0, dtype=torch.int64),
                pinned=reason,
                taps=tuple(taps[new]),
                turned=faces[new][0],
                reflexive=faces[new][1],
            )
        )
    return AxisClasses(
        classes=tuple(classes),
        reads=frozenset(found.reads),
        aliases=found.aliases,
        unknown=tuple(dict.fromkeys(found.unknown_ops)),
        traced=found.traced,
    )


def _parents(
    members: list[Ints], kind_of: Ints, counts: Ints, child: Ints, block: Ints
) -> list[dict[int, dict[int, int] | Any]]:
    """Per kind: parent kind -> (root of a member -> root of its block), without those that are implied or stay."""
    direct: list[dict[int, Any]] = [{} for _ in members]
    if child.size:
        moving = counts[kind_of[block]] > 1
        child, block = child[moving], block[moving]
        inner, outer, where = pair_ranks(kind_of[child], kind_of[block])
        for k, (c, b) in enumerate(zip(inner, outer, strict=True)):
            at = where == k
            if c != b and at.sum() == counts[c]:  # one block of that kind each
                lookup = np.full(len(kind_of), -1)
                lookup[child[at]] = block[at]
                direct[c][int(b)] = lookup

    ancestors = [_above(direct, k) for k in range(len(members))]
    return [{b: v for b, v in d.items() if not any(b in ancestors[o] for o in d if o != b)} for d in direct]


def _above(direct: Sequence[Mapping[int, Any]], k: int) -> set[int]:
    """All kinds of blocks around kind k, direct or not."""
    found, open_ = set[int](), [k]
    while open_:
        new = [b for b in direct[open_.pop()] if b not in found]
        found.update(new)
        open_ += new
    return found


def _pinned(
    members: list[Ints],
    kind_of: Ints,
    counts: Ints,
    child: Ints,
    block: Ints,
    reasons: dict[int, str],
    found: Interpretation,
) -> dict[int, str]:
    """Kinds of a single neuron that others were told apart from, with the reason."""
    alone = np.zeros(len(kind_of), bool)
    for k, who in enumerate(members):
        if counts[k] == 1:
            alone[who] = True
    near: dict[int, list[int]] = {}
    for c, b in zip(child.tolist(), block.tolist(), strict=True):
        if alone[c] and alone[b]:
            near.setdefault(c, []).append(b)
            near.setdefault(b, []).append(c)
    pinned: dict[int, str] = {}
    queue = [int(r) for r in np.flatnonzero(alone) if int(r) in reasons]
    known = {r: reasons[r] for r in queue}
    while queue:
        r = queue.pop()
        for o in near.get(r, []):
            if o not in known:
                known[o] = known[r]
                queue.append(o)
    for r, reason in known.items():
        pinned[int(kind_of[r])] = reason
    return pinned


def _parents_first(
    groups: list[tuple[list[int], str | None]], members: list[Ints], parents: list[dict[int, Any]]
) -> list[int]:
    group_of = {k: g for g, (kinds, _) in enumerate(groups) for k in kinds}
    above = {
        g: [group_of[b] for b in parents[kinds[0]]] if reason is None else []
        for g, (kinds, reason) in enumerate(groups)
    }
    done: dict[int, None] = {}
    for g in sorted(above, key=lambda g: min(int(members[k][0]) for k in groups[g][0])):
        _visit(g, above, done)
    return list(done)


def _visit(g: int, above: Mapping[int, Sequence[int]], done: dict[int, None]) -> None:
    if g not in done:
        for b in above[g]:
            _visit(b, above, done)
        done[g] = None
