"""From parents to one network: the passes, in order."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from tqdm import tqdm

from fxmerge import exchange, export
from fxmerge.barrier import Barrier
from fxmerge.clock import Clock
from fxmerge.coupling import fuse
from fxmerge.data import feeder, reusable
from fxmerge.ensemble import disagreement
from fxmerge.errors import FxMergeError, InputError, StructureError
from fxmerge.interfaces import AbstractDepthAligner, AbstractMatcher, AbstractRepair, Context
from fxmerge.ir import Alignment
from fxmerge.matchers import ActivationMatching, CCAMerge, OTFusion, WeightMatching, ZipIt
from fxmerge.moments import Statistics
from fxmerge.plan import Depth, Heads, InputFn, Plan, Request, Target, Weights, make_plan
from fxmerge.provenance import provenance
from fxmerge.ranks import from_first, ordinal, summed_numbers
from fxmerge.recipe import OPTIONS
from fxmerge.repair import Rescale, ResetBatchNorm
from fxmerge.repair.batchnorm import batchnorms
from fxmerge.report import Report
from fxmerge.rewrite import made_when_asked, rewrite
from fxmerge.running import device_of, evaluating, preserved
from fxmerge.size import sizes
from fxmerge.stats import listen
from fxmerge.stored import Stored, stays_on_disk
from fxmerge.symmetry import full_state, load_state
from fxmerge.trace import non_finite
from fxmerge.widths import require_runs, separate


@dataclass(frozen=True, eq=False)
class MergeResult:
    """One network from several.

    Attributes:
        module: the fused network: runs, trains, prints (``module.print_readable()``). Where parents stay on disk, its
            parameters are made whenever they are read: save it, and load what was saved to go on.
        alignment: the couplings that made it.
        report: what was done and how well it went; ``print`` it.
        recipe: versions, parents, every option and the data: what it takes to merge again, as JSON can hold it.
    """

    module: fx.GraphModule
    alignment: Alignment
    report: Report
    recipe: Mapping[str, Any]

    def save(
        self,
        folder: str | Path,
        *,
        alignment: bool = False,
        shard_size: int | str = export.SHARD_SIZE,
        extra: Mapping[str, str] | None = None,
        barrier: Barrier | None = None,
    ) -> Path:
        """Writes everything into a new folder, which appears whole; ``fxmerge.load`` brings the module back.

        Args:
            folder: gets the tensors, graph.json, recipe.json, module.py, README.md, report.html and manifest.json.
            alignment: store the couplings too; ``fxmerge.load_alignment`` reads them.
            shard_size: bytes of tensors in one file, or a size such as "5GB".
            extra: further files by name: their texts.
            barrier: what ``evaluate_barrier`` found between the networks, to be drawn in report.html.
        """
        couplings = self.alignment if alignment else None
        return export.save(
            self.module,
            folder,
            recipe=self.recipe,
            report=self.report.html(barrier),
            alignment=couplings,
            shard_size=shard_size,
            extra=extra,
        )

    def _repr_html_(self) -> str:
        return self.report._repr_html_()

    def export_onnx(self, path: str | Path) -> Path:
        """Writes an ONNX file with a dynamic batch dimension; needs the extra ``onnx``."""
        traced = self.report.classes.traced
        return exchange.export_onnx(self.module, path, traced.args, traced.kwargs)

    def export_pt2(self, path: str | Path) -> Path:
        """Writes a file for ``torch.export.load`` with a dynamic batch dimension."""
        traced = self.report.classes.traced
        return exchange.export_pt2(self.module, path, traced.args, traced.kwargs)

    def export_state_dict(self, path: str | Path) -> Path:
        """Writes the tensors alone, as safetensors, for ``load_state_dict`` of a parent's class."""
        return exchange.export_state_dict(self.module, path)


def merge(
    *models: nn.Module,
    example_inputs: Any = None,
    data: Iterable[Any] | None = None,
    matcher: AbstractMatcher | Literal["auto"] | None = None,
    weights: Weights | None = None,
    heads: Heads = "average",
    depth: Depth | AbstractDepthAligner = "grow",
    target: Target = None,
    repair: AbstractRepair | Literal["auto"] | None = "auto",
    input_fn: InputFn | None = None,
    statistics: Statistics | str | Path | None = None,
    verify: bool = True,
    strict: bool = False,
    device: torch.device | str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> MergeResult:
    """Fuses two or more trained networks of one architecture into one network.

    The parents are left as they were found. The fused network has the first parent's state_dict keys and, unless the
    matcher or ``heads`` keep neurons apart, its size.

    Args:
        models: the parents; the first one's order of neurons is kept. Those that ``on_disk`` made stay there: tensors
            are read, matched and, by ``result.save``, written one after the other, by weights alone and on the CPU.
        example_inputs: tensor, tuple or dict to run the networks on; taken from the first layers where these leave no
            doubt. Two samples are enough.
        data: unlabelled batches, for matchers and repairs that look at activations.
        matcher: how to align (default: ``ActivationMatching`` where there is data, else ``WeightMatching``). "auto"
            tries several on most of the data and takes the one whose outputs on the rest are nearest to the mean of
            the parents'; the report says what was tried.
        weights: the parents' shares (default: equal); or a mapping from the start of a class's name to shares, for
            that class ("" for all others).
        heads: what to do with the outputs: "average" them; keep one head per parent on the shared trunk and return a
            tuple of outputs ("separate"); or return the outputs of all heads side by side ("concat").
        depth: how networks with a different number of layers are balanced: "grow" the shallower ones by layers that
            pass on what they read, "shrink" the deeper ones, or a ``CLAFusion`` with other options.
        target: whose depth and widths the result has: "deeper" or "shallower", one of the networks, or another network
            of the same family (its parameters do not matter).
        repair: what to put right after merging: an object, None, or "auto": with data, BatchNorm statistics are
            re-estimated, and networks without BatchNorm or LayerNorm are rescaled.
        input_fn: batch -> inputs (tensor, tuple or dict), where batches hold more than the inputs.
        statistics: of the activations, instead of collecting them from ``data``: what ``collect_statistics`` returned;
            or the path of a file that keeps them. Collecting writes that file, also where it is interrupted, and goes
            on from there when called again with the same path and the same batches in the same order.
        verify: check the inferred symmetry and the rewriting on every parent in float64, a few forward passes.
        strict: raise where an operation has no rule, instead of pinning what it touches.
        device: "auto": the parents' device, else CUDA where there is one.
        seed: of every random choice.
        progress: show progress bars on long work.

    Raises:
        InputError, TraceError, StructureError: naming what does not fit, before any long work.

    Example:
        >>> result = fxmerge.merge(model_a, model_b, example_inputs=x, data=loader)
        >>> result.module(x)
    """
    asked: dict[str, Any] = dict(locals())
    if matcher == "auto":
        del asked["models"], asked["matcher"]
        if asked.pop("statistics") is not None:
            raise InputError("matcher='auto' collects statistics for each matcher it tries: leave statistics= out")
        return _best(models, **asked)
    clock = Clock()
    with clock.shown(progress):
        plan = make_plan(Request(**asked), clock)
        with preserved(*models), clock("fuse"):
            idle = plan.problem.idle
            made = fuse(plan.classes, plan.fused, plan.alignment, plan.problem.states, plan.weights, idle)
            streamed = any(map(stays_on_disk, models))
            state = made_when_asked(made, plan.classes[0], plan.fused) if streamed else dict(made)
            _keep_variances(state, plan)
            module = rewrite(plan.classes[0], state, plan.fused)
            module = module if streamed else module.to(plan.device)
            fused = replace(plan.fused, traced=replace(plan.fused.traced, graph_module=module, source=module))
            fused = replace(fused, traced=replace(fused.traced, shapes=require_runs(fused)))
        with preserved(*models), clock("repair"):
            before, *others = _variances([module, *(c.traced.graph_module for c in plan.classes)], plan)
            said = "none"
            chosen = _default_repair(module, plan) if repair == "auto" else repair
            if chosen is not None:
                if plan.batches is None:
                    raise InputError(f"{chosen} needs data: pass data=loader, or repair=None")
                context = Context(
                    plan.classes,
                    fused,
                    plan.alignment,
                    plan.weights,
                    plan.batches,
                    plan.feed,
                    plan.device,
                    seed,
                    progress,
                )
                said = chosen.repair(module, context)
            elif repair == "auto":
                said = "none (pass data=loader to re-estimate statistics)" if plan.batches is None else "none needed"
            with torch.no_grad():  # rounding may differ between machines
                here = {n: v for n, v in full_state(module).items() if not isinstance(v, Stored)}
                values = list(dict.fromkeys(here.values()))
                for value, same in zip(values, from_first(values), strict=True):
                    if same is not value:
                        value.copy_(same)
            finite = {n: v.isfinite().all() for n, v in here.items() if v.is_floating_point()}
            for name, good in zip(finite, torch.stack(list(finite.values())).tolist() if finite else (), strict=True):
                if not good and non_finite(here[name]):
                    raise InputError(f"'{name}' holds NaN or inf after the repair: check the data for such values")
            (after,) = _variances([module], plan) if said != "none" else (before,)
        parents = {n: sum(w * p[n] for w, p in zip(plan.weights, others, strict=True)) for n in before}
        variance = {n: (before[n] / parents[n], after[n] / parents[n]) for n in before if parents[n] > 0}
        if heads == "separate":
            separate(fused, plan.alignment, plan.problem.apart)
        module = module if streamed else module.to(plan.home)
        traced = plan.classes[0].traced
        with preserved(*models), clock("size"):
            measured = sizes((*models, module), traced.args, traced.kwargs)
        report = Report(
            tuple(type(m).__name__ for m in models),
            plan.given(plan.weights),
            fused,
            plan.alignment,
            plan.given(plan.verifications),
            said,
            variance,
            clock.seconds,
            plan.depth,
            plan.order,
            plan.given(plan.inserted),
            measured,
            (*traced.notes, *plan.notes, *plan.alignment.notes),
        )
        with preserved(*models):
            given = {key: value for key, value in asked.items() if key in OPTIONS}
            options = {**given, "matcher": plan.matcher, "repair": chosen}
            recipe = provenance(models, options, input_fn, plan.data, report)
    return MergeResult(module, plan.alignment, report, recipe)


def align(
    model: nn.Module,
    *,
    to: nn.Module,
    example_inputs: Any = None,
    data: Iterable[Any] | None = None,
    matcher: AbstractMatcher | None = None,
    input_fn: InputFn | None = None,
    verify: bool = True,
    device: torch.device | str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> nn.Module:
    """A copy of ``model`` with its neurons in the places of ``to``'s that they resemble: same class, same keys.

    With a permutation matcher it computes exactly what ``model`` computes, and may be averaged with ``to`` key by key.
    Arguments are those of ``merge``.
    """
    if stays_on_disk(model) or stays_on_disk(to):
        raise InputError("align returns a network in memory: load both networks, or merge them")
    asked: dict[str, Any] = {"example_inputs": example_inputs, "data": data, "matcher": matcher, "input_fn": input_fn}
    how: dict[str, Any] = {"verify": verify, "device": device, "seed": seed, "progress": progress, "depth": None}
    plan = make_plan(Request(models=(to, model), weights=(0.0, 1.0), **asked, **how), Clock())
    moved = copy.deepcopy(model)
    if any(c.merge.shape[0] != c.widths[1] for c in plan.alignment.couplings):
        raise StructureError("align moves neurons and keeps their number; the networks differ in width: use merge")
    load_state(moved, fuse(plan.classes, plan.fused, plan.alignment, plan.problem.states, (0.0, 1.0)))
    return moved


CANDIDATES: tuple[type[AbstractMatcher], ...] = (WeightMatching, ActivationMatching, OTFusion, CCAMerge, ZipIt)
"""What ``matcher="auto"`` tries: methods that keep the first parent's size."""


def _best(models: Sequence[nn.Module], data: Iterable[Any] | None, progress: bool, **options: Any) -> MergeResult:
    """The merge whose outputs on held-back batches are nearest to the parents' mean."""
    if data is None:
        raise InputError("matcher='auto' compares outputs: pass data=loader (unlabelled batches), or name a matcher")
    batches = list(reusable(data))
    if len(batches) < 2:
        raise InputError(f"matcher='auto' holds back a part of the data, and it has {len(batches)} batches: pass more")
    held = max(1, len(batches) // 5)
    scores: dict[str, float] = {}
    failed: list[str] = []
    best: AbstractMatcher | None = None
    for candidate in tqdm(CANDIDATES, desc="matchers", disable=not progress, leave=False):
        name = candidate.__name__
        try:
            trial = {**options, "heads": "average" if options["heads"] == "average" else "separate"}
            result = merge(*models, data=batches[:-held], matcher=candidate(), progress=False, **trial)
        except FxMergeError as error:
            failed.append(f"{name} ({str(error).splitlines()[0]})")
            continue
        feed = feeder(result.report.classes.traced, options["input_fn"], device_of(models[0]))
        scores[name] = disagreement(result.module, models, result.report.weights, batches[-held:], feed)
        if name == min(scores, key=lambda n: scores[n]):
            best = candidate()
    if best is None:
        raise StructureError("no matcher fits these networks: " + "; ".join(failed))
    result = merge(*models, data=batches, matcher=best, progress=progress, **options)
    tried = ", ".join(f"{n} {v:.4f}" for n, v in sorted(scores.items(), key=lambda x: x[1]))
    note = f"chosen by disagreement with the parents' mean output on {held} held-back batches: {tried}"
    notes = (*result.report.notes, note, *(f"does not fit: {f}" for f in failed))
    said = {**result.recipe, "result": {**result.recipe["result"], "notes": list(notes)}}
    return replace(result, report=replace(result.report, notes=notes), recipe=said)


def _keep_variances(state: dict[str, Tensor], plan: Plan) -> None:
    """Running variances stay above the parents' least, whatever linear map they went through."""
    for name in dict(plan.classes[0].traced.source.named_buffers(remove_duplicate=False)):
        parents = [s[name] for s in plan.problem.states]
        if state[name].is_floating_point() and all(bool((v >= 0).all()) for v in parents):
            state[name].clamp_min_(min(float(v.min()) for v in parents if v.numel()))


def _default_repair(module: fx.GraphModule, plan: Plan) -> AbstractRepair | None:
    if plan.batches is None:
        return None
    if batchnorms(module):
        return ResetBatchNorm()
    normalised = any(isinstance(m, (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)) for m in module.modules())
    return None if normalised else Rescale()


def _variances(graphs: Sequence[fx.GraphModule], plan: Plan, batches: int = 2) -> list[dict[str, float]]:
    """Per graph: layer's node -> mean variance of its outputs, summed over the first batches."""
    if plan.batches is None:
        return [{} for _ in graphs]
    nodes = list(dict.fromkeys(t.node for c in plan.classes[0] if c.free for t in c.taps if t.kind == "made"))
    found: list[tuple[int, str]] = []
    values: list[Tensor] = []
    with evaluating(*graphs):
        for number, batch in enumerate(plan.batches):
            if ordinal(number) >= batches:
                break
            args, kwargs = plan.feed(batch)
            for g, graph in enumerate(graphs):
                for node, value in listen(graph, set(nodes), args, kwargs).items():
                    if len(value) > 1:
                        found.append((g, node))
                        # var(0) takes ten times as long on a CPU: more than the layer itself
                        value = value.float()
                        deviation = value - value.mean(0)
                        values.append(deviation.square_().mean() * (len(value) / (len(value) - 1)))
    sums = {(g, n): 0.0 for g in range(len(graphs)) for n in nodes}
    for at, number in zip(found, torch.stack(values).tolist() if values else (), strict=True):
        sums[at] += number
    totals = dict(zip(sums, summed_numbers(list(sums.values())), strict=True))
    return [{n: totals[g, n] for n in nodes} for g in range(len(graphs))]
