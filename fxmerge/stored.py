"""Parameters that stay on disk: a network of them runs and merges, with one tensor at a time in memory.

on_disk(model, path)  ->  a copy of the model; every operation on one of its parameters reads that first
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from fxmerge.errors import InputError, few
from fxmerge.shards import Shards


class Made(Mapping[str, Tensor]):
    """Tensors by name, each made anew whenever it is asked for."""

    def __init__(self, names: Iterable[str], make: Callable[[str], Tensor]) -> None:
        self._names = dict.fromkeys(names)
        self._make = make

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Stored(nn.Parameter):
    """A parameter that is read by every operation that takes it; of itself it is NaN and takes one number.

    What asks for its shape, its device or the like reads nothing; what would write to it is refused.

    Attributes:
        read: its values, as a plain tensor.
    """

    read: Callable[[], Tensor]

    def __new__(cls, read: Callable[[], Tensor], like: Tensor, requires_grad: bool = True) -> Stored:
        """``like``: of its dtype and shape, on the meta device say."""
        dtype = like.dtype
        one = torch.full((), float("nan") if dtype.is_floating_point or dtype.is_complex else 0, dtype=dtype)
        made = torch.Tensor._make_subclass(cls, one.expand(like.shape), requires_grad)
        made.read = read
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Stored:
        memo[id(self)] = made = Stored(self.read, self, self.requires_grad)
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in _ABOUT:
                return func(*args, **(kwargs or {}))
            name = func.__name__
            if args and isinstance(args[0], Stored) and (name in _WRITING or _in_place(name)):
                raise InputError(f"a parameter that stays on disk cannot be written to ({name}); load the network")
            args, kwargs = pytree.tree_map(value_of, (args, kwargs or {}))
            return func(*args, **kwargs)


def _asking(attributes: str, methods: str = "") -> frozenset[Any]:
    """The functions behind attributes and methods of tensors, as far as this version of torch has them."""
    found = [getattr(Tensor, n).__get__ for n in attributes.split() if hasattr(Tensor, n)]
    return frozenset(found + [getattr(Tensor, n) for n in methods.split()])


GEOMETRY = _asking(
    "shape ndim device layout requires_grad grad grad_fn is_leaf is_cuda is_cpu is_meta is_sparse is_quantized",
    "size dim ndimension numel nelement stride storage_offset is_contiguous get_device requires_grad_ __len__ __hash__",
)
"""What asks for neither the values of a tensor nor its dtype."""

_ABOUT = (
    GEOMETRY
    | _asking(
        "dtype itemsize nbytes is_nested _version _base _backward_hooks is_mps is_mkldnn is_xla is_xpu",
        "element_size data_ptr untyped_storage is_floating_point is_complex",
    )
    | {torch.is_floating_point, torch.is_complex, torch.numel}
    | {getattr(Tensor, name).__set__ for name in ("requires_grad", "grad")}
)
_WRITING = frozenset({"__set__", "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"})


def _in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def value_of(x: Any) -> Any:
    """What a parameter on disk holds; anything else as it is."""
    return x.read() if isinstance(x, Stored) else x


def stays_on_disk(module: nn.Module) -> bool:
    return any(isinstance(p, Stored) for p in module.parameters())


def read_when_asked(held: Mapping[str, Tensor]) -> Made:
    """The same tensors, detached; those on disk are read whenever they are asked for."""
    return Made(held, lambda name: value_of(held[name]).detach())


def on_disk(model: nn.Module, path: str | Path) -> nn.Module:
    """A copy of ``model`` whose parameters stay in a checkpoint: ``merge`` streams them, one tensor at a time.

    The result is an ``nn.Module`` that runs, if slowly: every operation reads the parameters that it takes, and drops
    them. Buffers are read at once. It cannot be trained or moved.

    Args:
        model: says what the network is; its own parameters do not matter and may be on the meta device. Buffers that
            are not in the checkpoint (non-persistent ones) must have their values.
        path: a safetensors file, or a folder with ``model.safetensors`` or ``model.safetensors.index.json``.

    Raises:
        FormatError: a file is missing or damaged, see ``Shards``.
        InputError: names, shapes or dtypes of the model and the checkpoint differ, or a buffer has no values.

    Example:
        >>> with torch.device("meta"):
        ...     net = Net()
        >>> result = fxmerge.merge(on_disk(net, "a.safetensors"), on_disk(net, "folder_b"), example_inputs=x)
        >>> result.save("merged")
    """
    shards = Shards(path)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    tensors = parameters | buffers
    if lazy := [n for n, t in tensors.items() if is_lazy(t)]:
        raise InputError(f"{few(lazy)} of {type(model).__name__} have no shapes yet; run the module once")
    _require_fit(model, tensors, shards)
    names: dict[int, list[str]] = {}
    for name, t in tensors.items():
        names.setdefault(id(t), []).append(name)
    copies: dict[int, Any] = {}
    for key, known in names.items():
        t, held = tensors[known[0]], [n for n in known if n in shards]
        if any(not torch.equal(shards[held[0]], shards[n]) for n in held[1:]):
            raise InputError(f"{few(held)} are one tensor in the model and differ in {path}")
        if held and known[0] in parameters:
            copies[key] = Stored(partial(shards.__getitem__, held[0]), t, t.requires_grad)
        elif held:
            copies[key] = shards[held[0]].clone()
    return copy.deepcopy(model, copies)


def _require_fit(model: nn.Module, tensors: Mapping[str, Tensor], shards: Shards) -> None:
    what = f"{shards.path} does not fit {type(model).__name__}"
    same: dict[int, list[str]] = {}
    for name, t in tensors.items():
        same.setdefault(id(t), []).append(name)
    kept = model.state_dict(keep_vars=True).keys()
    lacking = [n for n in kept if n in tensors and not any(m in shards for m in same[id(tensors[n])])]
    if lacking:
        raise InputError(f"{what}: it has no {few(lacking)}. Give the checkpoint of this network, with the same names")
    if odd := [n for n in shards if n not in tensors]:
        raise InputError(f"{what}: the network has no {few(odd)}. Give the model that the checkpoint was saved from")
    for name, like in shards.like.items():
        t = tensors[name]
        if t.shape != like.shape:
            raise InputError(f"{what}: {name!r} is {list(like.shape)} there and {list(t.shape)} in the model")
        if t.dtype != like.dtype:
            raise InputError(
                f"{what}: {name!r} is {like.dtype} there and {t.dtype} in the model. Give model.to({like.dtype}): "
                "on the meta device that costs nothing"
            )
    plain = {
        f"{path}.{key}".lstrip("."): value
        for path, m in model.named_modules()
        for key, value in vars(m).items()
        if isinstance(value, Tensor)
    }
    if empty := [
        n for n, t in {**tensors, **plain}.items() if t.is_meta and not any(m in shards for m in same.get(id(t), ()))
    ]:
        raise InputError(
            f"{what}: {few(empty)} are in no checkpoint, and on the meta device have no values. Put only parameters "
            "there (accelerate.init_empty_weights() does so), or give these buffers their values"
        )
