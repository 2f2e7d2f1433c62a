"""What operations say about neurons: one table, a function each."""

from fxmerge.rules import affine, attention, chosen, movement, norm, pointwise, recurrent, reduction, spatial
from fxmerge.rules.registry import RULES, Rule, rule

MOVEMENT = frozenset(name for name, function in RULES.items() if function.__module__ == movement.__name__)
"""Operations that only move data: what comes out is what went in."""

__all__ = [
    "MOVEMENT",
    "RULES",
    "Rule",
    "affine",
    "attention",
    "chosen",
    "movement",
    "norm",
    "pointwise",
    "recurrent",
    "reduction",
    "rule",
    "spatial",
]
