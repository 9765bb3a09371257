"""Magnasco: the memory of a recurrent convolution on a lattice."""

from __future__ import annotations

from .experiment import Experiment

__all__ = ["EXPERIMENTS"]

EXPERIMENTS: tuple[Experiment, ...] = ()
