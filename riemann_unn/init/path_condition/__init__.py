"""Path conditioning: rescaling a ReLU network, without changing its function, to train well."""

from .path_condition import path_condition_
from .report import ClosedLayer, PathConditioning, RescaledGroup

__all__ = ["ClosedLayer", "PathConditioning", "RescaledGroup", "path_condition_"]
