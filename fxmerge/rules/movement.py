"""Data movement: the operation itself runs on the label tensors, so there is nothing to get wrong."""

from typing import Any

import torch

from fxmerge.rules.registry import rule

VIEWS = """
    _reshape_alias _unsafe_view as_strided channel_shuffle chunk diagonal expand expand_as flatten flip fliplr flipud
    movedim moveaxis narrow narrow_copy native_channel_shuffle permute pixel_shuffle pixel_unshuffle ravel repeat tile
    repeat_interleave reshape reshape_as roll rot90 select slice split split_with_sizes squeeze squeeze_ swapaxes
    swapdims t tensor_split transpose unbind unflatten unfold unsafe_chunk unsafe_split unsqueeze view view_as
    broadcast_to numpy_T adjoint mT mH hsplit vsplit dsplit atleast_1d atleast_2d atleast_3d view_copy
    """.split()


@rule(*VIEWS)
def moved(ctx: Any, call: Any) -> Any:
    """One tensor in, its entries elsewhere (or several times, or in pieces) out."""
    name = "self" if "self" in call.arguments else "input"
    x = call.arguments.get(name)
    if any(hasattr(v, "neurons") for k, v in call.arguments.items() if k not in (name, "other")):
        return NotImplemented
    x = ctx.lift(x)  # a constant, where only the other's shape depends on data
    if call.name == "as_strided":
        return NotImplemented
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


@rule("cat", "concat", "concatenate", "stack", "hstack", "vstack")
def joined(ctx: Any, call: Any) -> Any:
    """Several tensors side by side."""
    parts = [ctx.lift(x) for x in call["tensors"]]
    if call.name in ("cat", "concat", "concatenate"):
        parts = [p for p in parts if p.shape != (0,)]  # torch skips the legacy empty tensor
        dim = call["dim"] % parts[0].ndim

        def cat(tensors: Any) -> Any:
            # what no part varies in stays narrow
            keep = [d == dim or any(_varies(t, d) for t in tensors) for d in range(len(parts[0].shape))]
            thin = [t[tuple(slice(None) if k else slice(0, 1) for k in keep)] for t in tensors]
            return torch.cat(thin, dim)

        return ctx.join(parts, cat, call.shapes[0])
    return ctx.join(parts, lambda tensors: call.run({"tensors": tensors}), call.shapes[0])


def _varies(t: Any, d: Any) -> Any:
    return t.shape[d] > 1 and t.stride(d) != 0


@rule("pad", "constant_pad_nd")
def padded(ctx: Any, call: Any) -> Any:
    """Constant padding puts no neuron (-1) in the new places; other modes repeat what is there."""
    if call.get("mode", "constant") == "constant":
        value = {"value": -1.0 if call.name == "pad" else -1}
        out = ctx.move(call["self"], lambda t: call.run({"self": t, **value}), call.shapes[0])
        there = torch.ones([1] * out.ndim, dtype=torch.int64).expand(call["self"].shape)
        filled = ctx.told(call.run({"self": there, **value}))
        return ctx.align(out, filled, shape=out.shape)
    return _as_numbers(ctx, call, call["self"], "self")


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
    return _as_numbers(ctx, call, call["self"], "self")


def _as_numbers(ctx: Any, call: Any, x: Any, name: Any) -> Any:
    """For operations that integers do not have: labels go through as small floats, 0 meaning no neuron."""

    def run(t: Any) -> Any:
        values, ids = torch.unique(t, return_inverse=True)
        out = call.run({name: (ids + 1).double()}).long() - 1
        return torch.where(out >= 0, values[out.clamp_min(0)], -1)

    return ctx.move(x, run, call.shapes[0])


@rule("index_select", "take")
def indexed(ctx: Any, call: Any) -> Any:
    """By constants: movement. By data: entries are chosen as the input says, so nothing may move along that axis."""
    x, index = ctx.lift(call["self"]), call["index"]
    if not hasattr(index, "neurons"):
        return ctx.move(x, lambda t: call.run({"self": t, "index": index.cpu()}), call.shapes[0])
    if call.name == "take":
        return NotImplemented
    return ctx.windows(x, [call["dim"]], [call.shapes[0][call["dim"]]])


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
