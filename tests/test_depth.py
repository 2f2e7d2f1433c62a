"""Networks of different depth: units, which of them correspond, and what growing and shrinking leave as it was."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxmerge
from fxmerge.depth import CLAFusion, balanced, deepen
from fxmerge.depth.clafusion import monotone
from fxmerge.depth.shrink import shrink
from fxmerge.interfaces import Sample
from fxmerge.matchers import ActivationMatching, Average, CCAMerge, OTFusion, PLeaS, WeightMatching, ZipIt
from fxmerge.repair import LeastSquares
from fxmerge.symmetry import relative_error
from fxmerge.units import find_stages
from tests.networks import randomise

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
VECTORS = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
TOKENS = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(2))


# Networks -----------------------------------------------------------------------------------------------------


def mlp(*widths: int, activation: type[nn.Module] = nn.ReLU, bias: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise((6, *widths)):
        layers += [nn.Linear(a, b, bias=bias), activation()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 3, bias=bias))


def chain(*stages: int, width: int = 6, norm: bool = True) -> nn.Sequential:
    """Convolutions between pools, as many per stage."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), nn.ReLU()]
    for number in stages:
        for _ in range(number):
            layers.append(nn.Conv2d(width, width, 3, padding=1, bias=not norm))
            layers += [nn.BatchNorm2d(width)] if norm else []
            layers.append(nn.ReLU(inplace=True))
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3))


class Block(nn.Module):
    def __init__(self, a: int, b: int, inner: int, stride: int = 1, norm: bool = True) -> None:
        super().__init__()
        make = nn.BatchNorm2d if norm else nn.Identity
        self.conv1, self.bn1 = nn.Conv2d(a, inner, 3, stride, 1, bias=False), make(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, b, 3, 1, 1, bias=False), make(b)
        self.short = nn.Identity() if a == b and stride == 1 else nn.Conv2d(a, b, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.short(x))


class Residual(nn.Module):
    """A stem and stages of blocks, the first of each with a stride."""

    def __init__(self, *stages: int, width: int = 4, inner: int = 5, norm: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.stages = nn.ModuleList()
        for k, number in enumerate(stages):
            wide = width * (k + 1)
            blocks = [Block(wide if not k else wide - width, wide, inner, 1 + (k > 0), norm)]
            blocks += [Block(wide, wide, inner, norm=norm) for _ in range(number - 1)]
            self.stages.append(nn.Sequential(*blocks))
        self.head = nn.Linear(width * len(stages), 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """Pre-norm blocks of attention and MLP, with a scale at the end of one branch."""

    def __init__(self, depth: int, hidden: int = 12) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({
                "norm1": nn.LayerNorm(8), "qkv": nn.Linear(8, 24), "proj": nn.Linear(8, 8), "norm2": nn.LayerNorm(8),
                "up": nn.Linear(8, hidden), "down": nn.Linear(hidden, 8),
            })
            for _ in range(depth)
        )  # fmt: skip
        self.stem = nn.Linear(8, 8)
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(8)) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block, scale in zip(self.blocks, self.scales, strict=True):
            q, k, v = block["qkv"](block["norm1"](x)).view(x.shape[0], -1, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + block["proj"](y)
            x = x + scale * block["down"](F.gelu(block["up"](block["norm2"](x))))
        return self.head(self.norm(x).mean(1))


class Dense(nn.Module):
    """Layers whose outputs all later ones read."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4 + 3 * k) for k in range(depth))
        self.layers = nn.ModuleList(nn.Conv2d(4 + 3 * k, 3, 3, padding=1) for k in range(depth))
        self.last, self.head = nn.BatchNorm2d(4 + 3 * depth), nn.Linear(4 + 3 * depth, 3)

    def forward(self, x: Tensor) -> Tensor:
        found = [self.stem(x)]
        for norm, layer in zip(self.norms, self.layers, strict=True):
            found.append(layer(F.relu(norm(torch.cat(found, 1)))))
        return self.head(F.relu(self.last(torch.cat(found, 1))).mean((2, 3)))


class Stages(nn.Module):
    """Odd: two streams of one shape, a parallel sum, a unit that is called from a list, a pool in between."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 5)
        self.a = nn.ModuleList(nn.ModuleList([nn.Linear(5, 7), nn.Linear(7, 5), nn.Linear(5, 5)]) for _ in range(first))
        self.middle = nn.Linear(5, 4)
        self.b = nn.ModuleList(nn.Linear(4, 4) for _ in range(second))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for up, down, side in self.a:
            x = x + down(torch.tanh(up(x))) + side(x)
        x = F.relu(self.middle(x).clamp(-3, 3))
        for layer in self.b:
            x = F.relu(layer(x))
        return self.head(x)


def seeded(make, seed=0):
    torch.manual_seed(seed)
    return randomise(make().double(), seed=seed).eval()


def change(a: nn.Module, b: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return relative_error(a(x), b(x))


# name -> (shallow, deep, input, exact)
PAIRS = {
    "mlp": (lambda: mlp(8, 8), lambda: mlp(8, 8, 8, 8), VECTORS, True),
    "mlp, one hidden layer": (lambda: mlp(8), lambda: mlp(8, 8, 8), VECTORS, True),
    "mlp of other widths": (lambda: mlp(9, 5), lambda: mlp(8, 7, 6, 6), VECTORS, True),
    "mlp, relu6, no bias": (
        lambda: mlp(8, 8, activation=nn.ReLU6, bias=False), lambda: mlp(8, 8, 8, activation=nn.ReLU6, bias=False),
        VECTORS, True,
    ),
    "convolutions": (lambda: chain(1, 2, norm=False), lambda: chain(3, 2, norm=False), IMAGES, True),
    "convolutions, a stage without": (lambda: chain(0, 1, norm=False), lambda: chain(2, 2, norm=False), IMAGES, True),
    "convolutions with norms": (lambda: chain(1, 1), lambda: chain(2, 3), IMAGES, False),
    "residual": (lambda: Residual(2, 2), lambda: Residual(4, 3), IMAGES, True),
    "residual without norms": (lambda: Residual(1, 2, norm=False), lambda: Residual(2, 2, norm=False), IMAGES, True),
    "residual, a stage without": (lambda: Residual(2, 1), lambda: Residual(2, 3), IMAGES, True),
    "residual of other widths": (
        lambda: Residual(2, 1, width=6, inner=4), lambda: Residual(3, 2), IMAGES, True,
    ),
    "attention": (lambda: Attention(1), lambda: Attention(3), TOKENS, True),
    "dense": (lambda: Dense(2), lambda: Dense(4), IMAGES, True),
    "two kinds of stages": (lambda: Stages(1, 2), lambda: Stages(3, 4), VECTORS, True),
}  # fmt: skip


# Units --------------------------------------------------------------------------------------------------------


def units(module, x):
    return [[(u.kind, u.name) for u in s.units] for s in find_stages(fxmerge.infer_classes(module, x)) if s.units]


def test_units_of_a_chain():
    assert units(mlp(8, 8, 8), VECTORS) == [[("plain", "2"), ("plain", "4")]]
    assert units(chain(2, 0, 1).eval(), torch.randn(2, 3, 16, 16)) == [
        [("plain", "2"), ("plain", "5")],
        [("plain", "10")],
    ]


def test_units_of_residual_networks():
    found = units(Residual(2, 3).eval(), IMAGES)
    assert found == [
        [("residual", "stages.0.0"), ("residual", "stages.0.1")],
        [("residual", "stages.1.1"), ("residual", "stages.1.2")],
    ]
    attention = units(Attention(2).eval(), TOKENS)
    assert attention == [[("residual", "blocks.0"), ("residual", "blocks.1")]]


def test_units_that_are_concatenated():
    assert [[k for k, _ in stage] for stage in units(Dense(3).eval(), IMAGES)] == [["concat"] * 3]


def test_what_follows_the_last_unit_only_is_not_a_part_of_it():
    stages = find_stages(fxmerge.infer_classes(Attention(3).eval(), TOKENS))
    found = [u.signature for s in stages for u in s.units]
    assert found[:1] * 3 == found


# The dynamic programme ----------------------------------------------------------------------------------------


def brute_force(costs: Tensor, pinned: bool) -> float:
    n, m = costs.shape
    best = math.inf
    for columns in itertools.combinations(range(m), n):
        if not pinned or n == 1 or (columns[0] == 0 and columns[-1] == m - 1):
            best = min(best, sum(float(costs[i, j]) for i, j in enumerate(columns)))
    return best


@pytest.mark.parametrize("pinned", [True, False])
def test_the_map_is_the_best_of_all(pinned):
    draw = torch.Generator().manual_seed(0)
    for trial in range(1000):
        n = 1 + trial % 4
        m = n + int(torch.randint(0, 5, (), generator=draw))
        costs = torch.rand(n, m, generator=draw).double()
        if trial % 3 == 0:
            costs = (4 * costs).round()  # ties
        if trial % 5 == 0:
            costs[torch.rand(n, m, generator=draw) < 0.3] = math.inf
        found, best = monotone(costs, pinned), brute_force(costs, pinned)
        if math.isinf(best):
            assert found is None
            continue
        assert found is not None
        assert all(a < b for a, b in itertools.pairwise(found))
        assert not pinned or n == 1 or (found[0] == 0 and found[-1] == m - 1)
        assert sum(float(costs[i, j]) for i, j in enumerate(found)) == pytest.approx(best)


def test_a_single_layer_goes_where_it_fits():
    assert monotone(torch.tensor([[3.0, 2.0, 1.0, 2.0]])) == [2]


# What layers have in common -----------------------------------------------------------------------------------


def rbf_free_cka(x: Tensor, y: Tensor, unbiased: bool) -> float:
    """From the n x n Gram matrices, as the definitions have it."""
    n = len(x)
    k, l = x @ x.T, y @ y.T  # noqa: E741
    if unbiased:
        k, l = (g - torch.diag(g.diagonal()) for g in (k, l))  # noqa: E741

    def hsic(k: Tensor, l: Tensor) -> float:  # noqa: E741
        if not unbiased:
            h = torch.eye(n).double() - 1 / n
            return float((k @ h @ l @ h).trace())
        both = k @ l
        return float(both.trace() + k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 * both.sum() / (n - 2))

    return hsic(k, l) / math.sqrt(hsic(k, k) * hsic(l, l))


@pytest.mark.parametrize("unbiased", [False, True])
def test_costs_are_those_of_the_definition_whatever_the_batches(unbiased):
    a, b = mlp(7, 5).double(), mlp(6, 8, 4).double()
    x = VECTORS.double()
    outputs = []
    for network in (a, b):
        value, kept = x, []
        for layer in network:
            value = layer(value)
            kept += [value.detach()] if isinstance(layer, nn.ReLU) else []
        outputs.append(kept[1:])  # the first layer is fixed
    wanted = [[1 - rbf_free_cka(u, v, unbiased) for v in outputs[1]] for u in outputs[0]]
    for size in (64, 13):
        result = fxmerge.merge(
            a, b, data=list(x.split(size)), depth=CLAFusion(unbiased=unbiased), example_inputs=x[:2], progress=False
        )
        torch.testing.assert_close(result.report.depth[0].costs, torch.tensor(wanted).double(), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("cost", ["cka", "wasserstein", "weights"])
def test_a_network_finds_its_own_layers_in_itself_grown(cost):
    """The twin of a network with units inserted: its own units have cost zero, and are chosen."""
    shallow = seeded(lambda: Residual(4, 1))
    deep = deepen(shallow, {"stages.0.2": 2}, IMAGES.double())
    with torch.no_grad():
        for name, p in deep.named_parameters():
            if "inserted" in name:
                p.normal_()
    twin = fxmerge.permute(shallow, fxmerge.infer_classes(shallow, IMAGES.double()), seed=1)
    data = None if cost == "weights" else [IMAGES.double()]
    result = fxmerge.merge(
        deep, twin, data=data, depth=CLAFusion(cost=cost), matcher=Average(), example_inputs=IMAGES.double(),
        progress=False,
    )  # fmt: skip
    (link,) = result.report.depth
    assert link.short == ("stages.0.0", "stages.0.1", "stages.0.2", "stages.0.3")
    assert [link.long[j] for j in link.chosen][:3] == ["stages.0.0", "stages.0.1", "stages.0.2"]
    assert float(link.costs[0, 0]) == pytest.approx(0, abs=1e-9)


# Growing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAIRS)
def test_a_network_in_a_deeper_graph_computes_the_same(name):
    shallow, deep, x, exact = PAIRS[name]
    a, b = seeded(deep), seeded(shallow, 1)
    parents = [fxmerge.infer_classes(m, x.double()) for m in (a, b)]
    (_, grown), links, chosen = balanced(parents, None, "grow", CLAFusion(), None)
    module = grown.classes.traced.graph_module
    assert chosen == 0
    assert links or "without" in name or "hidden" in name
    assert change(module, b, x.double()) <= (0 if exact else 1e-12)
    assert set(module.state_dict()) == set(a.state_dict())
    module.train()
    module(x.double()).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize(
    ("make", "x", "count"),
    [
        (lambda: Residual(2, 2), IMAGES, 2), (lambda: chain(1, 2, norm=False), IMAGES, 3),
        (lambda: Dense(2), IMAGES, 2), (lambda: Attention(1), TOKENS, 4), (lambda: mlp(5, 9, 4), VECTORS, 2),
        (lambda: Stages(1, 1), VECTORS, 2),
    ],
    ids=["residual", "convolutions", "dense", "attention", "mlp", "stages"],
)  # fmt: skip
def test_units_are_inserted_anywhere_any_number_of_times(make, x, count):
    model = seeded(make)
    names = {u.name: u.kind for s in find_stages(fxmerge.infer_classes(model, x.double())) for u in s.units}
    for name in names:
        state = {k: v.clone() for k, v in model.state_dict().items()}
        deeper = deepen(model, {name: count}, x.double())
        assert change(deeper, model, x.double()) == 0
        new = [n for n, _ in deeper.named_parameters() if "inserted" in n]
        assert new
        assert all(n.startswith(f"{name}_inserted") for n in new)
        assert "inserted" in deeper.code
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())
        # it learns: something in the new units has a gradient
        deeper.train()
        deeper(x.double()).square().sum().backward()
        read = names[name] != "concat"  # these are read with weight zero, and those weights learn first
        assert any(bool(p.grad.count_nonzero()) for n, p in deeper.named_parameters() if n in new) or not read


@pytest.mark.parametrize(
    ("make", "name", "reason"),
    [
        (lambda: mlp(8, 8, activation=nn.GELU), "2", r"'2_inserted1' cannot.*2_inserted1 -> 3.*leave alone"),
        (lambda: mlp(8, 8, activation=nn.Sigmoid), "2", "leave alone"),
        (lambda: mlp(8, 8), "nothing", "no unit is called 'nothing'; there are 2"),
    ],
    ids=["gelu", "sigmoid", "unknown"],
)
def test_what_cannot_be_inserted_is_refused_with_the_reason(make, name, reason):
    with pytest.raises(fxmerge.FxMergeError, match=f"(?s){reason}"):
        deepen(make(), {name: 1}, VECTORS)


class PostNorm(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(6) for _ in range(depth))
        self.stem, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = norm(x + torch.tanh(layer(x)))
        return self.head(x)


def test_a_norm_behind_the_sum_is_refused_and_may_be_shrunk():
    a, b = seeded(lambda: PostNorm(4)), seeded(lambda: PostNorm(2), 1)
    with pytest.raises(fxmerge.StructureError, match=r"cannot be an identity.*norm.*depth='shrink'"):
        fxmerge.merge(a, b, example_inputs=VECTORS.double(), progress=False)


def test_stages_that_do_not_correspond_are_listed_side_by_side():
    with pytest.raises(fxmerge.StructureError, match=r"(?s)stages of the second.*1  stages\.0\.0.*\|  2"):
        fxmerge.merge(Residual(3, 2).eval(), chain(1, 1).eval(), example_inputs=IMAGES, progress=False)


# Merging ------------------------------------------------------------------------------------------------------

MATCHERS = [
    Average(), WeightMatching(), ActivationMatching(), OTFusion(), OTFusion(cost="both"), CCAMerge(), ZipIt(),
    PLeaS(budget=1.5),
]  # fmt: skip


@pytest.mark.parametrize("name", ["mlp", "convolutions with norms", "residual", "attention", "dense"])
@pytest.mark.parametrize("matcher", MATCHERS, ids=str)
def test_every_matcher_merges_other_depths(name, matcher):
    shallow, deep, x, _ = PAIRS[name]
    a, b = seeded(shallow), seeded(deep, 1)
    data = torch.randn(32, *x.shape[1:], generator=torch.Generator().manual_seed(5)).double()
    result = fxmerge.merge(a, b, data=[data], example_inputs=x.double(), matcher=matcher, progress=False)
    assert bool(torch.isfinite(result.module(x.double())).all())
    assert set(result.module.state_dict()) == set(b.state_dict())
    assert result.report.depth
    assert "grown by" in str(result.report)


@pytest.mark.parametrize("matcher", [WeightMatching(), ActivationMatching(), OTFusion(), ZipIt(), PLeaS()], ids=str)
@pytest.mark.parametrize("name", ["residual", "attention", "dense"])
def test_what_only_the_deeper_network_has_stays_whole(name, matcher):
    """A network and its shallower self, units without effect left out: merging gives the function back."""
    shallow, _, x, _ = PAIRS[name]
    x = x.double()
    small = seeded(shallow)
    unit = find_stages(fxmerge.infer_classes(small, x))[0].units[0].name
    deep = deepen(small, {unit: 2}, x)
    twin = fxmerge.permute(small, fxmerge.infer_classes(small, x), seed=3)
    result = fxmerge.merge(deep, twin, data=[x], example_inputs=x, matcher=matcher, repair=None, progress=False)
    assert change(result.module, small, x) < 1e-9
    state, given = result.module.state_dict(), deep.state_dict()
    for key in (k for k in given if "inserted" in k and given[k].is_floating_point()):
        torch.testing.assert_close(state[key], given[key], rtol=0, atol=1e-12)


@pytest.mark.parametrize("matcher", [WeightMatching(), ActivationMatching(), OTFusion()], ids=str)
def test_what_only_the_deeper_network_adds_counts_by_its_share(matcher):
    """The end of an inserted branch is zero in the shallower network, so a quarter of the deeper one's is left."""
    x = IMAGES.double()
    small = seeded(lambda: Residual(2, 2))
    deep = deepen(small, {"stages.0.0": 1}, x)
    with torch.no_grad():
        for name, p in deep.named_parameters():
            if "inserted1.bn2" in name:
                p.normal_()
    twin = fxmerge.permute(small, fxmerge.infer_classes(small, x), seed=3)
    options = {"data": [x], "example_inputs": x, "matcher": matcher, "repair": None, "progress": False}
    state = fxmerge.merge(deep, twin, weights=[0.25, 0.75], **options).module.state_dict()
    for key in ("weight", "bias"):
        name = f"stages.0.0_inserted1.bn2.{key}"
        torch.testing.assert_close(state[name], 0.25 * deep.state_dict()[name])
    name = "stages.0.0_inserted1.conv2.weight"
    torch.testing.assert_close(state[name], deep.state_dict()[name])


def test_the_result_has_the_names_of_the_deeper_network_wherever_it_stands():
    a, b = seeded(lambda: mlp(8, 8)), seeded(lambda: mlp(8, 8, 8, 8), 1)
    x = VECTORS.double()
    one = fxmerge.merge(a, b, data=[x], example_inputs=x, weights=[0.3, 0.7], progress=False)
    two = fxmerge.merge(b, a, data=[x], example_inputs=x, weights=[0.7, 0.3], progress=False)
    assert (one.report.weights, two.report.weights) == ((0.3, 0.7), (0.7, 0.3))
    torch.testing.assert_close(dict(one.module.state_dict()), dict(two.module.state_dict()), rtol=0, atol=0)
    b.load_state_dict(one.module.state_dict())
    assert "network 1 grown" in " ".join(one.report.notes)


def test_networks_none_of_which_is_the_deepest_everywhere():
    x = IMAGES.double()
    a, b, c = (
        seeded(lambda: Residual(3, 2)),
        seeded(lambda: Residual(2, 4), 1),
        seeded(lambda: Residual(2, 3, width=5), 2),
    )
    result = fxmerge.merge(a, b, c, data=[x], example_inputs=x, repair=LeastSquares(), progress=False)
    counts = [len(s.units) for s in find_stages(fxmerge.infer_classes(result.module, x)) if s.units]
    assert counts == [3, 3]  # the first block of a later stage changes the width, and is fixed
    assert bool(torch.isfinite(result.module(x)).all())
    assert result.report.weights == pytest.approx([1 / 3] * 3)


def test_three_networks_of_different_depth_have_equal_influence():
    """Copies of one function at three depths, two of them of twice the outputs: the mean is that of the outputs."""
    x = IMAGES.double()
    small = seeded(lambda: Residual(2, 2))
    nets = [small, deepen(small, {"stages.0.0": 1}, x), deepen(small, {"stages.0.0": 3}, x)]
    with torch.no_grad():
        for m in nets[1:]:
            for p in m.head.parameters():
                p.mul_(2)
    result = fxmerge.merge(*nets, data=[x], example_inputs=x, matcher=ActivationMatching(), repair=None, progress=False)
    with torch.no_grad():
        torch.testing.assert_close(result.module(x), sum(m(x) for m in nets) / 3, rtol=1e-9, atol=1e-9)


@settings(max_examples=6, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=4), st.integers(3, 9), st.sampled_from([0, 1]))
def test_any_depths_and_widths(counts, width, which):
    x = (VECTORS if which else IMAGES).double()
    makes = [
        (lambda n=n: mlp(*[width + n] * n)) if which else (lambda n=n: Residual(n, 2, width=width)) for n in counts
    ]
    nets = [seeded(make, k) for k, make in enumerate(makes)]
    result = fxmerge.merge(*nets, data=[x], example_inputs=x, progress=False)
    assert bool(torch.isfinite(result.module(x)).all())
    assert set(result.module.state_dict()) == set(nets[counts.index(max(counts))].state_dict())


# Shrinking and targets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "mlp of other widths", "convolutions with norms", "residual", "attention"])
def test_the_deeper_network_is_shrunk(name):
    shallow, deep, x, _ = PAIRS[name]
    a, b = seeded(deep), seeded(shallow, 1)
    options = {"data": [x.double()], "example_inputs": x.double(), "progress": False}
    result = fxmerge.merge(a, b, depth="shrink", **options)
    assert set(result.module.state_dict()) == set(b.state_dict())
    assert bool(torch.isfinite(result.module(x.double())).all())
    again = fxmerge.merge(a, b, target="shallower", **options)
    torch.testing.assert_close(dict(again.module.state_dict()), dict(result.module.state_dict()))
    assert all(p.shape == q.shape for p, q in zip(result.module.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_joined_units_give_what_they_gave_together(kind):
    """Units whose joint effect one unit can have: the fit is exact."""
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(512, 6, generator=draw).double()
    if kind == "plain":
        make = {n: (lambda n=n: mlp(*[6] * n)) for n in (2, 3)}
    else:
        make = {n: (lambda n=n: Stages(n, 1)) for n in (1, 2)}
    deep, shallow = (seeded(make[n]) for n in sorted(make, reverse=True))
    with torch.no_grad():
        if kind == "plain":  # positive pre-activations: the chain is linear there
            for layer in (deep[2], deep[4]):
                layer.weight.abs_()
                layer.bias.abs_()
        else:  # the second unit adds a linear function of what the last layer of the first one reads
            for k in (0, 1):
                deep.a[k][0].weight.zero_(), deep.a[k][1].weight.zero_(), deep.a[k][1].bias.zero_()
    result = fxmerge.merge(
        deep, shallow, target=shallow, weights=[1, 0], matcher=Average(), data=[x], example_inputs=x, repair=None,
        progress=False,
    )  # fmt: skip
    assert change(result.module, deep, x) < 0.02


@pytest.mark.parametrize("join", ["sum", "majority", "fraction"])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_are_joined_by_signs(join, bias):
    """Where all pre-activations are positive, W2 W1 is exact; where all are negative, nothing is left of them."""
    x = torch.rand(32, 6, generator=torch.Generator().manual_seed(0)).double()
    deep, shallow = (seeded(lambda n=n: mlp(*[6] * n, bias=bias)) for n in (3, 2))
    options = {"target": shallow, "weights": [1, 0], "matcher": Average(), "data": list(x.split(10)), "repair": None}
    options |= {"example_inputs": x, "progress": False, "depth": CLAFusion("shrink", join=join)}
    with torch.no_grad():
        for p in deep[:6].parameters():
            p.abs_()
    assert change(fxmerge.merge(deep, shallow, **options).module, deep, x) < 1e-12
    with torch.no_grad():
        for p in deep[2].parameters():
            p.neg_()
    assert change(fxmerge.merge(deep, shallow, **options).module, deep, x) < 1e-12


def test_signs_are_for_linear_layers():
    a, b = chain(1, 1).eval(), chain(2, 1).eval()
    options = {"data": [IMAGES], "example_inputs": IMAGES, "progress": False, "depth": CLAFusion("shrink", join="sum")}
    with pytest.raises(fxmerge.StructureError, match=r"linear layers without norms.*join='ridge'"):
        fxmerge.merge(a, b, **options)


def test_a_target_of_other_depth_and_width():
    a, b, target = mlp(8, 8, 8), mlp(7, 7), mlp(5, 4, 3, 6)
    result = fxmerge.merge(a, b, target=target, data=[VECTORS], example_inputs=VECTORS, progress=False)
    target.load_state_dict(result.module.state_dict())
    with pytest.raises(fxmerge.InputError, match=r"target has other widths.*OTFusion\(\)"):
        fxmerge.merge(a, a, target=target, matcher=WeightMatching(), example_inputs=VECTORS, progress=False)


def test_networks_that_differ_in_names_only_are_merged():
    class Renamed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.second(torch.relu(self.first(x)))

    class Named(Renamed):
        def __init__(self):
            super().__init__()
            self.body, self.out = self.first, self.second
            del self.first, self.second

        def forward(self, x):
            return self.out(torch.relu(self.body(x)))

    a = Renamed()
    b = Named()
    b.load_state_dict({k.replace("first", "body").replace("second", "out"): v for k, v in a.state_dict().items()})
    result = fxmerge.merge(a, b, example_inputs=VECTORS, matcher=WeightMatching(), progress=False)
    torch.testing.assert_close(dict(result.module.state_dict()), dict(a.state_dict()))


def test_the_depth_map_is_in_the_report(tmp_path):
    x = VECTORS.double()
    result = fxmerge.merge(
        seeded(lambda: mlp(8, 8, 8)), seeded(lambda: mlp(8, 8), 1), data=[x], example_inputs=x, progress=False
    )
    (link,) = result.report.depth
    assert link.costs.shape == (1, 2)
    assert (link.short, link.long) == (("2",), ("2", "4"))
    assert f"2 = {link.long[link.chosen[0]]}" in str(result.report)
    pytest.importorskip("matplotlib")
    path = tmp_path / "depth.png"
    result.report.plot_depth(path)
    assert path.stat().st_size > 1000


# What broke it once -------------------------------------------------------------------------------------------


class Blocks(nn.Module):
    """A stream of 8 and blocks that ``step`` writes."""

    def __init__(self, depth, step, inner=7):
        super().__init__()
        self.stem, self.head, self.step = nn.Linear(6, 8), nn.Linear(8, 3), step
        self.up = nn.ModuleList(nn.Linear(8, inner) for _ in range(depth))
        self.down = nn.ModuleList(nn.Linear(inner, 8) for _ in range(depth))

    def forward(self, x):
        x = self.stem(x)
        for k, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            x = self.step(x, up, down, k)
        return self.head(x)


def asserting(x, up, down, k):
    torch._assert(x.dim() == 2, "two axes")
    return x + down(torch.relu(up(x)))


def dropping(x, up, down, k):
    return x + torchvision.ops.stochastic_depth(down(torch.relu(up(x))), 0.1 * (k + 1), "row", False)


def behind(x, up, down, k):
    return torch.relu(x + down(torch.tanh(up(x))))


@pytest.mark.parametrize("step", [asserting, dropping], ids=lambda step: step.__name__)
@pytest.mark.parametrize("how", ["grow", "shrink"])
def test_what_nobody_reads_and_what_only_training_reads_does_not_matter(step, how):
    a, b = seeded(lambda: Blocks(1, step)), seeded(lambda: Blocks(3, step), 1)
    x = VECTORS.double()
    result = fxmerge.merge(a, b, depth=how, data=[x], example_inputs=x, progress=False)
    (b if how == "grow" else a).load_state_dict(result.module.state_dict())


@pytest.mark.parametrize("seed", range(4))
def test_a_unit_that_cannot_be_an_identity_is_one_that_corresponds(seed):
    """The first unit reads values of both signs, so a ReLU behind its sum would change them."""
    torch.manual_seed(seed)
    result = fxmerge.merge(Blocks(1, behind), Blocks(3, behind), data=[VECTORS], example_inputs=VECTORS, progress=False)
    (link,) = result.report.depth
    assert link.chosen == (0,)


class Trailing(nn.Module):
    """Something without parameters follows the last unit, and it alone."""

    def __init__(self, depth):
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 3)
        self.layers = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(depth))

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(self.norm(torch.relu(x)).mean((2, 3)))


def test_one_unit_against_two_with_something_behind_the_last():
    a, b = Trailing(1).eval(), Trailing(2).eval()
    b.load_state_dict(fxmerge.merge(a, b, example_inputs=IMAGES, progress=False).module.state_dict())


@pytest.mark.parametrize("matcher", [WeightMatching(), OTFusion(cost="weights"), OTFusion(cost="both")], ids=str)
def test_what_two_of_three_have_is_matched_between_these(matcher):
    x = IMAGES.double()
    small, deep = seeded(lambda: Residual(1, 2)), seeded(lambda: Residual(3, 2), 5)
    twin = fxmerge.permute(deep, fxmerge.infer_classes(deep, x), seed=1)
    options = {"matcher": matcher, "example_inputs": x, "data": [x], "repair": None, "progress": False}
    result = fxmerge.merge(deep, twin, small, weights=[0.5, 0.5, 0], **options)
    assert change(result.module, deep, x) < 1e-9


def test_three_parents_that_differ_in_depth_and_inside_their_blocks():
    nets = [Residual(a, b, inner=i).eval() for a, b, i in ((1, 2, 4), (3, 1, 5), (2, 4, 6))]
    result = fxmerge.merge(*nets, example_inputs=IMAGES, progress=False)
    assert bool(torch.isfinite(result.module(IMAGES)).all())


@pytest.mark.parametrize("weights", [[1, 0], [0, 1]])
def test_a_parent_of_weight_zero_says_nothing(weights):
    x = VECTORS.double()
    nets = seeded(lambda: mlp(8, 8, 8), 1), seeded(lambda: mlp(8, 8))
    result = fxmerge.merge(*nets, weights=weights, matcher=Average(), example_inputs=x, repair=None, progress=False)
    assert change(result.module, nets[weights.index(1)], x) < 1e-12


@pytest.mark.parametrize("matcher", [ActivationMatching(), OTFusion(), ZipIt(), WeightMatching()], ids=str)
def test_a_target_deeper_than_all_parents(matcher):
    def step(x, up, down, k):
        return x + down(torch.relu(up(x)))

    a, b, target = Blocks(2, step), Blocks(2, step), Blocks(3, step)
    options = {"data": [VECTORS], "example_inputs": VECTORS, "matcher": matcher, "progress": False}
    target.load_state_dict(fxmerge.merge(a, b, target=target, **options).module.state_dict())


class Appending(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8 + 3 * depth, 3)
        self.layers = nn.ModuleList(nn.Linear(8 + 3 * k, 3) for k in range(depth))

    def forward(self, x):
        found = [self.stem(x)]
        for layer in self.layers:
            found.append(torch.relu(layer(torch.cat(found, 1))))
        return self.head(torch.cat(found, 1))


def test_a_layer_that_is_concatenated_behind_its_activation():
    model = seeded(lambda: Appending(2))
    assert change(deepen(model, {"layers.0": 1}, VECTORS.double()), model, VECTORS.double()) == 0


class Pooling(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 3)
        self.layers = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(depth))

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = x + F.avg_pool2d(x, 3, 1, 1)
            x = x + layer(F.relu(x))
        return self.head(x.mean((2, 3)))


def grouped(depth, width):
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), nn.ReLU()]
    for _ in range(depth):
        layers += [nn.Conv2d(width, width, 3, padding=1, groups=4), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3)).eval()


def normed(depth, **options):
    layers: list[nn.Module] = [nn.Linear(6, 8), nn.ReLU()]
    for _ in range(depth):
        layers += [nn.Linear(8, 8), nn.BatchNorm1d(8, **options), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(8, 3)).eval()


def reparametrised(depth):
    layers: list[nn.Module] = [nn.Linear(6, 8), nn.ReLU()]
    for _ in range(depth):
        layers += [nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(8, 3)).eval()


def opaque(depth):
    layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
    return nn.Sequential(nn.Linear(6, 8), nn.TransformerEncoder(layer, depth), nn.Linear(8, 3)).eval()


@pytest.mark.parametrize(
    ("parents", "x", "options", "reason"),
    [
        (lambda: (Pooling(1), Pooling(2)), IMAGES, {}, "even with all its 2 parameters at zero"),
        (lambda: (grouped(1, 8), grouped(2, 12)), IMAGES, {}, "width at.*in blocks.*equal widths"),
        (lambda: (normed(1, affine=False), normed(3, affine=False)), VECTORS, {}, "none for BatchNorm1d"),
        (lambda: (reparametrised(1), reparametrised(3)), VECTORS, {}, "none for Parametrized"),
        (lambda: (reparametrised(1), reparametrised(3)), VECTORS, {"depth": "shrink"}, "weight of its own"),
        (
            lambda: (opaque(1), opaque(2)),
            VECTORS, {}, "taken whole",
        ),
    ],
    ids=["pooling", "groups", "norm without parameters", "weight norm", "weight norm, shrink", "opaque"],
)  # fmt: skip
def test_refused_with_the_reason(parents, x, options, reason):
    with pytest.raises(fxmerge.StructureError, match=f"(?s){reason}"):
        fxmerge.merge(*parents(), data=[x], example_inputs=x, progress=False, **options)


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}, {}], ids=str)
def test_shrinking_with_any_batch_norm(options):
    a, b = normed(1, **options), normed(3, **options)
    result = fxmerge.merge(a, b, depth="shrink", data=[VECTORS], example_inputs=VECTORS, progress=False)
    a.load_state_dict(result.module.state_dict())


def test_patterns_are_inserted_whole():
    class Two(nn.Module):
        def __init__(self, first, second):
            super().__init__()
            self.a, self.b, self.between = Attention(first), Attention(second), nn.Linear(3, 8)

        def forward(self, x):
            return self.b(self.between(self.a(x))[:, None].expand(-1, 3, -1))

    nets = seeded(lambda: Two(3, 1)), seeded(lambda: Two(1, 2), 1)
    result = fxmerge.merge(*nets, example_inputs=TOKENS.double(), progress=False)
    counts = [len(s.units) for s in find_stages(fxmerge.infer_classes(result.module, TOKENS.double())) if s.units]
    assert counts == [3, 2, 3]  # blocks; two layers; a layer and blocks


@pytest.mark.parametrize("count", [-1, 2.5])
def test_a_number_of_units_is_a_number(count):
    with pytest.raises(fxmerge.InputError, match="no number of units"):
        deepen(mlp(8, 8), {"2": count}, VECTORS)


class Pairs(nn.Module):
    """Blocks of two branches, one after the other."""

    def __init__(self, depth):
        super().__init__()
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]) for _ in range(depth))

    def forward(self, x):
        x = self.stem(x)
        for first, second in self.blocks:
            x = x + first(torch.tanh(x))
            x = x + second(torch.relu(x))
        return self.head(x)


def test_a_block_of_two_branches_is_fitted_to_what_two_blocks_did():
    """The second block adds nothing, so the first one has nothing to make up for, nor its first branch to add again."""
    deep, x = seeded(lambda: Pairs(2)), VECTORS.double()
    with torch.no_grad():
        for p in deep.blocks[1].parameters():
            p.zero_()
    (blocks,) = (s.units for s in find_stages(fxmerge.infer_classes(deep, x)) if s.units)
    sample = Sample([x], lambda batch: ((batch,), {}))
    one = shrink(fxmerge.infer_classes(deep, x), [(blocks, 0)], sample, ridge=1e-9).traced.graph_module
    assert [u.name for s in find_stages(fxmerge.infer_classes(one, x)) for u in s.units] == ["blocks.0"]
    assert not torch.equal(one.state_dict()["blocks.0.1.weight"], deep.state_dict()["blocks.0.1.weight"])  # it ran
    assert change(one, deep, x) < 1e-6
