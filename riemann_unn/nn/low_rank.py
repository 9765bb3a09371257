"""A linear layer whose weight is a product of two thin matrices, and the base of such layers."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

from ..linalg import balanced, spectral_factors
from ..linalg.precision import in_full_precision
from ..manifolds import Stiefel
from ..scalars import plain_scalars
from ..tagging import remember_tags_, tag_

__all__ = ["LowRankFactors", "LowRankLinear"]

T = TypeVar("T", bound="LowRankFactors")
_HALF = (torch.float16, torch.bfloat16)


class LowRankFactors(nn.Module):
    """The factors: A (m, r), B (r, n), with ``orthonormal`` also s (r,), and the bias."""

    bias: nn.Parameter | None
    s: nn.Parameter | None

    def __init__(
        self,
        m: int,
        n: int,
        rank: int,
        outputs: int,
        bias: bool,
        orthonormal: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        rank = plain_scalars(rank)
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= min(m, n):
            raise ValueError(
                f"{rank=} must be an integer from 1 to {min(m, n)}, the full rank of this layer"
            )
        dtype = torch.get_default_dtype() if dtype is None else dtype
        self.rank = rank
        self.orthonormal = orthonormal
        self.A = nn.Parameter(torch.empty(m, rank, device=device, dtype=dtype))
        self.B = nn.Parameter(torch.empty(rank, n, device=device, dtype=dtype))
        self.register_parameter("s", None)
        self.register_parameter("bias", None)
        if orthonormal:
            self.s = nn.Parameter(torch.empty(rank, device=device, dtype=dtype.to_real()))
        if bias:
            self.bias = nn.Parameter(torch.empty(outputs, device=device, dtype=dtype))
        self._tag()

    def _tag(self) -> None:
        if self.orthonormal:
            tag_(self.A, Stiefel())
            tag_(self.B, Stiefel())
            remember_tags_(self)

    def _reset(self, fan_in: int, outputs: int) -> None:
        """Draw factors whose product has the variance, 1/(3 fan_in), of torch's own layers."""
        if self.A.is_meta:
            return
        m, n = len(self.A), self.B.shape[1]
        with torch.no_grad():
            if self.s is not None:
                # Haar-distributed points on the manifold of each factor.
                for factor in (self.A, self.B):
                    drawn = Stiefel().random(
                        *factor.shape, dtype=factor.dtype, device=factor.device
                    )
                    factor.copy_(drawn)
                self.s.fill_(math.sqrt(m * n / (3 * fan_in * self.rank)))
            else:
                for factor, bound in (
                    (self.B, math.sqrt(3 / n)),
                    (self.A, math.sqrt(n / (fan_in * self.rank))),
                ):
                    real = torch.view_as_real(factor) if factor.is_complex() else factor
                    nn.init.uniform_(real, -bound, bound)
            if self.bias is not None:
                bound = 1 / math.sqrt(fan_in)
                real = torch.view_as_real(self.bias) if self.bias.is_complex() else self.bias
                nn.init.uniform_(real, -bound, bound)

    @torch.no_grad()
    def set_factors_(self, A: Tensor, B: Tensor, bias: Tensor | None = None) -> None:
        """Set the factors, in place; orthonormal layers are set from the SVD of the product.

        Args:
            A: shape ``(m, r)``.
            B: shape ``(r, n)``.
            bias: the new bias, or None to keep it.
        """
        if self.A.shape != A.shape or self.B.shape != B.shape:
            raise ValueError(f"factors of {self.A.shape}, {self.B.shape} are needed, {A.shape=}")
        if self.s is None:
            self.A.copy_(A)
            self.B.copy_(B)
        else:
            wide = A.dtype in (torch.float16, torch.bfloat16, torch.float32)
            double = torch.float64 if wide else A.dtype
            u, s, vh = balanced(A.to(double), B.to(double))
            self.A.copy_(u)
            self.s.copy_(s)
            self.B.copy_(vh)
        if bias is not None and self.bias is not None:
            self.bias.copy_(bias)

    def _matrix(self) -> Tensor:
        """The product, (m, n)."""
        left = self.A if self.s is None else self.A * self.s
        return left @ self.B

    @torch.no_grad()
    def _fill(self, dense: nn.Linear | _ConvNd, weight: Tensor) -> None:
        """Set the weight, bias and state of a dense layer from this one."""
        dense.weight.copy_(weight)
        if dense.bias is not None and self.bias is not None:
            dense.bias.copy_(self.bias)
            dense.bias.requires_grad_(self.bias.requires_grad)
        dense.weight.requires_grad_(self.A.requires_grad)
        dense.train(self.training)

    def weight_parameters(self) -> int:
        """Return the number of parameters of the weight: those of A, B and s."""
        return sum(p.numel() for p in (self.A, self.B, self.s) if p is not None)

    def macs(self) -> int:
        """Return the number of multiplications for one input, or one position of the output."""
        return self.weight_parameters()

    def _materialise(self: T, dense: nn.Linear | _ConvNd) -> T:
        """Move from the meta device to that of a dense layer, and copy all but its weight."""
        layer = self.to_empty(device=dense.weight.device)
        layer._tag()  # the move from the meta device makes new parameters
        if layer.bias is not None and dense.bias is not None:
            with torch.no_grad():
                layer.bias.copy_(dense.bias)
            layer.bias.requires_grad_(dense.bias.requires_grad)
        for p in (layer.A, layer.B, layer.s):
            if p is not None:
                p.requires_grad_(dense.weight.requires_grad)
        return layer.train(dense.training)

    def _split(self, matrix: Tensor) -> None:
        """Set the factors to those of the truncated singular value decomposition."""
        exact = matrix.float() if matrix.dtype in _HALF else matrix
        factors = spectral_factors(exact, rank=self.rank)
        self.set_factors_(factors.A, factors.B)


class LowRankLinear(LowRankFactors):
    r"""A drop-in for ``nn.Linear`` whose weight is a product of two thin matrices.

    .. math:: y = A B x + b, \qquad A: m \times r,\; B: r \times n

    with r (m + n) parameters and multiplications in place of m n. With ``orthonormal`` the weight
    is :math:`A\,\mathrm{diag}(s)\,B` with :math:`A^T A = B B^T = I`: both are tagged
    :class:`~riemann_unn.Stiefel`, so that an optimizer of :mod:`riemann_unn.optim` keeps them
    orthonormal and the rank, and its conditioning, is that of s.

    Shape:
        Input ``(..., in_features)``, output ``(..., out_features)``.

    Args:
        in_features: n.
        out_features: m.
        rank: r, from 1 to min(m, n).
        bias: whether to add b.
        orthonormal: orthonormal factors and s.
        device: where to create the parameters.
        dtype: their type, real or complex.

    Raises:
        ValueError: the rank is out of range.

    Reference:
        Khodak et al., "Initialization and regularization of factorized neural layers" (2021);
        Schotthöfer et al., "Low-rank lottery tickets" (2022), for the orthonormal factors.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        *,
        orthonormal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            out_features, in_features, rank, out_features, bias, orthonormal, device, dtype
        )
        self.in_features = in_features
        self.out_features = out_features
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter again, the product with the variance of ``nn.Linear``'s weight."""
        self._reset(self.in_features, self.out_features)

    @property
    def weight(self) -> Tensor:
        """The product A B, ``(out_features, in_features)``, computed on access."""
        return self._matrix()

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            input: Tensor ``(..., in_features)``.
        """
        inner = functional.linear(input, self.B)
        if self.s is not None:
            inner = inner * self.s
        return functional.linear(inner, self.A, self.bias)

    @classmethod
    def from_dense(
        cls, linear: nn.Linear, rank: int, *, orthonormal: bool = False
    ) -> LowRankLinear:
        """Return the nearest layer of this rank, by the singular value decomposition.

        It has the device, dtype, training mode and ``requires_grad`` of ``linear``. From
        min(m, n) on a rank is the full one, and the layer the same to rounding.

        Args:
            linear: the layer.
            rank: r, at least 1.
            orthonormal: orthonormal factors and s.
        """
        layer = cls.empty_like(linear, min(rank, *linear.weight.shape), orthonormal=orthonormal)
        layer._split(linear.weight.detach())
        return layer

    @classmethod
    def empty_like(
        cls, linear: nn.Linear, rank: int, *, orthonormal: bool = False
    ) -> LowRankLinear:
        """Return a layer with settings and bias of ``linear`` and uninitialised factors."""
        layer = cls(
            linear.in_features,
            linear.out_features,
            rank,
            linear.bias is not None,
            orthonormal=orthonormal,
            device="meta",
            dtype=linear.weight.dtype,
        )
        return layer._materialise(linear)

    @in_full_precision
    def to_dense(self) -> nn.Linear:
        """Return the ``nn.Linear`` with the product as its weight."""
        a = self.A
        dense = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, "meta", a.dtype
        ).to_empty(device=a.device)
        self._fill(dense, self._matrix())
        return dense

    def extra_repr(self) -> str:
        """Show the sizes, and the parameters and multiplications of the weight."""
        dense = self.in_features * self.out_features
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}, orthonormal={self.orthonormal}, "
            f"parameters={self.weight_parameters():,} of {dense:,}, MACs={self.macs():,}"
        )
