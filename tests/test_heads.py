"""Attention heads and groups are matched as blocks, whatever the method: hard between blocks, and right inside."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS, randomise
from torch import Tensor, nn

import fxmerge
from fxmerge.alignment import ALIGNMENT, load_alignment, write_alignment
from fxmerge.collect import collect
from fxmerge.coupling import fuse
from fxmerge.errors import StructureError
from fxmerge.interfaces import Problem
from fxmerge.ir import Alignment, AxisClasses, Coupling
from fxmerge.layout import resized
from fxmerge.matchers import ActivationMatching, CCAMerge, OTFusion, PLeaS, WeightMatching, ZipIt
from fxmerge.rewrite import rewrite
from fxmerge.stats import choose_taps
from fxmerge.symmetry import full_state, relative_error

INPUTS, TOKENS = 6, 5


class Attention(nn.Module):
    """Heads between pinned inputs and outputs: nothing else may move, and nothing but softmax is not linear."""

    def __init__(self, heads: int = 3, dim: int = 2, packed: bool = False, seed: int = 0) -> None:
        super().__init__()
        self.heads, self.packed, width = heads, packed, heads * dim
        if packed:
            self.qkv = nn.Linear(INPUTS, 3 * width)
        else:
            self.q, self.k, self.v = (nn.Linear(INPUTS, width) for _ in range(3))
        self.out = nn.Linear(width, 4)
        randomise(self, seed).double().eval()

    def forward(self, x: Tensor) -> Tensor:
        made = self.qkv(x).chunk(3, -1) if self.packed else (self.q(x), self.k(x), self.v(x))
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in made)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def tokens(count: int, width: int = INPUTS, positions: int = TOKENS) -> Tensor:
    return torch.randn(count, positions, width, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def problem(*models: nn.Module, x: Tensor | None = None, shares: tuple[float, ...] | None = None) -> Problem:
    x = tokens(64) if x is None else x
    classes = tuple(fxmerge.infer_classes(m, x[:2]) for m in models)
    statistics = collect(classes, [x], lambda batch: ((batch,), {}), [choose_taps(c) for c in classes])
    states = tuple({n: v.detach() for n, v in full_state(m).items()} for m in models)
    each = shares or (1 / len(models),) * len(models)
    return Problem(classes, states, (each,) * len(classes[0]), frozenset(), statistics)


def fused(p: Problem, alignment: Alignment) -> nn.Module:
    wide = resized(p.classes[0], {k: c.size for k, c in enumerate(alignment.couplings)})
    return rewrite(p.classes[0], fuse(p.classes, wide, alignment, p.states, p.shares[0]), wide)


def far(expected: nn.Module, got: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return relative_error(expected(x), got(x))


def named(classes: AxisClasses) -> dict[str, int]:
    """The classes of heads, of queries with keys, and of values."""
    (heads,) = (k for k in range(len(classes)) if classes.children(k))
    pair, values = sorted(classes.children(heads), key=lambda k: not classes[k].turned)
    return {"heads": heads, "pair": pair, "values": values}


def heads_of(coupling: Coupling, blocks: Tensor) -> list[np.ndarray]:
    """Per parent [fused blocks, its blocks]: how much of one is made of the other."""
    one = F.one_hot(blocks).double()
    return [(one.T @ m.abs() @ one).numpy() for m in coupling.merge.split(coupling.widths, 1)]


SOFT = {
    "OTFusion, soft": OTFusion(reg=0.2),
    "OTFusion, masses": OTFusion(importance="norm"),
    "CCAMerge": CCAMerge(),
    "CCAMerge, plain": CCAMerge(gamma=0.0),
    "CCAMerge, Procrustes": CCAMerge(gamma=float("inf")),
    "ZipIt": ZipIt(beta=0.5, alpha=0.9),
}
HARD = {
    "weights": WeightMatching(),
    "activations": ActivationMatching(),
    "OTFusion": OTFusion(),
    "PLeaS": PLeaS(),
}


# Which side of a contraction ---------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_keys_stand_against_queries(packed):
    classes = fxmerge.infer_classes(Attention(packed=packed), tokens(2))
    at = named(classes)
    pair = classes[at["pair"]]
    turned = {str(site): pair.sites[site][:, columns].flatten().tolist() for site, columns in pair.turned.items()}
    names = ("qkv.weight:0", "qkv.bias:0") if packed else ("k.weight:0", "k.bias:0")
    first = pair.size if packed else 0  # keys are stored behind the queries
    assert turned == {name: list(range(first, first + pair.size)) for name in names}
    assert not any(c.reflexive for c in classes)
    assert not any(c.turned for k, c in enumerate(classes) if k != at["pair"])


@pytest.mark.parametrize("name", ["tied_embedding", "tied_autoencoder"])
def test_what_is_read_by_its_own_weight_meets_itself(name):
    case = NETWORKS[name]
    classes = fxmerge.infer_classes(case.make(), case.example_inputs)
    assert [c.reflexive for c in classes if c.free].count(True) == 1


@pytest.mark.parametrize("name", ["mlp", "residual_projection", "dense_block", "glu_by_chunk", "lstm", "group_norm"])
def test_ordinary_layers_are_made_on_one_side_and_read_on_the_other(name):
    case = NETWORKS[name]
    assert not any(c.reflexive or c.turned for c in fxmerge.infer_classes(case.make(), case.example_inputs))


# Recovery ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("method", [name for name in {**HARD, **SOFT} if name != "OTFusion, soft"])
def test_swapped_heads_with_their_dimensions_permuted_are_recovered(method, packed):
    model = Attention(packed=packed)
    classes = fxmerge.infer_classes(model, tokens(2))
    p = problem(model, fxmerge.permute(model, classes, seed=3))
    moved = {n for n, v in p.states[0].items() if not torch.equal(v, p.states[1][n])}
    assert moved == set(p.states[0]) - {"out.bias"}
    alignment = {**HARD, **SOFT}[method].match(p)
    assert far(model, fused(p, alignment), tokens(4)) < (1e-4 if method == "CCAMerge, plain" else 1e-7)


BLOCKS = ["grouped_query_attention", "rotary_halves", "grouped_then_dense", "group_norm"]


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("method", ["OTFusion", "CCAMerge", "ZipIt", "PLeaS"])
def test_heads_that_share_keys_rotary_pairs_and_groups_are_recovered(method, name):
    case = NETWORKS[name]
    model = case.make().double()
    x = torch.randn(48, *case.example_inputs[0].shape[1:], generator=torch.Generator().manual_seed(1)).double()
    twin = fxmerge.permute(model, fxmerge.infer_classes(model, x[:2]), seed=2)
    matcher = {"OTFusion": OTFusion(at="made"), "CCAMerge": CCAMerge(at="made"), "PLeaS": PLeaS(at="made")}
    p = problem(model, twin, x=x)
    taps = [choose_taps(c, "made") for c in p.classes]
    statistics = collect(p.classes, [x], lambda batch: ((batch,), {}), taps)
    p = Problem(p.classes, p.states, p.shares, frozenset(), statistics)
    alignment = matcher.get(method, ZipIt(at="made")).match(p)
    assert far(model, fused(p, alignment), x[:4]) < 1e-6


@pytest.mark.parametrize("packed", [False, True])
def test_heads_in_other_coordinates_are_recovered_by_cca(packed):
    """Queries through R and keys through R^-T, values through S and the next layer through S^-1: no permutation."""
    draw = torch.Generator().manual_seed(8)
    model = Attention(packed=packed)
    twin = Attention(packed=packed)
    state = {n: v.clone() for n, v in model.state_dict().items()}
    order = [2, 0, 1]

    def turned(rows: Tensor, maps: list[Tensor]) -> Tensor:
        blocks = rows.unflatten(0, (3, 2))
        return torch.cat([m @ blocks[h] for m, h in zip(maps, order, strict=True)])

    r, s = ([torch.randn(2, 2, generator=draw, dtype=torch.float64) + torch.eye(2) for _ in range(3)] for _ in "rs")
    dual = [m.inverse().T for m in r]
    for kind in ("weight", "bias"):
        parts = state[f"qkv.{kind}"].chunk(3) if packed else [state[f"{n}.{kind}"] for n in "qkv"]
        parts = [turned(t, maps) for t, maps in zip(parts, (r, dual, s), strict=True)]
        if packed:
            state[f"qkv.{kind}"] = torch.cat(parts)
        else:
            state |= {f"{n}.{kind}": t for n, t in zip("qkv", parts, strict=True)}
    state["out.weight"] = turned(state["out.weight"].T, [m.inverse().T for m in s]).T
    twin.load_state_dict(state)
    assert far(model, twin, tokens(4)) < 1e-10
    p = problem(model, twin)
    assert far(model, fused(p, CCAMerge(gamma=0.0).match(p)), tokens(4)) < 1e-5
    assert far(model, fused(p, ActivationMatching().match(p)), tokens(4)) > 1e-2


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("method", [m for m in SOFT if m.startswith("CCA")])
def test_cca_maps_inside_heads_change_nothing(method, packed):
    a, b = Attention(packed=packed), Attention(packed=packed, seed=1)
    p = problem(a, b, shares=(0.0, 1.0))
    alignment = SOFT[method].match(p)
    assert far(b, fused(p, alignment), tokens(4)) < 1e-8


# No two heads are mixed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", SOFT)
def test_no_entry_lies_across_heads(method):
    models = [Attention(heads=4, dim=3, seed=s) for s in range(3)]
    p = problem(*models)
    alignment = SOFT[method].match(p)
    at = named(p.classes[0])
    mixed = 0
    for name in ("pair", "values"):
        coupling, blocks = alignment.couplings[at[name]], p.classes[0][at[name]].blocks[:, 0]
        outer = alignment.couplings[at["heads"]]
        for made, heads in zip(heads_of(coupling, blocks), outer.merge.split(outer.widths, 1), strict=True):
            assert ((heads > 0).sum(0) == 1).all()
            assert ((heads > 0).sum(1) == 1).all()
            assert np.array_equal(made > 0, (heads > 0).numpy())
        read = (F.one_hot(blocks).double().T @ coupling.unmerge.T.abs()).split(coupling.widths, 1)
        for part, heads in zip(read, outer.merge.split(outer.widths, 1), strict=True):
            assert torch.equal((part @ F.one_hot(blocks).double()) > 0, heads > 0)
        mixed += int(((coupling.merge != 0).sum(1) > 3).sum())
    assert mixed or method == "OTFusion, masses", "no neuron was mixed inside a head: nothing was tested"


def test_the_other_side_goes_through_what_reads():
    a, b = (Attention(seed=s) for s in range(2))
    p = problem(a, b, shares=(0.3, 0.7))
    alignment = OTFusion(reg=0.2, importance="norm").match(p)
    coupling = alignment.couplings[named(p.classes[0])["pair"]]
    state = fuse(p.classes, p.classes[0], alignment, p.states, p.shares[0])
    ua, ub = coupling.unmerge.split(coupling.widths)
    keys = 0.3 * ua.T @ a.k.weight + 0.7 * ub.T @ b.k.weight
    torch.testing.assert_close(state["k.weight"], keys.detach())
    queries = coupling.merge @ torch.cat([a.q.weight, b.q.weight])
    torch.testing.assert_close(state["q.weight"], queries.detach())
    assert not torch.allclose(coupling.dual, coupling.merge)


# The outer problem, against brute force ------------------------------------------------------------------------


def activations(model: Attention, x: Tensor) -> dict[str, list[np.ndarray]]:
    """Rows of queries and keys, and of values as the next layer reads them."""
    read: list[Tensor] = []
    with torch.no_grad(), model.out.register_forward_pre_hook(lambda _, args: read.append(args[0])):
        model(x)
        q, k, v = (t.flatten(0, 1).numpy() for t in (model.q(x), model.k(x), read[0]))
    return {"pair": [q, k], "values": [v]}


def found_heads(p: Problem, alignment: Alignment) -> tuple[int, ...]:
    coupling = alignment.couplings[named(p.classes[0])["heads"]]
    return tuple(coupling.unmerge.split(coupling.widths)[1].T.argmax(1).tolist())


@pytest.mark.parametrize("seed", range(3))
def test_transport_of_blocks_is_that_of_brute_force(seed):
    """All ways to assign three heads, and two dimensions inside each, tried one after the other."""
    a, b = Attention(seed=2 * seed), Attention(seed=2 * seed + 1)
    x = tokens(12)
    p = problem(a, b, x=x)
    alignment = OTFusion().match(p)
    rows = [activations(m, x) for m in (a, b)]
    costs = {}
    for name in ("pair", "values"):
        total = 0.0
        for one, other in zip(rows[0][name], rows[1][name], strict=True):
            scale = np.concatenate([one, other], 1).var(0).mean() * len(rows[0][name])
            total = total + ((one[:, :, None] - other[:, None, :]) ** 2).mean(0) / scale
        costs[name] = total / total.mean()

    def inside(cost: np.ndarray, i: int, j: int) -> tuple[float, tuple[int, ...]]:
        own, others = (slice(2 * h, 2 * h + 2) for h in (i, j))
        part = cost[own, others]
        return min((part[0, s[0]] + part[1, s[1]], s) for s in permutations(range(2)))

    best = min(
        (sum(inside(c, i, j)[0] for c in costs.values() for i, j in enumerate(order)), order)
        for order in permutations(range(3))
    )[1]
    assert found_heads(p, alignment) == best
    at = named(p.classes[0])
    for name, cost in costs.items():
        coupling = alignment.couplings[at[name]]
        ours = coupling.unmerge.split(coupling.widths)[1].T.argmax(1).tolist()
        assert ours == [2 * j + s for i, j in enumerate(best) for s in inside(cost, i, j)[1]]


@pytest.mark.parametrize("seed", range(3))
def test_heads_are_given_to_those_that_a_rotation_brings_nearest(seed):
    """Procrustes inside every pair of heads: the sum of singular values, all assignments of heads tried."""
    a, b = Attention(heads=4, seed=2 * seed), Attention(heads=4, seed=2 * seed + 1)
    x = tokens(24)
    p = problem(a, b, x=x)
    alignment = CCAMerge(gamma=float("inf")).match(p)
    rows = [activations(m, x) for m in (a, b)]
    gain = np.zeros((4, 4))
    for name in ("pair", "values"):
        sides = []
        for one, other in zip(rows[0][name], rows[1][name], strict=True):
            covariance = np.cov(np.concatenate([one, other], 1).T, bias=True)
            sides.append(covariance / np.trace(covariance))
        covariance = sum(sides)
        for i in range(4):
            for j in range(4):
                own, others = np.arange(2 * i, 2 * i + 2), 8 + np.arange(2 * j, 2 * j + 2)
                cross = np.linalg.svd(covariance[np.ix_(own, others)], compute_uv=False).sum()
                sizes = [np.trace(covariance[np.ix_(k, k)]) for k in (own, others)]
                gain[i, j] += cross / np.sqrt(sizes[0] * sizes[1])
    best = max(permutations(range(4)), key=lambda order: sum(gain[i, j] for i, j in enumerate(order)))
    assert found_heads(p, alignment) == best


# Other numbers of heads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("matcher", [OTFusion(), ZipIt(), CCAMerge()], ids=str)
def test_parents_with_other_numbers_of_heads_are_refused(matcher):
    a, b = Attention(heads=3, dim=2), Attention(heads=2, dim=3)
    with pytest.raises(StructureError, match="heads"):
        fxmerge.merge(a, b, example_inputs=tokens(2), data=[tokens(32)], matcher=matcher, progress=False)


def test_both_sides_of_a_coupling_are_stored(tmp_path):
    p = problem(Attention(), Attention(seed=1))
    alignment = CCAMerge().match(p)
    write_alignment(alignment, tmp_path / ALIGNMENT)
    for one, other in zip(alignment.couplings, load_alignment(tmp_path).couplings, strict=True):
        assert (one.dual is None) == (other.dual is None)
        assert one.dual is None or torch.equal(one.dual, other.dual)
    assert sum(c.dual is not None for c in alignment.couplings) == 1
