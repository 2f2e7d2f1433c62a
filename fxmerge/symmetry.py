"""Elements of the inferred symmetry, and what they do to parameters."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxmerge.errors import VerifyError, told
from fxmerge.ir import AxisClass, AxisClasses, Site, Traced
from fxmerge.running import Doubled, Substituted, evaluating, forget, fresh, full_state, to_device
from fxmerge.stored import Made, Stored, read_when_asked

Permutations = Sequence[Tensor]
"""Per class: int64 [size]; neuron i moves to place p[i]."""


def random_element(classes: AxisClasses, seed: int = 0, only: Sequence[int] | None = None) -> list[Tensor]:
    """A random element of the symmetry: blocks go to blocks, members permute freely inside.

    Args:
        classes: the classes, parents first.
        seed: of a generator of its own.
        only: restrict to these classes (members still follow their blocks).
    """
    rng = np.random.default_rng(seed)
    moves: list[Tensor] = []
    for k, c in enumerate(classes):
        here = np.arange(c.size)
        if not c.free:
            moves.append(torch.from_numpy(here))
            continue
        cell, target = _cells(c, moves)
        goal = np.lexsort((here, cell))
        move = np.empty(c.size, np.int64)
        for _ in range(20):  # a class of two stays put every other time; then nothing would be tested
            noise = rng.random(c.size) if only is None or k in only else here
            move[np.lexsort((noise, target))] = goal
            if (move != here).any():
                break
        moves.append(torch.from_numpy(move))
    return moves


def _cells(c: AxisClass, moves: Permutations) -> tuple[np.ndarray, np.ndarray]:
    """For every neuron: a number for its cell (same blocks), and for the cell it must move to."""
    if not c.parents:
        return np.zeros(c.size, np.int64), np.zeros(c.size, np.int64)
    now = c.blocks.numpy()
    then = np.stack([moves[p].numpy()[now[:, j]] for j, p in enumerate(c.parents)], 1)
    _, codes = np.unique(np.concatenate([now, then]), axis=0, return_inverse=True)
    codes = codes.ravel()
    if not np.array_equal(np.sort(codes[: c.size]), np.sort(codes[c.size :])):
        raise VerifyError(f"class '{c.name}' has blocks that cannot be exchanged")
    return codes[: c.size], codes[c.size :]


def apply(classes: AxisClasses, moves: Permutations, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The state dict of the network after its neurons moved: same function, other order.

    Every tensor is moved when it is asked for. Those that no class touches are passed through, not copied.
    """
    touched = classes.by_tensor()
    canonical = {alias: name for name, aliases in classes.aliases.items() for alias in aliases}

    def moved(name: str) -> Tensor:
        value = state[name]
        by_site: dict[Site, Tensor] = {}
        for site, k, index in touched.get(canonical.get(name, name), ()):
            width = value.shape[site.axis] * site.groups
            source = by_site.setdefault(site, torch.arange(width))
            source[index[moves[k]]] = index
        for site in sorted(by_site, key=rows_first):
            source = by_site[site]
            if torch.equal(source, torch.arange(len(source))):
                continue
            source = source.to(value.device)
            if site.groups == 1:
                value = value.index_select(site.axis, source)
            else:  # a gather per group; rows were moved before
                rows, inside = value.shape[site.along], value.shape[site.axis]
                inner = (source % inside).reshape(site.groups, inside).repeat_interleave(rows // site.groups, 0)
                value = in_rows(value, site).take_along_dim(inner.reshape(rows, inside, *[1] * (value.dim() - 2)), 1)
                value = value.movedim((0, 1), (site.along, site.axis))
        return value

    return Made(state, moved)


def rows_first(site: Site) -> tuple[bool, Site]:
    """A sorting key by which sites come after the rows that they are grouped by."""
    return site.groups > 1, site


def in_rows(value: Tensor, site: Site) -> Tensor:
    """[rows, inside, ..]: the axes that a grouped site is along and on, first."""
    return value.movedim((site.along, site.axis), (0, 1))


def permute(module: nn.Module, classes: AxisClasses, seed: int = 0) -> nn.Module:
    """A random twin: a copy of ``module`` with its neurons in another order, which computes the same function.

    Example:
        >>> twin = fxmerge.permute(model, fxmerge.infer_classes(model, x), seed=1)
    """
    twin = copy.deepcopy(module)
    moved = apply(classes, random_element(classes, seed), dict(module.state_dict(keep_vars=False)))
    load_state(twin, moved)
    return twin


def load_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copies values into the module's parameters and buffers, non-persistent ones included where given."""
    forget(module)
    with torch.no_grad():
        own = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
        for name, value in state.items():
            if name in own and not isinstance(value, Stored) and own[name].data_ptr() != value.data_ptr():
                own[name].copy_(value)


@dataclass(frozen=True)
class Verification:
    """What a random element of the symmetry did to the output.

    Attributes:
        error: largest change of an output entry over the largest output entry, in float64.
        moved: number of neurons that moved.
    """

    error: float
    moved: int
    tolerance: float = 1e-9

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance

    def __str__(self) -> str:
        return f"{'ok' if self.ok else 'FAILED'}: {self.moved} neurons moved, relative error {self.error:.1e}"


def doubled(traced: Traced, state: Mapping[str, Tensor], grad: bool = False) -> object:
    """What a traced network gives for its example inputs, in float64, with the tensors of ``state`` for its own.

    ``grad``: whether the way there is kept.
    """
    args, kwargs = to_device((traced.args, dict(traced.kwargs)), None, torch.float64)
    graph = traced.graph_module
    made = Made(state, lambda name: to_device(state[name], None, torch.float64))
    with evaluating(graph), torch.set_grad_enabled(grad), Substituted(graph, made), Doubled():
        return graph(*fresh(args), **fresh(kwargs))


def verify(
    module: nn.Module,
    classes: AxisClasses,
    seed: int = 0,
    *,
    tolerance: float = 1e-9,
    only: Sequence[int] | None = None,
) -> Verification:
    """Draws a random element of the symmetry, applies it in float64, runs the network: the output must not move.

    Args:
        module: the network (or any other with the same structure).
        classes: what ``infer_classes`` found.
        seed: of the element.
        tolerance: relative error that still counts as equal.
        only: indices of the classes to move (default: all).
    """
    traced = classes.traced
    graph = traced.graph_module
    with evaluating(module, graph):
        known, own = full_state(graph), full_state(module)
        state = read_when_asked({k: own.get(k, v) for k, v in known.items()})
        moves = random_element(classes, seed, only)
        try:
            before = doubled(traced, state)
        except RuntimeError as error:  # a kernel that there is for float32 only
            raise VerifyError(
                f"{type(module).__name__} does not run in float64, which verification needs ({told(error)}); merge "
                "with verify=False, or give it operations that do"
            ) from error
        after = doubled(traced, apply(classes, moves, state))
    moved = sum(int((m != torch.arange(len(m))).sum()) for m in moves)
    return Verification(relative_error(before, after), moved, tolerance)


def relative_error(expected: object, got: object) -> float:
    """Largest difference over the largest entry, over all tensors of two nested outputs; inf where shapes differ."""
    a = [t for t in pytree.tree_leaves(expected) if isinstance(t, Tensor)]
    b = [t for t in pytree.tree_leaves(got) if isinstance(t, Tensor)]
    if len(a) != len(b) or any(x.shape != y.shape for x, y in zip(a, b, strict=True)):
        return float("inf")
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if x.numel():
            x, y = x.double(), y.double()
            scale = float(x.abs().max()) or 1.0
            error = float((x - y).abs().max()) / scale
            worst = max(worst, error if error == error else float("inf"))
    return worst
