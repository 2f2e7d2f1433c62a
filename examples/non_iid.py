"""A specialist and a generalist: fusing networks that saw different data, at every share.

    python examples/non_iid.py

OTFusion's experiment (Singh & Jaggi, 1910.05653, section 5.1): network A saw all images of one class and a tenth of
the others, network B the other nine tenths and nothing of that class. The curves follow the share of B from 0, which
is A, to 1; an ensemble with the same shares is the ceiling. Left from two starts, right from the same start.
"""

from collections import defaultdict
from functools import partial

import torch
from common import Perceptron, accuracy, arguments, average, cell, digits, figure, save, table, train
from torch import Tensor
from tqdm import tqdm

import fxmerge
from fxmerge.matchers import ActivationMatching, Average, OTFusion, WeightMatching
from fxmerge.repair import LeastSquares

SPECIAL = 4  # the class that only A knows
METHODS = {
    "average": {"matcher": Average(), "repair": None},
    "weight matching": {"matcher": WeightMatching(), "repair": None},
    "activation matching": {"matcher": ActivationMatching(), "repair": None},
    "OTFusion, weights": {"matcher": OTFusion(cost="weights"), "repair": None},
    "OTFusion, activations": {"matcher": OTFusion(), "repair": None},
    "OTFusion, least squares": {"matcher": OTFusion(), "repair": LeastSquares()},
}
STARTS = {"two starts": 1, "the same start": 0}


def split(labels: Tensor, share: float = 0.1) -> tuple[Tensor, Tensor]:
    """Indices of A's images and of B's."""
    special = labels == SPECIAL
    others = (~special).nonzero().flatten()
    others = others[torch.randperm(len(others), generator=torch.Generator().manual_seed(0))]
    cut = round(share * len(others))
    return torch.cat([special.nonzero().flatten(), others[:cut]]), others[cut:]


def main() -> None:
    args = arguments(__doc__, epochs=20, repeats=2)
    shares = [0.0, 0.5, 1.0] if args.quick else [k / 10 for k in range(11)]
    images, labels, *held_out = digits()
    found = defaultdict(list)
    for repeat in range(args.repeats):
        for start, step in STARTS.items():
            parents = []
            for k, own in enumerate(split(labels)):  # as many steps for the little data as for all of it
                epochs = args.epochs * len(labels) // len(own)
                parents.append(train(Perceptron, args.seed + 2 * repeat + k * step, images[own], labels[own], epochs))
            merge = partial(fxmerge.merge, *parents, example_inputs=images[:2], data=images.split(200), progress=False)
            for share in tqdm(shares, desc=f"merging, {start}", disable=None, leave=False):
                weights = (1 - share, share)
                for name, options in METHODS.items():
                    module = merge(weights=weights, **options).module
                    found[start, name, share].append(accuracy(module, *held_out))
                found[start, "ensemble", share].append(accuracy(fxmerge.Ensemble(*parents, weights=weights), *held_out))

    names = [*METHODS, "ensemble"]
    fig, panels = figure(len(STARTS))
    for axes, start in zip(panels, STARTS, strict=True):
        rows = [(f"{share:.1f}", *(cell(found[start, name, share]) for name in names)) for share in shares]
        print(table((f"share of B, {start}", *names), rows), end="\n\n")
        for name in names:
            curve = [average(found[start, name, share])[0] for share in shares]
            style = {"color": "black", "linestyle": ":"} if name == "ensemble" else {"marker": "o", "markersize": 4}
            axes.plot(shares, curve, label=name, **style)
        axes.set(title=f"Specialist A and generalist B, {start}", xlabel="share of B (0: A alone, 1: B alone)")
    save(fig, args.out, "non_iid")


if __name__ == "__main__":
    main()
