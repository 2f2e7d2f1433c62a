"""Weight matching: Git Re-Basin (Ainsworth et al., arXiv 2209.04836, section 3.2 and algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from fxmerge.coupling import from_permutations
from fxmerge.interfaces import AbstractMatcher, Problem
from fxmerge.ir import Alignment, AxisClasses, Site
from fxmerge.matching import Joint, families, match_family
from fxmerge.symmetry import apply


class WeightMatching(AbstractMatcher):
    """Permutations that maximise the inner product <A, P(B)> of all parameters, by coordinate descent.

    All classes but one fixed, the rest is a linear assignment; classes are swept until nothing changes. The first
    start goes through the network from its inputs, each class matched on what is already aligned; further starts go
    from the outputs, then in random orders. The best is kept. Needs no data.

    Args:
        restarts: number of starts.
        sweeps: at most this many sweeps a start.

    More than two parents: each is aligned to the first, then in turn to the weighted mean of the others until nothing
    changes.
    """

    def __init__(self, restarts: int = 3, sweeps: int = 50) -> None:
        self.restarts, self.sweeps = restarts, sweeps

    def match(self, problem: Problem) -> Alignment:
        first = problem.classes[0]
        states = [_parameters(s, first) for s in problem.states]
        found = [[torch.arange(c.size) for c in first]]
        bar = tqdm(total=(len(states) - 1) * self.restarts, desc="weight matching", disable=not problem.progress, leave=False)
        with bar:
            for state in states[1:]:
                best, objective = None, -float("inf")
                for start in range(self.restarts):
                    descent = _Descent(first, states[0], state, problem.seed + start)
                    if start < 2:
                        descent.grow(reverse=start == 1)
                    descent.run(self.sweeps)
                    value = descent.objective()
                    if value > objective * (1 + 1e-9) or best is None:
                        best, objective = descent.found, value
                    bar.update()
                assert best is not None
                found.append(best)
        if len(states) > 2:
            found = self._refine(first, states, found, problem)
        quality = _quality(first, states, found)
        return from_permutations(first, found, problem.weights, str(self), quality)

    def _refine(
        self, classes: AxisClasses, states: Sequence[Mapping[str, Tensor]], found: list[list[Tensor]], problem: Problem
    ) -> list[list[Tensor]]:
        moved = [arrange(classes, p, s) for p, s in zip(found, states, strict=True)]
        for _ in range(self.sweeps):
            changed = False
            for k in range(1, len(states)):
                rest = [j for j in range(len(states)) if j != k]
                share = sum(problem.weights[j] for j in rest) or 1.0
                mean = {n: sum(problem.weights[j] / share * moved[j][n] for j in rest) for n in states[0]}
                descent = _Descent(classes, mean, states[k], problem.seed, found[k])  # type: ignore[arg-type]
                if descent.run(self.sweeps):
                    changed = True
                    found[k] = descent.found
                    moved[k] = arrange(classes, found[k], states[k])
            if not changed:
                break
        return found


def _parameters(state: Mapping[str, Tensor], classes: AxisClasses) -> dict[str, Tensor]:
    """What is compared: trained tensors with neurons, not running statistics."""
    trained = {n for n, _ in classes.traced.source.named_parameters(remove_duplicate=False)}
    kept = {n: state[n] for n in classes.by_tensor() if n in trained}
    return {n: v.float() if v.dtype in (torch.float16, torch.bfloat16) else v for n, v in kept.items()}


def arrange(classes: AxisClasses, permutation: Sequence[Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """B's tensors with the neurons that stand in for A's in A's places."""
    inverse = [torch.argsort(p) for p in permutation]
    known = {n: v for n, v in state.items()}
    partial = _Subset(classes, known)
    return apply(partial, inverse, known)  # type: ignore[arg-type]


class _Subset:
    """The classes, seen on some tensors only."""

    def __init__(self, classes: AxisClasses, state: Mapping[str, Tensor]) -> None:
        self._tensors = {n: e for n, e in classes.by_tensor().items() if n in state}
        self.aliases: dict[str, tuple[str, ...]] = {}

    def by_tensor(self) -> dict[str, list[tuple[Site, int, Tensor]]]:
        return self._tensors


class _Descent:
    """Coordinate descent over families of classes, from a start."""

    def __init__(
        self,
        classes: AxisClasses,
        target: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
        seed: int,
        start: Sequence[Tensor] | None = None,
    ) -> None:
        self.classes, self.target, self.state = classes, target, state
        self.families = families(classes)
        self.entries = {n: e for n, e in classes.by_tensor().items() if n in target}
        self.found = [torch.arange(c.size) for c in classes] if start is None else list(start)
        self.now = arrange(classes, self.found, state)
        self.rng = torch.Generator().manual_seed(seed)
        self.tensors = [
            sorted({n for n, es in self.entries.items() for _, k, _ in es if k in family}) for family in self.families
        ]

    def objective(self) -> float:
        return sum(float((self.target[n] * self.now[n]).sum(dtype=torch.float64)) for n in self.entries)

    def grow(self, reverse: bool) -> None:
        """A start from the pinned ends inwards: each family matched on what is already settled."""
        settled = {k for k, c in enumerate(self.classes) if not c.free}
        order = list(range(len(self.families)))
        waiting = order[::-1] if reverse else order
        while waiting:
            stuck = []
            for f in waiting:
                scores, joints = self.scores(self.families[f], settled)
                if scores or joints:
                    self.place(f, match_family(self.classes, self.families[f], scores, joints))
                    settled |= set(self.families[f])
                else:
                    stuck.append(f)
            if len(stuck) == len(waiting):
                break
            waiting = stuck

    def run(self, sweeps: int) -> bool:
        """Sweeps until nothing changes; whether anything did."""
        stale = set(range(len(self.families)))
        everything = set(range(len(self.classes)))
        changed = False
        for _ in range(sweeps):
            order = [f for f in torch.randperm(len(self.families), generator=self.rng).tolist() if f in stale]
            if not order:
                break
            for f in order:
                stale.discard(f)
                family = self.families[f]
                scores, joints = self.scores(family, everything)
                old, new = self._value(f), match_family(self.classes, family, scores, joints)
                if all(torch.equal(new[k], torch.arange(len(new[k]))) for k in family):
                    continue
                before = {n: self.now[n] for n in self.tensors[f]}, [self.found[k] for k in family]
                self.place(f, new)
                if self._value(f) <= old + 1e-7 * abs(old):  # rounding, or a joint start that was worse
                    self.now.update(before[0])
                    for k, p in zip(family, before[1], strict=True):
                        self.found[k] = p
                    continue
                changed = True
                stale |= {g for g in range(len(self.families)) if g != f and set(self.tensors[g]) & set(self.tensors[f])}
        return changed

    def _value(self, f: int) -> float:
        return sum(float((self.target[n] * self.now[n]).sum(dtype=torch.float64)) for n in self.tensors[f])

    def place(self, f: int, step: Mapping[int, Tensor]) -> None:
        """Applies a family's permutation on top of the current arrangement."""
        moves = [torch.arange(c.size) for c in self.classes]
        for k, p in step.items():
            moves[k] = p
            self.found[k] = self.found[k][p]
        part = {n: self.now[n] for n in self.tensors[f]}
        self.now.update(arrange(self.classes, moves, part))

    def scores(self, family: Sequence[int], settled: set[int]) -> tuple[dict[int, Tensor], list[Joint]]:
        """Per class [n, n]: inner products of A's rows with B's, as B is arranged now; only over settled neurons."""
        scores: dict[int, Tensor] = {}
        joints: list[Joint] = []
        for name in sorted({n for n, es in self.entries.items() for _, k, _ in es if k in family}):
            entries = self.entries[name]
            a, b = self.target[name], self.now[name]
            mine = set(family)
            grouped = next((e for e in entries if e[0].groups > 1 and e[1] in mine), None)
            if grouped is not None:
                row = next((e for e in entries if e[0].axis == 0 and e[1] in mine), None)
                if row is not None and row[1] != grouped[1]:
                    g = grouped[0].groups
                    shape = (g, a.shape[0] // g, a.shape[1], -1)
                    left, right = (t.reshape(shape).double().cpu() for t in (a, b))
                    joints.append(Joint(row[1], grouped[1], left, right))
                    continue
            for site, k, index in entries:
                if k not in mine or site.groups > 1:
                    continue
                score = self._score(a, b, entries, site, k, index, settled, mine)
                if score is not None:
                    scores[k] = scores[k] + score if k in scores else score
        return scores, joints

    def _score(
        self,
        a: Tensor,
        b: Tensor,
        entries: Sequence[tuple[Site, int, Tensor]],
        site: Site,
        k: int,
        index: Tensor,
        settled: set[int],
        mine: set[int],
    ) -> Tensor | None:
        for other in dict.fromkeys(s for s, _, _ in entries if s != site and s.groups == 1):
            loose = [i for s, c, i in entries if s == other and c not in settled and c not in mine]
            if not loose and not any(c in mine and c not in settled for s, c, _ in entries if s == other):
                continue
            loose += [i for s, c, i in entries if s == other and c in mine and c not in settled]
            mask = torch.ones(a.shape[other.axis], dtype=a.dtype, device=a.device)
            mask[torch.cat([i.reshape(-1) for i in loose]).to(a.device)] = 0
            if not bool(mask.any()):
                return None
            a = a * mask.reshape([-1 if d == other.axis else 1 for d in range(a.dim())])
        n, m = index.shape
        flat = index.reshape(-1).to(a.device)
        left = a.index_select(site.axis, flat).movedim(site.axis, 0).reshape(n, -1)
        right = b.index_select(site.axis, flat).movedim(site.axis, 0).reshape(n, -1)
        return left @ right.T


def _quality(classes: AxisClasses, states: Sequence[Mapping[str, Tensor]], found: Sequence[Sequence[Tensor]]) -> dict[int, float]:
    """Per class: cosine between A's and the others' rows after alignment, averaged."""
    moved = [arrange(classes, p, s) for p, s in zip(found[1:], states[1:], strict=True)]
    quality = {}
    entries = {n: e for n, e in classes.by_tensor().items() if n in states[0]}
    for k, c in enumerate(classes):
        if not c.free:
            continue
        dot = a2 = b2 = 0.0
        for n, es in entries.items():
            if any(j == k and s not in classes.reads for s, j, _ in es):
                for other in moved:
                    x, y = states[0][n], other[n]
                    dot += float((x * y).sum())
                    a2 += float((x * x).sum())
                    b2 += float((y * y).sum())
        if a2 and b2:
            quality[k] = dot / (a2 * b2) ** 0.5
    return quality
