"""Contractions with parameters: the contracted axis is the weight's input axis, the output its output axis."""

import string
from dataclasses import replace
from typing import Any

from fxmerge.rules.registry import rule


def _lead(count: Any) -> Any:
    return [f"lead{k}" for k in range(count)]


def _plus(ctx: Any, out: Any, *others: Any) -> Any:
    given = [ctx.lift(x) for x in others if x is not None]
    return ctx.align(out, *given, shape=out.shape) if given else out


@rule("linear")
def linear(ctx: Any, call: Any) -> Any:
    """y[.., o] = x[.., i] W[o, i] + b[o]."""
    x, w = ctx.lift(call["input"]), ctx.lift(call["weight"])
    lead = _lead(x.ndim - 1)
    out = ["o"][: w.ndim - 1]
    y = ctx.contract([(x, [*lead, "i"]), (w, [*out, "i"])], [*lead, *out])
    return _plus(ctx, y, call["bias"])


def _matmul(ctx: Any, x: Any, y: Any) -> Any:
    left = ["m"] if x.ndim > 1 else []
    right = ["n"] if y.ndim > 1 else []
    depth = max(x.ndim, y.ndim, 2) - 2
    lead = _lead(depth)
    xs = [*lead[depth - max(x.ndim - 2, 0) :], *left, "k"]
    ys = [*lead[depth - max(y.ndim - 2, 0) :], "k", *right]
    return ctx.contract([(x, xs), (y, ys)], [*lead, *left, *right])


@rule("matmul", "mm", "bmm", "mv", "dot", "vdot")
def matmul(ctx: Any, call: Any) -> Any:
    """Batched matrix products; batch axes broadcast."""
    x, y = (ctx.lift(t) for t in call.tensors()[:2])
    return _matmul(ctx, x, y)


@rule("addmm", "baddbmm", "addmv")
def add_matmul(ctx: Any, call: Any) -> Any:
    """A matrix product added to what is there."""
    base, x, y = (ctx.lift(t) for t in call.tensors()[:3])
    out = _matmul(ctx, x, y)
    return ctx.align(base, out, shape=out.shape)


@rule("einsum")
def einsum(ctx: Any, call: Any) -> Any:
    """Any sum of products; repeated letters in one operand and diagonals are left to the unknown."""
    equation, operands = call["equation"].replace(" ", ""), [ctx.lift(t) for t in call["tensors"]]
    left, _, right = equation.partition("->")
    terms = left.split(",")
    if "->" not in equation:
        letters = left.replace(",", "").replace(".", "")
        right = ("..." if "..." in left else "") + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    rank = max(
        [o.ndim - len(t.replace("...", "")) for o, t in zip(operands, terms, strict=True) if "..." in t], default=0
    )

    def names(term: Any, ndim: Any = None) -> Any:
        head, dots, tail = term.partition("...")
        count = rank if ndim is None else ndim - len(head) - len(tail)
        return [*head, *(_lead(rank)[rank - count :] if dots else []), *tail]

    if any(len(set(t)) < len(t) for t in (x.replace("...", "") for x in terms)) or not set(right) <= set(
        string.ascii_letters + "."
    ):
        return NotImplemented
    return ctx.contract([(o, names(t, o.ndim)) for o, t in zip(operands, terms, strict=True)], names(right))


@rule("conv1d", "conv2d", "conv3d", "convolution")
def convolution(ctx: Any, call: Any) -> Any:
    """y[n, (g, o), s'] = sum over c, k of x[n, (g, c), window(s', k)] W[(g, o), c, k]."""
    if call.name == "convolution" and call["transposed"]:
        return transposed_convolution(ctx, call)
    return _convolve(ctx, call, transposed=False)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed_convolution(ctx: Any, call: Any) -> Any:
    """As a convolution, with the weight stored [(g, c), o, k]."""
    return _convolve(ctx, call, transposed=True)


def _convolve(ctx: Any, call: Any, transposed: Any) -> Any:
    x, w, g = ctx.lift(call["input"]), ctx.lift(call["weight"]), call["groups"]
    n = w.ndim - 2
    batch = x.ndim - n - 1
    space = [f"s{k}" for k in range(n)]
    kernel = [f"k{k}" for k in range(n)]
    shape = call.shapes[0]
    mixed = [d for d in range(batch + 1, x.ndim) if not _single(call, d - batch - 1, w.shape[d - batch + 1])]
    x = ctx.windows(x, mixed, [shape[d] for d in mixed])
    inside = x.shape[batch] // g
    split = (*x.shape[:batch], g, inside, *x.shape[batch + 1 :])
    x = ctx.move(x, lambda t: t.reshape(split), split)
    rows = (g, w.shape[0] // g, *w.shape[1:])
    w = ctx.move(ctx.ordered(w, range(2, w.ndim)), lambda t: t.reshape(rows), rows)
    lead = _lead(batch)
    layout = ["g", "c", "o", *kernel] if transposed else ["g", "o", "c", *kernel]
    y = ctx.contract([(x, [*lead, "g", "c", *space]), (w, layout)], [*lead, "g", "o", *space])
    y = ctx.move(y, lambda t: t.reshape(shape), shape)
    if call["bias"] is None:
        return y
    lay = [1] * batch + [shape[batch]] + [1] * n
    return ctx.align(y, ctx.move(ctx.lift(call["bias"]), lambda t: t.reshape(lay), lay), shape=shape)


def _single(call: Any, d: Any, kernel: Any) -> Any:
    """Whether a window along the d-th axis of space is one entry, each in its place."""
    stride, padding = call["stride"], call["padding"]
    pad = {"valid": 0, "same": 0}[padding] if isinstance(padding, str) else padding[d % len(padding)]
    return (kernel, stride[d % len(stride)], pad) == (1, 1, 0) and not any(call.get("output_padding") or [0])


@rule("torchvision::deform_conv2d")
def deformable_convolution(ctx: Any, call: Any) -> Any:
    """A convolution that reads displaced places, by offsets and masks per block of channels."""
    x, blocks = ctx.lift(call["input"]), call["offset_groups"]
    split = (x.shape[0], blocks, x.shape[1] // blocks, *x.shape[2:])
    parts = [ctx.move(x, lambda t: t.reshape(split), split)]
    for name in ("offset", "mask")[: 1 + bool(call["use_mask"])]:
        t = ctx.lift(call[name])
        shape = (t.shape[0], blocks, t.shape[1] // blocks, *t.shape[2:])
        t = ctx.ordered(ctx.move(t, lambda t, shape=shape: t.reshape(shape), shape), range(2, 5))
        parts.append(ctx.reduce(t, range(2, 5), keepdim=True))
    x = ctx.move(ctx.align(*parts, shape=split), lambda t: t.reshape(x.shape), x.shape)
    steps = {name: [call[f"{part}_h"], call[f"{part}_w"]] for name, part in (("stride", "stride"), ("padding", "pad"))}
    return _convolve(ctx, replace(call, arguments={**call.arguments, **steps, "input": x}), transposed=False)


@rule("bilinear")
def bilinear(ctx: Any, call: Any) -> Any:
    """y[.., o] = x1[.., i] W[o, i, j] x2[.., j] + b[o]."""
    a, b, w = (ctx.lift(call[k]) for k in ("input1", "input2", "weight"))
    lead = _lead(a.ndim - 1)
    y = ctx.contract([(a, [*lead, "i"]), (b, [*lead, "j"]), (w, ["o", "i", "j"])], [*lead, "o"])
    return _plus(ctx, y, call["bias"])


@rule("embedding")
def embedding(ctx: Any, call: Any) -> Any:
    """Rows are chosen by the input, so they stay; columns are neurons."""
    weight, indices = ctx.lift(call["weight"]), call["indices"]
    shape = call.shapes[0]
    if not hasattr(indices, "neurons"):
        where = indices.cpu()
        return ctx.move(weight, lambda t: t[where], shape)
    rows = type(weight)(
        weight.shape, fixed=ctx.positions(weight.shape, [0]), learned=True, why="rows are chosen by the input"
    )
    columns = ctx.reduce(ctx.align(weight, rows, shape=weight.shape), [0])
    lay = (1,) * (len(shape) - 1) + (shape[-1],)
    columns = ctx.move(columns, lambda t: t.reshape(lay), lay)
    spots = type(weight)(shape, fixed=ctx.positions(shape, range(len(shape) - 1)))
    return ctx.align(columns, spots, shape=shape)


@rule("embedding_bag", "_embedding_bag")
def embedding_bag(ctx: Any, call: Any) -> Any:
    """Rows chosen by the input and summed; what else comes out counts rows."""
    shape, *counts = call.shapes
    out = embedding(ctx, replace(call, arguments={**call.arguments, "indices": ctx.unknown(())}, shapes=(shape,)))
    if call["per_sample_weights"] is not None:
        ctx.ordered(ctx.lift(call["per_sample_weights"]), [0])
    return [out, *(ctx.unknown(other) for other in counts)]


@rule("cdist")
def distances(ctx: Any, call: Any) -> Any:
    """Between all rows of two matrices."""
    x, y = ctx.lift(call["x1"]), ctx.lift(call["x2"])
    lead = _lead(max(x.ndim, y.ndim) - 2)
    operands = [(t, [*lead[len(lead) - t.ndim + 2 :], row, "k"]) for t, row in ((x, "m"), (y, "n"))]
    return ctx.contract(operands, [*lead, "m", "n"])
