"""The problem of rescaling: blocks of energies, and the state at a point."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["EnergyBlock", "Problem", "State", "into", "out", "with_frozen"]


@dataclass(frozen=True)
class EnergyBlock:
    """The energies of the parameters of one layer.

    Attributes:
        energy: float64 ``(batch, rows, columns)``, nonnegative, for instance of a grouped
            convolution; summed over parameters that feed and read the same channels.
        feeds: int64 ``(batch, rows)``, the channel each row feeds; a frozen one has the number
            after the last channel.
        reads: int64 ``(batch, columns)``, the channel each column reads, likewise.
        count: how many parameters are summed in each entry.
    """

    energy: Tensor
    feeds: Tensor
    reads: Tensor
    count: int = 1


@dataclass(frozen=True)
class State:
    """A point with its energies: incoming and outgoing of each channel, and between layers.

    Attributes:
        z: float64 ``(channels + 1,)``, zero in the last place.
        incoming: the energies that feed each channel, ``(channels + 1,)``.
        outgoing: the energies that read each channel, likewise.
        between: energies by the layer they feed and the layer they read.
        sums: the sum of the energies of each block.
        total: the sum of energies.
        objective: F, infinite or NaN if the energies overflow.
        gradient: of F.
        error: the largest entry of the gradient, each relative to the terms that make it up.
    """

    z: Tensor
    incoming: Tensor
    outgoing: Tensor
    between: Tensor
    sums: tuple[float, ...]
    total: float
    objective: float
    gradient: Tensor
    error: float


class Problem:
    """The blocks with the linear term; the last index is the frozen channel, whose z is 0.

    Channels that the same blocks feed make up a layer; the last layer is the frozen channel.

    Args:
        blocks: the energies, layer by layer.
        channels: how many channels can be scaled.
        linear: whether F has its linear term.
    """

    def __init__(self, blocks: Sequence[EnergyBlock], channels: int, linear: bool) -> None:
        self.blocks, self.channels, self.linear = blocks, channels, linear
        slope, size = (torch.zeros(channels + 1, dtype=torch.float64) for _ in range(2))
        for block in blocks:
            for index, sign in ((block.feeds, -1.0), (block.reads, 1.0)):
                per = block.energy[0].numel() / index.shape[1] * block.count
                share = torch.full((index.numel(),), per, dtype=torch.float64)
                slope.index_add_(0, index.reshape(-1), sign * share)
                size.index_add_(0, index.reshape(-1), share)
        slope[-1] = 0.0
        self.n = float(sum(b.energy.numel() * b.count for b in blocks)) if linear else 1.0
        self.slope, self.size = (x if linear else torch.zeros_like(x) for x in (slope, size))

        label = torch.full((channels + 1,), -1, dtype=torch.int64)
        label[-1], self.layers = channels, 0
        for index in [b.feeds for b in blocks] + [b.reads for b in blocks]:
            members = index[label[index] < 0]
            if len(members):
                label[members], self.layers = self.layers, self.layers + 1
        label[-1] = self.layers
        self.label = label.where(label >= 0, self.layers)  # channels of no block count as frozen
        self.incoming_indices = [b.feeds.reshape(-1) for b in blocks]
        self.read_indices = [b.reads.reshape(-1) for b in blocks]
        self.feeds = [self._labels(index) for index in self.incoming_indices]
        self.reads = [self._labels(index) for index in self.read_indices]
        self.members = [torch.nonzero(self.label[:-1] == k).squeeze(1) for k in range(self.layers)]
        self.layer_slope = torch.zeros(self.layers + 1, dtype=torch.float64)
        self.layer_slope.index_add_(0, self.label, self.slope)

    def _labels(self, index: Tensor) -> list[int]:
        labels = self.label[index]
        least, largest = labels.aminmax() if len(labels) else (self.layers, self.layers)
        if least == largest:
            return [int(least)]
        found: list[int] = labels.unique().tolist()
        return found

    def at(self, z: Tensor) -> State:
        """Evaluate everything at a point: two products with each block."""
        incoming, outgoing = torch.zeros_like(z), torch.zeros_like(z)
        between = torch.zeros(self.layers + 1, self.layers + 1, dtype=torch.float64)
        sums = []
        for block, feeds, reads, layers in zip(
            self.blocks, self.incoming_indices, self.read_indices, self.feeds, strict=True
        ):
            rows = (-z[block.feeds]).exp()
            by_row = rows * into(block, z)
            incoming.index_add_(0, feeds, by_row.reshape(-1))
            sums.append(float(by_row.sum()))
            for k in layers:
                part = rows if len(layers) == 1 else rows.where(self.label[block.feeds] == k, 0.0)
                flow = out(block, z, part).reshape(-1)
                outgoing.index_add_(0, reads, flow)
                between[k].index_add_(0, self.label[reads], flow)
        total = sum(sums)
        rate = self.n / total if total > 0 else 0.0
        gradient = rate * (outgoing - incoming) - self.slope
        gradient[-1] = 0.0
        size = (rate * (outgoing + incoming) + self.size)[:-1].clamp_min(1e-300)
        error = float((gradient[:-1].abs() / size).max()) if len(size) else 0.0
        logarithm = math.log(total) if total > 0 else -math.inf if total == 0 else math.nan
        objective = self.n * logarithm - float(self.slope @ z)
        return State(z, incoming, outgoing, between, tuple(sums), total, objective, gradient, error)


def into(block: EnergyBlock, z: Tensor) -> Tensor:
    """The energies of each row, before the factor of the row itself."""
    return torch.bmm(block.energy, z[block.reads].exp().unsqueeze(-1)).squeeze(-1)


def out(block: EnergyBlock, z: Tensor, rows: Tensor) -> Tensor:
    """The energies of each column, rows being scaled by ``rows``."""
    return torch.bmm(rows.unsqueeze(-2), block.energy).squeeze(-2) * z[block.reads].exp()


def with_frozen(blocks: Sequence[EnergyBlock], frozen: Tensor) -> list[EnergyBlock]:
    """The same blocks with some channels frozen: those where ``frozen`` is True."""
    last = len(frozen)
    number = torch.cat([torch.where(frozen, last, torch.arange(last)), torch.tensor([last])])
    return [EnergyBlock(b.energy, number[b.feeds], number[b.reads], b.count) for b in blocks]
