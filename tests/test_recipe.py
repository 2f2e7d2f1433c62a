"""Recipes: every option of a merge as plain data, and nothing else back."""

from __future__ import annotations

import inspect
import json
import math
import sys

import pytest
import torch
from torch import nn

import fxmerge
from fxmerge import matchers, repair
from fxmerge.depth import CLAFusion
from fxmerge.errors import InputError
from fxmerge.matchers import CCAMerge, OTFusion, PLeaS, WeightMatching, ZipIt
from fxmerge.recipe import OPTIONS, describe_options, read_options
from fxmerge.repair import Distill, LeastSquares, Rescale

SAMPLES = [
    {"matcher": PLeaS(budget=1.25, of="flops", cost="both")},
    {"matcher": PLeaS(ratios={"0.weight": 0.5, "": 0})},
    {"matcher": OTFusion(reg=0.05, metric="cosine", barycenter=3)},
    {"matcher": ZipIt(until="layer3", beta=1)},
    {"matcher": CCAMerge(gamma=math.inf)},
    {"matcher": None, "repair": None, "target": None, "weights": None},
    {"matcher": "auto", "repair": "auto", "depth": "shrink", "target": "deeper"},
    {"repair": Distill(steps=3, first=LeastSquares(ridge=0.5))},
    {"depth": CLAFusion("shrink", join="sum", keep=True)},
    {"weights": [0.25, 0.75], "seed": 2**40, "device": "cpu", "strict": True, "verify": False, "heads": "separate"},
    {"weights": {"": [0.5, 0.5], "fc": [1, 0]}},
    *({"matcher": getattr(matchers, name)()} for name in matchers.__all__),
    *({"repair": getattr(repair, name)()} for name in repair.__all__),
]


@pytest.mark.parametrize("options", SAMPLES, ids=str)
def test_options_come_back(options) -> None:
    text = json.dumps(describe_options(options), allow_nan=False)
    back = read_options(json.loads(text))
    assert describe_options(back) == json.loads(text)
    assert {k: repr(v) for k, v in back.items()} == {k: repr(v) for k, v in options.items()}  # no defaults
    assert {k: type(v) for k, v in back.items()} == {k: type(v) for k, v in options.items()}


def test_every_option_of_every_method_is_spelled_out() -> None:
    for name in matchers.__all__:
        described = describe_options({"matcher": getattr(matchers, name)()})["matcher"]
        assert described["name"] == name
        assert list(described["options"]) == list(inspect.signature(getattr(matchers, name)).parameters)
    first = describe_options({"repair": Distill(first=Rescale())})["repair"]["options"]["first"]
    assert (first["name"], first["options"]["toward"]) == ("Rescale", "mean")
    assert list(first["options"]) == list(inspect.signature(Rescale).parameters)


def test_options_are_those_of_merge() -> None:
    known = inspect.signature(fxmerge.merge).parameters
    assert set(OPTIONS) == set(known) - {"models", "example_inputs", "data", "statistics", "input_fn", "progress"}


def test_short_forms() -> None:
    assert repr(read_options({"matcher": "PLeaS"})["matcher"]) == "PLeaS()"
    assert repr(read_options({"matcher": {"name": "PLeaS"}})["matcher"]) == "PLeaS()"
    assert repr(read_options({"matcher": {"name": "PLeaS", "options": {"budget": 2}}})["matcher"]) == "PLeaS(budget=2)"
    assert read_options({"parents": [], "data": None, "versions": {}, "result": {}}) == {}


def test_a_target_among_the_parents() -> None:
    parents = [nn.Linear(1, 1), nn.Linear(1, 1)]
    described = describe_options({"target": parents[1]}, parents)
    assert described == {"target": {"parent": 1}}
    assert read_options(described, parents)["target"] is parents[1]
    other = describe_options({"target": nn.ReLU()}, parents)
    assert other == {"target": {"model": "ReLU"}}
    for recipe in (other, {"target": {"parent": 2}}, {"target": {"parent": True}}, {"target": {"parent": -1}}):
        with pytest.raises(InputError, match="pass target=network"):
            read_options(recipe, parents)


def test_a_method_of_ones_own_is_described_but_not_read() -> None:
    class Mine(WeightMatching):
        def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
            self.network, self.dtype = network, dtype

    described = describe_options({"matcher": Mine(nn.ReLU(), torch.half)})
    assert described == {"matcher": {"name": "Mine", "options": {"network": "ReLU()", "dtype": "torch.float16"}}}
    with pytest.raises(InputError, match=r"matcher: 'Mine' is unknown; choose one of auto, ActivationMatching, "):
        read_options(described)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ([], "a mapping of options, not a list"),
        ({"macher": "PLeaS"}, "no option 'macher'; known are matcher, weights"),
        ({"matcher": "os.system"}, "'os.system' is unknown; choose one of auto, ActivationMatching"),
        ({"matcher": "LeastSquares"}, "'LeastSquares' is unknown"),
        ({"matcher": {"name": ["PLeaS"]}}, "is unknown"),
        ({"matcher": {"options": {}}}, r"matcher: .* is no method \(one of auto, ActivationMatching.* or null"),
        ({"matcher": {"name": "PLeaS", "budget": 2}}, r"write \{name: PLeaS, options"),
        ({"matcher": {"name": "PLeaS", "options": [2]}}, r"write \{name: PLeaS, options"),
        ({"matcher": {"name": "PLeaS", "options": {"bugdet": 2}}}, "PLeaS has no option 'bugdet'; it has budget, of"),
        ({"matcher": {"name": "Average", "options": {"__class__": 2}}}, "Average has no option .* it has none"),
        ({"matcher": {"name": "PLeaS", "options": {"budget": "2"}}}, r"PLeaS\(budget\): '2' is no number"),
        ({"matcher": {"name": "PLeaS", "options": {"budget": True}}}, r"PLeaS\(budget\): 'True' is no number"),
        ({"matcher": {"name": "PLeaS", "options": {"budget": 0}}}, r"PLeaS\(budget=0\): at least 1"),
        ({"matcher": {"name": "PLeaS", "options": {"ratios": {"a": "b"}}}}, r"no Mapping\[str, float\] or null"),
        ({"matcher": {"name": "OTFusion", "options": {"metric": "l1"}}}, "choose one of 'euclidean', 'cosine'"),
        ({"matcher": {"name": "WeightMatching", "options": {"restarts": 1.5}}}, "no whole number"),
        ({"repair": {"name": "Distill", "options": {"first": "PLeaS"}}}, "'PLeaS' is unknown"),
        ({"repair": {"name": "Distill", "options": {"first": 3}}}, "is no method"),
        ({"depth": "sideways"}, "choose one of grow, shrink, CLAFusion"),
        ({"depth": None}, "is no method"),
        ({"weights": "half"}, "weights: 'half' is no Sequence"),
        ({"weights": [0.5, None]}, "weights"),
        ({"seed": "0"}, "seed: '0' is no whole number"),
        ({"strict": 1}, "strict: '1' is no true or false"),
        ({"device": 0}, "device: '0' is no text"),
    ],
)
def test_what_cannot_be_meant_is_refused(recipe, message) -> None:
    before = set(sys.modules)
    with pytest.raises(InputError, match=message):
        read_options(recipe)
    assert set(sys.modules) == before


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("PLeaS(budget=1.3)", PLeaS(1.3)),
        (" OTFusion(reg=0.5, cost='weights') ", OTFusion(reg=0.5, cost="weights")),
        ("PLeaS", PLeaS()),
    ],
)
def test_a_method_may_be_typed_as_in_python(text, same):
    assert repr(read_options({"matcher": text})["matcher"]) == repr(same)


def test_methods_inside_methods_may_be_typed():
    read = read_options({"repair": "Distill(steps=3, first=LeastSquares())"})["repair"]
    assert repr(read) == "Distill(steps=3, first=LeastSquares())"


@pytest.mark.parametrize(
    "text", ["PLeaS(1.3)", "PLeaS(budget=", "Foo(a=1)", "PLeaS(budget=__import__('os'))", "(1, 2)", "PLeaS(**{})"]
)
def test_what_is_typed_is_read_and_not_run(text):
    with pytest.raises(InputError, match="matcher"):
        read_options({"matcher": text})
