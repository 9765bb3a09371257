"""Statistics of histories over several seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

from .curves import Curve
from .experiment import Claim, Plan, Result, median

__all__ = [
    "ABSTRACT",
    "EVERY",
    "by_name",
    "first_below",
    "iterations",
    "judged",
    "last",
    "middle",
    "off",
]

ABSTRACT = "closely matches or exceeds earlier unitary networks (abstract)"
EVERY = 25  # iterations between two checks on held-out sequences


def by_name(results: Mapping[str, Result]) -> dict[str, list[Result]]:
    """The results of all seeds by what their names have before ``", seed"``.

    Args:
        results: By name of the run.
    """
    groups: dict[str, list[Result]] = {}
    for name, result in results.items():
        groups.setdefault(name.rpartition(", seed")[0], []).append(result)
    return groups


def first_below(values: Sequence[float], bound: float) -> int | None:
    """The iteration of the first check from which on every value is below a bound.

    Args:
        values: One a check.
        bound: To be below.
    """
    above = [index for index, value in enumerate(values) if not value < bound]
    first = (above[-1] if above else -1) + 1
    return (first + 1) * EVERY if first < len(values) else None


def iterations(counts: Sequence[int | None]) -> str:
    """The median count in words; unfinished runs count as the latest."""
    found = statistics.median_high([float("inf") if n is None else n for n in counts])
    return "not yet" if found == float("inf") else f"{found:,.0f}"


def judged(plan: Plan, claim: Claim) -> Claim:
    """The claim, without what is asked where sizes are not those that it is asked of.

    Args:
        plan: Says how large the runs are.
        claim: With what is asked of it.
    """
    return replace(claim, asked="", met=None) if plan.scale == "quick" else claim


def last(runs: Sequence[Result], key: str) -> float:
    """The median over seeds of the last value."""
    return median(run[key][-1] for run in runs)


def middle(name: str, runs: Sequence[Result], key: str, *, every: int = EVERY) -> Curve:
    """The median over seeds at every check.

    Args:
        name: Of the curve.
        runs: One a seed.
        key: Of the history.
        every: What a check is on the horizontal axis.
    """
    values = [median(at) for at in zip(*(run[key] for run in runs), strict=False)]
    return Curve(name, [every * (index + 1) for index in range(len(values))], values)


def off(runs: Sequence[Result]) -> str:
    """The largest orthogonality error, or nothing where nothing is orthogonal."""
    worst = max(float(run["off"]) for run in runs)
    return f"{worst:.0e}".replace("e-0", "e-") if worst else ""
