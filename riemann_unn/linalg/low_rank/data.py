"""Low-rank factors that preserve a layer's outputs on given inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..factor import svd
from .activation_kernel import Activation, as_activation
from .factors import Factors, balanced, check_rank
from .function import minimise

__all__ = ["OutputSpace", "calibrated_factors", "data_error", "output_space", "whitened_factors"]

_RIDGE = 1e-10
_NEGLIGIBLE = 1e-11  # relative to the largest variance


class OutputSpace(NamedTuple):
    """The result of :func:`output_space`.

    Attributes:
        basis: orthonormal directions of the outputs ``(m, min(m, n))``, by falling variance,
            double precision.
        mean: mean input ``(n,)``, or zero.
        directions: the number of directions with variance; fewer than min(m, n) for a degenerate
            covariance.
    """

    basis: Tensor
    mean: Tensor
    directions: int


def output_space(w: Tensor, *, inputs: Tensor, centred: bool) -> OutputSpace:
    """Return the principal directions of ``W x`` over the inputs, computed on the smaller side.

    Directions without variance are ordered by a ridge on the covariance of the inputs, 1e-10 of its
    mean variance.

    Args:
        w: W, shape ``(m, n)``, real.
        inputs: x, shape ``(samples, n)``.
        centred: whether to take variances (for a layer with a bias) or second moments.

    Raises:
        ValueError: the shapes do not fit.
    """
    check_rank(w, 1)
    if inputs.ndim != 2 or inputs.shape[-1] != w.shape[-1] or len(inputs) == 0:
        raise ValueError(f"inputs of shape (samples, {w.shape[-1]}) are needed, {inputs.shape=}")
    wide, x = w.double(), inputs.double()
    mean = x.mean(0) if centred else torch.zeros_like(x[0])
    x = x - mean
    ridge = _RIDGE * float(x.square().mean()) or 1.0
    out = x @ wide.mH
    if w.shape[0] <= w.shape[1]:
        moment = out.mH @ out / len(x) + ridge * (wide @ wide.mH)
        basis = torch.linalg.eigh(moment)[1].flip(-1)
    else:
        seen, axes = torch.linalg.eigh(x.mH @ x / len(x))
        basis = svd(wide @ (axes * (seen.clamp_min(0) + ridge).sqrt()))[0]
    varies = (out @ basis).square().mean(0)
    most = varies.max().clamp_min(torch.finfo(varies.dtype).tiny)
    return OutputSpace(basis, mean, int((varies > _NEGLIGIBLE * most).sum()))


def whitened_factors(
    w: Tensor,
    *,
    rank: int,
    inputs: Tensor,
    bias: Tensor | None = None,
    space: OutputSpace | None = None,
) -> Factors:
    r"""Return the low-rank factors that change a layer's outputs least, before its activation.

    .. math:: \min \sum_j \|W x_j + \beta - A B x_j - \gamma\|^2
        = \min N\,\|(W - AB)\,C^{1/2}\|_F^2

    With a bias C is the covariance of the N inputs and :math:`\gamma = \beta + (W - AB)\mu`,
    without one it is their second moment. The solution is the projection :math:`AB = U U^T W` on
    the leading directions U of the outputs; no matrix larger than the layer or the inputs and
    outputs is formed.

    Args:
        w: W, shape ``(m, n)``, real.
        rank: r, between 1 and min(m, n).
        inputs: x, shape ``(samples, n)``.
        bias: β, shape ``(m,)``; None if the layer has none.
        space: the directions, if known.

    Raises:
        ValueError: a shape or the rank does not fit.

    Reference:
        Reinsel and Velu, "Multivariate reduced-rank regression" (1998), section 2.
    """
    check_rank(w, rank)
    space = space or output_space(w, inputs=inputs, centred=bias is not None)
    wide, left = w.double(), space.basis[:, :rank]
    right = left.mH @ wide
    gamma = bias
    if bias is not None:
        gamma = bias + (wide @ space.mean - left @ (right @ space.mean)).to(bias)
    u, s, vh = balanced(left, right)
    root = s.sqrt()
    return Factors((u * root).to(w), (root[:, None] * vh).to(w), gamma)


def data_error(
    w: Tensor,
    bias: Tensor | None,
    *,
    inputs: Tensor,
    targets: Tensor,
    activation: str | Activation | Callable[[Tensor], Tensor] = "relu",
) -> float:
    r"""Return :math:`\sum_j \|t_j - \varphi(W x_j + \beta)\|^2 / \sum_j \|t_j\|^2`.

    Args:
        w: W, shape ``(m, n)``.
        bias: β, shape ``(m,)``; None is zero.
        inputs: x, shape ``(samples, n)``.
        targets: t, the desired outputs after the activation, shape ``(samples, m)``.
        activation: φ, a name or an elementwise function.
    """
    phi = as_activation(activation)
    size = float(targets.double().square().sum())
    error = (phi(functional.linear(inputs, w, bias)) - targets).double().square().sum()
    return float(error) / size if size > 0 else 0.0


def calibrated_factors(
    start: Factors,
    *,
    inputs: Tensor,
    targets: Tensor,
    activation: str | Activation | Callable[[Tensor], Tensor] = "relu",
    fit_bias: bool = True,
    fold: Callable[[Tensor], Tensor] | None = None,
    iterations: int = 100,
    held_out: tuple[Tensor, Tensor] | None = None,
) -> Factors:
    r"""Return factors refined by L-BFGS to give the targets after the activation.

    .. math:: \min_{A, B, \gamma} \sum_j \|t_j - \varphi(A B x_j + \gamma)\|^2

    Args:
        start: where to begin, such as :func:`whitened_factors`; a bias of None stays None.
        inputs: x, shape ``(samples, n)``.
        targets: t, shape ``(samples, m)``.
        activation: φ, a name or an elementwise function.
        fit_bias: fit γ; otherwise it stays that of ``start``.
        fold: a linear map from the product A B to the weight ``(m, n)``; None is the identity.
        iterations: the most iterations.
        held_out: validation inputs and targets; the refinement ends when their error stops falling.
    """
    phi = as_activation(activation)

    def error(x: list[Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        gamma = x[2] if len(x) > 2 else start.bias
        if fold is None:
            out = functional.linear(inputs @ x[1].mH, x[0], gamma)
        else:
            out = functional.linear(inputs, fold(x[0] @ x[1]), gamma)
        size = targets.square().sum().clamp_min(torch.finfo(targets.dtype).tiny)
        return (phi(out) - targets).square().sum() / size

    free = [start.A, start.B]
    if fit_bias and start.bias is not None:
        free.append(start.bias)
    found = minimise(
        lambda x: error(x, inputs, targets),
        free,
        iterations=iterations,
        criterion=None if held_out is None else lambda x: error(x, *held_out),
    )
    return Factors(found[0], found[1], found[2] if len(found) > 2 else start.bias)
