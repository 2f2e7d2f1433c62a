"""Recurrent layers: gates have fixed places, hidden units move together in every weight and in the state."""

from typing import Any

import torch

from fxmerge.rules.registry import rule

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@rule(*GATES)
def recurrent(ctx: Any, call: Any) -> Any:
    """Layers of h' = cell(W_ih x + b_ih, W_hh h + b_hh), gates stacked along axis 0 of every weight."""
    packed = "batch_sizes" in call.arguments
    gates, x = GATES[call.name], ctx.lift(call["data" if packed else "input"])
    directions = 2 if call["bidirectional"] else 1
    weights, layers = [ctx.lift(w) for w in call["params"]], call["num_layers"]
    each = len(weights) // (layers * directions)
    time = 1 if call.get("batch_first") and x.ndim == 3 else 0
    start = call["hx"]
    start = [ctx.lift(s) for s in (start if isinstance(start, (list, tuple)) else [start])]
    if packed and any(s.neurons or s.fixed for s in start):
        return NotImplemented  # which step of which sequence an entry belongs to only the data say
    hidden, cells = [], []
    for layer in range(layers):
        x = ctx.windows(x, [time], [x.shape[time]])
        outs = []
        for way in range(directions):
            at = (layer * directions + way) * each
            first = [ctx.move(s, lambda t, k=layer * directions + way: t[k], s.shape[1:]) for s in start]
            out, cell = _layer(ctx, x, weights[at : at + each], gates, bool(call["has_biases"]), first, time)
            outs.append(out)
            hidden.append(ctx.reduce(out, [time]))
            cells.append(ctx.reduce(cell, [time]))
        size = sum(o.shape[-1] for o in outs)
        x = ctx.join(outs, lambda tensors: torch.cat(tensors, -1), (*outs[0].shape[:-1], size))
    made = [x]
    for parts, shape in zip((hidden, cells), call.shapes[1:], strict=False):
        one = (1, *shape[1:])
        stacked = [ctx.move(p, lambda t, one=one: t[None].expand(one), one) for p in parts]
        if packed:  # one state per sequence
            own = type(x)(one, fixed=ctx.positions(one, [1]))
            stacked = [ctx.align(p, own, shape=one) for p in stacked]
        made.append(ctx.join(stacked, torch.cat, shape))
    return made


@rule(*(f"{name}_cell" for name in GATES))
def recurrent_cell(ctx: Any, call: Any) -> Any:
    """One step of one layer, from the state that it is given."""
    gates, x = GATES[call.name.removesuffix("_cell")], ctx.lift(call["input"])
    start = call["hx"]
    start = [ctx.lift(s) for s in (start if isinstance(start, (list, tuple)) else [start])]
    parts = [(x, call["w_ih"], call["b_ih"]), (start[0], call["w_hh"], call["b_hh"])]
    lead = [f"lead{k}" for k in range(x.ndim - 1)]
    made = []
    for value, weight, bias in parts:
        names = [(value, [*lead, "i"]), (_by_gate(ctx, ctx.lift(weight), gates), ["gate", "unit", "i"])]
        made.append(ctx.contract(names, [*lead, "gate", "unit"]))
        if bias is not None:
            made.append(_by_gate(ctx, ctx.lift(bias), gates))
    out = _one_gate(ctx, ctx.align(*made, shape=made[0].shape))
    if call.name in ("lstm_cell", "gru_cell"):  # part of the state is passed on
        out = ctx.align(out, start[-1], shape=out.shape)
    return [out] * len(call.shapes)


def _by_gate(ctx: Any, w: Any, gates: Any) -> Any:
    shape = (gates, w.shape[0] // gates, *w.shape[1:])
    return ctx.move(w, lambda t: t.reshape(shape), shape)


def _one_gate(ctx: Any, total: Any) -> Any:
    axis = total.ndim - 2
    return ctx.reduce(ctx.ordered(total, [axis]), [axis])


@rule("_pack_padded_sequence")
def packed(ctx: Any, call: Any) -> Any:
    """Steps of all sequences below each other: of the two leading axes, the first is the new one."""
    steps, sizes = call.shapes
    x = ctx.windows(ctx.lift(call["input"]), [0, 1], [steps[0], 1])
    data = ctx.move(x, lambda t: t[:, 0], steps)
    return [data, type(x)(sizes, fixed=ctx.positions(sizes, [0]))]


@rule("_pad_packed_sequence")
def padded(ctx: Any, call: Any) -> Any:
    """The steps back in two axes, with one number in the places left over."""
    shape, lengths = call.shapes
    x = ctx.windows(ctx.lift(call["data"]), [0], [shape[0] * shape[1]])
    return [ctx.move(x, lambda t: t.reshape(shape), shape), type(x)(lengths, fixed=ctx.positions(lengths, [0]))]


def _layer(ctx: Any, x: Any, weights: Any, gates: Any, biased: Any, start: Any, time: Any) -> Any:
    """One direction of one layer: its output and its cell state, both along the hidden units."""
    w_ih, w_hh, *rest = weights
    biases = rest[:2] if biased else []
    project = rest[-1] if len(rest) > len(biases) else None
    lead = [f"lead{k}" for k in range(x.ndim - 1)]

    def split(w: Any) -> Any:
        return _by_gate(ctx, w, gates)

    total = ctx.contract([(x, [*lead, "i"]), (split(w_ih), ["gate", "unit", "i"])], [*lead, "gate", "unit"])
    total = ctx.align(total, *map(split, biases), shape=total.shape)
    cell = _one_gate(ctx, total)
    if len(start) > 1:
        cell = _meet(ctx, cell, start[1], time)
    out = cell if project is None else ctx.contract([(cell, [*lead, "u"]), (project, ["p", "u"])], [*lead, "p"])
    out = _meet(ctx, out, start[0], time)
    back = ctx.contract([(out, [*lead, "h"]), (split(w_hh), ["gate", "unit", "h"])], [*lead, "gate", "unit"])
    total = ctx.align(total, back, shape=total.shape)
    cell = ctx.align(cell, _one_gate(ctx, total), shape=cell.shape)
    return out, cell


def _meet(ctx: Any, state: Any, first: Any, time: Any) -> Any:
    """The initial state [batch, units] meets the state at every step."""
    if not (first.neurons or first.fixed):
        return state
    shape = list(state.shape)
    shape[time] = 1
    return ctx.align(state, ctx.move(first, lambda t: t.reshape(shape), shape), shape=state.shape)
