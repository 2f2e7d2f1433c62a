"""One merge on two processes: each streams its own batches, solves its share, and ends with what one would find."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from networks import randomise
from test_collect import BATCHES, OPTIONS, network
from test_stats import assert_same
from torch import nn

import fxmerge
from fxmerge.errors import StructureError
from fxmerge.matchers import ActivationMatching, CCAMerge, OTFusion, WeightMatching
from fxmerge.ranks import draw, spread
from fxmerge.repair import Distill, LeastSquares, Rescale, ResetBatchNorm


def plain(seed: int) -> nn.Module:
    layers = [nn.Conv2d(3, 7, 3), nn.ReLU(), nn.Conv2d(7, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return randomise(nn.Sequential(*layers, nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).double().eval(), seed)


MERGES = {
    "activations, batchnorm": (network, ActivationMatching(), ResetBatchNorm()),
    "cca, rescale": (plain, CCAMerge(), Rescale()),
    "ot, least squares": (network, OTFusion(cost="both", reg=0.05), LeastSquares(rows=2.0)),
    "weights, distill": (network, WeightMatching(), Distill(steps=4)),
}


def results(batches: list[torch.Tensor], path: Path) -> dict[str, object]:
    """All that is compared."""
    found: dict[str, object] = {}
    for name, (make, matcher, repair) in MERGES.items():
        parents = make(0), make(1)
        result = fxmerge.merge(*parents, data=batches, matcher=matcher, repair=repair, **OPTIONS)
        found[name] = result.module.state_dict(), result.report.variance, result.report.repair
    fxmerge.collect_statistics(plain(0), plain(1), data=batches, path=path, **OPTIONS)
    try:
        spread(_fails, [1, 2, 3, 4])
    except StructureError as error:
        found["error"] = str(error)
    return found


def _fails(item: int) -> int:
    if item == 2:
        raise StructureError("two fails")
    return item


RANK = """
import os, pickle, sys
from pathlib import Path
import torch.distributed as dist
sys.path[:0] = [{tests!r}]
from test_ranks import BATCHES, results
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{{folder}}/store", rank=rank, world_size=2)
found = results(BATCHES[rank::2], folder / "statistics")
(folder / f"{{rank}}.pickle").write_bytes(pickle.dumps(found))
dist.destroy_process_group()
os._exit(0)  # threads of gloo that still end would abort the interpreter's own end, on a busy machine
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> tuple[Path, list[dict]]:
    """What each of two processes found, and the folder with the statistics that they wrote."""
    folder = tmp_path_factory.mktemp("ranks")
    program = RANK.format(tests=str(Path(__file__).parent))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program]
    running = [
        subprocess.Popen([*command, str(rank), str(folder)], stderr=subprocess.PIPE, text=True, env=environment)
        for rank in (0, 1)
    ]
    try:
        errors = [rank.communicate(timeout=400)[1] for rank in running]
    finally:
        for rank in running:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in running] == [0, 0], errors
    return folder, [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("alone")
    return folder, results(BATCHES, folder / "statistics")


def same(one, two, tolerance: float) -> None:
    (state, variance, said), (other, variances, says) = one, two
    assert said == says
    torch.testing.assert_close(state, other, rtol=tolerance, atol=tolerance)
    assert variance.keys() == variances.keys() != set()
    before, after = (torch.tensor(list(v.values()), dtype=torch.float64) for v in (variance, variances))
    torch.testing.assert_close(before, after, rtol=tolerance, atol=0.0)


@pytest.mark.parametrize("name", MERGES)
def test_both_processes_end_with_the_same_network(ranks, name):
    _, (one, two) = ranks
    if name == "weights, distill":  # says how it did before and after
        assert "distilled" in one[name][2]
    same(one[name], two[name], 0.0)


@pytest.mark.parametrize("name", [n for n in MERGES if "distill" not in n])
def test_two_processes_find_what_one_does(ranks, alone, name):
    same(ranks[1][0][name], alone[1][name], 1e-10)


def test_the_statistics_of_two_processes_are_those_of_one(ranks, alone):
    found, expected = (fxmerge.Statistics.load(folder / "statistics") for folder in (ranks[0], alone[0]))
    assert found.batches == len(BATCHES)
    assert_same(found, expected, tolerance=1e-10)
    assert sorted(p.name for p in alone[0].iterdir()) == ["statistics"]
    assert not [p.name for p in ranks[0].iterdir() if p.name.startswith("statistics.")]


def test_an_error_of_one_process_is_raised_by_all(ranks, alone):
    assert [found["error"] for found in (*ranks[1], alone[1])] == ["two fails"] * 3


def test_draws_differ_by_what_they_are_for():
    values = [float(torch.rand((), generator=draw(*what))) for what in ((0, 1), (0, 2), (1, 1), (0, "1"), (0, 1))]
    assert len(set(values)) == 4
    assert values[0] == values[-1]
