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
        _upsample_nearest_exact2d grid_sampler grid_sampler_2d
    """,
    3: """
        max_pool3d avg_pool3d adaptive_avg_pool3d adaptive_max_pool3d max_pool3d_with_indices upsample_trilinear3d
        upsample_nearest3d
    """,
}
COUNT = {name: n for n, names in TRAILING.items() for name in names.split()}


@rule(*COUNT)
def resampled(ctx: Any, call: Any) -> Any:
    """New places along the last axes."""
    x = ctx.lift(call["self"] if "self" in call.arguments else call["input"])
    n = COUNT[call.name]
    grid = call.get("grid")
    if hasattr(grid, "neurons"):
        ctx.pin(grid, f"coordinates at {ctx.place}")
    dims = range(x.ndim - n, x.ndim)
    return [ctx.windows(x, dims, shape[-n:]) for shape in call.shapes]
