"""Rerun the papers' claims, and write docs/papers.md: ``python -m bench.papers``.

Every run is stored as soon as it is done, and long ones save their state every minute: started
again, the command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from riemann_unn.demo import data

from . import chang, convolutions, lebeurrier, magnasco, projunn, vodrahalli
from .experiment import Experiment, Plan, Report, Result
from .page import write
from .store import Store
from .workers import Job, cores, do

__all__ = ["EXPERIMENTS", "main"]

ROOT = Path(__file__).resolve().parents[2]
_MODULES = (projunn, convolutions, magnasco, chang, lebeurrier, vodrahalli)
EXPERIMENTS: dict[str, Experiment] = {e.name: e for m in _MODULES for e in m.EXPERIMENTS}


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.out is None:
        whole = not (options.quick or options.full or options.only)
        options.out = ROOT / "docs" if whole else options.store / "page"
    scale = "quick" if options.quick else "full" if options.full else "usual"
    plan = Plan(scale, options.seeds, options.data)
    try:
        data.images(plan.data)  # missing data is an error now, not after an hour
    except data.DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    store = Store(options.store / scale)
    chosen = [EXPERIMENTS[name] for name in options.only or EXPERIMENTS]
    jobs: list[Job] = [(e, run) for e in chosen for run in e.runs(plan)]
    left = [job for job in jobs if options.again or store.find(*job) is None]
    minutes = sum(run.minutes for _, run in left) / options.workers
    print(f"{len(jobs)} runs, {len(left)} to do, about {minutes:.0f} minutes", flush=True)
    try:
        failed = do([] if options.draw else left, store, workers=options.workers)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    found = list(EXPERIMENTS.values()) if not options.only else chosen
    page = options.out / "papers.md"
    seconds = 0.0
    reports: list[tuple[Experiment, Report]] = []
    idle = [experiment for experiment in found if experiment.needs and not experiment.runs(plan)]
    for experiment in found:
        results: dict[str, Result] = {}
        missing = []
        for run in experiment.runs(plan):
            result = store.find(experiment, run)
            if result is None:
                missing.append(run.name)
            else:
                results[run.name] = result
                seconds += result["seconds"]
        if results:
            (options.out / "images").mkdir(parents=True, exist_ok=True)
            report = experiment.report(plan, results, options.out / "images")
            report.missing = missing
            reports.append((experiment, report))
    how = " ".join(["python -m bench.papers", *_words(options)])
    spent = f"{seconds / 60:.0f} minutes of runs on one thread each"
    write(page, reports, how, spent, idle)
    for experiment, report in reports:
        print(f"\n{experiment.title}")
        for claim in report.claims:
            met = {None: "", True: ", met", False: ", MISSED"}[claim.met]
            asked = f" (asked: {claim.asked}{met})" if claim.asked else ""
            print(f"  {claim.claim}: theirs {claim.theirs}; ours {claim.ours}{asked}")
    print(f"\nwritten: {page}")
    for experiment in idle:
        print(f"{experiment.name}: nothing to run without {experiment.needs}")
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if failed else 0


def _words(options: argparse.Namespace) -> list[str]:
    words = ["--quick"] if options.quick else ["--full"] if options.full else []
    if options.seeds > 1:
        words.append(f"--seeds {options.seeds}")
    return words


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.papers", description=__doc__)
    add = parser.add_argument
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="all of it small, in five minutes")
    size.add_argument("--full", action="store_true", help="the papers' own sizes: a night or a GPU")
    add("--seeds", type=int, default=1, help="seeds of runs under ten minutes (default: 1)")
    add("--only", nargs="+", choices=EXPERIMENTS, metavar="NAME", help=", ".join(EXPERIMENTS))
    add("--data", default="mnist5000", help=data.HELP)
    add("--workers", type=int, default=cores(), help="processes, one thread each (default: cores)")
    add("--again", action="store_true", help="do also what is stored")
    add("--draw", action="store_true", help="run nothing, write the page from what is stored")
    add("--store", type=Path, default=ROOT / "build" / "papers", help="folder of the results")
    add(
        "--out",
        type=Path,
        help="folder of papers.md and images/ (default: docs, of a part the store)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
