"""Adjacent units of a deeper network joined into one.

    plain      x -> act(W2 act(W1 x))         becomes   x -> act(W x),      W z fitted to W2 act(W1 x)
    residual   x -> x + f(x) -> .. + g(..)    becomes   x -> x + g'(x),     g' fitted to all that was added

Fitted by ridge regression on the data (one pass per pair of networks, sums of products only). Without data residual
units are dropped, since each adds little, and plain ones cannot be joined.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxmerge.alike import contributing
from fxmerge.classes import infer_classes
from fxmerge.depth.grow import fitted
from fxmerge.depth.tensors import body, run_shapes
from fxmerge.errors import StructureError
from fxmerge.interfaces import Sample
from fxmerge.ir import AxisClasses
from fxmerge.ranks import draw, ordinal, summed, summed_numbers
from fxmerge.regression import LAYERS, Sums, patches, refit, set_statistics
from fxmerge.rewrite import resize, rewrite
from fxmerge.running import evaluating, fitting
from fxmerge.stats import listen
from fxmerge.symmetry import full_state, load_state
from fxmerge.units import Unit

_ROWS = 256  # per sample, for a layer that is fitted


def shrink(
    parent: AxisClasses,
    groups: Sequence[tuple[tuple[Unit, ...], int]],
    sample: Sample | None,
    join: str = "ridge",
    ridge: float = 1e-3,
) -> AxisClasses:
    """The network with every group of adjacent units as one.

    Args:
        parent: the network; left as it is.
        groups: units, and which of them gives the layers (of plain units always the last; -1: none, all are left out).
        sample: data to fit them on.
        join: how plain units become one: "ridge", or a rule of signs, see ``CLAFusion``.
        ridge: relative to the mean square of a layer's inputs.

    Raises:
        StructureError: plain units without data, or units that are concatenated.
    """
    module = rewrite(parent, full_state(parent.traced.graph_module), parent)
    for units, kept in groups:
        kind = units[0].kind
        whole = f"joining '{units[0].name}' .. '{units[-1].name}'"
        if kind == "concat":
            raise StructureError(f"{whole} is not possible for layers whose outputs are concatenated; use depth='grow'")
        if kind == "plain" and kept < 0:
            raise StructureError(f"there is no unit in a stage to join '{units[0].name}' with; use depth='grow'")
        if kind == "plain" and sample is None:
            raise StructureError(f"{whole} into one needs data=; use depth='grow'")
        _join(module, parent, units, kept if kind == "residual" else len(units) - 1, sample, join, ridge)
    shrunk = replace(parent.traced, graph_module=module, source=module, notes=())
    return infer_classes(replace(shrunk, shapes=run_shapes(module, shrunk)))


def _join(
    module: fx.GraphModule,
    parent: AxisClasses,
    units: Sequence[Unit],
    kept: int,
    sample: Sample | None,
    join: str,
    ridge: float,
) -> None:
    nodes = {n.name: n for n in module.graph.nodes}
    start, one = nodes[units[0].source], units[kept] if kept >= 0 else None
    layer, norm, added = _last_layer(module, nodes, one) if one else (None, None, None)
    spare = [(u, body(module.graph, u)) for u in reversed(units) if u is not one]
    read, gone = contributing(module.graph), {n for _, inside in spare for n in inside}
    for n in module.graph.nodes:
        if n not in read and any(m in gone for m in n.all_input_nodes):
            gone.add(n)
    for n in reversed(module.graph.nodes):
        if n in gone and n not in read:  # an assertion about what goes
            module.graph.erase_node(n)
    spare = [(u, [n for n in inside if n in read]) for u, inside in spare]
    for unit, _ in spare:
        nodes[unit.output].replace_all_uses_with(nodes[unit.source])
    for _, inside in spare:
        for n in reversed(inside):
            module.graph.erase_node(n)
    module.recompile()
    if one is None:
        return
    if one.kind == "plain":
        _read(module, parent, layer, nodes[units[-1].source].name, start.name)
    if layer is None or sample is None or type(module.get_submodule(str(layer.target))) not in LAYERS:
        return
    if one.kind == "plain" and join != "ridge":
        _by_signs(module, parent, units, layer, sample, join)
    else:
        base = None if added is None else str(added[0].args[added[1]])
        _fit(module, parent, units, one, layer, norm, base, sample, ridge)


@torch.no_grad()
def _by_signs(
    module: fx.GraphModule, parent: AxisClasses, units: Sequence[Unit], node: fx.Node, sample: Sample, rule: str
) -> None:
    """W2 diag(g) W1 for every two of the layers, with g from the signs of what the first one gives in the parent."""
    original = parent.traced.graph_module
    known = {n.name: n for n in original.graph.nodes}
    names = [u.nodes[0] for u in units]
    layers = [original.get_submodule(str(known[n].target)) if known[n].op == "call_module" else None for n in names]
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    if len(linear) < len(layers) or any(_normed(original, u) for n in names for u in known[n].users):
        raise StructureError(
            f"join='{rule}' is for linear layers without norms, and '{units[0].name}' .. '{units[-1].name}' are "
            "others. Use join='ridge'"
        )
    total: dict[str, Any] = dict.fromkeys(names[:-1], 0.0)
    positive: dict[str, Any] = dict.fromkeys(names[:-1], 0.0)
    rows = 0.0
    for number, batch in enumerate(sample.batches):
        with fitting(number), evaluating(original):
            args, kwargs = sample.feed(batch)
            heard = listen(original, set(names[:-1]), args, kwargs)
        flat = {n: v.flatten(0, -2) for n, v in heard.items()}
        rows += len(flat[names[0]])
        for n, v in flat.items():
            total[n] = total[n] + v.double().sum(0)
            positive[n] = positive[n] + (v > 0).double().sum(0)
    (rows,), joined = summed_numbers([rows]), summed([*total.values(), *positive.values()])
    total, positive = dict(zip(total, joined, strict=False)), dict(zip(positive, joined[len(total) :], strict=True))
    weight, bias = (None if t is None else t.double() for t in (linear[0].weight, linear[0].bias))
    assert weight is not None
    for n, layer in zip(names[:-1], linear[1:], strict=True):
        share = positive[n] / max(rows, 1)
        g = {"sum": (total[n] >= 0).double(), "majority": (share >= 0.5).double(), "fraction": share}[rule]
        weight = layer.weight.double() @ (g[:, None] * weight)
        bias = None if bias is None else layer.weight.double() @ (g * bias)
        bias = layer.bias.double() + (0 if bias is None else bias) if layer.bias is not None else bias
    kept: Any = module.get_submodule(str(node.target))
    kept.weight.copy_(weight)
    if kept.bias is not None and bias is not None:
        kept.bias.copy_(bias)


def _last_layer(
    module: fx.GraphModule, nodes: dict[str, fx.Node], unit: Unit
) -> tuple[fx.Node | None, fx.Node | None, tuple[fx.Node, int] | None]:
    """The layer, and the BatchNorm behind it, that end the unit before its activation or sum; the sum, and which of its
    arguments that is added to.
    """
    if unit.kind == "plain":
        first = nodes[unit.nodes[0]]
        follower = next(iter(first.users)) if len(first.users) == 1 else None
        return first, follower if _normed(module, follower) else None, None
    inside = set(unit.nodes)
    end = nodes[unit.output]
    while end.op != "output" and _added(end, nodes[unit.source], inside) is None:
        before = [n for n in end.all_input_nodes if n.name in inside]
        if len(before) != 1:
            return None, None, None
        end = before[0]
    at = _added(end, nodes[unit.source], inside)
    added = next(((end, i) for i, a in enumerate(end.args) if isinstance(a, fx.Node) and a is not at), None)
    while at is not None and at.op == "call_module" and _drops(module.get_submodule(str(at.target))):
        at = at.args[0]  # type: ignore[assignment]
    norm = at if _normed(module, at) else None
    at = norm.args[0] if norm is not None else at  # type: ignore[assignment]
    return (at, norm, added) if at is not None and at.op == "call_module" else (None, None, None)


def _drops(layer: Any) -> bool:
    """Whether it does something while training only: dropout and its kin go by many types."""
    return bool(re.search("drop|stochastic", type(layer).__name__, re.IGNORECASE)) and not list(layer.parameters())


def _added(n: fx.Node, source: fx.Node, inside: set[str]) -> fx.Node | None:
    """What a sum adds to the value that its unit (or half of one) reads."""
    terms = [a for a in n.args[:2] if isinstance(a, fx.Node)]
    if n.op == "call_module" or len(terms) != 2 or len(n.args) != 2:
        return None
    for a, b in (terms, terms[::-1]):
        if a is source or (a.name in inside and _reaches(b, a)):
            return b
    return None


def _reaches(n: fx.Node, source: fx.Node) -> bool:
    seen, queue = set(), [n]
    while queue:
        m = queue.pop()
        if m is source:
            return True
        if m not in seen:
            seen.add(m)
            queue += m.all_input_nodes
    return False


def _normed(module: fx.GraphModule, n: fx.Node | None) -> bool:
    """Whether it is a BatchNorm whose scale, shift and statistics can be set."""
    layer: Any = module.get_submodule(str(n.target)) if n is not None and n.op == "call_module" else None
    return isinstance(layer, _BatchNorm) and layer.affine and layer.running_mean is not None


def _read(module: fx.GraphModule, parent: AxisClasses, layer: fx.Node | None, before: str, now: str) -> None:
    """Gives the layer the width of what it reads now."""
    if layer is None or layer.op != "call_module":
        raise StructureError(f"the layer at '{layer}' cannot be fitted: only layers of torch.nn can. Use depth='grow'")
    name = f"{layer.target}.weight"
    state = full_state(module)
    if name not in state:
        raise StructureError(f"'{layer.target}' has no weight of its own that could be fitted. Use depth='grow'")
    weight = state[name].detach()
    shown = {at: sum(c.size for c in parent if any(t.node == at for t in c.taps)) for at in (before, now)}
    sites = {s for s, _, _ in parent.by_tensor().get(name, ()) if s in parent.reads}
    for site in sites:
        if shown[before] != shown[now]:
            weight = fitted(weight, site.axis, shown[now] // site.groups)
    resize(module, {name: weight}, set())
    load_state(module, {name: weight})


@torch.no_grad()
def _fit(
    module: fx.GraphModule,
    parent: AxisClasses,
    units: Sequence[Unit],
    one: Unit,
    node: fx.Node,
    norm: fx.Node | None,
    base: str | None,
    sample: Sample,
    ridge: float,
) -> None:
    """Fits the last layer of what is left to what the group of units gave in the parent."""
    layer: Any = module.get_submodule(str(node.target))
    follower: Any = module.get_submodule(str(norm.target)) if norm is not None else None
    original = parent.traced.graph_module
    known = {n.name: n for n in original.graph.nodes}
    plain = one.kind == "plain"
    goal = _goal(original, known, units, plain)
    inner = str(node.args[0])
    sums = Sums()
    found: dict[_BatchNorm, tuple[Tensor, Tensor]] = {}
    for number, batch in enumerate(sample.batches):
        with fitting(number), evaluating(module, original):
            args, kwargs = sample.feed(batch)
            wanted = listen(original, {goal}, args, kwargs)[goal]
            mine = listen(module, {inner} | ({base} if base else set()), args, kwargs)
        target = wanted - mine[base] if base else wanted
        axis = 1 if LAYERS[type(layer)] else target.dim() - 1
        target = target.movedim(axis, -1)
        every = target.shape[:-1].numel()
        most = _ROWS * target.shape[0]
        order = draw(0, str(node.name), ordinal(number))
        picked = torch.randperm(every, generator=order)[:most] if every > most else torch.arange(every)
        places = tuple(i.to(target.device) for i in torch.unravel_index(picked, target.shape[:-1]))
        sums.add(patches(layer, mine[inner], places), target[places].unflatten(1, (getattr(layer, "groups", 1), -1)))
    sums.join()
    refit(layer, follower, sums, ridge, found)
    for bn, moments in found.items():
        set_statistics({}, bn, *moments)


def _goal(original: fx.GraphModule, known: dict[str, fx.Node], units: Sequence[Unit], plain: bool) -> str:
    """The node that has what the group gives before its activation."""
    last = units[-1]
    if plain:
        first = known[last.nodes[0]]
        follower = next(iter(first.users))
        return follower.name if _normed(original, follower) else first.name
    end = known[last.output]
    while len(end.all_input_nodes) == 1 and end.name in last.nodes:
        end = end.all_input_nodes[0]
    return end.name
