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


@rule("view_as_complex")
def complex_of(ctx: Any, call: Any) -> Any:
    """The two entries of the last axis become one number; which is the real part matters."""
    x = ctx.lift(call["self"])
    return ctx.reduce(ctx.ordered(x, [-1]), [-1])


@rule("view_as_real")
def parts_of(ctx: Any, call: Any) -> Any:
    """Real and imaginary part, on a last axis of two places."""
    x, shape = ctx.lift(call["self"]), call.shapes[0]
    x = ctx.move(x, lambda t: t.unsqueeze(-1), (*x.shape, 1))
    two = (1,) * (x.ndim - 1) + (2,)
    return ctx.align(x, type(x)(two, fixed=ctx.positions(two)), shape=shape)
