"""Weight matching: Git Re-Basin (Ainsworth et al., arXiv 2209.04836, section 3.2 and algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from fxmerge.coupling import from_permutations
from fxmerge.descent import Descent, arrange, dot, parameters
from fxmerge.errors import InputError
from fxmerge.interfaces import AbstractMatcher, Problem
from fxmerge.ir import Alignment, AxisClasses
from fxmerge.ranks import spread
from fxmerge.stored import Made


class WeightMatching(AbstractMatcher):
    """Permutations that maximise the inner product <A, P(B)> of all parameters, by coordinate descent.

    All classes but one fixed, the rest is a linear assignment; classes are swept until nothing changes. The first
    start goes through the network from its inputs, each class matched on what is already aligned; further starts go
    from the outputs, then in random orders. The best is kept. Needs no data.

    Args:
        restarts: number of starts.
        sweeps: at most this many sweeps a start.

    More than two parents: each is aligned to the first, then in turn to the mean of the others until nothing
    changes.
    """

    def __init__(self, restarts: int = 3, sweeps: int = 50) -> None:
        if restarts < 1 or sweeps < 0:
            raise InputError(
                f"WeightMatching(restarts={restarts}, sweeps={sweeps}): at least one start, no fewer than 0 sweeps"
            )
        self.restarts, self.sweeps = restarts, sweeps

    def match(self, problem: Problem) -> Alignment:
        first = problem.classes[0]
        states = [problem.held(parameters(s, first, problem.apart)) for s in problem.states]
        found = [[torch.arange(c.size) for c in first]]
        bar = tqdm(
            total=(len(states) - 1) * self.restarts, desc="weight matching", disable=not problem.progress, leave=False
        )
        with bar:
            for b in range(1, len(states)):
                best, objective = None, -float("inf")
                silent = problem.silent((0, b))
                target, state = (
                    problem.held(parameters(states[p], first, problem.apart, silent)) if silent else states[p]
                    for p in (0, b)
                )
                start = partial(self._start, problem, target, state)
                for value, permutation in spread(
                    start, range(self.restarts), threads=problem.threads, device=problem.device
                ):
                    if value > objective * (1 + 1e-9) or best is None:
                        best, objective = permutation, value
                    bar.update()
                assert best is not None
                found.append(best)
        if len(states) > 2 and not any(problem.idle):  # with units of their own, to the first alone
            found = self._refine(first, states, found, problem)
        quality = _quality(problem, states, found)
        return from_permutations(first, found, problem.shares, str(self), quality)

    def _start(
        self, problem: Problem, target: Mapping[str, Tensor], state: Mapping[str, Tensor], number: int
    ) -> tuple[float, list[Tensor]]:
        with torch.no_grad():
            descent = Descent(problem.classes[0], target, state, problem.seed + number, room=problem.room)
            if number < 2:
                descent.grow(reverse=number == 1)
            descent.run(self.sweeps)
            return descent.objective(), descent.found

    def _refine(
        self, classes: AxisClasses, states: Sequence[Mapping[str, Tensor]], found: list[list[Tensor]], problem: Problem
    ) -> list[list[Tensor]]:
        moved = [problem.held(arrange(classes, p, s)) for p, s in zip(found, states, strict=True)]
        for _ in range(self.sweeps):
            changed = False
            for k in range(1, len(states)):
                others = [moved[j] for j in range(len(states)) if j != k]
                mean = problem.held(Made(states[0], partial(_mean, others)))
                descent = Descent(classes, mean, states[k], problem.seed, found[k], problem.room)
                if descent.run(self.sweeps):
                    changed = True
                    found[k] = descent.found
                    moved[k] = problem.held(arrange(classes, found[k], states[k]))
            if not changed:
                break
        return found


def _mean(states: Sequence[Mapping[str, Tensor]], name: str) -> Tensor:
    return sum(s[name] for s in states) / len(states)  # type: ignore[return-value]


def _quality(
    problem: Problem, states: Sequence[Mapping[str, Tensor]], found: Sequence[Sequence[Tensor]]
) -> dict[int, float]:
    """Per class: cosine between A's and the others' rows after alignment, averaged."""
    classes = problem.classes[0]
    moved = [problem.held(arrange(classes, p, s)) for p, s in zip(found[1:], states[1:], strict=True)]
    quality = {}
    entries = {n: e for n, e in classes.by_tensor().items() if n in states[0]}
    for k, c in enumerate(classes):
        if not c.free:
            continue
        ab = a2 = b2 = 0.0
        for n, es in entries.items():
            if any(j == k and s not in classes.reads for s, j, _ in es):
                for other in moved:
                    x, y = states[0][n], other[n]
                    ab += dot(x, y)
                    a2 += dot(x, x)
                    b2 += dot(y, y)
        if a2 and b2:
            quality[k] = ab / (a2 * b2) ** 0.5
    return quality
