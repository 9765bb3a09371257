"""Time our optimizers and their peers side by side, and write docs/benchmarks.md.

All contenders of a table run in one process, in rounds, each round in another random order. Run it
from the repository: ``make bench``, or ``python -m bench.suite``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from . import shapes, sketches, steps, summary, targets, training
from .page import BEGIN, PAGE, Section, facts, write
from .plan import FULL, QUICK, SECTIONS, Clock, Plan
from .plots import draw

__all__ = ["main", "measure", "redraw"]

_QUICK_OUT = PAGE.parent / "_build" / "bench"
_RUN: dict[str, Callable[[Plan, Clock], Section]] = {
    "steps": steps.run,
    "shapes": shapes.run,
    "training": training.run,
    "sketches": sketches.run,
    "targets": targets.run,
}


def measure(plan: Plan, out: Path, only: Sequence[str] = SECTIONS) -> dict[str, float]:
    """Run the sections, write the page and the pictures, and return all values by name.

    Args:
        plan: What to measure, and how long it may take.
        out: Folder of ``benchmarks.md`` and ``images/``.
        only: Sections to run; the page holds these alone.
    """
    names = tuple(name for name in SECTIONS if name in only)
    clock = Clock(plan, names)
    parts = ", ".join(f"{name} {t:.0f} s" for name, t in clock.estimates().items())
    print(f"at most {plan.minutes:g} minutes: {parts}", flush=True)
    found: list[Section] = []
    values: dict[str, float] = {}
    for name in tqdm(names, desc="sections"):
        clock.enter(name)
        with torch.random.fork_rng(devices=[]):  # layers and peers draw from it
            torch.manual_seed(plan.seed)
            section = _RUN[name](plan, clock)
        clock.leave(name)
        found.append(section)
        values |= section.values
        tqdm.write("\n".join([f"\n## {section.title}", "", *section.lines]))
    found.insert(0, summary.run(values))
    spent = time.monotonic() - clock.begin
    partly = "" if names == SECTIONS else f" (only {', '.join(names)})"
    lines = [f"Measured by `{plan.name}`{partly} in {spent / 60:.1f} minutes with {facts()}."]
    for section in found:
        lines += ["", f"## {section.title}", "", *section.lines]
    write(out / "benchmarks.md", _tidy(lines))
    redraw(out)
    print("\n".join(["", f"## {found[0].title}", "", *found[0].lines, ""]))
    parts = ", ".join(f"{name} {t:.0f} s" for name, t in clock.spent.items())
    print(f"{spent:.0f} s: {parts}; written: {out / 'benchmarks.md'}")
    return values


def redraw(out: Path) -> None:
    """Draw the pictures of a page from its tables.

    Args:
        out: Folder of ``benchmarks.md`` and ``images/``.
    """
    text = (out / "benchmarks.md").read_text(encoding="utf-8")
    for file in draw(text.split(BEGIN)[1], out / "images"):
        print(f"drawn: {file}")


def _tidy(lines: Sequence[str]) -> list[str]:
    """Drop empty lines that follow one another."""
    return [line for i, line in enumerate(lines) if line or i == 0 or lines[i - 1]]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.suite", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="at most 3 minutes; leaves docs/benchmarks.md alone"
    )
    parser.add_argument("--minutes", type=float, help="wall time of the whole run")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, metavar="SECTION")
    parser.add_argument("--out", type=Path, help="folder of benchmarks.md and its images")
    parser.add_argument(
        "--draw", action="store_true", help="measure nothing; pictures anew from the page's tables"
    )
    args = parser.parse_args(arguments)
    if args.draw:
        redraw(args.out or PAGE.parent)
        return
    plan = QUICK if args.quick else FULL
    if args.minutes is not None:
        plan = plan.with_minutes(args.minutes)
    partial = args.quick or tuple(args.only) != SECTIONS
    out = args.out if args.out is not None else _QUICK_OUT if partial else PAGE.parent
    measure(plan, out, args.only)


if __name__ == "__main__":
    main()
