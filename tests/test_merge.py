"""The pipeline from parents to one network: what goes in, what comes out, and that nothing else changes."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from networks import NETWORKS, randomise
from torch import Tensor, nn
from torch.nn import functional as F
from versions import PERSISTENCE

import fxmerge
from fxmerge.coupling import from_permutations, fuse
from fxmerge.matchers import ActivationMatching, Average, WeightMatching
from fxmerge.symmetry import relative_error

X = torch.randn(32, 5, generator=torch.Generator().manual_seed(1))
LABELS = torch.randint(3, (32,), generator=torch.Generator().manual_seed(2))


class Net(nn.Module):
    """BatchNorm, a hidden layer with a bias, a buffer outside the state_dict, and dropout."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.stem, self.norm, self.inner = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 6)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(6, 3)
        self.register_buffer("scale", torch.full((6,), 0.5), persistent=False)
        randomise(self, seed)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        return self.head(self.drop(torch.tanh(self.inner(x)) * self.scale))


class AuxiliaryHead(nn.Module):
    """Its second head speaks in training only; it comes before the head that stays."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.stem, self.auxiliary, self.head = nn.Linear(5, 8), nn.Sequential(nn.Linear(8, 4)), nn.Linear(8, 3)
        self.auxiliary.register_buffer("seen", torch.tensor(seed))
        randomise(self, seed)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = torch.tanh(self.stem(x))
        return (self.head(x), self.auxiliary(x)) if self.training else self.head(x)


class TwoInputs(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(5, 8), nn.Linear(4, 8), nn.Linear(8, 3)
        randomise(self, seed)

    def forward(self, x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
        return self.head(torch.tanh(self.left(x) + self.right(y)) * scale)


def net(seed: int, training: bool = False) -> nn.Module:
    return Net(seed).train(training)


def merge(*models: nn.Module, **options) -> fxmerge.MergeResult:
    return fxmerge.merge(*models, **{"example_inputs": X[:2], "progress": False, **options})


def same(a: nn.Module, b: nn.Module, tolerance: float = 0.0) -> None:
    torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=tolerance, atol=tolerance)


# The fused network ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [None, [X]], ids=["weights", "activations"])
def test_the_fused_network_has_the_keys_of_the_first_parent_and_loads_into_it(data):
    a, b = net(0), net(1)
    module = merge(a, b, data=data).module
    assert isinstance(module, torch.fx.GraphModule)
    assert list(module.state_dict()) == list(a.state_dict())
    assert [n for n, _ in module.named_buffers()] == [n for n, _ in a.named_buffers()]
    assert [v.dtype for v in module.state_dict().values()] == [v.dtype for v in a.state_dict().values()]
    a.load_state_dict(module.state_dict())
    torch.testing.assert_close(a(X), module(X))


def test_tied_parameters_stay_tied():
    case = NETWORKS["tied_embedding"]
    a, b = case.make(), randomise(case.make(), seed=1)
    module = merge(a, b, example_inputs=case.example_inputs).module
    assert list(module.state_dict()) == list(a.state_dict())
    assert module.embed.weight is module.out.weight
    assert len(list(module.parameters())) == len(list(a.parameters()))


def test_modules_that_evaluation_does_not_use_keep_their_keys_and_places():
    a, b = AuxiliaryHead(0).eval(), AuxiliaryHead(1).eval()
    result = merge(a, b, weights=(0.25, 0.75))
    assert list(result.module.state_dict()) == list(a.state_dict())
    a.load_state_dict(result.module.state_dict())
    state = result.module.state_dict()
    expected = 0.25 * AuxiliaryHead(0).auxiliary[0].bias + 0.75 * b.auxiliary[0].bias
    torch.testing.assert_close(state["auxiliary.0.bias"], expected.detach())
    assert int(state["auxiliary.seen"]) == 0  # integers are the first parent's
    assert "'auxiliary.0.weight'" in str(result.report)


def test_the_fused_network_shares_nothing_and_can_be_trained():
    a, b = net(0), net(1)
    module = merge(a, b).module
    held = {t.untyped_storage().data_ptr() for m in (a, b) for t in m.state_dict().values()}
    assert not held & {t.untyped_storage().data_ptr() for t in module.state_dict().values()}
    before = copy.deepcopy(a.state_dict())
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        loss = F.cross_entropy(module(X), LABELS)
        losses.append(float(loss.detach()))
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.any()) for p in module.parameters())
        optimiser.step()
    assert losses[0] > losses[1] > losses[2]
    torch.testing.assert_close(a.state_dict(), before, rtol=0, atol=0)


@PERSISTENCE
@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_the_fused_network_is_copied_and_pickled(again):
    module = merge(net(0), net(1)).module
    twin = again(module)
    same(twin, module)
    torch.testing.assert_close(twin(X), module(X), rtol=0, atol=0)


@pytest.mark.parametrize("training", [False, True])
def test_the_fused_network_is_in_the_first_parents_mode(training):
    module = merge(net(0, training), net(1)).module
    assert all(m.training is training for m in module.modules())


def test_the_batch_size_stays_free():
    module = merge(net(0), net(1)).module
    assert module(X[:7]).shape == (7, 3)


def test_requires_grad_is_the_first_parents():
    a = net(0)
    a.stem.requires_grad_(False)
    module = merge(a, net(1)).module
    assert {n: p.requires_grad for n, p in module.named_parameters()} == {
        n: p.requires_grad for n, p in a.named_parameters()
    }


# The parents ------------------------------------------------------------------------------------------------


def snapshot(module: nn.Module) -> dict[str, object]:
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {
        "modes": [m.training for m in module.modules()],
        "objects": {n: (id(t), t.data_ptr(), t.requires_grad) for n, t in tensors.items()},
        "attributes": [sorted(vars(m)) for m in module.modules()],
        "hooks": [(list(m._forward_hooks), list(m._forward_pre_hooks)) for m in module.modules()],
        "gradients": [p.grad is None for p in module.parameters()],
    }


@pytest.mark.parametrize("data", [None, [X, X + 1]], ids=["weights", "activations"])
def test_parents_and_random_states_are_left_as_they_were(data):
    parents = [net(0, training=True), net(1)]
    parents[0].norm.eval()
    parents[0].head.bias.requires_grad_(False)
    parents[1].stem.register_forward_hook(lambda *_: None)
    before = [snapshot(p) for p in parents]
    values = [copy.deepcopy(dict([*p.named_parameters(), *p.named_buffers()])) for p in parents]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    merge(*parents, data=data)
    fxmerge.align(parents[1], to=parents[0], example_inputs=X[:2], data=data, progress=False)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()  # noqa: NPY002
    for parent, then, old in zip(parents, before, values, strict=True):
        assert snapshot(parent) == then
        for name, value in [*parent.named_parameters(), *parent.named_buffers()]:
            assert torch.equal(value, old[name]), name


def test_a_network_may_be_merged_with_itself():
    a = net(0)
    same(merge(a, a).module, a, tolerance=1e-6)


def test_settings_that_only_training_reads_may_differ():
    a, b = net(0), net(1)
    expected = merge(a, b).module
    b.drop.p, b.norm.momentum = 0.5, 0.01
    same(merge(a, b).module, expected)


# Inputs and data --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "said", "shape"),
    [
        (lambda: NETWORKS["mlp"].make(), "'0' (Linear with 5 input features)", (4, 5)),
        (lambda: NETWORKS["conv_chain"].make(), "'0' (Conv2d with 3 input channels)", (4, 3, 16, 16)),
    ],
    ids=["perceptron", "convolutional"],
)
def test_two_networks_alone_are_enough(make, said, shape):
    a, b = make(), randomise(make(), seed=1)
    result = fxmerge.merge(a, b)
    assert "WeightMatching" in str(result.report)
    assert f"example inputs inferred from {said}" in str(result.report)
    assert result.module(torch.zeros(shape)).shape[0] == 4


def test_two_networks_alone_merge_as_with_example_inputs():
    a, b = NETWORKS["mlp"].make(), randomise(NETWORKS["mlp"].make(), seed=1)
    same(fxmerge.merge(a, b, progress=False).module, merge(a, b).module)


def as_iterator() -> Iterator[Tensor]:
    yield from X.split(16)


class Shuffled:
    """A loader that hands its batches out in another order each time, as ``shuffle=True`` does."""

    def __iter__(self) -> Iterator[Tensor]:
        batches = X.split(16)
        return iter([batches[i] for i in torch.randperm(len(batches))])


@pytest.mark.parametrize(
    ("data", "options"),
    [
        ([(x, y) for x, y in zip(X.split(16), LABELS.split(16), strict=True)], {}),
        ([[x, y] for x, y in zip(X.split(16), LABELS.split(16), strict=True)], {}),
        (torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, LABELS), batch_size=16), {}),
        ([{"image": x, "target": None} for x in X.split(16)], {"input_fn": lambda batch: batch["image"]}),
        ([{"x": x, "y": LABELS} for x in X.split(16)], {"example_inputs": {"x": X[:2]}}),
        (as_iterator(), {}),
        ((x for x in X.split(16)), {}),
    ],
    ids=["pairs", "lists", "loader", "input_fn", "dicts", "iterator", "generator"],
)
def test_any_iterable_of_batches_will_do(data, options):
    a, b = net(0), net(1)
    expected = merge(a, b, data=list(X.split(16)))
    same(merge(a, b, data=data, **options).module, expected.module)


def test_a_shuffled_loader_does_not_touch_the_random_state():
    a, b, state = net(0), net(1), torch.get_rng_state()
    merge(a, b, data=Shuffled())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_networks_with_several_inputs(form):
    y = torch.randn(32, 4, generator=torch.Generator().manual_seed(3))
    a = TwoInputs(0).eval()
    inputs = {"tuple": (X[:2], y[:2]), "dict": {"y": y[:2], "x": X[:2]}}[form]
    batch = {"tuple": (X, y, LABELS), "dict": {"target": LABELS, "y": y, "x": X}}[form]
    twin = fxmerge.permute(a, fxmerge.infer_classes(a, inputs), seed=1)
    result = merge(a, twin, example_inputs=inputs, data=[batch], repair=None)
    same(result.module, a, tolerance=1e-6)
    torch.testing.assert_close(result.module(X, y), a(X, y))


# Shares, seeds, several parents -----------------------------------------------------------------------------


def test_shares_are_those_of_a_plain_average():
    a, b = net(0), net(1)
    result = merge(a, b, matcher=Average(), weights=(3, 1))
    assert result.report.weights == (0.75, 0.25)
    for name, value in result.module.state_dict().items():
        one, two = a.state_dict()[name], b.state_dict()[name]
        expected = 0.75 * one + 0.25 * two if one.is_floating_point() else one
        torch.testing.assert_close(value, expected, msg=name)


def test_a_share_of_one_is_that_parent():
    a, b = net(0), net(1)
    same(merge(a, b, weights=(1, 0)).module, a)
    other = merge(a, b, weights=(0, 1)).module
    torch.testing.assert_close(other(X), b(X))
    assert not torch.equal(other.state_dict()["stem.weight"], b.state_dict()["stem.weight"])


@pytest.mark.parametrize("matcher", [WeightMatching(), ActivationMatching()], ids=str)
def test_three_parents(matcher):
    parents = [net(seed).double() for seed in range(3)]
    x, shares = X.double(), (0.2, 0.3, 0.5)
    data = [x] if matcher.needs_data else None
    options = {"example_inputs": x[:2], "data": data, "matcher": matcher, "repair": None}
    result = merge(*parents, weights=shares, **options)
    assert result.report.weights == shares
    assert len(result.report.verifications) == 3
    for k, parent in enumerate(parents):  # each parent alone, at the places it was given
        only = [float(j == k) for j in range(3)]
        found = [[u.T.argmax(1) for u in c.unmerge.split(c.widths)] for c in result.alignment.couplings]
        alignment = from_permutations(
            result.report.classes, list(zip(*found, strict=True)), [only] * len(result.report.classes), ""
        )
        classes = [fxmerge.infer_classes(p, x[:2]) for p in parents]
        alone = fuse(classes, classes[0], alignment, [p.state_dict() for p in parents], only)
        with torch.no_grad():
            assert relative_error(parent(x), torch.func.functional_call(parent, dict(alone), (x,))) < 1e-9


@pytest.mark.parametrize("count", [2, 3])
def test_twins_average_to_themselves_to_the_last_digits(count):
    """Shares of a third must be thirds in the parents' own precision."""
    a, x = net(0).double(), X.double()
    classes = fxmerge.infer_classes(a, x[:2])
    twins = [fxmerge.permute(a, classes, seed=s) for s in range(1, count)]
    shares = [0.3, 0.7] if count == 2 else None
    same(merge(a, *twins, example_inputs=x[:2], weights=shares).module, a, tolerance=1e-14)


@pytest.mark.parametrize("data", [None, list(X.split(8))], ids=["weights", "activations"])
def test_the_seed_decides_and_nothing_else(data):
    results = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        results.append(merge(net(0), net(1), data=data, seed=5))
    same(results[0].module, results[1].module)
    assert results[0].alignment.quality == results[1].alignment.quality


# Alignment --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [None, [X]], ids=["weights", "activations"])
def test_an_aligned_network_is_of_the_same_class_and_function(data):
    a, b = net(0), net(1, training=True)
    moved = fxmerge.align(b, to=a, example_inputs=X[:2], data=data, progress=False)
    assert type(moved) is Net
    assert moved.training
    assert list(moved.state_dict()) == list(b.state_dict())
    assert not torch.equal(moved.stem.weight, b.stem.weight)
    torch.testing.assert_close(moved.eval()(X), b.eval()(X))
    merged = merge(a, b, data=data, repair=None).module.state_dict()
    for name, value in moved.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(merged[name], (a.state_dict()[name] + value) / 2)


def test_alignment_lowers_the_barrier_between_trained_networks():
    """Two perceptrons on scikit-learn's digits, a few steps from different seeds."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    x, y = torch.from_numpy(digits.data).float() / 16, torch.from_numpy(digits.target)

    def train(seed: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
            optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
            for _ in range(5):
                for batch in torch.randperm(len(x)).split(64):
                    optimiser.zero_grad()
                    F.cross_entropy(model(x[batch]), y[batch]).backward()
                    optimiser.step()
        return model.eval()

    a, b = train(0), train(1)
    data = [(x, y)]
    plain = fxmerge.evaluate_barrier(a, b, data, points=5, progress=False)
    for options in ({}, {"data": data}):
        moved = fxmerge.align(b, to=a, example_inputs=x[:2], progress=False, **options)
        barrier = fxmerge.evaluate_barrier(a, moved, data, points=5, progress=False)
        assert barrier.loss[0] == plain.loss[0]
        assert barrier.loss[-1] == pytest.approx(plain.loss[-1], rel=1e-5)
        assert barrier.barrier < 0.7 * plain.barrier


# Reports and files ------------------------------------------------------------------------------------------


def test_the_report_says_what_a_reader_needs():
    result = merge(net(0), net(1), data=[X], weights=(3, 1))
    text = str(result.report)
    for phrase in (
        "merged 0.75 Net, 0.25 Net by ActivationMatching()",
        "stem.weight:0",
        "14 of 22 neurons free; pinned:",
        "the network's input",
        "the network's output",
        "verified Net: ok: ",
        "relative error",
        "repair: statistics of 1 BatchNorm layers re-estimated on 1 batches",
        "variance of activations over the parents'",
        "before repair",
        "seconds: trace ",
    ):
        assert phrase in text, phrase
    assert text.count("verified Net") == 2
    row = next(line.split() for line in text.splitlines() if line.startswith("stem.weight:0"))
    assert row[1] == "8"
    assert -1 <= float(row[2]) <= 1


def test_the_classes_say_what_a_reader_needs():
    case = NETWORKS["attention_separate"]
    text = str(fxmerge.infer_classes(case.make(), case.example_inputs))
    phrases = (
        "class",
        "neurons",
        "sites",
        "embed.weight:0",
        "free",
        "free blocks of 4",
        "pinned: the network's output",
    )
    for phrase in phrases:
        assert phrase in text, phrase
    assert text.splitlines()[-1].endswith("neurons are free")
    assert any(line.startswith("  ") for line in text.splitlines())  # what is inside a block is set in


def test_verification_can_be_left_out():
    result = merge(net(0), net(1), verify=False)
    assert result.report.verifications == ()
    assert "verified" not in str(result.report)
    same(result.module, merge(net(0), net(1)).module)


def test_a_result_is_saved_and_loaded(tmp_path):
    result = merge(net(0), net(1), data=[X], weights=(3, 1))
    folder = result.save(tmp_path / "out")
    module = fxmerge.load(folder)
    assert list(module.state_dict()) == list(result.module.state_dict())
    same(module, result.module)
    torch.testing.assert_close(module(X), result.module(X), rtol=0, atol=0)
    recipe = json.loads((folder / "recipe.json").read_text())
    assert recipe["result"]["method"] == "ActivationMatching()"
    assert (recipe["weights"], recipe["result"]["shares"]) == ([3, 1], [0.75, 0.25])
    assert [parent["model"] for parent in recipe["parents"]] == ["Net", "Net"]
    assert recipe["repair"] == {"name": "ResetBatchNorm", "options": {}}
    assert set(recipe["result"]["quality"]) == {c.name for c in result.report.classes if c.free}
    assert {p.name for p in folder.iterdir()} >= {"model.safetensors", "graph.json", "recipe.json", "report.html"}


@pytest.mark.parametrize("name", ["dense_block", "windowed_attention", "tied_embedding"])
def test_any_network_is_saved_and_loaded(name, tmp_path):
    case = NETWORKS[name]
    result = merge(case.make(), randomise(case.make(), seed=1), example_inputs=case.example_inputs)
    result.save(tmp_path / "out")
    again = fxmerge.load(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(again(*case.example_inputs), result.module(*case.example_inputs), rtol=0, atol=0)


def test_merge_and_align_take_the_same_arguments():
    ours, theirs = (set(inspect.signature(f).parameters) for f in (fxmerge.merge, fxmerge.align))
    assert theirs - ours == {"model", "to"}
    assert ours - theirs == {"models", "weights", "heads", "depth", "target", "repair", "strict", "statistics"}
