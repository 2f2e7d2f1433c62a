"""Data movement: the operation itself runs on the label tensors, so there is nothing to get wrong."""

import math
from dataclasses import replace
from typing import Any

import torch

from fxmerge.rules.registry import rule

VIEWS = """
    _reshape_alias _unsafe_view channel_shuffle chunk diagonal expand expand_as flatten flip fliplr flipud
    movedim moveaxis narrow narrow_copy native_channel_shuffle permute pixel_shuffle pixel_unshuffle ravel repeat tile
    repeat_interleave reshape reshape_as roll rot90 select slice split split_with_sizes squeeze squeeze_ swapaxes
    swapdims t tensor_split transpose unbind unflatten unfold unsafe_chunk unsafe_split unsqueeze view view_as
    broadcast_to numpy_T adjoint mT mH hsplit vsplit dsplit atleast_1d atleast_2d atleast_3d view_copy real imag
    """.split()


@rule(*VIEWS)
def moved(ctx: Any, call: Any) -> Any:
    """One tensor in, its entries elsewhere (or several times, or in pieces) out."""
    name = "self" if "self" in call.arguments else "input"
    x = call.arguments.get(name)
    if any(hasattr(v, "neurons") for k, v in call.arguments.items() if k not in (name, "other")):
        return NotImplemented
    x = ctx.lift(x)  # a constant, where only the other's shape depends on data
    function = torch.reshape if call.name in ("view", "_unsafe_view", "_reshape_alias", "view_copy") else None
    if call.name == "view" and not isinstance(call.get("size"), (list, tuple)):
        return x  # the overload that reinterprets the dtype
    if function is not None:
        return ctx.move(x, lambda t: torch.reshape(t, call.shapes[0]), call.shapes[0])
    if call.name in ("expand_as", "reshape_as", "view_as"):
        wanted = call.shapes[0]
        verb = torch.broadcast_to if call.name == "expand_as" else torch.reshape
        return ctx.move(x, lambda t: verb(t, wanted), wanted)
    if len(call.shapes) == 1:

        def one(t: Any) -> Any:
            out = call.run({name: t})
            return out[0] if isinstance(out, (list, tuple)) else out

        return ctx.move(x, one, call.shapes[0])
    return [ctx.move(x, lambda t, k=k: call.run({name: t})[k], shape) for k, shape in enumerate(call.shapes)]


@rule("as_strided")
def strided(ctx: Any, call: Any) -> Any:
    """Entries by their addresses, which a label has too where the tensor fills its storage."""
    x, size, stride = call["self"], call["size"], call["stride"]

    def end(sizes: Any, steps: Any) -> Any:
        return 1 + sum((n - 1) * step for n, step in zip(sizes, steps, strict=True))

    dense = call.strides is not None and end(x.shape, call.strides) == math.prod(x.shape)
    if not dense or call.get("storage_offset") or end(size, stride) > math.prod(x.shape):
        return NotImplemented

    def run(t: Any) -> Any:
        return torch.empty_strided(x.shape, call.strides, dtype=t.dtype).copy_(t).as_strided(size, stride)

    return ctx.move(x, run, call.shapes[0])


@rule("cat", "concat", "concatenate", "stack", "hstack", "vstack")
def joined(ctx: Any, call: Any) -> Any:
    """Several tensors side by side."""
    parts = [ctx.lift(x) for x in call["tensors"]]
    if call.name in ("cat", "concat", "concatenate"):
        parts = [p for p in parts if p.shape != (0,)]  # torch skips the legacy empty tensor
        dim = call["dim"] % parts[0].ndim
        # one number throughout goes with whichever neurons it stands beside
        beside = next((tuple(t for t in p.neurons if t.shape[dim] == 1) for p in parts if p.neurons), ())
        parts = [p if p.neurons or p.fixed else replace(p, neurons=beside) for p in parts]
        order = parts[0].order  # indices that name the same neurons do so one behind the other, too
        if order is not None and all(ctx.same_names(order, p.order) for p in parts):
            parts = [replace(p, order=None) for p in parts]
        else:
            order = None

        def cat(tensors: Any) -> Any:
            # what no part varies in stays narrow
            keep = [d == dim or any(_varies(t, d) for t in tensors) for d in range(len(parts[0].shape))]
            thin = [t[tuple(slice(None) if k else slice(0, 1) for k in keep)] for t in tensors]
            return torch.cat(thin, dim)

        return replace(ctx.join(parts, cat, call.shapes[0]), order=order)
    return ctx.join(parts, lambda tensors: call.run({"tensors": tensors}), call.shapes[0])


def _varies(t: Any, d: Any) -> Any:
    return t.shape[d] > 1 and t.stride(d) != 0


@rule("pad", "constant_pad_nd")
def padded(ctx: Any, call: Any) -> Any:
    """Constant padding puts one number in the new places; other modes repeat what is there."""
    if call.get("mode", "constant") == "constant":
        value = {"value": -1.0 if call.name == "pad" else -1}
        out = ctx.move(call["self"], lambda t: _pad(t, call["pad"], call.shapes[0]), call.shapes[0])
        there = torch.ones([1] * out.ndim, dtype=torch.int64).expand(call["self"].shape)
        filled = ctx.told(call.run({"self": there, **value}))
        return ctx.align(out, filled, shape=out.shape)
    return _as_numbers(ctx, call, call["self"], "self")


def _pad(t: Any, pads: Any, shape: Any) -> Any:
    """-1 in the new places along axes in which ``t`` varies; along others one number goes with all neurons alike."""
    alike = [t.shape[d] > 1 and not _varies(t, d) for d in range(t.dim())]
    padded = torch.constant_pad_nd(t[tuple(slice(0, 1) if a else slice(None) for a in alike)], _but(pads, alike), -1)
    return padded.expand(shape)


def _but(pads: Any, alike: Any) -> Any:
    """Widths of padding, last axis first, with none along some axes."""
    return [0 if alike[len(alike) - 1 - k // 2] else width for k, width in enumerate(pads)]


@rule(
    "reflection_pad1d",
    "reflection_pad2d",
    "reflection_pad3d",
    "replication_pad1d",
    "replication_pad2d",
    "replication_pad3d",
)
def mirrored(ctx: Any, call: Any) -> Any:
    """Padding by what is there already."""
    return _as_numbers(ctx, call, call["self"], "self")


@rule("im2col")
def patches(ctx: Any, call: Any) -> Any:
    """Sliding windows laid out as columns; zero padding puts no neuron in its places."""
    x = call["self"]
    filled = ctx.told(call.run({"self": torch.ones(x.shape, dtype=torch.float64)}).long())
    out = _as_numbers(ctx, call, x, "self")
    return ctx.align(out, filled, shape=out.shape)


def _as_numbers(ctx: Any, call: Any, x: Any, name: Any) -> Any:
    """For operations that integers do not have: labels go through as small floats, 0 meaning no neuron."""

    def run(t: Any) -> Any:
        values, ids = torch.unique(t, return_inverse=True)
        out = call.run({name: (ids + 1).double()}).long() - 1
        return torch.where(out >= 0, values[out.clamp_min(0)], -1)

    return ctx.move(x, run, call.shapes[0])


@rule("meshgrid")
def grid(ctx: Any, call: Any) -> Any:
    """Coordinates spread over a grid."""
    parts = [ctx.lift(x) for x in call["tensors"]]
    swap = call.get("indexing") == "xy"
    made = []
    for k, (part, shape) in enumerate(zip(parts, call.shapes, strict=True)):
        d = {0: 1, 1: 0}.get(k, k) if swap else k
        made.append(
            ctx.move(
                part,
                lambda t, d=d, shape=shape: t.reshape([-1 if j == d else 1 for j in range(len(shape))]).expand(shape),
                shape,
            )
        )
    return made
