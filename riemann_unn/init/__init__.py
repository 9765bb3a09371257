"""Initializers: passes over a model that run once, before training."""

from .hadamard import hadamard_
from .low_rank import Budget, LowRank, LowRankReport, low_rank_, low_rank_like_
from .path_condition import PathConditioning, path_condition_
from .warm_start import WarmStart, WarmStartReport, warm_start_

__all__ = [
    "Budget",
    "LowRank",
    "LowRankReport",
    "PathConditioning",
    "WarmStart",
    "WarmStartReport",
    "hadamard_",
    "low_rank_",
    "low_rank_like_",
    "path_condition_",
    "warm_start_",
]
