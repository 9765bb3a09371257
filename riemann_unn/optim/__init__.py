"""Optimizers for tagged parameters: any ``torch.optim`` class composed with a retraction."""

from .algorithms import Cayley, Expm, ProjUNND, ProjUNNT
from .groups import param_groups
from .lbfgs import LBFGS
from .optimizer import ManifoldOptimizer

__all__ = [
    "LBFGS",
    "Cayley",
    "Expm",
    "ManifoldOptimizer",
    "ProjUNND",
    "ProjUNNT",
    "param_groups",
]
