"""Rescaling for networks without BatchNorm (REPAIR, Jordan et al., arXiv 2211.08403, section 4).

Averaging shrinks activations, more so with depth. Every layer's outputs are given back the mean and the standard
deviation that the parents' have, neuron by neuron, and the scale and shift are folded into the layer:

    W_i <- s_i W_i,  b_i <- s_i (b_i - mean_i) + target_mean_i,   s_i = target_sd_i / sd_i

Layers without bias get the scale only, from root mean squares.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from tqdm import tqdm

from fxmerge.errors import InputError, one_of
from fxmerge.interfaces import AbstractRepair, Context
from fxmerge.ir import AxisClasses, Tap
from fxmerge.ranks import from_first, place, summed, summed_numbers
from fxmerge.repair.runs import Runs, fitting_inputs
from fxmerge.running import evaluating, fitting
from fxmerge.stats import listen

Chosen = dict[str, tuple[str, int]]
"""Node -> the module it calls, the axis of its neurons."""


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

    def join(self) -> None:
        """Adds what the other processes have, seen from the first one's rough mean."""
        if place()[1] == 1:
            return
        assert self.shift is not None
        (shift,) = from_first([self.shift])
        d, n = self.shift - shift, self.count
        counted = torch.tensor([n], dtype=d.dtype, device=d.device)
        parts = self.total + n * d, self.square + 2 * d * self.total + n * d * d, counted
        self.total, self.square, counted = summed(parts)
        self.shift, self.count = shift, round(float(counted))

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
    """Gives each layer's outputs the parents' mean and standard deviation, all layers before it being rescaled already.

    Args:
        toward: "mean", the weighted mean of the parents' statistics, or "first", the first parent's alone (better
            for couplings that are no permutations, where a mapped parent by itself computes something else).
        memory: GB that activations waiting for their layer may take; batches beyond that are left out.
    """

    def __init__(self, toward: str = "mean", memory: float = 2.0) -> None:
        one_of("Rescale", toward=(toward, ("mean", "first")))
        if not memory > 0:
            raise InputError(f"Rescale(memory={memory}): must be positive")
        self.toward, self.memory = toward, memory

    def repair(self, module: fx.GraphModule, context: Context) -> str:
        first = context.classes[0]
        chosen = layers(first)
        if not chosen:
            return "no layers to rescale"
        graphs = [module, *(c.traced.graph_module for c in context.classes)]
        with evaluating(*graphs):
            runs = Runs(module, fitting_inputs(module, context, 1, self.memory))
            targets = self._targets(chosen, context, runs.batches)
            chosen = {n: c for n, c in chosen.items() if n in targets}
            bar = tqdm(chosen, desc="rescaling", disable=not context.progress, leave=False)
            found = {node: _rescaled(runs, node, _Sums(module, chosen[node][0]), chosen, targets) for node in bar}
        with torch.no_grad():
            for node, (target, _) in chosen.items():
                layer: Any = module.get_submodule(target)
                scale, shift = found[node]
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
        batches = round(summed_numbers([runs.batches])[0])
        return f"{len(chosen)} layers rescaled toward the {whom} on {batches} batches"

    def _targets(self, chosen: Chosen, context: Context, batches: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Per node mean and spread, the parents' merged as its neurons were."""
        parents = context.classes if self.toward == "mean" else context.classes[:1]
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for p, parent in enumerate(parents):
            sums = {node: _Sums(context.fused.traced.graph_module, t) for node, (t, _) in chosen.items()}
            graph = parent.traced.graph_module
            for number, batch in zip(range(batches), context.batches, strict=False):
                with fitting(number):
                    args, kwargs = context.feed(batch)
                for node, value in listen(graph, set(chosen), args, kwargs).items():
                    sums[node].add(value, chosen[node][1])
            for s in sums.values():
                s.join()
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


def _rescaled(
    runs: Runs, node: str, sums: _Sums, chosen: Chosen, targets: Mapping[str, tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Scale and shift of a layer, put on its outputs on all batches; neurons that never vary keep their scale."""
    axis = chosen[node][1]
    for batch in range(runs.batches):
        sums.add(runs.past(batch, node), axis)
    sums.join()
    own, (mean, spread) = sums.spread, targets[node]
    scale = torch.where(
        own > 1e-6 * own.max().clamp_min(1e-30), spread.to(own) / own.clamp_min(1e-30), torch.ones_like(own)
    )
    shift = mean.to(own) - scale * sums.mean if sums.central else torch.zeros_like(own)
    for batch in range(runs.batches):
        value = runs.past(batch, node)
        by, plus = (t.to(value).reshape([-1 if d == axis else 1 for d in range(value.dim())]) for t in (scale, shift))
        runs.put(batch, node, value * by + plus)
    return scale, shift
