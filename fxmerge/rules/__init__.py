"""What operations say about neurons: one table, a function each."""

from fxmerge.rules import affine, attention, choice, movement, norm, pointwise, recurrent, reduction, spatial
from fxmerge.rules.registry import RULES, Rule, rule

MOVEMENT = frozenset(name for name, function in RULES.items() if function.__module__ == movement.__name__)
"""Operations that only move data: what comes out is what went in."""

FOLLOWED = frozenset(
    [name for name, function in RULES.items() if function.__module__ == choice.__name__]
    + [name for name in MOVEMENT if RULES[name] in (movement.moved, movement.joined)]
    + "alias clone contiguous detach double float half lift lift_fresh to _to_copy".split()
)
"""Operations that know what to do with values that follow an order of neurons."""

__all__ = [
    "FOLLOWED",
    "MOVEMENT",
    "RULES",
    "Rule",
    "affine",
    "attention",
    "choice",
    "movement",
    "norm",
    "pointwise",
    "recurrent",
    "reduction",
    "rule",
    "spatial",
]
