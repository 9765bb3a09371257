"""Starting points for ill-scaled energies: a rescaling from their logarithms alone.

Scales of many orders of magnitude are no difficulty of the convex problem but of its exponentials,
whose sums then consist of their largest term and rounding. In logarithms such scales are summands,
and least squares removes them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .problem import EnergyBlock, with_frozen

__all__ = ["log_balanced", "log_sum", "may_overflow", "rescaled", "spread"]

_ITERATIONS = 300  # a chain of dense layers needs two for each layer
_ACCURACY = 1e-4  # in z, relative: a start need not be better
_RANGE = 500.0  # of logarithms; float64 ends at 709


def log_balanced(
    blocks: Sequence[EnergyBlock], channels: int, *, frozen: Tensor | None = None
) -> Tensor:
    r"""Return the z for which the logarithms of all rescaled energies differ least.

    .. math:: \min_{z, c} \sum_{g_i > 0} \big(\log g_i + (Bz)_i - c\big)^2

    Energies :math:`g_i e^{(Bs)_i}` give :math:`z - s`, for any s however large: the balanced
    energies do not depend on how the network was scaled. Nothing overflows.

    With the squares of weights in place of energies, ``-z`` is the rescaling of the network (as in
    :func:`balance_energies` without its linear term) after which the products of weights along
    paths neither overflow nor underflow, unless the function itself does.

    Args:
        blocks: the energies, layer by layer.
        channels: how many channels can be scaled.
        frozen: bool ``(channels,)``, channels to leave unscaled.

    Returns:
        float64 ``(channels,)``, logarithms of squared scales; zero for channels without energy and
        for frozen ones.
    """
    if frozen is not None:
        blocks = with_frozen(blocks, frozen)
    degree, pull, slope = (torch.zeros(channels + 1, dtype=torch.float64) for _ in range(3))
    supports, number, total = [], 0.0, 0.0
    for block in blocks:
        present = (block.energy > 0).double()
        full = bool(present.all())
        logs = block.energy.log() if full else block.energy.log().where(present > 0, 0.0)
        for index, sign, dim in ((block.feeds, -1.0, 2), (block.reads, 1.0, 1)):
            flat, many = index.reshape(-1), present.sum(dim).reshape(-1)
            degree.index_add_(0, flat, many)
            slope.index_add_(0, flat, sign * many)
            pull.index_add_(0, flat, sign * logs.sum(dim).reshape(-1))
        number, total = number + float(present.sum()), total + float(logs.sum())
        supports.append((block, None if full else present))
    if not number:
        return torch.zeros(channels, dtype=torch.float64)

    def normal(v: Tensor) -> Tensor:
        result = degree * v - slope * (float(slope @ v) / number)
        for block, present in supports:
            rows, columns = v[block.feeds], v[block.reads]
            if present is None:
                into = columns.sum(1, keepdim=True).expand_as(rows)
                out = rows.sum(1, keepdim=True).expand_as(columns)
            else:
                into = torch.bmm(present, columns.unsqueeze(-1)).squeeze(-1)
                out = torch.bmm(rows.unsqueeze(-2), present).squeeze(-2)
            result.index_add_(0, block.feeds.reshape(-1), -into.reshape(-1))
            result.index_add_(0, block.reads.reshape(-1), -out.reshape(-1))
        result[-1] = 0.0
        return result

    slope[-1] = pull[-1] = 0.0
    # Conjugate gradients; scaled by the degrees, dense layers have few different eigenvalues.
    z, r = torch.zeros_like(pull), slope * (total / number) - pull
    y = r / degree.clamp_min(1.0)
    p, size = y.clone(), float(r @ y)
    for _ in range(_ITERATIONS):
        image = normal(p)
        curvature = float(p @ image)
        if not curvature > 0:
            break
        z += size / curvature * p
        r -= size / curvature * image
        y = r / degree.clamp_min(1.0)
        last, size = size, float(r @ y)
        if not size > 0 or float(y.abs().max()) <= _ACCURACY:
            break
        p = y + size / last * p
    return z[:-1]


def _logs(block: EnergyBlock, z: Tensor) -> Tensor:
    return block.energy.log() + z[block.reads].unsqueeze(-2) - z[block.feeds].unsqueeze(-1)


def log_sum(blocks: Sequence[EnergyBlock], z: Tensor) -> float:
    """The logarithm of the sum of rescaled energies, which itself may overflow.

    Args:
        blocks: the energies.
        z: ``(channels + 1,)``, zero in the last place.
    """
    if not blocks:
        return -math.inf
    return float(torch.stack([_logs(b, z).logsumexp((0, 1, 2)) for b in blocks]).logsumexp(0))


def rescaled(blocks: Sequence[EnergyBlock], z: Tensor) -> tuple[list[EnergyBlock], float]:
    """The energies after a rescaling, divided by the largest, and the logarithm of that one."""
    logs = [_logs(b, z) for b in blocks]
    peak = max(float(x.max()) for x in logs)
    if peak == -math.inf:
        return list(blocks), 0.0
    return [
        EnergyBlock(x.sub_(peak).exp_(), b.feeds, b.reads, b.count)
        for x, b in zip(logs, blocks, strict=True)
    ], peak


def spread(blocks: Sequence[EnergyBlock]) -> float:
    """The logarithm of the ratio of the largest energy to the smallest that is not zero."""
    largest = max(float(b.energy.max()) for b in blocks)
    smallest = min(float(b.energy.where(b.energy > 0, math.inf).min()) for b in blocks)
    return math.log(largest) - math.log(smallest)


def may_overflow(blocks: Sequence[EnergyBlock]) -> bool:
    """Whether products of these numbers along paths may leave the range of float64.

    Args:
        blocks: the squares of weights, a block for each parameter.

    Returns:
        True if the logarithms of sums of rows and columns, the largest magnitude of each block
        added up, come near the largest exponent.
    """
    bound = 0.0
    for block in blocks:
        sums = torch.cat([block.energy.sum(dim).reshape(-1) for dim in (1, 2)])
        logs = sums[sums > 0].log().abs()
        bound += float(logs.max()) if len(logs) else 0.0
    return not bound <= _RANGE
