"""Symmetric reductions: what is reduced over must permute as one set."""

from dataclasses import replace
from typing import Any

from fxmerge.rules.choice import named
from fxmerge.rules.registry import rule


@rule(
    "sum",
    "mean",
    "amax",
    "amin",
    "aminmax",
    "prod",
    "logsumexp",
    "linalg_vector_norm",
    "norm",
    "var",
    "std",
    "var_mean",
    "std_mean",
    "nansum",
    "nanmean",
    "all",
    "any",
    "frobenius_norm",
    "max",
    "min",
    "count_nonzero",
)
def reduced(ctx: Any, call: Any) -> Any:
    """One value per remaining index."""
    operands = call.tensors()
    if call.name in ("max", "min") and len(operands) > 1:
        return ctx.align(*map(ctx.lift, operands), shape=call.shapes[0])  # the pointwise overload
    x = call["self"]
    dims = call.get("dim")
    if dims is None or dims == []:
        dims = list(range(x.ndim))
    dims = list(dims) if isinstance(dims, (list, tuple)) else [dims]
    keepdim = bool(call.get("keepdim", False))
    if call.name in ("max", "min") and call.get("dim") is not None:
        out = ctx.reduce(x, dims, keepdim)
        return [out, replace(out, order=named(x, dims[0] % x.ndim))]
    out = ctx.reduce(x, dims, keepdim)
    return [out] * len(call.shapes)


@rule("cosine_similarity", "pairwise_distance")
def compared(ctx: Any, call: Any) -> Any:
    """Two vectors compared over one axis, entry by entry."""
    both = ctx.align(ctx.lift(call["x1"]), ctx.lift(call["x2"]))
    return ctx.reduce(both, [call.get("dim", -1)], bool(call.get("keepdim", False)))
