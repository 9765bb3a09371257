"""The one formula: a low-rank displacement Δ = A Bᴴ applied as a unitary rotation of X.

With Z = Δ Xᴴ restricted to the small space Q that it touches, X⁺ = X + Q (φ(Qᴴ Z Q) - I) Qᴴ X.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .factor import DOUBLE, root_of_gram, thin_qr
from .maps import Phi, polar, unitary_core
from .plane import turn_of_plane
from .products import CACHED, add_product_, rows_times, times_columns

__all__ = ["retract_low_rank", "retract_low_rank_"]

# Rounding of the products of X with A and B enters X⁺ at most so many times,
_WELL = 1.0
# and vectors that are nearer to dependence than this are made orthonormal by reflections.
_INDEPENDENT = 1e4


def _minus_identity(core: Tensor) -> Tensor:
    return core - torch.eye(core.shape[-1], dtype=core.dtype, device=core.device)


def _turn(core: Tensor, *, phi: Phi, special: bool) -> Tensor:
    """φ(core) - I, formed in the core's double precision."""
    return _minus_identity(unitary_core(core, phi=phi, special=special))


def _rotate_from_left_(x: Tensor, a: Tensor, b: Tensor, *, phi: Phi, special: bool) -> Tensor:
    """X ← (I + Q (φ(a cᴴ) - I) Qᴴ) X with Q = orth[A, C], C = X B."""
    k, n = a.shape[-1], x.shape[-2]
    c = times_columns(x, b)
    if 2 * k >= n:
        turn = _turn(a @ c.mH, phi=phi, special=special)
        return x.add_(turn.to(x.dtype) @ x)
    w = torch.cat([a.mH, c.mH], dim=-2)
    left = _left_by_gram(w, phi=phi, special=special)
    if left is not None:
        return add_product_(x, left.to(x.dtype), _times_point(w, x, b))
    q, r = thin_qr(w.mH)
    turn = _turn(r[..., :k] @ r[..., k:].mH, phi=phi, special=special)
    q = q.to(x.dtype)
    return add_product_(x, q, turn.to(x.dtype) @ rows_times(q.mH, x))


def _times_point(w: Tensor, x: Tensor, b: Tensor) -> Tensor:
    """W X for the rows W of [A C]ᴴ."""
    if x.shape[-2:].numel() <= CACHED:
        return rows_times(w, x)
    # Cᴴ X = Bᴴ, to the error of X, spares half of a product that would read more than the cache.
    thin = b.mH
    if x.ndim > 2:
        thin = thin.expand(*x.shape[:-2], *thin.shape[-2:])
    return torch.cat([rows_times(w[..., : b.shape[-1], :], x), thin], dim=-2)


def _left_by_gram(w: Tensor, *, phi: Phi, special: bool) -> Tensor | None:
    """The factor L of Q (φ - I) Qᴴ = L W for the rows W of [A C]ᴴ, from their inner products.

    None where rows are so nearly parallel that the turn would carry the digits
    that this loses into X.
    """
    k = w.shape[-2] // 2
    wide = w.to(DOUBLE.get(w.dtype, w.dtype))
    if k == 1:
        turn, lost = turn_of_plane(wide @ wide.mH, phi=phi, special=special)
        return (turn.mH @ wide).mH if lost <= _WELL else None
    lengths = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    # A zero row has no direction, and takes no part whichever it is given.
    divisors = torch.where(lengths == 0, 1, lengths)
    unit = wide / divisors
    gram = unit @ unit.mH
    gram.diagonal(dim1=-2, dim2=-1).fill_(1)
    r, inverse = root_of_gram(gram)
    condition = inverse.abs().amax(dim=(-2, -1))
    if not bool((condition <= _INDEPENDENT).all()):  # not-a-number is not small either
        return None
    scaled = r * lengths.mT
    turn = _turn(scaled[..., :k] @ scaled[..., k:].mH, phi=phi, special=special)
    # Q = W R⁻¹ loses the square of the condition of R, and the turn takes part of it back.
    loss = condition.square() * turn.abs().amax(dim=(-2, -1))
    if not bool((loss <= _WELL).all()):
        return None
    return (((inverse @ turn.mH @ inverse.mH) / divisors) @ unit).mH


def _polar_tall_(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """X ← polar(X + A Bᴴ) for tall X, where A may point out of the span of X.

    With Q = orth[B, M], M = Xᴴ A and P the part of A outside X, the factor is
    X + ([X Q, P] polar(core) - X Q) Qᴴ with a core of 3k by 2k.
    """
    k = a.shape[-1]
    n, p = x.shape[-2:]
    if 2 * k >= p or n - p < k:
        return x.copy_(polar(x + a @ b.mH))
    m = rows_times(a.mH, x).mH
    q, r = (part.to(x.dtype) for part in thin_qr(torch.cat([b.mH, m.mH], dim=-2).mH))
    b_core, m_core = r[..., :k], r[..., k:]
    xq = times_columns(x, q)
    outside = a - xq @ m_core
    basis = thin_qr(outside)[0].to(x.dtype)
    # Twice is enough: the first difference cancels digits when A is nearly inside X.
    basis = thin_qr(basis - x @ (basis.mH @ x).mH)[0].to(x.dtype)
    core = torch.cat([m_core @ b_core.mH, (basis.mH @ outside) @ b_core.mH], dim=-2)
    turn = unitary_core(core, phi="polar")
    top = _minus_identity(turn[..., : 2 * k, :]).to(x.dtype)
    left = xq @ top + basis @ turn[..., 2 * k :, :].to(x.dtype)
    return add_product_(x, left, q.mH)


def retract_low_rank_(
    x: Tensor, a: Tensor, b: Tensor, *, phi: Phi, special: bool = False
) -> Tensor:
    """In-place form of :func:`retract_low_rank`; ``x`` may have any strides."""
    if x.numel() == 0 or a.shape[-1] == 0:
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
