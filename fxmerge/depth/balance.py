"""Parents of different depth brought into one graph."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from fxmerge.depth.grow import Grown, grow
from fxmerge.depth.insert import inserted, repeated
from fxmerge.depth.shrink import shrink
from fxmerge.errors import InputError, NoIdentityError, StructureError, nth
from fxmerge.interfaces import AbstractDepthAligner, Sample
from fxmerge.ir import AxisClasses
from fxmerge.units import Stage, Unit, corresponding, grouped, pattern, segmented


@dataclass(frozen=True, eq=False)
class Link:
    """How one stage of two networks was aligned.

    Attributes:
        parent: which network was aligned to the result's graph.
        short, long: names of the units of the network that has fewer of them, and of the other.
        costs: [n, m].
        chosen: per unit of the shorter one its place in the longer.
        shrunk: whether the parent is the longer one.
    """

    parent: int
    short: tuple[str, ...]
    long: tuple[str, ...]
    costs: Tensor
    chosen: tuple[int, ...]
    shrunk: bool

    def __str__(self) -> str:
        pairs = ", ".join(
            f"{u} = {self.long[j]} ({c[j]:.2f})"
            for u, j, c in zip(self.short, self.chosen, self.costs.tolist(), strict=True)
        )
        left = [u for j, u in enumerate(self.long) if j not in self.chosen]
        verb = "joined with a neighbour" if self.shrunk else "inserted"
        return f"layers of network {self.parent + 1}: {pairs}; {verb}: {', '.join(left)}"


def balanced(
    parents: Sequence[AxisClasses],
    template: AxisClasses | None,
    how: str,
    aligner: AbstractDepthAligner,
    sample: Sample | None,
) -> tuple[list[Grown], list[Link], int]:
    """Every parent in the same graph.

    Args:
        parents: two or more networks.
        template: whose graph that is; None: that of the parent with the most ("grow") or fewest ("shrink") units,
            where others have more of a stage (fewer) with units inserted.
        how: "grow" or "shrink".
        aligner: says which units correspond.
        sample: data, if there is any.

    Returns:
        The parents, how they were aligned, and the index of the parent that gave the graph (-1: none).

    Raises:
        StructureError: stages do not correspond, or no alignment of their units does.
    """
    chosen, given = -1, template is not None
    if template is None:
        sizes = [sum(len(s.units) for s in segmented(p)) for p in parents]
        chosen = sizes.index(max(sizes) if how == "grow" else min(sizes))
        template = parents[chosen]
    elif template in parents:
        chosen = list(parents).index(template)
    places = _side_by_side(template, parents)
    if how == "grow" and not given:
        template = _enlarged(template, places)
        places = _side_by_side(template, parents)
    grown: list[Grown] = []
    links: list[Link] = []
    for k, parent in enumerate(parents):
        if parent is template:
            grown.append(Grown(parent, (), frozenset(), frozenset(), {}, 0.0))
            continue
        pairs = [(place[0], place[k + 1]) for place in places]
        compared = _compared(template, parent, pairs, aligner, sample)
        needed: set[str] = set()  # units that cannot be identities, and so have to correspond to some
        while True:
            missing, spare, found = _aligned(template, pairs, compared, aligner, k, needed)
            try:
                smaller = shrink(parent, spare, sample, aligner.join) if spare else parent
                grown.append(grow(template, smaller, missing, nth(k + 1), sample))
                break
            except NoIdentityError as error:
                if error.output in needed:
                    raise
                needed.add(error.output)
        links += found
    return grown, links, chosen


def _side_by_side(template: AxisClasses, parents: Sequence[AxisClasses]) -> list[tuple[Stage, ...]]:
    """Per stage that of the template and those of all parents."""
    for whole in (True, False):
        goal = segmented(template, whole)
        stages = [next((s for s in _variants(p) if corresponding([goal, s])), None) for p in parents]
        known = [s for s in stages if s is not None]
        if len(known) == len(parents) and (found := corresponding([goal, *known])) is not None:
            return found
    goal = segmented(template)
    k = next((k for k, p in enumerate(parents) if not any(corresponding([goal, s]) for s in _variants(p))), 0)
    raise StructureError(_different(goal, segmented(parents[k]), k))


def _variants(parent: AxisClasses) -> list[tuple[Stage, ...]]:
    return [segmented(parent, whole) for whole in (True, False)]


def _enlarged(template: AxisClasses, places: Sequence[tuple[Stage, ...]]) -> AxisClasses:
    """The template with as many units in every stage, new ones as identities."""
    larger = template
    for own, *others in places:
        longest = max(others, key=lambda s: len(s.units))
        if len(longest.units) <= len(own.units):
            continue
        size = pattern(longest)
        groups, most = grouped(own, size), grouped(longest, size)
        if not own.units or groups is None or most is None:
            raise StructureError(
                "the deepest network lacks the units of a stage where another one has some: pass that one as target="
            )
        for _ in range(len(most.units) - len(groups.units)):
            larger = repeated(larger, groups.units[-1])
    if larger is template:
        return template
    before = {n.name for n in template.traced.graph_module.graph.nodes}
    return grow(larger, template, inserted(larger, before), "deepest", None).classes


Groups = list[tuple[tuple[Unit, ...], int]]
"""Units that become one, and which of them gives its layers (-1: none, they are left out)."""


@dataclass(frozen=True, eq=False)
class _Compared:
    """A stage in which one network has fewer units than the other, patterns as one unit, and costs [n, m]."""

    short: Stage
    long: Stage
    costs: Tensor
    grows: bool  # whether the parent has the fewer


def _compared(
    template: AxisClasses,
    parent: AxisClasses,
    stages: Sequence[tuple[Stage, ...]],
    aligner: AbstractDepthAligner,
    sample: Sample | None,
) -> list[_Compared]:
    found: list[_Compared] = []
    for grows in (True, False):
        a, b = (parent, template) if grows else (template, parent)
        pairs = [(own, goal) if grows else (goal, own) for goal, own in stages]
        sized = []
        for s, t in pairs:
            if 0 < len(s.units) < len(t.units):
                size = pattern(t)
                small, large = grouped(s, size), grouped(t, size)
                sized.append((s, t) if small is None or large is None else (small, large))
        if sized:
            costs = aligner.costs(a, b, sized, sample)
            found += [_Compared(s, t, c, grows) for (s, t), c in zip(sized, costs, strict=True)]
    if any(bool(c.costs.isnan().any()) for c in found):
        raise InputError("the costs of layers are NaN: check the data and the networks for such values")
    return found


def _aligned(
    template: AxisClasses,
    stages: Sequence[tuple[Stage, ...]],
    compared: Sequence[_Compared],
    aligner: AbstractDepthAligner,
    number: int,
    needed: Set[str],
) -> tuple[list[Unit], Groups, list[Link]]:
    """The template's units that the parent lacks, the parent's that are to be joined, and how stages were aligned.

    Those of the template's units that are ``needed``, by their output, are not left out.
    """
    missing = [u for goal, own in stages if not own.units for u in goal.units]
    spare: Groups = [(own.units, -1) for goal, own in stages if own.units and not goal.units]
    links: list[Link] = []
    for c in compared:
        s, t = c.short, c.long
        fits = torch.tensor([[u.signature == v.signature for v in t.units] for u in s.units])
        wanted = torch.tensor([c.grows and u.output in needed for u in t.units])
        columns = aligner.assign((c.costs.double() - 1e6 * wanted).masked_fill(~fits, torch.inf))
        if columns is None:
            raise StructureError(
                f"the units of a stage do not correspond, whichever are left out:\n{_columns([s], [t])}\n"
                "Units correspond where they have the same operations with the same settings, whatever their "
                "widths; the first and the last ones have to, unless depth=CLAFusion(ends='free')"
            )
        names = (tuple(u.name for u in s.units), tuple(u.name for u in t.units))
        links.append(Link(number, *names, c.costs, tuple(columns), not c.grows))
        if c.grows:
            missing += [u for j, u in enumerate(t.units) if j not in columns]
        else:
            ends = [*columns[:-1], len(t.units) - 1]
            starts = [0, *(e + 1 for e in ends[:-1])]
            spare += [(t.units[x : y + 1], col - x) for x, y, col in zip(starts, ends, columns, strict=True) if y > x]
    place = {n.name: i for i, n in enumerate(template.traced.graph_module.graph.nodes)}
    return sorted(missing, key=lambda u: place[u.output]), spare, links


def _different(goal: Sequence[Stage], found: Sequence[Stage], k: int) -> str:
    lines = [[line for s in stages for line in s.border] for stages in (goal, found)]
    both = next(((a, b) for a, b in zip_longest(*lines, fillvalue="nothing") if a != b), ("", ""))
    none = "" if any(s.units for s in (*goal, *found)) else " Neither has a unit that may be repeated."
    which = nth(k + 1)
    return (
        f"the stages of the {which} network do not correspond to those of the result's:\n"
        f"{_columns(goal, found)}\n"
        f"Between them they differ: {both[0]} in the result's, {both[1]} in the {which}.{none} Networks may differ in "
        "how often layers are repeated and in widths; all else must be the same"
    )


def _columns(left: Sequence[Stage], right: Sequence[Stage]) -> str:
    rows = [(str(a) if a else "", str(b) if b else "") for a, b in _zipped(left, right)]
    width = max(len(a) for a, _ in rows)
    return "\n".join(f"  {i + 1:>2}  {a:<{width}}  |  {b}" for i, (a, b) in enumerate(rows))


def _zipped(left: Sequence[Stage], right: Sequence[Stage]) -> list[tuple[Stage | None, Stage | None]]:
    n = max(len(left), len(right))
    a, b = ([*s, *[None] * (n - len(s))] for s in (left, right))
    return list(zip(a, b, strict=True))
