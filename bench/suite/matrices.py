"""The matrices of the benchmarks, and their orthogonality errors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["distance", "gradient", "orthonormal", "weight_of"]

_EXACT_UP_TO = 1024
_PROBES = 16
_ROWS = 512


def weight_of(module: nn.Module, name: str = "weight") -> Tensor:
    """Return the constrained weight, outside of any graph."""
    with torch.no_grad():
        weight: Any = getattr(module, name)
        found: Tensor = weight.detach()
    return found


def orthonormal(
    n: int, p: int | None = None, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Tensor:
    r"""Return a dense ``(n, p)`` matrix with orthonormal columns to rounding, at O(n p) cost.

    Columns of the Hartley matrix :math:`\cos\theta_{ij} + \sin\theta_{ij}`, or of the Fourier
    matrix if complex, :math:`\theta_{ij} = 2 \pi i j / n`, with random signs, in random order; a QR
    factorisation of a Gaussian matrix would take most of the run at n = 8192.
    """
    source = torch.Generator().manual_seed(seed + n)
    p = n if p is None else p
    columns = torch.randperm(n, generator=source)[:p]
    left, right = (torch.randint(2, (k,), generator=source) * 2.0 - 1 for k in (n, p))
    x = torch.empty(n, p, dtype=dtype)
    for rows in torch.arange(n).split(_ROWS):
        angle = (rows[:, None] * columns % n).double() * (2 * math.pi / n)
        if dtype.is_complex:
            block = torch.complex(angle.cos(), angle.sin())
        else:
            block = angle.cos() + angle.sin()
        x[rows] = (block * (left[rows, None] * right) / n**0.5).to(dtype)
    return x


def gradient(x: Tensor, *, seed: int = 1) -> Tensor:
    """Return a Gaussian gradient of expected length 1 for the matrices ``x``."""
    source = torch.Generator().manual_seed(seed)
    size = x.shape[-1] * x.shape[-2]
    g: Tensor = torch.randn(x.shape, dtype=x.dtype, generator=source) / size**0.5
    return g


@torch.no_grad()
def distance(x: Tensor) -> float:
    r"""Return :math:`\|X^H X - I\|_F / \sqrt p` in double precision, the worst of a batch.

    Above p = 1024 it is estimated, without bias in its square, from 16 random vectors:
    exact products would take longer than the steps that are timed.
    """
    x = x.mT if x.shape[-2] < x.shape[-1] else x
    p = x.shape[-1]
    wide = torch.complex128 if x.is_complex() else torch.float64
    if p <= _EXACT_UP_TO:
        y = x.to(wide)
        gap = y.mH @ y - torch.eye(p, dtype=wide)
        worst: float = torch.linalg.matrix_norm(gap).max().item() / p**0.5
        return worst
    source = torch.Generator().manual_seed(0)
    z = torch.randn(p, _PROBES, dtype=wide, generator=source)
    image = torch.zeros_like(z)
    for rows in x.split(_ROWS, dim=-2):
        block = rows.to(wide)
        image += block.mH @ (block @ z)
    estimate: float = torch.linalg.vector_norm(image - z).item() / (_PROBES * p) ** 0.5
    return estimate
