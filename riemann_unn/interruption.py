"""Interruptions: code that an exception at any line, as Ctrl-C raises it, leaves consistent.

Python may raise ``KeyboardInterrupt`` between any two lines, those of a ``finally`` block and of a
context manager's ``__exit__`` included, but not inside a call into C. So results are computed
first and committed by one such call, or undone by a function that may run twice and is called from
two nested blocks: an exception that interrupts the first run leaves the second.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import nn

__all__ = [
    "afterwards",
    "each",
    "no_grad",
    "random_states",
    "restoring",
    "undoing",
    "without_torch_function",
]

P = ParamSpec("P")
R = TypeVar("R")


def each(function: Callable[..., object], *arguments: Iterable[Any]) -> None:
    """Call a C function on each of some arguments, without Python code in between."""
    deque(map(function, *arguments), maxlen=0)


def without_torch_function(function: Callable[[], R]) -> R:
    """Call a function with ``__torch_function__`` disabled, for tensors and modes.

    One call into C: torch's own context for it may be interrupted at its exit, and would then leave
    it disabled in the thread.
    """
    result: R = torch._C._disabled_torch_function_impl(function, (), (), {})
    return result


def restoring(work: Callable[[], R], restore: Callable[[], object]) -> R:
    """Run ``work``, and ``restore`` afterwards whatever happens.

    ``restore`` may run twice; its second run must keep the state restored at every line.
    """
    try:
        try:
            return work()
        finally:
            restore()
    except BaseException:
        restore()
        raise


def undoing(work: Callable[[], R], undo: Callable[[], object]) -> R:
    """Run ``work``, and ``undo`` if it raises, which may run twice as in :func:`restoring`."""
    try:
        try:
            return work()
        except BaseException:
            undo()
            raise
    except BaseException:
        undo()
        raise


def afterwards(restore: Callable[[], object]) -> ExitStack:
    """Return a context that restores when it is left, and at no other time.

    The generator of a ``contextmanager`` whose exit was interrupted resumes when it is collected,
    and would overwrite later changes of the user.
    """
    stack = ExitStack()
    stack.callback(restore)
    return stack


def random_states(model: nn.Module) -> Callable[[], None]:
    """Record the global random states, on the devices of a model too; return what restores them."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    indices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    cuda = [(index, torch.cuda.get_rng_state(index)) for index in sorted(indices)]

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        for index, state in cuda:
            torch.cuda.set_rng_state(state, index)

    return restore


def no_grad(function: Callable[P, R]) -> Callable[P, R]:
    """Disable gradients in a function, as ``torch.no_grad()``, safely for interruptions."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        mode = torch.is_grad_enabled()
        try:
            try:
                torch._C._set_grad_enabled(False)
                return function(*args, **kwargs)
            finally:
                torch._C._set_grad_enabled(mode)
        finally:
            torch._C._set_grad_enabled(mode)

    return call
