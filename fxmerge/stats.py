"""Where a network's activations show its classes, and looking at them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxmerge.ir import AxisClasses, Tap
from fxmerge.running import bind

Feed = Callable[[Any], tuple[tuple[Any, ...], dict[str, Any]]]


def choose_taps(
    classes: AxisClasses, kind: str = "read", most: int = 4, avoid: frozenset[str] = frozenset()
) -> dict[int, tuple[Tap, ...]]:
    """Per free class the activations to measure, at most ``most``, evenly over the depth.

    ``kind``: "read", what the next contraction reads (after activations); "made", what a contraction wrote. Nodes to
    ``avoid`` count only where there are no others.
    """
    shown: dict[str, set[int]] = {}  # node -> axes along which neurons may move
    for c in classes:
        for t in c.taps if c.free and c.size > 1 else ():
            shown.setdefault(t.node, set()).add(t.axis)
    live = _from_inputs(classes)
    chosen = {}
    for k, c in enumerate(classes):
        # rows over another axis of neurons, or of a parameter, are not the same rows in every parent
        seen = [t for t in c.taps if t.node in live and shown.get(t.node, {t.axis}) == {t.axis}]
        seen = [t for t in seen if t.node not in avoid] or seen
        if c.free and seen:
            taps = [t for t in seen if t.kind == kind] or seen
            if not c.turned:
                chosen[k] = _spread(taps, most)
                continue
            parts = [p for t in taps for p in t.parts()]  # both sides by themselves, and as many of each
            halves = [[p for p in parts if any(p.turned) is side] for side in (False, True)]
            chosen[k] = tuple(p for half in halves for p in _spread(half, most // 2))
    return chosen


def _spread(taps: Sequence[Tap], most: int) -> tuple[Tap, ...]:
    step = (len(taps) - 1) / max(most - 1, 1)
    return tuple(taps) if len(taps) <= most else tuple(taps[round(i * step)] for i in range(most))


def _from_inputs(classes: AxisClasses) -> set[str]:
    """Names of the nodes that depend on the network's inputs."""
    found: set[str] = set()
    for n in classes.traced.graph_module.graph.nodes:
        if n.op == "placeholder" or any(m.name in found for m in n.all_input_nodes):
            found.add(n.name)
    return found


class _Listener(fx.Interpreter):
    """Runs a graph and keeps the outputs of some nodes."""

    def __init__(self, module: fx.GraphModule, nodes: set[str]) -> None:
        super().__init__(module)
        self.nodes = nodes
        self.heard: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.nodes:
            self.heard[n.name] = value
        return value


def listen(
    module: fx.GraphModule, nodes: set[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Tensor]:
    """One forward pass; the outputs of the named nodes, copied where a later in-place operation would change them."""
    inplace = _overwritten(module, nodes)
    listener = _Listener(module, nodes)
    if inplace:
        run = listener.run_node

        def keep(n: fx.Node) -> Any:
            value = run(n)
            if n.name in inplace:
                listener.heard[n.name] = value.clone()
            return value

        listener.run_node = keep  # type: ignore[method-assign]
    listener.run(*bind(module.graph, args, kwargs))
    return listener.heard


def _overwritten(module: fx.GraphModule, nodes: set[str]) -> set[str]:
    """Those of the nodes whose output a user changes in place."""
    found = set()
    for n in module.graph.nodes:
        if n.name in nodes:
            for user in n.users:
                target = module.get_submodule(user.target) if user.op == "call_module" else user.target
                name = getattr(target, "__name__", str(target))
                if (
                    getattr(target, "inplace", False)
                    or user.kwargs.get("inplace")
                    or (name.endswith("_") and not name.endswith("__"))
                ):
                    found.add(n.name)
                if name.startswith("i") and getattr(target, "__module__", "") == "_operator":
                    found.add(n.name)
    return found


def rows(value: Tensor, tap: Tap, positions: Tensor | None) -> Tensor:
    """[rows, n]: a class's neurons in one activation, a row per sample and position.

    A neuron with several places along the axis (a flattened feature map) gives a row for each.
    """
    flat = value.movedim(tap.axis, -1)
    if positions is None:
        flat = flat.reshape(-1, flat.shape[-1])
    else:  # picked before anything is copied
        flat = flat[tuple(i.to(value.device) for i in torch.unravel_index(positions, flat.shape[:-1]))]
    n, m = tap.index.shape
    if m == 1 and n == flat.shape[1] and torch.equal(tap.index[:, 0], torch.arange(n)):
        return flat
    return flat.index_select(1, tap.index.T.reshape(-1).to(value.device)).reshape(-1, n)
