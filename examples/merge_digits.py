"""Train two small networks on scikit-learn's digits from different seeds, merge them, and say how good each is.

    python examples/merge_digits.py
    python examples/merge_digits.py --architecture resnet --matcher activations --save merged

Needs no download and no GPU. Two thirds of the 1,797 images of 8x8 pixels train the parents, the last third is only
looked at for the table. The images that a matcher and the repair see are training images without their labels.
"""

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import digits, evaluate, table, train
from torch import Tensor, nn

import fxmerge
from fxmerge.matchers import ActivationMatching, Average, WeightMatching


class MLP(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 20), nn.ReLU(), nn.Linear(20, 10)
        )  # fmt: skip


class CNN(nn.Sequential):
    """Two convolutions without normalisation, flattened as channels x height x width into a linear layer."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(32 * 2 * 2, 32), nn.ReLU(), nn.Linear(32, 10),
        )  # fmt: skip


class ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Three residual blocks with BatchNorm; the second has a projection for a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(ResidualBlock(16, 16, 1), ResidualBlock(16, 32, 2), ResidualBlock(32, 32, 1))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.norm(self.stem(x)))).mean((2, 3)))


class EncoderBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """A vision transformer over 2x2 patches with a class token."""

    def __init__(self, width: int = 32, heads: int = 4, depth: int = 2):
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, 17, width))
        self.blocks = nn.Sequential(*(EncoderBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(patches.shape[0], -1, -1), patches], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "mlp": MLP,
    "cnn": CNN,
    "resnet": ResNet,
    "transformer": Transformer,
}
MATCHERS = {"average": Average, "weights": WeightMatching, "activations": ActivationMatching}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="mlp")
    parser.add_argument("--matcher", choices=MATCHERS, action="append", help="may be given twice; default: every one")
    parser.add_argument("--seed", type=int, default=0, help="the parents train from this seed and the one after")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--save", metavar="FOLDER", help="write what the last matcher merged, and read it back")
    args = parser.parse_args()

    images, labels, *held_out = digits()
    rows = []

    def measure(name: str, model: nn.Module, seconds: float | None) -> None:
        accuracy, loss = evaluate(model, *held_out)
        rows.append((name, f"{accuracy:.1f}", f"{loss:.3f}", "" if seconds is None else f"{seconds:.1f}"))

    parents = []
    for name, seed in (("parent A", args.seed), ("parent B", args.seed + 1)):
        start = time.perf_counter()
        parents.append(train(ARCHITECTURES[args.architecture], seed, images, labels, args.epochs))
        measure(name, parents[-1], time.perf_counter() - start)

    jobs = [("plain average", "average", {"repair": None})]
    jobs += [(f"merged by {name}, repaired", name, {}) for name in args.matcher or MATCHERS]
    for name, matcher, options in jobs:
        start = time.perf_counter()
        result = fxmerge.merge(
            *parents,
            example_inputs=images[:2],
            data=images.split(200),
            matcher=MATCHERS[matcher](),
            progress=False,
            **options,
        )
        measure(name, result.module, time.perf_counter() - start)
    measure("ensemble of A and B", fxmerge.Ensemble(*parents), None)

    print(result.report, end="\n\n")
    print(table(("digits, held-out third", "accuracy %", "loss", "seconds"), rows))

    if args.save:
        result.save(args.save)
        loaded = fxmerge.load(args.save)
        with torch.no_grad():
            same = torch.equal(loaded(held_out[0]), result.module(held_out[0]))
        print(f"\nsaved to {args.save}; read back, its outputs are {'the same' if same else 'DIFFERENT'}")


if __name__ == "__main__":
    main()
