"""Assignment over a tree of classes: inner problems for every pair of blocks, then the outer one on their values.

A class without blocks is one linear assignment. Blocks (heads, groups) may be swapped as wholes, with their members
permuted inside: the value of giving block j to block i is the block's own score plus the best assignment of its
members, and the outer assignment runs on those values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fxmerge.ir import AxisClasses
from fxmerge.linalg import assignment
from fxmerge.products import Products, part, whole

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
    score: Mapping[int, Tensor | Products],
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
        return {k: assignment(whole(score[k])) if k in score else torch.arange(classes[k].size)}
    scores = {k: v if isinstance(v, Products) else v.detach().double().cpu() for k, v in score.items()}
    return _Solver(classes, family, scores, joints, values or {}).solve()


class _Solver:
    """Blocks inside blocks; a class with two parents is a product, and each parent is solved given the other.

    ``self.known`` maps the classes settled so far, in the pair of blocks at work: [n], -1 where not yet.
    """

    def __init__(
        self,
        classes: AxisClasses,
        family: Sequence[int],
        scores: Mapping[int, Tensor | Products],
        joints: Sequence[Joint],
        values: Mapping[int, Tensor],
    ) -> None:
        self.classes, self.family, self.scores, self.values = classes, family, scores, values
        self.joints = joints
        self.sweeps = 2 if any(len(classes[k].parents) > 1 for k in family) else 1
        self.known: dict[int, Tensor] = {}
        self._cache: dict[int, tuple[list[Tensor | None], Tensor | None]] = {}
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
        total = 0.0
        for k, s in self.scores.items():
            if k in found:
                at = torch.arange(len(s)), found[k]
                total += float((s.pairs(*at) if isinstance(s, Products) else s[at]).sum())
        for joint in self.joints:
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
                tied = self._tied(c, below) if self.joints and parent is not None else [c]
                if len(tied) > 1:
                    masks = {k: self._allowed(k, *below[k], parent) for k in tied}
                    if all(m is not None for m in masks.values()):
                        value += self._jointly({k: below[k] for k in tied}, cast(int, parent), masks)
                        done |= set(tied)
                        continue
                value += self._class(c, a, b, allowed)
        return value

    def _class(self, k: int, left: Tensor, right: Tensor, allowed: Tensor) -> float:
        """Matches members ``right`` of class k to ``left``, with all that hangs below them."""
        below = [c for c in self.family if k in self.classes[c].parents]
        outside = self.known
        inside: dict[tuple[int, int], dict[int, Tensor]] = {}

        def inner(x: int, y: int) -> float:
            i, j = int(left[x]), int(right[y])
            self.known = {c: found for c, found in outside.items() if c not in self.below[k]}
            value = self._block({c: (self.members[c, k][i], self.members[c, k][j]) for c in below}, k)
            inside[x, y] = self.known
            return value

        worth = self._worth(k, left, right)
        total = self._masked(part(self._own(k), left, right).cpu() if worth is None else worth, allowed)
        if worth is None:
            for x in range(len(left)):
                for y in range(len(right)):
                    total[x, y] += inner(x, y)
        p = assignment(total)
        if worth is None or not self._follow(below, k, left, right[p]):
            for x, y in enumerate(p.tolist()):
                if (x, y) not in inside:
                    inner(x, y)
            self.known = outside
            for x, y in enumerate(p.tolist()):
                for c, found in inside[x, y].items():
                    if c in self.below[k]:
                        at = (found >= 0).nonzero()[:, 0]
                        self._settle(c, at, found[at])
        self._settle(k, left, right[p])
        if k in self.values:
            return float(self.values[k][self.classes[k].blocks[left[0], 0], self.classes[k].blocks[right[0], 0]])
        return float(total[torch.arange(len(left)), p].sum())

    def _own(self, k: int) -> Tensor | Products:
        n = self.classes[k].size
        return self.scores[k] if k in self.scores else torch.zeros(n, n, dtype=torch.float64)

    def _follow(self, below: Sequence[int], k: int, left: Tensor, right: Tensor) -> bool:
        """Settles all that hangs below pairs of neurons of class k, where nothing is left to choose; else False."""
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for c in below:
            rows, columns = ([self.members[c, k][i] for i in side.tolist()] for side in (left, right))
            if self.below[c] or len({len(m) for m in (*rows, *columns)}) > 1:
                return False
            a, b = torch.stack(rows), torch.stack(columns)
            goals = [
                (self.known[p][self.classes[c].blocks[a, j]] if p in self.known else torch.full_like(a, -1), j)
                for j, p in enumerate(self.classes[c].parents)
                if p != k
            ]
            if any(bool((goal < 0).any()) for goal, _ in goals):  # a product whose other side is not settled yet
                continue
            fits = torch.ones(len(a), a.shape[1], a.shape[1], dtype=torch.bool)
            for goal, j in goals:
                fits &= goal[:, :, None] == self.classes[c].blocks[b, j][:, None, :]
            if not bool((fits.sum(-1) == 1).all()):
                return False
            found[c] = a.flatten(), b.gather(1, fits.byte().argmax(-1)).flatten()
        for c, pair in found.items():
            self._settle(c, *pair)
        return True

    def _worth(self, k: int, left: Tensor, right: Tensor) -> Tensor | None:
        """[left, right]: the score of class k and, for every pair, of the best matching of all that hangs below.

        None where that is to be seen pair by pair: joints, or two blocks below k that share members.
        """
        tree = {k} | self.below[k]
        around = [{p for p in self.classes[c].parents if p not in tree} for c in self.below[k]]
        tied = {c for joint in self.joints for c in (joint.outer, joint.inner)}
        plain = all(len(self.classes[c].parents) == len(a) + 1 for c, a in zip(self.below[k], around, strict=True))
        if not plain or tied & self.below[k]:
            return None
        if not self.below[k]:
            return part(self._own(k), left, right).cpu()
        given = [self.known.get(p) for p in sorted(set().union(*around))]
        if any(x is not None and bool((x < 0).any()) for x in given):  # known in these blocks alone
            return self._summed(k, left, right)
        if k not in self._cache or any(x is not y for x, y in zip(self._cache[k][0], given, strict=True)):
            everything = torch.arange(self.classes[k].size)
            self._cache[k] = given, self._summed(k, everything, everything)
        total = self._cache[k][1]
        return None if total is None else total[left][:, right]

    def _summed(self, k: int, left: Tensor, right: Tensor) -> Tensor | None:
        total = part(self._own(k), left, right).cpu().clone()
        for c in self.family:
            if k not in self.classes[c].parents:
                continue
            rows, columns = ([self.members[c, k][i] for i in side.tolist()] for side in (left, right))
            one_size = len({len(m) for m in (*rows, *columns)}) == 1
            if c in self.values:
                first = [self.classes[c].blocks[torch.stack([m[0] for m in side]), 0] for side in (rows, columns)]
                total += self.values[c][first[0]][:, first[1]]
                continue
            a, b = torch.cat(rows), torch.cat(columns)
            if isinstance(self._own(c), Products) and one_size and len(self.classes[c].parents) == 1:
                for i, members in enumerate(rows):  # all at once they may be larger than the networks
                    inner = self._worth(c, members, b)
                    if inner is None:
                        return None
                    total[i] += _best(inner.unflatten(1, (len(right), -1)).transpose(0, 1))
                continue
            allowed = self._allowed(c, a, b, k)
            if allowed is None:  # a product whose other side is not settled yet
                continue
            inner = self._worth(c, a, b)
            if inner is None or not one_size:
                return None
            cells, fits = (
                t.unflatten(1, (len(right), -1)).unflatten(0, (len(left), -1)).transpose(1, 2) for t in (inner, allowed)
            )
            if bool((fits.sum(-1) == 1).all()):  # the other side leaves nothing to choose
                total += (cells * fits).sum((-1, -2))
            else:
                total += _best(self._masked(cells, fits))
        return total

    @staticmethod
    def _masked(score: Tensor, allowed: Tensor) -> Tensor:
        return score if bool(allowed.all()) else score.masked_fill(~allowed, -1e12 * max(1.0, float(score.abs().max())))

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

    def _tied(self, c: int, below: Mapping[int, Any]) -> list[int]:
        """The classes, of those in ``below``, that joints tie to c."""
        joints = [j for j in self.joints if j.outer in below and j.inner in below]
        tied = [c]
        for k in tied:
            tied += [x for j in joints if k in (j.outer, j.inner) for x in (j.outer, j.inner) if x not in tied]
        return tied

    def _jointly(
        self, below: Mapping[int, tuple[Tensor, Tensor]], parent: int, masks: Mapping[int, Tensor | None]
    ) -> float:
        """Classes that joints tie, in one pair of blocks: in turn, each given the others."""
        first, (a, b) = next(iter(below.items()))
        blocks = self.classes[first].blocks[:, self.classes[first].parents.index(parent)]
        i, j = int(blocks[a[0]]), int(blocks[b[0]])
        scores = {k: self._masked(part(self._own(k), *below[k]).cpu(), cast(Tensor, masks[k])).numpy() for k in below}
        pairs = [
            (t.outer, t.inner, t.left[i].numpy(), t.right[j].numpy())
            for t in self.joints
            if {t.outer, t.inner} <= set(below)
        ]
        value, found = _alternate(pairs, scores)
        for k, p in found.items():
            self._settle(k, below[k][0], below[k][1][torch.from_numpy(p)])
        return value

    def _settle(self, k: int, at: Tensor, value: Tensor) -> None:
        full = self.known[k].clone() if k in self.known else torch.full((self.classes[k].size,), -1)
        full[at] = value
        self.known[k] = full


def _best(scores: Tensor) -> Tensor:
    """[.., m, m] -> [..], what the best assignment is worth."""
    m = scores.shape[-1]
    if m == 1:
        return scores[..., 0, 0]
    if m == 2:
        return torch.maximum(*(scores[..., [0, 1], at].sum(-1) for at in ([0, 1], [1, 0])))
    flat = scores.reshape(-1, m, m).numpy()
    here = np.arange(m)
    best = [s[here, linear_sum_assignment(s, maximize=True)[1]].sum() for s in flat]
    return torch.tensor(best, dtype=scores.dtype).reshape(scores.shape[:-2])


def _alternate(
    pairs: Sequence[tuple[int, int, Array, Array]], scores: Mapping[int, Array]
) -> tuple[float, dict[int, Ints]]:
    """Permutations of a few classes, each given the others, from a few starts; and what they are worth.

    In plain arrays: this runs for every pair of groups, on matrices of a few neurons.

    Args:
        pairs: of classes, and the entries [rows of one, columns of the other, rest] of A and of B.
        scores: class -> [n, n], what each permutation is worth by itself.
    """

    def solve(score: Array) -> Ints:
        return linear_sum_assignment(score, maximize=True)[1]

    def given(k: int, p: Mapping[int, Ints]) -> Array:
        score = scores[k]
        for outer, inner, x, y in pairs:
            if k == outer:
                score = score + x.reshape(len(x), -1) @ y[:, p[inner]].reshape(len(y), -1).T
            elif k == inner:
                rows = (t.transpose(1, 0, 2).reshape(t.shape[1], -1) for t in (x, y[p[outer]]))
                score = score + next(rows) @ next(rows).T
        return score

    def worth(p: Mapping[int, Ints]) -> float:
        own = sum(float(s[np.arange(len(s)), p[k]].sum()) for k, s in scores.items())
        return own + sum(float((x * y[p[outer]][:, p[inner]]).sum()) for outer, inner, x, y in pairs)

    here, alone = {k: np.arange(len(s)) for k, s in scores.items()}, {k: solve(s) for k, s in scores.items()}
    outers = {outer for outer, *_ in pairs}
    order = sorted(scores, key=lambda k: k not in outers)
    best, most = here, -np.inf
    for start, turn in ((alone, order), (alone, order[::-1]), (here, order)):
        p, reached = dict(start), -np.inf
        for _ in range(4):
            for k in turn:
                p[k] = solve(given(k, p))
            value = worth(p)
            if value > most:
                best, most = dict(p), value
            if value <= reached + 1e-12:
                break
            reached = value
    return most, best
