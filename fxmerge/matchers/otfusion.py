"""OTFusion: neurons as masses to be transported (Singh & Jaggi, arXiv 1910.05653)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxmerge.affinity import Affinity
from fxmerge.cells import class_by_class
from fxmerge.coupling import Permuted
from fxmerge.errors import InputError, one_of
from fxmerge.interfaces import PLACES, AbstractMatcher, Problem
from fxmerge.ir import Alignment, Coupling
from fxmerge.linalg import assignment, transport
from fxmerge.widths import resizable

_SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "max": Tensor.max,
    "mean": Tensor.mean,
    "median": Tensor.median,
    "log": Tensor.max,
}


class OTFusion(AbstractMatcher):
    """Optimal transport between the neurons of the parents; classes may differ in width.

    With ground cost C [n, n_b] between fused and B's neurons and marginals u, v, the plan is

        T = argmin_T <T, C> + reg * sum T log T,   T 1 = u,  T' 1 = v,  T >= 0

    Fused neurons are made as diag(1/u) T (B's rows), and B's neurons read as diag(1/v) T' from fused ones (section 4).
    One plan per class: a residual stream has one, whoever writes it. With two parents the fused neurons stand where the
    first parent's do; ``barycenter`` lets them settle between all parents (free-support Wasserstein barycentre).

    Args:
        cost: "activations" (needs data), "weights", those around a class as seen through what is already matched, or
            "both".
        metric: "euclidean" (squared) or "cosine".
        reg: entropic regularisation relative to the scale of the costs; 0 solves exactly.
        scale: what that is: "max", "mean" or "median" of the costs; or "log", costs become log(1 + cost) over their
            largest, which also lets the exact plan mind far neurons less.
        importance: "uniform" masses, or "norm": proportional to a neuron's root mean square.
        barycenter: rounds of moving the fused neurons to the mean of what is transported to them; 0 keeps the first
            parent's.
        width: number of fused neurons relative to the first parent's, where the graph allows it.
        at: activations as the next layers "read" them or as a layer "made" them.
        sweeps: rounds over the classes where weights are compared.
    """

    any_width = True
    resizes = True

    def __init__(
        self,
        cost: str = "activations",
        metric: str = "euclidean",
        reg: float = 0.0,
        scale: str = "max",
        importance: str = "uniform",
        barycenter: int = 0,
        width: float = 1.0,
        at: str = "read",
        sweeps: int = 2,
    ) -> None:
        one_of(
            "OTFusion",
            cost=(cost, ("activations", "weights", "both")),
            metric=(metric, ("euclidean", "cosine")),
            scale=(scale, _SCALES),
            importance=(importance, ("uniform", "norm")),
            at=(at, PLACES),
        )
        if reg < 0 or barycenter < 0 or width <= 0 or sweeps < 1:
            raise InputError("OTFusion: reg and barycenter must not be negative; width and sweeps must be positive")
        self.cost, self.metric, self.reg, self.scale, self.importance = cost, metric, reg, scale, importance
        self.barycenter, self.width, self.at, self.sweeps = barycenter, width, at, sweeps
        self.needs_data = cost != "weights"

    def match(self, problem: Problem) -> Alignment:
        first = problem.classes[0]
        widths: dict[int, int] = {}
        if self.width != 1:
            widths = {k: max(1, round(self.width * first[k].size)) for k in resizable(first)}
        return class_by_class(
            problem, self._solve, str(self), by=self.cost, sweeps=self.sweeps, widths=widths, worth=self._worth
        )[0]

    def _solve(self, affinity: Affinity, shares: Sequence[float], n: int) -> Coupling:
        widths = affinity.widths
        sizes = [affinity.sizes(p) for p in range(len(widths))]
        fixed = self.barycenter == 0 and n == widths[0]
        if (
            fixed and self.reg == 0 and self._one_to_one(widths)
        ):  # without the matrices, larger than the weights that they are for
            costs = (self._cost(sizes[0], s, affinity.between(affinity.inner, 0, p)) for p, s in enumerate(sizes) if p)
            return Permuted([torch.arange(n), *(assignment(cost.neg_()) for cost in costs)], shares)
        gram = affinity.raw
        support = torch.zeros(n, sum(widths), dtype=gram.dtype, device=gram.device)  # fused neurons as sums of parents'
        strongest = torch.cat(
            [size.argsort(descending=True) + s for size, s in zip(sizes, affinity.starts, strict=True)]
        )
        here = torch.arange(n, device=gram.device)
        chosen = here if n == widths[0] else strongest[here % len(strongest)].sort().values
        support[here, chosen] = 1
        for _ in range(max(1, self.barycenter)):
            size = (support @ gram * support).sum(1)
            plans = []
            for p, start in enumerate(affinity.starts):
                if p == 0 and fixed:
                    plans.append(torch.eye(n, dtype=gram.dtype, device=gram.device) / n)
                    continue
                inner = support @ gram[:, start : start + widths[p]]
                plans.append(self._plan(size, sizes[p], inner))
            rows = [t / t.sum(1, keepdim=True) for t in plans]
            merge = torch.cat([w * r for w, r in zip(shares, rows, strict=True)], 1)
            if fixed or torch.equal(merge, support):
                break
            support = merge
        unmerge = torch.cat([(t / t.sum(0, keepdim=True)).T for t in plans])
        return Coupling(merge.cpu(), unmerge.cpu(), widths)

    def _worth(self, affinity: Affinity, left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
        """The least cost of transport between cells, relative to the mean cost in the class; exact whatever ``reg``."""
        a, b = (affinity.sizes(p) for p in range(2))
        cost = self._cost(a, b, affinity.between(affinity.inner, 0, 1))
        found = torch.zeros(len(left), len(right), dtype=torch.float64)
        for i, x in enumerate(left):
            for j, y in enumerate(right):
                part = cost[x][:, y]
                found[i, j] = (self._coupled(a[x], b[y], part, 0.0) * part).sum()
        return len(left[0]) * (1 - found / float(cost.mean().clamp_min(1e-30)))

    def _plan(self, size_a: Tensor, size_b: Tensor, inner: Tensor) -> Tensor:
        """The plan [n, n_b] from squared norms [n], [n_b] and inner products [n, n_b]."""
        cost = self._cost(size_a, size_b, inner)
        return self._coupled(size_a, size_b, cost, self.reg)

    def _cost(self, size_a: Tensor, size_b: Tensor, inner: Tensor) -> Tensor:
        if self.metric == "cosine":
            norms = size_a.clamp_min(0)[:, None].sqrt() * size_b.clamp_min(0)[None, :].sqrt()
            cost = 1 - inner / norms.clamp_min(1e-30)
        else:
            cost = (size_a[:, None] + size_b[None, :]).sub_(inner, alpha=2).clamp_min_(0)
        return cost.log1p_() if self.scale == "log" else cost

    def _coupled(self, size_a: Tensor, size_b: Tensor, cost: Tensor, reg: float) -> Tensor:
        u, v = (self._masses(s) for s in (size_a, size_b))
        if reg == 0 and self._one_to_one((len(u), len(v))):
            chosen = assignment(-cost).to(cost.device)
            return torch.zeros_like(cost).scatter_(1, chosen[:, None], 1 / len(u))
        return transport(u, v, cost, reg * float(_SCALES[self.scale](cost) / cost.max().clamp_min(1e-30)))

    def _one_to_one(self, widths: Sequence[int]) -> bool:
        """Whether exact transport is a permutation: equal masses, equally many."""
        return self.importance == "uniform" and len({*widths}) == 1

    def _masses(self, size: Tensor) -> Tensor:
        mass = torch.ones_like(size) if self.importance == "uniform" else size.clamp_min(0).sqrt()
        mass = mass.clamp_min(1e-6 * float(mass.max()) or 1.0)
        return mass / mass.sum()
