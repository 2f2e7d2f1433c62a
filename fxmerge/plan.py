"""Everything up to and including the alignment; every complaint about the input comes from here, first."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import nn

from fxmerge.classes import infer_classes
from fxmerge.correspond import require_same_structure
from fxmerge.coupling import side_by_side
from fxmerge.data import feeder, reusable, try_batch
from fxmerge.errors import FxMergeWarning, InputError, VerifyError, one_of
from fxmerge.interfaces import AbstractMatcher, AbstractRepair, Problem
from fxmerge.ir import OUTPUT, Alignment, AxisClasses
from fxmerge.layout import resized
from fxmerge.matchers import ActivationMatching, WeightMatching
from fxmerge.matching import families
from fxmerge.running import device_of, preserved
from fxmerge.stats import choose_taps, collect
from fxmerge.symmetry import Verification, full_state
from fxmerge.symmetry import verify as verify_symmetry
from fxmerge.trace import trace

InputFn = Callable[[Any], Any]
Weights = Sequence[float] | Mapping[str, Sequence[float]]
Heads = Literal["average", "separate", "concat"]


@dataclass(frozen=True, eq=False)
class Plan:
    """Parents that were found to fit, and how their neurons will be coupled; ``fused`` are the result's classes."""

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


class Clock:
    """Seconds per step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, step: str) -> Any:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - start


def make_plan(
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
    clock: Clock,
    repair: AbstractRepair | Literal["auto"] | None,
    heads: Heads,
) -> Plan:
    """Everything up to and including the alignment; every complaint about the input comes from here, first."""
    named = dict(weights) if isinstance(weights, Mapping) else {"": weights}
    shares = {prefix: _weights(models, w) for prefix, w in {"": None, **named}.items()}
    one_of("", heads=(heads, get_args(Heads)))
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
    home = device_of(models[0])
    work = _device(device, home)
    with preserved(*models):
        parents = [m if device_of(m) == work else copy.deepcopy(m).to(work) for m in models]
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
    return Plan(
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
    """Every fused neuron must be made of something, and of numbers."""
    for c, coupling in zip(classes, alignment.couplings, strict=True):
        if not bool(torch.isfinite(coupling.merge).all() and torch.isfinite(coupling.unmerge).all()):
            raise VerifyError(f"the coupling of class '{c.name}' holds NaN or inf; choose another matcher or more data")
        empty = int((coupling.merge.abs().sum(1) < 1e-6).sum())
        if empty:
            raise VerifyError(
                f"the coupling of class '{c.name}' makes {empty} of {coupling.size} neurons of nothing: mass was lost. "
                "Choose another matcher"
            )
