"""The one formula: a low-rank displacement Δ = A Bᴴ applied as a unitary rotation of X.

With Z = Δ Xᴴ restricted to the small space Q that it touches, X⁺ = X + Q (φ(Qᴴ Z Q) - I) Qᴴ X.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .factor import thin_qr
from .maps import Phi, polar, unitary_core

__all__ = ["retract_low_rank", "retract_low_rank_"]

# From this size on reading X costs more than the small matrices that spare it.
_LARGE = 256 * 256
# Rounding of the product of X with Q enters X⁺ at most so many times where A and B make it.
_WELL = 1.0


def _add_product_(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """X += L R in place; for (n, p) and (batch, n, p) one pass over X."""
    if x.is_conj():
        return x.copy_(x + left @ right)
    if x.ndim == 2 and left.shape[-1] <= 2 and x.numel() > _LARGE:
        # One outer product after another takes less time than addmm_ with two columns.
        for column, row in zip(left.mT.contiguous(), right.contiguous(), strict=True):
            x.addr_(column, row)
        return x
    if x.ndim == 2:
        return x.addmm_(left, right)
    if x.ndim == 3:
        return x.baddbmm_(left, right)
    return x.add_(left @ right)


def _minus_identity(core: Tensor) -> Tensor:
    """φ - I, formed in the core's double precision."""
    core = core.clone()
    core.diagonal(dim1=-2, dim2=-1).sub_(1)
    return core


def _rotate_from_left_(x: Tensor, a: Tensor, b: Tensor, *, phi: Phi, special: bool) -> Tensor:
    """X ← (I + Q (φ(a cᴴ) - I) Qᴴ) X with Q = orth[A, C], C = X B."""
    k, n = a.shape[-1], x.shape[-2]
    c = x @ b
    if 2 * k >= n:
        turn = _minus_identity(unitary_core(a @ c.mH, phi=phi, special=special))
        return x.add_(turn.to(x.dtype) @ x)
    q, r = thin_qr(torch.cat([a.mH, c.mH], dim=-2).mH)
    turn = _minus_identity(unitary_core(r[..., :k] @ r[..., k:].mH, phi=phi, special=special))
    q, back = q.to(x.dtype), None
    if x.shape[-2:].numel() > _LARGE:
        back = _harmless_inverse(r, turn)
    if back is None:
        right = turn.to(x.dtype) @ (q.mH @ x)
    else:
        # Qᴴ X = R⁻ᴴ [A C]ᴴ X and Cᴴ X = Bᴴ: half as many rows to multiply X with.
        rows = torch.cat([a.mH @ x, b.mH.expand(*x.shape[:-2], *b.mH.shape[-2:])], dim=-2)
        right = (turn @ back.mH).to(x.dtype) @ rows
    return _add_product_(x, q, right)


def _harmless_inverse(r: Tensor, turn: Tensor) -> Tensor | None:
    """The inverse of R, or None where the turn would carry the digits that it loses into X."""
    lengths = torch.linalg.vector_norm(r, dim=-2, keepdim=True)
    inverse, _ = torch.linalg.inv_ex(r / lengths)
    # Not-a-number is not small either.
    harmless = bool(inverse.abs().amax() * turn.abs().amax() <= _WELL)
    return inverse / lengths.mT if harmless else None


def _polar_tall_(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """X ← polar(X + A Bᴴ) for tall X, where A may point out of the span of X.

    With Q = orth[B, M], M = Xᴴ A and P the part of A outside X, the factor is
    X + ([X Q, P] polar(core) - X Q) Qᴴ with a core of 3k by 2k.
    """
    k = a.shape[-1]
    n, p = x.shape[-2:]
    if 2 * k >= p or n - p < k:
        return x.copy_(polar(x + a @ b.mH))
    m = (a.mH @ x).mH
    q, r = (part.to(x.dtype) for part in thin_qr(torch.cat([b.mH, m.mH], dim=-2).mH))
    b_core, m_core = r[..., :k], r[..., k:]
    xq = x @ q
    outside = a - xq @ m_core
    basis = thin_qr(outside)[0].to(x.dtype)
    # Twice is enough: the first difference cancels digits when A is nearly inside X.
    basis = thin_qr(basis - x @ (basis.mH @ x).mH)[0].to(x.dtype)
    core = torch.cat([m_core @ b_core.mH, (basis.mH @ outside) @ b_core.mH], dim=-2)
    turn = unitary_core(core, phi="polar")
    top = _minus_identity(turn[..., : 2 * k, :]).to(x.dtype)
    left = xq @ top + basis @ turn[..., 2 * k :, :].to(x.dtype)
    return _add_product_(x, left, q.mH)


def retract_low_rank_(
    x: Tensor, a: Tensor, b: Tensor, *, phi: Phi, special: bool = False
) -> Tensor:
    """In-place form of :func:`retract_low_rank`; ``x`` may have any strides."""
    if x.numel() == 0:
        return x
    if phi == "polar" and x.shape[-2] > x.shape[-1]:
        return _polar_tall_(x, a, b)
    return _rotate_from_left_(x, a, b, phi=phi, special=special)


def retract_low_rank(x: Tensor, a: Tensor, b: Tensor, *, phi: Phi, special: bool = False) -> Tensor:
    r"""Return the point that the displacement :math:`\Delta = A B^H` leads to.

    .. math::

        C = XB, \quad Q = \operatorname{orth}[A\; C], \quad
        X^+ = X + Q\,\bigl(\phi(Q^H A\, C^H Q) - I\bigr)\,Q^H X

    For ``"exp"`` and ``"cayley"`` this is
    :math:`\phi(\tfrac12(\Delta X^H - X \Delta^H))\, X`; for ``"polar"`` it is
    the polar factor of :math:`X + \Delta`, for tall X by a core with the part of
    A outside X added. The result is as orthonormal as X, to rounding, however
    large Δ is. Cost O(k n p); nothing larger than X is formed.

    Args:
        x: orthonormal columns, shape ``(..., n, p)``, ``p <= n``.
        a: shape ``(..., n, k)``.
        b: shape ``(..., p, k)``.
        phi: ``"exp"`` (projUNN-T), ``"cayley"`` or ``"polar"`` (projUNN-D).
        special: never change the sign of the determinant (matters for ``"polar"``).

    Returns:
        The new point, shape and dtype of ``x``.

    Reference:
        Kiani et al., "projUNN" (2022), section 4 and appendix; Wen and Yin
        (2013), lemma 4, for the low-rank Cayley form.
    """
    return retract_low_rank_(x.clone(), a, b, phi=phi, special=special)
