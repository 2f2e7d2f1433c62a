"""Example inputs, where nobody gave any: from the layers that read the input, if they leave no doubt."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxmerge.errors import InputError, few
from fxmerge.running import described, run_eager
from fxmerge.symbolic import symbolic

_SIZES = (32, 8, 16, 28, 64, 96, 128, 224, 256, 299)
_KEEPING = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.ZeroPad2d)
_KEEPING_TARGETS = {operator.add, operator.sub, operator.mul, operator.truediv, "contiguous", "float", "to"}
_RESHAPING_TARGETS = {torch.flatten, torch.reshape, "flatten", "reshape", "view"}
_ATTRIBUTES = {"shape", "ndim", "dtype", "device"}


def infer_example_inputs(module: nn.Module) -> tuple[Tensor, str]:
    """Example inputs that leave no doubt, from the layers that read the input, and a sentence that says which.

    A Linear gives float [2, in_features], an Embedding int64 [2, 8], a convolution [2, in_channels, S, ..] where S is
    32 if the module runs on that and else the smallest of a list of usual sizes on which it runs.

    Raises:
        InputError: forward needs several arguments, or its input is read by something else, or no size runs.
    """
    remedy = f"give example_inputs= (a tensor, a tuple or a dict) to trace {type(module).__name__}"
    parameters = list(inspect.signature(module.forward).parameters.values())
    named = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)]
    required = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    if len(required) != 1 or required[0] not in [p.name for p in named[:1]]:
        raise InputError(f"cannot infer inputs for forward({', '.join(required)}): {remedy}")
    graph_module, _ = symbolic(module, (torch.empty(0),), {})
    readers = dict(_readers(graph_module, next(iter(graph_module.graph.nodes))))
    wanted = {_wanted(layer) for layer in readers.values()}
    if len(wanted) != 1 or None in wanted:
        raise InputError(f"cannot infer the input's shape from what reads it ({few([*readers])}): {remedy}")
    name, layer = next(iter(readers.items()))
    (text, shapes, rows), weight = _wanted(layer) or ("", (), 0), layer.weight
    reader = f"{name!r} ({type(layer).__name__} with {text})"
    for shape in shapes:
        generator = torch.Generator().manual_seed(0)  # a private one: the global state is the user's
        if rows:
            example = torch.randint(rows, shape, generator=generator).to(weight.device)
        else:
            example = torch.randn(shape, generator=generator).to(weight)
        try:
            run_eager(module, (example,), {})
        except InputError:
            continue
        return example, f"example inputs inferred from {reader}: {described(example)}"
    raise InputError(f"none of the usual input sizes runs behind {reader}: {remedy}")


def _readers(graph_module: fx.GraphModule, node: fx.Node, reshaped: bool = False) -> Iterator[tuple[str, Any]]:
    """The layers that read ``node`` as it is, by name; a reader that leaves doubt comes without its layer."""
    for user in node.users:
        layer = graph_module.get_submodule(str(user.target)) if user.op == "call_module" else None
        if isinstance(layer, _KEEPING) or (user.target in _KEEPING_TARGETS and user.all_input_nodes == [node]):
            yield from _readers(graph_module, user, reshaped)
        elif isinstance(layer, nn.Flatten) or user.target in _RESHAPING_TARGETS:
            yield from _readers(graph_module, user, True)
        elif not (user.target in ("size", "dim") or (user.target is getattr and user.args[1] in _ATTRIBUTES)):
            # Only a Linear reads [2, n] whatever the reshape before it made of larger inputs.
            yield str(user.target), layer if isinstance(layer, nn.Linear) or not reshaped else None


def _wanted(layer: nn.Module | None) -> tuple[str, tuple[tuple[int, ...], ...], int] | None:
    """What a first layer reads: in words, the shapes to try, and the number of rows if it reads indices."""
    if isinstance(layer, nn.Linear):
        return f"{layer.in_features} input features", ((2, layer.in_features),), 0
    if isinstance(layer, nn.Embedding):
        return f"{layer.num_embeddings} rows", ((2, 8),), layer.num_embeddings
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        axes = layer.weight.ndim - 2
        sizes = [s for s in _SIZES if s**axes <= 2**21]  # a 3-D input of 224 would not be worth its memory
        return f"{layer.in_channels} input channels", tuple((2, layer.in_channels, *[s] * axes) for s in sizes), 0
    return None
