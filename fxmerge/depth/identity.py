"""Units made to pass on what they read, and seen to do so.

residual   the last parameters of its branches are zero; all others keep their values, and so can learn
plain      identity matrices and kernels, which the activation behind them has to leave as they are
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import is_parametrized

from fxmerge.depth.tensors import body, tensors_of
from fxmerge.errors import NoIdentityError
from fxmerge.interfaces import Sample
from fxmerge.ir import Traced
from fxmerge.running import bind, evaluating, fresh
from fxmerge.units import Unit

_BATCHES = 8  # of data, to tell what a BatchNorm has to leave as it is


def make_identity(traced: Traced, unit: Unit, sample: Sample | None) -> set[str]:
    """Sets the unit's parameters so that it passes on what it reads; names of those that then say nothing.

    Raises:
        NoIdentityError: that is not possible, and why.
    """
    if unit.kind == "concat":
        return set(tensors_of(traced, unit))
    inputs: list[tuple[Any, Any]] = [(fresh(traced.args), fresh(dict(traced.kwargs)))]
    module = traced.graph_module
    with evaluating(module):
        if unit.kind == "plain" and sample is not None and undone(module, unit):
            inputs = [sample.feed(b) for b, _ in zip(sample.batches, range(_BATCHES), strict=False)]
        region = _Region(traced, unit, inputs)
    with torch.no_grad():
        return _silence(region, traced, unit) if unit.kind == "residual" else _pass_on(region, unit)


class _Region:
    """A unit on the values that it meets in the network."""

    def __init__(self, traced: Traced, unit: Unit, inputs: Sequence[tuple[Any, Any]]) -> None:
        self.module = traced.graph_module
        self.nodes = body(self.module.graph, unit)
        self.source = next(n for n in self.module.graph.nodes if n.name == unit.source)
        self.output = self.nodes[-1]
        outside = {m for n in self.nodes for m in n.all_input_nodes if m not in self.nodes} | {self.source}
        self.given: list[dict[fx.Node, Any]] = []
        for args, kwargs in inputs:
            self.given.append(_until(self.module, outside, bind(self.module.graph, args, kwargs)))

    def change(self, number: int = 0) -> Tensor:
        """What the unit adds to its input."""
        values = self.run(number)
        return values[self.output] - self.given[number][self.source]

    def run(self, number: int = 0) -> dict[fx.Node, Any]:
        interpreter = fx.Interpreter(self.module, garbage_collect_values=False)
        interpreter.env = {n: fresh(v) for n, v in self.given[number].items()}
        for n in self.nodes:
            interpreter.env[n] = interpreter.run_node(n)
        return interpreter.env


def _until(module: fx.GraphModule, wanted: set[fx.Node], inputs: Sequence[Any]) -> dict[fx.Node, Any]:
    """Runs until all wanted values are there."""
    interpreter = fx.Interpreter(module)
    interpreter.env = dict(zip(module.graph.find_nodes(op="placeholder"), inputs, strict=True))
    found: dict[fx.Node, Any] = {}
    for n in module.graph.nodes:
        if n.op != "placeholder":
            interpreter.env[n] = interpreter.run_node(n)
        if n in wanted:
            found[n] = fresh(interpreter.env[n])
        if len(found) == len(wanted):
            break
        for used in interpreter.user_to_last_uses.get(n, ()):
            interpreter.env.pop(used, None)
    return found


def _silence(region: _Region, traced: Traced, unit: Unit) -> set[str]:
    """Zero where a residual branch ends; all else stays as it is."""
    state = dict(region.module.named_parameters())
    own = [n for n in tensors_of(traced, unit) if n in state]
    kept = {n: state[n].detach().clone() for n in own}

    def quiet() -> bool:
        with evaluating(region.module):
            return not bool(region.change().count_nonzero())

    for n in own:
        state[n].zero_()
    if not quiet():
        for n in own:
            state[n].copy_(kept[n])
        why = f"even with all its {len(own)} parameters at zero" if own else "without parameters of its own"
        raise NoIdentityError(
            f"'{unit.name}' cannot be an identity: {why} it changes what it reads (by a norm, an activation, a "
            "factor). Use depth='shrink'",
            unit.output,
        )
    closing: list[str] = []
    for n in own:  # in the order of use, so that what stays zero is the end of a branch
        state[n].copy_(kept[n])
        if not quiet():
            state[n].zero_()
            closing.append(n)
    return set(tensors_of(traced, unit)) - set(closing)


def _pass_on(region: _Region, unit: Unit) -> set[str]:
    """Identity matrices and kernels; norms that undo themselves on the values they meet."""
    module = region.module
    for node in region.nodes:
        layer = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        norm = isinstance(layer, _BatchNorm)
        if layer is None or not (norm or list(layer.parameters())):
            continue
        if norm and layer.affine and layer.running_mean is not None:
            with evaluating(module):
                read: Any = node.args[0]
                values = [region.run(k)[read].transpose(0, 1).flatten(1) for k in range(len(region.given))]
            _undo(layer, torch.cat(values, 1).double())
        elif is_parametrized(layer) or not _identity_layer(layer):
            raise NoIdentityError(
                f"'{unit.name}' cannot be an identity: there is none for {layer} at '{node.target}'. Use "
                "depth='shrink'",
                unit.output,
            )
    with evaluating(module):
        change, scale = region.change(), region.given[0][region.source].abs().max().clamp_min(1e-30)
    tolerance = 1e-5 if undone(module, unit) else 0.0
    if not bool(change.abs().max() <= tolerance * scale):
        behind = [
            str(n.target) if n.op == "call_module" else getattr(n.target, "__name__", n.name) for n in region.nodes
        ]
        raise NoIdentityError(
            f"'{unit.name}' cannot be an identity: it changes what it passes on by "
            f"{float(change.abs().max() / scale):.1e} ({' -> '.join(behind)}): what follows its layer must leave alone "
            "what it has made, as a ReLU does. Use depth='shrink'",
            unit.output,
        )
    return set()


def _undo(norm: Any, x: Tensor) -> None:
    """Statistics of these values [channels, rows], with a scale and a shift that take them back."""
    variance, mean = torch.var_mean(x, 1, correction=0)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance.clamp_min(1e-12))
    norm.weight.copy_((norm.running_var.double() + norm.eps).sqrt())
    norm.bias.copy_(norm.running_mean)


def _identity_layer(layer: nn.Module) -> bool:
    weight = getattr(layer, "weight", None)
    if isinstance(layer, nn.Linear) and layer.in_features == layer.out_features:
        layer.weight.copy_(torch.eye(layer.in_features))
    elif (
        isinstance(layer, _ConvNd)
        and not isinstance(layer, _ConvTransposeNd)
        and layer.in_channels == layer.out_channels
    ):
        at = []
        for pad, gap, size in zip(
            layer._reversed_padding_repeated_twice[::-1][1::2], layer.dilation, layer.kernel_size, strict=True
        ):
            if pad % gap or pad // gap >= size:
                return False
            at.append(pad // gap)
        weight = layer.weight.zero_()
        for row in range(len(weight)):
            weight[row, row % weight.shape[1]][tuple(at)] = 1
    else:
        return False
    if layer.bias is not None:
        layer.bias.zero_()
    return True


def undone(module: fx.GraphModule, unit: Unit) -> bool:
    """Whether the unit holds a BatchNorm, which passes on values only up to rounding."""
    calls = [n for n in body(module.graph, unit) if n.op == "call_module"]
    return any(isinstance(module.get_submodule(str(n.target)), _BatchNorm) for n in calls)
