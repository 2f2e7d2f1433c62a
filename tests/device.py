"""A device that is none: tensors that say they are on an accelerator, and hold their values on the CPU.

``pretending`` runs every operation on the values, if it would run on an accelerator: all its tensors are there, or on
the CPU without axes. It refuses to mix, and notes where values come back to the host, for which an accelerator waits.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fxmerge.interfaces import Problem

try:
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
except ImportError:
    pytest.skip(f"torch {torch.__version__} has no such device", allow_module_level=True)

DEVICE = torch.device("privateuseone:0")

# Operations whose outcome the host must know: they wait for all that was queued before.
WAITING = frozenset(
    """
    _local_scalar_dense item equal is_nonzero nonzero masked_select unique _unique2 unique_dim unique_consecutive
    repeat_interleave bincount
    """.split()
)
# Operations that may have tensors on two devices.
CROSSING = frozenset({"copy_", "_to_copy"})


class Far(Tensor):
    """On the device; ``near`` has the values."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> Far:
        layout = {"strides": near.stride(), "storage_offset": near.storage_offset(), "dtype": near.dtype}
        made = Tensor._make_wrapper_subclass(cls, near.size(), device=DEVICE, **layout)
        made.near = near
        return made

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.near.untyped_storage()

    def data_ptr(self) -> int:
        return self.near.data_ptr()

    def tolist(self) -> Any:
        waits[place()] += 1
        return self.near.tolist()

    def __repr__(self) -> str:
        return f"Far({self.near})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Mixed(RuntimeError):
    """An operation on tensors of two devices."""


waits: Counter[str] = Counter()
"""Function of the package -> how often the host waited there."""


def place() -> str:
    """The function of the package that is at work."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith("fxmerge."):
            return f"{name.removeprefix('fxmerge.')}.{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func.overloadpacket.__name__
    flat, spec = pytree.tree_flatten((args, kwargs))
    far = [x for x in flat if isinstance(x, Far)]
    near = [x for x in flat if isinstance(x, Tensor) and not isinstance(x, Far)]
    if far and name not in CROSSING and any(x.dim() for x in near):
        raise Mixed(f"{func} in {place()}: " + ", ".join(f"{x.device.type} {list(x.shape)}" for x in (*far, *near)))
    goal = kwargs.get("device")
    homeward = bool(far) and goal is not None and torch.device(goal).type == "cpu"
    homeward = homeward or (name == "copy_" and not isinstance(args[0], Far) and bool(far))
    masks = name == "index" and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    if far and (homeward or masks or name in WAITING):
        waits[place()] += 1
    values = [x.near if isinstance(x, Far) else x for x in flat]
    values = [torch.device("cpu") if isinstance(x, torch.device) else x for x in values]
    near_args, near_kwargs = pytree.tree_unflatten(values, spec)
    out = func(*near_args, **near_kwargs)
    made_there = goal is not None and torch.device(goal).type == DEVICE.type
    if homeward or not (made_there or (far and goal is None)):
        return out
    known = {id(x.near): x for x in far}
    return pytree.tree_map(lambda x: known.get(id(x), x) if id(x) in known else wrapped(x), out)


def wrapped(x: Any) -> Any:
    return Far(x) if isinstance(x, Tensor) else x


class _Dispatch(TorchDispatchMode):
    """Makes tensors on the device, where no argument says so."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class _Literals(TorchFunctionMode):
    """``torch.tensor`` with a device copies there below the level of dispatch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == DEVICE.type:
            return Far(func(*args, **kwargs | {"device": "cpu"}))
        return func(*args, **kwargs)


@contextmanager
def pretending() -> Iterator[None]:
    """Inside, tensors can be made on and moved to ``DEVICE``."""
    if not hasattr(torch, DEVICE.type):
        _setup_privateuseone_for_python_backend()
    waits.clear()
    with _Literals(), _Dispatch(), patch.object(Problem, "threads", 1):  # modes hold for one thread
        yield
