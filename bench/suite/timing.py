"""Timing side by side: rounds of all contenders, each round in another random order."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tqdm import tqdm

from .plan import Clock

__all__ = ["Entry", "Timing", "interleave", "polish_period", "schedule"]

_BLOCK = 32  # steps timed at once where they fit; a multiple of every period
_AIM = 0.02  # seconds of a block of steps that has no period


def polish_period(p: int) -> int:
    """Steps between two polishes of a matrix with p columns, as in ``linalg.step.polish``.

    The mean over any number of whole periods holds the price of the polish.
    """
    return 4 if p <= 64 else 16 if p <= 512 else 32


@dataclass
class Entry:
    """A contender to time: ``step`` takes one step and returns when it is done.

    Attributes:
        name: Name in the tables.
        step: What is timed.
        period: Steps that the mean must run over multiples of.
        most: Seconds a step may take; one that needs more is timed once.
    """

    name: str
    step: Callable[[], object]
    period: int = 1
    most: float = math.inf


@dataclass
class Timing:
    """Seconds per step, one number for every round.

    Attributes:
        rounds: Mean step of each round.
        block: Steps per round.
        period: Steps that the mean is to run over multiples of.
        failure: The reason for a missing number.
    """

    rounds: list[float] = field(default_factory=list)
    block: int = 1
    period: int = 1
    failure: str = ""

    @property
    def mean(self) -> float:
        return statistics.fmean(self.rounds) if self.rounds else math.nan

    @property
    def median(self) -> float:
        return statistics.median(self.rounds) if self.rounds else math.nan

    @property
    def whole(self) -> bool:
        """Whether the mean runs over whole polish periods, where there are any."""
        return len(self.rounds) * self.block % self.period == 0


def schedule(step: float, *, period: int, seconds: float, rounds: int) -> tuple[int, int]:
    """Choose how many steps to time at once, and in how many rounds.

    Args:
        step: Estimated seconds of a step.
        period: Steps that the mean must run over multiples of.
        seconds: What the cell may take; one period is taken in any case.
        rounds: Most rounds.
    """
    step = max(step, 1e-7)
    if period == 1:
        block = min(max(round(_AIM / step), 1), _BLOCK)
        return block, min(max(int(seconds / (block * step)), 1), rounds)
    if 3 * _BLOCK * step <= seconds:
        return _BLOCK, min(int(seconds / (_BLOCK * step)), rounds)
    # Short blocks keep the order mixed; their number makes the periods whole.
    periods = max(min(int(seconds / (period * step)), rounds * _BLOCK // period), 1)
    block = max(period // 4, 1)
    return block, periods * period // block


def interleave(
    entries: Sequence[Entry],
    *,
    seconds: float,
    rounds: int,
    seed: int,
    clock: Clock | None = None,
    title: str = "",
    order: list[list[str]] | None = None,
) -> dict[str, Timing]:
    """Time the entries in rounds of shuffled order.

    Args:
        entries: What is timed.
        seconds: What each may take.
        rounds: Most rounds.
        seed: Seed of the order.
        clock: Stops after the round in which the section's time runs out, the first excepted.
        title: Words for the progress bar.
        order: Filled with the names in the order in which they ran, a list for every round.
    """
    shuffle = random.Random(seed)
    timings = {entry.name: Timing(period=entry.period) for entry in entries}
    running, counts = [], {}
    bar = tqdm(total=len(entries), desc=f"{title}: warm up", leave=False)
    for entry in shuffle.sample(list(entries), len(entries)):
        timing = timings[entry.name]
        bar.set_postfix_str(entry.name)
        try:
            estimate = _warm_up(entry)
        except Exception as error:  # a peer that refuses is a result
            timing.failure = type(error).__name__
        else:
            if estimate > entry.most:
                timing.failure = f"over {entry.most:.2g} s a step"
            else:
                share = schedule(estimate, period=entry.period, seconds=seconds, rounds=rounds)
                timing.block, counts[entry.name] = share
                running.append(entry)
        bar.update()
    bar.close()
    total = max(counts.values(), default=0)
    with tqdm(total=sum(counts.values()), desc=f"{title}: rounds", leave=False) as bar:
        for number in range(total):
            if clock is not None and number and clock.left < 0:
                break
            # Entries with fewer rounds spread them over all rounds; all run in the first.
            now = [
                entry
                for entry in running
                if number * counts[entry.name] // total > (number - 1) * counts[entry.name] // total
            ]
            shuffle.shuffle(now)
            if order is not None:
                order.append([entry.name for entry in now])
            for entry in now:
                timing = timings[entry.name]
                timing.rounds.append(_block(entry, timing.block))
                bar.update()
    return timings


def _warm_up(entry: Entry) -> float:
    """Take the first steps, which set up state, and return the seconds of a later one."""
    first = _block(entry, 1)
    if first > min(entry.most, 0.5):
        return first
    return min(_block(entry, 1) for _ in range(1 if first > 0.1 else 3))


def _block(entry: Entry, count: int) -> float:
    step = entry.step
    begin = time.perf_counter()
    for _ in range(count):
        step()
    return (time.perf_counter() - begin) / count
