"""Alignment methods: one algorithm, one file, every one a coupling per class."""

from fxmerge.matchers.activation import ActivationMatching
from fxmerge.matchers.average import Average
from fxmerge.matchers.cca import CCAMerge
from fxmerge.matchers.otfusion import OTFusion
from fxmerge.matchers.pleas import PLeaS
from fxmerge.matchers.rebasin import WeightMatching
from fxmerge.matchers.zipit import ZipIt

__all__ = ["ActivationMatching", "Average", "CCAMerge", "OTFusion", "PLeaS", "WeightMatching", "ZipIt"]
