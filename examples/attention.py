"""The loss barrier between two transformers from different seeds, before and after their neurons are aligned.

    python examples/attention.py                          # characters of Python's standard library, and the digits
    python examples/attention.py --data cifar10_jpeg.npz  # images of CIFAR-10 (as merge_cifar.py reads them)

As in Git Re-Basin (Ainsworth et al., 2209.04836): the loss at every place of the straight line between the networks.
A two-layer language model with the layers of GPT-2, and a small vision transformer. Attention heads are matched as
wholes, with queries and keys inside them together, and values; the residual stream is one class, which every layer
writes and reads. "Norms folded": every LayerNorm's scale and shift stand in the layer that reads it, which leaves the
networks' functions alone. The rows with least squares are no lines: one network, merged and fitted without labels.
"""

import argparse
import copy
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from common import digits, figure, save, table
from torch import Tensor, nn
from tqdm import tqdm

import fxmerge
from fxmerge.interfaces import AbstractMatcher
from fxmerge.matchers import ActivationMatching, CCAMerge, WeightMatching
from fxmerge.repair import LeastSquares

Batches = Sequence[tuple[Tensor, Tensor]]


class Block(nn.Module):
    """Attention and a perceptron, each behind a LayerNorm, added to the stream."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        y = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), is_causal=self.causal)
        x = x + self.out(y.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Blocks on a stream of tokens [batch, tokens, width], a norm and a linear head."""

    def __init__(self, tokens: int, width: int, heads: int, depth: int, outputs: int, causal: bool):
        super().__init__()
        self.position = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.blocks = nn.Sequential(*(Block(width, heads, causal) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, outputs)

    def stream(self, x: Tensor) -> Tensor:
        return self.norm(self.blocks(x + self.position))


class LanguageModel(Transformer):
    """Next-character scores [batch, tokens, characters]; embedding and head are not tied."""

    def __init__(self, characters: int, tokens: int = 48, width: int = 64):
        super().__init__(tokens, width, 4, 2, characters, causal=True)
        self.embedding = nn.Embedding(characters, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stream(self.embedding(x)))


class VisionTransformer(Transformer):
    """Scores [batch, 10] from the mean over patches."""

    def __init__(self, channels: int, pixels: int, patch: int, width: int = 48, depth: int = 2):
        super().__init__((pixels // patch) ** 2, width, 4, depth, 10, causal=False)
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stream(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


def folded(model: Transformer) -> Transformer:
    """The same function with the scale and shift of every norm in the linear layer that reads it."""
    model = copy.deepcopy(model)
    pairs = [pair for b in model.blocks for pair in ((b.norm1, b.qkv), (b.norm2, b.up))]
    with torch.no_grad():
        for norm, layer in [*pairs, (model.norm, model.head)]:
            layer.bias += layer.weight @ norm.bias
            layer.weight *= norm.weight
            norm.weight.fill_(1)
            norm.bias.zero_()
    return model


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Mean over the batch, and over the characters of a text."""
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


def train(build: Callable[[], Transformer], seed: int, draw: Callable[[int], tuple[Tensor, Tensor]], steps: int):
    torch.manual_seed(seed)
    model = build().train()
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    bar = tqdm(range(steps), desc=f"training, seed {seed}", unit="step", disable=None, leave=False)
    for _ in bar:
        x, y = draw(32)
        loss = cross_entropy(model(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval()


def text(tokens: int = 48) -> tuple[Callable[[], Transformer], Callable[[int], tuple[Tensor, Tensor]], Batches]:
    """Characters of Python's standard library; the last tenth of it is held out."""
    folder = Path(os.__file__).parent
    source = "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py")))
    source = "".join(c for c in source if c.isascii() and (c.isprintable() or c == "\n"))
    alphabet = {c: i for i, c in enumerate(sorted(set(source)))}
    ids = torch.tensor([alphabet[c] for c in source])
    seen, held_out = ids[: 9 * len(ids) // 10], ids[9 * len(ids) // 10 :]

    def draw(count: int, of: Tensor = seen) -> tuple[Tensor, Tensor]:
        rows = of[torch.randint(len(of) - tokens, (count, 1)) + torch.arange(tokens + 1)]
        return rows[:, :-1], rows[:, 1:]

    torch.manual_seed(0)
    return partial(LanguageModel, len(alphabet), tokens), draw, [draw(64, held_out) for _ in range(10)]


def images(archive: Path | None) -> tuple[Callable[[], Transformer], Callable[[int], tuple[Tensor, Tensor]], Batches]:
    """The digits, or CIFAR-10 from an archive; mirrored at random where they are photographs."""
    if archive is None:
        x, y, *held_out = digits()
        build = partial(VisionTransformer, 1, 8, 2)
    else:
        from merge_cifar import cifar10, normalise

        (x, y), held_out = (cifar10(split, archive, archive.parent) for split in ("train", "test"))
        x, held_out = normalise(x), (normalise(held_out[0]), held_out[1])
        build = partial(VisionTransformer, 3, 32, 4, 96, 4)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        index = torch.randint(len(x), (count,))
        batch = x[index] if archive is None or torch.rand(()) < 0.5 else x[index].flip(-1)
        return batch, y[index]

    return build, draw, list(zip(*(t[:4000].split(200) for t in held_out), strict=True))


def moved(model: Transformer, to: Transformer, inputs: Sequence[Tensor], matcher: AbstractMatcher) -> nn.Module:
    return fxmerge.align(model, to=to, example_inputs=inputs[0][:2], data=inputs, matcher=matcher, progress=False)


def compared(
    a: Transformer, b: Transformer, inputs: Sequence[Tensor], held_out: Batches, points: int
) -> tuple[dict[str, fxmerge.Barrier], list[tuple[str, ...]]]:
    """The lines between two networks, per kind of alignment, and a table of them and of what a merge gives."""
    lines: dict[str, fxmerge.Barrier] = {}
    rows: list[tuple[str, ...]] = []
    measure = partial(fxmerge.evaluate_barrier, data=held_out, loss=cross_entropy, progress=False)
    scaled = folded(a), folded(b)
    for name, (one, other), matcher in [
        ("as they are", (a, b), None),
        ("weights", (a, b), WeightMatching()),
        ("activations", (a, b), ActivationMatching()),
        ("weights, norms folded", scaled, WeightMatching()),
        ("activations, norms folded", scaled, ActivationMatching()),
    ][: 3 if points < 4 else None]:
        line = measure(one, other if matcher is None else moved(other, one, inputs, matcher), points=points)
        lines[name] = line
        rows.append((name, f"{line.loss[points // 2]:.3f}", f"{line.barrier:.3f}"))
    ends = (line.loss[0] + line.loss[-1]) / 2
    options = {"example_inputs": inputs[0][:2], "data": inputs, "progress": False}
    fitted = [("activations", ActivationMatching()), ("CCA", CCAMerge(gamma=float("inf")))]
    for name, matcher in fitted[: 1 if points < 4 else None]:
        merged = fxmerge.merge(*scaled, matcher=matcher, repair=LeastSquares(), **options).module
        loss = measure(merged, merged, points=2).loss[0]
        rows.append((f"{name}, norms folded, least squares", f"{loss:.3f}", f"{loss - ends:.3f}"))
    return lines, [*rows, ("the two networks, on average", f"{ends:.3f}", "")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1200, help="of training each network (default: %(default)s)")
    parser.add_argument("--data", type=Path, help="archive of CIFAR-10, instead of the digits")
    parser.add_argument("--seed", type=int, default=0, help="of the first network; the second's follows it")
    parser.add_argument("--out", type=Path, default=Path("figures"), help="folder of the figure (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="ten steps, fewer points and methods: does it run at all?")
    args = parser.parse_args()
    steps, points, batches = (10, 3, 2) if args.quick else (args.steps, 11, 32)
    fig, panels = figure(2, "held-out loss above the line between the ends (nats)")
    tasks = {"characters of source code": text(), "digits" if args.data is None else "CIFAR-10": images(args.data)}
    for axes, (title, (build, draw, held_out)) in zip(panels, tasks.items(), strict=True):
        a, b = (train(build, args.seed + k, draw, steps) for k in range(2))
        torch.manual_seed(0)
        inputs = [draw(64)[0] for _ in range(batches)]
        lines, rows = compared(a, b, inputs, held_out[:batches], points)
        print(table((title, "loss in the middle", "barrier"), rows), end="\n\n", flush=True)
        for name, line in lines.items():
            ends = [(1 - t) * line.loss[0] + t * line.loss[-1] for t in line.t]
            axes.plot(
                line.t, [v - e for v, e in zip(line.loss, ends, strict=True)], marker="o", markersize=4, label=name
            )
        axes.set(title=title, xlabel="t, from one network to the other")
    save(fig, args.out, "attention")


if __name__ == "__main__":
    main()
