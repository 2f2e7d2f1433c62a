"""What the examples share: measuring a classifier, the ensemble of several, and a table on the terminal."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Ensemble(nn.Module):
    """The mean of the members' logits: as many forward passes as members, and the ceiling for one merged network."""

    def __init__(self, *members: nn.Module):
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([member(x) for member in self.members]).mean(0)


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
