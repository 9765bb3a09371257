"""A snapshot of a model, from which an interrupted initializer restores it."""

from __future__ import annotations

from collections.abc import Iterable
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..interruption import random_states
from ..parallel import local_part

__all__ = ["ModelSnapshot"]


class ModelSnapshot:
    """A snapshot of a model and the global random states; :meth:`restore` may run twice.

    Modules are recorded with their attributes, hooks and modes, buffers with their values, and
    parameters with ``requires_grad``; the values of those that will be written with :meth:`keep`.
    """

    def __init__(self, model: nn.Module) -> None:
        # Also the dicts of modules: parameters, buffers, children and hooks.
        self._dicts: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        for module in model.modules():
            attributes = vars(module)
            self._dicts.append((attributes, dict(attributes)))
            inner = [value for value in attributes.values() if isinstance(value, dict)]
            self._dicts += [(value, dict(value)) for value in inner]
        self._flags = [(p, p.requires_grad) for p in model.parameters() if not is_lazy(p)]
        self._values: list[tuple[Tensor, Tensor]] = []
        self._restore_random_states = random_states(model)
        self._grad_mode = torch.is_grad_enabled()
        self.keep(buffer for buffer in model.buffers() if not is_lazy(buffer))

    def keep(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Record the values of tensors that will be written; return copies of them."""
        aliases = [local_part(tensor) for tensor in tensors]
        copies = [alias.clone() for alias in aliases]
        self._values.extend(zip(aliases, copies, strict=True))
        return copies

    def restore(self) -> None:
        """Restore everything, bit for bit."""
        for current, recorded in self._dicts:
            if not _are_same(current, recorded):  # a second run must not change restored values
                current.clear()
                current.update(recorded)
        for p, flag in self._flags:
            p.requires_grad_(flag)
        if self._values:
            aliases, copies = zip(*self._values, strict=True)
            torch._foreach_copy_(aliases, copies)
        self._restore_random_states()
        torch._C._set_grad_enabled(self._grad_mode)


def _are_same(some: dict[Any, Any], other: dict[Any, Any]) -> bool:
    return list(some) == list(other) and all(map(is_, some.values(), other.values()))
