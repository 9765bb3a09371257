"""Optimality: our optimizers and their peers on problems whose optimum is known.

Run from the repository: ``python -m bench.optimality``. It takes a quarter of an hour on two
cores at most and writes docs/optimality.md with its pictures. ``--quick`` takes two minutes for a
few problems and learning rates, prints its tables and leaves the page alone.
"""

from __future__ import annotations

import argparse
import math
import platform
import time
from collections.abc import Iterable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import riemann_unn as ru
from bench.optimality_cells import BRIEF, FULL, STAY_STEPS, Found, Plan, measure, short
from bench.optimality_peers import (
    RANKS,
    ROUNDS,
    STAY_RATE,
    TOLERANCES,
    left_out,
    methods,
    stayers,
)
from bench.optimality_pictures import PROBLEMS, draw, drawn
from bench.problems import MAKERS, Problem, mini_batch_pca

DOCS = Path(__file__).parent.parent / "docs"
PACKAGES = ("torch", "geoopt", "pogo-torch", "geotorch", "pymanopt")

TEXT = r"""# Does it reach the optimum?
Weights that stay on their manifold are worth little if training stops at a point that is not
critical. Here our four optimizers and other packages minimise functions of one matrix whose least
value $f^*$ is known, in double precision, all from the same random start $X_0$; where the
determinant decides what can be reached, the start has that of the optimum. A *gap* is
$(f - f^*) / (f_0 - f^*)$, or the orthogonality error $\|X^H X - I\|_F / \sqrt{p}$ where that is
larger, so that a low loss off the manifold does not count.

A cell holds the steps, each with a gradient evaluation, until the gap is at most 1e-6, and after
the stroke until it is at most 1e-10; each is the best of RATES learning rates a factor 3 apart,
LIMIT at most. A dash: not reached. **Bold**: 1e-6 is never reached, and the number is the least
gap seen; the name of an exception means that the package refuses the problem. LBFGS and pymanopt
evaluate several gradients in a step, and all of them count, as does a product with the Hessian.

The problems are those of `bench/problems.py`: principal components of scikit-learn's digits,
$-\mathrm{tr}(X^T C X)$; Brockett's $\mathrm{tr}(X^T A X N)$, which is harder the more weights
$N$ has; Procrustes, $-\mathrm{tr}(X^T M)$, and $\|A - BX\|^2$ with noise; eight symmetric matrices
made diagonal at once; the quantum Fourier transform by the fidelity of its gate, and from pairs of
states; the dominant subspace of a Hermitian matrix. `ProjUNNT` without a rank is `Expm`, and `Expm`
with a rank is `ProjUNNT`. "Sketch lsi" is the sketch of the Euclidean gradient, as published.
`LBFGS` has a {doc}`page of its own <lbfgs>`.
"""


# The page ------------------------------------------------------------------------------


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(head)
    lines = [head, ["---"] * len(head), *map(list, rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


class Report:
    """The lines of the page, from what was measured."""

    def __init__(self, plan: Plan, results: dict[tuple[object, ...], object]) -> None:
        self.plan, self.results = plan, results
        self.rows = methods()
        self.problems: dict[str, Problem] = {key: MAKERS[key]() for key in plan.problems}

    def found(self, key: str, index: int) -> Found | None:
        found = self.results.get((key, index))
        return found if isinstance(found, Found) else None

    def lines(self) -> list[str]:
        lines = self.summary()
        for name, title in (
            ("SGD", "Plain steps"),
            ("momentum", "Momentum 0.9"),
            ("Adam", "Adam"),
            ("other", "Line searches and second order"),
        ):
            lines += ["", f"## {title}", *self.minimised(name)]
        lines += ["", "## Started at the optimum", *self.stayed()]
        if self.plan.mini_batches:
            lines += ["", "## From mini-batches", *self.sampled()]
        return lines

    def minimised(self, name: str) -> list[str]:
        rows = []
        for index, method in enumerate(self.rows):
            cells = [self.found(key, index) for key in self.plan.problems]
            if method.table == name and any(cells):
                rows.append([method.name, *(cell.text if cell else "" for cell in cells)])
        note = {
            "SGD": "`torch.optim.SGD` for our optimizers, RiemannianSGD for geoopt.",
            "momentum": "The same with momentum 0.9.",
            "Adam": "`torch.optim.Adam` for ours and parametrizations, RiemannianAdam for geoopt.",
            "other": self.searches(),
        }[name]
        return [note, "", *table(["", *(p.name for p in self.problems.values())], rows)]

    def searches(self) -> str:
        shares = [
            found.losses
            for index in range(len(self.rows))
            for key in self.plan.problems
            if self.rows[index].name.endswith("gradient")
            and (found := self.found(key, index))
            and TOLERANCES[0] in found.reached
        ]
        if not shares:
            return "Each takes its own step lengths."
        mean = sum(shares) / len(shares)
        return (
            "Each finds its own step lengths, so none has a learning rate. pymanopt's conjugate "
            f"gradient evaluates the loss alone {mean:.1f} times for each gradient, which is not "
            "counted; LBFGS searches with gradients, which are."
        )

    def summary(self) -> list[str]:
        ours = [
            (method, found)
            for index, method in enumerate(self.rows)
            for key in self.plan.problems
            if method.rank is not None and (found := self.found(key, index))
        ]
        counts = [sum(t in found.reached for _, found in ours) for t in TOLERANCES]
        lines = [
            "## In short",
            f"Of {len(ours)} cells of our optimizers {counts[0]} reach 1e-6 and {counts[1]} 1e-10. "
            "The most evaluations that any of the four needs to 1e-6 on any problem, and the "
            "problem on which it does:",
            "",
        ]
        rows = []
        for rank in RANKS:
            known = "whole" if rank is None else rank
            row = ["whole" if rank is None else f"rank {rank}"]
            row += [self.worst(base, known) for base in ROUNDS]
            rows.append(row)
        for metric in ("geoopt Euclidean", "geoopt canonical"):
            row = [self.ratio(base, metric) for base in ROUNDS]
            rows.append([f"whole, over {metric}", *row])
        return [*lines, *table(["", "SGD", "momentum 0.9", "Adam"], rows)]

    def worst(self, base: str, rank: int | str) -> str:
        cells = [
            (found.reached.get(TOLERANCES[0], math.inf), key)
            for index, method in enumerate(self.rows)
            for key in self.plan.problems
            if method.table == base and method.rank == rank and (found := self.found(key, index))
        ]
        lost = [key for count, key in cells if math.isinf(count)]
        most, key = max(cell for cell in cells if cell[1] not in lost)
        note = "".join(f"; not all reach {self.problems[k].name}" for k in sorted(set(lost)))
        return f"{most}, {self.problems[key].name}{note}"

    def ratio(self, base: str, other: str) -> str:
        """Return the largest ratio of whole steps over another's, where the other converges."""
        ratios = []
        for key in self.plan.problems:
            counts: dict[bool, list[int]] = {True: [], False: []}
            for index, method in enumerate(self.rows):
                if method.table == base and (method.rank == "whole" or method.name == other):
                    found = self.found(key, index)
                    if found and TOLERANCES[0] in found.reached:
                        counts[method.rank == "whole"].append(found.reached[TOLERANCES[0]])
            if counts[True] and counts[False]:
                ratios.append((max(counts[True]) / min(counts[False]), key))
        if not ratios:
            return "–"
        largest, key = max(ratios)
        return f"{largest:.2f}, {self.problems[key].name}"

    def stayed(self) -> list[str]:
        rows = []
        for base, found in stayers().items():
            for index, method in enumerate(found):
                cells = [self.results.get((key, base, index)) for key in self.plan.stay]
                if any(cells):
                    text = [
                        " / ".join(map(short, c)) if isinstance(c, tuple) else f"**{c}**"
                        for c in cells
                    ]
                    rows.append([f"{base}, {method.name}", *text])
        return [
            f"{STAY_STEPS} steps at learning rate {STAY_RATE} that begin at the optimum: the "
            "largest gap, and after the stroke the largest of the last 100 steps. The first step "
            "of RMSprop moves entries by ten learning rates, however small the gradient is.",
            "",
            *table(["", *(MAKERS[key]().name for key in self.plan.stay)], rows),
        ]

    def sampled(self) -> list[str]:
        task = mini_batch_pca()
        rows: dict[str, list[str]] = {}
        for index, method in enumerate(self.rows):
            value = self.results.get((index,))
            if value is not None:
                row = rows.setdefault(method.name, ["", "", ""])
                text = short(value) if isinstance(value, float) else f"**{value}**"
                row[ROUNDS.index(method.table)] = text
        return [
            f"Principal components of the digits from {task.steps} batches of 64 images, the "
            "learning rate falling along half a cosine: the gap on all images at the end, for the "
            "best of the same learning rates.",
            "",
            *table(["", *ROUNDS], ([name, *row] for name, row in rows.items())),
        ]


def versions() -> str:
    found = [f"Python {platform.python_version()}", f"riemann_unn {ru.__version__}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} not installed")
    return ", ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="less of it; the page is left alone")
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time, a thread each")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of the page")
    parser.add_argument(
        "--pictures", action="store_true", help="measure what they show, and draw them anew"
    )
    args = parser.parse_args()
    plan, begin = BRIEF if args.quick else FULL, time.perf_counter()
    if args.pictures:
        plan = replace(FULL, problems=PROBLEMS, stay=(), mini_batches=False, methods=drawn())
        draw(args.out / "images", plan, measure(plan, args.jobs))
        return
    report = Report(plan, measure(plan, args.jobs))
    lines = report.lines()
    print("\n".join(lines))
    notes = left_out(methods())
    print(f"{time.perf_counter() - begin:.0f} s; {versions()}", *notes, sep="; ")
    if args.quick:
        return
    head = TEXT.replace("RATES", "five").replace("LIMIT", str(plan.limit))
    pictures = draw(args.out / "images", plan, report.results)
    ending = f"Measured with {versions()}, on the CPU, by `python -m bench.optimality`."
    skipped = [f"Left out: {note}." for note in notes]
    text = "\n".join([head.rstrip(), *pictures, "", *lines, "", ending, *skipped])
    (args.out / "optimality.md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
