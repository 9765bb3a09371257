"""Slow and obvious: the rescaling problem as one long sum, and the loop over its neurons."""

from __future__ import annotations

import torch
from torch import Tensor

from riemann_unn.linalg.rescaling import EnergyBlock

Dense = tuple[list[EnergyBlock], int]
Sum = tuple[Tensor, Tensor, Tensor, Tensor]


def dense(blocks: list[EnergyBlock], channels: int) -> Sum:
    """Every term once: energy, channel fed, channel read, number of parameters."""
    parts = []
    for b in blocks:
        feeds = b.feeds.unsqueeze(-1).expand(b.energy.shape)
        reads = b.reads.unsqueeze(-2).expand(b.energy.shape)
        count = torch.full(b.energy.shape, float(b.count), dtype=torch.float64)
        parts.append([x.reshape(-1) for x in (b.energy, feeds, reads, count)])
    energy, feeds, reads, count = (torch.cat(column) for column in zip(*parts, strict=True))
    return energy, feeds, reads, count


def objective(problem: Sum, z: Tensor, *, linear: bool = True) -> Tensor:
    """n log sum g exp(Bz) - sum Bz, as it is written."""
    energy, feeds, reads, count = problem
    z = torch.cat([z, z.new_zeros(1)])
    exponent = z[reads] - z[feeds]
    log = (energy * exponent.exp()).sum().log()
    return count.sum() * log - (count * exponent).sum() if linear else log


def neuron_by_neuron(problem: Sum, channels: int, *, sweeps: int) -> Tensor:
    """Minimise over one channel after another: the root of a quadratic, as the paper does."""
    energy, feeds, reads, count = problem
    n = float(count.sum())
    terms = energy.clone()  # g exp(Bz), kept up to date
    total = float(terms.sum())
    members = []
    for h in range(channels):
        into, out = torch.nonzero(feeds == h).squeeze(1), torch.nonzero(reads == h).squeeze(1)
        both = torch.isin(into, out)
        within = into[both]  # exp(z - z): no part in this neuron's equation
        into, out = into[~both], out[~torch.isin(out, within)]
        members.append((into, out, float(count[out].sum() - count[into].sum())))
    z = torch.zeros(channels, dtype=torch.float64)
    for _ in range(sweeps):
        for h, (into, out, slope) in enumerate(members):
            fed, read = float(terms[into].sum()), float(terms[out].sum())
            if fed <= 0 or read <= 0:
                continue
            rest = total - fed - read
            # n (read x - fed / x) = slope (rest + read x + fed / x)
            a, b, c = read * (n - slope), -slope * rest, -fed * (n + slope)
            x = (-b + (b * b - 4 * a * c) ** 0.5) / (2 * a)
            terms[into] /= x
            terms[out] *= x
            total = rest + read * x + fed / x
            z[h] += float(torch.tensor(x, dtype=torch.float64).log())
    return z
