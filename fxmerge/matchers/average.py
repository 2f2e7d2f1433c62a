"""No alignment: the plain average, as a floor to compare with."""

from __future__ import annotations

import torch

from fxmerge.coupling import from_permutations
from fxmerge.interfaces import AbstractMatcher, Problem
from fxmerge.ir import Alignment


class Average(AbstractMatcher):
    """Neuron i of every parent is neuron i of the fused network: merge = [w_a I, w_b I], unmerge = [I; I]."""

    def match(self, problem: Problem) -> Alignment:
        first = problem.classes[0]
        identity = [torch.arange(c.size) for c in first]
        return from_permutations(first, [identity] * len(problem.classes), problem.shares, "average")
