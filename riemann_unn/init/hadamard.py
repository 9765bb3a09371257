"""Hadamard matrices with random signs, written to parameters in place."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..errors import ManifoldError, ManifoldTypeError
from ..interruption import no_grad
from ..linalg import hadamard, hadamard_factors, nearest_hadamard_orders
from ..linalg.precision import in_full_precision
from ..manifolds import MatrixManifold, Stiefel
from ..parallel import local_part, scattered
from ..scalars import plain_scalars
from ..tagging import manifold_of, tagged_parameters

__all__ = ["hadamard_"]

T = TypeVar("T", Tensor, nn.Module)


@in_full_precision
@no_grad
def hadamard_(target: T, *, pattern: str | None = None, seed: int = 0) -> T:
    r"""Write Hadamard matrices with random signs, scaled to be orthogonal, in place.

    .. math:: X = \tfrac{1}{\sqrt n} H \operatorname{diag}(s), \qquad s_i = \pm 1

    with the Hadamard matrix H of order n that :func:`riemann_unn.linalg.hadamard` makes: every
    entry has the modulus :math:`1/\sqrt n`, so X spreads any one coordinate evenly over all, which
    takes outliers out of activations before quantisation. Each matrix of a batch, or block, has its
    own signs. Tall ones get p random columns of X, wide ones p random rows of :math:`X^T`, n being
    the longer side. Orders are those that Sylvester's doubling, Paley's two constructions from all
    finite fields, and their products give: of the multiples of 4 up to 1000 all but 55, 92 being
    the first missing one.

    Args:
        target: a parameter or tensor, tagged or not; or a module, of which all tagged parameters
            are written, or else those that ``pattern`` matches.
        pattern: glob over a module's parameter names, with or without a tag.
        seed: of the signs, drawn from a separate generator on the CPU, so that every process of a
            sharded model draws the same.

    Returns:
        ``target``.

    Raises:
        ManifoldError: nothing is tagged or matched, or there is no matrix of the order needed; the
            message names the nearest orders. Nothing is written then.
        ManifoldTypeError: the target is of another kind, or on a manifold of convolution kernels.

    Reference:
        Ashkboos et al., "QuaRot: outlier-free 4-bit inference in rotated LLMs" (2024); Paley, "On
        orthogonal matrices" (1933).
    """
    found = _tensors(target, pattern)
    shapes = [_matrices(name, x) for name, x in found]
    seed = plain_scalars(seed)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ManifoldTypeError(f"{seed=} must be an integer")
    generator = torch.Generator().manual_seed(seed)
    memories, values = [], []
    for (_, x), shape in zip(found, shapes, strict=True):
        if x.numel() > 0:
            manifold = manifold_of(x) or Stiefel()
            points = _drawn(shape, manifold.det, generator)
            point = manifold.from_matrices(points.to(x.dtype), x.shape).to(x.device)
            memories.append(local_part(x))
            values.append(scattered(point, x))
    if memories:
        torch._foreach_copy_(
            memories, values
        )  # one call, so that an interruption leaves all or none
    return target


def _tensors(target: object, pattern: str | None) -> list[tuple[str, Tensor]]:
    if isinstance(target, nn.Module):
        if pattern is None:
            found: list[tuple[str, Tensor]] = list(tagged_parameters(target))
            if not found:
                raise ManifoldError(
                    f"{type(target).__name__} has no tagged parameter; tag some with "
                    'riemann_unn.tag_, or say which are to be written, as in pattern="*.rotation"'
                )
            return found
        named = list(target.named_parameters())
        found = [(name, p) for name, p in named if fnmatchcase(name, pattern)]
        if not found:
            names = ", ".join(repr(name) for name, _ in named) or "none"
            raise ManifoldError(f"{pattern=} matches no parameter; the names are: {names}")
        return found
    if not isinstance(target, Tensor):
        raise ManifoldTypeError(
            f"a parameter, a tensor or a torch.nn.Module is needed, got a {type(target).__name__}"
        )
    if pattern is not None:
        raise ManifoldTypeError(f"{pattern=} chooses among a module's parameters; pass the module")
    return [("the target", target)]


def _matrices(name: str, x: Tensor) -> torch.Size:
    """Return the shape of the matrices of a tensor, after a check."""
    if isinstance(x, nn.parameter.UninitializedParameter):
        raise ManifoldTypeError(f"{name!r} has no shape yet; run the module once before")
    manifold: MatrixManifold = manifold_of(x) or Stiefel()
    if not manifold.views_memory:
        raise ManifoldTypeError(
            f"{name!r} is tagged {manifold!r}, and a Hadamard matrix is no convolution; use "
            'init="local" of the layers of riemann_unn.nn, or riemann_unn.init.warm_start_'
        )
    reason = manifold.why_not(x.shape, x.dtype)
    if reason is not None:
        raise ManifoldError(f"{name!r} cannot be made of Hadamard matrices: it {reason}")
    shape = manifold.to_matrices(torch.empty(x.shape, dtype=x.dtype, device="meta")).shape
    n = shape[-2]
    if x.numel() > 0 and hadamard_factors(n) is None:
        below, above = nearest_hadamard_orders(n)
        raise ManifoldError(
            f"{name!r} of shape {tuple(x.shape)} needs a Hadamard matrix of order {n}, and neither "
            f"Sylvester's nor Paley's constructions give one; the nearest orders are {below} and "
            f"{above}. Use torch.nn.init.orthogonal_ for other sizes. Nothing was written"
        )
    return shape


def _drawn(shape: torch.Size, det: int | None, generator: torch.Generator) -> Tensor:
    """Return matrices ``(..., n, p)`` with orthonormal columns, in double precision."""
    *batch, n, p = shape
    count = torch.Size(batch).numel()
    signs = 2 * torch.randint(2, (count, 1, n), generator=generator) - 1
    if det is not None:  # the determinant of H is positive for all orders but 2
        signs[:, :, 0] *= signs.prod(-1) * (-det if n == 2 else det)
    found: Tensor = hadamard(n) * signs.double() / n**0.5
    if p < n:
        columns = torch.stack([torch.randperm(n, generator=generator)[:p] for _ in range(count)])
        found = found.gather(-1, columns[:, None, :].expand(count, n, p))
    return found.reshape(shape)
