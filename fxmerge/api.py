"""The public names: re-exports, nothing else."""

from fxmerge.alignment import load_alignment
from fxmerge.barrier import Barrier, evaluate, evaluate_barrier
from fxmerge.classes import infer_classes
from fxmerge.depth import deepen
from fxmerge.ensemble import Ensemble
from fxmerge.errors import (
    FormatError,
    FxMergeError,
    FxMergeWarning,
    InputError,
    StructureError,
    TraceError,
    UnknownOpError,
    VerifyError,
)
from fxmerge.export import load, save
from fxmerge.gather import collect_statistics
from fxmerge.moments import Statistics
from fxmerge.pipeline import MergeResult, align, merge
from fxmerge.rules import rule
from fxmerge.stored import on_disk
from fxmerge.symmetry import permute, verify
from fxmerge.units import find_stages

__all__ = [
    "Barrier",
    "Ensemble",
    "FormatError",
    "FxMergeError",
    "FxMergeWarning",
    "InputError",
    "MergeResult",
    "Statistics",
    "StructureError",
    "TraceError",
    "UnknownOpError",
    "VerifyError",
    "align",
    "collect_statistics",
    "deepen",
    "evaluate",
    "evaluate_barrier",
    "find_stages",
    "infer_classes",
    "load",
    "load_alignment",
    "merge",
    "on_disk",
    "permute",
    "rule",
    "save",
    "verify",
]
