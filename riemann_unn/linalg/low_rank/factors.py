"""Low-rank factors of a weight matrix: nearest as a matrix, or nearest as a layer of neurons."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..factor import svd
from .activation_kernel import (
    Activation,
    as_activation,
    cosine_kernel,
    gauss_hermite,
    pair_kernel,
    second_moment,
    smoothed,
)

__all__ = [
    "SVD",
    "Factors",
    "angles",
    "balanced",
    "check_rank",
    "fit_rows",
    "fold_kernel",
    "function_error",
    "row_errors",
    "row_scales",
    "spectral_factors",
    "unfold_kernel",
]

_NODES = 128  # where φ has a kink
_SMOOTH_NODES = 48
_STEPS = 30
_LEAST_DECREASE = 1e-6  # relative decrease of the loss below which the next step is the last


SVD = tuple[Tensor, Tensor, Tensor]


class Factors(NamedTuple):
    r"""A low-rank layer :math:`x \mapsto A B x + b`.

    Attributes:
        A: left factor ``(m, r)``.
        B: right factor ``(r, n)``.
        bias: ``(m,)``, or None.
    """

    A: Tensor
    B: Tensor
    bias: Tensor | None


def check_rank(w: Tensor, rank: int, *, real: bool = True) -> None:
    """Raise a ValueError unless ``w`` is a matrix that has factors of this rank."""
    if w.ndim != 2 or not (w.is_floating_point() or (w.is_complex() and not real)):
        raise ValueError(f"a {'real ' * real}matrix is needed, got {w.shape=}, {w.dtype=}")
    if not 1 <= rank <= min(w.shape):
        raise ValueError(f"{rank=} must be between 1 and {min(w.shape)} for {w.shape=}")


def spectral_factors(
    w: Tensor, *, rank: int, bias: Tensor | None = None, decomposition: SVD | None = None
) -> Factors:
    r"""Return the truncated singular value decomposition, split evenly.

    .. math:: A = U_r S_r^{1/2}, \qquad B = S_r^{1/2} V_r^T

    the nearest matrix of rank r to W (Eckart and Young), and the baseline for the others.

    Args:
        w: W, shape ``(m, n)``, real or complex.
        rank: r, between 1 and min(m, n).
        bias: passed on as it is.
        decomposition: the singular value decomposition of W, if known.

    Raises:
        ValueError: the rank is out of range, or W is no matrix.

    Reference:
        Khodak et al., "Initialization and regularization of factorized neural layers" (2021),
        section 3.
    """
    check_rank(w, rank, real=False)
    u, s, vh = decomposition or svd(w)
    root = s[:rank].sqrt()
    return Factors(u[:, :rank] * root, root[:, None] * vh[:rank], bias)


def balanced(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (U, s, Vh) of the product ``a @ b`` without forming it.

    Args:
        a: shape ``(m, r)``.
        b: shape ``(r, n)``.

    Returns:
        ``U`` with orthonormal columns ``(m, r)``, ``s`` of shape ``(r,)``, descending, and ``Vh``
        with orthonormal rows ``(r, n)``.
    """
    left, upper = torch.linalg.qr(a)
    right, lower = torch.linalg.qr(b.mH)
    u, s, vh = svd(upper @ lower.mH)
    return left @ u, s, vh @ right.mH


def row_errors(
    p: Tensor,
    q: Tensor,
    c: Tensor,
    activation: Activation,
    *,
    p_bias: Tensor | None = None,
    q_bias: Tensor | None = None,
) -> Tensor:
    r"""Return :math:`E(\varphi(p\,a + \beta) - \varphi(q\,b + \gamma))^2` for each row.

    Args:
        p: norms of the rows w, shape ``(...)``.
        q: norms of the rows v, shape ``(...)``.
        c: cosines between them, shape ``(...)``.
        activation: φ.
        p_bias: β, or None for zero.
        q_bias: γ, or None for zero.
    """
    square = second_moment(p, activation, bias=p_bias)
    cross = pair_kernel(p, q, c, activation, p_bias=p_bias, q_bias=q_bias)
    other = second_moment(q, activation, bias=q_bias)
    return (square - 2 * cross + other).clamp_min(0)


def angles(w: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Norms of the rows and the cosines between them, in double precision."""
    p = torch.linalg.vector_norm(w, dim=-1).double()
    q = torch.linalg.vector_norm(v, dim=-1).double()
    dot = torch.einsum("ij,ij->i", w, v).double()
    scale = torch.where(p > 0, p, 1) * torch.where(q > 0, q, 1)
    return p, q, (dot / scale).clamp(-1, 1)


def function_error(
    w: Tensor,
    v: Tensor,
    *,
    activation: str | Activation | Callable[[Tensor], Tensor] = "relu",
    w_bias: Tensor | None = None,
    v_bias: Tensor | None = None,
) -> float:
    r"""Return the relative error of one layer as a function of Gaussian inputs.

    .. math:: \frac{E\,\|\varphi(Wx + \beta) - \varphi(Vx + \gamma)\|^2}
              {E\,\|\varphi(Wx + \beta)\|^2}, \qquad x \sim N(0, I)

    Args:
        w: W, shape ``(m, n)``, real.
        v: V, shape ``(m, n)``.
        activation: φ, a name or an elementwise function.
        w_bias: β, shape ``(m,)``; None is zero.
        v_bias: γ, shape ``(m,)``; None is zero.
    """
    phi = as_activation(activation)
    p, q, c = angles(w, v)
    beta = None if w_bias is None else w_bias.double()
    gamma = None if v_bias is None else v_bias.double()
    error = row_errors(p, q, c, phi, p_bias=beta, q_bias=gamma).sum()
    size = second_moment(p, phi, bias=beta).sum()
    return float(error / size) if float(size) > 0 else 0.0


def unfold_kernel(weight: Tensor, *, split: str) -> Tensor:
    r"""Return a convolution kernel as the matrix whose low rank splits the convolution in two.

    Args:
        weight: shape ``(out, in, h, w)``.
        split: ``"channel"`` gives ``(out, in*h*w)``, an h × w convolution and then a 1 × 1 one;
            ``"spatial"`` gives ``(out*w, in*h)``, an h × 1 convolution and then a 1 × w one.

    Reference:
        Jaderberg, Vedaldi and Zisserman, "Speeding up convolutional neural networks with low
        rank expansions" (2014), scheme 2, for the spatial split.
    """
    out, into, h, w = weight.shape
    if split == "channel":
        return weight.reshape(out, into * h * w)
    return weight.permute(0, 3, 1, 2).reshape(out * w, into * h)


def fold_kernel(matrix: Tensor, *, shape: torch.Size, split: str) -> Tensor:
    """Undo :func:`unfold_kernel`.

    Args:
        matrix: its result.
        shape: shape of the kernel, ``(out, in, h, w)``.
        split: as there.
    """
    out, into, h, w = shape
    if split == "channel":
        return matrix.reshape(shape)
    return matrix.reshape(out, w, into, h).permute(0, 2, 3, 1)


def fit_rows(
    p: Tensor,
    c: Tensor,
    activation: Activation,
    *,
    bias: Tensor | None = None,
    fit_bias: bool = False,
) -> tuple[Tensor, Tensor | None]:
    r"""Return the best length, and bias, of each row of V with a given direction.

    .. math:: (q, \gamma) = \arg\min E(\varphi(w \cdot x + \beta) - \varphi(v \cdot x + \gamma))^2,
              \qquad |v| = q

    For piecewise linear φ without biases :math:`q = |w|\,k(c)/k(1)` with the arc-cosine kernel k.
    In general the two values fit φ to the smoothed neuron
    :math:`m(z) = E[\varphi(w \cdot x + \beta) \mid v \cdot x = |v| z]`, a problem in one variable
    that Levenberg and Marquardt's method solves for all rows at once.

    Args:
        p: norms :math:`|w|`, shape ``(m,)``.
        c: cosines between w and v, in [0, 1], shape ``(m,)``.
        activation: φ.
        bias: β, shape ``(m,)``; None is zero.
        fit_bias: whether γ is fitted; otherwise, or without β, it is β.

    Returns:
        q, shape ``(m,)``, and γ, or None where there is no bias. No row is worse than with the
        projected row, :math:`q = |w| c`, and the bias kept.
    """
    if activation.slope == 1.0:
        return p * c, bias
    if activation.slope is not None and bias is None:
        one = cosine_kernel(torch.ones_like(c), slope=activation.slope)
        return p * cosine_kernel(c, slope=activation.slope) / one, None
    fit_bias = fit_bias and bias is not None
    beta = torch.zeros_like(p) if bias is None else bias
    nodes = _SMOOTH_NODES if activation.slope is None else _NODES
    z, weight = gauss_hermite(nodes, p)
    sine = (1 - c * c).clamp_min(0).sqrt()
    mean = beta[:, None] + (p * c)[:, None] * z
    target = smoothed(mean, (p * sine)[:, None], activation)

    def loss(q: Tensor, gamma: Tensor) -> Tensor:
        residual = activation(q[:, None] * z + gamma[:, None]) - target
        return (residual * residual) @ weight

    start = torch.stack([p * c * t for t in (1.0, 0.25, 0.5, 0.75)] + [p * t for t in (0.5, 1.0)])
    first = torch.stack([loss(q, beta) for q in start])
    q = start.gather(0, first.argmin(0, keepdim=True))[0]
    gamma = beta.clone()
    q, gamma = _levenberg(activation, q, gamma, z, weight, target, fit_bias)
    kept = row_errors(p, p * c, c, activation, p_bias=bias, q_bias=bias)
    found = row_errors(p, q, c, activation, p_bias=beta, q_bias=gamma)
    better = found <= kept
    q, gamma = torch.where(better, q, p * c), torch.where(better, gamma, beta)
    return q, None if bias is None else gamma


def _levenberg(
    activation: Activation,
    q: Tensor,
    gamma: Tensor,
    z: Tensor,
    weight: Tensor,
    target: Tensor,
    fit_bias: bool,
) -> tuple[Tensor, Tensor]:
    """Fit φ(q z + γ) to the targets (m, nodes), every row with its own damping."""

    def normal(q: Tensor, gamma: Tensor) -> Tensor:
        """Loss, both gradients and the three entries of JᵀJ, stacked."""
        u = (q[:, None] * z + gamma[:, None]).detach().requires_grad_()
        with torch.enable_grad():
            value = activation(u)
            (slope,) = torch.autograd.grad(value.sum(), u)
        residual = value.detach() - target
        step = residual * slope
        square = slope * slope
        terms = (residual * residual, step * z, step, square * z * z, square * z, square)
        return torch.stack([term @ weight for term in terms])

    state, damping = normal(q, gamma), torch.full_like(q, 1e-3)
    stuck = 0
    for _ in range(_STEPS):
        if stuck == 2:
            break
        _, g, h, gg, gh, hh = state
        if not fit_bias:
            h, gh, hh = torch.zeros_like(h), torch.zeros_like(h), torch.ones_like(h)
        gg, hh = gg * (1 + damping) + 1e-30, hh * (1 + damping) + 1e-30
        determinant = gg * hh - gh * gh
        new_q = (q - (hh * g - gh * h) / determinant).clamp_min(0)
        new_gamma = gamma - (gg * h - gh * g) / determinant
        trial = normal(new_q, new_gamma)
        better = trial[0] < state[0]
        if not bool((trial[0] < state[0] * (1 - _LEAST_DECREASE)).any()):
            stuck += 1
        q, gamma = torch.where(better, new_q, q), torch.where(better, new_gamma, gamma)
        state = torch.where(better, trial, state)
        damping = torch.where(better, damping * 0.3, damping * 8).clamp(1e-9, 1e9)
    return q, gamma


def row_scales(
    coordinates: Tensor,
    *,
    rank: int,
    activation: Activation,
    bias: Tensor | None = None,
    fit_bias: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return the factor on each projected row, and the biases, by :func:`fit_rows`.

    Args:
        coordinates: rows of W in an orthonormal basis whose first ``rank`` directions are kept,
            shape ``(m, k)``.
        rank: r.
        activation: φ.
        bias: β, shape ``(m,)``, or None.
        fit_bias: fit γ.
    """
    p = torch.linalg.vector_norm(coordinates, dim=-1).double()
    kept = torch.linalg.vector_norm(coordinates[:, :rank], dim=-1).double()
    c = (kept / torch.where(p > 0, p, 1)).clamp(0, 1)
    beta = None if bias is None else bias.double()
    q, gamma = fit_rows(p, c, activation, bias=beta, fit_bias=fit_bias)
    # A row orthogonal to the kept space has a zero projection.
    scale = torch.where(kept > 0, q / torch.where(kept > 0, kept, 1), 1)
    return scale.to(coordinates), None if gamma is None else gamma.to(coordinates)
