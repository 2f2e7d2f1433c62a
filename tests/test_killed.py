"""Killed at any moment, a merge leaves no folder or a whole one, and what else it leaves has a name to know it by."""

from __future__ import annotations

import os
import random
import re
import select
import shutil
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

import fxmerge
from fxmerge import folder as folders
from fxmerge.fingerprint import digest_of_tensors

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a process that has torch loaded")
LEFTOVER = re.compile(r"\.out\.[0-9a-f]{8}\.partial")
INPUT = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))


class Network(nn.Module):
    """Small to merge; its many idle tensors are long to save."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        self.extra = nn.ParameterList(torch.randn(30) for _ in range(150))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Network().eval()


def merge_and_save(place: Path, starts_saving: Callable[[], object]) -> None:
    result = fxmerge.merge(network(0), network(1), example_inputs=INPUT, progress=False)
    starts_saving()
    result.save(place, shard_size=600)


class Death(NamedTuple):
    """How the process ended, and when saving started and ended, in seconds after the start."""

    killed: bool
    saving: float | None
    end: float


def run(place: Path, kill: Callable[[int, int], None], begin: Callable[[], None] = lambda: None) -> Death:
    """``merge_and_save`` in a process of its own; ``kill`` gets its id and a pipe that tells when it starts to save."""
    reads, writes = os.pipe()
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads: the child starts its own
        child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reads)
            torch.set_num_threads(1)
            begin()
            merge_and_save(place, lambda: os.write(writes, str(time.perf_counter() - start).encode()))
            code = 0
        finally:
            os._exit(code)
    os.close(writes)
    kill(child, reads)
    _, status = os.waitpid(child, 0)
    end = time.perf_counter() - start
    said = os.read(reads, 100)
    os.close(reads)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return Death(os.WIFSIGNALED(status), float(said) if said else None, end)


def after(seconds: float, saving: bool) -> Callable[[int, int], None]:
    """Kills so long after the start, or after the process says that it starts to save."""

    def kill(child: int, pipe: int) -> None:
        if saving:
            select.select([pipe], [], [], 60)
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)

    return kill


def slowly() -> None:
    """Every step to the disk takes ten milliseconds more."""
    step = os.fsync
    folders.os.fsync = lambda handle: (time.sleep(0.01), step(handle))


def look(place: Path, whole: str) -> bool:
    """Whether the folder is there; then it is whole. Takes it away."""
    rest = {p.name for p in place.parent.iterdir()} - {place.name}
    assert all(LEFTOVER.fullmatch(name) for name in rest), rest
    assert len(rest) <= 1  # each run removes what the one before it left
    if not place.exists():
        return False
    assert digest_of_tensors(fxmerge.load(place).state_dict()) == whole
    shutil.rmtree(place)
    return True


def test_at_random_moments(tmp_path) -> None:
    place = tmp_path / "out"
    merge_and_save(place, lambda: None)
    whole = digest_of_tensors(fxmerge.load(place).state_dict())
    shutil.rmtree(place)
    free = run(place, lambda child, pipe: None, slowly)
    assert not free.killed
    assert free.saving is not None
    assert look(place, whole)
    draw = random.Random(0)
    moments = [(draw.uniform(0, free.saving), False) for _ in range(6)]
    moments += [(draw.uniform(0, 0.9 * (free.end - free.saving)), True) for _ in range(14)]
    draw.shuffle(moments)
    deaths = [(run(place, after(*moment), slowly), look(place, whole)) for moment in moments]
    assert sum(death.killed for death, _ in deaths) >= 10  # the others were done before their time
    assert all(there for death, there in deaths if not death.killed)
    assert not any(there for death, there in deaths if death.killed and death.saving is None)
    merge_and_save(place, lambda: None)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("which", [1, 2, 20, -2, -1])
def test_at_each_step_of_reaching_the_disk(which, tmp_path, monkeypatch) -> None:
    place, calls = tmp_path / "out", []
    with monkeypatch.context() as patch:
        patch.setattr(folders.os, "fsync", calls.append)
        merge_and_save(place, lambda: None)
    whole = digest_of_tensors(fxmerge.load(place).state_dict())
    shutil.rmtree(place)
    number = which if which > 0 else len(calls) + 1 + which

    def begin() -> None:
        left = iter(range(number - 1))

        def fsync(handle: int) -> None:
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        folders.os.fsync = fsync

    assert run(place, lambda child, pipe: None, begin).killed
    left = [p.name for p in tmp_path.iterdir()]
    assert len(left) == 1  # the folder, or what is to become it
    assert look(place, whole) == (which == -1)  # the last step comes after the renaming
    assert bool(LEFTOVER.fullmatch(left[0])) == (which != -1)
    merge_and_save(place, lambda: None)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
