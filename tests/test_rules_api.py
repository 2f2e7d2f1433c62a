"""A rule for an operation of one's own: without one it is pinned and named, with one its neurons are free."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from networks import randomise
from torch import Tensor, nn

import fxmerge
from fxmerge.errors import FxMergeWarning, UnknownOpError
from fxmerge.ir import AxisClasses
from fxmerge.rules import RULES

X = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@torch.library.custom_op("fxmerge_tests::scale", mutates_args=())
def scale(x: Tensor, weight: Tensor) -> Tensor:
    return x * weight


@torch.library.custom_op("fxmerge_tests::turn", mutates_args=())
def turn(x: Tensor, steps: int) -> Tensor:
    """The last axis turned by some places: data movement."""
    return torch.roll(x, steps, -1)


@torch.library.custom_op("fxmerge_tests::halves", mutates_args=())
def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., ::2].clone(), x[..., 1::2].clone()


class Own(nn.Module):
    """A perceptron whose hidden layer goes through ``body``."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.stem, self.inner, self.head = nn.Linear(5, 4), nn.Linear(4, 6), nn.Linear(6, 3)
        self.weight = nn.Parameter(torch.empty(6))
        randomise(self.double().eval(), seed)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.inner(torch.tanh(self.stem(x))))))


class Scaled(Own):
    def body(self, x: Tensor) -> Tensor:
        return torch.ops.fxmerge_tests.scale(x, self.weight)


class Turned(Own):
    """Added to itself turned by three places: pairs of neurons meet, and move as pairs."""

    def body(self, x: Tensor) -> Tensor:
        return x * self.weight + torch.ops.fxmerge_tests.turn(x, 3)


class Halved(Own):
    """Two outputs: the even neurons and the odd ones, put side by side."""

    def body(self, x: Tensor) -> Tensor:
        even, odd = torch.ops.fxmerge_tests.halves(x)
        return torch.cat([even, odd], -1) * self.weight


@pytest.fixture(autouse=True)
def clean_table() -> Iterator[None]:
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


def free(classes: AxisClasses) -> dict[str, int]:
    return {c.name: c.size for c in classes if c.free and c.sites}


@pytest.mark.parametrize(("model", "op"), [(Scaled, "scale"), (Turned, "turn"), (Halved, "halves")])
def test_without_a_rule_an_operation_pins_what_it_touches_and_says_so(model, op):
    classes = fxmerge.infer_classes(model(), X)
    assert classes.unknown == ((op, f"fxmerge_tests::{op}"),)
    assert free(classes) == {"stem.weight:0": 4}
    assert f"no rule for fxmerge_tests::{op} at {op}" in str(classes)
    assert fxmerge.verify(model(), classes).ok
    with pytest.warns(FxMergeWarning, match=rf"'fxmerge_tests::{op}' at node '{op}'.*pinned"):
        result = fxmerge.merge(model(), model(1), example_inputs=X, progress=False)
    assert f"no rule for operation 'fxmerge_tests::{op}' at node '{op}'" in str(result.report)


@pytest.mark.parametrize("call", [fxmerge.infer_classes, lambda m, x, **o: fxmerge.merge(m, m, example_inputs=x, **o)])
def test_strictly_an_operation_without_a_rule_is_an_error(call):
    message = r"'fxmerge_tests::scale' at node 'scale'.*@fxmerge\.rule\('fxmerge_tests::scale'\)"
    with pytest.raises(UnknownOpError, match=message):
        call(Scaled(), X, strict=True)


def add_rules() -> None:
    @fxmerge.rule("fxmerge_tests::scale")
    def scale_rule(ctx, call):
        return ctx.align(call["x"], call["weight"])

    @fxmerge.rule("fxmerge_tests::turn")
    def turn_rule(ctx, call):
        return ctx.move(call["x"], lambda t: call.run({"x": t}), call.shapes[0])

    @fxmerge.rule("fxmerge_tests::halves")
    def halves_rule(ctx, call):
        return [ctx.move(call["x"], lambda t, k=k: call.run({"x": t})[k], call.shapes[k]) for k in (0, 1)]


@pytest.mark.parametrize(
    ("model", "blocks", "neurons"),
    [(Scaled, [], [6]), (Halved, [], [3, 3]), (Turned, [], None)],
    ids=["pointwise", "two outputs", "movement"],
)
def test_with_a_rule_the_neurons_are_free(model, blocks, neurons):
    add_rules()
    classes = fxmerge.infer_classes(model(), X, strict=True)
    assert classes.unknown == ()
    found = fxmerge.verify(model(), classes)
    assert found.ok
    assert found.moved > 4
    if neurons is not None:
        assert sorted(n for name, n in free(classes).items() if name != "stem.weight:0") == neurons
    twin = fxmerge.permute(model(), classes, seed=1)
    result = fxmerge.merge(model(), twin, example_inputs=X, strict=True, progress=False)
    torch.testing.assert_close(result.module.state_dict(), model().state_dict(), rtol=0, atol=1e-12)


def test_the_pairs_that_a_turn_makes_move_as_pairs():
    add_rules()
    classes = fxmerge.infer_classes(Turned(), X)
    k = next(k for k, c in enumerate(classes) if any(s.parameter == "inner.weight" and s.axis == 0 for s in c.sites))
    # x[i] meets x[i + 3]: three pairs, which exchange and turn over
    assert classes[k].size * len(next(iter(classes[k].sites.values()))[0]) == 6
    assert classes[k].free


def test_a_rule_that_is_wrong_is_caught_by_verification():
    """A turn taken for pointwise: the class fails, is pinned and named, and the merged twin is still right."""

    @fxmerge.rule("fxmerge_tests::turn")
    def wrong(ctx, call):
        return call["x"]

    classes = fxmerge.infer_classes(Turned(), X)
    assert not fxmerge.verify(Turned(), classes).ok
    with pytest.warns(FxMergeWarning, match=r"'inner\.weight:0' failed verification and is pinned"):
        result = fxmerge.merge(Turned(), Turned(), example_inputs=X, progress=False)
    assert "failed verification" in str(result.report)
    torch.testing.assert_close(result.module(X), Turned()(X))


def test_a_rule_may_decline():
    @fxmerge.rule("fxmerge_tests::scale")
    def declined(ctx, call):
        return NotImplemented

    assert fxmerge.infer_classes(Scaled(), X).unknown == (("scale", "fxmerge_tests::scale"),)


def test_a_rule_replaces_the_one_before_and_stays_callable():
    @fxmerge.rule("fxmerge_tests::scale", "fxmerge_tests::turn")
    def first(ctx, call):
        return call["x"]

    assert RULES["fxmerge_tests::scale"] is RULES["fxmerge_tests::turn"] is first
    add_rules()
    assert RULES["fxmerge_tests::scale"] is not first
