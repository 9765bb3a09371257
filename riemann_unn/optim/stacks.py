"""Stacks: points of one kind lie side by side in one tensor while they move."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .points import Point

__all__ = ["START", "Stack", "Stacks", "State"]

START = "sketch_start"

State = MutableMapping[Tensor, dict[str, Any]]


class Stack:
    """Points of one kind and the memory in which they move as one batch of matrices.

    It is kept between steps: to make a view for each of many small points takes
    longer than to move them all.
    """

    def __init__(self, points: list[Point]) -> None:
        self.points = points
        self._manifold = points[0].manifold
        self._together = len(points) > 1 and self._manifold.takes_batches
        # All values side by side, and each of them.
        self._values: tuple[Tensor, list[Tensor]] | None = None
        self._starts: tuple[Tensor, Sequence[Tensor]] | None = None
        self._shape = torch.Size()

    def displacement(self, tensors: list[Tensor]) -> Tensor:
        """Return the matrices of all displacements, with at most one batch dimension."""
        return self._matrices(self._manifold.displacement_matrices, tensors, None)

    def gather(self) -> Tensor:
        """Return the matrices of all points, ``(..., n, p)`` with at most one batch dimension."""
        values = [point.value for point in self.points]
        room = self._room(values[0]) if self._together else None
        return self._matrices(self._manifold.to_matrices, values, room)

    def scatter(self, x: Tensor, moved: Tensor | None) -> None:
        """Write such matrices back to the points; to those that have moved if not all have."""
        values, back = [point.value for point in self.points], self._manifold.from_matrices
        first = values[0]
        if len(values) == 1 and _shares(x, first):
            return
        parts = x.reshape(self._shape)
        if self._together and self._values is not None:
            whole, news = self._values
            if not _shares(x, whole):
                whole.copy_(self._kept(moved, whole, back(parts, whole.shape)))
            torch._foreach_copy_(values, news)
        elif len(values) > 1:
            fresh = torch.stack([back(part, first.shape) for part in parts.unbind(0)])
            old = fresh if moved is None else torch.stack(values)
            torch._foreach_copy_(values, list(self._kept(moved, old, fresh).unbind(0)))
        else:
            fresh = back(parts[0], first.shape).unsqueeze(0)
            first.copy_(self._kept(moved, first.unsqueeze(0), fresh)[0])

    def _kept(self, moved: Tensor | None, old: Tensor, fresh: Tensor) -> Tensor:
        """Keep the old values of what has not moved, which come back with other roundings."""
        if moved is None:
            return fresh
        inner = self._manifold.point_dims(self.points[0].value)
        outer = fresh.ndim - inner
        flags = moved.reshape(self._shape[:-2])
        if flags.ndim > outer:  # the matrices of a kernel move together
            flags = flags.flatten(outer)[..., 0]
        return torch.where(flags.reshape(*flags.shape, *[1] * inner), fresh, old)

    def _room(self, value: Tensor) -> Tensor:
        whole = None if self._values is None else self._values[0]
        if whole is None or whole.shape[1:] != value.shape or not _can_hold(whole, value):
            whole = value.new_empty((len(self.points), *value.shape))
            self._values = whole, list(whole.unbind(0))
        return whole

    def _matrices(
        self, view: Callable[[Tensor], Tensor], tensors: list[Tensor], room: Tensor | None
    ) -> Tensor:
        if len(tensors) == 1:
            matrices = view(tensors[0])
            self._shape = torch.Size((1, *matrices.shape))
            return _flat(matrices)
        matrices = (
            view(torch.stack(tensors, out=room))
            if self._together
            else torch.stack([view(tensor) for tensor in tensors])
        )
        self._shape = matrices.shape
        return _flat(matrices)

    def starts(self, kept: Sequence[Mapping[str, Any]], delta: Tensor) -> Tensor | None:
        """Return the rows that start the sketches of displacements, from what is kept of each."""
        if START not in kept[0]:
            self._starts = None  # taken out of the state, so to be put there anew
            return None
        rows: list[Tensor] = [state[START] for state in kept]
        if len(rows) == 1:
            whole = rows[0]
        elif self._starts is not None and _are_same(rows, self._starts[1]):
            whole = self._starts[0]
        else:
            self._starts = None
            if len({row.shape for row in rows}) > 1:
                return None
            whole = torch.stack(rows)
        whole = whole if whole.is_complex() == delta.is_complex() else torch.view_as_complex(whole)
        return _flat(whole.to(delta.device, delta.dtype))

    def keep_starts(self, starts: Tensor, kept: list[dict[str, Any]]) -> None:
        """Note the rows that start the next sketches in what is kept of each point."""
        if starts.ndim > 2:
            batch = self._shape[:-2] if len(kept) > 1 else self._shape[1:-2]
            starts = starts.reshape(*batch, *starts.shape[-2:])
        # A real parameter may have complex matrices, but its state has to be real: torch casts a
        # state to the parameter's dtype when it is loaded.
        if starts.is_complex() != self.points[0].param.is_complex():
            starts = torch.view_as_real(starts.resolve_conj())
        if len(kept) == 1:
            kept[0][START] = starts.resolve_conj().contiguous()
            return
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


def _flat(x: Tensor) -> Tensor:
    """Return matrices with at most one batch dimension."""
    return x if x.ndim <= 3 else x.reshape(-1, *x.shape[-2:])


def _shares(some: Tensor, other: Tensor) -> bool:
    return some.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _can_hold(x: Tensor, other: Tensor) -> bool:
    return x.dtype is other.dtype and x.device == other.device


def _are_same(some: Sequence[Any], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(map(operator.is_, some, others))
