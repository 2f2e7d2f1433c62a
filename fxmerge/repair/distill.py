"""Label-free polish: the fused network learns its parents' merged outputs and features (Hinton et al., 1503.02531).

With f the fused network's neurons at a tap and f_p those of parent p,

    loss = mean over outputs of D  +  features * mean over taps of D,    D = | f - sum_p merge_p f_p |^2 / variance
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree
from tqdm import tqdm

from fxmerge.errors import InputError
from fxmerge.interfaces import AbstractRepair, Context
from fxmerge.ir import Tap
from fxmerge.linalg import Map
from fxmerge.ranks import averaged, place, summed_numbers
from fxmerge.repair.batchnorm import ResetBatchNorm, batchnorms
from fxmerge.running import fitting, fresh, preserved
from fxmerge.stats import listen

_MOMENTUM = 0.1  # of BatchNorm statistics while the weights move
_WARMUP = 10  # steps until the learning rate is reached

Call = tuple[tuple[Any, ...], dict[str, Any]]
Term = tuple[str, tuple[Tap | None, ...], tuple[Map, ...]]  # node, taps, maps of a _Goal


class Distill(AbstractRepair):
    """Trains the fused network, without labels, toward its parents' merged outputs and features (Adam, cosine decay).

    Some batches are held back; the weights that did best on them are kept, those at the start included. BatchNorm
    normalises with each batch's statistics and follows them; everything else, dropout too, is in eval mode. On several
    processes every step takes the mean of their gradients, each on a batch of its own.

    Args:
        steps: batches to train on, one forward pass of every network and one backward pass each.
        lr: highest learning rate.
        features: weight of the features that contractions read, beside the outputs; 0 leaves them out.
        held: share of the batches that is held back, at least one (a single batch serves for both).
        first: a repair to start from; without one, BatchNorm statistics are re-estimated.
        memory: GB that the batches may take; those beyond that are left out.
    """

    def __init__(
        self,
        steps: int = 300,
        lr: float = 3e-4,
        features: float = 1.0,
        held: float = 0.1,
        first: AbstractRepair | None = None,
        memory: float = 2.0,
    ) -> None:
        if not (steps >= 1 and lr > 0 and features >= 0 and 0 < held < 1 and memory > 0):
            raise InputError(
                f"Distill(steps={steps}, lr={lr}, features={features}, held={held}, memory={memory}): steps must be at "
                "least 1, lr and memory positive, features not negative and held between 0 and 1"
            )
        if not (first is None or isinstance(first, AbstractRepair)):
            raise InputError(f"Distill(first={first!r}): give a repair, such as LeastSquares(), or None")
        self.steps, self.lr, self.features = steps, lr, features
        self.held, self.first, self.memory = held, first, memory

    def repair(self, module: fx.GraphModule, context: Context) -> str:
        norms = batchnorms(module)
        first = self.first or (ResetBatchNorm() if norms else None)
        said = "" if first is None else f"{first.repair(module, context)}; "
        calls = self._calls(context)
        back = min(max(1, round(self.held * len(calls))), len(calls) - 1)
        held, calls = calls[:back] or calls, calls[back:]
        values: list[Any] = [p.data for p in module.parameters()]
        values += [b for m in norms for b in (m.running_mean, m.running_var)]
        with _training(module, norms, [c.traced.graph_module for c in context.classes]):
            loss = _Loss(module, context, self.features, held[0])
            if not loss.goals:
                return f"{said}nothing to distil: no output is a floating tensor"
            start = best = loss.over(module, held)
            each = max(1, round(summed_numbers([len(calls)])[0] / place()[1]))
            kept = [v.clone() for v in values]
            for step in self._steps(module, norms, loss, calls, context):
                if step % each == 0 or step == self.steps:
                    now = loss.over(module, held)
                    if now < best or not math.isfinite(best):
                        best, kept = now, [v.clone() for v in values]
        for value, keep in zip(values, kept, strict=True):
            value.copy_(keep)
        return f"{said}distilled in {self.steps} steps: loss on held-back batches {start:.3g} before, {best:.3g} after"

    def _steps(
        self, module: fx.GraphModule, norms: Sequence[_BatchNorm], loss: _Loss, calls: Sequence[Call], context: Context
    ) -> Iterator[int]:
        """Trains; the number of every step when it is done."""
        draw = torch.Generator().manual_seed(context.seed)
        optimiser = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=self.lr)
        order: list[int] = []
        bar = tqdm(range(1, self.steps + 1), desc="distilling", disable=not context.progress, leave=False)
        for step in bar:
            decay = 0.5 * (1 + math.cos(math.pi * (step - 1) / self.steps))
            optimiser.param_groups[0]["lr"] = self.lr * decay * min(1.0, step / _WARMUP)
            order = order or torch.randperm(len(calls), generator=draw).tolist()
            _set_modes(norms, True)
            with torch.enable_grad():
                number = order.pop()
                with fitting(number):
                    value = loss(module, calls[number])
                value.backward()  # type: ignore[no-untyped-call]
            _set_modes(norms, False)
            moving = [p.grad for p in module.parameters() if p.grad is not None]
            moving += [b for m in norms for b in (m.running_mean, m.running_var) if b is not None]
            if place()[1] > 1:
                for tensor, mean in zip(moving, averaged(moving), strict=True):
                    tensor.copy_(mean)
            optimiser.step()
            optimiser.zero_grad()
            bar.set_postfix(loss=f"{float(value):.3g}", refresh=False)
            yield step

    def _calls(self, context: Context) -> list[Call]:
        """The batches as calls, as many as fit into the memory."""
        calls: list[Call] = []
        size = 0
        for number, batch in enumerate(context.batches):
            with fitting(number):
                calls.append(context.feed(batch))
            size += sum(t.nbytes for t in pytree.tree_leaves(calls[-1]) if isinstance(t, Tensor))
            if size * (1 + 1 / len(calls)) > self.memory * 1e9 and len(calls) > 1:
                break
        if not calls:
            raise InputError("the data is empty: no batch to distil on")
        return calls


@contextmanager
def _training(module: nn.Module, norms: Sequence[_BatchNorm], parents: Sequence[nn.Module]) -> Iterator[None]:
    """Everything in eval mode and without gradients but for the module's parameters; left as found."""
    before = [(p, p.requires_grad) for p in module.parameters()]
    with preserved(module, *parents), torch.no_grad():
        _set_modes([m for network in (module, *parents) for m in network.modules()], False)
        for norm in norms:
            norm.momentum = _MOMENTUM
        try:
            for p, _ in before:
                p.requires_grad_(p.is_floating_point())
            yield
        finally:
            for p, required in before:
                p.grad = None
                p.requires_grad_(required)


def _set_modes(modules: Sequence[nn.Module], training: bool) -> None:
    for m in modules:
        m.training = training


@dataclass(frozen=True, eq=False)
class _Goal:
    """One term of the loss: where neurons show in the fused network and in its parents, and how these are merged.

    Without taps the whole tensors are compared.
    """

    node: str
    weight: float
    taps: tuple[Tap | None, ...]  # the fused network's, then the parents'
    maps: tuple[Map, ...]

    def __call__(self, ours: Tensor, theirs: Sequence[Tensor]) -> Tensor:
        own, *origins = self.taps
        axis = own.axis if own is not None else 0
        parts = [m(_pick(y, tap), axis) for m, y, tap in zip(self.maps, theirs, origins, strict=True)]
        target = torch.stack(parts).sum(0)
        tiny = torch.finfo(target.dtype).tiny
        return self.weight * (_pick(ours, own) - target).square().mean() / target.var(correction=0).clamp_min(tiny)


def _pick(value: Tensor, tap: Tap | None) -> Tensor:
    """A class's neurons [.., n, m, ..], m places of each."""
    if tap is None:
        return value[None]
    return value.index_select(tap.axis, tap.index.flatten().to(value.device)).unflatten(tap.axis, tap.index.shape)


class _Loss:
    """The distance of a fused network from its parents, which run along."""

    def __init__(self, module: fx.GraphModule, context: Context, features: float, call: Call) -> None:
        self._graphs = [c.traced.graph_module for c in context.classes]
        output = module.graph.output_node().args[0]
        outputs = {n.name for n in pytree.tree_leaves(output) if isinstance(n, fx.Node)}
        of_outputs: list[Term] = []
        of_features: list[Term] = []
        found = set()
        for k, c in enumerate(context.fused):
            coupling = context.alignment.couplings[k]
            maps = tuple(Map.of(m) for m in coupling.merge.split(coupling.widths, 1))
            for t, tap in enumerate(c.taps):
                term = (tap.node, (tap, *(p[k].taps[t] for p in context.classes)), maps)
                if tap.node in outputs:
                    of_outputs.append(term)
                    found.add(tap.node)
                elif c.free and tap.kind == "read":
                    of_features.append(term)
        whole = tuple(Map.of(torch.full((1, 1), w, dtype=torch.float64)) for w in context.weights)
        of_outputs += [(n, (None,) * (len(whole) + 1), whole) for n in sorted(outputs - found)]
        heard = listen(module, {n for n, _, _ in (*of_outputs, *of_features)}, *fresh(call))
        self.goals: list[_Goal] = []
        for weight, terms in ((1.0, of_outputs), (features, of_features)):
            floats = [t for t in terms if isinstance(v := heard[t[0]], Tensor) and v.is_floating_point()]
            self.goals += [_Goal(n, weight / len(floats), taps, maps) for n, taps, maps in floats if weight]
        self._nodes = {g.node for g in self.goals}

    def __call__(self, module: fx.GraphModule, call: Call) -> Tensor:
        with torch.no_grad():
            theirs = [listen(g, self._nodes, *fresh(call)) for g in self._graphs]
        ours = listen(module, self._nodes, *fresh(call))
        return torch.stack([g(ours[g.node], [h[g.node] for h in theirs]) for g in self.goals]).sum()

    def over(self, module: fx.GraphModule, calls: Sequence[Call]) -> float:
        """The mean over batches."""
        total = 0.0
        for number, call in enumerate(calls):
            with fitting(number):
                total += float(self(module, call))
        total, count = summed_numbers([total, len(calls)])
        return total / count
