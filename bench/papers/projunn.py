"""projUNN: long memory in RNNs (copying, adding, pixels), ranks and sketches."""

from __future__ import annotations

from .experiment import Experiment
from .memory import ADDING, COPY
from .pixels import FASHION, PIXELS, RANKS

__all__ = ["EXPERIMENTS"]

EXPERIMENTS: tuple[Experiment, ...] = (COPY, ADDING, PIXELS, FASHION, RANKS)
