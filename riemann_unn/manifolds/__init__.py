"""Manifolds: what a tagged parameter must satisfy, as :class:`geoopt.Manifold` subclasses."""

from .base import MatrixManifold
from .levels import acceptance_level, rounding_level
from .matrix import Orthogonal, Stiefel, Unitary

__all__ = [
    "MatrixManifold",
    "Orthogonal",
    "Stiefel",
    "Unitary",
    "acceptance_level",
    "rounding_level",
]
