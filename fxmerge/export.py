"""A graph module to a folder and back, without pickle: tensors as safetensors, everything else as JSON.

    save(module, "out")  ->  out/model.safetensors   one copy of every tensor
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
import math
import operator
import re
import shutil
import sys
import tempfile
import types
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, reduce
from itertools import chain
from keyword import iskeyword
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.overrides import get_overridable_functions
from torch.utils import _pytree as pytree

from fxmerge.errors import FormatError, FxMergeError, told

VERSION = 1
_GRAPH, _TENSORS, _RECIPE, _REPORT = "graph.json", "model.safetensors", "recipe.json", "report.html"
# What a value that does not belong makes Python and torch raise.
_FAULTS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def save(
    module: fx.GraphModule, folder: str | Path, *, recipe: dict[str, Any] | None = None, report: str | None = None
) -> Path:
    """Write ``module`` to ``folder``, which appears complete or not at all, and return the folder.

    Tied tensors are stored once and tied again by ``load`` (parts of one tensor become tensors of their own); buffers
    and constants outside the state_dict are kept. What the graph does not call keeps its keys, whatever its class.

    Args:
        module: calls torch and torchvision functions, and leaf modules of ``torch.nn`` or ``torchvision.ops``.
        folder: must not exist, or be empty.
        recipe: anything JSON can hold, for ``recipe.json``.
        report: an HTML page, for ``report.html``.

    Raises:
        FormatError: the folder is taken, or something in the module or the recipe cannot be stored; nothing is left.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FormatError(f"{folder} exists already and would be overwritten; give another folder, or remove it first")
    with _naming(type(module).__name__):
        document, tensors = _describe(module)
    files = {_GRAPH: json.dumps(document, indent=1, allow_nan=False)}
    try:
        files[_RECIPE] = json.dumps(recipe or {}, indent=1)
    except (TypeError, ValueError) as error:
        raise FormatError(f"the recipe must be strings, numbers, lists and dicts, as JSON is: {error}") from None
    if report is not None:
        files[_REPORT] = report
    if list(_rebuild(json.loads(files[_GRAPH]), tensors).state_dict()) != list(module.state_dict()):
        raise FormatError("state_dict() of the module is changed by hooks, which cannot be stored; remove them")

    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    try:
        partial.mkdir(parents=True)
        for name, text in files.items():
            (partial / name).write_text(text, encoding="utf-8")
        save_file(tensors, partial / _TENSORS, metadata={"format": "pt"})
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
    for name in (_GRAPH, _TENSORS):
        if not (folder / name).is_file():
            raise FormatError(f"{folder} has no {name}; give a folder that fxmerge saved")
    try:
        document = json.loads((folder / _GRAPH).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{folder / _GRAPH} is not JSON ({error}); save the module again") from None
    try:
        # Clones, because what safetensors gives is mapped to the file and would change with it.
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / _TENSORS).items()}
    except (SafetensorError, ValueError, OSError) as error:
        raise FormatError(f"{folder / _TENSORS} is not a safetensors file ({error}); save the module again") from None
    with _naming(str(folder)):
        return _rebuild(document, tensors)


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


# What a folder may name --------------------------------------------------------------------------------------

_BUILTINS = (abs, bool, complex, divmod, float, getattr, int, len, list, max, min, pow, round, slice, sum, tuple)
_ATTRIBUTES = frozenset(  # of tensors, of devices and dtype limits, of the named results of max, svd and the like
    "shape dtype device layout ndim T mT H mH real imag data itemsize nbytes requires_grad is_cpu is_cuda is_mps "
    "is_xpu is_meta is_leaf is_nested is_quantized is_sparse type index min max eps tiny values indices sign logabsdet "
    "U S V Vh Q R L LU pivots P eigenvalues eigenvectors solution".split()
)
_UNSAFE = frozenset(  # memory, files and callbacks
    "from_file from_numpy frombuffer apply_ map_ map2_ set_ data_ptr const_data_ptr storage storage_type "
    "untyped_storage numpy share_memory_ record_stream register_hook register_post_accumulate_grad_hook "
    "module_load backward".split()
)
_METHODS_BESIDES = "new_empty new_full new_ones new_tensor new_zeros as_strided stride unflatten".split()
_FUNCTION = (types.FunctionType, types.BuiltinFunctionType)
_CONVERSIONS = ("__bool__", "__complex__", "__float__", "__int__", "__len__")


@cache
def _functions() -> dict[str, Callable[..., Any]]:
    """Dotted name -> function, for all that a graph may call apart from torchvision's."""
    native = [getattr(torch._C, name) for name in ("_VariableFunctions", "_nn", "_fft", "_linalg", "_special")]
    allowed = {f for functions in get_overridable_functions().values() for f in functions}
    allowed |= {getattr(n, name) for n in native for name in dir(n) if not name.startswith("_")}
    allowed |= {f for f in vars(F).values() if getattr(f, "__module__", "") == F.__name__ and callable(f)}
    allowed |= {torch.is_tensor, torch.broadcast_shapes, torch.get_default_dtype}
    found: dict[str, Callable[..., Any]] = {"torch._assert": torch._assert}
    for space in ("torch", "torch.nn.functional", "torch.linalg", "torch.fft", "torch.special", "torch._C._nn"):
        functions = vars(sys.modules[space])
        for name in sorted(functions.keys() - _UNSAFE):
            if isinstance(functions[name], _FUNCTION) and functions[name] in allowed and not name.startswith("_"):
                found[f"{space}.{name}"] = functions[name]
    operators = set(operator.__all__) - {"attrgetter", "call", "itemgetter", "methodcaller"}
    found |= {f"operator.{name}": getattr(operator, name) for name in operators}
    found |= {f"math.{name}": f for name, f in vars(math).items() if callable(f) and not name.startswith("_")}
    return found | {f"builtins.{f.__name__}": f for f in _BUILTINS}


@cache
def _function_names() -> dict[Callable[..., Any], str]:
    return {function: name for name, function in reversed(_functions().items())}


@cache
def _methods() -> frozenset[str]:
    """Names of the tensor methods that a graph may call."""
    overridable = set(get_overridable_functions()[torch.Tensor])
    names = {name for name in dir(Tensor) if (f := getattr(Tensor, name)).__hash__ and f in overridable}
    operators = {name for name in names if name in vars(operator) or f"__{name[3:]}" in vars(operator)}  # __radd__ too
    public = {name for name in names if not name.startswith("_")}
    return frozenset((public - _UNSAFE).union(operators, _CONVERSIONS, _METHODS_BESIDES))


def _member(name: str, *spaces: str) -> Any:
    """What ``name`` names in a module that is imported anyway and inside one of ``spaces``; None if nothing is."""
    space, _, attribute = name.rpartition(".")
    if not space.startswith(spaces):
        return None
    if space.startswith("torchvision."):
        importlib.import_module("torchvision")
    found = vars(sys.modules[space]).get(attribute) if space in sys.modules else None
    return found if getattr(found, "__module__", None) == space else None


def _function(name: str) -> Callable[..., Any]:
    if name in _functions():
        return _functions()[name]
    function = _member(name, "torchvision.ops.", "torchvision.models.")
    if isinstance(function, types.FunctionType):
        # Of torchvision.models only what fx.wrap made an operation: other functions there may read the network.
        wrapped = (id(function.__globals__), function.__name__) in fx._symbolic_trace._wrapped_fns_to_patch
        if wrapped or name.startswith("torchvision.ops."):
            return function
    raise FormatError(f"the function {name!r} is not on the allow-list; write it with functions of torch")


def _function_name(function: Any) -> str:
    """The name under which ``_function`` finds ``function``."""
    name = f"{getattr(function, '__module__', None)}.{getattr(function, '__qualname__', function)}"
    name = _function_names().get(function, name)
    if _function(name) is not function and function not in _function_names():
        raise FormatError(f"{name!r} is no longer the function of that name")
    return name


def _class(name: str) -> type[nn.Module]:
    cls = _member(name, "torch.nn.modules.", "torchvision.ops.")
    if inspect.isclass(cls) and issubclass(cls, nn.Module):
        return cls
    raise FormatError(f"the class {name!r} is not in torch.nn or torchvision.ops; build it from modules of torch.nn")


# Values ------------------------------------------------------------------------------------------------------


def _constant(kind: type) -> tuple[type, Callable[[Any], Any], Callable[[Any], Any]]:
    def read(name: str) -> Any:
        if isinstance(value := getattr(torch, name, None), kind):
            return value
        raise FormatError(f"{name!r} is no {kind.__name__} of torch")

    return kind, lambda value: str(value).removeprefix("torch."), read


# tag -> type, to a simpler value, and back; JSON's own types and lists go without a tag.
_TAGS: dict[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "tuple": (tuple, list, tuple),
    "size": (torch.Size, list, torch.Size),
    "slice": (slice, lambda s: [s.start, s.stop, s.step], lambda v: slice(*v)),
    "range": (range, lambda r: [r.start, r.stop, r.step], lambda v: range(*v)),
    "dict": (dict, lambda d: [[k, v] for k, v in d.items()], dict),
    "float": (float, repr, float),
    "complex": (complex, repr, complex),
    "ellipsis": (type(...), lambda _: None, lambda _: ...),
    "dtype": _constant(torch.dtype),
    "layout": _constant(torch.layout),
    "memory_format": _constant(torch.memory_format),
    "device": (torch.device, str, torch.device),
}


def _encode(value: Any) -> Any:
    if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
        return value
    if isinstance(value, list):
        return [_encode(v) for v in value]
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, nn.Module):
        return {"module": _describe_module(value, "", set(), inside=True)}
    for tag, (kind, simplify, _) in _TAGS.items():
        if type(value) is kind or (kind is dict and isinstance(value, dict)):
            return {tag: _encode(simplify(value))}
    if callable(value):
        return {"function": _function_name(value)}
    raise FormatError(f"a value of type {type(value).__name__} cannot be stored; make it a number or a buffer")


def _decode(value: Any, nodes: Mapping[str, fx.Node] | None = None) -> Any:
    """The value; functions and modules only in arguments of modules (``nodes`` is None), never in those of nodes."""
    if isinstance(value, list):
        return [_decode(v, nodes) for v in value]
    if not isinstance(value, dict):
        return value
    [(tag, content)] = value.items()
    if tag == "node" and nodes is not None:
        return nodes[content]
    if tag == "module" and nodes is None:
        return _build(content)
    if tag == "function" and nodes is None and content.startswith("torch."):
        return _function(content)
    return _TAGS[tag][2](_decode(content, nodes))


# Describing --------------------------------------------------------------------------------------------------

_UNSAID = inspect.Parameter.empty
# Constructor arguments that no attribute of the same name tells. Children and plain attributes are stored besides,
# so these are only what a constructor insists on, or what decides which tensors it makes.
_ARGUMENTS: dict[str, Callable[[Any], Any]] = {
    "MultiheadAttention.bias": lambda m: m.in_proj_bias is not None,
    "MultiheadAttention.add_bias_kv": lambda m: m.bias_k is not None,
    "TransformerEncoderLayer.d_model": lambda m: m.self_attn.embed_dim,
    "TransformerEncoderLayer.nhead": lambda m: m.self_attn.num_heads,
    "TransformerDecoderLayer.d_model": lambda m: m.self_attn.embed_dim,
    "TransformerDecoderLayer.nhead": lambda m: m.self_attn.num_heads,
    "TransformerEncoder.encoder_layer": lambda m: m.layers[0],
    "TransformerDecoder.decoder_layer": lambda m: m.layers[0],
    "LSTM.mode": lambda m: _UNSAID,  # follows from the class
    "GRU.mode": lambda m: _UNSAID,
    "RNN.mode": lambda m: _UNSAID,
    "RNNBase.proj_size": lambda m: m.proj_size or _UNSAID,  # GRU and RNN refuse even a zero
    "FrozenBatchNorm2d.num_features": lambda m: len(m.weight),
    "SqueezeExcitation.input_channels": lambda m: m.fc1.in_channels,
    "SqueezeExcitation.squeeze_channels": lambda m: m.fc1.out_channels,
}


def _describe(module: fx.GraphModule) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The document for ``graph.json`` and the tensors that it speaks of."""
    if type(module.graph._codegen) is not fx.graph.CodeGen:
        raise FormatError("the graph packs its inputs or outputs (pytree codegen); trace without concrete_args")
    called = {node.target for node in module.graph.find_nodes(op="call_module")}
    tensors, stored = _describe_tensors(module)
    document = {
        "format": "fxmerge",
        "version": VERSION,
        "torch": torch.__version__,
        "class": type(module).__name__,
        "modules": _describe_module(module, "", called),
        "tensors": tensors,
        "nodes": [_describe_node(node) for node in module.graph.nodes],
    }
    return document, stored


def _describe_node(node: fx.Node) -> dict[str, Any]:
    with _naming(f"node {node.name!r} ({node.op} {node._pretty_print_target(node.target)})"):
        record = {
            "op": node.op,
            "name": node.name,
            "target": _function_name(node.target) if callable(node.target) else node.target,
            "args": [_encode(a) for a in node.args],
            "kwargs": {key: _encode(value) for key, value in node.kwargs.items()},
            "wrapped": node.meta.get("is_wrapped"),  # by fx.wrap: remains one operation when traced again
        }
    return {key: value for key, value in record.items() if value is not None}


def _describe_module(module: nn.Module, path: str, called: set[Any], inside: bool = False) -> dict[str, Any]:
    """``module`` with all below it; one that the graph does not call may be of any class, and keeps its keys only."""
    inside = inside or path in called
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    spec: dict[str, Any] = {"class": "torch.nn.modules.module.Module", "attributes": {"training": module.training}}
    try:
        with _naming(f"module {path!r} of class {name}"):
            spec = _describe_constructor(module, name)
    except FormatError:
        if inside:
            raise
    children = {
        key: None if child is None else _describe_module(child, f"{path}.{key}".lstrip("."), called, inside)
        for key, child in module._modules.items()
    }
    return spec | {"children": children}


def _describe_constructor(module: nn.Module, name: str) -> dict[str, Any]:
    """The call that makes a module like this one, and the plain attributes that differ after it."""
    if _class(name) is not type(module):
        raise FormatError("this is no longer the class of that name")
    if module._forward_hooks or module._forward_pre_hooks:
        raise FormatError("its forward hooks would be lost; remove them")
    signatures = (inspect.signature(vars(cls)["__init__"]) for cls in type(module).__mro__ if "__init__" in vars(cls))
    named = ([p for p in s.parameters.values() if not p.kind.name.startswith("VAR")][1:] for s in signatures)
    given = ((p.name, _argument(module, p)) for p in next(filter(None, named), []))
    arguments = {key: _encode(value) for key, value in given if value is not _UNSAID}
    bare = _construct({"class": name, "args": arguments})
    made, held = (
        {k: [*t.shape] for k, t in {**m._parameters, **m._buffers}.items() if t is not None} for m in (bare, module)
    )
    if made != held and type(module) is not nn.Module:
        raise FormatError(f"its constructor, called with {arguments}, makes {made}, but it holds {held}")
    shared = [key for key in vars(bare) if key in vars(module) and not key.startswith("_")]
    now, then = ({key: _encode(vars(m)[key]) for key in shared} for m in (module, bare))
    return {"class": name, "args": arguments, "attributes": {key: now[key] for key in shared if now[key] != then[key]}}


def _argument(module: nn.Module, parameter: inspect.Parameter) -> Any:
    """What the constructor of ``module`` was given for ``parameter``, or ``_UNSAID`` where the default will do."""
    name = parameter.name
    for cls in type(module).__mro__:
        if rule := _ARGUMENTS.get(f"{cls.__name__}.{name}"):
            return rule(module)
    if name in ("device", "dtype") or name.startswith("_") or name in module._modules:
        return _UNSAID
    if name in module._parameters:  # such as bias: whether there is one
        return module._parameters[name] is not None
    if name not in vars(module) and parameter.default is _UNSAID:
        raise FormatError(f"its constructor requires {name!r}, which it does not keep")
    return vars(module).get(name, _UNSAID)


def _describe_tensors(module: fx.GraphModule) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A record for every name of a tensor, and the tensors to store: one for all names that are the same."""
    found: dict[str, tuple[Tensor, dict[str, Any]]] = {}
    for path, owner in module.named_modules(remove_duplicate=False):
        for key, t in chain(owner._parameters.items(), owner._buffers.items()):
            record: dict[str, Any] = {"kind": "buffer", "persistent": key not in owner._non_persistent_buffers_set}
            if key in owner._parameters and t is not None:
                record = {"kind": "parameter", "requires_grad": t.requires_grad}
            if t is not None:
                found[f"{path}.{key}".lstrip(".")] = t, record
    for node in module.graph.find_nodes(op="get_attr"):
        value: Any = reduce(getattr, node.target.split("."), module)
        if not isinstance(value, Tensor):
            raise FormatError(f"node {node.name!r} reads {node.target!r}, a {type(value).__name__}; make it a buffer")
        found.setdefault(node.target, (value, {"kind": "constant"}))

    records: dict[str, Any] = {}
    stored: dict[str, Tensor] = {}
    first: dict[Any, str] = {}
    storages: set[int] = set()
    for name, (t, record) in found.items():
        if is_lazy(t) or t.layout is not torch.strided or t.is_quantized or t.is_meta:
            raise FormatError(f"{name!r} is sparse, quantised, on the meta device or not initialised; make it dense")
        records[name] = record | {"dtype": _encode(t.dtype), "shape": [*t.shape]}
        same = (t.device, t.data_ptr(), t.dtype, t.shape, t.stride()) if t.numel() else id(t)
        if first.setdefault(same, name) != name:
            records[name]["same_as"] = first[same]
            continue
        order = sorted(range(t.ndim), key=t.stride, reverse=True)
        if not t.is_contiguous() and t.permute(order).is_contiguous():
            records[name]["order"] = order  # such as channels_last, which decides the kernel and so the rounding
        dense = t.detach().cpu().contiguous()
        if dense.untyped_storage().nbytes() != dense.nbytes or dense.data_ptr() in storages:
            dense = dense.clone()  # safetensors refuses parts of a storage, and two views of one
        storages.add(dense.data_ptr())
        stored[name] = dense
    return records, stored


# Rebuilding --------------------------------------------------------------------------------------------------


def _rebuild(document: Any, stored: Mapping[str, Tensor]) -> fx.GraphModule:
    with _naming(_GRAPH):
        if (document["format"], document["version"]) != ("fxmerge", VERSION):
            found = f"{document['format']!r} version {document['version']!r}"
            raise FormatError(f"the format is {found}, and this fxmerge reads 'fxmerge' version {VERSION}")
        root = fx.GraphModule(nn.Module(), fx.Graph(), _name(document["class"]))
        _fill(root, document["modules"])
        _install(root, document["tensors"], stored)
        root.graph = _rebuild_graph(document["nodes"], root)
    return root


def _construct(spec: Mapping[str, Any]) -> nn.Module:
    """A module of the class in ``spec`` on the meta device, made by its constructor alone."""
    arguments = {_name(key): _decode(value) for key, value in spec.get("args", {}).items()}
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _class(spec["class"])(**arguments)
        except _FAULTS as error:
            raise FormatError(f"{spec['class']}(**{arguments}) fails: {told(error)}") from error


def _build(spec: Mapping[str, Any]) -> nn.Module:
    module = _construct(spec)
    _fill(module, spec)
    return module


def _fill(module: nn.Module, spec: Mapping[str, Any]) -> None:
    """Give ``module`` the plain attributes and the children in ``spec``."""
    for key, value in spec.get("attributes", {}).items():
        if key.startswith("_") or key not in vars(module):
            raise FormatError(f"{spec['class']} has no attribute {key!r}")
        setattr(module, key, _decode(value))
    module._modules.clear()
    for key, child in spec.get("children", {}).items():
        if child is not None:
            vars(module).pop(key, None)  # a plain None or a function, where the constructor knew of no child
        module.register_module(key, None if child is None else _build(child))


def _install(root: nn.Module, records: Mapping[str, Any], stored: Mapping[str, Tensor]) -> None:
    """Put the stored tensors in the places that the constructors left on the meta device."""
    expected = {name for name, record in records.items() if "same_as" not in record}
    if difference := expected ^ stored.keys():
        name = min(difference)
        having, lacking = (_GRAPH, _TENSORS) if name in expected else (_TENSORS, _GRAPH)
        raise FormatError(f"the tensor {name!r} is in {having} but not in {lacking}")
    placed: dict[tuple[Any, ...], Tensor] = {}
    for name, record in records.items():
        source, kind, grad = record.get("same_as", name), record["kind"], record.get("requires_grad", False)
        tensor, shape, dtype = stored[source], record["shape"], _decode(record["dtype"])
        if [*tensor.shape] != shape or tensor.dtype != dtype:
            there, here = f"{tensor.dtype} {[*tensor.shape]} in {_TENSORS}", f"{dtype} {shape} in {_GRAPH}"
            raise FormatError(f"the tensor {name!r} is {there} but {here}")
        if kind not in ("parameter", "buffer", "constant"):
            raise FormatError(f"the tensor {name!r} is a {kind!r}, which is unknown")
        if (source, kind, grad) not in placed:
            if order := records[source].get("order"):
                tensor = tensor.permute(order).contiguous().permute(sorted(order, key=order.__getitem__))
            placed[source, kind, grad] = nn.Parameter(tensor, grad) if kind == "parameter" else tensor
        path, _, key = name.rpartition(".")
        owner = root.get_submodule(path)
        if kind == "parameter":
            owner._parameters.pop(key, None)  # registered anew, for the order
            owner.register_parameter(key, placed[source, kind, grad])  # type: ignore[arg-type]
        else:
            owner._buffers.pop(key, None)
            owner.register_buffer(key, placed[source, kind, grad], persistent=record.get("persistent", True))
        if kind == "constant":
            setattr(owner, key, owner._buffers.pop(key))
    for name, tensor in chain(root.named_parameters(), root.named_buffers()):
        if tensor.is_meta:
            raise FormatError(f"the tensor {name!r} is missing")


def _rebuild_graph(records: list[dict[str, Any]], root: fx.GraphModule) -> fx.Graph:
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    if not records or records[-1]["op"] != "output":
        raise FormatError("the last node is no output")
    for record in records:
        op, name, target = record["op"], record["name"], record["target"]
        with _naming(f"node {name!r} ({op} {target})"):
            args = tuple(_decode(record["args"], nodes))
            kwargs = {_name(key): _decode(value, nodes) for key, value in record["kwargs"].items()}
            nodes[name] = graph.create_node(op, _target(op, target, args, root), args, kwargs, name)
            if record.get("wrapped"):
                nodes[name].meta["is_wrapped"] = True
    graph.lint()
    return graph


def _target(op: str, name: str, args: tuple[Any, ...], root: fx.GraphModule) -> Any:
    """The target of a node, if a graph may have it."""
    if op == "call_function":
        function = _function(name)
        if function is getattr and args[1] not in _ATTRIBUTES:
            raise FormatError(f"the attribute {args[1]!r} is not on the allow-list of attributes of tensors")
        return function
    if op == "call_method" and name not in _methods():
        raise FormatError(f"the method {name!r} is not on the allow-list of tensor methods")
    if op == "placeholder":
        _name(name.lstrip("*"))
    elif op in ("call_module", "get_attr"):
        if not re.fullmatch(r"[\w .:/+-]+", name):
            raise FormatError(f"{name!r} is no path of a module or a tensor")
        found = reduce(getattr, name.split("."), root)
        if not isinstance(found, nn.Module if op == "call_module" else Tensor) or type(found) is nn.Module:
            raise FormatError(f"{name!r} is a {type(found).__name__}")
    elif op not in ("call_method", "output"):
        raise FormatError(f"{op!r} is no operation of a graph")
    return name


def _name(text: str) -> str:
    """``text``, if it is a plain name: fx writes names into the source of ``forward``, and Python runs that."""
    if not text.isidentifier() or iskeyword(text):
        raise FormatError(f"{text!r} is no Python name")
    return text


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Say ``where`` in every error that a damaged file, or a value that cannot be stored, causes inside."""
    try:
        yield
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from error
    except _FAULTS as error:
        raise FormatError(f"{where}: {told(error)}") from error
