"""Second moments of activations per class: sums over rows, so they add, merge and can be kept in a file."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fxmerge.errors import FormatError, InputError, told


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
        if self.shift is other.shift:  # batches of one stream
            gram = self.gram + other.gram
            return replace(self, count=self.count + other.count, total=self.total + other.total, gram=gram)
        d = other.shift - self.shift  # rows of ``other``, seen from this shift
        total = other.total + other.count * d
        gram = other.gram + torch.outer(other.total, d) + torch.outer(d, other.total) + other.count * torch.outer(d, d)
        return replace(self, count=self.count + other.count, total=self.total + total, gram=self.gram + gram)

    @staticmethod
    def none(shift: Tensor, widths: tuple[int, ...]) -> Moments:
        """Of no rows at all."""
        return Moments(0, shift, torch.zeros_like(shift), shift.new_zeros(len(shift), len(shift)), widths)

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

    def to(self, device: torch.device | str) -> Moments:
        """The same on another device."""
        shift, total, gram = (t.to(device) for t in (self.shift, self.total, self.gram))
        return replace(self, shift=shift, total=total, gram=gram)


@dataclass(frozen=True)
class Origin:
    """What statistics were gathered from, as digests.

    Attributes:
        classes: names, widths and taps of the classes that were measured.
        parents: some entries of every parameter.
        batch: the first batch; empty where nobody will go on from here.
    """

    classes: str
    parents: str
    batch: str = ""

    def require(self, other: Origin) -> None:
        """An InputError unless ``other`` says the same of the parents."""
        if self.classes != other.classes:
            raise InputError(
                "these statistics belong to different networks, or to other places in them; collect both with the same "
                "parents, the same depth and target, and a matcher that looks at the same activations"
            )
        if self.parents != other.parents:
            raise InputError(
                "these statistics belong to networks with other parameters; collect them anew for these parents"
            )


@dataclass(frozen=True, eq=False)
class Statistics:
    """What the parents' activations show of their classes; ``+`` joins those of different batches.

    Attributes:
        sums: (class, number of the tap) -> moments. Taps that showed inf or NaN (behind masks) have none.
        samples: number of samples seen.
        batches: number of batches seen.
        origin: what was measured.
        complete: False where collecting was interrupted.
    """

    sums: Mapping[tuple[int, int], Moments]
    samples: int
    batches: int
    origin: Origin
    complete: bool = True

    @cached_property
    def moments(self) -> dict[int, tuple[Moments, ...]]:
        """Class -> its moments, one for each tap."""
        found: dict[int, tuple[Moments, ...]] = {}
        for (k, _), m in sorted(self.sums.items()):
            found[k] = (*found.get(k, ()), m)
        return found

    def __add__(self, other: Statistics) -> Statistics:
        self.origin.require(other.origin)
        joined = {at: m + other.sums[at].to(m.total.device) for at, m in self.sums.items() if at in other.sums}
        complete = self.complete and other.complete
        return Statistics(joined, self.samples + other.samples, self.batches + other.batches, self.origin, complete)

    def to(self, device: torch.device | str) -> Statistics:
        """The same on another device."""
        return replace(self, sums={at: m.to(device) for at, m in self.sums.items()})

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, which is there whole or not at all.

        Raises:
            FormatError: the file cannot be written.
        """
        path = Path(path)
        tensors: dict[str, Tensor] = {}
        for (k, t), m in self.sums.items():
            key = f"{k}.{t}."
            tensors |= {key + "shift": m.shift, key + "total": m.total, key + "gram": m.gram}
        said = {
            "sums": [[k, t, m.count, m.widths, m.turned] for (k, t), m in self.sums.items()],
            "samples": self.samples,
            "batches": self.batches,
            "origin": asdict(self.origin),
            "complete": self.complete,
        }
        partial = path.with_name(f".{uuid.uuid4().hex[:8]}.{path.name}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Clones where safetensors would refuse tensors that share memory, as the moments of few rows may
            kept = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
            save_file(kept, partial, metadata={"fxmerge": json.dumps(said)})
            partial.replace(path)
        except (SafetensorError, OSError) as error:
            raise FormatError(f"{path} could not be written: {told(error)}") from error
        finally:
            if partial.exists():
                partial.unlink()

    @staticmethod
    def load(path: str | Path) -> Statistics:
        """Reads what ``save`` wrote.

        Raises:
            FormatError: the file is missing, damaged, or something else.
        """
        try:
            with safe_open(str(path), "pt") as file:
                said = json.loads((file.metadata() or {})["fxmerge"])
                sums = {}
                for k, t, count, widths, turned in said["sums"]:
                    shift, total, gram = (file.get_tensor(f"{k}.{t}.{part}") for part in ("shift", "total", "gram"))
                    sums[k, t] = Moments(count, shift, total, gram, tuple(widths), turned)
            return Statistics(sums, said["samples"], said["batches"], Origin(**said["origin"]), said["complete"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{path} holds no statistics that fxmerge saved ({told(error)})") from error
