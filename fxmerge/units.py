"""What depth is made of: the units of a network that could be left out or repeated, and the stages they form.

Values that carry neurons form a graph from the inputs to the output. Its post-dominators (values that all paths pass)
cut it into segments; a segment or a run of segments that gives back what it was given, in the same shape, is a unit:

    residual   x -> x + f(x), with the activation behind it        (a block of a residual network)
    plain      x -> act(norm(W x))                                  (a layer of a chain)
    concat     f(cat(x, ..)), read by later concatenations only     (a layer of a densely connected block)

Everything else is fixed: it must be the same in all parents, and stands between two stages.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import fx

from fxmerge.alike import described
from fxmerge.ir import AxisClasses, Traced

_ADDS = frozenset({operator.add, operator.iadd, torch.add, "add", "add_", "__add__", "__iadd__"})
_CATS = frozenset({torch.cat, torch.concat, torch.concatenate})
_ROOT = "the inputs"


@dataclass(frozen=True)
class Unit:
    """A part of a network that reads one value and writes one of the same shape.

    Attributes:
        name: the modules that it calls, by their common prefix.
        kind: "residual", "plain" or "concat".
        source: node whose value it reads ("" for concat, which reads many).
        output: node whose value it writes.
        nodes: every node in between, in order, ``output`` included.
        signature: equal for units of the same structure, whatever their widths.
    """

    name: str
    kind: str
    source: str
    output: str
    nodes: tuple[str, ...]
    signature: tuple[str, ...]


@dataclass(frozen=True)
class Stage:
    """Units between two fixed parts of a network.

    Attributes:
        units: in order; may be none.
        border: the operations of the fixed part in front of them, whatever its widths.
    """

    units: tuple[Unit, ...]
    border: tuple[str, ...]

    def __str__(self) -> str:
        if not self.units:
            return "(none)"
        names = [u.name for u in self.units]
        return ", ".join(names) if len(names) < 4 else f"{names[0]} .. {names[-1]} ({len(names)})"


def find_stages(classes: AxisClasses) -> tuple[Stage, ...]:
    """The stages of a network, in order, with patterns that repeat (attention and MLP) as one unit."""
    stages = segmented(classes)
    return tuple(grouped(s, pattern(s)) or s for s in stages)


def segmented(classes: AxisClasses, whole: bool = True) -> tuple[Stage, ...]:
    """The stages of a network, every segment a unit of its own.

    ``whole``: where a stage has one residual unit alone, whether the activations that follow it are a part of it. That
    cannot be told from one; another network may show it.
    """
    return _Finder(classes, whole).stages()


def corresponding(networks: Sequence[Sequence[Stage]]) -> list[tuple[Stage, ...]] | None:
    """Stages at the same place in all networks, empty ones added; None where what lies between them is not the same."""
    fixed = [[line for s in stages for line in s.border] for stages in networks]
    if any(f != fixed[0] for f in fixed):
        return None
    found: list[dict[int, Stage]] = []
    for stages in networks:
        at, places = 0, {}
        for s in stages:
            at += len(s.border)
            places[at] = s
        found.append(places)
    everywhere = sorted({at for places in found for at in places})
    starts = [0, *everywhere]
    return [
        tuple(replace(p.get(at, Stage((), ())), border=tuple(fixed[0][before:at])) for p in found)
        for before, at in zip(starts, everywhere, strict=False)
    ]


def pattern(stage: Stage) -> int:
    """Length of the pattern that its longest run of residual units repeats (attention and MLP in turn: 2)."""
    runs = [r for r in _runs(stage) if r[0].kind == "residual"]
    run = [u.signature for u in max(runs, key=len, default=())]
    return next((p for p in range(1, len(run) + 1) if len(run) % p == 0 and run == run[:p] * (len(run) // p)), 1)


def grouped(stage: Stage, size: int) -> Stage | None:
    """Residual units joined, ``size`` in a row; None where their number does not allow it."""
    units: list[Unit] = []
    for run in _runs(stage):
        if size == 1 or run[0].kind != "residual":
            units += run
        elif len(run) % size:
            return None
        else:
            units += [_joined(run[k : k + size]) for k in range(0, len(run), size)]
    return replace(stage, units=tuple(units))


def _runs(stage: Stage) -> list[list[Unit]]:
    return [list(g) for _, g in groupby(stage.units, lambda u: u.kind)]


def _joined(units: Sequence[Unit]) -> Unit:
    return Unit(
        common_name([u.name for u in units]),
        units[0].kind,
        units[0].source,
        units[-1].output,
        tuple(n for u in units for n in u.nodes),
        tuple(line for u in units for line in (*u.signature, "|")),
    )


def common_name(names: Iterable[str]) -> str:
    """The common start of dotted names; the last one where there is none."""
    parts = [n.split(".") for n in dict.fromkeys(names)]
    same = 0
    while parts and all(len(p) > same and p[same] == parts[0][same] for p in parts):
        same += 1
    return ".".join(parts[0][:same] or parts[-1])


def _shared(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the common start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@dataclass
class _Draft:
    """A unit that may go on: its layers, and what follows without a change of shape."""

    kind: str
    source: str
    core: list[fx.Node]
    rest: list[fx.Node]


class _Finder:
    def __init__(self, classes: AxisClasses, whole: bool) -> None:
        self.whole = whole
        self.traced: Traced = classes.traced
        self.shapes = self.traced.shapes
        self.nodes = list(self.traced.graph_module.graph.nodes)
        self.made = {t.node for c in classes for t in c.taps if t.kind == "made"}
        self.heads = {t.node for c in classes if not c.free for t in c.taps if t.kind == "made"}
        shown = {t.node for c in classes for t in c.taps}
        values = self._values()
        self.live: set[fx.Node] = set()  # carries neurons
        for n in self.nodes:
            if n in values and (n.name in shown or any(m in self.live for m in n.all_input_nodes)):
                self.live.add(n)
        self.output = self.nodes[-1]

    def _values(self) -> set[fx.Node]:
        """Nodes that give tensors, several at once included, and depend on the inputs."""
        given: set[fx.Node] = set()
        for n in self.nodes:
            if n.op == "placeholder" or (n.op != "get_attr" and any(m in given for m in n.all_input_nodes)):
                given.add(n)
        found: set[fx.Node] = set()
        for n in reversed(self.nodes):
            parts = any(u in found and u.target is operator.getitem for u in n.users)
            if n in given and (n.name in self.shapes or parts or n.op == "output"):
                found.add(n)
        return found

    def stages(self) -> tuple[Stage, ...]:
        stages: list[Stage] = []
        drafts: list[_Draft] = []
        border: list[fx.Node] = []

        def end() -> None:
            nonlocal drafts, border
            if drafts:
                loose = self._trim(drafts)
                units = tuple(self._unit(d.kind, d.source, d.core + d.rest) for d in drafts)
                stages.append(Stage(units, self._lines(border)))
                drafts, border = [], loose

        for s, t, region in self._segments():
            same = s is not None and t.name in self.shapes and self.shapes.get(s.name) == self.shapes[t.name]
            if s is not None and same and len(region) > 1 and self._adds(t, s):
                drafts.append(_Draft("residual", s.name, region, []))
            elif s is not None and len(region) == 1 and self._layer(s, t):
                drafts.append(_Draft("plain", s.name, region, []))
            elif s is not None and (dense := self._dense(t, region)):
                end()
                stages.append(Stage(tuple(dense), self._lines(border)))
                inside = {n for u in dense for n in u.nodes}
                border = [n for n in region if n.name not in inside]
            elif same and drafts and t.op != "output":
                drafts[-1].rest += region
            else:
                end()
                border += region
        end()
        return (*stages, Stage((), self._lines(border)))

    def _trim(self, drafts: Sequence[_Draft]) -> list[fx.Node]:
        """Takes from the last unit of a stage what no other unit like it has (a last norm); what was taken."""
        last = drafts[-1]
        if last.kind == "plain":
            return []
        core, rest = self._signature(last.core), self._signature(last.rest)
        others = [d for d in drafts[:-1] if self._signature(d.core) == core]
        activations = next((i for i, n in enumerate(last.rest) if self._parameters(n)), len(last.rest))
        keep = max((_shared(rest, self._signature(d.rest)) for d in others), default=activations if self.whole else 0)
        taken, last.rest = last.rest[keep:], last.rest[:keep]
        return taken

    def _segments(self) -> list[tuple[fx.Node | None, fx.Node, list[fx.Node]]]:
        """(value read, value written, live nodes in between with the written one), from the inputs to the output."""
        import networkx as nx

        graph = nx.DiGraph()
        live = [n for n in self.nodes if n in self.live]
        for n in live:
            sources = [m for m in n.all_input_nodes if m in self.live]
            graph.add_edges_from((n, m) for m in sources or [_ROOT])
        above = nx.immediate_dominators(graph, self.output)
        useful = nx.descendants(graph, self.output) | {self.output}
        found: list[tuple[fx.Node | None, fx.Node, list[fx.Node]]] = []
        at, to, inside = None, above[_ROOT], list[fx.Node]()
        for n in live:
            if n in useful:
                inside.append(n)
            if n is to:
                found.append((at, to, inside))
                at, to, inside = to, above.get(to), []
        return found

    def _adds(self, t: fx.Node, s: fx.Node) -> bool:
        """Whether t is a sum with s among its terms."""
        if t.op not in ("call_function", "call_method") or t.target not in _ADDS or "alpha" in t.kwargs:
            return False
        return any(
            a in self.live and (self._past(a, s) or self._adds(a, s)) for a in t.args[:2] if isinstance(a, fx.Node)
        )

    def _past(self, n: fx.Node, s: fx.Node) -> bool:
        """Whether n is s, but for layers without parameters."""
        while n is not s and len(n.all_input_nodes) == 1 and not self._parameters(n):
            n = n.all_input_nodes[0]
        return n is s

    def _parameters(self, n: fx.Node) -> list[int]:
        """Numbers of axes of the node's own parameters."""
        if n.op == "call_module":
            return [p.dim() for p in self.traced.graph_module.get_submodule(str(n.target)).parameters()]
        return [len(self.shapes.get(m.name, ())) for m in n.all_input_nodes if m.op == "get_attr"]

    def _single(self, n: fx.Node) -> bool:
        """Whether it calls one layer, rather than a module of several that is taken whole."""
        layer = self.traced.graph_module.get_submodule(str(n.target))
        return {name for name, _ in layer.named_children()} <= {"parametrizations"}

    def _layer(self, s: fx.Node, t: fx.Node) -> bool:
        """Whether t is a hidden layer with a weight matrix or kernel that changes the width only."""
        a, b = self.shapes.get(s.name, ()), self.shapes.get(t.name, ())
        if len(a) != len(b) or a[0] != b[0] or sum(x != y for x, y in zip(a, b, strict=True)) > 1:
            return False
        single = self._single(t) if t.op == "call_module" else t.name in self.made
        weighs = max(self._parameters(t), default=0) > 1 and single
        return weighs and t.name not in self.heads

    def _dense(self, t: fx.Node, region: Sequence[fx.Node]) -> list[Unit]:
        """Units that add their output to what all later ones read."""
        inside = set(region)
        ends = {n for n in region if n is not t and n.users and all(u.target in _CATS for u in n.users if u in inside)}
        behind: dict[fx.Node, fx.Node | None] = {}  # the one value that all that is made of a node ends in
        for n in reversed(region):
            goals = {behind.get(u) for u in n.users if u in inside}
            behind[n] = n if n in ends else goals.pop() if len(goals) == 1 else None
        parts = [[n for n in region if behind[n] is v] for v in region if v in ends]
        return [self._unit("concat", "", own) for own in parts if own[0].target in _CATS and len(own) > 1]

    def _unit(self, kind: str, source: str, nodes: Sequence[fx.Node]) -> Unit:
        modules = [str(n.target) for n in nodes if n.op == "call_module"]
        held = [str(m.target) for n in nodes for m in n.all_input_nodes if m.op == "get_attr"]
        named = (modules or held or [nodes[-1].name])[: 1 if kind == "plain" else None]
        return Unit(
            common_name(named), kind, source, nodes[-1].name, tuple(n.name for n in nodes), self._signature(nodes)
        )

    def _lines(self, nodes: Sequence[fx.Node]) -> tuple[str, ...]:
        return self._said(nodes, {})

    def _signature(self, nodes: Sequence[fx.Node]) -> tuple[str, ...]:
        number = {n: str(i) for i, n in enumerate(nodes)}
        return self._said(nodes, number)

    def _said(self, nodes: Sequence[fx.Node], number: Mapping[fx.Node, str]) -> tuple[str, ...]:
        """The operations, whatever their widths and whatever the number of values that are concatenated."""
        said = [described(self.traced, n, number, wider=True) for n in nodes]
        return tuple(
            re.sub(r"\[.*?\]", "[..]", s) if n.target in _CATS else s for n, s in zip(nodes, said, strict=True)
        )
