"""A graph module to a folder and back, without pickle: tensors as safetensors, everything else as JSON.

    save(module, "out")  ->  out/model.safetensors   one copy of every tensor; several files and an index where large
                             out/graph.json          modules, tensors, nodes; every name from an allow-list
                             out/recipe.json         how the module came to be
                             out/report.html         if there is a report
    load("out")          ->  fx.GraphModule          same keys in the same order, same graph, equal output

A folder can name functions, methods and classes of torch and torchvision only, and nothing is imported by a name
that comes from a file: loading a folder from elsewhere runs no code of its own.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import shutil
import tempfile
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxmerge.document import GRAPH, describe, naming, rebuild
from fxmerge.errors import FormatError, FxMergeError, told
from fxmerge.shards import SHARD_SIZE, Shards, bytes_of, write

_RECIPE, _REPORT = "recipe.json", "report.html"


def save(
    module: fx.GraphModule,
    folder: str | Path,
    *,
    recipe: dict[str, Any] | None = None,
    report: str | None = None,
    shard_size: int | str = SHARD_SIZE,
) -> Path:
    """Write ``module`` to ``folder``, which appears complete or not at all, and return the folder.

    Tied tensors are stored once and tied again by ``load`` (parts of one tensor become tensors of their own); buffers
    and constants outside the state_dict are kept. What the graph does not call keeps its keys, whatever its class.

    Args:
        module: calls torch and torchvision functions, and leaf modules of ``torch.nn`` or ``torchvision.ops``.
        folder: must not exist, or be empty.
        recipe: anything JSON can hold, for ``recipe.json``.
        report: an HTML page, for ``report.html``.
        shard_size: bytes of tensors that one file may hold, or a size such as "5GB"; beyond that there are several,
            with an index, as on the Hugging Face hub.

    Raises:
        FormatError: the folder is taken, or something in the module or the recipe cannot be stored; nothing is left.
    """
    folder = Path(folder)
    bytes_of(shard_size)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FormatError(f"{folder} exists already and would be overwritten; give another folder, or remove it first")
    with naming(type(module).__name__):
        document, tensors = describe(module)
    files = {GRAPH: json.dumps(document, indent=1, allow_nan=False)}
    try:
        files[_RECIPE] = json.dumps(recipe or {}, indent=1)
    except (TypeError, ValueError) as error:
        raise FormatError(f"the recipe must be strings, numbers, lists and dicts, as JSON is: {error}") from None
    if report is not None:
        files[_REPORT] = report
    if list(rebuild(json.loads(files[GRAPH]), tensors).state_dict()) != list(module.state_dict()):
        raise FormatError("state_dict() of the module is changed by hooks, which cannot be stored; remove them")

    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    try:
        partial.mkdir(parents=True)
        for name, text in files.items():
            (partial / name).write_text(text, encoding="utf-8")
        write(tensors, partial, shard_size)
        if folder.exists():
            folder.rmdir()  # is empty
        partial.rename(folder)
    except (SafetensorError, LookupError, OSError) as error:
        raise FormatError(f"{folder} could not be written: {told(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def load(folder: str | Path) -> fx.GraphModule:
    """The module that ``save`` wrote to ``folder``, on the CPU, every part in the mode it was in.

    Raises:
        FormatError: a file is missing, damaged or foreign, or names something that is not on the allow-list.
    """
    folder = Path(folder)
    if not (folder / GRAPH).is_file():
        raise FormatError(f"{folder} has no {GRAPH}; give a folder that fxmerge saved")
    try:
        document = json.loads((folder / GRAPH).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{folder / GRAPH} is not JSON ({error}); save the module again") from None
    # Clones, because what safetensors gives is mapped to the file and would change with it.
    tensors = {name: tensor.clone() for name, tensor in Shards(folder).items()}
    with naming(str(folder)):
        return rebuild(document, tensors)


def export_onnx(
    module: nn.Module, path: str | Path, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
) -> Path:
    """Write ``module`` in eval mode as ONNX, axis 0 of every input and output the dynamic batch; return the path.

    Args:
        module: left as found.
        path: the file; weights beyond the 2 GB that an ONNX file can hold go next to it, to ``<path>.data``.
        args, kwargs: example inputs; axis 0 of every tensor is the batch.

    Raises:
        FxMergeError: ``onnx`` or ``onnxscript`` is not installed, or the module has no ONNX form.
    """
    if missing := [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]:
        raise FxMergeError(f"ONNX export needs {' and '.join(missing)}: pip install fxmerge[onnx]")
    path = Path(path)
    args, kwargs, shapes = _with_dynamic_batch(module, args, dict(kwargs or {}))
    external = sum(t.nbytes for t in module.state_dict().values()) > 1.9e9
    modes = {m: m.training for m in module.modules()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as partial:
        file = str(Path(partial, path.name))
        options: dict[str, Any] = {"dynamic_shapes": shapes, "external_data": external, "verbose": False}
        try:
            torch.onnx.export(module.eval(), args, file, kwargs=kwargs, dynamo=True, **options)
        except Exception as error:
            raise FxMergeError(f"torch.onnx cannot export {type(module).__name__}: {error}") from error
        finally:
            for m, mode in modes.items():
                m.training = mode
        for written in sorted(Path(partial).iterdir(), key=lambda f: f.name == path.name):  # the model last
            written.replace(path.with_name(written.name))
    return path


def _with_dynamic_batch(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]:
    """The inputs, at a batch of two where it was one (torch.export takes a one for a constant), and their shapes."""

    def over_batched(function: Callable[[Tensor], Any], tree: Any, rest: Callable[[Any], Any]) -> Any:
        return pytree.tree_map(lambda t: function(t) if isinstance(t, Tensor) and t.ndim else rest(t), tree)

    sizes = {len(t) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.ndim}
    if sizes == {1}:
        args, kwargs = over_batched(lambda t: torch.cat([t, t]), (args, kwargs), lambda leaf: leaf)
    batch = torch.export.Dim("batch")
    arguments = dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
    return args, kwargs, over_batched(lambda t: {0: batch}, arguments, lambda leaf: None)
