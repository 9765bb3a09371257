"""Warm start: points on their manifolds that stand for the weights a model has learned."""

from .report import WarmStart, WarmStartReport
from .warm_start import Method, warm_start_

__all__ = ["Method", "WarmStart", "WarmStartReport", "warm_start_"]
