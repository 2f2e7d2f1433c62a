"""Loss and accuracy along the straight line between two networks."""

from __future__ import annotations

import copy
import math
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree
from tqdm import tqdm

from fxmerge.errors import FxMergeError, InputError, StructureError, told
from fxmerge.running import as_call, call, forget, preserved, to_device

Score = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Barrier:
    """What the networks ``(1 - t) a + t b`` make of the data.

    Attributes:
        t: the places on the line, from 0 (a) to 1 (b).
        loss: the mean loss at each place.
        metric: the mean of the metric at each place, or None where there is none.
        barrier: max over t of ``loss(t) - ((1 - t) loss(0) + t loss(1))``; 0 or more.
    """

    t: tuple[float, ...]
    loss: tuple[float, ...]
    metric: tuple[float, ...] | None
    barrier: float

    def __str__(self) -> str:
        columns = [("t", self.t), ("loss", self.loss), *([("metric", self.metric)] if self.metric else [])]
        lines = ["".join(f"{name:>{6 if name == 't' else 12}}" for name, _ in columns)]
        lines.append("-" * len(lines[0]))
        for t, *values in zip(*(values for _, values in columns), strict=True):
            lines.append(f"{t:6.3f}" + "".join(f"{value:12.5g}" for value in values))
        return "\n".join([*lines, f"loss barrier {self.barrier:.5g}"])

    def plot(self, path: str | Path) -> Path:
        """Draw the loss, and the metric if there is one, over t; the ending of ``path`` says in which format.

        Raises:
            FxMergeError: matplotlib is not installed, or does not know the format.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise FxMergeError("plotting needs matplotlib: pip install fxmerge[plot]") from None
        curves = {"loss": self.loss, **({"metric": self.metric} if self.metric else {})}
        figure = Figure(figsize=(4.5 * len(curves), 3.5), layout="constrained")
        for axes, (name, values) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
            axes.plot(self.t, values, marker="o")
            axes.plot((0, 1), (values[0], values[-1]), linestyle="--", color="grey")
            axes.set(xlabel="t", ylabel=name, title=f"barrier {self.barrier:.4g}" if name == "loss" else "")
        path = Path(path)
        partial = path.with_name(f".{uuid.uuid4().hex[:8]}.{path.name}")
        try:
            figure.savefig(partial)
            partial.replace(path)
        except ValueError as error:
            raise FxMergeError(f"{path} cannot be drawn: {error}; an ending such as .png or .pdf can") from error
        finally:
            partial.unlink(missing_ok=True)
        return path


def evaluate_barrier(
    a: nn.Module,
    b: nn.Module,
    data: Iterable[Any],
    *,
    loss: Score | None = None,
    metric: Score | None = None,
    input_fn: Callable[[Any], Any] | None = None,
    points: int = 11,
    device: torch.device | str = "auto",
    reset_batchnorm: bool = False,
    progress: bool = True,
) -> Barrier:
    """Evaluate networks on the straight line from ``a`` to ``b``, in eval mode, and the loss barrier between them.

    Floating-point parameters and buffers are ``(1 - t) a + t b``, all others those of ``a``. The barrier is that of
    Git Re-Basin (Ainsworth et al., arXiv 2209.04836, Definition 2.2), measured from the line between the two losses
    instead of their mean, so that it says the same where they differ:

        max over t in [0, 1] of  loss((1 - t) a + t b) - ((1 - t) loss(a) + t loss(b))

    Args:
        a, b: networks with the same keys and shapes; left as found, as is torch's random state.
        data: batches ``(inputs, target)``, read once for every point; an iterator is kept as a list.
        loss: ``(output, target)`` -> mean over the batch; None is the cross-entropy.
        metric: ``(output, target)`` -> mean over the batch; None is the accuracy where targets are class labels.
        input_fn: batch -> inputs, a tensor, a tuple (positional arguments) or a dict (keyword arguments). The target is
            the second entry of the batch, or the whole batch where that is not a tuple or a list of two or more.
        points: how many places on the line, both ends included.
        device: "auto": the device of ``a``, or CUDA where that is the CPU and there is one.
        reset_batchnorm: re-estimate running statistics at every point: mean over the batches of ``data``.
        progress: show a progress bar.

    Raises:
        StructureError: the networks differ in keys or shapes, naming the first that does.
        InputError: the data is empty or does not fit the network, or there are fewer than two points.
    """
    if isinstance(points, bool) or not isinstance(points, int) or points < 2:
        raise InputError(f"points is {points!r}; give an integer of two or more, since both ends belong to the line")
    start, end = _tensors(a), _tensors(b)
    _require_same_structure(start, end)
    device = _working_device(start, device)
    start, end = to_device(start, device), to_device(end, device)
    network = copy.deepcopy(a).to(device)
    for m in network.modules():
        m.training = False

    line = [i / (points - 1) for i in range(points)]
    results = []
    with preserved(), torch.no_grad():  # preserves the random state, from which shuffling loaders draw
        batches = _re_iterable(data)
        for t in tqdm(line, desc="barrier", unit="point", disable=not progress, leave=False):
            state = {key: _between(start[key], end[key], t) for key in start}
            if reset_batchnorm:
                _reset_batchnorm(network, state, batches, input_fn, device)
            results.append(_evaluate(network, state, batches, input_fn, device, loss, metric))
    losses, metrics = zip(*results, strict=True)
    gaps = [value - ((1 - t) * losses[0] + t * losses[-1]) for t, value in zip(line, losses, strict=True)]
    barrier = math.nan if any(map(math.isnan, gaps)) else max(gaps)
    return Barrier(tuple(line), losses, None if None in metrics else metrics, barrier)


def evaluate(
    network: nn.Module,
    data: Iterable[Any],
    *,
    loss: Score | None = None,
    metric: Score | None = None,
    input_fn: Callable[[Any], Any] | None = None,
    device: torch.device | str = "auto",
    progress: bool = True,
) -> tuple[float, float | None]:
    """The mean loss of one network in eval mode, and its mean metric where there is one, every sample the same.

    Arguments and errors are those of ``evaluate_barrier``; by default the cross-entropy and the accuracy.
    """
    state = _tensors(network)
    device = _working_device(state, device)
    network = copy.deepcopy(network).to(device)
    for m in network.modules():
        m.training = False
    with preserved(), torch.no_grad():
        batches = tqdm(_re_iterable(data), desc="evaluate", unit="batch", disable=not progress, leave=False)
        return _evaluate(network, to_device(state, device), batches, input_fn, device, loss, metric)


def _working_device(state: Mapping[str, Tensor], device: torch.device | str) -> torch.device | str:
    if device != "auto":
        return device
    home = next((t.device for t in state.values()), torch.device("cpu"))
    return "cuda" if home.type == "cpu" and torch.cuda.is_available() else home


def _re_iterable(data: Iterable[Any]) -> Iterable[Any]:
    if isinstance(data, Tensor) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        raise InputError(f"data is a {type(data).__name__}; give an iterable of batches (inputs, target)")
    return list(data) if isinstance(data, Iterator) else data


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers; tied ones under their first name."""
    return {name: t.detach() for name, t in chain(module.named_parameters(), module.named_buffers())}


def _require_same_structure(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    for key in [*a, *b]:
        if key not in a or key not in b:
            owner = "first" if key in a else "second"
            raise StructureError(f"{key!r} is only in the {owner} network; the line needs two of the same structure")
        if a[key].shape != b[key].shape:
            shapes = f"{[*a[key].shape]} in the first network and {[*b[key].shape]} in the second"
            raise StructureError(f"{key!r} is {shapes}; the line needs two of the same widths")


def _between(a: Tensor, b: Tensor, t: float) -> Tensor:
    """A new tensor, since a network may write into its buffers; the ends as they are, since masks may hold -inf."""
    if t == 0 or not (a.is_floating_point() or a.is_complex()):
        return a.clone()
    b = b.to(a.dtype, copy=True)
    return b if t == 1 else (1 - t) * a + t * b


def _calls(
    batches: Iterable[Any], input_fn: Callable[[Any], Any] | None, device: torch.device | str
) -> Iterator[tuple[int, tuple[Any, ...], dict[str, Any], Any, int]]:
    """Number, positional arguments, keyword arguments, target and size of every batch."""
    number = -1
    for number, batch in enumerate(batches):
        pair = isinstance(batch, (tuple, list)) and len(batch) >= 2
        if input_fn is None and not pair:
            raise InputError(f"batch {number} is a {_described(batch)}; give batches (inputs, target), or an input_fn")
        inputs = batch[0] if input_fn is None else input_fn(batch)
        target = batch[1] if pair else batch
        if not isinstance(inputs, (Tensor, tuple, Mapping)):
            raise InputError(
                f"the inputs of batch {number} are a {_described(inputs)}; input_fn can make them a tensor"
            )
        args, kwargs = to_device(as_call(inputs), device)
        sized = [leaf for leaf in pytree.tree_leaves((target, args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim]
        yield number, args, kwargs, to_device(target, device), len(sized[0]) if sized else 1
    if number < 0:
        raise InputError("data holds no batch; give at least one, and an iterator that was not read before")


def _described(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__


def _evaluate(
    network: nn.Module,
    state: Mapping[str, Tensor],
    batches: Iterable[Any],
    input_fn: Callable[[Any], Any] | None,
    device: torch.device | str,
    loss: Score | None,
    metric: Score | None,
) -> tuple[float, float | None]:
    """Mean loss and mean metric, every sample counting the same."""
    forget(network)  # what it computed from another state
    samples, losses, metrics = 0, 0.0, 0.0
    score = metric
    for number, args, kwargs, target, size in _calls(batches, input_fn, device):
        with _fitting(number, args, kwargs, target):
            output = call(network, args, kwargs, state)
            if loss is None and not (isinstance(output, Tensor) and isinstance(target, Tensor)):
                raise InputError(
                    f"the cross-entropy is for tensors, not for a {_described(output)} and the target "
                    f"{_described(target)}; give loss(output, target)"
                )
            losses += size * float((loss or _cross_entropy)(output, target))
            if score is None and samples == 0 and _are_labels(output, target):
                score = _accuracy
            metrics += size * float(score(output, target)) if score else 0.0
        samples += size
    return losses / samples, metrics / samples if score else None


def _cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Told of labels that no output stands for, which on CUDA would end all work of the process."""
    labels = output.ndim > 1 and not target.is_floating_point()
    if labels and (known := target[target != -100]).numel():  # the loss leaves out the others
        low, high = known.min(), known.max()
        if low < 0 or high >= output.shape[1]:
            raise IndexError(f"labels from {low} to {high} for {output.shape[1]} outputs")
    return F.cross_entropy(output, target)


def _are_labels(output: Any, target: Any) -> bool:
    if not (isinstance(output, Tensor) and isinstance(target, Tensor)):
        return False
    fits = output.ndim > 1 and output.shape[:1] + output.shape[2:] == target.shape
    return fits and not (target.is_floating_point() or target.is_complex() or target.dtype == torch.bool)


def _accuracy(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(1) == target).double().mean()


def _reset_batchnorm(
    network: nn.Module,
    state: Mapping[str, Tensor],
    batches: Iterable[Any],
    input_fn: Callable[[Any], Any] | None,
    device: torch.device | str,
) -> None:
    """Replace the running statistics in ``state`` by their mean over the batches."""
    layers = [(f"{name}.".lstrip("."), m) for name, m in network.named_modules() if isinstance(m, _BatchNorm)]
    layers = [(prefix, m) for prefix, m in layers if m.running_mean is not None]
    for prefix, m in layers:
        state[prefix + "running_mean"].zero_()
        state[prefix + "running_var"].fill_(1)
        state[prefix + "num_batches_tracked"].zero_()
        m.training, m.momentum = True, None  # no momentum: a cumulative mean
    for number, args, kwargs, target, _ in _calls(batches, input_fn, device) if layers else ():
        with _fitting(number, args, kwargs, target):
            call(network, args, kwargs, state)
    for _, m in layers:
        m.training = False


@contextmanager
def _fitting(number: int, args: Any, kwargs: Any, target: Any) -> Iterator[None]:
    """Say which batch, and of which shapes, does not fit."""
    try:
        yield
    except (torch.OutOfMemoryError, InputError):
        raise
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        shapes = pytree.tree_map(
            lambda leaf: [*leaf.shape] if isinstance(leaf, Tensor) else leaf, (args, kwargs, target)
        )
        raise InputError(
            f"batch {number} does not fit: {told(error)}. Its arguments are {shapes[0]} {shapes[1]} "
            f"and its target is {shapes[2]}; input_fn and loss can take other forms"
        ) from error
