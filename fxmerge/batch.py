"""Numbers in a recorded graph that follow its inputs, told by recordings on another batch and on other values.

view(x, (2, 3, 8)), view(x, (3, 3, 8))  -->  view(x, (size(input, 0), 3, 8))
zeros(924, 8), zeros(565, 8)            -->  zeros(size(boxes, 0), 8)
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Input:
    """A tensor among the inputs of a graph: its placeholder, where in that one's value it is, and its shape."""

    node: fx.Node
    path: tuple[Any, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Recording:
    """A graph, the shapes of its nodes that gave one tensor, by name, and an input whose axis 0 may be the batch.

    Without inputs there is nothing to follow, and only one recording.
    """

    graph: fx.Graph
    shapes: Mapping[str, tuple[int, ...]]
    source: Input | None


def samples(inputs: Any) -> int | None:
    """The size along axis 0, where all tensors among the inputs have the same."""
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    sizes = {t.shape[0] if t.ndim else None for t in tensors}
    return None if len(sizes) != 1 else sizes.pop() or None


def repeated(inputs: Any, count: int) -> Any:
    """The inputs' samples over and over along axis 0, ``count`` of them."""

    def taken(leaf: Any) -> Any:
        return leaf[torch.arange(count, device=leaf.device) % len(leaf)] if isinstance(leaf, Tensor) else leaf

    return pytree.tree_map(taken, inputs)


def shuffled(inputs: Any) -> Any:
    """The inputs with the values of every tensor of numbers in another order; of integers where there is no other."""
    rng = torch.Generator().manual_seed(0)
    floating = any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in pytree.tree_leaves(inputs))

    def taken(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.is_floating_point() != floating:
            return leaf
        return leaf.flatten()[torch.randperm(leaf.numel(), generator=rng).to(leaf.device)].view(leaf.shape)

    return pytree.tree_map(taken, inputs)


def follow(first: Recording, others: Sequence[Recording]) -> str | None:
    """Makes numbers of the first graph that differ in others expressions of the batch size, or sizes of tensors.

    Args:
        first: its graph is changed in place.
        others: recordings on another batch, on other values.

    Returns:
        Why it cannot be done, or None where it was; then the graph is unchanged, or half of it is.
    """
    if not others:
        return None
    for other in others:
        if len(first.graph.nodes) != len(other.graph.nodes):
            return f"there are {len(other.graph.nodes)} operations on another batch instead of {len(first.graph.nodes)}"
    sizes = _Sizes(first, others)
    for node, *twins in zip(*(list(r.graph.nodes) for r in (first, *others)), strict=True):
        if any((node.op, node.target) != (twin.op, twin.target) for twin in twins):
            return f"'{node.name}' is another operation there"
        sizes.twins[node] = twins
        try:
            changed = sizes.joined([(n.args, n.kwargs) for n in (node, *twins)])
        except _Unlike:
            return f"the arguments of '{node.name}' follow neither the batch size linearly nor the size of a tensor"
        node.args, node.kwargs = changed
        sizes.see(node)
    return None


class _Unlike(Exception):
    """Arguments that differ by more than sizes."""


class _Sizes:
    """Nodes for what differs among recordings: ``slope * batch + rest``, or the size of an earlier node along an axis.

    Attributes:
        twins: node -> its counterparts in the other graphs.
        more: the other recordings' samples beyond those of the first.
    """

    def __init__(self, first: Recording, others: Sequence[Recording]) -> None:
        self.graph, self.shapes = first.graph, [r.shapes for r in (first, *others)]
        self.source, *there = (cast(Input, r.source) for r in (first, *others))
        self.more = [source.shape[0] - self.source.shape[0] for source in there]
        self.twins: dict[fx.Node, list[fx.Node]] = {}
        self.made: dict[tuple[int, int], fx.Node] = {}
        self.read: dict[tuple[int, ...], fx.Node] = {}
        self.at: dict[tuple[int, ...], tuple[fx.Node, int]] = {}
        self.last = list(self.graph.find_nodes(op="placeholder"))[-1]

    def see(self, node: fx.Node) -> None:
        """Sizes of a node's value that differ among the recordings may be what numbers further on are."""
        shapes = [s.get(n.name) for s, n in zip(self.shapes, (node, *self.twins[node]), strict=True)]
        if None not in shapes and len({len(s) for s in shapes if s is not None}) == 1:
            for axis, values in enumerate(zip(*shapes, strict=True)):  # type: ignore[arg-type]
                if len(set(values)) > 1:
                    self.at.setdefault(values, (node, axis))

    def joined(self, values: Sequence[Any]) -> Any:
        """What stands for all of them."""
        one, *rest = values
        if isinstance(one, fx.Node):
            if self.twins[one] != rest:
                raise _Unlike
            return one
        if any(type(other) is not type(one) for other in rest):
            raise _Unlike
        if isinstance(one, slice):
            return slice(*self.joined([[v.start, v.stop, v.step] for v in values]))
        if isinstance(one, Mapping):
            if any(list(other) != list(one) for other in rest):
                raise _Unlike
            return {key: self.joined([v[key] for v in values]) for key in one}
        if isinstance(one, (tuple, list)):
            if any(len(other) != len(one) for other in rest):
                raise _Unlike
            return type(one)(self.joined(parts) for parts in zip(*values, strict=True))
        if one != one or all(other == one for other in rest):
            return one
        if type(one) is not int:
            raise _Unlike
        return self.number(tuple(values))

    def number(self, values: tuple[int, ...]) -> fx.Node:
        one, *rest = values
        slope = next(((v - one) // more for v, more in zip(rest, self.more, strict=True) if more), 0)
        if all(v - one == slope * more for v, more in zip(rest, self.more, strict=True)):
            return self.node(slope, one - slope * self.source.shape[0])
        if values not in self.at:
            raise _Unlike
        if values not in self.read:
            node, axis = self.at[values]
            with self.graph.inserting_after(node):
                self.read[values] = self.graph.call_method("size", (node, axis))
        return self.read[values]

    def node(self, slope: int, rest: int) -> fx.Node:
        if (slope, rest) not in self.made:
            self.made[slope, rest] = self._expression(slope, rest)
        return self.made[slope, rest]

    def _expression(self, slope: int, rest: int) -> fx.Node:
        if rest:
            return self._append("call_function", operator.add, self.node(slope, 0), rest)
        if slope != 1:
            return self._append("call_function", operator.mul, self.node(1, 0), slope)
        node = next(n for n in self.graph.nodes if n.name == self.source.node.name)
        for key in self.source.path:
            node = self._append("call_function", operator.getitem, node, key)
        return self._append("call_method", "size", node, 0)

    def _append(self, op: str, target: Any, *args: Any) -> fx.Node:
        with self.graph.inserting_after(self.last):
            self.last = self.graph.create_node(op, target, args)
        return self.last
