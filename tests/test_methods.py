"""Every method on networks as they are built, and the mathematics of each against an oracle."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from itertools import combinations, product
from typing import NamedTuple

import numpy as np
import ot
import pytest
import torch
from networks import NETWORKS, randomise
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.densenet import DenseNet
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import Bottleneck
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer

import fxmerge
from fxmerge.affinity import Affinity, from_moments, from_weights
from fxmerge.budget import Costs, spread
from fxmerge.cells import class_by_class, permutations
from fxmerge.collect import collect
from fxmerge.coupling import Permuted, fuse
from fxmerge.errors import InputError
from fxmerge.interfaces import AbstractMatcher, Problem
from fxmerge.ir import Alignment, AxisClasses, Coupling
from fxmerge.layout import resized
from fxmerge.linalg import correlation, transport
from fxmerge.matchers import ActivationMatching, CCAMerge, OTFusion, PLeaS, WeightMatching, ZipIt
from fxmerge.matchers.pleas import _match, _scores
from fxmerge.matchers.zipit import zipped
from fxmerge.moments import Moments, Statistics
from fxmerge.rewrite import rewrite
from fxmerge.stats import choose_taps
from fxmerge.symmetry import full_state, relative_error

# name -> (matcher, whether a permuted twin is given back exactly). A new option of a method is one row here.
METHODS: dict[str, tuple[AbstractMatcher, bool]] = {
    "weights": (WeightMatching(), True),
    "activations": (ActivationMatching(at="made"), True),
    "ot": (OTFusion(at="made"), True),
    "ot weights": (OTFusion("weights"), True),
    "ot cosine": (OTFusion(metric="cosine", at="made"), True),
    "ot norm": (OTFusion(importance="norm", at="made"), True),
    "ot reg": (OTFusion(reg=0.1, at="made"), False),
    "ot barycenter": (OTFusion(barycenter=2, at="made"), True),
    "cca": (CCAMerge(at="made"), True),
    "zipit": (ZipIt(at="made"), True),
    "pleas": (PLeaS(at="made"), True),
    "pleas 1.5": (PLeaS(1.5, at="made"), True),
    "pleas weights": (PLeaS(cost="weights"), True),
}


# Networks ---------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """An attention layer that is opaque: no activation shows what is inside."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.norm(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return self.head((x + self.mlp(x)).mean(1))


def pooled(channels: int) -> tuple[nn.Module, ...]:
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3)


def grouped_residual() -> nn.Module:
    shortcut = nn.Sequential(nn.Conv2d(8, 12, 1, 2, bias=False), nn.BatchNorm2d(12))
    blocks = (
        Bottleneck(8, 2, groups=2, base_width=96),
        Bottleneck(8, 3, 2, shortcut, groups=2, base_width=64),
    )
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), *blocks, *pooled(12))


def inverted_residual() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU6(),
        InvertedResidual(6, 6, 1, 2), InvertedResidual(6, 8, 2, 2), *pooled(8),
    )  # fmt: skip


class Hyper(nn.Module):
    """Gates and whole kernels that another network writes, different for every sample."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid, self.head = nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(3, 2)
        self.hidden, self.gate, self.kernel = nn.Linear(5, 7), nn.Linear(7, 6), nn.Linear(5, 12)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.gate(torch.tanh(self.hidden(x))))
        h = torch.tanh(self.mid(torch.tanh(self.stem(x)) * gate))
        return self.head(torch.tanh(torch.einsum("bi,bij->bj", h, self.kernel(x).view(-1, 4, 3))))


class Shuffle(nn.Module):
    """Two outputs per depthwise group, shuffled into the groups of the next: three classes, one in the other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3, groups=4, padding=1)
        self.norm, self.group, self.head = nn.BatchNorm2d(8), nn.Conv2d(8, 6, 1, groups=2), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.deep(torch.tanh(self.stem(x)))))
        b, c, h, w = x.shape
        x = x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        return self.head(torch.tanh(self.group(x)).mean((2, 3)))


class Twice(nn.Module):
    """One branch called on two streams whose outputs stand side by side, and a residual over both."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.mix, self.head = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(8, 8), nn.Linear(8, 2)
        self.shared = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 4))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.cat([self.shared(torch.tanh(self.a(x))), self.shared(torch.tanh(self.b(x)))], 1)
        return self.head(torch.tanh(z + self.mix(torch.tanh(z))))


class Experts(nn.Module):
    """A router over experts that live in one tensor, which exchange with all they hold."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.router, self.head = nn.Linear(5, 6), nn.Linear(6, 3), nn.Linear(6, 2)
        self.up, self.down = nn.Parameter(torch.empty(3, 6, 8)), nn.Parameter(torch.empty(3, 8, 6))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.stem(x))
        y = torch.einsum("eko,bek->beo", self.down, torch.tanh(torch.einsum("bi,eik->bek", h, self.up)))
        return self.head(torch.tanh(h + (self.router(h).softmax(-1)[..., None] * y).sum(1)))


class Network(NamedTuple):
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    inexact: frozenset[str] = frozenset()  # methods that need not give a twin back, as its comment says


# A stream that is written by few inputs, or normalised, has no full rank: CCA finds one of many maps.
NO_RANK = frozenset({"cca"})
BUILT: dict[str, Network] = {
    "encoder": Network(Encoder, (4, 5), NO_RANK),
    "vision transformer": Network(
        lambda: VisionTransformer(8, 4, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=12, num_classes=5),
        (3, 8, 8),
        NO_RANK,
    ),
    "windows": Network(
        lambda: SwinTransformer(
            [2, 2], 8, [1, 1], [2, 2], [2, 2], mlp_ratio=1.5, stochastic_depth_prob=0.0, num_classes=5
        ),
        (3, 8, 8),
        NO_RANK,
    ),
    "grouped residual": Network(grouped_residual, (3, 10, 10)),
    "dense": Network(lambda: DenseNet(4, (2, 1), 8, bn_size=2, num_classes=5), (3, 32, 32), NO_RANK),
    "inverted residual": Network(inverted_residual, (3, 10, 10)),
    "hyper": Network(Hyper, (5,), NO_RANK),
    "shuffle": Network(Shuffle, (3, 8, 8)),
    "twice": Network(Twice, (5,), NO_RANK),
    # router probabilities are normalised over all experts, those kept apart too
    "experts": Network(Experts, (5,), NO_RANK | {"pleas 1.5"}),
}


def made(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    return randomise(make().double().eval(), seed)


class Prepared(NamedTuple):
    models: tuple[nn.Module, ...]
    x: Tensor
    problem: Problem


@cache
def prepared(name: str, kind: str, count: int = 2) -> Prepared:
    """Parents and what a matcher is given, once for all methods."""
    net = BUILT[name]
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(2, *net.shape, generator=draw, dtype=torch.float64)
    model = made(net.make)
    classes = fxmerge.infer_classes(model, x)
    if kind == "twin":
        models = (model, *(fxmerge.permute(model, classes, seed=10 + s) for s in range(1, count)))
    else:
        models = (model, *(made(net.make, s) for s in range(1, count)))
    everyone = tuple(fxmerge.infer_classes(m, x) for m in models)
    data = [torch.randn(32, *net.shape, generator=draw, dtype=torch.float64) for _ in range(2)]
    taps = [choose_taps(c, "made") for c in everyone]
    statistics = collect(everyone, data, lambda batch: ((batch,), {}), taps)
    states = tuple({n: v.detach() for n, v in full_state(m).items()} for m in models)
    shares = ((1 / count,) * count,) * len(classes)
    return Prepared(models, x, Problem(everyone, states, shares, frozenset(), statistics))


def fused(p: Problem, matcher: AbstractMatcher) -> nn.Module:
    alignment = matcher.match(p)
    wide = resized(p.classes[0], {k: c.size for k, c in enumerate(alignment.couplings)})
    return rewrite(p.classes[0], fuse(p.classes, wide, alignment, p.states, p.shares[0]), wide)


def far(expected: nn.Module, got: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return relative_error(expected(x), got(x))


def test_every_row_of_a_stack_goes_through_its_own_block():
    """Experts of B in another order, and a matrix of its own for each expert's hidden neurons."""
    case = NETWORKS["mixture"]
    a, b = (randomise(case.make(), s).double() for s in (1, 2))
    x = case.example_inputs[0].double()
    classes = fxmerge.infer_classes(a, x)
    experts = next(k for k in range(len(classes)) if classes.children(k))
    (hidden,) = classes.children(experts)
    order = torch.tensor([2, 0, 1])
    draw = torch.Generator().manual_seed(0)
    parts = torch.rand(2, 3, 4, 4, generator=draw, dtype=torch.float64)  # merge and unmerge of every pair
    merge, unmerge = torch.zeros(2, 3, 4, 3, 4, dtype=torch.float64)
    merge[torch.arange(3), :, order], unmerge[torch.arange(3), :, order] = parts[0], parts[1]
    eye = torch.eye(12, dtype=torch.float64)
    couplings = [Permuted([torch.arange(c.size)] * 2, (0.5, 0.5)) for c in classes]
    couplings[experts] = Permuted([torch.arange(3), order], (0.5, 0.5))
    couplings[hidden] = Coupling(
        torch.cat([eye / 2, merge.reshape(12, 12) / 2], 1), torch.cat([eye, unmerge.reshape(12, 12).T]), (12, 12)
    )
    states = [dict(m.state_dict()) for m in (a, b)]
    got = fuse((classes,) * 2, classes, Alignment(tuple(couplings), "drawn"), states, (0.5, 0.5))
    for e in range(3):
        u, v = parts[:, e]
        for name in ("up", "bias"):  # gates, then values
            there = states[1][name][order[e]].unflatten(0, (2, 4))
            expected = states[0][name][e] + torch.einsum("ij,gj...->gi...", u, there).flatten(0, 1)
            torch.testing.assert_close(got[name][e], expected / 2)
        expected = states[0]["down"][e] + states[1]["down"][order[e]] @ v.T
        torch.testing.assert_close(got["down"][e], expected / 2)


# All methods on all networks --------------------------------------------------------------------------------


def rows(names: Iterable[str]) -> list[object]:
    names = list(names)
    return [pytest.param(m, n) for m in METHODS for n in names]


def exact(method: str, name: str) -> bool:
    return METHODS[method][1] and method not in BUILT[name].inexact


@pytest.mark.parametrize(("method", "name"), rows(n for n in BUILT if n != "encoder"))
def test_a_permuted_twin_is_given_back(method, name):
    models, x, p = prepared(name, "twin")
    assert any(not torch.equal(u, v) for u, v in zip(p.states[0].values(), p.states[1].values(), strict=True))
    module = fused(p, METHODS[method][0])
    assert list(module.state_dict()) == list(models[0].state_dict())
    assert all(bool(torch.isfinite(v).all()) for v in module.state_dict().values())
    if exact(method, name):
        assert far(models[0], module, x) < 1e-6
    else:
        assert bool(torch.isfinite(module(x)).all())


@pytest.mark.parametrize("name", ["encoder", "inverted residual", "hyper"])
@pytest.mark.parametrize("method", METHODS)
def test_unrelated_parents_give_a_network_that_runs(method, name):
    models, x, p = prepared(name, "other")
    module = fused(p, METHODS[method][0])
    with torch.no_grad():
        y = module(x)
    assert y.shape == models[0](x).shape
    if not (method == "cca" and "running_var" in "".join(module.state_dict())):  # variances are repair's
        assert bool(torch.isfinite(y).all())
    assert list(module.state_dict()) == list(models[0].state_dict())
    if method != "pleas 1.5":
        assert [v.shape for v in module.state_dict().values()] == [v.shape for v in models[0].state_dict().values()]


@pytest.mark.parametrize("method", METHODS)
def test_three_parents(method):
    matcher, recovers = METHODS[method]
    models, x, p = prepared("grouped residual", "twin", 3)
    module = fused(p, matcher)
    if recovers and method != "zipit":  # with a small alpha the third twin may go to another pair
        assert far(models[0], module, x) < 1e-6
    other = fused(prepared("encoder", "other", 3).problem, matcher)
    assert bool(torch.isfinite(other(prepared("encoder", "other", 3).x)).all())


@pytest.mark.parametrize("method", METHODS)
def test_the_whole_way_is_reproducible_and_alike_in_single_precision(method):
    matcher, _ = METHODS[method]
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(2, 5, generator=draw, dtype=torch.float64)
    data = [torch.randn(64, 5, generator=draw, dtype=torch.float64)]
    a, b = made(Twice), made(Twice, 1)
    found = []
    for dtype in (torch.float64, torch.float64, torch.float32):
        parents = [m.to(dtype) for m in (a, b)]
        result = fxmerge.merge(
            *parents, example_inputs=x.to(dtype), data=[d.to(dtype) for d in data], matcher=matcher,
            repair=None, seed=3, progress=False,
        )  # fmt: skip
        assert {v.dtype for v in result.module.state_dict().values()} == {dtype}
        found.append({n: v.detach().clone() for n, v in result.module.state_dict().items()})
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])
    for n, v in found[0].items():
        torch.testing.assert_close(found[2][n].double(), v, rtol=1e-3, atol=1e-3)


# Affinities -------------------------------------------------------------------------------------------------


def test_an_affinity_is_made_of_inner_products():
    a, b = made(lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))), None
    b = made(lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2)), 1)
    x = torch.randn(50, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    classes = [fxmerge.infer_classes(m, x) for m in (a, b)]
    k = next(k for k, c in enumerate(classes[0]) if c.free)
    stats = collect(classes, [x[:20], x[20:]], lambda v: ((v,), {}), [choose_taps(c) for c in classes])
    with torch.no_grad():
        rows = torch.cat([a[:2](x), b[:2](x)], 1).numpy()
    found = from_moments(stats.moments[k])
    np.testing.assert_allclose(found.correlation.numpy(), np.corrcoef(rows.T), atol=1e-10)
    ratio = found.raw.numpy() / (rows.T @ rows)
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-9)
    np.testing.assert_allclose(found.centred.numpy() / np.cov(rows.T, bias=True), ratio[0, 0] * 50, rtol=1e-9)
    settled = {j: c for j, c in enumerate(OTFusion("weights").match(problem(a, b, x)).couplings) if j != k}
    states = [{n: v.detach() for n, v in full_state(m).items()} for m in (a, b)]
    by_weights = from_weights(classes, [c.by_tensor() for c in classes], states, k, settled)
    assert by_weights is not None
    assert by_weights.count == 0
    around = ((m[0].weight, m[0].bias[:, None], m[2].weight.T) for m in (a, b))
    w = torch.cat([torch.cat(tensors, 1) for tensors in around]).detach()
    torch.testing.assert_close(by_weights.raw, w @ w.T, rtol=1e-12, atol=1e-12)
    part = found.at([torch.tensor([2, 0]), torch.tensor([5])])
    assert part.widths == (2, 1)
    assert part.raw[0, 2] == found.raw[2, 9]


def problem(a: nn.Module, b: nn.Module, x: Tensor, statistics: Statistics | None = None) -> Problem:
    classes = tuple(fxmerge.infer_classes(m, x) for m in (a, b))
    states = tuple({n: v.detach() for n, v in full_state(m).items()} for m in (a, b))
    return Problem(classes, states, ((0.5, 0.5),) * len(classes[0]), frozenset(), statistics)


def affinity(widths: tuple[int, ...], samples: int = 200, seed: int = 0) -> Affinity:
    """Of random features with much in common."""
    draw = torch.Generator().manual_seed(seed)
    total = sum(widths)
    x = torch.randn(samples, total, generator=draw, dtype=torch.float64)
    x = x @ torch.randn(total, total, generator=draw, dtype=torch.float64) + 0.5
    zero = torch.zeros(total, dtype=torch.float64)
    return from_moments([Moments(samples, zero, x.sum(0), x.T @ x, widths)])


# Optimal transport ------------------------------------------------------------------------------------------


def masses(n: int, seed: int) -> Tensor:
    mass = 0.1 + torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return mass / mass.sum()


@pytest.mark.parametrize(("n", "m"), [(1, 1), (5, 5), (4, 9), (12, 7)])
@pytest.mark.parametrize("reg", [0.0, 0.05, 0.5])
def test_transport_is_that_of_pot(n, m, reg):
    u, v = masses(n, 1), masses(m, 2)
    cost = torch.rand(n, m, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 7
    plan = transport(u, v, cost, reg)
    scaled = (cost / cost.max()).numpy()
    if reg:
        expected = ot.sinkhorn(u.numpy(), v.numpy(), scaled, reg, stopThr=1e-12, numItermax=100000)
    else:
        expected = ot.emd(u.numpy(), v.numpy(), scaled)
    np.testing.assert_allclose(plan.numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(plan.sum(1).numpy(), u.numpy(), rtol=1e-3)
    np.testing.assert_allclose(plan.sum(0).numpy(), v.numpy(), rtol=1e-3)
    assert float(plan.min()) >= 0


def test_transport_takes_any_total_mass_and_any_scale_of_cost():
    u, v, cost = masses(4, 1), masses(6, 2), torch.rand(4, 6, dtype=torch.float64, generator=torch.Generator())
    for reg in (0.0, 0.1):
        torch.testing.assert_close(transport(3 * u, 5 * v, 1e-6 * cost, reg), transport(u, v, cost, reg))


def test_mass_that_would_be_lost_is_refused():
    n = 8
    cost = torch.ones(n, n, dtype=torch.float64)
    cost[:, 0] = 0  # every row is pulled to one column, with a force that underflows
    with pytest.raises(InputError, match=r"mass would be lost.*larger reg"):
        transport(masses(n, 1), masses(n, 2), cost, reg=1e-4)
    assert torch.isfinite(transport(masses(n, 1), masses(n, 2), cost)).all()


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("importance", ["uniform", "norm"])
@pytest.mark.parametrize("widths", [(5, 5), (5, 8), (8, 3)])
def test_otfusion_is_the_plan_of_pot_on_the_distances(metric, importance, widths):
    a = affinity(widths)
    coupling = OTFusion(metric=metric, importance=importance)._solve(a, (0.3, 0.7), widths[0])
    size = a.raw.diagonal().numpy()
    one, two = size[: widths[0]], size[widths[0] :]
    inner = a.between(a.raw, 0, 1).numpy()
    cost = one[:, None] + two[None] - 2 * inner if metric == "euclidean" else 1 - inner / np.sqrt(np.outer(one, two))
    mass = [np.ones(n) / n if importance == "uniform" else np.sqrt(s) / np.sqrt(s).sum() for n, s in
            zip(widths, (one, two), strict=True)]  # fmt: skip
    plan = ot.emd(*mass, cost)
    merge, unmerge = coupling.merge.split(widths, 1), coupling.unmerge.split(widths)
    np.testing.assert_allclose(merge[1].numpy(), 0.7 * plan / plan.sum(1, keepdims=True), atol=1e-9)
    np.testing.assert_allclose(unmerge[1].numpy(), (plan / plan.sum(0)).T, atol=1e-9)
    np.testing.assert_allclose(merge[0].numpy(), 0.3 * np.eye(widths[0]), atol=1e-12)


@pytest.mark.parametrize("reg", [0.0, 0.1])
@pytest.mark.parametrize("barycenter", [0, 3])
@pytest.mark.parametrize("n", [4, 6, 11])
def test_no_mass_is_made_or_lost(reg, barycenter, n):
    shares = (0.2, 0.5, 0.3)
    coupling = OTFusion(reg=reg, barycenter=barycenter)._solve(affinity((6, 4, 9)), shares, n)
    assert coupling.merge.shape == (n, 19)
    for share, part in zip(shares, coupling.merge.split((6, 4, 9), 1), strict=True):
        torch.testing.assert_close(part.sum(1), torch.full((n,), share, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(coupling.unmerge.sum(1), torch.ones(19, dtype=torch.float64), rtol=1e-6, atol=0)
    assert min(float(coupling.merge.min()), float(coupling.unmerge.min())) >= 0


# Canonical correlations -------------------------------------------------------------------------------------


def root(matrix: np.ndarray, power: float) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * values**power) @ vectors.T


@pytest.mark.parametrize("gamma", [0.0, 0.1, 1.0])
def test_cca_is_the_formula_of_the_paper(gamma):
    n, a = 6, affinity((6, 6, 6))
    coupling = CCAMerge(gamma)._solve(a, (0.2, 0.5, 0.3), n)
    for b, share in ((1, 0.5), (2, 0.3)):
        own, other, cross = (a.between(a.centred, *pair).numpy() for pair in ((0, 0), (b, b), (0, b)))
        x, y = (s + gamma * np.trace(s) / n * np.eye(n) for s in (own, other))
        left, _, right = np.linalg.svd(root(x, -0.5) @ cross @ root(y, -0.5))
        expected = root(x, 0.5) @ left @ right @ root(y, -0.5)
        there = coupling.merge.split(a.widths, 1)[b].numpy() / share
        back = coupling.unmerge.split(a.widths)[b].numpy()
        np.testing.assert_allclose(there, expected, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(back @ there, np.eye(n), atol=1e-9)
        if gamma == 0:  # canonical: what is mapped has the first parent's covariance
            np.testing.assert_allclose(there @ other @ there.T, own, rtol=1e-6, atol=1e-8)


def test_cca_refuses_data_that_shows_too_little():
    a, b = (made(lambda: nn.Sequential(nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, 2)), s) for s in (0, 1))
    x = torch.randn(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    options = {"example_inputs": x, "matcher": CCAMerge(), "progress": False}
    with pytest.raises(InputError, match=r"'0\.weight:0' has 40 neurons .* shows them 40 times.*at least 41"):
        fxmerge.merge(a, b, data=[x], **options)
    fxmerge.merge(a, b, data=[x, x[:1]], **options)


def test_a_variance_stays_one_under_a_map_with_signs():
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 2))

    models = [made(make, s) for s in range(2)]
    x = torch.randn(64, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    result = fxmerge.merge(*models, example_inputs=x, data=[x], matcher=CCAMerge(), repair=None, progress=False)
    assert any(float(c.merge.min()) < 0 for c in result.alignment.couplings)
    lowest = min(float(m[1].running_var.min()) for m in models)
    assert float(result.module.get_buffer("1.running_var").min()) >= lowest
    assert bool(torch.isfinite(result.module(x)).all())


# ZipIt! -----------------------------------------------------------------------------------------------------


def naive_zip(alike: np.ndarray, owner: np.ndarray, n: int, alpha: float, beta: float) -> np.ndarray | None:
    """Every pair looked at anew in every round; None where no pair is left, not even with mixed clusters."""
    clusters = {i: {i} for i in range(len(owner))}
    value = {frozenset(p): float(alike[p]) for p in combinations(range(len(owner)), 2)}
    left = {p: math.floor(beta * (owner == p).sum()) for p in set(owner.tolist())}

    def inside(i: int, j: int) -> int | None:
        models = {int(owner[m]) for m in clusters[i] | clusters[j]}
        return models.pop() if len(models) == 1 else None

    def forbid() -> None:
        for pair in value:
            model = inside(*pair)
            if model is not None and left[model] == 0:
                value[pair] = -math.inf

    forbid()
    while len(clusters) > n:
        best = max(value, key=value.__getitem__)
        if value[best] == -math.inf:
            for i, j in combinations(clusters, 2):
                if inside(i, j) is None:
                    value[frozenset({i, j})] = min(float(alike[a, b]) for a in clusters[i] for b in clusters[j])
            best = max(value, key=value.__getitem__)
        if value[best] == -math.inf:
            return None
        i, j = sorted(best)
        model = inside(i, j)
        if model is not None:
            left[model] -= 1
        for other in clusters.keys() - {i, j}:
            lesser = min(value[frozenset({i, other})], value.pop(frozenset({j, other})))
            value[frozenset({i, other})] = alpha * lesser if lesser > -math.inf else lesser
        del value[best]
        clusters[i] |= clusters.pop(j)
        forbid()
    found = np.empty(len(owner), int)
    for number, i in enumerate(sorted(clusters)):
        found[list(clusters[i])] = number
    return found


@pytest.mark.parametrize("models", [2, 3])
@pytest.mark.parametrize("alpha", [0.3, 0.9, 1.0])
@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
def test_zipping_is_the_greedy_of_the_paper(models, alpha, beta):
    rng = np.random.default_rng(0)
    several = 0
    for size in (2, 5, 8):
        owner = np.repeat(np.arange(models), size)
        alike = np.corrcoef(rng.standard_normal((len(owner), 12)))
        for n in (size, size + 1, max(1, size - 2)):
            expected = naive_zip(alike, owner, n, alpha, beta)
            if expected is None:
                with pytest.raises(InputError, match="larger beta"):
                    zipped(alike, owner, n, alpha, beta)
                continue
            found = zipped(alike, owner, n, alpha, beta)
            np.testing.assert_array_equal(found, expected)
            within = [len(set(owner[found == c].tolist())) == 1 and (found == c).sum() > 1 for c in range(n)]
            assert beta or not any(within)
            several += sum((found == c).sum() > 1 for c in range(n))
    assert several


@pytest.mark.parametrize("name", ["grouped residual", "twice"])
def test_three_twins_are_zipped_where_a_merged_neuron_loses_nothing(name):
    models, x, p = prepared(name, "twin", 3)
    assert far(models[0], fused(p, ZipIt(alpha=1.0)), x) < 1e-6


def test_a_cluster_is_made_of_means_and_read_as_one():
    a = affinity((6, 6))
    coupling = ZipIt(beta=0.5, alpha=1.0)._solve(a, (0.5, 0.5), 6)
    member = coupling.unmerge
    assert torch.equal(member.sum(1), torch.ones(12, dtype=member.dtype))
    assert set(member.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(coupling.merge.sum(1), torch.ones(6, dtype=member.dtype))
    assert torch.equal(coupling.merge > 0, member.T > 0)


@pytest.mark.parametrize("count", [2, 3])
def test_a_partial_zip_keeps_each_parents_rest(count):
    def make() -> nn.Module:
        layers = (nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 4), nn.Tanh(), nn.Linear(4, 3))
        return nn.Sequential(*layers)

    models = [made(make, s) for s in range(count)]
    x = torch.randn(64, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    options = {"example_inputs": x, "data": [x], "repair": None, "progress": False}
    result = fxmerge.merge(*models, matcher=ZipIt(until="2"), heads="separate", **options)
    state = result.module.state_dict()
    assert [tuple(state[f"{i}.weight"].shape) for i in (0, 2, 4, 6)] == [
        (6, 5), (7 * count, 6), (4 * count, 7 * count), (3 * count, 4 * count),
    ]  # fmt: skip
    for layer, inner, outer in (("4", 7, 4), ("6", 4, 3)):
        parts = [m.state_dict()[f"{layer}.weight"] for m in models]
        assert torch.equal(state[f"{layer}.weight"], torch.block_diag(*parts)), (inner, outer)
    # nothing zipped at all: every parent's own output
    for y, model in zip(fxmerge.merge(*models, matcher=ZipIt(until="0"), heads="separate", **options).module(x), models,
                        strict=True):  # fmt: skip
        torch.testing.assert_close(y, model(x), rtol=1e-9, atol=1e-9)
    with pytest.raises(InputError, match="no such node or module"):
        fxmerge.merge(*models, matcher=ZipIt(until="nowhere"), **options)


# Budgets ----------------------------------------------------------------------------------------------------


def costs_of(name: str, what: str = "parameters") -> tuple[nn.Module, tuple[Tensor, ...], AxisClasses, Costs]:
    case = NETWORKS[name]
    model = case.make().double()
    x = tuple(v.double() if v.is_floating_point() else v for v in case.example_inputs)
    classes = fxmerge.infer_classes(model, x)
    return model, x, classes, Costs.of(classes, frozenset(), 2, what)


SIZED = ["mlp", "mlp_batch_norm", "residual_projection", "dense_block", "flatten_into_linear", "depthwise_separable",
         "glu_by_chunk", "tied_linears", "conv_transpose", "inverted_residual"]  # fmt: skip


@pytest.mark.parametrize("name", SIZED)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_cost_is_the_size_of_what_is_emitted(name, share):
    model, x, classes, costs = costs_of(name)
    twin = fxmerge.permute(model, classes, seed=1)
    matcher = PLeaS(ratios={"": share}, cost="weights")
    result = fxmerge.merge(model, twin, example_inputs=x, matcher=matcher, repair=None, verify=False, progress=False)
    kept = {k: c.size - c.widths[0] for k, c in enumerate(result.alignment.couplings)}
    trained = sum(v.numel() for v in result.module.parameters())
    assert costs.at(kept) == trained


@pytest.mark.parametrize("name", ["mlp", "residual_projection", "depthwise_separable", "module_called_twice"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_flops_are_those_that_torch_counts(name, share):
    model, x, _, costs = costs_of(name, "flops")
    matcher = PLeaS(ratios={"": share}, cost="weights")
    result = fxmerge.merge(model, model, example_inputs=x, matcher=matcher, repair=None, verify=False, progress=False)
    kept = {k: c.size - c.widths[0] for k, c in enumerate(result.alignment.couplings)}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        result.module(*x)
    assert costs.at(kept) == counter.get_total_flops() / 2 / len(x[0])


def losses(sizes: Mapping[int, int], seed: int) -> dict[int, Tensor]:
    rng = np.random.default_rng(seed)
    return {k: torch.from_numpy(np.sort(rng.random(n))[::-1].copy() / n) for k, n in sizes.items()}


@pytest.mark.parametrize("budget", [1.0, 1.1, 1.4, 2.0, 3.5, 4.0])
@pytest.mark.parametrize("name", ["mlp", "residual_projection", "dense_block"])
def test_a_budget_is_spread_as_well_as_by_brute_force_and_never_exceeded(name, budget):
    _, _, classes, costs = costs_of(name)
    free = [k for k, c in enumerate(classes) if c.free]
    for seed in range(3):
        loss = losses({k: classes[k].size for k in free}, seed)
        kept = spread(loss, costs, budget)
        limit = budget * costs.at({})
        assert costs.at(kept) <= limit + 1e-9

        def gain(chosen: Mapping[int, int], loss: Mapping[int, Tensor] = loss) -> float:
            return sum(float(loss[k][:m].sum()) for k, m in chosen.items())

        steps = [[round(len(loss[k]) * i / 4) for i in range(5)] for k in free]
        choices = (dict(zip(free, c, strict=True)) for c in product(*steps))
        best = max(gain(c) for c in choices if costs.at(c) <= limit)
        assert gain(kept) >= 0.99 * best - 1e-12
        # what is left does not pay for one pair more
        assert all(
            kept[k] == len(loss[k]) or costs.at({**kept, k: kept[k] + 1}) > limit for k in free if len(loss[k]) < 128
        )


@pytest.mark.parametrize("of", ["parameters", "flops"])
@pytest.mark.parametrize("budget", [1.2, 2.0])
def test_a_merged_network_stays_within_its_budget(of, budget):
    a, b = made(grouped_residual), made(grouped_residual, 1)
    x = torch.randn(2, 3, 10, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    result = fxmerge.merge(
        a, b, example_inputs=x, matcher=PLeaS(budget, of=of, cost="weights"), repair=None, progress=False
    )

    def size(module: nn.Module) -> float:
        if of == "parameters":
            return sum(p.numel() for p in module.parameters())
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(x)
        return counter.get_total_flops()

    assert 1 < size(result.module) / size(a) <= budget
    with pytest.raises(InputError, match="side by side are 4 times one"):
        fxmerge.merge(a, b, example_inputs=x, matcher=PLeaS(4.5, cost="weights"), progress=False)


# Shares per class -------------------------------------------------------------------------------------------


def test_shares_per_class_give_the_weights_worked_out_by_hand():
    a, b = (
        made(lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)), s)
        for s in (0, 1)
    )
    x = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = {"": (0.5, 0.5), "0.weight:0": (0.9, 0.1), "2": (1, 3)}
    result = fxmerge.merge(
        a, b, example_inputs=x, matcher=fxmerge.matchers.Average(), weights=weights, repair=None, progress=False
    )
    found, one, two = result.module.state_dict(), a.state_dict(), b.state_dict()
    for layer, share in (("0", 0.9), ("2", 0.25), ("4", 0.5)):
        for kind in ("weight", "bias"):
            n = f"{layer}.{kind}"
            torch.testing.assert_close(found[n], share * one[n] + (1 - share) * two[n], rtol=1e-12, atol=1e-12)
    with pytest.raises(InputError, match="weights for 'trunk'"):
        fxmerge.merge(a, b, example_inputs=x, weights={"trunk": (1, 0)}, progress=False)


# Scales of a ground cost ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["max", "mean", "median", "log"])
def test_the_scale_of_costs_sets_how_soft_a_plan_is(scale):
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(12, 30, dtype=torch.float64, generator=generator)
    gram = points @ points.T
    affinity = Affinity(gram, gram, torch.eye(12, dtype=torch.float64), (6, 6), 30)
    merge = OTFusion(reg=0.1, scale=scale)._solve(affinity, (0.5, 0.5), 6).merge[:, 6:] * 2
    cost = (points[:6, None] - points[None, 6:]).square().sum(2)
    cost = cost.log1p() if scale == "log" else cost
    size = {"max": cost.max(), "mean": cost.mean(), "median": cost.median(), "log": cost.max()}[scale]
    uniform = torch.full((6,), 1 / 6, dtype=torch.float64)
    expected = 6 * transport(uniform, uniform, cost, 0.1 * float(size / cost.max()))
    torch.testing.assert_close(merge, expected, rtol=1e-6, atol=1e-9)


def test_scales_that_do_not_exist_are_refused():
    with pytest.raises(InputError, match=r"OTFusion\(scale='sum'\): choose one of 'max', 'mean', 'median', 'log'"):
        OTFusion(scale="sum")


# What PLeaS minds -------------------------------------------------------------------------------------------


def test_a_class_that_many_layers_read_counts_for_each_of_them(monkeypatch):
    class Stream(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.leave = nn.Linear(5, 8), nn.Linear(8, 3)
            self.inner = nn.ModuleList(nn.Linear(8, 6) for _ in range(2))
            self.outer = nn.ModuleList(nn.Linear(6, 8) for _ in range(2))

        def forward(self, x):
            x = self.enter(x)
            for inner, outer in zip(self.inner, self.outer, strict=True):
                x = x + outer(torch.relu(inner(x)))
            return self.leave(x)

    found = {}

    def listening(losses, costs, budget):
        found.update(losses)
        return dict.fromkeys(losses, 0)

    monkeypatch.setattr("fxmerge.matchers.pleas.spread", listening)
    a, b = made(Stream, 0), made(Stream, 1)
    x = torch.randn(50, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    fxmerge.merge(a, b, example_inputs=x, matcher=PLeaS(1.5, cost="weights"), progress=False)
    each = class_by_class(problem(a, b, x), _match, "", by="weights", sweeps=2, each=_scores)[1]
    readers = {8: 3, 6: 1}  # two blocks and the head read the stream; a hidden layer has one reader
    for k, loss in found.items():
        expected = readers[len(loss)] * float((1 - each[k]).mean())
        assert float(loss.sum()) == pytest.approx(expected, rel=1e-9)
    assert sorted(map(len, found.values())) == [6, 6, 8]


def test_neurons_of_which_only_a_bias_is_known_are_matched_by_its_size():
    x = torch.randn(9, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    both = torch.cat([x, x[order]])
    gram = both @ both.T
    size = gram.diagonal()
    alike = Affinity(gram, gram, correlation(gram, size, size), (9, 9), 0)
    assert torch.equal(order[permutations(alike)[1]], torch.arange(9))
