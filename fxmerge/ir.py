"""The data that passes hand to each other: frozen, and free of behaviour beyond reading themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx, nn

from fxmerge.markup import element, table

VALUES_DECIDE = "control flow that depends on values is recorded as it ran on the example inputs"
OUTPUT = "the network's output"
"""Why an output neuron stays in place."""


@dataclass(frozen=True, eq=False)
class Traced:
    """A module as a graph.

    Attributes:
        graph_module: runs like ``source`` and shares its parameters and buffers under the same names.
        source: the module that was traced.
        args, kwargs: the example inputs, as the call ``source(*args, **kwargs)``.
        shapes: node name -> shape of its output, for nodes that produce one tensor.
        origin: which front end made the graph ("symbolic" or "recorded").
        notes: what a reader of the report should know, such as where the example inputs came from.
    """

    graph_module: fx.GraphModule
    source: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    origin: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, order=True)
class Site:
    """One axis of one parameter or buffer: where neurons live.

    ``groups > 1`` marks an axis whose entries are other neurons in every group of rows, which are the indices of the
    axis ``along``: the input axis of a grouped convolution, or the hidden neurons of experts in one tensor. The stored
    axis holds ``inside`` entries, and neuron ``g * inside + i`` is entry ``i`` of the rows of group ``g``.
    """

    parameter: str
    axis: int
    groups: int = 1
    along: int = 0

    def is_stack(self, shape: Sequence[int]) -> bool:
        """Whether every row has neurons of its own, more than one, in a tensor of this shape."""
        return self.groups > 1 and self.groups == shape[self.along] and shape[self.axis] > 1

    def __str__(self) -> str:
        return f"{self.parameter}:{self.axis}" + (f" ({self.groups} groups)" if self.groups > 1 else "")


@dataclass(frozen=True, eq=False)
class Tap:
    """Where a class shows in an activation: ``index[i]`` are neuron i's places along ``axis`` of ``node``'s output.

    ``kind``: "made" where a contraction wrote it, "read" where a contraction reads it, else "other". ``turned`` is as
    in ``AxisClass``, here for every column; () where none is.
    """

    node: str
    axis: int
    index: Tensor
    kind: str = "other"
    turned: tuple[bool, ...] = ()

    def parts(self) -> tuple[Tap, ...]:
        """The columns that are not turned, and those that are."""
        if len(set(self.turned)) < 2:
            return (self,)
        found = ([i for i, t in enumerate(self.turned) if t is side] for side in (False, True))
        return tuple(
            replace(self, index=self.index[:, columns], turned=tuple(self.turned[i] for i in columns))
            for columns in found
        )


@dataclass(frozen=True, eq=False)
class AxisClass:
    """Neurons that may stand in for each other.

    Without ``parents`` any permutation of the ``size`` neurons is a symmetry. With parents, neuron ``i`` lives in
    the block ``blocks[i]`` (one index per parent class): blocks move as the parents do, and inside one block the
    neurons permute freely (a wreath product; with two parents, a direct product).

    Attributes:
        name: the first site, readable and unique.
        size: number of neurons.
        sites: Site -> int64 [size, m]: the m places of each neuron along that axis.
        parents: indices of the parent classes in ``AxisClasses``.
        blocks: int64 [size, len(parents)].
        pinned: why no neuron may move, or None for a free class.
        taps: the activations that show this class.
        turned: Site -> bool [m]: columns of places that make neurons to be summed over against those that others make,
            as keys against queries (see ``sides``). What maps neurons turns the transposed way there. Sites without
            such columns are left out.
        reflexive: whether neurons are summed over against themselves, so that only orthogonal maps change nothing.
    """

    name: str
    size: int
    sites: Mapping[Site, Tensor]
    parents: tuple[int, ...]
    blocks: Tensor
    pinned: str | None
    taps: tuple[Tap, ...]
    turned: Mapping[Site, Tensor] = field(default_factory=dict)
    reflexive: bool = False

    @property
    def free(self) -> bool:
        return self.pinned is None


@dataclass(frozen=True, eq=False)
class AxisClasses:
    """All classes of one traced module, parents before children.

    Attributes:
        classes: the classes; pinned ones included.
        reads: sites whose axis reads neurons (a contraction's input side); every other site makes them.
        aliases: canonical tensor name -> the other names of the same storage (tied weights).
        unknown: (node, operation) pairs that had no rule and pinned what they touched.
        traced: the traced module these classes belong to.
    """

    classes: tuple[AxisClass, ...]
    reads: frozenset[Site]
    aliases: Mapping[str, tuple[str, ...]]
    unknown: tuple[tuple[str, str], ...]
    traced: Traced

    def __iter__(self) -> Iterator[AxisClass]:
        return iter(self.classes)

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, index: int) -> AxisClass:
        return self.classes[index]

    @property
    def free(self) -> int:
        """Number of neurons that may move."""
        return sum(c.size for c in self.classes if c.free and c.sites)

    @property
    def total(self) -> int:
        """Number of neurons, pinned ones included."""
        return sum(c.size for c in self.classes if c.sites)

    def children(self, index: int) -> tuple[int, ...]:
        """Classes whose blocks are neurons of class ``index``."""
        return tuple(k for k, c in enumerate(self.classes) if index in c.parents)

    def by_tensor(self) -> dict[str, list[tuple[Site, int, Tensor]]]:
        """Canonical tensor name -> (site, class index, places [size, m]) of every class on it, pinned included."""
        found: dict[str, list[tuple[Site, int, Tensor]]] = {}
        for k, c in enumerate(self.classes):
            for site, index in c.sites.items():
                found.setdefault(site.parameter, []).append((site, k, index))
        return found

    def _rows(self) -> list[tuple[str, int, int, str]]:
        """Name, set in under its blocks, neurons, sites, and whether they may move."""
        rows: list[tuple[str, int, int, str]] = []

        def walk(index: int, depth: int) -> None:
            c = self.classes[index]
            note = "free" if c.free else f"pinned: {c.pinned}"
            if c.free and (inner := self.children(index)):
                note = "free blocks of " + ", ".join(
                    f"{self[k].size // max(c.size, 1)}" for k in inner if len(self[k].parents) == 1
                )
            rows.append(("  " * depth + c.name, c.size, len(c.sites), note))
            for k in self.children(index):
                if self[k].parents[0] == index:
                    walk(k, depth + 1)

        for k, c in enumerate(self.classes):
            if not c.parents:
                walk(k, 0)
        return rows

    def _repr_html_(self) -> str:
        rows = [(element("span", name, style="white-space: pre"), *rest) for name, *rest in self._rows()]
        found = table(("class", "neurons", "sites", ""), rows, right=(1, 2))
        return element("details", element("summary", f"{self.free} of {self.total} neurons are free"), found, open="")

    def __str__(self) -> str:
        rows = [("class", "neurons", "sites", ""), *(tuple(map(str, row)) for row in self._rows())]
        widths = [max(len(r[i]) for r in rows) for i in range(3)]
        lines = [f"{r[0]:<{widths[0]}}  {r[1]:>{widths[1]}}  {r[2]:>{widths[2]}}  {r[3]}".rstrip() for r in rows]
        lines.insert(1, "-" * max(map(len, lines)))
        lines.append(f"{self.free} of {self.total} neurons are free")
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class Coupling:
    """How one class of the parents becomes one class of the fused network.

    With n_a, n_b, .. neurons in the parents' class and n in the fused one:

    Attributes:
        merge: [n, n_a + n_b + ..]: a fused neuron's incoming row from the parents' rows.
        unmerge: [n_a + n_b + .., n]: each parent's neuron read back from the fused ones.
        widths: (n_a, n_b, ..).
        dual: [n, n_a + n_b + ..]: as ``merge``, for places that are turned; None where it is the same.
    """

    merge: Tensor
    unmerge: Tensor
    widths: tuple[int, ...]
    dual: Tensor | None = None

    @property
    def size(self) -> int:
        return self.merge.shape[0]


@dataclass(frozen=True, eq=False)
class Alignment:
    """One coupling per class, in the order of ``AxisClasses``; ``quality[k]`` in [-1, 1]: how well class k matched."""

    couplings: tuple[Coupling, ...]
    method: str
    quality: Mapping[int, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
