"""Low-rank factors that preserve a layer's function on Gaussian inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..factor import svd
from .activation_kernel import Activation, as_activation, cosine_kernel, pair_kernel, second_moment
from .factors import SVD, Factors, check_rank, row_scales

__all__ = ["affordable_iterations", "function_factors", "minimise"]

_NODES = 32
_BLOCK = 4
_WORTH = 0.005


def minimise(
    loss: Callable[[list[Tensor]], Tensor],
    start: list[Tensor],
    *,
    iterations: int,
    criterion: Callable[[list[Tensor]], Tensor] | None = None,
) -> list[Tensor]:
    """Return the result of L-BFGS, or the start if that is not lower.

    Args:
        loss: a scalar of the variables, differentiable.
        start: the initial variables, not changed.
        iterations: the most iterations.
        criterion: the quantity to lower, such as the loss on validation data. Evaluated after 4,
            12, 28, ... iterations; they end when it has fallen by less than half a percent.
    """
    x = [t.detach().contiguous().clone().requires_grad_() for t in start]
    eps = torch.finfo(x[0].dtype).eps
    optimizer = torch.optim.LBFGS(
        x,
        max_iter=iterations,
        max_eval=2 * iterations,
        history_size=20,
        tolerance_grad=eps,
        tolerance_change=eps,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        optimizer.zero_grad()
        with torch.enable_grad():
            value = loss(x)
            value.backward()
        return float(value.detach())

    with torch.no_grad():
        measure = criterion or loss
        best, kept = float(measure(x)), start
        block = iterations if criterion is None else _BLOCK
        while iterations > 0:
            block = min(block, iterations)
            optimizer.param_groups[0].update(max_iter=block, max_eval=2 * block)
            optimizer.step(closure)
            value, before = float(measure(x)), best
            if value <= best:
                best, kept = value, [t.detach().clone() for t in x]
            if not value < before * (1 - _WORTH):
                break
            iterations, block = iterations - block, 2 * block
    return kept


def affordable_iterations(m: int, n: int, rank: int) -> int:
    """Return the number of iterations that cost a quarter of the decomposition, at most 12.

    Args:
        m: rows.
        n: columns.
        rank: r.
    """
    most = min(12, int(0.5 * min(m, n) / rank))
    return most if most >= 3 else 0


def function_factors(
    w: Tensor,
    *,
    rank: int,
    activation: str | Activation | Callable[[Tensor], Tensor] = "relu",
    bias: Tensor | None = None,
    fit_bias: bool = False,
    iterations: int | None = None,
    decomposition: SVD | None = None,
) -> Factors:
    r"""Return low-rank factors that keep the neurons of a layer, for Gaussian inputs.

    .. math:: \min \; E_{x \sim N(0, I)} \|\varphi(Wx + \beta) - \varphi(ABx + \gamma)\|^2

    Given the row space of A B, every row of it is a multiple of the projected row of W, for
    the kernel grows with the cosine. The best multiple, for (leaky) ReLU without biases, is
    :math:`|w_i|\,k(c_i)/k(1)` over the length :math:`|w_i| c_i` of the projection, with the
    arc-cosine kernel k and the cosine :math:`c_i` between row and projection;
    :func:`~riemann_unn.linalg.fit_rows` finds it for other activations. The row space starts as
    that of the truncated singular value decomposition and is then refined by L-BFGS, with the
    lengths eliminated (or beside them, where they have no closed form). The result is never
    worse than the truncated decomposition.

    Args:
        w: W, shape ``(m, n)``, real.
        rank: r, between 1 and min(m, n).
        activation: φ, a name or an elementwise function.
        bias: β, shape ``(m,)``; None is zero.
        fit_bias: fit γ; otherwise it is β.
        iterations: the most iterations of the refinement; 0 is the decomposition and the
            lengths alone; None is as many as cost a fraction of the decomposition where lengths
            have a closed form, and 0 elsewhere: there they cost several decompositions, and lower
            the error by less than a percent.
        decomposition: the singular value decomposition of W, if known.

    Raises:
        ValueError: the rank is out of range, the activation unknown, or W no real matrix.

    Reference:
        Vodrahalli et al., "Nonlinear initialization methods for low-rank neural networks" (2022),
        section 3, for the objective.
    """
    check_rank(w, rank)
    phi = as_activation(activation)
    u, s, vh = decomposition or svd(w)
    coordinates = u * s
    scale, gamma = row_scales(coordinates, rank=rank, activation=phi, bias=bias, fit_bias=fit_bias)
    closed = phi.slope is not None and bias is None
    if iterations is None:
        iterations = affordable_iterations(w.shape[0], w.shape[1], rank) if closed else 0
    if iterations == 0 or phi.slope == 1.0 or rank == len(s):
        root = s[:rank].sqrt()
        return Factors(scale[:, None] * u[:, :rank] * root, root[:, None] * vh[:rank], gamma)
    basis = torch.eye(len(s), rank, dtype=w.dtype, device=w.device)
    if closed:
        basis = _refine_space(coordinates, basis, phi, iterations)
    else:
        basis = _refine_all(coordinates, basis, scale, bias, gamma, phi, fit_bias, iterations)
    basis = torch.linalg.qr(basis)[0]
    inside = coordinates @ basis
    rotated = torch.cat([inside, _outside(coordinates, inside)], dim=-1)
    scale, gamma = row_scales(rotated, rank=rank, activation=phi, bias=bias, fit_bias=fit_bias)
    # Split evenly, so that B B^T and A^T A have the same eigenvalues.
    left, root, right = svd(inside)
    root = root.sqrt()
    return Factors(scale[:, None] * left * root, root[:, None] * (right @ (basis.mH @ vh)), gamma)


def _outside(coordinates: Tensor, inside: Tensor) -> Tensor:
    """Return, as a column, the length of the part of each row outside its projection."""
    square = (coordinates * coordinates).sum(-1) - (inside * inside).sum(-1)
    return square.clamp_min(0).sqrt()[:, None]


def _lengths(coordinates: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the norms of the rows and their cosines with the space that ``x`` spans."""
    p = torch.linalg.vector_norm(coordinates, dim=-1)
    kept = torch.linalg.vector_norm(coordinates @ torch.linalg.qr(x)[0], dim=-1)
    return p, (kept / torch.where(p > 0, p, 1)).clamp(max=1)


def _refine_space(coordinates: Tensor, basis: Tensor, phi: Activation, iterations: int) -> Tensor:
    assert phi.slope is not None
    slope, one = phi.slope, cosine_kernel(basis.new_ones(()), slope=phi.slope)
    size = (coordinates * coordinates).sum().clamp_min(torch.finfo(basis.dtype).tiny)

    def loss(x: list[Tensor]) -> Tensor:
        p, c = _lengths(coordinates, x[0])
        h = cosine_kernel(c, slope=slope) / one
        return (p * p * (1 - h * h)).sum() / size

    return minimise(loss, [basis], iterations=iterations)[0]


def _refine_all(
    coordinates: Tensor,
    basis: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    phi: Activation,
    fit_bias: bool,
    iterations: int,
) -> Tensor:
    p, c = _lengths(coordinates, basis)
    size = second_moment(p, phi, bias=bias).sum().clamp_min(torch.finfo(p.dtype).tiny)
    start = [basis, scale * p * c] + ([gamma] if fit_bias and gamma is not None else [])

    def loss(x: list[Tensor]) -> Tensor:
        p, c = _lengths(coordinates, x[0])
        other = x[2] if len(x) > 2 else bias
        own = second_moment(x[1], phi, bias=other)
        cross = pair_kernel(p, x[1], c, phi, p_bias=bias, q_bias=other, nodes=_NODES)
        return (own - 2 * cross).sum() / size

    return minimise(loss, start, iterations=iterations)[0]
