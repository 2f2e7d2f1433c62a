"""Layers refitted by least squares: against torch's own solver, on twins, and left alone where nothing is known."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import NETWORKS, randomise
from torch import Tensor, nn
from torch.nn import functional as F

import fxmerge
from fxmerge.errors import InputError
from fxmerge.matchers import Average, WeightMatching
from fxmerge.repair import LeastSquares
from fxmerge.symmetry import relative_error

GENERATOR = torch.Generator().manual_seed(5)
VECTORS = torch.randn(96, 5, generator=GENERATOR, dtype=torch.float64) + 0.5
IMAGES = torch.randn(24, 3, 8, 8, generator=GENERATOR, dtype=torch.float64)


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(5, 8), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)
    )


def conv() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.ReLU(), nn.Conv2d(4, 6, 3, 2, bias=False, groups=2),
        nn.GELU(), nn.Conv2d(6, 6, 2, dilation=2, padding="same", groups=6), nn.ReLU(), nn.Flatten(), nn.Linear(54, 2),
    )  # fmt: skip


def normed() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4),
        nn.MaxPool2d(2), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, affine=False), nn.ReLU(), nn.BatchNorm2d(4),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu_()
        x = F.relu(x + self.norm(self.conv(x)))
        return self.head(x.mean((2, 3)))


MAKERS = {"mlp": (mlp, VECTORS), "conv": (conv, IMAGES), "normed": (normed, IMAGES), "residual": (Residual, IMAGES)}


def parent(make, seed: int = 0) -> nn.Module:
    return randomise(make().double().eval(), seed)


def fused(a: nn.Module, b: nn.Module, data: list, repair=None, **options) -> fxmerge.MergeResult:
    options = {"matcher": WeightMatching(), **({"example_inputs": data[0][:2]} if data else {}), **options}
    return fxmerge.merge(a, b, data=data, repair=repair, progress=False, **options)


@torch.no_grad()
def settled(model: nn.Module, x: Tensor) -> nn.Module:
    """With the statistics of exactly these images in every BatchNorm, layer by layer in eval mode."""

    def settle(norm: nn.Module, args: tuple[Tensor]) -> None:
        variance, mean = torch.var_mean(args[0], (0, 2, 3))
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)

    hooks = [m.register_forward_pre_hook(settle) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    model(x)
    for hook in hooks:
        hook.remove()
    return model


@pytest.mark.parametrize("name", MAKERS)
def test_twins_recover_their_parents_function(name):
    make, x = MAKERS[name]
    a = settled(parent(make), x)
    twin = fxmerge.permute(a, fxmerge.infer_classes(a, x[:2]), seed=1)
    result = fused(a, twin, list(x.split(8)), LeastSquares())
    with torch.no_grad():
        assert relative_error(result.module(x), a(x)) < 1e-6


@pytest.mark.parametrize("name", MAKERS)
def test_damaged_layers_are_recovered(name):
    """What merging gave may be anything: with a weak pull, targets that can be reached are reached."""
    make, x = MAKERS[name]
    a = settled(parent(make), x)

    class Damaged(LeastSquares):
        def repair(self, module, context):
            norms = {id(p) for m in module.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
            for index, p in enumerate(module.parameters()):  # a BatchNorm behind no layer keeps its own
                p.data += (
                    0.0
                    if id(p) in norms
                    else 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(index)).to(p)
                )
            return super().repair(module, context)

    with torch.no_grad():
        y = fused(a, copy.deepcopy(a), [x], Damaged(ridge=1e-12), matcher=Average()).module(x)
        assert relative_error(y, a(x)) < 1e-4


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.3, 0.7)])
def test_one_layer_equals_torchs_solver(weights):
    """No matching, no norm: the ridge problem written out as one stacked system."""
    a, b = (parent(lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), s) for s in (0, 1))
    options = {"matcher": Average(), "weights": weights}
    plain = fused(a, b, [VECTORS], None, **options).module
    ridge = 0.5
    module = fused(a, b, [VECTORS], LeastSquares(ridge=ridge), **options).module
    with torch.no_grad():
        before = [sum(w * m[0](VECTORS) for w, m in zip(weights, (a, b), strict=True))]
        after = [sum(w * m[:2](VECTORS) for w, m in zip(weights, (a, b), strict=True))]
        targets = {"0": torch.where(after[0] > 0, after[0], before[0])}
        targets["2"] = sum(w * m(VECTORS) for w, m in zip(weights, (a, b), strict=True))
        z = VECTORS
        for name in ("0", "2"):
            t = targets[name]
            zc, tc = z - z.mean(0), t - t.mean(0)
            start = plain.get_submodule(name).weight
            made = zc @ start.T
            start = start * ((made * tc).sum(0) / made.square().sum(0))[:, None]
            pull = (ridge * zc.square().mean() * len(z)).sqrt()
            wide = torch.cat([zc, pull * torch.eye(z.shape[1]).double()])
            weight = torch.linalg.lstsq(wide, torch.cat([tc, pull * start.T])).solution.T
            layer = module.get_submodule(name)
            torch.testing.assert_close(layer.weight.data, weight)
            torch.testing.assert_close(layer.bias.data, t.mean(0) - weight @ z.mean(0))
            z = F.relu(layer(z))


@pytest.mark.parametrize("name", MAKERS)
def test_the_output_comes_no_farther_from_the_parents_merged_output(name):
    make, x = MAKERS[name]
    a, b = parent(make), parent(make, 1)
    with torch.no_grad():
        target = (a(x) + b(x)) / 2
        repaired = fused(a, b, list(x.split(8)), LeastSquares(ridge=1e-6)).module(x)
        plain = fused(a, b, list(x.split(8)), "auto").module(x)
    assert (repaired - target).square().mean() < (plain - target).square().mean()


def test_batchnorm_stays_genuine():
    a, b = parent(normed), parent(normed, 1)
    module = fused(a, b, [IMAGES], LeastSquares()).module
    state = {k: v.clone() for k, v in module.state_dict().items()}
    settled(module, IMAGES)
    for key, value in module.state_dict().items():
        if "running" in key:
            torch.testing.assert_close(value, state[key])


ANY = [
    "grouped_then_dense",
    "depthwise_multiplier",
    "channel_shuffle",
    "vision_transformer",
    "mlp_mixer",
    "rotary_halves",
]
ANY += ["conv1d", "module_called_twice", "weights_concatenated", "unet", "nested_output", "tied_autoencoder"]


@pytest.mark.parametrize("name", ANY)
def test_all_kinds_of_networks_go_through_and_parents_are_left_as_found(name):
    case = NETWORKS[name]
    a = case.make().train()
    b = randomise(copy.deepcopy(a), 9)
    before = [copy.deepcopy(m.state_dict()) for m in (a, b)]
    data = [case.example_inputs] * 2
    module = fused(a, b, data, LeastSquares(), example_inputs=case.example_inputs).module
    assert all(m.training for n in (a, b) for m in n.modules())
    for m, state in zip((a, b), before, strict=True):
        torch.testing.assert_close(dict(m.state_dict()), dict(state), rtol=0, atol=0)
    module.eval()(*case.example_inputs)


def test_same_seed_same_network_and_the_memory_bounds_the_batches():
    a, b = parent(normed), parent(normed, 1)
    data = list(IMAGES.repeat(20, 1, 1, 1).split(48))
    module, again = (fused(a, b, data, LeastSquares(rows=1), seed=3).module.state_dict() for _ in range(2))
    assert all(torch.equal(module[k], again[k]) for k in module)
    other = fused(a, b, data, LeastSquares(rows=1), seed=4).module.state_dict()
    assert not all(torch.equal(module[k], other[k]) for k in module)
    assert "on 10 batches" in fused(a, b, data, LeastSquares()).report.repair
    assert "on 1 batches" in fused(a, b, data, LeastSquares(memory=1e-9)).report.repair


@pytest.mark.parametrize("options", [{"ridge": 0.0}, {"rows": -1}, {"memory": 0}])
def test_options_are_checked(options):
    with pytest.raises(InputError, match="positive"):
        LeastSquares(**options)


def test_empty_data_is_an_error():
    a, b = parent(mlp), parent(mlp, 1)
    with pytest.raises(InputError, match="empty"):
        fused(a, b, [], LeastSquares(), example_inputs=VECTORS[:2])
