"""A zoo of tiny networks with the order of their symmetry group, worked out by hand.

Each class below is one network; ``@network(order, *inputs)`` enters it in ``NETWORKS``. The order counts the
permutations of neurons that leave the function unchanged whatever the parameters are: ``f(8) * f(16)`` says that
eight neurons permute freely, and sixteen others do, independently. ``f(2) * f(4) ** 2`` says that two blocks may be
swapped and the four neurons inside each of the two permute. All formulas name their factors in forward order,
blocks before what they hold.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import factorial as f

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Case:
    """One network of the zoo.

    Attributes:
        make: builds it in eval mode with every parameter and BatchNorm buffer random.
        example_inputs: the positional arguments of a call.
        order: the order of the group of neuron permutations that keep the function.
        exact: whether the compiler is to find all of them; where not, it may pin, but find nothing false.
        unknown: operations without a rule that are there on purpose.
        stacks: (parameter, axis) -> the axis of which every row has neurons of its own on it.
    """

    make: Callable[[], nn.Module]
    example_inputs: tuple[Tensor, ...]
    order: int
    exact: bool = True
    unknown: tuple[str, ...] = ()
    stacks: Mapping[tuple[str, int], int] = field(default_factory=dict)


NETWORKS: dict[str, Case] = {}

_seeded = torch.Generator().manual_seed(0)
IMAGE = torch.randn(2, 3, 8, 8, generator=_seeded)
SIGNAL = torch.randn(2, 3, 12, generator=_seeded)
TOKENS = torch.randn(2, 6, 5, generator=_seeded)
POINT = torch.randn(3, 5, generator=_seeded)
OTHER = torch.randn(3, 4, generator=_seeded)
WORDS = torch.tensor([[0, 1, 2, 3, 4, 5], [6, 3, 1, 5, 0, 2]])


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Fill parameters and BatchNorm buffers with random values, so that nothing is symmetric by accident."""
    generator = torch.Generator().manual_seed(seed)

    def normal(t: Tensor, scale: float) -> Tensor:
        return (torch.randn(t.shape, generator=generator) * scale).to(t)

    with torch.no_grad():
        for p in model.parameters():
            fan_in = p[0].numel() if p.dim() > 1 else 1
            p.copy_(normal(p, fan_in**-0.5 if p.dim() > 1 else 0.5) + (p.dim() == 1) * 0.5)
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.copy_(normal(b, 0.3))
            elif name.endswith("running_var"):
                b.copy_(0.5 + normal(b, 1.0).abs())
    return model


def network(
    order: int,
    *inputs: Tensor,
    exact: bool = True,
    unknown: tuple[str, ...] = (),
    stacks: Mapping[tuple[str, int], int] | None = None,
) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Enter a class into ``NETWORKS`` under its name in snake case."""

    def enter(cls: type[nn.Module]) -> type[nn.Module]:
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()
        assert name not in NETWORKS, name
        NETWORKS[name] = Case(lambda: randomise(cls().eval(), seed=0), inputs, order, exact, unknown, stacks or {})
        return cls

    return enter


# --------------------------------------------------------------------------------------------------------------
# Perceptrons
# --------------------------------------------------------------------------------------------------------------


@network(f(8) * f(16), POINT)  # the two hidden layers
class Mlp(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))


@network(f(8) * f(6), POINT)  # BatchNorm's four vectors ride along
class MlpBatchNorm(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(),
            nn.Linear(8, 6), nn.BatchNorm1d(6), nn.GELU(), nn.Linear(6, 3),
        )  # fmt: skip


@network(f(8), POINT)  # no bias, no nonlinearity: permutations all the same
class MlpWithoutBias(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(5, 8, bias=False), nn.Dropout(0.1), nn.Linear(8, 3, bias=False))


@network(f(8), POINT)  # stem, the shared layer's input and output: all one class, since its output is its input
class TiedLinears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two, self.head = (nn.Linear(*s) for s in ((5, 8), (8, 8), (8, 8), (8, 3)))
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.two(torch.tanh(self.one(torch.tanh(self.stem(x)))))))


@network(f(8), POINT)  # one state, however often the cell runs
class ModuleCalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.read, self.step, self.head = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.read(x))
        for _ in range(2):
            h = torch.tanh(self.read(x) + self.step(h))
        return self.head(h)


@network(f(6), POINT)  # one layer registered twice: two names for each of its parameters
class ModuleUnderTwoNames(nn.Sequential):
    def __init__(self) -> None:
        layer = nn.Linear(6, 6)
        super().__init__(nn.Linear(5, 6), nn.Tanh(), layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(6, 3))


@network(f(6) * f(2) ** 6, POINT)  # six units, each the larger of two interchangeable pieces
class Maxout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, 12), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x).view(-1, 6, 2).max(-1).values)


@network(f(4), POINT)  # a half gates the other, so channels go by pairs; whatever joins them knows first and second
class HalvesJoinedByLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix, self.head = nn.Linear(5, 8), nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        value, gate = x.chunk(2, 1)
        return self.head(x + self.mix(value * gate.sigmoid()))


@network(f(3), POINT)  # three pairs, of which the second has its first channel behind
class PairsInAnyOrder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pairs, self.head = nn.Linear(5, 6), nn.Linear(3, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        return self.head(x) + self.pairs(x[:, [0, 3, 4]] * x[:, [2, 1, 5]].sigmoid())


@network(f(2) * 2 * 3**2, POINT, exact=False)  # two alone, and two rings of three that turn and swap
class Rings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        return self.head(x * x[:, [0, 2, 3, 1, 4, 7, 5, 6]].sigmoid())


@network(f(4), POINT, exact=False)  # every product of two hidden neurons moves with both: no tree of classes
class ProductsWithEachOther(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, 4), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        return self.head((x[:, :, None] * x[:, None].sigmoid()).flatten(1))


@network(f(4), POINT)  # the hidden layer; the three numbers are each a layer's own
class NumbersOutOfVector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.empty(3)), nn.Linear(4, 2)
        self.one, self.two, self.three = (nn.Linear(5, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale.softmax(0)
        chosen = torch.where(x[:, :1] > 0, self.two(x), scale[2])
        return self.head(torch.tanh(scale[0] * self.one(x) + scale[1] * chosen + self.three(x)))


@network(f(4) * f(6), POINT)  # stream; gate and value of a unit move together and do not exchange
class GluByChunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate, self.head = nn.Linear(5, 4), nn.Linear(4, 12), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.gate(torch.tanh(self.stem(x))).chunk(2, dim=-1)
        return self.head(a * torch.sigmoid(b))


@network(f(6), POINT)  # the same by F.glu
class GluByFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.head = nn.Linear(5, 12), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.glu(self.gate(x), dim=-1))


@network(f(4), POINT)  # positive and negative part of a unit are two copies of it
class Crelu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, 4), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        return self.head(torch.cat([F.relu(h), F.relu(-h)], dim=1))


@network(f(4) * f(3) ** 4, POINT)  # neurons; the three columns that read copies of one exchange
class RepeatedFeatures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, 4), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.stem(x)).repeat(1, 3))


@network(f(2) * f(2) * f(3) * f(6), POINT)  # stream cut in three by two overlapping slices; the layer both write to
class SlicesOfAStream(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.low, self.high, self.head = (nn.Linear(*s) for s in ((5, 7), (4, 6), (5, 6), (6, 3)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.stem(x))
        return self.head(F.silu(self.low(x[:, :4]) + self.high(x[:, 2:])))


@network(f(6) * f(5), POINT)  # two layers by einsum, a bias added by hand
class EinsumLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.bias = nn.Parameter(torch.empty(5, 6)), nn.Parameter(torch.empty(6))
        self.b, self.head = nn.Parameter(torch.empty(5, 6)), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(torch.einsum("bi,io->bo", x, self.a) + self.bias)
        return self.head(F.gelu(torch.einsum("bi,oi->bo", x, self.b)))


@network(f(6) * f(4), POINT)  # x @ W + b, then F.linear, then the transpose of the same weight: 6 -> 4 -> 6
class FunctionalLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.empty(5, 6)), nn.Parameter(torch.empty(6))
        self.v, self.head = nn.Parameter(torch.empty(4, 6)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x @ self.w + self.b)
        x = torch.tanh(F.linear(x, self.v))
        return self.head(torch.tanh(torch.matmul(x, self.v)))


@network(f(8), POINT)  # autoencoder: the decoder is the encoder's transpose, inputs and outputs pinned
class TiedAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.b, self.c = (nn.Parameter(torch.empty(*s)) for s in ((8, 5), (8,), (5,)))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, self.w, self.b)), self.w.t(), self.c)


@network(f(3) * f(4), POINT)  # rows of the first weight, rows of the second: two classes in one layer
class WeightsConcatenated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Parameter(torch.empty(3, 5)), nn.Parameter(torch.empty(4, 5))
        self.bias, self.head = nn.Parameter(torch.empty(7)), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(F.linear(x, torch.cat([self.one, self.two]), self.bias)))


@network(f(4) * f(6) * f(5), POINT)  # both factors and the product
class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.product = nn.Linear(5, 4), nn.Linear(5, 6), nn.Bilinear(4, 6, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.product(torch.tanh(self.one(x)), torch.tanh(self.two(x)))))


@network(f(6) * f(4), POINT, OTHER)  # two inputs into one hidden layer, one input again into the next
class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.mix, self.head = (nn.Linear(*s) for s in ((5, 6), (4, 6), (10, 4), (4, 3)))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = torch.tanh(self.one(x) + self.two(y))
        return self.head(torch.tanh(self.mix(torch.cat([h, y], dim=-1))))


@network(f(6) * f(4), POINT)  # outputs in a dict and a tuple are pinned, hidden layers are not
class NestedOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.left, self.right = (nn.Linear(*s) for s in ((5, 6), (6, 4), (6, 3), (4, 2)))

    def forward(self, x: Tensor) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
        h = torch.tanh(self.stem(x))
        g = torch.tanh(self.inner(h))
        return {"left": self.left(h), "rest": (self.right(g), self.right(-g))}


@network(f(6), POINT)  # a second hidden layer is returned, which pins it
class FeaturesReturned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.features, self.head = nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.features(torch.tanh(self.stem(x))))
        return self.head(h), h


@network(f(4) * f(6), POINT)  # softmax over neurons asks only that they be one set
class SoftmaxGate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.hidden, self.head = nn.Linear(5, 4), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(torch.tanh(self.stem(x)))
        return self.head(h * h.softmax(dim=-1))


# Operations that fix the place of what they touch, behind a layer that stays free.


@network(f(4), POINT)  # a running sum knows the places of its six neurons
class CumulativeSum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.hidden, self.head = nn.Linear(5, 4), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(torch.tanh(self.stem(x))).cumsum(dim=1))


# Sorting forgets the order of its six inputs, and remembers that of its outputs.
@network(f(4) * f(6), POINT, exact=False)
class Sort(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.hidden, self.head = nn.Linear(5, 4), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.sort(self.hidden(torch.tanh(self.stem(x))), dim=1)[0])


@network(f(4), POINT)  # the index of the winner is the output
class Argmax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.hidden = nn.Linear(5, 4), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.hidden(torch.tanh(self.stem(x)))
        return h.argmax(dim=1), h.logsumexp(dim=1)


# No rule: the six neurons it touches are pinned, in and out. In truth amplitudes survive rotations and reflections of
# the six inputs, and two pairs of the outputs are equal.
@network(f(4) * 12 * 2 * 2, POINT, exact=False, unknown=("fft",))
class UnknownOperation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.hidden, self.head = nn.Linear(5, 4), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.fft.fft(self.hidden(torch.tanh(self.stem(x))), dim=1).abs())


class _ScaledByBuffer(nn.Module):
    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.stem, self.hidden, self.head = nn.Linear(5, 4), nn.Linear(4, 6), nn.Linear(6, 3)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(torch.tanh(self.stem(x))) * self.scale))


@network(f(4), POINT)  # six different constants tell the neurons apart
class DistinctConstants(_ScaledByBuffer):
    def __init__(self) -> None:
        super().__init__(torch.linspace(0.5, 1.5, 6))


@network(f(4) * f(6), POINT)  # six equal ones do not
class EqualConstants(_ScaledByBuffer):
    def __init__(self) -> None:
        super().__init__(torch.full((6,), 0.7))


# --------------------------------------------------------------------------------------------------------------
# Convolutional networks: stem, body, global pooling, linear head
# --------------------------------------------------------------------------------------------------------------


def conv(inputs: int, outputs: int, kernel: int = 3, **options: int) -> nn.Conv2d:
    """A convolution that keeps the size of the image."""
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


class _Image(nn.Module):
    """Stem to ``stem`` channels, then ``body``, then a head that reads ``width``."""

    def __init__(self, stem: int, width: int) -> None:
        super().__init__()
        self.stem, self.head = conv(3, stem), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(F.relu(self.stem(x))).mean((2, 3)))


@network(f(6) * f(5), IMAGE)
class ConvChain(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            conv(6, 5), nn.BatchNorm2d(5), nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2),
        )  # fmt: skip


@network(f(6) * f(4), IMAGE)  # stream, inner layer
class ResidualIdentity(_Image):
    def __init__(self) -> None:
        super().__init__(6, 6)
        self.inner, self.norm, self.outer = conv(6, 4), nn.BatchNorm2d(4), conv(4, 6)

    def body(self, x: Tensor) -> Tensor:
        y = self.outer(F.relu(self.norm(self.inner(x)), inplace=True))
        y += x
        return F.relu(y)


@network(f(4) * f(5) * f(6), IMAGE)  # stem, inner layer, the stream after the projection
class ResidualProjection(_Image):
    def __init__(self) -> None:
        super().__init__(4, 6)
        self.inner, self.outer, self.shortcut = conv(4, 5, stride=2), conv(5, 6), nn.Conv2d(4, 6, 1, 2)

    def body(self, x: Tensor) -> Tensor:
        return F.relu(self.outer(F.relu(self.inner(x))) + self.shortcut(x))


@network(f(4) * f(3) * f(5), IMAGE)  # the stem's four inside seven, the three padded ones around them, the inner layer
class ZeroPaddedShortcut(_Image):
    def __init__(self) -> None:
        super().__init__(4, 7)
        self.inner, self.outer = conv(4, 5, stride=2), conv(5, 7)

    def body(self, x: Tensor) -> Tensor:
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 2))
        return F.relu(self.outer(F.relu(self.inner(x))) + shortcut)


@network(f(4) * f(3) * f(2), IMAGE)  # each piece of the growing concatenation is a class, BatchNorms over it included
class DenseBlock(_Image):
    def __init__(self) -> None:
        super().__init__(4, 9)
        self.norm1, self.conv1, self.norm2, self.conv2 = nn.BatchNorm2d(4), conv(4, 3), nn.BatchNorm2d(7), conv(7, 2)
        self.norm3 = nn.BatchNorm2d(9)

    def body(self, x: Tensor) -> Tensor:
        x = torch.cat([x, self.conv1(F.relu(self.norm1(x)))], 1)
        x = torch.cat([x, self.conv2(F.relu(self.norm2(x)))], 1)
        return F.relu(self.norm3(x))


@network(f(5) * f(3) * f(2) * f(4) * f(2), IMAGE)  # stem, short branch, long branch's two layers, pooled branch
class Inception(_Image):
    def __init__(self) -> None:
        super().__init__(5, 9)
        self.short, self.reduce, self.long, self.pooled = conv(5, 3, 1), conv(5, 2, 1), conv(2, 4), conv(5, 2, 1)

    def body(self, x: Tensor) -> Tensor:
        pooled = F.max_pool2d(x, 3, stride=1, padding=1)
        return F.relu(torch.cat([self.short(x), self.long(F.relu(self.reduce(x))), self.pooled(pooled)], 1))


# Two grouped convolutions with a shuffle between: the first has two groups of stem channels (f(2) * f(4)**2), the
# second two groups that each take two channels from either group of the first (f(2); f(2)**4), and give f(4)**2.
@network(f(2) * f(4) ** 2 * f(2) * f(2) ** 4 * f(4) ** 2, IMAGE)
class ChannelShuffle(_Image):
    def __init__(self) -> None:
        super().__init__(8, 8)
        self.one, self.two = conv(8, 8, groups=2), conv(8, 8, groups=2)

    def body(self, x: Tensor) -> Tensor:
        x = F.relu(self.one(x))
        x = x.view(-1, 2, 4, 8, 8).transpose(1, 2).reshape(-1, 8, 8, 8)
        return F.relu(self.two(x))


# Two units: the stem's second half f(4), the branch's two layers; the shuffle then sends half of the stem's first half
# and half of the branch's output into the second branch and leaves the other halves alone: f(2)**4.
@network(f(4) * f(3) * f(2) ** 4 * f(5) * f(4), IMAGE)
class ShuffleUnits(_Image):
    def __init__(self) -> None:
        super().__init__(8, 8)
        self.one = nn.Sequential(conv(4, 3, 1), nn.ReLU(), conv(3, 3, groups=3), nn.BatchNorm2d(3), conv(3, 4, 1))
        self.two = nn.Sequential(conv(4, 5, 1), nn.ReLU(), conv(5, 5, groups=5), nn.BatchNorm2d(5), conv(5, 4, 1))

    def body(self, x: Tensor) -> Tensor:
        for branch in (self.one, self.two):
            keep, change = x.chunk(2, dim=1)
            x = torch.cat([keep, F.relu(branch(change))], dim=1)
            x = F.channel_shuffle(x, 2) if branch is self.two else self.shuffle(x)
        return x

    def shuffle(self, x: Tensor) -> Tensor:
        return x.view(-1, 2, 4, 8, 8).transpose(1, 2).contiguous().view(-1, 8, 8, 8)


@network(f(6) * f(3), IMAGE)  # stream, the squeezed layer
class SqueezeExcite(_Image):
    def __init__(self) -> None:
        super().__init__(6, 6)
        self.pool, self.down, self.up, self.out = nn.AdaptiveAvgPool2d(1), conv(6, 3, 1), conv(3, 6, 1), nn.ReLU()

    def body(self, x: Tensor) -> Tensor:
        return self.out(x * torch.sigmoid(self.up(F.relu(self.down(self.pool(x))))) - 0.1)


@network(f(6), IMAGE)  # mean and maximum over the channels make a map, which gates them
class SpatialAttention(_Image):
    def __init__(self) -> None:
        super().__init__(6, 6)
        self.map = conv(2, 1)

    def body(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.map(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)))


@network(f(4) * f(5), IMAGE)  # channel c is read at c * 4 .. c * 4 + 3
class FlattenIntoLinear(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            conv(3, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 2)
        )


@network(f(4) * f(5), IMAGE)  # channel c is read at c, 4 + c, 8 + c, ..
class FlattenChannelsLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.hidden, self.head = conv(3, 4), nn.Linear(16, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(F.relu(self.stem(x)), 4)
        return self.head(F.relu(self.hidden(x.permute(0, 2, 3, 1).flatten(1))))


@network(f(3) * f(2) ** 3 * f(2) ** 3 * f(3) ** 3, IMAGE)  # three paths; inside each stem, middle, end
class GroupedChain(_Image):
    def __init__(self) -> None:
        super().__init__(6, 9)
        self.one, self.norm, self.two = conv(6, 6, groups=3), nn.BatchNorm2d(6), conv(6, 9, groups=3)

    def body(self, x: Tensor) -> Tensor:
        return F.relu(self.two(F.relu(self.norm(self.one(x)))))


@network(f(2) * f(3) ** 2 * f(2) ** 2 * f(5), IMAGE)  # groups, stem inside, grouped outputs inside, dense outputs
class GroupedThenDense(_Image):
    def __init__(self) -> None:
        super().__init__(6, 5)
        self.grouped, self.dense = conv(6, 4, groups=2), conv(4, 5)

    def body(self, x: Tensor) -> Tensor:
        return F.relu(self.dense(F.relu(self.grouped(x))))


@network(f(4) * f(2) * f(3) ** 2 * f(2) ** 2, IMAGE)  # stream, groups of the bottleneck, inside, inside after
class GroupedBottleneck(_Image):
    def __init__(self) -> None:
        super().__init__(4, 4)
        self.down, self.grouped, self.up = conv(4, 6, 1), conv(6, 4, groups=2), conv(4, 4, 1)

    def body(self, x: Tensor) -> Tensor:
        return F.relu(x + self.up(F.relu(self.grouped(F.relu(self.down(x))))))


@network(f(6) * f(5), IMAGE)  # depthwise: one channel per group
class DepthwiseSeparable(_Image):
    def __init__(self) -> None:
        super().__init__(6, 5)
        self.depthwise, self.norm, self.pointwise = conv(6, 6, groups=6), nn.BatchNorm2d(6), conv(6, 5, 1)

    def body(self, x: Tensor) -> Tensor:
        return F.relu(self.pointwise(F.relu6(self.norm(self.depthwise(x)))))


@network(f(4) * f(2) ** 4, IMAGE)  # every channel has two outputs, which exchange
class DepthwiseMultiplier(_Image):
    def __init__(self) -> None:
        super().__init__(4, 8)
        self.depthwise = conv(4, 8, groups=4)

    def body(self, x: Tensor) -> Tensor:
        return F.relu(self.depthwise(x))


@network(f(4) * f(6) * f(2), IMAGE)  # stream, expanded layer, squeezed layer
class InvertedResidual(_Image):
    def __init__(self) -> None:
        super().__init__(4, 4)
        self.expand, self.norm1 = conv(4, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.depthwise, self.norm2 = conv(6, 6, groups=6, bias=False), nn.BatchNorm2d(6)
        self.squeeze, self.excite, self.project = conv(6, 2, 1), conv(2, 6, 1), conv(6, 4, 1)

    def body(self, x: Tensor) -> Tensor:
        y = F.hardswish(self.norm2(self.depthwise(F.hardswish(self.norm1(self.expand(x))))))
        gate = F.hardsigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        return F.relu(x + self.project(gate * y))


@network(f(2) * f(3) ** 2 * f(4), IMAGE)  # the norm's groups, inside, the next layer
class GroupNorm(_Image):
    def __init__(self) -> None:
        super().__init__(6, 4)
        self.norm, self.conv = nn.GroupNorm(2, 6), conv(6, 4)

    def body(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(F.relu(self.norm(x))))


@network(f(2) * f(2) ** 2 * f(2) ** 4 * f(2) ** 4, IMAGE)  # norm groups, conv groups in them, stem channels, outputs
class GroupsInGroups(_Image):
    def __init__(self) -> None:
        super().__init__(8, 8)
        self.norm, self.grouped = nn.GroupNorm(2, 8), conv(8, 8, groups=4)

    def body(self, x: Tensor) -> Tensor:
        return F.relu(self.grouped(F.relu(self.norm(x))))


# Three groups of two channels, then two of three. {0 1} and {4 5} exchange inside, and the whole may be reflected; stem
# channels in three groups, outputs in two.
@network(f(2) ** 2 * 2 * f(2) ** 3 * f(2) ** 2, IMAGE, exact=False)
class CrossingGroups(_Image):
    def __init__(self) -> None:
        super().__init__(6, 4)
        self.one, self.two = conv(6, 6, groups=3), conv(6, 4, groups=2)

    def body(self, x: Tensor) -> Tensor:
        return F.relu(self.two(F.relu(self.one(x))))


@network(1, IMAGE)  # the middle one of three channels, unshuffled to four places each, lies in both groups of two norms
class CopiesAcrossGroups(_Image):
    def __init__(self) -> None:
        super().__init__(3, 12)
        self.one, self.two = nn.GroupNorm(2, 12), nn.GroupNorm(2, 12)

    def body(self, x: Tensor) -> Tensor:
        return torch.tanh(self.two(self.one(F.pixel_unshuffle(x, 2))))


# Groups {tanh of 0..3, sigmoid of 0 1} and {sigmoid of 2 3, 0..3}: channels f(2)**2; outputs inside groups.
@network(f(2) ** 2 * f(2) ** 2, IMAGE, exact=False)
class ActivationsAcrossGroups(_Image):
    def __init__(self) -> None:
        super().__init__(4, 4)
        self.conv = conv(12, 4, groups=2)

    def body(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(torch.cat([torch.tanh(x), torch.sigmoid(x), x], 1)))


@network(f(6) * f(4), IMAGE)
class GroupNormOne(_Image):
    def __init__(self) -> None:
        super().__init__(6, 4)
        self.norm, self.conv = nn.GroupNorm(1, 6), conv(6, 4)

    def body(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(F.relu(self.norm(x))))


@network(f(6) * f(4), IMAGE)  # statistics per channel
class InstanceNorm(_Image):
    def __init__(self) -> None:
        super().__init__(6, 4)
        self.norm, self.conv = nn.InstanceNorm2d(6, affine=True), conv(6, 4)

    def body(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(F.relu(self.norm(x))))


@network(f(4), IMAGE)  # weight and bias of shape [4, 4, 4]: channels move, positions do not
class LayerNormOverImage(_Image):
    def __init__(self) -> None:
        super().__init__(4, 4)
        self.norm = nn.LayerNorm([4, 4, 4])

    def body(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(F.max_pool2d(x, 2)))


@network(f(6) * f(8), IMAGE)  # stream, inner layer
class ConvNeXtBlock(_Image):
    def __init__(self) -> None:
        super().__init__(6, 6)
        self.depthwise, self.norm = conv(6, 6, groups=6), nn.LayerNorm(6)
        self.up, self.down, self.scale = nn.Linear(6, 8), nn.Linear(8, 6), nn.Parameter(torch.empty(6, 1, 1))

    def body(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + self.scale * self.down(F.gelu(self.up(y))).permute(0, 3, 1, 2)


@network(f(4) * f(5), IMAGE)  # patch merging: four strided slices side by side are four copies of a channel
class PatchMerging(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 2, 2), nn.LayerNorm(16)
        self.reduce, self.head = nn.Linear(16, 5, bias=False), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x).permute(0, 2, 3, 1))
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.head(torch.tanh(self.reduce(self.norm(x))).mean((1, 2)))


@network(f(4) * f(5), IMAGE)  # four channels per shuffled channel, fixed inside it; the next layer
class PixelShuffle(_Image):
    def __init__(self) -> None:
        super().__init__(16, 5)
        self.shuffle, self.conv = nn.PixelShuffle(2), conv(4, 5)

    def body(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(self.shuffle(x)))


# The outputs of two groups are the four pixels of one channel, which the shortcut ties together: the groups do not
# exchange, their insides f(2)**2 do; and of the three channels after, the two without a shortcut.
@network(f(2) ** 2 * f(2), IMAGE)
class GroupsIntoPixels(_Image):
    def __init__(self) -> None:
        super().__init__(4, 3)
        self.grouped, self.conv = conv(4, 4, groups=2), conv(1, 3)

    def body(self, x: Tensor) -> Tensor:
        x = F.pixel_shuffle(F.relu(self.grouped(x)), 2)
        return F.relu(self.conv(x) + F.pad(x, (0, 0, 0, 0, 0, 2)))


@network(f(4) * f(5), IMAGE)
class PixelUnshuffle(_Image):
    def __init__(self) -> None:
        super().__init__(4, 5)
        self.conv = conv(16, 5)

    def body(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(F.pixel_unshuffle(x, 2)))


@network(f(6) * f(5), IMAGE)  # one slope per channel, then one for all
class Prelu(_Image):
    def __init__(self) -> None:
        super().__init__(6, 5)
        self.slopes, self.conv, self.slope = nn.PReLU(6), conv(6, 5), nn.PReLU()

    def body(self, x: Tensor) -> Tensor:
        return self.slope(self.conv(self.slopes(x - 0.5)))


@network(f(6) * f(4) * f(5), IMAGE)  # weight [in, out, ..]
class ConvTranspose(_Image):
    def __init__(self) -> None:
        super().__init__(6, 5)
        self.up, self.conv = nn.ConvTranspose2d(6, 4, 2, 2), conv(4, 5)

    def body(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(F.relu(self.up(x))))


@network(f(2) * f(3) ** 2 * f(2) ** 2, IMAGE)  # groups, inputs inside, outputs inside
class ConvTransposeGrouped(_Image):
    def __init__(self) -> None:
        super().__init__(6, 4)
        self.up = nn.ConvTranspose2d(6, 4, 3, 2, groups=2)

    def body(self, x: Tensor) -> Tensor:
        return F.relu(self.up(x))


@network(f(6) * f(5), SIGNAL)
class Conv1d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Conv1d(3, 6, 3), nn.Conv1d(6, 5, 3, dilation=2), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.adaptive_max_pool1d(F.elu(self.two(F.elu(self.one(x)))), 1).squeeze(-1))


@network(f(3) * f(3) * f(5), IMAGE)  # moved half, resting half: they do not exchange; the layer that reads both
class TemporalShift(_Image):
    def __init__(self) -> None:
        super().__init__(6, 5)
        self.conv = conv(6, 5)

    def body(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(torch.cat([torch.roll(x[:, :3], 1, dims=3), x[:, 3:]], dim=1)))


@network(f(4), IMAGE)  # a channel and a function of it, one of them shifted: two copies that do not exchange
class ShiftedCopies(_Image):
    def __init__(self) -> None:
        super().__init__(4, 8)

    def body(self, x: Tensor) -> Tensor:
        x = torch.cat([x, torch.tanh(x)], 1)
        return F.gelu(torch.cat([torch.roll(x[:, :4], 1, dims=3), x[:, 4:]], 1))


@network(f(4) * f(6) * f(5), IMAGE)  # skip connection, bottom, decoder
class Unet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.down, self.decode, self.out = conv(3, 4), conv(4, 6, stride=2), conv(10, 5), conv(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = F.relu(self.encode(x))
        low = F.relu(self.down(skip))
        up = F.interpolate(low, scale_factor=2.0, mode="bilinear", align_corners=False)
        return self.out(F.relu(self.decode(torch.cat([up, skip], 1))))


@network(f(6) * f(5), IMAGE)  # the standardised weight's rows are the weight's rows, its columns one symmetric set
class WeightStandardisation(_Image):
    def __init__(self) -> None:
        super().__init__(6, 5)
        self.weight, self.bias = nn.Parameter(torch.empty(5, 6, 3, 3)), nn.Parameter(torch.empty(5))

    def body(self, x: Tensor) -> Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        w = w / (w.pow(2).mean((1, 2, 3), keepdim=True) + 1e-5).sqrt()
        return F.relu(F.conv2d(x, w, self.bias, padding=1))


# --------------------------------------------------------------------------------------------------------------
# Sequences: embedding to a stream of eight, residual blocks, mean over tokens, linear head
# --------------------------------------------------------------------------------------------------------------


class _Sequence(nn.Module):
    """Tokens into a stream of eight channels; ``mix`` is one residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.last, self.head = nn.Linear(5, 8), nn.LayerNorm(8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.mix(self.norm(x))
        return self.head(self.last(x).mean(1))


@network(f(8) * f(12), TOKENS)  # stream, hidden layer
class TransformerMlp(_Sequence):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def mix(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class _HandRms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(8))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


@network(f(8) * f(12), TOKENS)
class RmsNormByHand(TransformerMlp):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = _HandRms(), _HandRms()


class _FunctionalRms(_HandRms):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (8,), self.weight, 1e-6)


@network(f(8) * f(12), TOKENS)
class RmsNormByFunction(TransformerMlp):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = _FunctionalRms(), nn.RMSNorm(8)


@network(f(8) * f(6), TOKENS)  # stream, the gated layer written by two Linears
class SwiGlu(_Sequence):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 8, bias=False)

    def mix(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


@network(f(8) * f(7) * f(9), TOKENS)  # stream, the layer that mixes tokens, the one that mixes channels
class MlpMixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.norm1, self.tokens = nn.LayerNorm(8), nn.Sequential(nn.Linear(6, 7), nn.GELU(), nn.Linear(7, 6))
        self.norm2, self.channels = nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 9), nn.GELU(), nn.Linear(9, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.channels(self.norm2(x))
        return self.head(torch.tanh(x).mean(1))


@network(f(6), TOKENS)  # the hidden units: in W_ih, W_hh, both biases, and in the head; gates are fixed places
class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(5, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


@network(f(4) * f(6), TOKENS)  # two layers
class Gru(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.GRU(5, 4, batch_first=True), nn.GRU(4, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(x)[0])[0].mean(1))


@network(f(8) * f(10), WORDS)  # width of the embedding, which is also the output matrix; hidden layer; words are pinned
class TiedEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(7, 8), nn.LayerNorm(8)
        self.up, self.down, self.out = nn.Linear(8, 10), nn.Linear(10, 8), nn.Linear(8, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.out(self.norm(x + self.down(F.gelu(self.up(x)))))


@network(f(6), WORDS)  # the same, reading the table as a matrix
class EmbeddingTransposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.embed(x)).cumsum(dim=1) @ self.embed.weight.t()


# --------------------------------------------------------------------------------------------------------------
# Attention. Two heads of four unless said otherwise: heads f(2); inside each, the dimensions that queries and keys
# share f(4)**2, and those of the values f(4)**2.
# --------------------------------------------------------------------------------------------------------------

HEADS = f(2) * f(4) ** 2 * f(4) ** 2


@network(f(8) * HEADS * f(6), TOKENS)  # stream, heads, hidden layer
class PackedMultiheadAttention(_Sequence):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.second, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.down(F.gelu(self.up(self.second(x))))
        return self.head(self.last(x).mean(1))


class _Attention(_Sequence):
    """Queries, keys and values by three Linears, ``heads`` of ``dim``; ``attend`` on [batch, heads, tokens, dim]."""

    def __init__(self, heads: int = 2, dim: int = 4, kv_heads: int = 2) -> None:
        super().__init__()
        self.dim, self.scale = dim, dim**-0.5
        self.q, self.out = nn.Linear(8, heads * dim), nn.Linear(heads * dim, 8)
        self.k, self.v = nn.Linear(8, kv_heads * dim), nn.Linear(8, kv_heads * dim)

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], -1, self.dim).transpose(1, 2)

    def mix(self, x: Tensor) -> Tensor:
        y = self.attend(self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x)))
        return self.out(y.transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


@network(f(8) * HEADS, TOKENS)
class AttentionSeparate(_Attention):
    pass


@network(f(8) * HEADS, TOKENS)
class AttentionByHand(_Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1) @ v


@network(f(8) * HEADS, TOKENS)
class AttentionByEinsum(_Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.softmax(torch.einsum("bhqd,bhkd->bhqk", q, k) * self.scale, dim=-1)
        return torch.einsum("bhqk,bhkd->bhqd", weights, v)


@network(f(8) * HEADS, TOKENS)
class AttentionPacked(_Sequence):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def mix(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(-1, 6, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 6, 8))


@network(f(8) * f(2) * f(4) ** 10, TOKENS)  # every group is a third of a head
class AttentionThroughGroups(AttentionPacked):
    def __init__(self) -> None:
        super().__init__()
        self.groups = nn.Conv1d(24, 24, 1, groups=6)

    def mix(self, x: Tensor) -> Tensor:
        q, k, v = self.groups(self.qkv(x).transpose(1, 2)).reshape(-1, 3, 2, 4, 6).mT.unbind(1)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 6, 8))


@network(f(8) * HEADS, TOKENS)  # a triangular mask speaks of positions only
class AttentionCausal(_Attention):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(6, 6).tril().bool())

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT * self.scale).masked_fill(~self.mask, float("-inf"))
        return torch.matmul(F.softmax(scores, -1), v)


# Four query heads of three on two key-value heads: key-value heads f(2), the queries that share one f(2)**2,
# query-key dimensions f(3)**2 (one permutation for all queries that share the key), value dimensions f(3)**2.
@network(f(8) * f(2) * f(2) ** 2 * f(3) ** 2 * f(3) ** 2, TOKENS)
class GroupedQueryAttention(_Attention):
    def __init__(self) -> None:
        super().__init__(heads=4, dim=3, kv_heads=2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        return F.scaled_dot_product_attention(q, k, v)


@network(f(8) * f(3) * f(2) * f(2), TOKENS)  # three query heads of two, one key-value head: heads, query-key, values
class MultiQueryAttention(_Attention):
    def __init__(self) -> None:
        super().__init__(heads=3, dim=2, kv_heads=1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1) @ v


@network(f(8) * f(2) * f(4) ** 2, TOKENS)  # query-key dimensions are pairs of distinct frequencies: heads move them
class RotaryHalves(_Attention):
    def __init__(self) -> None:
        super().__init__()
        angles = torch.outer(torch.arange(6.0), torch.tensor([1.0, 0.3])).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin(), persistent=False)

    def rotate(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat((-b, a), dim=-1) * self.sin

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v)


@network(f(8) * f(2) * f(4) ** 2, TOKENS)  # rotation of a part of the dimensions that is all of them
class RotaryPartial(RotaryHalves):
    def rotate(self, x: Tensor) -> Tensor:
        size = self.cos.shape[-1]
        return torch.cat([super().rotate(x[..., :size]), x[..., size:]], -1)


@network(f(8) * f(2) * f(4) ** 2, TOKENS)  # pairs of neighbours as complex numbers
class RotaryComplex(_Attention):
    def __init__(self) -> None:
        super().__init__()
        angles = torch.outer(torch.arange(6.0), torch.tensor([1.0, 0.3]))
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles).to(torch.complex128))

    def rotate(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * self.turns).flatten(-2).to(x)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v)


class _RotaryOnePair(RotaryHalves):
    def __init__(self, heads: int) -> None:
        _Attention.__init__(self, heads, dim=2, kv_heads=heads)
        angles = torch.arange(6.0).view(6, 1).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())


# Four heads of one pair: no frequency tells its two places apart, a sign does.
@network(f(8) * f(4) * f(2) ** 4, TOKENS)
class RotaryOnePair(_RotaryOnePair):
    def __init__(self) -> None:
        super().__init__(heads=4)


@network(f(8) * f(2), TOKENS)  # stream, values
class RotaryOneHead(_RotaryOnePair):
    def __init__(self) -> None:
        super().__init__(heads=1)


@network(f(8) * f(2) * f(4) * f(4) ** 2, TOKENS)  # shared norm weights: one query-key permutation for all heads
class QueryKeyNorm(_Attention):
    def __init__(self) -> None:
        super().__init__()
        self.q_weight, self.k_weight = nn.Parameter(torch.empty(4)), nn.Parameter(torch.empty(4))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = F.rms_norm(q, (4,), self.q_weight), F.rms_norm(k, (4,), self.k_weight)
        return F.scaled_dot_product_attention(q, k, v)


# Key-value heads, their query heads, and values: frequencies and norms that heads share leave no other dimensions free.
@network(f(8) * f(2) * f(2) ** 2 * f(4) ** 2, TOKENS)
class GroupedQueryKeyNorm(RotaryHalves):
    def __init__(self) -> None:
        _Attention.__init__(self, heads=4, dim=4, kv_heads=2)
        angles = torch.outer(torch.arange(6.0), torch.tensor([1.0, 0.3])).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        self.q_norm, self.k_norm = nn.RMSNorm(4), nn.RMSNorm(4)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = self.rotate(self.q_norm(q)), self.rotate(self.k_norm(k))
        return F.scaled_dot_product_attention(q, *(t.repeat_interleave(2, dim=1) for t in (k, v)))


@network(f(8) * HEADS, TOKENS)  # one temperature per head
class LearnedTemperature(_Attention):
    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.empty(2, 1, 1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        return (q @ k.transpose(-2, -1) * self.temperature.exp()).softmax(-1) @ v


@network(f(8) * HEADS, TOKENS)  # windows of three tokens; a table of five offsets, one column per head
class WindowedAttention(_Sequence):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.table = nn.Linear(8, 24), nn.Linear(8, 8), nn.Parameter(torch.empty(5, 2))
        self.register_buffer("index", torch.arange(3)[:, None] - torch.arange(3)[None, :] + 2)

    def mix(self, x: Tensor) -> Tensor:
        x = torch.roll(x, -1, dims=1).view(-1, 3, 8)
        q, k, v = self.qkv(x).reshape(-1, 3, 3, 2, 4).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index.view(-1)].view(3, 3, 2).permute(2, 0, 1).contiguous()
        weights = (q * 0.5 @ k.transpose(-2, -1) + bias.unsqueeze(0)).softmax(-1)
        x = (weights @ v).transpose(1, 2).reshape(-1, 3, 8)
        return torch.roll(self.out(x).view(-1, 6, 8), 1, dims=1)


# Attention between channels: a head's scores compare query dimension i with key dimension j over all tokens, so the
# queries' dimensions go with the outputs' and the keys' with the values': heads, f(4)**2 and f(4)**2.
@network(f(8) * HEADS, TOKENS)
class CrossCovarianceAttention(_Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (F.normalize(q, dim=-2).transpose(-2, -1) @ F.normalize(k, dim=-2)).softmax(dim=-1)
        return (weights @ v.transpose(-2, -1)).transpose(-2, -1)


@network(f(8) * HEADS * f(6), IMAGE)  # stream, heads, hidden layer; the positions of patches and class token are pinned
class VisionTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.token, self.position = nn.Parameter(torch.empty(1, 1, 8)), nn.Parameter(torch.empty(1, 5, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 6, activation="gelu", batch_first=True, norm_first=True)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        b = self.block
        y = b.norm1(x)
        x = x + b.self_attn(y, y, y, need_weights=False)[0]
        x = x + b.linear2(b.activation(b.linear1(b.norm2(x))))
        return self.head(self.norm(x)[:, 0])


@network(f(4) * f(8) * f(3) * f(6), TOKENS)  # latents (their mean is the output), stream, query-key, values
class LearnedLatents(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.latents, self.norm = nn.Parameter(torch.empty(4, 8)), nn.LayerNorm(8)
        self.q, self.k, self.v = nn.Linear(8, 3), nn.Linear(5, 3), nn.Linear(5, 6)
        self.out, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.q(self.latents) @ self.k(x).transpose(1, 2)).softmax(-1)
        z = self.latents + self.out(weights @ self.v(x))
        return self.head(self.norm(z).mean(1))


# Two latents are averaged, the other two read by columns of their own, which move with them: f(2) each.
@network(f(2) * f(2) * f(8) * f(3) * f(6), TOKENS)
class LatentsReadApart(LearnedLatents):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.q(self.latents) @ self.k(x).transpose(1, 2)).softmax(-1)
        z = self.norm(self.latents + self.out(weights @ self.v(x)))
        return self.head(torch.cat([z[:, :2].mean(1), z[:, 2:].flatten(1)], dim=1))


# --------------------------------------------------------------------------------------------------------------
# Stacks of weights, whose rows have neurons of their own
# --------------------------------------------------------------------------------------------------------------


# Two axes of two tensors meet each other and nothing that is known.
@network(f(8) * f(2) * f(5) ** 2, POINT, stacks={("up", 2): 0, ("down", 1): 0})
class StackedLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 8)
        self.up, self.down = nn.Parameter(torch.empty(2, 8, 5)), nn.Parameter(torch.empty(2, 5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nd,hdk,hke->ne", torch.tanh(self.stem(x)), self.up, self.down)


class _Mixture(nn.Module):
    """A router over three experts in the tensors of ``stack``; what they give is added to what they read."""

    def __init__(self, **stack: tuple[int, ...]) -> None:
        super().__init__()
        self.stem, self.router, self.head = nn.Linear(5, 6), nn.Linear(6, 3), nn.Linear(6, 2)
        for name, shape in stack.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        return self.head(torch.tanh(x + self.mixed(x, self.router(x).softmax(-1))))


# Each expert's hidden neurons by themselves; gates and values stand one behind the other on one axis.
@network(f(6) * f(3) * f(4) ** 3, POINT, stacks={("up", 1): 0, ("bias", 1): 0, ("down", 2): 0})
class Mixture(_Mixture):
    def __init__(self) -> None:
        super().__init__(up=(3, 8, 6), bias=(3, 8), down=(3, 6, 4))

    def mixed(self, x: Tensor, gates: Tensor) -> Tensor:
        gate, value = (torch.einsum("eki,ni->nek", self.up, x) + self.bias).chunk(2, -1)
        return torch.einsum("ne,eok,nek->no", gates, self.down, F.silu(gate) * value)


# Matrices with neurons of every expert's own on both of their axes; the middle layer is on no others.
@network(
    f(6) * f(3) * f(4) ** 3 * f(5) ** 3 * f(2) ** 3,
    POINT,
    stacks={("a", 1): 0, ("b", 2): 0, ("b", 1): 0, ("c", 2): 0, ("c", 1): 0, ("d", 2): 0},
)
class DeepMixture(_Mixture):
    def __init__(self) -> None:
        super().__init__(a=(3, 4, 6), b=(3, 5, 4), c=(3, 2, 5), d=(3, 6, 2))

    def mixed(self, x: Tensor, gates: Tensor) -> Tensor:
        h = torch.tanh(torch.einsum("eki,ni->nek", self.a, x))
        h = torch.tanh(torch.einsum("ejk,nek->nej", self.b, h))
        h = torch.tanh(torch.einsum("elj,nej->nel", self.c, h))
        return torch.einsum("ne,eol,nel->no", gates, self.d, h)


# Hidden neuron k of every expert hears of the k-th of the others.
@network(f(6) * f(3) * f(4), POINT)
class TalkingMixture(_Mixture):
    def __init__(self) -> None:
        super().__init__(up=(3, 4, 6), down=(3, 6, 4))

    def mixed(self, x: Tensor, gates: Tensor) -> Tensor:
        h = torch.tanh(torch.einsum("eki,ni->nek", self.up, x))
        return torch.einsum("ne,eok,nek->no", gates, self.down, torch.tanh(h + h.mean(1, keepdim=True)))


# Two sets of hidden neurons on one axis, of which the second hears of other experts: neither is split.
@network(f(6) * f(3) * f(4) ** 3 * f(4), POINT, exact=False, stacks={("up", 1): 0, ("down", 2): 0})
class HalfTalkingMixture(_Mixture):
    def __init__(self) -> None:
        super().__init__(up=(3, 8, 6), down=(3, 6, 4), back=(3, 6, 4))

    def mixed(self, x: Tensor, gates: Tensor) -> Tensor:
        own, heard = torch.tanh(torch.einsum("eki,ni->nek", self.up, x)).chunk(2, -1)
        heard = torch.tanh(heard + heard.mean(1, keepdim=True))
        made = torch.einsum("eok,nek->neo", self.down, own) + torch.einsum("eok,nek->neo", self.back, heard)
        return torch.einsum("ne,neo->no", gates, made)


# Summed up over experts: the rows of the first tensor are free for each hidden neuron by itself.
@network(f(6) * f(3) * f(4) * f(3) ** 4, POINT, stacks={("up", 0): 1})
class SummedMixture(_Mixture):
    def __init__(self) -> None:
        super().__init__(up=(3, 4, 6), down=(3, 6, 4))

    def mixed(self, x: Tensor, gates: Tensor) -> Tensor:
        h = torch.tanh(torch.einsum("eki,ni->nek", self.up, x)).sum(1)
        return torch.einsum("ne,eok,nk->no", gates, self.down, h)


# Weights [in, heads, inside], and back [heads, inside, out].
@network(
    f(8) * f(3) * f(4) ** 3 * f(2) ** 3,
    TOKENS,
    stacks={("q", 2): 1, ("k", 2): 1, ("v", 2): 1, ("o", 1): 0},
)
class HeadsOnAnAxis(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.q, self.k = nn.Parameter(torch.empty(8, 3, 4)), nn.Parameter(torch.empty(8, 3, 4))
        self.v, self.o = nn.Parameter(torch.empty(8, 3, 2)), nn.Parameter(torch.empty(3, 2, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        q, k, v = (torch.einsum("ntd,dhi->nhti", x, w) for w in (self.q, self.k, self.v))
        read = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.head(torch.tanh(x + torch.einsum("nhti,hid->ntd", read, self.o)).mean(1))


# Layers in one tensor, run one after the other: rows stay, and each has hidden neurons of its own.
@network(f(6) * f(4) ** 3, POINT, stacks={("up", 1): 0, ("bias", 1): 0, ("down", 2): 0})
class LayersInOneTensor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, 6), nn.Linear(6, 3)
        self.up, self.down = nn.Parameter(torch.empty(3, 4, 6)), nn.Parameter(torch.empty(3, 6, 4))
        self.bias = nn.Parameter(torch.empty(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for k in range(3):
            x = x + F.linear(torch.tanh(F.linear(x, self.up[k], self.bias[k])), self.down[k])
        return self.head(x)


# The input says which layer is used, and the example inputs ask for two of three: nothing is said of the third.
@network(f(6) * f(4), POINT, torch.tensor([0, 2, 0]))
class LayersByInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, 6), nn.Linear(6, 3)
        self.up, self.down = nn.Parameter(torch.empty(3, 4, 6)), nn.Parameter(torch.empty(3, 6, 4))

    def forward(self, x: Tensor, which: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        h = torch.tanh(torch.einsum("nki,ni->nk", self.up[which], x))
        return self.head(torch.tanh(x + torch.einsum("nok,nk->no", self.down[which], h)))


# --------------------------------------------------------------------------------------------------------------
# Entries chosen by value
# --------------------------------------------------------------------------------------------------------------


class _Experts(nn.Module):
    """A router that chooses among four matrices: they move with its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.router, self.head = nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(7, 3)
        self.weight, self.bias = nn.Parameter(torch.empty(4, 7, 6)), nn.Parameter(torch.empty(4, 7))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        return self.head(self.experts(x, self.router(x).softmax(-1)))


@network(f(6) * f(4) * f(7), POINT)
class ExpertsByIndex(_Experts):
    def experts(self, x: Tensor, gates: Tensor) -> Tensor:
        values, chosen = gates.topk(2, dim=-1)
        made = torch.einsum("nkoi,ni->nko", self.weight[chosen], x) + self.bias[chosen]
        return (made * values.unsqueeze(-1)).sum(1)


@network(f(6) * f(4) * f(7), POINT)
class ExpertsByScatter(_Experts):
    def experts(self, x: Tensor, gates: Tensor) -> Tensor:
        values, chosen = gates.sort(dim=-1, descending=True)
        gates = torch.zeros_like(gates).scatter(1, chosen[:, :2], values[:, :2])
        return torch.einsum("ne,eoi,ni->no", gates, self.weight, x) + gates @ self.bias


@network(f(6) * f(4) * f(7), POINT)
class ExpertsByOneHot(_Experts):
    def experts(self, x: Tensor, gates: Tensor) -> Tensor:
        chosen = gates.argmax(-1)
        picked = F.one_hot(chosen, 4).to(x)
        return torch.einsum("ne,eoi,ni->no", picked, self.weight, x) * gates.gather(1, chosen.unsqueeze(-1))


# Each row goes to its expert's part of a sorted batch and back; the rows of the sorted batch are alike.
@network(f(6) * f(4) * f(7), POINT)
class ExpertsBySorting(_Experts):
    def experts(self, x: Tensor, gates: Tensor) -> Tensor:
        chosen, order = gates.argmax(-1).sort()
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        return torch.bmm(self.weight[chosen], x[order].unsqueeze(-1)).squeeze(-1)[back]


# The first choice and the second of what is left, one behind the other.
@network(f(6) * f(4) * f(7), POINT)
class ExpertsChosenInTurn(_Experts):
    def experts(self, x: Tensor, gates: Tensor) -> Tensor:
        first = gates.argmax(-1, keepdim=True)
        second = gates.scatter(1, first, 0.0).argmax(-1, keepdim=True)
        chosen = torch.cat([first, second], -1)
        values = gates.gather(1, chosen).unsqueeze(-1)
        return (torch.einsum("nkoi,ni->nko", self.weight[chosen], x) * values).sum(1)


# Rows sorted by their expert pass two layers there: each expert's hidden neurons are its own.
@network(f(6) * f(4) * f(5) ** 4 * f(7), POINT)
class ExpertsOfTwoLayers(_Experts):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(4, 5, 6)), nn.Parameter(torch.empty(4, 5))
        self.down = nn.Parameter(torch.empty(4, 7, 5))

    def experts(self, x: Tensor, gates: Tensor) -> Tensor:
        chosen, order = gates.argmax(-1).sort()
        made = torch.tanh(torch.bmm(self.weight[chosen], x[order].unsqueeze(-1)).squeeze(-1) + self.bias[chosen])
        return torch.bmm(self.down[chosen], made.unsqueeze(-1)).squeeze(-1)[order.argsort()]


@network(
    f(6) * f(7), POINT
)  # a table of three entries, by place in the sorted batch, tells the rows and so the experts
class ExpertsToldApartBySorting(_Experts):
    def experts(self, x: Tensor, gates: Tensor) -> Tensor:
        chosen, order = gates.argmax(-1).sort()
        made = torch.bmm(self.weight[chosen], x[order].unsqueeze(-1)).squeeze(-1) * torch.arange(3).unsqueeze(-1)
        return made[order.argsort()]


@network(f(6) * f(7), POINT)  # the number of the expert is used as a number
class ExpertsByNumber(_Experts):
    def experts(self, x: Tensor, gates: Tensor) -> Tensor:
        chosen = gates.argmax(-1)
        return torch.einsum("noi,ni->no", self.weight[chosen], x) * (1 + chosen.unsqueeze(-1))


# Two heads, each sampling its three channels at coordinates of its own; x and y differ.
@network(f(2) * f(3) ** 2, IMAGE)
class SampledHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value, self.place, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        values = self.value(x).reshape(4, 3, 8, 8)
        grid = torch.tanh(self.place(x)).reshape(4, 2, 8, 8).permute(0, 2, 3, 1)
        return self.head(F.grid_sample(values, grid, align_corners=False).reshape(2, 6, 8, 8)).mean((2, 3))


@network(f(8), TOKENS)  # windows of two tokens by their addresses, in a tensor that is laid out the other way round
class StridedWindows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, 8), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x.transpose(0, 1))).transpose(0, 1)
        windows = x.as_strided((2, 5, 2, 8), (8, 16, 16, 1))
        return self.head(windows.flatten(2)).mean(1)


# Every head mixes three neighbours by weights computed from the token; at the ends, zeros stand for neighbours.
@network(f(8) * f(2) * f(4) ** 2, TOKENS)
class DynamicConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.value, self.kernel, self.head = (nn.Linear(*s) for s in ((5, 8), (8, 8), (8, 6), (8, 3)))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        values = F.unfold(self.value(x).transpose(1, 2).unsqueeze(-1), (3, 1), padding=(1, 0))
        kernel = self.kernel(x).reshape(-1, 3, 1).softmax(1)
        return self.head((values.transpose(1, 2).reshape(-1, 4, 3) @ kernel).reshape(2, 6, 8)).mean(1)


class Circulant(nn.Module):
    """A table of six that is read at (i - j) mod 6: every entry meets all rows and all columns, each in its turn."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mixed, self.head = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 3)
        self.table = nn.Parameter(torch.randn(6))
        self.register_buffer("index", (torch.arange(6)[:, None] - torch.arange(6)) % 6)


@network(f(8) * f(6), TOKENS)  # tokens mixed by the table
class CirculantTokens(Circulant):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mixed(self.table[self.index] @ torch.tanh(self.stem(x)))))


@network(f(8) * f(6), TOKENS)  # a relative bias without an end
class CirculantAttention(Circulant):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        return self.head(torch.tanh(self.mixed((x @ x.mT + self.table[self.index]).softmax(-1) @ x)))


@network(f(8) * 72, TOKENS, exact=False)  # neurons mixed by the table: they may only turn together
class CirculantNeurons(Circulant):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(torch.tanh(self.mixed(torch.tanh(self.stem(x)))) @ self.table[self.index]))


@network(f(8) * 192, TOKENS, exact=False)  # what meets the table along both dimensions and is summed at once
class CirculantGate(Circulant):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.mixed(torch.tanh(self.stem(x)))).mean(1)
        gate = torch.tanh(x[:, :, None] * self.table[self.index] * self.head.bias.repeat(2)[None, None]).sum((1, 2))
        return self.head(x) * gate[:, None]


class Table(nn.Module):
    """Three vectors that are read at the rows, columns and diagonals of a square, entry by entry."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.columns, self.diagonals = (nn.Parameter(torch.randn(5)) for _ in range(3))
        self.stem, self.head = nn.Linear(5, 25), nn.Linear(25, 3)
        i, j = torch.arange(25) // 5, torch.arange(25) % 5
        for name, index in {"row": i, "column": j, "diagonal": (i - j) % 5, "some": i.clamp_max(2)}.items():
            self.register_buffer(name, index)


@network(f(5) * f(5), TOKENS)  # rows and columns of their own accord
class RowsAndColumns(Table):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.stem(x) * self.rows[self.row] * self.columns[self.column]))


@network(100, TOKENS, exact=False)  # what two say tells the third: they may only turn together
class RowsColumnsAndDiagonals(Table):
    def forward(self, x: Tensor) -> Tensor:
        known = self.rows[self.row] * self.columns[self.column] + self.diagonals[self.diagonal]
        return self.head(torch.tanh(self.stem(x) * known))


@network(100, TOKENS, exact=False)  # the same, met one after the other by neurons that each is a block of
class SquareBlocks(Table):
    def forward(self, x: Tensor) -> Tensor:
        known = self.stem(x) * self.rows[self.row] * self.columns[self.column]
        return self.head(torch.tanh(known * self.diagonals[self.diagonal]))


@network(100, TOKENS, exact=False)  # the same where all is summed at once
class SquareInOneNumber(Table):
    def forward(self, x: Tensor) -> Tensor:
        known = self.rows[self.row] * self.columns[self.column] + self.diagonals[self.diagonal]
        return x[..., :3] * self.head.bias * torch.tanh(known).sum()


@network(f(2), TOKENS)  # two are read five times, one fifteen times, two not at all
class UnevenlyRead(Table):
    def forward(self, x: Tensor) -> Tensor:
        return x[..., :3] * torch.tanh(self.rows[self.some]).sum()


@network(f(8), TOKENS, exact=False)  # nothing is found on these inputs, and what would be done to it is not known
class NothingFound(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.seen, self.hidden, self.found = nn.Linear(5, 7), nn.Linear(7, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.tanh(self.seen(x))[x[..., 0] > 99]
        more = self.found(torch.tanh(self.hidden(torch.cat([rows, rows]))))
        return self.head(torch.tanh(self.stem(x))) + more.sum()


@network(f(4), POINT)  # boxes in an order that the data choose: centre and extent become one
class ChosenBoxes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.boxes = nn.Linear(5, 4), nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.boxes(torch.relu(self.stem(x))).view(-1, 3, 4)
        rows = (rows * torch.arange(1.0, 4)[:, None].to(x)).reshape(-1, 4)
        left, top, width, height = rows[rows[:, 0].argsort()].unbind(1)
        found = torch.stack([left - width.exp(), top - height.exp(), left + width.exp(), top + height.exp()], 1)
        return found[found[:, 0].argsort()]


@network(f(8), TOKENS)  # zeros are filled in place, where the data say: what they were is not what they became
class FilledByData(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head, self.shift = nn.Linear(5, 8), nn.Linear(8, 3), nn.Parameter(torch.empty(8))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.stem(x[0])) + self.shift
        made = torch.zeros(h.size(0) + 1, 8, dtype=x.dtype, device=x.device)
        made.index_put_((x[0, :, 0].argsort(),), h)
        return self.head(made)


@network(f(8), TOKENS)  # pooled along tokens alone
class PooledTokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.avg_pool2d(torch.tanh(self.stem(x)).unsqueeze(1), (2, 1)).squeeze(1)).mean(1)


@network(f(4) * f(8) * f(3) * f(6) * f(7), TOKENS)  # a kernel of one latent keeps latents apart
class LatentsThroughConvolution(LearnedLatents):
    def __init__(self) -> None:
        super().__init__()
        self.mixer, self.head = nn.Conv1d(8, 7, 1), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.q(self.latents) @ self.k(x).transpose(1, 2)).softmax(-1)
        z = self.latents + self.out(weights @ self.v(x))
        return self.head(torch.tanh(self.mixer(z.transpose(1, 2))).mean(-1))


@network(f(8), POINT)  # one learned number
class LearnedNumber(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head, self.scale = nn.Linear(5, 8), nn.Linear(8, 3), nn.Parameter(torch.empty(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.stem(x)) * self.scale.exp().to(x.dtype))


@network(f(8), WORDS)  # a table that was not trained, read where the data say
class ConstantsByData(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(9, 8), nn.Linear(8, 3)
        self.register_buffer("table", torch.arange(9.0).sin())

    def forward(self, words: Tensor) -> Tensor:
        scale = self.table.expand(2, -1).gather(1, words) + self.table[words] + self.table.index_select(0, words[0])
        return self.head(self.words(words) * scale.unsqueeze(-1)).mean(1)


# Tokens in chunks of four, the last one padded; the state of all chunks starts at zero.
@network(f(8) * f(2) * f(4) ** 2 * f(4) ** 2, TOKENS)
class PaddedChunks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.decay, self.head = nn.Linear(5, 8), nn.Linear(8, 2), nn.Linear(8, 3)
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        q, k, v = (F.pad(layer(x), (0, 0, 0, 2)).reshape(2, 2, 4, 2, 4) for layer in (self.q, self.k, self.v))
        decay = F.pad(self.decay(x).sigmoid(), (0, 0, 0, 2)).reshape(2, 2, 4, 2, 1)
        state = torch.einsum("bclhe,bclhv->bchev", k * decay, v)
        state = torch.cat([torch.zeros_like(state[:, :1]), state], dim=1)[:, :2]
        made = torch.einsum("bclhe,bchev->bclhv", q, state).reshape(2, 8, 8)[:, :6]
        return self.head(made + v.reshape(2, 8, 8)[:, :6]).mean(1)
