"""Matching class by class, for any method that couples one set of neurons with another.

A class in blocks (inside heads, groups) falls into cells: the neurons of one block, or of one pair of blocks. Which
block stands in for which is a permutation, by the value of what the method would do inside; there, every pair of cells
is a problem like that of a class without blocks, so no method ever mixes two heads. That is not only taste: what heads
give is no linear function of their queries and keys, so a mean of two heads' queries belongs to neither.

Where two sides of the same neurons are summed over (queries against keys), the other side goes through the coupling's
``dual``, which leaves that sum alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from fxmerge.affinity import Affinity, from_moments, from_weights
from fxmerge.coupling import Maps, Permuted, among, side_by_side, turned
from fxmerge.interfaces import Problem
from fxmerge.ir import Alignment, AxisClass, AxisClasses, Coupling
from fxmerge.linalg import assignment, row_by_row
from fxmerge.matching import families, match_family
from fxmerge.ranks import spread

T = TypeVar("T")

Solve = Callable[[Affinity, Sequence[float], int], Coupling]
"""The neurons of one cell over all parents, the parents' shares, and how many fused neurons there shall be."""

Worth = Callable[[Affinity, Sequence[Tensor], Sequence[Tensor]], Tensor]
"""What a method makes of giving cell j of a second parent to cell i of the first: [cells, cells], at most the number of
neurons in a cell. Given are the neurons of two parents, and which of them are in every cell."""


def class_by_class(
    problem: Problem,
    solve: Solve,
    method: str,
    *,
    by: str = "activations",
    sweeps: int = 1,
    widths: Mapping[int, int] | None = None,
    worth: Worth | None = None,
    each: Callable[[Affinity, Coupling], T] | None = None,
) -> tuple[Alignment, dict[int, T]]:
    """Couples every class, in the order of the network, each on what is already matched.

    Args:
        problem: the parents.
        solve: the method.
        method: what the alignment is called.
        by: compare "activations", "weights" or "both". Classes that no activation shows (inside an opaque module, say)
            are always compared by weights.
        widths: class -> number of fused neurons, where it is not that of the first parent's.
        sweeps: rounds over the classes; after the first one, weights are compared given all other classes.
        worth: by what blocks are matched with blocks; by default the best assignment of their members.
        each: what to return of every class that all parents have neurons of: of what it was made from, which is not
            kept (with weights, these matrices are larger than the networks), and of its coupling.

    Returns:
        The alignment, and what ``each`` gave, by class.
    """
    first = problem.classes[0]
    touched = [p.by_tensor() for p in problem.classes]
    shown = problem.statistics.moments if problem.statistics is not None and by != "weights" else {}
    groups = families(first)
    present = {k: problem.present(family) for family in groups for k in family}
    lonely = {k for k, who in present.items() if len(who) < len(problem.classes)}
    heard = {k: _faced(first[k], from_moments(m)) for k, m in shown.items()}
    heard = {k: a.of(present[k]) if k in lonely else a for k, a in heard.items()}
    quality: dict[int, float] = {}
    given: dict[int, T] = {}
    weighed: set[int] = set()
    settled = {k: _kept(problem, k) for k, c in enumerate(first) if not c.free}
    hidden = {k for family in groups for k in family if first[k].sites and (k not in shown or by == "both")}
    rounds = sweeps if hidden else 1
    widths = {**problem.widths, **(widths or {})}
    # what activations alone decide can be solved at once, by whichever process
    open_ = [f for f in groups if not hidden & set(f) and any(k in heard for k in f)]

    @torch.no_grad()  # threads do not inherit it
    def alone(family: tuple[int, ...]) -> dict[int, Coupling]:
        return _of_present(problem, family, heard, solve, widths, worth)

    solved = spread(alone, open_, partial(_cost, first), problem.threads, problem.device)
    ready = dict(zip(open_, solved, strict=True))
    with tqdm(total=rounds * len(groups), desc=method, disable=not problem.progress, leave=False) as bar:
        for number in range(rounds):
            waiting = list(groups)
            while waiting:
                stuck = []
                for family in waiting:
                    seen = {k: heard[k] for k in family if k in heard}
                    for k in hidden & set(family):
                        silent = problem.silent(present[k])
                        found = from_weights(problem.classes, touched, problem.states, k, settled, silent, present[k])
                        if found is not None:
                            seen[k] = heard[k].joined(found) if k in heard else _faced(first[k], found)
                            weighed.add(k)
                    if len(present[family[0]]) > 1 and not seen:
                        stuck.append(family)
                        continue
                    settled |= ready.get(family) or _of_present(problem, family, seen, solve, widths, worth)
                    bar.update()
                    for k in seen if number == rounds - 1 else ():
                        if k not in lonely:
                            quality[k] = _quality(seen[k], settled[k])
                            if each is not None:
                                given[k] = each(seen[k], settled[k])
                if len(stuck) == len(waiting):
                    break
                waiting = stuck
    for family in groups:  # nothing says anything of these
        if not settled.keys() & set(family):
            settled |= _of_present(problem, family, {}, solve, {}, worth)
    settled |= {k: _kept(problem, k) for k in range(len(first)) if k not in settled}
    names = ", ".join(first[k].name for k in sorted(weighed - set(heard)))
    notes = (f"matched on weights, since no activation shows them: {names}",) if names and shown else ()
    couplings = tuple(turned(settled[k], problem.shares[k]) if c.turned else settled[k] for k, c in enumerate(first))
    return Alignment(couplings, method, quality, notes), given


def _cost(classes: AxisClasses, family: Sequence[int]) -> float:
    """Of solving a family, in proportion."""
    return float(sum(classes[k].size ** 3 for k in family))


def _faced(c: AxisClass, affinity: Affinity) -> Affinity:
    return replace(affinity, rigid=c.reflexive or (bool(c.turned) and affinity.sides is None))


def _of_present(
    problem: Problem,
    family: Sequence[int],
    seen: Mapping[int, Affinity],
    solve: Solve,
    widths: Mapping[int, int],
    worth: Worth | None,
) -> dict[int, Coupling]:
    """Couples a family among those parents that have neurons of it."""
    present = problem.present(family)
    count = len(problem.classes)
    if len(present) == count:
        return _family(problem, family, seen, solve, widths, worth) if seen else {k: _kept(problem, k) for k in family}
    shares = []
    for given in problem.shares:
        total = sum(given[p] for p in present)
        shares.append(tuple(given[p] / total if total else 1 / len(present) for p in present))
    part = replace(problem, classes=tuple(problem.classes[p] for p in present), shares=tuple(shares))
    if len(present) == 1 or not seen:
        found = {k: _kept(part, k) for k in family}
    else:
        found = _family(part, family, seen, solve, {}, worth)
    return {k: among(c, present, count, [p[k].size for p in problem.classes]) for k, c in found.items()}


def _kept(problem: Problem, k: int) -> Coupling:
    """Neurons that stay: each in its place or, where the parents have their own, side by side."""
    sizes = [p[k].size for p in problem.classes]
    if k in problem.apart or len(set(sizes)) > 1:
        return side_by_side(sizes)
    return Permuted([torch.arange(sizes[0])] * len(sizes), problem.shares[k])


def permutations(affinity: Affinity) -> list[Tensor]:
    """Per parent int64 [n]: the neurons that stand in for the first parent's, by summed score.

    More than two parents: each is aligned to the first, then in turn to the mean of the others until nothing changes.
    """
    count = len(affinity.widths)
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b and (count > 2 or a == 0)]
    alike = {pair: affinity.between(affinity.score, *pair) for pair in pairs}
    found = [torch.arange(affinity.widths[0])]
    found += [assignment(alike[0, b]) for b in range(1, count)]
    for _ in range(20 if count > 2 else 0):
        before = list(found)
        for b in range(1, count):
            others = [alike[a, b].index_select(0, found[a].to(alike[a, b].device)) for a in range(count) if a != b]
            found[b] = assignment(torch.stack(others).sum(0))
        if all(torch.equal(p, q) for p, q in zip(before, found, strict=True)):
            break
    return found


def _family(
    problem: Problem,
    family: Sequence[int],
    seen: Mapping[int, Affinity],
    solve: Solve,
    widths: Mapping[int, int],
    worth: Worth | None,
) -> dict[int, Coupling]:
    first, shares = problem.classes[0], problem.shares
    if len(family) == 1:
        (k,) = family
        return {k: solve(seen[k], shares[k], widths.get(k, first[k].size))}
    placed = [{k: torch.arange(first[k].size) for k in family}]
    for b in range(1, len(problem.classes)):
        scores = {k: seen[k].kept_between(seen[k].score, 0, b) for k in family if k in seen}
        values = _values(first, [k for k in family if k in seen], seen, b, worth) if worth else {}
        placed.append(match_family(first, family, scores, values=values))
    out: dict[int, Coupling] = {}
    for k in family:
        if k not in seen or first.children(k):
            out[k] = Permuted([p[k] for p in placed], shares[k])
        else:
            out[k] = _celled(first, k, placed, seen[k], shares[k], solve)
    return out


def _values(
    classes: AxisClasses, family: Sequence[int], seen: Mapping[int, Affinity], b: int, worth: Worth
) -> dict[int, Tensor]:
    """Per class that is the inside of blocks [blocks, blocks]: what they are worth to each other."""
    found = {}
    for k in family:
        c = classes[k]
        if len(c.parents) != 1 or classes.children(k):
            continue
        cells = [(c.blocks[:, 0] == i).nonzero()[:, 0] for i in range(classes[c.parents[0]].size)]
        if len(cells[0]) > 1:
            found[k] = worth(seen[k].of((0, b)), cells, cells).double().cpu()
    return found


def _celled(
    classes: AxisClasses,
    k: int,
    placed: Sequence[Mapping[int, Tensor]],
    affinity: Affinity,
    shares: Sequence[float],
    solve: Solve,
) -> Coupling:
    """The coupling of a class in blocks, cell by cell; cells keep their number of neurons."""
    c = classes[k]
    _, cell = torch.unique(c.blocks, dim=0, return_inverse=True)
    parts: list[tuple[Tensor, list[Tensor], Coupling]] = []
    for number in range(int(cell.max()) + 1):
        rows = (cell == number).nonzero()[:, 0]
        members = [p[k][rows].sort().values for p in placed]
        if len(rows) == 1:  # nothing to choose: not a sign, nor a scale
            parts.append((rows, members, Permuted([torch.zeros(1, dtype=torch.int64)] * len(placed), shares)))
        else:
            parts.append((rows, members, solve(affinity.at(members), shares, len(rows))))
    if all(isinstance(part, Permuted) for _, _, part in parts):
        found = [torch.empty_like(p[k]) for p in placed]
        for rows, members, part in parts:
            for whole, m, p in zip(found, members, part.permutations, strict=True):  # type: ignore[attr-defined]
                whole[rows] = m[p]
        return Permuted(found, shares)
    merge = torch.zeros(c.size, sum(affinity.widths), dtype=torch.float64)
    unmerge = merge.T.clone()
    for rows, members, part in parts:
        columns = torch.cat([m + s for m, s in zip(members, affinity.starts, strict=True)])
        merge[rows[:, None], columns[None, :]] = part.merge.cpu()
        unmerge[columns[:, None], rows[None, :]] = part.unmerge.cpu()
    return Coupling(merge, unmerge, affinity.widths)


def _quality(affinity: Affinity, coupling: Coupling) -> float:
    """Mean correlation between a fused neuron's part in the first parent and its parts in the others."""
    maps = Maps([coupling])
    parts = [maps(0, p, True) for p in range(len(coupling.widths))]

    def inner(p: int, q: int) -> Tensor:
        return row_by_row(parts[p], affinity.kept_between(affinity.covariance, p, q), parts[q])

    total, count = 0.0, 0
    for b in range(1, len(parts)):
        cross, own = inner(0, b), (inner(0, 0), inner(b, b))
        both = (own[0] > 0) & (own[1] > 0)
        if bool(both.any()):
            total += float((cross[both] / (own[0][both] * own[1][both]).sqrt()).mean())
            count += 1
    return total / max(count, 1)
