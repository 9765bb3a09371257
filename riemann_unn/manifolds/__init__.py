"""Manifolds: what a tagged parameter must satisfy, as :class:`geoopt.Manifold` subclasses."""

from .base import MatrixManifold
from .conv import OrthogonalConv, UnitaryConv
from .levels import acceptance_level, rounding_level
from .matrix import Orthogonal, Stiefel, Unitary

__all__ = [
    "MatrixManifold",
    "Orthogonal",
    "OrthogonalConv",
    "Stiefel",
    "Unitary",
    "UnitaryConv",
    "acceptance_level",
    "rounding_level",
]
