"""Manifolds of matrices: orthogonal and unitary groups, and the Stiefel manifold."""

from __future__ import annotations

import math
from operator import index
from typing import Any

import torch
from torch import Tensor

from ..errors import ManifoldError
from ..scalars import plain_scalars
from .base import MatrixManifold

__all__ = ["Orthogonal", "Stiefel", "Unitary"]


def _floating(dtype: torch.dtype | None) -> str | None:
    if dtype is None or dtype.is_floating_point or dtype.is_complex:
        return None
    return f"has dtype {dtype}; only floating point and complex tensors can be constrained"


def _counts(blocks: Any) -> tuple[int, int]:
    """Return how many blocks there are along rows and columns."""
    given = blocks if isinstance(blocks, (tuple, list)) else (blocks, 1)
    try:
        rows, columns = (0 if isinstance(count, bool) else index(count) for count in given)
    except (TypeError, ValueError):
        rows = columns = 0
    if rows < 1 or columns < 1:
        raise ManifoldError(
            f"{blocks=} must be how many blocks the rows have, such as 4, or how many the rows and "
            "the columns have, such as (1, 8)"
        )
    return rows, columns


class _BlockedManifold(MatrixManifold):
    """Manifolds of matrices: the matrices of a tensor are its blocks."""

    takes_batches = True

    def __init__(self, *, blocks: int | tuple[int, int] = 1) -> None:
        super().__init__()
        self.blocks = _counts(blocks)

    def extra_repr(self) -> str:
        """Return the arguments as they were given, without defaults."""
        rows, columns = self.blocks
        counts = f"blocks={rows if columns == 1 else self.blocks}"
        parts = ["" if self.blocks == (1, 1) else counts, super().extra_repr()]
        return ", ".join(part for part in parts if part)

    def _why_not_blocks(self, shape: torch.Size) -> str | None:
        for name, size, count in zip(("rows", "columns"), shape[-2:], self.blocks, strict=True):
            if size % count:
                return f"has {size} {name}, which do not make {count} blocks of one size"
        return None

    def _why_not_square(self, shape: torch.Size) -> str | None:
        hint = "square matrices are needed (Stiefel() takes others)"
        if len(shape) < 2 or (self.blocks == (1, 1) and shape[-1] != shape[-2]):
            return f"has shape {tuple(shape)}; {hint}"
        n, p = (size // count for size, count in zip(shape[-2:], self.blocks, strict=True))
        wrong = "" if n == p else f"has blocks of shape {(n, p)}; {hint}"
        return self._why_not_blocks(shape) or wrong or None

    def to_matrices(self, x: Tensor) -> Tensor:
        """Return the blocks of ``(..., rows, columns)`` as matrices ``(..., n, p)``, ``p <= n``.

        Of r by c blocks the shape is ``(..., r, c, n, p)``, or ``(..., r, n, p)`` if c is 1; wide
        blocks are shown by their adjoints.
        """
        rows, columns = self.blocks
        if rows * columns > 1:
            x = x.unflatten(-2, (rows, x.shape[-2] // rows))
        if columns > 1:
            x = x.unflatten(-1, (columns, x.shape[-1] // columns)).movedim(-2, -3)
        return x if x.shape[-2] >= x.shape[-1] else x.mH

    def from_matrices(self, matrices: Tensor, shape: torch.Size) -> Tensor:
        """Undo :meth:`to_matrices`."""
        rows, columns = self.blocks
        n, p = shape[-2] // rows, shape[-1] // columns
        m = matrices if n >= p else matrices.mH
        if columns > 1:
            m = m.reshape(*shape[:-2], rows, columns, n, p).movedim(-3, -2)
        return m if m.shape == shape else m.reshape(shape)


class Stiefel(_BlockedManifold):
    r"""Orthonormal columns of tall matrices, orthonormal rows of wide ones.

    .. math:: X^H X = I \;(n \ge p), \qquad X X^H = I \;(n < p)

    Args:
        flatten: view a weight ``(out, in, *kernel)`` as the matrix
            ``(out, in * prod(kernel))``. This bounds the layer's norm but is
            *not* an isometry of the convolution: the same matrix acts on
            overlapping patches.
        blocks: view a matrix as r matrices one below another, or for ``(r, c)`` as r rows of c
            matrices each, every one of which is on the manifold. Heads of a projection are
            ``blocks=heads`` where they are its rows (queries, keys, values), ``blocks=(1, heads)``
            where they are its columns (outputs), and a flattened grouped convolution has
            ``blocks=groups``.

    Shapes: ``(..., r * n, c * p)``, batched, real or complex; with ``flatten`` any
    tensor of two or more dimensions.

    Raises:
        ManifoldError: ``blocks`` are no positive integers.

    Reference:
        Edelman, Arias and Smith, "The geometry of algorithms with orthogonality
        constraints" (1998), section 2.
    """

    name = "Stiefel"

    def __init__(self, *, flatten: bool = False, blocks: int | tuple[int, int] = 1) -> None:
        super().__init__(blocks=blocks)
        self.flatten = flatten
        self.takes_batches = not flatten

    def extra_repr(self) -> str:
        """Return the arguments as they were given."""
        return ", ".join(
            filter(None, ["flatten=True" if self.flatten else "", super().extra_repr()])
        )

    def why_not(self, shape: torch.Size, dtype: torch.dtype | None = None) -> str | None:
        """Say why a tensor of this shape and dtype cannot be a point."""
        if len(shape) < 2:
            return f"has shape {tuple(shape)}; a matrix of two or more dimensions is needed"
        return self._why_not_blocks(self._flat(shape)) or _floating(dtype)

    def _flat(self, shape: torch.Size) -> torch.Size:
        return torch.Size((shape[0], math.prod(shape[1:]))) if self.flatten else shape

    def point_dims(self, x: Tensor) -> int:
        """Number of trailing dimensions that one point takes."""
        return x.ndim if self.flatten else 2

    def to_matrices(self, x: Tensor) -> Tensor:
        """Return ``(..., n, p)``, ``p <= n``, one for each block: wide ones by their adjoint."""
        return super().to_matrices(x.reshape(self._flat(x.shape)) if self.flatten else x)

    def from_matrices(self, matrices: Tensor, shape: torch.Size) -> Tensor:
        """Undo :meth:`to_matrices`."""
        return super().from_matrices(matrices, self._flat(shape)).reshape(shape)


class Orthogonal(_BlockedManifold):
    r"""Square real matrices with :math:`X^T X = I`, the orthogonal group O(n).

    Args:
        det: ``+1`` for the rotations SO(n), ``-1`` for the other component;
            ``None`` for both. Steps never change the sign of the determinant
            where one is given.
        blocks: view a matrix as r square matrices one below another, or for ``(r, c)`` as r rows
            of c each, every one of which is on the manifold, with the given determinant: the
            ``(4 n, n)`` recurrence of an LSTM has ``blocks=4``.

    Shapes: ``(..., r * n, c * n)``, float.

    Raises:
        ManifoldError: ``det`` is not +1, -1 or None, or ``blocks`` are no positive integers.

    Reference:
        Edelman, Arias and Smith (1998), section 2.
    """

    name = "Orthogonal"

    def __init__(self, *, det: int | None = None, blocks: int | tuple[int, int] = 1) -> None:
        super().__init__(blocks=blocks)
        det = plain_scalars(det)
        if det is not None and not (isinstance(det, int) and det in (1, -1)):
            raise ManifoldError(f"{det=} must be +1, -1 or None")
        self.det = det

    def why_not(self, shape: torch.Size, dtype: torch.dtype | None = None) -> str | None:
        """Say why a tensor of this shape and dtype cannot be a point."""
        wrong = self._why_not_square(shape)
        if wrong is not None:
            return wrong
        if dtype is not None and dtype.is_complex:
            return f"has dtype {dtype}; real matrices are needed (Unitary() takes complex ones)"
        if shape[-1] == 0 and self.det == -1:
            return f"has shape {tuple(shape)}; an empty matrix has determinant +1"
        return _floating(dtype)


class Unitary(_BlockedManifold):
    r"""Square complex matrices with :math:`X^H X = I`, the unitary group U(n).

    Args:
        blocks: view a matrix as r square matrices one below another, or for ``(r, c)`` as r rows
            of c each, every one of which is on the manifold.

    Shapes: ``(..., r * n, c * n)``, complex64 or complex128.

    Raises:
        ManifoldError: ``blocks`` are no positive integers.

    Reference:
        Edelman, Arias and Smith (1998), section 2, with the adjoint for the transpose.
    """

    name = "Unitary"

    def why_not(self, shape: torch.Size, dtype: torch.dtype | None = None) -> str | None:
        """Say why a tensor of this shape and dtype cannot be a point."""
        wrong = self._why_not_square(shape)
        if wrong is not None:
            return wrong
        if dtype is not None and not dtype.is_complex:
            return f"has dtype {dtype}; complex matrices are needed (Orthogonal() takes real ones)"
        return None

    def _default_dtype(self) -> torch.dtype:
        double = torch.get_default_dtype() == torch.float64
        return torch.complex128 if double else torch.complex64
