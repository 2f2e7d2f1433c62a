"""What tells parents, data and files apart in a recipe: SHA-256 digests, of which every part is defined here.

A tensor is digested as a line of JSON, ``[name, dtype, shape]`` with a newline, then its entries row by row, little
end first. The digest of a network covers its ``state_dict`` in the order of the sorted names, so it can be compared
with that of a checkpoint's tensors: order, device, strides and ties of tensors do not matter.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sized
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def digest_of_tensors(tensors: Mapping[str, Any]) -> str:
    """SHA-256 of a ``state_dict``; entries that are no dense tensors count with their names and types only.

    Example:
        >>> digest_of_tensors(safetensors.torch.load_file("model.safetensors"))
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        dense = (
            isinstance(value, Tensor) and value.layout is torch.strided and not (value.is_meta or value.is_quantized)
        )
        kind = [str(value.dtype).removeprefix("torch."), [*value.shape]] if dense else [type(value).__name__]
        digest.update(json.dumps([name, *kind]).encode() + b"\n")
        if dense and value.numel():
            row = value.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
            digest.update(memoryview(row.view(torch.uint8).numpy()))
    return digest.hexdigest()


def fingerprint(batches: Iterable[Any], first: Any) -> dict[str, Any]:
    """How many batches there are (None where the iterable does not say) and the SHA-256 of the ``first``.

    ``first`` is what the networks are given for it, (args, kwargs); its tensors are named by their places. A loader
    that shuffles gives another first batch each time, and so another digest.
    """
    leaves = pytree.tree_flatten_with_path(first)[0]
    tensors = {pytree.keystr(path): leaf for path, leaf in leaves if isinstance(leaf, Tensor)}
    return {
        "batches": len(batches) if isinstance(batches, Sized) else None,
        "first_batch": digest_of_tensors(tensors),
    }


def digest_of_file(path: Path) -> str:
    """SHA-256 of the bytes of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
