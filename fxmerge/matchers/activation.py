"""Activation matching: neurons that respond alike (Git Re-Basin, 2209.04836, section 3.1; Li et al., 1511.07543)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxmerge.coupling import from_permutations
from fxmerge.descent import Descent, parameters
from fxmerge.errors import InputError
from fxmerge.interfaces import AbstractMatcher, Problem
from fxmerge.ir import Alignment
from fxmerge.linalg import correlation
from fxmerge.matching import families, match_family
from fxmerge.stats import Moments


class ActivationMatching(AbstractMatcher):
    """Permutations that maximise the summed correlation of matched neurons, one assignment per class.

    Correlations are averaged over the places where a class is seen (a residual stream is read by several layers).
    More than two parents: each is aligned to the first, then in turn to the mean of the others.

    Args:
        at: "read", activations as the next layers read them, or "made", as a layer wrote them.
    """

    needs_data = True

    def __init__(self, at: str = "read") -> None:
        if at not in ("read", "made"):
            raise InputError(f"ActivationMatching(at={at!r}): choose 'read' or 'made'")
        self.at = at

    def match(self, problem: Problem) -> Alignment:
        stats = problem.statistics
        assert stats is not None, "the pipeline collects statistics for matchers that need data"
        first, parents = problem.classes[0], len(problem.classes)
        alike: dict[int, dict[tuple[int, int], Tensor]] = {}
        for k, taps in stats.moments.items():
            alike[k] = {}
            for a in range(parents):
                for b in range(parents):
                    if a < b:
                        alike[k][a, b] = sum(_correlation(m, a, b) for m in taps) / len(taps)  # type: ignore[assignment]
                        alike[k][b, a] = alike[k][a, b].T
        found = [[torch.arange(c.size) for c in first] for _ in range(parents)]
        groups = families(first)
        # what no activation shows (inside an opaque module, say) is matched on the weights around it
        hidden = [f for f in groups if any(first[k].sites and k not in alike for k in f)]

        def align(b: int, others: Sequence[int]) -> bool:
            changed = False
            for family in groups:
                if family in hidden:
                    continue
                score = {k: sum(alike[k][a, b][found[a][k]] for a in others) for k in family if k in alike}
                best = match_family(first, family, score)  # type: ignore[arg-type]
                for k, p in best.items():
                    changed |= not torch.equal(p, found[b][k])
                    found[b][k] = p
            return changed

        for b in range(1, parents):
            align(b, [0])
        if parents > 2:
            for _ in range(20):
                moved = [align(b, [a for a in range(parents) if a != b]) for b in range(1, parents)]
                if not any(moved):
                    break
        if hidden:
            weights = [parameters(s, first, problem.apart) for s in problem.states]
            for b in range(1, parents):
                descent = Descent(first, weights[0], weights[b], problem.seed, found[b], hidden)
                descent.grow(reverse=False)
                descent.run(sweeps=50)
                found[b] = descent.found
        quality = {}
        for k, pairs in alike.items():
            n = torch.arange(first[k].size)
            values = [float(pairs[0, b][n, found[b][k]].mean()) for b in range(1, parents)]
            quality[k] = sum(values) / len(values)
        names = ", ".join(first[k].name for f in hidden for k in f if first[k].sites)
        notes = (f"matched on weights, since no activation shows them: {names}",) if hidden else ()
        return from_permutations(first, found, problem.shares, str(self), quality, notes)


def _correlation(moments: Moments, a: int, b: int) -> Tensor:
    covariance = moments.covariance
    var = covariance.diagonal().split(moments.widths)
    return correlation(moments.part(covariance, a, b), var[a], var[b])
