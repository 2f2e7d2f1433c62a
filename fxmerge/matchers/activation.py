"""Activation matching: neurons that respond alike (Git Re-Basin, 2209.04836, section 3.1; Li et al., 1511.07543)."""

from __future__ import annotations

from collections.abc import Sequence

from fxmerge.affinity import Affinity
from fxmerge.cells import class_by_class, permutations
from fxmerge.coupling import Permuted
from fxmerge.errors import one_of
from fxmerge.interfaces import PLACES, AbstractMatcher, Problem
from fxmerge.ir import Alignment, Coupling


class ActivationMatching(AbstractMatcher):
    """Permutations that maximise the summed correlation of matched neurons, one assignment per class.

    Correlations are averaged over the places where a class is seen (a residual stream is read by several layers).
    More than two parents: each is aligned to the first, then in turn to the mean of the others.

    Args:
        at: "read", activations as the next layers read them, or "made", as a layer wrote them.
    """

    needs_data = True

    def __init__(self, at: str = "read") -> None:
        one_of("ActivationMatching", at=(at, PLACES))
        self.at = at

    def match(self, problem: Problem) -> Alignment:
        return class_by_class(problem, _solve, str(self))[0]


def _solve(affinity: Affinity, shares: Sequence[float], n: int) -> Coupling:
    return Permuted(permutations(affinity), shares)
