"""Distillation: closer to the parents on held-back data or nothing changed, reproducible, everything else as found."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import NETWORKS, randomise
from torch import Tensor, nn

import fxmerge
from fxmerge.errors import InputError
from fxmerge.interfaces import AbstractRepair
from fxmerge.matchers import Average, WeightMatching
from fxmerge.repair import Distill, LeastSquares, ResetBatchNorm

GENERATOR = torch.Generator().manual_seed(5)
IMAGES = torch.randn(60, 3, 8, 8, generator=GENERATOR)
DATA = list(IMAGES.split(6))
LR = {type(None): 1e-2, ResetBatchNorm: 1e-2, LeastSquares: 1e-3}  # the better the start, the smaller the steps


def normed() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Conv2d(6, 4, 3),
        nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip


def parent(seed: int) -> nn.Module:
    return randomise(normed(), seed)


def fused(repair, data=DATA, **options) -> fxmerge.MergeResult:
    options = {"matcher": WeightMatching(), "example_inputs": IMAGES[:2], **options}
    return fxmerge.merge(parent(0), parent(1), data=data, repair=repair, progress=False, **options)


@torch.no_grad()
def distance(module: nn.Module, x: Tensor) -> float:
    target = (parent(0).eval()(x) + parent(1).eval()(x)) / 2
    return float((module.eval()(x) - target).square().mean() / target.var(correction=0))


@pytest.mark.parametrize("first", [None, ResetBatchNorm(), LeastSquares()], ids=str)
def test_the_loss_on_held_back_batches_falls(first):
    """The held-back batch is the first one; without features its loss is the distance from the mean output."""
    before = fused(first or ResetBatchNorm()).module
    result = fused(Distill(steps=60, lr=LR[type(first)], features=0.0, first=first))
    assert distance(result.module, DATA[0]) < 0.98 * distance(before, DATA[0])
    said = result.report.repair
    start, best = (float(said.split(word)[0].split()[-1]) for word in (" before", " after"))
    assert best == pytest.approx(distance(result.module, DATA[0]), rel=0.01)
    assert best < start
    assert ("refitted" in said) == isinstance(first, LeastSquares)


def test_what_is_no_better_is_not_kept():
    reset = fused(ResetBatchNorm(), matcher=Average()).module.state_dict()
    module = fused(Distill(steps=9, lr=1e6, first=ResetBatchNorm()), matcher=Average()).module
    for name, value in module.state_dict().items():
        assert torch.equal(value, reset[name]), name


def test_same_seed_same_network_and_torchs_generator_is_left_alone():
    class Checked(AbstractRepair):
        def repair(self, module, context):
            before = torch.get_rng_state()
            said = Distill(steps=12).repair(module, context)
            assert torch.equal(before, torch.get_rng_state())
            return said

    first, again = (fused(Checked(), seed=5).module.state_dict() for _ in range(2))
    assert all(torch.equal(first[k], again[k]) for k in first)
    other = fused(Distill(steps=12), seed=6).module.state_dict()
    assert not all(torch.equal(first[k], other[k]) for k in first)


def test_everything_else_is_left_as_found():
    class Checked(AbstractRepair):
        def repair(self, module, context):
            module.train()
            module.get_submodule("0").weight.requires_grad_(False)
            momentum = module.get_submodule("1").momentum
            said = Distill(steps=3).repair(module, context)
            assert all(m.training for m in module.modules())
            assert [n for n, p in module.named_parameters() if not p.requires_grad] == ["0.weight"]
            assert all(p.grad is None for p in module.parameters())
            assert module.get_submodule("1").momentum == momentum
            assert int(module.get_submodule("1").num_batches_tracked) == 0
            return said

    a, b = parent(0), parent(1)
    before = [copy.deepcopy(m.state_dict()) for m in (a, b)]
    for m in (a, b):
        m.train()
    fxmerge.merge(a, b, example_inputs=IMAGES[:2], data=DATA, matcher=Average(), repair=Checked(), progress=False)
    for m, state in zip((a, b), before, strict=True):
        torch.testing.assert_close(dict(m.state_dict()), dict(state), rtol=0, atol=0)
        assert all(part.training for part in m.modules())
        assert all(p.grad is None and p.requires_grad for p in m.parameters())


@pytest.mark.parametrize("name", ["features_returned", "nested_output", "two_inputs", "mlp_mixer", "unet"])
def test_outputs_of_all_kinds(name):
    case = NETWORKS[name]
    a = case.make()
    b = randomise(copy.deepcopy(a), 9)
    result = fxmerge.merge(
        a, b, example_inputs=case.example_inputs, data=[case.example_inputs] * 2, matcher=WeightMatching(),
        repair=Distill(steps=4, features=0.0), progress=False,
    )  # fmt: skip
    assert "distilled" in result.report.repair


def test_whole_numbers_are_nothing_to_learn():
    class Labels(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).argmax(1)

    a, b = (randomise(Labels(*normed()), seed) for seed in (0, 1))
    options = {"example_inputs": IMAGES[:2], "matcher": Average(), "progress": False}
    said = fxmerge.merge(a, b, data=DATA, repair=Distill(steps=2, features=0.0), **options).report.repair
    assert "nothing to distil" in said
    said = fxmerge.merge(a, b, data=DATA, repair=Distill(steps=2), **options).report.repair
    assert "distilled" in said  # its features are


def test_a_single_batch_serves_for_both_and_the_memory_bounds_the_batches():
    assert "distilled" in fused(Distill(steps=2), data=[IMAGES]).report.repair
    assert "distilled" in fused(Distill(steps=2, memory=1e-9)).report.repair


@pytest.mark.parametrize(
    "options", [{"steps": 0}, {"lr": 0.0}, {"features": -1}, {"held": 1.0}, {"memory": 0}, {"first": "auto"}], ids=str
)
def test_options_are_checked(options):
    with pytest.raises(InputError, match="Distill"):
        Distill(**options)


def test_empty_data_is_an_error():
    with pytest.raises(InputError, match="empty"):
        fused(Distill(), data=[])


def test_it_reads_well():
    assert str(Distill(first=ResetBatchNorm())).endswith("Distill(first=ResetBatchNorm())")
