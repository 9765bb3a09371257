"""The authors' procedure on the energies of any model: ten sweeps, one channel after another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from riemann_unn.graph import ModelGraph
from riemann_unn.init.path_condition.objective import _Part, _parts
from riemann_unn.linalg.rescaling.problem import EnergyBlock, Problem

__all__ = ["authors_objective", "is_small"]

LIMIT = 3000  # channels, of which each takes some microseconds ten times for each of its weights


def is_small(view: ModelGraph) -> bool:
    """Whether the sweeps take seconds and not minutes."""
    return int(view.free.sum()) <= LIMIT


def authors_objective(
    view: ModelGraph, origin: Tensor | None, energies: Mapping[str, Tensor]
) -> float:
    """The objective after ten sweeps; NaN if there are many channels, infinity if it breaks.

    Args:
        view: the model.
        origin: logarithms of squared scales that the energies are those of; None for none.
        energies: the path energies.
    """
    if not is_small(view):
        return math.nan
    found = 0.0
    for names in _parts(view):
        part = _Part(view, names)
        blocks = part.blocks(energies)
        if origin is not None:
            z = torch.cat([origin[part.spaces], torch.zeros(1, dtype=torch.float64)])
            for b in blocks:
                b.energy.mul_((z[b.feeds].unsqueeze(2) - z[b.reads].unsqueeze(1)).exp())
        peak = max(float(b.energy.max()) for b in blocks)
        if not 0 < peak < math.inf:
            return math.nan
        scaled = [EnergyBlock(b.energy / peak, b.feeds, b.reads, b.count) for b in blocks]
        found += _sweeps(scaled, part.count, 10)
        found += sum(energies[name].numel() for name in names) * math.log(peak)
    return found


def _sweeps(blocks: Sequence[EnergyBlock], channels: int, sweeps: int) -> float:
    problem = Problem(blocks, channels, True)
    slopes, n = problem.slope.tolist(), problem.n
    energies = [b.energy.numpy().copy() for b in blocks]
    feeds = _slices(energies, [b.feeds for b in blocks], channels, rows=True)
    reads = _slices(energies, [b.reads for b in blocks], channels, rows=False)
    if any({a for a, _ in feeds[s]} & {a for a, _ in reads[s]} for s in range(channels)):
        return math.nan  # a weight from a channel to itself
    linear = 0.0
    for _ in range(sweeps):
        total = known = float(sum(e.sum() for e in energies))
        for s, slope in enumerate(slopes[:channels]):
            i = float(sum(x.sum() for _, x in feeds[s]))
            o = float(sum(x.sum() for _, x in reads[s]))
            if not (i > 0 and o > 0):
                continue
            rest = total - i - o
            a, b, c = o * (n - slope), -slope * rest, -i * (n + slope)
            root = math.sqrt(b * b - 4 * a * c)
            x = (root - b) / (2 * a) if b <= 0 else -2 * c / (b + root)  # no digits are lost
            for _, part in feeds[s]:
                part /= x
            for _, part in reads[s]:
                part *= x
            if not x > 0:
                return math.inf  # it has lost all digits to cancellation
            total = rest + o * x + i / x
            if total < 1e-6 * known:  # what is left of the difference is rounding
                total = known = float(sum(e.sum() for e in energies))
            linear += slope * math.log(x)
    return n * math.log(float(sum(e.sum() for e in energies))) - linear


def _slices(energies, indices, channels, *, rows):  # type: ignore[no-untyped-def]
    """By channel, the parts of matrices that it scales, each with the matrix that it is of."""
    found = [[] for _ in range(channels)]
    for k, (energy, index) in enumerate(zip(energies, indices, strict=True)):
        for batch, line in enumerate(index.tolist()):
            for place, s in enumerate(line):
                if s < channels:
                    part = energy[batch, place] if rows else energy[batch, :, place]
                    found[s].append(((k, batch), part))
    return found
