"""Keeping what a base has written, or what was there before, as a flag on the device says."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .entries import OWN

__all__ = ["step_where"]

# What bases begin with other than zero, and what they set from other entries or leave as it was.
_FIRST = {"mu_product": 1.0}
_FOLLOWING = {"eta", "mu", "step_size"}


def step_where(
    base: Optimizer,
    step: Callable[[], None],
    params: Iterable[tuple[Tensor, Tensor]],
    flags: Iterable[tuple[Tensor, Tensor]],
) -> None:
    """Step a base, and undo it where a flag is not set, without a look at the flag.

    Args:
        base: the optimizer.
        step: takes the step.
        params: parameters that the base moves, with their flags.
        flags: parameters whose state it changes, with their flags.
    """
    flags = list(flags)
    values = [(p.detach(), p.detach().clone(), ok) for p, ok in params]
    before = {id(p): {name: value.clone() for name, value in _tensors(base, p)} for p, _ in flags}
    step()
    for value, old, ok in values:
        torch.where(ok, value, old, out=value)
    for p, ok in flags:
        for name, value in _tensors(base, p):
            if value.device != ok.device:  # a count that the base keeps on the host
                continue
            kept = before[id(p)].get(name)
            if kept is not None:
                torch.where(ok, value, kept, out=value)
            elif name not in _FOLLOWING:  # begun by a step that is not taken
                value.copy_(torch.where(ok, value, _FIRST.get(name, 0.0)))


def _tensors(base: Optimizer, p: Tensor) -> list[tuple[str, Tensor]]:
    kept: dict[str, Any] = base.state.get(p, {})
    return [
        (name, value)
        for name, value in kept.items()
        if isinstance(value, Tensor) and name not in OWN
    ]
