"""From a module to a graph: ``trace`` is the one way in, and everything it returns reproduces the module.

    nn.Module, example inputs  --front end-->  fx.GraphModule  --one run, compared with eager-->  Traced

The front end is symbolic tracing (`_symbolic`); another one only has to return a graph module and its notes.
Also here, because every pass runs networks: calling a module with other tensors, and leaving it as it was found.
"""

from __future__ import annotations

import ast
import copy
import inspect
import linecache
import operator
import os
import traceback
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from fxmerge.errors import InputError, TraceError
from fxmerge.ir import Traced


def trace(module: nn.Module, example_inputs: Any = None, *, check: bool = True) -> Traced:
    """Turn ``module`` into a graph that shares its parameters and computes the same function in eval mode.

    The module is left as found. Arguments of ``forward`` that the examples do not give take their defaults; given
    values without tensors (numbers, flags, None) become part of the graph, and the notes say so.

    Args:
        module: any module with finite, unquantised parameters on a real device.
        example_inputs: a tensor, a tuple (positional arguments) or a dict (keyword arguments); they are moved to
            the device of the parameters. None infers them, see ``infer_example_inputs``.
        check: compare the graph with one eager run on the example inputs, equal up to the rounding of the dtype.

    Raises:
        InputError: the parameters or the example inputs cannot be used.
        TraceError: the module cannot be traced, or its graph computes something else.
    """
    _require_usable(module)
    notes: tuple[str, ...] = ()
    if example_inputs is None:
        example_inputs, sentence = infer_example_inputs(module)
        notes = (sentence,)
    args, kwargs = to_device(as_call(example_inputs), next(module.parameters()).device)
    values: dict[str, Any] = {}
    _bind(module, args, kwargs, values.__setitem__)
    expected = _run_eager(module, args, kwargs) if check else None

    graph_module, found = _symbolic(module, args, kwargs)
    interpreter = _ShapeInterpreter(graph_module)
    try:
        with evaluating(module, graph_module):
            feeds = [_fresh(values[n.target]) for n in graph_module.graph.nodes if n.op == "placeholder"]
            output = interpreter.run(*feeds)
    except Exception as error:
        if not check:  # without the eager run nothing says that the inputs themselves fit
            raise _failed_on(module, args, kwargs, error) from error
        raise TraceError(f"the graph of {_name(module)} fails where the module runs: {_told(error)}") from error
    if check and (difference := _difference(expected, output)):
        raise TraceError(
            f"the graph of {_name(module)} does not reproduce the module: {difference}. Its forward does something "
            "that symbolic tracing does not see, such as changing a tensor in place through an alias, or keeping "
            "state between calls; write that part without it."
        )
    return Traced(graph_module, module, args, kwargs, interpreter.shapes, "symbolic", notes + found)


# Running a module, and leaving it as it was ------------------------------------------------------------------


@contextmanager
def preserved(*modules: nn.Module) -> Iterator[None]:
    """Restore on exit, also after an error, what running ``modules`` may change.

    That is, for every submodule: mode, hooks, which tensors it holds, plain attributes (such as caches) and the
    values of the buffers; and the state of torch's random generators. Values of parameters are not kept.
    """
    everything = _submodules(modules)
    attributes = [
        (m, dict(vars(m)), {k: copy.copy(v) for k, v in vars(m).items() if type(v) in _CONTAINERS}) for m in everything
    ]
    modes = [(m, m.training) for m in everything]
    buffers = {id(b): b for m in everything for b in m.buffers(recurse=False) if not b.is_meta}
    values = {key: b.detach().clone() for key, b in buffers.items()}
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            for m, before, contents in attributes:
                for name, content in contents.items():
                    _refill(before[name], content)
                for name in vars(m).keys() - before.keys():
                    del vars(m)[name]
                vars(m).update(before)
            for m, mode in modes:
                m.training = mode
            # Version counters would not do: batch_norm updates its running statistics without counting.
            for key, b in buffers.items():
                if not torch.equal(b, values[key]):
                    b.detach().copy_(values[key])


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """As ``preserved``, with every submodule in eval mode and under ``torch.no_grad``."""
    with preserved(*modules), torch.no_grad():
        # Not module.eval(): some networks override train() to fold weights in place, which nothing could undo.
        for m in _submodules(modules):
            m.training = False
        yield


def call(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], state: Mapping[str, Tensor] | None = None
) -> Any:
    """``module(*args, **kwargs)``, with the parameters and buffers named in ``state`` replaced by its tensors.

    A tied tensor is replaced in all its places, whichever of its names is given (a place's own name comes first).
    Names that the module does not have are ignored.
    """
    if state is None:
        return module(*args, **kwargs)
    aliases: dict[int, list[str]] = defaultdict(list)
    for name, tensor in chain(
        module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)
    ):
        aliases[id(tensor)].append(name)
    # One entry per place, not per name: a submodule with two names would be swapped twice and restored wrongly.
    complete: dict[str, Tensor] = {}
    for prefix, m in module.named_modules():
        for key, held in chain(m._parameters.items(), m._buffers.items()):
            place = f"{prefix}.{key}" if prefix else key
            given = next((n for n in (place, *aliases.get(id(held), ())) if n in state), None)
            if held is not None and given is not None:
                complete[place] = state[given]
    return torch.func.functional_call(module, complete, args, dict(kwargs), tie_weights=False)


def as_call(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``(args, kwargs)`` from a tensor, a tuple (positional arguments) or a mapping (keyword arguments)."""
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, tuple):
        return tuple(example_inputs), {}
    if isinstance(example_inputs, Mapping) and all(isinstance(key, str) for key in example_inputs):
        return (), dict(example_inputs)
    raise InputError(
        "example_inputs must be a tensor, a tuple of positional arguments or a dict of keyword arguments, not "
        f"{type(example_inputs).__name__}; an argument that is itself a list goes into a tuple: ([x, y],)"
    )


def to_device(obj: Any, device: torch.device | str | None, dtype: torch.dtype | None = None) -> Any:
    """``obj`` with every tensor in its nested tuples, lists and dicts moved; ``dtype`` is for floating ones only."""

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(device=device, dtype=dtype if dtype and leaf.is_floating_point() else leaf.dtype)

    return pytree.tree_map(move, obj)


_CONTAINERS = (dict, OrderedDict, defaultdict, list, set)


def _submodules(modules: tuple[nn.Module, ...]) -> list[nn.Module]:
    return list(dict.fromkeys(m for module in modules for m in module.modules()))


def _refill(live: Any, content: Any) -> None:
    """Make the container ``live`` hold exactly what its copy ``content`` does, untouched where it still does."""
    now, then = ([*c, *c.values()] if isinstance(c, dict) else [*c] for c in (live, content))
    if len(now) != len(then) or any(a is not b for a, b in zip(now, then, strict=True)):
        live.clear()
        (live.extend if isinstance(live, list) else live.update)(content)


def _fresh(obj: Any) -> Any:
    """A copy, since a network may write into its inputs."""
    return pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, obj)


def _run_eager(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    try:
        with evaluating(module):
            return call(module, _fresh(args), _fresh(kwargs))
    except Exception as error:
        raise _failed_on(module, args, kwargs, error) from error


def _failed_on(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], error: Exception) -> InputError:
    given = ", ".join([*map(_described, args), *(f"{k}={_described(v)}" for k, v in kwargs.items())])
    return InputError(
        f"{_name(module)} does not run on the example inputs ({given}): {_told(error)}. Give example_inputs as "
        "forward takes them: a tensor, a tuple of positional arguments or a dict of keyword arguments."
    )


def _name(module: nn.Module) -> str:
    return type(module).__name__


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".rstrip(". \n")


def _described(value: Any) -> str:
    def show(leaf: Any) -> Any:
        return f"{str(leaf.dtype).removeprefix('torch.')} {list(leaf.shape)}" if isinstance(leaf, Tensor) else leaf

    return str(pytree.tree_map(show, value))


# Symbolic tracing --------------------------------------------------------------------------------------------


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
        bound = _bind(self.root, self.args, self.kwargs, self.placeholder)
        return lambda: self.root.forward(*bound.args, **bound.kwargs), []

    def placeholder(self, name: str, value: Any) -> Any:
        """What ``forward`` sees of one argument: its own containers and constants, proxies for the tensors."""
        proxy = self.create_proxy("placeholder", name, (), {})

        def seen(part: Any, value: Any) -> Any:
            if isinstance(value, Tensor):
                return part
            if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)):
                self.notes[f"argument {name!r} is fixed in the graph where it is {value!r}"] = None
                return value
            if isinstance(value, dict):
                return {key: seen(part[key], v) for key, v in value.items()}
            parts = [seen(part[i], v) for i, v in enumerate(value)]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)

        return seen(proxy, value)

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


# What a tracer takes for constant, from the graph that follows its tensors most closely to the most permissive.
_ATTEMPTS: tuple[dict[str, bool], ...] = (
    {},
    {"sizes_constant": True},
    {"sizes_constant": True, "buffers_constant": True},
)

# Without users these change nothing; other nodes without users may write in place and must stay.
_QUERIES = {getattr, operator.getitem, *(getattr(operator, n) for n in ("eq", "ne", "lt", "le", "gt", "ge"))}


def _symbolic(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """The front end: the graph of ``module(*args, **kwargs)`` in eval mode, and notes for the report."""
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
            graph_module = fx.GraphModule(module, graph, _name(module))
        _arrange(graph_module, module)
        kept = {name for name, _ in graph_module.named_parameters(remove_duplicate=False)}
        unread = [name for name, _ in module.named_parameters() if name not in kept]
        if unread:
            tracer.notes[f"not read in eval mode, so not in the graph: {_few(unread)}"] = None
        return graph_module, tuple(tracer.notes)
    raise _untraceable(module, failure) from failure


def _arrange(graph_module: fx.GraphModule, source: nn.Module) -> None:
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


def _bind(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], visit: Callable[[str, Any], Any]
) -> inspect.BoundArguments:
    """The call bound to forward's signature, each argument replaced by ``visit(name, argument)``."""
    signature = inspect.signature(module.forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        given = f"the keys {list(kwargs)}" if kwargs else f"{len(args)} positional arguments"
        raise InputError(
            f"example_inputs has {given}, but forward of {_name(module)} takes {list(signature.parameters)}: {error}"
        ) from None
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            bound.arguments[name] = tuple(visit(f"{name}_{i}", v) for i, v in enumerate(value))
        elif kind is inspect.Parameter.VAR_KEYWORD:
            bound.arguments[name] = {key: visit(key, v) for key, v in value.items()}
        else:
            bound.arguments[name] = visit(name, value)
    return bound


def _is_assert(filename: str, line: int) -> bool:
    """Whether ``line`` is inside the test of an assert that truth of all its parts fulfils."""
    try:
        tree = ast.parse("".join(linecache.getlines(filename)))
    except SyntaxError:  # a notebook cell with magics, for example
        return False
    tests = [n.test for n in ast.walk(tree) if isinstance(n, ast.Assert)]
    inside = [t for t in tests if t.lineno <= line <= (t.end_lineno or t.lineno)]
    return any(not any(isinstance(part, ast.Not) for part in ast.walk(t)) for t in inside)


# What fx or Python says -> what the user's code does.
_REASONS = (
    ("inputs to control flow", "it branches (if, while, and, or, bool) on a value or a size that only a run would know"),
    ("cannot be iterated", "it loops over a traced tensor, or unpacks one with * or **"),
    ("'len' is not supported", "it takes len() of a traced tensor (x.shape[0] can be traced)"),
    ("dynamo-optimized", "it is compiled: give the module that torch.compile was given"),
    ("Proxy", "it needs a plain Python value (a number, a list index, ..) and gets a traced one"),
    ("", "symbolic tracing does not carry what it does"),
)
_INTERNAL = tuple(os.path.dirname(os.path.abspath(path)) + os.sep for path in (torch.__file__, __file__))


def _untraceable(module: nn.Module, error: Exception) -> TraceError:
    reason = next(text for pattern, text in _REASONS if pattern in str(error))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_INTERNAL)]
    if not frames:
        where = "inside torch; a layer of torch.nn is taken whole where another module holds it"
    else:
        where = f"at {frames[-1].filename}:{frames[-1].lineno}, in {frames[-1].name}:\n    {frames[-1].line}"
    return TraceError(
        f"fxmerge traces symbolically, and {_name(module)} stops that {where}\nThere {reason} "
        f"({_told(error).split('. ')[0]}).\nThe way out: put that line into a function and mark it with "
        "torch.fx.wrap, which makes it one operation of the graph, or write it without needing a traced value."
    )


# Example inputs, where nobody gave any -----------------------------------------------------------------------

_SIZES = (32, 8, 16, 28, 64, 96, 128, 224, 256, 299)
_KEEPING = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.ZeroPad2d)
_KEEPING_TARGETS = {operator.add, operator.sub, operator.mul, operator.truediv, "contiguous", "float", "to"}
_RESHAPING_TARGETS = {torch.flatten, torch.reshape, "flatten", "reshape", "view"}
_ATTRIBUTES = {"shape", "ndim", "dtype", "device"}


def infer_example_inputs(module: nn.Module) -> tuple[Tensor, str]:
    """Example inputs that leave no doubt, from the layers that read the input, and a sentence that says which.

    A Linear gives float [2, in_features], an Embedding int64 [2, 8], a convolution [2, in_channels, S, ..] where S is
    32 if the module runs on that and else the smallest of a list of usual sizes on which it runs.

    Raises:
        InputError: forward needs several arguments, or its input is read by something else, or no size runs.
    """
    remedy = f"give example_inputs= (a tensor, a tuple or a dict) to trace {_name(module)}"
    parameters = inspect.signature(module.forward).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)]
    required = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    if len(required) != 1 or required[0] != named[0].name:
        raise InputError(f"cannot infer inputs for forward({', '.join(required)}): {remedy}")
    graph_module, _ = _symbolic(module, (torch.empty(0),), {})
    source = next(node for node in graph_module.graph.nodes if node.op == "placeholder")
    readers = dict(_readers(graph_module, source))
    wanted = {_wanted(layer) for layer in readers.values()}
    if len(wanted) != 1 or None in wanted:
        raise InputError(f"cannot infer the input's shape from what reads it ({_few([*readers])}): {remedy}")
    name, layer = next(iter(readers.items()))
    (text, shapes, rows), weight = _wanted(layer) or ("", (), 0), layer.weight
    for shape in shapes:
        generator = torch.Generator().manual_seed(0)  # a private one: the global state is the user's
        if rows:
            example = torch.randint(rows, shape, generator=generator).to(weight.device)
        else:
            example = torch.randn(shape, generator=generator).to(weight)
        try:
            _run_eager(module, (example,), {})
        except InputError:
            continue
        sentence = f"example inputs inferred from {name!r} ({_name(layer)} with {text}): {_described(example)}"
        return example, sentence
    raise InputError(f"none of the usual input sizes runs behind {name!r} ({_name(layer)} with {text}): {remedy}")


def _readers(graph_module: fx.GraphModule, node: fx.Node, reshaped: bool = False) -> Iterator[tuple[str, Any]]:
    """The layers that read ``node`` as it is, by name; a reader that leaves doubt comes without its layer."""
    for user in node.users:
        layer = graph_module.get_submodule(str(user.target)) if user.op == "call_module" else None
        if isinstance(layer, _KEEPING) or (user.target in _KEEPING_TARGETS and user.all_input_nodes == [node]):
            yield from _readers(graph_module, user, reshaped)
        elif isinstance(layer, nn.Flatten) or user.target in _RESHAPING_TARGETS:
            yield from _readers(graph_module, user, True)
        elif not (user.target in ("size", "dim") or (user.target is getattr and user.args[1] in _ATTRIBUTES)):
            # Only a Linear reads [2, n] whatever the reshape before it made of larger inputs.
            yield str(user.target), layer if isinstance(layer, nn.Linear) or not reshaped else None


def _wanted(layer: nn.Module | None) -> tuple[str, tuple[tuple[int, ...], ...], int] | None:
    """What a first layer reads: in words, the shapes to try, and the number of rows if it reads indices."""
    if isinstance(layer, nn.Linear):
        return f"{layer.in_features} input features", ((2, layer.in_features),), 0
    if isinstance(layer, nn.Embedding):
        return f"{layer.num_embeddings} rows", ((2, 8),), layer.num_embeddings
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        axes = layer.weight.ndim - 2
        sizes = [s for s in _SIZES if s**axes <= 2**21]  # a 3-D input of 224 would not be worth its memory
        return f"{layer.in_channels} input channels", tuple((2, layer.in_channels, *[s] * axes) for s in sizes), 0
    return None


# Comparing with eager ----------------------------------------------------------------------------------------


class _ShapeInterpreter(fx.Interpreter):
    """Runs a graph and notes the shape of every node that gives one tensor."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.extra_traceback = False  # messages as the operations give them
        self.shapes: dict[str, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.shapes[n.name] = tuple(result.shape)
        return result


def _leaves(output: Any, path: str = "output") -> list[tuple[str, Any]]:
    if is_dataclass(output) and not isinstance(output, type):
        output = {f.name: getattr(output, f.name) for f in fields(output)}
    if isinstance(output, Mapping):
        parts = list(output.items())
    elif isinstance(output, (tuple, list)):
        parts = list(enumerate(output))
    else:
        return [(path, output)]
    return [leaf for key, value in parts for leaf in _leaves(value, f"{path}[{key!r}]")]


def _difference(expected: Any, actual: Any) -> str | None:
    """Where two nested outputs differ by more than rounding, in words; None where they agree."""
    wanted, found = _leaves(expected), _leaves(actual)
    if [path for path, _ in wanted] != [path for path, _ in found]:
        return f"it returns {_few([p for p, _ in found])} instead of {_few([p for p, _ in wanted])}"
    for (path, a), (_, b) in zip(wanted, found, strict=True):
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            if type(a) is not type(b) or a != b:
                return f"{path} is {b!r} instead of {a!r}"
        elif a.shape != b.shape or a.dtype != b.dtype:
            return f"{path} is {_described(b)} instead of {_described(a)}"
        elif not torch.equal(a, b):
            inexact = a.is_floating_point() or a.is_complex()
            finite = a[a.isfinite()].abs()
            tolerance = 64 * torch.finfo(a.dtype).eps * float(finite.max()) if inexact and finite.numel() else 0.0
            if not torch.allclose(a, b, rtol=0, atol=tolerance, equal_nan=True):
                return f"{path} differs by up to {float((a - b).abs().nan_to_num().max()):.3g}"
    return None


# What cannot be merged ---------------------------------------------------------------------------------------


def _require_usable(module: nn.Module) -> None:
    if not isinstance(module, nn.Module):
        raise InputError(f"expected an nn.Module, got {type(module).__name__}")
    tensors = [*module.named_parameters(), *module.named_buffers()]
    if lazy := [name for name, tensor in tensors if is_lazy(tensor)]:
        raise InputError(f"{_few(lazy)} of {_name(module)} are not initialised yet; run the module once")
    packed = [name for name, value in module.state_dict().items() if _is_packed(value)]
    packed += [name for name, parameter in module.named_parameters() if parameter.itemsize == 1]  # int8, float8, ..
    if packed:
        raise InputError(
            f"{_few(packed)} of {_name(module)} are quantised or packed; merge the floating-point networks and "
            "quantise the result"
        )
    if not any(True for _ in module.parameters()):
        raise InputError(f"{_name(module)} has no parameters, so there is nothing to merge")
    if meta := [name for name, tensor in tensors if tensor.is_meta]:
        raise InputError(f"{_few(meta)} of {_name(module)} are on the meta device; load the weights first")
    for name, tensor in tensors:
        if bad := _non_finite(tensor.detach()):
            raise InputError(f"{name!r} of {_name(module)} holds {bad} NaN or infinite values of {tensor.numel()}")


def _is_packed(value: Any) -> bool:
    return any(
        isinstance(leaf, torch.ScriptObject) or (isinstance(leaf, Tensor) and leaf.is_quantized)
        for leaf in pytree.tree_leaves(value)
    )


def _non_finite(tensor: Tensor) -> int:
    if tensor.numel() == 0 or not (tensor.is_floating_point() or tensor.is_complex()):
        return 0
    parts = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    if torch.stack(parts.aminmax()).isfinite().all():  # one pass and no temporary: NaN goes through aminmax
        return 0
    mask = ((tensor == 0) | (tensor == -torch.inf)).all() and not isinstance(tensor, nn.Parameter)
    return 0 if mask else int((~tensor.isfinite()).sum())  # only 0 and -inf: an attention mask


def _few(names: list[str], shown: int = 3) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(map(repr, names[:shown])) + more
