"""What ``examples/coverage.py`` does with one network.

Every parameter and buffer that would start out constant (BatchNorm statistics, affine parameters, layer scales,
zero-initialised heads, biases) is randomised, so that nothing is symmetric by accident. Then: infer the classes; apply
a random element of the whole inferred symmetry in float64 and see the output stay; merge the network with a randomly
permuted twin of itself by weight matching and see the network come back.
"""

import importlib
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxmerge
from fxmerge.ir import AxisClass
from fxmerge.matchers import WeightMatching
from fxmerge.running import plain
from fxmerge.trace import trace

VERIFIED, RECOVERED = 1e-9, 1e-4
"""Largest relative errors that count as equal: in float64 under the symmetry, in float32 after a merge with a twin."""

Row = dict[str, Any]


def caller(model: nn.Module, inputs: Any) -> Callable[[nn.Module], Any]:
    """``model(inputs)`` as a function of the network alone."""
    if isinstance(inputs, dict):
        return lambda network: network(**inputs)
    return lambda network: network(*(inputs if isinstance(inputs, tuple) else (inputs,)))


@torch.no_grad()
def randomise(model: nn.Module, run: Callable[[nn.Module], Any]) -> nn.Module:
    """Give every constant parameter random values, and BatchNorm statistics near those of the inputs."""
    for parameter in model.parameters():
        if parameter.numel() < 2 or parameter.min() < parameter.max():
            continue
        if parameter.flatten()[0] != 0:
            parameter.uniform_(0.5, 1.5)
        else:
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 100
            parameter.normal_(0, fan_in**-0.5)

    def settle(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        # In graph order, each from what the layers before it now give: statistics far from that would blow up.
        variance, mean = torch.var_mean(inputs[0], [d for d in range(inputs[0].dim()) if d != 1])
        norm.running_mean.copy_(mean + variance.sqrt() * torch.randn_like(mean) / 4)
        norm.running_var.copy_(variance * torch.empty_like(mean).uniform_(0.5, 1.5) + 1e-3)

    model.eval()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    hooks = [norm.register_forward_pre_hook(settle) for norm in norms]
    run(model)
    for hook in hooks:
        hook.remove()
    return model


def relative_error(output: Any, expected: Any) -> float:
    """Largest change over the largest distance of the expected output from its mean, over all tensors of an output."""
    worst = 0.0
    pairs = [pytree.tree_leaves(tree) for tree in (_open(output), _open(expected))]
    for got, wanted in zip(*pairs, strict=True):
        if not isinstance(wanted, Tensor):
            continue
        if got.shape != wanted.shape:
            return float("inf")
        if wanted.numel() and not torch.equal(got, wanted):
            got, wanted = got.double(), wanted.double()
            error = float((got - wanted).abs().max() / (wanted - wanted.mean()).abs().max())
            worst = max(worst, error if error == error else float("inf"))
    return worst


def _open(output: Any) -> Any:
    """Mappings and dataclasses that pytree takes for leaves, as dictionaries."""
    return plain(output)


def pinned(classes: Iterable[AxisClass]) -> dict[str, int]:
    """Why neurons are pinned, without the names of nodes -> how many, most first."""
    found: Counter[str] = Counter()
    for c in classes:
        if not c.free and c.sites:
            found[re.sub(r" (\([^()]*\)|at \S+)$", "", str(c.pinned))] += c.size
    return dict(found.most_common())


def seconds(run: Callable[[], Any], times: int) -> float:
    """Of one run, the median of a few after one that is not counted."""
    taken = []
    for _ in range(times + 1):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return median(taken[1:])


def check(zoo: str, name: str, with_twin: bool, tell: Callable[[Row], None]) -> None:
    """All that the table says of one network; ``tell`` is given the row after every stage, also of a failure."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    row: Row = {"zoo": zoo, "name": name, "stage": "build", "error": "", "with_twin": with_twin}
    try:
        _stages(row, importlib.import_module(f"zoos.{zoo}").networks()[name], with_twin, tell)
        row["stage"] = "done"
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    tell(row)


def _stages(row: Row, build: Callable[[], tuple[nn.Module, Any]], with_twin: bool, tell: Callable[[Row], None]) -> None:
    def begin(stage: str) -> float:
        row["stage"] = stage
        tell(row)
        return time.perf_counter()

    model, inputs = build()
    run = caller(model, inputs)
    randomise(model, run)
    with torch.no_grad():
        row["forward"] = seconds(partial(run, model), 3)
    # what is imported at the first use is no part of the analysis
    fxmerge.infer_classes(nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)), torch.randn(2, 2, 2, 2))

    start = begin("trace")
    traced = trace(model, inputs)
    row |= {"front_end": traced.origin, "notes": list(traced.notes), "nodes": len(traced.graph_module.graph.nodes)}
    row["trace_seconds"] = time.perf_counter() - start
    start = begin("infer")
    classes = fxmerge.infer_classes(traced)
    row["infer_seconds"] = time.perf_counter() - start
    row |= {"classes": len(classes), "free": classes.free, "total": classes.total, "pinned": pinned(classes)}
    row["unknown"] = [list(pair) for pair in classes.unknown]

    start = begin("verify")
    verified = fxmerge.verify(model, classes, seed=1, tolerance=VERIFIED)
    row |= {"verify": verified.error, "verify_seconds": time.perf_counter() - start}
    if not verified.ok:
        raise ArithmeticError(f"the output changes by {verified.error:.0e}")
    if not classes.free:
        raise ValueError("nothing is free")

    if with_twin:
        start = begin("twin")
        matcher = WeightMatching(restarts=1)  # an exact answer needs no second start
        twin = fxmerge.permute(model, classes, seed=1)
        merged = fxmerge.merge(model, twin, example_inputs=inputs, matcher=matcher, progress=False).module
        row["twin_seconds"] = time.perf_counter() - start
        with torch.no_grad():
            row["twin"] = relative_error(run(merged), plain(run(model)))
        if not row["twin"] <= RECOVERED:
            raise ArithmeticError(f"the merge with a permuted twin differs by {row['twin']:.0e}")
