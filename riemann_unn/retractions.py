"""Retractions: a sketch with a φ, as a value that can be compared, printed and stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from .linalg import (
    Phi,
    SketchMethod,
    newton_schulz_,
    orthonormal_rows,
    retract_low_rank_,
    rotate_by,
    sketch,
    skew,
)
from .linalg.products import CACHED

__all__ = ["Retraction"]

# Of what stays in cache more rounds find nine tenths of the best energy, also between gradients
# that differ much.
_ROUNDS = 3


@dataclass(frozen=True)
class Retraction:
    r"""The map from a point and a displacement to the next point: a sketch with a φ.

    .. math:: \Delta \approx A B^H, \qquad
        X^+ = \bigl(I + Q (\phi(Q^H A\,(XB)^H Q) - I) Q^H\bigr) X

    Args:
        phi: ``"exp"`` (projUNN-T), ``"polar"`` (projUNN-D) or ``"cayley"``.
        rank: k, the columns of A and B; ``None`` uses the whole displacement.
        sketch: how A and B are found, see :func:`riemann_unn.linalg.sketch`.

    Raises:
        ValueError: an unknown ``phi`` or ``sketch``, or ``rank`` below 1.
    """

    phi: Phi
    rank: int | None = 1
    sketch: SketchMethod = "power"

    def __post_init__(self) -> None:
        if self.phi not in get_args(Phi):
            raise ValueError(f"phi={self.phi!r} is unknown; choose from {get_args(Phi)}")
        if self.sketch not in get_args(SketchMethod):
            raise ValueError(
                f"sketch={self.sketch!r} is unknown; choose from {get_args(SketchMethod)}"
            )
        if self.rank is not None and (
            isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1
        ):
            raise ValueError(
                f"rank={self.rank!r} must be an int of at least 1, or None for the whole update"
            )

    def is_dense_for(self, shape: torch.Size) -> bool:
        """Tell whether the sketch of an ``(n, p)`` displacement is the displacement itself."""
        return self.rank is None or self.rank >= min(shape[-2:])

    @property
    def shows_nonfinite(self) -> bool:
        """Whether not-a-number or infinity anywhere in a displacement reaches the factor A.

        The other sketches use factorisations that fail on it, or lie.
        """
        return self.sketch not in ("svd", "column")

    @property
    def is_intrinsic(self) -> bool:
        """Whether displacements of square matrices are coordinates in the Lie algebra."""
        return self.rank is None and self.phi != "polar"

    def is_intrinsic_for(self, shape: torch.Size) -> bool:
        r"""Tell whether displacements of such matrices are coordinates in the Lie algebra.

        They are for whole steps of square matrices by the exponential or Cayley
        map, :math:`X^+ = X\,\phi(\Omega)` with skew-Hermitian Ω: there coordinates
        mean the same at every point, so the base's momentum needs no transport.
        """
        return self.is_intrinsic and shape[-1] == shape[-2]

    def pull_back(self, x: Tensor, grad: Tensor) -> Tensor:
        r"""Return the gradient in those coordinates, :math:`\operatorname{skew}(X^H G)`."""
        return skew(x.mH @ grad)

    def rounds_for(self, numel: int) -> int:
        """Return the rounds of the sketch of a displacement of so many numbers."""
        return _ROUNDS if numel <= CACHED else 1

    def factor(
        self,
        delta: Tensor,
        *,
        start: Tensor | None,
        generator: torch.Generator,
        rounds: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return A and B of shape ``(..., n, k)`` and ``(..., p, k)``."""
        return sketch(
            delta,
            rank=max(min(delta.shape[-2:]), 1) if self.rank is None else self.rank,
            method=self.sketch,
            start=start,
            generator=generator,
            rounds=self.rounds_for(delta.numel()) if rounds is None else rounds,
        )

    def next_start(self, a: Tensor, *, length: Tensor | None = None) -> Tensor | None:
        """Return the rows ``(..., k, n)`` that start the sketch of the next displacement.

        The Frobenius norm of ``a`` may be given if it is known.
        """
        if self.sketch != "power":
            return None
        return orthonormal_rows(a.mH, length=length)

    def apply_(self, x: Tensor, a: Tensor, b: Tensor, *, special: bool) -> Tensor:
        """Move ``x``, shape ``(..., n, p)``, in place."""
        if self.is_intrinsic_for(x.shape):
            # One Newton-Schulz step mends the point, the map and the product of both.
            return newton_schulz_(x.copy_(rotate_by(x, a, phi=self.phi)))
        return retract_low_rank_(x, a, b, phi=self.phi, special=special)
