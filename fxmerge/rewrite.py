"""From a plan to a network: a fresh graph module with merged parameters.

A.graph, {A, B, ..}.parameters, couplings  -->  the same graph over parameters of the fused widths
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from fxmerge.ir import AxisClasses, Site
from fxmerge.layout import shapes
from fxmerge.literals import adapt
from fxmerge.running import full_state
from fxmerge.stored import Stored
from fxmerge.symmetry import load_state

_WIDTHS: dict[type[nn.Module], Mapping[str, Callable[[Any], Any]]] = {
    nn.Linear: {"in_features": lambda m: m.weight.shape[1], "out_features": lambda m: m.weight.shape[0]},
    _ConvTransposeNd: {
        "in_channels": lambda m: m.weight.shape[0],
        "out_channels": lambda m: m.weight.shape[1] * m.groups,
    },
    _ConvNd: {"in_channels": lambda m: m.weight.shape[1] * m.groups, "out_channels": lambda m: m.weight.shape[0]},
    _NormBase: {"num_features": lambda m: next(iter(m.state_dict().values())).shape[0]},
    nn.GroupNorm: {"num_channels": lambda m: m.weight.shape[0]},
    nn.LayerNorm: {"normalized_shape": lambda m: tuple(m.weight.shape)},
    nn.RMSNorm: {"normalized_shape": lambda m: tuple(m.weight.shape)},
    nn.Embedding: {"embedding_dim": lambda m: m.weight.shape[1]},
    nn.PReLU: {"num_parameters": lambda m: m.weight.shape[0]},
}
"""What a layer says of its own widths, read off its tensors; the first type that fits counts."""


def rewrite(classes: AxisClasses, state: Mapping[str, Tensor], fused: AxisClasses) -> fx.GraphModule:
    """A new module that runs the graph of ``classes.traced`` on ``state``.

    Nothing is shared with the parent. The state dict has exactly the parent's keys, in its order: modules that the
    graph does not call (auxiliary heads) come along. Tensors may have other widths than the parent's; ``fused`` then
    says where their neurons are.
    """
    traced = classes.traced
    source = copy.deepcopy(traced.source)
    held = full_state(source).keys()
    for name, value in full_state(traced.graph_module).items():  # constants that tracing itself made
        if name not in held:
            _attach(source, name, value)
    module = fx.GraphModule(source, copy.deepcopy(traced.graph_module.graph), class_name=type(source).__name__)
    _complete(module, source)
    resize(module, state, {site for c in fused for site in c.sites})
    adapt(module, classes, fused)
    load_state(module, state)
    modes = {name: m.training for name, m in traced.source.named_modules()}
    for name, m in module.named_modules():
        m.training = modes.get(name, traced.source.training)
    return module


def resize(module: nn.Module, state: Mapping[str, Tensor], sites: set[Site]) -> None:
    """Gives parameters and buffers the shapes that they have in ``state``, and layers the widths to match."""
    groups = {site.parameter: site.groups for site in sites if site.groups > 1}
    made: dict[int, Any] = {}
    for prefix, layer in module.named_modules():
        changed = False
        for held in (layer._parameters, layer._buffers):
            for name, old in list(held.items()):
                key = f"{prefix}.{name}" if prefix else name
                value = state.get(key)
                if old is None or value is None or (old.shape == value.shape and not isinstance(value, Stored)):
                    continue
                if id(old) not in made:
                    new: Any = value
                    if not isinstance(value, Stored):
                        new = torch.empty_like(value, dtype=old.dtype, device=old.device)
                        new = nn.Parameter(new, old.requires_grad) if held is layer._parameters else new
                    made[id(old)] = new
                changed |= old.shape != value.shape
                setattr(layer, name, made[id(old)])  # not into the table: recurrent layers keep a list besides
                if hasattr(layer, "groups") and key in groups:
                    layer.groups = groups[key]  # type: ignore[assignment]
        widths = next((w for t, w in _WIDTHS.items() if isinstance(layer, t)), {}) if changed else {}
        for name, read in widths.items():
            setattr(layer, name, read(layer))


def made_when_asked(made: Mapping[str, Tensor], classes: AxisClasses, fused: AxisClasses) -> dict[str, Tensor]:
    """A state for ``rewrite`` in which the parameters stay on disk, to be made of what the parents' hold there."""
    held = full_state(classes.traced.graph_module) | full_state(classes.traced.source)
    sizes = shapes(fused, held)
    stored: dict[int, Tensor] = {}
    state = {}
    for name, old in held.items():
        if not isinstance(old, nn.Parameter):
            state[name] = made[name]
            continue
        if id(old) not in stored:
            like = torch.empty(sizes[name], dtype=old.dtype, device="meta")
            stored[id(old)] = Stored(partial(_whole, made, name), like, old.requires_grad)
        state[name] = stored[id(old)]
    return state


def _whole(made: Mapping[str, Tensor], name: str) -> Tensor:
    return made[name].contiguous()


def _complete(module: nn.Module, source: nn.Module) -> None:
    """Adds what ``source`` has and the graph left out, keeping the order of keys."""
    for name, child in source._modules.items():  # not named_children, which leaves out second names
        if child is not None and name in module._modules:
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
    vars(module).pop(leaf, None)  # a plain attribute
    module.register_buffer(leaf, value.clone(), persistent=False)
