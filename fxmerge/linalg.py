"""Small solvers: tensors in, tensors out, nothing known about networks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fxmerge.errors import InputError
from fxmerge.heap import LARGE, give_back
from fxmerge.products import Products, whole


def assignment(score: Tensor) -> Tensor:
    """The permutation p that maximises sum_i score[i, p[i]] (Jonker-Volgenant, exact).

    Args:
        score: [n, n].

    Returns:
        int64 [n] on the CPU.
    """
    if score.numel() >= LARGE:
        give_back()
    cost = score.detach().cpu().to(torch.float64, copy=True).neg_()  # the solver itself would copy it twice
    return torch.from_numpy(linear_sum_assignment(cost.numpy())[1])


def transport(u: Tensor, v: Tensor, cost: Tensor, reg: float = 0.0, rounds: int = 20000) -> Tensor:
    """The optimal transport plan T = argmin <T, cost> + reg max(cost) sum T log T with marginals u and v.

    Exact by network simplex (POT) at reg = 0, else Sinkhorn's scaling in float64, rows normalised to their cheapest
    entry so that none underflows (Peyre & Cuturi, arXiv 1803.00567, section 4).

    Args:
        u, v: [n], [m], masses.
        cost: [n, m], not negative.
        reg: relative to the largest cost.
        rounds: at most this many rounds of scaling.

    Raises:
        InputError: the marginals are missed by more than a thousandth, so mass would be lost.
    """
    a, b = (x.double() / x.double().sum() for x in (u, v))
    c = cost.double() / cost.double().max().clamp_min(1e-30)
    if reg == 0:
        import ot

        found = ot.emd(a.cpu().numpy(), b.cpu().numpy(), c.cpu().numpy(), numItermax=100 * (len(a) + len(b)) ** 2)
        plan = torch.from_numpy(found).to(c)
    else:
        kernel = torch.exp(-(c - c.amin(1, keepdim=True)) / reg)
        left, right = torch.ones_like(a), torch.ones_like(b)
        for number in range(rounds):
            left = a / (kernel @ right)
            right = b / (kernel.T @ left)
            if number % 20 == 19 and float((left * (kernel @ right) - a).abs().max() / a.max()) < 1e-6:
                break
        plan = left[:, None] * kernel * right[None, :]
    error = max(float((plan.sum(1) - a).abs().max() / a.max()), float((plan.sum(0) - b).abs().max() / b.max()))
    if not error < 1e-3:
        raise InputError(
            f"the transport plan misses its marginals by {error:.1e}: mass would be lost. Use a larger reg, or reg=0"
        )
    return plan.to(cost)


def correlation(cross: Tensor, var_rows: Tensor, var_columns: Tensor) -> Tensor:
    """Pearson correlation from centred second moments [n, m] and variances [n], [m]; 0 for constant neurons."""
    scale = (var_rows.clamp_min(0).sqrt()[:, None] * var_columns.clamp_min(0).sqrt()[None, :]).clamp_min(1e-30)
    tiny = (var_rows <= 1e-12 * var_rows.max().clamp_min(1e-30))[:, None] | (
        var_columns <= 1e-12 * var_columns.max().clamp_min(1e-30)
    )[None, :]
    return torch.div(cross, scale, out=scale).masked_fill_(tiny, 0.0)


@dataclass(frozen=True, eq=False)
class Map:
    """A matrix [n, m] to be applied along axes; where every row has at most one entry, as a scaled gather.

    Attributes:
        dense: the matrix; None where ``source`` says it all.
        source: int64 [n]: the column of every row's entry.
        scale: [n]: the entries; None where all are 1.
        width: m.
    """

    dense: Tensor | None
    source: Tensor | None
    scale: Tensor | None
    width: int

    @staticmethod
    def of(matrix: Tensor) -> Map:
        width = matrix.shape[1]
        nonzero = matrix != 0
        if not bool((nonzero.sum(1) <= 1).all()):
            return Map(matrix, None, None, width)
        source = nonzero.to(torch.uint8).argmax(1)
        scale = matrix.gather(1, source[:, None])[:, 0]
        return Map(matrix, source, None if bool((scale == 1).all()) else scale, width)

    @staticmethod
    def gather(source: Tensor, scale: float = 1.0) -> Map:
        """A permutation, times a number."""
        scales = torch.full(source.shape, scale, dtype=torch.float64)
        return Map(None, source, None if scale == 1 else scales, len(source))

    @property
    def matrix(self) -> Tensor:
        if self.dense is not None:
            return self.dense
        assert self.source is not None
        rows = torch.zeros(len(self.source), self.width, dtype=torch.float64)
        rows[torch.arange(len(rows)), self.source] = 1 if self.scale is None else self.scale
        return rows

    def __call__(self, value: Tensor, axis: int) -> Tensor:
        """``value`` with its axis of size m replaced by one of size n."""
        if self.source is None:
            return torch.tensordot(self.matrix.to(value), value, dims=([1], [axis])).movedim(0, axis)
        out = value.index_select(axis, self.source.to(value.device))
        if self.scale is None:
            return out
        return out.mul_(self.scale.to(value).reshape([-1 if d == axis else 1 for d in range(value.dim())]))


def row_by_row(x: Map, gram: Tensor | Products, y: Map) -> Tensor:
    """[n]: the inner products of the rows of ``x`` with those of ``y``, ``gram`` [m_x, m_y] being those of columns."""
    if x.source is None or y.source is None:
        gram = whole(gram)
        return (x.matrix.to(gram) @ gram * y.matrix.to(gram)).sum(1)
    at = x.source, y.source
    found = gram.pairs(*at) if isinstance(gram, Products) else gram[tuple(i.to(gram.device) for i in at)]
    for scale in (x.scale, y.scale):
        found = found if scale is None else found * scale.to(found)
    return found
