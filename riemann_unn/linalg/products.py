"""Products of a large matrix with a few rows or columns, by every core at once.

A product with one row or column is limited by reading the matrix. BLAS libraries give it, and
products with few, to one core; as a batch of blocks of rows all cores read.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rows_times", "times_columns"]

# Smaller matrices are read from cache before another core has begun.
_LARGE = 512 * 512
_BLOCKS = 16
# From this many rows on BLAS uses all cores by itself.
_FEW = 32


def _is_cut(x: Tensor, count: int) -> bool:
    return (
        x.ndim == 2
        and x.numel() > _LARGE
        and count <= _FEW
        and x.shape[0] % _BLOCKS == 0
        and x.stride(1) == 1
        and not x.is_conj()
        and x.device.type == "cpu"
    )


def rows_times(rows: Tensor, x: Tensor) -> Tensor:
    r"""Return :math:`R X`, the sum over blocks of rows of X.

    Args:
        rows: R, shape ``(..., k, n)``, k small.
        x: X, shape ``(..., n, p)``.

    Returns:
        Shape ``(..., k, p)``.
    """
    if _is_cut(x, rows.shape[-2]):
        blocks = rows.unflatten(-1, (_BLOCKS, -1)).movedim(-2, 0)
        return torch.bmm(blocks, x.unflatten(0, (_BLOCKS, -1))).sum(dim=0)
    if x.ndim == 2 and _is_cut(x.mT, rows.shape[-2]):
        return times_columns(x.mT, rows.mT).mT
    return rows @ x


def times_columns(x: Tensor, columns: Tensor) -> Tensor:
    r"""Return :math:`X C`, block of rows by block of rows of X.

    Args:
        x: X, shape ``(..., n, p)``.
        columns: C, shape ``(..., p, k)``, k small.

    Returns:
        Shape ``(..., n, k)``, stored column by column where X is large.
    """
    if _is_cut(x, columns.shape[-1]):
        rows = columns.mT.expand(_BLOCKS, -1, -1)
        blocks = torch.bmm(rows, x.unflatten(0, (_BLOCKS, -1)).mT)
        return blocks.movedim(0, 1).flatten(1).mT
    if x.ndim == 2 and _is_cut(x.mT, columns.shape[-1]):
        return rows_times(columns.mT, x.mT).mT
    return x @ columns
