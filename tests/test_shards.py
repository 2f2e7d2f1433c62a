"""Tensors on disk: one file or several with an index, read one at a time, and damage told."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fxmerge
from fxmerge.errors import FormatError, InputError
from fxmerge.shards import INDEX, TENSORS, Shards, bytes_of, write

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    made = {f"layer.{k}": (4 * torch.randn(10, 3 + k)).to(dtype) for k, dtype in enumerate(DTYPES)}
    return {**made, "scalar": torch.tensor(3.5), "none": torch.zeros(0, 4)}


def read(path: Path) -> dict[str, torch.Tensor]:
    return dict(Shards(path).items())


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def test_one_file(tensors, tmp_path) -> None:
    assert write(tensors, tmp_path) == [tmp_path / TENSORS]
    assert same(read(tmp_path), tensors)
    assert same(read(tmp_path / TENSORS), tensors)
    assert same(load_file(tmp_path / TENSORS), tensors)


@pytest.mark.parametrize(("size", "count"), [(500, 4), ("0.5KB", 4), (1, 8), (10**6, 1)])
def test_files_hold_no_more_than_the_size_and_are_as_few_as_that_allows(size, count, tensors, tmp_path) -> None:
    files = [f for f in write(tensors, tmp_path, size) if f.name != INDEX]
    assert len(files) == count == len(list(tmp_path.glob("*.safetensors")))
    for file in files:
        held = load_file(file)
        assert sum(t.nbytes for t in held.values()) <= bytes_of(size) or sum(t.nbytes > 0 for t in held.values()) == 1
    assert same(read(tmp_path), tensors)


def test_the_index_is_that_of_the_hub(tensors, tmp_path) -> None:
    write(tensors, tmp_path, 500)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_size": sum(t.nbytes for t in tensors.values())}
    assert index["weight_map"].keys() == tensors.keys()
    names = sorted(set(index["weight_map"].values()))
    assert names == [f"model-0000{k}-of-00004.safetensors" for k in (1, 2, 3, 4)]
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])


def test_shapes_and_dtypes_are_known_without_reading(tensors, tmp_path) -> None:
    write(tensors, tmp_path, 500)
    shards = Shards(tmp_path)
    assert len(shards) == len(tensors)
    assert shards.nbytes == sum(t.nbytes for t in tensors.values())
    for name, like in shards.like.items():
        assert like.is_meta
        assert (like.dtype, like.shape) == (tensors[name].dtype, tensors[name].shape)


def test_tensors_are_asked_for_once_and_file_by_file(tensors, tmp_path) -> None:
    """What a mapping makes on demand is not kept beyond its file."""
    asked: list[str] = []

    class Made(dict[str, torch.Tensor]):
        def __getitem__(self, name: str) -> torch.Tensor:
            asked.append(name)
            return tensors[name]

    like = {name: t.to("meta") for name, t in tensors.items()}
    files = write(Made.fromkeys(tensors), tmp_path, 500, like)
    groups = [list(load_file(f)) for f in files if f.name != INDEX]
    starts = accumulate(map(len, groups), initial=0)
    assert [set(asked[k : k + len(g)]) for k, g in zip(starts, groups, strict=False)] == [set(g) for g in groups]
    assert len(asked) == len(tensors)
    assert same(read(tmp_path), tensors)


def test_what_is_not_as_it_was_said_to_be(tensors, tmp_path) -> None:
    with pytest.raises(FormatError, match=r"'scalar' is torch\.float32 \[\] and was said to be .*\[2\]"):
        write({"scalar": tensors["scalar"]}, tmp_path, like={"scalar": torch.empty(2)})


def test_a_dtype_that_the_format_lacks(tmp_path) -> None:
    with pytest.raises(FormatError, match="complex128 have no place"):
        write({"x": torch.zeros(2, dtype=torch.complex128)}, tmp_path)


def test_the_bytes_are_those_that_the_library_writes(tensors, tmp_path) -> None:
    write(tensors, tmp_path)
    save_file(tensors, tmp_path / "library.safetensors", metadata={"format": "pt"})
    sizes = [(tmp_path / f).stat().st_size for f in (TENSORS, "library.safetensors")]
    assert sizes[0] == sizes[1]
    with safe_open(tmp_path / TENSORS, "pt") as ours, safe_open(tmp_path / "library.safetensors", "pt") as theirs:
        assert ours.metadata() == theirs.metadata()


def test_nothing_to_write(tmp_path) -> None:
    write({}, tmp_path)
    assert read(tmp_path) == {}


@pytest.mark.parametrize(
    ("size", "bytes_"), [(7, 7), ("7", 7), ("7B", 7), ("5GB", 5 * 10**9), (" 1.5 mb", 1_500_000), ("2KB", 2000)]
)
def test_sizes(size, bytes_) -> None:
    assert bytes_of(size) == bytes_


@pytest.mark.parametrize("size", [0, -1, "5 apples", "", "GB", None, "0GB"])
def test_sizes_that_are_none(size, tmp_path) -> None:
    with pytest.raises(InputError, match=r"shard_size=.*such as '5GB'"):
        bytes_of(size)


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def shard(folder: Path, number: int) -> Path:
    return sorted(folder.glob("*.safetensors"))[number]


def without(file: Path, name: str) -> None:
    save_file({n: t.clone() for n, t in load_file(file).items() if n != name}, file)


DAMAGES: list[tuple[Callable[[Path], Any], str]] = [
    (lambda f: (f / INDEX).unlink(), f"has no {TENSORS}, nor {INDEX}"),
    (lambda f: shard(f, 1).unlink(), r"model-00002-of-00004\.safetensors is missing"),
    (lambda f: os.truncate(shard(f, 1), shard(f, 1).stat().st_size - 1), "model-00002.* is not a safetensors file"),
    (lambda f: os.truncate(shard(f, 2), 5), "model-00003.* is not a safetensors file"),
    (lambda f: shard(f, 0).write_bytes(b"PK\x03\x04" * 99), "model-00001.* is not a safetensors file"),
    (lambda f: shard(f, 0).replace(shard(f, 1)), "model-00001.* is missing"),
    (lambda f: shard(f, 1).write_bytes(shard(f, 0).read_bytes()), r"'layer\.0' is in model-00002"),
    (lambda f: without(shard(f, 0), "layer.0"), rf"'layer\.0' is in {INDEX} but not in model-00001"),
    (lambda f: edit(f, lambda d: d["weight_map"].pop("layer.0")), rf"'layer\.0' is in model-00001.* not in {INDEX}"),
    (lambda f: (f / INDEX).write_text('{"weight'), "is no index"),
    (lambda f: (f / INDEX).write_text("[" * 100_000), "is no index"),
    (lambda f: (f / INDEX).write_text("[]"), "is no index"),
    (lambda f: edit(f, lambda d: d.pop("weight_map")), "is no index"),
    (lambda f: edit(f, lambda d: d.update(weight_map=[1])), "is no index"),
    *(
        (lambda f, to=to: edit(f, lambda d: d["weight_map"].update({"layer.0": to})), "is no file of the folder")
        for to in ("../other.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "a\\b.safetensors")
    ),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_damaged_folders(damage, message, tensors, tmp_path) -> None:
    write(tensors, tmp_path, 500)
    damage(tmp_path)
    with pytest.raises(FormatError, match=message) as caught:
        Shards(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_path_without_anything(tmp_path) -> None:
    with pytest.raises(FormatError, match="gone is missing"):
        Shards(tmp_path / "gone")


def test_a_file_damaged_after_it_was_looked_through(tensors, tmp_path) -> None:
    write(tensors, tmp_path)
    shards = Shards(tmp_path)
    os.truncate(tmp_path / TENSORS, 20)
    with pytest.raises(FormatError, match="is not a safetensors file"):
        shards["layer.0"]


def graph() -> torch.fx.GraphModule:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    return torch.fx.symbolic_trace(net.eval())


def test_a_module_in_several_files(tmp_path) -> None:
    module, x = graph(), torch.randn(3, 4)
    folder = fxmerge.save(module, tmp_path / "out", shard_size=100)
    assert not (folder / TENSORS).exists()
    assert len(list(folder.glob("model-*.safetensors"))) == 4
    back = fxmerge.load(folder)
    assert list(back.state_dict()) == list(module.state_dict())
    assert torch.equal(back(x), module(x))


def test_a_module_whose_shard_is_gone_or_cut_is_refused(tmp_path) -> None:
    folder = fxmerge.save(graph(), tmp_path / "out", shard_size=100)
    os.truncate(shard(folder, 2), 100)
    with pytest.raises(FormatError, match=r"model-00003.* holds 100 bytes instead of"):
        fxmerge.load(folder)
    shard(folder, 2).unlink()
    with pytest.raises(FormatError, match=r"model-00003"):
        fxmerge.load(folder)


def test_a_size_that_is_none_leaves_nothing(tmp_path) -> None:
    with pytest.raises(InputError, match="shard_size='big'"):
        fxmerge.save(graph(), tmp_path / "out", shard_size="big")
    assert list(tmp_path.iterdir()) == []
