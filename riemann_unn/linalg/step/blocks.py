r"""Steps of matrices of which each process holds a block, by sums of thin matrices.

Points are square or wide, X of shape ``(p, n)`` or ``(batch, p, n)``, as in :mod:`.tangent`. A
process has X, G and the displacement of its block; directions v, coordinates z and cores are whole,
and the same, on every process. Kernels are generators: they yield a list of tensors, and are sent
their sums over the processes, so that a caller may add up those of many matrices at once.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..maps import skew
from .core import Angle, Phi
from .polish import columns_due
from .products import add_product_, less_rows_times_, rows_times, times_columns
from .sketch import orthonormal_columns, orthonormal_rows
from .tangent import Draws, applications, first_rows
from .update import rotation_factors

__all__ = [
    "Block",
    "Summed",
    "block_coordinates",
    "block_correction",
    "block_directions",
    "block_error",
    "block_gradient",
    "block_rotate_",
    "block_times",
    "block_whole",
]

# Probes of an error.
_PROBES = 8
# Tolerance for two orthonormal bases of one space.
_SAME = 1e-3

T = TypeVar("T")
Summed = Generator[list[Tensor], list[Tensor], T]
"""A computation that yields tensors, is sent their sums over processes, and returns T."""


@dataclass(frozen=True)
class Block:
    """The part of a matrix, or of a batch of them, that a process holds.

    Args:
        shape: of the whole, ``(p, n)`` or ``(batch, p, n)``.
        index: the slice of each dimension, with a start and a stop.
        cut: whether a dimension is split over processes; this one may hold none or all of it.
        copies: the number of processes that hold the same part, among which its terms are divided.
    """

    shape: tuple[int, ...]
    index: tuple[slice, ...]
    cut: tuple[bool, ...]
    copies: int = 1

    @property
    def is_whole(self) -> bool:
        """Whether every process holds the whole."""
        return not any(self.cut)

    def rows_of(self, y: Tensor, dim: int) -> Tensor:
        """Return the local rows, a view, of thin matrices with the rows of a dimension."""
        return y[(*self.index[:-2], self.index[dim])]

    def columns_of(self, y: Tensor) -> Tensor:
        """Return the local columns of wide matrices whose columns are those of X, a view."""
        return y[(*self.index[:-2], slice(None), self.index[-1])]

    def placed(self, part: Tensor, dim: int) -> Tensor:
        """Return the local rows, padded by zeros to all rows, to be summed.

        They are stored column by column, as thin factors are.
        """
        k = part.shape[-1]
        whole = part.new_zeros((*self.shape[:-2], k, self.shape[dim])).mT
        self.rows_of(whole, dim).copy_(part if self.copies == 1 else part / self.copies)
        return whole

    def placed_whole(self, part: Tensor) -> Tensor:
        """Return the local block, padded by zeros to the whole, to be summed."""
        whole = part.new_zeros(self.shape)
        whole[self.index] = part if self.copies == 1 else part / self.copies
        return whole


def block_times(
    block: Block, x: Tensor, g: Tensor, v: Tensor, xv: Tensor | None = None
) -> Summed[tuple[Tensor, Tensor]]:
    r"""Return :math:`\Omega v = \tfrac12 (X^H (G v) - G^H (X v))` whole, and the local rows of X v.

    One sum of k n numbers; where columns are cut one of 2 k p before.

    Args:
        block: which part ``x`` and ``g`` are.
        x: the local block of X.
        g: the local block of a gradient or displacement.
        v: whole, shape ``(..., n, k)``.
        xv: the local rows of X v, if they are known.
    """
    mine = block.rows_of(v, -1)
    images = [times_columns(y, mine) for y in ((g,) if xv is not None else (g, x))]
    if block.cut[-1]:
        images = yield [block.placed(image, -2) for image in images]
        images = [block.rows_of(image, -2) for image in images]
    gv, xv = images[0], images[1] if xv is None else xv
    part = less_rows_times_(rows_times(gv.mH, x), xv.mH, g).mH
    (z,) = yield [block.placed(part, -1)]
    return z, xv


def block_directions(
    block: Block,
    x: Tensor,
    g: Tensor,
    *,
    rank: int,
    start: Tensor | None,
    draws: Draws,
) -> Summed[tuple[Tensor, Tensor, Tensor]]:
    """Return v and Ωv whole and the local rows of X v, as in :func:`.tangent.tangent_directions`.

    Args:
        block: which part ``x`` and ``g`` are.
        x: the local block of X.
        g: the local block of the gradient.
        rank: k.
        start: whole rows ``(..., k, n)``, the adjoint of ``tangent.next_directions``.
        draws: source of random rows, the same on every process.
    """
    shape = torch.Size(block.shape)
    rows = first_rows(shape, x, rank=rank, start=start, draws=draws)
    count = applications(shape, start) - 1
    v = (orthonormal_rows(rows) if rank == 1 or not count else rows).mH
    for _ in range(count):
        image, _ = yield from block_times(block, x, g, v)
        v = orthonormal_columns(image, otherwise=v)
    z, xv = yield from block_times(block, x, g, v)
    return v, z, xv


def block_gradient(block: Block, x: Tensor, v: Tensor, z: Tensor, xv: Tensor) -> Summed[Tensor]:
    """Return the local block of :func:`.tangent.tangent_gradient`.

    Without communication for square X; for wide X sums of 2 k n numbers, or k p if columns are
    split.
    """
    left, right = z - v @ skew(v.mH @ z), torch.cat([v, z], dim=-1)
    if block.shape[-2] == block.shape[-1]:
        left = block.rows_of(torch.cat([left, -v], dim=-1), -2)
        return left @ block.rows_of(right, -1).mH
    xz = times_columns(x, block.rows_of(z, -1))
    if block.cut[-1]:
        (whole,) = yield [block.placed(xz, -2)]
        xz = block.rows_of(whole, -2)
    back = rows_times(torch.cat([xv, xz], dim=-1).mH, x).mH
    if block.cut[-2]:
        (whole,) = yield [block.placed(back, -1)]
        back = block.rows_of(whole, -1)
    w = skew(v.mH @ z)[block.index[:-2]]
    found = torch.cat([xz - xv @ w, -xv], dim=-1) @ (2 * block.rows_of(right, -1) - back).mH
    return found


def block_coordinates(
    block: Block, x: Tensor, delta: Tensor, v: Tensor, xv: Tensor
) -> Summed[Tensor]:
    """Return whole coordinates of a displacement, :func:`.tangent.tangent_coordinates`.

    Args:
        block: which part ``x`` and ``delta`` are.
        x: the local block of X.
        delta: the local block of the base's displacement.
        v: whole directions.
        xv: the local rows of X v.
    """
    if block.shape[-2] < block.shape[-1]:
        d, _ = yield from block_times(block, x, delta, v, xv)
        return d
    part = block.placed(0.5 * times_columns(delta, block.rows_of(v, -1)), -2)
    back = rows_times(block.rows_of(v, -2).mH, delta).mH
    block.rows_of(part, -1).sub_(back, alpha=0.5 / block.copies)
    (d,) = yield [part]
    return d


def block_rotate_(
    block: Block,
    x: Tensor,
    v: Tensor,
    d: Tensor,
    xv: Tensor,
    *,
    phi: Phi | Angle,
    max_angle: float | None = None,
    by_planes: bool = True,
) -> Summed[tuple[Tensor, Tensor]]:
    """Rotate the local block, in place, as :func:`.update.rotate_low_rank_` does.

    Without communication, except for sums of k p numbers where columns are split.
    """
    q, right, angle, added = rotation_factors(
        v, d, phi=phi, max_angle=max_angle, by_planes=by_planes
    )
    narrow = q.to(x.dtype)
    if block.cut[-1]:
        xq = yield from _rows_times_basis(block, x, v, narrow, xv)
    else:
        xq = times_columns(x, block.rows_of(narrow, -1))
    add_product_(x, xq, block.columns_of(right).to(x.dtype))
    return angle, added


def _rows_times_basis(block: Block, x: Tensor, v: Tensor, q: Tensor, xv: Tensor) -> Summed[Tensor]:
    """Return the local rows of X Q where columns are split; the part in the span of v from X v."""
    k, known = v.shape[-1], q[..., :0]
    # The first columns of Q span v, unless :func:`.factor.thin_qr` uses an SVD.
    basis = v.mH @ q[..., :k]
    if bool((torch.linalg.matrix_norm(v @ basis - q[..., :k]) < _SAME).all()):
        known = (xv @ basis[block.index[:-2]]).to(x.dtype)
        q = q[..., k:]
    (whole,) = yield [block.placed(times_columns(x, block.rows_of(q, -1)), -2)]
    rest = block.rows_of(whole, -2)
    return torch.cat([known, rest], dim=-1) if known.shape[-1] else rest


def block_correction(block: Block, x: Tensor, *, step: int) -> Summed[tuple[Any, Tensor]]:
    r"""Return the polish's correction of the few columns that are due at a step.

    .. math:: T_J \leftarrow T_J - T E_J, \qquad E_J = T^H T_J - I_J

    as :func:`.polish.polish_block_` for the columns J of T = Xᴴ, or of T = X for square X by rows.

    Returns:
        The index of the local part of :math:`T_J` in ``x``, and the correction to subtract.
    """
    # For square X the side whose columns are whole.
    is_transposed = block.shape[-2] < block.shape[-1] or block.cut[-1]
    t, rows, columns = (x.mH, -1, -2) if is_transposed else (x, -2, -1)
    start, stop = columns_due(block.shape[columns], step=step)
    first, last = block.index[columns].start, block.index[columns].stop
    low, high = max(start, first), max(min(stop, last), start, first)
    mine, among = slice(low - first, high - first), slice(low - start, high - start)
    due = all_due = t[..., mine]
    index = (..., mine, slice(None)) if is_transposed else (..., mine)
    if block.cut[columns]:
        all_due = due.new_zeros((*due.shape[:-1], stop - start))
        all_due[..., among] = due
        (whole,) = yield [block.placed(all_due, rows)]
        all_due = block.rows_of(whole, rows)
    error = t.mH @ all_due
    if block.cut[rows]:
        (whole,) = yield [block.placed(error, columns)]
        error = block.rows_of(whole, columns).clone()
    error[..., mine, among].diagonal(dim1=-2, dim2=-1).sub_(1)
    error[..., mine, :].mul_(0.5)
    update = t @ error
    if block.cut[columns]:
        (whole,) = yield [block.placed(update, rows)]
        update = block.rows_of(whole, rows)[..., among]
    return index, update.mH if is_transposed else update


def block_error(block: Block, x: Tensor) -> Summed[Tensor]:
    r"""Return an estimate of :math:`\|X X^H - I\|_F / \sqrt p` of each matrix, from random probes.

    Two sums, of 8 n and 8 p numbers.
    """
    p = block.shape[-2]
    generator = torch.Generator(x.device).manual_seed(p)
    drawn = torch.randn(_PROBES, p, dtype=x.dtype.to_real(), device=x.device, generator=generator)
    probes = drawn.to(x.dtype).mT.expand(*block.shape[:-2], p, _PROBES)
    y = rows_times(block.rows_of(probes, -2).mH, x).mH
    if block.cut[-2]:
        (whole,) = yield [block.placed(y, -1)]
        y = block.rows_of(whole, -1)
    (image,) = yield [block.placed(times_columns(x, y), -2)]
    error: Tensor = torch.linalg.matrix_norm(image - probes) / (_PROBES * max(p, 1)) ** 0.5
    return error


def block_whole(block: Block, x: Tensor) -> Summed[Tensor]:
    """Return the whole of X, by a sum of p n numbers."""
    (whole,) = yield [block.placed_whole(x)]
    return whole
