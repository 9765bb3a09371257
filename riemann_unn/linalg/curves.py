"""Curves on manifolds of orthonormal matrices, for searches along a line.

Square X: directions are Ω of the Lie algebra, the same at every point, and the curve is X φ(tΩ).
Tall X: directions are tangent vectors D, and the curve is the polar factor of X + tD. The velocity
of both has a closed form, so the derivative of a loss along them is known exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .maps import polar, skew, unitary_core
from .step.polish import newton_schulz_

__all__ = ["Curve", "closest_to_descent", "projected", "riemannian_gradient"]


def _is_square(x: Tensor) -> bool:
    return x.shape[-2] == x.shape[-1]


def _hermitian(a: Tensor) -> Tensor:
    return 0.5 * (a + a.mH)


def riemannian_gradient(x: Tensor, g: Tensor) -> Tensor:
    r"""Return the gradient along the manifold, in the coordinates of its directions.

    .. math:: \Omega = \tfrac12 (X^H G - G^H X) \;(n = p), \qquad
        G - X \operatorname{herm}(X^H G) \;(n > p)

    Args:
        x: orthonormal columns, shape ``(..., n, p)``, ``p <= n``.
        g: the Euclidean gradient, of the same shape.

    Returns:
        The shape of ``x``. Its real inner product with a direction is the derivative of the loss
        along that direction's curve, at its start.
    """
    return skew(x.mH @ g) if _is_square(x) else projected(x, g)


def projected(x: Tensor, d: Tensor) -> Tensor:
    """Project d on the tangent directions at x; the identity for square matrices.

    Args:
        x: orthonormal columns, shape ``(..., n, p)``.
        d: shape ``(..., n, p)``; more batch dimensions than those of x are directions at each.
    """
    return d if _is_square(x) else d - x @ _hermitian(x.mH @ d)


def closest_to_descent(x: Tensor, g: Tensor, *, keep_det: bool = True) -> Tensor:
    r"""Return the orthonormal matrix that minimises the linear part of a loss.

    .. math:: \arg\min_{Y^H Y = I} \mathrm{Re} \langle G, Y \rangle = -\operatorname{polar}(G)

    Args:
        x: where the gradient was taken, shape ``(..., n, p)``.
        g: the Euclidean gradient, of the same shape.
        keep_det: whether a real square matrix keeps the determinant of ``x``.

    Reference:
        Journée, Nesterov, Richtárik and Sepulchre, "Generalized power method for sparse principal
        component analysis" (2010), section 3: for concave losses it lies below.
    """
    y = polar(-g)
    if not keep_det or not _is_square(x) or x.is_complex() or x.numel() == 0:
        return y
    is_other = (torch.linalg.det(x) * torch.linalg.det(y) < 0)[..., None, None]
    if not bool(is_other.any()):
        return y
    # Flipping the smallest singular direction increases the distance least.
    u, _, vh = torch.linalg.svd(-g)
    mirrored = torch.cat([u[..., :-1], -u[..., -1:]], dim=-1) @ vh
    return torch.where(is_other, newton_schulz_(mirrored), y)


class Curve:
    r"""A curve on the manifold that leaves a point in a direction.

    .. math:: X(t) = X \operatorname{Cayley}(t\,\Omega) \;(n = p), \qquad
        X(t) = (X + tD)\,(I + t^2 D^H D)^{-1/2} \;(n > p)

    with the velocity, in the coordinates of directions at :math:`X(t)`,

    .. math:: (I - \tfrac{t^2}{4} \Omega^2)^{-1}\,\Omega, \qquad
        D R + (X + tD)\,R', \quad R = (I + t^2 D^H D)^{-1/2}

    Args:
        x: orthonormal columns, shape ``(..., n, p)``, ``p <= n``.
        d: a direction at x, of the same shape: skew-Hermitian for square matrices, else tangent.
        phi: the map φ of square matrices, ``"cayley"``, ``"exp"`` or ``"polar"``.

    Reference:
        Wen and Yin, "A feasible method for optimization with orthogonality constraints" (2013),
        for the first; Absil, Mahony and Sepulchre, "Optimization algorithms on matrix manifolds"
        (2008), section 4.1, for the second.
    """

    def __init__(self, x: Tensor, d: Tensor, *, phi: str = "cayley") -> None:
        self._x, self._d, self._phi = x, d, phi
        self._rotation_at: tuple[float, Tensor] | None = None
        if not _is_square(x):
            squares, self._axes = torch.linalg.eigh(d.mH @ d)
            self._squares = squares.clamp_min(0)

    def point(self, t: float) -> Tensor:
        """Return X(t), orthonormal to rounding."""
        if _is_square(self._x):
            return newton_schulz_(self._x @ self._rotation(t))
        scale = (1 + t * t * self._squares).rsqrt()
        return newton_schulz_((self._x + t * self._d) @ self._function(scale))

    def velocity(self, t: float) -> Tensor:
        """Return the derivative of X(t), as a direction there."""
        if _is_square(self._x):
            if self._phi == "exp":
                return self._d
            if self._phi == "polar":
                k = t * self._d
                eye = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
                return skew(torch.linalg.solve(eye - k @ k, self._d))
            # (I - K²)⁻¹ = ¼ (I + U)(I + Uᴴ) for K = tΩ/2 and U its Cayley transform.
            return 0.5 * (self._d + skew(self._rotation(t) @ self._d))
        root = 1 + t * t * self._squares
        inside = self._function(root.rsqrt())
        slope = self._function(-t * self._squares * root.pow(-1.5))
        return self._d @ inside + (self._x + t * self._d) @ slope

    def _rotation(self, t: float) -> Tensor:
        """Return φ(tΩ), which a point and its velocity share."""
        if self._rotation_at is None or self._rotation_at[0] != t:
            self._rotation_at = (t, unitary_core(t * self._d, phi=self._phi, refine=False))
        return self._rotation_at[1]

    def _function(self, values: Tensor) -> Tensor:
        """Return the function of DᴴD that has these values."""
        found: Tensor = (self._axes * values.unsqueeze(-2)) @ self._axes.mH
        return found
