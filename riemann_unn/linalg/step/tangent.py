"""Tangent directions: a few columns v on which the skew-Hermitian Ω of a gradient is known.

Points here are square or wide, X of shape ``(..., p, n)`` with orthonormal rows, ``p <= n``, and
move by X⁺ = X φ(-lr Ω), Ω = ½ (Xᴴ G - Gᴴ X). Ω is n by n and only formed if small; otherwise only
products Ωv are computed. For square X the entries of Ω are coordinates in the Lie algebra, the same
at every point; for wide X a tangent vector U at X represents the Ω of the displacement U.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from ..factor import DOUBLE, real_dtype, thin_qr
from ..maps import skew
from ..value_branches import may_branch_on
from .core import leading_directions, leading_of, planes_of
from .masked import masked_next
from .products import (
    CACHED,
    add_product_,
    are_read_once,
    is_read_once,
    less_rows_times_,
    rows_times,
    skew_columns,
    skew_products,
    times_columns,
)
from .sketch import is_usual, orthonormal_columns, orthonormal_rows, sketch

__all__ = [
    "Draws",
    "TangentMethod",
    "applications",
    "core_of",
    "first_rows",
    "gaussian_draws",
    "iterate",
    "leading_rows",
    "next_directions",
    "starts_by_planes",
    "tangent_coordinates",
    "tangent_directions",
    "tangent_gradient",
    "tangent_images",
    "tangent_times",
]

TangentMethod = Literal["tangent", "svd", "lsi", "column"]
"""Name of a way to find directions, see :func:`tangent_directions`."""


class Draws(Protocol):
    """A source of random rows."""

    def __call__(self, k: int, n: int) -> tuple[Tensor, float]:
        """Return real rows ``(k, n)``, and the factor that gives their entries variance 1.

        They are the same for every matrix of a batch; real for complex points too, so that a
        complex problem with zero imaginary part takes the steps of the real one.
        """


# In cache more applications of Ω are cheap, and random columns may get more weight; measured, see
# docs/benchmarks.md.
_APPLIES, _FRESH = (3, 1), (0.5, 0.3)
# How often a sketch starts from planes; at every fourth step it captures 1 or 2 percent less of Ω.
_PLANES_EVERY = 4
# Up to this n, and this number of operations, forming Ω is faster than thin products.
_FORMED, _OPERATIONS = 128, 2**23


def tangent_times(x: Tensor, g: Tensor, v: Tensor, xv: Tensor | None = None) -> Tensor:
    r"""Return :math:`\Omega v = \tfrac12 (X^H (G v) - G^H (X v))`, by products alone.

    Args:
        x: shape ``(..., p, n)``.
        g: a gradient or displacement, of the shape of ``x``.
        v: shape ``(..., n, k)``.
        xv: X v, if it is known.

    Returns:
        Shape ``(..., n, k)``, stored column by column.
    """
    if xv is None:
        return tangent_images(x, g, v)[0]
    return less_rows_times_(rows_times(times_columns(g, v).mH, x), xv.mH, g).mH


def tangent_images(x: Tensor, g: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return Ωv, see :func:`tangent_times`, and X v."""
    if are_read_once(x, g, v.shape[-1]) and may_branch_on(x):
        return skew_products(x, g, v.mT.contiguous())
    xv = times_columns(x, v)
    return tangent_times(x, g, v, xv), xv


def tangent_coordinates(
    x: Tensor, delta: Tensor, v: Tensor, xv: Tensor | None, *, clear: bool = False
) -> Tensor:
    r"""Return the coordinates d = K v of a displacement on the directions v.

    .. math:: K = \operatorname{skew} \Delta \;(p = n), \qquad
        K = \operatorname{skew}(X^H \Delta) \;(p < n)

    Args:
        x: shape ``(..., p, n)``.
        delta: the displacement of a base optimizer, for square X in the Lie algebra; shape of
            ``x``.
        v: shape ``(..., n, k)``.
        xv: X v, if it is known.
        clear: leave zeros in ``delta``, which is cheaper while it is read.
    """
    # Only the skew part moves X; Adam scales rounding in the symmetric part to full size.
    is_square = x.shape[-2] == x.shape[-1]
    if is_square and is_read_once(delta, v.shape[-1]) and may_branch_on(delta):
        return skew_columns(delta, v.mT.contiguous(), clear=clear)
    if is_square:
        d = times_columns(delta, v).sub_(rows_times(v.mH, delta).mH).mul_(0.5)
    else:
        d = tangent_times(x, delta, v, xv)
    if clear:
        delta.zero_()
    return d


def tangent_gradient(
    x: Tensor, v: Tensor, z: Tensor, xv: Tensor, *, out: Tensor | None = None
) -> Tensor:
    r"""Return the Riemannian gradient on the directions v, from z = Ω v, for a base.

    .. math:: \Omega_k = z v^H - v z^H - v\,\operatorname{skew}(v^H z)\,v^H
        = \Omega - (I - v v^H)\,\Omega\,(I - v v^H)

    for square X; for wide X the tangent vector :math:`X \Omega_k (2 I - X^H X)`, whose skew part
    :math:`\operatorname{skew}(X^H \cdot)` moves X as :math:`\Omega_k` does, so that a base's first
    step with momentum is the step without.

    Args:
        x: shape ``(..., p, n)``.
        v: orthonormal columns, shape ``(..., n, k)``.
        z: Ω v.
        xv: X v.
        out: where to write the result.
    """
    right = torch.cat([v, z], dim=-1)
    # For one real direction v is orthogonal to z.
    is_one = v.shape[-1] == 1 and not v.is_complex()
    left = z if is_one else z - v @ skew(v.mH @ z)
    if x.shape[-2] < x.shape[-1]:
        back = torch.cat([xv, times_columns(x, z)], dim=-1)
        left, right = times_columns(x, left), 2 * right - rows_times(back.mH, x).mH
        left = torch.cat([left, -xv], dim=-1)
    else:
        left = torch.cat([left, -v], dim=-1)
    if out is None:
        gradient: Tensor = left @ right.mH
        return gradient
    return add_product_(out, left, right.mH, beta=0.0)


def core_of(v: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return Q and R of [v d], and the core :math:`Q^H K Q` of the K whose coordinates are d.

    .. math:: K = d v^H - v d^H - v\,\operatorname{skew}(v^H d)\,v^H
    """
    k = v.shape[-1]
    q, r = thin_qr(torch.cat([v, d], dim=-1))
    if r.ndim == 2 and r.shape[-1] == r.shape[-2] and not r.is_complex():
        e, f = r.chunk(2, dim=-1)
        half = torch.mm(f, e.mT).mul_(_once(k, r.dtype, r.device))
        return q, r, half - half.mT
    e, f = r[..., :k], r[..., k:]
    half = f @ e.mH
    # The part in the span of v is in both terms of K, and counts once.
    if r.is_complex():
        half = half - 0.5 * (e @ (e.mH @ f)) @ e.mH
    else:  # R is triangular
        half[..., :k, :k].mul_(0.5)
    return q, r, half - half.mH


@lru_cache(maxsize=64)
def _once(k: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return 2k by 2k weights that count entries in both of two terms once."""
    with torch.inference_mode(False):
        weights = torch.ones(2 * k, 2 * k, dtype=dtype, device=device)
        weights[:k, :k] = 0.5
        return weights


def next_directions(v: Tensor, z: Tensor, *, by_planes: bool = True) -> Tensor:
    """Return the columns that start the next sketch: one of each plane of Ω_k, or z outside v.

    Starting from z itself would waste columns: v and z come to span the same planes. One direction
    of each plane is best, but near planes of equal angles it depends on rounding, so that processes
    may diverge; z outside v does not, and is as good for some steps (``starts_by_planes``). For a
    single plane both are the same.

    Args:
        v: orthonormal columns, shape ``(..., n, k)``.
        z: Ω v.
        by_planes: which of the two.
    """
    if v.shape[-1] == 1:
        # For a real Ω, z is orthogonal to v.
        rest = z - v @ (v.mH @ z) if z.is_complex() else z
        return orthonormal_columns(rest, otherwise=v)
    if not may_branch_on(z):
        return masked_next(v, z)
    if not by_planes:
        return thin_qr(torch.cat([v, z], dim=-1))[0][..., v.shape[-1] :].to(v.dtype)
    q, _, core = core_of(v, z)
    return (q @ leading_of(core, v.shape[-1])).to(v.dtype)


def starts_by_planes(step: int) -> bool:
    """Tell whether the sketch after a step starts from one direction of each plane."""
    return step % _PLANES_EVERY == 0


def _best_directions(x: Tensor, g: Tensor, rank: int) -> Tensor:
    """Return the v with the best Ω_k, by an eigendecomposition of Ω."""
    omega = skew(x.mH @ g)
    leading = leading_directions(omega, *planes_of(omega), rank)
    leading = leading.to(DOUBLE.get(x.dtype, x.dtype))
    return thin_qr(leading)[0].to(x.dtype)


def tangent_directions(
    x: Tensor,
    g: Tensor,
    *,
    rank: int,
    method: TangentMethod = "tangent",
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return directions v of the tangent gradient at a point, with Ωv and X v.

    .. math:: z = \Omega v, \qquad \Omega = \tfrac12 (X^H G - G^H X)

    The methods are:

    - ``"tangent"``: subspace iteration on Ω from ``start`` plus fresh Gaussian columns: three
      applications of Ω where X fits in cache, else one; one more without ``start``. An
      application reads X and G twice; for n up to 64 Ω is formed instead.
    - ``"svd"``: those of the best Ω_k, by an eigendecomposition, O(n³).
    - ``"lsi"``, ``"column"``: the right factor of a sketch :math:`A v^H` of the *Euclidean* G, and
      :math:`z = \operatorname{skew}(X^H A v^H)\,v`, as projUNN was published. The part left out
      need not be small where z is, so that steps may stop at points that are not critical.

    Args:
        x: orthonormal rows, shape ``(..., p, n)``, ``p <= n``.
        g: the Euclidean gradient, of the shape of ``x``.
        rank: k, with ``2 k <= n``.
        method: one of the above.
        start: columns ``(..., n, k)`` for ``"tangent"``, see ``next_directions``.
        generator: source of the random columns; the default is the global one.

    Returns:
        v of shape ``(..., n, k)`` with orthonormal columns, z of the same shape, and X v. NaN or
        infinity in ``g`` reaches z, except for ``"svd"`` and ``"column"``.

    Raises:
        ValueError: the method is unknown.

    Reference:
        Halko, Martinsson and Tropp (2011), section 4.5, for subspace iteration; Vogels et al.,
        "PowerSGD" (2019), for its warm start; Kiani et al., "projUNN" (2022), section 4.1.
    """
    if method not in get_args(TangentMethod):
        raise ValueError(f"sketch {method!r} is unknown; choose from {get_args(TangentMethod)}")
    if method == "tangent":
        draws = gaussian_draws(x, generator)
        rows = None if start is None else start.mH
        v, z, known = iterate(x, g, rank=rank, start=rows, draws=draws)
        return v, z, times_columns(x, v) if known is None else known
    if method != "svd":
        a, v = sketch(g, rank=rank, method=method, generator=generator)
        xv = times_columns(x, v)
        inner = v.mH @ v  # a zero sketch has a zero column
        return v, 0.5 * (rows_times(a.mH, x).mH @ inner - v @ (a.mH @ xv)), xv
    v = _best_directions(x, g, rank)
    xv = times_columns(x, v)
    return v, tangent_times(x, g, v, xv), xv


def gaussian_draws(like: Tensor, generator: torch.Generator | None) -> Draws:
    """Return a source of Gaussian rows, of the precision and device of a tensor."""

    def draws(k: int, n: int) -> tuple[Tensor, float]:
        dtype = real_dtype(like.dtype)
        return torch.randn(k, n, dtype=dtype, device=like.device, generator=generator), 1.0

    return draws


def first_rows(
    shape: torch.Size,
    like: Tensor,
    *,
    rank: int,
    start: Tensor | None,
    draws: Draws,
    is_cached: bool | None = None,
) -> Tensor:
    """Return the first rows of a subspace iteration: a start mixed with random ones.

    Args:
        shape: of the points, ``(..., p, n)``.
        like: a tensor of their dtype and device.
        rank: k.
        start: rows ``(..., k, n)``, or None.
        draws: source of random rows.
        is_cached: see :func:`iterate`.

    Returns:
        Shape ``(..., k, n)``, not orthonormal.
    """
    n = shape[-1]
    fresh, unit = draws(rank, n)
    if start is None:
        fresh = torch.mul(fresh, unit).to(like.dtype)
        return fresh.expand(*shape[:-2], rank, n) if len(shape) > 2 else fresh
    weight = _FRESH[_is_large(shape, is_cached)]
    return torch.add(start, fresh, alpha=unit * weight / n**0.5)


def _is_large(shape: torch.Size, is_cached: bool | None) -> bool:
    return shape[-2:].numel() > CACHED if is_cached is None else not is_cached


def applications(shape: torch.Size, start: Tensor | None, *, is_cached: bool | None = None) -> int:
    """Return the number of applications of Ω in a subspace iteration, the last Ωv included."""
    return 1 + _APPLIES[_is_large(shape, is_cached)] - (start is not None)


def iterate(
    x: Tensor,
    g: Tensor,
    *,
    rank: int,
    start: Tensor | None,
    draws: Draws,
    is_cached: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return v, Ωv and, where it is a by-product, X v, by ``"tangent"``.

    Args:
        x: points, shape ``(..., p, n)``, at most one batch dimension.
        g: their gradients.
        rank: k.
        start: rows ``(..., k, n)``, or None.
        draws: see :func:`first_rows`.
        is_cached: whether X fits in cache; by default, whether each of its matrices does.
    """
    n, count = x.shape[-1], applications(x.shape, start, is_cached=is_cached)
    rows = first_rows(x.shape, x, rank=rank, start=start, draws=draws, is_cached=is_cached)
    if n > _FORMED or x.numel() * n > _OPERATIONS // (4 if x.is_complex() else 1):
        rows = leading_rows(rows, lambda r: tangent_times(x, g, r.mH).mH, count - 1)
        v = rows.mH
        return v, *tangent_images(x, g, v)
    multiply = torch.mm if x.ndim == 2 else torch.bmm
    a = multiply(x.mH, g)
    less_twice = a.mH - a  # -2Ω, so that rows times it are the adjoints of columns 2Ωv
    rows = leading_rows(rows, lambda r: multiply(r, less_twice), count - 1)
    if x.ndim == 2:
        z = torch.addmm(rows, rows, less_twice, beta=0.0, alpha=0.5)
    else:
        z = torch.baddbmm(rows, rows, less_twice, beta=0.0, alpha=0.5)
    return rows.mH, z.mH, None


def leading_rows(first: Tensor, apply: Callable[[Tensor], Tensor], count: int) -> Tensor:
    r"""Return orthonormal rows that span the adjoint of :math:`\Omega^q v`.

    Args:
        first: the adjoint of v, shape ``(..., k, n)``, of any lengths.
        apply: gives the adjoint of a positive multiple of Ω times columns from theirs.
        count: q, small.
    """
    rows = first
    if count and first.ndim == 2 and len(first) == 1 and may_branch_on(first):
        for _ in range(count):
            rows = apply(rows)
        norm = torch.linalg.vector_norm(rows)
        if is_usual(norm.item()):  # else intermediate results may have lost digits
            unit: Tensor = rows / norm
            return unit
        rows = first
    if not may_branch_on(first) and count:
        return _leading_rows_masked(first, apply, count)
    if first.shape[-2] == 1 or not count:
        rows = orthonormal_rows(rows)
    for _ in range(count):
        # Orthonormal rows after each application, or rounding would grow with powers of the
        # spectrum.
        rows = orthonormal_rows(apply(rows), otherwise=rows)
    return rows


def _leading_rows_masked(first: Tensor, apply: Callable[[Tensor], Tensor], count: int) -> Tensor:
    """The same without branches on lengths, scaled so that no length overflows."""
    rows = first
    if first.shape[-2] > 1:
        for i in range(count):
            rows = orthonormal_rows(apply(rows), otherwise=rows, passes=1 + (i == count - 1))
        return rows
    for _ in range(count - 1):
        rows = orthonormal_rows(apply(rows))
    otherwise = first / torch.linalg.vector_norm(first, dim=-1, keepdim=True)
    return orthonormal_rows(apply(rows), otherwise=otherwise)
