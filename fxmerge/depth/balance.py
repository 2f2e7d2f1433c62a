"""Parents of different depth brought into one graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxmerge.depth.grow import Grown, grow
from fxmerge.depth.insert import repeated
from fxmerge.depth.shrink import shrink
from fxmerge.errors import StructureError
from fxmerge.interfaces import AbstractDepthAligner, Sample
from fxmerge.ir import AxisClasses
from fxmerge.units import Stage, Unit, corresponding, find_stages, grouped, pattern


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
    stages = [find_stages(p) for p in parents]
    chosen, given = -1, template is not None
    if template is None:
        sizes = [sum(len(s.units) for s in found) for found in stages]
        chosen = sizes.index(max(sizes) if how == "grow" else min(sizes))
        template = parents[chosen]
    elif template in parents:
        chosen = list(parents).index(template)
    goal = find_stages(template)
    both = corresponding([goal, *stages])
    if both is None:
        other = next(k for k, found in enumerate(stages) if corresponding([goal, found]) is None)
        raise StructureError(_different(goal, stages[other], other))
    if how == "grow" and not given:
        template = _enlarged(
            template, [max(map(len, (s.units for s in place))) for place in both], [s for s, *_ in both]
        )
    grown: list[Grown] = []
    links: list[Link] = []
    for k, parent in enumerate(parents):
        if parent is template:
            grown.append(Grown(parent, (), frozenset(), frozenset(), {}, 0.0))
            continue
        nth = f"{_ordinal(k)}"
        pairs = corresponding([find_stages(template), stages[k]])
        assert pairs is not None
        missing, spare, found_links = _aligned(template, parent, pairs, aligner, sample, k)
        links += found_links
        if spare:
            parent = shrink(parent, spare, sample)
        grown.append(grow(template, parent, missing, nth, sample))
    return grown, links, chosen


def _enlarged(template: AxisClasses, wanted: Sequence[int], stages: Sequence[Stage]) -> AxisClasses:
    """The template with as many units in every stage, new ones as identities."""
    larger = template
    for most, stage in zip(wanted, stages, strict=True):
        if len(stage.units) < most and not stage.units:
            raise StructureError(
                "the deepest network has no unit in a stage where another one has some: pass that one as target="
            )
        unit = stage.units[-1] if stage.units else None
        for _ in range(most - len(stage.units)):
            unit = next(u for s in find_stages(larger) for u in s.units if unit and u.name == unit.name)
            larger = repeated(larger, unit)
    if larger is template:
        return template
    before = {n.name for n in template.traced.graph_module.graph.nodes}
    new = [u for s in find_stages(larger) for u in s.units if not before & set(u.nodes)]
    return grow(larger, template, new, "deepest", None).classes


Groups = list[tuple[tuple[Unit, ...], int]]
"""Units that become one, and which of them gives its layers (-1: none, they are left out)."""


def _aligned(
    template: AxisClasses,
    parent: AxisClasses,
    stages: Sequence[tuple[Stage, ...]],
    aligner: AbstractDepthAligner,
    sample: Sample | None,
    number: int,
) -> tuple[list[Unit], Groups, list[Link]]:
    """The template's units that the parent lacks, the parent's that are to be joined, and how stages were aligned."""
    missing: list[Unit] = []
    spare: Groups = []
    links: list[Link] = []
    for grow_parent in (True, False):
        a, b = (parent, template) if grow_parent else (template, parent)
        pairs = [(own, goal) if grow_parent else (goal, own) for goal, own in stages]
        pairs = [(s, t) for s, t in pairs if len(s.units) < len(t.units)]
        missing += [u for s, t in pairs if grow_parent and not s.units for u in t.units]
        spare += [(t.units, -1) for s, t in pairs if not grow_parent and not s.units]
        pairs = [(s, t) for s, t in pairs if s.units]
        sized = []
        for s, t in pairs:
            size = pattern(t)
            small, large = grouped(s, size), grouped(t, size)
            sized.append((s, t) if small is None or large is None else (small, large))
        if not sized:
            continue
        for (s, t), costs in zip(sized, aligner.costs(a, b, sized, sample), strict=True):
            fits = torch.tensor([[u.signature == v.signature for v in t.units] for u in s.units])
            columns = aligner.assign(costs.double().masked_fill(~fits, torch.inf))
            if columns is None:
                raise StructureError(
                    f"the units of a stage do not correspond, whichever are left out:\n{_side_by_side([s], [t])}\n"
                    "Units correspond where they have the same operations with the same settings, whatever their widths"
                )
            names = (tuple(u.name for u in s.units), tuple(u.name for u in t.units))
            links.append(Link(number, *names, costs, tuple(columns), not grow_parent))
            if grow_parent:
                missing += [u for j, u in enumerate(t.units) if j not in columns]
            else:
                ends = [*columns[:-1], len(t.units) - 1]
                starts = [0, *(e + 1 for e in ends[:-1])]
                spare += [(t.units[x : y + 1], c - x) for x, y, c in zip(starts, ends, columns, strict=True) if y > x]
    place = {n.name: i for i, n in enumerate(template.traced.graph_module.graph.nodes)}
    return sorted(missing, key=lambda u: place[u.output]), spare, links


def _different(goal: Sequence[Stage], found: Sequence[Stage], k: int) -> str:
    first = next((i for i, (a, b) in enumerate(zip(goal, found, strict=False)) if a.border != b.border), len(found) - 1)
    return (
        f"the stages of the {_ordinal(k)} network do not correspond to those of the result's:\n"
        f"{_side_by_side(goal, found)}\n"
        f"They differ in what precedes stage {first + 1}. Networks may differ in how often layers are repeated and in "
        "widths; all else must be the same"
    )


def _side_by_side(left: Sequence[Stage], right: Sequence[Stage]) -> str:
    rows = [(str(a) if a else "", str(b) if b else "") for a, b in _zipped(left, right)]
    width = max(len(a) for a, _ in rows)
    return "\n".join(f"  {i + 1:>2}  {a:<{width}}  |  {b}" for i, (a, b) in enumerate(rows))


def _zipped(left: Sequence[Stage], right: Sequence[Stage]) -> list[tuple[Stage | None, Stage | None]]:
    n = max(len(left), len(right))
    a, b = ([*s, *[None] * (n - len(s))] for s in (left, right))
    return list(zip(a, b, strict=True))


def _ordinal(k: int) -> str:
    return {0: "first", 1: "second", 2: "third"}.get(k, f"{k + 1}th")
