"""Levels: the orthogonality error of exact values of a dtype, and the largest accepted one."""

from __future__ import annotations

import torch

__all__ = ["acceptance_level", "rounding_level"]


def acceptance_level(dtype: torch.dtype) -> float:
    """Return the largest orthogonality error of a parameter that is accepted as on its manifold.

    Wide enough for weights from other libraries, or converted from a lower precision; the first
    step corrects their errors to rounding.
    """
    return {torch.float64: 1e-6, torch.float32: 1e-4}.get(dtype.to_real(), 2e-2)


def rounding_level(dtype: torch.dtype) -> float:
    """Return the orthogonality error that rounding alone explains."""
    return 32 * torch.finfo(dtype).eps
