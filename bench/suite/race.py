"""Times to a target: optimizers run alternately, in shuffled order, until they reach it."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from .page import short

__all__ = ["Runner", "best", "outcome", "race"]


@dataclass
class Runner:
    """One optimizer at one learning rate.

    Attributes:
        name: Of the optimizer.
        rate: Its learning rate.
        step: Takes a step on what ``draw`` returned; this is what is timed.
        score: The distance to the target, evaluated at intervals, not timed.
        error: Orthogonality error now, or None for an unconstrained one.
        draw: Gives the next batch, not timed.
    """

    name: str
    rate: float
    step: Callable[[Any], object]
    score: Callable[[], float]
    error: Callable[[], float | None]
    draw: Callable[[], Any] = lambda: None
    seconds: float = 0.0
    steps: int = 0
    lowest: float = math.inf
    failure: str = ""
    reached: bool = False


def race(
    runners: Sequence[Runner],
    *,
    target: float,
    every: int,
    most: int,
    seconds: float,
    turn: float,
    seed: int,
    title: str,
) -> None:
    """Run until all have reached the target, failed, or used up the time or the steps.

    Args:
        runners: The optimizers, which hold the results.
        target: Score to reach.
        every: Steps between two evaluations of the score.
        most: Steps that each may take.
        seconds: Wall time of the race.
        turn: Seconds of a turn, so that all get equal time.
        seed: Seed of the order.
        title: Words for the progress bar.
    """
    shuffle = random.Random(seed)
    running = list(runners)
    end = time.monotonic() + seconds
    bar = tqdm(total=len(runners), desc=title, leave=False)
    while running and time.monotonic() < end:
        for runner in shuffle.sample(running, len(running)):
            if time.monotonic() > end:
                break
            until = runner.seconds + turn
            while runner.seconds < until and runner.steps < most and not runner.failure:
                _look(runner, every)
                runner.reached = runner.lowest <= target
                if runner.reached:
                    break
            if runner.reached or runner.failure or runner.steps >= most:
                running.remove(runner)
                bar.update()
        # A rate that takes longer than a finished one of the same optimizer is stopped.
        times: dict[str, float] = {}
        for runner in runners:
            if runner.reached:
                times[runner.name] = min(runner.seconds, times.get(runner.name, math.inf))
        beaten = [r for r in running if r.seconds > times.get(r.name, math.inf)]
        running = [r for r in running if r not in beaten]
        bar.update(len(beaten))
    bar.close()


def _look(runner: Runner, count: int) -> None:
    try:
        for _ in range(count):
            batch = runner.draw()
            begin = time.perf_counter()
            runner.step(batch)
            runner.seconds += time.perf_counter() - begin
            runner.steps += 1
        score = runner.score()
    except Exception as error:  # an exception of a peer is a result
        runner.failure = type(error).__name__
        return
    if not math.isfinite(score):
        runner.failure = "diverged"
        return
    runner.lowest = min(runner.lowest, score)


def best(runners: Sequence[Runner]) -> dict[str, Runner]:
    """Return for every optimizer its fastest runner, or the one with the best score."""
    found: dict[str, Runner] = {}
    for runner in runners:
        other = found.get(runner.name)
        if other is None or _key(runner) < _key(other):
            found[runner.name] = runner
    return found


def _key(runner: Runner) -> tuple[bool, float]:
    return not runner.reached, runner.seconds if runner.reached else runner.lowest


def outcome(runner: Runner) -> list[str]:
    """Cells of a row: rate, steps, seconds, milliseconds a step, and the orthogonality error."""
    if runner.failure:
        return [f"{runner.rate:g}", runner.failure, "", "", ""]
    each = short(1e3 * runner.seconds / max(runner.steps, 1))
    error = runner.error()
    off = "" if error is None else short(error, 1)
    if runner.reached:
        return [f"{runner.rate:g}", str(runner.steps), short(runner.seconds), each, off]
    missed = f"not in {runner.steps} (came to {short(runner.lowest)})"
    return [f"{runner.rate:g}", missed, "", each, off]
