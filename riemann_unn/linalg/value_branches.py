"""Whether kernels may branch on values: on the host, outside of compilation.

Reading a number from an accelerator waits for all of its work, and a captured or compiled graph
cannot branch on a value. There kernels take another path without such branches; see
:mod:`.step.masked`.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["WithoutReading", "may_branch_on"]

_depth = 0


class WithoutReading:
    """A context in which kernels take the path without branches on the host too."""

    def __enter__(self) -> None:
        global _depth
        self._before = _depth
        _depth += 1

    def __exit__(self, *error: object) -> None:
        global _depth
        _depth = self._before


def may_branch_on(x: Tensor) -> bool:
    """Tell whether kernels may branch on the values of a tensor."""
    return _depth == 0 and x.is_cpu and not torch.compiler.is_compiling()
