"""On which side of the contractions that it takes part in a neuron stands: as it is made, or as it is read.

A contraction multiplies and sums two sides of the same neurons: a layer's inputs with the columns of a weight, or the
queries of an attention head with its keys. A matrix T that mixes such neurons leaves the sum alone where one side goes
through T and the other through its inverse transposed:

    sum_i x_i y_i  =  (T x)' (T^-T y)

For permutations the two are the same. For other maps it must be known which place of a neuron (a row of the queries'
weight, an entry of the keys' bias) is on which side: a graph with an edge between places that meet, which either
changes the side (a contraction) or does not (everything pointwise). Where a cycle changes it an odd number of times, a
neuron is contracted with itself (the table of tied embeddings, ``x @ x.T``), and only orthogonal maps are left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from fxmerge.atoms import Ints
from fxmerge.ir import Site

LOOSE, MADE, TURNED, BOTH = -1, 0, 1, 2
"""Sides of an atom: not known, that of its neuron's earliest atom, the other one, both."""


def sides(met: Sequence[tuple[Tensor, Tensor, bool]], root: Ints) -> Ints:
    """The side of every atom.

    Args:
        met: label tensors that met entry by entry, and whether across a contraction.
        root: [atoms], the neuron of every atom, which is its earliest atom.
    """
    side = np.full(len(root), LOOSE)
    paired = np.zeros(len(root), bool)
    ends = [(*_united(left, right, root), True) for left, right, across in met if across]
    for x, _, _ in ends:
        paired[root[x]] = True
    if not paired.any():
        return side
    for left, right, across in met:
        x = left.numpy()
        if not across and paired[root[x[x >= 0]]].any():
            ends.append((*_united(left, right, root), False))
    x, y = (np.concatenate([e[k] for e in ends]) for k in (0, 1))
    turns = np.repeat([e[2] for e in ends], [len(e[0]) for e in ends])
    n = len(root)
    # every atom twice: on one side, and on the other
    start = np.concatenate([x, x + n])
    end = np.concatenate([np.where(turns, y + n, y), np.where(turns, y, y + n)])
    _, part = connected_components(coo_array((np.ones(len(start)), (start, end)), shape=(2 * n,) * 2), directed=False)
    one, other, first = part[:n], part[n:], part[root]
    known = paired[root]
    side[known & (one == first)] = MADE
    side[known & (other == first)] = TURNED
    side[known & (one == other)] = BOTH
    return side


def _united(left: Tensor, right: Tensor, root: Ints) -> tuple[Ints, Ints]:
    """Pairs of atoms that met and are one neuron."""
    x, y = (t.ravel() for t in np.broadcast_arrays(left.numpy(), right.numpy()))
    one = (x >= 0) & (y >= 0)
    x, y = x[one], y[one]
    one = root[x] == root[y]
    return x[one], y[one]


def facing(
    sites: Mapping[Site, Tensor], starts: Mapping[Site, int], reads: Set[Site], side: Ints
) -> tuple[dict[Site, Tensor], bool]:
    """Which columns of a class's places are turned, and whether its neurons meet themselves.

    What reads is turned, so that what makes is not; ``side`` is changed in place to say so. Only where makers meet
    makers (queries and keys) are some of these turned.

    Args:
        sites: of one class.
        starts: the first atom of every site.
        reads: the sites that read.
        side: of every atom.
    """
    atoms = {site: index.numpy() + starts[site] for site, index in sites.items()}
    if any((side[a] == MADE).any() for site, a in atoms.items() if site in reads):
        everything = np.concatenate([a.ravel() for a in atoms.values()])
        side[everything] = np.array([TURNED, MADE, BOTH, LOOSE])[side[everything]]  # the last one is number -1
    found: dict[Site, Tensor] = {}
    loose = reflexive = False
    for site, a in atoms.items():
        own = side[a]
        uneven = (own != own[:1]).any()
        reflexive |= bool(uneven or (own == BOTH).any() or (site in reads and (own == MADE).any()))
        loose |= site not in reads and bool((own == LOOSE).any())
        if site not in reads and (own == TURNED).any():
            found[site] = torch.from_numpy(own[0] == TURNED)
    reflexive |= bool(found) and loose
    return ({} if reflexive else found), reflexive


def columns(atoms: Ints, side: Ints) -> tuple[bool, ...]:
    """Per column of atoms [n, m] whether it is turned; () where none is, or that is not the same for all."""
    own = side[atoms] == TURNED
    return tuple(own[0].tolist()) if own.any() and (own == own[:1]).all() else ()
