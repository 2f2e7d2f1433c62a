"""Data and example inputs as a command line names them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxmerge.errors import InputError, told
from fxmerge.sources import Source, attempt, factory, state_dict

_INPUT = re.compile(r"(?:([A-Za-z_]\w*)=)?(\d+(?:x\d+)*)(?::(\d+))?")


def example(texts: list[str]) -> Any:
    """Example inputs from texts such as "2x3x32x32" or "input_ids=2x16:1000": a tensor, or a dict of them."""
    inputs: dict[str, Tensor] = {}
    draw = torch.Generator().manual_seed(0)
    for text in texts:
        found = _INPUT.fullmatch(text)
        if found is None:
            raise InputError(f"--input {text}: write a shape such as 2x3x224x224 or input_ids=2x16:1000")
        shape = [int(n) for n in found[2].split("x")]
        below = int(found[3]) if found[3] else None
        made = torch.randn(shape, generator=draw) if below is None else torch.randint(below, shape, generator=draw)
        inputs[found[1] or ""] = made
    if len(inputs) < len(texts) or (len(inputs) > 1 and "" in inputs):
        raise InputError("several --input: give each the name of another argument of forward, as in --input x=2x3")
    return inputs.get("", inputs)


@dataclass(frozen=True, eq=False)
class Batches:
    """Batches in a fixed order, read when they are asked for.

    Attributes:
        take: int64 indices -> (inputs, labels or None) of these samples.
        order: int64 [samples].
        size: of a batch.
        labelled: whether there are labels, and batches are pairs (inputs, labels).
    """

    take: Callable[[Tensor], tuple[Any, Tensor | None]]
    order: Tensor
    size: int
    labelled: bool

    def __len__(self) -> int:
        return -(-len(self.order) // self.size)

    def __iter__(self) -> Iterator[Any]:
        for part in self.order.split(self.size):
            inputs, labels = self.take(part)
            yield (inputs, labels) if self.labelled else inputs


def batches(text: str, size: int, samples: int | None, seed: int, trust: bool, labels: bool) -> Any:
    """Data as an iterable of batches: inputs, or pairs (inputs, labels) where ``labels``.

    Raises:
        InputError: there is no such data, or it has no labels, or the numbers are not positive.
    """
    if size < 1 or (samples is not None and samples < 1):
        raise InputError("--batch-size and --samples must be positive")
    source = Source.read(text)
    if source.scheme == "python":
        if not trust:
            raise InputError(f"'{text}' would run code of yours: allow that by --trust-code")
        return attempt(lambda: factory(source)(**source.options), source)
    if source.scheme == "images":
        take, count, has = _images(source)
    elif not source.scheme:
        take, count, has = _arrays(Path(source.name))
    else:
        raise InputError(f"'{text}' is no data; give a .safetensors or .npz file, images:FOLDER or MODULE:FACTORY")
    if labels and not has:
        raise InputError(f"{text} has no labels, which this command compares with: store them as 'labels'")
    order = torch.arange(count)
    if samples is not None and samples < count:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:samples]
    return Batches(take, order, size, labels)


def _arrays(path: Path) -> tuple[Callable[[Tensor], tuple[Any, Tensor | None]], int, bool]:
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    if path.suffix == ".npz":
        import numpy

        try:
            with numpy.load(path, allow_pickle=False) as file:
                arrays = {name: torch.from_numpy(file[name]) for name in file.files}
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{path} cannot be read: {told(error)}") from None
    else:
        arrays = state_dict(path)
    labels = arrays.pop("labels", None)
    counts = {
        name: len(a) if a.ndim else 0
        for name, a in [*arrays.items(), *([("labels", labels)] if labels is not None else [])]
    }
    if not arrays or len(set(counts.values())) != 1 or 0 in counts.values():
        raise InputError(f"{path} must hold 'inputs', or arrays named as forward's arguments, of one length: {counts}")

    def take(part: Tensor) -> tuple[Any, Tensor | None]:
        chosen = {name: a[part] for name, a in arrays.items()}
        return chosen["inputs"] if [*chosen] == ["inputs"] else chosen, None if labels is None else labels[part].long()

    return take, next(iter(counts.values())), labels is not None


def _images(source: Source) -> tuple[Callable[[Tensor], tuple[Any, Tensor | None]], int, bool]:
    """A folder per class, resized, cropped, and normalised as torchvision's networks expect."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    options = {"size": 224, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), **source.options}
    if unknown := set(options) - {"size", "mean", "std"}:
        raise InputError(f"images: options are size, mean and std, not {', '.join(sorted(unknown))}")
    steps = [
        transforms.Resize(options["size"]),
        transforms.CenterCrop(options["size"]),
        transforms.ToTensor(),
        transforms.Normalize(options["mean"], options["std"]),
    ]
    try:
        folder = ImageFolder(source.name, transforms.Compose(steps))
    except OSError as error:
        raise InputError(f"images:{source.name}: {told(error)}") from None

    def take(part: Tensor) -> tuple[Any, Tensor | None]:
        pictures, labels = zip(*(folder[i] for i in part.tolist()), strict=True)
        return torch.stack(pictures), torch.tensor(labels)

    return take, len(folder), True
