"""Tangent directions: a few columns v of the skew-Hermitian Ω that a gradient is at a point.

Points here are square or wide, X of shape ``(..., p, n)`` with orthonormal rows, ``p <= n``, and
move by X⁺ = X φ(-lr Ω), Ω = ½ (Xᴴ G - Gᴴ X). Ω is n by n and not formed, but for the smallest:
all that is asked of it is Ωv. For square X the entries of Ω are coordinates in the Lie algebra,
the same at every point; for wide X a tangent vector U at X stands for the Ω of the displacement U.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from ..factor import DOUBLE, thin_qr
from ..maps import skew
from .core import leading_directions, leading_of, planes_of
from .products import CACHED, add_product_, less_rows_times_, rows_times, times_columns
from .sketch import orthonormal_columns, sketch

__all__ = [
    "TangentMethod",
    "core_of",
    "next_directions",
    "starts_by_planes",
    "tangent_coordinates",
    "tangent_directions",
    "tangent_energies",
    "tangent_gradient",
    "tangent_times",
]

TangentMethod = Literal["tangent", "svd", "lsi", "column"]
"""Name of a way to find directions, see :func:`tangent_directions`."""

# Of what stays in cache more applications cost little, and fresh columns may weigh more; measured,
# see docs/benchmarks.md.
_APPLIES, _FRESH = (3, 1), (0.5, 0.3)
# Of the share of Ω that planes at every step find, planes at every fourth lose a hundredth or two.
_PLANES_EVERY = 4
# Up to this n, and for so many operations, one product makes Ω and is faster than the calls of
# thin ones.
_FORMED, _OPERATIONS = 64, 2**23


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
    xv = times_columns(x, v) if xv is None else xv
    return less_rows_times_(rows_times(times_columns(g, v).mH, x), xv.mH, g).mH


def tangent_coordinates(x: Tensor, delta: Tensor, v: Tensor, xv: Tensor) -> Tensor:
    r"""Return the coordinates d = K v of a displacement on the directions v.

    .. math:: K = \operatorname{skew} \Delta \;(p = n), \qquad
        K = \operatorname{skew}(X^H \Delta) \;(p < n)

    Args:
        x: shape ``(..., p, n)``.
        delta: what a base optimizer wrote, for square X in the Lie algebra; shape of ``x``.
        v: shape ``(..., n, k)``.
        xv: X v.
    """
    if x.shape[-2] < x.shape[-1]:
        return tangent_times(x, delta, v, xv)
    # Only the skew part moves; Adam's symmetric one is rounding, scaled to full size.
    return times_columns(delta, v).sub_(rows_times(v.mH, delta).mH).mul_(0.5)


def tangent_gradient(
    x: Tensor, v: Tensor, z: Tensor, xv: Tensor, *, out: Tensor | None = None
) -> Tensor:
    r"""Return the Riemannian gradient that z = Ω v tells of, in the coordinates of a base.

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
    left, right = z - v @ skew(v.mH @ z), torch.cat([v, z], dim=-1)
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
    e, f = r[..., :k], r[..., k:]
    half = f @ e.mH
    # The part inside v is in both terms of K, and counts once.
    if r.is_complex():
        half = half - 0.5 * (e @ (e.mH @ f)) @ e.mH
    else:  # R is triangular
        half[..., :k, :k].mul_(0.5)
    return q, r, half - half.mH


def next_directions(v: Tensor, z: Tensor, *, by_planes: bool = True) -> Tensor:
    """Return columns where the next sketch starts: one of each plane of Ω_k, or what z adds to v.

    To start from z itself would waste columns: v and z come to hold both directions of the same
    planes. One of each plane is best, but near planes of equal angles it is up to rounding, so
    that computations that round otherwise part; what z adds to v is not, and is as good for some
    steps (:func:`starts_by_planes`). Of a single plane both are the same.

    Args:
        v: orthonormal columns, shape ``(..., n, k)``.
        z: Ω v.
        by_planes: which of the two.
    """
    if v.shape[-1] == 1:
        # Of a real Ω, z is orthogonal to v.
        rest = z - v @ (v.mH @ z) if z.is_complex() else z
        return orthonormal_columns(rest, otherwise=v)
    if not by_planes:
        return thin_qr(torch.cat([v, z], dim=-1))[0][..., v.shape[-1] :].to(v.dtype)
    q, _, core = core_of(v, z)
    return (q @ leading_of(core, v.shape[-1])).to(v.dtype)


def starts_by_planes(step: int) -> bool:
    """Tell whether the sketch after a step starts from one direction of each plane."""
    return step % _PLANES_EVERY == 0


def _best_directions(x: Tensor, g: Tensor, rank: int) -> Tensor:
    """The v whose Ω_k is the best matrix of rank 2k there is, by all eigenvectors of Ω."""
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
    is_cached: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return directions v of the tangent gradient at a point, with Ωv and X v.

    .. math:: z = \Omega v, \qquad \Omega = \tfrac12 (X^H G - G^H X)

    The methods are:

    - ``"tangent"``: subspace iteration on Ω from ``start`` plus fresh Gaussian columns: three
      applications of Ω where X stays in cache, else one; one more without ``start``. An
      application reads X and G twice; for n up to 64 Ω is formed instead.
    - ``"svd"``: those of the best Ω_k there is, by an eigendecomposition, O(n³).
    - ``"lsi"``, ``"column"``: the right factor of a sketch :math:`A v^H` of the *Euclidean* G, and
      :math:`z = \operatorname{skew}(X^H A v^H)\,v`, as projUNN was published. What they leave out
      need not be small where z is, so that steps may stop at points that are not critical.

    Args:
        x: orthonormal rows, shape ``(..., p, n)``, ``p <= n``.
        g: the Euclidean gradient, of the shape of ``x``.
        rank: k, with ``2 k <= n``.
        method: one of the above.
        start: columns ``(..., n, k)`` for ``"tangent"``, see :func:`next_directions`.
        generator: source of the random columns; the default is the global one.
        is_cached: whether X stays in cache; by default, whether each of its matrices does.

    Returns:
        v of shape ``(..., n, k)`` with orthonormal columns, z of the same shape, and X v. Not a
        number or infinity in ``g`` reaches z, but for ``"svd"`` and ``"column"``.

    Raises:
        ValueError: the method is unknown.

    Reference:
        Halko, Martinsson and Tropp (2011), section 4.5, for subspace iteration; Vogels et al.,
        "PowerSGD" (2019), for its warm start; Kiani et al., "projUNN" (2022), section 4.1.
    """
    if method not in get_args(TangentMethod):
        raise ValueError(f"sketch {method!r} is unknown; choose from {get_args(TangentMethod)}")
    if method == "tangent":
        return _iterate(x, g, rank, start, generator, is_cached)
    if method != "svd":
        a, v = sketch(g, rank=rank, method=method, generator=generator)
        xv = times_columns(x, v)
        inner = v.mH @ v  # a zero sketch has a zero column
        return v, 0.5 * (rows_times(a.mH, x).mH @ inner - v @ (a.mH @ xv)), xv
    v = _best_directions(x, g, rank)
    xv = times_columns(x, v)
    return v, tangent_times(x, g, v, xv), xv


def first_directions(
    shape: torch.Size,
    like: Tensor,
    *,
    rank: int,
    start: Tensor | None,
    generator: torch.Generator | None,
    is_cached: bool | None = None,
) -> Tensor:
    """Return the v that a subspace iteration begins with: a start mixed with Gaussian columns.

    Args:
        shape: of the points, ``(..., p, n)``.
        like: a tensor of their dtype and device.
        rank: k.
        start: columns ``(..., n, k)``, or None.
        generator: source of the random columns; the default is the global one.
        is_cached: see :func:`tangent_directions`.
    """
    n = shape[-1]
    # Real for complex matrices too, so that a complex problem with zero imaginary part takes the
    # steps of the real one; the same for every matrix of a batch.
    dtype = like.dtype.to_real()
    fresh = torch.randn(rank, n, dtype=dtype, device=like.device, generator=generator)
    fresh = fresh.to(like.dtype).mT
    if start is None:
        return orthonormal_columns(fresh.expand(*shape[:-2], n, rank), otherwise=None)
    weight = _FRESH[_is_large(shape, is_cached)]
    return orthonormal_columns(torch.add(start, fresh, alpha=weight / n**0.5), otherwise=start)


def _is_large(shape: torch.Size, is_cached: bool | None) -> bool:
    return shape[-2:].numel() > CACHED if is_cached is None else not is_cached


def applications(shape: torch.Size, start: Tensor | None, *, is_cached: bool | None = None) -> int:
    """Return how often a subspace iteration applies Ω, Ωv of the last v included."""
    return 1 + _APPLIES[_is_large(shape, is_cached)] - (start is not None)


def _iterate(
    x: Tensor,
    g: Tensor,
    rank: int,
    start: Tensor | None,
    generator: torch.Generator | None,
    is_cached: bool | None,
) -> tuple[Tensor, Tensor, Tensor]:
    n = x.shape[-1]
    v = first_directions(
        x.shape, x, rank=rank, start=start, generator=generator, is_cached=is_cached
    )
    is_formed = n <= _FORMED and x.numel() * n <= _OPERATIONS // (4 if x.is_complex() else 1)
    omega = skew(x.mH @ g) if is_formed else None
    for _ in range(applications(x.shape, start, is_cached=is_cached) - 1):
        image = tangent_times(x, g, v) if omega is None else times_columns(omega, v)
        v = orthonormal_columns(image, otherwise=v)
    xv = times_columns(x, v)
    return v, tangent_times(x, g, v, xv) if omega is None else times_columns(omega, v), xv


# Energies are exact for matrices of so many numbers; of others a mean over probes tells them to
# a tenth or better.
_EXACT, _PROBES = CACHED, 64


def tangent_energies(
    x: Tensor, g: Tensor, v: Tensor | None = None, z: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""Return the energy of a tangent gradient, and of what a step along directions leaves out.

    .. math:: \|\Omega\|_F^2, \qquad \|\Omega - \Omega_k\|_F^2, \quad
        \Omega_k = z v^H - v z^H - v\,\operatorname{skew}(v^H z)\,v^H

    exactly for matrices that stay in cache; for larger ones from the lengths of products with
    Gaussian probes, whose mean they are, without anything n by n.

    Args:
        x: orthonormal rows, shape ``(..., p, n)``, ``p <= n``.
        g: the Euclidean gradient, of the shape of ``x``.
        v: the directions of the step, shape ``(..., n, k)``; without, all of Ω is taken.
        z: its coordinates on them.

    Returns:
        The two, in float64, shape ``(...)``.
    """
    n, is_small = x.shape[-1], x.shape[-1] ** 2 <= _EXACT
    if is_small:
        wide = DOUBLE.get(x.dtype, x.dtype)
        x, g = x.to(wide), g.to(wide)
        probes = torch.eye(n, dtype=wide, device=x.device)
    else:
        generator = torch.Generator(x.device).manual_seed(n)
        drawn = torch.randn(_PROBES, n, generator=generator, device=x.device)
        probes = (drawn / _PROBES**0.5).to(x.dtype).mT
    probes = probes.expand(*x.shape[:-2], *probes.shape)
    image = tangent_times(x, g, probes)
    total = _energy(image)
    if v is None or z is None:
        return total, torch.zeros_like(total)
    v, z = v.to(image.dtype), z.to(image.dtype)
    w = skew(v.mH @ z)
    followed = (z - v @ w) @ (v.mH @ probes) - v @ (z.mH @ probes)
    missed = _energy(image - followed)
    if is_small:
        return total, missed
    # The share of the step is known without probes: ‖Ω‖² = ‖Ω - Ω_k‖² + 2 ⟨Ω, Ω_k⟩ - ‖Ω_k‖².
    y = tangent_times(x, g, v)
    across = 2 * (y.conj() * z).real.double().sum(dim=(-2, -1))
    across = across - ((v.mH @ y).conj() * w).real.double().sum(dim=(-2, -1))
    return missed + 2 * across - 2 * _energy(z) + _energy(w), missed


def _energy(x: Tensor) -> Tensor:
    return x.abs().double().square().sum(dim=(-2, -1))
