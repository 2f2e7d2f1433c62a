"""CCA Merge: a linear map between neurons instead of a permutation (Horoi et al., arXiv 2407.05385)."""

from __future__ import annotations

from collections.abc import Sequence

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
            if rows <= c.size and not c.parents:
                raise InputError(
                    f"class '{c.name}' has {c.size} neurons and the data shows them {rows} times, so their covariance "
                    f"has no full rank: give at least {c.size + 1} samples x positions"
                )
        return class_by_class(problem, self._solve, str(self))[0]

    def _solve(self, affinity: Affinity, shares: Sequence[float], n: int) -> Coupling:
        own = affinity.between(affinity.centred, 0, 0)
        merge, unmerge = [shares[0] * torch.eye(n).to(own)], [torch.eye(n).to(own)]
        for b in range(1, len(affinity.widths)):
            other, cross = affinity.between(affinity.centred, b, b), affinity.between(affinity.centred, 0, b)
            (x, x_inverse), (y, y_inverse) = (_roots(s, self.gamma) for s in (own, other))
            left, _, right = torch.linalg.svd(x_inverse @ cross @ y_inverse)
            turn = left @ right
            merge.append(shares[b] * (x @ turn @ y_inverse))
            unmerge.append(y @ turn.T @ x_inverse)
        return Coupling(torch.cat(merge, 1).cpu(), torch.cat(unmerge).cpu(), affinity.widths)


def _roots(covariance: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Square root of a covariance with its ridge, and the inverse of that."""
    values, vectors = torch.linalg.eigh(covariance)
    mean = float(values.mean().clamp_min(1e-30))
    root = (values + gamma * mean).clamp_min(1e-10 * mean).sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T
