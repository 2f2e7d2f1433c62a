"""The first front end: symbolic tracing by ``torch.fx``, for one call, in eval mode.

    nn.Module, args, kwargs  --symbolic-->  fx.GraphModule, notes for the report

Batch size and loops over sizes stay symbolic; what Python must know of a value cannot be traced, see ``record``.
"""

from __future__ import annotations

import ast
import inspect
import linecache
import operator
import os
import traceback
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxmerge.errors import TraceError, few, told
from fxmerge.running import bind_forward, dropped, evaluating
from fxmerge.stored import stays_on_disk

# What a tracer takes for constant, from the graph that follows its tensors most closely to the most permissive.
_ATTEMPTS: tuple[dict[str, bool], ...] = (
    {},
    {"sizes_constant": True},
    {"sizes_constant": True, "buffers_constant": True},
)

# Without users these change nothing; other nodes without users may write in place and must stay.
_QUERIES = {getattr, operator.getitem, *(getattr(operator, n) for n in ("eq", "ne", "lt", "le", "gt", "ge"))}


def symbolic(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """The front end: the graph of ``module(*args, **kwargs)`` in eval mode, and notes for the report."""
    graph_module, notes = _traced(module, args, kwargs)
    missing = unread(graph_module, module)
    if missing and not stays_on_disk(module):  # the network may have kept what it computed from these
        with suppress(TraceError), evaluating(module), dropped(module):
            again, other = _traced(module, args, kwargs)
            if len(left := unread(again, module)) < len(missing):
                graph_module, notes, missing = again, other, left
    if missing:
        notes = (*notes, f"not read in eval mode, so not in the graph: {few(missing)}")
    return graph_module, notes


def _traced(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[fx.GraphModule, tuple[str, ...]]:
    for attempt in _ATTEMPTS:
        tracer = _Tracer(args, kwargs, **attempt)
        with evaluating(module):
            try:
                graph = tracer.trace(module)
            except Exception as error:
                failure = error
                continue
            for node in reversed(graph.nodes):
                if not node.users and (node.op == "get_attr" or node.target in _QUERIES):
                    graph.erase_node(node)
            # Inside, because constants met on the way are attributes of the module until it is restored.
            graph_module = fx.GraphModule(module, graph, type(module).__name__)
        arrange(graph_module, module)
        return graph_module, tuple(tracer.notes)
    raise _untraceable(failure) from failure


def unread(graph_module: fx.GraphModule, source: nn.Module) -> list[str]:
    """Names of the parameters that the graph does not use, under that name or another."""
    kept = {id(parameter) for parameter in graph_module.parameters()}
    return [name for name, parameter in source.named_parameters() if id(parameter) not in kept]


def arrange(graph_module: fx.GraphModule, source: nn.Module) -> None:
    """Give the containers that fx made the order, mode and persistence of their originals.

    Order decides which name of a tied parameter comes first; constants must not enter the state_dict.
    """
    for name, container in graph_module.named_modules():
        original = source.get_submodule(name)
        if container is original:
            continue
        container.training = original.training
        for kind in ("_parameters", "_buffers", "_modules"):
            held = getattr(container, kind)
            for key in getattr(original, kind):
                if key in held:
                    held[key] = held.pop(key)
        container._non_persistent_buffers_set.update(
            key
            for key in container._buffers
            if key not in original._buffers or key in original._non_persistent_buffers_set
        )


class _Proxy(fx.Proxy):
    """A proxy that also records item assignment, ``x[index] = value``."""

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


class _TensorProxy(_Proxy):
    """A parameter or buffer whose sizes are plain integers, so that Python may branch on them."""

    def __init__(self, node: fx.Node, tracer: fx.Tracer, tensor: Tensor) -> None:
        super().__init__(node, tracer)
        self.shape, self.ndim = tensor.shape, tensor.ndim
        self.size, self.dim, self.numel = tensor.size, tensor.dim, tensor.numel

    def __len__(self) -> int:
        return self.shape[0]


class _Tracer(fx.Tracer):
    """``fx.Tracer`` for one call: placeholders are what ``args`` and ``kwargs`` give, all else takes its default.

    Without a call it behaves as ``fx.Tracer``, which is how fx unpickles a graph module.
    """

    def __init__(
        self,
        args: tuple[Any, ...] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        sizes_constant: bool = False,
        buffers_constant: bool = False,
    ) -> None:
        super().__init__()
        self.args, self.kwargs = args, kwargs or {}
        self.sizes_constant, self.buffers_constant = sizes_constant, buffers_constant
        self.notes: dict[str, None] = {}  # an ordered set

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        named = chain(self.root.named_parameters(), () if self.buffers_constant else self.root.named_buffers())
        self.names = {id(tensor): name for name, tensor in named}
        self.proxies: dict[str, fx.Proxy] = {}
        if self.args is None:
            return super().create_args_for_root(root_fn, is_module, concrete_args)
        call = bind_forward(self.root, self.args, self.kwargs)
        for name, value in call.arguments.items():
            kind = call.signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                call.arguments[name] = tuple(self.placeholder(f"{name}_{i}", v) for i, v in enumerate(value))
            elif kind is inspect.Parameter.VAR_KEYWORD:
                call.arguments[name] = {key: self.placeholder(key, v) for key, v in value.items()}
            else:
                call.arguments[name] = self.placeholder(name, value)
        return lambda: self.root.forward(*call.args, **call.kwargs), []

    def placeholder(self, name: str, value: Any) -> Any:
        """What ``forward`` sees of one argument: its own containers and constants, proxies for the tensors."""
        return self._seen(name, self.create_proxy("placeholder", name, (), {}), value)

    def _seen(self, name: str, part: Any, value: Any) -> Any:
        if isinstance(value, Tensor):
            return part
        if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)):
            self.notes[f"argument {name!r} is fixed in the graph where it is {value!r}"] = None
            return value
        if isinstance(value, dict):
            return {key: self._seen(name, part[key], v) for key, v in value.items()}
        parts = [self._seen(name, part[i], v) for i, v in enumerate(value)]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Reading a parameter or a buffer becomes one ``get_attr`` node under its first name."""
        name = self.names.get(id(attr_val)) if isinstance(attr_val, Tensor) else None
        if name is None:
            return attr_val
        if name not in self.proxies:
            node = self.create_node("get_attr", name, (), {})
            self.proxies[name] = _TensorProxy(node, self, attr_val) if self.sizes_constant else _Proxy(node, self)
        return self.proxies[name]

    def to_bool(self, obj: fx.Proxy) -> bool:
        frame = inspect.currentframe()
        caller = frame and frame.f_back and frame.f_back.f_back  # past Proxy.__bool__
        if caller and _is_assert(caller.f_code.co_filename, caller.f_lineno):
            self.notes["asserts on traced values are left out of the graph"] = None
            return True
        return super().to_bool(obj)


def _is_assert(filename: str, line: int) -> bool:
    """Whether ``line`` is inside the test of an assert that truth of all its parts fulfils."""
    inside = [
        t for t in _asserted(tuple(linecache.getlines(filename))) if t.lineno <= line <= (t.end_lineno or t.lineno)
    ]
    return any(not any(isinstance(part, ast.Not) for part in ast.walk(t)) for t in inside)


@lru_cache(maxsize=8)
def _asserted(source: tuple[str, ...]) -> list[ast.expr]:
    """The tests of all asserts in a file."""
    try:
        tree = ast.parse("".join(source))
    except SyntaxError:  # a notebook cell with magics, for example
        return []
    return [n.test for n in ast.walk(tree) if isinstance(n, ast.Assert)]


# What fx or Python says -> what the user's code does.
_REASONS = (
    ("inputs to control flow", "it branches (if, while, and, or, bool) on a value or a size that only a run knows"),
    ("cannot be iterated", "it loops over a traced tensor, or unpacks one with * or **"),
    ("'len' is not supported", "it takes len() of a traced tensor (x.shape[0] can be traced)"),
    ("dynamo-optimized", "it is compiled: give the module that torch.compile was given"),
    ("Proxy", "it needs a plain Python value (a number, a list index, ..) and gets a traced one"),
    ("", "symbolic tracing does not carry what it does"),
)
_INTERNAL = tuple(os.path.dirname(os.path.abspath(path)) + os.sep for path in (torch.__file__, __file__))


def user_line(error: Exception) -> str:
    """Where in the user's code an error arose, to stand after a verb."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_INTERNAL)]
    if not frames:
        return " inside torch"
    return f" at {frames[-1].filename}:{frames[-1].lineno}, in {frames[-1].name} ({frames[-1].line})"


def _untraceable(error: Exception) -> TraceError:
    reason = next(text for pattern, text in _REASONS if pattern in str(error))
    return TraceError(f"stops{user_line(error)}: there {reason} ({told(error).split('. ')[0]})")
