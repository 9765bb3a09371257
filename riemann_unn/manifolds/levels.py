"""Levels: how exact values of a dtype can be, and how exact they must be to be accepted."""

from __future__ import annotations

import torch

__all__ = ["acceptance_level", "rounding_level"]


def acceptance_level(dtype: torch.dtype) -> float:
    """Return how far off a manifold the values of a parameter may be to be taken as on it.

    Wide enough for weights that another library made or that were converted
    from a lower precision, all of which the first step mends to rounding.
    """
    return {torch.float64: 1e-6, torch.float32: 1e-4}.get(dtype.to_real(), 2e-2)


def rounding_level(dtype: torch.dtype) -> float:
    """Return the orthogonality error that rounding alone explains."""
    return 32 * torch.finfo(dtype).eps
