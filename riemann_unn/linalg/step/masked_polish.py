"""Polishing without branches on values: a few rows at every step."""

from __future__ import annotations

import torch
from torch import Tensor

from .polish import columns_due

__all__ = ["rows_due"]


def rows_due(
    x: Tensor, step: int | Tensor, *, all_rows: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    r"""Return the polish's correction of the few rows that are due at a step.

    .. math:: X_J \leftarrow X_J - E_J X, \qquad E_J = X_J X^H - I_J

    where errors within J, which both rows correct, count half.

    Args:
        x: nearly orthonormal rows, shape ``(..., p, n)``.
        step: number of steps taken, an integer tensor if on a device.
        all_rows: take all of them at every step.

    Returns:
        The indices of the rows J, None for all, the correction to subtract, and an estimate of
        :math:`\|X X^H - I\|_F / \sqrt p` of each matrix.
    """
    p = x.shape[-2]
    first, last = (0, p) if all_rows else columns_due(p, step=0)
    count = last - first
    if count == p:
        error = x @ x.mH - torch.eye(p, dtype=x.dtype, device=x.device)
        estimate = torch.linalg.vector_norm(error, dim=(-2, -1)) / max(p, 1) ** 0.5
        return None, 0.5 * (error @ x), estimate
    index = (torch.arange(count, device=x.device) + step * count) % p
    is_own = torch.arange(p, device=x.device) == index[:, None]
    error = x.index_select(-2, index) @ x.mH - is_own.to(x.dtype)
    estimate = torch.linalg.vector_norm(error, dim=(-2, -1)) / max(count, 1) ** 0.5
    inside = is_own.any(dim=0).to(x.dtype)
    return index, torch.addcmul(error, error, inside, value=-0.5) @ x, estimate
