"""PLeaS: accuracy against the size of what comes out, from one network's to two side by side.

    python examples/budget.py

After Nasery et al. (2407.02447): neurons that match well are averaged, the others stay apart, and a second step
refits every layer by least squares. The size counts every parameter that is emitted, zeros included, which makes two
networks side by side four times one.
"""

from collections import defaultdict

from common import ConvNet, accuracy, arguments, average, cell, digits, figure, save, size, table, train
from tqdm import tqdm

import fxmerge
from fxmerge.matchers import PLeaS
from fxmerge.repair import LeastSquares, ResetBatchNorm

REPAIRS = {"BatchNorm reset": ResetBatchNorm(), "least squares": LeastSquares()}


def main() -> None:
    args = arguments(__doc__, epochs=10, repeats=2)
    budgets = [1.0, 2.0] if args.quick else [1.0, 1.2, 1.4, 1.7, 2.0, 2.5, 3.0, 3.5, 4.0]
    images, labels, *held_out = digits()
    found, sizes, alone, together = defaultdict(list), defaultdict(list), [], []
    for repeat in range(args.repeats):
        seed = args.seed + 2 * repeat
        parents = [train(ConvNet, s, images, labels, args.epochs) for s in (seed, seed + 1)]
        alone += [accuracy(parent, *held_out) for parent in parents]
        together.append(accuracy(fxmerge.Ensemble(*parents), *held_out))
        for budget in tqdm(budgets, desc=f"merging, pair {repeat + 1}", disable=None, leave=False):
            for name, repair in REPAIRS.items():
                result = fxmerge.merge(
                    *parents,
                    example_inputs=images[:2],
                    data=images.split(200),
                    matcher=PLeaS(budget=budget),
                    repair=repair,
                    progress=False,
                )
                found[name, budget].append(accuracy(result.module, *held_out))
            sizes[budget].append(size(result.module) / size(parents[0]))

    rows = [
        (f"{budget:.1f}", f"{average(sizes[budget])[0]:.2f}", *(cell(found[name, budget]) for name in REPAIRS))
        for budget in budgets
    ]
    rows += [("parents", "1.00", cell(alone), ""), ("ensemble", "2.00", cell(together), "")]
    print(table(("budget", "size", *REPAIRS), rows))

    fig, (axes,) = figure()
    for name in REPAIRS:
        means, deviations = zip(*(average(found[name, budget]) for budget in budgets), strict=True)
        where = [average(sizes[budget])[0] for budget in budgets]
        axes.errorbar(where, means, deviations, marker="o", markersize=4, capsize=2, label=name)
    axes.axhline(average(alone)[0], color="black", linestyle="--", linewidth=1, label="parents")
    axes.axhline(average(together)[0], color="black", linestyle=":", linewidth=1, label="ensemble")
    axes.set(
        title=f"PLeaS, accuracy against size (pairs: {args.repeats})",
        xlabel="parameters of the result over one parent's",
    )
    save(fig, args.out, "budget")


if __name__ == "__main__":
    main()
