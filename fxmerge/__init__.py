"""fxmerge: a compiler from several trained networks to one.

The public names are those of ``fxmerge.api``. They are imported when the first of them is used, so that the command
line shows its help without waiting for torch.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxmerge.api import *


def __getattr__(name: str) -> Any:
    if name.startswith("__") and name != "__all__":
        raise AttributeError(name)  # asked for by tools that look at modules, and never public
    if find_spec(f"fxmerge.{name}") is not None:  # a module of the package, which need not wait for the others
        return import_module(f"fxmerge.{name}")
    api = import_module("fxmerge.api")
    if name in ("__all__", *api.__all__):
        return getattr(api, name)
    raise AttributeError(f"module 'fxmerge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(import_module("fxmerge.api").__all__)
