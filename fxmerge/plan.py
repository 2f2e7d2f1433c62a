"""Everything up to and including the alignment; every complaint about the input comes from here, first."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import nn

from fxmerge.checks import require_mass, verified
from fxmerge.classes import infer_classes
from fxmerge.clock import Clock
from fxmerge.collect import collect, origin_of
from fxmerge.correspond import alike_in_names, carried, require_same_structure, uneven
from fxmerge.coupling import side_by_side
from fxmerge.data import feeder, reusable, try_batch
from fxmerge.depth import CLAFusion, Grown, Link, balanced
from fxmerge.errors import FxMergeError, FxMergeWarning, InputError, StructureError, one_of
from fxmerge.fingerprint import fingerprint
from fxmerge.interfaces import AbstractDepthAligner, AbstractMatcher, AbstractRepair, Problem, Sample
from fxmerge.ir import OUTPUT, VALUES_DECIDE, Alignment, AxisClasses, Traced
from fxmerge.layout import resized
from fxmerge.matchers import ActivationMatching, OTFusion, WeightMatching
from fxmerge.moments import Statistics
from fxmerge.running import device_of, full_state, preserved
from fxmerge.stats import choose_taps
from fxmerge.stored import read_when_asked, stays_on_disk
from fxmerge.symmetry import Verification
from fxmerge.trace import trace

InputFn = Callable[[Any], Any]
Weights = Sequence[float] | Mapping[str, Sequence[float]]
T = TypeVar("T")
Heads = Literal["average", "separate", "concat"]
Depth = Literal["grow", "shrink"]
Target = Literal["deeper", "shallower"] | nn.Module | None


@dataclass(frozen=True, eq=False)
class Prepared:
    """Parents that were found to fit, and all that a matcher is told of them.

    They stand in another ``order`` than they were given in where one that is not the first gave the result its layers.
    ``data`` tells the batches from others.
    """

    classes: tuple[AxisClasses, ...]
    weights: tuple[float, ...]
    problem: Problem
    verifications: tuple[Verification, ...]
    batches: Iterable[Any] | None
    feed: Callable[[Any], tuple[tuple[Any, ...], dict[str, Any]]]
    device: torch.device
    home: torch.device
    notes: tuple[str, ...]
    order: tuple[int, ...]
    depth: tuple[Link, ...]
    inserted: tuple[frozenset[str], ...]
    matcher: AbstractMatcher
    data: Mapping[str, Any] | None

    def given(self, values: Sequence[T]) -> tuple[T, ...]:
        """One value per parent, in the order in which the parents were given."""
        return tuple(v for _, v in sorted(zip(self.order, values, strict=False), key=lambda pair: pair[0]))


@dataclass(frozen=True, eq=False)
class Plan(Prepared):
    """How the parents' neurons will be coupled; ``fused`` are the result's classes."""

    fused: AxisClasses
    alignment: Alignment


@dataclass(frozen=True, eq=False, kw_only=True)
class Request:
    """The arguments of ``merge``, under their names. What is wrong with them alone is said at once.

    ``first_batch``: how many batches other processes see before these.
    """

    models: Sequence[nn.Module]
    example_inputs: Any = None
    data: Iterable[Any] | None = None
    matcher: AbstractMatcher | None = None
    weights: Weights | None = None
    heads: Heads = "average"
    depth: Depth | AbstractDepthAligner | None = "grow"
    target: Target = None
    repair: AbstractRepair | Literal["auto"] | None = None
    input_fn: InputFn | None = None
    statistics: Statistics | str | Path | None = None
    verify: bool = True
    strict: bool = False
    device: torch.device | str = "auto"
    seed: int = 0
    progress: bool = True
    first_batch: int = 0

    def __post_init__(self) -> None:
        matcher, depth, target, repair = self.matcher, self.depth, self.target, self.repair
        shares_of(self.models, None)
        one_of("", heads=(self.heads, get_args(Heads)))
        if isinstance(depth, str) or not (depth is None or isinstance(depth, AbstractDepthAligner)):
            one_of("", depth=(depth, get_args(Depth)))
        if not (target is None or isinstance(target, nn.Module)):
            one_of("", target=(target, ("deeper", "shallower")))
        if self.aligner.needs_data and self.data is None:
            raise InputError(f"{self.aligner} compares activations: pass data=loader, or use CLAFusion(cost='weights')")
        if not (matcher is None or isinstance(matcher, AbstractMatcher)):
            raise InputError(f"matcher={matcher!r}: give an object, such as WeightMatching() or ActivationMatching()")
        if not (repair is None or repair == "auto" or isinstance(repair, AbstractRepair)):
            raise InputError(
                f"repair={repair!r}: give 'auto', None or an object, such as ResetBatchNorm() or Rescale()"
            )
        if matcher is not None and not matcher.needs_data and self.statistics is not None:
            said = "does not look at activations: leave statistics= out, or use ActivationMatching()"
            raise InputError(f"{matcher} {said}")
        if isinstance(repair, AbstractRepair) and self.data is None:
            raise InputError(f"{repair} needs data: pass data=loader, or repair=None")

    @property
    def aligner(self) -> AbstractDepthAligner:
        return self.depth if isinstance(self.depth, AbstractDepthAligner) else CLAFusion()


def make_plan(request: Request, clock: Clock) -> Plan:
    """Everything up to and including the alignment; every complaint about the input comes from here, first."""
    prepared = prepare(request, clock)
    problem, classes = prepared.problem, prepared.classes
    with preserved(*request.models), clock("match"), torch.no_grad():
        alignment = prepared.matcher.match(problem)
    kept = {k: side_by_side([c[k].size for c in classes]) for k in problem.apart}
    alignment = replace(alignment, couplings=tuple(kept.get(k, c) for k, c in enumerate(alignment.couplings)))
    require_mass(alignment, classes[0])
    fused = resized(classes[0], {k: c.size for k, c in enumerate(alignment.couplings)})
    return Plan(**vars(prepared), fused=fused, alignment=alignment)


def prepare(request: Request, clock: Clock) -> Prepared:
    """Everything up to the statistics."""
    models, data, matcher, aligner = request.models, request.data, request.matcher, request.aligner
    heads, depth, target, seed, progress = request.heads, request.depth, request.target, request.seed, request.progress
    known = _known(request.statistics, data)
    path = Path(request.statistics) if isinstance(request.statistics, (str, Path)) else None
    informed = data is not None or known is not None
    if matcher is not None and matcher.needs_data and not informed:
        raise InputError(
            f"{matcher} looks at activations: pass data=loader (unlabelled batches), or use WeightMatching()"
        )
    named = dict(request.weights) if isinstance(request.weights, Mapping) else {"": request.weights}
    shares = {prefix: shares_of(models, w) for prefix, w in {"": None, **named}.items()}
    home = device_of(models[0])
    streamed = any(map(stays_on_disk, models))
    if streamed:
        _require_streamable(data, heads, target, request.device)
    work = home if streamed else _device(request.device, home)
    with preserved(*models):
        notes: tuple[str, ...] = ()
        with clock("trace"):
            try:
                traced = _traced(models, request.example_inputs, work)
            except FxMergeError as error:
                if request.device != "auto" or work == home:
                    raise
                traced = _traced(models, request.example_inputs, home)
                notes += (f"computed on {home}, as the networks do not run on {work}: {str(error).splitlines()[0]}",)
                work = home
        given = traced[0].kwargs or traced[0].args
        feed = feeder(traced[0], request.input_fn, work)
        batches = None if data is None else reusable(data)
        seen = None if batches is None else fingerprint(batches, try_batch(batches, feed, traced))
        with clock("classes"):
            classes = [infer_classes(traced[0], strict=request.strict)]
            classes += [carried(classes[0], t) or infer_classes(t, strict=request.strict) for t in traced[1:]]
            if uneven(classes):
                classes = [infer_classes(t, strict=request.strict, stacks=False) for t in traced]
        notes += tuple(
            f"no rule for operation '{op}' at node '{node}': what it touches is pinned"
            for node, op in classes[0].unknown
        )
        for note in notes:
            warnings.warn(note, FxMergeWarning, stacklevel=4)
        grown: list[Grown] = []
        links: list[Link] = []
        order = list(range(len(models)))
        if depth is not None and not streamed and (target is not None or not alike_in_names(classes)):
            with clock("depth"), _values_told(traced):
                sample = None if batches is None else Sample(batches, feed, progress)
                how = {"deeper": "grow", "shallower": "shrink"}.get(str(target), aligner.balance)
                how = depth if isinstance(depth, str) and not isinstance(target, str) else how
                template = _template(target, models, classes, given, work) if isinstance(target, nn.Module) else None
                grown, links, chosen = balanced(classes, template, how, aligner, sample)
                order = sorted(range(len(models)), key=lambda k: k != chosen)
                grown, classes = [grown[k] for k in order], [grown[k].classes for k in order]
                shares = {prefix: tuple(w[k] for k in order) for prefix, w in shares.items()}
                notes += _depth_notes(grown, order, chosen)
        apart = frozenset(k for k, c in enumerate(classes[0]) if c.pinned == OUTPUT and heads != "average")
        wanted: dict[int, int] = {}
        if grown and template is not None:
            wanted = {k: c.size for k, c in enumerate(template) if c.free and c.size != classes[0][k].size}
        same = all(a.size == b.size for c in classes for a, b in zip(c, classes[0], strict=False))
        if matcher is None and (wanted or not same):
            matcher = OTFusion(cost="both" if informed else "weights")
        matcher = matcher or (ActivationMatching() if informed else WeightMatching())
        if wanted and not matcher.resizes:
            raise InputError(
                f"the target has other widths than the networks, and {matcher} keeps theirs: use OTFusion()"
            )
        with _values_told(traced):
            require_same_structure(classes, apart, matcher.any_width)
        if heads != "average" and not apart:
            raise InputError(f"heads={heads!r}, but no layer writes the outputs of this network")
        unknown = [p for p in shares if not any(c.name.startswith(p) for c in classes[0])]
        if unknown:
            raise InputError(f"weights for '{unknown[0]}', but no class of neurons has a name that starts so")
        by_class = tuple(shares[max((p for p in shares if c.name.startswith(p)), key=len)] for c in classes[0])
        by_class = tuple(_shared(w, k, grown, aligner.keep) for k, w in enumerate(by_class))
        verifications: list[Verification] = []
        if request.verify:
            with clock("verify"):
                classes, verifications = verified(classes, seed)
        if matcher.needs_data:
            with clock("statistics"):
                avoid = frozenset(n for g in grown for u in g.inserted if u.kind != "plain" for n in u.nodes)
                taps = [choose_taps(c, matcher.at, avoid=avoid) for c in classes]
                if known is not None:
                    known.origin.require(origin_of(classes, taps))
                    known = known.to(work)
                elif batches is not None:
                    options: dict[str, Any] = {
                        "seed": seed,
                        "progress": progress,
                        "path": path,
                        "first": request.first_batch,
                    }
                    known = collect(classes, batches, feed, taps, **options)
        traced = [c.traced for c in classes]
        held = [full_state(t.graph_module) | full_state(t.source) for t in traced]
        states = tuple(map(read_when_asked, held))
        room = max(sum(v.nbytes for v in full_state(m).values()) for m in models) / 8 if streamed else math.inf
        idle, absent = tuple(g.idle for g in grown), tuple(g.absent for g in grown)
        problem = Problem(tuple(classes), states, by_class, apart, known, seed, progress, idle, absent, wanted, room)
    return Prepared(
        tuple(classes),
        shares[""],
        problem,
        tuple(verifications),
        batches,
        feed,
        work,
        home,
        notes,
        tuple(order),
        tuple(links),
        tuple(frozenset(n for u in g.inserted for n in u.nodes) for g in grown) or (frozenset(),) * len(models),
        matcher,
        seen,
    )


def _traced(models: Sequence[nn.Module], example_inputs: Any, device: torch.device) -> list[Traced]:
    """All networks on one call, copied to the device where they are not there."""
    parents = [m if device_of(m) == device else copy.deepcopy(m).to(device) for m in models]
    first = trace(parents[0], example_inputs)
    given = first.kwargs or first.args
    return [first, *(trace(m, dict(given) if isinstance(given, Mapping) else given) for m in parents[1:])]


@contextmanager
def _values_told(traced: Sequence[Traced]) -> Iterator[None]:
    """Says so where parents may differ in structure since each was recorded as its values decided."""
    try:
        yield
    except StructureError as error:
        if not any(VALUES_DECIDE in t.notes for t in traced):
            raise
        raise StructureError(
            f"{error}. Values of tensors decide which operations run in these networks: give example_inputs on which "
            "all run alike, or merge the part that does not depend on values (a backbone)"
        ) from error


def _known(statistics: Statistics | str | Path | None, data: Iterable[Any] | None) -> Statistics | None:
    """Statistics that need no data any more."""
    if statistics is None or isinstance(statistics, Statistics):
        return statistics
    if not isinstance(statistics, (str, Path)):
        raise InputError(
            f"statistics is a {type(statistics).__name__}: give what collect_statistics returned, or the path of a file"
        )
    found = Statistics.load(statistics) if Path(statistics).exists() else None
    if found is not None and found.complete:
        return found
    if data is None:
        state = "holds an unfinished collection" if found else "does not exist yet"
        raise InputError(f"{statistics} {state}: pass data=loader, from which to gather what is missing")
    return None


def _shared(shares: tuple[float, ...], k: int, grown: Sequence[Grown], keep: bool | None) -> tuple[float, ...]:
    """Shares of class k: nothing for parents that lack it and, to ``keep`` copies, for those that do more than copy."""
    who = [j for j, g in enumerate(grown) if k not in g.absent]
    who = [j for j in who if shares[j] > 0] or who
    copies = [j for j in who if k in grown[j].passing and (not grown[j].passing[k] if keep is None else keep)]
    who = copies or who
    if len(who) in (0, len(shares)):
        return shares
    total = sum(shares[j] for j in who)
    return tuple((w / total if total else 1 / len(who)) if j in who else 0.0 for j, w in enumerate(shares))


def _template(
    target: nn.Module,
    models: Sequence[nn.Module],
    classes: Sequence[AxisClasses],
    given: Any,
    device: torch.device,
) -> AxisClasses:
    """The classes of the network whose depth and widths the result shall have."""
    for model, found in zip(models, classes, strict=True):
        if target is model:
            return found
    target = copy.deepcopy(target).to(device)
    return infer_classes(trace(target, dict(given) if isinstance(given, Mapping) else given))


def _depth_notes(grown: Sequence[Grown], order: Sequence[int], chosen: int) -> tuple[str, ...]:
    notes = []
    if chosen > 0:
        notes.append(f"the result has the layers and names of network {chosen + 1}")
    for g, k in zip(grown, order, strict=True):
        if g.inserted:
            names = ", ".join(u.name for u in g.inserted[:4]) + (" .." if len(g.inserted) > 4 else "")
            notes.append(
                f"network {k + 1} grown by {len(g.inserted)} units that pass on what they read ({names}); its output "
                f"changed by {g.error:.0e}"
            )
    return tuple(notes)


def shares_of(models: Sequence[nn.Module], weights: Sequence[float] | None) -> tuple[float, ...]:
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


def _require_streamable(data: Any, heads: Heads, target: Target, device: torch.device | str) -> None:
    """What a merge of networks on disk cannot do, told before it starts."""
    load = "load them into memory for that"
    if data is not None:
        raise InputError(f"networks that stay on disk are merged by their weights, without data; {load}")
    if heads == "separate" or target is not None:
        raise InputError(f"heads='separate' and target= are for networks in memory; {load}")
    if device not in ("auto", "cpu", torch.device("cpu")):
        raise InputError(f"device={device!r}: networks that stay on disk are merged on the CPU; {load}")


def _device(device: torch.device | str, home: torch.device) -> torch.device:
    if device != "auto":
        try:
            return torch.zeros(0, device=device).device
        except Exception as error:
            raise InputError(f"device={device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return torch.device("cuda") if home.type == "cpu" and torch.cuda.is_available() else home
