"""The examples run to their end: a table with every row, and a figure."""

import re
import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
FOLDER = Path(__file__).parents[1] / "examples"

ROWS = {
    "one_shot": ("parents", "average", "OTFusion", "PLeaS, 1.5x", "ensemble"),
    "non_iid": ("0.0", "0.5", "1.0"),
    "widths": ("1", "2"),
    "many": ("parents", "average", "OTFusion, barycentre", "ensemble"),
    "compress": ("80%", "50%"),
    "budget": ("1.0", "2.0", "parents", "ensemble"),
    "depth": ("deeper", "ensemble", "grown", "shrunk, least squares"),
    "teacher_student": ("teacher", "student", "fused", "fused, distilled"),
    "attention": ("as they are", "weights", "activations, norms folded, least squares"),
    "heads": ("parents side by side", "average", "OTFusion", "PLeaS, 1.5x"),
}


def printed(name: str, options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "common", raising=False)
    monkeypatch.setattr(sys, "argv", [name, *options])
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.parametrize("name", ROWS)
def test_experiments_print_a_table_and_draw_a_figure(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    out = printed(name, ["--quick", "--out", str(tmp_path / "figures")], monkeypatch, capsys)
    for row in ROWS[name]:
        found = re.search(rf"^{re.escape(row)} {{2,}}(.+)$", out, re.MULTILINE)
        assert found, f"no row {row!r} in\n{out}"
        numbers = [float(n) for n in re.findall(r"\d+(?:\.\d+)?", found[1])]
        assert numbers
        assert all(0 <= n <= 100 for n in numbers)
    figure = tmp_path / "figures" / f"{name}.png"
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert f"wrote {figure}" in out


def test_digits_are_merged_and_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = printed("merge_digits", ["--epochs", "2", "--save", str(tmp_path / "merged")], monkeypatch, capsys)
    assert "merged by activations, repaired" in out
    assert "its outputs are the same" in out


def test_pruning_every_neuron_it_may_keeps_the_strongest(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "common", raising=False)
    prune = runpy.run_path(str(FOLDER / "compress.py"))["prune"]
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3)).eval()
    x = torch.randn(5, 4)
    strong = model[0].weight.abs().sum(1).argsort(descending=True)[:3].sort().values
    hidden = torch.relu(x @ model[0].weight[strong].T + model[0].bias[strong])
    torch.testing.assert_close(prune(model, x, 0.5)(x), hidden @ model[2].weight[:, strong].T + model[2].bias)
    torch.testing.assert_close(prune(model, x, 1.0)(x), model(x))
