"""Cells of `bench.optimality`: every method on every problem, side by side in processes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context

import torch
from tqdm import tqdm

from bench.optimality_peers import (
    ROUNDS,
    STAY_RATE,
    TOLERANCES,
    Finished,
    Trace,
    methods,
    stayers,
)
from bench.problems import MAKERS, mini_batch_pca

QUICK = ("pca", "procrustes12", "gate")
STAY = ("pca", "procrustes12", "joint", "complex")
STAY_STEPS = 500


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    problems: tuple[str, ...]
    rates: slice
    limit: int
    stay: tuple[str, ...]
    mini_batches: bool = True
    methods: frozenset[tuple[str, str]] | None = None  # table and name; all if none are chosen

    def chosen(self, rates: tuple[float, ...]) -> tuple[float, ...]:
        return rates[self.rates] or rates


FULL = Plan(tuple(MAKERS), slice(None), 1500, STAY)
BRIEF = Plan(QUICK, slice(1, 3), 400, STAY[:1], mini_batches=False)


@dataclass
class Found:
    """The result of a method on a problem with its best learning rate."""

    reached: dict[float, int] = field(default_factory=dict)
    least: float = math.inf
    message: str = ""
    refused: bool = True  # whether every learning rate raised
    gaps: list[float] = field(default_factory=list)
    losses: float = 0.0  # evaluations of the loss alone over those of the gradient

    @property
    def text(self) -> str:
        if TOLERANCES[0] in self.reached:
            return " / ".join(str(self.reached.get(t, "–")) for t in TOLERANCES)
        return f"**{self.message if self.refused else short(self.least)}**"

    def take(self, trace: Trace) -> None:
        hits = {t: n for t in TOLERANCES if (n := trace.reached(t)) is not None}
        if not trace.gaps:
            return
        # The picture shows the rate with the least gap, and of those the fastest.
        if self._order(hits, min(trace.gaps)) > self._order(self.reached, self.least):
            self.gaps, self.losses = trace.gaps, trace.losses / len(trace.gaps)
        self.least = min(self.least, *trace.gaps)
        for tolerance, count in hits.items():
            self.reached[tolerance] = min(count, self.reached.get(tolerance, count))

    @staticmethod
    def _order(hits: dict[float, int], least: float) -> tuple[float, ...]:
        return (*(-hits.get(t, math.inf) for t in reversed(TOLERANCES)), -least)


def solve(key: str, index: int, plan: Plan) -> Found:
    """Minimise a problem with a method, once for each learning rate."""
    problem, method = MAKERS[key](), methods()[index]
    start, found = problem.start(), Found()
    rates = plan.chosen(method.rates)
    for rate in (*rates[1:], *rates[:1]):  # the largest diverges more often than not
        # A rate is tried for no more steps than the best one needed.
        trace = Trace(problem, start, found.reached.get(TOLERANCES[-1], plan.limit))
        try:
            method.run(problem, start, rate, trace)
        except Finished:
            found.refused = False
        except Exception as exception:  # an exception is the result
            found.message = type(exception).__name__
        else:
            found.refused = False
        found.take(trace)
    return found


def sample(index: int, plan: Plan) -> float:
    """Return the least gap of a method on mini-batches over its learning rates."""
    task, method = mini_batch_pca(), methods()[index]
    gaps = [method.train(task, task.whole.start(), rate) for rate in plan.chosen(method.rates)]
    return min((gap for gap in gaps if math.isfinite(gap)), default=math.nan)


def stay(key: str, base: str, index: int) -> tuple[float, float]:
    """Return the largest gap of a method that starts at the optimum, and that of the last steps."""
    problem, method = MAKERS[key](), stayers()[base][index]
    gaps = method.stay(problem, problem.start(), STAY_RATE, STAY_STEPS)
    return max(gaps), max(gaps[-100:])


def quiet(function: Callable[..., object], *arguments: object) -> object:
    """Call a function on one thread, its warnings silenced: the peers have many."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments)


def measure(plan: Plan, jobs: int) -> dict[tuple[object, ...], object]:
    """Measure all cells side by side."""
    rows, stays = methods(), stayers()
    cells: list[tuple[Callable[..., object], tuple[object, ...]]] = [
        (solve, (key, i, plan))
        for key in plan.problems
        for i, method in enumerate(rows)
        if not method.missing()
        and (plan.methods is None or (method.table, method.name) in plan.methods)
    ]
    cells += [
        (sample, (i, plan))
        for i, method in enumerate(rows)
        if plan.mini_batches and method.table in ROUNDS and not method.missing()
    ]
    cells += [
        (stay, (key, base, i))
        for key in plan.stay
        for base, found in stays.items()
        for i, method in enumerate(found)
        if not method.missing()
    ]
    results: dict[tuple[object, ...], object] = {}
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(quiet, f, *arguments): arguments for f, arguments in cells}
        for job in tqdm(as_completed(running), total=len(running), desc="cells"):
            arguments = tuple(a for a in running[job] if not isinstance(a, Plan))
            try:
                results[arguments] = job.result()
            except Exception as exception:  # of a package that refuses mini-batches
                results[arguments] = type(exception).__name__
    return results


def short(value: float) -> str:
    if value >= 0.1:
        return f"{value:.2g}"
    if value < 1e-14:  # rounding, of either sign
        return "0"
    return f"{value:.0e}".replace("e-0", "e-")
