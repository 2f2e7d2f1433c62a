"""Networks of different depth, fused into one as deep as the deeper one or as the shallower one.

    python examples/depth.py

Two perceptrons on 8x8 digits, with four hidden layers and with two (CLAFusion, Nguyen et al., 2110.15538): layers are
aligned by how alike their activations are, the shallower network gets layers that pass on what they read, or layers of
the deeper one are joined; then neurons are matched as in networks of one depth.
"""

from collections import defaultdict
from functools import partial
from pathlib import Path

from common import accuracy, arguments, bars, cell, digits, figure, save, table, train
from torch import nn
from tqdm import tqdm

import fxmerge
from fxmerge.depth import CLAFusion
from fxmerge.matchers import Average, OTFusion
from fxmerge.repair import LeastSquares

PAIRS = {
    "64-64-64-64, 64-64": ((64, 64, 64, 64), (64, 64)),
    "40-40-20-20, 40-20": ((40, 40, 20, 20), (40, 20)),
    "64-48-32-20, 40-20": ((64, 48, 32, 20), (40, 20)),
}
METHODS = {
    "grown, average": {"matcher": Average()},
    "grown": {},
    "grown, mean of inserted layers": {"depth": CLAFusion(keep=False)},
    "grown, least squares": {"repair": LeastSquares()},
    "shrunk": {"depth": "shrink"},
    "shrunk, least squares": {"depth": "shrink", "repair": LeastSquares()},
    "grown, without data": {"data": None, "matcher": OTFusion(cost="weights")},
}


def perceptron(widths: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    for a, b in zip((64, *widths), widths, strict=False):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 10))


def main() -> None:
    args = arguments(__doc__, epochs=40, repeats=3)
    images, labels, *held_out = digits()
    pairs = dict(list(PAIRS.items())[:1]) if args.quick else PAIRS
    found = defaultdict(list)
    for name, (deep, shallow) in pairs.items():
        for repeat in tqdm(range(args.repeats), desc=name, disable=None, leave=False):
            seed = args.seed + 2 * repeat
            a = train(partial(perceptron, deep), seed, images, labels, args.epochs)
            b = train(partial(perceptron, shallow), seed + 1, images, labels, args.epochs)
            modules = {"deeper": a, "shallower": b, "ensemble": fxmerge.Ensemble(a, b)}
            for method, options in METHODS.items():
                if method == "grown, average" and any(x != y for x, y in zip(deep, (*shallow, *shallow), strict=False)):
                    continue  # neurons one to one: equal widths only
                options = {"data": images.split(200), "example_inputs": images[:2], "progress": False, **options}
                result = fxmerge.merge(a, b, **options)
                modules[method] = result.module
                if result.report.depth and method == "grown" and not repeat:
                    args.out.mkdir(parents=True, exist_ok=True)
                    result.report.plot_depth(Path(args.out) / "depth_map.png")
            for method, module in modules.items():
                found[method, name].append(accuracy(module, *held_out))

    names = ["deeper", "shallower", "ensemble", *METHODS]
    rows = [(n, *(cell(found[n, p]) if found[n, p] else "" for p in pairs)) for n in names]
    print(table(("hidden layers", *pairs), rows))

    fig, (axes,) = figure()
    shown = [n for n in names if all(found[n, p] for p in pairs)]
    bars(axes, list(pairs), {n: [found[n, p] for p in pairs] for n in shown})
    axes.set(title="Four hidden layers and two, fused", ylim=(40, 100))
    save(fig, args.out, "depth")


if __name__ == "__main__":
    main()
