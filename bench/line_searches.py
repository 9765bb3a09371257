"""Evaluations to ten digits: optimizers with line searches.

Run from the repository: ``python -m bench.line_searches``. It takes ten minutes on two cores at
most, prints its tables and writes them to docs/lbfgs.md.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import torch

from bench.optimality import table, versions
from bench.optimality_cells import short
from bench.optimality_peers import TOLERANCES, Finished, Method, Trace, methods, off_manifold
from bench.problems import (
    Problem,
    brockett,
    joint_diagonalisation,
    large_subspace,
    noisy_procrustes,
    pca_digits,
    procrustes,
    qft_gate,
)
from riemann_unn.optim.descent import Descent

PAGE = Path(__file__).parent.parent / "docs" / "lbfgs.md"
BEGIN, END = "<!-- tables of bench.line_searches -->", "<!-- end of tables -->"
SEEDS = (0, 1, 2)
LIMIT = 1500
# The bound on the number of evaluations of the three seeds.
TASKS: dict[str, tuple[Callable[[int], Problem], int]] = {
    "PCA digits 64×5": (lambda seed: pca_digits(), 30),
    "Brockett, 3 weights": (brockett, 73),
    "Brockett, 11 weights": (lambda seed: brockett(seed, weights=11), 73),
    "Procrustes n=20": (lambda seed: procrustes(seed, 20), 40),
    "Procrustes n=100": (lambda seed: procrustes(seed, 100), 75),
    "noisy Procrustes n=20": (noisy_procrustes, 30),
    "joint diagonalisation 12, K=8": (joint_diagonalisation, 26),
    "QFT-16 fidelity": (lambda seed: qft_gate(), 15),
    "top 50 of 1000×1000": (large_subspace, 350),
}
LARGE = "top 50 of 1000×1000"
ALONG = "`LBFGS` along lines alone"


@dataclass
class Run:
    """The result of a method from one start."""

    count: int | None
    least: float
    seconds: float
    error: float
    message: str = ""


def searchers() -> dict[str, Method]:
    """Return the methods by name, ours first."""
    found = {m.name: m for m in methods() if m.table == "other" and not m.missing()}
    return {"`LBFGS`": found["`LBFGS`"], ALONG: found["`LBFGS`"]} | found


def run(task: str, name: str, seed: int) -> Run:
    """Run a method from a random start, on one thread."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    problem, method = TASKS[task][0](seed), searchers()[name]
    tries = patch.object(Descent, "_try_concave") if name == ALONG else nullcontext()
    with tries:
        _run(method, procrustes(n=4), seed, 20)  # what is imported at first use
        return _run(method, problem, seed, LIMIT)


def _run(method: Method, problem: Problem, seed: int, limit: int) -> Run:
    start = problem.start(seed)
    trace = _Watched(problem, start, limit)
    begin, message = time.process_time(), ""
    try:
        method.run(problem, start, 1.0, trace)
    except Finished:
        pass
    except Exception as exception:  # what a package raises is its result
        message = type(exception).__name__
    seconds = time.process_time() - begin
    count = trace.reached(TOLERANCES[-1])
    return Run(count, min(trace.gaps, default=math.nan), seconds, trace.error, message)


class _Watched(Trace):
    """A trace that keeps the last orthogonality error."""

    error = 0.0

    def add(self, x: torch.Tensor, loss: float) -> None:
        self.error = off_manifold(x)
        super().add(x, loss)


def measure(tasks: list[str], jobs: int) -> dict[tuple[str, str], list[Run]]:
    cells = [
        (task, name)
        for task in tasks
        for name in searchers()
        # A parametrization by a matrix exponential of 1000 rows takes minutes for a step.
        if task != LARGE or not name.startswith(("torch", "geotorch", "pymanopt trust"))
    ]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        running = {cell: [pool.submit(run, *cell, seed) for seed in SEEDS] for cell in cells}
        return {cell: [job.result() for job in jobs] for cell, jobs in running.items()}


def lines(found: dict[tuple[str, str], list[Run]], tasks: list[str]) -> list[str]:
    def counts(runs: list[Run] | None) -> str:
        if runs is None:
            return ""
        if runs[0].message:
            return f"**{runs[0].message}**"
        return ", ".join(f"**{short(r.least)}**" if r.count is None else str(r.count) for r in runs)

    def seconds(runs: list[Run] | None) -> str:
        done = runs is not None and all(r.count is not None for r in runs)
        return f"{sum(r.seconds for r in runs) / len(runs):.2g}" if runs and done else ""

    rows = [["asked for", *(f"≤ {TASKS[task][1]}" for task in tasks)]]
    rows += [[name, *(counts(found.get((t, name))) for t in tasks)] for name in searchers()]
    timed = [[name, *(seconds(found.get((t, name))) for t in tasks)] for name in searchers()]
    ours = [r for (_, name), runs in found.items() if "LBFGS`" in name for r in runs]
    error = max(r.error for r in ours)
    return [
        "Gradient evaluations until the gap is at most 1e-10, with seeds 0, 1 and 2. **Bold**: "
        "never, and the number is the least gap seen; the name of an exception means that the "
        "package refuses the problem.",
        "",
        *table(["", *tasks], rows),
        "",
        f"The worst orthogonality error of `LBFGS` where it ends is {error:.0e}. Processor time, "
        "in seconds, on one thread, the mean of the three; the closures are the same for all, and "
        "pymanopt's gradient is computed with its loss:",
        "",
        *table(["", *tasks], timed),
        "",
        f"Measured with {versions()}, on the CPU, by `python -m bench.line_searches`.",
    ]


def write(text: list[str], page: Path) -> None:
    """Put the tables where the page has its place for them."""
    before, rest = page.read_text("utf-8").split(BEGIN)
    after = rest.split(END)[1]
    page.write_text("\n".join([before + BEGIN, *text, END + after]), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time, a thread each")
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args()
    text = lines(measure(args.only, args.jobs), args.only)
    print("\n".join(text))
    if args.only == list(TASKS):
        write(text, args.page)


if __name__ == "__main__":
    main()
