"""The layers of parents of different depth, side by side."""

from __future__ import annotations

from dataclasses import dataclass

from fxmerge.depth import Link
from fxmerge.facts import Facts


@dataclass(frozen=True)
class Layer:
    """What stands in a parent for a unit of the result: "same" (one unit), "joined" (several) or "inserted" (none)."""

    kind: str
    names: tuple[str, ...]
    cost: float | None

    def __str__(self) -> str:
        return " + ".join(self.names) if self.names else "inserted: passes on what it reads"


@dataclass(frozen=True)
class Row:
    """A unit of the result, and what stands for it in every parent (None: a unit of the same name)."""

    unit: str
    parents: tuple[Layer | None, ...]


def side_by_side(facts: Facts) -> list[list[Row]]:
    """Per stage of different depth a row for every unit of the result."""
    stages: dict[tuple[str, ...], dict[int, list[Layer]]] = {}
    for link in facts.depth:
        names = link.short if link.shrunk else link.long
        stages.setdefault(names, {})[link.parent] = _joined(link) if link.shrunk else _inserted(link)
    everyone = range(len(facts.parents))
    return [
        [Row(unit, tuple(found[p][i] if p in found else None for p in everyone)) for i, unit in enumerate(names)]
        for names, found in stages.items()
    ]


def _inserted(link: Link) -> list[Layer]:
    costs = link.costs.tolist()
    at = {j: Layer("same", (link.short[i],), costs[i][j]) for i, j in enumerate(link.chosen)}
    return [at.get(j, Layer("inserted", (), None)) for j in range(len(link.long))]


def _joined(link: Link) -> list[Layer]:
    """A unit that was not chosen is joined to the next one that was; those behind the last, to that."""
    costs = link.costs.tolist()
    ends = [*link.chosen[:-1], len(link.long) - 1]
    starts = [0, *(e + 1 for e in ends[:-1])]
    found = []
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        names = link.long[start : end + 1]
        found.append(Layer("same" if len(names) == 1 else "joined", names, costs[i][link.chosen[i]]))
    return found
