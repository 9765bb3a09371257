"""Transforms of kernels without derivatives, in blocks of channels, to given memory.

A kernel of many channels is as large as its signal times all pairs of channels. Copying it to new
memory in another order costs several times the transform; blocks that fit in cache and existing
memory avoid this.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
from torch import Tensor

from .spectrum import _pairs, hat, unhat

__all__ = ["kernel_of_product", "kernel_of_spectrum", "spectrum_of_kernel", "spectrum_shape"]

# Sites of one block: 4 MB in single precision, which allocators reuse.
_BLOCK = 2**20
# Lattices up to this length are transformed back faster by products.
_PRODUCTS = 64
# Up to this many columns the product of thin factors is computed site by site, without reordering.
_THIN = 4


def spectrum_shape(shape: torch.Size, ndim: int, *, real: bool) -> torch.Size:
    """Return the shape ``(..., F, out, in)`` of the spectrum of a kernel of a shape."""
    size = tuple(shape[-ndim:])
    count = len(_pairs(size, torch.device("cpu")).kept) if real else math.prod(size)
    return torch.Size((*shape[: -ndim - 2], count, *shape[-ndim - 2 : -ndim]))


def _blocks(kernel: Tensor, sites: int) -> Iterator[tuple[slice, slice]]:
    """Split a kernel ``(B, out, in, *size)`` along B and out into blocks that fit in cache."""
    count, rows = kernel.shape[:2]
    fit = max(sites // kernel[0, 0].numel(), 1) if kernel.is_cpu else count * rows
    if fit >= rows:
        for start in range(0, count, fit // rows):
            yield slice(start, start + fit // rows), slice(None)
    else:
        for one in range(count):
            for start in range(0, rows, fit):
                yield slice(one, one + 1), slice(start, start + fit)


def spectrum_of_kernel(
    kernel: Tensor, *, ndim: int, widen: bool = False, out: Tensor | None = None
) -> Tensor:
    """Return :func:`.conv_spectrum` of a kernel.

    Args:
        kernel: shape ``(..., out, in, *size)``.
        ndim: dimensions of the lattice.
        widen: whether to transform in double precision.
        out: where to write, shape ``(..., F, out, in)``, contiguous.
    """
    real, device = not kernel.is_complex(), kernel.device
    if out is None:
        dtype = torch.promote_types(kernel.dtype, torch.complex64)
        out = kernel.new_empty(spectrum_shape(kernel.shape, ndim, real=real), dtype=dtype)
    if out.numel() == 0:
        return out
    pairs = _pairs(tuple(kernel.shape[-ndim:]), device) if real else None
    wide = (torch.float64 if real else torch.complex128) if widen else kernel.dtype
    whole = kernel.reshape(-1, *kernel.shape[-ndim - 2 :])
    matrices = out.view(-1, *out.shape[-3:])
    for some, rows in _blocks(whole, _BLOCK // 2 if widen else _BLOCK):
        x = hat(whole[some, rows].to(wide), ndim=ndim).to(out.dtype)
        x = x.flatten(-ndim).movedim(-1, -3)
        place = matrices[some, :, rows]
        if pairs is None:
            place.copy_(x)
        else:
            torch.index_select(x, -3, pairs.kept, out=place)
    if pairs is not None:
        # Zero up to rounding; set to zero, so that these matrices stay real.
        torch.view_as_real(out)[..., 1].index_fill_(-3, pairs.real, 0.0)
    return out


def kernel_of_product(left: Tensor, right: Tensor, *, real: bool, ndim: int, out: Tensor) -> Tensor:
    r"""Write the kernel whose matrices are products of thin ones, :math:`\hat K(f) = L(f)\,R(f)`.

    In the precision of the factors, for small changes of a kernel.

    Args:
        left: L, shape ``(..., F, out, k)``.
        right: R, shape ``(..., F, k, in)``.
        real: whether the kernel is real.
        ndim: dimensions of the lattice.
        out: where to write, shape ``(..., out, in, *size)``, contiguous.
    """
    if out.numel() == 0:
        return out
    size, k = tuple(out.shape[-ndim:]), left.shape[-1]
    left, right = (
        _all_frequencies(x.reshape(-1, *x.shape[-3:]), size, real=real) for x in (left, right)
    )
    if k > _THIN:
        return _write(out, size, real, lambda some, rows: left[some, :, rows] @ right[some])
    # (k, B, out, 1, F) and (k, B, 1, in, F): the products come in the order of the transform.
    columns = left.permute(3, 0, 2, 1).contiguous().unsqueeze(-2)
    lines = right.permute(2, 0, 3, 1).contiguous().unsqueeze(-3)

    def block(some: slice, rows: slice) -> Tensor:
        x = columns[0, some, rows] * lines[0, some]
        for i in range(1, k):
            x.addcmul_(columns[i, some, rows], lines[i, some])
        return x.movedim(-1, -3)

    return _write(out, size, real, block)


def kernel_of_spectrum(matrices: Tensor, *, real: bool, ndim: int, out: Tensor) -> Tensor:
    """Write :func:`.conv_from_spectrum`, by a transform in the precision of the matrices.

    Args:
        matrices: shape ``(..., F, out, in)``.
        real: whether the kernel is real.
        ndim: dimensions of the lattice.
        out: where to write, shape ``(..., out, in, *size)``, contiguous.
    """
    if out.numel() == 0:
        return out
    size = tuple(out.shape[-ndim:])
    matrices = matrices.reshape(-1, *matrices.shape[-3:])

    def block(some: slice, rows: slice) -> Tensor:
        return _all_frequencies(matrices[some, :, rows], size, real=real)

    return _write(out, size, real, block)


def _by_products(size: tuple[int, ...], device: torch.device) -> bool:
    return len(size) == 2 and max(size) <= _PRODUCTS and device.type == "cpu"


@lru_cache(maxsize=256)
def _positions(size: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the index of each frequency of a half spectrum, and which ones are conjugates.

    For products the last dimension of the lattice comes first.
    """
    pairs = _pairs(size, device)
    if not _by_products(size, device):
        return pairs.place, pairs.mirrored
    with torch.inference_mode(False):
        order = torch.arange(len(pairs.place)).view(*size[:-1], -1).mT.flatten()
        return pairs.place[order], torch.isin(order, pairs.mirrored).nonzero()[:, 0]


def _all_frequencies(x: Tensor, size: tuple[int, ...], *, real: bool) -> Tensor:
    """Return the matrices ``(..., F, m, n)`` of a kernel's spectrum at all frequencies."""
    if not real:
        return x
    place, mirrored = _positions(size, x.device)
    x = x.index_select(-3, place)
    return x.index_copy_(-3, mirrored, x.index_select(-3, mirrored).conj())


def _write(
    out: Tensor, size: tuple[int, ...], real: bool, block: Callable[[slice, slice], Tensor]
) -> Tensor:
    """Transform blocks of matrices ``(b, F, out, in)`` at all frequencies back."""
    half = (*size[:-1], size[-1] // 2 + 1) if real else size
    whole = out.view(-1, *out.shape[-len(size) - 2 :])
    for some, rows in _blocks(whole, _BLOCK):
        x = block(some, rows).movedim(-3, -1).contiguous()
        if real and _by_products(size, out.device):
            _unhat_by_products(x, whole[some, rows])
        else:
            whole[some, rows].copy_(unhat(x.unflatten(-1, half), size=size, real=real))
    return out


@lru_cache(maxsize=64)
def _waves(size: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the inverse transform as real matrices, for one dimension of a lattice and the other.

    The first maps alternating real and imaginary parts to separate ones, the second these to real
    sites.
    """
    with torch.inference_mode(False):
        rows, columns = size
        radians = torch.arange(rows, dtype=torch.float64) * (2 * math.pi / rows)
        angle = torch.outer(torch.arange(rows, dtype=torch.float64), radians)
        c, s = angle.cos(), angle.sin()
        first = torch.stack([torch.stack([c, s], 1), torch.stack([-s, c], 1)], 1)
        half = columns // 2 + 1
        radians = torch.arange(columns, dtype=torch.float64) * (2 * math.pi / columns)
        angle = torch.outer(torch.arange(half, dtype=torch.float64), radians)
        weight = torch.full((half, 1), 2.0 / (rows * columns), dtype=torch.float64)
        weight[0] *= 0.5
        if columns % 2 == 0:
            weight[-1] *= 0.5
        second = torch.stack([weight * angle.cos(), -weight * angle.sin()], 1)
        return first.reshape(2 * rows, 2 * rows).to(dtype), second.reshape(-1, columns).to(dtype)


def _unhat_by_products(x: Tensor, out: Tensor) -> None:
    """Write ``irfft2`` of ``(b, out, in, columns * rows)`` by matrix products.

    For small lattices on CPUs they take half of the time of the transform, which copies.
    """
    rows, columns = out.shape[-2:]
    first, second = _waves((rows, columns), out.dtype)
    x = torch.view_as_real(x).view(-1, 2 * rows) @ first
    x = x.view(-1, second.shape[0], rows).mT
    torch.bmm(x, second.expand(len(x), *second.shape), out=out.view(-1, rows, columns))
