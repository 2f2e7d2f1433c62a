"""Matchers: twins are recovered, assignments are optimal against brute force, and one formula carries the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise, permutations, product

import numpy as np
import pytest
import torch
from networks import NETWORKS, Case, randomise
from torch import Tensor, nn

import fxmerge
from fxmerge.coupling import from_permutations, fuse
from fxmerge.descent import Descent, parameters
from fxmerge.interfaces import AbstractMatcher, Problem
from fxmerge.ir import Alignment, AxisClass, AxisClasses, Coupling
from fxmerge.linalg import assignment, correlation
from fxmerge.matchers import ActivationMatching, Average, WeightMatching
from fxmerge.matchers.cca import _turn
from fxmerge.matching import Joint, families, match_family
from fxmerge.symmetry import apply, full_state, random_element, relative_error

# A new matcher is one row here. ReLUs that never fire have no activation to tell them by, hence "made".
MATCHERS: list[AbstractMatcher] = [WeightMatching(), ActivationMatching(at="made")]

TWINS = [
    "mlp",
    "mlp_batch_norm",
    "tied_linears",
    "glu_by_chunk",
    "weights_concatenated",
    "residual_projection",
    "zero_padded_shortcut",
    "dense_block",
    "channel_shuffle",
    "flatten_into_linear",
    "grouped_bottleneck",
    "depthwise_multiplier",
    "group_norm",
    "mlp_mixer",
    "tied_embedding",
    "packed_multihead_attention",
    "attention_causal",
    "query_key_norm",
    "windowed_attention",
    "mixture",
    "deep_mixture",
    "heads_on_an_axis",
    "layers_in_one_tensor",
]


def double(case: Case) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return case.make().double(), tuple(x.double() if x.is_floating_point() else x for x in case.example_inputs)


def detached(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in full_state(model).items()}


def batches(case: Case, count: int = 2, size: int = 48) -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(7)

    def like(x: Tensor) -> Tensor:
        shape = (size, *x.shape[1:])
        if x.is_floating_point():
            return torch.randn(shape, generator=generator, dtype=torch.float64)
        return torch.randint(int(x.max()) + 1, shape, generator=generator)

    return [tuple(map(like, case.example_inputs)) for _ in range(count)]


def problem(models: Sequence[nn.Module], x: tuple[Tensor, ...], weights: Sequence[float] = (), **options) -> Problem:
    classes = tuple(fxmerge.infer_classes(m, x) for m in models)
    states = tuple(map(detached, models))
    shares = tuple(weights) or (1 / len(models),) * len(models)
    every = (shares,) * len(classes[0])
    return Problem(classes, states, every, frozenset(), options.pop("statistics", None), **options)


def moves(alignment: Alignment, parent: int) -> list[Tensor]:
    """Per class p, where p[i] is the parent's neuron at place i of the fused network."""
    return [c.unmerge.split(c.widths)[parent].T.argmax(1) for c in alignment.couplings]


def is_symmetry(classes: AxisClasses, found: Sequence[Tensor]) -> bool:
    """Whether permutations keep pinned neurons, and members with their blocks."""
    for c, p in zip(classes, found, strict=True):
        identity = torch.arange(c.size)
        if not torch.equal(p.sort().values, identity) or not (c.free or torch.equal(p, identity)):
            return False
        for column, parent in enumerate(c.parents):
            if not torch.equal(c.blocks[p, column], found[parent][c.blocks[:, column]]):
                return False
    return True


SEED = 11


def moves_everything(classes: AxisClasses, found: Sequence[Tensor]) -> bool:
    return all(not torch.equal(p, torch.arange(c.size)) for c, p in zip(classes, found, strict=True) if c.free)


# Twins ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("matcher", MATCHERS, ids=str)
def test_a_permuted_twin_is_recovered(matcher, name):
    case = NETWORKS[name]
    model, x = double(case)
    classes = fxmerge.infer_classes(model, x)
    assert moves_everything(classes, random_element(classes, seed=SEED))
    twin = fxmerge.permute(model, classes, seed=SEED)
    data = batches(case) if matcher.needs_data else None
    result = fxmerge.merge(
        model, twin, example_inputs=x, data=data, matcher=matcher, repair=None, verify=False, progress=False
    )
    assert is_symmetry(result.report.classes, moves(result.alignment, 1))
    with torch.no_grad():
        assert relative_error(model(*x), result.module(*x)) < 1e-9


def test_what_query_heads_make_of_shared_values_is_matched_given_the_heads():
    """One class lies in two kinds of blocks: given the query heads, the values are the best there are."""
    model, x = double(NETWORKS["grouped_query_attention"])
    classes = fxmerge.infer_classes(model, x)
    made = next(k for k, c in enumerate(classes) if any(s.parameter == "out.weight" and s.axis == 1 for s in c.sites))
    heads, values = sorted(classes[made].parents, key=lambda k: classes[k].size)
    (keys,) = classes[values].parents
    family = next(f for f in families(classes) if made in f)
    for seed in range(5):
        draw = torch.Generator().manual_seed(seed)
        score = torch.randn(12, 12, generator=draw, dtype=torch.float64)
        found = match_family(classes, family, {made: score})
        assert is_symmetry(classes, [found.get(k, torch.arange(c.size)) for k, c in enumerate(classes)])
        place = {tuple(b): i for i, b in enumerate(classes[made].blocks.tolist())}  # (parents in order) -> neuron
        flip = classes[made].parents[0] == values

        def worth(h: int, v: int, w: int, score=score, found=found, place=place, flip=flip) -> float:
            pair, other = (h, v), (int(found[heads][h]), w)
            return float(score[place[pair[::-1] if flip else pair], place[other[::-1] if flip else other]])

        for block in range(classes[keys].size):
            own = [h for h in range(4) if int(classes[heads].blocks[h, 0]) == block]
            mine = [v for v in range(classes[values].size) if int(classes[values].blocks[v, 0]) == block]
            theirs = [int(found[values][v]) for v in mine]

            def total(order: Sequence[int], own=own, mine=mine, worth=worth) -> float:
                return sum(worth(h, v, w) for h in own for v, w in zip(mine, order, strict=True))

            assert total(theirs) >= max(map(total, permutations(theirs))) - 1e-9


def test_activations_as_they_are_read_tell_neurons_apart_too():
    case = NETWORKS["transformer_mlp"]
    model, x = double(case)
    twin = fxmerge.permute(model, fxmerge.infer_classes(model, x), seed=1)
    result = fxmerge.merge(
        model, twin, example_inputs=x, data=batches(case), matcher=ActivationMatching(at="read"), progress=False
    )
    torch.testing.assert_close(result.module.state_dict(), model.state_dict(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("matcher", MATCHERS, ids=str)
def test_three_parents_are_all_aligned_to_the_first(matcher):
    case = NETWORKS["residual_identity"]
    model, x = double(case)
    classes = fxmerge.infer_classes(model, x)
    twins = [fxmerge.permute(model, classes, seed=s) for s in (1, 2)]
    data = batches(case) if matcher.needs_data else None
    result = fxmerge.merge(model, *twins, example_inputs=x, data=data, matcher=matcher, repair=None, progress=False)
    torch.testing.assert_close(result.module.state_dict(), model.state_dict(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("matcher", [*MATCHERS, Average()], ids=str)
def test_unrelated_parents_get_a_symmetry_of_the_network(matcher):
    case = NETWORKS["grouped_then_dense"]
    a, x = double(case)
    b = randomise(double(case)[0], seed=1)
    data = batches(case) if matcher.needs_data else None
    result = fxmerge.merge(a, b, example_inputs=x, data=data, matcher=matcher, repair=None, progress=False)
    assert is_symmetry(result.report.classes, moves(result.alignment, 1))
    assert all(torch.equal(p, torch.arange(len(p))) for p in moves(result.alignment, 0))
    for k, value in result.alignment.quality.items():
        assert -1 - 1e-6 <= value <= 1 + 1e-6, result.report.classes[k].name
    aligned = fxmerge.align(b, to=a, example_inputs=x, data=data, matcher=matcher, progress=False)
    with torch.no_grad():
        assert relative_error(b(*x), aligned(*x)) < 1e-9


# Activation matching ----------------------------------------------------------------------------------------


def test_activation_matching_maximises_the_correlation_of_numpy():
    torch.manual_seed(0)
    a, b = (nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double() for _ in range(2))
    x = torch.randn(60, 4, dtype=torch.float64)
    result = fxmerge.merge(a, b, example_inputs=x, data=[x], matcher=ActivationMatching(), repair=None, progress=False)
    with torch.no_grad():
        rows = np.concatenate([a[:2](x).numpy(), b[:2](x).numpy()], 1)
    score = np.corrcoef(rows.T)[:5, 5:]
    best = max(permutations(range(5)), key=lambda p: sum(score[i, j] for i, j in enumerate(p)))
    k = next(k for k, c in enumerate(result.report.classes) if c.free)
    assert tuple(moves(result.alignment, 1)[k].tolist()) == best
    assert result.alignment.quality[k] == pytest.approx(np.mean([score[i, j] for i, j in enumerate(best)]))


# Weight matching --------------------------------------------------------------------------------------------


def objective(p: Problem, found: Alignment | Sequence[Sequence[Tensor]]) -> float:
    """The sum over pairs of parents of w_a w_b <P_a(A), P_b(B)>, over each parameter once."""
    names = [n for n, _ in p.classes[0].traced.source.named_parameters()]
    if isinstance(found, Alignment):
        found = [moves(found, k) for k in range(len(p.states))]
    parents = [apply(p.classes[0], [q.argsort() for q in f], s) for f, s in zip(found, p.states, strict=True)]
    return sum(
        p.shares[0][a] * p.shares[0][b] * float((parents[a][n].double() * parents[b][n].double()).sum())
        for a in range(len(parents))
        for b in range(a)
        for n in names
    )


@pytest.fixture(scope="module", params=["mlp", "residual_projection", "grouped_bottleneck", "glu_by_chunk"])
def unrelated(request) -> Problem:
    case = NETWORKS[request.param]
    a, x = double(case)
    return problem([a, randomise(double(case)[0], seed=1)], x)


def test_the_objective_never_falls_with_sweeps_and_restarts(unrelated):
    by_sweeps = [objective(unrelated, WeightMatching(1, sweeps).match(unrelated)) for sweeps in (0, 1, 2, 50)]
    by_restarts = [objective(unrelated, WeightMatching(restarts).match(unrelated)) for restarts in (1, 2, 4)]
    for values in (by_sweeps, by_restarts):
        assert all(b >= a - 1e-9 * abs(a) for a, b in pairwise(values)), values
    assert by_sweeps[-1] > objective(unrelated, Average().match(unrelated))


def test_weight_matching_ends_where_no_class_alone_can_do_better():
    case = NETWORKS["mlp"]
    a, x = double(case)
    p = problem([a, randomise(double(case)[0], seed=1)], x)
    found = WeightMatching().match(p)
    best, ours = objective(p, found), moves(found, 1)
    free = [k for k, c in enumerate(p.classes[0]) if c.free]
    assert len(free) == 2
    for k in free:
        for i, j in product(range(p.classes[0][k].size), repeat=2):
            other = [q.clone() for q in ours]
            other[k][[i, j]] = other[k][[j, i]]
            assert objective(p, [moves(found, 0), other]) <= best + 1e-9


def test_weight_matching_finds_the_optimum_of_a_tiny_network():
    p = problem([mlp(3, 4, 0), mlp(3, 4, 1)], (torch.zeros(2, 5, dtype=torch.float64),))
    classes, identity = p.classes[0], [torch.arange(c.size) for c in p.classes[0]]
    one, two = (k for k, c in enumerate(classes) if c.free)
    every = []
    for q, r in product(permutations(range(3)), permutations(range(4))):
        other = list(identity)
        other[one], other[two] = torch.tensor(q), torch.tensor(r)
        every.append(objective(p, [identity, other]))
    assert objective(p, WeightMatching(restarts=10).match(p)) == pytest.approx(max(every))


def test_the_same_seed_gives_the_same_result(unrelated):
    first, again = (WeightMatching().match(unrelated) for _ in range(2))
    for one, two in zip(first.couplings, again.couplings, strict=True):
        assert torch.equal(one.merge, two.merge)
        assert torch.equal(one.unmerge, two.unmerge)
    state = torch.get_rng_state()
    WeightMatching().match(unrelated)
    assert torch.equal(state, torch.get_rng_state())


def test_refining_three_parents_gains_over_aligning_each_to_the_first():
    case = NETWORKS["mlp"]
    models = [double(case)[0], *(randomise(double(case)[0], seed=s) for s in (1, 2))]
    x = double(case)[1]
    p = problem(models, x, weights=(0.2, 0.5, 0.3))
    pairs = [WeightMatching().match(problem([models[0], m], x)) for m in models[1:]]
    star = [moves(pairs[0], 0), *(moves(f, 1) for f in pairs)]
    refined = WeightMatching().match(p)
    assert is_symmetry(p.classes[0], moves(refined, 1))
    assert is_symmetry(p.classes[0], moves(refined, 2))
    assert objective(p, refined) > objective(p, star)


# Assignment over a tree of classes --------------------------------------------------------------------------


def tree(*rows: tuple[int, tuple[int, ...], Sequence[Sequence[int]]]) -> AxisClasses:
    """Free classes from (size, parents, blocks)."""
    classes = []
    for k, (size, parents, blocks) in enumerate(rows):
        index = torch.tensor(blocks, dtype=torch.int64).reshape(size, len(parents))
        classes.append(AxisClass(f"class {k}", size, {}, parents, index, None, ()))
    return AxisClasses(tuple(classes), frozenset(), {}, (), None)  # type: ignore[arg-type]


def spread(blocks: int, members: int) -> list[list[int]]:
    return [[i // members] for i in range(blocks * members)]


def elements(classes: AxisClasses) -> Iterator[list[np.ndarray]]:
    """The whole wreath group: every p with the members of block b in block p[b]."""

    def extend(k: int, above: list[np.ndarray]) -> Iterator[list[np.ndarray]]:
        if k == len(classes):
            yield above
            return
        c = classes[k]
        own = [tuple(row) for row in c.blocks.tolist()]
        image = [tuple(int(above[p][b]) for p, b in zip(c.parents, row, strict=True)) for row in own]
        cells = sorted(set(image))
        sources = [[i for i in range(c.size) if image[i] == cell] for cell in cells]
        targets = [[j for j in range(c.size) if own[j] == cell] for cell in cells]
        for choice in product(*(permutations(t) for t in targets)):
            p = np.empty(c.size, np.int64)
            for source, target in zip(sources, choice, strict=True):
                p[source] = target
            yield from extend(k + 1, [*above, p])

    yield from extend(0, [])


def value(
    classes: AxisClasses, p: Mapping[int, np.ndarray], scores: Mapping[int, np.ndarray], joints: Sequence[Joint] = ()
) -> float:
    total = sum(s[np.arange(len(s)), p[k]].sum() for k, s in scores.items())
    for joint in joints:
        (parent,) = {q for k in (joint.outer, joint.inner) for q in classes[k].parents}
        left, right = joint.left.numpy(), joint.right.numpy()
        inside = {}
        for k in (joint.outer, joint.inner):
            blocks = classes[k].blocks[:, 0].numpy()
            rank = np.array([np.sum(blocks[:i] == b) for i, b in enumerate(blocks)])
            inside[k] = [rank[p[k][blocks == g]] for g in range(classes[parent].size)]
        for g in range(classes[parent].size):
            block = right[p[parent][g]][inside[joint.outer][g]][:, inside[joint.inner][g]]
            total += (left[g] * block).sum()
    return float(total)


TREES = {
    "one class": tree((5, (), [])),
    "two blocks of three": tree((2, (), []), (6, (0,), spread(2, 3)), (6, (0,), spread(2, 3))),
    "three blocks of two": tree((3, (), []), (6, (0,), spread(3, 2)), (6, (0,), spread(3, 2))),
    "scattered members": tree((2, (), []), (6, (0,), [[1], [0], [0], [1], [1], [0]]), (4, (0,), [[0], [1], [0], [1]])),
    "blocks in blocks": tree((2, (), []), (4, (0,), spread(2, 2)), (8, (1,), spread(4, 2)), (4, (0,), spread(2, 2))),
    "block with one member": tree((3, (), []), (3, (0,), spread(3, 1)), (6, (0,), spread(3, 2))),
}


def random_scores(classes: AxisClasses, seed: int, which: Sequence[int] | None = None) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    kept = range(len(classes)) if which is None else which
    return {k: torch.randn(classes[k].size, classes[k].size, generator=generator, dtype=torch.float64) for k in kept}


@pytest.mark.parametrize("classes", TREES.values(), ids=TREES)
@pytest.mark.parametrize("seed", range(4))
def test_a_family_is_matched_as_well_as_by_brute_force(classes, seed):
    last = len(classes) - 1
    scores = random_scores(classes, seed, [last] if seed == 0 else None)  # a class without a score counts nothing
    (family,) = families(classes)
    found = {k: p.numpy() for k, p in match_family(classes, family, scores).items()}
    assert set(found) == set(family)
    assert is_symmetry(classes, [torch.from_numpy(found[k]) for k in family])
    numbers = {k: s.numpy() for k, s in scores.items()}
    best = max(value(classes, dict(enumerate(p)), numbers) for p in elements(classes))
    assert value(classes, found, numbers) == pytest.approx(best)


def test_members_of_two_kinds_of_blocks_follow_both():
    """One class in rows and columns: two roots, solved in turn, which is at least as good as leaving all in place."""
    grid = [[i // 3, i % 3] for i in range(6)]
    classes = tree((2, (), []), (3, (), []), (6, (0, 1), grid))
    exact = 0
    for seed in range(12):
        scores = random_scores(classes, seed)
        (family,) = families(classes)
        found = match_family(classes, family, scores)
        assert is_symmetry(classes, [found[k] for k in family])
        numbers = {k: s.numpy() for k, s in scores.items()}
        ours = value(classes, {k: p.numpy() for k, p in found.items()}, numbers)
        assert ours >= value(classes, {k: np.arange(classes[k].size) for k in family}, numbers) - 1e-9
        exact += ours == pytest.approx(max(value(classes, dict(enumerate(p)), numbers) for p in elements(classes)))
    assert exact >= 8


def joint_problem(seed: int) -> tuple[AxisClasses, dict[int, Tensor], Joint]:
    """A grouped convolution: two groups of three outputs and two inputs, five places in the kernel."""
    classes = tree((2, (), []), (6, (0,), spread(2, 3)), (4, (0,), spread(2, 2)))
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(2, 3, 2, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    return classes, random_scores(classes, seed, [1, 2]), Joint(1, 2, left, right)


def coordinate_search(classes: AxisClasses, scores: Mapping[int, np.ndarray], joint: Joint) -> float:
    """From the identity, one class at a time by brute force until none gains: blocks as wholes, then each inside."""
    every = list(elements(classes))
    now = [np.arange(c.size) for c in classes]
    best = value(classes, dict(enumerate(now)), scores, [joint])
    while True:
        start = best
        for k in (1, 2):
            others = [j for j in range(len(classes)) if j != k]
            for p in every:
                if all(np.array_equal(p[j], now[j]) for j in others):
                    new = value(classes, dict(enumerate(p)), scores, [joint])
                    if new > best + 1e-12:
                        best, now = new, p
        if best == start:
            return best


def test_groups_whose_outputs_and_inputs_depend_on_each_other():
    exact = 0
    for seed in range(16):
        classes, scores, joint = joint_problem(seed)
        found = match_family(classes, (0, 1, 2), scores, [joint])
        assert is_symmetry(classes, [found[k] for k in range(3)])
        numbers = {k: s.numpy() for k, s in scores.items()}
        ours = value(classes, {k: p.numpy() for k, p in found.items()}, numbers, [joint])
        assert ours >= coordinate_search(classes, numbers, joint) - 1e-9, seed
        best = max(value(classes, dict(enumerate(p)), numbers, [joint]) for p in elements(classes))
        exact += ours == pytest.approx(best)
    assert exact >= 12


# Small solvers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5])
def test_assignment_equals_brute_force(n):
    for seed in range(5):
        score = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        best = max(sum(float(score[i, j]) for i, j in enumerate(p)) for p in permutations(range(n)))
        found = assignment(score)
        assert found.dtype == torch.int64
        assert sorted(found.tolist()) == list(range(n))
        assert float(score[torch.arange(n), found].sum()) == pytest.approx(best)


def test_correlation_equals_numpy_and_ignores_constants():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((50, 4)) * [1, 1e3, 1e-3, 1], rng.standard_normal((50, 3))
    y[:, 1] += x[:, 0]
    x[:, 3] = 2.5
    both = np.concatenate([x, y], 1)
    covariance = torch.from_numpy(np.cov(both.T, bias=True))
    found = correlation(covariance[:4, 4:], covariance.diagonal()[:4], covariance.diagonal()[4:])
    expected = np.corrcoef(both[:, [0, 1, 2, 4, 5, 6]].T)[:3, 3:]
    np.testing.assert_allclose(found[:3].numpy(), expected, atol=1e-12)
    assert not found[3].any()


# One formula ------------------------------------------------------------------------------------------------


def pinned(size: int) -> Coupling:
    """What a pinned class gets under the shares 0.3 and 0.7."""
    eye = torch.eye(size, dtype=torch.float64)
    return Coupling(torch.cat([0.3 * eye, 0.7 * eye], 1), torch.cat([eye, eye]), (size, size))


def random_alignment(
    classes: AxisClasses, widths: Mapping[int, tuple[int, ...]] | None = None, fused: Mapping[int, int] | None = None
) -> Alignment:
    """Dense couplings on the free classes, which no permutation could stand in for; pinned ones averaged."""
    generator = torch.Generator().manual_seed(0)
    couplings = []
    for k, c in enumerate(classes):
        if not c.free:
            couplings.append(pinned(c.size))
            continue
        parents = (widths or {}).get(k, (c.size,) * 2)
        shape = (fused or {}).get(k, c.size), sum(parents)
        merge, unmerge = (torch.randn(s, generator=generator, dtype=torch.float64) for s in (shape, shape[::-1]))
        couplings.append(Coupling(merge, unmerge, parents))
    return Alignment(tuple(couplings), "random")


def dense(weights: Sequence[Tensor], merge: Tensor, unmerge: Tensor | None) -> Tensor:
    """merge_out @ blockdiag(W_a, W_b) @ unmerge_in, at every place of a kernel; vectors have no inputs."""
    if unmerge is None:
        return merge @ torch.cat(list(weights))
    flat = [w.reshape(*w.shape[:2], -1) for w in weights]
    places = [merge @ torch.block_diag(*(w[:, :, s] for w in flat)) @ unmerge for s in range(flat[0].shape[2])]
    return torch.stack(places, 2).reshape(len(merge), unmerge.shape[1], *weights[0].shape[2:])


def mlp(one: int, two: int, seed: int) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(5, one), nn.ReLU(), nn.Linear(one, two), nn.Tanh(), nn.Linear(two, 3)).double()
    return randomise(model, seed)


@pytest.mark.parametrize(("b", "fused"), [((8, 6), (8, 6)), ((7, 4), (8, 6)), ((7, 4), (11, 5))])
def test_a_perceptron_is_fused_by_the_formula_whatever_the_couplings_and_widths(b, fused):
    models = [mlp(8, 6, 0), mlp(*b, 1)]
    x = torch.zeros(2, 5, dtype=torch.float64)
    classes = [fxmerge.infer_classes(m, x) for m in models]
    one, two = (k for k, c in enumerate(classes[0]) if c.free)
    alignment = random_alignment(classes[0], {one: (8, b[0]), two: (6, b[1])}, {one: fused[0], two: fused[1]})
    states = [detached(m) for m in models]
    found = fuse(classes, classes[0], alignment, states, (0.3, 0.7))
    path = [pinned(5), alignment.couplings[one], alignment.couplings[two], pinned(3)]
    for layer, (reads, makes) in zip(("0", "2", "4"), pairwise(path), strict=True):
        weight = dense([s[f"{layer}.weight"] for s in states], makes.merge, reads.unmerge)
        bias = dense([s[f"{layer}.bias"] for s in states], makes.merge, None)
        torch.testing.assert_close(found[f"{layer}.weight"], weight, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found[f"{layer}.bias"], bias, rtol=1e-12, atol=1e-12)


def test_a_convolutional_network_is_fused_by_the_formula():
    """Kernels, either way round, BatchNorm's vectors and buffers, and channels that a Linear reads four at a time."""

    def make(seed: int) -> nn.Sequential:
        layers = (
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.Tanh(),
            nn.ConvTranspose2d(6, 5, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
            nn.Linear(20, 7), nn.ReLU(), nn.Linear(7, 2),
        )  # fmt: skip
        return randomise(nn.Sequential(*layers).double().eval(), seed)

    models = [make(0), make(1)]
    models[1][1].num_batches_tracked += 4
    classes = [fxmerge.infer_classes(m, torch.zeros(2, 3, 9, 9, dtype=torch.float64)) for m in models]
    alignment = random_alignment(classes[0])
    states = [detached(m) for m in models]
    found = fuse(classes, classes[0], alignment, states, (0.3, 0.7))
    writer = {c.size: alignment.couplings[k] for k, c in enumerate(classes[0]) if c.free}
    assert set(writer) == {4, 6, 5, 7}
    places = torch.kron(writer[5].unmerge, torch.eye(4, dtype=torch.float64))
    layers = {
        "0": (writer[4].merge, pinned(3).unmerge),
        "3": (writer[6].merge, writer[4].unmerge),
        "5": (writer[5].merge, writer[6].unmerge),
        "8": (writer[7].merge, places),
        "10": (pinned(2).merge, writer[7].unmerge),
    }
    for layer, (merge, unmerge) in layers.items():
        weights = [s[f"{layer}.weight"] for s in states]
        if layer == "5":  # transposed: stored [in, out, ..]
            expected = dense([w.transpose(0, 1) for w in weights], merge, unmerge).transpose(0, 1)
        else:
            expected = dense(weights, merge, unmerge)
        torch.testing.assert_close(found[f"{layer}.weight"], expected, rtol=1e-12, atol=1e-12)
        expected = dense([s[f"{layer}.bias"] for s in states], merge, None)
        torch.testing.assert_close(found[f"{layer}.bias"], expected, rtol=1e-12, atol=1e-12)
    for name in ("1.weight", "1.bias", "1.running_mean", "1.running_var"):
        expected = dense([s[name] for s in states], writer[4].merge, None)
        torch.testing.assert_close(found[name], expected, rtol=1e-12, atol=1e-12)
    assert found["1.num_batches_tracked"] == states[0]["1.num_batches_tracked"]
    assert list(found) == list(states[0])


def test_a_tied_tensor_stays_one():
    case = NETWORKS["tied_embedding"]
    a, x = double(case)
    b = randomise(double(case)[0], seed=1)
    classes = [fxmerge.infer_classes(m, x) for m in (a, b)]
    found = fuse(classes, classes[0], random_alignment(classes[0]), [detached(a), detached(b)], (0.3, 0.7))
    assert torch.equal(found["embed.weight"], found["out.weight"])


@pytest.mark.parametrize("name", ["mlp_batch_norm", "grouped_chain", "tied_embedding", "windowed_attention"])
def test_a_share_of_one_gives_that_parent(name):
    case = NETWORKS[name]
    a, x = double(case)
    b = randomise(double(case)[0], seed=1)
    classes = [fxmerge.infer_classes(m, x) for m in (a, b)]
    identity = [torch.arange(c.size) for c in classes[0]]
    found = [identity, random_element(classes[0], seed=4)]
    states = [detached(a), detached(b)]
    for shares in ((1.0, 0.0), (0.0, 1.0)):
        fused = fuse(
            classes, classes[0], from_permutations(classes[0], found, [shares] * len(classes[0]), ""), states, shares
        )
        if shares[0]:
            assert all(torch.equal(fused[n], v) for n, v in states[0].items())
        else:
            assert any(not torch.equal(fused[n], v) for n, v in states[1].items())
            with torch.no_grad():
                assert relative_error(b(*x), torch.func.functional_call(b, dict(fused), x, tie_weights=False)) < 1e-9


@pytest.mark.parametrize("name", ["mlp", "residual_projection", "unet"])
def test_a_score_brought_up_to_date_is_the_score_computed_anew(name):
    case = NETWORKS[name]
    a, b = (randomise(case.make().double(), seed) for seed in (0, 1))
    classes = fxmerge.infer_classes(a, tuple(x.double() for x in case.example_inputs))
    descent = Descent(classes, parameters(detached(a), classes), parameters(detached(b), classes), seed=0)
    assert descent.linear
    everything = set(range(len(classes)))
    for step in range(3):  # the first is from nothing, later ones from what moved
        for f in sorted(descent.linear):
            (k,) = descent.families[f]
            anew = descent.scores((k,), everything)[0][k]
            torch.testing.assert_close(descent._updated(f, k), anew, rtol=1e-9, atol=1e-9)
        moves = random_element(classes, step)
        for f in range(len(descent.families)):
            descent.place(f, {k: moves[k] for k in descent.families[f]})


def test_a_start_goes_on_where_most_is_known_and_leaves_no_class_to_be_matched_again():
    layers = [n for w in (9, 8, 7, 6) for n in (nn.Linear(w, w - 1), nn.ReLU())][:-1]
    a, b = (randomise(nn.Sequential(*layers).double(), seed) for seed in (0, 1))
    classes = fxmerge.infer_classes(a, torch.rand(2, 9).double())
    descent = Descent(classes, parameters(detached(a), classes), parameters(detached(b), classes), seed=0)
    pinned = {k for k, c in enumerate(classes) if not c.free}
    middle = next(k for k, c in enumerate(classes) if c.size == 7)
    assert descent.scores((middle,), pinned, eager=0) == ({}, [])  # its bias alone
    assert descent.scores((middle,), pinned)[0].keys() == {middle}
    order = []
    placed = descent.place
    descent.place = lambda f, step: (order.append(classes[descent.families[f][0]].size), placed(f, step))
    descent.grow(reverse=True)
    assert order == [6, 7, 8]  # from the outputs inwards
    assert len(descent.stale) == len(descent.families) - 1  # but for the last, which saw both of its neighbours


def test_rounding_does_not_turn_neurons_that_nothing_shows():
    cross = torch.zeros(4, 4, dtype=torch.float64)
    cross[:2, 2:] = torch.tensor([[1.0, 0.2], [0.1, 0.5]])  # all maps of the others are as far from the identity
    noise = 1e-12 * torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(_turn(cross + noise), _turn(cross), rtol=0, atol=1e-4)
