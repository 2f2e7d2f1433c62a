"""Recording: what symbolic tracing refuses becomes a graph that follows the module wherever a run can tell."""

from __future__ import annotations

import copy
import pickle
import time
from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from networks import randomise
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fxmerge
from fxmerge.batch import repeated
from fxmerge.errors import StructureError, TraceError
from fxmerge.interpret import interpret
from fxmerge.ir import VALUES_DECIDE
from fxmerge.record import record
from fxmerge.repair import LeastSquares, Rescale
from fxmerge.running import as_call, call, difference, evaluating, fresh, plain
from fxmerge.symbolic import symbolic
from fxmerge.trace import trace

X = torch.rand(2, 6, generator=torch.Generator().manual_seed(0))
TABLE = torch.arange(6.0)
Pair = namedtuple("Pair", ["left", "right"])


@dataclass
class Outputs:
    logits: Tensor
    hidden: tuple[Tensor, ...] | None = None
    cache: object = None


class Cell(nn.Module):
    """A module of modules that are traced through."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.layer(x), 0.5, training=self.training)


class Net(nn.Module):
    """Layers of all kinds, and a forward given from outside."""

    def __init__(self, body=None) -> None:
        super().__init__()
        self.layer, self.head, self.cell = nn.Linear(6, 6), nn.Linear(6, 6), Cell()
        self.head.bias = self.layer.bias
        self.lstm, self.attention = nn.LSTM(6, 6, batch_first=True), nn.MultiheadAttention(6, 2, batch_first=True)
        self.drop, self.inplace, self.norm = nn.Dropout(0.5), nn.ReLU(inplace=True), nn.BatchNorm1d(6)
        self.words, self.depth = nn.Embedding(9, 6), torchvision.ops.StochasticDepth(0.5, "row")
        self.scale = nn.Parameter(torch.rand(6))
        self.table = torch.rand(6)  # no buffer
        self.tables = {"one": torch.rand(6)}
        self.count = 0
        self.register_buffer("shift", torch.rand(6))
        self.body = body

    def forward(self, *args, **kwargs):
        return self.body(self, *args, **kwargs)


def branching(self, x):
    return self.head(self.layer(x) if x.sum() > 0 else x)


def written(self, x):
    y = x
    x += 1
    y = self.layer(y)
    y[:, 0] = y[:, 1].exp()
    y[:, 2:4].mul_(2)
    self.inplace(y)
    torch.add(y, 1, out=y)
    return self.head(y.clamp_(max=3.0))


def made(self, x):
    count, width = x.shape
    rows = torch.arange(count, device=x.device).unsqueeze(1)
    out = torch.zeros(count, width).scatter_(1, rows % width, 1.0) + torch.tensor([1.0] * 6) + x.new_ones(count, 1)
    return self.layer(out + torch.from_numpy(np.arange(6.0)).float() + TABLE + x + np.float64(0.5))


def attributes(self, x):
    TABLE.add_(1).sub_(1)
    return self.layer(x + self.table * self.tables["one"] + self.shift + TABLE)


def views(self, x):
    first, second = self.layer.weight.chunk(2)
    x = x @ self.layer.weight.t() @ self.head.weight.T + self.scale.data
    return torch.cat([F.linear(x, first), F.linear(x, second), x[..., :1]], -1)


def batched(self, x):
    x = x.view(len(x), 1, 6).expand(x.shape[0], 4, 6).reshape(x.shape[0] * 4, 6)
    x = torch.cat([self.layer(x), x.new_zeros(1, 6)])[: x.shape[0] + 1]
    return x[: len(x) - 1].view(len(x) // 4, 4, 6).sum(1) * torch.ones((len(x) - 1) // 4, 1)


def unpacked(self, x):
    a, b, c, *_ = self.layer(x).unbind(1)
    pieces = [piece + 1 for piece in self.head(x).split([2, 4], dim=1)]
    return torch.stack([*torch.stack([a, b, c])], 1), pieces, next(iter(self.layer.weight)) * x


def tuples(self, x):
    x = x.view(-1, 2, 3).repeat(1, 3, 2)
    out, (hidden, _) = self.lstm(x)
    values, places = out.max(dim=-1, keepdim=True)
    return self.attention(out, out, x, need_weights=False)[0] + hidden[0].unsqueeze(1) + values * places


def repeated_layers(self, x):
    for _ in range(3):
        x = self.drop(self.norm(self.layer(x))) + x
    return nn.Softmax(dim=-1)(self.cell(self.cell(x)))


def residual(self, x):
    y = self.layer(x)
    return y + self.drop(y) + nn.Identity()(y)


def options(self, x, *more, mask=None, scale=1.0, pair=None, **rest):
    x = self.layer(x) * scale
    if mask is not None:
        x = x.masked_fill(mask, 0.0)
    for y in (*more, *(pair or {}).get("list", []), *rest.values()):
        x = x + y
    return self.head(x)


def operators(self, x):
    y = self.layer(x)
    y = (2.0 - y) ** 2 + 2**y - 3 / (y.abs() + 1) + (y // 0.5) % 2 - +y + abs(-y)
    y **= 2
    y -= x
    y *= ~(x > 0.5) & (x != 0) | (x == 1)
    return x @ y.T, 1 - y.real, y >= x, x.mT @ y, y[None, ..., ::2, y.new_tensor([0, 2]).long()]


def sequences(self, x, lengths):
    packed = pack_padded_sequence(self.words(x), lengths, batch_first=True, enforce_sorted=False)
    out, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
    return self.head(out)


def outputs(self, x):
    y = self.layer(x)
    return Outputs(y, (y * 2, Pair(x, None)), cache=object()), {"n": 3, "more": [y.sum(), "text"]}


def rowwise(self, x):
    return torch.stack([self.layer(row) for row in x])


IDS = torch.tensor([[1, 2, 3], [4, 5, 0]])
CASES = [
    (branching, X),
    (written, X),
    (made, X),
    (attributes, X),
    (views, X),
    (batched, X),
    (unpacked, X),
    (tuples, X),
    (operators, X),
    (repeated_layers, X),
    (residual, X),
    (options, X),
    (options, {"x": X, "mask": X > 0.5, "scale": 2.0, "pair": {"list": [X, X]}, "other": X}),
    (options, (X, X, X)),
    (sequences, (IDS, torch.tensor([3, 2]))),
    (outputs, X),
    (rowwise, X),
]


def net(body, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net(body).eval()


def snapshot(module: nn.Module) -> tuple[dict[str, Tensor], list[object]]:
    tensors = {k: v.clone() for k, v in module.state_dict().items()}
    tensors |= {"table": module.table.clone(), "TABLE": TABLE.clone()}
    return tensors, [(m.training, sorted(vars(m))) for m in module.modules()]


def assert_follows(graph_module: nn.Module, module: nn.Module, inputs, exact: bool = True) -> None:
    args, kwargs = as_call(inputs)
    with evaluating(module, graph_module):
        expected = plain(call(module, *fresh((args, kwargs))))
        for _ in range(2):  # a constant that one run writes into must not change the next
            said = difference(expected, graph_module(*fresh(args), **fresh(kwargs)))
            assert said is None, said


@pytest.mark.parametrize(("body", "inputs"), CASES)
@pytest.mark.parametrize("training", [False, True])
def test_graph_reproduces_follows_the_batch_and_leaves_alone(body, inputs, training):
    module = net(body).train(training)
    before = snapshot(module)
    graph_module, notes = record(module, *as_call(inputs))
    tensors, rest = snapshot(module)
    torch.testing.assert_close(tensors, before[0], rtol=0, atol=0)
    assert rest == before[1]
    assert graph_module.training is training
    graph_module.graph.lint()
    named = dict(module.named_parameters(remove_duplicate=False))
    assert all(parameter is named[name] for name, parameter in graph_module.named_parameters())
    assert graph_module.state_dict().keys() <= module.state_dict().keys()
    assert_follows(graph_module, module, inputs)
    fixed = [note for note in notes if "batch size is fixed" in note]
    assert bool(fixed) is (body is rowwise)
    five = repeated(inputs, 10)
    if fixed:
        with pytest.raises(AssertionError, match=r"must be of shape \[2, 6\]"):
            graph_module(five)
    else:
        assert_follows(graph_module, module, five)
        assert_follows(copy.deepcopy(graph_module), module, five)


@pytest.mark.parametrize(
    ("body", "read"),
    [
        (branching, True),
        (lambda self, x: self.layer(x) * float(x.max()), True),
        (lambda self, x: self.layer(x) * self.scale[0].item(), True),
        (lambda self, x: self.layer(x)[:, : int(self.shift.sum())], False),
        (lambda self, x: self.layer(x) * x.shape[1] if x.dtype == torch.float32 else x, False),
        (rowwise, False),
    ],
)
def test_values_that_python_reads_are_noted(body, read):
    _, notes = record(net(body), (X,), {})
    assert any("depends on values" in note for note in notes) is read


def test_symbolic_tracing_comes_first_and_the_notes_say_why_it_did_not_do():
    assert trace(net(lambda self, x: self.layer(x)), X).origin == "symbolic"
    traced = trace(net(branching), X)
    assert traced.origin == "recorded"
    assert traced.shapes["head"] == (2, 6)
    assert any("x.sum() > 0" in note and f"{__file__}:" in note for note in traced.notes)
    assert trace(net(written), X).origin == "recorded"  # symbolically it computes something else
    assert "does not reproduce" in " ".join(trace(net(written), X).notes)


def test_numbers_that_are_sizes_of_the_batch_become_expressions():
    graph_module, _ = record(net(batched), (X,), {})
    sizes = [n for n in graph_module.graph.nodes if n.op == "call_method" and n.target == "size"]
    assert len(sizes) == 1
    assert graph_module(X[:1]).shape == (1, 6)


def test_inputs_of_other_shapes_are_refused():
    graph_module, _ = record(net(branching), (X,), {})
    with pytest.raises(AssertionError, match=r"0 must be of shape \[any, 6\], as when the network was recorded"):
        graph_module(X[:, :5])


def test_devices_of_the_input_are_followed():
    graph_module, _ = record(net(made), (X,), {})
    [arange] = [n for n in graph_module.graph.nodes if n.target is torch.arange]
    assert isinstance(arange.kwargs["device"], torch.fx.Node)


def attend(x: Tensor, dropout_p: float) -> Tensor:
    x = x.view(-1, 2, 3)
    return F.scaled_dot_product_attention(x, x, x, dropout_p=dropout_p)


# Training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "random"),
    [
        (lambda self, x: self.cell(x), True),
        (lambda self, x: F.dropout(self.layer(x), 0.5, self.training), True),
        (lambda self, x: F.dropout(self.layer(x), 0.5, training=False), False),
        (lambda self, x: attend(self.layer(x), dropout_p=0.5 if self.training else 0.0), True),
        (lambda self, x: self.layer(x) + self.drop(x), True),
        (lambda self, x: x + self.depth(self.layer(x)), True),
    ],
)
def test_dropout_follows_the_mode(body, random):
    module = net(body)
    graph_module, _ = record(module, (X,), {})
    x = torch.rand(40, 6)
    for training in (True, False, True):
        graph_module.train(training)
        first, second = graph_module(x), graph_module(x)
        assert torch.equal(first, second) is not (random and training)


def test_functional_batch_norm_follows_the_mode():
    class Norm(nn.BatchNorm1d):
        def forward(self, x):
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum
            )

    module = nn.Sequential(nn.Linear(6, 6), Norm(6)).eval()
    graph_module, _ = record(module, (X,), {})
    module.train(), graph_module.train()
    torch.testing.assert_close(graph_module(X), module(X))
    assert graph_module(X).mean(0).abs().max() < 1e-4


def test_dropout_is_told_from_what_it_is_given():
    graph_module, _ = record(net(residual), (X,), {})
    [node] = [n for n in graph_module.graph.nodes if n.target == "drop"]
    assert len(node.users) == 1


class Keeping(nn.Module):
    """Keeps what it computes from a parameter in eval mode until it is told to train."""

    def __init__(self):
        super().__init__()
        self.layer, self.bias, self.kept = nn.Linear(6, 6), nn.Parameter(torch.rand(3)), {}
        self.head = nn.Linear(6, 2)

    def train(self, mode=True):
        if mode:
            self.kept = {}
        return super().train(mode)

    def forward(self, x):
        if not self.training and "bias" not in self.kept:
            self.kept["bias"] = self.bias.repeat(2)
        return self.head(self.layer(x) * (self.bias.repeat(2) if self.training else self.kept["bias"]))


@pytest.mark.parametrize("front_end", [record, symbolic])
@pytest.mark.parametrize("grad", [False, True])
def test_what_was_kept_for_eval_mode_is_computed_again(front_end, grad):
    module = Keeping().eval()
    with torch.set_grad_enabled(grad):
        module(X)
    kept = module.kept["bias"]
    graph_module, notes = front_end(module, (X,), {})
    assert module.kept["bias"] is kept
    assert "bias" in dict(graph_module.named_parameters())
    assert notes == ()


@torch.no_grad()
def test_copies_with_other_values_keep_nothing_of_the_old_ones():
    module = Keeping().eval()
    expected = module(X)
    twin = fxmerge.permute(module, fxmerge.infer_classes(module, X), seed=1)
    assert not torch.equal(twin.bias, module.bias)
    torch.testing.assert_close(twin(X), expected)

    other = Keeping().eval()
    y = torch.randint(2, (2,))
    one, two = (float(F.cross_entropy(network(X), y)) for network in (module, other))
    barrier = fxmerge.evaluate_barrier(module, other, [(X, y)], points=2, progress=False)
    assert barrier.loss == pytest.approx([one, two])


def test_a_number_that_follows_the_batch_size_in_steps_fixes_it():
    _, notes = record(net(lambda self, x: self.layer(x) * (len(x) // 2)), (X,), {})
    assert any("batch size is fixed" in note for note in notes)


def test_shapes_that_follow_from_values_are_computed_while_classes_are_inferred():
    class Chosen(nn.Module):
        def __init__(self):
            super().__init__()
            self.score, self.hidden, self.head = nn.Linear(6, 1), nn.Linear(6, 5), nn.Linear(5, 2)

        def forward(self, x):
            rows = x[self.score(x)[:, 0] > self.score.bias]
            return self.head(torch.tanh(self.hidden(rows))).sum(0, keepdim=True) / max(len(rows), 1)

    module = Chosen()
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    kept = int((module.score(x)[:, 0] > module.score.bias).sum())
    assert 0 < kept < 8  # all scores zero, as they are where nothing is computed, would keep all or none
    classes = fxmerge.infer_classes(module, x)
    assert interpret(classes.traced).exact
    assert not interpret(trace(net(branching), X)).exact
    assert classes.free == 5
    assert fxmerge.verify(module, classes).ok


# Errors -----------------------------------------------------------------------------------------------------------


def assigns(self, x):
    y = self.layer(x)
    y.data = torch.zeros(2, 6) if y.sum() > -1e9 else y
    return y


def stateful(self, x):
    Net.count = getattr(Net, "count", 0) + 1
    return self.layer(x) * Net.count if x.sum() > 0 else x


def untold(self, x):
    with torch._C.DisableTorchFunction():  # as in a function of another library
        y = x * 2
    return self.layer(y if x.sum() > 0 else x)


def foreign(self, x):
    return self.layer(x) if x.sum() > 1e9 else fails(x)


def fails(x):
    if not torch.overrides._get_current_function_mode_stack():
        return x
    raise KeyError("nothing here")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (assigns, "meets an assignment to .data"),
        (stateful, "does not reproduce the module .output differs"),
        (untold, "follows the inputs and that no torch function made"),
        (foreign, r"stops at .*test_record.py:\d+, in fails .raise KeyError"),
    ],
)
def test_where_both_ways_fail_the_error_says_why_for_each(body, message):
    module = net(body)
    with pytest.raises(TraceError, match=message) as caught:
        trace(module, X)
    said = str(caught.value)
    assert "Net cannot be traced: symbolic tracing stops at" in said
    assert "recording a run" in said
    assert "torch.fx.wrap" in said


def test_compiled_modules_are_told():
    module = torch.compile(nn.Sequential(nn.Linear(6, 6)), backend="eager")
    with pytest.raises(TraceError, match=r"give the module that torch\.compile was given"):
        record(module, (X,), {})


# Merging ----------------------------------------------------------------------------------------------------------


def merged_body(self, x):
    if x.sum() < -1e9:
        return x
    x = torch.relu(self.layer(x) + self.table[:1] * 0 + TABLE[:1])
    x = self.cell(x.view(x.shape[0], 6))
    x = self.norm(x)
    return F.linear(x, self.head.weight)[:, :4] * self.scale[:4]


def attending(self, x):
    if x.sum() < -1e9:
        return x
    x = self.layer(x.view(-1, 1, 6) * torch.tensor([1.0, -1.0]).view(2, 1))
    out, (hidden, _) = self.lstm(x)
    out = self.attention(self.head(out), self.head(out), self.head(out))[0]
    return self.words.weight[:3] @ (out.mean(1) * hidden[-1]).unsqueeze(-1)


@pytest.mark.parametrize("body", [merged_body, attending])
def test_a_permuted_twin_merges_into_the_parent(body, tmp_path):
    module = net(body)
    classes = fxmerge.infer_classes(module, X)
    assert classes.traced.origin == "recorded"
    assert sum(c.size for c in classes if c.free) >= 12
    checked = fxmerge.verify(module, classes)
    assert checked.moved > 0
    assert checked.error <= 1e-9
    twin = fxmerge.permute(module, classes, seed=1)
    result = fxmerge.merge(module, twin, example_inputs=X, device="cpu", progress=False)
    assert list(result.module.state_dict()) == list(module.state_dict())
    torch.testing.assert_close(result.module.state_dict(), module.state_dict())
    assert any("recorded from one run" in note for note in result.report.notes)
    for graph_module in (copy.deepcopy(result.module), pickle.loads(pickle.dumps(result.module))):
        assert_follows(graph_module, module, torch.cat([X, X, X]))
    result.save(tmp_path / "out")
    assert_follows(fxmerge.load(tmp_path / "out"), module, torch.cat([X, X, X]))


def test_statistics_come_from_batches_of_any_size():
    module = net(merged_body)
    twin = fxmerge.permute(module, fxmerge.infer_classes(module, X), seed=1)
    data = [3 * torch.randn(size, 6) for size in (80, 80, 3)]
    result = fxmerge.merge(module, twin, example_inputs=X, data=data, repair=None, device="cpu", progress=False)
    torch.testing.assert_close(result.module.state_dict(), module.state_dict())
    with pytest.raises(fxmerge.InputError, match=r"batch 1 of the data .* must be of shape \[any, 6\]"):
        fxmerge.merge(module, twin, example_inputs=X, data=[X, torch.rand(2, 5)], device="cpu", progress=False)


def test_packed_sequences_leave_hidden_units_free():
    module = net(sequences)
    classes = fxmerge.infer_classes(module, (IDS, torch.tensor([3, 2])))
    free = [c for c in classes if c.free]
    assert sorted(str(site) for site in free[0].sites) == ["lstm.weight_ih_l0:1", "words.weight:1"]
    assert "lstm.weight_hh_l0:1" in map(str, free[1].sites)
    assert fxmerge.verify(module, classes).ok


def test_entries_chosen_by_the_data_keep_their_neurons_free():
    def body(self, x):
        y = self.cell(x.view(-1, 2, 3).repeat(1, 1, 2))
        return self.head(y[torch.arange(len(x)), x.argmax(-1) % 2])

    classes = fxmerge.infer_classes(net(body), X)
    assert any(c.free and "cell.layer.weight:0" in map(str, c.sites) for c in classes)
    assert fxmerge.verify(net(body), classes).ok


def test_one_neuron_all_over_is_said_once():
    def body(self, x):
        x = x + self.words.weight[0].mean() + self.words(torch.zeros(1, dtype=torch.long))
        for _ in range(12):
            x = self.layer(F.layer_norm(x, (6,))) + x
        return self.head(x) if x.sum() > -1e9 else x

    started = time.perf_counter()
    fxmerge.infer_classes(net(body), X)
    assert time.perf_counter() - started < 30  # doubled with every layer, it would be minutes


def test_networks_that_cast_are_verified_in_float64():
    def body(self, x):
        x = self.layer(x).to(torch.float32)
        x = x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6) * torch.tensor([2.0]).type(torch.float32)
        return self.head(x) if x.sum() > -1e9 else x

    classes = fxmerge.infer_classes(net(body), X)
    assert fxmerge.verify(net(body), classes).error < 1e-13


@torch.fx.wrap
def single(x: Tensor) -> Tensor:
    if x.dtype == torch.float64:
        raise RuntimeError("no kernel for Double")
    return x


def test_networks_without_kernels_for_float64_are_told():
    module = net(lambda self, x: self.head(single(self.layer(x))))
    classes = fxmerge.infer_classes(module, X)
    with pytest.raises(fxmerge.FxMergeError, match=r"does not run in float64.*no kernel.*verify=False"):
        fxmerge.verify(module, classes)


def test_constants_of_either_front_end_reach_the_fused_network():
    for body in (lambda self, x: self.layer(x + torch.ones(6)), attributes):
        module = net(body)
        result = fxmerge.merge(module, net(body), example_inputs=X, device="cpu", progress=False)
        assert list(result.module.state_dict()) == list(module.state_dict())
        assert_follows(fxmerge.merge(module, module, example_inputs=X, device="cpu", progress=False).module, module, X)


class Skipping(nn.Module):
    """In training, each of its layers is left out every other time."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Cell() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if not (self.training and torch.rand(()) < 0.5):
                x = layer(x)
        return x


class Chooses(nn.Module):
    """As many rows go on as values say, and they are written into a tensor made to their number."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.first, self.score, self.second, self.head = (nn.Linear(6, n) for n in (6, 1, 6, 3))
        randomise(self.double().eval(), seed)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = torch.tanh(self.first(x)).flatten(0, 1)
        chosen = x[self.score(x)[:, 0] > 0]
        made = torch.zeros((len(chosen) + 0, 6), dtype=x.dtype, device=x.device)
        for level in (chosen.sum(1) > 0, chosen.sum(1) <= 0):
            at = torch.where(level)[0]
            made[at] = self.second(chosen[at])
        return {"rows": self.head(made.relu()), "all": self.score(x).view(2, -1)}


def test_numbers_follow_what_values_choose():
    rng = torch.Generator().manual_seed(0)
    x, *others = torch.randn(5, 2, 8, 6, dtype=torch.float64, generator=rng)
    a, b = Chooses(0), Chooses(1)
    counts = {len(network(v)["rows"]) for network in (a, b) for v in (x, *others)}
    assert len(counts) > 3
    assert trace(a, x).origin == "recorded"
    for options in ({}, {"data": [x, *others], "repair": LeastSquares()}, {"data": [x, *others], "repair": Rescale()}):
        result = fxmerge.merge(a, b, example_inputs=x, progress=False, **options)
        network = Chooses(0)
        network.load_state_dict(result.module.state_dict())
        for v in (x, *others):
            torch.testing.assert_close(result.module(v), network(v))
    told = [n for n in result.report.notes if "matched on weights" in n]
    assert "second.weight" in told[0]
    assert "first.weight" not in told[0]


def test_networks_without_inputs_are_recorded():
    class Makes(Chooses):
        def forward(self, count: int = 4) -> Tensor:
            x = torch.eye(6, dtype=torch.float64)[:count]
            return self.head(self.first(x[x.sum(1) > 0]).relu())

    result = fxmerge.merge(Makes(0), Makes(0), example_inputs={}, progress=False)
    torch.testing.assert_close(result.module(), Makes(0)())


class Reads(Chooses):
    """A number that is read off values, and is no size."""

    def forward(self, x: Tensor) -> Tensor:
        scale = round(8 * x[0, 0].abs().sum().item())
        return self.head(scale * self.first(x).relu()).view(x.shape[0], -1)


def test_the_batch_is_followed_where_values_cannot_be():
    x = torch.randn(2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    module = Reads(0)
    traced = trace(module, x)
    assert VALUES_DECIDE in traced.notes
    assert not any("batch size is fixed" in note for note in traced.notes)
    more = torch.cat([x, x, x.flip(1)])
    torch.testing.assert_close(traced.graph_module(more), module(more))


class Loops(Chooses):
    """An operation for every row."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x)).flatten(0, 1)
        return sum((self.head(self.second(row)) for row in x[self.score(x)[:, 0].gt(0)]), self.head(self.second(x[0])))


def test_runs_that_went_different_ways_are_told_apart_from_architectures():
    x = torch.randn(2, 8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(StructureError, match="Values of tensors decide which operations run"):
        fxmerge.merge(Loops(0), Loops(1), example_inputs=x, progress=False)


def test_layers_left_out_at_random_in_training_follow_mode_and_batch():
    graph_module, notes = record(Skipping(), (X,), {})
    assert notes == ()
    assert graph_module(X.repeat(5, 1)).shape == (10, 6)
    told = [n.kwargs["training"] for n in graph_module.graph.nodes if n.target is F.dropout]
    assert len(told) == 4
    assert not any(isinstance(value, bool) for value in told)


def test_a_tied_parameter_is_read_under_any_of_its_names():
    def body(self, x):
        return self.head(x)

    _, notes = record(Net(body), (X,), {})
    (unread,) = notes
    assert "'layer.weight'" in unread
    assert "layer.bias" not in unread
    assert "head.bias" not in unread


def test_a_refusal_while_recording_names_the_line():
    def body(self, x):
        x.data = x.data * 2
        return self.head(x)

    with pytest.raises(TraceError, match=r"assignment to .data.* at .*test_record.py:\d+, in body"):
        record(Net(body), (X,), {})
