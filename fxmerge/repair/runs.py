"""A network run on all batches at once, node after node, for repairs that go layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx

from fxmerge.errors import InputError
from fxmerge.interfaces import Context
from fxmerge.running import bind, fitting, fresh


def fitting_inputs(module: fx.GraphModule, context: Context, networks: int, memory: float) -> list[list[Any]]:
    """What the placeholders get, per batch, for as many batches as ``networks`` like this one can hold in memory.

    Args:
        module: on whose values on the first batch that is reckoned.
        context: has the batches.
        networks: how many networks run beside each other.
        memory: GB for what they hold.
    """
    inputs: list[list[Any]] = []
    for number, batch in enumerate(context.batches):
        with fitting(number):
            inputs.append(bind(module.graph, *context.feed(batch)))
        if not number:
            most = memory * 1e9 / (networks * max(Runs(module, inputs).peak(), 1))
        if len(inputs) + 1 > most:
            break
    if not inputs:
        raise InputError("the data is empty: no batch to repair layers on")
    return inputs


class Runs:
    """One network on every batch; each run stands between two nodes, with only the values that are still needed."""

    def __init__(self, module: fx.GraphModule, inputs: Sequence[Sequence[Any]]) -> None:
        self._interpreter = fx.Interpreter(module)
        self._nodes = list(module.graph.nodes)
        self._place = {n.name: i for i, n in enumerate(self._nodes)}
        self._heads = module.graph.find_nodes(op="placeholder")
        self._inputs = inputs
        self._values: list[dict[fx.Node, Any]] = [{} for _ in inputs]
        self._at = [0] * len(inputs)
        self.heard: Callable[[int, str, Any], None] | None = None

    @property
    def batches(self) -> int:
        return len(self._inputs)

    def until(self, batch: int, node: fx.Node) -> dict[fx.Node, Any]:
        """Runs up to just before the node; the values there."""
        self._run(batch, self._place[node.name])
        return self._values[batch]

    def past(self, batch: int, name: str) -> Any:
        """Runs up to just behind the node; its value."""
        self._run(batch, self._place[name] + 1)
        return self._values[batch].get(self._nodes[self._place[name]])

    def put(self, batch: int, name: str, value: Any) -> None:
        """Another value for the node that the run stands behind."""
        self._values[batch][self._nodes[self._place[name]]] = value

    def peak(self) -> int:
        """Runs the first batch to its end; the most bytes that values took on the way."""
        most = 0
        for i in range(len(self._nodes)):
            self._run(0, i + 1)
            held = [v.untyped_storage() for v in self._values[0].values() if isinstance(v, Tensor)]
            most = max(most, sum({s.data_ptr(): s.nbytes() for s in held}.values()))
        return most

    def _run(self, batch: int, end: int) -> None:
        values = self._interpreter.env = self._values[batch]
        if not self._at[batch] < end:
            return
        if not self._at[batch]:
            values.update(zip(self._heads, fresh(self._inputs[batch]), strict=True))
        with fitting(batch):
            for node in self._nodes[self._at[batch] : end]:
                if node.op != "placeholder":
                    values[node] = self._interpreter.run_node(node)
                    if self.heard:
                        self.heard(batch, node.name, values[node])
                for used in self._interpreter.user_to_last_uses.get(node, ()):
                    del values[used]
        self._at[batch] = end
