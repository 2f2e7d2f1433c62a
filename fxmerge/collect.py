"""Streaming batches through all parents, and summing up what their activations show.

The sums are over rows, so they do not depend on how the batches are shared out: among processes, among jobs, or before
and after an interruption. Which rows are kept is drawn for every batch by its number alone.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fxmerge.errors import InputError
from fxmerge.fingerprint import fingerprint
from fxmerge.ir import AxisClasses, Tap
from fxmerge.moments import Moments, Origin, Statistics
from fxmerge.ranks import draw, from_first, ordinal, place, summed
from fxmerge.running import evaluating, fitting
from fxmerge.stats import Feed, listen, rows

_ROW_BUDGET = 2**15
"""Rows per sample times neurons of all parents: keeps the products a fraction of the forward passes."""

_SAVE_EVERY = 60.0
"""Seconds between two writes of unfinished sums; more where writing takes long."""

Taps = Sequence[Mapping[int, Sequence[Tap]]]
At = tuple[int, int]


def collect(
    parents: Sequence[AxisClasses],
    batches: Iterable[Any],
    feed: Feed,
    taps: Taps,
    *,
    positions: int = 64,
    seed: int = 0,
    progress: bool = False,
    path: Path | None = None,
    first: int = 0,
) -> Statistics:
    """Streams batches through all parents and sums up what the taps show, the same places in every parent.

    Args:
        parents: classes of each parent, in corresponding order.
        batches: the data, one forward pass per batch and parent.
        feed: batch -> (args, kwargs).
        taps: per parent: class -> taps.
        positions: rows kept per sample and tap, drawn anew for each batch (all where there are fewer; fewer for wide
            classes, whose products cost the square of their width).
        seed: of that draw.
        path: a file that keeps the sums, also where collecting is interrupted; if it is there, collecting goes on from
            it, with the batches that follow those it has seen.
        first: number of batches that other jobs see before these.

    Under ``torch.distributed`` every rank streams its own shard, ``data[rank::world]``, and the sums are joined.
    """
    origin = origin_of(parents, taps)
    part = None if path is None else _part(path)
    start = Statistics({}, 0, 0, origin, False)
    if part is not None and part.exists():
        start = Statistics.load(part)
        start.origin.require(origin)
        if part == path and place()[1] > 1:
            raise InputError(f"{path} was begun by one process; let one process finish it, or remove it")
    run = _Run(parents, feed, taps, start, positions, seed, first)
    try:
        with evaluating(*run.graphs):
            for number, batch in enumerate(tqdm(batches, desc="statistics", disable=not progress, leave=False)):
                if part is not None and not number:
                    run.identify(batch)
                if number >= start.batches:
                    run.see(number, batch)
                    if part is not None and run.due:
                        run.save(part)
    except BaseException:
        if part is not None and run.batches:
            run.save(part)
        raise
    if not run.samples:
        raise InputError("the data is empty: no batch came out of it. Pass a loader with at least one batch")
    found = _joined(run)
    finite = {at: bool(torch.isfinite(m.total).all()) for at, m in found.sums.items()}
    if not all(good for (k, t), good in finite.items() if taps[0][k][t].kind != "other"):
        raise InputError("activations hold NaN or inf on this data; check the inputs' scale and the parents' weights")
    # others may: scores behind an attention mask
    turned = {(k, t): bool(tap.turned) and all(tap.turned) for k, ts in taps[0].items() for t, tap in enumerate(ts)}
    sums = {at: replace(m, turned=turned[at]) for at, m in found.sums.items() if finite[at]}
    found = replace(found, sums=sums, complete=True)
    if path is not None and part is not None:
        if not place()[0]:
            found.save(path)
        if part != path:
            part.unlink(missing_ok=True)
    return found


def origin_of(parents: Sequence[AxisClasses], taps: Taps) -> Origin:
    """Digests of what will be measured, and in whom."""
    said = [
        [(p[k].name, p[k].size, [(t.node, t.axis, t.kind) for t in ts]) for k, ts in sorted(chosen.items())]
        for p, chosen in zip(parents, taps, strict=True)
    ]
    ends: list[Tensor] = []
    for p in parents:
        for value in p.traced.graph_module.parameters():
            if value.numel() and value.is_floating_point():
                at = ([0] * value.dim(), [s // 2 for s in value.shape], [-1] * value.dim())
                ends += [value.detach()[tuple(i)].double() for i in at]
    numbers = torch.stack(ends).tolist() if ends else []
    return Origin(_digest(repr(said).encode()), _digest(repr(numbers).encode()))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _part(path: Path) -> Path:
    """The file of this process: its own sums until all processes' are joined."""
    rank, world = place()
    return path if world == 1 or path.exists() else path.with_name(f"{path.name}.{rank}of{world}")


def _device(parents: Sequence[AxisClasses]) -> torch.device:
    return next(parents[0].traced.graph_module.parameters(), torch.zeros(())).device


class _Run:
    """Collecting: what came of the batches so far.

    A batch counts from the moment at which ``seen`` is replaced, when its rows are with all taps. So an interruption at
    any point leaves the sums of whole batches.
    """

    def __init__(
        self,
        parents: Sequence[AxisClasses],
        feed: Feed,
        taps: Taps,
        start: Statistics,
        positions: int,
        seed: int,
        first: int,
    ) -> None:
        self.graphs = [p.traced.graph_module for p in parents]
        self._feed, self._taps, self._positions, self._seed, self._first = feed, taps, positions, seed, first
        self._nodes = [{t.node for ts in chosen.values() for t in ts} for chosen in taps]
        places = [(k, t) for k, ts in taps[0].items() for t in range(len(ts))]
        self._seen = start.batches, start.samples
        self.origin = start.origin
        self.device = _device(parents)
        self.sums: dict[At, _Sum] = {}
        for k, t in places:
            widths = tuple(chosen[k][t].index.shape[0] for chosen in taps)
            known = start.sums.get((k, t))
            self.sums[k, t] = _Sum(widths, None if known is None else known.to(self.device), start.batches)
        self._saved, self._pause = time.monotonic(), _SAVE_EVERY

    @property
    def batches(self) -> int:
        return self._seen[0]

    @property
    def samples(self) -> int:
        return self._seen[1]

    def identify(self, batch: Any) -> None:
        """Remembers the first batch, or compares it with the one that is remembered."""
        digest = fingerprint((), self._feed(batch))["first_batch"]
        if self.origin.batch not in ("", digest):
            raise InputError(
                "statistics were interrupted and cannot go on: the data does not start with the batch that it started "
                "with. Give the same batches in the same order (a loader that does not shuffle), or remove the file"
            )
        self.origin = replace(self.origin, batch=digest)

    def see(self, number: int, batch: Any) -> None:
        with fitting(number):
            args, kwargs = self._feed(batch)
            heard = [listen(g, n, args, kwargs) for g, n in zip(self.graphs, self._nodes, strict=True)]
        size = _batch_size(args, kwargs)
        chosen_by = draw(self._seed, self._first + ordinal(number))
        for (k, t), known in self.sums.items():
            seen = [h[chosen[k][t].node] for h, chosen in zip(heard, self._taps, strict=True)]
            if len({_around(v, chosen[k][t].axis) for v, chosen in zip(seen, self._taps, strict=True)}) > 1:
                continue  # each parent chose its own (boxes, tokens): row by row they are not the same
            every = seen[0].numel() // seen[0].shape[self._taps[0][k][t].axis]
            most = size * min(self._positions, max(8, _ROW_BUDGET // sum(known.widths)))
            keep = torch.randint(every, (most,), generator=chosen_by) if every > most else None
            known.add(number, [rows(v, chosen[k][t], keep) for v, chosen in zip(seen, self._taps, strict=True)])
        self._seen = number + 1, self.samples + size
        for known in self.sums.values():
            if known.many:
                known.moments(self.batches)

    def found(self) -> Statistics:
        """Of all whole batches."""
        sums = {at: s.moments(self.batches) for at, s in self.sums.items()}
        known = {at: m for at, m in sums.items() if m is not None}
        return Statistics(known, self.samples, self.batches, self.origin, False)

    @property
    def due(self) -> bool:
        return time.monotonic() - self._saved > self._pause

    def save(self, path: Path) -> None:
        start = time.monotonic()
        self.found().save(path)
        self._saved = time.monotonic()
        self._pause = max(_SAVE_EVERY, 20 * (self._saved - start))


def _around(value: Tensor, axis: int) -> tuple[int, ...]:
    """The shape without an axis."""
    return (*value.shape[:axis], *value.shape[axis:][1:])


def _batch_size(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    return next((x.shape[0] for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim()), 1)


@dataclass(eq=False)
class _Sum:
    """Moments of one tap while rows come in; products wait until there are many, since each costs a pass over n^2.

    ``known``, replaced as a whole, has the moments and the number of batches in them.
    """

    widths: tuple[int, ...]
    start: Moments | None
    batches: int

    def __post_init__(self) -> None:
        self._known: tuple[Moments | None, int] = self.start, self.batches
        self._waiting: list[tuple[int, Tensor]] = []

    def add(self, number: int, parts: Sequence[Tensor]) -> None:
        x = torch.cat(list(parts), 1)
        self._waiting.append((number, x.float() if x.dtype in (torch.float16, torch.bfloat16) else x))

    @property
    def many(self) -> bool:
        return sum(len(x) for _, x in self._waiting) >= sum(self.widths) // 4

    def moments(self, until: int) -> Moments | None:
        """Of the batches before ``until``."""
        known, seen = self._known
        new = [x for number, x in self._waiting if seen <= number < until]
        if new:
            x = torch.cat(new)
            wide = torch.float64 if x.device.type != "mps" else torch.float32
            shift = x.mean(0).to(wide) if known is None else known.shift
            x = x - shift.to(x)
            fresh = Moments(len(x), shift, x.sum(0, dtype=wide), (x.T @ x).to(wide), self.widths)
            known = fresh if known is None else known + fresh
            self._known = known, until
        self._waiting = [(number, x) for number, x in self._waiting if number >= until]
        return known


def _joined(run: _Run) -> Statistics:
    """The sums of all processes: around the first one's shifts, then in one all_reduce."""
    mine = run.found()
    if place()[1] == 1:
        return mine
    shifts = from_first([m.shift for m in mine.sums.values()])
    moved = [Moments.none(s, m.widths) + m for s, m in zip(shifts, mine.sums.values(), strict=True)]
    numbers = [mine.samples, mine.batches, *(m.count for m in moved)]
    counts = torch.tensor(numbers, dtype=shifts[0].dtype, device=run.device)
    *parts, counts = summed([*(x for m in moved for x in (m.total, m.gram)), counts])
    samples, batches, *counted = (round(x) for x in counts.tolist())
    whole = zip(counted, shifts, parts[::2], parts[1::2], (m.widths for m in moved), strict=True)
    return Statistics(dict(zip(mine.sums, (Moments(*m) for m in whole), strict=True)), samples, batches, run.origin)
