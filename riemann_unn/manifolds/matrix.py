"""Manifolds of matrices: orthogonal and unitary groups, and the Stiefel manifold."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import ManifoldError
from .base import MatrixManifold

__all__ = ["Orthogonal", "Stiefel", "Unitary"]


def _adjoint_if_wide(x: Tensor) -> Tensor:
    return x if x.shape[-2] >= x.shape[-1] else x.mH


def _floating(dtype: torch.dtype | None) -> str | None:
    if dtype is None or dtype.is_floating_point or dtype.is_complex:
        return None
    return f"has dtype {dtype}; only floating point and complex tensors can be constrained"


class Stiefel(MatrixManifold):
    r"""Orthonormal columns of tall matrices, orthonormal rows of wide ones.

    .. math:: X^H X = I \;(n \ge p), \qquad X X^H = I \;(n < p)

    Args:
        flatten: view a weight ``(out, in, *kernel)`` as the matrix
            ``(out, in * prod(kernel))``. This bounds the layer's norm but is
            *not* an isometry of the convolution: the same matrix acts on
            overlapping patches.

    Shapes: ``(..., n, p)``, batched, real or complex; with ``flatten`` any
    tensor of two or more dimensions, one matrix.

    Reference:
        Edelman, Arias and Smith, "The geometry of algorithms with orthogonality
        constraints" (1998), section 2.
    """

    name = "Stiefel"

    def __init__(self, *, flatten: bool = False) -> None:
        super().__init__()
        self.flatten = flatten
        self.takes_batches = not flatten

    def extra_repr(self) -> str:
        """Return the arguments as they were given."""
        return "flatten=True" if self.flatten else ""

    def why_not(self, shape: torch.Size, dtype: torch.dtype | None = None) -> str | None:
        """Say why a tensor of this shape and dtype cannot be a point."""
        if len(shape) < 2:
            return f"has shape {tuple(shape)}; a matrix of two or more dimensions is needed"
        return _floating(dtype)

    def point_dims(self, x: Tensor) -> int:
        """Number of trailing dimensions that one point takes."""
        return x.ndim if self.flatten else 2

    def to_matrices(self, x: Tensor) -> Tensor:
        """Return ``(..., n, p)``, ``p <= n``: wide matrices by their adjoint."""
        if self.flatten:
            x = x.reshape(x.shape[0], math.prod(x.shape[1:]))
        return _adjoint_if_wide(x)

    def from_matrices(self, matrices: Tensor, shape: torch.Size) -> Tensor:
        """Undo :meth:`to_matrices`."""
        rows, columns = (shape[0], math.prod(shape[1:])) if self.flatten else (shape[-2], shape[-1])
        return (matrices if rows >= columns else matrices.mH).reshape(shape)


class Orthogonal(MatrixManifold):
    r"""Square real matrices with :math:`X^T X = I`, the orthogonal group O(n).

    Args:
        det: ``+1`` for the rotations SO(n), ``-1`` for the other component;
            ``None`` for both. Steps never change the sign of the determinant
            where one is given.

    Shapes: ``(..., n, n)``, float.

    Raises:
        ManifoldError: ``det`` is not +1, -1 or None.

    Reference:
        Edelman, Arias and Smith (1998), section 2.
    """

    name = "Orthogonal"
    takes_batches = True

    def __init__(self, *, det: int | None = None) -> None:
        super().__init__()
        if det is not None and not (isinstance(det, int) and det in (1, -1)):
            raise ManifoldError(f"{det=} must be +1, -1 or None")
        self.det = det

    def why_not(self, shape: torch.Size, dtype: torch.dtype | None = None) -> str | None:
        """Say why a tensor of this shape and dtype cannot be a point."""
        if len(shape) < 2 or shape[-1] != shape[-2]:
            return f"has shape {tuple(shape)}; square matrices are needed (Stiefel() takes others)"
        if dtype is not None and dtype.is_complex:
            return f"has dtype {dtype}; real matrices are needed (Unitary() takes complex ones)"
        if shape[-1] == 0 and self.det == -1:
            return f"has shape {tuple(shape)}; an empty matrix has determinant +1"
        return _floating(dtype)

    def to_matrices(self, x: Tensor) -> Tensor:
        """Return ``x`` itself."""
        return x

    def from_matrices(self, matrices: Tensor, shape: torch.Size) -> Tensor:
        """Return ``matrices`` itself."""
        return matrices if matrices.shape == shape else matrices.reshape(shape)


class Unitary(MatrixManifold):
    r"""Square complex matrices with :math:`X^H X = I`, the unitary group U(n).

    Shapes: ``(..., n, n)``, complex64 or complex128.

    Reference:
        Edelman, Arias and Smith (1998), section 2, with the adjoint for the transpose.
    """

    name = "Unitary"
    takes_batches = True

    def __init__(self) -> None:
        super().__init__()

    def why_not(self, shape: torch.Size, dtype: torch.dtype | None = None) -> str | None:
        """Say why a tensor of this shape and dtype cannot be a point."""
        if len(shape) < 2 or shape[-1] != shape[-2]:
            return f"has shape {tuple(shape)}; square matrices are needed (Stiefel() takes others)"
        if dtype is not None and not dtype.is_complex:
            return f"has dtype {dtype}; complex matrices are needed (Orthogonal() takes real ones)"
        return None

    def _default_dtype(self) -> torch.dtype:
        double = torch.get_default_dtype() == torch.float64
        return torch.complex128 if double else torch.complex64

    to_matrices = Orthogonal.to_matrices
    from_matrices = Orthogonal.from_matrices
