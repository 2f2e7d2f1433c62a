"""Repairs: what is not linear in the weights, put right after merging."""

from fxmerge.repair.batchnorm import ResetBatchNorm
from fxmerge.repair.distill import Distill
from fxmerge.repair.least_squares import LeastSquares
from fxmerge.repair.rescale import Rescale

__all__ = ["Distill", "LeastSquares", "Rescale", "ResetBatchNorm"]
