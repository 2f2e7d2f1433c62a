"""Running networks with other inputs and other tensors, and leaving them as they were found."""

from __future__ import annotations

import inspect
import operator
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fxmerge.errors import FxMergeError, InputError, few, told
from fxmerge.stored import GEOMETRY

_CONTAINERS = frozenset({dict, OrderedDict, defaultdict, list, set})


@contextmanager
def preserved(*modules: nn.Module) -> Iterator[None]:
    """Restore on exit, also after an error, what running ``modules`` may change.

    That is, for every submodule: mode, hooks, which tensors it holds, plain attributes (such as caches) and the
    values of the buffers; and the state of torch's random generators. Values of parameters are not kept.
    """
    everything = _submodules(modules)
    modes = [m.training for m in everything]
    attributes = [(vars(m), dict(vars(m))) for m in everything]
    containers = [v for _, before in attributes for v in before.values() if type(v) in _CONTAINERS]
    # Nearly all are tables of hooks without an entry, a dozen a module; copies of those would cost the most here.
    contents = [c.copy() if c else () for c in containers]
    held = (b for m in everything for b in m._buffers.values())
    buffers = {id(b): b for b in held if b is not None and not (is_lazy(b) or b.is_meta)}
    values = [b.detach().clone() for b in buffers.values()]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            for container, content in zip(containers, contents, strict=True):
                if container or content:
                    _refill(container, content)
            for live, before in attributes:
                for name in live.keys() - before.keys():
                    del live[name]
                live.update(before)
            _set_modes(everything, modes)
            # Version counters would not do: batch_norm updates its running statistics without counting.
            for b, value in zip(buffers.values(), values, strict=True):
                if not torch.equal(b, value):
                    b.detach().copy_(value)


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """As ``preserved``, with every submodule in eval mode and under ``torch.no_grad``."""
    with preserved(*modules), torch.no_grad(), _scattered():
        # Not module.eval(): some networks override train() to fold weights in place, which nothing could undo.
        everything = _submodules(modules)
        _set_modes(everything, [False] * len(everything))
        yield


@contextmanager
def _scattered() -> Iterator[None]:
    """Weights that stand in for a recurrent layer's own during one run may lie anywhere: CUDA need not warn of that."""
    if not torch.cuda.is_initialized():
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous chunk")
        yield


def forget(module: nn.Module) -> None:
    """Drops what a network keeps of earlier runs (biases of attention, unfolded), as it does when told to train."""
    everything = _submodules((module,))
    modes = [m.training for m in everything]
    module.train()
    _set_modes(everything, modes)


@contextmanager
def dropped(module: nn.Module) -> Iterator[None]:
    """Without what ``module`` keeps of earlier runs. Some fold parameters when told to train: these come back."""
    values = [p.detach().clone() for p in module.parameters()]
    try:
        forget(module)
        yield
    finally:
        for p, value in zip(module.parameters(), values, strict=True):
            p.detach().copy_(value)


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


def device_of(module: nn.Module) -> torch.device:
    """Where the module's first parameter is; the CPU where it has none."""
    return next(module.parameters(), torch.zeros(())).device


def run_eager(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The output of ``module`` in eval mode, left as found.

    Raises:
        InputError: it does not run on these arguments.
    """
    try:
        with evaluating(module):
            return call(module, fresh(args), fresh(kwargs))
    except Exception as error:
        raise failed_on(module, args, kwargs, error) from error


def failed_on(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], error: Exception) -> InputError:
    """What to raise where ``error`` came of running ``module`` on these arguments."""
    given = ", ".join([*map(described, args), *(f"{k}={described(v)}" for k, v in kwargs.items())])
    return InputError(
        f"{type(module).__name__} does not run on the example inputs ({given}): {told(error)}. Give example_inputs as "
        "forward takes them: a tensor, a tuple of positional arguments or a dict of keyword arguments."
    )


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


def fresh(obj: Any) -> Any:
    """A copy, since a network may write into its inputs."""
    return pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, obj)


def bind(graph: fx.Graph, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Values of a graph's placeholders, in their order, for the call ``module(*args, **kwargs)``."""
    positional, values = list(args), []
    for node in graph.find_nodes(op="placeholder"):
        if node.target in kwargs:
            values.append(kwargs[node.target])
        elif positional:
            values.append(positional.pop(0))
        elif node.args:
            values.append(node.args[0])
        else:
            raise InputError(f"no value for the network's input '{node.target}'; an input_fn(batch) can supply it")
    return values


def bind_forward(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
    """The call bound to the signature of forward; an InputError says what does not fit."""
    signature = inspect.signature(module.forward)
    try:
        return signature.bind(*args, **kwargs)
    except TypeError as error:
        given = f"the keys {list(kwargs)}" if kwargs else f"{len(args)} positional arguments"
        takes = f"forward of {type(module).__name__} takes {list(signature.parameters)}"
        raise InputError(f"example_inputs has {given}, but {takes}: {error}") from None


def described(value: Any) -> str:
    """A value for an error message: dtype and shape instead of a tensor's entries."""

    def show(leaf: Any) -> Any:
        return f"{str(leaf.dtype).removeprefix('torch.')} {list(leaf.shape)}" if isinstance(leaf, Tensor) else leaf

    return str(pytree.tree_map(show, value))


def _submodules(modules: tuple[nn.Module, ...]) -> list[nn.Module]:
    return list(dict.fromkeys(m for module in modules for m in module.modules()))


def _set_modes(modules: Sequence[nn.Module], modes: Sequence[bool]) -> None:
    for m, mode in zip(modules, modes, strict=True):
        if m.training is not mode:  # setting an attribute of a module is slow
            m.training = mode


def _refill(live: Any, content: Any) -> None:
    """Make the container ``live`` hold exactly what its copy ``content`` does, untouched where it still does."""
    same = len(live) == len(content) and all(map(operator.is_, live, content))
    if same and isinstance(live, dict):
        same = all(map(operator.is_, live.values(), content.values()))
    if not same:
        live.clear()
        (live.extend if isinstance(live, list) else live.update)(content)


def plain(output: Any, lost: list[str] | None = None, place: str = "output") -> Any:
    """A nested output of dicts, lists, tuples, tensors and constants alone: dataclasses are dicts of their fields.

    Other objects become None; ``lost`` is told where.
    """
    if is_dataclass(output) and not isinstance(output, type):
        output = {f.name: getattr(output, f.name) for f in fields(output)}
    if isinstance(output, Mapping):
        return {key: plain(value, lost, f"{place}[{key!r}]") for key, value in output.items()}
    if isinstance(output, (tuple, list)):
        parts = [plain(value, lost, f"{place}[{i}]") for i, value in enumerate(output)]
        if hasattr(output, "_fields"):
            return type(output)(*parts)
        return parts if isinstance(output, list) else tuple(parts)
    if isinstance(output, (Tensor, bool, int, float, complex, str, torch.dtype, torch.device)) or output is None:
        return output
    if lost is not None:
        lost.append(f"{place}, a {type(output).__name__},")
    return None


def _leaves(output: Any, path: str = "output") -> list[tuple[str, Any]]:
    if isinstance(output, dict):
        parts = list(output.items())
    elif isinstance(output, (tuple, list)):
        parts = list(enumerate(output))
    else:
        return [(path, output)]
    return [leaf for key, value in parts for leaf in _leaves(value, f"{path}[{key!r}]")]


def difference(expected: Any, actual: Any) -> str | None:
    """Where two nested outputs differ by more than rounding, in words; None where they agree."""
    wanted, found = _leaves(expected), _leaves(actual)
    if [path for path, _ in wanted] != [path for path, _ in found]:
        return f"it returns {few([p for p, _ in found])} instead of {few([p for p, _ in wanted])}"
    for (path, a), (_, b) in zip(wanted, found, strict=True):
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            if type(a) is not type(b) or a != b:
                return f"{path} is {b!r} instead of {a!r}"
        elif a.shape != b.shape or a.dtype != b.dtype:
            return f"{path} is {described(b)} instead of {described(a)}"
        elif not torch.equal(a, b):
            inexact = a.is_floating_point() or a.is_complex()
            finite = a[a.isfinite()].abs()
            tolerance = 64 * torch.finfo(a.dtype).eps * float(finite.max()) if inexact and finite.numel() else 0.0
            if not torch.allclose(a, b, rtol=0, atol=tolerance, equal_nan=True):
                return f"{path} differs by up to {float((a - b).abs().nan_to_num().max()):.3g}"
    return None


class Doubled(TorchFunctionMode):
    """Inside, whatever is cast to another floating dtype, or made of one, is of float64.

    Operations that have no kernel for float64 are computed from those that have.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = Tensor.double if func in _CASTS else _WRITTEN_OUT.get(func, func)
        args, kwargs = pytree.tree_map(_doubled, (args, kwargs or {}))
        return func(*args, **kwargs)


class Substituted(TorchFunctionMode):
    """Inside, every operation that takes a parameter or buffer of ``module`` takes its namesake in ``state`` instead.

    A parameter's is asked for when it is needed and not kept, so those of the whole network are never there at once;
    a buffer's is kept, since the network may write to it.
    """

    def __init__(self, module: nn.Module, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = {id(t): name for name, t in reversed(full_state(module).items()) if name in state}
        self._state = state
        self._kept: dict[str, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in GEOMETRY:
            return func(*args, **(kwargs or {}))
        args, kwargs = pytree.tree_map(self._namesake, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _namesake(self, leaf: Any) -> Any:
        name = self._names.get(id(leaf)) if isinstance(leaf, Tensor) else None
        if name is None:
            return leaf
        if isinstance(leaf, nn.Parameter):
            return self._state[name]
        if name not in self._kept:
            self._kept[name] = self._state[name]
        return self._kept[name]


def full_state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and all buffers by every name they have."""
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))


def _grouped_product(
    x: Tensor, y: Tensor, *, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: Any = None
) -> Tensor:
    """One matrix product per group; ``offs`` [groups] are the ends of the groups along the axis that holds them.

    [m, k] [groups, k, n]: of the rows; [groups, m, k] [k, n]: of the columns; [m, k] [k, n]: of the terms, and one
    product per group; [groups, m, k] [groups, k, n]: of none.
    """
    if offs is None:
        out = torch.bmm(x, y)
    else:
        ends = offs.tolist()
        spans = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
        flat = x.dim() == 2, y.dim() == 2
        parts = [
            (x[:, at] if all(flat) else x[at] if flat[0] else x[g])
            @ (y[at] if all(flat) else y[:, at] if flat[1] else y[g])
            for g, at in enumerate(spans)
        ]
        out = torch.stack(parts) if all(flat) else torch.cat(parts, 0 if flat[0] else 1)
    return out if bias is None else out + bias


_CASTS = frozenset({Tensor.float, Tensor.half, Tensor.bfloat16})
_GROUPED = (getattr(torch, "_grouped_mm", None), getattr(F, "grouped_mm", None))  # of recent versions
_WRITTEN_OUT = {function: _grouped_product for function in _GROUPED if function is not None}


def _doubled(leaf: Any) -> Any:
    return torch.float64 if isinstance(leaf, torch.dtype) and leaf.is_floating_point else leaf


@contextmanager
def fitting(number: int) -> Iterator[None]:
    """Whatever goes wrong while batch ``number`` (from 0) runs is an error about the data."""
    try:
        yield
    except FxMergeError:
        raise
    except Exception as error:
        raise InputError(
            f"batch {number} of the data does not fit the network: {told(error)}. Batches are tensors, or tuples that "
            "start with the inputs; anything else needs input_fn(batch)"
        ) from error
