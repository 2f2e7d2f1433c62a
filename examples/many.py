"""Two to six networks merged at once: accuracy against their number.

    python examples/many.py

As in the figures of CCA Merge (Horoi et al., 2407.05385) and of Git Re-Basin's MergeMany. All networks train on the
same data from different seeds, and every result has the size of one of them.
"""

from collections import defaultdict
from functools import partial

from common import ConvNet, accuracy, arguments, average, cell, digits, figure, save, table, train
from tqdm import tqdm

import fxmerge
from fxmerge.matchers import ActivationMatching, Average, CCAMerge, OTFusion, WeightMatching, ZipIt
from fxmerge.repair import LeastSquares

METHODS = {
    "average": {"matcher": Average()},
    "weight matching": {"matcher": WeightMatching()},
    "activation matching": {"matcher": ActivationMatching()},
    "OTFusion": {"matcher": OTFusion()},
    "OTFusion, barycentre": {"matcher": OTFusion(barycenter=5)},
    "CCA Merge": {"matcher": CCAMerge()},
    "ZipIt!": {"matcher": ZipIt()},
    "activations, least squares": {"matcher": ActivationMatching(), "repair": LeastSquares()},
}


def main() -> None:
    args = arguments(__doc__, epochs=8, repeats=2)
    numbers = [3] if args.quick else [2, 3, 4, 5, 6]
    images, labels, *held_out = digits()
    calibration = images[:600].split(200)
    found = defaultdict(list)
    for repeat in range(args.repeats):
        first = args.seed + repeat * numbers[-1]
        networks = [train(partial(ConvNet, 12), first + k, images, labels, args.epochs) for k in range(numbers[-1])]
        for number in tqdm(numbers, desc=f"merging, repeat {repeat + 1}", disable=None, leave=False):
            parents = networks[:number]
            found["parents", number].append(average([accuracy(parent, *held_out) for parent in parents])[0])
            for name, options in METHODS.items():
                result = fxmerge.merge(*parents, example_inputs=images[:2], data=calibration, progress=False, **options)
                found[name, number].append(accuracy(result.module, *held_out))
            found["ensemble", number].append(accuracy(fxmerge.Ensemble(*parents), *held_out))

    names = ["parents", *METHODS, "ensemble"]
    rows = [(name, *(cell(found[name, number]) for number in numbers)) for name in names]
    print(table(("accuracy %, number of networks", *map(str, numbers)), rows))

    fig, (axes,) = figure()
    lines = {"parents": "--", "ensemble": ":"}
    for name in (name for name in names if name != "average"):  # so far below that nothing else could be told apart
        style = {"color": "black", "linestyle": lines[name]} if name in lines else {"marker": "o", "markersize": 4}
        axes.plot(numbers, [average(found[name, number])[0] for number in numbers], label=name, **style)
    axes.set_title("Many networks merged into one of the same size\n(plain average, below the others, left out)")
    axes.set(xlabel="number of networks", xticks=numbers)
    save(fig, args.out, "many")


if __name__ == "__main__":
    main()
