"""Polishing: correcting rounding errors, at a bounded share of a step's cost."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "columns_due",
    "newton_schulz",
    "newton_schulz_",
    "polish_",
    "polish_block_",
    "polishes_at",
]

# One block of columns every few steps. Wide blocks make efficient matrix products, and the
# period keeps their share of a rank-1 step below 15 % (bench/polish_drift.py measures it).
_BLOCK = 64
_WIDE, _STRIPS = 512, 4


def _period(p: int) -> int:
    # With few columns the rounding of single steps does not average out.
    return 1 if p <= 4 else 4 if p <= _BLOCK else 16 if p <= 512 else 32


def _gram(x: Tensor) -> Tensor:
    """Return Xᴴ X; for large matrices from the strips above the diagonal."""
    p = x.shape[-1]
    if x.ndim > 2 or p < _WIDE:
        return x.mH @ x
    gram, step = x.new_empty(p, p), -(-p // _STRIPS)
    for start in range(0, p, step):
        stop = min(start + step, p)
        gram[start:stop, start:] = x[:, start:stop].mH @ x[:, start:]
        gram[stop:, start:stop] = gram[start:stop, stop:].mH
    return gram


def newton_schulz_(x: Tensor) -> Tensor:
    r"""Square the orthogonality error of nearly orthonormal columns, in place.

    .. math:: X \leftarrow X\,(I - \tfrac12 (X^H X - I))

    Args:
        x: shape ``(..., n, p)``, ``p <= n``, error well below 1; cost O(n p²).
    """
    return newton_schulz(x, out=x)


def newton_schulz(x: Tensor, *, out: Tensor) -> Tensor:
    """Write the result of :func:`newton_schulz_` to ``out``, in one call."""
    gram = _gram(x)
    gram.diagonal(dim1=-2, dim2=-1).sub_(1)
    return torch.sub(x, x @ gram, alpha=0.5, out=out)


def polish_block_(x: Tensor, start: int, stop: int) -> Tensor:
    r"""Make columns ``start:stop`` orthonormal to all columns of ``x`` again, in place.

    .. math:: X_J \leftarrow X_J - X_{\bar J} X_{\bar J}^H X_J
        - \tfrac12 X_J (X_J^H X_J - I)

    Pairs inside the block share the correction; a pair with one column outside is corrected fully,
    so a sweep over all blocks corrects every pair twice.

    Args:
        x: shape ``(..., n, p)``, nearly orthonormal columns; cost O(n p (stop - start)).
        start: first column.
        stop: one past the last column.
    """
    if stop - start == x.shape[-1]:
        return newton_schulz_(x)
    block = x[..., start:stop]
    error = x.mH @ block
    inside = error[..., start:stop, :]
    inside.diagonal(dim1=-2, dim2=-1).sub_(1)
    inside.mul_(0.5)
    block.sub_(x @ error)
    return x


def columns_due(p: int, *, step: int) -> tuple[int, int]:
    """Return the range of the few columns to polish at a step.

    As many in all as in :func:`polish_`, but some at every step instead of many at intervals, for
    matrices whose corrections are communicated.
    """
    count = min(p, -(-_BLOCK // _period(p)))
    start = step % -(-p // count) * count
    return start, min(start + count, p)


def polishes_at(p: int, *, step: int) -> bool:
    """Tell whether a matrix of p columns is polished at a step."""
    period = _period(p)
    return step % period == period - 1


def polish_(x: Tensor, *, step: int) -> Tensor:
    """Polish the block of columns that is due at this step, in place.

    Every ``period`` steps the next block of columns is corrected, so the cost per step is O(k n p)
    with a small k, and all columns are corrected at regular intervals.

    Args:
        x: shape ``(..., n, p)``, ``p <= n``, nearly orthonormal columns.
        step: number of steps taken, which determines the block.
    """
    p = x.shape[-1]
    if x.numel() == 0 or not polishes_at(p, step=step):
        return x
    blocks = -(-p // _BLOCK)
    start = step // _period(p) % blocks * _BLOCK
    return polish_block_(x, start, min(start + _BLOCK, p))
