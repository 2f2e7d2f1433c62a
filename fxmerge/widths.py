"""Which classes may have other widths, and networks whose widths changed: checked by running them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxmerge.classes import infer_classes
from fxmerge.errors import FxMergeError, InputError, StructureError, told
from fxmerge.ir import Alignment, AxisClasses
from fxmerge.layout import resized, shapes
from fxmerge.rewrite import rewrite
from fxmerge.running import bind, call, evaluating, fresh
from fxmerge.symmetry import full_state
from fxmerge.trace import ShapeInterpreter


def resizable(classes: AxisClasses, candidates: Iterable[int] | None = None) -> frozenset[int]:
    """Classes whose width may change without a change to the graph, found by trying.

    A graph may hold sizes as literals (``x.view(b, 12, 64)``, ``x[:, :64]``); a class that meets one keeps its width.
    Every candidate grows by a number of its own, so that classes tied to one width (``a, b = x.chunk(2)``) show; where
    the network no longer runs, or its classes are no longer the expected ones, the candidates are tried in halves.

    Args:
        classes: of the network.
        candidates: class indices (default: free classes that are not in blocks and are no blocks).
    """
    if candidates is None:
        candidates = [
            k for k, c in enumerate(classes) if c.free and c.sites and not c.parents and not classes.children(k)
        ]

    good = list(candidates)
    if _grown(classes, good) is None:  # running alone is cheap, and tells most of them apart
        good = [k for k in good if _grown(classes, [k]) is not None]
    if not _works(classes, good):
        good = _largest(good, lambda group: _works(classes, group))
    return frozenset(good)


def _largest(group: list[int], fits: Callable[[list[int]], bool]) -> list[int]:
    """A part of the group that fits, as large as trying in halves finds."""
    if not group or fits(group):
        return group
    if len(group) == 1:
        return []
    half = len(group) // 2
    parts = _largest(group[:half], fits), _largest(group[half:], fits)
    good = parts[0] + parts[1]
    if len(good) < len(group) and fits(good):
        return good
    good = parts[0]
    for k in parts[1]:
        if fits([*good, k]):
            good = [*good, k]
    return good


def _grown(classes: AxisClasses, group: Sequence[int]) -> tuple[AxisClasses, fx.GraphModule] | None:
    """The network with these classes wider, each by another number; None where it does not run."""
    draw = torch.Generator().manual_seed(0)
    more = 3 + 2 * torch.randperm(len(group), generator=draw)  # odd, since halves and pairs are what graphs divide by
    fused = resized(classes, {k: classes[k].size + int(m) for k, m in zip(group, more, strict=False)})
    state = full_state(classes.traced.graph_module)
    wide = {
        name: torch.rand(shape, generator=draw, dtype=torch.float32).to(state[name])
        if state[name].shape != shape
        else state[name]
        for name, shape in shapes(fused, state).items()
    }
    module = rewrite(classes, wide, fused)
    try:
        with evaluating(module):
            given = classes.traced
            fx.Interpreter(module).run(*bind(module.graph, fresh(given.args), fresh(dict(given.kwargs))))
    except Exception:  # whatever a layer of someone else's raises where widths do not fit
        return None
    return fused, module


def _works(classes: AxisClasses, group: Sequence[int]) -> bool:
    """Whether the network runs with these classes wider and has the classes that the layout says."""
    grown = _grown(classes, group)
    if grown is None:
        return False
    fused, module = grown
    try:
        found = infer_classes(replace(classes.traced, graph_module=module, source=module))
    except FxMergeError:
        return False
    if len(found) != len(fused):
        return False
    return all(
        a.size == b.size
        and a.sites.keys() == b.sites.keys()
        and all(torch.equal(a.sites[s], b.sites[s]) for s in a.sites)
        for a, b in zip(found, fused, strict=True)
    )


def require_runs(fused: AxisClasses) -> Mapping[str, tuple[int, ...]]:
    """The fused network must run on the example inputs; the shapes of its nodes."""
    traced = fused.traced
    interpreter = ShapeInterpreter(traced.graph_module)
    try:
        with evaluating(traced.graph_module):
            args = bind(traced.graph_module.graph, fresh(traced.args), fresh(dict(traced.kwargs)))
            interpreter.run(*args)
    except FxMergeError:
        raise
    except Exception as error:
        raise StructureError(
            f"the network does not run at its new widths: {told(error)}. Its graph holds a size as a number; use a "
            "matcher that keeps widths"
        ) from error
    return interpreter.shapes


def separate(fused: AxisClasses, alignment: Alignment, heads: Iterable[int]) -> None:
    """Rewrites the outputs so that every parent's head gives an output of its own.

        head -> output   becomes   head -> (head[..parent 1..], head[..parent 2..], ..)

    Raises:
        InputError: what follows the heads mixes them (a softmax, say).
    """
    module = fused.traced.graph_module
    output = next(iter(module.graph.find_nodes(op="output")))
    where = {t.node: (k, t) for k in heads for t in fused[k].taps if t.node != output.name}

    def split(node: fx.Node) -> Any:
        if node.name not in where:
            return node
        k, tap = where[node.name]
        _require_own(fused, alignment, k, node)
        parts, start = [], 0
        with module.graph.inserting_before(output):
            for width in alignment.couplings[k].widths:
                index = (*[slice(None)] * tap.axis, slice(start, start + width))
                parts.append(module.graph.call_function(operator.getitem, (node, index)))
                start += width
        return tuple(parts)

    output.args = (fx.map_arg(output.args[0], split),)
    module.recompile()


def _require_own(fused: AxisClasses, alignment: Alignment, k: int, node: fx.Node) -> None:
    """One head's outputs must not move when another's parameters do."""
    module, traced = fused.traced.graph_module, fused.traced
    widths = alignment.couplings[k].widths
    held, state = full_state(module), dict[str, Tensor]()
    for site, index in fused[k].sites.items():
        tensor = state.setdefault(site.parameter, held[site.parameter].detach().clone())
        if tensor.is_floating_point():
            rows = index[widths[0] :].reshape(-1).to(tensor.device)
            tensor.index_copy_(site.axis, rows, 2 * tensor.index_select(site.axis, rows) + 1)
    with evaluating(module):
        args, kwargs = traced.args, dict(traced.kwargs)
        before, after = (pytree.tree_leaves(call(module, fresh(args), fresh(kwargs), state=s)) for s in (None, state))
    own = slice(0, widths[0])
    tap = next(t for t in fused[k].taps if t.node == node.name)
    for x, y in zip(before, after, strict=True):
        if isinstance(x, Tensor) and x.dim() > tap.axis and x.shape[tap.axis] == sum(widths):
            x, y = (t.movedim(tap.axis, 0)[own] for t in (x, y))
            if not torch.allclose(x, y):
                raise InputError(
                    f"heads='separate': what follows the heads mixes them at '{node.name}' (a softmax over the "
                    "outputs, say); return the outputs before it, or use heads='concat'"
                )
