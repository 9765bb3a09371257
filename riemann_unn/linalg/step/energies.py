"""Energies: squared norms of a tangent gradient, and of the part that a step leaves out."""

from __future__ import annotations

import torch
from torch import Tensor

from ..factor import DOUBLE
from ..maps import skew
from .products import CACHED
from .tangent import tangent_times

__all__ = ["tangent_energies"]

# Up to this number of entries energies are exact; above, a mean over probes is within a tenth.
_EXACT, _PROBES = CACHED, 64


def tangent_energies(
    x: Tensor, g: Tensor, v: Tensor | None = None, z: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""Return the energy of a tangent gradient, and of what a step along directions leaves out.

    .. math:: \|\Omega\|_F^2, \qquad \|\Omega - \Omega_k\|_F^2, \quad
        \Omega_k = z v^H - v z^H - v\,\operatorname{skew}(v^H z)\,v^H

    exactly for matrices that fit in cache; for larger ones as the mean squared length of products
    with Gaussian probes, without n by n matrices.

    Args:
        x: orthonormal rows, shape ``(..., p, n)``, ``p <= n``.
        g: the Euclidean gradient, of the shape of ``x``.
        v: the directions of the step, shape ``(..., n, k)``; without, all of Ω is taken.
        z: its coordinates on them.

    Returns:
        The two, in float64, shape ``(...)``.
    """
    n, is_small = x.shape[-1], x.shape[-1] ** 2 <= _EXACT
    if is_small:
        wide = DOUBLE.get(x.dtype, x.dtype)
        x, g = x.to(wide), g.to(wide)
        probes = torch.eye(n, dtype=wide, device=x.device)
    else:
        generator = torch.Generator(x.device).manual_seed(n)
        drawn = torch.randn(_PROBES, n, generator=generator, device=x.device)
        probes = (drawn / _PROBES**0.5).to(x.dtype).mT
    probes = probes.expand(*x.shape[:-2], *probes.shape)
    image = tangent_times(x, g, probes)
    total = _energy(image)
    if v is None or z is None:
        return total, torch.zeros_like(total)
    v, z = v.to(image.dtype), z.to(image.dtype)
    w = skew(v.mH @ z)
    followed = (z - v @ w) @ (v.mH @ probes) - v @ (z.mH @ probes)
    missed = _energy(image - followed)
    if is_small:
        return total, missed
    # The step's own part needs no probes: ‖Ω‖² = ‖Ω - Ω_k‖² + 2 ⟨Ω, Ω_k⟩ - ‖Ω_k‖².
    y = tangent_times(x, g, v)
    across = 2 * (y.conj() * z).real.double().sum(dim=(-2, -1))
    across = across - ((v.mH @ y).conj() * w).real.double().sum(dim=(-2, -1))
    return missed + 2 * across - 2 * _energy(z) + _energy(w), missed


def _energy(x: Tensor) -> Tensor:
    return x.abs().double().square().sum(dim=(-2, -1))
