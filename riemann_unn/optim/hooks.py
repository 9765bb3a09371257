"""Hooks of a step: torch's wrapper, skipped where there are no hooks and no profiler."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from torch._C._autograd import _profiler_enabled
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from ..tagging.foreign_optimizers import warn_if_tagged

__all__ = ["hooked"]

P = ParamSpec("P")
R = TypeVar("R")

_STRANGERS = [warn_if_tagged]


def hooked(step: Callable[P, R]) -> Callable[P, R]:
    """Wrap a step as torch does, but only where there are hooks or a profiler.

    A profiler's record takes as long as three operations of a small step. The package's own hook,
    which warns of other optimizers, does not count.
    """
    heard = Optimizer.profile_hook_step(step)

    @wraps(step)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        optimizer: Any = args[0]
        is_heard = (
            optimizer._optimizer_step_pre_hooks
            or optimizer._optimizer_step_post_hooks
            or list(_global_optimizer_pre_hooks.values()) != _STRANGERS
            or _global_optimizer_post_hooks
            or _profiler_enabled()
        )
        return (heard if is_heard else step)(*args, **kwargs)

    return call
