"""Choosing by value: sorting, the k largest, and indexing with what these or the data say.

Sorted values are symmetric in what was sorted. Indices *name* neurons: a label keeps these names in its ``order``, so
that what is looked up or counted by them is chosen alike wherever the neurons stand (a router and its experts). Every
other use of an index says where a neuron stands, and pins it.
"""

from dataclasses import replace
from typing import Any

import torch

from fxmerge.label import Order, varying
from fxmerge.rules.pointwise import meeting
from fxmerge.rules.registry import rule


def named(x: Any, dim: Any) -> Any:
    """What an index along one axis of ``x`` names."""
    along = [t for t in x.neurons if t.shape[dim] > 1]
    if not along:
        return None
    clear = len(along) == 1 and varying(along[0]) == (dim,) and not any(p.shape[dim] > 1 for p in x.fixed)
    atoms = torch.cat([t.flatten() for t in along])
    return Order("names" if clear and bool((atoms >= 0).all()) else "places", atoms)


def _plain(label: Any) -> Any:
    return replace(label, order=None)


def _follow(ctx: Any, x: Any, dim: Any, index: Any) -> Any:
    """``x`` before entries along ``dim`` are chosen by ``index``: neurons by their names, all else by their places."""
    order = getattr(index, "order", None)
    if order is None or order.what != "names" or len(order.atoms) != x.shape[dim]:
        if order is not None:
            ctx.settle(index)
        return ctx.ordered(x, [dim])
    lay = [1] * x.ndim
    lay[dim] = -1
    shape = [s if d == dim else 1 for d, s in enumerate(x.shape)]
    return replace(ctx.align(x, type(x)(tuple(shape), (order.atoms.reshape(lay),)), shape=x.shape), order=x.order)


@rule("sort", "argsort", "topk", "kthvalue", "mode", "median", "nanmedian")
def ranked(ctx: Any, call: Any) -> Any:
    """Along the axis, values stand by rank and no longer by neuron; indices name the neurons."""
    x, dim = call["self"], call.get("dim", -1)
    if dim is None or not x.ndim:
        return NotImplemented
    if x.order is not None:
        return _sorted_names(ctx, call, x)
    dim %= x.ndim
    ranks = ctx.reduce(x, [dim], keepdim=True)
    made = []
    for k, shape in enumerate(call.shapes):
        kept = len(shape) == x.ndim
        out = ctx.align(ranks, type(x)(shape, fixed=ctx.positions(shape, [dim])), shape=shape) if kept else ranks
        out = out if kept else ctx.squeeze(out, [dim])
        made.append(replace(out, order=named(x, dim)) if k or call.name == "argsort" else out)
    return made


def _sorted_names(ctx: Any, call: Any, x: Any) -> Any:
    """Rows brought into the order of names: they stand as these do, so they must be alike until they are put back."""
    if x.ndim != 1 or x.order.what != "names" or call.name not in ("sort", "argsort"):
        ctx.settle(x)
        return ranked(ctx, replace(call, arguments={**call.arguments, "self": _plain(x)}))
    rows = type(x)(x.shape, (ctx.rows(x.shape[0], x.order),), kind=ctx.atoms.mark())
    return [rows] if call.name == "argsort" else [replace(rows, order=x.order), rows]


@rule("argmax", "argmin")
def where_extreme(ctx: Any, call: Any) -> Any:
    """Says where: the index names a neuron."""
    x, dim = call["self"], call["dim"]
    dims = range(x.ndim) if dim is None else [dim]
    out = ctx.reduce(x, dims, bool(call["keepdim"]))
    places = [t.flatten() for t in x.neurons]
    if dim is None and places:
        return replace(out, order=Order("places", torch.cat(places)))
    return replace(out, order=named(x, dim % x.ndim) if dim is not None and x.ndim else None)


@rule("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin")
def cumulative(ctx: Any, call: Any) -> Any:
    """The order along the axis matters, where the values are used; they stay where they are."""
    x, dim = call["self"], call["dim"] % max(call["self"].ndim, 1)
    order = named(x, dim) if x.ndim else None
    if call.name == "cumsum" and order is not None and order.what == "names":
        return replace(x, order=Order("ends", order.atoms))
    return [ctx.ordered(x, [dim])] * len(call.shapes)


@rule("histc", "bincount")
def counted(ctx: Any, call: Any) -> Any:
    """How often each value occurs: for names, one count per neuron."""
    x, shape = ctx.lift(call["self"]), call.shapes[0]
    order = x.order
    total = ctx.reduce(_plain(x), range(x.ndim))
    width = len(order.atoms) if order is not None and order.what == "names" else -1
    bins = call.name == "bincount" or (call["min"], call["max"]) == (0, width - 1)
    if not bins or shape != (width,) or call.get("weights") is not None:
        ctx.settle(x)
        return ctx.align(total, type(x)(shape, fixed=ctx.positions(shape)), shape=shape)
    return ctx.align(total, type(x)(shape, (order.atoms,)), shape=shape)


@rule("one_hot")
def one_hot(ctx: Any, call: Any) -> Any:
    """A new last axis with one entry per name."""
    x, shape = call["self"], call.shapes[0]
    flat = ctx.move(_plain(x), lambda t: t[..., None], (*x.shape, 1))
    return ctx.align(flat, _follow(ctx, type(x)((1,) * x.ndim + shape[-1:], learned=True), x.ndim, x), shape=shape)


@rule("index", "index_select")
def indexed(ctx: Any, call: Any) -> Any:
    """By constants: movement. By data: entries are chosen by name, or as the input says."""
    given = call["indices"] if call.name == "index" else [*[None] * (call["dim"] % call["self"].ndim), call["index"]]
    x, shape = ctx.lift(call["self"]), call.shapes[0]
    at = [d for d, i in enumerate(given) if i is not None]
    if not any(hasattr(given[d], "neurons") for d in at):
        place = [i if i is None else i.cpu() for i in given]
        return ctx.move(x, lambda t: torch.ops.aten.index(t, place), shape)
    for d in at:
        x = _follow(ctx, x, d, given[d])
    rest = ctx.reduce(x, at)
    lead = len(shape) - rest.ndim
    first = at[0] if at == list(range(at[0], at[0] + len(at))) else 0
    around = (*shape[:first], *[1] * lead, *shape[first + lead :])
    if lead < 1 or rest.shape != (*shape[:first], *shape[first + lead :]):
        return NotImplemented
    rest = ctx.move(rest, lambda t: t.reshape([*t.shape[:first], *[1] * lead, *t.shape[first:]]), around)
    chosen = shape[first : first + lead]
    labels = [_plain(ctx.lift(given[d])) for d in at]
    if all(i.ndim <= lead for i in labels) and torch.broadcast_shapes(*(i.shape for i in labels)) == chosen:
        which = ctx.align(*labels, shape=chosen)
    else:  # a mask: what it leaves stands in new places
        which = type(x)(chosen, fixed=ctx.positions(chosen))
    behind = [1] * (len(shape) - first - lead)
    which = ctx.move(which, lambda t: t.reshape([*t.shape, *behind]), (*chosen, *behind))
    out = replace(ctx.align(rest, which, shape=shape), order=x.order)
    return replace(out, learned=x.learned) if x.ndim - len(at) > 1 else out  # a matrix that the data choose is a weight


@rule("gather", "take_along_dim")
def gathered(ctx: Any, call: Any) -> Any:
    """One entry along the axis per index, at the same place along all others."""
    x, index = ctx.lift(call["self"]), call["index" if call.name == "gather" else "indices"]
    if call["dim"] is None:
        return NotImplemented
    dim, shape = call["dim"] % x.ndim, call.shapes[0]
    if not hasattr(index, "neurons"):
        where = index.cpu()
        return ctx.move(x, lambda t: torch.ops.aten.gather(t, dim, where.expand(shape)), shape)
    part = tuple(slice(0, s if d != dim and x.shape[d] > 1 else None) for d, s in enumerate(shape))
    x = ctx.move(x, lambda t: t[part], [x.shape[d] if s.stop is None else s.stop for d, s in enumerate(part)])
    x = ctx.reduce(_follow(ctx, x, dim, index), [dim], keepdim=True)
    return replace(ctx.align(x, _plain(index), shape=shape), order=x.order)


@rule("scatter", "scatter_add", "scatter_reduce")
def scattered(ctx: Any, call: Any) -> Any:
    """Entries are put where the indices say, along one axis: into neurons by their names."""
    x, index, source = ctx.lift(call["self"]), ctx.lift(call["index"]), call.get("src")
    dim = call["dim"] % max(x.ndim, 1)
    x = _follow(ctx, x, dim, index)
    given = [_plain(index), *([ctx.lift(source)] if isinstance(source, torch.Tensor) or source is not None else [])]
    if not x.ndim or any(t.shape != index.shape for t in given if t.ndim):
        return NotImplemented
    if any(s != t for d, (s, t) in enumerate(zip(index.shape, x.shape, strict=True)) if d != dim):
        return NotImplemented
    put = ctx.reduce(ctx.align(*given, shape=index.shape), [dim], keepdim=True)
    return ctx.align(x, put, shape=x.shape)


@rule("index_add", "index_copy")
def added(ctx: Any, call: Any) -> Any:
    """Slices are put where the data say, along one axis."""
    x, index, source = (ctx.lift(call[name]) for name in ("self", "index", "source"))
    dim = call["dim"] % x.ndim
    x = _follow(ctx, x, dim, index)
    lay = [-1 if d == dim else 1 for d in range(x.ndim)]
    shape = tuple(s if d == dim else 1 for d, s in enumerate(source.shape))
    which = ctx.move(_plain(index), lambda t: t.reshape(lay), shape)
    put = ctx.reduce(ctx.align(source, which, shape=source.shape), [dim], keepdim=True)
    return ctx.align(x, put, shape=x.shape)


@rule("index_put", "_index_put_impl")
def put(ctx: Any, call: Any) -> Any:
    """x[i, j, ..] = values, where the data say; x[i] = 0, 1, 2, .. makes the names of the rows that i has."""
    x, values, shape = ctx.lift(call["self"]), call["values"], call.shapes[0]
    if not call["accumulate"] and not any(hasattr(i, "neurons") for i in call["indices"]):
        place = [None if i is None else i.cpu() for i in call["indices"]]
        return ctx.join([x, ctx.lift(values)], lambda t: t[0].clone().index_put_(place, t[1]), shape)
    given: list[Any] = [None if i is None else ctx.lift(i) for i in call["indices"]]
    count = shape[0] if shape else 0
    if (
        len(given) == x.ndim == 1
        and isinstance(values, torch.Tensor)
        and torch.equal(values.cpu(), torch.arange(count))
        and given[0].shape == shape
        and (names := named(given[0], 0)) is not None
    ):
        return type(x)(shape, fixed=ctx.positions(shape), kind=ctx.atoms.mark(), order=names)
    if any(i is None for i in given):
        return NotImplemented
    chosen = range(len(given))
    for d in chosen:
        x = _follow(ctx, x, d, given[d])
    values = ctx.lift(values)
    inner = x.ndim - len(given)
    lead = values.ndim - inner
    if lead > 0:
        values = ctx.reduce(values, range(lead))
    which = [ctx.reduce(_plain(i), range(i.ndim)) for i in given]
    return ctx.align(x, values, *which, shape=shape)


@rule("nonzero", "argwhere", "masked_select", "_unique2", "unique_dim", "torchvision::nms")
def found(ctx: Any, call: Any) -> Any:
    """Where values stand, or those that a mask leaves, in order: nothing may move."""
    for x in call.labels():
        ctx.pin(x, f"chosen by value at {ctx.place}")
    return [ctx.unknown(shape) for shape in call.shapes]


@rule("where")
def where(ctx: Any, call: Any) -> Any:
    """The choice between two values is pointwise; of a condition alone, the places where it holds."""
    if "self" not in call.arguments and "other" not in call.arguments:
        return found(ctx, call)
    return ctx.align(*meeting(ctx, call), shape=call.shapes[0])


@rule("torchvision::roi_align", "torchvision::roi_pool")
def regions(ctx: Any, call: Any) -> Any:
    """Boxes [n, 5] cut out of images: new images at new places, with the channels that were there."""
    boxes = ctx.lift(call["rois"])
    ctx.ordered(boxes, range(boxes.ndim))
    x = ctx.lift(call["input"])
    return [ctx.windows(x, [0, *range(2, x.ndim)], (shape[0], *shape[2:])) for shape in call.shapes]


@rule("_grouped_mm")
def grouped_product(ctx: Any, call: Any) -> Any:
    """y[rows of e, o] = x[rows of e, i] W[e, i, o], for rows sorted by e and the ends of each group of rows."""
    x, w, ends = ctx.lift(call["self"]), ctx.lift(call["mat2"]), call["offs"]
    if (x.ndim, w.ndim) != (2, 3) or ends is None or call.get("bias") is not None:
        return NotImplemented
    ends = ctx.lift(ends)
    lay = ctx.move(replace(ends, order=None, learned=w.learned), lambda t: t.reshape(-1, 1, 1), (w.shape[0], 1, 1))
    if ends.order is None or ends.order.what != "ends" or not ctx.stand_in(x, ends.order.atoms):
        ctx.settle(ends)
        w, x = ctx.ordered(w, [0]), ctx.ordered(x, [0])
    w = ctx.reduce(ctx.align(w, lay, shape=w.shape), [0])
    return ctx.contract([(x, ["row", "i"]), (w, ["i", "o"])], ["row", "o"])
