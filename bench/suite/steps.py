"""Time of one step on one n by n matrix against n, with its memory and its orthogonality."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.contenders import (
    Column,
    Geoopt,
    Geotorch,
    Ours,
    Parametrization,
    Pogo,
    Reference,
    Unconstrained,
)

from .matrices import distance, gradient, orthonormal, weight_of
from .memory import peak_extra
from .page import Section, notes, short, table
from .plan import Clock, Plan
from .plots import ERRORS, TIMES
from .timing import Entry, Timing, interleave, polish_period

__all__ = ["CONTENDERS", "Contender", "present", "run"]


@dataclass(frozen=True)
class Contender:
    """A package's step, with its properties.

    Attributes:
        column: How to ask for it.
        cubic: Whether a step costs O(n³), to foresee what a larger n will cost.
        lr: Learning rate of a step on a gradient of length 1; with Adam every entry moves by it.
        periodic: Whether its polish comes now and then.
    """

    column: Column
    cubic: bool
    lr: float = 1e-2
    periodic: bool = False

    @property
    def name(self) -> str:
        return self.column.name


def _low_rank(kind: str, label: str, ranks: Iterable[int]) -> list[Contender]:
    return [
        Contender(Ours(kind, f"{label}, rank {k}", rank=k), cubic=False, periodic=True)
        for k in ranks
    ]


def _dense(kind: str, label: str) -> Contender:
    return Contender(Ours(kind, f"{label}, dense", rank=None), cubic=True)


def _adam(kind: str, label: str, rank: int) -> Contender:
    column = Ours(
        kind, f"{label}, rank {rank}, fused Adam base", rank=rank, base=torch.optim.Adam, fused=True
    )
    return Contender(column, cubic=False, lr=1e-5, periodic=True)


ADAM = "torch Adam, fused"
CONTENDERS: list[Contender] = [
    Contender(Unconstrained("torch SGD", "SGD"), cubic=False),
    Contender(Unconstrained("torch Adam", "Adam"), cubic=False, lr=1e-5),
    Contender(Unconstrained(ADAM, "Adam", fused=True), cubic=False, lr=1e-5),
    *_low_rank("ProjUNNT", "ProjUNN-T", (1, 8, 32)),
    _adam("ProjUNNT", "ProjUNN-T", 1),
    *_low_rank("ProjUNND", "ProjUNN-D", (1, 8, 32)),
    _dense("ProjUNND", "ProjUNN-D"),
    *_low_rank("Cayley", "Cayley", (1, 8, 32)),
    _dense("Cayley", "Cayley"),
    _dense("Expm", "Expm"),
    Contender(Geoopt("geoopt SGD, QR", canonical=False), cubic=True),
    Contender(Geoopt("geoopt SGD, canonical", canonical=True), cubic=True),
    Contender(
        Geoopt("geoopt Adam, QR", canonical=False, optimizer="RiemannianAdam"), cubic=True, lr=1e-4
    ),
    Contender(Pogo("POGO"), cubic=True),
    Contender(Parametrization("parametrization, cayley", "cayley"), cubic=True),
    Contender(Parametrization("parametrization, matrix_exp", "matrix_exp"), cubic=True),
    Contender(Geotorch("geotorch, cayley", "cayley"), cubic=True),
    Contender(Reference("projUNN authors, T, rank 1", "projUNN_T", 1), cubic=False),
    Contender(Reference("projUNN authors, D, rank 1", "projUNN_D", 1), cubic=False),
    Contender(Reference("projUNN authors, T, rank 8", "projUNN_T", 8), cubic=False),
]


def present(contenders: Sequence[Contender]) -> tuple[list[Contender], list[str]]:
    """Return the available contenders, and a note for each reason why others are not."""
    missing = {c.name: reason for c in contenders if (reason := c.column.missing()) is not None}
    return [c for c in contenders if c.name not in missing], notes(missing)


# What the summary needs, at the sizes that only these get in a quick run.
CORE = (
    "torch SGD",
    ADAM,
    "ProjUNN-T, rank 1",
    "ProjUNN-T, rank 8",
    "ProjUNN-T, rank 1, fused Adam base",
    "ProjUNN-D, rank 1",
    "geoopt SGD, QR",
)


@dataclass
class Cell:
    """A contender at one size."""

    timing: Timing
    error: float | None = None
    memory: int | None = None
    why: str = ""

    def text(self, statistic: str, scale: float = 1e3) -> str:
        if statistic == "error":
            return "" if self.error is None else f"{self.error:.1e}".replace("e-0", "e-")
        if not self.timing.rounds:
            return self.timing.failure if self.timing.failure.endswith("Error") else ""
        value = short(scale * getattr(self.timing, statistic), 3)
        return value + ("*" if statistic == "mean" and not self.timing.whole else "")


def weight_error(module: nn.Module) -> float:
    return distance(weight_of(module))


def measure(
    x: Tensor,
    contenders: Sequence[Contender],
    *,
    seconds: float,
    rounds: int,
    seed: int,
    most: float,
    clock: Clock | None,
    title: str,
    memory: bool = False,
    columns: int | None = None,
    error: Callable[[nn.Module], float] = weight_error,
    order: list[list[str]] | None = None,
) -> dict[str, Cell]:
    """Time the contenders on copies of one matrix, or one stack of them, and one gradient.

    Args:
        x: The matrices; every contender gets a copy, and all share one gradient.
        contenders: What is timed.
        seconds: What each may take.
        rounds: Most rounds.
        seed: Seed of the order.
        most: Seconds above which a step is left out.
        clock: Ends the rounds when the section's time is up.
        title: Words for the progress bar.
        memory: Whether to read the memory of a step too.
        columns: Columns of a matrix, where the shape of x does not say so.
        error: The error of a module's constraint.
        order: Filled with the names in the order in which they ran.
    """
    g = gradient(x)
    modules, entries = {}, []
    failures: dict[str, str] = {}
    for c in contenders:
        try:
            module = c.column.module(x)
            optimizer = c.column.optimizer(module, c.lr)
        except Exception as refusal:  # a peer that refuses is a result
            failures[c.name] = type(refusal).__name__
            continue
        modules[c.name] = module
        period = polish_period(min(columns or x.shape[-1], x.shape[-2])) if c.periodic else 1
        entries.append(
            Entry(
                c.name,
                c.column.stepper(module, optimizer, g),
                period,
                # What the summary needs is measured even where a period takes long.
                2 * most if c.name in CORE else min(most, max(2 * seconds / period, 2e-3)),
            )
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of peers are ignored
        timings = interleave(
            entries,
            seconds=seconds,
            rounds=rounds,
            seed=seed,
            clock=clock,
            title=title,
            order=order,
        )
        cells = {name: Cell(timing) for name, timing in timings.items()}
        for c in contenders:
            if c.name in failures:
                cells[c.name] = Cell(Timing(failure=failures[c.name]))
        for entry in entries:
            cell = cells[entry.name]
            if not cell.timing.rounds:
                continue
            if memory:
                cell.memory = peak_extra(entry.step)
            column = next(c.column for c in contenders if c.name == entry.name)
            if column.constrained:
                cell.error = error(modules[entry.name])
    return cells


def _fits(n: int, count: int) -> bool:
    """Whether a weight, two states and a workspace for each contender fit into free memory."""
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on every system
        return True
    return 4 * n * n * (3 * count + 4) < 0.8 * free


def run(plan: Plan, clock: Clock) -> Section:
    contenders, absent = present(CONTENDERS)
    cells: dict[tuple[str, int], Cell] = {}
    left_out: dict[str, str] = {}
    seconds: dict[str, tuple[int, float]] = {}
    for index, n in enumerate(plan.sizes):
        now = []
        for c in contenders:
            last_n, last = seconds.get(c.name, (n, 0.0))
            # A step at a small n is mostly overhead, which does not predict larger n.
            foreseen = last * (n / last_n) ** (2.5 if c.cubic else 2) if last_n >= 256 else 0.0
            if n >= plan.core_from and c.name not in CORE:
                left_out.setdefault(c.name, f"from n = {n} on: not in a quick run")
            elif foreseen <= plan.step_limit * (2 if c.name in CORE else 1):
                now.append(c)
            else:
                left_out.setdefault(c.name, f"from n = {n} on: about {short(foreseen)} s a step")
        if not _fits(n, len(now)):
            left_out[f"n = {n}"] = "the contenders together need more memory than is free"
            continue
        if clock.left < 0:
            left_out[f"n = {n}"] = "no time was left"
            continue
        share = 0.6 * clock.left / (len(plan.sizes) - index) / max(len(now), 1)
        found = measure(
            orthonormal(n),
            now,
            seconds=min(share, plan.cell_limit),
            rounds=plan.rounds * (3 if n <= 512 else 1),
            seed=plan.seed + n,
            most=plan.step_limit,
            clock=clock,
            title=f"n = {n}",
            memory=n == plan.memory_size,
        )
        for name, cell in found.items():
            cells[name, n] = cell
            if cell.timing.rounds:
                seconds[name] = (n, cell.timing.mean)
            else:
                left_out.setdefault(name, f"at n = {n}: {cell.timing.failure}")
    return _section(plan, contenders, cells, absent + notes(left_out))


def _section(
    plan: Plan,
    contenders: Sequence[Contender],
    cells: dict[tuple[str, int], Cell],
    footnotes: list[str],
) -> Section:
    sizes = [n for n in plan.sizes if any((c.name, n) in cells for c in contenders)]

    def row(c: Contender, statistic: str) -> list[str]:
        own = [cells.get((c.name, n)) for n in sizes]
        return [c.name, *("" if cell is None else cell.text(statistic) for cell in own)]

    def memory(c: Contender) -> str:
        cell = cells.get((c.name, plan.memory_size))
        if cell is None or cell.memory is None:
            return ""
        matrices = cell.memory / (4 * plan.memory_size**2)
        return short(matrices) if matrices >= 1e-3 else "0"

    head = ["", *(f"n={n}" for n in sizes)]
    lines = [
        "Mean milliseconds of a step. The last column is the most memory that a step held on top "
        f"of what was there before it, in matrices of its size, at n = {plan.memory_size}.",
        "",
        *table([*head, "extra memory"], ([*row(c, "mean"), memory(c)] for c in contenders)),
        "",
        "The orthogonality error of the same matrices after the run:",
        "",
        *table(head, (row(c, "error") for c in contenders if c.column.constrained)),
        "",
        "The medians over the rounds (a polish that runs now and then does not show in them):",
        "",
        *table(head, (row(c, "median") for c in contenders)),
    ]
    if any(not cell.timing.whole for cell in cells.values()):
        lines += ["", "\\* the mean does not run over whole polish periods: the time ran out."]
    if footnotes:
        lines += ["", "Empty cells:", "", *footnotes]
    values = {
        f"step/{name}/{n}": cell.timing.mean
        for (name, n), cell in cells.items()
        if cell.timing.rounds
    }
    lines += TIMES.markdown() + ERRORS.markdown()
    return Section("Time of a step against n", lines, values)
