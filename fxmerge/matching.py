"""Assignment over a tree of classes: inner problems for every pair of blocks, then the outer one on their values.

A class without blocks is one linear assignment. Blocks (heads, groups) may be swapped as wholes, with their members
permuted inside: the value of giving block j to block i is the block's own score plus the best assignment of its
members, and the outer assignment runs on those values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxmerge.ir import AxisClasses
from fxmerge.linalg import assignment


@dataclass(frozen=True, eq=False)
class Joint:
    """A weight that ties two child classes of the same blocks (a grouped convolution): out and in of each group.

    ``left`` and ``right``: [groups, out, in, rest], of A and of B, in the order of the classes' members.
    """

    outer: int
    inner: int
    left: Tensor
    right: Tensor


def families(classes: AxisClasses) -> list[tuple[int, ...]]:
    """Free classes that must be matched together: a class, its blocks, their blocks, .. parents first."""
    group = list(range(len(classes)))

    def find(k: int) -> int:
        while group[k] != k:
            k = group[k]
        return k

    for k, c in enumerate(classes):
        for p in c.parents:
            a, b = sorted((find(k), find(p)))
            group[b] = a
    found: dict[int, list[int]] = {}
    for k, c in enumerate(classes):
        if c.free:
            found.setdefault(find(k), []).append(k)
    return [tuple(ks) for ks in found.values()]


def match_family(
    classes: AxisClasses, family: Sequence[int], score: Mapping[int, Tensor], joints: Sequence[Joint] = ()
) -> dict[int, Tensor]:
    """The element of the symmetry of one family that maximises the summed score.

    Args:
        classes: of the first parent (the second's correspond).
        family: class indices, parents first.
        score: class -> [n, n], score of letting neuron j of B stand in for neuron i of A; missing means 0.
        joints: weights whose score depends on two classes of the family at once.

    Returns:
        class -> int64 [n], p[i] is the neuron of B that stands in for neuron i of A.
    """
    if len(family) == 1:
        (k,) = family
        return {k: assignment(score[k]) if k in score else torch.arange(classes[k].size)}
    scores = {k: v.detach().double().cpu() for k, v in score.items()}
    found: dict[int, Tensor] = {}
    roots = [k for k in family if not classes[k].parents]
    for sweep in range(1 + (len(roots) > 1)):  # several roots: a product, solved in turn
        for root in roots:
            n = torch.arange(classes[root].size)
            solve = _Solver(classes, family, scores, joints, found)
            _, chosen = solve.best(root, n, n, ())
            found.update(chosen)
        if sweep == 0 and len(roots) == 1:
            break
    return found


class _Solver:
    def __init__(
        self,
        classes: AxisClasses,
        family: Sequence[int],
        scores: Mapping[int, Tensor],
        joints: Sequence[Joint],
        known: Mapping[int, Tensor],
    ) -> None:
        self.classes, self.family, self.scores, self.known = classes, family, scores, known
        self.joints = {j.outer: j for j in joints} | {j.inner: j for j in joints}
        self.members: dict[tuple[int, int], list[Tensor]] = {}
        for k in family:
            for col, p in enumerate(classes[k].parents):
                blocks = classes[k].blocks[:, col]
                order = torch.argsort(blocks, stable=True)
                counts = torch.bincount(blocks, minlength=classes[p].size).tolist()
                self.members[k, p] = list(order.split(counts))

    def best(self, k: int, left: Tensor, right: Tensor, solved: tuple[int, ...]) -> tuple[float, dict[int, Tensor]]:
        """The best assignment of ``right`` to ``left`` (members of class k) with all that hangs below."""
        own = self.scores[k][left][:, right] if k in self.scores else torch.zeros(len(left), len(right), dtype=torch.float64)
        below = [c for c in self.family if k in self.classes[c].parents]
        parts: dict[tuple[int, int], dict[int, tuple[Tensor, Tensor]]] = {}
        total = own.clone()
        if below:
            for i in range(len(left)):
                for j in range(len(right)):
                    value, parts[i, j] = self._pair(below, k, int(left[i]), int(right[j]), solved)
                    total[i, j] += value
        p = self._assign(k, total, left, right)
        full = {k: _scatter(self.classes[k].size, left, right[p])}
        for i in range(len(left)):
            for c, (a, b) in parts.get((i, int(p[i])), {}).items():
                full.setdefault(c, torch.full((self.classes[c].size,), -1))[a] = b
        return float(total[torch.arange(len(left)), p].sum()), full

    def _assign(self, k: int, total: Tensor, left: Tensor, right: Tensor) -> Tensor:
        return assignment(total)

    def _pair(
        self, below: Sequence[int], k: int, i: int, j: int, solved: tuple[int, ...]
    ) -> tuple[float, dict[int, tuple[Tensor, Tensor]]]:
        """Block j of B in the place of block i of A: the best its members can do."""
        value, chosen = 0.0, {}
        done: set[int] = set()
        for c in below:
            if c in done:
                continue
            a, b = self.members[c, k][i], self.members[c, k][j]
            joint = self.joints.get(c)
            if joint is not None and {joint.outer, joint.inner} <= set(below):
                v, pairs = self._joint_pair(joint, k, i, j)
                value += v
                chosen |= pairs
                done |= {joint.outer, joint.inner}
                continue
            others = [p for p in self.classes[c].parents if p != k]
            if others:  # a product: the other parents say which members correspond
                b = b[self._follow(c, others, a, b)]
                if c in self.scores:
                    value += float(self.scores[c][a, b].sum())
                chosen[c] = (a, b)
                continue
            v, sub = self.best(c, a, b, (*solved, k))
            value += v
            for d, full in sub.items():
                at = (full >= 0).nonzero()[:, 0]
                chosen[d] = (at, full[at])
        return value, chosen

    def _follow(self, c: int, others: Sequence[int], a: Tensor, b: Tensor) -> Tensor:
        cols = [self.classes[c].parents.index(p) for p in others]
        want = torch.stack(
            [self.known[p][self.classes[c].blocks[a, col]] if p in self.known else self.classes[c].blocks[a, col]
             for p, col in zip(others, cols, strict=True)], 1
        )
        have = self.classes[c].blocks[b][:, cols]
        left, right = {}, {}
        for at, row in enumerate(map(tuple, want.tolist())):
            left.setdefault(row, []).append(at)
        for at, row in enumerate(map(tuple, have.tolist())):
            right.setdefault(row, []).append(at)
        order = torch.empty(len(a), dtype=torch.int64)
        for row, at in left.items():
            there = right[row]
            if len(at) > 1 and c in self.scores:
                p = assignment(self.scores[c][a[at]][:, b[there]])
                there = [there[int(q)] for q in p]
            order[at] = torch.tensor(there)
        return order

    def _joint_pair(self, joint: Joint, k: int, i: int, j: int) -> tuple[float, dict[int, tuple[Tensor, Tensor]]]:
        """Out and in of one group, in turn: each given the other, from what other weights say of them."""
        o, c = joint.outer, joint.inner
        ao, bo = self.members[o, k][i], self.members[o, k][j]
        ac, bc = self.members[c, k][i], self.members[c, k][j]
        so = self.scores[o][ao][:, bo] if o in self.scores else torch.zeros(len(ao), len(bo), dtype=torch.float64)
        sc = self.scores[c][ac][:, bc] if c in self.scores else torch.zeros(len(ac), len(bc), dtype=torch.float64)
        x, y = joint.left[i], joint.right[j]
        pc = assignment(sc)
        best = None
        for _ in range(3):
            po = assignment(so + torch.einsum("ocr,pcr->op", x, y[:, pc]))
            given = sc + torch.einsum("ocr,odr->cd", x, y[po])
            pc = assignment(given)
            value = float(given[torch.arange(len(pc)), pc].sum() + so[torch.arange(len(po)), po].sum())
            if best is not None and value <= best[0] + 1e-12:
                break
            best = (value, {o: (ao, bo[po]), c: (ac, bc[pc])})
        assert best is not None
        return best


def _scatter(size: int, at: Tensor, value: Tensor) -> Tensor:
    full = torch.full((size,), -1)
    full[at] = value
    return full
