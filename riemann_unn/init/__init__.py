"""Initializers: passes over a model that run once, before training."""

from .path_condition import path_condition_
from .path_report import PathConditioning
from .warm_start import WarmStart, warm_start_

__all__ = ["PathConditioning", "WarmStart", "path_condition_", "warm_start_"]
