"""Optimizers for tagged parameters: any ``torch.optim`` class composed with a retraction."""

from .algorithms import Cayley, Expm, ProjUNND, ProjUNNT
from .optimizer import ManifoldOptimizer

__all__ = ["Cayley", "Expm", "ManifoldOptimizer", "ProjUNND", "ProjUNNT"]
