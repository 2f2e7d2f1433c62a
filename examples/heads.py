"""Two tasks in one network: a shared trunk with the heads of both parents.

    python examples/heads.py

As in ZipIt! (Stoica et al., 2305.03053) and PLeaS (Nasery et al., 2407.02447): A tells the digits 0 to 4 apart, B the
digits 5 to 9. ``heads="separate"`` returns both outputs, so each task is measured among its own five classes;
``heads="concat"`` returns ten logits, and the merged network must also find out which task an image belongs to.
"""

from collections import defaultdict
from functools import partial

import torch
from common import MATCHERS, ConvNet, accuracy, arguments, bars, cell, digits, figure, save, table, train
from torch import Tensor, nn
from tqdm import tqdm

import fxmerge
from fxmerge.matchers import ZipIt
from fxmerge.repair import LeastSquares, ResetBatchNorm

METHODS = MATCHERS | {"ZipIt!, last layer apart": ZipIt(until="7")}
REPAIRS = {"BatchNorm reset": ResetBatchNorm(), "least squares": LeastSquares()}
COLUMNS = ("digits 0 to 4", "digits 5 to 9", "all ten, concat")


class Head(nn.Module):
    """One output of several."""

    def __init__(self, model: nn.Module, number: int):
        super().__init__()
        self.model, self.number = model, number

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)[self.number]


class SideBySide(nn.Module):
    """The logits of several networks, one after the other."""

    def __init__(self, *members: nn.Module):
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([member(x) for member in self.members], 1)


def main() -> None:
    args = arguments(__doc__, epochs=10, repeats=2)
    matchers = list(METHODS)[:: 3 if args.quick else 1]
    images, labels, *held_out = digits()
    later = labels >= 5
    tests = [(x[own], y[own] % 5) for x, y in [held_out] for own in (y < 5, y >= 5)]
    found = defaultdict(list)

    def measure(name: str, repair: str, tasks: list[nn.Module], joint: nn.Module) -> None:
        for column, task, test in zip(COLUMNS, tasks, tests, strict=False):
            found[name, repair, column].append(accuracy(task, *test))
        found[name, repair, COLUMNS[2]].append(accuracy(joint, *held_out))

    for repeat in range(args.repeats):
        seed = args.seed + 2 * repeat
        build = partial(ConvNet, classes=5)
        parents = [
            train(build, seed + k, images[own], labels[own] % 5, 2 * args.epochs)
            for k, own in enumerate((~later, later))
        ]
        merge = partial(fxmerge.merge, *parents, example_inputs=images[:2], data=images.split(200), progress=False)
        for repair in REPAIRS:
            measure("parents side by side", repair, parents, SideBySide(*parents))
        jobs = [(name, repair) for name in matchers for repair in REPAIRS]
        for name, repair in tqdm(jobs, desc=f"merging, pair {repeat + 1}", disable=None, leave=False):
            options = {"matcher": METHODS[name], "repair": REPAIRS[repair]}
            apart, joint = (merge(heads=heads, **options).module for heads in ("separate", "concat"))
            measure(name, repair, [Head(apart, k) for k in range(2)], joint)

    names = ["parents side by side", *matchers]
    fig, panels = figure(len(REPAIRS))
    for axes, repair in zip(panels, REPAIRS, strict=True):
        rows = [(name, *(cell(found[name, repair, column]) for column in COLUMNS)) for name in names]
        print(table((f"{repair}, pairs: {args.repeats}", *COLUMNS), rows), end="\n\n")
        bars(axes, names, {column: [found[name, repair, column] for name in names] for column in COLUMNS})
        axes.set(title=f"Two tasks, one trunk, {repair}", ylim=(0, 103))
    save(fig, args.out, "heads")


if __name__ == "__main__":
    main()
