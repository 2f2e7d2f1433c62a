"""Networks that stay on disk: they run, merge as those in memory do, and take the room of a few tensors."""

from __future__ import annotations

import copy
import subprocess
import sys
import weakref
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fxmerge
from fxmerge.errors import FormatError, FxMergeError, InputError
from fxmerge.matchers import ActivationMatching, Average, OTFusion, WeightMatching
from fxmerge.running import Substituted, full_state, preserved
from fxmerge.shards import Shards, write
from fxmerge.stored import Stored, on_disk, stays_on_disk


class Net(nn.Module):
    """A tied embedding, attention, a table that no checkpoint holds, running statistics, a recurrent layer."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 24), nn.Linear(24, width)
        self.memory = nn.GRU(width, 10, batch_first=True)
        self.back = nn.Linear(10, width)
        self.batch_norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 20, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.linspace(1, 2, 5)[:, None], persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) * self.scale
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.down(torch.relu(self.up(x)))
        x = x + self.back(self.memory(x)[0])
        return self.head(self.batch_norm(x.transpose(1, 2)).transpose(1, 2))


TOKENS = torch.arange(10).reshape(2, 5)


def made(seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    net = Net()
    with torch.no_grad():
        for t in net.state_dict().values():
            if t.is_floating_point():
                t.uniform_(0.1, 1).mul_(torch.randn_like(t).sign() if t.dim() > 1 else 1)
    return net.to(dtype).eval()


def hollow(net: nn.Module) -> nn.Module:
    """Its parameters on the meta device, its buffers where they are."""
    twin = copy.deepcopy(net)
    moved = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in twin.parameters()}
    return copy.deepcopy(twin, moved)


def stored(net: nn.Module, path: Path, shard_size: int | None = None) -> nn.Module:
    tensors = {n: t.clone() for n, t in net.state_dict().items() if n != "head.weight"}
    if shard_size is None:
        path = path.with_suffix(".safetensors")
        save_file(tensors, path)
    else:
        path.mkdir()
        write(tensors, path, shard_size)
    return on_disk(hollow(net), path)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    """To rounding: attention has a fused kernel for parameters in memory."""
    scale = float(b.abs().max())
    torch.testing.assert_close(a, b, rtol=0, atol=16 * scale * torch.finfo(b.dtype).eps)


@pytest.fixture
def pair(tmp_path) -> tuple[nn.Module, nn.Module]:
    return stored(made(0), tmp_path / "a"), stored(made(1), tmp_path / "b", 900)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_network_on_disk_computes_what_it_computes_in_memory(dtype, tmp_path) -> None:
    net = made(0, dtype)
    lazy = stored(net, tmp_path / "a", 900)
    with torch.no_grad():
        close(lazy(TOKENS), net(TOKENS))
    assert stays_on_disk(lazy)
    assert not stays_on_disk(net)
    assert lazy.head.weight is lazy.embed.weight
    assert sum(p.untyped_storage().nbytes() for p in lazy.parameters()) == dtype.itemsize * len([*lazy.parameters()])
    for (name, a), (other, b) in zip(net.state_dict().items(), lazy.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b)


def test_the_model_is_left_as_it_was(tmp_path) -> None:
    net = hollow(made(0))
    before = dict(full_state(net))
    save_file({n: t.clone() for n, t in made(1).state_dict().items() if n != "head.weight"}, tmp_path / "a.safetensors")
    on_disk(net, tmp_path / "a.safetensors")
    assert all(t is before[n] for n, t in full_state(net).items())
    assert torch.equal(net.batch_norm.running_mean, made(0).batch_norm.running_mean)


MATCHERS = [Average(), WeightMatching(), OTFusion(cost="weights")]


@pytest.mark.parametrize("matcher", MATCHERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merged_as_in_memory(matcher, dtype, tmp_path) -> None:
    parents = [made(k, dtype) for k in (0, 1)]
    options = {"example_inputs": TOKENS, "matcher": matcher, "verify": dtype == torch.float32, "progress": False}
    expected = fxmerge.merge(*parents, **options)
    lazy = [stored(parents[0], tmp_path / "a"), stored(parents[1], tmp_path / "b", 900)]
    result = fxmerge.merge(*lazy, **options)
    assert stays_on_disk(result.module)
    back = fxmerge.load(result.save(tmp_path / "out", shard_size=700))
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 5
    assert list(back.state_dict()) == list(expected.module.state_dict())
    for name, value in expected.module.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
    assert back.head.weight is back.embed.weight
    assert torch.equal(back.scale, expected.module.scale)
    with torch.no_grad():
        assert torch.equal(back(TOKENS), expected.module(TOKENS))
        close(result.module(TOKENS), expected.module(TOKENS))
    assert all(v.ok for v in result.report.verifications)
    assert [v.moved for v in result.report.verifications] == [v.moved for v in expected.report.verifications]


def test_three_parents_and_one_of_them_in_memory(tmp_path) -> None:
    parents = [made(k) for k in (0, 1, 2)]
    options = {"example_inputs": TOKENS, "weights": [0.5, 0.2, 0.3], "progress": False}
    expected = fxmerge.merge(*parents, **options)
    lazy = [parents[0], stored(parents[1], tmp_path / "b"), stored(parents[2], tmp_path / "c", 500)]
    back = fxmerge.load(fxmerge.merge(*lazy, **options).save(tmp_path / "out"))
    for name, value in expected.module.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], value, rtol=1e-6, atol=1e-7)


def test_outputs_side_by_side(tmp_path) -> None:
    """A wider result than either parent."""
    torch.manual_seed(0)
    parents = [nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4)).eval() for _ in range(2)]
    options = {"example_inputs": torch.randn(2, 3), "heads": "concat", "progress": False}
    expected = fxmerge.merge(*parents, **options).module
    for k, p in enumerate(parents):
        save_file(p.state_dict(), tmp_path / f"{k}.safetensors")
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4)).eval()
    result = fxmerge.merge(*(on_disk(net, tmp_path / f"{k}.safetensors") for k in range(2)), **options)
    back = fxmerge.load(result.save(tmp_path / "out"))
    assert back.get_submodule("2").out_features == 8
    assert all(torch.equal(back.state_dict()[n], v) for n, v in expected.state_dict().items())


def test_a_twin_gives_the_network_back_and_a_wrong_symmetry_is_found(tmp_path) -> None:
    net = made(0)
    lazy = stored(net, tmp_path / "a")
    classes = fxmerge.infer_classes(lazy, TOKENS)
    assert str(classes) == str(fxmerge.infer_classes(net, TOKENS))
    twin = stored(fxmerge.permute(net, fxmerge.infer_classes(net, TOKENS), seed=3), tmp_path / "b")
    result = fxmerge.merge(lazy, twin, example_inputs=TOKENS, progress=False)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(result.module.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    assert fxmerge.verify(lazy, classes).ok
    other = on_disk(hollow(net), tmp_path / "a.safetensors")
    k = next(k for k, c in enumerate(classes) if c.name.startswith("up.weight:0"))
    sites = {s: (i.flip(0) if s.parameter == "up.bias" else i) for s, i in classes[k].sites.items()}
    broken = copy.copy(classes)
    object.__setattr__(broken, "classes", (*classes.classes[:k], _with(classes[k], sites), *classes.classes[k + 1 :]))
    assert not fxmerge.verify(other, broken).ok


def _with(c, sites):
    changed = copy.copy(c)
    object.__setattr__(changed, "sites", sites)
    return changed


def test_values_that_are_not_finite_are_told(tmp_path) -> None:
    bad = made(0)
    with torch.no_grad():
        bad.up.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"'up\.weight' of Net holds 1 NaN"):
        fxmerge.merge(stored(bad, tmp_path / "a"), stored(made(1), tmp_path / "b"), example_inputs=TOKENS)


def retensor(path: Path, **changes: torch.Tensor | None) -> None:
    tensors = {n: t.clone() for n, t in load_file(path).items()} | changes
    save_file({n: t for n, t in tensors.items() if t is not None}, path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"up.bias": None}, r"it has no 'up\.bias'\. Give the checkpoint of this network"),
        ({"odd": torch.ones(1)}, "the network has no 'odd'"),
        ({"up.bias": torch.ones(3)}, r"'up\.bias' is \[3\] there and \[24\] in the model"),
        ({"up.bias": torch.ones(24).half()}, r"torch\.float16 there and torch\.float32.*model\.to\(torch\.float16\)"),
        (
            {"head.weight": torch.ones(20, 16)},
            r"'embed\.weight', 'head\.weight' are one tensor in the model and differ",
        ),
    ],
)
def test_checkpoints_that_do_not_fit(changes, message, tmp_path) -> None:
    stored(made(0), tmp_path / "a")
    retensor(tmp_path / "a.safetensors", **changes)
    with pytest.raises(InputError, match=message):
        on_disk(hollow(made(0)), tmp_path / "a.safetensors")


def test_tied_tensors_that_are_both_in_the_file(tmp_path) -> None:
    net = made(0)
    save_file({n: t.clone() for n, t in net.state_dict().items()}, tmp_path / "a.safetensors")
    lazy = on_disk(hollow(net), tmp_path / "a.safetensors")
    assert lazy.head.weight is lazy.embed.weight


def test_buffers_without_values_are_told_and_those_in_the_file_are_read(tmp_path) -> None:
    net = made(0)
    stored(net, tmp_path / "a")
    with torch.device("meta"):
        model = Net().eval()
    with pytest.raises(InputError, match=r"'scale' are in no checkpoint.*give these buffers their values"):
        on_disk(model, tmp_path / "a.safetensors")
    retensor(tmp_path / "a.safetensors", scale=net.scale)
    with torch.no_grad():
        close(on_disk(model, tmp_path / "a.safetensors")(TOKENS), net(TOKENS))


def test_a_missing_shard_is_told(tmp_path) -> None:
    stored(made(0), tmp_path / "a", 500)
    sorted((tmp_path / "a").glob("*.safetensors"))[2].unlink()
    with pytest.raises(FormatError, match=r"model-00003.* is missing"):
        on_disk(hollow(made(0)), tmp_path / "a")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": [TOKENS]}, "without data"),
        ({"data": [TOKENS], "matcher": ActivationMatching()}, "without data"),
        ({"heads": "separate"}, "heads='separate'"),
        ({"target": "deeper"}, "target="),
        ({"device": "meta"}, "on the CPU"),
    ],
)
def test_what_needs_the_network_in_memory_is_told(options, message, pair) -> None:
    with pytest.raises(InputError, match=message):
        fxmerge.merge(*pair, example_inputs=TOKENS, **options)


def test_nothing_writes_to_what_stays_on_disk(pair) -> None:
    a, b = pair
    p = a.up.weight
    assert isinstance(p, Stored)
    assert isinstance(copy.deepcopy(a).up.weight, Stored)
    for write_to in (lambda: p.mul_(2), lambda: p.data.__class__ and a.double(), lambda: p.__setitem__(0, 1.0)):
        with torch.no_grad(), pytest.raises(InputError, match="cannot be written to"):
            write_to()
    with pytest.raises(InputError, match="align returns a network in memory"):
        fxmerge.align(b, to=a, example_inputs=TOKENS)
    result = fxmerge.merge(a, b, example_inputs=TOKENS, matcher=Average(), verify=False, progress=False)
    with pytest.raises(FxMergeError, match=r"save this one|pip install"):
        result.export_onnx("never.onnx")


def test_a_model_on_the_meta_device_is_told_the_way() -> None:
    with torch.device("meta"):
        net = Net()
    with pytest.raises(InputError, match=r"fxmerge\.on_disk"):
        fxmerge.infer_classes(net, TOKENS)


def test_substituted_tensors() -> None:
    """Parameters are asked for at every use, buffers once, since the network may write to them."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))
            self.register_buffer("count", torch.zeros(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count += x
            return self.weight * self.count + self.weight.shape[0]

    net = Counting()
    state = {"weight": torch.full((3,), 2.0), "count": torch.full((3,), 5.0)}
    with torch.no_grad(), preserved(net), Substituted(net, state):
        assert net(torch.ones(3)).tolist() == [15.0] * 3
    assert net.weight.tolist() == [1.0] * 3
    assert net.count.tolist() == [0.0] * 3


@pytest.mark.parametrize("matcher", [Average(), WeightMatching(restarts=1)], ids=str)
def test_few_tensors_are_in_memory_at_once(matcher, tmp_path, monkeypatch) -> None:
    """Bytes that were read and are still held, over a whole merge and its writing."""
    torch.manual_seed(0)
    sizes = [8, *[32] * 20, 8]
    layers = [part for n, m in pairwise(sizes) for part in (nn.Linear(n, m), nn.ReLU())]
    net = nn.Sequential(*layers[:-1]).eval()
    for k in range(2):
        torch.manual_seed(k)
        save_file({n: torch.randn_like(t) for n, t in net.state_dict().items()}, tmp_path / f"{k}.safetensors")
    alive: dict[int, int] = {}
    most = reads = 0
    plain = Shards.__getitem__

    def watched(self: Shards, name: str) -> torch.Tensor:
        nonlocal most, reads
        value = plain(self, name)
        reads += 1
        alive[reads] = value.nbytes
        weakref.finalize(value.untyped_storage(), alive.pop, reads)  # views of it keep that, and not the tensor
        most = max(most, sum(alive.values()))
        return value

    monkeypatch.setattr(Shards, "__getitem__", watched)
    parents = [on_disk(net, tmp_path / f"{k}.safetensors") for k in range(2)]
    result = fxmerge.merge(*parents, example_inputs=torch.zeros(2, 8), matcher=matcher, progress=False)
    result.save(tmp_path / "out")
    assert reads > 2 * len(net.state_dict())
    assert not alive
    assert most <= 4 * max(t.nbytes for t in net.state_dict().values())


NETWORK = """
from itertools import pairwise
from torch import nn

def network(width, depth):
    sizes = pairwise([8, *[width] * depth, 8])
    return nn.Sequential(*[part for n, m in sizes for part in (nn.Conv2d(n, m, 3, padding=1), nn.ReLU())][:-1]).eval()
"""

PEAK = (
    NETWORK
    + """
import resource, sys
from pathlib import Path
import torch
import fxmerge
from fxmerge.matchers import OTFusion, WeightMatching

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def merge(folder, *size):
    with torch.device("meta"):
        net = network(*size)
    parents = [fxmerge.on_disk(net, folder / f"{k}.safetensors") for k in range(2)]
    options = {"example_inputs": torch.ones(2, 8, 2, 2), "matcher": eval(sys.argv[2])}
    fxmerge.merge(*parents, progress=False, **options).save(folder / "merged")

merge(Path(sys.argv[1]) / "small", 16, 2)  # so that modules and tables that every merge needs are there
before = peak()
merge(Path(sys.argv[1]) / "large", 256, 20)
print(peak() - before)
"""
)


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux")
@pytest.mark.parametrize("matcher", ["WeightMatching(restarts=1, sweeps=1)", "OTFusion(cost='weights', sweeps=1)"])
def test_a_process_that_merges_takes_less_than_one_parent(tmp_path, matcher) -> None:
    """All that the system counts, pages of the files included, above what a small merge takes."""
    known: dict[str, Any] = {}
    exec(NETWORK, known)
    for name, size in {"small": (16, 2), "large": (256, 20)}.items():
        (tmp_path / name).mkdir()
        for k in range(2):
            torch.manual_seed(k)
            save_file(known["network"](*size).state_dict(), tmp_path / name / f"{k}.safetensors")
    run = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path), matcher], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < (tmp_path / "large" / "0.safetensors").stat().st_size
