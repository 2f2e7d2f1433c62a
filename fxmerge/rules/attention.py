"""Attention: query and key dimensions are tied inside a head, values ride with their keys, heads are batch."""

from typing import Any

import torch

from fxmerge.rules.affine import _lead
from fxmerge.rules.registry import rule


@rule("scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu")
def attention(ctx: Any, call: Any) -> Any:
    """softmax(q k' + mask) v; the leading axes (heads) are batch axes."""
    q, k, v = (ctx.lift(call[name]) for name in ("query", "key", "value"))
    mask = call.get("attn_mask")
    if call.get("enable_gqa") and k.shape[-3] != q.shape[-3]:
        k, v = (_repeat_heads(ctx, x, q.shape[-3] // x.shape[-3]) for x in (k, v))
    lead = _lead(q.ndim - 2)
    scores = ctx.contract([(q, [*lead, "l", "e"]), (k, [*lead, "s", "e"])], [*lead, "l", "s"])
    if call["is_causal"]:
        scores = ctx.ordered(scores, [-1, -2])
    if mask is not None:
        scores = ctx.align(scores, ctx.lift(mask), shape=scores.shape)
    weights = ctx.normalise(scores, [-1])
    return ctx.contract([(weights, [*lead, "l", "s"]), (v, [*lead, "s", "e"])], [*lead, "l", "e"])


def _repeat_heads(ctx: Any, x: Any, times: Any) -> Any:
    shape = (*x.shape[:-3], x.shape[-3] * times, *x.shape[-2:])
    return ctx.move(x, lambda t: torch.repeat_interleave(t, times, -3), shape)
