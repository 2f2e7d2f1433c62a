"""Numbers in a recorded graph that follow the batch size, told by a second recording on another batch.

view(x, (2, 3, 8)), view(x, (3, 3, 8))  -->  view(x, (size(input, 0), 3, 8))
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Input:
    """A tensor among the inputs of a graph: its placeholder, where in that one's value it is, and its shape."""

    node: fx.Node
    path: tuple[Any, ...]
    shape: tuple[int, ...]


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


def follow(graph: fx.Graph, other: fx.Graph, source: Input, there: Input) -> str | None:
    """Makes numbers of ``graph`` that differ in ``other`` linear expressions of the batch size.

    Args:
        graph: the recording; changed in place.
        other: the recording on another batch.
        source: an input of ``graph`` whose axis 0 is the batch.
        there: that input of ``other``.

    Returns:
        Why it cannot be done, or None where it was; then the graph is unchanged, or half of it is.
    """
    if len(graph.nodes) != len(other.nodes):
        return f"there are {len(other.nodes)} operations on another batch instead of {len(graph.nodes)}"
    pairs = dict(zip(graph.nodes, other.nodes, strict=True))
    sizes = _Sizes(graph, source, there.shape[0] - source.shape[0])
    for node, twin in pairs.items():
        if (node.op, node.target) != (twin.op, twin.target):
            return f"'{node.name}' is another operation there"
        try:
            changed = sizes.joined((node.args, node.kwargs), (twin.args, twin.kwargs), pairs)
        except _Unlike:
            return f"the arguments of '{node.name}' do not follow the batch size linearly"
        node.args, node.kwargs = changed
    return None


class _Unlike(Exception):
    """Two arguments that differ by more than sizes."""


class _Sizes:
    """Nodes for ``slope * batch + rest``, made once each; ``more`` samples are in the other graph."""

    def __init__(self, graph: fx.Graph, source: Input, more: int) -> None:
        self.graph, self.source, self.more = graph, source, more
        self.made: dict[tuple[int, int], fx.Node] = {}
        self.last = list(graph.find_nodes(op="placeholder"))[-1]

    def joined(self, one: Any, two: Any, pairs: Mapping[fx.Node, fx.Node]) -> Any:
        """What stands for both arguments."""
        if isinstance(one, fx.Node):
            if pairs[one] is not two:
                raise _Unlike
            return one
        if type(one) is not type(two):
            raise _Unlike
        if isinstance(one, slice):
            return slice(*self.joined([one.start, one.stop, one.step], [two.start, two.stop, two.step], pairs))
        if isinstance(one, Mapping):
            if list(one) != list(two):
                raise _Unlike
            return {key: self.joined(one[key], two[key], pairs) for key in one}
        if isinstance(one, (tuple, list)):
            if len(one) != len(two):
                raise _Unlike
            return type(one)(self.joined(a, b, pairs) for a, b in zip(one, two, strict=True))
        if one == two or one != one:
            return one
        if type(one) is not int or (two - one) % self.more:
            raise _Unlike
        slope = (two - one) // self.more
        return self.node(slope, one - slope * self.source.shape[0])

    def node(self, slope: int, rest: int) -> fx.Node:
        if (slope, rest) not in self.made:
            self.made[slope, rest] = self._expression(slope, rest)
        return self.made[slope, rest]

    def _expression(self, slope: int, rest: int) -> fx.Node:
        if rest:
            return self._append("call_function", operator.add, self.node(slope, 0), rest)
        if slope != 1:
            return self._append("call_function", operator.mul, self.node(1, 0), slope)
        node = self.source.node
        for key in self.source.path:
            node = self._append("call_function", operator.getitem, node, key)
        return self._append("call_method", "size", node, 0)

    def _append(self, op: str, target: Any, *args: Any) -> fx.Node:
        with self.graph.inserting_after(self.last):
            self.last = self.graph.create_node(op, target, args)
        return self.last
