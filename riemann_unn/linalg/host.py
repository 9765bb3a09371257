"""Where kernels may look at numbers: on the host, outside of a compiler, unless told otherwise.

To read a number from an accelerator is to wait until it has done all it was given, and a graph of
its work, captured or compiled, has no place for a branch on what it finds. There kernels take
another path, in which every decision is arithmetic; see :mod:`.step.masked`.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["WithoutReading", "on_host"]

_depth = 0


class WithoutReading:
    """A context in which kernels take the path of accelerators on the host too."""

    def __enter__(self) -> None:
        global _depth
        self._before = _depth
        _depth += 1

    def __exit__(self, *error: object) -> None:
        global _depth
        _depth = self._before


def on_host(x: Tensor) -> bool:
    """Tell whether a branch on the values of a tensor costs nothing."""
    return _depth == 0 and x.is_cpu and not torch.compiler.is_compiling()
