"""A graph module as a Python file for people: every layer with its arguments, and ``forward`` as fx prints it.

The file runs and has the module's ``state_dict`` keys, but ``fxmerge.load`` never reads it.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from keyword import iskeyword
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxmerge.document import construct, decode, describe_module, fill
from fxmerge.vocabulary import module_class

_HEAD = '''"""{name}, as fxmerge wrote it: for reading. ``fxmerge.load`` loads the folder and does not run this file.

Tensors are empty until ``load_state_dict`` fills them.
"""

{imports}


def group(children):
    """A module that only holds others."""
    module = nn.Module()
    for name, child in children.items():
        module.register_module(name, child)
    return module


class {name}(nn.Module):
    def __init__(self):
        super().__init__()
{body}

{forward}


if __name__ == "__main__":
    print({name}())
'''
_PLAIN = "torch.nn.modules.module.Module"


def listing(module: fx.GraphModule, document: Mapping[str, Any]) -> str:
    """The source of a class that is like ``module``, of which ``document`` is the description."""
    spec, records = document["modules"], document["tensors"]
    code = module.graph.python_code("self")
    source = code.src[code.src.index("def forward") :]  # without the notes of fx.wrap
    rows = (re.sub(r"; +(\w+ = )+None$", "", line).rstrip() for line in source.splitlines())
    forward = "\n".join("    " + row for row in rows if row)
    lines = [_assigned("self", key, _made(child, 8)) for key, child in spec["children"].items()]
    lines += _differing(spec, "self")
    lines += _tensors(spec, records)
    if not any(m.training for m in module.modules()):
        lines.append("self.eval()")
    else:
        lines += [f"{_at(path)}.training = False" for path, m in module.named_modules() if not m.training]
    body = "\n".join("        " + line for line in lines) or "        pass"
    imports = _imports({**code.globals, "torch": torch}, forward + body)
    return _HEAD.format(name=document["class"], imports=imports, body=body, forward=forward)


def _is_name(key: str) -> bool:
    return key.isidentifier() and not iskeyword(key)


def _assigned(owner: str, key: str, expression: str) -> str:
    return f"{owner}.{key} = {expression}" if _is_name(key) else f"{owner}.add_module({key!r}, {expression})"


def _made(spec: Mapping[str, Any] | None, indent: int) -> str:
    """The expression that makes a module; its children on lines of their own."""
    if spec is None:
        return "None"
    if spec["class"] != _PLAIN:
        cls = module_class(spec["class"])
        known = inspect.signature(cls).parameters
        given = {key: value for key, value in spec.get("args", {}).items() if not _is_default(known.get(key), value)}
        short = {"nn": nn, "torchvision.ops": sys.modules.get("torchvision.ops")}
        spaces = (space for space, members in short.items() if getattr(members, cls.__name__, None) is cls)
        name = next((f"{space}.{cls.__name__}" for space in spaces), spec["class"])
        return f"{name}({', '.join(f'{key}={_written(value)}' for key, value in given.items())})"
    children = spec.get("children", {})
    if not children:
        return "group({})"
    space = " " * (indent + 4)
    rows = (f"{space}{key!r}: {_made(child, indent + 4)},\n" for key, child in children.items())
    return "group({\n" + "".join(rows) + " " * indent + "})"


def _is_default(parameter: inspect.Parameter | None, value: Any) -> bool:
    return (
        parameter is not None
        and parameter.default is not parameter.empty
        and _written(value) == repr(parameter.default)
    )


def _written(value: Any) -> str:
    """An encoded value as Python writes it."""
    if isinstance(value, list):
        return f"[{', '.join(map(_written, value))}]"
    if isinstance(value, dict):
        [(tag, content)] = value.items()
        if tag == "module":
            return _made(content, 8)
        if tag == "function":
            return content
        if tag == "tuple":
            return f"({', '.join(map(_written, content))}{',' if len(content) == 1 else ''})"
    return repr(decode(value))


def _differing(spec: Mapping[str, Any], path: str) -> Iterator[str]:
    """Lines for what constructors do not say: attributes that were changed, and children that were replaced."""
    for key, value in spec.get("attributes", {}).items():
        if key != "training":
            yield f"{path}.{key} = {_written(value)}"
    built = spec.get("children", {})
    if spec["class"] != _PLAIN and built:
        usual = describe_module(construct(spec), "", set(), inside=True)["children"]
        for key, child in built.items():
            if _bare(child) != _bare(usual.get(key)):
                yield _assigned(path, key, _made(child, 8))
    for key, child in built.items():
        if child is not None:
            yield from _differing(child, f"{path}.{key}" if _is_name(key) else f"{path}.get_submodule({key!r})")


def _bare(spec: Mapping[str, Any] | None) -> Any:
    return spec and (spec["class"], spec.get("args"))


def _at(path: str) -> str:
    """An expression for the module at ``path``."""
    parts = path.split(".") if path else []
    return ".".join(["self", *parts]) if all(map(_is_name, parts)) else f"self.get_submodule({path!r})"


def _tensors(spec: Mapping[str, Any], records: Mapping[str, Any]) -> Iterator[str]:
    """Lines for tensors that constructors do not make, or make otherwise."""
    skeleton = nn.Module()
    fill(skeleton, spec)
    made: dict[str, Tensor] = {
        **dict(skeleton.named_parameters(remove_duplicate=False)),
        **dict(skeleton.named_buffers(remove_duplicate=False)),
    }
    for name, record in records.items():
        path, _, key = name.rpartition(".")
        owner, kind, tensor = _at(path), record["kind"], made.get(name)
        if same := record.get("same_as"):
            source, _, last = same.rpartition(".")
            yield f"{owner}.{key} = {_at(source)}.{last}"
            continue
        dtype, grad = decode(record["dtype"]), record.get("requires_grad", False)
        if tensor is not None and (tensor.dtype, [*tensor.shape], tensor.requires_grad) == (
            dtype,
            record["shape"],
            grad,
        ):
            continue
        empty = f"torch.empty({record['shape']}, dtype={dtype})"
        if kind == "parameter":
            made_of = f"nn.Parameter({empty}{'' if grad else ', requires_grad=False'})"
            yield f"{owner}.{key} = {made_of}" if _is_name(key) else f"{owner}.register_parameter({key!r}, {made_of})"
        elif kind == "buffer":
            yield f"{owner}.register_buffer({key!r}, {empty}{'' if record['persistent'] else ', persistent=False'})"
        else:
            yield f"{owner}.{key} = {empty}"


def _imports(names: Mapping[str, Any], source: str) -> str:
    """Import lines for the names that the source uses."""
    lines = {"import torch", "from torch import nn"}
    for name, value in names.items():
        if not re.search(rf"\b{re.escape(name)}\b", source):
            continue
        if isinstance(value, ModuleType):
            lines.add(f"import {value.__name__}" if value.__name__ == name else f"import {value.__name__} as {name}")
        elif isinstance(value, float):
            lines.add(f"from math import {name}")
        elif value is type(None):
            lines.add("from types import NoneType")
        elif value.__module__ != "builtins":
            known = value.__qualname__
            lines.add(f"from {value.__module__} import {known}" + (f" as {name}" if known != name else ""))
    lines |= {f"import {name}" for name in ("math", "torchvision") if re.search(rf"\b{name}\.", source)}
    return "\n".join(sorted(lines, key=lambda line: (line.startswith("from"), line)))
