"""Folders: what comes back equals what went in, and a folder cannot make ``load`` do anything else."""

from __future__ import annotations

import copy
import json
import math
import operator
import os
import re
import shutil
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torchvision import models, ops
from versions import PERSISTENCE

from fxmerge import document as documents
from fxmerge import shards, vocabulary
from fxmerge.errors import FormatError
from fxmerge.export import load, save
from fxmerge.folder import seal

ANNOTATION = re.compile(r" : \S+ \[")


def assert_comes_back(module: fx.GraphModule, folder: Path, *inputs: Any) -> fx.GraphModule:
    """Save and load ``module``, compare everything, and return what was loaded."""
    back = load(save(module, folder))
    assert str(back.graph) == ANNOTATION.sub(" : [", str(module.graph))  # annotations are not kept
    assert type(back).__name__ == type(module).__name__
    assert list(back.state_dict()) == list(module.state_dict())
    for kind in ("named_parameters", "named_buffers"):
        before, after = (dict(getattr(m, kind)(remove_duplicate=False)) for m in (module, back))
        assert list(before) == list(after)
        for name, t in before.items():
            u = after[name]
            assert torch.equal(t.nan_to_num(), u.nan_to_num())
            assert (t.dtype, t.requires_grad) == (u.dtype, u.requires_grad), name
            assert t.stride() == u.stride() or 0 in t.stride()  # expanded ones are stored in full
            assert [n for n, v in before.items() if v is t] == [n for n, v in after.items() if v is u]  # ties
    modes = [[(n, p.training) for n, p in m.named_modules(remove_duplicate=False)] for m in (module, back)]
    assert modes[0] == modes[1]
    outputs = []
    for m in (module, back):
        torch.manual_seed(0)
        outputs.append(pytree.tree_leaves(m(*copy.deepcopy(inputs))))
    torch.testing.assert_close(*outputs, rtol=0, atol=0, equal_nan=True)
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in module.state_dict().items())  # running statistics too
    assert_source_is_alike(folder / "module.py", back, inputs)
    return back


def assert_source_is_alike(file: Path, module: fx.GraphModule, inputs: tuple[Any, ...]) -> None:
    """The file for people runs, and makes a network with the same keys, modes and outputs."""
    space: dict[str, Any] = {"__name__": "read"}
    exec(compile(file.read_text(encoding="utf-8"), file, "exec"), space)
    net = space[type(module).__name__]()
    tensors, made = module.state_dict(), net.state_dict()
    assert {n: (t.dtype, t.shape) for n, t in made.items()} == {n: (t.dtype, t.shape) for n, t in tensors.items()}
    assert {n: m.training for n, m in net.named_modules()} == {n: m.training for n, m in module.named_modules()}
    grads = [{n: p.requires_grad for n, p in m.named_parameters(remove_duplicate=False)} for m in (net, module)]
    assert grads[0] == grads[1]
    net.load_state_dict(tensors)
    for name, buffer in module.named_buffers():
        net.get_buffer(name).copy_(buffer)  # those outside the state_dict
    for node in module.graph.find_nodes(op="get_attr"):  # and constants
        value, own = (operator.attrgetter(node.target)(m) for m in (module, net))
        own.data.copy_(value)
    outputs = []
    for m in (module, net):
        torch.manual_seed(0)
        outputs.append(pytree.tree_leaves(copy.deepcopy(m)(*copy.deepcopy(inputs))))
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6, equal_nan=True)  # strides are not in the source


def calling(leaf: nn.Module, inputs: int = 1) -> fx.GraphModule:
    """A graph that calls ``leaf``."""
    graph, root = fx.Graph(), nn.Module()
    root.leaf = leaf
    arguments = tuple(graph.placeholder(f"x{i}") for i in range(inputs))
    graph.output(graph.call_module("leaf", arguments))
    return fx.GraphModule(root, graph)


def computing(function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.GraphModule:
    """A graph that calls ``function`` on its input."""
    graph = fx.Graph()
    graph.output(graph.call_function(function, (graph.placeholder("x"), *args), kwargs))
    return fx.GraphModule(nn.Module(), graph)


# Round trips -------------------------------------------------------------------------------------------------


def vit() -> nn.Module:
    return models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5)


ZOO = [models.resnet18, models.mobilenet_v3_small, models.swin_t, vit]


@pytest.mark.parametrize(("make", "mode"), [*((make, False) for make in ZOO), (models.resnet18, True), (vit, True)])
def test_torchvision(make, mode, tmp_path) -> None:
    torch.manual_seed(0)
    assert_comes_back(fx.symbolic_trace(make()).train(mode), tmp_path / "out", torch.randn(2, 3, 32, 32))


def test_operations_made_by_fx_wrap_remain_such(tmp_path) -> None:
    module = fx.symbolic_trace(ops.StochasticDepth(0.5, "row"))
    back = fx.symbolic_trace(load(save(module, tmp_path / "out")))
    assert [n.target for n in back.graph.nodes if n.op == "call_function"] == [ops.stochastic_depth]


class Everything(nn.Module):
    """Every kind of tensor, argument and operation that a graph may hold."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.tied = nn.Linear(4, 6, bias=False)
        self.tied.weight = self.first.weight
        self.short = nn.Parameter(torch.randn(6).bfloat16(), requires_grad=False)
        self.transposed = nn.Parameter(torch.randn(6, 5).t())
        self.part = nn.Parameter(torch.randn(9)[3:])
        self.rows = nn.Parameter(self.first.weight.detach()[1:3])
        self.register_buffer("flat", self.first.weight.detach().view(-1))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.scalar = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("scale", torch.full((6,), torch.inf), persistent=False)
        self.register_buffer("order", torch.arange(6).flip(0))
        self.register_buffer("wide", torch.ones(1).expand(6))
        self.register_buffer("none", None)
        self.norm = nn.BatchNorm1d(6)
        self.block = nn.Sequential(nn.Dropout(0.3), nn.Sequential(nn.ReLU(inplace=True)))
        self.constant = torch.tensor([1.0, -2.0])

    def forward(self, x: Tensor, flag: bool = True, shift: float = -math.inf) -> Any:
        y = self.first(x) + self.tied(x)
        y = torch.minimum(self.norm(y) + self.short.float(), self.scale)[:, self.order]
        y = self.block(y * self.wide + self.part).clamp(min=shift, max=math.inf)
        y = F.linear(y, self.transposed).to(torch.float64).view(-1, 5)[..., 1:4:2]
        y = F.pad(y, [0, 1], value=math.nan).nan_to_num().contiguous(memory_format=torch.contiguous_format)
        y = y + torch.arange(3, device=torch.device("cpu"), dtype=torch.float32) * self.constant.sum() ** 2
        size = y.size(0) if flag else 0
        return {
            "out": (y * self.scalar, [y.max(1).values, y.shape[0]]),
            "more": [self.rows, self.flat, self.empty],
            3: size,
        }


@PERSISTENCE
@pytest.mark.parametrize("mode", [False, True])
def test_every_kind_of_value(mode, tmp_path) -> None:
    torch.manual_seed(0)
    module = fx.symbolic_trace(Everything(), {"flag": True}).train(mode)
    module.graph.set_codegen(fx.graph.CodeGen())
    module.graph.find_nodes(op="placeholder")[1].target = "flag"
    module.recompile()
    module.block.get_submodule("1").eval()
    back = assert_comes_back(module, tmp_path / "out", torch.randn(3, 4))
    assert "scale" not in back.state_dict()
    assert sum("weight" in name for name in load_file(tmp_path / "out/model.safetensors")) == 2  # first and norm
    with (tmp_path / "out/model.safetensors").open("r+b") as file:
        file.write(bytes(3000))
    assert all(torch.equal(v, module.state_dict()[k]) for k, v in back.state_dict().items())  # not mapped to the file
    assert_comes_back(back, tmp_path / "again", torch.randn(3, 4))


def layer(**options: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **options)


def channels_last_convolution() -> nn.Module:
    net = nn.Conv2d(4, 8, 3, padding="same", padding_mode="reflect", groups=2, bias=False)
    net.weight.data = net.weight.data.contiguous(memory_format=torch.channels_last)
    return net


TOKENS, IMAGE, POINT = (2, 4, 8), (2, 4, 6, 6), (3, 4)
LEAVES: list[tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = [
    (lambda: nn.LSTM(8, 5, 2, batch_first=True, bidirectional=True, proj_size=2, dropout=0.2), (TOKENS,)),
    (lambda: nn.GRU(8, 5, bias=False), (TOKENS,)),
    (lambda: nn.RNN(8, 5, nonlinearity="relu"), (TOKENS,)),
    (lambda: nn.LSTMCell(4, 5, bias=False), (POINT,)),
    (lambda: nn.MultiheadAttention(8, 2, batch_first=True), (TOKENS,) * 3),
    (
        lambda: nn.MultiheadAttention(8, 2, bias=False, add_bias_kv=True, add_zero_attn=True, kdim=4, vdim=6),
        (TOKENS, (2, 4, 4), (2, 4, 6)),
    ),
    (layer, (TOKENS,)),
    (lambda: layer(activation="gelu", norm_first=True, bias=False, layer_norm_eps=0.1), (TOKENS,)),
    (lambda: layer(activation=nn.SiLU()), (TOKENS,)),
    (lambda: layer(activation=torch.tanh), (TOKENS,)),
    (lambda: nn.TransformerEncoder(layer(), 2, nn.LayerNorm(8), enable_nested_tensor=False), (TOKENS,)),
    (lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16), 2), (TOKENS, TOKENS)),
    (lambda: nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.GELU("tanh"))), (POINT,)),
    (lambda: nn.Sequential(nn.Sequential(), nn.Sequential(OrderedDict(named=nn.Tanh()))), (POINT,)),
    (channels_last_convolution, (IMAGE,)),
    (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, dilation=2), (IMAGE,)),
    (lambda: nn.BatchNorm2d(4, affine=False, momentum=None), (IMAGE,)),
    (lambda: nn.BatchNorm2d(4, track_running_stats=False, eps=0.1), (IMAGE,)),
    (lambda: nn.LayerNorm((6, 6), bias=False), (IMAGE,)),
    (lambda: nn.GroupNorm(2, 4, affine=False), (IMAGE,)),
    (lambda: nn.RMSNorm(4), (POINT,)),
    (lambda: nn.PReLU(4, init=0.1), (IMAGE,)),
    (lambda: nn.Bilinear(4, 4, 3, bias=False), (POINT, POINT)),
    (lambda: nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), (IMAGE,)),
    (lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True, return_indices=True), (IMAGE,)),
    (lambda: nn.AvgPool2d(2, count_include_pad=False, divisor_override=3), (IMAGE,)),
    (lambda: nn.AdaptiveAvgPool2d((None, 2)), (IMAGE,)),
    (lambda: nn.Unflatten(1, (2, 2)), (IMAGE,)),
    (lambda: nn.Softmax(-1), (POINT,)),
    (lambda: nn.Hardtanh(-2, 2, inplace=True), (POINT,)),
    (lambda: nn.ConstantPad2d((1, 0, 2, 1), math.inf), (IMAGE,)),
    (lambda: nn.Identity(3, unused=2), (POINT,)),
    (lambda: ops.StochasticDepth(0.4, "row"), (POINT,)),
    (lambda: ops.SqueezeExcitation(4, 2, activation=nn.SiLU), (IMAGE,)),
    (lambda: ops.FrozenBatchNorm2d(4, eps=0.1), (IMAGE,)),
    (lambda: ops.Permute([0, 2, 1]), (TOKENS,)),
]


@pytest.mark.parametrize("mode", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("make", "shapes"), LEAVES, ids=[str(i) for i in range(len(LEAVES))])
@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_leaf_modules(make, shapes, mode, tmp_path) -> None:
    torch.manual_seed(0)
    leaf = make()
    module = calling(leaf, len(shapes)).train(mode)
    back = assert_comes_back(module, tmp_path / "out", *(torch.randn(shape) for shape in shapes))
    assert str(back.leaf) == str(leaf)


def test_attributes_changed_after_construction(tmp_path) -> None:
    net = layer()
    net.dropout1.p, net.norm1.eps = 0.25, 0.5
    net.linear1, net.linear2 = nn.Linear(8, 3), nn.Linear(3, 8)  # as merging to another width does
    net.linear1.weight.requires_grad_(False)
    net.norm2.weight = net.norm2._parameters.pop("weight")  # registered last
    back = assert_comes_back(calling(net), tmp_path / "out", torch.randn(2, 4, 8)).leaf
    assert str(back) == str(net)


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"fc": nn.Linear(2, 2, bias=False), "act": nn.ReLU(), "none": nn.Sequential()})
        self.register_module("shortcut", None)
        self.alpha = nn.ParameterList([torch.ones(1)])
        self.register_buffer("seen", torch.zeros(2), persistent=False)


def test_parts_that_the_graph_does_not_call_keep_their_keys(tmp_path) -> None:
    module = fx.symbolic_trace(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    module.auxiliary = Head().eval()
    module.unused = nn.Linear(3, 2)
    module.register_parameter("temperature", nn.Parameter(torch.ones(())))
    back = assert_comes_back(module, tmp_path / "out", torch.randn(2, 3))
    assert list(back.state_dict())[-4:] == [
        "auxiliary.layers.fc.weight",
        "auxiliary.alpha.0",
        "unused.weight",
        "unused.bias",
    ]
    assert isinstance(back.unused, nn.Linear)
    assert isinstance(back.auxiliary.layers.fc, nn.Linear)


def test_one_module_under_two_names(tmp_path) -> None:
    norm = nn.BatchNorm1d(4)
    net = nn.Sequential(norm, nn.Linear(4, 4), norm)
    graph = fx.Graph()
    x = graph.placeholder("x")
    for name in ("0", "1", "2"):
        x = graph.call_module(name, (x,))
    graph.output(x)
    assert_comes_back(fx.GraphModule(net, graph), tmp_path / "out", torch.randn(5, 4))


def test_constants_that_are_plain_attributes(tmp_path) -> None:
    graph = fx.Graph()
    graph.output(graph.call_function(torch.add, (graph.placeholder("x"), graph.get_attr("inner.constant"))))
    root = nn.Module()
    root.inner = nn.Module()
    root.inner.constant = torch.ones(3)
    module = fx.GraphModule(root, graph)
    del module.inner._buffers["constant"]
    module.inner.constant = torch.ones(3)
    back = assert_comes_back(module, tmp_path / "out", torch.randn(2, 3))
    assert dict(back.named_buffers()) == {}


@pytest.mark.parametrize(
    "value",
    [
        *(
            None,
            True,
            1,
            1.0,
            -0.0,
            0.1,
            2**70,
            "a\n\"'{}",
            2j,
            ...,
            slice(None, -1, 2),
            (),
            (1, (2.0,)),
            [],
        ),
        *(
            [None, [()]],
            {"a": (1,), 3: {None: False}},
            torch.Size([1, 2]),
            torch.float8_e5m2,
            torch.complex64,
            torch.bool,
        ),
        *(torch.device("cuda", 1), torch.device("meta"), torch.channels_last, torch.preserve_format, torch.strided),
        *(math.inf, -math.inf, torch.sparse_coo, F.gelu, torch.relu),
    ],
    ids=lambda value: getattr(value, "__name__", repr(value)),
)
def test_values(value) -> None:
    assert documents.decode(documents.encode(range(1, 9, 3)), {}) == range(1, 9, 3), "of nodes only"
    back = documents.decode(json.loads(json.dumps(documents.encode(value), allow_nan=False)))
    assert back == value
    assert type(back) is type(value)
    assert repr(back) == repr(value)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (torch.add, "torch.add"),
        (torch.flatten, "torch.flatten"),
        (torch._C._nn.gelu, "torch.nn.functional.gelu"),
        (F.relu, "torch.nn.functional.relu"),
        (F.hardswish, "torch.nn.functional.hardswish"),
        (F.max_pool2d, "torch.nn.functional.max_pool2d"),
        (F.multi_head_attention_forward, "torch.nn.functional.multi_head_attention_forward"),
        (torch.relu_, "torch.relu_"),
        (torch.arange, "torch.arange"),
        (torch.linalg.vector_norm, "torch.linalg.vector_norm"),
        (torch._assert, "torch._assert"),
        (operator.getitem, "operator.getitem"),
        (math.sqrt, "math.sqrt"),
        (getattr, "builtins.getattr"),
        (ops.stochastic_depth, "torchvision.ops.stochastic_depth.stochastic_depth"),
        (ops.roi_align, "torchvision.ops.roi_align.roi_align"),
        (models.swin_transformer._patch_merging_pad, "torchvision.models.swin_transformer._patch_merging_pad"),
        (torchvision.models.video.mvit._add_rel_pos, "torchvision.models.video.mvit._add_rel_pos"),
    ],
)
def test_names_of_functions(function, name) -> None:
    assert vocabulary.function_name(function) == name
    assert vocabulary.function(name) is function
    assert vocabulary.function("torch._C._nn.gelu") is F.gelu


def test_no_listed_name_is_dangerous() -> None:
    words = (
        "load save open file exec eval import compile hook pickle reduce ctypes system dlopen lib jit hub call".split()
    )
    for name in {*vocabulary.functions(), *vocabulary.methods()}:
        parts = set(name.replace(".", "_").strip("_").split("_"))
        assert not parts & set(words) or name in ("torch.scatter_reduce", "torch.index_reduce") or "_reduce" in name, (
            name
        )
    assert not {"__reduce_ex__", "__class__", "__setstate__", "__call__", "numpy", "apply_"} & vocabulary.methods()


# Folders -----------------------------------------------------------------------------------------------------


def small() -> fx.GraphModule:
    """conv -> bn -> flatten -> linear, with a method, a function and an attribute."""

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.bn(self.conv(x)).relu()
            return self.fc(torch.flatten(x.mean((2, 3), keepdim=True), 1)) * x.ndim

    torch.manual_seed(0)
    return fx.symbolic_trace(Small()).eval()


def test_files(tmp_path) -> None:
    (tmp_path / "out").mkdir()  # may exist, if it is empty
    recipe = {"matcher": "OTFusion", "weights": [0.5, 0.5]}
    folder = save(small(), str(tmp_path / "out"), recipe=recipe, report="<p>é</p>")
    assert folder == tmp_path / "out"
    files = ["README.md", "graph.json", "manifest.json", "model.safetensors", "module.py", "recipe.json"]
    assert sorted(p.name for p in folder.iterdir()) == [*files, "report.html"]
    assert json.loads((folder / "recipe.json").read_text()) == recipe
    assert (folder / "report.html").read_text(encoding="utf-8") == "<p>é</p>"
    assert list(tmp_path.iterdir()) == [folder]
    assert (folder.stat().st_mode & 0o777) == 0o777 & ~_umask()
    plain = save(small(), tmp_path / "deep" / "er")
    assert sorted(p.name for p in plain.iterdir()) == files
    assert (plain / "graph.json").read_bytes() == (folder / "graph.json").read_bytes()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_nothing_is_overwritten(tmp_path) -> None:
    save(small(), tmp_path / "out")
    before = (tmp_path / "out/graph.json").stat()
    (tmp_path / "file").write_text("mine")
    for taken in ("out", "file"):
        with pytest.raises(FormatError, match=r"exists already.*another folder, or remove it"):
            save(small(), tmp_path / taken)
    assert (tmp_path / "out/graph.json").stat() == before
    assert (tmp_path / "file").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 2


def test_nothing_is_left_after_a_failure(tmp_path, monkeypatch) -> None:
    with pytest.raises(FormatError, match="recipe"):
        save(small(), tmp_path / "out", recipe={"model": small()})

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(shards, "_write_file", fail)
    with pytest.raises(FormatError, match=r"could not be written.*no space"):
        save(small(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def own_function(x: Tensor) -> Tensor:
    return x


class Pair(NamedTuple):
    a: int
    b: int


class Own(nn.ReLU):
    pass


def hooked() -> nn.Module:
    net = nn.Linear(3, 3)
    net.register_forward_hook(lambda module, args, output: output * 2)
    return net


def narrowed() -> nn.Module:
    net = nn.Linear(3, 3)
    net.weight = nn.Parameter(torch.zeros(3, 2))
    return net


def reading(value: Any) -> fx.GraphModule:
    graph, root = fx.Graph(), nn.Module()
    root.value = value
    graph.output(graph.get_attr("value"))
    return fx.GraphModule(root, graph)


def methodical(name: str) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.call_method(name, (graph.placeholder("x"),)))
    return fx.GraphModule(nn.Module(), graph)


def packed() -> fx.GraphModule:
    class Net(nn.Module):
        def forward(self, x: dict[str, Tensor]) -> Tensor:
            return x["a"] + 1

    return fx.symbolic_trace(Net(), {"x": {"a": fx.PH}})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: computing(own_function), r"node 'own_function' \(call_function .*own_function.*not on the allow-list"),
        (lambda: computing(os.system), r"node 'system' \(call_function .*'posix.system'|'nt.system'"),
        (lambda: computing(torch.load), r"node 'load' .*'torch.serialization.load'"),
        (lambda: computing(torch.add, Pair(1, 2)), r"node 'add' \(call_function .*type Pair cannot be stored"),
        (lambda: computing(getattr, "__class__"), "node 'getattr_1' .*'__class__' is not on the allow-list"),
        (lambda: methodical("register_hook"), r"node 'register_hook' \(call_method register_hook\).*allow-list"),
        (lambda: methodical("__reduce_ex__"), "'__reduce_ex__' is not on the allow-list"),
        (lambda: calling(Own()), r"module 'leaf' of class .*Own.* not in torch.nn"),
        (lambda: calling(Head()), r"module 'leaf' of class .*Head"),
        (lambda: calling(nn.Sequential(nn.ReLU(), Own())), r"module 'leaf.1' of class .*Own"),
        (lambda: calling(hooked()), "module 'leaf' of class torch.nn.modules.linear.Linear: .*hooks"),
        (lambda: calling(narrowed()), r"module 'leaf' of class .*Linear: .*\[3, 3\].*but it holds .*\[3, 2\]"),
        (
            lambda: calling(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))),
            "module 'leaf' of class .*Parametrized",
        ),
        (lambda: calling(ops.MLP(3, [3])), "module 'leaf' of class .*MLP: .*'in_channels'"),
        (lambda: calling(nn.LazyLinear(3)), "not initialised"),
        (lambda: reading("text"), "node 'value' reads 'value', a str"),
        (lambda: reading(torch.zeros(2, device="meta")), "'value' is .* on the meta device"),
        (lambda: reading(torch.eye(2).to_sparse()), "'value' is sparse"),
        (packed, "pytree"),
    ],
)
def test_what_cannot_be_stored(make, message, tmp_path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = make()
    with pytest.raises(FormatError, match=message):
        save(module, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# Foreign and damaged folders ---------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    return save(small(), tmp_path / "out")


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    document = json.loads((folder / "graph.json").read_text())
    change(document)
    return rewritten(folder, "graph.json", json.dumps(document).encode())


def rewritten(folder: Path, name: str, content: bytes) -> Path:
    """Another content of a file, and a manifest to match: as someone would who means harm."""
    (folder / name).write_bytes(content)
    seal(folder, ["graph.json", "recipe.json", "model.safetensors"])
    return folder


def node(document: dict[str, Any], name: str) -> dict[str, Any]:
    return next(n for n in document["nodes"] if n["name"] == name)


@pytest.mark.parametrize(
    "name",
    """os.system posix.system subprocess.run pickle.loads builtins.eval builtins.exec builtins.open builtins.__import__
    builtins.setattr torch.load torch.save torch.hub.load torch.from_file torch.compile torch.jit.load torch.os.system
    torch.sys.exit torch.ops.load_library torch.utils.model_zoo.load_url torch._C._VariableFunctions._from_blob
    torch.serialization.load torch.nn.functional.handle_torch_function torch.nn.functional.importlib.import_module
    operator.call operator.attrgetter operator.methodcaller math.__loader__ torchvision.io.write_file
    torchvision.io.image.write_file torchvision.models.resnet.resnet18 torchvision.ops.boxes.torch
    torchvision.models._api.load_state_dict_from_url torchvision.datasets.utils.download_url torchvision.ops.
    torchvision.ops._utils.nn not_yet_imported.function torchvision.models.not_yet_imported.function
    fxmerge.export.save relu ..""".split(),
)
def test_foreign_functions(name, folder, tmp_path, monkeypatch) -> None:
    (tmp_path / "not_yet_imported.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    edit(folder, lambda d: node(d, "flatten").update(target=name))
    with pytest.raises(FormatError, match=r"node 'flatten'.*not on the allow-list") as caught:
        load(folder)
    assert repr(name) in str(caught.value)
    assert "not_yet_imported" not in sys.modules


@pytest.mark.parametrize(
    "name", "numpy __reduce_ex__ __class__ __init__ apply_ tofile share_memory_ grad_fn format".split()
)
def test_foreign_methods(name, folder) -> None:
    edit(folder, lambda d: node(d, "relu").update(target=name))
    with pytest.raises(FormatError, match=f"node 'relu'.*{name!r} is not on the allow-list of tensor methods"):
        load(folder)


@pytest.mark.parametrize("name", ["__class__", "__globals__", "grad_fn", "_base", "", {"node": "x"}, ["shape"], None])
def test_foreign_attributes(name, folder) -> None:
    edit(folder, lambda d: node(d, "getattr_1")["args"].__setitem__(1, name))
    with pytest.raises(FormatError, match="node 'getattr_1'"):
        load(folder)


@pytest.mark.parametrize(
    "name",
    """subprocess.Popen torch.nn.modules.module.torch torch.nn.modules.conv.math torch.utils.data.DataLoader Linear
    torch.nn.modules.linear.Module torch.nn.modules.nothing.Linear torch.nn.modules.linear.Nothing torch.nn.Linear
    torch.nn.modules.linear.init torchvision.models.resnet.ResNet torchvision.ops.misc.nn torch.jit._script.ScriptModule
    torch.nn.modules.utils._ntuple torch.nn.modules.module._IncompatibleKeys not_yet_imported.Class""".split(),
)
def test_foreign_classes(name, folder) -> None:
    edit(folder, lambda d: d["modules"]["children"]["fc"].update({"class": name}))
    with pytest.raises(FormatError, match=r"not in torch\.nn or torchvision\.ops"):
        load(folder)


CODE = "open('run', 'w')"


def rename_input(document: dict[str, Any], text: str) -> None:
    node(document, "x")["target"] = text


def call_another(document: dict[str, Any], text: str) -> None:
    document["modules"]["children"][text] = {"class": "torch.nn.modules.activation.ReLU"}
    node(document, "fc")["target"] = text


INJECTIONS: list[Callable[[dict[str, Any]], Any]] = [
    lambda d: rename_input(d, f"x, y={CODE}"),
    lambda d: rename_input(d, f"x):\n  {CODE}\ndef f(x"),
    lambda d: rename_input(d, "*"),
    lambda d: rename_input(d, "lambda"),
    lambda d: node(d, "flatten")["kwargs"].update({f"start_dim={CODE}, end_dim": 1}),
    lambda d: node(d, "x").update(name=f"x = {CODE}"),
    lambda d: node(d, "fc").update(target=f'fc"), {CODE}, getattr(self, "fc'),
    lambda d: call_another(d, f'fc"), {CODE}, getattr(self, "fc'),
    lambda d: d.update({"class": f"A:\n {CODE}\nclass B"}),
    lambda d: d["modules"]["children"]["fc"]["args"].update({"__class__": 3}),
    lambda d: d["modules"]["children"]["fc"]["attributes"].update({"forward": {"function": "torch.relu"}}),
    lambda d: d["modules"]["children"]["fc"]["attributes"].update({"__class__": 3}),
    lambda d: d["modules"]["children"]["fc"]["args"].update({"bias": {"function": "builtins.getattr"}}),
    lambda d: d["modules"]["children"].update({"forward": d["modules"]["children"]["fc"]}),
    lambda d: node(d, "flatten")["args"].append({"function": "torch.relu"}),
    lambda d: node(d, "flatten")["args"].append({"module": d["modules"]["children"]["fc"]}),
    lambda d: node(d, "flatten")["args"].append({"dtype": "load"}),
    lambda d: node(d, "flatten")["args"].append({"device": CODE}),
]


@pytest.mark.parametrize("inject", INJECTIONS)
def test_names_do_not_become_code(inject, folder, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FormatError):
        load(edit(folder, inject))
    assert not (tmp_path / "run").exists()


def test_strings_stay_strings(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = f"'''\"\"\"\\\n{{{CODE}}}"
    graph = fx.Graph()
    graph.output({text: graph.placeholder("x", default_value=text)})
    back = load(save(fx.GraphModule(nn.Module(), graph), tmp_path / "out"))
    assert back() == {text: text}
    assert not (tmp_path / "run").exists()


def shortened(file: Path) -> tuple[str, bytes]:
    return file.name, file.read_bytes()[:400]


def retensor(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = {k: v.clone() for k, v in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    rewritten(folder, "model.safetensors", (folder / "model.safetensors").read_bytes())


DAMAGES: list[tuple[Callable[[Path], Any], str]] = [
    (lambda f: shutil.rmtree(f), "has no manifest.json; give a folder that fxmerge saved"),
    (lambda f: (f / "graph.json").unlink(), "has no graph.json"),
    (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
    (lambda f: rewritten(f, "graph.json", b'{"format": '), "graph.json is not JSON"),
    (lambda f: rewritten(f, "graph.json", b"\xff\xfe\x00"), "graph.json is not JSON"),
    (lambda f: rewritten(f, "graph.json", b"[" * 100_000), "graph.json is not JSON"),
    (lambda f: rewritten(f, "graph.json", b"[]"), "graph.json: TypeError"),
    (lambda f: rewritten(f, "graph.json", b"{}"), "graph.json: KeyError: 'format'"),
    (lambda f: rewritten(f, "model.safetensors", b"PK\x03\x04" * 50), "not a safetensors file"),
    (
        lambda f: rewritten(f, "model.safetensors", (f / "model.safetensors").read_bytes()[:400]),
        "not a safetensors file",
    ),
    (lambda f: edit(f, lambda d: d.update(version=2)), "'fxmerge' version 2, and this fxmerge reads .* version 1"),
    (lambda f: edit(f, lambda d: d.update(format="onnx")), "'onnx'"),
    (lambda f: edit(f, lambda d: d.pop("nodes")), "KeyError: 'nodes'"),
    (lambda f: edit(f, lambda d: d.update(nodes=3)), "TypeError"),
    (lambda f: edit(f, lambda d: d["nodes"].pop()), "the last node is no output"),
    (lambda f: edit(f, lambda d: node(d, "bn").update(args=[{"node": "gone"}])), "node 'bn' .*KeyError: 'gone'"),
    (lambda f: edit(f, lambda d: node(d, "bn").update(args=[{"sorted": []}])), "node 'bn' .*KeyError: 'sorted'"),
    (lambda f: edit(f, lambda d: node(d, "bn").update(args=[{"node": "x", "a": 1}])), "node 'bn' .*ValueError"),
    (lambda f: edit(f, lambda d: node(d, "bn").update(args=json.loads("[" * 250 + "]" * 250))), "too many nested"),
    (lambda f: edit(f, lambda d: node(d, "bn").update(target="gone")), "node 'bn' .*'gone'"),
    (lambda f: edit(f, lambda d: node(d, "bn").update(target="fc.weight")), "'fc.weight' is a Parameter"),
    (lambda f: edit(f, lambda d: node(d, "bn").update(target="")), "node 'bn'"),
    (lambda f: edit(f, lambda d: node(d, "bn").update(op="root")), r"node 'bn' .*'root' is no operation"),
    (lambda f: edit(f, lambda d: node(d, "bn").update(op="get_attr")), "'bn' is a BatchNorm2d"),
    (lambda f: edit(f, lambda d: d["tensors"].pop("fc.bias")), "'fc.bias' is in model.safetensors but not in graph"),
    (lambda f: edit(f, lambda d: d["tensors"]["fc.bias"].update(kind="pickle")), "'fc.bias' is a 'pickle'"),
    (lambda f: edit(f, lambda d: d["tensors"]["fc.bias"].update(kind="buffer")), "fc.bias|attribute 'bias'"),
    (
        lambda f: edit(f, lambda d: d["tensors"]["bn.bias"].update(shape=[5])),
        r"'bn.bias' is torch.float32 \[4\] .* \[5\]",
    ),
    (lambda f: edit(f, lambda d: d["tensors"]["fc.bias"].update(order=[3])), "graph.json: "),
    (lambda f: edit(f, lambda d: d["modules"]["children"].pop("fc")), "graph.json: .*fc"),
    (
        lambda f: edit(f, lambda d: d["modules"]["children"]["fc"]["args"].pop("in_features")),
        "Linear.*fails: TypeError",
    ),
    (lambda f: edit(f, lambda d: d["modules"]["children"]["fc"]["args"].update(in_features=-1)), "Linear.*fails"),
    (lambda f: retensor(f, lambda t: t.pop("fc.bias")), "'fc.bias' is in graph.json but not in model.safetensors"),
    (
        lambda f: retensor(f, lambda t: t.update(odd=torch.ones(1))),
        "'odd' is in model.safetensors but not in graph.json",
    ),
    (
        lambda f: retensor(f, lambda t: t.update({"fc.bias": torch.ones(3)})),
        r"'fc.bias' is torch.float32 \[3\] in model",
    ),
    (lambda f: retensor(f, lambda t: t.update({"fc.bias": torch.ones(2).double()})), "'fc.bias' is torch.float64"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_damaged_folders(damage, message, folder) -> None:
    damage(folder)
    with pytest.raises(FormatError, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value)


def test_what_a_damaged_file_holds_is_not_told_at_length(folder) -> None:
    edit(folder, lambda d: d["tensors"]["fc.bias"].update(shape=[[1] * 9999]))
    with pytest.raises(FormatError, match=r"'fc\.bias' is torch\.float32") as caught:
        load(folder)
    assert len(str(caught.value)) < 2000


def test_a_tensor_that_neither_file_has(folder) -> None:
    edit(folder, lambda d: d["tensors"].pop("fc.bias"))
    retensor(folder, lambda t: t.pop("fc.bias"))
    with pytest.raises(FormatError, match=r"'fc\.bias' is missing"):
        load(folder)
