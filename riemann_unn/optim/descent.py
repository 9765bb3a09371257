"""Descent: the iterations of L-BFGS on manifolds."""

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
from .coordinates import Coordinates, Point
from .line_search import DECREASE, ROUNDINGS, Trial, strong_wolfe

__all__ = ["Closure", "Descent", "Evaluation", "Memory", "loss_value"]

Closure = Callable[[], Any]
# Length of the first move, relative to the norm of the tagged parameters: an angle in radians.
_FIRST_ANGLE = 0.6


@dataclass
class Evaluation:
    """A point with the closure's loss and gradients there."""

    point: Point
    value: float
    gradient: Tensor
    grads: list[Tensor]


@dataclass
class Memory:
    """The state that is kept between iterations and steps."""

    n_iter: int = 0
    func_evals: int = 0
    length: float = math.nan  # of the last move
    scale: float = 0.0  # the largest absolute value of the loss so far
    steps: list[Tensor] = field(default_factory=list)
    changes: list[Tensor] = field(default_factory=list)


class Descent:
    """The iterations of one step."""

    def __init__(
        self, closure: Closure, c: Coordinates, memory: Memory, options: dict[str, Any]
    ) -> None:
        self._closure, self._c, self._options = closure, c, options
        self.memory, self.evals = memory, 0
        self.point = c.current_point()
        self.evaluation: Evaluation | None = None

    # Evaluations -------------------------------------------------------------

    def _evaluate(self, point: Point) -> tuple[Any, Evaluation]:
        """Move the parameters to a point, and evaluate the closure there."""
        self._c.write_(point)
        with torch.enable_grad():
            loss = self._closure()
        self.evals += 1
        value = loss_value(loss)
        grads = self._c.euclidean()
        gradient = self._c.gradient(point, grads)
        # Needed after the first iteration only; the next evaluation overwrites the gradients.
        grads = [g.clone() for g in grads] if self.memory.n_iter == 0 else []
        return loss, Evaluation(point, value, gradient, grads)

    def _accept(self, evaluation: Evaluation) -> None:
        # The point last: an interruption before that restores the previous one.
        self.evaluation, self.point = evaluation, evaluation.point

    # The iterations ------------------------------------------------------------

    def run_(self, keep: Callable[[Memory], None]) -> Any:
        """Iterate; return the first loss."""
        loss, evaluation = self._evaluate(self.point)
        if not math.isfinite(evaluation.value) or not bool(
            torch.isfinite(evaluation.gradient).all()
        ):
            raise NonFiniteError(
                f"the loss is {evaluation.value} or its gradient not finite at the point where the "
                "step begins; initialise the parameters again, or mend the loss. Nothing was "
                "changed"
            )
        self._accept(evaluation)
        m, options = self.memory, self._options
        m.scale = max(m.scale, abs(evaluation.value))
        begun = m.func_evals
        for _ in range(options["max_iter"] if self._c.size else 0):
            if float(evaluation.gradient.abs().max()) <= options["tolerance_grad"]:
                break
            found = self._iterate()
            if found is None:
                break
            move, change = found
            m.func_evals = begun + self.evals
            keep(m)
            assert self.evaluation is not None
            evaluation = self.evaluation
            least = options["tolerance_change"]
            if self.evals >= options["max_eval"] or move <= least or abs(change) < least:
                break
        m.func_evals = begun + self.evals
        keep(m)
        self._c.write_(self.point)
        return loss

    def _iterate(self) -> tuple[float, float] | None:
        """Take one iteration; return its largest move and change of the loss, None at the end."""
        assert self.evaluation is not None
        m, c, here = self.memory, self._c, self.evaluation
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
        there = trial.point
        assert there is not None
        t = trial.step
        move, old = c.project(there.point, [t * direction, here.gradient])[:2]
        self._add_pair(move, there.gradient - old)
        m.length = float(torch.linalg.vector_norm(move))
        m.scale = max(m.scale, abs(there.value))
        self._accept(there)
        if m.n_iter == 0 and self._options["line_search_fn"] is not None:
            self._try_concave(here, there)
        m.n_iter += 1
        return float(move.abs().max()), self.evaluation.value - here.value

    def _direction(self, here: Evaluation) -> Tensor:
        """Return -P H g. The pairs are not transported: on tangent vectors P H P is definite."""
        m = self.memory
        found = quasi_newton_direction(here.gradient, m.steps, m.changes)
        (found,) = self._c.project(here.point, [found])
        return found

    def _add_pair(self, move: Tensor, change: Tensor) -> None:
        """Add a pair to the memory if its curvature is positive."""
        m, size = self.memory, self._options["history_size"]
        if size > 0 and is_curved(move, change):
            # New lists, so that saved states do not change.
            m.steps = [*m.steps, move][-size:]
            m.changes = [*m.changes, change][-size:]

    def _first_step(self, here: Evaluation) -> float:
        """Return the step along the negative gradient, where no curvature is known."""
        m, size = self.memory, float(torch.linalg.vector_norm(here.gradient))
        length = m.length if m.n_iter else _FIRST_ANGLE * self._c.radius
        step = (length if length > 0 else 1.0) / size
        untagged = self._c.untagged(here.gradient)
        if m.n_iter == 0 and len(untagged) and bool(untagged.any()):
            # Their scale is unknown: the first step of torch's class.
            step = min(step, 1.0, 1 / float(untagged.abs().sum()))
        return step

    # Line searches -----------------------------------------------------------

    def _search(
        self, here: Evaluation, direction: Tensor, slope: float, step: float
    ) -> Trial[Evaluation] | None:
        curve = self._c.curve(here.point, direction)

        def evaluate(t: float) -> Trial[Evaluation]:
            _, evaluation = self._evaluate(curve.point(t))
            return Trial(
                t, evaluation.value, float(evaluation.gradient @ curve.velocity(t)), evaluation
            )

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
            # A small rise of the loss at a negative slope: the slope is not the derivative of the
            # loss.
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

    def _explain(
        self, here: Evaluation, nearest: Trial[Evaluation], noise: float, is_other: bool
    ) -> None:
        """Raise or warn with the cause, where no step along the negative gradient helps."""
        _, again = self._evaluate(here.point)
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

    def _try_concave(self, before: Evaluation, here: Evaluation) -> None:
        """Try the minimiser of the loss's linear part, if the loss was concave along the move."""
        curvature = size = 0.0
        for x, y, g, h in zip(
            before.point.values, here.point.values, before.grads, here.grads, strict=True
        ):
            step, change = y - x, h - g
            curvature += _inner(step, change)
            size += float(step.norm()) * float(change.norm())
        if curvature > 1e-12 * size:
            return
        point = self._c.closest_to_descent(here.point, here.grads)
        if point is None:
            return
        _, there = self._evaluate(point)
        predicted = sum(
            _inner(g, y - x)
            for g, x, y in zip(here.grads, here.point.values, point.values, strict=True)
        )
        is_finite = math.isfinite(there.value) and bool(torch.isfinite(there.gradient).all())
        if is_finite and there.value <= here.value + DECREASE * predicted:
            self.memory.steps, self.memory.changes = [], []
            self._accept(there)


def _inner(a: Tensor, b: Tensor) -> float:
    return float((a.conj() * b).sum().real) if a.is_complex() else float((a * b).sum())


def loss_value(loss: object) -> float:
    """Return a closure's loss as a float.

    Raises:
        ManifoldTypeError: it is no number.
    """
    try:
        return float(loss.detach() if isinstance(loss, Tensor) else loss)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        raise ManifoldTypeError(
            f"the closure returned {type(loss).__name__}, and L-BFGS needs the loss, one real "
            "number; end it with `return loss`. Parameters are where the last iteration left them"
        ) from None
