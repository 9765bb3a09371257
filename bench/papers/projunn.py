"""projUNN: long memory in RNNs (copying, adding, pixels), ranks and sketches."""

from __future__ import annotations

from .adding import ADDING
from .copying import COPY
from .experiment import Experiment
from .pixels import FASHION, PIXELS, RANKS

__all__ = ["EXPERIMENTS"]

EXPERIMENTS: tuple[Experiment, ...] = (COPY, ADDING, PIXELS, FASHION, RANKS)
