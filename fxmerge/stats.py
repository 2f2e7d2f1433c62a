"""Streaming second moments of activations, per class: sums over samples, so they add and merge."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, fx
from tqdm import tqdm

from fxmerge.errors import InputError
from fxmerge.ir import AxisClasses, Tap
from fxmerge.running import bind, evaluating, fitting


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of one tap, over the features of all parents side by side [n_a + n_b + ..].

    Attributes:
        count: number of rows (samples x positions).
        shift: [n], a rough mean that was subtracted first.
        total: [n], float64 sum of shifted rows.
        gram: [n, n], float64 sum of outer products of shifted rows.
        widths: (n_a, n_b, ..).
        turned: whether the tap shows the neurons as turned places make them (keys, say, where others are queries).
    """

    count: int
    shift: Tensor
    total: Tensor
    gram: Tensor
    widths: tuple[int, ...]
    turned: bool = False

    def __add__(self, other: Moments) -> Moments:
        if torch.equal(self.shift, other.shift):  # batches of one stream
            gram = self.gram + other.gram
            return replace(self, count=self.count + other.count, total=self.total + other.total, gram=gram)
        d = other.shift - self.shift  # rows of ``other``, seen from this shift
        total = other.total + other.count * d
        gram = other.gram + torch.outer(other.total, d) + torch.outer(d, other.total) + other.count * torch.outer(d, d)
        return replace(self, count=self.count + other.count, total=self.total + total, gram=self.gram + gram)

    @property
    def mean(self) -> Tensor:
        return self.shift + self.total / max(self.count, 1)

    @property
    def covariance(self) -> Tensor:
        """Centred second moments [n, n]."""
        mean = self.total / max(self.count, 1)
        return self.gram / max(self.count, 1) - torch.outer(mean, mean)

    def part(self, matrix: Tensor, a: int, b: int) -> Tensor:
        """The block of ``matrix`` [n, n] between parents a and b."""
        return matrix.split(self.widths)[a].split(self.widths, 1)[b]


@dataclass(frozen=True, eq=False)
class Statistics:
    """Moments per class index, a tuple over its taps."""

    moments: Mapping[int, tuple[Moments, ...]]
    samples: int

    def __add__(self, other: Statistics) -> Statistics:
        if self.moments.keys() != other.moments.keys():
            raise InputError(
                "these statistics belong to different networks; collect both with the same parents and taps"
            )
        joined = {k: tuple(a + b for a, b in zip(m, other.moments[k], strict=True)) for k, m in self.moments.items()}
        return Statistics(joined, self.samples + other.samples)

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file."""
        tensors: dict[str, Tensor] = {"samples": torch.tensor(self.samples)}
        for k, taps in self.moments.items():
            for t, m in enumerate(taps):
                key = f"{k}.{t}."
                tensors |= {key + "shift": m.shift, key + "total": m.total, key + "gram": m.gram}
                tensors |= {key + "count": torch.tensor(m.count), key + "widths": torch.tensor(m.widths)}
                tensors |= {key + "turned": torch.tensor(m.turned)}
        save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, str(path))

    @staticmethod
    def load(path: str | Path) -> Statistics:
        """Reads what ``save`` wrote."""
        tensors = load_file(str(path))
        samples = int(tensors.pop("samples"))
        found: dict[int, dict[int, dict[str, Tensor]]] = {}
        for key, value in tensors.items():
            k, t, field = key.split(".")
            found.setdefault(int(k), {}).setdefault(int(t), {})[field] = value
        moments = {
            k: tuple(
                Moments(
                    int(f["count"]), f["shift"], f["total"], f["gram"], tuple(f["widths"].tolist()), bool(f["turned"])
                )
                for _, f in sorted(taps.items())
            )
            for k, taps in sorted(found.items())
        }
        return Statistics(moments, samples)


_ROW_BUDGET = 2**15
"""Rows per sample times neurons of all parents: keeps the products a fraction of the forward passes."""

Feed = Callable[[Any], tuple[tuple[Any, ...], dict[str, Any]]]


def choose_taps(
    classes: AxisClasses, kind: str = "read", most: int = 4, avoid: frozenset[str] = frozenset()
) -> dict[int, tuple[Tap, ...]]:
    """Per free class the activations to measure, at most ``most``, evenly over the depth.

    ``kind``: "read", what the next contraction reads (after activations); "made", what a contraction wrote. Nodes to
    ``avoid`` count only where there are no others.
    """
    shown: dict[str, set[int]] = {}  # node -> axes along which neurons may move
    for c in classes:
        for t in c.taps if c.free and c.size > 1 else ():
            shown.setdefault(t.node, set()).add(t.axis)
    live = _from_inputs(classes)
    chosen = {}
    for k, c in enumerate(classes):
        # rows over another axis of neurons, or of a parameter, are not the same rows in every parent
        seen = [t for t in c.taps if t.node in live and shown.get(t.node, {t.axis}) == {t.axis}]
        seen = [t for t in seen if t.node not in avoid] or seen
        if c.free and seen:
            taps = [t for t in seen if t.kind == kind] or seen
            if not c.turned:
                chosen[k] = _spread(taps, most)
                continue
            parts = [p for t in taps for p in t.parts()]  # both sides by themselves, and as many of each
            halves = [[p for p in parts if any(p.turned) is side] for side in (False, True)]
            chosen[k] = tuple(p for half in halves for p in _spread(half, most // 2))
    return chosen


def _spread(taps: Sequence[Tap], most: int) -> tuple[Tap, ...]:
    step = (len(taps) - 1) / max(most - 1, 1)
    return tuple(taps) if len(taps) <= most else tuple(taps[round(i * step)] for i in range(most))


def _from_inputs(classes: AxisClasses) -> set[str]:
    """Names of the nodes that depend on the network's inputs."""
    found: set[str] = set()
    for n in classes.traced.graph_module.graph.nodes:
        if n.op == "placeholder" or any(m.name in found for m in n.all_input_nodes):
            found.add(n.name)
    return found


class _Listener(fx.Interpreter):
    """Runs a graph and keeps the outputs of some nodes."""

    def __init__(self, module: fx.GraphModule, nodes: set[str]) -> None:
        super().__init__(module)
        self.nodes = nodes
        self.heard: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.nodes:
            self.heard[n.name] = value
        return value


def listen(
    module: fx.GraphModule, nodes: set[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Tensor]:
    """One forward pass; the outputs of the named nodes, copied where a later in-place operation would change them."""
    inplace = _overwritten(module, nodes)
    listener = _Listener(module, nodes)
    if inplace:
        run = listener.run_node

        def keep(n: fx.Node) -> Any:
            value = run(n)
            if n.name in inplace:
                listener.heard[n.name] = value.clone()
            return value

        listener.run_node = keep  # type: ignore[method-assign]
    listener.run(*bind(module.graph, args, kwargs))
    return listener.heard


def _overwritten(module: fx.GraphModule, nodes: set[str]) -> set[str]:
    """Those of the nodes whose output a user changes in place."""
    found = set()
    for n in module.graph.nodes:
        if n.name in nodes:
            for user in n.users:
                target = module.get_submodule(user.target) if user.op == "call_module" else user.target
                name = getattr(target, "__name__", str(target))
                if (
                    getattr(target, "inplace", False)
                    or user.kwargs.get("inplace")
                    or (name.endswith("_") and not name.endswith("__"))
                ):
                    found.add(n.name)
                if name.startswith("i") and getattr(target, "__module__", "") == "_operator":
                    found.add(n.name)
    return found


def rows(value: Tensor, tap: Tap, positions: Tensor | None) -> Tensor:
    """[rows, n]: a class's neurons in one activation, a row per sample and position.

    A neuron with several places along the axis (a flattened feature map) gives a row for each.
    """
    flat = value.movedim(tap.axis, -1)
    if positions is None:
        flat = flat.reshape(-1, flat.shape[-1])
    else:  # picked before anything is copied
        flat = flat[torch.unravel_index(positions, flat.shape[:-1])]
    index = tap.index.to(value.device)
    n, m = index.shape
    if m == 1 and n == flat.shape[1] and bool((index[:, 0] == torch.arange(n, device=value.device)).all()):
        return flat
    return flat[:, index.T.reshape(-1)].reshape(-1, n)


def collect(
    parents: Sequence[AxisClasses],
    batches: Iterable[Any],
    feed: Feed,
    taps: Sequence[Mapping[int, Sequence[Tap]]],
    *,
    positions: int = 64,
    seed: int = 0,
    progress: bool = False,
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

    Under ``torch.distributed`` every rank streams its own shard and the sums are joined.
    """
    graphs = [p.traced.graph_module for p in parents]
    nodes = [{t.node for ts in chosen.values() for t in ts} for chosen in taps]
    sums = {(k, t): _Running() for k, ts in taps[0].items() for t in range(len(ts))}
    draw = torch.Generator().manual_seed(seed)
    samples = 0
    masked: set[tuple[int, int]] = set()
    with evaluating(*graphs):
        for number, batch in enumerate(tqdm(batches, desc="statistics", disable=not progress, leave=False)):
            with fitting(number):
                args, kwargs = feed(batch)
                heard = [listen(g, n, args, kwargs) for g, n in zip(graphs, nodes, strict=True)]
            size = _batch_size(args, kwargs)
            samples += size
            for (k, t), running in sums.items():
                if (k, t) in masked:
                    continue
                seen = [h[chosen[k][t].node] for h, chosen in zip(heard, taps, strict=True)]
                total = seen[0].numel() // seen[0].shape[taps[0][k][t].axis]
                keep = None
                wide = sum(chosen[k][t].index.shape[0] for chosen in taps)
                most = size * min(positions, max(8, _ROW_BUDGET // wide))
                if total > most:
                    keep = torch.randint(total, (most,), generator=draw).to(seen[0].device)
                parts = [rows(v, chosen[k][t], keep) for v, chosen in zip(seen, taps, strict=True)]
                if taps[0][k][t].kind == "other" and not all(bool(torch.isfinite(p).all()) for p in parts):
                    masked.add((k, t))  # scores behind an attention mask
                    continue
                running.add(parts)
    if not samples:
        raise InputError("the data is empty: no batch came out of it. Pass a loader with at least one batch")
    done: dict[int, list[Moments]] = {}
    for (k, t), running in sums.items():
        if (k, t) not in masked:
            turned = taps[0][k][t].turned
            done.setdefault(k, []).append(replace(running.moments(), turned=bool(turned) and all(turned)))
    stats = Statistics({k: tuple(ms) for k, ms in done.items()}, samples)
    for ms in stats.moments.values():
        for m in ms:
            if not bool(torch.isfinite(m.total).all()):
                raise InputError(
                    "activations hold NaN or inf on this data; check the inputs' scale and the parents' weights"
                )
    return _all_reduce(stats)


def _batch_size(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    return next((x.shape[0] for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim()), 1)


class _Running:
    """Moments of one tap while rows come in; products wait until there are many, since each costs a pass over n^2."""

    def __init__(self) -> None:
        self._waiting: list[Tensor] = []
        self._rows = 0
        self._sum: Moments | None = None
        self._widths: tuple[int, ...] = ()

    def add(self, parts: Sequence[Tensor]) -> None:
        self._widths = tuple(p.shape[1] for p in parts)
        x = torch.cat(list(parts), 1)
        self._waiting.append(x.float() if x.dtype in (torch.float16, torch.bfloat16) else x)
        self._rows += len(x)
        if self._rows >= x.shape[1] // 4:
            self.moments()

    def moments(self) -> Moments:
        """Of all rows so far."""
        if self._waiting:
            x = torch.cat(self._waiting)
            self._waiting, self._rows = [], 0
            wide = torch.float64 if x.device.type != "mps" else torch.float32
            shift = x.mean(0) if self._sum is None else self._sum.shift.to(x)
            x = x - shift
            new = Moments(len(x), shift.to(wide), x.sum(0, dtype=wide), (x.T @ x).to(wide), self._widths)
            self._sum = new if self._sum is None else self._sum + new
        assert self._sum is not None
        return self._sum


def _all_reduce(stats: Statistics) -> Statistics:
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return stats
    joined = {}
    for k, ms in stats.moments.items():
        out = []
        for m in ms:
            zero, none = torch.zeros_like(m.shift), torch.zeros_like(m.gram)
            m = replace(m, count=0, shift=zero, total=zero.clone(), gram=none) + m  # a shift that all ranks share
            count = torch.tensor(float(m.count), dtype=torch.float64, device=m.total.device)
            for t in (count, m.total, m.gram):
                dist.all_reduce(t)
            out.append(replace(m, count=int(count)))
        joined[k] = tuple(out)
    samples = torch.tensor(stats.samples)
    dist.all_reduce(samples)
    return Statistics(joined, int(samples))
