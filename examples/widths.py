"""Networks of different widths, fused into one of the first one's width.

    python examples/widths.py

OTFusion (Singh & Jaggi, 1910.05653) merges networks whose layers differ in width: what it learns about how neurons
correspond is a transport plan, which need not be square. Network A stays as it is, B has a half to four times its
width; ZipIt! does the same by merging neurons inside B.
"""

from collections import defaultdict
from functools import partial

from common import ConvNet, accuracy, arguments, average, cell, digits, figure, save, table, train
from tqdm import tqdm

import fxmerge
from fxmerge.matchers import OTFusion, ZipIt
from fxmerge.repair import LeastSquares

WIDTH = 8  # of A's first layer
METHODS = {
    "OTFusion, weights": {"matcher": OTFusion(cost="weights")},
    "OTFusion, activations": {"matcher": OTFusion()},
    "ZipIt!": {"matcher": ZipIt(beta=1.0)},
    "OTFusion, least squares": {"matcher": OTFusion(), "repair": LeastSquares()},
}


def main() -> None:
    args = arguments(__doc__, epochs=10, repeats=2)
    factors = [1.0, 2.0] if args.quick else [0.5, 1.0, 1.5, 2.0, 3.0, 4.0]
    images, labels, *held_out = digits()
    found = defaultdict(list)
    for repeat in range(args.repeats):
        seed = args.seed + 2 * repeat
        a = train(partial(ConvNet, WIDTH), seed, images, labels, args.epochs)
        for factor in tqdm(factors, desc=f"widths, repeat {repeat + 1}", disable=None, leave=False):
            b = train(partial(ConvNet, round(factor * WIDTH)), seed + 1, images, labels, args.epochs)
            modules = {"A": a, "B": b, "ensemble": fxmerge.Ensemble(a, b)}
            for name, options in METHODS.items():
                result = fxmerge.merge(
                    a, b, example_inputs=images[:2], data=images.split(200), progress=False, **options
                )
                modules[name] = result.module
            for name, module in modules.items():
                found[name, factor].append(accuracy(module, *held_out))

    names = ["A", "B", *METHODS, "ensemble"]
    rows = [(f"{factor:g}", *(cell(found[name, factor]) for name in names)) for factor in factors]
    print(table(("B's width over A's", *names), rows))

    fig, (axes,) = figure()
    lines = {"A": "--", "B": "-.", "ensemble": ":"}
    for name in names:
        style = {"color": "black", "linestyle": lines[name]} if name in lines else {"marker": "o", "markersize": 4}
        axes.plot(factors, [average(found[name, factor])[0] for factor in factors], label=name, **style)
    axes.set(title=f"Fusing B into A, whose width is {WIDTH}", xlabel="width of B over width of A", xscale="log")
    axes.set_xticks(factors, [f"{factor:g}" for factor in factors])
    axes.minorticks_off()
    save(fig, args.out, "widths")


if __name__ == "__main__":
    main()
