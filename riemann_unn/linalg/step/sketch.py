"""Sketches: a matrix Δ as a product of two thin factors, Δ ≈ A Bᴴ with k columns each.

They do not depend on the point of the gradient Δ; see :mod:`.tangent` for sketches that do.
Every sketch is scale-free: ``sketch(c * Δ)`` is ``(c * A, B)``, with no epsilon that would
shrink small updates. Factors are stored column-major (the transpose of a contiguous
``(k, n)`` tensor), which is the fast layout for products with a large row-major matrix.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from ..factor import column_norms, svd, thin_qr
from ..value_branches import may_branch_on
from .masked import masked_columns, tiny_of
from .products import rows_times, times_columns

__all__ = [
    "SketchMethod",
    "is_usual",
    "orthonormal_columns",
    "orthonormal_rows",
    "sketch",
]

SketchMethod = Literal["lsi", "column", "svd"]
"""Name of a sketch, see :func:`sketch`."""

# Lengths between this and its inverse neither underflow nor overflow when squared.
_USUAL = 1e-15


def is_usual(length: float) -> bool:
    """Tell whether squares of a length, and of much shorter ones, are accurate."""
    return _USUAL < length < 1 / _USUAL


def orthonormal_columns(w: Tensor, *, otherwise: Tensor | None = None) -> Tensor:
    """Return orthonormal columns that span those of ``w``, shape ``(..., n, k)``, k <= n.

    Dependent columns are replaced by others; a single zero column by that of ``otherwise``, or it
    stays zero. NaN propagates to the result.
    """
    if w.numel() == 0:
        return w
    if w.shape[-1] > 1:
        if not may_branch_on(w):
            return masked_columns(w, otherwise)
        q: Tensor = thin_qr(w)[0].to(w.dtype)
        return q
    return _units(w, otherwise, -2)


def orthonormal_rows(w: Tensor, *, otherwise: Tensor | None = None, passes: int = 2) -> Tensor:
    """Return orthonormal rows as :func:`orthonormal_columns` does columns, ``(..., k, n)``."""
    if w.numel() == 0:
        return w
    if w.shape[-2] > 1:
        if not may_branch_on(w):
            columns = None if otherwise is None else otherwise.mH
            return masked_columns(w.mH, columns, passes=passes).mH
        if w.dtype == torch.float32 and w.ndim == 2:
            q: Tensor = torch.linalg.qr(w.mH)[0].mH  # orthonormal to the rounding of w
            return q
        q = thin_qr(w.mH)[0].to(w.dtype).mH
        return q
    return _units(w, otherwise, -1)


def _units(w: Tensor, otherwise: Tensor | None, dim: int) -> Tensor:
    """Return vectors along ``dim`` as unit vectors."""
    if w.ndim == 2 and may_branch_on(w):
        norm = torch.linalg.vector_norm(w)
        if is_usual(norm.item()):
            unit: Tensor = w / norm
            return unit
    norms = column_norms(w) if dim == -2 else column_norms(w.mT).mT
    unit = (w / norms.clamp_min(tiny_of(norms))).to(w.dtype)
    return unit if otherwise is None else torch.where(norms == 0, otherwise, unit)


def _gaussian_rows(delta: Tensor, rank: int, generator: torch.Generator | None) -> Tensor:
    """Draw k rows of expected squared length n, the same for every matrix of a batch.

    They are real for complex matrices too, so that a complex problem with zero
    imaginary part takes the steps of the real one.
    """
    n = delta.shape[-2]
    dtype = delta.real.dtype if delta.is_complex() else delta.dtype
    rows: Tensor = torch.randn(rank, n, dtype=dtype, device=delta.device, generator=generator)
    return rows.to(delta.dtype)


def _project(delta: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Project Δ on the row space that ``rows @ Δ`` spans."""
    b = orthonormal_columns(rows_times(rows, delta).mH)
    return times_columns(delta, b), b


def _column_norms(delta: Tensor) -> Tensor:
    """Norms over the rows, free of overflow, in units of the largest entry."""
    unit = delta.abs().amax(dim=(-2, -1), keepdim=True)
    unit = unit.clamp_min(torch.finfo(delta.dtype).tiny)
    norms: Tensor = torch.linalg.vector_norm(delta / unit, dim=-2)
    return norms


def _column_sample(
    delta: Tensor, rank: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Project Δ on the span of columns drawn with probability proportional to their energy."""
    count = min(2 * rank + 2, delta.shape[-1])
    norms = _column_norms(delta)
    uniform = torch.rand(
        delta.shape[-1], dtype=norms.dtype, device=delta.device, generator=generator
    )
    # Largest keys of log p + Gumbel noise: sampling without replacement that
    # batches, and that takes zero columns last instead of failing on them.
    keys = 2 * norms.log() - (-uniform.log()).log()
    index = keys.topk(count, dim=-1).indices
    columns = delta.gather(-1, index.unsqueeze(-2).expand(*delta.shape[:-1], count))
    picked = norms.gather(-1, index).unsqueeze(-2)
    columns = columns / torch.where(picked == 0, torch.ones_like(picked), picked).to(delta.dtype)
    a = svd(columns)[0][..., :rank]
    rows = a.mH @ delta
    b = orthonormal_columns(rows.mH)
    return a @ (rows @ b), b


def sketch(
    delta: Tensor,
    *,
    rank: int,
    method: SketchMethod = "lsi",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Return thin factors of a matrix.

    .. math:: \Delta \approx A B^H, \qquad A \in \mathbb{C}^{n \times k},\;
        B \in \mathbb{C}^{p \times k}

    B has orthonormal columns, so A carries the size of Δ. The product is exact
    when ``rank`` is at least the rank of Δ. Methods, with their passes over Δ:

    - ``"lsi"``: the row space spanned by Gaussian rows R, :math:`B = \operatorname{orth}(\Delta^H
      R^H)`, :math:`A = \Delta B` (2 passes).
    - ``"column"``: projection on columns sampled by their energy (2 passes).
    - ``"svd"``: the truncated singular value decomposition, the best there is.

    Args:
        delta: shape ``(..., n, p)``, real or complex floating point.
        rank: k; from ``min(n, p)`` on the factors are ``(delta, I)``, exact.
        method: one of the above.
        generator: source of the random rows; the default is the global one.

    Returns:
        ``(A, B)``.

    Raises:
        ValueError: ``rank`` is below 1 or ``method`` unknown.

    Reference:
        Kiani et al., "projUNN" (2022), section 4.1; Halko, Martinsson and Tropp
        (2011), section 4.1; Drineas, Kannan and Mahoney (2006) for the columns.
    """
    if rank < 1:
        raise ValueError(f"{rank=} must be at least 1")
    if method not in get_args(SketchMethod):
        raise ValueError(f"sketch {method!r} is unknown; choose from {get_args(SketchMethod)}")
    if rank >= min(delta.shape[-2:]):
        return delta, torch.eye(delta.shape[-1], dtype=delta.dtype, device=delta.device)
    if method == "svd":
        u, s, vh = svd(delta)
        return u[..., :rank] * s[..., None, :rank], vh[..., :rank, :].mH
    if method == "column":
        return _column_sample(delta, rank, generator)
    return _project(delta, _gaussian_rows(delta, rank, generator))
