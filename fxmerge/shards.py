"""Tensors on disk, one at a time: a safetensors file, or several with an index as the Hugging Face hub has them.

write(tensors, folder)  ->  model.safetensors
                        or  model-00001-of-00003.safetensors, .., model.safetensors.index.json
Shards(path)            ->  a mapping that reads a tensor when it is asked for
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fxmerge.errors import FormatError, InputError
from fxmerge.heap import LARGE, give_back

TENSORS = "model.safetensors"
INDEX = f"{TENSORS}.index.json"
SHARD_SIZE = "5GB"

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def bytes_of(size: int | str) -> int:
    """A number of bytes, given as one or as "5GB" (powers of ten).

    Raises:
        InputError: it is neither, or not positive.
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?)\s*([KMGT]?B)?", str(size).strip().upper())
    if match is None or float(match[1]) <= 0:
        raise InputError(f"shard_size={size!r}: give a number of bytes, or a size such as '5GB' or '200MB'")
    return int(float(match[1]) * _UNITS["" if match[2] in (None, "B") else match[2]])


def write(
    tensors: Mapping[str, Tensor],
    folder: Path,
    shard_size: int | str = SHARD_SIZE,
    like: Mapping[str, Tensor] | None = None,
) -> list[Path]:
    """Write ``tensors`` to an existing folder, and return the files.

    Files hold at most ``shard_size`` bytes of tensors, or one tensor that is larger. Every tensor is asked for once and
    dropped when it is written, so one at a time is in memory where ``tensors`` makes them when they are asked for.

    Args:
        tensors: dense.
        folder: where the files go; nothing else is touched.
        shard_size: bytes, or a size such as "5GB".
        like: tensors of the same names, dtypes and shapes, on the meta device say, if those of ``tensors`` cost much.
    """
    limit, like = bytes_of(shard_size), like or tensors
    groups: list[list[str]] = []
    total = filled = 0
    for name in tensors:
        size = like[name].numel() * like[name].element_size()
        if not groups or filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled, total = filled + size, total + size
    groups = groups or [[]]
    whole, _, ending = TENSORS.partition(".")
    count = len(groups)
    names = [f"{whole}-{k:05}-of-{count:05}.{ending}" for k in range(1, count + 1)] if count > 1 else [TENSORS]
    for file, group in zip(names, groups, strict=True):
        _write_file(folder / file, {name: like[name] for name in group}, tensors)
    files = [folder / file for file in names]
    if count > 1:
        where = {name: file for file, group in zip(names, groups, strict=True) for name in group}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
        files.append(folder / INDEX)
    return files


def _write_file(file: Path, like: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """The library writes what is all in memory; so its format is written here: length of the header, header, data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    names = sorted(like, key=lambda name: -like[name].element_size())  # aligned, as the library has them
    end = 0
    for name in names:
        start, end = end, end + like[name].numel() * like[name].element_size()
        header[name] = {"dtype": _code(like[name].dtype), "shape": [*like[name].shape], "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            value = tensors[name].detach().cpu().contiguous()
            if (value.dtype, value.shape) != (like[name].dtype, like[name].shape):
                raise FormatError(f"{name!r} is {value.dtype} {[*value.shape]} and was said to be {header[name]}")
            out.write(value.reshape(-1).view(torch.uint8).numpy().data)


@cache
def _code(dtype: torch.dtype) -> str:
    """The format's name of a dtype, as the library writes it."""
    try:
        written = save({"x": torch.empty(0, dtype=dtype)})
    except (KeyError, SafetensorError) as error:
        raise FormatError(f"tensors of {dtype} have no place in a safetensors file ({error})") from None
    return str(json.loads(written[8 : 8 + int.from_bytes(written[:8], "little")])["x"]["dtype"])


class Shards(Mapping[str, Tensor]):
    """Tensors by name, read when they are asked for; the files are looked through at once.

    A tensor is mapped from its file, and leaves memory when it is dropped.

    Args:
        path: a safetensors file, or a folder with ``model.safetensors`` or ``model.safetensors.index.json``.

    Attributes:
        path: as given.
        like: every tensor's dtype and shape, as a tensor on the meta device.

    Raises:
        FormatError: a file is missing, damaged or outside the folder, or does not hold what the index says.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.like: dict[str, Tensor] = {}
        self._files: dict[str, Path] = {}
        expected: dict[Path, set[str] | None]
        if (self.path / TENSORS).is_file() or not self.path.is_dir():
            expected = {self.path / TENSORS if self.path.is_dir() else self.path: None}
        elif (self.path / INDEX).is_file():
            expected = _indexed(self.path)
        else:
            raise FormatError(f"{self.path} has no {TENSORS}, nor {INDEX}; give a file or folder of safetensors")
        for file, names in expected.items():
            found = _described(file)
            if names is not None and (odd := names ^ found.keys()):
                there, lacks = (INDEX, file.name) if min(odd) in names else (file.name, INDEX)
                raise FormatError(f"the tensor {min(odd)!r} is in {there} but not in {lacks} of {self.path}")
            self.like |= found
            self._files |= dict.fromkeys(found, file)

    def __getitem__(self, name: str) -> Tensor:
        like = self.like[name]
        if like.numel() * like.element_size() >= LARGE:
            give_back()
        with _opened(self._files[name]) as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    @property
    def nbytes(self) -> int:
        """What all tensors take."""
        return sum(t.numel() * t.element_size() for t in self.like.values())


def _indexed(folder: Path) -> dict[Path, set[str] | None]:
    """File -> the names of its tensors, as the folder's index says."""
    try:
        where = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        pairs = [(str(name), str(file)) for name, file in where.items()]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{folder / INDEX} is no index of tensors ({error!r}); save it again") from None
    found: dict[Path, set[str]] = {}
    for name, file in pairs:
        if "/" in file or "\\" in file or not file.endswith(".safetensors"):
            raise FormatError(f"{folder / INDEX} looks for {name!r} in {file!r}, which is no file of the folder")
        found.setdefault(folder / file, set()).add(name)
    return dict(found)


def _described(file: Path) -> dict[str, Tensor]:
    """Name -> a tensor of its dtype and shape on the meta device."""
    found = {}
    with _opened(file) as opened:
        for name in list(opened.keys()):
            part = opened.get_slice(name)
            shape = part.get_shape()
            dtype = (part[:0] if shape else opened.get_tensor(name)).dtype
            found[name] = torch.empty(shape, dtype=dtype, device="meta")
    return found


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """The open file; whatever is wrong with it is told by its name."""
    if not file.is_file():
        raise FormatError(f"{file} is missing; give a file or folder of safetensors, with all its shards")
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError, ValueError) as error:
        raise FormatError(f"{file} is not a safetensors file ({error}); save the tensors again") from None
