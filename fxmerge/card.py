"""The model card of a saved folder: ``README.md`` as the Hugging Face hub reads it, and people do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

_FRONT = """---
library_name: fxmerge
tags:
- fxmerge
- model-merging
- merge
- pytorch
---
"""
_FILES = {
    "model.safetensors": "the tensors, one copy of each",
    "graph.json": "the layers and what the network computes, from which `fxmerge.load` builds it",
    "module.py": "the same as Python source, for reading",
    "recipe.json": "versions, parents and every option: what it takes to merge again",
    "report.html": "what was matched, how well, and what was pinned",
    "alignment.safetensors": "the couplings: which neuron became which",
    "manifest.json": "sizes and SHA-256 of the files",
}


def card(module: nn.Module, recipe: Mapping[str, Any], files: Sequence[str]) -> str:
    """A text with front matter: what the network is, its parents, the method, figures, and how to load it."""
    name = type(module).__name__
    count = sum(p.numel() for p in module.parameters())
    parents, result = recipe.get("parents") or [], recipe.get("result") or {}
    title = f"{name}, merged from {len(parents)} networks" if parents else name
    parts = [f"{_FRONT}\n# {title}\n"]
    if parents:
        method = result.get("method", "")
        parts.append(
            f"fxmerge made this network of {count:,} parameters from "
            f"{len(parents)} trained ones: it matched their neurons by `{method}` and merged the parameters.\n"
        )
        rows = [
            (k, _of(p.get("model")), f"{w:.3g}", f"`{str(p.get('sha256'))[:16]}`")
            for k, p, w in _shares(parents, result)
        ]
        parts.append(_table(("", "parent", "share", "SHA-256 of its tensors starts"), rows))
        parts.append(_table(("figure", "value"), _figures(result)))
        notes = [f"- {note}" for note in result.get("notes", ())]
        parts.append("\n".join(notes) + "\n" if notes else "")
    else:
        parts.append(f"A network of {count:,} parameters, saved by fxmerge.\n")
    calls = ", ".join(record["name"] for record in recipe.get("inputs") or ()) or "inputs"
    parts.append(
        "## Use\n\n```python\nimport fxmerge\n\n"
        'module = fxmerge.load("folder")  # of a download: huggingface_hub.snapshot_download("owner/name")\n'
        f"outputs = module({calls})\n```\n\n"
        "Loading runs no code from these files and imports nothing that they name.\n"
    )
    shapes = [f"`{r['name']}`: {r['dtype']} {r['shape']}" for r in recipe.get("inputs") or ()]
    parts.append(f"It was merged on inputs of these shapes, batch first: {'; '.join(shapes)}.\n" if shapes else "")
    told = {file: said for file, said in _FILES.items() if file in files}
    parts.append("## Files\n\n" + _table(("file", "what it holds"), [(f"`{f}`", s) for f, s in told.items()]))
    return "\n".join(part for part in parts if part)


def _of(model: Any) -> str:
    return f"`{model}`"


def _shares(
    parents: Sequence[Mapping[str, Any]], result: Mapping[str, Any]
) -> list[tuple[int, Mapping[str, Any], float]]:
    weights = result.get("shares") or [1 / len(parents)] * len(parents)
    return [(k + 1, p, float(w)) for k, (p, w) in enumerate(zip(parents, weights, strict=False))]


def _figures(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    quality = list(result.get("quality", {}).values())
    rows = []
    if quality:
        rows.append(("match of classes, mean (1 is perfect)", f"{sum(quality) / len(quality):.3f} over {len(quality)}"))
    rows += [("neurons that could move", f"{result['free']} of {result['neurons']}")] if "neurons" in result else []
    rows += [("repair", str(result["repair"]))] if "repair" in result else []
    rows += [("seconds", f"{sum(result['seconds'].values()):.1f}")] if result.get("seconds") else []
    return rows


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n" if rows else ""
