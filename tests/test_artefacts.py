"""What a saved folder holds besides the network, and how it gets there: whole, or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fxmerge
from fxmerge import folder as folders
from fxmerge.errors import FormatError
from fxmerge.fingerprint import digest_of_tensors, fingerprint
from fxmerge.folder import MANIFEST, partial_folder
from fxmerge.matchers import CCAMerge, PLeaS
from fxmerge.recipe import read_options
from fxmerge.repair import Rescale

DATA = [torch.randn(16, 6, generator=torch.Generator().manual_seed(k)) for k in range(3)]
FILES = {"README.md", "graph.json", "manifest.json", "model.safetensors", "module.py", "recipe.json", "report.html"}


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3)).eval()


def merged(**options: Any) -> fxmerge.MergeResult:
    given = {"example_inputs": DATA[0][:2], "data": DATA, "progress": False, **options}
    return fxmerge.merge(network(0), network(1), **given)


def same(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(v, second[k]) for k, v in first.items())


# Recipes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"matcher": PLeaS(budget=1.5), "weights": [3, 1], "seed": 7},
        {"matcher": CCAMerge(gamma=0.5), "repair": Rescale(toward="first"), "verify": False},
        {"data": None, "heads": "concat", "device": "cpu"},
        {"matcher": "auto"},
    ],
    ids=str,
)
def test_the_recipe_makes_the_merge_again(options, tmp_path) -> None:
    result = merged(**options)
    recipe = json.loads((result.save(tmp_path / "out") / "recipe.json").read_text())
    assert recipe == json.loads(json.dumps(result.recipe))
    again = merged(**{"data": options.get("data", DATA), **read_options(recipe)})
    assert same(again.module, result.module)
    assert {k: v for k, v in again.recipe.items() if k != "result"} == {
        k: v for k, v in result.recipe.items() if k != "result"
    }


def test_the_recipe_says_what_was_merged_and_what_came_of_it() -> None:
    result = merged(weights=[3, 1])
    recipe = result.recipe
    assert [p["model"] for p in recipe["parents"]] == ["Sequential"] * 2
    assert [p["sha256"] for p in recipe["parents"]] == [digest_of_tensors(network(k).state_dict()) for k in (0, 1)]
    assert recipe["inputs"] == [{"name": "input", "dtype": "float32", "shape": [2, 6]}]
    assert recipe["data"] == fingerprint(DATA, ((DATA[0],), {}))
    assert recipe["versions"]["torch"] == torch.__version__
    assert recipe["versions"]["python"] == platform.python_version()
    assert recipe["result"]["shares"] == [0.75, 0.25]
    assert recipe["result"]["quality"].keys() == {c.name for c in result.report.classes if c.free}
    assert (recipe["result"]["free"], recipe["result"]["neurons"]) == (13, 22)
    assert recipe["result"]["repair"] == result.report.repair
    assert recipe["matcher"]["name"] == "ActivationMatching"  # what the default was
    assert recipe["repair"]["name"] == "Rescale"
    assert merged(data=None).recipe["data"] is None
    assert merged(input_fn=lambda x: x).recipe["input_fn"].endswith("<lambda>")


# Digests -----------------------------------------------------------------------------------------------------


def test_the_digest_of_a_network_is_as_documented() -> None:
    digest = hashlib.sha256()
    digest.update(b'["a", "float32", [2]]\n' + struct.pack("<2f", 1.5, -2.0))
    digest.update(b'["b", "int64", []]\n' + struct.pack("<q", -3))
    digest.update(b'["c", "bool", [0, 4]]\n')
    digest.update(b'["d", "float32", [2, 2]]\n' + struct.pack("<4f", 1, 3, 2, 4))
    digest.update(b'["e", "dict"]\n')
    tensors = {"e": {}, "b": torch.tensor(-3), "a": torch.tensor([1.5, -2.0]), "c": torch.zeros(0, 4).bool()}
    tensors["d"] = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).T
    assert digest_of_tensors(tensors) == digest.hexdigest()


def test_digests_tell_networks_and_batches_apart_and_nothing_else() -> None:
    net = network()
    digest = digest_of_tensors(net.state_dict())
    assert digest == digest_of_tensors(dict(reversed([*net.state_dict().items()])))
    assert digest != digest_of_tensors(net.double().state_dict())
    net = network()
    with torch.no_grad():
        net[2].bias[1] += 1e-7
    assert digest != digest_of_tensors(net.state_dict())
    print_ = fingerprint(DATA, ((DATA[0],), {}))
    assert print_["batches"] == 3
    assert fingerprint(iter(DATA), ((DATA[0],), {})) == {**print_, "batches": None}
    assert fingerprint(DATA, ((DATA[1],), {}))["first_batch"] != print_["first_batch"]
    assert fingerprint(DATA, ((), {"x": DATA[0]}))["first_batch"] != print_["first_batch"]


# Files -------------------------------------------------------------------------------------------------------


def test_the_alignment_comes_back(tmp_path) -> None:
    for name, options in (("permutations", {}), ("dense", {"matcher": CCAMerge()}), ("wide", {"matcher": PLeaS(1.5)})):
        result = merged(**options)
        folder = result.save(tmp_path / name, alignment=True)
        assert {p.name for p in folder.iterdir()} == FILES | {"alignment.safetensors", "model.safetensors.index.json"}
        for path in (folder, folder / "alignment.safetensors"):
            back = fxmerge.load_alignment(path)
            assert (back.method, back.quality, back.notes) == (
                result.alignment.method,
                result.alignment.quality,
                result.alignment.notes,
            )
            for a, b in zip(back.couplings, result.alignment.couplings, strict=True):
                assert torch.equal(a.merge, b.merge)
                assert torch.equal(a.unmerge, b.unmerge)
                assert (a.widths, a.merge.dtype) == (b.widths, b.merge.dtype)
        assert same(fxmerge.load(folder), result.module)
    stored = load_file(tmp_path / "permutations" / "alignment.safetensors")
    assert stored["0.merge.values"].shape == (16,)  # 8 neurons of two parents, not 8 x 16
    with pytest.raises(FormatError, match="alignment=True"):
        fxmerge.load_alignment(merged().save(tmp_path / "without"))
    for damage in (b"", b"\x00" * 40, (tmp_path / "dense" / "alignment.safetensors").read_bytes()[:-8]):
        (tmp_path / "damaged").write_bytes(damage)
        with pytest.raises(FormatError, match="holds no alignment"):
            fxmerge.load_alignment(tmp_path / "damaged")


def test_the_model_card(tmp_path) -> None:
    result = merged(matcher=PLeaS(budget=1.5), weights=[3, 1])
    text = (result.save(tmp_path / "out") / "README.md").read_text(encoding="utf-8")
    count = sum(p.numel() for p in result.module.parameters())
    assert text.startswith("---\nlibrary_name: fxmerge\ntags:\n- fxmerge\n")
    assert "# Sequential, merged from 2 networks\n" in text
    for part in (
        f"{count:,} parameters",
        "`PLeaS(budget=1.5)`",
        "| 1 | `Sequential` | 0.75 | `",
        "`input`: float32 [2, 6]",
    ):
        assert part in text
    assert result.recipe["parents"][1]["sha256"][:16] in text
    assert all(f"- {note}\n" in text for note in result.report.notes)
    [code] = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    space: dict[str, Any] = {"input": DATA[0]}
    exec(code.replace('"folder"', repr(str(tmp_path / "out"))), space)
    assert torch.equal(space["outputs"], result.module(DATA[0]))
    plain = fxmerge.save(result.module, tmp_path / "plain")
    assert f"A network of {count:,} parameters" in (plain / "README.md").read_text(encoding="utf-8")


def test_the_hub_reads_the_folder(tmp_path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    result = merged()
    for name, options in (("one", {}), ("couplings", {"alignment": True}), ("shards", {"shard_size": 200})):
        folder = result.save(tmp_path / name, **options)
        net = network(5)
        assert hub.load_torch_model(net, folder, strict=True) == ([], [])
        assert same(net, result.module)
        data = hub.ModelCard.load(folder / "README.md").data.to_dict()
        assert (data["library_name"], "model-merging" in data["tags"]) == ("fxmerge", True)
    assert len([*(tmp_path / "shards").glob("model-*.safetensors")]) > 2


@pytest.mark.parametrize("options", [{}, {"alignment": True, "shard_size": 200}], ids=["one", "shards"])
def test_every_flipped_bit_and_every_lost_byte_is_found(options, tmp_path) -> None:
    folder = merged().save(tmp_path / "out", **options)
    names = sorted(json.loads((folder / MANIFEST).read_text())["files"])
    assert set(names) == {p.name for p in folder.iterdir()} - {"README.md", "module.py", "report.html", MANIFEST}
    for name in names:
        content = (folder / name).read_bytes()
        for k in (0, len(content) // 2, len(content) - 1):
            (folder / name).write_bytes(content[:k] + bytes([content[k] ^ 16]) + content[k + 1 :])
            with pytest.raises(FormatError, match=rf"{name} is not as it was saved: its SHA-256"):
                fxmerge.load(folder)
        for damaged in (content[:-1], content + b" ", b""):
            (folder / name).write_bytes(damaged)
            with pytest.raises(FormatError, match=rf"{name} holds {len(damaged)} bytes instead of {len(content)}"):
                fxmerge.load(folder)
        (folder / name).unlink()
        with pytest.raises(FormatError, match=f"has no {name}"):
            fxmerge.load(folder)
        (folder / name).write_bytes(content)
    for name in ("README.md", "module.py"):  # for people, who may edit them
        (folder / name).write_text("edited")
    fxmerge.load(folder)


@pytest.mark.parametrize(
    "manifest",
    [{}, [], {"files": 3}, {"files": {"graph.json": 1}}, {"files": {}}, {"files": {"../out/graph.json": {}}}, None],
    ids=str,
)
def test_odd_manifests(manifest, tmp_path) -> None:
    folder = merged(data=None).save(tmp_path / "out")
    file = folder / MANIFEST
    content = json.loads(file.read_text())
    if isinstance(manifest, dict) and "../out/graph.json" in str(manifest):
        manifest = {"files": {**content["files"], "../out/graph.json": content["files"]["graph.json"]}}
    file.unlink() if manifest is None else file.write_text(json.dumps(manifest))
    with pytest.raises(FormatError, match=r"manifest\.json|has no graph\.json"):
        fxmerge.load(folder)


def test_leftovers_of_the_dead_are_removed_and_those_of_the_living_are_not(tmp_path) -> None:
    dead, other = tmp_path / ".out.0123abcd.partial", tmp_path / ".out2.0123abcd.partial"
    for left in (dead, other):
        left.mkdir()
        (left / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".out.mine").mkdir()
    with partial_folder(tmp_path / "out") as living:
        assert not dead.exists()
        (living / "file").write_text("whole")
        merged(data=None).save(tmp_path / "out")
        assert (living / "file").read_text() == "whole"
    assert {p.name for p in tmp_path.iterdir()} == {"out", ".out.mine", other.name}


def test_everything_reaches_the_disk_before_the_folder_appears(tmp_path, monkeypatch) -> None:
    synced: list[tuple[str, bool]] = []

    def record(handle: int) -> None:
        synced.append((os.path.basename(os.readlink(f"/proc/self/fd/{handle}")), (tmp_path / "out").exists()))

    if not Path("/proc/self/fd").exists():
        pytest.skip("asks /proc which file is meant")
    monkeypatch.setattr(folders.os, "fsync", record)
    folder = merged(data=None).save(tmp_path / "out")
    before = {name for name, there in synced if not there}
    assert {p.name for p in folder.iterdir()} < before
    assert any(name.endswith(".partial") for name in before)
    assert synced[-1] == (tmp_path.name, True)
