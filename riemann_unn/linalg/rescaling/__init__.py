"""The convex problem of rescaling: scales of channels that balance energies."""

from .problem import EnergyBlock
from .solver import Rescaling, balance_energies
from .start import log_balanced, may_overflow

__all__ = ["EnergyBlock", "Rescaling", "balance_energies", "log_balanced", "may_overflow"]
