"""The inferred classes of the zoo against symmetry groups worked out by hand, and those against the oracle."""

from __future__ import annotations

import copy
import gc
import itertools
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from functools import cache
from math import factorial
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from networks import NETWORKS, POINT, Case, randomise
from oracle import contains, describe, find_symmetries, group_order
from torch import Tensor, nn
from versions import GROUPED

import fxmerge
from fxmerge.atoms import entangled, independent
from fxmerge.correspond import carried
from fxmerge.interpret import Interpretation
from fxmerge.label import Label
from fxmerge.matchers import ActivationMatching, WeightMatching, ZipIt
from fxmerge.running import Doubled
from fxmerge.trace import trace

KNOWN = [name for name, case in NETWORKS.items() if not case.unknown]
# It finds no gradient where drawn values are equal, and no axis in a single number.
BEYOND_ORACLE = {"sort", "learned_number", *(name for name in NETWORKS if name.startswith("experts"))}


def build(case: Case) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The network and its inputs in float64."""
    inputs = tuple(x.double() if x.is_floating_point() else x for x in case.example_inputs)
    return case.make().double(), inputs


@cache
def infer(name: str) -> tuple[nn.Module, tuple[Tensor, ...], fxmerge.AxisClasses]:
    case = NETWORKS[name]
    model, inputs = build(case)
    with warnings.catch_warnings():
        if case.unknown:
            warnings.simplefilter("ignore", fxmerge.FxMergeWarning)
        return model, inputs, fxmerge.infer_classes(model, inputs)


def flatten(output: Any) -> Iterable[Tensor]:
    if isinstance(output, Tensor):
        yield output.double()
        return
    for value in output.values() if isinstance(output, Mapping) else output:
        yield from flatten(value)


def distance(a: Any, b: Any) -> float:
    """Largest difference relative to the largest output."""
    pairs = list(zip(flatten(a), flatten(b), strict=True))
    return max(float((x - y).abs().max() / x.abs().max().clamp_min(1e-300)) for x, y in pairs)


@pytest.mark.parametrize("name", NETWORKS)
def test_group_order(name: str) -> None:
    case = NETWORKS[name]
    _, _, classes = infer(name)
    order = group_order(classes)
    assert order == case.order if case.exact else case.order % order == 0, f"\n{classes}"


@pytest.mark.parametrize("name", NETWORKS)
def test_inferred_symmetries_keep_the_function(name: str) -> None:
    model, _, classes = infer(name)
    assert all(fxmerge.verify(model, classes, seed=seed).error <= 1e-9 for seed in range(3)), f"\n{classes}"


@pytest.mark.parametrize("name", NETWORKS)
def test_unknown_operations(name: str) -> None:
    case = NETWORKS[name]
    _, _, classes = infer(name)
    assert len(classes.unknown) == len(case.unknown)
    assert all(part in operation for part, (_, operation) in zip(case.unknown, classes.unknown, strict=True))


@pytest.mark.parametrize("name", NETWORKS)
def test_twin(name: str) -> None:
    model, inputs, classes = infer(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    twin = fxmerge.permute(model, classes, seed=1)
    assert list(twin.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "the original moved"
    with torch.no_grad():
        assert distance(model(*inputs), twin(*inputs)) <= 1e-9
    moved = any(not torch.equal(value, before[key]) for key, value in twin.state_dict().items())
    assert moved == (group_order(classes) > 1)


def found_again(model: nn.Module, inputs: tuple[Tensor, ...], classes: fxmerge.AxisClasses) -> float:
    """How far the merge with a permuted twin is from the network; an exact answer needs no second start."""
    twin = fxmerge.permute(model, classes, seed=1)
    matcher = WeightMatching(restarts=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxmerge.FxMergeWarning)
        merged = fxmerge.merge(model, twin, example_inputs=inputs, matcher=matcher, progress=False).module
    with torch.no_grad():
        return distance(model(*inputs), merged(*inputs))


@pytest.mark.parametrize("name", [name for name, case in NETWORKS.items() if case.order > 1])
def test_weight_matching_finds_the_way_back(name: str) -> None:
    assert found_again(*infer(name)) <= 1e-9


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_one_graph_have_the_same_classes(name: str) -> None:
    model, inputs, classes = infer(name)
    other = randomise(copy.deepcopy(model), 7)  # parameters and statistics; constants stay
    found = carried(classes, trace(other, inputs))
    if found is not None:  # values may have decided other things, also for the user
        assert str(found) == str(fxmerge.infer_classes(other, inputs))
        assert found.traced.source is other


def test_constants_that_differ_and_weights_that_are_tied_are_asked_anew() -> None:
    class Scaled(nn.Module):
        def __init__(self, *scale: float, tied: bool = False) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.register_buffer("scale", torch.tensor(scale))
            if tied:
                self.c.weight = self.b.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x).relu() * self.scale).relu())

    x = torch.rand(2, 3)
    classes = fxmerge.infer_classes(Scaled(1, 2, 2, 3), x)
    assert carried(classes, trace(Scaled(1, 2, 2, 3), x)) is not None
    assert carried(classes, trace(Scaled(1, 1, 2, 3), x)) is None
    assert carried(classes, trace(Scaled(1, 2, 2, 3, tied=True), x)) is None


def test_axes_that_meet_only_each_other_are_matched() -> None:
    model, inputs, classes = infer("stacked_layers")
    assert all(found_again(randomise(copy.deepcopy(model), s), inputs, classes) <= 1e-9 for s in range(8))


@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in BEYOND_ORACLE])
def test_oracle_agrees_with_the_hand(name: str) -> None:
    """Three ways to one group: by hand, by search, by inference."""
    case = NETWORKS[name]
    model, inputs = build(case)
    found = find_symmetries(model, inputs, stacks=case.stacks)
    assert found.order == case.order, "\n".join(map(describe, found.generators))
    _, _, classes = infer(name)
    missed = [describe(g) for g in found.generators if not contains(classes, g, found.live)]
    assert not (missed and case.exact), f"\n{classes}"


@pytest.mark.parametrize("name", KNOWN)
def test_strict_accepts_known_operations(name: str) -> None:
    model, inputs = build(NETWORKS[name])
    fxmerge.infer_classes(model, inputs, strict=True)


def test_strict_names_node_and_operation() -> None:
    model, inputs = build(NETWORKS["unknown_operation"])
    with pytest.raises(fxmerge.UnknownOpError, match="fft") as error:
        fxmerge.infer_classes(model, inputs, strict=True)
    assert "fft_fft" in str(error.value)


def test_unknown_operation_pins_with_a_reason() -> None:
    _, _, classes = infer("unknown_operation")
    pinned = {site.parameter: c.pinned for c in classes if c.pinned for site in c.sites if site.axis == 0}
    assert "fft" in pinned["hidden.weight"]
    assert [op for _, op in classes.unknown] == [op for _, op in classes.unknown if "fft" in op]


def test_parents_are_left_as_they_were() -> None:
    """Mode, parameters, gradients flags and the random state survive inference."""
    model = NETWORKS["mlp_batch_norm"].make().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    classes = fxmerge.infer_classes(model, POINT)
    fxmerge.permute(model, classes, seed=0)
    fxmerge.verify(model, classes)
    assert model.training
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_twins_differ_by_seed_and_repeat_by_seed() -> None:
    model, _, classes = infer("mlp")
    one, two, again = (fxmerge.permute(model, classes, seed=s).state_dict() for s in (1, 2, 1))
    assert any(not torch.equal(one[key], two[key]) for key in one)
    assert all(torch.equal(one[key], again[key]) for key in one)


def test_inference_keeps_no_memory() -> None:
    """Labels of all values are many bytes: they go at once, and not when cycles are next looked for."""
    gc.collect()
    gc.disable()
    try:
        case = NETWORKS["vision_transformer"]
        fxmerge.infer_classes(case.make(), case.example_inputs[0])
        assert not any(type(o) in (Interpretation, Label) for o in gc.get_objects())
    finally:
        gc.enable()


def test_float32_and_batch_size_do_not_matter() -> None:
    case = NETWORKS["vision_transformer"]
    small = fxmerge.infer_classes(case.make(), case.example_inputs[0])
    assert group_order(small) == case.order
    wide = fxmerge.infer_classes(case.make(), case.example_inputs[0].repeat(2, 1, 1, 1))
    assert group_order(wide) == case.order


class Largest(nn.Module):
    """The largest neuron: its value, or where it stands as well."""

    def __init__(self, where: bool):
        super().__init__()
        self.inner, self.outer, self.where = nn.Linear(4, 6), nn.Linear(1, 3), where

    def forward(self, x):
        value, index = self.inner(x).max(1, keepdim=True)
        return self.outer(value + index if self.where else value)


@pytest.mark.parametrize(("where", "free"), [(False, 6), (True, 0)])
def test_where_the_largest_neuron_stands_matters_only_if_it_is_used(where, free) -> None:
    torch.manual_seed(0)
    classes = fxmerge.infer_classes(Largest(where), torch.randn(5, 4))
    assert classes.free == free


class FunctionalGroups(nn.Module):
    """A grouped convolution on a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.weight = nn.Parameter(torch.randn(8, 4, 3, 3))

    def forward(self, x):
        return self.last(nn.functional.conv2d(self.first(x).relu(), self.weight, groups=2).mean((2, 3), keepdim=True))


def test_functional_and_module_groups_are_one() -> None:
    model = FunctionalGroups().double()
    classes = fxmerge.infer_classes(model, torch.randn(2, 3, 8, 8, dtype=torch.float64))
    assert group_order(classes) == 2 * (24 * 24) ** 2  # two groups swap; inside each, 4 inputs and 4 outputs permute
    assert fxmerge.verify(model, classes).ok


class Positions(nn.Module):
    """Reads the rows of two tables that its input is long enough for."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.rows = nn.Embedding(9, 4), nn.Parameter(torch.randn(9, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        return self.head(x + self.table(places) + self.rows[: x.shape[1]])


def test_rows_that_only_longer_inputs_read_stay_in_place():
    model = Positions()
    classes = fxmerge.infer_classes(model, torch.randn(2, 3, 4))
    unread = [c for c in classes if c.pinned == "not read on the example inputs"]
    assert [(str(site), c.size) for c in unread for site in c.sites] == [("table.weight:0", 6), ("rows:0", 6)]
    assert classes.free == 0, "the width is the input's, and rows are chosen by position"


class GroupedExperts(nn.Module):
    """Rows sorted by the experts that the router chose, multiplied group by group, and brought back."""

    def __init__(self):
        super().__init__()
        self.stem, self.router, self.head = nn.Linear(5, 8), nn.Linear(8, 4), nn.Linear(8, 3)
        self.up, self.down = nn.Parameter(torch.randn(4, 16, 8)), nn.Parameter(torch.randn(4, 8, 8))
        self.bias = nn.Parameter(torch.randn(4, 16))

    def forward(self, x):
        x = self.stem(x).tanh()
        weights, chosen = self.router(x).softmax(-1).topk(2)
        expert, order = chosen.flatten().sort()
        ends = torch.histc(expert.float(), 4, 0, 3).cumsum(0, dtype=torch.int32)
        made = torch._grouped_mm(x[order // 2], self.up.transpose(1, 2), offs=ends) + self.bias[expert]
        gate, made = made.chunk(2, -1)
        made = torch._grouped_mm(gate.sigmoid() * made, self.down.transpose(1, 2), offs=ends)
        made = made * weights.flatten()[order, None]
        return self.head(made[order.argsort()].unflatten(0, (-1, 2)).sum(1))


@GROUPED
def test_experts_are_one_class_and_verified_without_a_kernel_for_float64() -> None:
    torch.manual_seed(0)
    model, x = GroupedExperts(), torch.randn(6, 5)
    classes = fxmerge.infer_classes(model, x, strict=True)
    # what the experts read, the experts, the hidden layer of each, what they give
    assert group_order(classes) == factorial(8) * factorial(4) * factorial(8) ** 4 * factorial(8)
    checked = fxmerge.verify(model, classes)
    assert checked.moved > 0
    assert checked.error <= 1e-9
    twin = fxmerge.permute(model, classes, seed=1)
    merged = fxmerge.merge(model, twin, example_inputs=x, progress=False).module
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), merged.parameters(), strict=True))


@GROUPED
def test_experts_are_matched_by_activations_of_rows_that_all_parents_have_in_one_order() -> None:
    """Not by integers (ends of rows), nor by rows that every parent sorts by its own experts."""
    torch.manual_seed(0)
    model, x = randomise(GroupedExperts(), 0), torch.randn(6, 5)
    classes = fxmerge.infer_classes(model, x)
    nodes = {n.name: str(n.target) for n in classes.traced.graph_module.graph.nodes}
    shown = {nodes[t.node] for c in classes for t in c.taps}
    assert not any("sigmoid" in name or "grouped_mm" in name for name in shown)
    twin = fxmerge.permute(model, classes, seed=1)
    data = [torch.randn(64, 5) for _ in range(3)]
    for matcher in (ActivationMatching(), ZipIt()):
        result = fxmerge.merge(model, twin, example_inputs=x, data=data, matcher=matcher, repair=None, progress=False)
        assert min(result.alignment.quality.values()) > 0.999
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), result.module.parameters(), strict=True))


SHAPES = [((8, 4), (3, 4, 8)), ((3, 4, 4), (4, 8)), ((4, 8), (8, 4)), ((3, 4, 4), (3, 4, 8))]


@GROUPED
@pytest.mark.parametrize(("left", "right"), SHAPES)
def test_grouped_products_written_out_are_those_of_the_kernel(left, right) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(left), torch.randn(right)
    ends = None if len(left) == len(right) == 3 else torch.tensor([4, 4, 8], dtype=torch.int32)
    expected = torch._grouped_mm(x, y, offs=ends)
    with Doubled():
        got = torch._grouped_mm(x.double(), y.double(), offs=ends)
    assert torch.allclose(got, expected.double(), atol=1e-5)


class Tied(nn.Module):
    """Channels that are multiplied with each other in an order of their own, and what else becomes of them."""

    def __init__(self, left: list[int], right: list[int], norm: bool, after: str) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, 2 * len(left)), nn.Linear(2 * len(left), 2)
        self.layer = nn.Linear(len(left), 2 * len(left))
        self.left, self.right, self.norm, self.after = left, right, norm, after

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.norm:
            x = nn.functional.group_norm(x, 2)
        both = torch.cat([x[:, self.left], (x[:, self.right] - 2 * x[:, self.left]).tanh()], 1)
        if self.after == "flip":
            x = both + self.layer(x[:, self.left])
            x = x * x.flip(1).sigmoid()
        elif self.after == "group":
            x = nn.functional.group_norm(x + self.layer(x[:, self.left] * x[:, self.right].sigmoid()), 2)
        else:
            x = both + self.layer(x[:, self.left])
        return self.head(x)


@pytest.mark.parametrize(
    ("left", "right", "norm", "after", "free"),
    [
        # two pairs with the left one in the first group, two the other way round, one pair in either group
        ([10, 4, 8, 0, 7, 5], [6, 9, 1, 11, 3, 2], False, "group", 4),
        # every pair is in both groups, in two of them the other way round
        ([2, 5, 6, 3], [7, 1, 0, 4], True, "", 4),
        # pairs of pairs, in which either pair may be taken for the first, but then in every layer
        ([4, 0, 7, 1], [5, 2, 6, 3], False, "flip", 2),
    ],
)
def test_entries_of_a_neuron_stay_told_apart(left, right, norm, after, free) -> None:
    network = randomise(Tied(left, right, norm, after), seed=0).double()
    classes = fxmerge.infer_classes(network, torch.randn(4, 3).double())
    assert max(fxmerge.verify(network, classes, seed=seed).error for seed in range(4)) <= 1e-9, classes
    assert classes.free == free, classes


class Chosen(nn.Module):
    """Channels 2k and 2k + 1 are multiplied with each other; some are taken out and normalised."""

    def __init__(self, chosen: list[int], groups: int) -> None:
        super().__init__()
        self.stem, self.pairs, self.head = nn.Linear(3, 8), nn.Linear(4, 2), nn.Linear(8, 2)
        self.out, self.chosen, self.groups = nn.Linear(1, 2), chosen, groups

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        pairs = self.pairs(x[:, ::2] * x[:, 1::2].sigmoid())
        some = nn.functional.group_norm(x[:, self.chosen], self.groups).exp().sum(1, keepdim=True)
        return pairs + self.head(x.tanh()) + self.out(some)


CHOSEN = [([0, 2, 4, 7], 1, 3), ([0, 3, 4, 7], 1, 4), ([0, 3, 5, 6], 2, 2)]


@pytest.mark.parametrize(("chosen", "groups", "free"), CHOSEN)
def test_which_entry_of_a_neuron_is_chosen_matters(chosen, groups, free) -> None:
    """A neuron of which the other entry is chosen is of another kind."""
    network = randomise(Chosen(chosen, groups), seed=0).double()
    classes = fxmerge.infer_classes(network, torch.randn(4, 3).double())
    assert max(fxmerge.verify(network, classes, seed=seed).error for seed in range(4)) <= 1e-9, classes
    assert classes.free == free, classes


def joint_is_the_product_of_its_margins(columns: Sequence[np.ndarray]) -> bool:
    """By definition, part by part, in exact fractions."""
    rows = list(zip(*(c.tolist() for c in columns), strict=True))
    graph = nx.Graph([((0, row[0]), (k, value)) for row in rows for k, value in enumerate(row)])
    for part in nx.connected_components(graph):
        inside = [row for row in rows if (0, row[0]) in part]
        margins = [Counter(row[k] for row in inside) for k in range(len(columns))]
        joint = Counter(inside)
        for row in itertools.product(*margins):
            share = math.prod(Fraction(m[v], len(inside)) for m, v in zip(margins, row, strict=True))
            if joint[row] != share * len(inside):
                return False
    return True


def test_independence_is_what_its_definition_says() -> None:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(400):
        sizes = rng.integers(1, 4, rng.integers(2, 4))
        columns = list(np.indices(sizes).reshape(len(sizes), -1))  # all with all
        if rng.random() < 0.4:  # in two blocks
            columns = [np.concatenate([c, c + 5]) for c in columns]
        if rng.random() < 0.4:  # one of the rows twice
            columns = [np.concatenate([c, c[:1]]) for c in columns]
        if rng.random() < 0.4:  # anything
            columns = [rng.integers(0, 3, 8) for _ in columns]
        found.append(independent(*columns))
        assert found[-1] == joint_is_the_product_of_its_margins(columns), columns
    assert 50 < sum(found) < 350


def test_rows_columns_and_diagonals_are_entangled() -> None:
    i, j = np.indices((5, 5)).reshape(2, -1)
    assert entangled([i, j, (i - j) % 5])
    assert not entangled([i, j, i])
    assert not entangled([*np.indices((5, 5, 2)).reshape(3, -1)])
