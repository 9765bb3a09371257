"""Chang: deep unitary networks from trained weights."""

from __future__ import annotations

from .experiment import Experiment

__all__ = ["EXPERIMENTS"]

EXPERIMENTS: tuple[Experiment, ...] = ()
