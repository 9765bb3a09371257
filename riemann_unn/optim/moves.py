"""Moves: displacements become low-rank factors, and points move by them, small ones together."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import NonFiniteError
from ..linalg import newton_schulz_, polish_
from ..retractions import Retraction
from .points import Point, nonfinite

__all__ = ["Displacement", "Move", "Seeds", "apply_", "plan"]

# Matrices up to this size are cheaper to move together than one by one.
_STACK_UP_TO = 128 * 128
STEP, START, MASTER = "retraction_step", "sketch_start", "master"

State = MutableMapping[Tensor, dict[str, Any]]
# Points, their displacements as matrices, and what is kept of each between steps.
Batch = tuple[list[Point], list[Tensor], list[Mapping[str, Any]]]
_NOTHING: Mapping[str, Any] = {}


@dataclass(eq=False)
class Displacement:
    """What the base would add to the points of a group, ``scale`` times their tensors."""

    points: list[Point]
    tensors: list[Tensor]
    scale: float | Tensor
    retraction: Retraction


@dataclass(eq=False)
class Move:
    """Points of one kind that move together, with the factors A and B of their displacement."""

    points: list[Point]
    retraction: Retraction
    step: int
    a: Tensor
    b: Tensor


class Seeds:
    """Sources of random sketches: equal (seed, step, shape) give equal draws on any replica."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def generator(self, delta: Tensor, step: int) -> torch.Generator:
        """Return the generator for a displacement at a step, on its device."""
        generator = self._generators.get(delta.device)
        if generator is None:
            generator = self._generators[delta.device] = torch.Generator(delta.device)
        return generator.manual_seed(_mix(self.seed, step, *delta.shape[-2:]))


def _mix(*numbers: int) -> int:
    """Hash integers to 63 well-spread bits, the same on every machine (SplitMix64's finaliser)."""
    state, mask = 0, 2**64 - 1
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1


def plan(displacements: list[Displacement], state: State, seeds: Seeds) -> list[Move]:
    """Factor every displacement; nothing is changed.

    Raises:
        NonFiniteError: a displacement overflowed although its gradient is finite.
    """
    moves = []
    for d in displacements:
        if not d.retraction.shows_nonfinite and nonfinite(d.points, d.tensors):
            _refuse_overflow(displacements)
        batches: dict[Hashable, Batch] = {}
        for point, tensor in zip(d.points, d.tensors, strict=True):
            delta = point.manifold.displacement_matrices(tensor)
            kept = state.get(point.param, _NOTHING)
            key = _batch_key(point, delta, kept)
            batch = batches.get(key)
            if batch is None:
                batch = batches[key] = ([], [], [])
            batch[0].append(point)
            batch[1].append(delta)
            batch[2].append(kept)
        moves += [_factor(batch, d, seeds) for batch in batches.values()]
    # In the others not-a-number anywhere in Δ reaches A, so the thin factor tells.
    if nonfinite([move.points[0] for move in moves], [move.a for move in moves]):
        _refuse_overflow(displacements)
    return moves


def _refuse_overflow(displacements: list[Displacement]) -> None:
    bad = [
        point.name
        for d in displacements
        for point in nonfinite(d.points, [tensor * d.scale for tensor in d.tensors])
    ]
    names = ", ".join(bad) or "a tagged parameter"
    raise NonFiniteError(
        f"the step of {names} overflows to NaN or infinity although the gradient is finite; "
        "lower the learning rate. No tagged parameter was moved"
    )


def _batch_key(point: Point, delta: Tensor, kept: Mapping[str, Any]) -> Hashable:
    if delta.shape[-2] * delta.shape[-1] > _STACK_UP_TO:
        return id(point)
    start = kept.get(START)
    return point.kind, kept.get(STEP, 0), None if start is None else start.shape


def _factor(batch: Batch, displacement: Displacement, seeds: Seeds) -> Move:
    points, deltas, kept = batch
    retraction = displacement.retraction
    step = kept[0].get(STEP, 0)
    delta, start = _stack(deltas), None
    if START in kept[0]:
        start = _stack([_start_rows(state[START], deltas[0]) for state in kept])
        # A start of another shape is left from another rank: begin anew.
        if start.shape[-2:] != (retraction.rank, delta.shape[-2]):
            start = None
    a, b = retraction.factor(
        delta,
        start=start,
        generator=seeds.generator(delta, step),
        rounds=retraction.rounds_for(deltas[0].numel()),
    )
    return Move(points, retraction, step, a * displacement.scale, b)


def _start_rows(kept: Tensor, delta: Tensor) -> Tensor:
    # A real parameter may have complex matrices, but its state has to be real: torch casts a
    # state to the parameter's dtype when it is loaded.
    return kept if kept.is_complex() == delta.is_complex() else torch.view_as_complex(kept)


def apply_(move: Move, state: State, *, polish: bool, rough: set[Point]) -> None:
    """Move the points in place and note what their next step needs.

    Args:
        move: from :func:`plan`.
        state: the optimizer's state.
        polish: mend the block of columns whose turn it is.
        rough: points whose error is above rounding, to be mended whole; emptied of them.
    """
    points, retraction = move.points, move.retraction
    views = [point.matrices(point.value) for point in points]
    is_dense = retraction.is_dense_for(views[0].shape)
    moved = _moved(move)
    # Zero displacements leave their points bit for bit as they are.
    if bool(moved.any()):
        shared = _shares(views[0], points[0].value)
        # One matrix that is a view of its parameter moves in place; others as a copy.
        in_place = len(points) == 1 and views[0].ndim == 2 and shared
        all_moved = bool(moved.all())
        old = views[0] if in_place else _stack(views)
        is_copy = len(points) > 1 or not shared
        x = old if in_place or (is_copy and all_moved) else old.clone()
        retraction.apply_(x, move.a, move.b, special=points[0].manifold.det is not None)
        if polish:
            if not is_dense:
                polish_(x, step=move.step)
            elif not retraction.is_intrinsic_for(x.shape):  # which polish as they move
                newton_schulz_(x)  # costs no more than the step itself did
            if not rough.isdisjoint(points):
                newton_schulz_(newton_schulz_(x))
        rough.difference_update(points)
        if not in_place:
            _unstack(x if all_moved else torch.where(moved, x, old), points, views[0].shape)
    halves = points[0].is_half and _parts(move.a, len(points), views[0].shape[:-2])
    for i, point in enumerate(points):
        kept = state[point.param]
        kept[STEP] = move.step + 1
        if halves and bool(halves[i].any()):
            kept[MASTER] = point.value
            point.param.copy_(point.value)
    starts = None if is_dense else retraction.next_start(move.a)
    if starts is not None:
        _keep_starts(starts, points, views[0].shape[:-2], state)


def _moved(move: Move) -> Tensor:
    """Which matrices belong to a point with a displacement, ready to be broadcast."""
    if move.a.ndim == 2:
        return move.a.any()
    moved = (move.a != 0).any(dim=-1, keepdim=True).any(dim=-2, keepdim=True)
    if moved.numel() == 0:
        return moved
    value, manifold = move.points[0].value, move.points[0].manifold
    # A kernel's matrices are written, and so rounded, together.
    batch = value.shape[: value.ndim - manifold.point_dims(value)].numel()
    apart = moved.view(len(move.points) * batch, -1, 1, 1)
    return apart.any(dim=1, keepdim=True).expand_as(apart).reshape(moved.shape)


def _keep_starts(starts: Tensor, points: list[Point], batch: torch.Size, state: State) -> None:
    starts = starts.clone(memory_format=torch.contiguous_format).resolve_conj()
    if starts.is_complex() != points[0].param.is_complex():
        starts = torch.view_as_real(starts)
    for point, rows in zip(points, _parts(starts, len(points), batch), strict=True):
        state[point.param][START] = rows


def _stack(views: list[Tensor]) -> Tensor:
    """Return one matrix, or all matrices as one batch of them."""
    x = views[0] if len(views) == 1 else torch.stack(views)
    return x if x.ndim <= 3 else x.reshape(-1, *x.shape[-2:])


def _parts(x: Tensor, count: int, batch: torch.Size) -> Sequence[Tensor]:
    """Cut a stack of matrices, or of what belongs to them, into that of each point."""
    if not batch:
        return (x,) if count == 1 else x.unbind(0)
    parts: Sequence[Tensor] = x.unflatten(0, (count, *batch)).unbind(0)
    return parts


def _unstack(x: Tensor, points: list[Point], shape: torch.Size) -> None:
    """Write a stack of matrices back to the parameters whose views of this shape it holds."""
    values = [point.value for point in points]
    parts = _parts(x, len(points), shape[:-2])
    manifold, size = points[0].manifold, values[0].shape
    torch._foreach_copy_(values, [manifold.from_matrices(part, size) for part in parts])


def _shares(view: Tensor, value: Tensor) -> bool:
    return view.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
