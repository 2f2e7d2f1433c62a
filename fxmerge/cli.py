"""The command line. Only words here, so that help comes at once; ``commands`` does the work."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fxmerge.errors import FxMergeError

_NETWORKS = """\
A network is written [ARCHITECTURE@]WEIGHTS, or ARCHITECTURE alone, or the folder of an earlier merge.
  ARCHITECTURE  torchvision:NAME, timm:NAME, hf:FOLDER, or MODULE:FACTORY (a module or a .py file; --trust-code);
                with options behind a question mark: torchvision:resnet18?num_classes=10
  WEIGHTS       a .safetensors file, a sharded folder, or a checkpoint that torch.load(weights_only=True) reads
--arch gives the architecture of all networks that come without one.
"""
_DATA = """\
Data is a .safetensors or .npz file, images:FOLDER (a folder per class; ?size=224), or MODULE:FACTORY (--trust-code).
A file holds `inputs` [samples, ..] or arrays named as the arguments of forward, and for eval `labels` [samples].
"""
_INSPECT = """\
examples:
  fxmerge inspect torchvision:resnet50
  fxmerge inspect torchvision:vit_b_16 --input 2x3x224x224 --json
  fxmerge inspect nets.py:make?width=32 --trust-code
"""
_PLAN = """\
examples:
  fxmerge plan a.safetensors b.safetensors --arch torchvision:resnet18?num_classes=10
  fxmerge plan torchvision:resnet18@a.pt torchvision:resnet34@b.pt --matcher "PLeaS(budget=1.4)" --data x.npz
"""
_MERGE = """\
examples:
  fxmerge merge a.safetensors b.safetensors --arch torchvision:resnet18 --data images:train -o merged
  fxmerge merge hf:model-a hf:model-b -o merged
  fxmerge merge a.pt b.pt c.pt --arch timm:convnext_atto --data x.npz --matcher "OTFusion(reg=0.05)" -o merged
  fxmerge merge --recipe merged/recipe.yaml -o again
"""
_EVAL = """\
examples:
  fxmerge eval merged a.safetensors b.safetensors --arch torchvision:resnet18 --data images:test --ensemble
  fxmerge eval a.pt b.pt --arch nets.py:make --trust-code --data test.npz --barrier barrier.png
"""
_EXPORT = """\
examples:
  fxmerge export merged --onnx model.onnx
  fxmerge export merged --pt2 model.pt2 --state-dict weights.safetensors
"""
_VERIFY = """\
examples:
  fxmerge verify merged
  fxmerge verify a.safetensors --arch torchvision:densenet121 --seeds 5
"""


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
        prog="fxmerge",
        description="Merge trained networks into one.",
        epilog=_NETWORKS + "\nfxmerge COMMAND --help shows the options of a command, with examples.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, examples: str, data: bool = True) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog="\n".join([_NETWORKS, *([_DATA] if data else []), examples]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.add_argument("networks", nargs="*", metavar="NETWORK", help="see below")
        made.add_argument("--arch", metavar="ARCHITECTURE", help="of the networks that come without one")
        made.add_argument("--trust-code", action="store_true", help="allow MODULE:FACTORY, which runs that code")
        made.add_argument(
            "--input", action="append", metavar="[NAME=]SHAPE[:BELOW]",
            help="example input, such as 2x3x224x224 (random floats) or input_ids=2x16:1000 (integers below 1000); "
            "default: from the data, else inferred from the first layers",
        )  # fmt: skip
        if data:
            made.add_argument("--data", metavar="DATA", help="see below")
            made.add_argument("--batch-size", type=int, default=64, metavar="N", help="samples a batch (%(default)s)")
            made.add_argument("--samples", type=int, metavar="N", help="use that many, drawn at random (default: all)")
        made.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, .. (default: CUDA where there is one)")
        made.add_argument("--seed", type=int, default=0, help="of every random choice (%(default)s)")
        made.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
        made.add_argument("--quiet", "-q", action="store_true", help="no progress bars, and no report")
        return made

    command("inspect", "show what moves together in a network, its stages, and what is pinned and why", _INSPECT, False)
    for name, text, examples in (
        ("plan", "say what a merge would make, its size and its cost; writes nothing", _PLAN),
        ("merge", "merge networks into a folder", _MERGE),
    ):
        made = command(name, text, examples)
        made.add_argument("--recipe", metavar="FILE", help="options from a YAML or JSON file; those given here win")
        made.add_argument("--matcher", metavar="METHOD", help='such as "OTFusion(reg=0.05)" or auto')
        made.add_argument("--repair", default="auto", metavar="REPAIR", help='such as "LeastSquares()", auto or none')
        made.add_argument("--depth", default="grow", metavar="HOW", help="grow, shrink or CLAFusion(..) (%(default)s)")
        made.add_argument("--target", choices=("deeper", "shallower"), help="whose layers the result has")
        made.add_argument("--heads", choices=("average", "separate", "concat"), default="average", help="(%(default)s)")
        made.add_argument("--weights", type=float, nargs="+", metavar="SHARE", help="one per network (default: equal)")
        made.add_argument("--strict", action="store_true", help="refuse operations without a rule")
        made.add_argument("--on-disk", action="store_true", help="leave weights there, for networks beyond memory")
        made.add_argument("--no-verify", action="store_true", help="leave out the checks in float64")
        if name == "merge":
            made.add_argument("--output", "-o", metavar="FOLDER", help="where to write; must not exist")
            made.add_argument("--resume", action="store_true", help="go on with the statistics of an interrupted merge")

    made = command("eval", "measure accuracy and loss on labelled data", _EVAL)
    made.add_argument("--ensemble", action="store_true", help="also the mean of all networks but the merged folders")
    made.add_argument(
        "--barrier", nargs="?", const="", metavar="FILE",
        help="also the loss along the line between the first two networks, as they are and aligned; drawn to FILE",
    )  # fmt: skip

    made = command("export", "write a merged folder in other formats", _EXPORT, False)
    made.add_argument("--onnx", metavar="FILE", help="ONNX with a dynamic batch")
    made.add_argument("--pt2", metavar="FILE", help="torch.export with a dynamic batch")
    made.add_argument("--state-dict", metavar="FILE", help="safetensors under the keys of the original class")

    made = command("verify", "check that random elements of the inferred symmetry leave outputs alone", _VERIFY, False)
    made.add_argument("--seeds", type=int, default=1, metavar="N", help="how many elements (%(default)s)")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns 0, 1 after an error, 2 for wrong usage or 130 where it was interrupted."""
    top = parser()
    args = top.parse_args(argv)
    try:
        from fxmerge import commands

        return commands.run(args, top)
    except FxMergeError as error:
        print("fxmerge: error:", " ".join(str(error).split()), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fxmerge: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has seen enough
        sys.stderr.close()
        return 0


if __name__ == "__main__":
    sys.exit(main())
