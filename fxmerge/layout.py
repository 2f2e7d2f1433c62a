"""The places of neurons where classes have other widths than in the network they were inferred from.

axis of A        a0 a1 a2 | c0 c1          (classes a and c side by side)
a: 3 -> 5        a0 a1 a2 a3 a4 | c0 c1    new neurons follow the last of their kind, everything else keeps its order
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fxmerge.ir import AxisClasses, Site


def resized(classes: AxisClasses, widths: Mapping[int, int]) -> AxisClasses:
    """The same classes with ``widths[k]`` neurons in class k: places along every axis laid out anew.

    Args:
        classes: of an existing network.
        widths: class index -> number of neurons; classes that are not named keep theirs. Classes in blocks, and blocks
            themselves, cannot change.
    """
    widths = {k: w for k, w in widths.items() if w != classes[k].size}
    for k in widths:
        if classes[k].parents or classes.children(k):
            raise ValueError(f"class '{classes[k].name}' has blocks and keeps its width")
    if not widths:
        return classes
    sites: dict[Site, dict[int, Tensor]] = {}
    shown: dict[tuple[str, int], dict[int, Tensor]] = {}
    for k, c in enumerate(classes):
        for site, index in c.sites.items():
            sites.setdefault(site, {})[k] = index
        for tap in c.taps:
            shown.setdefault((tap.node, tap.axis), {})[k] = tap.index
    laid = {axis: _relaid(entries, widths) for axis, entries in sites.items()}
    seen = {axis: _relaid(entries, widths) for axis, entries in shown.items()}
    # a depthwise convolution has as many groups as neurons
    total = {site: sum(i.numel() for i in entries.values()) for site, entries in laid.items()}
    name = {
        site: replace(site, groups=total[site]) if site.groups == sum(i.numel() for i in sites[site].values()) else site
        for site in sites
    }
    out = []
    for k, c in enumerate(classes):
        w = widths.get(k, c.size)
        out.append(
            replace(
                c,
                size=w,
                sites={name[s]: laid[s][k] for s in c.sites},
                blocks=c.blocks.new_zeros(w, 0) if k in widths else c.blocks,
                taps=tuple(replace(t, index=seen[t.node, t.axis][k]) for t in c.taps),
                turned={name[s]: columns for s, columns in c.turned.items()},
            )
        )
    return replace(classes, classes=tuple(out), reads=frozenset(name.get(s, s) for s in classes.reads))


def shapes(fused: AxisClasses, state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Tensor name -> its shape at the widths of ``fused``; ``state`` has the tensors at the widths they had."""
    found = {name: list(value.shape) for name, value in state.items()}
    for name, entries in fused.by_tensor().items():
        for site in {s for s, _, _ in entries}:
            total = sum(index.numel() for s, _, index in entries if s == site)
            for alias in (name, *fused.aliases.get(name, ())):
                if alias in found:
                    found[alias][site.axis] = total // site.groups
    return {name: tuple(shape) for name, shape in found.items()}


def _relaid(entries: Mapping[int, Tensor], widths: Mapping[int, int]) -> dict[int, Tensor]:
    """Class -> new places [n, m] along one axis; the axis holds these classes and no others."""
    if not any(k in widths for k in entries):
        return dict(entries)
    after, rank = [], []  # sorted by the place they follow, then by neuron and column
    for k, index in entries.items():
        n, m = index.shape
        w = widths.get(k, n)
        place = index[:w]
        if w > n:
            place = torch.cat([index, _ends(index)[None].expand(w - n, m)])
        number = torch.arange(w)[:, None].expand(w, m)
        after.append(place.reshape(-1))
        rank.append(torch.where(number < n, -1, number * m + torch.arange(m)).reshape(-1))
    order = torch.arange(sum(len(a) for a in after))
    for key in (torch.cat(rank), torch.cat(after)):  # least significant first
        order = order[torch.argsort(key[order], stable=True)]
    position = torch.empty_like(order)
    position[order] = torch.arange(len(order))
    parts = position.split([len(a) for a in after])
    return {k: p.reshape(-1, index.shape[1]) for (k, index), p in zip(entries.items(), parts, strict=True)}


def _ends(index: Tensor) -> Tensor:
    """Per column: the last place of its tile; columns whose ranges overlap (a flattened map) make one tile."""
    low, high = index.amin(0), index.amax(0)
    ends = high.clone()
    reach = -1
    members: list[int] = []
    for j in [*torch.argsort(low).tolist(), None]:
        if j is None or int(low[j]) > reach:
            for i in members:
                ends[i] = reach
            members = []
        if j is not None:
            members.append(j)
            reach = max(reach, int(high[j]))
    return ends
