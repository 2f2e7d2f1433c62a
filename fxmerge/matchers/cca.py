"""CCA Merge: a linear map between neurons instead of a permutation (Horoi et al., arXiv 2407.05385)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxmerge.affinity import Affinity
from fxmerge.cells import class_by_class
from fxmerge.errors import InputError, one_of
from fxmerge.interfaces import PLACES, AbstractMatcher, Problem
from fxmerge.ir import Alignment, Coupling


class CCAMerge(AbstractMatcher):
    """Canonical correlation analysis per class, from streamed second moments.

    With Sx = Cov(a) + gamma I, Sy = Cov(b) + gamma I and U S V' the singular value decomposition of
    Sx^-1/2 Cov(a, b) Sy^-1/2 (equations 2 and 3 of the paper), B's neurons become

        T = Sx^1/2 U V' Sy^-1/2,   read back by   T^-1 = Sy^1/2 V U' Sx^-1/2

    More than two parents: each is mapped to the first. Such maps do not commute with nonlinearities, so a repair is
    needed.

    Inside attention heads they need none: values go through T and the next layer reads them by T^-1, queries go through
    T and keys through T^-1 transposed. Queries q and keys k cannot both be made white, but alike: with
    M = P^-1 # Q the geometric mean of P^-1 and Q, P = Cov(q) + gamma I, Q = Cov(k) + gamma I, and G = M^1/2, G q and
    G^-1 k have one covariance. U V' is that of the sum of both cross covariances after this, and
    T = G_a^-1 U V' G_b. Neurons that are contracted with themselves (tied embeddings) get gamma = infinity. Heads are
    matched with heads by the sum of the singular values.

    Args:
        gamma: the ridge, relative to the class's mean variance. 0 is plain CCA, infinity the orthogonal Procrustes
            map; the default weighs the data and the ridge alike.
        at: activations as the next layers "read" them or as a layer "made" them.
    """

    needs_data = True

    def __init__(self, gamma: float = 1.0, at: str = "read") -> None:
        if not gamma >= 0:
            raise InputError(f"CCAMerge(gamma={gamma}): the ridge must not be negative")
        one_of("CCAMerge", at=(at, PLACES))
        self.gamma, self.at = gamma, at

    def match(self, problem: Problem) -> Alignment:
        assert problem.statistics is not None, "the pipeline collects statistics for matchers that need data"
        for k, taps in problem.statistics.moments.items():
            c, rows = problem.classes[0][k], min(m.count for m in taps)
            if rows <= c.size and not c.parents and not problem.classes[0].children(k):
                raise InputError(
                    f"class '{c.name}' has {c.size} neurons and the data shows them {rows} times, so their covariance "
                    f"has no full rank: give at least {c.size + 1} samples x positions"
                )
        return class_by_class(problem, self._solve, str(self), worth=self._worth)[0]

    def _solve(self, affinity: Affinity, shares: Sequence[float], n: int) -> Coupling:
        everyone = [torch.arange(w) for w in affinity.widths]
        frames = [self._frame(affinity, p, at) for p, at in enumerate(everyone)]
        eye = torch.eye(n).to(frames[0].forth)
        merge, unmerge = [shares[0] * eye], [eye]
        for b in range(1, len(frames)):
            turn = _turn(_cross(affinity, frames[0], b, frames[b]))
            merge.append(shares[b] * (frames[0].back @ turn @ frames[b].forth))
            unmerge.append(frames[b].back @ turn.T @ frames[0].forth)
        return Coupling(torch.cat(merge, 1).cpu(), torch.cat(unmerge).cpu(), affinity.widths)

    def _worth(self, affinity: Affinity, left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
        """The sum of singular values, over what it is where both cells are one."""
        a, b = ([self._frame(affinity, p, at) for at in cells] for p, cells in enumerate((left, right)))
        sums = torch.stack([torch.stack([torch.linalg.svdvals(_cross(affinity, x, 1, y)).sum() for y in b]) for x in a])
        scale = [torch.stack([x.size for x in cells]).clamp_min(1e-30).sqrt() for cells in (a, b)]
        return sums / torch.outer(*scale) * len(left[0])

    def _frame(self, affinity: Affinity, p: int, at: Tensor) -> _Frame:
        """The coordinates in which the neurons ``at`` of parent p are compared."""
        spread = [affinity.between(m, p, p, at, at) for m in affinity.sides or (affinity.covariance,)]
        eye = torch.eye(len(at)).to(spread[0])
        if affinity.rigid or self.gamma == float("inf"):
            forth = back = eye
        elif affinity.sides is None:
            back, forth = _roots(_ridged(spread[0], self.gamma))
        else:
            root, inverse = _roots(_ridged(spread[0], self.gamma))
            middle, _ = _roots(root @ _ridged(spread[1], self.gamma) @ root)
            forth, back = _roots(inverse @ middle @ inverse)
        views = (forth, back.T)[: len(spread)]
        size = sum(((w @ s * w).sum() for w, s in zip(views, spread, strict=True)), torch.zeros(()).to(eye))
        return _Frame(at, forth, back, views, size)


@dataclass(frozen=True, eq=False)
class _Frame:
    """Coordinates of some neurons: ``forth`` [n, n] leads there and ``back`` is its inverse.

    ``views``: the map of what is compared, for every side that neurons are seen from; ``size`` is the sum of variances.
    """

    at: Tensor
    forth: Tensor
    back: Tensor
    views: tuple[Tensor, ...]
    size: Tensor


def _cross(affinity: Affinity, a: _Frame, b: int, other: _Frame) -> Tensor:
    """[n, n]: covariances between neurons of the first parent and of parent b, in their frames, over all sides."""
    total = torch.zeros(()).to(a.forth)
    for matrix, x, y in zip(affinity.sides or (affinity.covariance,), a.views, other.views, strict=True):
        total = total + x @ affinity.between(matrix, 0, b, a.at, other.at) @ y.T
    return total


def _turn(cross: Tensor) -> Tensor:
    """U V' of a singular value decomposition; where that is not determined, the one nearest to the identity.

    Among neurons that nothing shows, many are as near: numbers drawn once and for all decide, not rounding.
    """
    left, values, right = torch.linalg.svd(cross)
    shown = int((values > 1e-6 * values[0]).sum())
    drawn = torch.randn(cross.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    near = torch.eye(len(cross)).to(cross) + 1e-6 * drawn.to(cross)
    free, _, other = torch.linalg.svd(left[:, shown:].T @ near @ right[shown:].T)
    return left[:, :shown] @ right[:shown] + left[:, shown:] @ free @ other @ right[shown:]


def _ridged(covariance: Tensor, gamma: float) -> Tensor:
    return covariance + gamma * covariance.diagonal().mean().clamp_min(1e-30) * torch.eye(len(covariance)).to(
        covariance
    )


def _roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Square root of a symmetric positive matrix, and the inverse of that."""
    values, vectors = torch.linalg.eigh(matrix)
    root = values.clamp_min(1e-10 * float(values.mean().clamp_min(1e-30))).sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T
