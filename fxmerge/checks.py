"""What is checked before a merge believes it: the inferred symmetry on every parent, and what the matcher gave."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch

from fxmerge.coupling import Permuted
from fxmerge.errors import FxMergeWarning, VerifyError
from fxmerge.ir import Alignment, AxisClasses
from fxmerge.matching import families
from fxmerge.symmetry import Verification, verify


def verified(classes: list[AxisClasses], seed: int) -> tuple[list[AxisClasses], list[Verification]]:
    """Checks the symmetry on every parent; families that fail are pinned in all of them, with a warning."""
    found = [verify(c.traced.source, c, seed) for c in classes]
    if all(v.ok for v in found):
        return classes, found
    bad: set[int] = set()
    for c in classes:
        for family in families(c):
            if not verify(c.traced.source, c, seed, only=family).ok:
                bad |= set(family)
    for k in sorted(bad):
        warnings.warn(
            f"class '{classes[0][k].name}' failed verification and is pinned: its neurons stay in place",
            FxMergeWarning,
            stacklevel=5,
        )
    classes = [_pin(c, bad) for c in classes]
    found = [verify(c.traced.source, c, seed) for c in classes]
    for v in found:
        if not v.ok:
            raise VerifyError(f"the inferred symmetry changes the network's function ({v}); please report this network")
    return classes, found


def _pin(classes: AxisClasses, which: set[int]) -> AxisClasses:
    pinned = tuple(
        replace(c, pinned="failed verification", parents=(), blocks=c.blocks[:, :0]) if k in which else c
        for k, c in enumerate(classes)
    )
    return replace(classes, classes=pinned)


def require_mass(alignment: Alignment, classes: AxisClasses) -> None:
    """Every fused neuron must be made of something, and of numbers."""
    for c, coupling in zip(classes, alignment.couplings, strict=True):
        if isinstance(coupling, Permuted):
            continue
        if not bool(torch.isfinite(coupling.merge).all() and torch.isfinite(coupling.unmerge).all()):
            raise VerifyError(f"the coupling of class '{c.name}' holds NaN or inf; choose another matcher or more data")
        empty = int((coupling.merge.abs().sum(1) < 1e-6).sum())
        if empty:
            raise VerifyError(
                f"the coupling of class '{c.name}' makes {empty} of {coupling.size} neurons of nothing: mass was lost. "
                "Choose another matcher"
            )
