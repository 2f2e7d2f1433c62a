"""Everything that is computed stays on the chosen device; the host waits for it in a few named places alone."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from device import DEVICE, Mixed, pretending, waits
from networks import randomise
from torch import Tensor, nn

import fxmerge
from fxmerge.errors import FxMergeWarning, InputError
from fxmerge.matchers import ActivationMatching, CCAMerge, OTFusion, PLeaS, WeightMatching, ZipIt
from fxmerge.repair import LeastSquares, Rescale, ResetBatchNorm

# Where the host may wait for the device, and why. Nothing else may, and nothing in a loop over batches but torch's own.
HOST = {
    "trace": "graph and network are compared",
    "running": "buffers are put back where they changed; outputs are compared",
    "interpret": "values of constants",
    "symmetry": "the outcome of verification",
    "coupling": "constants are compared; couplings are kept on the CPU",
    "linalg": "assignment and exact transport are solved on the CPU; convergence",
    "matching": "scores of blocks, which are assigned on the CPU",
    "descent": "whether a step gained",
    "cells": "quality; cells of blocks",
    "meeting": "values of constants",
    "matchers": "couplings go to the CPU",
    "regression": "whether a fit is better",
    "collect": "once, when all is summed",
    "fingerprint": "digests of the parents, once",
    "pipeline": "checks and diagnostics, once",
    "depth": "insertion is checked",
    "repair.batchnorm": "torch reads the number of batches for a cumulative mean",
}


def network(seed: int, depth: int = 1) -> nn.Module:
    layers = [nn.Conv2d(3, 7, 3, padding=1), nn.BatchNorm2d(7), nn.ReLU(), nn.Conv2d(7, 5, 3, padding=1), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, 8), nn.ReLU()]
    layers += [m for _ in range(depth) for m in (nn.Linear(8, 8), nn.ReLU())]
    return randomise(nn.Sequential(*layers, nn.Linear(8, 4)).double().eval(), seed)


class Attention(nn.Module):
    """Heads, a normalised stream and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT).masked_fill(torch.ones(6, 6, dtype=torch.bool, device=x.device).triu(1), -torch.inf)
        return self.head(x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)))


def attention(seed: int) -> nn.Module:
    return randomise(Attention().double().eval(), seed)


IMAGES = torch.randn(48, 3, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
WORDS = torch.randn(48, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
CASES = {
    "weights": (network, WeightMatching(restarts=1), ResetBatchNorm(), {}),
    "activations": (network, ActivationMatching(), Rescale(), {}),
    "transport": (network, OTFusion(cost="both", reg=0.3), LeastSquares(), {}),
    "exact transport": (network, OTFusion(barycenter=2), None, {}),
    "cca": (network, CCAMerge(), ResetBatchNorm(), {}),
    "zipit": (network, ZipIt(), None, {"heads": "separate"}),
    "pleas": (network, PLeaS(budget=1.3), LeastSquares(), {}),
    "heads": (attention, WeightMatching(restarts=1), None, {"heads": "concat"}),
    "attention": (attention, ActivationMatching(), None, {}),
    "grown": ((lambda seed: network(seed, 1 + seed)), ActivationMatching(), ResetBatchNorm(), {}),
}


def merged(make, matcher, repair, options, batches: int, device: torch.device | str) -> nn.Module:
    data = list((WORDS if make is attention else IMAGES).split(48 // batches))
    options = {"example_inputs": data[0][:2], "data": data, "progress": False, **options}
    options["verify"] = isinstance(matcher, WeightMatching)  # once is enough
    return fxmerge.merge(make(0), make(1), matcher=matcher, repair=repair, device=device, **options).module


@pytest.mark.parametrize("name", CASES)
def test_a_merge_stays_on_the_device_and_finds_what_the_cpu_finds(name):
    with pretending():
        found = merged(*CASES[name], 3, DEVICE)
        places = set(waits)
    assert sorted(p for p in places if not p.startswith(tuple(HOST))) == []
    expected = merged(*CASES[name], 3, "cpu")
    assert {v.device.type for v in found.state_dict().values()} == {"cpu"}  # where the parents are
    torch.testing.assert_close(dict(found.state_dict()), dict(expected.state_dict()), rtol=1e-10, atol=1e-10)


class Boxes(nn.Module):
    """Keeps a plain tensor that no ``.to`` moves, and works on it with what it makes on the CPU."""

    def __init__(self, moves: bool) -> None:
        super().__init__()
        self.a, self.b, self.moves = nn.Linear(5, 7), nn.Linear(7, 3), moves
        self.grid = torch.randn(3, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def forward(self, x: Tensor) -> Tensor:
        grid = torch.cat((self.grid, torch.ones(3, x.shape[1] - 3, dtype=torch.float64)), 1)
        return self.b(self.a(x).relu()) @ (grid.to(x.device) if self.moves else grid)


@pytest.mark.parametrize("moves", [True, False])
def test_plain_tensors_stay_where_the_network_keeps_them(moves, monkeypatch):
    a, b = (randomise(Boxes(moves).eval().double(), seed) for seed in (0, 1))
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    options = {"example_inputs": x, "matcher": WeightMatching(restarts=1), "progress": False}
    monkeypatch.setattr("fxmerge.plan._device", lambda device, home: DEVICE)
    with pretending():
        with nullcontext() if moves else pytest.warns(FxMergeWarning, match="do not run on privateuseone"):
            result = fxmerge.merge(a, b, device="auto", **options)
        told = [note for note in result.report.notes if "computed on cpu" in note]
        if moves:
            assert told == []
            torch.testing.assert_close(result.module.to(DEVICE)(x.to(DEVICE)).cpu(), result.module.to("cpu")(x))
        else:  # it does not run there, also by itself
            assert "Mixed" in told[0]
            with pytest.raises(InputError, match="Mixed"):
                fxmerge.merge(a, b, device=DEVICE, **options)
    monkeypatch.undo()
    expected = fxmerge.merge(a, b, device="cpu", **options)
    torch.testing.assert_close(result.module(x), expected.module(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", CASES)
def test_a_merge_on_cuda_finds_what_the_cpu_finds(name):
    expected = merged(*CASES[name], 3, "cpu")
    for device in ("cuda", "auto"):
        found = merged(*CASES[name], 3, device).state_dict()
        assert {v.device.type for v in found.values()} == {"cpu"}  # where the parents are
        torch.testing.assert_close(dict(found), dict(expected.state_dict()), rtol=1e-8, atol=1e-8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_parents_on_cuda_give_a_network_on_cuda():
    options = {"example_inputs": IMAGES[:2].cuda(), "data": IMAGES.cuda().split(16), "progress": False, "repair": None}
    found = fxmerge.merge(network(0).cuda(), network(1).cuda(), **options).module
    assert {v.device.type for v in found.state_dict().values()} == {"cuda"}
    expected = merged(network, ActivationMatching(), None, {}, 3, "cpu").state_dict()
    for key, value in found.state_dict().items():
        torch.testing.assert_close(value.cpu(), expected[key], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["activations", "transport", "attention"])
def test_the_host_waits_no_more_often_for_more_batches(name):
    counts = []
    for batches in (3, 6):
        with pretending():
            merged(*CASES[name], batches, DEVICE)
            counts.append({p: n for p, n in waits.items() if p.startswith(("collect", "moments", "stats", "repair"))})
    assert counts[0] == counts[1]


def test_what_would_fail_on_an_accelerator_fails_here():
    with pretending():
        x = torch.ones(3, 4, device=DEVICE)
        assert (x.device, (x @ torch.ones(4, 2).to(DEVICE)).device) == (DEVICE, DEVICE)
        assert (x * torch.tensor(2.0)).sum().cpu().item() == 24
        for mixing in (lambda: x + torch.ones(4), lambda: x[torch.arange(2)], lambda: x @ torch.ones(4, 2)):
            with pytest.raises(Mixed):
                mixing()
        with pytest.raises((RuntimeError, TypeError)):
            x.numpy()
        before = sum(waits.values())
        for waiting in (lambda: float(x.sum()), x.cpu, x.tolist, x.nonzero, lambda: x[x > 0]):
            waiting()
        assert sum(waits.values()) == before + 5
