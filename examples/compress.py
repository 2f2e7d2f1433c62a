"""Prune a network, then fuse the unpruned one into what is left.

    python examples/compress.py

After OTFusion (Singh & Jaggi, 1910.05653, section 5.3): a copy loses its weakest neurons, by the l1 norm of their
incoming weights, and a transport plan then carries the dense network into the narrow one. No training, no labels.
"""

from collections import defaultdict

import torch
from common import ConvNet, accuracy, arguments, average, cell, digits, figure, save, size, table, train
from torch import Tensor, nn
from tqdm import tqdm

import fxmerge
from fxmerge.coupling import fuse
from fxmerge.ir import Alignment, AxisClasses, Coupling
from fxmerge.layout import resized
from fxmerge.matchers import OTFusion
from fxmerge.repair import LeastSquares
from fxmerge.rewrite import rewrite
from fxmerge.widths import resizable


def norms(classes: AxisClasses, k: int, state: dict[str, Tensor]) -> Tensor:
    """[n]: l1 norm of what flows into each neuron of class k."""
    total = torch.zeros(classes[k].size)
    for site, places in classes[k].sites.items():
        weight = state[site.parameter]
        if site not in classes.reads and weight.dim() > 1:
            rows = weight.abs().movedim(site.axis, 0).flatten(1).sum(1)
            total += rows[places].sum(1)
    return total


def prune(model: nn.Module, example_inputs: Tensor, keep: float) -> nn.Module:
    """A copy with the strongest ``keep`` of every class of neurons that may change its width."""
    classes = fxmerge.infer_classes(model, example_inputs)
    state = dict(model.state_dict())
    couplings = []
    free = resizable(classes)
    for k, c in enumerate(classes):
        kept = torch.arange(c.size)
        if k in free:
            strongest = norms(classes, k, state).argsort(descending=True)
            kept = strongest[: max(1, round(keep * c.size))].sort().values
        rows = torch.eye(c.size, dtype=torch.float64)[kept]
        couplings.append(Coupling(rows, rows.T, (c.size,)))
    narrow = resized(classes, {k: c.size for k, c in enumerate(couplings)})
    pruned = fuse([classes], narrow, Alignment(tuple(couplings), "pruning"), [state], (1.0,))
    return rewrite(classes, pruned, narrow)


def reset_batchnorm(model: nn.Module, images: Tensor) -> None:
    """Statistics from one batch of everything: pruning changed what the layers see."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.momentum = 1.0
    with torch.no_grad():
        model.train()(images)
    model.eval()
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum


def main() -> None:
    args = arguments(__doc__, epochs=10, repeats=3)
    shares = [0.8, 0.5] if args.quick else [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]
    methods = {
        "fused with the dense one": {"matcher": OTFusion()},
        "fused, least squares": {"matcher": OTFusion(), "repair": LeastSquares()},
    }
    images, labels, *held_out = digits()
    found, sizes = defaultdict(list), {}
    for repeat in range(args.repeats):
        dense = train(ConvNet, args.seed + repeat, images, labels, args.epochs)
        for keep in tqdm(shares, desc=f"pruning, repeat {repeat + 1}", disable=None, leave=False):
            pruned = prune(dense, images[:2], keep)
            reset_batchnorm(pruned, images)
            modules = {"dense": dense, "pruned": pruned}
            for name, options in methods.items():
                result = fxmerge.merge(
                    pruned, dense, example_inputs=images[:2], data=images.split(200), progress=False, **options
                )
                modules[name] = result.module
            sizes[keep] = 100 * size(pruned) / size(dense)
            for name, module in modules.items():
                found[name, keep].append(accuracy(module, *held_out))

    names = ["dense", "pruned", *methods]
    rows = [(f"{keep:.0%}", f"{sizes[keep]:.0f}", *(cell(found[name, keep]) for name in names)) for keep in shares]
    print(table(("neurons kept", "parameters %", *names), rows))

    fig, (axes,) = figure()
    for name in names:
        style = {"color": "black", "linestyle": "--"} if name == "dense" else {"marker": "o", "markersize": 4}
        percent = [100 * keep for keep in shares]
        axes.plot(percent, [average(found[name, keep])[0] for keep in shares], label=name, **style)
    axes.set(title="Pruned networks, and the dense one fused into them")
    axes.set(xlabel="neurons kept in every layer (%)")
    axes.invert_xaxis()
    save(fig, args.out, "compress")


if __name__ == "__main__":
    main()
