"""Sizes that a graph holds as numbers, carried over to other widths.

pad(x, (.., 8, 8)) + y    with 16 -> 18 neurons in y that x lacks:    pad(x, (.., 8, 10)) + y
x.view(b, 12, 64)         with 64 -> 80 neurons in the last axis:     x.view(b, 12, 80)
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxmerge.ir import AxisClasses


class _Widths:
    """Places along node axes, as they were and as they are."""

    def __init__(self, before: AxisClasses, after: AxisClasses) -> None:
        self.shapes = before.traced.shapes
        self._taps: dict[tuple[str, int], list[tuple[Tensor, Tensor]]] = {}
        for old, new in zip(before, after, strict=True):
            for a, b in zip(old.taps, new.taps, strict=True):
                self._taps.setdefault((a.node, a.axis), []).append((a.index, b.index))

    def of(self, node: fx.Node, axis: int) -> tuple[int, int] | None:
        """(old, new) length of one axis of a node's output; None where its neurons are not all known."""
        taps = self._taps.get((node.name, axis), [])
        old, new = (sum(pair[k].numel() for pair in taps) for k in (0, 1))
        return (old, new) if taps and old == self.shapes.get(node.name, ())[axis] else None

    def place(self, node: fx.Node, axis: int, old: int) -> int | None:
        """Where the neuron that was at ``old`` is now."""
        for before, after in self._taps.get((node.name, axis), []):
            at = (before == old).nonzero()
            if len(at) and int(at[0, 0]) < len(after):
                return int(after[int(at[0, 0]), int(at[0, 1])])
        return None

    def joined(self, node: fx.Node, axis: int) -> fx.Node | None:
        """The first node from here on where all neurons of an axis show: padded places take whatever joins them."""
        queue, seen = [node], {node}
        while queue:
            n = queue.pop(0)
            shape = self.shapes.get(n.name, ())
            if axis >= len(shape) or shape[axis] != self.shapes[node.name][axis]:
                continue
            if self.of(n, axis) is not None:
                return n
            queue += [u for u in n.users if u not in seen]
            seen |= set(n.users)
        return None


def _padding(node: fx.Node, widths: _Widths) -> None:
    source, pads = node.args[0], node.args[1] if len(node.args) > 1 else node.kwargs.get("pad")
    if not isinstance(source, fx.Node) or not isinstance(pads, Sequence) or node.name not in widths.shapes:
        return
    sizes: list[Any] = list(pads)
    rank = len(widths.shapes[node.name])
    for pair in range(len(sizes) // 2):
        axis, left = rank - 1 - pair, sizes[2 * pair]
        if not all(isinstance(s, int) for s in sizes[2 * pair : 2 * pair + 2]) or not any(
            sizes[2 * pair : 2 * pair + 2]
        ):
            continue
        inner, outer = widths.of(source, axis), widths.joined(node, axis)
        total = None if outer is None else widths.of(outer, axis)
        start = None if outer is None else widths.place(outer, axis, int(left))
        if inner is not None and total is not None and start is not None:
            sizes[2 * pair : 2 * pair + 2] = [start, total[1] - inner[1] - start]
    if len(node.args) > 1:
        node.args = (source, tuple(sizes), *node.args[2:])
    else:
        node.kwargs = {**node.kwargs, "pad": tuple(sizes)}


def _viewed(node: fx.Node, widths: _Widths) -> None:
    sizes = list(node.args[1:])
    nested = len(sizes) == 1 and isinstance(sizes[0], Sequence)
    sizes = list(sizes[0]) if nested else sizes  # type: ignore[arg-type]
    for axis, size in enumerate(sizes):
        if isinstance(size, int) and size > 1 and (found := widths.of(node, axis)) is not None and found[0] == size:
            sizes[axis] = found[1]
    node.args = (node.args[0], tuple(sizes)) if nested else (node.args[0], *sizes)


def _split(node: fx.Node, widths: _Widths) -> None:
    if len(node.args) < 2:
        return
    sizes, axis = node.args[1], node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
    if not isinstance(axis, int) or not isinstance(sizes, (int, list, tuple)):
        return
    parts = {u.args[1]: u for u in node.users if u.target is operator.getitem}
    found: dict[int, int] = {}
    for number, part in parts.items():
        shape = widths.shapes.get(part.name)
        if isinstance(number, int) and shape is not None and (new := widths.of(part, axis % len(shape))) is not None:
            found[number] = new[1]
    if isinstance(sizes, int):
        new_sizes: Any = found[0] if found and len(set(found.values())) == 1 and 0 in found else sizes
    else:
        new_sizes = [found.get(i, s) for i, s in enumerate(sizes)]
    node.args = (node.args[0], new_sizes, *node.args[2:])


_ADAPT: Mapping[Any, Callable[[fx.Node, _Widths], None]] = {
    F.pad: _padding,
    torch.reshape: _viewed,
    "view": _viewed,
    "reshape": _viewed,
    torch.split: _split,
    "split": _split,
    "split_with_sizes": _split,
}


def adapt(module: fx.GraphModule, before: AxisClasses, after: AxisClasses) -> None:
    """Changes numbers in ``module``'s graph that are sizes of axes whose width changed."""
    if all(a.size == b.size for a, b in zip(before, after, strict=True)):
        return
    widths = _Widths(before, after)
    for node in module.graph.nodes:
        if node.op in ("call_function", "call_method") and node.target in _ADAPT:
            _ADAPT[node.target](node, widths)
    module.recompile()
