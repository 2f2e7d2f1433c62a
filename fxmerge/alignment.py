"""Couplings on disk: which neuron of which parent became which, in one safetensors file.

The coupling of class k is ``k.sizes``, (n, n_a, n_b, ..), ``k.merge``, ``k.unmerge`` and, where it has one, ``k.dual``.
A matrix that is mostly zeros, as those of permutations are, is stored by its entries, ``k.merge.index`` int32
[2, entries] and ``k.merge.values``.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fxmerge.errors import FormatError, told
from fxmerge.ir import Alignment, Coupling

ALIGNMENT = "alignment.safetensors"


def write_alignment(alignment: Alignment, file: Path) -> None:
    """Writes all couplings to one file."""
    tensors: dict[str, Tensor] = {}
    for k, coupling in enumerate(alignment.couplings):
        tensors[f"{k}.sizes"] = torch.tensor([coupling.size, *coupling.widths])
        sides = {"merge": coupling.merge, "unmerge": coupling.unmerge}
        if coupling.dual is not None:
            sides["dual"] = coupling.dual
        for side, matrix in sides.items():
            tensors |= {f"{k}.{side}{ending}": t for ending, t in _packed(matrix.detach().cpu()).items()}
    about = {"quality": [*alignment.quality.items()], "notes": alignment.notes, "couplings": len(alignment.couplings)}
    save_file(tensors, file, metadata={"method": alignment.method, "about": json.dumps(about)})


def load_alignment(path: str | Path) -> Alignment:
    """The couplings that ``MergeResult.save(folder, alignment=True)`` stored in a folder, or the file itself.

    Raises:
        FormatError: there are none, or the file is damaged.
    """
    file = Path(path)
    file = file / ALIGNMENT if file.is_dir() else file
    if not file.is_file():
        raise FormatError(f"{file} is missing; save the result with alignment=True")
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
            about = json.loads(metadata["about"])
            tensors = {name: opened.get_tensor(name).clone() for name in list(opened.keys())}
        couplings = tuple(_coupling(tensors, k) for k in range(min(int(about["couplings"]), len(tensors) + 1)))
        quality = {int(k): float(q) for k, q in about["quality"]}
        return Alignment(couplings, str(metadata["method"]), quality, tuple(map(str, about["notes"])))
    except (SafetensorError, OSError, ValueError, TypeError, LookupError, RuntimeError) as error:
        raise FormatError(f"{file} holds no alignment ({told(error)}); save the result again") from None


def _packed(matrix: Tensor) -> dict[str, Tensor]:
    """Ending of the name -> tensor: the matrix, or its entries where these take less."""
    places = matrix.nonzero()
    if len(places) * 2 > matrix.numel():
        return {"": matrix.contiguous()}
    return {".index": places.T.int().contiguous(), ".values": matrix[places[:, 0], places[:, 1]].contiguous()}


def _coupling(tensors: dict[str, Tensor], k: int) -> Coupling:
    size, *widths = tensors[f"{k}.sizes"].tolist()
    merge = _unpacked(tensors, f"{k}.merge", (size, sum(widths)))
    unmerge = _unpacked(tensors, f"{k}.unmerge", (sum(widths), size))
    has_dual = f"{k}.dual" in tensors or f"{k}.dual.index" in tensors
    dual = _unpacked(tensors, f"{k}.dual", (size, sum(widths))) if has_dual else None
    return Coupling(merge, unmerge, tuple(widths), dual)


def _unpacked(tensors: dict[str, Tensor], name: str, shape: tuple[int, int]) -> Tensor:
    if name in tensors:
        if tensors[name].shape != shape:
            raise ValueError(f"{name} is {[*tensors[name].shape]} and not {[*shape]}")
        return tensors[name]
    rows, columns = tensors[f"{name}.index"].long()
    values = tensors[f"{name}.values"]
    return values.new_zeros(shape).index_put_((rows, columns), values)
