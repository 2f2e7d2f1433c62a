"""Statistics that several jobs gather, that outlive an interruption, and that a merge takes instead of data."""

from __future__ import annotations

import pytest
import torch
from networks import randomise
from test_stats import assert_same
from torch import Tensor, nn

import fxmerge
from fxmerge.errors import FormatError, InputError
from fxmerge.matchers import ActivationMatching, OTFusion, WeightMatching

IMAGES = torch.randn(36, 3, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
BATCHES = list(IMAGES.split(6))
OPTIONS = {"example_inputs": IMAGES[:2], "progress": False}


def network(seed: int, width: int = 7) -> nn.Module:
    """Feature maps of 144 places, of which 64 a sample are drawn."""
    layers = [nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 5, 3, padding=1)]
    model = nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4))
    return randomise(model.double().eval(), seed)


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, nn.Module]:
    return network(0), network(1)


@pytest.fixture(scope="module")
def whole(pair) -> fxmerge.Statistics:
    return fxmerge.collect_statistics(*pair, data=BATCHES, **OPTIONS)


class Breaking:
    """Batches that end in an error."""

    def __init__(self, good: int, error: BaseException) -> None:
        self.good, self.error, self.armed = good, error, False

    def __iter__(self):
        yield from BATCHES[: self.good if self.armed else None]
        if self.armed:
            raise self.error


def broken_off(path, pair, good: int = 4, error: BaseException | None = None, **options) -> None:
    """Collects until the data fails, which it does not yet when it is tried out."""
    data = Breaking(good, error or KeyboardInterrupt())

    def feed(batch: Tensor) -> Tensor:
        data.armed = True
        return batch

    with pytest.raises(type(data.error)):
        fxmerge.collect_statistics(*pair, data=data, path=path, input_fn=feed, **OPTIONS, **options)


def same_module(one: nn.Module, two: nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), two.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_jobs_that_share_the_data_out_find_what_one_does(pair, whole, tmp_path):
    assert (whole.samples, whole.batches, whole.complete) == (36, 6, True)
    assert min(m.count for ms in whole.moments.values() for m in ms) == 36  # the vector behind the pool
    assert max(m.count for ms in whole.moments.values() for m in ms) == 36 * 64
    parts = [(0, BATCHES[:2]), (2, BATCHES[2:5]), (5, BATCHES[5:])]
    for first, batches in parts:
        path = tmp_path / f"{first}.safetensors"
        fxmerge.collect_statistics(*pair, data=batches, first_batch=first, path=path, **OPTIONS)
    loaded = [fxmerge.Statistics.load(tmp_path / f"{first}.safetensors") for first, _ in parts]
    assert_same(loaded[0] + loaded[1] + loaded[2], whole)
    assert (loaded[2] + loaded[0] + loaded[1]).batches == 6


def test_a_draw_depends_on_the_number_of_the_batch(pair, whole):
    other = fxmerge.collect_statistics(*pair, data=BATCHES, first_batch=1, **OPTIONS)
    k = min(whole.moments)
    assert whole.moments[k][0].count == other.moments[k][0].count
    assert not torch.equal(whole.moments[k][0].gram, other.moments[k][0].gram)


@pytest.mark.parametrize("matcher", [None, OTFusion()], ids=str)
def test_a_merge_takes_statistics_instead_of_data(pair, whole, matcher, tmp_path):
    expected = fxmerge.merge(*pair, data=BATCHES, matcher=matcher, repair=None, **OPTIONS)
    found = fxmerge.merge(*pair, statistics=whole, matcher=matcher, **OPTIONS)
    assert found.alignment.method == expected.alignment.method != "WeightMatching()"
    assert same_module(found.module, expected.module)
    whole.save(tmp_path / "kept")
    assert same_module(
        fxmerge.merge(*pair, statistics=tmp_path / "kept", matcher=matcher, **OPTIONS).module, found.module
    )


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("the disk is gone")], ids=["stopped", "failed"])
def test_what_was_gathered_is_kept_and_continued(pair, whole, tmp_path, error):
    path = tmp_path / "statistics"
    broken_off(path, pair, error=error)
    kept = fxmerge.Statistics.load(path)
    assert (kept.complete, kept.batches, kept.samples) == (False, 4, 24)
    read: list[Tensor] = []

    def feed(batch: Tensor) -> Tensor:
        read.append(batch)
        return batch

    fxmerge.collect_statistics(*pair, data=BATCHES, path=path, input_fn=feed, **OPTIONS)
    fed = [next(i for i, b in enumerate(BATCHES) if b is x) for x in read]
    assert fed == [0, 0, 4, 5]  # tried out, compared with the first that was read, and the rest
    again = fxmerge.Statistics.load(path)
    assert again.complete
    assert_same(again, whole)
    assert [p.name for p in tmp_path.iterdir()] == ["statistics"]


def test_a_batch_counts_whole_or_not_at_all(pair, tmp_path, monkeypatch):
    """Interrupted between two taps of one batch."""
    from fxmerge import collect

    add, calls = collect._Sum.add, []

    def stops(self, *args) -> None:
        calls.append(self)
        if len(calls) == 6:  # the second of two taps, in the third batch
            raise KeyboardInterrupt
        add(self, *args)

    monkeypatch.setattr(collect._Sum, "add", stops)
    with pytest.raises(KeyboardInterrupt):
        fxmerge.collect_statistics(*pair, data=BATCHES, path=tmp_path / "kept", **OPTIONS)
    assert len(set(map(id, calls))) == 2
    monkeypatch.undo()
    assert_same(
        fxmerge.Statistics.load(tmp_path / "kept"), fxmerge.collect_statistics(*pair, data=BATCHES[:2], **OPTIONS)
    )


def test_sums_are_written_while_collecting(pair, tmp_path, monkeypatch):
    from fxmerge import collect

    monkeypatch.setattr(collect, "_SAVE_EVERY", 0.0)
    path, seen = tmp_path / "kept", []

    def feed(batch: Tensor) -> Tensor:
        seen.append(fxmerge.Statistics.load(path).batches if path.exists() else 0)
        return batch

    fxmerge.collect_statistics(*pair, data=BATCHES, path=path, input_fn=feed, **OPTIONS)
    assert seen[-1] >= 1
    assert seen == sorted(seen)


def test_other_data_other_networks_and_other_places_are_refused(pair, whole, tmp_path):
    path = tmp_path / "kept"
    broken_off(path, pair)
    with pytest.raises(InputError, match="does not start with the batch that it started with"):
        fxmerge.merge(*pair, data=BATCHES[::-1], statistics=path, **OPTIONS)
    assert fxmerge.Statistics.load(path).batches == 4
    with pytest.raises(InputError, match="other parameters"):
        fxmerge.merge(pair[0], network(2), data=BATCHES, statistics=path, **OPTIONS)
    with pytest.raises(InputError, match="other parameters"):
        fxmerge.merge(pair[1], pair[0], statistics=whole, **OPTIONS)
    with pytest.raises(InputError, match="different networks"):
        fxmerge.merge(network(0, 8), network(1, 8), statistics=whole, **OPTIONS)
    with pytest.raises(InputError, match="other places"):
        fxmerge.merge(*pair, statistics=whole, matcher=ActivationMatching(at="made"), **OPTIONS)
    with pytest.raises(InputError, match="other parameters"):
        whole + fxmerge.collect_statistics(*pair[::-1], data=BATCHES[:1], **OPTIONS)


def test_what_cannot_be_used_is_refused_before_any_work(pair, whole, tmp_path):
    path = tmp_path / "kept"
    with pytest.raises(InputError, match="does not exist yet: pass data=loader"):
        fxmerge.merge(*pair, statistics=path, **OPTIONS)
    broken_off(path, pair)
    with pytest.raises(InputError, match="unfinished collection: pass data=loader"):
        fxmerge.merge(*pair, statistics=path, **OPTIONS)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FormatError, match="holds no statistics"):
        fxmerge.merge(*pair, statistics=path, **OPTIONS)
    with pytest.raises(InputError, match="statistics is a list"):
        fxmerge.merge(*pair, statistics=[whole], **OPTIONS)
    with pytest.raises(InputError, match="does not look at activations"):
        fxmerge.merge(*pair, matcher=WeightMatching(), statistics=whole, **OPTIONS)
    with pytest.raises(InputError, match="leave statistics= out"):
        fxmerge.merge(*pair, matcher="auto", data=BATCHES, statistics=whole, **OPTIONS)
    with pytest.raises(InputError, match="nothing to collect"):
        fxmerge.collect_statistics(*pair, matcher=WeightMatching(), data=BATCHES, **OPTIONS)
    with pytest.raises(FormatError, match="could not be written"):
        whole.save(path / "below a file")


def test_a_repair_that_needs_data_still_says_so(pair, whole):
    with pytest.raises(InputError, match="needs data"):
        fxmerge.merge(*pair, statistics=whole, repair=fxmerge.repair.ResetBatchNorm(), **OPTIONS)
    assert "pass data=loader" in fxmerge.merge(*pair, statistics=whole, **OPTIONS).report.repair
