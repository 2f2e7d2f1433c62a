"""What the examples share: digits, training, measuring, tables on the terminal, figures."""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from fxmerge.matchers import ActivationMatching, Average, CCAMerge, OTFusion, PLeaS, WeightMatching, ZipIt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


MATCHERS = {
    "average": Average(),
    "weight matching": WeightMatching(),
    "activation matching": ActivationMatching(),
    "OTFusion": OTFusion(),
    "CCA Merge": CCAMerge(),
    "ZipIt!": ZipIt(),
    "PLeaS, 1.5x": PLeaS(budget=1.5),
}


class ConvNet(nn.Sequential):
    """Three convolutions with BatchNorm and a linear layer, for 8x8 images; ``width`` channels in the first."""

    def __init__(self, width: int = 16, classes: int = 10):
        wide = 2 * width
        super().__init__(
            nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, wide, 3, padding=1, bias=False), nn.BatchNorm2d(wide), nn.ReLU(),
            nn.Conv2d(wide, wide, 3, padding=1, bias=False), nn.BatchNorm2d(wide), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(wide, classes),
        )  # fmt: skip


class Perceptron(nn.Sequential):
    """Three hidden layers of ReLUs on 8x8 images."""

    def __init__(self, width: int = 64, classes: int = 10):
        super().__init__(
            nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes),
        )  # fmt: skip


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images [1198, 1, 8, 8] in [0, 1], their labels, and the held-out third."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    y = torch.tensor(labels, dtype=torch.int64)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    train, held_out = order[: 2 * len(y) // 3], order[2 * len(y) // 3 :]
    return x[train], y[train], x[held_out], y[held_out]


def train(build: Callable[[], nn.Module], seed: int, images: Tensor, labels: Tensor, epochs: int) -> nn.Module:
    torch.manual_seed(seed)
    model = build().train()
    steps = len(images) // 64
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, total_steps=epochs * steps)
    bar = tqdm(range(epochs), desc=f"training, seed {seed}", unit="epoch", disable=None, leave=False)
    for _ in bar:
        for index in torch.randperm(len(images)).split(64)[:steps]:
            loss = F.cross_entropy(model(images[index]), labels[index])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    return model.eval()


@torch.no_grad()
def evaluate(
    model: nn.Module, images: Tensor, labels: Tensor, prepare: Callable[[Tensor], Tensor] = lambda x: x
) -> tuple[float, float]:
    """Accuracy in percent and mean cross-entropy of ``model(prepare(images))``, a thousand images at a time."""
    model.eval()
    correct, loss = 0, 0.0
    for x, y in zip(images.split(1000), labels.split(1000), strict=True):
        logits = model(prepare(x))
        correct += int((logits.argmax(1) == y).sum())
        loss += float(F.cross_entropy(logits, y, reduction="sum"))
    return 100 * correct / len(labels), loss / len(labels)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """In percent."""
    return evaluate(model, images, labels)[0]


def average(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and standard deviation around it."""
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1))


def cell(values: Sequence[float]) -> str:
    """Mean and standard deviation, to one decimal."""
    mean, deviation = average(values)
    return f"{mean:.1f} ± {deviation:.1f}" if len(values) > 1 else f"{mean:.1f}"


def size(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def arguments(doc: str, *, epochs: int, repeats: int) -> argparse.Namespace:
    """The options that the experiments have in common, read from the command line."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=epochs, help="of training the parents (default: %(default)s)")
    parser.add_argument(
        "--repeats", type=int, default=repeats, help="with parents of other seeds (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first parent; the others' follow it")
    parser.add_argument("--out", type=Path, default=Path("figures"), help="folder of the figure (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="two epochs, once, fewer points: does it run at all?")
    args = parser.parse_args()
    if args.quick:
        args.epochs, args.repeats = 2, 1
    return args


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, align: str = "", markdown: bool = False) -> str:
    """Columns under a header; ``align`` has "l" or "r" per column, by default "l" first and then "r"."""
    align = align or "l" + "r" * (len(header) - 1)
    widths = [max(len(row[k]) for row in (header, *rows)) for k in range(len(header))]
    edge, gap = ("| ", " | ") if markdown else ("", "  ")

    def line(cells: Sequence[str]) -> str:
        padded = (c.ljust(w) if a == "l" else c.rjust(w) for a, c, w in zip(align, cells, widths, strict=True))
        return (edge + gap.join(padded) + edge[::-1]).rstrip()

    if markdown:
        cells = ("-" * (w + 2) if a == "l" else "-" * (w + 1) + ":" for a, w in zip(align, widths, strict=True))
        rule = "|" + "|".join(cells) + "|"
    else:
        rule = "-" * (sum(widths) + len(gap) * (len(widths) - 1))
    return "\n".join([line(header), rule, *(line(row) for row in rows)])


def figure(columns: int = 1, measured: str = "held-out accuracy (%)") -> tuple["Figure", list["Axes"]]:
    """A figure with panels side by side that share their vertical axis."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(4.5 + 3.5 * columns, 4.5), layout="constrained")
    panels = list(fig.subplots(1, columns, sharey=True, squeeze=False)[0])
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    panels[0].set_ylabel(measured)
    return fig, panels


def bars(axes: "Axes", groups: Sequence[str], series: dict[str, Sequence[Sequence[float]]]) -> None:
    """Per group a bar of every series: the mean of its values, and their standard deviation."""
    width = 0.8 / len(series)
    for i, (name, values) in enumerate(series.items()):
        means, deviations = zip(*(average(v) for v in values), strict=True)
        places = [g - 0.4 + (i + 0.5) * width for g in range(len(groups))]
        axes.bar(places, means, width, yerr=deviations, label=name, error_kw={"elinewidth": 0.8})
    axes.set_xticks(range(len(groups)), groups, rotation=30, ha="right", rotation_mode="anchor")


def save(fig: "Figure", folder: Path, name: str) -> None:
    """Writes the figure with its legend on the right, outside the panels."""
    handles, labels = fig.axes[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside right upper", frameon=False)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.png"
    fig.savefig(path, dpi=150)
    print(f"wrote {path}")
