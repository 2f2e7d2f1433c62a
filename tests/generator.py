"""Random small networks, for properties that must hold of any.

``networks()`` draws a ``Program``: a list of modules and, for each, which earlier values it reads. The program is
drawn first and fixed, so that ``torch.fx.symbolic_trace`` unrolls it. Every value is read by a later step, hence no
neuron is without effect.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from networks import conv, randomise
from torch import Tensor, nn

# --------------------------------------------------------------------------------------------------------------
# Programs and their steps
# --------------------------------------------------------------------------------------------------------------


class Program(nn.Module):
    """Runs ``steps[i]`` on the values ``sources[i]``; value 0 is the input, value i + 1 the result of step i."""

    def __init__(self, steps: Sequence[nn.Module], sources: Sequence[tuple[int, ...]], example: Tensor) -> None:
        super().__init__()
        self.steps, self.sources, self.example = nn.ModuleList(steps), tuple(sources), example

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for step, sources in zip(self.steps, self.sources, strict=True):
            values.append(step(*(values[s] for s in sources)))
        return values[-1]

    def __repr__(self) -> str:  # what hypothesis shows of a failing example
        rows = (f"{i + 1}: {step} of {s}" for i, (step, s) in enumerate(zip(self.steps, self.sources, strict=True)))
        return "\n".join([f"Program on {tuple(self.example.shape)}", *rows])


class Apply(nn.Module):
    """A function without parameters as a step."""

    def __init__(self, name: str, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.name, self.function = name, function

    def forward(self, *x: Tensor) -> Tensor:
        return self.function(*x)

    def extra_repr(self) -> str:
        return self.name


def add(x: Tensor, y: Tensor) -> Tensor:
    return x + y


def concatenate(*x: Tensor) -> Tensor:
    return torch.cat(x, dim=1)


def shuffle(groups: int, x: Tensor) -> Tensor:
    b, c, h, w = x.shape[0], x.shape[1], x.shape[2], x.shape[3]
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, c, h, w)


def roll_half(channels: int, x: Tensor) -> Tensor:
    return torch.cat([torch.roll(x[:, :channels], 1, dims=2), x[:, channels:]], dim=1)


def double(x: Tensor) -> Tensor:
    return torch.cat([torch.tanh(x), torch.sigmoid(x)], dim=1)


ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh, "elu": F.elu}


class LayerNormChannels(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.silu(self.down(x.mean((2, 3), keepdim=True)))))


class SpatialGate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = conv(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        seen = torch.cat([x.mean(1, keepdim=True), x.pow(2).mean(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.map(seen))


class GatedConv(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = conv(inputs, 2 * outputs)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.conv(x).chunk(2, dim=1)
        return value * torch.sigmoid(gate)


class PartialConv(nn.Module):
    """Convolves the first ``part`` channels and passes the rest on."""

    def __init__(self, part: int, outputs: int) -> None:
        super().__init__()
        self.part, self.conv = part, conv(part, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.conv(x[:, : self.part]), x[:, self.part :]], dim=1)


class PaddedShortcut(nn.Module):
    """A convolution to more channels, with the input added somewhere in the middle."""

    def __init__(self, channels: int, before: int, after: int) -> None:
        super().__init__()
        self.conv, self.pad = conv(channels, channels + before + after), (0, 0, 0, 0, before, after)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.tanh(x)) + F.pad(x, self.pad)


class RootMeanSquare(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Perceptron(nn.Module):
    """``kind``: "plain", "two" (gated by a second layer) or "chunk" (gated by the second half of one)."""

    def __init__(self, width: int, hidden: int, kind: str) -> None:
        super().__init__()
        self.kind, self.down = kind, nn.Linear(hidden, width)
        self.up = nn.Linear(width, 2 * hidden if kind == "chunk" else hidden)
        if kind == "two":
            self.gate = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        if self.kind == "two":
            y = y * F.silu(self.gate(x))
        elif self.kind == "chunk":
            a, b = y.chunk(2, dim=-1)
            y = a * torch.sigmoid(b)
        else:
            y = F.gelu(y)
        return self.down(y)


class TokenMixing(nn.Module):
    def __init__(self, tokens: int, hidden: int) -> None:
        super().__init__()
        self.mix = nn.Sequential(nn.Linear(tokens, hidden), nn.GELU(), nn.Linear(hidden, tokens))

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x.transpose(1, 2)).transpose(1, 2)


class ClassToken(nn.Module):
    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.token, self.position = nn.Parameter(torch.empty(1, 1, width)), nn.Parameter(torch.empty(tokens + 1, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.position


class Attention(nn.Module):
    """``kind``: "separate", "packed", "by hand", "shared" (one key-value head), "rotary" or "norm" (query-key norm)."""

    def __init__(self, width: int, heads: int, dim: int, tokens: int, kind: str) -> None:
        super().__init__()
        self.heads, self.dim, self.kind = heads, dim, kind
        kv = dim if kind == "shared" else heads * dim
        if kind == "packed":
            self.qkv = nn.Linear(width, 3 * kv)
        else:
            self.q, self.k, self.v = nn.Linear(width, heads * dim), nn.Linear(width, kv), nn.Linear(width, kv)
        self.out = nn.Linear(heads * dim, width)
        if kind == "rotary":
            angles = torch.outer(torch.arange(float(tokens)), 0.3 ** torch.arange(dim // 2)).repeat(1, 2)
            self.register_buffer("cos", angles.cos())
            self.register_buffer("sin", angles.sin())
        if kind == "norm":
            self.norm = RootMeanSquare(dim)

    def extra_repr(self) -> str:
        return f"{self.kind}, {self.heads} heads of {self.dim}"

    def split(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], x.shape[1], -1, self.dim).transpose(1, 2)

    def rotate(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat([-b, a], dim=-1) * self.sin

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "packed":
            qkv = self.qkv(x).reshape(x.shape[0], x.shape[1], 3, self.heads, self.dim)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        if self.kind == "rotary":
            q, k = self.rotate(q), self.rotate(k)
        if self.kind == "norm":
            q, k = self.norm(q), self.norm(k)
        if self.kind in ("by hand", "shared"):
            y = (q @ k.transpose(-2, -1) * self.dim**-0.5).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))


class PackedAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


# --------------------------------------------------------------------------------------------------------------
# Drawing
# --------------------------------------------------------------------------------------------------------------


class _Draft:
    """A program being drawn. ``shape[v]`` is (channels, size) of an image value, (tokens, width) of a sequence."""

    def __init__(self, draw: st.DrawFn, shape: tuple[int, int], widest: int) -> None:
        self._draw, self.widest = draw, widest
        self.steps: list[nn.Module] = []
        self.sources: list[tuple[int, ...]] = []
        self.shape = [shape]
        self.first_knows = True  # whether the first token depends on the input

    def pick(self, *options: Any) -> Any:
        return self._draw(st.sampled_from(options))

    def number(self, low: int, high: int) -> int:
        return self._draw(st.integers(low, max(low, high)))

    @property
    def last(self) -> int:
        return len(self.steps)

    def do(self, step: nn.Module, shape: tuple[int, int], *sources: int) -> None:
        self.sources.append(sources or (self.last,))
        self.steps.append(step)
        self.shape.append(shape)

    def apply(self, name: str, function: Callable[..., Tensor], shape: tuple[int, int], *sources: int) -> None:
        self.do(Apply(name, function), shape, *sources)

    def activate(self) -> None:
        name = self.pick(*ACTIVATIONS)
        self.apply(name, ACTIVATIONS[name], self.shape[-1])

    def image_step(self, nested: bool = False) -> None:
        """One step on an image value, of the kinds that its shape allows."""
        c, s = self.shape[-1]
        start = self.last
        groups = [g for g in (2, 3) if c % g == 0]
        alike = [v for v in range(1, start) if self.shape[v] == (c, s)]
        same_size = [v for v in range(1, start) if self.shape[v][1] == s and self.shape[v][0] + c <= 2 * self.widest]
        kinds = ["conv", "norm", "depthwise", "excite", "gate", "glu", "pad", "prelu", "shared", "double", "layer norm"]
        kinds += ["grouped", "shuffle", "group norm"] * bool(groups and c > 2)
        kinds += ["add"] * bool(alike) + ["cat"] * bool(same_size) + ["partial"] * (c > 1)
        kinds += (
            ["roll"] * (c > 1 and s >= 4)
            + ["pool"] * (s >= 4)
            + ["grow"] * (s <= 2)
            + ["unshuffle"] * (s >= 4 and c * 4 <= 2 * self.widest)
        )
        kinds += ["pixel shuffle"] * (c % 4 == 0 and s <= 2) + ["residual"] * (not nested)
        kind = self.pick(*kinds)
        if kind == "conv":
            new = self.number(2, self.widest)
            self.do(conv(c, new, self.pick(1, 3), bias=self.pick(True, False)), (new, s))
            self.activate()
        elif kind == "norm":
            self.do(self.pick(nn.BatchNorm2d(c), nn.InstanceNorm2d(c, affine=True), nn.GroupNorm(1, c)), (c, s))
        elif kind == "layer norm" and c > 2:
            self.do(LayerNormChannels(c), (c, s))
        elif kind == "group norm":
            self.do(nn.GroupNorm(self.pick(*groups), c), (c, s))
        elif kind == "depthwise":
            times = self.pick(1, 2) if 2 * c <= self.widest else 1
            self.do(conv(c, times * c, groups=c), (times * c, s))
            self.activate()
        elif kind == "grouped":
            g = self.pick(*groups)
            new = g * self.number(1, max(1, self.widest // g))
            self.do(conv(c, new, groups=g), (new, s))
            self.activate()
        elif kind == "shuffle":
            g = self.pick(*groups)
            self.apply(f"shuffle {g}", partial(shuffle, g), (c, s))
            self.do(conv(c, c, groups=self.pick(1, *groups)), (c, s))  # see ``networks`` for why a convolution follows
            self.activate()
        elif kind == "excite":
            self.do(SqueezeExcite(c, self.number(2, 3)), (c, s))
        elif kind == "gate":
            self.do(SpatialGate(), (c, s))
        elif kind == "glu":
            new = self.number(2, self.widest)
            self.do(GatedConv(c, new), (new, s))
        elif kind == "pad" and c < self.widest:
            before = self.number(0, self.widest - c - 1)
            after = self.number(0 if before else 1, self.widest - c - before)
            self.do(PaddedShortcut(c, before, after), (c + before + after, s))
        elif kind == "prelu":
            self.do(nn.PReLU(c), (c, s))
        elif kind == "shared":
            layer = conv(c, c)
            for _ in range(2):
                self.do(layer, (c, s))
                self.activate()
        elif kind == "double" and 2 * c <= self.widest:
            self.apply("tanh beside sigmoid", double, (2 * c, s))
        elif kind == "partial":
            part, new = self.number(1, c - 1), self.number(1, self.widest // 2)
            self.do(PartialConv(part, new), (new + c - part, s))
        elif kind == "roll":
            part = self.number(1, c - 1)
            self.apply(f"roll {part}", partial(roll_half, part), (c, s))
            self.do(conv(c, new := self.number(2, self.widest)), (new, s))
            self.activate()
        elif kind == "add":
            self.apply("add", add, (c, s), start, self.pick(*alike))
            self.activate()
        elif kind == "cat":
            other = self.pick(*same_size)
            self.apply("cat", concatenate, (c + self.shape[other][0], s), *self.pick((start, other), (other, start)))
        elif kind == "pool":
            self.do(self.pick(nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(s // 2)), (c, s // 2))
        elif kind == "grow":
            self.do(nn.Upsample(scale_factor=2, mode=self.pick("nearest", "bilinear")), (c, 2 * s))
        elif kind == "unshuffle":
            self.do(nn.PixelUnshuffle(2), (4 * c, s // 2))
        elif kind == "pixel shuffle":
            self.do(nn.PixelShuffle(2), (c // 4, 2 * s))
        elif kind == "residual":
            self.image_step(nested=True)
            if self.shape[-1][1] == s:
                self.do(conv(self.shape[-1][0], c), (c, s))
                self.apply("add", add, (c, s), self.last, start)
        else:
            self.activate()

    def token_step(self) -> None:
        """One pre-norm residual branch on a sequence, or a class token."""
        t, d = shape = self.shape[-1]
        start = self.last
        kind = self.pick("perceptron", "attention", "attention", "multihead", "mixing", "token")
        if kind == "token":
            self.do(ClassToken(t, d), (t + 1, d))
            self.first_knows = False
            return
        self.first_knows |= kind != "perceptron"
        norm = self.pick("layer", "root mean square", "none")
        if norm != "none":
            self.do(nn.LayerNorm(d) if norm == "layer" else RootMeanSquare(d), shape)
        if kind == "perceptron":
            self.do(Perceptron(d, self.number(2, 5), self.pick("plain", "two", "chunk")), shape)
        elif kind == "mixing":
            self.do(TokenMixing(t, self.number(2, 4)), shape)
        elif kind == "multihead":
            self.do(PackedAttention(d, 2 if d % 2 == 0 else 1), shape)
        else:
            variant = self.pick("separate", "packed", "by hand", "shared", "rotary", "norm")
            dim = {"rotary": self.pick(2, 4), "norm": 3}.get(variant) or self.pick(2, 3)
            self.do(Attention(d, self.pick(1, 2), dim, t, variant), shape)
        self.apply("add", add, shape, self.last, start)

    def finish(self) -> Program:
        example = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
        return randomise(Program(self.steps, self.sources, example).eval(), seed=0).double()


@st.composite
def networks(draw: st.DrawFn, tiny: bool = False) -> Program:
    """A network on images of 3 x 4 x 4, some with a sequence part; ``tiny``: at most 4 channels and few steps.

    Left out are networks with symmetries that are no permutation of whole neurons, since classes cannot hold them:
    channels added to a shuffled copy of themselves (the two tied channels of a pair may exchange), and channels
    moved along an axis that is averaged later (the move is undone). So a convolution follows shuffle and roll.
    """
    draft = _Draft(draw, (3, 4), widest=4 if tiny else 8)
    width = draft.number(2, draft.widest)
    draft.do(conv(3, width), (width, 4))
    draft.activate()
    for _ in range(draft.number(1, 2 if tiny else 5)):
        draft.image_step()
    c, s = draft.shape[-1]
    tail = draft.pick("mean", "mean", "flatten", "tokens", "tokens")
    if tail == "tokens":
        if s > 2:
            draft.do(nn.AvgPool2d(s // 2), (c, 2))
        width = draft.pick(3, 4) if tiny else draft.pick(4, 6)
        draft.do(nn.Conv2d(c, width, 1), (width, 2))
        draft.apply("tokens", lambda x: x.flatten(2).transpose(1, 2), (4, width))
        for _ in range(draft.number(1, 1 if tiny else 3)):
            draft.token_step()
        draft.activate()
        t, width = draft.shape[-1]
        read = draft.pick("mean", "all", *["first"] * draft.first_knows)
        if read == "all":
            draft.apply("flatten", lambda x: x.flatten(1), (t * width, 1))
        else:
            draft.apply(read, lambda x: x.mean(1) if read == "mean" else x[:, 0], (width, 1))
    elif tail == "flatten":
        size = min(s, 2)
        draft.do(nn.Sequential(nn.AdaptiveAvgPool2d(size), nn.Flatten()), (c * size * size, 1))
        hidden = draft.number(2, 5)
        draft.do(nn.Linear(draft.shape[-1][0], hidden), (hidden, 1))
        draft.activate()
    else:
        draft.activate()
        draft.apply("mean", lambda x: x.mean((2, 3)), (c, 1))
    draft.do(nn.Linear(draft.shape[-1][0], 3), (3, 1))
    return draft.finish()
