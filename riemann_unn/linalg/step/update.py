"""The one formula: X turned by the φ of a skew-Hermitian matrix that is known on a few directions.

X⁺ = X + (X Q)(φ(K) - I) Qᴴ, with an orthonormal Q and a small core K; nothing n by n is formed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..factor import DOUBLE, column_norms, is_triangular, real_dtype, thin_qr
from ..host import on_host
from ..maps import rotate_by, skew, unitary_core
from .core import (
    Angle,
    Phi,
    angle_map,
    check_phi,
    core_minus_identity,
    near_turn,
    plane_angle,
    plane_minus_identity,
    small_turn,
)
from .masked import dense_turn, masked_next, tiny_of, turn_by_gram
from .polish import newton_schulz
from .products import CACHED, add_product_, rows_times, times_columns
from .tangent import core_of

__all__ = [
    "LargestAngle",
    "PlaneGram",
    "factors_of_turn",
    "is_plane",
    "plane_gram",
    "retract_low_rank",
    "retract_low_rank_",
    "rotate_low_rank_",
    "rotate_whole_",
    "turn_low_rank_",
    "turn_of",
]

LargestAngle = Callable[[], Tensor]
"""Finds the largest angle that a plane has turned by, for which a step itself has no need."""

# Up to this size a core is taken to double precision and its eigenvectors.
_CORE = 64
# Up to this length a core's largest angle is a tenth of a radian, since they come in pairs.
_NEAR = 0.14
# Squared lengths between this and its inverse keep products of theirs in single precision.
_SQUARES = 1e-30


def rotate_low_rank_(
    x: Tensor,
    v: Tensor,
    d: Tensor,
    xv: Tensor | None,
    *,
    phi: Phi | Angle,
    max_angle: float | None = None,
    by_planes: bool = True,
) -> tuple[Tensor, Tensor]:
    r"""Turn points along directions, in place.

    .. math:: X \leftarrow X\,\phi(K), \qquad
        K = d v^H - v d^H - v\,\operatorname{skew}(v^H d)\,v^H

    K agrees with its coordinates d on v. The result is as orthonormal as X, to rounding, however
    large d is, and X stays bit for bit where d is zero. One read of X beside the update.

    Args:
        x: orthonormal rows, shape ``(..., p, n)``; it may have any strides.
        v: orthonormal columns, shape ``(..., n, k)``.
        d: K v, shape ``(..., n, k)``, finite.
        xv: X v, if it is known.
        phi: which map, see ``linalg.step.core.angle_map``.
        max_angle: no plane turns by more; a larger step is shortened.
        by_planes: see ``tangent.next_directions``.

    Returns:
        The largest angle that a plane has turned by, in radians, float64, shape ``(...)``, and
        where the next sketch starts, shape ``(..., n, k)`` if 2 k <= n, see
        ``tangent.next_directions``.
    """
    angle, added = turn_low_rank_(x, v, d, xv, phi=phi, max_angle=max_angle, by_planes=by_planes)
    return angle(), added


def turn_low_rank_(
    x: Tensor,
    v: Tensor,
    d: Tensor,
    xv: Tensor | None,
    *,
    phi: Phi | Angle,
    max_angle: float | None,
    by_planes: bool,
    gram: PlaneGram | None = None,
) -> tuple[LargestAngle, Tensor]:
    """Do what :func:`rotate_low_rank_` does, and tell the angle when it is asked for.

    ``gram`` is :func:`plane_gram` of v and d, if it is known.
    """
    if v.shape[-1] == 1:
        if is_plane(d):
            gram = plane_gram(v, d) if gram is None else gram
            return _rotate_plane_(x, v, d, xv, phi, max_angle, gram)
        return _rotate_planes_(x, v, d, xv, phi, max_angle)
    if not (on_host(x) or callable(phi)):
        return _rotate_by_gram_(x, v, d, xv, phi, max_angle)
    q, r, right, angle, added = _turn_of_planes(v, d, phi, max_angle, by_planes)
    narrow, k = q.to(x.dtype), v.shape[-1]
    if xv is None or x.shape[-2:].numel() <= CACHED or not is_triangular(r):
        xq = times_columns(x, narrow)
    else:  # X v is known, and the first columns of Q are v in another basis
        corner = r[..., :k, :k]
        known = torch.linalg.solve_triangular(corner, xv.to(r.dtype), upper=True, left=False)
        xq = torch.cat([known.to(x.dtype), times_columns(x, narrow[..., k:])], dim=-1)
    add_product_(x, xq, right.to(x.dtype))
    return angle, added


def turn_of(
    v: Tensor,
    d: Tensor,
    *,
    phi: Phi | Angle,
    max_angle: float | None = None,
    by_planes: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Return what turns points along directions, :math:`\phi(K) = I + Q\,(\phi(K_Q) - I)\,Q^H`.

    Arguments are those of :func:`rotate_low_rank_`.

    Returns:
        Q, that spans v and d and is orthonormal but on accelerators, and the right factor
        :math:`(\phi(K_Q) - I)\,Q^H`, in double precision; and the two results of
        :func:`rotate_low_rank_`.
    """
    q, right, angle, added = factors_of_turn(
        v, d, phi=phi, max_angle=max_angle, by_planes=by_planes
    )
    return q, right, angle(), added


def factors_of_turn(
    v: Tensor, d: Tensor, *, phi: Phi | Angle, max_angle: float | None, by_planes: bool
) -> tuple[Tensor, Tensor, LargestAngle, Tensor]:
    """Return what :func:`turn_of` does, and tell the angle when it is asked for."""
    if v.shape[-1] == 1:
        basis, right, largest, added = _turn_of_one_plane(v, d, phi, max_angle)
        return basis, right, lambda: largest, added
    if not (on_host(v) or callable(phi)):
        basis, right, generator = turn_by_gram(v, d, phi, max_angle)
        return basis, right, _angle_of(generator, phi), masked_next(v, d)
    q, _, right, angle, added = _turn_of_planes(v, d, phi, max_angle, by_planes)
    return q, right, angle, added


def _angle_of(generator: Tensor, phi: Phi) -> LargestAngle:
    """Tell the largest angle by the eigenvalues of a small generator."""

    def angle() -> Tensor:
        largest: Tensor = angle_map(phi)(torch.linalg.eigvals(generator).abs().amax(dim=-1))
        return largest

    return angle


def _turn_of_planes(
    v: Tensor, d: Tensor, phi: Phi | Angle, max_angle: float | None, by_planes: bool
) -> tuple[Tensor, Tensor, Tensor, LargestAngle, Tensor]:
    k = v.shape[-1]
    q, r, core = core_of(v, d)
    is_small = phi == "exp" and not by_planes and core.ndim == 2
    if is_small and torch.linalg.vector_norm(core).item() <= min(_NEAR, max_angle or _NEAR):
        turn, added = near_turn(core), q[..., k:].to(v.dtype)

        def angle() -> Tensor:
            largest: Tensor = torch.linalg.matrix_norm(core, ord=2)
            return largest

    elif core.shape[-1] > _CORE and not callable(phi):
        turn, large = _large_turn(core, phi, max_angle)
        angle, added = lambda: large, q.to(v.dtype)[..., -k:]
    else:
        # No sketch starts from a step that leaves nothing out.
        count = k if by_planes and core.shape[-1] == 2 * k else 0
        turn, largest, leading = small_turn(core, phi, count, max_angle=max_angle)
        angle = lambda: largest  # noqa: E731
        added = (q @ leading if count else q[..., k:]).to(v.dtype)
    right = torch.mm(turn, q.mH) if turn.ndim == 2 else turn @ q.mH
    return q, r, right, angle, added


class PlaneGram(NamedTuple):
    """Two vectors v and d side by side, and their inner products, in double precision.

    A move is d times the scale.
    """

    basis: Tensor
    vv: float
    vd: float
    dd: float
    scale: float


def is_plane(d: Tensor) -> bool:
    """Tell if coordinates are those of one real plane on the host, which Python turns by."""
    return d.shape[-1] == 1 and d.ndim == 2 and not d.is_complex() and on_host(d)


def plane_gram(v: Tensor, d: Tensor, *, scale: float = 1.0) -> PlaneGram:
    """Return the Gram matrix of v and d, shape ``(n, 1)``."""
    basis = torch.cat([v, d], dim=-1)
    wide = basis.double()
    (vv, vd), (_, dd) = torch.mm(wide.mT, wide).tolist()
    return PlaneGram(basis, vv, vd, dd, scale)


def _rotate_plane_(
    x: Tensor,
    v: Tensor,
    d: Tensor,
    xv: Tensor | None,
    phi: Phi | Angle,
    max_angle: float | None,
    gram: PlaneGram,
) -> tuple[LargestAngle, Tensor]:
    r"""One real plane, by its one angle.

    .. math:: \phi(K) = I + [v\; d]\,\bigl(a J + b J S J\bigr)\,[v\; d]^T, \quad
        a = \frac{\sin\phi(\theta)}{\theta},\; b = \frac{1 - \cos\phi(\theta)}{\theta^2}

    with S the Gram matrix of v and d, :math:`J = \begin{pmatrix} 0 & -1 \\ 1 & 0 \end{pmatrix}`
    and :math:`\theta^2 = \det S`: neither need be orthonormal.
    """
    basis, vv, vd, dd, scale = gram
    if dd == 0.0:
        return partial(_number, vv * 0.0), v  # not a number where v is
    determinant = vv * dd - vd * vd
    if not (_SQUARES < dd < 1 / _SQUARES and 2 * determinant > dd):
        return _rotate_planes_(x, v, d * scale, xv, phi, max_angle)
    length = math.sqrt(determinant)
    angle = plane_angle(length * abs(scale), phi, max_angle)
    half = math.sin(0.5 * angle)
    odd, even = math.copysign(math.sin(angle), scale) / length, 2.0 * half * half / determinant
    core = [[-even * dd, even * vd - odd], [even * vd + odd, -even * vv]]
    right = torch.mm(torch.tensor(core, dtype=x.dtype, device=x.device), basis.mT)
    add_product_(x, _times_basis(x, basis, xv), right)
    return partial(_number, angle), d / math.copysign(math.sqrt(dd), scale)


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _rotate_planes_(
    x: Tensor, v: Tensor, d: Tensor, xv: Tensor | None, phi: Phi | Angle, max_angle: float | None
) -> tuple[LargestAngle, Tensor]:
    """One plane of each matrix of a batch, or a complex one."""
    basis, right, angle, added = _turn_of_one_plane(v, d, phi, max_angle)
    add_product_(x, _times_basis(x, basis.to(x.dtype), xv), right.to(x.dtype))
    return lambda: angle, added


def _times_basis(x: Tensor, basis: Tensor, xv: Tensor | None) -> Tensor:
    """Return X times a basis whose first columns are v, of which X v may be known."""
    if xv is None:
        return times_columns(x, basis)
    return torch.cat([xv, times_columns(x, basis[..., xv.shape[-1] :])], dim=-1)


def _rotate_by_gram_(
    x: Tensor, v: Tensor, d: Tensor, xv: Tensor | None, phi: Phi, max_angle: float | None
) -> tuple[LargestAngle, Tensor]:
    basis, right, generator = turn_by_gram(v, d, phi, max_angle)
    add_product_(x, _times_basis(x, basis.to(x.dtype), xv), right.to(x.dtype))
    return _angle_of(generator, phi), masked_next(v, d)


def _turn_of_one_plane(
    v: Tensor, d: Tensor, phi: Phi | Angle, max_angle: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if callable(phi) or v.is_complex():
        return _turn_of_plane(v, d, phi, max_angle)
    return _turn_of_real_plane(v, d, phi, max_angle)


def _turn_of_real_plane(
    v: Tensor, d: Tensor, phi: Phi, max_angle: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What :func:`_turn_of_plane` does of real matrices, in fewer operations."""
    wide = DOUBLE.get(v.dtype, v.dtype)
    v_wide, d_wide = v.to(wide), d.to(wide)
    v_wide = v_wide / torch.linalg.vector_norm(v_wide, dim=-2, keepdim=True)
    rest = d_wide - v_wide @ (v_wide.mT @ d_wide)
    theta = torch.linalg.vector_norm(rest, dim=-2, keepdim=True)
    unit = rest / theta.clamp_min(tiny_of(theta))
    angle = theta if max_angle is None else theta.clamp_max(max_angle)
    angle = angle if phi == "exp" else angle_map(phi)(angle)
    half, odd = torch.sin(0.5 * angle), torch.sin(angle)
    even, basis = -2 * half * half, torch.cat([v_wide, unit], dim=-1)
    turn = torch.cat([torch.cat([even, -odd], dim=-1), torch.cat([odd, even], dim=-1)], dim=-2)
    added = torch.where(theta == 0, v, unit.to(v.dtype))
    return basis, turn @ basis.mT, angle[..., 0, 0], added


def _turn_of_plane(
    v: Tensor, d: Tensor, phi: Phi | Angle, max_angle: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = DOUBLE.get(v.dtype, v.dtype)
    v_wide, d_wide = v.to(wide), d.to(wide)
    v_wide = v_wide / column_norms(v_wide)
    inner = v_wide.mH @ d_wide
    corner = inner.imag if v.is_complex() else torch.zeros_like(inner)
    rest = d_wide - v_wide * inner
    beside = column_norms(rest)
    q = rest / beside.masked_fill(beside == 0, 1)
    turn, angle = plane_minus_identity(
        corner[..., 0, 0], beside[..., 0, 0], phi, max_angle=max_angle
    )
    turn = turn if v.is_complex() else turn.real
    basis = torch.cat([v_wide, q], dim=-1)
    return basis, turn.to(wide) @ basis.mH, angle, torch.where(beside == 0, v, q.to(v.dtype))


def _turn(core: Tensor, phi: Phi | Angle) -> Tensor:
    """φ(core) - I in the core's precision, of small cores by their angles."""
    if not (on_host(core) or callable(phi)):
        return dense_turn(core, phi, None)
    if core.shape[-1] <= _CORE or callable(phi):
        return core_minus_identity(core, phi)[0]
    return _large_turn(core, phi, None)[0]


def _large_turn(core: Tensor, phi: Phi, max_angle: float | None) -> tuple[Tensor, Tensor]:
    core = skew(core)
    core = core if max_angle is None else _shortened(core, max_angle)
    turn = unitary_core(core, phi=phi)
    turn.diagonal(dim1=-2, dim2=-1).sub_(1)
    # A bound: angles of real matrices come in pairs.
    angle = torch.linalg.matrix_norm(core) / (1 if core.is_complex() else 2**0.5)
    return turn, angle_map(phi)(angle)


def _shortened(k: Tensor, max_angle: float) -> Tensor:
    """Shorten skew-Hermitian matrices that turn a plane further than the cap."""
    # Angles of real matrices come in pairs, so that the Frobenius norm counts each twice.
    bound = torch.linalg.matrix_norm(k) / (1 if k.is_complex() else 2**0.5)
    if not bool((bound > max_angle).any()):
        return k
    wide = k.to(DOUBLE.get(k.dtype, k.dtype))
    largest = torch.linalg.eigvalsh(wide.mH @ wide)[..., -1].clamp_min(0).sqrt()
    share = (max_angle / largest.clamp_min(max_angle))[..., None, None]
    shorter: Tensor = k * share.to(real_dtype(k.dtype))
    return shorter


def rotate_whole_(
    x: Tensor, k: Tensor, *, phi: Phi | Angle, max_angle: float | None = None
) -> Tensor:
    r"""Turn square points by a whole generator, in place, and polish them: :math:`X\,\phi(K)`.

    Args:
        x: shape ``(..., n, n)``.
        k: skew-Hermitian, shape ``(..., n, n)``; it may be overwritten.
        phi: which map.
        max_angle: no plane turns by more; a larger step is shortened.
    """
    if callable(phi):
        turn, _ = core_minus_identity(k, phi, max_angle=max_angle)
        new = add_product_(x.clone(), x, turn.to(x.dtype))
    elif not on_host(x):
        exact = k.to(DOUBLE.get(k.dtype, k.dtype)) if k.shape[-1] <= _CORE else k
        new = add_product_(x.clone(), x, dense_turn(exact, phi, max_angle).to(x.dtype))
    else:
        k = k if max_angle is None else _shortened(k, max_angle)
        new = rotate_by(x, k, phi=phi)
    # One Newton-Schulz step mends the point, the map and the product of both.
    return newton_schulz(new, out=x)


def retract_low_rank_(x: Tensor, a: Tensor, b: Tensor, *, phi: Phi | Angle) -> Tensor:
    """In-place form of :func:`retract_low_rank`; ``x`` may have any strides."""
    check_phi(phi)
    k = a.shape[-1]
    if x.numel() == 0 or k == 0:
        return x
    wide = DOUBLE.get(x.dtype, x.dtype)
    c = times_columns(x, b)
    if 2 * k >= x.shape[-2]:
        a, c = (part.to(wide) if x.shape[-2] <= _CORE else part for part in (a, c))
        turn = _turn(skew(a @ c.mH), phi)
        return x.add_(turn.to(x.dtype) @ x)
    q, r = thin_qr(torch.cat([a, c], dim=-1))
    turn = _turn(skew(r[..., :k] @ r[..., k:].mH), phi)
    narrow = q.to(x.dtype)
    return add_product_(x, (q @ turn.to(q.dtype)).to(x.dtype), rows_times(narrow.mH, x))


def retract_low_rank(x: Tensor, a: Tensor, b: Tensor, *, phi: Phi | Angle) -> Tensor:
    r"""Return the point that the displacement :math:`\Delta = A B^H` leads to.

    .. math:: X^+ = \phi\bigl(\operatorname{skew}(\Delta X^H)\bigr)\, X

    by the core of :math:`[A\; X B]`. The result is as orthonormal as X, to rounding, however
    large Δ is, and in the same component. Cost O(k n p); nothing larger than X is formed.

    Args:
        x: orthonormal columns, shape ``(..., n, p)``, ``p <= n``.
        a: shape ``(..., n, k)``.
        b: shape ``(..., p, k)``.
        phi: ``"exp"`` (projUNN-T), ``"cayley"``, ``"polar"`` (projUNN-D: of square X the polar
            factor of X + Δ, for a Δ that is tangent), or a function of angles.

    Returns:
        The new point, shape and dtype of ``x``.

    Raises:
        ValueError: ``phi`` is no φ.

    Reference:
        Kiani et al., "projUNN" (2022), section 4 and appendix; Wen and Yin
        (2013), lemma 4, for the low-rank Cayley form.
    """
    return retract_low_rank_(x.clone(), a, b, phi=phi)
