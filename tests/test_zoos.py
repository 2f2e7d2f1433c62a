"""Networks of examples/zoos: layers that no other test has, and what a sweep over networks keeps of failures."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "examples"

# name -> neurons that must be free
FREE = {
    "Bilinear": 24, "EmbeddingBag, mean": 8, "DeformConv2d": 14, "FrozenBatchNorm2d": 8, "FractionalMaxPool2d": 8,
    "MaxUnpool2d": 8, "Unfold, Fold": 8, "CosineSimilarity": 8, "PairwiseDistance": 8, "cdist": 8, "RNNCell": 18,
    "LSTMCell": 18, "GRUCell": 18, "spectral_norm": 24, "TransformerDecoder": 96,
}  # fmt: skip


@pytest.fixture
def zoos(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("zoos.check")


@pytest.mark.parametrize("name", FREE)
def test_layers_are_inferred_verified_and_recovered(name: str, zoos: Any) -> None:
    rows: list[dict[str, Any]] = []
    zoos.check("nn", name, True, lambda row: rows.append(dict(row)))
    assert (rows[-1]["stage"], rows[-1]["error"]) == ("done", "")
    assert rows[-1]["unknown"] == []
    assert rows[-1]["free"] == FREE[name]
