"""How alike the neurons of all parents are: one matrix per class, from activations or from weights.

With the features of neuron i in x_i (its activations over the data, or the weights around it as seen through what is
already matched), everything that a method needs is in the inner products <x_i, x_j> over the neurons of all parents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from fxmerge.coupling import Entry, Maps
from fxmerge.ir import AxisClasses, Coupling
from fxmerge.linalg import correlation
from fxmerge.moments import Moments


@dataclass(frozen=True, eq=False)
class Affinity:
    """Inner products between the neurons of one class over all parents, [N, N] with N = n_a + n_b + ..

    Attributes:
        raw: mean <x_i, x_j> over samples (or weights).
        centred: the same after subtracting each neuron's mean: covariances.
        alike: correlations, in [-1, 1]; None for those of ``centred``.
        widths: (n_a, n_b, ..).
        count: number of samples behind it; 0 for weights.
        sides: ``centred`` of the places that are not turned, and of those that are; None where that is not known.
        rigid: whether only orthogonal maps leave contractions alone: neurons that are summed over against themselves,
            or whose two sides are not known.
    """

    raw: Tensor
    centred: Tensor
    alike: Tensor | None
    widths: tuple[int, ...]
    count: int
    sides: tuple[Tensor, Tensor] | None = None
    rigid: bool = False

    @cached_property
    def correlation(self) -> Tensor:
        """In [-1, 1]."""
        size = self.centred.diagonal()
        return correlation(self.centred, size, size) if self.alike is None else self.alike

    @property
    def score(self) -> Tensor:
        """What an assignment maximises: correlations of activations; of weights inner products, scaled to be like them.

        Weights may be a single number a neuron (a bias alone), of which a correlation sees only the sign.
        """
        return self.correlation if self.count else self.raw / self.raw.diagonal().mean().clamp_min(1e-30)

    @property
    def starts(self) -> list[int]:
        """Where each parent's neurons begin."""
        return [sum(self.widths[:k]) for k in range(len(self.widths))]

    def at(self, members: Sequence[Tensor]) -> Affinity:
        """Of some neurons only: per parent, which."""
        i = torch.cat([m + s for m, s in zip(members, self.starts, strict=True)]).to(self.raw.device)
        raw, centred = (x[i][:, i] for x in (self.raw, self.centred))
        alike = None if self.alike is None else self.alike[i][:, i]
        sides = None if self.sides is None else (self.sides[0][i][:, i], self.sides[1][i][:, i])
        return Affinity(raw, centred, alike, tuple(len(m) for m in members), self.count, sides, self.rigid)

    def joined(self, other: Affinity) -> Affinity:
        """The mean of two, at one scale."""

        def mean(a: Tensor, b: Tensor) -> Tensor:
            a, b = (x / x.diagonal().mean().clamp_min(1e-30) for x in (a, b))
            return (a + b.to(a)) / 2

        alike = (self.correlation + other.correlation.to(self.correlation)) / 2
        centred, raw = mean(self.centred, other.centred), mean(self.raw, other.raw)
        return replace(self, raw=raw, centred=centred, alike=alike, count=max(self.count, other.count))

    def of(self, parents: Sequence[int]) -> Affinity:
        """Of some parents only."""
        everything = [torch.arange(n if p in parents else 0) for p, n in enumerate(self.widths)]
        return replace(self.at(everything), widths=tuple(self.widths[p] for p in parents))

    def between(self, matrix: Tensor, a: int, b: int) -> Tensor:
        """The block of one of the matrices between parents a and b."""
        return matrix.split(self.widths)[a].split(self.widths, 1)[b]


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
    trained = {n for n, _ in parents[0].traced.source.named_parameters(remove_duplicate=False)}
    found: Tensor | None = None
    for name in sorted({s.parameter for s in parents[0][k].sites}):
        entries = [t[name] for t in touched]
        mine = [s for s, c, _ in entries[0] if c == k]
        others = {(s, c) for s, c, _ in entries[0] if s not in mine}
        if (
            name not in trained
            or name in silent
            or len(mine) != 1
            or any(s.groups > 1 for s in mine)
            or any(c not in settled for _, c in others)
        ):
            continue
        if any(s.groups > 1 and states[0][name].shape[1] > 1 for s, _ in others):  # which input is which is not known
            continue
        features = []
        for p in chosen:
            value = states[p][name].double()
            for site in sorted({s for s, _, _ in entries[p] if s.axis != mine[0].axis and s.groups == 1}):
                here = [(c, i) for s, c, i in entries[p] if s == site]
                parts = [maps(c, p, False)(_places(value, site.axis, i), site.axis) for c, i in here]
                value = torch.cat([x.flatten(site.axis, site.axis + 1) for x in parts], site.axis)
            index = next(i for s, c, i in entries[p] if c == k and s.axis == mine[0].axis)
            features.append(_places(value, mine[0].axis, index).movedim(mine[0].axis, 0).reshape(len(index), -1))
        if len({f.shape[1] for f in features}) == 1:
            x = torch.cat(features)
            found = x @ x.T if found is None else found.addmm_(x, x.T)
    return None if found is None else Affinity(found, found, None, tuple(parents[p][k].size for p in chosen), 0)


def _places(value: Tensor, axis: int, index: Tensor) -> Tensor:
    """[.., n, m, ..]: the m places along an axis of each of n neurons."""
    return value.index_select(axis, index.reshape(-1).to(value.device)).unflatten(axis, tuple(index.shape))
