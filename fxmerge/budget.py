"""Spreading a size budget over classes: which neurons are worth keeping apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array
from torch import Tensor

from fxmerge.errors import InputError
from fxmerge.ir import AxisClasses

_LEVELS = 5
"""Shares of a class kept apart: 0, 1/4, .., 1."""


@dataclass(frozen=True, eq=False)
class Costs:
    """What a network costs as a function of its widths: a sum of products of axis lengths.

    Attributes:
        terms: (factor, per axis (fixed length, ((class, places per neuron), ..))).
        sizes: class -> neurons in one parent.
        parents: how many.
    """

    terms: tuple[tuple[float, tuple[tuple[int, tuple[tuple[int, int], ...]], ...]], ...]
    sizes: Mapping[int, int]
    parents: int

    @staticmethod
    def of(classes: AxisClasses, apart: frozenset[int], parents: int, what: str) -> Costs:
        """Of one parent's tensors: entries, or for "flops" the multiplications they take part in."""
        traced = classes.traced
        trained = dict(traced.source.named_parameters(remove_duplicate=False))
        uses = _positions(classes) if what == "flops" else {}
        terms = []
        for name, entries in classes.by_tensor().items():
            if name not in trained or (what == "flops" and trained[name].dim() < 2):
                continue
            shape = trained[name].shape
            axes = []
            for axis, length in enumerate(shape):
                here = [(k, index.shape[1]) for s, k, index in entries if s.axis == axis and s.groups == 1]
                covered = sum(m * classes[k].size for k, m in here)
                axes.append((length - covered, tuple(here)))
            terms.append((float(uses.get(name, 1)), tuple(axes)))
        sizes = {k: c.size * (parents if k in apart else 1) for k, c in enumerate(classes)}
        return Costs(tuple(terms), sizes, parents)

    def at(self, kept: Mapping[int, int]) -> float:
        """The cost where class k keeps kept[k] neurons of every parent apart."""
        return sum(self.term(t, kept) for t in range(len(self.terms)))

    def term(self, number: int, kept: Mapping[int, int]) -> float:
        """The cost of one tensor."""
        total, axes = self.terms[number]
        for fixed, on in axes:
            total *= fixed + sum(m * (self.sizes[k] + (self.parents - 1) * kept.get(k, 0)) for k, m in on)
        return total


def _positions(classes: AxisClasses) -> dict[str, int]:
    """Parameter -> positions of the output that it is used at, per sample."""
    traced = classes.traced
    found: dict[str, int] = {}
    for node in traced.graph_module.graph.nodes:
        shape = traced.shapes.get(node.name)
        if node.op == "call_module" and shape is not None:
            for name, _ in traced.graph_module.get_submodule(str(node.target)).named_parameters():
                places = int(np.prod(shape[1:])) // max(
                    [1, *(shape[t.axis] for c in classes for t in c.taps if t.node == node.name and t.kind == "made")]
                )
                key = f"{node.target}.{name}"
                found[key] = found.get(key, 0) + max(1, places)  # a layer may run several times
    return found


def spread(losses: Mapping[int, Tensor], costs: Costs, budget: float) -> dict[int, int]:
    """Class -> neurons to keep apart, so that the summed loss of what is merged is least within the budget.

    A mixed-integer linear programme over shares of 0, 1/4, .., 1 per class, solved with HiGHS: the cost is a sum of
    products of two widths, made linear by a joint choice of the two classes' shares for every tensor.

    Args:
        losses: class -> [n], loss of merging a pair, largest first (these are kept apart first).
        costs: of the network.
        budget: over the cost of one parent.
    """
    limit = budget * costs.at({})
    if costs.at({k: len(v) for k, v in losses.items()}) <= limit:
        return {k: len(v) for k, v in losses.items()}
    classes = list(losses)
    steps = {k: [round(len(v) * i / (_LEVELS - 1)) for i in range(_LEVELS)] for k, v in losses.items()}
    gain = {k: [float(v[:s].sum()) for s in steps[k]] for k, v in losses.items()}
    single = {k: np.zeros(_LEVELS) for k in classes}  # cost of each choice, beyond the joint ones
    joint: dict[tuple[int, int], np.ndarray] = {}
    base = 0.0
    for number, (_, axes) in enumerate(costs.terms):
        price = partial(costs.term, number)
        moving = sorted({k for _, on in axes for k, _ in on if k in losses})
        base += price({})
        for k in moving:
            single[k] += [price({k: s}) - price({}) for s in steps[k]]
        for a, b in combinations(moving, 2):
            both = [
                [price({a: x, b: y}) - price({a: x}) - price({b: y}) + price({}) for y in steps[b]] for x in steps[a]
            ]
            joint[a, b] = joint.get((a, b), 0) + np.array(both)
    joint = {p: c for p, c in joint.items() if c.any()}
    count = len(classes) * _LEVELS + len(joint) * _LEVELS**2
    start = {k: i * _LEVELS for i, k in enumerate(classes)}
    begin = {p: len(classes) * _LEVELS + i * _LEVELS**2 for i, p in enumerate(joint)}
    objective, cost = np.zeros(count), np.zeros(count)
    for k in classes:
        objective[start[k] : start[k] + _LEVELS] = -np.array(gain[k])
        cost[start[k] : start[k] + _LEVELS] = single[k]
    for p, c in joint.items():
        cost[begin[p] : begin[p] + _LEVELS**2] = c.ravel()
    rows: list[int] = []
    columns: list[int] = []
    values: list[float] = []
    goal: list[float] = []

    def require(terms: Mapping[int, float], total: float) -> None:
        for column, value in terms.items():
            rows.append(len(goal))
            columns.append(column)
            values.append(value)
        goal.append(total)

    for k in classes:
        require({start[k] + i: 1.0 for i in range(_LEVELS)}, 1.0)
    for a, b in joint:
        for i in range(_LEVELS):
            at = begin[a, b]
            require({start[a] + i: -1.0, **{at + i * _LEVELS + j: 1.0 for j in range(_LEVELS)}}, 0.0)
            require({start[b] + i: -1.0, **{at + j * _LEVELS + i: 1.0 for j in range(_LEVELS)}}, 0.0)
    equal = coo_array((values, (rows, columns)), shape=(len(goal), count)).tocsr()
    scale = max(costs.at({}), 1.0)
    whole = np.zeros(count)
    whole[: len(classes) * _LEVELS] = 1
    found = milp(
        objective,
        integrality=whole,
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(equal, goal, goal),
            LinearConstraint(cost[None] / scale, -np.inf, (limit - base) / scale + 1e-9),
        ],
        options={"time_limit": 20, "mip_rel_gap": 0.01},
    )
    if found.x is None:
        raise InputError(f"no spread of the budget was found within the time limit: {found.message}")
    kept = {k: steps[k][int(found.x[start[k] : start[k] + _LEVELS].argmax())] for k in classes}
    return _filled(kept, losses, costs, limit)


def _filled(kept: dict[int, int], losses: Mapping[int, Tensor], costs: Costs, limit: float) -> dict[int, int]:
    """What quarters leave of the budget goes to the pairs that gain most for their cost, one by one."""
    kept = dict(kept)
    used = costs.at(kept)
    while True:
        options = []
        for k, loss in losses.items():
            step = max(1, len(loss) // 64)
            if kept[k] + step <= len(loss):
                price = costs.at({**kept, k: kept[k] + step}) - used
                if used + price <= limit:
                    options.append((float(loss[kept[k] : kept[k] + step].sum()) / max(price, 1e-9), k, step, price))
        if not options:
            return kept
        _, k, step, price = max(options)
        kept[k] += step
        used += price
