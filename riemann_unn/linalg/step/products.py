"""Products of a large matrix with a few rows or columns, at the speed of reading it.

BLAS libraries are tuned for products with many. With few they leave cores idle or copy the matrix;
as a batch of blocks of rows the same products run at memory bandwidth.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "CACHED",
    "add_product_",
    "are_read_once",
    "is_read_once",
    "less_rows_times_",
    "rows_times",
    "skew_columns",
    "skew_products",
    "times_columns",
]

# Elements that fit in cache, where reading again is cheap.
CACHED = 512 * 512
_BLOCKS = 16
# From this number of elements on blocks of this many rows are worth their calls.
_HUGE, _ROWS = 2**22, 64
# From this many rows on BLAS uses all cores by itself.
_FEW = 32
# Up to this many columns a product is added fastest in strips of long rows.
_THIN, _STRIP, _LONG = 8, 8, 1024


def _is_large(x: Tensor) -> bool:
    """Whether a product in blocks of rows is faster."""
    return x.ndim == 2 and x.numel() > CACHED and x.device.type == "cpu"


def _is_conj(x: Tensor) -> bool:
    # Not for real tensors, since is_conj cannot be compiled.
    return x.is_complex() and x.is_conj()


def _is_cut(x: Tensor, count: int) -> bool:
    return count <= _FEW and x.shape[0] % _BLOCKS == 0 and x.stride(1) == 1


def _is_stripped(x: Tensor, count: int) -> bool:
    rows, length = x.shape
    fits = count <= _THIN and rows % _STRIP == 0 and length >= _LONG
    return fits and x.stride(1) == 1 and not x.is_complex()


def _are_batches(x: Tensor, other: Tensor) -> bool:
    # A call of matmul costs as much as six other operations.
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
    # A call of matmul costs as much as two of mm.
    return torch.mm(rows, x) if x.ndim == 2 else rows @ x


def less_rows_times_(y: Tensor, rows: Tensor, x: Tensor) -> Tensor:
    r"""Subtract a product from rows and halve, :math:`Y \leftarrow \tfrac12 (Y - R X)`.

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
        # BLAS is fastest with the few columns as rows, however x is stored.
        return torch.bmm(columns.mT, x.mT).mT
    if _is_large(x):
        if _is_cut(x, columns.shape[-1]):
            # A single column is contiguous, but BLAS looks at its strides.
            rows = columns.mT.contiguous().flatten().view(columns.shape[-1], -1)
            rows = rows.expand(_BLOCKS, -1, -1)
            blocks = torch.bmm(rows, x.view(_BLOCKS, -1, x.shape[1]).mT)
            return blocks.movedim(0, 1).flatten(1).mT
        if _is_cut(x.mT, columns.shape[-1]):
            return rows_times(columns.mT, x.mT).mT
    return torch.mm(x, columns) if x.ndim == 2 else x @ columns


def is_read_once(x: Tensor, count: int) -> bool:
    """Whether to read a large matrix in blocks of rows that stay in cache between uses."""
    fits = x.ndim == 2 and x.numel() >= _HUGE and x.is_contiguous() and not x.is_complex()
    return fits and x.is_cpu and count <= _FEW and x.shape[0] % (2 * _ROWS) == 0


def _sub_blocks() -> int:
    """Return the number of threads that the rows of a block are divided among."""
    return min(max(2, 1 << (torch.get_num_threads() - 1).bit_length()), 16)


def are_read_once(x: Tensor, g: Tensor, count: int) -> bool:
    """The same for two matrices; a single column needs larger ones."""
    is_worth = count > 1 or x.numel() >= 4 * _HUGE
    return is_worth and is_read_once(x, count) and is_read_once(g, count)


def skew_products(x: Tensor, g: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return :math:`\tfrac12 (X^T G - G^T X)\,v` and X v, reading X and G once from memory.

    Each block of rows is still in cache for its second product.

    Args:
        x: X, shape ``(p, n)``, see :func:`is_read_once`.
        g: G, of the same kind.
        rows: the transpose of v, shape ``(k, n)``.

    Returns:
        Shapes ``(n, k)`` and ``(p, k)``, stored column by column.
    """
    k, n = rows.shape
    parts = _sub_blocks()
    xs, gs = (y.view(-1, parts, _ROWS // parts, n) for y in (x, g))
    repeated, z = rows.expand(parts, k, n), rows.new_zeros(parts, k, n)
    images = []
    for xb, gb in zip(xs.unbind(0), gs.unbind(0), strict=True):
        xv, gv = torch.bmm(repeated, xb.mT), torch.bmm(repeated, gb.mT)
        z.baddbmm_(gv, xb, alpha=0.5).baddbmm_(xv, gb, alpha=-0.5)
        images.append(xv)
    # (blocks, parts, k, rows) to (k, p)
    image = torch.stack(images).permute(2, 0, 1, 3).reshape(k, -1)
    return z.sum(dim=0).mT, image.mT


def skew_columns(y: Tensor, rows: Tensor, *, clear: bool) -> Tensor:
    r"""Return :math:`\tfrac12 (Y - Y^T)\,v`, reading Y once from memory.

    Args:
        y: Y, square, see :func:`is_read_once`.
        rows: the transpose of v, shape ``(k, n)``.
        clear: leave zeros in Y, block by block while they are in cache.

    Returns:
        Shape ``(n, k)``, stored column by column.
    """
    k, n = rows.shape
    parts, count = _sub_blocks(), 2 * _ROWS
    repeated, z = rows.expand(parts, k, n), rows.new_zeros(parts, k, n)
    mine = rows.view(k, -1, parts, count // parts).permute(1, 2, 0, 3)
    images = []
    for block, own in zip(y.view(-1, parts, count // parts, n).unbind(0), mine, strict=True):
        images.append(torch.bmm(repeated, block.mT))
        z.baddbmm_(own, block)
        if clear:
            block.zero_()
    image = torch.stack(images).permute(2, 0, 1, 3).reshape(k, n)
    return image.sub_(z.sum(dim=0)).mul_(0.5).mT


def add_product_(x: Tensor, left: Tensor, right: Tensor, *, beta: float = 1.0) -> Tensor:
    r"""Add a product of thin factors, :math:`X \leftarrow \beta X + L R`, in one pass over X.

    Args:
        x: X, shape ``(..., n, p)``; it may have any strides.
        left: L, shape ``(..., n, k)``, k small.
        right: R, shape ``(..., k, p)``.
        beta: 1, or 0 to overwrite X without reading it.
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
