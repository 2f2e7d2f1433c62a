"""Pooling and resampling: neighbours are mixed along the trailing axes, neurons stay on the others."""

from typing import Any

from fxmerge.rules.registry import rule

TRAILING = {
    1: """
        max_pool1d avg_pool1d adaptive_avg_pool1d adaptive_max_pool1d max_pool1d_with_indices lp_pool1d
        upsample_linear1d upsample_nearest1d _upsample_nearest_exact1d
    """,
    2: """
        max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d max_pool2d_with_indices
        upsample_bilinear2d upsample_nearest2d upsample_bicubic2d _upsample_bicubic2d_aa _upsample_bilinear2d_aa
        _upsample_nearest_exact2d
    """,
    3: """
        max_pool3d avg_pool3d adaptive_avg_pool3d adaptive_max_pool3d max_pool3d_with_indices upsample_trilinear3d
        upsample_nearest3d _upsample_nearest_exact3d
    """,
}
COUNT = {name: n for n, names in TRAILING.items() for name in names.split()}


@rule(*COUNT)
def resampled(ctx: Any, call: Any) -> Any:
    """New places along the last axes, but for those where a window holds one entry."""
    x = ctx.lift(call["self"] if "self" in call.arguments else call["input"])
    n = COUNT[call.name]
    mixed = [d - n for d in range(n) if not (call.get("kernel_size") and _single(call, d, n))]
    return [ctx.windows(x, mixed, [shape[d] for d in mixed]) for shape in call.shapes]


def _single(call: Any, d: Any, n: Any) -> Any:
    """Whether a window along the d-th axis is one entry, each in its place."""

    def given(name: Any, default: Any) -> Any:
        values = list(call.get(name) or [default])
        return (values * n)[d]

    kernel = given("kernel_size", 0)
    return (kernel, given("stride", kernel), given("padding", 0)) == (1, 1, 0)


@rule("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def sampled(ctx: Any, call: Any) -> Any:
    """y[n, c, *place] is read from x[n, c] at the coordinates grid[n, *place]."""
    x, grid, shape = ctx.lift(call["input"]), ctx.lift(call["grid"]), call.shapes[0]
    space = range(2, x.ndim)
    last = grid.ndim - 1
    axes = type(x)(grid.shape, fixed=ctx.positions(grid.shape, [last]), learned=True, why="coordinates")
    grid = ctx.reduce(ctx.align(grid, axes, shape=grid.shape), [last])
    where = (shape[0], 1, *shape[2:])
    grid = ctx.move(grid, lambda t: t[:, None], where)
    return ctx.align(ctx.reduce(ctx.ordered(x, space), space, keepdim=True), grid, shape=shape)


@rule("fractional_max_pool2d", "fractional_max_pool3d")
def fractional(ctx: Any, call: Any) -> Any:
    """Windows by random numbers [batch, channels, axes] of every channel."""
    x, samples = ctx.lift(call["self"]), ctx.lift(call["random_samples"])
    samples = ctx.reduce(ctx.ordered(samples, [2]), [2])
    lead, n = samples.shape, x.ndim - samples.ndim
    lay = (*lead, *[1] * n)
    x = ctx.align(x, ctx.move(samples, lambda t: t.reshape(lay), lay), shape=x.shape)
    return [ctx.windows(x, range(x.ndim - n, x.ndim), shape[-n:]) for shape in call.shapes]


@rule("max_unpool2d", "max_unpool3d")
def unpooled(ctx: Any, call: Any) -> Any:
    """Maxima back where they came from, which the indices say by place in the channel."""
    x = ctx.align(ctx.lift(call["self"]), ctx.lift(call["indices"]))
    n = 2 if call.name == "max_unpool2d" else 3
    return ctx.windows(x, range(x.ndim - n, x.ndim), call.shapes[0][-n:])


@rule("col2im")
def folded(ctx: Any, call: Any) -> Any:
    """Columns [batch, channels * kernel, places] summed into images: the inverse layout of im2col."""
    x, shape = ctx.lift(call["self"]), call.shapes[0]
    kernel = call["kernel_size"][0] * call["kernel_size"][1]
    split = (*x.shape[:-2], x.shape[-2] // kernel, kernel, x.shape[-1])
    x = ctx.move(x, lambda t: t.reshape(split), split)
    return ctx.windows(x, [x.ndim - 2, x.ndim - 1], shape[-2:])
