"""Methods of `bench.optimality`: for each package, how to minimise a problem.

A method runs from a start until its `Trace` ends it. The trace records every gradient evaluation,
by which all methods are compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import riemann_unn as ru
from bench.contenders import Column, Geoopt, Geotorch, Ours, Parametrization, Pogo
from bench.problems import MiniBatch, Problem

# A factor 3 apart; for the bases of every package alike.
RATES = {
    "SGD": (5.4, 1.8, 0.6, 0.2, 0.067),
    "momentum": (3.0, 1.0, 0.33, 0.11, 0.037),
    "Adam": (0.3, 0.1, 0.033, 0.011, 0.0037),
}
# Options with which torch's L-BFGS runs to full accuracy; the defaults of ours do.
SEARCH: dict[str, Any] = {
    "max_iter": 100,
    "tolerance_grad": 0.0,
    "tolerance_change": 0.0,
    "line_search_fn": "strong_wolfe",
}
STAY_RATE = 1e-3
TOLERANCES = (1e-6, 1e-10)
ROUNDS = ("SGD", "momentum", "Adam")
OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"base": torch.optim.SGD},
    "momentum": {"base": torch.optim.SGD, "momentum": 0.9},
    "Adam": {"base": torch.optim.Adam},
    "RMSprop": {"base": torch.optim.RMSprop},
}


class Finished(Exception):  # noqa: N818
    """Raised out of a method that needs no more evaluations."""


class Trace:
    """The gap at each gradient evaluation, up to the last tolerance or the limit.

    The gap is (f − f*) / (f₀ − f*), or the orthogonality error where that is larger: a low loss
    off the manifold is no success.
    """

    def __init__(self, problem: Problem, start: Tensor, limit: int) -> None:
        self.problem, self.limit = problem, limit
        self.first = float(problem.value(start))
        self.gaps: list[float] = []
        self.losses = 0  # evaluations of the loss alone

    def add(self, x: Tensor, loss: float) -> None:
        gap = (loss - self.problem.best) / (self.first - self.problem.best)
        self._append(max(gap, off_manifold(x)))

    def repeat(self) -> None:
        """Count an evaluation at the point of the one before."""
        self._append(self.gaps[-1])

    def _append(self, gap: float) -> None:
        if not math.isfinite(gap):
            raise Finished
        self.gaps.append(gap)
        if gap <= TOLERANCES[-1] or len(self.gaps) > self.limit:
            raise Finished

    def reached(self, tolerance: float) -> int | None:
        """Return the steps, that is evaluations before the one that finds the tolerance met."""
        return next((i for i, gap in enumerate(self.gaps) if gap <= tolerance), None)


def searches(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether an optimizer evaluates a closure several times in a step."""
    base = getattr(optimizer, "base", optimizer)
    return isinstance(base, torch.optim.LBFGS | ru.optim.LBFGS)


def off_manifold(x: Tensor) -> float:
    gap = x.mH @ x - torch.eye(x.shape[-1], dtype=x.dtype)
    return float(torch.linalg.vector_norm(gap)) / x.shape[-1] ** 0.5


@dataclass
class Method:
    """A row of a table.

    Args:
        name: What the table calls it.
        table: ``"SGD"``, ``"momentum"``, ``"Adam"``, or ``"other"`` for others.
        column: How a package is asked for a constrained weight.
        make: The optimizer of a module with a learning rate.
        rates: Learning rates to try.
        rank: Rank of one of our optimizers with its tangent sketch, ``"whole"`` without a sketch,
            None for all else.
    """

    name: str
    table: str
    column: Column
    make: Callable[[nn.Module, float], torch.optim.Optimizer]
    rates: tuple[float, ...]
    rank: int | str | None = None

    def missing(self) -> str | None:
        return self.column.missing()

    def run(self, problem: Problem, start: Tensor, rate: float, trace: Trace) -> None:
        module = self.column.module(start)
        optimizer = self.make(module, rate)

        def closure() -> Tensor:
            optimizer.zero_grad()
            weight = module.weight
            loss = problem.value(weight)
            loss.backward()
            trace.add(weight.detach(), float(loss.detach()))
            return loss

        while True:
            if searches(optimizer):
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()

    def train(self, task: MiniBatch, start: Tensor, rate: float) -> float:
        """Return the gap after the steps of a task that is known by samples."""
        module = self.column.module(start)
        optimizer = self.make(module, rate)
        for step in range(task.steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * task.decay(step)
            optimizer.zero_grad()
            task.sample(module.weight, step).backward()
            optimizer.step()
        weight = module.weight.detach()
        return max(task.whole.gap(weight, float(task.whole.value(start))), off_manifold(weight))

    def stay(self, problem: Problem, start: Tensor, rate: float, steps: int) -> list[float]:
        """Return the gaps of steps that begin at the optimum, measured by the start's loss."""
        module = self.column.module(problem.optimum)
        optimizer = self.make(module, rate)
        first, gaps = float(problem.value(start)), []
        for _ in range(steps):
            optimizer.zero_grad()
            problem.value(module.weight).backward()
            optimizer.step()
            weight = module.weight.detach()
            gaps.append(max(problem.gap(weight, first), off_manifold(weight)))
        return gaps


class Pymanopt(Method):
    """A solver of pymanopt, with its own line search and Hessian."""

    def __init__(self, name: str, solver: str) -> None:
        column = Column(name)
        column.needs = "pymanopt"
        super().__init__(name, "other", column, column.optimizer, (math.nan,))
        self.solver = solver

    def run(self, problem: Problem, start: Tensor, rate: float, trace: Trace) -> None:
        import pymanopt

        manifold = _pymanopt_manifold(problem)
        last = b""

        def point(x: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(x))

        @pymanopt.function.numpy(manifold)
        def cost(x: np.ndarray) -> float:
            trace.losses += 1
            return float(problem.value(point(x)))

        @pymanopt.function.numpy(manifold)
        def gradient(x: np.ndarray) -> np.ndarray:
            nonlocal last
            t = point(x).requires_grad_()
            loss = problem.value(t)
            (g,) = torch.autograd.grad(loss, t)
            if x.tobytes() != last:  # its Hessian asks for the gradient again
                last = x.tobytes()
                trace.add(t.detach(), float(loss.detach()))
            return g.numpy()

        @pymanopt.function.numpy(manifold)
        def hessian(x: np.ndarray, direction: np.ndarray) -> np.ndarray:
            t = point(x).requires_grad_()
            (g,) = torch.autograd.grad(problem.value(t), t, create_graph=True)
            trace.repeat()
            if not g.requires_grad:  # the loss is linear
                return np.zeros_like(x)
            along = (g.conj() * point(direction)).sum().real
            (product,) = torch.autograd.grad(along, t)
            return product.numpy()

        solver = getattr(pymanopt.optimizers, self.solver)(
            verbosity=0, max_iterations=10**6, max_cost_evaluations=10**6, min_gradient_norm=1e-14
        )
        solver.run(
            pymanopt.Problem(
                manifold, cost, euclidean_gradient=gradient, euclidean_hessian=hessian
            ),
            initial_point=start.numpy().copy(),
        )


def _pymanopt_manifold(problem: Problem) -> Any:
    from pymanopt import manifolds

    n, p = problem.optimum.shape
    if not problem.optimum.is_complex():
        return manifolds.Stiefel(n, p)
    # It has no complex Stiefel manifold; a subspace needs no more than the Grassmannian.
    return manifolds.UnitaryGroup(n) if n == p else manifolds.ComplexGrassmann(n, p)


# Rows ----------------------------------------------------------------------------------


def _torch(kind: type[torch.optim.Optimizer], **options: Any) -> Callable[..., Any]:
    return lambda module, rate: kind(module.parameters(), lr=rate, **options)


def _ours(name: str, rank: int | None, base: str, sketch: str = "tangent") -> Method:
    label = f"`{name}` {'whole' if rank is None else f'rank {rank}'}"
    label += "" if sketch == "tangent" else f", sketch {sketch}"
    column = Ours(name, label, rank=rank, sketch=sketch, **OPTIONS[base])
    known: int | str | None = "whole" if rank is None else rank
    known = known if sketch == "tangent" else None
    return Method(label, base, column, column.optimizer, RATES.get(base, ()), known)


def _geoopt(base: str, canonical: bool) -> Method:
    optimizer = "RiemannianAdam" if base == "Adam" else "RiemannianSGD"
    name = f"geoopt {'canonical' if canonical else 'Euclidean'}"
    column = Geoopt(name, canonical=canonical, optimizer=optimizer)
    return Method(name, base, column, _with_momentum(column, base), RATES[base])


def _pogo(base: str) -> Method:
    column = Pogo("POGO")
    return Method(column.name, base, column, _with_momentum(column, base), RATES[base])


def _with_momentum(column: Column, base: str) -> Callable[..., torch.optim.Optimizer]:
    options = {"momentum": 0.9} if base == "momentum" else {}
    return lambda module, rate: column.optimizer(module, rate, **options)


def _parametrized(column: Column) -> Iterator[Method]:
    adam, rates = _torch(torch.optim.Adam), RATES["Adam"]
    yield Method(f"{column.name}, Adam", "Adam", column, adam, rates)
    search = _torch(torch.optim.LBFGS, **SEARCH)
    yield Method(f"{column.name}, LBFGS", "other", column, search, (1.0,))


RANKS = (1, 4, None)
# Without a rank ProjUNNT is Expm, and with one Expm is ProjUNNT.
OURS = [("ProjUNNT" if rank else "Expm", rank) for rank in RANKS]
OURS += [(name, rank) for name in ("ProjUNND", "Cayley") for rank in RANKS]


def methods() -> list[Method]:
    """Return the rows of the first tables, ours first in each."""
    found = [_ours(name, rank, base) for base in ROUNDS for name, rank in OURS]
    found += [_ours("ProjUNNT", 1, base, sketch="lsi") for base in ROUNDS]
    found += [_geoopt(base, canonical) for base in ROUNDS for canonical in (False, True)]
    found += [_pogo("SGD"), _pogo("momentum")]
    for column in (
        Parametrization("torch cayley", "cayley"),
        Parametrization("torch matrix_exp", "matrix_exp"),
        Geotorch("geotorch", "none"),
    ):
        found += _parametrized(column)
    found += line_searches()
    found.append(Pymanopt("pymanopt conjugate gradient", "ConjugateGradient"))
    found.append(Pymanopt("pymanopt trust regions", "TrustRegions"))
    return found


def line_searches() -> list[Method]:
    """Return ours that search along lines: our own, and torch's class as a base."""
    own = Ours("LBFGS", "`LBFGS`")
    wrapped = Ours("Expm", "`Expm`, base LBFGS", base=torch.optim.LBFGS, history_size=10, **SEARCH)
    return [Method(c.name, "other", c, c.optimizer, (1.0,)) for c in (own, wrapped)]


def stayers() -> dict[str, list[Method]]:
    """Return by base the methods that are started at the optimum."""
    bases = ("Adam", "RMSprop", "momentum")
    found = {
        base: [
            _ours(name, rank, base)
            for name, rank in (
                ("ProjUNNT", 1),
                ("ProjUNNT", 4),
                ("ProjUNND", 1),
                ("Cayley", None),
                ("Expm", None),
            )
        ]
        + [_ours("ProjUNNT", 1, base, sketch="lsi")]
        for base in bases
    }
    for base in ("Adam", "momentum"):
        found[base].append(_geoopt(base, False))
    return found


def left_out(found: list[Method]) -> list[str]:
    """Return a line for each package that is not installed."""
    return sorted({note for method in found if (note := method.missing())})
