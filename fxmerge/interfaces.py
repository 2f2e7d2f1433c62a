"""What a method must be: abstract bases with concrete leaves and nothing in between."""

from __future__ import annotations

import inspect
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fxmerge.ir import Alignment, AxisClasses, Tap
from fxmerge.moments import Statistics
from fxmerge.running import device_of
from fxmerge.units import Stage


@dataclass(frozen=True, eq=False)
class Problem:
    """What a matcher is given.

    Attributes:
        classes: per parent, in corresponding order.
        states: per parent, parameters and buffers by name, on the working device.
        shares: per class, the parents' shares, summing to 1.
        apart: classes that every parent keeps for itself (heads of different label spaces): not to be matched, nor
            anything matched on the tensors that they are part of.
        statistics: activations' second moments, or None where no data was given.
        seed: of every random choice.
        progress: whether to show progress bars.
        idle: per parent, tensors that have no influence on it (of layers that were inserted): not to be compared.
        absent: per parent, classes of which it has no neurons of its own.
        widths: class -> number of fused neurons, where it is not the first parent's.
        room: bytes that may be kept besides what is worked on; finite where parents stay on disk.
    """

    classes: tuple[AxisClasses, ...]
    states: tuple[Mapping[str, Tensor], ...]
    shares: tuple[tuple[float, ...], ...]
    apart: frozenset[int]
    statistics: Statistics | None
    seed: int = 0
    progress: bool = False
    idle: tuple[frozenset[str], ...] = ()
    absent: tuple[frozenset[int], ...] = ()
    widths: Mapping[int, int] = field(default_factory=dict)
    room: float = math.inf

    @property
    def device(self) -> torch.device:
        return device_of(self.classes[0].traced.graph_module)

    @property
    def threads(self) -> int:
        """How many things may be worked on at once: assignments leave the interpreter free, but each needs memory."""
        return (os.cpu_count() or 1) if self.room == math.inf else 1

    def held(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The same, all made at once where there is room for them."""
        return dict(tensors) if self.room == math.inf else tensors

    def silent(self, parents: Sequence[int]) -> frozenset[str]:
        """Tensors that are idle in one of the parents."""
        return frozenset().union(*(self.idle[p] for p in parents if self.idle))

    def present(self, family: Sequence[int]) -> list[int]:
        """The parents that have neurons of all of these classes; all of them where none has."""
        everyone = range(len(self.classes))
        return [p for p in everyone if not (self.absent and self.absent[p] & set(family))] or list(everyone)


PLACES = ("read", "made")
"""Where activations are looked at: as the next layers read them, or as a layer wrote them."""


class AbstractMatcher(ABC):
    """Finds one coupling per class.

    Attributes:
        needs_data: whether it reads ``Problem.statistics``.
        any_width: whether corresponding classes of the parents may differ in size.
        resizes: whether it can give the fused network widths that none of the parents has.
        at: where activations are looked at, one of ``PLACES``.
    """

    needs_data: bool = False
    any_width: bool = False
    resizes: bool = False
    at: str = "read"

    @abstractmethod
    def match(self, problem: Problem) -> Alignment:
        """Aligns all parents to the first."""

    def __repr__(self) -> str:
        """As one would write it: options that are not the default."""
        known = inspect.signature(type(self)).parameters
        options = [f"{k}={v!r}" for k, v in vars(self).items() if k in known and v != known[k].default]
        return f"{type(self).__name__}({', '.join(options)})"


@dataclass(frozen=True, eq=False)
class Sample:
    """Data as a depth aligner sees it: ``feed`` makes (args, kwargs) of a batch."""

    batches: Iterable[Any]
    feed: Callable[[Any], tuple[tuple[Any, ...], dict[str, Any]]]
    progress: bool = False


class AbstractDepthAligner(ABC):
    """Says which units of a deeper network those of a shallower one stand for.

    Attributes:
        needs_data: whether it cannot do without.
        balance: whether to "grow" the shallower or to "shrink" the deeper network.
        join: how plain units become one where it shrinks: "ridge", "sum", "majority" or "fraction".
        keep: whether a layer that is the identity in some parents stays so; None: where it is no larger kernel.
    """

    needs_data: bool = False
    balance: str = "grow"
    join: str = "ridge"
    keep: bool | None = None

    @abstractmethod
    def costs(
        self, short: AxisClasses, long: AxisClasses, pairs: Sequence[tuple[Stage, Stage]], sample: Sample | None
    ) -> list[Tensor]:
        """Per pair of stages [n, m]: how unlike unit k of the shorter and unit l of the longer one are."""

    @abstractmethod
    def assign(self, costs: Tensor) -> list[int] | None:
        """The column of every row, strictly increasing; None where infinite costs rule out every choice."""

    __repr__ = AbstractMatcher.__repr__


@dataclass(frozen=True, eq=False)
class Context:
    """What a repair is given besides the fused module: the parents, how they were fused, and data.

    Attributes:
        classes: per parent, in corresponding order.
        fused: the same classes in the fused network: its own places, under the first parent's node names.
        alignment: one coupling per class.
        weights: the parents' shares.
        batches: the data, can be read again and again.
        feed: batch -> (args, kwargs).
        device: where to compute.
        seed: of every random choice.
        progress: whether to show progress bars.
    """

    classes: tuple[AxisClasses, ...]
    fused: AxisClasses
    alignment: Alignment
    weights: tuple[float, ...]
    batches: Iterable[Any]
    feed: Callable[[Any], tuple[tuple[Any, ...], dict[str, Any]]]
    device: torch.device
    seed: int = 0
    progress: bool = False

    def mixes(self, node: str, axis: int) -> tuple[Tensor, ...] | None:
        """Per parent [n, its own]: a node's channels from a parent's; None if some have no origin."""
        parents = self.classes
        width = sum(t.index.numel() for c in self.fused for t in _taps(c.taps, node, axis))
        mixes = [torch.zeros(width, p.traced.shapes[node][axis], dtype=torch.float64) for p in parents]
        covered = torch.zeros(width, dtype=torch.bool)
        for k, c in enumerate(self.fused):
            if any(t.node == node and t.axis != axis for t in c.taps) and c.free:
                return None  # positions that move
            coupling = self.alignment.couplings[k]
            goals = _taps(c.taps, node, axis)
            made = coupling.merge.split(coupling.widths, 1)
            dual = made if coupling.dual is None else coupling.dual.split(coupling.widths, 1)
            for mix, p, *part in zip(mixes, parents, made, dual, strict=True):
                origins = _taps(p[k].taps, node, axis)
                if [g.index.shape[1] for g in goals] != [o.index.shape[1] for o in origins]:
                    return None
                for goal, origin in zip(goals, origins, strict=True):
                    turned = goal.turned or (False,) * goal.index.shape[1]
                    for to, of, side in zip(goal.index.T, origin.index.T, turned, strict=True):
                        mix[to[:, None], of] = part[side].to(mix)
                        covered[to] = True
        return tuple(mixes) if bool(covered.all()) else None


def _taps(taps: Sequence[Tap], node: str, axis: int) -> list[Tap]:
    return [t for t in taps if t.node == node and t.axis == axis]


class AbstractRepair(ABC):
    """Changes a fused module in place so that its activations look like its parents'."""

    @abstractmethod
    def repair(self, module: fx.GraphModule, context: Context) -> str:
        """Repairs ``module`` and says in a few words what was done."""

    __repr__ = AbstractMatcher.__repr__
