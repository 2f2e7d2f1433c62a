"""What must hold of any network, on many drawn at random."""

from __future__ import annotations

from itertools import permutations, product

import pytest
import torch
from generator import Program, networks
from hypothesis import HealthCheck, given, settings
from networks import randomise
from oracle import contains, describe, find_symmetries, group_order
from torch import Tensor, nn
from torch.func import functional_call

import fxmerge

RANDOM = settings(derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None)


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x], dim=-1)


class Largest(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.max(-1).values


def infer(program: Program) -> fxmerge.AxisClasses:
    classes = fxmerge.infer_classes(program, program.example.double())
    assert not classes.unknown
    return classes


@settings(RANDOM, max_examples=100)
@given(networks())
def test_inferred_symmetries_keep_the_function(program: Program) -> None:
    classes = infer(program)
    error = max(fxmerge.verify(program, classes, seed=seed).error for seed in range(3))
    assert error <= 1e-9, f"{error}\n{classes}"


@settings(RANDOM, max_examples=30)
@given(networks(tiny=True))
def test_no_symmetry_is_missed_and_none_is_made_up(program: Program) -> None:
    classes = infer(program)
    found = find_symmetries(program, (program.example,))
    missed = [describe(g) for g in found.generators if not contains(classes, g, found.live)]
    assert not missed, f"missed {missed}\n{classes}"
    assert group_order(classes) == found.order, f"made up\n{classes}"


@pytest.mark.parametrize(
    ("network", "order"),
    [
        (nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)), 6),
        (nn.Sequential(nn.Linear(2, 4), nn.GLU(), nn.Linear(2, 2, bias=False)), 2),
        (nn.Sequential(nn.Linear(2, 4, bias=False), nn.Unflatten(1, (2, 2)), Largest(), nn.Linear(2, 2)), 8),
        (nn.Sequential(nn.Linear(2, 2), nn.Tanh(), Twice(), nn.Linear(4, 2, bias=False)), 8),
    ],
)
def test_oracle_counts_as_plain_enumeration_does(network: nn.Module, order: int) -> None:
    """Every combination of one permutation per parameter axis, tried one by one."""
    network = randomise(network, seed=0).double()
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parameters = dict(network.named_parameters())
    axes = [(name, a) for name, p in parameters.items() for a in range(p.dim())]
    count = 0
    with torch.no_grad():
        expected = network(x)
        for images in product(*(permutations(range(parameters[name].shape[a])) for name, a in axes)):
            moved = dict(parameters)
            for (name, a), image in zip(axes, images, strict=True):
                moved[name] = moved[name].index_select(a, torch.tensor(image))
            count += bool((functional_call(network, moved, (x,)) - expected).abs().max() <= 1e-9)
    assert count == order == find_symmetries(network, (x,)).order


@settings(RANDOM, max_examples=10)
@given(networks())
def test_twins_are_twins(program: Program) -> None:
    classes = infer(program)
    twin, x = fxmerge.permute(program, classes, seed=3), program.example.double()
    with torch.no_grad():
        expected = program(x)
        assert (twin(x) - expected).abs().max() <= 1e-9 * expected.abs().max()
