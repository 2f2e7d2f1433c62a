"""Statistics without a merge: for jobs that share the data out."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxmerge.clock import Clock
from fxmerge.errors import InputError
from fxmerge.interfaces import AbstractDepthAligner, AbstractMatcher
from fxmerge.moments import Statistics
from fxmerge.plan import Depth, InputFn, Request, Target, prepare


def collect_statistics(
    *models: nn.Module,
    data: Iterable[Any],
    example_inputs: Any = None,
    matcher: AbstractMatcher | None = None,
    depth: Depth | AbstractDepthAligner = "grow",
    target: Target = None,
    input_fn: InputFn | None = None,
    verify: bool = True,
    strict: bool = False,
    path: str | Path | None = None,
    first_batch: int = 0,
    device: torch.device | str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> Statistics:
    """Streams batches through the networks and sums up their activations: the first half of ``merge``.

    Statistics of different batches add, so that jobs can share the data out and one of them merges. Arguments are those
    of ``merge``, and must be the same in all jobs and in the merge, but for these:

    Args:
        data: this job's batches.
        matcher: only says where activations are looked at.
        path: a file that keeps the statistics, also where collecting is interrupted: the ``statistics`` of ``merge``.
        first_batch: how many batches other jobs see before these. Places in feature maps are drawn by a batch's number,
            so the sum is then what one job would have found.

    Example:
        >>> half = fxmerge.collect_statistics(model_a, model_b, data=batches[:50], path="first.safetensors")
        >>> rest = fxmerge.Statistics.load("second.safetensors")  # of batches[50:], first_batch=50
        >>> fxmerge.merge(model_a, model_b, example_inputs=x, statistics=half + rest)
    """
    asked: dict[str, Any] = {"data": data, "example_inputs": example_inputs, "matcher": matcher, "input_fn": input_fn}
    how: dict[str, Any] = {
        "depth": depth,
        "target": target,
        "verify": verify,
        "strict": strict,
        "device": device,
        "seed": seed,
    }
    request = Request(models=models, statistics=path, first_batch=first_batch, progress=progress, **asked, **how)
    prepared = prepare(request, Clock())
    if prepared.problem.statistics is None:
        raise InputError(f"{prepared.matcher} does not look at activations: there is nothing to collect for it")
    return prepared.problem.statistics
