"""Which entry of one neuron stands for which of another, where neurons have several along one axis.

Channels that are added to channels of the same layer, and the halves of a rotary embedding, are one neuron under two
names; so are blocks that were found to be one. Where neuron r moves to r', its entries must go to entries of the same
part: each of a neuron's names along one axis, or as a block, is a *slot*, numbered by the names that it met, then by
index. Blocks and marks that were said of an entry remember its slot, so that neurons of which other things were said
slot for slot are told apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fxmerge.atoms import Atoms, Ints, distinct, mix, pair_ranks, unique, unique_pairs
from fxmerge.label import narrow

_CHOICES = 16  # in how many rounds names that are alike are told apart by choosing among them
_CHOSEN = 0x77


def _ranks(keys: Sequence[Ints], groups: int) -> Ints:
    """The place of every element among those that share the last ``groups`` keys, in order of the other ones."""
    order = np.lexsort(keys)
    fresh = np.zeros(len(order), bool)
    fresh[:1] = True
    for key in keys[len(keys) - groups :]:
        fresh[1:] |= np.diff(key[order]) != 0
    starts = np.flatnonzero(fresh)
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order)) - np.repeat(starts, np.diff(np.r_[starts, len(order)]))
    return rank


def turns(atoms: Atoms, t: Tensor) -> Tensor | None:
    """First, second, .. of the names under which a label tensor holds a neuron, as marks like ``t``.

    None where every neuron has one name. A value that met itself moved (rotary halves), or whose parts met elsewhere,
    has the pair tied, but its two entries are not the same number.
    Names remember that they are here, and which turn they are, so that slots agree with what is said of these.
    """
    names = unique(t.numpy())
    roots = atoms.find(names)
    if distinct(roots):
        part = names[atoms.several(roots)]
        if part.size:
            atoms.note(part, atoms.mark())
        return None
    turn = _ranks((names, atoms.notes(names), roots), 1)
    atoms.note(names[names >= 0], (mix(turn) ^ atoms.mark())[names >= 0])
    return narrow(torch.from_numpy(mix(turn[np.searchsorted(names, t.numpy())])))


def find_slots(atoms: Atoms, met: Sequence[tuple[Tensor, Tensor, bool]]) -> Ints:
    """[atoms], a hash of the slot of every atom; 0 where a neuron has one entry along every axis.

    Slots are such that what met in one neuron met in every other one that may stand in for it, slot for slot: names
    are told apart by those that they met, and where that leaves several alike, one of them is chosen to be the first.
    Neurons in which that ends differently are told apart.

    Args:
        atoms: whose origins are axes.
        met: label tensors that met entry by entry.
    """
    everything = np.arange(atoms.size)
    root, origin = atoms.find(everything), atoms.origin(everything)
    several = np.zeros(atoms.size, bool)
    several[root[_ranks((everything, origin, root), 2) > 0]] = True
    slot = np.zeros(atoms.size, np.int64)
    if not several.any():
        return slot
    meetings: list[tuple[Ints, Ints, Ints]] = []
    for k, (left, right, _) in enumerate(met):
        if _any(several, root, left) and _any(several, root, right):
            x, y = (a.ravel() for a in np.broadcast_arrays(left.numpy(), right.numpy()))
            one = (x >= 0) & (y >= 0) & (root[x] == root[y]) & several[root[x]]
            x, y = unique_pairs(x[one], y[one])
            meetings.append((x, y, np.full(len(x), k)))
    x, y, which = (np.concatenate([m[k] for m in meetings]) if meetings else everything[:0] for k in range(3))
    who = np.flatnonzero(several[root])
    for turn in range(_CHOICES):
        known = 0
        while known < (known := len(unique(atoms.notes(who)))):  # a name is known by those that it met
            notes = atoms.notes(everything)
            atoms.note(x, mix(notes[y]) ^ which)
            atoms.note(y, mix(notes[x]) ^ ~which)
        rank = _ranks((who, atoms.notes(who), origin[who], root[who]), 3)
        alike = who[rank > 0]
        if not alike.size:
            break
        order = alike[np.lexsort((alike, atoms.notes(alike), origin[alike], root[alike]))]
        first = np.r_[True, np.diff(root[order]) != 0]
        if turn == _CHOICES - 1:
            atoms.note(who, rank)
        else:
            atoms.note(order[first], _CHOSEN)
    slot[who] = mix(mix(origin[who]) + _ranks((who, atoms.notes(who), origin[who], root[who]), 2))
    axes, ends = np.zeros(atoms.size, np.int64), np.zeros(atoms.size, np.int64)
    np.add.at(axes, root[who], mix(origin[who]))
    np.add.at(ends, root[who], mix(mix(origin[who]) ^ atoms.notes(who)))
    axis = pair_ranks(axes[several], ends[several])[0]
    differ = np.flatnonzero(several & np.isin(axes, axis[:-1][axis[1:] == axis[:-1]]))
    atoms.tag(differ, ends[differ], "the order in which its entries meet")
    return slot


def _any(several: np.ndarray, root: Ints, t: Tensor) -> bool:
    names = t.numpy()
    return bool(several[root[names[names >= 0]]].any())
