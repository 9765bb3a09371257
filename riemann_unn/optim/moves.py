"""Moves: displacements become low-rank factors, and points move by them, small ones together."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
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


@dataclass(eq=False)
class Displacement:
    """What the base would add to a point, ``scale * tensor``, and how the point retracts."""

    point: Point
    tensor: Tensor
    scale: float | Tensor
    retraction: Retraction


@dataclass(eq=False)
class Move:
    """Points that move in one batched call, with the factors A and B of their displacement."""

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
    batches: dict[Any, list[tuple[Displacement, Tensor]]] = {}
    for d in displacements:
        delta = d.point.manifold.displacement_matrices(d.tensor)
        batches.setdefault(_batch_key(d, delta, state), []).append((d, delta))
    whole = [d for d in displacements if not d.retraction.shows_nonfinite]
    if nonfinite([d.point for d in whole], [d.tensor for d in whole]):
        _refuse_overflow(displacements)
    moves = [_factor(batch, state, seeds) for batch in batches.values()]
    # In the others not-a-number anywhere in Δ reaches A, so the thin factor tells.
    if nonfinite([move.points[0] for move in moves], [move.a for move in moves]):
        _refuse_overflow(displacements)
    return moves


def _refuse_overflow(displacements: list[Displacement]) -> None:
    bad = nonfinite([d.point for d in displacements], [d.tensor * d.scale for d in displacements])
    names = ", ".join(point.name for point in bad) or "a tagged parameter"
    raise NonFiniteError(
        f"the step of {names} overflows to NaN or infinity although the gradient is finite; "
        "lower the learning rate. No tagged parameter was moved"
    )


def _batch_key(d: Displacement, delta: Tensor, state: State) -> Any:
    point = d.point
    shape = delta.shape[-2:]
    if shape.numel() > _STACK_UP_TO:
        return id(point)
    kept = state.get(point.param, {})
    return (
        id(point.group),
        shape,
        d.retraction.rounds_for(delta.numel()),
        delta.dtype,
        point.param.dtype,
        point.param.device,
        point.manifold.det,
        kept.get(STEP, 0),
        _start_rows(kept[START], delta).shape[-2:] if START in kept else None,
    )


def _factor(batch: list[tuple[Displacement, Tensor]], state: State, seeds: Seeds) -> Move:
    first, alone = batch[0]
    kept = state.get(first.point.param, {})
    step = kept.get(STEP, 0)
    delta = _stack([matrices for _, matrices in batch])
    starts = []
    if START in kept:
        starts = [_start_rows(state[d.point.param][START], m) for d, m in batch]
    start = None
    # A start of another shape is left from another rank: begin anew.
    if starts and starts[0].shape[-2:] == (first.retraction.rank, delta.shape[-2]):
        start = _stack(starts)
    a, b = first.retraction.factor(
        delta,
        start=start,
        generator=seeds.generator(delta, step),
        rounds=first.retraction.rounds_for(alone.numel()),
    )
    return Move([d.point for d, _ in batch], first.retraction, step, a * first.scale, b)


# A real parameter may have complex matrices, but its state has to be real: torch casts a state
# to the parameter's dtype when it is loaded.


def _start_rows(kept: Tensor, delta: Tensor) -> Tensor:
    as_stored = kept.is_complex() == delta.is_complex()
    return kept if as_stored else torch.view_as_complex(kept)


def _start_to_keep(rows: Tensor, param: Tensor) -> Tensor:
    return rows if rows.is_complex() == param.is_complex() else torch.view_as_real(rows)


def apply_(move: Move, state: State, *, polish: bool, rough: set[Tensor]) -> None:
    """Move the points in place and note what their next step needs.

    Args:
        move: from :func:`plan`.
        state: the optimizer's state.
        polish: mend the block of columns whose turn it is.
        rough: parameters whose error is above rounding, to be mended whole; emptied of them.
    """
    params = [point.param for point in move.points]
    views = [point.matrices(point.value) for point in move.points]
    counts = [view.shape[:-2].numel() for view in views]
    moved = _moved(move.a, move.points, counts)
    # Zero displacements leave their points bit for bit as they are.
    if bool(moved.any()):
        shared = _shares(views[0], move.points[0].value)
        # One matrix that is a view of its parameter moves in place; others as a copy.
        in_place = len(params) == 1 and views[0].ndim == 2 and shared
        all_moved = bool(moved.all())
        old = views[0] if in_place else _stack(views)
        is_copy = len(params) > 1 or not shared
        x = old if in_place or (is_copy and all_moved) else old.clone()
        move.retraction.apply_(x, move.a, move.b, special=move.points[0].manifold.det is not None)
        if polish:
            if not move.retraction.is_dense_for(x.shape):
                polish_(x, step=move.step)
            elif not move.retraction.is_intrinsic_for(x.shape):  # which polish as they move
                newton_schulz_(x)  # costs no more than the step itself did
            if not rough.isdisjoint(params):
                newton_schulz_(newton_schulz_(x))
        rough.difference_update(params)
        if not in_place:
            _unstack(x if all_moved else torch.where(moved, x, old), move.points, views, counts)
    for point, part in zip(move.points, _parts(move.a, counts), strict=True):
        state[point.param][STEP] = move.step + 1
        if point.is_half and bool(part.any()):
            state[point.param][MASTER] = point.value
            point.param.copy_(point.value)
    if not move.retraction.is_dense_for(views[0].shape):
        starts = move.retraction.next_start(move.a)
        if starts is not None:
            _keep_starts(starts, move.points, views, counts, state)


def _moved(a: Tensor, points: list[Point], counts: list[int]) -> Tensor:
    """Which matrices belong to a point with a displacement, ready to be broadcast."""
    if a.ndim == 2:
        return a.any()
    moved = (a != 0).any(dim=-1, keepdim=True).any(dim=-2, keepdim=True)
    if max(counts) <= 1:
        return moved
    for point, part in zip(points, _parts(moved, counts), strict=True):
        batch = point.value.shape[: point.value.ndim - point.manifold.point_dims(point.value)]
        if part.shape[:-2].numel() > batch.numel():
            # A kernel's matrices are written, and so rounded, together.
            together = part.view(*batch, -1, 1, 1)
            together.copy_(together.any(dim=-3, keepdim=True))
    return moved


def _keep_starts(
    starts: Tensor, points: list[Point], views: list[Tensor], counts: list[int], state: State
) -> None:
    starts = starts.clone(memory_format=torch.contiguous_format).resolve_conj()
    for point, view, rows in zip(points, views, _parts(starts, counts), strict=True):
        if rows.shape[:-2] != view.shape[:-2]:
            rows = rows.reshape(*view.shape[:-2], *rows.shape[-2:])
        state[point.param][START] = _start_to_keep(rows, point.param)


def _stack(views: list[Tensor]) -> Tensor:
    if len(views) == 1 and views[0].ndim <= 3:
        return views[0]
    if all(view.ndim == 2 for view in views):
        return torch.stack(views)
    return torch.cat([view.reshape(-1, *view.shape[-2:]) for view in views])


def _parts(x: Tensor, counts: list[int]) -> Sequence[Tensor]:
    """Cut a stack into the matrices of each point, those of single matrices without a batch."""
    if x.ndim == 2:
        return (x,)
    return x.unbind(0) if max(counts) == min(counts) == 1 else x.split(counts)


def _unstack(x: Tensor, points: list[Point], views: list[Tensor], counts: list[int]) -> None:
    """Write a stack of matrices back to the parameters it was made from."""
    values = [point.value for point in points]
    news = [
        point.manifold.from_matrices(
            part if part.shape == view.shape else part.reshape(view.shape), value.shape
        )
        for point, part, view, value in zip(points, _parts(x, counts), views, values, strict=True)
    ]
    torch._foreach_copy_(values, news)


def _shares(view: Tensor, value: Tensor) -> bool:
    return view.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
