"""Bad input: every case is an error of fxmerge that says what is wrong and the way out, before anything long starts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge import FormatError, FxMergeError, InputError, StructureError, TraceError
from fxmerge.interfaces import AbstractMatcher
from fxmerge.matchers import ActivationMatching, WeightMatching
from fxmerge.repair import Rescale, ResetBatchNorm

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
POISONED = X.clone()
POISONED[2, 3] = torch.nan


class Started(AbstractMatcher):
    """Stands for the long work: complaints must come before it."""

    def __init__(self, needs_data: bool = False) -> None:
        self.needs_data = needs_data

    def match(self, problem: Any) -> Any:
        raise AssertionError("matching started")


def net(inputs: int = 5, hidden: int = 8, classes: int = 3, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), activation(), nn.Linear(hidden, classes))


def deep(activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 8), activation(), nn.Linear(8, 8), activation(), nn.Linear(8, 3))


def normed() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def conv(stride: int = 1, groups: int = 1) -> nn.Sequential:
    layers = (nn.Conv2d(4, 4, 3, stride, groups=groups), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    return nn.Sequential(*layers)


class Skip(nn.Module):
    def __init__(self, skip: bool) -> None:
        super().__init__()
        self.inner, self.outer, self.skip = nn.Linear(5, 5), nn.Linear(5, 3), skip

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x) + x if self.skip else self.inner(x))


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(5, 3), iter(range(1, 100))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x if x.sum() > 0 else -x) * next(self.calls)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.layer(x) + y


def changed(model: nn.Module, change: Callable[[nn.Module], Any]) -> nn.Module:
    change(model)
    return model


def quantised() -> nn.Module:
    model = net()
    packed = torch.ones(8, 5, dtype=torch.int8)
    model[0].weight = nn.Parameter(packed, requires_grad=False)
    return model


# name -> (parents, options, error, what its message says)
CASES: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[FxMergeError], str]] = {
    "one more layer": ((net(activation=nn.Tanh), deep(nn.Tanh)), {}, StructureError, r"'2' cannot.*2 -> 3.*shrink"),
    "one layer less": ((deep(), net()), {"depth": "shrink"}, StructureError, r"no unit in a stage.*grow"),
    "a norm more": ((net(), normed()), {}, StructureError, r"(?s)stages of the (first|second) .*BatchNorm1d"),
    "an unknown depth": ((net(), net()), {"depth": "stretch"}, InputError, "depth='stretch'.*'grow', 'shrink'"),
    "an unknown target": ((net(), net()), {"target": "wider"}, InputError, "target='wider'.*'deeper', 'shallower'"),
    "a shortcut more": ((Skip(False), Skip(True)), {}, StructureError, r"differ in structure.*same architecture"),
    "another activation": ((net(), net(activation=nn.Tanh)), {}, StructureError, r"(?i)relu.*tanh"),
    "another stride": ((conv(1), conv(2)), {"example_inputs": torch.ones(2, 4, 8, 8)}, StructureError, "stride"),
    "other groups": (
        (conv(groups=2), conv(groups=1)), {"example_inputs": torch.ones(2, 4, 8, 8)}, StructureError, "differ",
    ),
    "another width": ((net(), net(hidden=9)), {}, StructureError, r"width at '0\.weight:0': 8 against 9.*equal widths"),
    "another head": ((net(), net(classes=4)), {}, StructureError, r"outputs.* at '2\.weight:0': 3 against 4.*heads"),
    "another input": ((net(), net(inputs=6)), {}, FxMergeError, r"5.*6"),
    "another dtype": ((net(), net().double()), {}, FxMergeError, r"(?i)dtype|float64|double"),
    "NaN in a parameter": (
        (net(), changed(net(), lambda m: m[2].weight.data[0].fill_(torch.nan))), {}, InputError, r"'2\.weight'.* 8 NaN",
    ),
    "inf in a parameter": (
        (changed(net(), lambda m: m[0].bias.data[1].fill_(torch.inf)), net()), {}, InputError,
        r"'0\.bias'.* 1 NaN or inf",
    ),
    "NaN in a buffer": (
        (normed(), changed(normed(), lambda m: m[1].running_var[:2].fill_(torch.nan))), {}, InputError,
        r"'1\.running_var'.* 2 NaN",
    ),
    "a quantised parameter": ((net(), quantised()), {}, InputError, r"'0\.weight'.*quantised.*merge the floating"),
    "an untraceable module": (
        (Branches(), Branches()), {"example_inputs": X}, TraceError,
        r"(?s)x\.sum\(\) > 0.*branches.*torch\.fx\.wrap",
    ),
    "inputs that cannot be guessed": ((TwoInputs(), TwoInputs()), {}, InputError, r"x, y.*give example_inputs="),
    "inputs that do not fit": ((net(), net()), {"example_inputs": X[:, :4]}, InputError, r"\[6, 4\].*Give example"),
    "inputs of another kind": ((net(), net()), {"example_inputs": [X]}, InputError, "tensor, a tuple .*not list"),
    "no model": ((), {}, InputError, "two or more networks, got 0"),
    "one model": ((net(),), {}, InputError, "two or more networks, got 1"),
    "models in a list": (([net(), net()],), {}, InputError, "two or more networks"),
    "a path": ((net(), "model.pt"), {}, InputError, r"nn\.Modules, got str; load checkpoints into a module first"),
    "a state dict": ((net(), net().state_dict()), {}, InputError, "nn.Modules, got OrderedDict"),
    "too few weights": ((net(), net()), {"weights": [1.0]}, InputError, r"weights=\[1\.0\].*each of the 2 networks"),
    "too many weights": ((net(), net()), {"weights": (1, 1, 1)}, InputError, r"each of the 2 networks"),
    "a negative weight": ((net(), net()), {"weights": (1.5, -0.5)}, InputError, r"non-negative share"),
    "weights of nothing": ((net(), net()), {"weights": (0.0, 0.0)}, InputError, r"weights=\[0\.0, 0\.0\]"),
    "a NaN weight": ((net(), net()), {"weights": (torch.nan, 1)}, InputError, r"weights=\[nan, 1\]"),
    "an infinite weight": ((net(), net()), {"weights": (torch.inf, 1)}, InputError, r"weights=\[inf, 1\]"),
    "a method without its data": (
        (net(), net()), {"matcher": ActivationMatching()}, InputError,
        r"ActivationMatching.* pass data=loader.*WeightMatching",
    ),
    "a repair without its data": (
        (net(), net()), {"repair": ResetBatchNorm()}, InputError, r"ResetBatchNorm.* needs data: pass data=loader",
    ),
    "an empty list": ((net(), net()), {"data": []}, InputError, "data is empty.*at least one batch"),
    "an exhausted iterator": ((net(), net()), {"data": iter([])}, InputError, "data is empty.*at least one batch"),
    "an empty loader, method without data": (
        (net(), net()), {"data": [], "matcher": Started()}, InputError, "data is empty",
    ),
    "a tensor for data": ((net(), net()), {"data": X}, InputError, r"iterable of batches.*data=\[tensor\]"),
    "a number for data": ((net(), net()), {"data": 3}, InputError, "iterable of batches, got int"),
    "batches of another width": ((net(), net()), {"data": [X[:, :4]]}, InputError, r"does not fit.*input_fn"),
    "batches under a foreign key": ((net(), net()), {"data": [{"image": X}]}, InputError, "fit.*'image'.*input_fn"),
    "an input_fn that fails": (
        (net(), net()), {"data": [X], "input_fn": lambda batch: batch["x"]}, InputError, r"does not fit.*input_fn",
    ),
    "NaN in the data": ((net(), net()), {"example_inputs": X, "data": [POISONED]}, InputError, r"NaN or inf.*check"),
    "inf in a later batch": ((net(), net()), {"example_inputs": X, "data": [X, X / 0]}, InputError, "NaN or inf"),
    "a later batch of another width": (
        (net(), net()), {"example_inputs": X, "data": [X, X[:, :4]]}, InputError,
        r"(?s)batch 1 .*does not fit.*input_fn",
    ),
    "a matcher's class": ((net(), net()), {"matcher": WeightMatching}, InputError, r"matcher.*WeightMatching\(\)"),
    "a matcher's name": ((net(), net()), {"matcher": "weights"}, InputError, r"matcher"),
    "a repair's name": ((net(), net()), {"repair": "batchnorm", "data": [X]}, InputError, r"repair"),
    "an unknown device": ((net(), net()), {"device": "warp"}, InputError, r"device.*warp"),
}  # fmt: skip


@pytest.mark.parametrize(("parents", "options", "error", "message"), CASES.values(), ids=CASES)
def test_bad_input_is_named_before_matching_starts(parents, options, error, message):
    options = {"matcher": Started(needs_data="data" in options), **options}
    with pytest.raises(error, match=message):
        fxmerge.merge(*parents, progress=False, **options)


@pytest.mark.parametrize("name", ["another stride", "another width", "NaN in a parameter", "a method without its data"])
def test_align_complains_alike(name):
    (a, b), options, error, message = CASES[name]
    with pytest.raises(error, match=message):
        fxmerge.align(b, to=a, progress=False, **{"matcher": Started(), **options})


@pytest.mark.parametrize(
    ("repair", "make"),
    [("auto", normed), ("auto", net), (ResetBatchNorm(), normed), (Rescale(), normed), (Rescale(), net)],
    ids=["auto normed", "auto net", "reset normed", "rescale normed", "rescale net"],
)
def test_nan_never_enters_by_way_of_a_repair(repair, make):
    """Matching on weights does not look at the data, the repair does."""
    options = {"example_inputs": X, "matcher": WeightMatching(), "repair": repair, "progress": False}
    parents = make(), make()
    with pytest.raises(InputError, match="NaN or inf"):
        fxmerge.merge(*parents, data=[X, POISONED], **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rescale(toward="last"), "'last'.*'mean', 'first'"),
        (lambda: ActivationMatching(at="nowhere"), "'nowhere'.*'read'.*'made'"),
        (lambda: WeightMatching(restarts=0), "restarts=0.*at least one start"),
        (lambda: WeightMatching(sweeps=-1), "sweeps=-1.*no fewer than 0 sweeps"),
    ],
    ids=["Rescale", "ActivationMatching", "WeightMatching restarts", "WeightMatching sweeps"],
)
def test_options_out_of_range(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_an_output_folder_that_exists_is_not_touched(tmp_path):
    result = fxmerge.merge(net(), net(), progress=False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(FormatError, match=r"out exists already.*give another folder"):
        result.save(tmp_path / "out")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "notes.txt"]


@pytest.mark.parametrize("name", ["one more layer", "NaN in the data", "batches of another width"])
def test_parents_are_as_they_were_after_an_error(name):
    parents, options, error, _ = CASES[name]
    parents = [copy.deepcopy(p).train() for p in parents]
    before = [copy.deepcopy(p.state_dict()) for p in parents]
    state = torch.get_rng_state()
    with pytest.raises(error):
        fxmerge.merge(*parents, progress=False, **options)
    assert torch.equal(state, torch.get_rng_state())
    for parent, values in zip(parents, before, strict=True):
        assert all(m.training for m in parent.modules())
        torch.testing.assert_close(parent.state_dict(), values, rtol=0, atol=0)


def test_every_error_of_the_package_is_an_fxmergeerror():
    public = [getattr(fxmerge, name) for name in fxmerge.__all__]
    errors = [e for e in public if isinstance(e, type) and issubclass(e, Exception)]
    assert len(errors) > 6
    assert all(issubclass(e, (FxMergeError, UserWarning)) for e in errors)
