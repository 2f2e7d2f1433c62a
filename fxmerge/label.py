"""What a value's label is: which neurons stand at its entries, and where these stand. ``labels`` has the verbs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fxmerge.atoms import mix, mix_int, ranks, unique


@dataclass(frozen=True, eq=False)
class Order:
    """What a value that speaks of neurons says: v is the name of ``atoms[v]``; v[i] is where those of atom i end."""

    what: str  # "names", "ends", or "places": of neurons that cannot be told
    atoms: Tensor


@dataclass(frozen=True, eq=False)
class Label:
    """The label of one value; see ``labels``.

    ``learned``: made of parameters and constants alone. ``order``: the values follow the order of some neurons, which
    pins these where a rule without an answer to that uses them.
    """

    shape: tuple[int, ...]
    neurons: tuple[Tensor, ...] = ()
    fixed: tuple[Tensor, ...] = ()
    kind: int = 0
    learned: bool = False
    why: str = "position"
    order: Order | None = None

    @property
    def ndim(self) -> int:
        return len(self.shape)


def varying(t: Tensor) -> tuple[int, ...]:
    return tuple(d for d, size in enumerate(t.shape) if size > 1)


def narrow(t: Tensor) -> Tensor:
    """The same label with size 1 along every dimension in which it does not vary."""
    if not t.numel():  # nothing was found, no box was kept
        return t
    held = t.numpy()
    for d, (size, stride) in enumerate(zip(held.shape, held.strides, strict=True)):
        if size > 1 and (stride == 0 or _constant(held, d)):
            held = held[(slice(None),) * d + (slice(1),)]
    return t if held.size == t.numel() else torch.from_numpy(held)


def _constant(held: np.ndarray, d: int) -> bool:
    first = held[(slice(None),) * d + (slice(1),)]
    last = held[(slice(None),) * d + (slice(-1, None),)]
    # the ends nearly always tell, and cost little
    return bool(first.flat[0] == last.flat[0] and (held == first).all())


def in_boxes(names: np.ndarray) -> bool:
    """Whether each name stands in a box: at a set of indices along every dimension, with no other name between them.

    Places where no name stands (-1, as in windows that reach beyond an edge) may be anywhere.
    """
    names = names[tuple(slice(None) if size > 1 else 0 for size in names.shape)]
    values, rank = ranks(names.ravel())
    if len(values) == names.size:
        return True
    boxes = np.ones(len(values), np.int64)
    for d, size in enumerate(names.shape):
        index = np.arange(size).reshape([-1 if k == d else 1 for k in range(names.ndim)])
        along = unique(rank.reshape(names.shape) * size + index)
        boxes *= np.bincount(along // size, minlength=len(values))
    counts = np.bincount(rank, minlength=len(values))
    filled = (boxes == counts)[values >= 0].all()
    if filled or values[0] >= 0:
        return bool(filled)
    places = np.split(np.argsort(rank, kind="stable"), np.cumsum(counts)[:-1])
    for name, at in zip(values.tolist(), places, strict=True):
        if name >= 0:
            box = names[np.ix_(*map(unique, np.unravel_index(at, names.shape)))]
            if ((box != name) & (box >= 0)).any():
                return False
    return True


def combine(parts: Iterable[int]) -> int:
    """One hash of several, in order."""
    total = 0
    for part in parts:
        total = mix_int(mix_int(total) ^ part)
    return total


def overlap(x: Tensor, y: Tensor) -> bool:
    return max(map(min, x.shape, y.shape), default=0) > 1


def hashed(t: Tensor) -> Tensor:
    return torch.from_numpy(mix(t.numpy()))


def cover(fine: Tensor, coarse: Tensor) -> Tensor:
    """``fine``, and ``coarse`` where no fine neuron stands."""
    if bool((fine >= 0).all()):
        return fine
    return narrow(torch.where(fine >= 0, fine, coarse))


def fold(p: Tensor, gone: Sequence[int], ordered: Sequence[int] = ()) -> Tensor:
    """Fixed identities summed out: as a multiset over ``gone``, as a sequence over ``ordered``."""
    gone = [d for d in gone if p.shape[d] > 1]
    ordered = [d for d in ordered if p.shape[d] > 1]
    if not gone and not ordered:
        return p
    p = hashed(p)
    if gone:
        p = hashed(p.sum(gone, keepdim=True))
    for d in ordered:
        index = torch.arange(p.shape[d]).reshape([-1 if k == d else 1 for k in range(p.dim())])
        p = hashed((hashed(p) * hashed(index)).sum(d, keepdim=True))
    return narrow(p)
