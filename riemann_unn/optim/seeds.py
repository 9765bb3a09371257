"""Seeds: sources of random sketches that are equal on every replica and after resuming."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

__all__ = ["Seeds", "Source"]

# An odd multiplier from the golden ratio, whose multiples are well spread, and an offset.
_SPREAD, _FIRST = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03
# Rows of at most so many numbers are generated for so many steps at once.
_MANY, _AHEAD = 2**14, 16
# The factor that gives uniform 64-bit integers variance 1.
_UNIT = 3**0.5 / 2**63


_Key = tuple[torch.device, tuple[int, ...], int, int]


def _signed(number: int) -> int:
    """Return a 64-bit number as a signed one."""
    return (number + 2**63) % 2**64 - 2**63


def multiplier(step: int | Tensor) -> int | Tensor:
    """Return a 64-bit number for a step, modulo 2⁶⁴ as integer tensors count."""
    if isinstance(step, Tensor):
        return step * _signed(_SPREAD) + _signed(_FIRST)
    return _signed(step * _SPREAD + _FIRST)


class Seeds:
    """Sources of random sketches: equal (seed, step, shape) give equal draws on any replica."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}
        self._tables: dict[_Key, Tensor] = {}
        self._ahead: dict[_Key, tuple[int, tuple[Tensor, ...]]] = {}

    def generator(self, device: torch.device, shape: tuple[int, ...], step: int) -> torch.Generator:
        """Return the generator for matrices of a shape at a step, on their device."""
        generator = self._generators.get(device)
        if generator is None:
            generator = self._generators[device] = torch.Generator(device)
        return generator.manual_seed(self._hash(f"{step} {tuple(shape)}"))

    def table(self, device: torch.device, shape: tuple[int, ...], k: int, n: int) -> Tensor:
        """Return random 64-bit integers for sketches of a shape, the same at every step."""
        key = device, shape, k, n
        if key not in self._tables:
            generator = torch.Generator().manual_seed(self._hash(f"{tuple(shape)} {k}"))
            low = torch.iinfo(torch.int64).min
            # Drawn on the host, so that all devices get the same.
            table = torch.randint(low, -(low + 1), (k, n), generator=generator)
            self._tables[key] = table.to(device)
        return self._tables[key]

    def rows(
        self, device: torch.device, shape: tuple[int, ...], k: int, n: int, step: int | Tensor
    ) -> Tensor:
        """Return the table times the multiplier of a step; small ones for several steps at once."""
        table = self.table(device, shape, k, n)
        if isinstance(step, Tensor) or table.numel() > _MANY:
            return table * multiplier(step)
        (block, i), key = divmod(step, _AHEAD), (device, shape, k, n)
        ahead = self._ahead.get(key)
        if ahead is None or ahead[0] != block:
            steps = range(block * _AHEAD, (block + 1) * _AHEAD)
            numbers = torch.tensor([multiplier(step) for step in steps], device=device)
            rows = (table * numbers[:, None, None]).to(torch.float32)
            ahead = self._ahead[key] = block, rows.unbind(0)
        return ahead[1][i]

    def _hash(self, words: str) -> int:
        digest = blake2b(f"{self.seed} {words}".encode(), digest_size=7).digest()
        return int.from_bytes(digest, "big")


@dataclass(eq=False, slots=True)
class Source:
    """The source for the sketches of matrices of a shape at a step.

    Called for rows ``(k, n)`` it multiplies a table of random integers by a number of the step, in
    one operation with the same result on every device. Modulo 2⁶⁴ the entries are uniform and
    independent within a step, and nearly independent of those of other steps.
    """

    seeds: Seeds
    device: torch.device
    shape: tuple[int, ...]
    step: int | Tensor

    def __call__(self, k: int, n: int) -> tuple[Tensor, float]:
        """Return rows ``(k, n)``, and the factor that gives their entries variance 1."""
        return self.seeds.rows(self.device, self.shape, k, n, self.step), _UNIT

    def generator(self) -> torch.Generator:
        """Return a generator, for sketches that need one."""
        return self.seeds.generator(self.device, self.shape, int(self.step))
