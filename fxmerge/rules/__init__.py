"""What operations say about neurons: one table, a function each."""

from fxmerge.rules import affine, attention, movement, norm, pointwise, reduction, spatial
from fxmerge.rules.registry import RULES, Rule, rule

__all__ = ["RULES", "Rule", "affine", "attention", "movement", "norm", "pointwise", "reduction", "rule", "spatial"]
