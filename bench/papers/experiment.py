"""The interface of an experiment: runs that train, and a report of their results.

A run is a function of plain options with plain results, so that it can run in another process, be
stored in a file, and be skipped if it was done before.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

__all__ = ["PAPERS", "Claim", "Experiment", "Place", "Plan", "Report", "Run", "median"]

Options = dict[str, Any]
Result = dict[str, Any]

PAPERS = {
    "projunn": "Kiani, Balestriero, LeCun, Lloyd, *projUNN*, NeurIPS 2022",
    "magnasco": "Magnasco, *Convolutional unitary or orthogonal recurrent neural networks*, 2023",
    "chang": "Chang, *A projection algorithm for the unitary weights*, 2021",
    "lebeurrier": "Lebeurrier, Vayer, Gribonval, *Path-conditioned training*, 2026",
    "vodrahalli": "Vodrahalli et al., *Nonlinear initialization methods for low-rank neural "
    "networks*, 2022",
}


@dataclass(frozen=True)
class Plan:
    """The scale of all runs.

    Attributes:
        scale: ``"quick"`` (all of it in five minutes), ``"usual"`` (100 minutes on two cores) or
            ``"full"`` (a night, or a GPU).
        seeds: Seeds of each run that takes under ten minutes; longer ones take one.
        data: Where images come from, in words of ``riemann_unn.demo.data``.
    """

    scale: str = "usual"
    seeds: int = 1
    data: str = "mnist5000"

    def pick(self, quick: Any, usual: Any, full: Any = None) -> Any:
        """One of the values, by scale; ``usual`` also for a whole night if there is no third."""
        return {"quick": quick, "usual": usual, "full": usual if full is None else full}[self.scale]


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        name: Of the run in its experiment, as in ``"LSTM, seed 0"``.
        options: What it depends on, plain values; a stored result of other options is not used.
        minutes: About how long it takes on one thread.
    """

    name: str
    options: Options
    minutes: float = 1.0


class Place:
    """The checkpoint of a run, and the callback for its progress.

    Args:
        checkpoint: File of the state to go on from.
        tell: Called with the share that is done, from 0 to 1, and some words.
        every: Seconds between two saved states.
    """

    def __init__(
        self, checkpoint: Path, tell: Callable[[float, str], None], *, every: float = 60.0
    ) -> None:
        self.checkpoint, self.tell, self.every = checkpoint, tell, every
        self._saved = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """The state that an interrupted run has saved, if there is one."""
        if not self.checkpoint.exists():
            return None
        state: dict[str, Any] = torch.load(self.checkpoint, weights_only=True)
        return state

    def save(self, state: Callable[[], Mapping[str, Any]], *, now: bool = False) -> None:
        """Save a state, at most once in ``every`` seconds unless ``now``; a kill loses no more."""
        if not now and time.monotonic() - self._saved < self.every:
            return
        part = self.checkpoint.with_suffix(".part")
        torch.save(dict(state()), part)
        os.replace(part, self.checkpoint)
        self._saved = time.monotonic()


@dataclass(frozen=True)
class Claim:
    """A row of the table at the top of the page.

    Attributes:
        claim: In words.
        theirs: The paper's figure, with its setting.
        ours: Ours, with its setting.
        asked: The project's own bound, if any.
        met: Whether the bound is met.
    """

    claim: str
    theirs: str
    ours: str
    asked: str = ""
    met: bool | None = None


@dataclass
class Report:
    """The results of an experiment in Markdown, after its pictures were written.

    Attributes:
        lines: Text, tables and pictures, without the heading.
        claims: Rows for the table at the top of the page.
        missing: Names of the plan's runs that have no result.
    """

    lines: list[str] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Experiment:
    """One experiment of a paper.

    Attributes:
        name: Word on the command line.
        paper: A key of ``PAPERS``.
        title: Heading.
        runs: The runs of a plan.
        train: Does one of them; importable by name, since another process calls it.
        report: Makes the section from the results by name of the run; pictures go to the folder
            and begin with ``papers_``. Runs that failed are missing in the results.
        needs: What is missing where there are no runs, in words.
    """

    name: str
    paper: str
    title: str
    runs: Callable[[Plan], Sequence[Run]]
    train: Callable[[Options, Place], Result]
    report: Callable[[Plan, Mapping[str, Result], Path], Report]
    needs: str = ""

    @property
    def command(self) -> str:
        """The command that reruns it."""
        return f'make papers ARGS="--only {self.name}"'


def median(values: Iterable[float]) -> float:
    """The median; NaN of no values."""
    values = list(values)
    return statistics.median(values) if values else float("nan")
