"""Initial states of parameters whose base has a state before the first step, as Adagrad."""

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
    from .shared import SharedParam

__all__ = ["begin_states_"]


@torch.no_grad()
def begin_states_(
    members: list[TaggedParam],
    points: list[SharedParam],
    state: State,
    seeds: Seeds,
    retraction_of: Callable[[dict[str, Any]], Retraction],
) -> None:
    """Add the entries that a first step would add, to states that the base alone has initialised.

    torch's checkpoints take a step with zero gradients to find an optimizer's entries, but not
    where it has some state already. The parameters and their gradients do not change.

    Args:
        members: parameters of this process alone.
        points: parameters that several processes share, all of which call this.
        state: of the base.
        seeds: of the sketches.
        retraction_of: of a group.
    """
    members = [m for m in members if _has_base_state_only(m, state)]
    points = [point for point in points if _has_base_state_only(point.member, state)]
    chosen = [*members, *(point.member for point in points)]
    before = [(member, member.param.grad, member.is_inexact) for member in chosen]

    def take_zero_step() -> None:
        for member in chosen:
            member.param.grad = torch.zeros_like(member.param)
        for batch in Batches(counts_on_device=False).of(members, state) if members else ():
            batch.sketch_(retraction_of(batch.group), seeds, 0.0)
            batch.retract_(state, polish=False)
        for point in points:
            if point.begin(state):
                point.renew_master()
                point.begin(state)
        together((p.placement.group, _first_step(p, state, seeds, retraction_of)) for p in points)

    def restore() -> None:
        for member, grad, is_inexact in before:
            member.param.grad, member.is_inexact = grad, is_inexact

    restoring(take_zero_step, restore)
    for member in chosen:
        kept = state[member.param]
        kept[STEP] = 0  # no step has been taken
        for name, value in kept.items() if member.is_half else ():
            if isinstance(value, Tensor) and value.dtype is member.param.dtype:
                kept[name] = value.float()  # as bases do that initialise at the first step


def _has_base_state_only(member: TaggedParam, state: State) -> bool:
    kept = state.get(member.param)
    return kept is not None and len(kept) > 0 and STEP not in kept


def _first_step(
    point: SharedParam,
    state: State,
    seeds: Seeds,
    retraction_of: Callable[[dict[str, Any]], Retraction],
) -> Computation:
    yield from point.sketch(retraction_of(point.group), seeds)
    yield from point.retract_(state, polish=False)
