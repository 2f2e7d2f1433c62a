"""Repairs against statistics computed by hand: BatchNorm re-estimated, other layers rescaled to their parents."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import NETWORKS, randomise
from torch import Tensor, nn
from torch.nn import functional as F

import fxmerge
from fxmerge.collect import collect
from fxmerge.errors import InputError
from fxmerge.interfaces import Context
from fxmerge.matchers import ActivationMatching, Average, WeightMatching
from fxmerge.repair import Rescale, ResetBatchNorm
from fxmerge.stats import choose_taps

GENERATOR = torch.Generator().manual_seed(5)
VECTORS = torch.randn(64, 5, generator=GENERATOR, dtype=torch.float64) + 0.5
IMAGES = torch.randn(24, 3, 8, 8, generator=GENERATOR, dtype=torch.float64)


def mlp() -> nn.Sequential:
    layers = (nn.Linear(5, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 6), nn.Tanh())
    return nn.Sequential(*layers, nn.Linear(6, 3))


def conv() -> nn.Sequential:
    layers = (nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 6, 2, 2, groups=2), nn.ReLU())
    return nn.Sequential(*layers, nn.Conv2d(6, 4, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 100, 2))


def normed() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.3), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip


def pair(make) -> tuple[nn.Module, nn.Module]:
    return tuple(randomise(make().double().eval(), seed) for seed in (0, 1))


def fused(a: nn.Module, b: nn.Module, data: list[Tensor], repair, **options) -> fxmerge.MergeResult:
    options = {"matcher": WeightMatching(), "example_inputs": data[0][:2], **options}
    return fxmerge.merge(a, b, data=data, repair=repair, progress=False, **options)


@torch.no_grad()
def outputs(module: nn.Module, x: Tensor, names: list[str]) -> dict[str, Tensor]:
    """What the named layers compute in eval mode, [rows, channels]."""
    found = {}
    hooks = [
        module.get_submodule(n).register_forward_hook(lambda m, args, y, n=n: found.__setitem__(n, y)) for n in names
    ]
    module.eval()(x)
    for hook in hooks:
        hook.remove()
    return {n: y.movedim(1, -1).reshape(-1, y.shape[1]) for n, y in found.items()}


# BatchNorm --------------------------------------------------------------------------------------------------


def test_batchnorm_statistics_are_means_over_batches_by_hand():
    a, b = pair(normed)
    data = list(IMAGES.split((10, 8, 6)))  # every batch counts the same, whatever its size
    plain = fused(a, b, data, None).module
    module = fused(a, b, data, ResetBatchNorm()).module
    state = dict(plain.named_parameters())
    means: dict[str, list[Tensor]] = {"1": [], "5": []}
    variances: dict[str, list[Tensor]] = {"1": [], "5": []}
    with torch.no_grad():
        for x in data:
            for conv_name, norm in (("0", "1"), ("4", "5")):
                x = F.conv2d(x, state[f"{conv_name}.weight"], state[f"{conv_name}.bias"])
                means[norm].append(x.mean((0, 2, 3)))
                variances[norm].append(x.var((0, 2, 3), unbiased=True))
                x = F.relu(F.batch_norm(x, None, None, state[f"{norm}.weight"], state[f"{norm}.bias"], training=True))
    buffers = dict(module.named_buffers())
    for norm in ("1", "5"):
        torch.testing.assert_close(buffers[f"{norm}.running_mean"], torch.stack(means[norm]).mean(0))
        torch.testing.assert_close(buffers[f"{norm}.running_var"], torch.stack(variances[norm]).mean(0))
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, state[name]), name


def test_batchnorm_statistics_equal_those_of_torch_without_momentum():
    a, b = pair(normed)
    data = list(IMAGES.split(8))
    expected = copy.deepcopy(fused(a, b, data, None).module)
    for m in expected.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.reset_running_stats()
            m.momentum = None
            m.train()
    for x in data:
        expected(x)
    module = fused(a, b, data, ResetBatchNorm()).module
    for (name, value), (_, wanted) in zip(module.named_buffers(), expected.named_buffers(), strict=True):
        if "running" in name:
            torch.testing.assert_close(value, wanted)
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [m.momentum for m in norms] == [0.1, 0.1]
    assert [int(m.num_batches_tracked) for m in norms] == [0, 0]  # as in the parents


def test_twins_keep_their_function_when_reset_on_the_data_they_were_reset_on():
    a = pair(normed)[0]
    data = [IMAGES]
    settled = fused(a, copy.deepcopy(a), data, ResetBatchNorm()).module
    twin = fxmerge.permute(settled, fxmerge.infer_classes(settled, IMAGES[:2]), seed=1)
    again = fused(settled, twin, data, ResetBatchNorm()).module
    torch.testing.assert_close(again.state_dict(), settled.state_dict(), rtol=1e-9, atol=1e-9)


# Rescaling --------------------------------------------------------------------------------------------------

LAYERS = {"mlp": (mlp, VECTORS, ["0", "3", "5"]), "conv": (conv, IMAGES, ["0", "2", "4"])}


def spread(rows: Tensor) -> tuple[Tensor, Tensor]:
    return rows.mean(0), rows.var(0, unbiased=False).sqrt()


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.3, 0.7)])
@pytest.mark.parametrize("toward", ["mean", "first"])
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_has_the_spread_of_its_parents(name, toward, weights):
    """On one batch this holds exactly: mean and sd are (1 - t) of A's plus t of those of the aligned B."""
    make, x, layers = LAYERS[name]
    a, b = pair(make)
    result = fused(a, b, [x], Rescale(toward), weights=weights)
    aligned = fxmerge.align(b, to=a, example_inputs=x[:2], matcher=WeightMatching(), progress=False)
    ours, of_a, of_b = (outputs(m, x, layers) for m in (result.module, a, aligned))
    plain = outputs(fused(a, b, [x], None, weights=weights).module, x, layers)
    t = weights[1] if toward == "mean" else 0.0
    assert f"{len(layers)} layers rescaled" in result.report.repair
    assert ("first parent" in result.report.repair) == (toward == "first")
    for layer in layers:
        for found, one, two in zip(*(spread(v[layer]) for v in (ours, of_a, of_b)), strict=True):
            torch.testing.assert_close(found, (1 - t) * one + t * two, rtol=1e-6, atol=1e-6)
        assert not torch.allclose(spread(plain[layer])[1], spread(ours[layer])[1], rtol=1e-2)


def test_a_layers_spread_follows_from_the_parents_moments():
    """sd^2 = (1-t)^2 sA^2 + t^2 sB^2 + 2 t (1-t) sA sB rho: Rescale needs no second pass to know it, and agrees."""
    make = lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))  # noqa: E731
    a, b = pair(make)
    t = 0.3
    options = {"matcher": ActivationMatching(at="made"), "weights": (1 - t, t)}
    plain, repaired = (fused(a, b, [VECTORS], repair, **options) for repair in (None, Rescale()))
    classes = [fxmerge.infer_classes(m, VECTORS[:2]) for m in (a, b)]
    moments = collect(classes, [VECTORS], lambda x: ((x,), {}), [choose_taps(c, "made") for c in classes]).moments
    k = next(k for k, c in enumerate(classes[0]) if c.free)
    (m,) = moments[k]
    coupling = plain.alignment.couplings[k]
    place = coupling.unmerge.split(coupling.widths)[1].T.argmax(1)  # the neuron of B that joins each of A's
    variance_a, variance_b = (m.part(m.covariance, j, j).diagonal() for j in (0, 1))
    variance_b = variance_b[place]
    sd_a, sd_b = variance_a.sqrt(), variance_b.sqrt()
    rho = m.part(m.covariance, 0, 1)[torch.arange(8), place] / (sd_a * sd_b)
    sd = ((1 - t) ** 2 * variance_a + t**2 * variance_b + 2 * t * (1 - t) * sd_a * sd_b * rho).sqrt()
    torch.testing.assert_close(spread(outputs(plain.module, VECTORS, ["0"])["0"])[1], sd)
    scale = ((1 - t) * sd_a + t * sd_b) / sd
    before, after = dict(plain.module.named_parameters()), dict(repaired.module.named_parameters())
    torch.testing.assert_close(after["0.weight"], scale[:, None] * before["0.weight"])
    assert torch.equal(after["2.weight"], before["2.weight"])  # the head is left alone
    assert torch.equal(after["2.bias"], before["2.bias"])


def test_a_neuron_that_never_varies_keeps_its_weights():
    a, b = pair(mlp)
    with torch.no_grad():
        for model in (a, b):
            model[0].weight[2] = 0
            model[0].bias[2] = 1.5
    state = fused(a, b, [VECTORS], Rescale(), matcher=Average()).module.state_dict()
    assert all(bool(v.isfinite().all()) for v in state.values())
    assert not state["0.weight"][2].any()
    assert float(state["0.bias"][2]) == pytest.approx(1.5)


@pytest.mark.parametrize("sizes", [16, (40, 24), (1, 63)], ids=str)
def test_batches_make_no_difference(sizes):
    a, b = pair(mlp)
    one, many = (fused(a, b, data, Rescale()).module for data in ([VECTORS], list(VECTORS.split(sizes))))
    torch.testing.assert_close(one.state_dict(), many.state_dict(), rtol=1e-9, atol=1e-9)


def test_what_does_not_fit_into_the_memory_is_left_out():
    a, b = pair(mlp)
    result = fused(a, b, list(VECTORS.split(16)), Rescale(memory=1e-9))
    assert result.report.repair.endswith("on 1 batches")
    assert fused(a, b, list(VECTORS.split(16)), Rescale()).report.repair.endswith("on 4 batches")


@pytest.mark.parametrize(
    ("make", "x", "repair"),
    [(mlp, VECTORS, Rescale()), (normed, IMAGES, Rescale()), (normed, IMAGES, ResetBatchNorm())],
    ids=["dropout", "batchnorm", "reset"],
)
def test_the_mode_of_the_parents_does_not_matter(make, x, repair):
    """Dropout and BatchNorm's batch statistics must not leak into what is measured."""
    states = []
    for training in (False, True):
        a, b = (m.train(training) for m in pair(make))
        states.append(fused(a, b, [x], repair).module.state_dict())
        assert all(m.training is training for parent in (a, b) for m in parent.modules())
    torch.testing.assert_close(*states, rtol=0, atol=0)


# Which repair, and what it leaves ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "repair", "said"),
    [
        ("mlp", ResetBatchNorm(), "no BatchNorm statistics to reset"),
        ("mlp_without_bias", Rescale(), "1 layers rescaled toward the parents on 1 batches"),
        ("transformer_mlp", "auto", "none needed"),
        ("group_norm", "auto", "none needed"),
        ("mlp", "auto", "2 layers rescaled toward the parents on 1 batches"),
        ("mlp_batch_norm", "auto", "statistics of 2 BatchNorm layers re-estimated on 1 batches"),
        ("mlp", None, "none"),
    ],
)
def test_the_report_says_what_was_repaired(name, repair, said):
    case = NETWORKS[name]
    a, b = case.make(), randomise(case.make(), seed=1)
    x = case.example_inputs[0]
    result = fused(a, b, [x], repair)
    assert result.report.repair == said
    if said.startswith("no"):
        plain = fused(a, b, [x], None)
        torch.testing.assert_close(result.module.state_dict(), plain.module.state_dict(), rtol=0, atol=0)


def test_without_data_the_report_says_how_to_get_a_repair():
    a, b = pair(normed)
    result = fxmerge.merge(a, b, example_inputs=IMAGES[:2], progress=False)
    assert "data=loader" in result.report.repair


@pytest.mark.parametrize(
    ("make", "x", "repair"), [(mlp, VECTORS, Rescale()), (normed, IMAGES, ResetBatchNorm())], ids=["mlp", "normed"]
)
@pytest.mark.parametrize("training", [False, True])
def test_modes_are_restored(make, x, repair, training):
    a, b = (m.train(training) for m in pair(make))
    module = fused(a, b, [x], repair).module
    assert [m.training for m in module.modules()] == [training] * len(list(module.modules()))


@pytest.mark.parametrize("repair", [Rescale(), ResetBatchNorm()], ids=str)
@pytest.mark.parametrize("data", [[IMAGES], []], ids=["done", "failed"])
def test_parts_in_different_modes_are_restored_one_by_one(repair, data):
    a, b = pair(normed)
    result = fused(a, b, [IMAGES], None)
    module, classes = result.module.train(), fxmerge.infer_classes(a, IMAGES[:2])
    module.get_submodule("1").eval()
    modes = [m.training for m in module.modules()]
    context = Context(
        (classes, fxmerge.infer_classes(b, IMAGES[:2])), classes, result.alignment, (0.5, 0.5), data,
        lambda x: ((x,), {}), torch.device("cpu"),
    )  # fmt: skip
    if data:
        repair.repair(module, context)
    else:
        with pytest.raises(InputError, match="data is empty"):
            repair.repair(module, context)
    assert [m.training for m in module.modules()] == modes


def test_the_variance_that_averaging_loses_is_given_back():
    a, b = pair(mlp)
    variance = fused(a, b, [VECTORS], Rescale()).report.variance
    before, after = (sorted(v[i] for n, v in variance.items() if n != "_7") for i in (0, 1))
    assert before[0] < 0.8
    assert after[0] > 0.8
