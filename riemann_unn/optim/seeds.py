"""Seeds: sources of random sketches that are alike on every replica and after resuming."""

from __future__ import annotations

import torch

__all__ = ["Seeds"]


class Seeds:
    """Sources of random sketches: equal (seed, step, shape) give equal draws on any replica."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def generator(self, device: torch.device, shape: tuple[int, ...], step: int) -> torch.Generator:
        """Return the generator for matrices of a shape at a step, on their device."""
        generator = self._generators.get(device)
        if generator is None:
            generator = self._generators[device] = torch.Generator(device)
        return generator.manual_seed(_mix(self.seed, step, *shape))


def _mix(*numbers: int) -> int:
    """Hash integers to 63 well-spread bits, the same on every machine (SplitMix64's finaliser)."""
    state, mask = 0, 2**64 - 1
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1
