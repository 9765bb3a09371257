"""Retractions: a sketch with a φ, as values that can be compared, printed and stored.

A retraction maps a gradient at a point to the coordinates of a step: :class:`Directions`, the few
columns of a sketch, or :class:`Whole`, all of the Lie algebra. Both compute the Riemannian gradient
that a base optimizer sees, read the displacement that it wrote, and rotate the point by it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, get_args

import torch
from torch import Tensor

# Imported from the modules: autocast is off in a step, so that the public wrappers only cost time.
from .linalg.factor import length_of
from .linalg.maps import skew
from .linalg.step.core import Angle, Phi, check_phi
from .linalg.step.polish import newton_schulz_, polish_, polishes_at
from .linalg.step.products import times_columns
from .linalg.step.sketch import is_usual
from .linalg.step.tangent import (
    Draws,
    TangentMethod,
    iterate,
    next_directions,
    starts_by_planes,
    tangent_coordinates,
    tangent_directions,
    tangent_gradient,
    tangent_times,
)
from .linalg.step.update import (
    LargestAngle,
    PlaneGram,
    is_plane,
    plane_gram,
    rotate_low_rank_lazily_,
    rotate_whole_,
    rotation_factors_lazily,
)
from .scalars import plain_scalars

__all__ = ["Directions", "LargestAngle", "Randomness", "Retraction", "Tangent", "Whole"]


class Randomness(Draws, Protocol):
    """A source of random directions."""

    def generator(self) -> torch.Generator:
        """Return a generator, for sketches that draw from one."""


@dataclass(frozen=True)
class Retraction:
    r"""The map from a point and a gradient to the next point: a sketch with a φ.

    .. math:: X^+ = X\,\phi(-\mathrm{lr}\,\Omega_k), \qquad
        \Omega_k \approx \Omega = \tfrac12 (X^H G - G^H X)

    Args:
        phi: ``"exp"`` (projUNN-T), ``"polar"`` (projUNN-D), ``"cayley"``, or a function of angles.
        rank: k, the directions of a step; ``None`` for all.
        sketch: how directions are found, see :func:`riemann_unn.linalg.tangent_directions`.
        max_angle: the largest rotation angle of a step, in radians; ``None`` for no limit.

    Raises:
        ValueError: an unknown ``phi`` or ``sketch``, ``rank`` below 1, ``max_angle`` not positive.
    """

    phi: Phi | Angle
    rank: int | None = 1
    sketch: TangentMethod = "tangent"
    max_angle: float | None = None

    def __post_init__(self) -> None:
        check_phi(self.phi)
        if self.sketch not in get_args(TangentMethod):
            raise ValueError(
                f"sketch={self.sketch!r} is unknown; choose from {get_args(TangentMethod)}"
            )
        for name in ("rank", "max_angle"):  # users may set numpy scalars in groups
            object.__setattr__(self, name, plain_scalars(getattr(self, name)))
        if self.rank is not None and (
            isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1
        ):
            raise ValueError(
                f"rank={self.rank!r} must be an int of at least 1, or None for the whole update"
            )
        if self.max_angle is not None and not (
            isinstance(self.max_angle, (int, float)) and 0 < self.max_angle < math.inf
        ):
            raise ValueError(
                f"max_angle={self.max_angle!r} must be a positive number of radians, or None"
            )

    def is_whole_for(self, shape: torch.Size) -> bool:
        """Tell whether a step of ``(..., p, n)`` points, ``p <= n``, uses all directions."""
        p, n = shape[-2:]
        return self.rank is None or 2 * self.rank >= n or self.rank >= p

    @property
    def shows_nonfinite(self) -> bool:
        """Whether NaN or infinity anywhere in a gradient reaches the coordinates.

        The factorisations of the other sketches may fail on it, or return finite numbers.
        """
        return self.sketch not in ("svd", "column")

    def tangent(
        self,
        x: Tensor,
        g: Tensor,
        *,
        start: Tensor | None,
        source: Randomness,
        step: int = 0,
        is_cached: bool | None = None,
    ) -> Tangent:
        """Return the coordinates of a step at points.

        Args:
            x: points, shape ``(..., p, n)``, ``p <= n``.
            g: their Euclidean gradients.
            start: where to start a sketch, the adjoint of :meth:`Tangent.next_start`.
            source: of random directions.
            step: number of steps taken.
            is_cached: whether points fit in cache; by default, whether each matrix does.
        """
        if not self.is_whole_for(x.shape):
            rank, is_sketch = self.rank or 1, self.sketch == "tangent"
            if is_sketch:
                v, z, xv = iterate(x, g, rank=rank, start=start, draws=source, is_cached=is_cached)
            else:
                v, z, xv = tangent_directions(
                    x, g, rank=rank, method=self.sketch, generator=source.generator()
                )
            return Directions(self, v, z, xv, step, is_sketch)
        if x.shape[-2] == x.shape[-1]:
            return Whole(self, skew(x.mH @ g))
        # Products with the rows of X determine all of a thin Ω.
        v = x.mH.clone()
        xv = x @ v
        return Directions(self, v, tangent_times(x, g, v, xv), xv, step=step, is_sketch=False)


@dataclass(eq=False)
class Directions:
    """A step along a few directions v, whose coordinates are n by k.

    ``coordinates`` are those of the gradient, z = Ωv, and ``xv`` is X v, if it is known.
    """

    retraction: Retraction
    v: Tensor
    coordinates: Tensor
    xv: Tensor | None
    step: int
    is_sketch: bool
    # What a move that is a multiple of z adds to v.
    _added: Tensor | None = None
    _is_scaled: bool = False
    # What coordinates of one plane are to be multiplied with.
    _scale: float = 1.0
    # A move that has been measured, and its Gram matrix with v.
    _measured: tuple[Tensor, PlaneGram] | None = None

    def scaled(self, scale: float | Tensor) -> Tensor:
        """Return a multiple of the coordinates."""
        self._is_scaled = True
        if is_plane(self.coordinates) and not isinstance(scale, Tensor):
            self._scale = scale  # for :meth:`measured`
            return self.coordinates
        return self.coordinates * scale

    def measured(self, coordinates: Tensor) -> tuple[Tensor, float]:
        """Return the move of one point and its length, finite if the move is."""
        if not is_plane(coordinates):
            return coordinates, length_of(coordinates)
        scale = self._scale if coordinates is self.coordinates else 1.0
        gram = plane_gram(self.v, coordinates, scale=scale)
        length = abs(scale) * math.sqrt(gram.dd)
        if scale != 1.0 and not is_usual(length):  # may be affected by rounding or overflow
            return self.measured(coordinates * scale)
        self._measured = coordinates, gram
        return coordinates, length

    def gradient(self, x: Tensor, out: Tensor | None) -> Tensor:
        """Return the Riemannian gradient on these directions, for a base."""
        if self.xv is None:
            self.xv = times_columns(x, self.v)
        return tangent_gradient(x, self.v, self.coordinates, self.xv, out=out)

    def read(self, x: Tensor, delta: Tensor, *, clear: bool = False) -> Tensor:
        """Return the coordinates of a base's displacement; ``clear`` leaves zeros there."""
        return tangent_coordinates(x, delta, self.v, self.xv, clear=clear)

    def rotate_(self, x: Tensor, coordinates: Tensor) -> LargestAngle:
        """Rotate points in place; return a function that computes the largest angles."""
        if is_plane(coordinates) and (
            self._measured is None or self._measured[0] is not coordinates
        ):
            coordinates, _ = self.measured(coordinates)
        measured, self._measured = self._measured, None
        angle, added = rotate_low_rank_lazily_(
            x,
            self.v,
            coordinates,
            self.xv,
            gram=None if measured is None else measured[1],
            phi=self.retraction.phi,
            max_angle=self.retraction.max_angle,
            by_planes=starts_by_planes(self.step),
        )
        if self._is_scaled:
            self._added = added
        return angle

    def factors(self, x: Tensor, coordinates: Tensor) -> tuple[Tensor, Tensor, LargestAngle]:
        """Return thin factors of the change by :meth:`rotate_`, and the function for the angles."""
        basis, right, angle, added = rotation_factors_lazily(
            self.v,
            coordinates,
            phi=self.retraction.phi,
            max_angle=self.retraction.max_angle,
            by_planes=starts_by_planes(self.step),
        )
        if self._is_scaled:
            self._added = added
        return times_columns(x, basis.to(x.dtype)), right.to(x.dtype), angle

    def is_partial(self, x: Tensor) -> bool:
        """Tell whether there are fewer directions than rows of points."""
        return self.v.shape[-1] < x.shape[-2]

    def polish_(self, x: Tensor, *, step: int) -> None:
        """Correct rounding errors in points after a step."""
        tall = x if x.shape[-2] == x.shape[-1] else x.mH
        if self.v.shape[-1] < tall.shape[-1]:
            polish_(tall, step=step)
        else:
            newton_schulz_(tall)  # costs no more than the step itself

    def polishes_at(self, x: Tensor, *, step: int) -> bool:
        """Tell whether :meth:`polish_` does anything at a step."""
        return self.v.shape[-1] >= x.shape[-2] or polishes_at(x.shape[-2], step=step)

    def next_start(self) -> Tensor | None:
        """Return where the next sketch starts, ``(..., n, k)``."""
        if not self.is_sketch:
            return None
        if self._added is not None:
            return self._added
        by_planes = starts_by_planes(self.step)
        return next_directions(self.v, self.coordinates, by_planes=by_planes)


@dataclass(eq=False)
class Whole:
    """A step along all of the Lie algebra of square points; its coordinates are n by n."""

    retraction: Retraction
    coordinates: Tensor

    def scaled(self, scale: float | Tensor) -> Tensor:
        """Return a multiple of the coordinates, in their memory."""
        return self.coordinates.mul_(scale)

    def measured(self, coordinates: Tensor) -> tuple[Tensor, float]:
        """Return the move of one point and its length, finite if the move is."""
        return coordinates, length_of(coordinates)

    def gradient(self, x: Tensor, out: Tensor | None) -> Tensor:
        """Return the Riemannian gradient, for a base."""
        return self.coordinates if out is None else out.copy_(self.coordinates)

    def read(self, x: Tensor, delta: Tensor, *, clear: bool = False) -> Tensor:
        """Return the coordinates of a base's displacement; ``clear`` leaves zeros there."""
        coordinates = skew(delta)
        if clear:
            delta.zero_()
        return coordinates

    def rotate_(self, x: Tensor, coordinates: Tensor) -> None:
        """Rotate points in place."""
        phi, max_angle = self.retraction.phi, self.retraction.max_angle
        rotate_whole_(x, coordinates, phi=phi, max_angle=max_angle)

    def polish_(self, x: Tensor, *, step: int) -> None:
        """Do nothing: whole steps include the polish."""

    def polishes_at(self, x: Tensor, *, step: int) -> bool:
        """Return False: :meth:`polish_` does nothing."""
        return False

    def next_start(self) -> None:
        """Return None: nothing is sketched."""


Tangent = Directions | Whole
