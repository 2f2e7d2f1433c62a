"""Networks of different depth: which layers correspond, and how the same number of them comes about."""

from fxmerge.depth.balance import Link, balanced
from fxmerge.depth.clafusion import CLAFusion
from fxmerge.depth.grow import Grown, grow
from fxmerge.depth.insert import deepen

__all__ = ["CLAFusion", "Grown", "Link", "balanced", "deepen", "grow"]
