"""What README and docs show runs: Python blocks in order, and the commands that a page shows."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fxmerge
from fxmerge.cli import main

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(page.read_text(encoding="utf-8")) if kind == language]


def network(width: int = 8, depth: int = 2, classes: int = 3) -> nn.Module:
    hidden = [layer for _ in range(depth - 1) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), *hidden, nn.Linear(width, classes)).eval()


@pytest.fixture
def names(tmp_path, monkeypatch):
    """The names that snippets take for granted, and an empty folder to write to."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    for name in "ab":
        save_file(network().state_dict(), tmp_path / f"{name}.safetensors")
    return {
        "model": network(), "model_a": network(), "model_b": network(), "model_c": network(),
        "slimmer_b": network(width=5), "deeper_b": network(depth=4), "student": network(),
        "teacher": network(width=12, depth=3),
        "Net": network, "x": x[:2], "batches": x.split(16), "labelled_batches": [(x, x[:, :3].argmax(1))],
    }  # fmt: skip


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
@pytest.mark.filterwarnings("ignore::fxmerge.FxMergeWarning")
def test_python_blocks_run_in_order(page, names):
    for text in blocks(page, "python"):
        exec(compile(text, page.name, "exec"), names)


def test_every_public_name_has_its_place_in_the_interface():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert [name for name in fxmerge.__all__ if not re.search(rf"\b{name}\b", page)] == []


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "console")], ids=lambda p: p.name)
def test_commands_do_what_the_page_says(page, tmp_path, monkeypatch, capsys):
    """Every ``$ fxmerge`` line succeeds, in order, in a folder with two checkpoints and data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    torch.manual_seed(0)
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n\n\ndef make():\n"
        "    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))\n"
    )
    for name in ("a", "b"):
        save_file(network().state_dict(), tmp_path / f"{name}.safetensors")
    x = torch.randn(64, 6)
    for name in ("train", "test"):
        save_file({"inputs": x, "labels": x[:, :3].argmax(1)}, tmp_path / f"{name}.safetensors")
    commands = [
        line.removeprefix("$ ")
        for text in blocks(page, "console")
        for line in text.replace("\\\n", " ").splitlines()
        if line.startswith("$ fxmerge ")
    ]
    assert commands
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0, (command, capsys.readouterr().err)
