"""Layers refitted in closed form (the second step of PLeaS, Nasery et al., arXiv 2407.02447).

Layer after layer, with z the layer's inputs in the fused network as repaired so far and t what its outputs should be:

    W, c = argmin  mean || W z + c - t ||^2  +  ridge * mean(z_i^2) * || W - S W0 ||^2

W0 is what merging gave; the diagonal S rescales each of its rows to fit t best. The targets t are the parents' outputs
(behind their own BatchNorm, where one follows), merged as the layer's neurons were. Where a ReLU follows, t is the
merged activation wherever that is positive, and the merged pre-activation elsewhere.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from fxmerge.errors import InputError
from fxmerge.interfaces import AbstractRepair, Context
from fxmerge.ranks import draw, ordinal, summed, summed_numbers
from fxmerge.regression import LAYERS, Sums, patches, refit, set_statistics
from fxmerge.repair.runs import Runs, fitting_inputs
from fxmerge.running import evaluating

_RELU = frozenset({nn.ReLU, F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"})
_FEWEST = 4096  # rows for a layer, however few its unknowns


@dataclass(frozen=True, eq=False)
class _Step:
    """A layer to refit.

    Attributes:
        node, layer, axis: its call, the module, the axis of its channels.
        norm, relu: the nodes of the BatchNorm and of the ReLU behind it, where these follow directly.
        mixes: per parent [n, n_p]: the fused network's channels from that parent's.
    """

    node: fx.Node
    layer: Any
    axis: int
    norm: fx.Node | None
    relu: fx.Node | None
    mixes: tuple[Tensor, ...]

    @property
    def out(self) -> str:
        return (self.norm or self.node).name

    @property
    def last(self) -> str:
        return self.relu.name if self.relu else self.out

    @property
    def groups(self) -> int:
        return getattr(self.layer, "groups", 1)


class LeastSquares(AbstractRepair):
    """Refits linear layers and convolutions to the parents' merged outputs; other BatchNorms are re-estimated.

    Costs about one forward pass per network on the data, and rows * unknowns^2 per layer for its normal equations.
    Layers that are called twice, share their weights or have channels of unknown origin keep theirs.

    Args:
        ridge: pull toward the weights that merging gave, relative to the mean square of the layer's inputs.
        rows: rows (samples x positions) per unknown of a neuron, drawn at random where there are more.
        memory: GB that activations waiting for their layer may take; batches beyond that are left out.
    """

    def __init__(self, ridge: float = 0.1, rows: float = 20.0, memory: float = 2.0) -> None:
        if not (ridge > 0 and rows > 0 and memory > 0):
            raise InputError(f"LeastSquares(ridge={ridge}, rows={rows}, memory={memory}): all three must be positive")
        self.ridge, self.rows, self.memory = ridge, rows, memory

    def repair(self, module: fx.GraphModule, context: Context) -> str:
        steps = _plan(module, context)
        graphs = [module, *(c.traced.graph_module for c in context.classes)]
        statistics: dict[_BatchNorm, tuple[Tensor, Tensor]] = {}
        refitted = 0
        with evaluating(*graphs):
            inputs = fitting_inputs(module, context, len(graphs), self.memory)
            fused = Runs(module, inputs)
            source = _Targets(steps, [Runs(g, inputs) for g in graphs[1:]], self.rows, context.seed)
            settled: set[str] = set()
            seen: defaultdict[nn.Module, list[tuple[int, Tensor, Tensor]]] = defaultdict(list)
            for node in tqdm(module.graph.nodes, desc="least squares", disable=not context.progress, leave=False):
                layer = _module(module, node)
                if step := steps.get(node.name):
                    sums = Sums()
                    for batch in range(len(inputs)):
                        x = fused.until(batch, node)[node.args[0]]
                        if (found := source.of(step, batch, tuple(x.shape[:1]))) is not None:
                            places, target = found
                            sums.add(patches(layer, x, places), target.unflatten(1, (step.groups, -1)))
                    sums.join()
                    if sums and refit(layer, _module(module, step.norm), sums, self.ridge, statistics):
                        refitted += 1
                        settled.add(step.out)
                elif isinstance(layer, _BatchNorm) and layer.running_mean is not None and node.name not in settled:
                    seen[layer] += [_part(fused.until(b, node)[node.args[0]]) for b in range(len(inputs))]
                    set_statistics(statistics, layer, *_pooled(seen[layer]))
        for norm, moments in statistics.items():  # the buffers have just been restored
            set_statistics({}, norm, *moments)
        batches = round(summed_numbers([len(inputs)])[0])
        return f"{refitted} layers refitted by least squares on {batches} batches"


class _Targets:
    """The parents' outputs at sampled places, merged; picked while they run, before anything may overwrite them."""

    def __init__(self, steps: dict[str, _Step], parents: Sequence[Runs], rows: float, seed: int) -> None:
        self._steps = {name: s for s in steps.values() for name in (s.out, s.last)}
        self._parents, self._rows, self._seed = parents, rows, seed
        self._batches = summed_numbers([parents[0].batches])[0]
        self._places: dict[tuple[fx.Node, int], tuple[Tensor, ...]] = {}
        self._sums: dict[tuple[str, int], Tensor] = {}
        self._shapes: defaultdict[tuple[fx.Node, int], set[tuple[int, ...]]] = defaultdict(set)
        for p, runs in enumerate(parents):
            runs.heard = lambda batch, name, value, p=p: self._hear(p, batch, name, value)  # type: ignore[misc]

    def of(self, step: _Step, batch: int, length: tuple[int, ...]) -> tuple[tuple[Tensor, ...], Tensor] | None:
        """Places in the layer's output (an index per axis but the channels') and targets there [rows, n].

        None where the networks chose their own boxes or tokens, other than ``length`` of them: no two are the same.
        """
        for runs in self._parents:
            runs.past(batch, step.last)
        shapes = self._shapes.pop((step.node, batch))
        if len(shapes) > 1 or {s[:1] for s in shapes} != {length}:
            return None
        target = self._sums.pop((step.out, batch))
        if step.relu:
            after = self._sums.pop((step.last, batch))
            target = torch.where(after > 0, after, target)
        return self._places.pop((step.node, batch)), target

    def _hear(self, p: int, batch: int, name: str, value: Tensor) -> None:
        step = self._steps.get(name)
        if step is None:
            return
        value = value.movedim(step.axis, -1)
        self._shapes[step.node, batch].add(tuple(value.shape[:-1]))
        if len(self._shapes[step.node, batch]) > 1:
            return
        places = self._places.get((step.node, batch))
        if places is None:
            every, wanted = math.prod(value.shape[:-1]), self._rows * step.layer.weight[0].numel()
            most = math.ceil(max(wanted, _FEWEST) / self._batches)
            order = draw(self._seed, step.node.name, ordinal(batch))
            chosen = torch.randperm(every, generator=order)[:most] if every > most else torch.arange(every)
            places = tuple(i.to(value.device) for i in torch.unravel_index(chosen, value.shape[:-1]))
            self._places[step.node, batch] = places
        rows = value[places] @ step.mixes[p].to(value).T
        known = self._sums.get((name, batch))
        self._sums[name, batch] = rows if known is None else known + rows


def _part(x: Tensor) -> tuple[int, Tensor, Tensor]:
    """Rows, mean and variance over all axes but axis 1."""
    x = x.transpose(0, 1).flatten(1)
    variance, mean = torch.var_mean(x, 1, correction=0)
    return x.shape[1], mean.to("cpu", torch.float64), variance.to("cpu", torch.float64)


def _pooled(parts: Sequence[tuple[int, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of all rows together, whichever process has them."""
    (count,) = summed_numbers([sum(n for n, _, _ in parts)])
    mean = summed([torch.stack([n * m for n, m, _ in parts]).sum(0)])[0] / count
    spread = torch.stack([n * (v + (m - mean).square()) for n, m, v in parts]).sum(0)
    return mean, summed([spread])[0] / max(count - 1, 1)


def _plan(module: fx.GraphModule, context: Context) -> dict[str, _Step]:
    """The layers to refit, by the name of their node."""
    nodes = list(module.graph.nodes)
    calls = Counter(n.target for n in nodes if n.op == "call_module")
    shared = {n for name, others in context.fused.aliases.items() for n in (name, *others)}
    shared |= {n.target for n in nodes if n.op == "get_attr"}

    def alone(node: fx.Node) -> bool:
        return calls[node.target] == 1 and not {f"{node.target}.weight", f"{node.target}.bias"} & shared

    found = {}
    for node in nodes:
        layer = _module(module, node)
        spatial, rank = LAYERS.get(type(layer)), len(context.fused.traced.shapes.get(node.name, ()))
        if spatial is None or not alone(node) or not isinstance(layer.weight, nn.Parameter):
            continue
        if rank < 2 or (spatial and rank != spatial + 2) or not (node.args and isinstance(node.args[0], fx.Node)):
            continue
        axis = 1 if spatial else rank - 1
        mixes = context.mixes(node.name, axis)
        if mixes is None or len(mixes[0]) != layer.weight.shape[0]:
            continue
        norm = _only_user(node)
        follower = _module(module, norm)
        genuine = isinstance(follower, _BatchNorm) and follower.affine and follower.running_mean is not None
        if norm is None or not genuine or axis != 1 or not alone(norm):
            norm = None
        relu = _only_user(norm or node)
        if relu is not None and (type(_module(module, relu)) if relu.op == "call_module" else relu.target) not in _RELU:
            relu = None
        found[node.name] = _Step(node, layer, axis, norm, relu, mixes)
    return found


def _module(module: fx.GraphModule, node: fx.Node | None) -> Any:
    """The module that the node calls, if it does."""
    return module.get_submodule(str(node.target)) if node is not None and node.op == "call_module" else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
