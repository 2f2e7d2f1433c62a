"""Networks for programs other than fxmerge: ONNX, ``torch.export``, and plain tensors under the parents' names.

    export_onnx(module, "m.onnx", inputs)   ->  onnxruntime, Netron and the like
    export_pt2(module, "m.pt2", inputs)     ->  torch.export.load("m.pt2").module()
    export_state_dict(module, "m.safetensors")  ->  parent.load_state_dict(safetensors.torch.load_file("m.safetensors"))

Axis 0 of every input is the batch, of any size. The files appear whole or not at all.
"""

from __future__ import annotations

import importlib.util
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxmerge.errors import FxMergeError, told
from fxmerge.folder import partial_folder, to_disk
from fxmerge.running import device_of, to_device
from fxmerge.stored import stays_on_disk

_ONNX_LIMIT = 1.9e9  # bytes of tensors; a file of the format holds 2 GB
_BATCH = "batch"


def export_onnx(
    module: nn.Module, path: str | Path, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
) -> Path:
    """Write ``module`` in eval mode as ONNX, axis 0 of every input the dynamic batch; return the path.

    Args:
        module: left as found.
        path: the file; weights beyond the 2 GB that an ONNX file can hold go next to it, to ``<path>.data``.
        args, kwargs: example inputs; axis 0 of every tensor is the batch.

    Raises:
        FxMergeError: ``onnx`` or ``onnxscript`` is not installed, or the module has no ONNX form for any batch.
    """
    if missing := [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]:
        raise FxMergeError(f"ONNX export needs {' and '.join(missing)}: pip install fxmerge[onnx]")
    external = sum(t.nbytes for t in module.state_dict(keep_vars=True).values()) > _ONNX_LIMIT

    def write(file: Path, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: dict[str, Any]) -> None:
        options: dict[str, Any] = {"dynamic_shapes": shapes, "external_data": external, "verbose": False}
        torch.onnx.export(module, args, str(file), kwargs=kwargs, dynamo=True, **options)

    return _exported(module, Path(path), args, kwargs, write, "torch.onnx")


def export_pt2(
    module: nn.Module, path: str | Path, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
) -> Path:
    """Write ``module`` in eval mode as ``torch.export`` does, axis 0 of every input the dynamic batch; return the path.

    Args:
        module: left as found.
        path: the file, whose name ends in ".pt2".
        args, kwargs: example inputs; axis 0 of every tensor is the batch.

    Raises:
        FxMergeError: the module cannot be exported for any batch, or the name ends otherwise.

    Example:
        >>> export_pt2(module, "m.pt2", (x,))
        >>> torch.export.load("m.pt2").module()(x)
    """
    if Path(path).suffix != ".pt2":
        raise FxMergeError(f"{path}: torch.export reads files whose names end in '.pt2'; give it such a name")

    def write(file: Path, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: dict[str, Any]) -> None:
        torch.export.save(torch.export.export(module, args, kwargs, dynamic_shapes=shapes), file)

    return _exported(module, Path(path), args, kwargs, write, "torch.export")


def export_state_dict(module: nn.Module, path: str | Path) -> Path:
    """Write the ``state_dict`` as one safetensors file, tied tensors under each of their names; return the path.

    Where no widths or depths changed, ``parent.load_state_dict(safetensors.torch.load_file(path))`` fits.

    Raises:
        FxMergeError: an entry is no dense tensor, or the file cannot be written.
    """
    path = Path(path)
    tensors = {}
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor) or value.is_meta or value.layout is not torch.strided:
            raise FxMergeError(f"{name!r} is no dense tensor and has no place in a safetensors file")
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    try:
        with partial_folder(path) as partial:
            save_file(tensors, partial / path.name, metadata={"format": "pt"})
            _move(partial, path)
    except (SafetensorError, OSError) as error:
        raise FxMergeError(f"{path} could not be written: {told(error)}") from error
    return path


Writer = Callable[[Path, tuple[Any, ...], dict[str, Any], dict[str, Any]], None]


def _exported(
    module: nn.Module, path: Path, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, write: Writer, exporter: str
) -> Path:
    """What ``write`` makes of ``module`` in eval mode, at ``path``."""
    if stays_on_disk(module):
        raise FxMergeError(f"{exporter} takes a network in memory: save this one, and export what load gives")
    given = to_device((args, dict(kwargs or {})), device_of(module))
    args, kwargs, shapes = _with_dynamic_batch(module, *given)
    with partial_folder(path) as partial:
        try:
            with _evaluated(module), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the exporter's own workings
                write(partial / path.name, args, kwargs, shapes)
        except Exception as error:  # whatever an exporter meets
            raise FxMergeError(f"{exporter} cannot export {type(module).__name__}: {_reason(error)}") from error
        _move(partial, path)
    return path


def _move(partial: Path, path: Path) -> None:
    """The files in ``partial`` to beside ``path``, which comes last."""
    for written in sorted(partial.iterdir(), key=lambda file: file.name == path.name):
        to_disk(written)
        written.replace(path.with_name(written.name))
    to_disk(path.parent)


def _reason(error: BaseException) -> str:
    """What the exporters' own errors, which wrap each other, say at the bottom."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in told(error if isinstance(error, Exception) else Exception(error)).splitlines()]
    return "\n".join(line for line in lines if line)[:2000]


@contextmanager
def _evaluated(module: nn.Module) -> Iterator[None]:
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for m, mode in modes.items():
            m.training = mode


def _with_dynamic_batch(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]:
    """The inputs, at a batch of two where it was one (torch.export takes a one for a constant), and their shapes."""

    def over_batched(function: Callable[[Tensor], Any], tree: Any, rest: Callable[[Any], Any]) -> Any:
        return pytree.tree_map(lambda t: function(t) if isinstance(t, Tensor) and t.ndim else rest(t), tree)

    sizes = {len(t) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.ndim}
    if sizes == {1}:
        args, kwargs = over_batched(lambda t: torch.cat([t, t]), (args, kwargs), lambda leaf: leaf)
    batch = torch.export.Dim(_BATCH)
    arguments = dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
    return args, kwargs, over_batched(lambda t: {0: batch}, arguments, lambda leaf: None)
