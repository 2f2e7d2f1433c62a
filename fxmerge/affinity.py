"""How alike the neurons of all parents are: one matrix per class, from activations or from weights.

With the features of neuron i in x_i (its activations over the data, or the weights around it as seen through what is
already matched), everything that a method needs is in the inner products <x_i, x_j> over the neurons of all parents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import accumulate

import torch
from torch import Tensor

from fxmerge.coupling import Entry, Maps, unstacked
from fxmerge.heap import LARGE, give_back
from fxmerge.ir import AxisClasses, Coupling, Site
from fxmerge.linalg import correlation
from fxmerge.moments import Moments
from fxmerge.products import Factor, Products, kept, part, whole
from fxmerge.symmetry import in_rows


@dataclass(frozen=True, eq=False)
class Affinity:
    """Inner products between the neurons of one class over all parents, [N, N] with N = n_a + n_b + ..

    Attributes:
        inner: mean <x_i, x_j> over samples; of weights <x_i, x_j>, kept as factors. ``raw`` is the matrix.
        covariance: the same after subtracting each neuron's mean, of weights as it is. ``centred`` is the matrix.
        alike: correlations, in [-1, 1]; None for those of ``covariance``.
        widths: (n_a, n_b, ..).
        count: number of samples behind it; 0 for weights.
        sides: ``covariance`` of the places that are not turned, and of those that are; None where that is not known.
        rigid: whether only orthogonal maps leave contractions alone: neurons that are summed over against themselves,
            or whose two sides are not known.
    """

    inner: Tensor | Products
    covariance: Tensor | Products
    alike: Tensor | None
    widths: tuple[int, ...]
    count: int
    sides: tuple[Tensor, Tensor] | None = None
    rigid: bool = False

    @property
    def raw(self) -> Tensor:
        return whole(self.inner)

    @property
    def centred(self) -> Tensor:
        return whole(self.covariance)

    @cached_property
    def correlation(self) -> Tensor:
        """In [-1, 1]."""
        if self.alike is not None:
            return self.alike
        centred = self.centred
        return correlation(centred, centred.diagonal(), centred.diagonal())

    @cached_property
    def score(self) -> Tensor | Products:
        """What an assignment maximises: correlations of activations; of weights inner products, scaled to be like them.

        Weights may be a single number a neuron (a bias alone), of which a correlation sees only the sign.
        """
        return self.correlation if self.count else self.inner / self.inner.diagonal().mean().clamp_min(1e-30)

    @property
    def starts(self) -> list[int]:
        """Where each parent's neurons begin."""
        return [sum(self.widths[:k]) for k in range(len(self.widths))]

    def at(self, members: Sequence[Tensor]) -> Affinity:
        """Of some neurons only: per parent, which."""
        i = torch.cat([m + s for m, s in zip(members, self.starts, strict=True)])
        inner, covariance = (
            x.at(i, i) if isinstance(x, Products) else part(x, i, i) for x in (self.inner, self.covariance)
        )
        alike = None if self.alike is None else part(self.alike, i, i)
        sides = None if self.sides is None else (part(self.sides[0], i, i), part(self.sides[1], i, i))
        return Affinity(inner, covariance, alike, tuple(len(m) for m in members), self.count, sides, self.rigid)

    def joined(self, other: Affinity) -> Affinity:
        """The mean of two, at one scale."""

        def mean(a: Tensor, b: Tensor) -> Tensor:
            a, b = (x / x.diagonal().mean().clamp_min(1e-30) for x in (a, b))
            return (a + b.to(a)) / 2

        alike = (self.correlation + other.correlation.to(self.correlation)) / 2
        covariance, inner = mean(self.centred, other.centred), mean(self.raw, other.raw)
        return replace(self, inner=inner, covariance=covariance, alike=alike, count=max(self.count, other.count))

    def of(self, parents: Sequence[int]) -> Affinity:
        """Of some parents only."""
        everything = [torch.arange(n if p in parents else 0) for p, n in enumerate(self.widths)]
        return replace(self.at(everything), widths=tuple(self.widths[p] for p in parents))

    def between(
        self, matrix: Tensor | Products, a: int, b: int, rows: Tensor | None = None, columns: Tensor | None = None
    ) -> Tensor:
        """The block of one of the matrices between parents a and b, or between some neurons of theirs."""
        found = self.kept_between(matrix, a, b)
        return whole(found) if rows is None or columns is None else part(found, rows, columns)

    def kept_between(self, matrix: Tensor | Products, a: int, b: int) -> Tensor | Products:
        """The block, still as factors where the matrix is kept so."""
        if isinstance(matrix, Products):
            return matrix.at(*(torch.arange(self.widths[p]) + self.starts[p] for p in (a, b)))
        return matrix.split(self.widths)[a].split(self.widths, 1)[b]

    def sizes(self, p: int) -> Tensor:
        """[n_p]: squared norms of one parent's neurons."""
        return self.inner.diagonal().split(self.widths)[p]


def from_moments(taps: Sequence[Moments]) -> Affinity:
    """Pooled over the places where a class shows; each place counts the same, whatever its scale."""
    halves = [[m for m in taps if m.turned is side] for side in (False, True)]
    if all(halves):
        one, other = (_pooled(half).centred for half in halves)
        return replace(_pooled(taps), sides=(one, other))
    return _pooled(taps)


def _pooled(taps: Sequence[Moments]) -> Affinity:
    raw = centred = alike = torch.zeros(())
    for m in taps:
        covariance = m.covariance
        variance = covariance.diagonal()
        scale = variance.mean().clamp_min(1e-30) * len(taps)
        raw = raw.to(covariance) + (covariance + torch.outer(m.mean, m.mean)) / scale
        centred = centred.to(covariance) + covariance / scale
        alike = alike.to(covariance) + correlation(covariance, variance, variance) / len(taps)
    return Affinity(raw, centred, alike, taps[0].widths, min(m.count for m in taps))


def from_weights(
    parents: Sequence[AxisClasses],
    touched: Sequence[Mapping[str, Sequence[Entry]]],
    states: Sequence[Mapping[str, Tensor]],
    k: int,
    settled: Mapping[int, Coupling],
    silent: frozenset[str] = frozenset(),
    who: Sequence[int] | None = None,
) -> Affinity | None:
    """Of the weights that write and read class ``k``, their other axes in the fused network's coordinates.

    Args:
        touched: every parent's ``by_tensor()``.
        who: the parents to compare; default all.

    Only tensors whose other axes are ``settled`` are compared, and none that is ``silent``; None where there is none.
    """
    chosen = list(range(len(parents))) if who is None else list(who)
    maps = Maps(settled)
    trained = [dict(c.traced.source.named_parameters(remove_duplicate=False)) for c in parents]
    widths = tuple(parents[p][k].size for p in chosen)
    factors: list[Factor] = []
    names = sorted({s.parameter for s in parents[0][k].sites} & trained[0].keys() - silent)
    for loose in (False, True):  # a layer between two of the same rows: its numbers, in no order, are all there is
        for name in names if not factors else ():
            rests = {_rest(trained[p][name].shape, touched[p][name], k, settled, loose) for p in chosen}
            if len(rests) == 1 and None not in rests:
                factors.append(partial(_features, states, touched, name, k, chosen, maps, widths))
    if not factors:
        return None
    if parents[0][k].parents:  # asked for cell by cell
        factors = list(map(kept, factors))
    products = Products(factors, (sum(widths), sum(widths)))
    return Affinity(products, products, None, widths, 0)


def _stacks(entries: Sequence[Entry], shape: Sequence[int], k: int) -> list[Site]:
    """The stacks of a tensor, that of class ``k`` first."""
    found = {s: any(s == t and c == k for t, c, _ in entries) for s, _, _ in entries if s.is_stack(shape)}
    return sorted(found, key=lambda s: (not found[s], s))


def _rest(
    shape: Sequence[int], entries: Sequence[Entry], k: int, settled: Mapping[int, Coupling], loose: bool
) -> int | None:
    """How many numbers a tensor has of every neuron of class ``k``; None where its other axes are not settled.

    ``loose``: but for neurons of the same rows.
    """
    if stacks := _stacks(entries, shape, k):
        flat = unstacked(entries, stacks[0], len(shape))
        if all(c != k for _, c, _ in flat) or len(stacks) > 1 + loose:  # rows are told by what is in them
            return None
        sizes = [shape[stacks[0].along] * shape[stacks[0].axis]]
        sizes += [n for d, n in enumerate(shape) if d not in (stacks[0].along, stacks[0].axis)]
        return _rest(sizes, flat, k, settled, loose)
    mine = [(s, i) for s, c, i in entries if c == k]
    others = {(s, c) for s, c, _ in entries if all(s != t for t, _ in mine)}
    if len(mine) != 1 or any(s.groups > 1 for s, _ in mine) or any(c not in settled for _, c in others):
        return None
    if any(s.groups > 1 and shape[1] > 1 for s, _ in others):  # which input is which is not known
        return None
    sizes = list(shape)
    sizes[mine[0][0].axis] = mine[0][1].shape[1]
    for axis in {s.axis for s, _ in others if s.groups == 1} - {mine[0][0].axis}:
        sizes[axis] = sum(settled[c].size * i.shape[1] for s, c, i in entries if (s.axis, s.groups) == (axis, 1))
    return math.prod(sizes)


def _features(
    states: Sequence[Mapping[str, Tensor]],
    touched: Sequence[Mapping[str, Sequence[Entry]]],
    name: str,
    k: int,
    chosen: Sequence[int],
    maps: Maps,
    widths: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """[N, rest], twice: what all parents have of class ``k`` in one tensor."""
    found: Tensor | None = None
    for p, start in zip(chosen, accumulate(widths, initial=0), strict=False):
        rows = _rows(states[p][name], touched[p][name], k, p, maps)
        found = rows.new_empty(sum(widths), rows.shape[1]) if found is None else found
        found[start : start + len(rows)] = rows
        del rows
        if found.nbytes >= LARGE:
            give_back()
    assert found is not None
    return found, found


def _rows(value: Tensor, entries: Sequence[Entry], k: int, p: int, maps: Maps) -> Tensor:
    """[n, rest] of parent p; other axes in the fused network's coordinates."""
    if value.dtype in (torch.float16, torch.bfloat16):
        value = value.float()
    if stacks := _stacks(entries, value.shape, k):
        for other in stacks[1:]:
            value = value.sort(other.axis).values
        entries, value = unstacked(entries, stacks[0], value.dim()), in_rows(value, stacks[0]).flatten(0, 1)
    site, index = next((s, i) for s, c, i in entries if c == k)
    for other in sorted({s for s, _, _ in entries if s.axis != site.axis and s.groups == 1}):
        here = [(c, i) for s, c, i in entries if s == other]
        parts = [maps(c, p, False)(_places(value, other.axis, i), other.axis) for c, i in here]
        value = torch.cat([x.flatten(other.axis, other.axis + 1) for x in parts], other.axis)
    return _places(value, site.axis, index).movedim(site.axis, 0).reshape(len(index), -1)


def _places(value: Tensor, axis: int, index: Tensor) -> Tensor:
    """[.., n, m, ..]: the m places along an axis of each of n neurons."""
    return value.index_select(axis, index.reshape(-1).to(value.device)).unflatten(axis, tuple(index.shape))
