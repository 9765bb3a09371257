"""Locality: the decay of a kernel from its centre, and the error of truncating it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .algebra import conv_singular_values
from .spectrum import with_channels

__all__ = ["ConvDecay", "ConvTruncation", "conv_decay", "conv_truncate"]


class ConvDecay(NamedTuple):
    """The decay of a kernel from the origin of its lattice, by :func:`conv_decay`.

    Attributes:
        amplitude: root of the sum of squares at each distance, shape ``(R + 1,)``.
        mass_outside: the share of the whole sum of squares that lies farther
            than each distance, shape ``(R + 1,)``, falling to 0.
    """

    amplitude: Tensor
    mass_outside: Tensor

    def radius(self, *, mass: float) -> int:
        """Return the smallest distance that leaves at most this share of the mass outside."""
        return int((self.mass_outside > mass).sum())


class ConvTruncation(NamedTuple):
    """A kernel cut to a window, by :func:`conv_truncate`.

    Attributes:
        kernel: zero outside the window, of the same shape.
        mass_outside: the share of the sum of squares that was cut off.
        unitarity_lost: the largest distance of a singular value of the
            convolution from 1; of the truncated kernel.
    """

    kernel: Tensor
    mass_outside: float
    unitarity_lost: float


def _distances(size: torch.Size, device: torch.device) -> list[Tensor]:
    """Distance on the ring from site 0, for each dimension."""
    rings = (torch.arange(n, device=device) for n in size)
    return [torch.minimum(ring, n - ring) for ring, n in zip(rings, size, strict=True)]


@torch.no_grad()
def conv_decay(kernel: Tensor, *, ndim: int | None = None) -> ConvDecay:
    r"""Report how a kernel decays from the origin of its lattice.

    The exponential of a generator with small support decays faster than
    exponentially away from it, since :math:`A^m` reaches m times as far with
    weight :math:`1/m!`. Distance is the largest of the distances along the
    dimensions, around the torus, so that r stands for a window of 2r + 1 sites.

    Args:
        kernel: shape ``(..., out, in, *size)``, or ``(*size)`` for one channel;
            a batch is summed.
        ndim: dimensions of the lattice; by default all but the first two.

    Returns:
        Amplitude and mass outside, in float64, for the distances 0, 1, ..., R.

    Raises:
        ValueError: the shape is no kernel's.

    Reference:
        Magnasco (2023), on locally supported generators.
    """
    kernel, ndim, _ = with_channels(kernel, ndim=ndim)
    axes = _distances(kernel.shape[-ndim:], kernel.device)
    distance = torch.stack(torch.meshgrid(*axes, indexing="ij")).amax(0)
    exact = kernel.to(torch.complex128 if kernel.is_complex() else torch.float64)
    power = exact.abs().square().flatten(0, -ndim - 1).sum(0)
    mass = power.new_zeros(int(distance.max()) + 1)
    mass.index_add_(0, distance.flatten(), power.flatten())
    # Summed from the far end, since 1 - 1 would lose a tail of 1e-20.
    beyond = mass.flip(0).cumsum(0).flip(0)
    outside = torch.cat([beyond[1:], beyond.new_zeros(1)]) / beyond[0].clamp_min(1e-300)
    return ConvDecay(mass.sqrt(), outside)


@torch.no_grad()
def conv_truncate(
    kernel: Tensor, *, radius: int | tuple[int, ...], ndim: int | None = None
) -> ConvTruncation:
    r"""Cut a kernel to a window around the origin, and report the unitarity lost by it.

    Args:
        kernel: shape ``(..., out, in, *size)``, or ``(*size)`` for one channel.
        radius: the window keeps 2 * radius + 1 sites, in every dimension or one
            number for each.
        ndim: dimensions of the lattice; by default all but the first two.

    Returns:
        The kernel, the share of its mass cut off, and the largest \|σ - 1\|
        over the singular values of the truncated convolution.

    Raises:
        ValueError: the shape is no kernel's, or ``radius`` is negative or of another length.
    """
    full, ndim, bare = with_channels(kernel, ndim=ndim)
    radii = (radius,) * ndim if isinstance(radius, int) else tuple(radius)
    if len(radii) != ndim or min(radii) < 0:
        raise ValueError(f"{radius=} must be one number, or {ndim}, of at least 0")
    axes = _distances(full.shape[-ndim:], full.device)
    inside = torch.ones(full.shape[-ndim:], dtype=torch.bool, device=full.device)
    for axis, (distance, reach) in enumerate(zip(axes, radii, strict=True)):
        shape = [1] * ndim
        shape[axis] = -1
        inside &= (distance <= reach).reshape(shape)
    cut = torch.where(inside, full, torch.zeros_like(full))
    whole = float(full.abs().double().square().sum())
    lost = float((full - cut).abs().double().square().sum()) / max(whole, 1e-300)
    worst = (conv_singular_values(cut, ndim=ndim) - 1).abs()
    off = float(worst.amax()) if worst.numel() else 0.0
    return ConvTruncation(cut[0, 0] if bare else cut, lost, off)
