r"""The convex problem of rescaling: how much to scale each channel so that energies are balanced.

Parameter i reads channel :math:`b` and feeds channel :math:`a`; scaling channels by
:math:`e^{z/2}` changes its energy :math:`g_i` by :math:`e^{z_b - z_a}`. The problem is

.. math:: \min_z F(z), \qquad
    F(z) = n \log \sum_i g_i \, e^{(Bz)_i} - \sum_i (Bz)_i, \qquad (Bz)_i = z_b - z_a .

Nothing is needed of a layer but the matrix of its energies, and a gradient is two products of that
matrix with a vector, because :math:`e^{z_b - z_a}` has rank one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["EnergyBlock", "Rescaling", "balance_energies"]

_CYCLES = 40  # contraction is a thousandfold per cycle for dense layers
_STALLED = 0.25  # contraction from which Newton's method is the faster one
_NEWTON, _CG = 60, 300
_QUADRATIC = 1e-9  # decrease, relative to n, below which Newton's method needs no line search


@dataclass(frozen=True)
class EnergyBlock:
    """The energies of the parameters of one layer.

    Attributes:
        energy: float64 ``(batch, rows, columns)``, nonnegative, for instance of a grouped
            convolution; summed over parameters that feed and read the same channels.
        gain: int64 ``(batch, rows)``, the channel each row feeds; a fixed one has the number
            that follows the last channel.
        loss: int64 ``(batch, columns)``, the channel each column reads, likewise.
        count: how many parameters are summed in each entry.
    """

    energy: Tensor
    gain: Tensor
    loss: Tensor
    count: int = 1


@dataclass(frozen=True)
class Rescaling:
    """The minimiser that :func:`balance_energies` found.

    Attributes:
        z: float64 ``(channels,)``, logarithms of squared scales.
        before: objective at zero.
        after: objective at ``z``.
        gradient: largest entry of the gradient, each relative to the sum of the magnitudes of
            what it is a difference of.
        iterations: sweeps over all layers, and Newton steps.
        converged: whether ``gradient`` is within the tolerance.
        dead: bool ``(channels,)``, those with no energy on one side, which were left alone.
    """

    z: Tensor
    before: float
    after: float
    gradient: float
    iterations: int
    converged: bool
    dead: Tensor


def balance_energies(
    blocks: Sequence[EnergyBlock],
    channels: int,
    *,
    linear: bool = True,
    tol: float = 1e-9,
    frozen: Tensor | None = None,
) -> Rescaling:
    r"""Minimise :math:`F` over the logarithms z of the squared scales of channels.

    Layer after layer, all channels of a layer are minimised over at once, exactly: for a given sum
    S of energies each has a quadratic equation, and S is the root of one scalar equation. After
    each such sweep the sizes of whole layers are minimised over together, a problem with one
    unknown for each layer. If sweeps do not contract, which happens when channels of one layer
    depend on each other, Newton's method with conjugate gradients finishes.

    Args:
        blocks: the energies, layer by layer.
        channels: how many channels can be scaled.
        linear: without it the second sum of F is left out, and minimised is the sum of energies.
        tol: relative size of the gradient to stop at.
        frozen: bool ``(channels,)``, channels to leave alone.

    Returns:
        The minimiser and what is known about it. Channels that feed nothing or are fed by nothing,
        for which there is no minimum, keep z = 0.

    Reference:
        Lebeurrier, Vayer, Gribonval, "Path-conditioned training" (2026), for the problem and the
        quadratic equation of one neuron.
    """
    problem = _Problem(blocks, channels, linear)
    state = problem.at(torch.zeros(channels + 1, dtype=torch.float64))
    dead = ((state.fed <= 0) | (state.read <= 0))[:-1]
    if frozen is not None:
        dead |= frozen
    if bool(dead.any()):
        problem = _Problem(_without(blocks, dead), channels, linear)
        state = problem.at(state.z)
    before, iterations = state.objective, 0
    if bool(dead.all()) or not state.total > 0:
        return Rescaling(state.z[:-1], before, before, 0.0, 0, True, dead)
    while state.error > tol and iterations < _CYCLES:
        new = _cycle(problem, state)
        iterations += 1
        stalled = not new.error < _STALLED * state.error
        if new.objective <= state.objective or new.error < state.error:
            state = new
        if stalled and iterations > 2:
            break
    for _ in range(_NEWTON):
        if state.error <= tol:
            break
        step = _newton(problem, state)
        if step is None:
            break
        state = step
        iterations += 1
    return Rescaling(
        state.z[:-1],
        before,
        state.objective,
        state.error,
        iterations,
        state.error <= tol,
        dead,
    )


def _without(blocks: Sequence[EnergyBlock], dead: Tensor) -> list[EnergyBlock]:
    """The same blocks with dead channels counted as fixed."""
    fixed = len(dead)
    number = torch.cat([torch.where(dead, fixed, torch.arange(fixed)), torch.tensor([fixed])])
    return [EnergyBlock(b.energy, number[b.gain], number[b.loss], b.count) for b in blocks]


@dataclass(frozen=True)
class _State:
    """A point with its flows: what feeds each channel, what reads it, and between layers."""

    z: Tensor
    fed: Tensor
    read: Tensor
    between: Tensor
    total: float
    objective: float
    gradient: Tensor
    error: float


class _Problem:
    """The blocks with the linear term; the last index is the fixed channel, whose z is 0.

    Channels that the same blocks feed make up a layer; the last layer is the fixed channel.
    """

    def __init__(self, blocks: Sequence[EnergyBlock], channels: int, linear: bool) -> None:
        self.blocks, self.channels = blocks, channels
        slope, size = (torch.zeros(channels + 1, dtype=torch.float64) for _ in range(2))
        for block in blocks:
            for index, sign in ((block.gain, -1.0), (block.loss, 1.0)):
                per = block.energy[0].numel() / index.shape[1] * block.count
                share = torch.full((index.numel(),), per, dtype=torch.float64)
                slope.index_add_(0, index.reshape(-1), sign * share)
                size.index_add_(0, index.reshape(-1), share)
        slope[-1] = 0.0
        self.n = float(sum(b.energy.numel() * b.count for b in blocks)) if linear else 1.0
        self.slope, self.size = (x if linear else torch.zeros_like(x) for x in (slope, size))

        label = torch.full((channels + 1,), -1, dtype=torch.int64)
        label[-1], self.layers = channels, 0
        for index in [b.gain for b in blocks] + [b.loss for b in blocks]:
            members = index[label[index] < 0]
            if len(members):
                label[members], self.layers = self.layers, self.layers + 1
        label[-1] = self.layers
        self.label = label.where(label >= 0, self.layers)  # channels of no block count as fixed
        self.feeds = [self._labels(b.gain) for b in blocks]
        self.reads = [self._labels(b.loss) for b in blocks]
        self.layer_slope = torch.zeros(self.layers + 1, dtype=torch.float64)
        self.layer_slope.index_add_(0, self.label, self.slope)

    def _labels(self, index: Tensor) -> list[int]:
        found: list[int] = self.label[index].unique().tolist()
        return found

    def at(self, z: Tensor) -> _State:
        """Evaluate everything at a point: two products with each block."""
        fed, read = torch.zeros_like(z), torch.zeros_like(z)
        between = torch.zeros(self.layers + 1, self.layers + 1, dtype=torch.float64)
        for block, layers in zip(self.blocks, self.feeds, strict=True):
            gain, loss = block.gain.reshape(-1), block.loss.reshape(-1)
            rows = (-z[block.gain]).exp()
            fed.index_add_(0, gain, (rows * _into(block, z)).reshape(-1))
            for k in layers:
                part = rows if len(layers) == 1 else rows.where(self.label[block.gain] == k, 0.0)
                out = _out(block, z, part).reshape(-1)
                read.index_add_(0, loss, out)
                between[k].index_add_(0, self.label[loss], out)
        total = float(between.sum())
        rate = self.n / total if total > 0 else 0.0
        gradient = rate * (read - fed) - self.slope
        gradient[-1] = 0.0
        size = (rate * (read + fed) + self.size)[:-1].clamp_min(1e-300)
        error = float((gradient[:-1].abs() / size).max()) if len(size) else 0.0
        objective = self.n * _log(total) - float(self.slope @ z)
        return _State(z, fed, read, between, total, objective, gradient, error)


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf


def _into(block: EnergyBlock, z: Tensor) -> Tensor:
    """The energies of each row, before the factor of the row itself."""
    return torch.bmm(block.energy, z[block.loss].exp().unsqueeze(-1)).squeeze(-1)


def _out(block: EnergyBlock, z: Tensor, rows: Tensor) -> Tensor:
    """The energies of each column, rows being scaled by ``rows``."""
    return torch.bmm(rows.unsqueeze(-2), block.energy).squeeze(-2) * z[block.loss].exp()


def _cycle(problem: _Problem, state: _State) -> _State:
    """Minimise over the sizes of the layers, then over one layer after another."""
    shift = _sizes(problem, state.between)
    z = state.z + shift[problem.label]
    total = float((state.between * (shift - shift.unsqueeze(-1)).exp()).sum())
    for k in range(problem.layers):
        total = _minimise_layer_(problem, z, k, total)
    return problem.at(z)


def _minimise_layer_(problem: _Problem, z: Tensor, k: int, total: float) -> float:
    """Minimise over the channels of one layer in place, and return the new sum of energies.

    If channels of the layer feed each other, the inequality of the means,
    exp(u - v) <= (exp(2u) + exp(-2v)) / 2, separates them, and F still decreases.
    """
    fed, read = torch.zeros_like(z), torch.zeros_like(z)
    touched, power = [], 1
    for block, feeds, reads in zip(problem.blocks, problem.feeds, problem.reads, strict=True):
        rows = (-z[block.gain]).exp() if k in feeds or k in reads else None
        if rows is None:
            continue
        touched.append(block)
        power = 2 if k in feeds and k in reads else power
        if k in feeds:
            fed.index_add_(0, block.gain.reshape(-1), (rows * _into(block, z)).reshape(-1))
        if k in reads:
            read.index_add_(0, block.loss.reshape(-1), _out(block, z, rows).reshape(-1))
    member = torch.nonzero(problem.label[:-1] == k).squeeze(1)
    i, o = fed[member], read[member]
    alive = (i > 0) & (o > 0)
    member, i, o = member[alive], i[alive], o[alive]
    old = _sum(touched, z) if power > 1 else 0.0
    rest = max(total - float((i + o).sum()) / power, 0.0)
    x, new = _quadratic(i, o, problem.slope[member] / problem.n, rest, total, power)
    z[member] += x.log() / power
    return new if power == 1 else total - old + _sum(touched, z)


def _sum(blocks: Sequence[EnergyBlock], z: Tensor) -> float:
    return sum(float(_out(b, z, (-z[b.gain]).exp()).sum()) for b in blocks)


def _sizes(problem: _Problem, flow: Tensor) -> Tensor:
    """Minimise over one shift of z for each layer, by Newton's method on the flows between."""
    slope = problem.layer_slope

    def objective(moved: Tensor, shift: Tensor) -> float:
        return problem.n * _log(float(moved.sum())) - float(slope @ shift)

    shift = torch.zeros_like(slope)
    moved, value = flow, objective(flow, shift)
    for _ in range(30):
        fed, read, total = moved.sum(1), moved.sum(0), moved.sum()
        rate, d = problem.n / total, (read - fed)[:-1]
        gradient = rate * d - slope[:-1]
        hessian = rate * (torch.diag(read + fed) - moved - moved.mT)[:-1, :-1]
        hessian = hessian - rate / total * torch.outer(d, d)
        hessian.diagonal().add_(1e-12 * hessian.diagonal().abs().amax())
        step = torch.zeros_like(shift)
        step[:-1] = -torch.linalg.solve_ex(hessian, gradient)[0]
        promised = float(gradient @ step[:-1])
        if not promised < -_QUADRATIC * problem.n:
            # So near that the whole step is right, and that the objective no longer shows it.
            return shift + step if promised < 0 else shift
        t = min(1.0, 20.0 / float(step.abs().max()))
        for _ in range(30):
            new = shift + t * step
            moved_new = flow * (new - new.unsqueeze(-1)).exp()
            value_new = objective(moved_new, new)
            if value_new <= value + 1e-4 * t * promised:
                break
            t /= 2
        else:
            break
        shift, moved, value = new, moved_new, value_new
    return shift


def _quadratic(
    i: Tensor, o: Tensor, slope: Tensor, rest: float, total: float, power: int
) -> tuple[Tensor, float]:
    """The roots x of o x - i / x = slope * S, where S is the sum that results from them."""
    product, square = 4 * i * o, slope.square()
    s = total
    for _ in range(50):
        root = (square * s * s + product).sqrt()
        excess = rest + float(root.sum()) / power - s
        # Convex in s with a slope below one, so that Newton's method comes from above.
        rate = 1 - float((square * s / root.clamp_min(1e-300)).sum()) / power
        new = s + excess / rate
        s, change = (new, abs(new - s)) if new > 0 else (2 * s, s)
        if change <= 1e-14 * s:
            break
    root = (square * s * s + product).sqrt()
    linear = slope * s
    x = torch.where(linear > 0, (linear + root) / (2 * o), 2 * i / (root - linear))
    return x, s


def _newton(problem: _Problem, state: _State) -> _State | None:
    """One Newton step by conjugate gradients; None if rounding leaves nothing to gain."""
    rate = problem.n / state.total
    d = state.read - state.fed
    diagonal = rate * (state.read + state.fed - d.square() / state.total)
    diagonal = diagonal.clamp_min(1e-14 * float(diagonal[:-1].max()))

    def hessian(v: Tensor) -> Tensor:
        result = (state.read + state.fed) * v
        for block in problem.blocks:
            rows, columns = (-state.z[block.gain]).exp(), state.z[block.loss].exp()
            into = torch.bmm(block.energy, (columns * v[block.loss]).unsqueeze(-1)).squeeze(-1)
            out = torch.bmm((rows * v[block.gain]).unsqueeze(-2), block.energy).squeeze(-2)
            result.index_add_(0, block.gain.reshape(-1), -(rows * into).reshape(-1))
            result.index_add_(0, block.loss.reshape(-1), -(columns * out).reshape(-1))
        result = rate * (result - d * float(d @ v) / state.total)
        result[-1] = 0.0
        return result

    step = _conjugate_gradients(hessian, -state.gradient, diagonal, min(0.1, state.error))
    slope = float(state.gradient @ step)
    t = min(1.0, 10.0 / max(float(step.abs().max()), 1e-300))
    while t > 1e-8:
        new = problem.at(state.z + t * step)
        lower = new.objective <= state.objective + 1e-4 * t * slope
        # Near the minimum the objective has lost the digits that the gradient still has.
        flatter = abs(float(new.gradient @ step)) <= 0.5 * abs(slope) and new.error < state.error
        if lower or flatter:
            return new if new.z is not state.z else None
        t /= 2
    return None


def _conjugate_gradients(
    operator: Callable[[Tensor], Tensor], b: Tensor, diagonal: Tensor, accuracy: float
) -> Tensor:
    """Solve a positive semidefinite system, preconditioned by a diagonal."""
    x, r = torch.zeros_like(b), b.clone()
    y = r / diagonal
    p, size = y.clone(), float(r @ y)
    stop = accuracy**2 * size
    for _ in range(_CG):
        image = operator(p)
        curvature = float(p @ image)
        if not curvature > 0:
            break
        x += size / curvature * p
        r -= size / curvature * image
        y = r / diagonal
        last, size = size, float(r @ y)
        if size <= stop:
            break
        p = y + size / last * p
    return x if bool(x.any()) else b / diagonal
