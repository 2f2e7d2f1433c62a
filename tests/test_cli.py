"""The command line, run as a user would: on files, through ``main``; and its help, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fxmerge
from fxmerge.cli import main

NETS = """
from torch import nn
def make(width=8):
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))
def broken():
    raise RuntimeError("no such luck")
def batches():
    import torch
    return [torch.zeros(4, 6)]
class stopping:
    # interrupted behind the second batch, unless the file "quiet" is there
    def __iter__(self):
        import pathlib, torch
        draw = torch.Generator().manual_seed(0)
        for number in range(4):
            if number == 2 and not pathlib.Path("quiet").exists():
                raise KeyboardInterrupt
            yield torch.randn(8, 6, generator=draw)
"""


def make(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with two checkpoints, labelled data and the code of their network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "nets.py").write_text(NETS)
    torch.manual_seed(0)
    for name in "ab":
        save_file(make().state_dict(), tmp_path / f"{name}.safetensors")
    x = torch.randn(40, 6)
    save_file({"inputs": x, "labels": x[:, :3].argmax(1)}, tmp_path / "data.safetensors")
    return tmp_path


NET = ["--arch", "nets.py:make", "--trust-code"]
PAIR = ["a.safetensors", "b.safetensors", *NET]


def run(capsys, *argv: str) -> tuple[int, str, str]:
    code = main(argv)
    out, err = capsys.readouterr()
    return code, out, err


def test_help_needs_no_torch():
    """Help comes before torch is loaded, which is what takes long."""
    program = (
        "import sys\nfrom fxmerge.cli import main\nsys.argv = ['fxmerge', 'merge', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert "examples:" in done.stdout
    assert done.stdout.endswith("False False\n")


def test_inspect_shows_classes_and_why_pinned(here, capsys):
    code, out, _ = run(capsys, "inspect", "nets.py:make?width=5", "--trust-code")
    assert code == 0
    assert "10 of 19 neurons are free" in out
    assert "pinned: the network's output" in out
    code, out, _ = run(capsys, "inspect", "nets.py:make?width=5", "--trust-code", "--json", "--input", "4x6")
    (facts,) = json.loads(out)["networks"]
    assert (facts["free"], facts["total"], facts["front_end"]) == (10, 19, "symbolic")
    assert sum(c["neurons"] for c in facts["classes"] if c["pinned"] is None) == 10


def test_four_commands_from_two_checkpoints(here, capsys):
    code, out, _ = run(capsys, "plan", *PAIR, "--data", "data.safetensors")
    assert code == 0
    assert "nothing was written" in out
    assert {p.name for p in here.iterdir()} == {"nets.py", "a.safetensors", "b.safetensors", "data.safetensors"}

    code, out, _ = run(capsys, "merge", *PAIR, "--data", "data.safetensors", "-o", "merged", "--json", "--quiet")
    facts = json.loads(out)
    assert code == 0
    assert facts["output"] == "merged"
    assert facts["free"] == 16

    code, out, _ = run(capsys, "eval", "merged", *PAIR, "--data", "data.safetensors", "--ensemble", "--json")
    found = {row["network"]: row["accuracy"] for row in json.loads(out)["networks"]}
    data = fxmerge.loaders.batches("data.safetensors", 64, None, 0, False, True)
    (x, labels), *_ = data
    right = (fxmerge.load("merged")(x).argmax(1) == labels).double().mean()
    assert found["merged"] == pytest.approx(float(right))
    assert len(found) == 4

    code, out, _ = run(capsys, "export", "merged", "--state-dict", "plain.safetensors")
    assert code == 0
    make().load_state_dict(fxmerge.sources.state_dict("plain.safetensors"))


def test_the_recipe_beside_a_result_makes_it_again(here, capsys):
    options = ["--data", "data.safetensors", "--matcher", "OTFusion(reg=0.05)", "--samples", "20", "--seed", "3"]
    assert run(capsys, "merge", *PAIR, *options, "-o", "out/first", "-q")[0] == 0
    recipe = ["--recipe", "out/first/recipe.yaml", "-q"]
    code, _, err = run(capsys, "merge", *recipe, "-o", "second")
    assert code == 1
    assert "--trust-code" in err, "a recipe cannot allow code to be run"
    assert run(capsys, "merge", *recipe, "--trust-code", "-o", "second")[0] == 0
    first, second = (fxmerge.load(here / name).state_dict() for name in ("out/first", "second"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert run(capsys, "merge", *recipe, "--trust-code", "--matcher", "Average", "-o", "third")[0] == 0
    third = fxmerge.load(here / "third").state_dict()
    assert not all(torch.equal(first[key], third[key]) for key in first), "what is given wins over the recipe"


def test_an_interrupted_merge_goes_on_where_it_was(here, capsys):
    merge = ["merge", *PAIR, "--data", "nets.py:stopping", "--repair", "none", "-q"]
    kept = here / "out.statistics.safetensors"
    code, _, err = run(capsys, *merge, "-o", "out")
    assert code == 130
    assert "--resume" in err
    assert (fxmerge.Statistics.load(kept).batches, (here / "out").exists()) == (2, False)
    (here / "quiet").touch()
    assert run(capsys, *merge, "-o", "out")[0] == 1, "what was gathered is not thrown away unasked"
    assert run(capsys, *merge, "-o", "out", "--resume")[0] == 0
    assert not kept.exists()
    assert run(capsys, *merge, "-o", "whole")[0] == 0
    resumed, whole = (fxmerge.load(here / name).state_dict() for name in ("out", "whole"))
    assert all(torch.allclose(resumed[key], whole[key], rtol=1e-6) for key in whole)
    assert run(capsys, *merge, "-o", "again", "--resume")[0] == 1, "there is nothing to go on with"


def test_weights_may_stay_on_disk(here, capsys):
    assert run(capsys, "merge", *PAIR, "-o", "read", "-q")[0] == 0
    assert run(capsys, "merge", *PAIR, "-o", "streamed", "-q", "--on-disk")[0] == 0
    read, streamed = (fxmerge.load(here / name).state_dict() for name in ("read", "streamed"))
    assert all(torch.equal(read[key], streamed[key]) for key in read)


def test_barrier_of_two_networks(here, capsys):
    code, out, _ = run(capsys, "eval", *PAIR, "--data", "data.safetensors", "--barrier", "--json", "-q")
    barriers = json.loads(out)["barriers"]
    assert code == 0
    assert set(barriers) == {"as they are", "aligned"}
    assert barriers["aligned"]["loss"][0] == pytest.approx(barriers["as they are"]["loss"][0])


def test_verify_says_what_holds(here, capsys):
    code, out, _ = run(capsys, "verify", *PAIR, "--seeds", "2", "--json")
    checks = json.loads(out)["checks"]
    assert code == 0
    assert [c["seed"] for c in checks] == [0, 1, 0, 1]
    assert all(c["ok"] and c["error"] < 1e-9 for c in checks)


WRONG = {
    "no network": (["inspect"], "at least one network"),
    "one network": (["merge", "a.safetensors", *NET, "-o", "out"], "two or more networks"),
    "no output": (["merge", *PAIR], "--output"),
    "output taken": (["merge", *PAIR, "-o", "."], "exists already"),
    "no architecture": (["inspect", "a.safetensors"], "--arch"),
    "no trust": (["inspect", "nets.py:make"], "--trust-code"),
    "no such file": (["inspect", "missing.safetensors", *NET], "missing.safetensors"),
    "no such factory": (["inspect", "nets.py:mke", "--trust-code"], "no function 'mke'"),
    "no such module": (["inspect", "nowhere:make", "--trust-code"], "cannot be imported"),
    "a factory that fails": (["inspect", "nets.py:broken", "--trust-code"], "no such luck"),
    "a misspelt network": (["inspect", "torchvision:resnet81"], "resnet18"),
    "other widths": (["inspect", "a.safetensors", "--arch", "nets.py:make?width=9", "--trust-code"], "[9]"),
    "other layers": (["inspect", "data.safetensors", *NET], "another network"),
    "no such method": (["merge", *PAIR, "-o", "out", "--matcher", "OTFusin()"], "OTFusin"),
    "no such option": (["merge", *PAIR, "-o", "out", "--matcher", "OTFusion(regg=1)"], "regg"),
    "needs data": (["merge", *PAIR, "-o", "out", "--matcher", "CCAMerge"], "needs data|looks at activations"),
    "no such data": (["eval", *PAIR, "--data", "nothing.npz"], "nothing.npz"),
    "no labels": (["eval", *PAIR, "--data", "a.safetensors"], "of one length|labels"),
    "input": (["inspect", "nets.py:make", "--trust-code", "--input", "axb"], "write a shape"),
    "input that does not fit": (["inspect", "nets.py:make", "--trust-code", "--input", "2x7"], "7"),
    "nothing to write": (["export", "a.safetensors", *NET], "--onnx"),
    "no recipe": (["merge", "--recipe", "r.yaml", "-o", "out"], "r.yaml"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use_is_one_line_and_writes_nothing(name, here, capsys):
    argv, words = WRONG[name]
    before = {p.name for p in here.iterdir()}
    code, out, err = run(capsys, *argv)
    assert code == 1
    assert out == ""
    assert err.startswith("fxmerge: error: ")
    assert err.count("\n") == 1
    assert any(word in err for word in words.split("|")), err
    assert {p.name for p in here.iterdir()} - {"__pycache__"} == before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("matchr: Average", "unknown option 'matchr'"),
        ("- a", "holds no options"),
        ("samples: [", "cannot be read"),
        ("batch_size: many", "batch_size"),
        ("!!python/object/apply:os.system ['true']", "cannot be read"),
    ],
)
def test_a_recipe_is_checked_before_anything_runs(text, words, here, capsys):
    (here / "r.yaml").write_text(text)
    code, _, err = run(capsys, "merge", *PAIR, "--recipe", "r.yaml", "-o", "out")
    assert (code, (here / "out").exists()) == (1, False)
    assert words in err


def test_checkpoints_of_other_kinds(here, capsys):
    state = fxmerge.sources.state_dict("a.safetensors")
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, here / "a.pt")
    assert set(fxmerge.sources.state_dict("a.pt")) == set(state)
    code, _, err = run(capsys, "inspect", "a.pt", *NET)
    assert (code, err) == (0, "")
    torch.save(make(), here / "whole.pt")  # a pickled module would run code
    code, _, err = run(capsys, "inspect", "whole.pt", *NET)
    assert code == 1
    assert "weights_only" in err


def test_data_in_several_forms(here):
    import numpy

    batches = fxmerge.loaders.batches
    numpy.savez(here / "named.npz", ids=numpy.arange(10).reshape(5, 2), mask=numpy.ones((5, 2)))
    first, second = batches("named.npz", 3, None, 0, False, False)
    assert {k: v.shape for k, v in first.items()} == {"ids": (3, 2), "mask": (3, 2)}
    assert second["ids"].tolist() == [[6, 7], [8, 9]]
    some = torch.cat([*batches("data.safetensors", 8, 12, 1, False, False)])
    assert some.shape == (12, 6)
    assert [b.shape for b in batches("nets.py:batches", 1, None, 0, True, False)] == [(4, 6)]


def test_images_in_folders(here):
    image = pytest.importorskip("PIL.Image")
    for label, colour in (("black", 0), ("white", 255)):
        (here / "images" / label).mkdir(parents=True)
        image.new("RGB", (20, 10), (colour,) * 3).save(here / "images" / label / "one.png")
    ((x, labels),) = fxmerge.loaders.batches("images:images?size=8", 4, None, 0, False, True)
    assert x.shape == (2, 3, 8, 8)
    assert labels.tolist() == [0, 1]
    assert bool((x[1] > x[0]).all())
