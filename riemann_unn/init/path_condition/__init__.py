"""Path conditioning: of all weights that compute a ReLU network, those that train well."""

from .path_condition import path_condition_
from .report import ClosedLayer, PathConditioning, RescaledGroup

__all__ = ["ClosedLayer", "PathConditioning", "RescaledGroup", "path_condition_"]
