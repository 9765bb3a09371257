"""Stacks: points of one kind lie side by side in one tensor while they move."""

from __future__ import annotations

import operator
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .points import Point

__all__ = ["START", "Stack", "Stacks", "State", "flat"]

START = "sketch_start"

State = MutableMapping[Tensor, dict[str, Any]]


class Stack:
    """Points of one kind and the memory in which they move as one batch of matrices.

    It is kept between steps: to make a view for each of many small points takes
    longer than to move them all.
    """

    def __init__(self, points: list[Point]) -> None:
        self.points = points
        self._values: tuple[Tensor, list[Tensor]] | None = None
        self._starts: tuple[Tensor, Sequence[Tensor]] | None = None

    def gather(self, views: list[Tensor]) -> Tensor:
        """Return the matrices of all points, ``(..., n, p)`` with at most one batch dimension."""
        if len(views) == 1:
            return flat(views[0])
        whole = views[0].new_empty((0,)) if self._values is None else self._values[0]
        if whole.shape[1:] != views[0].shape or not _can_hold(whole, views[0]):
            whole = views[0].new_empty((len(views), *views[0].shape))
            self._values = whole, self._as_values(whole)
        return flat(torch.stack(views, out=whole))

    def scatter(self, x: Tensor, views: list[Tensor]) -> None:
        """Write such matrices back to the points that have these views."""
        if self._values is not None and _shares(x, self._values[0]):
            whole, news = self._values
            if not _shares(news[0], whole):  # tensors that were made from it, not views
                news = self._as_values(whole)
        else:
            news = self._as_values(x.reshape(len(views), *views[0].shape))
        torch._foreach_copy_([point.value for point in self.points], news)

    def _as_values(self, whole: Tensor) -> list[Tensor]:
        manifold, shape = self.points[0].manifold, self.points[0].value.shape
        return [manifold.from_matrices(part, shape) for part in whole.unbind(0)]

    def starts(self, kept: Sequence[Mapping[str, Any]], delta: Tensor) -> Tensor | None:
        """Return the rows that start the sketches of displacements, from what is kept of each."""
        if START not in kept[0]:
            self._starts = None  # taken out of the state, so to be put there anew
            return None
        rows: list[Tensor] = [state[START] for state in kept]
        if self._starts is not None and _are_same(rows, self._starts[1]):
            whole = self._starts[0]
        else:
            self._starts = None
            if len({row.shape for row in rows}) > 1:
                return None
            whole = rows[0].unsqueeze(0) if len(rows) == 1 else torch.stack(rows)
        whole = whole if whole.is_complex() == delta.is_complex() else torch.view_as_complex(whole)
        whole = whole.to(delta.device, delta.dtype)
        return whole[0] if delta.ndim == 2 else flat(whole)

    def keep_starts(self, starts: Tensor, views: list[Tensor], kept: list[dict[str, Any]]) -> None:
        """Note the rows that start the next sketches in what is kept of each point."""
        starts = starts.reshape(len(views), *views[0].shape[:-2], *starts.shape[-2:])
        # A real parameter may have complex matrices, but its state has to be real: torch casts a
        # state to the parameter's dtype when it is loaded.
        if starts.is_complex() != self.points[0].param.is_complex():
            starts = torch.view_as_real(starts.resolve_conj())
        if self._starts is not None:
            whole = self._starts[0]
            if whole.shape == starts.shape and _can_hold(whole, starts):
                whole.copy_(starts)
                return
        whole = starts.clone(memory_format=torch.contiguous_format).resolve_conj()
        self._starts = whole, whole.unbind(0)
        for state, rows in zip(kept, self._starts[1], strict=True):
            state[START] = rows


class Stacks:
    """The stacks that points were last moved in."""

    def __init__(self) -> None:
        self._by_first: dict[Point, Stack] = {}

    def of(self, points: list[Point]) -> Stack:
        """Return the stack of these points, the one of the last step if they are the same."""
        stack = self._by_first.get(points[0])
        if stack is None or stack.points != points:
            stack = self._by_first[points[0]] = Stack(points)
        return stack


def flat(x: Tensor) -> Tensor:
    """Return matrices with at most one batch dimension."""
    return x if x.ndim <= 3 else x.reshape(-1, *x.shape[-2:])


def _shares(some: Tensor, other: Tensor) -> bool:
    return some.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _can_hold(x: Tensor, other: Tensor) -> bool:
    return x.dtype is other.dtype and x.device == other.device


def _are_same(some: Sequence[Any], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(map(operator.is_, some, others))
