"""Eager bases: those that have a state before the first step, as Adagrad has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..retractions import Retraction
from .batch import Batches, State
from .entries import STEP
from .seeds import Seeds
from .tagged import TaggedParam

__all__ = ["begin_"]


@torch.no_grad()
def begin_(
    members: list[TaggedParam],
    state: State,
    seeds: Seeds,
    retraction_of: Callable[[dict[str, Any]], Retraction],
) -> None:
    """Note what a first step would, of members of which the base alone has noted something.

    torch's checkpoints take a step without gradients to find what an optimizer keeps, but not of
    one that has some state already. The parameters and their gradients stay as they are.
    """
    members = [m for m in members if state.get(m.param) and STEP not in state[m.param]]
    given = [(member, member.param.grad, member.is_rough) for member in members]
    try:
        for member in members:
            member.param.grad = torch.zeros_like(member.param)
        for batch in Batches().of(members, state) if members else ():
            batch.sketch_(retraction_of(batch.group), seeds, 0.0)
            batch.retract_(state, polish=False)
    finally:
        for member, grad, is_rough in given:
            member.param.grad, member.is_rough = grad, is_rough
    for member in members:
        kept = state[member.param]
        kept[STEP] = 0  # the first is still to be taken
        for name, value in kept.items() if member.is_half else ():
            if isinstance(value, Tensor) and value.dtype is member.param.dtype:
                kept[name] = value.float()  # as bases keep it that begin with the first step
