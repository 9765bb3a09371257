"""Manifolds of convolution kernels: orthogonal and unitary circular convolutions."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ManifoldError
from ..linalg import conv_from_spectrum, conv_spectrum
from ..linalg.conv.blocks import (
    kernel_of_product,
    kernel_of_spectrum,
    spectrum_of_kernel,
    spectrum_shape,
)
from ..scalars import plain_scalars
from .base import MatrixManifold

__all__ = ["OrthogonalConv", "UnitaryConv"]


# Kernels of up to so many entries are transformed as a batch.
_SMALL = 2**17


class _ConvManifold(MatrixManifold):
    """The view of a kernel as the matrices of its spectrum."""

    takes_batches = True
    views_memory = False

    def __init__(self, ndim: int = 2) -> None:
        super().__init__()
        ndim = plain_scalars(ndim)
        if isinstance(ndim, bool) or not isinstance(ndim, int) or ndim < 1:
            raise ManifoldError(f"{ndim=} must be the number of lattice dimensions, 1, 2, 3, ...")
        self.lattice_dims = ndim

    def extra_repr(self) -> str:
        """Return the arguments as they were given."""
        return str(self.lattice_dims)

    def why_not(self, shape: torch.Size, dtype: torch.dtype | None = None) -> str | None:
        """Say why a tensor of this shape and dtype cannot be a point."""
        if len(shape) < self.lattice_dims + 2:
            return (
                f"has shape {tuple(shape)}; a kernel (out, in, *size) with "
                f"{self.lattice_dims} dimensions in size is needed"
            )
        if 0 in shape[-self.lattice_dims :]:
            return f"has shape {tuple(shape)}; its lattice has no sites"
        return self._why_not_dtype(dtype)

    def _why_not_dtype(self, dtype: torch.dtype | None) -> str | None:
        raise NotImplementedError

    def point_dims(self, x: Tensor) -> int:
        """Number of trailing dimensions that one point takes."""
        return self.lattice_dims + 2

    def to_matrices(self, x: Tensor) -> Tensor:
        """Return the spectrum ``(..., F, n, p)``, ``p <= n``: wide matrices by their adjoint."""
        return _tall(conv_spectrum(x, ndim=self.lattice_dims))

    def displacement_matrices(self, u: Tensor) -> Tensor:
        """Return the same by a transform in the precision of ``u``, at half of the cost."""
        return _tall(conv_spectrum(u, ndim=self.lattice_dims, widen=False))

    def from_matrices(self, matrices: Tensor, shape: torch.Size) -> Tensor:
        """Undo :meth:`to_matrices`."""
        size = tuple(shape[-self.lattice_dims :])
        rows, columns = shape[-self.lattice_dims - 2 : -self.lattice_dims]
        matrices = matrices if rows >= columns else matrices.mH
        return conv_from_spectrum(matrices, size=size, real=self._real)

    def matrices_shape(self, shape: torch.Size) -> torch.Size:
        """Return the shape of :meth:`to_matrices` of a kernel of a shape."""
        *batch, rows, columns = spectrum_shape(shape, self.lattice_dims, real=self._real)
        return torch.Size((*batch, max(rows, columns), min(rows, columns)))

    def write_matrices(self, xs: list[Tensor], memory: Tensor, *, exact: bool) -> Tensor:
        """Return the matrices of kernels of one shape, written to memory."""
        shape = spectrum_shape(xs[0].shape, self.lattice_dims, real=self._real)
        memory = memory.view(len(xs), *shape)
        if xs[0].numel() <= _SMALL and len(xs) > 1:
            self._write(torch.stack(xs), memory, exact)
        else:
            for x, part in zip(xs, memory.unbind(0), strict=True):
                self._write(x, part, exact)
        if shape[-2] > shape[-1]:  # so that their adjoints are views
            return memory.conj_physical_().conj()
        return _tall(memory)

    def _write(self, x: Tensor, memory: Tensor, exact: bool) -> None:
        spectrum_of_kernel(x, ndim=self.lattice_dims, widen=exact, out=memory)

    def write_point(self, matrices: Tensor, x: Tensor) -> None:
        """Write the kernel of these matrices to its memory, in their precision."""
        matrices = matrices if self._is_tall(x) else matrices.mH
        kernel_of_spectrum(matrices, real=self._real, ndim=self.lattice_dims, out=x)

    def write_product(self, left: Tensor, right: Tensor, x: Tensor) -> None:
        """Write the kernel whose matrices are products of thin factors, in their precision."""
        if not self._is_tall(x):
            left, right = right.mH, left.mH
        kernel_of_product(left, right, real=self._real, ndim=self.lattice_dims, out=x)

    def _is_tall(self, x: Tensor) -> bool:
        rows, columns = x.shape[-self.lattice_dims - 2 : -self.lattice_dims]
        return rows >= columns

    _real: bool


def _tall(matrices: Tensor) -> Tensor:
    return matrices if matrices.shape[-2] >= matrices.shape[-1] else matrices.mH


class OrthogonalConv(_ConvManifold):
    r"""Real kernels whose circular convolution is orthogonal: unitary at every frequency.

    .. math:: \hat K(f)^H \hat K(f) = I, \qquad
        \hat K(f) = \sum_x K(x)\, e^{-2\pi i f \cdot x / N}

    The kernel is as large as the signal that it acts on. With fewer channels out
    than in it is a co-isometry, :math:`\hat K \hat K^H = I`, with more an isometry.
    This is the operator's own constraint, where ``Stiefel(flatten=True)`` bounds
    a small kernel's matrix.

    The matrix view is the Fourier transform over the lattice, an isometry up to
    the constant :math:`\sqrt N`, which no retraction notices; of each pair of
    conjugate frequencies one is kept, so that kernels stay real.

    Args:
        ndim: dimensions of the lattice.

    Shapes: ``(..., out, in, *size)``, batched, float.

    Raises:
        ManifoldError: ``ndim`` is not a positive integer.

    Reference:
        Kiani et al., "projUNN" (2022), section on convolutional networks;
        Magnasco, "Convolutional unitary or orthogonal recurrent neural networks" (2023).
    """

    name = "OrthogonalConv"
    _real = True

    def _why_not_dtype(self, dtype: torch.dtype | None) -> str | None:
        if dtype is None or dtype.is_floating_point:
            return None
        other = " (UnitaryConv takes complex ones)" if dtype.is_complex else ""
        return f"has dtype {dtype}; a real floating point kernel is needed{other}"


class UnitaryConv(_ConvManifold):
    r"""Complex kernels whose circular convolution is unitary, at every frequency.

    As :class:`OrthogonalConv`, with one independent unitary matrix for each
    lattice site; a kernel on it has no symmetry between frequencies.

    Args:
        ndim: dimensions of the lattice.

    Shapes: ``(..., out, in, *size)``, batched, complex64 or complex128.

    Raises:
        ManifoldError: ``ndim`` is not a positive integer.

    Reference:
        Magnasco (2023); Kiani et al. (2022), section on convolutional networks.
    """

    name = "UnitaryConv"
    _real = False

    def _why_not_dtype(self, dtype: torch.dtype | None) -> str | None:
        if dtype is None or dtype.is_complex:
            return None
        return f"has dtype {dtype}; a complex kernel is needed (OrthogonalConv takes real ones)"

    def _default_dtype(self) -> torch.dtype:
        double = torch.get_default_dtype() == torch.float64
        return torch.complex128 if double else torch.complex64
