"""The spectrum of a kernel on the torus: one matrix for each frequency, each pair once if real.

A circular convolution is a product at each frequency, so a kernel ``(out, in, *size)`` is a
batch of ``out`` by ``in`` matrices. The matrices of a real kernel at frequencies f and -f are
conjugates; storing one of the two, and a real one where f = -f, makes the symmetry impossible
to lose, whatever is done to the matrices one by one.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["conv_from_spectrum", "conv_spectrum", "with_channels"]

_HALF = (torch.float16, torch.bfloat16)


class _Pairs(NamedTuple):
    """Where the conjugate pairs lie among the frequencies that ``rfftn`` returns, flattened."""

    kept: Tensor  # one frequency of each pair
    place: Tensor  # for every frequency, the position in ``kept`` of it or its mirror image
    mirrored: Tensor  # the frequencies that were not kept
    real: Tensor  # positions in ``kept`` of the frequencies that are their own mirror images


@lru_cache(maxsize=256)
def _pairs(size: tuple[int, ...], device: torch.device) -> _Pairs:
    # Cached tensors must be plain ones, also when the first call is in inference mode.
    with torch.inference_mode(False):
        half = (*size[:-1], size[-1] // 2 + 1)
        grid = torch.cartesian_prod(*(torch.arange(n) for n in half)).reshape(-1, len(size))
        bounds = torch.tensor(size)
        image = (-grid) % bounds
        strides = torch.tensor([math.prod(half[i + 1 :]) for i in range(len(half))])
        own = (grid * strides).sum(-1)
        other = torch.where(image[:, -1] < half[-1], (image * strides).sum(-1), own)
        # Of two mirror images that are both stored, the first is kept.
        keep = own <= other
        position = keep.cumsum(0) - 1
        source = torch.minimum(own, other)
        is_own_image = (grid == image).all(-1)
        return _Pairs(
            own[keep].to(device),
            position[source].to(device),
            own[~keep].to(device),
            position[is_own_image].to(device),
        )


def with_channels(kernel: Tensor, *, ndim: int | None = None) -> tuple[Tensor, int, bool]:
    """Return a kernel with its channels, the dimensions of its lattice, and if it came without.

    A kernel is ``(..., out, in, *size)``. It is ``(*size)``, one channel on its
    own, if ``ndim`` says so or if it has fewer than three dimensions.

    Raises:
        ValueError: the shape is no kernel's.
    """
    bare = kernel.ndim in (1, 2) if ndim is None else kernel.ndim == ndim
    if bare:
        kernel = kernel[None, None]
    count = kernel.ndim - 2 if ndim is None else ndim
    if count < 1 or kernel.ndim < count + 2:
        raise ValueError(
            f"kernel of shape {tuple(kernel.shape)}: (out, in, *size) is needed, or (*size) "
            f"alone for one channel, with {ndim or 'one or more'} dimensions in size"
        )
    if 0 in kernel.shape[-count:]:
        raise ValueError(f"kernel of shape {tuple(kernel.shape)}: its lattice has no sites")
    return kernel, count, bare


def conv_spectrum(kernel: Tensor, *, ndim: int | None = None) -> Tensor:
    r"""Return a kernel's matrices at all frequencies, one of each conjugate pair if real.

    .. math:: \hat K(f) = \sum_x K(x)\, e^{-2\pi i f \cdot x / N}

    Args:
        kernel: shape ``(..., out, in, *size)``, or ``(*size)`` for one channel,
            real or complex.
        ndim: dimensions of the lattice; by default all but the first two.

    Returns:
        Complex matrices, shape ``(..., F, out, in)``: F is the number of lattice
        sites for a complex kernel, and about half of it for a real one. The
        circular convolution is unitary if and only if all of them are.

    Raises:
        ValueError: the shape is no kernel's.
    """
    kernel, ndim, _ = with_channels(kernel, ndim=ndim)
    size = tuple(kernel.shape[-ndim:])
    dims = tuple(range(-ndim, 0))
    if kernel.is_complex():
        whole: Tensor = torch.fft.fftn(kernel, dim=dims).flatten(-ndim).movedim(-1, -3)
        return whole
    kernel = kernel.float() if kernel.dtype in _HALF else kernel
    flat = torch.fft.rfftn(kernel, dim=dims).flatten(-ndim)
    pairs = _pairs(size, kernel.device)
    matrices: Tensor = flat.movedim(-1, -3).index_select(-3, pairs.kept)
    # Zero but for rounding; that it is exactly zero keeps these matrices real from here on.
    imaginary = torch.view_as_real(matrices)[..., 1]
    imaginary.index_fill_(-3, pairs.real, 0.0)
    return matrices


def conv_from_spectrum(matrices: Tensor, *, size: tuple[int, ...], real: bool) -> Tensor:
    """Return the kernel that :func:`conv_spectrum` maps to these matrices.

    Args:
        matrices: shape ``(..., F, out, in)``.
        size: of the lattice.
        real: whether the kernel is real; the imaginary part of the matrices at
            frequencies that are their own mirror images is then dropped.

    Returns:
        The kernel, shape ``(..., out, in, *size)``.
    """
    dims = tuple(range(-len(size), 0))
    if not real:
        kernel: Tensor = torch.fft.ifftn(matrices.movedim(-3, -1).unflatten(-1, size), dim=dims)
        return kernel
    pairs = _pairs(tuple(size), matrices.device)
    if len(pairs.mirrored):
        matrices = matrices.index_select(-3, pairs.place)
        image = matrices.index_select(-3, pairs.mirrored).conj()
        matrices = matrices.index_copy(-3, pairs.mirrored, image)
    half = (*size[:-1], size[-1] // 2 + 1)
    flat = matrices.movedim(-3, -1).contiguous()
    kernel = torch.fft.irfftn(flat.unflatten(-1, half), s=size, dim=dims)
    return kernel
