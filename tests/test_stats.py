"""Streamed moments equal those of all rows at once, and add up."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from networks import NETWORKS, randomise
from torch import Tensor, nn

import fxmerge
from fxmerge.collect import collect
from fxmerge.errors import InputError
from fxmerge.ir import AxisClasses, Tap
from fxmerge.moments import Statistics
from fxmerge.stats import choose_taps, listen, rows

DATA = torch.randn(101, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 2 + 1


def mlp(seed: int, width: int = 8) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 6), nn.Tanh(), nn.Linear(6, 3))
    return randomise(model.double().eval(), seed)


def feed(batch: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    return (batch,), {}


def measure(parents: list[AxisClasses], batches: list[Tensor], kind: str = "read", **options) -> Statistics:
    return collect(parents, batches, feed, [choose_taps(p, kind) for p in parents], **options)


@pytest.fixture(scope="module")
def pair() -> list[AxisClasses]:
    return [fxmerge.infer_classes(mlp(seed), DATA[:2]) for seed in (0, 1)]


@pytest.fixture(scope="module")
def activations(pair) -> dict[int, np.ndarray]:
    """Class -> what the next layer reads of it, rows x neurons of both parents side by side."""
    layers = {0: 2, 1: 4}  # the n-th free class is what follows the n-th activation
    free = [k for k, c in enumerate(pair[0]) if c.free]
    with torch.no_grad():
        return {
            k: np.concatenate([p.traced.source[: layers[n]](DATA).numpy() for p in pair], 1) for n, k in enumerate(free)
        }


def assert_same(one: Statistics, two: Statistics, tolerance: float = 1e-12) -> None:
    assert one.samples == two.samples
    assert one.moments.keys() == two.moments.keys()
    for k, taps in one.moments.items():
        for a, b in zip(taps, two.moments[k], strict=True):
            assert (a.count, a.widths) == (b.count, b.widths)
            torch.testing.assert_close(a.mean.cpu(), b.mean.cpu(), rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(a.covariance.cpu(), b.covariance.cpu(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("sizes", [(101,), (1,) * 101, (50, 51), (3, 90, 8)], ids=["one", "all", "two", "three"])
def test_moments_equal_numpy_whatever_the_batches(pair, activations, sizes):
    found = measure(pair, list(DATA.split(sizes)))
    assert found.samples == 101
    assert found.moments.keys() == activations.keys()
    for k, (moments,) in found.moments.items():
        values = activations[k]
        assert moments.count == 101
        np.testing.assert_allclose(moments.mean.numpy(), values.mean(0), atol=1e-12)
        np.testing.assert_allclose(moments.covariance.numpy(), np.cov(values.T, bias=True), atol=1e-11)
        n = pair[0][k].size
        cross = np.cov(values.T, bias=True)[:n, n:]
        np.testing.assert_allclose(moments.part(moments.covariance, 0, 1).numpy(), cross, atol=1e-11)


def test_a_large_mean_costs_no_digits():
    """The sum of squares would lose the variance behind a mean of 1e8; rows are shifted first."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Identity(), nn.Linear(4, 2)).double()
    model[0].bias.data += 1e8
    classes = fxmerge.infer_classes(model, DATA[:2])
    ((moments,),) = measure([classes], list(DATA.split(20))).moments.values()
    with torch.no_grad():
        values = (model[0](DATA) - 1e8).numpy()
    np.testing.assert_allclose(moments.covariance.numpy(), np.cov(values.T, bias=True), rtol=1e-6, atol=1e-6)


def test_statistics_add(pair):
    whole, one, two = (measure(pair, list(part.split(10))) for part in (DATA, DATA[:30], DATA[30:]))
    assert not torch.equal(next(iter(one.moments.values()))[0].shift, next(iter(two.moments.values()))[0].shift)
    assert_same(one + two, whole)
    assert_same(two + one, whole)
    assert_same(one + one, measure(pair, [DATA[:30], DATA[:30]]))


def test_statistics_of_other_networks_do_not_add(pair):
    other = fxmerge.infer_classes(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)).double(), DATA[:2])
    with pytest.raises(InputError, match="different networks"):
        measure(pair, [DATA]) + measure([other, other], [DATA])


def test_statistics_are_saved_and_loaded(pair, tmp_path):
    found = measure(pair, [DATA])
    found.save(tmp_path / "statistics.safetensors")
    again = Statistics.load(tmp_path / "statistics.safetensors")
    assert_same(found, again, tolerance=0)
    assert all(t.shift.dtype == torch.float64 for taps in again.moments.values() for t in taps)
    assert_same(again + found, found + found)


def test_float32_activations_are_summed_in_float64():
    models = [mlp(seed).float() for seed in (0, 1)]
    classes = [fxmerge.infer_classes(m, DATA[:2].float()) for m in models]
    for (moments,) in measure(classes, [DATA.float()]).moments.values():
        assert {moments.shift.dtype, moments.total.dtype, moments.gram.dtype} == {torch.float64}


def test_nothing_grows_with_the_samples(pair):
    def tensors(s: Statistics) -> list[Tensor]:
        values = [getattr(m, f.name) for taps in s.moments.values() for m in taps for f in fields(m)]
        return [v for v in values if isinstance(v, Tensor)]

    one, many = measure(pair, [DATA]), measure(pair, [DATA] * 3)
    assert [t.shape for t in tensors(one)] == [t.shape for t in tensors(many)]
    for t in tensors(many):
        assert set(t.shape) <= {16, 12}  # the neurons of both parents, of either hidden layer
        assert t.untyped_storage().nbytes() == t.nbytes  # nor does a view hold on to the rows


def test_a_seed_is_private_and_decides_which_places_are_kept():
    case = NETWORKS["conv_chain"]
    model, image = case.make(), torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    classes = [fxmerge.infer_classes(model, image)] * 2
    state = torch.get_rng_state()
    one, same, other = (measure(classes, [image], "made", positions=5, seed=s) for s in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert_same(one, same, tolerance=0)
    first = next(iter(one.moments))
    assert one.moments[first][0].count == 15
    assert not torch.equal(one.moments[first][0].gram, other.moments[first][0].gram)


def test_both_parents_are_seen_at_the_same_places():
    case = NETWORKS["conv_chain"]
    model, images = case.make().double(), torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    classes = [fxmerge.infer_classes(model, images[:2])] * 2
    found = measure(classes, list(images.split(2)), "made", positions=4)
    for taps in found.moments.values():
        for moments in taps:
            own, cross = (moments.part(moments.covariance, 0, b) for b in (0, 1))
            assert float(own.diagonal().min()) > 0
            torch.testing.assert_close(cross, own, rtol=1e-12, atol=1e-12)


def test_all_places_are_kept_where_they_are_few():
    case = NETWORKS["conv_chain"]
    model, image = case.make().double(), torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    classes = fxmerge.infer_classes(model, image)
    found = measure([classes], [image], "made", positions=64)
    with torch.no_grad():
        flat = model[0](image).permute(0, 2, 3, 1).reshape(-1, 6).numpy()
    moments = next(iter(found.moments.values()))[0]
    assert moments.count == 3 * 64
    np.testing.assert_allclose(moments.covariance.numpy(), np.cov(flat.T, bias=True), atol=1e-12)


@pytest.mark.parametrize("name", ["flatten_into_linear", "flatten_channels_last"])
def test_a_flattened_feature_map_gives_a_row_per_place(name):
    stems = {
        "flatten_into_linear": lambda model, x: nn.Sequential(*list(model)[:3])(x),
        "flatten_channels_last": lambda model, x: nn.functional.avg_pool2d(model.stem(x).relu(), 4),
    }
    case = NETWORKS[name]
    model, image = case.make().double(), case.example_inputs[0].double()
    classes = fxmerge.infer_classes(model, image)
    (tap,) = (t for c in classes for t in c.taps if t.index.shape[1] == 4)
    value = listen(classes.traced.graph_module, {tap.node}, (image,), {})[tap.node]
    with torch.no_grad():
        stem = stems[name](model, image)
    expected = stem.permute(0, 2, 3, 1).reshape(-1, 4)
    found = rows(value, tap, None)
    assert found.shape == expected.shape == (8, 4)
    assert sorted(map(tuple, found.tolist())) == sorted(map(tuple, expected.tolist()))


def test_taps_say_which_layer_writes_and_which_reads():
    case = NETWORKS["conv_chain"]
    classes = fxmerge.infer_classes(case.make(), case.example_inputs)
    kinds = {kind: [t.node for c in classes if c.free for t in c.taps if t.kind == kind] for kind in ("made", "read")}
    assert kinds == {"made": ["_0", "_4"], "read": ["_3", "_8"]}  # the convolutions; what they and the head read


def test_taps_are_few_and_evenly_spread():
    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(9))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for layer in self.layers:
                x = x + torch.tanh(layer(x))
            return self.head(x)

    classes = fxmerge.infer_classes(Stream().eval(), DATA[:2].float())
    k = next(k for k, c in enumerate(classes) if c.free)
    every = [t.node for t in classes[k].taps if t.kind == "read"]
    assert len(every) >= 9
    chosen = [t.node for t in choose_taps(classes, "read", most=4)[k]]
    assert len(chosen) == 4
    assert [chosen[0], chosen[-1]] == [every[0], every[-1]]
    assert [every.index(n) for n in chosen] == sorted(every.index(n) for n in chosen)
    assert all(isinstance(t, Tap) and t.kind == "made" for t in choose_taps(classes, "made")[k])
