"""Rescaling for networks without BatchNorm (REPAIR, Jordan et al., arXiv 2211.08403, section 4).

Averaging shrinks activations, more so with depth. Every layer's outputs are given back the mean and the standard
deviation that the parents' have, neuron by neuron, and the scale and shift are folded into the layer:

    W_i <- s_i W_i,  b_i <- s_i (b_i - mean_i) + target_mean_i,   s_i = target_sd_i / sd_i

Layers without bias get the scale only, from root mean squares.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from tqdm import tqdm

from fxmerge.errors import InputError, one_of
from fxmerge.interfaces import AbstractRepair, Context
from fxmerge.ir import AxisClasses, Tap
from fxmerge.running import bind, evaluating, fitting
from fxmerge.stats import listen


class _Sums:
    """Running mean and spread along one axis, in float64: around the mean, or around zero for a layer without bias."""

    def __init__(self, module: fx.GraphModule, layer: str) -> None:
        self.central = module.get_submodule(layer).bias is not None
        self.count, self.total, self.square = 0, torch.zeros(()), torch.zeros(())
        self.shift: Tensor | None = None

    def add(self, value: Tensor, axis: int) -> None:
        x = value.movedim(axis, -1).reshape(-1, value.shape[axis]).double()
        self.shift = x.mean(0) if self.shift is None else self.shift
        x = x - self.shift
        self.count += len(x)
        self.total = self.total.to(x) + x.sum(0)
        self.square = self.square.to(x) + (x * x).sum(0)

    @property
    def mean(self) -> Tensor:
        assert self.shift is not None
        return self.shift + self.total / self.count

    @property
    def spread(self) -> Tensor:
        mean = self.total / self.count
        variance = (self.square / self.count - mean * mean).clamp_min(0)
        return (variance if self.central else variance + self.mean.square()).sqrt()


def layers(classes: AxisClasses) -> dict[str, tuple[str, int]]:
    """Node -> (module, axis): layers whose scale can be set: called once, with free neurons, no norm."""
    graph = classes.traced.graph_module
    calls: dict[str, int] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module":
            calls[node.target] = calls.get(node.target, 0) + 1
    made: dict[str, Tap] = {t.node: t for c in classes if c.free for t in c.taps if t.kind == "made"}
    tied = {n for name, others in classes.aliases.items() for n in (name, *others)}
    found = {}
    for node in graph.graph.nodes:
        if node.name in made and node.op == "call_module" and calls[node.target] == 1:
            layer = graph.get_submodule(node.target)
            bias = getattr(layer, "bias", None)
            weight = getattr(layer, "weight", None)
            if (
                (bias is None or isinstance(bias, Tensor))
                and isinstance(weight, Tensor)
                and hasattr(layer, "bias")
                and not hasattr(layer, "running_mean")
                and not {f"{node.target}.weight", f"{node.target}.bias"} & tied
            ):
                found[node.name] = (node.target, made[node.name].axis)
    return found


class Rescale(AbstractRepair):
    """Gives each layer's outputs the parents' mean and standard deviation.

    Args:
        toward: "mean", the weighted mean of the parents' statistics, or "first", the first parent's alone (better
            for couplings that are no permutations, where a mapped parent by itself computes something else).
    """

    def __init__(self, toward: str = "mean") -> None:
        one_of("Rescale", toward=(toward, ("mean", "first")))
        self.toward = toward

    def repair(self, module: fx.GraphModule, context: Context) -> str:
        first = context.classes[0]
        chosen = layers(first)
        if not chosen:
            return "no layers to rescale"
        targets = self._targets(chosen, context)
        chosen = {n: c for n, c in chosen.items() if n in targets}
        runner = _Normalised(module, chosen, targets)
        count = 0
        with evaluating(module):
            for batch in tqdm(context.batches, desc="rescaling", disable=not context.progress, leave=False):
                with fitting(count):
                    args, kwargs = context.feed(batch)
                    runner.run(*bind(module.graph, args, kwargs))
                count += 1
        if not count:
            raise InputError("the data is empty: no batch to rescale layers on")
        with torch.no_grad():
            for node, (target, _) in chosen.items():
                layer: Any = module.get_submodule(target)
                scale, shift = runner.affine(node)
                axis = 1 if isinstance(layer, nn.modules.conv._ConvTransposeNd) else 0
                rows = scale.to(layer.weight)
                if axis == 0:
                    layer.weight.mul_(rows.reshape(-1, *[1] * (layer.weight.dim() - 1)))
                else:
                    inner = rows.reshape(layer.groups, 1, -1).expand(-1, layer.weight.shape[0] // layer.groups, -1)
                    layer.weight.mul_(inner.reshape(*layer.weight.shape[:2], *[1] * (layer.weight.dim() - 2)))
                if layer.bias is not None:
                    layer.bias.copy_(scale.to(layer.bias) * layer.bias + shift.to(layer.bias))
        whom = "parents" if self.toward == "mean" else "first parent"
        return f"{len(chosen)} layers rescaled toward the {whom} on {count} batches"

    def _targets(self, chosen: dict[str, tuple[str, int]], context: Context) -> dict[str, tuple[Tensor, Tensor]]:
        """Per node mean and spread, the parents' merged as its neurons were."""
        parents = context.classes if self.toward == "mean" else context.classes[:1]
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for p, parent in enumerate(parents):
            sums = {node: _Sums(context.fused.traced.graph_module, t) for node, (t, _) in chosen.items()}
            graph = parent.traced.graph_module
            with evaluating(graph):
                for number, batch in enumerate(context.batches):
                    with fitting(number):
                        args, kwargs = context.feed(batch)
                    for node, value in listen(graph, set(chosen), args, kwargs).items():
                        sums[node].add(value, chosen[node][1])
            if not all(s.count for s in sums.values()):
                raise InputError("the data is empty: no batch to rescale layers on")
            for node, s in sums.items():
                if self.toward == "first":
                    found[node] = s.mean, s.spread
                    continue
                mixes = context.mixes(node, chosen[node][1])
                if mixes is None:
                    continue
                mean, spread = (mixes[p].to(x) @ x for x in (s.mean, s.spread))
                known = found.get(node, (0.0, 0.0))
                found[node] = known[0] + mean, known[1] + spread
        return {n: (mean, spread.abs()) for n, (mean, spread) in found.items()}


class _Normalised(fx.Interpreter):
    """Runs the fused graph as if every chosen layer were already repaired, with each batch's own statistics."""

    def __init__(
        self, module: fx.GraphModule, chosen: dict[str, tuple[str, int]], targets: dict[str, tuple[Tensor, Tensor]]
    ) -> None:
        super().__init__(module)
        self.chosen, self.targets = chosen, targets
        self.sums = {node: _Sums(module, target) for node, (target, _) in chosen.items()}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name not in self.chosen:
            return value
        axis = self.chosen[n.name][1]
        self.sums[n.name].add(value, axis)
        scale, shift = (
            t.to(value).reshape([-1 if d == axis else 1 for d in range(value.dim())]) for t in self.affine(n.name)
        )
        return value * scale + shift

    def affine(self, node: str) -> tuple[Tensor, Tensor]:
        """Scale and shift from what was seen so far; neurons that never vary keep their scale."""
        sums, (mean, spread) = self.sums[node], self.targets[node]
        own = sums.spread
        scale = torch.where(
            own > 1e-6 * own.max().clamp_min(1e-30), spread.to(own) / own.clamp_min(1e-30), torch.ones_like(own)
        )
        return scale, mean.to(own) - scale * sums.mean if sums.central else torch.zeros_like(own)
