"""Moves: displacements become low-rank factors, and points move by them, small ones together."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import NonFiniteError
from ..linalg import newton_schulz_, polish_
from ..retractions import Retraction
from .points import Point, nonfinite
from .stacks import START, Stack, Stacks, State

__all__ = ["Displacement", "Move", "Seeds", "apply_", "plan", "pulled_back"]

STEP, MASTER = "retraction_step", "master"

# Points, their displacements, and what is kept of each between steps.
Batch = tuple[list[Point], list[Tensor], list[dict[str, Any]]]
_NOTHING: dict[str, Any] = {}


@dataclass(eq=False)
class Displacement:
    """What the base would add to the points of a group, ``scale`` times their tensors."""

    points: list[Point]
    tensors: list[Tensor]
    scale: float | Tensor
    retraction: Retraction


@dataclass(eq=False)
class Move:
    """Points of one kind that move together, with the factors A and B of their displacement.

    ``shortest`` and ``longest`` are the least and the greatest Frobenius norm of a matrix in A, to
    single precision: zero and infinity can be underflow and overflow. ``norm`` is that of a single
    matrix, where it has been read anyway.
    """

    stack: Stack
    retraction: Retraction
    step: int
    a: Tensor
    b: Tensor
    kept: list[dict[str, Any]]
    shortest: float = 0.0
    longest: float = 0.0
    norm: Tensor | None = None


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


def plan(
    displacements: list[Displacement], state: State, seeds: Seeds, stacks: Stacks
) -> list[Move]:
    """Factor every displacement; nothing is changed.

    Raises:
        NonFiniteError: a displacement overflowed although its gradient is finite.
    """
    moves = []
    for d in displacements:
        if not d.retraction.shows_nonfinite and nonfinite(d.points, d.tensors):
            _refuse_overflow(displacements)
        moves += [_factor(batch, d, seeds, stacks) for batch in _batches(d, state)]
    # In the others not-a-number anywhere in Δ reaches A, so the thin factor tells.
    _measure(moves)
    suspects = [move for move in moves if not math.isfinite(move.longest)]
    if nonfinite([move.stack.points[0] for move in suspects], [move.a for move in suspects]):
        _refuse_overflow(displacements)
    return moves


def _batches(displacement: Displacement, state: State) -> list[Batch]:
    """Put what can move together together."""
    points, tensors = displacement.points, displacement.tensors
    kept = [state.get(point.param, _NOTHING) for point in points]
    # Asked one by one, since many keys at once would set the garbage collector to work.
    if (
        len({point.kind for point in points}) == 1
        and len({known.get(STEP, 0) for known in kept}) == 1
        and len({START in known for known in kept}) == 1
    ):
        return [(points, tensors, kept)]
    batches: dict[Hashable, Batch] = {}
    for point, tensor, known in zip(points, tensors, kept, strict=True):
        key = (point.kind, known.get(STEP, 0), START in known)
        batch = batches.get(key)
        if batch is None:
            batch = batches[key] = ([], [], [])
        batch[0].append(point)
        batch[1].append(tensor)
        batch[2].append(known)
    return list(batches.values())


def _measure(moves: list[Move]) -> None:
    """Find the lengths of moves, after one look at all that are on one device."""
    found = []
    for move in moves:
        if move.a.ndim == 2 and move.a.is_cpu:
            move.norm = torch.linalg.vector_norm(move.a)
            move.shortest = move.longest = move.norm.item()
        elif move.a.numel() > 0:
            found.append(move)
    norms = [torch.linalg.vector_norm(move.a, dim=(-2, -1)) for move in found]
    ends = [torch.stack(norm.aminmax()) for norm in norms]
    together = len({(pair.device, pair.dtype) for pair in ends}) == 1
    read = torch.stack(ends).tolist() if together else [pair.tolist() for pair in ends]
    for move, (shortest, longest) in zip(found, read, strict=True):
        move.shortest, move.longest = shortest, longest


def pulled_back(points: list[Point], grads: list[Tensor], retraction: Retraction) -> list[Tensor]:
    """Return gradients in Lie-algebra coordinates, small ones of one kind together."""
    alike: dict[int, list[int]] = {}
    for i, point in enumerate(points):
        alike.setdefault(point.kind, []).append(i)
    result = list(grads)
    for members in alike.values():
        first, shape = points[members[0]], grads[members[0]].shape
        x = [points[i].matrices(points[i].value) for i in members]
        if not retraction.is_intrinsic_for(x[0].shape):
            continue
        g = [first.matrices(grads[i]) for i in members]
        if len(members) == 1:
            coordinates = [retraction.pull_back(x[0], g[0])]
        else:
            coordinates = list(retraction.pull_back(torch.stack(x), torch.stack(g)).unbind(0))
        for i, one in zip(members, coordinates, strict=True):
            result[i] = first.manifold.from_matrices(one, shape)
    return result


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


def _factor(batch: Batch, displacement: Displacement, seeds: Seeds, stacks: Stacks) -> Move:
    points, tensors, kept = batch
    retraction, stack = displacement.retraction, stacks.of(points)
    step = kept[0].get(STEP, 0)
    delta = stack.displacement(tensors)
    start = stack.starts(kept, delta)
    # A start of another shape is left from another rank: begin anew.
    if start is not None and start.shape[-2:] != (retraction.rank, delta.shape[-2]):
        start = None
    a, b = retraction.factor(
        delta,
        start=start,
        generator=seeds.generator(delta, step),
        rounds=retraction.rounds_for(delta.numel() // len(points)),
    )
    return Move(stack, retraction, step, a * displacement.scale, b, kept)


def apply_(move: Move, state: State, *, polish: bool, rough: set[Point]) -> None:
    """Move the points in place and note what their next step needs.

    Args:
        move: from :func:`plan`.
        state: the optimizer's state.
        polish: mend the block of columns whose turn it is.
        rough: points whose error is above rounding, to be mended whole; emptied of them.
    """
    stack, retraction = move.stack, move.retraction
    points = stack.points
    is_dense = retraction.is_dense_for(torch.Size((move.a.shape[-2], move.b.shape[-2])))
    # Zero displacements leave their points bit for bit as they are.
    moved = None if move.shortest > 0 else _moved(move)
    if moved is None or bool(moved.any()):
        if moved is not None and (moved.ndim == 0 or bool(moved.all())):
            moved = None
        x = stack.gather()
        old = x.clone() if moved is not None else x
        retraction.apply_(x, move.a, move.b, special=points[0].manifold.det is not None)
        if polish:
            if not is_dense:
                polish_(x, step=move.step)
            elif not retraction.is_intrinsic_for(x.shape):  # which polish as they move
                newton_schulz_(x)  # costs no more than the step itself did
            if not rough.isdisjoint(points):
                newton_schulz_(newton_schulz_(x))
        rough.difference_update(points)
        if moved is not None:
            x.copy_(torch.where(moved, x, old))
        stack.scatter(x, moved)
    if any(kept is _NOTHING for kept in move.kept):
        move.kept = [state[point.param] for point in points]
    for kept in move.kept:
        kept[STEP] = move.step + 1
    if points[0].is_half:
        _round_masters(move)
    starts = None if is_dense else retraction.next_start(move.a, length=move.norm)
    if starts is not None:
        stack.keep_starts(starts, move.kept)


def _round_masters(move: Move) -> None:
    points = move.stack.points
    moved = move.a.reshape(len(points), -1).any(dim=1).tolist()
    for point, kept, has_moved in zip(points, move.kept, moved, strict=True):
        if has_moved:
            kept[MASTER] = point.value
            point.param.copy_(point.value)


def _moved(move: Move) -> Tensor:
    """Which matrices belong to a point with a displacement, ready to be broadcast."""
    if move.a.ndim == 2:
        return move.a.any()
    moved = (move.a != 0).any(dim=-1, keepdim=True).any(dim=-2, keepdim=True)
    if moved.numel() == 0:
        return moved
    points = move.stack.points
    value, manifold = points[0].value, points[0].manifold
    # A kernel's matrices are written, and so rounded, together.
    batch = value.shape[: value.ndim - manifold.point_dims(value)].numel()
    apart = moved.view(len(points) * batch, -1, 1, 1)
    return apart.any(dim=1, keepdim=True).expand_as(apart).reshape(moved.shape)
