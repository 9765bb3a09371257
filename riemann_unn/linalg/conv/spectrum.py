"""The spectrum of a kernel on the torus: one matrix per frequency, one of each pair if real.

A circular convolution is a product at each frequency, so a kernel ``(out, in, *size)`` is a
batch of ``out`` by ``in`` matrices. The matrices of a real kernel at frequencies f and -f are
conjugates; only one of the two is stored, and a real one where f = -f, so that any operation on
the matrices preserves the symmetry.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["conv_from_spectrum", "conv_spectrum", "hat", "unhat", "with_channels"]

_HALF = (torch.float16, torch.bfloat16)


class _Pairs(NamedTuple):
    """The conjugate pairs among the flattened frequencies of ``rfftn``."""

    kept: Tensor  # one frequency of each pair
    place: Tensor  # for every frequency, the position in ``kept`` of it or its mirror image
    mirrored: Tensor  # the frequencies that were not kept
    real: Tensor  # positions in ``kept`` of the frequencies that are their own mirror images


# A dictionary, since compilers do not use the caches of functions.
_known: dict[tuple[tuple[int, ...], torch.device], _Pairs] = {}


def _pairs(size: tuple[int, ...], device: torch.device) -> _Pairs:
    found = _known.get((size, device))
    if found is None:
        if len(_known) >= 256:
            _known.clear()
        found = _known[size, device] = _new_pairs(size, device)
    return found


def _new_pairs(size: tuple[int, ...], device: torch.device) -> _Pairs:
    # Cached tensors must not be inference tensors, also when first made in inference mode.
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
    """Return a kernel with channel dimensions, its lattice dimensions, and whether it had none.

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


def hat(x: Tensor, *, ndim: int) -> Tensor:
    """Transform the last ``ndim`` dimensions; of a real tensor, to half of the frequencies."""
    x = x.float() if x.dtype in _HALF else x
    size = x.shape[-ndim:]
    if x.numel() == 0:  # which some transforms refuse
        half = size if x.is_complex() else (*size[:-1], size[-1] // 2 + 1)
        dtype = torch.promote_types(x.dtype, torch.complex64)
        return x.new_zeros((*x.shape[:-ndim], *half), dtype=dtype)
    dims = tuple(range(-ndim, 0))
    result: Tensor = torch.fft.fftn(x, dim=dims) if x.is_complex() else torch.fft.rfftn(x, dim=dims)
    return result


def unhat(spectrum: Tensor, *, size: tuple[int, ...], real: bool) -> Tensor:
    """Undo :func:`hat`, on a lattice of this size."""
    dims = tuple(range(-len(size), 0))
    if spectrum.numel() == 0:
        x = spectrum.new_zeros((*spectrum.shape[: -len(size)], *size))
        return x.real if real else x
    if real:
        result: Tensor = torch.fft.irfftn(spectrum, s=size, dim=dims)
    else:
        result = torch.fft.ifftn(spectrum, dim=dims)
    return result


def conv_spectrum(kernel: Tensor, *, ndim: int | None = None, widen: bool = True) -> Tensor:
    r"""Return a kernel's matrices at all frequencies, one of each conjugate pair if real.

    .. math:: \hat K(f) = \sum_x K(x)\, e^{-2\pi i f \cdot x / N}

    Args:
        kernel: shape ``(..., out, in, *size)``, or ``(*size)`` for one channel,
            real or complex.
        ndim: dimensions of the lattice; by default all but the first two.
        widen: transform in double precision, so that no more than a rounding is
            lost; without it in the precision of the kernel, in half the time.

    Returns:
        Complex matrices, shape ``(..., F, out, in)``: F is the number of lattice
        sites for a complex kernel, and about half of it for a real one. The
        circular convolution is unitary if and only if all of them are.

    Raises:
        ValueError: the shape is no kernel's.
    """
    kernel, ndim, _ = with_channels(kernel, ndim=ndim)
    dtype = torch.promote_types(kernel.dtype, torch.complex64)
    if widen:
        # In single precision a transform and its inverse round more than a whole step.
        kernel = kernel.to(torch.complex128 if kernel.is_complex() else torch.float64)
    matrices = hat(kernel, ndim=ndim).flatten(-ndim).to(dtype).movedim(-1, -3)
    if kernel.is_complex():
        return matrices
    pairs = _pairs(tuple(kernel.shape[-ndim:]), kernel.device)
    matrices = matrices.index_select(-3, pairs.kept)
    # Zero up to rounding; set to zero, so that these matrices stay real.
    imaginary = torch.view_as_real(matrices)[..., 1]
    imaginary.index_fill_(-3, pairs.real, 0.0)
    return matrices


def _real_kernel(matrices: Tensor, size: tuple[int, ...]) -> Tensor:
    """Transform the matrices at half of the frequencies back, in double precision.

    It is ``irfftn`` with each pass's dimension last in memory, which saves half of the copies.
    """
    half = (*size[:-1], size[-1] // 2 + 1)
    ndim = len(size)
    # (..., *half, out, in) to (..., out, in, last, *others).
    x = matrices.unflatten(-3, half).movedim((-2, -1), (-ndim - 2, -ndim - 1)).movedim(-1, -ndim)
    # Permuting and widening in one copy is several times slower.
    x = x.contiguous().to(torch.complex128)
    if x.numel() == 0:
        kernel: Tensor = x.new_zeros((*x.shape[:-ndim], *size)).real
        return kernel
    if ndim > 1:
        x = torch.fft.ifftn(x, dim=tuple(range(1 - ndim, 0)))
    kernel = torch.fft.irfft(x.movedim(-ndim, -1), n=size[-1])
    return kernel


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
    single = matrices.dtype == torch.complex64
    if not real:
        wide = matrices.movedim(-3, -1).contiguous().to(torch.complex128)
        return unhat(wide.unflatten(-1, size), size=size, real=False).to(matrices.dtype)
    pairs = _pairs(tuple(size), matrices.device)
    if len(pairs.mirrored):
        matrices = matrices.index_select(-3, pairs.place)
        image = matrices.index_select(-3, pairs.mirrored).conj()
        matrices = matrices.index_copy_(-3, pairs.mirrored, image)
    kernel = _real_kernel(matrices, size)
    return kernel.float() if single else kernel
