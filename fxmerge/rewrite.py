"""From a plan to a network: a fresh graph module with merged parameters.

A.graph, {A, B, ..}.parameters, couplings  -->  the same graph over parameters of the fused widths
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import Tensor, fx, nn

from fxmerge.ir import Traced
from fxmerge.symmetry import full_state, load_state


def rewrite(traced: Traced, state: Mapping[str, Tensor]) -> fx.GraphModule:
    """A new module that runs ``traced``'s graph on ``state``.

    Nothing is shared with the parent. The state dict has exactly the parent's keys, in its order: modules that the
    graph does not call (auxiliary heads) come along.
    """
    source = copy.deepcopy(traced.source)
    module = fx.GraphModule(source, copy.deepcopy(traced.graph_module.graph), class_name=type(source).__name__)
    for name, value in full_state(traced.graph_module).items():  # constants that tracing itself made
        if name not in full_state(module):
            _attach(module, name, value)
    _complete(module, source)
    load_state(module, state)
    modes = {name: m.training for name, m in traced.source.named_modules()}
    for name, m in module.named_modules():
        m.training = modes.get(name, traced.source.training)
    return module


def _complete(module: nn.Module, source: nn.Module) -> None:
    """Adds what ``source`` has and the graph left out, keeping the order of keys."""
    for name, child in source.named_children():
        if name in module._modules:
            if type(module._modules[name]) is nn.Module:  # a shell that holds the parts in use
                _complete(module._modules[name], child)  # type: ignore[arg-type]
        else:
            module._modules[name] = child
    for kind in ("_parameters", "_buffers"):
        for name, value in getattr(source, kind).items():
            getattr(module, kind).setdefault(name, value)
    module._non_persistent_buffers_set |= source._non_persistent_buffers_set
    for kind in ("_modules", "_parameters", "_buffers"):
        own, wanted = getattr(module, kind), getattr(source, kind)
        for name in [*wanted, *(n for n in list(own) if n not in wanted)]:
            own[name] = own.pop(name)


def _attach(module: nn.Module, name: str, value: Tensor) -> None:
    *path, leaf = name.split(".")
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module._modules[part]  # type: ignore[assignment]
    module.register_buffer(leaf, value.clone(), persistent=False)
