"""ZipIt!: merging inside a model as well as across models (Stoica et al., arXiv 2305.03053)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fxmerge.affinity import Affinity
from fxmerge.cells import class_by_class
from fxmerge.coupling import side_by_side
from fxmerge.errors import InputError, one_of
from fxmerge.interfaces import PLACES, AbstractMatcher, Problem
from fxmerge.ir import Alignment, AxisClasses, Coupling
from fxmerge.widths import resizable


class ZipIt(AbstractMatcher):
    """Greedy merging of the most correlated pair, over the concatenated neurons of all parents, until n are left.

    A merged neuron is correlated with others as the lesser of its two parts, times ``alpha`` (section 4.3 and
    appendix of the paper). merge = means over clusters, unmerge = membership.

    Args:
        alpha: how much a merged neuron loses: 1 merges clusters freely, small values keep them pairs.
        beta: pairs that each model may merge inside itself, as a share of its neurons, 0 to 1.
        until: name of a node or module of the first parent: classes written there and later are not merged, each
            parent keeps its own rest of the network (partial zip). Use ``heads="separate"`` to see each one's outputs.
        at: activations as the next layers "read" them or as a layer "made" them.
    """

    needs_data = True
    any_width = True

    def __init__(self, alpha: float = 0.3, beta: float = 0.125, until: str | None = None, at: str = "read") -> None:
        if not (0 <= alpha <= 1 and 0 <= beta <= 1):
            raise InputError(f"ZipIt(alpha={alpha}, beta={beta}): both lie between 0 and 1")
        one_of("ZipIt", at=(at, PLACES))
        self.alpha, self.beta, self.until, self.at = alpha, beta, until, at

    def match(self, problem: Problem) -> Alignment:
        first = problem.classes[0]
        later = self._later(first)
        alignment, _ = class_by_class(problem, self._solve, str(self))
        couplings = list(alignment.couplings)
        for k in later:
            couplings[k] = side_by_side([p[k].size for p in problem.classes])
        quality = {k: q for k, q in alignment.quality.items() if k not in later}
        return Alignment(tuple(couplings), alignment.method, quality, alignment.notes)

    def _later(self, classes: AxisClasses) -> set[int]:
        if self.until is None:
            return set()
        nodes = list(classes.traced.graph_module.graph.nodes)
        number = {n.name: i for i, n in enumerate(nodes)}
        at = [
            i
            for i, n in enumerate(nodes)
            if self.until in (n.name, n.target) or f"{n.target}".startswith(f"{self.until}.")
        ]
        if not at:
            raise InputError(
                f"ZipIt(until={self.until!r}): no such node or module; print(classes.traced.graph_module.graph)"
            )
        made = {k: [number[t.node] for t in c.taps if t.kind == "made"] for k, c in enumerate(classes) if c.free}
        later = {k for k, places in made.items() if places and min(places) >= min(at)}
        fixed = later - resizable(classes, later)
        if fixed:
            names = ", ".join(classes[k].name for k in sorted(fixed)[:3])
            raise InputError(f"ZipIt(until={self.until!r}): the graph fixes the width of {names}; choose a later place")
        return later

    def _solve(self, affinity: Affinity, shares: Sequence[float], n: int) -> Coupling:
        widths = affinity.widths
        owner = np.repeat(np.arange(len(widths)), widths)
        cluster = zipped(affinity.correlation.cpu().numpy(), owner, n, self.alpha, self.beta)
        member = torch.zeros(sum(widths), n, dtype=torch.float64)
        member[torch.arange(len(cluster)), torch.from_numpy(cluster)] = 1
        share = torch.tensor(shares, dtype=torch.float64)[torch.from_numpy(owner)]
        if not bool((share > 0).all()):
            share = share + 1e-9
        merge = (member * share[:, None]).T
        return Coupling(merge / merge.sum(1, keepdim=True), member, widths)


def zipped(correlation: np.ndarray, owner: np.ndarray, n: int, alpha: float, beta: float) -> np.ndarray:
    """Cluster [N], 0 to n - 1, of each neuron; clusters in the order of their first neuron."""
    size = len(correlation)
    alike = correlation.astype(np.float64, copy=True)
    np.fill_diagonal(alike, -np.inf)
    budget = [int(beta * (owner == p).sum()) for p in range(owner.max() + 1)]
    models = np.zeros((size, owner.max() + 1), bool)  # whose neurons a cluster holds
    models[np.arange(size), owner] = True
    parent = np.arange(size)
    for p, left in enumerate(budget):
        if left == 0:
            alike[np.ix_(owner == p, owner == p)] = -np.inf
    best = alike.argmax(1)
    value = alike[np.arange(size), best]
    for _ in range(size - n):
        if not np.isfinite(value.max()):
            alike = _reopened(correlation, parent, models)
            best = alike.argmax(1)
            value = alike[np.arange(size), best]
        i = int(value.argmax())
        j = int(best[i])
        if not np.isfinite(value[i]):
            raise InputError("ZipIt: no pair is left to merge within the budget; use a larger beta")
        i, j = min(i, j), max(i, j)
        inside = models[i].sum() == 1 and (models[i] == models[j]).all()
        parent[parent == j] = i
        row = alpha * np.minimum(alike[i], alike[j])
        row[~np.isfinite(alike[i]) | ~np.isfinite(alike[j])] = -np.inf
        alike[i], alike[:, i] = row, row
        alike[j], alike[:, j] = -np.inf, -np.inf
        alike[i, i] = -np.inf
        models[i] |= models[j]
        value[j] = -np.inf
        stale = (best == i) | (best == j)
        stale[i] = True
        better = row > value
        best[better], value[better] = i, row[better]
        if inside:
            p = int(models[i].argmax())
            budget[p] -= 1
            if budget[p] == 0:
                only = models[:, p] & (models.sum(1) == 1)
                alike[np.ix_(only, only)] = -np.inf
                stale |= only
        stale &= np.isfinite(value) | (np.arange(size) == i)
        stale[j] = False
        which = np.flatnonzero(stale)
        best[which] = alike[which].argmax(1)
        value[which] = alike[which, best[which]]
    return np.unique(parent, return_inverse=True)[1]


def _reopened(correlation: np.ndarray, parent: np.ndarray, models: np.ndarray) -> np.ndarray:
    """Likeness of the clusters that are left, as their least alike members; none between two of one model only.

    With more than two models, or unequal widths, all clusters may end up holding neurons that their models have no
    budget left to merge: then those that hold several models are open to all.
    """
    alike = np.full(correlation.shape, -np.inf)
    alive = np.unique(parent)
    rows = np.stack([correlation[parent == i].min(0) for i in alive])
    alike[np.ix_(alive, alive)] = np.stack([rows[:, parent == i].min(1) for i in alive], 1)
    single = models.sum(1) == 1
    alike[single[:, None] & single & (models.argmax(1)[:, None] == models.argmax(1))] = -np.inf
    np.fill_diagonal(alike, -np.inf)
    return alike
