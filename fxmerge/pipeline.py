"""From parents to one network: the passes, in order."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import fx, nn

from fxmerge import export
from fxmerge.classes import infer_classes
from fxmerge.correspond import require_same_structure
from fxmerge.coupling import fuse, side_by_side
from fxmerge.data import feeder, reusable, try_batch
from fxmerge.errors import FxMergeWarning, InputError, StructureError, VerifyError
from fxmerge.interfaces import AbstractMatcher, AbstractRepair, Context, Problem
from fxmerge.ir import OUTPUT, Alignment, AxisClasses
from fxmerge.layout import resized
from fxmerge.matchers import ActivationMatching, WeightMatching
from fxmerge.matching import families
from fxmerge.repair import Rescale, ResetBatchNorm
from fxmerge.repair.batchnorm import batchnorms
from fxmerge.report import Report
from fxmerge.rewrite import rewrite
from fxmerge.running import evaluating, preserved
from fxmerge.stats import choose_taps, collect, listen
from fxmerge.symmetry import Verification, full_state, load_state
from fxmerge.symmetry import verify as verify_symmetry
from fxmerge.trace import trace
from fxmerge.widths import require_runs, separate

InputFn = Callable[[Any], Any]
Weights = Sequence[float] | Mapping[str, Sequence[float]]
Heads = Literal["average", "separate", "concat"]


@dataclass(frozen=True, eq=False)
class MergeResult:
    """One network from several.

    Attributes:
        module: the fused network: runs, trains, prints (``module.print_readable()``).
        alignment: the couplings that made it.
        report: what was done and how well it went; ``print`` it.
    """

    module: fx.GraphModule
    alignment: Alignment
    report: Report

    def save(self, folder: str | Path) -> Path:
        """Writes model.safetensors, graph.json and recipe.json into a new folder; ``fxmerge.load`` reads it back."""
        recipe = {
            "method": self.alignment.method,
            "parents": list(self.report.parents),
            "weights": list(self.report.weights),
            "repair": self.report.repair,
            "quality": {self.report.classes[k].name: q for k, q in self.alignment.quality.items()},
            "notes": list(self.report.notes),
        }
        return export.save(self.module, folder, recipe=recipe)

    def export_onnx(self, path: str | Path) -> None:
        """Writes an ONNX file with a dynamic batch dimension."""
        traced = self.report.classes.traced
        export.export_onnx(self.module, path, traced.args, dict(traced.kwargs))


def merge(
    *models: nn.Module,
    example_inputs: Any = None,
    data: Iterable[Any] | None = None,
    matcher: AbstractMatcher | None = None,
    weights: Weights | None = None,
    heads: Heads = "average",
    repair: AbstractRepair | Literal["auto"] | None = "auto",
    input_fn: InputFn | None = None,
    verify: bool = True,
    strict: bool = False,
    device: torch.device | str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> MergeResult:
    """Fuses two or more trained networks of one architecture into one network of the same size.

    The parents are left as they were found. The fused network has the first parent's state_dict keys.

    Args:
        models: the parents; the first one's order of neurons is kept.
        example_inputs: tensor, tuple or dict to run the networks on; taken from the first layers where these leave no
            doubt. Two samples are enough.
        data: unlabelled batches, for matchers and repairs that look at activations.
        matcher: how to align (default: ``ActivationMatching`` where there is data, else ``WeightMatching``).
        weights: the parents' shares (default: equal); or a mapping from the start of a class's name to shares, for
            that class ("" for all others).
        heads: what to do with the outputs: "average" them; keep one head per parent on the shared trunk and return a
            tuple of outputs ("separate"); or return the outputs of all heads side by side ("concat").
        repair: what to put right after merging: an object, None, or "auto": with data, BatchNorm statistics are
            re-estimated, and networks without BatchNorm or LayerNorm are rescaled.
        input_fn: batch -> inputs (tensor, tuple or dict), where batches hold more than the inputs.
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
    clock = _Clock()
    plan = _plan(
        models,
        example_inputs,
        data,
        matcher,
        weights,
        input_fn,
        verify,
        strict,
        device,
        seed,
        progress,
        clock,
        repair,
        heads,
    )
    with preserved(*models), clock("fuse"):
        state = fuse(plan.classes, plan.fused, plan.alignment, plan.problem.states, plan.weights)
        module = rewrite(plan.classes[0].traced, state, plan.fused).to(plan.device)
        fused = replace(plan.fused, traced=replace(plan.fused.traced, graph_module=module, source=module))
        require_runs(fused)
    with preserved(*models), clock("repair"):
        before = _variances(module, plan)
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
        for name, value in full_state(module).items():
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise InputError(f"'{name}' holds NaN or inf after the repair: check the data for such values")
        after = _variances(module, plan) if said != "none" else before
    variance = {n: (before[n], after[n]) for n in before}
    if heads == "separate":
        separate(fused, plan.alignment, plan.problem.apart)
    module.to(plan.home)
    traced = plan.classes[0].traced
    report = Report(
        tuple(type(m).__name__ for m in models),
        plan.weights,
        fused,
        plan.alignment,
        plan.verifications,
        said,
        variance,
        clock.seconds,
        (*traced.notes, *plan.notes, *plan.alignment.notes),
    )
    return MergeResult(module, plan.alignment, report)


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
    clock = _Clock()
    plan = _plan(
        (to, model),
        example_inputs,
        data,
        matcher,
        (0.0, 1.0),
        input_fn,
        verify,
        False,
        device,
        seed,
        progress,
        clock,
        None,
        "average",
    )
    moved = copy.deepcopy(model)
    if any(c.merge.shape[0] != c.widths[1] for c in plan.alignment.couplings):
        raise StructureError("align moves neurons and keeps their number; the networks differ in width: use merge")
    load_state(moved, fuse(plan.classes, plan.fused, plan.alignment, plan.problem.states, (0.0, 1.0)))
    return moved


@dataclass(frozen=True, eq=False)
class _Plan:
    classes: tuple[AxisClasses, ...]
    fused: AxisClasses
    weights: tuple[float, ...]
    problem: Problem
    alignment: Alignment
    verifications: tuple[Verification, ...]
    batches: Iterable[Any] | None
    feed: Callable[[Any], tuple[tuple[Any, ...], dict[str, Any]]]
    device: torch.device
    home: torch.device
    notes: tuple[str, ...]


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, step: str) -> Any:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - start


def _plan(
    models: Sequence[nn.Module],
    example_inputs: Any,
    data: Iterable[Any] | None,
    matcher: AbstractMatcher | None,
    weights: Weights | None,
    input_fn: InputFn | None,
    verify: bool,
    strict: bool,
    device: torch.device | str,
    seed: int,
    progress: bool,
    clock: _Clock,
    repair: AbstractRepair | Literal["auto"] | None,
    heads: Heads,
) -> _Plan:
    """Everything up to and including the alignment; every complaint about the input comes from here, first."""
    named = dict(weights) if isinstance(weights, Mapping) else {"": weights}
    shares = {prefix: _weights(models, w) for prefix, w in {"": None, **named}.items()}
    if heads not in get_args(Heads):
        raise InputError(f"heads={heads!r}: choose one of {', '.join(map(repr, get_args(Heads)))}")
    if not (matcher is None or isinstance(matcher, AbstractMatcher)):
        raise InputError(f"matcher={matcher!r}: give an object, such as WeightMatching() or ActivationMatching()")
    if not (repair is None or repair == "auto" or isinstance(repair, AbstractRepair)):
        raise InputError(f"repair={repair!r}: give 'auto', None or an object, such as ResetBatchNorm() or Rescale()")
    matcher = matcher or (WeightMatching() if data is None else ActivationMatching())
    if matcher.needs_data and data is None:
        raise InputError(
            f"{matcher} looks at activations: pass data=loader (unlabelled batches), or use WeightMatching()"
        )
    if isinstance(repair, AbstractRepair) and data is None:
        raise InputError(f"{repair} needs data: pass data=loader, or repair=None")
    home = next(models[0].parameters(), torch.zeros(())).device
    work = _device(device, home)
    with preserved(*models):
        parents = [
            m if next(m.parameters(), torch.zeros(())).device == work else copy.deepcopy(m).to(work) for m in models
        ]
        with clock("trace"):
            traced = [trace(parents[0], example_inputs)]
            given = traced[0].kwargs or traced[0].args
            traced += [trace(m, dict(given) if isinstance(given, Mapping) else given) for m in parents[1:]]
        feed = feeder(traced[0], input_fn, work)
        batches = None if data is None else reusable(data)
        if batches is not None:
            try_batch(batches, feed, traced)
        with clock("classes"):
            classes = [infer_classes(t, strict=strict) for t in traced]
        notes = tuple(
            f"no rule for operation '{op}' at node '{node}': what it touches is pinned"
            for node, op in classes[0].unknown
        )
        for note in notes:
            warnings.warn(note, FxMergeWarning, stacklevel=4)
        apart = frozenset(k for k, c in enumerate(classes[0]) if c.pinned == OUTPUT and heads != "average")
        require_same_structure(classes, apart, matcher.any_width)
        if heads != "average" and not apart:
            raise InputError(f"heads={heads!r}, but no layer writes the outputs of this network")
        unknown = [p for p in shares if not any(c.name.startswith(p) for c in classes[0])]
        if unknown:
            raise InputError(f"weights for '{unknown[0]}', but no class of neurons has a name that starts so")
        by_class = tuple(shares[max((p for p in shares if c.name.startswith(p)), key=len)] for c in classes[0])
        verifications: list[Verification] = []
        if verify:
            with clock("verify"):
                classes, verifications = _verified(classes, seed)
        statistics = None
        if matcher.needs_data and batches is not None:
            with clock("statistics"):
                statistics = collect(
                    classes, batches, feed, [choose_taps(c, matcher.at) for c in classes], seed=seed, progress=progress
                )
        states = tuple({k: v.detach() for k, v in full_state(t.graph_module).items()} for t in traced)
        for k, t in enumerate(traced):
            states[k].update({n: v.detach() for n, v in full_state(t.source).items()})
        problem = Problem(tuple(classes), states, by_class, apart, statistics, seed, progress)
        with clock("match"), torch.no_grad():
            alignment = matcher.match(problem)
        kept = {k: side_by_side([c[k].size for c in classes]) for k in apart}
        alignment = replace(alignment, couplings=tuple(kept.get(k, c) for k, c in enumerate(alignment.couplings)))
        _check_mass(alignment, classes[0])
        fused = resized(classes[0], {k: c.size for k, c in enumerate(alignment.couplings)})
    return _Plan(
        tuple(classes), fused, shares[""], problem, alignment, tuple(verifications), batches, feed, work, home, notes
    )


def _weights(models: Sequence[nn.Module], weights: Sequence[float] | None) -> tuple[float, ...]:
    if len(models) < 2:
        raise InputError(f"merging takes two or more networks, got {len(models)}")
    for m in models:
        if not isinstance(m, nn.Module):
            raise InputError(f"merging takes nn.Modules, got {type(m).__name__}; load checkpoints into a module first")
    if weights is None:
        return (1.0 / len(models),) * len(models)
    if len(weights) != len(models) or min(weights) < 0 or not 0 < sum(weights) < float("inf"):
        raise InputError(f"weights={list(weights)}: give one non-negative share for each of the {len(models)} networks")
    return tuple(float(w) / float(sum(weights)) for w in weights)


def _device(device: torch.device | str, home: torch.device) -> torch.device:
    if device != "auto":
        try:
            return torch.zeros(0, device=device).device
        except Exception as error:
            raise InputError(f"device={device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return torch.device("cuda") if home.type == "cpu" and torch.cuda.is_available() else home


def _verified(classes: list[AxisClasses], seed: int) -> tuple[list[AxisClasses], list[Verification]]:
    """Checks the symmetry on every parent; families that fail are pinned in all of them, with a warning."""
    found = [verify_symmetry(c.traced.source, c, seed) for c in classes]
    if all(v.ok for v in found):
        return classes, found
    bad: set[int] = set()
    for c in classes:
        for family in families(c):
            if not verify_symmetry(c.traced.source, c, seed, only=family).ok:
                bad |= set(family)
    for k in sorted(bad):
        warnings.warn(
            f"class '{classes[0][k].name}' failed verification and is pinned: its neurons stay in place",
            FxMergeWarning,
            stacklevel=5,
        )
    classes = [_pin(c, bad) for c in classes]
    found = [verify_symmetry(c.traced.source, c, seed) for c in classes]
    for v in found:
        if not v.ok:
            raise VerifyError(f"the inferred symmetry changes the network's function ({v}); please report this network")
    return classes, found


def _pin(classes: AxisClasses, which: set[int]) -> AxisClasses:
    pinned = tuple(
        replace(c, pinned="failed verification", parents=(), blocks=c.blocks[:, :0]) if k in which else c
        for k, c in enumerate(classes)
    )
    return replace(classes, classes=pinned)


def _check_mass(alignment: Alignment, classes: AxisClasses) -> None:
    """Every fused neuron must be made of something: rows of merge sum to one."""
    for c, coupling in zip(classes, alignment.couplings, strict=True):
        if not bool(torch.isfinite(coupling.merge).all() and torch.isfinite(coupling.unmerge).all()):
            raise VerifyError(f"the coupling of class '{c.name}' holds NaN or inf; choose another matcher or more data")


def _default_repair(module: fx.GraphModule, plan: _Plan) -> AbstractRepair | None:
    if plan.batches is None:
        return None
    if batchnorms(module):
        return ResetBatchNorm()
    normalised = any(isinstance(m, (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)) for m in module.modules())
    return None if normalised else Rescale()


def _variances(module: fx.GraphModule, plan: _Plan, batches: int = 2) -> dict[str, float]:
    """Variance of the fused network's layer outputs over the parents' mean variance, on the first batches."""
    if plan.batches is None:
        return {}
    nodes = list(dict.fromkeys(t.node for c in plan.classes[0] if c.free for t in c.taps if t.kind == "made"))
    graphs = [module, *(c.traced.graph_module for c in plan.classes)]
    totals = [dict.fromkeys(nodes, 0.0) for _ in graphs]
    with evaluating(*graphs):
        for _, batch in zip(range(batches), plan.batches, strict=False):
            args, kwargs = plan.feed(batch)
            for total, graph in zip(totals, graphs, strict=True):
                for node, value in listen(graph, set(nodes), args, kwargs).items():
                    total[node] += float(value.float().var(0).mean()) if value.shape[0] > 1 else 0.0
    share = plan.weights
    parents = {n: sum(w * t[n] for w, t in zip(share, totals[1:], strict=True)) for n in nodes}
    return {n: totals[0][n] / parents[n] for n in nodes if parents[n] > 0}
