"""projUNN: a ResNet-9 whose convolutions are orthogonal, at 28x28."""

from __future__ import annotations

from .experiment import Experiment

__all__ = ["EXPERIMENTS"]

EXPERIMENTS: tuple[Experiment, ...] = ()
