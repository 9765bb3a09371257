"""Initializers: passes over a model that run once, before training."""

from .warm_start import WarmStart, warm_start_

__all__ = ["WarmStart", "warm_start_"]
