"""What a saved folder may name: functions, methods and classes of torch and torchvision, and nothing else.

Nothing is imported by a name that comes from a file.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import operator
import sys
import types
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import get_overridable_functions

from fxmerge.errors import FormatError

_BUILTINS = (abs, bool, complex, divmod, float, getattr, int, len, list, max, min, pow, round, slice, sum, tuple)
ATTRIBUTES = frozenset(  # of tensors, devices, dtype limits and layers, of the named results of max, svd and the like
    "shape dtype device layout ndim T mT H mH real imag data itemsize nbytes requires_grad is_cpu is_cuda is_mps "
    "is_xpu is_meta is_leaf is_nested is_quantized is_sparse type index min max eps tiny values indices sign logabsdet "
    "U S V Vh Q R L LU pivots P eigenvalues eigenvectors solution training".split()
)
_UNSAFE = frozenset(  # memory, files and callbacks
    "from_file from_numpy frombuffer apply_ map_ map2_ set_ data_ptr const_data_ptr storage storage_type "
    "untyped_storage numpy share_memory_ record_stream register_hook register_post_accumulate_grad_hook "
    "module_load backward".split()
)
_METHODS_BESIDES = "new_empty new_full new_ones new_tensor new_zeros as_strided stride unflatten".split()
_FUNCTION = (types.FunctionType, types.BuiltinFunctionType)
_CONVERSIONS = ("__bool__", "__complex__", "__float__", "__int__", "__len__")


@cache
def functions() -> dict[str, Callable[..., Any]]:
    """Dotted name -> function, for all that a graph may call apart from torchvision's."""
    native = [getattr(torch._C, name) for name in ("_VariableFunctions", "_nn", "_fft", "_linalg", "_special")]
    allowed = {f for group in get_overridable_functions().values() for f in group}
    allowed |= {getattr(n, name) for n in native for name in dir(n) if not name.startswith("_")}
    allowed |= {f for f in vars(F).values() if getattr(f, "__module__", "") == F.__name__ and callable(f)}
    allowed |= {torch.is_tensor, torch.broadcast_shapes, torch.get_default_dtype}
    found: dict[str, Callable[..., Any]] = {"torch._assert": torch._assert}
    for space in ("torch", "torch.nn.functional", "torch.linalg", "torch.fft", "torch.special", "torch._C._nn"):
        members = vars(sys.modules[space])
        for name in sorted(members.keys() - _UNSAFE):
            if isinstance(members[name], _FUNCTION) and members[name] in allowed and not name.startswith("_"):
                found[f"{space}.{name}"] = members[name]
    operators = set(operator.__all__) - {"attrgetter", "call", "itemgetter", "methodcaller"}
    found |= {f"operator.{name}": getattr(operator, name) for name in operators}
    found |= {f"math.{name}": f for name, f in vars(math).items() if callable(f) and not name.startswith("_")}
    return found | {f"builtins.{f.__name__}": f for f in _BUILTINS}


@cache
def _function_names() -> dict[Callable[..., Any], str]:
    return {f: name for name, f in reversed(functions().items())}


@cache
def methods() -> frozenset[str]:
    """Names of the tensor methods that a graph may call."""
    overridable = set(get_overridable_functions()[torch.Tensor])
    names = {name for name in dir(Tensor) if callable(f := getattr(Tensor, name)) and f in overridable}
    operators = {name for name in names if name in vars(operator) or f"__{name[3:]}" in vars(operator)}  # __radd__ too
    public = {name for name in names if not name.startswith("_")}
    return frozenset((public - _UNSAFE).union(operators, _CONVERSIONS, _METHODS_BESIDES))


def _member(name: str, *spaces: str) -> Any:
    """What ``name`` names in a module that is imported anyway and inside one of ``spaces``; None if nothing is."""
    space, _, attribute = name.rpartition(".")
    if not space.startswith(spaces):
        return None
    if space.startswith("torchvision."):
        importlib.import_module("torchvision")
    found = vars(sys.modules[space]).get(attribute) if space in sys.modules else None
    return found if getattr(found, "__module__", None) == space else None


def function(name: str) -> Callable[..., Any]:
    """The function of that dotted name, if a graph may call it."""
    if name in functions():
        return functions()[name]
    found = _member(name, "torchvision.ops.", "torchvision.models.")
    if isinstance(found, types.FunctionType):
        # Of torchvision.models only what fx.wrap made an operation: other functions there may read the network.
        wrapped = (id(found.__globals__), found.__name__) in fx._symbolic_trace._wrapped_fns_to_patch
        if wrapped or name.startswith("torchvision.ops."):
            return found
    raise FormatError(f"the function {name!r} is not on the allow-list; write it with functions of torch")


def function_name(target: Any) -> str:
    """The name under which ``function`` finds ``target``."""
    name = f"{getattr(target, '__module__', None)}.{getattr(target, '__qualname__', target)}"
    name = _function_names().get(target, name)
    if function(name) is not target and target not in _function_names():
        raise FormatError(f"{name!r} is no longer the function of that name")
    return name


def module_class(name: str) -> type[nn.Module]:
    """The class of that dotted name, if a folder may hold such modules."""
    cls = _member(name, "torch.nn.modules.", "torchvision.ops.")
    if inspect.isclass(cls) and issubclass(cls, nn.Module):
        return cls
    raise FormatError(f"the class {name!r} is not in torch.nn or torchvision.ops; build it from modules of torch.nn")
