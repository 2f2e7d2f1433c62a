"""From a module to a graph: ``trace`` is the one way in, and everything it returns reproduces the module.

    nn.Module, example inputs  --symbolic, else record-->  fx.GraphModule  --one run, compared with eager-->  Traced

What no pass could work with (parameters not initialised, quantised, not finite) is told here, before anything runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from fxmerge.errors import InputError, TraceError, few, told
from fxmerge.guess import infer_example_inputs
from fxmerge.ir import Traced
from fxmerge.record import record
from fxmerge.running import (
    as_call,
    bind,
    bind_forward,
    device_of,
    difference,
    evaluating,
    failed_on,
    fresh,
    full_state,
    plain,
    run_eager,
    to_device,
)
from fxmerge.symbolic import symbolic


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
    bind_forward(module, args, kwargs)  # what does not fit is told in terms of the call, not of some layer inside
    expected = None
    if check:
        expected = run_eager(module, args, kwargs)
        _require_tensors(module, expected)
    failures: list[str] = []
    for origin, front_end in (("symbolic", symbolic), ("recorded", record)):
        try:
            graph_module, found = front_end(module, args, kwargs)
            _stay(graph_module, module)
            output, shapes = _run(graph_module, module, args, kwargs, check)
            if check and (what := difference(plain(expected), plain(output))):
                raise TraceError(f"makes a graph that does not reproduce the module ({what})")
        except TraceError as error:
            failures.append(str(error))
            continue
        notes += tuple(f"recorded from one run of the network, since symbolic tracing {why}" for why in failures)
        _require_tensors(module, output)
        return Traced(graph_module, module, args, kwargs, shapes, origin, notes + found)
    raise TraceError(
        f"{type(module).__name__} cannot be traced: symbolic tracing {failures[0]}; recording a run {failures[1]}.\n"
        "The way out: put what stops it into a function of tensors marked with torch.fx.wrap, which makes it one "
        "operation of the graph, or write it without that."
    )


def _stay(graph_module: fx.GraphModule, module: nn.Module) -> None:
    """Tensors that the network keeps on another device than its parameters are there in every run.

    They are buffers of the graph, which move with it, where the network's plain attributes do not.
    """
    home, known = device_of(module), full_state(module)
    made = {n: t.device for n, t in full_state(graph_module).items() if n not in known and t.device != home}
    for node in graph_module.graph.find_nodes(op="get_attr") if made else ():
        if node.target in made:
            with graph_module.graph.inserting_after(node):
                there = graph_module.graph.call_method("to", (node, made[node.target]))
            node.replace_all_uses_with(there, delete_user_cb=lambda user, there=there: user is not there)
    if made:
        graph_module.recompile()


def _run(
    graph_module: fx.GraphModule, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], check: bool
) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """What the graph returns, and the shapes of its nodes."""
    interpreter = ShapeInterpreter(graph_module)
    try:
        with evaluating(module, graph_module):
            output = interpreter.run(*bind(graph_module.graph, fresh(args), fresh(kwargs)))
    except Exception as error:
        if not check:  # without the eager run nothing says that the inputs themselves fit
            raise failed_on(module, args, kwargs, error) from error
        raise TraceError(f"makes a graph that fails where the module runs ({told(error)})") from error
    return output, interpreter.shapes


class ShapeInterpreter(fx.Interpreter):
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


def _require_usable(module: nn.Module) -> None:
    """Names the tensors that cannot be merged."""
    if not isinstance(module, nn.Module):
        raise InputError(f"expected an nn.Module, got {type(module).__name__}")
    name = type(module).__name__
    if scripted := [path for path, m in module.named_modules() if isinstance(m, torch.jit.ScriptModule)]:
        what = name if not scripted[0] else f"{scripted[0]!r} of {name}"
        raise InputError(f"{what} is compiled by torch.jit; give the module that it was made of")
    parameters = dict(module.named_parameters())
    tensors = parameters | dict(module.named_buffers())
    if lazy := [key for key, tensor in tensors.items() if is_lazy(tensor)]:
        raise InputError(f"{few(lazy)} of {name} are not initialised yet; run the module once")
    packed = [key for key, value in module.state_dict(keep_vars=True).items() if _is_packed(value)]
    packed += [key for key, parameter in parameters.items() if parameter.itemsize == 1]  # int8, float8, ..
    if packed:
        raise InputError(
            f"{few(packed)} of {name} are quantised or packed; merge the floating-point networks and quantise the "
            "result"
        )
    if wide := [key for key, parameter in parameters.items() if parameter.is_complex()]:
        raise InputError(
            f"{few(wide)} of {name} are complex, which merging does not do; hold their real and imaginary parts in one "
            "real parameter (torch.view_as_real) and join them in forward (torch.view_as_complex)"
        )
    if not parameters:
        raise InputError(f"{name} has no parameters, so there is nothing to merge")
    if meta := [key for key, tensor in tensors.items() if tensor.is_meta]:
        raise InputError(
            f"{few(meta)} of {name} are on the meta device; load the weights, or let fxmerge.on_disk read them"
        )
    for key in _suspects(tensors):
        if bad := non_finite(tensors[key]):
            raise InputError(f"{key!r} of {name} holds {bad} NaN or infinite values of {tensors[key].numel()}")


def _is_packed(value: Any) -> bool:
    return any(
        leaf.is_quantized if isinstance(leaf, Tensor) else isinstance(leaf, torch.ScriptObject)
        for leaf in pytree.tree_leaves(value)
    )


def _require_tensors(module: nn.Module, output: Any) -> None:
    """An output without tensors says nothing of what must be kept."""
    if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(plain(output))):
        raise InputError(
            f"{type(module).__name__} returns no tensor but {type(output).__name__}, so nothing says what a merge must "
            "keep; give a module whose forward returns its tensors"
        )


def _suspects(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors whose sum is not finite, as NaN and infinity make it: each tensor is read once, nothing more."""
    sums = {
        key: tensor.detach().sum()
        for key, tensor in tensors.items()
        if tensor.is_floating_point() or tensor.is_complex()
    }
    return [key for key, total in sums.items() if not total.isfinite()]


def non_finite(tensor: Tensor) -> int:
    """How many entries are NaN or infinite; none where a buffer is a mask of zeros and -inf, or an infinite limit."""
    tensor, trained = tensor.detach(), isinstance(tensor, nn.Parameter)
    meant = tensor.isinf() if tensor.numel() == 1 else (tensor == 0) | (tensor == -torch.inf)
    if not trained and meant.all():
        return 0
    return int((~tensor.isfinite()).sum())
