"""Steps on other shapes: many small matrices, tall ones, complex ones, convolution kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import riemann_unn as ru
from bench.contenders import (
    Column,
    Geoopt,
    Ours,
    Parametrization,
    Pogo,
    Separate,
    Unconstrained,
)

from .matrices import orthonormal
from .page import Section, notes, short, table
from .plan import Clock, Plan
from .steps import ADAM, Cell, Contender, measure, present, weight_error

__all__ = ["run"]


class Convolution(Ours):
    """The kernel of a circular convolution, unitary at every frequency."""

    def module(self, x: Tensor) -> nn.Module:
        layer = ru.nn.CircularConv2d(x.shape[1], x.shape[0], tuple(x.shape[2:]), bias=False)
        with torch.no_grad():
            layer.weight.copy_(x)
        return layer


def _kernel_error(module: nn.Module) -> float:
    return max(float(error) for error in ru.orthogonality_error(module).values())


@dataclass(frozen=True)
class Case:
    """One shape, with its contenders.

    Attributes:
        key: Name of its values.
        title: Heading.
        words: What is compared.
        x: Makes the matrices to start from.
        contenders: What is timed.
        error: The error of a module's constraint.
        columns: Columns of a matrix, where the shape does not say so.
    """

    key: str
    title: str
    words: str
    x: Callable[[], Tensor]
    contenders: Sequence[Contender]
    error: Callable[[nn.Module], float] = weight_error
    columns: int | None = None


def _ours(kind: type[Ours] = Ours) -> list[Contender]:
    low = [
        Contender(kind("ProjUNNT", "ProjUNN-T, rank 1", rank=1), False, periodic=True),
        Contender(kind("ProjUNND", "ProjUNN-D, rank 1", rank=1), False, periodic=True),
        Contender(kind("ProjUNNT", "ProjUNN-T, rank 8", rank=8), False, periodic=True),
    ]
    dense = [
        Contender(kind("Cayley", "Cayley, dense", rank=None), True),
        Contender(kind("Expm", "Expm, dense", rank=None), True),
    ]
    return low + dense


def _unconstrained() -> Contender:
    return Contender(Unconstrained(ADAM, "Adam", fused=True), False, lr=1e-5)


def _geoopt(name: str, *, canonical: bool = False) -> Contender:
    return Contender(Geoopt(name, canonical=canonical), True)


def _separate(c: Contender) -> Contender:
    return Contender(Separate(c.column, f"{c.name}, separate"), c.cubic, c.lr, c.periodic)


def _stacked(column: Column, c: Contender) -> Contender:
    column.name = f"{c.name}, stacked"
    return Contender(column, c.cubic, c.lr, c.periodic)


def _small(count: int, n: int, *, full: bool) -> Case:
    def apart_and_together(make: Callable[[], Contender]) -> list[Contender]:
        return [_separate(make()), _stacked(make().column, make())]

    makers: list[Callable[[], Contender]] = [
        _unconstrained,
        lambda: _ours()[0],
        lambda: _ours()[3],
        lambda: Contender(Pogo("POGO"), True),
    ]
    if full:
        makers[2:2] = [lambda: _ours()[1]]
        makers[4:4] = [lambda: _ours()[4], lambda: _geoopt("geoopt SGD, QR")]
    parametrized = Contender(Parametrization("parametrization, cayley", "cayley"), True)
    return Case(
        f"small{n}",
        f"{count} matrices of {n} × {n}",
        "Separate parameters in one optimizer, beside one parameter that holds them all as a "
        "stack. A step of POGO on the stack is a handful of calls of `torch.bmm` and nothing else.",
        lambda: torch.stack([orthonormal(n, seed=seed) for seed in range(count)]),
        [c for make in makers for c in apart_and_together(make)]
        + [_stacked(parametrized.column, parametrized)],
    )


def cases(plan: Plan) -> list[Case]:
    rows, columns = plan.tall
    channels, size = plan.conv
    n = plan.complex_size
    kernel = (channels, channels, size, size)

    def unitary_kernel() -> Tensor:
        source = torch.Generator().manual_seed(plan.seed)
        return ru.linalg.conv_polar(torch.randn(kernel, generator=source), ndim=2)

    small = [_small(count, size, full=plan.full) for count, size in plan.counts]
    return [
        *small[:1],
        Case(
            "tall",
            f"A tall matrix, {rows} × {columns}",
            "geoopt's canonical metric and torch's parametrizations, `householder` too, form a "
            f"matrix of {rows} × {rows}, and are left out.",
            lambda: orthonormal(rows, columns),
            [
                _unconstrained(),
                *_ours(),
                _geoopt("geoopt SGD, QR"),
                Contender(Pogo("POGO"), True),
            ],
        ),
        Case(
            "complex",
            f"A unitary matrix, {n} × {n}, complex64",
            "An exception is named in the place of the time. No Adam is fused for complex weights.",
            lambda: orthonormal(n, dtype=torch.complex64),
            [
                Contender(Unconstrained("torch Adam", "Adam"), False, lr=1e-5),
                *_ours(),
                _geoopt("geoopt SGD, QR"),
                _geoopt("geoopt SGD, canonical", canonical=True),
                Contender(Pogo("POGO"), True),
                Contender(Parametrization("parametrization, cayley", "cayley"), True),
                Contender(Parametrization("parametrization, matrix_exp", "matrix_exp"), True),
            ],
        ),
        Case(
            "conv",
            f"A convolution kernel, {channels} × {channels} channels on {size} × {size}",
            "Unitary at every frequency, a constraint that the other packages do not have.",
            unitary_kernel,
            [_unconstrained(), *_ours(kind=Convolution)],
            _kernel_error,
            columns=channels,
        ),
        *small[1:],
    ]


def run(plan: Plan, clock: Clock) -> Section:
    lines: list[str] = []
    values: dict[str, float] = {}
    todo = cases(plan)
    for index, case in enumerate(todo):
        if clock.left < 0:
            lines += [f"{case.title}: no time was left.", ""]
            continue
        contenders, absent = present(case.contenders)
        share = 0.6 * clock.left / (len(todo) - index) / max(len(contenders), 1)
        cells = measure(
            case.x(),
            contenders,
            seconds=min(share, plan.cell_limit),
            rounds=plan.rounds,
            seed=plan.seed + index,
            most=4 * plan.step_limit,
            clock=clock,
            title=case.title,
            memory=True,
            columns=case.columns,
            error=case.error,
        )
        values |= {
            f"{case.key}/{name}": cell.timing.mean
            for name, cell in cells.items()
            if cell.timing.rounds
        }
        lines += [f"### {case.title}", "", case.words, "", *_table(contenders, cells), ""]
        lines += [*absent, ""] if absent else []
        lines += _left_out(cells)
    return Section("Other shapes", lines, values)


def _table(contenders: Sequence[Contender], cells: dict[str, Cell]) -> list[str]:
    rows = []
    for c in contenders:
        cell = cells[c.name]
        timing = cell.timing
        if timing.rounds:
            mean = short(1e3 * timing.mean, 3) + ("" if timing.whole else "*")
            median = short(1e3 * timing.median, 3)
        else:
            mean, median = timing.failure if timing.failure.endswith("Error") else "", ""
        error = "" if cell.error is None else short(cell.error, 1)
        memory = "" if cell.memory is None else short(round(cell.memory / 2**20, 3))
        rows.append([c.name, mean, median, error, memory])
    return table(["", "mean ms", "median ms", "orthogonality error", "extra memory, MiB"], rows)


def _left_out(cells: dict[str, Cell]) -> list[str]:
    slow = {
        name: cell.timing.failure
        for name, cell in cells.items()
        if cell.timing.failure and not cell.timing.failure.endswith("Error")
    }
    unsure = any(not math.isnan(c.timing.mean) and not c.timing.whole for c in cells.values())
    star = ["\\* the mean does not run over whole polish periods.", ""] if unsure else []
    return star + ([*notes(slow), ""] if slow else [])
