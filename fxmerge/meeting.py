"""How neurons that meet are related: what labels are made of, and the pointwise verb ``align``."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from fxmerge.atoms import (
    Atoms,
    Ints,
    connected,
    distinct,
    entangled,
    independent,
    mix,
    mix_int,
    ranks,
    unique,
    unique_pairs,
)
from fxmerge.ir import Site
from fxmerge.label import Label, Order, combine, cover, hashed, in_boxes, narrow, overlap, varying
from fxmerge.slots import turns


class Meeting:
    """Neurons of one network, and what is known of them from where they met."""

    def __init__(self, atoms: Atoms) -> None:
        self.atoms = atoms
        self.sites: list[Site] = []  # origin -> site
        self.starts: list[int] = []  # origin -> its first atom
        self.reads: set[Site] = set()
        self.contracting: set[str] = set()  # nodes at which a contraction with parameters ran
        self.place = "the graph"  # the node at work, for reasons
        self._places: dict[tuple[int, int], Tensor] = {}
        self.met: list[tuple[Tensor, Tensor, bool]] = []  # what met entry by entry, and whether to be summed over
        self._summed: Collection[int] = ()  # the dimensions that are
        self.sorted: list[tuple[Tensor, Tensor, str]] = []  # rows, the atoms in whose order they stand, and where

    # -- making labels -------------------------------------------------------------------------------------------

    def site(self, site: Site, size: int) -> Ints:
        """Fresh atoms for one axis of one parameter."""
        self.sites.append(site)
        self.starts.append(self.atoms.size)
        return self.atoms.fresh(size, len(self.sites) - 1)

    def positions(self, shape: Sequence[int], dims: Iterable[int] | None = None) -> tuple[Tensor, ...]:
        """Fixed identities along each of ``dims`` (default: all): place i of n on the d-th axis from the end."""
        made = []
        for d in range(len(shape)) if dims is None else dims:
            if shape[d] > 1:
                key = (len(shape) - d, shape[d])
                if key not in self._places:
                    start = mix_int(mix_int(key[0]) ^ key[1])
                    self._places[key] = torch.from_numpy(mix(start + np.arange(shape[d])))
                made.append(self._places[key].reshape([-1 if k == d else 1 for k in range(len(shape))]))
        return tuple(made)

    def constant(self, value: Tensor) -> Label:
        """A tensor that is no parameter: entries of equal value are alike, all others are told apart."""
        shape, kind = tuple(value.shape), self.atoms.mark()
        value = value.detach().cpu()
        if value.numel() <= 1 or bool((value == value[(0,) * value.ndim]).all()):
            return Label(shape, kind=kind, learned=True)
        _, ids = torch.unique(torch.view_as_real(value) if value.is_complex() else value, return_inverse=True)
        ids = narrow(ids[..., 0] if value.is_complex() else ids)
        fixed = () if not varying(ids) else (torch.from_numpy(mix(kind + ids.numpy())),)
        return Label(shape, fixed=fixed, kind=kind, learned=True, why="constant values")

    def told(self, marks: Tensor) -> Label:
        """Entries of different marks are told apart."""
        t = narrow(marks)
        return Label(tuple(marks.shape), fixed=(hashed(t),) if varying(t) else (), learned=True)

    def unknown(self, shape: Sequence[int]) -> Label:
        """A value of which nothing is known: every entry stands where it stands."""
        return Label(tuple(shape), fixed=self.positions(shape), kind=self.atoms.mark())

    def pin(self, label: Label, reason: str) -> None:
        for t in label.neurons:
            self.atoms.pin(t.numpy().ravel(), reason)

    def settle(self, label: Label) -> Label:
        """The label of a value that is used for what it says of an order: that order may not change."""
        if label.order is None:
            return label
        self.atoms.pin(label.order.atoms.numpy(), f"the order along an axis matters ({self.place})")
        return replace(label, order=None)

    def same_names(self, one: Order, other: Order | None) -> bool:
        """Whether two values name the same neurons by the same numbers."""
        if other is None or {one.what, other.what} != {"names"}:
            return False
        return np.array_equal(self._roots(one.atoms), self._roots(other.atoms))

    def rows(self, count: int, order: Order) -> Tensor:
        """Fresh atoms for rows sorted by names: these may move only if nothing tells the rows apart."""
        rows = torch.from_numpy(self.atoms.fresh(count, -1))
        self.sorted.append((rows, order.atoms, self.place))
        return rows

    def stand_in(self, label: Label, atoms: Tensor) -> bool:
        """Whether the entries of a value along its first axis were sorted by the names of these atoms."""
        along = [self._roots(t).ravel() for t in label.neurons if varying(t) == (0,)]
        return any(
            np.array_equal(self._roots(names), self._roots(atoms)) and np.array_equal(self._roots(rows), t)
            for rows, names, _ in self.sorted
            for t in along
        )

    def holds_rows(self, label: Label) -> bool:
        """Whether a value stands in rows that were sorted by names."""
        if not self.sorted:
            return False
        rows = np.concatenate([self._roots(rows) for rows, _, _ in self.sorted])
        return any(bool(np.isin(self._roots(t), rows).any()) for t in label.neurons)

    def settle_rows(self) -> None:
        """At the end: names stay where rows that were sorted by them are told apart. Rows are no neurons."""
        everything = np.arange(self.atoms.size)
        for rows, names, place in self.sorted:
            roots, all_roots = self._roots(rows), self.atoms.find(everything)
            told = not distinct(np.sort(roots)) or bool(
                (self.atoms.origin(everything)[np.isin(all_roots, roots)] >= 0).any()
            )
            told |= any(np.isin(self.atoms.find(np.concatenate(edge)), roots).any() for edge in self.atoms.edges)
            for who, marks, _ in self.atoms.tags:
                at = np.isin(self.atoms.find(who), roots)
                if at.any():
                    total = np.zeros(self.atoms.size, np.int64)
                    np.add.at(total, self.atoms.find(who[at]), mix(marks[at]))
                    told |= not (total[roots] == total[roots[0]]).all()
            if told:
                self.atoms.pin(names.numpy(), f"rows sorted by it are told apart ({place})")
            self.atoms.union(np.full(len(roots) - 1, roots[0]), roots[1:])

    # -- meeting -------------------------------------------------------------------------------------------------

    def align(self, *labels: Label, shape: Sequence[int] | None = None) -> Label:
        """A pointwise operation with broadcasting: what meets in an entry is related.

        One-to-one: the same neurons. Many-to-one: neurons inside blocks. All-to-all, or nothing shared: independent.
        """
        shape = tuple(torch.broadcast_shapes(*(x.shape for x in labels))) if shape is None else tuple(shape)
        learned = all(x.learned for x in labels)
        if len(labels) == 1 and labels[0].shape == shape:
            return labels[0]

        def lift(t: Tensor) -> Tensor:
            missing = len(shape) - t.dim()
            return t.reshape((1,) * missing + tuple(t.shape)) if missing else t

        neurons: list[Tensor] = []
        for label in labels:
            for k, t in enumerate(map(lift, label.neurons)):
                neurons = self._meet(neurons, t, k)
        held = {id(t): t for t in (*neurons, *(lift(t) for label in labels for t in label.neurons))}
        fixed = self._turns([], held.values())
        for label in labels:
            for t in map(lift, label.fixed):
                fixed = self._tell_apart(fixed, t)
        why = next((x.why for x in labels if x.fixed and x.why != "position"), "position")
        merged, fixed = self._boxed(self._merged(neurons), fixed)
        free = [
            t for t in merged if not any(overlap(t, p) and self._given(t, p, self._reason(labels, t)) for p in fixed)
        ]
        self._pin_entangled(free, fixed)
        return Label(shape, tuple(free), tuple(fixed), combine(x.kind for x in labels), learned, why)

    @staticmethod
    def _reason(labels: Sequence[Label], t: Tensor) -> str:
        """Why neurons are told apart: the first label with a fixed identity along their dimensions says so."""
        from_end = {t.dim() - d for d in varying(t)}
        return next(
            (x.why for x in labels if any(from_end & {p.dim() - d for d in varying(p)} for p in x.fixed)), "position"
        )

    def _turns(self, known: list[Tensor], ts: Iterable[Tensor]) -> list[Tensor]:
        """Adds which turn it is where a value holds neurons under several names."""
        for t in ts:
            if (marks := turns(self.atoms, t)) is not None:
                known = self._tell_apart(known, marks)
        return known

    def _merged(self, neurons: Iterable[Tensor]) -> tuple[Tensor, ...]:
        """Under the first of several names along dimensions in which all are of one neuron: no room for the others."""

        def thin(t: Tensor) -> Tensor:
            for d, size in enumerate(narrow(torch.from_numpy(self._roots(t))).shape):
                t = t.narrow(d, 0, 1) if size < t.shape[d] else t
            return t

        return tuple(t if len(varying(t)) < 2 else thin(t) for t in neurons)

    def _boxed(self, neurons: Sequence[Tensor], fixed: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Neurons that stand in a pattern stay in place where the pattern matters; then they are fixed identities.

        What stands at (i, j) for all i of a set and all j of another is known by what it meets along either dimension.
        A table read at (i - j) mod n meets everything along both, and still may not be permuted.
        """
        kept = []
        for k, t in enumerate(neurons):
            others = (*neurons[:k], *neurons[k + 1 :], *fixed) if len(varying(t)) > 1 else ()
            if any(overlap(t, u) for u in others) and not in_boxes(t.numpy()):
                self.atoms.pin(t.numpy().ravel(), f"stands in a pattern at {self.place}")
                fixed = self._tell_apart(fixed, hashed(t))
            else:
                kept.append(t)
        return kept, fixed

    def _pin_entangled(self, neurons: Sequence[Tensor], fixed: Sequence[Tensor]) -> None:
        """Neurons of which any two tell the third, or tell what is fixed, along the dimensions of all three, stay."""
        told = [
            (t, {*along}, neuron)
            for neuron, ts in ((True, neurons), (False, fixed))
            for t in ts
            if (along := varying(t))
        ]
        for three in combinations(told, 3):
            shared = three[0][1] & three[1][1] & three[2][1]
            if not shared or not any(neuron for _, _, neuron in three):
                continue
            common = tuple(slice(None) if d in shared else 0 for d in range(three[0][0].dim()))
            marks = ((self._roots(t) if neuron else t.numpy())[common] for t, _, neuron in three)
            if entangled([m.ravel() for m in marks]):
                names = np.concatenate([t.numpy().ravel() for t, _, neuron in three if neuron])
                self.atoms.pin(names, f"entangled at {self.place}")

    def _meet(self, known: list[Tensor], new: Tensor, number: int = 0) -> list[Tensor]:
        """``known`` with ``new`` related to each of its members, and what another member implies left out.

        Where an entry belongs to several neurons (products of all with all), it is in each in another role.

        Args:
            number: of ``new`` among the tensors of its label.
        """
        if new.numel() == 1 and any(t.numel() == 1 and t.item() == new.item() for t in known):
            return known  # one neuron all over, said before
        kept, role = [], number << 32
        for t in known:
            if not overlap(t, new):
                kept.append(t)
                continue
            self.atoms.role = role
            finer = self._relate(t, new)
            self.atoms.role, role = 0, role + 1
            if finer == "both":
                kept.append(t)
            elif finer == "left":
                new = cover(t, new)
            else:
                new = cover(new, t)
        return [*kept, new]

    def _roots(self, t: Tensor) -> Ints:
        return self.atoms.find(t.numpy())

    def _relate(self, left: Tensor, right: Tensor) -> str:
        """Relates two label tensors and says which determines the other: "left", "right" or "both" (neither)."""
        if left is right:
            return "left"
        self.met.append((left, right, any(left.shape[d] > 1 and right.shape[d] > 1 for d in self._summed)))
        x, y = np.broadcast_arrays(self._roots(left), self._roots(right))
        x, y = x.ravel(), y.ravel()
        small = "left" if left.numel() <= right.numel() else "right"
        if np.array_equal(x, y):
            return small
        standing = (x >= 0) & (y >= 0)
        if not standing.all():
            x, y = x[standing], y[standing]
        finer = self.relate(x, y)
        if finer != "same":
            return finer
        for side, t in enumerate((left, right)):
            names = unique(t.numpy())
            self.atoms.note(names[names >= 0], 2 * len(self.met) + side)
        return small

    def relate(self, x: Ints, y: Ints) -> str:
        """Atoms x[i] and y[i] meet. Which determines the other: "same" (each), "left", "right" or "both" (neither)."""
        atoms, met = self.atoms, (x, y)
        one_y, one_x = distinct(x), distinct(y)
        if not (one_y and one_x):
            x, y = unique_pairs(x, y)
            one_y, one_x = distinct(x), distinct(y)
        if one_y and one_x:
            atoms.union(x, y)
            return "same"
        if one_y or one_x:
            fine, coarse = (x, y) if one_y else (y, x)
            # from each axis at most one neuron per coarse neuron: then they can only move together
            if len(unique_pairs(atoms.origin(fine), coarse)[0]) == len(fine):
                atoms.union(fine, coarse)
            else:
                atoms.under(fine, coarse)
            return "left" if one_y else "right"
        ids, part = connected(x, y)
        if not independent(*met):
            atoms.pin(ids, f"entangled at {self.place}")
        elif part.max() > 0:  # all meet all, within blocks
            atoms.blocks(ids, part)
        return "both"

    def _tell_apart(self, known: list[Tensor], new: Tensor) -> list[Tensor]:
        """Adds a fixed identity; those that share a dimension are combined into their pair.

        Not before a sum over what they share, where each says enough by itself: pairs would vary in all dimensions.
        """
        kept = []
        for t in known:
            if not overlap(t, new) or self._share_sums(t, new):
                kept.append(t)
            elif t is not new and not torch.equal(t, new):
                new = narrow(hashed(hashed(t) * 3 + new))
        return [*kept, new] if varying(new) else kept

    def _share_sums(self, x: Tensor, y: Tensor) -> bool:
        """Whether two tensors share what is to be summed over, and each varies where the other does not."""
        one, two = set(varying(x)), set(varying(y))
        return bool(one & two & {*self._summed}) and not (one <= two or two <= one)

    def _given(self, t: Tensor, fixed: Tensor, why: str) -> bool:
        """Whether a fixed identity alone determines the neuron; then the neuron cannot move, and is marked so."""
        roots = self._roots(t)
        everywhere = bool((roots >= 0).all())
        if over := tuple(d for d in varying(t) if fixed.shape[d] == 1):  # one identity for all of these
            high = roots.max(over, keepdims=True)
            low = np.where(roots < 0, high, roots).min(over, keepdims=True)
            if (low != high).any():
                return False
            roots = high

        def pairs(fixed: Tensor) -> tuple[Ints, Ints]:
            x, p = unique_pairs(roots, fixed.numpy())
            return x[x >= 0], p[x >= 0]

        part = fixed
        for d in varying(fixed):
            part = part.narrow(d, 0, 1) if t.shape[d] == 1 else part
        if part.numel() < fixed.numel() and not distinct(pairs(part)[1]):
            return False
        x, p = pairs(fixed)
        if not distinct(p):
            return False
        self._mark(x, mix(p), f"{why} ({self.place})")
        return everywhere

    def _mark(self, atoms: Ints, marks: Ints, reason: str) -> None:
        """Tags each atom with the multiset of its marks in this one meeting, unless they are all alike."""
        ids, where = ranks(atoms)
        total = np.zeros(len(ids), np.int64)
        np.add.at(total, where, marks)
        if (total != total[0]).any():
            self.atoms.tag(ids, mix(total ^ self.atoms.mark()), reason)
