"""Descent: the iterations of L-BFGS, from point to point of a manifold."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import LineSearchError, ManifoldTypeError, NonFiniteError
from ..linalg.quasi_newton import is_curved, quasi_newton_direction
from .coordinates import Coordinates, Place
from .line_search import DECREASE, ROUNDINGS, Trial, strong_wolfe

__all__ = ["Closure", "Descent", "Memory", "Visit", "loss_value"]

Closure = Callable[[], Any]
# The first move is this share of the norm of the tagged parameters, which is a turn in radians.
_FIRST_TURN = 0.6


@dataclass
class Visit:
    """A point, and what the closure has said of it."""

    place: Place
    value: float
    gradient: Tensor
    grads: list[Tensor]


@dataclass
class Memory:
    """What is kept between iterations, and between steps."""

    n_iter: int = 0
    func_evals: int = 0
    length: float = math.nan  # of the last move
    scale: float = 0.0  # the largest loss in size
    steps: list[Tensor] = field(default_factory=list)
    changes: list[Tensor] = field(default_factory=list)


class Descent:
    """The iterations of one step."""

    def __init__(
        self, closure: Closure, c: Coordinates, memory: Memory, options: dict[str, Any]
    ) -> None:
        self._closure, self._c, self._options = closure, c, options
        self.memory, self.evals = memory, 0
        self.place = c.here()
        self.visit: Visit | None = None

    # Evaluations -------------------------------------------------------------

    def _ask(self, place: Place) -> tuple[Any, Visit]:
        """Move the parameters to a place, and evaluate the closure there."""
        self._c.write_(place)
        with torch.enable_grad():
            loss = self._closure()
        self.evals += 1
        value = loss_value(loss)
        grads = self._c.euclidean()
        gradient = self._c.gradient(place, grads)
        # Looked at again after the first iteration only, when others have been written there.
        grads = [g.clone() for g in grads] if self.memory.n_iter == 0 else []
        return loss, Visit(place, value, gradient, grads)

    def _take(self, visit: Visit) -> None:
        # The place last: until then an interruption goes back to the one before.
        self.visit, self.place = visit, visit.place

    # The iterations ------------------------------------------------------------

    def run_(self, keep: Callable[[Memory], None]) -> Any:
        """Iterate; return the first loss."""
        loss, visit = self._ask(self.place)
        if not math.isfinite(visit.value) or not bool(torch.isfinite(visit.gradient).all()):
            raise NonFiniteError(
                f"the loss is {visit.value} or its gradient not finite at the point where the step "
                "begins; initialise the parameters again, or mend the loss. Nothing was changed"
            )
        self._take(visit)
        m, options = self.memory, self._options
        m.scale = max(m.scale, abs(visit.value))
        begun = m.func_evals
        for _ in range(options["max_iter"] if self._c.size else 0):
            if float(visit.gradient.abs().max()) <= options["tolerance_grad"]:
                break
            found = self._iterate()
            if found is None:
                break
            move, change = found
            m.func_evals = begun + self.evals
            keep(m)
            assert self.visit is not None
            visit = self.visit
            least = options["tolerance_change"]
            if self.evals >= options["max_eval"] or move <= least or abs(change) < least:
                break
        m.func_evals = begun + self.evals
        keep(m)
        self._c.write_(self.place)
        return loss

    def _iterate(self) -> tuple[float, float] | None:
        """Take one iteration; return its largest move and change of the loss, None at the end."""
        assert self.visit is not None
        m, c, here = self.memory, self._c, self.visit
        direction = self._direction(here)
        slope = float(here.gradient @ direction)
        if not slope < 0:
            m.steps, m.changes = [], []
            direction = -here.gradient
            slope = -float(here.gradient @ here.gradient)
            if not slope < 0:
                return None
        step = float(self._options["lr"]) * (1.0 if m.steps else self._first_step(here))
        trial = self._search(here, direction, slope, step)
        if trial is None:
            if not m.steps or self._is_at_rounding:
                return None
            m.steps, m.changes = [], []
            return self._iterate()
        there = trial.place
        assert there is not None
        t = trial.step
        move, old = c.project(there.place, [t * direction, here.gradient])[:2]
        self._learn(move, there.gradient - old)
        m.length = float(torch.linalg.vector_norm(move))
        m.scale = max(m.scale, abs(there.value))
        self._take(there)
        if m.n_iter == 0 and self._options["line_search_fn"] is not None:
            self._try_concave(here, there)
        m.n_iter += 1
        return float(move.abs().max()), self.visit.value - here.value

    def _direction(self, here: Visit) -> Tensor:
        """Return -P H g, of pairs that stay as they were found: on tangents P H P is definite."""
        m = self.memory
        found = quasi_newton_direction(here.gradient, m.steps, m.changes)
        (found,) = self._c.project(here.place, [found])
        return found

    def _learn(self, move: Tensor, change: Tensor) -> None:
        """Add a pair to the memory, if the gradient has grown along the move."""
        m, size = self.memory, self._options["history_size"]
        if size > 0 and is_curved(move, change):
            # New lists: what is saved already stays as it is.
            m.steps = [*m.steps, move][-size:]
            m.changes = [*m.changes, change][-size:]

    def _first_step(self, here: Visit) -> float:
        """Return the step along the negative gradient, where no curvature is known."""
        m, size = self.memory, float(torch.linalg.vector_norm(here.gradient))
        length = m.length if m.n_iter else _FIRST_TURN * self._c.radius
        step = (length if length > 0 else 1.0) / size
        free = self._c.free(here.gradient)
        if m.n_iter == 0 and len(free) and bool(free.any()):
            # Nothing is known of their scale: as torch's class begins.
            step = min(step, 1.0, 1 / float(free.abs().sum()))
        return step

    # Line searches -----------------------------------------------------------

    def _search(
        self, here: Visit, direction: Tensor, slope: float, step: float
    ) -> Trial[Visit] | None:
        line = self._c.curve(here.place, direction)

        def evaluate(t: float) -> Trial[Visit]:
            _, visit = self._ask(line.point(t))
            return Trial(t, visit.value, float(visit.gradient @ line.velocity(t)), visit)

        if self._options["line_search_fn"] is None:
            trial = evaluate(step)
            if not trial.is_finite:
                raise NonFiniteError(
                    f"the loss is {trial.value} or its gradient not finite after a step of "
                    f"lr={self._options['lr']}; lower it, or pass line_search_fn='strong_wolfe'. "
                    "Parameters are where the iteration before left them"
                )
            return trial
        noise = self._noise()
        found = strong_wolfe(evaluate, value=here.value, slope=slope, step=step, noise=noise)
        self._is_at_rounding = False
        if found.trial is None:
            nearest, risen = found.nearest, found.risen
            # A loss that has risen a little while its slope says that it falls has another slope.
            is_other = (
                risen is not None
                and risen.value - here.value <= ROUNDINGS * noise
                and risen.slope < 0.5 * slope
                and -risen.slope * risen.step > 0.5 * noise
            )
            near = nearest is None or abs(nearest.value - here.value) <= noise
            self._is_at_rounding = near and not is_other
            if not self._is_at_rounding and not self.memory.steps and nearest is not None:
                self._explain(here, nearest, noise, is_other)
        return found.trial

    _is_at_rounding = False

    def _noise(self) -> float:
        return ROUNDINGS * torch.finfo(self._c.dtype).eps * self.memory.scale

    def _explain(self, here: Visit, nearest: Trial[Visit], noise: float, is_other: bool) -> None:
        """Say why no step along the negative gradient lowers the loss, if not that it is least."""
        _, again = self._ask(here.place)
        if not nearest.is_finite:
            raise NonFiniteError(
                "the loss or its gradient is not finite at every step from here, down to "
                f"{nearest.step:.0e}; mend the loss, or begin elsewhere. Parameters are where the "
                "last iteration left them"
            )
        if not abs(again.value - here.value) <= noise:
            raise LineSearchError(
                f"no step lowers the loss, which was {here.value:.6g} and now is {again.value:.6g} "
                "at the same point: it changes from call to call, as with mini-batches or dropout. "
                "Use all data and eval mode, or a stochastic optimizer such as ProjUNNT. "
                "Parameters are where the last iteration left them"
            )
        if is_other:
            warnings.warn(
                "LBFGS: the loss rises where its gradient says that it falls, so the gradient is "
                "not that of the loss that the closure returns. Nothing was changed",
                stacklevel=2,
            )

    def _try_concave(self, before: Visit, here: Visit) -> None:
        """Try where the linear part of the loss is least, if it was concave so far."""
        bend = size = 0.0
        for x, y, g, h in zip(
            before.place.values, here.place.values, before.grads, here.grads, strict=True
        ):
            step, change = y - x, h - g
            bend += _inner(step, change)
            size += float(step.norm()) * float(change.norm())
        if bend > 1e-12 * size:
            return
        place = self._c.closest_to_descent(here.place, here.grads)
        if place is None:
            return
        _, there = self._ask(place)
        fall = sum(
            _inner(g, y - x)
            for g, x, y in zip(here.grads, here.place.values, place.values, strict=True)
        )
        is_finite = math.isfinite(there.value) and bool(torch.isfinite(there.gradient).all())
        if is_finite and there.value <= here.value + DECREASE * fall:
            self.memory.steps, self.memory.changes = [], []
            self._take(there)


def _inner(a: Tensor, b: Tensor) -> float:
    return float((a.conj() * b).sum().real) if a.is_complex() else float((a * b).sum())


def loss_value(loss: object) -> float:
    """Return the number that a closure returned.

    Raises:
        ManifoldTypeError: it is none.
    """
    try:
        return float(loss.detach() if isinstance(loss, Tensor) else loss)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        raise ManifoldTypeError(
            f"the closure returned {type(loss).__name__}, and L-BFGS needs the loss, one real "
            "number; end it with `return loss`. Parameters are where the last iteration left them"
        ) from None
