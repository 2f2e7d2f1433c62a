"""Other widths: the layout of places, networks of unlike widths, networks side by side, heads kept apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS, randomise
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxmerge
from fxmerge.coupling import fuse
from fxmerge.ir import Alignment, AxisClasses, Coupling
from fxmerge.layout import resized
from fxmerge.matchers import ActivationMatching, Average, CCAMerge, OTFusion, PLeaS, WeightMatching, ZipIt
from fxmerge.rewrite import rewrite
from fxmerge.symmetry import full_state, relative_error
from fxmerge.widths import resizable

POINT = torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
IMAGE = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def made(model: nn.Module, seed: int = 0) -> nn.Module:
    return randomise(model.double().eval(), seed)


def zoo(name: str, seed: int = 0) -> tuple[nn.Module, tuple[Tensor, ...]]:
    case = NETWORKS[name]
    inputs = tuple(x.double() if x.is_floating_point() else x for x in case.example_inputs)
    return randomise(case.make().double(), seed), inputs


def far(expected: nn.Module, got: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return relative_error(expected(x), got(x))


def outputs(model: nn.Module, *x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [t for t in pytree.tree_leaves(model(*x)) if isinstance(t, Tensor)]


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: t.shape for name, t in model.state_dict().items()}


def merged(*models: nn.Module, x: tuple[Tensor, ...] | Tensor, **options) -> fxmerge.MergeResult:
    options = {"repair": None, "verify": False, "progress": False} | options
    return fxmerge.merge(*models, example_inputs=x, **options)


def samples(like: Tensor, count: int = 64) -> list[Tensor]:
    draw = torch.Generator().manual_seed(9)
    return [torch.randn(count, *like.shape[1:], generator=draw, dtype=like.dtype) for _ in range(2)]


# Networks whose hidden widths are arguments -----------------------------------------------------------------


class Perceptron(nn.Sequential):
    def __init__(self, one: int = 6, two: int = 4, outputs: int = 3) -> None:
        super().__init__(
            nn.Linear(5, one), nn.Tanh(), nn.Linear(one, two), nn.LeakyReLU(), nn.Linear(two, outputs)
        )  # fmt: skip


class Flattened(nn.Sequential):
    """Every channel is read at four places by the linear layer, channels first."""

    def __init__(self, one: int = 4, two: int = 3) -> None:
        super().__init__(
            nn.Conv2d(3, one, 3), nn.BatchNorm2d(one), nn.Tanh(), nn.Conv2d(one, two, 3),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * two, 2),
        )  # fmt: skip


class Gated(nn.Module):
    """Both halves of one layer's outputs belong to the same neurons, so new ones go to the end of each half."""

    def __init__(self, one: int = 4, two: int = 5) -> None:
        super().__init__()
        self.both, self.mid, self.head = nn.Linear(5, 2 * one), nn.Linear(one, two), nn.Linear(two, 2)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.both(x).chunk(2, -1)
        return self.head(torch.tanh(self.mid(value * torch.sigmoid(gate))))


class Concatenated(nn.Module):
    """Two classes side by side on one axis, and one of them again behind them."""

    def __init__(self, one: int = 4, two: int = 3) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, one, 3), nn.Conv2d(3, two, 3), nn.Conv2d(2 * one + two, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.tanh(self.a(x)), torch.tanh(self.b(x))
        return self.head(torch.cat([a, b, a.square()], 1)).mean((2, 3))


class Depthwise(nn.Module):
    """As many groups as channels, at any width."""

    def __init__(self, one: int = 4, two: int = 6) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, one, 1), nn.Conv2d(one, one, 3, groups=one)
        self.norm, self.point, self.head = nn.BatchNorm2d(one), nn.Conv2d(one, two, 1), nn.Linear(two, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.deep(torch.tanh(self.stem(x))))
        return self.head(torch.tanh(self.point(torch.tanh(x))).mean((2, 3)))


class Residual(nn.Module):
    def __init__(self, one: int = 6, two: int = 4) -> None:
        super().__init__()
        self.stem, self.up, self.down = nn.Conv2d(3, one, 3), nn.Conv2d(one, two, 1), nn.Conv2d(two, one, 1)
        self.norm, self.head = nn.BatchNorm2d(two), nn.Linear(one, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.down(F.leaky_relu(self.norm(self.up(torch.tanh(x)))))
        return self.head(torch.tanh(x).mean((2, 3)))


WIDE: dict[str, tuple[Callable[..., nn.Module], Tensor]] = {
    "perceptron": (Perceptron, POINT),
    "flattened": (Flattened, IMAGE),
    "gated": (Gated, POINT),
    "concatenated": (Concatenated, IMAGE),
    "depthwise": (Depthwise, IMAGE),
    "residual": (Residual, IMAGE),
}
each = pytest.mark.parametrize("name", WIDE)


def in_order(classes: AxisClasses) -> list[int]:
    """The free classes as the constructors' arguments name them."""
    return [k for k, c in enumerate(classes) if c.free]


# Layout -----------------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("widths", [(7, 8), (9, 2), (3, 5)])
def test_places_are_those_of_the_same_network_built_at_these_widths(name, widths):
    make, x = WIDE[name]
    classes = fxmerge.infer_classes(made(make()), x)
    expected = fxmerge.infer_classes(made(make(*widths)), x)
    found = resized(classes, dict(zip(in_order(classes), widths, strict=True)))
    assert found.reads == expected.reads
    assert [c.name for c in found] == [c.name for c in expected]
    for a, b in zip(found, expected, strict=True):
        assert a.size == b.size
        assert a.sites.keys() == b.sites.keys()
        assert all(torch.equal(a.sites[s], b.sites[s]) for s in a.sites), a.name
        assert [(t.node, t.axis, t.kind) for t in a.taps] == [(t.node, t.axis, t.kind) for t in b.taps]
        assert all(torch.equal(s.index, t.index) for s, t in zip(a.taps, b.taps, strict=True)), a.name
        assert a.blocks.shape == (a.size, len(a.parents))


def test_new_neurons_follow_the_last_of_their_kind():
    """Worked out by hand: a a a | c c with three places per neuron where flattened, tiles where repeated."""
    classes = fxmerge.infer_classes(made(Flattened()), IMAGE)
    one, two = in_order(classes)
    site = next(s for s in classes[two].sites if s.parameter == "6.weight")
    places = resized(classes, {one: 5, two: 4})[two].sites[site]
    assert places.tolist() == [[4 * i + j for j in range(4)] for i in range(4)]
    gated = fxmerge.infer_classes(made(Gated()), POINT)
    one, _ = in_order(gated)
    site = next(s for s in gated[one].sites if s.parameter == "both.weight")
    assert resized(gated, {one: 6})[one].sites[site].tolist() == [[i, 6 + i] for i in range(6)]
    assert resized(gated, {one: 2})[one].sites[site].tolist() == [[i, 2 + i] for i in range(2)]


@pytest.mark.parametrize("name", ["zero_padded_shortcut", "dense_block", "shuffle_units", "grouped_then_dense", "unet"])
def test_places_share_out_every_axis_whatever_the_widths(name):
    model, x = zoo(name)
    classes = fxmerge.infer_classes(model, x)
    moving = [k for k, c in enumerate(classes) if c.free and not c.parents and not classes.children(k)]
    draw = torch.Generator().manual_seed(0)
    for _ in range(3):
        widths = {k: int(torch.randint(1, 12, (), generator=draw)) for k in moving}
        found = resized(classes, widths)
        assert [c.size for c in found] == [widths.get(k, c.size) for k, c in enumerate(classes)]
        by_axis: dict[object, list[Tensor]] = {}
        for c in found:
            for site, index in c.sites.items():
                assert len(index) == c.size
                by_axis.setdefault(site, []).append(index.flatten())
        assert by_axis
        for site, parts in by_axis.items():
            places = torch.cat(parts)
            assert torch.equal(places.sort().values, torch.arange(len(places))), str(site)
        for before, after in zip(classes, found, strict=True):  # those that stay keep their order
            for a, b in zip(before.sites.values(), after.sites.values(), strict=True):
                rows = min(len(a), len(b))
                assert torch.equal(a[:rows].flatten().argsort(), b[:rows].flatten().argsort())


def test_widths_as_they_are_change_nothing_and_blocks_keep_theirs():
    model, x = zoo("grouped_then_dense")
    classes = fxmerge.infer_classes(model, x)
    assert resized(classes, {k: c.size for k, c in enumerate(classes)}) is classes
    for k in next([c.parents[0], k] for k, c in enumerate(classes) if c.parents):
        with pytest.raises(ValueError, match="blocks"):
            resized(classes, {k: classes[k].size + 1})


# What may change --------------------------------------------------------------------------------------------


class SlicedAtANumber(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = nn.Linear(5, 8), nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        return self.head(torch.tanh(self.a(x[:, :4]) + self.b(x[:, 4:])))


class Halves(nn.Module):
    """Two classes that must stay as wide as each other, though neither width is written down."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = nn.Linear(5, 8), nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.tanh(self.stem(x)).chunk(2, -1)
        return self.head(torch.tanh(self.a(a) + self.b(b)))


class GroupsWithNames(nn.Sequential):
    """The outputs tell the groups apart, so what either reads is a class of its own; groups are equally wide."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 4, 1, groups=2))


class ScaledByATable(nn.Module):
    """Constants of the graph have the width written into them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid, self.head = nn.Linear(5, 4), nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x)) * torch.ones(4, dtype=x.dtype)
        return self.head(torch.tanh(self.mid(x)))


def named(classes: AxisClasses, which: Sequence[int] | frozenset[int]) -> set[str]:
    return {classes[k].name for k in which}


def test_a_class_that_meets_its_own_size_as_a_number_keeps_its_width():
    classes = fxmerge.infer_classes(made(SlicedAtANumber()), POINT)
    free = named(classes, resizable(classes))
    assert "a.weight:0" in free
    assert not any(n.startswith("stem") and "[4]" not in n for n in free)
    classes = fxmerge.infer_classes(made(ScaledByATable()), POINT)
    assert named(classes, resizable(classes)) == {"mid.weight:0"}
    for make, x in ((Halves, POINT), (GroupsWithNames, IMAGE)):
        classes = fxmerge.infer_classes(made(make()), x)
        assert named(classes, resizable(classes)) <= {"a.weight:0"}
    for name in ("lstm", "equal_constants", "grouped_chain"):
        model, x = zoo(name)
        classes = fxmerge.infer_classes(model, x)
        assert len(resizable(classes)) < sum(c.free for c in classes), name


@each
def test_a_class_that_meets_no_number_may_change(name):
    make, x = WIDE[name]
    classes = fxmerge.infer_classes(made(make()), x)
    assert resizable(classes) == set(in_order(classes))
    first = in_order(classes)[0]
    assert resizable(classes, [first]) == {first}
    assert resizable(classes, []) == frozenset()


# Side by side -----------------------------------------------------------------------------------------------

BESIDE = """mlp_batch_norm module_called_twice glu_by_chunk crelu einsum_linear weights_concatenated bilinear conv1d
    residual_projection zero_padded_shortcut dense_block flatten_into_linear flatten_channels_last depthwise_separable
    squeeze_excite inverted_residual instance_norm pixel_shuffle conv_transpose unet nested_output tied_linears
    """.split()


def beside(**options) -> PLeaS:
    return PLeaS(ratios={"": 1.0}, cost="weights", **options)


@pytest.mark.parametrize("name", BESIDE)
def test_nothing_merged_is_exactly_the_networks_side_by_side(name):
    a, x = zoo(name)
    b, _ = zoo(name, seed=3)
    result = merged(a, b, x=x, matcher=beside())
    free = in_order(result.report.classes)
    assert all(c.size == 2 * c.widths[0] for k, c in enumerate(result.alignment.couplings) if k in free)
    for y, p, q in zip(outputs(result.module, *x), outputs(a, *x), outputs(b, *x), strict=True):
        torch.testing.assert_close(y, (p + q) / 2, rtol=1e-9, atol=1e-9)


def test_side_by_side_holds_for_three_parents_and_any_shares():
    models = [made(Residual(), seed) for seed in range(3)]
    result = merged(*models, x=IMAGE, matcher=beside(), weights=(0.5, 0.2, 0.3))
    (y,), ys = outputs(result.module, IMAGE), [outputs(m, IMAGE)[0] for m in models]
    torch.testing.assert_close(y, 0.5 * ys[0] + 0.2 * ys[1] + 0.3 * ys[2], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_kept_apart_or_not_a_twin_is_a_twin(share):
    model = made(Residual())
    twin = fxmerge.permute(model, fxmerge.infer_classes(model, IMAGE), seed=4)
    result = merged(model, twin, x=IMAGE, matcher=PLeaS(ratios={"": share}, cost="weights"))
    assert shapes(result.module)["stem.weight"][0] == 6 + round(6 * share)
    assert far(model, result.module, IMAGE) < 1e-12


# Parents of other widths ------------------------------------------------------------------------------------


def widened(model: nn.Module, x: Tensor, copies: int = 2) -> nn.Module:
    """Every hidden neuron several times over, read with a share of its weight; then shuffled."""
    classes = fxmerge.infer_classes(model, x)
    couplings = []
    for c in classes:
        eye = torch.eye(c.size, dtype=torch.float64)
        if c.free:
            order = torch.randperm(c.size * copies, generator=torch.Generator().manual_seed(c.size))
            eye = eye.repeat(copies, 1)[order]
        couplings.append(Coupling(eye, eye.T / eye.sum(0)[:, None], (c.size,)))
    wide = resized(classes, {k: c.size for k, c in enumerate(couplings)})
    state = fuse([classes], wide, Alignment(tuple(couplings), "copies"), [full_state(model)], [1.0])
    return rewrite(classes, {n: v.detach() for n, v in state.items()}, wide)


OT = [OTFusion(), OTFusion("weights"), OTFusion(metric="cosine")]
TWICE = ["perceptron", "flattened", "gated", "depthwise", "residual"]


@pytest.mark.parametrize("name", TWICE)
@pytest.mark.parametrize("matcher", OT, ids=["activations", "weights", "cosine"])
def test_neurons_that_occur_twice_are_matched_with_one(matcher, name):
    """B has every neuron of A twice: whichever is the anchor, the fused network computes what both compute."""
    make, x = WIDE[name]
    model = made(make())
    wide = widened(model, x)
    assert far(model, wide, x) < 1e-12
    assert shapes(wide) != shapes(model)
    data = samples(x) if matcher.needs_data else None
    for a, b in ((model, wide), (wide, model)):
        for weights in ((0.0, 1.0), (0.5, 0.5)):
            result = merged(a, b, x=x, data=data, matcher=matcher, weights=weights)
            assert shapes(result.module) == shapes(a)
            assert far(model, result.module, x) < 1e-9, (name, weights)


@each
@pytest.mark.parametrize("widths", [(7, 8), (3, 3)])
def test_a_parent_of_other_widths_is_fused_into_the_first_ones(name, widths):
    make, x = WIDE[name]
    a, b = made(make()), made(make(*widths), 1)
    result = merged(a, b, x=x, data=samples(x), matcher=OTFusion(), weights=(1, 0))
    assert shapes(result.module) == shapes(a)
    torch.testing.assert_close(result.module.state_dict(), a.state_dict(), rtol=0, atol=1e-14)
    result = merged(a, b, x=x, data=samples(x), matcher=OTFusion())
    assert shapes(result.module) == shapes(a)
    assert bool(torch.isfinite(result.module(x)).all())
    assert far(result.module, a, x) > 1e-3


def test_three_parents_of_three_widths():
    models = [made(Perceptron(*w), s) for s, w in enumerate([(6, 4), (9, 3), (5, 7)])]
    for matcher in (OTFusion(), OTFusion("weights"), OTFusion(reg=0.1), OTFusion(barycenter=2)):
        result = merged(*models, x=POINT, data=samples(POINT), matcher=matcher, weights=(0.2, 0.5, 0.3))
        assert shapes(result.module) == shapes(models[0])
        for k in in_order(result.report.classes):
            c = result.alignment.couplings[k]
            for share, part in zip((0.2, 0.5, 0.3), c.merge.split(c.widths, 1), strict=True):
                torch.testing.assert_close(
                    part.sum(1), torch.full((c.size,), share, dtype=part.dtype), rtol=1e-9, atol=0
                )
            torch.testing.assert_close(c.unmerge.sum(1), torch.ones(sum(c.widths), dtype=part.dtype), rtol=1e-9, atol=0)


@pytest.mark.parametrize("factor", [0.5, 1.5, 2.0])
def test_the_fused_network_may_have_widths_of_its_own(factor):
    model = made(Residual())
    twin = fxmerge.permute(model, fxmerge.infer_classes(model, IMAGE), seed=4)
    result = merged(model, twin, x=IMAGE, data=samples(IMAGE), matcher=OTFusion(width=factor))
    assert shapes(result.module)["stem.weight"][0] == round(6 * factor)
    assert shapes(result.module)["norm.running_var"] == (round(4 * factor),)
    assert bool(torch.isfinite(result.module(IMAGE)).all())
    if factor == 2:  # every neuron of both: nothing is lost
        assert far(model, result.module, IMAGE) < 1e-9


@pytest.mark.parametrize("matcher", [WeightMatching(), ActivationMatching(), CCAMerge(), PLeaS(), Average()], ids=str)
def test_permutations_refuse_other_widths(matcher):
    a, b = made(Perceptron(6, 4)), made(Perceptron(6, 5), 1)
    with pytest.raises(fxmerge.StructureError, match=r"'2\.weight:0': 4 against 5 neurons.*OTFusion\(\)"):
        merged(a, b, x=POINT, data=samples(POINT), matcher=matcher)


def test_blocks_refuse_other_widths_even_where_any_width_goes():
    def make(width: int) -> nn.Module:
        middle = nn.Conv2d(width, width, 1, groups=2)
        return made(nn.Sequential(nn.Conv2d(3, width, 3), nn.Tanh(), middle, nn.Tanh(), nn.Conv2d(width, 2, 1)))

    with pytest.raises(fxmerge.StructureError, match="Attention heads and groups"):
        merged(make(4), make(8), x=IMAGE, matcher=OTFusion("weights"))


def test_hidden_neurons_of_experts_go_together_where_their_numbers_differ():
    class Mixture(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.router, self.head = nn.Linear(5, 3), nn.Linear(6, 2)
            self.up, self.down = nn.Parameter(torch.empty(3, width, 5)), nn.Parameter(torch.empty(3, 6, width))

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(torch.einsum("ehi,ni->neh", self.up, x))
            return self.head(torch.einsum("ne,eoh,neh->no", self.router(x).softmax(-1), self.down, hidden))

    a, b = made(Mixture(4)), made(Mixture(6), 1)
    result = merged(a, b, x=POINT, matcher=OTFusion("weights"))
    assert shapes(result.module)["up"] == (3, 4, 5)
    assert [c.size for c in result.report.classes if any(s.parameter == "up" and s.axis == 1 for s in c.sites)] == [4]
    alike = merged(a, made(Mixture(4), 1), x=POINT, matcher=OTFusion("weights"))
    assert 12 in [c.size for c in alike.report.classes]


# Heads ------------------------------------------------------------------------------------------------------

MATCHERS = [WeightMatching(), ActivationMatching(), OTFusion(), CCAMerge(), ZipIt(), PLeaS(), beside()]


@pytest.mark.parametrize("outputs_b", [3, 2])
@pytest.mark.parametrize("matcher", MATCHERS, ids=str)
def test_every_parent_keeps_its_head(matcher, outputs_b):
    a, b = made(Perceptron()), made(Perceptron(outputs=outputs_b), 1)
    data = samples(POINT)
    apart = merged(a, b, x=POINT, data=data, matcher=matcher, heads="separate").module
    both = merged(a, b, x=POINT, data=data, matcher=matcher, heads="concat").module
    with torch.no_grad():
        parts, joined = apart(POINT), both(POINT)
    assert isinstance(parts, tuple)
    assert [p.shape for p in parts] == [(3, 3), (3, outputs_b)]
    torch.testing.assert_close(torch.cat(parts, 1), joined, rtol=0, atol=0)
    assert list(apart.state_dict()) == list(a.state_dict())
    assert torch.equal(apart.state_dict()["4.bias"], torch.cat([a[4].bias, b[4].bias]))


@pytest.mark.parametrize("name", ["perceptron", "residual", "flattened"])
def test_heads_on_networks_side_by_side_give_both_parents_outputs(name):
    make, x = WIDE[name]
    models = [made(make(), seed) for seed in range(3)]
    found = merged(*models, x=x, matcher=beside(), heads="separate").module(x)
    assert len(found) == 3
    for y, model in zip(found, models, strict=True):
        torch.testing.assert_close(y, model(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("matcher", [WeightMatching(), ActivationMatching(), ZipIt(), OTFusion(), PLeaS()], ids=str)
def test_heads_on_a_trunk_of_twins_give_both_parents_outputs(matcher):
    """B is A in other order with another head: one trunk serves both."""
    a = made(Perceptron())
    classes = fxmerge.infer_classes(a, POINT)
    b = fxmerge.permute(a, classes, seed=6)
    with torch.no_grad():
        b[4].weight.copy_(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    found = merged(a, b, x=POINT, data=samples(POINT), matcher=matcher, heads="separate").module(POINT)
    for y, model in zip(found, (a, b), strict=True):
        torch.testing.assert_close(y, model(POINT), rtol=1e-9, atol=1e-9)


class Normalised(nn.Module):
    """Something after the head, which every output goes through alone or which mixes them."""

    def __init__(self, after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.hidden, self.head, self.after = nn.Linear(5, 6), nn.Linear(6, 3), after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.head(torch.tanh(self.hidden(x))))


def test_heads_are_not_separated_where_outputs_are_mixed():
    mixing = [made(Normalised(lambda y: y.softmax(-1)), s) for s in (0, 1)]
    with pytest.raises(fxmerge.InputError, match=r"softmax.*heads='concat'"):
        merged(*mixing, x=POINT, matcher=beside(), heads="separate")
    alone = [made(Normalised(torch.sigmoid), s) for s in (0, 1)]
    for y, model in zip(merged(*alone, x=POINT, matcher=beside(), heads="separate").module(POINT), alone, strict=True):
        torch.testing.assert_close(y, model(POINT), rtol=1e-9, atol=1e-9)


def test_different_heads_cannot_be_averaged_and_the_way_out_is_named():
    with pytest.raises(fxmerge.StructureError, match="heads='separate'"):
        merged(made(Perceptron()), made(Perceptron(outputs=2)), x=POINT, matcher=WeightMatching())
    with pytest.raises(fxmerge.InputError, match="'average', 'separate', 'concat'"):
        merged(made(Perceptron()), made(Perceptron()), x=POINT, heads="both")


@pytest.mark.parametrize("heads", ["average", "separate", "concat"])
def test_a_network_of_other_widths_is_stored_and_comes_back(tmp_path, heads):
    a, b = made(Residual()), made(Residual(), 1)
    result = merged(a, b, x=IMAGE, matcher=beside(), heads=heads)
    result.save(tmp_path / "out")
    again = fxmerge.load(tmp_path / "out")
    for y, z in zip(outputs(result.module, IMAGE), outputs(again, IMAGE), strict=True):
        assert torch.equal(y, z)
    assert len(outputs(again, IMAGE)) == (2 if heads == "separate" else 1)
    assert again.get_submodule("stem").out_channels == 12


def test_layers_of_the_fused_network_say_their_own_widths():
    models = [made(Depthwise(), s) for s in (0, 1)]
    module = merged(*models, x=IMAGE, matcher=beside()).module
    deep = module.get_submodule("deep")
    assert (deep.in_channels, deep.out_channels, deep.groups) == (8, 8, 8)
    assert module.get_submodule("norm").num_features == 8
    assert (module.get_submodule("head").in_features, module.get_submodule("head").out_features) == (12, 2)
    # it can be merged again, as any network
    again = merged(module, module, x=IMAGE, matcher=WeightMatching()).module
    assert far(module, again, IMAGE) < 1e-12


# Sizes that a graph holds as numbers ----------------------------------------------------------------------------


class Literal(nn.Module):
    """A hidden layer whose width stands in the graph, spelled in one of several ways."""

    def __init__(self, how: str):
        super().__init__()
        self.how = how
        self.enter, self.leave = nn.Linear(5, 12), nn.Linear(6 if "split" in how else 12, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.enter(x)
        match self.how:
            case "view":
                y = y.view(-1, 12)
            case "reshape in a tuple":
                y = y.reshape((-1, 1, 12)).mean(1)
            case "torch.reshape":
                y = torch.reshape(y, (-1, 12))
            case "split by size":
                left, right = torch.split(y, 6, -1)
                y = left * torch.sigmoid(right)
            case "split by sizes":
                left, right = y.split([6, 6], -1)
                y = left * torch.sigmoid(right)
        return self.leave(F.relu(y))


LITERALS = ("view", "reshape in a tuple", "torch.reshape", "split by size", "split by sizes")


@pytest.mark.parametrize("how", LITERALS)
def test_numbers_that_are_widths_follow_them(how):
    a, b = (randomise(Literal(how).double(), seed) for seed in (0, 1))
    x = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    free = {k for k, c in enumerate(fxmerge.infer_classes(a, x)) if c.free}
    assert resizable(fxmerge.infer_classes(a, x)) == free
    options = {"example_inputs": x, "matcher": PLeaS(ratios={"": 1.0}, cost="weights"), "progress": False}
    merged = fxmerge.merge(a, b, **options).module
    assert merged.enter.out_features == 24
    torch.testing.assert_close(merged(x), (a(x) + b(x)) / 2, rtol=1e-9, atol=1e-9)
