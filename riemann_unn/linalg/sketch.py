"""Sketches: a displacement Δ as a product of two thin factors, Δ ≈ A Bᴴ with k columns each.

Every sketch is scale-free: ``sketch(c * Δ)`` is ``(c * A, B)``, with no epsilon that would
shrink small updates. Factors are stored column-major (the transpose of a contiguous
``(k, n)`` tensor), which is the fast layout for products with a large row-major matrix.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from .factor import DOUBLE, svd, thin_qr
from .products import rows_times, times_columns

__all__ = ["SketchMethod", "orthonormal_rows", "sketch"]

SketchMethod = Literal["power", "lsi", "column", "svd"]
"""Name of a sketch, see :func:`sketch`."""

# Weight of fresh random rows beside a warm start: enough to find new directions within a few
# steps, too little to blur the ones that are known.
_FRESH = 0.1
# Lengths between this and its inverse are safe from underflow and overflow in every precision.
_USUAL = 1e-15


def orthonormal_rows(w: Tensor, *, length: Tensor | None = None) -> Tensor:
    """Return rows that are orthonormal and span the rows of ``w``, shape ``(..., k, p)``, k <= p.

    Where rows of ``w`` are dependent, others complete the set; a single zero
    row stays zero. Not-a-number spreads to the result. The Frobenius norm of a
    matrix may be given as its ``length`` if it is known.
    """
    if w.numel() == 0:
        return w
    if w.ndim == 2 and w.shape[0] == 1 and w.is_cpu and not w.requires_grad:
        norm = torch.linalg.vector_norm(w) if length is None else length
        if _USUAL < norm.item() < 1 / _USUAL:
            return w / norm
    if w.shape[-2] == 1 and w.dtype in DOUBLE:
        # Squares of single precision stay inside the exponent range of double.
        wide = DOUBLE[w.dtype]
        norms: Tensor = torch.linalg.vector_norm(w, dim=-1, keepdim=True, dtype=wide)
        unit: Tensor = w / norms.clamp_min(torch.finfo(wide).tiny)
        return unit.to(w.dtype)
    # Dividing by the largest entry first keeps them there as well.
    largest = w.abs().amax(dim=(-2, -1), keepdim=True)
    w = w / largest.clamp_min(torch.finfo(w.dtype).tiny)
    if w.shape[-2] > 1:
        return thin_qr(w.mH)[0].to(w.dtype).mH
    lengths: Tensor = torch.linalg.vector_norm(w, dim=-1, keepdim=True)
    return w / lengths.clamp_min(0.5)


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
    b = orthonormal_rows(rows_times(rows, delta)).mH
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
    b = orthonormal_rows(rows).mH
    return a @ (rows @ b), b


def sketch(
    delta: Tensor,
    *,
    rank: int,
    method: SketchMethod = "power",
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
    rounds: int = 1,
) -> tuple[Tensor, Tensor]:
    r"""Return thin factors of a matrix.

    .. math:: \Delta \approx A B^H, \qquad A \in \mathbb{C}^{n \times k},\;
        B \in \mathbb{C}^{p \times k}

    B has orthonormal columns, so A carries the size of Δ. The product is exact
    when ``rank`` is at least the rank of Δ. Methods, with their passes over Δ:

    - ``"power"``: subspace iteration from ``start`` plus fresh Gaussian rows,
      :math:`B = \operatorname{orth}(\Delta^H R^H)`, :math:`A = \Delta B` (2 passes
      a round; one round more without ``start``). The fresh rows find what a start
      orthogonal to Δ would miss.
    - ``"lsi"``: the same from Gaussian rows alone (2 passes).
    - ``"column"``: projection on columns sampled by their energy (2 passes).
    - ``"svd"``: the truncated singular value decomposition, the best there is.

    Args:
        delta: shape ``(..., n, p)``, real or complex floating point.
        rank: k; from ``min(n, p)`` on the factors are ``(delta, I)``, exact.
        method: one of the above.
        start: orthonormal rows ``(..., k, n)`` near the left space of Δ, for ``"power"``.
        generator: source of the random rows; the default is the global one.
        rounds: of ``"power"``; each reads Δ twice and comes closer to ``"svd"``.

    Returns:
        ``(A, B)``.

    Raises:
        ValueError: ``rank`` or ``rounds`` is below 1 or ``method`` unknown.

    Reference:
        Kiani et al., "projUNN" (2022), section 4.1; Halko, Martinsson and Tropp
        (2011), section 4.5; Drineas, Kannan and Mahoney (2006) for the columns;
        Vogels et al., "PowerSGD" (2019) for the warm start.
    """
    if rank < 1:
        raise ValueError(f"{rank=} must be at least 1")
    if rounds < 1:
        raise ValueError(f"{rounds=} must be at least 1")
    if method not in get_args(SketchMethod):
        raise ValueError(f"sketch {method!r} is unknown; choose from {get_args(SketchMethod)}")
    if rank >= min(delta.shape[-2:]):
        return delta, torch.eye(delta.shape[-1], dtype=delta.dtype, device=delta.device)
    if method == "svd":
        u, s, vh = svd(delta)
        return u[..., :rank] * s[..., None, :rank], vh[..., :rank, :].mH
    if method == "column":
        return _column_sample(delta, rank, generator)
    rows = _gaussian_rows(delta, rank, generator)
    if method == "lsi":
        return _project(delta, rows)
    if start is None:
        rounds += 1
    else:
        rows = torch.add(start, rows, alpha=_FRESH / delta.shape[-2] ** 0.5)
    for _ in range(rounds - 1):
        a, _ = _project(delta, rows)
        rows = orthonormal_rows(a.mH)
    return _project(delta, rows)
