"""Warm start: replacing trained weights by points on their manifolds."""

from .report import WarmStart, WarmStartReport
from .warm_start import Method, warm_start_

__all__ = ["Method", "WarmStart", "WarmStartReport", "warm_start_"]
