"""Repairs: what is not linear in the weights, put right after merging."""

from fxmerge.repair.batchnorm import ResetBatchNorm
from fxmerge.repair.rescale import Rescale

__all__ = ["Rescale", "ResetBatchNorm"]
