"""Batches: something that can be read more than once, and how one is fed to a network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fxmerge.errors import InputError
from fxmerge.ir import Traced
from fxmerge.running import as_call, call, evaluating, fitting, to_device


def reusable(data: Iterable[Any]) -> Iterable[Any]:
    """Something that can be read more than once."""
    if isinstance(data, Tensor):
        raise InputError("data must be an iterable of batches; a single tensor is one batch: pass data=[tensor]")
    try:
        again = iter(data)
    except TypeError:
        raise InputError(f"data must be an iterable of batches, got {type(data).__name__}") from None
    return list(again) if again is data else data


def feeder(
    traced: Traced, input_fn: Callable[[Any], Any] | None, device: torch.device
) -> Callable[[Any], tuple[tuple[Any, ...], dict[str, Any]]]:
    count = len(traced.args)

    def feed(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if input_fn is not None:
            batch = input_fn(batch)
        elif isinstance(batch, Mapping) and traced.kwargs and set(traced.kwargs) <= set(batch):
            batch = {k: batch[k] for k in traced.kwargs}
        elif isinstance(batch, (list, tuple)) and count:
            batch = tuple(batch[:count])
        args, kwargs = as_call(batch)
        return to_device(args, device), to_device(kwargs, device)

    return feed


def try_batch(batches: Iterable[Any], feed: Callable[[Any], Any], traced: Sequence[Traced]) -> Any:
    """The first batch must run through every parent, before anything long starts: (args, kwargs), what they are fed."""
    first = next(iter(batches), None)
    if first is None:
        raise InputError("the data is empty: no batch came out of it. Pass a loader with at least one batch")
    with fitting(0):
        args, kwargs = feed(first)
        for t in traced:
            with evaluating(t.graph_module):
                call(t.graph_module, args, kwargs)
    return args, kwargs
