"""Vodrahalli et al.: low-rank layers that keep the function."""

from __future__ import annotations

from .experiment import Experiment

__all__ = ["EXPERIMENTS"]

EXPERIMENTS: tuple[Experiment, ...] = ()
