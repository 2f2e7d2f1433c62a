"""The second front end: recording, for what symbolic tracing refuses.

    nn.Module, args, kwargs  --record-->  fx.GraphModule, notes for the report

One run says what the network does (``recorder``). Numbers of Python are what they were in that run: runs on another
batch and in training mode say which of them follow the batch size and which functions follow the mode; shapes that
the graph has fixed are asserted in it.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxmerge.batch import follow, repeated, samples, shuffled
from fxmerge.errors import TraceError, few, told
from fxmerge.ir import VALUES_DECIDE
from fxmerge.recorder import Recorder
from fxmerge.running import bind, call, difference, dropped, evaluating, fresh, plain
from fxmerge.stored import stays_on_disk
from fxmerge.symbolic import unread, user_line

Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]
Run = Callable[..., Recorder]


def record(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """The front end: the graph of ``module(*args, **kwargs)`` in eval mode, and notes for the report.

    Raises:
        TraceError: something made the result that is no torch function.
    """
    if any("_orig_mod" in m._modules for m in module.modules()):
        raise TraceError("does not look into compiled modules: give the module that torch.compile was given")
    first, run = _first(module, (args, kwargs))
    trained = _told_in_training(first, partial(run, (args, kwargs)))
    _follow_mode(first, trained)
    graph_module, why = _follow_inputs(first, run, module, (args, kwargs), trained)
    notes = [*first.notes]
    if why is not None:
        notes.append(f"the batch size is fixed in the graph: {why}")
    if missing := unread(graph_module, module):
        notes.append(f"not read in eval mode, so not in the graph: {few(missing)}")
    return graph_module, tuple(notes)


def _first(module: nn.Module, arguments: Arguments) -> tuple[Recorder, Run]:
    """The recording, and how to make another: without what the network keeps, where that reads more parameters."""
    found: list[tuple[Recorder, Run]] = []
    missing: list[int] = []
    for dropping in (False,) if stays_on_disk(module) else (False, True):
        run = partial(_recorded, module, dropping=dropping)
        try:
            recorder = run(arguments)
        except TraceError as error:
            failure = error
            continue
        found.append((recorder, run))
        missing.append(recorder.unread())
        if not missing[-1]:
            break
    if not found:
        raise failure
    return found[missing.index(min(missing))]


def _recorded(
    module: nn.Module, arguments: Arguments, *, training: bool = False, seed: int = 0, dropping: bool = False
) -> Recorder:
    """One run, in training mode from a seed; ``dropping`` what the network keeps of earlier ones."""
    recorder = Recorder(module)
    try:
        with evaluating(module), dropped(module) if dropping else nullcontext():
            for m in module.modules():
                m.training = training
            if training:
                torch.manual_seed(seed)  # what it was comes back
            recorder.run(*fresh(arguments))
    except TraceError as error:
        raise TraceError(f"{error}{user_line(error)}") from error
    except Exception as error:
        raise TraceError(f"stops{user_line(error)}: {told(error)}") from error
    return recorder


_DRAWS = 4  # runs in which every layer should have been used once


def _told_in_training(recorder: Recorder, run: Run) -> dict[tuple[str, str, int], Any]:
    """What functions are told in training mode; in several runs, as some networks leave layers out at random."""
    told: dict[tuple[str, str, int], Any] = {}
    for seed in range(_DRAWS):
        if recorder.flags.keys() <= told.keys():
            break
        try:
            told |= {key: flag.value for key, flag in run(training=True, seed=seed).flags.items()}
        except TraceError:  # batch statistics of one sample, for example
            break
    return told


def _follow_mode(recorder: Recorder, trained: Mapping[tuple[str, str, int], Any]) -> None:
    """Functions that are told whether the network trains (dropout, attention) ask a layer of the graph.

    Which do, and which are told a constant, is seen by what they are told in training mode.
    """
    graph = recorder.graph
    kept = set(graph.nodes)
    layers = [str(node.target) for node in graph.find_nodes(op="call_module")]
    for key, flag in recorder.flags.items():
        node, told_then = flag.node, trained.get(key, flag.value)
        if node not in kept or not layers or flag.value == told_then:
            continue
        inside = [path for path in layers if path.startswith(f"{key[0]}.")] or layers
        with graph.inserting_before(node):
            mode = graph.call_function(getattr, (graph.get_attr(inside[0]), "training"))
            flag.replace(mode if told_then is True else graph.call_function(operator.mul, (mode, told_then)))


def _follow_inputs(
    recorder: Recorder, run: Run, module: nn.Module, arguments: Arguments, trained: Mapping[tuple[str, str, int], Any]
) -> tuple[fx.GraphModule, str | None]:
    """The graph for any batch size where a run on another batch tells how; else the graph of this one, and why.

    Where values say how many there are of something, a run on others tells which numbers follow them.
    """
    as_it_is = recorder.graph
    values = _on_other_values(recorder, run, arguments, trained)
    batch, why = _on_another_batch(recorder, run, arguments, trained)
    ways = [(b, v) for b in (batch, None) for v in (values, None)]
    for on, of in dict.fromkeys(ways):  # what follows less is less likely to fail
        recorder.graph = copy.deepcopy(as_it_is)
        reason = follow(recorder.recording, [r.recording for r in (on, of) if r is not None])
        if reason is None:
            _assert_shapes(recorder, fixed=on is None)
            graph_module = recorder.built(module)
            reason = None if on is None else _unlike(graph_module, module, arguments)
        if reason is None and of is not None:
            reason = _unlike_on(graph_module, module, shuffled(arguments))
        if reason is None:
            break
        why = why if on is None else reason
    return graph_module, why if on is None else None


def _on_other_values(
    recorder: Recorder, run: Run, arguments: Arguments, trained: Mapping[tuple[str, str, int], Any]
) -> Recorder | None:
    """A recording of the same operations on other values, where these say how many there are of something."""
    if not (recorder.selects and recorder.inputs):
        return None
    try:
        other = run(shuffled(arguments))
    except TraceError:
        return None
    _follow_mode(other, trained)
    ways = ([(node.op, node.target) for node in r.graph.nodes] for r in (recorder, other))
    if next(ways) == next(ways):
        return other
    recorder.notes[VALUES_DECIDE] = None
    return None


def _on_another_batch(
    recorder: Recorder, run: Run, arguments: Arguments, trained: Mapping[tuple[str, str, int], Any]
) -> tuple[Recorder | None, str]:
    """A recording on another batch, or why there is none."""
    size = samples(arguments)
    if size is None:
        return None, "the inputs have no batch axis in common"
    for count in (size + 1, 2 * size):  # the former is less work, but some networks take clips of several frames
        try:
            other = run(repeated(arguments, count))
            break
        except TraceError as error:
            why = f"on a batch of {count}, recording {error}"
    else:
        return None, why
    _follow_mode(other, trained)
    if recorder.constants.keys() == other.constants.keys() and difference(recorder.constants, other.constants):
        raise TraceError(
            "meets a tensor that follows the inputs and that no torch function made (but NumPy, a scripted function, "
            "another library)"
        )
    return other, ""


def _unlike(graph_module: fx.GraphModule, module: nn.Module, arguments: Arguments) -> str | None:
    """How graph and network differ on a third batch size; None where they agree.

    One sample is the least work, but some networks do something else for it, or take multiples of their batch alone.
    """
    size = len(next(leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)))
    for count in (1, 3 * size) if size > 1 else (3,):
        why = _unlike_on(graph_module, module, repeated(arguments, count))
        if why is None:
            return None
    return f"on a batch of {count}, {why}"


def _unlike_on(graph_module: fx.GraphModule, module: nn.Module, given: Arguments) -> str | None:
    """How graph and network differ on these inputs."""
    try:
        with evaluating(module):
            expected = plain(call(module, *fresh(given)))
        with evaluating(graph_module):
            output = graph_module(*bind(graph_module.graph, *fresh(given)))
        return difference(expected, output)
    except Exception as error:
        return told(error)


def _assert_shapes(recorder: Recorder, fixed: bool) -> None:
    """Refuses inputs of other shapes than those recorded, from axis 1 on or, where that is fixed too, from axis 0."""
    graph = recorder.graph
    nodes = {node.name: node for node in graph.find_nodes(op="placeholder")}
    with graph.inserting_before(list(nodes.values())[-1].next):
        for given in recorder.inputs:
            node = nodes[given.node.name]
            for key in given.path:
                node = graph.call_function(operator.getitem, (node, key))
            shape = graph.call_function(getattr, (node, "shape"))
            wanted, said = given.shape, str(list(given.shape))
            if not fixed:
                shape = graph.call_function(operator.getitem, (shape, slice(1, None)))
                wanted, said = wanted[1:], str(["any", *wanted[1:]]).replace("'", "")
            same = graph.call_function(operator.eq, (shape, wanted))
            message = f"{given.node.target} must be of shape {said}, as when the network was recorded"
            graph.call_function(torch._assert, (same, message))
