"""Linear systems with I minus a skew-Hermitian matrix, by blockwise elimination."""

from __future__ import annotations

import torch
from torch import Tensor

from .step.products import add_product_

__all__ = ["times_inverse"]

_BLOCK = 128


def times_inverse(x: Tensor, m: Tensor) -> Tensor:
    r"""Return :math:`X M^{-1}` for a matrix whose Hermitian part is positive definite.

    Such matrices need no pivots, so columns are eliminated in blocks: nearly all
    of the work is in matrix products, which LAPACK's solve does not reach.

    Args:
        x: shape ``(..., l, n)``.
        m: shape ``(..., n, n)``, with a skew-Hermitian part S that is not large:
            rounding grows with the square of its norm.

    Returns:
        Shape ``(..., l, n)``.

    Reference:
        Golub and Van Loan, "Matrix Computations" (2013), section 4.2.2, on positive
        definite systems that are not symmetric.
    """
    n, rows = m.shape[-1], x.shape[-2]
    both = torch.cat([x, m], dim=-2)
    left, below = both[..., :rows, :], both[..., rows:, :]
    inverses = []
    for start in range(0, n, _BLOCK):
        stop = min(start + _BLOCK, n)
        inverse = torch.linalg.inv_ex(below[..., start:stop, start:stop])[0]
        inverses.append(inverse)
        beside = inverse.neg() @ below[..., start:stop, stop:]
        add_product_(left[..., stop:], left[..., start:stop], beside)
        add_product_(below[..., stop:, stop:], below[..., stop:, start:stop], beside)
    for start, inverse in zip(reversed(range(0, n, _BLOCK)), reversed(inverses), strict=True):
        stop = min(start + _BLOCK, n)
        columns = left[..., start:stop]
        add_product_(columns, left[..., stop:], below[..., stop:, start:stop].neg())
        columns.copy_(columns @ inverse)
    return left
