"""Normalisation: what is averaged over permutes as one set; scales, shifts and running statistics ride along."""

from typing import Any

from fxmerge.rules.registry import rule


def _on_axis(ctx: Any, vector: Any, axis: Any, ndim: Any) -> Any:
    """A vector [n] laid along one axis of a value with ``ndim`` axes."""
    lay = [1] * ndim
    lay[axis] = vector.shape[0]
    return ctx.move(vector, lambda t: t.reshape(lay), lay)


def _affine(ctx: Any, x: Any, axis: Any, *vectors: Any) -> Any:
    given = [ctx.lift(v) for v in vectors if v is not None]
    return ctx.align(x, *(_on_axis(ctx, v, axis, x.ndim) for v in given), shape=x.shape)


@rule("batch_norm", "cudnn_batch_norm", "native_batch_norm", "instance_norm")
def batch_norm(ctx: Any, call: Any) -> Any:
    """Per channel (axis 1); running statistics are state of the channel like its scale."""
    x = call["input"]
    state = [ctx.state(s) for s in (call["running_mean"], call["running_var"]) if s is not None]
    return _affine(ctx, x, 1, call["weight"], call["bias"], *state)


@rule("layer_norm", "rms_norm")
def layer_norm(ctx: Any, call: Any) -> Any:
    """Over the trailing ``normalized_shape`` axes."""
    x = call["input"]
    dims = range(x.ndim - len(call["normalized_shape"]), x.ndim)
    given = [ctx.lift(v) for v in (call["weight"], call.get("bias")) if v is not None]
    return ctx.align(ctx.normalise(x, dims), *given, shape=x.shape)


@rule("group_norm")
def group_norm(ctx: Any, call: Any) -> Any:
    """Channels are ``num_groups`` blocks; each is normalised by itself."""
    x, groups = call["input"], call["num_groups"]
    split = (x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])
    y = ctx.normalise(ctx.move(x, lambda t: t.reshape(split), split), range(2, len(split)))
    y = ctx.move(y, lambda t: t.reshape(x.shape), x.shape)
    return _affine(ctx, y, 1, call["weight"], call["bias"])


@rule("softmax", "_softmax", "log_softmax", "_log_softmax", "special_softmax", "renorm", "softmin")
def softmax(ctx: Any, call: Any) -> Any:
    """Over one axis."""
    return ctx.normalise(call["self"], [call["dim"]])


@rule("_weight_norm")
def weight_norm(ctx: Any, call: Any) -> Any:
    """g * v / ||v||, the norm over all axes but one."""
    v, g = ctx.lift(call["v"]), ctx.lift(call["g"])
    others = [d for d in range(v.ndim) if d != call["dim"] % v.ndim]
    return ctx.align(ctx.normalise(v, others), g, shape=v.shape)


@rule("norm_except_dim")
def norm_except(ctx: Any, call: Any) -> Any:
    """The norm over all axes but one."""
    v = call["v"]
    return ctx.reduce(v, [d for d in range(v.ndim) if d != call["dim"] % v.ndim], keepdim=True)


@rule("local_response_norm")
def local_response(ctx: Any, call: Any) -> Any:
    """Neighbouring channels are mixed: their order matters."""
    return ctx.ordered(call["input"], [1])
