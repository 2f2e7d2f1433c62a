"""Entries chosen by what the data say: along the axes chosen from, places matter, so nothing may move there."""

from typing import Any

from fxmerge.rules.registry import rule


def _placed(ctx: Any, x: Any) -> None:
    """Every axis of ``x`` is read by place."""
    ctx.ordered(x, range(x.ndim))


@rule("nonzero", "argwhere", "masked_select", "torchvision::nms", "one_hot", "bincount", "_unique2", "unique_dim")
def found(ctx: Any, call: Any) -> Any:
    """What comes out says where something stands; how much it is, is seen on the example inputs."""
    for x in call.labels():
        _placed(ctx, x)
    return [ctx.unknown(shape) for shape in call.shapes]


@rule("where")
def where(ctx: Any, call: Any) -> Any:
    """The choice between two values is pointwise; of a condition alone, the places where it holds."""
    if "self" not in call.arguments and "other" not in call.arguments:
        return found(ctx, call)
    values = [ctx.lift(x) for x in call.tensors() if len(x.shape)]
    return ctx.align(*values, shape=call.shapes[0])


@rule("gather", "take_along_dim")
def gathered(ctx: Any, call: Any) -> Any:
    """By constants: movement. By data: along the axis any entry may come out at any place."""
    name = "index" if call.name == "gather" else "indices"
    x, index, dim, shape = ctx.lift(call["self"]), call[name], call["dim"], call.shapes[0]
    if not hasattr(index, "neurons"):
        return ctx.move(x, lambda t: call.run({"self": t, name: index.cpu()}), shape)
    if dim is None or any(n < m for d, (n, m) in enumerate(zip(x.shape, shape, strict=True)) if d != dim % x.ndim):
        return NotImplemented
    rows = ctx.reduce(ctx.ordered(x, [dim]), [dim], keepdim=True)
    size = [1 if d == dim % x.ndim else n for d, n in enumerate(shape)]
    rows = ctx.move(rows, lambda t: t[tuple(slice(0, n) for n in size)], size)
    return ctx.align(rows, index, type(x)(shape, fixed=ctx.positions(shape, [dim % x.ndim])), shape=shape)


@rule("index")
def indexed(ctx: Any, call: Any) -> Any:
    """x[i, :, j]. By constants: movement. By data: rows are chosen from the axes that the indices stand at."""
    x, shape = ctx.lift(call["self"]), call.shapes[0]
    given = [(d, i) for d, i in enumerate(call["indices"]) if i is not None]
    if not any(hasattr(i, "neurons") for _, i in given):
        place = [None if i is None else i.cpu() for i in call["indices"]]
        return ctx.move(x, lambda t: call.run({"self": t, "indices": place}), shape)
    first, count = given[0][0], len(given)
    if [d for d, _ in given] != list(range(first, first + count)):
        return NotImplemented
    # One index of several dimensions is a mask over as many axes, or numbers that spread one axis over as many.
    lead = max(len(i.shape) for _, i in given)
    if count == 1 and len(shape) == x.ndim - lead + 1:
        count, lead = lead, 1
    if len(shape) != x.ndim - count + lead:
        return NotImplemented
    for _, i in given:
        if hasattr(i, "neurons"):
            _placed(ctx, i)
    chosen = range(first, first + count)
    rows = ctx.reduce(ctx.ordered(x, chosen), chosen)
    thin = (*rows.shape[:first], *[1] * lead, *rows.shape[first:])
    rows = ctx.move(rows, lambda t: t.reshape(thin), thin)
    return ctx.align(rows, type(x)(shape, fixed=ctx.positions(shape, range(first, first + lead))), shape=shape)


@rule("index_put", "_index_put_impl")
def written(ctx: Any, call: Any) -> Any:
    """x[i, :, j] = y at constant places: movement of both."""
    x, y, indices = ctx.lift(call["self"]), ctx.lift(call["values"]), call["indices"]
    if call["accumulate"] or any(hasattr(i, "neurons") for i in indices):
        return NotImplemented
    place = [None if i is None else i.cpu() for i in indices]
    return ctx.join([x, y], lambda t: t[0].clone().index_put_(place, t[1]), call.shapes[0])


@rule("torchvision::roi_align", "torchvision::roi_pool")
def regions(ctx: Any, call: Any) -> Any:
    """Boxes [n, 5] cut out of images: new images at new places, with the channels that were there."""
    _placed(ctx, ctx.lift(call["rois"]))
    x = ctx.lift(call["input"])
    return [ctx.windows(x, [0, *range(2, x.ndim)], (shape[0], *shape[2:])) for shape in call.shapes]
