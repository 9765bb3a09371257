r"""Kernels without branches on values: for accelerators, captured graphs and compilers.

The host reads nothing here, and the only factorisations are Cholesky's and a solve of small
matrices, in double precision, at a cost of a few times n k² operations a step.

Instead of an orthonormal basis of a step's directions, their Gram matrix is used. With a basis B,
Gram matrix S = Bᴴ B and K = B J Bᴴ for a small J,

.. math:: f(K) = f(0)\,I + B\,J\,g(S J)\,B^H, \qquad g(x) = \frac{f(x) - f(0)}{x}

so that nothing is divided by a number that may be zero, and B may have dependent columns. Diagonal
Padé approximants of the exponential, and the Cayley transform, are unitary for every argument:
rounding and truncation change the angle, not the orthogonality.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..factor import DOUBLE, real_dtype
from .core import Angle, Phi

__all__ = [
    "LARGEST_ANGLE",
    "dense_minus_identity",
    "masked_columns",
    "masked_next",
    "pade_core",
    "rational_core",
    "rotation_by_gram",
    "tiny_of",
]

LARGEST_ANGLE = 32.0
"""Largest rotation angle in radians; larger steps are shortened, since 2π is no rotation."""

# Halvings of the generator, undone by squarings. The angle is then exact to rounding up to 4
# radians, and to 1e-7 at 32, far above any reasonable step.
_HALVINGS = 4
# The share of other directions that is added to make dependent columns independent.
_OTHERS = 1e-5
# Iterations for the square root of matrices with eigenvalues between 1 and 1 + 32².
_ROOT_STEPS = 10


def masked_columns(w: Tensor, otherwise: Tensor | None, *, passes: int = 2) -> Tensor:
    """Return orthonormal columns that span those of ``w``, by passes of Cholesky-QR.

    Args:
        w: shape ``(..., n, k)``.
        otherwise: orthonormal columns to replace dependent ones; with None columns have to be
            independent.
        passes: after two the error is rounding; after one, a millionth for dependent columns.

    Reference:
        Yamamoto, Nakatsukasa, Yanagisawa and Fukaya, "Roundoff error analysis of the CholeskyQR2
        algorithm" (2015).
    """
    q = w.to(DOUBLE.get(w.dtype, w.dtype))
    if otherwise is not None:
        size = torch.linalg.vector_norm(q, dim=(-2, -1), keepdim=True)
        q = torch.add(q / size.clamp_min(tiny_of(size)), otherwise, alpha=_OTHERS)
    for _ in range(passes):
        lower = torch.linalg.cholesky_ex(q.mH @ q)[0]
        q = torch.linalg.solve_triangular(lower, q.mH, upper=False).mH
    return q.to(w.dtype)


def tiny_of(x: Tensor) -> float:
    """Return the smallest divisor for lengths that may be zero."""
    return torch.finfo(x.dtype).tiny


def masked_next(v: Tensor, z: Tensor) -> Tensor:
    """Return an orthonormal basis of z outside orthonormal v, the start of the next sketch."""
    rest = z - v @ (v.mH @ z)
    return masked_columns(rest, v)


def rotation_by_gram(
    v: Tensor, d: Tensor, phi: Phi, max_angle: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return factors of the rotation along directions, :math:`\phi(K) = I + B R`.

    .. math:: K = d v^H - v d^H - v\,\operatorname{skew}(v^H d)\,v^H

    Args:
        v: nearly orthonormal columns, shape ``(..., n, k)``.
        d: K v, of the same shape.
        phi: which map.
        max_angle: largest rotation angle; a larger step is shortened.

    Returns:
        B = [v d/‖d‖] and R, shapes ``(..., n, 2 k)`` and ``(..., 2 k, n)``, in double precision,
        and a small matrix whose eigenvalues are i times the angles, before φ.
    """
    wide, k = DOUBLE.get(v.dtype, v.dtype), v.shape[-1]
    d = d.to(wide)
    size = torch.linalg.vector_norm(d, dim=(-2, -1), keepdim=True)
    basis = torch.cat([v.to(wide), d / size.clamp_min(tiny_of(size))], dim=-1)
    gram = basis.mH @ basis
    inner = gram[..., :k, k:]
    eye = torch.eye(2 * k, dtype=wide, device=v.device)
    j = torch.cat([-eye[k:], eye[:k]]).expand_as(gram).clone()
    j[..., :k, :k] = 0.5 * (inner.mH - inner)
    generator = gram @ j
    size = size * _share(generator, size, max_angle)
    core = rational_core(j * size, generator * size, gram, phi)
    return basis, core @ basis.mH, generator * size


def dense_minus_identity(k: Tensor, phi: Phi, max_angle: float | None) -> Tensor:
    """Return φ(K) - I of skew-Hermitian matrices ``(..., n, n)``."""
    k = k * _share(k, torch.ones_like(k.real[..., :1, :1]), max_angle)
    return rational_core(k, k, None, phi)


def _share(generator: Tensor, size: Tensor, max_angle: float | None) -> Tensor:
    """Return the factor that shortens a step so that no eigenvalue of its generator exceeds a cap.

    The largest is bounded by the norm of a power: within a tenth where users set a cap, more
    loosely where the cap only prevents overflow.
    """
    squarings = 2 if max_angle is None else 4
    norms = []
    for _ in range(squarings):
        generator = generator @ generator
        norm = torch.linalg.vector_norm(generator, dim=(-2, -1), keepdim=True)
        norms.append(norm.clamp_min(tiny_of(norm)))
        generator = generator / norms[-1]
    bound = norms.pop().sqrt()
    while norms:
        bound = (bound * norms.pop()).sqrt()
    cap = LARGEST_ANGLE if max_angle is None else max_angle
    share: Tensor = (cap / (bound * size).clamp_min(cap)).to(real_dtype(generator.dtype))
    return share


def rational_core(j: Tensor, c: Tensor, gram: Tensor | None, phi: Phi | Angle) -> Tensor:
    r"""Return :math:`J\,g(C)`, the core between B and Bᴴ in φ(K) - I, by solves alone.

    Args:
        j: J, skew-Hermitian, shape ``(..., m, m)``.
        c: C = S J.
        gram: S, None for the identity.
        phi: ``"exp"``, ``"cayley"`` or ``"polar"``.
    """
    if phi == "exp":
        core = pade_core(j * 0.5**_HALVINGS, c * 0.5**_HALVINGS)
        for _ in range(_HALVINGS):
            core = _plus_product(core, 2, core, core if gram is None else gram @ core)
        return core
    eye = torch.eye(c.shape[-1], dtype=c.dtype, device=c.device)
    if phi == "cayley":
        return _divided(j, eye - 0.5 * c)
    root = _square_root(eye - c @ c)
    return _divided(2 * j, eye + root - c)


def pade_core(j: Tensor, c: Tensor) -> Tensor:
    r"""Return :math:`J\,g(C)` for the exponential of small angles, by its [5/5] approximant.

    Its error is 1e-16 of the angle at a quarter of a radian.

    Reference:
        Higham, "Functions of Matrices" (2008), section 10.3.
    """
    eye = torch.eye(c.shape[-1], dtype=c.dtype, device=c.device)
    c2 = c @ c
    c4 = c2 @ c2
    odd = torch.add(torch.add(c4, c2, alpha=420.0), eye, alpha=15120.0)
    even = torch.add(torch.add(c2, c4, alpha=1 / 112), eye, alpha=9.0)
    return _divided(j @ odd, _plus_product(even, 1680.0, c, odd, alpha=-0.5))


def _plus_product(
    x: Tensor, beta: float, left: Tensor, right: Tensor, *, alpha: float = 1.0
) -> Tensor:
    """Return a linear combination of a matrix and a product, in one operation."""
    if x.ndim == 2:
        return torch.addmm(x, left, right, beta=beta, alpha=alpha)
    if x.ndim == 3:
        return torch.baddbmm(x, left, right, beta=beta, alpha=alpha)
    return beta * x + alpha * (left @ right)


def _divided(x: Tensor, m: Tensor) -> Tensor:
    """Return X M⁻¹; a singular M, which only NaN causes, raises nothing."""
    quotient: Tensor = torch.linalg.solve_ex(m, x, left=False)[0]
    return quotient


def _square_root(a: Tensor) -> Tensor:
    """Return the square root of A, with eigenvalues of at least 1.

    Reference:
        Higham (2008), equation 6.29, the product form of Denman and Beavers' iteration.
    """
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    m, root = a, a
    for _ in range(_ROOT_STEPS):
        inverse = torch.linalg.inv_ex(m)[0]
        root = 0.5 * (root + root @ inverse)
        m = 0.5 * eye + 0.25 * (m + inverse)
    return root
