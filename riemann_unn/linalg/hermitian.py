"""Functions of Hermitian matrices, differentiable at repeated eigenvalues."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["hermitian_function"]

Scalar = Callable[[Tensor], Tensor]


def _with_values(v: Tensor, values: Tensor) -> Tensor:
    """Return V diag(values) V^H."""
    product: Tensor = (v * values.unsqueeze(-2)) @ v.mH
    return product


class _HermitianFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, f: Scalar, derivative: Scalar) -> Tensor:
        w, v = torch.linalg.eigh(h)
        ctx.save_for_backward(w, v)
        ctx.f, ctx.derivative = f, derivative
        return _with_values(v, f(w))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        w, v = ctx.saved_tensors
        value = ctx.f(w)
        gap = w.unsqueeze(-1) - w.unsqueeze(-2)
        middle = 0.5 * (w.unsqueeze(-1) + w.unsqueeze(-2))
        scale = w.abs().amax(dim=-1).clamp_min(1)[..., None, None]
        # Below this distance the limit is more accurate than the difference quotient.
        close = gap.abs() <= torch.finfo(w.dtype).eps ** 0.5 * scale
        quotient = (value.unsqueeze(-1) - value.unsqueeze(-2)) / torch.where(close, 1, gap)
        divided = torch.where(close, ctx.derivative(middle), quotient)
        inner = divided.conj() * (v.mH @ grads[0].to(v.dtype) @ v)
        grad = v @ inner @ v.mH
        return 0.5 * (grad + grad.mH), None, None


def hermitian_function(h: Tensor, f: Scalar, derivative: Scalar) -> Tensor:
    r"""Return f of Hermitian matrices, through their eigenvalues.

    .. math:: f(H) = V f(\Lambda) V^H, \qquad
        Df(H)[E] = V \bigl(\Gamma \circ V^H E V\bigr) V^H,\;
        \Gamma_{ij} = \frac{f(\lambda_i) - f(\lambda_j)}{\lambda_i - \lambda_j}

    with the limit :math:`f'` in Γ for eigenvalues that are equal or nearly so,
    where the derivative of an eigendecomposition itself does not exist.

    Args:
        h: Hermitian, shape ``(..., n, n)``.
        f: function of the real eigenvalues, real or complex valued.
        derivative: its derivative.

    Returns:
        f(H), differentiable once.

    Reference:
        Higham, "Functions of Matrices" (2008), theorem 3.11 (Daleckii and Krein).
    """
    if h.requires_grad:
        result: Tensor = _HermitianFunction.apply(h, f, derivative)  # type: ignore[no-untyped-call]
        return result
    w, v = torch.linalg.eigh(h)
    return _with_values(v, f(w))
