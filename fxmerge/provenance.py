"""The recipe of a merge that was done: versions, parents, every option, data, and what came of it."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxmerge.fingerprint import digest_of_tensors
from fxmerge.ir import Traced
from fxmerge.recipe import describe_options
from fxmerge.report import Report

_PACKAGES = ("fxmerge", "numpy", "scipy", "pot")


def provenance(
    models: Sequence[nn.Module],
    options: Mapping[str, Any],
    input_fn: Callable[[Any], Any] | None,
    data: Mapping[str, Any] | None,
    report: Report,
) -> dict[str, Any]:
    """What ``recipe.json`` holds: ``read_options`` of it gives the options back.

    Args:
        models: the parents, as given; their digests are ``digest_of_tensors(model.state_dict())``.
        options: of ``merge``, with the matcher and the repair that were taken.
        data: its fingerprint, None where there was none.
    """
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashing lets other threads run
        digests = list(pool.map(lambda model: digest_of_tensors(model.state_dict(keep_vars=True)), models))
    parents = [
        {"model": type(model).__name__, "weights": None, "sha256": digest}
        for model, digest in zip(models, digests, strict=True)
    ]
    classes = report.classes
    return {
        "parents": parents,
        **describe_options(options, models),
        "input_fn": None if input_fn is None else getattr(input_fn, "__qualname__", type(input_fn).__name__),
        "inputs": _inputs(classes.traced),
        "data": data and dict(data),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,  # with the build, which the package's own number leaves out
            **{name: _version(name) for name in _PACKAGES},
        },
        "result": {
            "method": report.alignment.method,
            "shares": list(report.weights),
            "quality": {classes[k].name: quality for k, quality in report.alignment.quality.items()},
            "free": classes.free,
            "neurons": classes.total,
            "repair": report.repair,
            "notes": list(report.notes),
            "seconds": dict(report.seconds),
        },
    }


def _inputs(traced: Traced) -> list[dict[str, Any]]:
    """Name, dtype and shape of every tensor that the networks were run on."""
    names = [node.target for node in traced.graph_module.graph.find_nodes(op="placeholder")]
    given = dict(zip(names, traced.args, strict=False)) | dict(traced.kwargs)
    return [
        {"name": name + pytree.keystr(path), "dtype": str(t.dtype).removeprefix("torch."), "shape": [*t.shape]}
        for name, value in given.items()
        for path, t in pytree.tree_flatten_with_path(value)[0]
        if isinstance(t, Tensor)
    ]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # run from a source tree
        return None
