"""What is known of a merge when it is done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch

from fxmerge.coupling import Permuted
from fxmerge.depth import Link
from fxmerge.ir import Alignment, AxisClasses, Coupling
from fxmerge.size import Size
from fxmerge.symmetry import Verification


@dataclass(frozen=True, eq=False)
class Facts:
    """The merge in figures. What there is one of per parent stands in the order in which the parents were given.

    Attributes:
        parents: names of the parents' types.
        weights: their shares.
        classes: of the result.
        alignment: method, couplings and match quality per class.
        verifications: one per parent, empty where switched off.
        repair: what was repaired, in words.
        variance: node -> (before, after repair): variance of the fused activations over the parents' mean variance.
        seconds: per step.
        depth: how stages of different depth were aligned.
        order: the parents as the columns of the couplings have them.
        inserted: per parent the nodes of the result that it lacks, where it passes on what they read.
        sizes: one per parent, then the result's.
        notes: everything else a reader should know.
    """

    parents: tuple[str, ...]
    weights: tuple[float, ...]
    classes: AxisClasses
    alignment: Alignment
    verifications: tuple[Verification, ...]
    repair: str
    variance: Mapping[str, tuple[float, float]]
    seconds: Mapping[str, float]
    depth: tuple[Link, ...]
    order: tuple[int, ...]
    inserted: tuple[frozenset[str], ...]
    sizes: tuple[Size, ...]
    notes: tuple[str, ...] = field(default=())

    def widths(self, k: int) -> tuple[int, ...]:
        """Neurons of class ``k`` in every parent."""
        found = dict(zip(self.order, self.alignment.couplings[k].widths, strict=True))
        return tuple(found[p] for p in range(len(self.order)))

    @cached_property
    def variances(self) -> dict[str, tuple[float, float]]:
        """``variance`` in the order in which the nodes run."""
        names = (n.name for n in self.classes.traced.graph_module.graph.nodes)
        return {n: self.variance[n] for n in names if n in self.variance}

    @cached_property
    def shared(self) -> tuple[dict[tuple[int, ...], int], ...]:
        """Per class: parents that read a fused neuron -> how many such neurons there are, most parents first."""
        return tuple(self._shared(coupling) for coupling in self.alignment.couplings)

    def _shared(self, coupling: Coupling) -> dict[tuple[int, ...], int]:
        if isinstance(coupling, Permuted):
            return {tuple(sorted(self.order)): coupling.size}
        largest = [torch.linalg.vector_norm(p, torch.inf, 0) for p in coupling.unmerge.split(coupling.widths)]
        counts: dict[tuple[int, ...], int] = {}
        for column in torch.stack(largest, 1).tolist():
            who = tuple(sorted(p for p, value in zip(self.order, column, strict=True) if value > 1e-9))
            counts[who] = counts.get(who, 0) + 1
        return dict(sorted(counts.items(), key=lambda pair: (-len(pair[0]), pair[0])))
