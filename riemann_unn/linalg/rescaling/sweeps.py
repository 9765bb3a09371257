"""One cycle of the solver: the sizes of all layers jointly, then the channels layer by layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .problem import EnergyBlock, Problem, State, into, out

__all__ = ["cycle"]

_NEGLIGIBLE = 1e-9  # smallest decrease, relative to n, above the objective's rounding
_SPREAD = 30.0  # of logarithms of flows, up to which Newton's method needs no path


def cycle(problem: Problem, state: State) -> State:
    """Minimise over the sizes of the layers, then over one layer after another."""
    shift = _sizes(problem, state.between)
    z, sums = state.z + shift[problem.label], list(state.sums)
    factor = (shift - shift.unsqueeze(-1)).exp().tolist()
    for b, (feeds, reads) in enumerate(zip(problem.feeds, problem.reads, strict=True)):
        if len(feeds) == len(reads) == 1:
            sums[b] *= factor[feeds[0]][reads[0]]
        else:
            sums[b] = _sum(problem.blocks[b], z)
    for k in range(problem.layers):
        _minimise_layer_(problem, z, k, sums)
    return problem.at(z)


def _minimise_layer_(problem: Problem, z: Tensor, k: int, sums: list[float]) -> None:
    """Minimise over the channels of one layer in place; ``sums``, of the blocks, follow.

    If channels of the layer feed each other, the inequality of the means,
    exp(u - v) <= (exp(2u) + exp(-2v)) / 2, separates them, and F still decreases.

    Energies outside the layer are added up, not subtracted from the total, which would lose small
    ones to rounding.
    """
    incoming, outgoing = torch.zeros_like(z), torch.zeros_like(z)
    rest, one_sided = 0.0, 0.0  # energies outside the layer, and with one end in it
    flows: list[tuple[int, Tensor, bool]] = []
    within: list[int] = []  # blocks from the layer to itself
    for number, block in enumerate(problem.blocks):
        feeds, reads = problem.feeds[number], problem.reads[number]
        if k not in feeds and k not in reads:
            rest += sums[number]
            continue
        rows = (-z[block.feeds]).exp()
        if k in feeds:
            flow = (rows * into(block, z)).reshape(-1)
            incoming.index_add_(0, problem.incoming_indices[number], flow)
        if k in reads:
            flow = out(block, z, rows).reshape(-1)
            outgoing.index_add_(0, problem.read_indices[number], flow)
        if k in feeds and k in reads:
            within.append(number)
            outer, half = _energies_at_layer(problem, block, z, rows, k)
            rest, one_sided = rest + outer, one_sided + half
            continue
        flows.append((number, flow, k in feeds))
        if len(feeds if k in feeds else reads) > 1:
            index = (problem.incoming_indices if k in feeds else problem.read_indices)[number]
            rest += float(flow.where(problem.label[index] != k, 0.0).sum())
    member = problem.members[k]
    i, o = incoming[member], outgoing[member]
    if not bool(((i > 0) & (o > 0)).all()):
        alive = (i > 0) & (o > 0)
        rest += float((i + o)[~alive].sum()) / (2 if within else 1)
        member, i, o = member[alive], i[alive], o[alive]
    factor = torch.ones_like(z)
    if within:
        for number, flow, is_fed in flows:
            index = (problem.incoming_indices if is_fed else problem.read_indices)[number]
            one_sided += float(flow.where(problem.label[index] == k, 0.0).sum())
        x, _ = _quadratic(i, o, problem.slope[member] / problem.n, rest + one_sided / 2, 2)
        x = x.sqrt()
    else:
        x, _ = _quadratic(i, o, problem.slope[member] / problem.n, rest, 1)
    factor[member] = x
    z[member] += x.log()
    for number, flow, is_fed in flows:
        moved = (
            flow / factor[problem.incoming_indices[number]]
            if is_fed
            else flow * factor[problem.read_indices[number]]
        )
        sums[number] = float(moved.sum())
    for number in within:
        sums[number] = _sum(problem.blocks[number], z)


def _energies_at_layer(
    problem: Problem, block: EnergyBlock, z: Tensor, rows: Tensor, k: int
) -> tuple[float, float]:
    """Of a block at layer k: the energies with no end in the layer, and with one."""
    feeding, reading = problem.label[block.feeds] == k, problem.label[block.reads] == k
    if bool(feeding.all()) and bool(reading.all()):
        return 0.0, 0.0
    outer = out(block, z, rows.where(~feeding, 0.0))
    inner = out(block, z, rows.where(feeding, 0.0))
    one_sided = outer.where(reading, 0.0).sum() + inner.where(~reading, 0.0).sum()
    return float(outer.where(~reading, 0.0).sum()), float(one_sided)


def _sum(block: EnergyBlock, z: Tensor) -> float:
    return float(out(block, z, (-z[block.feeds]).exp()).sum())


def _quadratic(
    i: Tensor, o: Tensor, slope: Tensor, rest: float, power: int
) -> tuple[Tensor, float]:
    """The roots x of o x - i / x = slope * S, where S is the sum that results from them."""
    mean, square = 2 * i.sqrt() * o.sqrt(), slope.square()
    least = rest + float(mean.sum()) / power
    s = max(least, rest + float((i + o).sum()) / power)
    for _ in range(100):
        # Convex in s, with a slope between -1 and 0: Newton's method overshoots once at most, and
        # to below the root, whence it comes back step by step.
        root = torch.hypot(slope * s, mean)
        excess = rest + float(root.sum()) / power - s
        rate = 1 - s * float((square / root.clamp_min(1e-300)).sum()) / power
        new = max(least, s + excess / rate)
        s, change = new, abs(new - s)
        if not change > 1e-11 * s:
            break
    root = torch.hypot(slope * s, mean)
    linear = slope * s
    x = torch.where(linear > 0, (linear + root) / (2 * o), 2 * i / (root - linear))
    return x, s


def _sizes(problem: Problem, flow: Tensor) -> Tensor:
    """Minimise over one shift of z for each layer, from the flows between layers.

    Where flows differ by many orders of magnitude, the objective is nearly the maximum of linear
    functions, on which Newton's method is slow. It is then smoothed, T log sum exp(. / T), and T
    falls to one.
    """
    logs = flow.log()
    finite = logs[flow > 0]
    temperature = max(1.0, float(finite.max() - finite.min()) / _SPREAD) if len(finite) else 1.0
    shift = torch.zeros_like(problem.layer_slope)
    while temperature > 1:
        shift = _newton_sizes(problem, logs, shift, temperature, 1e-4)
        temperature = max(1.0, temperature / 4)
    return _newton_sizes(problem, logs, shift, 1.0, _NEGLIGIBLE)


def _newton_sizes(
    problem: Problem, logs: Tensor, shift: Tensor, temperature: float, accuracy: float
) -> Tensor:
    slope, n = problem.layer_slope, problem.n * temperature

    def terms(shift: Tensor) -> tuple[Tensor, float]:
        exponent = (logs + shift - shift.unsqueeze(-1)) / temperature
        peak = float(exponent.max())
        moved = (exponent - peak).exp_()
        total = float(moved.sum())
        return moved / total, n * (math.log(total) + peak) - float(slope @ shift)

    share, value = terms(shift)
    for _ in range(60):
        incoming, outgoing = share.sum(1), share.sum(0)
        d, size = (outgoing - incoming)[:-1], (outgoing + incoming)[:-1]
        gradient = (problem.n * d - slope[:-1]).where(size > 0, 0.0)
        hessian = torch.diag(outgoing + incoming) - share - share.mT
        hessian = hessian[:-1, :-1] - torch.outer(d, d)
        # Scaled to a unit diagonal, so that small layers are not lost beside large ones.
        scale = size.clamp_min(1e-300).rsqrt()
        hessian = hessian * scale * scale.unsqueeze(-1)
        hessian.diagonal().add_(1e-12)
        solved = torch.linalg.solve_ex(hessian, (gradient * scale).unsqueeze(-1))[0].squeeze(-1)
        step = torch.zeros_like(shift)
        step[:-1] = -temperature / problem.n * scale * solved
        promised = float(gradient @ step[:-1])
        if not promised < -accuracy * n:
            # Close enough for the whole step, whose decrease is below the objective's rounding.
            return shift + step if -accuracy * n <= promised < 0 else shift
        t = min(1.0, 20.0 * temperature / float(step.abs().max()))
        for _ in range(30):
            new = shift + t * step
            share_new, value_new = terms(new)
            if value_new <= value + 1e-4 * t * promised:
                break
            t /= 2
        else:
            return shift
        shift, share, value = new, share_new, value_new
    return shift
