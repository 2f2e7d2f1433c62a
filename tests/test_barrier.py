"""The barrier against a plain loop over networks that hold the interpolated tensors, in float64."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fxmerge.barrier import Barrier, evaluate, evaluate_barrier
from fxmerge.errors import FxMergeError, InputError, StructureError


def mlp(seed: int, width: int = 8) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3)).double()


def cnn(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(36, 3))
    net = net.double()
    with torch.no_grad():
        for _ in range(seed):  # running statistics and counters that differ
            net(torch.randn(6, 2, 5, 5).double())
    return net


def samples(*shape: int, count: int = 10, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(count, *shape, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (count,), generator=generator)
    return list(zip(x.split(size), y.split(size), strict=True))  # the last batch is smaller


def between(a: nn.Module, b: nn.Module, t: float) -> nn.Module:
    net, theirs = copy.deepcopy(a).eval(), b.state_dict()
    mixed = {k: (1 - t) * v + t * theirs[k] if v.is_floating_point() else v for k, v in a.state_dict().items()}
    net.load_state_dict(mixed)
    return net


@pytest.mark.parametrize(("make", "shape"), [(mlp, (4,)), (cnn, (2, 5, 5))])
@pytest.mark.parametrize("points", [2, 5])
def test_equals_a_plain_loop(make, shape, points) -> None:
    a, b, data = make(1), make(2), samples(*shape)
    x, y = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    found = evaluate_barrier(a, b, data, points=points, device="cpu", progress=False)
    with torch.no_grad():
        outputs = [between(a, b, t)(x) for t in found.t]
    losses = [F.cross_entropy(o, y).item() for o in outputs]
    line = [(1 - t) * losses[0] + t * losses[-1] for t in found.t]
    assert found.t == tuple(torch.linspace(0, 1, points).tolist())
    assert found.loss == pytest.approx(losses, rel=1e-12)
    assert found.metric == pytest.approx([(o.argmax(1) == y).double().mean().item() for o in outputs], rel=1e-12)
    assert found.barrier == pytest.approx(max(v - w for v, w in zip(losses, line, strict=True)), abs=1e-12)


def test_a_network_and_itself_have_no_barrier() -> None:
    net = mlp(0)
    found = evaluate_barrier(net, copy.deepcopy(net), samples(4), points=4, progress=False)
    assert found.loss == pytest.approx(found.loss[:1] * 4, rel=1e-12)
    assert found.barrier == pytest.approx(0, abs=1e-12)


def test_a_permuted_twin_has_a_barrier() -> None:
    a = mlp(0)
    data = [(x, a(x).argmax(1)) for x, _ in samples(4, count=40)]
    with torch.no_grad():
        a[2].weight *= 20  # sure of its labels
    b, order = copy.deepcopy(a), torch.arange(8).roll(3)
    with torch.no_grad():
        b[0].weight.copy_(a[0].weight[order])
        b[0].bias.copy_(a[0].bias[order])
        b[2].weight.copy_(a[2].weight[:, order])
    found = evaluate_barrier(a, b, data, progress=False)
    assert found.loss[0] == pytest.approx(found.loss[-1], rel=1e-9)
    assert found.barrier > 0.1
    assert found.barrier == pytest.approx(max(found.loss) - found.loss[0])


@torch.no_grad()
def test_batchnorm_statistics_are_the_cumulative_mean_over_the_data() -> None:
    a, b, data = cnn(1), cnn(2), samples(2, 5, 5)
    found = evaluate_barrier(a, b, data, points=3, reset_batchnorm=True, progress=False)
    for t, loss in zip(found.t, found.loss, strict=True):
        net = between(a, b, t)
        inputs = [net[0](x) for x, _ in data]
        net[1].running_mean.copy_(torch.stack([h.mean((0, 2, 3)) for h in inputs]).mean(0))
        net[1].running_var.copy_(torch.stack([h.transpose(0, 1).flatten(1).var(1) for h in inputs]).mean(0))
        expected = sum(F.cross_entropy(net(x), y, reduction="sum").item() for x, y in data) / 10
        assert loss == pytest.approx(expected, rel=1e-10)
    assert found.loss != evaluate_barrier(a, b, data, points=3, progress=False).loss


def test_leaves_everything_as_it_was() -> None:
    a, b = cnn(1).train(), cnn(2).eval()
    a[1].eval()
    data = DataLoader(TensorDataset(*map(torch.cat, zip(*samples(2, 5, 5), strict=True))), 4, shuffle=True)
    modes = [m.training for net in (a, b) for m in net.modules()]
    states = [{k: v.clone() for k, v in net.state_dict().items()} for net in (a, b)]
    tensors = [id(t) for net in (a, b) for t in (*net.parameters(), *net.buffers())]
    torch.manual_seed(5)
    random = torch.get_rng_state()
    evaluate_barrier(a, b, data, points=3, reset_batchnorm=True, progress=False)
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for net in (a, b) for m in net.modules()] == modes
    assert [id(t) for net in (a, b) for t in (*net.parameters(), *net.buffers())] == tensors
    for net, state in zip((a, b), states, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
        assert all(p.grad is None for p in net.parameters())


def test_an_iterator_serves_every_point() -> None:
    a, b = mlp(0), mlp(1)
    listed = evaluate_barrier(a, b, samples(4), points=3, progress=False)
    assert evaluate_barrier(a, b, iter(samples(4)), points=3, progress=False) == listed


class Masked(nn.Module):
    """Holds what must not be interpolated blindly: -inf, integers, a tied weight."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.register_buffer("mask", torch.tensor([0.0, 0.0, -torch.inf]))
        self.register_buffer("order", torch.tensor([2, 1, 0] if seed else [0, 1, 2]), persistent=False)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        x = self.second(self.first(x if shift is None else x + shift))[:, self.order]
        return F.softmax(x + self.mask, 1)


def test_masks_integers_and_tied_weights() -> None:
    a, b = Masked(0), Masked(1)
    x = torch.randn(5, 3)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().mean()

    found = evaluate_barrier(a, b, [(x, torch.ones(5, 3))], loss=loss, points=3, progress=False)
    middle = copy.deepcopy(a)
    with torch.no_grad():
        for p, q in zip(middle.parameters(), b.parameters(), strict=True):
            p.lerp_(q, 0.5)
    assert found.loss[1] == pytest.approx(loss(middle(x), torch.ones(5, 3)).item(), rel=1e-5)
    assert all(map(math.isfinite, found.loss))
    assert found.metric is None


@pytest.mark.parametrize(
    ("batch", "input_fn"),
    [
        (lambda x, y: (x, y), None),
        (lambda x, y: [(x,), y], None),
        (lambda x, y: ({"x": x}, y), None),
        (lambda x, y: (x, y, "name"), lambda batch: (batch[0], torch.zeros(()))),
        (lambda x, y: (y, y, x), lambda batch: {"x": batch[2], "shift": None}),
    ],
)
def test_forms_of_batches(batch, input_fn) -> None:
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    found = evaluate_barrier(Masked(0), Masked(1), [batch(x, y)], input_fn=input_fn, points=2, progress=False)
    assert found.loss[0] == pytest.approx(F.cross_entropy(Masked(0)(x), y).item(), rel=1e-5)


def test_own_loss_and_metric_of_a_whole_batch() -> None:
    a, b = mlp(0), mlp(1)
    data = [{"x": x, "y": y} for x, y in samples(4)]

    def count(output: Tensor, batch: dict[str, Tensor]) -> float:
        assert output.shape == (*batch["y"].shape, 3)
        return 0.25

    found = evaluate_barrier(
        a, b, data, input_fn=lambda batch: batch["x"], loss=count, metric=count, points=3, progress=False
    )
    assert found.loss == found.metric == (0.25,) * 3
    assert found.barrier == 0


def test_prints_a_table_and_draws(tmp_path) -> None:
    found = Barrier((0.0, 0.5, 1.0), (1.0, 3.0, 2.0), (0.9, 0.2, 0.8), 1.5)
    lines = str(found).splitlines()
    assert lines[0].split() == ["t", "loss", "metric"]
    assert lines[3].split() == ["0.500", "3", "0.2"]
    assert lines[-1] == "loss barrier 1.5"
    assert "metric" not in str(Barrier((0.0, 1.0), (1.0, 1.0), None, 0.0))
    pytest.importorskip("matplotlib")
    assert found.plot(tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(FxMergeError, match=r"cannot be drawn.*\.png"):
        found.plot(tmp_path / "a.nonsense")
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_plot_names_the_extra(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(FxMergeError, match=r"fxmerge\[plot\]"):
        Barrier((0.0, 1.0), (1.0, 1.0), None, 0.0).plot(tmp_path / "a.png")


def test_infinite_losses_are_not_hidden() -> None:
    a, b = mlp(0), mlp(1)
    with torch.no_grad():
        b[2].bias[0] = torch.nan
    assert str(evaluate_barrier(a, b, samples(4), points=3, progress=False).barrier) == "nan"


def renamed() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3, bias=False)).double()


@pytest.mark.parametrize(
    ("b", "message"),
    [
        (renamed, r"'2.bias' is only in the first network"),
        (lambda: nn.Sequential(*mlp(0), nn.Linear(3, 3)), r"'3.weight' is only in the second network"),
        (lambda: mlp(0, width=9), r"'0.weight' is \[8, 4\] in the first network and \[9, 4\] in the second"),
    ],
)
def test_different_structure(b, message) -> None:
    with pytest.raises(StructureError, match=message):
        evaluate_barrier(mlp(0), b(), samples(4), progress=False)


def nothing() -> Iterator[tuple[Tensor, Tensor]]:
    yield from ()


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ([], {}, "no batch"),
        (nothing(), {}, "no batch"),
        (3, {}, "data is a int"),
        (torch.zeros(2, 4), {}, "data is a Tensor"),
        ([torch.zeros(2, 4)], {}, "batch 0 is a Tensor"),
        ([(["a"], torch.zeros(2))], {}, "inputs of batch 0 are a list"),
        ([*samples(4), (torch.zeros(2, 5).double(), torch.zeros(2).long())], {}, r"batch 3 does not fit.*\[2, 5\]"),
        ([(torch.zeros(2, 4).double(), torch.zeros(3).long())], {}, "batch 0 does not fit"),
        ([(torch.zeros(2, 4).double(), torch.tensor([0, 3]))], {}, "batch 0 does not fit.*labels from 0 to 3 for 3"),
        ([(torch.zeros(2, 4), torch.zeros(2).long())], {}, "batch 0 does not fit"),
        ([({"y": torch.zeros(2, 4)}, torch.zeros(2).long())], {}, "batch 0 does not fit"),
        ([(torch.zeros(2, 4).double(), None)], {}, "cross-entropy is for tensors.*NoneType"),
        (samples(4), {"loss": lambda output, target: output}, "batch 0 does not fit"),
        (samples(4), {"points": 1}, "points is 1"),
        (samples(4), {"points": 2.0}, "points is 2.0"),
    ],
)
def test_unusable_input(data, options, message) -> None:
    with pytest.raises(InputError, match=message):
        evaluate_barrier(mlp(0), mlp(1), data, progress=False, **options)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu() -> None:
    a, b, data = cnn(1), cnn(2), samples(2, 5, 5)
    on_cpu = evaluate_barrier(a, b, data, points=3, device="cpu", progress=False)
    for found in (
        evaluate_barrier(a, b, data, points=3, progress=False),
        evaluate_barrier(copy.deepcopy(a).cuda(), b, data, points=3, progress=False),
    ):
        assert found.loss == pytest.approx(on_cpu.loss, rel=1e-9)
    assert next(a.parameters()).device.type == "cpu"


def test_one_network_is_measured_as_the_ends_of_the_line_are() -> None:
    a, b, data = cnn(1), cnn(2).train(), samples(2, 5, 5)
    line = evaluate_barrier(a, b, data, points=2, progress=False)
    assert line.metric is not None
    for network, end in ((a, 0), (b, -1)):
        assert evaluate(network, data, progress=False) == (line.loss[end], line.metric[end])
    assert b.training, "left as it was found"
