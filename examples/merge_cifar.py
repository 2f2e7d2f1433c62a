"""Merge pairs of CIFAR-10 networks with every method, and print how far each lands from its parents.

    python examples/merge_cifar.py                   # downloads CIFAR-10 and trains a pair first
    python examples/merge_cifar.py --zoo FOLDER --data cifar10_jpeg.npz

``--zoo`` holds checkpoints named ``ARCHITECTURE_anything.safetensors``; every two of one architecture are a pair.
``--data`` is an archive with ``{train,test}_jpeg`` (bytes), ``_offsets`` and ``_labels``; without it torchvision
downloads CIFAR-10 into ``--root``. Matching and the repair of BatchNorm see unlabelled training images only.
"""

import argparse
import io
import itertools
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import evaluate, table
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.datasets import CIFAR10
from tqdm import tqdm

import fxmerge
from fxmerge.matchers import ActivationMatching, Average, CCAMerge, OTFusion, PLeaS, WeightMatching, ZipIt
from fxmerge.repair import Distill, LeastSquares

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
METHODS = {
    "average, not repaired": (Average(), None),
    "average": (Average(), "auto"),
    "weights": (WeightMatching(), "auto"),
    "activations": (ActivationMatching(), "auto"),
    "transport": (OTFusion(), "auto"),
    "cca": (CCAMerge(), "auto"),
    "zipit": (ZipIt(), "auto"),
    "pleas 1.45x": (PLeaS(1.45), "auto"),
    "pleas 2.25x": (PLeaS(2.25), "auto"),
    "activations, least squares": (ActivationMatching(), LeastSquares()),
    "cca, least squares": (CCAMerge(), LeastSquares()),
    "pleas 1.45x, least squares": (PLeaS(1.45), LeastSquares()),
    "activations, distilled": (ActivationMatching(), Distill(first=LeastSquares())),
    "pleas 1.45x, distilled": (PLeaS(1.45), Distill(first=LeastSquares())),
}
"""Matcher and repair; without more words, BatchNorm statistics are re-estimated."""


class PadShortcut(nn.Module):
    """Option A of He et al. (2016): subsample, and zero-pad the channels on both sides."""

    def __init__(self, extra: int):
        super().__init__()
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra, self.extra))


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential() if stride == 1 else PadShortcut((outputs - inputs) // 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """The CIFAR network of He et al. with ``6 * blocks + 2`` layers."""

    def __init__(self, blocks: int, width: int = 16):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(width, width, blocks)
        self.layer2 = self._stage(width, 2 * width, blocks)
        self.layer3 = self._stage(2 * width, 4 * width, blocks)
        self.linear = nn.Linear(4 * width, 10)

    @staticmethod
    def _stage(inputs: int, outputs: int, blocks: int) -> nn.Sequential:
        first = Block(inputs, outputs, 1 if inputs == outputs else 2)
        return nn.Sequential(first, *(Block(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class VGG(nn.Module):
    """VGG-11 with BatchNorm for 32x32 images; ``scale`` multiplies every width."""

    def __init__(self, scale: float):
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for width in (64, None, 128, None, 256, 256, None, 512, 512, None, 512, 512, None):
            if width is None:
                layers.append(nn.MaxPool2d(2))
                continue
            outputs = int(width * scale)
            layers += [
                nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(inplace=True),
            ]
            inputs = outputs
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(inputs, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


ARCHITECTURES = {
    "vgg11bn_quarter": partial(VGG, 0.25),
    "vgg11bn_half": partial(VGG, 0.5),
    "resnet20": partial(ResNet, 3),
}


def cifar10(split: str, archive: Path | None, root: Path, index: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor]:
    """The images of one split at ``index`` as uint8 [N, 3, 32, 32], and their labels [N]."""
    if archive is None:
        dataset = CIFAR10(root, train=split == "train", download=True)
        return torch.from_numpy(dataset.data).permute(0, 3, 1, 2)[index], torch.tensor(dataset.targets)[index]
    with np.load(archive) as arrays:
        stream, offsets = arrays[f"{split}_jpeg"], torch.from_numpy(arrays[f"{split}_offsets"])
        labels = torch.from_numpy(arrays[f"{split}_labels"]).long()
    spans = zip(offsets[:-1][index].tolist(), offsets[1:][index].tolist(), strict=True)
    images = np.stack([Image.open(io.BytesIO(stream[a:b])) for a, b in spans])
    return torch.from_numpy(images).permute(0, 3, 1, 2), labels[index]


def normalise(images: Tensor) -> Tensor:
    return (images.float() / 255 - MEAN) / STD


def load_zoo(folder: Path, wanted: list[str]) -> dict[str, dict[str, nn.Module]]:
    """Architecture -> checkpoint name -> network, for every checkpoint in ``folder``."""
    zoo: dict[str, dict[str, nn.Module]] = defaultdict(dict)
    for path in sorted(folder.glob("*.safetensors")):
        architecture = path.stem.rpartition("_")[0]
        if architecture in wanted:
            model = ARCHITECTURES[architecture]()
            model.load_state_dict(load_file(path))
            zoo[architecture][path.stem] = model.eval()
    return zoo


def train(architecture: str, seed: int, images: Tensor, labels: Tensor, epochs: int, batch: int = 256) -> nn.Module:
    """SGD with a one-cycle schedule, random crops and flips."""
    torch.manual_seed(seed)
    model = ARCHITECTURES[architecture]().train()
    steps = len(images) // batch
    optimiser = torch.optim.SGD(model.parameters(), 0.4, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.4, total_steps=epochs * steps, pct_start=0.25)
    with tqdm(total=epochs * steps, desc=f"training {architecture}, seed {seed}", unit="step", disable=None) as bar:
        for _ in range(epochs):
            for index in torch.randperm(len(images)).split(batch)[:steps]:
                x = F.pad(normalise(images[index]), (4, 4, 4, 4))
                top, left = torch.randint(9, (2,)).tolist()
                x = x[:, :, top : top + 32, left : left + 32]
                x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x)
                loss = F.cross_entropy(model(x), labels[index])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval()


def train_zoo(args: argparse.Namespace) -> dict[str, dict[str, nn.Module]]:
    print(
        f"no --zoo: training two networks for {args.epochs} epochs each on the CPU, a minute or more per epoch;\n"
        f"they are kept in {args.root}, and --zoo {args.root} uses them again",
        flush=True,
    )
    images, labels = cifar10("train", args.data, args.root)
    zoo: dict[str, dict[str, nn.Module]] = defaultdict(dict)
    for architecture, seed in itertools.product(args.architectures, (1, 2)):
        model = train(architecture, seed, images, labels, args.epochs)
        name = f"{architecture}_s{seed}"
        args.root.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), args.root / f"{name}.safetensors")
        zoo[architecture][name] = model
    return zoo


def compare(
    pair: dict[str, nn.Module], calibration: tuple[Tensor, ...], images: Tensor, labels: Tensor, methods: list[str]
) -> str:
    """The table of one pair: parents, the bare average, every method, and the ensemble."""
    a, b = pair.values()
    measured: list[tuple[str, float, float, str, str]] = []
    one = sum(p.numel() for p in a.parameters())

    def measure(name: str, model: nn.Module, seconds: str = "") -> None:
        size = sum(p.numel() for p in model.parameters()) / one
        measured.append((name, *evaluate(model, images, labels, normalise), f"{size:.2f}", seconds))

    for name, parent in pair.items():
        measure(name, parent)
    for name in methods:
        matcher, repair = METHODS[name]
        start = time.process_time()
        merged = fxmerge.merge(
            a, b, example_inputs=calibration[0][:2], data=calibration, matcher=matcher, repair=repair
        )
        measure(name, merged.module, f"{time.process_time() - start:.1f}")
    measure("ensemble of logits", fxmerge.Ensemble(a, b))

    level = (measured[0][1] + measured[1][1]) / 2
    rows = [
        (name, f"{acc:.2f}", f"{acc - level:+.2f}", f"{loss:.3f}", size, seconds)
        for name, acc, loss, size, seconds in measured
    ]
    header = (f"{len(labels)} test images", "accuracy %", "from the parents", "loss", "size", "CPU-s to merge")
    return table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path, metavar="FOLDER", help="trained checkpoints; without it two are trained")
    parser.add_argument("--data", type=Path, metavar="FILE.npz", help="CIFAR-10 as an archive of JPEG images")
    parser.add_argument("--root", type=Path, default=Path("out/cifar"), help="where downloads and trained parents go")
    parser.add_argument(
        "--architectures", help=f"of {','.join(ARCHITECTURES)}; default: all of a zoo, the first to train"
    )
    parser.add_argument("--methods", nargs="+", default=list(METHODS), metavar="METHOD", help=f"of {list(METHODS)}")
    parser.add_argument("--epochs", type=int, default=5, help="for training the parents")
    parser.add_argument("--calibration", type=int, default=2000, metavar="N", help="unlabelled training images")
    parser.add_argument("--calibration-seed", type=int, default=0)
    parser.add_argument("--test-images", type=int, default=10_000, metavar="N")
    args = parser.parse_args()
    if unknown := set(args.methods) - set(METHODS):
        parser.error(f"no method {', '.join(unknown)}; there are {', '.join(METHODS)}")
    args.architectures = (args.architectures or ",".join(ARCHITECTURES if args.zoo else ["vgg11bn_quarter"])).split(",")
    if unknown := set(args.architectures) - set(ARCHITECTURES):
        parser.error(f"no architecture {', '.join(unknown)}; there are {', '.join(ARCHITECTURES)}")

    zoo = load_zoo(args.zoo, args.architectures) if args.zoo else train_zoo(args)
    pairs = [pair for members in zoo.values() for pair in itertools.combinations(members.items(), 2)]
    if not pairs:
        parser.error(f"no two checkpoints of one architecture in {args.zoo}")

    draw = torch.randperm(50_000, generator=torch.Generator().manual_seed(args.calibration_seed))[: args.calibration]
    calibration = normalise(cifar10("train", args.data, args.root, draw)[0]).split(250)
    images, labels = cifar10("test", args.data, args.root, slice(args.test_images))

    for pair in pairs:
        print("\n" + compare(dict(pair), calibration, images, labels, args.methods), flush=True)


if __name__ == "__main__":
    main()
