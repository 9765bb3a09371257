"""Precision: switching autocast off."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

__all__ = ["full_precision", "in_full_precision", "is_full_precision"]

P = ParamSpec("P")
R = TypeVar("R")


# A module variable, since compilers do not use the caches of functions.
_found: list[str] = []


def _device_types() -> list[str]:
    if not _found:
        accelerator = torch.accelerator.current_accelerator()
        _found[:] = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    return _found


def is_full_precision(device_types: Iterable[str]) -> bool:
    """Tell whether autocast is off on some types of devices."""
    return not any(map(torch.is_autocast_enabled, device_types))


def full_precision(device_types: Iterable[str]) -> AbstractContextManager[object]:
    """Switch autocast off on some types of devices."""
    active = [device for device in device_types if torch.is_autocast_enabled(device)]
    if not active:
        return nullcontext()
    stack = ExitStack()
    for device in active:
        stack.enter_context(torch.autocast(device, enabled=False))
    return stack


def in_full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function give the same result under autocast, bit for bit, as without."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        active = [device for device in _device_types() if torch.is_autocast_enabled(device)]
        if not active:
            return function(*args, **kwargs)
        # Twice, since an interruption may end the first.
        try:
            try:
                for device in active:
                    torch.set_autocast_enabled(device, False)
                return function(*args, **kwargs)
            finally:
                for device in active:
                    torch.set_autocast_enabled(device, True)
        finally:
            for device in active:
                torch.set_autocast_enabled(device, True)

    return call
