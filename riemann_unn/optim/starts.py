"""Warm starts: the columns that the next sketch begins with, as a parameter's state keeps them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["stored_start", "usable_start"]


def stored_start(rows: Tensor, param: Tensor) -> Tensor:
    """Return rows ``(..., k, n)`` as a state holds them: real for real parameters.

    A real parameter may have complex matrices, but torch casts a state to the parameter's dtype
    when it is loaded.
    """
    if rows.is_complex() != param.is_complex():
        rows = torch.view_as_real(rows.resolve_conj())
    return rows.resolve_conj()


def usable_start(stored: Tensor, like: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """Return stored rows ``(..., k, n)``, or None where they are of another shape.

    Args:
        stored: from :func:`stored_start`, of one parameter or several side by side.
        like: a tensor of the required dtype and device.
        shape: ``(k, n)`` or ``(batch, k, n)``; another shape is that of another rank.
    """
    rows = stored if stored.is_complex() == like.is_complex() else torch.view_as_complex(stored)
    if rows.dtype is not like.dtype or rows.device != like.device:
        rows = rows.to(like.device, like.dtype)
    rows = rows if rows.ndim <= 3 else rows.reshape(-1, *rows.shape[-2:])
    return rows if rows.shape == shape else None
