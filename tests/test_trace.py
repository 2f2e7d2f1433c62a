"""Tracing: the graph computes what the module does, shares what it holds, and leaves everything as it was."""

from __future__ import annotations

import copy
import pickle
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from versions import PERSISTENCE, SYMBOLIC_SIZES

from fxmerge.errors import InputError
from fxmerge.guess import infer_example_inputs
from fxmerge.running import as_call, call, evaluating, preserved, to_device
from fxmerge.trace import trace

Pair = namedtuple("Pair", ["left", "right"])


@dataclass
class Heads:
    logits: Tensor
    hidden: Tensor


class Mlp(nn.Module):
    """Keyword, default and tied arguments: one layer under two names, one parameter under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = self.first
        self.scale = nn.Parameter(torch.rand(4))
        self.unused = nn.Linear(4, 2)

    def forward(self, x: Tensor, gate: Tensor | None = None, times: int = 2) -> Tensor:
        for _ in range(times):
            x = self.first(x)
        return self.again(x) * self.scale if gate is None else x * gate


class ConvNet(nn.Module):
    """Buffers read by computation, item assignment, a constant, and everything a forward may leave behind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.register_buffer("variance", torch.rand(6) + 0.5)
        self.register_buffer("shift", torch.rand(6), persistent=False)
        self.register_buffer("average", torch.zeros(()))
        self.cache: dict[str, Tensor] = {}
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        assert x.shape[1] == 3, "an assert is no branch"
        x = self.norm(self.conv(x)) * self.variance.view(1, -1, 1, 1).rsqrt() + self.shift.view(-1, 1, 1)
        self.cache["last"], self.seen = x, x
        self.average = x.mean()
        x[:, 0] = x[:, 1].relu()
        x = self.drop(x.mean((2, 3)) + torch.ones(6) + torch.rand(6))
        return {"logits": self.head(x), "features": x}


class Flat(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(1, 3, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(3 * 12 * 12, 4))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(20, 6), nn.Embedding(16, 6)
        self.register_buffer("mask", torch.full((16, 16), -torch.inf).triu(1))  # -inf that means something
        self.head = nn.Linear(6, 20, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        _, length = ids.shape
        x = self.words(ids) + self.places(torch.arange(length, device=ids.device))
        scores = x @ x.transpose(1, 2) + self.mask[:length, :length]
        return self.head(scores.softmax(-1) @ x)


class Returns(nn.Module):
    """A linear layer whose output is wrapped by ``wrap``."""

    def __init__(self, wrap) -> None:
        super().__init__()
        self.layer, self.wrap = nn.Linear(3, 3), wrap

    def forward(self, x):
        return self.wrap(self.layer(x), x)


class Body(nn.Module):
    """A linear layer and a forward given from outside, for forwards that cannot be traced."""

    def __init__(self, body) -> None:
        super().__init__()
        self.layer, self.body = nn.Linear(3, 3), body
        self.register_buffer("ready", torch.tensor(True))

    def forward(self, x):
        return self.body(self, x)


def snapshot(module: nn.Module) -> dict[str, object]:
    return {
        "modes": [m.training for m in module.modules()],
        "values": {k: v.clone() for k, v in module.state_dict(keep_vars=True).items()},
        "objects": {k: id(v) for k, v in [*module.named_parameters(), *module.named_buffers()]},
        "attributes": [{k: repr(v) for k, v in vars(m).items() if k[0] != "_"} for m in module.modules()],
        "hooks": [len(m._forward_hooks) for m in module.modules()],
        "rng": torch.get_rng_state(),
    }


def assert_same(before: dict[str, object], after: dict[str, object]) -> None:
    torch.testing.assert_close(after.pop("values"), before.pop("values"), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(after.pop("rng"), before.pop("rng"), rtol=0, atol=0)
    assert after == before


CASES = [
    pytest.param(Mlp, torch.rand(2, 4), id="tensor"),
    pytest.param(Mlp, (torch.rand(2, 4), torch.rand(4)), id="tuple"),
    pytest.param(Mlp, {"gate": torch.rand(4), "x": torch.rand(2, 4)}, id="dict"),
    pytest.param(Mlp, {"x": torch.rand(2, 4), "times": 3}, id="constant"),
    pytest.param(ConvNet, torch.rand(2, 3, 8, 8), id="buffers"),
    pytest.param(Flat, torch.rand(2, 1, 28, 28), id="flatten"),
    pytest.param(Tokens, torch.randint(20, (2, 5)), id="tokens"),
    pytest.param(lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 8)), torch.rand(2, 3, 8), id="fast path"),
    pytest.param(torchvision.models.squeezenet1_1, torch.rand(2, 3, 64, 64), id="squeezenet"),
    pytest.param(torchvision.models.shufflenet_v2_x0_5, torch.rand(2, 3, 64, 64), id="shufflenet"),
]


@SYMBOLIC_SIZES
@pytest.mark.parametrize(("make", "inputs"), CASES)
@pytest.mark.parametrize("training", [False, True])
def test_graph_reproduces_shares_and_leaves_alone(make, inputs, training):
    torch.manual_seed(0)
    module = make().train(training)
    module.register_forward_hook(lambda *_: None)
    before = snapshot(module)
    traced = trace(module, inputs)
    assert_same(before, snapshot(module))

    graph_module = traced.graph_module
    assert graph_module.training is training
    named = dict(module.named_parameters(remove_duplicate=False))
    for name, parameter in graph_module.named_parameters():
        assert parameter is named[name]
    kept = list(graph_module.state_dict())
    assert kept == [key for key in module.state_dict() if key in kept]
    for original, name in [(t, n) for n, t in module.named_parameters() if n in kept]:
        assert dict(graph_module.named_parameters())[name] is original  # a tied tensor keeps its first name

    args, kwargs = as_call(inputs)
    fresh = [to_device(v, None) for v in (args, kwargs)]
    with evaluating(module, graph_module):
        expected = call(module, *copy.deepcopy(fresh))
    with evaluating(module, graph_module):
        torch.testing.assert_close(call(graph_module, *copy.deepcopy(fresh)), expected, rtol=0, atol=0)
    assert traced.source is module
    assert traced.origin == "symbolic"


@SYMBOLIC_SIZES
def test_batch_size_stays_free_and_shapes_are_the_nodes_outputs():
    traced = trace(Tokens().eval(), torch.randint(20, (2, 5)))
    assert traced.shapes["ids"] == (2, 5)
    assert traced.shapes["head"] == (2, 5, 20)
    other = torch.randint(20, (3, 7))
    torch.testing.assert_close(traced.graph_module(other), traced.source(other))


def test_optional_arguments_take_their_defaults_and_constants_are_noted():
    inputs = [n.target for n in trace(Mlp(), torch.rand(2, 4)).graph_module.graph.nodes if n.op == "placeholder"]
    assert inputs == ["x"]
    notes = trace(Mlp(), {"x": torch.rand(2, 4), "times": 3}).notes
    assert any("'times'" in note and "3" in note for note in notes)
    assert any("'unused.weight'" in note for note in notes)


@SYMBOLIC_SIZES
def test_buffers_and_constants_keep_their_place_in_the_state_dict():
    module = ConvNet()
    traced = trace(module, torch.rand(2, 3, 8, 8))
    assert list(traced.graph_module.state_dict()) == [k for k in module.state_dict() if k != "average"]
    assert "assert" in " ".join(traced.notes)
    assert traced.graph_module.get_buffer("shift") is module.shift


@PERSISTENCE
@SYMBOLIC_SIZES
def test_graph_modules_trace_again_copy_and_pickle():
    module = ConvNet().eval()
    x = torch.rand(2, 3, 8, 8)
    first = trace(module, x).graph_module
    for graph_module in (first, copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        again = trace(graph_module, x).graph_module
        assert list(again.state_dict()) == list(first.state_dict())
        with evaluating(module):
            expected = module(x)
        with evaluating(again):
            torch.testing.assert_close(again(x), expected)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y, x: {"y": y, "more": [x, (y * 2,)]},
        lambda y, x: Pair(y, x),
        lambda y, x: Heads(y, x),
        lambda y, x: (y, None, 3),
    ],
)
def test_nested_outputs(wrap):
    trace(Returns(wrap), torch.rand(2, 3))


def test_nested_and_variadic_inputs():
    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, *xs, options, **more):
            total = sum(self.layer(x) for x in xs) * options["factor"]
            for value in (*options["pair"], *more.values()):
                total = total + value
            return total

    x = torch.rand(2, 3)
    module = Many()
    graph_module = trace(
        Body(lambda self, xs: self.layer(torch.cat([a + b for a, b in xs]))), ([(x, x), (x, x)],)
    ).graph_module
    assert graph_module([(x, x)] * 2).shape == (4, 3)
    with pytest.raises(InputError, match="options"):
        trace(module, (x, x))
    keywords = {"options": {"factor": 2, "pair": [x, x]}, "bias": x}
    traced = trace(module, keywords)
    torch.testing.assert_close(traced.graph_module(**traced.kwargs), module(**keywords))


UNTRACEABLE = [
    (lambda self, x: self.layer(x if x.sum() > 0 else -x), "x.sum() > 0", "branches"),
    (lambda self, x: self.layer(x) * len(x), "len(x)", "len()"),
    (lambda self, x: torch.stack([self.layer(row) for row in x]), "for row in x", "loops over"),
    (lambda self, x: sum(self.layer(x[i]) for i in range(x.shape[0])), "range(x.shape[0])", "plain Python value"),
    (lambda self, x: self.layer(torch.stack([*x])), "[*x]", "unpacks one with *"),
]


@pytest.mark.parametrize(("body", "line", "reason"), UNTRACEABLE)
def test_untraceable_modules_are_recorded_and_told_where_and_why(body, line, reason):
    module, x = Body(body), torch.rand(3, 3)
    before = snapshot(module)
    traced = trace(module, x)
    assert traced.origin == "recorded"
    message = traced.notes[0]
    assert f"{__file__}:{body.__code__.co_firstlineno}" in message
    assert line in message
    assert reason in message
    assert_same(before, snapshot(module))


def test_branches_on_parameter_sizes_and_buffer_values_are_traced():
    def body(self, x):
        if self.layer.weight.shape[0] == 3 and self.ready:
            x = x * self.layer.weight.size(0)
        return F.linear(x, self.layer.weight)

    assert "layer.weight" in trace(Body(body), torch.rand(2, 3)).graph_module.state_dict()


def test_a_graph_that_differs_is_not_taken():
    def body(self, x):
        y = x
        x += 1  # symbolic tracing sees an addition, and y stays what it was
        return self.layer(y)

    traced = trace(Body(body), torch.rand(2, 3))
    assert traced.origin == "recorded"
    assert "does not reproduce the module (output differs by up to" in traced.notes[0]
    assert trace(Body(body), torch.rand(2, 3), check=False).origin == "symbolic"


def broken(change) -> nn.Module:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    change(module)
    return module


def put(module: nn.Module, name: str, value: float) -> None:
    module.get_parameter(name).data.flatten()[:2] = value


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning", "ignore:.*torch.jit.script:Warning")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: put(m, "0.weight", torch.nan), "'0.weight' .*2 NaN or infinite values of 12"),
        (lambda m: put(m, "1.bias", -torch.inf), "'1.bias' .*2 NaN"),
        (lambda m: m[1].running_var.fill_(torch.inf), "'1.running_var' .*4 NaN"),
        (lambda m: m.to("meta"), "'0.weight', .* meta device"),
        (lambda m: m.append(nn.LazyLinear(3)), "'2.weight', '2.bias' .*not initialised"),
        (
            lambda m: m[0].register_buffer("packed", torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)),
            "'0.packed' .*quantised",
        ),
        (
            lambda m: m.register_parameter("q", nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)),
            "'q' .*quantised",
        ),
        (
            lambda m: m[0].register_parameter("turn", nn.Parameter(torch.ones(2, dtype=torch.complex64))),
            "'0.turn' .*complex.*view_as_real",
        ),
        (lambda m: m.append(torch.ao.nn.quantized.dynamic.Linear(4, 4)), "_packed_params.*quantised"),
        (lambda m: m.append(torch.jit.script(nn.Linear(4, 4))), "'2' of Sequential is compiled by torch.jit"),
    ],
)
def test_unusable_parameters_are_named(change, message):
    with pytest.raises(InputError, match=message):
        trace(broken(change), torch.rand(2, 3))


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("make", [lambda y: None, lambda y: float(y.sum()), lambda y: {"loss": 1}])
def test_an_output_without_tensors_is_refused(make, check):
    module = nn.Linear(3, 4)
    module.forward = lambda x, real=module.forward: make(real(x))
    with pytest.raises(InputError, match=r"Linear returns no tensor but .*keep"):
        trace(module, torch.rand(2, 3), check=check)


@pytest.mark.parametrize(
    ("module", "inputs", "message"),
    [
        (nn.Sequential(nn.Linear(3, 2)), torch.rand(2, 5), r"Sequential does not run .*float32 \[2, 5\].*mat1"),
        (Mlp(), {"x": torch.rand(2, 4), "y": 1}, r"keys \['x', 'y'\].*takes \['x', 'gate', 'times'\]"),
        (Mlp(), {}, r"takes \['x', 'gate', 'times'\]"),
        (Mlp(), [torch.rand(2, 4)], "not list"),
        (nn.Sequential(nn.ReLU()), torch.rand(2, 4), "no parameters"),
        ("resnet18", torch.rand(2, 4), "expected an nn.Module, got str"),
    ],
)
@pytest.mark.parametrize("check", [True, False])
def test_unusable_inputs_say_what_was_given(module, inputs, message, check):
    with pytest.raises(InputError, match=message):
        trace(module, inputs, check=check)


@SYMBOLIC_SIZES
@pytest.mark.parametrize(
    ("module", "shape", "source"),
    [
        (nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(12, 3)), (2, 12), "'2' (Linear with 12 input features)"),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)),
            (2, 3, 32, 32),
            "'0' (Conv2d with 3 input channels)",
        ),
        (Flat(), (2, 1, 28, 28), "'0' (Conv2d with 1 input channels)"),
        (nn.Sequential(nn.Conv1d(2, 4, 9), nn.Flatten(), nn.Linear(4 * 56, 2)), (2, 2, 64), "'0' (Conv1d"),
        (nn.Sequential(nn.Conv3d(1, 2, 3)), (2, 1, 32, 32, 32), "'0' (Conv3d"),
        (Tokens(), (2, 8), "'words' (Embedding with 20 rows)"),
    ],
)
def test_inferred_inputs(module, shape, source):
    state = torch.get_rng_state()
    example, sentence = infer_example_inputs(module.train())
    assert torch.equal(state, torch.get_rng_state())
    assert tuple(example.shape) == shape
    assert source in sentence
    assert str(list(shape)) in sentence
    assert sentence in trace(module).notes


class Two(nn.Module):
    def __init__(self, *layers: nn.Module, arguments: int = 1) -> None:
        super().__init__()
        self.layers, self.arguments = nn.ModuleList(layers), arguments

    def forward(self, x):
        return [layer(x) for layer in self.layers]


class TwoInputs(Two):
    def forward(self, x, y):
        return self.layers[0](x) + y


@pytest.mark.parametrize(
    "module",
    [
        TwoInputs(nn.Linear(3, 3)),
        Two(nn.Linear(3, 3), nn.Linear(4, 3)),
        Two(nn.LSTM(3, 3)),
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(7, 2)),
        nn.Sequential(nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, 2, 3)),
        Body(lambda self, x: self.layer(x.permute(0, 2, 1))),
    ],
)
def test_doubtful_inputs_are_asked_for(module):
    with pytest.raises(InputError, match="example_inputs="):
        trace(module)


def test_several_agreeing_readers_leave_no_doubt():
    example, _ = infer_example_inputs(Two(nn.Conv2d(3, 2, 1), nn.Conv2d(3, 4, 3)))
    assert example.shape == (2, 3, 32, 32)


def test_preserved_restores_after_an_error():
    module = ConvNet()
    module.norm.eval()
    before = snapshot(module)
    with pytest.raises(KeyError), preserved(module):  # noqa: PT012
        module.eval().norm.train()
        module(torch.rand(2, 3, 8, 8))
        module.norm.running_mean.fill_(3.0)
        module.variance = torch.ones(6)
        module.head.register_forward_hook(lambda *_: None)
        module.added = 1
        raise KeyError
    assert_same(before, snapshot(module))


def test_unchanged_buffers_are_not_written():
    module = ConvNet()
    version = module.norm.running_mean._version
    with evaluating(module):
        assert not torch.is_grad_enabled()
        assert not any(m.training for m in module.modules())
        module(torch.rand(2, 3, 8, 8))
    assert module.norm.running_mean._version == version


def test_call_replaces_tied_tensors_in_all_their_places():
    module = Tokens().double()
    weight = torch.rand_like(module.words.weight)
    ids = torch.randint(20, (2, 5))
    expected = copy.deepcopy(module)
    expected.words.weight.data.copy_(weight)
    for name in ("words.weight", "head.weight"):
        torch.testing.assert_close(call(module, (ids,), {}, {name: weight, "elsewhere.weight": weight}), expected(ids))
    shared = Mlp()
    held = shared.first.weight
    out = call(shared, (torch.rand(2, 4),), {}, {"again.weight": torch.zeros(4, 4), "first.bias": torch.zeros(4)})
    assert not out.any()
    assert shared.first.weight is held is shared.again.weight


def test_as_call_and_to_device():
    x, ids = torch.rand(2), torch.arange(3)
    assert as_call(x) == ((x,), {})
    assert as_call((x, ids)) == ((x, ids), {})
    assert as_call({"x": x}) == ((), {"x": x})
    moved = to_device({"a": [x, (ids, "text")]}, "cpu", torch.float64)
    assert moved["a"][0].dtype == torch.float64
    assert moved["a"][1][0].dtype == torch.int64
    assert moved["a"][1][1] == "text"


def test_infinite_limits_and_masks_are_meant_so():
    module = Flat()
    module.register_buffer("limit", torch.tensor(float("inf")))
    module.register_buffer("mask", torch.tensor([0.0, -float("inf")]))
    trace(module, torch.rand(2, 1, 28, 28))
    module.mask[0] = float("nan")
    with pytest.raises(InputError, match="'mask' of Flat holds 2 NaN or infinite"):
        trace(module, torch.rand(2, 1, 28, 28))
