"""Couplings: making them from permutations, and carrying parameters across them.

One formula serves every method and every weight:

    W_fused = merge_out @ blockdiag(W_a, W_b, ..) @ unmerge_in  =  sum over parents k of  merge_k W_k unmerge_k
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fxmerge.ir import Alignment, AxisClasses, Coupling, Site
from fxmerge.linalg import Map
from fxmerge.stored import Made
from fxmerge.symmetry import in_rows, rows_first


def from_permutations(
    classes: AxisClasses,
    permutations: Sequence[Sequence[Tensor]],
    shares: Sequence[Sequence[float]],
    method: str,
    quality: Mapping[int, float] | None = None,
    notes: tuple[str, ...] = (),
) -> Alignment:
    """Couplings of parents whose neurons correspond one to one.

    Args:
        classes: the first parent's.
        permutations: per parent, per class int64 [n]: p[i] is that parent's neuron at place i of the fused network.
        shares: per class, the parents' shares.
    """
    couplings = tuple(Permuted([p[k] for p in permutations], shares[k]) for k in range(len(classes)))
    return Alignment(couplings, method, dict(quality or {}), notes)


class Permuted(Coupling):
    """Neuron i of the fused network is the parents' neurons p[i]: merge = [w_a P_a, w_b P_b, ..].

    The matrices are made when they are asked for: those of all classes together may be larger than the network.
    """

    permutations: tuple[Tensor, ...]
    shares: tuple[float, ...]

    def __init__(self, permutations: Sequence[Tensor], shares: Sequence[float]) -> None:
        n = len(permutations[0])
        for name, value in (
            ("permutations", tuple(permutations)),
            ("shares", tuple(shares)),
            ("widths", (n,) * len(permutations)),
        ):
            object.__setattr__(self, name, value)

    @property
    def merge(self) -> Tensor:  # type: ignore[override]
        return torch.cat([self.map(k, True).matrix for k in range(len(self.widths))], 1)

    @property
    def unmerge(self) -> Tensor:  # type: ignore[override]
        return torch.cat([self.map(k, False).matrix.T for k in range(len(self.widths))])

    @property
    def size(self) -> int:
        return self.widths[0]

    def map(self, k: int, carries: bool) -> Map:
        return Map.gather(self.permutations[k], self.shares[k] if carries else 1.0)


def side_by_side(widths: Sequence[int]) -> Coupling:
    """Every parent's neurons kept: merge = unmerge = I."""
    eye = torch.eye(sum(widths), dtype=torch.float64)
    return Coupling(eye, eye.clone(), tuple(widths))


def turned(coupling: Coupling, shares: Sequence[float]) -> Coupling:
    """With its ``dual``: what turned places make is read, so it goes through unmerge, [w_a U_a', w_b U_b', ..].

    With every parent's queries q_p = U_p q read back from the fused ones, the mean of the parents' scores, the sum of
    w_p q_p . k_p, is q . k for the keys k = sum of w_p U_p' k_p.
    """
    if isinstance(coupling, Permuted):
        return coupling  # is its own
    dual = torch.cat([w * u.T for w, u in zip(shares, coupling.unmerge.split(coupling.widths), strict=True)], 1)
    return coupling if torch.equal(dual, coupling.merge) else replace(coupling, dual=dual)


def among(coupling: Coupling, present: Sequence[int], count: int, widths: Sequence[int]) -> Coupling:
    """A coupling of some parents as one of all ``count``: the others give nothing and read nothing."""
    merge = coupling.merge.new_zeros(coupling.size, sum(widths))
    unmerge = merge.T.clone()
    starts = [sum(widths[:p]) for p in range(count)]
    columns = torch.cat([torch.arange(widths[p]) + starts[p] for p in present])
    merge[:, columns], unmerge[columns] = coupling.merge, coupling.unmerge
    return Coupling(merge, unmerge, tuple(widths))


def fuse(
    parents: Sequence[AxisClasses],
    fused: AxisClasses,
    alignment: Alignment,
    states: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    idle: Sequence[frozenset[str]] = (),
) -> Mapping[str, Tensor]:
    """The fused network's parameters and buffers, under the first parent's names, each made when it is asked for.

    Args:
        parents: classes of each parent, in corresponding order.
        fused: the same classes in the fused network.
        alignment: one coupling per class.
        states: each parent's parameters and buffers.
        weights: shares, for tensors that have no neurons. Integers and constants that agree are taken as they are.
        idle: per parent, tensors that mean nothing in it: the others give them whole.
    """
    touched = [p.by_tensor() for p in parents]
    targets = fused.by_tensor()
    maps = Maps(alignment.couplings)
    canonical = {alias: name for name, aliases in parents[0].aliases.items() for alias in aliases}

    def make(name: str) -> Tensor:
        name = canonical.get(name, name)
        target = targets.get(name)
        without = {k for k, names in enumerate(idle) if name in names}
        without = without if len(without) < len(states) else set()
        present = [k for k in range(len(states)) if k not in without]
        if target is None:
            return _mean([(weights[k], states[k][name]) for k in present])
        total: Tensor | None = None
        for k in present:  # one parent's tensor at a time
            part = _carry(states[k][name], touched[k][name], target, maps, k, parents[k], weights[k])
            total = part if total is None else total + part
        assert total is not None
        if without:
            total = _made_whole(total, touched, name, target, maps, without, parents, weights)
        return total.to(states[0][name].dtype)

    return Made(states[0], make)


Entry = tuple[Site, int, Tensor]
"""Where a class is in a tensor: the site, the number of the class, and its neurons' places."""


def unstacked(entries: Sequence[Entry], stack: Site, dims: int) -> list[Entry]:
    """The entries of a tensor of which ``in_rows(value, stack)`` is made flat: [rows * inside, ..].

    The rows themselves are left out, as neurons in them say where they are.
    """
    rest = [d for d in range(dims) if d not in (stack.along, stack.axis)]
    axis = {stack: 0} | {s: 1 + rest.index(s.axis) for s, _, _ in entries if s.axis in rest and s.groups == 1}
    return [(Site(s.parameter, axis[s]), k, index) for s, k, index in entries if s in axis]


def _mean(parts: Sequence[tuple[float, Tensor]]) -> Tensor:
    """Of a tensor without neurons; what all agree on, and integers, are the first one's."""
    total, first = sum(w for w, _ in parts), parts[0][1]
    alike = all(v.shape == first.shape and torch.equal(v.to(first.device), first) for _, v in parts[1:])
    if alike or not first.is_floating_point() or not total:
        return first.clone()
    return sum(w / total * v for w, v in parts).to(first.dtype)  # type: ignore[union-attr]


def _carrier(own: Sequence[Entry], classes: AxisClasses, maps: Maps) -> Site | None:
    """The one axis that carries the parents' shares, where rows are mixed; the others only say who is where."""
    makes = [s for s in sorted({site for site, _, _ in own}) if s not in classes.reads]
    free = [s for s in makes if any(s == t and classes[c].free for t, c, _ in own)]
    mixed = [s for s in free if any(s == t and not maps.permutes(c) for t, c, _ in own)]
    return next(iter(mixed or free or makes), None)


def _made_whole(
    value: Tensor,
    touched: Sequence[Mapping[str, Sequence[Entry]]],
    name: str,
    target: Sequence[Entry],
    maps: Maps,
    without: set[int],
    parents: Sequence[AxisClasses],
    weights: Sequence[float],
) -> Tensor:
    """A sum over some of the parents as a mean over them: divided, row by row, by what they gave to it."""
    present = [k for k in range(len(parents)) if k not in without]
    carrier = _carrier(touched[present[0]][name], parents[present[0]], maps)
    if carrier is None:
        return value / max(sum(weights[k] for k in present), 1e-30)
    mass = torch.ones(value.shape[carrier.axis] * carrier.groups, dtype=torch.float64)
    for (site, c, _), (_, _, goal) in zip(touched[present[0]][name], target, strict=True):
        if site == carrier:
            rows = torch.stack([maps(c, k, True).matrix.double().sum(1).cpu() for k in present]).sum(0)
            mass[goal] = rows[:, None].expand_as(goal)
    mass = torch.where(mass.abs() > 1e-6, mass, 1.0).to(value)
    if carrier.groups == 1:
        return value / mass.reshape([-1 if d == carrier.axis else 1 for d in range(value.dim())])
    rows = in_rows(value, carrier)
    mass = mass.reshape(*rows.shape[:2], *[1] * (value.dim() - 2))
    return (rows / mass).movedim((0, 1), (carrier.along, carrier.axis))


def _carry(
    value: Tensor,
    own: Sequence[Entry],
    target: Sequence[Entry],
    maps: Maps,
    k: int,
    classes: AxisClasses,
    weight: float,
) -> Tensor:
    """One parent's share of a fused tensor: each axis goes through its classes' couplings."""
    if value.dtype in (torch.float16, torch.bfloat16):
        value = value.float()
    sites = sorted({site for site, _, _ in own}, key=rows_first)
    carrier = _carrier(own, classes, maps)
    if carrier is None:
        value = weight * value
    for site in sites:
        pairs = [(mine, theirs) for mine, theirs in zip(own, target, strict=True) if mine[0] == site]
        pieces: list[tuple[Tensor, Tensor, Map]] = []
        for (_, c, index), (_, _, goal) in pairs:
            columns = classes[c].turned.get(site)
            if columns is None or site != carrier:
                pieces.append((index, goal, maps(c, k, site == carrier)))
                continue
            for part, dual in ((~columns, False), (columns, True)):
                if bool(part.any()):
                    pieces.append((index[:, part], goal[:, part], maps(c, k, True, dual)))
        if site.groups == 1:
            value = _through(value, site.axis, pieces)
        else:
            value = _through_groups(value, site, pairs[0][1][0], pieces)
    return value


class Maps:
    """The sides of all couplings, each looked at once."""

    def __init__(self, couplings: Sequence[Coupling] | Mapping[int, Coupling]) -> None:
        self._couplings = couplings
        self._known: dict[tuple[int, int, bool, bool], Map] = {}

    def permutes(self, c: int) -> bool:
        """Whether class c goes one to one."""
        return isinstance(self._couplings[c], Permuted)

    def __call__(self, c: int, k: int, carries: bool, dual: bool = False) -> Map:
        """Class c, parent k: [n, n_k], rows made by merging (the ``dual`` way), or columns read back."""
        key = (c, k, carries, dual)
        if key not in self._known:
            coupling = self._couplings[c]
            if isinstance(coupling, Permuted):
                self._known[key] = coupling.map(k, carries)
            elif carries:
                merge = coupling.dual if dual and coupling.dual is not None else coupling.merge
                self._known[key] = Map.of(merge.split(coupling.widths, 1)[k])
            else:
                self._known[key] = Map.of(coupling.unmerge.split(coupling.widths, 0)[k].T)
        return self._known[key]


def _through(value: Tensor, axis: int, pieces: Sequence[tuple[Tensor, Tensor, Map]]) -> Tensor:
    """Every class on an axis through its own matrix; places of a neuron move together."""
    if (
        len(pieces) == 1
        and pieces[0][0].shape[1] == 1
        and _in_order(pieces[0][0], value.shape[axis])
        and _in_order(pieces[0][1], None)
    ):
        return pieces[0][2](value, axis)
    width = sum(goal.numel() for _, goal, _ in pieces)
    out = value.new_zeros([width if d == axis else s for d, s in enumerate(value.shape)])
    for index, goal, through in pieces:
        n, m = index.shape
        part = value.index_select(axis, index.reshape(-1).to(value.device)).unflatten(axis, (n, m))
        part = through(part, axis).flatten(axis, axis + 1)
        out.index_copy_(axis, goal.reshape(-1).to(value.device), part)
    return out


def _in_order(index: Tensor, width: int | None) -> bool:
    n = index.numel()
    return index.shape[1] == 1 and (width is None or n == width) and bool((index[:, 0] == torch.arange(n)).all())


def _through_groups(value: Tensor, site: Site, goal: Site, pieces: Sequence[tuple[Tensor, Tensor, Map]]) -> Tensor:
    """An axis with other neurons in every group of rows, after the rows went through their own couplings.

    Rows are already in the fused network's groups. Row group g reads the parent group that its rows came from, so the
    matrix [g * i, g' * i'] is needed on the blocks (g, g') that the rows joined: those with the largest entries.
    """
    inside = value.shape[site.axis]
    if inside == 1:  # depthwise: each row reads the neuron that it makes, however that is mixed
        return value
    value = in_rows(value, site)
    rows = value.reshape(goal.groups, -1, *value.shape[1:])  # [g, o, i', ..]
    width = sum(places.numel() for _, places, _ in pieces)
    if all(piece.source is not None for _, _, piece in pieces):
        source, scale = torch.empty(width, dtype=torch.int64), torch.ones(width, dtype=torch.float64)
        for index, places, piece in pieces:
            source[places] = index[piece.source]
            scale[places] = 1.0 if piece.scale is None else piece.scale.cpu()[:, None].expand_as(index)
        lay = (goal.groups, 1, -1, *[1] * (rows.dim() - 3))
        chosen = (source % inside).reshape(lay).to(value.device)
        made = rows.take_along_dim(chosen, 2) * scale.reshape(lay).to(value)
    else:
        matrix = value.new_zeros(width, inside * site.groups)
        for index, places, piece in pieces:
            for a in range(index.shape[1]):
                at = places[:, a][:, None].to(value.device), index[:, a][None, :].to(value.device)
                matrix[at] = piece.matrix.to(value)
        blocks = matrix.reshape(goal.groups, width // goal.groups, site.groups, inside)
        largest = blocks.abs().amax((1, 3)).argmax(1)
        chosen = blocks[torch.arange(goal.groups, device=value.device), :, largest]  # [g, i, i']
        made = torch.einsum("gij,goj...->goi...", chosen, rows)
    return made.flatten(0, 1).movedim((0, 1), (site.along, site.axis))
