"""The maps φ from skew-Hermitian to unitary matrices: exponential, Cayley, polar."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .factor import DOUBLE, svd
from .hermitian import hermitian_function
from .solve import times_inverse
from .step.products import CACHED

__all__ = ["cayley", "exp_skew", "polar", "rotate_by", "skew", "unitary_core"]

Scalar = Callable[[Tensor], Tensor]

# Above this 1-norm an eigendecomposition is more accurate than scaling and squaring, or a solve.
_LARGE = 64.0
# From this size on blockwise elimination is faster than a solve, and below this norm as accurate.
_WIDE, _NEAR = 512, 4.0
# A few small matrices are faster by eigendecomposition than by matrix_exp's fixed overhead.
_SMALL, _FEW = 64, 8
# Up to this size double precision costs little; a core of rank k has 2k.
_CORE = 64


def _rotate(k: Tensor, angle: Scalar, slope: Scalar) -> Tensor:
    """Return V diag(exp(-i angle(w))) V^H for the eigenvalues w of the Hermitian i K."""
    u = hermitian_function(
        1j * k,
        lambda w: torch.exp(-1j * angle(w)),
        lambda w: -1j * slope(w) * torch.exp(-1j * angle(w)),
    )
    return u if k.is_complex() else u.real


def _by_eigenvectors(k: Tensor, angle: Scalar, slope: Scalar) -> Tensor:
    """The same for large generators, whose angles have lost digits; unitary to rounding."""
    u = _rotate(k.to(DOUBLE.get(k.dtype, k.dtype)), angle, slope).to(k.dtype)
    # Angles of a conjugate pair that differ by rounding give a real part that is not orthogonal, so
    # the nearest rotation is taken.
    if not k.is_complex():
        return polar(u, det=1)
    u = _newton_schulz(u)
    is_real = (k.detach().imag == 0).all(dim=-1, keepdim=True).all(dim=-2, keepdim=True)
    if not bool(is_real.any()):
        return u
    eye = torch.eye(k.shape[-1], dtype=u.real.dtype, device=u.device)
    return torch.where(is_real, polar(torch.where(is_real, u.real, eye), det=1).to(u.dtype), u)


def skew(z: Tensor) -> Tensor:
    r"""Return the skew-Hermitian part, :math:`\tfrac12 (Z - Z^H)`, of shape ``(..., n, n)``."""
    if z.ndim > 2 or z.numel() <= CACHED:
        return 0.5 * (z - z.mH)
    # A copy of the transpose uses blocks, unlike a sum with a transposed matrix, and is faster.
    return z.mH.clone(memory_format=torch.contiguous_format).sub_(z).mul_(-0.5)


def _norm(k: Tensor) -> float:
    return float(torch.linalg.matrix_norm(k.detach(), ord=1).max())


def _newton_schulz(u: Tensor) -> Tensor:
    """One Newton-Schulz step, which squares the orthogonality error of (..., n, p)."""
    gram = u.mH @ u
    gram.diagonal(dim1=-2, dim2=-1).sub_(1)
    return u - 0.5 * (u @ gram)


def exp_skew(k: Tensor, *, refine: bool = True) -> Tensor:
    r"""Return the unitary exponential of a skew-Hermitian matrix.

    .. math:: U = \exp(K), \qquad K^H = -K

    The result is unitary to rounding however large ``k`` is. A few small
    matrices, and generators with a large norm, go through the
    eigendecomposition of the Hermitian :math:`iK`; others, and those that
    gradients flow through, by :func:`torch.matrix_exp` and one Newton-Schulz step.

    Args:
        k: skew-Hermitian, shape ``(..., n, n)``, real or complex floating point.
        refine: if False the last Newton-Schulz step is left to the caller, and the error may be 64
            times rounding.

    Returns:
        The unitary matrices, shape, dtype and device of ``k``.

    Reference:
        Lezcano-Casado and Martínez-Rubio, "Cheap orthogonal constraints in
        neural networks" (2019), section 4.
    """
    if k.numel() == 0:
        return k.clone()
    few_and_small = k.shape[-1] <= _SMALL and k.shape[:-2].numel() <= _FEW
    if _norm(k) > _LARGE:
        return _by_eigenvectors(k, lambda w: w, torch.ones_like)
    if few_and_small and not k.requires_grad:
        # In double precision, where the eigenvectors are orthonormal enough.
        double = k.to(DOUBLE.get(k.dtype, k.dtype))
        u = _rotate(double, lambda w: w, torch.ones_like)
        # In the precision of the result, a Newton-Schulz step restores the last digits.
        return u.to(k.dtype) if double.dtype != k.dtype else _newton_schulz(u)
    u = torch.linalg.matrix_exp(k)
    return _newton_schulz(u) if refine else u


def cayley(k: Tensor, *, refine: bool = True) -> Tensor:
    r"""Return the Cayley transform of a skew-Hermitian matrix, which is unitary.

    .. math:: U = (I - \tfrac12 K)^{-1} (I + \tfrac12 K), \qquad K^H = -K

    It agrees with :math:`\exp(K)` to second order and never has -1 as an
    eigenvalue.

    Args:
        k: skew-Hermitian, shape ``(..., n, n)``, real or complex floating point.
        refine: if False the last Newton-Schulz step is left to the caller, and the error may be 64
            times rounding.

    Returns:
        The unitary matrices, shape, dtype and device of ``k``.

    Reference:
        Wen and Yin, "A feasible method for optimization with orthogonality
        constraints" (2013), section 2.
    """
    if k.numel() == 0:
        return k.clone()
    if _norm(k) > _LARGE:
        return _by_eigenvectors(
            k, lambda w: 2 * torch.atan(0.5 * w), lambda w: 1 / (1 + 0.25 * w * w)
        )
    eye = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    u = torch.linalg.solve(eye - 0.5 * k, eye + 0.5 * k)
    # The error of the solve grows with its condition number, about |K|/2; this corrects it.
    return _newton_schulz(u) if refine else u


def _polar_svd(x: Tensor, det: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the polar factor U of tall X = U H, and the eigenvalues and vectors of H."""
    u, s, vh = svd(x)
    if det is not None:
        # Flipping the smallest singular direction increases the distance least.
        flip = torch.linalg.det(u @ vh).sign() * det
        u = torch.cat([u[..., :-1], u[..., -1:] * flip[..., None, None]], dim=-1)
        s = torch.cat([s[..., :-1], s[..., -1:] * flip[..., None]], dim=-1)
    return _newton_schulz(u @ vh), s, vh


class _Polar(torch.autograd.Function):
    """The polar factor of tall X = U H, and its derivative.

    With L the solution of L H + H L = M, the adjoint derivative at G is
    U L(Uᴴ G - Gᴴ U) + (I - U Uᴴ) G H⁻¹: it needs no gaps between singular values, unlike the
    derivative of a singular value decomposition.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, det: int | None) -> Tensor:
        factor, s, vh = _polar_svd(x, det)
        ctx.save_for_backward(factor, s, vh)
        return factor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        (u, s, vh), g = ctx.saved_tensors, grads[0]
        inside = u.mH @ g
        adjoint_derivative = vh @ (inside - inside.mH) @ vh.mH
        # The diagonal has imaginary parts only; where s + s' = 0 there is no derivative.
        adjoint_derivative = adjoint_derivative / (s.unsqueeze(-1) + s.unsqueeze(-2))
        grad = u @ (vh.mH @ adjoint_derivative @ vh)
        if u.shape[-2] > u.shape[-1]:
            grad = grad + ((g - u @ inside) @ vh.mH / s.unsqueeze(-2)) @ vh
        return grad, None


def polar(x: Tensor, *, det: int | None = None) -> Tensor:
    r"""Return the unitary polar factor: the nearest matrix with orthonormal columns (or rows).

    .. math:: U = X (X^H X)^{-1/2} = \arg\min_{U^H U = I} \|X - U\|_F

    It is computed from the singular value decomposition, so it exists and is
    orthonormal for a rank-deficient ``x`` too, where the minimiser is not unique.

    Args:
        x: shape ``(..., n, p)``; for ``n < p`` the rows become orthonormal.
        det: ``+1`` or ``-1`` asks for the nearest one with that determinant
            (square real matrices only).

    Returns:
        The polar factor, shape, dtype and device of ``x``; differentiable where
        ``x`` has full rank.

    Raises:
        ValueError: ``det`` is given for matrices that have no real determinant.

    Reference:
        Higham, "Functions of Matrices" (2008), chapter 8.
    """
    if det is not None and (x.shape[-1] != x.shape[-2] or x.is_complex()):
        raise ValueError(f"det={det} needs square real matrices, got {x.shape=}, {x.dtype=}")
    if x.numel() == 0:
        return x.clone()
    if x.dtype in (torch.float16, torch.bfloat16):
        return polar(x.float(), det=det).to(x.dtype)
    tall = x if x.shape[-2] >= x.shape[-1] else x.mH
    if x.requires_grad:
        factor: Tensor = _Polar.apply(tall, det)  # type: ignore[no-untyped-call]
    else:
        factor = _polar_svd(tall, det)[0]
    return factor if tall is x else factor.mH


def _polar_of_step(k: Tensor) -> Tensor:
    """The polar factor of I + K, for K that is not large: (I + K)(I - K²)^(-1/2)."""
    values, v = torch.linalg.eigh(k.mH @ k)
    root = (v * (1 + values.clamp_min(0)).rsqrt().unsqueeze(-2)) @ v.mH
    factor: Tensor = root + k @ root
    return factor


def unitary_core(k: Tensor, *, phi: str, refine: bool = True) -> Tensor:
    r"""Return φ(K), a unitary function of a skew-Hermitian matrix.

    .. math::

        \phi_{\exp}(K) = \exp K, \quad \phi_{\mathrm{Cayley}}(K) = \operatorname{Cayley} K, \quad
        \phi_{\mathrm{polar}}(K) = (I + K)\,(I - K^2)^{-1/2}

    Each is :math:`I + K + O(|K|^2)`, unitary to rounding however large K is.

    Args:
        k: skew-Hermitian, shape ``(..., n, n)``.
        phi: which map.
        refine: see :func:`exp_skew`.

    Returns:
        φ(K), of the shape and dtype of ``k``.

    Raises:
        ValueError: ``phi`` is not one of the three names.
    """
    if phi == "exp":
        return exp_skew(k, refine=refine)
    if phi == "cayley":
        return cayley(k, refine=refine)
    if phi != "polar":
        raise ValueError(f"{phi=} is unknown; choose 'exp', 'cayley' or 'polar'")
    if k.numel() == 0:
        return k.clone()
    if _norm(k) > _LARGE:
        return _by_eigenvectors(k, torch.atan, lambda w: 1 / (1 + w * w))
    u = _polar_of_step(k)
    return _newton_schulz(u) if refine else u


def rotate_by(x: Tensor, k: Tensor, *, phi: str) -> Tensor:
    r"""Return X φ(K), with an error that one Newton-Schulz step corrects.

    .. math:: X\,\phi_{\mathrm{Cayley}}(K) = 2 X (I - \tfrac12 K)^{-1} - X

    is one solve, without the product with φ(K).

    Args:
        x: shape ``(..., n, n)``.
        k: skew-Hermitian, shape ``(..., n, n)``; it may be overwritten.
        phi: ``"exp"``, ``"cayley"`` or ``"polar"``.
    """
    if phi == "cayley" and k.shape[-1] > _CORE:
        # Both norms bound the spectral one; this one takes a tenth of the time.
        size = float(torch.linalg.vector_norm(k))
        if size <= _LARGE or _norm(k) <= _LARGE:
            divisor = k.mul_(-0.5)
            divisor.diagonal(dim1=-2, dim2=-1).add_(1)
            is_near_identity = size <= _NEAR and k.shape[-1] >= _WIDE
            moved: Tensor = (
                times_inverse(x, divisor)
                if is_near_identity
                else torch.linalg.solve(divisor, x, left=False)
            )
            return moved.mul_(2).sub_(x)
    # Small matrices in double precision, which costs little there.
    exact = k.to(DOUBLE.get(k.dtype, k.dtype)) if k.shape[-1] <= _CORE else k
    result: Tensor = x @ unitary_core(exact, phi=phi, refine=False).to(x.dtype)
    return result
