"""How large a network is, and what one run of it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxmerge.running import device_of, evaluating, fresh, to_device


@dataclass(frozen=True)
class Size:
    """Of one network.

    Attributes:
        parameters: how many numbers can be trained; tied ones count once.
        bytes: of parameters and buffers.
        flops: of one run on the example inputs, a multiplication and an addition counting as two; matrix products,
            convolutions and attention alone. None where the run cannot be counted.
    """

    parameters: int
    bytes: int
    flops: int | None


def sizes(modules: Sequence[nn.Module], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Size, ...]:
    """Sizes of networks of one family, which cost the same where their tensors have the same shapes.

    Args:
        modules: the networks, each on a device of its own; left as found.
        args, kwargs: example inputs.
    """
    known: dict[tuple[tuple[int, ...], ...], int | None] = {}
    found = []
    for module in modules:
        tensors = (*module.parameters(), *module.buffers())
        shapes = tuple(tuple(t.shape) for t in tensors)
        if shapes not in known:
            inputs = to_device((args, dict(kwargs)), device_of(module))
            known[shapes] = _flops(module, *inputs)
        parameters = sum(p.numel() for p in module.parameters())
        found.append(Size(parameters, sum(t.nbytes for t in tensors), known[shapes]))
    return tuple(found)


def _flops(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """Counted on a run, without the fused kernels for attention and recurrent layers, which the counter cannot see."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    backend: Any = torch.backends.mkldnn
    fast, enabled = torch.backends.mha.get_fastpath_enabled(), backend.enabled
    torch.backends.mha.set_fastpath_enabled(False)
    if any(isinstance(m, nn.RNNBase) for m in module.modules()):
        backend.enabled = False
    try:
        with evaluating(module), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            module(*fresh(args), **fresh(dict(kwargs)))
    except Exception:  # a layer of someone else's that does not run under the counter: the merge is none the worse
        return None
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        backend.enabled = enabled
    return int(counter.get_total_flops())
