"""The ensemble, and choosing a matcher by held-back batches."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import fxmerge
from fxmerge.ensemble import disagreement
from fxmerge.errors import InputError, VerifyError
from fxmerge.interfaces import AbstractMatcher
from fxmerge.ir import Coupling
from fxmerge.matchers import ActivationMatching, Average


def net(seed: int, hidden: int = 12) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 3))


DATA = list(torch.randn(200, 6, generator=torch.Generator().manual_seed(0)).split(20))


def test_an_ensemble_is_the_weighted_mean_of_outputs():
    a, b = net(0), net(1)
    x = DATA[0]
    assert torch.allclose(fxmerge.Ensemble(a, b)(x), (a(x) + b(x)) / 2)
    assert torch.allclose(fxmerge.Ensemble(a, b, weights=(3, 1))(x), 0.75 * a(x) + 0.25 * b(x))
    assert len(list(fxmerge.Ensemble(a, b).parameters())) == 2 * len(list(a.parameters()))
    with pytest.raises(InputError, match="one share for each"):
        fxmerge.Ensemble(a, b, weights=(1,))
    with pytest.raises(InputError, match="ensemble of 0 networks"):
        fxmerge.Ensemble()


def test_outputs_in_dicts_are_averaged_leaf_by_leaf():
    class Two(nn.Module):
        def __init__(self, seed: int):
            super().__init__()
            self.net = net(seed)

        def forward(self, x):
            y = self.net(x)
            return {"logits": y, "best": y.argmax(1)}

    a, b = Two(0), Two(1)
    out = fxmerge.Ensemble(a, b)(DATA[0])
    assert torch.allclose(out["logits"], (a.net(DATA[0]) + b.net(DATA[0])) / 2)
    assert torch.equal(out["best"], a(DATA[0])["best"])


def test_disagreement_is_zero_for_the_mean_itself_and_for_any_scale_of_it():
    a, b = net(0), net(1)

    class Scaled(nn.Module):
        def forward(self, x):
            return 3 * fxmerge.Ensemble(a, b)(x)

    def feed(batch):
        return (batch,), {}

    for module in (fxmerge.Ensemble(a, b), Scaled()):
        assert disagreement(module, (a, b), (0.5, 0.5), DATA, feed) < 1e-6
    assert disagreement(a, (a, b), (0.5, 0.5), DATA, feed) > 0.01


def test_auto_takes_the_least_disagreement_and_says_so():
    a = net(0)
    twin = fxmerge.permute(a, fxmerge.infer_classes(a, DATA[0]), seed=3)
    result = fxmerge.merge(a, twin, example_inputs=DATA[0], data=DATA, matcher="auto", repair=None, progress=False)
    assert torch.allclose(result.module(DATA[0]), a(DATA[0]), atol=1e-4)
    note = next(n for n in result.report.notes if "held-back" in n)
    assert all(name in note for name in ("WeightMatching", "ActivationMatching", "OTFusion", "CCAMerge", "ZipIt"))
    chosen = note.split(": ")[1].split()[0]
    assert chosen in str(result.report).splitlines()[0]


def test_auto_goes_on_where_some_matchers_do_not_fit():
    a, b = net(0), net(1, hidden=9)
    result = fxmerge.merge(a, b, example_inputs=DATA[0], data=DATA, matcher="auto", repair=None, progress=False)
    assert "OTFusion" in result.alignment.method or "ZipIt" in result.alignment.method
    assert any("ActivationMatching (the parents differ in width" in n for n in result.report.notes)


def test_auto_says_what_it_needs():
    a, b = net(0), net(1)
    with pytest.raises(InputError, match="pass data=loader"):
        fxmerge.merge(a, b, example_inputs=DATA[0], matcher="auto")
    with pytest.raises(InputError, match="it has 1 batches"):
        fxmerge.merge(a, b, example_inputs=DATA[0], data=DATA[:1], matcher="auto")
    with pytest.raises(InputError, match="matcher='best'"):
        fxmerge.merge(a, b, example_inputs=DATA[0], data=DATA, matcher="best")


@pytest.mark.parametrize("heads", ["separate", "concat"])
def test_auto_scores_every_head(heads):
    a, b = net(0), net(1)
    options = {"example_inputs": DATA[0], "data": DATA, "heads": heads, "progress": False}
    out = fxmerge.merge(a, b, matcher="auto", **options).module(DATA[0])
    assert [x.shape for x in out] == [(20, 3), (20, 3)] if heads == "separate" else out.shape == (20, 6)


def test_better_matching_disagrees_less():
    a = net(0)
    twin = fxmerge.permute(a, fxmerge.infer_classes(a, DATA[0]), seed=3)

    def score(matcher):
        options = {"example_inputs": DATA[0], "data": DATA, "repair": None, "progress": False}
        merged = fxmerge.merge(a, twin, matcher=matcher, **options).module
        return disagreement(merged, (a, twin), (0.5, 0.5), DATA, lambda x: ((x,), {}))

    assert score(ActivationMatching()) < 1e-6 < 0.01 < score(Average())


class Losing(AbstractMatcher):
    """Half of the neurons are made of nothing."""

    def match(self, problem):
        found = Average().match(problem)
        first = found.couplings[0]
        merge = first.merge.clone()
        merge[::2] = 0
        couplings = (Coupling(merge, first.unmerge, first.widths), *found.couplings[1:])
        return replace(found, couplings=couplings)


def test_a_map_that_loses_mass_is_an_error():
    with pytest.raises(VerifyError, match=r"makes 6 of 12 neurons of nothing: mass was lost"):
        fxmerge.merge(net(0), net(1), example_inputs=DATA[0], matcher=Losing(), progress=False)
