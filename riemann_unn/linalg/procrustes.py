"""Procrustes problems: the point of a manifold whose image is nearest to given data."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["inner", "procrustes", "ridge_by_gcv"]

Map = Callable[[Tensor], Tensor]

_POWER_STEPS = 12


def inner(a: Tensor, b: Tensor) -> float:
    """Return the real inner product of two tensors of one shape, summed in double precision."""
    if a.is_complex():
        a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
    return float((a.double() * b.double()).sum())


def _largest_eigenvalue(normal: Map, like: Tensor) -> float:
    """Estimate by power iteration, from below; the caller raises it where it is too low."""
    generator = torch.Generator().manual_seed(like.numel())
    v = torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)
    value = 0.0
    for _ in range(_POWER_STEPS):
        v = v / torch.linalg.vector_norm(v).clamp_min(torch.finfo(v.dtype).tiny)
        w = normal(v)
        value = max(value, inner(v, w))
        v = w
    return 1.1 * value


def procrustes(
    cross: Tensor,
    normal: Map,
    *,
    project: Map,
    starts: Sequence[Tensor] = (),
    gain: float | None = None,
    max_steps: int = 100,
    tolerance: float = 1e-5,
) -> tuple[Tensor, float]:
    r"""Return the point U and the gain g > 0 that bring :math:`g\,A(U)` nearest to data Y.

    .. math:: \min_{U \in M,\; g > 0} \|Y - g\,A(U)\|^2
        = \|Y\|^2 - 2 g \langle U, C\rangle + g^2 \langle U, N U\rangle,
        \qquad C = A^* Y, \quad N = A^* A

    with A linear and M a manifold of orthonormal matrices. Where
    :math:`\langle U, N U\rangle` is the same for every U, as for ``Y = X U^H``
    with a square or tall U, the answer is the closed form of orthogonal
    Procrustes, :math:`U = \operatorname{proj}_M(C)`,
    :math:`g = \langle U, C\rangle / \langle U, N U\rangle`. Elsewhere that is the
    start, and :math:`U \leftarrow \operatorname{proj}_M(C + g\,(\lambda I - N) U)`
    with :math:`\lambda \ge \lambda_{\max}(N)` lowers the objective in every step,
    because it minimises an upper bound that is tight at U.

    Args:
        cross: C, of the shape of U, real or complex.
        normal: the map U -> N U, self-adjoint and positive semidefinite.
        project: the map that takes a tensor to the nearest point of M.
        starts: further points to start from; the best of all is taken.
        gain: the value g is held at; by default it is fitted.
        max_steps: bound on the number of steps.
        tolerance: stop when a step lowers the objective by less than this share of it.

    Returns:
        U and g. The gain is 0 if no point correlates with the data.

    Reference:
        Schönemann, "A generalized solution of the orthogonal Procrustes problem"
        (1966); Kiers and ten Berge, "Minimization of a class of matrix trace
        functions by means of refined majorization" (1992), for the steps.
    """

    def objective(u: Tensor) -> tuple[float, float, Tensor]:
        image = normal(u)
        fit, size = inner(u, cross), inner(u, image)
        g = gain if gain is not None else max(fit, 0.0) / size if size > 0 else 0.0
        return g * g * size - 2 * g * fit, g, image

    u = project(cross)
    value, g, image = objective(u)
    for start in starts:
        other = objective(start)
        if other[0] < value:
            u, (value, g, image) = start, other
    if g == 0:
        return u, 0.0
    bound = _largest_eigenvalue(normal, cross)
    for _ in range(max_steps):
        new = project(cross + g * (bound * u - image))
        new_value, new_g, new_image = objective(new)
        if new_value > value:  # the bound was too low, or rounding dominates
            bound *= 2
            if value + tolerance * abs(value) >= new_value:
                break
            continue
        fell = value - new_value
        u, value, g, image = new, new_value, new_g, new_image
        if fell <= tolerance * abs(value):
            break
    return u, g


def ridge_by_gcv(x: Tensor, y: Tensor) -> Tensor:
    r"""Return the ridge regression of Y on X, its penalty chosen by generalised cross-validation.

    .. math:: B = \arg\min \|Y - X B\|_F^2 + \lambda \|B\|_F^2, \qquad
        \lambda = \arg\min \frac{\|Y - X B_\lambda\|_F^2}{(N - \operatorname{tr} H_\lambda)^2}

    One singular value decomposition of X serves every penalty. With little data B is near zero in
    the directions that it does not determine.

    Args:
        x: regressors, shape ``(N, p)``, centred if there is an intercept elsewhere.
        y: responses, shape ``(N, q)``.

    Returns:
        B, shape ``(p, q)``, in the dtype of ``x``.

    Reference:
        Golub, Heath and Wahba, "Generalized cross-validation as a method for
        choosing a good ridge parameter" (1979).
    """
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    if s.numel() == 0 or float(s[0]) == 0:
        return x.new_zeros(x.shape[1], y.shape[1])
    seen = u.mH @ y
    energy = seen.abs().square().sum(1)
    outside = (y.abs().square().sum() - energy.sum()).clamp_min(0)
    best, chosen = float("inf"), torch.zeros_like(s)
    for exponent in range(-12, 3):
        keep = s.square() / (s.square() + 10.0**exponent * s[0].square())
        # One degree of freedom is used by the mean; with fewer than half of them left the criterion
        # is noise.
        freedom = x.shape[0] - 1 - float(keep.sum())
        if 2 * freedom < x.shape[0]:
            continue
        score = float(outside + ((1 - keep).square() * energy).sum()) / freedom**2
        if score < best:
            best, chosen = score, keep
    scaled = torch.where(s > 0, chosen / s.clamp_min(torch.finfo(s.dtype).tiny), 0.0)
    solution: Tensor = vh.mH @ (scaled.unsqueeze(1) * seen)
    return solution
