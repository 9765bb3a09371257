"""Whether a model's code depends on training mode in ways that its graph does not show."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from torch.fx import _symbolic_trace
from torch.nn.modules import batchnorm, dropout, instancenorm

__all__ = ["ModeReads"]

# Modules that call the same operation in both modes, with the mode as an argument.
_ONE_OPERATION = frozenset(module.__file__ for module in (batchnorm, dropout, instancenorm))

# ``Module.__getattr__``, and a tracer's wrapper of it.
_BETWEEN = frozenset(module.__file__ for module in (nn.modules.module, _symbolic_trace))


class ModeReads:
    """Records reads of the training mode while a model runs.

    Attributes:
        was_read: whether code read it that may differ in the other mode.
    """

    def __init__(self) -> None:
        self.was_read = False

    def track_(self, model: nn.Module) -> None:
        """Record when ``training`` of modules is read; the caller restores attributes."""
        for module in model.modules():
            kind, own = type(module), vars(module)
            is_plain = kind.__getattr__ is nn.Module.__getattr__ and not hasattr(kind, "training")
            if not is_plain or isinstance(module, nn.SyncBatchNorm):
                self.was_read = True
            elif "training" in own:
                # Module.__getattr__ looks up missing attributes in the parameters.
                own["_parameters"] = _Parameters(own["_parameters"], own.pop("training"), self)


class _Parameters(dict[str, Any]):
    """The parameters of a module, with its mode as an entry."""

    def __init__(self, items: dict[str, Any], mode: bool, notes: ModeReads) -> None:
        super().__init__(items)
        self._mode, self._notes = mode, notes

    def __contains__(self, name: object) -> bool:
        if name != "training":
            return super().__contains__(name)
        is_read = sys._getframe(1).f_code.co_name == "__getattr__"
        self._notes.was_read |= not is_read
        return is_read

    def __getitem__(self, name: str) -> Any:
        if name != "training":
            return super().__getitem__(name)
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_code.co_filename in _BETWEEN:
            frame = frame.f_back
        self._notes.was_read |= frame.f_code.co_filename not in _ONE_OPERATION
        return self._mode
