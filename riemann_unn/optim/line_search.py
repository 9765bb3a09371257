"""A line search for the strong Wolfe conditions, on any curve whose velocity is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["DECREASE", "ROUNDINGS", "Found", "Trial", "strong_wolfe"]

T = TypeVar("T")

DECREASE, _FLATTER = 1e-4, 0.9
# Bounds of a step's growth in an extrapolation, and the least distance, relative to the bracket,
# from its ends in an interpolation.
_GROWTH, _MARGIN = (1.5, 10.0), 0.1
# Losses that differ by less than this many roundings of the largest one count as equal.
ROUNDINGS = 100.0


@dataclass(frozen=True)
class Trial(Generic[T]):
    """A loss and its derivative along the curve at a step, and the point there."""

    step: float
    value: float
    slope: float
    point: T | None = None

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.value) and math.isfinite(self.slope)


@dataclass(frozen=True)
class Found(Generic[T]):
    """Where a search ended.

    ``trial`` is None where it failed, and ``nearest`` then the trial closest to the start;
    ``risen`` is the closest of those at which the loss was higher by more than noise.
    """

    trial: Trial[T] | None
    nearest: Trial[T] | None
    risen: Trial[T] | None = None


def strong_wolfe(
    evaluate: Callable[[float], Trial[T]],
    *,
    value: float,
    slope: float,
    step: float,
    noise: float,
    max_evals: int = 25,
) -> Found[T]:
    r"""Find a step that lowers a loss enough and flattens its slope.

    .. math::

        f(t) \le f(0) + 10^{-4}\, t f'(0), \qquad |f'(t)| \le 0.9\, |f'(0)|

    Where the required decrease is below the rounding of the loss, a loss that does not rise is
    accepted. A trial that is not finite counts as too long a step. The loss at the result is never
    above ``value``.

    Args:
        evaluate: the loss at a step.
        value: :math:`f(0)`.
        slope: :math:`f'(0) < 0`.
        step: the first to try.
        noise: difference below which losses count as equal.
        max_evals: of the loss.

    Reference:
        Nocedal and Wright, "Numerical Optimization" (2006), algorithms 3.5 and 3.6, and equation
        3.59 for the cubic.
    """
    best: Trial[T] = Trial(0.0, value, slope)
    other: Trial[T] | None = None
    nearest: Trial[T] | None = None
    accepted: Trial[T] | None = None
    risen: Trial[T] | None = None
    for _ in range(max_evals):
        if not math.isfinite(step) or step <= 0 or step == best.step:
            break
        trial = evaluate(step)
        if nearest is None or trial.step < nearest.step:
            nearest = trial
        if trial.value > value + noise and (risen is None or trial.step < risen.step):
            risen = trial
        decrease = -DECREASE * step * slope
        low = trial.value <= (value - decrease if decrease > noise else value)
        if not trial.is_finite or not low or trial.value > best.value:
            other = trial
        elif abs(trial.slope) <= -_FLATTER * slope:
            return Found(trial, nearest)
        else:
            if trial.value < value - decrease:
                accepted = trial
            if trial.slope * (1 if other is None else other.step - best.step) >= 0:
                other = best
            before, best = best, trial
        step = _longer(before, best) if other is None else _between(best, other)
        # The possible decrease within the bracket is below rounding.
        if other is not None and abs(best.slope * (other.step - best.step)) <= noise / ROUNDINGS:
            break
    # Sufficient decrease alone is accepted if no trial met the curvature condition.
    return Found(accepted, nearest, risen)


def _longer(before: Trial[T], last: Trial[T]) -> float:
    """Extrapolate to the zero of the slope."""
    grown = last.slope - before.slope
    found = last.step - last.slope * (last.step - before.step) / grown if grown > 0 else math.inf
    return min(max(found, _GROWTH[0] * last.step), _GROWTH[1] * last.step)


def _between(best: Trial[T], other: Trial[T]) -> float:
    """Interpolate by a cubic, well inside the bracket."""
    width = other.step - best.step
    found = best.step + 0.5 * width
    if other.is_finite:
        mean = best.slope + other.slope - 3 * (best.value - other.value) / -width
        square = mean * mean - best.slope * other.slope
        if square >= 0:
            root = math.copysign(math.sqrt(square), width)
            divisor = other.slope - best.slope + 2 * root
            if divisor != 0:
                found = other.step - width * (other.slope + root - mean) / divisor
    else:
        found = best.step + _MARGIN * width
    low, high = sorted((best.step + _MARGIN * width, other.step - _MARGIN * width))
    return min(max(found, low), high) if math.isfinite(found) else best.step + 0.5 * width
