"""Factorisations that are stable where LAPACK's single-precision ones are not."""

from __future__ import annotations

import torch
from torch import Tensor

from .value_branches import may_branch_on

__all__ = ["DOUBLE", "column_norms", "is_triangular", "length_of", "real_dtype", "svd", "thin_qr"]

DOUBLE = {torch.float32: torch.float64, torch.complex64: torch.complex128}


# torch.dtype.to_real cannot be compiled.
_REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the real parts of numbers of a dtype."""
    return _REAL.get(dtype, dtype)


def thin_qr(w: Tensor) -> tuple[Tensor, Tensor]:
    """Return Q with orthonormal columns and R with ``w = Q R``, in double precision.

    Double precision keeps Q orthonormal far below single rounding, at little cost for thin
    matrices. R is triangular, except where LAPACK's complex QR fails on exactly dependent columns:
    there it comes from the SVD.

    Args:
        w: shape ``(..., n, k)``, thin. NaN propagates to the result.
    """
    wide = w.to(DOUBLE.get(w.dtype, w.dtype))
    q, r = torch.linalg.qr(wide)
    if q.is_complex() and not bool(torch.isfinite(q).all()) and bool(torch.isfinite(wide).all()):
        q, s, vh = torch.linalg.svd(wide, full_matrices=False)
        r = s.unsqueeze(-1) * vh
    return q, r


def column_norms(x: Tensor) -> Tensor:
    """Return the norms of columns, ``(..., n, k)`` to ``(..., 1, k)``, summed in double precision.

    In double, squares of single precision cannot overflow.
    """
    if x.is_complex() and may_branch_on(x):
        # Norms of complex tensors are not vectorised, and ten times slower.
        real = torch.view_as_real(x.resolve_conj()).to(torch.float64)
        return real.square().sum(dim=(-3, -1)).sqrt().unsqueeze(-2)
    wide = torch.complex128 if x.is_complex() else torch.float64
    norms: Tensor = torch.linalg.vector_norm(x, dim=-2, keepdim=True, dtype=wide)
    return norms


def length_of(x: Tensor) -> float:
    """Return the Frobenius norm of a tensor, summed in double precision."""
    wide = torch.complex128 if x.is_complex() else torch.float64
    length: float = abs(torch.linalg.vector_norm(x, dtype=wide).item())
    return length


def is_triangular(r: Tensor) -> bool:
    """Tell whether R of :func:`thin_qr` is triangular, as it always is for real matrices."""
    return not r.is_complex() or not bool(r.tril(-1).any())


def svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the thin singular value decomposition ``(U, S, Vh)`` in the dtype of ``x``.

    complex64 is computed in complex128: LAPACK's single-precision complex
    routine fails to converge on exactly dependent columns.
    """
    if x.dtype == torch.complex64:
        u, s, vh = torch.linalg.svd(x.to(torch.complex128), full_matrices=False)
        return u.to(x.dtype), s.float(), vh.to(x.dtype)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    return u, s, vh
