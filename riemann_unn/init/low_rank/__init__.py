"""Low rank: replacing layers by low-rank ones of nearly the same function."""

from .like import low_rank_like_
from .low_rank import low_rank_
from .plan import Budget
from .report import LowRank, LowRankReport

__all__ = ["Budget", "LowRank", "LowRankReport", "low_rank_", "low_rank_like_"]
