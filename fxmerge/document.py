"""A graph module as a JSON document and tensors, and back.

fx.GraphModule  --describe-->  modules, tensors, nodes (JSON); tensors to store  --rebuild-->  fx.GraphModule
"""

from __future__ import annotations

import inspect
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from itertools import chain
from keyword import iskeyword
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from fxmerge.errors import FormatError, cut, told
from fxmerge.shards import TENSORS
from fxmerge.stored import Stored
from fxmerge.vocabulary import ATTRIBUTES, function, function_name, methods, module_class

VERSION = 1
GRAPH = "graph.json"
# What a value that does not belong makes Python and torch raise.
_FAULTS: tuple[type[Exception], ...] = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError)
_FAULTS += (TypeError, ValueError, SyntaxError, MemoryError)  # the last two where a nest is too deep to compile
# Arguments that say how many layers a constructor makes: a file must not keep one busy for ever.
_COUNTS, _MOST = frozenset({"num_layers", "num_encoder_layers", "num_decoder_layers"}), 1000


def _constant(kind: type) -> tuple[type, Callable[[Any], Any], Callable[[Any], Any]]:
    def read(name: str) -> Any:
        if isinstance(value := vars(torch).get(name), kind):  # getattr would import some names
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


def encode(value: Any) -> Any:
    if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
        return value
    if isinstance(value, list):
        return [encode(v) for v in value]
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, nn.Module):
        return {"module": describe_module(value, "", set(), inside=True)}
    for tag, (kind, simplify, _) in _TAGS.items():
        if type(value) is kind or (kind is dict and isinstance(value, dict)):
            return {tag: encode(simplify(value))}
    if callable(value):
        return {"function": function_name(value)}
    raise FormatError(f"a value of type {type(value).__name__} cannot be stored; make it a number or a buffer")


def decode(value: Any, nodes: Mapping[str, fx.Node] | None = None) -> Any:
    """The value; functions and modules only in arguments of modules (``nodes`` is None), never in those of nodes."""
    if isinstance(value, list):
        return [decode(v, nodes) for v in value]
    if not isinstance(value, dict):
        return value
    [(tag, content)] = value.items()
    if tag == "range" and nodes is None:
        raise FormatError("a range is no argument of a module: some count through it to the end")
    if tag == "node" and nodes is not None:
        return nodes[content]
    if tag == "module" and nodes is None:
        return _build(content)
    if tag == "function" and nodes is None and content.startswith("torch."):
        return function(content)
    return _TAGS[tag][2](decode(content, nodes))


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


def describe(module: fx.GraphModule) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The document for ``graph.json`` and the tensors that it speaks of; those on disk are not read."""
    if type(module.graph._codegen) is not fx.graph.CodeGen:
        raise FormatError("the graph packs its inputs or outputs (pytree codegen); trace without concrete_args")
    called = {node.target for node in module.graph.find_nodes(op="call_module")}
    tensors, stored = _describe_tensors(module)
    document = {
        "format": "fxmerge",
        "version": VERSION,
        "torch": torch.__version__,
        "class": type(module).__name__,
        "modules": describe_module(module, "", called),
        "tensors": tensors,
        "nodes": [_describe_node(node) for node in module.graph.nodes],
    }
    return document, stored


def _describe_node(node: fx.Node) -> dict[str, Any]:
    with naming(f"node {node.name!r} ({node.op} {node._pretty_print_target(node.target)})"):
        record = {
            "op": node.op,
            "name": node.name,
            "target": function_name(node.target) if callable(node.target) else node.target,
            "args": [encode(a) for a in node.args],
            "kwargs": {key: encode(value) for key, value in node.kwargs.items()},
            "wrapped": node.meta.get("is_wrapped"),  # by fx.wrap: remains one operation when traced again
        }
    return {key: value for key, value in record.items() if value is not None}


def describe_module(module: nn.Module, path: str, called: set[Any], inside: bool = False) -> dict[str, Any]:
    """``module`` with all below it; one that the graph does not call may be of any class, and keeps its keys only."""
    inside = inside or path in called
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    spec: dict[str, Any] = {"class": "torch.nn.modules.module.Module", "attributes": {"training": module.training}}
    try:
        with naming(f"module {path!r} of class {name}"):
            spec = _describe_constructor(module, name)
    except FormatError:
        if inside:
            raise
    children = {
        key: None if child is None else describe_module(child, f"{path}.{key}".lstrip("."), called, inside)
        for key, child in module._modules.items()
    }
    return spec | {"children": children}


def _describe_constructor(module: nn.Module, name: str) -> dict[str, Any]:
    """The call that makes a module like this one, and the plain attributes that differ after it."""
    if module_class(name) is not type(module):
        raise FormatError("this is no longer the class of that name")
    if module._forward_hooks or module._forward_pre_hooks:
        raise FormatError("its forward hooks would be lost; remove them")
    signatures = (inspect.signature(vars(cls)["__init__"]) for cls in type(module).__mro__ if "__init__" in vars(cls))
    named = ([p for p in s.parameters.values() if not p.kind.name.startswith("VAR")][1:] for s in signatures)
    given = ((p.name, _argument(module, p)) for p in next(filter(None, named), []))
    arguments = {key: encode(value) for key, value in given if value is not _UNSAID}
    bare = construct({"class": name, "args": arguments})
    made, held = (
        {k: [*t.shape] for k, t in {**m._parameters, **m._buffers}.items() if t is not None} for m in (bare, module)
    )
    if made != held and type(module) is not nn.Module:
        raise FormatError(f"its constructor, called with {arguments}, makes {made}, but it holds {held}")
    shared = [key for key in vars(bare) if key in vars(module) and not key.startswith("_")]
    now, then = ({key: encode(vars(m)[key]) for key in shared} for m in (module, bare))
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
        if isinstance(value, nn.Module):  # a layer that tells the mode
            continue
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
        records[name] = record | {"dtype": encode(t.dtype), "shape": [*t.shape]}
        same = (t.device, t.data_ptr(), t.dtype, t.shape, t.stride()) if t.numel() else id(t)
        if first.setdefault(same, name) != name:
            records[name]["same_as"] = first[same]
            continue
        if isinstance(t, Stored):
            stored[name] = t
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


def rebuild(document: Any, stored: Mapping[str, Tensor]) -> fx.GraphModule:
    with naming(GRAPH):
        if (document["format"], document["version"]) != ("fxmerge", VERSION):
            found = f"{document['format']!r} version {document['version']!r}"
            raise FormatError(f"the format is {found}, and this fxmerge reads 'fxmerge' version {VERSION}")
        root = fx.GraphModule(nn.Module(), fx.Graph(), _name(document["class"]))
        fill(root, document["modules"])
        _install(root, document["tensors"], stored)
        root.graph = _rebuild_graph(document["nodes"], root)
    return root


def construct(spec: Mapping[str, Any]) -> nn.Module:
    """A module of the class in ``spec`` on the meta device, made by its constructor alone."""
    arguments = {_name(key): decode(value) for key, value in spec.get("args", {}).items()}
    for key in _COUNTS & arguments.keys():
        if isinstance(arguments[key], int) and arguments[key] > _MOST:
            raise FormatError(f"{spec['class']} with {key}={arguments[key]}: at most {_MOST} layers can be stored")
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return module_class(spec["class"])(**arguments)
        except _FAULTS as error:
            raise FormatError(f"{spec['class']}(**{arguments}) fails: {told(error)}") from error


def _build(spec: Mapping[str, Any]) -> nn.Module:
    module = construct(spec)
    fill(module, spec)
    return module


def fill(module: nn.Module, spec: Mapping[str, Any]) -> None:
    """Give ``module`` the plain attributes and the children in ``spec``."""
    for key, value in spec.get("attributes", {}).items():
        if key.startswith("_") or key not in vars(module):
            raise FormatError(f"{spec['class']} has no attribute {key!r}")
        setattr(module, key, decode(value))
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
        having, lacking = (GRAPH, TENSORS) if name in expected else (TENSORS, GRAPH)
        raise FormatError(f"the tensor {name!r} is in {having} but not in {lacking}")
    placed: dict[tuple[Any, ...], Tensor] = {}
    for name, record in records.items():
        source, kind, grad = record.get("same_as", name), record["kind"], record.get("requires_grad", False)
        tensor, shape, dtype = stored[source], record["shape"], decode(record["dtype"])
        if [*tensor.shape] != shape or tensor.dtype != dtype:
            there, here = f"{tensor.dtype} {[*tensor.shape]} in {TENSORS}", f"{dtype} {shape} in {GRAPH}"
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
        with naming(f"node {name!r} ({op} {target})"):
            args = tuple(decode(record["args"], nodes))
            kwargs = {_name(key): decode(value, nodes) for key, value in record["kwargs"].items()}
            nodes[name] = graph.create_node(op, _target(op, target, args, root), args, kwargs, name)
            if record.get("wrapped"):
                nodes[name].meta["is_wrapped"] = True
    graph.lint()
    for node in graph.find_nodes(op="get_attr"):
        found: Any = reduce(getattr, node.target.split("."), root)
        mode = all(user.target is getattr and user.args == (node, "training") for user in node.users)
        if isinstance(found, nn.Module) and not mode:  # a layer may tell the mode, and nothing else
            raise FormatError(f"node {node.name!r} reads a tensor, but {node.target!r} is a {type(found).__name__}")
    return graph


def _target(op: str, name: str, args: tuple[Any, ...], root: fx.GraphModule) -> Any:
    """The target of a node, if a graph may have it."""
    if op == "call_function":
        found = function(name)
        if found is getattr and args[1] not in ATTRIBUTES:
            raise FormatError(f"the attribute {args[1]!r} is not on the allow-list of attributes of tensors")
        return found
    if op == "call_method" and name not in methods():
        raise FormatError(f"the method {name!r} is not on the allow-list of tensor methods")
    if op == "placeholder":
        _name(name.lstrip("*"))
    elif op in ("call_module", "get_attr"):
        if not re.fullmatch(r"[\w .:/+-]+", name):
            raise FormatError(f"{name!r} is no path of a module or a tensor")
        found = reduce(getattr, name.split("."), root)
        fitting = nn.Module if op == "call_module" else (Tensor, nn.Module)
        if not isinstance(found, fitting) or type(found) is nn.Module:
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
def naming(where: str) -> Iterator[None]:
    """Say ``where`` in every error that a damaged file, or a value that cannot be stored, causes inside.

    Both may hold what stands in the file, of any length.
    """
    try:
        yield
    except FormatError as error:
        raise FormatError(f"{cut(where)}: {cut(str(error))}") from error
    except _FAULTS as error:
        raise FormatError(f"{cut(where)}: {cut(told(error))}") from error
