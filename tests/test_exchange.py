"""Networks for other programs: the same outputs there, at other batch sizes too; whole files, and reasons."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, fx, nn
from versions import ONNX

import fxmerge
from fxmerge import exchange
from fxmerge.errors import FxMergeError
from fxmerge.exchange import export_onnx, export_pt2, export_state_dict


def small() -> fx.GraphModule:
    """conv -> bn -> linear, with a method and a function."""

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.flatten(self.bn(self.conv(x)).relu().mean((2, 3), keepdim=True), 1))

    torch.manual_seed(0)
    return fx.symbolic_trace(Small()).eval()


class Residual(nn.Module):
    """A stem, a block with a shortcut, a grouped convolution, a concatenation and a channel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.inner, self.grouped = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.groups, self.head = nn.GroupNorm(2, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = (x + self.inner(x)).relu()
        x = self.groups(torch.cat([x, self.grouped(x)], 1))
        x = x.view(x.shape[0], 2, 8, *x.shape[2:]).transpose(1, 2).reshape(x.shape)
        return self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


class Tagger(nn.Module):
    """Control flow that only recording follows, an embedding, a recurrent layer, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.rnn, self.head = nn.Embedding(20, 8), nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 5)

    def forward(self, tokens: Tensor) -> dict[str, Any]:
        if tokens.shape[1] < 2:
            raise ValueError
        y, (h, _) = self.rnn(self.words(tokens))
        return {"tags": self.head(y), "state": h[-1], "loss": None}


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(8, 3))


KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "layers": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)),
        (torch.randn(3, 3, 4),),
    ),
    "residual": (Residual, (torch.randn(3, 3, 6, 6),)),
    "transformer": (transformer, (torch.randn(3, 4, 8),)),
    "recorded": (Tagger, (torch.randint(0, 20, (3, 7)),)),
}


def merged(kind: str) -> tuple[fxmerge.MergeResult, tuple[Tensor, ...]]:
    make, inputs = KINDS[kind]
    torch.manual_seed(0)
    result = fxmerge.merge(make().eval(), make().eval(), example_inputs=inputs[0][:2], progress=False)
    return result, inputs


def outputs(value: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(value) if t is not None]


@ONNX
@pytest.mark.parametrize("kind", KINDS)
def test_onnx_runs_the_same(kind, tmp_path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    result, inputs = merged(kind)
    path = result.export_onnx(tmp_path / "new" / "a.onnx")
    onnx.checker.check_model(onnx.load(path), full_check=True)  # and infers every shape
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    assert [session.get_inputs()[0].shape[0], session.get_outputs()[0].shape[0]] == ["batch", "batch"]
    for size in (1, 3):
        given = [x[:size] for x in inputs]
        found = session.run(None, dict(zip(names, (x.numpy() for x in given), strict=True)))
        for ours, theirs in zip(outputs(result.module(*given)), found, strict=True):
            assert (ours - torch.from_numpy(theirs)).abs().max() <= 1e-5 * ours.abs().max()
    assert [p.name for p in path.parent.iterdir()] == ["a.onnx"]


@pytest.mark.parametrize("kind", ["layers", "transformer"])
def test_pt2_runs_the_same(kind, tmp_path) -> None:
    result, inputs = merged(kind)
    path = result.export_pt2(tmp_path / "a.pt2")
    assert list(tmp_path.iterdir()) == [path]
    program = torch.export.load(path).module()
    for size in (1, 3):
        given = [x[:size] for x in inputs]
        torch.testing.assert_close(outputs(program(*given)), outputs(result.module(*given)), rtol=1e-5, atol=1e-6)


def test_tensors_fit_the_parents_class(tmp_path) -> None:
    result, inputs = merged("residual")
    path = result.export_state_dict(tmp_path / "a.safetensors")
    net = Residual().eval()
    net.load_state_dict(load_file(path))
    torch.testing.assert_close(net(*inputs), result.module(*inputs))
    tied = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    tied[2].weight = tied[0].weight
    nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)).load_state_dict(
        load_file(export_state_dict(tied, tmp_path / "b.safetensors"))
    )
    tied[0].register_buffer("odd", torch.ones(2, 2).to_sparse())
    with pytest.raises(FxMergeError, match=r"'0\.odd' is no dense tensor"):
        export_state_dict(tied, tmp_path / "c.safetensors")
    (tmp_path / "file").write_text("")
    with pytest.raises(FxMergeError, match="could not be written"):
        export_state_dict(nn.Linear(2, 2), tmp_path / "file" / "d.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors", "file"]


class Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, -1).sum(1)


def test_what_an_exporter_refuses_is_said_with_its_reason(tmp_path) -> None:
    with pytest.raises(FxMergeError, match=r"(?s)torch\.export cannot export Fixed: .*batch"):
        export_pt2(Fixed(), tmp_path / "a.pt2", (torch.randn(2, 4),))
    with pytest.raises(FxMergeError, match=r"end in '\.pt2'"):
        export_pt2(small(), tmp_path / "a.pt", (torch.randn(2, 3, 8, 8),))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", [("onnx",), ("onnx", "onnxscript")])
def test_onnx_names_the_extra(missing, tmp_path, monkeypatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name in missing else found(name.replace("onnxscript", "torch")),
    )
    with pytest.raises(FxMergeError, match=rf"needs {' and '.join(missing)}: pip install fxmerge\[onnx\]"):
        export_onnx(small(), tmp_path / "a.onnx", (torch.randn(2, 3, 8, 8),))


@pytest.mark.parametrize("batch", [1, 2])
def test_inputs_have_a_dynamic_batch(batch) -> None:
    module = small()
    args, kwargs, shapes = exchange._with_dynamic_batch(module, (torch.randn(batch, 3, 8, 8),), {})
    program = torch.export.export(module, args, kwargs, dynamic_shapes=shapes)
    x = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(program.module()(x), module(x))


def test_onnx_is_written_whole_and_leaves_the_mode(tmp_path, monkeypatch) -> None:
    module = small().train()
    module.bn.eval()
    modes = [m.training for m in module.modules()]

    def fake(net: nn.Module, args: Any, file: str, **options: Any) -> None:
        assert not any(m.training for m in net.modules())
        assert options["kwargs"] == {"x": args} or options["kwargs"] == {}
        warnings.warn("of the exporter's own workings", stacklevel=1)
        Path(file).write_text("model")
        Path(file + ".data").write_text("weights")
        if fails:
            try:
                raise KeyError("inner")
            except KeyError as error:
                raise RuntimeError("outer") from error

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(torch.onnx, "export", fake)
    fails = True
    with pytest.raises(FxMergeError, match=r"torch\.onnx cannot export Small: KeyError: 'inner'"):
        export_onnx(module, tmp_path / "a.onnx", (torch.randn(2, 3, 8, 8),))
    assert list(tmp_path.iterdir()) == []
    fails = False
    assert export_onnx(module, tmp_path / "a.onnx", (torch.randn(2, 3, 8, 8),)) == tmp_path / "a.onnx"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.onnx", "a.onnx.data"]
    assert [m.training for m in module.modules()] == modes
