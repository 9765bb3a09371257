"""Seeds: sources of random sketches that are alike on every replica and after resuming."""

from __future__ import annotations

from hashlib import blake2b

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
        words = f"{self.seed} {step} {tuple(shape)}".encode()
        return generator.manual_seed(int.from_bytes(blake2b(words, digest_size=7).digest(), "big"))
