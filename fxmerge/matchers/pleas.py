"""PLeaS: merge the neurons that match, keep the others apart (Nasery et al., arXiv 2407.02447)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fxmerge.affinity import Affinity
from fxmerge.budget import Costs, spread
from fxmerge.cells import class_by_class, permutations
from fxmerge.coupling import Permuted
from fxmerge.errors import InputError, one_of
from fxmerge.interfaces import PLACES, AbstractMatcher, Problem
from fxmerge.ir import Alignment, Coupling
from fxmerge.widths import resizable


class PLeaS(AbstractMatcher):
    """Partial matching: the best matched neurons of a class are averaged, the others stay apart.

    A class of n neurons of which m are kept apart gets n + m neurons, laid out merged | first only | second only. What
    neurons of different parents would read from each other is zero. The paper's second step is
    ``repair=LeastSquares()``.

    Args:
        budget: size of the result over the size of one parent, from 1 (everything merged) to the number of parents
            squared, where they stand side by side (a dense layer then holds their zeros too).
        of: what the budget counts, "parameters" or "flops" of the network that is emitted, zeros included.
        ratios: instead of a budget: share of neurons kept apart, 0 to 1, for classes by the start of their names.
        cost: "activations" (needs data), "weights" or "both".
        at: activations as the next layers "read" them or as a layer "made" them.
    """

    def __init__(
        self,
        budget: float = 1.0,
        of: str = "parameters",
        ratios: Mapping[str, float] | None = None,
        cost: str = "activations",
        at: str = "read",
    ) -> None:
        sources = ("activations", "weights", "both")
        one_of("PLeaS", of=(of, ("parameters", "flops")), cost=(cost, sources), at=(at, PLACES))
        if not budget >= 1:
            raise InputError(f"PLeaS(budget={budget}): at least 1, the size of one parent")
        if ratios is not None and (budget != 1 or not all(0 <= r <= 1 for r in ratios.values())):
            raise InputError("PLeaS(ratios=..): shares between 0 and 1, and no budget besides")
        self.budget, self.of, self.ratios, self.cost, self.at = budget, of, ratios, cost, at
        self.needs_data = cost != "weights"

    def match(self, problem: Problem) -> Alignment:
        parents, first = problem.classes, problem.classes[0]
        if self.budget > len(parents) ** 2:
            raise InputError(
                f"PLeaS(budget={self.budget}): {len(parents)} networks side by side are {len(parents) ** 2} times one"
            )
        unknown = [p for p in self.ratios or () if not any(c.name.startswith(p) for c in first)]
        if unknown:
            raise InputError(f"PLeaS(ratios=..): no class of neurons has a name that starts with '{unknown[0]}'")
        whole = self.budget == 1 and not self.ratios
        each = None if whole else _scores
        alignment, scores = class_by_class(problem, _match, str(self), by=self.cost, sweeps=2, each=each)
        if whole:
            return alignment
        free = sorted(k for k in resizable(first) if k in scores)
        found = {k: _permutations(alignment.couplings[k]) for k in free}
        match = {k: scores[k] for k in free}
        if self.ratios is None:
            costs = Costs.of(first, problem.apart, len(parents), self.of)
            # what a class loses, every layer that reads it loses; classes are comparable whatever their width
            readers = {k: max(1, sum(s in first.reads for s in first[k].sites)) for k in free}
            losses = {k: readers[k] * (1 - s).sort(descending=True).values / len(s) for k, s in match.items()}
            kept = spread(losses, costs, self.budget)
        else:
            named = {k: [p for p in self.ratios if first[k].name.startswith(p)] for k in free}
            share = {k: self.ratios[max(ps, key=len)] if ps else 0.0 for k, ps in named.items()}
            kept = {k: round(share[k] * first[k].size) for k in free}
        couplings = list(alignment.couplings)
        for k, m in kept.items():
            if m:
                couplings[k] = partial(found[k], match[k], m, problem.shares[k])
        size = sum(c.size for k, c in enumerate(couplings) if k in kept)
        note = f"{sum(kept.values())} of {sum(first[k].size for k in free)} neurons kept apart, {size} in all"
        return Alignment(tuple(couplings), str(self), alignment.quality, (*alignment.notes, note))


def _match(affinity: Affinity, shares: Sequence[float], n: int) -> Coupling:
    return Permuted(permutations(affinity), shares)


def _permutations(coupling: Coupling) -> list[Tensor]:
    return [u.T.argmax(1) for u in coupling.unmerge.split(coupling.widths)]


def _scores(affinity: Affinity, coupling: Coupling) -> Tensor:
    """[n]: correlation of the neurons that match, averaged over the parents after the first."""
    found = _permutations(coupling)
    here = torch.arange(len(found[0]))
    pairs = [affinity.between(affinity.correlation, 0, b).cpu()[here, p] for b, p in enumerate(found) if b]
    return torch.stack(pairs).mean(0)


def partial(found: Sequence[Tensor], match: Tensor, apart: int, shares: Sequence[float]) -> Coupling:
    """Merges all neurons but the ``apart`` worst matched, which every parent keeps.

    Args:
        found: per parent int64 [n]: its neuron that stands at place i.
        match: [n], how well place i is matched.
        apart: how many places are not merged.
        shares: the parents'.
    """
    n, count = len(match), len(found)
    order = match.argsort(descending=True, stable=True)
    merged, alone = order[: n - apart].sort().values, order[n - apart :].sort().values
    size = n - apart + count * apart
    merge = torch.zeros(size, count * n, dtype=torch.float64)
    unmerge = torch.zeros(count * n, size, dtype=torch.float64)
    for p, where in enumerate(found):
        rows, columns = torch.arange(n - apart), p * n + where[merged]
        merge[rows, columns], unmerge[columns, rows] = shares[p], 1.0
        rows, columns = n - apart + p * apart + torch.arange(apart), p * n + where[alone]
        merge[rows, columns], unmerge[columns, rows] = 1.0, 1.0
    return Coupling(merge, unmerge, (n,) * count)
