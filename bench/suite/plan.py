"""The budget of a run: sizes, rounds and seconds, and the clock that enforces them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

__all__ = ["FULL", "QUICK", "SECTIONS", "Clock", "Plan"]

SECTIONS = ("steps", "shapes", "training", "sketches", "targets")


@dataclass(frozen=True)
class Plan:
    """What one run measures.

    Attributes:
        name: The command, as the page quotes it.
        minutes: Wall time of the whole run; every section gets its share of what is left.
        shares: How the time is divided between the sections.
        sizes: n of the step times.
        rounds: Most rounds of one cell.
        step_limit: Seconds of a single step above which larger n are left out.
        core_from: n from which only the contenders of the summary take part.
        cell_limit: Seconds that one cell, a contender at one size, may take.
        memory_size: n at which the memory of a step is read.
        counts: How many separate matrices of which size.
        tall: Shape of the tall matrix.
        complex_size: n of the complex matrix.
        conv: Channels and size of the convolution kernel.
        hidden: State of the recurrent net, with its batch and its number of time steps.
        training_steps: Steps of each optimizer on it; whole polish periods.
        ranks: Ranks of the sketches.
        gradients: Number of gradients the sketches are put to.
        target_size: n of the target matrix.
        target: Relative squared distance to reach.
        rates: The learning rates every optimizer is tried with.
        full: Whether to train on digits and on copying memory, and to compare more contenders.
        digits_epochs: Most epochs on digits.
        copy_steps: Most steps on copying memory.
        seed: Seed of the order and of the data.
    """

    name: str
    minutes: float
    shares: dict[str, float]
    sizes: tuple[int, ...]
    rounds: int
    step_limit: float
    core_from: int
    cell_limit: float
    memory_size: int
    counts: tuple[tuple[int, int], ...]
    tall: tuple[int, int]
    complex_size: int
    conv: tuple[int, int]
    hidden: tuple[int, int, int]
    training_steps: int
    ranks: tuple[int, ...]
    gradients: int
    target_size: int
    target: float
    rates: tuple[float, ...]
    full: bool
    digits_epochs: int
    copy_steps: int
    seed: int = 0

    def with_minutes(self, minutes: float) -> Plan:
        return replace(self, minutes=minutes)


FULL = Plan(
    name="make bench",
    minutes=18,
    shares={"steps": 6.5, "shapes": 2.5, "training": 1.0, "sketches": 0.5, "targets": 7.5},
    sizes=(64, 128, 256, 512, 1024, 2048, 4096, 8192),
    rounds=8,
    step_limit=1.0,
    core_from=1_000_000,
    cell_limit=6.0,
    memory_size=1024,
    counts=((1024, 16), (4096, 8)),
    tall=(30_000, 50),
    complex_size=512,
    conv=(64, 16),
    hidden=(512, 128, 100),
    training_steps=16,
    ranks=(1, 4, 8, 32),
    gradients=40,
    target_size=256,
    target=0.01,
    rates=(0.1, 0.3, 1.0),
    full=True,
    digits_epochs=15,
    copy_steps=700,
)

QUICK = replace(
    FULL,
    name='make bench ARGS="--quick"',
    minutes=2.5,
    shares={"steps": 1.0, "shapes": 0.6, "training": 0.3, "sketches": 0.15, "targets": 0.5},
    sizes=(64, 256, 1024, 2048, 4096),
    rounds=3,
    step_limit=0.6,
    core_from=2048,
    cell_limit=2.0,
    counts=((1024, 16),),
    training_steps=16,
    ranks=(1, 8),
    gradients=20,
    rates=(0.3, 1.0),
    full=False,
)


@dataclass
class Clock:
    """Divides the remaining time among the remaining sections."""

    plan: Plan
    sections: tuple[str, ...]
    begin: float = field(default_factory=time.monotonic)
    end: float = 0.0
    spent: dict[str, float] = field(default_factory=dict)

    def estimates(self) -> dict[str, float]:
        """Seconds that each section may take at most."""
        total = sum(self.plan.shares[name] for name in self.sections)
        return {n: 60 * self.plan.minutes * self.plan.shares[n] / total for n in self.sections}

    def enter(self, section: str) -> None:
        """Start a section: time that earlier ones left over is there for the later ones."""
        coming = self.sections[self.sections.index(section) :]
        left = self.begin + 60 * self.plan.minutes - time.monotonic()
        share = self.plan.shares[section] / sum(self.plan.shares[name] for name in coming)
        self._entered = time.monotonic()
        self.end = self._entered + max(left, 0) * share

    def leave(self, section: str) -> None:
        self.spent[section] = time.monotonic() - self._entered

    @property
    def left(self) -> float:
        """Seconds left to the section."""
        return self.end - time.monotonic()
