"""Scalars: numpy's as Python's, which every check, kernel and checkpoint takes."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["plain_scalars"]


def plain_scalars(value: Any) -> Any:
    """Return a number of numpy as Python's, also inside of tuples, lists and dicts.

    Anything else is returned as it is, arrays and tensors included. States of optimizers may hold
    no numpy scalars, which ``torch.load(weights_only=True)`` refuses.
    """
    if isinstance(value, np.generic):
        return value.item()
    if type(value) in (tuple, list):
        return type(value)(map(plain_scalars, value))
    if type(value) is dict:
        return {key: plain_scalars(entry) for key, entry in value.items()}
    return value
