"""Newton steps over all channels, for problems on which sweeps contract too slowly."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .problem import Problem, State

__all__ = ["ROUNDING", "newton"]

_CG = 300
_NEAR = 1e-3  # ratio from which whole steps converge
_REACH = 10.0  # the largest step in z
_FLAT = 1e-13  # curvature relative to the diagonal's, below which it is rounding
_DENSE = 1000  # channels up to which a factorisation costs little
_UNEVEN = 1e-6
ROUNDING = 1e-13
"""Of the objective, relative to the terms that it is the sum of."""


def newton(problem: Problem, state: State) -> State | None:
    """One Newton step by conjugate gradients; None if no decrease above rounding is possible."""
    return _on_objective(problem, state) if problem.linear else _on_ratios(problem, state)


def _on_objective(problem: Problem, state: State) -> State | None:
    rate = problem.n / state.total
    d = state.outgoing - state.incoming
    diagonal = rate * (state.outgoing + state.incoming - d.square() / state.total)
    diagonal = diagonal.clamp_min(1e-14 * float(diagonal[:-1].max()))
    laplacian = _laplacian(problem, state)

    def hessian(v: Tensor) -> Tensor:
        result = rate * (laplacian(v) - d * float(d @ v) / state.total)
        result[-1] = 0.0
        return result

    step = _conjugate_gradients(hessian, -state.gradient, diagonal, min(0.1, state.error))
    step, t = _within_reach(step), 1.0
    slope = float(state.gradient @ step)
    rounding = ROUNDING * (problem.n + abs(state.objective))
    while t > 1e-8:
        new = problem.at(state.z + t * step)
        lower = new.objective <= state.objective + 1e-4 * t * slope
        # Near the minimum the gradient is more accurate than the objective.
        hidden = -t * slope <= rounding and new.objective <= state.objective + rounding
        flatter = abs(float(new.gradient @ step)) <= 0.5 * abs(slope) and new.error < state.error
        if flatter if hidden else lower:
            return new
        t /= 2
    return None


def _on_ratios(problem: Problem, state: State) -> State | None:
    """The step on log(outgoing / incoming) of each channel, which is zero at the minimum.

    Channels of little energy vanish in the sum of energies, but not in their own ratio.
    """
    old, step = _largest_ratio(state), _step_on_ratios(problem, state)
    slope, rounding = float(state.gradient @ step), ROUNDING * (1 + abs(state.objective))
    t = 1.0
    while t > 1e-3:
        new = problem.at(state.z + t * step)
        visible = -t * slope > rounding
        lower = visible and new.objective <= state.objective + 1e-4 * t * slope
        if lower or _largest_ratio(new) <= (1 - 0.1 * t) * old:
            return new
        if t == 1.0 and old < _NEAR:
            # Along a flat direction the step is long, and its second-order error elsewhere may
            # exceed the decrease. The following steps correct it.
            for _ in range(4):
                new = problem.at(new.z + _step_on_ratios(problem, new))
                if _largest_ratio(new) <= 0.5 * old:
                    return new
        t /= 2
    return None


def _step_on_ratios(problem: Problem, state: State) -> Tensor:
    size = (state.outgoing + state.incoming).clamp_min(1e-300)
    right = -size * _ratio(state) / 2
    # Inner products lose channels of little energy, a factorisation does not.
    uneven = float(size[:-1].min()) < _UNEVEN * float(size[:-1].max())
    step = _direct(problem, state, size, right) if uneven and len(size) <= _DENSE else None
    if step is None:
        laplacian = _laplacian(problem, state)

        def hessian(v: Tensor) -> Tensor:
            result = laplacian(v)
            result[-1] = 0.0
            return result

        step = _conjugate_gradients(hessian, right, size, min(0.1, state.error))
    return _within_reach(step)


def _direct(problem: Problem, state: State, size: Tensor, right: Tensor) -> Tensor | None:
    """The same step by a factorisation; None if the matrix has none."""
    flows = torch.zeros(len(size), len(size), dtype=torch.float64)
    scale = size.rsqrt()
    for block in problem.blocks:
        rows = (-state.z[block.feeds]).exp() * scale[block.feeds]
        columns = state.z[block.reads].exp() * scale[block.reads]
        place = (block.feeds.unsqueeze(-1), block.reads.unsqueeze(-2))
        flow = block.energy * rows.unsqueeze(-1) * columns.unsqueeze(-2)
        flows.index_put_(place, flow, accumulate=True)
    # Directions in which only rounding is left are limited.
    matrix = ((state.outgoing + state.incoming) / size + 1e-14).diag() - flows - flows.mT
    factor, failed = torch.linalg.cholesky_ex(matrix[:-1, :-1])
    if int(failed):
        return None
    solved = torch.cholesky_solve((right * scale)[:-1].unsqueeze(-1), factor).squeeze(-1)
    return torch.cat([solved, solved.new_zeros(1)]) * scale


def _ratio(state: State) -> Tensor:
    """The logarithm of each channel's outgoing energy divided by its incoming energy."""
    passed = (state.outgoing > 0) & (state.incoming > 0)
    ratio = (state.outgoing.log() - state.incoming.log()).where(passed, 0.0)
    ratio[-1] = 0.0
    return ratio


def _within_reach(step: Tensor) -> Tensor:
    return step * min(1.0, _REACH / max(float(step.abs().max()), 1e-300))


def _largest_ratio(state: State) -> float:
    return float(_ratio(state).abs().max())


def _laplacian(problem: Problem, state: State) -> Callable[[Tensor], Tensor]:
    """The Hessian of the sum of energies."""

    def product(v: Tensor) -> Tensor:
        result = (state.outgoing + state.incoming) * v
        for block in problem.blocks:
            rows, columns = (-state.z[block.feeds]).exp(), state.z[block.reads].exp()
            into = torch.bmm(block.energy, (columns * v[block.reads]).unsqueeze(-1)).squeeze(-1)
            out = torch.bmm((rows * v[block.feeds]).unsqueeze(-2), block.energy).squeeze(-2)
            result.index_add_(0, block.feeds.reshape(-1), -(rows * into).reshape(-1))
            result.index_add_(0, block.reads.reshape(-1), -(columns * out).reshape(-1))
        return result

    return product


def _conjugate_gradients(
    operator: Callable[[Tensor], Tensor], b: Tensor, diagonal: Tensor, accuracy: float
) -> Tensor:
    """Solve a positive semidefinite system, preconditioned by a diagonal."""
    x, r = torch.zeros_like(b), b.clone()
    y = r / diagonal
    p, size = y.clone(), float(r @ y)
    stop, largest = accuracy**2 * size, accuracy * float(y.abs().max())
    for _ in range(_CG):
        image = operator(p)
        curvature = float(p @ image)
        if not curvature > _FLAT * float(p @ (diagonal * p)):
            # No curvature up to rounding: as far as the line search allows.
            return x + _REACH / max(float(p.abs().max()), 1e-300) * p
        x += size / curvature * p
        r -= size / curvature * image
        y = r / diagonal
        last, size = size, float(r @ y)
        if size <= stop and float(y.abs().max()) <= largest:
            break
        p = y + size / last * p
    return x
