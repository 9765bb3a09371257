r"""The convex problem of rescaling, solved.

Parameter i reads channel :math:`b` and feeds channel :math:`a`; scaling channels by
:math:`e^{z/2}` changes its energy :math:`g_i` by :math:`e^{z_b - z_a}`. The problem is

.. math:: \min_z F(z), \qquad
    F(z) = n \log \sum_i g_i \, e^{(Bz)_i} - \sum_i (Bz)_i, \qquad (Bz)_i = z_b - z_a .

Only the matrix of a layer's energies is needed, and a gradient is two products of it with a
vector, because :math:`e^{z_b - z_a}` has rank one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .newton import ROUNDING, newton
from .problem import EnergyBlock, Problem, State, with_frozen
from .start import log_balanced, log_sum, rescaled, spread
from .sweeps import cycle

__all__ = ["Rescaling", "balance_energies"]

_CYCLES = 40  # contraction is a thousandfold per cycle for dense layers
_STALLED = 0.25  # contraction from which Newton's method is the faster one
_SLOW = 0.5  # contraction of a step of Newton's method from which a sweep follows
_NEWTON = 60
_UNBALANCED = 30.0  # logarithm of a ratio of energies from which a start is computed
_SPREAD = 30.0  # of logarithms of energies, up to which no path is needed
_COOLING, _PATH_TOL = 3.0, 1e-2  # factor between temperatures, and tolerance on the way


@dataclass(frozen=True)
class Rescaling:
    """The minimiser that :func:`balance_energies` found.

    Attributes:
        z: float64 ``(channels,)``, logarithms of squared scales.
        before: objective at zero.
        after: objective at ``z``, above ``before`` by rounding at most.
        gradient: largest entry of the gradient, each relative to the sum of magnitudes of its
            terms.
        iterations: sweeps over all layers, and Newton steps.
        converged: whether ``gradient`` is within the tolerance.
        unscaled: bool ``(channels,)``, frozen channels and those without energy on one side.
    """

    z: Tensor
    before: float
    after: float
    gradient: float
    iterations: int
    converged: bool
    unscaled: Tensor


def balance_energies(
    blocks: Sequence[EnergyBlock],
    channels: int,
    *,
    linear: bool = True,
    tol: float = 1e-9,
    frozen: Tensor | None = None,
    origin: Tensor | None = None,
) -> Rescaling:
    r"""Minimise :math:`F` over the logarithms z of the squared scales of channels.

    Layer after layer, all channels of a layer are minimised over at once, exactly: for a given sum
    S of energies each has a quadratic equation, and S is the root of one scalar equation. Before
    each such sweep the sizes of whole layers are minimised over together, a problem with one
    unknown for each layer. If sweeps do not contract, which happens when channels of one layer
    depend on each other, Newton's method with conjugate gradients finishes.

    Energies that differ by many orders of magnitude are first balanced by :func:`log_balanced`, and
    the iteration is relative to that.

    Args:
        blocks: the energies, layer by layer.
        channels: how many channels can be scaled.
        linear: without it the second sum of F is left out, and minimised is the sum of energies;
            its logarithm is reported.
        tol: relative size of the gradient to stop at.
        frozen: bool ``(channels,)``, channels to leave unscaled.
        origin: float64 ``(channels,)``, the z at which the energies are given, zero if left out.
            What is returned is relative to zero, whatever the origin.

    Returns:
        The minimiser. Channels without incoming or outgoing energy, for which there is no minimum,
        keep z = 0. If no point better than z = 0 was found, z = 0 is returned, not converged.

    Raises:
        ValueError: an energy is NaN or infinite.

    Reference:
        Lebeurrier, Vayer, Gribonval, "Path-conditioned training" (2026), for the problem and the
        quadratic equation of one neuron.
    """
    frame = _Frame(blocks, channels, linear)
    if origin is not None:
        frame.base[:-1] = origin
    state = frame.start()
    unscaled = ((state.incoming <= 0) | (state.outgoing <= 0))[:-1]
    if frozen is not None:
        unscaled |= frozen
    if bool(unscaled.any()):
        state = frame.freeze(unscaled)
    before = frame.at_zero(state)
    if bool(unscaled.all()) or before == -math.inf:
        return Rescaling(torch.zeros_like(state.z[:-1]), before, before, 0.0, 0, True, unscaled)
    iterations = 0
    if not _ill_scaled(state):
        state, iterations = _iterate(frame.problem, state, tol)
    found = frame.result(state, before, iterations, tol, unscaled)
    if not found.converged:
        state, more = _from_ill_scaled(frame, tol)
        other = frame.result(state, before, iterations + more, tol, unscaled)
        found = other if other.converged or other.after <= found.after else found
    return found


def _from_ill_scaled(frame: _Frame, tol: float) -> tuple[State, int]:
    """Solve from a start in logarithms, along a path if the energies still are far apart.

    For energies to the power 1 / T the problem is the same with its exponentials smoothed,
    F_T(z) = n T log sum exp((log g + Bz) / T) - sum Bz at z = T w, and its solution for large T is
    the one of least squares. T falls to one, each solution being the start of the next.
    """
    state = frame.move(log_balanced(frame.problem.blocks, frame.problem.channels))
    temperature, iterations = spread(frame.problem.blocks) / _SPREAD, 0
    while temperature > 1:
        powers = [
            EnergyBlock(b.energy ** (1 / temperature), b.feeds, b.reads, b.count)
            for b in frame.problem.blocks
        ]
        smooth = Problem(powers, frame.problem.channels, frame.problem.linear)
        start = smooth.at(torch.zeros_like(frame.base))
        found, count = _iterate(smooth, start, _PATH_TOL, 10, 10)
        state = frame.move(temperature * found.z[:-1])
        iterations += count
        temperature /= _COOLING
    state, count = _iterate(frame.problem, state, tol)
    return state, iterations + count


class _Frame:
    """The problem relative to a base point: energies there, divided by a common factor.

    Attributes:
        problem: the problem of the energies as they are at ``base``.
        base: ``(channels + 1,)``, the point, zero in the last place.
        unit: logarithm of the factor that the energies were divided by.
    """

    def __init__(self, blocks: Sequence[EnergyBlock], channels: int, linear: bool) -> None:
        self.problem = Problem(blocks, channels, linear)
        self.base, self.unit = torch.zeros(channels + 1, dtype=torch.float64), 0.0

    def start(self) -> State:
        """The state at the base; where its sums overflow, energies are divided first."""
        state = self.problem.at(torch.zeros_like(self.base))
        if math.isfinite(state.total):
            return state
        for k, block in enumerate(self.problem.blocks):
            if not bool(torch.isfinite(block.energy).all()):
                raise ValueError(f"the energies of block {k} hold NaN or infinity")
        return self.move(torch.zeros_like(self.base[:-1]))

    def move(self, z: Tensor) -> State:
        """Make the point z, relative to the base, the new base."""
        z = torch.cat([z, z.new_zeros(1)])
        blocks, peak = rescaled(self.problem.blocks, z)
        self.problem = Problem(blocks, self.problem.channels, self.problem.linear)
        self.base, self.unit = self.base + z, self.unit + peak
        return self.problem.at(torch.zeros_like(z))

    def freeze(self, unscaled: Tensor) -> State:
        """Freeze channels at z = 0, whatever the base."""
        if bool(self.base[:-1][unscaled].any()):
            self.move(-self.base[:-1].where(unscaled, 0.0))
        blocks = with_frozen(self.problem.blocks, unscaled)
        self.problem = Problem(blocks, self.problem.channels, self.problem.linear)
        return self.problem.at(torch.zeros_like(self.base))

    def at_zero(self, state: State) -> float:
        """The objective at z = 0, given the state at the base."""
        n = self.problem.n
        if not bool(self.base.any()):
            return state.objective + n * self.unit
        return n * (log_sum(self.problem.blocks, -self.base) + self.unit)

    def result(
        self, state: State, before: float, iterations: int, tol: float, unscaled: Tensor
    ) -> Rescaling:
        """The solution, or the start if that is better."""
        z, n = self.base + state.z, self.problem.n
        linear = float(self.problem.slope @ self.base)
        after = state.objective + n * self.unit - linear
        rounding = ROUNDING * (n * (1 + abs(self.unit)) + abs(linear) + abs(before))
        if after <= before + rounding and bool(torch.isfinite(z).all()):
            after, converged = min(before, after), state.error <= tol
            return Rescaling(z[:-1], before, after, state.error, iterations, converged, unscaled)
        start = self.move(-self.base[:-1])
        return Rescaling(
            torch.zeros_like(z[:-1]), before, before, start.error, iterations, False, unscaled
        )


def _ill_scaled(state: State) -> bool:
    """Whether the incoming and outgoing energies of a channel differ by orders of magnitude."""
    ratio = (state.incoming / state.outgoing)[:-1].log().abs()
    ratio = ratio.where((state.incoming > 0)[:-1] & (state.outgoing > 0)[:-1], 0.0)
    return not float(ratio.max()) <= _UNBALANCED


def _iterate(
    problem: Problem, state: State, tol: float, cycles: int = _CYCLES, steps: int = _NEWTON
) -> tuple[State, int]:
    """Cycles while they contract, then Newton's method."""
    iterations = 0
    while not state.error <= tol and iterations < cycles:
        new = cycle(problem, state)
        iterations += 1
        stalled = not new.error < _STALLED * state.error
        if not _no_worse(problem, new, state):
            break
        state = new
        if stalled and iterations > 2:
            break
    for _ in range(steps):
        if state.error <= tol:
            break
        step = newton(problem, state)
        if step is None or not step.error < _SLOW * state.error:
            # Newton's method moves all channels together, sweeps each one exactly.
            last = state if step is None else step
            swept = cycle(problem, last)
            if step is None or swept.error < step.error:
                step = swept if _no_worse(problem, swept, last) else step
        if step is None or (step.error >= state.error and step.objective >= state.objective):
            break
        state = step
        iterations += 1
    return state, iterations


def _no_worse(problem: Problem, new: State, old: State) -> bool:
    """Whether the objective fell, or the gradient where rounding hides the objective."""
    if new.objective <= old.objective:
        return True
    rounding = ROUNDING * (problem.n + abs(old.objective))
    return new.error < old.error and new.objective <= old.objective + rounding
