"""The options of a merge as plain data, and back: what ``recipe.json`` and recipes written by hand hold.

    {"matcher": PLeaS(1.3), "repair": None, ..}  --describe_options-->  strings, numbers, lists, dicts
                                                 <--read_options------

A method is {"name": "PLeaS", "options": {"budget": 1.3}}, or what one types: "PLeaS(budget=1.3)". Only matchers,
repairs and depth aligners of this package can be named: nothing is imported by a name that comes from a file.
"""

from __future__ import annotations

import ast
import inspect
import math
import types
from collections.abc import Mapping, Sequence
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from torch import nn

from fxmerge import matchers, repair
from fxmerge.depth import CLAFusion
from fxmerge.errors import InputError, told
from fxmerge.interfaces import AbstractDepthAligner, AbstractMatcher, AbstractRepair

Method = AbstractMatcher | AbstractRepair | AbstractDepthAligner

# option of ``merge`` -> what a recipe may say for it: plain types, and words or names of methods.
OPTIONS: dict[str, Any] = {
    "matcher": AbstractMatcher | None,
    "weights": Sequence[float] | Mapping[str, Sequence[float]] | None,
    "heads": str,
    "depth": AbstractDepthAligner,
    "target": str | None,
    "repair": AbstractRepair | None,
    "seed": int,
    "device": str,
    "strict": bool,
    "verify": bool,
}
"""The options of ``merge`` that a recipe holds, and their types."""

FACTS = ("parents", "inputs", "input_fn", "data", "versions", "result")
"""What else is in a ``recipe.json``: what was merged, and what came of it."""

_WORDS: dict[type, tuple[str, ...]] = {
    AbstractMatcher: ("auto",),
    AbstractRepair: ("auto",),
    AbstractDepthAligner: ("grow", "shrink"),
}
_METHODS: dict[type, dict[str, type[Any]]] = {
    AbstractMatcher: {name: getattr(matchers, name) for name in matchers.__all__},
    AbstractRepair: {name: getattr(repair, name) for name in repair.__all__},
    AbstractDepthAligner: {"CLAFusion": CLAFusion},
}
_NONFINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def describe_options(options: Mapping[str, Any], parents: Sequence[nn.Module] = ()) -> dict[str, Any]:
    """Options of ``merge`` as JSON can hold them, every option of every method spelled out.

    A ``target`` that is one of the ``parents`` becomes {"parent": its number from 0}, another network the name of its
    type. A method of one's own is described too, but ``read_options`` cannot make it again.
    """
    described = {}
    for key, value in options.items():
        if key == "target" and isinstance(value, nn.Module):
            position = next((k for k, p in enumerate(parents) if p is value), None)
            described[key] = {"model": type(value).__name__} if position is None else {"parent": position}
        else:
            described[key] = _plain(value)
    return described


def read_options(recipe: Mapping[str, Any], parents: Sequence[nn.Module] = ()) -> dict[str, Any]:
    """Keyword arguments for ``merge`` from a recipe; what it does not mention keeps ``merge``'s default.

    Args:
        recipe: options as ``describe_options`` writes them or as one writes them by hand. ``FACTS`` are passed over.
        parents: the networks that a ``target`` of {"parent": k} counts.

    Raises:
        InputError: an unknown option or method, or a value that cannot be meant; the message says what can.
    """
    if not isinstance(recipe, Mapping):
        raise InputError(f"a recipe is a mapping of options, not a {type(recipe).__name__}")
    if unknown := [key for key in recipe if key not in OPTIONS and key not in FACTS]:
        raise InputError(f"the recipe has no option {unknown[0]!r}; known are {', '.join(OPTIONS)}")
    options = {key: value for key, value in recipe.items() if key in OPTIONS}
    target = options.get("target")
    found = {key: _read(key, value, OPTIONS[key]) for key, value in options.items() if key != "target"}
    if isinstance(target, Mapping):
        place = target.get("parent")
        if type(place) is not int or not 0 <= place < len(parents):
            raise InputError(f"target: {dict(target)} is a network that the recipe does not hold: pass target=network")
        found["target"] = parents[place]
    elif "target" in options:
        found["target"] = _read("target", target, OPTIONS["target"])
    return found


def _plain(value: Any) -> Any:
    """A value of an option; what JSON cannot hold as it is written in Python."""
    if isinstance(value, Method):
        known = inspect.signature(type(value)).parameters
        return {
            "name": type(value).__name__,
            "options": {key: _plain(getattr(value, key)) for key in known if hasattr(value, key)},
        }
    if isinstance(value, Mapping):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple, torch.Tensor)):
        return [_plain(v) for v in (value.tolist() if isinstance(value, torch.Tensor) else value)]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value) if isinstance(value, torch.device) else repr(value)


def _read(where: str, value: Any, hint: Any) -> Any:
    """``value`` as one of the types that ``hint`` allows."""
    if isinstance(value, dict) and len(value) == 1 and (number := _NONFINITE.get(str(value.get("float")))) is not None:
        value = number
    alternatives = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for kind in alternatives:
        if kind in _METHODS and (isinstance(value, str) or (isinstance(value, Mapping) and "name" in value)):
            return value if value in _WORDS[kind] else _method(where, value, kind)
        if _fits(value, kind):
            return value
    said = " or ".join(_spoken(kind) for kind in alternatives)
    raise InputError(f"{where}: {str(value)[:80]!r} is no {said}")


def _fits(value: Any, kind: Any) -> bool:
    outer, inner = get_origin(kind) or kind, get_args(kind)
    if outer is Mapping:
        return isinstance(value, Mapping) and all(isinstance(k, str) and _fits(v, inner[1]) for k, v in value.items())
    if outer is Sequence:
        return isinstance(value, (list, tuple)) and all(_fits(v, inner[0]) for v in value)
    if outer is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if outer is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, outer)


def _spoken(kind: Any) -> str:
    if kind in _METHODS:
        return f"method (one of {', '.join([*_WORDS[kind], *_METHODS[kind]])})"
    names = {float: "number", int: "whole number", str: "text", bool: "true or false", types.NoneType: "null"}
    return names.get(kind) or str(kind).replace("collections.abc.", "")


def _method(where: str, value: Any, kind: type) -> Method:
    """The method that {"name": .., "options": ..} or a text such as "PLeaS(budget=1.3)" describes."""
    spec = _typed(where, value) if isinstance(value, str) else dict(value)
    name, options = spec.pop("name"), spec.pop("options", None) or {}
    if not isinstance(name, str) or name not in _METHODS[kind]:
        choices = ", ".join([*_WORDS[kind], *_METHODS[kind]])
        raise InputError(f"{where}: {str(name)[:80]!r} is unknown; choose one of {choices}")
    if spec or not isinstance(options, Mapping):
        raise InputError(f"{where}: write {{name: {name}, options: {{..}}}}, and nothing besides")
    cls = _METHODS[kind][name]
    hints = get_type_hints(cls.__init__) if "__init__" in vars(cls) else {}
    known = [key for key in hints if key != "return"]
    if unknown := [key for key in options if key not in known]:
        raise InputError(f"{where}: {name} has no option {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    given = {key: _read(f"{where}: {name}({key})", v, hints[key]) for key, v in options.items()}
    try:
        return cls(**given)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{where}: {name} cannot be made with {given}: {told(error)}") from None


def _typed(where: str, text: str) -> dict[str, Any]:
    """{"name": .., "options": ..} of a method as one types it in Python; read, not run."""

    def value(node: ast.expr) -> Any:
        if not isinstance(node, ast.Call):
            return ast.literal_eval(node)
        if node.args or any(k.arg is None for k in node.keywords):
            raise ValueError
        return {"name": ast.unparse(node.func), "options": {str(k.arg): value(k.value) for k in node.keywords}}

    if "(" not in text:
        return {"name": text}
    try:
        made = value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        raise InputError(f"{where}: {text[:80]!r} is not written like PLeaS(budget=1.3)") from None
    if not isinstance(made, dict):
        raise InputError(f"{where}: {text[:80]!r} is no method")
    return made
