"""torch.nn: every layer with neurons, and those without between layers that have some.

Most stand in a chain: a layer that makes neurons, the one in question, and a head that reads them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torchvision.ops import DeformConv2d, FrozenBatchNorm2d

POINT = (4, 6)
SIGNAL, IMAGE, VOLUME = (2, 3, 16), (2, 3, 12, 12), (2, 3, 6, 6, 6)
SPACE = {1: SIGNAL, 2: IMAGE, 3: VOLUME}
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TOKENS = (2, 7, 6)


class Call(nn.Module):
    """Layers by name, and what a function does with them and the inputs."""

    def __init__(self, forward: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        self.body = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs: Tensor) -> Any:
        return self.body(self, *inputs)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def flat(*layers: nn.Module) -> Any:
    """Between two linear layers: 8 neurons in, 8 out."""
    return nn.Sequential(nn.Linear(6, 8), *layers, nn.Linear(8, 3)), torch.randn(POINT)


def spatial(n: int, *layers: nn.Module, out: int = 8) -> Any:
    """Between two convolutions in ``n`` dimensions: 8 channels in, ``out`` out."""
    return nn.Sequential(CONV[n](3, 8, 3, padding=1), *layers, CONV[n](out, 4, 1)), torch.randn(SPACE[n])


def sequence(forward: Callable[..., Any], **layers: Any) -> Any:
    """On tokens [2, 7, 6] that a linear layer made 8 wide."""
    return Call(forward, stem=nn.Linear(6, 8), head=nn.Linear(8, 3), **layers), torch.randn(TOKENS)


def recurrent(kind: type[nn.Module], **options: Any) -> Any:
    layer = kind(8, 10, batch_first=True, **options)
    width = (options.get("proj_size") or 10) * (2 if options.get("bidirectional") else 1)
    return sequence(lambda m, x: m.last(m.layer(m.stem(x))[0]), layer=layer, last=nn.Linear(width, 3))


def packed(m: Any, x: Tensor) -> Tensor:
    steps = nn.utils.rnn.pack_padded_sequence(m.stem(x), torch.tensor([7, 4]), batch_first=True)
    return m.last(nn.utils.rnn.pad_packed_sequence(m.layer(steps)[0], batch_first=True)[0])


def cell(kind: type[nn.Module]) -> Any:
    def steps(m: Any, x: Tensor) -> Tensor:
        state = None
        for part in m.stem(x).unbind(1):
            state = m.layer(part, state)
        return m.last(state[0] if isinstance(state, tuple) else state)

    return sequence(steps, layer=kind(8, 10), last=nn.Linear(10, 3))


def attend(m: Any, x: Tensor) -> Tensor:
    h = m.stem(x)
    return m.head(m.attention(h, h, h, need_weights=False)[0])


def cross(m: Any, x: Tensor, y: Tensor) -> Tensor:
    out, weights = m.attention(m.stem(x), m.memory(y), m.value(y))
    return m.head(out) + weights.sum()


def bag(m: Any, words: Tensor, starts: Tensor) -> Tensor:
    return m.head(m.bag(words, starts))


def pairs(function: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """Two layers whose neurons meet one to one."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return function(m.left(x), m.right(x))

    return Call(forward, left=nn.Linear(6, 8), right=nn.Linear(6, 8)), torch.randn(POINT)


def folded(m: Any, x: Tensor) -> Tensor:
    patches = m.unfold(m.stem(x))
    return m.head(m.fold(m.mix(patches.transpose(1, 2)).transpose(1, 2)))


def unpooled(m: Any, x: Tensor) -> Tensor:
    h, where = m.pool(m.stem(x))
    return m.head(m.unpool(h, where))


def deformed(m: Any, x: Tensor) -> Tensor:
    h = m.stem(x)
    return m.head(m.layer(h, m.offset(h), m.mask(h).sigmoid()))


def halved() -> nn.Module:
    samples = torch.rand(2, 1, 2).repeat(1, 8, 1)  # the same windows in every channel
    return nn.FractionalMaxPool2d(2, output_size=5, _random_samples=samples)


def words(*shape: int) -> Tensor:
    return torch.randint(0, 11, shape)


def normed() -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {}
    for n in (1, 2, 3):
        for kind, options in (
            ("BatchNorm", {}), ("InstanceNorm", {"affine": True, "track_running_stats": True}),
        ):  # fmt: skip
            layer = getattr(nn, f"{kind}{n}d")
            found[f"{kind}{n}d"] = lambda n=n, layer=layer, options=options: spatial(n, layer(8, **options))
    return found


def convolutions() -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {}
    kinds = {
        "": {}, ", groups": {"groups": 2}, ", depthwise": {"groups": 8}, ", stride": {"stride": 2, "dilation": 2},
    }  # fmt: skip
    for n in (1, 2, 3):
        for transposed in ("", "Transpose"):
            layer = getattr(nn, f"Conv{transposed}{n}d")
            for kind, options in kinds.items():
                found[f"Conv{transposed}{n}d{kind}"] = partial(_convolution, n, layer, options)
    return found


def _convolution(n: int, layer: type[nn.Module], options: dict[str, int]) -> Any:
    return spatial(n, layer(8, 16, 3, padding=1, **options), nn.ReLU(), out=16)


def pools() -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {}
    for n in (1, 2, 3):
        for kind, given in (
            ("MaxPool", 2), ("AvgPool", 2), ("AdaptiveAvgPool", 2), ("AdaptiveMaxPool", 3), ("ReflectionPad", 1),
            ("ReplicationPad", 2), ("ConstantPad", (1, 0.5)), ("ZeroPad", 1), ("CircularPad", 1), ("LPPool", (2, 2)),
        ):  # fmt: skip
            layer = getattr(nn, f"{kind}{n}d")
            arguments = given if isinstance(given, tuple) else (given,)
            found[layer.__name__] = lambda n=n, layer=layer, a=arguments: spatial(n, layer(*a))
    return found


def activations() -> dict[str, Callable[[], Any]]:
    names = """
        CELU ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid Mish PReLU RReLU ReLU ReLU6 SELU
        SiLU Sigmoid Softplus Softshrink Softsign Tanh Tanhshrink AlphaDropout Dropout FeatureAlphaDropout
        """.split()
    chosen: dict[str, Callable[[], Any]] = {name: lambda name=name: flat(getattr(nn, name)()) for name in names}
    chosen |= {name: lambda name=name: flat(getattr(nn, name)(-1)) for name in ("LogSoftmax", "Softmax", "Softmin")}
    return chosen


NETWORKS: dict[str, Callable[[], Any]] = {
    "Linear": flat,
    "Bilinear": lambda: (
        Call(lambda m, x, y: m.head(m.layer(m.a(x), m.b(y))), a=nn.Linear(6, 8), b=nn.Linear(5, 7),
             layer=nn.Bilinear(8, 7, 9), head=nn.Linear(9, 3)),
        (torch.randn(4, 6), torch.randn(4, 5)),
    ),
    "Embedding": lambda: (nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 3)), words(2, 5)),
    "Embedding, tied head": lambda: (
        Call(lambda m, x: m.layer(m.table(x)) @ m.table.weight.T, table=nn.Embedding(11, 8), layer=nn.Linear(8, 8)),
        words(2, 5),
    ),
    **{
        f"EmbeddingBag, {mode}": lambda mode=mode: (
            Call(bag, bag=nn.EmbeddingBag(11, 8, mode=mode), head=nn.Linear(8, 3)), (words(9), torch.tensor([0, 4])),
        )
        for mode in ("sum", "mean", "max")
    },
    **convolutions(),
    "DeformConv2d": lambda: (
        Call(deformed, stem=nn.Conv2d(3, 8, 3), layer=DeformConv2d(8, 6, 3, groups=2), offset=nn.Conv2d(8, 18, 3),
             mask=nn.Conv2d(8, 9, 3), head=nn.Conv2d(6, 3, 1)),
        torch.randn(IMAGE),
    ),
    **normed(),
    "FrozenBatchNorm2d": lambda: spatial(2, FrozenBatchNorm2d(8)),
    "LayerNorm": lambda: flat(nn.LayerNorm(8)),
    "RMSNorm": lambda: flat(nn.RMSNorm(8)),
    "GroupNorm": lambda: spatial(2, nn.GroupNorm(2, 8)),
    "GroupNorm, one group": lambda: spatial(2, nn.GroupNorm(1, 8)),
    "LocalResponseNorm": lambda: (
        nn.Sequential(*spatial(2, nn.LocalResponseNorm(3))[0], nn.Conv2d(4, 6, 1), nn.Conv2d(6, 2, 1)),
        torch.randn(IMAGE),
    ),
    "weight_norm": lambda: flat(parametrizations.weight_norm(nn.Linear(8, 8))),
    "spectral_norm": lambda: flat(parametrizations.spectral_norm(nn.Linear(8, 8)), nn.Linear(8, 8)),
    "orthogonal": lambda: flat(parametrizations.orthogonal(nn.Linear(8, 8)), nn.Linear(8, 8)),
    **activations(),
    "GLU": lambda: flat(nn.Linear(8, 16), nn.GLU()),
    "Threshold": lambda: flat(nn.Threshold(0.1, 0.5)),
    "Softmax2d": lambda: spatial(2, nn.Softmax2d()),
    "Dropout2d": lambda: spatial(2, nn.Dropout2d()),
    "Identity": lambda: flat(nn.Identity()),
    **pools(),
    "FractionalMaxPool2d": lambda: spatial(2, halved()),
    "MaxUnpool2d": lambda: (
        Call(unpooled, stem=nn.Conv2d(3, 8, 3), pool=nn.MaxPool2d(2, return_indices=True), unpool=nn.MaxUnpool2d(2),
             head=nn.Conv2d(8, 3, 1)),
        torch.randn(IMAGE),
    ),
    **{
        f"Upsample, {mode}": lambda mode=mode, n=n: spatial(n, nn.Upsample(scale_factor=2, mode=mode))
        for mode, n in {
            "nearest": 1, "nearest-exact": 2, "linear": 1, "bilinear": 2, "bicubic": 2, "trilinear": 3,
        }.items()
    },
    "PixelShuffle": lambda: spatial(2, nn.PixelShuffle(2), out=2),
    "PixelUnshuffle": lambda: spatial(2, nn.PixelUnshuffle(2), out=32),
    "ChannelShuffle": lambda: spatial(2, nn.ChannelShuffle(2)),
    "Flatten": lambda: (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(800, 5)), torch.randn(IMAGE),
    ),
    "Unflatten": lambda: (
        nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 32), nn.Unflatten(1, (8, 2, 2)), nn.Conv2d(8, 3, 2)),
        torch.randn(POINT),
    ),
    "Unfold, Fold": lambda: (
        Call(folded, stem=nn.Conv2d(3, 4, 3, padding=1), unfold=nn.Unfold(3, padding=1, stride=3),
             mix=nn.Linear(36, 36), fold=nn.Fold((12, 12), 3, padding=1, stride=3), head=nn.Conv2d(4, 3, 1)),
        torch.randn(IMAGE),
    ),
    "CosineSimilarity": lambda: pairs(nn.CosineSimilarity(1)),
    "PairwiseDistance": lambda: pairs(nn.PairwiseDistance()),
    "cdist": lambda: pairs(torch.cdist),
    "normalize": lambda: pairs(lambda x, y: F.normalize(x) @ F.normalize(y).T),
    **{
        f"{kind.__name__}{said}": lambda kind=kind, options=options: recurrent(kind, **options)
        for kind in (nn.RNN, nn.LSTM, nn.GRU)
        for said, options in (("", {}), (", two layers", {"num_layers": 2}), (", both ways", {"bidirectional": True}))
    },
    "LSTM, projected": lambda: recurrent(nn.LSTM, proj_size=5),
    "LSTM, packed": lambda: sequence(packed, layer=nn.LSTM(8, 10, batch_first=True), last=nn.Linear(10, 3)),
    **{kind.__name__: lambda kind=kind: cell(kind) for kind in (nn.RNNCell, nn.LSTMCell, nn.GRUCell)},
    "MultiheadAttention": lambda: sequence(attend, attention=nn.MultiheadAttention(8, 2, batch_first=True)),
    "MultiheadAttention, bias_kv": lambda: sequence(
        attend, attention=nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True, add_zero_attn=True)
    ),
    "MultiheadAttention, cross": lambda: (
        Call(cross, stem=nn.Linear(6, 8), memory=nn.Linear(5, 9), value=nn.Linear(5, 10), head=nn.Linear(8, 3),
             attention=nn.MultiheadAttention(8, 2, kdim=9, vdim=10, batch_first=True)),
        (torch.randn(TOKENS), torch.randn(2, 4, 5)),
    ),
    **{
        f"TransformerEncoderLayer{said}": lambda options=options: sequence(
            lambda m, x: m.head(m.layer(m.stem(x))),
            layer=nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, **options),
        )
        for said, options in (("", {}), (", norm first", {"norm_first": True, "activation": "gelu"}))
    },
    "TransformerEncoder": lambda: sequence(
        lambda m, x: m.head(m.layers(m.stem(x))),
        layers=nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2, nn.LayerNorm(8)),
    ),
    "TransformerDecoderLayer": lambda: sequence(
        lambda m, x: m.head(m.layer(m.stem(x), m.stem(x[:, :4]))),
        layer=nn.TransformerDecoderLayer(8, 2, 12, batch_first=True),
    ),
    "TransformerDecoder": lambda: sequence(
        lambda m, x: m.head(m.layers(m.stem(x), m.stem(x[:, :4]), nn.Transformer.generate_square_subsequent_mask(7))),
        layers=nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 12, batch_first=True), 2),
    ),
    "Transformer": lambda: sequence(
        lambda m, x: m.head(m.network(m.stem(x), m.stem(x[:, :4]))),
        network=nn.Transformer(8, 2, 2, 2, 12, batch_first=True),
    ),
    "AdaptiveLogSoftmaxWithLoss": lambda: (
        Call(lambda m, x: m.head.log_prob(m.stem(x)), stem=nn.Linear(6, 8),
             head=nn.AdaptiveLogSoftmaxWithLoss(8, 12, [4, 8], div_value=2.0)),
        torch.randn(POINT),
    ),
    "parameter by einsum": lambda: (
        Call(lambda m, x: torch.einsum("nd,hdk,hke->ne", m.stem(x), m.up, m.down), stem=nn.Linear(6, 8),
             up=parameter(2, 8, 5), down=parameter(2, 5, 3)),
        torch.randn(POINT),
    ),
}  # fmt: skip


def networks() -> dict[str, Callable[[], tuple[nn.Module, Any]]]:
    return NETWORKS
