"""A graph module to a folder and back, without pickle: tensors as safetensors, everything else as JSON.

    save(module, "out")  ->  out/model.safetensors   one copy of every tensor; several files and an index where large
                             out/graph.json          modules, tensors, nodes; every name from an allow-list
                             out/recipe.json         how the module came to be
                             out/module.py           the same network as source, for people
                             out/README.md           a model card
                             out/report.html         if there is a report
                             out/alignment.safetensors  if there is an alignment
                             out/manifest.json       size and SHA-256 of what is read again
    load("out")          ->  fx.GraphModule          same keys in the same order, same graph, equal output

A folder can name functions, methods and classes of torch and torchvision only, and nothing is imported by a name
that comes from a file: loading a folder from elsewhere runs no code of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import fx

from fxmerge.alignment import ALIGNMENT, write_alignment
from fxmerge.card import card
from fxmerge.document import GRAPH, describe, naming, rebuild
from fxmerge.errors import FormatError, told
from fxmerge.folder import partial_folder, publish, read_json, seal, sealed
from fxmerge.ir import Alignment
from fxmerge.listing import listing
from fxmerge.shards import INDEX, SHARD_SIZE, TENSORS, Shards, bytes_of, write
from fxmerge.stored import read_when_asked

_RECIPE, _REPORT, _SOURCE, _CARD = "recipe.json", "report.html", "module.py", "README.md"


def require_free(folder: Path) -> None:
    """Raises FormatError unless ``folder`` can be written: it does not exist, or is empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FormatError(f"{folder} exists already and would be overwritten; give another folder, or remove it first")


def save(
    module: fx.GraphModule,
    folder: str | Path,
    *,
    recipe: Mapping[str, Any] | None = None,
    report: str | None = None,
    alignment: Alignment | None = None,
    shard_size: int | str = SHARD_SIZE,
    extra: Mapping[str, str] | None = None,
) -> Path:
    """Write ``module`` to ``folder``, which appears complete or not at all, and return the folder.

    Tied tensors are stored once and tied again by ``load`` (parts of one tensor become tensors of their own); buffers
    and constants outside the state_dict are kept. What the graph does not call keeps its keys, whatever its class.
    A process that is killed leaves at most ``.<folder>.<8 digits>.partial``, which the next ``save`` to that place
    removes.

    Args:
        module: calls torch and torchvision functions, and leaf modules of ``torch.nn`` or ``torchvision.ops``.
        folder: must not exist, or be empty.
        recipe: anything JSON can hold, for ``recipe.json``.
        report: an HTML page, for ``report.html``.
        alignment: couplings, for ``alignment.safetensors``; ``load_alignment`` reads them.
        shard_size: bytes of tensors that one file may hold, or a size such as "5GB"; beyond that there are several,
            with an index, as on the Hugging Face hub.
        extra: further files by name: their texts.

    Raises:
        FormatError: the folder is taken, or something in the module or the recipe cannot be stored; nothing is left.
    """
    folder = Path(folder)
    bytes_of(shard_size)
    require_free(folder)
    with naming(type(module).__name__):
        document, tensors = describe(module)
    texts = {GRAPH: json.dumps(document, indent=1, allow_nan=False)}
    try:
        texts[_RECIPE] = json.dumps(dict(recipe or {}), indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise FormatError(f"the recipe must be strings, numbers, lists and dicts, as JSON is: {error}") from None
    if report is not None:
        texts[_REPORT] = report
    hollow = {name: torch.empty((), dtype=t.dtype).expand(t.shape) for name, t in tensors.items()}
    again = rebuild(json.loads(texts[GRAPH]), hollow)
    if list(again.state_dict()) != list(module.state_dict(keep_vars=True)):
        raise FormatError("state_dict() of the module is changed by hooks, which cannot be stored; remove them")
    texts[_SOURCE] = listing(again, document)
    texts.update(extra or {})

    try:
        with partial_folder(folder) as partial:
            files = [file.name for file in write(read_when_asked(tensors), partial, shard_size, tensors)]
            if alignment is not None:
                write_alignment(alignment, partial / ALIGNMENT)
                files.append(ALIGNMENT)
                if INDEX not in files:  # where there are several files, the hub's loaders look for it
                    where = {"metadata": {}, "weight_map": dict.fromkeys(tensors, TENSORS)}
                    texts[INDEX] = json.dumps(where, indent=1)
            texts[_CARD] = card(module, recipe or {}, [*texts, *files])
            for name, text in texts.items():
                (partial / name).write_text(text, encoding="utf-8")
            seal(partial, [name for name in (*texts, *files) if name.endswith((".json", ".safetensors"))])
            publish(partial, folder)
    except (SafetensorError, LookupError, OSError) as error:
        raise FormatError(f"{folder} could not be written: {told(error)}") from error
    return folder


def load(folder: str | Path) -> fx.GraphModule:
    """The module that ``save`` wrote to ``folder``, on the CPU, every part in the mode it was in.

    Every file that is read is compared with its SHA-256 in the manifest first, so a flipped bit or a lost end is
    found; ``README.md``, ``report.html`` and ``module.py`` are not read and may be edited.

    Raises:
        FormatError: a file is missing, damaged or foreign, or names something that is not on the allow-list.
    """
    folder = Path(folder)
    sealed(folder, [GRAPH])
    document = read_json(folder / GRAPH)
    # Clones, because what safetensors gives is mapped to the file and would change with it.
    tensors = {name: tensor.clone() for name, tensor in Shards(folder).items()}
    with naming(str(folder)):
        return rebuild(document, tensors)
