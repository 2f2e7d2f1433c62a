"""Pointwise operations: entries that meet are related, axes that are broadcast are free."""

from typing import Any

from fxmerge.rules.registry import rule

UNARY_AND_UP = """
    abs acos acosh add addcdiv addcmul alias angle asin asinh atan atan2 atanh bernoulli bitwise_and bitwise_not
    bitwise_or bitwise_xor __and__ __or__ __xor__ ceil celu clamp clamp_max clamp_min clip clone conj contiguous
    copysign cos cosh deg2rad detach digamma div divide dropout elu eq erf erfc erfinv exp exp2 expm1
    alpha_dropout feature_dropout feature_alpha_dropout floor floor_divide fmax fmin fmod frac ge gelu greater
    greater_equal gt hardshrink hardsigmoid hardswish hardtanh heaviside hypot i0 isfinite isinf isnan isclose
    ldexp le leaky_relu lerp less less_equal lgamma lift lift_fresh log log10 log1p log2 logaddexp log_sigmoid
    logical_and logical_not logical_or logical_xor logit lt masked_fill maximum minimum mish mul multiply
    nan_to_num ne neg negative nextafter not_equal positive pow prelu reciprocal relu relu6 remainder round
    rrelu rsqrt rsub selu sgn sigmoid sign signbit silu sin sinc sinh softplus softshrink special_expit
    special_erf sqrt square sub subtract tan tanh threshold to _to_copy true_divide trunc type_as xlogy
    float half double bfloat16 _autocast_to_full_precision
    """.split()


def meeting(ctx: Any, call: Any) -> Any:
    """All tensors of a call, without plain numbers. Numbers taken out of a learned vector are neurons of it."""
    values = [ctx.lift(x) for x in call.tensors()]
    return [x for x in values if x.shape or x.neurons]


@rule(*UNARY_AND_UP)
def pointwise(ctx: Any, call: Any) -> Any:
    """f(a, b, ..) entry by entry, with broadcasting."""
    if call.name == "prelu":
        return prelu(ctx, call)
    values = meeting(ctx, call)
    shape = call.shapes[0]
    if call.name == "type_as":
        values = values[:1]
    if not values and not shape:  # numbers, learned ones among them
        return type(ctx.lift(None))((), learned=all(x.learned for x in call.labels()))
    if not values or any(len(v.shape) > len(shape) for v in values):
        return NotImplemented  # another overload of the same name
    return ctx.align(*values, shape=shape)


def prelu(ctx: Any, call: Any) -> Any:
    """One slope per channel (axis 1)."""
    x, weight = call["self"], ctx.lift(call["weight"])
    if weight.shape[0] == 1 or x.ndim < 2:
        return x
    lay = [1, weight.shape[0]] + [1] * (x.ndim - 2)
    return ctx.align(x, ctx.move(weight, lambda t: t.reshape(lay), lay), shape=x.shape)


@rule("glu")
def gated(ctx: Any, call: Any) -> Any:
    """One half gates the other: entry i is tied to entry i + n."""
    x, dim, shape = call["self"], call["dim"], call.shapes[0]
    value, gate = (ctx.move(x, lambda t, k=k: t.chunk(2, dim)[k], shape) for k in (0, 1))
    return ctx.align(value, gate, shape=shape)


@rule("tril", "triu")
def triangle(ctx: Any, call: Any) -> Any:
    """A triangle kept: the places along both axes differ."""
    x = call["self"]
    return ctx.ordered(x, [-1, -2])


@rule(
    "zeros_like",
    "ones_like",
    "full_like",
    "empty_like",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
    "rand_like",
    "randn_like",
    "fill",
    "zero",
)
def made_constant(ctx: Any, call: Any) -> Any:
    """A value that only takes a shape from its argument: no neuron stands in it."""
    number = ctx.lift(call.get("value"))
    return ctx.align(number, shape=call.shapes[0])


@rule("copy")
def copied(ctx: Any, call: Any) -> Any:
    """dst.copy_(src): the entries of src, broadcast."""
    source = ctx.lift(call["src"])
    return ctx.align(source, shape=call.shapes[0])
