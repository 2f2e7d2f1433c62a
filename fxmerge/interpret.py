"""Running a graph on labels: every operation is caught whole, below its spelling, and its rule applied.

The graph runs for real on the example inputs while a dispatch mode watches at the level above autograd, where
``nn.Linear``, ``F.linear`` and a Tensor method are one operator and linear, convolution, norms and attention are
not yet taken apart. Values that depend on neither inputs nor parameters are constants, and known by value.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.backends.mha
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher, no_python_dispatcher
from torch._subclasses.schema_check_mode import SchemaCheckMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from fxmerge.atoms import Atoms
from fxmerge.calls import Call, defaults, leaves, operation_name
from fxmerge.ir import OUTPUT, VALUES_DECIDE, Site, Traced
from fxmerge.label import Label, combine, varying
from fxmerge.labels import Context
from fxmerge.rules import FOLLOWED, MOVEMENT, RULES
from fxmerge.running import bind, evaluating
from fxmerge.slots import find_slots


def _key(t: Tensor) -> tuple[Any, ...]:
    """Identity by storage, so that tied weights are one whatever their names."""
    return (t.untyped_storage().data_ptr(), t.storage_offset(), tuple(t.shape), tuple(t.stride()), t.dtype)


class ValuesNeededError(Exception):
    """The graph has shapes that follow from numbers, such as how many boxes were kept."""


def interpret(traced: Traced) -> Interpretation:
    """The graph, run on labels. These need no numbers, so that contractions are computed where shapes ask for it."""
    found = Interpretation(traced)
    try:
        found.run()
    except Exception:  # what is wrong is told by a run that leaves nothing out
        found = Interpretation(traced, exact=True)
        found.run()
    return found


class Interpretation(Context):
    """Labels of every value of one traced module. ``seen`` has (node, dimension, atoms along it) of node outputs.

    Args:
        traced: the module.
        exact: compute all values.
    """

    def __init__(self, traced: Traced, exact: bool = False) -> None:
        super().__init__(Atoms())
        self.traced, self.exact = traced, exact
        self.unknown_ops: list[tuple[str, str]] = []
        self.seen: list[tuple[str, int, np.ndarray]] = []
        self.slots = np.zeros(0, np.int64)
        self._labels = WeakTensorKeyDictionary()  # as long as a value lives
        self._names: dict[tuple[Any, ...], str] = {}
        self._state: dict[tuple[Any, ...], str] = {}
        self.aliases: dict[str, tuple[str, ...]] = {}
        for root in (traced.graph_module, traced.source):  # the source has every name, the graph only those it uses
            for name, p in root.named_parameters(remove_duplicate=False):
                self._register(name, p, self._names)
            for name, b in root.named_buffers(remove_duplicate=False):
                trained = name.rpartition(".")[2] in _TRAINED and b.is_floating_point()
                self._register(name, b, self._names if trained else self._state)

    def _register(self, name: str, t: Tensor, table: dict[tuple[Any, ...], str]) -> None:
        if not t.numel():
            return
        first = table.setdefault(_key(t), name)
        if name not in (first, *self.aliases.get(first, ())):
            self.aliases[first] = (*self.aliases.get(first, ()), name)

    # -- looking labels up ---------------------------------------------------------------------------------------

    def label_of(self, t: Tensor) -> Label | None:
        """The label of a tensor; None for constants."""
        held = self._held(t)
        if held is not None:
            return held
        name = self._names.get(_key(t)) if t.numel() and not t.is_sparse else None
        return None if name is None else self._remember(t, self._parameter(name, t))

    def _held(self, t: Tensor) -> Label | None:
        found: Label | None = self._labels.get(t)
        return found

    def is_constant(self, t: Tensor) -> bool:
        """Whether a value depends on neither inputs nor parameters."""
        return t not in self._labels and not (t.numel() and _key(t) in self._names)

    def state(self, t: Tensor | Label) -> Label:
        """A buffer that is trained state (running statistics): labelled like a parameter."""
        if isinstance(t, Label):
            return t
        held = self._held(t)
        if held is not None:
            return held
        name = self._state.get(_key(t))
        return self.constant(t) if name is None else self._remember(t, self._parameter(name, t))

    def weight(self, t: Tensor, groups: int) -> Label:
        """A convolution's weight, [out, in / groups, *kernel] or, transposed, [in, out / groups, *kernel].

        With groups, every group of rows has entries of its own along axis 1.
        """
        held = self._held(t)
        name = self._names.get(_key(t))
        if held is not None or name is None:
            return self.constant(t) if held is None else held
        count, inside = t.shape[:2]
        neurons = []
        rows = self.site(Site(name, 0), count)
        columns = self.site(Site(name, 1, groups), groups * inside)
        inner = torch.from_numpy(columns).reshape(groups, inside)
        if groups > 1:
            inner = inner.repeat_interleave(count // groups, 0)
            group = np.arange(groups)
            _, block = self.atoms.blocks(rows, group.repeat(count // groups))
            self.atoms.under(columns, block.repeat(inside))
        shape = tuple(t.shape)
        if count > 1:
            neurons.append(torch.from_numpy(rows).reshape(count, *[1] * (len(shape) - 1)))
        if inner.numel() > 1:
            neurons.append(inner.reshape(-1, inside, *[1] * (len(shape) - 2)))
        fixed = self.positions(shape, range(2, len(shape)))
        return self._remember(t, Label(shape, tuple(neurons), fixed, self.atoms.mark(), learned=True))

    def lift(self, x: Any) -> Label:
        """A label for any argument: constants by value."""
        if isinstance(x, Label):
            return x
        if isinstance(x, Tensor):
            return self.constant(x)
        return Label((), learned=True)

    def _parameter(self, name: str, t: Tensor) -> Label:
        """Every index of every axis is a neuron."""
        shape = tuple(t.shape)
        neurons = []
        for d, size in enumerate(shape):
            if size > 1:
                sizes = [size if k == d else 1 for k in range(len(shape))]
                neurons.append(torch.from_numpy(self.site(Site(name, d), size)).reshape(sizes))
        return Label(shape, tuple(neurons), kind=self.atoms.mark(), learned=True)

    def _remember(self, t: Tensor, label: Label) -> Label:
        self._labels[t] = label
        return label

    # -- running -------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Runs the graph once; afterwards ``atoms``, ``sites``, ``reads`` and ``seen`` hold all there is to know."""
        traced = self.traced
        runner = _Runner(traced.graph_module, self)
        given = [x for x in pytree.tree_leaves((traced.args, dict(traced.kwargs))) if isinstance(x, Tensor)]
        for t in given:
            fixed = tuple(t + 1 for t in self.positions(t.shape))  # told apart from positions made inside
            label = Label(tuple(t.shape), fixed=fixed, kind=self.atoms.mark(), why="the network's input")
            self._remember(t, label)
        unread = torch._C.DisableTorchFunctionSubclass()  # labels need no values: parameters on disk stay there
        with evaluating(traced.graph_module), _without_fast_paths(), enable_python_dispatcher(), unread, _Watch(self):
            outputs = runner.run(*bind(traced.graph_module.graph, traced.args, traced.kwargs))
        for t in pytree.tree_leaves(outputs):
            if isinstance(t, Tensor) and (made := self.label_of(t)) is not None:
                self.place = "output"
                self.pin(self.settle(made), OUTPUT)
        self.settle_rows()
        self.slots = find_slots(self.atoms, self.met)
        self._labels.clear()
        self._pin_unread()

    def _pin_unread(self) -> None:
        """Entries of parameters that this run did not read, such as rows of later positions: other inputs may."""
        everything = np.arange(self.atoms.size)
        root = self.atoms.find(everything)
        unread = (np.bincount(root, minlength=root.size)[root] == 1) & (self.atoms.origin(everything) >= 0)
        touched = [ids[ids >= 0] for _, _, ids in self.seen]
        touched += [x for edge in self.atoms.edges for x in edge] + [who for who, _, _ in self.atoms.tags]
        if touched:
            unread[root[np.concatenate(touched)]] = False
        if unread.any():
            self.atoms.pin(np.flatnonzero(unread), _UNREAD)

    def see(self, node: fx.Node, value: Any) -> None:
        """Notes in which dimension of a node's output which neurons show."""
        if node.op == "get_attr":  # a parameter is labelled by its use
            return
        if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
            return  # counts of what was chosen, masks: no activations
        label = self.label_of(value)
        if label is not None and not self.holds_rows(label):  # every network brings these into an order of its own
            for t in label.neurons:
                axes = varying(t)
                if len(axes) == 1:
                    self.seen.append((node.name, axes[0], t.numpy().ravel()))

    def before_writing(self, args: Sequence[Any]) -> None:
        """Constants that an operation is about to write labelled values into: what they are is known only now."""
        if all(self.is_constant(t) for t in leaves(args) if isinstance(t, Tensor)):
            return
        for t in (args[0], getattr(args[0], "_base", None)):
            if isinstance(t, Tensor) and self.is_constant(t):
                self._remember(t, self.constant(t))

    def apply(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        """The rule of one operator call: reads the labels of its arguments, writes those of its results."""
        flat = [t for t in leaves((*args, *kwargs.values())) if isinstance(t, Tensor)]
        name = operation_name(function)
        rule = RULES.get(name)
        pending = name in _WEIGHTS  # label these weights by their use
        skip = args[1] if pending and len(args) > 1 else None
        known = [t for t in flat if t is not skip and self.label_of(t) is not None]
        if not known and (skip is None or _key(skip) not in self._names):
            return
        outputs = [t for t in leaves((result,)) if isinstance(t, Tensor)]
        given = defaults(function)
        bound = {**given, **dict(zip(given, args, strict=False)), **kwargs}
        arguments = {k: self._labelled(v, skip, name in FOLLOWED) for k, v in bound.items()}
        if skip is not None:
            arguments["weight"] = self.weight(skip, arguments["groups"])
        strides = flat[0].stride() if name == "as_strided" and not flat[0].storage_offset() else None
        call = Call(name, function, arguments, tuple(tuple(t.shape) for t in outputs), strides)
        made: Any = None
        if outputs and not any(t.numel() for t in outputs):
            if name not in MOVEMENT or VALUES_DECIDE in self.traced.notes:  # what other inputs find is not known
                for label in call.labels():
                    self.pin(label, _UNREAD)
            made = [Label(tuple(t.shape)) for t in outputs]
        elif rule is not None:
            made = rule(self, call)
        if made is None or made is NotImplemented:
            self.unknown_ops.append((self.place, name))
            for label in call.labels():
                self.pin(label, f"no rule for {name} at {self.place}")
            made = [self.unknown(t.shape) for t in outputs]
        made = [made] if isinstance(made, Label) else list(made)
        if name not in MOVEMENT:
            said = combine([zlib.crc32(name.encode()), *map(self._kind, leaves(arguments.values()))])
            made = [replace(label, kind=combine([said, k])) for k, label in enumerate(made)]
        before = args[0] if function._schema.is_mutable and args else None
        for t, label in zip(outputs, made, strict=False):
            if t is before and t._base is not None and t._base is not t:
                self._write_through(t, label)
            self._labels[t] = label

    def _labelled(self, x: Any, skip: Any, followed: bool) -> Any:
        """An argument with labels in the place of tensors, but for ``skip`` and constants."""
        if isinstance(x, (list, tuple)):
            return [self._labelled(y, skip, followed) for y in x]
        if not isinstance(x, Tensor) or x is skip:
            return x
        label = self.label_of(x)
        return x if label is None else label if followed else self.settle(label)

    def _kind(self, argument: Any) -> int:
        """A hash of one argument, for the kind of what an operation makes."""
        if isinstance(argument, Label):
            return argument.kind
        if isinstance(argument, Tensor):
            if argument.numel() > 64:
                return self.atoms.mark()
            argument = argument.tolist()
        return zlib.crc32(repr(argument).encode())

    def _write_through(self, view: Tensor, label: Label) -> None:
        """An in-place operation on a view changes what stands in that part of its base."""
        old = self.label_of(view)
        base = view._base
        if base is None or (old is not None and _same(old.neurons, label.neurons) and _same(old.fixed, label.fixed)):
            return
        around = self.label_of(base) or self.constant(base)
        if not base.is_contiguous():
            self.pin(around, f"written in place at {self.place}")
            self.pin(label, f"written in place at {self.place}")
            return
        geometry = (tuple(view.shape), tuple(view.stride()), view.storage_offset() - base.storage_offset())

        def write(tensors: list[Tensor]) -> Tensor:
            whole = tensors[0].contiguous().clone()
            whole.as_strided(*geometry).copy_(tensors[1])
            return whole

        self._remember(base, self.join([around, label], write, around.shape))


def _same(x: Sequence[Tensor], y: Sequence[Tensor]) -> bool:
    return len(x) == len(y) and all(a is b for a, b in zip(x, y, strict=True))


_UNREAD = "not read on the example inputs"
_CONVOLUTIONS = frozenset(f"conv{t}{n}d" for t in ("", "_transpose") for n in (1, 2, 3))
_WEIGHTS = _CONVOLUTIONS | {"torchvision::deform_conv2d"}
_HEAVY = frozenset(
    f"aten::{name}" for name in (*_CONVOLUTIONS, "linear", "matmul", "bmm", "einsum", "scaled_dot_product_attention")
)
_TRAINED = frozenset("running_mean running_var weight bias weight_u weight_v _u _v".split())
"""Names under which layers keep trained state in buffers: frozen and running statistics, singular vectors."""


class _Watch(SchemaCheckMode):
    """Hands every operator call to the interpretation, after running it.

    Modes at the pre-dispatch level, where operators are still whole, must derive from one of three classes of torch;
    of these this is the one that runs operators eagerly on real tensors.
    """

    def __init__(self, interpretation: Interpretation) -> None:
        TorchDispatchMode.__init__(self, _dispatch_key=torch._C.DispatchKey.PreDispatch)
        self._interpretation = interpretation

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing here is compiled, and skipping the compiler would import it: seconds in every process."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with no_python_dispatcher():  # whatever runs below this level need not be watched
            if func._schema.is_mutable:
                self._interpretation.before_writing(args)
            result = self._shaped(func, args, kwargs) if func._schema.name in _HEAVY else func(*args, **kwargs)
            self._interpretation.apply(func, args, kwargs, result)
        return result

    def _shaped(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A contraction of labelled values is not computed, only its shape is."""
        found = self._interpretation
        if found.exact or all(found.is_constant(t) for t in leaves(args) if isinstance(t, Tensor)):
            return func(*args, **kwargs)
        name, (x, w) = func._schema.name, args[:2]
        if name == "aten::linear":
            return x.new_zeros((*x.shape[:-1], *w.shape[:-1]))
        if name == "aten::matmul":
            batch = torch.broadcast_shapes(x.shape[:-2], w.shape[:-2])
            return x.new_zeros((*batch, *x.shape[-2:-1], *(w.shape[-1:] if w.dim() > 1 else ())))
        if name == "aten::scaled_dot_product_attention":
            return x.new_zeros((*x.shape[:-1], args[2].shape[-1]))
        given = pytree.tree_map(lambda t: t.to("meta") if isinstance(t, Tensor) else t, args)
        like = next(t for t in leaves(args) if isinstance(t, Tensor))
        return like.new_zeros(func(*given, **kwargs).shape)


class _Runner(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, interpretation: Interpretation) -> None:
        super().__init__(module, garbage_collect_values=True)
        self._interpretation = interpretation

    def run_node(self, n: fx.Node) -> Any:
        self._interpretation.place = n.name
        value = super().run_node(n)
        found = self._interpretation
        if not found.exact and isinstance(value, Tensor) and value.shape != found.traced.shapes[n.name]:
            raise ValuesNeededError(f"{n.name} is of shape {list(value.shape)}")
        with no_python_dispatcher():
            found.see(n, value)
        return value


@contextmanager
def _without_fast_paths() -> Any:
    """Attention is run as projections and scaled dot products, not as one opaque fused kernel."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
