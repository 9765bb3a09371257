"""Eager bases: those that have a state before the first step, as Adagrad has."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..interruption import restoring
from ..parallel import Computation, together
from ..retractions import Retraction
from .batch import State
from .batches import Batches
from .entries import STEP
from .seeds import Seeds
from .tagged import TaggedParam

if TYPE_CHECKING:
    from .shared import SharedPoint

__all__ = ["begin_"]


@torch.no_grad()
def begin_(
    members: list[TaggedParam],
    points: list[SharedPoint],
    state: State,
    seeds: Seeds,
    retraction_of: Callable[[dict[str, Any]], Retraction],
) -> None:
    """Note what a first step would, of parameters of which the base alone has noted something.

    torch's checkpoints take a step without gradients to find what an optimizer keeps, but not of
    one that has some state already. The parameters and their gradients stay as they are.

    Args:
        members: those of this process alone.
        points: those that several processes share, which all call this together.
        state: of the base.
        seeds: of the sketches.
        retraction_of: of a group.
    """
    members = [m for m in members if _is_begun_by_base(m, state)]
    points = [point for point in points if _is_begun_by_base(point.member, state)]
    noted = [*members, *(point.member for point in points)]
    given = [(member, member.param.grad, member.is_rough) for member in noted]

    def note() -> None:
        for member in noted:
            member.param.grad = torch.zeros_like(member.param)
        for batch in Batches(counts_on_device=False).of(members, state) if members else ():
            batch.sketch_(retraction_of(batch.group), seeds, 0.0)
            batch.retract_(state, polish=False)
        for point in points:
            if point.begin(state):
                point.renew_master()
                point.begin(state)
        together((p.place.group, _first_step(p, state, seeds, retraction_of)) for p in points)

    def restore() -> None:
        for member, grad, is_rough in given:
            member.param.grad, member.is_rough = grad, is_rough

    restoring(note, restore)
    for member in noted:
        kept = state[member.param]
        kept[STEP] = 0  # the first is still to be taken
        for name, value in kept.items() if member.is_half else ():
            if isinstance(value, Tensor) and value.dtype is member.param.dtype:
                kept[name] = value.float()  # as bases keep it that begin with the first step


def _is_begun_by_base(member: TaggedParam, state: State) -> bool:
    kept = state.get(member.param)
    return kept is not None and len(kept) > 0 and STEP not in kept


def _first_step(
    point: SharedPoint,
    state: State,
    seeds: Seeds,
    retraction_of: Callable[[dict[str, Any]], Retraction],
) -> Computation:
    yield from point.sketch(retraction_of(point.group), seeds)
    yield from point.retract_(state, polish=False)
