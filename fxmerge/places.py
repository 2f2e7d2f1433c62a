"""Where the neurons of every class are: places along axes of parameters and buffers, and of activations."""

from __future__ import annotations

import numpy as np
import torch

from fxmerge.atoms import Ints, ranks, unique
from fxmerge.interpret import Interpretation
from fxmerge.ir import Site, Tap
from fxmerge.sides import columns


def find_sites(
    found: Interpretation, root: Ints, number: Ints, place: Ints, slot: Ints, count: int
) -> list[dict[Site, torch.Tensor]]:
    """Per class: site -> [size, m] places, the m places of all neurons in matching order."""
    origin = found.atoms.origin(np.arange(len(root)))
    raw = np.flatnonzero(origin >= 0)
    index = raw - np.asarray(found.starts)[origin[raw]] if len(found.starts) else raw
    cls, pos = number[root[raw]], place[root[raw]]
    # places in the same slot of all neurons stand in one column; columns by their first place
    _, shade = ranks(slot[raw])
    _, nature = ranks((cls * len(found.sites) + origin[raw]) * (shade.max(initial=0) + 1) + shade)
    first = np.zeros(nature.max(initial=-1) + 1, np.int64)
    first[nature[::-1]] = index[::-1]  # the last one written is the first along its axis
    order = np.lexsort((index, first[nature], pos, origin[raw], cls))
    sites: list[dict[Site, torch.Tensor]] = [{} for _ in range(count)]
    key = (cls * len(found.sites) + origin[raw])[order]
    for part in np.split(order, np.flatnonzero(np.diff(key)) + 1):
        if len(part):
            c, o = int(cls[part[0]]), int(origin[raw[part[0]]])
            sites[c][found.sites[o]] = torch.from_numpy(index[part].reshape(int(pos[part[-1]]) + 1, -1))
    return sites


def find_taps(
    found: Interpretation, root: Ints, number: Ints, place: Ints, sizes: list[int], side: Ints
) -> list[list[Tap]]:
    taps: list[list[Tap]] = [[] for _ in sizes]
    made = found.contracting
    nodes = found.traced.graph_module.graph.nodes
    read = {source.name for node in nodes if node.name in made for source in node.all_input_nodes}
    for node, axis, ids in found.seen:
        kind = "made" if node in made else "read" if node in read else "other"
        at = np.flatnonzero(ids >= 0)
        who = root[ids[at]]
        cls, pos = number[who], place[who]
        for c in unique(cls[cls >= 0]):
            mine = np.flatnonzero(cls == c)
            mine = mine[np.argsort(pos[mine], kind="stable")]
            counts = np.bincount(pos[mine], minlength=sizes[c])
            if counts.min() == counts.max():
                where = at[mine].reshape(sizes[c], -1)
                taps[c].append(Tap(node, axis, torch.from_numpy(where), kind, columns(ids[where], side)))
    return taps
