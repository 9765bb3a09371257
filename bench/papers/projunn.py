"""projUNN: long memory in RNNs (copying, adding, pixels), ranks and sketches."""

from __future__ import annotations

from .experiment import Experiment

__all__ = ["EXPERIMENTS"]

EXPERIMENTS: tuple[Experiment, ...] = ()
