"""Initializers: passes over a model that run once, before training."""

from .low_rank import low_rank_
from .low_rank_plan import Budget
from .low_rank_report import LowRank, LowRankReport
from .path_condition import path_condition_
from .path_report import PathConditioning
from .warm_start import WarmStart, WarmStartReport, warm_start_

__all__ = [
    "Budget",
    "LowRank",
    "LowRankReport",
    "PathConditioning",
    "WarmStart",
    "WarmStartReport",
    "low_rank_",
    "path_condition_",
    "warm_start_",
]
