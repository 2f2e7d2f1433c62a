"""Networks as a command line names them."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fxmerge.errors import InputError, few, told
from fxmerge.export import load
from fxmerge.stored import on_disk

_SCHEMES = ("torchvision", "timm", "hf", "images")
_WRITTEN = re.compile(rf"(?:({'|'.join(_SCHEMES)}):)?([^?@]*)(?:\?([^@]*))?(?:@(.+))?")
_FACTORY = re.compile(r"(.+):([A-Za-z_]\w*)")


@dataclass(frozen=True)
class Source:
    """``[SCHEME:]NAME[?key=value&..][@WEIGHTS]``, taken apart.

    Attributes:
        scheme: one of torchvision, timm, hf, images; "python" for MODULE:FACTORY, "" for a path.
        name: of the network or factory, or a path.
        options: behind the question mark.
        weights: path of the tensors, if any.
    """

    scheme: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None

    @classmethod
    def read(cls, text: str) -> Source:
        """Raises InputError where the text is of another form."""
        if Path(text).exists():
            return cls("", text)
        found = _WRITTEN.fullmatch(text)
        if found is None or not found[2]:
            raise InputError(f"'{text}' is neither a file or folder nor written SCHEME:NAME[?key=value][@WEIGHTS]")
        scheme, name, options, weights = found.groups()
        if not scheme and _FACTORY.fullmatch(name):
            scheme = "python"
        pairs = [pair.partition("=") for pair in (options or "").split("&") if pair]
        return cls(scheme or "", name, {key: _literal(value) for key, _, value in pairs}, weights)

    def __str__(self) -> str:
        options = "&".join(f"{k}={v}" for k, v in self.options.items())
        scheme = f"{self.scheme}:" if self.scheme in _SCHEMES else ""
        return (
            f"{scheme}{self.name}" + (f"?{options}" if options else "") + (f"@{self.weights}" if self.weights else "")
        )

    def moved(self, move: Callable[[str], str]) -> Source:
        """The same with its paths changed: what names no file stays."""
        name = self.name
        if self.scheme in ("", "hf", "images"):
            name = move(name)
        elif self.scheme == "python" and (file := _FACTORY.fullmatch(name)) and file[1].endswith(".py"):
            name = f"{move(file[1])}:{file[2]}"
        return replace(self, name=name, weights=move(self.weights) if self.weights else None)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def network(text: str, architecture: str | None, trust: bool, stay: bool = False) -> nn.Module:
    """A network in eval mode on the CPU, with its weights (random ones where none are named).

    Args:
        text, architecture: as written on the command line.
        trust: whether code of the user's may be run.
        stay: whether the weights stay on disk.

    Raises:
        InputError: the text, the architecture or the weights are not there or do not fit each other.
    """
    source = Source.read(text)
    if not source.scheme:
        if not Path(source.name).exists():
            raise InputError(f"'{text}' is neither a file or folder here nor ARCHITECTURE[@WEIGHTS]")
        if (Path(source.name) / "graph.json").exists():
            return load(source.name).eval()
        if architecture is None:
            raise InputError(f"'{text}' holds weights: say of which network, as in --arch torchvision:NAME")
        source = replace(Source.read(architecture), weights=source.name)
    maker = _ARCHITECTURES.get(source.scheme)
    if maker is None:
        raise InputError(f"'{source}' is no architecture; write one of {', '.join(_ARCHITECTURES)} before a colon")
    if source.scheme == "python" and not trust:
        raise InputError(f"'{source}' would run code of yours: allow that by --trust-code")
    if stay and source.weights is not None:
        with torch.device("meta"):
            module = maker(source)
        return on_disk(module, source.weights).eval()
    module = maker(source)
    if source.weights is not None:
        _fill(module, source)
    return module.eval()


def _torchvision(source: Source) -> nn.Module:
    from torchvision.models import get_model, list_models

    return _known(source, "torchvision", list_models(), lambda: get_model(source.name, weights=None, **source.options))


def _timm(source: Source) -> nn.Module:
    timm = _required("timm", source)
    make = lambda: timm.create_model(source.name, pretrained=False, **source.options)  # noqa: E731
    return _known(source, "timm", timm.list_models(), make)


def _known(source: Source, zoo: str, names: list[str], make: Callable[[], nn.Module]) -> nn.Module:
    if source.name not in names:
        near = get_close_matches(source.name, names, 3)
        raise InputError(f"{zoo} has no '{source.name}'" + (f"; it has {', '.join(near)}" if near else ""))
    return attempt(make, source)


def _hugging_face(source: Source) -> nn.Module:
    """A folder with config.json; only classes that transformers brings, never code of the folder."""
    transformers = _required("transformers", source)
    if not (Path(source.name) / "config.json").is_file():
        raise InputError(f"{source.name} has no config.json; give a folder that save_pretrained wrote")
    try:
        config = transformers.AutoConfig.from_pretrained(source.name, local_files_only=True, **source.options)
        config.use_cache = False
        name = (config.architectures or ["AutoModel"])[0]
        cls = getattr(transformers, name, None)
        if cls is None or not (name == "AutoModel" or issubclass(cls, transformers.PreTrainedModel)):
            raise InputError(f"{source.name}: transformers has no network '{name}'")
        if source.weights is None:
            return cls.from_pretrained(source.name, config=config, local_files_only=True)
        return cls.from_config(config) if name == "AutoModel" else cls(config)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{source.name} cannot be loaded: {told(error)}") from error


def _python(source: Source) -> nn.Module:
    made = attempt(lambda: factory(source)(**source.options), source)
    if not isinstance(made, nn.Module):
        raise InputError(f"{source.name} gave a {type(made).__name__}, not an nn.Module")
    return made


def factory(source: Source) -> Callable[..., Any]:
    """The callable that MODULE:NAME means; MODULE is importable from here, or a .py file."""
    found = _FACTORY.fullmatch(source.name)
    assert found is not None
    place, name = found.groups()
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            if spec is None or spec.loader is None or not Path(place).is_file():
                raise InputError(f"there is no file {place}")
            module = importlib.util.module_from_spec(spec)
            sys.path.insert(0, str(Path(place).resolve().parent))
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
        else:
            sys.path.insert(0, os.getcwd())
            module = importlib.import_module(place)
    except InputError:
        raise
    except Exception as error:  # whatever a user's module raises
        raise InputError(f"{place} cannot be imported: {told(error)}") from error
    made = getattr(module, name, None)
    if not callable(made):
        raise InputError(f"{place} has no function '{name}'")
    return made


def attempt(make: Callable[[], Any], source: Source) -> Any:
    try:
        return make()
    except Exception as error:  # whatever the options make of a constructor
        raise InputError(f"'{source}' cannot be built: {told(error)}") from error


def _required(package: str, source: Source) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise InputError(f"'{source}' needs {package} ({error}): pip install {package}") from None


_ARCHITECTURES = {"torchvision": _torchvision, "timm": _timm, "hf": _hugging_face, "python": _python}


def state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint: safetensors, or what ``torch.load(weights_only=True)`` reads.

    A state dict inside a training checkpoint ("state_dict", "model") is found, and DataParallel's prefix dropped.

    Raises:
        InputError: the file is missing or damaged, or holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is no safetensors file, or is damaged: {told(error)}") from None
    except Exception as error:  # pickle's errors are of every kind
        reason = told(error).splitlines()[0]
        raise InputError(f"{path} is no checkpoint that torch.load(weights_only=True) reads: {reason}") from None
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(f"{path} holds no state dict; save model.state_dict()")
    wrapped = all(k.startswith("module.") for k in state)
    return {k.removeprefix("module.") if wrapped else k: v for k, v in state.items()}


def _fill(module: nn.Module, source: Source) -> None:
    state = state_dict(str(source.weights))
    own = module.state_dict()
    tied = {id(p): n for n, p in module.named_parameters()}
    again = {n for n, p in module.named_parameters(remove_duplicate=False) if tied.get(id(p)) != n}
    architecture = replace(source, weights=None)
    missing = [k for k in own if k not in state and k not in again]
    unknown = [k for k in state if k not in own]
    if missing or unknown:
        said = [f"{text} {few(keys)}" for text, keys in (("it lacks", missing), ("has beside", unknown)) if keys]
        raise InputError(f"{source.weights} is of another network than {architecture}: " + "; ".join(said))
    for key, value in state.items():
        if own[key].shape != value.shape:
            raise InputError(
                f"{source.weights}: '{key}' is {[*value.shape]}, and {[*own[key].shape]} in "
                f"{architecture}; options such as ?num_classes=10 change that"
            )
    module.load_state_dict(state, strict=False)
