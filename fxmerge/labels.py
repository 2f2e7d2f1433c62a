"""What rules say about neurons, in terms of label tensors.

A value's label says, for every entry, *which* neurons it belongs to and *where* it stands. Both are kept as integer
tensors of the value's own number of dimensions, of size 1 along every dimension in which they do not vary, so that a
feature map [N, C, H, W] costs C + N + H + W integers.

- ``neurons``: atoms. One tensor per independent kind: a feature map has one (its channels); the parameter [out, in]
  has two; tokens mixed by a learned matrix have two. -1 means that no neuron stands there (zero padding).
- ``fixed``: identities that never move, as 64-bit hashes: pixel and token positions, entries of constants.
- ``kind``: one hash for the whole value: which computation made it. Entries of one kind with the same neurons at the
  same place hold the same number; where values of different kinds meet in one tensor (cat), kinds become fixed.

Moving data moves labels by the very same operation. Everything else comes down to two verbs: ``align`` (entries that
meet in a pointwise operation) and ``reduce`` (entries that are summed, averaged, normalised over). A contraction is
both: multiply in the joint index space, then sum.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxmerge.atoms import distinct, mix, ranks, unique, unique_pairs
from fxmerge.label import Label, combine, fold, narrow, overlap, varying
from fxmerge.meeting import Meeting


class Context(Meeting):
    """The verbs that rules speak, over one set of atoms."""

    # -- moving --------------------------------------------------------------------------------------------------

    def move(self, label: Label, function: Callable[[Tensor], Any], shape: Sequence[int]) -> Label:
        """Data movement runs as itself on every label tensor."""

        def run(t: Tensor) -> Tensor:
            return narrow(function(t.expand(label.shape)))

        fixed = list(map(run, label.fixed))
        # a part with one identity throughout is told from other parts by its kind
        single = [int(t.flatten()[0]) for t in fixed if t.numel() == 1]
        kind = combine([label.kind, *single]) if single else label.kind
        neurons = tuple(map(run, label.neurons))
        return replace(
            label, shape=tuple(shape), neurons=neurons, fixed=tuple(t for t in fixed if varying(t)), kind=kind
        )

    def join(self, labels: Sequence[Label], function: Callable[[list[Tensor]], Tensor], shape: Sequence[int]) -> Label:
        """Several values moved into one (cat, stack, a write in place): label tensors pair up by what they vary in."""
        labels = [self.settle(label) for label in labels]

        def paired(kind: str) -> tuple[Tensor, ...]:
            rows: list[list[Tensor | None]] = []
            for k, label in enumerate(labels):
                left = list(getattr(label, kind))
                for row in rows:  # first those that vary in the same dimensions
                    like = next(t for t in row if t is not None)
                    same = next((t for t in left if varying(t) == varying(like)), None)
                    if same is not None:
                        left = [t for t in left if t is not same]
                    row.append(same)
                for t in left:
                    free = next((row for row in rows if row[k] is None), None)
                    if free is None:
                        rows.append([None] * k + [t])
                    else:
                        free[k] = t
            made = []
            for row in rows:
                full = [
                    torch.full((1,) * label.ndim, -1).expand(label.shape) if t is None else t.expand(label.shape)
                    for label, t in zip(labels, row, strict=True)
                ]
                made.append(narrow(function(full)))
            return tuple(t for t in made if kind == "neurons" or varying(t))

        why = next((label.why for label in labels if label.fixed and label.why != "position"), "position")
        learned = all(label.learned for label in labels)
        neurons = paired("neurons")
        fixed = list(paired("fixed"))
        if any(len(varying(t)) > 1 for t in neurons):  # the same neurons may stand in all parts under several names
            fixed = self._turns(fixed, neurons)
            neurons = self._merged(neurons)
        kinds = [label.kind for label in labels]
        if len(set(kinds)) > 1:
            fills = [torch.full((1,) * x.ndim, x.kind).expand(x.shape) for x in labels]
            fixed = self._tell_apart(fixed, narrow(function(fills)))
        return Label(tuple(shape), neurons, tuple(fixed), combine(kinds), learned, why)

    # -- reducing ------------------------------------------------------------------------------------------------

    def reduce(self, label: Label, dims: Iterable[int], keepdim: bool = False) -> Label:
        """A symmetric reduction (sum, mean, max, ..) over ``dims``: what is reduced over must permute as one set."""
        dims = tuple(sorted({d % label.ndim for d in dims}))
        gone = [d for d in dims if label.shape[d] > 1]
        self._summed = gone
        turned = self._turns(list(label.fixed), label.neurons)
        self._summed = ()
        kept, told = self._boxed(label.neurons, turned)
        label = replace(label, neurons=tuple(kept), fixed=tuple(told))
        # where more than one thing is told of entries, it matters which goes with which
        ordered = [d for d in gone if sum(t.shape[d] > 1 for t in (*label.neurons, *label.fixed)) > 1]
        neurons: list[Tensor] = []
        fixed: list[Tensor] = []
        for k, t in enumerate(label.neurons):
            if not any(t.shape[d] > 1 for d in gone):
                neurons.append(t)
                continue
            for other in label.neurons[:k]:
                if overlap(t, other):
                    self._relate(t, other)
            self._tell_by(t, label, [d for d in gone if d not in ordered])
            block, stuck = self._fold_neurons(t, gone)
            if stuck:
                fixed = self._tell_apart(fixed, block)
            elif varying(block):
                neurons = self._meet(neurons, block)
        for p in label.fixed:
            fixed = self._tell_apart(fixed, fold(p, [d for d in gone if d not in ordered], ordered))
        shape = tuple(1 if d in dims else s for d, s in enumerate(label.shape))
        out = replace(label, shape=shape, neurons=tuple(neurons), fixed=tuple(fixed))
        return out if keepdim else self.squeeze(out, dims)

    def squeeze(self, label: Label, dims: Iterable[int]) -> Label:
        """Drops dimensions of size 1."""
        keep = [d for d in range(label.ndim) if d not in set(dims)]

        def drop(t: Tensor) -> Tensor:
            return t.reshape([t.shape[d] for d in keep])

        shape = tuple(label.shape[d] for d in keep)
        return replace(label, shape=shape, neurons=tuple(map(drop, label.neurons)), fixed=tuple(map(drop, label.fixed)))

    def _tell_by(self, t: Tensor, label: Label, summed: Sequence[int]) -> None:
        """Before neurons of a label are reduced away: those met at other fixed places are not alike.

        Args:
            summed: dimensions of which only the multiset counts.
        """
        told: list[Tensor] = []
        for p in label.fixed:
            if overlap(t, p):
                others = [d for d in varying(p) if t.shape[d] == 1]
                beside = fold(p, [d for d in others if d in summed], [d for d in others if d not in summed])
                told = self._tell_apart(told, beside)
        for p in told:
            x, marks = unique_pairs(self._roots(t), p.numpy())
            x, marks = x[x >= 0], marks[x >= 0]
            if x.size:
                self._mark(x, mix(marks), f"{label.why} ({self.place})")

    def _fold_neurons(self, t: Tensor, gone: Sequence[int]) -> tuple[Tensor, bool]:
        """What remains of neurons after a reduction: the blocks that were reduced over (none where it was one set).

        Sets that overlap can only stay in place; then the second result is True and the first fixed identities.
        """
        roots = self._roots(t)
        over = tuple(d for d in gone if t.shape[d] > 1)
        one = roots.max(over, keepdims=True)
        if ((roots == one) | (roots < 0)).all():  # one neuron each, in more or fewer places: it is what remains
            x, count = (a.ravel() for a in np.broadcast_arrays(one, (roots >= 0).sum(over, keepdims=True)))
            self._mark(x[x >= 0], mix(count[x >= 0]), f"position ({self.place})")
            if (roots >= 0).all():  # under its first name, which says where the others are
                return narrow(t[tuple(slice(0, 1) if d in over else slice(None) for d in range(t.dim()))]), False
            return narrow(torch.from_numpy(one)), False
        ids, where = ranks(roots[roots >= 0])
        self._mark(ids, mix(np.bincount(where)), f"position ({self.place})")
        self.atoms.tag(ids, np.full(len(ids), self.atoms.mark()))  # members of the set differ from non-members
        sums = mix(roots).sum(axis=over, keepdims=True)
        none = torch.full((1,) * t.dim(), -1)
        if (sums == sums.flat[0]).all():
            return none, False
        x, group = unique_pairs(roots, sums)
        x, group = x[x >= 0], group[x >= 0]
        values, first = np.unique(sums, return_index=True)
        if not distinct(x):
            self.atoms.pin(x, f"overlapping sets reduced at {self.place}")
            order = mix(self.atoms.mark() + np.argsort(np.argsort(first)))
            return torch.from_numpy(order[np.searchsorted(values, sums)]), True
        groups, block = self.atoms.blocks(x, group)
        lookup = np.full(len(values), -1)
        lookup[np.searchsorted(values, groups)] = block
        return narrow(torch.from_numpy(lookup[np.searchsorted(values, sums)])), False

    def normalise(self, label: Label, dims: Iterable[int]) -> Label:
        """Every entry meets a symmetric reduction over ``dims`` (softmax, layer norm, ..)."""
        return self.align(label, self.reduce(label, dims, keepdim=True), shape=label.shape)

    def ordered(self, label: Label, dims: Iterable[int]) -> Label:
        """An operation that depends on the order along ``dims`` (cumsum, sort, ..): nothing may move there."""
        dims = [d % label.ndim for d in dims]
        places = Label(
            label.shape, fixed=self.positions(label.shape, dims), learned=True, why="the order along an axis matters"
        )
        return self.align(label, places, shape=label.shape)

    def windows(self, label: Label, dims: Sequence[int], sizes: Sequence[int]) -> Label:
        """An operation that mixes neighbours along ``dims`` (pooling, convolution windows): new places there.

        ``sizes`` are the new sizes along ``dims``.
        """
        dims = [d % label.ndim for d in dims]
        label = self.reduce(self.ordered(label, dims), dims, keepdim=True)
        shape = list(label.shape)
        for d, size in zip(dims, sizes, strict=True):
            shape[d] = size
        fixed = list(label.fixed)
        for p in self.positions(shape, dims):
            fixed = self._tell_apart(fixed, p)
        return replace(label, shape=tuple(shape), fixed=tuple(fixed))

    # -- contracting ---------------------------------------------------------------------------------------------

    def contract(self, operands: Sequence[tuple[Label, Sequence[Hashable]]], out: Sequence[Hashable]) -> Label:
        """A sum of products, as an einsum over named dimensions: align in the joint index space, then reduce."""
        inner = [n for n in dict.fromkeys(n for _, names in operands for n in names) if n not in set(out)]
        order = [*out, *inner]
        sizes: dict[Hashable, int] = {}
        for label, names in operands:
            for name, size in zip(names, label.shape, strict=True):
                sizes[name] = max(size, sizes.get(name, 1))
        if any(label.learned for label, _ in operands):
            self.contracting.add(self.place)
            self._note_reads(operands, set(inner))

        def place(label: Label, names: Sequence[Hashable]) -> Label:
            at = {n: d for d, n in enumerate(names)}
            axes = [at[n] for n in order if n in at]

            def lay(t: Tensor) -> Tensor:
                t = t.permute(axes)
                sizes = iter(t.shape)
                return t.reshape([next(sizes) if n in at else 1 for n in order])

            shape = tuple(sizes[n] if n in at else 1 for n in order)
            fixed = tuple(map(lay, label.fixed))
            return replace(label, shape=shape, neurons=tuple(map(lay, label.neurons)), fixed=fixed)

        self._summed = range(len(out), len(order))
        joint = self.align(*(place(*o) for o in operands), shape=[sizes[n] for n in order])
        self._summed = ()
        return replace(self.reduce(joint, range(len(out), len(order))), why="position")

    def _note_reads(self, operands: Sequence[tuple[Label, Sequence[Hashable]]], inner: set[Hashable]) -> None:
        """Remembers which parameter axes read their neurons: those summed over against something else."""
        noted: set[Hashable] = set()
        for label, names in sorted(operands, key=lambda o: not o[0].learned):
            if not label.learned:
                continue
            for t in label.neurons:
                axes = {names[d] for d in varying(t)} & inner
                if axes and not axes & noted:
                    noted |= axes
                    ids = t.numpy().ravel()
                    origins = unique(self.atoms.origin(ids[ids >= 0]))
                    self.reads.update(self.sites[k] for k in origins if k >= 0)
