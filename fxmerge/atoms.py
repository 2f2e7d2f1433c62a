"""Union-find over neurons, with the facts that tell them apart.

An *atom* is one neuron seen at one place: one index of one axis of one parameter, or a block of such (an attention
head, a group). Rules say three things about atoms and nothing else:

- ``union``: these are the same neuron and always move together;
- ``under``: this one lives inside that block, and moves where the block moves;
- ``tag``: this one carries a mark; only atoms with the same marks can stand in for each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

Ints = NDArray[np.int64]

_WORD = (1 << 64) - 1
_NEVER = np.iinfo(np.int64).max
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_CLOSE = 8  # values of a range this many times as long as their number are marked rather than sorted


def mix(x: Ints | int) -> Ints:
    """A 64-bit hash (splitmix64), elementwise. Sums of it are order-free fingerprints of multisets."""
    z = np.asarray(x).astype(np.uint64)
    if not z.ndim:  # NumPy warns of overflow of scalars
        return np.asarray(mix_int(int(x)))
    z += _GOLDEN
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z.view(np.int64)


def mix_int(x: int) -> int:
    """``mix`` of one Python integer, without the cost of an array."""
    z = (x + 0x9E3779B97F4A7C15) & _WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _WORD
    z ^= z >> 31
    return z - (1 << 64) if z >> 63 else z


def _ascending(x: Ints) -> bool:
    """Whether each value is above the one before: the common case, in which nothing need be sorted."""
    return bool((x[1:] > x[:-1]).all())


def unique(x: Ints) -> Ints:
    """The distinct values, ascending; close together, as atoms are, they are marked and not sorted."""
    x = x.ravel()
    if _ascending(x):
        return x
    low, high = int(x.min()), int(x.max())
    if high - low <= _CLOSE * x.size:
        seen = np.zeros(high - low + 1, bool)
        seen[x - low] = True
        return seen.nonzero()[0] + low
    x = np.sort(x)
    return x[np.r_[True, x[1:] != x[:-1]]]


def ranks(x: Ints) -> tuple[Ints, Ints]:
    """The distinct values, ascending, and for every entry which of them it is."""
    if x.ndim == 1 and _ascending(x):
        return x, np.arange(len(x))
    if x.size and int(x.max()) - int(x.min()) <= _CLOSE * x.size:
        values = unique(x)
        rank = np.empty(int(values[-1] - values[0]) + 1, np.int64)
        rank[values - values[0]] = np.arange(len(values))
        return values, rank[x - values[0]]
    values, rank = np.unique(x, return_inverse=True)
    return values, rank.reshape(x.shape)


def distinct(x: Ints) -> bool:
    """Whether no value occurs twice."""
    return len(unique(x)) == len(x)


def unique_pairs(x: Ints, y: Ints) -> tuple[Ints, Ints]:
    """The distinct pairs of what stands in one place of ``x`` and ``y``, broadcast against each other; sorted."""
    (xs, i), (ys, j) = ranks(x), ranks(y)
    if not xs.size or not ys.size:
        return xs[:0], ys[:0]
    pair = unique(i * len(ys) + j)
    return xs[pair // len(ys)], ys[pair % len(ys)]


def pair_ranks(x: Ints, y: Ints) -> tuple[Ints, Ints, Ints]:
    """The distinct pairs (x[i], y[i]), sorted, and for every i which of them it is."""
    (xs, i), (ys, j) = ranks(x), ranks(y)
    pair, rank = ranks(i * len(ys) + j)
    return xs[pair // len(ys)], ys[pair % len(ys)], rank


def connected(x: Ints, y: Ints) -> tuple[Ints, Ints]:
    """The distinct values, ascending, and which part each is in where x[i] and y[i] are in one."""
    ids, ends = ranks(np.concatenate([x, y]))
    a, b = np.split(ends, 2)
    return ids, connected_components(coo_array((np.ones(len(a)), (a, b)), shape=(len(ids),) * 2), directed=False)[1]


def independent(*columns: Ints) -> bool:
    """Whether, within every connected part, a row holds a value of one column as often whatever the others hold.

    Then each column's values may be permuted by themselves. That all pairs of columns are so does not say it of three:
    of the rows, columns and diagonals of a table, any two tell the third (see ``entangled``).
    """
    ranked, part = [ranks(c)[1] for c in columns], _parts(columns)
    code, expected, met = part, 1.0, np.bincount(part).astype(float)
    total, possible = met[part], np.ones(len(met))
    for r in ranked:
        _, _, code = pair_ranks(code, r)
        expected = expected * np.bincount(r)[r] / total
        possible *= np.bincount(part[_first(r)], minlength=len(met))
    found = np.bincount(code)
    complete = np.bincount(part[_first(code)], minlength=len(met)) == possible
    return bool(complete.all() and np.allclose(found[code], expected * total, rtol=1e-9, atol=0))


def _parts(columns: Sequence[Ints]) -> Ints:
    """The connected part that every row is in: rows are in one where they have a value of any column in common."""
    ranked = [ranks(c)[1] for c in columns]
    width = 1 + max(int(r.max()) for r in ranked)
    pairs = [np.stack([ranked[0], r + k * width]) for k, r in enumerate(ranked[1:], 1)]
    ids, part = connected(*np.concatenate(pairs, 1))
    return part[np.searchsorted(ids, ranked[0])]


def _first(rank: Ints) -> Ints:
    """Where each rank stands first."""
    return np.unique(rank, return_index=True)[1]


def entangled(columns: Sequence[Ints]) -> list[tuple[int, ...]]:
    """The threes of columns of which any two tell nothing of each other, part by part, but together the third."""
    numbers = range(len(columns))
    parts = {
        pair: len(unique(_parts(two))) if independent(*(two := [columns[k] for k in pair])) else 0
        for pair in combinations(numbers, 2)
    }
    found: list[tuple[int, ...]] = []
    for three in combinations(numbers, 3):
        first, *others = (parts[pair] for pair in combinations(three, 2))
        if first and others == [first, first]:
            own = [columns[k] for k in three]
            if len(unique(_parts(own))) == first and not independent(*own):
                found.append(three)
    return found


class Atoms:
    """The growing set of atoms and what is known of them."""

    def __init__(self) -> None:
        self.size = 0
        self._root = np.full(1024, -1)  # the last one stays so: -1, no neuron, is its own root
        self._origin = np.zeros(1024, np.int64)
        self._block = np.zeros(1024, np.int64)
        self._note = np.zeros(1024, np.int64)
        self._tied = np.zeros((2, 1024), np.int64)
        self.edges: list[tuple[Ints, Ints]] = []
        self.roles: list[int] = []
        self.role = 0
        self.tags: list[tuple[Ints, Ints, str | None]] = []
        self._marks = 0

    def fresh(self, count: int, origin: int) -> Ints:
        """``count`` new atoms; ``origin`` names the axis (or block set) that they come from."""
        start, self.size = self.size, self.size + count
        if self.size >= len(self._root):
            capacity = 2 * self.size
            for name, empty in (("_root", -1), ("_origin", 0), ("_block", 0), ("_note", 0)):
                new = np.full(capacity, empty)
                new[:start] = getattr(self, name)[:start]
                setattr(self, name, new)
            self._tied = np.concatenate([self._tied[:, :start], np.zeros((2, capacity - start), np.int64)], 1)
        ids = np.arange(start, self.size)
        self._root[start : self.size] = ids
        self._origin[start : self.size] = origin
        self._block[start : self.size] = -1
        self._tied[:, start : self.size] = _NEVER
        return ids

    def note(self, atoms: Ints, what: Ints | int) -> None:
        """Something about these atoms by themselves, and not about the neurons that they are."""
        np.add.at(self._note, atoms, mix(what))

    def notes(self, atoms: Ints) -> Ints:
        """A hash of all that was noted of each."""
        return self._note[atoms]

    def find(self, ids: Ints) -> Ints:
        """The representative of each atom, which is the earliest atom united with it; -1 (no neuron) stays -1."""
        root = self._root
        found = first = root[ids]
        while not np.array_equal(up := root[found], found):
            found = up
        if found is not first:
            root[ids] = found
        return found

    def origin(self, ids: Ints) -> Ints:
        return self._origin[ids]

    def several(self, roots: Ints) -> np.ndarray:
        """Which neurons were found to have several entries along an axis."""
        return (self._tied[0, roots] < _NEVER) & (roots >= 0)

    def slots(self, slot: Ints, kind: int, facts: Iterable[Ints]) -> Ints:
        """The slot of every atom that facts are about: 0 where a fact is about a neuron as a whole.

        That is so from when all its entries along an axis were found to be one; these are told apart by turns.

        Args:
            slot: of every atom.
            kind: 0 for tags, 1 for edges.
            facts: the atoms of every one of these, in order.
        """
        found = [np.where(n < self._tied[kind, who], slot[who], 0) for n, who in enumerate(facts)]
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def union(self, x: Ints, y: Ints) -> None:
        """Atoms x[i] and y[i] are one neuron."""
        x, y = self.find(x), self.find(y)
        differ = x != y
        low, high = np.minimum(x, y)[differ], np.maximum(x, y)[differ]
        if not low.size:
            return
        if distinct(high) and (low.max() < high.min() or not np.isin(low, high).any()):
            roots = low
        else:  # chains within one call: close them first
            ids, part = connected(low, high)
            first = np.full(part.max() + 1, np.iinfo(np.int64).max)
            np.minimum.at(first, part, ids)
            high, roots = ids, first[part]
        lost = self._block[roots] < 0
        self._block[roots[lost]] = self._block[high[lost]]
        several = (self._origin[roots] == self._origin[high]) | (self._tied[0, high] < _NEVER)
        self._tied[:, roots[several]] = [[len(self.tags)], [len(self.edges)]]
        self._root[high] = roots

    def under(self, child: Ints, block: Ints) -> None:
        """Atom child[i] lives inside block[i]."""
        child, block = self.find(child), self.find(block)
        self.edges.append((child, block))
        self.roles.append(self.role)
        orphan = self._block[child] < 0
        self._block[child[orphan]] = block[orphan]

    def blocks(self, atoms: Ints, group: Ints) -> tuple[Ints, Ints]:
        """Blocks for a partition of atoms: distinct groups, and the block atom of each; known blocks are reused.

        Under the name that they were made with, which says what else they met as (see ``sides``).
        """
        atoms, group = unique_pairs(self.find(atoms), group)
        groups, where = ranks(group)
        named = self._block[atoms]
        known = self.find(named)
        held, block = unique_pairs(where[known >= 0], known[known >= 0])
        if len(held) == len(groups) == len(unique(held)) == len(unique(block)):
            loose = known < 0
            if loose.any():
                self.under(atoms[loose], block[where[loose]])
            block[where[known >= 0]] = named[known >= 0]
            return groups, block
        # in order of their first atom, so that numbering follows the network and not hash values
        earliest = np.full(len(groups), self.size)
        np.minimum.at(earliest, where, atoms)
        fresh = self.fresh(len(groups), -1)[np.argsort(np.argsort(earliest))]
        self.under(atoms, fresh[where])
        return groups, fresh

    def tag(self, atoms: Ints, marks: Ints, reason: str | None = None) -> None:
        """Atom i carries marks[i]; ``reason`` is what a report says of atoms that this leaves without a peer."""
        self.tags.append((atoms, np.broadcast_to(marks, atoms.shape), reason))

    def mark(self) -> int:
        """A mark not used before. Marks depend only on the order of operations, so equal graphs get equal marks."""
        self._marks += 1
        return mix_int(self._marks << 32)

    def pin(self, atoms: Ints, reason: str) -> None:
        """None of these may move: each gets a mark of its own, by order of appearance."""
        roots, first = np.unique(self.find(atoms[atoms >= 0]), return_index=True)
        self.tag(roots, mix(self.mark() + first), reason)
