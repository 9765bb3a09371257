"""Conversions: the dtype of a parameter may not change once it has optimizer state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ManifoldError
from .entries import OWN

__all__ = ["refuse_conversions"]

_HALF = (torch.float16, torch.bfloat16)


def refuse_conversions(
    params: Iterable[tuple[str, Tensor, torch.dtype]],
    state: MutableMapping[Tensor, dict[str, Any]],
) -> None:
    """Refuse parameters that have another dtype than their state was made for.

    The state of plain SGD, the start of its sketches, may be converted, unless the parameter
    changes between half and higher precision, since only the former has a master copy.

    Args:
        params: names and parameters, with the dtypes they had.
        state: the optimizer's.

    Raises:
        ManifoldError: naming the parameter.
    """
    for name, p, was in params:
        kept: Mapping[str, Any] = state.get(p, {})
        is_other_kind = (was in _HALF) != (p.dtype in _HALF)
        if was != p.dtype and kept and (is_other_kind or not kept.keys() <= OWN):
            raise ManifoldError(
                f"{name} was {was} when the optimizer made its state, and is {p.dtype} now; create "
                "the optimizer after model.half(), .double() or .to(dtype). Nothing was changed"
            )
