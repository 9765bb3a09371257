"""Spaces: a union-find of channels with a common scale, whose classes may be closed."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ONE", "ZERO", "Spaces", "compact"]

ZERO = 0
"""The space of numbers that are zero, such as padding: they are in every space at once."""

ONE = 1
"""The space of constants, and of what a bias reads."""


def compact(ids: Tensor) -> Tensor:
    """Return the same numbers with every broadcast dimension cut to length one."""
    for dim in range(ids.ndim):
        if ids.shape[dim] > 1 and ids.stride(dim) == 0:
            ids = ids.narrow(dim, 0, 1)
    return ids


def distinct(ids: Tensor) -> list[int]:
    """Return the numbers that occur, in order."""
    short = compact(ids).reshape(-1)
    if len(short) < _MANY:
        found: list[int] = short.unique().tolist()
        return found
    occurs = torch.zeros(int(short.max()) + 1, dtype=torch.bool)  # faster than sorting
    occurs[short] = True
    found = torch.nonzero(occurs).squeeze(1).tolist()
    return found


_MANY = 10_000


class Spaces:
    """The spaces found so far.

    Args:
        per_channel: one space for each channel of a layer's output, or one for all of them.
    """

    def __init__(self, *, per_channel: bool) -> None:
        self.per_channel = per_channel
        self._parent = [ZERO, ONE]
        self._reason: list[str | None] = ["zeros have no scale", "it is a constant"]

    def new(self, count: int) -> Tensor:
        """Return the spaces ``(count,)`` of a layer's output channels."""
        first, size = len(self._parent), count if self.per_channel else min(count, 1)
        self._parent += range(first, first + size)
        self._reason += [None] * size
        return (first + torch.arange(size)).expand(count)

    def closed(self, reason: str) -> int:
        """Return a new closed space."""
        self._parent.append(len(self._parent))
        self._reason.append(reason)
        return len(self._parent) - 1

    def find(self, i: int) -> int:
        """Return the representative of a space."""
        parent = self._parent
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    def reason(self, i: int) -> str | None:
        """Why the space is closed, or None if it is free."""
        return self._reason[self.find(i)]

    def all_closed(self, ids: Tensor) -> bool:
        """Whether no element is in a free space."""
        return all(self.reason(i) is not None for i in distinct(ids))

    def close(self, ids: Tensor, reason: str) -> None:
        """Close these spaces: their scale stays one."""
        for i in distinct(ids):
            root = self.find(i)
            if self._reason[root] is None:
                self._reason[root] = reason

    def union(self, a: Tensor, b: Tensor) -> Tensor:
        """Give broadcast pairs of elements the same scale, and return their spaces."""
        shape = torch.broadcast_shapes(a.shape, b.shape)
        a, b = compact(a.expand(shape)), compact(b.expand(shape))
        i, j = (x.reshape(-1) for x in torch.broadcast_tensors(a, b))
        wanted = (i != ZERO) & (j != ZERO) & (i != j)
        size = len(self._parent)
        for pair in (i[wanted] * size + j[wanted]).unique().tolist():
            self._join(*divmod(pair, size))
        return torch.where(a == ZERO, b, a).expand(shape)

    def union_over(self, ids: Tensor, dims: tuple[int, ...]) -> Tensor:
        """Give the elements along some dimensions the same scale; these become length one."""
        if not dims:
            return ids
        short = compact(ids)
        largest = short.amax(dims, keepdim=True) if short.numel() else short
        if short.numel() and not torch.equal(largest, short.amin(dims, keepdim=True)):
            self.union(short, largest.expand(short.shape))
        wanted = [1 if d in dims else n for d, n in enumerate(ids.shape)]
        return largest.expand(wanted)

    def _join(self, i: int, j: int) -> None:
        i, j = sorted((self.find(i), self.find(j)))
        if i != j:
            self._parent[j] = i
            self._reason[i] = self._reason[i] or self._reason[j]
