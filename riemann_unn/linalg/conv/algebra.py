"""Convolution as a product: the action, product and adjoint of kernels, and their operators."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .spectrum import hat, unhat, with_channels

__all__ = [
    "conv_adjoint",
    "conv_apply",
    "conv_compose",
    "conv_identity",
    "conv_matrix",
    "conv_singular_values",
    "frequencies",
    "sites",
]


def frequencies(x: Tensor, ndim: int) -> Tensor:
    """Transform the last ``ndim`` dimensions and put the frequencies, as one dimension, first."""
    return hat(x, ndim=ndim).flatten(-ndim).movedim(-1, 0)


def sites(spectrum: Tensor, size: tuple[int, ...], *, real: bool) -> Tensor:
    """Undo :func:`frequencies`, on a lattice of this size."""
    half = (*size[:-1], size[-1] // 2 + 1) if real else size
    return unhat(spectrum.movedim(0, -1).unflatten(-1, half), size=size, real=real)


def _check_same_torus(left: Tensor, right: Tensor, ndim: int, *, right_is: str) -> None:
    if left.shape[-ndim:] != right.shape[-ndim:]:
        raise ValueError(
            f"the kernel lives on a torus of size {tuple(left.shape[-ndim:])} and the {right_is} "
            f"on {tuple(right.shape[-ndim:])}; pad the kernel, which is as large as the {right_is}"
        )


def conv_apply(kernel: Tensor, x: Tensor, *, ndim: int | None = None) -> Tensor:
    r"""Return the circular convolution of a signal with a kernel.

    .. math:: (K * x)_o(r) = \sum_i \sum_s K_{oi}(s)\, x_i(r - s)

    with the sites r - s taken modulo the size of the lattice. This is a
    convolution; ``torch.nn.functional.conv2d`` correlates, with r + s.

    Args:
        kernel: shape ``(out, in, *size)``, or ``(*size)`` for one channel.
        x: signals ``(..., in, *size)``, or ``(..., *size)`` for one channel.
        ndim: dimensions of the lattice; by default all but the first two of ``kernel``.

    Returns:
        Signals ``(..., out, *size)``, or ``(..., *size)`` for one channel.

    Raises:
        ValueError: sizes or channels do not fit.
    """
    kernel, ndim, bare = with_channels(kernel, ndim=ndim)
    if kernel.ndim != ndim + 2:
        raise ValueError(f"one kernel (out, in, *size) is needed, got {tuple(kernel.shape)}")
    if x.ndim < ndim + (not bare):
        raise ValueError(f"a signal (..., in, *size) is needed, got {tuple(x.shape)}")
    _check_same_torus(kernel, x, ndim, right_is="signal")
    x = x.unsqueeze(-ndim - 1) if bare else x
    if x.shape[-ndim - 1] != kernel.shape[1]:
        raise ValueError(
            f"the kernel takes {kernel.shape[1]} channels, got a signal {tuple(x.shape)} "
            f"with {x.shape[-ndim - 1]}"
        )
    dtype = torch.promote_types(kernel.dtype, x.dtype)
    signals = x.to(dtype).reshape(-1, *x.shape[-ndim - 1 :])
    product = frequencies(kernel.to(dtype), ndim) @ frequencies(signals, ndim).mT
    y = sites(product.mT, tuple(x.shape[-ndim:]), real=not dtype.is_complex).to(dtype)
    y = y.reshape(*x.shape[: -ndim - 1], kernel.shape[0], *x.shape[-ndim:])
    return y.squeeze(-ndim - 1) if bare else y


def conv_compose(left: Tensor, right: Tensor, *, ndim: int | None = None) -> Tensor:
    r"""Return the kernel that acts as ``right`` and then ``left``, their product.

    .. math:: (L * R)_{oi}(r) = \sum_m \sum_s L_{om}(s)\, R_{mi}(r - s)

    Args:
        left: shape ``(..., out, mid, *size)``, or ``(*size)`` for one channel.
        right: shape ``(..., mid, in, *size)``, or ``(*size)``.
        ndim: dimensions of the lattice; by default all but the first two.

    Returns:
        The kernel ``(..., out, in, *size)``.

    Raises:
        ValueError: sizes or channels do not fit.
    """
    left, ndim, bare = with_channels(left, ndim=ndim)
    right, _, _ = with_channels(right, ndim=ndim)
    _check_same_torus(left, right, ndim, right_is="other kernel")
    if left.shape[-ndim - 1] != right.shape[-ndim - 2]:
        raise ValueError(
            f"kernels {tuple(left.shape)} and {tuple(right.shape)} do not compose: the first "
            f"takes {left.shape[-ndim - 1]} channels, the second gives {right.shape[-ndim - 2]}"
        )
    dtype = torch.promote_types(left.dtype, right.dtype)
    spectrum = frequencies(left.to(dtype), ndim) @ frequencies(right.to(dtype), ndim)
    product = sites(spectrum, tuple(left.shape[-ndim:]), real=not dtype.is_complex).to(dtype)
    return product[0, 0] if bare else product


def conv_adjoint(kernel: Tensor, *, ndim: int | None = None) -> Tensor:
    r"""Return the kernel of the adjoint operator.

    .. math:: (K^H)_{io}(r) = \overline{K_{oi}(-r)}

    Args:
        kernel: shape ``(..., out, in, *size)``, or ``(*size)`` for one channel.
        ndim: dimensions of the lattice; by default all but the first two.

    Returns:
        The kernel ``(..., in, out, *size)``; for a unitary kernel the inverse.

    Raises:
        ValueError: the shape is no kernel's.
    """
    kernel, ndim, bare = with_channels(kernel, ndim=ndim)
    dims = tuple(range(-ndim, 0))
    mirrored = torch.roll(kernel.flip(dims), shifts=(1,) * ndim, dims=dims)
    adjoint = mirrored.transpose(-ndim - 1, -ndim - 2).conj()
    return adjoint[0, 0] if bare else adjoint


def conv_identity(
    out_channels: int,
    in_channels: int,
    size: tuple[int, ...],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return the kernel ``(out, in, *size)`` that copies channel i to channel i, site by site."""
    kernel = torch.zeros(out_channels, in_channels, *size, dtype=dtype, device=device)
    kernel.flatten(2)[..., 0].fill_diagonal_(1)
    return kernel


def conv_matrix(kernel: Tensor, *, ndim: int | None = None) -> Tensor:
    r"""Return the whole operator as a dense block-circulant matrix, for small sizes.

    Args:
        kernel: shape ``(..., out, in, *size)``, or ``(*size)`` for one channel.
        ndim: dimensions of the lattice; by default all but the first two.

    Returns:
        The matrix ``(..., out * N, in * N)`` for N sites, which maps flattened
        signals ``(in, *size)`` to ``(out, *size)``: ``N`` times the memory of the kernel.

    Raises:
        ValueError: the shape is no kernel's.
    """
    kernel, ndim, _ = with_channels(kernel, ndim=ndim)
    size = kernel.shape[-ndim:]
    sites = torch.cartesian_prod(*(torch.arange(n) for n in size)).reshape(-1, ndim)
    shift = (sites[:, None] - sites[None, :]) % torch.tensor(size)
    strides = torch.tensor([math.prod(size[i + 1 :]) for i in range(ndim)])
    index = (shift * strides).sum(-1).to(kernel.device)
    blocks = kernel.flatten(-ndim)[..., index].transpose(-3, -2)
    return blocks.flatten(-4, -3).flatten(-2)


def conv_singular_values(kernel: Tensor, *, ndim: int | None = None) -> Tensor:
    """Return all singular values of the convolution operator, frequency by frequency.

    Args:
        kernel: shape ``(..., out, in, *size)``, or ``(*size)`` for one channel.
        ndim: dimensions of the lattice; by default all but the first two.

    Returns:
        Real, shape ``(..., *size, min(out, in))``, descending in the last
        dimension, at the frequencies in the order of :func:`torch.fft.fftn`.

    Raises:
        ValueError: the shape is no kernel's.

    Reference:
        Sedghi, Gupta and Long, "The singular values of convolutional layers"
        (2019), section 2.
    """
    kernel, ndim, _ = with_channels(kernel, ndim=ndim)
    whole = hat(kernel.to(torch.promote_types(kernel.dtype, torch.complex64)), ndim=ndim)
    values: Tensor = torch.linalg.svdvals(whole.movedim((-ndim - 2, -ndim - 1), (-2, -1)))
    return values
