"""Colour refinement: neurons of one colour are those that nothing said of them tells apart.

Every fact (a mark, or that one lives inside the block of another) is about one part of a neuron: one entry of those
that it has along an axis, or what it was before it was found to be one with others. That part is kept with the fact.
"""

from __future__ import annotations

import numpy as np

from fxmerge.atoms import Atoms, Ints, mix, unique

_NONE = np.zeros(0, np.int64)


class Facts:
    """All that was said of neurons, and of which parts of them.

    Args:
        atoms: with what was said of them, which may become more.
        slots: of every atom, 0 where a neuron has one entry along every axis.
    """

    def __init__(self, atoms: Atoms, slots: Ints) -> None:
        self._atoms = atoms
        self.slots = slots.copy()
        self._part = [atoms.slots(slots, kind, who) for kind, who in zip((0, 1, 1), self._said(), strict=True)]

    def _said(self) -> tuple[list[Ints], list[Ints], list[Ints]]:
        """Who was marked; who was said to be in a block; and in which."""
        tags, edges = self._atoms.tags, self._atoms.edges
        return [who for who, _, _ in tags], [child for child, _ in edges], [block for _, block in edges]

    def _atoms_of(self) -> list[Ints]:
        """The atoms that facts are about, and room for the parts of those that are new: these are of whole neurons."""
        said = [np.concatenate(who) if who else _NONE for who in self._said()]
        for k, who in enumerate(said):
            self._part[k] = np.r_[self._part[k], np.zeros(len(who) - len(self._part[k]), np.int64)]
        return said

    def colours(self) -> tuple[Ints, Ints, Ints, Ints]:
        """The neuron of every atom, its colour (where it is a neuron), and every fact (child, block, ..) once."""
        atoms = self._atoms
        everything = np.arange(atoms.size)
        root = atoms.find(everything)
        tagged, child, block = self._atoms_of()
        kinds = np.zeros(atoms.size, np.int64)
        np.add.at(kinds, root, mix(atoms.origin(everything) + 1))
        if tagged.size:
            marks = mix(np.concatenate([m for _, m, _ in atoms.tags]))
            np.add.at(kinds, root[tagged], mix(marks ^ self._part[0]))
        said = mix(self._part[1]) ^ self._part[2]
        if child.size:
            said ^= np.repeat(atoms.roles, [len(c) for c, _ in atoms.edges])
        child, block = root[child], root[block]
        apart = child != block
        child, block, said = child[apart], block[apart], said[apart]
        _, first = np.unique(mix(mix(mix(child) ^ block) ^ said), return_index=True)  # sorting whole rows takes long
        order = first[np.lexsort((said[first], block[first], child[first]))]
        child, block, said = child[order], block[order], said[order]
        colour = _refined(kinds, child, block, said)
        copy_of = self._copies(root, colour, child, block, said)
        return copy_of[root], colour, copy_of[child], copy_of[block]

    def _copies(self, root: Ints, colour: Ints, child: Ints, block: Ints, said: Ints) -> Ints:
        """For every neuron itself, and for a block of which all that is said is said of an earlier one too, that."""
        atoms = self._atoms
        copy_of = np.arange(len(root))
        placed = np.zeros(len(root), bool)  # neurons that are more than blocks
        placed[root[atoms.origin(copy_of) >= 0]] = True
        around = mix(colour)
        np.add.at(around, child, mix(mix(block) ^ said))
        np.add.at(around, block, mix(mix(child) ^ said ^ 0x3333))
        blocks = unique(block[~placed[block]])
        _, first, again = np.unique(around[blocks], return_index=True, return_inverse=True)
        copy_of[blocks] = blocks[first[again]]
        atoms.union(blocks, copy_of[blocks])
        return copy_of

    def unite(self, root: Ints, colour: Ints) -> None:
        """After some neurons became one: what was said of each goes on being said of that part.

        Args:
            root: the neuron of every atom, before.
            colour: of neurons, before; those that became one differ.
        """
        now = self._atoms.find(np.arange(len(root)))
        grown = (np.bincount(now[unique(root)], minlength=len(root)) > 1)[now]
        if not grown.any():
            return
        for part, who in [*zip(self._part, self._atoms_of(), strict=True), (self.slots, np.arange(len(self.slots)))]:
            at = np.flatnonzero(who < len(root))
            at = at[grown[who[at]]]
            part[at] = mix(part[at] ^ colour[root[who[at]]])


def _refined(kinds: Ints, child: Ints, block: Ints, said: Ints) -> Ints:
    """Refines colours until blocks and members tell nothing new apart."""
    colour, count = kinds, 0
    live = unique(np.concatenate([child, block]))
    while child.size:
        distinct = len(unique(colour[live]))
        if distinct == count:
            break
        count = distinct
        finer = mix(colour)
        np.add.at(finer, child, mix(colour[block] ^ said ^ 0x55))
        np.add.at(finer, block, mix(colour[child] ^ said ^ 0x3333))
        colour = finer
    return colour
