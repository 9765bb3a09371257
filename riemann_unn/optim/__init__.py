"""Optimizers for tagged parameters: any ``torch.optim`` class composed with a retraction."""

from .algorithms import ProjUNND, ProjUNNT
from .optimizer import ManifoldOptimizer

__all__ = ["ManifoldOptimizer", "ProjUNND", "ProjUNNT"]
