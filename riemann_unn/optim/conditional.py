"""Steps of a base that are kept or undone by a flag on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

from ..interruption import restoring
from .entries import OWN

__all__ = ["step_where"]

# Initial values other than zero of state entries, and entries that are recomputed at each step.
_FIRST = {"mu_product": 1.0}
_FOLLOWING = {"eta", "mu", "step_size"}
# Bases whose fused kernels skip a step by a flag, the first step included.
_FUSED = (Adam, AdamW)


def step_where(
    base: Optimizer,
    step: Callable[[], None],
    params: Iterable[tuple[Tensor, Tensor]],
    flags: Iterable[tuple[Tensor, Tensor]],
) -> None:
    """Step a base, and undo it where a flag is not set, without reading the flag.

    Args:
        base: the optimizer.
        step: takes the step.
        params: parameters that the base moves, with their flags.
        flags: parameters whose state it changes, with their flags.
    """
    flags = list(flags)
    taken = _one_flag(base, flags)
    if taken is not None:
        _step_if(base, step, taken)
        return
    values = [(p.detach(), p.detach().clone(), ok) for p, ok in params]
    before = {id(p): {name: value.clone() for name, value in _tensors(base, p)} for p, _ in flags}
    step()
    for value, old, ok in values:
        torch.where(ok, value, old, out=value)
    for p, ok in flags:
        for name, value in _tensors(base, p):
            if value.device != ok.device:  # a count on the host
                continue
            kept = before[id(p)].get(name)
            if kept is not None:
                torch.where(ok, value, kept, out=value)
            elif name not in _FOLLOWING:  # new, of a step that is not taken
                value.copy_(torch.where(ok, value, _FIRST.get(name, 0.0)))


def _one_flag(base: Optimizer, flags: list[tuple[Tensor, Tensor]]) -> Tensor | None:
    """Return the common flag of all parameters, if the base itself can skip a step by it."""
    if type(base) not in _FUSED or not all(group["fused"] for group in base.param_groups):
        return None
    where = {(flag.device, flag.data_ptr()) for _, flag in flags}
    return flags[0][1] if len(where) == 1 else None


def _step_if(base: Any, step: Callable[[], None], taken: Tensor) -> None:
    """Step a fused base that skips the step by a flag on the device, as torch's GradScaler does."""

    def forget() -> None:
        base.__dict__.pop("found_inf", None)

    base.found_inf = (~taken).float()
    restoring(step, forget)


def _tensors(base: Optimizer, p: Tensor) -> list[tuple[str, Tensor]]:
    kept: dict[str, Any] = base.state.get(p, {})
    return [
        (name, value)
        for name, value in kept.items()
        if isinstance(value, Tensor) and name not in OWN
    ]
