"""ZeroRedundancyOptimizer: each rank has an optimizer of some of the parameters."""

from __future__ import annotations

import sys
from types import FrameType

__all__ = ["untagged_rank"]

_ZERO = "torch.distributed.optim.zero_redundancy_optimizer"


def untagged_rank() -> str:
    """Return a hint for an optimizer without tagged parameters, where a rank has made it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") != _ZERO:
        frame = frame.f_back
    if frame is None:
        return ""
    return (
        ". It was made by ZeroRedundancyOptimizer, which gives every rank some of the parameters, "
        "and this rank no tagged one: give the tagged ones on all ranks to an optimizer of their "
        "own and only the others to ZeroRedundancyOptimizer, or shard with fully_shard"
    )
