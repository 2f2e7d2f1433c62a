"""One eager run of a module, written down as a graph.

Every torch function and every call of a layer that symbolic tracing would take whole becomes a node, whatever the
Python around it does. Python itself is not seen: its branches and numbers are what they were in that run.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from fxmerge.batch import Input, Recording
from fxmerge.errors import TraceError
from fxmerge.ir import VALUES_DECIDE
from fxmerge.running import bind_forward, plain, preserved
from fxmerge.symbolic import arrange

# Where a tensor becomes something of Python, on which a branch may depend.
_READS = frozenset(
    "__bool__ __contains__ __complex__ __float__ __format__ __index__ __int__ __array__ allclose equal is_nonzero item "
    "numpy tolist".split()
)
# What has as many entries as values say.
_SELECTS = frozenset("argwhere masked_select nms nonzero unique unique_consecutive".split())
_PLAIN = (
    bool, int, float, complex, str, type(None), type(...), range,
    torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip


@dataclass
class Flag:
    """An argument by which a function is told the mode: "training", or a "dropout_p" that is 0 in eval mode."""

    node: fx.Node
    place: int | str

    @property
    def value(self) -> Any:
        return self.node.args[self.place] if isinstance(self.place, int) else self.node.kwargs[self.place]

    def replace(self, value: Any) -> None:
        if isinstance(self.place, int):
            self.node.update_arg(self.place, value)
        else:
            self.node.update_kwarg(self.place, value)


def _mode_place(node: fx.Node) -> int | str | None:
    """Where a call is told the mode; None if it is not."""
    given = next((key for key in ("training", "dropout_p") if key in node.kwargs), None)
    place = _training_place(node.target) if given is None and node.op == "call_function" else None
    return place if place is not None and place < len(node.args) else given


@cache
def _training_place(function: Any) -> int | None:
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # built in
        return None
    return names.index("training") if "training" in names else None


_TRACER = fx.Tracer()


class _Opaque(Exception):
    """A value that no node can hold."""


class Recorder(TorchFunctionMode):
    """One run of ``root``; afterwards ``graph`` has it.

    Attributes:
        shapes: name of a node that gave one tensor -> its shape.
        selects: whether values of tensors say how many there are of something, or are read.
        notes: for the report.
        constants: name -> tensor, for those that come from nowhere in the module.
        inputs: every tensor among the inputs.
        flags: (path of the module, function, count) -> what told the function the mode.
    """

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.root = root
        self.graph = fx.Graph()
        self.notes: dict[str, None] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.selects = False
        self.constants: dict[str, Tensor] = {}
        self.flags: dict[tuple[str, str, int], Flag] = {}
        self.inputs: list[Input] = []
        self._first: Tensor | None = None  # of them
        self._device: fx.Node | None = None  # where the inputs are
        # id -> the tensor, kept alive so that ids stay unique; the node that has it, and where in its value.
        self._places: dict[int, tuple[Tensor, fx.Node, tuple[Any, ...]]] = {}
        self._names: dict[int, str] = {}
        self._paths = {id(m): path for path, m in root.named_modules()}
        self._varying: set[fx.Node] = set()  # what depends on inputs or parameters
        self._writing: set[fx.Node] = set()  # what changes its arguments
        self._versions: dict[fx.Node, tuple[Tensor, int]] = {}  # of constants
        self._stack: list[str] = []
        self._busy = False
        attributes = (
            (f"{path}.{key}".lstrip("."), value)
            for path, m in root.named_modules()
            for key, value in vars(m).items()
            if isinstance(value, Tensor) and not value.requires_grad
        )
        for name, tensor in chain(root.named_parameters(), root.named_buffers(), attributes):
            self._names.setdefault(id(tensor), name)

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        bound = bind_forward(self.root, args, kwargs)
        for name, value in bound.arguments.items():
            kind = bound.signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                for i, v in enumerate(value):
                    self._placeholder(f"{name}_{i}", v)
            elif kind is inspect.Parameter.VAR_KEYWORD:
                for key, v in value.items():
                    self._placeholder(key, v)
            else:
                self._placeholder(name, value)
        with self._catching_calls(), self:
            output = self.root(*args, **kwargs)
        lost: list[str] = []
        self.graph.output(self._argument(plain(output, lost)))
        self.notes.update({f"{place} is left out of the graph (None)": None for place in lost})
        self._separate_constants()
        self._sweep()

    def built(self, module: nn.Module) -> fx.GraphModule:
        """The graph as a module that shares the tensors of ``module``."""
        with preserved(module):
            for name, value in self.constants.items():
                setattr(module, name, value)
            graph_module = fx.GraphModule(module, self.graph, type(module).__name__)
        arrange(graph_module, module)
        return graph_module

    @property
    def recording(self) -> Recording:
        return Recording(self.graph, self.shapes, self.inputs[0] if self.inputs else None)

    def unread(self) -> int:
        """How many parameters of the module the graph does not use."""
        targets = {op: {node.target for node in self.graph.find_nodes(op=op)} for op in ("get_attr", "call_module")}
        inside = {id(p) for path in targets["call_module"] for p in self.root.get_submodule(path).parameters()}
        return sum(
            id(p) not in inside and self._names[id(p)] not in targets["get_attr"] for p in self.root.parameters()
        )

    # -- inputs, and where tensors come from ---------------------------------------------------------------------

    def _placeholder(self, name: str, value: Any) -> None:
        node = self.graph.placeholder(name)
        self._varying.add(node)
        tensors = list(_tensors(value))
        if not tensors:
            self.notes[f"argument {name!r} is fixed in the graph where it is {value!r}"] = None
        for path, tensor in tensors:
            self._places[id(tensor)] = (tensor, node, path)
            self._first = tensor if self._first is None else self._first
            self.inputs.append(Input(node, path, tuple(tensor.shape)))

    def _node(self, tensor: Tensor) -> fx.Node:
        """The node whose value ``tensor`` is."""
        if id(tensor) not in self._places:
            self._places[id(tensor)] = (tensor, self._outside(tensor), ())
        _, node, path = self._places[id(tensor)]
        for key in path:
            whole, node = node, self.graph.call_function(operator.getitem, (node, key))
            if whole in self._varying:
                self._varying.add(node)
        self._places[id(tensor)] = (tensor, node, ())
        self.shapes[node.name] = tuple(tensor.shape)
        return node

    def _outside(self, tensor: Tensor) -> fx.Node:
        """A tensor that was there before the run, or that no torch function made."""
        name = self._names.get(id(tensor))
        if name is not None:
            node = self.graph.create_node("get_attr", name)
            if isinstance(tensor, nn.Parameter):
                self._varying.add(node)
            return node
        if tensor.requires_grad:
            raise TraceError(
                f"meets a trained tensor of shape {list(tensor.shape)} that is no parameter of the network, or was "
                "computed from its parameters in an earlier run; register it, or clear what the network keeps"
            )
        name = f"_tensor_constant{len(self.constants)}"
        while hasattr(self.root, name):
            name = f"_{name}"
        self.constants[name] = tensor.detach().clone()
        node = self.graph.create_node("get_attr", name)
        self._versions[node] = (tensor, tensor._version)
        return node

    def _argument(self, value: Any) -> Any:
        """``value`` with nodes in the place of tensors."""
        if isinstance(value, Tensor):
            return self._node(value)
        if isinstance(value, dict):
            return {key: self._argument(v) for key, v in value.items()}
        if isinstance(value, slice):
            return slice(*(self._argument(v) for v in (value.start, value.stop, value.step)))
        if isinstance(value, (tuple, list)):
            parts = [self._argument(v) for v in value]
            if hasattr(value, "_fields"):  # its constructor may look at what it is given
                return self._write("call_function", type(value), tuple(parts), {}, False)
            return parts if isinstance(value, list) else tuple(parts)
        if isinstance(value, torch.device) and self._first is not None and value == self._first.device:
            if self._device is None:
                self._device = self.graph.call_function(getattr, (self._node(self._first), "device"))
            return self._device
        if type(value) in _PLAIN:
            return value
        kind: Any
        for kind in (int, float, complex, str):  # of NumPy, or of an enumeration
            if isinstance(value, kind):
                return kind(value)
        if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
            return value.item()
        raise _Opaque(type(value).__name__)

    # -- calls ---------------------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__iter__":
            return iter(self.__torch_function__(Tensor.unbind, types, args))
        if name in _SELECTS or (name == "where" and len(args) == 1) or _is_masked(name, args):
            self.selects = True
        if name in _READS and any(self._node(t) in self._varying for _, t in _tensors((args, kwargs))):
            self.selects = True
            self.notes[VALUES_DECIDE] = None
        if name == "__set__" and func.__self__.__name__ == "data":
            raise TraceError("meets an assignment to .data, which no graph can do")
        versions = [(t, t._version) for _, t in _tensors((args, kwargs))]
        operands = None
        try:
            operands = self._argument(args), self._argument(kwargs)
        except _Opaque as error:
            opaque = str(error)
        result = func(*args, **kwargs)
        written = any(t._version != version for t, version in versions)
        if not written and not any(True for _ in _tensors(result)):
            return result  # sizes, types, flags
        if operands is None:
            if written or any(self._node(t) in self._varying for t, _ in versions):
                raise TraceError(f"meets {name} of a {opaque}, which no graph can hold")
            return result  # a constant, where it is used
        node = self._write(*_spelled(func, operands[0]), operands[1], written)
        result = self._place(node, result, [t for t, _ in versions], written)
        if (place := _mode_place(node)) is not None:
            path, count = self._stack[-1], sum(key[:2] == (self._stack[-1], name) for key in self.flags)
            self.flags[path, name, count] = Flag(node, place)
        return result

    def _called(self, original: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        path = self._paths.get(id(module))
        if self._busy or path is None:
            return original(module, *args, **kwargs)
        if not path or not _is_leaf(module, (*args, *kwargs.values())):
            self._stack.append(path)
            try:
                return original(module, *args, **kwargs)
            finally:
                self._stack.pop()
        self._busy = True
        try:
            with torch._C.DisableTorchFunction():
                operands = self._argument(args), self._argument(kwargs)
                versions = [(t, t._version) for _, t in _tensors((args, kwargs))]
                result = original(module, *args, **kwargs)
                written = any(t._version != version for t, version in versions)
                node = self._write("call_module", path, *operands, written)
                self._varying.add(node)
                return self._place(node, result, [t for t, _ in versions], written)
        except _Opaque as error:
            raise TraceError(f"meets the layer {path!r} given a {error}, which no graph can hold") from None
        finally:
            self._busy = False

    def _write(self, op: str, target: Any, args: Any, kwargs: Any, written: bool) -> fx.Node:
        node = self.graph.create_node(op, target, args, kwargs)
        if any(n in self._varying for n in node.all_input_nodes):
            self._varying.add(node)
        if written:
            self._writing.add(node)
        return node

    def _place(self, node: fx.Node, result: Any, given: list[Tensor], written: bool) -> Any:
        """Notes where the tensors of a result are. What is handed back as it came gets an identity of its own.

        Else dropout in eval mode, for example, could not be told from its input.
        """
        known = {id(t) for t in given}
        if isinstance(result, Tensor) and id(result) in known and not written:
            result = result.detach()
        for path, tensor in _tensors(result):
            self._places[id(tensor)] = (tensor, node, path)
        return result

    @contextmanager
    def _catching_calls(self) -> Iterator[None]:
        original = nn.Module.__call__

        def catching(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self._called(original, module, args, kwargs)

        nn.Module.__call__ = catching  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.__call__ = original  # type: ignore[method-assign]

    # -- afterwards ----------------------------------------------------------------------------------------------

    def _separate_constants(self) -> None:
        """Constants that the run wrote into are copied first, in every run of the graph."""
        for node, (tensor, version) in self._versions.items():
            if tensor._version != version:
                with self.graph.inserting_after(node):
                    copied = self.graph.call_method("clone", (node,))
                node.replace_all_uses_with(copied)
                copied.args = (node,)

    def _sweep(self) -> None:
        """Removes what nothing reads and what writes nothing."""
        for node in reversed(self.graph.nodes):
            if not node.users and node.op not in ("placeholder", "output") and node not in self._writing:
                self.graph.erase_node(node)
        kept = {node.target for node in self.graph.find_nodes(op="get_attr")}
        self.constants = {name: value for name, value in self.constants.items() if name in kept}


def _is_masked(name: str, args: Any) -> bool:
    return name == "__getitem__" and any(t.dtype == torch.bool for _, t in _tensors(args[1:]))


def _tensors(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """Where in nested tuples, lists and dicts tensors are."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _tensors(part, (*path, key))
    elif isinstance(value, (tuple, list)):
        for i, part in enumerate(value):
            yield from _tensors(part, (*path, i))


def _spelled(function: Any, args: tuple[Any, ...]) -> tuple[str, Any, tuple[Any, ...]]:
    """A call of a torch function as fx writes it: the kind of node, its target, its arguments."""
    if getattr(function, "__name__", "") == "__get__":
        return "call_function", getattr, (args[0], function.__self__.__name__)
    name = _methods().get(function)
    if name is None:
        return "call_function", function, args
    if name.startswith("__") and hasattr(operator, name):
        return "call_function", getattr(operator, name.strip("_"), getattr(operator, name)), args
    return "call_method", name, args


@cache
def _methods() -> dict[Any, str]:
    """Method of tensors -> its name; a plain name where there are several."""
    named = sorted(dir(Tensor), key=lambda name: name.startswith("_"), reverse=True)
    found = ((getattr(Tensor, name), name) for name in named if name != "__hash__")
    return {method: name for method, name in found if callable(method) and not isinstance(method, type)}


def _is_leaf(module: nn.Module, given: tuple[Any, ...]) -> bool:
    """What symbolic tracing takes whole, and of torchvision's layers those without parts, from tensors to tensors."""
    if type(module).__module__.startswith("torchvision.ops."):
        return not module._modules and all(isinstance(value, Tensor) for value in given)
    return _TRACER.is_leaf_module(module, "")
