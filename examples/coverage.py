"""Check fxmerge on the smallest member of every torchvision classification family, and write docs/coverage.md.

    python examples/coverage.py
    python examples/coverage.py --models resnet18 vit_b_16 --no-twin      # prints, writes nothing

Each network has random weights, and every parameter and buffer that would start out constant (BatchNorm statistics,
affine parameters, layer scales, zero-initialised heads, biases) is randomised, so that nothing is symmetric by
accident. Then: infer its classes; apply a random element of the inferred symmetry in float64 and see the output stay;
merge the network with a randomly permuted twin of itself by weight matching and see the network come back.
"""

import argparse
import inspect
import os
import re
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
import torchvision
from common import table
from torch import Tensor, nn
from torchvision.models import get_model

import fxmerge
from fxmerge.ir import AxisClass
from fxmerge.matchers import WeightMatching

MODELS = (
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3",
    "maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "resnet18",
    "resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11", "vgg11_bn", "vit_b_16",
    "wide_resnet50_2",
)  # fmt: skip
OPTIONS = {"googlenet": {"init_weights": False}, "inception_v3": {"init_weights": False}}
IMAGE = {"inception_v3": 299}
PAGE = Path(__file__).parents[1] / "docs" / "coverage.md"
HEADER = ("model", "nodes", "classes", "free neurons", "all neurons", "infer s", "verify", "twin", "twin s")


@torch.no_grad()
def randomise(model: nn.Module, images: Tensor) -> nn.Module:
    """Give every constant parameter random values, and BatchNorm statistics near those of ``images``."""
    for parameter in model.parameters():
        if parameter.numel() < 2 or parameter.min() < parameter.max():
            continue
        if parameter.flatten()[0] != 0:
            parameter.uniform_(0.5, 1.5)
        else:
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 100
            parameter.normal_(0, fan_in**-0.5)

    def settle(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        # In graph order, each from what the layers before it now give: statistics far from that would blow up.
        variance, mean = torch.var_mean(inputs[0], (0, 2, 3))
        norm.running_mean.copy_(mean + variance.sqrt() * torch.randn_like(mean) / 4)
        norm.running_var.copy_(variance * torch.empty_like(mean).uniform_(0.5, 1.5))

    model.eval()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(settle) for norm in norms]
    model(images)
    for hook in hooks:
        hook.remove()
    return model


def relative_error(output: Tensor, expected: Tensor) -> float:
    """Largest change over the largest distance of the expected output from its mean over the images."""
    return float((output - expected).abs().max() / (expected - expected.mean()).abs().max())


def pinned(classes: Iterable[AxisClass]) -> Counter[tuple[str, str]]:
    """(where, why) -> number of pinned neurons; numbers in the names of parameters and the names of nodes left out."""
    found: Counter[tuple[str, str]] = Counter()
    for c in classes:
        if not c.free and c.sites:
            where, why = re.sub(r"\[\d+\]$|'+$", "", c.name), re.sub(r" \([^()]*\)$", "", str(c.pinned))
            found[re.sub(r"\d+(?=\.)", "*", where), why] += c.size
    return found


def check(name: str, with_twin: bool) -> tuple[tuple[str, ...], Counter[tuple[str, str]], bool]:
    """One row of the table, the reasons for pinned neurons, and whether every check held."""
    torch.manual_seed(0)
    images = torch.randn(2, 3, size := IMAGE.get(name, 224), size)
    model = randomise(get_model(name, weights=None, **OPTIONS.get(name, {})), images)

    start = time.perf_counter()
    classes = fxmerge.infer_classes(model, images)
    infer_seconds = time.perf_counter() - start
    verified = fxmerge.verify(model, classes, seed=1)

    twin_error, twin_cells = 0.0, ("", "")
    if with_twin:
        start = time.perf_counter()
        matcher = WeightMatching(restarts=1)  # an exact answer needs no second start
        twin = fxmerge.permute(model, classes, seed=1)
        merged = fxmerge.merge(model, twin, example_inputs=images, matcher=matcher, progress=False).module
        seconds = time.perf_counter() - start
        with torch.no_grad():
            twin_error = relative_error(merged(images), model(images))
        twin_cells = (f"{twin_error:.0e}", f"{seconds:.1f}")
    row = (
        name, str(len(classes.traced.graph_module.graph.nodes)), str(len(classes)), str(classes.free),
        str(classes.total), f"{infer_seconds:.1f}", f"{verified.error:.0e}", *twin_cells,
    )  # fmt: skip
    return row, pinned(classes), verified.ok and twin_error <= 1e-4


def page(rows: list[tuple[str, ...]], reasons: dict[str, Counter[tuple[str, str]]]) -> str:
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, {torch.get_num_threads()} threads"
    method = inspect.cleandoc(__doc__ or "").split("\n\n")[2]
    legend = (
        "- nodes: of the traced graph; classes: sets of neurons that move together, pinned ones included.\n"
        "- infer s: seconds to trace and infer.\n"
        "- verify: relative change of the output in float64 under a random element of the whole inferred symmetry.\n"
        "- twin: relative difference in float32 between the network and its merge with a permuted twin.\n"
        "- twin s: seconds to permute, infer again, match from one start, rewrite and verify."
    )
    why = [(name, f"{count}", *key) for name, found in reasons.items() for key, count in found.most_common()]
    parts = (
        "# Coverage: every torchvision classification family",
        f"Written by `python examples/coverage.py` with {versions}.",
        method,
        table(HEADER, rows, markdown=True),
        legend,
        "## What is pinned, and why",
        table(("model", "neurons", "axis", "reason"), why, align="lrll", markdown=True),
    )
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, metavar="MODEL", help=f"default: {' '.join(MODELS)}")
    parser.add_argument("--no-twin", action="store_true", help="leave out the merge with the permuted twin")
    parser.add_argument("--out", type=Path, help=f"default: {PAGE.name} in docs when every model is checked")
    args = parser.parse_args()

    rows, reasons, failed = [], {}, []
    for name in args.models or MODELS:
        row, reasons[name], right = check(name, not args.no_twin)
        rows.append(row)
        if not right:
            failed.append(name)
        cells = "  ".join(f"{title} {cell}" for title, cell in zip(HEADER[1:], row[1:], strict=True))
        print(f"{name:<20}{cells}{'' if right else '  FAILED'}", flush=True)

    out = args.out or (None if args.models or args.no_twin else PAGE)
    if out is not None:
        unfinished = out.with_name(out.name + ".part")
        unfinished.write_text(page(rows, reasons), encoding="utf-8")
        os.replace(unfinished, out)
        print(f"wrote {out}")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
