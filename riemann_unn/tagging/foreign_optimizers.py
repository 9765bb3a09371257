"""A warning for optimizers of torch.optim that are given tagged parameters."""

from __future__ import annotations

import warnings
from typing import Any
from weakref import WeakSet

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..manifolds import MatrixManifold

__all__ = ["warn_if_tagged", "watch_foreign_optimizers"]

# Optimizers that have been checked since the last tag was set.
_checked: WeakSet[Optimizer] = WeakSet()
_has_hook = _has_warned = False


def watch_foreign_optimizers() -> None:
    """Check each optimizer of torch.optim at its first step, until one warning has been given.

    Other classes are not checked: geoopt's support manifolds, and so may classes of users.
    """
    global _has_hook
    _checked.clear()
    if not _has_hook:
        register_optimizer_step_pre_hook(warn_if_tagged)
        _has_hook = True


def warn_if_tagged(optimizer: Optimizer, *_: Any) -> None:
    """Warn if an optimizer of torch.optim has tagged parameters; a hook before its steps."""
    if (
        _has_warned
        or torch.compiler.is_compiling()
        or not type(optimizer).__module__.startswith("torch.optim.")
        or optimizer in _checked
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
    _checked.add(optimizer)


def _warn(optimizer: Optimizer, name: str, manifold: object) -> None:
    global _has_warned
    kind = type(optimizer).__name__
    # Where warnings are errors this raises, at every later step too.
    warnings.warn(
        f"torch.optim.{kind} was given {name}, which is tagged {manifold!r}: it knows no tags and "
        f"trains it unconstrained; use riemann_unn.optim.ProjUNNT(..., base=torch.optim.{kind}), "
        "or riemann_unn.untag_ the parameter. This is said once",
        stacklevel=4,
    )
    _has_warned = True
