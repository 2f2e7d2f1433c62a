"""Which layers of a deeper network those of a shallower one stand for (CLAFusion, Nguyen et al., arXiv 2110.15538).

Inside every stage a strictly increasing map a: {1..n} -> {1..m}, n <= m, that minimises sum_k C[k, a(k)], found by
dynamic programming in O(n m):

    F[k, l] = min(F[k, l-1], F[k-1, l-1] + C[k, l])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from fxmerge.depth.tensors import parameters_of
from fxmerge.errors import InputError, one_of
from fxmerge.interfaces import AbstractDepthAligner, Sample
from fxmerge.ir import AxisClasses
from fxmerge.linalg import transport
from fxmerge.ranks import averaged
from fxmerge.running import evaluating, fitting
from fxmerge.stats import listen
from fxmerge.symmetry import full_state
from fxmerge.units import Stage, Unit

_POSITIONS = 64  # rows kept per sample of an activation


class CLAFusion(AbstractDepthAligner):
    """Cross-layer alignment.

    Args:
        join: how plain units are joined where a network shrinks: "ridge" regression on the data, or the published rules
            for linear layers, W2 diag(g) W1: g is 1 where the sum of the pre-activations between the two is positive
            ("sum"), where most of them are ("majority"), or the share that is ("fraction").
        cost: what tells two units apart: "cka", one minus the linear CKA of their outputs (Kornblith et al., arXiv
            1905.00414, eq. 3); "wasserstein", the squared 2-Wasserstein distance between their neurons, as vectors over
            the samples; "weights", the distance of their layers' singular values, without data. None: "cka" where there
            is data, else "weights".
        unbiased: estimate CKA from few samples without bias (Song et al., JMLR 2012, eq. 5).
        balance: "grow" the shallower network or "shrink" the deeper one.
        keep: whether a layer that was inserted into a plain chain stays the identity in the fused network, rather than
            the mean of the identity and the deeper network's layer. None: where that layer looks at one position
            alone, since later layers may count on the view of a kernel.
        ends: "pinned", first unit on first and last on last (a single unit goes where it fits best), or "free".
    """

    def __init__(
        self,
        balance: str = "grow",
        *,
        join: str = "ridge",
        cost: str | None = None,
        unbiased: bool = False,
        keep: bool | None = None,
        ends: str = "pinned",
    ) -> None:
        one_of(
            "CLAFusion",
            balance=(balance, ("grow", "shrink")),
            join=(join, ("ridge", "sum", "majority", "fraction")),
            cost=(cost, (None, "cka", "wasserstein", "weights")),
            ends=(ends, ("pinned", "free")),
        )
        self.join = join
        self.balance, self.cost, self.unbiased, self.keep, self.ends = balance, cost, unbiased, keep, ends
        self.needs_data = cost in ("cka", "wasserstein")

    def costs(
        self, short: AxisClasses, long: AxisClasses, pairs: Sequence[tuple[Stage, Stage]], sample: Sample | None
    ) -> list[Tensor]:
        cost = self.cost or ("weights" if sample is None else "cka")
        if cost == "weights":
            return [_spectral(short, long, a, b) for a, b in pairs]
        if sample is None:
            raise InputError(f"{self} compares activations: pass data=loader, or use CLAFusion(cost='weights')")
        return self._by_activations((short, long), pairs, sample, cost)

    def assign(self, costs: Tensor) -> list[int] | None:
        return monotone(costs, pinned=self.ends == "pinned")

    def _by_activations(
        self, parents: tuple[AxisClasses, AxisClasses], pairs: Sequence[tuple[Stage, Stage]], sample: Sample, cost: str
    ) -> list[Tensor]:
        graphs = [p.traced.graph_module for p in parents]
        axes = [{u.output: _neurons(p, u) for pair in pairs for u in pair[k].units} for k, p in enumerate(parents)]
        sums = [_Products() for _ in pairs]
        draw = torch.Generator().manual_seed(0)
        with evaluating(*graphs):
            for number, batch in enumerate(tqdm(sample.batches, "layers", disable=not sample.progress, leave=False)):
                with fitting(number):
                    args, kwargs = sample.feed(batch)
                    heard = [listen(g, set(a), args, kwargs) for g, a in zip(graphs, axes, strict=True)]
                for pair, products in zip(pairs, sums, strict=True):
                    products.add(
                        _rows(
                            [
                                (h[u.output], a[u.output])
                                for h, a, stage in zip(heard, axes, pair, strict=True)
                                for u in stage.units
                            ],
                            draw,
                        )
                    )
        measure = _cloud_distance if cost == "wasserstein" else (_unbiased_cka if self.unbiased else _cka)
        found = []
        for (a, b), products in zip(pairs, sums, strict=True):
            n, m = len(a.units), len(b.units)
            rows = [[measure(products, i, n + j) for j in range(m)] for i in range(n)]
            found.append(torch.tensor(rows, dtype=torch.float64))
        return averaged(found)  # so that all processes choose alike


def monotone(costs: Tensor, pinned: bool = True) -> list[int] | None:
    """The strictly increasing map of rows [n] to columns [m] with the smallest sum; None where all are infinite.

    Args:
        costs: [n, m], n <= m; infinite where a pair is ruled out.
        pinned: the first row to the first column and the last to the last, where n > 1.
    """
    n, m = costs.shape
    c = costs.double().clone()
    if pinned and n > 1:
        c[0, 1:] = c[-1, :-1] = torch.inf
    best = torch.full((n + 1, m + 1), torch.inf, dtype=torch.float64)  # of the first k rows on the first l columns
    best[0] = 0
    for k in range(1, n + 1):
        for l in range(k, m + 1):  # noqa: E741
            best[k, l] = torch.minimum(best[k, l - 1], best[k - 1, l - 1] + c[k - 1, l - 1])
    if not bool(torch.isfinite(best[n, m])):
        return None
    chosen, l = [], m  # noqa: E741
    for k in range(n, 0, -1):
        while best[k, l - 1] == best[k, l]:  # the earliest of equally good columns
            l -= 1  # noqa: E741
        l -= 1  # noqa: E741
        chosen.append(l)
    return chosen[::-1]


def _neurons(classes: AxisClasses, unit: Unit) -> int:
    """The axis of the unit's output along which its neurons are."""
    axes = [t.axis for c in classes for t in c.taps if t.node == unit.output]
    return max(set(axes), key=axes.count) if axes else len(classes.traced.shapes[unit.output]) - 1


def _rows(values: Sequence[tuple[Tensor, int]], draw: torch.Generator) -> list[Tensor]:
    """Per value [rows, neurons], float64, a row for each of the same samples and positions."""
    flat = [v.movedim(axis, -1).flatten(1, -2) if v.dim() > 2 else v.movedim(axis, -1)[:, None] for v, axis in values]
    if len({f.shape[:2] for f in flat}) > 1:  # positions that do not correspond
        flat = [f.mean(1, keepdim=True) for f in flat]
    places = flat[0].shape[1]
    if places > _POSITIONS:
        keep = torch.randperm(places, generator=draw)[:_POSITIONS].to(flat[0].device)
        flat = [f[:, keep] for f in flat]
    return [f.flatten(0, 1).double() for f in flat]


class _Products:
    """Sums over rows of all products of (1, x_1, |x_1|^2, x_2, |x_2|^2, ..), with x_i the outputs of unit i."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self._shift: list[Tensor] = []
        self.places: list[slice] = []

    def add(self, values: Sequence[Tensor]) -> None:
        if self.total is None:
            self._shift = [v.mean(0) for v in values]  # against cancellation; no measure here depends on it
            ends = torch.tensor([v.shape[1] + 1 for v in values]).cumsum(0).tolist()
            self.places = [slice(e - v.shape[1], e) for v, e in zip(values, ends, strict=True)]
        shifted = [v - s for v, s in zip(values, self._shift, strict=True)]
        columns = [torch.ones_like(shifted[0][:, :1])]
        for x in shifted:
            columns += [x, x.square().sum(1, keepdim=True)]
        z = torch.cat(columns, 1)
        self.total = z.T @ z if self.total is None else self.total + z.T @ z

    def __call__(self, i: int, j: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """X'Y, sum x, sum y, sum |x|^2 y, sum |y|^2 x, sum |x|^2 |y|^2, n."""
        assert self.total is not None
        s, (x, y) = self.total, (self.places[i], self.places[j])
        return s[x, y], s[0, x], s[0, y], s[x.stop, y], s[x, y.stop], s[x.stop, y.stop], s[0, 0]

    def powers(self, i: int) -> Tensor:
        """Sum of |x|^2."""
        assert self.total is not None
        return self.total[0, self.places[i].stop]


def _cka(products: _Products, i: int, j: int) -> float:
    def hsic(a: int, b: int) -> Tensor:
        cross, x, y, *_, n = products(a, b)
        return (cross - torch.outer(x, y) / n).square().sum()

    return 1 - float(hsic(i, j) / (hsic(i, i) * hsic(j, j)).sqrt().clamp_min(1e-30))


def _unbiased_cka(products: _Products, i: int, j: int) -> float:
    def hsic(a: int, b: int) -> Tensor:
        cross, x, y, norms_y, norms_x, norms, n = products(a, b)
        trace = cross.square().sum() - norms
        k, l = x.square().sum() - products.powers(a), y.square().sum() - products.powers(b)  # noqa: E741
        both = x @ cross @ y - norms_y @ y - norms_x @ x + norms
        return trace + k * l / ((n - 1) * (n - 2)) - 2 * both / (n - 2)

    own = (hsic(i, i) * hsic(j, j)).clamp_min(0).sqrt()
    return 1 - float(hsic(i, j) / own.clamp_min(1e-30))


def _cloud_distance(products: _Products, i: int, j: int) -> float:
    cross, *_ = products(i, j)
    a, b = (products(k, k)[0].diagonal() for k in (i, j))
    scale = (a.mean() + b.mean()).clamp_min(1e-30)
    cost = ((a[:, None] + b[None, :] - 2 * cross) / scale).clamp_min(0)
    plan = transport(torch.ones_like(a), torch.ones_like(b), cost)
    return float((plan * cost).sum())


def _spectral(short: AxisClasses, long: AxisClasses, a: Stage, b: Stage) -> Tensor:
    """[n, m]: mean difference of singular values of corresponding weights at 32 quantiles, relative to their mean."""
    mine, theirs = ([_spectra(c, u) for u in stage.units] for c, stage in ((short, a), (long, b)))
    found = torch.zeros(len(mine), len(theirs), dtype=torch.float64)
    for i, x in enumerate(mine):
        for j, y in enumerate(theirs):
            gaps = [float((u - v).abs().mean() / (u + v).mean().clamp_min(1e-30)) for u, v in zip(x, y, strict=False)]
            found[i, j] = sum(gaps) / max(len(gaps), 1)
    return found


def _spectra(classes: AxisClasses, unit: Unit) -> list[Tensor]:
    state: Mapping[str, Tensor] = full_state(classes.traced.graph_module)
    grid = torch.linspace(0, 1, 32, dtype=torch.float64)
    weights = [state[n].detach() for n in parameters_of(classes.traced, unit) if state[n].dim() > 1]
    return [torch.quantile(torch.linalg.svdvals(w.double().flatten(1)).cpu(), grid) for w in weights]
