"""One merge on several processes, as ``torchrun`` starts them: what they share and how they agree.

Every process runs the same program, on batches of its own: ``data[rank::world]``. Sums over batches are joined, solves
are spread, and all processes end with the same network. Where ``torch.distributed`` is not initialised, there is one
process and nothing here does anything.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

T = TypeVar("T")
R = TypeVar("R")


def place() -> tuple[int, int]:
    """The number of this process, and how many there are."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def ordinal(batch: int) -> int:
    """The number of this process's batch among those of all processes."""
    rank, world = place()
    return batch * world + rank


def draw(seed: int, *what: int | str) -> torch.Generator:
    """A generator for one draw, the same on whichever process and after whatever other draws it is made."""
    digest = hashlib.sha256(repr((seed, *what)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def summed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Every tensor summed over the processes: one all_reduce for each dtype."""
    return _together(tensors, dist.all_reduce)


def averaged(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Every tensor's mean over the processes."""
    world = place()[1]
    return list(tensors) if world == 1 else [t / world for t in summed(tensors)]


def from_first(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Every tensor as the first process has it: one broadcast for each dtype."""
    return _together(tensors, lambda flat: dist.broadcast(flat, 0))


def summed_numbers(numbers: Sequence[float]) -> list[float]:
    """Numbers summed over the processes."""
    return summed([torch.tensor(numbers, dtype=torch.float64)])[0].tolist() if place()[1] > 1 else list(numbers)


def spread(
    function: Callable[[T], R],
    items: Sequence[T],
    cost: Callable[[T], float] = lambda item: 1.0,
    threads: int = 1,
    device: torch.device | None = None,
) -> list[R]:
    """``[function(i) for i in items]``, each process doing its share, in threads; an error of one is raised by all.

    ``device``: where the threads work, which they are told before they start.
    """
    rank, world = place()
    order = sorted(range(len(items)), key=lambda i: -cost(items[i]))  # the longest first, dealt out in turn
    mine = order[rank::world]
    done: list[R] = []
    failed: Exception | None = None
    try:
        given = [items[i] for i in mine]
        if min(threads, len(given)) <= 1:
            done = [function(i) for i in given]
        else:
            with ThreadPoolExecutor(threads, initializer=partial(_work_on, device)) as pool:
                done = list(pool.map(function, given))
    except Exception as error:
        if world == 1:
            raise
        failed = error
    shares = [(mine, done, failed)]
    if world > 1:
        shares *= world
        dist.all_gather_object(shares, (mine, done, failed))
    errors = [e for _, _, e in shares if e is not None]
    if errors:
        raise failed or errors[0]
    found = {i: r for numbers, results, _ in shares for i, r in zip(numbers, results, strict=True)}
    return [found[i] for i in range(len(items))]


def _work_on(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.set_device(device)


def _together(tensors: Sequence[Tensor], collective: Callable[[Tensor], object]) -> list[Tensor]:
    if place()[1] == 1:
        return list(tensors)
    out = list(tensors)
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        which = [i for i, t in enumerate(tensors) if t.dtype == dtype]
        parts = [tensors[i].detach() for i in which]
        flat = torch.cat([t.reshape(-1).to(_carrier(t.device)) for t in parts])
        collective(flat)
        for i, t, part in zip(which, parts, flat.split([t.numel() for t in parts]), strict=True):
            out[i] = part.reshape(t.shape).to(t.device)
    return out


def _carrier(device: torch.device) -> torch.device:
    """Where the processes' backend takes a tensor from, as near to its own device as may be."""
    served = {pair.split(":")[0] for pair in dist.get_backend_config().split(",")}
    if device.type in served:
        return device
    return torch.device("cpu" if "cpu" in served else "cuda")
