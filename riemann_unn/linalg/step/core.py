"""φ on a skew-Hermitian core: one function of the angles of its planes, in double precision.

K = V diag(iθ) Vᴴ becomes V diag(exp(iφ(θ))) Vᴴ. The exponential keeps the angles; the Cayley
transform and the polar factor of I + K reduce them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

from ..factor import DOUBLE
from ..maps import polar
from ..value_branches import may_branch_on

__all__ = [
    "ANGLES",
    "Angle",
    "Phi",
    "angle_map",
    "check_phi",
    "core_minus_identity",
    "has_imaginary_part",
    "leading_directions",
    "leading_of",
    "plane_angle",
    "plane_minus_identity",
    "planes_of",
    "small_core_minus_identity",
    "taylor_minus_identity",
]

Phi = Literal["exp", "cayley", "polar"]
"""Name of a φ: ``"exp"`` (projUNN-T), ``"cayley"`` or ``"polar"`` (projUNN-D)."""

Angle = Callable[[Tensor], Tensor]
"""A φ as what it does to angles: odd, with slope 1 at zero."""

ANGLES: dict[str, Angle] = {
    "exp": lambda theta: theta,
    "cayley": lambda theta: 2 * torch.atan(0.5 * theta),
    "polar": torch.atan,
}

# Squared angles up to this size are accurate enough for the formula in KᵀK.
_SMOOTH = 1.0
# Above this size the angles of a conjugate pair may differ by too much rounding for a real matrix.
_LARGE = 64.0


def angle_map(phi: Phi | Angle) -> Angle:
    r"""Return the function of angles of a φ, given by name or as such a function.

    .. math:: \exp: \theta \mapsto \theta, \quad
        \mathrm{Cayley}: \theta \mapsto 2 \arctan(\theta / 2), \quad
        \mathrm{polar}: \theta \mapsto \arctan \theta
    """
    return phi if callable(phi) else ANGLES[phi]


def plane_angle(theta: float, phi: Phi | Angle, max_angle: float | None) -> float:
    """Return the rotation angle of a plane, capped."""
    theta = theta if max_angle is None else min(theta, max_angle)
    angle = theta
    if phi != "exp":  # exp needs no tensor
        angle = float(angle_map(phi)(torch.tensor(theta, dtype=torch.float64)))
    return angle if max_angle is None else max(min(angle, max_angle), -max_angle)


def check_phi(phi: object) -> None:
    """Refuse an invalid φ.

    Raises:
        ValueError: the name is unknown, or the function is not odd with slope 1 at zero, so that
            it would leave the real matrices or take steps of another length.
    """
    if not callable(phi):
        if phi not in get_args(Phi):
            raise ValueError(
                f"{phi=} is unknown; choose from {get_args(Phi)}, or pass a function of angles"
            )
        return
    probe = torch.tensor([1e-6, 0.3, 2.0, 50.0], dtype=torch.float64)
    found, mirrored = phi(probe), phi(-probe)
    if not (found.shape == probe.shape and bool(((found + mirrored).abs() <= 1e-12).all())):
        raise ValueError(f"{phi=} must be an odd function of angles, elementwise on tensors")
    if not abs(float(found[0] / probe[0]) - 1) < 1e-3:
        raise ValueError(f"{phi=} must have slope 1 at zero, so that lr keeps its meaning")


def _capped(phi: Phi | Angle, theta: Tensor, largest: Tensor, max_angle: float | None) -> Tensor:
    """Return the rotation angles of planes, capped."""
    if max_angle is None:
        return angle_map(phi)(theta)
    theta = theta * (max_angle / largest.clamp_min(max_angle))
    return angle_map(phi)(theta).clamp(-max_angle, max_angle)


def _rotation_minus_one(angle: Tensor) -> Tensor:
    """Return exp(i angle) - 1, to relative accuracy for tiny angles."""
    half: Tensor = torch.sin(0.5 * angle)
    return torch.complex(-2 * half * half, torch.sin(angle))


def has_imaginary_part(k: Tensor) -> bool:
    """Tell whether a core has nonzero imaginary parts: a complex problem may in fact be real.

    Bases such as Adam would scale rounding in the imaginary part to full size.
    """
    return k.is_complex() and bool((k.imag != 0).any())


def planes_of(k: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return angles and vectors, :math:`K = V \operatorname{diag}(i\theta) V^H`, θ ascending.

    Args:
        k: skew-Hermitian, shape ``(..., m, m)``, m small.

    Returns:
        θ in float64, shape ``(..., m)``, and V in complex128.
    """
    theta, v = torch.linalg.eigh(-1j * k.to(DOUBLE.get(k.dtype, k.dtype)))
    return theta, v


def leading_directions(k: Tensor, theta: Tensor, v: Tensor, count: int) -> Tensor:
    r"""Return columns, one in each of the leading planes.

    With such columns v, :math:`K v v^H + v v^H K - v v^H K v v^H` is the best matrix of rank 2
    ``count``: of two angles a > 0 > -b it is :math:`\sqrt{a/(a+b)}\,v_a + \sqrt{b/(a+b)}\,v_b`,
    the other direction of whose plane is neutral; for real K twice the real part of one of them,
    also for those of a complex batch, such as a kernel's matrices at its real frequencies.

    Args:
        k: skew-Hermitian, shape ``(..., m, m)``.
        theta: its angles, from :func:`planes_of`.
        v: its vectors, likewise.
        count: of columns, at most half of m.

    Returns:
        Shape ``(..., m, count)``, orthonormal, but for real K where angles are zero.
    """
    v = _with_phases(v)
    up, down = v[..., v.shape[-1] - count :].flip(-1), v[..., :count]
    real = 2**0.5 * up.real
    if not k.is_complex():
        return real
    a = theta[..., None, v.shape[-1] - count :].flip(-1).clamp_min(0)
    b = (-theta[..., None, :count]).clamp_min(0)
    share = torch.where(a + b == 0, 1.0, a / (a + b))
    is_real = (k.imag == 0).flatten(-2).all(dim=-1)[..., None, None]
    return torch.where(is_real, real, share.sqrt() * up + (1 - share).sqrt() * down)


def _with_phases(v: Tensor) -> Tensor:
    """Normalise the phase of each column, which in an eigendecomposition depends on rounding.

    Other processes, which may round differently, then take the same steps.
    """
    if v.numel() == 0:
        return v
    anchor = v.take_along_dim(v.abs().argmax(dim=-2, keepdim=True), dim=-2)
    normalised: Tensor = v * anchor.sgn().conj()
    return normalised


def leading_of(k: Tensor, count: int) -> Tensor:
    """Return one direction of each of the leading planes, see :func:`leading_directions`.

    For real cores by the symmetric KᵀK, in half of the time; among equal planes it may take two
    directions from one, which is good enough to start a sketch.
    """
    if has_imaginary_part(k):
        return leading_directions(k, *planes_of(k), count)
    real = k.real if k.is_complex() else k
    return _one_of_each_pair(torch.linalg.eigh(real.mT @ real)[1], count).to(k.dtype)


def _one_of_each_pair(v: Tensor, count: int) -> Tensor:
    """Return one vector of each plane from sorted eigenvectors, where a plane's two are neighbours.

    Which two depends on rounding; the projection of the nearest coordinate vector does not.
    """
    if count == 0:
        return v[..., :0]
    pairs = v[..., v.shape[-1] - 2 * count :].unflatten(-1, (count, 2))
    squares = pairs.square().sum(dim=-1, keepdim=True)
    length, nearest = squares.max(dim=-3, keepdim=True)
    chosen = pairs.take_along_dim(nearest, dim=-3) * length.rsqrt()
    found: Tensor = (pairs * chosen).sum(dim=-1)
    return found


def core_minus_identity(
    k: Tensor, phi: Phi | Angle, *, max_angle: float | None = None
) -> tuple[Tensor, Tensor]:
    r"""Return φ(K) - I of a small core, and the largest rotation angle of a plane.

    .. math:: K = V \operatorname{diag}(i\theta) V^H, \qquad
        \phi(K) - I = V \operatorname{diag}(e^{i\phi(\theta)} - 1) V^H

    with φ(K) unitary to rounding in double precision for all angles, and φ(K) - I to relative
    accuracy for tiny ones.

    Args:
        k: skew-Hermitian, shape ``(..., m, m)``, m small.
        phi: which map, see ``angle_map``.
        max_angle: shortens a step whose largest θ exceeds it, all planes alike.

    Returns:
        φ(K) - I in double precision, shape of ``k``, and the angle, shape ``(...)``.
    """
    minus_identity, angle, _ = small_core_minus_identity(k, phi, 0, max_angle=max_angle)
    return minus_identity, angle


def small_core_minus_identity(
    k: Tensor, phi: Phi | Angle, count: int, *, max_angle: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the results of :func:`core_minus_identity` and :func:`leading_of`."""
    wide = k.to(DOUBLE.get(k.dtype, k.dtype))
    is_complex = has_imaginary_part(k)
    if not is_complex:
        real = wide.real if k.is_complex() else wide
        squares, u = torch.linalg.eigh(real.mT @ real if real.ndim > 2 else torch.mm(real.mT, real))
        smooth = _smooth_minus_identity(real, squares, u, phi, max_angle)
        if smooth is not None:
            return smooth[0].to(wide.dtype), smooth[1], _one_of_each_pair(u, count).to(wide.dtype)
    theta, v = planes_of(k)
    largest = theta.abs().amax(dim=-1)
    angles = _capped(phi, theta, largest.unsqueeze(-1), max_angle)
    minus_identity = (v * _rotation_minus_one(angles).unsqueeze(-2)) @ v.mH
    if not is_complex:
        minus_identity = minus_identity.real
        if bool((largest > _LARGE).any()):
            eye = torch.eye(
                minus_identity.shape[-1], dtype=minus_identity.dtype, device=minus_identity.device
            )
            minus_identity = polar(minus_identity + eye, det=1) - eye
    # One Newton-Schulz step in the error U^H U - I, which is formed without U.
    error = minus_identity + minus_identity.mH + minus_identity.mH @ minus_identity
    minus_identity = minus_identity - 0.5 * (error + minus_identity @ error)
    leading = leading_directions(k, theta, v, count) if is_complex else _one_of_each_pair(u, count)
    return minus_identity.to(wide.dtype), angles.abs().amax(dim=-1), leading.to(wide.dtype)


def taylor_minus_identity(k: Tensor) -> Tensor:
    """Return exp(K) - I of one core with angles up to a tenth of a radian, by nine Taylor terms.

    The remainder is 3e-16 of it.
    """
    one, k2 = identity(k.shape[-1], k.dtype), torch.mm(k, k)
    k3 = torch.mm(k, k2)
    last = torch.add(k, k2, alpha=1 / 8).add_(k3, alpha=1 / 72).add_(one, alpha=7.0).mul_(1 / 5040)
    middle = torch.add(k, k2, alpha=1 / 5).add_(one, alpha=4.0).mul_(1 / 24).addmm_(k3, last)
    return torch.add(k, k2, alpha=1 / 2).addmm_(k3, middle)


@lru_cache(maxsize=64)
def identity(m: int, dtype: torch.dtype) -> Tensor:
    """Return a cached identity on the host, not to be written to."""
    with torch.inference_mode(False):
        return torch.eye(m, dtype=dtype)


def _smooth_minus_identity(
    k: Tensor, squares: Tensor, v: Tensor, phi: Phi | Angle, max_angle: float | None
) -> tuple[Tensor, Tensor] | None:
    """φ(K) - I of real cores, (cos φ(θ) - 1) + (sin φ(θ) / θ) K, θ² = KᵀK, if angles are small."""
    if k.ndim == 2 and may_branch_on(k):
        return _smooth_minus_identity_of_one(k, squares.tolist(), v, phi, max_angle)
    if not bool((squares[..., -1] <= _SMOOTH).all()):
        return None
    theta = squares.clamp_min(0).sqrt()
    angle = _capped(phi, theta, theta[..., -1:], max_angle)
    half = torch.sin(0.5 * angle)
    slope = torch.where(theta == 0, 1.0, torch.sin(angle) / theta)
    even, odd = (v * (-2 * half * half).unsqueeze(-2)) @ v.mT, (v * slope.unsqueeze(-2)) @ v.mT
    return even + odd @ k, angle[..., -1]


def _smooth_minus_identity_of_one(
    k: Tensor, squares: list[float], v: Tensor, phi: Phi | Angle, max_angle: float | None
) -> tuple[Tensor, Tensor] | None:
    """The same of one core, with scalars in Python, which is faster than operations of torch."""
    largest = math.sqrt(max(squares[-1], 0.0)) if squares else 0.0
    if not largest * largest <= _SMOOTH:
        return None
    share = 1.0 if max_angle is None or largest <= max_angle else max_angle / largest
    weights: list[tuple[float, float]] = []
    angle = 0.0
    for square in squares:
        theta = math.sqrt(max(square, 0.0))
        angle = plane_angle(theta * share, phi, max_angle)
        half = math.sin(0.5 * angle)
        weights.append((math.sin(angle) / theta if theta else 1.0, -2.0 * half * half))
    odd, even = k.new_tensor(weights).unbind(-1)
    minus_identity = torch.mm(v * even, v.mT).addmm_(torch.mm(v * odd, v.mT), k)
    return minus_identity, k.new_tensor(angle)


def plane_minus_identity(
    corner: Tensor, beside: Tensor, phi: Phi | Angle, *, max_angle: float | None = None
) -> tuple[Tensor, Tensor]:
    r"""Return φ(K) - I for one plane, in closed form, and the largest angle.

    .. math:: K = \begin{pmatrix} i\alpha & -\beta \\ \beta & 0 \end{pmatrix}
        = i\tfrac{\alpha}{2} I + i r N, \quad r = \sqrt{\alpha^2/4 + \beta^2},\; N^2 = I

    so that φ(K) is :math:`\tfrac12(f_+ + f_-) I + \tfrac12 (f_+ - f_-) N` with
    :math:`f_\pm = e^{i\phi(\alpha/2 \pm r)}`.

    Args:
        corner: α, real, shape ``(...)``, float64; zero for real matrices.
        beside: β, not negative, of the same shape and dtype.
        phi: which map, see ``angle_map``.
        max_angle: see :func:`core_minus_identity`.

    Returns:
        complex128, shape ``(..., 2, 2)``, with zero imaginary part where α is zero, and the angle.
    """
    middle = 0.5 * corner
    radius = torch.hypot(middle, beside)
    largest = middle.abs() + radius
    theta = torch.stack([middle + radius, middle - radius])
    angles = _capped(phi, theta, largest, max_angle)
    plus, minus = _rotation_minus_one(angles).unbind(0)
    mean, half = 0.5 * (plus + minus), 0.5 * (plus - minus)
    unit = torch.where(radius == 0, torch.ones_like(radius), radius)
    diagonal, off_diagonal = half * (middle / unit), half * 1j * (beside / unit)
    entries = torch.stack([mean + diagonal, off_diagonal, -off_diagonal, mean - diagonal], dim=-1)
    return entries.unflatten(-1, (2, 2)), angles.abs().amax(dim=0)
