"""What the command line does: one function per command, which prints and returns the exit code."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxmerge import exchange, export, loaders, sources
from fxmerge.barrier import evaluate, evaluate_barrier
from fxmerge.classes import infer_classes
from fxmerge.ensemble import Ensemble
from fxmerge.errors import FormatError, FxMergeError, InputError, told
from fxmerge.ir import AxisClasses
from fxmerge.pipeline import MergeResult, align, merge
from fxmerge.recipe import read_options
from fxmerge.report import table
from fxmerge.symmetry import verify
from fxmerge.trace import trace
from fxmerge.units import find_stages

_PATHS = ("networks", "arch", "data")
_RECIPE = (
    *_PATHS, "trust_code", "input", "batch_size", "samples", "device", "seed", "matcher", "repair", "depth", "target",
    "heads", "weights", "strict", "no_verify", "on_disk",
)  # fmt: skip
"""What a recipe may hold: the options that decide what is merged, under the names that they have here."""


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Runs ``args.command``."""
    if getattr(args, "recipe", None):
        args = _with_recipe(args, parser)
    if not args.networks:
        raise InputError(f"give at least one network: fxmerge {args.command} NETWORK ..")
    warnings.showwarning = lambda message, *_, **__: print(f"fxmerge: warning: {message}", file=sys.stderr)
    return _COMMANDS[args.command](args)


def _with_recipe(args: argparse.Namespace, parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The recipe's options under those that were given on the command line."""
    path = Path(args.recipe)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the recipe {path} cannot be read: {told(error)}") from None
    recipe = _parsed(path, text)
    if not isinstance(recipe, dict):
        raise InputError(f"{path} holds no options; write lines such as 'matcher: OTFusion(reg=0.05)'")
    if unknown := [str(key) for key in recipe if key not in _RECIPE]:
        raise InputError(f"{path} has the unknown option '{unknown[0]}'; known are {', '.join(_RECIPE)}")
    if recipe.pop("trust_code", False) and not args.trust_code:
        raise InputError(f"{path} names code to run: allow that by --trust-code, a recipe cannot")
    for key in _PATHS:
        if isinstance(recipe.get(key), (str, list)):
            recipe[key] = _moved(recipe[key], lambda p: os.path.normpath(path.parent / p))
    defaults = vars(parser.parse_args([args.command]))
    for key, value in recipe.items():
        wanted = list if key in ("networks", "input") else type(defaults[key]) if defaults[key] is not None else object
        if not isinstance(value, wanted):
            raise InputError(f"{path}: {key} is {value!r}, and should be a {wanted.__name__}")
    return argparse.Namespace(**{k: recipe.get(k, v) if v == defaults[k] else v for k, v in vars(args).items()})


def _parsed(path: Path, text: str) -> Any:
    try:
        if path.suffix == ".json":
            return json.loads(text)
        import yaml

        return yaml.safe_load(text)
    except ImportError:
        raise InputError(f"{path} is YAML, which needs pyyaml: pip install fxmerge[cli]; or write JSON") from None
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read: {' '.join(told(error).split())}") from None


def _moved(value: str | Sequence[str], move: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return str(sources.Source.read(value).moved(move))
    return [_moved(v, move) for v in value]


def _recipe(args: argparse.Namespace, folder: Path) -> dict[str, str]:
    """The options of a merge as a file for its folder, with paths from there; the same command runs on it again."""
    try:
        import yaml
    except ImportError:
        raise InputError("the recipe beside the result is YAML, which needs pyyaml: pip install fxmerge[cli]") from None

    recipe = {key: getattr(args, key) for key in _RECIPE if getattr(args, key) not in (None, False)}
    for key in _PATHS:
        if key in recipe:
            recipe[key] = _moved(recipe[key], lambda p: os.path.relpath(p, folder))
    return {"recipe.yaml": yaml.safe_dump(recipe, sort_keys=False)}


def _networks(args: argparse.Namespace) -> list[nn.Module]:
    stay = getattr(args, "on_disk", False)
    return [sources.network(text, args.arch, args.trust_code, stay) for text in args.networks]


def _data(args: argparse.Namespace, labels: bool = False) -> Iterable[Any] | None:
    if args.data is None:
        return None
    return loaders.batches(args.data, args.batch_size, args.samples, args.seed, args.trust_code, labels)


def _example(args: argparse.Namespace, text: str, network: nn.Module, data: Iterable[Any] | None = None) -> Any:
    """Two samples to trace ``network``, written ``text``, with; None leaves it to the tracer to infer them."""
    if args.input:
        return loaders.example(args.input)
    if data is not None:
        for batch in islice(data, 1):
            batch = batch[0] if isinstance(batch, (tuple, list)) else batch
            return pytree.tree_map(lambda leaf: leaf[:2] if isinstance(leaf, Tensor) else leaf, batch)
    return _merged_on(Path(text)) or getattr(network, "dummy_inputs", None)


def _merged_on(folder: Path) -> dict[str, Tensor] | None:
    """Inputs like those that a merged folder says it was merged on: random floats, integers that any table has."""
    if not (folder / "graph.json").exists() or not (folder / "recipe.json").exists():
        return None
    said = json.loads((folder / "recipe.json").read_text(encoding="utf-8")).get("inputs", [])
    draw = torch.Generator().manual_seed(0)
    found = {}
    try:
        for one in said:
            dtype = _DTYPES[one["dtype"]]
            made = torch.randn(one["shape"], generator=draw) if dtype.is_floating_point else torch.ones(one["shape"])
            found[one["name"]] = made.to(dtype)
    except (KeyError, TypeError, RuntimeError) as error:
        raise FormatError(
            f"{folder / 'recipe.json'} does not say what inputs are like ({told(error)}): give --input"
        ) from None
    return found


def _say(args: argparse.Namespace, text: str, facts: Mapping[str, Any]) -> None:
    if args.json:
        print(json.dumps(facts, indent=1))
    elif text:
        print(text)


def _class_facts(classes: AxisClasses) -> list[dict[str, Any]]:
    return [
        {
            "name": c.name,
            "neurons": c.size,
            "pinned": c.pinned,
            "blocks_of": [classes[p].name for p in c.parents],
            "sites": [str(s) for s in c.sites],
        }
        for c in classes
    ]


_DTYPES = {str(t).removeprefix("torch."): t for t in vars(torch).values() if isinstance(t, torch.dtype)}


def _inspect(args: argparse.Namespace) -> int:
    facts = []
    for text, network in zip(args.networks, _networks(args), strict=True):
        classes = infer_classes(network, _example(args, text, network))
        stages = find_stages(classes)
        lines = [f"{text}: {classes.traced.origin} trace of {len(classes.traced.graph_module.graph.nodes)} nodes", ""]
        lines += [str(classes), "", "stages, whose units may differ in number between networks:"]
        lines += [f"  {line}" for stage in stages for line in str(stage).splitlines()] or ["  none"]
        lines += [f"note: {note}" for note in classes.traced.notes]
        fact = {
            "network": text,
            "front_end": classes.traced.origin,
            "nodes": len(classes.traced.graph_module.graph.nodes),
            "free": classes.free,
            "total": classes.total,
            "classes": _class_facts(classes),
            "stages": [[unit.name for unit in stage.units] for stage in stages],
            "no_rule": [{"node": node, "operation": op} for node, op in classes.unknown],
            "notes": list(classes.traced.notes),
        }
        facts.append(fact)
        if not args.json:
            print("\n".join(lines))
    if args.json:
        _say(args, "", {"networks": facts})
    return 0


def _merged(args: argparse.Namespace, kept: Path | None = None, **options: Any) -> MergeResult:
    """The merge that the options ask for; ``kept`` is where the statistics are while they are gathered."""
    if len(args.networks) < 2:
        raise InputError(f"merging takes two or more networks, got '{args.networks[0]}' alone")
    recipe = {key: getattr(args, key) for key in ("weights", "heads", "depth", "target", "seed", "device", "strict")}
    recipe |= {"matcher": args.matcher, "repair": None if args.repair == "none" else args.repair}
    chosen = {**read_options(recipe), "verify": not args.no_verify, **options}
    data = _data(args)
    matcher = chosen.get("matcher")
    if data is not None and (matcher is None or (matcher != "auto" and matcher.needs_data)):
        chosen["statistics"] = kept
    networks = _networks(args)
    example = _example(args, args.networks[0], networks[0], data)
    return merge(*networks, example_inputs=example, data=data, progress=not args.quiet, **chosen)


def _result_facts(result: MergeResult, names: Sequence[str]) -> dict[str, Any]:
    report = result.report
    classes = [
        {"name": c.name, "neurons": c.size, "match": report.alignment.quality.get(k)}
        for k, c in enumerate(report.classes)
        if c.free
    ]
    return {
        "method": report.alignment.method,
        "repair": report.repair,
        "sizes": [{"network": n, **dataclasses.asdict(s)} for n, s in zip(names, report.sizes, strict=True)],
        "classes": classes,
        "free": report.classes.free,
        "total": report.classes.total,
        "verified": [v.error for v in report.verifications],
        "notes": list(report.notes),
        "seconds": dict(report.seconds),
    }


def _plan(args: argparse.Namespace) -> int:
    result = _merged(args, repair=None)
    names = [*args.networks, "the result"]
    rows: list[tuple[object, ...]] = [("network", "parameters", "MB", "GFLOP a run")]
    for name, size in zip(names, result.report.sizes, strict=True):
        flops = "not counted" if size.flops is None else f"{size.flops / 1e9:.3g}"
        rows.append((name, f"{size.parameters:,}", f"{size.bytes / 1e6:.3g}", flops))
    text = f"{result.report}\n\n{table(rows, right=(1, 2, 3))}\nnothing was written"
    _say(args, "" if args.quiet else text, _result_facts(result, names))
    return 0


def _merge(args: argparse.Namespace) -> int:
    if not args.output:
        raise InputError("say where the result goes: --output FOLDER")
    folder = Path(args.output)
    export.require_free(folder)
    recipe = _recipe(args, folder)
    kept = folder.with_name(f"{folder.name}.statistics.safetensors")
    if kept.exists() != args.resume:
        raise InputError(
            f"there is no {kept} to go on with: leave out --resume"
            if args.resume
            else f"{kept} is left from an interrupted merge: go on with it by --resume, or remove it"
        )
    try:
        result = _merged(args, kept)
    except KeyboardInterrupt:
        if kept.exists():
            print(f"fxmerge: the statistics gathered so far are in {kept}; --resume goes on", file=sys.stderr)
        raise
    result.save(folder, extra=recipe)
    kept.unlink(missing_ok=True)
    facts = {**_result_facts(result, [*args.networks, str(folder)]), "output": str(folder)}
    _say(args, "" if args.quiet else f"{result.report}\n\nwritten to {folder}; its report.html shows more", facts)
    return 0


def _logits(output: Any) -> Any:
    """The tensor that is compared with labels: networks may give a mapping with "logits"."""
    return output["logits"] if isinstance(output, Mapping) and "logits" in output else output


def _loss(output: Any, target: Any) -> Tensor:
    logits = _logits(output)
    if not isinstance(logits, Tensor):
        raise InputError(f"the network gives a {type(output).__name__}; accuracy is measured on one tensor of logits")
    return F.cross_entropy(logits, target)


def _accuracy(output: Any, target: Any) -> Tensor:
    return (_logits(output).argmax(1) == target).double().mean()


def _eval(args: argparse.Namespace) -> int:
    if args.data is None:
        raise InputError("eval compares with labels: --data DATA")
    data = _data(args, labels=True)
    assert data is not None
    networks = _networks(args)
    folders = [(Path(text) / "graph.json").exists() for text in args.networks]
    options: dict[str, Any] = {
        "loss": _loss, "metric": _accuracy, "device": args.device, "progress": not args.quiet,
    }  # fmt: skip

    def measured(name: str, module: nn.Module) -> tuple[str, float, float]:
        loss, accuracy = evaluate(module, data, **options)
        assert accuracy is not None  # it was asked for
        return name, accuracy, loss

    found = [measured(text, n) for text, n in zip(args.networks, networks, strict=True)]
    parents = [n for n, merged in zip(networks, folders, strict=True) if not merged]
    if args.ensemble:
        if len(parents) < 2:
            raise InputError("--ensemble takes two or more networks that are no merged folders")
        found.append(measured(f"ensemble of {len(parents)}", Ensemble(*parents)))
    rows = [("network", "accuracy %", "loss"), *((n, f"{100 * a:.2f}", f"{v:.4f}") for n, a, v in found)]
    text = table(rows, right=(1, 2))
    facts: dict[str, Any] = {"networks": [{"network": n, "accuracy": a, "loss": v} for n, a, v in found]}
    if args.barrier is not None:
        if len(parents) < 2:
            raise InputError("--barrier takes two networks that are no merged folders")
        a, b = parents[:2]
        example = _example(args, "", a, data)
        moved = align(b, to=a, example_inputs=example, device=args.device, seed=args.seed, progress=not args.quiet)
        barriers = {"as they are": evaluate_barrier(a, b, data, **options)}
        barriers["aligned"] = evaluate_barrier(a, moved, data, **options)
        text += "".join(f"\n\n{name}:\n{barrier}" for name, barrier in barriers.items())
        facts["barriers"] = {name: dataclasses.asdict(barrier) for name, barrier in barriers.items()}
        if args.barrier:
            barriers["aligned"].plot(args.barrier)
    _say(args, text, facts)
    return 0


def _export(args: argparse.Namespace) -> int:
    if len(args.networks) != 1:
        raise InputError("export takes one network")
    if not (args.onnx or args.pt2 or args.state_dict):
        raise InputError("say what to write: --onnx FILE, --pt2 FILE or --state-dict FILE")
    (network,) = _networks(args)
    written = []
    if args.onnx or args.pt2:
        traced = trace(network, _example(args, args.networks[0], network))
        for path, write in ((args.onnx, exchange.export_onnx), (args.pt2, exchange.export_pt2)):
            if path:
                written.append(str(write(network, path, traced.args, traced.kwargs)))
    if args.state_dict:
        written.append(str(exchange.export_state_dict(network, args.state_dict)))
    _say(args, "" if args.quiet else "\n".join(f"wrote {path}" for path in written), {"written": written})
    return 0


def _verify(args: argparse.Namespace) -> int:
    if args.seeds < 1:
        raise InputError("--seeds must be positive")
    right, facts = True, []
    rows: list[tuple[object, ...]] = [("network", "seed", "relative error", "")]
    for text, network in zip(args.networks, _networks(args), strict=True):
        classes = infer_classes(network, _example(args, text, network))
        for seed in range(args.seed, args.seed + args.seeds):
            found = verify(network, classes, seed=seed)
            right &= found.ok
            facts.append({"network": text, "seed": seed, "error": found.error, "ok": found.ok})
            rows.append((text, seed, f"{found.error:.1e}", "holds" if found.ok else "DOES NOT HOLD"))
    _say(args, "" if args.quiet else table(rows, right=(1, 2)), {"checks": facts})
    if not right:
        raise FxMergeError("the inferred symmetry changes a network's function; please report this network")
    return 0


_COMMANDS = {
    "inspect": _inspect, "plan": _plan, "merge": _merge, "eval": _eval, "export": _export, "verify": _verify,
}  # fmt: skip
