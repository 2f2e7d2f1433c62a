"""Coordinate descent over permutations: the engine of weight matching.

All classes but one fixed, the inner product <A, P(B)> of all parameters is linear in that class's permutation, so the
best one is an assignment (Ainsworth et al., arXiv 2209.04836, algorithm 1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import combinations, product

import torch
from torch import Tensor

from fxmerge.coupling import Entry, unstacked
from fxmerge.ir import AxisClasses, Site
from fxmerge.matching import Joint, families, match_family
from fxmerge.products import Factor, Products
from fxmerge.stored import Made
from fxmerge.symmetry import apply, in_rows

ANY, SUMS = 1, 2
"""How little a family is matched on: any settled neurons, sums over neurons that are not settled."""


def parameters(
    state: Mapping[str, Tensor],
    classes: AxisClasses,
    apart: frozenset[int] = frozenset(),
    silent: frozenset[str] = frozenset(),
) -> Mapping[str, Tensor]:
    """What is compared: trained tensors with neurons that are not ``silent``.

    Not running statistics, nor what a parent keeps for itself (``apart``).
    """
    trained = {n for n, _ in classes.traced.source.named_parameters(remove_duplicate=False)} - silent
    names = [n for n, e in classes.by_tensor().items() if n in trained and not any(k in apart for _, k, _ in e)]

    def single(name: str) -> Tensor:
        value = state[name]
        return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value

    return Made(names, single)


def arrange(classes: AxisClasses, permutation: Sequence[Tensor], state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """B's tensors with the neurons that stand in for A's in A's places."""
    inverse = [torch.argsort(p) for p in permutation]
    return apply(_Part(classes, state), inverse, state)  # type: ignore[arg-type]


class _Part:
    """The classes, seen on some tensors only."""

    def __init__(self, classes: AxisClasses, state: Mapping[str, Tensor]) -> None:
        self._tensors = {n: e for n, e in classes.by_tensor().items() if n in state}
        self.aliases: dict[str, tuple[str, ...]] = {}

    def by_tensor(self) -> dict[str, list[Entry]]:
        return self._tensors


class Descent:
    """Coordinate descent over families of classes, from a start.

    ``room``: bytes of tensors and scores that may be kept from one step to another; what does not fit is made again.
    """

    def __init__(
        self,
        classes: AxisClasses,
        target: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
        seed: int,
        start: Sequence[Tensor] | None = None,
        room: float = math.inf,
    ) -> None:
        self.room = room
        self.classes, self.target, self.state = classes, target, state
        self.families = families(classes)
        self.entries = {n: e for n, e in classes.by_tensor().items() if n in target}
        self.found = [torch.arange(c.size) for c in classes] if start is None else list(start)
        self._arranged: dict[str, Tensor] = {}
        self.rng = torch.Generator().manual_seed(seed)
        self.stale = set(range(len(self.families)))
        self.tensors = [
            sorted({n for n, es in self.entries.items() for _, k, _ in es if k in family}) for family in self.families
        ]

        # single classes that meet every tensor on one axis only: there the assignment's gain is the objective's
        self.linear = {f for f, family in enumerate(self.families) if len(family) == 1 and self._linear(f, family[0])}
        self._lasting = {n for f, names in enumerate(self.tensors) if f not in self.linear for n in names}
        self._kept: dict[int, tuple[Tensor, list[Tensor]]] = {}

    def _linear(self, f: int, k: int) -> bool:
        for n in self.tensors[f]:
            sites = [s for s, c, _ in self.entries[n] if c == k]
            others = {s for s, _, _ in self.entries[n] if s not in sites}
            if len(sites) > 1 or len(others) > 1 or any(s.groups > 1 for s in (*sites, *others)):
                return False
        return True

    def objective(self) -> float:
        return sum(dot(self.target[n], self.now(n)) for n in self.entries)

    def now(self, name: str) -> Tensor:
        """One of B's tensors with its neurons where they are matched to now."""
        if name in self._arranged:
            return self._arranged[name]
        tensor = arrange(self.classes, self.found, {name: self.state[name]})[name]
        if name in self._lasting and self._fits(tensor):
            self._arranged[name] = tensor
        return tensor

    def _fits(self, tensor: Tensor) -> bool:
        if self.room == math.inf:
            return True
        kept = [*self._arranged.values(), *(score for score, _ in self._kept.values())]
        return sum(t.nbytes for t in kept) + tensor.nbytes <= self.room

    def grow(self, reverse: bool) -> None:
        """A start from the pinned ends inwards: each family matched on what is already settled.

        What shows one number a neuron (biases, scales) waits for more, as long as another family can go on. Where no
        family meets settled neurons alone (two axes of one tensor, and nothing else), one is matched on sums over the
        others, which do not depend on their order.
        """
        settled = set(range(len(self.classes))) - {k for family in self.families for k in family}
        order = list(range(len(self.families)))
        waiting = order[::-1] if reverse else order
        eager = 0
        while waiting and eager <= SUMS:
            stuck = []
            for f in waiting:
                scores, joints = self.scores(self.families[f], settled, eager)
                if scores or joints:
                    self.place(f, match_family(self.classes, self.families[f], scores, joints))
                    settled |= set(self.families[f])
                    if all(k in settled for n in self.tensors[f] for _, k, _ in self.entries[n]):
                        self.stale.discard(f)  # nothing that it was matched on moves again
                    eager = 0
                else:
                    stuck.append(f)
            if len(stuck) == len(waiting):
                eager += 1
            waiting = stuck

    def run(self, sweeps: int) -> bool:
        """Sweeps until nothing changes; whether anything did."""
        everything = set(range(len(self.classes)))
        changed = False
        for _ in range(sweeps):
            order = [f for f in torch.randperm(len(self.families), generator=self.rng).tolist() if f in self.stale]
            if not order:
                break
            for f in order:
                self.stale.discard(f)
                family = self.families[f]
                if f in self.linear:
                    scores = {family[0]: self._updated(f, family[0])}
                    new = match_family(self.classes, family, scores)
                else:
                    new = match_family(self.classes, family, *self.scores(family, everything))
                if all(torch.equal(new[k], torch.arange(len(new[k]))) for k in family):
                    continue
                if f in self.linear:  # the score says it all
                    score = scores[family[0]]
                    chosen = score.gather(1, new[family[0]].to(score.device)[:, None])
                    old, gained = float(score.diagonal().sum()), float(chosen.sum())
                    if gained <= old + 1e-6 * abs(old):  # rounding
                        continue
                    self.place(f, new)
                else:
                    old = self._value(f)
                    before = {n: t for n, t in self._arranged.items() if n in self.tensors[f]}, list(self.found)
                    self.place(f, new)
                    if self._value(f) <= old + 1e-6 * abs(old):  # rounding, or a joint start that was worse
                        for n in self.tensors[f]:
                            self._arranged.pop(n, None)
                        self._arranged |= before[0]
                        self.found = before[1]
                        continue
                changed = True
                self.stale |= {
                    g for g in range(len(self.families)) if g != f and set(self.tensors[g]) & set(self.tensors[f])
                }
        return changed

    def _value(self, f: int) -> float:
        return sum(dot(self.target[n], self.now(n)) for n in self.tensors[f])

    def place(self, f: int, step: Mapping[int, Tensor]) -> None:
        """Applies a family's permutation on top of the current arrangement."""
        for k, p in step.items():
            self.found[k] = self.found[k][p]
        for n in self.tensors[f]:
            self._arranged.pop(n, None)

    def scores(
        self, family: Sequence[int], settled: set[int], eager: int = ANY
    ) -> tuple[dict[int, Tensor | Products], list[Joint]]:
        """Per class [n, n]: inner products of A's rows with B's, as B is arranged now; only over settled neurons.

        Nothing where these show no more than one number a neuron, unless ``eager`` is ``ANY``. With ``SUMS``, also of
        the sums over neurons that are not settled.
        """
        several = eager > 0
        scores: dict[int, Tensor] = {}
        factors: dict[int, list[Factor]] = {}
        joints: list[Joint] = []
        mine = set(family)
        for name in sorted({n for n, es in self.entries.items() for _, k, _ in es if k in family}):
            entries = self.entries[name]
            a, b = self.target[name], self.now(name)
            pairs = self._grouped(entries, mine)
            if pairs and a.shape[1] > 1 and a.shape[0] > pairs[0][1][0].groups:
                joints += [joint for row, column in pairs for joint in self._joint(a, b, row, column)]
                continue
            stacks = sorted({s for s, _, _ in entries if s.is_stack(a.shape)})
            own = [s for s in stacks if any(s == t and k in mine for t, k, _ in entries)]
            if len(own) > 1:
                joints += self._stacked_joints(a, b, [e for e in entries if e[0] in own])
                continue
            stack = next(iter([*own, *stacks]), None)
            if any(s in stacks and s != stack and k not in settled for s, k, _ in entries):
                continue
            if stack is not None:
                entries = unstacked(entries, stack, a.dim())
                a, b = (in_rows(t, stack).flatten(0, 1) for t in (a, b))
            for site, k, index in entries:
                if k not in mine or site.groups > 1:
                    continue
                rows = self._rows(a, b, entries, site, index, settled, mine, eager == SUMS)
                if rows is None:
                    continue
                several |= a.numel() > index.numel()
                if own:  # of all rows at once they may be larger than the networks
                    factors.setdefault(k, []).append(partial(_held, *rows))
                else:
                    part = rows[0] @ rows[1].T
                    scores[k] = scores[k] + part if k in scores else part
        products = {k: Products(found, (self.classes[k].size,) * 2) for k, found in factors.items()}
        return ({**scores, **products}, joints) if several or joints else ({}, [])

    @staticmethod
    def _grouped(entries: Sequence[Entry], mine: set[int]) -> list[tuple[Entry, Entry]]:
        """Rows of a grouped weight and columns of its groups, where both are to be matched."""
        columns = [e for e in entries if e[0].groups > 1 and e[1] in mine]
        rows = [e for e in entries if e[0].axis == 0 and e[1] in mine]
        return [(r, c) for c in columns for r in rows if r[1] != c[1]]

    def _joint(self, a: Tensor, b: Tensor, row: Entry, column: Entry) -> list[Joint]:
        """What a grouped weight says of rows and columns that are in the same blocks; several groups may be one block.

        Nothing where one of them lives deeper in the blocks: it is matched by what other tensors say.
        """
        outer, inner = self.classes[row[1]], self.classes[column[1]]
        if outer.parents != inner.parents:
            return []
        blocks, inside = self.classes[outer.parents[0]].size, a.shape[1]
        places = [
            i[torch.argsort(c.blocks[:, 0], stable=True)].unflatten(0, (blocks, -1))
            for c, (_, _, i) in ((outer, row), (inner, column))
        ]  # [blocks, members of a block, places of each]
        groups = [p // size for p, size in zip(places, (a.shape[0] // column[0].groups, inside), strict=True)]
        tensors = [t.double().cpu() for t in (a, b)]
        found = []
        for x, y in product(range(places[0].shape[2]), range(places[1].shape[2])):
            if bool((groups[0][:, :, None, x] == groups[1][:, None, :, y]).all()):
                at = places[0][:, :, None, x], places[1][:, None, :, y] % inside
                found.append([t[at].flatten(3) for t in tensors])
        return [Joint(row[1], column[1], *(torch.cat(t, -1) for t in zip(*found, strict=True)))] if found else []

    def _stacked_joints(self, a: Tensor, b: Tensor, entries: Sequence[Entry]) -> list[Joint]:
        """What a tensor says of neurons on two of its axes, both with neurons of their own in every row."""
        found = []
        for (one, outer, left), (other, inner, right) in combinations(entries, 2):
            if one == other or self.classes[outer].parents != self.classes[inner].parents:
                continue
            order = [one.along, one.axis, other.axis]
            tensors = [t.double().cpu().movedim(order, (0, 1, 2)) for t in (a, b)]
            places = [
                i[torch.argsort(self.classes[k].blocks[:, 0], stable=True)].unflatten(0, (one.groups, -1))
                for k, i in ((outer, left), (inner, right))
            ]  # [rows, members of a row, places of each]
            at = [p % n for p, n in zip(places, tensors[0].shape[1:3], strict=True)]
            row = torch.arange(one.groups)[:, None, None]
            parts = [
                [t[row, at[0][:, :, None, x], at[1][:, None, :, y]].unsqueeze(-1).flatten(3) for t in tensors]
                for x, y in product(range(left.shape[1]), range(right.shape[1]))
            ]
            found.append(Joint(outer, inner, *(torch.cat(t, -1) for t in zip(*parts, strict=True))))
        return found

    @staticmethod
    def _rows(
        a: Tensor,
        b: Tensor,
        entries: Sequence[Entry],
        site: Site,
        index: Tensor,
        settled: set[int],
        mine: set[int],
        sums: bool,
    ) -> tuple[Tensor, Tensor] | None:
        """What belongs to each neuron in A and in B, as far as the other axes are settled."""
        for other in dict.fromkeys(s for s, _, _ in entries if s != site and s.groups == 1):
            loose = [i for s, c, i in entries if s == other and c not in settled and c not in mine]
            if not loose and not any(c in mine and c not in settled for s, c, _ in entries if s == other):
                continue
            loose += [i for s, c, i in entries if s == other and c in mine and c not in settled]
            mask = torch.ones(a.shape[other.axis], dtype=a.dtype, device=a.device)
            mask[torch.cat([i.reshape(-1) for i in loose]).to(a.device)] = 0
            known = mask.reshape([-1 if d == other.axis else 1 for d in range(a.dim())])
            if sums:
                a, b = (
                    torch.cat([t * known, (t - t * known).sum(other.axis, keepdim=True)], other.axis) for t in (a, b)
                )
            elif not bool(mask.any()):
                return None
            else:
                a = a * known
        return _rows(a, site.axis, index), _rows(b, site.axis, index)

    def _updated(self, f: int, k: int) -> Tensor:
        """The score of one class given all others, brought up to date from when it was last asked for.

        It is kept in B's own order of class k, so only those neurons of other classes that moved since then enter.
        """
        score, then = self._kept.pop(k, (None, None))
        for name in self.tensors[f]:
            a, b = self.target[name], self.state[name]
            site, index = next((s, i) for s, c, i in self.entries[name] if c == k)
            rest = [(s.axis, c, i) for s, c, i in self.entries[name] if s != site]
            if rest:
                axis = rest[0][0]
                here, before, now = (x.to(b.device) for x in self._moved(rest, then))
                a, reached = a.index_select(axis, here), b.index_select(axis, now)
                b = reached if then is None else reached.sub_(b.index_select(axis, before))
                del reached
            elif then is not None:
                continue
            a = _rows(a, site.axis, index)  # one after the other: each may be a copy
            b = _rows(b, site.axis, index).T
            score = a @ b if score is None else score.addmm_(a, b)
        if score is None:  # in no tensor that is compared
            n = self.classes[k].size
            return torch.zeros(n, n)
        if self._fits(score):
            self._kept[k] = score, list(self.found)
        return score.index_select(1, self.found[k].to(score.device))

    def _moved(
        self, entries: Sequence[tuple[int, int, Tensor]], then: Sequence[Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Places along an axis whose neuron of B is another than ``then`` (all places without): which, before, now."""
        places: list[tuple[Tensor, Tensor, Tensor]] = []
        for _, c, index in entries:
            now = self.found[c]
            before = now if then is None else then[c]
            moved = torch.arange(len(now)) if then is None else (now != before).nonzero()[:, 0]
            places.append((index[moved].reshape(-1), index[before[moved]].reshape(-1), index[now[moved]].reshape(-1)))
        here, old, new = (torch.cat(x) for x in zip(*places, strict=True))
        return here, old, new


def _held(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x, y


def dot(x: Tensor, y: Tensor) -> float:
    return float(torch.dot(x.reshape(-1), y.reshape(-1)))


def _rows(value: Tensor, axis: int, index: Tensor) -> Tensor:
    """[n, rest]: what belongs to each neuron of a class."""
    n, flat = len(index), index.reshape(-1)
    if len(flat) != value.shape[axis] or not torch.equal(flat, torch.arange(len(flat))):
        value = value.index_select(axis, flat.to(value.device))
    return value.movedim(axis, 0).reshape(n, -1)
