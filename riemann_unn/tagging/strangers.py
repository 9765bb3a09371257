"""Strangers: optimizers of torch.optim that are given tagged parameters, and know of no tag."""

from __future__ import annotations

import warnings
from typing import Any
from weakref import WeakSet

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..manifolds import MatrixManifold

__all__ = ["look", "watch_strangers"]

# Optimizers whose parameters have been looked at since the last tag was given.
_met: WeakSet[Optimizer] = WeakSet()
_is_watching = _has_warned = False


def watch_strangers() -> None:
    """Have the first step of each optimizer of torch.optim looked at, until one is warned of.

    Others are left alone: geoopt's know what a manifold is, and so may anybody's own.
    """
    global _is_watching
    _met.clear()
    if not _is_watching:
        register_optimizer_step_pre_hook(look)
        _is_watching = True


def look(optimizer: Optimizer, *_: Any) -> None:
    """Warn of an optimizer of torch.optim that has tagged parameters: a hook before its steps."""
    if (
        _has_warned
        or torch.compiler.is_compiling()
        or not type(optimizer).__module__.startswith("torch.optim.")
        or optimizer in _met
    ):
        return
    for index, group in enumerate(optimizer.param_groups):
        names = group.get("param_names")
        for i, p in enumerate(group["params"]):
            if isinstance(getattr(p, "manifold", None), MatrixManifold) and p.requires_grad:
                name = names[i] if names else getattr(p, "tagged_as", None)
                where = f"param_groups[{index}]['params'][{i}]" if name is None else repr(name)
                _warn(optimizer, where, p.manifold)
                return
    _met.add(optimizer)


def _warn(optimizer: Optimizer, name: str, manifold: object) -> None:
    global _has_warned
    kind = type(optimizer).__name__
    # Where warnings are errors this raises, and every later step does.
    warnings.warn(
        f"torch.optim.{kind} was given {name}, which is tagged {manifold!r}: it knows no tags and "
        f"trains it unconstrained; use riemann_unn.optim.ProjUNNT(..., base=torch.optim.{kind}), "
        "or riemann_unn.untag_ the parameter. This is said once",
        stacklevel=4,
    )
    _has_warned = True
