"""Assignment over a tree of classes: inner problems for every pair of blocks, then the outer one on their values.

A class without blocks is one linear assignment. Blocks (heads, groups) may be swapped as wholes, with their members
permuted inside: the value of giving block j to block i is the block's own score plus the best assignment of its
members, and the outer assignment runs on those values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fxmerge.ir import AxisClasses
from fxmerge.linalg import assignment

Array = NDArray[np.float64]
Ints = NDArray[np.int64]


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
    classes: AxisClasses,
    family: Sequence[int],
    score: Mapping[int, Tensor],
    joints: Sequence[Joint] = (),
    values: Mapping[int, Tensor] | None = None,
) -> dict[int, Tensor]:
    """The element of the symmetry of one family that maximises the summed score.

    Args:
        classes: of the first parent (the second's correspond).
        family: class indices, parents first.
        score: class -> [n, n], score of letting neuron j of B stand in for neuron i of A; missing means 0.
        joints: weights whose score depends on two classes of the family at once.
        values: class -> [blocks, blocks], what its members are worth where block j stands in for block i; by default
            the score of their best assignment.

    Returns:
        class -> int64 [n], p[i] is the neuron of B that stands in for neuron i of A.
    """
    if len(family) == 1:
        (k,) = family
        return {k: assignment(score[k]) if k in score else torch.arange(classes[k].size)}
    scores = {k: v.detach().double().cpu() for k, v in score.items()}
    return _Solver(classes, family, scores, joints, values or {}).solve()


class _Solver:
    """Blocks inside blocks; a class with two parents is a product, and each parent is solved given the other.

    ``self.known`` maps the classes settled so far, in the pair of blocks at work: [n], -1 where not yet.
    """

    def __init__(
        self,
        classes: AxisClasses,
        family: Sequence[int],
        scores: Mapping[int, Tensor],
        joints: Sequence[Joint],
        values: Mapping[int, Tensor],
    ) -> None:
        self.classes, self.family, self.scores, self.values = classes, family, scores, values
        self.joints = {j.outer: j for j in joints} | {j.inner: j for j in joints}
        self.sweeps = 2 if any(len(classes[k].parents) > 1 for k in family) else 1
        self.known: dict[int, Tensor] = {}
        self.below = {k: self._descendants(k) for k in family}
        self.members: dict[tuple[int, int], list[Tensor]] = {}
        for k in family:
            for column, p in enumerate(classes[k].parents):
                blocks = classes[k].blocks[:, column]
                counts = torch.bincount(blocks, minlength=classes[p].size).tolist()
                self.members[k, p] = list(torch.argsort(blocks, stable=True).split(counts))

    def _descendants(self, k: int) -> set[int]:
        direct = {c for c in self.family if k in self.classes[c].parents}
        return direct.union(*(self._descendants(c) for c in direct))

    def solve(self) -> dict[int, Tensor]:
        """The best of a few starts; a tree needs one, a product depends on which side is settled first."""
        roots = [k for k in self.family if not self.classes[k].parents]
        everything = {k: torch.arange(self.classes[k].size) for k in self.family}
        best, value = everything, -float("inf")
        for order in (roots, roots[::-1]) if len(roots) > 1 else (roots,):
            for start in ({}, everything) if len(roots) > 1 else ({},):
                self.known = dict(start)
                self._block({k: (everything[k], everything[k]) for k in order}, None)
                found = self._value(self.known)
                if found > value:
                    best, value = self.known, found
        return best

    def _value(self, found: Mapping[int, Tensor]) -> float:
        total = sum(float(s[torch.arange(len(s)), found[k]].sum()) for k, s in self.scores.items() if k in found)
        for joint in set(self.joints.values()):
            groups = self.classes[joint.outer].parents[0]
            for i in range(len(joint.left)):
                ao, ac = self.members[joint.outer, groups][i], self.members[joint.inner, groups][i]
                j = int(found[groups][i])
                po, pc = (
                    torch.searchsorted(self.members[k, groups][j], found[k][m])
                    for k, m in ((joint.outer, ao), (joint.inner, ac))
                )
                total += float((joint.left[i] * joint.right[j][po][:, pc]).sum())
        return total

    def _block(self, below: Mapping[int, tuple[Tensor, Tensor]], parent: int | None) -> float:
        """Matches all that lives in one pair of blocks; adds to ``known`` and returns the summed score."""
        value = 0.0
        for _ in range(self.sweeps):
            value, done = 0.0, set()
            for c, (a, b) in below.items():
                allowed = self._allowed(c, a, b, parent)
                if c in done or allowed is None:  # a product whose other side is not settled yet
                    continue
                joint = self.joints.get(c)
                if joint is not None and joint.outer in below and joint.inner in below:
                    masks = [self._allowed(k, *below[k], parent) for k in (joint.outer, joint.inner)]
                    if masks[0] is not None and masks[1] is not None and parent is not None:
                        value += self._joint(joint, below, parent, masks[0], masks[1])
                        done |= {joint.outer, joint.inner}
                        continue
                value += self._class(c, a, b, allowed)
        return value

    def _class(self, k: int, left: Tensor, right: Tensor, allowed: Tensor) -> float:
        """Matches members ``right`` of class k to ``left``, with all that hangs below them."""
        total = self._score(k, left, right, allowed)
        below = [c for c in self.family if k in self.classes[c].parents]
        inside: dict[tuple[int, int], dict[int, Tensor]] = {}
        outside = self.known
        if below:
            for x, i in enumerate(left.tolist()):
                for y, j in enumerate(right.tolist()):
                    self.known = {c: found for c, found in outside.items() if c not in self.below[k]}
                    total[x, y] += self._block({c: (self.members[c, k][i], self.members[c, k][j]) for c in below}, k)
                    inside[x, y] = self.known
        p = assignment(total)
        self.known = outside
        self._settle(k, left, right[p])
        for x in range(len(left)) if below else ():
            for c, found in inside[x, int(p[x])].items():
                if c in self.below[k]:
                    at = (found >= 0).nonzero()[:, 0]
                    self._settle(c, at, found[at])
        if k in self.values:
            return float(self.values[k][self.classes[k].blocks[left[0], 0], self.classes[k].blocks[right[0], 0]])
        return float(total[torch.arange(len(left)), p].sum())

    def _score(self, k: int, left: Tensor, right: Tensor, allowed: Tensor) -> Tensor:
        own = (
            self.scores[k][left][:, right]
            if k in self.scores
            else torch.zeros(len(left), len(right), dtype=torch.float64)
        )
        return (
            own.masked_fill(~allowed, -1e12 * max(1.0, float(own.abs().max())))
            if not bool(allowed.all())
            else own.clone()
        )

    def _allowed(self, c: int, a: Tensor, b: Tensor, parent: int | None) -> Tensor | None:
        """[len(a), len(b)]: pairs whose other blocks correspond; None where that is not known yet."""
        mask = torch.ones(len(a), len(b), dtype=torch.bool)
        for column, p in enumerate(self.classes[c].parents):
            if p == parent:
                continue
            goal = self.known[p][self.classes[c].blocks[a, column]] if p in self.known else torch.tensor([-1])
            if bool((goal < 0).any()):
                return None
            mask &= goal[:, None] == self.classes[c].blocks[b, column][None, :]
        return mask

    def _joint(
        self, joint: Joint, below: Mapping[int, tuple[Tensor, Tensor]], parent: int, out_mask: Tensor, in_mask: Tensor
    ) -> float:
        """Out and in of one group, in turn: each given the other, from what other weights say of them."""
        (ao, bo), (ac, bc) = below[joint.outer], below[joint.inner]
        group = [
            int(self.classes[joint.outer].blocks[m[0], self.classes[joint.outer].parents.index(parent)])
            for m in (ao, bo)
        ]
        so, sc = self._score(joint.outer, ao, bo, out_mask), self._score(joint.inner, ac, bc, in_mask)
        value, po, pc = _alternate(joint.left[group[0]].numpy(), joint.right[group[1]].numpy(), so.numpy(), sc.numpy())
        self._settle(joint.outer, ao, bo[torch.from_numpy(po)])
        self._settle(joint.inner, ac, bc[torch.from_numpy(pc)])
        return value

    def _settle(self, k: int, at: Tensor, value: Tensor) -> None:
        full = self.known[k].clone() if k in self.known else torch.full((self.classes[k].size,), -1)
        full[at] = value
        self.known[k] = full


def _alternate(x: Array, y: Array, score_out: Array, score_in: Array) -> tuple[float, Ints, Ints]:
    """Rows and columns of y [out, in, rest] that match x best, each given the other, from a few starts.

    In plain arrays: this runs for every pair of groups, on matrices of a few neurons.
    """
    outs, ins = x.shape[:2]
    flat, turned = x.reshape(outs, -1), x.transpose(1, 0, 2).reshape(ins, -1)

    def solve(score: Array) -> Ints:
        return linear_sum_assignment(score, maximize=True)[1]

    def given_rows(po: Ints) -> Array:
        return score_in + turned @ y[po].transpose(1, 0, 2).reshape(ins, -1).T

    here = np.arange(ins)
    starts = {tuple(p): p for p in (solve(score_in), solve(given_rows(solve(score_out))), here)}
    best: tuple[float, Ints, Ints] | None = None
    for pc in starts.values():
        reached = -np.inf
        for _ in range(4):
            po = solve(score_out + flat @ y[:, pc].reshape(outs, -1).T)
            given = given_rows(po)
            pc = solve(given)
            value = float(given[here, pc].sum() + score_out[np.arange(outs), po].sum())
            if best is None or value > best[0]:
                best = (value, po, pc)
            if value <= reached + 1e-12:
                break
            reached = value
    assert best is not None
    return best
