"""Hooks of a step: torch's, for steps that somebody listens to."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from torch._C._autograd import _profiler_enabled
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from ..tagging.strangers import look

__all__ = ["hooked"]

P = ParamSpec("P")
R = TypeVar("R")

_STRANGERS = [look]


def hooked(step: Callable[P, R]) -> Callable[P, R]:
    """Wrap a step as torch does, to run hooks and to be profiled, but only if either is asked for.

    To enter and to leave a profiler's record takes as long as three operations of a small step.
    The hook that looks at strangers has nothing to see here, and is no reason for it.
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
