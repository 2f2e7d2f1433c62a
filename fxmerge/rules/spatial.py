"""Pooling and resampling: neighbours are mixed along the trailing axes, neurons stay on the others."""

from typing import Any

from fxmerge.rules.registry import rule

TRAILING = {
    1: """
        max_pool1d avg_pool1d adaptive_avg_pool1d adaptive_max_pool1d max_pool1d_with_indices lp_pool1d
        upsample_linear1d upsample_nearest1d
    """,
    2: """
        max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d max_pool2d_with_indices fractional_max_pool2d
        upsample_bilinear2d upsample_nearest2d upsample_bicubic2d _upsample_bicubic2d_aa _upsample_bilinear2d_aa
        _upsample_nearest_exact2d
    """,
    3: """
        max_pool3d avg_pool3d adaptive_avg_pool3d adaptive_max_pool3d max_pool3d_with_indices upsample_trilinear3d
        upsample_nearest3d
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
