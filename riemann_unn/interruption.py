"""Interruption: what an exception at any line, as Ctrl-C raises it, leaves done or undone.

Python may raise ``KeyboardInterrupt`` between any two lines, those of a ``finally`` block and of a
context manager's ``__exit__`` included, but not inside of a call into C. So work is done aside and
committed by one such call, or undone by a function that may run twice and is called from two nested
blocks: an exception that cuts off the first run leaves the second.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

__all__ = ["each", "no_grad", "restoring", "undoing"]

P = ParamSpec("P")
R = TypeVar("R")


def each(function: Callable[..., object], *arguments: Iterable[Any]) -> None:
    """Call a function of C for its effect on each of some arguments, with no line in between."""
    deque(map(function, *arguments), maxlen=0)


def restoring(work: Callable[[], R], restore: Callable[[], object]) -> R:
    """Do work, and restore afterwards whatever happens.

    ``restore`` runs twice: what is restored already must stay so at every line of the second run.
    """
    try:
        try:
            return work()
        finally:
            restore()
    finally:
        restore()


def undoing(work: Callable[[], R], undo: Callable[[], object]) -> R:
    """Do work, and undo it if it raises, by a function as :func:`restoring` asks for."""
    try:
        try:
            return work()
        except BaseException:
            undo()
            raise
    except BaseException:
        undo()
        raise


def no_grad(function: Callable[P, R]) -> Callable[P, R]:
    """Record no gradients in a function, as ``torch.no_grad()`` whose exit may be interrupted."""

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
