"""What a method must be: abstract bases with concrete leaves and nothing in between."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fxmerge.ir import Alignment, AxisClasses

if TYPE_CHECKING:
    from fxmerge.stats import Statistics


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
    """

    classes: tuple[AxisClasses, ...]
    states: tuple[Mapping[str, Tensor], ...]
    shares: tuple[tuple[float, ...], ...]
    apart: frozenset[int]
    statistics: Statistics | None
    seed: int = 0
    progress: bool = False


PLACES = ("read", "made")
"""Where activations are looked at: as the next layers read them, or as a layer wrote them."""


class AbstractMatcher(ABC):
    """Finds one coupling per class.

    Attributes:
        needs_data: whether it reads ``Problem.statistics``.
        any_width: whether corresponding classes of the parents may differ in size.
        at: where activations are looked at, one of ``PLACES``.
    """

    needs_data: bool = False
    any_width: bool = False
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


class AbstractRepair(ABC):
    """Changes a fused module in place so that its activations look like its parents'."""

    @abstractmethod
    def repair(self, module: fx.GraphModule, context: Context) -> str:
        """Repairs ``module`` and says in a few words what was done."""

    __repr__ = AbstractMatcher.__repr__
