"""Whether what a model computes may depend on training mode in ways that a graph does not show."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from torch.fx import _symbolic_trace
from torch.nn.modules import batchnorm, dropout, instancenorm

__all__ = ["ModeNotes"]

# In either mode they call one operation, and tell it the mode.
_ONE_OPERATION = frozenset(module.__file__ for module in (batchnorm, dropout, instancenorm))

# ``Module.__getattr__``, and what a tracer puts around it.
_BETWEEN = frozenset(module.__file__ for module in (nn.modules.module, _symbolic_trace))


class ModeNotes:
    """Who asks for the mode while a model runs.

    Attributes:
        is_asked: whether code asked that may do something else in the other mode.
    """

    def __init__(self) -> None:
        self.is_asked = False

    def watch_(self, model: nn.Module) -> None:
        """Have modules tell when their ``training`` is read; the caller restores attributes."""
        for module in model.modules():
            kind, own = type(module), vars(module)
            is_plain = kind.__getattr__ is nn.Module.__getattr__ and not hasattr(kind, "training")
            if not is_plain or isinstance(module, nn.SyncBatchNorm):
                self.is_asked = True
            elif "training" in own:
                # What is missing in an object is looked for among its parameters.
                own["_parameters"] = _Parameters(own["_parameters"], own.pop("training"), self)


class _Parameters(dict[str, Any]):
    """Parameters of a module, and its mode."""

    def __init__(self, items: dict[str, Any], mode: bool, notes: ModeNotes) -> None:
        super().__init__(items)
        self._mode, self._notes = mode, notes

    def __contains__(self, name: object) -> bool:
        if name != "training":
            return super().__contains__(name)
        is_read = sys._getframe(1).f_code.co_name == "__getattr__"
        self._notes.is_asked |= not is_read
        return is_read

    def __getitem__(self, name: str) -> Any:
        if name != "training":
            return super().__getitem__(name)
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_code.co_filename in _BETWEEN:
            frame = frame.f_back
        self._notes.is_asked |= frame.f_code.co_filename not in _ONE_OPERATION
        return self._mode
