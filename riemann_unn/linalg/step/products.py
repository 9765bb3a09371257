"""Products of a large matrix with a few rows or columns, as fast as memory gives the matrix.

BLAS libraries are made for products with many. With few they leave cores idle or copy what they
read; as a batch of blocks of rows the same products run at the speed of reading.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["CACHED", "add_product_", "less_rows_times_", "rows_times", "times_columns"]

# What has so many numbers stays in cache, where reading it again costs little.
CACHED = 512 * 512
_BLOCKS = 16
# From this many rows on BLAS uses all cores by itself.
_FEW = 32
# Up to this many columns a product is added fastest strip of long rows by strip.
_THIN, _STRIP, _LONG = 8, 8, 1024


def _is_large(x: Tensor) -> bool:
    """Whether blocks of a matrix are worth their calls."""
    return x.ndim == 2 and x.numel() > CACHED and x.device.type == "cpu"


def _is_conj(x: Tensor) -> bool:
    # Of real tensors it is not asked, since it cannot be compiled.
    return x.is_complex() and x.is_conj()


def _is_cut(x: Tensor, count: int) -> bool:
    return count <= _FEW and x.shape[0] % _BLOCKS == 0 and x.stride(1) == 1


def _is_stripped(x: Tensor, count: int) -> bool:
    rows, length = x.shape
    fits = count <= _THIN and rows % _STRIP == 0 and length >= _LONG
    return fits and x.stride(1) == 1 and not x.is_complex()


def _are_batches(x: Tensor, other: Tensor) -> bool:
    # A call of matmul is six of other operations.
    return x.ndim == other.ndim == 3 and x.shape[0] == other.shape[0]


def rows_times(rows: Tensor, x: Tensor) -> Tensor:
    r"""Return :math:`R X`, the sum over blocks of rows of X.

    Args:
        rows: R, shape ``(..., k, n)``, k small.
        x: X, shape ``(..., n, p)``.

    Returns:
        Shape ``(..., k, p)``.
    """
    if _is_conj(x) and x.ndim == 2:
        return times_columns(x.mH, rows.mH).mH
    if _are_batches(rows, x):
        return torch.bmm(rows, x)
    if _is_large(x):
        if _is_cut(x, rows.shape[-2]):
            blocks = rows.unflatten(-1, (_BLOCKS, -1)).transpose(0, 1)
            return torch.bmm(blocks, x.view(_BLOCKS, -1, x.shape[1])).sum(dim=0)
        if _is_cut(x.mT, rows.shape[-2]):
            return times_columns(x.mT, rows.mT).mT
    # A call of matmul is two of mm.
    return torch.mm(rows, x) if x.ndim == 2 else rows @ x


def less_rows_times_(y: Tensor, rows: Tensor, x: Tensor) -> Tensor:
    r"""Halve what a product leaves of rows, :math:`Y \leftarrow \tfrac12 (Y - R X)`.

    Args:
        y: Y, shape ``(..., k, p)``.
        rows: R, shape ``(..., k, n)``, k small.
        x: X, shape ``(..., n, p)``.
    """
    if _is_conj(y) or x.ndim != 2 or _is_large(x):
        return y.sub_(rows_times(rows, x)).mul_(0.5)
    return y.addmm_(rows, x, beta=0.5, alpha=-0.5)


def times_columns(x: Tensor, columns: Tensor) -> Tensor:
    r"""Return :math:`X C`, block of rows by block of rows of X.

    Args:
        x: X, shape ``(..., n, p)``.
        columns: C, shape ``(..., p, k)``, k small.

    Returns:
        Shape ``(..., n, k)``, stored column by column where X is large or one of many.
    """
    if _is_conj(x) and x.ndim == 2:
        return rows_times(columns.mH, x.mH).mH
    if _are_batches(x, columns):
        # The BLAS takes a few columns best as rows, however x is stored.
        return torch.bmm(columns.mT, x.mT).mT
    if _is_large(x):
        if _is_cut(x, columns.shape[-1]):
            # One column is contiguous whatever its strides say; BLAS goes by what they say.
            rows = columns.mT.contiguous().flatten().view(columns.shape[-1], -1)
            rows = rows.expand(_BLOCKS, -1, -1)
            blocks = torch.bmm(rows, x.view(_BLOCKS, -1, x.shape[1]).mT)
            return blocks.movedim(0, 1).flatten(1).mT
        if _is_cut(x.mT, columns.shape[-1]):
            return rows_times(columns.mT, x.mT).mT
    return torch.mm(x, columns) if x.ndim == 2 else x @ columns


def add_product_(x: Tensor, left: Tensor, right: Tensor, *, beta: float = 1.0) -> Tensor:
    r"""Add a product of thin factors, :math:`X \leftarrow \beta X + L R`, in one pass over X.

    Args:
        x: X, shape ``(..., n, p)``; it may have any strides.
        left: L, shape ``(..., n, k)``, k small.
        right: R, shape ``(..., k, p)``.
        beta: 1, or 0 to write over X without reading it.
    """
    if _is_conj(x):
        add_product_(x.mH, right.mH, left.mH, beta=beta)
        return x
    if _is_large(x):
        if _is_stripped(x, left.shape[-1]):
            strips = x.view(-1, _STRIP, x.shape[1])
            strips.baddbmm_(
                left.unflatten(0, (-1, _STRIP)), right.expand(len(strips), -1, -1), beta=beta
            )
            return x
        if _is_stripped(x.mT, left.shape[-1]):
            add_product_(x.mT, right.mT, left.mT, beta=beta)
            return x
    if x.ndim == 2:
        return x.addmm_(left, right, beta=beta)
    if x.ndim == 3:
        if x.stride(-1) != 1 and x.stride(-2) == 1:  # stored column by column, as from a QR
            x.mT.baddbmm_(right.mT, left.mT, beta=beta)
            return x
        return x.baddbmm_(left, right, beta=beta)
    return x.add_(left @ right) if beta else x.copy_(left @ right)
