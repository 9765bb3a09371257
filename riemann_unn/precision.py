"""Precision: switching autocast off where numbers must keep their own."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch

__all__ = ["full_precision"]


def full_precision(device_types: Iterable[str]) -> AbstractContextManager[object]:
    """Switch autocast off on some types of devices."""
    active = [device for device in device_types if torch.is_autocast_enabled(device)]
    if not active:
        return nullcontext()
    stack = ExitStack()
    for device in active:
        stack.enter_context(torch.autocast(device, enabled=False))
    return stack
