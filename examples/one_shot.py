"""Two networks from different seeds, merged by every method and repaired in every way.

    python examples/one_shot.py

The experiment behind most tables of the literature (Git Re-Basin, OTFusion, ZipIt!, CCA Merge, PLeaS), on small
convolutional networks with BatchNorm. Rows are methods of matching, columns what is done afterwards.
"""

from collections import defaultdict

from common import MATCHERS, ConvNet, accuracy, arguments, average, bars, cell, digits, figure, save, table, train
from tqdm import tqdm

import fxmerge
from fxmerge.repair import Distill, LeastSquares, ResetBatchNorm


def main() -> None:
    args = arguments(__doc__, epochs=10, repeats=2)
    repairs = {
        "no repair": None,
        "BatchNorm reset": ResetBatchNorm(),
        "least squares": LeastSquares(),
        "distilled": Distill(steps=2 if args.quick else 40, lr=1e-3),
    }
    matchers = list(MATCHERS)[:: 3 if args.quick else 1]
    images, labels, *held_out = digits()
    merged, alone, together = defaultdict(list), [], []
    for repeat in range(args.repeats):
        seed = args.seed + 2 * repeat
        parents = [train(ConvNet, s, images, labels, args.epochs) for s in (seed, seed + 1)]
        alone += [accuracy(parent, *held_out) for parent in parents]
        together.append(accuracy(fxmerge.Ensemble(*parents), *held_out))
        jobs = [(matcher, repair) for matcher in matchers for repair in repairs]
        for matcher, repair in tqdm(jobs, desc=f"merging, pair {repeat + 1}", disable=None, leave=False):
            result = fxmerge.merge(
                *parents,
                example_inputs=images[:2],
                data=images.split(200),
                matcher=MATCHERS[matcher],
                repair=repairs[repair],
                progress=False,
            )
            merged[matcher, repair].append(accuracy(result.module, *held_out))

    rows = [("parents", cell(alone), *[""] * (len(repairs) - 1))]
    rows += [(matcher, *(cell(merged[matcher, repair]) for repair in repairs)) for matcher in matchers]
    rows += [("ensemble", cell(together), *[""] * (len(repairs) - 1))]
    print(table((f"accuracy %, pairs: {args.repeats}", *repairs), rows))

    fig, (axes,) = figure()
    bars(axes, matchers, {repair: [merged[matcher, repair] for matcher in matchers] for repair in repairs})
    axes.axhline(average(alone)[0], color="black", linestyle="--", linewidth=1, label="parents")
    axes.axhline(average(together)[0], color="black", linestyle=":", linewidth=1, label="ensemble")
    axes.set(title=f"One-shot merging of two networks (pairs: {args.repeats})", ylim=(0, 103))
    save(fig, args.out, "one_shot")


if __name__ == "__main__":
    main()
