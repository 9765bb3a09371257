"""The update: X rotated by φ of a skew-Hermitian matrix that is given on a few directions.

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
from ..maps import rotate_by, skew, unitary_core
from ..value_branches import may_branch_on
from .core import (
    Angle,
    Phi,
    angle_map,
    check_phi,
    core_minus_identity,
    plane_angle,
    plane_minus_identity,
    small_core_minus_identity,
    taylor_minus_identity,
)
from .masked import dense_minus_identity, masked_next, rotation_by_gram, tiny_of
from .polish import newton_schulz
from .products import CACHED, add_product_, rows_times, times_columns
from .tangent import core_of

__all__ = [
    "LargestAngle",
    "PlaneGram",
    "is_plane",
    "plane_gram",
    "retract_low_rank",
    "retract_low_rank_",
    "rotate_low_rank_",
    "rotate_low_rank_lazily_",
    "rotate_whole_",
    "rotation_factors",
    "rotation_factors_lazily",
]

LargestAngle = Callable[[], Tensor]
"""Computes the largest rotation angle of a plane on request; the step itself does not need it."""

# Up to this size a core is decomposed in double precision.
_CORE = 64
# Up to this norm a core's largest angle is a tenth of a radian, since angles come in pairs.
_NEAR = 0.14
# Products of squared lengths between this and its inverse stay in the range of single precision.
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
    r"""Rotate points along directions, in place.

    .. math:: X \leftarrow X\,\phi(K), \qquad
        K = d v^H - v d^H - v\,\operatorname{skew}(v^H d)\,v^H

    K agrees with its coordinates d on v. The result is as orthonormal as X, to rounding, however
    large d is, and X does not change, bit for bit, where d is zero. One read of X beside the
    update.

    Args:
        x: orthonormal rows, shape ``(..., p, n)``; it may have any strides.
        v: orthonormal columns, shape ``(..., n, k)``.
        d: K v, shape ``(..., n, k)``, finite.
        xv: X v, if it is known.
        phi: which map, see ``linalg.step.core.angle_map``.
        max_angle: largest rotation angle; a larger step is shortened.
        by_planes: see ``tangent.next_directions``.

    Returns:
        The largest rotation angle of a plane, in radians, float64, shape ``(...)``, and the start
        of the next sketch, shape ``(..., n, k)`` if 2 k <= n, see ``tangent.next_directions``.
    """
    angle, added = rotate_low_rank_lazily_(
        x, v, d, xv, phi=phi, max_angle=max_angle, by_planes=by_planes
    )
    return angle(), added


def rotate_low_rank_lazily_(
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
    """Do the same as :func:`rotate_low_rank_`, and return a function that computes the angle.

    ``gram`` is :func:`plane_gram` of v and d, if it is known.
    """
    if v.shape[-1] == 1:
        if is_plane(d):
            gram = plane_gram(v, d) if gram is None else gram
            return _rotate_plane_(x, v, d, xv, phi, max_angle, gram)
        return _rotate_planes_(x, v, d, xv, phi, max_angle)
    if not (may_branch_on(x) or callable(phi)):
        return _rotate_by_gram_(x, v, d, xv, phi, max_angle)
    q, r, right, angle, added = _factors_of_planes(v, d, phi, max_angle, by_planes)
    narrow, k = q.to(x.dtype), v.shape[-1]
    if xv is None or x.shape[-2:].numel() <= CACHED or not is_triangular(r):
        xq = times_columns(x, narrow)
    else:  # X v is known, and the first columns of Q span v
        corner = r[..., :k, :k]
        known = torch.linalg.solve_triangular(corner, xv.to(r.dtype), upper=True, left=False)
        xq = torch.cat([known.to(x.dtype), times_columns(x, narrow[..., k:])], dim=-1)
    add_product_(x, xq, right.to(x.dtype))
    return angle, added


def rotation_factors(
    v: Tensor,
    d: Tensor,
    *,
    phi: Phi | Angle,
    max_angle: float | None = None,
    by_planes: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Return factors of the rotation, :math:`\phi(K) = I + Q\,(\phi(K_Q) - I)\,Q^H`.

    Arguments are those of :func:`rotate_low_rank_`.

    Returns:
        Q, which spans v and d and, except on accelerators, is orthonormal, and the right factor
        :math:`(\phi(K_Q) - I)\,Q^H`, in double precision; and the two results of
        :func:`rotate_low_rank_`.
    """
    q, right, angle, added = rotation_factors_lazily(
        v, d, phi=phi, max_angle=max_angle, by_planes=by_planes
    )
    return q, right, angle(), added


def rotation_factors_lazily(
    v: Tensor, d: Tensor, *, phi: Phi | Angle, max_angle: float | None, by_planes: bool
) -> tuple[Tensor, Tensor, LargestAngle, Tensor]:
    """The same as :func:`rotation_factors`, with a function that computes the angle."""
    if v.shape[-1] == 1:
        basis, right, largest, added = _factors_of_one_plane(v, d, phi, max_angle)
        return basis, right, lambda: largest, added
    if not (may_branch_on(v) or callable(phi)):
        basis, right, generator = rotation_by_gram(v, d, phi, max_angle)
        return basis, right, _angle_of(generator, phi), masked_next(v, d)
    q, _, right, angle, added = _factors_of_planes(v, d, phi, max_angle, by_planes)
    return q, right, angle, added


def _angle_of(generator: Tensor, phi: Phi) -> LargestAngle:
    """Return a function that computes the largest angle, by eigenvalues of a small generator."""

    def angle() -> Tensor:
        largest: Tensor = angle_map(phi)(torch.linalg.eigvals(generator).abs().amax(dim=-1))
        return largest

    return angle


def _factors_of_planes(
    v: Tensor, d: Tensor, phi: Phi | Angle, max_angle: float | None, by_planes: bool
) -> tuple[Tensor, Tensor, Tensor, LargestAngle, Tensor]:
    k = v.shape[-1]
    q, r, core = core_of(v, d)
    is_small = phi == "exp" and not by_planes and core.ndim == 2
    if is_small and torch.linalg.vector_norm(core).item() <= min(_NEAR, max_angle or _NEAR):
        minus_identity, added = taylor_minus_identity(core), q[..., k:].to(v.dtype)

        def angle() -> Tensor:
            largest: Tensor = torch.linalg.matrix_norm(core, ord=2)
            return largest

    elif core.shape[-1] > _CORE and not callable(phi):
        minus_identity, large = _large_minus_identity(core, phi, max_angle)
        angle, added = lambda: large, q.to(v.dtype)[..., -k:]
    else:
        # A step that uses all directions needs no start for the next sketch.
        count = k if by_planes and core.shape[-1] == 2 * k else 0
        minus_identity, largest, leading = small_core_minus_identity(
            core, phi, count, max_angle=max_angle
        )
        angle = lambda: largest  # noqa: E731
        added = (q @ leading if count else q[..., k:]).to(v.dtype)
    right = torch.mm(minus_identity, q.mH) if minus_identity.ndim == 2 else minus_identity @ q.mH
    return q, r, right, angle, added


class PlaneGram(NamedTuple):
    """The matrix [v d], and the inner products of v and d, in double precision.

    The move is d times the scale.
    """

    basis: Tensor
    vv: float
    vd: float
    dd: float
    scale: float


def is_plane(d: Tensor) -> bool:
    """Tell if coordinates are of one real plane on the host, computed with Python's scalars."""
    return d.shape[-1] == 1 and d.ndim == 2 and not d.is_complex() and may_branch_on(d)


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
    r"""Rotate one real plane by its angle.

    .. math:: \phi(K) = I + [v\; d]\,\bigl(a J + b J S J\bigr)\,[v\; d]^T, \quad
        a = \frac{\sin\phi(\theta)}{\theta},\; b = \frac{1 - \cos\phi(\theta)}{\theta^2}

    with S the Gram matrix of v and d, :math:`J = \begin{pmatrix} 0 & -1 \\ 1 & 0 \end{pmatrix}`
    and :math:`\theta^2 = \det S`: neither need be orthonormal.
    """
    basis, vv, vd, dd, scale = gram
    if dd == 0.0:
        return partial(_double, vv * 0.0), v  # NaN where v is
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
    return partial(_double, angle), d / math.copysign(math.sqrt(dd), scale)


def _double(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _rotate_planes_(
    x: Tensor, v: Tensor, d: Tensor, xv: Tensor | None, phi: Phi | Angle, max_angle: float | None
) -> tuple[LargestAngle, Tensor]:
    """Rotate one plane of each matrix of a batch, or a complex one."""
    basis, right, angle, added = _factors_of_one_plane(v, d, phi, max_angle)
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
    basis, right, generator = rotation_by_gram(v, d, phi, max_angle)
    add_product_(x, _times_basis(x, basis.to(x.dtype), xv), right.to(x.dtype))
    return _angle_of(generator, phi), masked_next(v, d)


def _factors_of_one_plane(
    v: Tensor, d: Tensor, phi: Phi | Angle, max_angle: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if callable(phi) or v.is_complex():
        return _factors_of_any_plane(v, d, phi, max_angle)
    return _factors_of_real_plane(v, d, phi, max_angle)


def _factors_of_real_plane(
    v: Tensor, d: Tensor, phi: Phi, max_angle: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same as :func:`_factors_of_any_plane` for real matrices, in fewer operations."""
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
    minus_identity = torch.cat(
        [torch.cat([even, -odd], dim=-1), torch.cat([odd, even], dim=-1)], dim=-2
    )
    added = torch.where(theta == 0, v, unit.to(v.dtype))
    return basis, minus_identity @ basis.mT, angle[..., 0, 0], added


def _factors_of_any_plane(
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
    minus_identity, angle = plane_minus_identity(
        corner[..., 0, 0], beside[..., 0, 0], phi, max_angle=max_angle
    )
    minus_identity = minus_identity if v.is_complex() else minus_identity.real
    basis = torch.cat([v_wide, q], dim=-1)
    return (
        basis,
        minus_identity.to(wide) @ basis.mH,
        angle,
        torch.where(beside == 0, v, q.to(v.dtype)),
    )


def _minus_identity(core: Tensor, phi: Phi | Angle) -> Tensor:
    """Return φ(core) - I, for small cores from their angles."""
    if not (may_branch_on(core) or callable(phi)):
        return dense_minus_identity(core, phi, None)
    if core.shape[-1] <= _CORE or callable(phi):
        return core_minus_identity(core, phi)[0]
    return _large_minus_identity(core, phi, None)[0]


def _large_minus_identity(core: Tensor, phi: Phi, max_angle: float | None) -> tuple[Tensor, Tensor]:
    core = skew(core)
    core = core if max_angle is None else _shortened(core, max_angle)
    minus_identity = unitary_core(core, phi=phi)
    minus_identity.diagonal(dim1=-2, dim2=-1).sub_(1)
    # A bound: angles of real matrices come in pairs.
    angle = torch.linalg.matrix_norm(core) / (1 if core.is_complex() else 2**0.5)
    return minus_identity, angle_map(phi)(angle)


def _shortened(k: Tensor, max_angle: float) -> Tensor:
    """Scale down skew-Hermitian matrices whose largest angle exceeds the cap."""
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
    r"""Rotate square points by a whole generator, in place, and polish: :math:`X\,\phi(K)`.

    Args:
        x: shape ``(..., n, n)``.
        k: skew-Hermitian, shape ``(..., n, n)``; it may be overwritten.
        phi: which map.
        max_angle: largest rotation angle; a larger step is shortened.
    """
    if callable(phi):
        minus_identity, _ = core_minus_identity(k, phi, max_angle=max_angle)
        new = add_product_(x.clone(), x, minus_identity.to(x.dtype))
    elif not may_branch_on(x):
        exact = k.to(DOUBLE.get(k.dtype, k.dtype)) if k.shape[-1] <= _CORE else k
        new = add_product_(x.clone(), x, dense_minus_identity(exact, phi, max_angle).to(x.dtype))
    else:
        k = k if max_angle is None else _shortened(k, max_angle)
        new = rotate_by(x, k, phi=phi)
    # One Newton-Schulz step corrects the point, the map and their product.
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
        minus_identity = _minus_identity(skew(a @ c.mH), phi)
        return x.add_(minus_identity.to(x.dtype) @ x)
    q, r = thin_qr(torch.cat([a, c], dim=-1))
    minus_identity = _minus_identity(skew(r[..., :k] @ r[..., k:].mH), phi)
    narrow = q.to(x.dtype)
    return add_product_(x, (q @ minus_identity.to(q.dtype)).to(x.dtype), rows_times(narrow.mH, x))


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
        ValueError: ``phi`` is invalid.

    Reference:
        Kiani et al., "projUNN" (2022), section 4 and appendix; Wen and Yin
        (2013), lemma 4, for the low-rank Cayley form.
    """
    return retract_low_rank_(x.clone(), a, b, phi=phi)
