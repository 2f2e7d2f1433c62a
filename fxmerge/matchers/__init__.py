"""Alignment methods: one algorithm, one file, every one a coupling per class."""

from fxmerge.matchers.activation import ActivationMatching
from fxmerge.matchers.average import Average
from fxmerge.matchers.rebasin import WeightMatching

__all__ = ["ActivationMatching", "Average", "WeightMatching"]
